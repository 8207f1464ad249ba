# CMPTA on CH-SIMS v2 with Qwen2.5-1.5B (Tables 3, 5).
# python train.py config/cmpta_simsv2.py --corpus=ch-simsv2s.pkl
# hardware: the paper's was one RTX 4090 (24 GB). Wall time here: not run (neither the file nor
#   the weights can be had).
# paper: MAE .308, Corr .686 (one number each, no n). ours: not run.
# The paper names no LM (its other settings are those of MSE-Adapter with Qwen-1.8B); width 1024,
#   AdamW, 5e-4 and 16 are read from a bad scan.
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
clip = 0.0
accumulate = 1
