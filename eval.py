"""
What a run is worth: every metric, one checkpoint or many runs, report and comparison.

    python eval.py out/deepmlf_toy                            the best checkpoint on its test set again, and the report
    python eval.py out/deepmlf_toy out/deepmlf_toy-seed1 ..   many runs: mean +- std (n), paired differences
    python eval.py out/RUN --corpus=OTHER [--modalities=text]  another corpus's test set, without training there
    python eval.py out/RUN --modalities=text,vision            its own test set, with these alone (the others arrive empty)
    python eval.py out/RUN --clip=mine.npz                     clips of one's own; --export=FOLDER is for giving a run away: clips.py
    .. --trust_remote_code=True     lets the authors of the run's LM run their own code here; a run's folder cannot allow it
    .. --data_dir=FOLDER            where files that are made on the way are kept ('data')

Metrics are fractions (0.8451, not 84.51) and nothing is rounded, so that means over seeds are right; nan means
undefined, never zero. The definitions are those of the code that the field's tables come from (MMSA 2.2.1,
utils/metricsTop.py), quirks included: others compare with nothing. All of it is NumPy.
"""
import json
import os
import re
import sys
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

import ranks
from configurator import check_knobs, knobs_of
from clips import ClipError, Clips, export, opinions, read_clips, seen_by
from data import Corpus, CorpusError, Feed, epoch_order, open_corpus
from files import make_folder, open_regular, save_picture, write_text
from knobs import wrong_knobs
from lm import ModelError, load_lm, tokenizer_fingerprint
from model import LanguageModel, build, devices, hold_memory, load_checkpoint, load_info, put


class EvalError(Exception):
    """ A sentence for the user: what was wrong, where, and what to do. """


METRIC_HELP = {
    'acc2_non0':  "higher is better: binary accuracy, > 0 against > 0, over the clips whose label is not 0",
    'f1_non0':    "higher is better: weighted F1 of the two classes of acc2_non0",
    'acc2_has0':  "higher is better: binary accuracy, >= 0 against >= 0 (SIMS: > 0 against > 0), all clips",
    'f1_has0':    "higher is better: weighted F1 of the two classes of acc2_has0",
    'acc2_weak':  "higher is better: acc2_has0 over the clips with |label| <= 0.4 of the largest label",
    'acc3':       "higher is better: accuracy of 3 classes, clip to [-1, 1] and round (SIMS: cuts at -.1 .1)",
    'acc5':       "higher is better: accuracy of 5 classes, clip to [-2, 2] and round (SIMS: -.7 -.1 .1 .7)",
    'acc7':       "higher is better: accuracy of 7 classes, clip to [-3, 3] and round (not for SIMS)",
    'mae':        "lower is better: mean |prediction - label|",
    'corr':       "higher is better: Pearson correlation of prediction and label",
    'r2':         "higher is better: 1 - sum (label - prediction)^2 / sum (label - mean label)^2",
    'qwk':        "higher is better: quadratic weighted kappa of the ordinal levels",
    'jump2':      "lower is better: share of clips that are two or more ordinal levels off",
    'jump_mean':  "lower is better: mean number of ordinal levels off",
    'qwk_3':      "higher is better: qwk of three levels, round(score) (SIMS only)",
    'jump2_3':    "lower is better: jump2 of three levels (SIMS only)",
    'jump_mean_3': "lower is better: jump_mean of three levels (SIMS only)",
    'loss':       "lower is better: the training loss, for a model that predicts no label",
    'acc':        "higher is better: share of clips with the right class",
    'wf1':        "higher is better: F1 of each class, averaged by the class's share of the labels",
    'f1_<class>': "higher is better: F1 of one class",
    'unread':     "lower is better: share of clips whose generated answer was no label; scored as the middle, or as wrong",
}
BETTER = {key: 'low' if text.startswith('lower') else 'high' for key, text in METRIC_HELP.items()}


# ---------------------------------------------------------------------------------------------------------
# classes

def confusion(pred, label, n):
    """ Counts [n, n], row = label, column = prediction. An answer that is no class (a generator may say 9)
    stands in no column, so its row falls short of the label's count: wrong, but nobody's false positive. """
    pred, label = np.asarray(pred, np.int64), np.asarray(label, np.int64)
    valid = (pred >= 0) & (pred < n)
    return np.bincount(label[valid] * n + pred[valid], minlength=n * n).reshape(n, n)

def class_f1(pred, label, n):
    """ (F1 of each class [n], weighted F1). F1 = 2 hits / (labels + predictions): 0 for a class never hit,
    nan for one that is in neither. Weights are the label counts, as in scikit-learn's average='weighted'. """
    counts, support = confusion(pred, label, n), np.bincount(label, minlength=n)
    total = support + counts.sum(0)
    f1 = np.where(total > 0, 2 * counts.diagonal() / np.maximum(total, 1), np.nan)
    return f1, (np.nan_to_num(f1) * support).sum() / support.sum() if support.sum() else np.nan

def class_metrics(pred, label, names):
    """
    acc, wf1 and f1_<class> of class numbers pred and label, both [N], for classes names[0], names[1] ...

    >>> class_metrics([0, 0, 1, 9], [0, 1, 1, 1], ['no', 'yes', 'joy'])

    2 of 4 are right: acc 0.5. 'no': one hit, one label, two predictions, F1 = 2/(1+2) = 2/3. 'yes': one hit,
    three labels, one prediction, F1 = 2/(3+1) = 1/2. wf1 = (1 * 2/3 + 3 * 1/2) / 4 = 13/24. 'joy': nan.
    """
    pred, label = _pair(pred, label)
    for what, x in (('predictions', pred), ('labels', label)):
        if (x != np.round(x)).any():
            raise ValueError(f"{what} of classes must be whole numbers, got {x[x != np.round(x)][0]:g}; "
                             f"decode the answer to a class first")
    # clipped, as an answer of 1e20 has no int64; both ends of the clip are no class
    pred, label = np.clip(pred, -1, len(names)).astype(np.int64), label.astype(np.int64)
    if label.min() < 0 or label.max() >= len(names):
        raise ValueError(f"labels run from {label.min()} to {label.max()}, but the {len(names)} classes are "
                         f"{', '.join(names)}; check the corpus's class names")
    f1, wf1 = class_f1(pred, label, len(names))
    return {'acc': _mean(pred == label), 'wf1': float(wf1)} | {f'f1_{k}': float(v) for k, v in zip(names, f1)}


# ---------------------------------------------------------------------------------------------------------
# regression

