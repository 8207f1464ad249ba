# DeepMLF's tables (Georgiou et al. 2025), sized for the toy LM of 4 layers. The tables without
# toy=True can also be run on the paper's corpora, with --config= and --corpus=.
# python tools/sweep.py config/sweeps/deepmlf.py --table=11
# A row is (label, changed knobs, the number in the paper: MAE unless the note says otherwise). A
# run with the knobs of `short` takes 38 s on 1 CPU core.
name = 'DeepMLF'
config = 'config/deepmlf_toy.py'
short = dict(epochs=4)
_small_lm = dict(lm='lm_toy_small', needs=['config/lm_toy_small.py', 'config/av_toy.py'])
_large_lm = dict(lm='lm_toy_large', needs=['config/lm_toy_large.py', 'config/av_toy.py'])
_text = dict(config='config/baseline_late.py', late_streams=['text'], epochs=6)
_av = dict(config='config/av_toy.py', epochs=6)
_lora = dict(mm_ffw='lora', lora_rank=8, lora_alpha=16.0)
tables = {
    '2': dict(
        toy=True, title='Table 2, one modality alone',
        note='Paper: MOSEI, Acc2; text is BERT .834, GPT2-large .825, GPT2 .808. Here text is an '
             'encoder trained from scratch.',
        rows=[
            ('text', _text, '.834'),
            ('audio', _av | dict(modalities=['audio']), '.651'),
            ('video', _av | dict(modalities=['vision']), '.644'),
            ('audio and video', _av, '-'),
        ]),
    '4': dict(
        toy=True, title='Table 4, size of the LM',
        note='Paper: MOSEI, MAE with GPT-2-base, medium and large. Here the LMs are GPTs of width '
             '32, 64 and 128 with 4 layers, trained on the toy texts.',
        rows=[
            ('small', _small_lm, '.529'),
            ('medium', {}, '.511'),
            ('large', _large_lm, '.499'),
        ]),
    '6': dict(
        toy=True, title='Table 6, depth of fusion',
        note='Paper: SIMS, MM blocks in the last 5, 7 and 9 of 12 layers.',
        rows=[
            ('last 1', dict(mm_layers=[4]), '-'),
            ('last 2', dict(mm_layers=[3, 4]), '.374'),
            ('last 3', dict(mm_layers=[2, 3, 4]), '.353'),
            ('all 4', dict(mm_layers=[1, 2, 3, 4]), '.358'),
        ]),
    '7': dict(
        toy=True, title='Table 7, position of one block',
        note='Paper: MOSEI, skipping shallow layers is better; it prints no row with one block.',
        rows=[(f'layer {n}', dict(mm_layers=[n]), '-') for n in (1, 2, 3, 4)]),
    'figure3': dict(
        title='Figure 3, fusion tokens',
        note='Paper: MOSEI, best at 12 and worse beyond; the values are in a picture.',
        rows=[
            (f'n_f = {n}', dict(n_fusion=n), 'best' if n == 12 else '-')
            for n in (1, 2, 4, 8, 12, 20)
        ]),
    '8': dict(
        title='Table 8, initialisation of the AV encoder', note='Paper: MOSEI / SIMS.',
        rows=[
            ('pretrained, tuned', {}, '.499 / .353'),
            ('pretrained, frozen', dict(av_init='frozen'), '.504 / .363'),
            ('random, tuned', dict(av_init='random'), '.508 / .382'),
        ]),
    '10': dict(
        title='Table 10, fusion block',
        note='Paper: SIMS. The first three rows differ in the queries of the cross-attention.',
        rows=[
            ('queries: fusion tokens', {}, '.353'),
            ('queries: text and fusion tokens', dict(mm_query='text+fusion'), '.359'),
            ('queries: text', dict(mm_query='text'), '.365'),
            ('no FFW', dict(mm_ffw='none', weight_lm=0.0), '.384'),
            ('LoRA on the LM\'s FFW', _lora, '-'),
        ]),
    '11': dict(
        title='Table 11, loss terms', note='Paper: MOSEI / SIMS.',
        rows=[
            ('all', {}, '.499 / .353'),
            ('without L_av', dict(weight_av=0.0), '.502 / .358'),
            ('without L_t', dict(weight_text=0.0), '.505 / .355'),
            ('without L_f', dict(weight_fusion=0.0), '.511 / .367'),
            ('without L_LM', dict(weight_lm=0.0), '.512 / .377'),
        ]),
    '12': dict(
        title='Table 12, augmentation of the embeddings', note='Paper: SIMS.',
        rows=[
            ('SeqAug', {}, '.353'),
            ('noise', dict(text_reg='noise', text_reg_rate=0.1), '.368'),
            ('dropout', dict(text_reg='dropout', text_reg_rate=0.1), '.372'),
            ('none', dict(text_reg='none'), '-'),
        ]),
    '13': dict(
        title='Table 13, gates', note='Paper: MOSEI.',
        rows=[
            ('sigmoid', {}, '.499'),
            ('tanh', dict(mm_gate='tanh'), '.505'),
            ('none', dict(mm_gate='none'), '.511'),
        ]),
}
