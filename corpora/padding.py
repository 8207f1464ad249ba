"""
The padding side of a source, where zero frames must show it.
"""
import math

import numpy as np

from corpora.frames import CHUNK_BYTES, finite, zero_runs
from corpora.names import printed
from corpora.unpickle import CorpusError

STEADY_ROWS = 2  # zero rows that all clips may have at an end, for [CLS] and [SEP]
MIXED_SHARE = 0.1  # of the evidence for a padding side may contradict it


def _side_of(left, right):
    """ 'left', 'right', 'mixed', or None for no evidence, from the evidence for either. """
    if left + right == 0:
        return None
    if min(left, right) > MIXED_SHARE * (left + right):
        return 'mixed'
    return 'left' if left > right else 'right'


def _excess(head, tail):
    """
    By how many frames a clip's zero run at one end is longer than that at the other: left, right
    [n].
    """
    return np.maximum(head - tail, 0), np.maximum(tail - head, 0)


def _side_by_runs(cells):
    """
    The side that zero runs show, 'left', 'right', 'mixed' or None, of cells (stream, split, head
    [n], tail [n]).

    Each clip counts by the frames by which the run at one end is longer than the run at the
    other, so that a silent first frame weighs little against padding. A row of zeros that all
    clips have ([CLS], [SEP]) is no padding: the side is also looked for with the run that 95 % of
    a stream's clips have taken off, or clips that fill the length would vote by it. If the two
    contradict each other, the evidence is mixed. So it is if one split or stream shows the other
    side by runs that are as long as padding.
    """
    steady = []
    for stream in dict.fromkeys(cell[0] for cell in cells):
        own = [cell for cell in cells if cell[0] == stream]
        first = _steady_rows([head for _, _, head, _ in own])
        last = _steady_rows([tail for _, _, _, tail in own])
        for _, split, head, tail in own:
            steady.append((stream, split, np.maximum(head - first, 0), np.maximum(tail - last, 0)))
    if not any(_total_excess(steady)):
        return None  # all clips have the same rows of zeros, or none
    clear = {_side_of(*_total_excess(c)) for c in (cells, steady)} - {None, 'mixed'}
    if len(clear) != 1:
        return 'mixed'
    side = clear.pop()
    padding = _mean_excess(cells, side)
    for cell in steady:
        other = _side_of(*_total_excess([cell]))
        if other in ('left', 'right') and other != side:
            if _mean_excess([cell], other) > 0.25 * padding:
                return 'mixed'
    return side


def _steady_rows(runs):
    """ How many zero frames 95 % of a stream's clips have at one end, STEADY_ROWS at most. """
    return min(STEADY_ROWS, np.percentile(np.concatenate(runs), 5, method='lower'))


def _total_excess(cells):
    """ The frames of evidence for left and for right. """
    both = [_excess(head, tail) for _, _, head, tail in cells]
    return sum(int(left.sum()) for left, _ in both), sum(int(right.sum()) for _, right in both)


def _mean_excess(cells, side):
    """ The frames of evidence for a side, a clip that shows it. """
    both = [_excess(head, tail) for _, _, head, tail in cells]
    frames = np.concatenate([left if side == 'left' else right for left, right in both])
    return frames[frames > 0].mean() if frames.any() else 0.0


def _stated_votes(frames):
    """
    How many clips show padding at the head and at the tail by their stated lengths: all the frames
    that are left over there are zero, and not those at the other end.
    """
    at, head, tail = frames.edge_zeros()
    over = frames.n_rows[at] - frames.lengths[at]  # [n]
    known = frames.lengths[at] >= 0  # [n]
    left, right = head >= over, tail >= over  # [n]
    return int((known & left & ~right).sum()), int((known & right & ~left).sum())


def _run_cells(splits, streams):
    """
    The cells of _side_by_runs, of clips whose length nobody states and that are not all zero.
    """
    cells = []
    for m in streams:
        for split, s in splits.items():
            frames = s['streams'][m]
            at, head, tail = frames.edge_zeros()
            votes = frames.unknown[at] & (head < frames.n_rows[at])  # [n]
            if votes.any():
                cells.append((m, split, head[votes], tail[votes]))
    return cells


