"""
The systems that the papers compare with, each a class that reads as its paper, through the same train.py.

    python train.py config/baseline_tfn.py                                     the toy corpus
    python train.py config/baseline_tfn.py --dataset=mosi --corpus=unaligned_50.pkl    its published hyperparameters

Text enters as the paper has it: an encoder that is fine-tuned (text_features='tuned'), or the last hidden states of any
Hugging Face model, computed once (text_features='frozen'). Every stream has a length and a mask of its own, and nothing
here reads padding. The ports that the field's tables come from (MMSA) have bugs that we do not repeat; where one matters,
the class says so, and test_baselines.py holds it.

Axis letters, the same in every file:
    B clips   T text tokens   S audio or video frames   L any sequence   D text width   d width of a system   h heads
    N clips of the train split   m a stream: 'text', 'audio' or 'vision'
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import EncoderLayer, frames_on_tokens, grouped, last_step, masked_mean, reverse, sentence, sinusoid
from lm import ModelError, specials
from losses import l1, mse, ordinal_loss


STREAMS = ('text', 'audio', 'vision')   # the order of every knob that is a list


# ---------------------------------------------------------------------------------------------------------
# What they share

class Baseline(nn.Module):
    """
    A system of two methods: `fuse(x, batch)`, hidden states of the text to a dict with pred [B] and whatever its losses
    want, and `own_loss(out, batch)`, the terms that it adds to the task's, already weighted. Parts that are called encoder,
    audio, vision or factors have learning rates of their own, in the systems that have such parts.
    """
    task_loss = staticmethod(l1)
    needs = ('audio', 'vision')

    def __init__(self, encoder, widths, c):
        """ encoder TextEncoder, or None where hidden states are frozen; widths: stream -> width, audio and vision; c: the knobs. """
        super().__init__()
        if lacks := [m for m in self.needs if m not in widths]:
            raise ModelError(f"system={c['system']!r} needs {' and '.join(self.needs)}, and this corpus has no {lacks[0]}: take another "
                             "corpus, or system='late' with --late_streams= of those that are there.")
        if encoder is not None: encoder.fits(c['max_text_len'])
        self.encoder, self.c = encoder, c

    def text(self, batch):
        """ Hidden states of the text [B,T,D]. """
        return batch['text'] if self.encoder is None else self.encoder(batch['tokens'], batch['text_mask'])

    def sentence(self, x, batch):
        """ x [B,T,D] -> [B,D], as text_pool has it. """
        return sentence(x, batch['text_mask'], self.c['text_pool'])

    def run(self, batch):
        x = self.text(batch)
        with torch.autocast(x.device.type, enabled=False): return self.fuse(x.float(), batch)

    def predict(self, batch):
        """ pred [B], and what a system says of each stream by itself, if it does. Reads no label. """
        return {k: v for k, v in self.run(batch).items() if v.ndim == 1}

    def own_loss(self, out, batch): return {}

    def forward(self, batch):
        out, label = self.run(batch), batch['label']
        own = self.own_loss(out, batch)
        more, extra = ordinal_loss(out['pred'], label, self.c, batch.get('ramp', 1.0))
        task = self.task_loss(out['pred'], label)
        return dict(loss=task + sum(own.values()) + extra, terms={'task': task} | own | more)

    def param_groups(self):
        return grouped(self, {part: self.c['lr_' + part] for part in ('encoder', 'audio', 'vision', 'factors')})


class Norm(nn.BatchNorm1d):
    """ BatchNorm over features, of which a batch of one clip has no statistics: then it takes those it has gathered. """
    def forward(self, x):
        """ x [B,d] -> [B,d]. """
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class SubNet(nn.Module):
    """ TFN's reader of audio or video: the mean of the real frames (the ports' has the padding in it), BatchNorm, dropout,
    three linears with ReLU. """
    def __init__(self, width, d, dropout):
        super().__init__()
        self.norm, self.dropout = Norm(width), nn.Dropout(dropout)
        self.layers = nn.ModuleList([nn.Linear(width, d), nn.Linear(d, d), nn.Linear(d, d)])

    def forward(self, x, mask):
        """ x [B,S,width], mask [B,S] -> [B,d]. """
        x = self.dropout(self.norm(masked_mean(x, mask)))                                        # [B,width]
        for layer in self.layers: x = F.relu(layer(x))
        return x                                                                                 # [B,d]


class Recurrent(nn.Module):
    """ An LSTM's state after the last real step, dropout, a linear. The ports read text after its padding, and their
    dropout is inside a one-layer LSTM, where PyTorch ignores it. """
    def __init__(self, width, d, d_out, dropout):
        super().__init__()
        self.lstm, self.dropout, self.out = nn.LSTM(width, d, batch_first=True), nn.Dropout(dropout), nn.Linear(d, d_out)

    def forward(self, x, lengths):
        """ x [B,L,width], lengths [B] -> [B,d_out]. """
        return self.out(self.dropout(last_step(self.lstm(x)[0], lengths)))


class Head(nn.Module):
    """ Dropout, two linears with ReLU, one linear to the score: the end of LF-DNN and TFN, and of each of Self-MM's tasks. """
    def __init__(self, width, d, dropout):
        super().__init__()
        self.dropout, self.layers = nn.Dropout(dropout), nn.ModuleList([nn.Linear(width, d), nn.Linear(d, d), nn.Linear(d, 1)])

    def forward(self, x):
        """ x [B,width] -> the score [B], and what is behind the first linear [B,d]. """
        feature = F.relu(self.layers[0](self.dropout(x)))                                        # [B,d]
        return self.layers[2](F.relu(self.layers[1](feature)))[:, 0], feature


