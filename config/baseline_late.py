# Late fusion: the sum of one score per stream (text, audio, video). It is a control, because the
# streams cannot interact. --late_streams=text (or audio, or vision) makes it a unimodal system.
# python train.py config/baseline_late.py
# python train.py config/baseline_late.py --dataset=mosi --corpus=unaligned_50.pkl
# datasets: toy (the default), mosi, mosei, sims, simsv2, minilm
# hardware: 1 CPU core of a busy machine; toy 2.0 min; others not run
# expected: toy, test MAE 0.834 +- 0.012 (n=3); majority 1.165; best possible late fusion 0.810
# paper: none; the control and its settings are ours
system = 'late'
dataset = 'toy'
text_features = 'tuned'
epochs = 30
patience = 8
warmup_epochs = 1.0
lr_min = 0.0
accumulate = 1
beta_2 = 0.999
weight_decay = 0.01
grad_clip = 1.0
toy = dict(
    corpus='toy', lm='new', lm_vocab=256, lm_width=64, lm_layers=3, lm_heads=4, batch_size=64,
    lr=2e-3, sub_widths=[1, 64, 64], sub_dropouts=[0.0, 0.1, 0.1], epochs=12)
mosi = dict(
    corpus='MOSI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=32, lr=5e-4,
    lr_encoder=0.1)
mosei = dict(
    corpus='MOSEI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=32, lr=5e-4,
    lr_encoder=0.1)
sims = dict(
    corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=32, lr=5e-4,
    lr_encoder=0.1, max_text_len=39)
simsv2 = dict(
    corpus='SIMSv2/unaligned.pkl', lm='bert-base-chinese', batch_size=32, lr=5e-4, lr_encoder=0.1)
minilm = dict(
    corpus='mosi_official.pkl', lm='sentence-transformers/all-MiniLM-L6-v2', batch_size=32,
    lr=5e-4, lr_encoder=0.1, epochs=8, text_pool='mean')
