"""
Security of received run folders: loading a run that somebody else made runs none of their code,
reads nothing outside the folder except the LM, the corpus folder and the prerequisite runs that it names, and writes
nothing outside it.

    python -m pytest -q tests/test_security.py
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Literal, get_origin

import pytest
import torch

import eval as evaluation
from configurator import known_knobs
from fakes import HERE, TINY, alarm, command, deepmlf, forge, train
from model import SYSTEMS
from run import lm_checks
from run.errors import ModelError
from run.folder import load_checkpoint, replacing, save_checkpoint
from run.json_files import sealed
from run.load_lm import lm_config

# Why it is harmless that a stranger's folder sets a knob. Numbers, switches and lists of numbers
# only change the model's arithmetic, and the checkpoint's weights must fit it. Choices from a list
# are checked against the list. Every other knob is here: reason -> knobs.
WHY_HARMLESS = {
    "a path, which is not read or replaced by the reader's own": 'data_dir corpus dataset needs',
    "a path, of which only the end is compared with the folder's own path": 'out_dir',
    "names another run, whose result.json is read as data if it is on the same corpus": 'av_from',
    "names an LM, which is read as data and must have the checkpoint's fingerprint": 'lm',
    "a permission, which only the command line can give": 'trust_remote_code',
    "a name in SYSTEMS, of a label of the corpus, or of a metric; others are "
    "refused": 'system label select',
    "a text that the tokenizer reads": 'prompt_start prompt',
}


def test_every_knob_is_harmless_in_a_strangers_folder_for_a_known_reason():
    reasons = [knob for names in WHY_HARMLESS.values() for knob in names.split()]
    assert len(reasons) == len(set(reasons))
    for cls in SYSTEMS.values():
        known, allowed = known_knobs(
            HERE / 'train.py', SYSTEMS, next(n for n, c in SYSTEMS.items() if c is cls)
        )
        for knob, default in known.items():
            values = default if type(default) is list else [default]
            arithmetic = (
                all(type(v) in (bool, int, float) for v in values) and knob != 'trust_remote_code'
            )
            choice = get_origin(allowed.get(knob)) is Literal
            assert (arithmetic and values) or choice or knob in reasons, knob


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """ --clip writes its pictures into out/clips of the current folder. """
    monkeypatch.chdir(tmp_path_factory.mktemp('elsewhere'))


@pytest.fixture
def received(curriculum, tmp_path):
    """An exported run, and a clip file beside it."""
    command('eval.py', curriculum / 'whole', f'--export={tmp_path}/received')
    clip = dict(text='the film was superb', audio=[[0.1] * 12] * 9, vision=[[0.2] * 16] * 7)
    (tmp_path / 'clip.jsonl').write_text(json.dumps(clip))
    return tmp_path / 'received'


@pytest.fixture
def copied(curriculum, tmp_path):
    """A copy of a run folder whose corpus and LM exist where it names them."""
    shutil.copytree(curriculum / 'whole', tmp_path / 'copied')
    return tmp_path / 'copied'


def no_longer_than(seconds):
    """Fails if the block takes longer, for example because it waits for a FIFO."""
    return alarm(seconds, AssertionError(f"still waiting after {seconds} s"))


# --------------------------------------------------------------------------------------------------
# Code


def plant_code(folder, where):
    """
    Put Python code into an LM's folder, and an auto_map into its JSON file `where` that loads it.
    If the code runs, it writes a file, whose path is returned.
    """
    ran = folder.parent / 'ran.txt'
    code = f'open({str(ran)!r}, "w").write("yes")\n'
    code += 'from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast\n'
    code += 'class C(GPT2Config):\n    model_type = "strange"\n'
    code += 'class M(GPT2LMHeadModel):\n    config_class = C\n'
    code += 'class T(PreTrainedTokenizerFast):\n    pass\n'
    (folder / 'theirs.py').write_text(code)
    path = folder / where
    config = json.loads(path.read_text())
    if where == 'config.json':
        config['auto_map'] = dict(AutoConfig='theirs.C', AutoModelForCausalLM='theirs.M')
        config['model_type'] = 'strange'
    else:
        config['auto_map'] = dict(AutoTokenizer=[None, 'theirs.T'])
    path.write_text(json.dumps(config))
    return ran


@pytest.mark.parametrize('header', [True, False])
@pytest.mark.parametrize('where', ['config.json', 'tokenizer_config.json'])
@pytest.mark.parametrize('asks', [True, False])
def test_a_received_folder_runs_no_code(where, header, asks, received):
    """Whether or not it sets trust_remote_code, in result.json alone or in the checkpoint too."""
    ran = plant_code(received / 'lm', where)
    if asks:
        forge(received, dict(trust_remote_code=True), header)
    with pytest.raises(SystemExit) as stopped:
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')
    assert not ran.exists()
    assert '--trust_remote_code=True' in str(stopped.value) and 'code' in str(stopped.value)
    assert not list(received.parent.rglob('*.png')) and not os.path.exists('out')


@pytest.mark.parametrize(
    'argv',
    [
        ['eval.py'],
        ['eval.py', '--modalities=text'],
        ['tools/damage.py'],
        ['tools/figures.py'],
        ['eval.py', '--export=OUT'],
        ['eval.py', '--corpus=CORPUS'],
        ['eval.py', '--clip=CLIP'],
    ],
)
def test_no_command_runs_the_code_of_an_lm_that_a_folder_names(argv, copied, corpora, received):
    """The folder names the LM by an absolute path."""
    shutil.copytree(received / 'lm', copied.parent / 'other_lm')
    ran = plant_code(copied.parent / 'other_lm', 'config.json')
    forge(copied, dict(trust_remote_code=True, lm=str(copied.parent / 'other_lm')))
    places = dict(
        OUT=copied.parent / 'out', CORPUS=corpora / 'toy', CLIP=received.parent / 'clip.jsonl'
    )
    flags = []
    for flag in argv[1:]:
        name, _, value = flag.partition('=')
        flags.append(f'{name}={places.get(value, value)}')
    with pytest.raises(SystemExit, match='--trust_remote_code=True'):
        command(argv[0], copied, *flags)
    assert not ran.exists() and not places['OUT'].exists()


def test_the_flag_trust_remote_code_lets_the_lms_code_run(received):
    """The command may stop afterwards, because that LM is not the one of the checkpoint."""
    ran = plant_code(received / 'lm', 'config.json')
    forge(received, dict(trust_remote_code=True))
    try:
        command(
            'eval.py', received, f'--clip={received.parent}/clip.jsonl', '--trust_remote_code=True'
        )
    except SystemExit:
        pass
    assert ran.exists()


def test_pickled_weights_of_an_lm_are_not_read(received):
    """The LM of a received folder is read from safetensors only."""
    from safetensors.torch import load_file

    torch.save(
        load_file(received / 'lm' / 'model.safetensors'), received / 'lm' / 'pytorch_model.bin'
    )
    (received / 'lm' / 'model.safetensors').unlink()
    with pytest.raises(SystemExit, match='safetensors'):
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')


# --------------------------------------------------------------------------------------------------
# Paths


def tree(folder):
    """{path: bytes} of all files in a folder tree."""
    return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_a_folder_cannot_choose_where_files_are_written(copied, monkeypatch):
    """Its data_dir, out_dir, corpus, needs and dataset are ignored; only its own files change."""
    outside = copied.parent / 'outside'
    outside.mkdir()
    places = dict(
        data_dir=str(outside),
        out_dir=str(outside),
        corpus=str(outside / 'x.pkl'),
        dataset='x',
        needs=[str(outside / 'x.py')],
        resume=False,
        fresh=True,
    )
    forge(copied, places)
    before = json.loads((copied / 'result.json').read_text())['test']
    command('eval.py', copied)
    assert json.loads((copied / 'result.json').read_text())['test'] == before
    assert not list(outside.iterdir())


def test_features_of_a_frozen_text_model_go_to_the_readers_data_dir(
    corpora, curriculum, tmp_path, monkeypatch
):
    train(
        'config/baseline_tfn.py',
        '--dataset=toy',
        f'--data_dir={corpora}',
        f'--out_dir={tmp_path}/run',
        '--max_steps=2',
        '--device=cpu',
        '--text_features=frozen',
        f'--lm={curriculum}/lm_toy',
    )
    forge(tmp_path / 'run', dict(data_dir=str(tmp_path / 'theirs')))
    monkeypatch.chdir(tmp_path)
    command('eval.py', 'run', '--data_dir=mine')
    assert list((tmp_path / 'mine' / 'features').iterdir()) and not (tmp_path / 'theirs').exists()


def test_no_corpus_is_converted_for_a_received_folder(copied):
    """A folder that names a source file, or a folder without a corpus, is refused."""
    corpus = json.loads((copied / 'result.json').read_text())['about']['corpus']
    source = copied.parent / 'theirs.pkl'
    source.write_bytes(b'\x80\x04}.')
    for place in (str(source), 'toy', str(copied.parent)):
        forge(copied, corpus=corpus | dict(folder=place))
        with pytest.raises(SystemExit, match='is not here'):
            command('eval.py', copied)


def test_the_corpus_and_the_lm_that_a_folder_names_are_printed(copied, capsys):
    about = json.loads((copied / 'result.json').read_text())['about']
    command('eval.py', copied)
    printed = capsys.readouterr().out
    assert f"names the corpus folder {about['corpus']['folder']}, which is read" in printed
    assert f"names the LM {about['knobs']['lm']}, which is read as data" in printed


def test_another_corpus_another_lm_and_another_tokenizer_are_refused(copied, received):
    corpus = json.loads((copied / 'result.json').read_text())['about']['corpus']
    forge(copied, corpus=corpus | dict(sha256='0' * 64))
    with pytest.raises(SystemExit, match='another source file'):
        command('eval.py', copied)
    clip = f'--clip={received.parent}/clip.jsonl'
    path = received / 'lm' / 'tokenizer.json'
    tokenizer = json.loads(path.read_text())
    pieces = tokenizer['model']['vocab']
    pieces[5][0], pieces[6][0] = pieces[6][0], pieces[5][0]
    whole = path.read_bytes()
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit, match='the tokenizer of the LM .* differs from the one'):
        command('eval.py', received, clip)
    path.write_bytes(whole)
    forge(received, lm_fingerprint='f' * 16)
    with pytest.raises(SystemExit, match='the LM .* has other weights than the one'):
        command('eval.py', received, clip)


# --------------------------------------------------------------------------------------------------
# Links and special files


def test_nothing_is_written_through_a_link(copied, received):
    """Each file that a command writes, and its name with .new, is a link to a file outside."""
    victim = copied.parent / 'victim.txt'
    names = ['report.md', 'report.html', 'result.json', 'test.jsonl', 'curve.png', 'confusion.png']
    names.append('best.json')
    for name in [n + '.new' for n in names] + [
        'report.md',
        'report.html',
        'test.jsonl',
        'curve.png',
        'confusion.png',
    ]:
        victim.write_text('precious')
        path = copied / name
        if path.exists():
            path.unlink()
        path.symlink_to(victim)
        command('eval.py', copied)
        assert victim.read_text() == 'precious', name
        assert name.endswith(('.new', '.png')) or not path.is_symlink()


@pytest.mark.parametrize('script', ['eval.py', 'tools/figures.py'])
def test_no_file_is_written_into_a_folder_behind_a_link(script, copied, received, tmp_path):
    outside = tmp_path / 'outside'
    outside.mkdir()
    place, flags = copied / 'figures', []
    if script == 'eval.py':
        place, flags = Path('out/clips/copied'), [f'--clip={tmp_path}/clip.jsonl']
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)
    with pytest.raises(SystemExit, match=f'{place.name}.*is a link'):
        command(script, copied, *flags)
    assert not list(outside.iterdir())


def test_a_resumed_run_writes_nothing_through_a_link_named_lock(copied, corpora, curriculum):
    victim = copied.parent / 'victim.txt'
    victim.write_text('precious')
    (copied / '.lock').unlink()
    (copied / '.lock').symlink_to(victim)
    (copied / 'result.json').unlink()
    with pytest.raises(SystemExit, match='link'):
        train(*deepmlf(corpora, curriculum, 'whole', f'--out_dir={copied}', '--resume=True'))
    assert victim.read_text() == 'precious'


@pytest.mark.parametrize('name', ['result.json', 'best.safetensors', 'test.jsonl', 'log.jsonl'])
@pytest.mark.parametrize('kind', ['fifo', 'link', 'folder'])
def test_only_regular_files_of_a_run_are_read(name, kind, copied):
    path = copied / name
    shutil.move(path, copied.parent / name)
    if kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'link':
        path.symlink_to(copied.parent / name)
    else:
        path.mkdir()
    with no_longer_than(60), pytest.raises(SystemExit) as stopped:
        command('tools/figures.py', copied)
    assert name in str(stopped.value) and '\n' not in str(stopped.value)


def test_an_export_copies_only_regular_files(curriculum, tmp_path, capsys):
    """A link in the LM's folder is not followed, so a private file behind it is not published."""
    secret = tmp_path / 'secret.txt'
    secret.write_text('the password')
    shutil.copytree(curriculum / 'lm_toy', tmp_path / 'lm')
    shutil.copytree(curriculum / 'whole', tmp_path / 'run')
    forge(tmp_path / 'run', dict(lm=str(tmp_path / 'lm')))
    (tmp_path / 'lm' / 'hf' / 'notes.txt').symlink_to(secret)
    (tmp_path / 'lm' / 'hf' / 'more').symlink_to(tmp_path)
    with no_longer_than(60):
        try:
            command('eval.py', tmp_path / 'run', f'--export={tmp_path}/away')
        except SystemExit as e:
            assert 'notes.txt' in str(e) or 'more' in str(e)
    published = tree(tmp_path / 'away') if (tmp_path / 'away').exists() else {}
    assert not any(b'the password' in content for content in published.values())
    assert not any(p.is_symlink() for p in tmp_path.glob('away/**/*'))


