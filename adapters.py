"""
The trainable blocks of the systems, in plain PyTorch. model.py puts them into a frozen LM, and
crosssent.py into an encoder. The baselines' own blocks are in baselines/.

The axis letters are those of model.py; s is a stream: 'text', 'audio' or 'vision'. All forwards are
pure: features, lengths, masks and the frozen LM's layers are arguments. Masks are True at real
positions.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# Functions that several blocks use

def check_heads(n_heads, d, heads, width):
    """ Raises ValueError if n_heads does not divide the width d; heads, width: text of the message. """
    if d % n_heads:
        raise ValueError(f"{heads}={n_heads} does not divide {width}{d}: set it to a divisor.")


def split_heads(x, h):
    """ [B,L,d] -> [B,h,L,d/h]. """
    return x.unflatten(2, (h, -1)).transpose(1, 2)


def masked_mean(x, mask):
    """ The mean over real positions; zeros where there is none. x [B,L,d], mask [B,L] -> [B,d]. """
    weight = mask[..., None].to(x.dtype)  # [B,L,1]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)  # [B,d]


def unpacked(x, rows, B, T):
    """ x [U,D] at the flat positions rows [U], with zeros elsewhere -> [B,T,D]. """
    padded = x.new_zeros(B * T, x.shape[-1])  # [BT,D]
    padded[rows] = x
    return padded.view(B, T, -1)  # [B,T,D]


def last_step(x, lengths):
    """ The last real step of each clip, or step 0 where it has none or S = 1: [B,S,..] -> [B,..]. """
    last = (lengths - 1).clamp(0, x.shape[1] - 1)  # [B]
    return x[torch.arange(len(x), device=x.device), last]


def text_vector(x, mask, pool):
    """ The 'first' token, the 'last' real one or the 'mean': x [B,T,D], mask [B,T] -> [B,D]. """
    if pool == 'mean':
        return masked_mean(x, mask)  # [B,D]
    return x[:, 0] if pool == 'first' else last_step(x, mask.sum(1))  # [B,D]


def reverse(x, lengths):
    """ x [B,S,d] with the real steps of each clip in reverse order and its padding in place, for an
    LSTM that reads backwards. """
    s = torch.arange(x.shape[1], device=x.device)  # [S]
    n = lengths[:, None]  # [B,1]
    source = torch.where(s < n, n - 1 - s, s)[..., None]  # [B,S,1]
    return x.gather(1, source.expand_as(x))  # [B,S,d]


def recomputed(on, function, *inputs, dropout=False):
    """
    function(*inputs). on=True: activation checkpointing. The backward pass calls the function again
    instead of storing its activations. dropout=True: the function draws dropout, and its second
    call draws the same. On MPS such a function is not computed again, because checkpoint() does not
    restore the random numbers of MPS.
    """
    if not on or not torch.is_grad_enabled():
        return function(*inputs)
    if dropout and inputs[0].device.type == 'mps':
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=dropout)


# --------------------------------------------------------------------------------------------------
# LoRA and the FFW of an MM block

class LoRA(nn.Module):
    """
    The low-rank update of one frozen linear layer W (Hu et al. 2021, eq. 3):
    W x + (alpha / r) B A dropout(x).

    W stays in the LM and is an argument of forward(), so it is never wrapped, copied or changed. A
    is r x n_in and starts uniform in +-1/sqrt(n_in). B is n_out x r and starts at zero, so the
    first output equals W x bit for bit. Both are float32 whatever the dtype of W: in bf16, updates
    smaller than 1/256 of a weight would be lost.
    """
    def __init__(self, n_in, n_out, rank, alpha, dropout=0.0):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, n_in))
        self.B = nn.Parameter(torch.zeros(n_out, rank))
        # PyTorch's Kaiming start with fan_in = n_in. The release of DeepMLF stores A as n_in x r,
        # so there the same call takes fan_in = r and draws from +-1/sqrt(r).
        nn.init.uniform_(self.A, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, W):
        """ x [.., n_in], W the frozen layer (a callable) -> [.., n_out] in W's output dtype. """
        y = W(x)  # [.., n_out]
        hidden = F.linear(self.dropout(x).to(self.A.dtype), self.A)  # [.., r]
        delta = F.linear(hidden, self.B)  # [.., n_out]
        return y + (self.scale * delta).to(y.dtype)

    @torch.no_grad()
    def merge(self, weight):
        """
        A new weight [n_out, n_in] that includes the update, computed in float32. The argument is
        not changed: merging into a bf16 weight in place and unmerging it changes a quarter of its
        values.
        """
        return (weight.float() + self.scale * self.B.float() @ self.A.float()).to(weight.dtype)


def weight_of(layer):
    """ The weight of an LM's linear layer as [n_out, n_in]. GPT-2's Conv1D has [n_in, n_out]. """
    return layer.weight.T if type(layer).__name__ == 'Conv1D' else layer.weight


def linear_like(layer, init):
    """ A trainable float32 nn.Linear with the shape of an LM's linear layer. init='lm' copies its
    weight and bias, 'random' does not. """
    weight = weight_of(layer)  # [n_out, n_in]
    n_out, n_in = weight.shape
    new = nn.Linear(n_in, n_out, bias=layer.bias is not None, device=weight.device)
    if init == 'lm':
        with torch.no_grad():
            new.weight.copy_(weight)
            if layer.bias is not None:
                new.bias.copy_(layer.bias)
    return new


