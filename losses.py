"""
The losses. Each is a few lines, takes tensors and returns a scalar that a graph hangs on.

Axis letters: B clips, T text tokens, D LM width, V vocabulary.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def l1(pred, label):
    """ Mean absolute error over the clips of a batch. pred, label [B] -> []. """
    return (pred - label).abs().mean()


def mse(pred, label):
    """ Mean squared error. pred, label of one shape -> []. """
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


def ordinal_loss(pred, label, c, ramp):
    """ The two regularisers of CrossSent as the knobs `c` weigh them, times the ramp-up of this
    epoch: (terms, their weighted sum). Any system that predicts a score may add them. """
    terms = {}
    if c['weight_mpr']:
        terms['mpr'] = mpr_loss(pred, label, c['mpr_gap'], c['mpr_margin'], c['mpr_slope'])
    if c['weight_eioi']:
        terms['eioi'] = eioi_loss(pred, label, c['eioi_band'], c['eioi_power'])
    return terms, ramp * sum(c['weight_' + k] * v for k, v in terms.items())
