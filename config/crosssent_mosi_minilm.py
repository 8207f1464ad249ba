# CrossSent on CMU-MOSI transcripts and audio with all-MiniLM-L6-v2 (22 M weights), an encoder small
# enough for 2 CPU cores.
# python train.py config/crosssent_mosi_minilm.py --corpus=mosi_official.pkl --lm=all-MiniLM-L6-v2
# hardware: 1 CPU core (170 GFLOP/s float32 matmul); 3 min with --dtype=bfloat16
# expected: test MAE 0.804 +- 0.021 (n=5); the text encoder alone 0.786 +- 0.011; majority 1.456
#   A negative result: CrossSent does not improve on the text encoder alone (LOG.md).
# paper: none with this encoder; MMSA's MAG-BERT has MAE 0.784 on these inputs (one seed)
# The settings were chosen by validation MAE (LOG.md). resample = 'none', because the audio frames
# are vectors of the last 20 utterances and do not align with the tokens.
system = 'crosssent'
corpus = 'mosi_official.pkl'
lm = 'sentence-transformers/all-MiniLM-L6-v2'
text_pool = 'mean'
resample = 'none'
batch_size = 32
accumulate = 1
epochs = 8
patience = 8
warmup_epochs = 2.0
lr = 1e-3
lr_encoder = 0.1
lr_min = 0.0
weight_decay = 0.01
dropout = 0.3
gmra_layer = 6
gmra_width = 64
gmra_heads = 4
gmra_mult = 0.25
weight_mpr = 0.2
weight_eioi = 2.0
eioi_band = 0.1
ramp_epochs = 0.0
log_interval = 20
