"""
Records the results of twelve short training runs exactly, and compares a later checkout with them.

    python tests/record_results.py --write FILE     train, and write hashes and metrics to FILE
    python tests/record_results.py --compare FILE   train again, and print for each run what differs

To check that a change of the code changes no result, run --write before it and --compare after it.
--compare exits with status 1 if anything differs. Both need the same machine, the same versions of
Python and PyTorch, and one thread, which this script sets: other machines and other numbers of
threads round differently. All runs together take about 4 minutes.

For each run the file holds the SHA-256 of every tensor in best.safetensors, of the model's tensors
in last.safetensors and of test.jsonl, and the metrics of result.json as exact floats. For each
tensor it also holds the sum, the sum of absolute values and the largest absolute value. From these
the size of a difference is estimated, as a lower bound: a difference that does not change the three
numbers shows only in the hash.

    --steps=60       optimizer steps of each run; stored in FILE, so --compare does not need it
    --data_dir=DIR   folder for the converted toy corpus; without it, the corpus is made each time
    --only=NAME,..   run only the configs with these names

It runs the train.py one folder above this file and imports no other module of the repository.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The config of each run; '' is plain `python train.py`, which trains deepmlf_toy. The prerequisites
# lm_toy, av_toy and lm_toy_rated are trained once, by the first run that needs them, and recorded.
COMMANDS = [
    '', 'mse_toy', 'mse_toy_emotion', 'cmpta_toy', 'cmpta_toy_emotion', 'crosssent_toy',
    'baseline_tfn', 'baseline_mult', 'baseline_misa',
]


def run_command(config, out_dir, data_dir, steps):
    """ Train one config in a process of its own, on one thread of the CPU. """
    argv = [sys.executable, os.path.join(ROOT, 'train.py')]
    if config:
        argv.append(os.path.join(ROOT, 'config', config + '.py'))
    name = config or 'deepmlf_toy'
    argv += [f'--out_dir={os.path.join(out_dir, name)}', f'--data_dir={data_dir}']
    argv += [f'--max_steps={steps}']
    env = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def record_tensor(x):
    """ A tensor's hash, and the three numbers that estimate the size of a difference. """
    raw = x.contiguous().reshape(-1)
    digest = hashlib.sha256(f'{x.dtype} {list(x.shape)} '.encode())
    digest.update(raw.view(torch.uint8).numpy().tobytes())
    size = raw.double().abs()
    return dict(
        sha256=digest.hexdigest(), sum=float(raw.double().sum()), abs_sum=float(size.sum()),
        abs_max=float(size.max()) if len(size) else 0.0)


def record_run(folder):
    """ (name of the run, its record) of a run folder. """
    best = load_file(os.path.join(folder, 'best.safetensors'))
    last = load_file(os.path.join(folder, 'last.safetensors'))
    last = {k.removeprefix('model.'): x for k, x in last.items() if k.startswith('model.')}
    record = dict(
        best={k: record_tensor(x) for k, x in sorted(best.items())},
        last={k: record_tensor(x) for k, x in sorted(last.items())},
        predictions=None)
    predictions = os.path.join(folder, 'test.jsonl')   # an LM has none
    if os.path.exists(predictions):
        with open(predictions, 'rb') as f:
            record['predictions'] = hashlib.sha256(f.read()).hexdigest()
    with open(os.path.join(folder, 'result.json'), encoding='utf-8') as f:
        result = json.load(f)
    record['metrics'] = {k: result[k] for k in ('valid', 'test', 'lm_alone') if k in result}
    # before run folders had a format number, the only control was stored as `lm_alone`
    for metrics in result.get('controls', {}).values():
        record['metrics']['lm_alone'] = metrics
    return result['about']['name'], record


def record_all(steps, data_dir, only):
    """ Train everything and return {name of the config: its record}. """
    runs = {}
    with tempfile.TemporaryDirectory() as temporary:
        out_dir = os.path.join(temporary, 'out')
        for config in COMMANDS:
            if only and (config or 'deepmlf_toy') not in only:
                continue
            since = time.time()
            run_command(config, out_dir, data_dir or os.path.join(temporary, 'data'), steps)
            print(f"{config or 'deepmlf_toy'}: {time.time() - since:.0f} s", flush=True)
        for entry in sorted(os.scandir(out_dir), key=lambda entry: entry.name):
            if not os.path.exists(os.path.join(entry.path, 'result.json')):
                continue
            name, record = record_run(entry.path)
            if name in runs:
                sys.exit(f"{name} was trained twice, by two runs that need it.")
            runs[name] = record
    return runs