class FFW(nn.Module):
    """
    A trainable feed-forward network (FFW) with the shape and the activation of an LM block's FFW.
    With init='lm' it starts from the LM's weights and biases.

    `lm_ffw` is (gate, up, down, act). GPT-2 has no gate (None): down(act(up x)). Llama and its
    relatives have the SwiGLU product: down(act(gate x) * up x). The release differs in two points:
    it adds act(gate x) and up x (AdditiveSwiGLU in tests/test_parity.py does the same), and it
    leaves GPT-2's biases at a random start.
    """
    def __init__(self, lm_ffw, init='lm', dropout=0.0):
        super().__init__()
        gate, up, down, act = lm_ffw
        self.act = copy.deepcopy(act)  # a copy, so that train() here leaves the LM's alone
        self.gate = linear_like(gate, init) if gate is not None else None
        self.up = linear_like(up, init)
        self.down = linear_like(down, init)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, lm_ffw):
        """ x [B,L,D] -> [B,L,D]. lm_ffw is not used; LoRAFFW.forward needs it. """
        if self.gate is None:
            hidden = [self.up(x)]  # [B,L,4D]
        else:
            hidden = [self.gate(x), self.up(x)]  # 2x [B,L,4D]
        # the backward pass recomputes the activation: to store it would take a tenth of the memory
        # of a step
        y = recomputed(True, self.second_half, *hidden)
        return self.dropout(y)  # [B,L,D]

    def second_half(self, *hidden):
        """ Activation and last layer: (up x) or (gate x, up x), [B,L,4D] each -> [B,L,D]. """
        y = self.act(hidden[0])  # [B,L,4D]
        if self.gate is not None:
            y = y * hidden[1]
        return self.down(y)  # [B,L,D]


class LoRAFFW(nn.Module):
    """ The frozen FFW of the LM block with LoRA on each of its linear layers, as DeepMLF trains
    SmolLM2 on MOSI. """
    def __init__(self, lm_ffw, rank, alpha, dropout=0.0):
        super().__init__()

        def lora(layer):
            n_out, n_in = weight_of(layer).shape
            return LoRA(n_in, n_out, rank, alpha, dropout)

        gate, up, down, _ = lm_ffw
        self.gate = lora(gate) if gate is not None else None
        self.up = lora(up)
        self.down = lora(down)

    def forward(self, x, lm_ffw):
        """ x [B,L,D], lm_ffw (gate, up, down, act) of the LM block -> [B,L,D]. """
        gate, up, down, act = lm_ffw
        if gate is None:
            hidden = act(self.up(x, up))  # [B,L,4D]
        else:
            hidden = act(self.gate(x, gate)) * self.up(x, up)  # [B,L,4D]
        return self.down(hidden, down)  # [B,L,D]


# --------------------------------------------------------------------------------------------------
# The MM block of DeepMLF

class CrossAttention(nn.Module):
    """
    Multi-head cross-attention: queries from LM tokens, keys and values from the audiovisual
    sequence Z. No biases. The logits are scaled by 1/sqrt(D / n_heads). The release scales them by
    1/sqrt(D), which makes them four times smaller with its 16 heads.
    """
    def __init__(self, D, d_context, n_heads, dropout=0.0):
        super().__init__()
        check_heads(n_heads, D, 'mm_heads', 'the LM width ')
        self.n_heads = n_heads
        self.scale = (D // n_heads) ** -0.5
        self.dropout = dropout
        self.q_proj = nn.Linear(D, D, bias=False)
        self.kv_proj = nn.Linear(d_context, 2 * D, bias=False)
        self.out_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, z, z_mask):
        """ x [B,L,D] queries, z [B,m,d] keys and values, z_mask [B,m] -> [B,L,D]. """
        B, L, D = x.shape
        m, h = z.shape[1], self.n_heads
        q = self.q_proj(x).view(B, L, h, -1).transpose(1, 2)  # [B,h,L,D/h]
        k, v = self.kv_proj(z).view(B, m, 2, h, -1).permute(2, 0, 3, 1, 4)  # 2x [B,h,m,D/h]
        p = self.dropout * self.training
        y = F.scaled_dot_product_attention(
            q, k, v, z_mask[:, None, None], p, scale=self.scale)  # [B,h,L,D/h]
        y = self.out_proj(y.transpose(1, 2).reshape(B, L, D))  # [B,L,D]
        return F.dropout(y, self.dropout, self.training)

    def weights(self, x, z, z_mask):
        """ The attention weights, for figures: x [B,L,D], z [B,m,d], z_mask [B,m] -> [B,h,L,m]. """
        B, L, D = x.shape
        q = self.q_proj(x).view(B, L, self.n_heads, -1).transpose(1, 2)  # [B,h,L,D/h]
        kv = self.kv_proj(z).view(B, z.shape[1], 2, self.n_heads, -1)  # [B,m,2,h,D/h]
        k = kv[:, :, 0].transpose(1, 2)  # [B,h,m,D/h]
        scores = self.scale * q @ k.transpose(2, 3)  # [B,h,L,m]
        return scores.masked_fill(~z_mask[:, None, None], -torch.inf).softmax(-1)


