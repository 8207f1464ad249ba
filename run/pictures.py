"""
The pictures that several commands draw, and the style of all pictures: learning curves, a confusion
matrix, calibration, and attention weights. Functions that return a figure draw it in the caller's
style; `drawn` and tools/figures.py apply STYLE.

Axis letters: N clips, K classes, M attended positions.
"""
import os
import sys
import textwrap
from io import BytesIO

import numpy as np
import torch

from corpora.names import STREAMS
from metrics import confusion
from model import SYSTEMS
from prompts import answer_scores
from run.folder import make_folder, save_picture

WIDE, HIGH = 3.35, 2.4   # inches; 3.35 inches (85 mm) is one column of a paper
# Applied while a picture of ours is drawn, so that a caller's own pictures keep their style.
STYLE = {
    'font.size': 8, 'axes.titlesize': 8, 'figure.titlesize': 8, 'legend.fontsize': 7,
    'legend.frameon': False, 'savefig.dpi': 200, 'lines.linewidth': 1.2}
ON_LINES = dict(frameon=True, framealpha=0.8, edgecolor='none')   # a legend that covers lines
LETTERS_PER_INCH = 17   # of text at 8 points
MOST_NAMED = 40         # classes whose names and counts can be read in a confusion matrix

# Loss terms that are measured in one unit share a panel: y label -> names of terms. Any other term
# gets a panel of its own.
PREDICTIONS = 'loss of predictions'
LOSS_PANELS = {
    'loss, the weighted sum': {'loss'},
    PREDICTIONS: {'task', 'text', 'audio', 'vision', 'av', 'fusion'},
    'cross-entropy, nats per token': {'lm', 'label'},
    'ordinal losses, label units': {'mpr', 'eioi'}}
# The bounds of a corpus (corpora/toy.py, toy_ceilings), as a learning curve names them.
BOUND_NAMES = dict(text='best possible: text', av='best possible: audio + video',
                   late='late-fusion bound', full='upper bound')


def pyplot():
    """ matplotlib.pyplot, imported on first use so that training starts without it. """
    import matplotlib
    if 'matplotlib.pyplot' not in sys.modules:
        matplotlib.use('Agg')   # not if a notebook has imported pyplot, with its own backend
    import matplotlib.pyplot as plt
    return plt


def style():
    """ A context manager that applies STYLE. """
    return pyplot().rc_context(STYLE)


def save(fig, folder, name):
    """ Save a figure as folder/name.png, close it, and print the path. """
    make_folder(folder)
    path = os.path.join(folder, name + '.png')
    save_picture(fig, path)
    pyplot().close(fig)
    print(path)


def drawn(draw, *arguments):
    """ The figure that draw(*arguments) returns, as the bytes of a PNG. """
    file = BytesIO()
    with style():
        fig = draw(*arguments)
        fig.savefig(file, format='png')
        pyplot().close(fig)
    return file.getvalue()


def canvas(rows=1, columns=1, high=HIGH, wide=WIDE):
    """ A figure of wide x high inches, and its axes [rows][columns]. """
    return pyplot().subplots(
        rows, columns, figsize=(wide, high), layout='constrained', squeeze=False)


def set_title(fig, title):
    """ Set a figure's title, broken into lines that fit its width. """
    n = int(fig.get_figwidth() * LETTERS_PER_INCH)
    lines = [textwrap.fill(line, n, break_on_hyphens=False) for line in title.split('\n')]
    fig.suptitle('\n'.join(lines), parse_math=False)   # clip ids may hold dollar signs


def run_title(abouts):
    """
    The title of a picture of runs: name, system, corpus, seeds, and the numbers and switches that
    their command sets. abouts: result.json's `about` of each run.
    """
    first = abouts[0]
    seeds = sorted({about['knobs']['seed'] for about in abouts})
    word = 'seed' if len(seeds) == 1 else 'seeds'
    return (f"{first['name']}: {first['knobs']['system']} on {first['corpus']['name']}, "
            f"{word} {', '.join(map(str, seeds))}{changed_knobs(first)}")