class CrossLayer(nn.Module):
    """ MulT's layer: pre-norm attention from x to y (to itself, if y is x), then a ReLU FFW of width 4d. One LayerNorm for
    both sides, as released. """
    def __init__(self, d, n_heads, attn_dropout=0.0, res_dropout=0.0):
        super().__init__()
        self.n_heads, self.attn_dropout, self.res_dropout = n_heads, attn_dropout, res_dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, y, mask):
        """ x [B,L,d], y [B,M,d], mask broadcastable to [B,h,L,M] -> [B,L,d]. """
        B, L, d = x.shape
        drop = lambda z: F.dropout(z, self.res_dropout, self.training)
        q = self.q(self.norm_1(x)).view(B, L, self.n_heads, -1).transpose(1, 2)                  # [B,h,L,d/h]
        k, v = self.kv(self.norm_1(y)).view(B, y.shape[1], 2, self.n_heads, -1).permute(2, 0, 3, 1, 4)   # 2x [B,h,M,d/h]
        z = F.scaled_dot_product_attention(q, k, v, mask, self.attn_dropout * self.training)     # [B,h,L,d/h]
        x = x + drop(self.out(z.transpose(1, 2).reshape(B, L, d)))                               # [B,L,d]
        return x + drop(self.down(F.relu(self.up(self.norm_2(x)))))


class CrossStack(nn.Module):
    """
    MulT's crossmodal Transformer (Tsai et al. 2019, eqs. 3-5): every layer takes x and looks at the same y. Positions are
    added to both (MMSA's have none). Nobody sees padding; the release's mask of the future is left out, as "later" means
    nothing between streams of different rates.
    """
    def __init__(self, d, n_heads, n_layers, attn_dropout=0.0, res_dropout=0.0, embed_dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer(d, n_heads, attn_dropout, res_dropout) for _ in range(n_layers))
        self.norm, self.dropout = nn.LayerNorm(d), nn.Dropout(embed_dropout)

    def enter(self, x): return self.dropout(x.shape[-1] ** 0.5 * x + sinusoid(*x.shape[1:], x.device))   # [B,L,d]

    def visible(self, x, y_mask):
        """ [B,1,1,M]; a clip with nothing to see sees one empty step, or a softmax over nothing would be NaN. """
        first = torch.arange(y_mask.shape[1], device=y_mask.device) == 0                         # [M]
        return (y_mask | first & ~y_mask.any(1, keepdim=True))[:, None, None]

    def forward(self, x, y, y_mask):
        """ x [B,L,d] looks at y [B,M,d], y_mask [B,M] -> [B,L,d]. """
        mask, x, y = self.visible(x, y_mask), self.enter(x), None if y is x else self.enter(y)
        for layer in self.layers: x = layer(x, x if y is None else y, mask)
        return self.norm(x)


