"""
The frozen LM: any Hugging Face causal LM of a known family, run layer by layer by our own code; and
the encoder that CrossSent fine-tunes, run the same way. run/load_lm.py reads either from its files,
or makes it from nothing.

Axis letters, the same in every file:
    B clips   T text tokens   L any sequence   D LM width   V vocabulary   h heads
"""
import hashlib
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import AtLeast


class TextModelKnobs:
    """ A pretrained text model. """
    lm = 'gpt2-large'          # Hugging Face name, folder, or the name of a run in needs
    trust_remote_code = False  # run the code of an LM's authors, for LMs unknown to transformers


class LMKnobs(TextModelKnobs):
    """ A frozen LM. """
    lm_init: Literal['pretrained', 'random'] = 'pretrained'  # 'random': new weights, as a control


class NewModelKnobs:
    """ A language model or encoder made from nothing. """
    lm_vocab: AtLeast(1) = 256      # sentencepiece tokens, at most
    lm_width: AtLeast(1) = 64       # D
    lm_layers: AtLeast(1) = 4       # layers
    lm_heads: AtLeast(1) = 4        # attention heads
    lm_positions: AtLeast(1) = 128  # longest input, tokens


class EncoderKnobs(TextModelKnobs, NewModelKnobs):
    """
    A text encoder: lm names it (BERT or RoBERTa family); 'new' makes one of lm_layers x lm_width.
    """


class ModelError(Exception):
    """ A sentence for the user: what was wrong, where, and what to do. """


# -------------------------------------------------------------------------------------------------
# The frozen LM

# Where each family keeps its parts: all that we know about any LM. A new family is a line here.
FAMILIES = {
    'gpt2': dict(
        layers='transformer.h',
        embed='transformer.wte',
        wpe='transformer.wpe',
        norm='transformer.ln_f',
        norm_1='ln_1',
        qkv=['attn.c_attn'],
        out='attn.c_proj',
        norm_2='ln_2',
        ffw='mlp',
        gate=None,
        up='mlp.c_fc',
        down='mlp.c_proj',
        act='mlp.act',
    ),
    'llama': dict(
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
    ),
}
FAMILIES['qwen2'] = FAMILIES['llama']  # its biases are in its own linears
FAMILIES['qwen3'] = FAMILIES['llama'] | dict(q_norm='self_attn.q_norm', k_norm='self_attn.k_norm')
# GLM-4: rotates neighbouring pairs of half of each head; gate and up of its FFW are one matrix
FAMILIES['glm'] = FAMILIES['llama'] | dict(pairs=True, gate=None, up=None)


