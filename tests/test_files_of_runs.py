"""
Damaged files of a run, full disks, and knobs of a model that would fill the memory.

    python -m pytest -q tests/test_files_of_runs.py
"""

import errno
import json
import os
import shutil
import stat
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
from configurator import AtLeast
from data import CorpusError, open_corpus
from fakes import TINY, command, deepmlf, files_of_at_most, forge, tiny_bert, train
from run import json_files
from run.average import WeightAverage
from run.errors import ModelError
from run.finished import EvalError
from run.folder import (
    load_checkpoint,
    lock,
    remove_leftovers,
    replacing,
    save_checkpoint,
    save_hugging_face,
    write_tensors,
)
from run.frozen_text import frozen_text
from run.json_files import NUMBER, Each, Maybe, check_form, parsed, parsed_lines, read_json, text_of
from run.record import refuse_other_moments
from run.size_limit import FACTOR, SLACK, size_limit
from tools.figures import clip_number


@pytest.fixture
def copied(curriculum, tmp_path, monkeypatch):
    """ A copy of a run folder, in another folder than the current one. """
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    shutil.copytree(curriculum / 'whole', tmp_path / 'run')
    return tmp_path / 'run'


# --------------------------------------------------------------------------------------------------
# The reader


@pytest.mark.parametrize(
    'content, phrase',
    [
        (b'', 'is empty'),
        (b'{"step": 1', 'is no JSON text'),
        (b'\xef\xbb\xbf{}', 'is no JSON text'),
        (b'{"a": "\xff"}', 'is not UTF-8 text'),
        (b'[' * 100_000, 'nested'),
        (b'[1]', 'has the wrong entry'),
        (b'{"a": "\\ud800"}', 'no valid Unicode'),
        (b'{"a": 1' + b'0' * 5000 + b'}', 'thousands of digits'),
        (b'{"a": 1' + b'0' * 30 + b'}', 'too large'),
    ],
)
def test_a_damaged_json_file_is_described(content, phrase, tmp_path):
    (tmp_path / 'x.json').write_bytes(content)
    with pytest.raises(ValueError, match=phrase):
        read_json(tmp_path / 'x.json')


@pytest.mark.parametrize('name', ['meta.json', 'result.json'])
def test_a_json_file_of_a_gigabyte_is_not_read(name, corpora, copied):
    """It is sparse, so it needs no place on the disk."""
    most = 'has more than 67,108,864 bytes'
    folder = copied
    if name == 'meta.json':
        folder = shutil.copytree(corpora / 'toy', copied.parent / 'toy')
    os.truncate(folder / name, 2**30)
    if name == 'meta.json':
        with pytest.raises(CorpusError, match=most):
            open_corpus(str(folder), '')
    else:
        with pytest.raises(SystemExit, match=f'result.json is damaged .{most}.: restore a copy'):
            command('eval.py', folder)


def test_lines_are_read_from_a_file_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, 'LARGEST_FILE', 20)
    (tmp_path / 'x.jsonl').write_text('{"a": 1}\n' * 9)
    assert parsed_lines(text_of(tmp_path / 'x.jsonl')) == [dict(a=1)] * 9
    with pytest.raises(ValueError, match='has more than 20 bytes'):
        read_json(tmp_path / 'x.jsonl')


@pytest.mark.parametrize(
    'value, form, wrong',
    [
        (dict(step=1), dict(step=AtLeast(0)), dict(step=-1)),
        (dict(step=1), dict(step=AtLeast(0)), dict(step='1')),
        (dict(step=1), dict(step=int), dict(step=True)),
        (dict(step=1), dict(step=int), {}),
        (dict(best=None), dict(best=Maybe(NUMBER)), dict(best='x')),
        ({}, dict(best=Maybe(NUMBER)), dict(best=[])),
        (dict(a=[0.5, 1]), Each([NUMBER]), dict(a=[0.5, None])),
    ],
)
def test_a_form_takes_its_values_and_refuses_others(value, form, wrong):
    check_form(value, form)
    with pytest.raises(ValueError):
        check_form(wrong, form)


def test_nan_is_a_number_of_a_json_file():
    assert np.isnan(parsed('{"corr": NaN}', Each(NUMBER))['corr'])


