"""
The frozen LM: any Hugging Face causal LM of a known family, run layer by layer by our own code; the encoder that CrossSent
fine-tunes, run the same way; and how either is loaded, or made from nothing.

Axis letters, the same in every file:
    B clips   T text tokens   L any sequence   D LM width   V vocabulary   h heads
"""
import hashlib
import json
import os
import re
import shlex
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from files import make_plain_folder


class ModelError(Exception):
    """ A sentence for the user: what was wrong, where, and what to do. """


# ---------------------------------------------------------------------------------------------------------
# The frozen LM

# Where each family keeps its parts: all that we know about any LM. A new family is a line here.
FAMILIES = {
    'gpt2': dict(layers='transformer.h', embed='transformer.wte', wpe='transformer.wpe', norm='transformer.ln_f',
                 norm_1='ln_1', qkv=['attn.c_attn'], out='attn.c_proj',
                 norm_2='ln_2', ffw='mlp', gate=None, up='mlp.c_fc', down='mlp.c_proj', act='mlp.act'),
    'llama': dict(layers='model.layers', embed='model.embed_tokens', rope='model.rotary_emb', norm='model.norm',
                  norm_1='input_layernorm', qkv=['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
                  out='self_attn.o_proj', norm_2='post_attention_layernorm', ffw='mlp',
                  gate='mlp.gate_proj', up='mlp.up_proj', down='mlp.down_proj', act='mlp.act_fn'),
}
FAMILIES['qwen2'] = FAMILIES['llama']   # its biases are in its own linears
FAMILIES['qwen3'] = FAMILIES['llama'] | dict(q_norm='self_attn.q_norm', k_norm='self_attn.k_norm')
# GLM-4: rotates neighbouring pairs of half of each head; gate and up of its FFW are one matrix
FAMILIES['glm'] = FAMILIES['llama'] | dict(pairs=True, gate=None, up=None)


def rotate(x, cos, sin, pairs=False):
    """ Rotary position embedding (Su et al. 2021) of the first r of each head's features: the two halves of them against
    each other, or neighbouring pairs. x [B,h,L,D/h], cos and sin [B,L,r] as Hugging Face lays them out. """
    r = cos.shape[-1]
    x, rest = x[..., :r], x[..., r:]                                                             # [B,h,L,r], [B,h,L,D/h-r]
    if pairs:
        cos, sin = (t[..., :r // 2].repeat_interleave(2, -1) for t in (cos, sin))                # [B,L,r]
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)                      # [B,h,L,r]
    else: turned = torch.cat([-x[..., r // 2:], x[..., :r // 2]], -1)                            # [B,h,L,r]
    return torch.cat([x * cos[:, None] + turned * sin[:, None], rest], -1)                       # [B,h,L,D/h]


class FrozenLM(nn.Module):
    """
    Any Hugging Face causal LM of a known family, frozen: no gradient, no dropout (train() leaves it in eval
    mode: the release trains through GPT-2's own dropout), and no change of a bit by any amount of training.

    We call its layers' parts ourselves, one layer at a time, with keys and values as plain arguments, so that
    a caller can put blocks between layers and run a few extra tokens over a text's keys and values.
    """
    def __init__(self, hf):
        super().__init__()
        c = hf.config
        if getattr(c, 'use_sliding_window', False):
            raise ModelError("this LM's layers see a window of the text (use_sliding_window in its config), which the frozen LM "
                             "here does not do: take another LM.")
        if getattr(c, 'scale_attn_by_inverse_layer_idx', False) or not getattr(c, 'scale_attn_weights', True):
            raise ModelError("this GPT-2 scales attention in a way of its own (scale_attn_* in its config), which the frozen "
                             "LM here does not do: take another LM.")
        self.hf = hf.requires_grad_(False).eval()
        try:
            self.width, self.n_layers, self.n_heads = c.hidden_size, c.num_hidden_layers, c.num_attention_heads
            self.n_kv_heads = getattr(c, 'num_key_value_heads', None) or self.n_heads
            self.head_width = getattr(c, 'head_dim', None) or self.width // self.n_heads
            self.max_positions, self.vocabulary = c.max_position_embeddings, c.vocab_size
            if c.model_type in FAMILIES: return self._take_apart(FAMILIES[c.model_type])
            # A stranger whose parts have a known family's names is taken if it computes the same: many are Llamas at heart
            gaps = {family: self._gap(where) for family, where in FAMILIES.items()}
            nearest = min(gaps, key=gaps.get)
            if gaps[nearest] <= 1e-2: return self._take_apart(FAMILIES[nearest])
        except AttributeError: pass   # its config has not even a width
        raise ModelError(f"the LM family {c.model_type!r} is not known here, and it does not compute what one with its parts' "
                         f"names would: known are {', '.join(FAMILIES)}; a new one is a line in FAMILIES (lm.py).")

    def _take_apart(self, where):
        # plain lists, so that nothing is registered twice and a state dict has each tensor once
        get, self.where = self.hf.get_submodule, where
        self.parts = {k: get(where[k]) if k in where else None for k in ('embed', 'norm', 'wpe', 'rope')}
        self.parts['layers'] = list(get(where['layers']))
        for l, layer in enumerate(self.parts['layers'] if where['up'] else ()):
            # Hugging Face writes GPT-2's GELU as eight passes over memory; this is the same function in one
            if type(self.part(l, 'act')).__name__ == 'NewGELUActivation': layer.set_submodule(where['act'], nn.GELU('tanh'))

    @torch.no_grad()
    def _gap(self, where):
        """ How far our forward of this family is from Hugging Face's logits for 256 tokens, as a share of the largest; inf
        where it does not have the parts. On the meta device there are no numbers to compare. """
        try:
            self._take_apart(where)
            embed = self.parts['embed'].weight
            n = min(256, self.max_positions)   # longer than most prompts: some LMs only see a window of the text
            tokens = 7 * torch.arange(n, device=embed.device)[None] % len(embed)                 # [1,n]
            theirs, ours = self.hf(tokens).logits, self.lm_head(self(tokens))                    # [1,n,V]
            return 0.0 if embed.is_meta else float((theirs - ours).abs().max() / theirs.abs().max())
        except (AttributeError, TypeError, IndexError, RuntimeError): return float('inf')

    def train(self, mode=True):
        return super().train(False)

    def fingerprint(self): return fingerprint(self.hf)

    def part(self, l, name):
        """ Layer l's submodule under the name that FAMILIES gives it (None where the family has none). """
        path = self.where[name]
        return self.parts['layers'][l].get_submodule(path) if path else None

    def ffw(self, l):
        """ The four pieces of layer l's FFW: (gate or None, up, down, act). Raises ModelError where they are not apart. """
        if not self.where['up']:
            raise ModelError(f"the LM family {self.hf.config.model_type!r} has gate and up of its FFW in one matrix, which "
                             "an MM block cannot build on: take another LM for DeepMLF, or write that down in FFW (adapters.py).")
        try:
            return tuple(self.part(l, name) for name in ('gate', 'up', 'down', 'act'))
        except AttributeError as e:   # PyTorch's own sentence names the part
            raise ModelError(f"the FFW of the LM family {self.hf.config.model_type!r} lacks a part "
                             f"that an MM block builds on ({e}): take another LM for "
                             "DeepMLF.") from None

    def embed(self, tokens):
        """ tokens [B,L] -> [B,L,D], without positions (SeqAug comes before them). """
        return self.parts['embed'](tokens)

    def place(self, x, positions):
        """ Give x [B,L,D] its positions [B,L]: added to it (GPT-2), or as (cos, sin) for every layer to rotate by.
        Returns x, rope. """
        if self.parts['wpe'] is not None: return x + self.parts['wpe'](positions), None
        return x, self.parts['rope'](x, positions)

    def qkv(self, l, x, rope):
        """ Layer l's queries [B,h,L,D/h], keys and values [B,h_kv,L,D/h] of x [B,L,D]. """
        B, L, _ = x.shape
        y = self.part(l, 'norm_1')(x)
        qkv = [self.parts['layers'][l].get_submodule(path)(y) for path in self.where['qkv']]
        q, k, v = qkv if len(qkv) == 3 else qkv[0].chunk(3, -1)                                  # [B,L,h D/h] each
        n_heads = self.n_heads, self.n_kv_heads, self.n_kv_heads
        q, k, v = (t.view(B, L, n, self.head_width) for t, n in zip((q, k, v), n_heads))         # [B,L,h,D/h]
        if 'q_norm' in self.where: q, k = self.part(l, 'q_norm')(q), self.part(l, 'k_norm')(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                         # [B,h,L,D/h]
        if rope is not None: q, k = (rotate(t, *rope, self.where.get('pairs', False)) for t in (q, k))
        return q, k, v

    def finish(self, l, x, q, k, v, mask=None):
        """ The rest of layer l, given what x [B,L,D] asks (q) and all that it may see (k, v [B,h_kv,T+L,D/h]). """
        B, L, _ = x.shape
        groups = self.n_heads // self.n_kv_heads                                                 # queries per key head
        if groups > 1: k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)     # [B,h,T+L,D/h]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)                # [B,h,L,D/h]
        x = x + self.part(l, 'out')(y.transpose(1, 2).reshape(B, L, -1))                         # [B,L,D]
        return x + self.part(l, 'ffw')(self.part(l, 'norm_2')(x))

    def block(self, l, x, rope, past=None, mask=None):
        """
        LM layer l (from 0) on x [B,L,D]. Without `past`, causal over x itself: with padding at the end no real
        token ever sees it, so no mask is needed. With `past`, the (k, v) of earlier tokens, x comes after them
        and `mask` [B,1,L,T+L] says who sees whom. Returns x [B,L,D] and this layer's own (k, v) [B,h_kv,L,D/h].
        """
        q, k, v = self.qkv(l, x, rope)
        own = k, v
        if past is not None: k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)       # [B,h_kv,T+L,D/h]
        return self.finish(l, x, q, k, v, mask), own

    def final_norm(self, x): return self.parts['norm'](x)

    @property
    def lm_head(self): return self.hf.get_output_embeddings()                                    # [..,D] -> [..,V]

    def forward(self, tokens):
        """ Text alone: tokens [B,T] -> hidden states after the final norm [B,T,D]. """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]                    # [1,T]
        x, rope = self.place(self.embed(tokens), positions)
        for l in range(self.n_layers): x, _ = self.block(l, x, rope)
        return self.final_norm(x)

    def go_on(self, x, n_read, token, n_new):
        """
        Greedy decoding: n_new tokens after a text of embeddings x [B,T,D], of which n_read [B] are real, and after one more
        `token` [B] behind those. -> [B,n_new], -1 where the logits are NaN or inf. Our own loop: what generate() returns for embeddings (with or without a
        first column to strip) changed between versions of transformers, and that once lost the first token of every answer.
        """
        B, T, _ = x.shape
        seen, position, kv, new = torch.arange(T, device=x.device) < n_read[:, None], n_read, [], []   # seen [B,T]
        x, rope = self.place(x, torch.arange(T, device=x.device).expand(B, T))
        for l in range(self.n_layers):
            x, own = self.block(l, x, rope)
            kv.append(own)
        for _ in range(n_new):
            y, rope = self.place(self.embed(token[:, None]), position[:, None])                  # [B,1,D]
            seen, position = F.pad(seen, (0, 1), value=True), position + 1                       # [B,T+1]
            for l, past in enumerate(kv):
                y, own = self.block(l, y, rope, past, seen[:, None, None])
                kv[l] = [torch.cat(pair, 2) for pair in zip(past, own)]                          # 2x [B,h_kv,T+1,D/h]
            logits = self.lm_head(self.final_norm(y))[:, 0]                                      # [B,V]
            token = logits.argmax(-1)                                                            # [B]
            new.append(token.where(logits.isfinite().all(-1), -1))
        return torch.stack(new, 1)                                                               # [B,n_new]


class TextEncoder(nn.Module):
    """
    A BERT- or RoBERTa-family encoder that is fine-tuned, run layer by layer like the frozen LM, so that a block can come
    between two layers. Its pooler, if it has one, is left out: systems here have heads of their own.
    """
    def __init__(self, hf):
        super().__init__()
        c = hf.config
        self.hf = hf
        self.eval()   # no dropout in the comparison below
        try:
            self.width, self.n_layers, self.n_heads = c.hidden_size, c.num_hidden_layers, c.num_attention_heads
            self.dropout = c.attention_probs_dropout_prob
            padding = hf.embeddings.position_embeddings.padding_idx   # RoBERTa counts positions from behind its padding id
            self.max_positions = c.max_position_embeddings - (0 if padding is None else padding + 1)
            with torch.no_grad():   # many that look like a BERT are none: it must compute what theirs does
                tokens = 7 * torch.arange(3, 35)[None, :self.max_positions] % c.vocab_size       # [1,32]
                theirs = hf(tokens).last_hidden_state                                            # [1,32,D]
                same = float((self(tokens, tokens >= 0) - theirs).abs().max() / theirs.abs().max()) <= 1e-2
        except Exception: same = False   # of any kind: its code is not ours
        if not same:
            raise ModelError(f"{c.model_type!r} is no encoder of the BERT or RoBERTa family, or computes something else than they do: "
                             "take one for --lm=, such as bert-base-uncased or roberta-base.")
        self.hf.pooler = None

    def fits(self, max_text_len):
        """ Raises ModelError where a text may be longer than the encoder has positions. """
        if max_text_len > self.max_positions:
            raise ModelError(f"max_text_len={max_text_len} is past the {self.max_positions} positions of this encoder: lower it.")

    def embed(self, tokens):
        """ tokens [B,T] -> [B,T,D], positions and norm included. """
        return self.hf.embeddings(input_ids=tokens)                                              # [B,T,D]

    def layer(self, l, x, mask):
        """ Encoder layer l (from 0): x [B,T,D], mask [B,T] -> [B,T,D]. """
        part, (B, T, D) = self.hf.encoder.layer[l], x.shape
        see = part.attention.self
        q, k, v = (p(x).view(B, T, self.n_heads, -1).transpose(1, 2) for p in (see.query, see.key, see.value))   # [B,h,T,D/h]
        y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], self.dropout * self.training)
        x = part.attention.output(y.transpose(1, 2).reshape(B, T, D), x)                         # [B,T,D]
        return part.output(part.intermediate(x), x)

    def forward(self, tokens, mask):
        """ Text alone -> the last hidden states [B,T,D]. """
        x = self.embed(tokens)
        for l in range(self.n_layers): x = self.layer(l, x, mask)
        return x


class SentencePiece:
    """ A tokenizer that is sentencepiece's tokenizer.model and nothing else (Hugging Face would want protobuf for it). """
    def __init__(self, folder):
        import sentencepiece
        self.sp = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, 'tokenizer.model'))
        path = os.path.join(folder, 'tokenizer_config.json')
        c = json.load(open(path, encoding='utf-8')) if os.path.exists(path) else {}
        ids = self.sp.bos_id(), self.sp.eos_id(), self.sp.pad_id(), self.sp.unk_id()             # -1: it has none
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id = (i if i >= 0 else None for i in ids)
        self.before = [ids[0]] if ids[0] >= 0 and c.get('add_bos_token', True) else []
        self.after = [ids[1]] if ids[1] >= 0 and c.get('add_eos_token', False) else []

    def __call__(self, texts, add_special_tokens=True, truncation=False, max_length=None):
        before, after = (self.before, self.after) if add_special_tokens else ([], [])
        room = max(0, max_length - len(before) - len(after)) if truncation else None
        return {'input_ids': [before + ids[:room] + after for ids in self.sp.encode(list(texts))]}

    def decode(self, ids): return self.sp.decode(list(ids))


