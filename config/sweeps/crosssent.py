# CrossSent's Tables 8 to 11 and its sensitivity (Liu et al. 2026; one seed each there). Table 4 is bench.py, Table 12 eval.py --corpus.
# python tools/sweep.py config/sweeps/crosssent.py --table=9
name = 'CrossSent'
config = 'config/crosssent_toy.py'
short = dict(epochs=6)
_parts = lambda full, mpr, eioi, gmra: [('whole', {}, full), ('without MPR', dict(weight_mpr=0.0), mpr), ('without EIOI', dict(weight_eioi=0.0), eioi), ('without GMRA', dict(gmra_layer=0), gmra)]
tables = {
    '8': dict(title='Table 8, ordinal agreement', note='Paper: pictures of QWK; here the columns qwk of each row.', rows=[('whole', {}, ''), ('MSE alone', dict(weight_mpr=0.0, weight_eioi=0.0), '')]),
    '9': dict(title='Table 9, ablations', note='Paper: MOSI, MAE.', rows=_parts('.563', '.584', '.576', '.592')),
    '10': dict(title='Table 10, ablations', config='config/crosssent_mosei.py', note='Paper: MOSEI, MAE.', rows=_parts('.513', '.512', 'about .513', '.520')),
    '11': dict(title='Table 11, ablations', config='config/crosssent_sims.py', note='Paper: SIMS, MAE.', rows=_parts('.408', '.418', '.416', 'not printed')),
    'layer': dict(title='4.2, the layer that GMRA comes before', note='Paper: values not to be had.', rows=[(f'layer {n}', dict(gmra_layer=n), '') for n in (1, 2, 3)]),
    'weights': dict(title='4.2, the regularisers\' weights', note='Paper: values not to be had.', rows=[('.1 and .1', dict(weight_mpr=0.1, weight_eioi=0.1), '')] + [
        (f'{k.upper()} {w:g}', dict(weight_mpr=0.1, weight_eioi=0.1) | {f'weight_{k}': w}, '') for k in ('mpr', 'eioi') for w in (0.0, 0.03, 0.3, 1.0)]),
    'start': dict(title='the start of GMRA, and how frames meet tokens', note='No paper has it.', rows=[('random', dict(gmra_start='random'), ''), ('identity', dict(gmra_start='identity'), ''),
        ('side by side', dict(gmra_concat='features'), ''), ('means of frames', dict(resample='mean'), ''), ('frames as they are', dict(resample='none'), '')]),
}
