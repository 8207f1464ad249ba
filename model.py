"""
The frozen LM, run layer by layer by our own code, and the systems built on it.

A model here has three methods that train.py and eval.py use, and nothing else:
    model(batch)          -> dict(loss=.., terms=dict(name -> tensor))   reads batch['label']
    model.predict(batch)  -> dict(pred [B], ..)                          reads no label
    model.param_groups()  -> list of dict(names, params, decay)          every trainable weight, once

Axis letters, the same in every file:
    B clips   T text tokens   S audio or video frames   F fusion tokens   m slots of the audiovisual sequence Z
    D LM width   d adapter width   V vocabulary   h heads   L any sequence

batch: tokens [B,T], text_len [B], text_mask [B,T]; audio [B,S,d_a], audio_len [B]; vision .. ; label [B]; index [B].
mm_layers count from 1, as the papers print them: 8 means "an MM block after the LM's eighth layer".
"""
import hashlib
import json
import os
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import AVEncoder, MMBlock, masked_mean, regularise
from losses import deepmlf_loss, l1, lm_loss


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


def rotate(x, cos, sin):
    """ Rotary position embedding (Su et al. 2021), halves layout. x [B,h,L,D/h], cos and sin [B,L,D/h]. """
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]                              # [B,h,L,D/h]


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
        if c.model_type not in FAMILIES:
            raise ModelError(f"the LM family {c.model_type!r} is not known here: known are {', '.join(FAMILIES)}; "
                             "a new one is a line in FAMILIES (model.py).")
        if getattr(c, 'scale_attn_by_inverse_layer_idx', False) or not getattr(c, 'scale_attn_weights', True):
            raise ModelError("this GPT-2 scales attention in a way of its own (scale_attn_* in its config), which the frozen "
                             "LM here does not do: take another LM.")
        self.hf, self.where = hf.requires_grad_(False).eval(), FAMILIES[c.model_type]
        self.width, self.n_layers, self.n_heads = c.hidden_size, c.num_hidden_layers, c.num_attention_heads
        self.n_kv_heads = getattr(c, 'num_key_value_heads', None) or self.n_heads
        self.max_positions = c.max_position_embeddings
        get = hf.get_submodule
        # plain lists, so that nothing is registered twice and a state dict has each tensor once
        self.parts = {k: get(self.where[k]) if k in self.where else None for k in ('embed', 'norm', 'wpe', 'rope')}
        self.parts['layers'] = list(get(self.where['layers']))

    def train(self, mode=True):
        return super().train(False)

    def fingerprint(self):
        """ 16 hex digits that another LM, or this one trained again, would not have: of the first 256 values of each
        tensor, as hashing gigabytes at every start would take long. """
        first = [p.detach().flatten()[:256].float().cpu().numpy().tobytes() for p in self.hf.parameters()]
        return hashlib.sha256(b''.join(first)).hexdigest()[:16]

    def part(self, l, name):
        """ Layer l's submodule under the name that FAMILIES gives it (None where the family has none). """
        path = self.where[name]
        return self.parts['layers'][l].get_submodule(path) if path else None

    def ffw(self, l):
        """ The four pieces of layer l's FFW: (gate or None, up, down, act). """
        return tuple(self.part(l, name) for name in ('gate', 'up', 'down', 'act'))

    def embed(self, tokens):
        """ tokens [B,L] -> [B,L,D], without positions (SeqAug comes before them). """
        return self.parts['embed'](tokens)

    def place(self, x, positions):
        """ Give x [B,L,D] its positions [B,L]: added to it (GPT-2), or as (cos, sin) for every layer to rotate by.
        Returns x, rope. """
        if self.parts['wpe'] is not None: return x + self.parts['wpe'](positions), None
        return x, self.parts['rope'](x, positions)

    def block(self, l, x, rope, past=None, mask=None):
        """
        LM layer l (from 0) on x [B,L,D]. Without `past`, causal over x itself: with padding at the end no real
        token ever sees it, so no mask is needed. With `past`, the (k, v) of earlier tokens, x comes after them
        and `mask` [B,1,L,T+L] says who sees whom. Returns x [B,L,D] and this layer's own (k, v) [B,h_kv,L,D/h].
        """
        B, L, _ = x.shape
        y = self.part(l, 'norm_1')(x)
        qkv = [self.parts['layers'][l].get_submodule(path)(y) for path in self.where['qkv']]
        q, k, v = qkv if len(qkv) == 3 else qkv[0].chunk(3, -1)                                  # [B,L,h D/h] each
        q, k, v = (t.view(B, L, n, -1) for t, n in ((q, self.n_heads), (k, self.n_kv_heads), (v, self.n_kv_heads)))
        if 'q_norm' in self.where: q, k = self.part(l, 'q_norm')(q), self.part(l, 'k_norm')(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                         # [B,h,L,D/h]
        if rope is not None: q, k = rotate(q, *rope), rotate(k, *rope)
        own = k, v
        if past is not None: k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)       # [B,h_kv,T+L,D/h]
        groups = self.n_heads // self.n_kv_heads                                                 # queries per key head
        if groups > 1: k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)     # [B,h,T+L,D/h]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)                # [B,h,L,D/h]
        x = x + self.part(l, 'out')(y.transpose(1, 2).reshape(B, L, -1))                         # [B,L,D]
        return x + self.part(l, 'ffw')(self.part(l, 'norm_2')(x)), own

    def final_norm(self, x): return self.parts['norm'](x)

    def lm_head(self, x): return self.hf.get_output_embeddings()(x)                              # [..,V]

    def forward(self, tokens):
        """ Text alone: tokens [B,T] -> hidden states after the final norm [B,T,D]. """
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]                    # [1,T]
        x, rope = self.place(self.embed(tokens), positions)
        for l in range(self.n_layers): x, _ = self.block(l, x, rope)
        return self.final_norm(x)