def test_a_failed_export_leaves_nothing(copied, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(evaluation.export.__globals__['shutil'], 'copyfileobj', full)
    before = sorted(copied.parent.iterdir())
    with pytest.raises(SystemExit, match='No space left'):
        command('eval.py', copied, f'--export={copied.parent}/away')
    assert sorted(copied.parent.iterdir()) == before


def test_two_writers_of_one_file_write_different_temporary_files(tmp_path):
    """The file holds the text of the writer that ended last."""
    with replacing(tmp_path / 'a') as one, replacing(tmp_path / 'a') as two:
        assert one != two
        Path(one).write_text('one')
        Path(two).write_text('two')
    assert (tmp_path / 'a').read_text() == 'one'
    assert [p.name for p in tmp_path.iterdir()] == ['a']


# --------------------------------------------------------------------------------------------------
# Edited and damaged records, and scores that are NaN or inf


@pytest.mark.parametrize(
    'knob, value',
    [
        ('max_text_len', 3),
        ('standardise', False),
        ('modalities', ['audio']),
        ('mm_gate', 'none'),
        ('av_len', 2),
        ('mm_layers', [1, 2]),
        ('lora_alpha', 1.0),
        ('mm_query', 'text'),
        ('lowercase', 'never'),
        ('seed', 5),
        ('fusion_position', 'fixed'),
        ('lm_init', 'random'),
        ('shuffle_streams', True),
        ('n_fusion', 2),
    ],
)
def test_a_knob_that_was_edited_in_result_json_is_refused(knob, value, copied):
    """It differs from the checkpoint's header. Nothing is evaluated or written."""
    forge(copied, {knob: value}, header=False)
    before = tree(copied)
    for argv in (
        ['eval.py', copied],
        ['eval.py', copied, copied],
        ['tools/damage.py', copied],
        ['tools/figures.py', copied],
    ):
        with pytest.raises(SystemExit, match=f'{knob}='):
            command(*argv)
    assert tree(copied) == before


@pytest.mark.parametrize(
    'edit, sentence',
    [
        (lambda r: r['info'].update(range=[-1, 1]), 'info='),
        (lambda r: r['about'].update(lm_fingerprint='f' * 16), 'lm_fingerprint='),
        (lambda r: r['about'].update(dtype='bfloat16'), 'dtype='),
        (lambda r: r['about']['corpus'].update(sha256='0'), 'corpus sha256='),
        (
            lambda r: r['about']['corpus']['streams']['audio'].update(mean=[0.0] * 12),
            'corpus streams=',
        ),
        (lambda r: r['about']['knobs'].update(n_fusion='8'), 'n_fusion='),
        (lambda r: r.pop('about'), 'damaged'),
        (lambda r: r['about']['knobs'].update(smell=1), 'smell'),
    ],
)
def test_other_edits_of_result_json_are_refused(edit, sentence, copied):
    path = copied / 'result.json'
    result = json.loads(path.read_text())
    edit(result)
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=sentence):
        command('eval.py', copied)