@pytest.mark.parametrize(
    'file, line',
    [
        ('log.jsonl', '{"step": 3, "epoch": 1, "train": {"loss": "x"}, "gates": null}'),
        ('log.jsonl', '{"step": 3, "epoch": 1, "train": {"loss": 1.0}, "gates": {"2": 0.5}}'),
        ('log.jsonl', 'null'),
        ('test.jsonl', '{"id": "a", "pred": [1], "label": 0}'),
        ('test.jsonl', '{"id": 3, "pred": 1, "label": 0}'),
        ('test.jsonl', ''),
    ],
)
def test_figures_name_the_damaged_line_of_a_run(file, line, copied):
    path = copied / file
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_text('\n'.join(lines) + '\n')
    with pytest.raises(SystemExit, match=f'{file} is missing or damaged .line 2 '):
        command('tools/figures.py', copied)


@pytest.mark.parametrize('command_line', [['eval.py', '--modalities=text'], ['eval.py', 'copied']])
def test_a_changed_score_is_refused(command_line, copied):
    """A reader of a run's table must not take a number that a bad disk or an editor has changed."""
    path = copied / 'result.json'
    result = json.loads(path.read_text())
    result['test']['mae'] += 0.25
    path.write_text(json.dumps(result))
    script, *flags = [copied if a == 'copied' else a for a in command_line]
    with pytest.raises(SystemExit, match='result.json is damaged .was changed after it was written'):
        command(script, copied, *flags)


def test_a_damaged_result_is_written_again_by_the_advice_on_it(copied, corpora, curriculum):
    path = copied / 'result.json'
    before = json.loads(path.read_text())['test']
    path.write_text('{')
    with pytest.raises(SystemExit, match='remove the file and continue with python train.py ..'):
        command('eval.py', copied)
    path.unlink()
    train(*deepmlf(corpora, curriculum, 'whole', f'--out_dir={copied}', '--resume=True'))
    assert json.loads(path.read_text())['test'] == before
    command('eval.py', copied)
    forge(copied, corpus={})
    with pytest.raises(SystemExit, match='best.safetensors is damaged.*--fresh=True'):
        command('eval.py', copied)


def test_a_result_of_deeply_nested_lists_is_refused(copied):
    path = copied / 'result.json'
    result = json.loads(path.read_text()) | dict(smell=json.loads('[' * 600 + ']' * 600))
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match='result.json is damaged'):
        command('eval.py', copied)


def test_a_changed_prediction_is_refused_and_eval_writes_it_again(copied):
    path = copied / 'test.jsonl'
    written = path.read_text()
    first, rest = written.split('\n', 1)
    path.write_text(json.dumps(json.loads(first) | dict(pred=2.5)) + '\n' + rest)
    with pytest.raises(EvalError, match='test.jsonl is missing or damaged .was changed'):
        evaluation.compare([str(copied)])
    command('eval.py', copied)
    assert path.read_text() == written
    assert '(n=1)' in evaluation.compare([str(copied)])


def test_a_changed_loss_of_a_curve_is_refused_also_after_an_evaluation(copied):
    command('eval.py', copied)
    path = copied / 'log.jsonl'
    first, rest = path.read_text().split('\n', 1)
    line = json.loads(first)
    line['train']['loss'] += 0.25
    path.write_text(json.dumps(line) + '\n' + rest)
    with pytest.raises(SystemExit, match='log.jsonl is missing or damaged .was changed'):
        command('tools/figures.py', copied)


def test_a_result_without_checksums_is_read(copied):
    """That of an older version."""
    path = copied / 'result.json'
    result = json.loads(path.read_text())
    assert result.pop('files').keys() == {'test.jsonl', 'log.jsonl'} and result.pop('checksum')
    path.write_text(json.dumps(result))
    assert '(n=1)' in evaluation.compare([str(copied)])


@pytest.mark.parametrize('content', ['{}', '[]', '', '{"title": "x", "rows": [{"label": 1}]}'])
def test_figures_refuse_a_damaged_sweep(content, tmp_path):
    (tmp_path / 'sweep.json').write_text(content)
    with pytest.raises(SystemExit, match='sweep.json is damaged'):
        command('tools/figures.py', tmp_path / 'sweep.json')


def test_a_resumed_run_drops_damaged_lines_of_its_log(corpora, curriculum, copied):
    log, whole = copied / 'log.jsonl', (copied / 'log.jsonl').read_text()
    log.write_text(whole + '{"step": 11, "epo\nnull\n{"step": "x"}\n')
    (copied / 'report.md').unlink()
    train(*deepmlf(corpora, curriculum, 'whole', f'--out_dir={copied}', '--resume=True'))
    assert log.read_text() == whole


