# Stage one of DeepMLF's curriculum on the toy corpus: pretrains a small GPT on its texts.
# python train.py config/lm_toy.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul); 11 s
# expected: test loss 0.266 +- 0.001 (n=3), in nats per token
# paper: none
system = 'lm'
select = 'loss'
batch_size = 64
accumulate = 1
epochs = 4
lr = 3e-3
lr_min = 1e-4
weight_decay = 0.01
dropout = 0.0
lm_vocab = 256
lm_width = 64
lm_layers = 4
lm_heads = 4
log_interval = 50
