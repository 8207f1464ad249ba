"""
The machine that a run is on: its devices, their memory, and its terminal.
"""
import ctypes
import io
import os
import shutil
import sys
import time

import torch
import torch.nn.functional as F

from run.errors import ModelError
from run.load_lm import width_of_lm

# bfloat16 on the CPU shortens the matmuls of a training step alone. With a frozen LM of width 256 a
# step gained a tenth, and with one of width 64 it took longer, though a linear layer was faster in
# both (LOG.md, 2026-11-27). So dtype='auto' measures wide LMs alone, and asks for a clear gain.
LEAST_WIDTH, LEAST_GAIN = 512, 1.5


def devices():
    """ {kind of device: whether this machine has one}, the preferred kind first. """
    return dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)


def choose_device(device, dtype, float32_bytes, k):
    """
    The device and dtype of a run, with 'auto' replaced by a choice. float32_bytes(k) is the size of
    the frozen LM k['lm'] in float32, 0 without one. Raises ModelError if the device is not
    available.
    """
    available = devices()
    if device == 'auto':
        device = next(d for d in available if available[d])
    if k['compile']:
        check_compiler(device)
    if not available[device]:
        raise ModelError(f"this machine has no device={device}: choose one of "
                         f"{', '.join(d for d in available if available[d])}.")
    if dtype != 'auto':
        return device, dtype
    if device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return device, 'bfloat16'
    n_bytes = float32_bytes(k)
    if n_bytes <= 0.8 * memory(device):
        return device, measured_dtype(k) if n_bytes and device == 'cpu' else 'float32'
    dtype = 'float16' if device == 'cuda' else 'bfloat16'
    print(f"  the LM {k['lm']} in float32 is too large for the memory of this machine: {dtype} is "
          "used")
    return device, dtype


def measured_dtype(k):
    """
    The dtype of a frozen LM on this CPU: float32, or bfloat16 where the CPU has a unit for it and a
    linear layer of the LM's width is faster by it. Prints what was measured. Raises ModelError.
    """
    unit, width = bfloat16_unit(), width_of_lm(k)
    if unit is None or width < LEAST_WIDTH:
        return 'float32'

    float32_seconds = linear_seconds(width, k['batch_size'], torch.float32)
    bfloat16_seconds = linear_seconds(width, k['batch_size'], torch.bfloat16)
    dtype = faster_dtype(float32_seconds, bfloat16_seconds)
    print(f"  {dtype}: a linear layer of this LM's width is "
          f"{float32_seconds / bfloat16_seconds:.1f} times as fast in bfloat16 as in float32 on "
          f"this CPU ({unit})")
    return dtype


def faster_dtype(float32_seconds, bfloat16_seconds):
    """ The dtype to take, by the time that a layer needs in each. """
    return 'bfloat16' if float32_seconds >= LEAST_GAIN * bfloat16_seconds else 'float32'


def linear_seconds(width, batch_size, dtype):
    """
    Seconds of a frozen linear layer from `width` to 4 x `width`, forward and backward, on a
    micro-batch of texts of 16 tokens: the least of three, after an untimed one.
    """
    weight = torch.ones(4 * width, width, dtype=dtype)  # [4D,D]
    x = torch.ones(16 * batch_size, width, dtype=dtype, requires_grad=True)  # [B*16,D]
    took = []
    for _ in range(4):
        since = time.thread_time()   # not the time in which other processes have this core
        y = F.linear(x, weight)  # [B*16,4D]
        y.backward(y.detach())
        took.append(time.thread_time() - since)
    return min(took[1:])


def bfloat16_unit(cpuinfo='/proc/cpuinfo'):
    """ 'AMX' or 'AVX512-BF16', whichever this CPU has; None without both, and outside Linux. """
    try:
        with open(cpuinfo, encoding='utf-8') as f:
            flags = set(f.read().split())
    except OSError:
        return None
    units = {'AMX': 'amx_bf16', 'AVX512-BF16': 'avx512_bf16'}
    return next((unit for unit, flag in units.items() if flag in flags), None)


def check_compiler(device):
    """
    Raises ModelError where torch.compile would not find the compiler that it needs: C++ for the
    CPU, C for CUDA's Triton. Environment variables CXX and CC name another one, as for torch.
    """
    variable, language = ('CC', 'C') if device == 'cuda' else ('CXX', 'C++')
    usual = dict(C=['gcc', 'clang', 'cc'], **{'C++': ['clang++' if sys.platform == 'darwin' else 'g++']})
    if sys.platform == 'win32':
        usual = dict(C=['cl'], **{'C++': ['cl']})
    names = [os.environ[variable]] if os.environ.get(variable) else usual[language]
    if not any(shutil.which(name) for name in names):
        raise ModelError(f"--compile=True needs a {language} compiler ({' or '.join(names)}) and none is "
                         f"on the PATH: install one, set {variable} to it, or leave --compile out.")


def memory(device):
    """
    Total memory of this machine or its GPU, in bytes. Free memory would make the dtype of a run,
    and so its numbers, depend on what else is running.
    """
    if device == 'cuda':
        return torch.cuda.mem_get_info()[1]
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (ValueError, OSError, AttributeError):   # Windows
        return float('inf')


def hold_memory(hold=True):
    """
    Keep the memory of freed tensors in this process for later tensors. By default glibc returns it
    to Linux and gets it back page by page, which takes up to a third of a training step on the CPU.
    hold=False returns all of it and restores glibc's behaviour. With other C libraries (macOS,
    Windows, musl) this does nothing.
    """
    try:
        mallopt, malloc_trim = ctypes.CDLL(None).mallopt, ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, mb = -1, -3, -4, 2 ** 20   # malloc.h
    mallopt(M_TRIM_THRESHOLD, -1 if hold else 64 * mb)
    mallopt(M_MMAP_THRESHOLD, 32 * mb)
    mallopt(M_MMAP_MAX, 0 if hold else 2 ** 16)
    if not hold:
        malloc_trim(0)


def print_any_text():
    """
    From here on, any text can be printed. Letters that the output's encoding lacks, as in a file on
    Windows, become escapes such as \\u6124; Python would stop with an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):   # a notebook has other ones
            stream.reconfigure(errors='backslashreplace')
