"""
The papers' figures, of runs of one's own.

    python tools/figures.py out/RUN [out/RUN-seed1 ..]
        every figure that these runs allow, into out/RUN/figures/
    python tools/figures.py out/RUN --clip=test_17
        attention of this test clip (else of the first)
    python tools/figures.py out/A out/B .. --tokens --clip=ID
        CMPTA's Figure 5: one clip as the number of pseudo tokens changes
    python tools/figures.py out/sweeps/deepmlf-figure3.json
        a sweep's rows as a curve, mean and standard deviation over seeds
    python tools/figures.py --architecture
        the picture of the systems, into results/architecture.png

Runs of several seeds become a band. Figures are one column wide (85 mm) and read at that size.
"""
import json
import math
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from adapters import FFW, GMRA, AVEncoder, CrossAttention, MMBlock, MSEAdapter
from data import CorpusError, Feed
from eval import check_same_experiment, load_run_and_feed, take_permissions
from lm import FrozenLM, ModelError, TextEncoder
from metrics import check_finite
from model import SYSTEMS, CrossSent, DeepMLF, PseudoTokenLM
from prompts import Prompt
from run.attention import STYLE, WIDE, canvas, draw_attention, save
from run.folder import make_folder, open_regular
from run.report import EvalError, confusion_picture, read_log, read_predictions, read_run

ROOT = Path(__file__).resolve().parent.parent
matplotlib.rcParams.update(STYLE)


# --------------------------------------------------------------------------------------------------
# From logs

def band(ax, xs, ys, label, color=None):
    """ Mean of the runs' curves, and one standard deviation around it; cut at the shortest. ys: one
    list a run. """
    n = min(map(len, ys))
    y = np.array([one[:n] for one in ys])  # [runs,n]
    line, = ax.plot(xs[:n], y.mean(0), label=label, color=color)
    if len(y) == 1:
        return
    mean, std = y.mean(0), y.std(0, ddof=1)  # [n] each
    ax.fill_between(xs[:n], mean - std, mean + std, alpha=0.2, color=line.get_color(), lw=0)


def curves(folders, out):
    """ Training loss and the metric that selects, over epochs, with seeds as a band. """
    logs = [read_log(folder) for folder in folders]
    select = read_run(folders[0])['about']['knobs']['select']
    fig, ((left, right),) = canvas(1, 2)
    terms = sorted({k for e in logs[0] if 'train' in e for k in e['train']})
    if len(terms) <= 2:
        terms = ['loss']   # its one term is the loss itself
    for k in terms:
        entries = [[e for e in log if k in e.get('train', ())] for log in logs]
        epochs = [e['epoch'] for e in entries[0]]
        band(left, epochs, [[e['train'][k] for e in own] for own in entries], k)
    entries = [[e for e in log if 'valid' in e] for log in logs]
    epochs = [e['epoch'] for e in entries[0]]
    values = [[e['valid'][select] for e in own] for own in entries]
    band(right, epochs, values, f'n = {len(logs)}', 'C3')
    left.set(xlabel='epoch', ylabel='training loss and its terms')
    left.legend(frameon=True, framealpha=0.8, edgecolor='none')
    right.set(xlabel='epoch', ylabel=f'validation {select}')
    if len(logs) > 1:
        right.legend()
    save(fig, out, 'curves')


def gate_names(n):
    """ What the n gates of a block multiply; System.gates gives them in this order. """
    if n == 2:
        return ['cross-attention gate', 'FFW gate']
    return [f'gate {i + 1}' for i in range(n)]


def gates(folders, out):
    """ Gate values by layer over training, where the system has gates. """
    logs = [[e for e in read_log(folder) if e.get('gates')] for folder in folders]
    if not all(logs):
        return
    epochs, blocks = [e['epoch'] for e in logs[0]], logs[0][0]['gates']
    names = gate_names(len(next(iter(blocks.values()))))
    fig, axes = canvas(1, len(names))
    for i, (ax, name) in enumerate(zip(axes[0], names)):
        for layer in blocks:
            band(ax, epochs, [[e['gates'][layer][i] for e in log] for log in logs],
                 f'layer {layer}')
        ax.set(xlabel='epoch', ylabel=name)
    for ax in axes[0][1:]:
        ax.sharey(axes[0][0])
    axes[0][0].autoscale()
    axes[0][0].legend()
    save(fig, out, 'gates')


