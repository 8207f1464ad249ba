"""
The checks of tools/gpu_check.sh, one section per process:

    python tools/gpu_check.py parity           each system's loss, gradients and predictions on the
                                               GPU against the CPU, in float32 without TF32
    python tools/gpu_check.py training         in bfloat16 frozen weights keep their bits, and no
                                               step waits for the GPU or a copy to it
    python tools/gpu_check.py compile          torch.compile gives the same loss and gradients
    python tools/gpu_check.py resume CONFIG    train.py, killed and resumed, gives the same bits
    python tools/gpu_check.py speed NAME DTYPE   throughput, memory and share of the matmul peak
    python tools/gpu_check.py compiled NAME    one batch with few LM layers, without and with compile

NAME is a key of LARGE. --rehearse runs a section on the CPU with small models. --scratch=FOLDER is
the folder for random corpora and runs. Each line is printed when its result is known, and a line
with FAILED makes the exit status 1. Clips, texts and weights are random.
"""
import copy
import gc
import json
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from configurator import class_knobs, declared_knobs, run_knobs
from data import Feed, epoch_order, open_corpus
from lm import FrozenLM, TextEncoder
from model import SYSTEMS
from run.finite import FirstBad
from system import System
from tools import device_time
from tools.device_time import by_kind, gigabytes, kernel_seconds, matmul_rate, seconds_of
from tools.random_clips import SHAPES, Words, random_corpus, random_lm

ROOT = Path(__file__).resolve().parent.parent
SMALL_LM = (3, 64, 4, 4000)   # layers, width, heads, vocabulary
SMALL_KNOBS = dict(mm_layers=[1, 3], mm_heads=4, prompt='cn', max_text_len=24)
COMPILED = dict(n_layers=4, mm_layers=[2, 4])   # to compile 32 layers takes more than a minute
LARGE = {
    'gpt2-large': dict(
        family='gpt2', shape=(36, 1280, 20, 50257), config='deepmlf_mosei.py', clips='mosei',
        rows=dict(bfloat16=[256], float32=[256])),
    'llama-7b': dict(
        family='llama', shape=(32, 4096, 32, 32000), config='mse_simsv2.py', clips='simsv2',
        rows=dict(bfloat16=[64, 16], float32=[16])),
}
N_BATCHES = 4      # timed batches of a row, from the shortest to the longest clips
REPEATS = 3        # timed passes over them
N_STEPS = 30       # optimizer steps of the runs that are killed
KILLED_AT = 12     # the step after which they are killed; they save after each fifth step

_words = [arg for arg in sys.argv[1:] if not arg.startswith('--')]
_flags = dict(arg[2:].partition('=')[::2] for arg in sys.argv[1:] if arg.startswith('--'))
if not _words or '--help' in sys.argv:
    print(__doc__)
    sys.exit(0)
REHEARSAL = 'rehearse' in _flags
SCRATCH = Path(_flags.get('scratch', 'out/gpu_check'))
DEVICE = 'cpu' if REHEARSAL else 'cuda'
_started, _failed = time.time(), False


def say(line, ok=None):
    """ Prints a line of the log. ok: whether its check passed; None for a measurement. """
    global _failed
    _failed = _failed or ok is False
    verdict = {True: '  ok', False: '  FAILED', None: ''}[ok]
    print(f"[{time.time() - _started:4.0f} s] {_words[0]}: {line}{verdict}", flush=True)


@contextmanager
def reported(what):
    """ An error in the block becomes a line of the log, and the next check runs. """
    try:
        yield
    except Exception as e:  # of any kind: the other results are worth having
        reason, last = ' '.join(str(e).split())[:300], traceback.extract_tb(e.__traceback__)[-1]
        say(f"{what}: {type(e).__name__} at {last.filename}:{last.lineno}: {reason}", ok=False)
    gc.collect()
    if DEVICE == 'cuda':
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------
# Systems on random clips

