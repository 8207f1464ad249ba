# CMPTA's Tables 3 and 5 (SIMS-V2, MAE), 4 and 6 (MELD, weighted F1) (Hans CSA 2026).
# tools/figures.py --tokens draws its Figure 5.
# python tools/sweep.py config/sweeps/cmpta.py --table=5
# python tools/sweep.py config/sweeps/cmpta.py --table=4-meld --corpus=MELD
name = 'CMPTA'
config = 'config/cmpta_toy.py'
short = dict(epochs=4)
_note_on_tokens = ('Fewer than six tokens: the first of the six are kept. More than six: learned '
                   'tokens are added.')


def _rows(full, no_alignment, one_way, no_adapter, by_tokens):
    """ The rows of both tables; the arguments are what the paper prints for each. """
    return [
        ('full model', {}, full),
        ('without temporal alignment', dict(cmpta_align='off'), no_alignment),
        ('one-way LSTM', dict(cmpta_align='one-way'), one_way),
        ('without the CMPT adapter', dict(cmpta_attend=False), no_adapter),
        *[(f'{n} tokens', dict(n_pseudo=n), printed) for n, printed in by_tokens.items()],
    ]


def _scores(dataset, printed, **settings):
    """ The rows of Table 3 below CMPTA's own: name, settings, what the paper prints. """
    names = dict(lmf='LMF', selfmm='Self-MM', mag='MAG-BERT')
    rows = [(names[x], dict(config=f'config/baseline_{x}.py', dataset=dataset, **settings), n)
            for x, n in zip(names, printed)]
    mse = 'config/mse_toy.py' if dataset == 'toy' else 'config/mse_simsv2.py'
    return [*rows, ('MSE-Adapter', dict(config=mse), printed[3])]


def _emotions(**settings):
    """ The rows of Table 4 below CMPTA's own. The paper has TFN alone of these. """
    names = dict(tfn='TFN', lmf='LMF', lfdnn='LF-DNN', mult='MulT', misa='MISA', mag='MAG-BERT',
                 almt='ALMT', mmim='MMIM')
    return [(name, dict(config=f'config/baseline_{x}.py', label='emotion', select='wf1', **settings),
             '.577' if x == 'tfn' else '-') for x, name in names.items()]


_note_4 = ('Paper: MELD, weighted F1; it quotes MMGCN .583 and GA2MIF .589, which are not run here. '
           'Self-MM, TETFN and CORAL are left out: their labels need a sign or an order.')
tables = {
    '3': dict(
        toy=True, full=True, title='Table 3, comparison', note='Paper: SIMS-V2, MAE.',
        rows=[('CMPTA', {}, '.308'), *_scores('toy', ('.343', '.335', '.334', '.382'))]),
    '3-simsv2': dict(
        config='config/cmpta_simsv2.py', title='Table 3, comparison',
        note='Paper: SIMS-V2, MAE; its MSE-Adapter is that on Llama-2-7B.',
        rows=[('CMPTA', {}, '.308'), *_scores('simsv2', ('.343', '.335', '.334', '.382'),
                                       corpus='SIMS_V2/ch-simsv2s.pkl')]),
    '4': dict(
        toy=True, full=True, config='config/cmpta_toy_emotion.py', title='Table 4, comparison',
        note=_note_4, rows=[('CMPTA', {}, '.595'), *_emotions(dataset='toy')]),
    '4-meld': dict(
        config='config/cmpta_meld.py', title='Table 4, comparison', note=_note_4,
        rows=[('CMPTA', {}, '.595'),
              *_emotions(dataset='mosei', corpus='MELD', max_text_len=65)]),
    '5': dict(
        title='Table 5, ablations', note=f'Paper: SIMS-V2, MAE. {_note_on_tokens}',
        rows=_rows('.308', '.412', '.328', '.380', {5: '.313', 7: '.309', 8: '.311'})),
    '6': dict(
        title='Table 6, ablations', config='config/cmpta_toy_emotion.py',
        note=f'Paper: MELD, weighted F1. {_note_on_tokens}',
        rows=_rows('.595', '.412', '.539', '.513', {5: '.542'})),
}
