"""
tools/sweep.py, tools/figures.py and tools/bench.py: when a difference is called real, failed and
interrupted runs, the figures of each system, and the benchmark of a new system.

    python -m pytest -q tests/test_sweep.py
"""
import json
import os
import runpy
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import model
from configurator import class_knobs
from corpora.toy import make_toy
from data import Corpus, CorpusError
from fakes import HERE, TINY, forge, tiny_batch, tiny_deepmlf, train
from metrics import claim, score_by
from run.finished import EvalError
from run.machine import hold_memory
from system import calls_of
from tools import bench_against, bench_worker, figures, sweep, sweep_table
from tools.bench_plain import PlainPseudoTokens
from tools.figures import tsne

MAE = score_by(dict(kind='regression', range=[-3, 3]))[1]


def predictions_off_by(error, n):
    """ Predictions [n,200] of zeros that are off by about `error`. """
    noise = np.random.default_rng(n).normal(0, 0.01, (n, 200)).astype(np.float32)
    return np.full((n, 200), error, np.float32) + noise


def test_better_needs_three_seeds_and_an_interval_that_excludes_zero():
    label = np.zeros(200, np.float32)
    small, large = predictions_off_by(0.3, 3), predictions_off_by(0.5, 3)
    assert claim(MAE, large, small, label, 'mae')['verdict'] == 'better'
    assert claim(MAE, small, large, label, 'mae')['verdict'] == 'worse'
    # two seeds are too few, and the text says so
    few = claim(MAE, predictions_off_by(0.5, 2), small, label, 'mae')
    assert few['verdict'] == 'open' and few['text'].endswith(']; nothing is claimed: n < 3')
    assert claim(MAE, large, small, label, 'mae')['text'].endswith(']')
    wide = np.random.default_rng(0).normal(0, 1, (3, 200)).astype(np.float32)
    assert claim(MAE, wide, wide[::-1], label, 'mae')['verdict'] == 'open'
    y = (np.arange(200) % 2).astype(np.float32)
    by, f1 = score_by(dict(kind='classes', names=['a', 'b']))
    good, bad = np.stack([y] * 3), np.stack([1 - y] * 3)
    assert by == 'wf1'
    assert claim(f1, bad, good, y, by)['verdict'] == 'better'
    assert claim(f1, good, bad, y, by)['verdict'] == 'worse'


def row(label, error, n=3):
    """ A row of n runs in the form of sweep_table.read_row. """
    truth = np.linspace(-1, 1, 300).astype(np.float32)
    preds = [truth + error * np.random.default_rng(i).choice([-1, 1], 300) for i in range(n)]
    return dict(
        label=label, test=[dict(mae=float(np.abs(p - truth).mean())) for p in preds], valid=[],
        preds=preds, truth=truth, ids=['a'], info=dict(kind='regression', range=[-1, 1]),
        folders=[], seconds=[60.0] * n, n_trainable=[1000] * n, failed=[], commands=[], commit=[])


def first_column(rows):
    drawn, _ = sweep_table.table(rows, dict.fromkeys('abcd', ''))
    return [line.split('|')[1].strip() for line in drawn.splitlines()[2:]]


def test_a_row_is_bold_only_if_it_beats_the_first_or_is_the_first_and_beats_all():
    assert first_column([row('a', 0.5), row('b', 0.2), row('c', 0.5)]) == ['a', '**b**', 'c']
    assert first_column([row('a', 0.2), row('b', 0.5), row('c', 0.6)]) == ['**a**', 'b', 'c']
    # with 2 seeds row b is open, so the first row has not beaten all others
    assert first_column([row('a', 0.2), row('b', 0.5, n=2)]) == ['a', 'b']
    assert first_column([row('a', 0.5), row('b', 0.2, n=2)]) == ['a', 'b']
    paper = dict.fromkeys('abcd', '')
    failed = row('c', 0.5) | dict(test=[], preds=[], failed=['no room'])
    assert 'failed' in sweep_table.table([row('a', 0.5), failed], paper)[0]
    with pytest.raises(EvalError, match='nothing to compare with'):
        sweep_table.table([failed, row('a', 0.5)], paper)


