# DeepMLF on Gemma 3 270M, on the text, audio and word timing of CMU-MOSI.
# python train.py config/deepmlf_mosi_gemma.py --corpus=mosi_official.pkl --lm=FOLDER
# hardware: 1 CPU core of a machine with AMX; 7 min with --dtype=bfloat16
# expected: test MAE 0.740 +- 0.007 (n=5), Corr 0.803 +- 0.003; majority 1.456
# paper: none with this LM. The paper reads the last token behind the last layer; this reads the mean
#   over tokens behind layer 12, because ridge on frozen states does better there (LOG.md)
needs = ['config/av_mosi.py']
corpus = 'mosi_official.pkl'
lm = 'google/gemma-3-270m'
lm_depth = 12
av_from = 'av_mosi'
av_seqaug = 0.3
mm_layers = [6, 8, 10, 12]
mm_heads = 8
n_fusion = 8
text_pool = 'mean'
text_reg = 'none'
batch_size = 32
accumulate = 1
epochs = 6
lr = 3e-4
weight_decay = 0.01
weight_lm = 0.0
average_epochs = 1.0
