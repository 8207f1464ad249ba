"""
What a source may cost: a small file must not fill the memory or the disk (docs/corpora.md).
"""
import math
import os
import zipfile
from contextlib import contextmanager

import numpy as np

from corpora.lazy import Lazy, LazyArray

MiB = 1 << 20


def most_bytes(n_bytes):
    """
    The most bytes that texts or frames may take that come from n_bytes of a source. Frames of one
    byte a number become float32, and files of frames may be compressed.
    """
    return 16 * n_bytes + 64 * MiB


@contextmanager
def opened_npz(f):
    """
    Yields the np.load of an open .npz file. Raises ValueError if it holds far more bytes of arrays
    than of file, and what np.load raises.
    """
    n_bytes = os.fstat(f.fileno()).st_size
    with np.load(f, allow_pickle=False) as arrays:
        entries = arrays.zip.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        # zipfile unpacks these as a whole, whatever size the entry states
        if any(e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for e in entries):
            raise ValueError("it is compressed by a method that NumPy does not write")
        if unpacked > most_bytes(n_bytes):
            raise ValueError(f"it has {unpacked} bytes of arrays in {n_bytes} bytes of file")
        yield arrays


def text_bytes(value):
    """ About the bytes of a text or id as the source has it: a string, an array, or parts. """
    if type(value) in (tuple, list):
        return sum(text_bytes(v) for v in value if type(v) not in (tuple, list))
    if type(value) is LazyArray:
        return math.prod(value.shape) * value.dtype.itemsize
    if type(value) is Lazy:
        return value.n_bytes
    return len(value) if isinstance(value, (str, bytes, bytearray)) else 8
