"""
Sweeps and figures: what may be claimed, what a failed or cut-off run does, and that every picture is drawn.

    python -m pytest -q test_sweep.py
"""
import json
import os
import runpy

import numpy as np
import pytest
import torch

import figures
import sweep
from configurator import knobs_of, read_config
from eval import EvalError, claim, score_by
from figures import tsne, weights_of
from model import load_checkpoint, save_checkpoint
from test_smoke import HERE, tiny_deepmlf, tiny_batch
from test_trust import TINY, forge, train

MAE = score_by(dict(kind='regression', range=[-3, 3]))[1]


def test_a_win_needs_three_seeds_and_an_interval_without_zero():
    label = np.zeros(200, np.float32)
    def runs(n, error): return np.full((n, 200), error, np.float32) + np.random.default_rng(n).normal(0, 0.01, (n, 200)).astype(np.float32)
    assert claim(MAE, runs(3, 0.5), runs(3, 0.3), label, 'mae')['verdict'] == 'better'
    assert claim(MAE, runs(3, 0.3), runs(3, 0.5), label, 'mae')['verdict'] == 'worse'
    assert claim(MAE, runs(2, 0.5), runs(3, 0.3), label, 'mae')['verdict'] == 'open'       # two seeds prove nothing
    wide = np.random.default_rng(0).normal(0, 1, (3, 200)).astype(np.float32)
    assert claim(MAE, wide, wide[::-1], label, 'mae')['verdict'] == 'open'
    y = (np.arange(200) % 2).astype(np.float32)
    by, f1 = score_by(dict(kind='classes', names=['a', 'b']))
    good, bad = np.stack([y] * 3), np.stack([1 - y] * 3)
    assert by == 'wf1' and claim(f1, bad, good, y, by)['verdict'] == 'better' and claim(f1, good, bad, y, by)['verdict'] == 'worse'


def row(label, error, n=3):
    truth = np.linspace(-1, 1, 300).astype(np.float32)
    preds = [truth + error * np.random.default_rng(i).choice([-1, 1], 300) for i in range(n)]
    return dict(label=label, test=[dict(mae=float(np.abs(p - truth).mean())) for p in preds], valid=[], preds=preds, truth=truth, ids=['a'], info=dict(kind='regression', range=[-1, 1]), folders=[],
                seconds=[60.0] * n, n_trainable=[1000] * n, failed=[], commands=[], commit=[])


def test_a_table_bolds_what_the_rule_allows_and_nothing_else():
    paper = dict.fromkeys('abcd', '')
    bold = lambda rows: [line.split('|')[1].strip() for line in sweep.table(rows, paper)[0].splitlines()[2:]]
    assert bold([row('a', 0.5), row('b', 0.2), row('c', 0.5)]) == ['a', '**b**', 'c']
    assert bold([row('a', 0.2), row('b', 0.5), row('c', 0.6)]) == ['**a**', 'b', 'c']
    assert bold([row('a', 0.2), row('b', 0.5, n=2)]) == ['a', 'b']                          # an open row: the first has not beaten all
    assert bold([row('a', 0.5), row('b', 0.2, n=2)]) == ['a', 'b']
    failed = row('c', 0.5) | dict(test=[], preds=[], failed=['no room'])
    assert 'failed' in sweep.table([row('a', 0.5), failed], paper)[0]
    with pytest.raises(EvalError, match='nothing to compare with'): sweep.table([failed, row('a', 0.5)], paper)


def test_a_runs_output_is_written_through_no_link(tmp_path, monkeypatch):
    known, victim = knobs_of(HERE / 'train.py'), tmp_path / 'victim'
    victim.write_text('precious')
    run = sweep.Run(str(tmp_path / 'toy'), 'a row', 'config/av_toy.py', {}, 0, known)
    (tmp_path / 'toy').mkdir()
    os.symlink(victim, run.folder + '.txt')
    monkeypatch.setattr(sweep.subprocess, 'Popen', lambda argv, stdout, **how: stdout.write('said'))
    run.start(0, 1)
    assert victim.read_text() == 'precious'
    with open(run.folder + '.txt') as f:
        assert f.read() == 'said' and not os.path.islink(run.folder + '.txt')