class SentencePiece:
    """ A tokenizer that is sentencepiece's tokenizer.model and nothing else (Hugging Face would want protobuf for it). """
    def __init__(self, folder):
        import sentencepiece
        self.sp = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, 'tokenizer.model'))
        path = os.path.join(folder, 'tokenizer_config.json')
        c = json.load(open(path, encoding='utf-8')) if os.path.exists(path) else {}
        self.before = [self.sp.bos_id()] if c.get('add_bos_token', True) else []
        self.after = [self.sp.eos_id()] if c.get('add_eos_token', False) else []
        self.bos_token_id, self.eos_token_id, self.pad_token_id = self.sp.bos_id(), self.sp.eos_id(), None

    def __call__(self, texts, add_special_tokens=True, truncation=False, max_length=None):
        before, after = (self.before, self.after) if add_special_tokens else ([], [])
        room = max(0, max_length - len(before) - len(after)) if truncation else None
        return {'input_ids': [before + ids[:room] + after for ids in self.sp.encode(list(texts))]}

    def decode(self, ids): return self.sp.decode(list(ids))


@contextmanager
def loading(name):
    """ Whatever Hugging Face says of an LM that cannot be had or read, as one sentence (ModelError). """
    from safetensors import SafetensorError
    try: yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:   # RuntimeError: weights of other shapes
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(f"the LM {name!r} could not be loaded ({reason[:160]}): --lm= takes a Hugging Face name that the "
                         "hub or the local cache has, or a folder with config.json, weights and tokenizer.") from None


def lm_config(name):
    """ The configuration of an LM, and the name or folder that it came from (a run's LM is in its folder hf). """
    from transformers import AutoConfig
    if os.path.isdir(os.path.join(name, 'hf')): name = os.path.join(name, 'hf')
    with loading(name): return AutoConfig.from_pretrained(name), name


