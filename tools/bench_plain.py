"""
The plain implementations that tools/bench.py compares with, one for each class of systems. They are
ours, not the peers' released code.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import NewGELUActivation

from adapters import augment_embeddings
from lm import FrozenLM
from losses import deepmlf_loss
from model import SYSTEMS, AVModel, CrossSent, DeepMLF, LanguageModel, PseudoTokenLM
from system import System
from tools.random_clips import Words, random_lm


class Plain:
    """ The default plain implementation: the same model on padded batches. """

    @staticmethod
    def pad(k, model, batch):
        """ The entries of a batch that change if all texts are padded to max_text_len. """
        if 'tokens' not in batch:
            return {}
        tokens, mask = batch['tokens'], batch['text_mask']  # [B,T] each
        B, T = len(tokens), max(k['max_text_len'], tokens.shape[1])
        more = T - tokens.shape[1]
        mask = F.pad(mask, (0, more), value=False)  # [B,T]
        rows = torch.arange(B * T)  # [BT], padding included
        targets = rows.view(B, T)[:, :-1][mask[:, 1:]]  # [n]
        padded = dict(tokens=F.pad(tokens, (0, more)), text_mask=mask, text_rows=rows,
                      targets=targets)
        if 'text' in batch:
            padded['text'] = F.pad(batch['text'], (0, 0, 0, more))  # [B,T,D]
        return padded

    @staticmethod
    def loss(model, batch):
        """ The loss of a batch. """
        out = model(batch)
        model.after_step(batch, out)
        return out['loss']

    @staticmethod
    def predict(model, batch):
        """ Predictions of a batch. """
        model.predict(batch)

    @staticmethod
    def use_plain_parts(model, plain):
        """ Replaces parts of the model by plain ones (plain=True), or restores ours. """

    @staticmethod
    def needed_flops(feed, clips):
        """ FLOPs that a training step on these train clips needs; None if they are not counted for
        this system. """
        return None

    @staticmethod
    def spent_flops(feed, batches):
        """ FLOPs that our implementation spends on these clips; None: those counted in the run. """
        return None

    @staticmethod
    def adapter(system, k, widths, D):
        """ The adapter that makes pseudo tokens for a frozen LM of width D, or None. """
        return None

    @staticmethod
    def tokens(k, model, B):
        """ Random texts of B clips, of the largest length -> [B,T]. """
        return torch.randint(10, k['lm_shape'][-1], (B, k['max_text_len']))

    @staticmethod
    def ablation(k):
        """ For vs='without': a dict of the knobs that remove a part ('without') or keep it
        ('with'), and of the paper's values for each row of the table ('paper'). None: no such
        benchmark. """
        return None


class PretrainingStage(Plain):
    """ A prerequisite of DeepMLF, which bench.py refuses. """


class PlainDeepMLF(Plain):
    """ As DeepMLF's release: one stream, all positions in all layers, Hugging Face's GELU. """
    @staticmethod
    def loss(model, batch):
        """ DeepMLF's loss, with logits of all text positions. """
        k, lm, (B, T) = model.k, model.lm, batch['tokens'].shape
        n_f = k['n_fusion']
        z, z_mask = model.av_encoder(batch)  # [B,m,d], [B,m]
        x = lm.embed(batch['tokens'])  # [B,T,D]
        if model.training:
            x = augment_embeddings(x, batch['text_len'], k['text_reg'], k['text_reg_rate'],
                                   k['text_reg_prob'], k['text_reg_draw'])
        x = torch.cat([x, model.fusion_tokens.to(x.dtype).expand(B, -1, -1)], 1)  # [B,T+F,D]
        x, rope = lm.place(x, torch.arange(T + n_f).expand(B, -1))
        seen = F.pad(batch['text_mask'], (0, n_f), value=True)[:, None, None]  # [B,1,1,T+F]
        mask = seen & torch.ones(T + n_f, T + n_f, dtype=torch.bool).tril()  # [B,1,T+F,T+F]
        for l in range(lm.n_layers):
            x, _ = lm.block(l, x, rope, mask=mask)
            if str(l + 1) in model.mm_blocks:
                mm_block = model.mm_blocks[str(l + 1)]
                x = torch.cat(mm_block(x[:, :T], x[:, T:], z, z_mask, lm.ffw(l)), 1)  # [B,T+F,D]
        x = lm.final_norm(x)
        out = model.heads(x[:, :T], x[:, T:], z, z_mask, batch)
        labels = batch['tokens'][:, 1:].masked_fill(~batch['text_mask'][:, 1:], -100)  # [B,T-1]
        logits = lm.lm_head(x)[:, :T - 1].float()  # [B,T-1,V]
        lm_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return deepmlf_loss(out, batch['label'], model.weights)[1] + k['weight_lm'] * lm_loss

    @staticmethod
    def predict(model, batch):
        PlainDeepMLF.loss(model, batch)

    @staticmethod
    def use_plain_parts(model, plain):
        """ Hugging Face's GELU makes eight passes over memory, ours computes the same in one. The
        plain FFW keeps its activations; ours recomputes them in the backward pass. """
        def gelu():
            return NewGELUActivation() if plain else torch.nn.GELU('tanh')

        for l in range(model.lm.n_layers):
            model.lm.part(l, 'ffw').act = gelu()
        for block in model.mm_blocks.values():
            if model.k['mm_ffw'] == 'full':
                block.ffw.act = gelu()
                vars(block.ffw).pop('forward', None)
                if plain:
                    block.ffw.forward = forward_keeping_activations(block.ffw)

    @staticmethod
    def needed_flops(feed, clips):
        """ None without an LM loss. The AV encoder and attention are left out; torch does not count
        attention on the CPU either. """
        k = feed.k
        if k['mm_ffw'] != 'full' or not k['weight_lm']:
            return None
        layers, D, _, V = k['lm_shape']
        n_f, first = k['n_fusion'], min(k['mm_layers'])
        n = np.array([len(feed.tokens['train'][i]) for i in clips])  # [N]
        frames = [feed.corpus.lengths('train', m)[clips] for m in ('audio', 'vision')]
        m = np.minimum(k['av_len'], np.maximum(*frames))  # [N]
        text, fusion = n * 24 * D * D, n_f * 24 * D * D  # forward of one layer
        # text needs no gradient below the first MM block
        total = (2 * layers - first) * text + 2 * layers * fusion
        for l in k['mm_layers']:
            # FFW: gradients of its weights and, above the first MM block, of its input
            total = total + (2 if l == first else 3) * n * 16 * D * D + 3 * n_f * 16 * D * D
            # gated cross-attention
            total = total + 3 * (4 * n_f * D * D + 4 * m * k['av_width'] * D)
        total = total + 2 * (n - 1) * 2 * D * V
        return float(total.sum())


