"""
Flat knobs, nanoGPT to the hand: a script's own globals are its settings.

    from configurator import configure
    lr = 1e-4                      # peak learning rate
    config = configure(globals())  # python train.py [config/x.py ...] [--lr=3e-4 ...]

Later wins: defaults < config files, in order < flags, in order. An unknown name, a wrong type or a malformed
flag stops the run with one sentence: a typo that trains for an hour and then sits in a table as an ablation
is the costliest bug there is. int -> float is the only silent conversion. --help prints every knob.

A knob is a global without a leading underscore that holds a bool, int, float, str, None or a list of these.
Call configure right after the knobs, before other constants: `from math import pi` would be a knob too.
"""
import ast, difflib, functools, math, runpy, shlex, sys, tokenize
from pathlib import Path
from types import ModuleType


def _stop(what):
    sys.exit(f"config: {what}")


def _is_knob(value):
    values = value if type(value) in (list, tuple) else [value]
    # by exact type: to isinstance a bool is an int and np.float64 a float
    return all(type(v) in (bool, int, float, str, type(None)) for v in values)


def _check(key, value, default, where):
    """ value in the type of its default, or stop. A default of None says nothing, so any type may come. """
    if type(value) is float and math.isnan(value): _stop(f"{key} is nan {where}; give a number or inf")
    if _is_knob(value):
        if type(default) is float and type(value) is int: return float(value)
        if type(value) in (list, tuple) and type(default) in (list, tuple, type(None)):
            like, kind = default[0] if default else None, tuple if type(default) is tuple else list
            return kind(_check(f"{key}[{i}]", v, like, where) for i, v in enumerate(value))
        if type(value) is type(default) or default is None: return value
    wants = 'a number, a str, None or a list' if default is None else type(default).__name__
    got = 'None' if value is None else f"{type(value).__name__} ({value!r})"
    _stop(f"{key} wants {wants}, got {got} {where}")


def _known(key, known, where):
    if key in known: return
    hint = difflib.get_close_matches(key, known, n=1)
    _stop(f"unknown key {key!r} {where}" + (f", did you mean {hint[0]!r}?" if hint else
          "; --help lists the keys, and in a config file the name of a helper starts with '_'"))


def _parse(text, default):
    """ A flag's text as a value. For a str knob that is the text itself: --name=1e5 is '1e5'. """
    if isinstance(default, str): return text
    if isinstance(default, (list, tuple)) and text not in ('', 'None') and text[0] not in '[(':   # 2,3,4
        return [_parse(word.strip(), default[0] if default else None) for word in text.split(',')]
    try: return ast.literal_eval(text)
    except (ValueError, SyntaxError): pass
    return float(text) if text in ('inf', '-inf', 'nan') else text   # any other bare word is a str


def read_config(path, known, variant=None):
    """
    The settings of one config file, checked against known (defaults by name) and applied to nothing. A file
    that sets `dataset` may hold variants, `mosi = dict(lr=1e-3)`, settings that go over its own: of these the one called `variant`
    counts, or else the one of that name.
    """
    path, where = Path(path), f"in {path}"
    if path.suffix != '.py' or not path.is_file():   # runpy itself would also run a folder or a zip
        stems = {p.stem: p.as_posix() for p in sorted(Path('config').rglob('*.py'))}
        near = [s for s in stems if path.stem in s][:3] or difflib.get_close_matches(path.stem, stems, n=3)
        hint = f"did you mean {' or '.join(stems[s] for s in near)}?" if near else "see ls config/"
        _stop(f"'{path}' is not a config file, a .py that exists; {hint}")
    try: found = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        _stop(f"{path} does not run, mend it first ({type(e).__name__}: {' '.join(str(e).split())})")
    # modules and functions are no settings unless they take a knob's name; all else that a file leaves is one
    new = {k: v for k, v in found.items()
           if k in known or not (k.startswith('_') or isinstance(v, ModuleType) or callable(v))}
    if 'dataset' in new:
        variant = variant or new['dataset']
        variants = {k: new.pop(k) for k, v in list(new.items()) if type(v) is dict and k not in known}
        if variant not in variants: _stop(f"there is no dataset {variant!r} {where}: it has {', '.join(variants)}")
        new |= variants[variant] | dict(dataset=variant)
    elif variant: _stop(f"--dataset={variant} picks one of a config's data sets, and {path} has none")
    for key in new: _known(key, known, where)
    return {key: _check(key, value, known[key], where) for key, value in new.items()}


def _comments(path):
    """ {knob: the comment behind its first assignment} in a script; {} in a notebook, which has no file. """
    comments, name = {}, None
    if not path or not Path(path).is_file(): return comments
    with tokenize.open(path) as f:
        for token in tokenize.generate_tokens(f.readline):
            if token.type == tokenize.NAME and token.start[1] == 0: name = token.string
            if token.type == tokenize.COMMENT and name: comments.setdefault(name, token.string.strip('# '))
            if token.type == tokenize.NEWLINE: name = None   # a comment on its own line belongs to no knob
    return comments


@functools.cache
def knobs_of(path):
    """ {knob: default} of a script, without running it: its literal assignments up to the first private name. """
    knobs = {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        if not isinstance(node, ast.Assign): continue
        if node.targets[0].id.startswith('_'): break
        knobs[node.targets[0].id] = ast.literal_eval(node.value)
    return knobs


def parse_flags(flags, known, where="on the command line"):
    """ {knob: text} -> {knob: value}, checked against known (defaults by name) as the command line is. """
    for key in flags: _known(key, known, where)
    return {key: _check(key, _parse(value, known[key]), known[key], where) for key, value in flags.items()}


def check_knobs(knobs, known, where):
    """ Raises ValueError where `knobs` (name -> value) are not of the names and types of `known` (defaults by name). """
    try:
        for key, value in knobs.items():
            _known(key, known, where)
            _check(key, value, known[key], where)
    except SystemExit as e:
        raise ValueError(str(e).removeprefix('config: ')) from None


def configure(g, argv=None, echo=True):
    """ Set the knobs in g, a script's globals(), from argv; print what changed; return all as a dict. """
    defaults = {k: v for k, v in g.items() if not k.startswith('_') and _is_knob(v)}
    argv, config = sys.argv[1:] if argv is None else argv, dict(defaults)
    if '-h' in argv or '--help' in argv:
        comments = _comments(g.get('__file__'))
        for k, v in defaults.items():   # quoted, so that every line can be pasted back into a shell
            text = ','.join(map(str, v)) or '[]' if type(v) in (list, tuple) else str(v)
            print(f"{f'--{k}={shlex.quote(text)}':<32} {comments.get(k, '')}".rstrip())
        sys.exit(0)
    variant = next((a.partition('=')[2] for a in reversed(argv) if a.startswith('--dataset=')), None)
    for arg in argv:
        key, eq, text = arg[2:].partition('=')
        if not arg.startswith('-'): config.update(read_config(arg, defaults, variant))
        elif not eq or not arg.startswith('--'): _stop(f"flags look like --key=value, got {arg!r}")
        else:
            config |= parse_flags({key: text}, defaults)
    for k, v in config.items():
        if echo and v != defaults[k]: print(f"    {k} = {v!r}   (default {defaults[k]!r})")
    g.update(config)
    return config
