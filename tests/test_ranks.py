"""
Distributed training: torchrun with 2 processes, on the CPU with gloo, compared with the same run in
one process.

    python -m pytest -q tests/test_ranks.py
"""

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

from configurator import declared_knobs, run_knobs
from fakes import HERE, deepmlf, killed_in_batch, torchrun, train
from model import SYSTEMS

OLD = tuple(map(int, torch.__version__.split('.')[:2])) < (2, 7)
no_fsdp = pytest.mark.skipif(OLD, reason="FSDP2 of torch 2.6 needs a GPU")
# 8 micro-batches an epoch in steps of 3, 3 and 2; 2 processes share them 2 + 1, 2 + 1, 1 + 1
UNEVEN = ['--accumulate=3', '--save_interval=2']


def read_log(folder):
    with open(folder / 'log.jsonl') as f:
        return [json.loads(line) for line in f]


def read_result(folder):
    return json.loads((folder / 'result.json').read_text())


def assert_close_runs(a, b, gap=1e-5):
    """Run folder a, of one process, and b, of two, have nearly equal weights, logs and metrics."""
    for kind in ('best', 'last'):
        x, y = load_file(a / f'{kind}.safetensors'), load_file(b / f'{kind}.safetensors')
        assert x.keys() == y.keys()
        for k in x:
            if k.endswith('qkv.bias'):
                # A bias of keys shifts all attention logits of a query equally, so its gradient is
                # 0 up to rounding, and AdamW turns the rounding into steps of full size.
                keys = slice(len(x[k]) // 3, 2 * len(x[k]) // 3)
                torch.testing.assert_close(x[k][keys], y[k][keys], atol=10 * gap, rtol=0)
                x[k][keys] = y[k][keys]
            torch.testing.assert_close(x[k], y[k], atol=gap, rtol=gap)
    # only rank 0 writes the log, for the clips of all ranks
    for one, other in zip(read_log(a), read_log(b), strict=True):
        assert one['step'] == other['step']
        for k, v in one.get('train', {}).items():
            assert other['train'][k] == pytest.approx(v, abs=1e-4)
    one, other = read_result(a), read_result(b)
    for split in ('valid', 'test'):
        assert other[split] == pytest.approx(one[split], abs=1e-5, nan_ok=True)
    assert other['about']['processes'] == 2 and other['lm_kept']
    assert one['about']['lm_fingerprint'] == other['about']['lm_fingerprint']


@pytest.fixture(scope='module')
def alone(corpora, curriculum):
    train(*deepmlf(corpora, curriculum, 'alone', *UNEVEN))
    return curriculum


@pytest.mark.parametrize(
    'more', [[], pytest.param(['--shard_lm=node'], marks=no_fsdp)], ids=['DDP', 'FSDP2']
)
def test_two_processes_train_the_same_model_as_one(more, corpora, alone):
    """With dropout, SeqAug, an uneven last step and a rank that gets no micro-batch."""
    name = 'two' + '-'.join(more)
    status, printed = torchrun(*deepmlf(corpora, alone, name, *UNEVEN, *more))
    assert status == 0, printed[-8000:]
    assert printed.count('Best possible mae: ') == 1  # only one rank prints the report
    assert_close_runs(alone / 'alone', alone / name)


def test_a_run_resumes_with_another_number_of_processes(corpora, alone):
    with killed_in_batch(14):
        train(*deepmlf(corpora, alone, 'grown', *UNEVEN))
    # free the lock, which this process holds and a killed one would not: in POSIX, closing any
    # handle of the file frees it
    open(alone / 'grown' / '.lock').close()
    status, printed = torchrun(*deepmlf(corpora, alone, 'grown', *UNEVEN, '--resume=True'))
    assert status == 0, printed[-8000:]
    assert_close_runs(alone / 'alone', alone / 'grown')


def commands_to_run_first(printed):
    """The arguments of train.py for each prerequisite that the error message of a run names."""
    assert 'train.py", line' not in printed, printed[-8000:]  # no traceback
    refused = 'prerequisites are not trained under torchrun: run first '
    (sentence,) = re.findall(rf'^\w+: {refused}(.+)', printed, re.M)  # one process prints it
    commands = [shlex.split(command) for command in sentence.split(' and ')]
    assert all(words[:2] == ['python', 'train.py'] for words in commands)
    return [words[2:] for words in commands]


def test_torchrun_names_the_command_of_a_missing_prerequisite(tmp_path):
    """
    Under torchrun, a run with an unfinished prerequisite trains nothing and prints the command that
    trains it. That command works with two processes, where the LM's tokenizer and the corpus are
    made once. Afterwards the first run works.
    """
    mse = ['config/mse_toy.py', f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out/r']
    mse += ['--max_steps=2', '--batch_size=8', '--device=cpu']
    status, printed = torchrun(*mse)
    assert status == 1 and not (tmp_path / 'out').exists()
    (needed,) = commands_to_run_first(printed)
    status, printed = torchrun(*needed)
    assert status == 0, printed[-8000:]
    assert read_result(tmp_path / 'out' / 'lm_toy_rated-steps2')['about']['processes'] == 2
    status, printed = torchrun(*mse)
    assert status == 0, printed[-8000:]
    assert 'some are idle' in printed and 'using the finished prerequisite' in printed


def test_torchrun_names_the_commands_of_all_missing_prerequisites(corpora, tmp_path):
    """
    The commands are quoted for a shell and set the knobs that the run needs. No process is aborted
    when it stops.
    """
    run = ['config/deepmlf_toy.py', f'--data_dir={corpora}', f'--out_dir={tmp_path}/r']
    status, printed = torchrun(*run, '--device=cpu')
    assert status == 1 and not list(tmp_path.iterdir())
    assert 'exitcode: -6' not in printed
    common = declared_knobs(HERE / 'train.py')
    for words, config in zip(commands_to_run_first(printed), ('lm_toy', 'av_toy'), strict=True):
        assert words[0] == str(HERE / 'config' / f'{config}.py')
        _, k = run_knobs(words, *common, SYSTEMS)
        assert k['out_dir'] == f'{tmp_path}/{config}' and k['device'] == 'cpu'
        assert k['modalities'] == ['audio', 'vision'] and k['data_dir'] == str(corpora)


@pytest.mark.parametrize('ending, aborted', [('sys.exit(0)', True), ('ranks.end_process(0)', False)])
def test_a_rank_is_not_aborted_when_it_ends_while_a_thread_waits_for_the_interpreter(
    ending, aborted, tmp_path
):
    """
    After rank 0's last line, gloo's thread drops the last reference to a tensor of Python. At the
    normal end of Python, the main thread computes for seconds without giving up the interpreter
    lock, so the other thread still waits for the lock when Python finalizes. That aborts the process.
    """
    (tmp_path / 'worker.py').write_text(f"""
import atexit
import math
import os
import sys
import time
ending = {str(tmp_path / 'ending')!r}
if os.environ['RANK'] == '0':
    atexit.register(math.factorial, 400_000)   # registered first, so it runs last
    atexit.register(open, ending, 'w')         # runs just before
sys.path[:0] = [{str(HERE)!r}]
import torch
import torch.distributed as dist
from run import ranks
ranks.start()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
model(torch.ones(1, 4)).sum().backward()
def begin():
    x = torch.ones(4)
    x.mark = 'a tensor that Python knows'
    dist.all_reduce(x, async_op=True)
if ranks.RANK == 0:
    begin()
    {ending}
until = time.time() + 4
while not os.path.exists(ending) and time.time() < until:
    time.sleep(0.01)
try:
    dist.all_reduce(torch.ones(4))
except RuntimeError:   # rank 0 has ended already
    pass
ranks.end_process(0)
""")
    status, printed = torchrun(tmp_path / 'worker.py')
    assert ('exitcode: -6' in printed) == aborted, printed[-8000:]
    assert (status == 0) != aborted, printed[-8000:]


@no_fsdp
def test_two_ranks_store_half_of_a_sharded_lm_each_and_compute_the_same(tmp_path):
    """ Also LoRA on Phi-3's gate and up, rows of one matrix that FSDP gathers when it is called. """
    (tmp_path / 'worker.py').write_text(f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE / 'tests')!r}]
