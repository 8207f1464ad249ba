# Controls for each adapter system. The papers do not report them.
# python tools/sweep.py config/sweeps/controls.py --table=deepmlf
name = 'Controls'
config = 'config/deepmlf_toy.py'
short = dict(epochs=4)
_random_lm = ('random LM', dict(lm_init='random'), '')


def _rows(*more):
    return [
        ('full model', {}, ''),
        ('text only', dict(modalities=[]), ''),
        ('audio and video of another clip', dict(shuffle_streams=True), ''),
        *more,
        ('no audio at test', dict(at_test=dict(modalities=['vision'])), ''),
        ('no video at test', dict(at_test=dict(modalities=['audio'])), ''),
        ('neither audio nor video at test', dict(at_test=dict(modalities=[])), ''),
    ]


tables = {
    'deepmlf': dict(
        title='DeepMLF', short=dict(lr=1e-3), note='The row text only is trained without frames.',
        rows=_rows(_random_lm)),
    'mse': dict(
        title='MSE-Adapter', config='config/mse_toy.py', short=dict(epochs=5),
        rows=_rows(_random_lm)),
    'cmpta': dict(title='CMPTA', config='config/cmpta_toy.py', rows=_rows(_random_lm)),
    'crosssent': dict(
        title='CrossSent', config='config/crosssent_toy.py', short=dict(epochs=6), rows=_rows()),
}