def width_of(config):
    """ The width of an LM's hidden states, or ModelError: some have several, or project them behind the last layer. """
    width = getattr(config, 'hidden_size', None)
    if not width or getattr(config, 'word_embed_proj_dim', width) != width:
        raise ModelError(f"the LM family {config.model_type!r} does not say how wide its hidden states are: take another --lm=.")
    return width


def fingerprint(model):
    """ 16 hex digits that another LM, or this one trained again, would not have: of the first 256 values of each
    tensor, as hashing gigabytes at every start would take long. """
    whole = lambda p: p.detach().full_tensor() if hasattr(p, 'full_tensor') else p.detach()      # of one that processes share
    first = [whole(p).flatten()[:256].float().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b''.join(first)).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer):
    """ 16 hex digits of the token ids that a tokenizer makes of a few texts, as fingerprint is for weights. """
    texts = ["The film was GREAT, wasn't it? I'd say 7/10 (+0.6, -1.5).", ' two  spaces\n', 'na\u00efve \u6211\u4e0d\u559c\u6b22 \U0001f642']
    ids = [[int(t) for t in text] for text in tokenizer(texts, add_special_tokens=True)['input_ids']]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def specials(tokenizer):
    """ The tokens that a tokenizer puts before and behind a text by itself: (<s>, [CLS], [gMASK] <sop> .., </s>, [SEP] ..). """
    full, bare = (list(tokenizer(['a'], add_special_tokens=s)['input_ids'][0]) for s in (True, False))
    at = next((i for i in range(len(full)) if full[i:i + len(bare)] == bare), None)
    return ([], []) if at is None else (full[:at], full[at + len(bare):])


