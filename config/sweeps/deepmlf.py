# DeepMLF's tables (Georgiou et al. 2025), sized for the toy LM of 4 layers; for the paper's corpora --config= and --corpus=.
# python tools/sweep.py config/sweeps/deepmlf.py --table=11
# A row: what it is called, its knobs, what the paper has (MAE; lower is better). With short a run takes 38 s on 1 CPU core.
name = 'DeepMLF'
config = 'config/deepmlf_toy.py'
short = dict(epochs=4)
_small, _large = ['config/lm_toy_small.py', 'config/av_toy.py'], ['config/lm_toy_large.py', 'config/av_toy.py']
tables = {
    '2': dict(toy=True, title='Table 2, one modality alone', note='Paper: MOSEI, Acc2: BERT .834, GPT2-large .825, GPT2 .808. Here text is an encoder from nothing.', rows=[
        ('text', dict(config='config/baseline_late.py', late_streams=['text'], epochs=6), '.834'),
        ('audio', dict(config='config/av_toy.py', modalities=['audio'], epochs=6), '.651'),
        ('video', dict(config='config/av_toy.py', modalities=['vision'], epochs=6), '.644'),
        ('audio and video', dict(config='config/av_toy.py', epochs=6), '-')]),
    '4': dict(toy=True, title='Table 4, size of the LM', note='Paper: MOSEI, MAE of GPT-2-base, medium, large. Here GPTs of 32 x 4, 64 x 4 and 128 x 4, trained on the toy text.', rows=[
        ('small', dict(lm='lm_toy_small', needs=_small), '.529'), ('medium', {}, '.511'), ('large', dict(lm='lm_toy_large', needs=_large), '.499')]),
    '6': dict(toy=True, title='Table 6, depth of fusion', note='Paper: SIMS, 5, 7 and 9 MM blocks in the last layers of 12.', rows=[
        ('last 1', dict(mm_layers=[4]), '-'), ('last 2', dict(mm_layers=[3, 4]), '.374'), ('last 3', dict(mm_layers=[2, 3, 4]), '.353'), ('all 4', dict(mm_layers=[1, 2, 3, 4]), '.358')]),
    '7': dict(toy=True, title='Table 7, where one block goes', note='Paper: MOSEI, it is better to skip shallow layers; no such row is printed. Here one block, by layer.', rows=[
        (f'layer {n}', dict(mm_layers=[n]), '-') for n in (1, 2, 3, 4)]),
    'figure3': dict(title='Figure 3, fusion tokens', note='Paper: MOSEI, best at 12, worse beyond; the values are in a picture.', rows=[
        (f'n_f = {n}', dict(n_fusion=n), 'best' if n == 12 else '-') for n in (1, 2, 4, 8, 12, 20)]),
    '8': dict(title='Table 8, initialisation of the AV encoder', note='Paper: MOSEI / SIMS.', rows=[
        ('pretrained, tuned', {}, '.499 / .353'), ('pretrained, frozen', dict(av_init='frozen'), '.504 / .363'), ('random, tuned', dict(av_init='random'), '.508 / .382')]),
    '10': dict(title='Table 10, fusion block', note='Paper: SIMS.', rows=[
        ('fusion tokens look', {}, '.353'), ('text and fusion tokens look', dict(mm_query='text+fusion'), '.359'), ('text looks', dict(mm_query='text'), '.365'),
        ('no FFW', dict(mm_ffw='none', weight_lm=0.0), '.384'), ('LoRA on the LM\'s FFW', dict(mm_ffw='lora', lora_rank=8, lora_alpha=16.0), '-')]),
    '11': dict(title='Table 11, loss terms', note='Paper: MOSEI / SIMS.', rows=[
        ('all', {}, '.499 / .353'), ('without L_av', dict(weight_av=0.0), '.502 / .358'), ('without L_t', dict(weight_text=0.0), '.505 / .355'),
        ('without L_f', dict(weight_fusion=0.0), '.511 / .367'), ('without L_LM', dict(weight_lm=0.0), '.512 / .377')]),
    '12': dict(title='Table 12, regularising the embeddings', note='Paper: SIMS.', rows=[
        ('SeqAug', {}, '.353'), ('noise', dict(text_reg='noise', text_reg_rate=0.1), '.368'), ('dropout', dict(text_reg='dropout', text_reg_rate=0.1), '.372'), ('none', dict(text_reg='none'), '-')]),
    '13': dict(title='Table 13, gates', note='Paper: MOSEI.', rows=[
        ('sigmoid', {}, '.499'), ('tanh', dict(mm_gate='tanh'), '.505'), ('none', dict(mm_gate='none'), '.511')]),
}
