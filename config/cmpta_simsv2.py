# CMPTA on CH-SIMS v2 with Qwen2.5-1.5B (Tables 3 and 5).
# python train.py config/cmpta_simsv2.py --corpus=ch-simsv2s.pkl
# hardware: one RTX 4090 (24 GB) in the paper
# expected: not run: neither the corpus nor the LM is available here
# paper: MAE 0.308, Corr 0.686 (one number each; n is not stated)
# The paper does not name its LM. Its other settings are those of MSE-Adapter with Qwen-1.8B. We
# read width 1024, AdamW, lr 5e-4 and batch size 16 in a scan of the paper that is hardly legible.
# The prompt's wording is ours: --prompt=FILE.json brings another. The score is the expected value
# over all labels. The paper does not say how it decodes; --readout=generate decodes greedily. The
# BiLSTM has half of cmpta_width in each direction, which is our choice.
system = 'cmpta'
corpus = 'SIMS_V2/ch-simsv2s.pkl'
lm = 'Qwen/Qwen2.5-1.5B'
prompt = 'cn'
label_plus = True
standardise = False
n_pseudo = 6
cmpta_width = 1024
batch_size = 16
lr = 5e-4
epochs = 150
warmup_epochs = 15.0
patience = 10
adam_eps = 1e-4
beta_2 = 0.999
lr_min = 0.0
weight_decay = 0.01
grad_clip = 0.0
accumulate = 1
