"""
Benchmarks a system against a plain implementation of the same computation: speed and peak memory of
training and evaluation, share of this machine's matmul peak, and FLOPs spent over FLOPs needed.

    python tools/bench.py
        MSE-Adapter at CH-SIMS v2's shapes, with a random Llama of 8 layers and width 512
    python tools/bench.py config/deepmlf_sims.py --shapes=sims
        another config; any knob of its run or of this file is a flag
    python tools/bench.py config/baseline_mult.py --dataset=sims --shapes=sims
    python tools/bench.py config/crosssent_mosei.py --shapes=mosei --vs=without
        the cost of GMRA (the paper's Table 4); for pseudo tokens, the cost of exact label scores
    python tools/bench.py --vs=start
        time from process start to the first step, by size of the corpus, and speed of conversion
    python tools/bench.py --vs=paper
        an estimate of MSE-Adapter's memory, traffic and time with LMs that are not available here

Clips and text model are random. Feature widths and longest lengths are those of the corpus. Lengths
are assumed: words lognormal with mean 15, frames uniform from a quarter of the longest to all.

The plain implementation pads texts to max_text_len and frames to the longest, tokenises texts again
in each batch, uses unfused AdamW, and returns freed memory to Linux (hold_memory in
run/machine.py). For pseudo tokens it also follows MSE-Adapter's release: Hugging Face's forward
with float32 logits of the whole sequence, and generate() for validation. For DeepMLF it follows
the release of DeepMLF: text and fusion tokens in one stream with gradients through all layers,
logits of all positions, also in evaluation, and Hugging Face's GELU.

Both run alternately in one process on the CPU, in float32 or bfloat16 (--dtype). Memory is measured
in a separate process, above that of the loaded model (Linux only). Only the ratio of the two
implementations is comparable across machines.
"""
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import NewGELUActivation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from adapters import augment_embeddings
from configurator import AtLeast, Share, declared_knobs, run_knobs
from data import Feed, epoch_order
from lm import FrozenLM, TextEncoder
from losses import deepmlf_loss
from metrics import markdown_table
from model import SYSTEMS, AVModel, CrossSent, DeepMLF, LanguageModel, PseudoTokenLM
from run.machine import devices, hold_memory
from system import System
from tools.random_clips import SHAPES, Words, random_corpus, random_lm

shapes: Literal['simsv2', 'mosi', 'mosei', 'sims'] = 'simsv2'   # lengths and widths of the clips
vs: Literal['plain', 'without', 'start', 'paper'] = 'plain'   # which benchmark to run
gpu = [989.0, 450.0, 50.0]     # 'paper': bfloat16 TFLOP/s, GB/s in a node and between nodes (H100)
gpu_share: Share(with_one=True) = 0.45   # 'paper': share of these TFLOP/s that is reached
lm_shape = []                  # layers, width, heads, vocabulary of the text model; []: see SIZES
large_shape = [32, 4096, 32, 32000]  # the same of a large LM, of which only FLOPs are counted
bench_clips: AtLeast(1) = 1000     # clips of the random corpus
bench_batches: AtLeast(1) = 6      # timed batches, spread over all lengths
warmup_rounds = 20             # 'without': untimed forward passes
timed_rounds: AtLeast(1) = 50      # 'without': timed forward passes
start_clips = [1000, 16000]    # 'start': train clips of the corpora; 16000 is about MOSEI's number
repeats: AtLeast(1) = 5            # timed rounds, after an untimed one
only = ''                      # set in child processes only: the way to run, such as 'ours train'
# --------------------------------------------------------------------------------------------------
_root = str(Path(__file__).resolve().parent.parent)
_argv = [arg if arg.startswith('-') or os.path.exists(arg) else os.path.join(_root, arg)
         for arg in sys.argv[1:]]
if all(arg.startswith('-') for arg in _argv):
    _argv.insert(0, os.path.join(_root, 'config', 'mse_simsv2.py'))
if '-h' in _argv or '--help' in _argv:
    print(__doc__)
    sys.exit(0)
