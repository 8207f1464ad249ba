# LoRA on Gemma 3 270M with a head on the text of CMU-MOSI, without audio: what plain fine-tuning
# gives, to compare the adapters on the frozen LM with.
# python train.py config/lora_mosi_gemma.py --corpus=mosi_official.pkl --lm=FOLDER
# hardware: 1 CPU core of a machine with AMX; 12 min with --dtype=bfloat16 on a busy machine
# expected: test MAE 0.756 +- 0.016 (n=5), Corr 0.785 +- 0.009; majority 1.456. The LM of this and of
#   the other configs of Gemma was dequantised from Q4_K_M.
# paper: none with this LM. epochs was chosen by valid MAE, one seed; lm_depth as in the other configs,
#   by ridge regression on frozen states (LOG.md)
system = 'lora_lm'
corpus = 'mosi_official.pkl'
lm = 'google/gemma-3-270m'
lm_depth = 12
batch_size = 32
accumulate = 1
epochs = 8
lr = 5e-4
weight_decay = 0.01
average_epochs = 1.0
