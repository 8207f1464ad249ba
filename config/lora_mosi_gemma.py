# LoRA on Gemma 3 270M with a head on the text of CMU-MOSI, without audio: what plain fine-tuning
# gives, to compare the adapters on the frozen LM with.
# python train.py config/lora_mosi_gemma.py --corpus=mosi_official.pkl --lm=FOLDER
# hardware: 1 CPU core of a machine with AMX; 4 min with --dtype=bfloat16
# expected: test MAE 0.783 +- 0.007 (n=3), Corr 0.772 +- 0.006; majority 1.456
# paper: none with this LM. lm_depth, rate and epochs were chosen by valid MAE, one seed (LOG.md)
system = 'lora_lm'
corpus = 'mosi_official.pkl'
lm = 'google/gemma-3-270m'
lm_depth = 12
batch_size = 32
accumulate = 1
epochs = 4
lr = 5e-4
weight_decay = 0.01
average_epochs = 1.0
