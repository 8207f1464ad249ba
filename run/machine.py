"""
The machine that a run is on: its devices and their memory.
"""
import ctypes
import os
import shutil
import sys

import torch

from run.errors import ModelError


def devices():
    """ {kind of device: whether this machine has one}, the preferred kind first. """
    return dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)


def choose_device(device, dtype, float32_bytes, k):
    """
    The device and dtype of a run, with 'auto' replaced by a choice. float32_bytes(k) is the size of
    the frozen LM k['lm'] in float32. Raises ModelError if the device is not available.
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
    if float32_bytes(k) <= 0.8 * memory(device):
        return device, 'float32'
    dtype = 'float16' if device == 'cuda' else 'bfloat16'
    print(f"  the LM {k['lm']} in float32 is too large for the memory of this machine: {dtype} is "
          "used")
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
