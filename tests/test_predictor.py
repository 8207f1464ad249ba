"""
A run in Python: `from eval import load` (run/predictor.py), and docs/tools.md's lines for it.

    python -m pytest -q tests/test_predictor.py
"""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from corpora.toy import make_toy
from corpora.unpickle import CorpusError
from data import get_batch, open_corpus
from eval import evaluate_on, evaluate_without, load, load_run
from fakes import ENV, HERE, TINY, command, forge, train
from run.clips import ClipError, read_clips
from run.finished import EvalError, read_predictions
from run.folder import find_folder
from run.predictor import describe_predictions, transferred


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """ A folder to be in that is neither the checkout nor a run's, and its data_dir. """
    return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def deepmlf(curriculum, home):
    return load(curriculum / 'whole', data_dir=home)


@pytest.fixture(scope='module')
def emotions(corpora, home):
    """ An MSE-Adapter run that predicts emotions. """
    short = [f'--data_dir={corpora}', '--max_steps=2', '--device=cpu']
    train('config/mse_toy_emotion.py', f'--out_dir={home}/emotions', *short)
    return home / 'emotions'


def clip_of(corpus, i):
    """ Test clip i as predict takes it. """
    frames = {m: np.array(corpus.frames('test', m, i)) for m in corpus.widths}
    return dict(text=corpus.text('test')[i]) | frames


def files_of(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob('*')}


# --------------------------------------------------------------------------------------------------
# Predictions


def test_a_score_is_that_of_the_same_clip_in_the_test_set(deepmlf, corpora, curriculum):
    corpus = open_corpus('toy', corpora)
    _, p = read_predictions(str(curriculum / 'whole'))
    for i in range(3):
        found = deepmlf.predict(**clip_of(corpus, i))
        assert found['score'] == pytest.approx(float(p['pred'][i]), abs=1e-5)
        mae = deepmlf.run.result['test']['mae']
        assert found['interval'] == pytest.approx((found['score'] - mae, found['score'] + mae))
        assert 'test MAE' in found['interval_is'] and found['notes'] == []
        assert 'probabilities' not in found


def test_lists_of_clips_give_the_predictions_of_each_clip(deepmlf, corpora):
    corpus = open_corpus('toy', corpora)
    clips = [clip_of(corpus, i) for i in range(3)]
    alone = [deepmlf.predict(**clip)['score'] for clip in clips]
    lists = {key: [clip[key] for clip in clips] for key in clips[0]}
    assert [found['score'] for found in deepmlf.predict(**lists)] == alone
    tensors = {m: [torch.tensor(x, requires_grad=True) for x in lists[m]] for m in corpus.widths}
    as_tuple = dict(text=tuple(lists['text'])) | tensors
    assert [found['score'] for found in deepmlf.predict(**as_tuple)] == alone
    assert deepmlf.predict(**clips[0] | dict(audio=clips[0]['audio'].tolist()))['score'] == alone[0]
    # one array of clips of the same length
    audio = np.stack([x[:2] for x in lists['audio']])  # [3,2,12]
    of_array = deepmlf.predict(text=np.array(lists['text']), audio=audio)
    of_list = deepmlf.predict(text=lists['text'], audio=list(audio))
    assert [f['score'] for f in of_array] == [f['score'] for f in of_list]
    assert len({f['score'] for f in of_array}) == 3


def test_a_missing_stream_is_noted_for_its_clip_alone(deepmlf, corpora):
    whole = clip_of(open_corpus('toy', corpora), 0)
    lists = dict(text=[whole['text']] * 2, audio=[whole['audio'], None], vision=[whole['vision']] * 2)
    first, second = deepmlf.predict(**lists)
    assert first['notes'] == [] and second['notes'] == ['clip 1: there is no audio']
    assert first['score'] != second['score']
    assert deepmlf.predict('fine')['notes'] == [
        'the clip: there is no audio', 'the clip: there is no vision']
    long = deepmlf.predict('fine ' * 200)
    assert '1 truncated to' in long['notes'][-1]