def _pair(pred, label):
    """ Both flat, or a ValueError. float32 like the references: there a label of .7 is right on a border. """
    with np.errstate(over='ignore'):   # 1e39 becomes inf here, and is counted below
        pred, label = np.asarray(pred, np.float32).ravel(), np.asarray(label, np.float32).ravel()
    if len(pred) != len(label):
        raise ValueError(f"{len(pred)} predictions for {len(label)} labels; match them")
    if not len(label): raise ValueError("nothing to score, the split is empty; check the corpus folder")
    for what, x in (('predictions', pred), ('labels', label)):
        bad = np.count_nonzero(~np.isfinite(x))
        if bad: raise ValueError(f"{bad} of {len(x)} {what} are nan or inf; find out why first")
    return pred, label

def _mean(x):
    return float(np.mean(x, dtype=np.float64)) if len(x) else float('nan')

def _corr(p, y):
    """ Pearson's r; nan if either is constant, which a variance cannot tell: the mean of 0.1s is not 0.1. """
    if np.ptp(p) == 0 or np.ptp(y) == 0: return float('nan')
    return float(np.corrcoef(p.astype(np.float64), y.astype(np.float64))[0, 1])

def _qwk(a, b, n):
    """ Cohen's kappa with weights (i - j)^2 of levels 0 .. n-1: 1 - observed / chance disagreement. Where all
    of both is one level that is 1 - 0/0, and nan here: agreement on a constant shows nothing. """
    counts = confusion(a, b, n)
    weight = (np.arange(n)[:, None] - np.arange(n)) ** 2
    chance = (weight * np.outer(counts.sum(1), counts.sum(0))).sum() / counts.sum()
    return float(1 - (weight * counts).sum() / chance) if chance else float('nan')

def regression_metrics(pred, label, label_range):
    """
    All metrics of scores pred against label, both [N], as a dict in the order of METRIC_HELP.

    label_range [-3, 3] (MOSI, MOSEI), MMSA's rules. MAE, Corr and R2 see the predictions as they are. AccK
    with K = 2k+1: clip both to [-k, k], round, share of equal ones. Has0: all clips, >= 0 against >= 0, and
    -0.0 is >= 0. Non0: clips with label != 0, > 0 against > 0, so that an exact 0 is a negative prediction.
    Levels for QWK and the jumps: the seven classes of Acc7.

    label_range [-1, 1] (CH-SIMS, v2). Both are clipped to [-1, 1] before *everything*, MAE and Corr
    included. Has0 is MMSA's Mult_acc_2, all clips, > 0 against > 0: here 0 is negative. Non0 as above:
    CrossSent's printed SIMS numbers are that, and compare with no other paper's. Acc3 has borders at +-.1,
    Acc5 also at +-.7, and a border belongs to the class below it. Levels: round(2 x), CrossSent's -2 .. 2,
    which are *not* the classes of Acc5 (.2 is level 0, and weakly positive there); its second reading, round(x), -1 .. 1,
    has names that end in _3. No Acc7.

    Any other [lo, hi]: the rules of [-3, 3], levels round(clip(x, lo, hi)), and those AccK whose [-k, k] lies
    inside. That is ours. So is acc2_weak beyond SIMS v2, where it is |label| <= .4: Has0 over the clips with
    |label| <= .4 max(|lo|, |hi|), which is 1.2 for [-3, 3].

    Rounding is half to even everywhere (0.5 -> 0, 1.5 -> 2); F1 is weighted by label counts. An example:

    >>> regression_metrics(pred=[0.5, -0.2, 1.5, -4.0], label=[1.0, 0.0, 2.0, -3.0], label_range=[-3, 3])

    MAE = (.5 + .2 + .5 + 1) / 4 = .55, on the unclipped -4. Levels 0 0 2 -3 against 1 0 2 -3: Acc7 .75,
    jump_mean .25, jump2 0. Has0: only -.2 against 0 is wrong, .75. Non0 drops that clip, 1.
    R2 = 1 - (.25 + .04 + .25 + 1) / (1 + 0 + 4 + 9) = .89.
    """
    p, y = _pair(pred, label)
    lo, hi = label_range
    sims = (lo, hi) == (-1, 1)
    if sims: p, y = np.clip(p, -1, 1), np.clip(y, -1, 1)
    m = {}

    def binary(suffix, keep, pos):
        a, b = pos(p[keep]).astype(np.int64), pos(y[keep]).astype(np.int64)
        return {f'acc2_{suffix}': _mean(a == b), f'f1_{suffix}': float(class_f1(a, b, 2)[1])}

    positive = (lambda x: x > 0) if sims else (lambda x: x >= 0)
    weak = np.abs(y) <= np.float32(0.4 * max(abs(lo), abs(hi)))
    m |= binary('non0', y != 0, lambda x: x > 0) | binary('has0', slice(None), positive)
    m['acc2_weak'] = _mean(positive(p[weak]) == positive(y[weak]))

    levels = {'': 1}   # suffix of the ordinal metrics -> levels a unit of the score
    if sims:   # searchsorted counts the borders below a score, in float32 so that .7 is on the border
        for n, cuts in {3: [-.1, .1], 5: [-.7, -.1, .1, .7]}.items():
            a, b = (np.searchsorted(np.float32(cuts), x) for x in (p, y))
            m[f'acc{n}'] = _mean(a == b)
        levels = {'': 2, '_3': 1}
    else:
        for k in (1, 2, 3):
            if lo <= -k and k <= hi:
                m[f'acc{2 * k + 1}'] = _mean(np.round(np.clip(p, -k, k)) == np.round(np.clip(y, -k, k)))

    error = p.astype(np.float64) - y
    spread = np.sum((y - np.mean(y, dtype=np.float64)) ** 2) if np.ptp(y) > 0 else np.nan
    m |= {'mae': _mean(np.abs(error)), 'corr': _corr(p, y), 'r2': float(1 - np.sum(error ** 2) / spread)}

    for which, scale in levels.items():
        first, last = round(scale * lo), round(scale * hi)
        a, b = (np.round(scale * np.clip(x, lo, hi)).astype(np.int64) - first for x in (p, y))
        m |= {'qwk' + which: _qwk(a, b, last - first + 1), 'jump2' + which: _mean(abs(a - b) >= 2), 'jump_mean' + which: _mean(abs(a - b))}
    return m


# ---------------------------------------------------------------------------------------------------------
# several runs

