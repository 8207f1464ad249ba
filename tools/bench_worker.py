"""
A process of tools/bench.py --against: `python -m tools.bench_worker` runs the version of the
repository in the current folder.

bench_against.py copies the bench files of its own checkout into that version, so both versions are
measured by the same code. Standard input has one line of JSON, dict(k=knobs, corpus=folder), and
then one line for each measurement: 'train', 'valid', 'memory train' or 'memory valid'. Each is
answered by one line of JSON.
"""
import json
import sys

from configurator import class_knobs, declared_knobs
from data import open_corpus
from model import SYSTEMS
from tools.bench_run import Run, describe, megabytes_of


def own_knobs(k):
    """
    The knobs k of another version as this version takes them: knobs that only this version has
    keep their defaults. Also returns the names of those that it does not have.
    """
    known = declared_knobs('train.py')[0] | declared_knobs('tools/bench.py')[0]
    known |= class_knobs(SYSTEMS[k['system']])
    return known | k, sorted(set(k) - set(known))


def answer(**values):
    print(json.dumps(values), flush=True)


if __name__ == '__main__':
    job = json.loads(sys.stdin.readline())
    knobs, unknown = own_knobs(job['k'])
    run = Run(knobs, open_corpus(job['corpus']))
    clips = {split: sum(map(len, batches)) for split, batches in run.batches.items()}
    answer(clips=clips, unknown=unknown, what=describe(knobs, run))
    for line in sys.stdin:
        *memory, split = line.split()
        if memory:
            answer(megabytes=megabytes_of(run.run, split))
        else:
            seconds, cpu_seconds = run.run(split)
            answer(seconds=seconds, cpu_seconds=cpu_seconds)
