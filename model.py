"""
The systems, each on a frozen LM (lm.py), and how they are built, saved and loaded.

A model here has three methods that train.py and eval.py use, and nothing else:
    model(batch)          -> dict(loss=.., terms=dict(name -> tensor))   reads batch['label']
    model.predict(batch)  -> dict(pred [B], prob [B,K] if it has them, ..)   reads no label
    model.param_groups()  -> list of dict(names, params, decay)          every trainable weight, once

Axis letters, the same in every file:
    B clips   T text tokens   S audio or video frames   F fusion tokens   m slots of the audiovisual sequence Z
    P pseudo tokens   K labels that may be answered   N nodes of their trie   n tokens of an answer
    D LM width   d adapter width   V vocabulary   h heads   L any sequence

Knobs (train.py has them all, with unit and meaning), by how they begin: lm_ the LM; av_ the audiovisual encoder; mm_ MM blocks; lora_
LoRA in them; text_reg the regularising of embeddings; mse_, msf_, tgm_ MSE-Adapter; cmpta_ CMPTA; gmra_ CrossSent's adapter; mpr_,
eioi_ its ordinal losses; weight_ a loss term's weight; n_ a count; lr_ a learning rate over lr, but for lr_min.

batch: tokens [B,T], text_len [B], text_mask [B,T]; audio [B,S,d_a], audio_len [B]; vision .. ; label [B]; index [B].
mm_layers count from 1, as the papers print them: 8 means "an MM block after the LM's eighth layer".
"""
import ctypes
import json
import os
import zlib
from contextlib import contextmanager

try: import fcntl
except ImportError: fcntl = None   # Windows

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adapters import CMPTA, GMRA, AVEncoder, MMBlock, MSEAdapter, frames_on_tokens, grouped, masked_mean, regularise, sentence
from baselines import BASELINES, build_baseline
from data import texts_for
from files import check_regular, open_regular, replacing, write_text
from lm import (FrozenLM, ModelError, empty_lm, lm_config, load_encoder, load_lm, load_tokenizer,
                new_encoder, new_lm, refuse_unknown_tokens, specials, width_of)
from losses import deepmlf_loss, l1, label_loss, lm_loss, mse, ordinal_loss
from prompts import Prompt


# ---------------------------------------------------------------------------------------------------------
# The systems

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
    def __init__(self, encoder, c):
        super().__init__()
        self.av_encoder, self.c = encoder, c
        self.head = nn.Linear(encoder.d, 1)

    def predict(self, batch):
        z, mask = self.av_encoder(batch)                                                         # [B,m,d], [B,m]
        with torch.autocast(z.device.type, enabled=False): y = self.head(masked_mean(z, mask))   # [B,1]
        return dict(pred=y[:, 0])                                                                # [B]

    def forward(self, batch):
        pred = self.predict(batch)['pred']
        task, (more, extra) = l1(pred, batch['label']), ordinal_loss(pred, batch['label'], self.c, batch.get('ramp', 1.0))
        return dict(loss=task + extra, terms={'task': task} | more)

    def param_groups(self): return grouped(self)


