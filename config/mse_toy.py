# MSE-Adapter on the toy corpus: a frozen small GPT answers with the score.
# python train.py config/mse_toy.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul); 48 s, 83 s with prerequisites and imports
# expected: test MAE 0.683 +- 0.054 (n=5); majority 1.165
#   with --pseudo_projection=full 0.547 +- 0.021 (n=5)
#   best possible MAE: text only 1.059, late fusion 0.810, all modalities 0.368
# paper: none
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
grad_clip = 1.0
mse_width = 64
msf_scales = [1, 2, 4]
lstm_audio = 32
lstm_vision = 32
log_interval = 50
