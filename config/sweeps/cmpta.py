# CMPTA's Tables 5 and 6 (Hans CSA 2026): SIMS-V2, MAE, and MELD, weighted F1. Its Figure 5 is figures.py --tokens.
# python tools/sweep.py config/sweeps/cmpta.py --table=5
name = 'CMPTA'
config = 'config/cmpta_toy.py'
short = dict(epochs=4)
_rows = lambda align, lstm, token, other, counts: [
    ('whole', {}, align[0]), ('without temporal alignment', dict(cmpta_align='off'), align[1]), ('one-way LSTM', dict(cmpta_align='one-way'), lstm),
    ('without the CMPT adapter', dict(cmpta_attend=False), token)] + [(f'{n} tokens', dict(n_pseudo=n), counts[n]) for n in counts if n != 6] + other
tables = {
    '5': dict(title='Table 5, ablations', note='Paper: SIMS-V2, MAE. Fewer or more than six tokens: repeated or left out, as model.py says.',
              rows=_rows(('.308', '.412'), '.328', '.380', [], {5: '.313', 6: '.308', 7: '.309', 8: '.311'})),
    '6': dict(title='Table 6, ablations', config='config/cmpta_toy_emotion.py', note='Paper: MELD, weighted F1.',
              rows=_rows(('.595', '.412'), '.539', '.513', [], {5: '.542', 6: '.595'})),
}