@pytest.mark.parametrize(
    'knobs',
    [
        dict(n_fusion='eight'),
        dict(smell=1),
        dict(prompt=3),
        dict(mm_layers='8'),
        dict(system='x'),
        dict(mm_layers=[99]),
        dict(av_width=-4),
        dict(select='accuracy'),
        dict(seed=2**63),
        dict(train_fraction=0.0),
    ],
)
def test_knobs_of_wrong_types_or_values_stop_with_a_sentence(knobs, copied):
    forge(copied, knobs)
    with pytest.raises(SystemExit) as stopped:
        command('eval.py', copied)
    assert '\n' not in str(stopped.value).strip() and str(stopped.value).startswith('eval: ')


def test_result_json_may_have_other_values_of_run_knobs(corpora, curriculum):
    """
    A run may be resumed with another patience or log_interval, after its best checkpoint was saved.
    """
    train(*deepmlf(corpora, curriculum, 'patient'))
    path = curriculum / 'patient' / 'result.json'
    result = json.loads(path.read_text())
    result['about']['knobs'] |= dict(patience=7, log_interval=1)
    path.write_text(json.dumps(sealed(result)))
    command('eval.py', curriculum / 'patient')


@pytest.mark.parametrize('value', [3e38, -3e38])
def test_a_predicted_score_of_nan_or_inf_is_an_error(value, received):
    clip = dict(text='the film was superb', audio=[[value] * 12] * 9, vision=[[0.2] * 16] * 7)
    (received.parent / 'clip.jsonl').write_text(json.dumps(clip))
    with pytest.raises(SystemExit, match='is NaN or inf'):
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')


