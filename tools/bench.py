"""
Benchmarks a system: speed and peak memory of training and evaluation.

    python tools/bench.py
        MSE-Adapter against our plain implementation, at CH-SIMS v2's shapes, with a random Llama of
        8 layers and width 512
    python tools/bench.py config/deepmlf_sims.py --shapes=sims
        another config; any knob of its run or of this file is a flag
    python tools/bench.py config/baseline_mult.py --dataset=sims --shapes=sims
    python tools/bench.py config/deepmlf_sims.py --shapes=sims --against=HEAD
        the files of this checkout against another commit of this repository
    python tools/bench.py config/crosssent_mosei.py --resample=linear --shapes=mosei --vs=without
        the cost of GMRA (the paper's Table 4); for pseudo tokens, the cost of exact label scores
    python tools/bench.py --vs=start
        time from process start to the first step, by size of the corpus, and speed of conversion
    python tools/bench.py --vs=paper
        an estimate of MSE-Adapter's memory, traffic and time with LMs that are not available here

A benchmark takes several minutes. For a short try add --bench_clips=100 --bench_batches=1 --repeats=1
--lm_shape=2,64,2,500 --batch_size=16.

Clips and text models are random (random_clips.py). Only a ratio of two times of one command is
comparable across machines. Memory is measured in a separate process, above that of the loaded
model (Linux only).

--against=COMMIT runs the two versions alternately, one at a time, in two warm processes on the same
corpus. Each takes its own batches, so a changed order of the clips counts. Times are also given in
CPU time, which other processes on the machine disturb less. --against=HEAD --against_dtype=float32
--dtype=bfloat16 compares two dtypes of the files of one commit.

--vs=plain compares with a plain implementation of the same computation. The plain implementation is
ours: it is not the code that the papers released, and a ratio to it is not one to that code. It pads
texts to max_text_len and frames to the longest, tokenises texts again in each batch, uses unfused
AdamW, and returns freed memory to Linux (hold_memory in run/machine.py). For pseudo tokens it uses
Hugging Face's forward with float32 logits of the whole sequence, and generate() for validation. For
DeepMLF it runs text and fusion tokens in one stream with gradients through all layers, logits of
all positions, also in evaluation, and Hugging Face's GELU. Both run alternately in one process on
the CPU, in float32 or bfloat16 (--dtype).
"""
import os
import sys
import tempfile
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from configurator import AtLeast, Share, declared_knobs, run_knobs
from data import CorpusError
from model import SYSTEMS
from run.errors import ModelError
from tools.bench_against import against_commit
from tools.bench_estimate import count_on_paper
from tools.bench_model import SIZES, family
from tools.bench_part import with_and_without
from tools.bench_plain import PretrainingStage, plain_way
from tools.bench_start import start
from tools.bench_turns import by_turns

shapes: Literal['simsv2', 'mosi', 'mosei', 'sims'] = 'simsv2'   # lengths and widths of the clips
vs: Literal['plain', 'without', 'start', 'paper'] = 'plain'   # which benchmark to run
against = ''                   # a commit of this repository to compare with; '': see vs
against_dtype: Literal['', 'float32', 'bfloat16'] = ''   # dtype of that commit; '': this one's
lm_shape = []                  # layers, width, heads, vocabulary of the text model; []: see SIZES
bench_clips: AtLeast(1) = 1000     # clips of the random corpus
bench_batches: AtLeast(1) = 6      # timed batches, spread over all lengths
repeats: AtLeast(1) = 5            # timed rounds, after an untimed one
warmup_rounds = 20             # 'without': untimed forward passes
timed_rounds: AtLeast(1) = 50      # 'without': timed forward passes
start_clips = [1000, 16000]    # 'start': train clips of the corpora; 16000 is about MOSEI's number
gpu = [989.0, 450.0, 50.0]     # 'paper': bfloat16 TFLOP/s, GB/s in a node and between nodes (H100)
gpu_share: Share(with_one=True) = 0.45   # 'paper': share of these TFLOP/s that is reached
only = ''                      # set in child processes only: the way to run, such as 'ours train'
# --------------------------------------------------------------------------------------------------
_root = str(Path(__file__).resolve().parent.parent)
_argv = [arg if arg.startswith('-') or os.path.exists(arg) else os.path.join(_root, arg)
         for arg in sys.argv[1:]]
if all(arg.startswith('-') for arg in _argv):
    _argv.insert(0, os.path.join(_root, 'config', 'mse_simsv2.py'))
if '-h' in _argv or '--help' in _argv:
    _source = Path(__file__).read_text(encoding='utf-8')
    print(__doc__ + _source[_source.index('\nshapes:'):_source.index('\n# ---')])
    sys.exit(0)
# the common knobs of train.py and those above
_train, _own = (declared_knobs(path) for path in (os.path.join(_root, 'train.py'), __file__))
_known, k = run_knobs(_argv, _train[0] | _own[0], _train[1] | _own[1], SYSTEMS)
for _name, _value in k.items():
    if _value != _known[_name] and not k['only']:
        print(f"    {_name} = {_value!r}   (default {_known[_name]!r})")
k |= dict(train_fraction=1.0, shuffle_streams=False, standardise=True)
cls = SYSTEMS[k['system']]
k['lm_shape'] = k['lm_shape'] or SIZES[family(cls)]

errors = []
if plain_way(cls) is PretrainingStage and k['vs'] != 'start':
    errors += [f"system={k['system']!r} is a pretraining stage, which is not benchmarked: choose "
              "another config"]
if cls.needs_words(k):
    errors += ["resample='words' needs frames of words, which random clips lack: take another one"]
if k['label'] != 'label':
    errors += ["random clips have scores but no classes: choose a config for regression"]
if k['dtype'] not in ('auto', 'float32', 'bfloat16'):
    errors += ["dtype must be 'float32' or 'bfloat16' here"]
if len(k['gpu']) != 3 or min(k['gpu']) <= 0 or not k['gpu_share']:
    errors += ["gpu must be three numbers above 0, and gpu_share above 0"]
if len(k['lm_shape']) != 4:
    errors += ["lm_shape must be four numbers: layers, width, heads, vocabulary"]
if k['against'] and k['vs'] != 'plain':
    errors += ["against=COMMIT is a benchmark of its own: leave vs out"]
if k['against_dtype'] and not k['against']:
    errors += ["against_dtype is the dtype of against=COMMIT, which is missing"]
if errors:
    sys.exit(f"bench: {'; '.join(errors)}.")

MEASURED = dict(plain=by_turns, without=with_and_without, paper=count_on_paper, start=start)

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as _folder:
        measure = against_commit if k['against'] else MEASURED[k['vs']]
        try:
            measure(k, _folder)
        except (CorpusError, ModelError) as e:
            sys.exit(f"bench: {e}")
