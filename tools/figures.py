"""
The papers' figures, drawn from runs.

    python tools/figures.py out/RUN [out/RUN-seed1 ..]
        every figure that the runs allow, into out/RUN/figures/
    python tools/figures.py out/RUN --clip=test_17
        the attention of this test clip instead of the first
    python tools/figures.py out/A out/B .. --tokens --clip=ID
        CMPTA's Figure 5: the attention of one clip for runs of different numbers of pseudo tokens
    python tools/figures.py out/sweeps/deepmlf-figure3.json
        the rows of a sweep: a line over numbers, bars over names; mean and std over seeds
    python tools/figures.py --architecture
        the diagram of the systems, into results/architecture.png

Several runs must differ in the seed alone: curves show their mean and one standard deviation.
Figures are one or two columns of a paper wide (85 or 170 mm).
"""
import os
import re
import shlex
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from eval import load_run_and_feed, take_permissions
from metrics import BETTER, check_finite
from model import SYSTEMS
from run.command_line import words_and_flags
from run.errors import UserError
from run.finished import EvalError, check_same_experiment, read_log, read_predictions, read_run
from run.forms import SWEEP
from run.json_files import NUMBER, check_form, read_json
from run.machine import print_any_text
from run.pictures import (
    ON_LINES,
    STYLE,
    WIDE,
    as_text,
    attention_of,
    calibration_curve,
    canvas,
    clip_words,
    confusion_matrix,
    draw_attention,
    draw_band,
    drawable,
    learning_curve,
    run_title,
    save,
    seconds_per_frame,
    set_title,
)
from tools.architecture import draw_architecture
from tools.tsne import tsne

ROOT = Path(__file__).resolve().parent.parent
matplotlib.rcParams.update(STYLE)


# --------------------------------------------------------------------------------------------------
# From logs

def curves(folders, out):
    """ Draws the learning curve of a run, or of several that differ in the seed. """
    runs = [(read_run(folder), read_log(folder)) for folder in folders]
    for kind in ('train', 'valid'):
        refuse_other_steps([[e for e in log if kind in e] for _, log in runs])
    save(learning_curve(runs), out, 'curves')


def refuse_other_steps(logs):
    """ Raises EvalError if runs logged at other steps, as their mean would be of no step. """
    n = min(map(len, logs))
    if any([e['step'] for e in log[:n]] != [e['step'] for e in logs[0][:n]] for log in logs):
        raise EvalError("these runs logged at different steps: draw runs of one --log_interval.")


def title_of(folders):
    """ The title of a figure of these runs. """
    return run_title([read_run(folder)['about'] for folder in folders])


def gate_names(n):
    """ The names of the n gates of a block, in the order of System.gates. """
    if n == 2:
        return ['cross-attention gate', 'FFW gate']
    return [f'gate {i + 1}' for i in range(n)]


def gates(folders, out):
    """ Draws gate values by layer over training, if the system has gates. """
    logs = [[e for e in read_log(folder) if e.get('gates')] for folder in folders]
    if not all(logs):
        return
    refuse_other_steps(logs)
    epochs, blocks = [e['epoch'] for e in logs[0]], logs[0][0]['gates']
    names = gate_names(len(next(iter(blocks.values()))))
    values = [v for log in logs for e in log for block in e['gates'].values() for v in block]
    low = 0 if min(values) >= 0 else -1   # a sigmoid gate is in [0, 1], a tanh gate in [-1, 1]
    fig, axes = canvas(1, len(names), wide=2 * WIDE)
    for i, (ax, name) in enumerate(zip(axes[0], names)):
        for layer in blocks:
            draw_band(ax, epochs, [[e['gates'][layer][i] for e in log] for log in logs],
                      f'after layer {layer}')
        ax.set(xlabel='epoch', ylabel=name, ylim=(low, 1))
    axes[0][0].legend(**ON_LINES)
    set_title(fig, f'{title_of(folders)}\n0 is a closed gate, 1 an open one')
    save(fig, out, 'gates')


def numbers_of(labels):
    """
    The numbers in the labels of a sweep's rows, and the rest of the text, which all labels share:
    ['n_f = 1', 'n_f = 4'] -> [1.0, 4.0], 'n_f'. None if the labels are names.
    """
    found = [re.fullmatch(r'(\D*?)(\d+\.?\d*|\.\d+)(\D*)', label) for label in labels]
    if len(labels) < 2 or not all(found):
        return None
    words = {(m[1], m[3]) for m in found}
    numbers = [float(m[2]) for m in found]
    if len(words) > 1 or len(set(numbers)) < len(numbers):
        return None
    before, behind = words.pop()
    return numbers, f'{before.strip(" =")} {behind.strip()}'.strip()


