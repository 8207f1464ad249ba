"""
report.html: what it shows of a run, and that it is one file that loads and runs nothing.

    python -m pytest -q tests/test_html_report.py
"""
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from baselines.lora_lm import LoRALM
from baselines.vectors import Late
from data import Corpus
from fakes import command, knobs_of_system
from metrics import bootstrap, regression_metrics, task_metrics
from model import SYSTEMS, PromptTuning
from run import report
from run.pictures import answer_values, calibration_curve, confusion_matrix, drawn
from run.report import comparison
from run.report_html import html_report, metric_table, probability_text, worst_clips

SCORE = dict(kind='regression', range=[-3, 3])
FEELINGS = dict(kind='classes', names=['joy', 'anger', 'fear'])
HOSTILE = '<script src="https://x.org/a.js">alert(1)</script> & "quoted" \'single\''


class Page(HTMLParser):
    """ The tags of a page with their attributes, and the rows of its tables. """

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.in_cell = True
            self.rows[-1].append('')

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ('td', 'th')

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, first):
        """ The rest of the row whose first cell is `first`. """
        found, = [row for row in self.rows if row[0] == first]
        return found[1:]


def run_of(info, predictions, name='a_run'):
    """ result.json of a run with these test predictions, as far as the page reads it. """
    test = task_metrics(predictions['pred'], predictions['label'], info)
    knobs = dict(system='mse', label='label', seed=0)
    about = dict(name=name, knobs=knobs, corpus=dict(name='toy'))
    return dict(about=about, info=info, test=test, valid=test)


def scores(n=50):
    """ Predictions of scores that are worse for later clips. """
    label = np.linspace(-2.5, 2.5, n).astype(np.float32)
    return dict(pred=label + np.arange(n, dtype=np.float32) / n, label=label)


def page_of(info, predictions, texts=None, ids=None, name='a_run', pictures=(), compared=None):
    n = len(predictions['pred'])
    clips = (ids or [f'clip_{i}' for i in range(n)], texts or ['a text'] * n, predictions)
    r = run_of(info, predictions, name)
    return html_report(r, [('Commit', name)], compared, clips, pictures, reads_text=True)


# --------------------------------------------------------------------------------------------------
# One file, and nothing that runs

def loads_nothing(text):
    """ The page, after a check that it has no script, style or picture from elsewhere. """
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ('script', 'link', 'iframe', 'object', 'base', 'form', 'svg'), tag
        assert not [key for key in attributes if key.startswith('on') or key == 'href']
        assert attributes.get('src', 'data:image/png;base64,').startswith('data:image/png;base64,')
    assert 'url(' not in text and '@import' not in text
    policy, = [a['content'] for tag, a in page.tags
               if a.get('http-equiv') == 'Content-Security-Policy']
    assert policy.startswith("default-src 'none'") and 'script-src' not in policy
    return page


def test_hostile_texts_are_shown_and_not_run():
    predictions = dict(pred=np.array([0, 1, 2]), label=np.array([1, 1, 1]))
    info = dict(FEELINGS, names=[HOSTILE, 'b' + HOSTILE, 'c'])
    compared = ['test', HOSTILE], [[HOSTILE, HOSTILE]], [HOSTILE]
    picture = HOSTILE, drawn(confusion_matrix, run_of(FEELINGS, predictions), predictions), HOSTILE
    page = loads_nothing(page_of(info, predictions, [HOSTILE] * 3, [HOSTILE] * 3, HOSTILE,
                                 [picture], compared))
    assert [HOSTILE, HOSTILE, 'b' + HOSTILE, HOSTILE] in page.rows   # id, text, label, prediction


def test_half_a_surrogate_pair_does_not_break_the_file():
    page = page_of(SCORE, scores(3), ['\ud83d', 'b', 'c'])
    assert page.encode('utf-8') and ['clip_0', '?'] in [row[:2] for row in Page(page).rows]


# --------------------------------------------------------------------------------------------------
# What it shows

