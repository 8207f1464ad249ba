"""
The frozen LM: a Hugging Face causal LM of a known family, whose layers our own code runs one by
one. TextEncoder runs a fine-tuned encoder in the same way. run/load_lm.py reads both from files.

The axis letters are those of model.py.
"""
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import unpacked
from configurator import AtLeast
from run.errors import ModelError, first_line
from run.fingerprints import fingerprint
from run.lm_checks import refuse_variants, token_limit


class TextModelKnobs:
    """ A pretrained text model. """
    lm = 'gpt2-large'          # Hugging Face name, folder, or the name of a run in needs
    trust_remote_code = False  # run the code of an LM's authors, for LMs unknown to transformers


class LMKnobs(TextModelKnobs):
    """ A frozen LM. """
    lm_init: Literal['pretrained', 'random'] = 'pretrained'  # 'random': new weights, as a control
    lm_depth: AtLeast(0) = 0   # run only so many of the LM's layers, from the first; 0: all
    context: AtLeast(0) = 0    # earlier utterances of the dialogue before each text, with speakers


class NewModelKnobs:
    """ A language model or encoder made from nothing. """
    lm_vocab: AtLeast(1) = 256      # of a new model: sentencepiece tokens, at most
    lm_width: AtLeast(1) = 64       # of a new model: D, width
    lm_layers: AtLeast(1) = 4       # of a new model: layers
    lm_heads: AtLeast(1) = 4        # of a new model: attention heads
    lm_positions: AtLeast(1) = 128  # of a new model: longest input, tokens


class EncoderKnobs(TextModelKnobs, NewModelKnobs):
    """ A text encoder of the BERT or RoBERTa family. """
    lm = 'bert-base-uncased'   # Hugging Face name, folder, or 'new': one of lm_layers x lm_width


# -------------------------------------------------------------------------------------------------
# What is known about each family of LMs