def test_a_checkpoint_with_nan_is_not_evaluated(copied):
    tensors, info = load_checkpoint(str(copied / 'best.safetensors'))
    tensors['task_head.2.bias'][:] = float('nan')
    save_checkpoint(str(copied / 'best.safetensors'), tensors, info)
    before = tree(copied)
    for argv in (
        ['eval.py', copied],
        ['eval.py', copied, '--modalities=text'],
        ['tools/damage.py', copied],
    ):
        with pytest.raises(SystemExit, match='NaN|nan'):
            command(*argv)
    assert tree(copied) == before


def test_nan_in_stored_predictions_is_an_error(copied):
    path = copied / 'test.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]['pred'] = float('nan')
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    other = copied.parent / 'other'
    shutil.copytree(copied, other)
    forge(other, dict(seed=1))
    for argv in (['eval.py', other, copied], ['tools/figures.py', copied]):
        with pytest.raises(
            SystemExit, match="pred of clip " + re.escape(rows[3]["id"]) + " is NaN or inf"
        ):
            command(*argv)


def test_an_encoder_behind_a_link_is_neither_read_nor_exported(corpora, tmp_path):
    """hf/ is a link to a folder with the right encoder and a private file."""
    train(
        'config/crosssent_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={tmp_path}/run',
        '--max_steps=2',
        '--batch_size=16',
        '--device=cpu',
    )
    (tmp_path / 'run' / 'hf').rename(tmp_path / 'private')
    (tmp_path / 'private' / 'secret.txt').write_text('the password')
    (tmp_path / 'run' / 'hf').symlink_to(tmp_path / 'private')
    for flags in ([], [f'--export={tmp_path}/away']):
        with pytest.raises(SystemExit, match='hf is a link'):
            command('eval.py', tmp_path / 'run', *flags)
    assert not (tmp_path / 'away').exists()


