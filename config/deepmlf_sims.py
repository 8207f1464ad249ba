# DeepMLF on CH-SIMS with a Chinese GPT-2 (Tables 1 and 5).
# python train.py config/deepmlf_sims.py --corpus=unaligned_39.pkl
# hardware: one RTX 3090 (the paper prints 22 GB)
# expected: not run: neither the corpus nor the LM is available here
# paper: Acc2 82.75, F1 83.15, MAE 0.353, Corr 0.729 (mean of >= 5 seeds)
# n_fusion is 20 in the release and in the paper's text, and 16 in its Table 1. The features are
# standardised (the default of standardise) in place of the release's BatchNorm.
# Batch: the paper says 32 and states no accumulation. The release accumulates 8 batches of 32, and so
# does this config; --accumulate=1 is the literal reading. SeqAug of raw audio and video (av_seqaug)
# is in the release alone. Gradients are clipped by norm (release: by value).
needs = ['config/av_sims.py']
corpus = 'SIMS/Processed/unaligned_39.pkl'
dtype = 'float32'             # as in the release for GPT-2
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
