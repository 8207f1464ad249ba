"""
The papers' figures, of runs of one's own.

    python figures.py out/RUN [out/RUN-seed1 ..]          every figure that these runs allow, into out/RUN/figures/
    python figures.py out/RUN --clip=test_17              attention of this test clip (else of the first)
    python figures.py out/A out/B .. --tokens --clip=ID   CMPTA's Figure 5: one clip as the number of pseudo tokens changes
    python figures.py out/sweeps/deepmlf-figure3.json     a sweep's rows as a curve, mean and standard deviation over seeds
    python figures.py --architecture                      the README's picture of the systems, into results/architecture.png

Runs of several seeds become a band. Figures are one column wide (85 mm) and read at that size.
"""
import json
import math
import os
import sys

import matplotlib
if 'matplotlib.pyplot' not in sys.modules: matplotlib.use('Agg')   # a notebook has chosen where its pictures go
import matplotlib.pyplot as plt
import numpy as np
import torch

from adapters import FFW, GMRA, AVEncoder, CrossAttention, MMBlock, MSEAdapter
from data import CorpusError, Feed
from eval import (EvalError, bring_back, check_finite, confusion_picture, one_system, read_log, read_predictions, read_run,
                  take_permissions)
from files import make_folder, open_regular, save_picture
from lm import FrozenLM, ModelError, TextEncoder
from model import CrossSent, DeepMLF, PseudoTokenLM
from prompts import Prompt

WIDE, HIGH = 3.35, 2.4   # inches: 85 mm, and what goes with it
plt.rcParams.update({'font.size': 8, 'axes.titlesize': 8, 'legend.fontsize': 7, 'legend.frameon': False, 'savefig.dpi': 200,
                     'lines.linewidth': 1.2})


def save(fig, folder, name):
    """ The picture as folder/name.png; says where. """
    make_folder(folder)
    path = os.path.join(folder, name + '.png')
    save_picture(fig, path)
    plt.close(fig)
    print(path)


def canvas(rows=1, columns=1, high=HIGH, wide=WIDE):
    """ A figure of a column's width and its axes [rows][columns]; inches. """
    return plt.subplots(rows, columns, figsize=(wide, high), layout='constrained', squeeze=False)


# ---------------------------------------------------------------------------------------------------------
# From logs

def band(ax, xs, ys, label, color=None):
    """ Mean of the runs' curves, and one standard deviation around it; cut at the shortest. ys: one list a run. """
    n = min(map(len, ys))
    y = np.array([one[:n] for one in ys])                                                        # [runs,n]
    line, = ax.plot(xs[:n], y.mean(0), label=label, color=color)
    if len(y) == 1: return
    mean, std = y.mean(0), y.std(0, ddof=1)
    ax.fill_between(xs[:n], mean - std, mean + std, alpha=0.2, color=line.get_color(), lw=0)


def curves(folders, out):
    """ Training loss and the metric that selects, over epochs, with seeds as a band. """
    logs, select = [read_log(f) for f in folders], read_run(folders[0])['about']['knobs']['select']
    fig, ((left, right),) = canvas(1, 2)
    terms = sorted({k for e in logs[0] if 'train' in e for k in e['train']})
    for k in terms if len(terms) > 2 else ['loss']:   # one term is the loss
        entries = [[e for e in log if k in e.get('train', ())] for log in logs]
        band(left, [e['epoch'] for e in entries[0]], [[e['train'][k] for e in es] for es in entries], k)
    entries = [[e for e in log if 'valid' in e] for log in logs]
    band(right, [e['epoch'] for e in entries[0]], [[e['valid'][select] for e in es] for es in entries], f'n = {len(logs)}', 'C3')
    left.set(xlabel='epoch', ylabel='training loss and its terms'); left.legend(frameon=True, framealpha=0.8, edgecolor='none')
    right.set(xlabel='epoch', ylabel=f'validation {select}')
    if len(logs) > 1: right.legend()
    save(fig, out, 'curves')


