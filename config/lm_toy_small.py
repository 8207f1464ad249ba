# A GPT half as wide as that of lm_toy.py, for the sweep over LM sizes.
# python train.py config/lm_toy_small.py
# hardware: 1 CPU core; 11 s
# expected: test loss 0.53 (n=3), in nats per token; lm_toy has 0.27
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
lm_width = 32
lm_layers = 4
lm_heads = 4
log_interval = 50
