"""
The baselines of the papers, one class each. train.py trains them like any other system.

    python train.py config/baseline_tfn.py      on the toy corpus
    python train.py config/baseline_tfn.py --dataset=mosi --corpus=unaligned_50.pkl
                                                with the hyperparameters published for CMU-MOSI

The text is read by a fine-tuned encoder (text_features='tuned'), or as the last hidden states of a
Hugging Face model, computed once (text_features='frozen'). Each stream has its own lengths and
mask, and no system reads padding. MMSA, the framework behind most published tables, has bugs that
are not repeated here: the docstrings of the classes name them, and tests/test_baselines.py tests
that they are absent.

Axis letters:
    B clips   T text tokens   S audio or video frames   L, M any sequence   D text width
    d width of a system   h heads   N clips of the train split
    m a stream: 'text', 'audio' or 'vision'
"""
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import (
    EncoderLayer,
    attention_of_last_layer,
    frames_on_tokens,
    inputs_of,
    last_step,
    masked_mean,
    reverse,
    sinusoid,
    text_vector,
)
from configurator import AtLeast, Share, class_knobs
from data import texts_as_read
from lm import EncoderKnobs, ModelError
from losses import UNITS, OrdinalKnobs, l1, mse, ordinal_loss
from run.frozen_text import width_of
from run.load_lm import lm_config, load_tokenizer, specials
from run.new_lm import load_text_encoder
from system import System, weight_groups

STREAMS = ('text', 'audio', 'vision')  # also the order of the numbers in a knob with one per stream


# --------------------------------------------------------------------------------------------------
# Shared parts

class Baseline(System):
    """
    The base class. A baseline implements `fuse(x, batch)`, which takes the hidden states of the
    text x [B,T,D] and returns a dict with pred [B] and the tensors that its losses need. It may
    implement `own_loss(out, batch)`, which returns its auxiliary losses, already weighted.
    """

    class Knobs(EncoderKnobs, OrdinalKnobs):
        text_features: Literal['tuned', 'frozen'] = 'tuned'  # encoder, or stored hidden states
        lr_encoder: AtLeast(0) = 1.0  # learning rate of the encoder, as a multiple of lr
        dropout: Share() = 0.1        # after the fusion, if the paper has it there, and in lm='new'

    task_loss = staticmethod(l1)
    needed_streams = ('audio', 'vision')  # streams that the corpus must have
    lr_parts = ('encoder',)  # parts whose learning rate is lr times the knob lr_<part>
    scorer = None            # name of the module that reads the fused vector, if there is one

    def __init__(self, encoder, D, facts, k):
        """
        encoder: a TextEncoder, or None if hidden states are frozen. D: width of the hidden states.
        facts: the corpus, as in System.build. k: the knobs.
        """
        super().__init__()
        if 'range' not in facts.labels[k['label']]:
            raise ModelError(f"label={k['label']!r} has classes, but system={k['system']!r} only "
                             "learns scores: choose a label with scores.")
        if missing := [m for m in self.needed_streams if m not in facts.widths]:
            raise ModelError(
                f"system={k['system']!r} needs {' and '.join(self.needed_streams)}, but this "
                f"corpus has no {missing[0]}: choose another corpus, or list the streams that it "
                "has in the knob late_streams of the late-fusion system.")
        if encoder is not None:
            encoder.fits(k['max_text_len'])
        self.encoder = encoder
        self.k = k

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        for name, default in class_knobs(cls).items():
            is_numbers = isinstance(default, list) and not isinstance(default[0], str)
            if is_numbers and len(k[name]) != len(default):
                errors.append(f"{name}={k[name]} must be a list of {len(default)} numbers")
        if k['text_features'] == 'frozen' and k['lm'] == 'new':
            errors.append("text_features='frozen' needs a pretrained model in --lm=, not 'new'")
        return errors

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        if 'text' not in cls.modalities_read(k):
            return cls.assemble(k, facts, None, None), None
        if cls.frozen_features(k):  # batches contain the hidden states, so no weights are loaded
            config, _ = lm_config(k['lm'], k['trust_remote_code'], as_data)
            width = width_of(config)
            tokenizer = load_tokenizer(k['lm'], k['trust_remote_code'], as_data)
            return cls.assemble(k, facts, None, tokenizer, width), tokenizer
        texts = [] if trained else texts_as_read(facts, cls, k, 'train')
        encoder, tokenizer = load_text_encoder(k, texts, folder, trained, as_data)
        return cls.assemble(k, facts, encoder, tokenizer), tokenizer

    @classmethod
    def assemble(cls, k, facts, encoder, tokenizer, width=0):
        """ Builds the model. width: of the hidden states, if encoder is None. """
        return cls(encoder, width if encoder is None else encoder.width, facts, k)

    @classmethod
    def makes_files(cls, k):
        return k['lm'] == 'new' or k['text_features'] == 'frozen'

    @classmethod
    def frozen_features(cls, k):
        return k['text_features'] == 'frozen'

    def text(self, batch):
        """ Hidden states of the text [B,T,D]. """
        if self.encoder is None:
            return batch['text']
        return self.encoder(batch['tokens'], batch['text_mask'])

    def run(self, batch):
        """ The output of fuse, computed in float32. """
        x = self.text(batch)  # [B,T,D]
        with torch.autocast(x.device.type, enabled=False):
            return self.fuse(x.float(), batch)

    def predict(self, batch):
        """ dict of pred [B] and, in systems with unimodal scores, the score of each stream [B]. """
        return {name: v for name, v in self.run(batch).items() if v.ndim == 1}

    def own_loss(self, out, batch):
        return {}

    def loss(self, out, batch):
        """ out: the output of run -> dict(loss, terms). """
        label = batch['label']  # [B]
        own = self.own_loss(out, batch)
        ordinal_terms, ordinal = ordinal_loss(out['pred'], label, self.k, batch)
        task = self.task_loss(out['pred'], label)
        loss = task + sum(own.values()) + ordinal
        return dict(loss=loss, terms={'task': task} | own | ordinal_terms)

    def forward(self, batch):
        return self.loss(self.run(batch), batch)

    def param_groups(self):
        return weight_groups(self, {part: self.k['lr_' + part] for part in self.lr_parts})

    def views(self, batch, predict):
        if self.encoder is None:
            return {}
        return attention_of_last_layer(self.encoder, predict, batch)

    def fused(self, batch, predict):
        if self.scorer is None:
            return None
        return inputs_of(self.get_submodule(self.scorer), predict, batch)