def changed_knobs(about):
    """ The numbers and switches that a run's command sets, as text such as ', weight_mpr=0.0'. """
    words = about.get('command', '').split()
    flags = [word[2:].partition('=')[0] for word in words if word[:2] == '--']
    knobs = {k: about['knobs'][k] for k in flags if k in about['knobs']}
    return ''.join(f', {k}={v}' for k, v in knobs.items()
                   if type(v) in (bool, int, float) and k not in ('seed', 'resume', 'fresh'))


# --------------------------------------------------------------------------------------------------
# Learning curves

def draw_band(ax, x, runs, label=None, color=None):
    """
    Draw the mean of several runs as a line and one standard deviation as a band. All are cut at the
    shortest run. x: epochs [n]; runs: a list of values for each run.
    """
    n = min(map(len, runs))
    y = np.array([run[:n] for run in runs])  # [runs,n]
    marker = 'o' if n == 1 else None   # a line of one point is invisible
    line, = ax.plot(x[:n], y.mean(0), label=label, color=color, marker=marker, ms=4)
    if len(y) == 1:
        return
    mean, std = y.mean(0), y.std(0, ddof=1)  # [n] each
    ax.fill_between(x[:n], mean - std, mean + std, alpha=0.2, color=line.get_color(), lw=0)


def loss_panels(terms, coral=False):
    """
    Loss terms sorted into panels: y label -> names. A loss of one term is that term, so the sum is
    left out. coral: the term task is CORAL's, which has a unit of its own.
    """
    terms = set(terms)
    if len(terms - {'loss'}) == 1:
        terms.discard('loss')
    panels = {}
    for label, names in LOSS_PANELS.items():
        if terms & names:
            panels[label] = sorted(terms & names)
            terms -= names
    if coral and len(panels.get(PREDICTIONS, [])) > 1:
        panels[PREDICTIONS].remove('task')
        panels['task (CORAL), nats per threshold'] = ['task']
    return panels | {name: [name] for name in sorted(terms)}


def lines_to_compare(result):
    """
    Values of the selecting metric that a validation curve is compared with, as name -> value: the
    test metric of the majority baseline, and the bounds of the toy corpus if the run reads the
    audio and the video of its clips. Unknown values are left out.
    """
    k, lines = result['about']['knobs'], {}
    if result['majority']:
        lines['majority'] = result['majority'].get(k['select'])
    reads_both = SYSTEMS[k['system']].bound(k) in ('av', 'full')
    for bound, name in BOUND_NAMES.items():
        ceiling = (result['ceilings'] or {}).get(bound, {})
        if reads_both:
            lines[name] = ceiling.get(k['select'])
    return {name: v for name, v in lines.items() if v is not None and np.isfinite(v)}


def draw_levels(ax, levels):
    """
    Draw labelled horizontal lines: name -> value. Labels stand right of the axes, moved apart where
    they would overlap.
    """
    for v in levels.values():
        ax.axhline(v, color='0.6', lw=0.8, ls='--', zorder=1)
    low, high = ax.get_ylim()
    # approximate height of the axes
    inches = ax.get_figure().get_figheight() / ax.get_gridspec().nrows * 0.65
    gap, at = 0.12 / inches, -1.0
    for name, v in sorted(levels.items(), key=lambda item: item[1]):
        at = max((v - low) / (high - low), at + gap)
        ax.annotate(f'{name} {v:.3f}', (1, (v - low) / (high - low)), (1.03, at),
                    xycoords='axes fraction', textcoords='axes fraction', va='center', fontsize=7,
                    color='0.35', annotation_clip=False)


