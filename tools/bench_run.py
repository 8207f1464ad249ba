"""
A system on random clips, run as train.py and eval.py run it, and what tools/bench.py measures of it.
"""
import os
import time

import numpy as np
import torch

from data import epoch_order
from run.machine import hold_memory
from tools.bench_model import RandomFeed, build, torch_dtype


class Run:
    """
    A system on random clips. Its passes run over bench_batches batches of a split, spread over all
    lengths. k: the knobs; corpus: the random corpus.
    """
    def __init__(self, k, corpus):
        self.k = k
        self.corpus = corpus
        self.model, tokenizer = build(k, corpus)
        self.feed = RandomFeed(corpus, k, tokenizer, self.model)
        self.batches = {split: self.spread_out(split) for split in ('train', 'valid')}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def spread_out(self, split):
        """
        Orders an epoch's batches by cost, cuts them into bench_batches equal parts, and returns
        the middle batch of each part: a list of arrays of clips.
        """
        k = self.k
        order = epoch_order(self.feed.cost(split), k['batch_size'], 0, None)
        order = order[:k['bench_clips'] // k['batch_size'] or 1]  # full batches only
        n = min(k['bench_batches'], len(order))
        return [order[int((i + 0.5) * len(order) / n)] for i in range(n)]

    def autocast(self):
        dtype = torch_dtype(self.k)
        return torch.autocast('cpu', dtype, enabled=dtype is not torch.float32)

    def loss(self, batch):
        out = self.model(batch)
        self.model.after_step(batch, out)
        return out['loss']

    def step(self, optimizer, loss_of, batch):
        """ A training step. """
        with self.autocast():
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def passes(self, split, batches):
        """ One pass over the batches: training steps for 'train', predictions for 'valid'. """
        for index in batches:
            batch = self.feed(split, index)
            if split == 'train':
                self.step(self.optimizer, self.loss, batch | dict(epoch=torch.tensor(1)))
            else:
                with torch.no_grad(), self.autocast():
                    self.model.predict(batch)

    def run(self, split):
        """
        Seconds of one pass over the batches of a split, and its CPU seconds. The last batch, the
        most costly one, runs once before, untimed, so that memory allocation is not timed.
        """
        hold_memory()
        self.model.train(split == 'train')
        self.passes(split, self.batches[split][-1:])
        since, cpu_since = time.perf_counter(), time.process_time()
        self.passes(split, self.batches[split])
        return time.perf_counter() - since, time.process_time() - cpu_since


def resident(what, reset=False):
    """
    MB of memory of this process: what='VmRSS' is the current value, 'VmHWM' the largest one since
    the last reset. Linux only.
    """
    if reset:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith(what))


def megabytes_of(function, *arguments):
    """ The peak memory of a call in MB, above that before it; nan without /proc. """
    if not os.path.exists('/proc/self/clear_refs'):
        return float('nan')
    before = resident('VmRSS', reset=True)
    function(*arguments)
    return resident('VmHWM') - before


def matmul_peak(dtype=torch.float32, n=1536):
    """ FLOP/s of an n x n matmul on this machine: the best of five. """
    a, best = torch.randn(n, n).to(dtype), np.inf
    for _ in range(5):
        since = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - since)
    return 2 * n ** 3 / best


def describe(k, run):
    """ The system, its batches, its text model and the machine, in one line. """
    texts = ''
    if run.feed.tokens:
        clips = np.concatenate(run.batches['train'])
        n_tokens = np.mean([len(run.feed.tokens['train'][i]) for i in clips])
        texts = f" random text model {k['lm_shape']}, {n_tokens:.0f} tokens per text on average;"
    return (f"{k['system']} at {k['shapes']}: {len(run.batches['train'])} batches of "
            f"{k['batch_size']} from {k['bench_clips']} clips,{texts} {torch.get_num_threads()} "
            f"threads, matmul {matmul_peak() / 1e9:.0f} GFLOP/s float32, "
            f"{matmul_peak(torch.bfloat16) / 1e9:.0f} bfloat16")
