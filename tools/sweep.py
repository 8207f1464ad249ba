"""
Trains and evaluates all rows of a paper's table with one command.

    python tools/sweep.py config/sweeps/deepmlf.py                lists the tables
    python tools/sweep.py config/sweeps/deepmlf.py --table=11     on the toy corpus, 5 seeds
    python tools/sweep.py config/sweeps/deepmlf.py --table=11 --config=config/deepmlf_mosei.py
                    --corpus=unaligned_50.pkl --seeds=3 --jobs=4        on another corpus

    --seeds=5           seeds per row; the paper of DeepMLF has at least 5
    --jobs=1            runs at a time; by default the number of GPUs, or 1 without GPUs
    --config=CONFIG     trains this config in place of the sweep's
    --out=out/sweeps    the folder of the runs and tables

A table is a list of rows (label, changed knobs, what the paper prints). train.py trains each row
with each seed in its own folder under out/sweeps/. The same command again skips finished runs and
resumes interrupted ones. A failed run is reported, and the others continue. Other flags are passed
to train.py for every row whose system has the knob. A row with at_test=dict(..) is not trained: the
runs of the first row, or of the row `of`, are tested with `modalities` only, or on the test split
of another `corpus`. A row with tune=[dict(..), ..] is trained with each of these settings, and has
the one that is best on validation.

Of a table, `columns` are further metrics; neighbours=True compares each row with the row above it
too; relative=(metric, ..) gives their change to the row above in percent; paired=False compares
only rows of the same test clips; and full=True makes the runs as long as the configs say.

When we call a difference real (README): both rows have at least 3 seeds, the 95 % interval of their
paired difference over clips and seeds excludes 0, and every choice was made on validation, which is
all that train.py selects by. Intervals are not corrected for the number of rows: by chance alone,
one row in forty looks better. A row is bold if it beats the first row by this rule; the first row
is bold if it beats all others.
"""
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from configurator import declared_knobs, parse_flags, run_knobs
from data import CorpusError, open_corpus
from model import SYSTEMS
from run.command_line import words_and_flags
from run.errors import UserError
from run.finished import RESULT_KNOBS, RUN_KNOBS, EvalError, read_run
from run.folder import ROOT, lock
from run.machine import print_any_text
from tools.sweep_table import at_test, best_row, write_table

FLAGS = dict(table='', seeds='5', jobs='', config='', out='out/sweeps')
# knobs that the sweep itself sets for each run
OWN = {'seed', 'out_dir', 'resume', 'fresh', 'needs'}
# knobs in which a finished run may differ from the one that is asked for
FREE = RUN_KNOBS - RESULT_KNOBS | OWN
# the knobs of every run, whatever its system
COMMON, ANNOTATIONS = declared_knobs(os.path.join(ROOT, 'train.py'))


def text(value):
    """ A knob's value in the form of the command line. """
    if isinstance(value, (list, tuple)):
        return ','.join(map(str, value)) or '[]'
    return str(value)


def resolve(path):
    """ The path itself if it exists, else the path inside this repository. """
    return path if os.path.exists(path) else os.path.join(ROOT, path)


def stem_of(path):
    """ 'a/b.py' -> 'b'. """
    return os.path.splitext(os.path.basename(path))[0]


def as_flags(knobs):
    """ Knobs as command line flags. """
    return [f'--{k}={text(v)}' for k, v in knobs.items()]


def knobs_of_run(config, knobs):
    """ All knobs of a run of `config` with some knobs changed. """
    return run_knobs([resolve(config), *as_flags(knobs)], COMMON, ANNOTATIONS, SYSTEMS)[1]


def settings_of_row(config, short, changes, flags):
    """ The knobs that a row's runs change in their config. Later ones win: the short settings, the
    row's changes, the flags. Short settings (those of quick runs on the toy corpus) and
    flags that the row's system has no knob for are left out. """
    deciding = {k: v for k, v in flags.items() if k in ('system', 'dataset')}
    known = knobs_of_run(config, changes | deciding)
    short = {k: v for k, v in short.items() if k in known}
    return short | changes | {k: v for k, v in flags.items() if k in known}


