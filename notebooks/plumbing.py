"""
What the three notebooks share and do not teach: paths, trained prerequisites, the training loop,
and details of pictures.

    from plumbing import fit, knobs_of, train

Importing it makes the repository the working directory. With NANOMSA_FAST=1 in the environment, the
test suite's setting, prerequisites are trained for ten steps in the folder NANOMSA_WORK.
"""
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

started = time.time()
ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path[:0] = [str(ROOT), str(ROOT / 'notebooks')]
os.environ['HF_HUB_OFFLINE'] = '1'   # nothing is downloaded
warnings.filterwarnings('ignore', message='IProgress')   # tqdm asks for ipywidgets

import matplotlib.pyplot as plt  # noqa: E402, after HF_HUB_OFFLINE and sys.path
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from configurator import declared_knobs, run_knobs  # noqa: E402
from corpora.toy import WORDS  # noqa: E402
from data import epoch_order  # noqa: E402
from model import SYSTEMS  # noqa: E402

fast = bool(os.environ.get('NANOMSA_FAST'))
work = Path('out/notebooks')
if fast:
    work = Path(os.environ.get('NANOMSA_WORK') or tempfile.mkdtemp())

transformers.utils.logging.set_verbosity_error()
plt.rcParams.update({'figure.dpi': 80, 'font.size': 9, 'figure.constrained_layout.use': True,
                     'axes.titlesize': 9, 'legend.fontsize': 8})
torch.manual_seed(0)


def knobs_of(config):
    """ All knobs of a config, as train.py takes them, with data_dir for the notebooks. """
    _, k = run_knobs([config], *declared_knobs('train.py'), SYSTEMS)
    return k | dict(data_dir=str(work / 'data'))


def train(config, *flags):
    """
    Train a run by train.py, unless it is finished. -> its folder, and its result.json as a dict.
    flags: knobs, such as '--max_steps=200'.
    """
    folder = work / Path(config).stem
    if not (folder / 'result.json').exists():
        command = [sys.executable, 'train.py', config, f'--out_dir={folder}',
                   f'--data_dir={work / "data"}', '--fresh=True', *flags]
        if fast:
            command.append('--max_steps=10')
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{config} could not be trained: {done.stderr[-2000:]}")
    return str(folder), json.loads((folder / 'result.json').read_text())


def fit(model, feed, k, n_steps, warm_up=60, seed=None, note=lambda: None):
    """
    Train a model by AdamW, with a linear warm-up and a cosine to zero; leave it in eval mode. ->
    the loss terms of each step, and what note() returns after each step.

    The weights of the ordinal losses reach their full value after a quarter of the steps.
    """
    seed = k['seed'] if seed is None else seed
    groups = [dict(params=g['params'], weight_decay=k['weight_decay'] * g['decay'])
              for g in model.param_groups()]
    optimizer = torch.optim.AdamW(groups, lr=k['lr'], betas=(k['beta_1'], k['beta_2']))
    params = [p for g in groups for p in g['params']]
    history, notes, epoch = [], [], 0
    model.train()
    while len(history) < n_steps:
        order = epoch_order(feed.cost('train'), k['batch_size'], seed, epoch)
        for index in order[:n_steps - len(history)]:
            done = len(history) / n_steps
            cosine = 0.5 + 0.5 * math.cos(math.pi * done)
            for g in optimizer.param_groups:
                g['lr'] = k['lr'] * min((len(history) + 1) / warm_up, cosine)
            out = model(feed('train', index) | dict(epoch=epoch_of_ramp(k, done)))
            out['loss'].backward()
            torch.nn.utils.clip_grad_norm_(params, k['grad_clip'])
            optimizer.step()
            optimizer.zero_grad()
            history.append({term: float(v.detach()) for term, v in out['terms'].items()})
            notes.append(note())
        epoch += 1
    model.eval()
    return history, notes


def epoch_of_ramp(k, done):
    """
    The epoch at which losses.ramp, a cosine over k['ramp_epochs'], has the value that rises
    linearly to 1 over the first quarter of a run. done: the share of the run's steps, 0 to 1.
    """
    share = min(1.0, 4 * done)
    epoch = k['ramp_epochs'] * math.acos(1 - 2 * share) / math.pi
    return torch.tensor(epoch, dtype=torch.double)


def smooth(values, n=25):
    """ The running mean of n values, or of all where there are fewer. """
    n = min(n, len(values))
    return np.convolve(values, np.ones(n) / n, 'valid')


def valence_of(text):
    """ The group of valence words in a text of the toy corpus, from 0 (awful) to 4 (wonderful). """
    return next(v for v, group in enumerate(WORDS) for word in group if f' {word} ' in text)


def draw_frames(ax, corpus, stream, i):
    """ Draw the features of a stream of test clip i: frames from left to right. """
    frames = np.array(corpus.frames('test', stream, i))  # [S,d]
    ax.imshow(frames.T, aspect='auto', cmap='coolwarm', vmin=-3, vmax=3)
    ax.set(ylabel=f'{stream} feature', xlabel=f'{stream} frame')


def draw_trie(ax, prompt, tokenizer, label):
    """
    Draw the trie of a prompt's answers, with the path of one label in red. A node is a prefix of
    answers; the last tokens that may follow a node stand in one line behind it.
    """
    answers = [tuple(ids) for ids in prompt.answers]
    path = answers[prompt.labels.index(label)]
    inner = sorted({ids[:n] for ids in answers for n in range(len(ids))})
    # nodes with last tokens behind them get a line each, by their scores; others stand between
    last = [node for node in inner if any(ids[:-1] == node for ids in answers)]
    last.sort(key=lambda node: -np.mean(values_below(prompt, answers, node)))
    height = {node: -i for i, node in enumerate(last)}
    for node in sorted(set(inner) - set(last), key=len, reverse=True):
        height[node] = np.mean([height[x] for x in last if x[:len(node)] == node])

    def color(node):
        return 'C3' if path[:len(node)] == node else '0.6'

    for node in inner:
        x, y = len(node), height[node]
        name = tokenizer.convert_ids_to_tokens(node[-1]) if node else 'prompt'
        if node:
            ax.plot([x - 1, x], [height[node[:-1]], y], color=color(node), lw=1, zorder=0)
        ax.text(x, y, name, ha='center', va='center', fontsize=11,
                bbox=dict(facecolor='white', edgecolor=color(node), pad=3))
        ends = [(name, ids) for name, ids in zip(prompt.labels, answers) if ids[:-1] == node]
        for n, (_, ids) in enumerate(sorted(ends)):
            ax.text(x + 0.35 + 0.18 * n, y, tokenizer.convert_ids_to_tokens(ids[-1]), fontsize=11,
                    va='center', ha='center', color='C3' if ids == path else '0.2')
    ax.set(xlim=(-0.4, max(map(len, inner)) + 2.2), ylim=(-len(last) + 0.4, 0.6))
    ax.axis('off')


def values_below(prompt, answers, node):
    """ The scores of the answers that begin with a node. """
    return [v for v, ids in zip(prompt.values, answers) if ids[:len(node)] == node]


def print_time():
    """ Print how long the notebook has taken so far. """
    n = torch.get_num_threads()
    print(f'this notebook took {time.time() - started:.0f} s with {n} thread(s)')
