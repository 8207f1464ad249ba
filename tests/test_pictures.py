"""
Pictures: titles, axes, units, shared scales, and letters that can be read.

    python -m pytest -q tests/test_pictures.py
"""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fakes import LetterTokenizer
from run import pictures
from run.finished import EvalError
from tools import architecture, figures

CEILINGS = dict(majority=1.167, text=1.059, av=1.038, late=0.81, full=0.368)


def result(seed=0, ceilings=True):
    """ What result.json says of a run, as far as pictures read it. """
    knobs = dict(system='deepmlf', seed=seed, select='mae', modalities=('audio', 'vision'))
    about = dict(name='deepmlf_toy', knobs=knobs, corpus=dict(name='toy'))
    known = {bound: dict(mae=mae) for bound, mae in CEILINGS.items()} if ceilings else None
    return dict(about=about, majority=dict(mae=1.165), ceilings=known)


def log(shift=0.0):
    """ The lines of log.jsonl of two epochs. """
    terms = dict(loss=3.0, task=1.0, text=1.1, lm=0.3, mpr=0.5, sim=0.1)
    lines = []
    for epoch in (1, 2):
        gates = {'2': [0.5, 0.5 + shift], '4': [0.4, 0.6]}
        at = dict(step=10 * epoch, epoch=epoch)
        lines.append(dict(**at, train={k: v / epoch for k, v in terms.items()}, gates=gates))
        lines.append(dict(**at, valid=dict(mae=1 / epoch + shift), best=True))
    return lines


@pytest.fixture
def drawn(monkeypatch):
    """ The figures that a test has drawn, in their order. """
    found = []

    def keep(fig, path):
        fig.canvas.draw()   # with the layout as it is saved
        found.append(fig)

    monkeypatch.setattr(pictures, 'save_picture', keep)
    return found


def laid_out(fig):
    """ A figure with the layout as it is saved. """
    fig.canvas.draw()
    return fig


def curve(*runs):
    return laid_out(pictures.learning_curve(runs))


def test_a_learning_curve_is_titled_by_run_system_corpus_and_seed():
    assert curve((result(), log())).get_suptitle() == 'deepmlf_toy: deepmlf on toy, seed 0'
    fig = curve((result(2), log()), (result(0), log(0.1)))
    assert fig.get_suptitle() == 'deepmlf_toy: deepmlf on toy, seeds 0, 2'
    assert all(ax.get_xlabel() == 'epoch' and ax.get_ylabel() for ax in fig.axes)
    assert fig.axes[-1].get_legend().get_texts()[0].get_text() == 'mean and std of n = 2'
    assert fig.axes[-1].collections   # the band


def test_a_curve_of_one_point_is_visible():
    fig = curve((result(), log()[:2]))
    assert all(line.get_marker() == 'o' for ax in fig.axes[:-1] for line in ax.lines)
    assert all(line.get_marker() == 'None' for line in curve((result(), log())).axes[0].lines)


def test_runs_that_logged_at_other_steps_have_no_mean():
    lines = [e for e in log() if 'train' in e]
    figures.refuse_other_steps([lines, lines[:1]])
    with pytest.raises(EvalError, match='logged at different steps'):
        figures.refuse_other_steps([lines, lines[1:]])


def test_loss_terms_share_a_panel_only_where_they_have_one_unit():
    fig = curve((result(), log()))
    n_lines = {ax.get_ylabel(): len(ax.lines) for ax in fig.axes[:-1]}
    assert n_lines == {'loss, the weighted sum': 1, 'loss of predictions': 2,
                       'cross-entropy, nats per token': 1, 'ordinal losses, label units': 1,
                       'sim': 1}
    assert pictures.loss_panels(['loss', 'lm']) == {'cross-entropy, nats per token': ['lm']}


def test_the_majority_and_known_bounds_are_labelled_lines():
    ax = curve((result(), log())).axes[-1]
    lines = [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1]
    for value in (1.165, 1.059, 1.038, 0.81, 0.368):
        assert value in lines and any(f'{value:.3f}' in t.get_text() for t in ax.texts)
    boxes = [t.get_window_extent() for t in sorted(ax.texts, key=lambda t: t.xyann[1])]
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:]))   # none overlaps
    ax = curve((result(ceilings=False), log())).axes[-1]
    assert [t.get_text() for t in ax.texts] == ['majority 1.165']
    one = result()
    one['about']['knobs']['modalities'] = ('audio',)   # the bounds are of all modalities
    assert len(curve((one, log())).axes[-1].texts) == 1


