"""
Frames: one stream of one split in a source, with one interface for arrays and lists of arrays.

Axis letters: N clips of a split, n clips of a chunk, L frames of the longest clip, d features.
"""
import math

import numpy as np

from corpora.lazy import LazyArray, Unread
from corpora.unpickle import CorpusError

SIDE_SAMPLE = 2000  # clips per stream and split, at most, from which the padding side is found
CHUNK_BYTES = 32 << 20  # bytes of a stream that are read at a time
MAX_WIDTH = 1 << 16  # features of a frame; the widest known corpus has 2048
MOST_SCORES = 1000  # numbers of one clip in a column of scores; MOSEI has 7


def column_of(column, n, where):
    """ A list or array as a list. Raises CorpusError if it does not have n entries (None: any). """
    size = math.prod(column.shape) if type(column) is LazyArray else len(column)
    if n not in (None, size):
        raise CorpusError(f"{where} has {size} entries for {n} clips; correct the source.")
    return column.all().ravel().tolist() if type(column) is LazyArray else list(column)


def is_missing(value):
    """ True for None and for NaN, which pandas writes for None. """
    return value is None or type(value) is float and math.isnan(value)


def type_name(x):
    """ The type of a value of a pickle, for an error message. """
    return x.name if type(x) is Unread else type(x).__name__


def _one_column(array, n, where, column):
    """ The numbers of an array [n, 1 .. 1, k], [n]: those of a column. Raises CorpusError. """
    k = array.shape[-1] if len(array.shape) > 1 else 1
    if k == 1 or array.shape[0] != n or math.prod(array.shape) != n * k:
        return array
    return array.all().reshape(n, k)[:, _checked_column(k, where, column)].tolist()  # n


def _checked_column(k, where, column):
    """ The column. Raises CorpusError if none of the k columns was chosen. """
    if column is None or column >= k:
        raise CorpusError(f"{where} holds {k} numbers for each clip; choose the column, from 0 on, "
                          f"with python data.py SOURCE --label_column=0 .. {k - 1}.")
    return column


def numbers_of(column, n, where, optional=False, column_number=None):
    """
    A list or array of n numbers as float64 [N]. Each may be in an array or list of one entry. A
    missing number is NaN if `optional`. column_number: which number of each clip is taken from an
    array [n, k]. Raises CorpusError for anything else.
    """
    if type(column) is LazyArray:
        column = _one_column(column, n, where, column_number)
    values = column_of(column, n, where)
    for i, v in enumerate(values):
        if type(v) is LazyArray:
            if math.prod(v.shape) > MOST_SCORES:
                raise CorpusError(f"Entry {i} of {where} is an array of shape {list(v.shape)}, not "
                                  "a number; correct the source.")
            v = v.all().ravel().tolist()
        if type(v) is list and len(v) == 1:
            v = v[0]
        if type(v) is list and len(v) > 1:
            v = v[_checked_column(len(v), where, column_number)]
        if optional and is_missing(v):
            v = math.nan
        if type(v) not in (int, float, bool):
            raise CorpusError(f"Entry {i} of {where} is a {type_name(v)}, not a number; "
                              "correct the source.")
        values[i] = v
    return np.array(values, np.float64)


def _clip_array(value):
    """ A clip's entry in a list of arrays, or None if it is missing or has no values. """
    if isinstance(value, LazyArray):
        if value.dtype == object and value.shape == ():
            return _clip_array(value.all().item())
        return value if math.prod(value.shape) else None
    if is_missing(value) or type(value) in (list, tuple) and not value:
        return None
    return value


def finite(x, counts=None):
    """ An array as float32, with 0 for nan and inf. counts: a dict that counts both. """
    with np.errstate(over='ignore', invalid='ignore'):
        x = x.astype(np.float32)  # values too large for float32 become inf
    is_finite = np.isfinite(x)
    if not is_finite.all():
        for name, bad in (('nan', np.isnan), ('+inf', np.isposinf), ('-inf', np.isneginf)):
            if counts:
                counts[name] += int(bad(x).sum())
        x[~is_finite] = 0
    return x