@pytest.mark.parametrize('kind', ['folder', 'files', 'fifo'])
def test_a_resumed_lm_writes_nothing_through_a_link(kind, corpora, curriculum, tmp_path):
    shutil.copytree(curriculum / 'lm_toy', tmp_path / 'run')
    (tmp_path / 'run' / 'result.json').unlink()
    outside, hf = tmp_path / 'outside', tmp_path / 'run' / 'hf'
    outside.mkdir()
    (outside / 'victim').write_text('precious')
    for path in sorted(hf.iterdir()):
        path.unlink()
        if kind == 'files':
            path.symlink_to(outside / 'victim')
        elif kind == 'fifo':
            os.mkfifo(path)
    if kind == 'folder':
        hf.rmdir()
        hf.symlink_to(outside)
    argv = [
        'config/lm_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={tmp_path}/run',
        *TINY,
        '--lm_vocab=60',
        '--resume=True',
    ]
    with no_longer_than(120):
        if kind == 'folder':
            with pytest.raises(SystemExit, match='is a link'):
                train(*argv)
        else:
            train(*argv)
            names = {p.name for p in hf.iterdir()}
            assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= names
            assert all(p.is_file() and not p.is_symlink() for p in hf.iterdir())
    assert tree(outside) == {outside / 'victim': b'precious'}


