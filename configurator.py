"""
Flat knobs, nanoGPT to the hand: a script's own globals are its settings.

    from configurator import configure
    lr = 1e-4                      # peak learning rate
    config = configure(globals())  # python train.py [config/x.py ...] [--lr=3e-4 ...]

Later wins: defaults < config files, in order < flags, in order. An unknown name, a wrong type or a
malformed flag stops the run with one sentence: a typo that trains for an hour and then sits in a
table as an ablation is the costliest bug there is. int -> float is the only silent conversion.
--help prints every knob.

A knob is a global without a leading underscore that holds a bool, int, float, str, None or a list
of these. Call configure right after the knobs, before other constants: `from math import pi` would
be a knob too.
"""
import ast
import difflib
import functools
import math
import runpy
import shlex
import sys
import tokenize
from pathlib import Path
from types import ModuleType


def _stop(what):
    sys.exit(f"config: {what}")


def _is_knob(value):
    values = value if type(value) in (list, tuple) else [value]
    # by exact type: to isinstance a bool is an int and np.float64 a float
    return all(type(v) in (bool, int, float, str, type(None)) for v in values)


def _check(key, value, default, where):
    """ value in the type of its default, or stop. A default of None says nothing, so any type may
    come. """
    if type(value) is float and math.isnan(value):
        _stop(f"{key} is nan {where}; give a number or inf")
    if _is_knob(value):
        if type(default) is float and type(value) is int:
            return float(value)
        if type(value) in (list, tuple) and type(default) in (list, tuple, type(None)):
            like = default[0] if default else None
            items = [_check(f"{key}[{i}]", v, like, where) for i, v in enumerate(value)]
            return tuple(items) if type(default) is tuple else items
        if type(value) is type(default) or default is None:
            return value
    wants = 'a number, a str, None or a list' if default is None else type(default).__name__
    got = 'None' if value is None else f"{type(value).__name__} ({value!r})"
    _stop(f"{key} wants {wants}, got {got} {where}")


def _known(key, known, where):
    """ Stop if there is no knob of this name. """
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else (
        "; --help lists the keys, and in a config file the name of a helper starts with '_'")
    _stop(f"unknown key {key!r} {where}{hint}")


def _parse(text, default):
    """ A flag's text as a value. For a str knob that is the text itself: --name=1e5 is '1e5'. """
    if isinstance(default, str):
        return text
    is_bare_list = text not in ('', 'None') and text[0] not in '[('  # 2,3,4
    if isinstance(default, (list, tuple)) and is_bare_list:
        like = default[0] if default else None
        return [_parse(word.strip(), like) for word in text.split(',')]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    return float(text) if text in ('inf', '-inf', 'nan') else text  # any other bare word is a str


def _no_config(path):
    """ Stop at a path that is no config file, with a guess at what was meant. """
    stems = {p.stem: p.as_posix() for p in sorted(Path('config').rglob('*.py'))}
    near = [s for s in stems if path.stem in s][:3]
    near = near or difflib.get_close_matches(path.stem, stems, n=3)
    hint = f"did you mean {' or '.join(stems[s] for s in near)}?" if near else "see ls config/"
    _stop(f"'{path}' is not a config file, a .py that exists; {hint}")


def read_config(path, known, variant=None):
    """
    The settings of one config file, checked against known (defaults by name) and applied to
    nothing. A file that sets `dataset` may hold variants, `mosi = dict(lr=1e-3)`, settings that go
    over its own: of these the one called `variant` counts, or else the one of that name.
    """
    path, where = Path(path), f"in {path}"
    if path.suffix != '.py' or not path.is_file():  # runpy itself would also run a folder or a zip
        _no_config(path)
    try:
        found = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())}"
        _stop(f"{path} does not run, mend it first ({why})")

    # modules and functions are no settings unless they take a knob's name; all else that a file
    # leaves is one
    new = {}
    for k, v in found.items():
        is_helper = k.startswith('_') or isinstance(v, ModuleType) or callable(v)
        if k in known or not is_helper:
            new[k] = v
    if 'dataset' in new:
        variant = variant or new['dataset']
        names = [k for k, v in new.items() if type(v) is dict and k not in known]
        variants = {k: new.pop(k) for k in names}
        if variant not in variants:
            _stop(f"there is no dataset {variant!r} {where}: it has {', '.join(variants)}")
        new |= variants[variant] | dict(dataset=variant)
    elif variant:
        _stop(f"--dataset={variant} picks one of a config's data sets, and {path} has none")
    for key in new:
        _known(key, known, where)
    return {key: _check(key, value, known[key], where) for key, value in new.items()}


def _comments(path):
    """ {knob: the comment behind its first assignment} in a script; {} in a notebook, which has no
    file. """
    comments, name = {}, None
    if not path or not Path(path).is_file():
        return comments
    with tokenize.open(path) as f:
        for token in tokenize.generate_tokens(f.readline):
            if token.type == tokenize.NAME and token.start[1] == 0:
                name = token.string
            if token.type == tokenize.COMMENT and name:
                comments.setdefault(name, token.string.strip('# '))
            if token.type == tokenize.NEWLINE:
                name = None  # a comment on its own line belongs to no knob
    return comments


@functools.cache
def knobs_of(path):
    """ {knob: default} of a script, without running it: its literal assignments up to the first
    private name. """
    knobs = {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        if not isinstance(node, ast.Assign):
            continue
        name = node.targets[0].id
        if name.startswith('_'):
            break
        knobs[name] = ast.literal_eval(node.value)
    return knobs


def parse_flags(flags, known, where="on the command line"):
    """ {knob: text} -> {knob: value}, checked against known (defaults by name) as the command line
    is. """
    for key in flags:
        _known(key, known, where)
    values = {key: _parse(text, known[key]) for key, text in flags.items()}
    return {key: _check(key, value, known[key], where) for key, value in values.items()}


def _print_help(defaults, comments):
    """ Every knob as a flag that can be pasted back into a shell, with its comment. """
    for k, v in defaults.items():
        text = ','.join(map(str, v)) or '[]' if type(v) in (list, tuple) else str(v)
        print(f"{f'--{k}={shlex.quote(text)}':<32} {comments.get(k, '')}".rstrip())


def configure(g, argv=None, echo=True):
    """ Set the knobs in g, a script's globals(), from argv; print what changed; return all as a
    dict. """
    argv = sys.argv[1:] if argv is None else argv
    defaults = {k: v for k, v in g.items() if not k.startswith('_') and _is_knob(v)}
    if '-h' in argv or '--help' in argv:
        _print_help(defaults, _comments(g.get('__file__')))
        sys.exit(0)

    picked = [arg.partition('=')[2] for arg in argv if arg.startswith('--dataset=')]
    variant = picked[-1] if picked else None
    config = dict(defaults)
    for arg in argv:
        key, eq, text = arg[2:].partition('=')
        if not arg.startswith('-'):
            config |= read_config(arg, defaults, variant)
        elif not eq or not arg.startswith('--'):
            _stop(f"flags look like --key=value, got {arg!r}")
        else:
            config |= parse_flags({key: text}, defaults)
    for k, v in config.items():
        if echo and v != defaults[k]:
            print(f"    {k} = {v!r}   (default {defaults[k]!r})")
    g.update(config)
    return config