class Conv(nn.Module):
    """ A stream to width d, a few neighbouring steps at a time, at its own length (the ports cut the ends off, which leaves
    nothing of a short clip); what is behind the end of a clip stays zero. """
    def __init__(self, width, d, kernel):
        super().__init__()
        self.kernel, self.conv = kernel, nn.Conv1d(width, d, kernel, bias=False)

    def forward(self, x, mask):
        """ x [B,L,width], mask [B,L] -> [B,L,d]. """
        mask = mask[..., None]
        x = F.pad((x * mask).transpose(1, 2), ((self.kernel - 1) // 2, self.kernel // 2))        # [B,width,L+kernel-1]
        return self.conv(x).transpose(1, 2) * mask


# ---------------------------------------------------------------------------------------------------------
# Vectors: one a stream, then a head

class Late(Baseline):
    """ The control, and the unimodal systems: each stream of late_streams gives a score by itself, a linear on the sentence
    vector or on an LSTM's state, and their sum is the prediction. It adds and cannot fuse. """
    needs = ()

    def __init__(self, encoder, D, widths, c):
        super().__init__(encoder, widths, c)
        if lacks := [m for m in c['late_streams'] if m != 'text' and m not in widths]:
            raise ModelError(f"late_streams={c['late_streams']}, and this corpus has no {lacks[0]}: leave it out.")
        self.readers = nn.ModuleDict({m: nn.Linear(D, 1) if m == 'text' else Recurrent(widths[m], d, 1, p) for m, d, p in zip(
            STREAMS, c['sub_widths'], c['sub_dropouts']) if m in c['late_streams']})

    def text(self, batch): return super().text(batch) if 'text' in self.readers else batch['index'][:, None]   # not read

    def fuse(self, x, batch):
        read = lambda m, f: f(self.sentence(x, batch)) if m == 'text' else f(batch[m], batch[m + '_len'])
        said = {m: read(m, f)[:, 0] for m, f in self.readers.items()}                            # 3x [B]
        return dict(pred=sum(said.values())) | said


class Vectors(Baseline):
    """ One vector a stream, v_m [B,d_m]: text by an LSTM, audio and video by SubNets. LF-DNN, TFN and LMF fuse these. """
    def __init__(self, encoder, D, widths, c):
        super().__init__(encoder, widths, c)
        (d_t, d_a, d_v), text_out = c['sub_widths'], c['text_out']
        p_t, p_a, p_v = c['sub_dropouts']
        self.text_net = Recurrent(D, d_t, text_out, p_t)
        self.audio, self.vision = SubNet(widths['audio'], d_a, p_a), SubNet(widths['vision'], d_v, p_v)
        self.widths = dict(audio=d_a, vision=d_v, text=text_out)

    def vectors(self, x, batch):
        """ v_a, v_v, v_t, in the order of the ports' arrays. """
        return (self.audio(batch['audio'], batch['audio_mask']), self.vision(batch['vision'], batch['vision_mask']),
                self.text_net(x, batch['text_len']))


class LFDNN(Vectors):
    """ LF-DNN, the late-fusion network of MMSA (Cambria et al. 2017): the three vectors side by side, then a Head. """
    def __init__(self, encoder, D, widths, c):
        super().__init__(encoder, D, widths, c)
        self.head = Head(sum(self.widths.values()), c['post_width'], c['dropout'])

    def fuse(self, x, batch): return dict(pred=self.head(torch.cat(self.vectors(x, batch), -1))[0])


class TFN(Vectors):
    """ Tensor Fusion Network (Zadeh et al. 2017, eq. 5): the outer product of [1; v_a], [1; v_v] and [1; v_t], then a Head whose
    sigmoid spans the corpus's label range (the ports' is (-3, 3) always). """
    def __init__(self, encoder, D, widths, c, label_range):
        super().__init__(encoder, D, widths, c)
        self.low, self.high = label_range
        n = 1
        for width in self.widths.values(): n *= 1 + width
        self.head = Head(n, c['post_width'], c['dropout'])

    def fuse(self, x, batch):
        a, v, t = (F.pad(y, (1, 0), value=1.0) for y in self.vectors(x, batch))                  # [B,1+d_m]
        tensor = torch.einsum('bi,bj,bk->bijk', a, v, t).flatten(1)                              # [B,(1+d_a)(1+d_v)(1+d_t)]
        return dict(pred=self.low + (self.high - self.low) * torch.sigmoid(self.head(tensor)[0]), tensor=tensor)


class LMF(Vectors):
    """ Low-rank Multimodal Fusion (Liu et al. 2018, eq. 8): TFN's tensor meets a weight of rank R, so nobody makes it:
    y = sum_r w_r prod_m [1; v_m] F_m,r + b. Here w and b are trained; in MMSA the optimizer skips them. """
    def __init__(self, encoder, D, widths, c):
        super().__init__(encoder, D, widths, c)
        R = c['lmf_rank']
        self.factors = nn.ParameterDict({m: nn.Parameter(nn.init.xavier_normal_(torch.empty(R, 1 + d, 1))[..., 0])
                                         for m, d in self.widths.items()})                       # [R,1+d_m]
        self.fusion_weights = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, R)))            # [1,R]
        self.fusion_bias = nn.Parameter(torch.zeros(1))

    def fuse(self, x, batch):
        ones = [F.pad(y, (1, 0), value=1.0) for y in self.vectors(x, batch)]                     # 3x [B,1+d_m]
        a, v, t = (y @ self.factors[m].T for y, m in zip(ones, self.widths))                     # 3x [B,R]; the dict sorts its names
        return dict(pred=((a * v * t) @ self.fusion_weights.T)[:, 0] + self.fusion_bias)


