"""
tools/bench.py --vs=without: the cost of a part of a system, as in CrossSent's Table 4 for GMRA.
Forward passes with and without the part, alternately, at batch sizes 1 and 64.
"""
import sys
from types import SimpleNamespace

import numpy as np
import torch

from model import SYSTEMS
from run.machine import devices
from tools.bench_model import build
from tools.bench_plain import PLAIN, Plain, plain_way
from tools.bench_run import matmul_peak, megabytes_of
from tools.bench_turns import child_megabytes
from tools.device_time import seconds_of
from tools.random_clips import SHAPES


def ablated(k, device):
    """ The system of the knobs k with a random text model. """
    _, d_a, _, d_v, limit = SHAPES[k['shapes']]
    score = dict(kind='regression', range=[-limit, limit])
    corpus = SimpleNamespace(widths=dict(audio=d_a, vision=d_v), labels=dict(label=score))
    model, _ = build(k, corpus)
    return model.to(device).eval()


def random_batch(k, model, B, device):
    """ B random clips of the largest lengths. """
    S_a, d_a, S_v, d_v, _ = SHAPES[k['shapes']]
    tokens = plain_way(SYSTEMS[k['system']]).tokens(k, model, B)  # [B,T]
    T = tokens.shape[1]
    batch = dict(tokens=tokens.to(device))  # [B,T]
    batch['text_rows'] = torch.arange(B * T, device=device)  # [BT]
    for m, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
        batch[m] = torch.randn(B, S, d, device=device)  # [B,S,d]
    for m, n in (('text', T), ('audio', S_a), ('vision', S_v)):
        batch[m + '_len'] = torch.full((B,), n, device=device)  # [B]
        batch[m + '_mask'] = torch.ones(B, n, dtype=torch.bool, device=device)  # [B,S]
    return batch


@torch.no_grad()
def forward_seconds(model, batch, device):
    """ Seconds of one prediction, including asynchronous work of the device. """
    return seconds_of(lambda: model.predict(batch), device)


def one_forward(k, device):
    """ Builds the system and predicts one batch of 64 clips. """
    model = ablated(k, device)
    forward_seconds(model, random_batch(k, model, 64, device), device)


def forward_megabytes(k, way, models, device):
    """ Peak memory in MB of one forward at batch 64, weights included. """
    if device != 'cuda':
        return child_megabytes(way)
    for model in models.values():
        model.to('cpu')
    batch = random_batch(k, models[way], 64, device)
    torch.cuda.reset_peak_memory_stats()
    forward_seconds(models[way].to(device), batch, device)
    return torch.cuda.max_memory_allocated() / 2 ** 20


def with_and_without(k, folder):
    """ Prints the cost of the part that the system's ablation removes. """
    ablation = plain_way(SYSTEMS[k['system']]).ablation(k)
    if not ablation:
        others = [c.__name__ for c, way in PLAIN.items() if way.ablation is not Plain.ablation]
        sys.exit("bench: vs='without' needs a system with an ablation in PLAIN: choose a config of "
                 f"{', '.join(others)}.")
    device = next(d for d, available in devices().items() if available)
    if k['only']:  # in a child process
        print(megabytes_of(one_forward, k | ablation[k['only']], device))
        return

    models = {way: ablated(k | ablation[way], device) for way in ('without', 'with')}
    seconds = {(way, B): [] for B in (1, 64) for way in models}
    for B in (1, 64):
        batch = random_batch(k, models['with'], B, device)
        for _ in range(k['warmup_rounds'] + k['timed_rounds']):
            for way, model in models.items():
                seconds[way, B].append(forward_seconds(model, batch, device))
    took = {key: np.median(rounds[k['warmup_rounds']:]) for key, rounds in seconds.items()}
    count = {way: sum(p.numel() for p in model.parameters()) for way, model in models.items()}
    megabytes = {way: forward_megabytes(k, way, models, device) for way in models}

    print(f"{k['system']} {k['lm_shape']} at {k['shapes']}, {k['max_text_len']} tokens, {device}, "
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
