# MMIM (Han et al. 2021): mutual information between streams, and of the fused vector with each
# stream, is maximised; the text encoder is fine-tuned.
# python train.py config/baseline_mmim.py
# python train.py config/baseline_mmim.py --dataset=mosi --corpus=unaligned_50.pkl
# datasets: toy (the default), mosi, mosei, sims, simsv2, minilm
# hardware: 1 CPU core; toy 1.1 min, minilm 1.7 min; others not run
# expected: toy, test MAE 0.715 +- 0.093 (n=3); majority 1.165; best possible late fusion 0.810
# expected: minilm, test MAE 0.748 +- 0.013 (n=5); majority 1.456
# paper: the release has one set of values, for MOSI (Adam with L2 decay; the learning rate is halved
#   when validation stops improving); here: AdamW, a cosine schedule. mosei, sims and simsv2 have
#   MOSI's values, because none for them is known to us
system = 'mmim'
dataset = 'toy'
text_features = 'tuned'
epochs = 40
patience = 10
warmup_epochs = 1.0
lr_min = 0.0
accumulate = 1
beta_2 = 0.999
weight_decay = 0.0001
grad_clip = 1.0
dropout = 0.1
sub_dropouts = [0.0, 0.0, 0.0]
toy = dict(
    corpus='toy', lm='new', lm_vocab=256, lm_width=64, lm_layers=3, lm_heads=4, batch_size=64,
    lr=2e-3, epochs=12)
mosi = dict(
    corpus='MOSI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=32, lr=1e-3,
    lr_encoder=0.05)
mosei = dict(
    corpus='MOSEI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=32, lr=1e-3,
    lr_encoder=0.05)
sims = dict(
    corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=32, lr=1e-3,
    lr_encoder=0.05, max_text_len=39)
simsv2 = dict(
    corpus='SIMSv2/unaligned.pkl', lm='bert-base-chinese', batch_size=32, lr=1e-3,
    lr_encoder=0.05)
minilm = dict(
    corpus='mosi_official.pkl', lm='sentence-transformers/all-MiniLM-L6-v2', batch_size=32,
    lr=1e-3, lr_encoder=0.1, epochs=8, weight_decay=0.01, text_pool='mean')