def test_neighbouring_rows_are_compared_where_a_direction_is_claimed():
    rows = [row('a', 0.8), row('b', 0.5), row('c', 0.5), row('d', 0.6)]
    drawn, numbers = sweep_table.table(rows, dict.fromkeys('abcd', ''), neighbours=True)
    assert 'mae minus the row above, 95 %' in drawn
    assert numbers[0]['claim_above'] is None
    assert [n['claim']['verdict'] for n in numbers[1:]] == ['better'] * 3
    assert [n['claim_above']['verdict'] for n in numbers[1:]] == ['better', 'open', 'worse']
    assert 'the row above' not in sweep_table.table(rows, dict.fromkeys('abcd', ''))[0]


def test_the_change_to_the_row_above_is_given_in_percent_where_the_paper_does():
    rows = [row('a', 0.8), row('b', 0.6), row('c', 0.6)]
    drawn, _ = sweep_table.table(rows, dict.fromkeys('abcd', ''), relative=('mae',))
    head, _, *cells = [[c.strip() for c in line.split('|')[1:-1]] for line in drawn.splitlines()]
    at = head.index('mae to the row above')
    assert [c[at] for c in cells] == ['-', '-25.00 %', '+0.00 %']


def test_rows_of_other_clips_are_compared_only_if_the_table_says_so():
    other = row('b', 0.2) | dict(ids=['z'])
    with pytest.raises(EvalError, match='different clips or labels'):
        sweep_table.table([row('a', 0.5), other], dict.fromkeys('abcd', ''))
    drawn, numbers = sweep_table.table(
        [row('a', 0.5), other], dict.fromkeys('abcd', ''), paired=False, columns=('jump2',))
    assert numbers[1]['claim'] is None and '**' not in drawn


def test_labels_that_differ_by_the_rounding_of_test_jsonl_are_the_same():
    """ MOSEI's labels are thirds. A row that is tested by the sweep itself does not round them. """
    rounded = row('b', 0.2) | dict(truth=row('b', 0.2)['truth'].round(6))
    assert not np.array_equal(rounded['truth'], row('a', 0.5)['truth'])
    assert first_column([row('a', 0.5), rounded]) == ['a', '**b**']


def test_a_tuned_row_has_the_settings_that_are_best_on_validation(monkeypatch):
    """
    Its test score is the lowest of none of them, and it must not be chosen by that. Settings of
    which a run failed are not chosen.
    """
    runs = {rate: [SimpleNamespace(wanted=dict(select='mae'))] for rate in (0.1, 0.2, 0.3, 0.4)}
    valid = {0.1: [0.5, 0.7], 0.2: [0.5, 0.5], 0.3: [], 0.4: [0.1]}

    def read_row(of_settings):
        rate = next(k for k, v in runs.items() if v is of_settings)
        return dict(row('noise', rate, n=2), valid=[dict(mae=v) for v in valid[rate]])

    monkeypatch.setattr(sweep_table, 'read_row', read_row)
    best = sweep_table.best_row([(dict(rate=rate), of_rate) for rate, of_rate in runs.items()])
    assert best['test'] == row('noise', 0.2, n=2)['test']
    assert best['tuned'] == (
        'rate=0.2, chosen by the mae on validation: rate=0.1 has 0.600 ± 0.141 (n=2); '
        'rate=0.2 has 0.500 ± 0.000 (n=2); rate=0.3 has failed; rate=0.4 has 0.100 (n=1).')
    assert sweep_table.best_row([({}, runs[0.1])])['tuned'] == ''


