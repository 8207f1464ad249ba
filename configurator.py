"""
Configuration as in nanoGPT: the knobs (settings) of a script are its own globals.

    from configurator import configure
    lr: AtLeast(0) = 1e-4          # peak learning rate
    config = configure(globals())  # python train.py [config/x.py ...] [--lr=3e-4 ...]

Config files and flags override the defaults. Of two config files or flags that set the same knob,
the one that is later on the command line counts. An unknown name, a wrong type, a value outside the
knob's range or a malformed flag stops the run with one sentence. int -> float is the only silent
conversion. --help prints every knob.

A knob is a global without a leading underscore whose value is a bool, int, float, str, None or a
list of these. Call configure right after the knobs, before other constants are defined or imported:
after `from math import pi`, pi would be a knob.

A script that trains one of several systems passes them: `configure(globals(), systems=SYSTEMS)`.
The knobs of a run are then the script's own and those in the `Knobs` class of the chosen system. A
knob's annotation restricts its values: `Literal['a']`, `AtLeast(1)`, `Share()`, `OrJsonFile(..)`.
"""
import ast
import difflib
import fnmatch
import functools
import inspect
import io
import linecache
import runpy
import shlex
import sys
import textwrap
import tokenize
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args, get_origin


class AtLeast:
    """ Annotates numbers of at least `low` and, if `bits` is given, below 2^`bits`. """
    def __init__(self, low, bits=None):
        self.low, self.bits = low, bits

    def fits(self, value):
        return value >= self.low and (self.bits is None or value < 2 ** self.bits)

    def __str__(self):
        return f"at least {self.low}" + (f" and below 2^{self.bits}" if self.bits else "")


class Share:
    """ Annotates a number in [0, 1). with_one=True includes 1, with_zero=False excludes 0. """
    def __init__(self, with_one=False, with_zero=True):
        self.with_one, self.with_zero = with_one, with_zero

    def fits(self, value):
        return 0 < value < 1 or self.with_one and value == 1 or self.with_zero and value == 0

    def __str__(self):
        return f"in {'[' if self.with_zero else '('}0, 1{']' if self.with_one else ')'}"


class OrJsonFile:
    """
    Annotates one of some names, or a JSON file: the knob then holds read(path), the JSON text.
    """
    def __init__(self, *names, read):
        self.names, self.read = names, read

    def fits(self, value):
        return value in self.names or value.startswith('{')

    def __str__(self):
        return f"{', '.join(self.names)} or the path of a JSON file (.json)"


def value_errors(config, annotations):
    """ An error phrase for each value of `config` that its annotation (by name) does not allow. """
    errors = []
    for name, allowed in annotations.items():
        values = config[name] if type(config[name]) in (list, tuple) else [config[name]]
        if get_origin(allowed) is Literal:
            errors += [f"{name}={v!r} is none of {', '.join(map(str, get_args(allowed)))}"
                       for v in values if v not in get_args(allowed)]
        elif type(allowed) in (AtLeast, Share, OrJsonFile) and not all(map(allowed.fits, values)):
            errors += [f"{name}={config[name]} must be {allowed}"]
    return errors


def _stop(sentence):
    sys.exit(f"config: {sentence}")


def _is_knob(value):
    values = value if type(value) in (list, tuple) else [value]
    # exact types, because isinstance takes a bool for an int and np.float64 for a float
    return all(type(v) in (bool, int, float, str, type(None)) for v in values)


def _check(key, value, default, where):
    """ The value, in the type of its default. Stops if it has another type; None allows any. """
    if type(value) in (int, float) and not abs(value) < 2 ** 63:
        _stop(f"{key} is {value} {where}; give a finite number below 2^63")
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


