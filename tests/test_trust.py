"""
Reliability: frozen weights do not change and trainable ones do; a killed run resumes bit for bit;
bad input stops with a sentence and leaves no partial files; and the commands of the docs run.

    python -m pytest -q tests/test_trust.py
"""

import ast
import hashlib
import json
import os
import pickle
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
from configurator import declared_knobs, run_knobs
from corpora.toy import make_toy
from fakes import (
    ENV,
    HERE,
    KNOBS,
    PARENT,
    TINY,
    Killed,
    deepmlf,
    fingerprint,
    forge,
    killed_in_batch,
    make_corpus,
    of_width,
    same_run,
    tiny_batch,
    tiny_deepmlf,
    tiny_lm,
    torchrun,
    train,
    with_value_at,
)
from lm import FrozenLM
from model import SYSTEMS, DeepMLF
from run import folder, machine, needs
from run.errors import ModelError
from run.folder import load_checkpoint
from soak import KINDS, LONG, SHORT, check, make_places
from tools.bench_model import text_model


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def read_result(folder):
    return json.loads((folder / 'result.json').read_text())


def six_frames(split, lengths):
    """For make_corpus: six frames in each clip."""
    return [6] * len(lengths)


def left_out(split, value):
    """For make_corpus: no such key."""
    return None


# --------------------------------------------------------------------------------------------------
# Frozen and trainable weights


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'knobs',
    [
        dict(),
        dict(mm_ffw='lora'),
        dict(mm_ffw='none'),
        dict(mm_gate='tanh'),
        dict(mm_gate='none'),
        dict(mm_query='text+fusion'),
        dict(mm_query='text'),
        dict(text_reg='seqaug'),
    ],
)
@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_training_changes_all_trainable_weights_and_no_bit_of_the_lm(family, knobs, dtype):
    """
    Predicts first, so that weights cached or merged in evaluation would show, and then trains two
    steps: after the first one, weights behind zero-initialised gates or LoRA's B still have no
    gradient.
    """
    torch.manual_seed(0)
    model = tiny_deepmlf(family, **knobs)
    model.lm.to(dtype)
    frozen = fingerprint(model.lm)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for g in model.param_groups() for p in g['params']], lr=1e-2)

    # one context per forward pass, as in train.py: within one, autocast reuses its bfloat16 copies
    # of the weights
    def autocast():
        return torch.autocast('cpu', torch.bfloat16, enabled=dtype is torch.bfloat16)

    model.eval()
    with torch.no_grad(), autocast():
        model.predict(tiny_batch())
    model.train()
    for seed in (0, 1):
        optimizer.zero_grad()
        with autocast():
            loss = model(tiny_batch(seed))['loss']
        loss.backward()
        optimizer.step()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().sum() > 0, n
            assert not torch.equal(p, start[n]), n
    assert fingerprint(model.lm) == frozen and all(p.grad is None for p in model.lm.parameters())
    assert not any(m.training for m in model.lm.modules())


def test_training_does_not_change_the_frozen_lms_folder(curriculum):
    """
    After DeepMLF's run, the LM's folder still equals the best checkpoint of the LM's own run, and
    no weight of the LM is in DeepMLF's checkpoint.
    """
    best = load_file(curriculum / 'whole' / 'best.safetensors')
    assert best and not any(k.startswith('lm.') for k in best)
    folder = load_file(curriculum / 'lm_toy' / 'hf' / 'model.safetensors')
    own_run = load_file(curriculum / 'lm_toy' / 'best.safetensors')
    assert len(folder) > 40 and all(torch.equal(v, own_run['hf.' + k]) for k, v in folder.items())


def test_av_init_keeps_tunes_or_ignores_the_pretrained_av_encoder(corpora, curriculum):
    """
    av_init='frozen': the checkpoint's encoder equals that of the AV run bit for bit. 'tune' (the
    run 'whole') trains it further. 'random' does not start from it.
    """
    pretrained = load_file(curriculum / 'av_toy' / 'best.safetensors')
    for how in ('frozen', 'random'):
        train(*deepmlf(corpora, curriculum, how, f'--av_init={how}'))

    def same(run):
        best = load_file(curriculum / run / 'best.safetensors')
        encoder = {k: v for k, v in pretrained.items() if k.startswith('av_encoder')}
        return [torch.equal(best[k], v) for k, v in encoder.items()]

    assert all(same('frozen')) and not all(same('whole'))
    assert sum(same('random')) < len(same('random')) / 2


@pytest.mark.parametrize('how', ['frozen', 'tune', 'random'])
def test_a_model_without_pretrained_weights_freezes_its_av_encoder_too(how):
    """The benchmark (tools/bench_model.py) assembles its model and loads no weights."""
    label = dict(kind='regression', range=[-3, 3])
    facts = SimpleNamespace(widths=dict(audio=5, vision=7), labels=dict(label=label))
    k = KNOBS | dict(av_init=how, av_width=12, av_heads=3)
    model = DeepMLF.assemble(k, facts, FrozenLM(tiny_lm()), None).train()
    trained = {p.requires_grad for p in model.av_encoder.parameters()}
    assert trained == {how != 'frozen'} and model.av_encoder.training == (how != 'frozen')