class Run:
    """ A run of one row with one seed: its folder, its command and its outcome. Rows that change the
    same knobs of a config to the same values share a run, also across tables. """
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
        # The run trains its prerequisites before it writes its own config.json. Two runs of one
        # seed must not train the same prerequisite at the same time.
        self.prerequisites = {(seed, need) for need in self.wanted['needs']}

    def has(self, name):
        """ True if the run's folder has this file. """
        return os.path.exists(os.path.join(self.folder, name))

    def finished(self):
        """ True if the run has a result. Raises EvalError if train.py or the config has changed
        since then. """
        if not self.has('result.json'):
            return False
        recorded = read_run(self.folder)['about']['knobs']
        needs = [stem_of(need) for need in self.wanted['needs']]
        for k, v in self.wanted.items():
            # train.py replaces the name of a prerequisite by its folder
            if k in FREE or v in needs:
                continue
            old, new = text(recorded.get(k)), text(v)
            if old != new:
                raise EvalError(f"{self.folder} was trained with {k}={old}, but the sweep now has "
                                f"{k}={new}: remove the folder, or choose another --out.")
        return True

    def start(self, slot, threads):
        """ Starts train.py in its own process, on GPU number `slot` if there are GPUs. """
        self.slot = slot
        os.makedirs(os.path.dirname(self.folder), exist_ok=True)
        script, config, *knobs = self.command
        argv = [sys.executable, os.path.join(ROOT, script), resolve(config), *knobs]
        if self.has('last.safetensors'):
            argv.append('--resume=True')
        env = os.environ | {'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
        if torch.cuda.is_available():
            all_gpus = ','.join(map(str, range(torch.cuda.device_count())))
            gpus = (os.environ.get('CUDA_VISIBLE_DEVICES') or all_gpus).split(',')
            env['CUDA_VISIBLE_DEVICES'] = gpus[slot % len(gpus)]
        # remove a link, which could point to another file, and a FIFO, which would block
        if os.path.lexists(self.folder + '.txt'):
            os.remove(self.folder + '.txt')
        with open(self.folder + '.txt', 'x', encoding='utf-8') as out:
            # in its own session, so that Ctrl-C arrives only once, from run_all
            self.process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        self.since = time.time()

    def ended(self):
        """ True if the process has ended. Sets `failed` to the reason if it failed. """
        if self.process.poll() is None:
            return False
        if self.process.returncode:
            with open(self.folder + '.txt', encoding='utf-8') as f:
                lines = f.read().strip().splitlines()
            self.failed = lines[-1] if lines else f'exit status {self.process.returncode}'
        self.process = None
        return True


def clock(at):
    """ A time (seconds since 1970) as hour and minute, with the date if that is not today. """
    today = time.strftime('%Y-%m-%d') == time.strftime('%Y-%m-%d', time.localtime(at))
    return time.strftime('%H:%M' if today else '%Y-%m-%d %H:%M', time.localtime(at))


def time_left(seconds, since, n_waiting, jobs):
    """ The estimated seconds until a sweep ends, from the mean of the finished runs. seconds: of
    each finished run; since: for how many seconds each active run has been training. """
    mean = np.mean(seconds)
    return (n_waiting * mean + sum(max(0, mean - t) for t in since)) / jobs


def run_all(runs, jobs):
    """ Trains the unfinished runs, `jobs` at a time, and prints which run of how many starts and
    ends, and when the sweep will end. On Ctrl-C each run saves, and the sweep stops. """
    todo = [r for r in runs if not r.finished()]
    took = [read_run(r.folder)['seconds'] for r in runs if r not in todo]
    active, done = [], len(took)
    print(f"{len(runs)} runs, {done} of them already finished; {jobs} at a time")
    threads = os.environ.get('OMP_NUM_THREADS') or max(1, (os.cpu_count() or 1) // jobs)

    def progress(r, event):
        """ Prints what happened to a run, and when the sweep ends if a run has finished. """
        now, end = time.time(), ''
        if took and (todo or active):
            left = time_left(took, [now - a.since for a in active], len(todo), jobs)
            end = f"; ETA {left / 60:.0f} min, until {clock(now + left)}"
        print(f"  run {runs.index(r) + 1} of {len(runs)} ({r.label}, seed {r.seed}) {event}; "
              f"{done} done{end}", flush=True)

    try:
        while todo or active:
            for r in [r for r in active if r.ended()]:
                active.remove(r)
                done += 1
                seconds = time.time() - r.since
                took += [] if r.failed else [seconds]
                event = f"FAILED ({r.failed})" if r.failed else "finished"
                progress(r, f"{event} after {seconds / 60:.1f} min")
            busy = set().union(*(r.prerequisites for r in active if not r.has('config.json')))
            ready = next((r for r in todo if not r.prerequisites & busy), None)
            if ready is not None and len(active) < jobs:
                todo.remove(ready)
                ready.start(min(set(range(jobs)) - {r.slot for r in active}), threads)
                active.append(ready)
                progress(ready, f"since {clock(ready.since)}")
            else:
                time.sleep(0.2)
    except KeyboardInterrupt:
        for r in active:
            r.process.send_signal(signal.SIGINT)
        for r in active:
            r.process.wait()
        sys.exit("sweep: stopped; runs that had started training have saved, and the same command "
                 "resumes them.")


def read_sweep(path):
    """ The globals of the sweep file at `path`. Raises EvalError. """
    reason = ''
    try:
        sweep = runpy.run_path(resolve(path))
    except (OSError, ImportError, SyntaxError) as e:   # no file, a folder, no Python
        sweep, reason = {}, f" ({type(e).__name__}: {e})" if path.endswith('.py') else ''
    if not isinstance(sweep.get('tables'), dict):
        names = sorted(os.listdir(os.path.join(ROOT, 'config', 'sweeps')))
        names = [name for name in names if name.endswith('.py')]
        raise EvalError(f"{path} is not a sweep file{reason}: choose one of config/sweeps, which has "
                        f"{', '.join(names)}.")
    return sweep


def read_numbers(own):
    """ The numbers of seeds and of jobs in the sweep's own flags. Raises EvalError. """
    try:
        n_seeds = int(own['seeds'])
        jobs = int(own['jobs'] or max(1, torch.cuda.device_count()))
    except ValueError:
        raise EvalError("--seeds and --jobs must be whole numbers.") from None
    if n_seeds < 1 or jobs < 1:
        raise EvalError("--seeds and --jobs must be at least 1.")
    return n_seeds, jobs


def refuse_flags_of_rows(flags, rows, corpus):
    """ Stops with a sentence if a flag is a knob that a row changes: all rows would be equal. A row
    that names `corpus`, that of the table's config, takes another one from --corpus like it. """
    for label, changes, _ in rows:
        if changes.get('corpus') == corpus:
            changes = {k: v for k, v in changes.items() if k != 'corpus'}
        tuned = [knob for settings in changes.get('tune', []) for knob in settings]
        for knob in (*changes, *tuned, *changes.get('at_test', {})):
            if knob in flags:
                raise EvalError(f"the row {label!r} changes {knob} itself: leave --{knob} out.")


def refuse_config(name, tables):
    """ Stops with a sentence if --config would do nothing, or what the table is not made for. """
    if tables[name].get('toy'):
        printed = [key for key, other in tables.items()
                   if key.startswith(name + '-') and not other.get('toy')]
        instead = f", or take {' or '.join(printed)}" if printed else ""
        raise EvalError(f"table {name} is sized for the toy corpus: leave --config out{instead}.")
    if all('config' in changes for _, changes, _ in tables[name]['rows']):
        raise EvalError(f"each row of table {name} has a config of its own: leave --config out.")


def refuse_unknown_flags(flags, runs):
    """ Stops with a sentence if no run has a knob for a flag. """
    for k in flags:
        if not any(k in run.wanted for run in runs):
            parse_flags({k: flags[k]}, runs[0].wanted, systems=SYSTEMS)


def refuse_absent_corpora(runs):
    """
    Raises CorpusError if none of the corpora of the unfinished runs can be opened. If only some of
    them can, the other runs fail one by one.
    """
    refused = None
    todo = [run.wanted for run in runs if not run.has('result.json')]
    for source, data_dir in sorted({(knobs['corpus'], knobs['data_dir']) for knobs in todo}):
        try:
            open_corpus(source, data_dir)
            return
        except CorpusError as e:
            refused = refused or e
    if refused:
        raise refused


def main(argv):
    """ The command line. Raises UserError. """
    files, flags = words_and_flags(argv)
    if wrong := [word for word in files if word.startswith('-') and word != '-h']:
        raise EvalError(f"{wrong[0]} is no flag: write -{wrong[0].partition('=')[0]}=VALUE.")
    if 'help' in flags or len(files) != 1 or '-h' in files:
        print(__doc__)
        return
    own = {k: flags.pop(k, v) for k, v in FLAGS.items()}
    if set_here := OWN & set(flags):
        raise EvalError(f"--{sorted(set_here)[0]} is a knob that the sweep itself sets for each "
                        "run: leave it out.")
    sweep = read_sweep(files[0])
    tables = sweep['tables']
    if own['table'] not in tables:
        if own['table']:
            raise EvalError(f"{files[0]} has no table {own['table']!r}: "
                            f"choose one of {', '.join(tables)}.")
        if flags:
            raise EvalError(f"--{next(iter(flags))} needs a table: give --table=N, one of "
                            f"{', '.join(tables)}.")
        for k, t in tables.items():
            print(f"--table={k:<12} {t['title']} ({len(t['rows'])} rows)")
        return
    n_seeds, jobs = read_numbers(own)
    t = tables[own['table']]
    if own['config']:
        refuse_config(own['table'], tables)

    config = own['config'] or t.get('config') or sweep['config']
    refuse_flags_of_rows(flags, t['rows'], knobs_of_run(config, {})['corpus'])
    source = knobs_of_run(config, {k: flags[k] for k in ('dataset', 'corpus') if k in flags})
    source = source['corpus']
    corpus = stem_of(source)
    short = {}
    if source == 'toy' and not t.get('full'):
        short = sweep.get('short', {}) | t.get('short', {})
    folder = os.path.join(own['out'], corpus)  # shared by all tables, so that equal runs are reused
    trained, tested, paper = {}, {}, {}
    for label, changes, printed in t['rows']:
        paper[label] = printed
        if 'at_test' in changes:
            tested[label] = changes['at_test']
            continue
        row_config = changes.get('config', config)
        fixed = {k: v for k, v in changes.items() if k not in ('config', 'tune')}
        trained[label] = []
        for tuned in changes.get('tune', [{}]):
            settings = settings_of_row(row_config, short, fixed | tuned, flags)
            trained[label].append((tuned, [Run(folder, label, row_config, settings, seed)
                                           for seed in range(n_seeds)]))
    runs = [of_settings[seed] for seed in range(n_seeds) for candidates in trained.values()
            for _, of_settings in candidates]
    refuse_unknown_flags(flags, runs)

    os.makedirs(folder, exist_ok=True)
    # Two sweeps in one folder could train the same prerequisite at the same time. The lock is held
    # as long as this variable lives.
    folder_lock = lock(folder)
    if folder_lock is None:
        raise EvalError(f"another sweep is running in {folder}: wait for it (--jobs=2 trains two "
                        "runs at a time), or choose another --out.")
    started = time.time()
    refuse_absent_corpora(runs)
    run_all(runs, jobs)
    rows = {label: best_row(candidates) for label, candidates in trained.items()}
    first = next(iter(rows.values()))
    for label, changes in tested.items():
        rows[label] = at_test(label, rows.get(changes.get('of'), first), changes)

    name = [stem_of(files[0]), own['table']]
    if source != 'toy':
        name.insert(1, corpus)
    where = os.path.join(own['out'], '-'.join(name))
    heading = heading_of(sweep, t, argv, short, flags)
    page = write_table([rows[label] for label, *_ in t['rows']], paper, heading, where)
    print(f"\n{page}\n{where}.md, {(time.time() - started) / 60:.1f} min")


def heading_of(sweep, t, argv, short, flags):
    """ What write_table prints of a sweep's table t. common: the flags that no row changes. """
    of_rows = {k for _, changes, _ in t['rows'] for k in changes}
    common = {k: v for k, v in short.items() if k not in of_rows} | flags
    options = ('neighbours', 'relative', 'columns', 'paired')
    return dict(
        title=f"{sweep['name']}, {t['title']}", command=argv, note=t.get('note', ''),
        common=' '.join(as_flags(common)),
        options={key: (sweep | t)[key] for key in options if key in sweep | t})


if __name__ == '__main__':
    print_any_text()
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"sweep: {e}")
    except BrokenPipeError:   # as of `| head`
        sys.exit("sweep: its output is no longer read, so it stopped: the same command continues.")
    except OSError as e:
        sys.exit(f"sweep: cannot write {e.filename} ({e.strerror}): "
                 "free some space, or choose another --out.")
    except KeyboardInterrupt:   # while a corpus is converted; run_all stops its runs itself
        sys.exit("sweep: stopped before its runs; the same command starts it again.")