def sweep_curve(path):
    """ The rows of a sweep's JSON in their order, mean and standard deviation over seeds. """
    with open_regular(path, follow=True) as f:
        sweep = json.load(f)
    if 'rows' not in sweep or 'title' not in sweep:
        raise EvalError(f"{path} is not what a sweep has written.")
    rows = [r for r in sweep['rows'] if r['test']]
    by = next(k for k in ('mae', 'wf1') if k in rows[0]['test'][0])
    y = [[metrics[by] for metrics in r['test']] for r in rows]
    means = [np.mean(values) for values in y]
    stds = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in y]
    fig, ((ax,),) = canvas()
    ax.errorbar(range(len(rows)), means, stds, fmt='o-', ms=4, capsize=2)
    ax.set_xticks(range(len(rows)), [r['label'] for r in rows], rotation=30, ha='right')
    ax.set(ylabel=f"test {by} (n = {min(map(len, y))})", title=sweep['title'])
    save(fig, os.path.dirname(path) or '.', Path(path).stem)


# --------------------------------------------------------------------------------------------------
# From predictions

def scatter(predictions, result, out):
    """ Prediction against label, every test clip. """
    low, high = result['info']['range']
    pred, label = predictions['pred'], predictions['label']  # [N] each
    fig, ((ax,),) = canvas(high=WIDE)
    ax.plot([low, high], [low, high], color='0.6', lw=0.8)
    ax.plot(label, pred, '.', ms=3, alpha=0.4)
    test = result['test']
    title = f"MAE {test['mae']:.3f}, r {test['corr']:.3f}, {len(pred)} clips"
    ax.set(xlabel='label', ylabel='prediction', aspect='equal', title=title)
    save(fig, out, 'truth')


def truth(folder, out):
    """ Prediction against label, and the confusion matrix of the classes, or of the rounded
    scores. """
    result, (_, predictions) = read_run(folder), read_predictions(folder)
    pred, label = predictions['pred'], predictions['label']  # [N] each
    if result['info']['kind'] == 'classes':
        names = result['info']['names']
    else:
        scatter(predictions, result, out)
        low, high = result['info']['range']
        levels = np.arange(round(low), round(high) + 1)
        names = [f'{v:+d}' if v else '0' for v in levels]
        pred = np.round(np.clip(pred, low, high)) - levels[0]
        label = np.round(np.clip(label, low, high)) - levels[0]
    make_folder(out)
    path = os.path.join(out, 'confusion.png')
    confusion_picture(path, pred, label, names)
    print(path)


def calibration(folder, out, n_bins=10):
    """ Are the probabilities of 'score' what they say? For classes: of the answer, against how
    often it is right. For scores: of a positive score, against how often the label is positive.
    With the expected calibration error. """
    result, (_, predictions) = read_run(folder), read_predictions(folder)
    if 'prob' not in predictions:
        return
    prob, label = predictions['prob'], predictions['label']  # [N,K], [N]
    if result['info']['kind'] == 'classes':
        stated = prob.max(1)  # [N]
        right = prob.argmax(1) == label  # [N]
        x_name, y_name = 'probability of the answer', 'share of right answers'
    else:
        values = np.linspace(*result['info']['range'], prob.shape[1])  # [K]
        stated = prob[:, values > 1e-6].sum(1)  # [N]
        right = label > 0  # [N]
        x_name, y_name = 'probability of a positive score', 'share of positive labels'

    bin_of = np.minimum((stated * n_bins).astype(int), n_bins - 1)  # [N]
    bins = [bin_of == b for b in range(n_bins) if (bin_of == b).any()]  # [N] each
    x = np.array([stated[b].mean() for b in bins])
    y = np.array([right[b].mean() for b in bins])
    n = np.array([np.sum(b) for b in bins])
    fig, ((ax,),) = canvas(high=WIDE)
    ax.plot([0, 1], [0, 1], color='0.6', lw=0.8)
    ax.plot(x, y, 'o-', ms=4)
    for x_b, y_b, n_b in zip(x, y, n):
        ax.annotate(str(n_b), (x_b, y_b), textcoords='offset points', xytext=(4, -8), fontsize=6)
    error = np.sum(n * np.abs(x - y)) / n.sum()
    ax.set(xlabel=x_name, ylabel=y_name, xlim=(0, 1), ylim=(0, 1), aspect='equal',
           title=f'calibration error {error:.3f}; clips at points')
    save(fig, out, 'calibration')


