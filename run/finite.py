"""
Which term of a loss became NaN or inf first, noted on the device without waiting for it.
"""
import math

import torch

from run import ranks


class FirstBad:
    """ For each term, the first step in which it was not finite. """

    def __init__(self, device):
        self.never = torch.tensor(math.inf, device=device)
        self.steps = {}   # name of a term -> []

    def note(self, terms, step):
        """ terms: name -> [], of this step (from 1). """
        for name, v in terms.items():
            bad = torch.where(torch.isfinite(v), self.never, step)
            self.steps[name] = torch.minimum(self.steps.get(name, self.never), bad)

    def sentence(self):
        """ What became NaN or inf first on any rank, or None. Waits for the device. """
        seen = ranks.gathered({name: float(v) for name, v in self.steps.items()})
        bad = {name: int(v) for theirs in seen for name, v in theirs.items() if math.isfinite(v)}
        if not bad:
            return None
        first = min(bad.values())
        names = ', '.join(name for name in sorted(bad) if bad[name] == first)
        return (f"{names} became NaN or inf in step {first}, and nothing was saved since: lower --lr or "
                "--clip, or look for the clip that does it; --resume=True goes on from before.")