def test_the_papers_column_is_not_read_as_ours():
    paper = dict(a='.499', b='.502')
    drawn, numbers = sweep_table.table([row('a', 0.5), row('b', 0.2, n=2)], paper)
    head, _, first, second = [line.split('|')[1:-1] for line in drawn.splitlines()]
    assert head[-1].strip() == 'paper (not ours)' and first[-1].strip() == '.499'
    assert 'nothing is claimed: n < 3' in second[-4] and '<' not in first[-4]
    assert [n['paper'] for n in numbers] == ['.499', '.502']


class FakeRun:
    """ A run of a sweep that lasts some minutes of the fake clock, with what run_all reads. """
    prerequisites = set()

    def __init__(self, label, seed, minutes, now, failed=''):
        self.label, self.seed, self.minutes, self.now = label, seed, minutes, now
        self.outcome, self.failed, self.folder = failed, '', label

    def finished(self):
        return not self.minutes

    def has(self, name):
        return True

    def start(self, slot, threads):
        self.slot, self.since = slot, self.now[0]

    def ended(self):
        self.failed = self.outcome
        return self.now[0] >= self.since + 60 * self.minutes


def test_a_sweep_says_which_run_of_how_many_since_and_until_when(monkeypatch, capsys):
    now = [1.6e9]   # the fake clock, which goes on while run_all sleeps

    def sleep(_):
        now[0] += 30

    monkeypatch.setattr(sweep, 'time', SimpleNamespace(
        time=lambda: now[0], sleep=sleep, localtime=lambda at=None: time.gmtime(at or now[0]),
        strftime=lambda form, at=None: time.strftime(form, at or time.gmtime(now[0]))))
    monkeypatch.setattr(sweep, 'read_run', lambda folder: dict(seconds=240.0))
    runs = [FakeRun('old', 0, 0, now), FakeRun('a', 0, 2, now), FakeRun('b', 1, 6, now, 'no room'),
            FakeRun('c', 1, 2, now)]
    sweep.run_all(runs, jobs=1)
    assert capsys.readouterr().out.splitlines() == [
        '4 runs, 1 of them already finished; 1 at a time',
        # the finished run took 4 min, and three runs are left
        '  run 2 of 4 (a, seed 0) since 12:26; 1 done; ETA 12 min, until 12:38',
        # the mean of 4 and 2 min; two runs are left
        '  run 2 of 4 (a, seed 0) finished after 2.0 min; 2 done; ETA 6 min, until 12:34',
        '  run 3 of 4 (b, seed 1) since 12:28; 2 done; ETA 6 min, until 12:34',
        # a failed run says nothing of the others' time
        '  run 3 of 4 (b, seed 1) FAILED (no room) after 6.0 min; 3 done; ETA 3 min, until 12:37',
        '  run 4 of 4 (c, seed 1) since 12:34; 3 done; ETA 3 min, until 12:37',
        '  run 4 of 4 (c, seed 1) finished after 2.0 min; 4 done']
    assert sweep.clock(now[0] + 24 * 3600) == '2020-09-14 12:37'


def test_the_time_left_counts_the_part_of_an_active_run_that_is_done():
    assert sweep.time_left([60.0, 120.0], since=[30.0], n_waiting=2, jobs=1) == 240
    assert sweep.time_left([60.0, 120.0], since=[30.0, 500.0], n_waiting=2, jobs=2) == 120


def all_rows():
    """ (file, table and label; config; short settings; the row's changes) of each trained row. """
    for path in sorted((HERE / 'config' / 'sweeps').glob('*.py')):
        s = runpy.run_path(str(path))
        for key, t in s['tables'].items():
            labels = [label for label, *_ in t['rows']]
            assert len(set(labels)) == len(labels) and t['title'], (path.name, key)
            for label, changes, _ in t['rows']:
                config = changes.get('config') or t.get('config') or s['config']
                fixed = {k: v for k, v in changes.items() if k not in ('config', 'tune')}
                for tuned in changes.get('tune', [{}]):
                    if 'at_test' not in changes:
                        short = {} if t.get('full') else s['short'] | t.get('short', {})
                        yield (path.name, key, label), config, short, fixed | tuned


