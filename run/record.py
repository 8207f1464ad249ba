"""
What a run writes down while it trains: what it is, its log, and its checkpoints. Rank 0 of several
processes writes.
"""
import json
import os
import platform
import shlex
import subprocess
import sys
import time

import numpy as np
import torch
import transformers

from lm import ModelError
from run import ranks
from run.clips import corpus_facts
from run.folder import (
    load_checkpoint,
    load_tensors,
    lock,
    open_regular,
    own_tensors,
    remove_leftovers,
    save_checkpoint,
    write_text,
)
from run.load_lm import tokenizer_fingerprint
from run.report import FORMAT, RUN_KNOBS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def describe_run(name, knobs, corpus, model, tokenizer, device, dtype, lm_fingerprint):
    """ What a run is: goes into config.json, every checkpoint and result.json. """
    return dict(
        format=FORMAT, name=name, command=shlex.join(['python', 'train.py', *sys.argv[1:]]), knobs=knobs,
        commit=git('rev-parse', '--short', 'HEAD'), dirty=bool(git('status', '--porcelain', '--', '*.py')),
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                      transformers=transformers.__version__),
        device=device, dtype=dtype, threads=torch.get_num_threads(), processes=ranks.N_RANKS,
        matmul_gflops=round(matmul_rate(), 1), corpus=corpus_facts(corpus), lm_fingerprint=lm_fingerprint,
        lm_answer=model.lm.answer() if model.lm else None,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer else None)


def matmul_rate(n=1024):
    """ This machine's float32 matmul rate now, GFLOP/s: a wall time means little without it. """
    a, seconds = torch.randn(n, n), []  # [n,n]
    for _ in range(6):
        since = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - since)
    return 2 * n ** 3 / min(seconds) / 1e9


def norm_of(tensors):
    """ The Euclidean norm of all numbers of some tensors. """
    return float(torch.stack([t.detach().float().norm() for t in tensors]).norm())


def git(*argv):
    """ What git prints of this checkout; '' where there is no git. """
    try:
        return subprocess.run(['git', '-C', ROOT, *argv], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ''


def refuse_other_knobs(folder, before, knobs, filled_in=()):
    """
    Raises ModelError where the knobs of a run that goes on are not those of `before`, describe_run's
    dict of its checkpoint. `filled_in`: knobs that name a prerequisite, whose folder comes later.
    """
    if before.get('format') != FORMAT:
        raise ModelError(f"{folder} was written by another version (format {before.get('format')}, "
                         f"and this is {FORMAT}): check out that version to go on with it.")
    for knob, value in knobs.items():
        theirs = before['knobs'].get(knob)
        if knob not in RUN_KNOBS and knob not in filled_in and theirs != value:
            raise ModelError(f"{folder} was trained with {knob}={theirs!r}, not {value!r}: resuming "
                             "goes on with the same run, so give another --out_dir.")


def refuse_other_run(folder, before, now):
    """
    Raises ModelError where a run cannot go on as `now`: `before` and `now` are describe_run's, of
    the checkpoint and here.
    """
    refuse_other_knobs(folder, before, now['knobs'])
    for what, a, b in (('corpus file', before['corpus']['sha256'], now['corpus']['sha256']),
                       ('LM', before['lm_fingerprint'], now['lm_fingerprint'])):
        if a != b:
            raise ModelError(f"{folder} was trained on another {what} than is there now: put that "
                             "one back, or give another --out_dir.")


def resume_from(path, about, model, named, optimizer):
    """
    Puts a `last` checkpoint into the model and the optimizer of its trained weights `named`. Returns
    its state and describe_run's dict of then. Raises ModelError where it is damaged or of another run
    than `about`.
    """
    saved, info = load_checkpoint(path)
    folder = os.path.dirname(path)
    refuse_other_run(folder, info['about'], about)
    own = {k.removeprefix('model.'): v for k, v in saved.items() if k.startswith('model.')}
    load_tensors(model, own, folder)
    for name, p in named.items():
        moments = {k: saved.get(f'optimizer.{name}.{k}') for k in ('step', 'exp_avg', 'exp_avg_sq')}
        optimizer.state[p] = {k: v.to(p.device) for k, v in moments.items()}
    return info['state'], info['about']


class Record:
    """
    The folder of a run while it trains: locked, with its log and its checkpoints. `stop(sentence)`
    ends the run.
    """

    def __init__(self, folder, about, stop):
        self.folder, self.about, self.stop = folder, about, stop
        self.log_path = os.path.join(folder, 'log.jsonl')
        self.file = None

    def open(self, step, resume, fresh):
        """
        Makes the folder this run's own. Lines of the log of steps that will be run again are gone.
        """
        if ranks.RANK:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = lock(self.folder)   # held as long as this object is
            if self.lock is None:
                self.stop(f"another run is writing into {self.folder}: wait for it, or give another "
                          "--out_dir.")
            remove_leftovers(self.folder)
            # result.json and report.md say that a run is finished, so they go while this one is
            # not; and a fresh start has no past
            past = 'last.safetensors last.json best.safetensors best.json test.jsonl curve.png'.split()
            for old in ['result.json', 'report.md'] + (past if fresh else []):
                if os.path.exists(os.path.join(self.folder, old)):
                    os.remove(os.path.join(self.folder, old))
            write_text(os.path.join(self.folder, 'config.json'), json.dumps(self.about, indent=1))
            lines = open_regular(self.log_path).readlines() if resume and os.path.lexists(self.log_path) else []
            # a line that was being written when the run was killed goes too
            lines = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step]
            write_text(self.log_path, ''.join(lines))
            self.file = open(self.log_path, 'a', encoding='utf-8', buffering=1)
        except OSError as e:
            self.stop(f"cannot write to {self.folder} ({e.strerror}): make room, or give another "
                      "--out_dir.")

    def log(self, **entry):
        """ A line of log.jsonl. """
        if ranks.RANK:
            return
        try:
            self.file.write(json.dumps(entry) + '\n')
        except OSError as e:
            self.stop(f"cannot write {self.log_path} ({e.strerror}): make room; --resume=True goes "
                      "on from the last checkpoint.")

    def save_best(self, model, state):
        """ What evaluation needs. """
        self._save('best', own_tensors(model), state)

    def save_last(self, model, named, optimizer, state):
        """
        What resuming needs: the model, and the optimizer's moments of its trained weights `named`.
        """
        tensors = {f'model.{key}': v for key, v in own_tensors(model).items()}
        for name, p in named.items():
            tensors |= {f'optimizer.{name}.{key}': v for key, v in optimizer.state.get(p, {}).items()}
        self._save('last', tensors, state)

    def _save(self, kind, tensors, state):
        if ranks.RANK:
            return
        try:
            path = os.path.join(self.folder, f'{kind}.safetensors')
            save_checkpoint(path, tensors, dict(about=self.about, state=state))
        except ModelError as e:
            self.stop(str(e))

    def close(self):
        if self.file:
            self.file.close()