def test_the_interval_of_a_metric_is_the_bootstrap_over_clips():
    predictions = scores()
    page = Page(metric_table(run_of(SCORE, predictions), predictions))
    test, interval, *_ = page.row('mae')
    assert test == '0.490'   # the mean of 0, 1, .., 49 fiftieths
    errors, rng = np.arange(50) / 50, np.random.default_rng(0)
    means = [errors[rng.integers(50, size=50)].mean() for _ in range(500)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert interval == f'{low:.3f} to {high:.3f}'
    # without variation there is no width, and without a spread of labels no correlation
    same = bootstrap(lambda p, y: regression_metrics(p, y, [-3, 3]), np.ones(9), np.full(9, 2.0))
    assert same['mae'] == (1, 1) and np.isnan(same['corr']).all()


def test_a_metric_that_is_undefined_on_a_resample_has_no_interval():
    predictions = dict(pred=np.zeros(20, int), label=np.array([0] * 19 + [1]))
    page = Page(metric_table(run_of(FEELINGS, predictions), predictions))
    assert page.row('f1_fear')[:2] == ['nan', '-']   # no clip has it in any resample
    assert page.row('acc')[0] == '0.950' and ' to ' in page.row('acc')[1]


def test_the_ten_worst_scores_are_those_farthest_from_their_labels():
    predictions = scores()
    assert list(worst_clips(predictions, SCORE)) == list(range(49, 39, -1))
    page = Page(page_of(SCORE, predictions))
    shown = [row for row in page.rows if row[0].startswith('clip_')]
    assert len(shown) == 10 and shown[0] == ['clip_49', 'a text', '+2.50', '+3.48', '+0.98']
    assert list(worst_clips(scores(3), SCORE)) == [2, 1, 0]


def test_the_worst_classes_are_the_wrong_ones_by_the_probability_of_the_truth():
    label = np.array([0.0, 1, 2, 0], np.float32)   # as read_predictions gives them
    prob = np.array([[.2, .7, .1], [.1, .8, .1], [.5, .49, .01], [.45, .0, .55]], np.float32)
    predictions = dict(pred=prob.argmax(1).astype(np.float32), label=label, prob=prob)
    assert list(worst_clips(predictions, FEELINGS)) == [2, 0, 3]   # clip 1 is right
    page = Page(page_of(FEELINGS, predictions))
    assert page.row('clip_2')[1:] == ['fear', 'joy', 'joy 0.50, anger 0.49, fear 0.01']
    assert page.row('clip_3')[-1] == 'fear 0.55, joy 0.45'   # 0.00 is left out
    assert not [row for row in page.rows if row[0] == 'clip_1']
    unsorted = {k: v for k, v in predictions.items() if k != 'prob'}
    assert list(worst_clips(unsorted, FEELINGS)) == [0, 2, 3]
    assert 'probabilities' not in page_of(FEELINGS, unsorted)
    # an answer that is no class
    none = page_of(FEELINGS, dict(pred=np.array([-1.0]), label=np.array([0.0])))
    assert 'no class (-1)' in Page(none).row('clip_0')


def test_a_run_without_a_wrong_clip_says_so():
    right = np.array([0.0, 1, 2])
    assert 'Every test clip is predicted right' in page_of(FEELINGS, dict(pred=right, label=right))


def test_the_probabilities_of_a_score_are_an_interval_and_the_likeliest_answer():
    prob = np.zeros(61)
    prob[[0, 20, 40, 50]] = .05, .5, .4, .05
    np.testing.assert_allclose(answer_values(SCORE, 61)[[0, 20, 40]], [-3, -1, 1])
    # an LM answers with one decimal: 0.3 .. 4.7
    between = answer_values(dict(kind='regression', range=[0.25, 4.75]), 45)
    np.testing.assert_allclose(between[[0, 1, -1]], [0.3, 0.4, 4.7])
    np.testing.assert_allclose(answer_values(SCORE, 3), [-3, 0, 3])   # of another system
    assert probability_text(prob, SCORE) == '80 % in -1.0 to +1.0; most likely -1.0 (0.50)'


def test_pictures_are_inside_the_page_at_their_own_width():
    rng = np.random.default_rng(0)
    prob = rng.dirichlet(np.ones(3), 50)
    predictions = dict(pred=prob.argmax(1), label=rng.integers(3, size=50), prob=prob)
    r = run_of(FEELINGS, predictions)
    pngs = [drawn(draw, r, predictions) for draw in (confusion_matrix, calibration_curve)]
    assert all(png.startswith(b'\x89PNG') for png in pngs)
    page = loads_nothing(page_of(FEELINGS, predictions, pictures=[
        ('confusion matrix', pngs[0], 'Classes: 0 a'), ('calibration', pngs[1], '')]))
    widths = [int(a['width']) for tag, a in page.tags if tag == 'img']
    assert len(widths) == 2 and all(200 < wide < 600 for wide in widths)


@pytest.mark.parametrize('names', [['$\\frac$', '$', 'c'], [f'class {i}' for i in range(300)]])
def test_a_confusion_matrix_may_have_many_classes_and_names_that_are_no_formulas(names):
    info = dict(kind='classes', names=names)
    predictions = dict(pred=np.arange(50) % 3, label=np.arange(50) // 3 % 3)
    png = drawn(confusion_matrix, run_of(info, predictions), predictions)
    width, height = np.frombuffer(png[16:24], '>u4')
    assert width < 5000 and height < 5000


def test_the_runs_own_row_is_bold_below_what_it_is_compared_with():
    rows = [['majority', '1', '1.2'], ['a_run', '2', '.4']]
    compared = ['test', 'mae', 'best possible mae'], rows
    text = page_of(SCORE, scores(), compared=(*compared, ['**Broken** LM.']))
    assert '<strong>Broken</strong> LM.' in text
    assert re.findall(r'<tr class=own><td [^>]*>(.*?)</td>', text) == ['a_run']
    assert Page(text).row('majority') == ['1', '1.2']


@pytest.mark.parametrize('cls, changes, best, late', [
    (LoRALM, dict(), '0.700', False),
    (PromptTuning, dict(), '0.700', False),
    (Late, dict(late_streams=['text']), '0.700', False),
    (Late, dict(late_streams=['audio', 'vision']), '0.800', False),
    (Late, dict(late_streams=['text', 'audio']), '-', False),
    (Late, dict(), '0.300', True),
])
def test_a_run_is_compared_with_the_bound_of_what_it_reads(cls, changes, best, late, tmp_path):
    system = next(name for name, known in SYSTEMS.items() if known is cls)
    k = knobs_of_system(cls, system=system, **changes)
    predictions = scores() | {m: scores()['pred'] for m in ('text', 'audio', 'vision')}
    bounds = dict(majority=1.0, text=0.7, av=0.8, late=0.5, full=0.3)
    r = run_of(SCORE, predictions) | dict(majority=dict(mae=1.0), controls={})
    r |= dict(ceilings={bound: dict(mae=mae) for bound, mae in bounds.items()})
    r['about']['knobs'] = k
    _, rows, notes = comparison(str(tmp_path), r, predictions)
    assert rows[-1][0] == 'a_run' and rows[-1][-1] == best
    assert ('late-fusion bound' in [row[0] for row in rows]) == late
    assert any('late-fusion bound' in note for note in notes) == late


@pytest.mark.parametrize('best, reached, closes, tested', [
    ('mae', 0.4, 50, True), ('mae', 0.6, None, False), ('acc', 0.8, 50, False), ('acc', 0.6, None, False),
])
def test_the_distance_to_the_bounds_names_a_test_that_fits(best, reached, closes, tested):
    ceilings = dict(late=dict(mae=0.5, acc=0.7), full=dict(mae=0.3, acc=0.9))
    sentence = report.distance_to_bounds('a_run', best, reached, ceilings)
    assert (f'closes {closes} % of the gap' in sentence) == (closes is not None)
    assert ('does not pass the late-fusion bound' in sentence) == (closes is None)
    assert ('tools/adding.py' in sentence) == tested


def test_a_prerequisite_of_another_label_has_no_row(monkeypatch):
    def read_run(folder):
        k = knobs_of_system(SYSTEMS['av'], system='av', label=folder)
        return dict(about=dict(name='an_av', knobs=k, corpus='toy'))

    monkeypatch.setattr(report, 'find_folder', lambda name, *places: name)
    monkeypatch.setattr(report, 'read_run', read_run)
    monkeypatch.setattr(report, 'is_same_corpus', lambda a, b: True)
    k = knobs_of_system(SYSTEMS['deepmlf'], system='deepmlf', av_init='run', out_dir='out', label='label')
    for trained_on, rows in (('label', ['audio+video only']), ('label_A', [])):
        about = dict(name='a_run', corpus='toy', knobs=k | dict(av_from=trained_on, lm=trained_on))
        assert list(report.prerequisite_runs('out', about)) == rows


# --------------------------------------------------------------------------------------------------
# Of real runs

def test_a_finished_run_has_a_page_with_its_numbers_and_worst_clips(corpora, curriculum):
    text = (curriculum / 'whole' / 'report.html').read_text(encoding='utf-8')
    page, r = loads_nothing(text), json.loads((curriculum / 'whole' / 'result.json').read_text())
    assert page.row('mae')[0] == f"{r['test']['mae']:.3f}"
    assert page.row('late-fusion bound')[-1] == f"{r['ceilings']['late']['mae']:.3f}"
    corpus = Corpus(corpora / 'toy')
    rows = [json.loads(line) for line in open(curriculum / 'whole' / 'test.jsonl')]
    worst = max(range(len(rows)), key=lambda i: abs(rows[i]['pred'] - rows[i]['label']))
    first = next(row for row in page.rows if row[0] in corpus.id('test'))
    assert first[:2] == [corpus.id('test')[worst], corpus.text('test')[worst]]
    assert [a['alt'] for tag, a in page.tags if tag == 'img'] == [
        'learning curve', 'confusion matrix']   # this system gives no probabilities
    assert not (curriculum / 'whole' / 'confusion.png').exists()


def test_a_language_model_has_a_page_with_its_loss(curriculum):
    page = loads_nothing((curriculum / 'lm_toy' / 'report.html').read_text(encoding='utf-8'))
    assert page.row('loss')[1] == '-' and float(page.row('loss')[0]) > 0
    assert 'worst' not in str(page.rows)


def test_eval_writes_the_page_again(curriculum):
    path = curriculum / 'whole' / 'report.html'
    before = path.read_text(encoding='utf-8')
    path.unlink()
    command('eval.py', curriculum / 'whole')
    assert path.read_text(encoding='utf-8') == before