def test_rows_of_all_sweeps_change_knobs_that_their_system_has(monkeypatch):
    monkeypatch.chdir(HERE)
    all_knobs = set(sweep.COMMON).union(*(class_knobs(cls) for cls in model.SYSTEMS.values()))
    for name, config, short, changes in all_rows():
        settings = sweep.settings_of_row(config, short, changes, {})
        knobs = sweep.knobs_of_run(config, settings)   # stops at an unknown knob
        assert {k: knobs[k] for k in changes} == changes, name
        assert set(short) <= all_knobs, name


def test_a_flag_is_passed_to_the_rows_whose_system_has_the_knob():
    rows = dict(toy='config/deepmlf_toy.py', late='config/baseline_late.py')
    flags = dict(lr='0.5', n_fusion='3', late_streams='text')
    settings = {name: sweep.settings_of_row(config, dict(epochs=4, n_pseudo=2), {}, flags)
                for name, config in rows.items()}
    assert settings['toy'] == dict(epochs=4, lr='0.5', n_fusion='3')
    assert settings['late'] == dict(epochs=4, lr='0.5', late_streams='text')
    runs = [sweep.Run('out', name, config, settings[name], 0) for name, config in rows.items()]
    sweep.refuse_unknown_flags(flags, runs)
    assert runs[0].wanted['n_fusion'] == 3 and 'n_fusion' not in runs[1].wanted
    with pytest.raises(SystemExit, match="cmpta_width on the command line is a knob of cmpta"):
        sweep.refuse_unknown_flags(dict(cmpta_width='3'), runs)


TINY_SWEEP = """
name = 'Tiny'
config = 'config/crosssent_toy.py'
short = dict(max_steps=2, epochs=3)
tables = {'1': dict(title='one', note='', rows=[
    ('whole', {}, '.5'),
    ('layer 9', dict(gmra_layer=9, epochs=2), ''),
    ('no video at test', dict(at_test=dict(modalities=['audio'])), '')]),
  '2': dict(title='two', paired=False, columns=('jump2',), rows=[
    ('whole', {}, '.5'),
    ('elsewhere', dict(at_test=dict(corpus='OTHER', of='whole')), ''),
    ('nowhere', dict(at_test=dict(corpus='no-such.pkl')), '')]),
  '3': dict(title='three', rows=[('own', dict(config='config/crosssent_toy.py'), '')])}
"""