# Names that other libraries have for a knob -> the knobs that may be meant. Of several words the
# first that fits a knob of the run counts; '*' stands for any letters.
_USUAL_NAMES = {
    'learning_rate lrate base_lr': 'lr', 'min_lr eta_min': 'lr_min', 'wd decay': 'weight_decay',
    'max_epochs num_epochs n_epochs num_train_epochs epoch': 'epochs', 'max_iters': 'max_steps',
    'batch bs train_batch_size per_device_train_batch_size': 'batch_size',
    'gradient_accumulation_steps grad_accum accumulation_steps': 'accumulate',
    'clip max_grad_norm gradient_clip_val': 'grad_clip', 'eps epsilon': 'adam_eps',
    'warmup warmup_steps num_warmup_steps warmup_ratio': 'warmup_epochs',
    'early_stop early_stopping early_stopping_patience': 'patience',
    'metric monitor metric_for_best_model': 'select', 'random_seed': 'seed',
    'model model_name model_name_or_path llm language_model backbone bert': 'lm system',
    'method arch architecture': 'system', 'data data_path dataset_name csv': 'corpus',
    'target': 'label', 'modality': 'modalities', 'max_length max_len seq_len': 'max_text_len',
    'output_dir output save_dir log_dir': 'out_dir', 'logging_steps log_every': 'log_interval',
    'save_steps': 'save_interval', 'gpu gpus cuda use_cuda accelerator': 'device',
    'precision fp16 bf16 amp mixed_precision torch_dtype': 'dtype',
    'resume_from_checkpoint checkpoint ckpt_path': 'resume', 'overwrite_output_dir': 'fresh',
    'hidden_size hidden_dim d_model embed_dim': 'fusion_width *_width',
    'num_layers n_layers': 'fusion_layers *_layers', 'num_heads n_heads': 'fusion_heads *_heads',
    'dropout_rate drop_rate dropout_prob p_drop': 'dropout *_dropout', 'lora_r': 'lora_rank',
    'num_tokens n_tokens': 'n_fusion n_pseudo'}
_KNOBS_MEANT = {name: knobs.split() for names, knobs in _USUAL_NAMES.items()
                for name in names.split()}


def _knobs_meant(key, known):
    """ The knobs in `known`, at most 3, that a user of another library may mean by `key`. """
    for pattern in _KNOBS_MEANT.get(key.lower().replace('-', '_'), []):
        if found := fnmatch.filter(known, pattern):
            return found[:3]
    return []


def _refuse_unknown(key, known, where, systems=None):
    """ Stop if the run has no knob `key`; the message names the systems that have it. """
    if key in known:
        return
    owners = [name for name, cls in (systems or {}).items() if key in class_knobs(cls)]
    if owners:
        _stop(f"{key} {where} is a knob of {', '.join(owners)}, not of this run's system: leave it out")
    all_knobs = set(known).union(*(class_knobs(cls) for cls in (systems or {}).values()))
    near = _knobs_meant(key, known) or difflib.get_close_matches(key, sorted(all_knobs), n=1)
    hint = f", did you mean {' or '.join(map(repr, near))}?" if near else (
        "; --help lists the keys, and a helper variable of a config file starts with '_'")
    _stop(f"unknown key {key!r} {where}{hint}")


def _parse(text, default):
    """ The value of a flag's text. A str knob takes the text itself: --name=1e5 gives '1e5'. """
    if isinstance(default, str):
        return text
    is_bare_list = text not in ('', 'None') and text[0] not in '[('  # such as 2,3,4
    if isinstance(default, (list, tuple)) and is_bare_list:
        like = default[0] if default else None
        return [_parse(word.strip(), like) for word in text.split(',')]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    return float(text) if text in ('inf', '-inf', 'nan') else text


def _no_config(path):
    """ Stop because `path` is no config file; the message suggests similar names. """
    stems = {p.stem: p.as_posix() for p in sorted(Path('config').rglob('*.py'))}
    near = [s for s in stems if path.stem in s][:3]
    near = near or difflib.get_close_matches(path.stem, stems, n=3)
    hint = f"did you mean {' or '.join(stems[s] for s in near)}?" if near else "see ls config/"
    _stop(f"'{path}' is not a config file (a .py that exists); {hint}")


def _load_settings(path, known, variant=None):
    """
    {name: value} of the settings in one config file, unchecked. A name in `known` is a setting
    whatever its value is. Stops if the file does not run, sets a knob twice, or has no data set
    `variant`.
    """
    path, where = Path(path), f"in {path}"
    if path.suffix != '.py' or not path.is_file():  # runpy would also run a folder or a zip file
        _no_config(path)
    try:
        found = runpy.run_path(str(path))
        body = ast.parse(path.read_text(encoding='utf-8-sig')).body
    except (Exception, SystemExit) as e:
        why = f"{type(e).__name__}: {' '.join(str(e).split())}"
        _stop(f"{path} does not run ({why}); correct it first")
    targets = [t.id for node in body if isinstance(node, ast.Assign) for t in node.targets
               if isinstance(t, ast.Name)]
    twice = [name for name in targets if name in known and targets.count(name) > 1]
    if twice:
        _stop(f"{twice[0]} is set twice {where}; keep one of the two lines")

    # Every name that the file defines is a setting, except modules, functions and names with a
    # leading underscore. Those that have the name of a knob are kept, so that _check refuses them.
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
        _stop(f"--dataset={variant} needs a config with several data sets, and {path} has none")
    return new