@pytest.mark.parametrize('dtype', ['auto', 'float32', 'bfloat16'])
def test_the_benchmark_has_frozen_weights_in_its_dtype(dtype):
    """ As in train.py, a frozen LM has weights of the run's dtype, and an encoder float32. """
    wanted = torch.bfloat16 if dtype == 'bfloat16' else torch.float32
    shape = [1, 16, 2, 60]
    lm = text_model(dict(system='deepmlf', dtype=dtype, lm_shape=shape))
    assert {p.dtype for p in lm.parameters()} == {wanted}
    encoder = text_model(dict(system='crosssent', dtype=dtype, lm_shape=shape))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_accumulated_micro_batches_give_the_step_of_one_big_batch(corpora, curriculum):
    """
    40 clips as 16 + 16 + 8 and as one batch, without dropout, give the same gradient norm, loss
    terms (also the LM loss, a mean over tokens and not over clips) and weights. Gradient clipping
    is off, because it would hide a wrong scale. Adam would hide it too, so the norm is compared.
    """
    no_noise = ['--dropout=0', '--av_dropout=0', '--text_reg=none', '--grad_clip=0']
    no_noise += ['--max_steps=2', '--log_interval=1']

    # Both runs take the same 40 clips in each step. The real order depends on batch_size.
    def same_order(cost, batch_size, seed, epoch):
        if epoch is None:
            return [np.arange(len(cost))]
        return [np.arange(40)[i : i + batch_size] for i in range(0, 40, batch_size)]

    order, logs, weights = data.epoch_order, [], []
    data.epoch_order = same_order
    try:
        shapes = dict(
            micro=['--batch_size=16', '--accumulate=3'], big=['--batch_size=40', '--accumulate=1']
        )
        for name, shape in shapes.items():
            train(*deepmlf(corpora, curriculum, name), *no_noise, *shape)
            logs.append([e for e in read_lines(curriculum / name / 'log.jsonl') if 'train' in e])
            weights.append(load_file(curriculum / name / 'last.safetensors'))
    finally:
        data.epoch_order = order
    for a, b in zip(*logs):
        assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)
        assert a['train'] == pytest.approx(b['train'], rel=1e-4)
    for k, v in weights[0].items():
        if k.startswith('model.'):
            torch.testing.assert_close(v, weights[1][k], rtol=0, atol=2e-5, msg=k)


# --------------------------------------------------------------------------------------------------
# Killed and resumed


@pytest.mark.parametrize('seed', range(4))
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(seed, corpora, curriculum):
    """
    Killed twice at random batches, saving every second step: weights, moments, log and metrics are
    bitwise equal.
    """
    rng, name = np.random.default_rng(seed), f'killed{seed}'
    resume = []
    for _ in range(2):
        with killed_in_batch(int(rng.integers(3, 11))):
            train(*deepmlf(corpora, curriculum, name, '--save_interval=2', *resume))
        saved = (curriculum / name / 'last.safetensors').exists()
        resume = ['--resume=True'] if saved else ['--fresh=True']
    train(*deepmlf(corpora, curriculum, name, '--save_interval=2', *resume))
    same_run(curriculum / 'whole', curriculum / name)


def start(command, cwd=HERE):
    """Start a process with a pipe for its stdout and stderr together."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=ENV, **pipes)


def test_a_run_resumes_bitwise_after_sigkill_and_after_ctrl_c(corpora, curriculum):
    """A process gets SIGKILL, is resumed, gets SIGINT (at which it saves), and is resumed."""
    run = deepmlf(corpora, curriculum, 'signalled', '--save_interval=1')
    args = [sys.executable, str(HERE / 'train.py'), *map(str, run)]
    last = curriculum / 'signalled' / 'last.safetensors'
    for number, resume in ((signal.SIGKILL, []), (signal.SIGINT, ['--resume=True'])):
        process = start(args + resume)
        since = last.stat().st_mtime if last.exists() else 0
        while process.poll() is None and not (last.exists() and last.stat().st_mtime > since):
            time.sleep(0.02)
        process.send_signal(number)
        printed = process.communicate()[0]
        if process.returncode == 0:
            break  # it ended before the signal
    else:
        assert 'Traceback' not in printed and '--resume=True continues' in printed
    if not (curriculum / 'signalled' / 'result.json').exists():
        train(*run, '--resume=True')
    same_run(curriculum / 'whole', curriculum / 'signalled')


def test_two_runs_with_the_same_seed_are_bitwise_equal(corpora, curriculum):
    """--deterministic=True makes torch raise at any operation that is not deterministic."""
    try:
        train(*deepmlf(corpora, curriculum, 'again', '--deterministic=True'))
    finally:
        torch.use_deterministic_algorithms(False)
    same_run(curriculum / 'whole', curriculum / 'again')


def save_large_source(path):
    """A pickle in M-SENA's layout, so large that a conversion can be killed halfway."""
    rng = np.random.default_rng(0)

    def split(n):
        return dict(
            raw_text=['so so'] * n,
            regression_labels=rng.uniform(-3, 3, n).astype('f4'),
            audio=rng.normal(size=(n, 400, 74)).astype('f4'),
            vision=rng.normal(size=(n, 300, 35)).astype('f4'),
        )

    with open(path, 'wb') as f:
        pickle.dump(dict(train=split(300), valid=split(20), test=split(20)), f, protocol=4)


def hashes(folder):
    """{relative path: SHA-256} of all files in a folder tree."""
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Victims:
    """The commands that are killed: 'convert', 'train' (saving after each step) and 'eval'."""

    def __init__(self, corpora, curriculum, folder):
        self.corpora, self.curriculum, self.folder = corpora, curriculum, folder
        self.source = corpora / 'toy-source.pkl'
        if not self.source.exists():
            save_large_source(self.source)

    def run_name(self, name):
        return f'{self.folder.name}-{name}'

    def command(self, kind, name):
        if kind == 'convert':
            return [HERE / 'data.py', self.source, f'--name={name}']
        if kind == 'eval':
            return [HERE / 'eval.py', self.curriculum / 'whole']
        run = deepmlf(self.corpora, self.curriculum, self.run_name(name), '--save_interval=1')
        argv = [HERE / 'train.py', *run]
        last = self.curriculum / self.run_name(name) / 'last.safetensors'
        if last.parent.exists():
            argv.append('--resume=True' if last.exists() else '--fresh=True')
        return argv

    def go(self, kind, name, after=None):
        """Run the command, and kill it `after` seconds -> whether it ended before."""
        # with as many threads as the run 'whole', or bits would differ
        where = self.folder if kind == 'convert' else HERE
        process = start([sys.executable, *self.command(kind, name)], cwd=where)
        try:
            printed, _ = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return False
        assert process.returncode == 0, printed[-500:]
        return True

    def result(self, kind, name):
        """What the command wrote, for comparison; a training run is compared here."""
        if kind == 'convert':
            files = hashes(self.folder / 'data' / name)
            return {k: v for k, v in files.items() if k != 'meta.json'}
        if kind == 'eval':
            files = ('test.jsonl', 'result.json')
            return [(self.curriculum / 'whole' / f).read_bytes() for f in files]
        same_run(self.curriculum / 'whole', self.curriculum / self.run_name(name))
        return True


