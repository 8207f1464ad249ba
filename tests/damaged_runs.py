"""
Seeded damage of run folders: their JSON files, checkpoints and exports, and the commands that read
them. A damaged folder ends in one sentence, or in the same result as the undamaged one.
"""

import json
import os
import signal
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

from fakes import command, train
from run.folder import load_checkpoint, save_checkpoint

# What replaces a value of a JSON file
WRONG_VALUES = [
    None, True, '', 'x', 0, -1, 0.5, 7, 1e9, 10**9, 10**30, -1e308, float('nan'), float('inf'), [],
    {}, [[]], [None], [0, 'x'], {'a': 1}, 'a' * 3000, '\ud800', 'two\nlines', '../../x', 'auto',
]
# What replaces, precedes or follows the bytes of a file
WRONG_BYTES = [b'', b'\xef\xbb\xbf', b'\xff\xfe', b'\0' * 40, b'[' * 100_000, b'null', b'3', b'"x"', b'[]', b'{}']

TEXT_FILES = ['result.json', 'log.jsonl', 'test.jsonl', 'config.json', 'best.json', 'last.json']
SCRIPTS = ('eval', 'figures', 'damage', 'train')


def places(value, path=()):
    """ The path (a tuple of keys and indices) of each value inside a JSON value. """
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:3])
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def with_wrong_value(rng, value):
    """ A JSON value (changed in place) with one value replaced, removed or added. """
    *home, key = rng.choice(places(value))
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
    return value


def damage_values(rng, path):
    """ Replace a value in a JSON file, or in a line of a JSONL file. """
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.json':
        path.write_text(json.dumps(with_wrong_value(rng, json.loads(text))))
        return
    lines = text.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(with_wrong_value(rng, json.loads(lines[i])))
    path.write_text('\n'.join(lines) + '\n')


def damage_bytes(rng, path):
    """ Cut, overwrite, remove or duplicate bytes of a file. """
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
    """ Put something else in the place of a file: nothing, a folder, a FIFO or a link. """
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
    """ Replace a value in `about` of result.json and of the checkpoint, which keeps its checksum. """
    about = json.loads((folder / 'result.json').read_text())['about']
    part = rng.choice([about, about['knobs'], about['knobs'], about['corpus']])
    with_wrong_value(rng, part)
    tensors, info = load_checkpoint(str(folder / 'best.safetensors'))
    save_checkpoint(str(folder / 'best.safetensors'), tensors, info | dict(about=about))
    path = folder / 'result.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(about=about)))


def damage(rng, folder):
    """ One random damage of a run folder -> its name. """
    how = rng.choice(['values', 'values', 'bytes', 'file', 'header', 'checkpoint'])
    if how == 'header':
        damage_header(rng, folder)
        return how
    if how == 'checkpoint':
        names, how = ['best.safetensors', 'last.safetensors'], rng.choice(['bytes', 'file'])
    else:
        names = TEXT_FILES
    path = folder / rng.choice([name for name in names if (folder / name).exists()])
    dict(values=damage_values, bytes=damage_bytes, file=damage_file)[how](rng, path)
    return f'{how} of {path.name}'


def commands_on(folder, clip, out):
    """ name -> (script, arguments) of each command that reads a run folder. """
    return {
        'eval': ('eval.py', folder),
        'compare': ('eval.py', folder, folder),
        'modalities': ('eval.py', folder, '--modalities=text'),
        'clip': ('eval.py', folder, f'--clip={clip}'),
        'export': ('eval.py', folder, f'--export={out}/export'),
        'figures': ('tools/figures.py', folder),
        'damage': ('tools/damage.py', folder),
    }


@contextmanager
def at_most(seconds):
    def late(*_):
        raise TimeoutError(f'still running after {seconds} s')

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(*argv, seconds=120):
    """
    Run a script in this process -> ('ended', what it printed), ('sentence', its error message) or
    ('broken', what is wrong: a traceback, a message of several lines, or too long a time).
    """
    printed = StringIO()
    run = train if argv[0] == 'train.py' else lambda *words: command(argv[0], *words)
    try:
        with at_most(seconds), redirect_stdout(printed), redirect_stderr(printed):
            run(*argv[1:])
    except SystemExit as e:
        said = str(e)
        if not e.code:
            return 'ended', printed.getvalue()
        is_sentence = said.strip() and '\n' not in said.strip() and len(said) < 1500
        return ('sentence', said) if is_sentence else ('broken', f'message: {said!r}')
    except BaseException:
        return 'broken', traceback.format_exc()
    return 'ended', printed.getvalue()


def files_in(folder):
    """ {path: (size, time of change)} of all files in a folder tree. """
    found = {}
    for home, _, names in os.walk(folder):
        for name in names:
            stat = os.lstat(os.path.join(home, name))
            found[os.path.join(home, name)] = stat.st_size, stat.st_mtime_ns
    return found