class Pooled(Baseline):
    """ The base class of systems that read the text as one sentence vector. """

    class Knobs(Baseline.Knobs):
        text_pool: Literal['first', 'mean'] = 'first'  # sentence vector: first token, or mean

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if cls.frozen_features(k) and k['text_pool'] == 'first':
            errors.append("text_features='frozen' needs text_pool='mean': in a causal LM the first "
                          "hidden state has seen only the first token")
        return errors

    def text_vector(self, x, batch):
        """ x [B,T,D] -> [B,D]. """
        return text_vector(x, batch['text_mask'], self.k['text_pool'])


class Attentive(Baseline):
    """ The base class of systems that fuse by attention layers of width d. """

    class Knobs(Baseline.Knobs):
        fusion_width: AtLeast(1) = 50  # d, width of the fusion
        fusion_heads: AtLeast(1) = 10  # attention heads; must divide fusion_width

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if k['fusion_width'] % k['fusion_heads']:
            errors.append(f"fusion_heads={k['fusion_heads']} does not divide "
                          f"fusion_width={k['fusion_width']}: choose a divisor")
        return errors


class SubNetKnobs:
    sub_widths: AtLeast(1) = [128, 16, 128]  # hidden widths of the text, audio, vision sub-networks
    sub_dropouts: Share() = [0.2, 0.2, 0.2]  # dropout in the text, audio, vision sub-networks


class StackKnobs:
    fusion_layers: AtLeast(1) = 4      # layers of each crossmodal stack
    kernels: AtLeast(1) = [5, 5, 5]    # kernel sizes of the convolutions: text, audio, vision
    attn_dropout: Share() = 0.2        # on attention weights (MulT: over text, in self-attention)
    res_dropout: Share() = 0.0         # on the residual branches of each layer
    embed_dropout: Share() = 0.2       # on the inputs of each stack


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


class Recurrent(nn.Module):
    """ An LSTM's state at the last real step, dropout, a linear layer. In MMSA the state of the
    text follows the padding, and dropout has no effect because PyTorch ignores it in a one-layer
    LSTM. """
    def __init__(self, width, d, d_out, dropout):
        super().__init__()
        self.lstm = nn.LSTM(width, d, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d, d_out)

    def forward(self, x, lengths):
        """ x [B,L,width], lengths [B] -> [B,d_out]. """
        state = last_step(self.lstm(x)[0], lengths)  # [B,d]
        return self.out(self.dropout(state))  # [B,d_out]


class Head(nn.Module):
    """ Dropout, two linear layers with ReLU, and a linear layer to the score. Used by LF-DNN, TFN,
    Self-MM and TETFN. """
    def __init__(self, width, d, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([nn.Linear(width, d), nn.Linear(d, d), nn.Linear(d, 1)])

    def forward(self, x):
        """ x [B,width] -> score [B], feature after the first layer [B,d]. """
        feature = F.relu(self.layers[0](self.dropout(x)))  # [B,d]
        score = self.layers[2](F.relu(self.layers[1](feature)))[:, 0]  # [B]
        return score, feature


class CrossLayer(nn.Module):
    """ A layer of MulT: pre-norm attention with queries from x, keys and values from y (which may
    be x), then an FFW of width 4d with ReLU. One LayerNorm serves x and y, as in the release. """
    def __init__(self, d, n_heads, attn_dropout=0.0, res_dropout=0.0):
        super().__init__()
        self.n_heads = n_heads
        self.attn_dropout = attn_dropout
        self.norm_1 = nn.LayerNorm(d)
        self.norm_2 = nn.LayerNorm(d)
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)
        self.drop = nn.Dropout(res_dropout)

    def forward(self, x, y, mask):
        """ x [B,L,d], y [B,M,d], mask broadcastable to [B,h,L,M] -> [B,L,d]. """
        B, L, d = x.shape
        M, h = y.shape[1], self.n_heads
        q = self.q(self.norm_1(x)).view(B, L, h, -1).transpose(1, 2)  # [B,h,L,d/h]
        kv = self.kv(self.norm_1(y)).view(B, M, 2, h, -1)  # [B,M,2,h,d/h]
        k, v = kv.permute(2, 0, 3, 1, 4)  # 2x [B,h,M,d/h]
        p = self.attn_dropout * self.training
        z = F.scaled_dot_product_attention(q, k, v, mask, p)  # [B,h,L,d/h]
        x = x + self.drop(self.out(z.transpose(1, 2).reshape(B, L, d)))  # [B,L,d]
        return x + self.drop(self.down(F.relu(self.up(self.norm_2(x)))))