def corpus_of(name, n_clips, place):
    """ A corpus of n_clips random clips of these shapes, in a folder named after its place; in a
    rehearsal of short clips. """
    S_a, d_a, S_v, d_v, limit = SHAPES[name]
    if REHEARSAL:
        S_a, S_v = 24, 16
    folder = SCRATCH / f'{place}-{name}'
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'random' / 'meta.json').exists():
        random_corpus(str(folder), (n_clips, 8, 2), S_a, d_a, S_v, d_v, limit)
    return open_corpus(str(folder / 'random'))


def small_systems():
    """ (what to call it, knobs, family of the text model) of each system, with small knobs. """
    common = declared_knobs(ROOT / 'train.py')[0]
    for name, cls in SYSTEMS.items():
        known = common | class_knobs(cls)
        k = known | dict(system=name) | {key: v for key, v in SMALL_KNOBS.items() if key in known}
        for family in ('gpt2', 'llama') if cls.frozen_lm else ('roberta',):
            yield f'{name} on {family}' if cls.frozen_lm else name, k, family


def build(k, corpus, family, shape, dtype=torch.float32, device='cpu'):
    """
    The system that the knobs k describe on a random text model, which is made on `device`, and its
    tokenizer. Frozen weights have this dtype, trained weights float32, as in train.py.
    """
    cls = SYSTEMS[k['system']]
    torch.manual_seed(0)
    if cls.assemble.__func__ is System.assemble.__func__:   # it makes its text model by itself
        return cls.build(k, corpus, str(SCRATCH / k['system']))
    with torch.device(device):
        hf = random_lm(family, *shape)
    tokenizer = Words(shape[-1])
    text_model = FrozenLM(hf.to(dtype)) if cls.frozen_lm else TextEncoder(hf)
    return cls.assemble(k, corpus, text_model, tokenizer), tokenizer


class Training:
    """ A system that is trained as train.py does. """

    def __init__(self, model, tokenizer, corpus, k, dtype, compiled=False):
        self.model, self.dtype = model.to(DEVICE), dtype
        self.feed = Feed(corpus, k, tokenizer, DEVICE, model)
        self.step_model = torch.compile(model) if compiled else model
        groups = model.param_groups()
        self.named = {n: p for g in groups for n, p in zip(g['names'], g['params'])}
        self.optimizer = torch.optim.AdamW(
            [dict(params=g['params'], weight_decay=0.01 * g['decay']) for g in groups], lr=1e-3,
            fused=True)
        self.first_bad = FirstBad(DEVICE)
        order = epoch_order(self.feed.cost('train'), k['batch_size'], 0, None)
        self.batches = [index for index in order if len(index) == k['batch_size']]
        model.train()

    def autocast(self):
        return torch.autocast(DEVICE, self.dtype, enabled=self.dtype is not torch.float32)

    def step(self, index):
        """ An optimizer step on the clips `index` of the train split. """
        batch = self.feed('train', index) | dict(epoch=torch.tensor(1), lm_weight=torch.tensor(1.0))
        with self.autocast():
            out = self.step_model(batch)
        out['loss'].backward()
        self.model.after_step(batch, out)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.first_bad.note(out['terms'] | dict(gradient=norm), 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self):
        """ One pass over all batches. """
        for index in self.batches:
            self.step(index)

    @torch.no_grad()
    def predict(self):
        """ The predictions for all batches, as eval.py makes them. """
        self.model.eval()
        for index in self.batches:
            with self.autocast():
                self.model.predict(self.feed('train', index))
        self.model.train()


# --------------------------------------------------------------------------------------------------
# Correctness

def without_dropout(model):
    """ The model in eval mode, but for LSTMs, which have no dropout: cuDNN needs them in training
    mode for gradients. BatchNorm too stays in training mode. """
    model.eval()
    for module in model.modules():
        if isinstance(module, (nn.LSTM, nn.BatchNorm1d)):
            module.train()
    return model


def outputs(model, batch, forward=None):
    """ (loss, {name: gradient}, predictions) of a batch, on the CPU. """
    model.zero_grad(set_to_none=True)
    out = (model if forward is None else forward)(batch)
    out['loss'].backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        pred = model.predict(batch)['pred'] if model.predicts else out['loss']
    return out['loss'].detach().cpu(), grads, pred.detach().cpu()


