"""
All metrics, and the rule for calling a difference between systems real. Uses NumPy only.

Metrics are fractions (0.8451, not 84.51) and are not rounded, so that means over seeds are exact.
nan means undefined; it is never replaced by zero. The definitions, quirks included, are those of
MMSA 2.2.1 (utils/metricsTop.py), the code behind the published tables of this field; numbers by
other definitions could not be compared with these tables.
"""
import numpy as np

# The metrics in tables, in this order. A table leaves out those that its runs do not have.
SHOWN = 'mae corr acc2_non0 f1_non0 acc2_has0 acc7 acc5 acc3 qwk acc wf1'.split()


# ---------------------------------------------------------------------------------------------------------
# Classes


def confusion(pred, label, n):
    """
    Confusion matrix [n, n] of counts: row = label, column = prediction. A prediction that is no
    class (a generated answer may be none) is in no column: it counts as wrong, but not as a false
    positive of any class.
    """
    pred, label = np.asarray(pred, np.int64), np.asarray(label, np.int64)
    valid = (pred >= 0) & (pred < n)
    return np.bincount(label[valid] * n + pred[valid], minlength=n * n).reshape(n, n)


def class_f1(pred, label, n):
    """
    (F1 of each class [n], weighted F1). F1 = 2 hits / (labels + predictions); nan for a class with
    neither labels nor predictions. Weights are the label counts, as in scikit-learn's
    average='weighted'.
    """
    counts, support = confusion(pred, label, n), np.bincount(label, minlength=n)
    total = support + counts.sum(0)
    f1 = np.where(total > 0, 2 * counts.diagonal() / np.maximum(total, 1), np.nan)
    weighted = (np.nan_to_num(f1) * support).sum() / support.sum() if support.sum() else np.nan
    return f1, weighted


def class_metrics(pred, label, names):
    """
    Accuracy, weighted and macro F1 and the F1 of each class, as a dict(acc, wf1, macro_f1,
    f1_<class>). pred and label are class numbers [N], indices into `names`. macro_f1 leaves out a
    class with neither labels nor predictions, as scikit-learn does.

    >>> class_metrics([0, 0, 1, 9], [0, 1, 1, 1], ['no', 'yes', 'joy'])

    2 of 4 are right: acc 0.5. 'no': one hit, one label, two predictions, F1 = 2/(1+2) = 2/3. 'yes':
    one hit, three labels, one prediction, F1 = 2/(3+1) = 1/2. wf1 = (1 * 2/3 + 3 * 1/2) / 4 =
    13/24, and macro_f1 = (2/3 + 1/2) / 2 = 7/12. 'joy': nan. The prediction 9 is no class.
    """
    pred, label = _pair(pred, label)
    for what, x in (('predictions', pred), ('labels', label)):
        if (x != np.round(x)).any():
            raise ValueError(
                f"{what} of classes must be whole numbers, got {x[x != np.round(x)][0]:g}; "
                f"map answers to class numbers first"
            )
    # clip, because 1e20 does not fit into int64; -1 and len(names) are no classes
    pred, label = np.clip(pred, -1, len(names)).astype(np.int64), label.astype(np.int64)
    if label.min() < 0 or label.max() >= len(names):
        raise ValueError(
            f"labels run from {label.min()} to {label.max()}, but the {len(names)} classes are "
            f"{', '.join(names)}; correct the corpus's class names"
        )
    f1, wf1 = class_f1(pred, label, len(names))
    each = {f'f1_{k}': float(v) for k, v in zip(names, f1)}
    return {'acc': _mean(pred == label), 'wf1': float(wf1), 'macro_f1': float(np.nanmean(f1))} | each


# ---------------------------------------------------------------------------------------------------------
# Regression


def _pair(pred, label):
    """
    pred and label as flat float32 arrays. Raises ValueError if they differ in length, are empty, or
    are not finite. float32 as in MMSA: a label of .7 must be equal to the border .7 of a class.
    """
    with np.errstate(over='ignore'):  # 1e39 becomes inf here and is refused below
        pred, label = np.asarray(pred, np.float32).ravel(), np.asarray(label, np.float32).ravel()
    if len(pred) != len(label):
        raise ValueError(f"{len(pred)} predictions for {len(label)} labels; pass one per label")
    if not len(label):
        raise ValueError("the split has no clips to score; check the corpus folder")
    for what, x in (('predictions', pred), ('labels', label)):
        if bad := np.count_nonzero(~np.isfinite(x)):
            raise ValueError(f"{bad} of {len(x)} {what} are nan or inf; correct the corpus, "
                             "or lower --lr")
    return pred, label


