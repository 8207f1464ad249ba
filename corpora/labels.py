"""
Writes the labels of a corpus folder.
"""
import math
import unicodedata

import numpy as np

from corpora.unpickle import CorpusError
from run.errors import CONTROL
from run.forms import check_label

# the classes of known corpora, in their order
KNOWN_CLASSES = [
    ['neutral', 'surprise', 'fear', 'sadness', 'joy', 'disgust', 'anger'],  # MELD
    ['愤怒', '厌恶', '恐惧', '高兴', '平静', '悲伤', '惊奇'],  # CHERMA
    ['hap', 'sad', 'neu', 'ang', 'exc', 'fru'],  # IEMOCAP
]


def write_labels(splits, out, label_range, notes):
    """
    Writes NAME.npy of all labels and splits: float32 [N] for a score, int64 [N] for classes. A
    missing value is NaN or -1; training on that label refuses it. Returns the entry `labels` of
    meta.json. Raises CorpusError if each label has missing values, for a score outside the range,
    or a class that train does not have.
    """
    entries = {}
    train = splits['train']['labels']
    lacking = {name: _clips_without(name, splits) for name in train}
    for name in train:
        if len(lacking[name]) == sum(len(s['id']) for s in splits.values()) and len(train) > 1:
            notes.append(f"the label {name} is missing in all clips, so it was left out")
            continue
        if lacking[name]:
            if all(lacking.values()):
                raise CorpusError(f"{lacking[name][0]}; correct the source or remove the clip.")
            notes.append(f"{len(lacking[name])} clips have no {name}, so a run with "
                         f"--label={name} is refused")
        if isinstance(train[name][0], str):
            entries[name] = _write_classes(name, splits, out)
        else:
            entries[name] = _write_scores(name, splits, out, label_range)
        try:
            check_label(entries[name])   # as every run does that opens the folder
        except ValueError as e:
            raise CorpusError(f"The label {name} {e}; correct the source, or give --label_range or "
                              "other columns.") from None
    return entries


def _write_scores(name, splits, out, label_range):
    scores = np.concatenate([s['labels'][name] for s in splits.values()])  # [sum of N]
    top = np.abs(scores[np.isfinite(scores)]).max(initial=0)
    low, high = label_range or ((-1, 1) if top <= 1 else (-3, 3))
    for split, s in splits.items():
        y = s['labels'][name]  # [N]
        for clip, v in zip(s['id'], y):
            if (v < low or v > high) and math.isfinite(v):
                raise CorpusError(f"The {name} of clip {clip} in the split {split} is {v}, outside "
                                  f"[{low}, {high}]; if the label is right, convert the source "
                                  "with python data.py SOURCE --label_range=LOW,HIGH.")
        y = np.where(np.isfinite(y), y, np.nan).astype(np.float32)  # [N]
        np.save(out / split / f'{name}.npy', y)
    return dict(kind='regression', range=[low, high])


def _write_classes(name, splits, out):
    # NFC: one spelling of é in all splits
    labels = {split: [unicodedata.normalize('NFC', v) for v in s['labels'][name]]
              for split, s in splits.items()}
    seen = set(labels['train']) - {''}
    # only the classes of train; KNOWN_CLASSES decides nothing but their order
    known = next((k for k in KNOWN_CLASSES if seen <= set(k)), sorted(seen))
    names = [c for c in known if c in seen]
    for c in names:
        if CONTROL.search(c):
            raise CorpusError(f"The class {c!r} of {name} holds a control character; correct the "
                              "source.")
    number = {c: i for i, c in enumerate(names)} | {'': -1}
    for split, s in splits.items():
        for clip, v in zip(s['id'], labels[split]):
            if v not in number:
                raise CorpusError(f"The {name} of clip {clip} in the split {split} is {v}, but "
                                  f"train has only {', '.join(names)}; correct the source.")
        np.save(out / split / f'{name}.npy', np.array([number[v] for v in labels[split]]))  # [N]
    return dict(kind='classes', names=names)


def _clips_without(name, splits):
    """ A sentence on each clip without a finite score or a class. """
    found = []
    for split, s in splits.items():
        for clip, v in zip(s['id'], s['labels'][name]):
            if v == '' or type(v) is not str and not math.isfinite(v):
                found.append(f"The {name} of clip {clip} in the split {split} is {v or 'missing'}")
    return found
