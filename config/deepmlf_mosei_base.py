# DeepMLF on CMU-MOSEI with GPT-2 (Tables 4 and 7); settings from the released base config.
# python train.py config/deepmlf_mosei_base.py --corpus=unaligned_50.pkl
# hardware: one RTX 3090 (the paper prints 22 GB)
# expected: not run: neither the corpus nor the LM is available here
# paper: Acc2 85.83, F1 85.74, MAE 0.529, Corr 0.773, Acc5 56.61, Acc7 54.65 (mean of >= 5 seeds)
# Batch: the paper says 32 and states no accumulation. The release accumulates 8 batches of 32, and so
# does this config; --accumulate=1 is the literal reading. SeqAug of raw audio and video (av_seqaug)
# is in the release alone. Gradients are clipped by norm (release: by value).
needs = ['config/av_mosei.py']
corpus = 'MOSEI/Processed/unaligned_50.pkl'
standardise = False           # the release uses raw COVAREP and Facet features
dtype = 'float32'             # as in the release for GPT-2
lm = 'gpt2'
av_from = 'av_mosei'
mm_layers = [4, 6, 8, 9, 10, 11, 12]
n_fusion = 12
epochs = 15
text_reg_rate = 0.2
text_reg_prob = 0.3
weight_decay = 0.005
weight_lm = 1.0               # as in the paper; the released base config has 1.1