def kill_at_random(corpora, curriculum, folder, n, seed):
    """
    kill -9 n commands (in turn training, converting, evaluating), each at a random time, and run
    the same command again, as a user would. Asserts that its result equals that of a command that
    was never killed -> the number of commands.
    """
    victims, rng, survived = Victims(corpora, curriculum, folder), np.random.default_rng(seed), 0
    took, expected = {}, {}   # by kind, of a command that is never killed
    for i in range(n):
        kind, name = ('train', 'convert', 'eval')[i % 3], f'{seed}-{i}'
        if kind not in took:
            since = time.time()
            victims.go(kind, 'never')
            took[kind] = time.time() - since
            expected[kind] = victims.result(kind, 'never')
        finished = victims.go(kind, name, after=rng.uniform(0.05, 1.0) * took[kind])
        if kind == 'convert' and (folder / 'data' / name).exists():
            finished = True  # a corpus folder gets its name when it is complete
        if not finished:
            victims.go(kind, name)
        assert victims.result(kind, name) == expected[kind], (kind, i)
        if kind == 'convert':
            assert not list((folder / 'data').glob('*.tmp-*'))
        survived += 1
        print(f'  killed {kind}: survived, {survived} of {i + 1}', flush=True)
    return survived


def test_converting_training_and_evaluating_survive_kill_9(corpora, curriculum, tmp_path):
    """Each is killed once. test_soak kills 25 times."""
    assert kill_at_random(corpora, curriculum, tmp_path, n=3, seed=0) == 3


