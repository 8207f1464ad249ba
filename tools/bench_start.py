"""
tools/bench.py --vs=start: the time from process start to the first step that train.py prints, for
late fusion of random features on a converted corpus.
"""
import os
import subprocess
import sys
import time

import numpy as np
import transformers

from run.folder import ROOT
from tools.random_clips import random_corpus


def seconds_until_line(argv, starts_with):
    """ Seconds from the start of a process to its first line with this start; then kills it. """
    since = time.perf_counter()
    env, output = os.environ | {'PYTHONUNBUFFERED': '1'}, []
    with subprocess.Popen([sys.executable, *argv], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            output.append(line)
            if line.startswith(starts_with):
                process.kill()
                return time.perf_counter() - since
    sys.exit(f"bench: train.py stopped before its first step: {''.join(output)[-300:]}")


def until_first_step(k, folder, n):
    """ Prints the time that a run on n clips takes until its first step. """
    _, rate = random_corpus(folder, (n, n // 8, n // 4), 50, 74, 50, 35, 3)
    hf = f'{folder}/run/hf'
    argv = [os.path.join(ROOT, 'train.py'), os.path.join(ROOT, 'config', 'baseline_late.py'),
            f'--corpus={folder}/random', f'--out_dir={folder}/run', '--log_interval=1',
            '--device=cpu', '--lm_vocab=4000']
    # trains a tokenizer and writes the config of its encoder; the timed runs load both
    seconds_until_line(argv, '  step ')
    encoder_config = transformers.AutoConfig.from_pretrained(hf)
    transformers.AutoModel.from_config(encoder_config).save_pretrained(hf)
    argv += ['--fresh=True', f'--lm={hf}']
    bare = ['-c', f"import sys; sys.path.insert(0, {ROOT!r}); "
                  "import torch, transformers, matplotlib.pyplot, safetensors.torch; "
                  f"from run.load_lm import load_encoder; load_encoder({hf!r}); print('loaded')"]
    # alternately, so that a slow phase of the machine affects both
    took = [(seconds_until_line(argv, '  step '), seconds_until_line(bare, 'loaded'))
            for _ in range(k['repeats'])]
    whole, bare = np.array(took).T  # [repeats] each
    print(f"{n} train clips: first step {np.median(whole - bare):.1f} s "
          f"(+-{np.ptp(whole - bare) / 2:.1f}) after imports and loading an encoder of 3 x 64 "
          f"({np.median(bare):.1f} s); converted at {rate:.0f} MB/s; median of {k['repeats']}")


def start(k, folder):
    """ Prints the time until the first step for each size of the corpus. """
    for n in k['start_clips']:
        own = os.path.join(folder, str(n))
        os.mkdir(own)
        until_first_step(k, own, n)