# ---------------------------------------------------------------------------------------------------------
# Inside the encoder, or behind it

class MAG(nn.Module):
    """ The Multimodal Adaptation Gate (Rahman et al. 2020, eqs. 1-4): h = sum_m relu(W_m [m; t]) * (V_m m) moves the text,
    by at most beta of its own length; then LayerNorm and dropout. """
    def __init__(self, widths, D, beta, dropout):
        super().__init__()
        self.beta, self.dropout, self.norm = beta, nn.Dropout(dropout), nn.LayerNorm(D)
        self.gates = nn.ModuleDict({m: nn.Linear(width + D, D) for m, width in widths.items()})
        self.values = nn.ModuleDict({m: nn.Linear(width, D) for m, width in widths.items()})

    def forward(self, x, frames):
        """ x [B,T,D], frames: stream -> [B,T,d_m] -> [B,T,D]. """
        h = sum(F.relu(self.gates[m](torch.cat([y, x], -1))) * self.values[m](y) for m, y in frames.items())     # [B,T,D]
        length = lambda y: torch.linalg.vector_norm(y, dim=-1, keepdim=True)                     # [B,T,1]
        h_length = length(h)
        alpha = self.beta * length(x) / (torch.where(h_length == 0, 1.0, h_length) + 1e-6)       # [B,T,1]
        return self.dropout(self.norm(alpha.clamp(max=1.0) * h + x))


class MAGBERT(Baseline):
    """ MAG-BERT: a fine-tuned encoder with a MAG between its embeddings and its first layer, then dense, tanh, linear. Every
    token has its frames: of its word, or resampled onto the text (knob resample). Special tokens have zeros.
    The dense layer is new (the paper's is BERT's pooler). """
    def __init__(self, encoder, D, widths, c, tokenizer):
        super().__init__(encoder, widths, c)
        if encoder is None: raise ModelError("MAG is inside the encoder: system='mag' wants text_features='tuned'.")
        if c['resample'] == 'none':
            raise ModelError("system='mag' adds a frame to each token: resample must be 'linear', 'mean' or 'words'.")
        self.ends = [len(tokens) for tokens in specials(tokenizer)]
        self.mag = MAG(widths, D, c['mag_beta'], c['dropout'])
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(c['dropout']), nn.Linear(D, 1))

    def text(self, batch):
        cues = frames_on_tokens(batch, self.mag.values, self.ends, self.c['resample'])
        x = self.mag(self.encoder.embed(batch['tokens']), {m: y for m, (y, _) in cues.items()})  # [B,T,D]
        for l in range(self.encoder.n_layers): x = self.encoder.layer(l, x, batch['text_mask'])
        return x

    def fuse(self, x, batch): return dict(pred=self.head(self.sentence(x, batch))[:, 0])


class MulT(Baseline):
    """ Multimodal Transformer (Tsai et al. 2019): each stream, by a convolution, to width d; six CrossStacks, one for each
    ordered pair; of each stream both results side by side through a stack of its own; the last real step of each. """
    def __init__(self, encoder, D, widths, c):
        super().__init__(encoder, widths, c)
        d = c['fusion_width']
        stack = lambda width, n_layers, p: CrossStack(width, c['fusion_heads'], n_layers, p, c['res_dropout'], c['embed_dropout'])
        self.text_dropout = nn.Dropout(c['sub_dropouts'][0])
        self.convs = nn.ModuleDict({m: Conv((dict(text=D) | widths)[m], d, k) for m, k in zip(STREAMS, c['kernels'])})
        attn_dropout = dict(text=c['attn_dropout'], audio=c['attn_dropout_audio'], vision=c['attn_dropout_vision'])
        self.cross = nn.ModuleDict({f'{m}_from_{o}': stack(d, c['fusion_layers'], attn_dropout[o])
                                    for m in STREAMS for o in STREAMS if o != m})
        self.memory = nn.ModuleDict({m: stack(2 * d, max(c['fusion_layers'], 3), c['attn_dropout']) for m in STREAMS})
        self.proj_1, self.proj_2, self.out = nn.Linear(6 * d, 6 * d), nn.Linear(6 * d, 6 * d), nn.Linear(6 * d, 1)
        self.dropout = nn.Dropout(c['dropout'])

    def fuse(self, x, batch):
        mask = {m: batch[m + '_mask'] for m in self.convs}
        x = {m: conv(self.text_dropout(x) if m == 'text' else batch[m], mask[m]) for m, conv in self.convs.items()}   # 3x [B,L,d]
        last = []
        for m in x:
            y = torch.cat([self.cross[f'{m}_from_{o}'](x[m], x[o], mask[o]) for o in x if o != m], -1)   # [B,L,2d]
            last.append(last_step(self.memory[m](y, y, mask[m]), batch[m + '_len']))             # [B,2d]
        y = torch.cat(last, -1)                                                                  # [B,6d]
        return dict(pred=self.out(y + self.proj_2(self.dropout(F.relu(self.proj_1(y)))))[:, 0])


