"""
Predicting a user's own clips, exported runs, and evaluation with damaged modalities.

    python -m pytest -q tests/test_clips.py
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from corpora.convert import convert
from fakes import command, msena, save, train
from run import clips, predictor
from run.finished import read_predictions
from tools import damage


@pytest.fixture
def run(curriculum):
    return curriculum / 'whole'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """ --clip writes its pictures into out/clips of the current folder. """
    monkeypatch.chdir(tmp_path)


def files_of(folder):
    """ The files in a folder, and the time at which each was last written. """
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob('*')}


def save_clip(run, tmp_path, n=0, **changes):
    """
    Save test clip n of the toy corpus as mine.npz, with changes -> its path, and the run's
    prediction for the unchanged clip after training.
    """
    corpus = evaluation.load_run(str(run)).corpus
    clip = dict(text=corpus.text('test')[n]) | {
        m: np.array(corpus.frames('test', m, n)) for m in corpus.widths
    }
    np.savez(tmp_path / 'mine.npz', **{k: v for k, v in (clip | changes).items() if v is not None})
    ids, p = read_predictions(str(run))
    return tmp_path / 'mine.npz', float(p['pred'][n])


def test_a_clip_file_gets_the_same_prediction_as_the_clip_in_the_corpus(run, tmp_path):
    loaded = evaluation.load_run(str(run), without_corpus=True)
    for n in range(3):
        path, expected = save_clip(run, tmp_path, n)
        rows, notes = clips.read_clips(str(path), loaded.facts)
        text, pred, _ = predictor.describe_predictions(loaded, rows)
        assert pred[0] == pytest.approx(expected, abs=1e-5) and not notes
        assert [line.split(':')[0].strip() for line in text.splitlines()] == [
            'mine.npz',
            'without audio',
            'without vision',
            'without text',
        ]


def test_an_export_works_without_the_corpus_and_the_lms_folder(
    run, curriculum, tmp_path, capsys
):
    path, expected = save_clip(run, tmp_path)
    command('eval.py', run, f'--export={tmp_path}/away')
    capsys.readouterr()
    shutil.move(curriculum / 'lm_toy', curriculum / 'hidden')
    try:
        before = files_of(tmp_path / 'away')
        command('eval.py', 'away', f'--clip={path}')
        assert files_of(tmp_path / 'away') == before
    finally:
        shutil.move(curriculum / 'hidden', curriculum / 'lm_toy')
    printed = capsys.readouterr().out
    assert f'mine.npz: {expected:+.2f} in [-3, 3]' in printed
    assert os.path.join('out', 'clips', 'away', 'mine.png') in printed
    assert (tmp_path / 'out' / 'clips' / 'away' / 'mine.png').stat().st_size > 5000
    readme = (tmp_path / 'away' / 'README.md').read_text()
    assert readme.startswith('---\nlibrary_name: nanomsa')
    assert 'audio 12, vision 16' in readme and 'base_model' not in readme
    with pytest.raises(SystemExit, match='already exists'):
        command('eval.py', run, f'--export={tmp_path}/away')


def test_an_export_copies_no_large_tree_and_no_links_of_an_lm(tmp_path):
    """ A snapshot in the hub's cache consists of links, of which an export would be empty. """
    (tmp_path / 'lm' / 'onnx').mkdir(parents=True)
    (tmp_path / 'lm' / 'config.json').write_bytes(b'x' * 10)
    (tmp_path / 'lm' / 'onnx' / 'model.onnx').write_bytes(b'x' * 100)
    assert clips.copied_bytes(str(tmp_path / 'lm')) == 110
    (tmp_path / 'lm' / 'model.safetensors').symlink_to(tmp_path / 'lm' / 'config.json')
    assert clips.copied_bytes(str(tmp_path / 'lm')) == np.inf


def test_pictures_of_clips_are_never_in_the_runs_own_folder(run, tmp_path, monkeypatch, capsys):
    """ Not even if the current folder is in the run's, and the clip file too. """
    command('eval.py', run, f'--export={tmp_path}/away')
    (tmp_path / 'away' / 'lm' / 'one.jsonl').write_text('{"text": "it was awful"}')
    before = files_of(tmp_path / 'away')
    monkeypatch.chdir(tmp_path / 'away' / 'lm')
    command('eval.py', '..', '--clip=one.jsonl', f'--data_dir={tmp_path}/data')
    assert files_of(tmp_path / 'away') == before
    picture = tmp_path / 'out' / 'clips' / 'away' / 'one.png'
    assert picture.stat().st_size > 5000
    assert os.path.relpath(picture) in capsys.readouterr().out


