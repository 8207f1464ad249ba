"""
Every metric, and when a difference between systems is called real. NumPy alone.

Metrics are fractions (0.8451, not 84.51) and nothing is rounded, so that means over seeds are
right; nan means undefined, never zero. The definitions are those of the code that the field's
tables come from (MMSA 2.2.1, utils/metricsTop.py), with its quirks: other definitions would compare
with nothing.
"""
import numpy as np

# The metrics that tables show, in this order, as far as a run has them.
SHOWN = 'mae corr acc2_non0 f1_non0 acc2_has0 acc7 acc5 acc3 qwk acc wf1'.split()


# ---------------------------------------------------------------------------------------------------------
# classes


def confusion(pred, label, n):
    """
    Counts [n, n], row = label, column = prediction. An answer that is no class (a generator may say
    9) stands in no column, so its row falls short of the label's count: wrong, but nobody's false
    positive.
    """
    pred, label = np.asarray(pred, np.int64), np.asarray(label, np.int64)
    valid = (pred >= 0) & (pred < n)
    return np.bincount(label[valid] * n + pred[valid], minlength=n * n).reshape(n, n)


def class_f1(pred, label, n):
    """
    (F1 of each class [n], weighted F1). F1 = 2 hits / (labels + predictions): 0 for a class never
    hit, nan for one that is in neither. Weights are the label counts, as in scikit-learn's
    average='weighted'.
    """
    counts, support = confusion(pred, label, n), np.bincount(label, minlength=n)
    total = support + counts.sum(0)
    f1 = np.where(total > 0, 2 * counts.diagonal() / np.maximum(total, 1), np.nan)
    return f1, (np.nan_to_num(f1) * support).sum() / support.sum() if support.sum() else np.nan


def class_metrics(pred, label, names):
    """
    acc, wf1 and f1_<class> of class numbers pred and label, both [N], for classes names[0],
    names[1] ...

    >>> class_metrics([0, 0, 1, 9], [0, 1, 1, 1], ['no', 'yes', 'joy'])

    2 of 4 are right: acc 0.5. 'no': one hit, one label, two predictions, F1 = 2/(1+2) = 2/3. 'yes':
    one hit, three labels, one prediction, F1 = 2/(3+1) = 1/2. wf1 = (1 * 2/3 + 3 * 1/2) / 4 =
    13/24. 'joy': nan.
    """
    pred, label = _pair(pred, label)
    for what, x in (('predictions', pred), ('labels', label)):
        if (x != np.round(x)).any():
            raise ValueError(
                f"{what} of classes must be whole numbers, got {x[x != np.round(x)][0]:g}; "
                f"decode the answer to a class first"
            )
    # clipped, as an answer of 1e20 has no int64; both ends of the clip are no class
    pred, label = np.clip(pred, -1, len(names)).astype(np.int64), label.astype(np.int64)
    if label.min() < 0 or label.max() >= len(names):
        raise ValueError(
            f"labels run from {label.min()} to {label.max()}, but the {len(names)} classes are "
            f"{', '.join(names)}; check the corpus's class names"
        )
    f1, wf1 = class_f1(pred, label, len(names))
    each = {f'f1_{k}': float(v) for k, v in zip(names, f1)}
    return {'acc': _mean(pred == label), 'wf1': float(wf1)} | each


# ---------------------------------------------------------------------------------------------------------
# regression


def _pair(pred, label):
    """
    Both flat, or a ValueError. float32 like the references: there a label of .7 is right on a
    border.
    """
    with np.errstate(over='ignore'):  # 1e39 becomes inf here, and is counted below
        pred, label = np.asarray(pred, np.float32).ravel(), np.asarray(label, np.float32).ravel()
    if len(pred) != len(label):
        raise ValueError(f"{len(pred)} predictions for {len(label)} labels; match them")
    if not len(label):
        raise ValueError("nothing to score, the split is empty; check the corpus folder")
    for what, x in (('predictions', pred), ('labels', label)):
        bad = np.count_nonzero(~np.isfinite(x))
        if bad:
            raise ValueError(f"{bad} of {len(x)} {what} are nan or inf; find out why first")
    return pred, label


def _mean(x):
    return float(np.mean(x, dtype=np.float64)) if len(x) else float('nan')


def _corr(p, y):
    """
    Pearson's r; nan if either is constant, which a variance cannot tell: the mean of 0.1s is not
    0.1.
    """
    if np.ptp(p) == 0 or np.ptp(y) == 0:
        return float('nan')
    return float(np.corrcoef(p.astype(np.float64), y.astype(np.float64))[0, 1])


