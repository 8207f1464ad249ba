# ALMT (Zhang et al. 2023): a hyper-modality that language guides, a fine-tuned encoder for the text.
# python train.py config/baseline_almt.py [--dataset=mosi --corpus=unaligned_50.pkl]   toy without; mosi, mosei, sims, simsv2
# hardware: not yet measured
system = 'almt'
dataset = 'toy'
text_features = 'tuned'
epochs = 30
patience = 8
warmup_epochs = 1.0
lr_min = 0.0
accumulate = 1
beta_2 = 0.999
weight_decay = 0.01
clip = 1.0
weight_decay = 1e-4
fusion_width = 128
fusion_heads = 8
toy = dict(corpus='toy', lm='new', lm_vocab=256, lm_width=64, lm_layers=3, lm_heads=4, batch_size=64, lr=1e-3, fusion_width=64, fusion_layers=2, epochs=8)
mosi = dict(corpus='MOSI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=64, lr=1e-4, fusion_layers=2, dropout=0.0)
mosei = dict(corpus='MOSEI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=64, lr=1e-4, fusion_layers=4, dropout=0.0)
sims = dict(corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=64, lr=1e-4, fusion_layers=4, dropout=0.0)
simsv2 = dict(corpus='SIMSv2/unaligned.pkl', lm='bert-base-chinese', batch_size=64, lr=1e-4, fusion_layers=4, dropout=0.0)