@pytest.mark.parametrize('shift, limits', [(0.1, (0, 1)), (-0.9, (-1, 1))])
def test_gates_are_drawn_on_their_whole_range(shift, limits, drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, 'read_log', lambda folder: log(shift))
    monkeypatch.setattr(figures, 'read_run', lambda folder: result())
    figures.gates(['run'], str(tmp_path))
    assert [ax.get_ylim() for ax in drawn[0].axes] == [limits] * 2
    assert 'seed 0' in drawn[0].get_suptitle()


def sweep_figure(drawn, tmp_path, labels):
    rows = [dict(label=label, test=[dict(mae=0.5 + 0.1 * seed) for seed in range(3)])
            for label in labels]
    path = tmp_path / 'table.json'
    path.write_text(json.dumps(dict(title='A table', rows=rows)))
    figures.draw_sweep(str(path))
    assert drawn[-1].get_suptitle() == 'A table\nmean and std, n = 3'
    return drawn[-1].axes[0]


def test_a_sweep_over_numbers_is_a_line_with_error_bars(drawn, tmp_path):
    ax = sweep_figure(drawn, tmp_path, ['n_f = 8', 'n_f = 1', 'n_f = 20'])
    (container,) = ax.containers
    assert list(container.lines[0].get_xdata()) == [1, 8, 20] and container.has_yerr
    assert ax.get_xlabel() == 'n_f' and ax.get_ylabel() == 'test mae (lower is better)'


def test_a_sweep_of_one_seed_has_no_error_bars(drawn, tmp_path):
    path = tmp_path / 'one.json'
    rows = [dict(label=label, test=[dict(mae=1.0)]) for label in ('whole', '5 tokens')]
    path.write_text(json.dumps(dict(title='A table', rows=rows)))
    figures.draw_sweep(str(path))
    assert drawn[-1].get_suptitle() == 'A table\none seed'
    for container in drawn[-1].axes[0].containers:
        for bars in getattr(container, 'lines', ((), (), ()))[2]:
            assert not any(len(segment) for segment in bars.get_segments())


def test_a_sweep_over_names_is_bars_with_error_bars(drawn, tmp_path):
    ax = sweep_figure(drawn, tmp_path, ['whole', '5 tokens', 'without MPR'])
    assert len(ax.patches) == 3 and any(getattr(c, 'has_xerr', False) for c in ax.containers)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['whole', '5 tokens', 'without MPR']
    assert ax.get_xlabel() == 'test mae (lower is better)'


def test_rows_are_numbers_only_where_they_differ_in_the_number_alone():
    assert figures.numbers_of(['100 %', '50 %']) == ([100, 50], '%')
    assert figures.numbers_of(['layer 1', 'layer 2']) == ([1, 2], 'layer')
    for labels in (['5 tokens'], ['5 tokens', '6 heads'], ['last 1', 'all 4'], ['MPR 0', 'MPR 0'],
                   ['small', 'large'], ['.1 and .1', 'MPR 0']):
        assert figures.numbers_of(labels) is None


class AttentiveModel:
    """ A model whose attention over audio has one large weight. """
    prompt = SimpleNamespace(before=[7, 7], after=[7])

    def views(self, batch, predict):
        small, large = torch.full((2, 10), 0.1), torch.full((2, 5), 0.1)
        large[0, 2] = 0.6
        return {'over text': (small[:, :3], ['audio', 'vision'], 'text token'),
                'over audio': (large, ['text', 'vision'], 'audio frame')}