class CrossStack(nn.Module):
    """
    MulT's crossmodal Transformer (Tsai et al. 2019, eqs. 3-5): every layer attends from x to the
    same y. Position embeddings are added to both (MMSA has none) and padding is masked. The release
    also masks the future; here it is visible, because the steps of x and y have different rates.
    """
    def __init__(self, d, n_heads, n_layers, attn_dropout=0.0, res_dropout=0.0, embed_dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(
            CrossLayer(d, n_heads, attn_dropout, res_dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(embed_dropout)

    def embed(self, x):
        """ Scales x and adds position embeddings: [B,L,d] -> [B,L,d]. """
        _, L, d = x.shape
        return self.dropout(d ** 0.5 * x + sinusoid(L, d, x.device))

    def attention_mask(self, x, y_mask):
        """ The attention mask [B,1,1,M]. A clip whose y is empty attends to one padded step, since
        a softmax over no steps is NaN. """
        first = torch.arange(y_mask.shape[1], device=y_mask.device) == 0  # [M]
        nothing = ~y_mask.any(1, keepdim=True)  # [B,1]
        return (y_mask | first & nothing)[:, None, None]

    def forward(self, x, y, y_mask):
        """ Attends from x [B,L,d] to y [B,M,d], y_mask [B,M] -> [B,L,d]. """
        to_itself = y is x
        mask = self.attention_mask(x, y_mask)  # [B,1,1,M]
        x = self.embed(x)  # [B,L,d]
        if not to_itself:
            y = self.embed(y)  # [B,M,d]
        for layer in self.layers:
            x = layer(x, x if to_itself else y, mask)
        return self.norm(x)


class Conv(nn.Module):
    """ A convolution over time to width d that keeps the length (MMSA's shortens the sequence, so
    short clips vanish). Padding stays zero. """
    def __init__(self, width, d, kernel):
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv1d(width, d, kernel, bias=False)

    def forward(self, x, mask):
        """ x [B,L,width], mask [B,L] -> [B,L,d]. """
        mask = mask[..., None]  # [B,L,1]
        ends = (self.kernel - 1) // 2, self.kernel // 2
        x = F.pad((x * mask).transpose(1, 2), ends)  # [B,width,L+kernel-1]
        return self.conv(x).transpose(1, 2) * mask  # [B,L,d]


# --------------------------------------------------------------------------------------------------
# One vector per stream, then a head

class Late(Pooled):
    """ Late fusion, the control without interaction between streams. Each stream of late_streams
    gives a score, from a linear layer on the sentence vector or on an LSTM's last state; pred is
    their sum. With one stream it is a unimodal system. """

    class Knobs(Pooled.Knobs, SubNetKnobs):
        late_streams: Literal['text', 'audio', 'vision'] = ['text', 'audio', 'vision']  # summed

    needed_streams = ()

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        widths = facts.widths
        if missing := [m for m in k['late_streams'] if m != 'text' and m not in widths]:
            raise ModelError(f"late_streams={k['late_streams']} lists {missing[0]}, but this "
                             f"corpus has no {missing[0]}: leave it out.")
        self.readers = nn.ModuleDict()
        for m, d, p in zip(STREAMS, k['sub_widths'], k['sub_dropouts']):
            if m in k['late_streams']:
                self.readers[m] = nn.Linear(D, 1) if m == 'text' else Recurrent(widths[m], d, 1, p)

    @classmethod
    def check(cls, k):
        empty = [] if k['late_streams'] else ["late_streams=[] must list at least one stream"]
        return super().check(k) + empty

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
                y = reader(self.text_vector(x, batch))  # [B,1]
            else:
                y = reader(batch[m], batch[m + '_len'])  # [B,1]
            scores[m] = y[:, 0]  # [B]
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
        d_t, d_a, d_v = k['sub_widths']
        p_t, p_a, p_v = k['sub_dropouts']
        self.text_net = Recurrent(D, d_t, k['text_out'], p_t)
        self.audio = SubNet(facts.widths['audio'], d_a, p_a)
        self.vision = SubNet(facts.widths['vision'], d_v, p_v)
        self.widths = dict(audio=d_a, vision=d_v, text=k['text_out'])

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
        self.head = Head(sum(self.widths.values()), k['post_width'], k['dropout'])

    def fuse(self, x, batch):
        score, _ = self.head(torch.cat(self.vectors(x, batch), -1))  # [B]
        return dict(pred=score)


class TFN(Vectors):
    """ Tensor Fusion Network (Zadeh et al. 2017, eq. 5): the outer product of [1; v_a], [1; v_v]
    and [1; v_t], then a Head. A sigmoid scales the score to the label range of the corpus (MMSA
    always scales it to (-3, 3)). """

    class Knobs(Vectors.Knobs):
        post_width: AtLeast(1) = 128  # hidden width of the Head

    scorer = 'head'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        self.low, self.high = facts.labels[k['label']]['range']
        n = 1
        for width in self.widths.values():
            n *= 1 + width
        self.head = Head(n, k['post_width'], k['dropout'])

    def fuse(self, x, batch):
        a, v, t = (F.pad(y, (1, 0), value=1.0) for y in self.vectors(x, batch))  # [B,1+d_m] each
        tensor = torch.einsum('bi,bj,bk->bijk', a, v, t).flatten(1)  # [B,(1+d_a)(1+d_v)(1+d_t)]
        score, _ = self.head(tensor)  # [B]
        pred = self.low + (self.high - self.low) * torch.sigmoid(score)  # [B]
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
        R = k['lmf_rank']
        self.factors = nn.ParameterDict({
            m: nn.Parameter(nn.init.xavier_normal_(torch.empty(R, 1 + d, 1))[..., 0])
            for m, d in self.widths.items()})  # [R,1+d_m] each
        self.fusion_weights = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, R)))  # [1,R]
        self.fusion_bias = nn.Parameter(torch.zeros(1))

    def fuse(self, x, batch):
        ones = [F.pad(y, (1, 0), value=1.0) for y in self.vectors(x, batch)]  # 3x [B,1+d_m]
        # iterate over self.widths: a ParameterDict sorts its names
        a, v, t = (y @ self.factors[m].T for y, m in zip(ones, self.widths))  # 3x [B,R]
        y = (a * v * t) @ self.fusion_weights.T  # [B,1]
        return dict(pred=y[:, 0] + self.fusion_bias)