def rotate(x, cos, sin, pairs=False):
    """
    Rotary position embedding (Su et al. 2021) of the first r of each head's features: the two
    halves of them against each other, or neighbouring pairs. x [B,h,L,D/h], cos and sin [B,L,r] as
    Hugging Face lays them out.
    """
    r = cos.shape[-1]
    x, rest = x[..., :r], x[..., r:]  # [B,h,L,r], [B,h,L,D/h-r]
    if pairs:
        cos = cos[..., :r // 2].repeat_interleave(2, -1)  # [B,L,r]
        sin = sin[..., :r // 2].repeat_interleave(2, -1)  # [B,L,r]
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)  # [B,h,L,r]
    else:
        turned = torch.cat([-x[..., r // 2:], x[..., :r // 2]], -1)  # [B,h,L,r]
    return torch.cat([x * cos[:, None] + turned * sin[:, None], rest], -1)  # [B,h,L,D/h]


class FrozenLM(nn.Module):
    """
    Any Hugging Face causal LM of a known family, frozen: no gradient, no dropout (train() leaves it
    in eval mode: the release trains through GPT-2's own dropout), and no change of a bit by any
    amount of training.

    We call its layers' parts ourselves, one layer at a time, with keys and values as plain
    arguments, so that a caller can put blocks between layers and run a few extra tokens over a
    text's keys and values.
    """

    def __init__(self, hf):
        super().__init__()
        c = hf.config
        if getattr(c, 'use_sliding_window', False):
            raise ModelError("this LM's layers see a window of the text (use_sliding_window in its "
                             "config), which the frozen LM here does not do: take another LM.")
        by_layer = getattr(c, 'scale_attn_by_inverse_layer_idx', False)
        if by_layer or not getattr(c, 'scale_attn_weights', True):
            raise ModelError("this GPT-2 scales attention in a way of its own (scale_attn_* in its "
                             "config), which the frozen LM here does not do: take another LM.")
        self.hf = hf.requires_grad_(False).eval()

        try:
            self.width = c.hidden_size
            self.n_layers = c.num_hidden_layers
            self.n_heads = c.num_attention_heads
            self.n_kv_heads = getattr(c, 'num_key_value_heads', None) or self.n_heads
            self.head_width = getattr(c, 'head_dim', None) or self.width // self.n_heads
            self.max_positions = c.max_position_embeddings
            self.vocabulary = c.vocab_size
            if c.model_type in FAMILIES:
                self._take_apart(FAMILIES[c.model_type])
                return
            # An unknown family is taken if its parts have a known family's names and it computes
            # the same: many are Llamas under another name
            gaps = {family: self.gap(where) for family, where in FAMILIES.items()}
            nearest = min(gaps, key=gaps.get)
            if gaps[nearest] <= 1e-2:
                self._take_apart(FAMILIES[nearest])
                return
        except AttributeError:
            pass  # its config has not even a width
        raise ModelError(f"the LM family {c.model_type!r} is not known here, and it does not "
                         "compute what one with its parts' names would: known are "
                         f"{', '.join(FAMILIES)}; a new one is a line in FAMILIES (lm.py).")

    def _take_apart(self, where):
        """ Finds the LM's parts at the names that `where`, an entry of FAMILIES, gives them. """
        # plain lists, so that nothing is registered twice and a state dict has each tensor once
        get = self.hf.get_submodule
        self.where = where
        self.parts = {k: get(where[k]) if k in where else None
                      for k in ('embed', 'norm', 'wpe', 'rope')}
        self.parts['layers'] = list(get(where['layers']))
        if not where['up']:
            return
        for l, layer in enumerate(self.parts['layers']):
            # Hugging Face writes GPT-2's GELU as eight passes over memory; this is it in one
            if type(self.part(l, 'act')).__name__ == 'NewGELUActivation':
                layer.set_submodule(where['act'], nn.GELU('tanh'))

    @torch.no_grad()
    def gap(self, where):
        """
        How far our forward of this family is from Hugging Face's logits for 256 tokens, as a share
        of the largest; inf where it does not have the parts. On the meta device there are no
        numbers to compare.
        """
        try:
            self._take_apart(where)
            embed = self.parts['embed'].weight
            n = min(256, self.max_positions)  # longer than most prompts: some LMs only see a window
            tokens = 7 * torch.arange(n, device=embed.device)[None] % len(embed)  # [1,n]
            theirs = self.hf(tokens).logits  # [1,n,V]
            ours = self.lm_head(self(tokens))  # [1,n,V]
            if embed.is_meta:
                return 0.0
            return float((theirs - ours).abs().max() / theirs.abs().max())
        except (AttributeError, TypeError, IndexError, RuntimeError):
            return float('inf')

    def train(self, mode=True):
        return super().train(False)

    def fingerprint(self):
        return fingerprint(self.hf)

    def part(self, l, name):
        """ Layer l's submodule of the name in FAMILIES (None where the family has none). """
        path = self.where[name]
        return self.parts['layers'][l].get_submodule(path) if path else None

    def ffw(self, l):
        """
        The four pieces of layer l's FFW: (gate or None, up, down, act). Raises ModelError where
        they are not apart.
        """
        family = self.hf.config.model_type
        if not self.where['up']:
            raise ModelError(f"the LM family {family!r} has gate and up of its FFW in one matrix, "
                             "which an MM block cannot build on: take another LM for DeepMLF, or "
                             "write that down in FFW (adapters.py).")
        try:
            return tuple(self.part(l, name) for name in ('gate', 'up', 'down', 'act'))
        except AttributeError as e:  # PyTorch's own sentence names the part
            raise ModelError(f"the FFW of the LM family {family!r} lacks a part that an MM block "
                             f"builds on ({e}): take another LM for DeepMLF.") from None

    def embed(self, tokens):
        """ tokens [B,L] -> [B,L,D], without positions (SeqAug comes before them). """
        return self.parts['embed'](tokens)

    def place(self, x, positions):
        """
        Give x [B,L,D] its positions [B,L]: added to it (GPT-2), or as (cos, sin) for every layer to
        rotate by. Returns x, rope.
        """
        if self.parts['wpe'] is not None:
            return x + self.parts['wpe'](positions), None
        return x, self.parts['rope'](x, positions)

    def qkv(self, l, x, rope):
        """ Layer l's queries [B,h,L,D/h], keys and values [B,h_kv,L,D/h] of x [B,L,D]. """
        B, L, _ = x.shape
        y = self.part(l, 'norm_1')(x)
        qkv = [self.parts['layers'][l].get_submodule(path)(y) for path in self.where['qkv']]
        q, k, v = qkv if len(qkv) == 3 else qkv[0].chunk(3, -1)  # [B,L,h D/h] each
        q = q.view(B, L, self.n_heads, self.head_width)  # [B,L,h,D/h]
        k = k.view(B, L, self.n_kv_heads, self.head_width)  # [B,L,h_kv,D/h]
        v = v.view(B, L, self.n_kv_heads, self.head_width)  # [B,L,h_kv,D/h]
        if 'q_norm' in self.where:
            q = self.part(l, 'q_norm')(q)
            k = self.part(l, 'k_norm')(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B,h,L,D/h]
        if rope is not None:
            pairs = self.where.get('pairs', False)
            q = rotate(q, *rope, pairs)
            k = rotate(k, *rope, pairs)
        return q, k, v

    def finish(self, l, x, q, k, v, mask=None):
        """
        The rest of layer l, given what x [B,L,D] asks (q) and all that it may see (k, v
        [B,h_kv,T+L,D/h]).
        """
        B, L, _ = x.shape
        groups = self.n_heads // self.n_kv_heads  # queries per key head
        if groups > 1:
            k = k.repeat_interleave(groups, 1)  # [B,h,T+L,D/h]
            v = v.repeat_interleave(groups, 1)  # [B,h,T+L,D/h]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)  # [B,h,L,D/h]
        x = x + self.part(l, 'out')(y.transpose(1, 2).reshape(B, L, -1))  # [B,L,D]
        return x + self.part(l, 'ffw')(self.part(l, 'norm_2')(x))

    def block(self, l, x, rope, past=None, mask=None):
        """
        LM layer l (from 0) on x [B,L,D]. Without `past`, causal over x itself: with padding at the
        end no real token ever sees it, so no mask is needed. With `past`, the (k, v) of earlier
        tokens, x comes after them and `mask` [B,1,L,T+L] says who sees whom. Returns x [B,L,D] and
        this layer's own (k, v) [B,h_kv,L,D/h].
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
        return self.hf.get_output_embeddings()  # [..,D] -> [..,V]

    def forward(self, tokens):
        """ Text alone: tokens [B,T] -> hidden states after the final norm [B,T,D]. """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1,T]
        x, rope = self.place(self.embed(tokens), positions)
        for l in range(self.n_layers):
            x, _ = self.block(l, x, rope)
        return self.final_norm(x)

    @torch.no_grad()
    def answer(self, n_tokens=8, n_logits=4):
        """
        A few numbers that change with the LM's configuration, which the weights' fingerprint does not
        see: the first logits behind fixed tokens, and the largest magnitude of all -> list of floats.
        """
        embed = self.parts['embed'].weight  # [V,D]
        tokens = 7 * torch.arange(n_tokens, device=embed.device)[None] % self.vocabulary  # [1,n]
        logits = self.lm_head(self(tokens))[0, -1].float()  # [V]
        return [round(float(v), 6) for v in (*logits[:n_logits], logits.abs().max())]

    def go_on(self, x, n_read, token, n_new):
        """
        Greedy decoding: n_new tokens after a text of embeddings x [B,T,D], of which n_read [B] are
        real, and after one more `token` [B] behind those. -> [B,n_new], -1 where the logits are NaN
        or inf. Our own loop: what generate() returns for embeddings (with or without a first column
        to strip) changed between versions of transformers, and that once lost the first token of
        every answer.
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


# -------------------------------------------------------------------------------------------------
# The encoder that is fine-tuned

class TextEncoder(nn.Module):
    """
    A BERT- or RoBERTa-family encoder that is fine-tuned, run layer by layer like the frozen LM, so
    that a block can come between two layers. Its pooler, if it has one, is left out: systems here
    have heads of their own.
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
            # RoBERTa counts positions from behind its padding id
            not_used = 0 if padding is None else padding + 1
            self.max_positions = c.max_position_embeddings - not_used
            # many that look like a BERT are none: it must compute what Hugging Face's does
            same = self.gap() <= 1e-2
        except Exception:  # of any kind: its code is not ours
            same = False
        if not same:
            raise ModelError(f"{c.model_type!r} is no encoder of the BERT or RoBERTa family, or "
                             "computes something else than they do: take one for --lm=, such as "
                             "bert-base-uncased or roberta-base.")
        self.hf.pooler = None

    @torch.no_grad()
    def gap(self):
        """ How far our forward is from Hugging Face's, as a share of the largest hidden state. """
        tokens = torch.arange(3, 35)[None, :self.max_positions]  # [1,32]
        tokens = 7 * tokens % self.hf.config.vocab_size
        theirs = self.hf(tokens).last_hidden_state  # [1,32,D]
        ours = self(tokens, tokens >= 0)  # [1,32,D]
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def fits(self, max_text_len):
        """ Raises ModelError where a text may be longer than the encoder has positions. """
        if max_text_len > self.max_positions:
            raise ModelError(f"max_text_len={max_text_len} is past the {self.max_positions} "
                             "positions of this encoder: lower it.")

    def embed(self, tokens):
        """ tokens [B,T] -> [B,T,D], positions and norm included. """
        return self.hf.embeddings(input_ids=tokens)  # [B,T,D]

    def layer(self, l, x, mask):
        """ Encoder layer l (from 0): x [B,T,D], mask [B,T] -> [B,T,D]. """
        B, T, D = x.shape
        part = self.hf.encoder.layer[l]
        see = part.attention.self
        q, k, v = (p(x).view(B, T, self.n_heads, -1).transpose(1, 2)
                   for p in (see.query, see.key, see.value))  # [B,h,T,D/h]
        dropout = self.dropout * self.training
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], dropout)  # [B,h,T,D/h]
        x = part.attention.output(y.transpose(1, 2).reshape(B, T, D), x)  # [B,T,D]
        return part.output(part.intermediate(x), x)

    def forward(self, tokens, mask):
        """ Text alone -> the last hidden states [B,T,D]. """
        x = self.embed(tokens)
        for l in range(self.n_layers):
            x = self.layer(l, x, mask)
        return x


# -------------------------------------------------------------------------------------------------
# What a model is, and where it looks

def _whole(p):
    """ A parameter without its gradient; in one piece where processes share it. """
    p = p.detach()
    return p.full_tensor() if hasattr(p, 'full_tensor') else p


def same_answer(ours, theirs, dtype):
    """ Whether two FrozenLM.answer are the same but for the rounding of a dtype on another machine. """
    tolerance = (1e-3 if dtype == 'float32' else 5e-2) * max(1e-6, abs(theirs[-1]))
    return len(ours) == len(theirs) and all(abs(a - b) <= tolerance for a, b in zip(ours, theirs))


def fingerprint(model):
    """
    16 hex digits that another LM, or this one trained again, would not have: of the first 256
    values of each tensor, as hashing gigabytes at every start would take long.
    """
    first = [_whole(p).flatten()[:256].float().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b''.join(first)).hexdigest()[:16]


def attention_of_last_layer(encoder, predict, batch):
    """
    Where the tokens of one clip look in the encoder's last layer, the mean over heads (CrossSent's
    Figures 5 and 6), as System.views has it.
    """
    if not encoder.n_layers:
        return {}
    last = encoder.hf.encoder.layer[-1].attention.self
    seen = []
    handle = last.query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        predict(batch)
    finally:
        handle.remove()

    x = seen[-1][0].float()  # [T,D]
    q, key = (p(x).view(len(x), encoder.n_heads, -1).transpose(0, 1)
              for p in (last.query, last.key))  # 2x [h,T,D/h]
    weights = (q @ key.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)  # [T,T]
    return {'last layer': (weights, 'text token', 'text token')}
