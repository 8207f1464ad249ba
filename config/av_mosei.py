# The AV encoder by itself on MOSEI, DeepMLF's first step after the LM (paper 4.6; hyperparameters
#   from the release).
# python train.py config/av_mosei.py --corpus=unaligned_50.pkl
# Wall time and numbers: not run (the file cannot be had here); the paper prints none for this step.
system = 'av'
corpus = 'MOSEI/Processed/unaligned_50.pkl'
standardise = False
av_len = 50
batch_size = 32
accumulate = 4
# the release has no end but early stopping, and a plateau schedule; here a cosine
epochs = 60
patience = 8
lr = 5e-3
weight_decay = 0.01
beta_2 = 0.999