def test_a_sweep_skips_finished_runs_and_reports_failures(corpora, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)   # a sweep runs from any directory
    path, out = tmp_path / 'tiny.py', tmp_path / 'out'
    path.write_text(TINY_SWEEP)
    argv = [str(path), '--table=1', '--seeds=2', '--jobs=2', f'--out={out}',
            f'--data_dir={corpora}', '--batch_size=16', '--lm_vocab=60', '--device=cpu']
    sweep.main(argv)
    output = capsys.readouterr().out
    for part in ('4 runs, 0 of them already finished', 'FAILED', 'from 1 to 3', 'ETA'):
        assert part in output
    written = (out / 'tiny-1.md').read_text()
    for part in ('| whole', '| no video at test', 'failed', 'layer 9 failed: '):
        assert part in written
    assert 'each run has `--max_steps=2 ' in written and '--epochs' not in written.split('|')[0]
    saved = json.loads((out / 'tiny-1.json').read_text())['rows']
    assert [len(r['test']) for r in saved] == [2, 0, 2]
    assert saved[0]['test'][0] != saved[2]['test'][0] and saved[0]['paper'] == '.5'

    first, whole = (next(p.parent for p in (out / 'toy').glob(f'*-seed{s}/result.json'))
                    for s in (0, 1))
    before = (whole / 'result.json').stat().st_mtime_ns
    os.remove(first / 'result.json')   # as if interrupted after the last checkpoint
    sweep.main(argv)
    assert '1 of them already finished' in capsys.readouterr().out
    assert (whole / 'result.json').stat().st_mtime_ns == before
    # the resumed run has the metrics of the uninterrupted one
    resumed = json.loads((out / 'tiny-1.json').read_text())['rows']
    assert json.dumps([r['test'] for r in resumed]) == json.dumps([r['test'] for r in saved])

    # the runs of table 1 are tested on another corpus
    make_toy(str(tmp_path / 'other'), (16, 16, 24), seed=5)
    path.write_text(TINY_SWEEP.replace('OTHER', str(tmp_path / 'other')))
    argv[1] = '--table=2'
    sweep.main(argv)
    home, away, failed = json.loads((out / 'tiny-2.json').read_text())['rows']
    assert [len(r['test']) for r in (home, away, failed)] == [2, 2, 0]
    assert away['test'][0]['mae'] != home['test'][0]['mae'] and away['claim'] is None
    assert 'no-such.pkl' in failed['failed'][0]
    assert '| jump2' in (out / 'tiny-2.md').read_text()
    with pytest.raises(EvalError, match='changes corpus itself: leave --corpus out'):
        sweep.main([*argv, '--corpus=toy'])
    with pytest.raises(EvalError, match='has a config of its own: leave --config out'):
        sweep.main([str(path), '--table=3', '--config=config/crosssent_mosi.py'])

    argv[1] = '--table=1'
    forge(whole, dict(lr=0.5))   # as if the config had been edited since
    with pytest.raises(EvalError, match='was trained with lr=0.5, but the sweep now has lr=0.002'):
        sweep.main(argv)


def test_a_sweep_stops_before_its_runs_if_no_corpus_can_be_opened(tmp_path, monkeypatch):
    """ One of two corpora is enough: the runs on the other one fail by themselves. """
    monkeypatch.chdir(tmp_path)
    argv = [str(HERE / 'config' / 'sweeps' / 'deepmlf.py'), '--table=4']
    with pytest.raises(CorpusError, match='no-such.pkl'):
        sweep.main([*argv, '--corpus=no-such.pkl'])
    assert not list((tmp_path / 'out').rglob('*.txt'))
    make_toy(str(tmp_path / 'here'), (16, 16, 24), seed=5)

    def run(corpus):
        knobs = dict(corpus=str(tmp_path / corpus), data_dir='data')
        return SimpleNamespace(wanted=knobs, has=lambda name: False)

    sweep.refuse_absent_corpora([run('absent'), run('here')])
    with pytest.raises(CorpusError, match='absent'):
        sweep.refuse_absent_corpora([run('absent')])


def test_ctrl_c_while_a_sweep_converts_its_corpus_gives_a_sentence(tmp_path, monkeypatch):
    def interrupted(source, where):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('data.open_corpus', interrupted)
    config = str(HERE / 'config' / 'sweeps' / 'deepmlf.py')
    monkeypatch.setattr(sys, 'argv', ['sweep.py', config, '--table=4'])
    with pytest.raises(SystemExit, match='sweep: stopped before its runs'):
        runpy.run_path(str(HERE / 'tools' / 'sweep.py'), run_name='__main__')


@pytest.mark.parametrize('flags, sentence', [
    (['--table=4', '--seed=1'], 'itself sets'),
    (['--table=4', '--config=config/crosssent_mosi.py'], 'sized for the toy corpus: .*or take 4-mosei'),
    (['--table=figure3', '--n_fusion=8'], 'changes n_fusion itself: leave --n_fusion out'),
    (['--tabel=4'], '--tabel needs a table: give --table=N, one of 2, 2-mosi'),
    (['--table=77'], "has no table '77': choose one of 2, 2-mosi"),
    (['--table=4', '-seeds=3'], '-seeds=3 is no flag: write --seeds=VALUE'),
    (['--table=4', '--seeds=x'], 'whole numbers'),
    (['--table=4', '--jobs=0'], 'at least 1')])
