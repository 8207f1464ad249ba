"""
The frozen LM: any Hugging Face causal LM of a known family, run layer by layer by our own code; the encoder that CrossSent
fine-tunes, run the same way; and how either is loaded, or made from nothing.

Axis letters, the same in every file:
    B clips   T text tokens   L any sequence   D LM width   V vocabulary   h heads
"""
import hashlib
import json
import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


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
        return tuple(self.part(l, name) for name in ('gate', 'up', 'down', 'act'))

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
    """ No progress bars of Hugging Face's, for weights that take a second. """
    from transformers.utils import logging
    logging.disable_progress_bar()


@contextmanager
def loading(name):
    """ Whatever Hugging Face says of an LM that cannot be had or read, as one sentence (ModelError). """
    try: yield
    except Exception as e:   # of any kind: the LM may have brought code of its own
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"the LM {name!r} could not be loaded ({reason[:160]}): --lm= takes the Hugging Face name of a causal LM (for "
                         "CrossSent, of an encoder) that the hub or the local cache has, or a folder with config.json, weights and tokenizer.") from None


def lm_config(name, remote=False):
    """ The configuration of an LM, and the name or folder that it came from (a run's LM is in its folder hf). `remote` lets
    the LM's authors run their own code on this machine. """
    from transformers import AutoConfig
    hush()
    if os.path.isdir(os.path.join(name, 'hf')): name = os.path.join(name, 'hf')
    with loading(name): return AutoConfig.from_pretrained(name, trust_remote_code=remote), name


def empty_lm(name, remote=False):
    """ The LM without a weight in memory, on the meta device, from its configuration alone. Raises ModelError. """
    from transformers import AutoModelForCausalLM
    config, name = lm_config(name, remote)
    with loading(name), torch.device('meta'): return AutoModelForCausalLM.from_config(config, trust_remote_code=remote)


def load_tokenizer(name, remote=False):
    """ An LM's tokenizer, by Hugging Face name or by folder. Raises ModelError. """
    from transformers import AutoTokenizer
    _, name = lm_config(name, remote)
    has = lambda file: os.path.exists(os.path.join(name, file))
    with loading(name):
        if has('tokenizer.model') and not has('tokenizer.json'): return SentencePiece(name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=remote)


def load_lm(name, dtype=torch.float32, random_init=False, remote=False):
    """
    A pretrained causal LM and its tokenizer, by Hugging Face name or by folder (a run of system='lm' is one too).
    random_init keeps the shape and throws the weights away, for the control that every reader asks for.
    Raises ModelError where neither the hub, nor the local cache, nor a folder has it.
    """
    from transformers import AutoModelForCausalLM, __version__
    DTYPE = 'dtype' if [int(n) for n in __version__.split('.')[:2]] >= [4, 56] else 'torch_dtype'   # renamed there
    config, name = lm_config(name, remote)
    with loading(name):
        if random_init: hf = AutoModelForCausalLM.from_config(config, trust_remote_code=remote).to(dtype)
        else: hf = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=remote, **{DTYPE: dtype})
    return FrozenLM(hf), load_tokenizer(name, remote)


def load_encoder(name, remote=False):
    """ A pretrained encoder and its tokenizer, by Hugging Face name or by folder. Raises ModelError. """
    from transformers import AutoModel
    config, name = lm_config(name, remote)
    with loading(name): hf = AutoModel.from_pretrained(name, trust_remote_code=remote)
    return TextEncoder(hf.float()), load_tokenizer(name, remote)


@torch.no_grad()
def frozen_text(name, tokens, folder, remote=False, device='cpu', batch_size=64):
    """
    The last hidden states of any Hugging Face model for texts (lists of token ids), end to end, and the model's fingerprint.
    Computed once, and kept in `folder` as float16 [n, D], mapped and never read whole; n is all tokens of all texts. What they
    are kept under changes with the texts and with the model's files (or its revision on the hub). Raises ModelError.
    """
    from transformers import AutoModel
    config, name = lm_config(name, remote)
    files = [(e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(name)] if os.path.isdir(name) else []
    which = json.dumps([os.path.abspath(name) if files else name, sorted(files), getattr(config, '_commit_hash', None), tokens])
    path = os.path.join(folder, hashlib.sha256(which.encode()).hexdigest()[:16])
    if not os.path.exists(path + '.json'):
        longest = max(map(len, tokens))
        if longest > getattr(config, 'max_position_embeddings', longest):
            raise ModelError(f"a text of {longest} tokens is past the {config.max_position_embeddings} positions of {name!r}: lower "
                             "max_text_len.")
        with loading(name): model = AutoModel.from_pretrained(name, trust_remote_code=remote).float().eval().to(device)
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
    os.makedirs(folder, exist_ok=True)
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


def new_encoder(texts, c, folder, again=False):
    """ A BERT of lm_layers x lm_width from nothing, and a tokenizer trained on `texts` (again: the one in `folder`). """
    from transformers import BertConfig, BertModel
    tokenizer = load_tokenizer(folder) if again else new_tokenizer(texts, c, folder, ends=True)
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=c['lm_positions'], hidden_size=c['lm_width'],
        num_hidden_layers=c['lm_layers'], num_attention_heads=c['lm_heads'], intermediate_size=4 * c['lm_width'],
        hidden_dropout_prob=c['dropout'], attention_probs_dropout_prob=c['dropout'])
    config.save_pretrained(folder)
    return TextEncoder(BertModel(config)), tokenizer
