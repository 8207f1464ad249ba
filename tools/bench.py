"""
How fast a system is here, and against the plain way of doing the same: training step, evaluation
pass, peak memory, share of this machine's own matmul peak, and the FLOPs spent over those that the
result needs.

    python tools/bench.py
        MSE-Adapter at CH-SIMS v2's shapes, a random Llama of 8 x 512
    python tools/bench.py config/deepmlf_sims.py --shapes=sims
        another config; any knob of its run, or of those below
    python tools/bench.py config/baseline_mult.py --dataset=sims --shapes=sims
    python tools/bench.py config/crosssent_mosei.py --shapes=mosei --vs=without
        what GMRA costs: the paper's Table 4
    python tools/bench.py --vs=start
        process start to first step, and conversion, by size of the corpus
    python tools/bench.py --vs=paper
        MSE-Adapter's weights, memory, traffic and time for LMs that are not here, by count

Clips and LM are random. Widths and longest lengths are the corpus's; lengths are assumed: text
lognormal with mean 15 words, frames uniform from a quarter to all. The plain way is what one writes
first. For pseudo tokens, as MSE-Adapter's release: text padded to max_text_len, frames to the
longest, Hugging Face's own forward with logits for the whole sequence in float32, and generate() to
validate. For DeepMLF, as its release: one stream of padded text and fusion tokens with a graph from
the bottom, logits for every slot, in evaluation too, and Hugging Face's GELU. For the others the
same model on such padded batches; PLAIN says which class has a plain way of its own. Texts are
tokenised again in each batch, AdamW is not fused, which counts where much is trained, and freed
memory goes back to Linux (run/machine.py, hold_memory). Both ways run in one process by turns, on
the CPU in float32 (or bfloat16 by --dtype); memory is that of a process of its own, above the
loaded model (Linux). Times are only worth something as the ratio of the two.
"""
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
import zlib
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
from corpora.convert import convert
from data import Feed, epoch_order, open_corpus
from lm import FrozenLM, TextEncoder
from losses import deepmlf_loss
from metrics import markdown_table
from model import SYSTEMS, AVModel, CrossSent, DeepMLF, LanguageModel, PseudoTokenLM
from run.machine import devices, hold_memory
from system import System

shapes: Literal['simsv2', 'mosi', 'mosei', 'sims'] = 'simsv2'   # of the clips: a row of SHAPES
vs: Literal['plain', 'without', 'start', 'paper'] = 'plain'   # what ours is measured against
gpu = [989.0, 450.0, 50.0]     # 'paper': TFLOP/s in bfloat16, GB/s in a node, beyond (an H100)
gpu_share: Share(with_one=True) = 0.45   # 'paper': of these TFLOP/s, what is reached
lm_shape = []                  # of the random LM: layers, width, heads, vocabulary; []: see SIZES
large_shape = [32, 4096, 32, 32000]  # of the LM whose FLOPs are counted on paper: Llama-2-7B's
bench_clips: AtLeast(1) = 1000     # clips of the random corpus
bench_batches: AtLeast(1) = 6      # of these, batches that are timed, spread over all lengths
warmup_rounds = 20             # 'without': forwards that do not count
timed_rounds: AtLeast(1) = 50      # 'without': forwards that do
start_clips = [1000, 16000]    # 'start': clips of the corpora, MOSEI's number last
repeats: AtLeast(1) = 5            # timed rounds of both ways by turns, after one that is not
only = ''                      # for bench.py's own child process: 'ours train', 'plain valid', ..
# --------------------------------------------------------------------------------------------------
_root = str(Path(__file__).resolve().parent.parent)
_argv = [arg if arg.startswith('-') or os.path.exists(arg) else os.path.join(_root, arg)
         for arg in sys.argv[1:]]
if all(arg.startswith('-') for arg in _argv):
    _argv.insert(0, os.path.join(_root, 'config', 'mse_simsv2.py'))
if '-h' in _argv or '--help' in _argv:
    print(__doc__)
    sys.exit(0)
# the knobs of train.py that every run has, and those above
_train, _own = (declared_knobs(path) for path in (os.path.join(_root, 'train.py'), __file__))
_known, k = run_knobs(_argv, _train[0] | _own[0], _train[1] | _own[1], SYSTEMS)
for _name, _value in k.items():
    if _value != _known[_name] and not k['only']:
        print(f"    {_name} = {_value!r}   (default {_known[_name]!r})")
