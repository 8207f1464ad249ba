"""
Writes a run's folder while it trains: config.json, log.jsonl and checkpoints. Of several processes
only rank 0 writes.
"""
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time

import numpy as np
import torch
import transformers

from run import ranks
from run.clips import corpus_facts, holds_copy
from run.errors import ModelError
from run.fingerprints import sample_logits, tokenizer_fingerprint
from run.finished import FORMAT, RUN_KNOBS, is_same_value
from run.folder import (
    REMOVED,
    ROOT,
    load_checkpoint,
    load_tensors,
    lock,
    open_regular,
    own_tensors,
    remove_leftovers,
    save_checkpoint,
    write_text,
)
from run.forms import check_about, check_log_line, read_header
from run.json_files import parsed, shorten

LONGEST_LINE = 2 ** 20   # bytes of a line of log.jsonl; a longer one is damaged


def describe_run(name, knobs, feed, model, tokenizer, device, dtype, lm_fingerprint):
    """ The description of a run that config.json, every checkpoint and result.json hold. """
    return dict(
        format=FORMAT, name=name, command=shlex.join(['python', 'train.py', *sys.argv[1:]]),
        knobs=knobs, commit=git('rev-parse', '--short', 'HEAD'),
        dirty=bool(git('status', '--porcelain', '--', '*.py')),
        versions=dict(python=platform.python_version(), torch=torch.__version__,
                      numpy=np.__version__, transformers=transformers.__version__),
        device=device, dtype=dtype, threads=torch.get_num_threads(), processes=ranks.N_RANKS,
        matmul_gflops=round(matmul_rate(), 1), corpus=corpus_facts(feed.corpus),
        first_word=feed.first_word, lm_fingerprint=lm_fingerprint,
        lm_answer=sample_logits(model.lm) if model.lm else None,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer) if tokenizer else None)


def matmul_rate(n=1024):
    """ The float32 matmul rate of this machine now, in GFLOP/s, to compare times of machines. """
    a, seconds = torch.randn(n, n), []  # [n,n]
    for _ in range(6):
        since = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - since)
    return 2 * n ** 3 / min(seconds) / 1e9


def norm_of(tensors):
    """ The Euclidean norm of all values of the tensors together. """
    return float(torch.stack([t.detach().float().norm() for t in tensors]).norm())


def git(*argv):
    """ The output of a git command in this repository; '' if there is no git. """
    command = ['git', '-C', ROOT, *argv]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ''


def refuse_other_knobs(folder, before, knobs, filled_in=()):
    """
    Raises ModelError if a run cannot be resumed with `knobs`, because they differ from those of its
    checkpoint.
    `before` is describe_run's dict in the checkpoint. Knobs in `filled_in` are not compared: they
    name prerequisites, and are set to the folders of these later.
    """
    if before.get('format') != FORMAT:
        raise ModelError(f"{folder} was written by another version (format {before.get('format')}, "
                         f"and this is {FORMAT}): check out that version to resume it.")
    try:
        check_about(before)
    except ValueError as e:
        raise ModelError(f"the checkpoint in {folder} is damaged ({e}): restore a copy, or train the "
                         "run again with --fresh=True.") from None
    if other := sorted(set(knobs) ^ set(before['knobs'])):
        raise ModelError(f"{folder} was written by another version, which differs in the knob "
                         f"{other[0]}: check out {before['commit']} to resume it, or start over with "
                         "--fresh=True.")
    for knob, value in knobs.items():
        old_value = before['knobs'].get(knob)
        compared = knob not in RUN_KNOBS and knob not in filled_in
        if not compared or is_same_value(old_value, value):
            continue
        if knob != 'corpus' or not holds_copy(before['corpus'], value):
            raise ModelError(f"{folder} was trained with {knob}={old_value!r}, not {value!r}: "
                             "resume it with the same knobs, or give another --out_dir.")


def refuse_other_run(folder, before, now):
    """
    Raises ModelError if a run cannot be resumed: its checkpoint has other knobs, another corpus, LM
    or tokenizer. `before` and `now` are describe_run's dicts, in the checkpoint and of this process.
    """
    refuse_other_knobs(folder, before, now['knobs'])
    former, present = before['corpus'], now['corpus']
    for what, a, b in (
            ('corpus file', former['sha256'], present['sha256']),
            ('conversion of its corpus file', former['contents'], present['contents']),
            ('LM', before['lm_fingerprint'], now['lm_fingerprint']),
            ('tokenizer', before['tokenizer_fingerprint'], now['tokenizer_fingerprint'])):
        if a != b:
            raise ModelError(f"{folder} was trained with another {what} than the present one: "
                             "restore the former one, or give another --out_dir.")


def lock_run(folder, stop):
    """
    Makes and locks the folder of a run -> the lock, which is held while this object lives; None in
    other ranks than 0. stop(sentence) ends the run if another one holds the lock. Raises OSError.
    """
    if ranks.RANK:
        return None
    os.makedirs(folder, exist_ok=True)
    held = lock(folder)
    if held is None:
        stop(f"another run is writing into {folder}: wait for it, or give another --out_dir.")
    return held