def paired_bootstrap(metric_fn, preds_a, preds_b, label, n_resamples=2000, seed=0):
    """
    (difference, low, high): by how much system A's metric exceeds B's, with its 95 % percentile interval.

    preds_* are [runs, N], one row a seed; metric_fn(pred [N], label [N]) -> a number. The statistic is the
    mean of the metric over A's runs minus that over B's. Each resample draws N clips with replacement, the
    same for both systems (they are paired: a hard clip is hard for both), and then runs with replacement
    within each, so that the interval answers for another test set *and* other seeds. The hazard: a single
    run counts as the only one there could be, and with two or three the seeds' share of the variance comes
    out too small by (runs - 1) / runs. An interval that barely excludes 0 has then not excluded it.
    nan if the metric is undefined on any resample.
    """
    label, rng = np.asarray(label), np.random.default_rng(seed)
    preds = [np.atleast_2d(np.asarray(x)) for x in (preds_a, preds_b)]
    for name, x in zip('AB', preds):
        if x.shape[1:] != label.shape or not len(label) or not len(x):
            raise ValueError(f"system {name} has predictions {list(x.shape)} for {list(label.shape)} labels; "
                             f"pass [runs, clips] with the clips of both systems in the labels' order")

    def scores(clips):   # one per run, for both systems
        y = label[clips]
        return [np.array([metric_fn(run, y) for run in x[:, clips]], np.float64) for x in preds]

    a, b = scores(slice(None))
    resampled = np.empty(n_resamples)
    for i in range(n_resamples):
        s, t = scores(rng.integers(len(label), size=len(label)))
        resampled[i] = rng.choice(s, len(s)).mean() - rng.choice(t, len(t)).mean()
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(a.mean() - b.mean()), float(low), float(high)

def score_by(info):
    """ What systems are compared by: ('mae' or 'wf1', a function of predictions [N] and labels [N]). """
    if info['kind'] != 'classes':
        low, high = info['range'] if info['range'] == [-1, 1] else (-np.inf, np.inf)   # SIMS: as regression_metrics has it
        return 'mae', lambda pred, y: np.abs(np.clip(pred, low, high) - y).mean()
    return 'wf1', lambda pred, y: class_f1(pred, y.astype(int), len(info['names']))[1]

def claim(metric, first, other, label, by, **how):
    """
    What may be said of a system against a first one: dict(difference, low, high, text, verdict). Predictions are [runs,N]. The
    verdict is 'better' or 'worse' where both have at least 3 runs and the 95 % interval of the paired difference excludes 0; it
    is 'open' otherwise, and that is no proof of equality. What was chosen must have been chosen on validation.
    """
    difference, low, high = paired_bootstrap(metric, other, first, label, **how)
    sure = min(len(first), len(other)) >= 3 and (low > 0 or high < 0)
    verdict = 'open' if not sure else 'better' if (difference > 0) == (BETTER[by] == 'high') else 'worse'
    return dict(difference=difference, low=low, high=high, verdict=verdict, text=f'{difference:+.4f} [{low:+.4f}, {high:+.4f}]')

def mean_std_n(values, digits=3):
    """ '0.512 ± 0.004 (n=3)', the sample standard deviation (n - 1); '0.512 (n=1)', as one run has none. """
    values = np.asarray(values, np.float64).ravel()
    if not len(values): return 'not run'
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ''
    return f"{values.mean():.{digits}f}{spread} (n={len(values)})"

def markdown_table(header, rows):
    """ A Markdown table that also reads well as plain text; a | in a cell is escaped. """
    cells = [[str(c).replace('|', '\\|') for c in row] for row in [header, *rows]]
    width = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, width)) + ' |' for row in cells]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (w + 2) for w in width) + '|', *lines[1:]])


# ---------------------------------------------------------------------------------------------------------
# One model on one split

@torch.no_grad()
def evaluate(model, feed, split, autocast=nullcontext, **how):
    """
    A model on a whole split: (metrics, predictions in the split's order). Used by train.py and by the command line.

    Nothing is averaged over batches: predictions are collected and each metric is computed once, in float32 on all
    clips. A model that only has a loss (system='lm') gives {'loss': mean over clips} and no predictions. `how` goes to
    model.predict.
    """
    was_training = model.training
    model.eval()
    got, n, mine = {}, feed.n_clips[split], []
    batches = epoch_order(feed.cost(split), feed.c['batch_size'], seed=0, epoch=None)
    for first in range(0, len(batches), ranks.N_RANKS):   # torchrun: each process takes every n-th; what comes twice overwrites itself
        index = batches[min(first + ranks.RANK, len(batches) - 1)]
        batch = feed(split, index)
        with autocast():
            if not hasattr(model, 'predict'): out = dict(loss=model(batch)['loss'].expand(len(index)))
            else: out = model.predict(batch, **how) | dict(label=batch['label'])
        mine.append((index, {k: v.float().cpu().numpy() for k, v in out.items()}))                       # [B] or [B,K]
    for index, out in (pair for theirs in ranks.gathered(mine) for pair in theirs):
        for k, v in out.items(): got.setdefault(k, np.zeros((n, *v.shape[1:]), np.float32))[index] = v
    model.train(was_training)
    check_finite(got, feed.corpus.id(split))
    if 'loss' in got: return dict(loss=float(got['loss'].mean(dtype=np.float64))), {}
    metrics = task_metrics(got['pred'], got['label'], feed.info)
    if 'unread' in got: metrics['unread'] = _mean(got['unread'])
    return metrics, got


def check_finite(predictions, ids):
    """ predictions: name -> array [N,..], ids: N names of clips. Raises ValueError, with the first clip, for NaN or inf. """
    for name, values in predictions.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))               # clips
        if len(bad):
            raise ValueError(f"{name} of clip {ids[bad[0]]} is NaN or inf ({len(bad)} of {len(values)} clips); look for "
                             "frames far outside the training data, or for a checkpoint that diverged")


def task_metrics(pred, label, info):
    """ The metrics of a label that meta.json describes as `info`: a score with a range, or classes with names. """
    if info['kind'] == 'classes': return class_metrics(pred, label, info['names'])
    return regression_metrics(pred, label, info['range'])


def constant(corpus, label='label', train_clips=slice(None)):
    """ The test metrics of the best constant: the train median (under L1), or the largest class. What "no model" scores. """
    train, y, info = corpus.label('train', label)[train_clips], corpus.label('test', label), corpus.labels[label]
    best = np.bincount(train).argmax() if info['kind'] == 'classes' else np.median(train)
    return task_metrics(np.full(len(y), best), y, info)


