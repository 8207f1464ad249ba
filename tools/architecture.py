"""
The diagram of the systems that README.md shows: python tools/figures.py --architecture draws it.
"""
import textwrap

from adapters import FFW, GMRA, AVEncoder, CrossAttention, MSEAdapter, frames_on_tokens
from data import Feed
from lm import FrozenLM, TextEncoder
from model import CrossSent, DeepMLF, PseudoTokenLM
from prompts import Prompt
from run.pictures import pyplot, save, style

FROZEN, TRAINED, NO_WEIGHTS = '#dfe7f3', '#fdf0dc', 'white'
COLORS = {FrozenLM: FROZEN, Feed: NO_WEIGHTS, Prompt: NO_WEIGHTS, PseudoTokenLM: NO_WEIGHTS,
          frames_on_tokens: NO_WEIGHTS}   # all other classes: TRAINED
NAMES = {MSEAdapter: 'MSEAdapter or CMPTA'}   # of a box that stands for two classes

# title -> boxes of (class or function, its output, shape, x, y), and arrows as pairs of the numbers
# of two boxes. x and y run from 0 to 1, y upwards.
DRAWN = {
    'DeepMLF': (
        [(FrozenLM, 'text', '[B,T,D]', 0.13, 0.05),
         (DeepMLF, 'fusion tokens', '[B,F,D]', 0.46, 0.05),
         (AVEncoder, 'audio, video', 'Z [B,m,d]', 0.84, 0.05),
         (FrozenLM, 'each layer in turn', 'x_t [B,T,D], x_f [B,F,D]', 0.3, 0.25),
         (CrossAttention, 'x_f attends to Z', '[B,F,D]', 0.5, 0.46),
         (FFW, 'each token of both', '[B,T,D], [B,F,D]', 0.5, 0.64),
         (DeepMLF, 'task head on the mean of Z,\nthe last x_t, the mean x_f', '[B]', 0.56, 0.93)],
        [(0, 3), (1, 3), (2, 4), (3, 4), (4, 5), (5, 6), (2, 6)]),
    'MSE-Adapter and CMPTA': (
        [(FrozenLM, 'embedded text', '[B,T,D]', 0.22, 0.05),
         (Feed, 'audio, video', '[B,S,d_a], [B,S,d_v]', 0.74, 0.05),
         (MSEAdapter, 'pseudo tokens', '[B,P,D]', 0.72, 0.27),
         (Prompt, 'pseudo tokens,\ntext, question', '[B,L,D]', 0.5, 0.49),
         (FrozenLM, 'all layers, on the prompt\nand the label trie', '[B,L+N,D]', 0.5, 0.715),
         (PseudoTokenLM, 'log p of every label', '[B,K]', 0.5, 0.93)],
        [(0, 3), (0, 2), (1, 2), (2, 3), (3, 4), (4, 5)]),
    'CrossSent': (
        [(TextEncoder, 'embedded text', '[B,T,D]', 0.24, 0.05),
         (frames_on_tokens, 'audio, video', '[B,T,d_a], [B,T,d_v]', 0.745, 0.05),
         (TextEncoder, 'layers before\ngmra_layer', '[B,T,D]', 0.24, 0.27),
         (GMRA, 'cross-attention,\ngate, residual', '[B,T,D]', 0.5, 0.49),
         (TextEncoder, 'the other layers', '[B,T,D]', 0.5, 0.715),
         (CrossSent, 'head on the\nsentence vector', '[B]', 0.5, 0.93)],
        [(0, 2), (2, 3), (1, 3), (3, 4), (4, 5)]),
}
LETTERS = textwrap.fill(
    'B clips, T text tokens, S audio or video frames, F fusion tokens, m slots of Z, P pseudo '
    'tokens, L tokens of the prompt, N nodes of the label trie, K labels. D: width of the LM or '
    'the encoder; d: of the AV encoder; d_a, d_v: of audio and video. x_t, x_f: hidden states '
    'of text and of fusion tokens. Z: audio and video as one sequence.', 112)
SIZE = 9   # points; 13 pixels in README.md, which shows the picture 830 pixels wide
WIDE, HIGH = 8.3, 6.9   # inches


def as_box(color):
    """ The style of a box. """
    return dict(boxstyle='round,pad=0.35', fc=color, ec='0.5', lw=0.8)


def draw_boxes(ax, boxes, arrows):
    """ Draw the boxes and arrows of one system into its axes. """
    patches = []
    for thing, gives, shape, x, y in boxes:
        name = NAMES.get(thing, thing.__name__)
        text = ax.text(x, y, f'{name}\n{gives}\n{shape}', ha='center', va='center', fontsize=SIZE,
                       linespacing=1.25, bbox=as_box(COLORS.get(thing, TRAINED)), zorder=3)
        patches.append(text.get_bbox_patch())
    for a, b in arrows:   # from the edge of a box to the edge of another
        (*_, x_a, y_a), (*_, x_b, y_b) = boxes[a], boxes[b]
        passes_others = b - a > 3 and y_b - y_a > 0.5   # then the arrow goes straight up
        arrow = dict(arrowstyle='->', color='0.4', lw=1, shrinkA=2, shrinkB=2, patchA=patches[a],
                     patchB=patches[b])
        ax.annotate('', (x_a if passes_others else x_b, y_b), (x_a, y_a), arrowprops=arrow)


def draw_block(ax):
    """ Draw a frame around DeepMLF's MM block, and the way to the LM's next layer. """
    frame = dict(boxstyle='round,pad=0.02', fc='none', ec='0.5', lw=0.8, ls='--')
    block = pyplot().matplotlib.patches.FancyBboxPatch((0.16, 0.39), 0.58, 0.375, **frame)
    ax.add_patch(block)
    ax.text(0.16, 0.765, 'MMBlock, after\nmm_layers', fontsize=SIZE, va='top')
    arrow = dict(arrowstyle='->', color='0.4', lw=1, connectionstyle='arc3,rad=0.35')
    ax.annotate('', (0.1, 0.305), (0.275, 0.64), arrowprops=arrow)
    ax.text(0.02, 0.5, 'next\nlayer', fontsize=SIZE, va='center', ha='left', color='0.3',
            bbox=dict(fc='white', ec='none', pad=1))


def draw_architecture(folder):
    """
    Draw the systems side by side as folder/architecture.png. Data goes up; each box names a class,
    its output and the output's shape.
    """
    with style():
        fig = pyplot().figure(figsize=(WIDE, HIGH))
        left, axes = 0.0, {}
        for (title, (boxes, arrows)), share in zip(DRAWN.items(), (0.355, 0.33, 0.315)):
            axes[title] = fig.add_axes((left, 0.14, share, 0.82))
            draw_boxes(axes[title], boxes, arrows)
            axes[title].set_title(title, fontsize=SIZE + 2)
            left += share
        draw_block(axes['DeepMLF'])
        axes['letters'] = fig.add_axes((0, 0, 1, 0.14))
        for ax in axes.values():
            ax.set(xlim=(0, 1), ylim=(0, 1))
            ax.axis('off')
        colors = ((0.02, FROZEN, 'frozen'), (0.13, TRAINED, 'trained'),
                  (0.25, NO_WEIGHTS, 'no weights of its own'))
        for x, color, name in colors:
            axes['letters'].text(x, 0.85, name, fontsize=SIZE, va='top', bbox=as_box(color))
        axes['letters'].text(0.01, 0.56, LETTERS, fontsize=SIZE, va='top', linespacing=1.3)
        save(fig, folder, 'architecture')
