# MSE-Adapter's ablations (Yang et al. 2025): of the paper only the directions can be had, no number.
# python tools/sweep.py config/sweeps/mse.py --table=parts
name = 'MSE-Adapter'
config = 'config/mse_toy.py'
short = dict(epochs=5)
_worse = 'worse than the first row'
tables = {
    'parts': dict(title='its parts', note='Paper: removing any of them hurts; values not to be had.', rows=[
        ('whole', {}, ''), ('without the mixer', dict(mse_tgm=False), _worse), ('without multi-scale fusion', dict(mse_msf=False), _worse)]),
    'modalities': dict(title='each modality removed', note='Paper: removing text hurts most; values not to be had. The LM still reads the text: it is part of the prompt.', rows=[
        ('whole', {}, ''), ('without audio', dict(modalities=['vision']), _worse), ('without video', dict(modalities=['audio']), _worse), ('text only', dict(modalities=[]), _worse)]),
    'figure4': dict(title='Figure 4, amount of training data', note='Paper: a picture. Shares of the train split, of each score alike; the LM in needs has read the same share.', rows=[
        (f'{100 * share:g} %', dict(train_fraction=share), '') for share in (1.0, 0.5, 0.25, 0.1)]),
    'readout': dict(title='how the answer is read', note='No paper has it.', rows=[
        ('score', {}, ''), ('head', dict(readout='head'), ''), ('full-rank tokens', dict(pseudo_projection='full'), '')]),
}
