"""
Time, memory and kernels of work on a device, 'cuda' or 'cpu'; times also on 'mps'. What is read of
a GPU is read when it has finished.
"""
import re
import time

import numpy as np
import torch
from torch.autograd import DeviceType

# kinds of kernels, by what their names contain; the first that fits counts
KINDS = dict(
    attention='fmha|flash|attention|sdpa', LSTM='rnn|lstm', matmul='gemm|nvjet|cutlass|xmma|mm$',
    norm='norm', optimizer='adam|multi_tensor|foreach', softmax='softmax|logsumexp',
    copy='copy|memcpy|memset', reduction='reduce|sum', elementwise='elementwise|triton')


def wait(device):
    """ Waits until the device has finished. """
    if device != 'cpu':
        getattr(torch, device).synchronize()


def seconds_of(function, device):
    """ The seconds that a call takes, until the device has finished. """
    wait(device)
    since = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - since


def matmul_rate(dtype, n, device):
    """ FLOP/s of an n x n matmul of random numbers, the median of ten. """
    a, b = torch.randn(2, n, n, device=device).to(dtype)  # [n,n] each
    took = [seconds_of(lambda: a @ b, device) for _ in range(13)]
    return 2 * n ** 3 / float(np.median(took[3:]))


def reset_peak(device):
    """ Starts the count of the peak memory again. """
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()


def gigabytes(device, peak=False):
    """ GPU memory of this process in GB, now or the most since the last reset; nan on a CPU. """
    if device == 'cpu':
        return float('nan')
    held = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return held / 1e9


def kernel_seconds(function, device):
    """ {name: seconds} of the GPU kernels and copies of a call; on a CPU, of its operators. """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        function()
        wait(device)
    kind = DeviceType.CUDA if device == 'cuda' else DeviceType.CPU
    seconds = {}
    for event in profile.key_averages():
        is_label = '#' in event.key or getattr(event, 'is_user_annotation', False)
        if event.device_type == kind and not is_label:
            took = event.self_device_time_total if device == 'cuda' else event.self_cpu_time_total
            seconds[event.key] = 1e-6 * took
    return seconds


def by_kind(kernels):
    """ The share of each kind of kernel in {name: seconds}: 'matmul 60 %, norm 10 %, ..'. """
    total, found = sum(kernels.values()) or 1.0, {}
    for name, seconds in kernels.items():
        fitting = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
        kind = next(fitting, 'others')
        found[kind] = found.get(kind, 0.0) + seconds
    ordered = sorted(found, key=found.get, reverse=True)
    return ', '.join(f'{kind} {100 * found[kind] / total:.0f} %' for kind in ordered)
