"""
An open corpus folder (docs/corpora.md).

Axis letters: N clips of a split, S frames of a clip, d features of a frame.
"""
import json
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from corpora.names import SPLITS, STREAMS
from corpora.seal import check_file, check_meta_checksum
from corpora.unpickle import CorpusError
from run.folder import check_regular, open_regular


class Corpus:
    """
    An open corpus folder. Attributes: folder, name, meta (meta.json), labels (its entry `labels`),
    sha256 (of the source), widths {stream: d}, n_clips {split: N}, rows {split: the objects of
    text.jsonl}. All files of all splits are opened and checked at once, so that no run stops at one
    later; the frames are memory maps. whole=True reads each file to its end and compares its
    checksum, which otherwise happens only if its time has changed. Raises CorpusError for a file
    that is missing, is damaged or does not fit the others.
    """
    def __init__(self, folder, whole=False):
        self.folder = str(folder)
        with self._reading('meta.json') as path:
            self.meta = read_meta(path)
        self.name, self.n_clips = self.meta['name'], dict(self.meta['clips'])
        self.widths = {m: s['width'] for m, s in self.meta['streams'].items()}
        self.sha256, self.labels = self.meta['source']['sha256'], dict(self.meta['labels'])
        self.rows, self._label, self._start, self._frames = {}, {}, {}, {}
        for split in SPLITS:
            self._check_files(split, whole)
            self._open(split)

    @contextmanager
    def _reading(self, file):
        """ Yields the path of a file. Errors of reading it in the block become a CorpusError. """
        try:
            yield Path(self.folder) / file
        except Exception as e:   # damaged bytes raise errors of many classes
            reason = str(e) if type(e) is ValueError else f'{type(e).__name__}: {e}'
            reason = ' '.join(reason.split())[:300]
            raise CorpusError(f"{self.folder}/{file} is missing or damaged ({reason}); remove the "
                              "folder and convert the source again.") from e

    def _check_files(self, split, whole):
        """ Compares the files of a split with their checksums, where meta.json has them. """
        names = ['text.jsonl', *(f'{name}.npy' for name in self.labels)]
        for m in self.widths:
            names += [f'{m}.npy', f'{m}_start.npy']
        for name in names:
            with self._reading(f'{split}/{name}') as path:
                check_regular(path, follow=True)
                if 'files' in self.meta:
                    check_file(path, self.meta['files'][f'{split}/{name}'], whole)

    def _open(self, split):
        n = self.n_clips[split]
        with self._reading(f'{split}/text.jsonl') as path:
            self.rows[split] = read_rows(path, n)
        for name, info in self.labels.items():
            classes = info['kind'] == 'classes'
            with self._reading(f'{split}/{name}.npy') as path:
                y = open_array(path, (n,), 'i' if classes else 'f')
                self._label[split, name] = np.array(y, np.int64 if classes else np.float32)  # [N]
        for m, d in self.widths.items():
            with self._reading(f'{split}/{m}_start.npy') as path:
                start = np.array(open_array(path, (n + 1,), 'i'), np.int64)  # [N+1]
                if start[0] != 0 or (np.diff(start) < 0).any():
                    raise ValueError("the starts of its clips are not in ascending order")
                self._start[split, m] = start
            with self._reading(f'{split}/{m}.npy') as path:
                self._frames[split, m] = open_array(path, (start[-1], d), 'f')

    def text(self, split):
        return [r['text'] for r in self.rows[split]]

    def id(self, split):
        return [r['id'] for r in self.rows[split]]

    def turns(self, split):
        """ (dialogue, speaker) of each clip. Raises CorpusError if the corpus does not hold them. """
        rows = self.rows[split]
        if any(not r.get('dialogue') or not r.get('speaker') for r in rows):
            raise CorpusError(f"The corpus {self.name} does not hold the dialogue and the speaker of "
                              "each clip, which the knob context needs: set it to 0.")
        return [(r['dialogue'], r['speaker']) for r in rows]

    def label(self, split, name='label'):
        """ One number for each clip, [N]: float32, or int64 for classes. """
        if name not in self.labels:
            has = ', '.join(self.labels)
            raise CorpusError(f"The corpus {self.name} has no label {name!r}, only {has}.")
        return self._label[split, name]  # [N]

    def lengths(self, split, stream):
        return np.diff(self._start[split, stream])  # [N]

    def frames(self, split, stream, i):
        """ The frames of clip i, a slice of the memory map, [S, d]. """
        start = self._start[split, stream]  # [N+1]
        return self._frames[split, stream][start[i]:start[i + 1]]  # [S,d]


