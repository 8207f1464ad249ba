# MSE-Adapter on CH-SIMS v2 with Qwen2.5-1.5B. The paper uses its predecessor Qwen-1.8B,
# which needs remote code.
# python train.py config/mse_simsv2.py --corpus=ch-simsv2s.pkl
# GLM-4-9B:   --lm=THUDM/glm-4-9b-hf --label_plus=False --batch_size=8 --lr=5e-5 --epochs=80
#   --warmup_epochs=8
# Llama-2-7B: --lm=meta-llama/Llama-2-7b-hf --label_plus=False --batch_size=8 --lr=5e-5 --epochs=40
#   --warmup_epochs=4
# hardware: one RTX 4090 (24 GB) in the paper
# expected: not run: neither the corpus nor the LM is available here
# paper: the authors' logs, 5 seeds: Qwen-1.8B MAE 0.311, Corr 0.678; ChatGLM3-6B MAE 0.294, Corr
#   0.714; a third party, 5 seeds: Llama-2-7B MAE 0.368, Corr 0.583
# The prompt's wording is ours: --prompt=FILE.json brings another. The score is the expected value
# over all labels; the authors decode greedily: --readout=generate.
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
grad_clip = 0.0
accumulate = 1
