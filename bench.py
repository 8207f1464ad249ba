"""
How fast a system is here, and against the plain way of doing the same: training step, validation pass, peak memory, share
of this machine's own matmul peak, and the FLOPs spent over those that the result needs.

    python bench.py                                      MSE-Adapter at CH-SIMS v2's shapes, a random Llama of 8 x 512
    python bench.py config/cmpta_simsv2.py --cmpta_width=256     another config; any knob of train.py, or of those below
    python bench.py config/crosssent_mosei.py --shapes=mosei     CrossSent with GMRA and without: the paper's Table 4

Clips and LM are random. Widths and longest lengths are the corpus's; lengths are assumed: text lognormal with mean 15 words,
frames uniform from a quarter to all. The plain way is what one writes first, and what MSE-Adapter's release does: text padded
to max_text_len, frames to the longest, Hugging Face's own forward with logits for the whole sequence in float32, and
generate() for validation. Both ways run in one process by turns, on the CPU in float32; memory is that of a process of its
own, above the loaded model (Linux). Times are only worth something as the ratio of the two.
"""
import ast
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from configurator import configure
from data import Feed, convert, epoch_order, open_corpus
from lm import FrozenLM, TextEncoder
from model import CrossSent, PseudoTokenLM, build_adapter, devices
from prompts import Prompt

shapes = 'simsv2'              # of the clips: a row of SHAPES
lm_shape = [8, 512, 8, 32000]  # of the random Llama: layers, width, heads, vocabulary
large_shape = [32, 4096, 32, 32000]  # of the one whose FLOPs are counted, without a weight in memory: Llama-2-7B's
bench_clips = 96               # clips; training steps and validation passes go through all of them
encoder_shape = [12, 768, 12, 50265]  # CrossSent: layers, width, heads, vocabulary of the random RoBERTa: base
warmup_rounds = 20             # CrossSent: forwards that do not count
timed_rounds = 50              # CrossSent: forwards that do
repeats = 5                    # timed rounds of both ways by turns, after one that does not count
only = ''                      # for the process that bench.py starts itself: 'ours train', 'plain valid', ..
# ---------------------------------------------------------------------------------------------------------
_here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(_here, 'train.py'), encoding='utf-8') as f: _source = f.read()
_block = ast.parse(_source[:_source.index('# -----')]).body
_knobs = {n.targets[0].id: ast.literal_eval(n.value) for n in _block if isinstance(n, ast.Assign)}     # train.py's own
_argv = [a if a.startswith('-') or os.path.exists(a) else os.path.join(_here, a) for a in sys.argv[1:]]
if all(a.startswith('-') for a in _argv): _argv.insert(0, os.path.join(_here, 'config', 'mse_simsv2.py'))
_own = {k: globals()[k] for k in ('shapes', 'lm_shape', 'large_shape', 'bench_clips', 'encoder_shape', 'warmup_rounds',
                                'timed_rounds', 'repeats', 'only')}
c = configure(_knobs | _own | dict(__file__=__file__), _argv, echo='--only' not in ' '.join(_argv))
SHAPES = dict(   # audio frames, width; video frames, width; label range
    mosi=(375, 5, 500, 20, 3), simsv2=(925, 25, 232, 177, 1), mosei=(500, 74, 375, 35, 3), sims=(400, 33, 55, 709, 1))
if c['shapes'] not in SHAPES: sys.exit(f"bench: shapes={c['shapes']!r} is none of {', '.join(SHAPES)}.")
if c['system'] not in ('mse', 'cmpta', 'crosssent'): sys.exit(f"bench: system={c['system']!r} is not measured here yet: 'mse', 'cmpta' and 'crosssent' are.")
if c['resample'] == 'words': sys.exit("bench: the random clips have no words of their own: take another resample.")
if c['label'] != 'label': sys.exit("bench: the random clips have a score and no classes: take a regression config.")


class Words:
    """ A stand-in for a tokenizer: a token a word, a digit or two Chinese characters, its number a checksum. """
    eos_token_id, bos_token_id, pad_token_id, unk_token_id = 2, 1, None, 0
    def __init__(self, vocabulary): self.vocabulary = vocabulary
    def __call__(self, texts, **_):
        word = lambda w: 10 + zlib.crc32(w.encode()) % (self.vocabulary - 10)
        return {'input_ids': [[word(w) for w in re.findall(r'[A-Za-z]+|[\u4e00-\u9fff]{1,2}|[^\sA-Za-z]', t)] for t in texts]}
    def decode(self, ids): return ''


def llama(layers, width, heads, vocabulary):
    """ A random Llama of this shape; its FFW is as wide as Llama-2's in proportion. """
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=int(width * 2.6875), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048))