# --------------------------------------------------------------------------------------------------
# Fusion inside a text encoder, or on its hidden states

def l2_norm(x):
    """ Euclidean norm over the last axis: [..,d] -> [..,1]. """
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class MAG(nn.Module):
    """ The Multimodal Adaptation Gate (Rahman et al. 2020, eqs. 1-4): adds the shift
    h = sum_m relu(W_m [m; t]) * (V_m m) to the text embedding t, then LayerNorm and dropout. h is
    scaled down to a norm of at most beta |t|. """
    def __init__(self, widths, D, beta, dropout):
        super().__init__()
        self.beta = beta
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(D)
        self.gates = nn.ModuleDict({m: nn.Linear(w + D, D) for m, w in widths.items()})
        self.values = nn.ModuleDict({m: nn.Linear(w, D) for m, w in widths.items()})

    def forward(self, x, frames):
        """ x [B,T,D], frames: dict of stream -> [B,T,d_m]; -> [B,T,D]. """
        h = sum(F.relu(self.gates[m](torch.cat([y, x], -1))) * self.values[m](y)
                for m, y in frames.items())  # [B,T,D]
        h_norm, x_norm = l2_norm(h), l2_norm(x)  # [B,T,1] each
        h_norm = torch.where(h_norm == 0, 1.0, h_norm) + 1e-6
        alpha = self.beta * x_norm / h_norm  # [B,T,1]
        return self.dropout(self.norm(alpha.clamp(max=1.0) * h + x))


class MAGBERT(Pooled):
    """ MAG-BERT (Rahman et al. 2020): a fine-tuned encoder with a MAG between its embeddings and
    its first layer, then dense, tanh, linear. Each text token gets one audio and one video vector:
    the frame of its word, or frames resampled onto the tokens (knob resample). Special tokens get
    zeros. The dense layer is trained from scratch (the paper uses BERT's pooler). """

    class Knobs(Pooled.Knobs):
        text_features: Literal['tuned'] = 'tuned'  # 'frozen' is impossible: MAG is in the encoder
        resample: Literal['linear', 'mean', 'words'] = 'linear'  # of frames onto text tokens
        mag_beta: AtLeast(0) = 1.0  # largest norm of the shift, as a multiple of the text's norm

    scorer = 'head'

    def __init__(self, encoder, D, facts, k, ends):
        """ ends: numbers of special tokens before and after each text. """
        super().__init__(encoder, D, facts, k)
        self.ends = ends
        self.mag = MAG(facts.widths, D, k['mag_beta'], k['dropout'])
        self.head = nn.Sequential(
            nn.Linear(D, D), nn.Tanh(), nn.Dropout(k['dropout']), nn.Linear(D, 1))

    @classmethod
    def assemble(cls, k, facts, encoder, tokenizer):
        ends = [len(tokens) for tokens in specials(tokenizer)]
        return cls(encoder, encoder.width, facts, k, ends)

    @classmethod
    def needs_words(cls, k):
        return k['resample'] == 'words'

    @classmethod
    def notes(cls, k, corpus):
        notes = []
        for m in cls.streams(k):
            if m in corpus.widths:
                n_frames = np.median(corpus.lengths('train', m))
                notes.append(f"{m}: a median of {n_frames:.0f} frames per clip, "
                             f"resampled onto the text tokens (resample={k['resample']!r})")
        return notes

    def text(self, batch):
        with_masks = frames_on_tokens(batch, self.mag.values, self.ends, self.k['resample'])
        frames = {m: y for m, (y, _) in with_masks.items()}  # [B,T,d_m] each
        x = self.mag(self.encoder.embed(batch['tokens']), frames)  # [B,T,D]
        for l in range(self.encoder.n_layers):
            x = self.encoder.layer(l, x, batch['text_mask'])
        return x

    def fuse(self, x, batch):
        return dict(pred=self.head(self.text_vector(x, batch))[:, 0])