@pytest.mark.parametrize('knob', ['head_width', 'av_width'])
def test_knobs_of_a_model_far_larger_than_its_checkpoint_are_refused(knob, copied):
    forge(copied, {knob: 60_000_000})
    with pytest.raises(SystemExit, match='many times larger than its checkpoint'):
        command('eval.py', copied)


# --------------------------------------------------------------------------------------------------
# Checkpoints from which a run is resumed


def resume_changed(corpora, curriculum, tmp_path, change):
    """
    Resume a copy of the run av_toy whose `last` checkpoint is of step 5 and was changed by
    change(tensors, info). Its checksum is right.
    """
    shutil.copytree(curriculum / 'av_toy', tmp_path / 'run')
    for file in ('result.json', 'report.md'):
        (tmp_path / 'run' / file).unlink()
    path = str(tmp_path / 'run' / 'last.safetensors')
    tensors, info = load_checkpoint(path)
    info['state'] |= dict(step=5, done=False)
    change(tensors, info)
    save_checkpoint(path, tensors, info)
    train('config/av_toy.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', *TINY, '--resume=True')


@pytest.mark.parametrize('step', [-5, 12, 2**62])
def test_a_checkpoint_of_a_step_that_the_run_does_not_have_is_refused(
    step, corpora, curriculum, tmp_path
):
    """The step of a run that is finished, 11, is one that it has."""
    with pytest.raises(SystemExit, match=f'damaged .it is of step {step}, and the run has 11.:'):
        resume_changed(corpora, curriculum, tmp_path, lambda t, info: info['state'].update(step=step))


def test_moments_of_another_shape_than_their_weights_are_refused(corpora, curriculum, tmp_path):
    """Fused AdamW would read and write the memory behind them."""

    def shrink(tensors, info):
        for name in tensors:
            if name.endswith('.exp_avg'):
                tensors[name] = torch.zeros(1)

    wrong = r'it has a torch.float32 \[1\] and not a torch.float32 \[30\] as .*bias.exp_avg.*--fresh=True'
    with pytest.raises(SystemExit, match=wrong):
        resume_changed(corpora, curriculum, tmp_path, shrink)


AVERAGE, STEP, MOMENT, SQUARE = 'average.w', *(f'optimizer.w.{k}' for k in ('step', 'exp_avg', 'exp_avg_sq'))


@pytest.mark.parametrize(
    'change, wrong',
    [
        (dict(), ''),
        ({STEP: torch.tensor(0.0)}, ''),
        ({MOMENT: None}, 'lacks .*exp_avg'),
        ({STEP: None}, 'lacks .*step'),
        ({AVERAGE: None}, 'lacks .average.w'),
        ({SQUARE: torch.zeros(6)}, r'float32 \[6\] and not a torch.float32 \[2, 3\] as .*exp_avg_sq'),
        ({AVERAGE: torch.zeros(3, 2)}, r'\[3, 2\] and not a torch.float32 \[2, 3\] as .average.w'),
        ({MOMENT: torch.zeros(2, 3).double()}, 'float64 .* and not a torch.float32'),
        ({SQUARE: torch.zeros(2, 3).long()}, 'int64 .* and not a torch.float32'),
        ({STEP: torch.zeros(3)}, r'float32 \[3\] and not a torch.float32 \[\]'),
        ({STEP: torch.tensor(3)}, 'int64'),
        ({STEP: torch.tensor(-1.0)}, 'has -1.0 as .*step'),
        ({STEP: torch.tensor(float('nan'))}, 'has nan as'),
        ({STEP: torch.tensor(float('inf'))}, 'has inf as'),
        ({'optimizer.v.step': torch.tensor(1.0)}, 'should not have .optimizer.v.step'),
        ({'other\n': torch.tensor(1.0)}, r'should not have .other\\n'),
    ],
)
def test_only_the_tensors_of_this_runs_optimizer_and_average_are_loaded(change, wrong):
    """They are those that AdamW and WeightAverage have after a step."""
    w = torch.nn.Parameter(torch.ones(2, 3))
    optimizer, average = torch.optim.AdamW([w], fused=True), WeightAverage(dict(w=w), 5)
    w.grad = torch.ones(2, 3)
    optimizer.step()
    saved = {f'optimizer.w.{k}': v for k, v in optimizer.state[w].items()}
    saved |= {AVERAGE: average.mean['w'], 'model.w': w} | change
    saved = {k: v for k, v in saved.items() if v is not None}
    with pytest.raises(ModelError, match=f'^last is damaged .*{wrong}') if wrong else nullcontext():
        refuse_other_moments('last', saved, dict(w=w), average)