class MISA(Baseline):
    """
    MISA (Hazarika et al. 2020): each stream has a private and a shared vector; a Transformer layer over the six. Losses: MSE;
    the two kinds of vector orthogonal (difference); shared ones alike (CMD of 5 moments); both together rebuild the stream.
    Audio and video are read to their own ends (MMSA packs them by the text's length). The Transformer layer is pre-norm with
    GELU (the release's: post-norm, ReLU), and difference has a gradient through the vectors' lengths too.
    """
    task_loss = staticmethod(mse)

    def __init__(self, encoder, D, widths, c):
        super().__init__(encoder, widths, c)
        d = c['fusion_width']
        self.audio, self.vision = (Stacked(widths[m]) for m in ('audio', 'vision'))
        enter = lambda width: nn.Sequential(nn.Linear(width, d), nn.ReLU(), nn.LayerNorm(d))
        self.enter = nn.ModuleDict(dict(text=enter(D)) | {m: enter(4 * widths[m]) for m in ('audio', 'vision')})
        self.private = nn.ModuleDict({m: nn.Linear(d, d) for m in self.enter})
        self.shared, self.rebuild = nn.Linear(d, d), nn.ModuleDict({m: nn.Linear(d, d) for m in self.enter})
        self.layer = EncoderLayer(d, c['fusion_heads'], c['dropout'])
        self.head = nn.Sequential(nn.Linear(6 * d, 3 * d), nn.Dropout(c['dropout']), nn.ReLU(), nn.Linear(3 * d, 1))

    def fuse(self, x, batch):
        x = dict(text=masked_mean(x, batch['text_mask'])) | {m: getattr(self, m)(batch[m], batch[m + '_len']) for m in ('audio', 'vision')}
        x = torch.stack([self.enter[m](x[m]) for m in self.enter], 1)                            # [B,3,d]
        private = torch.stack([torch.sigmoid(f(x[:, i])) for i, f in enumerate(self.private.values())], 1)   # [B,3,d]
        shared = torch.sigmoid(self.shared(x))                                                   # [B,3,d]
        rebuilt = torch.stack([f((private + shared)[:, i]) for i, f in enumerate(self.rebuild.values())], 1)     # [B,3,d]
        y = self.layer(torch.cat([private, shared], 1), None)                                    # [B,6,d]
        return dict(pred=self.head(y.flatten(1))[:, 0], x=x, private=private, shared=shared, rebuilt=rebuilt)

    def own_loss(self, out, batch):
        c, p, s = self.c, out['private'].unbind(1), out['shared'].unbind(1)                      # 3x [B,d]
        pairs = [(0, 1), (0, 2), (1, 2)]
        diff = sum(orthogonality(p[i], s[i]) for i in range(3)) + sum(orthogonality(p[i], p[j]) for i, j in pairs)
        sim = sum(cmd(s[i], s[j]) for i, j in pairs) / 3
        return dict(diff=c['misa_diff'] * diff, sim=c['misa_sim'] * sim, rebuild=c['misa_rebuild'] * mse(out['rebuilt'], out['x']))


class Stacked(nn.Module):
    """ MISA's reader of frames: two bidirectional LSTMs with a LayerNorm between; the final states of both ways of both. """
    def __init__(self, width):
        super().__init__()
        self.lstms = nn.ModuleList(nn.LSTM(n, width, batch_first=True) for n in (width, width, 2 * width, 2 * width))
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x, lengths):
        """ x [B,S,width], lengths [B] -> [B,4 width]. """
        ahead_1, back_1 = self.lstms[0](x)[0], self.lstms[1](reverse(x, lengths))[0]             # 2x [B,S,width]
        y = self.norm(torch.cat([ahead_1, reverse(back_1, lengths)], -1))                        # [B,S,2 width]
        ahead_2, back_2 = self.lstms[2](y)[0], self.lstms[3](reverse(y, lengths))[0]             # 2x [B,S,width]
        return torch.cat([last_step(h, lengths) for h in (ahead_1, ahead_2, back_1, back_2)], -1)


def orthogonality(x, y):
    """ MISA's difference loss: mean squared cosine-like product of every feature of x with every one of y, over the batch,
    after centring and scaling each clip to length 1. x, y [B,d] -> []. """
    unit = lambda z: F.normalize(z - z.mean(0), dim=1, eps=1e-6)
    return (unit(x).T @ unit(y)).square().mean()


