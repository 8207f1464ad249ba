"""
MMIM: mutual information between streams, and between the fused vector and each stream, is
maximised.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from baselines.base import Pooled, Recurrent
from baselines.vectors import SubNetKnobs
from configurator import AtLeast


class MMIM(Pooled):
    """
    MMIM (Han et al. 2021). v_t is the sentence vector, v_a and v_v come from LSTMs; the fused
    vector z comes from two layers on [v_t; v_a; v_v]. Loss: L1, less two lower bounds of mutual
    information (MI).

    Between text and audio, and between text and video, the bound is that of Barber and Agakov:
    I(v_t; v_m) >= H(v_m) + E log q(v_m | v_t), with a Gaussian q and an estimate of the entropy H
    (Entropy). Between z and each stream, the bound is contrastive predictive coding (CPC): v_m must
    fit the vector predicted from its own z better than those of the other clips of the batch.

    One optimizer step trains both parts, each by its own term: q by its likelihood, with v_t and
    v_m fixed, and all other weights by the rest of the loss, with q fixed. (In the release, q is
    trained in a pass over the train split before each epoch.)

    Sources: the paper's abstract and its release (github.com/declare-lab/Multimodal-Infomax); we
    could not read the paper's equations. As in the release, log q lacks the variance's own term, in
    two places. In the bound: with the term the loss has no lower limit, because v_a and v_v can
    shrink to a constant while H, which is estimated from projected vectors, falls less. In the
    likelihood that trains q: without the term the variance grows without limit, so log q fades out
    of the bound. With the term there, training was worse on the toy corpus (LOG.md, 2026-11-27).
    """

    class Knobs(Pooled.Knobs, SubNetKnobs):
        sub_widths: AtLeast(1) = [128, 16, 16]  # text (not used), audio, vision: LSTM, v_m
        post_width: AtLeast(1) = 128     # width of the fused vector
        mmim_cpc: AtLeast(0) = 0.1       # alpha, weight of CPC
        mmim_bound: AtLeast(0) = 0.1     # beta, weight of the bound between text and audio, video

    scorer = 'out'
    one_process = True  # because the entropy is estimated from clips of the last batch

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        _, d_a, d_v = k['sub_widths']
        _, p_a, p_v = k['sub_dropouts']
        d = k['post_width']
        self.audio = Recurrent(facts.widths['audio'], d_a, d_a, p_a)
        self.vision = Recurrent(facts.widths['vision'], d_v, d_v, p_v)
        widths = dict(text=D, audio=d_a, vision=d_v)
        self.fusion = nn.Sequential(
            nn.Dropout(k['dropout']), nn.Linear(sum(widths.values()), d), nn.Tanh(),
            nn.Linear(d, d), nn.Tanh())
        self.out = nn.Linear(d, self.n_out)
        self.predictors = nn.ModuleDict({m: nn.Linear(d, width) for m, width in widths.items()})
        self.q = nn.ModuleDict({m: Gaussian(D, widths[m]) for m in ('audio', 'vision')})
        n_groups = self.n_out if self.kind == 'classes' else 2
        self.entropies = nn.ModuleDict({
            m: Entropy(widths[m], n_groups, k['batch_size']) for m in ('audio', 'vision')})

    def fuse(self, x, batch):
        v = dict(text=self.text_vector(x, batch),
                 audio=self.audio(batch['audio'], batch['audio_len']),
                 vision=self.vision(batch['vision'], batch['vision_len']))  # [B,d_m] each
        z = self.fusion(torch.cat(list(v.values()), -1))  # [B,d]
        vectors = {'vector_' + m: y for m, y in v.items()}
        return dict(pred=self.answer(self.out(z)), fused=z) | vectors

    def groups(self, label):
        """ The groups of clips whose vectors have a Gaussian each: classes, or negative and
        positive scores (as in the release). label [B] -> [B]; -1 for a score of 0, in neither. """
        if self.kind == 'classes':
            return label
        return torch.where(label == 0, -1, (label > 0).long())

    def own_loss(self, out, batch):
        z, text = out['fused'], out['vector_text']  # [B,d], [B,D]
        with torch.autocast(z.device.type, enabled=False):
            cpc = sum(contrast(out['vector_' + m], predictor(z))
                      for m, predictor in self.predictors.items())
            group = self.groups(batch['label'])  # [B]
            likelihood = bound = 0.0
            for m, q in self.q.items():
                y = out['vector_' + m]  # [B,d_m]
                likelihood = likelihood + q(text.detach(), y.detach())
                fixed = {name: p.detach() for name, p in q.named_parameters()}
                bound = bound + functional_call(q, fixed, (text, y)) + self.entropies[m](y, group)
        return dict(cpc=(cpc, self.k['mmim_cpc']), bound=(bound, -self.k['mmim_bound']),
                    q=(-likelihood, 1.0))

    def forward(self, batch):
        """ dict(loss, terms, vectors); after_step needs the vectors of audio and video. """
        out = self.run(batch)
        vectors = {m: out['vector_' + m].detach() for m in self.entropies}  # [B,d_m] each
        return self.loss(out, batch) | dict(vectors=vectors)

    def after_step(self, batch, out):
        group = self.groups(batch['label'])  # [B]
        for m, entropy in self.entropies.items():
            entropy.remember(out['vectors'][m], group)


class Gaussian(nn.Module):
    """ log q(y | x) of a Gaussian with independent features, whose mean and log variance are
    networks of two layers. """
    def __init__(self, width, d):
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(width, d), nn.ReLU(), nn.Linear(d, d))
        self.log_var = nn.Sequential(nn.Linear(width, d), nn.ReLU(), nn.Linear(d, d))

    def forward(self, x, y):
        """ x [B,width], y [B,d] -> the mean of log q over the clips, without its constant and
        without the variance's own term []. """
        square = (y - self.mean(x)).square() / self.log_var(x).exp()  # [B,d]
        return -0.5 * square.sum(-1).mean()


