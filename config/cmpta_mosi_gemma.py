# CMPTA on Gemma 3 270M, on the text, audio and word timing of CMU-MOSI.
# python train.py config/cmpta_mosi_gemma.py --corpus=mosi_official.pkl --lm=FOLDER
# hardware: 1 CPU core of a machine with AMX; 4 min with --dtype=bfloat16
# expected: test MAE 0.859 +- 0.068 (n=5), Corr 0.759 +- 0.034; majority 1.456
# paper: none with this LM. The settings are those of mse_mosi_gemma.py, with width 256
system = 'cmpta'
corpus = 'mosi_official.pkl'
lm = 'google/gemma-3-270m'
prompt = 'toy'
n_pseudo = 6
cmpta_width = 256
batch_size = 16
accumulate = 1
epochs = 4
lr = 5e-4
weight_decay = 0.01
beta_2 = 0.999
average_epochs = 1.0
lm_depth = 12
readout = 'head'