def draw_sweep(path):
    """
    Draws the rows of a sweep's JSON, mean and standard deviation over seeds: as a line if the rows
    are numbers of one kind, as bars if they are names.
    """
    try:
        sweep = read_json(path, SWEEP, follow=True)
        rows = [r for r in sweep['rows'] if r['test']]
        if not rows:
            raise EvalError(f"{path} has no row with a finished run: run the sweep again.")
        by = 'mae' if 'mae' in rows[0]['test'][0] else 'wf1'
        for row in rows:
            check_form(row, dict(test=[{by: NUMBER}]))
    except ValueError as e:
        raise EvalError(f"{path} is damaged, or was not written by tools/sweep.py ({e}): run "
                        "the sweep again, which trains only what is missing.") from None
    y = [[metrics[by] for metrics in r['test']] for r in rows]
    means = [np.mean(values) for values in y]
    # a single value has no deviation, and no error bar is drawn for NaN
    stds = [np.std(values, ddof=1) if len(values) > 1 else np.nan for values in y]
    labels = [r['label'] for r in rows]
    ns = sorted(set(map(len, y)))
    n = f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"
    score = f"test {by} ({BETTER[by]} is better)"

    numbers = numbers_of(labels)
    if numbers:
        x, name = numbers
        fig, ((ax,),) = canvas()
        order = np.argsort(x)
        ax.errorbar(np.array(x)[order], np.array(means)[order], np.array(stds)[order], fmt='o-',
                    ms=4, capsize=2)
        ax.set(xlabel=name or 'value', ylabel=score)
        ax.set_xticks(x)
    else:
        fig, ((ax,),) = canvas(high=0.9 + 0.25 * len(rows), wide=1.5 * WIDE)
        at = np.arange(len(rows))
        ax.barh(at, means, xerr=stds, color='#9db8d9', error_kw=dict(capsize=2, lw=1))
        ax.set_yticks(at, labels, parse_math=False)
        ax.invert_yaxis()
        ax.set(xlabel=score)
    set_title(fig, f"{sweep['title']}\n{'one seed' if ns == [1] else f'mean and std, {n}'}")
    save(fig, os.path.dirname(path) or '.', Path(path).stem)


# --------------------------------------------------------------------------------------------------
# From predictions

def scatter(predictions, result, out):
    """ Draws the prediction against the label of every test clip. """
    low, high = result['info']['range']
    pred, label = predictions['pred'], predictions['label']  # [N] each
    fig, ((ax,),) = canvas(high=WIDE)
    ax.plot([low, high], [low, high], color='0.6', lw=0.8)
    ax.plot(label, pred, '.', ms=3, alpha=0.4)
    ax.set(xlabel='label', ylabel='prediction', aspect='equal')
    test = result['test']
    set_title(fig, f"{run_title([result['about']])}\ntest: mae {test['mae']:.3f}, "
                   f"corr {test['corr']:.3f}, {len(pred)} clips")
    save(fig, out, 'truth')


def truth(folder, out):
    """
    Draws predictions against labels, if they are scores; the confusion matrix of the classes or of
    the rounded scores; and the calibration of the probabilities, if the run has them.
    """
    result, (_, predictions) = read_run(folder), read_predictions(folder)
    if result['info']['kind'] != 'classes':
        scatter(predictions, result, out)
    save(confusion_matrix(result, predictions), out, 'confusion')
    if 'prob' in predictions:
        save(calibration_curve(result, predictions), out, 'calibration')


# --------------------------------------------------------------------------------------------------
# From the model

@torch.no_grad()
def fused_vectors(run, feed, n):
    """
    The fused vectors of the first n test clips [n,D] and their labels [n]; None where the system
    has no fused vector.
    """
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
    """
    Draws the t-SNE of the fused vectors of the test clips, coloured by label (CrossSent's Figures 3
    and 4).
    """
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
    if classes:   # some classes may have no clip here
        handles, _ = points.legend_elements(num=None)
        names = drawable(run.info['names'])
        ax.legend(handles, [names[v] for v in np.unique(label).astype(int)])
    else:
        fig.colorbar(points, label='label', shrink=0.8)
    ax.set(xticks=[], yticks=[])
    set_title(fig, f"{title_of([folder])}\nt-SNE of fused vectors, {n} test clips")
    save(fig, out, 'tsne')


def clip_number(feed, clip):
    """
    The index in the test split of the clip with this id; '' is the first clip. Raises EvalError.
    """
    ids = feed.corpus.id('test')
    if not clip:
        return 0
    if clip not in ids:
        raise EvalError(f"there is no clip {clip!r} in the test split of {feed.corpus.name}: "
                        f"give one of its ids, such as --clip={shlex.quote(ids[0])}.")
    return ids.index(clip)