# --------------------------------------------------------------------------------------------------
# From the model

def bandwidths(d2, perplexity):
    """ Rows of Gaussian neighbour probabilities of that perplexity, for squared distances d2 [N,N]
    -> [N,N]; by bisection of 1 / (2 sigma^2). """
    N = len(d2)
    low, high = torch.zeros(N, 1).double(), torch.full((N, 1), math.inf).double()
    beta = (torch.ones(N, 1) / d2.mean().clamp(min=1e-12)).double()  # [N,1]
    others = ~torch.eye(N, dtype=torch.bool)
    for _ in range(64):
        p = torch.softmax(torch.where(others, -d2 * beta, -torch.inf), 1)  # [N,N]
        entropy = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True)  # [N,1]
        wide = entropy > math.log(perplexity)  # [N,1], too many neighbours: narrower
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return p


def tsne(x, perplexity=30.0, n_steps=750, seed=0):
    """
    Exact t-SNE (van der Maaten & Hinton 2008) of x [N,D] -> [N,2], in plain PyTorch: N x N, so for
    a few thousand points. Early exaggeration of 12 for 250 steps; momentum and gains as there. It
    starts from the first two principal components; the seed breaks ties.
    """
    x = torch.as_tensor(x, dtype=torch.float64)
    N = len(x)
    p = bandwidths(torch.cdist(x, x).square(), min(perplexity, (N - 1) / 3))  # [N,N]
    p = ((p + p.T) / (2 * N)).clamp(min=1e-12)
    centred = x - x.mean(0)
    torch.manual_seed(seed)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:2].T  # [D,2]
    y = centred @ axes  # [N,2]
    y = 1e-4 * y / y[:, :1].std().clamp(min=1e-12) + 1e-6 * torch.randn(N, 2, dtype=torch.float64)
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)  # [N,2] each
    rate = max(N / 12.0, 50.0)
    others = ~torch.eye(N, dtype=torch.bool)
    for step in range(n_steps):
        early = step < 250
        w = (1 + torch.cdist(y, y).square()).reciprocal() * others  # [N,N], Student's t
        force = (12.0 * p if early else p) - w / w.sum()  # [N,N]
        gradient = 4 * ((force * w).sum(1, keepdim=True) * y - (force * w) @ y)  # [N,2]
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y.numpy()


@torch.no_grad()
def fused_vectors(run, feed, n):
    """ The fused vectors of the first n test clips [n,D] and their labels [n]; None where the
    system has no such vectors. """
    vectors, labels = [], []
    for i in range(0, n, 64):
        batch = feed('test', np.arange(i, min(i + 64, n)))
        x = run.model.fused(batch, run.predict)  # [B,D]
        if x is None:
            return None
        vectors.append(x)
        labels.append(batch['label'])
    return torch.cat(vectors).float().cpu(), torch.cat(labels).cpu().numpy()


def embeddings(folder, out, n_most=1000, **allowed):
    """ t-SNE of the fused vectors of the test clips, coloured by label (CrossSent's Figures 3 and
    4). """
    run, feed = load_run_and_feed(folder, **allowed)
    n = min(feed.n_clips['test'], n_most)
    found = fused_vectors(run, feed, n)
    if found is None:
        return
    vectors, label = found  # [n,D], [n]
    try:
        check_finite({'the fused vector': vectors.numpy()}, feed.corpus.id('test'))
    except ValueError as e:
        raise EvalError(f"{folder}: {e}.") from None
    y = tsne(vectors)  # [n,2]
    fig, ((ax,),) = canvas(high=WIDE)
    classes = run.info['kind'] == 'classes'
    points = ax.scatter(*y.T, c=label, s=5, cmap='tab10' if classes else 'coolwarm', lw=0)
    if classes:   # not every class need be among these clips
        handles, _ = points.legend_elements(num=None)
        names = [k if k.isascii() else str(i) for i, k in enumerate(run.info['names'])]
        ax.legend(handles, [names[v] for v in np.unique(label).astype(int)])
    else:
        fig.colorbar(points, label='label', shrink=0.8)
    ax.set(xticks=[], yticks=[], title=f't-SNE of fused vectors, {n} test clips')
    save(fig, out, 'tsne')