def test_every_sweeps_rows_are_knobs_that_exist():
    known = knobs_of(HERE / 'train.py')
    for path in sorted((HERE / 'config' / 'sweeps').glob('*.py')):
        s = runpy.run_path(str(path))
        for key, t in s['tables'].items():
            labels = [label for label, *_ in t['rows']]
            assert len(set(labels)) == len(labels) and t['title'], (path.name, key)
            for label, changes, paper in t['rows']:
                config = changes.get('config') or t.get('config') or s['config']
                read_config(HERE / config, known)
                for k, v in (s['short'] | t.get('short', {}) | changes).items():
                    assert k in ('config', 'at_test') or k in known and (type(v) is type(known[k]) or (type(v), type(known[k])) == (int, float)), (path.name, key, label, k)


def test_a_sweep_skips_resumes_and_survives(corpora, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    path, out = tmp_path / 'tiny.py', tmp_path / 'out'
    path.write_text("name = 'Tiny'\nconfig = 'config/crosssent_toy.py'\nshort = dict(max_steps=2)\ntables = {'1': dict(title='one', note='', rows=["
                    "('whole', {}, '.5'), ('layer 9', dict(gmra_layer=9), ''), ('no video at test', dict(at_test=['audio']), '')])}\n")
    argv = [str(path), '--table=1', '--seeds=2', '--jobs=2', f'--out={out}', f'--data_dir={corpora}', '--batch_size=16', '--lm_vocab=60', '--device=cpu']
    sweep.main(argv)
    said = capsys.readouterr().out
    assert '4 runs, 0 of them finished before' in said and 'FAILED' in said and 'from 1 to 3' in said and 'ETA' in said
    written = (out / 'tiny-1.md').read_text()
    assert '| whole' in written and '| no video at test' in written and 'failed' in written and 'layer 9 failed: ' in written
    saved = json.loads((out / 'tiny-1.json').read_text())['rows']
    assert [len(r['test']) for r in saved] == [2, 0, 2] and saved[0]['test'][0] != saved[2]['test'][0] and saved[0]['paper'] == '.5'
    first, whole = (next(p.parent for p in (out / 'toy').glob(f'*-seed{s}/result.json')) for s in (0, 1))
    before = (whole / 'result.json').stat().st_mtime_ns
    os.remove(first / 'result.json')                                                        # cut off after its last checkpoint
    sweep.main(argv)
    assert '1 of them finished before' in capsys.readouterr().out and (whole / 'result.json').stat().st_mtime_ns == before
    assert (out / 'tiny-1.md').read_text().splitlines()[5:7] == written.splitlines()[5:7]    # the resumed run ended as it had
    forge(whole, dict(lr=0.5))                                                              # the config has been edited since
    with pytest.raises(EvalError, match='was trained with lr=0.5, and it would be 0.002 now'): sweep.main(argv)
    for flags, sentence in ((['--table=1', '--seed=1'], 'sets itself'), (['--table=1', '--config=config/crosssent_mosi.py'], 'sized for the toy corpus')):
        with pytest.raises(EvalError, match=sentence): sweep.main([str(HERE / 'config/sweeps/deepmlf.py'), *[f.replace('=1', '=4') if 'table' in f else f for f in flags]])
    with pytest.raises(SystemExit, match="unknown key 'gmra_layr'"): sweep.main([str(path), '--table=1', '--gmra_layr=2'])
    with pytest.raises(EvalError, match='there is no sweep'): sweep.main(['config/deepmlf_toy.py'])
    for flags, sentence in ((['--table=7'], "has no table '7': it has 1"), (['--table=1', '--seeds=x'], 'whole numbers'), (['--table=1', '--jobs=0'], 'at least 1')):
        with pytest.raises(EvalError, match=sentence): sweep.main([str(path), *flags])
    with pytest.raises(EvalError, match='there is no sweep'): sweep.main(['no/such.py'])
    sweep.main([str(path)])
    assert '--table=1' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# Figures

def test_tsne_is_exact():
    """ Its loss is scikit-learn's exact t-SNE's, within a tenth, and three far clusters stay three. """
    from sklearn.manifold import TSNE
    from sklearn.manifold._t_sne import _joint_probabilities
    from scipy.spatial.distance import pdist, squareform
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(c, 1, (40, 5)) for c in (0, 8, -8)])
    y = tsne(x, perplexity=15)
    P = np.maximum(squareform(_joint_probabilities(squareform(pdist(x, 'sqeuclidean')).astype(np.float32), 15, False)), 1e-12)
    def kl(y):
        w = 1 / (1 + squareform(pdist(y, 'sqeuclidean'))); np.fill_diagonal(w, 0)
        return (P * np.log(P / np.maximum(w / w.sum(), 1e-12)))[~np.eye(120, dtype=bool)].sum()
    assert kl(y) < 1.1 * kl(TSNE(perplexity=15, method='exact', random_state=0).fit_transform(x)) + 0.01
    centres = [y[i:i + 40].mean(0) for i in (0, 40, 80)]
    nearest = [np.argmin([np.linalg.norm(p - c) for c in centres]) for p in y]
    assert nearest == [i // 40 for i in range(120)]


def test_deepmlfs_attention_is_what_the_block_computes():
    model, batch = tiny_deepmlf().eval(), tiny_batch()
    gca = next(iter(model.mm_blocks.values())).gca
    with figures.Watch([gca]) as watch, torch.no_grad(): model.predict(batch)
    x, z, mask = watch.seen[0]
    with torch.no_grad():
        w = weights_of(gca, x, z, mask)                                                          # [B,h,L,m]
        v = gca.kv_proj(z).view(*z.shape[:2], 2, gca.n_heads, -1)[:, :, 1].transpose(1, 2)       # [B,h,m,D/h]
        torch.testing.assert_close(gca.out_proj((w @ v).transpose(1, 2).flatten(2)), gca(x, z, mask))
    assert torch.allclose(w.sum(-1), torch.ones(())) and (w[~mask[:, None, None].expand_as(w)] == 0).all()


@pytest.mark.parametrize('config, drawn', [
    ('deepmlf_toy', 'attention confusion curves gates truth tsne'), ('mse_toy', 'calibration confusion curves truth tsne'), ('mse_toy_emotion', 'calibration confusion curves tsne'),
    ('cmpta_toy', 'attention calibration confusion curves truth tsne'), ('crosssent_toy', 'attention confusion curves truth tsne'), ('baseline_selfmm', 'attention confusion curves truth tsne'),
    ('baseline_tfn', 'confusion curves truth tsne'), ('av_toy', 'confusion curves truth tsne')])
def test_every_figure_that_a_run_allows(config, drawn, corpora, tmp_path, capsys):
    short = [f for f in TINY if not f.startswith('--max_steps')] if config in ('av_toy',) else [f for f in TINY if not f.startswith(('--lm_vocab', '--max_steps'))]
    train(f'config/{config}.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', *short, '--max_steps=6')
    figures.main([f'{tmp_path}/run'])
    assert sorted(p.stem for p in (tmp_path / 'run' / 'figures').iterdir()) == drawn.split()
    if config == 'cmpta_toy':
        figures.main([f'{tmp_path}/run', '--tokens', '--clip=' + runpy.run_path(str(HERE / 'data.py'))['Corpus'](corpora / 'toy').id('test')[3]])
        assert (tmp_path / 'run' / 'figures' / 'tokens.png').exists()
        with pytest.raises(EvalError, match="no clip 'nobody'"): figures.main([f'{tmp_path}/run', '--clip=nobody'])
        # a checkpoint that diverged has neither vectors nor a score to draw
        path = str(tmp_path / 'run' / 'best.safetensors')
        tensors, info = load_checkpoint(path)
        save_checkpoint(path, {k: t * float('nan') if t.is_floating_point() else t for k, t in tensors.items()}, info)
        for flags in ([], ['--tokens']):
            with pytest.raises(EvalError, match='is NaN or inf'):
                figures.main([f'{tmp_path}/run', *flags])
