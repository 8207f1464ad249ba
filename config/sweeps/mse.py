# MSE-Adapter's ablations (Yang et al. 2025). We know only the directions of the paper's results,
# not the numbers.
# python tools/sweep.py config/sweeps/mse.py --table=parts
name = 'MSE-Adapter'
config = 'config/mse_toy.py'
short = dict(epochs=5)
_worse = 'worse than the first row'
_note_4 = ('Paper: a picture. Each row trains on this share of the train split, the same share of each '
           'label, for the same number of steps: epochs, warm-up and patience are divided by the '
           'share. A row that is not better than the majority shows that its share is too small to '
           'learn from.')


def _shares(epochs, warmup_epochs, patience):
    return [
        (f'{100 * share:g} %', dict(
            train_fraction=share, epochs=round(epochs / share), patience=round(patience / share),
            warmup_epochs=warmup_epochs / share), '')
        for share in (1.0, 0.5, 0.25, 0.1)]


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
        title='each modality removed', neighbours=True,
        note='Paper: removing text hurts most; the values are not available. Without text, the '
             'prompt lacks the words of the clip, and the mixer has no text.',
        rows=[
            ('full model', {}, ''),
            ('without text', dict(clip_words=False), _worse),
            ('without video', dict(modalities=['audio']), _worse),
            ('without audio', dict(modalities=['vision']), _worse),
            ('text only', dict(modalities=[]), _worse),
        ]),
    'figure4': dict(
        toy=True, title='Figure 4, amount of training data',
        note=f'{_note_4} The prerequisite LM has read the same share, because its texts hold the '
             'labels, in as many epochs as with all clips.',
        rows=_shares(epochs=5, warmup_epochs=1.0, patience=10)),
    'figure4-meld': dict(
        title='Figure 4, amount of training data', config='config/mse_meld.py', note=_note_4,
        rows=_shares(epochs=50, warmup_epochs=5.0, patience=8)),
    'readout': dict(
        title='how the answer is read', note='The paper has no such table.',
        rows=[
            ('score', {}, ''),
            ('head', dict(readout='head'), ''),
            ('full-rank tokens', dict(pseudo_projection='full'), ''),
        ]),
}