def gates(folders, out):
    """ DeepMLF's gate values by layer over training: what multiplies cross-attention, and the FFW. """
    logs = [[e for e in read_log(f) if e.get('gates')] for f in folders]
    if not all(logs): return
    fig, axes = canvas(1, 2)
    for i, (ax, what) in enumerate(zip(axes[0], ('cross-attention gate', 'FFW gate'))):
        epochs = [e['epoch'] for e in logs[0]]
        for layer in logs[0][0]['gates']: band(ax, epochs, [[e['gates'][layer][i] for e in log] for log in logs], f'layer {layer}')
        ax.set(xlabel='epoch', ylabel=what)
    axes[0][0].sharey(axes[0][1])
    axes[0][0].autoscale()
    axes[0][0].legend()
    save(fig, out, 'gates')


def sweep_curve(path):
    """ The rows of a sweep's JSON in their order, mean and standard deviation over seeds. """
    with open_regular(path, follow=True) as f: sweep = json.load(f)
    if 'rows' not in sweep or 'title' not in sweep: raise EvalError(f"{path} is not what a sweep has written.")
    rows = [r for r in sweep['rows'] if r['test']]
    by = 'mae' if 'mae' in rows[0]['test'][0] else 'wf1'
    y = [[m[by] for m in r['test']] for r in rows]
    fig, ((ax,),) = canvas()
    ax.errorbar(range(len(rows)), [np.mean(v) for v in y], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in y], fmt='o-', ms=4, capsize=2)
    ax.set_xticks(range(len(rows)), [r['label'] for r in rows], rotation=30, ha='right')
    ax.set(ylabel=f"test {by} (n = {min(map(len, y))})", title=sweep['title'])
    save(fig, os.path.dirname(path) or '.', os.path.splitext(os.path.basename(path))[0])


# ---------------------------------------------------------------------------------------------------------
# From predictions

def truth(folder, out):
    """ Prediction against label, every test clip; or the confusion matrix: of the classes, or of the rounded scores. """
    r, (_, p) = read_run(folder), read_predictions(folder)
    if r['info']['kind'] == 'classes': names, pred, label = r['info']['names'], p['pred'], p['label']
    else:
        low, high = r['info']['range']
        fig, ((ax,),) = canvas(high=WIDE)
        ax.plot([low, high], [low, high], color='0.6', lw=0.8)
        ax.plot(p['label'], p['pred'], '.', ms=3, alpha=0.4)
        title = f"MAE {r['test']['mae']:.3f}, r {r['test']['corr']:.3f}, {len(p['pred'])} clips"
        ax.set(xlabel='label', ylabel='prediction', aspect='equal', title=title)
        save(fig, out, 'truth')
        levels = np.arange(round(low), round(high) + 1)
        names = [f'{v:+d}' if v else '0' for v in levels]
        pred, label = (np.round(np.clip(x, low, high)) - levels[0] for x in (p['pred'], p['label']))
    make_folder(out)
    confusion_picture(os.path.join(out, 'confusion.png'), pred, label, names)
    print(os.path.join(out, 'confusion.png'))


def calibration(folder, out, n_bins=10):
    """ Are the probabilities of 'score' what they say? For classes: of the answer, against how often it is right. For scores:
    of a positive score, against how often the label is positive. With the expected calibration error. """
    r, (_, p) = read_run(folder), read_predictions(folder)
    if 'prob' not in p: return
    if r['info']['kind'] == 'classes':
        said, right = p['prob'].max(1), p['prob'].argmax(1) == p['label']                        # [N], [N]
        what = 'probability of the answer', 'share of right answers'
    else:
        values = np.linspace(*r['info']['range'], p['prob'].shape[1])                            # [K]
        said, right = p['prob'][:, values > 1e-6].sum(1), p['label'] > 0                         # [N], [N]
        what = 'probability of a positive score', 'share of positive labels'
    bin_of = np.minimum((said * n_bins).astype(int), n_bins - 1)                                 # [N]
    filled = [b for b in range(n_bins) if (bin_of == b).any()]
    x, y, n = (np.array([f(bin_of == b) for b in filled]) for f in (lambda m: said[m].mean(), lambda m: right[m].mean(), np.sum))
    fig, ((ax,),) = canvas(high=WIDE)
    ax.plot([0, 1], [0, 1], color='0.6', lw=0.8)
    ax.plot(x, y, 'o-', ms=4)
    for a, b, k in zip(x, y, n): ax.annotate(str(k), (a, b), textcoords='offset points', xytext=(4, -8), fontsize=6)
    error = np.sum(n * np.abs(x - y)) / n.sum()
    ax.set(xlabel=what[0], ylabel=what[1], xlim=(0, 1), ylim=(0, 1), aspect='equal', title=f'calibration error {error:.3f}; clips at points')
    save(fig, out, 'calibration')