# One row per family: the names of its parts in transformers, and how it differs from Llama.
#
# Parts of the LM: layers, embed, wpe (learned positions), rope, rope_local, norm (the last one).
# Parts of a layer: norm_1, qkv, q_norm, k_norm, out, post_1 (the norm behind attention); norm_2,
# ffw, gate, up, gate_up (both in one matrix), down, act, post_2 (the norm behind the FFW).
#
# Differences. A value in quotes is the name of an entry in the LM's config.json.
#   wpe_offset=n             position 0 is row n of wpe
#   packed='parts', 'heads'  q, k, v are one matrix: first all of q, then k and v; or head by head
#   qk_norm='head'           q_norm and k_norm get [B,L,h,D/h]; 'all': [B,L,D]; 'split': [B,h,L,D/h]
#   clip                     q, k and v are clamped to this magnitude
#   pairs=True               rope rotates neighbouring features; 'given': cos and sin are repeated
#   rope_kinds               the kind of rope of each layer; or 1 for a layer with rope and 0 without
#   attention_scale          factor of q k
#   attention_root           q k is divided by the square root of this
#   attention_cap, logit_cap c: q k, or the logits, become c tanh(x / c)
#   parallel                 attention and FFW both read the layer's input
#   embed_scale              factor of the embeddings
#   embed_root=True          that factor is the square root of the width
#   residual_scale           factor of the outputs of attention and FFW
#   logit_scale, logit_divisor  factor and divisor of the logits
#   norm_offset=1            norms multiply by 1 + weight
LLAMA = dict(
    layers='model.layers',
    embed='model.embed_tokens',
    rope='model.rotary_emb',
    norm='model.norm',
    norm_1='input_layernorm',
    qkv=['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    out='self_attn.o_proj',
    norm_2='post_attention_layernorm',
    ffw='mlp',
    gate='mlp.gate_proj',
    up='mlp.up_proj',
    down='mlp.down_proj',
    act='mlp.act_fn',
)
HEAD_NORMS = dict(q_norm='self_attn.q_norm', k_norm='self_attn.k_norm', qk_norm='head')
NO_GATE = dict(gate=None)
PACKED_FFW = dict(gate=None, up=None, gate_up='mlp.gate_up_proj', act='mlp.activation_fn')
GLM = LLAMA | PACKED_FFW | dict(pairs=True)
GEMMA = LLAMA | dict(embed_root=True, norm_offset=1)
GEMMA_2 = GEMMA | dict(
    post_1='post_attention_layernorm',
    norm_2='pre_feedforward_layernorm',
    post_2='post_feedforward_layernorm',
    attention_root='query_pre_attn_scalar',
    attention_cap='attn_logit_softcapping',
    logit_cap='final_logit_softcapping',
)
FAMILIES = {
    'gpt2': dict(
        layers='transformer.h',
        embed='transformer.wte',
        wpe='transformer.wpe',
        norm='transformer.ln_f',
        norm_1='ln_1',
        qkv=['attn.c_attn'],
        packed='parts',
        out='attn.c_proj',
        norm_2='ln_2',
        ffw='mlp',
        up='mlp.c_fc',
        down='mlp.c_proj',
        act='mlp.act',
    ),
    'opt': dict(
        layers='model.decoder.layers',
        embed='model.decoder.embed_tokens',
        wpe='model.decoder.embed_positions',
        wpe_offset=2,
        norm='model.decoder.final_layer_norm',
        norm_1='self_attn_layer_norm',
        qkv=['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
        out='self_attn.out_proj',
        norm_2='final_layer_norm',
        up='fc1',
        down='fc2',
        act='activation_fn',
    ),
    'gpt_neox': dict(
        layers='gpt_neox.layers',
        embed='gpt_neox.embed_in',
        rope='gpt_neox.rotary_emb',
        norm='gpt_neox.final_layer_norm',
        norm_1='input_layernorm',
        qkv=['attention.query_key_value'],
        packed='heads',
        out='attention.dense',
        norm_2='post_attention_layernorm',
        parallel='use_parallel_residual',
        ffw='mlp',
        up='mlp.dense_h_to_4h',
        down='mlp.dense_4h_to_h',
        act='mlp.act',
    ),
    'llama': LLAMA,
    'mistral': LLAMA,
    'qwen2': LLAMA,  # its biases are in its own linears
    'qwen3': LLAMA | HEAD_NORMS,
    'qwen3_moe': LLAMA | HEAD_NORMS,  # its experts have no gate, up and down: no MM block
    'helium': LLAMA | dict(pairs=True),
    'ernie4_5': LLAMA | dict(pairs=True),
    'arcee': LLAMA | NO_GATE,
    'nemotron': LLAMA | NO_GATE | dict(norm_offset=1),
    'starcoder2': LLAMA | NO_GATE | dict(up='mlp.c_fc', down='mlp.c_proj', act='mlp.act'),
    'stablelm': LLAMA | dict(
        q_norm='self_attn.q_layernorm',
        k_norm='self_attn.k_layernorm',
        qk_norm='split',
        parallel='use_parallel_residual',
    ),
    'smollm3': LLAMA | dict(rope_kinds='no_rope_layers'),
    'phi3': LLAMA | PACKED_FFW | dict(qkv=['self_attn.qkv_proj'], packed='parts'),
    'glm': GLM,
    'glm4': GLM | dict(post_1='post_self_attn_layernorm', post_2='post_mlp_layernorm'),
    'granite': LLAMA | dict(
        embed_scale='embedding_multiplier',
        attention_scale='attention_multiplier',
        residual_scale='residual_multiplier',
        logit_divisor='logits_scaling',
    ),
    'cohere': LLAMA | HEAD_NORMS | dict(
        norm_2=None,  # attention and FFW share norm_1
        parallel=True,
        pairs='given',
        logit_scale='logit_scale',
    ),
    'olmo': LLAMA | dict(clip='clip_qkv'),
    'olmo2': LLAMA | HEAD_NORMS | dict(
        qk_norm='all',
        norm_1=None,
        post_1='post_attention_layernorm',
        norm_2=None,
        post_2='post_feedforward_layernorm',
    ),
    'gemma': GEMMA,
    'gemma2': GEMMA_2,
    'gemma3_text': GEMMA_2 | HEAD_NORMS | dict(
        rope_local='model.rotary_emb_local',  # before transformers 5
        rope_kinds='layer_types',
    ),
}
NEEDED_PARTS = ('norm_1', 'out', 'post_1', 'ffw', 'post_2')   # of a layer, where its row names them
OTHER_PARTS = ('q_norm', 'k_norm', 'norm_2', 'gate', 'up', 'gate_up', 'down', 'act')


def rotate(x, cos, sin, pairs=False):
    """
    Rotary position embedding (Su et al. 2021) of the first r features of each head. Feature i is
    rotated with feature i + r/2, or with pairs=True its neighbour. x [B,h,L,D/h]; cos, sin [B,L,r] as
    transformers lays them out, and with pairs='given' as neighbours need them -> [B,h,L,D/h].
    """
    r = cos.shape[-1]
    x, rest = x[..., :r], x[..., r:]  # [B,h,L,r], [B,h,L,D/h-r]
    if pairs and pairs != 'given':
        cos = cos[..., :r // 2].repeat_interleave(2, -1)  # [B,L,r]
        sin = sin[..., :r // 2].repeat_interleave(2, -1)  # [B,L,r]
    if pairs:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)  # [B,h,L,r]
    else:
        turned = torch.cat([-x[..., r // 2:], x[..., :r // 2]], -1)  # [B,h,L,r]
    # some families give cos and sin in float32 whatever the LM's dtype
    x = (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)  # [B,h,L,r]
    return torch.cat([x, rest], -1)  # [B,h,L,D/h]


def soft_cap(x, cap):
    """ cap tanh(x / cap), or x if cap is None. """
    return x if cap is None else cap * torch.tanh(x / cap)


class Times(nn.Module):
    """ Multiplies by a factor. """

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Rows:
    """
    Some rows of a linear layer, as a linear layer of its own that shares its weights.
    """

    def __init__(self, layer, rows):
        self.layer = layer
        self.rows = rows

    @property
    def weight(self):
        return self.layer.weight[self.rows]  # [n_out,n_in]

    @property
    def bias(self):
        return None if self.layer.bias is None else self.layer.bias[self.rows]  # [n_out]

    def __call__(self, x):
        if type(self.layer.weight) is not nn.Parameter:   # FSDP gathers it in a call of the layer
            return self.layer(x)[..., self.rows]  # [..,n_in] -> [..,n_out]
        return F.linear(x, self.weight, self.bias)  # [..,n_in] -> [..,n_out]


# -------------------------------------------------------------------------------------------------
# The frozen LM

class FrozenLM(nn.Module):
    """
    A Hugging Face causal LM of a known family, frozen: it gets no gradient, it is always in eval
    mode (the release trains with GPT-2's own dropout), and training changes none of its bits.

    We call its layers' parts ourselves, one layer at a time, with keys and values as plain
    arguments, so that a caller can put blocks between layers and run a few extra tokens over a
    text's keys and values. run/lm_compare.py holds the result against Hugging Face's own forward.
    """

    def __init__(self, hf, row=None):
        """ hf: the Hugging Face model; row: a row of FAMILIES, by default its family's. """
        super().__init__()
        c = hf.config
        self.family = c.model_type
        self.row = row or FAMILIES.get(self.family)
        if self.row is None:
            raise unknown_family(self.family)
        refuse_variants(c)
        self.hf = hf.requires_grad_(False).eval()

        self.width = c.hidden_size
        self.n_layers = c.num_hidden_layers
        self.n_heads = c.num_attention_heads
        self.n_kv_heads = getattr(c, 'num_key_value_heads', None) or self.n_heads
        self.head_width = getattr(c, 'head_dim', None) or self.width // self.n_heads
        self.vocabulary = c.vocab_size
        self.max_positions, self.limit = token_limit(c)
        self.attention_scale = self.value('attention_scale')  # None is 1 / sqrt(D/h)
        if self.value('attention_root') is not None:
            self.attention_scale = self.value('attention_root') ** -0.5
        self.attention_cap = self.value('attention_cap')
        self.clip = self.value('clip')
        self.parallel = self.value('parallel', False)
        self.logit_scale = self.value('logit_scale', 1.0) / self.value('logit_divisor', 1.0)
        self.logit_cap = self.value('logit_cap')
        self.embed_scale = self.value('embed_scale', 1.0)
        if self.row.get('embed_root'):
            self.embed_scale = self.width ** 0.5
        self._find_parts()
        # since transformers 5, Gemma's embedding multiplies by itself
        self.embed_multiplies = hasattr(self.parts['embed'], 'embed_scale')

    def value(self, trait, default=None):
        """ The row's entry `trait`; a string names an entry of the LM's config, whose value it is. """
        value = self.row.get(trait, default)
        return getattr(self.hf.config, value, default) if isinstance(value, str) else value

    def _find_parts(self):
        """
        Finds the LM's parts at the names that its row gives them. Raises AttributeError.
        """
        # plain dicts and lists, so that nothing is registered twice and a state dict has each
        # tensor once
        row, get = self.row, self.hf.get_submodule
        self.parts = {k: get(row[k]) if row.get(k) else None for k in ('embed', 'norm', 'wpe', 'rope')}
        self.parts['layers'] = list(get(row['layers']))
        self.layer_parts, factor = [], self.value('residual_scale', 1.0)
        for layer in self.parts['layers']:
            # Hugging Face's version of GPT-2's GELU makes eight passes over memory, this one makes one
            if type(submodule(layer, row['act'])).__name__ == 'NewGELUActivation':
                layer.set_submodule(row['act'], nn.GELU('tanh'))
            parts = {name: submodule(layer, row.get(name)) for name in OTHER_PARTS}
            parts |= {k: layer.get_submodule(row[k]) if row.get(k) else None for k in NEEDED_PARTS}
            parts['qkv'] = [layer.get_submodule(path) for path in row['qkv']]
            if parts['ffw'] is None:
                parts['ffw'] = nn.Sequential(parts['up'], parts['act'], parts['down'])
            behind = Times(factor) if factor != 1 else nn.Identity()
            for name, usual in dict(norm_1=nn.Identity(), post_1=behind, post_2=behind).items():
                if parts[name] is None:
                    parts[name] = usual
            if parts['norm_2'] is None:
                parts['norm_2'] = parts['norm_1'] if self.parallel else nn.Identity()
            self.layer_parts.append(parts)
        self.parts['rope_local'] = submodule(self.hf, row.get('rope_local'))
        kinds = self.value('rope_kinds') or [1] * self.n_layers
        self.rope_kinds = list(kinds)[:self.n_layers]

    def train(self, mode=True):
        return super().train(False)

    def fingerprint(self):
        return fingerprint(self.hf)

    def part(self, l, name):
        """ Layer l's part `name`; where it has none, nn.Identity or Times for a norm, else None. """
        return self.layer_parts[l][name]

    def ffw(self, l):
        """
        The four pieces of layer l's FFW: (gate or None, up, down, act), each linear as a callable
        with weight and bias. Raises ModelError where the layer has no such FFW.
        """
        gate, up, gate_up, down, act = (
            self.part(l, name) for name in ('gate', 'up', 'gate_up', 'down', 'act'))
        if gate_up is not None:
            half = gate_up.weight.shape[0] // 2
            gate, up = Rows(gate_up, slice(0, half)), Rows(gate_up, slice(half, None))
        missing = [name for name, piece in dict(up=up, down=down, act=act).items() if piece is None]
        if missing or self.row.get('gate') and gate is None:
            raise ModelError(f"layer {l + 1} of this LM (family {self.family!r}) has no feed-forward "
                             f"network that an MM block could start from ({missing or ['gate']} not "
                             "found; experts are not supported): take another LM for DeepMLF.")
        return gate, up, down, act

    def norms_of_ffw(self, l):
        """
        The modules before and behind layer l's FFW, for a block that starts as a copy of it. They
        are nn.Identity, or Times behind the FFW, where the family has none.
        """
        return self.part(l, 'norm_2'), self.part(l, 'post_2')

    def refuse_longer(self, n_tokens, what):
        """ Raises ModelError where n_tokens, which `what` sums up, are too many for this LM. """
        if n_tokens > self.max_positions:
            raise ModelError(f"{what} = {n_tokens} tokens is past the {self.max_positions} "
                             f"{self.limit}: lower max_text_len.")

    def embed(self, tokens):
        """ tokens [B,L] -> [B,L,D], without positions (SeqAug comes before them). """
        x = self.parts['embed'](tokens)  # [B,L,D]
        if self.embed_scale == 1 or self.embed_multiplies:
            return x
        return x * torch.tensor(self.embed_scale, dtype=x.dtype)

    @torch.no_grad()
    def embed_rms(self, n_tokens=4096):
        """
        The root mean square of the embeddings as the first layer gets them (Gemma multiplies its
        weights by the root of the width), over the first n_tokens of the vocabulary.
        """
        weight = self.parts['embed'].weight[:n_tokens]  # [n,D]
        if weight.is_meta:  # there are no numbers
            return 1.0
        return self.embed_scale * float(weight.float().pow(2).mean().sqrt())

    def place(self, x, positions):
        """
        Give x [B,L,D] its positions [B,L] -> x, rope. GPT-2 and OPT add them to x, and rope is
        None. Elsewhere rope has (cos, sin) for each layer, or None for a layer without rope.
        """
        if self.parts['wpe'] is not None:
            rows = positions + self.row.get('wpe_offset', 0)  # [B,L]
            return x + F.embedding(rows, self.parts['wpe'].weight), None
        by_kind = {kind: self._rope(x, positions, kind) for kind in sorted(set(self.rope_kinds))}
        return x, [by_kind[kind] for kind in self.rope_kinds]

    def _rope(self, x, positions, kind):
        """ The (cos, sin) [B,L,r] of layers of one kind; None for layers without rope. """
        if kind == 0:
            return None
        if kind == 1:
            return self.parts['rope'](x, positions)
        if self.parts['rope_local'] is not None:
            local = kind == 'sliding_attention'
            return self.parts['rope_local' if local else 'rope'](x, positions)
        return self.parts['rope'](x, positions, kind)

    def qkv(self, l, x, rope):
        """ Layer l's queries [B,h,L,D/h], keys and values [B,h_kv,L,D/h] of x [B,L,D]. """
        q, k, v = self.heads(l, self.part(l, 'norm_1')(x))  # [B,h,L,D/h], 2x [B,h_kv,L,D/h]
        if rope is not None and rope[l] is not None:
            q = rotate(q, *rope[l], self.row.get('pairs'))
            k = rotate(k, *rope[l], self.row.get('pairs'))
        return q, k, v

    def heads(self, l, y):
        """
        Layer l's projections of y [B,L,D], by head: q [B,h,L,D/h], k and v [B,h_kv,L,D/h]. Some
        families pack, clamp or normalise them.
        """
        (B, L, _), row, part = y.shape, self.row, self.layer_parts[l]
        q_norm, k_norm = part['q_norm'], part['k_norm']
        norm_on = row.get('qk_norm') if q_norm is not None else None
        y = [project(y) for project in part['qkv']]  # [B,L,h D/h], 2x [B,L,h_kv D/h], or packed
        if row.get('packed') == 'parts':
            n, n_kv = self.n_heads * self.head_width, self.n_kv_heads * self.head_width
            y = y[0].split([n, n_kv, n_kv], -1)  # [B,L,h D/h], 2x [B,L,h_kv D/h]
        if row.get('packed') == 'heads':
            y = y[0].view(B, L, self.n_heads, -1).chunk(3, -1)  # 3x [B,L,h,D/h]
        if self.clip is not None:
            y = [v.clamp(-self.clip, self.clip) for v in y]
        if norm_on == 'all':
            y = [q_norm(y[0]), k_norm(y[1]), y[2]]
        q, k, v = (v.reshape(B, L, -1, self.head_width) for v in y)  # [B,L,h or h_kv,D/h]
        if norm_on == 'head':
            q, k = q_norm(q), k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,h or h_kv,L,D/h]
        if norm_on == 'split':
            q, k = q_norm(q), k_norm(k)
        return q, k, v

    def attend(self, q, k, v, mask=None):
        """
        Attention of q [B,h,L,D/h] over k, v [B,h_kv,M,D/h]; mask [B,1,L,M], or None for causal with
        L = M -> [B,L,h D/h].
        """
        B, _, L, _ = q.shape
        groups = self.n_heads // self.n_kv_heads  # queries per key head
        if groups > 1:
            k = k.repeat_interleave(groups, 1)  # [B,h,M,D/h]
            v = v.repeat_interleave(groups, 1)  # [B,h,M,D/h]
        if self.attention_cap is None:
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=self.attention_scale)  # [B,h,L,D/h]
        else:
            y = self.capped_attention(q, k, v, mask)  # [B,h,L,D/h]
        return y.transpose(1, 2).reshape(B, L, -1)

    def capped_attention(self, q, k, v, mask):
        """ As scaled_dot_product_attention, with a soft cap on the scores -> [B,h,L,D/h]. """
        if mask is None:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()  # [L,L]
        score = q @ k.transpose(2, 3) * self.attention_scale  # [B,h,L,M]
        score = soft_cap(score, self.attention_cap).masked_fill(~mask, -torch.inf)
        return score.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    def finish(self, l, x, q, k, v, mask=None):
        """
        The rest of layer l for x [B,L,D]: q [B,h,L,D/h] of x, k and v [B,h_kv,M,D/h] of all tokens
        that x may attend to -> [B,L,D].
        """
        y = self.part(l, 'out')(self.attend(q, k, v, mask))  # [B,L,D]
        y = x + self.part(l, 'post_1')(y)  # [B,L,D]
        return y + self.feed_forward(l, x if self.parallel else y)

    def feed_forward(self, l, x):
        """ What layer l's FFW, with the norms around it, adds to x [B,L,D] -> [B,L,D]. """
        y = self.part(l, 'ffw')(self.part(l, 'norm_2')(x))  # [B,L,D]
        if isinstance(y, tuple):  # experts, before transformers 5: with the router's logits
            y = y[0]
        return self.part(l, 'post_2')(y)

    def block(self, l, x, rope, past=None, mask=None):
        """
        LM layer l (from 0) on x [B,L,D] -> x [B,L,D] and the layer's (k, v) of x [B,h_kv,L,D/h].
        Without `past`, attention is causal over x; padding is at the end, where no real token sees
        it. `past` is the (k, v) of T earlier tokens, and `mask` [B,1,L,T+L] is True where attended.
        """
        q, k, v = self.qkv(l, x, rope)
        own = k, v
        if past is not None:
            k = torch.cat([past[0], k], 2)  # [B,h_kv,T+L,D/h]
            v = torch.cat([past[1], v], 2)  # [B,h_kv,T+L,D/h]
        return self.finish(l, x, q, k, v, mask), own

    def final_norm(self, x):
        return self.parts['norm'](x)

    @property
    def lm_head(self):
        """ Hidden states after the final norm to logits: a callable, [..,D] -> [..,V]. """
        if self.logit_scale == 1 and self.logit_cap is None:
            return self.hf.get_output_embeddings()  # a linear layer, whose gradient is known
        return self._scaled_logits

    def _scaled_logits(self, x, head=None):
        """ The logits of a family that scales or caps them: x [..,D] -> [..,V], or of rows of it. """
        logits = (head or self.hf.get_output_embeddings())(x)  # [..,V]
        return soft_cap(logits * self.logit_scale, self.logit_cap)

    def logits_of(self, x, tokens):
        """ The logits of these tokens [C] alone: x [..,D] after the final norm -> [..,C]. """
        return self._scaled_logits(x, Rows(self.hf.get_output_embeddings(), tokens))  # [..,C]

    def forward(self, tokens):
        """ Text alone: tokens [B,T] -> hidden states after the final norm [B,T,D]. """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1,T]
        x, rope = self.place(self.embed(tokens), positions)
        for l in range(self.n_layers):
            x, _ = self.block(l, x, rope)
        return self.final_norm(x)

    def go_on(self, x, n_read, token, n_new):
        """
        Greedy decoding of n_new tokens. The LM first reads n_read [B] of the embeddings x [B,T,D],
        then `token` [B]. -> [B,n_new], -1 where the logits are NaN or inf. Our own loop, because
        what generate() returns for embeddings differs between versions of transformers.
        """
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device)  # [T]
        seen = positions < n_read[:, None]  # [B,T]
        x, rope = self.place(x, positions.expand(B, T))
        kv = []
        for l in range(self.n_layers):
            x, own = self.block(l, x, rope)
            kv.append(own)

        position = n_read  # [B]
        new = []
        for _ in range(n_new):
            y, rope = self.place(self.embed(token[:, None]), position[:, None])  # [B,1,D]
            seen = F.pad(seen, (0, 1), value=True)  # [B,T+1]
            position = position + 1
            for l, past in enumerate(kv):
                y, own = self.block(l, y, rope, past, seen[:, None, None])
                kv[l] = [torch.cat(pair, 2) for pair in zip(past, own)]  # 2x [B,h_kv,T+1,D/h]
            logits = self.lm_head(self.final_norm(y))[:, 0]  # [B,V]
            token = logits.argmax(-1)  # [B]
            new.append(token.where(logits.isfinite().all(-1), -1))
        return torch.stack(new, 1)  # [B,n_new]


def submodule(module, path):
    """ The submodule at a dotted path; None where there is no path, or nothing at it. """
    try:
        return module.get_submodule(path) if path else None
    except AttributeError:
        return None


def unknown_family(family):
    """
    The ModelError for an LM without a row: encoder-decoders, state-space and hybrid models, and
    those with several position indices a token have none.
    """
    return ModelError(f"the LM family {family!r} is not known here: known are "
                      f"{', '.join(FAMILIES)}, and a new one is a row in FAMILIES (lm.py).")


# -------------------------------------------------------------------------------------------------
# The encoder that is fine-tuned

class TextEncoder(nn.Module):
    """
    A fine-tuned encoder of the BERT or RoBERTa family, whose layers run in parts, so that a block
    can come between two. Its pooler is left out, because systems here have heads of their own.
    """

    def __init__(self, hf):
        super().__init__()
        c = hf.config
        self.hf = hf
        self.eval()  # no dropout in the comparison below
        try:
            self.width = c.hidden_size
            self.n_layers = c.num_hidden_layers
            self.n_heads = c.num_attention_heads
            self.dropout = c.attention_probs_dropout_prob
            padding = hf.embeddings.position_embeddings.padding_idx
            # RoBERTa's positions start at padding_idx + 1
            not_used = 0 if padding is None else padding + 1
            self.max_positions = c.max_position_embeddings - not_used
            gap = self.gap()
            reason = '' if gap <= 1e-2 else f'its hidden states differ by {gap:.2g} of the largest'
        except Exception as e:  # of any kind: its code is not ours
            reason = f'{type(e).__name__}: {first_line(e)}'
        if reason:
            raise ModelError(f"{c.model_type!r} is no encoder of the BERT or RoBERTa family "
                             f"({reason}): choose one, such as --lm=bert-base-uncased.")
        self.hf.pooler = None

    @torch.no_grad()
    def gap(self):
        """ The largest difference to transformers' own forward, over the largest hidden state. """
        tokens = torch.arange(3, 35)[None, :self.max_positions]  # [1,32]
        tokens = 7 * tokens % self.hf.config.vocab_size
        theirs = self.hf(tokens).last_hidden_state  # [1,32,D]
        ours = self(tokens, tokens >= 0, torch.arange(tokens.numel()))  # [1,32,D]
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def refuse_longer(self, max_text_len):
        """ Raises ModelError where a text may be longer than the encoder has positions. """
        if max_text_len > self.max_positions:
            raise ModelError(f"max_text_len={max_text_len} is past the {self.max_positions} "
                             "positions of this encoder: lower it.")

    def embed(self, tokens):
        """ tokens [B,T] -> [B,T,D], positions and norm included. """
        return self.hf.embeddings(input_ids=tokens)  # [B,T,D]

    def layers(self, x, mask, rows, first=0, end=None):
        """
        Encoder layers first to end - 1 (None: all that follow): x [B,T,D], mask [B,T] -> [B,T,D].
        rows [U]: the flat positions that linear layers and norms compute; others become zeros.
        """
        B, T, D = x.shape
        dropout = self.dropout * self.training
        x = x.flatten(0, 1).index_select(0, rows)  # [U,D]
        for part in self.hf.encoder.layer[first:end]:
            see = part.attention.self
            q, k, v = (unpacked(p(x), rows, B, T).view(B, T, self.n_heads, -1).transpose(1, 2)
                       for p in (see.query, see.key, see.value))  # [B,h,T,D/h]
            y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], dropout)  # [B,h,T,D/h]
            y = y.transpose(1, 2).reshape(B * T, D).index_select(0, rows)  # [U,D]
            x = part.attention.output(y, x)
            x = part.output(part.intermediate(x), x)
        return unpacked(x, rows, B, T)  # [B,T,D]

    def forward(self, tokens, mask, rows):
        """ Text alone -> the last hidden states [B,T,D]; mask and rows as in layers. """
        return self.layers(self.embed(tokens), mask, rows)
