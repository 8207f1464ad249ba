"""
The baselines that read each stream as one vector: late fusion, LF-DNN, TFN and LMF.
"""
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import masked_mean
from baselines.base import MODALITIES, Baseline, Head, Pooled, Recurrent
from configurator import AtLeast, Share
from run.errors import ModelError


class SubNetKnobs:
    sub_widths: AtLeast(1) = [128, 16, 128]  # hidden widths of the text, audio, vision sub-networks
    sub_dropouts: Share() = [0.2, 0.2, 0.2]  # dropout in the text, audio, vision sub-networks


class Norm(nn.BatchNorm1d):
    """ BatchNorm over features. A training batch of one clip has no variance, so it is normalised
    with the running statistics. """
    def forward(self, x):
        """ x [B,d] -> [B,d]. """
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                False, 0.0, self.eps)
        return super().forward(x)


class SubNet(nn.Module):
    """ TFN's audio or video sub-network: the mean over real frames (MMSA averages over padding
    too), BatchNorm, dropout, three linear layers with ReLU. """
    def __init__(self, width, d, dropout):
        super().__init__()
        self.norm = Norm(width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([nn.Linear(width, d), nn.Linear(d, d), nn.Linear(d, d)])

    def forward(self, x, mask):
        """ x [B,S,width], mask [B,S] -> [B,d]. """
        x = self.dropout(self.norm(masked_mean(x, mask)))  # [B,width]
        for layer in self.layers:
            x = F.relu(layer(x))  # [B,d]
        return x


class Late(Pooled):
    """ Late fusion, the control without interaction between streams. Each stream of late_streams
    gives a score, from a linear layer on the sentence vector or on an LSTM's last state; pred is
    their sum. For classes, the logits are summed. With one stream it is a unimodal system. """

    class Knobs(Pooled.Knobs, SubNetKnobs):
        late_streams: Literal['text', 'audio', 'vision'] = ['text', 'audio', 'vision']  # summed

    needed_streams = ()

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        if missing := [m for m in k['late_streams'] if m != 'text' and m not in facts.widths]:
            raise ModelError(f"late_streams={k['late_streams']} lists {missing[0]}, but this "
                             f"corpus has no {missing[0]}: leave it out.")
        self.readers = nn.ModuleDict()   # each gives a score or the logits of the classes
        for m, d, p in zip(MODALITIES, k['sub_widths'], k['sub_dropouts']):
            if m == 'text' and m in k['late_streams']:
                self.readers[m] = nn.Linear(D, self.n_out)
            elif m in k['late_streams']:
                self.readers[m] = Recurrent(facts.widths[m], d, self.n_out, p)

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if not cls.modalities_read(k):
            errors += [f"late_streams={k['late_streams']} lists no stream that is read: add 'text', "
                       "or a stream of modalities"]
        return errors

    @classmethod
    def modalities_read(cls, k):
        return [m for m in k['late_streams'] if m == 'text' or m in cls.streams(k)]

    @classmethod
    def frozen_features(cls, k):
        return super().frozen_features(k) and 'text' in cls.modalities_read(k)

    def text(self, batch):
        """ Hidden states of the text [B,T,D]; if no reader uses the text, a placeholder [B,1]. """
        return super().text(batch) if 'text' in self.readers else batch['index'][:, None]

    def fuse(self, x, batch):
        scores = {}
        for m, reader in self.readers.items():
            if m == 'text':
                y = reader(self.text_vector(x, batch))  # [B,n_out]
            else:
                y = reader(batch[m], batch[m + '_len'])  # [B,n_out]
            scores[m] = self.answer(y)  # [B] or [B,K]
        return dict(pred=sum(scores.values())) | scores


class Vectors(Baseline):
    """ The base class of LF-DNN, TFN and LMF, which fuse one vector per stream, v_m [B,d_m]: of
    text by an LSTM, of audio and video by SubNets. """

    class Knobs(Baseline.Knobs, SubNetKnobs):
        text_out: AtLeast(1) = 128    # width of the text's vector
        lr_audio: AtLeast(0) = 1.0    # learning rate of the audio SubNet, as a multiple of lr
        lr_vision: AtLeast(0) = 1.0   # learning rate of the video SubNet, as a multiple of lr

    lr_parts = ('encoder', 'audio', 'vision')
    one_process = True  # because of BatchNorm

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        hidden, d_a, d_v = k['sub_widths']
        p_t, p_a, p_v = k['sub_dropouts']
        d_t = k['text_out']
        self.text_net = Recurrent(D, hidden, d_t, p_t)
        self.audio = SubNet(facts.widths['audio'], d_a, p_a)
        self.vision = SubNet(facts.widths['vision'], d_v, p_v)
        self.widths = dict(audio=d_a, vision=d_v, text=d_t)

    def vectors(self, x, batch):
        """ v_a, v_v, v_t, in MMSA's order. """
        v_a = self.audio(batch['audio'], batch['audio_mask'])  # [B,d_a]
        v_v = self.vision(batch['vision'], batch['vision_mask'])  # [B,d_v]
        v_t = self.text_net(x, batch['text_len'])  # [B,d_t]
        return v_a, v_v, v_t


class LFDNN(Vectors):
    """ LF-DNN, the late-fusion network of MMSA (Cambria et al. 2017): the three vectors
    concatenated, then a Head. """

    class Knobs(Vectors.Knobs):
        post_width: AtLeast(1) = 128  # hidden width of the Head

    scorer = 'head'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        width = sum(self.widths.values())
        self.head = Head(width, k['post_width'], k['dropout'], self.n_out)

    def fuse(self, x, batch):
        y, _ = self.head(torch.cat(self.vectors(x, batch), -1))  # [B,n_out]
        return dict(pred=self.answer(y))


class TFN(Vectors):
    """ Tensor Fusion Network (Zadeh et al. 2017, eq. 5): the outer product of [1; v_a], [1; v_v]
    and [1; v_t], then a Head. A sigmoid scales the score to the label range of the corpus (MMSA
    always scales it to (-3, 3)). With CORAL the sigmoid is left out, because its score has
    no limits. """

    class Knobs(Vectors.Knobs):
        post_width: AtLeast(1) = 128  # hidden width of the Head

    scorer = 'head'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        self.range = None if k['level_step'] else facts.labels[k['label']].get('range')  # or classes
        n = 1
        for width in self.widths.values():
            n *= 1 + width
        self.head = Head(n, k['post_width'], k['dropout'], self.n_out)

    def fuse(self, x, batch):
        a, v, t = (F.pad(y, (1, 0), value=1.0) for y in self.vectors(x, batch))  # [B,1+d_m] each
        tensor = torch.einsum('bi,bj,bk->bijk', a, v, t).flatten(1)  # [B,(1+d_a)(1+d_v)(1+d_t)]
        y, _ = self.head(tensor)  # [B,n_out]
        pred = self.answer(y)  # [B] or [B,K]
        if self.range:
            low, high = self.range
            pred = low + (high - low) * torch.sigmoid(pred)  # [B]
        return dict(pred=pred, tensor=tensor)


class LMF(Vectors):
    """ Low-rank Multimodal Fusion (Liu et al. 2018, eq. 8): y = sum_r w_r prod_m [1; v_m] F_m,r +
    b. This is TFN's outer product times a weight tensor of rank R, computed without forming the
    outer product. Here w and b are trained; MMSA does not pass them to the optimizer. """

    class Knobs(Vectors.Knobs):
        lmf_rank: AtLeast(1) = 3      # R, rank of the weight tensor
        lr_factors: AtLeast(0) = 1.0  # learning rate of the factors F, as a multiple of lr

    lr_parts = ('encoder', 'audio', 'vision', 'factors')

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        R, n_out = k['lmf_rank'], self.n_out
        self.factors = nn.ParameterDict()
        for m, d in self.widths.items():
            factor = nn.init.xavier_normal_(torch.empty(R, 1 + d, n_out))  # [R,1+d_m,n_out]
            factor = factor.permute(2, 0, 1).reshape(n_out * R, 1 + d)  # [n_out R,1+d_m]
            self.factors[m] = nn.Parameter(factor)
        self.fusion_weights = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, R)))  # [1,R]
        self.fusion_bias = nn.Parameter(torch.zeros(n_out))

    def fuse(self, x, batch):
        ones = [F.pad(y, (1, 0), value=1.0) for y in self.vectors(x, batch)]  # 3x [B,1+d_m]
        # iterate over self.widths: a ParameterDict sorts its names
        a, v, t = (y @ self.factors[m].T for y, m in zip(ones, self.widths))  # 3x [B,n_out R]
        y = (a * v * t).unflatten(1, (self.n_out, -1))  # [B,n_out,R]
        y = (y @ self.fusion_weights.T)[..., 0] + self.fusion_bias  # [B,n_out]
        return dict(pred=self.answer(y))