def cmd(x, y, n_moments=5):
    """ Central Moment Discrepancy (Zellinger et al. 2017) of two batches x, y [B,d] -> []. """
    x_0, y_0 = x.mean(0), y.mean(0)                                                              # [d]
    gaps = [x_0 - y_0] + [(x - x_0).pow(k).mean(0) - (y - y_0).pow(k).mean(0) for k in range(2, n_moments + 1)]
    return sum(torch.linalg.vector_norm(gap) for gap in gaps)


# ---------------------------------------------------------------------------------------------------------
# Labels for each stream that nobody gave: Self-MM, TETFN

class OwnLabels(nn.Module):
    """
    Self-MM's unimodal label generation (Yu et al. 2021, eqs. 9-14). Each stream's label starts as the clip's. Then, by how much
    nearer a feature is to the centre of its positive clips than of its negative ones, relative to the fused feature, it
    moves, and a mean over epochs keeps it steady. Labels and features of all train clips are buffers, so a resumed run
    has them too.
    """
    def __init__(self, n_clips, widths, high):
        """ n_clips of the train split; widths: 'fused' and streams -> width of the feature; labels stay in [-high, high]. """
        super().__init__()
        self.high = high
        for m, width in widths.items():
            self.register_buffer('label_' + m, torch.zeros(n_clips))                             # [N]
            self.register_buffer('feature_' + m, torch.zeros(n_clips, width))                    # [N,d_m]
        self.register_buffer('seen', torch.zeros(n_clips, dtype=torch.bool))                     # [N]
        self.streams = [m for m in widths if m != 'fused']

    def __getitem__(self, m): return getattr(self, 'label_' + m)

    @torch.no_grad()
    def start(self, index, label):
        """ Clips seen for the first time: their labels are the corpus's. index [B], label [B]. """
        new = ~self.seen[index]                                                                  # [B]
        for m in ['fused', *self.streams]: self[m][index] = torch.where(new, label, self[m][index])
        self.seen[index] = True

    def side(self, m, feature):
        """ delta_m: how much nearer to the positive centre, [B]. """
        label, known = self[m], getattr(self, 'feature_' + m)                                    # [N], [N,d]
        centre = lambda which: masked_mean(known[None], which[None])                             # [1,d]; a label not seen yet is 0
        far = lambda which: torch.linalg.vector_norm(feature - centre(which), dim=-1)            # [B]
        to_positive, to_negative = far(label > 0), far(label < 0)
        return (to_negative - to_positive) / (to_positive + 1e-8)

    @torch.no_grad()
    def update(self, index, features, epoch):
        """ index [B]; features: dict of [B,d_m]; epoch from 1. In the first, features are gathered and labels stay; so they do
        where nothing is positive, or nothing negative (labels of [0, 4]): a side without clips has no centre. """
        if epoch > 1:
            two_sided = torch.stack([(self[m] > 0).any() & (self[m] < 0).any() for m in ('fused', *self.streams)]).all()
            fused = self['fused'][index]                                                         # [B]
            delta_f = self.side('fused', features['fused'])                                      # [B]
            moved = {}
            for m in self.streams:
                delta = self.side(m, features[m])                                                # [B]
                new = 0.5 * fused * delta / (delta_f + 1e-8) + 0.5 * (fused + delta - delta_f)   # [B], eqs. 10-12
                new = new.nan_to_num(0.0).clamp(-self.high, self.high)
                moved[m] = (epoch - 1) / (epoch + 1) * self[m][index] + 2 / (epoch + 1) * new    # [B], eq. 14
            for m, label in moved.items(): self[m][index] = torch.where(two_sided, label, self[m][index])
        for m, x in features.items(): getattr(self, 'feature_' + m)[index] = x.detach()


class SelfLabelled(Baseline):
    """ What Self-MM and TETFN share: a score from the fused vector and from each stream's, L1 on each; a stream's counts by how
    far its own label has moved from the clip's (tanh |y_m - y|). """
    def make_heads(self, widths, c, n_clips, high):
        self.heads = nn.ModuleDict({m: Head(width, d, p) for (m, width), d, p in zip(widths.items(), c['head_widths'], c['head_dropouts'])})
        self.labels = OwnLabels(n_clips, dict(zip(widths, c['head_widths'])), high)

    def say(self, vectors):
        """ vectors: 'fused' and streams -> [B,width]. Of each the score and the feature behind the first linear. """
        out = {m: self.heads[m](v) for m, v in vectors.items()}
        return {'pred' if m == 'fused' else m: y for m, (y, _) in out.items()} | {'feature_' + m: x for m, (_, x) in out.items()}

    def own_loss(self, out, batch):
        labels, index = self.labels, batch['index']
        if self.training: labels.start(index, batch['label'])
        own = {}
        for m in labels.streams:
            y = labels[m][index] if self.training else batch['label']                            # [B]
            own[m] = (torch.tanh((y - batch['label']).abs()) * (out[m] - y).abs()).mean()
        if self.training: labels.update(index, {m: out['feature_' + m] for m in ['fused', *labels.streams]}, int(batch['epoch']) + 1)
        return own


