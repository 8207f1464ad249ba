# CORAL (Cao et al. 2020) on CrossSent's network: ordered binary tasks in place of MSE, MPR and EIOI.
# It is the control of these two losses. --level_step=0.1 gives it to any system with a score.
# python train.py config/baseline_coral.py
# python train.py config/baseline_coral.py --dataset=mosi --corpus=aligned_50.pkl
# datasets: toy (the default), mosi, mosei, sims, minilm
# hardware: 1 CPU core; toy 1.6 min, minilm 1.8 min; others not run
# expected: toy, test MAE 0.491 +- 0.005 (n=3); majority 1.165; best possible late fusion 0.810
# expected: minilm, test MAE 0.859 +- 0.025 (n=3); majority 1.456
# paper: none for scores (CORAL's are ages). Levels are a tenth apart, as the labels that the
#   papers' LMs name
# The settings are those of the CrossSent config for the same corpus.
system = 'crosssent'
dataset = 'toy'
warmup_epochs = 2.0
patience = 8
lr_min = 0.0
accumulate = 1
weight_decay = 0.01
level_step = 0.1
toy = dict(
    corpus='toy', lm='new', lm_vocab=256, lm_width=64, lm_layers=3, lm_heads=4, batch_size=64,
    epochs=16, warmup_epochs=1.0, patience=10, lr=2e-3, gmra_layer=2, gmra_start='random')
mosi = dict(
    corpus='MOSI/Processed/aligned_50.pkl', lm='roberta-base', batch_size=32, epochs=20, lr=5e-4,
    lr_encoder=0.1, select='r2', resample='words')
mosei = dict(
    corpus='MOSEI/Processed/aligned_50.pkl', lm='roberta-base', batch_size=32, epochs=10,
    warmup_epochs=1.0, patience=4, lr=3e-4, lr_encoder=0.1, select='r2', resample='words')
sims = dict(
    corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=32, epochs=20,
    lr=5e-4, lr_encoder=0.1, select='r2', max_text_len=39)
minilm = dict(
    corpus='mosi_official.pkl', lm='sentence-transformers/all-MiniLM-L6-v2', text_pool='mean',
    resample='none', batch_size=32, epochs=8, lr=1e-3, lr_encoder=0.1, dropout=0.3, gmra_layer=6,
    gmra_width=64, gmra_heads=4, gmra_mult=0.25)