def refuse_other_moments(path, saved, named, average):
    """
    Raises ModelError unless the tensors of a `last` checkpoint that are not the model's are those
    that this run would have saved. A fused optimizer step checks no shape: with moments smaller
    than their weight it reads and writes memory behind them.
    saved: name -> tensor; named: name -> trainable weight.
    """
    wanted = {f'average.{name}': mean for name, mean in average.mean.items()}
    for name, p in named.items():
        wanted[f'optimizer.{name}.step'] = torch.zeros((), dtype=torch.float32)
        wanted |= {f'optimizer.{name}.{key}': p for key in ('exp_avg', 'exp_avg_sq')}
    found = {k: v for k, v in saved.items() if not k.startswith('model.')}
    for name in sorted(set(wanted) | set(found)):
        is_step = name.startswith('optimizer.') and name.endswith('.step')
        if name not in found:
            wrong = "lacks"
        elif name not in wanted:
            wrong = "should not have"
        elif (found[name].shape, found[name].dtype) != (wanted[name].shape, wanted[name].dtype):
            v, p = found[name], wanted[name]
            wrong = f"has a {v.dtype} {list(v.shape)} and not a {p.dtype} {list(p.shape)} as"
        elif is_step and not 0 <= float(found[name]) < math.inf:
            wrong = f"has {float(found[name])} as"
        else:
            continue
        raise ModelError(f"{path} is damaged or of another run (it {wrong} {shorten(name, 100)}): "
                         "restore a copy, or train the run again with --fresh=True.")


def resume_from(path, about, model, named, optimizer, average, n_steps):
    """
    Load a `last` checkpoint into the model, the optimizer and the average of the weights. named:
    name -> trainable weight. n_steps: of the whole run. Returns the run's state and describe_run's
    dict from the checkpoint. In `about`, the knobs get the spelling of the checkpoint's. Raises
    ModelError if the checkpoint is damaged or of another run than `about`.
    """
    info = read_header(path)
    saved, _ = load_checkpoint(path)
    folder = os.path.dirname(path)
    refuse_other_run(folder, info['about'], about)
    step = info['state']['step']   # n_steps follows from the knobs and the corpus, which are equal
    if not 0 <= step <= n_steps:
        raise ModelError(f"{path} is damaged (it is of step {step}, and the run has {n_steps}): "
                         "restore a copy, or train the run again with --fresh=True.")
    refuse_other_moments(path, saved, named, average)
    former = {k: v for k, v in info['about']['knobs'].items() if k not in RUN_KNOBS}
    about['knobs'] = about['knobs'] | former   # they may be other paths of the same files
    own = {k.removeprefix('model.'): v for k, v in saved.items() if k.startswith('model.')}
    load_tensors(model, own, folder)
    for name, p in named.items():
        moments = {k: saved[f'optimizer.{name}.{k}'] for k in ('step', 'exp_avg', 'exp_avg_sq')}
        optimizer.state[p] = {k: v.to(p.device) for k, v in moments.items()}
    for name, mean in average.mean.items():
        mean.copy_(saved[f'average.{name}'])
    return info['state'], info['about']


def lines_until(path, step):
    """
    The lines of a log.jsonl up to a step. Lines that are damaged are left out: a killed run may
    have written its last one only in part. Raises OSError.
    """
    if not os.path.lexists(path):
        return []
    kept = []
    with open_regular(path, 'rb') as f:
        for line in iter(lambda: f.readline(LONGEST_LINE), b''):
            try:
                entry = parsed(line.decode())
                check_log_line(entry)
            except ValueError:
                continue
            if entry['step'] <= step:
                kept.append(json.dumps(entry) + '\n')
    return kept


class Record:
    """ Locks a run's folder and writes its log and checkpoints. stop(sentence) ends the run. """

    def __init__(self, folder, about, stop):
        self.folder, self.about, self.stop = folder, about, stop
        self.log_path = os.path.join(folder, 'log.jsonl')
        self.file = None

    def open(self, step, resume, fresh):
        """
        Lock the folder and remove files that a former run left and that this run makes invalid. Log
        lines after `step` are removed, because those steps will run again.
        """
        if ranks.RANK:
            return
        try:
            self.lock = lock_run(self.folder, self.stop)
            remove_leftovers(self.folder)
            for file in REMOVED if fresh else REMOVED[:3]:
                if os.path.exists(os.path.join(self.folder, file)):
                    os.remove(os.path.join(self.folder, file))
            write_text(os.path.join(self.folder, 'config.json'), json.dumps(self.about, indent=1))
            lines = lines_until(self.log_path, step) if resume else []
            write_text(self.log_path, ''.join(lines))
            self.file = open(self.log_path, 'a', encoding='utf-8', buffering=1)
        except OSError as e:
            self.stop(f"cannot write to {self.folder} ({e.strerror}): free disk space, or give "
                      "another --out_dir.")

    def log(self, **entry):
        """ Write a line of log.jsonl. """
        if ranks.RANK:
            return
        try:
            self.file.write(json.dumps(entry) + '\n')
        except OSError as e:
            self.stop(f"cannot write {self.log_path} ({e.strerror}): free disk space; "
                      "--resume=True continues from the last checkpoint.")

    def save_best(self, model, state):
        """ Save the tensors that evaluation needs. """
        self._save('best', own_tensors(model), state)

    def save_last(self, model, named, optimizer, state, average):
        """
        Save what resuming needs: the model's tensors, the optimizer's moments, the mean weights.
        """
        tensors = {f'model.{key}': v for key, v in own_tensors(model).items()}
        for name, p in named.items():
            for key, v in optimizer.state.get(p, {}).items():
                tensors[f'optimizer.{name}.{key}'] = v
        tensors |= {f'average.{name}': mean for name, mean in average.mean.items()}
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
