# Controls that no paper runs and every reader asks for.
# python tools/sweep.py config/sweeps/controls.py --table=deepmlf
name = 'Controls'
config = 'config/deepmlf_toy.py'
short = dict(epochs=4)
_rows = lambda *more: [('as it is', {}, ''), ('text only', dict(modalities=[]), ''), ('audio and video of another clip', dict(shuffle_streams=True), ''), *more,
                       ('no audio at test', dict(at_test=['vision']), ''), ('no video at test', dict(at_test=['audio']), ''), ('neither at test', dict(at_test=[]), '')]
_random = ('a random LM', dict(lm_init='random'), '')
tables = {
    'deepmlf': dict(title='DeepMLF', note='Text only is trained with no frames at all.', rows=_rows(_random)),
    'mse': dict(title='MSE-Adapter', config='config/mse_toy.py', short=dict(epochs=5), rows=_rows(_random)),
    'cmpta': dict(title='CMPTA', config='config/cmpta_toy.py', rows=_rows(_random)),
    'crosssent': dict(title='CrossSent', config='config/crosssent_toy.py', short=dict(epochs=6), rows=_rows()),
}
