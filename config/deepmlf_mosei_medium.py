# DeepMLF on CMU-MOSEI with GPT-2-medium (Tables 4 and 7). No config is released for it: all
# settings except lm and mm_layers are those of deepmlf_mosei.py.
# python train.py config/deepmlf_mosei_medium.py --corpus=unaligned_50.pkl
# hardware: one RTX 3090 (the paper prints 22 GB)
# expected: not run: neither the corpus nor the LM is available here
# paper: Acc2 87.00, F1 86.98, MAE 0.511, Corr 0.795, Acc5 56.89, Acc7 55.01 (mean of >= 5 seeds)
# Batch, --accumulate=1, SeqAug of audio and video, and clipping: as deepmlf_mosei.py says.
needs = ['config/av_mosei.py']
corpus = 'MOSEI/Processed/unaligned_50.pkl'
standardise = False           # the release uses raw COVAREP and Facet features
dtype = 'float32'             # as in the release for GPT-2
lm = 'gpt2-medium'
av_from = 'av_mosei'
mm_layers = [9, 12, 15, 18, 21, 24]
n_fusion = 12
epochs = 20
text_reg_rate = 0.3
text_reg_prob = 0.25
weight_decay = 0.1
