# MSE-Adapter on IEMOCAP's 6 emotions with Qwen2.5-1.5B; in the release a config for Qwen-1.8B
#   alone, and no result.
# python train.py config/mse_iemocap.py --corpus=IEMOCAP
# hardware: the paper's was one RTX 4090 (24 GB). Wall time here: not run (neither the file nor
#   the weights can be had).
# paper: none. ours: not run.
system = 'mse'
corpus = 'IEMOCAP'
label = 'emotion'
select = 'wf1'
lm = 'Qwen/Qwen2.5-1.5B'
max_text_len = 84
standardise = False
lstm_audio = 32
lstm_vision = 32
n_pseudo = 4
batch_size = 4
lr = 5e-4
epochs = 30
warmup_epochs = 3.0
patience = 8
adam_eps = 1e-4
beta_2 = 0.999
lr_min = 0.0
weight_decay = 0.01
clip = 0.0
accumulate = 1