def random_corpus(folder):
    """ Random clips of the shapes, as an M-SENA pickle that walks the usual road. """
    import pickle
    S_a, d_a, S_v, d_v, limit = SHAPES[c['shapes']]
    rng, N, source = np.random.default_rng(0), c['bench_clips'], {}
    for split, n in (('train', N), ('valid', N), ('test', 2)):
        n_words = np.clip(rng.lognormal(np.log(15) - 0.18, 0.6, n), 1, 100).astype(int)          # mean 15
        source[split] = dict(
            raw_text=[' '.join(''.join(rng.choice(list('abcdefghij'), 5)) for _ in range(k)) for k in n_words],
            regression_labels=rng.uniform(-limit, limit, n).round(1).astype('f4'))
        for m, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
            length = rng.integers(S // 4, S + 1, n)
            x = rng.normal(size=(n, S, d)).astype('f4') * (np.arange(S) < length[:, None])[..., None]
            source[split] |= {m: x, m + '_lengths': length.tolist()}
    with open(os.path.join(folder, 'random.pkl'), 'wb') as f: pickle.dump(source, f, protocol=4)
    convert(os.path.join(folder, 'random.pkl'), os.path.join(folder, 'random'), label_range=(-limit, limit))
    return open_corpus(os.path.join(folder, 'random'))


def build(shape):
    """ Our model and its Feed on a random LM of a shape. """
    lm, tokenizer = FrozenLM(llama(*shape)), Words(shape[-1])
    prompt = Prompt(c, corpus.labels['label'], tokenizer)
    model = PseudoTokenLM(lm, build_adapter(c, corpus.widths, lm), prompt, c)
    return model, Feed(corpus, c, tokenizer, 'cpu', prompt)


# ---------------------------------------------------------------------------------------------------------
# The plain way

def fixed(split):
    """ All batches as the release makes them, once and not timed: text padded on the left to max_text_len, frames to the
    longest of the corpus, clips in the corpus's order. """
    for i in range(0, c['bench_clips'], c['batch_size']):
        yield fixed_batch(split, np.arange(i, min(i + c['batch_size'], c['bench_clips'])))


def fixed_batch(split, index):
    batch, prompt, P, T = feed(split, index), model.prompt, c['n_pseudo'], c['max_text_len']
    first = len(prompt.before) + P
    own = [batch['tokens'][b, first:batch['text_len'][b] - len(prompt.after)] for b in range(len(index))]
    batch['text'] = torch.stack([torch.nn.functional.pad(t, (T - len(t), 0)) for t in own])      # [B,50]
    for m, S in (('audio', SHAPES[c['shapes']][0]), ('vision', SHAPES[c['shapes']][2])):
        batch[m] = torch.nn.functional.pad(batch[m], (0, 0, 0, S - batch[m].shape[1]))
    return batch


def plain_prompt(model, batch):
    embed, B = model.lm.hf.get_input_embeddings(), len(batch['text'])
    text = embed(batch['text'])                                                                  # [B,50,D]
    pseudo = model.adapter(batch, text, torch.ones(text.shape[:2], dtype=torch.bool))            # [B,P,D]
    constant = lambda ids: embed(torch.tensor(ids)).expand(B, -1, -1)
    return torch.cat([constant(model.prompt.before), pseudo, text, constant(model.prompt.after)], 1)


def plain_loss(model, batch):
    x = plain_prompt(model, batch)
    ids = model.trie_answer[model.prompt.index(batch['label'])]                                  # [B,n]
    labels = torch.cat([torch.full(x.shape[:2], -100), ids], 1)                                  # [B,L+n]
    return model.lm.hf(inputs_embeds=torch.cat([x, model.lm.hf.get_input_embeddings()(ids)], 1), labels=labels).loss


@torch.no_grad()
def plain_valid(model, feed):
    for batch in plain_batches['valid']:
        x = plain_prompt(model, batch)
        model.lm.hf.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), do_sample=False, pad_token_id=0,
                             max_new_tokens=model.trie_answer.shape[1], eos_token_id=None)


def plain_train(model, feed):
    for batch in plain_batches['train']: step(model, plain_loss(model, batch))


# ---------------------------------------------------------------------------------------------------------
# Our way: what train.py and eval.py do

def step(model, loss):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def our_train(model, feed):
    for index in epoch_order(feed.cost('train'), c['batch_size'], 0, 0): step(model, model(feed('train', index))['loss'])


@torch.no_grad()
def our_valid(model, feed):
    for index in epoch_order(feed.cost('valid'), c['batch_size'], 0, None): model.predict(feed('valid', index))


WAYS = {'ours train': our_train, 'plain train': plain_train, 'ours valid': our_valid, 'plain valid': plain_valid}


def run(way):
    model.train('train' in way)
    WAYS[way](model, feed)