def gaps(a, b):
    """ The differences of two outputs: of the loss, of all gradients together, of the gradient that
    differs most, and of the predictions; each as a share of its size in `a`. """
    def share(x, y, least=0.0):
        return float((x - y).norm() / max(float(x.norm()), least, 1e-12))

    if a[1].keys() != b[1].keys():
        raise ValueError("other weights have gradients")
    whole = [torch.cat([v.flatten() for v in grads.values()]) for grads in (a[1], b[1])]
    small = 1e-2 * float(whole[0].norm())   # a bias of keys has the gradient 0 but for rounding
    worst = max(share(v, b[1][n], small) for n, v in a[1].items())
    return share(a[0], b[0]), share(*whole), worst, share(a[2], b[2])


def say_gaps(what, found):
    """ Float32 sums in another order differ by 1e-6 to 1e-5, and TF32 by 3e-4. """
    loss, grads, worst, pred = found
    ok = loss < 1e-4 and pred < 1e-4 and grads < 2e-4 and worst < 1e-2
    say(f"{what}: loss {loss:.0e}, gradients {grads:.0e} (worst {worst:.0e}), predictions "
        f"{pred:.0e}", ok)


def noisy(model):
    """ The model with noise on all trained weights, so that no gradient is 0 at the start. """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    return model


def float32_exactly():
    """ Turns TF32 off: it is on for cuDNN's LSTMs and convolutions by default. """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def check_parity():
    float32_exactly()
    corpus = corpus_of('mosei', 32, _words[0])
    for what, k, family in small_systems():
        with reported(what):
            model, tokenizer = build(k, corpus, family, SMALL_LM)
            here = without_dropout(noisy(model))
            there = without_dropout(copy.deepcopy(here).to(DEVICE))
            both = []
            for model, device in ((here, 'cpu'), (there, DEVICE)):
                batch = Feed(corpus, k, tokenizer, device, model)('train', np.arange(4))
                both.append(outputs(model, batch | dict(epoch=torch.tensor(1))))
            say_gaps(what, gaps(*both))


def waits_of(training):
    """ (where training waits for the GPU in a pass, kinds of copies that are not from pinned
    memory). PyTorch warns of the former, and the profiler names the latter. """
    if DEVICE == 'cuda':
        torch.cuda.set_sync_debug_mode('warn')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        training.train()
    if DEVICE == 'cuda':
        torch.cuda.set_sync_debug_mode('default')
    waits = {f'{w.filename}:{w.lineno}' for w in caught if 'synchroniz' in str(w.message)}
    kernels = kernel_seconds(lambda: training.step(training.batches[0]), DEVICE)
    return sorted(waits), [name for name in kernels if 'Pageable' in name]


def check_training():
    corpus = corpus_of('mosei', 32, _words[0])
    for what, k, family in small_systems():
        with reported(what):
            k |= dict(batch_size=8)
            built = build(k, corpus, family, SMALL_LM, torch.bfloat16)
            training = Training(*built, corpus, k, torch.bfloat16)
            trained = set(training.named)
            before = {n: p.detach().clone() for n, p in training.model.named_parameters()}
            training.train()
            waits, pageable = waits_of(training)
            after = dict(training.model.named_parameters())
            moved = {n for n, p in before.items() if not torch.equal(p, after[n])}
            bad = training.first_bad.sentence()
            say(f"{what}: {len(moved - trained)} of {len(before) - len(trained)} frozen tensors "
                f"changed, {len(moved & trained)} of {len(trained)} trained ones moved; waits: "
                f"{', '.join(waits + pageable) or 'none'}{'; ' * bool(bad)}{bad or ''}",
                ok=moved == trained and not waits and not pageable and not bad)