def forward_keeping_activations(ffw):
    """ The forward of an FFW that keeps its activations for the backward pass. """
    def forward(x, lm_ffw):
        hidden = [linear(x) for linear in (ffw.gate, ffw.up) if linear is not None]
        return ffw.dropout(ffw.second_half(*hidden))  # [B,L,D]

    return forward


class PlainPseudoTokens(Plain):
    """ As MSE-Adapter's release: text padded on the left, Hugging Face's forward and generate. """
    @staticmethod
    def pad(k, model, batch):
        """ text [B,T]: the tokens of the text, without the prompt. """
        prompt = model.prompt
        first, n_after = len(prompt.before) + k['n_pseudo'], len(prompt.after)
        text = []
        for tokens, n in zip(batch['tokens'], batch['text_len']):
            own_text = tokens[first:n - n_after]
            text.append(F.pad(own_text, (k['max_text_len'] - len(own_text), 0)))  # [T]
        return dict(text=torch.stack(text))

    @staticmethod
    def prompt(model, batch):
        """ Embeddings of prompt, pseudo tokens and padded text, [B,L,D]. """
        embed, B = model.lm.hf.get_input_embeddings(), len(batch['text'])
        text = embed(batch['text'])  # [B,T,D]
        no_mask = torch.ones(text.shape[:2], dtype=torch.bool)  # [B,T]
        pseudo = model.adapter(batch, text.float(), no_mask).to(text.dtype)  # [B,P,D]
        before, after = (embed(torch.tensor(ids, dtype=torch.long)).expand(B, -1, -1)
                         for ids in (model.prompt.before, model.prompt.after))  # [B,n,D] each
        return torch.cat([before, pseudo, text, after], 1)  # [B,L,D]

    @staticmethod
    def loss(model, batch):
        x = PlainPseudoTokens.prompt(model, batch)  # [B,L,D]
        ids = model.trie_answer[model.prompt.index(batch['label'])]  # [B,n]
        labels = torch.cat([torch.full(x.shape[:2], -100), ids], 1)  # [B,L+n]
        x = torch.cat([x, model.lm.hf.get_input_embeddings()(ids)], 1)  # [B,L+n,D]
        return model.lm.hf(inputs_embeds=x, labels=labels).loss

    @staticmethod
    def predict(model, batch):
        x = PlainPseudoTokens.prompt(model, batch)  # [B,L,D]
        model.lm.hf.generate(
            inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), do_sample=False,
            max_new_tokens=model.trie_answer.shape[1], pad_token_id=0, eos_token_id=None)

    @staticmethod
    def use_plain_parts(model, plain):
        """ The plain CMPTA keeps what checkpoint_adapter=True computes again. """
        for part in model.adapter.modules():
            if hasattr(part, 'recompute'):
                part.recompute = model.k['checkpoint_adapter'] and not plain

    @staticmethod
    def needed_flops(feed, clips):
        """ For readout='score'. The adapter is left out: MSE-Adapter's would add 2 %; CMPTA's
        BiLSTM of width 1024 over 925 frames costs more than a small LM. Tokens before the first
        pseudo token need no gradient but are counted like the others, which is a few % too much.
        """
        if feed.k['readout'] != 'score':
            return None
        # Frozen weights need no gradient, so a linear layer takes two passes, and attention three.
        # In the last layer the prompt needs keys and values only, and logits are for answer tokens.
        layers, D, _, V = feed.k['lm_shape']
        ffw, n_out = int(D * 2.6875), max(map(len, feed.prompt.answers))
        n = np.array([len(feed.tokens['train'][i]) for i in clips])  # [N]
        n = n + n_out - 1
        linear = (layers - 1) * n * (8 * D * D + 6 * D * ffw) + n * 4 * D * D
        linear = linear + n_out * (4 * D * D + 6 * D * ffw + 2 * D * V)
        # q k^T and p v; causal, so half of 4 n^2 D
        attention = (layers - 1) * 2 * n * n * D + 4 * n_out * n * D
        return float((2 * linear + 3 * attention).sum())

    @staticmethod
    def spent_flops(feed, batches):
        """ Counted by torch on the meta device, without computing. """
        k, shape = feed.k, feed.k['lm_shape']
        with torch.device('meta'):
            lm = FrozenLM(random_lm('llama', *shape))
            big = SYSTEMS[k['system']].assemble(k, feed.corpus, lm, Words(shape[-1]))
            pseudo = torch.zeros(k['n_pseudo'], lm.width, requires_grad=True)  # [P,D]
            angles = torch.zeros(1, 1, lm.head_width)
        first = len(feed.prompt.before)

        def rope(x, positions):
            # Hugging Face's needs autocast on meta, which torch 2.6 does not have
            return angles, angles

        def embed_prompt(batch):
            # in place of the adapter: constant pseudo tokens that require a gradient
            x = lm.embed(batch['tokens'])  # [B,L,D]
            before, after = x[:, :first], x[:, first + k['n_pseudo']:]
            x = torch.cat([before, pseudo.expand(len(x), -1, -1), after], 1)  # [B,L,D]
            return x, batch['text_len']

        lm.parts['rope'] = rope
        big.embed_prompt = embed_prompt
        with FlopCounterMode(display=False) as counter:
            for index in batches:
                batch = {name: v.to('meta') for name, v in feed('train', index).items()}
                big(batch)['loss'].backward()
        return counter.get_total_flops()

    @staticmethod
    def adapter(system, k, widths, D):
        return system.make_adapter(k, widths, D, 1.0)

    @staticmethod
    def tokens(k, model, B):
        text = Plain.tokens(k, model, B)  # [B,T]
        before, after = (torch.tensor(ids).expand(B, -1)
                         for ids in (model.prompt.before, model.prompt.after))
        pseudo = torch.zeros(B, k['n_pseudo'], dtype=torch.long)  # [B,P]
        return torch.cat([before, pseudo, text, after], 1)  # [B,before+P+T+after]

    @staticmethod
    def ablation(k):
        return {
            'without': dict(score_over='labels'),
            'with': dict(score_over='vocabulary'),
            'paper': ('none',) * 4,
        }


class PlainCrossSent(Plain):
    """ As Plain, and the cost of GMRA (the paper's Table 4). """
    @staticmethod
    def ablation(k):
        return {
            'without': dict(gmra_layer=0),
            'with': dict(gmra_layer=k['gmra_layer'] or 1),
            'paper': ('+7.10 %', '+11.42 %', '-6.46 %', '+1.33 %'),
        }


PLAIN = {
    DeepMLF: PlainDeepMLF,
    PseudoTokenLM: PlainPseudoTokens,
    CrossSent: PlainCrossSent,
    LanguageModel: PretrainingStage,
    AVModel: PretrainingStage,
    System: Plain,
}


def plain_way(cls):
    """ The plain implementation of a class of systems: the entry of its nearest base class. """
    return next(PLAIN[c] for c in cls.__mro__ if c in PLAIN)
