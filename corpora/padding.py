"""
Finds the side of the padding of each stream: 'left' (at the head of a clip) or 'right' (at its
tail). A zero frame is one whose features are all zero. A zero run is the zero frames at one end.

Axis letters: N clips of a split, n clips of a sample or chunk, L frames of the longest clip, d
features.
"""
import math

import numpy as np

from corpora.frames import CHUNK_BYTES, finite, zero_runs
from corpora.names import printed
from corpora.unpickle import CorpusError

STEADY_ROWS = 2  # zero frames that all clips may have at one end, for [CLS] or [SEP]
MIXED_SHARE = 0.1  # the share of the evidence that may contradict the padding side


def _side_of(left, right):
    """ 'left', 'right', 'mixed' or None (no evidence), from the evidence for each side. """
    if left + right == 0:
        return None
    if min(left, right) > MIXED_SHARE * (left + right):
        return 'mixed'
    return 'left' if left > right else 'right'


def _excess(head, tail):
    """
    How many more zero frames a clip has at its head than at its tail, and how many more at its tail
    than at its head: two arrays [n], with 0 in place of negative numbers.
    """
    return np.maximum(head - tail, 0), np.maximum(tail - head, 0)


def _side_by_runs(cells):
    """
    The padding side that zero runs show: 'left', 'right', 'mixed' or None. cells: a list of
    (stream, split, head [n], tail [n]), with the numbers of zero frames at both ends of each clip.

    The weight of a clip is the number of frames by which one run is longer than the other, so that
    a silent first frame weighs little against padding. Zero frames that all clips have, for [CLS]
    or [SEP], are not padding, but would count as padding in clips that fill the full length.
    Therefore the side is computed twice: from all zero frames, and without those that 95 % of a
    stream's clips have. It is mixed if the two results contradict each other, or if one cell shows
    the other side with runs that are, on average, more than a quarter as long as the padding.
    """
    varying = []  # the cells without the zero frames that all clips have
    for stream in dict.fromkeys(cell[0] for cell in cells):
        of_stream = [cell for cell in cells if cell[0] == stream]
        first = _steady_rows([head for _, _, head, _ in of_stream])
        last = _steady_rows([tail for _, _, _, tail in of_stream])
        for _, split, head, tail in of_stream:
            varying.append((stream, split, np.maximum(head - first, 0), np.maximum(tail - last, 0)))
    if not any(_total_excess(varying)):
        return None  # all clips have the same zero frames at both ends, or none
    clear = {_side_of(*_total_excess(c)) for c in (cells, varying)} - {None, 'mixed'}
    if len(clear) != 1:
        return 'mixed'
    side = clear.pop()
    padding = _mean_excess(cells, side)
    for cell in varying:
        other = _side_of(*_total_excess([cell]))
        if other in ('left', 'right') and other != side:
            if _mean_excess([cell], other) > 0.25 * padding:
                return 'mixed'
    return side


def _steady_rows(runs):
    """ The zero frames that 95 % of a stream's clips have at one end, at most STEADY_ROWS. """
    return min(STEADY_ROWS, np.percentile(np.concatenate(runs), 5, method='lower'))


def _total_excess(cells):
    """ The sums of the excess over all clips, for left and for right. """
    both = [_excess(head, tail) for _, _, head, tail in cells]
    return sum(int(left.sum()) for left, _ in both), sum(int(right.sum()) for _, right in both)


def _mean_excess(cells, side):
    """ The mean excess for a side, over the clips that show this side. """
    both = [_excess(head, tail) for _, _, head, tail in cells]
    frames = np.concatenate([left if side == 'left' else right for left, right in both])
    return frames[frames > 0].mean() if frames.any() else 0.0


def _stated_votes(frames):
    """
    The numbers of clips whose stated length shows padding at the head and at the tail. A clip shows
    a side if all frames beyond its stated length are zero at that side, and not at the other.
    """
    at, head, tail = frames.edge_zeros()
    n_padding = frames.n_rows[at] - frames.lengths[at]  # [n]
    known = frames.lengths[at] >= 0  # [n]
    left, right = head >= n_padding, tail >= n_padding  # [n]
    return int((known & left & ~right).sum()), int((known & right & ~left).sum())