# the common knobs of train.py and those above
_train, _own = (declared_knobs(path) for path in (os.path.join(_root, 'train.py'), __file__))
_known, k = run_knobs(_argv, _train[0] | _own[0], _train[1] | _own[1], SYSTEMS)
for _name, _value in k.items():
    if _value != _known[_name] and not k['only']:
        print(f"    {_name} = {_value!r}   (default {_known[_name]!r})")
k |= dict(train_fraction=1.0, shuffle_streams=False, standardise=True)
cls = SYSTEMS[k['system']]

SIZES = dict(  # layers, width, heads, vocabulary of the random text model, by family
    llama=[8, 512, 8, 32000],
    gpt2=[12, 768, 12, 50257],       # GPT-2-base
    roberta=[12, 768, 12, 50265])    # RoBERTa-base


# --------------------------------------------------------------------------------------------------
# The plain implementation of each class of systems

class Plain:
    """ The default plain implementation: the same model on padded batches. """
    pretraining_stage = False  # pretraining stages are not benchmarked

    @staticmethod
    def family(system):
        """ The family of the system's text model, a key of SIZES. """
        return 'llama' if system.frozen_lm else 'roberta'

    @staticmethod
    def pad(model, batch):
        """ The entries of a batch that change if all texts are padded to max_text_len. """
        if 'tokens' not in batch:
            return {}
        tokens, mask = batch['tokens'], batch['text_mask']  # [B,T] each
        B, T = len(tokens), max(k['max_text_len'], tokens.shape[1])
        more = T - tokens.shape[1]
        mask = F.pad(mask, (0, more), value=False)  # [B,T]
        places = torch.arange(B * T).view(B, T)[:, :-1]  # [B,T-1]
        targets = places[mask[:, 1:]]  # [n]
        padded = dict(tokens=F.pad(tokens, (0, more)), text_mask=mask, targets=targets)
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
    def needed_flops(feed, clips, shape):
        """ FLOPs that a training step on these train clips needs with a text model of this shape;
        None if they are not counted for this system. """
        return None

    @staticmethod
    def spent_flops(feed, batches, shape):
        """ FLOPs that our implementation spends on these clips; None: those counted in the run. """
        return None

    @staticmethod
    def adapter(system, widths, D):
        """ The adapter that makes pseudo tokens for a frozen LM of width D, or None. """
        return None

    @staticmethod
    def tokens(model, B):
        """ Random texts of B clips, of the largest length -> [B,T]. """
        return torch.randint(10, shape[-1], (B, k['max_text_len']))

    @staticmethod
    def ablation():
        """ For vs='without': a dict of the knobs that remove a part ('without') or keep it
        ('with'), and of the paper's values for each row of the table ('paper'). None: no such
        benchmark. """
        return None


class PretrainingStage(Plain):
    pretraining_stage = True


