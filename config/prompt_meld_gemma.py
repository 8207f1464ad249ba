# Prompt tuning on Gemma 3 270M, on the text of MELD's 7 emotions.
# python train.py config/prompt_meld_gemma.py --corpus=data/meld --lm=FOLDER
# corpus: python data.py FOLDER_OF_MELDS_TABLES --name=meld
# hardware: 1 CPU core of a machine with AMX, shared with other work; 17 min with --dtype=bfloat16
# expected: weighted F1 0.454 +- 0.015 (n=3); with --context=5 0.330 +- 0.007 (n=2), in 35 min
# paper: none with this LM and with text alone
system = 'prompt_tuning'
corpus = 'meld'
label = 'emotion'
select = 'wf1'
lm = 'google/gemma-3-270m'
prompt = 'toy'
context = 0
max_text_len = 128
train_fraction = 0.2
n_pseudo = 20
batch_size = 16
accumulate = 1
epochs = 4
lr = 0.003
weight_decay = 0.0
beta_2 = 0.999
lm_depth = 12
readout = 'head'
average_epochs = 1.0
