# MSE-Adapter's ablations (Yang et al. 2025). We know only the directions of the paper's results,
# not the numbers.
# python tools/sweep.py config/sweeps/mse.py --table=parts
name = 'MSE-Adapter'
config = 'config/mse_toy.py'
short = dict(epochs=5)
_worse = 'worse than the first row'
tables = {
    'parts': dict(
        title='ablation of its parts',
        note='Paper: removing either part hurts; the values are not available.',
        rows=[
            ('full model', {}, ''),
            ('without the text-guided mixer', dict(mse_tgm=False), _worse),
            ('without multi-scale fusion', dict(mse_msf=False), _worse),
        ]),
    'modalities': dict(
        title='each modality removed',
        note='Paper: removing text hurts most; the values are not available. Here the LM always '
             'reads the text, because it is part of the prompt.',
        rows=[
            ('full model', {}, ''),
            ('without audio', dict(modalities=['vision']), _worse),
            ('without video', dict(modalities=['audio']), _worse),
            ('text only', dict(modalities=[]), _worse),
        ]),
    'figure4': dict(
        title='Figure 4, amount of training data',
        note='Paper: a picture. Each row trains on this share of the train split, the same share '
             'of each score; the prerequisite LM has read the same share.',
        rows=[
            (f'{100 * share:g} %', dict(train_fraction=share), '')
            for share in (1.0, 0.5, 0.25, 0.1)
        ]),
    'readout': dict(
        title='how the answer is read', note='The paper has no such table.',
        rows=[
            ('score', {}, ''),
            ('head', dict(readout='head'), ''),
            ('full-rank tokens', dict(pseudo_projection='full'), ''),
        ]),
}