FAULTS = """
import resource, sys, torch
import model   # as in training: imports fill gaps in the heap
from run.machine import hold_memory
hold_memory(sys.argv[1] == 'hold')
for i in range(8):   # tensors of 64 MB; the first four allocate the memory
    if i == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2 ** 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason="hold_memory works with glibc only"
)
def test_hold_memory_reuses_the_memory_of_freed_tensors():
    """Counts the page faults of four large tensors that are made one after the other."""

    def faults(how):
        command = [sys.executable, '-c', FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout)

    assert faults('hold') < 16 < faults('give back')


def test_hold_memory_does_nothing_with_other_c_libraries(monkeypatch):
    def windows(name):
        raise TypeError("Windows")

    def without_mallopt(name):
        return object()

    for library in (without_mallopt, windows):
        monkeypatch.setattr(machine.ctypes, 'CDLL', library)
        machine.hold_memory()


def test_a_run_on_a_full_disk_can_be_resumed(corpora, curriculum, monkeypatch):
    """
    Writing the third checkpoint fails halfway: the run stops with a sentence, leaves no partial
    file, and resumes bit for bit from the checkpoint before.
    """
    real, calls = folder.write_tensors, []

    def full(path, tensors, metadata):
        calls.append(path)
        real(path, tensors, metadata)
        if len(calls) >= 3:
            os.truncate(path, 1000)
            raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(folder, 'write_tensors', full)
        with pytest.raises(SystemExit, match='could not save .*No space.* free disk space'):
            train(*deepmlf(corpora, curriculum, 'full', '--save_interval=2'))
    assert not list((curriculum / 'full').glob('*.new'))
    train(*deepmlf(corpora, curriculum, 'full', '--save_interval=2', '--resume=True'))
    same_run(curriculum / 'whole', curriculum / 'full')


def test_a_finished_run_has_its_files_and_best_has_the_best_validation(corpora, curriculum):
    for kind in ('best', 'last'):
        info = json.load(open(curriculum / 'whole' / f'{kind}.json'))
        assert info == load_checkpoint(str(curriculum / 'whole' / f'{kind}.safetensors'))[1]
    valid = [e for e in read_lines(curriculum / 'whole' / 'log.jsonl') if 'valid' in e]
    assert info['state']['best'] == min(v['valid']['mae'] for v in valid)
    files = """
        .lock best.json best.safetensors config.json curve.png last.json last.safetensors log.jsonl
        report.html report.md result.json test.jsonl
    """
    assert {p.name for p in (curriculum / 'whole').iterdir()} == set(files.split())


def test_eval_reproduces_the_test_metrics_and_compares_runs(curriculum):
    """
    Evaluating the best checkpoint again gives the same test metrics. Two runs of one experiment
    share a row; two experiments get a paired difference with an interval.
    """
    before = read_result(curriculum / 'whole')['test']
    table = evaluation.evaluate_again(str(curriculum / 'whole'))
    assert read_result(curriculum / 'whole')['test'] == before and 'majority' in table
    shutil.copytree(curriculum / 'whole', curriculum / 'copy', dirs_exist_ok=True)
    forge(curriculum / 'copy', dict(seed=1))
    assert '(n=2)' in evaluation.compare([str(curriculum / 'whole'), str(curriculum / 'copy')])
    both = evaluation.compare([str(curriculum / 'av_toy'), str(curriculum / 'whole')])
    assert re.search(r'[+-]0\.\d{4} \[[+-]0\.\d{4}, [+-]0\.\d{4}\]', both)
    with pytest.raises(evaluation.EvalError, match='no result.json'):
        evaluation.evaluate_again(str(curriculum))


# --------------------------------------------------------------------------------------------------
# Bad input stops with a sentence and exit status 1, before training


@pytest.mark.parametrize(
    'flags, sentence',
    [
        (['--learning_rte=1'], "unknown key 'learning_rte'"),
        (['--n_fusion=four'], 'wants int'),
        (['--mm_gate=sigmod'], "mm_gate='sigmod' is none of"),
        (
            ['--dropout=1.5', '--batch_size=0'],
            r'batch_size=0 must be at least 1.*dropout=1.5 must be in',
        ),
        (['--select=accuracy'], "select='accuracy' is none of [^<]*$"),
        (['--select=unread'], "select='unread' is none of"),
        (['--corpus=nowhere.pkl'], 'nowhere.pkl'),
        (['--label=mood'], "no label 'mood'"),
        (['--label=emotion'], 'classes'),
        (['--lm=no/such-lm'], 'is not in the local cache'),
        (['--mm_layers=[9]'], 'from 1 to 4'),
        (['--mm_heads=5'], 'does not divide'),
        (['--av_from='], 'needs a pretrained AV encoder'),
        (['--av_width=24'], 'does not fit this model'),
        (['--resume=True'], 'no checkpoint'),
        (['--text_reg=dropout', '--text_reg_rate=1.5'], r'text_reg_rate=1.5 must be in'),
        (['--seed=99999999999999999999'], 'below 2.63'),
        (['--modalities=audio,smell'], "modalities='smell' is none of audio, vision"),
        (['--max_text_len=127'], 'positions'),
        (['config/missing.py'], 'missing.py'),
    ],
)
def test_bad_knobs_stop_with_a_sentence_before_training(flags, sentence, corpora, curriculum):
    with pytest.raises(SystemExit) as stopped:
        train(*deepmlf(corpora, curriculum, 'refused', *flags))
    assert re.search(sentence, str(stopped.value)) and '\n' not in str(stopped.value).strip()
    assert not (curriculum / 'refused').exists()


def test_a_missing_or_unsuitable_lm_stops_the_run_before_its_prerequisites(corpora, tmp_path):
    run = ['config/deepmlf_mosi.py', '--corpus=toy', f'--data_dir={corpora}']
    run += [f'--out_dir={tmp_path}/run', *TINY]
    tiny_lm().save_pretrained(tmp_path / 'lm')
    for flags, sentence in (
        (['--lm=no/such-lm'], 'is not in the local cache'),
        (['--mm_layers=[2,7]', f'--lm={tmp_path}/lm'], 'from 1 to'),
    ):
        with pytest.raises(SystemExit, match=sentence):
            train(*run, *flags)
        assert not (tmp_path / 'av_mosi-steps11').exists()


def test_resuming_a_finished_run_changes_nothing(corpora, curriculum, capsys):
    files = {p: p.stat().st_mtime_ns for p in (curriculum / 'whole').iterdir()}
    with pytest.raises(SystemExit) as done:
        train(*deepmlf(corpora, curriculum, 'whole', '--resume=True'))
    assert not done.value.code and 'already finished' in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (curriculum / 'whole').iterdir()} == files


def test_a_run_is_neither_overwritten_nor_resumed_with_other_knobs(corpora, curriculum):
    with pytest.raises(SystemExit, match='already holds a run: --resume=True'):
        train(*deepmlf(corpora, curriculum, 'whole'))
    with pytest.raises(SystemExit, match='was trained with n_fusion=8, not 5'):
        train(*deepmlf(corpora, curriculum, 'whole', '--resume=True', '--n_fusion=5'))


def test_a_run_resumes_with_its_corpus_in_another_folder(corpora, curriculum, tmp_path, capsys):
    shutil.copytree(corpora / 'toy', tmp_path / 'moved')
    flags = deepmlf(corpora, curriculum, 'whole', '--resume=True')
    with pytest.raises(SystemExit) as done:
        train(*flags, f'--corpus={tmp_path}/moved')
    assert not done.value.code and 'already finished' in capsys.readouterr().out
    make_toy(str(tmp_path / 'other'), n_clips=(60, 16, 24), seed=5)
    with pytest.raises(SystemExit, match="was trained with corpus='toy', not '.*other'"):
        train(*flags, f'--corpus={tmp_path}/other')


def test_a_checkpoint_with_a_flipped_bit_or_cut_short_is_refused(curriculum, tmp_path):
    """The bit is in the tensors or in the header."""
    whole = (curriculum / 'whole' / 'best.safetensors').read_bytes()
    path = tmp_path / 'best.safetensors'
    flips = ((len(whole) - 5, 1), (whole.index(b'n_fusion') + 3, 8), (len(whole) // 2, 128))
    for i, bit in flips:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
        with pytest.raises(ModelError, match='damaged'):
            load_checkpoint(str(path))
    path.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match='damaged'):
        load_checkpoint(str(path))
    path.write_bytes(whole)
    load_checkpoint(str(path))


def test_a_second_run_into_the_same_folder_stops(corpora, tmp_path):
    """The first run continues undisturbed."""
    argv = [sys.executable, str(HERE / 'train.py'), 'config/av_toy.py', f'--data_dir={corpora}']
    argv += [f'--out_dir={tmp_path}/run', '--device=cpu']
    argv += ['--epochs=9000', '--patience=9000', '--batch_size=16']
    first = subprocess.Popen(argv, env=ENV, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if (tmp_path / 'run' / 'last.safetensors').exists():
                break
            time.sleep(0.1)
        second = subprocess.run([*argv, '--fresh=True'], env=ENV, capture_output=True, text=True)
        assert second.returncode == 1 and 'Traceback' not in second.stderr
        assert 'another run is writing into' in second.stderr
        assert first.poll() is None and (tmp_path / 'run' / 'last.safetensors').exists()
    finally:
        first.kill()
        first.wait()


def test_a_refused_run_leaves_the_tokenizer_of_the_first_as_it_is(corpora, tmp_path):
    file = tmp_path / 'run' / 'hf' / 'tokenizer.json'
    file.parent.mkdir(parents=True)
    file.write_text('of the first run')
    holder = ('import sys, time; sys.path.insert(0, sys.argv[1]); from run.folder import lock; '
              'held = lock(sys.argv[2]); print(held is not None, flush=True); time.sleep(600)')
    first = subprocess.Popen([sys.executable, '-c', holder, str(HERE), str(tmp_path / 'run')],
                             env=ENV, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline().strip() == 'True'
        with pytest.raises(SystemExit, match='another run is writing into'):
            train('config/crosssent_toy.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/run',
                  *TINY, '--lm_vocab=60', '--fresh=True')
    finally:
        first.kill()
        first.wait()
    assert file.read_text() == 'of the first run'


def test_a_run_resumes_with_its_own_tokenizer_alone(corpora, tmp_path):
    flags = [f'--data_dir={corpora}', f'--out_dir={tmp_path}/run', *TINY, '--lm_vocab=60']
    train('config/crosssent_toy.py', *flags, '--max_steps=2')
    os.remove(tmp_path / 'run' / 'report.md')
    path = tmp_path / 'run' / 'hf' / 'tokenizer.json'
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer['model']['vocab']   # [piece, score] of each token
    letters = [entry for entry in vocab if entry[0] in 'et']
    letters[0][0], letters[1][0] = letters[1][0], letters[0][0]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(SystemExit, match='was trained with another tokenizer'):
        train('config/crosssent_toy.py', *flags, '--max_steps=2', '--resume=True')


def test_two_spellings_of_a_folder_are_one_run(corpora, curriculum, tmp_path, monkeypatch):
    run = ['config/deepmlf_toy.py', f'--data_dir={corpora}', '--device=cpu', '--batch_size=16',
           '--av_init=random', '--needs=[]', '--max_steps=2']
    train(*run, f'--lm={curriculum}/lm_toy', f'--out_dir={tmp_path}/run/')
    about = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert about['knobs']['out_dir'] == f'{tmp_path}/run'
    os.remove(tmp_path / 'run' / 'report.md')
    monkeypatch.chdir(curriculum)
    train(*run, '--lm=./lm_toy', f'--out_dir={tmp_path}/run', '--resume=True')
    assert (tmp_path / 'run' / 'report.md').exists()
    evaluation.main([f'{tmp_path}/run'])   # its checkpoint has the first spelling, as has result.json


def test_an_lm_prerequisite_reads_the_label_of_the_run_that_needs_it():
    common = declared_knobs(HERE / 'train.py')
    argv = [str(HERE / 'config' / 'mse_toy_emotion.py')]
    k = run_knobs(argv, *common, SYSTEMS)[1]
    wanted, flags, digest = needs.wanted_knobs(
        k, str(HERE / 'config' / 'lm_toy_rated.py'), HERE / 'train.py', SYSTEMS)
    assert wanted['label'] == 'emotion' and '--label=emotion' in flags and digest


def test_prerequisites_with_other_knobs_or_another_corpus_are_refused(corpora, tmp_path):
    """
    A finished prerequisite is used if its knobs fit. A run with another av_layers shares the LM,
    which has no such knob, and trains another AV encoder in a folder of its own.
    """
    flags = [f'--data_dir={corpora}', '--device=cpu', '--max_steps=2']
    train('config/deepmlf_toy.py', *flags, f'--out_dir={tmp_path}/run')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['av_toy-steps2', 'lm_toy-steps2', 'run']
    # another AV encoder, and the same LM
    train('config/deepmlf_toy.py', *flags, f'--out_dir={tmp_path}/three', '--av_layers=3')
    made = sorted(p.name for p in tmp_path.iterdir())
    assert len(made) == 5 and made[1].startswith('av_toy-steps2-') and made[3:] == ['run', 'three']
    config = tmp_path / 'av_toy-steps2' / 'result.json'
    old = json.loads(config.read_text())
    forge(tmp_path / 'av_toy-steps2', dict(lr=0.5))
    with pytest.raises(SystemExit, match='was trained with lr=0.5'):
        train('config/deepmlf_toy.py', *flags, f'--out_dir={tmp_path}/other')
    forge(tmp_path / 'av_toy-steps2', dict(lr=old['about']['knobs']['lr']))
    other_corpus = old['about']['corpus'] | dict(sha256='0' * 64)
    forge(tmp_path / 'av_toy-steps2', corpus=other_corpus)
    with pytest.raises(SystemExit, match='was trained on another file'):
        train('config/deepmlf_toy.py', *flags, f'--out_dir={tmp_path}/other')
    forge(tmp_path / 'av_toy-steps2', corpus=old['about']['corpus'] | dict(contents='0' * 16))
    with pytest.raises(SystemExit, match='or on another conversion of it'):
        train('config/deepmlf_toy.py', *flags, f'--out_dir={tmp_path}/other')


def test_eval_draws_a_random_lm_again_and_refuses_another_lm(corpora, curriculum):
    """The weights of lm_init='random' are in no checkpoint, and come from the seed again."""
    train(*deepmlf(corpora, curriculum, 'random_lm', '--lm_init=random'))
    before = read_result(curriculum / 'random_lm')
    evaluation.evaluate_again(str(curriculum / 'random_lm'))
    assert read_result(curriculum / 'random_lm')['test'] == before['test']
    shutil.copytree(curriculum / 'whole', curriculum / 'other_lm')
    forge(curriculum / 'other_lm', lm_fingerprint='f' * 16)
    with pytest.raises(evaluation.EvalError, match='has other weights than the one that'):
        evaluation.evaluate_again(str(curriculum / 'other_lm'))


def test_the_error_on_other_feature_widths_has_both_shapes(corpora, curriculum, tmp_path):
    other = make_corpus(tmp_path, 'other', audio=of_width(9), audio_lengths=six_frames)
    with pytest.raises(SystemExit, match=r'is \[30, 12\] in the file and \[30, 9\] here'):
        train(*deepmlf(corpora, curriculum, 'widths', other))


def test_a_killed_fresh_start_leaves_no_result_of_the_former_run(corpora, curriculum, monkeypatch):
    """A run that needs this one would take result.json as a sign that it is finished."""
    shutil.copytree(curriculum / 'whole', curriculum / 'again', dirs_exist_ok=True)
    (curriculum / 'again' / 'confusion.png').touch()   # as of a run that predicted classes

    def dying(*a, **k):
        raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(data, 'get_batch', dying)
        train(*deepmlf(corpora, curriculum, 'again', '--fresh=True'))
    assert not (curriculum / 'again' / 'result.json').exists()
    assert not (curriculum / 'again' / 'best.safetensors').exists()
    assert not list((curriculum / 'again').glob('*.png'))


def test_resuming_from_a_damaged_checkpoint_stops_with_a_sentence(corpora, curriculum):
    shutil.copytree(curriculum / 'whole', curriculum / 'damaged', dirs_exist_ok=True)
    path = curriculum / 'damaged' / 'last.safetensors'
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match='damaged or not a checkpoint'):
        train(*deepmlf(corpora, curriculum, 'damaged', '--resume=True'))


def test_nan_stops_the_run_and_names_the_step_and_the_terms(corpora, curriculum, monkeypatch):
    real = data.get_batch

    def poisoned(corpus, split, index, *a, **k):
        batch = real(corpus, split, index, *a, **k)
        steps.append(split)
        if len(steps) == 2:
            batch['label'][:] = float('nan')  # step 2 is not a logged step
        return batch

    steps = []
    monkeypatch.setattr(data, 'get_batch', poisoned)
    sentence = 'av, fusion, loss, task, text became NaN or inf in step 2, and nothing was saved'
    with pytest.raises(SystemExit, match=sentence):
        train(*deepmlf(corpora, curriculum, 'nan'))


def test_a_wrong_prediction_stops_the_run_with_one_full_stop(corpora, curriculum, monkeypatch):
    monkeypatch.setattr(DeepMLF, 'predict', lambda self, batch: dict(pred=batch['label'][:, None]))
    with pytest.raises(SystemExit) as stopped:
        train(*deepmlf(corpora, curriculum, 'wrong'))
    assert re.search(r'valid: .*returned pred of shape .*[^.]\.$', str(stopped.value).strip())


@pytest.mark.parametrize(
    'name, change',
    [
        ('zero-length audio', dict(audio_lengths=with_value_at(3, 0))),
        ('all-zero video', dict(vision=with_value_at(3, 0.0))),
        ('empty text', dict(raw_text=with_value_at(3, ''))),
        (
            'nan and inf',
            dict(audio=with_value_at((3, 0), np.inf), vision=with_value_at((5, 1), np.nan)),
        ),
        ('no vision at all', dict(vision=left_out, vision_lengths=left_out)),
    ],
)
def test_damaged_but_repairable_corpora_train(name, change, curriculum, tmp_path):
    flags = [
        make_corpus(tmp_path, 'repairable', **change),
        f'--out_dir={tmp_path}/run',
        f'--data_dir={tmp_path}/data',
        f'--lm={curriculum}/lm_toy',
        '--av_init=random',
    ]
    train('config/deepmlf_toy.py', *flags, *TINY, '--max_steps=3')
    assert np.isfinite(read_result(tmp_path / 'run')['test']['mae'])


def test_a_run_trains_with_one_modality(curriculum, corpora, tmp_path):
    run = ['config/av_toy.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/audio']
    train(*run, '--modalities=audio', *TINY)
    about = json.loads((tmp_path / 'audio' / 'config.json').read_text())
    assert about['knobs']['modalities'] == ['audio']


# --------------------------------------------------------------------------------------------------
# The docs


def test_plain_train_py_trains_its_prerequisites_and_prints_the_bounds(corpora, tmp_path):
    """`python train.py`, with 3 steps for each run."""
    (tmp_path / 'data').mkdir()
    shutil.copytree(corpora / 'toy', tmp_path / 'data' / 'toy')
    command = [sys.executable, str(HERE / 'train.py'), '--max_steps=3']
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (
        'training the prerequisite lm_toy first',
        'training the prerequisite av_toy first',
        '| majority',
        '| text only',
        '| audio+video only',
        '| late-fusion bound',
        'best possible mae',
        'ETA',
    ):
        assert word in done.stdout, word
    made = sorted(p.name for p in (tmp_path / 'out').iterdir())
    assert made == ['av_toy-steps3', 'deepmlf_toy-steps3', 'lm_toy-steps3']


# audio width, video width, label range
REAL = dict(mosei=(74, 35, 3), mosi=(5, 20, 3), sims=(33, 709, 1))
REAL_CONFIGS = sorted(p.name for p in HERE.glob('config/deepmlf_*.py') if 'toy' not in p.name)


@pytest.mark.parametrize('config', REAL_CONFIGS)
def test_real_configs_run_on_files_of_their_layout(config, curriculum, tmp_path):
    """
    Each config of a real corpus runs to its end on a small M-SENA pickle with that corpus's widths,
    and with the toy LM in place of the large one.
    """
    corpus = re.search('mosei|mosi|sims', config)[0]
    d_a, d_v, limit = REAL[corpus]

    def in_range(split, y):
        return y * limit / 3

    change = dict(audio=of_width(d_a), vision=of_width(d_v), vision_lengths=six_frames)
    source = make_corpus(tmp_path, 'unaligned_50', regression_labels=in_range, **change)
    places = [f'--out_dir={tmp_path}/out/run', f'--data_dir={tmp_path}/data']
    small = ['--mm_layers=[2,4]', '--mm_heads=4', '--lora_rank=4', '--lm_depth=0', '--max_steps=2',
             '--device=cpu']
    train(f'config/{config}', source, f'--lm={curriculum}/lm_toy', *places, *small)
    about = json.loads((tmp_path / 'out' / 'run' / 'config.json').read_text())
    clips_of_a_step = about['knobs']['batch_size'] * about['knobs']['accumulate']
    assert clips_of_a_step == (32 if 'gemma' in config else 256)
    assert (tmp_path / 'out' / f'av_{corpus}-steps2' / 'result.json').exists()


def test_real_mosi_with_a_real_lm_runs(tmp_path):
    """Two steps of DeepMLF on real CMU-MOSI transcripts and a real pretrained Llama."""
    corpus = PARENT / 'shared' / 'data' / 'mosi_official.pkl'
    lm = PARENT / 'shared' / 'lm' / 'stories260K'
    if not corpus.exists() or not lm.exists():
        pytest.skip("../shared is missing; it is not in the repository")
    places = [f'--out_dir={tmp_path}/out/mosi', f'--data_dir={tmp_path}/data']
    small = ['--mm_layers=[3,4,5]', '--lora_rank=8', '--lora_alpha=16', '--mm_heads=8']
    small += ['--max_steps=2', '--device=cpu']
    train('config/deepmlf_mosi.py', f'--corpus={corpus}', f'--lm={lm}', *places, *small)
    result = read_result(tmp_path / 'out' / 'mosi')
    assert result['clips'] == dict(train=1284, valid=229, test=686)
    assert np.isfinite(result['test']['mae'])


# What the documents name -> what is here in its place. Weights of the hub cannot be had: the toy LM.
STANDS_FOR = {
    'out/RUN': 'out/deepmlf_toy',
    'OTHER': 'data/toy',
    'data/mosi': 'data/toy',
    'data/mosei': 'data/toy',
    'sentence-transformers/all-mpnet-base-v2': 'out/lm_toy-steps2',
    'gpt2': 'out/lm_toy-steps2',
}
# the toy LM in the place of a config's own, by config
SMALL_LM = {
    'config/deepmlf_mosei.py': ['--lm=out/lm_toy-steps2', '--mm_layers=2,4', '--mm_heads=4'],
    'config/mse_mosei.py': ['--lm=out/lm_toy_rated-steps2', '--prompt=toy', '--label_plus=False'],
    'config/baseline_tfn.py': ['--lm=out/lm_toy-steps2'],
}
SMALL_BENCH = """
    --bench_clips=3 --batch_size=2 --repeats=1 --lm_shape=2,32,2,500
    --warmup_rounds=1 --timed_rounds=2
