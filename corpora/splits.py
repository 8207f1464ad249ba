"""
Splits a table into train, valid and test, by video.
"""
import hashlib
import re
from collections import Counter

import numpy as np

from corpora.names import SPLITS
from corpora.rows import number_of
from corpora.unpickle import CorpusError


def ratio_of(flag):
    """ (train, valid, test) shares of '80/10/10'; None if the flag is a column's name. """
    if not flag or not re.fullmatch(r'[\d.]+(/[\d.]+){2}', flag):
        return None
    shares = [number_of(s) or 0 for s in flag.split('/')]
    if min(shares) <= 0:
        raise CorpusError(f"--split={flag} must give each of train, valid and test a share above "
                          "0, for example --split=80/10/10.")
    return [s / sum(shares) for s in shares]


def split_by_video(videos, shares):
    """
    A split for each clip, so that the clips of a video are in one split. videos [N]: the video of
    each clip. The order of the videos is that of a hash of their names, so the result depends on
    nothing else. Raises CorpusError for fewer than three videos.
    """
    sizes = Counter(videos)
    ends = np.cumsum(shares) * len(videos)  # [3], clips
    if len(sizes) < len(SPLITS):
        raise CorpusError(f"There are {len(sizes)} videos and three splits; a split needs a video "
                          "of its own, so put the splits into a column.")
    order = sorted(sizes, key=lambda v: hashlib.sha256(v.encode()).digest())
    chosen, done, at = {}, 0, 0
    for i, video in enumerate(order):
        later = len(SPLITS) - 1 - at   # splits that still have no video
        full = done + sizes[video] / 2 > ends[at]
        if later and at in chosen.values() and (full or len(order) - i == later):
            at += 1
        chosen[video] = at
        done += sizes[video]
    return [SPLITS[chosen[v]] for v in videos]
