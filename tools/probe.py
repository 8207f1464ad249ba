"""
Predicts labels from the hidden states of a frozen LM, without an adapter: what an adapter must
beat.

    python tools/probe.py config/lora_mosi_gemma.py --corpus=mosi_official.pkl --lm=FOLDER
        reads the texts as a run of this config does. Ridge regression on the last token's state and
        on the mean over tokens, behind each layer of the LM; then an MLP (5 seeds) on the states
        with the best ridge by the valid split. For classes, ridge regresses on one-hot labels.
    .. --runs=out/A,out/B
        also the paired difference of these runs to both, with its 95 % interval (metrics.claim)

The states are computed once and kept in DATA_DIR/states.

Axis letters: N texts, B texts of a batch, T text tokens, l layers, D width, K classes or 1.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from adapters import text_vector
from configurator import declared_knobs, run_knobs
from corpora.names import SPLITS
from corpora.unpickle import CorpusError
from data import Feed, epoch_order, open_corpus
from metrics import SHOWN, claim, is_better, markdown_table, mean_std_n, score_by, task_metrics
from model import SYSTEMS
from run.errors import ModelError
from run.finished import (
    EvalError,
    experiment_of,
    read_predictions,
    read_run,
    refuse_repeated_seeds,
)
from run.folder import replacing
from run.frozen_text import kept_array
from run.machine import choose_device, print_any_text

ROOT = Path(__file__).resolve().parent.parent
POOLS = ('last', 'mean')
STRENGTHS = 10.0 ** np.arange(0, 7)   # of the ridge penalty, for standardised states
SEEDS = range(5)                      # of the MLP
MLP_WIDTH, MLP_DROPOUT, MLP_LR, MLP_DECAY, MLP_EPOCHS = 64, 0.2, 1e-3, 1e-2, 40


# --------------------------------------------------------------------------------------------------
# Hidden states

@torch.no_grad()
def states_of(lm, feed, split):
    """
    The states behind each layer of an LM for the texts of a split, by POOLS -> [N,l,2,D] float32.
    The last layer's are those behind the final norm.
    """
    out = np.zeros((feed.n_clips[split], lm.n_layers, len(POOLS), lm.width), np.float32)
    for index in epoch_order(feed.cost(split), 32, seed=0, epoch=None):
        batch = feed(split, index)
        tokens, mask = batch['tokens'], batch['text_mask']  # [B,T], [B,T]
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1,T]
        x, rope = lm.place(lm.embed(tokens), positions)  # [B,T,D]
        for l in range(lm.n_layers):
            x, _ = lm.block(l, x, rope)
            y = lm.final_norm(x) if l == lm.n_layers - 1 else x
            for i, pool in enumerate(POOLS):
                out[index, l, i] = text_vector(y.float(), mask, pool).cpu().numpy()
    return out


def kept_states(lm, feed, split, folder):
    """ As states_of, from a file in `folder` that is written at the first call. """
    tokens = [[int(t) for t in feed.tokens[split][i]] for i in feed.clips[split]]
    which = json.dumps([lm.fingerprint(), str(lm.parts['embed'].weight.dtype), tokens])
    path = os.path.join(folder, hashlib.sha256(which.encode()).hexdigest()[:16] + '.npy')
    shape = len(tokens), lm.n_layers, len(POOLS), lm.width  # N, l, 2, D
    kept = kept_array(path, shape, np.float32)
    if kept is not None:
        return kept
    states = states_of(lm, feed, split)
    try:
        os.makedirs(folder, exist_ok=True)
        with replacing(path) as new, open(new, 'wb') as f:
            np.save(f, states)
    except OSError as e:
        print(f"note: the states of {split} are not kept, because {path} cannot be written "
              f"({e.strerror}); free space, or give another --data_dir")
    return states


def standardised(states, layer, pool):
    """ One layer's states of each split, by the mean and std of train: {split: [N,D]}. """
    x = {split: np.asarray(s[:, layer, pool], np.float64) for split, s in states.items()}
    mean, std = x['train'].mean(0), x['train'].std(0) + 1e-6
    return {split: (a - mean) / std for split, a in x.items()}


