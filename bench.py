"""
How fast a system is here, and against the plain way of doing the same: training step, evaluation
pass, peak memory, share of this machine's own matmul peak, and the FLOPs spent over those that the
result needs.

    python bench.py
        MSE-Adapter at CH-SIMS v2's shapes, a random Llama of 8 x 512
    python bench.py config/deepmlf_sims.py --shapes=sims
        another config; any knob of train.py, or of those below
    python bench.py config/baseline_mult.py --dataset=sims --shapes=sims
    python bench.py config/crosssent_mosei.py --shapes=mosei --vs=without
        what GMRA costs: the paper's Table 4
    python bench.py --vs=start
        process start to first step, and conversion, by size of the corpus
    python bench.py --vs=paper
        MSE-Adapter's weights, memory, traffic and time for LMs that are not here, by count

Clips and LM are random. Widths and longest lengths are the corpus's; lengths are assumed: text
lognormal with mean 15 words, frames uniform from a quarter to all. The plain way is what one writes
first. For pseudo tokens, as MSE-Adapter's release: text padded to max_text_len, frames to the
longest, Hugging Face's own forward with logits for the whole sequence in float32, and generate() to
validate. For DeepMLF, as its release: one stream of padded text and fusion tokens with a graph from
the bottom, logits for every slot, in evaluation too, and Hugging Face's GELU. For the others the
same model on such padded batches. Texts are tokenised again in each batch, AdamW is not fused,
which counts where much is trained, and freed memory goes back to Linux (model.py, hold_memory).
Both ways run in one process by turns, on the CPU in float32 (or bfloat16 by --dtype); memory is
that of a process of its own, above the loaded model (Linux). Times are only worth something as the
ratio of the two.
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import NewGELUActivation

import adapters
from adapters import regularise
from baselines import build_baseline
from configurator import configure, knobs_of
from data import Feed, convert, epoch_order, open_corpus
from eval import markdown_table
from lm import FrozenLM, TextEncoder
from losses import deepmlf_loss
from model import (
    CrossSent,
    DeepMLF,
    PseudoTokenLM,
    build_adapter,
    build_av_encoder,
    devices,
    hold_memory,
)
from prompts import Prompt

shapes = 'simsv2'              # of the clips: a row of SHAPES
vs = 'plain'                   # 'plain' way, 'without' GMRA, 'start' or 'paper': see the docstring
gpu = [989, 450, 50]           # 'paper': TFLOP/s in bfloat16, GB/s in a node, GB/s beyond (an H100)
gpu_share = 0.45               # 'paper': of these TFLOP/s, what is reached
lm_shape = []                  # of the random LM: layers, width, heads, vocabulary; []: see SIZES
large_shape = [32, 4096, 32, 32000]  # of the LM whose FLOPs alone are counted: Llama-2-7B's
bench_clips = 1000             # clips of the random corpus
bench_batches = 6              # of these, batches that are timed, spread over all lengths
warmup_rounds = 20             # 'without': forwards that do not count
timed_rounds = 50              # 'without': forwards that do
start_clips = [1000, 16000]    # 'start': clips of the corpora, MOSEI's number last
repeats = 5                    # timed rounds of both ways by turns, after one that does not count
only = ''                      # for bench.py's own child process: 'ours train', 'plain valid', ..
# --------------------------------------------------------------------------------------------------
_here = os.path.dirname(os.path.abspath(__file__))
_argv = [arg if arg.startswith('-') or os.path.exists(arg) else os.path.join(_here, arg)
         for arg in sys.argv[1:]]
if all(arg.startswith('-') for arg in _argv):
    _argv.insert(0, os.path.join(_here, 'config', 'mse_simsv2.py'))
_knobs = knobs_of(os.path.join(_here, 'train.py')) | knobs_of(__file__)
c = configure(_knobs | dict(__file__=__file__), _argv, echo='--only' not in ' '.join(_argv))

SHAPES = dict(  # audio frames, width; video frames, width; label range
    mosi=(375, 5, 500, 20, 3),
    simsv2=(925, 25, 232, 177, 1),
    mosei=(500, 74, 375, 35, 3),
    sims=(400, 33, 55, 709, 1))
SIZES = dict(  # of the random text model by system
    mse=[8, 512, 8, 32000],        # a Llama
    cmpta=[8, 512, 8, 32000],
    deepmlf=[12, 768, 12, 50257])  # GPT-2-base
ROBERTA_BASE = [12, 768, 12, 50265]
shape = c['lm_shape'] or SIZES.get(c['system'], ROBERTA_BASE)

counts = ('repeats', 'timed_rounds', 'bench_clips', 'bench_batches')
gpu_is_odd = len(c['gpu']) != 3 or min(c['gpu']) <= 0 or not 0 < c['gpu_share'] <= 1
wrong = [
    (c['shapes'] not in SHAPES,
     f"shapes={c['shapes']!r} is none of {', '.join(SHAPES)}."),
    (c['vs'] not in ('plain', 'without', 'start', 'paper'),
     f"vs={c['vs']!r} is none of plain, without, start, paper."),
    (c['vs'] == 'paper' and c['system'] != 'mse',
     "vs='paper' counts MSE-Adapter: take one of its configs."),
    (c['vs'] == 'without' and c['system'] != 'crosssent',
     "vs='without' is for CrossSent, with and without its GMRA."),
    (c['system'] in ('lm', 'av'),
     f"system={c['system']!r} is a step on the way and not measured: take a config of a system."),
    (c['resample'] == 'words',
     "the random clips have no words of their own: take another resample."),
    (c['label'] != 'label',
     "the random clips have a score and no classes: take a regression config."),
    (c['dtype'] not in ('auto', 'float32', 'bfloat16'),
     "dtype is 'float32' or 'bfloat16' here."),
    (gpu_is_odd,
     "gpu is three numbers above 0, gpu_share in (0, 1]."),
    (len(shape) != 4 or len(c['large_shape']) != 4,
     "lm_shape and large_shape are layers, width, heads, vocabulary."),
    (min(c[k] for k in counts) < 1,
     "repeats, timed_rounds, bench_clips and bench_batches are at least 1."),
]
for is_wrong, sentence in wrong:
    if is_wrong:
        sys.exit(f'bench: {sentence}')
c = c | dict(train_fraction=1.0, shuffle_streams=False, standardise=True)


def autocast():
    """ bfloat16 where the knobs want it. """
    return torch.autocast('cpu', torch.bfloat16) if c['dtype'] == 'bfloat16' else nullcontext()


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


def build(shape):
    """ Our model and its Feed on a random text model of a shape. """
    tokenizer, prompt = Words(shape[-1]), None
    is_frozen = c['text_features'] == 'frozen'
    if c['system'] in ('mse', 'cmpta'):
        lm = FrozenLM(random_lm('llama', *shape))
        prompt = Prompt(c, corpus.labels['label'], tokenizer)
        model = PseudoTokenLM(lm, build_adapter(c, corpus.widths, lm), prompt, c)
    elif c['system'] == 'deepmlf':
        lm = FrozenLM(random_lm('gpt2', *shape))
        model = DeepMLF(lm, build_av_encoder(c, corpus.widths), c)
    elif c['system'] == 'crosssent':
        encoder = TextEncoder(random_lm('roberta', *shape))
        model = CrossSent(encoder, tokenizer, corpus.widths, c)
    else:
        encoder = None if is_frozen else TextEncoder(random_lm('roberta', *shape))
        model = build_baseline(c, corpus, encoder, shape[1], tokenizer)
    feed = Feed(corpus, c | dict(text_features='tuned'), tokenizer, 'cpu', prompt)
    if is_frozen:  # hidden states out of nowhere
        rng = np.random.default_rng(1)
        feed.text = {}
        for split, texts in feed.tokens.items():
            feed.text[split] = [rng.standard_normal((len(t), shape[1]), np.float32).astype('f2')
                                for t in texts]
    return model, feed


# --------------------------------------------------------------------------------------------------
# The plain way

def fixed(split, some):
    """ Batches (lists of clips) of a split with everything padded to the longest. Texts are
    tokenised here, each time. """
    longest = dict(audio=SHAPES[c['shapes']][0], vision=SHAPES[c['shapes']][2])
    T = c['max_text_len']
    for index in some:
        batch, B = feed(split, index), len(index)
        Words(shape[-1])([corpus.text(split)[n] for n in index])
        if c['system'] in ('mse', 'cmpta'):  # the text alone, padded on the left
            first = len(model.prompt.before) + c['n_pseudo']
            n_after = len(model.prompt.after)
            own = [batch['tokens'][b, first:batch['text_len'][b] - n_after] for b in range(B)]
            batch['text'] = torch.stack([F.pad(t, (T - len(t), 0)) for t in own])  # [B,T]
        else:
            more = T - batch['tokens'].shape[1]
            batch['tokens'] = F.pad(batch['tokens'], (0, more))  # [B,T]
            batch['text_mask'] = F.pad(batch['text_mask'], (0, more), value=False)  # [B,T]
            if 'text' in batch:
                batch['text'] = F.pad(batch['text'], (0, 0, 0, more))  # [B,T,D]
            places = torch.arange(B * T).view(B, T)[:, :-1]  # [B,T-1]
            batch['targets'] = places[batch['text_mask'][:, 1:]]  # [n]
        for m, S in longest.items():
            batch[m] = F.pad(batch[m], (0, 0, 0, S - batch[m].shape[1]))  # [B,S,d]
            batch[m + '_len'] = torch.full_like(batch[m + '_len'], S)
            batch[m + '_mask'] = torch.ones(batch[m].shape[:2], dtype=torch.bool)  # [B,S]
        yield batch | dict(epoch=torch.tensor(1))


def plain_prompt(batch):
    """ Prompt, pseudo tokens and padded text, embedded [B,L,D], as MSE-Adapter's release has
    them. """
    embed, B = model.lm.hf.get_input_embeddings(), len(batch['text'])
    text = embed(batch['text'])  # [B,T,D]
    everything = torch.ones(text.shape[:2], dtype=torch.bool)  # [B,T]
    pseudo = model.adapter(batch, text, everything)  # [B,P,D]
    before = embed(torch.tensor(model.prompt.before)).expand(B, -1, -1)
    after = embed(torch.tensor(model.prompt.after)).expand(B, -1, -1)
    return torch.cat([before, pseudo, text, after], 1)  # [B,L,D]


def plain_deepmlf(batch):
    """ DeepMLF's release: one stream, every slot through everything. -> its loss, logits of all
    slots of the text included. """
    lm, (B, T), n_f = model.lm, batch['tokens'].shape, c['n_fusion']
    z, z_mask = model.av_encoder(batch)  # [B,m,d], [B,m]
    x = lm.embed(batch['tokens'])  # [B,T,D]
    if model.training:
        x = regularise(x, batch['text_len'], c['text_reg'], c['text_reg_rate'],
                       c['text_reg_prob'], c['text_reg_draw'])
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
    return deepmlf_loss(out, batch['label'], model.weights)[1] + c['weight_lm'] * lm_loss


def plain_loss(batch):
    """ A batch's loss the plain way, by system. """
    if c['system'] == 'deepmlf':
        return plain_deepmlf(batch)
    if c['system'] not in ('mse', 'cmpta'):
        return model(batch)['loss']
    x = plain_prompt(batch)  # [B,L,D]
    ids = model.trie_answer[model.prompt.index(batch['label'])]  # [B,n]
    labels = torch.cat([torch.full(x.shape[:2], -100), ids], 1)  # [B,L+n]
    x = torch.cat([x, model.lm.hf.get_input_embeddings()(ids)], 1)  # [B,L+n,D]
    return model.lm.hf(inputs_embeds=x, labels=labels).loss