class PlainDeepMLF(Plain):
    """ As DeepMLF's release: one stream, all positions in all layers, Hugging Face's GELU. """
    @staticmethod
    def family(system):
        return 'gpt2'

    @staticmethod
    def loss(model, batch):
        """ DeepMLF's loss, with logits of all text positions. """
        lm, (B, T), n_f = model.lm, batch['tokens'].shape, k['n_fusion']
        z, z_mask = model.av_encoder(batch)  # [B,m,d], [B,m]
        x = lm.embed(batch['tokens'])  # [B,T,D]
        if model.training:
            x = augment_embeddings(x, batch['text_len'], k['text_reg'], k['text_reg_rate'],
                                   k['text_reg_prob'], k['text_reg_draw'])
        x = torch.cat([x, model.fusion_tokens.expand(B, -1, -1)], 1)  # [B,T+F,D]
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
            if k['mm_ffw'] == 'full':
                block.ffw.act = gelu()
                vars(block.ffw).pop('forward', None)
                if plain:
                    block.ffw.forward = forward_keeping_activations(block.ffw)

    @staticmethod
    def needed_flops(feed, clips, shape):
        """ None without an LM loss. The AV encoder and attention are left out; torch does not count
        attention on the CPU either. """
        if k['mm_ffw'] != 'full' or not k['weight_lm']:
            return None
        (layers, D, _, V), n_f, first = shape, k['n_fusion'], min(k['mm_layers'])
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
    def pad(model, batch):
        """ text [B,T]: the tokens of the text, without the prompt. """
        first, n_after = len(model.prompt.before) + k['n_pseudo'], len(model.prompt.after)
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
        pseudo = model.adapter(batch, text, no_mask)  # [B,P,D]
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
    def needed_flops(feed, clips, shape):
        """ For readout='score'. The adapter is left out: MSE-Adapter's would add 2 %; CMPTA's
        BiLSTM of width 1024 over 925 frames costs more than a small LM. Tokens before the first
        pseudo token need no gradient but are counted like the others, which is a few % too much.
        """
        if k['readout'] != 'score':
            return None
        # Frozen weights need no gradient, so a linear layer takes two passes, and attention three.
        # In the last layer the prompt needs keys and values only, and logits are for answer tokens.
        layers, D, _, V = shape
        ffw, n_out = int(D * 2.6875), max(map(len, feed.prompt.answers))
        n = np.array([len(feed.tokens['train'][i]) for i in clips])  # [N]
        n = n + n_out - 1
        linear = (layers - 1) * n * (8 * D * D + 6 * D * ffw) + n * 4 * D * D
        linear = linear + n_out * (4 * D * D + 6 * D * ffw + 2 * D * V)
        # q k^T and p v; causal, so half of 4 n^2 D
        attention = (layers - 1) * 2 * n * n * D + 4 * n_out * n * D
        return float((2 * linear + 3 * attention).sum())

    @staticmethod
    def spent_flops(feed, batches, shape):
        """ Counted by torch on the meta device, without computing. """
        with torch.device('meta'):
            lm = FrozenLM(random_lm('llama', *shape))
            big = cls.assemble(k, feed.corpus, lm, Words(shape[-1]))
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
    def adapter(system, widths, D):
        return system.make_adapter(k, widths, D, 1.0)

    @staticmethod
    def tokens(model, B):
        text = Plain.tokens(model, B)  # [B,T]
        before, after = (torch.tensor(ids).expand(B, -1)
                         for ids in (model.prompt.before, model.prompt.after))
        pseudo = torch.zeros(B, k['n_pseudo'], dtype=torch.long)  # [B,P]
        return torch.cat([before, pseudo, text, after], 1)  # [B,before+P+T+after]

    @staticmethod
    def ablation():
        return {
            'without': dict(score_over='labels'),
            'with': dict(score_over='vocabulary'),
            'paper': ('none',) * 4,
        }


class PlainCrossSent(Plain):
    """ As Plain, and the cost of GMRA (the paper's Table 4). """
    @staticmethod
    def ablation():
        return {
            'without': dict(gmra_layer=0),
            'with': dict(gmra_layer=k['gmra_layer'] or 1),
            'paper': ('+7.10 %', '+11.42 %', '-6.46 %', '+1.33 %'),
        }


PLAIN = {  # a system takes the entry of its nearest base class
    DeepMLF: PlainDeepMLF,
    PseudoTokenLM: PlainPseudoTokens,
    CrossSent: PlainCrossSent,
    LanguageModel: PretrainingStage,
    AVModel: PretrainingStage,
    System: Plain,
}
plain_way = next(PLAIN[c] for c in cls.__mro__ if c in PLAIN)
shape = k['lm_shape'] or SIZES[plain_way.family(cls)]

errors = []
if plain_way.pretraining_stage and k['vs'] != 'start':
    errors += [f"system={k['system']!r} is a pretraining stage, which is not benchmarked: choose "
              "another config"]
if cls.needs_words(k):
    errors += ["resample='words' needs frames of words, which random clips lack: take another one"]
if k['label'] != 'label':
    errors += ["random clips have scores but no classes: choose a config for regression"]
if k['dtype'] not in ('auto', 'float32', 'bfloat16'):
    errors += ["dtype must be 'float32' or 'bfloat16' here"]
if len(k['gpu']) != 3 or min(k['gpu']) <= 0 or not k['gpu_share']:
    errors += ["gpu must be three numbers above 0, and gpu_share above 0"]
if len(shape) != 4 or len(k['large_shape']) != 4:
    errors += ["lm_shape and large_shape must be four numbers: layers, width, heads, vocabulary"]
if errors:
    sys.exit(f"bench: {'; '.join(errors)}.")