class MulT(Attentive):
    """ Multimodal Transformer (Tsai et al. 2019). A convolution brings each stream to width d. Six
    CrossStacks attend from each stream to each other one. The two results of a stream are
    concatenated and pass a self-attention stack. The last real steps of the three streams, also
    concatenated, give the score. """

    class Knobs(Attentive.Knobs, StackKnobs):
        attn_dropout_audio: Share() = 0.2        # on attention weights over audio
        attn_dropout_vision: Share() = 0.0       # on attention weights over video
        sub_dropouts: Share() = [0.2, 0.2, 0.2]  # of text before its convolution; 2nd, 3rd unused

    scorer = 'out'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)

        def stack(width, n_layers, attn_dropout):
            return CrossStack(width, k['fusion_heads'], n_layers, attn_dropout,
                              k['res_dropout'], k['embed_dropout'])

        d, n_layers = k['fusion_width'], k['fusion_layers']
        widths = dict(text=D) | facts.widths
        attn_dropout = dict(text=k['attn_dropout'], audio=k['attn_dropout_audio'],
                            vision=k['attn_dropout_vision'])
        self.text_dropout = nn.Dropout(k['sub_dropouts'][0])
        self.convs = nn.ModuleDict({
            m: Conv(widths[m], d, size) for m, size in zip(STREAMS, k['kernels'])})
        self.cross = nn.ModuleDict({
            f'{m}_from_{o}': stack(d, n_layers, attn_dropout[o])
            for m in STREAMS for o in STREAMS if o != m})
        self.memory = nn.ModuleDict({
            m: stack(2 * d, max(n_layers, 3), k['attn_dropout']) for m in STREAMS})
        self.proj_1 = nn.Linear(6 * d, 6 * d)
        self.proj_2 = nn.Linear(6 * d, 6 * d)
        self.out = nn.Linear(6 * d, 1)
        self.dropout = nn.Dropout(k['dropout'])

    def fuse(self, x, batch):
        mask = {m: batch[m + '_mask'] for m in self.convs}
        raw = {m: batch[m] for m in self.convs if m != 'text'} | dict(text=self.text_dropout(x))
        x = {m: conv(raw[m], mask[m]) for m, conv in self.convs.items()}  # 3x [B,L,d]
        last = []
        for m in x:
            attended = [self.cross[f'{m}_from_{o}'](x[m], x[o], mask[o])
                        for o in x if o != m]  # 2x [B,L,d]
            y = torch.cat(attended, -1)  # [B,L,2d]
            last.append(last_step(self.memory[m](y, y, mask[m]), batch[m + '_len']))  # [B,2d]
        y = torch.cat(last, -1)  # [B,6d]
        y = y + self.proj_2(self.dropout(F.relu(self.proj_1(y))))  # [B,6d]
        return dict(pred=self.out(y)[:, 0])


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

    task_loss = staticmethod(mse)
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
            nn.Linear(6 * d, 3 * d), nn.Dropout(k['dropout']), nn.ReLU(), nn.Linear(3 * d, 1))

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
        pred = self.head(y.flatten(1))[:, 0]  # [B]
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
        return dict(diff=k['misa_diff'] * diff, sim=k['misa_sim'] * sim,
                    rebuild=k['misa_rebuild'] * rebuild)


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


# --------------------------------------------------------------------------------------------------
# Generated labels for each stream: Self-MM, TETFN

