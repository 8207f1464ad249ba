# CrossSent on CMU-MOSI with RoBERTa-base (its parameter count; its text says large). -MPR, -EIOI,
#   -GMRA: --weight_mpr=0, --weight_eioi=0, --gmra_layer=0.
# python train.py config/crosssent_mosi.py --corpus=unaligned_50.pkl
# hardware: the paper's was one A100. Wall time here: not run (neither the file nor the weights can be had).
# paper: Acc2 (Non0) 89.78, F1 89.75, Acc7 52.1, MAE .563, Corr .878 (one seed). ours: not run.
# The paper's hyperparameters cannot be read (its tables are images), so these are ours; it
#   selects by validation MSE: r2.
system = 'crosssent'
corpus = 'MOSI/Processed/unaligned_50.pkl'
lm = 'roberta-base'
text_pool = 'first'
batch_size = 32
epochs = 20
warmup_epochs = 2.0
patience = 8
lr = 5e-4
lr_encoder = 0.1
weight_decay = 0.01
lr_min = 0.0
clip = 1.0
accumulate = 1
select = 'r2'
weight_mpr = 0.1
weight_eioi = 0.1
