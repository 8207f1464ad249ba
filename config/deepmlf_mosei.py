# DeepMLF on CMU-MOSEI with GPT-2-large: the paper's main run (Tables 1, 3 and 4).
# python train.py config/deepmlf_mosei.py --corpus=unaligned_50.pkl
# hardware: one RTX 3090 (the paper prints 22 GB)
# expected: not run: neither the corpus nor the LM is available here
# paper: Acc2 87.15, F1 87.10, MAE 0.499, Corr 0.804, Acc5 57.70, Acc7 55.88 (mean of >= 5 seeds)
# Batch: the paper says 32 and states no accumulation. The release accumulates 8 batches of 32, and so
# does this config; --accumulate=1 is the literal reading. SeqAug of raw audio and video (av_seqaug)
# is in the release alone. Gradients are clipped by norm (release: by value).
needs = ['config/av_mosei.py']
corpus = 'MOSEI/Processed/unaligned_50.pkl'
standardise = False           # the release uses raw COVAREP and Facet features
dtype = 'float32'             # as in the release for GPT-2
lm = 'gpt2-large'
av_from = 'av_mosei'
mm_layers = [8, 15, 22, 29, 36]
n_fusion = 12
epochs = 20
text_reg_rate = 0.3
text_reg_prob = 0.25
weight_decay = 0.1
