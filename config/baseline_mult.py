# MulT (Tsai et al. 2019): crossmodal Transformers, on frozen text features.
# python train.py config/baseline_mult.py
# python train.py config/baseline_mult.py --dataset=mosi --corpus=unaligned_50.pkl
# datasets: toy (the default), mosi, mosei, sims, simsv2, minilm
# hardware: 1 CPU core of a busy machine; toy 2.8 min, minilm 4.9 min; others not run
# expected: toy, test MAE 0.478 +- 0.023 (n=3); majority 1.165; best possible late fusion 0.810
# expected: minilm, test MAE 0.996 +- 0.046 (n=3); majority 1.456
# published MAE, mosi / mosei / sims: MMSA .880 / .559 / .453; DeepMLF's paper .927 / .564 / .453
# paper: the published runs use Adam and lower the learning rate when validation stops improving;
#   here: AdamW, a cosine schedule, and at most 30 epochs
system = 'mult'
dataset = 'toy'
text_features = 'frozen'
epochs = 30
patience = 8
warmup_epochs = 1.0
lr_min = 0.0
accumulate = 1
beta_2 = 0.999
weight_decay = 0.0
grad_clip = 0.6
toy = dict(
    corpus='toy', lm='lm_toy', needs=['config/lm_toy.py'], batch_size=64, lr=1e-3,
    fusion_width=20, fusion_heads=5, fusion_layers=2, kernels=[3, 3, 3],
    sub_dropouts=[0.1, 0.1, 0.1], attn_dropout=0.1, attn_dropout_audio=0.1, embed_dropout=0.0,
    grad_clip=1.0, epochs=8)
mosi = dict(
    corpus='MOSI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=16, lr=2e-3,
    accumulate=8, fusion_width=50, fusion_heads=10, fusion_layers=4, kernels=[5, 5, 5],
    sub_dropouts=[0.5, 0.2, 0.2], attn_dropout=0.3, attn_dropout_audio=0.2, embed_dropout=0.2,
    dropout=0.5)
minilm = dict(
    corpus='mosi_official.pkl', lm='sentence-transformers/all-MiniLM-L6-v2', batch_size=16,
    lr=5e-4, accumulate=2, grad_clip=1.0, fusion_width=50, fusion_heads=10, fusion_layers=2,
    kernels=[1, 1, 1], sub_dropouts=[0.5, 0.2, 0.2], attn_dropout=0.3, attn_dropout_audio=0.2,
    embed_dropout=0.2, dropout=0.5, epochs=12)
mosei = dict(
    corpus='MOSEI/Processed/unaligned_50.pkl', lm='bert-base-uncased', batch_size=4, lr=5e-4,
    accumulate=8, fusion_width=30, fusion_heads=6, fusion_layers=4, kernels=[5, 1, 3],
    sub_dropouts=[0.3, 0.2, 0.2], attn_dropout=0.4, attn_dropout_audio=0.0, embed_dropout=0.0,
    dropout=0.5)
sims = dict(
    corpus='SIMS/Processed/unaligned_39.pkl', lm='bert-base-chinese', batch_size=16, lr=2e-3,
    accumulate=8, fusion_width=50, fusion_heads=10, fusion_layers=2, kernels=[5, 1, 1],
    sub_dropouts=[0.3, 0.2, 0.2], attn_dropout=0.2, attn_dropout_audio=0.1, embed_dropout=0.1,
    res_dropout=0.2, dropout=0.1, max_text_len=39)
simsv2 = dict(
    corpus='SIMSv2/unaligned.pkl', lm='bert-base-chinese', batch_size=16, lr=5e-4, accumulate=8,
    grad_clip=1.0, fusion_width=30, fusion_heads=6, fusion_layers=4, kernels=[5, 3, 1],
    sub_dropouts=[0.5, 0.2, 0.2], attn_dropout=0.1, dropout=0.3)
