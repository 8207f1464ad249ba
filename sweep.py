"""
A paper's table as one command.

    python sweep.py config/sweeps/deepmlf.py                            the tables that there are
    python sweep.py config/sweeps/deepmlf.py --table=11                 on the toy corpus, 3 seeds
    python sweep.py config/sweeps/deepmlf.py --table=11 --config=config/deepmlf_mosei.py --corpus=unaligned_50.pkl --seeds=5 --jobs=4

A table is a list of (row, knob changes, what the paper has there). Each row is trained for each seed by train.py, in a folder
of its own under out/sweeps/; what is finished is skipped, what was cut off goes on, what fails is reported and the rest goes on.
Flags that are not below go to every run. A row with at_test=[..] is not trained: the first row's runs meet the test set with
these modalities only.

What may be claimed (README): a row beats another if both have at least 3 seeds, the 95 % interval of their paired difference
over clips and seeds excludes 0, and everything was chosen on validation, which is all that train.py can choose by (of many
rows, one in forty looks better by luck: intervals are not corrected for how many there are). The table
has a row in bold where it beats the first row by this rule, or is the first and beats all others; nothing else is bold.
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

import numpy as np
import torch

from configurator import knobs_of, parse_flags, read_config
from data import CorpusError
from eval import EvalError, claim, markdown_table, mean_std_n, read_predictions, read_run, revive, score_by
from lm import ModelError
from files import write_text
from model import lock

HERE = os.path.dirname(os.path.abspath(__file__))
FLAGS = dict(table='', seeds='3', jobs='', config='', out='out/sweeps')


def text(value):
    """ A knob's value as it stands on a command line. """
    return ','.join(map(str, value)) or '[]' if isinstance(value, (list, tuple)) else str(value)


# may differ between equal runs
FREE = set('needs out_dir data_dir device dtype resume fresh log_interval save_interval seed lm av_from'.split())


def resolve(path):
    """ A path as it is, or inside this repository. """
    return path if os.path.exists(path) else os.path.join(HERE, path)


class Run:
    """ One row and seed: its folder, its command, and how it went. Rows of equal settings are one run, in whatever table. """
    def __init__(self, folder, label, config, knobs, seed, known):
        settings = {k: text(v) for k, v in knobs.items()}
        mark = hashlib.sha256(json.dumps([config, settings], sort_keys=True).encode()).hexdigest()[:6]
        self.label, self.seed, self.failed, self.process = label, seed, '', None
        self.folder = os.path.join(folder, f'{os.path.splitext(os.path.basename(config))[0]}-{mark}-seed{seed}')
        self.command = ['train.py', config, f'--out_dir={self.folder}', f'--seed={seed}'] + [f'--{k}={v}' for k, v in settings.items()]
        self.wanted = known | read_config(resolve(config), known, knobs.get('dataset')) | knobs
        # The runs that it stands on are made beside it, before its own config.json is there: two of one seed must not make
        # the same one at the same time.
        self.stands_on = {(seed, need) for need in self.wanted['needs']}

    def finished(self):
        """ True if its result is there. Raises EvalError where train.py or the config has changed since. """
        if not os.path.exists(os.path.join(self.folder, 'result.json')): return False
        theirs = read_run(self.folder)['about']['knobs']
        for k, v in self.wanted.items():
            if k not in FREE and text(theirs[k]) != text(type(theirs[k])(v) if type(theirs[k]) is float else v):
                raise EvalError(f"{self.folder} was trained with {k}={text(theirs[k])}, and it would be {text(v)} now: remove it, or give "
                                "another --out.")
        return True

    def start(self, slot, threads):
        os.makedirs(os.path.dirname(self.folder), exist_ok=True)
        again = ['--resume=True'] if os.path.exists(os.path.join(self.folder, 'last.safetensors')) else []
        env = os.environ | {'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
        if torch.cuda.is_available():
            gpus = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(torch.cuda.device_count())))
            env['CUDA_VISIBLE_DEVICES'] = gpus.split(',')[slot % len(gpus.split(','))]
        if os.path.lexists(self.folder + '.txt'):   # a link would lead elsewhere, and a FIFO would wait
            os.remove(self.folder + '.txt')
        with open(self.folder + '.txt', 'x', encoding='utf-8') as out:
            argv = [sys.executable, os.path.join(HERE, self.command[0]), *self.command[1:], *again]
            # in a session of its own: Ctrl-C reaches it through us, once
            self.process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        self.slot, self.since = slot, time.time()

    def ended(self):
        """ True once its process is gone; notes why, if it failed. """
        if self.process.poll() is None: return False
        if self.process.returncode:
            with open(self.folder + '.txt', encoding='utf-8') as f: said = f.read().strip().splitlines()
            self.failed = said[-1] if said else f'exit status {self.process.returncode}'
        self.process = None
        return True


