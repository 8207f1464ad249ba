"""
The notebooks: run from top to bottom with small settings, their exercises answered, and what is
committed of them.

    python -m pytest -q tests/test_notebooks.py
"""

import re
import sys

import pytest

from fakes import HERE

nbformat = pytest.importorskip(
    'nbformat', reason="notebooks need nbformat: pip install -r requirements-test.txt"
)
NOTEBOOKS = sorted((HERE / 'notebooks').glob('*.ipynb'))


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag):
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get('tags', [])]


@pytest.fixture(scope='module')
def work(corpora, tmp_path_factory):
    """ Where all three work: the suite's small toy corpus is in it. """
    folder = tmp_path_factory.mktemp('notebooks')
    (folder / 'data').symlink_to(corpora)
    return folder


def test_there_are_three():
    assert [path.name[0] for path in NOTEBOOKS] == ['1', '2', '3']
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 800_000


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs_and_three_exercises(path):
    notebook = read(path)
    nbformat.validate(notebook)
    exercises = tagged(notebook, 'exercise')
    assert len(exercises) == 3 and tagged(notebook, 'stub') == [i + 1 for i in exercises]
    assert all(notebook.cells[i].source.startswith('### Exercise') for i in exercises)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run it once, from top to bottom"
    for cell in code:
        kinds = [o.output_type for o in cell.outputs]
        assert 'error' not in kinds
        if 'print(' in cell.source:
            streams = [o.name for o in cell.outputs if o.output_type == 'stream']
            assert 'stdout' in streams, cell.source
        n_pictures = sum('image/png' in o.get('data', {}) for o in cell.outputs)
        assert n_pictures == cell.source.count('plt.show()'), cell.source
        said = ''.join(o.text for o in cell.outputs if o.output_type == 'stream')
        assert not any(o.output_type == 'stream' and o.name == 'stderr' for o in cell.outputs), said
        # a stranger's paths, warnings, bars
        assert not re.search(r'/(home|Users|work|tmp|root)/|Warning|\d+%\|', said), said
        assert max(map(len, cell.source.split('\n'))) <= 150


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_our_answers_are_right(path, work, monkeypatch):
    """ check_all holds both ways: our answers pass, and the stubs that a reader finds do not. """
    pytest.importorskip(
        'ipykernel',
        reason="running notebooks needs ipykernel: pip install -r requirements-test.txt",
    )
    client = pytest.importorskip(
        'nbclient', reason="running notebooks needs nbclient: pip install -r requirements-test.txt"
    )
    for k, v in dict(NANOMSA_FAST='1', NANOMSA_WORK=str(work), OMP_NUM_THREADS='1').items():
        monkeypatch.setenv(k, v)
    notebook = read(path)
    n_cells = len(notebook.cells)
    for source in (
        "import answers",
        f"answers.check_all({path.name[0]}, globals())",
        "print('all answers are right')",
    ):
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    client.NotebookClient(
        notebook,
        timeout=300,
        kernel_name='python3',
        resources={'metadata': {'path': str(path.parent)}},
    ).execute()
    assert notebook.cells[-1].outputs[0].text == 'all answers are right\n'
    assert all(cell.outputs for cell in notebook.cells[:n_cells] if cell.cell_type == 'code')


def test_a_check_can_fail():
    """
    A wrong answer is told from a right one, and a check that lets the stub pass is an error of
    ours.
    """
    sys.path.insert(0, str(HERE / 'notebooks'))
    try:
        import answers
    finally:
        sys.path.pop(0)
    for name in ('mpr_by_loops', 'largest_margin', 'kappa'):
        getattr(answers, 'check_' + name)({})
        with pytest.raises(AssertionError):
            getattr(answers, 'check_' + name)({}, lambda *_: 0.0)
    with pytest.raises(RuntimeError, match='says nothing'):
        answers.check_all(3, {name: getattr(answers, name) for name in answers.EXERCISES[3]})