def plain_train(some):
    """ Training steps on these batches, the plain way. """
    for batch in fixed('train', some):
        with autocast():
            loss = plain_loss(batch)
        step(loss, 'plain')


@torch.no_grad()
def plain_valid(some):
    """ Predictions of these batches, the plain way. """
    for batch in fixed('valid', some):
        with autocast():
            if c['system'] == 'deepmlf':
                plain_deepmlf(batch)
            elif c['system'] not in ('mse', 'cmpta'):
                model.predict(batch)
            else:
                x = plain_prompt(batch)  # [B,L,D]
                model.lm.hf.generate(
                    inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), do_sample=False,
                    max_new_tokens=model.trie_answer.shape[1], pad_token_id=0, eos_token_id=None)


# --------------------------------------------------------------------------------------------------
# Our way: what train.py and eval.py do

def step(loss, way='ours'):
    """ Back-propagation and the optimizer's step. """
    loss.backward()
    optimizers[way].step()
    optimizers[way].zero_grad(set_to_none=True)


def our_train(some):
    """ Training steps on these batches, as train.py does them. """
    for index in some:
        batch = feed('train', index) | dict(epoch=torch.tensor(1))
        with autocast():
            loss = model(batch)['loss']
        step(loss)


@torch.no_grad()
def our_valid(some):
    """ Predictions of these batches, as eval.py makes them. """
    for index in some:
        batch = feed('valid', index)
        with autocast():
            model.predict(batch)