def load_lm(name, dtype=torch.float32, random_init=False):
    """
    A pretrained causal LM and its tokenizer, by Hugging Face name or by folder (a run of system='lm' is one too).
    random_init keeps the shape and throws the weights away, for the control that every reader asks for.
    Raises ModelError where neither the hub, nor the local cache, nor a folder has it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
    from transformers.utils import logging
    DTYPE = 'dtype' if [int(n) for n in __version__.split('.')[:2]] >= [4, 56] else 'torch_dtype'   # renamed there
    logging.disable_progress_bar()
    config, name = lm_config(name)
    with loading(name):
        if random_init: hf = AutoModelForCausalLM.from_config(config).to(dtype)
        else: hf = AutoModelForCausalLM.from_pretrained(name, **{DTYPE: dtype})
        has = lambda file: os.path.exists(os.path.join(name, file))
        bare = has('tokenizer.model') and not has('tokenizer.json')
        tokenizer = SentencePiece(name) if bare else AutoTokenizer.from_pretrained(name)
    return FrozenLM(hf), tokenizer


# ---------------------------------------------------------------------------------------------------------
# The systems

def grouped(model):
    """ Every trainable weight in one of two groups: matrices are decayed; biases, norms, gates and learnable tokens
    are not (the release means to and its name rule never matches: it decays all but 'bias'). """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    flat = lambda n, p: p.ndim < 2 or 'tokens' in n
    return [dict(names=[n for n, p in named if flat(n, p) != decay], decay=decay,
                 params=[p for n, p in named if flat(n, p) != decay]) for decay in (True, False)]


class LanguageModel(nn.Module):
    """ A causal LM trained from nothing on a corpus's own text: step one of the curriculum on the toy corpus. """
    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, batch):
        x = self.hf.base_model(batch['tokens'], attention_mask=batch['text_mask'].long(), use_cache=False)[0]    # [B,T,D]
        loss = lm_loss(x, batch, self.hf.get_output_embeddings())
        return dict(loss=loss, terms={'lm': loss})

    def param_groups(self): return grouped(self)


class AVModel(nn.Module):
    """ The AV encoder by itself: its isolated pretraining (paper 4.6, "AV Initialization"). One linear head on the mean
    over real slots; the release reads the last slot, which is mostly padding. Loss: L1. """
    def __init__(self, encoder):
        super().__init__()
        self.av_encoder = encoder
        self.head = nn.Linear(encoder.d, 1)

    def predict(self, batch):
        z, mask = self.av_encoder(batch)                                                         # [B,m,d], [B,m]
        with torch.autocast(z.device.type, enabled=False): y = self.head(masked_mean(z, mask))   # [B,1]
        return dict(pred=y[:, 0])                                                                # [B]

    def forward(self, batch):
        loss = l1(self.predict(batch)['pred'], batch['label'])
        return dict(loss=loss, terms={'task': loss})

    def param_groups(self): return grouped(self)


