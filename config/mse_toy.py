# MSE-Adapter on the toy corpus: pseudo tokens make a frozen small GPT say the score.
# python train.py config/mse_toy.py
# hardware:
needs = ['config/lm_toy_rated.py']
system = 'mse'
lm = 'lm_toy_rated'
prompt = 'toy'
batch_size = 64
accumulate = 1
epochs = 12
lr = 1e-2
lr_min = 0.0
weight_decay = 0.01
clip = 1.0
mse_width = 64
msf_scales = [1, 2, 4]
lstm_audio = 32
lstm_vision = 32
log_interval = 50
