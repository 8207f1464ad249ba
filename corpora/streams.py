"""
The files of a stream in a corpus folder: its frames end to end, without padding.

Axis letters: N clips of a split, n clips of a chunk, L frames of the longest clip, d features.
"""
import os

import numpy as np

from corpora.frames import CHUNK_BYTES
from corpora.names import N_NAMED, SPLITS
from corpora.unpickle import CorpusError


def _npy_header(dtype, shape):
    """
    A .npy header of 128 bytes whatever the shape: it is written again when the rows are known.
    """
    descr = np.dtype(dtype).str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    return b'\x93NUMPY\x01\x00' + (118).to_bytes(2, 'little') + text.encode().ljust(117) + b'\n'


class Moments:
    """
    Mean and std of rows that come in pieces. Sums of squares would cancel for features far from
    zero.
    """

    def __init__(self, d):
        self.n = 0
        self.mean = np.zeros(d)  # [d]
        self.m2 = np.zeros(d)  # [d]

    def add(self, x):
        if not len(x):
            return
        mean = x.mean(0, dtype=np.float64)  # [d]
        n = self.n + len(x)
        gap = mean - self.mean  # [d]
        self.m2 += ((x - mean) ** 2).sum(0) + gap ** 2 * (self.n * len(x) / n)
        self.mean = self.mean + gap * (len(x) / n)
        self.n = n

    def std(self):
        std = np.sqrt(self.m2 / max(self.n, 1))  # [d]
        # a constant feature has std 0 but for rounding, and dividing by that would make noise of it
        return np.where(std <= 1e-6 * np.abs(self.mean) + 1e-30, 1.0, std)  # [d]


def write_stream(name, splits, out, progress, padding):
    """ NAME.npy and NAME_start.npy of all splits, in float32. Returns the entry in meta.json. """
    width = splits['train']['streams'][name].d
    side = padding['side']
    text = padding['text_lengths'] or {}
    moments = Moments(width)
    padded = False
    empty = []
    info = dict(
        width=width,
        longest=0,
        padding='none',
        dtype='float32',
        standardised=False,
        cleaned={'nan': 0, '+inf': 0, '-inf': 0},
        clips_empty=0,
        clips_all_zero=0,
        lengths_repaired=0,
        clips_missing=0,
        clips_cut=0,
        clips_cut_with_zeros=0,
    )
    for split in SPLITS:
        frames = splits[split]['streams'][name]
        lengths = []
        with open(out / split / f'{name}.npy', 'wb') as f:
            f.write(_npy_header('<f4', (0, frames.d)))
            for i in range(0, frames.N, frames.step):
                x = frames.rows(i, i + frames.step, info['cleaned'])  # [n,L,d]
                live = x.any(-1)  # [n,L]
                own = frames.own(live, i, side, text.get(split))  # [n,L]
                lengths.append(own.sum(1))
                if split not in text:
                    _count_cut(frames, i, live, own, info)
                info['clips_all_zero'] += int(((lengths[-1] > 0) & ~(live & own).any(1)).sum())
                x = x[own]  # [sum lengths,d]
                if split == 'train':
                    moments.add(x)
                f.write(memoryview(x) if x.size else b'')
                progress(own.size * frames.d * 4)
            lengths = np.concatenate(lengths)  # [N]
            start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)  # [N+1]
            f.seek(0)
            f.write(_npy_header('<f4', (int(start[-1]), frames.d)))

        np.save(out / split / f'{name}_start.npy', start)
        if frames.states:
            info['lengths_repaired'] += int(((frames.lengths < 0) & ~frames.missing).sum())
        info['longest'] = max(info['longest'], int(lengths.max()))
        info['clips_empty'] += int((lengths == 0).sum())
        info['clips_missing'] += int(frames.missing.sum())
        ids = splits[split]['id']
        empty += [f"{ids[i]} ({split})" for i in np.flatnonzero(lengths == 0)[:N_NAMED]]
        padded |= bool((lengths < frames.n_rows).any())
        for a in frames.arrays:
            if a is not None:
                a.close()

    if padded:
        info['padding'] = side
    if padded or padding['by'] == '--padding':
        info['padding_found'] = {k: padding[k] for k in ('by', 'left', 'right', 'read', 'streams')}
    for key in ('text', 'text_not_used'):
        if padding[key]:
            info['aligned_' + key] = padding[key]
    if empty:
        info['empty_ids'] = empty[:N_NAMED]
    return info | dict(mean=moments.mean.tolist(), std=moments.std().tolist())


def _count_cut(frames, i, live, own, info):
    """
    Counts the clips whose length was found by cutting zero frames, with nothing else to state it:
    each of them may end in true zero frames and be too short. Those with zero frames among what is
    kept are counted too, as in them zero frames are not padding alone.
    """
    here = slice(i, i + len(live))
    cut = frames.unknown[here] & (own.sum(1) < frames.n_rows[here])  # [n]
    info['clips_cut'] += int(cut.sum())
    info['clips_cut_with_zeros'] += int((cut & (~live & own).any(1)).sum())


def halve(name, info, out):
    """ Rewrites a stream, standardised, in float16. Raises CorpusError if that overflows. """
    mean = np.float32(info['mean'])  # [d]
    std = np.float32(info['std'])  # [d]
    d = info['width']
    n_values = max(1, CHUNK_BYTES // (4 * d)) * d  # of a chunk
    worst = 0.0
    for split in SPLITS:
        path = out / split / f'{name}.npy'
        half = path.with_suffix('.half')
        with open(path, 'rb') as old, open(half, 'wb') as new:
            old.seek(128)
            new.write(_npy_header('<f2', ((path.stat().st_size - 128) // (4 * d), d)))
            while len(x := np.fromfile(old, '<f4', n_values)):  # [n*d]
                x = (x.reshape(-1, d) - mean) / std  # [n,d]
                worst = max(worst, float(np.abs(x).max()))
                with np.errstate(over='ignore'):
                    new.write(x.astype('<f2').tobytes())
        os.replace(half, path)
    if not worst <= 65504:
        raise CorpusError(f"The {name} stream reaches {worst:.6g} once standardised, and float16 "
                          "ends at 65504; convert with --dtype=float32.")
    return info | dict(dtype='float16', standardised=True)