def hush():
    """ No progress bars of Hugging Face's, for weights that take a second; and no request to the
    hub to convert somebody's weights to safetensors, which transformers would send from a thread of
    its own. """
    from transformers.utils import logging
    logging.disable_progress_bar()
    os.environ.setdefault('DISABLE_SAFETENSORS_CONVERSION', '1')


@contextmanager
def quiet():
    """ No warnings of transformers': what they say of weights that were not found is a ModelError
    here. """
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def loading(name):
    """ Whatever Hugging Face says of an LM that cannot be had or read, as one sentence (ModelError). """
    try:
        yield
    except ModelError:
        raise
    except Exception as e:   # of any kind: the LM may have brought code of its own
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if 'trust_remote_code' in str(e):
            reason = f"it asks to run its author's code: {ALLOW_CODE}"
        raise ModelError(f"the LM {name!r} could not be loaded ({reason[:160]}): --lm= takes the Hugging Face name of a causal LM (for "
                         "CrossSent, of an encoder) that the hub or the local cache has, or a folder with config.json, weights and tokenizer.") from None


# ---------------------------------------------------------------------------------------------------------
# What is refused before an LM is loaded: adapters, special files, and what asks to run code

ALLOW_CODE = "--trust_remote_code=True on your own command line allows that"
ADAPTER_FILES = ('adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin')
SAFE_WEIGHTS = ('model.safetensors', 'model.safetensors.index.json')
WEIGHTS = (*SAFE_WEIGHTS, 'pytorch_model.bin', 'pytorch_model.bin.index.json')
# The ways to compute attention and experts that are transformers' own; others are packages, or
# kernels that it downloads
OWN_WAYS = (None, 'eager', 'sdpa', 'flex_attention', 'grouped_mm', 'batched_mm')
# task_type of an adapter -> the name in peft's class for it
PEFT_KINDS = dict(CAUSAL_LM='CausalLM', SEQ_CLS='SequenceClassification', SEQ_2_SEQ_LM='Seq2SeqLM',
                  TOKEN_CLS='TokenClassification', QUESTION_ANS='QuestionAnswering',
                  FEATURE_EXTRACTION='FeatureExtraction')