class MMBlock(nn.Module):
    """
    DeepMLF's multimodal block (paper 4.3.3, eqs. 8-11). It runs after an LM block:

        x_f <- x_f + g(a_1) GCA(norm_1(x_f), Z)                fusion tokens attend to Z
        x   <- x   + g(a_2) FFW(norm_2(x)),  x = [x_t ; x_f]   every token, text too

    gate: the function g. 'sigmoid' starts at .5. 'tanh' starts at 0: the block changes nothing at
    first, and only its gates get a gradient in the first step. 'none' is the constant 1.
    query: the tokens that attend to Z, 'fusion', 'text+fusion' or 'text' (the paper's Table 10).
    With 'text' the fusion tokens stay and read Z through the text; the release drops them.
    ffw: 'full', 'lora' or 'none'.
    norm_2 and, with ffw_init='lm', the full FFW start as copies of the LM block's. So does post_2, the
    norm behind the FFW that some families have.

    norms: the LM block's norms before and behind its FFW; nn.Identity, or Times, where it has none.
    norm_offset: 1 if they multiply by 1 + weight, else 0.
    """
    def __init__(self, D, d, norms, lm_ffw, n_heads, query='fusion', gate='sigmoid',
                 ffw='full', ffw_init='lm', lora_rank=None, lora_alpha=None, lora_dropout=0.0,
                 dropout=0.0, norm_offset=0):
        super().__init__()
        self.query = query
        self.gate = gate
        # copies of the LM's norms: their type (LayerNorm or RMSNorm) and eps depend on the family
        before, behind = (copy.deepcopy(norm).float().requires_grad_(True) for norm in norms)
        self.norm_1 = copy.deepcopy(behind if isinstance(before, nn.Identity) else before)
        if getattr(self.norm_1, 'weight', None) is not None:  # OLMo's norms have no weights
            nn.init.constant_(self.norm_1.weight, 1.0 - norm_offset)
        if getattr(self.norm_1, 'bias', None) is not None:
            nn.init.zeros_(self.norm_1.bias)
        # made before gca and ffw: the gradient norm sums weights in this order, and sums of another
        # order round differently
        self.norm_2 = before if ffw != 'none' else None
        self.post_2 = behind if ffw != 'none' else None
        self.gca = CrossAttention(D, d, n_heads, dropout)
        self.ffw = None
        if ffw == 'full':
            self.ffw = FFW(lm_ffw, ffw_init, dropout)
        if ffw == 'lora':
            self.ffw = LoRAFFW(lm_ffw, lora_rank, lora_alpha, lora_dropout)
        gated = gate != 'none'
        self.a_1 = nn.Parameter(torch.zeros(1)) if gated else None
        self.a_2 = nn.Parameter(torch.zeros(1)) if gated and ffw != 'none' else None

    def gates(self):
        """ The two gate values (GCA, FFW): g(a_1) and g(a_2), or 1.0 where there is no gate. """
        g = {'sigmoid': torch.sigmoid, 'tanh': torch.tanh, 'none': None}[self.gate]
        return [1.0 if a is None else g(a) for a in (self.a_1, self.a_2)]

    def attend(self, x, z, z_mask, gate):
        """ x [B,L,D] plus its gated cross-attention to z [B,m,d] -> [B,L,D]. """
        return x + (gate * self.gca(self.norm_1(x), z, z_mask)).to(x.dtype)

    def project(self, x, lm_ffw, gate):
        """ x [B,L,D] plus the gated FFW of x -> [B,L,D]. """
        y = self.post_2(self.ffw(self.norm_2(x), lm_ffw))  # [B,L,D]
        return x + (gate * y).to(x.dtype)

    def forward(self, x_t, x_f, z, z_mask, lm_ffw):
        """ x_t [B,T,D], x_f [B,F,D], z [B,m,d], z_mask [B,m], lm_ffw of the LM block before -> the
        new x_t and x_f. """
        g_1, g_2 = self.gates()
        if 'fusion' in self.query:
            x_f = self.attend(x_f, z, z_mask, g_1)  # [B,F,D]
        if 'text' in self.query:
            x_t = self.attend(x_t, z, z_mask, g_1)  # [B,T,D]
        if self.ffw is None:
            return x_t, x_f
        # the FFW works on each token by itself, so two calls equal one call on [x_t ; x_f]
        return self.project(x_t, lm_ffw, g_2), self.project(x_f, lm_ffw, g_2)


# --------------------------------------------------------------------------------------------------
# Augmentation of embeddings

def seqaug(x, lengths, rate, p_apply=1.0, draw='fixed'):
    """
    SeqAug (Georgiou & Potamianos 2023): some feature dimensions of a clip get their values in
    another time order.

    Each clip draws one permutation of its real steps and a Bernoulli(rate) subset of its
    dimensions. The chosen dimensions take their values in the permuted order, at all steps; the
    others do not change, and padding stays where it is. With probability 1 - p_apply a clip is not
    changed at all.

    draw: how a clip's rate is drawn. 'fixed': `rate`. 'beta': Beta(.2, .2), which is mostly close
    to 0 or 1; `rate` is not used. 'halfnormal': rate + |N(0, .05)|, at most 1.

    x [B,S,d], lengths [B] -> [B,S,d]. Draws come from torch's global generator, which train.py
    seeds for each micro-batch.
    """
    B, S, d = x.shape
    device = x.device
    rates = torch.full((B,), float(rate), device=device)  # [B]
    if draw == 'beta':
        rates = torch.distributions.Beta(.2, .2).sample((B,)).to(device)  # [B]
    if draw == 'halfnormal':
        rates = (rates + .05 * torch.randn(B, device=device).abs()).clamp(max=1)  # [B]
    rates = rates * (torch.rand(B, device=device) < p_apply)

    # a random key for each real step and inf for padding: the stable sort permutes the real steps
    # and keeps the padding, whose keys are equal, in place
    padding = torch.arange(S, device=device) >= lengths[:, None]  # [B,S]
    keys = torch.rand(B, S, device=device).masked_fill(padding, torch.inf)  # [B,S]
    order = keys.argsort(dim=1, stable=True)  # [B,S]
    shuffled = x.gather(1, order[:, :, None].expand(B, S, d))  # [B,S,d]

    chosen = torch.rand(B, 1, d, device=device) < rates[:, None, None]  # [B,1,d]
    return torch.where(chosen, shuffled, x)  # [B,S,d]


