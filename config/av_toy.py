# Step two of the toy curriculum: the audiovisual encoder, pretrained by itself on the label.
# python train.py config/av_toy.py
system = 'av'
batch_size = 64
accumulate = 1
epochs = 10
lr = 2e-3
lr_min = 1e-5
weight_decay = 0.01
av_layers = 2
av_seqaug = 0.0
log_interval = 50
