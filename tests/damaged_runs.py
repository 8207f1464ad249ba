"""
Damage of run folders: of their JSON files and checkpoints, and of sweeps. Each command that reads a
run folder ends in one sentence, or prints what it prints for the undamaged folder.
"""

import json
import os
import re
import shutil
import zlib
from contextlib import redirect_stdout
from io import StringIO

from fakes import command, deepmlf, files_of_at_most, forge, train

# What replaces a value of a JSON file
WRONG_VALUES = [
    *(None, True, '', 'x', 0, -1, 0.5, 7, 1e9, 10**9, 10**30, -1e308, float('nan'), float('inf')),
    *([], {}, [[]], [None], [0, 'x'], {'a': 1}, 'a' * 3000, '\ud800', 'two\nlines', '../../x', 'auto'),
]
# What precedes or replaces the bytes of a file
WRONG_BYTES = [b'', b'\xef\xbb\xbf', b'\xff\xfe', b'\0' * 40, b'[' * 100_000, b'null', b'3', b'"x"', b'[]', b'{}']

JSON_FILES = ['result.json', 'log.jsonl', 'test.jsonl', 'config.json', 'best.json', 'last.json']
CHECKPOINTS = ['best.safetensors', 'last.safetensors']


# --------------------------------------------------------------------------------------------------
# One damage


def places_in(value, path=()):
    """ The path (a tuple of keys and indices) of each value inside a JSON value. """
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:3])
    for key, inner in items:
        found += places_in(inner, (*path, key))
    return found


def set_wrong_value(rng, value):
    """ Replace, remove or add one value inside a JSON value. """
    *home, key = rng.choice(places_in(value))
    holder = value
    for step in home:
        holder = holder[step]
    how = rng.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder['smell'] = rng.choice(WRONG_VALUES)
    elif how == 2 and isinstance(holder, list):
        holder.append(rng.choice(WRONG_VALUES))
    else:
        holder[key] = rng.choice(WRONG_VALUES)


def damage_value(rng, path):
    """ Replace a value in a JSON file, or in a line of a JSONL file. """
    text = path.read_text(encoding='utf-8')
    lines = [text] if path.suffix == '.json' else text.splitlines()
    i = rng.randrange(len(lines))
    value = json.loads(lines[i])
    set_wrong_value(rng, value)
    lines[i] = json.dumps(value)
    path.write_text('\n'.join(lines) + '\n')


def damage_bytes(rng, path):
    """ Cut, overwrite, remove, repeat or replace bytes of a file. """
    raw = bytearray(path.read_bytes())
    i, how = rng.randrange(len(raw)), rng.randrange(6)
    if how == 0:
        del raw[i:]
    elif how == 1:
        raw[i] = rng.randrange(256)
    elif how == 2:
        del raw[i : i + rng.choice([1, 4, 40])]
    elif how == 3:
        raw[i:i] = raw[rng.randrange(len(raw)) :][: rng.choice([1, 8, 80])]
    elif how == 4:
        raw = bytearray(rng.choice(WRONG_BYTES)) + raw
    else:
        raw = bytearray(rng.choice(WRONG_BYTES))
    path.write_bytes(raw)


def damage_file(rng, path):
    """ Put nothing, a folder, a FIFO or a link in the place of a file. """
    kept = path.with_name('kept')
    path.rename(kept)
    how = rng.randrange(4)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to(kept)


def damage_header(rng, folder):
    """ Replace a value in `about`, of result.json and of the checkpoint, which gets a new checksum. """
    about = json.loads((folder / 'result.json').read_text())['about']
    set_wrong_value(rng, rng.choice([about, about['knobs'], about['knobs'], about['corpus']]))
    knobs = about.pop('knobs', {})
    forge(folder, about=about, knobs=knobs) if isinstance(knobs, dict) else None


# --------------------------------------------------------------------------------------------------
# Kinds for tests/soak.py


def printed(script, *argv):
    """ What a script prints, without times and speeds. """
    out = StringIO()
    with redirect_stdout(out):
        train(*argv) if script == 'train.py' else command(script, *argv)
    return re.sub(r'[\d.]+ (s|min|GFLOP/s)\b', r'\1', out.getvalue())