class DeepMLF(nn.Module):
    """
    DeepMLF (Georgiou et al. 2025): F learnable fusion tokens after the text of a frozen causal LM, MM blocks between
    the LM's layers, a head on what came out of each stream.

    Text never depends on the fusion tokens: the mask is causal and they come last. So there are two streams: text,
    and a short suffix of fusion tokens that looks back at the text's keys and values. Below the first MM block
    nothing trainable has touched the text, so that part runs without a graph: this is where the time goes that a
    plain concatenated forward would spend on back-propagating through 50 text tokens.
    """
    def __init__(self, lm, av_encoder, c):
        """ lm FrozenLM, av_encoder AVEncoder or (av_init='frozen') a frozen one, c: the run's knobs as a dict. """
        super().__init__()
        self.lm, self.av_encoder, self.c = lm, av_encoder, c
        D, d, layers = lm.width, av_encoder.d, sorted(c['mm_layers'])
        if not layers or layers[0] < 1 or layers[-1] > lm.n_layers or len(set(layers)) < len(layers):
            raise ModelError(f"mm_layers={c['mm_layers']} must be different numbers from 1 to {lm.n_layers}, "
                             "the layers of this LM.")
        longest = c['max_text_len'] + c['n_fusion']
        if longest > lm.max_positions:
            raise ModelError(f"max_text_len + n_fusion = {longest} is past the {lm.max_positions} positions of this LM: "
                             "lower max_text_len.")
        self.fusion_tokens = nn.Parameter(0.02 * torch.randn(c['n_fusion'], D))                  # [F,D]
        self.mm_blocks = nn.ModuleDict({str(n): MMBlock(
            D, d, lm.part(n - 1, 'norm_2'), lm.ffw(n - 1), c['mm_heads'], c['mm_query'], c['mm_gate'], c['mm_ffw'],
            c['mm_ffw_init'], c['lora_rank'], c['lora_alpha'], c['lora_dropout'], c['dropout']) for n in layers})
        self.task_head = nn.Sequential(nn.Linear(d + 2 * D, c['head_width']), nn.ReLU(), nn.Linear(c['head_width'], 1))
        self.av_head, self.text_head, self.fusion_head = nn.Linear(d, 1), nn.Linear(D, 1), nn.Linear(D, 1)
        # a head without a loss would never get a gradient: say so, rather than decay it into nothing
        self.weights = {k: c['weight_' + k] for k in ('av', 'text', 'fusion')}                   # lambdas of eq. 13
        for k, weight in self.weights.items(): getattr(self, k + '_head').requires_grad_(weight > 0)

    def train(self, mode=True):
        """ A frozen AV encoder runs without dropout and SeqAug, like the frozen LM (not stated in the paper). """
        super().train(mode)
        if not any(p.requires_grad for p in self.av_encoder.parameters()): self.av_encoder.eval()
        return self

    def streams(self, batch):
        """ Both streams through the LM -> x_t [B,T,D], x_f [B,F,D] after the final norm; z [B,m,d] and its mask [B,m]. """
        c, lm, (B, T) = self.c, self.lm, batch['tokens'].shape
        n_f, dev, text_len = c['n_fusion'], batch['tokens'].device, batch['text_len']
        z, z_mask = self.av_encoder(batch)                                                       # [B,m,d], [B,m]

        x_t = lm.embed(batch['tokens'])                                                          # [B,T,D]
        if self.training:
            x_t = regularise(x_t, text_len, c['text_reg'], c['text_reg_rate'], c['text_reg_prob'], c['text_reg_draw'])
        x_t, rope_t = lm.place(x_t, torch.arange(T, device=dev).expand(B, T))
        # right behind the last real token, or (as released) behind the padded length, whatever the text's own
        start = text_len if c['fusion_position'] == 'after' else text_len * 0 + c['max_text_len']    # [B]
        x_f = self.fusion_tokens.to(x_t.dtype).expand(B, n_f, -1)                                # [B,F,D]
        x_f, rope_f = lm.place(x_f, start[:, None] + torch.arange(n_f, device=dev))
        causal = torch.ones(n_f, n_f, dtype=torch.bool, device=dev).tril()                       # [F,F]
        mask = torch.cat([batch['text_mask'][:, None].expand(B, n_f, T), causal.expand(B, n_f, n_f)], -1)
        mask = mask[:, None]                                                                     # [B,1,F,T+F]

        first, graph = min(map(int, self.mm_blocks)), torch.is_grad_enabled()
        for l in range(lm.n_layers):
            with torch.set_grad_enabled(graph and l >= first):
                x_t, text_kv = lm.block(l, x_t, rope_t)                                          # [B,T,D]
            x_f, _ = lm.block(l, x_f, rope_f, past=text_kv, mask=mask)                           # [B,F,D]
            if str(l + 1) in self.mm_blocks:
                x_t, x_f = self.mm_blocks[str(l + 1)](x_t, x_f, z, z_mask, lm.ffw(l))
        return lm.final_norm(x_t), lm.final_norm(x_f), z, z_mask

    def heads(self, x_t, x_f, z, z_mask, text_len):
        """ Eq. 12 and the three modality heads -> dict of [B], in float32: bf16 would round predictions to 1/128. """
        with torch.autocast(z.device.type, enabled=False):
            z_mean = masked_mean(z, z_mask)                                                      # [B,d]
            x_last = x_t[torch.arange(len(x_t), device=x_t.device), text_len - 1].float()        # [B,D]
            x_mean = x_f.float().mean(1)                                                         # [B,D]
            out = dict(pred=self.task_head(torch.cat([z_mean, x_last, x_mean], -1)))             # [B,1] each
            for k, x in (('av', z_mean), ('text', x_last), ('fusion', x_mean)):
                if self.weights[k]: out[k] = getattr(self, k + '_head')(x)   # a head without a loss says nothing
            return {k: y[:, 0] for k, y in out.items()}                                          # [B] each

    def predict(self, batch):
        """ pred: the task head; text, av, fusion: what each stream says by itself (text never sees audio or video,
        unless mm_query lets it). All [B]. No logits over the vocabulary are computed. """
        return self.heads(*self.streams(batch), batch['text_len'])

    def forward(self, batch):
        """ Eqs. 13-14. The LM loss reaches only the MM blocks' FFW, norm_2 and second gate: text is AV-free. """
        c = self.c
        x_t, x_f, z, z_mask = self.streams(batch)
        out = self.heads(x_t, x_f, z, z_mask, batch['text_len'])
        terms, loss = deepmlf_loss(out, batch['label'], self.weights)
        if c['weight_lm']:
            terms['lm'] = lm_loss(x_t, batch, self.lm.lm_head)
            loss = loss + c['weight_lm'] * terms['lm']
        return dict(loss=loss, terms=terms)

    def param_groups(self): return grouped(self)

    def gates(self):
        """ layer -> (GCA gate, FFW gate) as they multiply, for the log and the figures. """
        values = lambda block: [round(float(torch.as_tensor(g).detach()), 4) for g in block.gates()]
        return {n: values(block) for n, block in self.mm_blocks.items()}