import torch
from adapters import LoRAFFW
from fakes import tiny_lm
from lm import FrozenLM
from run import ranks
ranks.start()
lm = FrozenLM(tiny_lm('llama'))
tokens = torch.arange(12)[None] % 50
def size():
    weights = [p for layer in lm.parts['layers'] for p in layer.parameters()]
    return sum((p.to_local() if hasattr(p, 'to_local') else p).numel() for p in weights)
whole, before, print_ = lm(tokens), size(), lm.fingerprint()
ranks.shard(lm, 'all', 'cpu')
assert 0.4 < size() / before < 0.6, size() / before
torch.testing.assert_close(lm(tokens), whole)
assert 0.4 < size() / before < 0.6 and lm.fingerprint() == print_

lm = FrozenLM(tiny_lm('phi3'))
torch.manual_seed(0)
lora, x = LoRAFFW(lm.ffw(0), 2, 4), torch.randn(2, 3, 32)
torch.nn.init.normal_(lora.up.B)
whole = lora(x, lm.ffw(0))
ranks.shard(lm, 'all', 'cpu')
torch.testing.assert_close(lora(x, lm.ffw(0)), whole)
""")
    status, printed = torchrun(tmp_path / 'worker.py')
    assert status == 0, printed[-8000:]


def test_wrong_numbers_of_processes_stop_with_a_sentence(corpora, tmp_path):
    status, printed = torchrun(
        'config/baseline_selfmm.py',
        f'--data_dir={corpora}',
        f'--out_dir={tmp_path}/s',
        '--max_steps=1',
        '--device=cpu',
    )
    assert status and printed.count('train it in one process') == 1
    with pytest.raises(SystemExit, match='use torchrun'):
        train('config/mse_toy.py', '--shard_lm=all', f'--out_dir={tmp_path}/t')
