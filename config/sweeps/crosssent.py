# CrossSent's Tables 8 to 12 and its sensitivity study (Liu et al. 2026; the paper has one seed per
# row). Its Table 4 is measured by tools/bench.py --vs=without.
# python tools/sweep.py config/sweeps/crosssent.py --table=9
name = 'CrossSent'
config = 'config/crosssent_toy.py'
short = dict(epochs=6, ramp_epochs=3.0)   # the ramp of MPR and EIOI ends halfway
columns = ('macro_f1_non0',)
_mosi = 'MOSI/Processed/aligned_50.pkl'
_mosei = 'MOSEI/Processed/aligned_50.pkl'
_no_values = 'Paper: the values are not available.'


def _ablations(full, no_mpr, no_eioi, no_gmra):
    """ The rows of Tables 9 to 11; the arguments are what the paper prints for each. """
    return [
        ('full model', {}, full),
        ('without MPR', dict(weight_mpr=0.0), no_mpr),
        ('without EIOI', dict(weight_eioi=0.0), no_eioi),
        ('without GMRA', dict(gmra_layer=0), no_gmra),
    ]


def _weights(mpr=0.1, eioi=0.1):
    return dict(weight_mpr=mpr, weight_eioi=eioi)


tables = {
    '8': dict(
        title='Table 8, ordinal agreement', columns=(*columns, 'jump2', 'jump_mean'),
        note='Paper: QWK, Jump2+ and MeanAbsJump; the table is an image that cannot be read. Here '
             'these are the columns qwk, jump2 and jump_mean.',
        rows=[
            ('full model', {}, ''),
            ('MSE alone', _weights(mpr=0.0, eioi=0.0), ''),
        ]),
    '9': dict(
        title='Table 9, ablations', note='Paper: MOSI, MAE.',
        rows=_ablations('.563', '.584', '.576', '.592')),
    '10': dict(
        title='Table 10, ablations', config='config/crosssent_mosei.py', note='Paper: MOSEI, MAE.',
        rows=_ablations('.513', '.512', 'about .513', '.520')),
    '11': dict(
        title='Table 11, ablations', config='config/crosssent_sims.py', note='Paper: SIMS, MAE.',
        rows=_ablations('.408', '.418', '.416', 'not printed')),
    '12': dict(
        title='Table 12, across corpora', config='config/crosssent_mosi.py', paired=False,
        note='Paper: MAE. A run is tested on the other corpus without training on it, so both files '
             'need features of the same widths; --modalities=[] compares the text alone.',
        rows=[
            ('MOSI to MOSI', {}, '.563'),
            ('MOSI to MOSEI', dict(at_test=dict(corpus=_mosei)), '.646'),
            ('MOSEI to MOSEI', dict(config='config/crosssent_mosei.py', corpus=_mosei), '.513'),
            ('MOSEI to MOSI', dict(at_test=dict(corpus=_mosi, of='MOSEI to MOSEI')), ''),
        ]),
    'layer': dict(
        title='4.2, the encoder layer that GMRA precedes', note=_no_values,
        rows=[(f'layer {n}', dict(gmra_layer=n), '') for n in (1, 2, 3)]),
    'weights': dict(
        title='4.2, weights of the regularisers', note=_no_values,
        rows=[
            ('MPR 0.1, EIOI 0.1', _weights(), ''),
            *[(f'MPR {w:g}', _weights(mpr=w), '') for w in (0.0, 0.03, 0.3, 1.0)],
            *[(f'EIOI {w:g}', _weights(eioi=w), '') for w in (0.0, 0.03, 0.3, 1.0)],
        ]),
    'start': dict(
        title='initialisation of GMRA, and alignment of frames with tokens',
        note='The paper has no such table.',
        rows=[
            ('random initialisation', dict(gmra_start='random'), ''),
            ('identity initialisation', dict(gmra_start='identity'), ''),
            ('audio and video concatenated by feature', dict(gmra_concat='features'), ''),
            ('frames averaged onto tokens', dict(resample='mean'), ''),
            ('frames not resampled', dict(resample='none'), ''),
        ]),
}