k |= dict(train_fraction=1.0, shuffle_streams=False, standardise=True)
cls = SYSTEMS[k['system']]

SHAPES = dict(  # audio frames, width; video frames, width; label range
    mosi=(375, 5, 500, 20, 3),
    simsv2=(925, 25, 232, 177, 1),
    mosei=(500, 74, 375, 35, 3),
    sims=(400, 33, 55, 709, 1))
SIZES = dict(  # of the random text models by family: layers, width, heads, vocabulary
    llama=[8, 512, 8, 32000],
    gpt2=[12, 768, 12, 50257],       # GPT-2-base
    roberta=[12, 768, 12, 50265])    # RoBERTa-base


# --------------------------------------------------------------------------------------------------
# What is particular to measuring a system, by its class

class Plain:
    """ The plain way of a system without an entry in PLAIN: the same model on padded batches. """
    step_on_the_way = False  # it is not measured

    @staticmethod
    def family(system):
        """ The family of the random text model that the system stands on, a row of SIZES. """
        return 'llama' if system.frozen_lm else 'roberta'

    @staticmethod
    def pad(model, batch):
        """ What padding every text to the longest changes in a batch. """
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
    def as_written(model, plain):
        """ Writes parts of a model as others do (plain=True), or as we do again. """

    @staticmethod
    def needed_flops(feed, clips, shape):
        """ What a training step on these clips of the train split has to compute with a text model
        of this shape; None where it is not counted. """
        return None

    @staticmethod
    def spent_flops(feed, batches, shape):
        """ What ours spends on the same; None: what was counted while it ran. """
        return None

    @staticmethod
    def adapter(system, widths, D):
        """ The trained module that stands before a frozen LM of width D, if there is one. """
        return None

    @staticmethod
    def ablation():
        """ Of vs='without': the knobs 'without' a part of the system and 'with' it, and what the
        'paper' has for each row of the table; None where nothing is to be taken out. """
        return None


class PlainStep(Plain):
    step_on_the_way = True


class PlainDeepMLF(Plain):
    """ DeepMLF's release: one stream, every slot through everything, Hugging Face's GELU. """
    @staticmethod
    def family(system):
        return 'gpt2'

    @staticmethod
    def loss(model, batch):
        """ Its loss, logits of all slots of the text included. """
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
        out = model.heads(x[:, :T], x[:, T:], z, z_mask, batch['text_len'])
        labels = batch['tokens'][:, 1:].masked_fill(~batch['text_mask'][:, 1:], -100)  # [B,T-1]
        logits = lm.lm_head(x)[:, :T - 1].float()  # [B,T-1,V]
        lm_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return deepmlf_loss(out, batch['label'], model.weights)[1] + k['weight_lm'] * lm_loss

    @staticmethod
    def predict(model, batch):
        PlainDeepMLF.loss(model, batch)

    @staticmethod
    def as_written(model, plain):
        """ Hugging Face's own GELU, in eight passes over memory, where ours has the same function
        in one; and nothing computed again in the backward pass. """
        def gelu():
            return NewGELUActivation() if plain else torch.nn.GELU('tanh')

        for l in range(model.lm.n_layers):
            model.lm.part(l, 'ffw').act = gelu()
        for block in model.mm_blocks.values():
            if k['mm_ffw'] == 'full':
                block.ffw.act = gelu()
                vars(block.ffw).pop('forward', None)
                if plain:
                    block.ffw.forward = kept(block.ffw)

    @staticmethod
    def needed_flops(feed, clips, shape):
        """ None without an LM loss. Left out: the AV encoder and attention, which torch does not
        count on the CPU either. """
        if k['mm_ffw'] != 'full' or not k['weight_lm']:
            return None
        (layers, D, _, V), n_f, first = shape, k['n_fusion'], min(k['mm_layers'])
        n = np.array([len(feed.tokens['train'][i]) for i in clips])  # [N]
        frames = [feed.corpus.lengths('train', m)[clips] for m in ('audio', 'vision')]
        m = np.minimum(k['av_len'], np.maximum(*frames))  # [N]
        text, fusion = n * 24 * D * D, n_f * 24 * D * D  # a layer's forward
        # text: no graph below the first block
        total = (2 * layers - first) * text + 2 * layers * fusion
        for l in k['mm_layers']:
            # FFW: back to its weights, and its input
            total = total + (2 if l == first else 3) * n * 16 * D * D + 3 * n_f * 16 * D * D
            # GCA
            total = total + 3 * (4 * n_f * D * D + 4 * m * k['av_width'] * D)
        total = total + 2 * (n - 1) * 2 * D * V
        return float(total.sum())