def test_classes_have_a_name_and_probabilities(emotions, corpora, home):
    run = load(emotions, data_dir=home)
    found = run.predict(**clip_of(open_corpus('toy', corpora), 0))
    names = run.run.info['names']
    _, p = read_predictions(str(emotions))
    assert found['class'] == names[int(p['pred'][0])]
    assert list(found['probabilities']) == names
    assert list(found['probabilities'].values()) == pytest.approx(p['prob'][0].tolist(), abs=1e-4)
    assert 'score' not in found and 'interval' not in found
    assert f'one of {", ".join(names)}' in repr(run)


def test_a_score_with_probabilities_has_an_interval_of_80_percent(emotions, corpora, home):
    out, lm = home / 'scores', json.loads((emotions / 'result.json').read_text())['about']['knobs']['lm']
    train('config/mse_toy.py', f'--out_dir={out}', f'--data_dir={corpora}', f'--lm={lm}',
          '--max_steps=2', '--device=cpu')
    run = load(out, data_dir=home)
    found = run.predict(**clip_of(open_corpus('toy', corpora), 0))
    low, high = found['interval']
    p = found['probabilities']
    inside = sum(v for label, v in p.items() if low <= label <= high)
    assert found['interval_is'] == '80 % of the probability'
    assert len(p) == 61 and sum(p.values()) == pytest.approx(1, abs=1e-4)
    assert inside >= 0.8 - 1e-6
    narrower = sum(v for label, v in p.items() if low < label < high)
    assert narrower < inside and narrower - 1e-6 <= 0.8


@pytest.mark.parametrize('config', ['baseline_late', 'baseline_mult'])
def test_baselines_predict_and_explain_a_clip(config, corpora, home, curriculum):
    out = home / config
    train(f'config/{config}.py', f'--data_dir={corpora}', f'--out_dir={out}', *TINY)
    run = load(out, data_dir=home)
    clip = clip_of(open_corpus('toy', corpora), 1)
    _, p = read_predictions(str(out))
    found = run.explain(clip)
    assert found['score'] == pytest.approx(float(p['pred'][1]), abs=1e-5)
    assert set(found['without']) == set(run.reads)


def test_a_run_without_text_predicts_from_its_streams(curriculum, corpora, home):
    run = load(curriculum / 'av_toy', data_dir=home)
    clip = clip_of(open_corpus('toy', corpora), 0)
    text = clip.pop('text')
    _, p = read_predictions(str(curriculum / 'av_toy'))
    assert run.predict(**clip)['score'] == pytest.approx(float(p['pred'][0]), abs=1e-5)
    with pytest.raises(ClipError, match='add audio or vision'):
        run.predict(text=text)


# --------------------------------------------------------------------------------------------------
# Explanations


def test_explain_gives_the_differences_that_the_command_prints(deepmlf, corpora, curriculum, tmp_path):
    corpus = open_corpus('toy', corpora)
    clip = clip_of(corpus, 2)
    found = deepmlf.explain(clip)
    np.savez(tmp_path / 'mine.npz', **clip)
    rows, _ = read_clips(str(tmp_path / 'mine.npz'), deepmlf.run.facts)
    text, pred, _ = describe_predictions(deepmlf.run, rows)
    assert found['score'] == pytest.approx(float(pred[0]), abs=1e-6)
    for m in ('audio', 'vision', 'text'):
        other = found['without'][m]
        assert f"without {m}: {other['score']:+.2f} (change {other['change']:+.2f})" in text
        assert other['change'] == pytest.approx(other['score'] - found['score'], abs=1e-5)
        rest = {key: v for key, v in clip.items() if key != m}
        assert deepmlf.predict(**rest)['score'] == pytest.approx(other['score'], abs=1e-5)
    assert found['without']['text']['change'] != 0