# Keys of a config file with which transformers runs foreign code, compiles kernels, or imports a
# package that does
CODE_KEYS = ('auto_map', 'custom_generate', 'quantization_config', 'compression_config',
             'kernel_config', 'use_kernels', 'fusion_config', 'distributed_config', 'mecab_kwargs',
             'sudachi_kwargs', 'jumanpp_kwargs')
# transformers calls from_pretrained of whatever class of its own a tokenizer_class names
TOKENIZER_NAME = re.compile(r'(?!Auto|TransfoXL|Rag)\w*(Tokenizer|TokenizerFast|Backend)')


def read_json(path):
    """ What a JSON file holds. Raises ModelError where it is none. """
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not readable as JSON ({str(e)[:120]}): get that file "
                         "again.") from None


def is_code_request(key, value):
    """ Whether this entry of a config file could make transformers run code that is not its own, or
    read outside the folder. """
    if key in CODE_KEYS:
        return bool(value)
    if key.removesuffix('_internal').endswith('_implementation'):
        ways = value.values() if isinstance(value, dict) else [value]
        return any(way not in OWN_WAYS for way in ways)
    if key == 'tokenizer_class' and value is not None:
        return not isinstance(value, str) or not TOKENIZER_NAME.fullmatch(value)
    if key == 'model_type':
        return value == 'transfo-xl'   # its tokenizer is a pickle
    if key.endswith('_file') and key != 'special_tokens_map_file':
        # older transformers open such a path, wherever it leads
        return isinstance(value, str) and os.path.lexists(value)
    return False


def code_request(config):
    """ The first entry in a config (parsed JSON, at any depth) that is_code_request holds for, as
    'key: value'; or None. """
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            for key, inner in value.items():
                if is_code_request(key, inner):
                    return f"{key}: {json.dumps(inner)[:100]}"
                waiting.append(inner)
    return None


def refuse_code_request(path, name):
    """ Raises ModelError where the config file at `path` asks for code. """
    request = code_request(read_json(path))
    if request:
        raise ModelError(f"the LM {name!r} asks to run its author's code, or code from elsewhere "
                         f"({request} in {path}), and an LM that a received folder names is read "
                         f"as data alone: {ALLOW_CODE}.")


def refuse_special_files(folder):
    """ Raises ModelError where an entry of `folder` is neither a file nor a folder: opening a FIFO
    would wait for ever. """
    for entry in sorted(os.listdir(folder)):
        path = os.path.join(folder, entry)
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ModelError(f"{path} is neither a file nor a folder (a pipe, a socket or a "
                             "device): remove it.")


