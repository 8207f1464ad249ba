# Prompt tuning on Gemma 3 270M, on the text of CMU-MOSI: free vectors in the place of the pseudo
# tokens of MSE-Adapter and CMPTA, as their control.
# python train.py config/prompt_mosi_gemma.py --corpus=mosi_official.pkl --lm=FOLDER
# hardware: 1 CPU core of a machine with AMX; 5 min with --dtype=bfloat16
# expected: test MAE 1.199 +- 0.256 (n=3): one seed of three trains well; majority 1.456
# paper: none with this LM. The read-out is that of mse_mosi_gemma.py
system = 'prompt_tuning'
corpus = 'mosi_official.pkl'
lm = 'google/gemma-3-270m'
prompt = 'toy'
n_pseudo = 20
batch_size = 16
accumulate = 1
epochs = 4
lr = 0.003
weight_decay = 0.0
beta_2 = 0.999
average_epochs = 1.0
lm_depth = 12
readout = 'head'
