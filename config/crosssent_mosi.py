# CrossSent on CMU-MOSI with RoBERTa-base. The paper's text says RoBERTa-large, but its parameter
# count is that of RoBERTa-base.
# Ablations: --gmra_layer=0 (no GMRA), --weight_mpr=0 (no MPR), --weight_eioi=0 (no EIOI).
# python train.py config/crosssent_mosi.py --corpus=aligned_50.pkl
# Without a file with one frame per word: --corpus=unaligned_50.pkl --resample=linear
# hardware: one A100 in the paper
# expected: not run: neither the corpus nor the LM is available here
# paper: Acc2 (Non0) 89.78, F1 89.75, Acc7 52.1, MAE 0.563, Corr 0.878 (one seed)
# The paper's hyperparameters are in images that cannot be read, so the values here are ours. The
# paper selects the checkpoint with the lowest validation MSE; select = 'r2' selects the same one.
# Warm-up: the paper says "a linear warmup schedule"; here a cosine follows it. The paper states no
# batch size.
system = 'crosssent'
corpus = 'MOSI/Processed/aligned_50.pkl'
lm = 'roberta-base'
text_pool = 'first'
resample = 'words'             # each token gets the frame of its word
batch_size = 32
epochs = 20
warmup_epochs = 2.0
patience = 8
lr = 5e-4
lr_encoder = 0.1
weight_decay = 0.01
lr_min = 0.0
grad_clip = 1.0
accumulate = 1
select = 'r2'
weight_mpr = 0.1
weight_eioi = 0.1