class Entropy(nn.Module):
    """
    MMIM's estimate of the entropy of a stream's vectors: one Gaussian for each group of clips, all
    groups with equal weight. H = mean over groups of 1/2 log det of its covariance, without the
    constant. The covariance is that of this batch and the one before, of vectors that a fixed random
    layer has brought to a quarter of their width, so that there are more clips than features.
    """
    def __init__(self, width, n_groups, n_clips):
        """ n_clips: of the largest batch. """
        super().__init__()
        d = max(1, width // 4)
        self.n_groups = n_groups
        self.register_buffer('weight', nn.init.xavier_normal_(torch.empty(d, width)))  # [d,width]
        self.register_buffer('memory', torch.zeros(n_clips, width))  # [n,width]
        self.register_buffer('memory_group', torch.full((n_clips,), -1))  # [n], -1: in no group

    def forward(self, y, group):
        """ y [B,width], group [B], from 0, -1 for no group -> []. """
        y = torch.tanh(torch.cat([y, self.memory]) @ self.weight.T)  # [B+n,d]
        group = torch.cat([group, self.memory_group])  # [B+n]
        H = 0.0
        for i in range(self.n_groups):
            H = H + 0.5 * torch.logdet(covariance(y, group == i)) / self.n_groups
        return H

    @torch.no_grad()
    def remember(self, y, group):
        """ Stores the vectors y [B,width] and the groups [B] of a batch for the next one. """
        self.memory[:len(y)] = y
        self.memory_group.fill_(-1)
        self.memory_group[:len(y)] = group


def covariance(y, mask, least=1e-4):
    """ The covariance [d,d] of the rows of y [n,d] in mask [n]. `least` is added to the variances,
    so that few rows have a finite log det. """
    weight = mask.float()[:, None] / mask.sum().clamp(min=1)  # [n,1]
    x = y - (weight * y).sum(0)  # [n,d]
    return (weight * x).T @ x + least * torch.eye(y.shape[1], device=y.device)


def contrast(x, predicted):
    """ The loss of CPC for vectors x and predictions of them, [B,d] each -> []: cross-entropy of
    which prediction belongs to which vector, by cosine similarity. """
    x, predicted = F.normalize(x, dim=-1), F.normalize(predicted, dim=-1)  # [B,d] each
    similarity = x @ predicted.T  # [B,B]
    return F.cross_entropy(similarity, torch.arange(len(x), device=x.device))