class UnimodalLabels(nn.Module):
    """
    Self-MM's unimodal label generation (Yu et al. 2021, eqs. 9-14). A stream's label starts as the
    label of the clip. From the second epoch on it is shifted. The shift compares the stream's
    feature with the fused feature: how much closer it is to the mean feature of the positive clips
    than to that of the negative clips. A running mean over epochs damps the shift. Labels and
    features of all train clips are buffers, so that a resumed run restores them.
    """
    def __init__(self, n_clips, widths, high):
        """ n_clips: of the train split. widths: dict of 'fused' and each stream -> width of its
        feature. Labels are clamped to [-high, high]. """
        super().__init__()
        self.high = high
        for m, width in widths.items():
            self.register_buffer('label_' + m, torch.zeros(n_clips))  # [N]
            self.register_buffer('feature_' + m, torch.zeros(n_clips, width))  # [N,d_m]
        self.register_buffer('seen', torch.zeros(n_clips, dtype=torch.bool))  # [N]
        self.streams = [m for m in widths if m != 'fused']

    def __getitem__(self, m):
        return getattr(self, 'label_' + m)

    def lookup(self, m, index, label):
        """ Labels [B] of stream m for the clips index [B]. A clip not seen yet has its corpus
        label, label [B]. """
        return torch.where(self.seen[index], self[m][index], label)

    @torch.no_grad()
    def add_clips(self, index, label):
        """ Sets the labels of clips seen for the first time to the corpus labels. index [B],
        label [B]. """
        new = ~self.seen[index]  # [B]
        for m in ['fused', *self.streams]:
            self[m][index] = torch.where(new, label, self[m][index])
        self.seen[index] = True

    def distance(self, m, feature, clips):
        """ Distance [B] from feature [B,d_m] to the mean feature of `clips`, a mask [N]. """
        stored = getattr(self, 'feature_' + m)  # [N,d_m]
        centre = masked_mean(stored[None], clips[None])  # [1,d_m]
        return torch.linalg.vector_norm(feature - centre, dim=-1)

    def relative_distance(self, m, feature):
        """ delta_m [B] of feature [B,d_m]: above 0 if it is closer to the positive centre. """
        label = self[m]  # [N]; 0 for clips not seen yet, which belong to neither centre
        to_positive = self.distance(m, feature, label > 0)  # [B]
        to_negative = self.distance(m, feature, label < 0)  # [B]
        return (to_negative - to_positive) / (to_positive + 1e-8)

    @torch.no_grad()
    def update(self, index, features, epoch):
        """ Updates the labels and stores the features. index [B]; features: dict of stream ->
        [B,d_m]; epoch counts from 1. Labels do not change in epoch 1, nor while there is no
        positive or no negative clip (as with labels in [0, 4]), since one of the centres is
        undefined. """
        if epoch > 1:
            both_signs = torch.stack([(self[m] > 0).any() & (self[m] < 0).any()
                                      for m in ('fused', *self.streams)]).all()  # []
            fused = self['fused'][index]  # [B]
            delta_f = self.relative_distance('fused', features['fused'])  # [B]
            updated = {}
            for m in self.streams:
                delta = self.relative_distance(m, features[m])  # [B]
                # eqs. 10-12
                new = 0.5 * fused * delta / (delta_f + 1e-8) + 0.5 * (fused + delta - delta_f)
                new = new.nan_to_num(0.0).clamp(-self.high, self.high)  # [B]
                # eq. 14
                old = self[m][index]  # [B]
                updated[m] = (epoch - 1) / (epoch + 1) * old + 2 / (epoch + 1) * new  # [B]
            for m, label in updated.items():
                self[m][index] = torch.where(both_signs, label, self[m][index])
        for m, x in features.items():
            getattr(self, 'feature_' + m)[index] = x.detach()


class SelfLabelled(Baseline):
    """ The base class of Self-MM and TETFN: a score from the fused vector and from each stream,
    with an L1 loss on each. The loss of a stream is weighted by tanh |y_m - y|, where y_m is its
    generated label and y that of the clip. """

    class Knobs(Baseline.Knobs):
        head_widths: AtLeast(1) = [128, 32, 16, 32]    # of the fused, text, audio, vision heads
        head_dropouts: Share() = [0.0, 0.1, 0.1, 0.0]  # before the fused, text, audio, vision heads
        lr_audio: AtLeast(0) = 1.0    # learning rate of the audio LSTM, as a multiple of lr
        lr_vision: AtLeast(0) = 1.0   # learning rate of the video LSTM, as a multiple of lr

    lr_parts = ('encoder', 'audio', 'vision')
    scorer = 'heads.fused'
    one_process = True  # because it stores labels and features of all train clips

    def make_heads(self, widths, facts):
        """ Makes a head for each vector. widths: dict of 'fused' and each stream -> width. """
        k = self.k
        self.heads = nn.ModuleDict()
        for (m, width), d, p in zip(widths.items(), k['head_widths'], k['head_dropouts']):
            self.heads[m] = Head(width, d, p)
        high = max(map(abs, facts.labels[k['label']]['range']))
        self.labels = UnimodalLabels(
            facts.n_clips['train'], dict(zip(widths, k['head_widths'])), high)

    def scores_and_features(self, vectors):
        """ vectors: dict of 'fused' and each stream -> [B,width]. Returns the score [B] and the
        feature [B,d_m] that each head computes, in one dict. """
        scores, features = {}, {}
        for m, v in vectors.items():
            score, feature = self.heads[m](v)  # [B], [B,d_m]
            scores['pred' if m == 'fused' else m] = score
            features['feature_' + m] = feature
        return scores | features

    def own_loss(self, out, batch):
        label = batch['label']  # [B]
        own = {}
        for m in self.labels.streams:
            y = self.labels.lookup(m, batch['index'], label) if self.training else label  # [B]
            own[m] = (torch.tanh((y - label).abs()) * (out[m] - y).abs()).mean()
        return own

    def forward(self, batch):
        """ dict(loss, terms, features); after_step needs the features of each head. """
        out = self.run(batch)
        features = {m: out['feature_' + m].detach() for m in self.heads}  # [B,d_m] each
        return self.loss(out, batch) | dict(features=features)

    def after_step(self, batch, out):
        self.labels.add_clips(batch['index'], batch['label'])
        self.labels.update(batch['index'], out['features'], int(batch['epoch']) + 1)


