"""
Measures how much worse the predictions of a run become if audio and video are missing or damaged.

    python tools/damage.py out/RUN [out/RUN-seed1 ..]

Prints a table of test metrics under these conditions: audio, video, or both missing for 25 to 100 %
of the test clips (the same clips for every run); noise with the features' standard deviation added;
frames in random order. Nothing is trained. The runs must differ in the seed only.

    --data_dir=FOLDER           the folder of converted corpora and computed features ('data')
    --trust_remote_code=True    lets the authors of the run's LM run their own code
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from data import STREAMS, epoch_order
from eval import load_run_and_feed, take_permissions
from metrics import BETTER, SHOWN, markdown_table, mean_std_n, score_by, task_metrics
from run.command_line import words_and_flags
from run.errors import UserError
from run.finished import EvalError, check_same_experiment, read_run
from run.machine import print_any_text

SHARES = (0.25, 0.5, 0.75, 1.0)   # shares of clips that lose a modality
WHOLE = 'undamaged'               # the row that the others are compared with


def no_damage(batch, uniform, rng):
    """ The condition without damage. """
    return {}


def drop(streams, share):
    """ Makes a condition: a share of the clips has no frames of these streams. """
    def damage(batch, uniform, rng):
        out = {}
        for m in streams:
            keep = torch.from_numpy(uniform >= share).to(batch[m].device)  # [B]
            out[m] = batch[m] * keep[:, None, None]  # [B,S,d]
            out[m + '_len'] = batch[m + '_len'] * keep  # [B]
            out[m + '_mask'] = batch[m + '_mask'] & keep[:, None]  # [B,S]
        return out
    return damage


def add_noise(std):
    """ Makes a condition: noise with the features' standard deviation on every real frame. """
    def damage(batch, uniform, rng):
        out = {}
        for m in std:
            x, mask = batch[m], batch[m + '_mask']  # [B,S,d], [B,S]
            noise = rng.standard_normal(tuple(x.shape)) * std[m]  # [B,S,d]
            noise = torch.from_numpy(noise.astype(np.float32)).to(x.device)
            out[m] = (x + noise) * mask[..., None]  # [B,S,d]
        return out
    return damage


def shuffle_frames(streams):
    """ Makes a condition: the frames of each clip in random order. """
    def damage(batch, uniform, rng):
        out = {}
        for m in streams:
            x, mask = batch[m], batch[m + '_mask']  # [B,S,d], [B,S]
            key = torch.from_numpy(rng.random(tuple(mask.shape))).to(x.device)  # [B,S]
            order = key.masked_fill(~mask, torch.inf).argsort(1)  # real frames first, then padding
            out[m] = x.gather(1, order[..., None].expand_as(x))  # [B,S,d]
        return out
    return damage


def conditions(std, codes=False):
    """
    dict of name -> condition. A condition is a function of a batch, `uniform` [B], a random number
    in [0, 1) of each clip (a clip loses its frames if it is below the share), and a random
    generator. It returns the entries of the batch that change. std: dict of stream -> the standard
    deviation of its features, a number or [d]; codes: the frames are codes. A code with noise is
    no code, so noise is left out.
    """
    streams = list(std)
    rows = {WHOLE: no_damage}
    for group in [[m] for m in streams] + [streams] * (len(streams) > 1):
        for share in SHARES:
            rows[f"no {' nor '.join(group)} for {share:.0%}"] = drop(group, share)
    if not codes:
        rows["noise with the features' std"] = add_noise(std)
    rows['frames in random order'] = shuffle_frames(streams)
    return rows


@torch.no_grad()
def damaged(folder, **allowed):
    """ Tests a run under every condition -> dict of name -> metrics. Raises EvalError, CorpusError,
    ModelError. """
    run, feed = load_run_and_feed(folder, **allowed)
    in_corpus = run.corpus.meta['streams']
    read = run.system.modalities_read(run.knobs)
    streams = [m for m in STREAMS if m in run.corpus.widths and m in read]
    if not streams:
        raise EvalError(f"{folder} reads neither audio nor video, so there is nothing to damage: "
                        "choose a run that reads one of them.")
    std = {}
    for m in streams:
        standardised = run.knobs['standardise'] or in_corpus[m]['standardised']
        std[m] = 1.0 if standardised else np.array(in_corpus[m]['std'])
    damages = conditions(std, codes=bool(run.knobs.get('gmra_codes')))

    n = feed.n_clips['test']
    uniform = np.random.default_rng(0).random(n)  # [N]
    preds = {name: np.zeros(n) for name in damages}  # [N] each
    label = np.zeros(n)  # [N]
    batches = epoch_order(feed.cost('test'), run.knobs['batch_size'], 0, None)
    for i, index in enumerate(batches):
        batch, rng = feed('test', index), np.random.default_rng([1, i])
        for name, damage in damages.items():
            pred = run.predict(batch | damage(batch, uniform[index], rng))['pred']
            preds[name][index] = pred.float().cpu().numpy()
        label[index] = batch['label'].cpu().numpy()
    try:
        return {name: task_metrics(pred, label, feed.info) for name, pred in preds.items()}
    except ValueError as e:
        raise EvalError(f"{folder}: {e}.") from None


def main(argv):
    """ The command line. Raises UserError. """
    if not argv or argv[0] in ('-h', '--help'):
        print(__doc__)
        return
    folders, flags = words_and_flags(argv)
    allowed = take_permissions(flags)
    if flags or not folders:
        raise EvalError("the usage is python tools/damage.py out/RUN [out/RUN-seed1 ..] "
                        "[--trust_remote_code=True] [--data_dir=FOLDER].")
    check_same_experiment(folders)
    runs = [damaged(folder, **allowed) for folder in folders]
    first = read_run(folders[0])
    by, _ = score_by(first['info'])
    keys = [k for k in SHOWN if k in runs[0][WHOLE]]
    rows = []
    for name in runs[0]:
        lost = np.mean([run[name][by] - run[WHOLE][by] for run in runs])
        lost = lost if BETTER[by] == 'lower' else -lost
        means = [mean_std_n([run[name][k] for run in runs]) for k in keys]
        rows.append([name, *means, f"{lost:+.3f}"])
    print(markdown_table([f"{first['about']['name']}, test", *keys, f'{by} lost'], rows))


if __name__ == '__main__':
    print_any_text()
    try:
        main([a.rstrip('/') for a in sys.argv[1:]])
    except UserError as e:
        sys.exit(f"damage: {e}")
    except OSError as e:
        sys.exit(f"damage: {e.filename or 'a file'} cannot be read or written ({e.strerror}): free "
                 "disk space, or give another --data_dir.")