def test_links_to_blobs_in_the_hubs_cache_are_allowed(curriculum, tmp_path):
    """
    All files of a snapshot in the Hugging Face cache are links to its blobs, also those in a folder
    such as 1_Pooling of sentence-transformers. Other links are refused.
    """
    cache = tmp_path / 'models--a--b'
    snapshot = cache / 'snapshots' / 'abc'
    for folder in (cache / 'blobs', snapshot / '1_Pooling'):
        folder.mkdir(parents=True)
    for path in (curriculum / 'lm_toy' / 'hf').iterdir():
        shutil.copy(path, cache / 'blobs' / path.name)
        (snapshot / path.name).symlink_to(f'../../blobs/{path.name}')
    (cache / 'blobs' / 'pooling').write_text('{}')
    (snapshot / '1_Pooling' / 'config.json').symlink_to('../../../blobs/pooling')
    lm_config(str(snapshot), as_data=True)
    (tmp_path / 'outside').write_text('{}')
    (snapshot / '1_Pooling' / 'more.json').symlink_to(tmp_path / 'outside')
    with pytest.raises(ModelError, match='more.json is a link'):
        lm_config(str(snapshot), as_data=True)


@pytest.mark.parametrize('what', ['data_dir', 'dtype'])
def test_a_run_may_be_resumed_elsewhere_after_its_best_step(what, copied, corpora):
    """
    result.json then has another corpus folder or dtype than the best checkpoint. Its scores are the
    same.
    """
    path = copied / 'result.json'
    result = json.loads(path.read_text())
    if what == 'data_dir':
        shutil.copytree(corpora / 'toy', copied.parent / 'moved')
        result['about']['corpus']['folder'] = str(copied.parent / 'moved')
    else:
        result['about']['knobs']['dtype'] = result['about']['dtype'] = 'bfloat16'
    path.write_text(json.dumps(sealed(result)))
    command('eval.py', copied)
    assert json.loads(path.read_text())['test'] == result['test']