def all_zero(array):
    """ True if all finite values of an array are zero. It is read in pieces. """
    step = max(1, CHUNK_BYTES // (8 * max(1, math.prod(array.shape[1:]))))
    return not any(finite(array.rows(i, i + step)).any() for i in range(0, array.shape[0], step))


def zero_runs(nonzero, size):
    """
    The numbers of zero frames at the head and at the tail of each clip, [n] each. nonzero [n,L] is
    True for frames that are not zero, size [n] is the number of frames.
    """
    if not nonzero.shape[1]:
        return size, size
    some = nonzero.any(1)  # [n]
    # just behind the last nonzero frame
    end = nonzero.shape[1] - nonzero[:, ::-1].argmax(1)  # [n]
    return np.where(some, nonzero.argmax(1), size), np.where(some, size - end, size)


class Frames:
    """
    One stream of one split as the source has it: N clips of at most L frames of d features. It
    comes from one array [N, L, d] or [N, d], or from a list of N arrays [L_i, d] or [d], some of
    which may be None. Raises CorpusError for anything else.

    n_rows [N]: frames that the source holds of each clip, padding included; 0 for a clip without
    this stream.
    lengths [N]: the lengths that the source states; -1 for a missing or impossible length.
    missing [N]: True for a clip without this stream.
    empty: no clip has this stream. one: all clips are in one array. flat: a clip is one vector.
    ragged: the clips are arrays of different numbers of frames, which are then their lengths.
    states: the source states the length of at least one clip.
    """

    def __init__(self, source, lengths, n, where):
        if type(source) is LazyArray and source.dtype == object:
            values = source.all()
            source = values.ravel().tolist() if values.size == n else None
        self.one = type(source) is LazyArray
        self.N = n
        self.where = where
        self.scanned = None
        if not self.one and type(source) is not list:
            raise CorpusError(f"{where} is neither an array nor a list of arrays; correct the "
                              "source.")
        sizes = source.shape[:1] if self.one else (len(source),)
        if sizes != (n,):
            raise CorpusError(f"{where} does not have one entry for each of the {n} clips of "
                              "its split; correct the source.")
        self.arrays = [source] if self.one else [_clip_array(a) for a in source]
        there = [a for a in self.arrays if a is not None]
        if any(not isinstance(a, LazyArray) for a in there):
            raise CorpusError(f"{where} is neither an array nor a list of arrays; correct the "
                              "source.")
        shapes = [a.shape[1:] if self.one else a.shape for a in there]  # (L,d) or (d,)
        first = shapes[0] if there else (0, 1)
        self.empty = not there
        self.flat = len(first) == 1
        self.d = first[-1] if first else 0
        numbers = all(a.dtype.kind in 'fiub' for a in there)
        same = all(len(s) == len(first) and s[-1] == self.d for s in shapes)
        if not numbers or len(first) not in (1, 2) or not same or not 0 < self.d <= MAX_WIDTH:
            raise CorpusError(f"{where} must hold numbers of shape [clips, frames, features], with "
                              f"the same 1 to {MAX_WIDTH} features in all clips; correct the "
                              "source.")
        if self.one:
            rows = [1 if self.flat else first[0]] * n  # one vector per clip is one frame
        else:
            rows = [0 if a is None else 1 if self.flat else a.shape[0] for a in self.arrays]
        self.n_rows = np.array(rows, np.int64)  # [N]
        self.missing = np.zeros(n, bool) if self.one else self.n_rows == 0  # [N]
        self.ragged = not self.one and not self.flat and len(set(rows) - {0}) > 1
        self.lengths, self.states = np.full(n, -1), False  # [N]
        if lengths is not None and not self.flat:
            stated = numbers_of(lengths, n, f"The lengths of {where}", optional=True)  # [N]
            ok = (stated >= 0) & (stated <= self.n_rows) & (stated == np.floor(stated))  # [N]
            self.lengths = np.where(ok, stated, -1).astype(np.int64)  # -1: to be found
            self.states = not np.isnan(stated).all()
        self.lengths[self.missing] = 0

    @property
    def L(self):
        """ The number of frames of the longest clip. """
        return int(self.n_rows.max(initial=0))

    @property
    def n_bytes(self):
        """ The bytes of all frames as float32, padding included. """
        return 4 * int(self.n_rows.sum()) * self.d

    def chunks(self):
        """
        Ranges (i, j) of clips to read at a time. Padded to the longest of them, and in float64, they
        fit CHUNK_BYTES, unless they are one clip. So one long clip does not lengthen the others.
        """
        first, longest = 0, 0
        for i, n in enumerate(self.n_rows.tolist()):
            longest = max(longest, n)
            if i > first and (i + 1 - first) * longest * self.d * 8 > CHUNK_BYTES:
                yield first, i
                first, longest = i, n
        yield first, self.N

    @property
    def unknown(self):
        """ True for clips without a stated length, which must be found from their frames, [N]. """
        return (self.lengths < 0) & (not self.flat and not self.ragged)  # [N]

    def drop(self, i):
        """ Removes this stream from clip i. """
        self.arrays[i] = None
        self.n_rows[i] = 0
        self.lengths[i] = 0
        self.missing[i] = True

    def rows(self, i, j, counts=None):
        """
        Clips i:j as float32 [n, L, d], with 0 for nan and inf. L: of the longest of them, or of all
        clips if they are in one array. counts: see finite.
        """
        if self.one:
            x = self.arrays[0].rows(i, j).reshape(j - i, self.L, self.d)  # [n,L,d]
            return finite(x, counts)
        x = np.zeros((j - i, self.n_rows[i:j].max(), self.d), np.float32)  # [n,L,d]
        for k in range(i, j):
            if self.n_rows[k]:
                x[k - i, :self.n_rows[k]] = finite(self.arrays[k].all(), counts)
        return x

    def edge_zeros(self):
        """
        The evidence for the padding side: clip numbers [n], and the numbers of zero frames at the
        head and at the tail of these clips, [n] each. The clips are those without a stated length,
        and those whose stated length is below the number of frames in the source. If there are more
        than SIDE_SAMPLE such clips, SIDE_SAMPLE of them are taken, evenly spaced.
        """
        if self.scanned is None:
            open_end = self.unknown | (self.lengths > 0) & (self.lengths < self.n_rows)  # [N]
            at = np.flatnonzero(open_end & ~self.missing)  # [n]
            if len(at) > SIDE_SAMPLE:
                at = at[np.linspace(0, len(at) - 1, SIDE_SAMPLE).astype(int)]  # [n]
            head, tail = np.zeros((2, len(at)), np.int64)  # [n]
            for i, j in self.chunks():
                here = np.flatnonzero((at >= i) & (at < j))
                if 4 * len(here) > j - i:
                    nonzero = self.rows(i, j).any(-1)[at[here] - i]  # [n,L]
                    head[here], tail[here] = zero_runs(nonzero, self.n_rows[at[here]])
                    continue
                for k, clip in zip(here, at[here]):
                    nonzero = self.rows(clip, clip + 1).any(-1)  # [1,L]
                    head[k], tail[k] = np.ravel(zero_runs(nonzero, self.n_rows[[clip]]))  # [2]
            self.scanned = at, head, tail
        return self.scanned

    def real_frames(self, nonzero, i, side, text_lengths=None):
        """
        True for frames that are not padding, [n, L], of clips i, i + 1, ... nonzero [n, L] is True
        for their frames that are not zero. A clip of unknown length ends where the zeros on the
        padding side begin, or where its aligned text ends (text_lengths [N]) if that is later.
        """
        here = slice(i, i + len(nonzero))
        size, stated, unknown = self.n_rows[here], self.lengths[here], self.unknown[here]  # [n]
        head, tail = zero_runs(nonzero, size)
        found = size - (head if side == 'left' else tail)  # [n]
        if text_lengths is not None:
            found = np.maximum(found, np.minimum(text_lengths[here], size))
        length = np.where(unknown, found, np.where(stated < 0, size, stated))  # [n]
        start = (size - length if side == 'left' else 0 * size)[:, None]  # [n,1]
        frame = np.arange(nonzero.shape[1])  # [L]
        return (frame >= start) & (frame < start + length[:, None])