def test_a_wrong_flag_of_a_sweep_gives_a_sentence(flags, sentence):
    with pytest.raises(EvalError, match=sentence):
        sweep.main([str(HERE / 'config' / 'sweeps' / 'deepmlf.py'), *flags])


def test_rows_that_name_the_corpus_of_their_config_take_another_one():
    rows = [('a', {}, ''), ('b', dict(corpus='MELD'), '')]
    sweep.refuse_flags_of_rows(dict(corpus='data/meld'), rows, 'MELD')
    with pytest.raises(EvalError, match='changes corpus itself'):
        sweep.refuse_flags_of_rows(dict(corpus='data/meld'), rows, 'toy')


def test_an_unknown_sweep_or_flag_gives_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deepmlf = str(HERE / 'config' / 'sweeps' / 'deepmlf.py')
    with pytest.raises(SystemExit, match="unknown key 'n_fusin'"):
        sweep.main([deepmlf, '--table=4', '--n_fusin=2'])
    assert not list(tmp_path.iterdir())
    broken = tmp_path / 'broken.py'
    broken.write_text('tables = dict(\n')
    with pytest.raises(EvalError, match=r'is not a sweep file \(SyntaxError: .*broken.py, line 1'):
        sweep.main([str(broken)])
    for path in ('config/deepmlf_toy.py', 'config/sweeps', 'README.md', 'no/such.py'):
        with pytest.raises(EvalError, match='is not a sweep file'):
            sweep.main([str(HERE / path)])
    sweep.main([deepmlf])
    assert '--table=4' in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Figures