def test_a_text_on_the_command_line_is_a_clip_or_the_words_of_one(run, tmp_path, capsys):
    path, _ = save_clip(run, tmp_path)
    loaded = evaluation.load(run, data_dir=tmp_path / 'data')
    words = 'well the film was awful'
    capsys.readouterr()
    command('eval.py', run, f'--text={words}')
    printed = capsys.readouterr().out
    assert f"text: {loaded.predict(words)['score']:+.2f} in" in printed
    assert 'text: there is no audio' in printed
    assert (tmp_path / 'out' / 'clips' / 'whole' / 'text.png').exists()
    with np.load(path) as npz:
        frames = {m: npz[m] for m in ('audio', 'vision')}
    command('eval.py', run, f'--text={words}', f'--clip={path}')
    assert f"mine.npz: {loaded.predict(words, **frames)['score']:+.2f}" in capsys.readouterr().out
    (tmp_path / 'two.jsonl').write_text('{"text": "a"}\n' * 2)
    with pytest.raises(SystemExit, match='two.jsonl does not hold one clip'):
        command('eval.py', run, f'--text={words}', f'--clip={tmp_path}/two.jsonl')
    with pytest.raises(SystemExit, match='none of the modalities that this run reads'):
        command('eval.py', run, '--text= ')


def test_clips_of_a_jsonl_may_lack_modalities(run, tmp_path, capsys):
    rows = [
        dict(id='a', text='the film was awful', audio=None),
        dict(text='', audio=[[0.0] * 12] * 4),
        dict(vision=[[float('nan')] * 16] * 3),
    ]
    lines = '\n'.join(map(json.dumps, rows))
    (tmp_path / 'many.jsonl').write_text('\ufeff' + lines)   # with a byte order mark
    command('eval.py', run, f'--clip={tmp_path}/many.jsonl')
    printed = capsys.readouterr().out
    assert 'a: ' in printed
    assert 'many.jsonl, clip 2: 48 values of vision were NaN or inf and are replaced' in printed
    assert 'clip 1: there is no vision' in printed
    assert 'test texts' not in printed  # a note only where texts are truncated


@pytest.mark.parametrize(
    'changes, sentence',
    [
        (
            dict(audio=np.zeros((5, 33), 'f4')),
            r"\[5, 33\] \(librosa\), but this run was trained on toy, whose frames are 12 wide",
        ),
        (dict(vision=np.zeros(16, 'f4')), r'shape \[16\]: give \[frames, 16\]'),
        (
            dict(text=' ', audio=np.zeros((0, 12), 'f4'), vision=None),
            'has none of the modalities that this run reads',
        ),
        (dict(audio=np.array(['x'])), 'no array of numbers'),
        (dict(smell=np.zeros(3)), 'may hold only text'),
        (dict(text=None, audio=None, vision=None, id='x'), 'neither text'),
    ],
)
def test_a_wrong_clip_stops_with_a_sentence(changes, sentence, run, tmp_path):
    path, _ = save_clip(run, tmp_path, **changes)
    with pytest.raises(SystemExit, match=sentence):
        command('eval.py', run, f'--clip={path}')


def test_a_file_without_clips_stops_with_a_sentence(run, tmp_path):
    (tmp_path / 'broken.npz').write_bytes(b'PK\x03\x04 no')
    (tmp_path / 'broken.jsonl').write_text('{')
    (tmp_path / 'empty.jsonl').write_text('\n')
    np.savez(tmp_path / 'pickled.npz', text=np.array([{}], dtype=object))
    np.savez(tmp_path / 'many.npz', text=np.array(['two', 'texts']))
    np.save(tmp_path / 'array.npy', np.zeros(3))
    shutil.move(tmp_path / 'array.npy', tmp_path / 'array.npz')
    (tmp_path / 'surrogate.jsonl').write_text('{"text": "\\ud800"}')
    (tmp_path / 'huge.jsonl').write_text('{"text": "a", "audio": [[' + '9' * 400 + ']]}')
    for name in (
        'broken.npz',
        'broken.jsonl',
        'empty.jsonl',
        'pickled.npz',
        'gone.npz',
        'clip.txt',
        'many.npz',
        'array.npz',
        'surrogate.jsonl',
        'huge.jsonl',
    ):
        with pytest.raises(SystemExit, match='eval: '):
            command('eval.py', run, f'--clip={tmp_path / name}')


def test_a_name_or_id_that_cannot_be_printed_is_escaped(run, tmp_path, capsys):
    """ A file name that is not UTF-8, and an id with a line feed and half a surrogate pair. """
    path = tmp_path / 'caf\udce9\n.jsonl'
    path.write_text('{"text": "a", "id": "two\\nlines \\ud800"}')
    command('eval.py', run, f'--clip={path}')
    printed = capsys.readouterr().out
    assert r'two\nlines \ud800: ' in printed and printed.encode()
    assert [p.name for p in (tmp_path / 'out').rglob('*.png')] == ['caf_udce9_n.png']


def test_an_lm_run_or_a_wrong_export_folder_stops_with_a_sentence(run, curriculum, tmp_path):
    (tmp_path / 'one.jsonl').write_text('{"text": "a"}')
    for flag in (f'--clip={tmp_path}/one.jsonl', f'--export={tmp_path}/x'):
        with pytest.raises(SystemExit, match='predicts no score'):
            command('eval.py', curriculum / 'lm_toy', flag)
    for flags, sentence in (
        (['--export='], 'needs a folder'),
        (['--export=/proc/x'], 'cannot write'),
        ([f'--clip={tmp_path}/one.jsonl', '--modalities=text'], 'alone'),
    ):
        with pytest.raises(SystemExit, match=sentence):
            command('eval.py', run, *flags)