def check_whole(folder):
    """ Reads all files of a corpus folder to their ends -> a sentence. Raises CorpusError. """
    if 'files' in Corpus(folder, whole=True).meta:
        return f"{folder}: all files are as the conversion wrote them"
    return f"{folder}: its files fit each other, and there are no checksums to compare them with"


def read_meta(path):
    """ The content of meta.json. Raises OSError, ValueError, KeyError, TypeError. """
    with open_regular(path, follow=True) as f:
        meta = json.load(f)
    if meta['format'] != 1:
        raise ValueError(f"its format is {meta['format']}, not 1")
    check_meta_checksum(meta)
    _require(type(meta['name']) is str, 'name', "a string")
    _require(type(meta['source']['sha256']) is str, 'source', "an object with a string sha256")
    clips = meta['clips']
    are_counts = all(type(n) is int and n > 0 for n in clips.values())
    _require(set(clips) == set(SPLITS) and are_counts, 'clips', f"the clips of {', '.join(SPLITS)}")
    for name, info in meta['labels'].items():
        # the name is that of a file: it must not lead out of the folder
        _require(re.fullmatch(r'\w+', name), 'labels', "named by letters, digits and _")
        _check_label(name, info)
    for m, info in meta['streams'].items():
        _require(m in STREAMS, 'streams', f"of {' or '.join(STREAMS)}")
        _check_stream(m, info)
    _require(type(meta['text']['upper_case']) is bool, 'text', "an object with upper_case")
    return meta


def _require(holds, entry, what):
    """ Raises ValueError unless `holds`: what the entry of meta.json must be. """
    if not holds:
        raise ValueError(f"its entry {entry} must be {what}")


def _check_label(name, info):
    if info['kind'] == 'classes':
        names = info['names']
        are_names = type(names) is list and names and all(type(c) is str for c in names)
        _require(are_names and len(set(names)) == len(names), name, "different names of classes")
    else:
        _require(info['kind'] == 'regression', name, "of the kind regression or classes")
        low, high = info['range']
        _require(_is_number(low) and _is_number(high) and low < high, name, "a range [low, high]")


def _check_stream(m, info):
    d = info['width']
    _require(type(d) is int and d > 0, m, "of a width above 0")
    _require(type(info['standardised']) is bool, m, "standardised or not: true or false")
    for key in ('mean', 'std'):
        values = info[key]
        are_numbers = type(values) is list and len(values) == d and all(map(_is_number, values))
        _require(are_numbers, f'{m} {key}', f"{d} finite numbers")
    _require(np.float32(info['std']).min() > 0, f'{m} std', "above 0")
    rate = info.get('frames_per_second', 1)
    _require(_is_number(rate) and rate > 0, f'{m} frames_per_second', "a number above 0")


def _is_number(x):
    """ True for a number that float32 holds. """
    return type(x) in (int, float) and abs(x) <= float(np.finfo(np.float32).max)


def read_rows(path, n):
    """ The objects of text.jsonl, one for each of n clips. Raises OSError, ValueError. """
    with open_regular(path, follow=True) as f:
        rows = [json.loads(line) for line in f]
    if len(rows) != n:
        raise ValueError(f"it holds {len(rows)} clips and not {n}")
    for i, row in enumerate(rows):
        if type(row) is not dict or type(row.get('id')) is not str or type(row.get('text')) is not str:
            raise ValueError(f"line {i + 1} is no object with the strings id and text")
    for key in ('id', 'text'):
        ''.join(row[key] for row in rows).encode()   # half a surrogate pair raises ValueError
    return rows


def open_array(path, shape, kind):
    """ A memory map of a .npy file. kind: of its dtype. Raises OSError, ValueError. """
    a = np.lib.format.open_memmap(path, mode='r')
    if a.shape != shape or a.dtype.kind != kind:
        raise ValueError(f"its array of {a.dtype} {a.shape} does not fit the other files")
    return a
