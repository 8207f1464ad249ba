"""
Damaged corpus folders and clips, for tests/soak.py.
"""

import hashlib
import json
import os
import shutil

import numpy as np
import torch

from data import Feed, open_corpus
from eval import load
from fakes import knobs_of_system
from model import SYSTEMS
from run.clips import read_clips
from run.predictor import describe_predictions, reading_clips

# --------------------------------------------------------------------------------------------------
# Bytes of a file

LINKS = ('/dev/zero', '/dev/null', '/etc/passwd', '/nowhere')


def damage_file(rng, path):
    """Damage one file in one of several ways -> the name of the damage."""
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw))
    how = rng.choice('flip flip flip cut cut insert zeros empty gone folder fifo link'.split())
    if how == 'flip':
        raw[at] ^= 1 << rng.randrange(8)
    elif how == 'cut':
        del raw[-min(len(raw), rng.choice([1, 7, 100, len(raw) // 2])) :]
    elif how == 'insert':
        raw[at:at] = rng.randbytes(rng.choice([1, 8, 64]))
    elif how == 'zeros':
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    if how in ('flip', 'cut', 'insert', 'zeros'):
        path.write_bytes(raw)
        return f'{how} at {at} of {path.name}'
    path.unlink()
    if how == 'empty':
        path.touch()
    elif how == 'folder':
        path.mkdir()
    elif how == 'fifo':
        os.mkfifo(path)
    elif how == 'link':
        path.symlink_to(rng.choice(LINKS))
    return f'{how}: {path.name}'


# --------------------------------------------------------------------------------------------------
# Corpus folders

NO_NUMBERS = (None, 'x', [], {}, [1], float('nan'), float('inf'), 10**400, True)
NO_OBJECTS = (None, 'x', 3, [1], True)
NO_STRINGS = (None, 3, [], {}, True)
NO_NAMES = ('../../outside/private', '', 'a/b', '.')


class DamagedCorpus:
    """
    A converted corpus folder with one damaged or changed file. Its batches must be those of the
    undamaged folder.
    """

    def __init__(self, places):
        self.source, self.folder = places.corpora / 'toy', places.work / 'corpus'
        self.k = knobs_of_system(SYSTEMS['av'], system='av', batch_size=32)
        shutil.copytree(self.source, self.folder)
        corpus = open_corpus(str(self.folder))
        self.model, _ = SYSTEMS['av'].build(self.k, corpus, str(places.work), torch.float32)
        self.whole = self.use()

    def damage(self, rng):
        shutil.rmtree(self.folder)
        shutil.copytree(self.source, self.folder)
        files = sorted(p for p in self.folder.rglob('*') if p.is_file())
        how = rng.choice((damage_file, swap_files, change_array, change_meta, change_handmade))
        if how is damage_file:
            return damage_file(rng, rng.choice(files))
        return how(rng, self.folder)

    def use(self):
        """A hash of all batches of all splits, as a run of the AV encoder reads them."""
        corpus = open_corpus(str(self.folder))
        feed = Feed(corpus, self.k, None, 'cpu', self.model)
        seen = hashlib.sha256(json.dumps([corpus.text(s) for s in corpus.n_clips]).encode())
        for split, n in feed.n_clips.items():
            for tensor in feed(split, np.arange(n)).values():
                seen.update(tensor.numpy().tobytes())
        return seen.hexdigest()


def swap_files(rng, folder):
    """Two files of a corpus folder change places, if possible two of one kind."""
    files = [p for p in sorted(folder.rglob('*.*')) if p.parent != folder]
    one = rng.choice(files)
    same = [p for p in files if p.name == one.name and p != one]
    other = rng.choice(same if rng.random() < 0.7 else [p for p in files if p != one])
    raw = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(raw)
    return f'swapped {one.relative_to(folder)} and {other.relative_to(folder)}'


def change_array(rng, folder):
    """One number of an array, or the order of two rows; the file's time stays in half of the cases."""
    path = rng.choice(sorted(folder.rglob('*.npy')))
    stat, a = path.stat(), np.load(path)
    i = rng.randrange(len(a))
    if rng.random() < 0.5:
        a[i] = rng.choice([0, 1, -1, 2, -a[i].flat[0]]) if a.dtype.kind == 'f' else a[i] + 1
    else:
        a[[i, i - 1]] = a[[i - 1, i]]
    np.save(path, a)
    if rng.random() < 0.5:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return f'changed row {i} of {path.relative_to(folder)}'


def entries(tree):
    """(dict or list, key) of each entry of a tree of JSON."""
    keys = tree if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from entries(tree[key])


def change_meta(rng, folder):
    """An entry of meta.json gets another value or goes, and the checksum stays."""
    path = folder / 'meta.json'
    meta = json.loads(path.read_text())
    holder, key = rng.choice(list(entries(meta)))
    value = rng.choice([*NO_NUMBERS, *NO_STRINGS, 0, -1, 10**12, 0.5, 'gone'])
    if value == 'gone':
        del holder[key]
    else:
        holder[key] = value
    path.write_text(json.dumps(meta))
    return f'meta.json: {key} = {value!r:.40}'


def change_handmade(rng, folder):
    """meta.json without checksums, as of a folder that was written by hand, with a wrong entry."""
    path = folder / 'meta.json'
    meta = json.loads(path.read_text())
    del meta['files'], meta['checksum']
    stream = rng.choice(['audio', 'vision'])
    info, number = meta['streams'][stream], rng.choice(NO_NUMBERS)
    d = info['width']
    wrong = [
        (meta, 'format', rng.choice([number, 2, '1'])),
        (meta, 'name', rng.choice(NO_STRINGS)),
        (meta, 'source', rng.choice([*NO_STRINGS, dict(sha256=3), {}])),
        (meta, 'clips', rng.choice([number, {}, meta['clips'] | dict(train=number)])),
        (meta['clips'], 'test', rng.choice([0, -1, 31, 33, 10**12, 1.5, 10**400])),
        (meta, 'labels', rng.choice([number, {rng.choice(NO_NAMES): meta['labels']['label']}])),
        (meta['labels']['label'], 'range', rng.choice([number, [3, -3], [0, number], [1, 1], 'ab'])),
        (meta['labels']['label'], 'kind', rng.choice([number, 'classes', 'clases'])),
        (meta['labels']['emotion'], 'names', rng.choice([number, ['a', 'a'], [1], 'ab'])),
        (meta, 'streams', rng.choice([*NO_OBJECTS, dict(smell=info), {'../audio': info}])),
        (info, 'width', rng.choice([number, d + 1, 0, -d, 10**12])),
        (info, 'mean', rng.choice([number, info['mean'][1:], ['x'] * d, [1e39] * d])),
        (info, 'std', rng.choice([number, info['std'] * 2, [0.0] * d, [1e-99] * d])),
        (info['std'], rng.randrange(d), rng.choice([*NO_NUMBERS, 0, -1, -0.0])),
        (info['mean'], rng.randrange(d), number),
        (info, 'standardised', rng.choice([None, 0, 'no', [], {}])),
        (info, 'frames_per_second', rng.choice([*NO_NUMBERS, 0, -3])),
        (meta, 'text', rng.choice([number, {}, dict(upper_case='no'), dict(upper_case=0)])),
    ]
    holder, key, value = rng.choice(wrong)
    holder[key] = value
    path.write_text(json.dumps(meta))
    return f'handmade meta.json: {key} = {value!r:.60}'


# --------------------------------------------------------------------------------------------------
# Clips

LINES = (
    '', '{', '[]', '3', 'null', '"text"', '{}', '{"text": 3}', '{"text": null}', '{"text": []}',
    '{"text": "a", "smell": 1}', '{"text": "\\ud800"}', '{"text": "a", "id": "\\ud800"}',
    '{"text": "a", "id": "two\\nlines"}', '{"text": "a", "id": "\\u0000\\u001b[31m"}',
    '{"text": "a", "id": {"x": [1]}}', '{"text": "a", "id": null}', '{"text": "a", "audio": 3}',
    '{"text": "a", "audio": "x"}', '{"text": "a", "audio": {}}', '{"text": "a", "audio": [[1], [1, 2]]}',
    '{"text": "a", "audio": [[NaN]]}', '{"text": "a", "audio": [[1e999]]}', '{"audio": [[[]]]}',
    '{"text": "a", "vision": [' + '9' * 5000 + ']}', '[' * 100_000, '{"text": "a"' + ' ' * 99,
    '{"text": "a", "audio": ' + '[' * 70 + ']' * 70 + '}', '\ufeff{"text": "a"}', '{"text": "a"}\n{',
)  # fmt: skip
NAMES = ('clip', 'two\nlines', 'caf\udce9', '\udcff', 'a' * 200, '-rf', '{}', '%s', "'", '\x1b[31m')


class DamagedClip:
    """
    A .npz or .jsonl file of a user's clip. A .npz has checksums of its own, so a damaged one must
    not give another prediction; a .jsonl may hold any clip.
    """

    def __init__(self, places):
        self.run, self.work = load(places.curriculum / 'whole').run, places.work
        d = self.run.facts['widths']
        rng = np.random.default_rng(0)
        self.clip = {m: rng.normal(size=(9, d[m])).astype('f4') for m in d}
        self.path, self.may_change = self.work / 'clip.npz', False
        self.write()
        self.whole = self.use()

    def write(self):
        np.savez(self.path, text=np.array('it was superb'), **self.clip)

    def damage(self, rng):
        if self.path.is_dir():
            self.path.rmdir()
        else:
            self.path.unlink(missing_ok=True)
        if rng.random() < 0.6:
            self.path = self.work / (rng.choice(NAMES) + '.npz')
            self.write()
            self.may_change = False
            if rng.random() < 0.2:
                return self.wrong_arrays(rng)
            return damage_file(rng, self.path)
        self.path, self.may_change = self.work / (rng.choice(NAMES) + '.jsonl'), True
        line = json.dumps(dict(text='it was superb') | {m: x.tolist() for m, x in self.clip.items()})
        self.path.write_text(rng.choice((line, *LINES)))
        if rng.random() < 0.5 and self.path.stat().st_size:
            return damage_file(rng, self.path)
        return f'{self.path.name!a}: {self.path.read_text()[:50]!a}'

    def wrong_arrays(self, rng):
        wrong = [
            np.zeros(3), np.zeros((2, 3, 4)), np.zeros((4, 3)), np.array('x'), np.array(3), np.array([]),
            np.zeros((5, 12), complex), np.array([{}], object), np.zeros(2, 'i4,f4'), np.zeros(2, 'M8[s]'),
            np.full((5, 12), np.nan), np.full((5, 12), 1e300), np.array(['two', 'texts']),
        ]  # fmt: skip
        key, value = rng.choice(['text', 'audio', 'vision', 'id', 'smell']), rng.choice(wrong)
        np.savez(self.path, **(dict(text=np.array('it was superb')) | self.clip | {key: value}))
        self.may_change = True
        return f'{key} = {value!r:.60}'

    def use(self):
        run = self.run
        clips, notes = read_clips(str(self.path), run.facts, run.system.modalities_read(run.knobs))
        with reading_clips(run) as run:
            text, pred, _ = describe_predictions(run, clips)
        printed = '\n'.join([*notes, text])
        printed.encode()
        assert printed.replace('\n', '').isprintable(), ascii(printed)
        return None if self.may_change else pred.tolist()


CORPUS_KINDS = dict(corpus=DamagedCorpus, clip=DamagedClip)
