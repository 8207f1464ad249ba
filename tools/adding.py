"""
Tests whether a run on the toy corpus beats the late-fusion bound on the same test clips.

    python tools/adding.py out/RUN [out/RUN-seed1 ..]

The late-fusion bound is the best prediction of the form f(text) + g(audio, video), fitted to the
latent states that the toy corpus is generated from.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from corpora.toy import additive_fit, draw, toy_table
from run.errors import ModelError
from run.finished import EvalError, check_same_experiment, read_predictions, read_run
from run.machine import print_any_text


def adding(folders):
    """ Compares runs on the toy corpus, which differ in the seed, with the late-fusion bound: the
    difference of the mean absolute errors, and its standard error over clips. Returns a sentence.
    Raises EvalError, ModelError. """
    check_same_experiment(folders)
    sizes = read_run(folders[0])['about']['corpus']['clips']
    rows = toy_table()
    table, _ = additive_fit(rows[:, 0].astype(int), rows[:, 1].astype(int), rows[:, 2])  # [5,9]
    source, _, states = draw(tuple(sizes[split] for split in ('train', 'valid', 'test')))
    y = source['test']['regression_labels']  # [N]
    bound = np.abs(y - table[tuple(states['test'].T)])  # [N]

    errors = []
    for folder in folders:
        r = read_run(folder)
        reads_scores = r['about']['corpus']['name'] == 'toy' and 'mae' in r['test']
        p = read_predictions(folder)[1] if reads_scores else {}
        if 'pred' not in p or not np.array_equal(p['label'], y):
            raise EvalError(f"{folder} was not tested on the scores of the toy corpus: choose a "
                            "run that was.")
        errors.append(np.abs(p['pred'] - y))  # [N]
    gap = np.mean(errors, 0) - bound  # [N]
    mean, error = gap.mean(), gap.std(ddof=1) / len(gap) ** 0.5
    verdict = "better" if mean < -2 * error else "not better"
    return (f"mae {np.mean(errors):.3f} (n={len(folders)}), late-fusion bound on these "
            f"clips {bound.mean():.3f}, "
            f"difference {mean:+.3f} +- {error:.3f} (one standard error): "
            f"{verdict} than late fusion can be")


if __name__ == '__main__':
    print_any_text()
    folders = [a.rstrip('/') for a in sys.argv[1:]]
    try:
        print(adding(folders) if folders and not {'-h', '--help'} & set(folders) else __doc__)
    except (EvalError, ModelError) as e:
        sys.exit(f"adding: {e}")
