"""
Reads the tensors of a .pt file without torch. torch.load(weights_only=True) runs no code, but it
allocates what the file asks for, gigabytes for a file of 300 bytes, and it may read a storage
behind its end.

    with opened_torch(f) as file:
        frames = file.array(file.value)

Since torch 1.6, torch.save writes a zip archive that is not compressed: NAME/data.pkl, a pickle of
the object, and NAME/data/KEY, the bytes of each storage. A tensor is a view of a storage.
"""
import io
import math
import os
import pickle
import zipfile
from collections import namedtuple
from contextlib import contextmanager

import numpy as np

from corpora.lazy import Refused
from corpora.limits import most_bytes
from corpora.unpickle import ALLOWED_GLOBALS, AllowedGlobal, Unpickler

MOST_DIMS = 32


class StorageType(AllowedGlobal):
    """ Stands for a class of storages, such as torch.FloatStorage. REDUCE does not call it. """
    __slots__ = ('dtype',)

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype


# n values of a dtype, in the entry `key` of the archive
Storage = namedtuple('Storage', 'dtype key n')


class Tensor:
    """ A view of a storage. offset and strides: in values. Raises ValueError if it is too long. """
    __slots__ = ('storage', 'offset', 'shape', 'strides')

    def __init__(self, storage, offset, shape, strides):
        fits = type(storage) is Storage and type(shape) is type(strides) is tuple
        if not fits or len(shape) != len(strides) or len(shape) > MOST_DIMS:
            raise ValueError("a tensor is not a view of a storage")
        # sizes are checked before they are multiplied: a product of huge numbers takes hours
        if any(type(n) is not int or not 0 <= n < 2 ** 48 for n in (offset, *shape, *strides)):
            raise ValueError("a tensor has a size that is none")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
        if math.prod(shape) and last >= storage.n:
            raise ValueError("a tensor ends behind its storage")
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides


def _tensor(u, storage, offset, shape, strides, requires_grad=False, hooks=None, flags=None):
    if flags:   # conjugated or negated when it is read
        raise ValueError("a tensor is not plain")
    return Tensor(storage, offset, shape, strides)


def _parameter(u, data, *_):
    return data


def _size(u, sizes=()):
    return tuple(sizes)


BFLOAT16 = 'bfloat16'   # NumPy has no such dtype: the upper half of a float32
STORAGES = dict(
    Float='f4', Double='f8', Half='f2', BFloat16=BFLOAT16, Long='i8', Int='i4', Short='i2',
    Char='i1', Byte='u1', Bool='b1', ComplexFloat='c8', ComplexDouble='c16')
TORCH_GLOBALS = {
    ('torch._utils', '_rebuild_tensor_v2'): AllowedGlobal(_tensor),
    ('torch._utils', '_rebuild_parameter'): AllowedGlobal(_parameter),
    ('torch', 'Size'): AllowedGlobal(_size),
    ('collections', 'OrderedDict'): ALLOWED_GLOBALS['collections', 'OrderedDict'],
}
for name, code in STORAGES.items():
    TORCH_GLOBALS['torch', name + 'Storage'] = StorageType(code)


class TorchUnpickler(Unpickler):
    """ Reads a data.pkl, with a Tensor for each tensor and a Storage for each persistent id. """
    allowed = TORCH_GLOBALS
    dispatch = Unpickler.dispatch | {
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]]}

    def persistent_load(self, pid):
        kind, storage, key, _, n = pid
        if kind != 'storage' or type(storage) is not StorageType or type(key) is not str:
            raise ValueError("a persistent id that is no storage")
        if type(n) is not int or not 0 <= n < 2 ** 48:
            raise ValueError("a storage has a size that is none")
        self.charge(100)
        return Storage(storage.dtype, key, n)


class TorchFile:
    """ An open .pt file. value: the object in it, in which a Tensor stands for each tensor. """

    def __init__(self, archive, n_bytes):
        self.archive = archive
        self.n_bytes = n_bytes
        roots = [n[:-len('data.pkl')] for n in archive.namelist() if n.endswith('/data.pkl')]
        if len(roots) != 1:
            raise Refused("is a zip archive, but not of torch.save")
        self.root = roots[0]
        has_order = self.root + 'byteorder' in archive.namelist()
        self.order = '>' if has_order and self._entry('byteorder') == b'big' else '<'
        self.value = TorchUnpickler(io.BytesIO(self._entry('data.pkl'))).load()

    def _entry(self, name):
        return self.archive.read(self.root + name)

    def array(self, tensor):
        """ The values of a Tensor, bfloat16 as float32. Raises ValueError. """
        s = tensor.storage
        dtype = np.dtype(self.order + ('u2' if s.dtype == BFLOAT16 else s.dtype))
        n_bytes = max(4, dtype.itemsize) * math.prod(tensor.shape)   # frames become float32
        if n_bytes > most_bytes(self.n_bytes):   # a view of few numbers
            raise ValueError("a tensor that is far larger than its file")
        raw = self._entry('data/' + s.key)
        if len(raw) < s.n * dtype.itemsize:
            raise ValueError("a storage is not complete")
        values = np.frombuffer(raw, dtype, s.n)[tensor.offset:]
        strides = [step * dtype.itemsize for step in tensor.strides]
        x = np.array(np.lib.stride_tricks.as_strided(values, tensor.shape, strides), order='C')
        return (x.astype(np.uint32) << 16).view(np.float32) if s.dtype == BFLOAT16 else x


@contextmanager
def opened_torch(f):
    """
    Yields the TorchFile of an open binary file. Raises Refused for another file, and errors of many
    classes for a damaged one.
    """
    n_bytes = os.fstat(f.fileno()).st_size
    if f.read(4) != b'PK\x03\x04':
        raise Refused("is no zip archive, which torch.save has written since torch 1.6")
    with zipfile.ZipFile(f) as archive:
        entries = archive.infolist()
        packed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
        if packed or sum(e.file_size for e in entries) > n_bytes:
            raise Refused("is a compressed archive, which torch.save does not write")
        yield TorchFile(archive, n_bytes)