# ---------------------------------------------------------------------------------------------------------
# From knobs to a model, from a model to a file and back

def new_lm(texts, c, folder):
    """
    A GPT-2 of lm_layers x lm_width from nothing, with a sentencepiece tokenizer trained on `texts`. `folder` becomes an
    ordinary Hugging Face folder (tokenizer.json for AutoTokenizer, tokenizer.model beside it; the weights come later).
    """
    import io
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    if c['lm_positions'] < c['max_text_len']:
        raise ModelError(f"lm_positions={c['lm_positions']} is less than max_text_len={c['max_text_len']}: raise it.")
    if c['lm_width'] % c['lm_heads']:
        raise ModelError(f"lm_heads={c['lm_heads']} does not divide lm_width={c['lm_width']}: take a divisor of it.")
    proto = io.BytesIO()
    try: sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=proto, vocab_size=c['lm_vocab'], model_type='unigram', num_threads=1,
        hard_vocab_limit=False, normalization_rule_name='identity', minloglevel=2, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    except RuntimeError as e:
        raise ModelError(f"no sentencepiece tokenizer of lm_vocab={c['lm_vocab']} can be trained on this text "
                         f"({str(e).splitlines()[-1][-120:]}): change lm_vocab.") from None
    sp = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    fast = Tokenizer(models.Unigram([(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.vocab_size())], unk_id=0))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.add_special_tokens([AddedToken(t, special=True) for t in ('<unk>', '<s>', '</s>')])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token='<unk>', bos_token='<s>', eos_token='</s>')
    os.makedirs(folder, exist_ok=True)
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, 'tokenizer.model'), 'wb') as f: f.write(proto.getvalue())
    return LanguageModel(GPT2LMHeadModel(GPT2Config(
        vocab_size=sp.vocab_size(), n_positions=c['lm_positions'], n_embd=c['lm_width'], n_layer=c['lm_layers'],
        n_head=c['lm_heads'], bos_token_id=1, eos_token_id=2,
        resid_pdrop=c['dropout'], embd_pdrop=c['dropout'], attn_pdrop=c['dropout']))), tokenizer


