"""
Bounds the memory of a model that is built from the knobs of a received folder: a wrong width or
number of layers would otherwise fill the machine's memory before the checkpoint is seen not to fit.
"""
import os

import torch
from torch.overrides import TorchFunctionMode

from run.finished import EvalError

# the functions that make the weights and buffers of new modules
FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange,
    torch.linspace, torch.eye}
SLACK, FACTOR = 10 ** 7, 10   # a model may make some temporary tensors while it is built


class SizeLimit(TorchFunctionMode):
    """ In the block, new tensors may have `most` numbers together. Raises EvalError beyond. """

    def __init__(self, most, folder):
        super().__init__()
        self.left, self.folder = most, folder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FACTORIES and str(kwargs.get('device')) != 'meta':
            shape_alone = {k: v for k, v in kwargs.items() if k not in ('generator', 'out')}
            self.left -= func(*args, **shape_alone | dict(device='meta')).numel()
            if self.left < 0:
                raise EvalError(f"the knobs of {self.folder} describe a model that is many times "
                                "larger than its checkpoint: restore its files.")
        return func(*args, **kwargs)


def size_limit(folder, tensors, lm, hub_lm_bytes):
    """
    A SizeLimit for building the model of a run. tensors: those of its checkpoint. lm: the folder of
    its LM, whose files bound the LM's size; if it is no folder, hub_lm_bytes() is the size.
    """
    n_numbers = sum(v.numel() for v in tensors.values())
    for home, _, names in os.walk(lm):
        paths = [os.path.join(home, name) for name in names]
        n_numbers += sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    if lm and not os.path.isdir(lm):
        n_numbers += hub_lm_bytes()
    return SizeLimit(SLACK + FACTOR * n_numbers, folder)