class SelfMM(SelfLabelled):
    """ Self-MM (Yu et al. 2021): the sentence vector, an LSTM's last state for audio and for video, side by side; four Heads. """
    def __init__(self, encoder, D, widths, c, n_clips, high):
        super().__init__(encoder, widths, c)
        (_, d_a, d_v), (_, p_a, p_v) = c['sub_widths'], c['sub_dropouts']
        self.audio, self.vision = Recurrent(widths['audio'], d_a, d_a, p_a), Recurrent(widths['vision'], d_v, d_v, p_v)
        self.make_heads(dict(fused=D + d_a + d_v, text=D, audio=d_a, vision=d_v), c, n_clips, high)

    def fuse(self, x, batch):
        v = dict(text=self.sentence(x, batch)) | {m: getattr(self, m)(batch[m], batch[m + '_len']) for m in ('audio', 'vision')}
        return self.say(dict(fused=torch.cat(list(v.values()), -1)) | v)


class TETFN(SelfLabelled):
    """
    TETFN (Wang et al. 2023): text, and LSTMs over audio and video, by convolutions to width d; text looks at each of the others,
    each of the others at text, and audio and video at each other through the text: what one looks at is the other after it
    has looked at the text. Self-MM's heads and labels, on the largest value over time of each stream. (MMSA reads padding,
    and gives video audio's kernel.)
    """
    def __init__(self, encoder, D, widths, c, n_clips, high):
        super().__init__(encoder, widths, c)
        d, (_, d_a, d_v) = c['fusion_width'], c['sub_widths']
        self.audio, self.vision = nn.LSTM(widths['audio'], d_a, batch_first=True), nn.LSTM(widths['vision'], d_v, batch_first=True)
        self.convs = nn.ModuleDict({m: Conv(w, d, k) for m, w, k in zip(STREAMS, (D, d_a, d_v), c['kernels'])})
        how = c['fusion_heads'], c['fusion_layers'], c['attn_dropout'], c['res_dropout'], c['embed_dropout']
        stack = lambda width: CrossStack(width, *how)
        self.cross = nn.ModuleDict({k: stack(d) for k in (
            'text_from_audio', 'text_from_vision', 'audio_from_text', 'vision_from_text', 'guided_audio', 'guided_vision',
            'audio_from_guided', 'vision_from_guided')})
        self.memory = nn.ModuleDict({m: stack(2 * d) for m in self.convs})
        self.make_heads(dict(fused=6 * d, text=d, audio=d, vision=d), c, n_clips, high)

    def fuse(self, x, batch):
        mask = {m: batch[m + '_mask'] for m in self.convs}
        x = {m: conv(x if m == 'text' else getattr(self, m)(batch[m])[0], mask[m]) for m, conv in self.convs.items()}    # 3x [B,L,d]
        t, look = x['text'], lambda k, y, m: self.cross[k](y, x[m], mask[m])
        guided = {m: look('guided_' + m, x[m], 'text') for m in ('audio', 'vision')}             # 2x [B,S,d]: m after a look at the text
        y = dict(text=torch.cat([look('text_from_audio', t, 'audio'), look('text_from_vision', t, 'vision')], -1))       # [B,T,2d]
        for m, other in (('audio', 'vision'), ('vision', 'audio')):
            y[m] = torch.cat([look(m + '_from_text', x[m], 'text'),
                              self.cross[m + '_from_guided'](x[m], guided[other], mask[other])], -1)                     # [B,S,2d]
        last = [last_step(self.memory[m](y[m], y[m], mask[m]), batch[m + '_len']) for m in y]    # 3x [B,2d]
        top = {m: torch.where(mask[m][..., None], x[m], -torch.inf).amax(1).where(mask[m].any(1)[:, None], 0.0) for m in x}  # 3x [B,d]
        return self.say(dict(fused=torch.cat(last, -1)) | top)