"""
PAGES = ['README.md', *sorted(p.relative_to(HERE).as_posix() for p in HERE.glob('docs/*.md'))]


def shell_commands(page):
    """
    The commands of a page: lines of ```bash blocks, and of indented blocks where they start a program
    that is known here.
    """
    text = (HERE / page).read_text(encoding='utf-8')
    lines = re.findall(r'^    ((?:python|torchrun|pip|git|cd) .+)$', text, re.M)
    for block in re.findall(r'^```(?:bash|sh)\n(.*?)^```', text, re.M | re.S):
        lines += block.splitlines()
    lines = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [line for line in lines if line]


def run_script(words, monkeypatch):
    """Run a script in this process. words: its path and its arguments."""
    monkeypatch.setattr(sys, 'argv', words)
    try:
        runpy.run_path(str(HERE / words[0]), run_name='__main__')
    except SystemExit as e:
        assert not e.code, (words, e.code)


def run_shortened(line, monkeypatch):
    """
    A command of the documents in this folder: training with 2 steps, what cannot be had replaced.
    Installing, cloning and pytest (which is running this) are left out.
    """
    words = shlex.split(line)
    program, words = words[0], words[1:]
    if program in ('pip', 'git', 'cd') or words[:2] == ['-m', 'pytest']:
        return
    if program == 'torchrun':
        flags = words[words.index('train.py') + 1 :]
        flags += ['--max_steps=2', '--device=cpu', '--out_dir=out/torchrun', *SMALL_LM[flags[0]]]
        if not os.path.exists('out/lm_toy_rated-steps2'):
            train('config/lm_toy_rated.py', '--max_steps=2', '--device=cpu')
        status, printed = torchrun(*flags, cwd=os.getcwd())
        assert status == 0, (line, printed[-2000:])
        return
    assert program == 'python', line
    if words[0] == '-c':
        exec(words[1], {})
    elif words[0] == 'train.py':
        small = next((v for k, v in SMALL_LM.items() if k in words), [])
        # two commands may name one folder
        fresh = [] if '--resume=True' in words else ['--fresh=True']
        short = [] if '--help' in words else ['--max_steps=2', '--device=cpu', *fresh, *small]
        try:
            train(*words[1:], *short)
        except SystemExit as e:  # of --help
            assert not e.code, (line, e.code)
    elif words[0] == 'tools/bench.py':
        run_script(words + SMALL_BENCH.split(), monkeypatch)
    elif words[0] == 'tools/probe.py':
        small = ['--corpus=toy', '--lm=out/lm_toy-steps2', '--lm_depth=0', '--runs=out/deepmlf_toy-steps2']
        run_script([*words[:2], *small], monkeypatch)
    else:
        assert words[0] in ('eval.py', 'data.py') or words[0].startswith('tools/'), line
        for real, small in STANDS_FOR.items():
            words = [re.sub(rf'{real}$', small, w) for w in words]
        words = [w + '-steps2' if w.startswith('out/') and w.count('/') == 1 else w for w in words]
        run_script(words, monkeypatch)


def test_commands_of_the_documents_run(corpora, tmp_path, monkeypatch, capsys):
    """
    Each command of README.md and docs/, once and in this order, in an empty folder with small files
    of the layouts that they name; and the Python of docs/corpora.md. tests/test_fork.py runs those of
    docs/fork.md.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpora / 'toy', tmp_path / 'data' / 'toy')
    change = dict(audio=of_width(74), vision=of_width(35), vision_lengths=six_frames)
    make_corpus(tmp_path, 'unaligned_50', **change)
    emotion_lists(tmp_path / 'CHERMA0723')
    emotion_lists(tmp_path / 'MELD')
    table = ['video_id,clip_id,text,label,emotion']
    table += [f'v{i // 2},{i % 2},clip {i} is fine,{i % 5 - 2},joy' for i in range(60)]
    (tmp_path / 'mine.csv').write_text('\n'.join(table), encoding='utf-8')
    clip = dict(audio=np.zeros((4, 12), 'f4'), vision=np.zeros((3, 16), 'f4'))
    np.savez('mine.npz', text='it was superb', **clip)
    handmade = re.search(r'^```python\n(.*?)^```', (HERE / 'docs/corpora.md').read_text(), re.M | re.S)
    exec(handmade[1], {})

    ran = ['python train.py']
    run_shortened(ran[0], monkeypatch)  # the run that the others are about
    for page in PAGES:
        for line in shell_commands(page) if page != 'docs/fork.md' else []:
            if line not in ran:
                ran.append(line)
                run_shortened(line, monkeypatch)
    programs = {line.split()[1] for line in ran}
    assert {'train.py', 'eval.py', 'data.py', '-m', 'tools/bench.py', 'tools/sweep.py'} <= programs
    assert 'train on it: python train.py CONFIG --corpus=data/mosei' in capsys.readouterr().out


def emotion_lists(folder):
    """A folder of NAME_train.pkl and so on: lists of clips with an emotion."""
    folder.mkdir()
    for split in ('train', 'valid', 'test'):
        clips = []
        for i in range(6):
            audio, video = np.ones((3 + i, 7), 'f4'), np.ones((2, 4), 'f4')
            features = dict(text='hello there', audio=audio, video=video)
            clips.append(dict(label=['joy', 'anger'][i % 2], features=features))
        (folder / f'CHERMA0723_{split}.pkl').write_bytes(pickle.dumps(clips))


def test_only_the_allowed_packages_are_imported():
    allowed = """
        torch transformers tokenizers safetensors huggingface_hub tqdm numpy sentencepiece
        matplotlib
    """
    paths = [p for p in HERE.rglob('*.py') if '.ci' not in p.parts]
    paths = [p for p in paths if p.parent.name != 'tests' and not p.name.startswith('test_')]
    ours = {p.stem for p in HERE.glob('*.py')} | {p.parent.name for p in HERE.glob('*/*.py')}
    assert len(paths) > 30
    for path in paths:
        text = path.read_text(encoding='utf-8')
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split('.')[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                found.add(node.module.split('.')[0])
        foreign = found - set(allowed.split()) - set(sys.stdlib_module_names) - ours
        assert not foreign, (path.name, foreign)
        assert '../shared' not in text, path.name


# --------------------------------------------------------------------------------------------------
# python -m pytest -q -s tests/test_trust.py::test_soak --soak: the long form, about 45 minutes


@pytest.mark.parametrize('name', KINDS)
def test_damaged_inputs_are_refused_or_change_nothing(name, corpora, curriculum, tmp_path):
    """The short form: a few inputs of each kind in tests/soak.py."""
    places = make_places(corpora, curriculum, tmp_path)
    _, failures = check(KINDS[name](places), SHORT.get(name, SHORT['others']), 0, places)
    assert not failures, '\n'.join(failures)


def test_soak(request, corpora, curriculum, tmp_path):
    """
    25 kills, 20,000 damaged pickles, 20,000 random flags and all damaged inputs of tests/soak.py; runs
    only with --soak.
    """
    if not request.config.getoption('soak'):
        pytest.skip('runs with --soak')
    print(f'{kill_at_random(corpora, curriculum, tmp_path, n=25, seed=1)} of 25 kills survived')
    from fakes import mutate_pickles, random_flags

    outcomes = mutate_pickles(tmp_path, 20_000, seed=2)
    print(
        f'{sum(outcomes.values())} of 20000 damaged pickles survived: {outcomes[True]} converted, '
        f'{outcomes[False]} refused with a sentence'
    )
    random_flags(20_000, seed=3)
    print('20000 of 20000 random flags survived')
    failures = []
    for name in KINDS:
        places = make_places(corpora, curriculum, tmp_path / name)
        n = LONG.get(name, LONG['others'])
        outcomes, failed = check(KINDS[name](places), n, 4, places)
        print(f'{n - len(failed)} of {n} inputs of the kind {name} survived: {dict(outcomes)}')
        failures += failed
    assert not failures, '\n'.join(failures)


# -------------------------------------------------------------------------------------------------
# Files of other origin, and a terminal that lacks letters


def test_a_folder_with_files_of_other_origin_is_left_alone(corpora, tmp_path):
    """ Also a file that is called almost like a leftover of a killed run. """
    (tmp_path / 'own').mkdir()
    for name in ('config.json', 'report.md', 'notes.new'):
        (tmp_path / 'own' / name).write_text(name)
    argv = ('config/av_toy.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/own', *TINY)
    with pytest.raises(SystemExit, match='own holds a config.json, but neither a checkpoint'):
        train(*argv, '--fresh=True')
    (tmp_path / 'own' / 'config.json').unlink()
    with pytest.raises(SystemExit, match='own holds a report.md, but neither a checkpoint'):
        train(*argv)
    (tmp_path / 'own' / 'report.md').unlink()
    train(*argv)
    assert (tmp_path / 'own' / 'notes.new').read_text() == 'notes.new'


def test_texts_that_the_terminal_lacks_are_printed_as_escapes(tmp_path):
    rows = [f'v{i}$_$0,ok,{feeling}' for i in range(9) for feeling in ('愤怒', '高兴')]
    rows = [row.replace('$_$0', f'$_${i % 2}') for i, row in enumerate(rows)]
    (tmp_path / 'zh.csv').write_text('id,text,emotion\n' + '\n'.join(rows), encoding='utf-8')
    done = subprocess.run(
        [sys.executable, HERE / 'data.py', 'zh.csv', '--split=60/20/20', '--name=zh'], cwd=tmp_path,
        capture_output=True, text=True, env=ENV | dict(PYTHONIOENCODING='ascii'))
    assert done.returncode == 0, done.stderr
    assert '\\u6124\\u6012' in done.stdout and (tmp_path / 'data' / 'zh' / 'meta.json').exists()