def kept(ffw):
    """ The forward of an FFW that keeps what ours computes again in the backward pass. """
    def forward(x, lm_ffw):
        hidden = [linear(x) for linear in (ffw.gate, ffw.up) if linear is not None]
        return ffw.dropout(ffw.second_half(*hidden))  # [B,L,D]

    return forward


class PlainPseudoTokens(Plain):
    """ MSE-Adapter's release: text padded on the left, Hugging Face's own forward and generate. """
    @staticmethod
    def pad(model, batch):
        """ text [B,T]: the tokens of the text alone. """
        first, n_after = len(model.prompt.before) + k['n_pseudo'], len(model.prompt.after)
        text = []
        for tokens, n in zip(batch['tokens'], batch['text_len']):
            own = tokens[first:n - n_after]
            text.append(F.pad(own, (k['max_text_len'] - len(own), 0)))  # [T]
        return dict(text=torch.stack(text))

    @staticmethod
    def prompt(model, batch):
        """ Prompt, pseudo tokens and padded text, embedded [B,L,D]. """
        embed, B = model.lm.hf.get_input_embeddings(), len(batch['text'])
        text = embed(batch['text'])  # [B,T,D]
        everything = torch.ones(text.shape[:2], dtype=torch.bool)  # [B,T]
        pseudo = model.adapter(batch, text, everything)  # [B,P,D]
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
        """ For readout='score'. The adapter is left out (MSE-Adapter's is 2 % more; at width 1024
        CMPTA's BiLSTM over 925 frames costs more than a small LM), and tokens before the first
        pseudo token are counted as the others (a few % too much). """
        if k['readout'] != 'score':
            return None
        # weights are frozen, so no third pass but in attention, which has two factors; of the last
        # layer keys and values of the prompt, and the rest for the tokens that are read out; logits
        # for these
        layers, D, _, V = shape
        ffw, n_out = int(D * 2.6875), max(map(len, feed.prompt.answers))
        n = np.array([len(feed.tokens['train'][i]) for i in clips])  # [N]
        n = n + n_out - 1
        linear = (layers - 1) * n * (8 * D * D + 6 * D * ffw) + n * 4 * D * D
        linear = linear + n_out * (4 * D * D + 6 * D * ffw + 2 * D * V)
        # q k and p v; causal, so half of 4 n^2 D
        attention = (layers - 1) * 2 * n * n * D + 4 * n_out * n * D
        return float((2 * linear + 3 * attention).sum())

    @staticmethod
    def spent_flops(feed, batches, shape):
        """ Counted by torch on the meta device, where nothing is computed. """
        with torch.device('meta'):
            lm = FrozenLM(random_lm('llama', *shape))
            big = cls.assemble(k, feed.corpus, lm, Words(shape[-1]))
            pseudo = torch.zeros(k['n_pseudo'], lm.width, requires_grad=True)  # [P,D]
            turn = torch.zeros(1, 1, lm.head_width)
        first = len(feed.prompt.before)

        def rope(x, positions):
            # torch 2.6 has no autocast on meta, which Hugging Face's asks for
            return turn, turn

        def read(batch):
            # without the adapter: pseudo tokens out of nowhere, that want a gradient
            x = lm.embed(batch['tokens'])  # [B,L,D]
            before, after = x[:, :first], x[:, first + k['n_pseudo']:]
            x = torch.cat([before, pseudo.expand(len(x), -1, -1), after], 1)  # [B,L,D]
            return x, batch['text_len']

        lm.parts['rope'] = rope
        big.read = read
        with FlopCounterMode(display=False) as counter:
            for index in batches:
                batch = {name: v.to('meta') for name, v in feed('train', index).items()}
                big(batch)['loss'].backward()
        return counter.get_total_flops()

    @staticmethod
    def adapter(system, widths, D):
        return system.make_adapter(k, widths, D, 1.0)


