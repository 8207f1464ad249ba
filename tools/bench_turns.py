"""
tools/bench.py --vs=plain: ours and the plain implementation, alternately in one process.
"""
import os
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import SYSTEMS
from run.machine import hold_memory
from tools.bench_model import torch_dtype
from tools.bench_plain import plain_way
from tools.bench_run import Run, describe, matmul_peak, megabytes_of
from tools.random_clips import SHAPES, Words, random_corpus


class Race(Run):
    """ A system on random clips in two ways, ours and the plain implementation. """
    ways = 'ours train', 'plain train', 'ours valid', 'plain valid'

    def __init__(self, k, corpus):
        super().__init__(k, corpus)
        self.plain = plain_way(SYSTEMS[k['system']])
        trained = self.optimizer.param_groups[0]['params']
        self.plain_optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def padded(self, split, index):
        """ A batch with texts and frames padded to the longest. Tokenises its texts each time. """
        batch, k = self.feed(split, index), self.k
        if self.feed.tokens:
            texts = self.corpus.text(split)
            Words(k['lm_shape'][-1])([texts[i] for i in index])
        batch |= self.plain.pad(k, self.model, batch)
        S_a, _, S_v, _, _ = SHAPES[k['shapes']]
        for m, S in (('audio', S_a), ('vision', S_v)):
            if m in self.feed.streams:
                batch[m] = F.pad(batch[m], (0, 0, 0, S - batch[m].shape[1]))  # [B,S,d]
                batch[m + '_len'] = torch.full_like(batch[m + '_len'], S)  # [B]
                batch[m + '_mask'] = torch.ones(batch[m].shape[:2], dtype=torch.bool)  # [B,S]
        return batch | dict(epoch=torch.tensor(1))

    def plain_passes(self, split, batches):
        """ As `passes`, with the plain implementation. """
        for index in batches:
            batch = self.padded(split, index)
            if split == 'train':
                self.step(self.plain_optimizer, self.plain_loss, batch)
            else:
                with torch.no_grad(), self.autocast():
                    self.plain.predict(self.model, batch)

    def plain_loss(self, batch):
        return self.plain.loss(self.model, batch)

    def seconds(self, way):
        """ Seconds of one pass of a way over its batches, as Run.run measures them. """
        who, split = way.split()
        self.plain.use_plain_parts(self.model, who == 'plain')
        if who == 'ours':
            return self.run(split)[0]
        # a process that measures the memory of the plain way keeps the default allocator
        if not self.k['only']:
            hold_memory(False)
        self.model.train(split == 'train')
        self.plain_passes(split, self.batches[split][-1:])
        since = time.perf_counter()
        self.plain_passes(split, self.batches[split])
        return time.perf_counter() - since

    def counted_flops(self):
        """ FLOPs of our training steps, as torch counts them. """
        self.plain.use_plain_parts(self.model, False)
        self.model.train()
        with FlopCounterMode(display=False) as counter:
            self.passes('train', self.batches['train'])
        return counter.get_total_flops()


def child_megabytes(only):
    """ The peak memory in MB of a separate process that runs `only`. """
    bench = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'bench.py')
    argv = [sys.executable, bench, *sys.argv[1:], f'--only={only}']
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench: measuring the memory of {only!r} failed: {done.stderr.strip()[-300:]}")
    return float(done.stdout.splitlines()[-1])


def by_turns(k, folder):
    """ Prints speed and memory of ours and of the plain implementation. """
    sizes = (k['bench_clips'], k['bench_clips'], 2)
    corpus, _ = random_corpus(folder, sizes, *SHAPES[k['shapes']])
    race = Race(k, corpus)
    if k['only']:  # in a child process
        print(megabytes_of(race.seconds, k['only']))
        return
    print(describe(k, race))
    print("the plain way is our own implementation of the same computation, not a peer's code")
    fast = matmul_peak(torch_dtype(k))
    seconds = {way: [] for way in race.ways}
    for i in range(k['repeats'] + 1):
        for way in race.ways:
            took = race.seconds(way)
            if i:
                seconds[way].append(took)
    megabytes = {way: child_megabytes(way) for way in race.ways}

    for split in ('train', 'valid'):
        n_clips = sum(map(len, race.batches[split]))
        t = {way: np.median(seconds[f'{way} {split}']) for way in ('ours', 'plain')}
        spread = {way: 50 * np.ptp(seconds[f'{way} {split}']) / t[way] for way in t}
        rate = {way: n_clips / t[way] for way in t}
        mb = {way: megabytes[f'{way} {split}'] for way in t}
        print(f"  {split}: {t['plain'] / t['ours']:.2f} times the speed of our plain way "
              f"(ours {rate['ours']:.1f} clips/s, "
              f"{1e3 * t['ours'] / len(race.batches[split]):.0f} ms per batch, "
              f"+-{spread['ours']:.0f} %; plain {rate['plain']:.1f} +-{spread['plain']:.0f} %; "
              f"median of {k['repeats']}), peak memory above the model {mb['ours']:.0f} MB, "
              f"{100 * mb['ours'] / mb['plain']:.0f} % of the {mb['plain']:.0f} MB of plain")
    took, spent = np.median(seconds['ours train']), race.counted_flops()
    print(f"  training: {spent / 1e9:.0f} GFLOP spent (attention and LSTMs not counted), "
          f"{100 * spent / took / fast:.0f} % of the matmul peak")
    if needed := race.plain.needed_flops(race.feed, np.concatenate(race.batches['train'])):
        spent = race.plain.spent_flops(race.feed, race.batches['train']) or spent
        print(f"  training: {needed / 1e9:.0f} GFLOP needed, {100 * needed / took / fast:.0f} % of "
              f"the matmul peak; spent over needed: {spent / needed:.2f}")