def clip_number(feed, clip):
    """ The place of the clip of an id in the test split; '' is the first. Raises EvalError. """
    ids = feed.corpus.id('test')
    if not clip:
        return 0
    if clip not in ids:
        raise EvalError(f"there is no clip {clip!r} in the test split of {feed.corpus.name}: "
                        f"it has {ids[0]}, {ids[1]} ..")
    return ids.index(clip)


def attention(folder, out, clip='', **allowed):
    """ Where the system looks at one test clip, if it attends to anything. """
    run, feed = load_run_and_feed(folder, **allowed)
    draw_attention(run, feed, clip_number(feed, clip), out)


def tokens(folders, out, clip='', **allowed):
    """ CMPTA's Figure 5: one clip's prediction, and its attention over audio and video, for runs of
    different n_pseudo. """
    n_pseudo = {folder: read_run(folder)['about']['knobs'].get('n_pseudo') for folder in folders}
    for folder, n in n_pseudo.items():
        if n is None:
            raise EvalError(f"{folder} has no pseudo tokens: --tokens is for systems that make "
                            "them.")
    fig, axes = canvas(len(folders), 2, high=0.6 + 1.1 * len(folders))
    for folder, row in zip(sorted(folders, key=n_pseudo.get), axes):
        run, feed = load_run_and_feed(folder, **allowed)
        i = clip_number(feed, clip)
        batch = feed('test', np.array([i]))
        with torch.no_grad():
            views = run.model.views(batch, run.predict)
        if not {'over audio', 'over vision'} <= set(views):
            raise EvalError(f"{folder} has no attention over audio and over video: --tokens is for "
                            "runs of CMPTA that have both.")
        pred = float(run.predict(batch)['pred'])
        if not np.isfinite(pred):
            raise EvalError(f"{folder}: pred of clip {feed.corpus.id('test')[i]} is NaN or inf, so "
                            "there is nothing to draw.")
        title = f"{n_pseudo[folder]} tokens: {pred:+.2f}"
        for ax, m in zip(row, ('audio', 'vision')):
            weights, names, column = views[f'over {m}']
            for name, line in zip(names, weights.cpu().numpy()):
                ax.plot(line, label=f'from {name}')
            ax.set(xlabel=column, ylabel='weight', title=title)
    for ax in axes[-1]:   # the most tokens have the most directions
        ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.6))
    words = f"{feed.corpus.id('test')[i]}: {feed.corpus.text('test')[i]}"
    title = f"label {float(batch['label']):+.2f}, {words}"[:70]
    fig.suptitle(title, fontsize=7, parse_math=False)
    save(fig, out, 'tokens')


# --------------------------------------------------------------------------------------------------
# The systems, drawn: title -> boxes of (class, what it gives, shape, x, y), and arrows from box to
# box by number