# -------------------------------------------------------------------------------------------------
# Reads the declared knobs of a script, which is parsed and not run, and of the classes of systems

_ANNOTATIONS = dict(Literal=Literal, AtLeast=AtLeast, Share=Share, OrJsonFile=OrJsonFile)


@functools.cache
def declared_knobs(path):
    """
    ({knob: default}, {knob: annotation}) of a script. Its knobs are the top-level assignments above
    the first name with a leading underscore.
    """
    knobs, annotations = {}, {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8-sig')).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if target.id.startswith('_'):
            break
        knobs[target.id] = ast.literal_eval(node.value)
        if isinstance(node, ast.AnnAssign):
            annotation = compile(ast.Expression(node.annotation), str(path), 'eval')
            annotations[target.id] = eval(annotation, dict(_ANNOTATIONS))
    return knobs, annotations


def class_knobs(cls):
    """ {knob: default} of a system: its Knobs class and the bases of that. """
    return {k: v for c in reversed(cls.Knobs.__mro__) for k, v in vars(c).items()
            if not k.startswith('_') and _is_knob(v)}


def class_annotations(cls):
    """ {knob: annotation} of a system. """
    return {k: v for c in reversed(cls.Knobs.__mro__[:-1]) for k, v in inspect.get_annotations(c).items()}


@functools.lru_cache
def _sources_of_classes(text):
    """
    {qualified name: source} of the classes in the text of a file. inspect.getsource would parse the
    whole file for each class, which takes seconds for the classes of all systems.
    """
    found, lines = {}, text.splitlines(keepends=True)

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[prefix + child.name] = ''.join(lines[child.lineno - 1:child.end_lineno])
                visit(child, f'{prefix}{child.name}.')
            elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                visit(child, prefix)

    visit(ast.parse(text), '')
    return found


def class_comments(cls):
    """ {knob: its comment} of a system; {} for a class whose source is not in a file. """
    comments = {}
    for c in reversed(cls.Knobs.__mro__[:-1]):
        try:
            lines = ''.join(linecache.getlines(inspect.getsourcefile(c) or ''))
            source = _sources_of_classes(lines).get(c.__qualname__) or inspect.getsource(c)
            source = textwrap.dedent(source)
        except (OSError, TypeError, SyntaxError):
            continue
        comments |= dict.fromkeys(vars(c), '') | _comments_of(source, column=4)
    return comments


def check_declaration(cls):
    """ Raises TypeError if a knob of a system has no comment, or a default outside its range. """
    wrong = value_errors(class_knobs(cls), class_annotations(cls))
    own, comments = vars(cls.Knobs), class_comments(cls)
    if comments:   # empty for a class whose source is not in a file
        wrong += [f"{k} has no comment behind it" for k, v in own.items()
                  if not k.startswith('_') and _is_knob(v) and not comments.get(k)]
    if wrong:
        raise TypeError(f"the knobs of {cls.__name__}: {'; '.join(wrong)}")


def known_knobs(script, systems, system):
    """ ({knob: default}, {knob: annotation}) of a run: of the script and of its system. """
    known, annotations = declared_knobs(script)
    return known | class_knobs(systems[system]), annotations | class_annotations(systems[system])


def check_knobs(knobs, known, annotations, where):
    """ Raises ValueError if `knobs` has an unknown or missing name, a wrong type or value. """
    try:
        for key, value in knobs.items():
            _refuse_unknown(key, known, where)
            _check(key, value, known[key], where)
    except SystemExit as e:
        raise ValueError(str(e).removeprefix('config: ')) from None
    missing = sorted(set(known) - set(knobs))
    wrong = [f"{missing[0]} is missing"] if missing else value_errors(knobs, annotations)
    if wrong:
        raise ValueError('; '.join(wrong))


def _comments_of(source, column=0):
    """ {name: comment on the line of its first assignment}, for names that start at `column`. """
    comments, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.start[1] == column:
            name = token.string
        if token.type == tokenize.COMMENT and name:
            comments.setdefault(name, token.string.strip('# '))
        if token.type == tokenize.NEWLINE:
            name = None  # a comment on a line of its own belongs to no knob
    return comments


def _comments(path):
    """ {knob: its comment} of a script; {} in a notebook, which has no file. """
    if not path or not Path(path).is_file():
        return {}
    with tokenize.open(path) as f:
        return _comments_of(f.read())


# -------------------------------------------------------------------------------------------------
# The settings of a run

def parse_flags(flags, known, where="on the command line", systems=None):
    """ {knob: text} -> {knob: value}, checked against `known`, {knob: default}. """
    for key in flags:
        _refuse_unknown(key, known, where, systems)
    values = {key: _parse(text, known[key]) for key, text in flags.items()}
    return {key: _check(key, value, known[key], where) for key, value in values.items()}


def _print_help(config, comments, annotations):
    """ Print every knob as a flag for a shell, with its comment and, of a Literal, its choices. """
    for k, v in config.items():
        text = ','.join(map(str, v)) or '[]' if type(v) in (list, tuple) else str(v)
        choices = list(get_args(annotations.get(k))) or ''
        print(f"{f'--{k}={shlex.quote(text)}':<32} {comments.get(k, '')} {choices}".rstrip())


def _layers(argv, known):
    """ (is_flag, where, {knob: value or text}) of each config file and flag, in order. """
    picked = [arg.partition('=')[2] for arg in argv if arg.startswith('--dataset=')]
    variant = picked[-1] if picked else None
    layers = []
    for arg in argv:
        key, eq, text = arg[2:].partition('=')
        if not arg.startswith('-'):
            layers.append((False, f"in {Path(arg)}", _load_settings(arg, known, variant)))
        elif not eq or not arg.startswith('--'):
            key = arg.lstrip('-').partition('=')[0]
            _stop(f"flags look like --key=value, got {arg!r}: write --{key}=VALUE")
        else:
            layers.append((True, "on the command line", {key: text}))
    return layers


def run_knobs(argv, common, annotations, systems=None):
    """
    The knobs of a run, from its command line: ({knob: default}, {knob: value}). `common` has the
    defaults of the script's own knobs, `annotations` their annotations; the system's are added.
    """
    all_knobs = set(common).union(*(class_knobs(cls) for cls in (systems or {}).values()))
    layers = _layers([a for a in argv if a not in ('-h', '--help')], all_knobs)
    known = dict(common)
    if systems:
        names = [settings['system'] for _, _, settings in layers if 'system' in settings]
        name = names[-1] if names else common['system']
        if name not in systems:
            _stop(f"system={name!r} is none of {', '.join(systems)}")
        own = class_knobs(systems[name])
        if both := sorted(set(own) & set(common)):
            _stop(f"{both[0]} is a knob of every run, and {name} has one of that name too; rename "
                  "the system's knob")
        known |= own
        annotations = annotations | class_annotations(systems[name])
    config = dict(known)
    for is_flag, where, settings in layers:
        if is_flag:
            config |= parse_flags(settings, known, where, systems)
        else:
            for key, value in settings.items():
                _refuse_unknown(key, known, where, systems)
                config[key] = _check(key, value, known[key], where)
    for key, allowed in annotations.items():
        if type(allowed) is OrJsonFile and config[key].endswith('.json'):
            try:
                config[key] = allowed.read(config[key])
            except ValueError as e:
                _stop(f"{key}={config[key]} {e}")
    wrong = value_errors(config, {k: v for k, v in annotations.items() if k in config})
    if wrong:
        _stop('; '.join(wrong) + '.')
    return known, config


def configure(g, argv=None, echo=True, systems=None):
    """
    Set the knobs in g, a script's globals(), from argv, and print those that differ from their
    defaults. Returns all knobs as a dict, the system's included. --help prints them and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    common = {k: v for k, v in g.items() if not k.startswith('_') and _is_knob(v)}
    path = g.get('__file__')
    declared, annotations = declared_knobs(path) if path and Path(path).is_file() else ({}, {})
    if systems:   # this script imports before its knobs: imported constants are not knobs
        common = {k: v for k, v in common.items() if k in declared}
    known, config = run_knobs(argv, common, annotations, systems)
    if '-h' in argv or '--help' in argv:
        comments = _comments(path)
        if systems:
            comments |= class_comments(systems[config['system']])
            annotations = annotations | class_annotations(systems[config['system']])
        _print_help(config, comments, annotations)
        sys.exit(0)
    for k, v in config.items():
        if echo and v != known[k]:
            print(f"    {k} = {v!r}   (default {known[k]!r})")
    g.update({k: v for k, v in config.items() if k in common})
    return config