def check_compile():
    float32_exactly()
    corpus = corpus_of('mosei', 32, _words[0])
    for what, k, family in small_systems():
        if family != 'llama':
            continue   # to compile one system of each kind takes long enough
        with reported(what):
            torch._dynamo.reset()
            model, tokenizer = build(k, corpus, family, SMALL_LM)
            without_dropout(noisy(model)).to(DEVICE)
            feed, compiled = Feed(corpus, k, tokenizer, DEVICE, model), torch.compile(model)
            for index in (np.arange(4), np.arange(4, 9)):   # of different shapes
                batch = feed('train', index) | dict(epoch=torch.tensor(1))
                both = outputs(model, batch), outputs(model, batch, compiled)
                say_gaps(f"{what}, {len(index)} clips", gaps(*both))


# --------------------------------------------------------------------------------------------------
# Killed and resumed

def check_resume(config):
    """ train.py with deterministic=True in bfloat16: once to the end; once killed and resumed. """
    folder = SCRATCH / f'resume-{config}'

    def start(name, *flags):
        argv = [sys.executable, ROOT / 'train.py', ROOT / 'config' / f'{config}.py',
                f'--out_dir={folder / name}', f"--data_dir={folder / 'data'}",
                f'--max_steps={N_STEPS}', '--save_interval=5', '--log_interval=1', '--fresh=True',
                '--deterministic=True', f'--device={DEVICE}', '--dtype=bfloat16', *flags]
        return subprocess.Popen(list(map(str, argv)), text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    def finish(process):
        printed, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(' / '.join(printed.strip().splitlines()[-3:]))

    with reported(config):
        finish(start('whole'))
        process = start('killed')
        for line in process.stdout:
            if re.match(rf'  step +{KILLED_AT}/', line):
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        last = json.loads((folder / 'killed' / 'last.json').read_text())
        saved = last['state']['step']
        finish(start('killed', '--fresh=False', '--resume=True'))
        whole, killed = (load_file(folder / n / 'last.safetensors') for n in ('whole', 'killed'))
        other = [n for n, v in whole.items() if not torch.equal(v, killed[n])]
        kept = json.loads((folder / 'killed' / 'result.json').read_text())['lm_kept']
        say(f"{config}: killed after step {KILLED_AT}, resumed from step {saved} of {N_STEPS}: "
            f"{len(other)} of {len(whole)} tensors differ; frozen LM kept: {kept}",
            ok=not other and saved < N_STEPS and kept in (True, None))


# --------------------------------------------------------------------------------------------------
# Speed

def large_training(name, dtype, batch_size, compiled=False, n_layers=None, **knobs):
    """ The Training of a row of LARGE, with a small LM in a rehearsal. knobs: changed ones. """
    case = LARGE[name]
    shape, batch_size = (SMALL_LM, 4) if REHEARSAL else (case['shape'], batch_size)
    shape = (n_layers or shape[0], *shape[1:])
    argv = [str(ROOT / 'config' / case['config']), f'--batch_size={batch_size}']
    _, k = run_knobs(argv, *declared_knobs(ROOT / 'train.py'), SYSTEMS)
    if REHEARSAL:
        k |= {key: v for key, v in SMALL_KNOBS.items() if key in k}
    k |= {key: v for key, v in knobs.items() if key in k}
    largest = max(max(sizes) for sizes in case['rows'].values())
    corpus = corpus_of(case['clips'], 16 if REHEARSAL else N_BATCHES * largest, 'large')
    built = build(k, corpus, case['family'], shape, dtype, DEVICE)
    return Training(*built, corpus, k, dtype, compiled)


def measure_row(name, dtype_name, batch_size, peak):
    """ Measures a row of LARGE: training, evaluation, and where the time of a step goes. """
    dtype = getattr(torch, dtype_name)
    training = large_training(name, dtype, batch_size)
    places = np.linspace(0, len(training.batches) - 1, N_BATCHES).astype(int)
    batches = training.batches = [training.batches[i] for i in places]   # spread over all lengths
    n_clips = sum(map(len, batches))
    tokens = training.feed.tokens['train']
    lengths = [[len(tokens[i]) for i in index] for index in batches]
    n_tokens = sum(map(sum, lengths))
    n_padded = sum(len(own) * max(own) for own in lengths)
    what = f"{name}, {dtype_name}, batch {len(batches[0])}"
    say(f"{what}: {n_tokens / n_clips:.1f} text tokens per clip, prompt included; padded "
        f"{n_padded / n_tokens:.2f} times; weights {gigabytes(DEVICE):.1f} GB")

    with FlopCounterMode(display=False) as counter:
        training.train()
    flops = counter.get_total_flops()
    device_time.reset_peak(DEVICE)
    took = [seconds_of(training.train, DEVICE) for _ in range(REPEATS)]
    seconds = float(np.median(took))
    say(f"{what}: training {n_clips / seconds:.1f} clips/s, +-{50 * np.ptp(took) / seconds:.0f} %, "
        f"{n_tokens / seconds:.0f} tokens/s, peak memory {gigabytes(DEVICE, peak=True):.1f} GB")
    say(f"{what}: training {flops / seconds / 1e12:.1f} TFLOP/s, "
        f"{100 * flops / seconds / peak[dtype_name]:.1f} % of the {dtype_name} matmul peak")

    training.predict()
    seconds = float(np.median([seconds_of(training.predict, DEVICE) for _ in range(REPEATS)]))
    say(f"{what}: evaluation {n_clips / seconds:.1f} clips/s")

    middle = batches[len(batches) // 2]
    seconds = seconds_of(lambda: training.step(middle), DEVICE)
    kernels = kernel_seconds(lambda: training.step(middle), DEVICE)
    busy = sum(kernels.values())
    say(f"{what}: one step of {1e3 * seconds:.0f} ms, the GPU is busy for {1e3 * busy:.0f} ms: "
        f"{by_kind(kernels)}")
    for kernel in sorted(kernels, key=kernels.get, reverse=True)[:8]:
        say(f"  {kernels[kernel] / busy:6.1%}  {kernel[:100]}")


def measure_speed(name, dtype_name):
    """ Measures the rows of a model of LARGE that have this dtype. """
    float32_exactly()
    n = 512 if REHEARSAL else 8192
    peak = {d: matmul_rate(getattr(torch, d), n, DEVICE) for d in ('bfloat16', 'float32')}
    card = 'CPU' if DEVICE == 'cpu' else torch.cuda.get_device_name()
    say(f"{card}, torch {torch.__version__}: matmul of {n} x {n}: {peak['bfloat16'] / 1e12:.1f} "
        f"TFLOP/s bfloat16, {peak['float32'] / 1e12:.1f} float32")
    for batch_size in LARGE[name]['rows'][dtype_name]:
        with reported(f'{name}, {dtype_name}, batch {batch_size}'):
            measure_row(name, dtype_name, batch_size, peak)


def measure_compiled(name):
    """ Measures steps on one batch of middle length, with few layers of the LM. """
    batch_size = LARGE[name]['rows']['bfloat16'][0]
    for compiled in (False, True):
        how = 'compiled' if compiled else 'not compiled'
        what = f"{name}, {COMPILED['n_layers']} layers, bfloat16, batch {batch_size}, {how}"
        with reported(what):
            training = large_training(name, torch.bfloat16, batch_size, compiled, **COMPILED)
            index = training.batches[len(training.batches) // 2]
            first = seconds_of(lambda: training.step(index), DEVICE)
            say(f"{what}: first step {first:.1f} s")
            device_time.reset_peak(DEVICE)
            took = [seconds_of(lambda: training.step(index), DEVICE) for _ in range(8)]
            say(f"{what}: {1e3 * np.median(took):.0f} ms per step (least {1e3 * min(took):.0f}), "
                f"peak memory {gigabytes(DEVICE, peak=True):.1f} GB")


SECTIONS = dict(parity=check_parity, training=check_training, compile=check_compile,
                resume=check_resume, speed=measure_speed, compiled=measure_compiled)

if __name__ == '__main__':
    if DEVICE == 'cuda' and not torch.cuda.is_available():
        sys.exit("gpu_check: this machine has no CUDA GPU: add --rehearse to try it on the CPU.")
    SECTIONS[_words[0]](*_words[1:])
    sys.exit(int(_failed))
