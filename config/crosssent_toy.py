# CrossSent on the toy corpus: GMRA, MPR and EIOI with a small encoder trained from scratch.
# python train.py config/crosssent_toy.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul), one of them used; 96 s, 102 s with imports
# expected: test MAE 0.459 +- 0.002 (n=3); majority 1.165
#   best possible MAE: text only 1.059, late fusion 0.810, all modalities 0.368
# paper: none
system = 'crosssent'
lm = 'new'
lm_vocab = 256
lm_width = 64
lm_layers = 3
lm_heads = 4
batch_size = 64
accumulate = 1
epochs = 16
warmup_epochs = 1.0
lr = 2e-3
lr_min = 0.0
weight_decay = 0.01
dropout = 0.1
gmra_layer = 2
gmra_start = 'random'
weight_mpr = 0.1
weight_eioi = 0.1
log_interval = 50
