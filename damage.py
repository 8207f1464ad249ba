"""
How gracefully a run falls when audio and video are missing or damaged at test time.

    python damage.py out/RUN [out/RUN-seed1 ..]

One table: audio, video, or both gone for 25 to 100 % of the test clips (the same clips for every run), drowned in noise of the
features' own size, or with their frames in random order. Nothing is trained; runs must differ in the seed alone. DeepMLF reads
each text once for all of this, as its text never sees audio or video; others read it once for each condition.
"""
import sys

import numpy as np
import torch

from data import STREAMS, CorpusError, epoch_order
from eval import EvalError, bring_back, markdown_table, mean_std_n, one_system, read_run, score_by, take_permissions, task_metrics
from lm import ModelError

SHARES = (0.25, 0.5, 0.75, 1.0)   # of clips that lose a modality


def conditions(std):
    """ Name -> a function of (batch, gone [B] in [0, 1), generator) that gives the damaged streams of a batch. std: stream -> what
    one standard deviation of its features is in a batch, a number or [d]. """
    streams = tuple(std)
    def drop(which, share):
        def damaged(batch, gone, rng):
            out = {}
            for m in which:
                keep = torch.from_numpy(gone >= share).to(batch[m].device)                       # [B]
                out |= {m: batch[m] * keep[:, None, None], m + '_len': batch[m + '_len'] * keep, m + '_mask': batch[m + '_mask'] & keep[:, None]}
            return out
        return damaged
    def noise(batch, gone, rng):
        draw = lambda m: torch.from_numpy((rng.standard_normal(tuple(batch[m].shape)) * std[m]).astype(np.float32)).to(batch[m].device)
        return {m: (batch[m] + draw(m)) * batch[m + '_mask'][..., None] for m in streams}
    def shuffled(batch, gone, rng):
        out = {}
        for m in streams:
            key = torch.from_numpy(rng.random(tuple(batch[m + '_mask'].shape))).to(batch[m].device)              # [B,S]
            order = key.masked_fill(~batch[m + '_mask'], torch.inf).argsort(1)                   # real frames first, padding behind
            out[m] = batch[m].gather(1, order[..., None].expand_as(batch[m]))                    # [B,S,d]
        return out
    groups = [[m] for m in streams] + ([list(streams)] if len(streams) > 1 else [])
    rows = {'as it is': lambda batch, gone, rng: {}}
    rows |= {f"no {' nor '.join(which)} for {share:.0%}": drop(which, share) for which in groups for share in SHARES}
    return rows | {"noise of the features' own std": noise, 'frames in random order': shuffled}


@torch.no_grad()
def damaged(folder, **allowed):
    """ A run on its test clips under every condition -> dict of name -> metrics. Raises EvalError and its kin. """
    run, feed = bring_back(folder, **allowed)
    streams = [m for m in STREAMS if m in run.corpus.widths and m in feed.streams]
    if not streams: raise EvalError(f"{folder} sees neither audio nor video: there is nothing to damage.")
    raw = [m for m in streams if not (feed.c['standardise'] or run.corpus.meta['streams'][m]['standardised'])]
    ways = conditions({m: np.array(run.corpus.meta['streams'][m]['std']) if m in raw else 1.0 for m in streams})
    n = feed.n_clips['test']
    gone, preds, label = np.random.default_rng(0).random(n), {k: np.zeros(n) for k in ways}, np.zeros(n)   # [N]
    for k, index in enumerate(epoch_order(feed.cost('test'), feed.c['batch_size'], 0, None)):
        batch, rng = feed('test', index), np.random.default_rng([1, k])
        variants = [way(batch, gone[index], rng) for way in ways.values()]
        for name, out in zip(ways, run.predict_each(batch, variants)): preds[name][index] = out['pred'].float().cpu().numpy()
        label[index] = batch['label'].cpu().numpy()
    try:
        return {name: task_metrics(p, label, feed.info) for name, p in preds.items()}
    except ValueError as e:
        raise EvalError(f"{folder}: {e}.") from None


def main(folders):
    """ The command line. Raises EvalError and its kin for a sentence. """
    if not folders or folders[0] in ('-h', '--help'): print(__doc__); return
    flags = dict(a[2:].partition('=')[::2] for a in folders if a.startswith('--'))
    folders = [f for f in folders if not f.startswith('--')]
    allowed = take_permissions(flags)
    if flags or not folders:
        raise EvalError("the flags of damage.py are --trust_remote_code=True and --data_dir=FOLDER, beside one or more runs.")
    one_system(folders)
    runs, (by, _) = [damaged(f, **allowed) for f in folders], score_by(read_run(folders[0])['info'])
    keys = [k for k in ('mae', 'corr', 'acc2_non0', 'acc7', 'acc', 'wf1') if k in runs[0]['as it is']]
    lost = lambda name: f"{np.mean([r[name][by] - r['as it is'][by] for r in runs]):+.3f}"
    rows = [[name] + [mean_std_n([r[name][k] for r in runs]) for k in keys] + [lost(name)] for name in runs[0]]
    print(markdown_table([f"{read_run(folders[0])['about']['name']}, test"] + keys + [f'{by} lost'], rows))


if __name__ == '__main__':
    try: main([a.rstrip('/') for a in sys.argv[1:]])
    except (EvalError, CorpusError, ModelError) as e: sys.exit(f"damage: {e}")