def refuse_links_outside(folder, home):
    """ Raises ModelError where a link in `folder` leads out of the LM's folder `home`; in the hub's
    own cache, to anything but its blobs. """
    root = os.path.realpath(home)
    allowed = [root]
    if os.path.basename(os.path.dirname(root)) == 'snapshots':
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), 'blobs'))
    for entry in sorted(os.listdir(folder)):
        target = os.path.realpath(os.path.join(folder, entry))
        if not any(os.path.commonpath([target, place]) == place for place in allowed):
            raise ModelError(f"{os.path.join(folder, entry)} is a link to {target}, outside the "
                             "LM's folder, and an LM that a received folder names is read from "
                             "its own files alone: put the file itself there.")


def refuse_foreign(folder):
    """ Raises ModelError where `folder` holds more than the data of an LM: links that lead out,
    special files, requests to run code, weights that are not in its own safetensors files. """
    if not os.path.lexists(os.path.join(folder, 'config.json')):
        raise ModelError(f"the LM {folder!r} could not be loaded: the folder has no config.json.")
    inner = [os.path.join(folder, entry) for entry in sorted(os.listdir(folder))]
    refuse_links_outside(folder, folder)
    for place in filter(os.path.isdir, inner):   # transformers looks no deeper
        refuse_special_files(place)
        refuse_links_outside(place, folder)
    for path in inner:
        entry = os.path.basename(path)
        if entry == 'custom_generate' or entry.startswith('shard-'):
            raise ModelError(f"the LM {folder!r} asks for more than its weights to be read "
                             f"({path}), and an LM that a received folder names is read as data "
                             f"alone: {ALLOW_CODE}.")
        if entry.endswith('.json') and ('config' in entry or entry == 'special_tokens_map.json'):
            refuse_code_request(path, folder)
    index = os.path.join(folder, SAFE_WEIGHTS[1])
    shards = read_json(index).get('weight_map', {}).values() if os.path.exists(index) else ()
    for shard in shards:
        if os.path.basename(shard) != shard or not shard.endswith('.safetensors'):
            raise ModelError(f"{index} names {shard!r}, which is no safetensors file of its own "
                             "folder: save that LM again.")


def merge_command(name, adapter):
    """ The command that merges an adapter into the weights it was trained on. `adapter` is its
    adapter_config.json, parsed. """
    task, local = adapter.get('task_type'), os.path.isdir(name)
    has = lambda *files: local and any(os.path.exists(os.path.join(name, file)) for file in files)
    quoted = json.dumps   # double quotes, as the shell's are single ones
    merged = os.path.normpath(name) + '-merged' if local else name.split('/')[-1] + '-merged'
    kind = PEFT_KINDS.get(task, '')
    if has('config.json') and has(*WEIGHTS):
        # Beside the adapter in one folder, transformers would apply the adapter by itself: the
        # weights go to another folder first
        auto = f'For{kind}' if kind not in ('', 'FeatureExtraction') else ''
        code = (f'import shutil, peft, transformers as t; a, b = {quoted(name)}, {quoted(merged)}; '
                f'shutil.copytree(a, b, ignore=shutil.ignore_patterns("adapter_*")); '
                f"peft.PeftModel.from_pretrained(t.AutoModel{auto}.from_pretrained(b), "
                "a).merge_and_unload().save_pretrained(b)")
    else:
        words = adapter.get('base_model_name_or_path', name)
        if has('tokenizer.json', 'tokenizer.model', 'vocab.txt', 'vocab.json'):
            words = name
        peft_class = f"AutoPeftModel{'For' + kind if kind else ''}"
        code = (f"import peft, transformers as t; a, b = {quoted(name)}, {quoted(merged)}; "
                f"peft.{peft_class}.from_pretrained(a).merge_and_unload().save_pretrained(b); "
                f"t.AutoTokenizer.from_pretrained({quoted(words)}).save_pretrained(b)")
    return f"python -c {shlex.quote(code)}", merged


def refuse_adapter(name, config_path, found='adapter_config.json'):
    """ Raises ModelError with the command that merges it: an adapter that is there would be applied
    or ignored by whether peft is installed. config_path: its adapter_config.json, or None. """
    if config_path is None:
        raise ModelError(f"the LM {name!r} has an adapter beside its weights ({found}) without an "
                         "adapter_config.json, so nobody can apply it: get that file, or move the "
                         "adapter away if it does not belong to the LM.")
    adapter = read_json(config_path)
    command, merged = merge_command(name, adapter if isinstance(adapter, dict) else {})
    raise ModelError(f"the LM {name!r} has an adapter ({found}), which is read by no run here: "
                     f"merge it by {command} (needs pip install peft) and take --lm={merged}, or "
                     "move the adapter away to do without it.")


def refuse_folder(folder, as_data):
    """ Raises ModelError for what an LM's folder must not hold. """
    refuse_special_files(folder)
    found = [file for file in ADAPTER_FILES if os.path.exists(os.path.join(folder, file))]
    if found:
        config_path = os.path.join(folder, found[0]) if found[0] == ADAPTER_FILES[0] else None
        refuse_adapter(folder, config_path, found[0])
    if as_data:
        refuse_foreign(folder)


def hub_file(name, file, config=None, local=False):
    """ The path of a file of a hub LM in the local cache, or None where the LM has no such file (or
    nobody can say). """
    from transformers.utils import cached_file
    try:
        return cached_file(name, file, revision=getattr(config, '_commit_hash', None) or 'main',
                           local_files_only=local, _raise_exceptions_for_gated_repo=False,
                           _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)
    except (OSError, ValueError):
        return None