def augment_embeddings(x, lengths, kind, rate, p_apply, draw):
    """
    Text embeddings as they enter the LM in training (DeepMLF's Table 12). kind: 'seqaug'; 'noise'
    (Gaussian, std `rate` times a token's root mean square); 'dropout' (probability `rate`); 'none'.
    p_apply and draw are for 'seqaug'. x [B,T,D], lengths [B] -> [B,T,D].
    """
    if kind == 'seqaug':
        return seqaug(x, lengths, rate, p_apply, draw)
    if kind == 'noise':
        return x + rate * x.square().mean(-1, True).sqrt() * torch.randn_like(x)  # [B,T,D]
    if kind == 'dropout':
        return F.dropout(x, rate)
    return x


# --------------------------------------------------------------------------------------------------
# The audiovisual encoder

def pool_frames(x, lengths, n_slots, m):
    """
    Pools each clip's n real frames into n_slots slots: slot j is the mean of the frames from
    floor(j n / n_slots) to ceil((j+1) n / n_slots) - 1. With n = n_slots the frames do not change.
    With n < n_slots frames repeat, and a slot between two frames is their mean. A clip without
    frames gives zeros. (The release averages frames t, t+m, t+2m, .., padding included, so every
    slot is nearly the mean over the clip.)

    x [B,S,d], lengths [B], n_slots [B] -> [B,m,d], with zeros behind a clip's slots. m is an int,
    at least the largest of n_slots. It is an argument because reading that number from a GPU would
    stall the GPU.
    """
    j = torch.arange(m, device=x.device)  # [m]
    n, k = lengths[:, None], n_slots[:, None]  # [B,1] each
    first = j * n // k  # [B,m]
    end = ((j + 1) * n + k - 1) // k  # [B,m], behind the last frame

    s = torch.arange(x.shape[1], device=x.device)  # [S]
    inside = (s >= first[..., None]) & (s < end[..., None])  # [B,m,S]
    inside = inside & (j < k)[..., None]  # [B,m,S]
    weight = inside.to(x.dtype) / (end - first).clamp(min=1)[..., None]  # [B,m,S]
    return weight @ x  # [B,m,d]


def sinusoid(n, d, device=None):
    """ Sinusoidal positions from 1: d/2 sines, then d/2 cosines -> [n,d]. This is fairseq's layout,
    which MulT and DeepMLF use. """
    half = d // 2
    step = -math.log(10000) / max(half - 1, 1)
    frequency = torch.exp(torch.arange(half, device=device) * step)  # [d/2]
    angle = torch.arange(1, n + 1, device=device)[:, None] * frequency  # [n,d/2]
    return F.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, d - 2 * half))  # [n,d]


class EncoderLayer(nn.Module):
    """ A pre-norm Transformer encoder layer (DeepMLF eqs. 1-2): self-attention, then a GELU FFW of
    width 4d. """
    def __init__(self, d, n_heads, dropout=0.0):
        super().__init__()
        self.n_heads = n_heads
        self.dropout = dropout
        self.norm_1 = nn.LayerNorm(d)
        self.norm_2 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, mask, n=None):
        """ x [B,m,d], mask [B,m] or None -> [B,m,d], or [B,n,d]: the first n positions alone. """
        B, m, _ = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, m, 3, self.n_heads, -1)  # [B,m,3,h,d/h]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3x [B,h,m,d/h]
        if mask is not None:
            mask = mask[:, None, None]  # [B,1,1,m]
        p = self.dropout * self.training
        y = F.scaled_dot_product_attention(q[:, :, :n], k, v, mask, p)  # [B,h,n,d/h]
        x = x[:, :n] + self.drop(self.out(y.transpose(1, 2).flatten(2)))  # [B,n,d]

        y = self.drop(F.gelu(self.up(self.norm_2(x))))  # [B,n,4d]
        return x + self.drop(self.down(y))  # [B,n,d]


class AVEncoder(nn.Module):
    """
    DeepMLF's AV encoder (paper 4.2, eq. 6): a Transformer encoder for audio and one for video.
    Their outputs are joined along features and mapped back to width d. It returns Z and the mask of
    its real slots.

    Both streams of a clip are pooled onto one time line of min(av_len, longer stream) slots, so
    that slot j of audio and slot j of video cover the same part of the clip. A stream that a clip
    lacks is replaced by zeros. A stream that the corpus lacks has no encoder. The last LayerNorm is
    in the release and not in the paper: without it, the output of a pre-norm stack has no fixed
    scale.
    """
    def __init__(self, widths, d, n_layers, n_heads, av_len, dropout=0.0, seqaug_rate=0.0):
        super().__init__()
        if not widths:
            raise ValueError("the AV encoder needs audio or vision, and this corpus has neither: "
                             "take another corpus.")
        check_heads(n_heads, d, 'av_heads', 'av_width=')
        self.d = d
        self.av_len = av_len
        self.dropout = dropout
        self.seqaug_rate = seqaug_rate
        self.proj = nn.ModuleDict({s: nn.Linear(w, d, bias=False) for s, w in widths.items()})
        self.layers = nn.ModuleDict({
            s: nn.ModuleList(EncoderLayer(d, n_heads, dropout) for _ in range(n_layers))
            for s in widths})
        self.fusion = nn.Linear(len(widths) * d, d)
        self.norm = nn.LayerNorm(d)

    def encode(self, stream, x, lengths, n_slots, mask):
        """ One stream: frames x [B,S,d_a], of which `lengths` [B] are real -> [B,m,d]. """
        if self.training and self.seqaug_rate:
            x = seqaug(x, lengths, self.seqaug_rate)  # [B,S,d_a]
        x = pool_frames(x, lengths, n_slots, mask.shape[1])  # [B,m,d_a]
        x = math.sqrt(self.d) * self.proj[stream](x)  # [B,m,d]
        x = x + sinusoid(x.shape[1], self.d, x.device)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers[stream]:
            x = layer(x, mask)
        return x

    def forward(self, batch):
        """ batch: audio [B,S,d_a], audio_len [B], vision .. -> Z [B,m,d], mask [B,m], with at
        least one slot per clip. """
        lengths = torch.stack([batch[f'{s}_len'] for s in self.proj])  # [2,B]
        n_slots = lengths.amax(0).clamp(1, self.av_len)  # [B]
        m = min(self.av_len, max(batch[s].shape[1] for s in self.proj))
        mask = torch.arange(m, device=n_slots.device) < n_slots[:, None]  # [B,m]
        # no autocast: at width 30 bf16 gains nothing, and it would round the raw features
        with torch.autocast(mask.device.type, enabled=False):
            z = [self.encode(s, batch[s], batch[f'{s}_len'], n_slots, mask)
                 for s in self.proj]  # 2x [B,m,d]
            return self.norm(self.fusion(torch.cat(z, -1))), mask  # [B,m,d], [B,m]