# ---------------------------------------------------------------------------------------------------------
# From the model

def tsne(x, perplexity=30.0, n_steps=750, seed=0):
    """
    Exact t-SNE (van der Maaten & Hinton 2008) of x [N,D] -> [N,2], in plain PyTorch: N x N, so for a few thousand points.
    Bandwidths by bisection so that each row of P has the perplexity; early exaggeration of 12 for 250 steps; momentum and
    gains as there. Starts from the first two principal components: no luck in it but the seed's of a tie.
    """
    x = torch.as_tensor(x, dtype=torch.float64)
    N = len(x)
    perplexity = min(perplexity, (N - 1) / 3)
    d2 = torch.cdist(x, x).square()                                                              # [N,N]
    low, high, beta = torch.zeros(N, 1), torch.full((N, 1), math.inf), torch.ones(N, 1)
    low, high, beta = (t.double() for t in (low, high, beta / d2.mean().clamp(min=1e-12)))
    apart = ~torch.eye(N, dtype=torch.bool)
    for _ in range(64):
        p = torch.softmax(torch.where(apart, -d2 * beta, -torch.inf), 1)                         # [N,N]
        entropy = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True)                          # [N,1]
        wide = entropy > math.log(perplexity)   # too many neighbours: narrower
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    p = ((p + p.T) / (2 * N)).clamp(min=1e-12)                                                   # [N,N]
    centred = x - x.mean(0)
    torch.manual_seed(seed)
    y = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T                        # [N,2]
    y = 1e-4 * y / y[:, :1].std().clamp(min=1e-12) + 1e-6 * torch.randn(N, 2, dtype=torch.float64)
    velocity, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(N / 12.0, 50.0)
    for step in range(n_steps):
        early = step < 250
        w = (1 + torch.cdist(y, y).square()).reciprocal() * apart                                # [N,N], Student's t
        force = (12.0 * p if early else p) - w / w.sum()
        gradient = 4 * ((force * w).sum(1, keepdim=True) * y - (force * w) @ y)                  # [N,2]
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y.numpy()


class Watch:
    """ What goes into some modules while a model predicts: watch = Watch(modules); model.predict(..); watch.seen -> list of args. """
    def __init__(self, modules):
        self.seen = []
        self.handles = [m.register_forward_pre_hook(lambda _, args: self.seen.append(args)) for m in modules]
    def __enter__(self): return self
    def __exit__(self, *_): [h.remove() for h in self.handles]


def fused_module(model):
    """ The module whose input is the system's fused vector: its task head; where the LM answers, the adapter has the tokens. """
    for name in ('task_head', 'head', 'out'):
        if getattr(model, name, None) is not None: return getattr(model, name)
    return model.heads['fused'] if hasattr(model, 'heads') else None


