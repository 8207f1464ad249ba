# LoRA on Gemma 3 270M with a head on the text of MELD's 7 emotions.
# python train.py config/lora_meld_gemma.py --corpus=data/meld --lm=FOLDER
# corpus: python data.py FOLDER_OF_MELDS_TABLES --name=meld
# hardware: 1 CPU core of a machine with AMX; 9 min with --dtype=bfloat16
# expected: weighted F1 0.578 +- 0.004 (n=3); with --context=5 0.446 +- 0.000 (n=2), and with
#   --context=5 --text_pool=last 0.592 +- 0.009 (n=3), in 36 to 59 min; an MLP on frozen states:
#   0.575 +- 0.007
# paper: none with this LM and with text alone
system = 'lora_lm'
corpus = 'meld'
label = 'emotion'
select = 'wf1'
lm = 'google/gemma-3-270m'
context = 0
max_text_len = 128
train_fraction = 0.2
batch_size = 32
accumulate = 1
epochs = 4
lr = 5e-4
weight_decay = 0.01
lm_depth = 12
average_epochs = 1.0