def call(f, *x, **_):
    """ In the place of checkpoint: nothing is computed again. """
    return f(*x)


def as_written(model, plain):
    """ For the plain way Hugging Face's own GELU, in eight passes over memory, where ours has the
    same function in one; and nothing computed again in the backward pass. """
    if c['system'] != 'deepmlf':
        return
    adapters.checkpoint = call if plain else checkpoint
    for l in range(model.lm.n_layers):
        model.lm.part(l, 'ffw').act = NewGELUActivation() if plain else torch.nn.GELU('tanh')
    for block in model.mm_blocks.values():
        if c['mm_ffw'] == 'full':
            block.ffw.act = NewGELUActivation() if plain else torch.nn.GELU('tanh')


WAYS = {'ours train': our_train, 'plain train': plain_train,
        'ours valid': our_valid, 'plain valid': plain_valid}


def set_up(way):
    model.train('train' in way)
    as_written(model, way.startswith('plain'))
    # as train.py does; a child of the plain way is left alone
    if not (c['only'] and 'plain' in way):
        hold_memory('ours' in way)


def run(way):
    """ One pass of a way over the batches -> seconds. The longest one goes before and does not
    count: memory was the other way's. """
    some = batches[way.split()[1]]
    set_up(way)
    WAYS[way](some[-1:])
    since = time.perf_counter()
    WAYS[way](some)
    return time.perf_counter() - since


