"""
Small inputs that would take much memory, disk or time, for tests/soak.py.
"""

import json
import os
import pickle
import resource
import shutil
import zipfile

import numpy as np
import torch

from corpora.convert import convert
from corpora.unpickle import CorpusError
from eval import load
from fakes import msena
from run.clips import read_clips
from run.predictor import describe_predictions, reading_clips

MOST_MEMORY = 1 << 30  # bytes that a bomb may take beside what the process has
MOST_DISK = 256 << 20  # bytes of one file that it may make
SPLITS = ('train', 'valid', 'test')

# --------------------------------------------------------------------------------------------------
# Sources. Each writes a source into `folder` -> its path


class Behind:
    """ Pickles as an array [S, 10] of float32 on the shared bytes `payload`. """

    def __init__(self, payload):
        self.payload = payload

    def __reduce__(self):
        shape = (len(self.payload) // 40, 10)
        return np._core.numeric._frombuffer, (self.payload, np.dtype('f4'), shape, 'C')


def pickled(folder, tree, protocol=4):
    path = folder / 'bomb.pkl'
    path.write_bytes(pickle.dumps(tree, protocol))
    return path


def shared_text(rng, folder):
    """ One long text, id or label of many clips. """
    tree, n = msena(), rng.choice([2000, 20_000])
    long = 'so ' * rng.choice([100_000, 400_000])
    one = rng.choice([long, long.encode(), np.array(long), (long, long), np.frombuffer(long.encode(), 'u1')])
    s = dict(raw_text=['a'] * n, id=[str(i) for i in range(n)], regression_labels=[0.5] * n)
    key = rng.choice(list(s))
    tree['train'] = s | {key: [one] * n}
    return pickled(folder, tree)


def shared_payload(rng, folder):
    """ One payload behind many arrays. """
    payload, n = np.ones(rng.choice([200_000, 1_000_000]), 'f4').tobytes(), rng.choice([300, 3000])
    clips = dict(raw_text=['a'] * n, regression_labels=[0.5] * n, audio=[Behind(payload)] * n)
    clips['audio'] = [Behind(payload) for _ in range(n)]
    return pickled(folder, dict.fromkeys(SPLITS, clips), rng.choice([2, 4]))


def shared_clip(rng, folder):
    """ One clip with many keys, many times, in lists of clips. """
    features = {f'key {i}': i for i in range(2000)} | dict(text='a', audio=np.ones((3, 2), 'f4'))
    for split in SPLITS:
        with open(folder / f'bomb_{split}.pkl', 'wb') as f:
            pickle.dump([dict(label='joy', features=features)] * rng.choice([20_000, 50_000]), f)
    return folder


def opcodes(rng, folder):
    """ Empty containers, marks and memo entries, of one byte each. """
    n = rng.choice([5, 15]) * 1_000_000
    op = rng.choice([b']', b'}', b'\x8f', b'(', b'\x94', b'\x85', b')\x94'])
    path = folder / 'bomb.pkl'
    path.write_bytes(b'\x80\x04N(' + op * (n // len(op)) + b'l.')
    return path


def copies(rng, folder):
    """ A set that is copied again and again: 5 bytes a copy of 10,000 entries. """
    items = b']q\x00(' + b''.join(b'J' + i.to_bytes(4, 'little') for i in range(10_000)) + b'e0'
    copy = rng.choice([b'cbuiltins\nset\nq\x01h\x00\x85q\x020', b'cbuiltins\nfrozenset\nq\x01h\x00\x85q\x020'])
    path = folder / 'bomb.pkl'
    path.write_bytes(b'\x80\x04' + items + copy + b'(' + b'h\x01h\x02R' * 100_000 + b'l.')
    return path


def nested_id(rng, folder):
    """ An id of tuples of one tuple: 2^60 parts; or one that a regular expression may try in vain. """
    tree, one = msena(), ('a', 'b')
    for _ in range(60):
        one = (one, one)
    tree['train']['id'][0] = rng.choice([one, '$_$' * 200_000 + '\n', '[1' * 200_000])
    return pickled(folder, tree)


def odd_shape(rng, folder):
    """ An array of no numbers and 2^40 rows. """
    tree, key = msena(), rng.choice(['audio', 'raw_text', 'id', 'regression_labels', 'text'])
    empty = np.empty((2**40, 0), rng.choice(['f4', 'O', 'U3']))
    tree['train'][key] = rng.choice([empty, [empty] * 6])
    return pickled(folder, tree)


def table(folder, name, array):
    """ A table of many clips with one file of frames. """
    if name.endswith('.npz'):
        np.savez_compressed(folder / name, audio=array)
    else:
        np.save(folder / name, array)
    lines = ['text,label,split,audio']
    lines += [f'a,1,{SPLITS[i % 3]},{name}' for i in range(3000)]
    (folder / 'bomb.csv').write_text('\n'.join(lines))
    return folder / 'bomb.csv'


def shared_file(rng, folder):
    return table(folder, 'shared.npy', np.ones((rng.choice([10_000, 50_000]), 10), 'f4'))


def zeros_in_a_zip(rng, folder):
    return table(folder, 'zeros.npz', np.zeros((rng.choice([3, 9]) * 1_000_000, 10), 'f4'))


def large_header(rng, folder):
    path = table(folder, 'header.npz', np.zeros((2, 10), 'f4'))
    forged_npz(folder / 'header.npz', 'audio', rng.choice([10**9, 10**12, 10**18]), 10)
    return path


def view_of_one_number(rng, folder):
    """ A tensor of one number that is expanded to 10^9 frames. """
    path = table(folder, 'view.npy', np.zeros((2, 10), 'f4'))
    torch.save(torch.zeros(1, 1, dtype=torch.bfloat16).expand(10**9, 10), folder / 'view.pt')
    path.write_text(path.read_text().replace('view.npy', 'view.pt'))
    return path


def many_keys(rng, folder):
    """ Lines of JSON with a key of their own: N rows of N columns. """
    lines = [json.dumps({f'key {i}': 1}) for i in range(rng.choice([20_000, 60_000]))]
    (folder / 'bomb.jsonl').write_text('\n'.join(lines))
    return folder / 'bomb.jsonl'


SOURCES = (
    shared_text, shared_payload, shared_clip, opcodes, copies, nested_id, odd_shape, shared_file,
    zeros_in_a_zip, large_header, view_of_one_number, many_keys,
)  # fmt: skip


def forged_npz(path, key, n_rows, d):
    """ A .npz whose array has a header of n_rows rows, and 1000 bytes. """
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({n_rows}, {d}), }}"
    header = header.encode().ljust(117) + b'\n'
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr(f'{key}.npy', b'\x93NUMPY\x01\x00' + (118).to_bytes(2, 'little') + header + bytes(1000))


class Bomb:
    """ What all bombs share: a folder, and limits of memory and disk around the code. """

    whole = None

    def __init__(self, places):
        self.folder = places.work / 'bomb'

    def damage(self, rng):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        how = rng.choice(self.bombs)
        self.path = how(rng, self.folder)
        return how.__name__

    def use(self):
        held = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
        limits = {resource.RLIMIT_AS: held + MOST_MEMORY, resource.RLIMIT_FSIZE: MOST_DISK}
        before = {which: resource.getrlimit(which) for which in limits}
        for which, most in limits.items():
            resource.setrlimit(which, (most, before[which][1]))
        try:
            self.read()
        finally:
            for which, limit in before.items():
                resource.setrlimit(which, limit)


class SourceBomb(Bomb):
    bombs = SOURCES

    def read(self):
        try:
            convert(str(self.path), str(self.folder / 'made'))
        except CorpusError as e:
            # it must be refused before it meets the limits
            assert 'MemoryError' not in str(e) or 'NUMPY' in str(e) or 'npz' in str(e), e
            assert 'File too large' not in str(e), e
            raise


# --------------------------------------------------------------------------------------------------
# Clips. Each writes a clip into `folder` -> its path


def clip_header(rng, folder):
    path = folder / 'clip.npz'
    forged_npz(path, rng.choice(['audio', 'vision', 'text']), rng.choice([10**9, 10**12, 10**18]), 12)
    return path


def clip_zeros(rng, folder):
    np.savez_compressed(folder / 'clip.npz', audio=np.zeros((rng.choice([4, 9]) * 1_000_000, 12), 'f4'))
    return folder / 'clip.npz'


def clip_device(rng, folder):
    path = folder / rng.choice(['clip.npz', 'clip.jsonl'])
    path.symlink_to(rng.choice(['/dev/zero', '/dev/urandom', '/dev/stdin']))
    return path


def clip_text(rng, folder):
    """ Megabytes of text, of which a run reads 50 tokens. """
    text = rng.choice(['so ', 'a', '  ', '\u4e2d']) * rng.choice([1_000_000, 5_000_000])
    (folder / 'clip.jsonl').write_text(json.dumps(dict(text=text)), encoding='utf-8')
    return folder / 'clip.jsonl'


def clip_lists(rng, folder):
    """ Megabytes of empty lists, or of one number a frame. """
    frames = rng.choice(['[],', '[[]],', '[1],', '{},', '0,']) * 1_000_000
    (folder / 'clip.jsonl').write_text('{"text": "a", "audio": [' + frames[:-1] + ']}')
    return folder / 'clip.jsonl'


def clip_frames(rng, folder):
    """ A clip of many frames, which may be predicted. """
    np.savez(folder / 'clip.npz', text='a', audio=np.ones((rng.choice([20_000, 100_000]), 12), 'f4'))
    return folder / 'clip.npz'


class ClipBomb(Bomb):
    bombs = (clip_header, clip_zeros, clip_device, clip_text, clip_lists, clip_frames)

    def __init__(self, places):
        super().__init__(places)
        self.run = load(places.curriculum / 'whole').run

    def read(self):
        run = self.run
        clips, _ = read_clips(str(self.path), run.facts, run.system.modalities_read(run.knobs))
        with reading_clips(run) as run:
            describe_predictions(run, clips)


BOMB_KINDS = dict(source_bomb=SourceBomb, clip_bomb=ClipBomb)
