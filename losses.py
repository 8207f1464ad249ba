"""
The losses: functions of tensors that return a scalar to differentiate. deepmlf_loss and
ordinal_loss also return the terms of that scalar, and head_loss returns a dict of both. The ordinal
losses and CORAL, their control, have their knobs, checks and notes here.

Axis letters: B clips, T text tokens, D LM width, V vocabulary, K levels of a score.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import AtLeast
from run.errors import ModelError

# The units of loss terms. Terms of other names have a scale of their own.
UNITS = dict.fromkeys('task text audio vision av fusion'.split(), 'label units') | dict(
    lm='nats per token', label='nats per token of the answer', mpr='label units',
    eioi='label units to the power eioi_power')


class OrdinalKnobs:
    """
    The ordinal regularisers of CrossSent, and CORAL, for any system that predicts a score by a head.
    """
    weight_mpr: AtLeast(0) = 0.0   # weight of MPR, the monotonic pairwise ranking loss
    weight_eioi: AtLeast(0) = 0.0  # weight of EIOI, the loss on errors outside a band
    mpr_gap: AtLeast(0) = 0.5      # delta: pairs whose labels differ by more than this are ranked
    mpr_margin: AtLeast(0) = 0.1   # alpha: the constant part of a pair's margin
    mpr_slope: AtLeast(0) = 0.5    # beta: the margin's growth per unit of label difference
    eioi_band: AtLeast(0) = 0.25   # epsilon: half the width of the band around the label
    eioi_power: AtLeast(1) = 1.0   # power of the error outside the band
    ramp_epochs: AtLeast(0) = 5.0  # epochs in which these weights rise from 0 (a cosine)
    level_step: AtLeast(0) = 0.0   # CORAL as the task loss: label units between levels; 0: no CORAL


# Knobs of losses that compare scores, so they need a label with scores. A weight_.. that a fork adds
# to OrdinalKnobs is one of them.
NEED_A_SCORE = [knob for knob in vars(OrdinalKnobs) if knob.startswith('weight_')] + ['level_step']


def refuse_other_shape(pred, label):
    """
    Raises ModelError for unequal shapes: [B,1] against [B] would broadcast to a mean over [B,B].
    """
    if pred.shape != label.shape:
        raise ModelError(f"predictions of shape {list(pred.shape)} do not fit labels of shape "
                         f"{list(label.shape)}: predict one number for each clip.")


def l1(pred, label):
    """ Mean absolute error over the clips of a batch. pred, label [B] -> []. """
    refuse_other_shape(pred, label)
    return (pred - label).abs().mean()


def mse(pred, label):
    """ Mean squared error. pred and label of the same shape -> []. """
    refuse_other_shape(pred, label)
    return (pred - label).square().mean()


def lm_loss(hidden, batch, lm_head, chunk=128):
    """
    Next-token cross-entropy, the mean over the batch's real targets (DeepMLF eq. 5, with a mean in
    place of the sum).

    A target is a real token that has a token before it, so a clip of n tokens has n-1 targets and
    padding has none. Nothing is predicted after the last token (the release predicts the padding id
    there). Logits are computed for the targets only, `chunk` of them at a time: with GPT-2's
    vocabulary, the logits of 32 clips x 62 positions would take 0.4 GB, and their gradient as much
    again.

    hidden [B,T,D] after the LM's final norm; batch: tokens [B,T], targets [n], the positions before
    the targets in the flattened batch, and in training lm_weight -> []. lm_weight is this
    micro-batch's share of the step's targets divided by its share of the step's clips. With it, the
    mean over the micro-batches, weighted by clips, is the mean over all targets of the step.
    """
    positions = batch['targets']  # [n]
    x = hidden.flatten(0, 1)[positions]  # [n,D]
    y = batch['tokens'].flatten()[positions + 1]  # [n]
    if len(y) == 0:  # every clip has one token: no target, but backward() needs a graph
        return hidden.sum() * 0.0
    return summed_cross_entropy(x, y, lm_head, chunk) / len(y) * batch.get('lm_weight', 1.0)


def summed_cross_entropy(x, y, lm_head, chunk=128):
    """
    The sum over rows of -log p(y): x [n,D] hidden states, y [n] tokens, -100 in rows to skip -> [].
    Logits exist for at most `chunk` rows at a time.
    """
    def summed(x, y):
        return F.cross_entropy(lm_head(x).float(), y, reduction='sum')

    if len(y) <= chunk:
        return summed(x, y)  # few rows, such as the labels of a batch
    pieces = list(zip(x.split(chunk), y.split(chunk)))
    weight = getattr(lm_head, 'weight', None)  # [V,D]
    if weight is None or weight.requires_grad:
        sums = [checkpoint(summed, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces]
        return torch.stack(sums).sum()

    # A frozen head: only x needs a gradient, (p - one_hot(y)) W. It is computed here, where the
    # logits exist, so that backward() need not compute them again.
    total, x_grads = 0.0, []
    with torch.no_grad():
        for x_c, y_c in pieces:
            logits = lm_head(x_c).float()  # [b,V]
            counted = (y_c >= 0)[:, None]  # [b,1]
            y_c = y_c.clamp(min=0)[:, None]  # [b,1]
            log_sum = logits.logsumexp(-1, keepdim=True)  # [b,1]
            total = total + (log_sum - logits.gather(1, y_c)).where(counted, 0).sum()
            p = logits.sub_(log_sum).exp_()  # [b,V], in place of the logits
            p = p.scatter_add_(1, y_c, -torch.ones_like(log_sum)).mul_(counted)  # [b,V]
            x_grads.append(p.to(weight.dtype) @ weight)  # [b,D]
    # the added term is 0 and has the gradient x_grads
    return total + ((x - x.detach()) * torch.cat(x_grads).to(x.dtype)).sum()


def label_loss(hidden, answer, real, lm_head, weight=1.0):
    """
    Cross-entropy of the labels' tokens, averaged over these tokens (MSE-Adapter). Logits are
    computed for these few positions only; the release computes them for the whole prompt. hidden
    [B,n,D] after the final norm, answer [B,n], real [B,n] (False at padding); weight: lm_weight of
    lm_loss -> []
    """
    y = answer.masked_fill(~real, -100)  # [B,n]
    total = summed_cross_entropy(hidden.flatten(0, 1), y.flatten(), lm_head)  # []
    return total / real.sum() * weight


def deepmlf_loss(out, label, weights, task_loss=l1):
    """
    DeepMLF's objective (eqs. 13-14) without the LM loss: L1 of the task head plus weighted L1 of
    the audiovisual, text and fusion heads. The model adds the LM loss, because it has the hidden
    states.

    out: dict of predictions [B] under pred, av, text, fusion; weights: dict for av, text, fusion;
    task_loss: of the task head. Returns the dict of unweighted terms and their weighted sum, in
    which the task head has weight 1.
    """
    used = {k: w for k, w in weights.items() if w}
    terms = dict(task=task_loss(out['pred'], label)) | {k: l1(out[k], label) for k in used}
    return terms, terms['task'] + sum(w * terms[k] for k, w in used.items())


def mpr_loss(pred, label, gap, margin, slope):
    """
    CrossSent's monotonic pairwise ranking (MPR). The loss of a pair of clips i, j is

        max(0, m - s (p_i - p_j)),  s = sign(y_i - y_j),  m = margin + slope |y_i - y_j|

    with margin alpha and slope beta. It is averaged over all pairs whose labels differ by more than
    `gap` (delta). A batch without such a pair (one clip, or equal labels) gives a 0 that can be
    differentiated. pred, label [B] -> []. The formula is reconstructed from the paper's words,
    because its equations are images.
    """
    dy = label[:, None] - label  # [B,B]
    dp = pred[:, None] - pred  # [B,B]
    pairs = dy > gap  # [B,B], each pair once, in the order with s = 1
    missing = (margin + slope * dy - dp).clamp(min=0)  # [B,B]
    return (missing * pairs).sum() / pairs.sum().clamp(min=1)


def eioi_loss(pred, label, band, power=1.0):
    """
    CrossSent's error-interval loss (EIOI): the distance of each prediction to the interval
    [y - band, y + band], raised to `power`, averaged over the clips. pred, label [B] -> []. With a
    power below 1 the gradient at the edge of the interval would be infinite.
    """
    return ((pred - label).abs() - band).clamp(min=0).pow(power).mean()


def ordinal_loss(pred, label, k, batch):
    """
    CrossSent's two regularisers, weighted by the knobs `k` and by the ramp-up of the batch's epoch.
    Any system that predicts a score can add them. Returns the dict of unweighted terms and their
    weighted sum.
    """
    terms = {}
    if k['weight_mpr']:
        terms['mpr'] = mpr_loss(pred, label, k['mpr_gap'], k['mpr_margin'], k['mpr_slope'])
    if k['weight_eioi']:
        terms['eioi'] = eioi_loss(pred, label, k['eioi_band'], k['eioi_power'])
    return terms, ramp(k, batch) * sum(k['weight_' + name] * term for name, term in terms.items())


def head_loss(out, kind, k, batch, task_loss=l1):
    """
    The loss of a head that reads a score, out [B,1], or classes, out [B,K] -> dict(loss, terms):
    task_loss and the ordinal losses, or cross-entropy. kind: of the label; k: the knobs
    (OrdinalKnobs).
    """
    label = batch['label']  # [B]
    if kind == 'classes':
        task = F.cross_entropy(out, label)
        return dict(loss=task, terms={'task': task})
    task = task_loss(out[:, 0], label)
    ordinal_terms, ordinal = ordinal_loss(out[:, 0], label, k, batch)
    return dict(loss=task + ordinal, terms={'task': task} | ordinal_terms)


def ramp(k, batch):
    """
    The factor of the regularisers' weights in the batch's epoch, counted from 0: a cosine from 0 to
    1. -> []
    """
    if not k['ramp_epochs'] or 'epoch' not in batch:
        return 1.0
    done = (batch['epoch'].double() / k['ramp_epochs']).clamp(max=1)
    return (0.5 - 0.5 * torch.cos(math.pi * done)).float()


class RankLevels(nn.Module):
    """
    The rank-consistent output of CORAL (Cao, Mirjalili, Raschka 2020, eqs. 1-5), in place of the
    task loss of any system that predicts a score. CORAL is for ordered classes; CrossSent's paper
    names it, and does not state how it would be applied to scores.

    The range of the label is divided into K levels. Threshold t_k is between level k and the next,
    and a binary task asks whether the label is above it: P(y > t_k) = sigmoid(score + b_k). All
    tasks share the weights behind the score and differ in b_k alone, so their answers are
    consistent: at the optimum b_1 >= b_2 >= .. (Theorem 1). The loss is the binary cross-entropy of
    all tasks, with equal weights. It is their mean; the paper has the sum, which grows with K.

    b_k starts at -t_k, so that the first predictions are the scores. (The release starts all b_k at
    0, and the authors' later package spaces them from 1 to 0. With many levels and few steps they
    would hardly separate.)
    """
    def __init__(self, low, high, step):
        """ low, high: the lowest and the highest level; step: between levels, in label units. """
        super().__init__()
        n = round((high - low) / step)
        if n < 1 or abs(n * step - (high - low)) > 1e-6:
            raise ModelError(f"level_step={step:g} does not divide the range of the labels, "
                             f"{low:g} to {high:g}, into equal levels: choose a divisor.")
        self.low, self.step = low, step
        thresholds = low + step * (torch.arange(n) + 0.5)  # [K-1]
        self.register_buffer('thresholds', thresholds, persistent=False)
        self.biases = nn.Parameter(-thresholds)

    def forward(self, score):
        """ score [B] -> logits of P(y > t_k) [B,K-1]. """
        return score[:, None] + self.biases

    def loss(self, logits, label):
        """ logits [B,K-1], label [B] -> [] """
        above = (label[:, None] > self.thresholds).float()  # [B,K-1]
        return F.binary_cross_entropy_with_logits(logits, above)

    def score(self, logits):
        """ The level that as many thresholds are below as have P > 0.5: [B,K-1] -> [B]. """
        n_above = (logits > 0).sum(-1)  # [B]
        score = self.low + self.step * n_above  # [B]
        return score.where(logits.isfinite().all(-1), torch.nan)  # a count would hide a NaN


def ordinal_errors(k):
    """ Error sentences on knobs of the regularisers that cannot work together, as a list. """
    errors = []
    if k['weight_mpr'] and k['batch_size'] == 1:
        errors += ["weight_mpr needs pairs of clips: set batch_size to at least 2"]
    used = [knob for knob in NEED_A_SCORE if k[knob] and knob != 'level_step']
    if k['level_step'] and used:
        errors += [f"level_step (CORAL) replaces the loss of the score, and {used[0]} compares a "
                   "score in label units: set one of them to 0"]
    if 0 < k['level_step'] < 0.001:
        errors += [f"level_step={k['level_step']:g} must be 0, or at least 0.001"]
    return errors


def ordinal_notes(k, labels, n_epochs):
    """
    Sentences about regularisers that have less effect than their knobs suggest. labels [N]: of the
    train split; n_epochs: of the run.
    """
    notes, last_epoch = [], math.ceil(n_epochs) - 1
    used = [name for name in ('mpr', 'eioi') if k['weight_' + name]]
    if used and k['ramp_epochs']:
        names, rise, they = f'weight_{used[0]}', 'rises', 'it is'
        if len(used) > 1:
            names, rise, they = 'weight_mpr and weight_eioi', 'rise', 'they are'
        notes.append(f"{names} {rise} from 0 over ramp_epochs={k['ramp_epochs']:g} epochs, one "
                     f"step an epoch: in the first epoch {they} 0")
    if used and k['ramp_epochs'] > last_epoch:
        notes.append(f"ramp_epochs={k['ramp_epochs']:g} ends after the last epoch ({last_epoch}, "
                     "counted from 0): "
                     f"{' and '.join('weight_' + name for name in used)} never in full")
    if k['weight_mpr'] and k['mpr_gap'] >= labels.max() - labels.min():
        notes.append(f"mpr_gap={k['mpr_gap']:g} is not smaller than the range of the labels: MPR "
                     "has no pair to rank")
    allowed = (1 - k['mpr_slope']) * k['mpr_gap']
    if k['weight_mpr'] and k['mpr_margin'] > allowed + 1e-9:
        notes.append(f"mpr_margin={k['mpr_margin']:g} is larger than (1 - mpr_slope) mpr_gap = "
                     f"{allowed:g}: MPR will punish even perfect predictions")
    return notes


def units_note(terms, units, info):
    """
    A sentence on the units of a run's loss terms. terms: their names; units {term: unit}: of the
    system; info: the label's entry in meta.json.
    """
    if info['kind'] == 'classes':
        units = units | dict(task='nats per clip')
    groups = {}
    for name in sorted(set(terms) - {'loss'}):
        groups.setdefault(units.get(name, 'a scale of its own'), []).append(name)
    parts = [f"{', '.join(names)} in {unit}" for unit, names in groups.items()]
    whole = '' if len(terms) == 1 else '; loss is their weighted sum'
    return f"loss terms: {'; '.join(parts)}{whole}"