def refuse_hub_adapter(name, config=None, local=False):
    """ Raises ModelError where a hub LM is an adapter, or has one beside its weights. """
    path = hub_file(name, ADAPTER_FILES[0], config, local)
    if path:
        refuse_adapter(name, path)


def refuse_hub_code(name, config):
    """ Raises ModelError where a config file of a hub LM asks for code. """
    for file in ('config.json', 'tokenizer_config.json', 'generation_config.json'):
        path = hub_file(name, file, config)
        if path:
            refuse_code_request(path, name)


def hub_has_answered(error):
    """ Whether the hub itself said that a file is not there, rather than nobody being reachable.
    """
    names = []
    while error is not None:
        names += [kind.__name__ for kind in type(error).__mro__]
        error = error.__cause__
    return 'EntryNotFoundError' in names and 'LocalEntryNotFoundError' not in names


def hub_config(name, remote):
    """ The configuration of a hub LM. Raises ModelError where it is an adapter, or what
    transformers raises. """
    from huggingface_hub.utils import validate_repo_id
    from transformers import AutoConfig
    validate_repo_id(name)   # or older transformers would take a URL
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=remote)
    except (OSError, ValueError) as e:   # an adapter alone has no config.json
        refuse_hub_adapter(name, local=not hub_has_answered(e))
        raise


def lm_config(name, remote=False, as_data=False):
    """
    The configuration of an LM, and the name or folder that it came from (a run's LM is in its
    folder hf). `remote` lets the LM's authors run their own code on this machine. `as_data` is for
    an LM that somebody else's folder names: its files are read as data, from safetensors, and what
    asks to run code is refused, whatever `remote` says. Raises ModelError.
    """
    from transformers import AutoConfig
    hush()
    if os.path.isdir(os.path.join(name, 'hf')):
        name = os.path.join(name, 'hf')
        if as_data and os.path.islink(name):
            raise ModelError(f"{name} is a link, and an LM that a received folder names is read "
                             "from its own files alone: put the folder itself there.")
    if os.path.exists(name) and not os.path.isdir(name):
        raise ModelError(f"the LM {name!r} is no folder: --lm= takes the folder that has "
                         "config.json, weights and tokenizer.")
    remote = remote and not as_data
    with loading(name):
        if os.path.isdir(name):
            refuse_folder(name, as_data)
            config = AutoConfig.from_pretrained(name, trust_remote_code=remote)
        else:
            config = hub_config(name, remote)
            if as_data:
                refuse_hub_code(name, config)
    if as_data:
        refuse_what_is_no_lm(config, name)
    way = getattr(config, '_attn_implementation_internal', None)
    if isinstance(way, str) and '/' in way and not remote:
        raise ModelError(f"the LM {name!r} asks for a kernel from the hub (attn_implementation: "
                         f"{way}), which is code: {ALLOW_CODE}.")
    return config, name


def refuse_what_is_no_lm(config, name):
    """ Raises ModelError where a config is of no causal LM or text encoder: models of other kinds
    read files of their own. """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
    if not any(type(config) in kind for kind in kinds):
        raise ModelError(f"the LM {name!r} that a received folder names is of the kind "
                         f"{config.model_type!r}, which is no language model that transformers "
                         "knows: nothing of it is read.")


# ---------------------------------------------------------------------------------------------------------
# Loading

def empty_lm(name, remote=False, as_data=False):
    """ The LM without a weight in memory, on the meta device, from its configuration alone. Raises ModelError. """
    from transformers import AutoModelForCausalLM
    config, name = lm_config(name, remote, as_data)
    with loading(name), torch.device('meta'):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=remote and not as_data)


def load_tokenizer(name, remote=False, as_data=False):
    """ An LM's tokenizer, by Hugging Face name or by folder. Raises ModelError. """
    from transformers import AutoTokenizer
    _, name = lm_config(name, remote, as_data)
    has = lambda file: os.path.exists(os.path.join(name, file))
    with loading(name):
        if has('tokenizer.model') and not has('tokenizer.json'): return SentencePiece(name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=remote and not as_data)


def missing_from_shards(folder):
    """ Names of tensors that the index of a folder's shards has and the shards themselves do not:
    older transformers believe the index, and leave such a weight random without a word. """
    from safetensors import safe_open
    index = os.path.join(folder, SAFE_WEIGHTS[1])
    if not os.path.isfile(index) or os.path.isfile(os.path.join(folder, SAFE_WEIGHTS[0])):
        return []
    names = read_json(index)['weight_map']
    found = set()
    for shard in sorted(set(names.values())):
        with safe_open(os.path.join(folder, shard), 'pt') as f:
            found |= set(f.keys())
    return sorted(set(names) - found)


def missing_weights(model, report, unused=()):
    """ Names of a model's weights that transformers did not find in its files, by its loading
    report: without those that it computes by itself, that share the tensor of one that was found,
    or that begin with `unused`. """
    missing = set(report['missing_keys'])
    computed = {k for k, b in model.named_buffers()
                if not b.is_floating_point() or k.endswith('inv_freq')}
    shared = {}   # tensor -> its names: a tied head is in the files once
    for k, p in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(p), []).append(k)
    found = {k for names in shared.values() if not missing.issuperset(names) for k in names}
    return sorted(k for k in missing - computed - found if not k.startswith(unused))


def is_adapter_weight(key):
    """ Whether a weight of this name is of an adapter of peft's: LoRA, its kin, or what it saved. """
    kinds = ('.lora_', '.hada_', '.lokr_', '.ia3_', '.modules_to_save.')
    return any(kind in key for kind in kinds)


