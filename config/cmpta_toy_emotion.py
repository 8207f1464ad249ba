# CMPTA on the toy corpus's five emotions, with six pseudo tokens as in cmpta_toy.py.
# python train.py config/cmpta_toy_emotion.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul); 58 s, 91 s with prerequisites and imports
# expected: test weighted F1 0.780 +- 0.021, accuracy 0.783 (n=3)
#   best possible accuracy: text only 0.423, late fusion 0.791, all modalities 0.826
# paper: none
needs = ['config/lm_toy_rated.py']
system = 'cmpta'
label = 'emotion'
label_words = 'name'
select = 'wf1'
lm = 'lm_toy_rated'
prompt = 'toy'
batch_size = 64
accumulate = 1
epochs = 10
lr = 5e-3
lr_min = 0.0
weight_decay = 0.01
n_pseudo = 6
cmpta_width = 32
cmpta_heads = 4
log_interval = 50
