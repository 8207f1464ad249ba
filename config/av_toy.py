# Stage two of DeepMLF's curriculum on the toy corpus: pretrains the AV (audiovisual) encoder on
# the label.
# python train.py config/av_toy.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul); 22 s
# expected: test MAE 1.059 +- 0.003 (n=3); majority 1.165; best possible from audio and video 1.038
# paper: none
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
