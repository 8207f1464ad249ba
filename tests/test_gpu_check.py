"""
tools/gpu_check.py, rehearsed on the CPU with one small system.

    python -m pytest -q tests/test_gpu_check.py
"""

import runpy
import sys

import pytest

import model
from fakes import HERE
from tools.device_time import by_kind


def section(name, folder, monkeypatch):
    """ A section of tools/gpu_check.py on MSE-Adapter alone -> its exit status. """
    monkeypatch.setattr(model, 'SYSTEMS', {'mse': model.MSEAdapterLM})
    argv = ['gpu_check.py', name, '--rehearse', f'--scratch={folder}']
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(HERE / 'tools' / 'gpu_check.py'), run_name='__main__')
    return stopped.value.code


@pytest.mark.parametrize('name', ['parity', 'training'])
def test_a_section_passes_on_the_cpu(name, tmp_path, monkeypatch, capsys):
    assert section(name, tmp_path, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith('  ok') for line in lines if 'mse on' in line] == [True, True]


def test_a_trained_weight_that_does_not_move_fails(tmp_path, monkeypatch, capsys):
    def forward(self, batch):
        out = PARENT.forward(self, batch)
        return out | dict(loss=out['loss'] * 0)

    PARENT = model.PseudoTokenLM
    monkeypatch.setattr(model.MSEAdapterLM, 'forward', forward, raising=False)
    assert section('training', tmp_path, monkeypatch) == 1
    assert 'FAILED' in capsys.readouterr().out


def test_kernels_are_counted_by_kind():
    kernels = {'sm90_gemm_bf16': 3.0, 'fmha_cutlassF_bf16': 0.5, 'vectorized_elementwise': 0.5}
    assert by_kind(kernels) == 'matmul 75 %, attention 12 %, elementwise 12 %'