def _run_cells(splits, streams):
    """ The cells of _side_by_runs, from clips without a stated length that are not all zero. """
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
    True if audio, vision and the text's arrays (if there are some) have the same number of frames.
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
    The evidence that a source's text arrays give for the padding of streams with one frame per
    token: the zero runs at the head and at the tail of the text's mask (or features), per split.
    The arrays are read in pieces, when a method first needs them.
    """

    def __init__(self, splits):
        self.splits = splits
        self.runs = {}  # id of an array -> its zero runs, from _read

    def _read(self, array, is_mask):
        """ The zero runs (head [N], tail [N]), or None for a mask that holds more than 0 and 1. """
        step = max(1, CHUNK_BYTES // (8 * max(1, math.prod(array.shape[1:]))))
        heads, tails = [], []
        for i in range(0, array.shape[0], step):
            rows = array.rows(i, i + step)  # [n,3,L] or [n,L,d]
            if is_mask and not np.isin(rows[:, 1], (0, 1)).all():
                return None
            nonzero = rows[:, 1] != 0 if is_mask else finite(rows).any(-1)  # [n,L]
            head, tail = zero_runs(nonzero, np.full(len(nonzero), nonzero.shape[1]))  # [n]
            heads.append(head)
            tails.append(tail)
        array.close()
        return np.concatenate(heads), np.concatenate(tails)

    def usable(self, m):
        """
        (key, {split: (head [N], tail [N], L)}) of the first text array that has as many frames as
        stream m, or None. Masks are tried first: they are small, and their purpose is to give
        lengths.
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
            # features without zeros give no lengths; BERT's are not zero in the padding
            zeros = any(head.any() or tail.any() for head, tail, _ in runs.values())
            if runs and (zeros or not no_mask):
                return key, runs
        return None

    def side(self, m):
        """ The padding side of the text of stream m: 'left', 'right', 'mixed' or None. """
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
        The lengths of stream m by its text: (key of the text array, lengths {split: [N]}, None), or
        (None, None, the reason why the text is not used), or (None, None, None) without a text. The
        text is used if it has no padding or padding on the same side, and if in at least 95 % of
        the clips the stream has no nonzero frame beyond the text.
        """
        key_runs = self.usable(m)
        if not key_runs:
            return None, None, None
        key, runs = key_runs
        if self.side(m) not in (side, None):
            return None, None, f"{key} is not used for lengths: its padding is not on the {side}"
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
            why = f"{m} is longer than the text in {beyond} of {read} clips"
            return None, None, f"{key} is not used for lengths: {why}"
        return key, lengths, None


def find_padding(splits, source, padding, summary):
    """
    The padding of each stream: {stream: dict(side, by, left, right, read, streams, text,
    text_lengths, text_not_used)}. `left` and `right` count the clips that show a side, `read`
    counts the clips checked, and `by` names the evidence. Raises CorpusError if the evidence is
    mixed. The evidence is, in this order:

    1. `padding`, the user's choice;
    2. stated lengths, of the stream or of one that is aligned with it;
    3. zero runs in clips without a stated length, of all splits, and in an aligned source of all
       streams together;
    4. the aligned text, if the zero runs show no side or are mixed.

    At most SIDE_SAMPLE clips of a stream and split are read for it.
    """
    streams = list(splits['train']['streams'])
    text = AlignedText(splits)
    aligned = _is_aligned(splits)
    stated = {}
    for m in streams:
        stated[m] = {split: _stated_votes(s['streams'][m]) for split, s in splits.items()}

    found = {}
    for m in streams:
        group = streams if aligned else [m]
        found[m] = _find_side(m, group, splits, stated, text)
        if padding:
            found[m] |= dict(side=padding, by='--padding')
        elif found[m]['side'] == 'mixed':
            raise CorpusError(_mixed_message(found[m], source))
        # if no clip shows a side, take right, the side of most corpora
        found[m]['side'] = found[m]['side'] or 'right'
        key = lengths = why_not = None
        if _has_unknown(m, splits):
            key, lengths, why_not = text.lengths(m, found[m]['side'])
            summary.unread.pop(key, None)
        found[m] |= dict(text=key, text_lengths=lengths, text_not_used=why_not)
    return found


def _has_unknown(m, splits):
    """ True if the length of a clip in stream m must be found from its frames. """
    return any(s['streams'][m].unknown.any() for s in splits.values())


def _n_read(streams, splits):
    """ The number of clips read to find the padding side; each stream of a clip counts. """
    return sum(len(s['streams'][m].edge_zeros()[0]) for m in streams for s in splits.values())


def _mixed_message(found, source):
    """ The error message for mixed evidence for the padding side. """
    by_runs = found['by'] == 'zero frames'
    what = "the longer run of zero frames is" if by_runs else "by the stated lengths the padding is"
    return (f"The padding side of {' and '.join(found['streams'])} in {source} is not clear, as "
            f"{what} at the head in {found['left']} clips and at the tail in {found['right']} (of "
            f"{found['read']} clips checked); convert it with python data.py SOURCE and "
            "--padding=left or --padding=right.")


def _find_side(m, group, splits, stated, text):
    """
    dict(side, by, left, right, read, streams) of one stream, without the user's choice. side is
    'left', 'right', 'mixed' or None. group: the streams that are aligned with it, and itself.
    """
    unknown = _has_unknown(m, splits)
    votes = list(stated[m].values())  # (left, right) of each split
    if unknown and not any(map(sum, votes)):
        votes = [v for other in group for v in stated[other].values()]
    left, right = map(sum, zip(*votes))
    side = _side_of(left, right)
    if any(sum(v) > 1 and _side_of(*v) not in (side, None) for v in votes):
        side = 'mixed'  # one split is padded on the other side
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