class PlainCrossSent(Plain):
    """ No plain way of its own; and the paper's Table 4, what GMRA costs. """
    @staticmethod
    def ablation():
        return {
            'without': dict(gmra_layer=0),
            'with': dict(gmra_layer=k['gmra_layer'] or 1),
            'paper': ('+7.10 %', '+11.42 %', '-6.46 %', '+1.33 %'),
        }


PLAIN = {  # looked up along the classes that a system descends from
    DeepMLF: PlainDeepMLF,
    PseudoTokenLM: PlainPseudoTokens,
    CrossSent: PlainCrossSent,
    LanguageModel: PlainStep,
    AVModel: PlainStep,
    System: Plain,
}
plain_way = next(PLAIN[c] for c in cls.__mro__ if c in PLAIN)
shape = k['lm_shape'] or SIZES[plain_way.family(cls)]

wrong = []
if plain_way.step_on_the_way and k['vs'] != 'start':
    wrong += [f"system={k['system']!r} is a step on the way and not measured: take a config of a "
              "system"]
if cls.needs_words(k):
    wrong += ["the random clips have no words of their own: take another resample"]
if k['label'] != 'label':
    wrong += ["the random clips have a score and no classes: take a regression config"]
if k['dtype'] not in ('auto', 'float32', 'bfloat16'):
    wrong += ["dtype is 'float32' or 'bfloat16' here"]
if len(k['gpu']) != 3 or min(k['gpu']) <= 0 or not k['gpu_share']:
    wrong += ["gpu is three numbers above 0, gpu_share is above 0"]
if len(shape) != 4 or len(k['large_shape']) != 4:
    wrong += ["lm_shape and large_shape are layers, width, heads, vocabulary"]
if wrong:
    sys.exit(f"bench: {'; '.join(wrong)}.")


def autocast():
    """ bfloat16 where the knobs want it. """
    return torch.autocast('cpu', torch.bfloat16) if k['dtype'] == 'bfloat16' else nullcontext()


# --------------------------------------------------------------------------------------------------
# Random text models and clips

class Words:
    """ A stand-in for a tokenizer: a token a word, a digit or two Chinese characters, its number a
    checksum. """
    eos_token_id, bos_token_id, pad_token_id, unk_token_id = 2, 1, None, 0

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def token(self, word):
        return 10 + zlib.crc32(word.encode()) % (self.vocabulary - 10)

    def __call__(self, texts, truncation=False, max_length=None, **_):
        pattern = r'[A-Za-z]+|[\u4e00-\u9fff]{1,2}|[^\sA-Za-z]'
        cut = max_length if truncation else None
        ids = [[self.token(word) for word in re.findall(pattern, text)][:cut] for text in texts]
        return {'input_ids': ids}

    def decode(self, ids):
        return ''


def random_lm(kind, layers, width, heads, vocabulary):
    """ A random text model of this shape: 'gpt2', 'llama' (its FFW as wide as Llama-2's in
    proportion) or 'roberta'. """
    torch.manual_seed(0)
    if kind == 'gpt2':
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads,
            bos_token_id=1, eos_token_id=2))
    if kind == 'roberta':
        return transformers.RobertaModel(transformers.RobertaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * width,
            max_position_embeddings=514, type_vocab_size=1))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048))


