# MSE-Adapter on CH-SIMS v2 with Qwen2.5-1.5B, the successor of the paper's Qwen-1.8B that needs
#   no remote code.
# python train.py config/mse_simsv2.py --corpus=ch-simsv2s.pkl
# GLM-4-9B:   --lm=THUDM/glm-4-9b-hf --label_plus=False --batch_size=8 --lr=5e-5 --epochs=80 --warmup_epochs=8
# Llama-2-7B: --lm=meta-llama/Llama-2-7b-hf --label_plus=False --batch_size=8 --lr=5e-5
#   --epochs=40 --warmup_epochs=4
# hardware: the paper's was one RTX 4090 (24 GB). Wall time here: not run (neither the file nor
#   the weights can be had).
# the authors' logs, 5 seeds: Qwen-1.8B MAE .311, Corr .678; ChatGLM3-6B .294, .714; Llama-2-7B
#   (third party) .368, .583. ours: not run.
system = 'mse'
corpus = 'SIMS_V2/ch-simsv2s.pkl'
lm = 'Qwen/Qwen2.5-1.5B'
prompt = 'cn'
label_plus = True
standardise = False
lstm_audio = 64
lstm_vision = 64
n_pseudo = 4
batch_size = 16
lr = 5e-4
epochs = 30
warmup_epochs = 3.0
patience = 10
adam_eps = 1e-4
beta_2 = 0.999
lr_min = 0.0
weight_decay = 0.01
clip = 0.0
accumulate = 1