def _qwk(a, b, n):
    """
    Cohen's kappa with weights (i - j)^2 of levels 0 .. n-1: 1 - observed / chance disagreement.
    Where all of both is one level that is 1 - 0/0, and nan here: agreement on a constant shows
    nothing.
    """
    counts = confusion(a, b, n)
    weight = (np.arange(n)[:, None] - np.arange(n)) ** 2
    chance = (weight * np.outer(counts.sum(1), counts.sum(0))).sum() / counts.sum()
    return float(1 - (weight * counts).sum() / chance) if chance else float('nan')


class Scores:
    """
    Predictions p and labels y of a score in [low, high], both [N] float32, as the metrics below see
    them.
    """

    def __init__(self, pred, label, label_range):
        self.p, self.y = _pair(pred, label)  # [N], [N]
        self.low, self.high = label_range
        self.is_sims = (self.low, self.high) == (-1, 1)
        if self.is_sims:   # clipped before everything
            self.p, self.y = np.clip(self.p, -1, 1), np.clip(self.y, -1, 1)

    def positive(self, x):
        """ Where a score counts as positive for Has0 -> [N] bool. """
        return x > 0 if self.is_sims else x >= 0

    def signs(self, which):
        """
        The two classes of 'non0', 'has0' or 'weak', of predictions and labels -> 2x [n] int64.
        """
        if which == 'non0':
            keep = self.y != 0
            return [(x[keep] > 0).astype(np.int64) for x in (self.p, self.y)]
        keep = np.ones(len(self.y), bool)
        if which == 'weak':
            keep = np.abs(self.y) <= np.float32(0.4 * max(abs(self.low), abs(self.high)))
        return [self.positive(x[keep]).astype(np.int64) for x in (self.p, self.y)]

    def acc2(self, which):
        a, b = self.signs(which)
        return _mean(a == b)

    def f1(self, which):
        a, b = self.signs(which)
        return float(class_f1(a, b, 2)[1])

    def acc_k(self, k):
        """ Accuracy of 2 k + 1 classes; None where the range has no such classes. """
        if self.is_sims:
            cuts = {1: [-0.1, 0.1], 2: [-0.7, -0.1, 0.1, 0.7]}.get(k)
            if cuts is None:
                return None
            # searchsorted counts the borders below a score, in float32 so that .7 is on the border
            a, b = (np.searchsorted(np.float32(cuts), x) for x in (self.p, self.y))
        elif self.low <= -k and k <= self.high:
            a, b = (np.round(np.clip(x, -k, k)) for x in (self.p, self.y))
        else:
            return None
        return _mean(a == b)

    def error(self):
        return self.p.astype(np.float64) - self.y  # [N]

    def r2(self):
        spread = np.nan
        if np.ptp(self.y) > 0:
            spread = np.sum((self.y - np.mean(self.y, dtype=np.float64)) ** 2)
        return float(1 - np.sum(self.error() ** 2) / spread)

    def levels(self, scale):
        """
        Ordinal levels from 0, `scale` of them a unit of the score, and how many there are: a [N], b
        [N], n.
        """
        first, last = round(scale * self.low), round(scale * self.high)
        a, b = (np.round(scale * np.clip(x, self.low, self.high)).astype(np.int64) - first for x in (self.p, self.y))
        return a, b, last - first + 1

    def ordinal(self, what, three=False):
        """ 'qwk', 'jump2' or 'jump_mean'; three=True: of SIMS's three levels, None elsewhere. """
        if three and not self.is_sims:
            return None
        a, b, n = self.levels(2 if self.is_sims and not three else 1)
        if what == 'qwk':
            return _qwk(a, b, n)
        return _mean(abs(a - b) >= 2) if what == 'jump2' else _mean(abs(a - b))