class SelfMM(SelfLabelled, Pooled):
    """ Self-MM (Yu et al. 2021): the sentence vector and the last LSTM states of audio and video,
    concatenated. Four Heads: for the fused vector and for each stream. """

    class Knobs(SelfLabelled.Knobs, Pooled.Knobs):
        sub_widths: AtLeast(1) = [128, 16, 128]  # unused; hidden width of audio, video LSTM
        sub_dropouts: Share() = [0.2, 0.2, 0.2]  # unused; dropout after audio, video LSTM

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        _, d_a, d_v = k['sub_widths']
        _, p_a, p_v = k['sub_dropouts']
        widths = facts.widths
        self.audio = Recurrent(widths['audio'], d_a, d_a, p_a)
        self.vision = Recurrent(widths['vision'], d_v, d_v, p_v)
        vectors = dict(fused=D + d_a + d_v, text=D, audio=d_a, vision=d_v)
        self.make_heads(vectors, facts)

    def fuse(self, x, batch):
        v = dict(text=self.text_vector(x, batch),
                 audio=self.audio(batch['audio'], batch['audio_len']),
                 vision=self.vision(batch['vision'], batch['vision_len']))  # [B,d_m] each
        return self.scores_and_features(dict(fused=torch.cat(list(v.values()), -1)) | v)


class TETFN(SelfLabelled, Attentive):
    """
    TETFN (Wang et al. 2023). LSTMs read audio and video, and convolutions bring all streams to
    width d. Text attends to audio and to video, and both attend to text. Audio also attends to
    video that has itself attended to the text, and video to such audio. Heads and labels are
    Self-MM's; the unimodal heads read the maximum of their stream over time. (MMSA reads padding,
    and uses the audio kernel size for video.)
    """

    class Knobs(SelfLabelled.Knobs, Attentive.Knobs, StackKnobs):
        sub_widths: AtLeast(1) = [128, 16, 128]  # unused; hidden width of audio, video LSTM

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)

        def stack(width):
            return CrossStack(width, k['fusion_heads'], k['fusion_layers'], k['attn_dropout'],
                              k['res_dropout'], k['embed_dropout'])

        d, widths = k['fusion_width'], facts.widths
        _, d_a, d_v = k['sub_widths']
        self.audio = nn.LSTM(widths['audio'], d_a, batch_first=True)
        self.vision = nn.LSTM(widths['vision'], d_v, batch_first=True)
        self.convs = nn.ModuleDict({
            m: Conv(w, d, n) for m, w, n in zip(STREAMS, (D, d_a, d_v), k['kernels'])})
        names = (
            'text_from_audio', 'text_from_vision', 'audio_from_text', 'vision_from_text',
            'guided_audio', 'guided_vision', 'audio_from_guided', 'vision_from_guided')
        self.cross = nn.ModuleDict({name: stack(d) for name in names})
        self.memory = nn.ModuleDict({m: stack(2 * d) for m in STREAMS})
        self.make_heads(dict(fused=6 * d, text=d, audio=d, vision=d), facts)

    def fuse(self, x, batch):
        cross = self.cross
        mask = {m: batch[m + '_mask'] for m in STREAMS}
        x = dict(text=x)
        for m in STREAMS:
            y = x[m] if m == 'text' else getattr(self, m)(batch[m])[0]  # [B,L,d_m]
            x[m] = self.convs[m](y, mask[m])  # [B,L,d]

        # audio and video after attending to the text
        guided = {m: cross['guided_' + m](x[m], x['text'], mask['text'])
                  for m in ('audio', 'vision')}  # 2x [B,S,d]
        y = {}
        y['text'] = torch.cat([
            cross['text_from_audio'](x['text'], x['audio'], mask['audio']),
            cross['text_from_vision'](x['text'], x['vision'], mask['vision'])], -1)  # [B,T,2d]
        for m, other in (('audio', 'vision'), ('vision', 'audio')):
            y[m] = torch.cat([
                cross[m + '_from_text'](x[m], x['text'], mask['text']),
                cross[m + '_from_guided'](x[m], guided[other], mask[other])], -1)  # [B,S,2d]
        last = [last_step(self.memory[m](y[m], y[m], mask[m]), batch[m + '_len'])
                for m in y]  # 3x [B,2d]

        top = {}
        for m in x:
            largest = torch.where(mask[m][..., None], x[m], -torch.inf).amax(1)  # [B,d]
            top[m] = largest.where(mask[m].any(1)[:, None], 0.0)  # [B,d]
        return self.scores_and_features(dict(fused=torch.cat(last, -1)) | top)