def attention(folder, out, clip='', **allowed):
    """ Draws where a run attends in one test clip. Draws nothing if it has no attention. """
    run, feed = load_run_and_feed(folder, **allowed)
    i = clip_number(feed, clip)
    draw_attention(run, feed, i, out, label=label_of(feed, i))


def label_of(feed, i):
    """ The label of test clip i. """
    return float(feed.corpus.label('test', feed.k['label'])[i])


# The colour of the line of each modality that attends, in all panels of Figure 5.
ASKING = dict(text='C0', audio='C1', vision='C2')


def views_of_cmpta(folder, clip, **allowed):
    """
    The parts of Figure 5 for one run: its Feed, the clip's index, the clip's prediction, and the
    attention in the form of System.views. Raises EvalError if the run has
    no attention over audio and vision.
    """
    run, feed = load_run_and_feed(folder, **allowed)
    i = clip_number(feed, clip)
    batch = feed('test', np.array([i]))
    views = attention_of(run, batch)
    if not {'over audio', 'over vision'} <= set(views):
        raise EvalError(f"{folder} has no attention over audio and over video: --tokens is for "
                        "runs of CMPTA that have both.")
    pred = float(run.predict(batch)['pred'])
    if not np.isfinite(pred):
        raise EvalError(f"{folder}: pred of clip {feed.corpus.id('test')[i]} is NaN or inf, so "
                        "there is nothing to draw.")
    return feed, i, pred, views


def tokens(folders, out, clip='', **allowed):
    """
    Draws CMPTA's Figure 5: one clip's prediction, and its attention over audio and video, for runs
    of different n_pseudo.
    """
    n_pseudo = {folder: read_run(folder)['about']['knobs'].get('n_pseudo') for folder in folders}
    for folder, n in n_pseudo.items():
        if n is None:
            raise EvalError(f"{folder} has no pseudo tokens: --tokens is for systems that make "
                            "them.")
    fig, axes = canvas(len(folders), 2, high=1.0 + 1.45 * len(folders), wide=1.5 * WIDE)
    lines = {}
    for folder, row in zip(sorted(folders, key=n_pseudo.get), axes):
        feed, i, pred, views = views_of_cmpta(folder, clip, **allowed)
        info = feed.info | dict(names=drawable(feed.info.get('names', [])))
        for ax, m in zip(row, ('audio', 'vision')):
            weights, names, column = views[f'over {m}']
            frame = seconds_per_frame(feed.corpus, column)
            x = np.arange(weights.shape[1]) * (frame or 1)  # [M]
            for name, y in zip(names, weights.cpu().numpy()):
                lines[name], = ax.plot(x, y, color=ASKING[name])
            missing = set(ASKING) - {m} - set(names)
            if missing:   # fewer than six tokens leave out the last directions
                asking = ' or '.join(sorted(missing))
                words = f"no token from {asking} with {n_pseudo[folder]} tokens"
                ax.text(0.98, 0.95, words, ha='right', va='top', transform=ax.transAxes,
                        color='0.35', fontsize=7)
            ax.set(xlabel=f'{m}, seconds' if frame else column,
                   title=f"{n_pseudo[folder]} tokens: prediction {as_text(pred, info)}")
            if not frame:
                ax.xaxis.get_major_locator().set_params(integer=True)
            ax.sharey(axes[0][0])
        row[0].set_ylabel('attention weight')
    axes[0][0].autoscale(axis='y')
    axes[0][0].set_ylim(bottom=0)
    names = [name for name in ASKING if name in lines]
    fig.legend([lines[name] for name in names], [f'from {name}' for name in names],
               loc='outside lower center', ncols=len(names))
    label = as_text(label_of(feed, i), info)
    set_title(fig, f'{title_of(folders)}\n{clip_words(feed, i)}\nlabel {label}')
    save(fig, out, 'tokens')


def main(argv):
    """ The command line of the docstring. Raises UserError. """
    words, flags = words_and_flags(argv, switches=('tokens', 'architecture'))
    paths = [word.rstrip('/') for word in words]
    if list(flags) == ['architecture']:
        draw_architecture(str(ROOT / 'results'))
        return
    if not paths or 'help' in flags:
        print(__doc__)
        return
    allowed = take_permissions(flags)
    if unknown := sorted(set(flags) - {'clip', 'tokens'}):
        raise EvalError(f"there is no flag --{unknown[0]}: there are --clip=ID, --tokens and "
                        "--architecture.")
    if paths[0].endswith('.json'):
        for path in paths:
            draw_sweep(path)
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
    embeddings(paths[0], out, **allowed)
    attention(paths[0], out, clip, **allowed)


if __name__ == '__main__':
    print_any_text()
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"figures: {e}")
    except OSError as e:
        sys.exit(f"figures: {e.filename or 'a file'} cannot be read or written ({e.strerror}): free "
                 "disk space, or correct the path.")