def weight_file(name, file, config):
    """ The path of a weight file of an LM, in its folder or from the hub; or None. """
    if not os.path.isdir(name):
        return hub_file(name, file, config)
    path = os.path.join(name, file)
    return path if os.path.isfile(path) else None


def load_weights(auto, name, config, remote=False, as_data=False, unused=(), instead='', **more):
    """
    The pretrained model of class `auto`, an Auto class of transformers. Raises ModelError where a
    weight of it was not in the files, which transformers would draw at random, but for names that
    begin with one of `unused`. instead: what the user may do.
    """
    local = os.path.isdir(name)
    remote = remote and not as_data
    if as_data:
        if not any(weight_file(name, file, config) for file in SAFE_WEIGHTS):
            raise ModelError(f"the LM {name!r} has no {SAFE_WEIGHTS[0]}, and one that a received "
                             "folder names is read from safetensors alone, as other weight files "
                             "are pickles: save it by save_pretrained of transformers.")
        more['use_safetensors'] = True
    if not local:
        refuse_hub_adapter(name, config)
    with loading(name), quiet():
        # a tensor of another shape is an error of ours below, which says both shapes
        model, report = auto.from_pretrained(
            name, trust_remote_code=remote, output_loading_info=True, ignore_mismatched_sizes=True,
            **more)
        missing = missing_weights(model, report, unused)
        if local and not missing:
            missing = missing_from_shards(name)
    other = [f"{k} is {list(theirs)} in the file and {list(ours)} by "
             "config.json" for k, theirs, ours in sorted(report['mismatched_keys'])
             if not k.startswith(unused)]
    inside = sorted(k for k in report['unexpected_keys'] if is_adapter_weight(k))
    if inside:
        raise ModelError(f"the weight files of the LM {name!r} hold {len(inside)} weights of an "
                         f"adapter that was not merged ({', '.join(inside[:3])}), and without them "
                         "it is another model: load it with peft, call merge_and_unload, and save "
                         "that.")
    total = len(dict(model.named_parameters(remove_duplicate=False)))
    if other:
        raise ModelError(f"{len(other)} of the {total} weights of the LM {name!r} have another "
                         f"shape than its config.json says ({'; '.join(other[:3])}) and would be "
                         f"random numbers: get the config.json that belongs to them{instead}.")
    if missing:
        names = ', '.join(missing[:3]) + (' ..' if len(missing) > 3 else '')
        raise ModelError(f"{len(missing)} of the {total} weights of the LM {name!r} are not in its "
                         f"files ({names}) and would be random numbers: get all of its files "
                         f"again, or save it again from the class that it was trained as{instead}.")
    return model


def refuse_unknown_tokens(lists, rows, what):
    """ Raises ModelError where a token id of `lists` (of ids) has no row in an embedding of `rows`
    rows. """
    highest = max((max(ids, default=0) for ids in lists), default=0)
    if rows is not None and highest >= rows:
        raise ModelError(f"the tokenizer's ids reach {highest} in {what}, and the embedding of the "
                         f"LM has {rows} rows: tokens were added to the tokenizer alone, so call "
                         "the LM's resize_token_embeddings and train them, or take the tokenizer "
                         "that belongs to it.")


def with_rows(tokenizer, hf):
    """ The tokenizer, which from now on says how many rows the embedding of its model has
    (embedding_rows). """
    tokenizer.embedding_rows = len(hf.get_input_embeddings().weight)
    return tokenizer


def load_lm(name, dtype=torch.float32, random_init=False, remote=False, as_data=False):
    """
    A pretrained causal LM and its tokenizer, by Hugging Face name or by folder (a run of system='lm' is one too).
    random_init keeps the shape and throws the weights away, for the control that every reader asks for.
    Raises ModelError where neither the hub, nor the local cache, nor a folder has it.
    """
    from transformers import AutoModelForCausalLM, __version__
    DTYPE = 'dtype' if [int(n) for n in __version__.split('.')[:2]] >= [4, 56] else 'torch_dtype'   # renamed there
    config, name = lm_config(name, remote, as_data)
    if random_init:
        with loading(name):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=remote and not as_data)
            hf = hf.to(dtype)
    else:
        hf = load_weights(AutoModelForCausalLM, name, config, remote, as_data, **{DTYPE: dtype},
                          instead="; --lm_init=random is for an LM that shall be random")
    lm = FrozenLM(hf)
    return lm, with_rows(load_tokenizer(name, remote, as_data), lm.hf)


def load_encoder(name, remote=False, as_data=False):
    """ A pretrained encoder and its tokenizer, by Hugging Face name or by folder. Raises ModelError. """
    from transformers import AutoModel
    config, name = lm_config(name, remote, as_data)
    # TextEncoder leaves the pooler out
    hf = load_weights(AutoModel, name, config, remote, as_data, unused=('pooler.',),
                      instead="; --lm=new is for an encoder that shall be random")
    encoder = TextEncoder(hf.float())
    return encoder, with_rows(load_tokenizer(name, remote, as_data), encoder.hf)