@pytest.mark.parametrize('change', [dict(dtype='save'), dict(command=5), dict(lm_answer='x')])
def test_a_checkpoint_with_a_wrong_entry_is_refused_on_resume(change, corpora, curriculum, tmp_path):
    with pytest.raises(SystemExit, match='the checkpoint in .* is damaged'):
        resume_changed(corpora, curriculum, tmp_path, lambda t, info: info['about'].update(change))


def test_a_header_of_deeply_nested_lists_is_refused_on_resume(corpora, curriculum, tmp_path):
    (tmp_path / 'run').mkdir()
    path = tmp_path / 'run' / 'last.safetensors'
    write_tensors(path, {}, dict(info='[' * 200_000))
    run = ['config/av_toy.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', *TINY]
    with pytest.raises(SystemExit, match='last.safetensors is damaged .*too many nested lists.*restore'):
        train(*run, '--resume=True')


# --------------------------------------------------------------------------------------------------
# Disks


def test_a_checkpoint_is_written_through_one_temporary_file(tmp_path, monkeypatch):
    """So a killed run leaves nothing that remove_leftovers does not find."""
    seen = []
    monkeypatch.setattr(os, 'fsync', lambda file: seen.append(os.listdir(tmp_path)))
    save_checkpoint(str(tmp_path / 'last.safetensors'), dict(a=torch.zeros(3)), {})
    ((name,),) = seen
    assert name.startswith('last.safetensors.') and name.endswith('.new')
    (tmp_path / name).touch()
    (tmp_path / '.tmpAbC123').touch()   # of the safetensors package, which wrote former checkpoints
    (tmp_path / '.template').touch()
    remove_leftovers(tmp_path)
    names = ['.template', 'last.json', 'last.safetensors']
    assert sorted(os.listdir(tmp_path)) == names


def test_a_written_checkpoint_is_read_by_the_safetensors_package(tmp_path):
    tensors = {
        'scalar': torch.tensor(3.0),
        'empty': torch.zeros(0, 4),
        'flags': torch.tensor([True, False, True]),
        'half': torch.randn(3, 5).bfloat16(),
        'numbers': torch.arange(7),
        'transposed': torch.randn(4, 3).t(),
        'of a "name"\n': torch.zeros(1, dtype=torch.uint8),
    }
    path = str(tmp_path / 'a.safetensors')
    save_checkpoint(path, tensors, dict(step=3))
    read, info = load_checkpoint(path)
    assert info == dict(step=3)
    for found in (read, load_file(path)):
        assert found.keys() == tensors.keys()
        for name, v in tensors.items():
            assert found[name].dtype == v.dtype and torch.equal(found[name], v), name
    with pytest.raises(ModelError, match='could not save .*: .x. is of torch.complex64'):
        save_checkpoint(path, dict(x=torch.zeros(1, dtype=torch.complex64)), {})


@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o007, 0o660)])
def test_checkpoints_and_the_weights_of_an_lm_have_the_usual_mode(umask, mode, tmp_path):
    """As all files of a run, so that those who may read the folder can read the run."""
    before = os.umask(umask)
    try:
        save_checkpoint(str(tmp_path / 'last.safetensors'), dict(a=torch.zeros(3)), {})
        (tmp_path / 'hf').mkdir()
        (tmp_path / 'hf' / '.tmpAbC123').touch()
        save_hugging_face(tiny_bert(), str(tmp_path / 'hf'))
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    names = {'last.safetensors', 'last.json', 'model.safetensors', 'config.json'}
    assert {p.name for p in files} == names
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {mode}


def test_an_lm_on_a_full_disk_is_an_error_of_the_disk(tmp_path):
    """That of the safetensors package is no OSError."""
    with pytest.raises(OSError, match='File too large'), files_of_at_most(5000):
        save_hugging_face(tiny_bert(), str(tmp_path / 'hf'))
    assert not list((tmp_path / 'hf').glob('.tmp*'))


@pytest.mark.parametrize('error, free', [(errno.EAGAIN, False), (errno.ENOSYS, True)])
def test_a_file_system_without_locks_blocks_no_run(error, free, tmp_path, monkeypatch):
    def lockf(file, kind):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr('run.folder.fcntl.lockf', lockf)
    assert (lock(str(tmp_path)) is not None) == free


