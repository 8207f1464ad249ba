# Tensor Fusion Network (Zadeh et al. 2017), on frozen text features.
# python train.py config/baseline_tfn.py
# python train.py config/baseline_tfn.py --dataset=mosi --corpus=unaligned_50.pkl
# datasets: toy (the default), mosi, mosei, sims, simsv2, minilm
# hardware: 1 CPU core of a busy machine; toy 1.2 min, minilm 4.8 min; others not run
# expected: toy, test MAE 0.763 +- 0.001 (n=3); majority 1.165; best possible late fusion 0.810
# expected: minilm, test MAE 0.866 +- 0.004 (n=3); majority 1.456
# published MAE, mosi / mosei / sims: MMSA .947 / .573 / .432; DeepMLF's paper .971 / .573 / .437
# paper: the published runs use Adam at a constant learning rate until validation stops improving;
#   here: AdamW, a cosine schedule, and at most 30 epochs
system = 'tfn'
dataset = 'toy'
text_features = 'frozen'
epochs = 30
patience = 8
warmup_epochs = 1.0
lr_min = 0.0
accumulate = 1
beta_2 = 0.999
weight_decay = 0.0
grad_clip = 0.0
toy = dict(
    corpus='toy', lm='lm_toy', needs=['config/lm_toy.py'], batch_size=64, lr=1e-3,
    sub_widths=[64, 16, 32], text_out=32, post_width=32, dropout=0.1, epochs=16)
mosi = dict(
    corpus='MOSI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=32, lr=1e-3,
    sub_widths=[128, 32, 128], text_out=32, post_width=64, sub_dropouts=[0.3, 0.3, 0.3],
    dropout=0.5)
minilm = dict(
    corpus='mosi_official.pkl', lm='sentence-transformers/all-MiniLM-L6-v2', batch_size=32,
    lr=1e-3, sub_widths=[128, 32, 128], text_out=32, post_width=64, sub_dropouts=[0.3, 0.3, 0.3],
    dropout=0.5)
mosei = dict(
    corpus='MOSEI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=128, lr=5e-3,
    sub_widths=[128, 16, 128], text_out=128, post_width=16, sub_dropouts=[0.4, 0.4, 0.4],
    dropout=0.4)
sims = dict(
    corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=32, lr=5e-4,
    sub_widths=[128, 32, 128], text_out=256, post_width=32, sub_dropouts=[0.4, 0.4, 0.4],
    dropout=0.4, max_text_len=39)
simsv2 = dict(
    corpus='SIMSv2/unaligned.pkl', lm='bert-base-chinese', batch_size=128, lr=2e-3,
    sub_widths=[128, 32, 128], text_out=128, post_width=32, sub_dropouts=[0.3, 0.3, 0.3],
    dropout=0.5)
