# MSE-Adapter on CHERMA's 7 emotions with Qwen2.5-1.5B. The paper uses its predecessor Qwen-1.8B,
# which needs remote code.
# python train.py config/mse_cherma.py --corpus=data/cherma
# GLM-4-9B:   --lm=THUDM/glm-4-9b-hf --batch_size=8 --lr=5e-5
# Llama-2-7B: --lm=meta-llama/Llama-2-7b-hf --batch_size=6 --lr=5e-5
# hardware: one RTX 4090 (24 GB) in the paper
# expected: not run: neither the corpus nor the LM is available here
# paper: the authors' logs, 5 seeds: Qwen-1.8B acc 72.12, WF1 72.01; ChatGLM3-6B acc 72.90, WF1
#   72.73; Llama-2-7B WF1 72.7 (one seed, third party)
# Convert the corpus first: python data.py CHERMA0723 --name=cherma --dtype=float16. As padded
# float32 the corpus takes 68 GB. The converted corpus has only the real frames, in float16, and is
# memory-mapped. float16 features are always standardised; the release does not standardise.
# The prompt's wording is ours: --prompt=FILE.json brings another. The class is the most probable
# label; the authors decode greedily: --readout=generate.
system = 'mse'
corpus = 'data/cherma'
label = 'emotion'
select = 'wf1'
lm = 'Qwen/Qwen2.5-1.5B'
prompt = 'cn'
max_text_len = 78
lstm_audio = 32
lstm_vision = 16
n_pseudo = 4
batch_size = 16
lr = 5e-3
epochs = 30
warmup_epochs = 3.0
patience = 8
adam_eps = 1e-4
beta_2 = 0.999
lr_min = 0.0
weight_decay = 0.01
grad_clip = 0.0
accumulate = 1