def autocast():
    """ The autocast context of the knob dtype. """
    return torch.autocast('cpu', torch.bfloat16) if k['dtype'] == 'bfloat16' else nullcontext()


# --------------------------------------------------------------------------------------------------
# Random frozen features and text models

class RandomFeed(Feed):
    """ A Feed whose frozen hidden states of the texts are random. """
    def _read_frozen_features(self, as_data):
        rng = np.random.default_rng(1)
        for split, texts in self.tokens.items():
            self.text[split] = []   # [T_n,D] each
            for tokens in texts:
                hidden = rng.standard_normal((len(tokens), shape[1]), np.float32)
                self.text[split].append(hidden.astype('f2'))


def text_model():
    """ The system's random text model: a frozen LM, or an encoder. """
    family = plain_way.family(cls)
    hf = random_lm(family, *shape)
    return TextEncoder(hf) if family == 'roberta' else FrozenLM(hf)


def build(corpus, knobs):
    """ The system with a random text model, and its tokenizer (None without text). """
    if 'text' not in cls.modalities_read(knobs):
        return cls.assemble(knobs, corpus, None, None), None
    tokenizer = Words(shape[-1])
    if cls.frozen_features(knobs):
        return cls.assemble(knobs, corpus, None, tokenizer, width=shape[1]), tokenizer
    return cls.assemble(knobs, corpus, text_model(), tokenizer), tokenizer


# --------------------------------------------------------------------------------------------------
# Measurements

def resident(what, reset=False):
    """ MB of memory of this process: what='VmRSS' is the current value, 'VmHWM' the largest one
    since the last reset. Linux only. """
    if reset:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(what))


def child_megabytes(only):
    """ The peak memory in MB of a separate process that runs `only`; nan without /proc. """
    if not os.path.exists('/proc/self/clear_refs'):
        return float('nan')
    argv = [sys.executable, __file__, *sys.argv[1:], f'--only={only}']
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench: measuring the memory of {only!r} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout.splitlines()[-1])


def matmul_peak(dtype=torch.float32, n=1536):
    """ FLOP/s of an n x n matmul on this machine: the best of five. """
    a, best = torch.randn(n, n).to(dtype), np.inf
    for _ in range(5):
        since = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - since)
    return 2 * n ** 3 / best


# --------------------------------------------------------------------------------------------------
# vs='plain': ours and the plain implementation, alternately