def attention_figure(drawn, tmp_path, **stream):
    corpus = SimpleNamespace(meta=dict(streams=dict(audio=stream)), id=lambda split: ['clip$1$'],
                             text=lambda split: ['a text that is long ' * 6])

    def feed(split, index):
        ids = [7, 7, 0, *map(ord, 'a$b'), 7, 0]   # a prompt around one pseudo token and 3 tokens
        return dict(tokens=torch.tensor([ids]), text_len=torch.tensor([7]))

    feed.corpus, feed.info = corpus, dict(kind='regression')
    pred = torch.tensor(-0.5)
    about = dict(name='own', knobs=dict(system='cmpta', seed=3), corpus=dict(name='toy'))
    run = SimpleNamespace(
        model=AttentiveModel(), predict=lambda batch: dict(pred=pred), result=dict(about=about),
        tokenizer=LetterTokenizer(), knobs=dict(n_pseudo=1))
    pictures.draw_attention(run, feed, 0, str(tmp_path), label=2.5)
    return drawn[-1]


def test_attention_panels_share_one_colour_scale_and_one_colour_bar(drawn, tmp_path):
    fig = attention_figure(drawn, tmp_path)
    text, audio, bar = fig.axes
    for ax in (text, audio):
        assert ax.images[0].get_clim() == (0, pytest.approx(0.6))
    assert bar.get_ylabel() == 'attention weight'
    assert 'label +2.50, prediction -0.50' in fig.get_suptitle()
    assert 'own: cmpta on toy, seed 3' in fig.get_suptitle()
    assert [tick.get_text() for tick in text.get_xticklabels()] == ['a', '$', 'b']
    title = fig._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= fig.bbox.x1   # the long text is not cut


def test_frames_are_in_seconds_where_the_corpus_knows_their_rate(drawn, tmp_path):
    _, audio, _ = attention_figure(drawn, tmp_path).axes
    assert audio.get_xlabel() == 'audio frame' and audio.get_xlim() == (-0.5, 4.5)
    text, audio, _ = attention_figure(drawn, tmp_path, frames_per_second=10).axes
    assert audio.get_xlabel() == 'audio, seconds' and audio.get_xlim() == (0, 0.5)
    assert text.get_xlabel() == 'text token'


def test_classes_are_named_in_the_title_of_a_clip():
    info = dict(kind='classes', names=['anger', 'joy'])
    assert pictures.as_text(1.0, info) == 'joy'
    assert pictures.as_text(9.0, info) == 'no class (9)'


def test_a_confusion_matrix_has_a_title_and_its_counts():
    fig = laid_out(pictures.counts_figure([0, 1, 1], [0, 1, 0], ['no', 'yes'], 'run on toy\nwf1 0.7'))
    assert fig.get_suptitle() == 'run on toy\nwf1 0.7'
    assert [t.get_text() for t in fig.axes[0].texts] == ['1', '1', '0', '1']


def test_the_architecture_can_be_read_in_the_readme_and_explains_its_letters(drawn, tmp_path):
    architecture.draw_architecture(str(tmp_path))
    fig = drawn[0]
    texts = [t for ax in fig.axes for t in ax.texts if t.get_text()]
    pixels = 830 / fig.get_figwidth() / 72   # of a point, where GitHub shows the picture
    assert min(t.get_fontsize() for t in texts) * pixels >= 11
    for t in texts:
        box = t.get_window_extent()
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1, t.get_text()
    shapes = ''.join(shape for boxes, _ in architecture.DRAWN.values() for *_, shape, _, _ in boxes)
    letters = set(re.findall(r'[A-Za-z](?:_[a-z])?', shapes))
    explained = set(re.findall(r'\b[A-Za-z](?:_[a-z])?\b', architecture.LETTERS))
    assert letters <= explained


def test_the_pictures_of_the_readme_are_those_that_the_code_draws(drawn, tmp_path):
    """ results/architecture.png has the size of today's drawing. """
    from PIL import Image
    architecture.draw_architecture(str(tmp_path))
    size = np.round(drawn[0].get_size_inches() * pictures.STYLE['savefig.dpi'])
    with Image.open(figures.ROOT / 'results' / 'architecture.png') as picture:
        assert np.allclose(picture.size, size, atol=2)


def test_the_title_of_a_picture_names_the_knobs_that_its_command_sets():
    from run.pictures import run_title

    knobs = dict(system='crosssent', seed=3, weight_mpr=0.0, lm='minilm', resume=True)
    command = 'python train.py config/a.py --weight_mpr=0 --seed=3 --lm=minilm --resume=True'
    about = dict(name='a', knobs=knobs, corpus=dict(name='mosi'), command=command)
    assert run_title([about]) == 'a: crosssent on mosi, seed 3, weight_mpr=0.0'