def needed_flops(shape, feed, prompt):
    """
    What the LM has to compute for a training step on every clip, by count: matrix products on real tokens alone, forward and
    back to the pseudo tokens (weights are frozen, so no third pass but in attention, which has two factors); of the last
    layer keys and values of the prompt, and the rest for the tokens that are read out; logits for these. The adapter is
    left out: 2 % more for MSE-Adapter, but at width 1024 CMPTA's BiLSTM over 925 frames costs more than a small LM.
    """
    layers, D, _, V = shape
    ffw, total, n_out = int(D * 2.6875), 0.0, max(map(len, prompt.answers))
    for split_tokens in feed.tokens['train']:
        n = len(split_tokens) + n_out - 1
        linear = (layers - 1) * n * (8 * D * D + 6 * D * ffw) + n * 4 * D * D + n_out * (4 * D * D + 6 * D * ffw + 2 * D * V)
        attention = (layers - 1) * 2 * n * n * D + 4 * n_out * n * D          # q k and p v; causal, so half of 4 n^2 D
        total += 2 * linear + 3 * attention
    return total


def spent_flops(shape, feed):
    """ What ours spends on the LM at this shape, counted by torch on the meta device, where nothing is computed. """
    with torch.device('meta'):
        lm = FrozenLM(llama(*shape))
        big = PseudoTokenLM(lm, build_adapter(c, corpus.widths, lm), feed.prompt, c)
        pseudo, first = torch.zeros(c['n_pseudo'], lm.width, requires_grad=True), len(feed.prompt.before)
    def read(batch):   # without the adapter: pseudo tokens out of nowhere, that want a gradient
        x = lm.embed(batch['tokens'])
        return torch.cat([x[:, :first], pseudo.expand(len(x), -1, -1), x[:, first + c['n_pseudo']:]], 1), batch['text_len']
    big.read = read
    with FlopCounterMode(display=False) as counter:
        for index in epoch_order(feed.cost('train'), c['batch_size'], 0, 0):
            batch = {k: v.to('meta') for k, v in feed('train', index).items()}
            big(batch)['loss'].backward()
    return counter.get_total_flops()


def resident(what, reset=False):
    """ MB of memory that this process has now (VmRSS) or had at most (VmHWM) since the last reset. Linux only. """
    if reset:
        with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    with open('/proc/self/status') as f: return next(int(line.split()[1]) / 1024 for line in f if line.startswith(what))


def child_megabytes(only):
    """ What a process of its own prints when it runs `only`: its peak memory, in MB; nan where there is no /proc. """
    if not os.path.exists('/proc/self/clear_refs'): return float('nan')
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], f'--only={only}'], capture_output=True, text=True)
    if done.returncode: sys.exit(f"bench: measuring the memory of {only!r} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout.splitlines()[-1])


def matmul_peak(n=1536):
    """ FLOP/s of a float32 matmul here and now. """
    a, best = torch.randn(n, n), np.inf
    for _ in range(5):
        since = time.perf_counter(); a @ a; best = min(best, time.perf_counter() - since)
    return 2 * n ** 3 / best


# ---------------------------------------------------------------------------------------------------------
# CrossSent's Table 4: what GMRA costs. Forward only, with it and without by turns, at batch 1 and at batch 64

def crosssent(layer):
    """ CrossSent on a random RoBERTa; layer 0 is without GMRA. """
    from transformers import RobertaConfig, RobertaModel
    layers, width, heads, vocabulary = c['encoder_shape']
    torch.manual_seed(0)
    hf = RobertaModel(RobertaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                    intermediate_size=4 * width, max_position_embeddings=514, type_vocab_size=1))
    _, d_a, _, d_v, _ = SHAPES[c['shapes']]
    return CrossSent(TextEncoder(hf), Words(vocabulary), dict(audio=d_a, vision=d_v), c | dict(gmra_layer=layer)).to(device).eval()


def random_batch(B):
    S_a, d_a, S_v, d_v, _ = SHAPES[c['shapes']]
    T, full = c['max_text_len'], lambda n: torch.full((B,), n, device=device)
    batch = dict(tokens=torch.randint(10, c['encoder_shape'][-1], (B, T), device=device), text_len=full(T), text_mask=full(T)[:, None] > torch.arange(T, device=device))
    for s, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
        batch |= {s: torch.randn(B, S, d, device=device), s + '_len': full(S), s + '_mask': full(S)[:, None] > torch.arange(S, device=device)}
    return batch


@torch.no_grad()
def forward_seconds(model, batch):
    since = time.perf_counter()
    model.predict(batch)
    if device != 'cpu': getattr(torch, device).synchronize()
    return time.perf_counter() - since