def test_a_clip_file_is_raw_even_if_the_corpus_was_stored_standardised(corpora, tmp_path):
    """A float16 corpus folder holds standardised frames, a user's clips are always raw."""
    rng = np.random.default_rng(0)
    tree = msena(n=(40, 20, 20), L=6)
    for split in tree.values():
        split['audio'] = (50 + 20 * rng.normal(size=split['audio'].shape)).astype('f4')
    source = save(tree, tmp_path / 'raw.pkl')
    convert(source, str(tmp_path / 'half'), dtype='float16')
    train(
        'config/av_toy.py',
        f'--corpus={tmp_path}/half',
        f'--out_dir={tmp_path}/r',
        '--max_steps=3',
        '--device=cpu',
    )
    half, n = data.open_corpus(str(tmp_path / 'half')), 4
    length = half.lengths('test', 'audio')[n], half.lengths('test', 'vision')[n]
    np.savez(
        tmp_path / 'mine.npz',
        audio=tree['test']['audio'][n][: length[0]],
        vision=tree['test']['vision'][n][: length[1]],
    )
    loaded = evaluation.load_run(str(tmp_path / 'r'), without_corpus=True)
    rows, _ = clips.read_clips(str(tmp_path / 'mine.npz'), loaded.facts)
    _, p = read_predictions(str(tmp_path / 'r'))
    _, pred, _ = predictor.describe_predictions(loaded, rows)
    assert pred[0] == pytest.approx(float(p['pred'][n]), abs=2e-3)


def test_each_condition_damages_only_the_modalities_in_its_name(run):
    loaded, feed = evaluation.load_run_and_feed(str(run))
    batch = feed('test', np.arange(8))
    ways = damage.conditions(dict(audio=1.0, vision=np.ones(16)))
    of_codes = damage.conditions(dict(audio=1.0, vision=1.0), codes=True)   # noise makes no codes
    assert set(ways) - set(of_codes) == {"noise with the features' std"}
    assert len(ways) == 15
    whole = loaded.predict(batch)['pred']
    for name, way in ways.items():
        variant = way(batch, np.linspace(0, 0.99, 8), np.random.default_rng(0))
        pred = loaded.predict(batch | variant)['pred']
        assert torch.equal(pred, whole) == (name == damage.WHOLE), name
        both = name.startswith(('noise', 'frames'))
        for m in ('audio', 'vision'):
            named = m in name or both
            assert (m in variant) == named, (name, m)
            assert named != torch.equal(batch[m], variant.get(m, batch[m])), (name, m)
        assert all(key.startswith(('audio', 'vision')) for key in variant), name


def test_damage_prints_a_table(run, capsys):
    command('tools/damage.py', run)
    printed = capsys.readouterr().out
    mae = json.load(open(run / 'result.json'))['test']['mae']
    assert re.search(rf'undamaged +\| {mae:.3f} \(n=1\)', printed)
    assert 'no audio nor vision for 100%' in printed


def test_dropping_all_frames_equals_modalities_of_none(run):
    """Without both streams of every clip, metrics are those of --modalities=[]."""
    metrics = damage.damaged(str(run))['no audio nor vision for 100%']
    loaded = evaluation.load_run(str(run))
    without, _ = loaded.test(loaded.corpus, loaded.knobs | dict(modalities=[]))
    assert metrics['mae'] == pytest.approx(without['mae'], abs=1e-5)


def test_other_systems_predict_clips_and_are_damaged_too(corpora, tmp_path, capsys):
    """MSE-Adapter predicts classes with probabilities; CrossSent has a new encoder (lm='new')."""
    short = [f'--data_dir={corpora}', '--max_steps=2', '--device=cpu']
    train('config/mse_toy_emotion.py', f'--out_dir={tmp_path}/e', *short)
    train('config/crosssent_toy.py', f'--out_dir={tmp_path}/c', *short)
    clip = dict(text='the film was superb', audio=[[0.1] * 12] * 9, vision=[[0.2] * 16] * 7)
    (tmp_path / 'one.jsonl').write_text(json.dumps(clip))
    for name in 'ec':
        command('eval.py', tmp_path / name, f'--export={tmp_path}/{name}x')
        capsys.readouterr()
        command('eval.py', tmp_path / f'{name}x', f'--clip={tmp_path}/one.jsonl')
        printed = capsys.readouterr().out
        assert 'without text' in printed and ('(probability of ' in printed) == (name == 'e')
        command('tools/damage.py', tmp_path / name)
        assert 'frames in random order' in capsys.readouterr().out
    assert os.path.isdir(tmp_path / 'ex' / 'lm') and os.path.isdir(tmp_path / 'cx' / 'hf')
