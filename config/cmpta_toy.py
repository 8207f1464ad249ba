# CMPTA on the toy corpus: six pseudo tokens, one for each directed attention between two
# modalities.
# python train.py config/cmpta_toy.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul); 58 s, 91 s with prerequisites and imports
# expected: test MAE 0.547 +- 0.049 (n=3); majority 1.165
#   best possible MAE: text only 1.059, late fusion 0.810, all modalities 0.368
# paper: none
needs = ['config/lm_toy_rated.py']
system = 'cmpta'
lm = 'lm_toy_rated'
prompt = 'toy'
batch_size = 64
accumulate = 1
epochs = 10
lr = 5e-3
lr_min = 0.0
weight_decay = 0.01
n_pseudo = 6
cmpta_width = 32
cmpta_heads = 4
log_interval = 50