# --------------------------------------------------------------------------------------------------
# FLOPs and memory

def needed_flops(shape, feed):
    """
    What the LM and the blocks in it have to compute for a training step on every clip, by count:
    matrix products on real tokens alone, forward, back to the first thing that is trained, and for
    weights that are (tokens before the first pseudo token are counted as the others, a few % too
    much). None for systems without a frozen LM, for other readouts than 'score', and for DeepMLF
    without an LM loss. Left out: MSE-Adapter's adapter (2 % more; at width 1024 CMPTA's BiLSTM over
    925 frames costs more than a small LM), DeepMLF's AV encoder, and its attention, which torch
    does not count on the CPU either.
    """
    layers, D, _, V = shape
    clips = np.concatenate(batches['train'])  # [N]
    n = np.array([len(feed.tokens['train'][i]) for i in clips])  # [N]
    if c['system'] in ('mse', 'cmpta') and c['readout'] == 'score':
        # weights are frozen, so no third pass but in attention, which has two factors; of the last
        # layer keys and values of the prompt, and the rest for the tokens that are read out; logits
        # for these
        ffw, n_out = int(D * 2.6875), max(map(len, feed.prompt.answers))
        n = n + n_out - 1
        linear = (layers - 1) * n * (8 * D * D + 6 * D * ffw) + n * 4 * D * D
        linear = linear + n_out * (4 * D * D + 6 * D * ffw + 2 * D * V)
        # q k and p v; causal, so half of 4 n^2 D
        attention = (layers - 1) * 2 * n * n * D + 4 * n_out * n * D
        return float((2 * linear + 3 * attention).sum())
    if c['system'] != 'deepmlf' or c['mm_ffw'] != 'full' or not c['weight_lm']:
        return None

    n_f = c['n_fusion']
    frames = np.maximum(*(feed.corpus.lengths('train', s)[clips] for s in ('audio', 'vision')))
    m = np.minimum(c['av_len'], frames)  # [N]
    first = min(c['mm_layers'])
    text, fusion = n * 24 * D * D, n_f * 24 * D * D  # a layer's forward
    # text: no graph below the first block
    total = (2 * layers - first) * text + 2 * layers * fusion
    for l in c['mm_layers']:
        # FFW: back to its weights, and its input
        total = total + (2 if l == first else 3) * n * 16 * D * D + 3 * n_f * 16 * D * D
        # GCA
        total = total + 3 * (4 * n_f * D * D + 4 * m * c['av_width'] * D)
    total = total + 2 * (n - 1) * 2 * D * V
    return float(total.sum())


