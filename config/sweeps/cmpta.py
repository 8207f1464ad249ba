# CMPTA's Table 5 (SIMS-V2, MAE) and Table 6 (MELD, weighted F1) (Hans CSA 2026).
# tools/figures.py --tokens draws its Figure 5.
# python tools/sweep.py config/sweeps/cmpta.py --table=5
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


tables = {
    '5': dict(
        title='Table 5, ablations', note=f'Paper: SIMS-V2, MAE. {_note_on_tokens}',
        rows=_rows('.308', '.412', '.328', '.380', {5: '.313', 7: '.309', 8: '.311'})),
    '6': dict(
        title='Table 6, ablations', config='config/cmpta_toy_emotion.py',
        note=f'Paper: MELD, weighted F1. {_note_on_tokens}',
        rows=_rows('.595', '.412', '.539', '.513', {5: '.542'})),
}
