"""
Does a run on the toy corpus beat the best additive reader (late fusion) on the same test clips?

    python tools/adding.py out/RUN [out/RUN-seed1 ..]
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from corpora.toy import additive_fit, draw, toy_table
from run.report import EvalError, read_predictions, read_run


def adding(folders):
    """ Runs on the toy corpus against the best additive reader of the latents of the same test
    clips: the difference of their mean absolute errors, over clips and the runs' mean, and its
    standard error. Raises EvalError. """
    sizes = read_run(folders[0])['about']['corpus']['clips']
    rows = toy_table()
    table, _ = additive_fit(rows[:, 0].astype(int), rows[:, 1].astype(int), rows[:, 2])  # [5,9]
    source, _, states = draw(tuple(sizes[split] for split in ('train', 'valid', 'test')))
    y = source['test']['regression_labels']  # [N]
    best = np.abs(y - table[tuple(states['test'].T)])  # [N]

    errors = []
    for folder in folders:
        p = read_predictions(folder)[1]
        on_toy = read_run(folder)['about']['corpus']['name'] == 'toy'
        if not on_toy or 'pred' not in p or not np.array_equal(p['label'], y):
            raise EvalError(f"{folder} was not tested on the scores of the toy corpus.")
        errors.append(np.abs(p['pred'] - y))  # [N]
    gap = np.mean(errors, 0) - best  # [N]
    mean, error = gap.mean(), gap.std(ddof=1) / len(gap) ** 0.5
    verdict = "better than adding can be" if mean < -2 * error else "not better than adding can be"
    return (f"mae {np.mean(errors):.3f} (n={len(folders)}), the best additive reader "
            f"{best.mean():.3f}: {mean:+.3f} +- {error:.3f} (one standard error), {verdict}")


if __name__ == '__main__':
    folders = [a.rstrip('/') for a in sys.argv[1:]]
    try:
        print(adding(folders) if folders else __doc__)
    except EvalError as e:
        sys.exit(f"adding: {e}")