def last_real(x, n):
    """ The last of n [B] real tokens of x [B,T,..] -> [B,1,..]; or the only one, where streams() left no other. """
    return x[torch.arange(len(x), device=x.device), (n - 1).clamp(max=x.shape[1] - 1)][:, None]


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

    def streams(self, batch, whole=True):
        """ Both streams through the LM -> x_t [B,T,D], x_f [B,F,D] after the final norm; z [B,m,d] and its mask [B,m]. whole=False
        works out the last real token of the text alone where no token behind it needs the others: x_t [B,1,D]. """
        c, lm, (B, T) = self.c, self.lm, batch['tokens'].shape
        n_f, dev, text_len = c['n_fusion'], batch['tokens'].device, batch['text_len']
        z, z_mask = self.av_encoder(batch)                                                       # [B,m,d], [B,m]
        n = len(z) // B   # 1; or the same texts meet n audios and videos, one behind the other: then B of x_f is n B

        x_t = lm.embed(batch['tokens'])                                                          # [B,T,D]
        if self.training:
            x_t = regularise(x_t, text_len, c['text_reg'], c['text_reg_rate'], c['text_reg_prob'], c['text_reg_draw'])
        x_t, rope_t = lm.place(x_t, torch.arange(T, device=dev).expand(B, T))
        # right behind the last real token, or (as released) behind the padded length, whatever the text's own
        start = text_len if c['fusion_position'] == 'after' else text_len * 0 + c['max_text_len']    # [B]
        x_f = self.fusion_tokens.to(x_t.dtype).expand(n * B, n_f, -1)                            # [B,F,D]
        x_f, rope_f = lm.place(x_f, start.repeat(n)[:, None] + torch.arange(n_f, device=dev))
        causal = torch.ones(n_f, n_f, dtype=torch.bool, device=dev).tril()                       # [F,F]
        mask = torch.cat([batch['text_mask'][:, None].expand(B, n_f, T), causal.expand(B, n_f, n_f)], -1)
        mask = mask[:, None].repeat(n, 1, 1, 1)                                                  # [B,1,F,T+F]

        first, graph = min(map(int, self.mm_blocks)), torch.is_grad_enabled()
        for l in range(lm.n_layers):
            with torch.set_grad_enabled(graph and l >= first):
                if whole or l < lm.n_layers - 1: x_t, text_kv = lm.block(l, x_t, rope_t)         # [B,T,D]
                else:   # of the other tokens, keys and values are enough here
                    q, *text_kv = lm.qkv(l, x_t, rope_t)
                    q = last_real(q.transpose(1, 2), text_len).transpose(1, 2)                   # [B,h,1,D/h]
                    x_t = lm.finish(l, last_real(x_t, text_len), q, *text_kv, batch['text_mask'][:, None, None])     # [B,1,D]
            if n > 1: text_kv = [t.repeat(n, 1, 1, 1) for t in text_kv]                          # 2x [B,h_kv,T,D/h]
            x_f, _ = lm.block(l, x_f, rope_f, past=text_kv, mask=mask)                           # [B,F,D]
            if str(l + 1) in self.mm_blocks:
                x_t, x_f = self.mm_blocks[str(l + 1)](x_t, x_f, z, z_mask, lm.ffw(l))
        return lm.final_norm(x_t), lm.final_norm(x_f), z, z_mask

    def heads(self, x_t, x_f, z, z_mask, text_len):
        """ Eq. 12 and the three modality heads -> dict of [B], in float32: bf16 would round predictions to 1/128. """
        with torch.autocast(z.device.type, enabled=False):
            z_mean = masked_mean(z, z_mask)                                                      # [B,d]
            x_last = last_real(x_t, text_len)[:, 0].float()                                      # [B,D]
            x_last = x_last.repeat(len(x_f) // len(x_t), 1)                                      # [B,D]
            x_mean = x_f.float().mean(1)                                                         # [B,D]
            out = dict(pred=self.task_head(torch.cat([z_mean, x_last, x_mean], -1)))             # [B,1] each
            for k, x in (('av', z_mean), ('text', x_last), ('fusion', x_mean)):
                if self.weights[k]: out[k] = getattr(self, k + '_head')(x)   # a head without a loss says nothing
            return {k: y[:, 0] for k, y in out.items()}                                          # [B] each

    def predict(self, batch):
        """ pred: the task head; text, av, fusion: what each stream says by itself (text never sees audio or video,
        unless mm_query lets it). All [B]. No logits over the vocabulary are computed. """
        whole = 'text' in self.c['mm_query']   # figures show where each text token looks, in the last layer too
        return self.heads(*self.streams(batch, whole), batch['text_len'])

    def predict_each(self, batch, variants):
        """ predict for a batch with each of `variants`, dicts of other audio and video: the text goes through the LM once, as it
        never sees them (unless mm_query lets it). -> list of what predict gives. """
        batches = [batch | v for v in variants]
        if 'text' in self.c['mm_query']: return [self.predict(b) for b in batches]
        stacked = batch | {k: torch.cat([b[k] for b in batches]) for m in self.av_encoder.proj for k in (m, m + '_len', m + '_mask')}
        out = {k: v.chunk(len(variants)) for k, v in self.predict(stacked).items()}
        return [{k: v[i] for k, v in out.items()} for i in range(len(variants))]

    def forward(self, batch):
        """ Eqs. 13-14. The LM loss reaches only the MM blocks' FFW, norm_2 and second gate: text is AV-free. """
        c = self.c
        x_t, x_f, z, z_mask = self.streams(batch, whole=c['weight_lm'] > 0)
        out = self.heads(x_t, x_f, z, z_mask, batch['text_len'])
        terms, loss = deepmlf_loss(out, batch['label'], self.weights)
        more, extra = ordinal_loss(out['pred'], batch['label'], c, batch.get('ramp', 1.0))
        terms, loss = terms | more, loss + extra
        if c['weight_lm']:
            terms['lm'] = lm_loss(x_t, batch, self.lm.lm_head)
            loss = loss + c['weight_lm'] * terms['lm']
        return dict(loss=loss, terms=terms)

    def param_groups(self): return grouped(self)

    def gates(self):
        """ layer -> (GCA gate, FFW gate) as they multiply, for the log and the figures. """
        values = lambda block: [round(float(torch.as_tensor(g).detach()), 4) for g in block.gates()]
        return {n: values(block) for n, block in self.mm_blocks.items()}


class PseudoTokenLM(nn.Module):
    """
    MSE-Adapter and CMPTA: an adapter turns text, audio and video into P pseudo tokens, these stand before the text in a
    prompt, and the frozen LM says the label. The two systems differ in the adapter, and in nothing here.

    Behind the prompt stand a few tokens that are read out: its last one, and the label's (training), every node of the
    label trie (readout='score': one pass gives the probability of every label), or a learned query (readout='head').
    Prompts end at different places and are padded there, where nothing looks; logits are for what is read out alone.
    """
    def __init__(self, lm, adapter, prompt, c):
        """ lm FrozenLM; adapter(batch, text [B,T,D], text_mask [B,T]) -> [B,P,D]; prompt Prompt; c: the knobs as a dict. """
        super().__init__()
        self.lm, self.adapter, self.prompt, self.c = lm, adapter, prompt, c
        longest = prompt.longest() + c['n_pseudo'] + c['max_text_len']
        if longest > lm.max_positions:
            raise ModelError(f"prompt, pseudo tokens, max_text_len and label make {longest} tokens, past the "
                             f"{lm.max_positions} positions of this LM: lower max_text_len.")
        self._refuse_unknown_tokens()
        for k, v in prompt.trie().items(): self.register_buffer('trie_' + k, v, persistent=False)
        values = torch.tensor(prompt.values or range(len(prompt.labels)), dtype=torch.float32)
        self.register_buffer('values', values, persistent=False)                                 # [K]
        if c['readout'] == 'head':
            n_out = 1 if prompt.kind == 'regression' else len(prompt.labels)
            self.query_tokens = nn.Parameter(0.02 * torch.randn(1, lm.width))                    # [1,D]
            self.head = nn.Sequential(nn.Linear(lm.width, c['head_width']), nn.ReLU(), nn.Linear(c['head_width'], n_out))

    def _refuse_unknown_tokens(self):
        """ Raises ModelError where the LM has no embedding for a token of the prompt or of a label.
        """
        prompt, c, rows = self.prompt, self.c, len(self.lm.parts['embed'].weight)
        refuse_unknown_tokens([prompt.before, prompt.after], rows, f"the prompt {c['prompt']!r}")
        refuse_unknown_tokens(prompt.answers, rows, f"the labels of {c['label']!r}")
        if c['system'] == 'mse' and c['tgm_pool'] == 'padded':
            refuse_unknown_tokens([[prompt.pad_id]], rows, "the padding that tgm_pool='padded' "
                                                           "counts")

    def read(self, batch, adapter=True):
        """ The prompt, embedded: x [B,T,D], n [B] real tokens. adapter=False leaves the pseudo
        tokens out. Raises ModelError where the adapter gives another shape than one pseudo token of
        the LM's width for each of n_pseudo. """
        first, P = len(self.prompt.before), self.c['n_pseudo']
        x, n = self.lm.embed(batch['tokens']), batch['text_len']                                 # [B,T,D], [B]
        if not adapter: return torch.cat([x[:, :first], x[:, first + P:]], 1), n - P
        with torch.autocast(x.device.type, enabled=False): pseudo = self.adapter(batch, *self.own_text(x, n))    # [B,P,D]
        wanted = (len(x), P, x.shape[2])
        if tuple(pseudo.shape) != wanted:
            raise ModelError(f"the adapter gives pseudo tokens of shape {list(pseudo.shape)} and "
                             f"the prompt has room for {list(wanted)}, [clips, n_pseudo, width of "
                             "the LM]: mend the adapter, or set n_pseudo to what it gives.")
        return torch.cat([x[:, :first], pseudo.to(x.dtype), x[:, first + P:]], 1), n

    def own_text(self, x, n):
        """ The clip's own text in a prompt x [B,T,D] of n [B] tokens -> text [B,T,D] in float32, mask [B,T]. """
        first, size = len(self.prompt.before) + self.c['n_pseudo'], self.c['max_text_len']
        text = x[:, first:first + size].float()                                                  # [B,T,D]
        mask = torch.arange(text.shape[1], device=x.device) < (n - first - len(self.prompt.after))[:, None]      # [B,T]
        if self.c['system'] != 'mse' or self.c['tgm_pool'] == 'real': return text, mask
        # as released, padding counts in the mean: up to max_text_len of it
        pad = self.lm.embed(torch.full((1, 1), self.prompt.pad_id, device=x.device)).float()     # [1,1,D]
        text = torch.cat([text.where(mask[..., None], pad), pad.expand(len(x), size - text.shape[1], -1)], 1)
        return text, torch.ones_like(text[..., 0], dtype=torch.bool)

    def attention(self, batch):
        """ CMPTA: how much each frame or token counts in each pseudo token, 'text_from_vision' -> [B,S] .. (for figures; in
        eval mode). Raises ModelError for a system that does not attend. """
        if self.c['system'] != 'cmpta' or not self.c['cmpta_attend']:
            raise ModelError("only CMPTA with cmpta_attend=True has attention over audio and video to look at.")
        with torch.autocast(batch['tokens'].device.type, enabled=False):
            return self.adapter.attention(batch, *self.own_text(self.lm.embed(batch['tokens']), batch['text_len']))

    def tail(self, x, n, y, depth, sees):
        """ What the LM makes of tokens y [B,N,D] that stand `depth` [N] behind the last of n [B] real tokens of x [B,T,D];
        sees [N,N] says which of them see which. The first of y is that last token -> [B,N,D] after the final norm. """
        lm, (B, T, _), N, again = self.lm, x.shape, y.shape[1], self.c['checkpoint_lm'] and torch.is_grad_enabled()
        at = torch.arange(T - 1, device=x.device)
        before = F.pad(at <= at[:, None], (0, N)).expand(B, T - 1, T - 1 + N)                    # the prompt is causal
        behind = torch.cat([(at < n[:, None] - 1)[:, None].expand(B, N, T - 1), sees.expand(B, N, N)], -1)   # [B,N,T-1+N]
        mask = torch.cat([before, behind], 1)[:, None]                                           # [B,1,T-1+N,T-1+N]
        z, positions = torch.cat([x[:, :-1], y], 1), torch.cat([at.expand(B, T - 1), n[:, None] - 1 + depth], 1)
        z, rope = lm.place(z, positions)                                                         # [B,T-1+N,D]
        block = lambda l, z: lm.block(l, z, rope, mask=mask)[0]
        for l in range(lm.n_layers - 1):
            z = checkpoint(block, l, z, use_reentrant=False, preserve_rng_state=False) if again else block(l, z)
        q, k, v = lm.qkv(lm.n_layers - 1, z, rope)   # of the prompt, keys and values are enough here
        return lm.final_norm(lm.finish(lm.n_layers - 1, z[:, -N:], q[:, :, -N:], k, v, mask[:, :, -N:]))

    def label_scores(self, x, n):
        """ Log-probabilities of every label string, exact to the LM's dtype, by one pass over the nodes of their trie -> [B,K]. """
        y = self.lm.embed(self.trie_token).expand(len(x), -1, -1)                                # [B,N,D]
        h = self.tail(x, n, y, self.trie_depth, self.trie_sees)                                  # [B,N,D]
        at_once, scores = max(1, 2 ** 22 // (h.shape[1] * self.lm.vocabulary)), []               # logits of 16 MB, about
        for part in h.split(at_once):
            logits = self.lm.lm_head(part).float()                                               # [b,N,V]
            said = logits[:, self.trie_node, self.trie_answer] - logits.logsumexp(-1)[:, self.trie_node]     # [b,K,n]
            scores.append(torch.where(self.trie_real, said, 0.0).sum(-1))
        return torch.cat(scores)

    def head_out(self, x, n):
        """ The hidden state of a learned query behind the prompt, through the head -> [B,1] or [B,K]. """
        y = torch.cat([self.lm.embed(self.trie_token[:1]), self.query_tokens.to(x.dtype)]).expand(len(x), -1, -1)    # [B,2,D]
        depth = torch.arange(2, device=x.device)
        h = self.tail(x, n, y, depth, depth[:, None] >= depth)[:, 1]                             # [B,D]
        with torch.autocast(x.device.type, enabled=False): return self.head(h.float())

    def predict(self, batch, adapter=True):
        """
        pred [B], a score or a class number; prob [B,K] over the labels, with their probabilities made to sum to 1, for 'score'
        and for classes from a head; for 'generate' unread [B], 1 where the answer was no label: such a clip is scored as
        the middle of the range, or as no class at all. adapter=False asks the LM about the text alone.
        """
        c, (x, n) = self.c, self.read(batch, adapter)
        if c['readout'] == 'generate':
            token = self.trie_token[:1].expand(len(x))                                           # [B]
            answers = self.lm.go_on(x[:, :-1], n - 1, token, self.trie_answer.shape[1])          # [B,n]
            said = [float('nan') if -1 in ids else self.prompt.understand(ids) for ids in answers.tolist()]
            nothing = -1.0 if self.prompt.kind == 'classes' else float(self.values[[0, -1]].mean())
            pred = torch.tensor([nothing if s is None else float(s) for s in said])              # [B], on the CPU: it is text
            return dict(pred=pred, unread=torch.tensor([float(s is None) for s in said]))
        if c['readout'] == 'head' and self.prompt.kind == 'regression': return dict(pred=self.head_out(x, n)[:, 0])
        scores = self.head_out(x, n) if c['readout'] == 'head' else self.label_scores(x, n)      # [B,K]
        prob = scores.softmax(-1)                                                                # [B,K]
        if self.prompt.kind == 'classes' or c['score_estimate'] == 'mode': pred = self.values[prob.argmax(-1)]
        elif c['score_estimate'] == 'expected': pred = (prob * self.values).sum(-1)   # no matmul: autocast would round it
        else: pred = self.values[(prob.cpu().cumsum(-1) < 0.5).sum(-1).clamp(max=len(self.values) - 1)]    # 'median'; CUDA's sum is not the same twice
        return dict(pred=pred.where(scores.isfinite().all(-1), torch.nan), prob=prob)            # argmax would hide a NaN

    def forward(self, batch):
        """ Cross-entropy of the label's tokens; with readout='head' L1, or cross-entropy of the classes. """
        x, n = self.read(batch)
        k = self.prompt.index(batch['label'])                                                    # [B]
        if self.c['readout'] == 'head':
            out = self.head_out(x, n)
            regression = self.prompt.kind == 'regression'
            task = l1(out[:, 0], batch['label']) if regression else F.cross_entropy(out, k)
            more, extra = ordinal_loss(out[:, 0], batch['label'], self.c, batch.get('ramp', 1.0)) if regression else ({}, 0.0)
            return dict(loss=task + extra, terms={'task': task} | more)
        answer, real = self.trie_answer[k], self.trie_real[k]                                    # [B,n], [B,n]
        depth = torch.arange(answer.shape[1], device=x.device)
        y = torch.cat([self.trie_token[:1].expand(len(x), 1), answer[:, :-1]], 1)                # [B,n]
        h = self.tail(x, n, self.lm.embed(y), depth, depth[:, None] >= depth)                    # [B,n,D]
        loss = label_loss(h, answer, real, self.lm.lm_head, batch.get('lm_weight', 1.0))
        return dict(loss=loss, terms={'label': loss})

    def param_groups(self): return grouped(self)


class CrossSent(nn.Module):
    """
    CrossSent (Liu et al. 2026): an encoder, fine-tuned, into which a GMRA brings audio and video before layer gmra_layer; the
    first token through a dense tanh layer gives the score. Loss: MSE, and the ordinal regularisers.
    """
    def __init__(self, encoder, tokenizer, widths, c):
        super().__init__()
        self.encoder, self.c, D = encoder, c, encoder.width
        if not 0 <= c['gmra_layer'] <= encoder.n_layers:
            raise ModelError(f"gmra_layer={c['gmra_layer']} must be from 1 to {encoder.n_layers}, the layers of this encoder, "
                             "or 0 for none.")
        encoder.fits(c['max_text_len'])
        if c['gmra_concat'] == 'features' and c['resample'] == 'none':
            raise ModelError("gmra_concat='features' puts audio and video side by side, so both must be on the text's time "
                             "line: take another resample.")
        self.ends = [len(tokens) for tokens in specials(tokenizer)]
        self.gmra = GMRA(widths, D, c['gmra_width'] or D, c['gmra_heads'] or encoder.n_heads, c['gmra_mult'], c['gmra_concat'],
                         c['gmra_start'], c['dropout']) if c['gmra_layer'] and widths else None
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(c['dropout']), nn.Linear(D, 1))

    def predict(self, batch):
        """ pred [B]. Reads no label. """
        mask = batch['text_mask']
        cues = frames_on_tokens(batch, self.gmra.proj, self.ends, self.c['resample']) if self.gmra is not None else None
        x = self.encoder.embed(batch['tokens'])                                                  # [B,T,D]
        for l in range(self.encoder.n_layers):
            if self.gmra is not None and l + 1 == self.c['gmra_layer']: x = self.gmra(x, cues)
            x = self.encoder.layer(l, x, mask)
        with torch.autocast(x.device.type, enabled=False):
            return dict(pred=self.head(sentence(x.float(), mask, self.c['text_pool']))[:, 0])    # [B]

    def forward(self, batch):
        pred, label = self.predict(batch)['pred'], batch['label']
        terms, extra = ordinal_loss(pred, label, self.c, batch.get('ramp', 1.0))
        terms['task'] = mse(pred, label)
        return dict(loss=terms['task'] + extra, terms=terms)

    def param_groups(self):
        """ The encoder's own weights learn at lr_encoder times the rate of what is new. """
        return grouped(self, dict(encoder=self.c['lr_encoder']))


# ---------------------------------------------------------------------------------------------------------
# From knobs to a model, from a model to a file and back

def build(c, corpus, out_dir, dtype=torch.float32, as_data=False):
    """
    The model that the knobs `c` describe and its tokenizer (None without text). The AV encoder starts from the run
    c['av_from'] unless av_init='random'. as_data: somebody else's folder has named the LM, so it
    is read as data alone (lm_config), whatever c['trust_remote_code'] says. Raises ModelError.
    """
    remote = c['trust_remote_code'] and not as_data
    corpus.label('train', c['label'])   # a wrong name gets its sentence before gigabytes are loaded
    try:
        if c['system'] == 'lm':
            hf, tokenizer = new_lm(texts_for(corpus, 'train', c), c, os.path.join(out_dir, 'hf'))
            return LanguageModel(hf), tokenizer
        if c['system'] == 'av': return AVModel(build_av_encoder(c, corpus.widths), c), None
        if c['system'] == 'late' and 'text' not in c['late_streams']: return build_baseline(c, corpus, None, 0, None), None
        if c['system'] in BASELINES and c['text_features'] == 'frozen':   # the feed has the hidden states: here are no weights
            width = width_of(lm_config(c['lm'], remote, as_data)[0])
            tokenizer = load_tokenizer(c['lm'], remote, as_data)
            return build_baseline(c, corpus, None, width, tokenizer), tokenizer
        if c['system'] == 'crosssent' or c['system'] in BASELINES:
            encoder, tokenizer = load_encoder(c['lm'], remote, as_data) if c['lm'] != 'new' else \
                new_encoder(texts_for(corpus, 'train', c), c, os.path.join(out_dir, 'hf'),
                            again=c['resume'], as_data=as_data)
            if c['system'] in BASELINES: return build_baseline(c, corpus, encoder, encoder.width, tokenizer), tokenizer
            return CrossSent(encoder, tokenizer, {s: corpus.widths[s] for s in c['modalities'] if s in corpus.widths}, c), tokenizer
        if c['system'] in ('mse', 'cmpta'):   # and so do labels that cannot be told apart
            prompt = Prompt(c, corpus.labels[c['label']], load_tokenizer(c['lm'], remote, as_data))
        lm, tokenizer = load_lm(c['lm'], dtype, c['lm_init'] == 'random', remote, as_data)
        if c['system'] in ('mse', 'cmpta'):
            return PseudoTokenLM(lm, build_adapter(c, corpus.widths, lm), prompt, c), tokenizer
        model = DeepMLF(lm, build_av_encoder(c, corpus.widths), c)
    except ValueError as e: raise ModelError(str(e)) from None
    if c['av_init'] != 'random':
        tensors, _ = load_checkpoint(os.path.join(c['av_from'], 'best.safetensors'))
        theirs = {k.removeprefix('av_encoder.'): v for k, v in tensors.items() if k.startswith('av_encoder.')}
        put(model.av_encoder, theirs, c['av_from'])
        model.av_encoder.requires_grad_(c['av_init'] == 'tune')
    return model, tokenizer


def build_av_encoder(c, widths):
    """ The audiovisual encoder that the knobs describe; widths: stream -> width. """
    return AVEncoder(widths, c['av_width'], c['av_layers'], c['av_heads'], c['av_len'], c['av_dropout'], c['av_seqaug'])


def build_adapter(c, widths, lm):
    """ What makes the pseudo tokens, by the knobs: MSEAdapter or CMPTA. """
    embed = lm.parts['embed'].weight
    embed_rms = 1.0 if embed.is_meta else float(embed[:4096].float().pow(2).mean().sqrt())       # of 4096 tokens, at most
    if c['system'] == 'mse':
        return MSEAdapter(widths, lm.width, c['n_pseudo'], c['mse_width'], dict(audio=c['lstm_audio'], vision=c['lstm_vision']),
                          c['msf_scales'], c['pseudo_projection'], embed_rms, c['mse_tgm'], c['mse_msf'])
    return CMPTA(widths, lm.width, c['n_pseudo'], c['cmpta_width'], c['cmpta_heads'], c['cmpta_layers'], c['cmpta_align'],
                 c['cmpta_align_text'], c['cmpta_attend'], c['cmpta_pool'], c['dropout'], c['pseudo_projection'], embed_rms)


def rehearse(c, as_data=False):
    """
    Build DeepMLF from the knobs without a weight in it (on the meta device), from the LM's configuration alone: so that
    an LM that cannot be had, or layers that it does not have, stop a run before hours of AV pretraining. ModelError.
    """
    hf = empty_lm(c['lm'], c['trust_remote_code'], as_data)
    with torch.device('meta'):
        try: DeepMLF(FrozenLM(hf), AVEncoder({'audio': 1}, c['av_width'], 1, c['av_heads']), c)
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
    One safetensors file at `path`, with `info` (JSON) and a checksum of the tensors in its header and, for people, info in a
    .json beside it. Written under another name and renamed, so `path` is at any moment the old file or the new one. Raises
    ModelError on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        said = json.dumps(info)
        with replacing(path) as new:
            save_file(tensors, new, {'info': said, 'crc32': checksum(tensors, said)})
            with open(new, 'rb') as f:
                os.fsync(f.fileno())
        write_text(path.removesuffix('.safetensors') + '.json', json.dumps(info, indent=1))
    except (OSError, SafetensorError) as e:
        raise ModelError(f"could not save {path} ({e}): the checkpoint before it is untouched; make room and "
                         "--resume=True.") from None


def checksum(tensors, said):
    """ 8 hex digits of the text `said` and of all tensors' names and bytes: safetensors itself would read a flipped bit as another
    weight. CRC-32, as a hash would take seconds for a large `last`. """
    crc = zlib.crc32(said.encode())
    for k in sorted(tensors): crc = zlib.crc32(tensors[k].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(k.encode(), crc))
    return f'{crc:08x}'


def load_checkpoint(path):
    """ tensors, info of a file that save_checkpoint wrote. Raises ModelError where it is missing or damaged. """
    with _opened_checkpoint(path) as f:
        tensors, info = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
        if info.get('crc32') not in (None, checksum(tensors, info['info'])):   # None: older than the checksum
            raise ValueError("its checksum does not fit")
        return tensors, json.loads(info['info'])


def load_info(path):
    """ The info of a checkpoint alone, from the file's header. Raises ModelError as load_checkpoint does. """
    with _opened_checkpoint(path) as f:
        return json.loads(f.metadata()['info'])


@contextmanager
def _opened_checkpoint(path):
    """ The open safetensors file. What goes wrong while it is read becomes a ModelError that names the file. """
    from safetensors import SafetensorError, safe_open
    if not os.path.lexists(path):
        raise ModelError(f"there is no checkpoint {path}: has that run finished its first validation?")
    try:
        check_regular(path)
        with safe_open(path, 'pt') as f:
            yield f
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
        reason = getattr(e, 'strerror', None) or str(e)
        raise ModelError(f"{path} is damaged or not a checkpoint of ours ({reason[:120]}): remove it, or take its other "
                         "copy (best and last are two files).") from None


def devices():
    """ The kinds of device that torch knows, best first, and whether this machine has one. """
    return dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)