def spent_flops(shape):
    """ What ours spends on that at this shape, counted by torch on the meta device, where nothing
    is computed. """
    with torch.device('meta'):
        lm = FrozenLM(random_lm('llama', *shape))
        big = PseudoTokenLM(lm, build_adapter(c, corpus.widths, lm), feed.prompt, c)
        pseudo = torch.zeros(c['n_pseudo'], lm.width, requires_grad=True)  # [P,D]
        turn = torch.zeros(1, 1, lm.head_width)
    first = len(feed.prompt.before)

    def rope(x, positions):
        # torch 2.6 has no autocast on meta, which Hugging Face's asks for
        return turn, turn

    def read(batch):
        # without the adapter: pseudo tokens out of nowhere, that want a gradient
        x = lm.embed(batch['tokens'])  # [B,L,D]
        before, after = x[:, :first], x[:, first + c['n_pseudo']:]
        x = torch.cat([before, pseudo.expand(len(x), -1, -1), after], 1)  # [B,L,D]
        return x, batch['text_len']

    lm.parts['rope'] = rope
    big.read = read
    with FlopCounterMode(display=False) as counter:
        for index in batches['train']:
            batch = {k: v.to('meta') for k, v in feed('train', index).items()}
            big(batch)['loss'].backward()
    return counter.get_total_flops()


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
# CrossSent's Table 4: what GMRA costs. Forward only, with it and without by turns, at batch 1 and
# at batch 64

def crosssent(layer):
    """ CrossSent on a random RoBERTa; layer 0 is without GMRA. """
    _, d_a, _, d_v, _ = SHAPES[c['shapes']]
    encoder = TextEncoder(random_lm('roberta', *shape))
    widths = dict(audio=d_a, vision=d_v)
    model = CrossSent(encoder, Words(shape[-1]), widths, c | dict(gmra_layer=layer))
    return model.to(device).eval()


def random_batch(B):
    """ B random clips of the longest there are, for CrossSent. """
    S_a, d_a, S_v, d_v, _ = SHAPES[c['shapes']]
    T = c['max_text_len']
    batch = dict(tokens=torch.randint(10, shape[-1], (B, T), device=device))  # [B,T]
    for s, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
        batch[s] = torch.randn(B, S, d, device=device)  # [B,S,d]
    for s, n in (('text', T), ('audio', S_a), ('vision', S_v)):
        batch[s + '_len'] = torch.full((B,), n, device=device)  # [B]
        batch[s + '_mask'] = torch.ones(B, n, dtype=torch.bool, device=device)  # [B,S]
    return batch


@torch.no_grad()
def forward_seconds(model, batch):
    """ Seconds of one prediction, the device's work included. """
    since = time.perf_counter()
    model.predict(batch)
    if device != 'cpu':
        getattr(torch, device).synchronize()
    return time.perf_counter() - since


if c['vs'] == 'without':
    device = next(d for d, is_there in devices().items() if is_there)
    if c['only']:  # the child: memory of one forward at batch 64, the weights included
        before = resident('VmRSS', reset=True)
        forward_seconds(crosssent(int(c['only'])), random_batch(64))
        print(resident('VmHWM') - before)
        sys.exit(0)

    layer_of = {'without': 0, 'with': c['gmra_layer'] or 1}
    models = {way: crosssent(layer) for way, layer in layer_of.items()}
    seconds = {(way, B): [] for B in (1, 64) for way in models}
    for B in (1, 64):
        batch = random_batch(B)
        for i in range(c['warmup_rounds'] + c['timed_rounds']):
            for way, m in models.items():
                seconds[way, B].append(forward_seconds(m, batch))
    took = {key: np.median(rounds[c['warmup_rounds']:]) for key, rounds in seconds.items()}
    count = {way: sum(p.numel() for p in m.parameters()) for way, m in models.items()}
    megabytes = {}
    for way, layer in layer_of.items():
        if device == 'cuda':
            for m in models.values():
                m.to('cpu')
            batch = random_batch(64)
            torch.cuda.reset_peak_memory_stats()
            forward_seconds(models[way].to('cuda'), batch)
            megabytes[way] = torch.cuda.max_memory_allocated() / 2 ** 20
        else:
            megabytes[way] = child_megabytes(layer)

    print(f"CrossSent {shape} at {c['shapes']}, {c['max_text_len']} tokens, {device}, "
          f"{torch.get_num_threads()} threads, {matmul_peak() / 1e9:.0f} GFLOP/s float32 matmul on "
          f"the CPU; median of {c['timed_rounds']} after {c['warmup_rounds']}, by turns")
    rows = [
        ('parameters', 'M', '+7.10 %', {way: count[way] / 1e6 for way in models}),
        ('latency, batch 1', 'ms', '+11.42 %', {way: 1e3 * took[way, 1] for way in models}),
        ('throughput, batch 64', 'clips/s', '-6.46 %', {way: 64 / took[way, 64] for way in models}),
        ('peak memory, batch 64', 'MB', '+1.33 %', megabytes),
    ]
    for what, unit, paper, value in rows:
        more = 100 * (value['with'] / value['without'] - 1)
        print(f"  {what:22s} without {value['without']:9.2f} {unit:7s} "
              f"with {value['with']:9.2f} {unit:7s} {more:+6.2f} %   paper {paper}")
    sys.exit(0)