@torch.no_grad()
def continuation(model, tokenizer, texts=('The film was', 'I said that'), n_new=16):
    """ How a model's frozen LM goes on with some texts when no adapter is in the way, greedily; None where it has no LM.
    train.py asks before and after, and the report says whether the LM still speaks as it did. """
    if not hasattr(model, 'lm') or not tokenizer: return None
    said, device = [], model.lm.parts['embed'].weight.device
    for ids in tokenizer(list(texts), add_special_tokens=True)['input_ids']:
        ids = torch.tensor((list(ids) or [0]) * (2 if len(ids) < 2 else 1), device=device)       # [T], at least 2
        new = model.lm.go_on(model.lm.embed(ids[None, :-1]), torch.tensor([len(ids) - 1], device=device), ids[-1:], n_new)
        said.append(tokenizer.decode(ids.tolist() + new[0].clamp(min=0).tolist()))
    return said


# ---------------------------------------------------------------------------------------------------------
# A run's folder: report and pictures

# Knobs of the run, not of the experiment: a run may go on, and may be read, with other values of these.
RUN_KNOBS = frozenset(('needs out_dir data_dir device dtype resume fresh log_interval save_interval patience shard_lm '
                       'deterministic').split())


def read_run(folder):
    """
    result.json of a finished run. What makes the model (knobs, corpus, LM) is what the checkpoint's header says; where
    result.json says otherwise, it was edited or belongs to another checkpoint. Raises EvalError, ModelError.
    """
    result = read_json(folder, 'result.json')
    try:
        # a knob that is younger than the run has its default, which is what the run did
        defaults = knobs_of(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'))
        said = result['about']
        said['knobs'] = defaults | said['knobs']
        checkpoint = os.path.join(folder, 'best.safetensors')
        if os.path.lexists(checkpoint):
            about = load_info(checkpoint)['about']
            about['knobs'] = defaults | about['knobs']
            refuse_edits(folder, said, about, result['info'])
            asked = said['knobs']['trust_remote_code'] or about['knobs']['trust_remote_code']
            folder_of_corpus = said['corpus']['folder']   # a place, which is another where a run went on elsewhere
            result['about'] = said | {k: about[k] for k in ('name', 'knobs', 'corpus', 'device', 'dtype')}
            result['about']['corpus'] |= dict(folder=folder_of_corpus)
            result['about']['knobs']['trust_remote_code'] = asked
            check_facts(result['about'])
            check_scores(result)
        check_knobs(result['about']['knobs'], defaults, f"in {folder}")
        wrong = wrong_knobs(result['about']['knobs'], metrics=tuple(BETTER))
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise EvalError(f"{folder}/result.json is damaged or of another version ({type(e).__name__}: {e}): python train.py "
                        "with --resume=True writes it anew.") from None
    if wrong:
        raise EvalError(f"the knobs of {folder} are not those of a run: {'; '.join(wrong)}.")
    return result


def check_facts(about):
    """ Raises ValueError where what a run says of itself and its corpus (clips.facts_of) is of another kind. """
    facts = about['corpus']
    kinds = [(about, str, 'name device dtype'), (facts, str, 'folder sha256 name'), (facts, dict, 'widths labels clips')]
    for holder, kind, keys in kinds:
        for key in keys.split():
            if type(holder[key]) is not kind:
                raise ValueError(f"its {key} is {short(holder[key])}")
    for m, stream in facts.get('streams', {}).items():   # a run of an early version has none
        n = facts['widths'].get(m)
        numbers = [v for k in ('mean', 'std') for v in stream[k]]
        if len(stream['mean']) != n or len(stream['std']) != n or any(type(v) not in (int, float) for v in numbers):
            raise ValueError(f"its mean and std of {m} are not {short(n)} numbers each")
    if 'streams' in facts and set(facts['streams']) != set(facts['widths']):
        raise ValueError("its widths and its streams are not of the same names")


def check_scores(result):
    """ Raises ValueError where what result.json says of training and of scores is of another kind than train.py writes. """
    number, ceilings = (int, float), result['ceilings'] or {}
    kinds = [(result, dict, ('state', 'clips', 'test', 'valid', 'info')),
             (result, number, ('seconds', 'n_trainable', 'n_frozen')),
             (result['state'], number, ('best', 'best_step', 'step')),
             (result['clips'], int, ('train', 'valid', 'test'))]
    scores = [result['test'], result['valid'], result['majority'] or {}, result.get('lm_alone') or {}]
    if ceilings:
        kinds += [(result, dict, ['ceilings']), (ceilings, dict, ('late', 'full'))]
        scores += list(ceilings.values())
    kinds += [(metrics, number, list(metrics)) for metrics in scores]
    for holder, kind, keys in kinds:
        for key in keys:
            if not isinstance(holder[key], kind):
                raise ValueError(f"its {key} is {short(holder[key])}")
    if set(result['test']) != set(result['valid']) or not result['test']:
        raise ValueError("its test and valid are not of the same metrics")


def refuse_edits(folder, said, about, info):
    """ Raises EvalError where result.json (`said`, `info`) and the checkpoint's header (`about`) describe two models. """
    # trust_remote_code is a permission, which revive asks the command line for: it says nothing of the model
    free = (*RUN_KNOBS, 'trust_remote_code')
    pairs = [(k, said['knobs'].get(k), v) for k, v in about['knobs'].items() if k not in free]
    pairs += [(k, v, None) for k, v in said['knobs'].items() if k not in about['knobs']]
    pairs += [(f'corpus {k}', said['corpus'].get(k), v) for k, v in about['corpus'].items() if k != 'folder']
    pairs += [(k, said.get(k), about.get(k)) for k in ('lm_fingerprint', 'tokenizer_fingerprint')]
    # a run may have gone on with another --dtype or on another device, after its best step
    if (said['knobs']['dtype'], said.get('device')) == (about['knobs']['dtype'], about.get('device')):
        pairs += [('dtype', said.get('dtype'), about.get('dtype'))]
    pairs += [('info', info, about['corpus']['labels'][about['knobs']['label']])]
    for what, here, there in pairs:
        if json.dumps(here, sort_keys=True) != json.dumps(there, sort_keys=True):
            raise EvalError(f"{folder}/result.json has {what}={short(here)} and its checkpoint was trained with {short(there)}: put "
                            "the old result.json back, or train again with another value.")


def short(value, n=60):
    """ A value as text of at most n characters. """
    text = repr(value)
    return text if len(text) <= n else text[:n] + '..'


def read_json(folder, file):
    """ A JSON file of a run's folder. Raises EvalError. """
    path = os.path.join(folder, file)
    if not os.path.lexists(path):
        raise EvalError(f"{folder} holds no finished run (no {file}): train it to the end, with --resume=True if it "
                        "was cut off.")
    try:
        with open_regular(path) as f:
            return json.load(f)
    except OSError as e:
        raise EvalError(f"{path} cannot be read: it {e.strerror}.") from None
    except (ValueError, RecursionError) as e:
        raise EvalError(f"{path} is damaged ({e}): train that run to the end again, with --resume=True.") from None


def write_predictions(folder, corpus, predictions):
    """ folder/test.jsonl: a line a clip, its id, label and every prediction that the model made of it. """
    rounded = lambda v: [round(float(p), 6) for p in v] if v.ndim else round(float(v), 6)
    rows = [dict(id=clip) | {k: rounded(v[n]) for k, v in predictions.items()} for n, clip in enumerate(corpus.id('test'))]
    write_text(os.path.join(folder, 'test.jsonl'), ''.join(json.dumps(row) + '\n' for row in rows))


def read_predictions(folder):
    """ test.jsonl of a finished run -> (list of ids, dict of arrays [N], or [N,K] for prob). Raises EvalError. """
    path, again = f"{folder}/test.jsonl", f"python eval.py {folder} writes it anew"
    try:
        with open_regular(path) as f:
            rows = [json.loads(line) for line in f]
        ids = [r['id'] for r in rows]
        predictions = {k: np.array([r[k] for r in rows], np.float32) for k in rows[0] if k != 'id'}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        reason = getattr(e, 'strerror', None) or f'{type(e).__name__}: {e}'
        raise EvalError(f"{path} is missing or damaged ({reason}): {again}.") from None
    try:
        check_finite(predictions, ids)
    except ValueError as e:
        raise EvalError(f"{path}: {e}.") from None
    return ids, predictions


def av_run(about):
    """ result.json of the run that pretrained a DeepMLF run's AV encoder; None where it is not there, or not that run. """
    c = about['knobs']
    if c['system'] != 'deepmlf' or c['av_init'] == 'random':
        return None
    try:
        r = read_run(c['av_from'])
    except (EvalError, ModelError):
        return None
    same = r['about']['knobs']['system'] == 'av' and r['about']['corpus']['sha256'] == about['corpus']['sha256']
    return r if same else None


def summary(folder, r):
    """
    The rows of the report's table: majority, text only, audio+video only, the best additive late fusion where the corpus
    knows it, and the system itself. Text only is the text head y_t, which never saw audio or video, or what the frozen LM
    answers without pseudo tokens; audio+video only is the AV encoder's own run, or the head y_av where there was none.
    """
    c, name, classes = r['about']['knobs'], r['about']['name'], r['info']['kind'] == 'classes'
    ceilings = r['ceilings'] or {} if len(c['modalities']) == 2 else {}     # they are for readers of everything
    own = [('majority', r['majority'], 'majority')]
    if c['system'] != 'av':
        _, p = read_predictions(folder)
        head = lambda k: regression_metrics(p[k], p['label'], r['info']['range'])
        if r.get('lm_alone'): own.append(('the LM alone (text)', r['lm_alone'], 'text'))
        if c['system'] == 'deepmlf' and 'text' in p and c['mm_query'] == 'fusion': own.append(('text only (y_t)', head('text'), 'text'))
        alone = av_run(r['about'])
        if alone:
            own.append(('audio+video only', alone['test'], 'av'))
        elif 'av' in p: own.append(('audio+video only (y_av)', head('av'), 'av'))
        if ceilings: own.append(('best late fusion', {}, 'late'))
    own.append((name, r['test'], 'av' if c['system'] == 'av' else 'full'))
    best = 'acc' if classes else 'mae'                                      # what the ceilings are about
    keys = [k for k in ('mae', 'corr', 'acc2_non0', 'f1_non0', 'acc2_has0', 'acc7', 'acc5', 'acc3') if k in r['test']]
    if classes: keys = list(r['test'])
    cell = lambda metrics, k: f'{metrics[k]:.3f}' if k in metrics else '-'
    rows = [[row] + [cell(metrics, k) for k in keys] + [cell(ceilings.get(ceiling, {}), best)] * bool(ceilings)
            for row, metrics, ceiling in own]
    table = markdown_table(['test'] + keys + [f'{best} of a perfect reader'] * bool(ceilings), rows)
    if ceilings and c['system'] != 'av':
        late, full = ceilings['late'][best], ceilings['full'][best]
        closed = (late - r['test'][best]) / (late - full)
        table += f"\n\n{name} " + (f"closes {100 * closed:.0f} % of the gap from the best late fusion to the best there is." if closed > 0 else
                                  f"is no better than the best late fusion ({best} {late:.3f}): this alone is no sign that it fuses.")
    if r.get('lm_kept') is not None:
        table += ("\n\nWithout the adapter the LM goes on with two texts as it did before training, token for token."
                  if r['lm_kept'] else "\n\n**Without the adapter the LM no longer goes on as it did before training.**")
    return table


def report(folder):
    """ Writes folder/report.md from the files of a finished run, and returns its table. Raises EvalError. """
    r = read_run(folder)
    about, state, clips = r['about'], r['state'], r['clips']
    c, name = about['knobs'], about['name']
    took = (f"trained in {r['seconds'] / 60:.1f} min on {about['device']} ({about['threads']} threads, "
            f"{about['matmul_gflops']} GFLOP/s float32 matmul)")
    table = f"{name}: test loss {r['test']['loss']:.4f}" if c['system'] == 'lm' else summary(folder, r)
    each = [[k, f"{v:.4f}", f"{r['valid'][k]:.4f}", METRIC_HELP.get(k, METRIC_HELP['f1_<class>'])] for k, v in r['test'].items()]
    pictures = '![learning curve](curve.png)'
    if r['info']['kind'] == 'classes' and c['system'] != 'lm':
        _, p = read_predictions(folder)
        confusion_picture(os.path.join(folder, 'confusion.png'), p['pred'], p['label'], r['info']['names'])
        pictures += '\n\n![confusion matrix](confusion.png)'
        if not ''.join(r['info']['names']).isascii():
            pictures += '\n\nThe classes: ' + ', '.join(f'{i} {k}' for i, k in enumerate(r['info']['names'])) + '.'
    write_text(os.path.join(folder, 'report.md'), f"""# {name}

`{about['command']}`, commit {about['commit'] or 'none'}{' with uncommitted changes' if about['dirty'] else ''}.
{clips['train']} / {clips['valid']} / {clips['test']} clips of {os.path.basename(about['corpus']['folder'])}; {r['n_trainable']:,} trainable
and {r['n_frozen']:,} frozen weights; {took}. The best checkpoint by validation {c['select']} ({state['best']:.4f}) is
of step {state['best_step']} of {state['step']}; the test set had no part in choosing it.

{table}

{markdown_table(['metric', 'test', 'valid', 'what it is'], each)}

{pictures}
""")
    return f"{table}\n\n{name}: {took}; {folder}/report.md"


def read_log(folder):
    """ A run's log.jsonl -> list of dicts, in the order of training. Raises EvalError. """
    path = os.path.join(folder, 'log.jsonl')
    try:
        with open_regular(path) as f:
            return [json.loads(line) for line in f]
    except (OSError, ValueError) as e:
        raise EvalError(f"{path} is missing or damaged ({getattr(e, 'strerror', None) or e}).") from None


def curve_picture(folder, select='mae'):
    """ folder/curve.png from folder/log.jsonl: training loss terms, and the validation metric that selects. """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    log = read_log(folder)
    train, valid = [e for e in log if 'train' in e], [e for e in log if 'valid' in e]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
    for k in sorted({k for e in train for k in e['train']}):
        left.plot([e['epoch'] for e in train], [e['train'].get(k, np.nan) for e in train], label=k, lw=1.2)
    left.set(xlabel='epoch', ylabel='training loss and its terms'); left.legend(fontsize=8)
    right.plot([e['epoch'] for e in valid], [e['valid'][select] for e in valid], 'o-', ms=3, lw=1.2)
    best = [e for e in valid if e['best']]
    if best:
        right.plot(best[-1]['epoch'], best[-1]['valid'][select], 'o', ms=8, mfc='none', color='C3', label='best')
        right.legend(fontsize=8)
    right.set(xlabel='epoch', ylabel=f'validation {select}')
    save_picture(fig, os.path.join(folder, 'curve.png'), dpi=120)
    plt.close(fig)


def confusion_picture(path, pred, label, names):
    """ A picture at `path`: counts of true class against predicted class, numbers [N] into `names`, coloured by row share. """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    counts = confusion(pred, label, len(names))                                                  # [K,K]
    share = counts / np.maximum(np.bincount(np.asarray(label, int), minlength=len(names)), 1)[:, None]
    fig, ax = plt.subplots(figsize=(1.6 + 0.6 * len(names), 1.2 + 0.5 * len(names)), layout='constrained')
    picture = ax.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for i, j in np.ndindex(counts.shape):
        ax.text(j, i, counts[i, j], ha='center', va='center', fontsize=8, color='white' if share[i, j] > 0.6 else 'black')
    # a class whose letters this font lacks (Chinese) would be a row of boxes: its number instead
    named = [k if k.isascii() else str(i) for i, k in enumerate(names)]
    ax.set_xticks(range(len(names)), named, rotation=45, ha='right', fontsize=8)
    ax.set_yticks(range(len(names)), named, fontsize=8)
    ax.set(xlabel='predicted class', ylabel='true class')
    fig.colorbar(picture, label='share of the true class')
    save_picture(fig, path, dpi=120)
    plt.close(fig)


def revive(folder, without_corpus=False, trust_remote_code=False, data_dir='data'):
    """
    The best model of a run from its files, with corpus, model (in eval mode), predict(batch), feed(corpus, knobs) -> its Feed,
    and test(corpus, knobs) -> what evaluate gives on the test split of a corpus. without_corpus: from the run's folder alone,
    for clips of one's own; an LM that was exported along is in the folder's lm/.

    The folder may come from a stranger. It may name an LM and a corpus folder; these are read as data, printed, and must have the
    fingerprint and the SHA-256 that the checkpoint has. It cannot make code run and cannot choose where files are written: that is
    for the caller's trust_remote_code and data_dir. Raises EvalError, ModelError, CorpusError.
    """
    result = read_run(folder)
    about = result['about']
    facts = about['corpus']
    if about['knobs']['trust_remote_code'] and not trust_remote_code:
        raise EvalError(f"{folder} asks to run the code that the authors of the LM {about['knobs']['lm']!r} put beside it: add "
                        "--trust_remote_code=True to this command if you trust them.")
    c = about['knobs'] | dict(trust_remote_code=trust_remote_code, data_dir=data_dir, out_dir=folder, needs=[])
    about['knobs'] = c
    if without_corpus and 'streams' not in facts:
        raise EvalError(f"{folder} is older than what --clip and --export need to know of its corpus: train it again.")
    if about['dtype'] not in ('float32', 'bfloat16', 'float16') or about['device'] not in devices():
        raise EvalError(f"{folder} names the dtype {about['dtype']!r} and the device {about['device']!r}, which are not known.")
    dtype = getattr(torch, about['dtype'])
    try:
        corpus = Clips(facts) if without_corpus else named_corpus(folder, facts)
        model, tokenizer = revived_model(folder, c, corpus, dtype)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
        raise EvalError(f"{folder} is damaged or not a run of this version: its knobs make no model ({type(e).__name__}: "
                        f"{str(e)[:160]}).") from e
    check_fingerprints(folder, c, about, model, tokenizer)
    put(model, load_checkpoint(os.path.join(folder, 'best.safetensors'))[0], folder)
    device = about['device'] if devices()[about['device']] else 'cpu'
    autocast = lambda: torch.autocast(device, dtype, enabled=dtype is not torch.float32)
    model.to(device)
    if device == 'cpu': hold_memory()

    def feed(corpus, c):
        fed = Feed(corpus, c, tokenizer, device, getattr(model, 'prompt', None), as_data=not trust_remote_code)
        if fed.lm_fingerprint and fed.lm_fingerprint != about['lm_fingerprint']:
            raise EvalError(other_lm(folder, c))
        return fed

    def test(corpus, c):
        try:
            return evaluate(model, feed(corpus, c), 'test', autocast)
        except ValueError as e:
            raise EvalError(f"{folder}: {e}.") from None

    @torch.no_grad()
    def predict(batch):
        with autocast():
            return model.predict(batch)

    @torch.no_grad()
    def predict_each(batch, variants):   # the same texts with other audio and video: dicts of what differs in the batch
        if not hasattr(model, 'predict_each'):
            return [predict(batch | v) for v in variants]
        with autocast():
            return model.predict_each(batch, variants)

    return SimpleNamespace(corpus=corpus, model=model.eval(), feed=feed, test=test, predict=predict, predict_each=predict_each, result=result,
                           knobs=c, info=result['info'], facts=facts, values=getattr(getattr(model, 'prompt', None), 'values', None))


def named_corpus(folder, facts):
    """ The corpus folder that a run names, if it is there and made from the same source. Raises EvalError, CorpusError. """
    if not os.path.isfile(os.path.join(facts['folder'], 'meta.json')):
        raise EvalError(f"the corpus folder {facts['folder']} that {folder} was trained on is not here: convert its source to that "
                        "place again, or evaluate another corpus with --corpus= or clips with --clip=.")
    corpus = Corpus(facts['folder'])
    if corpus.sha256 != facts['sha256']:
        raise EvalError(f"{corpus.folder} was made from another source file than the one that {folder} was trained on.")
    print(f"  {folder} names the corpus folder {corpus.folder}: read as data")
    return corpus


def revived_model(folder, c, corpus, dtype):
    """ The model of a run and its tokenizer, with the weights of its LM and none from its checkpoint yet. """
    as_data = not c['trust_remote_code']
    for own in ('lm', 'hf'):
        if os.path.islink(os.path.join(folder, own)):
            raise EvalError(f"{folder}/{own} is a link, and a run's own LM is read from its folder alone: put the LM itself there.")
    torch.manual_seed(c['seed'])   # a random LM (lm_init) is in no checkpoint: it is drawn again as it was
    if c['system'] == 'lm':
        lm, tokenizer = load_lm(folder, dtype, as_data=as_data)
        return LanguageModel(lm.hf), tokenizer
    if c['lm'] == 'lm' and os.path.isdir(os.path.join(folder, 'lm')):
        c['lm'] = os.path.join(folder, 'lm')   # an export has its LM beside its checkpoint
    elif c['lm'] != 'new' and 'text' in seen_by(c):
        print(f"  {folder} names the LM {c['lm']}: read as data")
    # the checkpoint has the weights of an encoder made from nothing, the folder its tokenizer
    return build(c | dict(av_init='random', resume=True), corpus, folder, dtype, as_data)


def check_fingerprints(folder, c, about, model, tokenizer):
    """ Raises EvalError where the LM or its tokenizer is not the one that the run was trained with. """
    if hasattr(model, 'lm') and model.lm.fingerprint() != about['lm_fingerprint']:
        raise EvalError(other_lm(folder, c))
    theirs = about.get('tokenizer_fingerprint')
    if theirs and tokenizer and tokenizer_fingerprint(tokenizer) != theirs:
        raise EvalError(f"the tokenizer of the LM {c['lm']} is not the one that {folder} was trained with: put that one back.")


def other_lm(folder, c):
    """ The sentence for an LM of another fingerprint. """
    return f"the LM {c['lm']} is not the one that {folder} was trained with: put that one back."


def bring_back(folder, **allowed):
    """ The best model of a run, as revive has it, and its Feed. Raises EvalError and its kin. """
    run = revive(folder, **allowed)
    return run, run.feed(run.corpus, run.knobs)


def own_clips(folder, path, **allowed):
    """ What a run says of clips of one's own (clips.py), and a picture of where it looks. Raises EvalError and its kin. """
    import figures   # which reads runs, so it cannot come first
    run = revive(folder, without_corpus=True, **allowed)
    if run.knobs['system'] == 'lm': raise EvalError(f"{folder} is a language model: it says no score of a clip.")
    rows, mended = read_clips(path, run.facts, seen_by(run.knobs))
    with tempfile.TemporaryDirectory() as scratch:   # for hidden states of these texts
        run.knobs |= dict(train_fraction=1.0, shuffle_streams=False, data_dir=scratch)
        said, _ = opinions(run, rows)
        feed, stem = run.feed(Clips(run.facts, rows), run.knobs), os.path.splitext(os.path.basename(path))[0]
        mended += [note for note in feed.notes if note.startswith('test text') and ', 0 cut' not in note]
        for i in range(len(rows)): figures.draw_attention(run, feed, i, os.path.join(folder, 'clips'), stem + (f'-{i}' if len(rows) > 1 else ''))
    return '\n'.join(mended + [said])


def rerun(folder, **allowed):
    """ The best checkpoint of a run on its test set again, from the files alone: writes test.jsonl and report.md anew, and
    returns the report. Raises EvalError, ModelError, CorpusError. """
    r, run = read_run(folder), revive(folder, **allowed)
    r['test'], predictions = run.test(run.corpus, run.knobs)
    if predictions: write_predictions(folder, run.corpus, predictions)
    write_text(os.path.join(folder, 'result.json'), json.dumps(r, indent=1))
    return report(folder)


def deprived(folder, modalities, **allowed):
    """ A run on its own test set with these of 'audio', 'vision' alone ([]: the text), as a table. Raises EvalError and its kin. """
    run = revive(folder, **allowed)
    r = run.result
    modalities = [m for m in r['about']['knobs']['modalities'] if m in modalities]   # what it never met is no test
    metrics, _ = run.test(run.corpus, r['about']['knobs'] | dict(modalities=modalities))
    keys = [k for k in r['test'] if k in metrics]
    cells = lambda m: [f'{m[k]:.3f}' for k in keys]
    rows = [['as trained'] + cells(r['test']), [', '.join(['text'] + modalities)] + cells(metrics)]
    return markdown_table([f"{r['about']['name']}, test"] + keys, rows)


def elsewhere(folder, source, modalities=None, **allowed):
    """
    A run on the test split of another corpus, without training there (zero-shot; CrossSent's 4.6), as a table. Features are
    standardised as the run's own were. modalities: a list of 'audio', 'vision' to let through, [] for text alone; a stream
    whose width differs must be left out, as then it is another feature set. Raises EvalError, ModelError, CorpusError.
    """
    run = revive(folder, **allowed)
    r = run.result
    home = run.corpus
    c, other = r['about']['knobs'], open_corpus(source, r['about']['knobs']['data_dir'])
    modalities = [m for m in c['modalities'] if modalities is None or m in modalities]
    for m in modalities:
        if other.widths.get(m) != home.widths.get(m):
            raise EvalError(f"{m} is {home.widths.get(m)} wide in {home.name} and {other.widths.get(m)} in {other.name}, so they are "
                            "other features: leave it out, as --modalities=text does with both.")
    if (info := other.labels.get(c['label'])) != r['info']:
        raise EvalError(f"the label {c['label']!r} is {r['info']} in {home.name} and {info} in {other.name}: they do not compare.")
    for m in home.widths:   # their frames, as this model knows frames: its widths and its normaliser; none, where left out
        if m not in modalities: other.meta['streams'][m] = home.meta['streams'][m] | dict(standardised=True)
        elif other.meta['streams'][m]['standardised']:
            raise EvalError(f"{other.folder} holds {m} standardised by its own mean: convert it with --dtype=float32.")
        else: other.meta['streams'][m] |= {k: home.meta['streams'][m][k] for k in ('mean', 'std')}
    frames = other.frames
    other.widths = home.widths
    other.frames = lambda split, m, i: frames(split, m, i) if m in modalities else np.zeros((0, home.widths[m]), np.float32)
    other.lengths = lambda split, m: np.array([len(other.frames(split, m, i)) for i in range(other.n_clips[split])])
    there, _ = run.test(home, c | dict(modalities=modalities))
    metrics, _ = run.test(other, c | dict(modalities=modalities))
    keys = [k for k in there if k in metrics]
    rows = [[home.name] + [f'{there[k]:.3f}' for k in keys], [f'{other.name}, zero-shot'] + [f'{metrics[k]:.3f}' for k in keys]]
    return markdown_table([f"{r['about']['name']} ({', '.join(['text'] + modalities)}) on"] + keys, rows)


def system_of(r):
    """ What a run is but for its seed and where it was: (name, its knobs as text). Runs that it stands on carry its seed in
    their names. """
    where = ('seed', 'out_dir', 'resume', 'fresh', 'device', 'data_dir', 'log_interval', 'save_interval')
    knobs = {k: re.sub(r'-seed\d+', '', str(v)) for k, v in r['about']['knobs'].items() if k not in where}
    return r['about']['name'], json.dumps(knobs, sort_keys=True)


def one_system(folders):
    """ Raises EvalError unless these runs differ in the seed alone. """
    if len({system_of(read_run(f)) for f in folders}) > 1: raise EvalError("these runs differ in more than the seed: one system at a time.")


def compare(folders):
    """
    Many runs as a table, a row a system: mean +- std (n), and the paired difference to the first row (in MAE; in weighted F1
    for classes) with its 95 % bootstrap interval over clips and seeds. Runs whose knobs differ in the seed alone are one
    system. Raises EvalError.
    """
    systems, clips, label = {}, None, None      # (name, knobs) -> list of (metrics, predictions [N], folder)
    for folder in folders:
        r = read_run(folder)
        if 'loss' in r['test']: raise EvalError(f"{folder} is a language model: it has a loss, no predictions to compare.")
        ids, p = read_predictions(folder)
        if clips is None: clips, label, info = ids, p['label'], r['info']
        if ids != clips or not np.array_equal(p['label'], label):
            raise EvalError(f"{folder} was tested on other clips or labels than {folders[0]}, and a paired comparison needs the "
                            "same: leave one of them out.")
        systems.setdefault(system_of(r), []).append((r['test'], p['pred'], folder))
    names = [name for name, _ in systems]
    keys = [k for k in ('mae', 'corr', 'acc2_non0', 'f1_non0', 'acc7', 'acc5', 'acc', 'wf1')
            if all(k in metrics for runs in systems.values() for metrics, *_ in runs)]
    rows, (by, metric) = [], score_by(info)
    first = np.stack([pred for _, pred, _ in next(iter(systems.values()))])            # [seeds,N]
    for (name, _), runs in systems.items():
        if names.count(name) > 1: name = os.path.basename(runs[0][2])   # one config with other knobs: say which folder
        rows.append([name] + [mean_std_n([metrics[k] for metrics, *_ in runs]) for k in keys])
        if len(systems) > 1 and len(rows) == 1: rows[0].append('-')
        elif len(systems) > 1:
            preds = np.stack([pred for _, pred, _ in runs])                                      # [seeds,N]
            rows[-1].append(claim(metric, first, preds, label, by)['text'])
    return markdown_table(['test'] + keys + [f'{by} less the first row, 95 %'] * (len(systems) > 1), rows)


def main(argv):
    """ The command line of the docstring: prints what it asks for. Raises EvalError and its kin for a sentence. """
    folders = [a.rstrip('/') for a in argv if not a.startswith('--')]
    flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
    if 'help' in flags or '-h' in folders:
        print(__doc__)
        return
    if not folders:
        sys.exit(__doc__)
    allowed = take_permissions(flags)
    if set(flags) - {'corpus', 'modalities', 'clip', 'export'} or flags and len(folders) > 1 \
            or len(flags) > 1 and {'clip', 'export'} & set(flags):
        raise EvalError("--corpus=OTHER, --modalities=text|audio|vision,.., --clip=FILE and --export=FOLDER are for one run (the "
                        "last two alone); --trust_remote_code=True and --data_dir=FOLDER go with all; there are no other flags.")
    only = flags['modalities'].split(',') if 'modalities' in flags else None
    if set(only or ()) - {'text', 'audio', 'vision'}:
        raise EvalError(f"--modalities={flags['modalities']} may hold text, audio and vision only.")
    run = folders[0]
    if 'clip' in flags:
        print(own_clips(run, flags['clip'], **allowed))
    elif 'export' in flags:
        revive(run, without_corpus=True, **allowed)   # what cannot be read here would not be readable there
        print(export(run, read_run(run), flags['export']))
    elif 'corpus' in flags:
        print(elsewhere(run, flags['corpus'], only, **allowed))
    elif 'modalities' in flags:
        print(deprived(run, [m for m in only if m != 'text'], **allowed))
    else:
        print(rerun(run, **allowed) if len(folders) == 1 else compare(folders))


def take_permissions(flags):
    """ Takes --trust_remote_code and --data_dir out of a command's flags -> arguments of revive. Raises EvalError. """
    allowed = {}
    if 'trust_remote_code' in flags:
        value = flags.pop('trust_remote_code')
        if value not in ('True', 'False'):
            raise EvalError(f"--trust_remote_code is True or False, not {value!r}.")
        allowed['trust_remote_code'] = value == 'True'
    if 'data_dir' in flags:
        allowed['data_dir'] = flags.pop('data_dir')
    return allowed


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (EvalError, CorpusError, ModelError, ClipError) as e:
        sys.exit(f"eval: {e}")
    except OSError as e:
        sys.exit(f"eval: {e.filename} cannot be read or written: {e.strerror}.")