DRAWN = {
    'DeepMLF': (
        [(FrozenLM, 'text', '[B,T,D]', 0, 0),
         (AVEncoder, 'audio, video', 'Z [B,m,d]', 2, 0),
         (DeepMLF, 'fusion tokens', '[B,F,D]', 1, 0),
         (FrozenLM, 'layer l', 'x_t [B,T,D], x_f [B,F,D]', 0.5, 1),
         (CrossAttention, 'x_f looks at Z', '[B,F,D]', 1.5, 2),
         (FFW, 'every token', '[B,T+F,D]', 0.5, 3),
         (MMBlock, 'after some layers', 'x_t, x_f', 1.5, 4),
         (DeepMLF, 'task head', '[B]', 0.5, 5)],
        [(0, 3), (2, 3), (3, 4), (1, 4), (4, 5), (5, 6), (6, 7)]),
    'MSE-Adapter, CMPTA': (
        [(FrozenLM, 'text, embedded', '[B,T,D]', 0, 0),
         (Feed, 'audio, video', '[B,S,d_a], [B,S,d_v]', 1.5, 0),
         (MSEAdapter, 'or CMPTA: pseudo tokens', '[B,P,D]', 1.5, 1.3),
         (Prompt, 'pseudo tokens, text, question', '[B,L,D]', 0.5, 2.5),
         (FrozenLM, "all layers, once; behind it the labels' trie", '[B,L+N,D]', 0.5, 3.75),
         (PseudoTokenLM, 'log p of each label', '[B,K]', 0.5, 5)],
        [(0, 3), (1, 2), (0, 2), (2, 3), (3, 4), (4, 5)]),
    'CrossSent': (
        [(TextEncoder, 'text', '[B,T,D]', 0, 0),
         (GMRA, 'audio, video on tokens', '[B,T,d] each', 1.5, 0),
         (TextEncoder, 'layers before gmra_layer', '[B,T,D]', 0, 1.5),
         (GMRA, 'gate and residual', '[B,T,D]', 1, 2.75),
         (TextEncoder, 'the other layers', '[B,T,D]', 0.5, 3.9),
         (CrossSent, 'sentence vector, head', '[B]', 0.5, 5)],
        [(0, 2), (2, 3), (1, 3), (3, 4), (4, 5)]),
}
COLORS = {FrozenLM: '#dfe7f3', Feed: 'white', Prompt: 'white'}   # others are trained
TRAINED = '#fdf0dc'


def architecture(out):
    """ The systems side by side, data going up; each box has the class that does it and the shape
    that it gives. """
    fig, (axes,) = canvas(1, len(DRAWN), high=4.2, wide=3.2 * WIDE)
    for ax, (title, (boxes, arrows)) in zip(axes, DRAWN.items()):
        drawn = []
        for cls, what, shape, x, y in boxes:
            box = dict(boxstyle='round,pad=0.4', fc=COLORS.get(cls, TRAINED), ec='0.5', lw=0.8)
            drawn.append(ax.text(x, y, f'{cls.__name__}\n{what}\n{shape}', ha='center',
                                 va='center', fontsize=7, linespacing=1.3, bbox=box))
        for a, b in arrows:   # from edge to edge
            arrow = dict(arrowstyle='->', color='0.4', lw=1, shrinkA=2, shrinkB=2,
                         patchA=drawn[a].get_bbox_patch(), patchB=drawn[b].get_bbox_patch())
            ax.annotate('', boxes[b][3:], boxes[a][3:], arrowprops=arrow)
        xs = [box[3] for box in boxes]
        ax.set(xlim=(min(xs) - 0.75, max(xs) + 0.75), ylim=(-0.6, 5.6), title=title)
        ax.axis('off')
    fig.suptitle('blue: frozen.  yellow: trained.  white: no weights.  letters: see the README',
                 fontsize=7, color='0.3')
    save(fig, out, 'architecture')


def main(argv):
    """ The command line of the docstring. Raises EvalError and its kin for a sentence. """
    paths = [a.rstrip('/') for a in argv if not a.startswith('--')]
    flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
    if list(flags) == ['architecture']:
        architecture(str(ROOT / 'results'))
        return
    if not paths or 'help' in flags:
        print(__doc__)
        return
    allowed = take_permissions(flags)
    if odd := sorted(set(flags) - {'clip', 'tokens'}):
        raise EvalError(f"there is no flag --{odd[0]}: there are --clip=ID, --tokens and "
                        "--architecture.")
    if paths[0].endswith('.json'):
        for path in paths:
            sweep_curve(path)
        return
    out, clip = os.path.join(paths[0], 'figures'), flags.get('clip', '')
    if 'tokens' in flags:
        tokens(paths, out, clip, **allowed)
        return
    system = read_run(paths[0])['about']['knobs']['system']
    check_same_experiment(paths)
    curves(paths, out)
    gates(paths, out)
    if not SYSTEMS[system].predicts:
        return
    truth(paths[0], out)
    calibration(paths[0], out)
    embeddings(paths[0], out, **allowed)
    attention(paths[0], out, clip, **allowed)


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (EvalError, CorpusError, ModelError) as e:
        sys.exit(f"figures: {e}")
    except OSError as e:
        sys.exit(f"figures: {e.filename} cannot be read or written: {e.strerror}.")