def random_corpus(folder, n_clips, S_a, d_a, S_v, d_v, limit):
    """ Random clips, n_clips of train, valid and test, of the shapes, as an M-SENA pickle that is
    converted as any other -> the corpus, and MB/s of its conversion. """
    rng, source = np.random.default_rng(0), {}
    words = [''.join(rng.choice(list('abcdefghij'), 5)) for _ in range(3000)]
    often = 1 / np.arange(1, len(words) + 1)  # [3000]; the k-th is said 1/k as often as the first
    often = often / often.sum()
    for split, n in zip(('train', 'valid', 'test'), n_clips):
        n_words = rng.lognormal(np.log(15) - 0.18, 0.6, n)  # [N], mean 15
        n_words = np.clip(n_words, 1, 100).astype(int)
        source[split] = dict(
            raw_text=[' '.join(rng.choice(words, k, p=often)) for k in n_words],
            regression_labels=rng.uniform(-limit, limit, n).round(1).astype('f4'))
        for m, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
            length = rng.integers(S // 4, S + 1, n)  # [N]
            real = np.arange(S) < length[:, None]  # [N,S]
            x = rng.standard_normal((n, S, d), np.float32) * real[..., None]  # [N,S,d]
            source[split] |= {m: x, m + '_lengths': length.tolist()}
    path = os.path.join(folder, 'random.pkl')
    with open(path, 'wb') as f:
        pickle.dump(source, f, protocol=4)
    since = time.perf_counter()
    convert(path, os.path.join(folder, 'random'), label_range=(-limit, limit))
    seconds = time.perf_counter() - since
    return open_corpus(os.path.join(folder, 'random')), os.path.getsize(path) / 1e6 / seconds


class RandomFeed(Feed):
    """ A Feed whose hidden states of frozen text are random, as the texts are. """
    def _read_frozen_features(self, as_data):
        rng = np.random.default_rng(1)
        for split, texts in self.tokens.items():
            self.text[split] = []   # [T_n,D] each
            for tokens in texts:
                hidden = rng.standard_normal((len(tokens), shape[1]), np.float32)
                self.text[split].append(hidden.astype('f2'))


def text_model():
    """ The random text model that the system stands on: a frozen LM, or an encoder. """
    family = plain_way.family(cls)
    hf = random_lm(family, *shape)
    return TextEncoder(hf) if family == 'roberta' else FrozenLM(hf)


def build(corpus, knobs):
    """ Our model of these knobs on a random text model, and its tokenizer; None without text. """
    if 'text' not in cls.modalities_read(knobs):
        return cls.assemble(knobs, corpus, None, None), None
    tokenizer = Words(shape[-1])
    if cls.frozen_features(knobs):
        return cls.assemble(knobs, corpus, None, tokenizer, width=shape[1]), tokenizer
    return cls.assemble(knobs, corpus, text_model(), tokenizer), tokenizer


# --------------------------------------------------------------------------------------------------
# What is measured

def resident(what, reset=False):
    """ MB of memory that this process has now (VmRSS) or had at most (VmHWM) since the last reset.
    Linux only. """
    if reset:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(what))


def child_megabytes(only):
    """ What a process of its own prints when it runs `only`: its peak memory, in MB; nan where
    there is no /proc. """
    if not os.path.exists('/proc/self/clear_refs'):
        return float('nan')
    argv = [sys.executable, __file__, *sys.argv[1:], f'--only={only}']
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench: measuring the memory of {only!r} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout.splitlines()[-1])


def matmul_peak(dtype=torch.float32, n=1536):
    """ FLOP/s of a matmul here and now. """
    a, best = torch.randn(n, n).to(dtype), np.inf
    for _ in range(5):
        since = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - since)
    return 2 * n ** 3 / best


# --------------------------------------------------------------------------------------------------
# vs='plain': ours and the plain way by turns