def embeddings(folder, out, n_most=1000, **allowed):
    """ t-SNE of the fused vectors of the test clips, coloured by label (CrossSent's Figures 3 and 4). """
    run, feed = bring_back(folder, **allowed)
    model, vectors, labels, n = run.model, [], [], min(feed.n_clips['test'], n_most)
    for i in range(0, n, 64):
        batch = feed('test', np.arange(i, min(i + 64, n)))
        module = fused_module(model)
        with torch.no_grad():
            if hasattr(model, 'adapter'):
                text, mask = model.own_text(model.lm.embed(batch['tokens']), batch['text_len'])
                vectors.append(model.adapter(batch, text, mask).flatten(1))                      # [B,P D]
            elif module is None: return
            else:
                with Watch([module]) as watch: run.predict(batch)
                vectors.append(watch.seen[-1][0])
        labels.append(batch['label'])
    fused, label = torch.cat(vectors).float().cpu(), torch.cat(labels).cpu().numpy()             # [N,D], [N]
    try:
        check_finite({'the fused vector': fused.numpy()}, feed.corpus.id('test'))
    except ValueError as e:
        raise EvalError(f"{folder}: {e}.") from None
    y = tsne(fused)
    fig, ((ax,),) = canvas(high=WIDE)
    classes = run.info['kind'] == 'classes'
    points = ax.scatter(*y.T, c=label, s=5, cmap='tab10' if classes else 'coolwarm', lw=0)
    if classes:   # not every class need be among these clips
        handles, _ = points.legend_elements(num=None)
        names = [k if k.isascii() else str(i) for i, k in enumerate(run.info['names'])]
        ax.legend(handles, [names[v] for v in np.unique(label).astype(int)])
    else: fig.colorbar(points, label='label', shrink=0.8)
    ax.set(xticks=[], yticks=[], title=f't-SNE of fused vectors, {n} test clips')
    save(fig, out, 'tsne')


def weights_of(gca, x, z, mask):
    """ Attention of a CrossAttention block from x [B,L,D] to z [B,m,d] -> [B,h,L,m]. """
    B, L, D = x.shape
    q = gca.q_proj(x).view(B, L, gca.n_heads, -1).transpose(1, 2)                                # [B,h,L,D/h]
    k = gca.kv_proj(z).view(B, z.shape[1], 2, gca.n_heads, -1)[:, :, 0].transpose(1, 2)          # [B,h,m,D/h]
    return (gca.scale * q @ k.transpose(2, 3)).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)


@torch.no_grad()
def look(run, batch):
    """ Name -> (weights [rows,columns], rows, columns: names of the axes, or of each row) of one clip (B = 1), for each kind of
    model that attends. """
    model, out = run.model, {}
    if hasattr(model, 'mm_blocks'):   # each layer's tokens over the slots of Z, mean over heads; of fusion tokens, where they look
        who = 'fusion token' if 'fusion' in model.c['mm_query'] else 'text token'
        for n, block in model.mm_blocks.items():
            with Watch([block.gca]) as watch: run.predict(batch)
            x, z, mask = watch.seen[0]
            out[f'layer {n}'] = weights_of(block.gca, x.float(), z.float(), mask)[0].mean(0), who, 'audiovisual slot, from the clip\'s start to its end'
        return out
    if hasattr(model, 'adapter') and model.c['system'] == 'cmpta' and model.c['cmpta_attend']:
        pairs = model.attention(batch)                                                           # name -> [B,S]
        for other in ('text', 'audio', 'vision'):
            of = {k.split('_from_')[0]: v[0] for k, v in pairs.items() if k.endswith('from_' + other)}   # by who looks, [S]
            n = None if other == 'text' else int(batch[other + '_len'][0])
            what = 'text token' if other == 'text' else f'{other} frame'
            if of: out[f'over {other}'] = torch.stack(list(of.values()))[:, :n], list(of), what
        return out
    if hasattr(model, 'encoder') and getattr(model, 'encoder') is not None and model.encoder.n_layers:
        last = model.encoder.hf.encoder.layer[-1].attention.self                                 # Figures 5, 6: mean over heads
        with Watch([last.query]) as watch: run.predict(batch)
        x = watch.seen[-1][0].float()                                                                    # [1,T,D]
        q, k = (p(x).view(x.shape[1], model.encoder.n_heads, -1).transpose(0, 1) for p in (last.query, last.key))    # [h,T,D/h]
        return {'last layer': ((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0), 'text token', 'text token')}
    return {}


def clip_number(folder, feed, clip):
    """ The place of the clip of an id in the test split; '' is the first. Raises EvalError. """
    ids = feed.corpus.id('test')
    if not clip: return 0
    if clip not in ids: raise EvalError(f"there is no clip {clip!r} in the test split of {feed.corpus.name}: it has {ids[0]}, {ids[1]} ..")
    return ids.index(clip)