@torch.no_grad()
def frozen_text(name, tokens, folder, remote=False, device='cpu', batch_size=64, as_data=False):
    """
    The last hidden states of any Hugging Face model for texts (lists of token ids), end to end, and the model's fingerprint.
    Computed once, and kept in `folder` as float16 [n, D], mapped and never read whole; n is all tokens of all texts. What they
    are kept under changes with the texts and with the model's files (or its revision on the hub). Raises ModelError.
    """
    from transformers import AutoModel
    config, name = lm_config(name, remote, as_data)
    files = [(e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(name)] if os.path.isdir(name) else []
    which = json.dumps([os.path.abspath(name) if files else name, sorted(files), getattr(config, '_commit_hash', None), tokens])
    path = os.path.join(folder, hashlib.sha256(which.encode()).hexdigest()[:16])
    if not os.path.exists(path + '.json'):
        longest = max(map(len, tokens))
        if longest > getattr(config, 'max_position_embeddings', longest):
            raise ModelError(f"a text of {longest} tokens is past the {config.max_position_embeddings} positions of {name!r}: lower "
                             "max_text_len.")
        model = load_weights(AutoModel, name, config, remote, as_data, unused=('pooler.',))
        model = model.float().eval().to(device)
        refuse_unknown_tokens(tokens, len(model.get_input_embeddings().weight), "the corpus's "
                                                                                "texts")
        os.makedirs(folder, exist_ok=True)
        start = np.cumsum([0] + [len(t) for t in tokens])                                        # [N+1]
        new = f'{path}.{os.getpid()}.new'   # two runs may make the same file: each its own, and the last name stays
        try:
            out = np.lib.format.open_memmap(new, 'w+', np.float16, (int(start[-1]), width_of(config)))
            order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
            for i in range(0, len(order), batch_size):
                index = order[i:i + batch_size]
                ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens[k]) for k in index], batch_first=True).to(device)   # [B,T]
                mask = torch.arange(ids.shape[1], device=device) < torch.tensor([len(tokens[k]) for k in index], device=device)[:, None]
                hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.half().cpu()                         # [B,T,D]
                if not hidden[mask.cpu()].isfinite().all():
                    raise ModelError(f"hidden states of {name!r} are past what float16 holds: take another LM for text_features='frozen'.")
                for k, x in zip(index, hidden): out[start[k]:start[k + 1]] = x[:len(tokens[k])]
            out.flush()
            os.replace(new, path + '.npy')
        finally:
            if os.path.exists(new): os.remove(new)
        with open(new, 'w', encoding='utf-8') as f: json.dump(dict(model=name, fingerprint=fingerprint(model)), f)
        os.replace(new, path + '.json')
    with open(path + '.json', encoding='utf-8') as f: made = json.load(f)
    return np.load(path + '.npy', mmap_mode='r'), made['fingerprint']                            # [n,D]


def new_tokenizer(texts, c, folder, ends=False):
    """ A sentencepiece tokenizer trained on `texts`, saved in `folder` (tokenizer.json for AutoTokenizer, tokenizer.model
    beside it). ends: it puts <s> before each text and </s> behind. Raises ModelError. """
    import io
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    if c['lm_positions'] < c['max_text_len']:
        raise ModelError(f"lm_positions={c['lm_positions']} is less than max_text_len={c['max_text_len']}: raise it.")
    if c['lm_width'] % c['lm_heads']:
        raise ModelError(f"lm_heads={c['lm_heads']} does not divide lm_width={c['lm_width']}: take a divisor of it.")
    proto, numbers = io.BytesIO(), ''.join(sorted(set('0123456789.+-') & set(''.join(texts))))   # rare as they may be: labels are said in them
    try: sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=proto, vocab_size=c['lm_vocab'], model_type='unigram', num_threads=1,
        hard_vocab_limit=False, split_digits=True, normalization_rule_name='identity', required_chars=numbers, minloglevel=2, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    except RuntimeError as e:
        raise ModelError(f"no sentencepiece tokenizer of lm_vocab={c['lm_vocab']} can be trained on this text "
                         f"({str(e).splitlines()[-1][-120:]}): change lm_vocab.") from None
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    fast = Tokenizer(models.Unigram([(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.vocab_size())], unk_id=0))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.add_special_tokens([AddedToken(t, special=True) for t in ('<unk>', '<s>', '</s>')])
    if ends: fast.post_processor = processors.TemplateProcessing('<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token='<unk>', bos_token='<s>', eos_token='</s>')
    make_plain_folder(folder)
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, 'tokenizer.model'), 'wb') as f: f.write(proto.getvalue())
    return tokenizer


def new_lm(texts, c, folder):
    """ A GPT-2 of lm_layers x lm_width from nothing, and a tokenizer trained on `texts`. `folder` becomes an ordinary
    Hugging Face folder (the weights come later). """
    from transformers import GPT2Config, GPT2LMHeadModel
    hush()   # train.py saves it
    tokenizer = new_tokenizer(texts, c, folder)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=c['lm_positions'], n_embd=c['lm_width'], n_layer=c['lm_layers'],
        n_head=c['lm_heads'], bos_token_id=1, eos_token_id=2,
        resid_pdrop=c['dropout'], embd_pdrop=c['dropout'], attn_pdrop=c['dropout'])), tokenizer


def new_encoder(texts, c, folder, again=False, as_data=False):
    """ A BERT of lm_layers x lm_width from nothing, and a tokenizer trained on `texts` (again: the
    one in `folder`, which as_data reads as data alone). """
    from transformers import BertConfig, BertModel
    if again:
        tokenizer = load_tokenizer(folder, as_data=as_data)
    else:
        tokenizer = new_tokenizer(texts, c, folder, ends=True)
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=c['lm_positions'], hidden_size=c['lm_width'],
        num_hidden_layers=c['lm_layers'], num_attention_heads=c['lm_heads'], intermediate_size=4 * c['lm_width'],
        hidden_dropout_prob=c['dropout'], attention_probs_dropout_prob=c['dropout'])
    if not again:   # a finished run is read: nothing is written into it
        config.save_pretrained(folder)
    return TextEncoder(BertModel(config)), tokenizer
