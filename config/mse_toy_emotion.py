# MSE-Adapter on the toy corpus's five emotions: the frozen small GPT answers with a name.
# python train.py config/mse_toy_emotion.py
# hardware: 2 CPU cores (330 GFLOP/s float32 matmul); 48 s, 83 s with prerequisites and imports
# expected: test weighted F1 0.691 +- 0.042, accuracy 0.706 (n=3)
#   best possible accuracy: text only 0.423, late fusion 0.791, all modalities 0.826
# paper: none
needs = ['config/lm_toy_rated.py']
system = 'mse'
label = 'emotion'
label_words = 'name'
select = 'wf1'
lm = 'lm_toy_rated'
prompt = 'toy'
batch_size = 64
accumulate = 1
epochs = 12
lr = 1e-2
lr_min = 0.0
weight_decay = 0.01
grad_clip = 1.0
mse_width = 64
msf_scales = [1, 2, 4]
lstm_audio = 32
lstm_vision = 32
log_interval = 50