class ALMT(Attentive):
    """
    ALMT (Zhang et al. 2023). A Transformer layer compresses each stream into almt_tokens tokens,
    and two more layers give the text in three scales. A hyper-modality starts as learned tokens;
    for each scale the text attends to audio and to video, and both results are added to it. Then
    the text, with a learned token in front, attends to the hyper-modality, and that token gives the
    score. Loss: MSE. Padding is masked (the release reads it), and positions are sinusoids (in the
    release: learned, for one fixed length).
    """

    class Knobs(Attentive.Knobs):
        fusion_layers: AtLeast(1) = 4  # layers of the stack from text to the hyper-modality
        almt_tokens: AtLeast(1) = 8    # P, tokens that each stream is compressed into

    task_loss = staticmethod(mse)
    units = UNITS | dict(task='squared label units')
    scorer = 'out'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        d, P, h = k['fusion_width'], k['almt_tokens'], k['fusion_heads']

        def layer():
            return EncoderLayer(d, h, k['dropout'])

        widths = dict(text=D, audio=facts.widths['audio'], vision=facts.widths['vision'])
        self.proj = nn.ModuleDict({m: nn.Linear(w, d) for m, w in widths.items()})
        self.tokens = nn.ParameterDict({
            m: nn.Parameter(0.02 * torch.randn(P, d)) for m in widths})
        self.first = nn.ModuleDict({m: layer() for m in widths})
        self.scales = nn.ModuleList(layer() for _ in range(2))
        self.hyper_tokens = nn.Parameter(torch.ones(P, d))
        self.learn = nn.ModuleList(
            nn.ModuleDict({m: CrossAttention(d, h) for m in ('audio', 'vision')}) for _ in range(3))
        self.first_tokens = nn.Parameter(0.02 * torch.randn(1, d))
        self.fusion = CrossStack(d, h, k['fusion_layers'], k['dropout'], k['dropout'])
        self.out = nn.Linear(d, 1)

    def compress(self, m, x, mask):
        """ Compresses stream m, x [B,L,width] with mask [B,L], into its tokens [B,P,d]. """
        P = self.k['almt_tokens']
        x = self.proj[m](x)  # [B,L,d]
        x = x + sinusoid(*x.shape[1:], x.device)
        x = torch.cat([self.tokens[m].expand(len(x), -1, -1), x], 1)  # [B,P+L,d]
        return self.first[m](x, F.pad(mask, (P, 0), value=True))[:, :P]  # [B,P,d]

    def fuse(self, x, batch):
        B = len(x)
        raw = dict(text=x, audio=batch['audio'], vision=batch['vision'])
        y = {m: self.compress(m, raw[m], batch[m + '_mask']) for m in raw}  # 3x [B,P,d]
        scales = [y['text']]
        for layer in self.scales:
            scales.append(layer(scales[-1], None))  # [B,P,d]

        hyper = self.hyper_tokens.expand(B, -1, -1)  # [B,P,d]
        for attend, text in zip(self.learn, scales):
            hyper = hyper + attend['audio'](text, y['audio']) + attend['vision'](text, y['vision'])
        text = torch.cat([self.first_tokens.expand(B, 1, -1), scales[-1]], 1)  # [B,1+P,d]
        real = torch.ones_like(hyper[..., 0], dtype=torch.bool)  # [B,P]
        fused = self.fusion(text, hyper, real)  # [B,1+P,d]
        return dict(pred=self.out(fused[:, 0])[:, 0])


class CrossAttention(nn.Module):
    """ ALMT's multi-head attention from x to y, with a LayerNorm on each. There is no residual
    connection, because ALMT adds the result to the hyper-modality. """
    def __init__(self, d, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm_x = nn.LayerNorm(d)
        self.norm_y = nn.LayerNorm(d)
        self.q = nn.Linear(d, d, bias=False)
        self.kv = nn.Linear(d, 2 * d, bias=False)
        self.out = nn.Linear(d, d)

    def forward(self, x, y):
        """ x [B,L,d], y [B,M,d], without padding -> [B,L,d]. """
        B, L, d = x.shape
        M, h = y.shape[1], self.n_heads
        q = self.q(self.norm_x(x)).view(B, L, h, -1).transpose(1, 2)  # [B,h,L,d/h]
        kv = self.kv(self.norm_y(y)).view(B, M, 2, h, -1)  # [B,M,2,h,d/h]
        k, v = kv.permute(2, 0, 3, 1, 4)  # 2x [B,h,M,d/h]
        z = F.scaled_dot_product_attention(q, k, v)  # [B,h,L,d/h]
        return self.out(z.transpose(1, 2).reshape(B, L, d))  # [B,L,d]


BASELINES = dict(late=Late, lfdnn=LFDNN, tfn=TFN, lmf=LMF, mag=MAGBERT,
                 mult=MulT, misa=MISA, selfmm=SelfMM, tetfn=TETFN, almt=ALMT)
