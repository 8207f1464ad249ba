"""
The structure of the repository: no circular imports, a limit on the length of files, each system's
name in one place, no unused knobs, valid configs, and prerequisites that end with their parent.

    python -m pytest -q tests/test_house.py
"""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation
from configurator import class_knobs, declared_knobs, run_knobs
from fakes import ENV, HERE, command, forge, same_run, train
from losses import l1, mse
from model import SYSTEMS
from run.errors import ModelError
from run.finished import experiment_of
from run.folder import lock
from system import System, checked_loss, checked_prediction

PACKAGES = ('baselines', 'corpora', 'run', 'tools')


def parsed(paths):
    return {p.relative_to(HERE).as_posix(): ast.parse(p.read_text(encoding='utf-8')) for p in paths}


AT_ROOT = [p for p in sorted(HERE.glob('*.py')) if not p.name.startswith('test_')]
SOURCES = parsed(AT_ROOT + [p for name in PACKAGES for p in sorted((HERE / name).glob('*.py'))])


def nodes(kind):
    """(file, node) for every AST node of a class in the repository's own code."""
    for file, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield file, node


# --------------------------------------------------------------------------------------------------
# Files


def imported(tree):
    """The files of this repository that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    files = {name.replace('.', '/') + '.py' for name in found}
    return files & set(SOURCES)


def test_imports_are_not_circular():
    graph = {file: imported(tree) for file, tree in SOURCES.items()}
    assert graph['train.py'] > {'model.py', 'eval.py', 'run/folder.py'}
    for file in graph:
        reached, waiting = set(), list(graph[file])
        while waiting:
            other = waiting.pop()
            if other not in reached:
                reached.add(other)
                waiting += graph[other]
        assert file not in reached, file


# The most lines that a file may have; 450 for the others
MOST_LINES = {
    'train.py': 380,
    'model.py': 940,  # 900, and room for the system that docs/fork.md adds
    'adapters.py': 900,
    'lm.py': 650,
    'run/load_lm.py': 470,  # the aim is 450
}


def test_files_are_not_too_long():
    for file in SOURCES:
        n = len((HERE / file).read_text(encoding='utf-8').splitlines())
        assert n <= MOST_LINES.get(file, 450), (file, n)


def test_the_root_has_at_most_13_python_files_and_one_test():
    names = [p.name for p in HERE.glob('*.py')]
    assert len(names) <= 13
    assert [name for name in names if 'test' in name] == ['test_smoke.py']


def function_named(tree, name, cls=None):
    """The node of the method `name` of the class `cls`, or else of the function `name`."""
    in_class = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls]
    for body in [n.body for n in in_class] + [tree.body]:
        found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
        if found:
            return found[0]
    raise AssertionError(f'there is neither a method {cls}.{name} nor a function {name}')


def code_lines(lines, first, last):
    """How many of the lines first .. last (from 1) are code: not a comment, docstring or blank."""
    part = '\n'.join(lines[first - 1 : last])
    for doc in re.findall(r'^ *""".*?"""$', part, re.M | re.S):
        part = part.replace(doc, '')
    return sum(bool(re.match(r'\s*[^#\s]', line)) for line in part.split('\n'))


def test_one_step_of_deepmlf_is_at_most_six_files_and_300_lines():
    """A cell of docs/reading.md lists `Class.method`, `method of the same class`; `function`."""
    page = (HERE / 'docs' / 'reading.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\S+\.py)` +\| (.+) \|$', page, re.M)
    assert rows[0][0] == 'train.py' and 4 <= len(dict(rows)) <= 6
    n_lines = 0
    for file, what in rows:
        lines = (HERE / file).read_text(encoding='utf-8').splitlines()
        names = re.findall(r'`([^`]+)`', what)
        if file == 'train.py':
            first, last = [
                next(n for n, line in enumerate(lines, 1) if line.strip().startswith(name))
                for name in names
            ]
            n_lines += code_lines(lines, first, last)
            continue
        for group in what.split(';'):
            cls = None
            for name in re.findall(r'`([^`]+)`', group):
                cls, name = name.split('.') if '.' in name else (cls, name)
                node = function_named(SOURCES[file], name, cls)
                n_lines += code_lines(lines, node.lineno, node.end_lineno)
    assert 200 < n_lines <= 300, n_lines


# --------------------------------------------------------------------------------------------------
# A system is one class and one config: no other code depends on which system it is

# Names of systems that also name a knob, a stream and a bound of the toy corpus
AMBIGUOUS = {'lm', 'av', 'late'}


def test_no_code_spells_the_name_of_a_system():
    """Except the keys of SYSTEMS and BASELINES (they are keywords) and the default in train.py."""
    spelled = []
    for file, node in nodes(ast.Constant):
        if node.value in set(SYSTEMS) - AMBIGUOUS:
            spelled.append((file, node.value))
    assert spelled == [('train.py', declared_knobs(HERE / 'train.py')[0]['system'])]


def is_system(node):
    """True for an expression that reads the knob: system, k['system'], x.system."""
    return re.search(r"(^system|\.system|\['system'\])$", ast.unparse(node)) is not None


def test_the_name_of_a_system_is_only_looked_up_in_systems():
    """Nothing compares it with a name or uses it as the key of another dict."""
    tables = ('SYSTEMS', 'systems')
    for file, node in nodes(ast.Compare):
        sides = [node.left, *node.comparators]
        if any(map(is_system, sides)):
            assert ast.unparse(sides[-1]) in tables, (file, node.lineno, ast.unparse(node))
    for file, node in nodes(ast.Subscript):
        if is_system(node.slice):
            assert ast.unparse(node.value) in tables, (file, node.lineno, ast.unparse(node))
    for file, node in nodes(ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == 'get':
            assert not any(map(is_system, node.args)), (file, node.lineno, ast.unparse(node))


def test_no_code_asks_for_the_class_of_a_model_or_system():
    for file, node in nodes(ast.Call):
        if ast.unparse(node.func) in ('isinstance', 'issubclass', 'hasattr', 'getattr', 'type'):
            asked = ast.unparse(node.args[0]).split('.')[-1].lower()
            assert asked not in ('model', 'system'), (file, node.lineno, ast.unparse(node))


# --------------------------------------------------------------------------------------------------
# Configs and knobs

CONFIGS = sorted(p.name for p in (HERE / 'config').glob('*.py'))


def variants_of(path):
    """The values of --dataset that a config has settings for: its dicts."""
    return [name for name, v in runpy.run_path(str(path)).items() if isinstance(v, dict)]


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_prints_its_command_and_sets_only_knobs_of_its_system(name):
    path = HERE / 'config' / name
    lines = path.read_text(encoding='utf-8').splitlines()
    named = [line for line in lines if line.startswith('# python train.py')]
    assert f'config/{name}' in named[0] or name == 'deepmlf_toy.py'
    assert 5 <= len(ast.parse('\n'.join(lines)).body) <= 25  # settings
    common = declared_knobs(HERE / 'train.py')
    variants = [v for v in variants_of(path) if not v.startswith('_')]
    for dataset in variants or ['']:
        argv = [str(path)] + ([f'--dataset={dataset}'] if dataset else [])
        known, k = run_knobs(argv, *common, SYSTEMS)
        assert k['dataset'] == dataset and SYSTEMS[k['system']].check(k) == []
        for flag in re.findall(r' --(\w+)=', ' '.join(named)):
            assert flag in known, flag
    if variants:  # the default is one of them
        assert run_knobs([str(path)], *common, SYSTEMS)[1]['dataset'] in variants


def test_every_knob_is_read():
    """
    A common knob is read as a name in train.py or from a dict of knobs. A knob of a system is read
    from a dict: k['lr'], k.get('lr') or k['weight_' + name].
    """
    keys, prefixes, texts = set(), set(), set()
    for _, node in nodes(ast.Subscript):
        if isinstance(node.slice, ast.Constant):
            keys.add(node.slice.value)
        if isinstance(node.slice, ast.BinOp) and isinstance(node.slice.left, ast.Constant):
            prefixes.add(node.slice.left.value)
    for _, node in nodes(ast.Call):
        is_get = isinstance(node.func, ast.Attribute) and node.func.attr == 'get'
        if is_get and node.args and isinstance(node.args[0], ast.Constant):
            keys.add(node.args[0].value)
    for _, node in nodes(ast.Constant):
        texts.add(node.value)

    def is_read(knob):
        parts = [knob[len(p) :] for p in prefixes if isinstance(p, str) and knob.startswith(p)]
        return knob in keys or any(part in texts for part in parts)

    names = set()
    for node in ast.walk(SOURCES['train.py']):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
    unread = [k for k in declared_knobs(HERE / 'train.py')[0] if k not in names and not is_read(k)]
    for system in SYSTEMS.values():
        unread += [k for k in class_knobs(system) if not is_read(k)]
    assert unread == []


# --------------------------------------------------------------------------------------------------
# A prerequisite is trained in a child process, which ends with its parent

CHILD = """
system = 'av'
av_layers = 2
epochs = 12
patience = 12
batch_size = 16
accumulate = 1
lr = 1e-3
save_interval = 1
"""
PARENT_RUN = """
needs = [{child!r}]
av_from = 'child'
lm = {lm!r}
epochs = 1
batch_size = 16
save_interval = 1
"""


def test_a_child_ends_when_its_parent_is_killed_and_both_resume(corpora, curriculum, tmp_path):
    """
    The parent is killed while it waits for a prerequisite. The child gets no signal and ends by
    itself. The same command resumes both and gives the bits of a run that was never killed.
    """
    (tmp_path / 'child.py').write_text(CHILD)
    run = PARENT_RUN.format(child=str(tmp_path / 'child.py'), lm=str(curriculum / 'lm_toy'))
    (tmp_path / 'parent.py').write_text(run)
    argv = [sys.executable, HERE / 'train.py', 'config/deepmlf_toy.py', tmp_path / 'parent.py']
    argv += [f'--data_dir={corpora}', '--device=cpu']

    def start(out):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        env = ENV | {'OMP_NUM_THREADS': '1'}
        command = [*map(str, argv), f'--out_dir={tmp_path}/{out}/parent']
        return subprocess.Popen(command, cwd=HERE, env=env, **pipes)

    def run_to_the_end(out):
        process = start(out)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-2000:]

    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    process = start('killed')
    try:
        while process.poll() is None and not (killed / 'child' / 'last.safetensors').exists():
            time.sleep(0.02)
        assert process.poll() is None
        assert lock(killed / 'child') is None  # the child is training
    finally:
        process.kill()
    since = time.time()
    # the child holds this pipe too, so this returns when both have ended
    output, _ = process.communicate(timeout=60)
    assert time.time() - since < 20
    assert 'training the prerequisite child first' in output
    assert not (killed / 'child' / 'result.json').exists()
    assert lock(killed / 'child') is not None
    assert not (killed / 'parent').exists()

    run_to_the_end('killed')
    run_to_the_end('whole')
    for name in ('child', 'parent'):
        same_run(whole / name, killed / name)
        predictions = [(out / name / 'test.jsonl').read_bytes() for out in (whole, killed)]
        assert predictions[0] == predictions[1]


# --------------------------------------------------------------------------------------------------
# Runs of other versions


def test_a_run_of_another_format_is_refused(curriculum, tmp_path):
    shutil.copytree(curriculum / 'whole', tmp_path / 'old')
    forge(tmp_path / 'old', format=1)
    for script, folders in (
        ('eval.py', ['old']),
        ('eval.py', ['old', 'old']),
        ('tools/damage.py', ['old']),
        ('tools/figures.py', ['old']),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(script, *(tmp_path / folder for folder in folders))
        message = str(stopped.value)
        assert 'was written by another version (format 1, and this is' in message
        assert '\n' not in message


def test_a_run_without_a_knob_of_this_version_is_refused(curriculum, tmp_path):
    """Its header has no such knob either, so nothing is damaged."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    run = tmp_path / 'old'
    shutil.copytree(curriculum / 'whole', run)
    path = run / 'best.safetensors'
    with safe_open(path, 'pt') as f:
        header = f.metadata()
    result = json.loads((run / 'result.json').read_text())
    header_key, = [key for key, text in header.items() if '"level_step"' in text]
    about = json.loads(header[header_key])
    both = about['about']['knobs'], result['about']['knobs']
    step = [knobs.pop('level_step') for knobs in both]
    for renamed, sentence in ((None, 'had no knob level_step: check out .* or train it again with '),
                              ('level_size', 'had the knob level_size: check out')):
        for knobs, value in zip(both, step):
            knobs |= {renamed: value, 'level_step': value} if renamed else {}
        save_file(load_file(path), path, header | {header_key: json.dumps(about)})
        (run / 'result.json').write_text(json.dumps(result))
        with pytest.raises(SystemExit, match='by another version, which ' + sentence):
            command('eval.py', run)