def run_all(runs, jobs):
    """ Trains what is not finished, `jobs` at a time, and says how far it is. Ctrl-C lets each save and stops. """
    todo = [r for r in runs if not r.finished()]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before; {jobs} at a time")
    threads, active, done, started = max(1, (os.cpu_count() or 1) // jobs), [], 0, time.time()
    try:
        while todo or active:
            for r in [r for r in active if r.ended()]:
                active.remove(r)
                done += 1
                eta = (time.time() - started) / done * (len(todo) + len(active))
                how = f"FAILED ({r.failed})" if r.failed else f"{(time.time() - r.since) / 60:.1f} min"
                print(f"  {done} of {done + len(todo) + len(active)}  {r.label}, seed {r.seed}: {how}; ETA {eta / 60:.0f} min", flush=True)
            busy = set().union(*(r.stands_on for r in active if not os.path.exists(os.path.join(r.folder, 'config.json'))))
            ready = next((r for r in todo if not r.stands_on & busy), None)
            if ready is not None and len(active) < jobs:
                todo.remove(ready)
                ready.start(min(set(range(jobs)) - {r.slot for r in active}), threads)
                active.append(ready)
            else: time.sleep(0.2)
    except KeyboardInterrupt:
        for r in active: r.process.send_signal(signal.SIGINT)
        for r in active: r.process.wait()
        sys.exit("sweep: stopped; what had begun to train has saved, and the same command goes on.")


def read_row(runs):
    """ A row's finished runs -> dict(label, test (list of metrics), valid, preds [n,N], seconds, n_trainable, failed). """
    good = [r for r in runs if os.path.exists(os.path.join(r.folder, 'result.json'))]
    results = [read_run(r.folder) for r in good]
    ids, preds = zip(*(read_predictions(r.folder) for r in good)) if good else ((), ())
    row = dict(label=runs[0].label, trusted=runs[0].wanted['trust_remote_code'], preds=[p['pred'] for p in preds], folders=[r.folder for r in good], failed=[r.failed for r in runs if r.failed],
               commands=[r['about']['command'] for r in results], commit=[r['about']['commit'] + '*' * r['about']['dirty'] for r in results])
    row |= {k: [r[k] for r in results] for k in ('test', 'valid', 'seconds', 'n_trainable')}
    return row | (dict(ids=ids[0], truth=preds[0]['label'], info=results[0]['info']) if good else dict(ids=None, truth=None, info=None))


def at_test(label, first, modalities):
    """ A row that is not trained: the runs of the first row on the test set, with these modalities alone. """
    row = dict(first, label=label, test=[], preds=[], seconds=[], n_trainable=[], valid=[], failed=[], commands=[])
    for folder in first['folders']:
        try:
            run = revive(folder, trust_remote_code=first['trusted'])
            c = run.knobs
            metrics, got = run.test(run.corpus, c | dict(modalities=[m for m in c['modalities'] if m in modalities]))
        except (EvalError, CorpusError, ModelError, ValueError) as e: row['failed'].append(str(e)); continue
        row['test'].append(metrics); row['preds'].append(got['pred'])
    return row


def table(rows, paper):
    """ The Markdown table, and the same as a dict for the JSON. rows: read_row's; the first is what the others are compared with. """
    first = rows[0]
    if not first['test']: raise EvalError(f"no run of the first row, {first['label']}, has finished: there is nothing to compare with.")
    by, metric = score_by(first['info'])
    for row in rows[1:]:
        if row['test'] and not (row['ids'] == first['ids'] and np.array_equal(row['truth'], first['truth'])):
            raise EvalError(f"the rows {first['label']} and {row['label']} were tested on other clips or labels: they do not pair.")
    keys = [k for k in ('mae', 'corr', 'acc2_non0', 'acc7', 'qwk', 'acc', 'wf1') if k in first['test'][0]]
    claims = [None] + [claim(metric, first['preds'], r['preds'], first['truth'], by) if r['preds'] else None for r in rows[1:]]
    best = [c is not None and c['verdict'] == 'better' for c in claims]
    best[0] = len(rows) > 1 and all(c is not None and c['verdict'] == 'worse' for c in claims[1:])
    cells = []
    for row, c, bold in zip(rows, claims, best):
        label = f"**{row['label']}**" if bold else row['label']
        if not row['test']: cells.append([label] + ['failed'] * len(keys) + ['-'] * 3 + [paper[row['label']]]); continue
        minutes = f"{np.mean(row['seconds']) / 60:.1f}" if row['seconds'] else '-'
        weights = f"{row['n_trainable'][0]:,}" if row['n_trainable'] else '-'
        label += f" ({len(row['failed'])} failed)" if row['failed'] else ''
        means = [mean_std_n([m[k] for m in row['test']]) for k in keys]
        cells.append([label] + means + [c['text'] if c else '-', minutes, weights, paper[row['label']]])
    large = 'preds', 'truth', 'info', 'ids'
    numbers = [{k: v for k, v in row.items() if k not in large} | dict(claim=c, paper=paper[row['label']]) for row, c in zip(rows, claims)]
    return markdown_table(['test'] + keys + [f'{by} less the first row, 95 %', 'min a run', 'trainable', 'paper'], cells), numbers


def main(argv):
    """ The command line of the docstring. Raises EvalError and its kin for a sentence. """
    flags, files = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--')), [a for a in argv if not a.startswith('-')]
    if 'help' in flags or '-h' in argv or len(files) != 1: print(__doc__); return
    own, known = {k: flags.pop(k, v) for k, v in FLAGS.items()}, knobs_of(os.path.join(HERE, 'train.py'))
    if ours := {'seed', 'out_dir', 'resume', 'fresh', 'needs'} & set(flags):
        raise EvalError(f"--{sorted(ours)[0]} is what a sweep sets itself for each run: leave it out.")
    knobs = parse_flags(flags, known)
    try: sweep = runpy.run_path(resolve(files[0]))
    except OSError: sweep = {}
    if not isinstance(sweep.get('tables'), dict):
        raise EvalError(f"there is no sweep {files[0]}: config/sweeps has deepmlf.py, mse.py, cmpta.py, crosssent.py and controls.py.")
    tables = sweep['tables']
    if own['table'] not in tables:
        if own['table']: raise EvalError(f"{files[0]} has no table {own['table']!r}: it has {', '.join(tables)}.")
        for k, t in tables.items(): print(f"--table={k:<12} {t['title']} ({len(t['rows'])} rows)")
        return
    try: n_seeds, jobs = int(own['seeds']), int(own['jobs'] or max(1, torch.cuda.device_count()))
    except ValueError: raise EvalError("--seeds and --jobs are whole numbers.") from None
    if n_seeds < 1 or jobs < 1: raise EvalError("--seeds and --jobs are at least 1.")
    t, stem = tables[own['table']], os.path.splitext(os.path.basename(files[0]))[0]
    if own['config'] and t.get('toy'): raise EvalError(f"table {own['table']} is sized for the toy corpus: it takes no --config.")
    config = own['config'] or t.get('config') or sweep['config']
    source = knobs.get('corpus') or read_config(resolve(config), known, knobs.get('dataset')).get('corpus', known['corpus'])
    short = sweep.get('short', {}) | t.get('short', {}) if source == 'toy' else {}      # for the toy corpus
    corpus = os.path.splitext(os.path.basename(source))[0]
    folder = os.path.join(own['out'], corpus)   # of every sweep's runs: what two tables ask for is trained once
    trained, tested, paper = {}, {}, {}
    for label, changes, printed in t['rows']:
        paper[label] = printed
        if 'at_test' in changes: tested[label] = changes['at_test']; continue
        row_config, settings = changes.get('config', config), short | {k: v for k, v in changes.items() if k != 'config'} | knobs
        trained[label] = [Run(folder, label, row_config, settings, seed, known) for seed in range(n_seeds)]
    os.makedirs(folder, exist_ok=True)
    alone = lock(folder)   # what two sweeps stand on is made once, and neither knows what the other is making
    if alone is None:
        raise EvalError(f"another sweep is running in {folder}: wait for it (--jobs=2 trains two runs at once), or give another --out.")
    started = time.time()
    run_all([runs[seed] for seed in range(n_seeds) for runs in trained.values()], jobs)
    rows = {label: read_row(runs) for label, runs in trained.items()}
    first = next(iter(rows.values()))
    rows |= {label: at_test(label, first, m) for label, m in tested.items()}
    drawn, numbers = table([rows[label] for label, *_ in t['rows']], paper)
    said = ' '.join(f'--{k}={text(v)}' for k, v in (short | knobs).items())
    words = f"# {sweep['name']}, {t['title']}\n\n`python sweep.py {shlex.join(argv)}`; every run, but for its row's own knobs: `{said or 'as its config'}`; " \
            f"commit {', '.join(sorted({c for r in rows.values() for c in r['commit']}))}.\n\n{t.get('note', '')}\n\n{drawn}\n"
    for row in rows.values():
        for why in row['failed']: words += f"\n{row['label']} failed: {why}\n"
    where = os.path.join(own['out'], '-'.join([stem] + [corpus] * (source != 'toy') + [own['table']]))
    write_text(where + '.md', words)
    write_text(where + '.json', json.dumps(dict(title=f"{sweep['name']}, {t['title']}", command=argv, rows=numbers), indent=1))
    print(f"\n{words}\n{where}.md, {(time.time() - started) / 60:.1f} min")


if __name__ == '__main__':
    try: main(sys.argv[1:])
    except (EvalError, CorpusError, ModelError) as e: sys.exit(f"sweep: {e}")
    except OSError as e: sys.exit(f"sweep: cannot write {e.filename} ({e.strerror}): make room, or give another --out.")
