# DeepMLF's tables (Georgiou et al. 2025). Those with toy=True are sized for the toy LM of 4 layers;
# those whose name has a corpus are as printed, with the paper's LMs. The other tables run on both,
# with --config= and --corpus= for a corpus of the paper.
# python tools/sweep.py config/sweeps/deepmlf.py --table=11
# python tools/sweep.py config/sweeps/deepmlf.py --table=6-sims --corpus=unaligned_39.pkl
# A row is (label, changed knobs, the number in the paper: MAE unless the note says otherwise). A
# run with the knobs of `short` takes 38 s on 1 CPU core.
name = 'DeepMLF'
config = 'config/deepmlf_toy.py'
short = dict(epochs=4, lr=1e-3)   # lr of the tables in results/; Table 2 has its configs'
_small_lm = dict(lm='lm_toy_small', needs=['config/lm_toy_small.py', 'config/av_toy.py'])
_large_lm = dict(lm='lm_toy_large', needs=['config/lm_toy_large.py', 'config/av_toy.py'])
_text = dict(config='config/baseline_late.py', late_streams=['text'], epochs=6, lr=2e-3)
_av = dict(config='config/av_toy.py', epochs=6, lr=2e-3)
_lora = dict(mm_ffw='lora', lora_rank=8, lora_alpha=16.0)
_n_toy, _n_mosei = (1, 2, 4, 8, 12, 16, 20), (12, 1, 4, 8, 16, 20)
_base = dict(config='config/deepmlf_mosei_base.py')
_medium = dict(config='config/deepmlf_mosei_medium.py')
_printed_std = 'the std is in units of the root mean square of each embedding'


def _rates(*rates):
    return [dict(text_reg_rate=rate) for rate in rates]


def _tokens(numbers, changes):
    """ The rows of Figure 3 for one LM: numbers of fusion tokens. """
    return [(f'n_f = {n}', changes | dict(n_fusion=n), 'best' if n == 12 else '-') for n in numbers]


def _unimodal(corpus, texts, audio, video):
    """ The rows of Table 2 for one corpus: a frozen text model and a head, or one stream. """
    def text(lm, pool):
        return dict(config='config/baseline_late.py', dataset=corpus, late_streams=['text'],
                    text_features='frozen', lm=lm, text_pool=pool)

    av = f'config/av_{corpus}.py'
    return [
        *[(f'text, {name}', text(lm, pool), printed) for name, lm, pool, printed in texts],
        ('audio', dict(config=av, modalities=['audio']), audio),
        ('video', dict(config=av, modalities=['vision']), video),
    ]


def _comparison(corpus, printed):
    """ The rows of Tables 3 and 5 for one corpus; printed: the paper's number for each. """
    names = dict(lfdnn='LF-DNN', tfn='TFN', mag='MAG-BERT', mult='MulT', misa='MISA', tetfn='TETFN',
                 selfmm='Self-MM', almt='ALMT')
    changes = {name: dict(config=f'config/baseline_{x}.py', dataset=corpus)
               for x, name in names.items()}
    return [(name, changes.get(name, {}), n) for name, n in zip(['DeepMLF', *changes], printed)]


_mosi = '.692 .945 .971 .761 .927 .772 .725 .724 .746'.split()
_mosei = '.499 .558 .573 .539 .564 .549 .544 .532 .539'.split()
_sims = '.353 .446 .437 .492 .453 .447 .419 .425 .433'.split()
_note_5 = ('Paper: MAE. It quotes LF-DNN, TFN and MAG-BERT from the paper of M-SENA, and ran the '
           'others in the framework of M-SENA.')
_note_3 = ('Paper: MOSEI, best at 12 and worse beyond, for each LM; the values are in a picture. '
           'Each LM has a table of its own: its rows are compared with its own first row.')
