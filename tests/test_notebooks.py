"""
The notebooks: their committed cells and outputs, a run from top to bottom with small settings, and
the answers to their exercises.

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
    """ The folder in which all three notebooks train, with the suite's small toy corpus. """
    folder = tmp_path_factory.mktemp('notebooks')
    (folder / 'data').symlink_to(corpora)
    return folder


def test_there_are_three_notebooks_of_less_than_800_kilobytes():
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
    assert counts == list(range(1, len(code) + 1)), "run the notebook once, from top to bottom"
    for cell in code:
        kinds = [o.output_type for o in cell.outputs]
        assert 'error' not in kinds
        if 'print(' in cell.source:
            names = [o.name for o in cell.outputs if o.output_type == 'stream']
            assert 'stdout' in names, cell.source
        n_pictures = sum('image/png' in o.get('data', {}) for o in cell.outputs)
        assert n_pictures == cell.source.count('plt.show()'), cell.source
        streams = [o for o in cell.outputs if o.output_type == 'stream']
        printed = ''.join(o.text for o in streams)
        assert not any(o.name == 'stderr' for o in streams), printed
        # no paths of the machine that ran it, no warnings, no progress bars
        assert not re.search(r'/(home|Users|work|tmp|root)/|Warning|\d+%\|', printed), printed


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_enough_to_read(path):
    """ The first code cell has at most 5 lines, any other at most 25; blank lines do not count. """
    cells = read(path).cells
    code = [cell.source.split('\n') for cell in cells if cell.cell_type == 'code']
    n_lines = [sum(bool(line.strip()) for line in lines) for lines in code]
    assert n_lines[0] <= 5
    assert max(n_lines) <= 25
    assert max(len(line) for lines in code for line in lines) <= 100
    text = [cell.source.split('\n') for cell in cells if cell.cell_type == 'markdown']
    assert max(len(line) for lines in text for line in lines) <= 120


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_our_answers_pass_its_checks(path, work, monkeypatch):
    """ check_all also checks that the notebook's stubs fail. """
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
        "print('all answers pass')",
    ):
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    client.NotebookClient(
        notebook,
        timeout=300,
        kernel_name='python3',
        resources={'metadata': {'path': str(path.parent)}},
    ).execute()
    assert notebook.cells[-1].outputs[0].text == 'all answers pass\n'
    for cell in notebook.cells[:n_cells]:
        if 'print(' in cell.source or 'plt.show(' in cell.source:
            assert cell.outputs, cell.source


def test_checks_refuse_a_wrong_answer():
    """ check_all raises where a stub passes its check. """
    sys.path.insert(0, str(HERE / 'notebooks'))
    try:
        import answers
    finally:
        sys.path.pop(0)
    for name in ('mpr_by_loops', 'largest_margin', 'kappa'):
        getattr(answers, 'check_' + name)({})
        with pytest.raises(AssertionError):
            getattr(answers, 'check_' + name)({}, lambda *_: 0.0)
    with pytest.raises(RuntimeError, match='does not test the answer'):
        answers.check_all(3, {name: getattr(answers, name) for name in answers.EXERCISES[3]})
