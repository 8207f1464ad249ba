# MSE-Adapter on MELD's 7 emotions with Qwen2.5-1.5B. The paper uses its predecessor Qwen-1.8B,
# which needs remote code.
# python train.py config/mse_meld.py --corpus=MELD
# GLM-4-9B:   --lm=THUDM/glm-4-9b-hf --batch_size=8 --lr=5e-5 --epochs=90 --warmup_epochs=9
#   --n_pseudo=4 --lstm_audio=64 --lstm_vision=32
# Llama-2-7B: --lm=meta-llama/Llama-2-7b-hf --batch_size=6 --lr=5e-4 --epochs=30 --warmup_epochs=3
#   --n_pseudo=4 --lstm_audio=64 --lstm_vision=32
# hardware: one RTX 4090 (24 GB) in the paper
# expected: not run: neither the corpus nor the LM is available here
# paper: the authors' logs, 5 seeds: Qwen-1.8B acc 62.18, WF1 59.87; ChatGLM3-6B acc 66.23, WF1
#   65.13; Llama-2-7B WF1 63.5 (one seed, third party)
# The prompt's wording is ours: --prompt=FILE.json brings another. The class is the most probable
# label; the authors decode greedily: --readout=generate.
system = 'mse'
corpus = 'MELD'
label = 'emotion'
select = 'wf1'
lm = 'Qwen/Qwen2.5-1.5B'
max_text_len = 65
standardise = False
lstm_audio = 32
lstm_vision = 16
n_pseudo = 2
batch_size = 16
lr = 5e-4
epochs = 50
warmup_epochs = 5.0
patience = 8
adam_eps = 1e-4
beta_2 = 0.999
lr_min = 0.0
weight_decay = 0.01
grad_clip = 0.0
accumulate = 1
