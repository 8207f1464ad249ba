# The AV encoder by itself on SIMS, DeepMLF's first step after the LM (paper 4.6; hyperparameters
#   from the release).
# python train.py config/av_sims.py --corpus=unaligned_39.pkl
# Wall time and numbers: not run (the file cannot be had here); the paper prints none for this step.
system = 'av'
corpus = 'SIMS/Processed/unaligned_39.pkl'
standardise = True
av_len = 55
batch_size = 32
accumulate = 4
# the release has no end but early stopping, and a plateau schedule; here a cosine
epochs = 60
patience = 8
lr = 5e-4
weight_decay = 0.01
beta_2 = 0.999
