# ALMT (Zhang et al. 2023): a hyper-modality that language guides, a fine-tuned encoder for the text.
# python train.py config/baseline_almt.py [--dataset=mosi --corpus=unaligned_50.pkl]   toy
#   without; mosei, sims, simsv2, minilm
# hardware: 1 core of a busy machine; toy 3.7 min, minilm 7.4 min. ours, test MAE: toy 0.745 +-
#   0.300 (n=3), minilm 0.862 +- 0.028 (n=3); others not run (LOG.md).
# Published: Adam with L2 decay at a constant rate, until validation stops; ours: AdamW, a cosine,
#   30 epochs at most.
system = 'almt'
dataset = 'toy'
text_features = 'tuned'
epochs = 200
patience = 32
warmup_epochs = 20.0
lr_min = 0.0
accumulate = 1
beta_2 = 0.999
weight_decay = 0.0001
clip = 0.0
fusion_width = 128
fusion_heads = 8
toy = dict(
    corpus='toy', lm='new', lm_vocab=256, lm_width=64, lm_layers=3, lm_heads=4, batch_size=64,
    lr=1e-3, fusion_width=64, fusion_layers=2, epochs=8, warmup_epochs=1.0, clip=1.0)
mosi = dict(
    corpus='MOSI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=64, lr=1e-4,
    fusion_layers=2, dropout=0.0)
mosei = dict(
    corpus='MOSEI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=64, lr=1e-4,
    fusion_layers=4, dropout=0.0)
sims = dict(
    corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=64, lr=1e-4,
    fusion_layers=4, dropout=0.0)
simsv2 = dict(
    corpus='SIMSv2/unaligned.pkl', lm='bert-base-chinese', batch_size=64, lr=1e-4,
    fusion_layers=4, dropout=0.0)
minilm = dict(
    corpus='mosi_official.pkl', lm='sentence-transformers/all-MiniLM-L6-v2', batch_size=32,
    lr=5e-4, lr_encoder=0.1, fusion_layers=2, dropout=0.1, epochs=8, warmup_epochs=1.0, clip=1.0,
    weight_decay=0.01)