def test_two_runs_of_one_seed_are_no_two_seeds(curriculum, tmp_path):
    """With n=3 a difference could be claimed, though its interval knows no variance of seeds."""
    shutil.copytree(curriculum / 'whole', tmp_path / 'again')
    whole, again = str(curriculum / 'whole'), str(tmp_path / 'again')
    same = 'are the same experiment with the same seed, 0, and n counts seeds'
    for script in ('eval.py', 'tools/damage.py', 'tools/figures.py', 'tools/adding.py'):
        for pair in ([whole, again], [whole, whole]):
            with pytest.raises(SystemExit, match=same):
                command(script, *pair)


def test_runs_of_another_patience_or_dtype_are_another_experiment(curriculum):
    r = evaluation.read_run(str(curriculum / 'av_toy'))
    for changes, same in ((dict(log_interval=7), True), (dict(dtype='float32'), True),
                          (dict(patience=7), False), (dict(label='emotion'), False)):
        other = r | dict(about=r['about'] | dict(knobs=r['about']['knobs'] | changes))
        assert (experiment_of(other) == experiment_of(r)) == same, changes
    other = r | dict(about=r['about'] | dict(dtype='bfloat16'))
    assert experiment_of(other) != experiment_of(r)


def test_a_folder_that_is_no_run_is_said_to_be_none(curriculum, tmp_path):
    (tmp_path / 'docs').mkdir()
    whole = str(curriculum / 'whole')
    (tmp_path / 'x.txt').touch()
    for argv, sentence in (
            ([tmp_path / 'x'], r'there is no folder .*/x\.$'),
            ([tmp_path / 'docs'], 'docs is no folder of a run'),
            ([f'{whole}/best.safetensors'], 'best.safetensors is a file: give the folder of a run'),
            ([f'{curriculum}/who'], r'no folder .*/who: did you mean .*/whole\?'),
            ([whole, '--split=dev'], '--split cannot be given here'),
            ([whole, f'{curriculum}/av_toy', '--corpus=toy'], '--corpus cannot be given here')):
        with pytest.raises(SystemExit, match=sentence):
            command('eval.py', *argv)
    with pytest.raises(SystemExit, match='lm_toy was not tested on the scores of the toy corpus'):
        command('tools/adding.py', curriculum / 'lm_toy')