# --------------------------------------------------------------------------------------------------
# MSE-Adapter: pseudo tokens from one vector per modality

class MatchScale(nn.Module):
    """ Scales each pseudo token to the root mean square of the LM's token embeddings, times a
    learned gain. """
    def __init__(self, n_pseudo, embed_rms):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n_pseudo))
        self.embed_rms = embed_rms

    def forward(self, x):
        """ x [B,P,D] -> [B,P,D]. """
        return F.rms_norm(x, x.shape[-1:]) * self.embed_rms * self.gain[:, None]


class FreeTokens(nn.Module):
    """ P learned vectors, the same for every clip, as pseudo tokens (Lester et al. 2021). """
    def __init__(self, n_pseudo, D, embed_rms):
        super().__init__()
        self.tokens = nn.Parameter(embed_rms * torch.randn(n_pseudo, D))  # [P,D]

    def forward(self, batch, text, text_mask):
        return self.tokens.expand(len(text), -1, -1)  # [B,P,D]


class MSEAdapter(nn.Module):
    """
    MSE-Adapter (Yang et al. 2025): text, audio and video -> P pseudo tokens for a frozen LM.

    Audio and video each pass a forward LSTM. The last real step, projected to width d, is v_s
    [B,d]. Text-Guide-Mixer multiplies each v_s elementwise by t, the projected mean text embedding,
    and sums the products. Multi-Scale-Fusion applies bottlenecks of width D/8, D/32 and D/16 and
    mixes their outputs with one weight each. One linear layer maps to the LM's width, another to P
    tokens. The widths of the bottlenecks are fractions of the LM's width D, as in the release; they
    give the parameter counts that the paper prints. The paper's text has fractions of d.

    projection 'released': token p is w_p m + b_p, so all P tokens lie in the span of m and the
    all-ones vector. 'full': each token has a matrix of its own and the scale of the LM's
    embeddings.
    A clip without frames counts as one frame of zeros. A modality that the corpus lacks has no
    encoder.
    Ablations: tgm=False adds t and the v_s instead. msf=False skips Multi-Scale-Fusion.
    """
    def __init__(self, widths, D, n_pseudo, d, lstm_widths, scales, projection='released',
                 embed_rms=1.0, tgm=True, msf=True):
        super().__init__()
        if not widths:
            raise ValueError("MSE-Adapter needs audio or vision, and this corpus has neither: "
                             "take another corpus.")
        self.n_pseudo = n_pseudo
        self.tgm = tgm
        self.msf = msf
        self.lstm = nn.ModuleDict({
            s: nn.LSTM(w, lstm_widths[s], batch_first=True) for s, w in widths.items()})
        self.proj = nn.ModuleDict({s: nn.Linear(lstm_widths[s], d) for s in widths})
        self.text_proj = nn.Linear(D, d)

        hidden = [max(1, D // k) for k in scales] if msf else []
        self.squeeze = nn.ModuleList(nn.Linear(d, h) for h in hidden)
        self.expand = nn.ModuleList(nn.Linear(h, d) for h in hidden)
        # the paper's 1x1 convolution: one weight per scale, the same for all features
        self.mix = nn.Linear(len(scales), 1) if msf else None

        full = projection == 'full'
        self.up = nn.Linear(d, n_pseudo * D if full else D)
        self.out = MatchScale(n_pseudo, embed_rms) if full else nn.Linear(1, n_pseudo)

    def text_guide_mixer(self, batch, text, text_mask):
        """ Text-Guide-Mixer: text [B,T,D], text_mask [B,T] and the streams in batch -> [B,d]. """
        t = self.text_proj(masked_mean(text, text_mask))  # [B,d]
        # a forward LSTM reads padding after the last real step, so sequences need no packing
        v = [self.proj[s](last_step(lstm(batch[s])[0], batch[f'{s}_len']))
             for s, lstm in self.lstm.items()]  # 2x [B,d]
        return t * sum(v) if self.tgm else t + sum(v)

    def multi_scale_fusion(self, x):
        """ Multi-Scale-Fusion: x [B,d] -> [B,d]. """
        if not self.msf:
            return x
        at_scales = [up(F.gelu(down(x)))
                     for down, up in zip(self.squeeze, self.expand)]  # 3x [B,d]
        return self.mix(torch.stack(at_scales, -1))[..., 0]  # [B,d]

    def forward(self, batch, text, text_mask):
        """ batch: audio [B,S,d_a], audio_len [B], ..; text [B,T,D], text_mask [B,T] -> [B,P,D]. """
        x = self.text_guide_mixer(batch, text, text_mask)  # [B,d]
        m = self.up(self.multi_scale_fusion(x))  # [B,D] or [B,P D]
        if isinstance(self.out, MatchScale):
            return self.out(m.view(len(m), self.n_pseudo, -1))  # [B,P,D]
        return self.out(m[..., None]).transpose(1, 2)  # [B,P,D]


# --------------------------------------------------------------------------------------------------
# CMPTA: pseudo tokens from cross-attention between pairs of modalities

class Align(nn.Module):
    """
    CMPTA's temporal alignment (eqs. 3-5): LayerNorm(W h_t + b) of a BiLSTM's output h_t at every
    time step, then dropout. lstm: 'bi', 'one-way' (the paper's ablation) or 'off' (h_t is the frame
    itself).
    """
    def __init__(self, width, d, lstm='bi', dropout=0.0, recompute=False):
        super().__init__()
        hidden = d // 2 if lstm == 'bi' else d
        self.ahead = nn.LSTM(width, hidden, batch_first=True) if lstm != 'off' else None
        self.back = nn.LSTM(width, hidden, batch_first=True) if lstm == 'bi' else None
        self.proj = nn.Linear(width if lstm == 'off' else d, d)
        self.norm = nn.LayerNorm(d)
        self.dropout = dropout
        self.recompute = recompute

    def forward(self, x, lengths):
        """ x [B,S,width], lengths [B] -> [B,S,d]. """
        h = [x]  # [B,S,width]
        if self.ahead is not None:
            h = [recomputed(self.recompute, self.ahead, x)[0]]  # [B,S,d/2] for 'bi'
        if self.back is not None:
            back, _ = recomputed(self.recompute, self.back, reverse(x, lengths))  # [B,S,d/2]
            h.append(reverse(back, lengths))
        y = self.norm(self.proj(torch.cat(h, -1)))  # [B,S,d]
        return F.dropout(y, self.dropout, self.training)


class DirectedAttention(nn.Module):
    """
    One direction X <- Y of CMPTA (eq. 7): multi-head cross-attention from X's steps to Y's, pooled
    over X to one token per clip. pool: 'mean' over X's real steps, the 'last' of them, or a
    'learned' weighting. (The pooling is not legible in the scan of the paper.) attend=False is
    the ablation "no CMPT adapter": the token is X itself, pooled.
    """
    def __init__(self, d, n_heads, pool='mean', dropout=0.0, attend=True, recompute=False):
        super().__init__()
        check_heads(n_heads, d, 'cmpta_heads', 'cmpta_width=')
        self.n_heads = n_heads
        self.pool = pool
        self.dropout = dropout
        self.recompute = recompute
        self.q_proj = nn.Linear(d, d) if attend else None
        self.kv_proj = nn.Linear(d, 2 * d) if attend else None
        self.out_proj = nn.Linear(d, d)
        self.score = nn.Linear(d, 1) if pool == 'learned' else None

    def pool_weights(self, x, mask):
        """ The weights of the steps of x [B,L,d] in the pooled token, which sum to 1 -> [B,L]. """
        if self.pool == 'learned':
            return self.score(x)[..., 0].masked_fill(~mask, -torch.inf).softmax(-1)
        if self.pool == 'last':
            return F.one_hot(mask.sum(1) - 1, x.shape[1]).to(x.dtype)
        return mask.to(x.dtype) / mask.sum(1, keepdim=True)

    def attention_weights(self, x, x_mask, y, y_mask):
        """ The weight of each step of y [B,M,d] in the pooled token of x [B,L,d], for each head ->
        [B,h,M]. Rows sum to 1, except for dropout. """
        W = self.kv_proj.weight.chunk(2)[0]  # [d,d]
        b = self.kv_proj.bias.chunk(2)[0]  # [d]
        q = split_heads(self.q_proj(x), self.n_heads)  # [B,h,L,d/h]
        k = split_heads(F.linear(y, W, b), self.n_heads)  # [B,h,M,d/h]
        logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)  # [B,h,L,M]
        p = logits.masked_fill_(~y_mask[:, None, None], -torch.inf).softmax(-1)  # [B,h,L,M]
        weights = self.pool_weights(x, x_mask)[:, None, None]  # [B,1,1,L]
        return (weights @ F.dropout(p, self.dropout, self.training))[:, :, 0]  # [B,h,M]

    def forward(self, x, x_mask, y, y_mask):
        """ x [B,L,d] gives the queries, y [B,M,d] the keys and values; each mask has at least one
        real step per clip -> token [B,d]. """
        if self.q_proj is None:
            return self.out_proj((self.pool_weights(x, x_mask)[:, None] @ x)[:, 0])  # [B,d]
        p = recomputed(self.recompute, self.attention_weights, x, x_mask, y, y_mask,
                       dropout=True)  # [B,h,M]
        # only the pooled token is needed, so y is averaged before the projection to values: this
        # projects h vectors per clip instead of M
        W = self.kv_proj.weight.chunk(2)[1].unflatten(0, (self.n_heads, -1))  # [h,d/h,d]
        b = self.kv_proj.bias.chunk(2)[1].unflatten(0, (self.n_heads, -1))  # [h,d/h]
        z = torch.einsum('bhd,hed->bhe', p @ y, W) + p.sum(-1, keepdim=True) * b  # [B,h,d/h]
        return self.out_proj(z.flatten(1))  # [B,d]


class CMPTA(nn.Module):
    """
    CMPTA (Hans CSA 2026): text, audio and video -> P pseudo tokens for a frozen LM.

    Each modality passes Align. Each direction X <- Y gives one token: t1 t2 v1 v2 a1 a2 are T<-V
    T<-A V<-T V<-A A<-T A<-V (eq. 8). The tokens pass Transformer layers, a LayerNorm and a linear
    layer to the LM's width. n_pseudo below 6 keeps the first tokens; above 6, learned tokens are
    added before the Transformer layers.

    The scan of the paper does not show the number of heads and layers, the pooling, the LayerNorm
    before the linear layer, the learned tokens, or whether the text is aligned too: these are our
    choices.
    A clip without frames counts as one frame of zeros. Where the corpus lacks a modality, the
    tokens of its directions are replaced by learned ones.
    recompute: the backward pass computes the LSTMs and the attention again, which saves memory.
    """
    def __init__(self, widths, D, n_pseudo, d, n_heads, n_layers, align='bi', align_text=True,
                 attend=True, pool='mean', dropout=0.0, recompute=False):
        super().__init__()
        if not widths:
            raise ValueError("CMPTA needs audio or vision, and this corpus has neither: "
                             "take another corpus.")
        if align == 'bi' and d % 2:
            raise ValueError(f"cmpta_width={d} must be even, half for each direction of the "
                             "BiLSTM: set it to an even number.")
        streams = ['text'] + [s for s in ('vision', 'audio') if s in widths]
        directions = [(x, y) for x in streams for y in streams if x != y][:n_pseudo]
        used = {x for x, _ in directions} | {y for _, y in directions if attend}
        self.streams = [s for s in streams if s in used]  # others get no weights

        aligning = {s: align for s in widths} | dict(text=align if align_text else 'off')
        self.align = nn.ModuleDict({
            s: Align(w, d, aligning[s], dropout, recompute)
            for s, w in (dict(text=D) | widths).items() if s in used})
        self.directed = nn.ModuleDict({
            f'{x}_from_{y}': DirectedAttention(d, n_heads, pool, dropout, attend, recompute)
            for x, y in directions})
        n_learned = n_pseudo - len(directions)
        self.more_tokens = nn.Parameter(torch.randn(n_learned, d)) if n_learned else None

        self.layers = nn.ModuleList(EncoderLayer(d, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, D)

    def aligned(self, batch, text, text_mask):
        """ The aligned streams: stream -> (x [B,L,d], mask [B,L]), with at least one real step per
        clip. """
        raw = {s: (batch[s], batch[f'{s}_len'].clamp(min=1)) for s in self.streams if s != 'text'}
        if 'text' in self.streams:
            raw['text'] = text, text_mask.sum(1)
        aligned = {}
        for s, (x, n) in raw.items():
            y = self.align[s](x, n)  # [B,L,d]
            aligned[s] = y, torch.arange(x.shape[1], device=x.device) < n[:, None]  # [B,L]
        return aligned

    def forward(self, batch, text, text_mask):
        """ batch: audio [B,S,d_a], audio_len [B], ..; text [B,T,D], text_mask [B,T] -> [B,P,D]. """
        aligned = self.aligned(batch, text, text_mask)
        absent = None, None  # y, which attend=False does not read and self.aligned may leave out
        tokens = [direction(*aligned[x], *aligned.get(y, absent))
                  for (x, y), direction in self.pairs()]  # 6x [B,d]
        z = torch.stack(tokens, 1)  # [B,6,d]
        if self.more_tokens is not None:
            z = torch.cat([z, self.more_tokens.expand(len(z), -1, -1)], 1)  # [B,P,d]
        for layer in self.layers:
            z = layer(z, None)
        return self.up(self.norm(z))  # [B,P,D]

    def pairs(self):
        """ The directions with their names: [((X, Y), module of X <- Y), ..]. """
        return [(name.split('_from_'), direction) for name, direction in self.directed.items()]

    @torch.no_grad()
    def attention(self, batch, text, text_mask):
        """ The attention weights, for figures: name of a token, such as 'text_from_vision' -> the
        weight of each step of the other modality, [B,M], the mean over heads. Rows sum to 1. Not
        for attend=False, which has no attention. """
        aligned = self.aligned(batch, text, text_mask)
        return {f'{x}_from_{y}': direction.attention_weights(*aligned[x], *aligned[y]).mean(1)
                for (x, y), direction in self.pairs()}


# --------------------------------------------------------------------------------------------------
# CrossSent: audio and video into a fine-tuned encoder

def interpolate(x, lengths, n_tokens, m):
    """
    Linear interpolation of each clip's real frames at n_tokens [B] places: the first token gets the
    first frame and the last token the last frame. So a text of one token reads the first frame
    alone. x [B,S,d], lengths [B] -> [B,m,d], with zeros behind a clip's tokens.
    """
    j = torch.arange(m, device=x.device)  # [m]
    n = lengths.clamp(min=1)[:, None]  # [B,1]
    place = j * (n - 1) / (n_tokens[:, None] - 1).clamp(min=1)  # [B,m], between two frames
    place = place.clamp(max=n - 1)
    low = place.long()  # [B,m]
    high = (low + 1).clamp(max=n - 1)  # [B,m]

    x_low = x.gather(1, low[..., None].expand(-1, -1, x.shape[2]))  # [B,m,d]
    x_high = x.gather(1, high[..., None].expand(-1, -1, x.shape[2]))  # [B,m,d]
    y = torch.lerp(x_low, x_high, (place - low)[..., None].to(x.dtype))  # [B,m,d]
    real = (j < n_tokens[:, None]) & (lengths[:, None] > 0)  # [B,m]
    return y * real[..., None]


def resample_to_tokens(x, lengths, n_tokens, before, T, resample):
    """
    A stream resampled to one frame per text token, for CrossSent. Each clip's real frames are
    spread over its n_tokens [B] tokens, special tokens not counted, by 'linear' interpolation or as
    the 'mean' of neighbouring frames (pool_frames). The `before` special tokens in front, those
    behind and padding get zeros. x [B,S,d], lengths [B] -> [B,T,d].
    """
    m = T - before
    function = pool_frames if resample == 'mean' else interpolate
    y = function(x, lengths, n_tokens, m)  # [B,m,d]
    return F.pad(y, (0, 0, before, 0))  # [B,T,d]


def frames_on_tokens(batch, streams, ends, resample):
    """
    The frames of each of `streams`, laid out for a text of tokens [B,T]: stream -> (frames
    [B,L,d_s], mask [B,L]).

    resample: 'linear' or 'mean' (see resample_to_tokens), or 'words', where a token gets the frame
    of its word, whose number is batch['word'] [B,T]. In these cases L = T, and special tokens
    and padding have zeros. 'none' returns the frames as they are. ends: the numbers of special
    tokens before and behind each text.
    """
    n = batch['text_len']  # [B]
    T = batch['tokens'].shape[1]
    before, behind = ends
    n_own = n - before - behind  # [B]
    own = torch.arange(T, device=n.device) - before  # [T], 0 at the first token of the text
    own = (own >= 0) & (own < n_own[:, None])  # [B,T]

    out = {}
    for s in streams:
        x, length = batch[s], batch[s + '_len']
        if resample == 'none':
            out[s] = x, batch[s + '_mask']
        elif resample == 'words':
            word = batch['word']  # [B,T], -1 at special tokens
            has = (word >= 0) & (word < length[:, None])  # [B,T]
            frame = word.clamp(min=0, max=x.shape[1] - 1)[..., None]  # [B,T,1]
            y = x.gather(1, frame.expand(-1, -1, x.shape[2]))  # [B,T,d_s]
            out[s] = y * has[..., None], has
        else:
            y = resample_to_tokens(x, length, n_own.clamp(min=1), before, T, resample)  # [B,T,d_s]
            out[s] = y * own[..., None], own & (length > 0)[:, None]
    return out


class GMRA(nn.Module):
    """
    CrossSent's Gated Multimodal Residual Adapter (Liu et al. 2026, section 3.2). Its equations are
    images that we could not read, so these follow the paper's words. It runs once, before one layer
    of an encoder:

        C = MHA(query H_t, keys and values [H_a ; H_v])          H_m: linear maps to width d
        g = sigmoid(W_g [H_t ; C])                               a gate for each token and feature
        F = X_t + g * C,  O = F + W_2 gelu(W_1 LN(F))            X_t: the encoder's hidden states

    concat: 'sequence' joins audio and video along time, 'features' along features, for which both
    must be on the text's time line.
    start: 'identity' sets W_2 and the output projection of MHA to 0, so that at first the GMRA does
    not change X_t.
    The paper does not state this start, the norms, the activation, and that F adds g * C to X_t and
    not to H_t.
    With d = D = 768, mult=4 and 17 features per stream it has 8.89 M weights, as in Table 4.
    """
    def __init__(self, widths, D, d, n_heads, mult, concat='sequence', start='identity',
                 dropout=0.0):
        super().__init__()
        check_heads(n_heads, d, 'gmra_heads', 'gmra_width=')
        self.n_heads = n_heads
        self.concat = concat
        self.dropout = dropout
        self.proj = nn.ModuleDict({
            s: nn.Linear(w, d, bias=False) for s, w in widths.items()})
        self.norms = nn.ModuleDict({s: nn.LayerNorm(d) for s in widths})
        self.text_proj = nn.Linear(D, d)
        self.text_norm = nn.LayerNorm(d)

        d_av = d * len(widths) if concat == 'features' else d
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d_av, d)
        self.v_proj = nn.Linear(d_av, d)
        self.out_proj = nn.Linear(d, D)
        self.gate = nn.Linear(d + D, D)

        self.norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, int(mult * D))
        self.down = nn.Linear(int(mult * D), D)
        self.drop = nn.Dropout(dropout)
        if start == 'identity':
            for layer in (self.out_proj, self.down):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x, frames):
        """ x [B,T,D] enters an encoder layer; frames: stream -> (frames [B,L,d_s], mask [B,L]) ->
        [B,T,D]. """
        B, T, _ = x.shape
        h_t = self.text_norm(self.text_proj(x))  # [B,T,d]
        h = [self.norms[s](proj(frames[s][0])) for s, proj in self.proj.items()]  # 2x [B,L,d]
        masks = [frames[s][1] for s in self.proj]  # 2x [B,L]; below, 2L is L for concat='features'
        if self.concat == 'features':
            h_av = torch.cat(h, 2)  # [B,L,2d]
            mask = torch.stack(masks).any(0)  # [B,L]
        else:
            h_av = torch.cat(h, 1)  # [B,2L,d]
            mask = torch.cat(masks, 1)  # [B,2L]

        q = split_heads(self.q_proj(h_t), self.n_heads)  # [B,h,T,d/h]
        k = split_heads(self.k_proj(h_av), self.n_heads)  # [B,h,2L,d/h]
        v = split_heads(self.v_proj(h_av), self.n_heads)  # [B,h,2L,d/h]
        # a clip without real frames attends to its zeros, because softmax over nothing is NaN
        seen = mask | ~mask.any(1, keepdim=True)  # [B,2L]
        p = self.dropout * self.training
        c = F.scaled_dot_product_attention(q, k, v, seen[:, None, None], p)  # [B,h,T,d/h]
        c = self.out_proj(c.transpose(1, 2).reshape(B, T, -1))  # [B,T,D]

        gate = torch.sigmoid(self.gate(torch.cat([h_t, c], -1)))  # [B,T,D]
        x = x + self.drop(gate * c)
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))
