"""
A paper's table as one command.

    python tools/sweep.py config/sweeps/deepmlf.py                the tables that there are
    python tools/sweep.py config/sweeps/deepmlf.py --table=11     on the toy corpus, 3 seeds
    python tools/sweep.py config/sweeps/deepmlf.py --table=11 --config=config/deepmlf_mosei.py
                    --corpus=unaligned_50.pkl --seeds=5 --jobs=4        on another

A table is a list of (row, knob changes, what the paper has there). Each row is trained for each
seed by train.py, in a folder of its own under out/sweeps/; what is finished is skipped, what was
cut off goes on, what fails is reported and the rest goes on. Flags of train.py go to every row
whose system has such a knob. A row with at_test=[..] is not trained: the first row's runs meet the
test set with these modalities only.

What may be claimed (README): a row beats another if both have at least 3 seeds, the 95 % interval
of their paired difference over clips and seeds excludes 0, and everything was chosen on validation,
which is all that train.py can choose by (of many rows, one in forty looks better by luck: intervals
are not corrected for how many there are). The table has a row in bold where it beats the first row
by this rule, or is the first and beats all others; nothing else is bold.
"""
import hashlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from configurator import declared_knobs, parse_flags, run_knobs
from data import CorpusError
from eval import load_run
from lm import ModelError
from metrics import SHOWN, claim, markdown_table, mean_std_n, score_by
from model import SYSTEMS
from run.folder import lock, write_text
from run.report import RUN_KNOBS, EvalError, read_predictions, read_run

ROOT = str(Path(__file__).resolve().parent.parent)
FLAGS = dict(table='', seeds='3', jobs='', config='', out='out/sweeps')
# what a sweep sets itself for each run
OWN = {'seed', 'out_dir', 'resume', 'fresh', 'needs'}
# may differ between equal runs
FREE = RUN_KNOBS | OWN
# the knobs that every run has: of no system
COMMON, ANNOTATIONS = declared_knobs(os.path.join(ROOT, 'train.py'))


def text(value):
    """ A knob's value as it stands on a command line. """
    if isinstance(value, (list, tuple)):
        return ','.join(map(str, value)) or '[]'
    return str(value)


def resolve(path):
    """ A path as it is, or inside this repository. """
    return path if os.path.exists(path) else os.path.join(ROOT, path)


def stem_of(path):
    """ 'a/b.py' -> 'b'. """
    return os.path.splitext(os.path.basename(path))[0]


def as_flags(knobs):
    """ Knobs as a command line. """
    return [f'--{k}={text(v)}' for k, v in knobs.items()]


def knobs_of_run(config, knobs):
    """ All knobs of the run that a config and some knobs describe. """
    return run_knobs([resolve(config), *as_flags(knobs)], COMMON, ANNOTATIONS, SYSTEMS)[1]


def settings_of_row(config, short, changes, flags):
    """ What a row's runs have beside their config: short settings and flags as far as its system
    has such knobs, and the row's own changes between the two. """
    deciding = {k: v for k, v in flags.items() if k in ('system', 'dataset')}
    known = knobs_of_run(config, changes | deciding)
    short = {k: v for k, v in short.items() if k in known}
    return short | changes | {k: v for k, v in flags.items() if k in known}