class ALMT(Baseline):
    """
    ALMT (Zhang et al. 2023): each stream in almt_tokens learned tokens, by a Transformer layer over them and the stream; text in
    three scales; a hyper-modality, learned, to which each scale of text adds what it finds in audio and in video; then text
    looks at it, and the first token gives the score. Loss MSE. Padding is masked (the release reads it), positions are
    sinusoids (its are random and learned, for one length).
    """
    task_loss = staticmethod(mse)

    def __init__(self, encoder, D, widths, c):
        super().__init__(encoder, widths, c)
        d, P, h = c['fusion_width'], c['almt_tokens'], c['fusion_heads']
        widths = dict(text=D) | {m: widths[m] for m in ('audio', 'vision')}
        self.proj = nn.ModuleDict({m: nn.Linear(w, d) for m, w in widths.items()})
        self.tokens = nn.ParameterDict({m: nn.Parameter(0.02 * torch.randn(P, d)) for m in widths})
        layer = lambda: EncoderLayer(d, h, c['dropout'])
        self.first, self.scales = nn.ModuleDict({m: layer() for m in widths}), nn.ModuleList(layer() for _ in range(2))
        self.hyper_tokens = nn.Parameter(torch.ones(P, d))
        self.learn = nn.ModuleList(nn.ModuleDict({m: Look(d, h) for m in ('audio', 'vision')}) for _ in range(3))
        self.first_tokens = nn.Parameter(0.02 * torch.randn(1, d))
        self.fusion, self.out = CrossStack(d, h, c['fusion_layers'], c['dropout'], c['dropout']), nn.Linear(d, 1)

    def gather(self, m, x, mask):
        """ A stream x [B,L,width] in its tokens [B,P,d]. """
        B, P = len(x), self.c['almt_tokens']
        x = self.proj[m](x)                                                                      # [B,L,d]
        x = torch.cat([self.tokens[m].expand(B, -1, -1), x + sinusoid(*x.shape[1:], x.device)], 1)   # [B,P+L,d]
        return self.first[m](x, F.pad(mask, (P, 0), value=True))[:, :P]

    def fuse(self, x, batch):
        y = {m: self.gather(m, x if m == 'text' else batch[m], batch[m + '_mask']) for m in self.proj}   # 3x [B,P,d]
        scales = [y['text']]
        for layer in self.scales: scales.append(layer(scales[-1], None))                         # [B,P,d]
        hyper = self.hyper_tokens.expand(len(x), -1, -1)                                                # [B,P,d]
        for look, text in zip(self.learn, scales): hyper = hyper + look['audio'](text, y['audio']) + look['vision'](text, y['vision'])
        text = torch.cat([self.first_tokens.expand(len(x), 1, -1), scales[-1]], 1)                      # [B,1+P,d]
        real = torch.ones_like(hyper[..., 0], dtype=torch.bool)                                  # [B,P]
        return dict(pred=self.out(self.fusion(text, hyper, real)[:, 0])[:, 0])


class Look(nn.Module):
    """ Multi-head attention between LayerNorms: x looks at y. No residual: ALMT adds the result to a third thing. """
    def __init__(self, d, n_heads):
        super().__init__()
        self.n_heads, self.norm_x, self.norm_y = n_heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.kv, self.out = nn.Linear(d, d, bias=False), nn.Linear(d, 2 * d, bias=False), nn.Linear(d, d)

    def forward(self, x, y):
        """ x [B,L,d], y [B,M,d], all real -> [B,L,d]. """
        B, L, d = x.shape
        q = self.q(self.norm_x(x)).view(B, L, self.n_heads, -1).transpose(1, 2)                  # [B,h,L,d/h]
        k, v = self.kv(self.norm_y(y)).view(B, y.shape[1], 2, self.n_heads, -1).permute(2, 0, 3, 1, 4)   # 2x [B,h,M,d/h]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, d))


BASELINES = dict(late=Late, lfdnn=LFDNN, tfn=TFN, lmf=LMF, mag=MAGBERT, mult=MulT, misa=MISA, selfmm=SelfMM, tetfn=TETFN, almt=ALMT)


def build_baseline(c, corpus, encoder, D, tokenizer):
    """ The system c['system'] on text of width D, by an encoder or (None) frozen. Raises ModelError. """
    low_high = corpus.labels[c['label']].get('range')
    if c['fusion_width'] % c['fusion_heads'] and c['system'] in ('mult', 'misa', 'tetfn', 'almt'):
        raise ModelError(f"fusion_heads={c['fusion_heads']} does not divide fusion_width={c['fusion_width']}: take a divisor of it.")
    if c['text_features'] == 'frozen' and c['text_pool'] == 'first' and c['system'] in ('late', 'selfmm'):
        raise ModelError("the first hidden state of a causal LM knows one token: with text_features='frozen' take text_pool='mean'.")
    if low_high is None: raise ModelError(f"the label {c['label']!r} is one of classes, and {c['system']} is a system for regression.")
    more = dict(tfn=(low_high,), mag=(tokenizer,), selfmm=(corpus.n_clips['train'], max(map(abs, low_high))))
    more['tetfn'] = more['selfmm']
    return BASELINES[c['system']](encoder, D, corpus.widths, c, *more.get(c['system'], ()))