def test_the_size_of_an_lm_is_that_of_the_files_that_links_name(tmp_path):
    """ A snapshot of the hub's cache has only links. """
    (tmp_path / 'snapshot').mkdir()
    (tmp_path / 'blob').write_bytes(bytes(3_000_000))
    os.symlink(tmp_path / 'blob', tmp_path / 'snapshot' / 'model.safetensors')
    limit = size_limit('run', {}, str(tmp_path / 'snapshot'), None)
    assert limit.left == SLACK + FACTOR * 3_000_000


def test_an_incomplete_checkpoint_is_removed(tmp_path):
    path = tmp_path / 'last.safetensors'
    save_checkpoint(str(path), dict(a=torch.zeros(3)), {})
    whole = path.read_bytes()
    with pytest.raises(ModelError, match='could not save .*File too large.: free disk space. A checkpoint'):
        with files_of_at_most(3000):
            save_checkpoint(str(path), dict(a=torch.zeros(3000)), {})
    assert path.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ['last.json', 'last.safetensors']


def test_a_full_disk_does_not_lose_the_scores(copied, capsys):
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    with pytest.raises(SystemExit, match='the scores above are not saved'), files_of_at_most(3000):
        command('eval.py', copied)
    assert '| deepmlf_toy ' in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_a_full_disk_does_not_lose_the_prediction_of_a_clip(copied, capsys):
    with pytest.raises(SystemExit, match='run.png cannot be read or written|text.png cannot be'):
        with files_of_at_most(3000):
            command('eval.py', copied, '--text=i loved it')
    assert 'without text' in capsys.readouterr().out
    assert not list(copied.parent.rglob('*.new'))


def test_an_error_of_writing_names_the_file(tmp_path):
    with pytest.raises(OSError) as error, replacing(tmp_path / 'a'):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert error.value.filename == str(tmp_path / 'a') and not list(tmp_path.iterdir())


def test_features_of_texts_on_a_full_disk_leave_no_file(tmp_path):
    tiny_bert().save_pretrained(tmp_path / 'lm')
    tokens = [[2, 9, 3]] * 40
    with pytest.raises(OSError), files_of_at_most(3000):
        frozen_text(str(tmp_path / 'lm'), tokens, str(tmp_path / 'features'))
    assert not list((tmp_path / 'features').iterdir())


@pytest.mark.parametrize('damage', ['cut', 'no json', 'other shape'])
def test_damaged_features_of_texts_are_computed_again(damage, tmp_path):
    tiny_bert().save_pretrained(tmp_path / 'lm')
    tokens = [[2, 9, 3], [2, 3]]
    whole, name = frozen_text(str(tmp_path / 'lm'), tokens, str(tmp_path / 'features'))
    whole = np.array(whole)
    (path,) = (tmp_path / 'features').glob('*.npy')
    if damage == 'cut':
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == 'no json':
        path.with_suffix('.json').write_text('{')
    else:
        np.save(path, np.zeros((3, 32), np.float16))
    again, same_name = frozen_text(str(tmp_path / 'lm'), tokens, str(tmp_path / 'features'))
    assert np.array_equal(whole, again) and name == same_name


def test_an_export_without_its_lm_is_refused_before_the_hub_is_asked(copied):
    command('eval.py', copied, f'--export={copied.parent}/export')
    shutil.rmtree(copied.parent / 'export' / 'lm')
    with pytest.raises(SystemExit, match='folder lm, which is missing'):
        command('eval.py', copied.parent / 'export', '--text=fine')


def test_an_exported_baseline_on_frozen_text_is_evaluated(corpora, curriculum, tmp_path):
    """ From another folder than that of the training, and of the export. """
    run = ['config/baseline_tfn.py', '--dataset=toy', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run']
    train(*run, '--max_steps=2', '--device=cpu', '--text_features=frozen', f'--lm={curriculum}/lm_toy')
    command('eval.py', tmp_path / 'run', f'--export={tmp_path}/export')
    before = json.loads((tmp_path / 'export' / 'result.json').read_text())['test']
    evaluation.evaluate_again(str(tmp_path / 'export'), data_dir=str(corpora))
    assert json.loads((tmp_path / 'export' / 'result.json').read_text())['test'] == before


def test_the_size_of_new_tensors_is_bounded():
    limit = evaluation.size_limit('the run', {}, '', None)
    with pytest.raises(evaluation.EvalError, match='many times larger'), limit:
        torch.nn.Linear(10**6, 10**6)


def test_an_unknown_clip_is_refused_where_the_split_has_one_clip():
    feed = SimpleNamespace(corpus=SimpleNamespace(id=lambda split: ['only'], name='toy'))
    with pytest.raises(EvalError, match='give one of its ids, such as --clip=only'):
        clip_number(feed, 'other')
