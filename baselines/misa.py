"""
MISA: a private and a shared vector for each stream.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import EncoderLayer, last_step, masked_mean, reverse
from baselines.base import Attentive
from configurator import AtLeast
from losses import UNITS, mse


class MISA(Attentive):
    """
    MISA (Hazarika et al. 2020): each stream has a private and a shared vector, and a Transformer
    layer attends over all six. Losses: MSE; difference, which makes private and shared vectors
    orthogonal; similarity, which makes the shared vectors alike (CMD of 5 moments); reconstruction
    of each stream from the sum of its two vectors. Audio and video are read to their own lengths
    (MMSA packs them by the text's length). Unlike the release, the Transformer layer is pre-norm
    with GELU, not post-norm with ReLU, and the difference loss has a gradient through the norms.
    """

    class Knobs(Attentive.Knobs):
        misa_diff: AtLeast(0) = 0.1     # weight of the difference loss
        misa_sim: AtLeast(0) = 0.3      # weight of the similarity loss
        misa_rebuild: AtLeast(0) = 1.0  # weight of the reconstruction loss
        lr_audio: AtLeast(0) = 1.0      # learning rate of the audio LSTMs, as a multiple of lr
        lr_vision: AtLeast(0) = 1.0     # learning rate of the video LSTMs, as a multiple of lr

    score_loss = staticmethod(mse)
    units = UNITS | dict(task='squared label units')
    lr_parts = ('encoder', 'audio', 'vision')
    scorer = 'head'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        d, widths = k['fusion_width'], facts.widths

        def enter(width):
            return nn.Sequential(nn.Linear(width, d), nn.ReLU(), nn.LayerNorm(d))

        self.audio = StackedLSTMs(widths['audio'])
        self.vision = StackedLSTMs(widths['vision'])
        read = dict(text=D, audio=4 * widths['audio'], vision=4 * widths['vision'])
        self.enter = nn.ModuleDict({m: enter(width) for m, width in read.items()})
        self.private = nn.ModuleDict({m: nn.Linear(d, d) for m in read})
        self.shared = nn.Linear(d, d)
        self.rebuild = nn.ModuleDict({m: nn.Linear(d, d) for m in read})
        self.layer = EncoderLayer(d, k['fusion_heads'], k['dropout'])
        self.head = nn.Sequential(
            nn.Linear(6 * d, 3 * d), nn.Dropout(k['dropout']), nn.ReLU(),
            nn.Linear(3 * d, self.n_out))

    def fuse(self, x, batch):
        v = dict(text=masked_mean(x, batch['text_mask']),
                 audio=self.audio(batch['audio'], batch['audio_len']),
                 vision=self.vision(batch['vision'], batch['vision_len']))  # [B,d_m] each
        x = torch.stack([enter(v[m]) for m, enter in self.enter.items()], 1)  # [B,3,d]
        private = torch.stack([torch.sigmoid(f(x[:, i]))
                               for i, f in enumerate(self.private.values())], 1)  # [B,3,d]
        shared = torch.sigmoid(self.shared(x))  # [B,3,d]
        rebuilt = torch.stack([f((private + shared)[:, i])
                               for i, f in enumerate(self.rebuild.values())], 1)  # [B,3,d]
        y = self.layer(torch.cat([private, shared], 1), None)  # [B,6,d]
        pred = self.answer(self.head(y.flatten(1)))  # [B] or [B,K]
        return dict(pred=pred, x=x, private=private, shared=shared, rebuilt=rebuilt)

    def own_loss(self, out, batch):
        k = self.k
        p = out['private'].unbind(1)  # 3x [B,d]
        s = out['shared'].unbind(1)  # 3x [B,d]
        pairs = [(0, 1), (0, 2), (1, 2)]
        diff = (sum(orthogonality(p[i], s[i]) for i in range(3))
                + sum(orthogonality(p[i], p[j]) for i, j in pairs))
        sim = sum(cmd(s[i], s[j]) for i, j in pairs) / 3
        rebuild = mse(out['rebuilt'], out['x'])
        return dict(diff=(diff, k['misa_diff']), sim=(sim, k['misa_sim']),
                    rebuild=(rebuild, k['misa_rebuild']))


class StackedLSTMs(nn.Module):
    """ MISA's audio or video sub-network: two bidirectional LSTMs with a LayerNorm between them.
    Returns the final states of both directions of both LSTMs. """
    def __init__(self, width):
        super().__init__()
        widths_in = (width, width, 2 * width, 2 * width)
        self.lstms = nn.ModuleList(nn.LSTM(n, width, batch_first=True) for n in widths_in)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x, lengths):
        """ x [B,S,width], lengths [B] -> [B,4 width]. """
        forward_1 = self.lstms[0](x)[0]  # [B,S,width]
        backward_1 = self.lstms[1](reverse(x, lengths))[0]  # [B,S,width]
        y = self.norm(torch.cat([forward_1, reverse(backward_1, lengths)], -1))  # [B,S,2 width]
        forward_2 = self.lstms[2](y)[0]  # [B,S,width]
        backward_2 = self.lstms[3](reverse(y, lengths))[0]  # [B,S,width]
        states = (forward_1, forward_2, backward_1, backward_2)
        return torch.cat([last_step(h, lengths) for h in states], -1)  # [B,4 width]


def orthogonality(x, y):
    """ MISA's difference loss for x, y [B,d] -> []. Centres both over the batch, scales each clip
    to norm 1, and returns the mean square of the entries of x^T y. """
    x = F.normalize(x - x.mean(0), dim=1, eps=1e-6)  # [B,d]
    y = F.normalize(y - y.mean(0), dim=1, eps=1e-6)  # [B,d]
    return (x.T @ y).square().mean()


def cmd(x, y, n_moments=5):
    """ Central Moment Discrepancy (Zellinger et al. 2017) between x and y, [B,d] each -> []. """
    x_0 = x.mean(0)  # [d]
    y_0 = y.mean(0)  # [d]
    gaps = [x_0 - y_0]
    for n in range(2, n_moments + 1):
        gaps.append((x - x_0).pow(n).mean(0) - (y - y_0).pow(n).mean(0))  # [d]
    return sum(torch.linalg.vector_norm(gap) for gap in gaps)
