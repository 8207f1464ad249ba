"""
An open corpus folder (docs/corpora.md).

Axis letters: N clips of a split, S frames of a clip, d features of a frame.
"""
import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from corpora.names import SPLITS, STREAMS
from corpora.seal import CHANGED, check_file
from corpora.unpickle import CorpusError
from run.folder import check_regular
from run.forms import LABEL, LONGEST_NAME, STREAM, check_ceilings, check_label, check_stream
from run.json_files import (
    NUMBER,
    Each,
    Maybe,
    check_form,
    check_printable,
    check_seal,
    parsed_lines,
    read_json,
    text_of,
)

STREAM_META = STREAM | dict(frames_per_second=Maybe(NUMBER))
FILE = dict(bytes=int, mtime_ns=int, crc32=str, sample=str)
META = dict(   # meta.json; corpora/seal.py describes its last two entries
    format=Literal[1], name=str, source=dict(sha256=str), text=dict(upper_case=bool),
    clips=dict.fromkeys(SPLITS, int), labels=Each(LABEL), streams=Each(STREAM_META),
    ceilings=Maybe(Each(Each(NUMBER))), files=Maybe(Each(FILE)), checksum=Maybe(str))
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
ROW = dict(id=str, text=str, dialogue=Maybe(str), speaker=Maybe(str))   # a line of text.jsonl


class Corpus:
    """
    An open corpus folder. Attributes: folder, name, meta (meta.json), labels (its entry `labels`),
    sha256 (of the source), contents (digest_of), widths {stream: d}, n_clips {split: N}, rows
    {split: the objects of text.jsonl}. All files of all splits are opened and checked at once, so
    that no run stops at one later; the frames are memory maps. whole=True reads each file to its
    end and compares its checksum, which otherwise happens only if its time has changed. Raises
    CorpusError for a file that is missing, is damaged, does not fit the others or lies elsewhere.
    """
    def __init__(self, folder, whole=False):
        self.folder = str(folder)
        with self._reading('meta.json') as path:
            self.meta = read_meta(path)
        self.name, self.n_clips = self.meta['name'], dict(self.meta['clips'])
        self.widths = {m: s['width'] for m, s in self.meta['streams'].items()}
        self.sha256, self.labels = self.meta['source']['sha256'], dict(self.meta['labels'])
        self.contents = digest_of(self.meta)
        self.rows, self._label, self._start, self._frames = {}, {}, {}, {}
        for split in SPLITS:
            self._check_files(split, whole)
            self._open(split)

    @contextmanager
    def _reading(self, file):
        """ Yields the path of a file. Errors of reading it in the block become a CorpusError. """
        path = Path(self.folder) / file
        # the folder itself may be a link, which the user made; links in it may be a stranger's
        top = os.path.realpath(self.folder)
        if not Path(os.path.realpath(path)).is_relative_to(top):
            raise CorpusError(f"{path} is or lies behind a link that leads out of the corpus "
                              "folder: put the file itself in its place.")
        try:
            yield path
        except ValueError as e:   # a phrase about the file
            reason = str(e)
        except Exception as e:    # damaged bytes raise errors of many classes
            reason = f"is missing or damaged ({type(e).__name__}: {' '.join(str(e).split())[:300]})"
        else:
            return
        raise CorpusError(f"{self.folder}/{file} {reason}: remove the folder and convert the source "
                          "again.")

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
            rows = parsed_lines(text_of(path, follow=True), lambda row: check_form(row, ROW))
            if len(rows) != n:
                raise ValueError(f"has {len(rows)} clips and not {n}")
            self.rows[split] = rows
        for name, info in self.labels.items():
            classes = info['kind'] == 'classes'
            with self._reading(f'{split}/{name}.npy') as path:
                y = open_array(path, (n,), 'i' if classes else 'f')
                self._label[split, name] = np.array(y, np.int64 if classes else np.float32)  # [N]
        for m, d in self.widths.items():
            with self._reading(f'{split}/{m}_start.npy') as path:
                start = np.array(open_array(path, (n + 1,), 'i'), np.int64)  # [N+1]
                # compared, not subtracted: a difference of two int64 may overflow
                if start[0] != 0 or (start[1:] < start[:-1]).any():
                    raise ValueError("has starts of clips that are not in ascending order")
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


def digest_of(meta):
    """
    A digest of the texts, the labels and the lengths of a corpus, '' where meta.json has no
    checksums. Two conversions of one source may split or label its clips differently.
    """
    crcs = {name: file['crc32'] for name, file in meta.get('files', {}).items()
            if Path(name).stem not in STREAMS}
    if not crcs:
        return ''
    return hashlib.sha256(json.dumps(crcs, sort_keys=True).encode()).hexdigest()[:16]


def check_whole(folder):
    """ Reads all files of a corpus folder to their ends -> a sentence. Raises CorpusError. """
    if 'files' in Corpus(folder, whole=True).meta:
        return f"{folder}: all files are as the conversion wrote them"
    return f"{folder}: its files fit each other, and there are no checksums to compare them with"


def read_meta(path):
    """ The content of meta.json. Raises ValueError, a phrase about the file, if it is damaged. """
    meta = read_json(path, META, follow=True)
    check_seal(meta, CHANGED)
    check_printable([meta['name'], meta['source']['sha256']])
    if len(meta['name']) > LONGEST_NAME:
        raise ValueError(f"has a name of more than {LONGEST_NAME} characters")
    if meta.get('ceilings'):
        check_ceilings(meta['ceilings'])
    clips = meta['clips']
    if set(clips) != set(SPLITS) or min(clips.values()) < 1:
        raise ValueError(f"has other splits than {', '.join(SPLITS)}, or one without clips: {clips}")
    for name, info in meta['labels'].items():
        # the name is that of a file: it must not lead out of the folder
        if not re.fullmatch(r'\w+', name):
            raise ValueError(f"has a label named {name!r}, which is not of letters, digits and _")
        check_label(info)
        if info['kind'] == 'regression' and max(map(abs, info['range'])) > LARGEST_FLOAT32:
            raise ValueError(f"has a range of {name} past what float32 holds")
    for m, info in meta['streams'].items():
        if m not in STREAMS:
            raise ValueError(f"has a stream named {m!r}, which is none of {', '.join(STREAMS)}")
        _check_stream(m, info)
    return meta


def _check_stream(m, info):
    check_stream(m, info)
    if type(info['width']) is not int:
        raise ValueError(f"has the width {info['width']} of {m}, which is no integer")
    with np.errstate(over='ignore'):   # a number past float32 becomes infinite
        numbers = np.array([info['mean'], info['std']]).astype(np.float32)  # [2,d]
    if not np.isfinite(numbers).all() or numbers[1].min() <= 0:
        raise ValueError(f"has a mean of {m} that is not finite, or a std that is not above 0")
    rate = info.get('frames_per_second', 1)
    if rate is None or not 0 < rate <= LARGEST_FLOAT32:
        raise ValueError(f"has the wrong entry frames_per_second {rate} of {m}")


def open_array(path, shape, kind):
    """ A memory map of a .npy file. kind: of its dtype. Raises OSError, and ValueError, a phrase. """
    try:
        a = np.lib.format.open_memmap(path, mode='r')
    except ValueError as e:
        raise ValueError(f"is damaged ({' '.join(str(e).split())[:300]})") from None
    if a.shape != shape or a.dtype.kind != kind:
        wanted = dict(f='floats', i='integers')[kind]
        raise ValueError(f"has an array of {a.dtype} {list(a.shape)}, and the other files need "
                         f"{wanted} {list(shape)}")
    return a