def build(c, corpus, out_dir, dtype=torch.float32):
    """
    The model that the knobs `c` describe and its tokenizer (None without text). The AV encoder starts from the run
    c['av_from'] unless av_init='random'. Raises ModelError.
    """
    encoder = lambda: AVEncoder(corpus.widths, c['av_width'], c['av_layers'], c['av_heads'], c['av_len'],
                                c['av_dropout'], c['av_seqaug'])
    try:
        if c['system'] == 'lm': return new_lm(corpus.text('train'), c, os.path.join(out_dir, 'hf'))
        if c['system'] == 'av': return AVModel(encoder()), None
        lm, tokenizer = load_lm(c['lm'], dtype, c['lm_init'] == 'random')
        model = DeepMLF(lm, encoder(), c)
    except ValueError as e: raise ModelError(str(e)) from None
    if c['av_init'] != 'random':
        tensors, _ = load_checkpoint(os.path.join(c['av_from'], 'best.safetensors'))
        theirs = {k.removeprefix('av_encoder.'): v for k, v in tensors.items() if k.startswith('av_encoder.')}
        put(model.av_encoder, theirs, c['av_from'])
        model.av_encoder.requires_grad_(c['av_init'] == 'tune')
    return model, tokenizer


def rehearse(c):
    """
    Build DeepMLF from the knobs without a weight in it (on the meta device), from the LM's configuration alone: so that
    an LM that cannot be had, or layers that it does not have, stop a run before hours of AV pretraining. ModelError.
    """
    from transformers import AutoModelForCausalLM
    config, _ = lm_config(c['lm'])
    with torch.device('meta'):
        try: DeepMLF(FrozenLM(AutoModelForCausalLM.from_config(config)), AVEncoder({'audio': 1}, c['av_width'], 1, c['av_heads']), c)
        except ValueError as e: raise ModelError(str(e)) from None


def own_tensors(model):
    """ What a checkpoint holds: every parameter and persistent buffer outside the frozen LM, tied ones once. """
    named = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k in model.state_dict()}
    return {k: v for k, v in named.items() if not k.startswith('lm.')}


@torch.no_grad()
def put(model, tensors, where):
    """ Copy a checkpoint's tensors in. Strict both ways: names and shapes must be the model's own. Raises ModelError. """
    own = own_tensors(model)
    odd = sorted(set(own) ^ set(tensors))
    if odd: raise ModelError(f"{where} does not fit this model: {odd[0]!r} is in only one of the two ({len(odd)} such "
                             "names); was it trained with other knobs?")
    for k, v in own.items():
        if v.shape != tensors[k].shape:
            raise ModelError(f"{where} does not fit this model: {k} is {list(tensors[k].shape)} in the file and "
                             f"{list(v.shape)} here; a corpus with other feature widths, another LM, or other knobs.")
        v.copy_(tensors[k])


def save_checkpoint(path, tensors, info):
    """
    One safetensors file at `path`, with `info` (JSON) in its header and, for people, in a .json beside it. Written under
    another name and renamed, so `path` is at any moment the old file or the new one. Raises ModelError on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    new = path + '.new'
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new, {'info': json.dumps(info)})
        with open(new, 'rb') as f: os.fsync(f.fileno())
        os.replace(new, path)
        write_text(path.removesuffix('.safetensors') + '.json', json.dumps(info, indent=1))
    except (OSError, SafetensorError) as e:
        if os.path.exists(new): os.remove(new)
        raise ModelError(f"could not save {path} ({e}): the checkpoint before it is untouched; make room and "
                         "--resume=True.") from None


def load_checkpoint(path):
    """ tensors, info of a file that save_checkpoint wrote. Raises ModelError where it is missing or damaged. """
    from safetensors import SafetensorError, safe_open
    if not os.path.exists(path):
        raise ModelError(f"there is no checkpoint {path}: has that run finished its first validation?")
    try:
        with safe_open(path, 'pt') as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()['info'])
    except (SafetensorError, TypeError, KeyError, ValueError) as e:
        raise ModelError(f"{path} is damaged or not a checkpoint of ours ({str(e)[:120]}): remove it, or take its other "
                         "copy (best and last are two files).") from None


def devices():
    """ The kinds of device that torch knows, best first, and whether this machine has one. """
    return dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)


def write_text(path, text):
    """ The whole file or the old one, never half of it. """
    with open(path + '.new', 'w', encoding='utf-8') as f: f.write(text)
    os.replace(path + '.new', path)
