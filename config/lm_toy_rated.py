# Pretrains a small GPT on the toy corpus's texts, each followed by its rating. It stands in for a
# large LM that has read reviews with ratings.
# python train.py config/lm_toy_rated.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul); 28 s
# expected: test loss 0.240 +- 0.000 (n=5), in nats per token
# paper: none
system = 'lm'
select = 'loss'
lm_text = 'rated'
batch_size = 64
accumulate = 1
epochs = 6
lr = 3e-3
lr_min = 1e-4
weight_decay = 0.01
dropout = 0.0
lm_vocab = 256
lm_width = 64
lm_layers = 4
lm_heads = 4
log_interval = 50