def test_what_damage_costs_has_one_sign(curriculum, monkeypatch, capsys):
    """ A higher MAE and a lower F1 are both a loss. """
    from tools import damage
    monkeypatch.setattr(damage, 'check_same_experiment', lambda folders: None)
    for info, by, worse in ((dict(kind='regression', range=[-3, 3]), 'mae', 2.0),
                            (dict(kind='classes', names=['a', 'b']), 'wf1', 0.0)):
        about = dict(name='a_run')
        monkeypatch.setattr(damage, 'read_run', lambda folder, i=info: dict(about=about, info=i))
        found = {damage.WHOLE: {by: 1.0}, 'broken': {by: worse}}
        monkeypatch.setattr(damage, 'damaged', lambda folder, f=found: f)
        damage.main(['a'])
        assert '| +1.000' in capsys.readouterr().out


def test_a_comparison_prints_a_dash_for_a_metric_that_a_run_lacks(curriculum, tmp_path):
    """A run of an older version may lack a metric; it is compared by the others."""
    shutil.copytree(curriculum / 'av_toy', tmp_path / 'older')
    path = tmp_path / 'older' / 'result.json'
    result = json.loads(path.read_text())
    del result['test']['corr'], result['files'], result['checksum']
    path.write_text(json.dumps(result))
    table = evaluation.compare([str(curriculum / 'whole'), str(tmp_path / 'older')])
    header, _, whole, older = [
        [cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()
    ]
    column = header.index('corr')
    assert older[column] == '-' and whole[column] != '-'
    assert [i for i, cell in enumerate(older) if cell == '-'] == [column]


# --------------------------------------------------------------------------------------------------
# A system that breaks the contract of system.py is refused with one sentence


class Broken(System):
    class Knobs:
        pass


@pytest.mark.parametrize('out', [torch.zeros(()), dict(loss=torch.zeros(())), dict(terms={}), None])
def test_forward_must_return_a_loss_and_terms(out):
    with pytest.raises(ModelError, match='Broken.forward must return dict'):
        checked_loss(Broken(), out)


@pytest.mark.parametrize(
    'loss, kind', [(torch.zeros(2, 1), r'of shape \[2, 1\]'), (0.5, 'float'), (None, 'NoneType')]
)
def test_a_loss_must_be_a_tensor_of_one_number(loss, kind):
    with pytest.raises(ModelError, match=f'returned a loss that is {kind}: return a tensor'):
        checked_loss(Broken(), dict(loss=loss, terms={}))


@pytest.mark.parametrize(
    'out, message',
    [
        (torch.zeros(3), 'Broken.predict must return dict'),
        (dict(prob=torch.zeros(3, 2)), 'Broken.predict must return dict'),
        (dict(pred=torch.zeros(3, 1)), r'pred of shape \[3, 1\] for 3 clips'),
        (dict(pred=torch.zeros(1)), r'pred of shape \[1\] for 3 clips'),
        (dict(pred=torch.zeros(3), prob=torch.zeros(2, 2)), r'prob of shape \[2, 2\]'),
        (dict(pred=[0.0, 0.0, 0.0]), 'returned pred as list: return tensors'),
    ],
)
def test_predict_must_return_one_prediction_a_clip(out, message):
    with pytest.raises(ModelError, match=message):
        checked_prediction(Broken(), out, 3)


def test_losses_refuse_shapes_that_would_broadcast():
    for loss in (l1, mse):
        with pytest.raises(ModelError, match=r'\[3, 1\] do not fit labels of shape \[3\]'):
            loss(torch.zeros(3, 1), torch.zeros(3))


def test_a_missing_prerequisite_config_and_a_missing_run_are_refused(corpora, tmp_path):
    (tmp_path / 'config.py').write_text(
        "needs = ['config/lm_tyo.py']\nsystem = 'deepmlf'\nlm = "
        "'lm_toy'\nav_init = 'random'\nmm_layers = [2]\n"
    )
    with pytest.raises(SystemExit, match='needs lists config/lm_tyo.py'):
        train(tmp_path / 'config.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run')
    with pytest.raises(SystemExit, match='there is no folder .*confi, did you mean|did you mean'):
        (tmp_path / 'run').mkdir()
        command('eval.py', tmp_path / 'runn')


def test_a_refused_resume_trains_no_prerequisite(corpora, curriculum, tmp_path):
    shutil.copytree(curriculum / 'whole', tmp_path / 'run')
    with pytest.raises(SystemExit, match='was trained with'):
        train(
            'config/deepmlf_toy.py',
            f'--data_dir={corpora}',
            f'--out_dir={tmp_path}/run',
            '--resume=True',
            '--max_steps=3',
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['run']


def test_a_knob_of_a_system_must_not_have_the_name_of_a_common_knob():
    class Shadow(System):
        class Knobs:
            batch_size = 3   # clips

    with pytest.raises(SystemExit, match='batch_size is a knob of every run, and odd has one'):
        run_knobs(['--system=odd'], *declared_knobs(HERE / 'train.py'), dict(odd=Shadow))