def _mean(x):
    return float(np.mean(x, dtype=np.float64)) if len(x) else float('nan')


def _corr(p, y):
    """
    Pearson correlation; nan if p or y is constant. np.ptp tests that, as the computed variance of a
    constant need not be 0: the float mean of many 0.1s is not exactly 0.1.
    """
    if np.ptp(p) == 0 or np.ptp(y) == 0:
        return float('nan')
    return float(np.corrcoef(p.astype(np.float64), y.astype(np.float64))[0, 1])


def _qwk(a, b, n):
    """
    Cohen's kappa of levels 0 .. n-1 with weights (i - j)^2: 1 - observed / chance disagreement. nan
    if all of a and b are one level, where chance disagreement is 0.
    """
    counts = confusion(a, b, n)
    weight = (np.arange(n)[:, None] - np.arange(n)) ** 2
    chance = (weight * np.outer(counts.sum(1), counts.sum(0))).sum() / counts.sum()
    return float(1 - (weight * counts).sum() / chance) if chance else float('nan')


class Scores:
    """ Predictions p and labels y, both [N] float32, of a score in [low, high]. """

    def __init__(self, pred, label, label_range):
        self.p, self.y = _pair(pred, label)  # [N], [N]
        self.low, self.high = label_range
        self.is_sims = (self.low, self.high) == (-1, 1)
        if self.is_sims:   # MMSA clips before every metric of SIMS
            self.p, self.y = np.clip(self.p, -1, 1), np.clip(self.y, -1, 1)

    def positive(self, x):
        """ True where a score counts as positive in Has0 -> [N] bool. """
        return x > 0 if self.is_sims else x >= 0

    def signs(self, which):
        """
        Binary classes of predictions and labels, 1 = positive -> 2x [n] int64. which: 'has0' for
        all clips, 'non0' for clips whose label is not 0, 'weak' for clips with a small label.
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

    def f1(self, which, macro=False):
        a, b = self.signs(which)
        each, weighted = class_f1(a, b, 2)
        return float(np.mean(each[~np.isnan(each)]) if macro and len(a) else weighted)

    def acc_k(self, k):
        """ Accuracy of 2 k + 1 classes; None if the label's range does not have them. """
        if self.is_sims:
            cuts = {1: [-0.1, 0.1], 2: [-0.7, -0.1, 0.1, 0.7]}.get(k)
            if cuts is None:
                return None
            # the number of borders below a score; in float32 a label of .7 is equal to its border
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
        (levels of predictions [N], levels of labels [N], n): ordinal levels 0 .. n-1, with `scale`
        levels per unit of the score.
        """
        first, last = round(scale * self.low), round(scale * self.high)
        clipped = [np.clip(x, self.low, self.high) for x in (self.p, self.y)]
        a, b = (np.round(scale * x).astype(np.int64) - first for x in clipped)
        return a, b, last - first + 1

    def ordinal(self, what, three=False):
        """
        The metric 'qwk', 'jump2' or 'jump_mean'. three=True: on three levels for SIMS, and None for
        other ranges.
        """
        if three and not self.is_sims:
            return None
        a, b, n = self.levels(2 if self.is_sims and not three else 1)
        if what == 'qwk':
            return _qwk(a, b, n)
        return _mean(abs(a - b) >= 2) if what == 'jump2' else _mean(abs(a - b))


# The metrics of a score: name -> (which way is better, description, function of a Scores). The
# function returns None if the label's range does not have the metric. A new metric needs an entry
# here, and its name in SHOWN if tables should have it.
METRICS = {
    'acc2_non0': ('higher', "accuracy of the classes > 0 and <= 0, over clips whose label is not "
                            "0", lambda s: s.acc2('non0')),
    'f1_non0': ('higher', "weighted F1 of the two classes of acc2_non0", lambda s: s.f1('non0')),
    'macro_f1_non0': ('higher', "F1 of the two classes of acc2_non0, averaged over the "
                                "classes", lambda s: s.f1('non0', macro=True)),
    'acc2_has0': ('higher', "accuracy of the classes >= 0 and < 0 (SIMS: > 0 and <= 0), over all "
                            "clips", lambda s: s.acc2('has0')),
    'f1_has0': ('higher', "weighted F1 of the two classes of acc2_has0", lambda s: s.f1('has0')),
    'acc2_weak': ('higher', "acc2_has0 over the clips with |label| <= 0.4 of the largest "
                            "label", lambda s: s.acc2('weak')),
    'acc3': ('higher', "accuracy of 3 classes: clipped to [-1, 1] and rounded (SIMS: borders at "
                       "-.1 and .1)", lambda s: s.acc_k(1)),
    'acc5': ('higher', "accuracy of 5 classes: clipped to [-2, 2] and rounded (SIMS: borders at "
                       "-.7, -.1, .1 and .7)", lambda s: s.acc_k(2)),
    'acc7': ('higher', "accuracy of 7 classes: clipped to [-3, 3] and rounded (not for "
                       "SIMS)", lambda s: s.acc_k(3)),
    'mae': ('lower', "mean |prediction - label|", lambda s: _mean(np.abs(s.error()))),
    'corr': ('higher', "Pearson correlation of prediction and label", lambda s: _corr(s.p, s.y)),
    'r2': ('higher', "1 - sum (label - prediction)^2 / sum (label - mean "
                     "label)^2", lambda s: s.r2()),
    'qwk': ('higher', "quadratic weighted kappa of the ordinal levels", lambda s: s.ordinal('qwk')),
    'jump2': ('lower', "share of clips predicted two or more ordinal levels "
                       "off", lambda s: s.ordinal('jump2')),
    'jump_mean': ('lower', "mean distance of prediction and label in ordinal "
                           "levels", lambda s: s.ordinal('jump_mean')),
    'qwk_3': ('higher', "qwk on three levels, round(score) (SIMS "
                        "only)", lambda s: s.ordinal('qwk', three=True)),
    'jump2_3': ('lower', "jump2 on three levels (SIMS "
                         "only)", lambda s: s.ordinal('jump2', three=True)),
    'jump_mean_3': ('lower', "jump_mean on three levels (SIMS "
                             "only)", lambda s: s.ordinal('jump_mean', three=True)),
}
# name -> (which way is better, description) of every metric
METRIC_HELP = {name: (better, what) for name, (better, what, _) in METRICS.items()} | {
    'loss': ('lower', "the training loss, of a model that predicts no label"),
    'acc': ('higher', "share of clips with the right class"),
    'wf1': ('higher', "F1 of each class, averaged by the class's share of the labels"),
    'macro_f1': ('higher', "F1 of each class, averaged over the classes"),
    'f1_<class>': ('higher', "F1 of one class"),
    'unread': ('lower', "share of clips whose generated answer was no label (scored as the middle "
                        "of the range, or as a wrong class)"),
}
BETTER = {key: better for key, (better, _) in METRIC_HELP.items()}
SELECTABLE = [key for key in METRIC_HELP if key not in ('f1_<class>', 'unread')]  # by `select`


def is_better(metric, value, best):
    """
    Whether a value of a metric is better than the best so far; best: None at first. NaN, such as
    the Corr of constant predictions, is worse than any number.
    """
    if best is None or np.isnan(best):
        return best is None or not np.isnan(value)
    return value < best if BETTER[metric] == 'lower' else value > best


def metric_help(key):
    """ (which way is better, description) of a metric of a run, such as f1_joy. """
    return METRIC_HELP.get(key, METRIC_HELP['f1_<class>'])


def regression_metrics(pred, label, label_range):
    """
    All metrics of scores pred and labels label, both [N], as a dict in the order of METRIC_HELP.

    label_range [-3, 3] (MOSI, MOSEI), the rules of MMSA:
    - MAE, Corr and R2 use the predictions unclipped.
    - AccK with K = 2k + 1 classes: both are clipped to [-k, k] and rounded, then compared.
    - Has0: all clips, classes >= 0 and < 0; -0.0 is in the first class.
    - Non0: clips whose label is not 0, classes > 0 and <= 0; a predicted 0 is in the second class.
    - Ordinal levels, for QWK and the jumps: the seven classes of Acc7.

    label_range [-1, 1] (CH-SIMS and CH-SIMS v2):
    - Both are clipped to [-1, 1] before every metric, MAE and Corr included.
    - Has0 is MMSA's Mult_acc_2: all clips, classes > 0 and <= 0. Here 0 is negative.
    - Non0 as above. CrossSent reports it for SIMS; other papers report no comparable number.
    - Acc3 has borders at -.1 and .1, Acc5 also at -.7 and .7. A border belongs to the class below.
    - Ordinal levels: round(2 x), -2 .. 2, as in CrossSent. These are not the classes of Acc5: .2
      has level 0 and is weakly positive in Acc5. CrossSent can also be read as round(x), -1 .. 1;
      the names of those metrics end in _3.
    - No Acc7.

    Any other range [lo, hi] (our definition): the rules of [-3, 3], levels round(clip(x, lo, hi)),
    and those AccK whose [-k, k] lies in the range.

    acc2_weak is Has0 over clips with |label| <= .4 max(|lo|, |hi|). For SIMS v2 that is .4, the
    published definition; for other corpora it is ours (1.2 for [-3, 3]).

    Rounding is half to even (0.5 -> 0, 1.5 -> 2). F1 is weighted by label counts. An example:

    >>> regression_metrics([0.5, -0.2, 1.5, -4.0], label=[1.0, 0.0, 2.0, -3.0], label_range=[-3, 3])

    MAE = (.5 + .2 + .5 + 1) / 4 = .55, with -4 unclipped. Levels 0 0 2 -3 and 1 0 2 -3: Acc7 .75,
    jump_mean .25, jump2 0. Has0 .75, as -.2 for 0 is wrong. Non0 drops that clip: 1.
    R2 = 1 - (.25 + .04 + .25 + 1) / (1 + 0 + 4 + 9) = .89.
    """
    scores, metrics = Scores(pred, label, label_range), {}
    for name, (_, _, compute) in METRICS.items():
        value = compute(scores)
        if value is not None:
            metrics[name] = value
    return metrics


# ---------------------------------------------------------------------------------------------------------
# Several runs


def paired_bootstrap(metric_fn, preds_a, preds_b, label, n_resamples=2000, seed=0):
    """
    (difference, low, high): system A's metric minus system B's, and its 95 % percentile interval.

    preds_* are [runs, N], a row for each seed; metric_fn(pred [N], label [N]) -> a number. The
    difference is the mean of the metric over A's runs minus the mean over B's. Each resample draws
    N clips with replacement, the same clips for both systems (paired), and then draws runs of each
    system with replacement. So the interval covers the choice of test clips and of seeds. nan if
    the metric is undefined on a resample.

    Hazard: with one run per system the interval does not cover seeds at all. With few runs it is
    too narrow: the variance due to seeds is too small by the factor (runs - 1) / runs. An interval
    that barely excludes 0 is then no evidence.
    """
    label, rng = np.asarray(label), np.random.default_rng(seed)
    preds = [np.atleast_2d(np.asarray(x)) for x in (preds_a, preds_b)]
    for name, x in zip('AB', preds):
        if x.shape[1:] != label.shape or not len(label) or not len(x):
            raise ValueError(
                f"system {name} has predictions {list(x.shape)} for {list(label.shape)} labels; "
                f"pass [runs, clips], with the clips of both systems in the labels' order"
            )

    def scores(clips):
        """ The metric of each run on these clips: a list of two arrays [runs]. """
        y = label[clips]
        return [np.array([metric_fn(run, y) for run in x[:, clips]], np.float64) for x in preds]

    a, b = scores(slice(None))
    resampled = np.empty(n_resamples)
    for i in range(n_resamples):
        s, t = scores(rng.integers(len(label), size=len(label)))
        resampled[i] = rng.choice(s, len(s)).mean() - rng.choice(t, len(t)).mean()
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(a.mean() - b.mean()), float(low), float(high)


def bootstrap(metrics_fn, pred, label, n_resamples=500, seed=0):
    """
    {metric: (low, high)}: the 95 % percentile interval of each metric of one run over the choice of
    test clips. metrics_fn(pred [N], label [N]) -> dict of metrics. nan if the metric is undefined
    on a resample. The interval does not cover seeds.
    """
    rng, n = np.random.default_rng(seed), len(label)
    resampled = []
    for _ in range(n_resamples):
        clips = rng.integers(n, size=n)
        resampled.append(metrics_fn(pred[clips], label[clips]))
    found = {}
    for name in set.intersection(*map(set, resampled)):
        values = [metrics[name] for metrics in resampled]
        found[name] = tuple(float(v) for v in np.percentile(values, [2.5, 97.5]))
    return found


def central_interval(prob, values):
    """
    (low, high): the interval of scores that holds the central 80 % of the probability. prob [K]: of
    the scores values [K], in ascending order.
    """
    low, high = (min(int((prob.cumsum() < q).sum()), len(prob) - 1) for q in (0.1, 0.9))
    return float(values[low]), float(values[high])


def score_by(info):
    """
    The metric by which systems are compared: its name ('mae' or 'wf1') and a function of
    predictions [N] and labels [N]. `info` is the label's entry in meta.json.
    """
    if info['kind'] != 'classes':
        sims = info['range'] == [-1, 1]   # clipped, as in regression_metrics
        low, high = info['range'] if sims else (-np.inf, np.inf)
        return 'mae', lambda pred, y: np.abs(np.clip(pred, low, high) - y).mean()
    return 'wf1', lambda pred, y: class_f1(pred, y.astype(int), len(info['names']))[1]


def claim(metric, first, other, label, by, **how):
    """
    The rule for calling a difference real. Compares a system `other` with a system `first`, whose
    predictions are [runs,N], by the metric `by` -> dict(difference, low, high, text, verdict).

    The verdict is 'better' or 'worse' if both have at least 3 runs and the 95 % interval of the
    paired difference excludes 0. Otherwise it is 'open', which does not mean that they are equal.
    The rule holds only if nothing was selected on the test set. With fewer runs the text says that
    nothing is claimed.
    """
    difference, low, high = paired_bootstrap(metric, other, first, label, **how)
    enough = min(len(first), len(other)) >= 3
    is_real = enough and (low > 0 or high < 0)
    verdict = 'open'
    if is_real:
        verdict = 'better' if (difference > 0) == (BETTER[by] == 'higher') else 'worse'
    text = f'{difference:+.4f} [{low:+.4f}, {high:+.4f}]'
    text += '' if enough else '; nothing is claimed: n < 3'
    return dict(difference=difference, low=low, high=high, verdict=verdict, text=text)


def mean_std_n(values, digits=3):
    """
    Mean and sample standard deviation (n - 1) as text: '0.512 ± 0.004 (n=3)'. A single value has no
    deviation: '0.512 (n=1)'.
    """
    values = np.asarray(values, np.float64).ravel()
    if not len(values):
        return 'not run'
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ''
    return f"{values.mean():.{digits}f}{spread} (n={len(values)})"


def markdown_table(header, rows):
    """ A Markdown table with aligned columns; a | in a cell is escaped. """
    cells = [[str(c).replace('|', '\\|') for c in row] for row in [header, *rows]]
    width = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, width)) + ' |' for row in cells]
    return '\n'.join([lines[0], '|' + '|'.join('-' * (w + 2) for w in width) + '|', *lines[1:]])


def check_finite(predictions, ids):
    """
    Raises ValueError if a prediction is NaN or inf, and names the first such clip. predictions:
    name -> array [N,..]; ids: the N ids of the clips.
    """
    for name, values in predictions.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))  # clips
        if len(bad):
            raise ValueError(
                f"{name} of clip {ids[bad[0]]} is NaN or inf ({len(bad)} of {len(values)} clips); "
                "look for frames far outside the training data, or for a run that diverged"
            )


def task_metrics(pred, label, info):
    """ All metrics of a label. `info` is its entry in meta.json: a score or classes. """
    if info['kind'] == 'classes':
        return class_metrics(pred, label, info['names'])
    return regression_metrics(pred, label, info['range'])