def learning_curve(runs):
    """
    A figure of one run, or of several that differ in the seed: training loss terms, one panel for
    each unit, and the validation metric that selects the checkpoint.

    runs: (result.json, lines of log.jsonl) of each run, as read_run and read_log give them.
    """
    results, logs = zip(*runs)
    select = results[0]['about']['knobs']['select']
    train = [[e for e in log if 'train' in e] for log in logs]
    valid = [[e for e in log if 'valid' in e] for log in logs]
    coral = results[0]['about']['knobs'].get('level_step', 0) > 0
    panels = loss_panels({term for e in train[0] for term in e['train']}, coral)

    n = len(panels) + 1
    columns = n if n <= 3 else 2 if n == 4 else 3
    rows = -(-n // columns)
    wide = 2.5 * columns + 0.9   # room for the names of the lines
    fig, axes = canvas(rows, columns, high=0.4 + 2.1 * rows, wide=wide)
    *loss_axes, last = axes.flatten()[:n]
    for ax in axes.flatten()[n:]:
        ax.remove()
    for ax, (label, terms) in zip(loss_axes, panels.items()):
        for term in terms:
            own = [[e for e in log if term in e['train']] for log in train]
            draw_band(ax, [e['epoch'] for e in own[0]],
                      [[e['train'][term] for e in log] for log in own], term)
        ax.set(xlabel='epoch', ylabel=label, title='training')
        if len(terms) > 1:
            ax.legend(**ON_LINES)

    values = [[e['valid'][select] for e in log] for log in valid]
    mean = f'mean and std of n = {len(runs)}' if len(runs) > 1 else None
    draw_band(last, [e['epoch'] for e in valid[0]], values, mean, 'C3')
    best = [e for e in valid[0] if e['best']]
    if best and len(runs) == 1:
        last.plot(best[-1]['epoch'], best[-1]['valid'][select], 'o', ms=5, mfc='none',
                  color='C3', label='best')
    last.set(xlabel='epoch', ylabel=select, title='validation')
    last.xaxis.get_major_locator().set_params(integer=True)
    draw_levels(last, lines_to_compare(results[0]))
    if last.get_legend_handles_labels()[0]:
        last.legend(**ON_LINES)
    set_title(fig, run_title([result['about'] for result in results]))
    return fig


# --------------------------------------------------------------------------------------------------
# Confusion matrix

def drawable(names):
    """ The names of classes for a picture, without formulas. Its font has no Chinese letters: those
    get numbers. """
    return [name.replace('$', r'\$') if name.isascii() else str(i) for i, name in enumerate(names)]


def counts_figure(pred, label, names, title):
    """
    A figure of the counts of true classes against predicted classes, coloured by the share of the
    true class. pred, label [N]: numbers of classes in `names`. Names and counts are written for at
    most MOST_NAMED classes.
    """
    counts = confusion(pred, label, len(names))  # [K,K]
    n_true = np.bincount(np.asarray(label, int), minlength=len(names))  # [K]
    share = counts / np.maximum(n_true, 1)[:, None]  # [K,K]
    ticks = drawable(names)
    named = len(names) <= MOST_NAMED
    size = 0.45 * min(len(names), MOST_NAMED)
    fig, ((ax,),) = canvas(high=1.3 + size, wide=1.9 + size)
    picture = ax.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for i, j in np.ndindex(counts.shape) if named else ():
        color = 'white' if share[i, j] > 0.6 else 'black'
        ax.text(j, i, counts[i, j], ha='center', va='center', fontsize=7, color=color)
    if named:
        ax.set_xticks(range(len(names)), ticks, rotation=45, ha='right')
        ax.set_yticks(range(len(names)), ticks)
    ax.set(xlabel='predicted class', ylabel='true class')
    fig.colorbar(picture, label='share of the true class', shrink=0.8)
    set_title(fig, title)
    return fig


def confusion_matrix(result, predictions):
    """
    A figure of the confusion matrix of a run's test predictions, of its classes or of scores
    rounded to whole numbers. result: read_run's dict; predictions: read_predictions' arrays.
    """
    info, test = result['info'], result['test']
    pred, label = predictions['pred'], predictions['label']  # [N] each
    if info['kind'] == 'classes':
        names, metrics = info['names'], ('wf1', 'acc')
    else:
        low, high = info['range']
        levels = np.arange(round(low), round(high) + 1)
        names, metrics = [f'{v:+d}' if v else '0' for v in levels], ('mae', 'corr')
        pred = np.round(np.clip(pred, low, high)) - levels[0]  # [N]
        label = np.round(np.clip(label, low, high)) - levels[0]  # [N]
    scores = ', '.join(f'{key} {test[key]:.3f}' for key in metrics if key in test)
    rounded = '' if info['kind'] == 'classes' else '; scores rounded'
    title = f"{run_title([result['about']])}\ntest: {scores}, {len(pred)} clips{rounded}"
    return counts_figure(pred, label, names, title)


# --------------------------------------------------------------------------------------------------
# Calibration

def answer_values(info, n):
    """
    The scores [n] that a system's n answers stand for: those of a prompt, or n even steps over the
    range for a system with other answers.
    """
    scores = answer_scores(*info['range'])
    return np.array(scores if len(scores) == n else np.linspace(*info['range'], n))


def calibration_curve(result, predictions, n_bins=10):
    """
    A figure of the calibration of a run's probabilities, with the expected calibration error. For
    classes: the probability of the answer against the share of right answers. For scores: the
    probability of a positive score against the share of positive labels. result: read_run's dict;
    predictions: read_predictions' arrays, with prob [N,K].
    """
    prob, label = predictions['prob'], predictions['label']  # [N,K], [N]
    if result['info']['kind'] == 'classes':
        stated = prob.max(1)  # [N]
        right = prob.argmax(1) == label  # [N]
        x_name, y_name = 'probability of the answer', 'share of right answers'
    else:
        values = answer_values(result['info'], prob.shape[1])  # [K]
        stated = prob[:, values > 1e-6].sum(1)  # [N]
        right = label > 0  # [N]
        x_name, y_name = 'probability of a positive score', 'share of positive labels'

    bin_of = np.minimum((stated * n_bins).astype(int), n_bins - 1)  # [N]
    bins = [bin_of == b for b in range(n_bins) if (bin_of == b).any()]  # [N] each
    x = np.array([stated[b].mean() for b in bins])
    y = np.array([right[b].mean() for b in bins])
    n = np.array([np.sum(b) for b in bins])
    error = np.sum(n * np.abs(x - y)) / n.sum()
    fig, ((ax,),) = canvas(high=WIDE)
    ax.plot([0, 1], [0, 1], color='0.6', lw=0.8)
    ax.plot(x, y, 'o-', ms=4)
    for x_b, y_b, n_b in zip(x, y, n):
        ax.annotate(str(n_b), (x_b, y_b), textcoords='offset points', xytext=(4, -8),
                    fontsize=6)
    ax.set(xlabel=x_name, ylabel=y_name, xlim=(0, 1), ylim=(0, 1), aspect='equal')
    set_title(fig, f"{run_title([result['about']])}\nexpected calibration error {error:.3f}; "
                   "numbers are clips")
    return fig


# --------------------------------------------------------------------------------------------------
# Attention

def as_text(value, info):
    """ A label or a prediction as text. info: the label's entry in meta.json. """
    if info['kind'] == 'classes':
        known = 0 <= value < len(info['names'])
        return info['names'][int(value)] if known else f'no class ({value:g})'
    return f'{value:+.2f}'


def clip_words(feed, i):
    """ The id and the text of test clip i; without letters that the font may lack. """
    clip, text = feed.corpus.id('test')[i], feed.corpus.text('test')[i]
    return f"{clip}: {text if text.isascii() else ''}"[:200]


def clip_title(feed, i, pred, label=None):
    """ The title of a picture of test clip i: its id and text, its prediction, its label. """
    facts = [] if label is None else [f'label {as_text(label, feed.info)}']
    second = ', '.join(facts + [f'prediction {as_text(pred, feed.info)}'])
    return f'{clip_words(feed, i)}\n{second if second.isascii() else ""}'.strip()


def seconds_per_frame(corpus, column):
    """
    The duration of a frame on an axis called `column` ('audio frame'), where the corpus knows it: a
    stream's optional `frames_per_second` in meta.json. Otherwise None.
    """
    for stream in STREAMS:
        rate = corpus.meta['streams'].get(stream, {}).get('frames_per_second')
        if column == f'{stream} frame' and isinstance(rate, (int, float)) and rate > 0:
            return 1 / rate
    return None


@torch.no_grad()
def attention_of(run, batch):
    """ System.views of a batch of one clip, by a run of eval.load_run. """
    return run.model.views(batch, run.predict)


def draw_attention(run, feed, i, out, stem='attention', label=None):
    """
    Draw where a run attends in test clip i of a feed, as out/stem.png. Draws nothing if the system
    has no attention. label: the clip's, for the title.
    """
    batch = feed('test', np.array([i]))
    views = attention_of(run, batch)
    if not views:
        return
    clip = clip_title(feed, i, float(run.predict(batch)['pred']), label)
    title = f"{run_title([run.result['about']])}\n{clip}"
    with style():
        draw_views(views, feed.corpus, title, out, stem, token_texts(run, batch))


def token_texts(run, batch):
    """ The text of each token of a clip's own text, or [] where the font may lack its letters. """
    if 'tokens' not in batch:
        return []
    ids = batch['tokens'][0, :int(batch['text_len'][0])].tolist()
    if prompt := run.model.prompt:
        first = len(prompt.before) + run.knobs['n_pseudo']
        ids = ids[first:len(ids) - len(prompt.after)]
    texts = [run.tokenizer.decode([token]).strip() for token in ids]
    return texts if ''.join(texts).isascii() else []


def draw_views(views, corpus, title, out, stem, tokens=()):
    """
    Draw the views of System.views on one colour scale, one panel each. tokens: the texts of the
    clip's tokens, which name the rows and columns of text tokens if there are at most 40.
    """
    def names_of(what, n):
        """ The names of n rows or columns. """
        return tokens if what == 'text token' and len(tokens) == n <= 40 else []

    def height(weights, rows, column):
        """ Inches of a panel. """
        if rows == 'text token' and names_of(rows, len(weights)):
            return 0.9 + 0.14 * len(weights)   # a line of text a row
        return 1.3 if len(weights) <= 12 else 2.6

    heights = [height(*view) for view in views.values()]
    fig, axes = canvas(len(views), 1, high=0.7 + sum(heights), wide=1.3 * WIDE)
    highest = max(float(weights.max()) for weights, *_ in views.values())
    for (ax,), (name, (weights, rows, column)) in zip(axes, views.items()):
        n_rows, n_columns = weights.shape
        frame = seconds_per_frame(corpus, column)
        extent = None
        if frame:
            extent = 0, n_columns * frame, n_rows - 0.5, -0.5
            column = column.replace(' frame', ', seconds')
        picture = ax.imshow(weights.cpu().numpy(), aspect='auto', cmap='viridis', vmin=0,
                            vmax=highest, extent=extent)
        ax.set(title=name, xlabel=column)
        if names := names_of(column, n_columns):
            ax.set_xticks(range(n_columns), names, rotation=90, parse_math=False)
        elif n_columns == 1:
            ax.set_xticks([0])
        elif not frame:
            ax.xaxis.get_major_locator().set_params(integer=True)
        if isinstance(rows, list):
            ax.set_yticks(range(len(rows)), [f'from {row}' for row in rows])
            continue
        ax.set_ylabel(rows)
        if names := names_of(rows, n_rows):
            ax.set_yticks(range(n_rows), names, parse_math=False)
        else:
            ax.yaxis.get_major_locator().set_params(integer=True)
    fig.colorbar(picture, ax=axes[:, 0], label='attention weight', aspect=12 * sum(heights))
    set_title(fig, title)
    save(fig, out, stem)