# --------------------------------------------------------------------------------------------------
# On paper: what a training step of MSE-Adapter takes with LMs that cannot be had here

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
    _, d_a, _, d_v, _ = SHAPES[c['shapes']]
    with torch.device('meta'):
        parts = dict(embed=torch.nn.Embedding(1, D))
        lm = SimpleNamespace(width=D, parts=parts)  # what an adapter asks of an LM
        adapter = build_adapter(c, dict(audio=d_a, vision=d_v), lm)
    trained = sum(p.numel() for p in adapter.parameters())
    tokens = 15 + c['n_pseudo'] + 60  # text, pseudo tokens, prompt and answer
    layer = 2 * D * D + 2 * D * D_kv + 3 * D * ffw
    weights = 2 * layers * layer  # bytes that may be shared
    whole = 2 * V * D * (1 + own_head)  # bytes: embeddings and head
    # kept for going back through frozen linears: what norms, attention and the gated FFW want; or,
    # computing again, a layer's input
    kept = 2 * layers * (8 * D + 3 * ffw) * tokens
    again = 2 * layers * D * tokens + kept / layers

    tera, near, far = c['gpu']
    clips = c['batch_size']  # on a GPU
    share = 8 if in_node else n_gpus  # GPUs that share the weights
    flop = clips * tokens * 4 * layers * layer  # forward, and back to the pseudo tokens
    busy = flop / (tera * 1e12 * c['gpu_share'])  # s
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


if c['vs'] == 'paper':
    tera, near, far = c['gpu']
    rows = []
    for name, lm in LMS.items():
        rows.append([f'{name} x {lm[-1]}'] + on_paper(*lm, in_node='node' in name))
    print(f"MSE-Adapter at {c['shapes']}, {c['batch_size']} clips a GPU and step, "
          f"{c['gpu_share']:.0%} of {tera} TFLOP/s, {near} GB/s in a node, {far} beyond\n")
    print(markdown_table([
        'LM x GPUs',
        'trained',
        'LM a GPU',
        'adapter, its gradient and moments',
        'activations: kept, with checkpoint_lm',
        'computing: kept, with checkpoint_lm',
        'gathering weights: kept, with checkpoint_lm',
        'gradients'], rows))
    sys.exit(0)

# --------------------------------------------------------------------------------------------------
# From process start to the first step: train.py on a converted corpus, system='late' on random
# features, until it prints a step

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


