"""
The losses. Each is a few lines, takes tensors and returns a scalar that a graph hangs on.

Axis letters: B clips, T text tokens, D LM width, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import AtLeast
from run.errors import ModelError


class OrdinalKnobs:
    """ The ordinal regularisers of CrossSent, for any system that predicts a score by a head. """
    weight_mpr: AtLeast(0) = 0.0   # of pairwise ranking; both weights ramp up by a cosine
    weight_eioi: AtLeast(0) = 0.0  # of the error outside a tolerance band
    mpr_gap: AtLeast(0) = 0.5      # delta: pairs whose labels are further apart than this
    mpr_margin: AtLeast(0) = 0.1   # alpha: margin of a pair, at least
    mpr_slope: AtLeast(0) = 0.5    # beta: and this much more for each unit of label difference
    eioi_band: AtLeast(0) = 0.25   # epsilon: half width of the band
    eioi_power: AtLeast(1) = 1.0   # of the error outside the band; below 1 the gradient at its edge is infinite
    ramp_epochs: AtLeast(0) = 5.0  # length of the ramp-up


def refuse_other_shape(pred, label):
    """ Raises ModelError where a loss would broadcast: [B,1] against [B] gives a mean over [B,B]. """
    if pred.shape != label.shape:
        raise ModelError(f"predictions of shape {list(pred.shape)} do not fit labels of shape "
                         f"{list(label.shape)}: give one number a clip.")


def l1(pred, label):
    """ Mean absolute error over the clips of a batch. pred, label [B] -> []. """
    refuse_other_shape(pred, label)
    return (pred - label).abs().mean()


def mse(pred, label):
    """ Mean squared error. pred, label of one shape -> []. """
    refuse_other_shape(pred, label)
    return (pred - label).square().mean()


def lm_loss(hidden, batch, lm_head, chunk=128):
    """
    Next-token cross-entropy, the mean over the batch's real targets (DeepMLF eq. 5, with the mean
    for the sum).

    A target is a real token that has a token before it, so a clip of n tokens has n-1 targets,
    padding has none and the last token is not asked for an end-of-text (the release asks for the
    padding id there). Logits exist for these positions only, `chunk` of them at a time: at GPT-2's
    vocabulary 32 clips x 62 slots of them would be 0.4 GB, and their gradient as much again.

    hidden [B,T,D] after the LM's final norm; batch: tokens [B,T], targets [n], and while training
    lm_weight: the share of this micro-batch's targets in those of the step over its share of the
    clips, so that a mean over clips of micro-batches is the mean over the targets of all of them
    -> []
    """
    at = batch['targets']  # [n]
    x = hidden.flatten(0, 1)[at]  # [n,D]
    y = batch['tokens'].flatten()[at + 1]  # [n]
    if len(y) == 0:  # clips of one token each: nothing to predict, but a graph to keep
        return hidden.sum() * 0.0
    return summed_cross_entropy(x, y, lm_head, chunk) / len(y) * batch.get('lm_weight', 1.0)


def summed_cross_entropy(x, y, lm_head, chunk=128):
    """ The sum over rows of -log p(y): x [n,D] hidden states, y [n] tokens (-100: not asked) -> [].
    Logits are kept for no more than `chunk` rows. """
    def summed(x, y):
        return F.cross_entropy(lm_head(x).float(), y, reduction='sum')

    if len(y) <= chunk:
        return summed(x, y)  # as few as a batch of labels
    pieces = list(zip(x.split(chunk), y.split(chunk)))
    weight = getattr(lm_head, 'weight', None)  # [V,D]
    if weight is None or weight.requires_grad:
        sums = [checkpoint(summed, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces]
        return torch.stack(sums).sum()

    # a frozen head: only x wants a gradient, (p - one hot) W, and it is taken while the logits are
    # there: no second time
    total, slope = 0.0, []
    with torch.no_grad():
        for x_c, y_c in pieces:
            logits = lm_head(x_c).float()  # [b,V]
            asked = (y_c >= 0)[:, None]  # [b,1]
            y_c = y_c.clamp(min=0)[:, None]  # [b,1]
            scale = logits.logsumexp(-1, keepdim=True)  # [b,1]
            total = total + (scale - logits.gather(1, y_c)).where(asked, 0).sum()
            p = logits.sub_(scale).exp_()  # [b,V], in place of the logits
            p = p.scatter_add_(1, y_c, -torch.ones_like(scale)).mul_(asked)  # [b,V]
            slope.append(p.to(weight.dtype) @ weight)  # [b,D]
    return total + ((x - x.detach()) * torch.cat(slope).to(x.dtype)).sum()


def label_loss(hidden, answer, real, lm_head, weight=1.0):
    """
    Cross-entropy of the label's tokens alone, the mean over them (MSE-Adapter): logits exist for
    these few positions, where the release has them for the whole prompt. hidden [B,n,D] after the
    final norm, answer [B,n], real [B,n]; weight: lm_weight of lm_loss -> []
    """
    y = answer.masked_fill(~real, -100)  # [B,n]
    total = summed_cross_entropy(hidden.flatten(0, 1), y.flatten(), lm_head)  # []
    return total / real.sum() * weight


def deepmlf_loss(out, label, weights):
    """
    DeepMLF's objective (eqs. 12-14): L1 of the task head, plus weighted L1 of the audiovisual, text
    and fusion heads. The LM loss is added by the model, which has the hidden states.

    out: dict of predictions [B] under pred, av, text, fusion; weights: dict for av, text, fusion.
    Returns the dict of terms, unweighted, and their weighted sum.
    """
    used = {k: w for k, w in weights.items() if w}
    terms = dict(task=l1(out['pred'], label)) | {k: l1(out[k], label) for k in used}
    return terms, terms['task'] + sum(w * terms[k] for k, w in used.items())


def mpr_loss(pred, label, gap, margin, slope):
    """
    CrossSent's monotonic pairwise ranking: over all pairs whose labels are more than `gap` (delta)
    apart, the mean of max(0, m - s (p_i - p_j)), s = sign(y_i - y_j),
    m = margin + slope |y_i - y_j| (alpha, beta). A batch without such a pair (one clip, all ties)
    gives 0, with a graph. pred, label [B] -> []. Equations reconstructed: the paper's are images.
    """
    dy = label[:, None] - label  # [B,B]
    dp = pred[:, None] - pred  # [B,B]
    pairs = dy > gap  # [B,B], each pair once, s = 1
    short = (margin + slope * dy - dp).clamp(min=0)  # [B,B]
    return (short * pairs).sum() / pairs.sum().clamp(min=1)


def eioi_loss(pred, label, band, power=1.0):
    """ CrossSent's error-interval loss: how far a prediction is outside [y - band, y + band], to a
    power. -> []. """
    return ((pred - label).abs() - band).clamp(min=0).pow(power).mean()


def ordinal_loss(pred, label, k, batch):
    """
    The two regularisers of CrossSent as the knobs `k` weigh them, times the ramp-up of the batch's
    epoch: (terms, their weighted sum). Any system that predicts a score may add them.
    """
    terms = {}
    if k['weight_mpr']:
        terms['mpr'] = mpr_loss(pred, label, k['mpr_gap'], k['mpr_margin'], k['mpr_slope'])
    if k['weight_eioi']:
        terms['eioi'] = eioi_loss(pred, label, k['eioi_band'], k['eioi_power'])
    return terms, ramp(k, batch) * sum(k['weight_' + name] * term for name, term in terms.items())


def ramp(k, batch):
    """
    How much of the regularisers' weights counts in the batch's epoch (from 0): a cosine from 0 to
    1. -> []
    """
    if not k['ramp_epochs'] or 'epoch' not in batch:
        return 1.0
    done = (batch['epoch'].double() / k['ramp_epochs']).clamp(max=1)
    return (0.5 - 0.5 * torch.cos(math.pi * done)).float()


def wrong_ordinal(k):
    """ Sentences about knobs of the regularisers that cannot work. """
    if k['weight_mpr'] and k['batch_size'] == 1:
        return ["weight_mpr needs pairs of clips: a batch_size of at least 2"]
    return []


def ordinal_notes(k, labels, n_epochs):
    """
    Sentences about regularisers that do less than one may think. labels [N]: of the train split.
    """
    notes = []
    if (k['weight_mpr'] or k['weight_eioi']) and k['ramp_epochs'] > n_epochs:   # epochs count from 0
        notes.append(f"ramp_epochs={k['ramp_epochs']:g} does not end within this run's epochs: the "
                     "regularisers never count in full")
    if k['weight_mpr'] and k['mpr_gap'] >= labels.max() - labels.min():
        notes.append(f"mpr_gap={k['mpr_gap']:g} is as large as the labels' whole range: MPR has no "
                     "pair to rank")
    allowed = (1 - k['mpr_slope']) * k['mpr_gap']
    if k['weight_mpr'] and k['mpr_margin'] > allowed + 1e-9:
        notes.append(f"mpr_margin={k['mpr_margin']:g} is over (1 - mpr_slope) mpr_gap = "
                     f"{allowed:g}: MPR will punish even perfect predictions")
    return notes
