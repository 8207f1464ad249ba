"""
Files that hold the frames of one clip: .npy, .npz, .csv, .tsv, .pt and .pth. Reading one runs no
code from it.

Axis letters: S frames of a clip, d features of a frame.
"""
import csv
import math
import os
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from corpora.lazy import LazyArray, Refused
from corpora.limits import opened_npz
from corpora.names import printed
from corpora.rows import number_of
from corpora.torch_files import Tensor, opened_torch
from corpora.unpickle import CorpusError

ENDS = ('.npy', '.npz', '.csv', '.tsv', '.pt', '.pth')


class FrameFile(LazyArray):
    """
    The frames of one clip in a file, [S, d] or [d]. The file is open only while it is read, so that
    a corpus of 10,000 files needs no more handles than one of ten. Raises CorpusError where the
    file does not hold an array of numbers. where: the clip and the file, for error messages.
    """
    __slots__ = ('path', 'stream', 'where')

    def __init__(self, path, stream, where):
        super().__init__(None)
        self.path = path
        self.stream = stream
        self.where = where
        self.fortran = False
        header = self._header()
        self.shape, self.dtype = self._checked(self._load() if header is None else header)

    def _checked(self, a):
        """ The shape and dtype of an array or header. Raises CorpusError. """
        if a.dtype.kind not in 'fiub':
            what = 'Python objects' if a.dtype == object else f'values of dtype {a.dtype}'
            raise CorpusError(f"{self.where} holds {what}, not numbers; save each clip's frames as "
                              "one array of float32 [frames, features].")
        shape = tuple(a.shape)
        if len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]  # [S,d]
        if len(shape) not in (1, 2):
            raise CorpusError(f"{self.where} holds an array of shape {list(a.shape)}; the frames "
                              "of a clip are an array [frames, features].")
        return shape, a.dtype

    def _header(self):
        """ The header of a .npy file, with a shape and a dtype; None for other files. """
        if not self.path.lower().endswith('.npy') or not os.path.getsize(self.path):
            return None
        with reading(self.where):
            return np.lib.format.open_memmap(self.path, 'r')

    def _load(self):
        """ The array that the file holds. Raises CorpusError. """
        if not os.path.getsize(self.path):
            raise CorpusError(f"{self.where} is empty (0 bytes); make the file again, or leave the "
                              "cell empty if the clip has no frames.")
        end = os.path.splitext(self.path)[1].lower()
        with reading(self.where):
            if end == '.npy':
                return np.load(self.path, allow_pickle=False)
            if end == '.npz':
                return self._from_npz()
            if end in ('.csv', '.tsv'):
                return self._from_text('\t' if end == '.tsv' else ',')
            return self._from_torch()

    def _from_npz(self):
        with open(self.path, 'rb') as f, opened_npz(f) as arrays:
            names = arrays.files
            own = [n for n in names if n == self.stream]
            if len(names) != 1 and not own:
                raise CorpusError(f"{self.where} holds the arrays {', '.join(names) or 'none'}; it "
                                  f"must hold one array, or one that is called {self.stream}.")
            return arrays[own[0] if own else names[0]]

    def _from_text(self, delimiter):
        """ A table of numbers, one frame a line, with or without a line of names. """
        with open(self.path, encoding='utf-8-sig', newline='') as f:
            lines = [line for line in csv.reader(f, delimiter=delimiter) if line]
        if lines and not lines[0][0] and len(lines[0]) > 1:
            raise CorpusError(f"{self.where} has a first column without a name, as the row numbers "
                              "that pandas writes; leave it out (index=False).")
        if lines and (number_of(lines[0][0]) is None or is_numbering(lines[0])):
            lines = lines[1:]
        widths = sorted({len(line) for line in lines})
        if len(widths) > 1:
            raise CorpusError(f"{self.where} has frames of {widths[0]} and of {widths[-1]} "
                              "features; all frames of a corpus have the same features.")
        return np.array(lines, object).astype(np.float64)  # [S,d]

    def _from_torch(self):
        """ A tensor, or a dict of tensors that has one, or one of the stream's name. """
        with open(self.path, 'rb') as f, opened_torch(f) as file:
            value = file.value
            if type(value) is dict:
                tensors = {k: v for k, v in value.items() if isinstance(v, Tensor)}
                if len(tensors) != 1 and self.stream not in tensors:
                    raise CorpusError(f"{self.where} holds the tensors "
                                      f"{', '.join(map(printed, tensors)) or 'none'}; it must hold "
                                      f"one tensor, or one that is called {self.stream}.")
                value = tensors.get(self.stream, next(iter(tensors.values())))
            if not isinstance(value, Tensor):
                raise CorpusError(f"{self.where} holds a {type(value).__name__}, not a tensor; "
                                  "save the frames of a clip as one tensor [frames, features].")
            return file.array(value)

    def rows(self, i, j):
        """ Rows i:j, [j-i, ..]. The file is read and closed. """
        a = self._load()
        if self._checked(a) != (self.shape, self.dtype):
            raise CorpusError(f"{self.where} was changed while it was read; convert again.")
        return a.reshape(self.shape)[i:j]

    def all(self):
        return self.rows(0, self.shape[0])


def is_numbering(line):
    """ Whether a line of a table is 0, 1, 2, .., the names that pandas gives to columns without. """
    return len(line) > 2 and line == [str(n) for n in range(len(line))]


@contextmanager
def reading(where):
    """ Turns the errors of reading a file of frames in the block into a CorpusError. """
    try:
        yield
    except CorpusError:
        raise
    except Exception as e:   # damaged bytes raise errors of many classes
        if 'allow_pickle' in str(e) or 'Python objects' in str(e):
            what = "holds Python objects, which are not read"
        elif isinstance(e, Refused):
            what = f"was refused: it {e}"
        else:
            reason = ' '.join(ascii(str(e))[1:-1].split())[:100]
            what = f"could not be read ({type(e).__name__}: {reason})"
        raise CorpusError(f"{where} {what}; save the frames of a clip as one array of float32 "
                          "[frames, features].") from None


def frame_files(paths, ids, stream, where, add):
    """
    A FrameFile for each path, None for a path that is None. paths, ids: of the N clips; where: the
    table, for error messages; add(path): called with each file that is used. Raises CorpusError
    where files are missing, are no frames, or differ in their features.
    """
    given = [(i, p) for i, p in enumerate(paths) if p is not None]
    if wrong := [(i, p) for i, p in given if not p.lower().endswith(ENDS)]:
        i, p = wrong[0]
        raise CorpusError(f"The {stream} of clip {ids[i]} in {where} is {p!r}, which is no file of "
                          f"frames; name files that end in {', '.join(ENDS)}.")
    if gone := [(i, p) for i, p in given if not os.path.isfile(p)]:
        i, p = gone[0]
        raise CorpusError(f"{len(gone)} of {len(given)} files of {stream} frames in {where} are "
                          f"missing, first that of clip {ids[i]} ({p}); correct the paths, which "
                          "count from the table's folder, or leave the cells empty.")
    found, first = [None] * len(paths), None
    few = len(given) < 2000
    for i, p in tqdm(given, f'{stream} files', disable=few, mininterval=1):
        a = found[i] = FrameFile(p, stream, f"The file of {stream} frames of clip {ids[i]} ({p})")
        if not math.prod(a.shape):
            continue
        first = first or a
        if a.shape[-1] != first.shape[-1] or len(a.shape) != len(first.shape):
            raise CorpusError(f"{a.where} has shape {list(a.shape)}, and {first.path} has "
                              f"{list(first.shape)}; all frames of a stream have the same "
                              "features.")
        add(p)
    return found
