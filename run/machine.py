"""
The machine: its devices, their memory, and how freed memory is kept.
"""
import ctypes
import os
import shutil
import sys

import torch

from lm import ModelError


def devices():
    """ The kinds of device that torch knows, best first, and whether this machine has one. """
    return dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)


def choose_device(device, dtype, float32_bytes, k):
    """
    The device and dtype of a run, with 'auto' filled in: float32_bytes(k) is the size of its frozen
    weights in float32, those of k['lm']. Raises ModelError.
    """
    there = devices()
    if device == 'auto':
        device = next(d for d in there if there[d])
    if not there[device]:
        raise ModelError(f"device={device} is not there: this machine has "
                         f"{', '.join(d for d in there if there[d])}.")
    if dtype != 'auto':
        return device, dtype
    if device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        return device, 'bfloat16'
    if float32_bytes(k) <= 0.8 * memory(device):
        return device, 'float32'
    dtype = 'float16' if device == 'cuda' else 'bfloat16'
    print(f"  {k['lm']} in float32 is too large for the memory of this machine: {dtype}")
    return device, dtype


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
    Bytes that this machine or its GPU has: not what is free now, or a run's numbers would depend on
    that.
    """
    if device == 'cuda':
        return torch.cuda.mem_get_info()[1]
    try:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (ValueError, OSError, AttributeError):   # Windows does not say
        return float('inf')


def hold_memory(hold=True):
    """
    Keep the memory of freed tensors in this process for those that come next. glibc would return it
    to Linux and be given it again page by page: up to a third of a training step on the CPU.
    hold=False gives all back, and is as glibc does once large tensors have come and gone. Where the
    C library is another (macOS, Windows, musl), nothing happens.
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