class Race:
    """ A system on random clips, and one pass over some batches by each way: 'ours train',
    'plain train', 'ours valid', 'plain valid'. """
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
        """ The middle of each of bench_batches equal parts of what an epoch has, by cost: a list of
        arrays of clips. """
        order = epoch_order(self.feed.cost(split), k['batch_size'], 0, None)
        order = order[:k['bench_clips'] // k['batch_size'] or 1]  # full ones
        n = min(k['bench_batches'], len(order))
        return [order[int((i + 0.5) * len(order) / n)] for i in range(n)]

    def padded(self, split, index):
        """ A batch with everything padded to the longest. Its texts are tokenised here, each
        time. """
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

    def passes(self, way, some):
        """ One pass of a way over these batches. """
        ours, split = way.startswith('ours'), way.split()[1]
        for index in some:
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
        """ The model and the memory as a way wants them. """
        self.model.train('train' in way)
        plain_way.as_written(self.model, way.startswith('plain'))
        # as train.py does; a child of the plain way is left alone
        if not (k['only'] and 'plain' in way):
            hold_memory('ours' in way)

    def run(self, way):
        """ One pass of a way over the batches -> seconds. The longest one goes before and does not
        count: memory was the other way's. """
        some = self.batches[way.split()[1]]
        self.set_up(way)
        self.passes(way, some[-1:])
        since = time.perf_counter()
        self.passes(way, some)
        return time.perf_counter() - since

    def counted_flops(self):
        """ What torch counts of our training steps. """
        self.set_up('ours train')
        with FlopCounterMode(display=False) as counter:
            self.passes('ours train', self.batches['train'])
        return counter.get_total_flops()

    def over_needed(self, text_shape, spent):
        """ FLOPs that the result needs with a text model of a shape, and what ours spends over
        that; None where nobody has counted it. """
        clips = np.concatenate(self.batches['train'])  # [N]
        need = plain_way.needed_flops(self.feed, clips, text_shape)
        if not need:
            return None
        spent = plain_way.spent_flops(self.feed, self.batches['train'], text_shape) or spent
        return need, spent and spent / need


def by_turns(folder):
    """ Prints how fast ours is, against the plain way. """
    race = Race(folder)
    if k['only']:  # the child
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
        texts = f" random text model {shape}, texts of {n_tokens:.0f} tokens;"
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
        print(f"  {split}: {t['plain'] / t['ours']:.2f} x plain's speed "
              f"(ours {rate['ours']:.1f} clips/s, "
              f"{1e3 * t['ours'] / len(race.batches[split]):.0f} ms a batch, "
              f"+-{spread['ours']:.0f} %; plain {rate['plain']:.1f} +-{spread['plain']:.0f} %; "
              f"median of {k['repeats']}), peak memory above the model {mb['ours']:.0f} MB, "
              f"{100 * mb['ours'] / mb['plain']:.0f} % of plain's {mb['plain']:.0f} MB")
    took = np.median(seconds['ours train'])
    print(f"  training: {spent / 1e9:.0f} GFLOP counted without attention's and LSTMs', "
          f"{100 * spent / took / fast:.0f} % of the matmul peak")
    if here := race.over_needed(shape, spent):
        need, over = here
        large = race.over_needed(k['large_shape'], None)[1]
        large = f", {large:.2f} at {k['large_shape']}" if large else ''
        print(f"  {100 * need / took / fast:.0f} % of the peak on the {need / 1e9:.0f} GFLOP that "
              f"the result needs; spent over needed: {over:.2f} here{large}")


# --------------------------------------------------------------------------------------------------
# vs='without': what a part of a system costs, as CrossSent's Table 4 has it for GMRA. Forward only,
# with the part and without by turns, at batch 1 and at batch 64

def ablated(knobs, device):
    """ The system with some knobs changed, on a random text model. """
    _, d_a, _, d_v, _ = SHAPES[k['shapes']]
    corpus = SimpleNamespace(widths=dict(audio=d_a, vision=d_v))
    model, _ = build(corpus, k | knobs)
    return model.to(device).eval()


def random_batch(B, device):
    """ B random clips of the longest there are. """
    S_a, d_a, S_v, d_v, _ = SHAPES[k['shapes']]
    T = k['max_text_len']
    batch = dict(tokens=torch.randint(10, shape[-1], (B, T), device=device))  # [B,T]
    for m, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
        batch[m] = torch.randn(B, S, d, device=device)  # [B,S,d]
    for m, n in (('text', T), ('audio', S_a), ('vision', S_v)):
        batch[m + '_len'] = torch.full((B,), n, device=device)  # [B]
        batch[m + '_mask'] = torch.ones(B, n, dtype=torch.bool, device=device)  # [B,S]
    return batch


@torch.no_grad()
def forward_seconds(model, batch, device):
    """ Seconds of one prediction, the device's work included. """
    since = time.perf_counter()
    model.predict(batch)
    if device != 'cpu':
        getattr(torch, device).synchronize()
    return time.perf_counter() - since


def forward_megabytes(way, models, device):
    """ Peak memory of one forward at batch 64, in MB. """
    if device != 'cuda':
        return child_megabytes(way)
    for model in models.values():
        model.to('cpu')
    batch = random_batch(64, device)
    torch.cuda.reset_peak_memory_stats()
    forward_seconds(models[way].to(device), batch, device)
    return torch.cuda.max_memory_allocated() / 2 ** 20


def with_and_without(folder):
    """ Prints what the part costs. """
    ablation = plain_way.ablation()
    if not ablation:
        others = [c.__name__ for c, way in PLAIN.items() if way.ablation is not Plain.ablation]
        sys.exit("bench: vs='without' is for systems of which PLAIN says what to take out: "
                 f"{', '.join(others)}.")
    device = next(d for d, is_there in devices().items() if is_there)
    if k['only']:  # the child: the weights included
        before = resident('VmRSS', reset=True)
        model = ablated(ablation[k['only']], device)
        forward_seconds(model, random_batch(64, device), device)
        print(resident('VmHWM') - before)
        return

    models = {way: ablated(ablation[way], device) for way in ('without', 'with')}
    seconds = {(way, B): [] for B in (1, 64) for way in models}
    for B in (1, 64):
        batch = random_batch(B, device)
        for _ in range(k['warmup_rounds'] + k['timed_rounds']):
            for way, model in models.items():
                seconds[way, B].append(forward_seconds(model, batch, device))
    took = {key: np.median(rounds[k['warmup_rounds']:]) for key, rounds in seconds.items()}
    count = {way: sum(p.numel() for p in model.parameters()) for way, model in models.items()}
    megabytes = {way: forward_megabytes(way, models, device) for way in models}

    print(f"{k['system']} {shape} at {k['shapes']}, {k['max_text_len']} tokens, {device}, "
          f"{torch.get_num_threads()} threads, {matmul_peak() / 1e9:.0f} GFLOP/s float32 matmul on "
          f"the CPU; median of {k['timed_rounds']} after {k['warmup_rounds']}, by turns")
    rows = [
        ('parameters', 'M', {way: count[way] / 1e6 for way in models}),
        ('latency, batch 1', 'ms', {way: 1e3 * took[way, 1] for way in models}),
        ('throughput, batch 64', 'clips/s', {way: 64 / took[way, 64] for way in models}),
        ('peak memory, batch 64', 'MB', megabytes),
    ]
    for (what, unit, value), paper in zip(rows, ablation['paper']):
        more = 100 * (value['with'] / value['without'] - 1)
        print(f"  {what:22s} without {value['without']:9.2f} {unit:7s} "
              f"with {value['with']:9.2f} {unit:7s} {more:+6.2f} %   paper {paper}")


# --------------------------------------------------------------------------------------------------
# vs='paper': what a training step of pseudo tokens takes with LMs that cannot be had here, by count

# layers, width, width of all keys, width of the FFW, vocabulary, is the LM head a matrix of its
# own; GPUs
LMS = {
    'Qwen2.5-1.5B': (28, 1536, 256, 8960, 151936, False, 1),
    'SmolLM2-1.7B': (24, 2048, 2048, 8192, 49152, False, 1),
    'Llama-2-7B': (32, 4096, 4096, 11008, 32000, True, 1),
    'Llama-2-70B, all GPUs share it': (80, 8192, 1024, 28672, 32000, True, 64),
    'Llama-2-70B, each node of 8 has it': (80, 8192, 1024, 28672, 32000, True, 64),
}


def gb(n):
    return f'{n / 1e9:.1f} GB'


def on_paper(layers, D, D_kv, ffw, V, own_head, n_gpus, in_node):
    """ What a step of batch_size clips a GPU takes -> the cells of a table. bfloat16 weights and
    activations, float32 adapter. """
    _, d_a, _, d_v, _ = SHAPES[k['shapes']]
    with torch.device('meta'):
        adapter = plain_way.adapter(cls, dict(audio=d_a, vision=d_v), D)
    if adapter is None:
        sys.exit("bench: vs='paper' counts systems of pseudo tokens before a frozen LM.")
    trained = sum(p.numel() for p in adapter.parameters())
    tokens = 15 + k['n_pseudo'] + 60  # text, pseudo tokens, prompt and answer
    layer = 2 * D * D + 2 * D * D_kv + 3 * D * ffw
    weights = 2 * layers * layer  # bytes that may be shared
    whole = 2 * V * D * (1 + own_head)  # bytes: embeddings and head
    # kept for going back through frozen linears: what norms, attention and the gated FFW want; or,
    # computing again, a layer's input
    kept = 2 * layers * (8 * D + 3 * ffw) * tokens
    again = 2 * layers * D * tokens + kept / layers

    tera, near, far = k['gpu']
    clips = k['batch_size']  # on a GPU
    share = 8 if in_node else n_gpus  # GPUs that share the weights
    flop = clips * tokens * 4 * layers * layer  # forward, and back to the pseudo tokens
    busy = flop / (tera * 1e12 * k['gpu_share'])  # s
    traffic = 2 * weights * (1 - 1 / share)  # gathered forward and back
    moved = traffic / (1e9 * (near if in_node else far))  # s
    gathering = f'{gb(traffic)}, {moved:.2f} s, {1.5 * moved:.2f} s'
    return [
        f'{trained / 1e6:.2f} M',
        gb(weights / share + whole),
        f'{16 * trained / 1e6:.0f} MB',
        f'{gb(clips * kept)}, {gb(clips * again)}',
        f'{flop / 1e12:.0f} TFLOP, {busy:.2f} s, {1.5 * busy:.2f} s',
        gathering if share > 1 else '-',
        f'{4 * trained / 1e6:.0f} MB' if n_gpus > 1 else '-',
    ]


def count_on_paper(folder):
    """ Prints the table. """
    tera, near, far = k['gpu']
    rows = []
    for name, lm in LMS.items():
        rows.append([f'{name} x {lm[-1]}'] + on_paper(*lm, in_node='node' in name))
    print(f"{k['system']} at {k['shapes']}, {k['batch_size']} clips a GPU and step, "
          f"{k['gpu_share']:.0%} of {tera:g} TFLOP/s, {near:g} GB/s in a node, {far:g} beyond\n")
    print(markdown_table([
        'LM x GPUs',
        'trained',
        'LM a GPU',
        'adapter, its gradient and moments',
        'activations: kept, with checkpoint_lm',
        'computing: kept, with checkpoint_lm',
        'gathering weights: kept, with checkpoint_lm',
        'gradients'], rows))


# --------------------------------------------------------------------------------------------------
# vs='start': from process start to the first step, train.py on a converted corpus, late fusion of
# random features, until it prints a step

def first_line(argv, starts_with):
    """ Seconds from starting a process to the line that starts so; it is killed there. """
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
    """ Prints how long a run on n clips takes to its first step. """
    _, rate = random_corpus(folder, (n, n // 8, n // 4), 50, 74, 50, 35, 3)
    hf = f'{folder}/run/hf'
    argv = [os.path.join(_root, 'train.py'), os.path.join(_root, 'config', 'baseline_late.py'),
            f'--corpus={folder}/random', f'--out_dir={folder}/run', '--log_interval=1',
            '--device=cpu', '--lm_vocab=4000']
    # makes a tokenizer, and writes what encoder it wants: the timed ones load both
    first_line(argv, '  step ')
    encoder_config = transformers.AutoConfig.from_pretrained(hf)
    transformers.AutoModel.from_config(encoder_config).save_pretrained(hf)
    argv += ['--fresh=True', f'--lm={hf}']
    bare = ['-c', f"import sys; sys.path.insert(0, {_root!r}); "
                  "import torch, transformers, matplotlib.pyplot, safetensors.torch; "
                  f"from run.load_lm import load_encoder; load_encoder({hf!r}); print('there')"]
    # by turns: a machine that is slow for a while is slow for both
    took = [(first_line(argv, '  step '), first_line(bare, 'there')) for _ in range(k['repeats'])]
    whole, bare = np.array(took).T  # [repeats] each
    print(f"{n} clips to train on: first step {np.median(whole - bare):.1f} s "
          f"(+-{np.ptp(whole - bare) / 2:.1f}) after imports and the loading of an encoder of "
          f"3 x 64 ({np.median(bare):.1f} s); converted at {rate:.0f} MB/s; "
          f"median of {k['repeats']}")


def start(folder):
    """ Prints it for each size of the corpus. """
    for n in k['start_clips']:
        own = os.path.join(folder, str(n))
        os.mkdir(own)
        until_first_step(own, n)


MEASURED = dict(plain=by_turns, without=with_and_without, paper=count_on_paper, start=start)

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as _folder:
        MEASURED[k['vs']](_folder)
