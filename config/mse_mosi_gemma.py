# MSE-Adapter on Gemma 3 270M, on the text, audio and word timing of CMU-MOSI.
# python train.py config/mse_mosi_gemma.py --corpus=mosi_official.pkl --lm=FOLDER
# hardware: 1 CPU core of a machine with AMX; 4 min with --dtype=bfloat16
# expected: test MAE 0.878 +- 0.028 (n=5), Corr 0.744 +- 0.018; majority 1.456
# paper: none with this LM. Read-out by a head: by valid MAE, one seed; 12 layers: by ridge regression
#   on frozen states (LOG.md)
system = 'mse'
corpus = 'mosi_official.pkl'
lm = 'google/gemma-3-270m'
prompt = 'toy'
lstm_audio = 64
lstm_vision = 32
n_pseudo = 4
batch_size = 16
accumulate = 1
epochs = 4
lr = 1e-3
weight_decay = 0.01
beta_2 = 0.999
average_epochs = 1.0
lm_depth = 12
readout = 'head'
