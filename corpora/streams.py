"""
Writes the files of a stream in a corpus folder: the frames of all clips end to end, without
padding.

Axis letters: N clips of a split, n clips of a chunk, L frames of the longest clip, d features.
"""
import os

import numpy as np

from corpora.frames import CHUNK_BYTES
from corpora.names import N_NAMED, SPLITS
from corpora.unpickle import CorpusError


def _npy_header(dtype, shape):
    """
    A .npy header that is always 128 bytes long, so that it can be overwritten when the number of
    rows is known.
    """
    descr = np.dtype(dtype).str
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    return b'\x93NUMPY\x01\x00' + (118).to_bytes(2, 'little') + text.encode().ljust(117) + b'\n'


class Moments:
    """
    Mean and std of rows that come in pieces. They are not computed from sums of squares, which lose
    precision for features with a mean far from zero.
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
        # the std of a constant feature is 0 or a rounding error; dividing by it would amplify noise
        return np.where(std <= 1e-6 * np.abs(self.mean) + 1e-30, 1.0, std)  # [d]


def write_stream(name, splits, out, progress, padding):
    """
    Writes NAME.npy (float32) and NAME_start.npy of all splits. Returns the stream's entry in
    meta.json. progress(n_bytes) moves a progress bar; padding: find_padding's dict for the
    stream.
    """
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
            for i, j in frames.chunks():
                x = frames.rows(i, j, info['cleaned'])  # [n,L,d]
                nonzero = x.any(-1)  # [n,L]
                real = frames.real_frames(nonzero, i, side, text.get(split))  # [n,L]
                lengths.append(real.sum(1))
                if split not in text:
                    _count_cut(frames, i, nonzero, real, info)
                info['clips_all_zero'] += int(((lengths[-1] > 0) & ~(nonzero & real).any(1)).sum())
                x = x[real]  # [sum lengths,d]
                if split == 'train':
                    moments.add(x)
                f.write(memoryview(x) if x.size else b'')
                progress(4 * frames.d * int(frames.n_rows[i:j].sum()))
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


def _count_cut(frames, i, nonzero, real, info):
    """
    Counts in clips_cut the clips whose length was found only by cutting zero frames. Such a clip
    becomes too short if its real frames end in zeros. Clips that keep other zero frames are also
    counted in clips_cut_with_zeros, because their zero frames are not always padding.
    """
    here = slice(i, i + len(nonzero))
    cut = frames.unknown[here] & (real.sum(1) < frames.n_rows[here])  # [n]
    info['clips_cut'] += int(cut.sum())
    info['clips_cut_with_zeros'] += int((cut & (~nonzero & real).any(1)).sum())


def standardise_to_float16(name, info, out):
    """
    Rewrites a stream standardised, as float16. Returns its new entry in meta.json. Raises
    CorpusError if a value overflows.
    """
    mean = np.float32(info['mean'])  # [d]
    std = np.float32(info['std'])  # [d]
    d = info['width']
    n_values = max(1, CHUNK_BYTES // (4 * d)) * d  # in a chunk
    largest = 0.0
    for split in SPLITS:
        path = out / split / f'{name}.npy'
        half = path.with_suffix('.half')
        with open(path, 'rb') as old, open(half, 'wb') as new:
            old.seek(128)
            new.write(_npy_header('<f2', ((path.stat().st_size - 128) // (4 * d), d)))
            while len(x := np.fromfile(old, '<f4', n_values)):  # [n*d]
                x = (x.reshape(-1, d) - mean) / std  # [n,d]
                largest = max(largest, float(np.abs(x).max()))
                with np.errstate(over='ignore'):
                    new.write(x.astype('<f2').tobytes())
        os.replace(half, path)
    if not largest <= 65504:
        raise CorpusError(f"A standardised value of the {name} stream is {largest:.6g}, beyond "
                          "65504, the largest float16; convert with --dtype=float32.")
    return info | dict(dtype='float16', standardised=True)


def frame_rates(splits, streams, out):
    """
    {stream: frames per second}, from the durations of the clips and the lengths in the folder
    `out`. A stream in which fewer than nine in ten clips are within 10 % of the median is left out.
    """
    found = {}
    for m in streams:
        rates = []
        for split, s in splits.items():
            lengths = np.diff(np.load(out / split / f'{m}_start.npy'))  # [N]
            rates += [n / t for n, t in zip(lengths, s['duration']) if n and t]
        median = float(np.median(rates)) if rates else 0.0
        if rates and np.mean([abs(r - median) <= 0.1 * median for r in rates]) >= 0.9:
            found[m] = round(median, 3)
    return found