def test_tsne_reaches_the_loss_of_scikit_learn():
    """ Its loss is at most 10 % above that of scikit-learn's exact t-SNE, and three distant
    clusters stay separate. """
    from scipy.spatial.distance import pdist, squareform
    from sklearn.manifold import TSNE
    from sklearn.manifold._t_sne import _joint_probabilities
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(c, 1, (40, 5)) for c in (0, 8, -8)])  # [120,5]
    y = tsne(x, perplexity=15)  # [120,2]
    d2 = squareform(pdist(x, 'sqeuclidean')).astype(np.float32)  # [120,120]
    P = np.maximum(squareform(_joint_probabilities(d2, 15, False)), 1e-12)  # [120,120]

    def kl(y):
        w = 1 / (1 + squareform(pdist(y, 'sqeuclidean')))  # [120,120]
        np.fill_diagonal(w, 0)
        Q = np.maximum(w / w.sum(), 1e-12)
        return (P * np.log(P / Q))[~np.eye(120, dtype=bool)].sum()

    theirs = TSNE(perplexity=15, method='exact', random_state=0).fit_transform(x)
    assert kl(y) < 1.1 * kl(theirs) + 0.01
    centres = [y[i:i + 40].mean(0) for i in (0, 40, 80)]
    nearest = [np.argmin([np.linalg.norm(p - c) for c in centres]) for p in y]
    assert nearest == [i // 40 for i in range(120)]


@torch.no_grad()
def test_deepmlf_attention_weights_reproduce_the_output_of_the_block():
    deepmlf, batch = tiny_deepmlf().eval(), tiny_batch()
    gca = next(iter(deepmlf.mm_blocks.values())).gca
    x, z, mask = calls_of(gca, deepmlf.predict, batch)[0]
    w = gca.weights(x, z, mask)  # [B,h,L,m]
    v = gca.kv_proj(z).view(*z.shape[:2], 2, gca.n_heads, -1)[:, :, 1]  # [B,m,h,D/h]
    v = v.transpose(1, 2)  # [B,h,m,D/h]
    output = gca.out_proj((w @ v).transpose(1, 2).flatten(2))  # [B,L,D]
    torch.testing.assert_close(output, gca(x, z, mask))
    assert torch.allclose(w.sum(-1), torch.ones(()))
    assert (w[~mask[:, None, None].expand_as(w)] == 0).all()


@pytest.mark.parametrize('config, drawn', [
    ('deepmlf_toy', 'attention confusion curves gates truth tsne'),
    ('mse_toy', 'calibration confusion curves truth tsne'),
    ('mse_toy_emotion', 'calibration confusion curves tsne'),
    ('cmpta_toy', 'attention calibration confusion curves truth tsne'),
    ('crosssent_toy', 'attention confusion curves truth tsne'),
    ('baseline_selfmm', 'attention confusion curves truth tsne'),
    ('baseline_tfn', 'confusion curves truth tsne'),
    ('av_toy', 'confusion curves truth tsne')])
def test_all_figures_of_a_run_are_drawn(config, drawn, corpora, tmp_path):
    short = [flag for flag in TINY if not flag.startswith(('--lm_vocab', '--max_steps'))]
    train(f'config/{config}.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', *short,
          '--max_steps=6')
    figures.main([f'{tmp_path}/run', f'--data_dir={corpora}'])
    assert sorted(p.stem for p in (tmp_path / 'run' / 'figures').iterdir()) == drawn.split()


def test_tokens_figure_is_drawn_and_an_unknown_clip_is_refused(corpora, tmp_path):
    folder = f'{tmp_path}/run'
    train('config/cmpta_toy.py', f'--data_dir={corpora}', f'--out_dir={folder}', '--device=cpu',
          '--batch_size=16', '--max_steps=2')
    clip = Corpus(corpora / 'toy').id('test')[3]
    figures.main([folder, '--tokens', f'--clip={clip}'])
    assert (tmp_path / 'run' / 'figures' / 'tokens.png').exists()
    with pytest.raises(EvalError, match="no clip 'nobody'"):
        figures.main([folder, '--clip=nobody'])


def test_tokens_figure_names_classes(corpora, tmp_path, monkeypatch):
    folder = f'{tmp_path}/run'
    train('config/cmpta_toy_emotion.py', f'--data_dir={corpora}', f'--out_dir={folder}',
          '--device=cpu', '--batch_size=16', '--max_steps=2')
    titles = []
    monkeypatch.setattr(figures, 'set_title', lambda fig, title: titles.append(title))
    figures.main([folder, '--tokens', f"--clip={Corpus(corpora / 'toy').id('test')[3]}"])
    names = Corpus(corpora / 'toy').labels['emotion']['names']
    assert titles[0].splitlines()[-1] in [f'label {name}' for name in names]


# --------------------------------------------------------------------------------------------------
# Bench

class Mean(nn.Module):
    """ An adapter that makes n pseudo tokens of the mean text embedding. """
    def __init__(self, D, n):
        super().__init__()
        self.out = nn.Linear(D, n * D)
        self.n = n

    def forward(self, batch, text, text_mask):
        mean = (text * text_mask[..., None]).mean(1)  # [B,D]
        return self.out(mean).view(len(text), self.n, -1)  # [B,P,D]


class NewPrompt(model.PseudoTokenLM):
    """ A system that tools/bench.py does not name. """
    @classmethod
    def make_adapter(cls, k, widths, D, embed_rms):
        return Mean(D, k['n_pseudo'])


SMALL_BENCH = ['--shapes=sims', '--bench_clips=4', '--batch_size=2', '--bench_batches=1',
               '--lm_shape=2,32,2,500']


@pytest.fixture
def bench(capsys, monkeypatch):
    """ A function that runs a small tools/bench.py in one way: config, way, flags -> its globals. """
    def run(config, way, *flags):
        argv = ['bench.py', str(config), *SMALL_BENCH, *flags, f'--only={way}']
        monkeypatch.setattr(sys, 'argv', argv)
        ran = runpy.run_path(str(HERE / 'tools' / 'bench.py'), run_name='__main__')
        assert float(capsys.readouterr().out) >= 0
        return ran

    yield run
    hold_memory(False)


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason="memory is read from /proc")
@pytest.mark.parametrize('way', ['ours train', 'plain train', 'plain valid'])
@pytest.mark.parametrize('config', ['deepmlf_sims', 'mse_simsv2', 'cmpta_simsv2'])
def test_bench_runs_both_ways_in_bfloat16(config, way, bench):
    """ The frozen weights are bfloat16, and the trained ones float32. """
    layers = ['--mm_layers=[1,2]'] if config == 'deepmlf_sims' else []
    bench(HERE / 'config' / f'{config}.py', way, *layers, '--dtype=bfloat16')


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason="memory is read from /proc")
@pytest.mark.parametrize('way', ['ours train', 'plain train', 'plain valid'])
def test_bench_measures_a_new_system_without_an_edit(way, tmp_path, bench, monkeypatch):
    monkeypatch.setitem(model.SYSTEMS, 'new_prompt', NewPrompt)
    config = tmp_path / 'new.py'
    config.write_text("system = 'new_prompt'\nprompt = 'toy'\nn_pseudo = 2\n")
    assert bench(config, way)['plain_way'](NewPrompt) is PlainPseudoTokens


