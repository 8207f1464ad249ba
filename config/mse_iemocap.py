# MSE-Adapter on IEMOCAP's 6 emotions with Qwen2.5-1.5B.
# python train.py config/mse_iemocap.py --corpus=IEMOCAP
# hardware: one RTX 4090 (24 GB) in the paper
# expected: not run: neither the corpus nor the LM is available here
# paper: none; the release has a config for Qwen-1.8B only, and no result
# The prompt's wording is ours: --prompt=FILE.json brings another. The class is the most probable
# label; the authors decode greedily: --readout=generate.
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
grad_clip = 0.0
accumulate = 1