def test_explain_gives_attention_weights_as_arrays(deepmlf, corpora):
    clip = clip_of(open_corpus('toy', corpora), 0)
    attention = deepmlf.explain(clip)['attention']
    assert sorted(attention) == [f'layer {n}' for n in sorted(deepmlf.run.model.mm_blocks)]
    for view in attention.values():
        weights = view['weights']
        assert type(weights) is np.ndarray and len(weights) == deepmlf.run.knobs['n_fusion']
        assert weights.sum(1) == pytest.approx(np.ones(len(weights)), abs=1e-4)
        assert view['rows'] == 'fusion token' and 'slot' in view['columns']


def test_explain_of_classes_gives_changes_of_the_first_class(emotions, corpora, home):
    run = load(emotions, data_dir=home)
    clip = clip_of(open_corpus('toy', corpora), 0)
    found = run.explain(clip)
    del clip['audio']
    change = run.predict(**clip)['probabilities'][found['class']] - found['probabilities'][found['class']]
    assert found['without']['audio']['change'] == pytest.approx(change, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluate_gives_the_metrics_of_the_test_set_and_writes_nothing(deepmlf, curriculum):
    before = files_of(curriculum / 'whole')
    metrics = deepmlf.evaluate()
    recorded = json.loads((curriculum / 'whole' / 'result.json').read_text())['test']
    assert metrics == pytest.approx(recorded, abs=1e-5, nan_ok=True)
    deepmlf.explain(dict(text='fine'))
    assert files_of(curriculum / 'whole') == before


def test_evaluate_takes_another_corpus_and_fewer_modalities(deepmlf, corpora, curriculum, tmp_path):
    make_toy(str(tmp_path / 'other'), n_clips=(60, 16, 24), seed=5)
    there = deepmlf.evaluate(tmp_path / 'other')
    table = evaluate_on(str(curriculum / 'whole'), str(tmp_path / 'other'), data_dir=str(tmp_path))
    assert f"| {there['mae']:.3f} " in table.splitlines()[-1]
    assert deepmlf.evaluate(str(corpora / 'toy')) == pytest.approx(deepmlf.evaluate(), nan_ok=True)
    loaded = load_run(str(curriculum / 'whole'))
    alone, _ = loaded.test(loaded.corpus, loaded.knobs | dict(modalities=[]))
    assert deepmlf.evaluate(modalities=['text'])['mae'] == pytest.approx(alone['mae'], abs=1e-6)
    for wrong in ('text', ['smell']):
        with pytest.raises(EvalError, match='must be a list of text, audio or vision'):
            deepmlf.evaluate(modalities=wrong)
    with pytest.raises(CorpusError, match='nowhere'):
        deepmlf.evaluate('nowhere')


def test_a_table_lists_the_modalities_that_a_run_reads(curriculum, corpora):
    def rows(table):
        return [line.split('|')[1].strip() for line in table.splitlines()]

    whole, av = str(curriculum / 'whole'), str(curriculum / 'av_toy')
    assert rows(evaluate_without(whole, ['audio']))[2:] == ['as trained', 'text, audio']
    assert rows(evaluate_without(av, ['vision']))[2:] == ['as trained', 'vision']
    assert rows(evaluate_without(av, []))[2:] == ['as trained', 'nothing']
    assert rows(evaluate_on(av, str(corpora / 'toy')))[0] == 'av_toy, test'


def test_a_run_is_evaluated_on_its_corpus_in_another_folder(curriculum, tmp_path):
    """ The folder that the run names is not there. """
    run = tmp_path / 'av'
    shutil.copytree(curriculum / 'av_toy', run)
    about = json.loads((run / 'result.json').read_text())['about']
    shutil.copytree(about['corpus']['folder'], tmp_path / 'moved')
    forge(run, corpus=about['corpus'] | dict(folder=str(tmp_path / 'gone')))
    with pytest.raises(EvalError, match='gone .* is not here'):
        evaluate_without(str(run), ['audio'])
    trained, again = evaluate_on(str(run), str(tmp_path / 'moved')).splitlines()[2:]
    assert trained.split('|')[2:] == again.split('|')[2:]


def test_a_run_without_standardise_reads_the_text_of_another_corpus_alone(deepmlf, corpora):
    other = transferred(deepmlf.run, open_corpus('toy', corpora), [])
    batch = get_batch(other, 'test', [0, 1], modalities=[], standardise=False)
    assert batch['audio_len'].tolist() == batch['vision_len'].tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------
# Other folders


def test_an_export_predicts_without_its_corpus_and_keeps_its_files(
    deepmlf, curriculum, corpora, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command('eval.py', curriculum / 'whole', '--export=away')
    before = files_of(tmp_path / 'away')
    shutil.move(curriculum / 'lm_toy', curriculum / 'hidden')
    try:
        run = load('away', data_dir='data')
        clip = clip_of(open_corpus('toy', corpora), 0)
        assert run.explain(clip)['score'] == pytest.approx(deepmlf.predict(**clip)['score'], abs=1e-5)
        assert run.evaluate()['mae'] == pytest.approx(deepmlf.evaluate()['mae'], abs=1e-5)
    finally:
        shutil.move(curriculum / 'hidden', curriculum / 'lm_toy')
    assert files_of(tmp_path / 'away') == before
    run.run.facts['folder'] = str(tmp_path / 'gone')
    with pytest.raises(EvalError, match='is not here: convert its source file'):
        run.evaluate()


PROGRAM = """
import sys
sys.path.append({here!r})
from eval import load
run = load({run!r}, data_dir='data')
print('score', run.predict(text='well the film was awful')['score'])
print('mae', run.evaluate()['mae'])
"""


def test_a_run_with_relative_paths_is_read_from_another_folder(corpora, tmp_path, monkeypatch):
    """ Its LM and corpus are named as out/lm_toy and data/toy, from the folder of its training. """
    trained, other = tmp_path / 'trained', tmp_path / 'other'
    shutil.copytree(corpora / 'toy', trained / 'data' / 'toy')
    other.mkdir()
    monkeypatch.chdir(trained)
    train('config/deepmlf_toy.py', '--max_steps=3', '--device=cpu')
    run = load('out/deepmlf_toy-steps3')
    knobs = run.run.result['about']['knobs']
    assert not os.path.isabs(run.run.facts['folder']) and not os.path.isabs(knobs['lm'])
    score, mae = run.predict(text='well the film was awful')['score'], run.evaluate()['mae']
    program = PROGRAM.format(here=str(HERE), run=str(trained / 'out' / 'deepmlf_toy-steps3'))
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=other, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = dict(line.split() for line in done.stdout.splitlines() if line.startswith(('score', 'mae')))
    assert float(numbers['score']) == pytest.approx(score, abs=1e-5)
    assert float(numbers['mae']) == pytest.approx(mae, abs=1e-5)
    monkeypatch.chdir(other)
    command('eval.py', trained / 'out' / 'deepmlf_toy-steps3')
    # the report's rows of prerequisites are found too
    assert 'audio+video only ' in (trained / 'out' / 'deepmlf_toy-steps3' / 'report.md').read_text()


def test_a_relative_name_starts_where_the_run_was_trained(tmp_path, monkeypatch):
    here, there = tmp_path / 'here', tmp_path / 'there'
    for place in (here / 'data' / 'toy', there / 'data' / 'toy', there / 'out' / 'run'):
        place.mkdir(parents=True)
    monkeypatch.chdir(here)
    run = str(there / 'out' / 'run')
    assert find_folder('data/toy', run, 'out/run') == str(there / 'data' / 'toy')
    assert find_folder('data/toy', run, 'other/run') == 'data/toy'
    assert find_folder('data/toy', run, str(tmp_path)) == 'data/toy'
    assert find_folder('data/toy', run, '') == 'data/toy'
    assert find_folder('notebooks') == str(HERE / 'notebooks')
    assert find_folder('gpt2', run, 'out/run') == 'gpt2'
    assert find_folder('', run, 'out/run') == ''
    monkeypatch.chdir(there)
    assert find_folder('data/toy', run, 'out/run') == 'data/toy'


# --------------------------------------------------------------------------------------------------
# Bad input


AUDIO, VISION = np.zeros((4, 12)), np.zeros((3, 16))


@pytest.mark.parametrize(
    'given, sentence',
    [
        (dict(), 'there is no clip to predict: give text='),
        (dict(text=''), 'the clip has none of the modalities that this run reads'),
        (dict(text=3), 'the text of the clip is no string: give one string'),
        (dict(text=b'x'), 'the text of the clip is no string'),
        (dict(text=['a', None], audio=[AUDIO, 3]), 'audio of clip 1 has shape'),
        (dict(text=['a', None]), 'clip 1 has neither text, nor audio, nor vision'),
        (dict(text=[]), r'different numbers of clips or none \(text 0\)'),
        (dict(text=['a', 'b'], audio=[AUDIO]), r'numbers of clips or none \(text 2 and audio 1\)'),
        (dict(text='a', audio=[AUDIO]), 'text is that of one clip and audio is a list of clips'),
        (dict(text=['a'], audio=AUDIO), 'audio is that of one clip and text is a list of clips'),
        (dict(audio=np.zeros((5, 33))), r'audio of the clip has shape \[5, 33\] \(librosa\), but'),
        (dict(text=['a'], audio=[VISION]), r'audio of clip 0 has shape \[3, 16\]'),
        (dict(vision=np.zeros(16)), r'vision of the clip has shape \[16\]: give \[frames, 16\]'),
        (dict(vision=np.zeros((1, 1, 1, 16))), r'vision of clip 0 has shape \[1, 1, 16\]'),
        (dict(audio=[[0.0] * 12, [0.0] * 11]), 'audio of the clip is no array of numbers'),
        (dict(audio='a.npy'), 'audio of the clip is no array of numbers'),
        (dict(audio=AUDIO * np.nan), 'audio of the clip has 48 values that are NaN or inf: replace'),
        (dict(text=['a', 'b'], audio=[AUDIO, AUDIO + 1e300]), 'audio of clip 1 has 48 values'),
    ],
)
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_a_wrong_clip_raises_a_sentence(given, sentence, deepmlf):
    with pytest.raises(ClipError, match=sentence) as raised:
        deepmlf.predict(**given)
    assert isinstance(raised.value, ValueError) and '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'clip, sentence',
    [
        ('i loved it', 'explain takes one clip as dict.*this is a str'),
        (dict(text=['a', 'b']), 'explain takes one clip, and this is a list of clips'),
        (dict(text='a', smell=VISION), 'may hold only text'),
        (dict(), 'there is no clip'),
    ],
)
def test_a_wrong_clip_to_explain_raises_a_sentence(clip, sentence, deepmlf):
    with pytest.raises(ClipError, match=sentence):
        deepmlf.explain(clip)


def test_a_folder_that_is_no_run_or_an_lm_raises_a_sentence(curriculum, tmp_path):
    with pytest.raises(EvalError, match='there is no folder'):
        load(tmp_path / 'nothing')
    with pytest.raises(EvalError, match='is a language model, which predicts no score'):
        load(curriculum / 'lm_toy', data_dir=tmp_path)


# --------------------------------------------------------------------------------------------------
# The documents


def test_the_python_of_the_documents_runs(curriculum, tmp_path, monkeypatch, capsys):
    page = (HERE / 'docs' / 'tools.md').read_text(encoding='utf-8')
    code = re.search(r'^## A run in Python$.*?^```python\n(.*?)^```', page, re.M | re.S)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    shutil.copytree(curriculum / 'whole', tmp_path / 'out' / 'deepmlf_toy')
    monkeypatch.setattr('eval.ROOT', str(tmp_path))  # where data_dir is by default
    names = dict(audio=AUDIO, vision=VISION)
    exec(code, names)
    printed = capsys.readouterr().out
    assert f"{names['run'].evaluate()['mae']}\n" in printed and "'layer 2': (8, " in printed