# Every metric of a score, an entry each: which way is better, what it is, and how it is computed
# from Scores (None where the label's range does not have it). An entry here is all that a new
# metric needs; SHOWN says which ones tables show.
METRICS = {
    'acc2_non0': ('higher', "binary accuracy, > 0 against > 0, over the clips whose label is not "
                            "0", lambda s: s.acc2('non0')),
    'f1_non0': ('higher', "weighted F1 of the two classes of acc2_non0", lambda s: s.f1('non0')),
    'acc2_has0': ('higher', "binary accuracy, >= 0 against >= 0 (SIMS: > 0 against > 0), all "
                            "clips", lambda s: s.acc2('has0')),
    'f1_has0': ('higher', "weighted F1 of the two classes of acc2_has0", lambda s: s.f1('has0')),
    'acc2_weak': ('higher', "acc2_has0 over the clips with |label| <= 0.4 of the largest "
                            "label", lambda s: s.acc2('weak')),
    'acc3': ('higher', "accuracy of 3 classes, clip to [-1, 1] and round (SIMS: cuts at -.1 "
                       ".1)", lambda s: s.acc_k(1)),
    'acc5': ('higher', "accuracy of 5 classes, clip to [-2, 2] and round (SIMS: -.7 -.1 .1 "
                       ".7)", lambda s: s.acc_k(2)),
    'acc7': ('higher', "accuracy of 7 classes, clip to [-3, 3] and round (not for "
                       "SIMS)", lambda s: s.acc_k(3)),
    'mae': ('lower', "mean |prediction - label|", lambda s: _mean(np.abs(s.error()))),
    'corr': ('higher', "Pearson correlation of prediction and label", lambda s: _corr(s.p, s.y)),
    'r2': ('higher', "1 - sum (label - prediction)^2 / sum (label - mean "
                     "label)^2", lambda s: s.r2()),
    'qwk': ('higher', "quadratic weighted kappa of the ordinal levels", lambda s: s.ordinal('qwk')),
    'jump2': ('lower', "share of clips that are two or more ordinal levels "
                       "off", lambda s: s.ordinal('jump2')),
    'jump_mean': ('lower', "mean number of ordinal levels off", lambda s: s.ordinal('jump_mean')),
    'qwk_3': ('higher', "qwk of three levels, round(score) (SIMS "
                        "only)", lambda s: s.ordinal('qwk', three=True)),
    'jump2_3': ('lower', "jump2 of three levels (SIMS "
                         "only)", lambda s: s.ordinal('jump2', three=True)),
    'jump_mean_3': ('lower', "jump_mean of three levels (SIMS "
                             "only)", lambda s: s.ordinal('jump_mean', three=True)),
}
METRIC_HELP = {name: f'{better} is better: '
                     f'{what}' for name, (better, what, _) in METRICS.items()} | {
    'loss': "lower is better: the training loss, for a model that predicts no label",
    'acc': "higher is better: share of clips with the right class",
    'wf1': "higher is better: F1 of each class, averaged by the class's share of the labels",
    'f1_<class>': "higher is better: F1 of one class",
    'unread': "lower is better: share of clips whose generated answer was no label; scored as the "
              "middle, or as wrong",
}
BETTER = {key: 'low' if text.startswith('lower') else 'high' for key, text in METRIC_HELP.items()}


def regression_metrics(pred, label, label_range):
    """
    All metrics of scores pred against label, both [N], as a dict in the order of METRIC_HELP.

    label_range [-3, 3] (MOSI, MOSEI), MMSA's rules. MAE, Corr and R2 see the predictions as they
    are. AccK with K = 2k+1: clip both to [-k, k], round, share of equal ones. Has0: all clips, >= 0
    against >= 0, and -0.0 is >= 0. Non0: clips with label != 0, > 0 against > 0, so that an exact 0
    is a negative prediction. Levels for QWK and the jumps: the seven classes of Acc7.

    label_range [-1, 1] (CH-SIMS, v2). Both are clipped to [-1, 1] before *everything*, MAE and Corr
    included. Has0 is MMSA's Mult_acc_2, all clips, > 0 against > 0: here 0 is negative. Non0 as
    above: CrossSent's printed SIMS numbers are that, and compare with no other paper's. Acc3 has
    borders at +-.1, Acc5 also at +-.7, and a border belongs to the class below it. Levels: round(2
    x), CrossSent's -2 .. 2, which are *not* the classes of Acc5 (.2 is level 0, and weakly positive
    there); its second reading, round(x), -1 .. 1, has names that end in _3. No Acc7.

    Any other [lo, hi]: the rules of [-3, 3], levels round(clip(x, lo, hi)), and those AccK whose
    [-k, k] lies inside. That is ours. So is acc2_weak beyond SIMS v2, where it is |label| <= .4:
    Has0 over the clips with
    |label| <= .4 max(|lo|, |hi|), which is 1.2 for [-3, 3].

    Rounding is half to even everywhere (0.5 -> 0, 1.5 -> 2); F1 is weighted by label counts. An
    example:

    >>> regression_metrics(pred=[0.5, -0.2, 1.5, -4.0], label=[1.0, 0.0, 2.0, -3.0], label_range=[-3, 3])

    MAE = (.5 + .2 + .5 + 1) / 4 = .55, on the unclipped -4. Levels 0 0 2 -3 against 1 0 2 -3: Acc7
    .75, jump_mean .25, jump2 0. Has0: only -.2 against 0 is wrong, .75. Non0 drops that clip, 1. R2
    = 1 - (.25 + .04 + .25 + 1) / (1 + 0 + 4 + 9) = .89.
    """
    scores, metrics = Scores(pred, label, label_range), {}
    for name, (_, _, compute) in METRICS.items():
        value = compute(scores)
        if value is not None:
            metrics[name] = value
    return metrics