def test_bench_refuses_a_pretraining_stage(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['bench.py', str(HERE / 'config' / 'av_toy.py')])
    with pytest.raises(SystemExit, match='is a pretraining stage'):
        runpy.run_path(str(HERE / 'tools' / 'bench.py'), run_name='__main__')


def test_bench_says_which_knobs_describe_no_model(monkeypatch):
    config = str(HERE / 'config' / 'deepmlf_toy.py')
    monkeypatch.setattr(sys, 'argv', ['bench.py', config, *SMALL_BENCH, '--mm_layers=[99]'])
    with pytest.raises(SystemExit, match=r'bench: mm_layers=\[99\] must be different numbers'):
        runpy.run_path(str(HERE / 'tools' / 'bench.py'), run_name='__main__')


def test_bench_refuses_a_dtype_of_a_missing_commit(monkeypatch):
    config = str(HERE / 'config' / 'deepmlf_toy.py')
    monkeypatch.setattr(sys, 'argv', ['bench.py', config, '--against_dtype=float32'])
    with pytest.raises(SystemExit, match='against=COMMIT, which is missing'):
        runpy.run_path(str(HERE / 'tools' / 'bench.py'), run_name='__main__')


def test_bench_refuses_a_commit_that_git_does_not_know(tmp_path):
    with pytest.raises(SystemExit, match="git cannot read against='no-commit'"):
        bench_against.check_out('no-commit', str(tmp_path))


def test_bench_says_why_another_version_cannot_run(tmp_path):
    with pytest.raises(SystemExit, match='cannot run this benchmark: .*No module named .*tools'):
        bench_against.Worker(str(tmp_path), {}, str(tmp_path))


def test_bench_gives_another_version_the_knobs_that_it_has(monkeypatch):
    monkeypatch.chdir(HERE)
    knobs, unknown = bench_worker.own_knobs(dict(system='deepmlf', n_fusion=3, later=1))
    assert (knobs['n_fusion'], knobs['batch_size']) == (3, 32)
    assert unknown == ['later']


def test_the_output_of_a_run_is_not_written_through_a_link(tmp_path, monkeypatch):
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    run = sweep.Run(str(tmp_path / 'toy'), 'a row', 'config/av_toy.py', {}, 0)
    (tmp_path / 'toy').mkdir()
    os.symlink(victim, run.folder + '.txt')
    monkeypatch.setattr(
        sweep.subprocess, 'Popen', lambda argv, stdout, **how: stdout.write('output'))
    run.start(0, 1)
    assert victim.read_text() == 'precious'
    with open(run.folder + '.txt') as f:
        assert f.read() == 'output' and not os.path.islink(run.folder + '.txt')