@pytest.mark.parametrize(
    'change',
    [
        lambda a: a.update(device=[]),
        lambda a: a.update(name=3),
        lambda a: a.update(name='\x1b]0;title\x07'),
        lambda a: a['corpus']['labels']['emotion'].update(names=['sad', '\x1b[2J']),
        lambda a: a['corpus']['labels']['label'].update(range=[-1e8, 1e8]),
        lambda a: a['corpus']['labels']['emotion'].update(names=[str(i) for i in range(2000)]),
        lambda a: a['corpus'].update(sha256=None),
        lambda a: a['corpus'].update(streams={}),
        lambda a: a['corpus'].update(widths=3),
        lambda a: a['corpus']['streams']['audio'].update(mean=['x'] * 12),
        lambda a: a['corpus']['streams']['audio'].update(std=[1.0]),
    ],
)
def test_header_entries_of_wrong_types_stop_with_a_sentence(change, copied, received):
    about = json.loads((copied / 'result.json').read_text())['about']
    change(about)
    forge(copied, **about)
    clip = f'--clip={received.parent}/clip.jsonl'
    for flags in ([], [clip], [f'--export={copied.parent}/away']):
        with pytest.raises(SystemExit) as stopped:
            command('eval.py', copied, *flags)
        assert str(stopped.value).startswith('eval: ') and 'damaged' in str(stopped.value)


@pytest.mark.parametrize(
    'key, value',
    [
        ('state', {}),
        ('clips', []),
        ('test', {}),
        ('valid', {}),
        ('test', None),
        ('majority', 3),
        ('ceilings', 'x'),
        ('ceilings', dict(late=3)),
        ('seconds', '1'),
        ('n_trainable', None),
    ],
)
def test_results_of_wrong_types_stop_with_a_sentence(key, value, copied, received):
    path = copied / 'result.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    clip = f'--clip={received.parent}/clip.jsonl'
    for flags in ([], [clip], [f'--export={copied.parent}/away']):
        with pytest.raises(SystemExit) as stopped:
            command('eval.py', copied, *flags)
        assert str(stopped.value).startswith('eval: ') and 'damaged' in str(stopped.value)


@pytest.mark.parametrize('knob', ['vocab_size', 'n_positions', 'n_inner', 'n_layer'])
def test_an_lm_that_is_much_larger_than_its_files_is_refused_before_it_is_made(knob, received):
    path = received / 'lm' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {knob: 10 ** 8}))
    sentence = 'many times larger than its weight files|and at most 10,000 are read'
    with no_longer_than(60), pytest.raises(SystemExit, match=sentence):
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')


@pytest.mark.parametrize('change', [dict(num_labels=10 ** 8), dict(n_layers=10 ** 8)])
def test_a_config_from_which_transformers_would_make_a_huge_list_is_refused(change, received):
    path = received / 'lm' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with no_longer_than(60), pytest.raises(SystemExit, match='and at most 10,000 are read'):
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')


@pytest.mark.parametrize('change', [
    dict(post_processor=dict(type='TemplateProcessing', single=[['<s>'] * 3000] * 2)),
    dict(normalizer=dict(type='Sequence', normalizers=[dict(type='Prepend', prepend='a' * 30_000)])),
])
def test_a_tokenizer_that_puts_long_texts_before_each_text_is_refused(change, received):
    path = received / 'lm' / 'tokenizer.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit, match='puts too much before or around each text'):
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')


def test_a_json_file_of_an_lm_is_read_up_to_a_size(received, monkeypatch):
    monkeypatch.setattr(lm_checks, 'LARGEST_JSON', 100)
    with pytest.raises(ModelError, match='is not readable as JSON .more than 100 bytes'):
        lm_checks.read_lm_json(received / 'lm' / 'config.json')


def test_a_tokenizer_whose_replacements_multiply_is_refused(received):
    path = received / 'lm' / 'tokenizer.json'
    twice = dict(type='Replace', pattern=dict(String='e'), content='ee')
    steps = dict(type='Sequence', normalizers=[twice] * 40)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(normalizer=steps)))
    with pytest.raises(SystemExit, match='could make a text more than 1000 times longer'):
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')


@pytest.mark.parametrize('knob, value', [('activation_function', 'relu'), ('scale_attn_weights', False)])
def test_an_lm_with_the_same_weights_and_another_configuration_is_refused(knob, value, received):
    """The fingerprint covers the weights alone, so the LM's outputs are compared too."""
    path = received / 'lm' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {knob: value}))
    with pytest.raises(SystemExit, match='its configuration was changed|scales attention'):
        command('eval.py', received, f'--clip={received.parent}/clip.jsonl')
    path.write_text(json.dumps(config))
    command('eval.py', received, f'--clip={received.parent}/clip.jsonl')