if c['vs'] == 'start':
    for n in c['start_clips']:
        with tempfile.TemporaryDirectory() as folder:
            _, rate = random_corpus(folder, (n, n // 8, n // 4), 50, 74, 50, 35, 3)
            hf = f'{folder}/run/hf'
            argv = [os.path.join(_here, 'train.py'),
                    os.path.join(_here, 'config', 'baseline_late.py'),
                    f'--corpus={folder}/random', f'--out_dir={folder}/run', '--log_interval=1',
                    '--device=cpu', '--lm_vocab=4000']
            # makes a tokenizer, and writes what encoder it wants: the timed ones load both
            first_line(argv, '  step ')
            encoder_config = transformers.AutoConfig.from_pretrained(hf)
            transformers.AutoModel.from_config(encoder_config).save_pretrained(hf)
            argv += ['--fresh=True', f'--lm={hf}']
            bare = ['-c', f"import sys; sys.path.insert(0, {_here!r}); "
                          "import torch, transformers, matplotlib.pyplot, safetensors.torch; "
                          f"from lm import load_encoder; load_encoder({hf!r}); print('there')"]
            # by turns: a machine that is slow for a while is slow for both
            took = [(first_line(argv, '  step '), first_line(bare, 'there'))
                    for _ in range(c['repeats'])]
            whole, bare = np.array(took).T  # [repeats] each
            print(f"{n} clips to train on: first step {np.median(whole - bare):.1f} s "
                  f"(+-{np.ptp(whole - bare) / 2:.1f}) after imports and the loading of an encoder "
                  f"of 3 x 64 ({np.median(bare):.1f} s); converted at {rate:.0f} MB/s; "
                  f"median of {c['repeats']}")
    sys.exit(0)

# --------------------------------------------------------------------------------------------------
# Ours and plain by turns

with tempfile.TemporaryDirectory() as _folder:
    sizes = (c['bench_clips'], c['bench_clips'], 2)
    corpus, _ = random_corpus(_folder, sizes, *SHAPES[c['shapes']])
    model, feed = build(shape)
    batches = {}
    # in the middle of each of bench_batches equal parts of what an epoch has, by cost
    for split in ('train', 'valid'):
        order = epoch_order(feed.cost(split), c['batch_size'], 0, None)
        order = order[:c['bench_clips'] // c['batch_size'] or 1]  # full ones
        n = min(c['bench_batches'], len(order))
        batches[split] = [order[int((i + 0.5) * len(order) / n)] for i in range(n)]
    n_clips = {split: sum(map(len, batches[split])) for split in batches}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = dict(ours=torch.optim.AdamW(trained, lr=1e-4, fused=True),
                      plain=torch.optim.AdamW(trained, lr=1e-4))
    if c['only']:  # the child
        before = resident('VmRSS', reset=True)
        run(c['only'])
        print(resident('VmHWM') - before)
        sys.exit(0)

    seconds = {way: [] for way in WAYS}
    for i in range(c['repeats'] + 1):
        for way in WAYS:
            took = run(way)
            if i:
                seconds[way].append(took)
        if i == 0:
            peak = {d: matmul_peak(d) for d in (torch.float32, torch.bfloat16)}
    megabytes = {way: child_megabytes(way) for way in WAYS}
    set_up('ours train')
    with FlopCounterMode(display=False) as counter:
        our_train(batches['train'])
    spent = counter.get_total_flops()
    fast = peak[torch.bfloat16 if c['dtype'] == 'bfloat16' else torch.float32]

    n_tokens = np.mean([len(feed.tokens['train'][i]) for i in np.concatenate(batches['train'])])
    print(f"{c['system']} at {c['shapes']}: {len(batches['train'])} batches of {c['batch_size']} "
          f"from {c['bench_clips']} clips, random text model {shape}, texts of {n_tokens:.0f} "
          f"tokens; {torch.get_num_threads()} threads, matmul {peak[torch.float32] / 1e9:.0f} "
          f"GFLOP/s float32, {peak[torch.bfloat16] / 1e9:.0f} bfloat16")
    for what in ('train', 'valid'):
        t = {way: np.median(seconds[f'{way} {what}']) for way in ('ours', 'plain')}
        spread = {way: 50 * np.ptp(seconds[f'{way} {what}']) / t[way] for way in t}
        rate = {way: n_clips[what] / t[way] for way in t}
        m = {way: megabytes[f'{way} {what}'] for way in t}
        print(f"  {what}: {t['plain'] / t['ours']:.2f} x plain's speed "
              f"(ours {rate['ours']:.1f} clips/s, "
              f"{1e3 * t['ours'] / len(batches[what]):.0f} ms a batch, +-{spread['ours']:.0f} %; "
              f"plain {rate['plain']:.1f} +-{spread['plain']:.0f} %; median of {c['repeats']}), "
              f"peak memory above the model {m['ours']:.0f} MB, "
              f"{100 * m['ours'] / m['plain']:.0f} % of plain's {m['plain']:.0f} MB")
    took = np.median(seconds['ours train'])
    print(f"  training: {spent / 1e9:.0f} GFLOP counted without attention's and LSTMs', "
          f"{100 * spent / took / fast:.0f} % of the matmul peak")
    if need := needed_flops(shape, feed):
        over, large = spent / need, ''
        if feed.prompt:
            over = spent_flops(shape) / need
            large_need = needed_flops(c['large_shape'], feed)
            large_over = spent_flops(c['large_shape']) / large_need
            large = f", {large_over:.2f} at {c['large_shape']}"
        print(f"  {100 * need / took / fast:.0f} % of the peak on the {need / 1e9:.0f} GFLOP that "
              f"the result needs; spent over needed: {over:.2f} here{large}")
