"""
dtype='auto' on the CPU: bfloat16 where the CPU has a unit for it and a layer of the frozen LM is
faster by it. No test depends on a time.

    python -m pytest -q tests/test_machine.py
"""
import pytest
import torch

from configurator import declared_knobs, run_knobs
from fakes import HERE
from model import SYSTEMS
from run import machine
from run.machine import bfloat16_unit, choose_device, faster_dtype, linear_seconds

FASTER, SLOWER = {torch.float32: 0.042, torch.bfloat16: 0.02}, {torch.float32: 2, torch.bfloat16: 2}


@pytest.mark.parametrize(
    ('float32', 'bfloat16', 'dtype'),
    [(3.0, 1.0, 'bfloat16'), (1.5, 1.0, 'bfloat16'), (1.4, 1.0, 'float32'), (1.0, 2.0, 'float32')],
)
def test_bfloat16_must_be_faster_by_half(float32, bfloat16, dtype):
    assert faster_dtype(float32, bfloat16) == dtype


def choice(monkeypatch, unit='AMX', width=640, seconds=FASTER, n_bytes=1e6, dtype='auto'):
    """ What choose_device takes on a CPU with this unit, for an LM that takes these seconds. """
    monkeypatch.setattr(machine, 'bfloat16_unit', lambda: unit)
    monkeypatch.setattr(machine, 'width_of_lm', lambda k: width)
    monkeypatch.setattr(machine, 'linear_seconds', lambda width, batch_size, dtype: seconds[dtype])
    k = dict(compile=False, batch_size=32)
    return choose_device('cpu', dtype, lambda k: n_bytes, k)


def test_auto_says_what_it_measured_and_took(monkeypatch, capsys):
    assert choice(monkeypatch) == ('cpu', 'bfloat16')
    assert capsys.readouterr().out == (
        "  bfloat16: a linear layer of this LM's width is 2.1 times as fast in bfloat16 as in "
        "float32 on this CPU (AMX)\n"
    )
    assert choice(monkeypatch, seconds=SLOWER) == ('cpu', 'float32')
    assert "  float32: a linear layer of this LM's width is 1.0 times" in capsys.readouterr().out


@pytest.mark.parametrize(
    'why', [dict(unit=None), dict(width=511), dict(n_bytes=0), dict(dtype='float32')], ids=str
)
def test_nothing_is_measured_where_float32_is_certain(why, monkeypatch, capsys):
    """ No unit, a narrow LM, no frozen LM, or a named dtype. Without seconds, measuring fails. """
    assert choice(monkeypatch, seconds={}, **why) == ('cpu', 'float32')
    assert capsys.readouterr().out == ''


def test_the_unit_is_read_from_the_flags_of_the_cpu(tmp_path):
    def unit(flags):
        (tmp_path / 'cpuinfo').write_text(f'processor : 0\nflags\t\t: fpu {flags} sse2\n')
        return bfloat16_unit(tmp_path / 'cpuinfo')

    assert unit('avx512_bf16 amx_bf16 amx_tile') == 'AMX'
    assert unit('avx512_bf16') == 'AVX512-BF16'
    assert unit('avx512f amx_int8') is None
    assert bfloat16_unit(tmp_path / 'absent') is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_measurement_draws_no_random_number(dtype):
    before = torch.get_rng_state()
    assert linear_seconds(64, 2, dtype) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_the_lms_of_the_toy_configs_are_too_narrow_to_be_measured():
    """ Their recorded results are those of float32, on every machine. """
    known = declared_knobs(HERE / 'train.py')
    configs = (HERE / 'config').glob('lm_toy*.py')
    widths = [run_knobs([str(path)], *known, SYSTEMS)[1]['lm_width'] for path in configs]
    assert len(widths) == 4 and max(widths) < machine.LEAST_WIDTH
