"""
The attention of one clip as a picture, and the size and style of all figures.
"""
import os
import sys

import numpy as np
import torch

from run.folder import make_folder, save_picture

WIDE, HIGH = 3.35, 2.4   # inches: 85 mm, the width of a column
STYLE = {   # for rc_context around our figures, so that no other figure changes
    'font.size': 8, 'axes.titlesize': 8, 'legend.fontsize': 7, 'legend.frameon': False,
    'savefig.dpi': 200, 'lines.linewidth': 1.2}


def pyplot():
    """ matplotlib's pyplot. It is imported only here, because training should not wait for it. """
    import matplotlib
    if 'matplotlib.pyplot' not in sys.modules:
        matplotlib.use('Agg')   # not if pyplot is there already: a notebook has chosen a backend
    import matplotlib.pyplot as plt
    return plt


def save(fig, folder, name):
    """ Save a figure as folder/name.png, close it and print its path. """
    make_folder(folder)
    path = os.path.join(folder, name + '.png')
    save_picture(fig, path)
    pyplot().close(fig)
    print(path)


def canvas(rows=1, columns=1, high=HIGH, wide=WIDE):
    """ A figure of one column's width, and its axes [rows][columns]. high, wide: in inches. """
    return pyplot().subplots(rows, columns, figsize=(wide, high), layout='constrained', squeeze=False)


def draw_attention(run, feed, i, out, stem='attention'):
    """ The picture of test clip i of a feed; none where the model does not attend. """
    with torch.no_grad():
        views = run.model.views(feed('test', np.array([i])), run.predict)
    if not views:
        return
    with pyplot().rc_context(STYLE):
        draw_views(views, feed, i, out, stem)


def draw_views(views, feed, i, out, stem):
    """ The picture of what System.views gives of test clip i. """
    fig, axes = canvas(len(views), 1, high=0.5 + 1.3 * len(views))
    for (ax,), (name, (weights, rows, column)) in zip(axes, views.items()):
        picture = ax.imshow(weights.cpu().numpy(), aspect='auto', cmap='viridis', vmin=0)
        ax.set(title=name, xlabel=column)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if isinstance(rows, list):
            ax.set_yticks(range(len(rows)), [f'from {row}' for row in rows])
        else:
            ax.set_ylabel(rows)
            ax.yaxis.get_major_locator().set_params(integer=True)
        fig.colorbar(picture, ax=ax, label='weight')
    clip, text = feed.corpus.id('test')[i], feed.corpus.text('test')[i]
    title = f"{clip}: {text if text.isascii() else ''}"[:70]
    fig.suptitle(title, fontsize=7, parse_math=False)   # an id may hold dollar signs
    save(fig, out, stem)
