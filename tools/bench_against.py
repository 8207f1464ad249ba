"""
tools/bench.py --against=COMMIT: the files of this checkout and another commit of this repository,
alternately in two warm processes on the same random corpus, one at a time.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from metrics import markdown_table
from tools.random_clips import SHAPES, random_corpus

ROOT = Path(__file__).resolve().parent.parent


def check_out(commit, folder):
    """
    Extracts a commit into a folder, with the bench files of this checkout. Ends with one sentence
    where git does not know the commit.
    """
    archive, version = os.path.join(folder, 'commit.zip'), os.path.join(folder, 'commit')
    command = ['git', '-C', str(ROOT), 'archive', f'--output={archive}', commit]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench: git cannot read against={commit!r} ({done.stderr.strip()[-200:]}): give a "
                 "commit of this repository.")
    shutil.unpack_archive(archive, version)
    for path in [*(ROOT / 'tools').glob('bench*.py'), ROOT / 'tools' / 'random_clips.py']:
        shutil.copy(path, os.path.join(version, 'tools'))
    return version


class Worker:
    """ A process of bench_worker.py in a version of the repository. """

    def __init__(self, version, k, corpus):
        self.errors = tempfile.TemporaryFile('w+', encoding='utf-8')
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tools.bench_worker'], cwd=version, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.version = version
        self.about = self.ask(json.dumps(dict(k=k, corpus=corpus)))

    def ask(self, line):
        """ Sends a line and returns the answer; ends with one sentence if the process has died. """
        try:
            print(line, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.errors.seek(0)
            reason = self.errors.read().strip()[-300:]
            sys.exit(f"bench: the version in {self.version} cannot run this benchmark: {reason}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def memory(version, k, corpus, split):
    """ Peak memory of a pass in MB above the loaded model, in a process of its own. """
    worker = Worker(version, k, corpus)
    megabytes = worker.ask(f'memory {split}')['megabytes']
    worker.close()
    return megabytes


def median_and_range(values, digits):
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f'{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def against_commit(k, folder):
    """
    Prints speed and peak memory of this checkout and of the commit k['against'], which runs in
    k['against_dtype'] if that is given.
    """
    sizes = (k['bench_clips'], k['bench_clips'], 2)
    random_corpus(folder, sizes, *SHAPES[k['shapes']])
    corpus = os.path.join(folder, 'random')
    versions = dict(commit=check_out(k['against'], folder), this=str(ROOT))
    ks = dict(commit=k | dict(dtype=k['against_dtype'] or k['dtype']), this=k)
    workers = {name: Worker(versions[name], ks[name], corpus) for name in ks}
    print(workers['this'].about['what'])
    if unknown := workers['commit'].about['unknown']:
        print(f"{k['against']} does not have the knobs {', '.join(unknown)}")

    rows = []
    for split in ('train', 'valid'):
        took = {name: [] for name in workers}  # of dict(seconds, cpu_seconds)
        for i in range(k['repeats'] + 1):
            for name, worker in workers.items():
                took[name].append(worker.ask(split))
        rate, cpu = {}, {}  # clips per second, and per CPU second: [repeats] each
        for name, worker in workers.items():
            n = worker.about['clips'][split]
            rate[name] = n / np.array([t['seconds'] for t in took[name][1:]])
            cpu[name] = n / np.array([t['cpu_seconds'] for t in took[name][1:]])
        mb = {name: memory(versions[name], ks[name], corpus, split) for name in ks}
        rows.append([
            split,
            median_and_range(rate['commit'], 2),
            median_and_range(rate['this'], 2),
            median_and_range(rate['this'] / rate['commit'], 3),
            median_and_range(cpu['this'] / cpu['commit'], 3),
            f"{mb['commit']:.0f}",
            f"{mb['this']:.0f}",
            f"{100 * mb['this'] / mb['commit']:.0f} %",
        ])
    for worker in workers.values():
        worker.close()
    old = f"{k['against']} {k['against_dtype']}".strip()
    print(f"median (range) of {k['repeats']} alternations, after one that does not count\n")
    print(markdown_table([
        '', f'{old}, clips/s', 'this, clips/s', 'ratio', 'ratio of CPU time', f'{old}, MB',
        'this, MB', 'memory'], rows))
