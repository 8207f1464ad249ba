"""
The mean of a run's weights over its last epochs, by which it is validated and tested.
"""
from contextlib import contextmanager

import torch


class WeightAverage:
    """
    The running mean of the trainable weights: over all steps at first, then an exponential mean
    over about `n_steps` steps. On a small validation split, the mean of many steps varies less than
    the weights of one step. Buffers, such as the statistics of a batch norm, are not averaged.

    weights: name -> trainable weight; n_steps: 0 for no averaging. Source: Polyak and Juditsky
    1992, and the exponential form of stochastic weight averaging (Izmailov et al. 2018).
    """

    def __init__(self, weights, n_steps):
        self.weights, self.n_steps = weights, n_steps
        self.mean = {n: p.detach().float().clone() for n, p in weights.items()} if n_steps else {}

    @torch.no_grad()
    def update(self, step):
        """ Add the weights after optimizer step `step`, from 1. """
        share = 1 / min(step, max(1.0, self.n_steps))
        for name, mean in self.mean.items():
            mean.lerp_(self.weights[name].float(), share)

    @contextmanager
    def applied(self):
        """ Inside, the model has the mean weights. """
        kept = {name: self.weights[name].detach().clone() for name in self.mean}
        self._set(self.mean)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values):
        for name, value in values.items():
            self.weights[name].copy_(value)