# ---------------------------------------------------------------------------------------------------------
# several runs


def paired_bootstrap(metric_fn, preds_a, preds_b, label, n_resamples=2000, seed=0):
    """
    (difference, low, high): by how much system A's metric exceeds B's, with its 95 % percentile
    interval.

    preds_* are [runs, N], one row a seed; metric_fn(pred [N], label [N]) -> a number. The statistic
    is the mean of the metric over A's runs minus that over B's. Each resample draws N clips with
    replacement, the same for both systems (they are paired: a hard clip is hard for both), and then
    runs with replacement within each, so that the interval answers for another test set *and* other
    seeds. The hazard: a single run counts as the only one there could be, and with two or three the
    seeds' share of the variance comes out too small by (runs - 1) / runs. An interval that barely
    excludes 0 has then not excluded it. nan if the metric is undefined on any resample.
    """
    label, rng = np.asarray(label), np.random.default_rng(seed)
    preds = [np.atleast_2d(np.asarray(x)) for x in (preds_a, preds_b)]
    for name, x in zip('AB', preds):
        if x.shape[1:] != label.shape or not len(label) or not len(x):
            raise ValueError(
                f"system {name} has predictions {list(x.shape)} for {list(label.shape)} labels; "
                f"pass [runs, clips] with the clips of both systems in the labels' order"
            )

    def scores(clips):  # one per run, for both systems
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
    """
    What systems are compared by: ('mae' or 'wf1', a function of predictions [N] and labels [N]).
    """
    if info['kind'] != 'classes':
        sims = info['range'] == [-1, 1]   # clipped, as regression_metrics has it
        low, high = info['range'] if sims else (-np.inf, np.inf)
        return 'mae', lambda pred, y: np.abs(np.clip(pred, low, high) - y).mean()
    return 'wf1', lambda pred, y: class_f1(pred, y.astype(int), len(info['names']))[1]


def claim(metric, first, other, label, by, **how):
    """
    What may be said of a system against a first one: dict(difference, low, high, text, verdict).
    Predictions are [runs,N]. The verdict is 'better' or 'worse' where both have at least 3 runs and
    the 95 % interval of the paired difference excludes 0; it is 'open' otherwise, and that is no
    proof of equality. What was chosen must have been chosen on validation.
    """
    difference, low, high = paired_bootstrap(metric, other, first, label, **how)
    sure = min(len(first), len(other)) >= 3 and (low > 0 or high < 0)
    verdict = 'open'
    if sure:
        verdict = 'better' if (difference > 0) == (BETTER[by] == 'high') else 'worse'
    text = f'{difference:+.4f} [{low:+.4f}, {high:+.4f}]'
    return dict(difference=difference, low=low, high=high, verdict=verdict, text=text)


def mean_std_n(values, digits=3):
    """
    '0.512 ± 0.004 (n=3)', the sample standard deviation (n - 1); '0.512 (n=1)', as one run has
    none.
    """
    values = np.asarray(values, np.float64).ravel()
    if not len(values):
        return 'not run'
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ''
    return f"{values.mean():.{digits}f}{spread} (n={len(values)})"


def markdown_table(header, rows):
    """A Markdown table that also reads well as plain text; a | in a cell is escaped."""
    cells = [[str(c).replace('|', '\\|') for c in row] for row in [header, *rows]]
    width = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, width)) + ' |' for row in cells]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (w + 2) for w in width) + '|', *lines[1:]])


def check_finite(predictions, ids):
    """
    predictions: name -> array [N,..], ids: N names of clips. Raises ValueError, with the first
    clip, for NaN or inf.
    """
    for name, values in predictions.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))  # clips
        if len(bad):
            raise ValueError(
                f"{name} of clip {ids[bad[0]]} is NaN or inf ({len(bad)} of {len(values)} clips); "
                "look for frames far outside the training data, or for a checkpoint that diverged"
            )


def task_metrics(pred, label, info):
    """
    The metrics of a label that meta.json describes as `info`: a score with a range, or classes with
    names.
    """
    if info['kind'] == 'classes':
        return class_metrics(pred, label, info['names'])
    return regression_metrics(pred, label, info['range'])
