# MISA (Hazarika et al. 2020): a private and a shared vector per stream, and a fine-tuned text
# encoder.
# python train.py config/baseline_misa.py
# python train.py config/baseline_misa.py --dataset=mosi --corpus=unaligned_50.pkl
# datasets: toy (the default), mosi, mosei, sims, simsv2, minilm
# hardware: 1 CPU core of a busy machine; toy 1.6 min, minilm 6.1 min; others not run
# expected: toy, test MAE 0.698 +- 0.070 (n=3); majority 1.165; best possible late fusion 0.810
# expected: minilm, test MAE 0.818 +- 0.020 (n=3); majority 1.456
# published MAE, mosi / mosei / sims: MMSA .777 / .558 / -; DeepMLF's paper .772 / .549 / .447
# paper: the published runs use Adam at a constant learning rate until validation stops improving;
#   here: AdamW, a cosine schedule, and at most 30 epochs
system = 'misa'
dataset = 'toy'
text_features = 'tuned'
epochs = 30
patience = 8
warmup_epochs = 1.0
lr_min = 0.0
accumulate = 1
beta_2 = 0.999
weight_decay = 0.0
grad_clip = 0.8
fusion_width = 128
fusion_heads = 2
toy = dict(
    corpus='toy', lm='new', lm_vocab=256, lm_width=64, lm_layers=3, lm_heads=4, batch_size=64,
    lr=1e-3, fusion_width=64, dropout=0.1, epochs=8)
mosi = dict(
    corpus='MOSI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=16, accumulate=2,
    lr=1e-4, dropout=0.2, misa_diff=0.1, misa_sim=0.3, misa_rebuild=1.0)
mosei = dict(
    corpus='MOSEI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=64,
    accumulate=2, lr=1e-4, dropout=0.5, misa_diff=0.3, misa_sim=0.8, misa_rebuild=1.0)
sims = dict(
    corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=64, accumulate=2,
    lr=1e-4, dropout=0.0, misa_diff=0.3, misa_sim=1.0, misa_rebuild=0.8, grad_clip=1.0,
    max_text_len=39)
simsv2 = dict(
    corpus='SIMSv2/unaligned.pkl', lm='bert-base-chinese', batch_size=16, accumulate=2, lr=1e-4,
    fusion_width=64, dropout=0.5, misa_diff=0.5, misa_sim=1.0, misa_rebuild=0.5)
minilm = dict(
    corpus='mosi_official.pkl', lm='sentence-transformers/all-MiniLM-L6-v2', batch_size=32,
    lr=5e-4, lr_encoder=0.1, epochs=8, dropout=0.2, misa_diff=0.1, misa_sim=0.3, misa_rebuild=1.0,
    weight_decay=0.01)