_note_2 = ('Paper: Acc2. Each text model is frozen, and a head reads the last token of a causal LM, '
           'or the mean over tokens of BERT. The paper does not say which BERT output it reads.')
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
    '2-mosi': dict(
        title='Table 2, one modality alone, MOSI', config='config/deepmlf_mosi.py', note=_note_2,
        rows=_unimodal('mosi', [
            ('BERT', 'bert-base-uncased', 'mean', '.790'),
            ('GPT-2', 'gpt2', 'last', '.669'),
            ('GPT-2-large', 'gpt2-large', 'last', '.735'),
            ('SmolLM2-1.7B', 'HuggingFaceTB/SmolLM2-1.7B', 'last', '.760'),
        ], '.522', '.431')),
    '2-mosei': dict(
        title='Table 2, one modality alone, MOSEI', config='config/deepmlf_mosei.py', note=_note_2,
        rows=_unimodal('mosei', [
            ('BERT', 'bert-base-uncased', 'mean', '.834'),
            ('GPT-2', 'gpt2', 'last', '.808'),
            ('GPT-2-large', 'gpt2-large', 'last', '.825'),
        ], '.651', '.644')),
    '2-sims': dict(
        title='Table 2, one modality alone, CH-SIMS', config='config/deepmlf_sims.py', note=_note_2,
        rows=_unimodal('sims', [
            ('BERT', 'bert-base-chinese', 'mean', '.774'),
            ('GPT-2', 'uer/gpt2-chinese-cluecorpussmall', 'last', '.767'),
        ], '.662', '.745')),
    '3': dict(
        toy=True, full=True, title='Tables 3 and 5, comparison',
        note=f'{_note_5} MOSI / MOSEI / SIMS.',
        rows=_comparison('toy', map(' / '.join, zip(_mosi, _mosei, _sims)))),
    '3-mosi': dict(
        config='config/deepmlf_mosi.py', title='Table 3, comparison, MOSI', note=_note_5,
        rows=_comparison('mosi', _mosi)),
    '3-mosei': dict(
        config='config/deepmlf_mosei.py', title='Table 3, comparison, MOSEI', note=_note_5,
        rows=_comparison('mosei', _mosei)),
    '5-sims': dict(
        config='config/deepmlf_sims.py', title='Table 5, comparison, CH-SIMS', note=_note_5,
        rows=_comparison('sims', _sims)),
    '4': dict(
        toy=True, title='Table 4, size of the LM', neighbours=True,
        note='Paper: MOSEI, MAE with GPT-2-base, medium and large. Here the LMs are GPTs of width '
             '32, 64 and 128 with 4 layers, trained on the toy texts.',
        rows=[
            ('small', _small_lm, '.529'),
            ('medium', {}, '.511'),
            ('large', _large_lm, '.499'),
        ]),
    '4-mosei': dict(
        title='Table 4, size of the LM', config='config/deepmlf_mosei.py', neighbours=True,
        note='Paper: MOSEI, MAE.',
        rows=[
            ('GPT-2', _base, '.529'),
            ('GPT-2-medium', _medium, '.511'),
            ('GPT-2-large', {}, '.499'),
        ]),
    '6': dict(
        toy=True, title='Table 6, depth of fusion', neighbours=True,
        note='Paper: SIMS, MM blocks in the last 5, 7 and 9 of 12 layers.',
        rows=[
            ('last 1', dict(mm_layers=[4]), '-'),
            ('last 2', dict(mm_layers=[3, 4]), '.374'),
            ('last 3', dict(mm_layers=[2, 3, 4]), '.353'),
            ('all 4', dict(mm_layers=[1, 2, 3, 4]), '.358'),
        ]),
    '6-sims': dict(
        title='Table 6, depth of fusion', config='config/deepmlf_sims.py', neighbours=True,
        note='Paper: SIMS, MAE with GPT-2 of 12 layers.',
        rows=[
            ('last 5 of 12', dict(mm_layers=list(range(8, 13))), '.374'),
            ('last 7 of 12', dict(mm_layers=list(range(6, 13))), '.353'),
            ('last 9 of 12', dict(mm_layers=list(range(4, 13))), '.358'),
        ]),
    '7': dict(
        toy=True, title='Table 7, position of one block',
        note='Paper: MOSEI, skipping shallow layers is better; it prints no row with one block.',
        rows=[(f'layer {n}', dict(mm_layers=[n]), '-') for n in (1, 2, 3, 4)]),
    '7-mosei': dict(
        title='Table 7, size and depth', config='config/deepmlf_mosei.py', neighbours=True,
        relative=('acc2_non0', 'mae'),
        note='Paper: MOSEI; relative change of Acc2 and MAE to the row above, with the blocks in the '
             'layers 4-6-8:12, 9-12-15-18-21-24 and 8-15-22-29-36.',
        rows=[
            ('GPT-2, 7 blocks', _base, '-'),
            ('GPT-2-medium, 6 blocks', _medium, 'Acc2 +1.36 %, MAE -3.40 %'),
            ('GPT-2-large, 5 blocks', {}, 'Acc2 +0.17 %, MAE -2.35 %'),
        ]),
    'figure3': dict(
        toy=True, title='Figure 3, fusion tokens', note=_note_3, rows=_tokens(_n_toy, {})),
    'figure3-small': dict(
        toy=True, title='Figure 3, fusion tokens, small LM of Table 4', note=_note_3,
        rows=_tokens(_n_toy, _small_lm)),
    'figure3-large': dict(
        toy=True, title='Figure 3, fusion tokens, large LM of Table 4', note=_note_3,
        rows=_tokens(_n_toy, _large_lm)),
    'figure3-mosei': dict(
        title='Figure 3, fusion tokens, GPT-2-large', config='config/deepmlf_mosei.py',
        note=f'{_note_3} The grid is that of its search for n_f, with 1 and 4.',
        rows=_tokens(_n_mosei, {})),
    'figure3-mosei-base': dict(
        title='Figure 3, fusion tokens, GPT-2', config='config/deepmlf_mosei_base.py', note=_note_3,
        rows=_tokens(_n_mosei, {})),
    'figure3-mosei-medium': dict(
        title='Figure 3, fusion tokens, GPT-2-medium', config='config/deepmlf_mosei_medium.py',
        note=_note_3, rows=_tokens(_n_mosei, {})),
    '8': dict(
        title='Table 8, initialisation of the AV encoder', neighbours=True,
        note='Paper: MOSEI / SIMS.',
        rows=[
            ('pretrained, tuned', {}, '.499 / .353'),
            ('pretrained, frozen', dict(av_init='frozen'), '.504 / .363'),
            ('random, tuned', dict(av_init='random'), '.508 / .382'),
        ]),
    '10': dict(
        title='Table 10, fusion block', neighbours=True,
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
        title='Table 12, augmentation of the embeddings',
        note=f'Paper: SIMS; it tunes noise and dropout. Of the noise, {_printed_std}.',
        rows=[
            ('SeqAug', {}, '.353'),
            ('noise', dict(text_reg='noise', tune=_rates(0.05, 0.1, 0.2, 0.5)), '.368'),
            ('dropout', dict(text_reg='dropout', tune=_rates(0.1, 0.2, 0.3)), '.372'),
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
