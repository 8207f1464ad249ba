# Stage two of DeepMLF's curriculum on CMU-MOSEI: pretrains the AV encoder on the label
# (section 4.6).
# python train.py config/av_mosei.py --corpus=unaligned_50.pkl
# hardware: not run
# expected: not run: the corpus is not available here
# paper: no number for this stage; the hyperparameters are those of the released code
# Batch: the release accumulates 4 batches of 32; the paper states no batch for this stage. SeqAug of
# raw features is in the release alone. Gradients are clipped by norm (release: by value).
# Audio and video are fused by one linear layer (paper: a feedforward network; release: as here).
system = 'av'
corpus = 'MOSEI/Processed/unaligned_50.pkl'
standardise = False
av_len = 50
batch_size = 32
accumulate = 4
# the release stops by patience only and lowers lr on plateaus; here lr is a cosine over 60 epochs
epochs = 60
patience = 8
lr = 5e-3
weight_decay = 0.01
beta_2 = 0.999