class DamagedRun:
    """ Damage of one file of a run folder, read by a random command. """

    files = JSON_FILES
    damages = (damage_value, damage_value, damage_bytes, damage_file)
    scripts = ('eval', 'compare', 'modalities', 'clip', 'export', 'figures', 'damage', 'resume')

    def __init__(self, places):
        self.places, self.run = places, places.work / 'run'
        self.clip = places.work / 'clip.jsonl'
        clip = dict(text='the film was superb', audio=[[0.1] * 12] * 9, vision=[[0.2] * 16] * 7)
        self.clip.write_text(json.dumps(clip))
        self.undamaged = {}  # name of a command -> what it prints

    def arguments(self, name):
        """ The script and the arguments of a command. """
        if name == 'resume':
            k = self.places
            run = deepmlf(k.corpora, k.curriculum, 'whole', f'--out_dir={self.run}', '--resume=True')
            return 'train.py', *run
        more = {
            'compare': [self.run],
            'modalities': ['--modalities=text'],
            'clip': [f'--clip={self.clip}'],
            'export': [f'--export={self.places.work}/export'],
        }
        script = dict(figures='tools/figures.py', damage='tools/damage.py').get(name, 'eval.py')
        return script, self.run, *more.get(name, [])

    def copy(self):
        """ A new copy of the undamaged run, without the folders that a command has made. """
        for name in ('run', 'export', 'out'):
            shutil.rmtree(self.places.work / name, ignore_errors=True)
        shutil.copytree(self.places.curriculum / 'whole', self.run)
        if self.name == 'resume':
            (self.run / 'report.md').unlink()  # or it would be finished

    def printed(self):
        """ What the command prints, with the CRC-32 of the pictures that it draws into the run. """
        before = os.getcwd()
        os.chdir(self.places.work)
        try:
            text = printed(*self.arguments(self.name))
        finally:
            os.chdir(before)
        for picture in sorted(self.run.glob('figures/*.png')):
            text += f'{picture.name} {zlib.crc32(picture.read_bytes())}\n'
        return text

    def damage(self, rng):
        self.name = rng.choice(self.scripts)
        if self.name not in self.undamaged:
            for _ in range(2):  # the first call prints once how it compared the LM
                self.copy()
                self.undamaged[self.name] = self.printed()
        self.whole = self.undamaged[self.name]
        self.copy()
        return f'{self.name} after {self.damage_copy(rng)}'

    def damage_copy(self, rng):
        file, damage = rng.choice(self.files), rng.choice(self.damages)
        damage(rng, self.run / file)
        return f'{damage.__name__} of {file}'

    def use(self):
        text = self.printed()
        left = [p.name for p in self.places.work.rglob('*.new')]
        assert not left, left
        return text


class DamagedCheckpoint(DamagedRun):
    files = CHECKPOINTS
    damages = (damage_bytes, damage_file)


class ForgedHeader(DamagedRun):
    """ Knobs and facts of wrong types and values, in a checkpoint whose checksum is right. """

    def damage_copy(self, rng):
        damage_header(rng, self.run)
        return 'damage_header'

    def use(self):
        super().use()  # other knobs may give other scores


class DamagedSweep:
    """ The JSON of a sweep, drawn by figures.py. """

    def __init__(self, places):
        self.path, self.whole = places.work / 'sweep.json', 'drawn'
        rows = [dict(label=f'n = {n}', test=[dict(mae=1 + n / 9, corr=0.1)] * 3) for n in (1, 4, 8)]
        self.sweep = dict(title='a sweep', command=['x'], rows=rows)

    def damage(self, rng):
        self.path.unlink(missing_ok=True)
        self.path.write_text(json.dumps(self.sweep))
        damage = rng.choice([damage_value, damage_value, damage_bytes])
        damage(rng, self.path)
        return damage.__name__

    def use(self):
        printed('tools/figures.py', self.path)


class FullDisk(DamagedRun):
    """ A disk that becomes full: no file may grow past a random size. """

    def damage(self, rng):
        self.most = None  # while the undamaged copy is read
        return super().damage(rng)

    def damage_copy(self, rng):
        self.most = rng.choice([0, 100, 3000, 20_000, 60_000])
        return f'{self.most} bytes a file'

    def printed(self):
        if self.most is None:
            return super().printed()
        with files_of_at_most(self.most):
            return super().printed()


RUN_KINDS = dict(
    run=DamagedRun, checkpoint=DamagedCheckpoint, header=ForgedHeader, sweep=DamagedSweep, full_disk=FullDisk
)