if c['system'] == 'crosssent':
    device = next(d for d, is_there in devices().items() if is_there)
    if c['only']:   # the child: memory of one forward at batch 64, the weights included
        before = resident('VmRSS', reset=True)
        forward_seconds(crosssent(int(c['only'])), random_batch(64))
        print(resident('VmHWM') - before)
        sys.exit(0)
    models = {'without': crosssent(0), 'with': crosssent(c['gmra_layer'] or 1)}
    seconds = {}
    for B in (1, 64):
        batch = random_batch(B)
        for i in range(c['warmup_rounds'] + c['timed_rounds']):
            for way, m in models.items(): seconds.setdefault((way, B), []).append(forward_seconds(m, batch))
    took = {k: np.median(v[c['warmup_rounds']:]) for k, v in seconds.items()}
    count = {way: sum(p.numel() for p in m.parameters()) for way, m in models.items()}
    megabytes = {}
    for way, layer in (('without', 0), ('with', c['gmra_layer'] or 1)):
        if device == 'cuda':
            for m in models.values(): m.to('cpu')
            batch = random_batch(64)
            torch.cuda.reset_peak_memory_stats(); forward_seconds(models[way].to('cuda'), batch)
            megabytes[way] = torch.cuda.max_memory_allocated() / 2 ** 20
        else: megabytes[way] = child_megabytes(layer)
    print(f"CrossSent {c['encoder_shape']} at {c['shapes']}, {c['max_text_len']} tokens, {device}, {torch.get_num_threads()} threads, "
          f"{matmul_peak() / 1e9:.0f} GFLOP/s float32 matmul on the CPU; median of {c['timed_rounds']} after {c['warmup_rounds']}, by turns")
    for what, without, with_it, unit, paper in (
            ('parameters', count['without'] / 1e6, count['with'] / 1e6, 'M', '+7.10 %'),
            ('latency, batch 1', 1e3 * took['without', 1], 1e3 * took['with', 1], 'ms', '+11.42 %'),
            ('throughput, batch 64', 64 / took['without', 64], 64 / took['with', 64], 'clips/s', '-6.46 %'),
            ('peak memory, batch 64', megabytes['without'], megabytes['with'], 'MB', '+1.33 %')):
        print(f"  {what:22s} without {without:9.2f} {unit:7s} with {with_it:9.2f} {unit:7s} {100 * (with_it / without - 1):+6.2f} %   paper {paper}")
    sys.exit(0)


with tempfile.TemporaryDirectory() as _folder:
    corpus = random_corpus(_folder)
    model, feed = build(c['lm_shape'])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    plain_batches = {split: list(fixed(split)) for split in ('train', 'valid')}
    if c['only']:   # the child
        before = resident('VmRSS', reset=True)
        run(c['only'])
        print(resident('VmHWM') - before)
        sys.exit(0)

    seconds = {way: [] for way in WAYS}
    for i in range(c['repeats'] + 1):
        for way in WAYS:
            since = time.perf_counter()
            run(way)
            if i: seconds[way].append(time.perf_counter() - since)
        if i == 0: peak = matmul_peak()
    megabytes = {way: child_megabytes(way) for way in WAYS}

    lengths = [len(t) for t in feed.tokens['train']]
    print(f"{c['system']} at {c['shapes']}: {c['bench_clips']} clips, batch {c['batch_size']}, random Llama {c['lm_shape']}, prompts of "
          f"{np.mean(lengths):.0f} tokens (plain: {len(feed.prompt.before) + c['n_pseudo'] + c['max_text_len'] + len(feed.prompt.after)}); "
          f"{torch.get_num_threads()} threads, {peak / 1e9:.0f} GFLOP/s float32 matmul")
    for what in ('train', 'valid'):
        t = {way: np.median(seconds[f'{way} {what}']) for way in ('ours', 'plain')}
        spread = {way: np.ptp(seconds[f'{way} {what}']) / t[way] for way in t}
        m = {way: megabytes[f'{way} {what}'] for way in t}
        print(f"  {what}: {t['plain'] / t['ours']:.2f} x plain's speed (ours {c['bench_clips'] / t['ours']:.1f} clips/s +-{50 * spread['ours']:.0f} %, "
              f"plain {c['bench_clips'] / t['plain']:.1f} +-{50 * spread['plain']:.0f} %; median of {c['repeats']}), peak memory above the "
              f"model {m['ours']:.0f} MB, {100 * m['ours'] / m['plain']:.0f} % of plain's {m['plain']:.0f} MB")
    need = needed_flops(c['lm_shape'], feed, feed.prompt)
    print(f"  training: {100 * need / np.median(seconds['ours train']) / peak:.0f} % of the matmul peak on the FLOPs that the result needs; "
          f"FLOPs spent over needed: {spent_flops(c['lm_shape'], feed) / need:.2f} here, "
          f"{spent_flops(c['large_shape'], feed) / needed_flops(c['large_shape'], feed, feed.prompt):.2f} at {c['large_shape']}")
