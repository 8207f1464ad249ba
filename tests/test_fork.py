"""
The edits and commands of docs/fork.md work: they are applied to a copy of the repository, commands
are cut short, and then the tests that enumerate systems, knobs and configs run in the copy.

    python -m pytest -q tests/test_fork.py
"""

import re
import shutil
import subprocess
import sys

import pytest

from fakes import ENV, HERE

STEP = re.compile(
    r'(?:^In `(?P<file>[^`]+)`, (?P<how>above the line|replace|at the end)(?: `(?P<at>[^`]+)`)?[^\n]*|'
    r'^New file `(?P<new>[^`]+)`:)\n\n```python\n(?P<code>.*?)```|```bash\n(?P<shell>.*?)```',
    re.M | re.S,
)
NOT_COPIED = {'data', 'out', '.git', '__pycache__', '.pytest_cache', 'results'}


@pytest.fixture
def copy(tmp_path, corpora):
    """A copy of the repository with a small toy corpus in its data/."""
    here = tmp_path / 'fork'
    shutil.copytree(HERE, here, ignore=lambda _, names: NOT_COPIED & set(names))
    (here / 'results').mkdir()
    shutil.copytree(corpora / 'toy', here / 'data' / 'toy')
    return here


def apply_edit(step, here):
    """Applies one edit of the page to the copy."""
    code = step['code']
    if step['new']:
        (here / step['new']).write_text(code)
        return
    path = here / step['file']
    text = path.read_text(encoding='utf-8')
    if step['how'] == 'at the end':
        path.write_text(text.rstrip('\n') + '\n' + code, encoding='utf-8')
        return
    assert text.count(step['at']) == 1, (
        f"{step['at']!r} is in {step['file']} {text.count(step['at'])} times"
    )
    if step['how'] == 'replace':
        new = text.replace(step['at'], code.rstrip('\n'))
    else:
        start = text.rindex('\n', 0, text.index(step['at']) + 1) + 1
        new = text[:start] + code + text[start:]
    path.write_text(new, encoding='utf-8')


def shortened(line):
    """A command of the page with three training steps at most."""
    if line.startswith('python train.py') and '--help' not in line:
        name = re.search(r'config/(\w+)\.py', line)[1]
        line += ' --max_steps=3 --device=cpu' + (
            '' if '--out_dir' in line else f' --out_dir=out/{name}'
        )
    return line.replace('python ', f'{sys.executable} ', 1)


def run(here, command):
    done = subprocess.run(
        ['bash', '-c', command],
        cwd=here,
        env=ENV | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def test_edits_and_commands_of_the_page_work(copy):
    steps = list(STEP.finditer((copy / 'docs' / 'fork.md').read_text(encoding='utf-8')))
    n_blocks = (copy / 'docs' / 'fork.md').read_text(encoding='utf-8').count('```') // 2
    assert len(steps) == n_blocks  # STEP matches every block
    printed = {}
    for step in steps:
        if not step['shell']:
            apply_edit(step, copy)
            continue
        for line in step['shell'].splitlines():
            printed[line] = run(copy, shortened(line))
    # the new system has its knobs, a report, a row in a table and a picture
    knobs = printed['python train.py config/concat_toy.py --help']
    assert '--concat_width=64' in knobs and '--n_pseudo=2' in knobs and '--mse_width' not in knobs
    assert '| concat_toy' in printed['python eval.py out/concat_toy']
    assert 'rmse' in run(copy, f'{sys.executable} eval.py out/huber && cat out/huber/report.md')
    assert (copy / 'out' / 'concat_toy' / 'figures' / 'truth.png').stat().st_size > 5000
    assert 'huber' in (copy / 'out' / 'huber' / 'log.jsonl').read_text()
    assert '1 train, 1 valid, 1 test' in printed['python data.py mine.txt --name=mine_txt']
    difference = re.search(r"'float32': ([\d.e-]+)", printed['python difference.py'])[1]
    assert float(difference) < 1e-5
    # its checkpoints can be saved
    run(
        copy,
        f'{sys.executable} train.py config/concat_toy.py --max_steps=6 --device=cpu '
        '--out_dir=out/saved --save_interval=2',
    )
    # the tests that enumerate systems, knobs, configs or metrics pass
    tests = (
        'test_smoke.py tests/test_house.py tests/test_security.py '
        '-k "smoke or config or knob or spells or asks_for or looked_up or reason"'
    )
    run(copy, f'{sys.executable} -m pytest -q -p no:cacheprovider {tests}')


def test_the_new_system_has_at_most_40_lines_in_two_files():
    page = (HERE / 'docs' / 'fork.md').read_text(encoding='utf-8')
    section = page[page.index('## A system') : page.index('## A loss term')]
    steps = [s for s in STEP.finditer(section) if not s['shell']]
    lines = [line for s in steps if not s['new'] for line in s['code'].splitlines()]
    code = [line for line in lines if line.strip() and not line.strip().startswith(('#', '"""'))]
    assert len(code) <= 40 and {s['file'] or s['new'] for s in steps} == {
        'model.py',
        'config/concat_toy.py',
    }
