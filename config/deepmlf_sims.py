# DeepMLF on CH-SIMS with Chinese GPT-2 (Tables 1 and 5).
# python train.py config/deepmlf_sims.py --corpus=unaligned_39.pkl
# hardware: the paper's was one RTX 3090 (24 GB). Wall time here: not run (neither the file nor
#   the weights can be had).
# paper: Acc2 82.75, F1 83.15, MAE .353, Corr .729 (mean of >= 5 seeds). ours: not run.
# n_fusion: the release and the paper's text have 20, its Table 1 has 16. standardise stands for
#   the release's BatchNorm.
needs = ['config/av_sims.py']
corpus = 'SIMS/Processed/unaligned_39.pkl'
dtype = 'float32'             # as the release trains GPT-2
lm = 'uer/gpt2-chinese-cluecorpussmall'
max_text_len = 39
av_from = 'av_sims'
av_len = 55
mm_layers = [6, 7, 8, 9, 10, 11, 12]
n_fusion = 20
epochs = 100
text_reg_rate = 0.3
text_reg_prob = 0.25
weight_decay = 0.1