# --------------------------------------------------------------------------------------------------
# Two probes

def ridge(x, y):
    """
    Ridge regression of y [N,K] on x {split: [N,D]}: yields the predictions {split: [N,K]} for each
    strength of the penalty.
    """
    mean = y.mean(0)
    values, vectors = np.linalg.eigh(x['train'].T @ x['train'])  # [D], [D,D]
    projected = vectors.T @ (x['train'].T @ (y - mean))  # [D,K]
    for strength in STRENGTHS:
        weight = vectors @ (projected / (values + strength)[:, None])  # [D,K]
        yield {split: a @ weight + mean for split, a in x.items()}


def mlp(x, y, kind, score, seed):
    """
    An MLP of one hidden layer on x {split: [N,D]}, y [N,K] of train -> predictions {split: [N,K]}
    of the epoch with the best `score` (a function of valid's predictions; lower is better).
    """
    torch.manual_seed(seed)
    x = {split: torch.tensor(a, dtype=torch.float32) for split, a in x.items()}
    y = torch.tensor(y, dtype=torch.float32)
    model = nn.Sequential(
        nn.Dropout(MLP_DROPOUT), nn.Linear(x['train'].shape[1], MLP_WIDTH), nn.ReLU(),
        nn.Dropout(MLP_DROPOUT), nn.Linear(MLP_WIDTH, y.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=MLP_LR, weight_decay=MLP_DECAY)
    best = None
    for _ in range(MLP_EPOCHS):
        model.train()
        for index in torch.randperm(len(y)).split(32):
            out = model(x['train'][index])  # [B,K]
            loss = F.cross_entropy(out, y[index]) if kind == 'classes' else F.l1_loss(out, y[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            predicted = {split: model(a).double().numpy() for split, a in x.items()}
        value = score(predicted['valid'])
        if best is None or value < best[0]:
            best = value, predicted
    return best[1]


class Task:
    """ The labels of a corpus, as the probes learn and score them. """

    def __init__(self, feed):
        k = feed.k
        self.info = feed.info
        self.kind = self.info['kind']
        self.labels = {s: feed.corpus.label(s, k['label'])[feed.clips[s]] for s in SPLITS}
        self.by, self.metric = score_by(self.info)
        y = self.labels['train']
        # targets of train, [N,K]
        self.y = np.eye(len(self.info['names']))[y] if self.kind == 'classes' else y[:, None]

    def pred(self, out):
        """ Predicted labels [N] of a probe's output [N,K]. """
        return (out.argmax(1) if self.kind == 'classes' else out[:, 0]).astype(np.float32)

    def metrics(self, out, split):
        return task_metrics(self.pred(out), self.labels[split], self.info)

    def loss(self, out):
        """ The valid split's score of an output [N,K]; lower is better. """
        value = self.metrics(out, 'valid')[self.by]
        return -value if is_better(self.by, 1.0, 0.0) else value


# --------------------------------------------------------------------------------------------------
# The table

def best_ridge(x, task):
    """ The ridge predictions {split: [N,K]} with the best score on valid. """
    return min(ridge(x, task.y), key=lambda out: task.loss(out['valid']))


def read_runs(folders, ids, task):
    """ {name of an experiment: test predictions [runs,N]} of finished runs. Raises EvalError. """
    found, results = {}, [read_run(folder) for folder in folders]
    refuse_repeated_seeds(folders, results)
    for folder, r in zip(folders, results):
        run_ids, p = read_predictions(folder)
        if run_ids != ids or not np.allclose(p['label'], task.labels['test'], atol=1e-5):
            raise EvalError(f"{folder} was tested on other clips or labels: leave it out.")
        found.setdefault(experiment_of(r), []).append((folder, p['pred']))
    return {runs[0][0]: np.stack([pred for _, pred in runs]) for runs in found.values()}


def probe(k, runs=()):
    """ Prints the tables for the knobs of a run. Raises CorpusError, ModelError, EvalError. """
    system = SYSTEMS[k['system']]
    if not system.frozen_lm:
        raise EvalError(f"system={k['system']!r} has no frozen LM: give the config of a system that "
                        "has one.")
    if 'prompt' in k:
        raise EvalError(f"system={k['system']!r} puts a prompt and places for pseudo tokens around "
                        "each text: give a config whose LM reads the text alone, such as "
                        "config/lora_mosi_gemma.py.")
    device, dtype = choose_device(k['device'], k['dtype'], system.float32_bytes, k)
    corpus = open_corpus(k['corpus'], k['data_dir'])
    torch.manual_seed(k['seed'])
    model, tokenizer = system.build(k, corpus, '', getattr(torch, dtype))
    feed = Feed(corpus, k, tokenizer, device, model.to(device).eval())
    task = Task(feed)
    folder = os.path.join(k['data_dir'], 'states')
    states = {split: kept_states(model.lm, feed, split, folder) for split in SPLITS}
    print(f"{k['lm']} on {corpus.name}, label {k['label']}, {dtype}: {feed.n_clips['train']} train clips, "
          f"{k['context']} earlier utterances")

    rows, fits = [], []
    for layer in range(model.lm.n_layers):
        row = [layer + 1]
        for i, pool in enumerate(POOLS):
            out = best_ridge(standardised(states, layer, i), task)
            value = task.loss(out['valid'])
            fits.append((value, layer, i, out))
            row += [f'{abs(value):.3f}', f"{task.metrics(out['test'], 'test')[task.by]:.3f}"]
        rows.append(row)
    header = ['layer'] + [f'{pool}: {split} {task.by}' for pool in POOLS for split in SPLITS[1:]]
    print('\n' + markdown_table(header, rows))

    _, layer, i, out = min(fits, key=lambda fit: fit[0])
    x = standardised(states, layer, i)
    place = f'{POOLS[i]} after layer {layer + 1}'
    outs = {f'ridge, {place}': [out['test']],
            f'MLP, {place}': [mlp(x, task.y, task.kind, task.loss, s)['test'] for s in SEEDS]}
    measured = task.metrics(out['test'], 'test')
    keys = [key for key in SHOWN + ['macro_f1'] if key in measured]
    if task.kind == 'classes':
        keys += [key for key in measured if key.startswith('f1_')]   # of each class
    rows = []
    for name, found in outs.items():
        scores = [task.metrics(o, 'test') for o in found]
        rows.append([name] + [mean_std_n([s[key] for s in scores]) for key in keys])
    print('\n' + markdown_table(['test'] + keys, rows))

    ids = [corpus.id('test')[n] for n in feed.clips['test']]
    rows = []
    for name, preds in read_runs(runs, ids, task).items():
        differences = []
        for found in outs.values():
            first = np.stack([task.pred(o) for o in found])  # [seeds,N]
            if len(first) == 1:   # ridge has no seed: the same predictions stand for each run
                first = first.repeat(len(preds), 0)
            label = task.labels['test']
            differences.append(claim(task.metric, first, preds, label, task.by)['text'])
        rows.append([name, len(preds)] + differences)
    if rows:
        print('\n' + markdown_table([f'{task.by} minus', 'n', *outs], rows))


def main(argv):
    if not argv or {'-h', '--help'} & set(argv):
        print(__doc__)
        return
    runs = [a.removeprefix('--runs=').split(',') for a in argv if a.startswith('--runs=')]
    argv = [a for a in argv if not a.startswith('--runs=')]
    argv = [a if a.startswith('-') or os.path.exists(a) else str(ROOT / a) for a in argv]
    common, annotations = declared_knobs(ROOT / 'train.py')
    _, k = run_knobs(argv, common, annotations, SYSTEMS)
    probe(k, sum(runs, []))


if __name__ == '__main__':
    print_any_text()
    try:
        main(sys.argv[1:])
    except (CorpusError, EvalError, ModelError) as e:
        sys.exit(f"probe: {e}")