def _is_aligned(splits):
    """
    True if audio and vision, and the text's features where there are some, have one frame count.
    """
    for s in splits.values():
        streams = list(s['streams'].values())
        if len(streams) < 2 or any(f.flat or f.ragged for f in streams):
            return False
        counts = {f.L for f in streams if not f.empty}
        counts |= {a.shape[1 + is_mask] for _, a, is_mask in s['aligned_text']}
        if len(counts) > 1:
            return False
    return True


class AlignedText:
    """
    What a source's text says of the lengths of streams that have a frame a token: zero runs at the
    head and at the tail of its mask (or its features), per split. Read in pieces, and only when it
    is asked for.
    """

    def __init__(self, splits):
        self.splits = splits
        self.runs = {}

    def _read(self, array, is_mask):
        """ (head [N], tail [N]), or None for a mask that is not 0 and 1. """
        step = max(1, CHUNK_BYTES // (8 * max(1, math.prod(array.shape[1:]))))
        heads, tails = [], []
        for i in range(0, array.shape[0], step):
            rows = array.rows(i, i + step)  # [n,3,L] or [n,L,d]
            if is_mask and not np.isin(rows[:, 1], (0, 1)).all():
                return None
            live = rows[:, 1] != 0 if is_mask else finite(rows).any(-1)  # [n,L]
            head, tail = zero_runs(live, np.full(len(live), live.shape[1]))  # [n]
            heads.append(head)
            tails.append(tail)
        array.close()
        return np.concatenate(heads), np.concatenate(tails)

    def usable(self, m):
        """
        (key, {split: (head [N], tail [N], L)}) of the first text with the frame count of stream m,
        or None. A mask comes first: it is small, and it is meant to tell lengths.
        """
        found = {}
        for split, s in self.splits.items():
            for key, array, is_mask in s['aligned_text']:
                if array.shape[1 + is_mask] == s['streams'][m].L:
                    found.setdefault((not is_mask, printed(key)), {})[split] = array
        for no_mask, key in sorted(found):
            runs = {}
            for split, array in found[no_mask, key].items():
                if id(array) not in self.runs:
                    self.runs[id(array)] = self._read(array, not no_mask)
                if self.runs[id(array)]:
                    runs[split] = (*self.runs[id(array)], array.shape[1 + (not no_mask)])
            # features that are zero nowhere say nothing: BERT's are not zero in padding
            zeros = any(head.any() or tail.any() for head, tail, _ in runs.values())
            if runs and (zeros or not no_mask):
                return key, runs
        return None

    def side(self, m):
        """ The padding side of the text, 'left', 'right', 'mixed' or None. """
        key_runs = self.usable(m)
        if not key_runs:
            return None
        cells = []
        for split, (head, tail, L) in key_runs[1].items():
            some = head < L  # [N]
            cells.append(('text', split, head[some], tail[some]))
        return _side_of(*_total_excess(cells))

    def lengths(self, m, side):
        """
        Of stream m: the key of the text that states its lengths, the lengths {split: [N]}, and a
        sentence that says why the text is not used, each None if there is none. Text is used that
        is of the same frames. It is of the same frames if its padding is on the same side and in at
        least 95 % of the clips the stream has no frame beyond it.
        """
        key_runs = self.usable(m)
        if not key_runs:
            return None, None, None
        key, runs = key_runs
        if self.side(m) not in (side, None):
            return None, None, f"{key} is not used for lengths: its padding is not {side}"
        lengths, beyond, read = {}, 0, 0
        for split, (head, tail, L) in runs.items():
            lengths[split] = L - (head if side == 'left' else tail)  # [N]
            frames = self.splits[split]['streams'][m]
            at, *zeros = frames.edge_zeros()
            some = lengths[split][at] > 0  # [n]
            found = frames.n_rows[at] - zeros[0 if side == 'left' else 1]  # [n]
            beyond += int((found > lengths[split][at])[some].sum())
            read += int(some.sum())
        if not read or beyond > 0.05 * read:
            why = f"{m} goes beyond it in {beyond} of {read} clips"
            return None, None, f"{key} is not used for lengths: {why}"
        return key, lengths, None


def find_padding(splits, source, padding, summary):
    """
    The padding of each stream, as {stream: dict(side, by, left, right, read, streams, text,
    text_lengths)}.

    `padding` is the user's word and decides. Else stated lengths do, of the stream or of one that
    is aligned with it; else the zero runs of clips without a stated length, of all splits, and of
    all streams together in an aligned source; else the aligned text. Up to SIDE_SAMPLE clips of a
    stream and split are read for it, which is all of them in small corpora. Raises CorpusError
    where the evidence is mixed.
    """
    streams = list(splits['train']['streams'])
    text = AlignedText(splits)
    together = _is_aligned(splits)
    stated = {}
    for m in streams:
        stated[m] = {split: _stated_votes(s['streams'][m]) for split, s in splits.items()}

    found = {}
    for m in streams:
        group = streams if together else [m]
        found[m] = _find_side(m, group, splits, stated, text)
        if padding:
            found[m] |= dict(side=padding, by='--padding')
        elif found[m]['side'] == 'mixed':
            raise CorpusError(_mixed_sentence(found[m], source))
        # where no clip shows a side: right, as most corpora are padded
        found[m]['side'] = found[m]['side'] or 'right'
        key = lengths = why_not = None
        if _has_unknown(m, splits):
            key, lengths, why_not = text.lengths(m, found[m]['side'])
            summary.unread.pop(key, None)
        found[m] |= dict(text=key, text_lengths=lengths, text_not_used=why_not)
    return found


def _has_unknown(m, splits):
    """ True if a clip's length in stream m must be found from its frames. """
    return any(s['streams'][m].unknown.any() for s in splits.values())


def _n_read(streams, splits):
    """ How many clips were read to find the padding side, each stream counted apart. """
    return sum(len(s['streams'][m].edge_zeros()[0]) for m in streams for s in splits.values())


def _mixed_sentence(found, source):
    """ What is said where the evidence for the padding side is mixed. """
    by_runs = found['by'] == 'zero frames'
    what = "the longer zero run is" if by_runs else "by the lengths the padding is"
    return (f"The padding side of {' and '.join(found['streams'])} in {source} is not clear, as "
            f"{what} at the head in {found['left']} clips and at the tail in {found['right']} (of "
            f"{found['read']} read); convert it with python data.py SOURCE and --padding=left or "
            "--padding=right.")


def _find_side(m, group, splits, stated, text):
    """
    The side of one stream ('left', 'right', 'mixed', None), by what, and the counts that show it.
    """
    unknown = _has_unknown(m, splits)
    votes = list(stated[m].values())  # (left, right) of each split
    if unknown and not any(map(sum, votes)):
        votes = [v for other in group for v in stated[other].values()]
    left, right = map(sum, zip(*votes))
    side = _side_of(left, right)
    if any(sum(v) > 1 and _side_of(*v) not in (side, None) for v in votes):
        side = side and 'mixed'  # one split is padded on the other side
    found = dict(side=side, by='stated lengths' if side else 'none', left=left, right=right,
                 read=_n_read([m], splits), streams=[m])
    if side or not unknown:
        return found
    cells = _run_cells(splits, group)
    both = [_excess(head, tail) for _, _, head, tail in cells]
    found['side'] = _side_by_runs(cells)
    found['by'] = 'zero frames' if found['side'] else 'none'
    found['left'] = sum(int((left > 0).sum()) for left, _ in both)
    found['right'] = sum(int((right > 0).sum()) for _, right in both)
    found['read'], found['streams'] = _n_read(group, splits), group
    if found['side'] in ('mixed', None) and text.side(m) in ('left', 'right'):
        found['side'], found['by'] = text.side(m), text.usable(m)[0]
    return found
