"""
Finds the loss term that became NaN or inf first, without waiting for the device in each step.
"""
import math

import torch

from run import ranks


class FirstBad:
    """ For each loss term, the first step in which it was NaN or inf. """

    def __init__(self, device):
        self.never = torch.tensor(math.inf, device=device)
        self.steps = {}   # name of a term -> [], its first bad step or inf

    def note(self, terms, step):
        """ terms: name -> [], the values in this step; steps count from 1. """
        for name, v in terms.items():
            bad = torch.where(torch.isfinite(v), self.never, step)
            self.steps[name] = torch.minimum(self.steps.get(name, self.never), bad)

    def sentence(self):
        """
        An error message on the terms that became NaN or inf first on any rank; None if all are
        finite. Waits for the device.
        """
        by_rank = ranks.gathered({name: float(v) for name, v in self.steps.items()})
        bad = {name: int(v) for steps in by_rank for name, v in steps.items() if math.isfinite(v)}
        if not bad:
            return None
        first = min(bad.values())
        names = ', '.join(name for name in sorted(bad) if bad[name] == first)
        return (f"{names} became NaN or inf in step {first}, and nothing was saved since: look for "
                "the clip that causes it, or lower --lr or --clip; --resume=True continues from "
                "the last checkpoint.")