def leaves(metrics, prefix=''):
    """ Nested metrics as a flat dict {dotted name: value}. """
    found = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            found |= leaves(value, f'{prefix}{key}.')
        else:
            found[prefix + key] = value
    return found


def relative(a, b, scale=None):
    """ |a - b| / scale. The default scale is the larger absolute value. """
    scale = max(abs(a), abs(b)) if scale is None else scale
    return abs(a - b) / scale if scale else float(a != b)


def tensor_difference(old, new):
    """ A lower bound on the relative difference of two recorded tensors. """
    scale = max(old['abs_sum'], new['abs_sum'])
    return max(
        relative(old['sum'], new['sum'], scale), relative(old['abs_sum'], new['abs_sum']),
        relative(old['abs_max'], new['abs_max']))


def compare_tensors(old, new):
    """ Compare the tensors of a checkpoint -> (text, whether all are equal). """
    changed = {k: tensor_difference(old[k], new[k])
               for k in old.keys() & new.keys() if old[k]['sha256'] != new[k]['sha256']}
    words = f"{len(old)} tensors"
    if missing := sorted(old.keys() - new.keys()):
        words += f", {len(missing)} are gone ({missing[0]})"
    if added := sorted(new.keys() - old.keys()):
        words += f", {len(added)} are new ({added[0]})"
    if changed:
        worst = max(changed, key=changed.get)
        words += f", {len(changed)} differ, by {changed[worst]:.1e} or more ({worst})"
    equal = not (missing or added or changed)
    return words + (' equal' if equal else ''), equal


def compare_metrics(old, new):
    """ Compare the metrics of a run -> (text, whether all are equal to the last bit). """
    old, new = leaves(old), leaves(new)
    changed = {}
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if a != b and not (a != a and b != b):   # NaN is equal to NaN here
            both_numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
            changed[key] = relative(a, b) if both_numbers else float('inf')
    if not changed:
        return f"{len(old)} metrics equal", True
    worst = max(changed, key=changed.get)
    words = f"{len(changed)} of {len(old)} metrics differ, most {worst}: "
    return words + f"{old.get(worst)} -> {new.get(worst)} ({changed[worst]:.1e})", False


def compare_all(old, new):
    """ Print what is equal and what differs for each run -> whether everything is equal. """
    all_equal = True
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            print(f"{name}: {'not run before' if name in new else 'not run now'}")
            all_equal = False
            continue
        a, b = old[name], new[name]
        checks = [compare_tensors(a['best'], b['best']), compare_tensors(a['last'], b['last'])]
        same = a['predictions'] == b['predictions']
        checks.append(('predictions equal' if same else 'predictions differ', same))
        checks.append(compare_metrics(a['metrics'], b['metrics']))
        equal = all(ok for _, ok in checks)
        (best, _), (last, _), *others = checks
        parts = [f"best: {best}", f"last: {last}"] + [words for words, _ in others]
        print(f"{name}: {'equal' if equal else 'DIFFERENT'} ({'; '.join(parts)})")
        all_equal = all_equal and equal
    return all_equal


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument('--write', metavar='FILE')
    task.add_argument('--compare', metavar='FILE')
    parser.add_argument('--steps', type=int, default=60)
    parser.add_argument('--data_dir', default='')
    parser.add_argument('--only', default='')
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, old = time.time(), None
    if args.compare:
        with open(args.compare, encoding='utf-8') as f:
            old = json.load(f)
    steps = old['steps'] if old else args.steps
    data_dir = os.path.abspath(args.data_dir) if args.data_dir else ''
    only = set(filter(None, args.only.split(',')))
    runs = record_all(steps, data_dir, only)
    print(f"{len(runs)} runs of at most {steps} steps: {(time.time() - started) / 60:.1f} min")
    if args.write:
        with open(args.write, 'w', encoding='utf-8') as f:
            json.dump(dict(steps=steps, torch=torch.__version__, runs=runs), f, indent=1)
        return
    before = {k: v for k, v in old['runs'].items() if k in runs} if only else old['runs']
    if not compare_all(before, runs):
        sys.exit(1)
    print("everything is equal")


if __name__ == '__main__':
    main()