class Race:
    """ A system on random clips. Its `ways` are ours and the plain implementation, each in training
    and in validation. """
    ways = 'ours train', 'plain train', 'ours valid', 'plain valid'

    def __init__(self, folder):
        sizes = (k['bench_clips'], k['bench_clips'], 2)
        self.corpus, _ = random_corpus(folder, sizes, *SHAPES[k['shapes']])
        self.model, tokenizer = build(self.corpus, k)
        self.feed = RandomFeed(self.corpus, k, tokenizer, 'cpu', self.model)
        self.batches = {split: self.spread_out(split) for split in ('train', 'valid')}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = dict(ours=torch.optim.AdamW(trained, lr=1e-4, fused=True),
                               plain=torch.optim.AdamW(trained, lr=1e-4))

    def spread_out(self, split):
        """ Orders an epoch's batches by cost, cuts them into bench_batches equal parts, and returns
        the middle batch of each part: a list of arrays of clips. """
        order = epoch_order(self.feed.cost(split), k['batch_size'], 0, None)
        order = order[:k['bench_clips'] // k['batch_size'] or 1]  # full batches only
        n = min(k['bench_batches'], len(order))
        return [order[int((i + 0.5) * len(order) / n)] for i in range(n)]

    def padded(self, split, index):
        """ A batch with texts and frames padded to the longest. Tokenises its texts each time. """
        batch, model = self.feed(split, index), self.model
        if self.feed.tokens:
            texts = self.corpus.text(split)
            Words(shape[-1])([texts[i] for i in index])
        batch |= plain_way.pad(model, batch)
        S_a, _, S_v, _, _ = SHAPES[k['shapes']]
        for m, S in (('audio', S_a), ('vision', S_v)):
            if m in self.feed.streams:
                batch[m] = F.pad(batch[m], (0, 0, 0, S - batch[m].shape[1]))  # [B,S,d]
                batch[m + '_len'] = torch.full_like(batch[m + '_len'], S)  # [B]
                batch[m + '_mask'] = torch.ones(batch[m].shape[:2], dtype=torch.bool)  # [B,S]
        return batch | dict(epoch=torch.tensor(1))

    def step(self, way, batch, loss_of):
        """ A training step. """
        with autocast():
            loss = loss_of(self.model, batch)
        loss.backward()
        self.optimizers[way].step()
        self.optimizers[way].zero_grad(set_to_none=True)

    def passes(self, way, batches):
        """ One pass of a way over the batches. """
        ours, split = way.startswith('ours'), way.split()[1]
        for index in batches:
            if way == 'ours train':   # as train.py does
                batch = self.feed(split, index) | dict(epoch=torch.tensor(1))
                self.step('ours', batch, Plain.loss)
            elif way == 'plain train':
                self.step('plain', self.padded(split, index), plain_way.loss)
            else:
                batch = self.feed(split, index) if ours else self.padded(split, index)
                predict = Plain.predict if ours else plain_way.predict
                with torch.no_grad(), autocast():
                    predict(self.model, batch)

    def set_up(self, way):
        """ Sets the mode and the parts of the model, and the memory allocator, for a way. """
        self.model.train('train' in way)
        plain_way.use_plain_parts(self.model, way.startswith('plain'))
        # ours holds memory as train.py does; a child that measures plain keeps the default
        if not (k['only'] and 'plain' in way):
            hold_memory('ours' in way)

    def run(self, way):
        """ Seconds of one pass of a way over its batches. The longest batch runs once before,
        untimed, so that memory allocation is not timed. """
        batches = self.batches[way.split()[1]]
        self.set_up(way)
        self.passes(way, batches[-1:])
        since = time.perf_counter()
        self.passes(way, batches)
        return time.perf_counter() - since

    def counted_flops(self):
        """ FLOPs of our training steps, as torch counts them. """
        self.set_up('ours train')
        with FlopCounterMode(display=False) as counter:
            self.passes('ours train', self.batches['train'])
        return counter.get_total_flops()

    def needed_and_ratio(self, text_shape, spent):
        """ FLOPs that are needed with a text model of this shape, and the FLOPs that ours spends
        divided by them; None if they are not counted for this system. """
        clips = np.concatenate(self.batches['train'])  # [N]
        needed = plain_way.needed_flops(self.feed, clips, text_shape)
        if not needed:
            return None
        spent = plain_way.spent_flops(self.feed, self.batches['train'], text_shape) or spent
        return needed, spent and spent / needed


def by_turns(folder):
    """ Prints speed and memory of ours and of the plain implementation. """
    race = Race(folder)
    if k['only']:  # in a child process
        before = resident('VmRSS', reset=True)
        race.run(k['only'])
        print(resident('VmHWM') - before)
        return
    seconds = {way: [] for way in race.ways}
    for i in range(k['repeats'] + 1):
        for way in race.ways:
            took = race.run(way)
            if i:
                seconds[way].append(took)
        if i == 0:
            peak = {dtype: matmul_peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
    megabytes = {way: child_megabytes(way) for way in race.ways}
    spent = race.counted_flops()
    fast = peak[torch.bfloat16 if k['dtype'] == 'bfloat16' else torch.float32]

    texts = ''
    if race.feed.tokens:
        clips = np.concatenate(race.batches['train'])
        n_tokens = np.mean([len(race.feed.tokens['train'][i]) for i in clips])
        texts = f" random text model {shape}, {n_tokens:.0f} tokens per text on average;"
    print(f"{k['system']} at {k['shapes']}: {len(race.batches['train'])} batches of "
          f"{k['batch_size']} from {k['bench_clips']} clips,{texts} {torch.get_num_threads()} "
          f"threads, matmul {peak[torch.float32] / 1e9:.0f} GFLOP/s float32, "
          f"{peak[torch.bfloat16] / 1e9:.0f} bfloat16")
    for split in ('train', 'valid'):
        n_clips = sum(map(len, race.batches[split]))
        t = {way: np.median(seconds[f'{way} {split}']) for way in ('ours', 'plain')}
        spread = {way: 50 * np.ptp(seconds[f'{way} {split}']) / t[way] for way in t}
        rate = {way: n_clips / t[way] for way in t}
        mb = {way: megabytes[f'{way} {split}'] for way in t}
        print(f"  {split}: {t['plain'] / t['ours']:.2f} times the speed of plain "
              f"(ours {rate['ours']:.1f} clips/s, "
              f"{1e3 * t['ours'] / len(race.batches[split]):.0f} ms per batch, "
              f"+-{spread['ours']:.0f} %; plain {rate['plain']:.1f} +-{spread['plain']:.0f} %; "
              f"median of {k['repeats']}), peak memory above the model {mb['ours']:.0f} MB, "
              f"{100 * mb['ours'] / mb['plain']:.0f} % of the {mb['plain']:.0f} MB of plain")
    took = np.median(seconds['ours train'])
    print(f"  training: {spent / 1e9:.0f} GFLOP spent (attention and LSTMs not counted), "
          f"{100 * spent / took / fast:.0f} % of the matmul peak")
    if counted := race.needed_and_ratio(shape, spent):
        needed, ratio = counted
        large = race.needed_and_ratio(k['large_shape'], None)[1]
        large = f", {large:.2f} for {k['large_shape']}" if large else ''
        print(f"  training: {needed / 1e9:.0f} GFLOP needed, {100 * needed / took / fast:.0f} % of "
              f"the matmul peak; spent over needed: {ratio:.2f} for {shape}{large}")


# --------------------------------------------------------------------------------------------------
# vs='without': the cost of a part of a system, as in CrossSent's Table 4 for GMRA. Forward passes
# with and without the part, alternately, at batch sizes 1 and 64

def ablated(knobs, device):
    """ The system with some knobs changed, with a random text model. """
    _, d_a, _, d_v, limit = SHAPES[k['shapes']]
    score = dict(kind='regression', range=[-limit, limit])
    corpus = SimpleNamespace(widths=dict(audio=d_a, vision=d_v), labels=dict(label=score))
    model, _ = build(corpus, k | knobs)
    return model.to(device).eval()


def random_batch(model, B, device):
    """ B random clips of the largest lengths. """
    S_a, d_a, S_v, d_v, _ = SHAPES[k['shapes']]
    batch = dict(tokens=plain_way.tokens(model, B).to(device))  # [B,T]
    T = batch['tokens'].shape[1]
    for m, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
        batch[m] = torch.randn(B, S, d, device=device)  # [B,S,d]
    for m, n in (('text', T), ('audio', S_a), ('vision', S_v)):
        batch[m + '_len'] = torch.full((B,), n, device=device)  # [B]
        batch[m + '_mask'] = torch.ones(B, n, dtype=torch.bool, device=device)  # [B,S]
    return batch


@torch.no_grad()
def forward_seconds(model, batch, device):
    """ Seconds of one prediction, including asynchronous work of the device. """
    since = time.perf_counter()
    model.predict(batch)
    if device != 'cpu':
        getattr(torch, device).synchronize()
    return time.perf_counter() - since


def forward_megabytes(way, models, device):
    """ Peak memory in MB of one forward at batch 64, weights included. """
    if device != 'cuda':
        return child_megabytes(way)
    for model in models.values():
        model.to('cpu')
    batch = random_batch(models[way], 64, device)
    torch.cuda.reset_peak_memory_stats()
    forward_seconds(models[way].to(device), batch, device)
    return torch.cuda.max_memory_allocated() / 2 ** 20


def with_and_without(folder):
    """ Prints the cost of the part that the system's ablation removes. """
    ablation = plain_way.ablation()
    if not ablation:
        others = [c.__name__ for c, way in PLAIN.items() if way.ablation is not Plain.ablation]
        sys.exit("bench: vs='without' needs a system with an ablation in PLAIN: choose a config of "
                 f"{', '.join(others)}.")
    device = next(d for d, available in devices().items() if available)
    if k['only']:  # in a child process
        before = resident('VmRSS', reset=True)
        model = ablated(ablation[k['only']], device)
        forward_seconds(model, random_batch(model, 64, device), device)
        print(resident('VmHWM') - before)
        return

    models = {way: ablated(ablation[way], device) for way in ('without', 'with')}
    seconds = {(way, B): [] for B in (1, 64) for way in models}
    for B in (1, 64):
        batch = random_batch(models['with'], B, device)
        for _ in range(k['warmup_rounds'] + k['timed_rounds']):
            for way, model in models.items():
                seconds[way, B].append(forward_seconds(model, batch, device))
    took = {key: np.median(rounds[k['warmup_rounds']:]) for key, rounds in seconds.items()}
    count = {way: sum(p.numel() for p in model.parameters()) for way, model in models.items()}
    megabytes = {way: forward_megabytes(way, models, device) for way in models}

    print(f"{k['system']} {shape} at {k['shapes']}, {k['max_text_len']} tokens, {device}, "
          f"{torch.get_num_threads()} threads, {matmul_peak() / 1e9:.0f} GFLOP/s float32 matmul on "
          f"the CPU; median of {k['timed_rounds']} after {k['warmup_rounds']} untimed ones")
    rows = [
        ('parameters', 'M', {way: count[way] / 1e6 for way in models}),
        ('latency, batch 1', 'ms', {way: 1e3 * took[way, 1] for way in models}),
        ('throughput, batch 64', 'clips/s', {way: 64 / took[way, 64] for way in models}),
        ('peak memory, batch 64', 'MB', megabytes),
    ]
    for (name, unit, value), paper in zip(rows, ablation['paper']):
        change = 100 * (value['with'] / value['without'] - 1)
        print(f"  {name:22s} without {value['without']:9.2f} {unit:7s} "
              f"with {value['with']:9.2f} {unit:7s} {change:+6.2f} %   paper {paper}")


# --------------------------------------------------------------------------------------------------
# vs='paper': an estimate of a training step of pseudo tokens with LMs that are not available here

# layers, width, width of all keys, width of the FFW, vocabulary, whether the LM head has its own
# weights, number of GPUs
LMS = {
    'Qwen2.5-1.5B': (28, 1536, 256, 8960, 151936, False, 1),
    'SmolLM2-1.7B': (24, 2048, 2048, 8192, 49152, False, 1),
    'Llama-2-7B': (32, 4096, 4096, 11008, 32000, True, 1),
    'Llama-2-70B, sharded over all GPUs': (80, 8192, 1024, 28672, 32000, True, 64),
    'Llama-2-70B, sharded over each node of 8': (80, 8192, 1024, 28672, 32000, True, 64),
}


def gb(n):
    return f'{n / 1e9:.1f} GB'


def on_paper(layers, D, D_kv, ffw, V, own_head, n_gpus, in_node):
    """ The estimate for one LM as the cells of a table row: a step of batch_size clips per GPU,
    with bfloat16 weights and activations and a float32 adapter. """
    _, d_a, _, d_v, _ = SHAPES[k['shapes']]
    with torch.device('meta'):
        adapter = plain_way.adapter(cls, dict(audio=d_a, vision=d_v), D)
    if adapter is None:
        sys.exit("bench: vs='paper' needs a system with pseudo tokens and a frozen LM: choose a "
                 "config of MSE-Adapter or CMPTA.")
    trained = sum(p.numel() for p in adapter.parameters())
    tokens = 15 + k['n_pseudo'] + 60  # text, pseudo tokens, prompt and answer
    layer = 2 * D * D + 2 * D * D_kv + 3 * D * ffw
    weights = 2 * layers * layer  # bytes of the layers, which can be sharded
    unsharded = 2 * V * D * (1 + own_head)  # bytes of embeddings and LM head
    # bytes of activations per clip: those that norms, attention and the gated FFW keep for the
    # backward pass; with checkpoint_lm the input of each layer, and those of one layer
    kept = 2 * layers * (8 * D + 3 * ffw) * tokens
    checkpointed = 2 * layers * D * tokens + kept / layers

    tera, near, far = k['gpu']
    clips = k['batch_size']  # on a GPU
    shards = 8 if in_node else n_gpus  # GPUs that the weights are sharded over
    flop = clips * tokens * 4 * layers * layer  # forward, and backward to the pseudo tokens
    computing = flop / (tera * 1e12 * k['gpu_share'])  # s
    traffic = 2 * weights * (1 - 1 / shards)  # bytes gathered in the forward and backward pass
    moving = traffic / (1e9 * (near if in_node else far))  # s
    gathering = f'{gb(traffic)}, {moving:.2f} s, {1.5 * moving:.2f} s'
    return [
        f'{trained / 1e6:.2f} M',
        gb(weights / shards + unsharded),
        f'{16 * trained / 1e6:.0f} MB',
        f'{gb(clips * kept)}, {gb(clips * checkpointed)}',
        f'{flop / 1e12:.0f} TFLOP, {computing:.2f} s, {1.5 * computing:.2f} s',
        gathering if shards > 1 else '-',
        f'{4 * trained / 1e6:.0f} MB' if n_gpus > 1 else '-',
    ]


def count_on_paper(folder):
    """ Prints the table of estimates. """
    tera, near, far = k['gpu']
    rows = []
    for name, lm in LMS.items():
        rows.append([f'{name} x {lm[-1]}'] + on_paper(*lm, in_node='node' in name))
    print(f"{k['system']} at {k['shapes']}, {k['batch_size']} clips per GPU and step, "
          f"{k['gpu_share']:.0%} of {tera:g} TFLOP/s, {near:g} GB/s in and {far:g} between nodes\n")
    print(markdown_table([
        'LM x GPUs',
        'trained weights',
        'LM per GPU',
        'adapter, its gradient and moments',
        'activations: without, with checkpoint_lm',
        'computing: without, with checkpoint_lm',
        'gathering weights: without, with checkpoint_lm',
        'gradients sent'], rows))


# --------------------------------------------------------------------------------------------------
# vs='start': time from process start to the first step that train.py prints, for late fusion of
# random features on a converted corpus

def seconds_until_line(argv, starts_with):
    """ Seconds from the start of a process to its first line with this start; then kills it. """
    since = time.perf_counter()
    env, output = os.environ | {'PYTHONUNBUFFERED': '1'}, []
    with subprocess.Popen([sys.executable, *argv], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            output.append(line)
            if line.startswith(starts_with):
                process.kill()
                return time.perf_counter() - since
    sys.exit(f"bench: train.py stopped before its first step: {''.join(output)[-300:]}")


def until_first_step(folder, n):
    """ Prints the time that a run on n clips takes until its first step. """
    _, rate = random_corpus(folder, (n, n // 8, n // 4), 50, 74, 50, 35, 3)
    hf = f'{folder}/run/hf'
    argv = [os.path.join(_root, 'train.py'), os.path.join(_root, 'config', 'baseline_late.py'),
            f'--corpus={folder}/random', f'--out_dir={folder}/run', '--log_interval=1',
            '--device=cpu', '--lm_vocab=4000']
    # trains a tokenizer and writes the config of its encoder; the timed runs load both
    seconds_until_line(argv, '  step ')
    encoder_config = transformers.AutoConfig.from_pretrained(hf)
    transformers.AutoModel.from_config(encoder_config).save_pretrained(hf)
    argv += ['--fresh=True', f'--lm={hf}']
    bare = ['-c', f"import sys; sys.path.insert(0, {_root!r}); "
                  "import torch, transformers, matplotlib.pyplot, safetensors.torch; "
                  f"from run.load_lm import load_encoder; load_encoder({hf!r}); print('loaded')"]
    # alternately, so that a slow phase of the machine affects both
    took = [(seconds_until_line(argv, '  step '), seconds_until_line(bare, 'loaded'))
            for _ in range(k['repeats'])]
    whole, bare = np.array(took).T  # [repeats] each
    print(f"{n} train clips: first step {np.median(whole - bare):.1f} s "
          f"(+-{np.ptp(whole - bare) / 2:.1f}) after imports and loading an encoder of 3 x 64 "
          f"({np.median(bare):.1f} s); converted at {rate:.0f} MB/s; median of {k['repeats']}")


def start(folder):
    """ Prints the time until the first step for each size of the corpus. """
    for n in k['start_clips']:
        own = os.path.join(folder, str(n))
        os.mkdir(own)
        until_first_step(own, n)


MEASURED = dict(plain=by_turns, without=with_and_without, paper=count_on_paper, start=start)

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as _folder:
        MEASURED[k['vs']](_folder)
