# DeepMLF on the toy corpus: the whole curriculum (LM, AV encoder, DeepMLF) in one command.
# python train.py
# hardware: 2 CPU cores (196 GFLOP/s float32 matmul); 42 s, 97 s with prerequisites
# expected: test MAE 0.417 +- 0.006 (n=3); majority 1.165
#   best possible MAE: text only 1.059, late fusion 0.810, all modalities 0.368
# paper: none
needs = ['config/lm_toy.py', 'config/av_toy.py']
lm = 'lm_toy'
av_from = 'av_toy'
batch_size = 64
accumulate = 1
epochs = 6
lr = 3e-3
lr_min = 1e-5
weight_decay = 0.01
mm_layers = [2, 3, 4]
mm_heads = 4
n_fusion = 8
av_layers = 2
av_seqaug = 0.0
text_reg_rate = 0.1
log_interval = 50