def attention(folder, out, clip='', **allowed):
    """ What one test clip is looked at by: DeepMLF's fusion tokens in each MM block, CMPTA's six directions, an encoder's last layer. """
    run, feed = bring_back(folder, **allowed)
    draw_attention(run, feed, clip_number(folder, feed, clip), out)


def draw_attention(run, feed, i, out, stem='attention'):
    """ The picture of test clip i of a feed; none where the model does not attend. """
    views = look(run, feed('test', np.array([i])))
    if not views: return
    fig, axes = canvas(len(views), 1, high=0.5 + 1.3 * len(views))
    for (ax,), (name, (w, row, column)) in zip(axes, views.items()):
        picture = ax.imshow(w.cpu().numpy(), aspect='auto', cmap='viridis', vmin=0)
        ax.set(title=name, xlabel=column)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if isinstance(row, list): ax.set_yticks(range(len(row)), [f'from {k}' for k in row])
        else: ax.set_ylabel(row); ax.yaxis.get_major_locator().set_params(integer=True)
        fig.colorbar(picture, ax=ax, label='weight')
    text = feed.corpus.text('test')[i]
    fig.suptitle(f"{feed.corpus.id('test')[i]}: {text if text.isascii() else ''}"[:70], fontsize=7, parse_math=False)   # an id has dollars
    save(fig, out, stem)


def tokens(folders, out, clip='', **allowed):
    """ CMPTA's Figure 5: one clip's prediction, and its attention over audio and video, for runs of different n_pseudo. """
    runs = sorted(folders, key=lambda f: read_run(f)['about']['knobs']['n_pseudo'])
    fig, axes = canvas(len(runs), 2, high=0.6 + 1.1 * len(runs))
    for folder, row in zip(runs, axes):
        run, feed = bring_back(folder, **allowed)
        i = clip_number(folder, feed, clip)
        batch, n = feed('test', np.array([i])), run.knobs['n_pseudo']
        pred, views = float(run.predict(batch)['pred']), look(run, batch)
        if not np.isfinite(pred):
            raise EvalError(f"{folder}: pred of clip {feed.corpus.id('test')[i]} is NaN or inf, so there is nothing to draw.")
        if not {'over audio', 'over vision'} <= set(views):
            raise EvalError(f"{folder} has no attention over audio and over video: --tokens is for CMPTA with both.")
        for ax, m in zip(row, ('audio', 'vision')):
            w, names, _ = views[f'over {m}']
            for k, line in zip(names, w.cpu().numpy()): ax.plot(line, label=f'from {k}')
            ax.set(xlabel=f'{m} frame', ylabel='weight', title=f'{n} tokens: {pred:+.2f}')
    for ax in axes[-1]: ax.legend(loc='upper center', bbox_to_anchor=(0.5, -0.6))   # the most tokens have the most directions
    words = f"label {float(batch['label']):+.2f}, {feed.corpus.id('test')[i]}: {feed.corpus.text('test')[i]}"
    fig.suptitle(words[:70], fontsize=7, parse_math=False)
    save(fig, out, 'tokens')


# ---------------------------------------------------------------------------------------------------------
# The systems, drawn: a box is (class, what it gives, shape, x, y), an arrow goes from box to box by number