def memory(device):
    """ Bytes that this machine or its GPU has: what it has, not what is free now, or a run's numbers would hang on that. """
    if device == 'cuda': return torch.cuda.mem_get_info()[1]
    try: return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (ValueError, OSError, AttributeError): return float('inf')   # Windows does not say


def hold_memory(hold=True):
    """
    Keep what tensors leave behind in this process for those that come next. glibc would return it to Linux and be given it again
    page by page: up to a third of a training step on the CPU. hold=False gives all back, and is as glibc does once large tensors
    have come and gone. Where the C library is another (macOS, Windows, musl), nothing happens.
    """
    try: mallopt, malloc_trim = ctypes.CDLL(None).mallopt, ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError): return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, mb = -1, -3, -4, 2 ** 20   # malloc.h
    mallopt(M_TRIM_THRESHOLD, -1 if hold else 64 * mb)
    mallopt(M_MMAP_THRESHOLD, 32 * mb)
    mallopt(M_MMAP_MAX, 0 if hold else 2 ** 16)
    if not hold: malloc_trim(0)


def lock(folder):
    """ The lock of a folder, an open file that goes with this process however that ends; None if another process has it. Where
    there is no such lock (Windows), everybody gets it. Raises OSError where the lock file is a link or no regular file. """
    file = open_regular(os.path.join(folder, '.lock'), 'r+')
    if not fcntl:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    return file