class Run:
    """ One row and seed: its folder, its command, and how it went. Rows of equal settings are one
    run, in whatever table. """
    def __init__(self, folder, label, config, settings, seed):
        self.label = label
        self.seed = seed
        self.failed = ''
        self.process = None
        self.wanted = knobs_of_run(config, settings)
        settings = {k: text(self.wanted[k]) for k in settings}
        marked = json.dumps([config, settings], sort_keys=True)
        mark = hashlib.sha256(marked.encode()).hexdigest()[:6]
        self.folder = os.path.join(folder, f'{stem_of(config)}-{mark}-seed{seed}')
        self.command = ['train.py', config, f'--out_dir={self.folder}', f'--seed={seed}']
        self.command += as_flags(settings)
        # Its prerequisites are trained beside it, before its own config.json is there: two runs of
        # one seed must not make the same one at the same time.
        self.stands_on = {(seed, need) for need in self.wanted['needs']}

    def has(self, name):
        """ True if there is such a file in its folder. """
        return os.path.exists(os.path.join(self.folder, name))

    def finished(self):
        """ True if its result is there. Raises EvalError where train.py or the config has changed
        since. """
        if not self.has('result.json'):
            return False
        theirs = read_run(self.folder)['about']['knobs']
        needs = [stem_of(need) for need in self.wanted['needs']]
        for k, v in self.wanted.items():
            if k in FREE or v in needs:   # train.py puts the folder of a prerequisite in its place
                continue
            was, now = text(theirs.get(k)), text(v)
            if was != now:
                raise EvalError(f"{self.folder} was trained with {k}={was}, and it would be "
                                f"{now} now: remove it, or give another --out.")
        return True

    def start(self, slot, threads):
        """ Trains it in a process of its own, on one of several GPUs, if there are any. """
        self.slot = slot
        os.makedirs(os.path.dirname(self.folder), exist_ok=True)
        argv = [sys.executable, os.path.join(ROOT, self.command[0]), *self.command[1:]]
        if self.has('last.safetensors'):
            argv.append('--resume=True')
        env = os.environ | {'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
        if torch.cuda.is_available():
            all_gpus = ','.join(map(str, range(torch.cuda.device_count())))
            gpus = (os.environ.get('CUDA_VISIBLE_DEVICES') or all_gpus).split(',')
            env['CUDA_VISIBLE_DEVICES'] = gpus[slot % len(gpus)]
        if os.path.lexists(self.folder + '.txt'):   # a link would lead elsewhere, a FIFO would wait
            os.remove(self.folder + '.txt')
        with open(self.folder + '.txt', 'x', encoding='utf-8') as out:
            # in a session of its own: Ctrl-C reaches it through us, once
            self.process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        self.since = time.time()

    def ended(self):
        """ True once its process is gone; notes why, if it failed. """
        if self.process.poll() is None:
            return False
        if self.process.returncode:
            with open(self.folder + '.txt', encoding='utf-8') as f:
                lines = f.read().strip().splitlines()
            self.failed = lines[-1] if lines else f'exit status {self.process.returncode}'
        self.process = None
        return True


def run_all(runs, jobs):
    """ Trains what is not finished, `jobs` at a time, and says how far it is. Ctrl-C lets each save
    and stops. """
    todo = [r for r in runs if not r.finished()]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before; {jobs} at a time")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    active, done, started = [], 0, time.time()
    try:
        while todo or active:
            for r in [r for r in active if r.ended()]:
                active.remove(r)
                done += 1
                left = len(todo) + len(active)
                eta = (time.time() - started) / done * left
                minutes = (time.time() - r.since) / 60
                how = f"FAILED ({r.failed})" if r.failed else f"{minutes:.1f} min"
                print(f"  {done} of {done + left}  {r.label}, seed {r.seed}: {how}; "
                      f"ETA {eta / 60:.0f} min", flush=True)
            making = [r.stands_on for r in active if not r.has('config.json')]
            busy = set().union(*making)
            ready = next((r for r in todo if not r.stands_on & busy), None)
            if ready is not None and len(active) < jobs:
                todo.remove(ready)
                ready.start(min(set(range(jobs)) - {r.slot for r in active}), threads)
                active.append(ready)
            else:
                time.sleep(0.2)
    except KeyboardInterrupt:
        for r in active:
            r.process.send_signal(signal.SIGINT)
        for r in active:
            r.process.wait()
        sys.exit("sweep: stopped; what had begun to train has saved, "
                 "and the same command goes on.")


def read_row(runs):
    """ A row's finished runs -> dict(label, test (list of metrics), valid, preds [n,N], seconds,
    n_trainable, failed). """
    good = [r for r in runs if r.has('result.json')]
    results = [read_run(r.folder) for r in good]
    predictions = [read_predictions(r.folder) for r in good]  # (ids, arrays) each
    abouts = [result['about'] for result in results]
    row = dict(
        label=runs[0].label,
        preds=[p['pred'] for _, p in predictions],
        folders=[r.folder for r in good],
        failed=[r.failed for r in runs if r.failed],
        commands=[about['command'] for about in abouts],
        commit=[about['commit'] + '*' * about['dirty'] for about in abouts])
    for k in ('test', 'valid', 'seconds', 'n_trainable'):
        row[k] = [result[k] for result in results]
    if not good:
        return row | dict(ids=None, truth=None, info=None)
    ids, first = predictions[0]
    return row | dict(ids=ids, truth=first['label'], info=results[0]['info'])


def at_test(label, first, modalities):
    """ A row that is not trained: the runs of the first row on the test set, with these modalities
    alone. """
    row = dict(first, label=label, test=[], preds=[], seconds=[], n_trainable=[], valid=[],
               failed=[], commands=[])
    for folder in first['folders']:
        try:
            run = load_run(folder, data_dir=read_run(folder)['about']['knobs']['data_dir'])
            left = [m for m in run.knobs['modalities'] if m in modalities]
            metrics, got = run.test(run.corpus, run.knobs | dict(modalities=left))
        except (EvalError, CorpusError, ModelError, ValueError) as e:
            row['failed'].append(str(e))
            continue
        row['test'].append(metrics)
        row['preds'].append(got['pred'])
    return row


def table(rows, paper):
    """ The Markdown table, and the same as a dict for the JSON. rows: read_row's; the first is what
    the others are compared with. """
    first = rows[0]
    if not first['test']:
        raise EvalError(f"no run of the first row, {first['label']}, has finished: "
                        "there is nothing to compare with.")
    by, metric = score_by(first['info'])
    for row in rows[1:]:
        same_clips = row['ids'] == first['ids'] and np.array_equal(row['truth'], first['truth'])
        if row['test'] and not same_clips:
            raise EvalError(f"the rows {first['label']} and {row['label']} were tested on other "
                            "clips or labels: they do not pair.")

    claims = [None]
    for row in rows[1:]:
        claims.append(claim(metric, first['preds'], row['preds'], first['truth'], by)
                      if row['preds'] else None)
    best = [c is not None and c['verdict'] == 'better' for c in claims]
    beaten = [c is not None and c['verdict'] == 'worse' for c in claims[1:]]
    best[0] = len(rows) > 1 and all(beaten)

    keys = [k for k in SHOWN if k in first['test'][0]]
    cells = []
    for row, c, bold in zip(rows, claims, best):
        label = f"**{row['label']}**" if bold else row['label']
        if not row['test']:
            failed = ['failed'] * len(keys) + ['-'] * 3
            cells.append([label] + failed + [paper[row['label']]])
            continue
        if row['failed']:
            label += f" ({len(row['failed'])} failed)"
        means = [mean_std_n([m[k] for m in row['test']]) for k in keys]
        difference = c['text'] if c else '-'
        minutes = f"{np.mean(row['seconds']) / 60:.1f}" if row['seconds'] else '-'
        weights = f"{row['n_trainable'][0]:,}" if row['n_trainable'] else '-'
        cells.append([label] + means + [difference, minutes, weights, paper[row['label']]])
    head = [f'{by} less the first row, 95 %', 'min a run', 'trainable', 'paper']

    large = ('preds', 'truth', 'info', 'ids')
    numbers = []
    for row, c in zip(rows, claims):
        small = {k: v for k, v in row.items() if k not in large}
        numbers.append(small | dict(claim=c, paper=paper[row['label']]))
    return markdown_table(['test'] + keys + head, cells), numbers


def read_sweep(path):
    """ The globals of a sweep file. Raises EvalError. """
    try:
        sweep = runpy.run_path(resolve(path))
    except OSError:
        sweep = {}
    if not isinstance(sweep.get('tables'), dict):
        there = sorted(os.listdir(os.path.join(ROOT, 'config', 'sweeps')))
        there = [name for name in there if name.endswith('.py')]
        raise EvalError(f"there is no sweep {path}: config/sweeps has {', '.join(there)}.")
    return sweep


def read_numbers(own):
    """ Seeds and jobs as the flags say. Raises EvalError. """
    try:
        n_seeds = int(own['seeds'])
        jobs = int(own['jobs'] or max(1, torch.cuda.device_count()))
    except ValueError:
        raise EvalError("--seeds and --jobs are whole numbers.") from None
    if n_seeds < 1 or jobs < 1:
        raise EvalError("--seeds and --jobs are at least 1.")
    return n_seeds, jobs


def refuse_strangers(flags, runs):
    """ Stops at a flag that no run has a knob for. """
    for k in flags:
        if not any(k in run.wanted for run in runs):
            parse_flags({k: flags[k]}, runs[0].wanted, systems=SYSTEMS)


def write_table(rows, paper, heading, where):
    """ The table of the rows as where.md and where.json -> its text. heading: dict of title,
    command, common (what all rows have) and note. """
    drawn, numbers = table(rows, paper)
    commits = ', '.join(sorted({commit for row in rows for commit in row['commit']}))
    words = (f"# {heading['title']}\n\n`python tools/sweep.py {shlex.join(heading['command'])}`; "
             f"every run, but for its row's own knobs: `{heading['common'] or 'as its config'}`; "
             f"commit {commits}.\n\n{heading['note']}\n\n{drawn}\n")
    for row in rows:
        for why in row['failed']:
            words += f"\n{row['label']} failed: {why}\n"
    write_text(where + '.md', words)
    saved = dict(title=heading['title'], command=heading['command'], rows=numbers)
    write_text(where + '.json', json.dumps(saved, indent=1))
    return words


def main(argv):
    """ The command line of the docstring. Raises EvalError and its kin for a sentence. """
    flags = dict(arg[2:].partition('=')[::2] for arg in argv if arg.startswith('--'))
    files = [arg for arg in argv if not arg.startswith('-')]
    if 'help' in flags or '-h' in argv or len(files) != 1:
        print(__doc__)
        return
    own = {k: flags.pop(k, v) for k, v in FLAGS.items()}
    if set_here := OWN & set(flags):
        raise EvalError(f"--{sorted(set_here)[0]} is what a sweep sets itself for each run: "
                        "leave it out.")
    sweep = read_sweep(files[0])
    tables = sweep['tables']
    if own['table'] not in tables:
        if own['table']:
            raise EvalError(f"{files[0]} has no table {own['table']!r}: "
                            f"it has {', '.join(tables)}.")
        for k, t in tables.items():
            print(f"--table={k:<12} {t['title']} ({len(t['rows'])} rows)")
        return
    n_seeds, jobs = read_numbers(own)
    t = tables[own['table']]
    if own['config'] and t.get('toy'):
        raise EvalError(f"table {own['table']} is sized for the toy corpus: it takes no --config.")

    config = own['config'] or t.get('config') or sweep['config']
    source = knobs_of_run(config, {k: flags[k] for k in ('dataset', 'corpus') if k in flags})
    source = source['corpus']
    corpus = stem_of(source)
    short = {}
    if source == 'toy':
        short = sweep.get('short', {}) | t.get('short', {})
    folder = os.path.join(own['out'], corpus)  # what two tables ask for is trained once
    trained, tested, paper = {}, {}, {}
    for label, changes, printed in t['rows']:
        paper[label] = printed
        if 'at_test' in changes:
            tested[label] = changes['at_test']
            continue
        row_config = changes.get('config', config)
        changes = {k: v for k, v in changes.items() if k != 'config'}
        settings = settings_of_row(row_config, short, changes, flags)
        trained[label] = [Run(folder, label, row_config, settings, seed)
                          for seed in range(n_seeds)]
    runs = [of_row[seed] for seed in range(n_seeds) for of_row in trained.values()]
    refuse_strangers(flags, runs)

    os.makedirs(folder, exist_ok=True)
    # prerequisites of two sweeps are made once, and neither knows what the other is making; the
    # lock is held as long as this variable lives
    alone = lock(folder)
    if alone is None:
        raise EvalError(f"another sweep is running in {folder}: wait for it (--jobs=2 trains two "
                        "runs at once), or give another --out.")
    started = time.time()
    run_all(runs, jobs)
    rows = {label: read_row(of_row) for label, of_row in trained.items()}
    first = next(iter(rows.values()))
    for label, modalities in tested.items():
        rows[label] = at_test(label, first, modalities)

    name = [stem_of(files[0]), own['table']]
    if source != 'toy':
        name.insert(1, corpus)
    where = os.path.join(own['out'], '-'.join(name))
    heading = dict(title=f"{sweep['name']}, {t['title']}", command=argv, note=t.get('note', ''),
                   common=' '.join(as_flags(short | flags)))
    words = write_table([rows[label] for label, *_ in t['rows']], paper, heading, where)
    print(f"\n{words}\n{where}.md, {(time.time() - started) / 60:.1f} min")


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (EvalError, CorpusError, ModelError) as e:
        sys.exit(f"sweep: {e}")
    except OSError as e:
        sys.exit(f"sweep: cannot write {e.filename} ({e.strerror}): "
                 "make room, or give another --out.")