SYSTEMS = {
    'DeepMLF': ([(FrozenLM, 'text', '[B,T,D]', 0, 0), (AVEncoder, 'audio, video', 'Z [B,m,d]', 2, 0), (DeepMLF, 'fusion tokens', '[B,F,D]', 1, 0),
                 (FrozenLM, 'layer l', 'x_t [B,T,D], x_f [B,F,D]', 0.5, 1), (CrossAttention, 'x_f looks at Z', '[B,F,D]', 1.5, 2), (FFW, 'every token', '[B,T+F,D]', 0.5, 3),
                 (MMBlock, 'after some layers', 'x_t, x_f', 1.5, 4), (DeepMLF, 'task head', '[B]', 0.5, 5)],
                [(0, 3), (2, 3), (3, 4), (1, 4), (4, 5), (5, 6), (6, 7)]),
    'MSE-Adapter, CMPTA': ([(FrozenLM, 'text, embedded', '[B,T,D]', 0, 0), (Feed, 'audio, video', '[B,S,d_a], [B,S,d_v]', 1.5, 0),
                            (MSEAdapter, 'or CMPTA: pseudo tokens', '[B,P,D]', 1.5, 1.3), (Prompt, 'pseudo tokens, text, question', '[B,L,D]', 0.5, 2.5),
                            (FrozenLM, 'all layers, once; behind it the labels\' trie', '[B,L+N,D]', 0.5, 3.75), (PseudoTokenLM, 'log p of each label', '[B,K]', 0.5, 5)],
                           [(0, 3), (1, 2), (0, 2), (2, 3), (3, 4), (4, 5)]),
    'CrossSent': ([(TextEncoder, 'text', '[B,T,D]', 0, 0), (GMRA, 'audio, video on tokens', '[B,T,d] each', 1.5, 0), (TextEncoder, 'layers before gmra_layer', '[B,T,D]', 0, 1.5),
                   (GMRA, 'gate and residual', '[B,T,D]', 1, 2.75), (TextEncoder, 'the other layers', '[B,T,D]', 0.5, 3.9), (CrossSent, 'sentence vector, head', '[B]', 0.5, 5)],
                  [(0, 2), (2, 3), (1, 3), (3, 4), (4, 5)])}


def architecture(out):
    """ The systems side by side, data going up; each box has the class that does it and the shape that it gives. """
    fig, (axes,) = canvas(1, len(SYSTEMS), high=4.2, wide=3.2 * WIDE)
    for ax, (title, (boxes, arrows)) in zip(axes, SYSTEMS.items()):
        drawn = []
        for kind, what, shape, x, y in boxes:
            color = '#dfe7f3' if kind is FrozenLM else 'white' if kind in (Feed, Prompt) else '#fdf0dc'
            drawn.append(ax.text(x, y, f'{kind.__name__}\n{what}\n{shape}', ha='center', va='center', fontsize=7, linespacing=1.3,
                    bbox=dict(boxstyle='round,pad=0.4', fc=color, ec='0.5', lw=0.8)))
        for a, b in arrows:   # from edge to edge
            patch_a, patch_b = (drawn[i].get_bbox_patch() for i in (a, b))
            ax.annotate('', boxes[b][3:], boxes[a][3:], arrowprops=dict(arrowstyle='->', color='0.4', lw=1, patchA=patch_a, patchB=patch_b, shrinkA=2, shrinkB=2))
        xs = [box[3] for box in boxes]
        ax.set(xlim=(min(xs) - 0.75, max(xs) + 0.75), ylim=(-0.6, 5.6), title=title)
        ax.axis('off')
    fig.suptitle('blue: frozen.  yellow: trained.  white: no weights.  letters: see the README', fontsize=7, color='0.3')
    save(fig, out, 'architecture')


def main(argv):
    """ The command line of the docstring. Raises EvalError and its kin for a sentence. """
    paths = [a.rstrip('/') for a in argv if not a.startswith('--')]
    flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
    if list(flags) == ['architecture']: return architecture(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'results'))
    if not paths or 'help' in flags: print(__doc__); return
    allowed = take_permissions(flags)
    if odd := sorted(set(flags) - {'clip', 'tokens'}): raise EvalError(f"there is no flag --{odd[0]}: there are --clip=ID, --tokens and --architecture.")
    if paths[0].endswith('.json'):
        for path in paths: sweep_curve(path)
        return
    out = os.path.join(paths[0], 'figures')
    if 'tokens' in flags: return tokens(paths, out, flags.get('clip', ''), **allowed)
    r = read_run(paths[0])
    one_system(paths)
    curves(paths, out)
    gates(paths, out)
    if r['about']['knobs']['system'] == 'lm': return
    truth(paths[0], out)
    calibration(paths[0], out)
    embeddings(paths[0], out, **allowed)
    attention(paths[0], out, flags.get('clip', ''), **allowed)


if __name__ == '__main__':
    try: main(sys.argv[1:])
    except (EvalError, CorpusError, ModelError) as e: sys.exit(f"figures: {e}")
    except OSError as e: sys.exit(f"figures: {e.filename} cannot be read or written: {e.strerror}.")
