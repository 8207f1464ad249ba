"""
The forms (run/json_files.py) of the JSON in a run's folder.
"""
import re
from math import inf, isfinite
from typing import Literal

from configurator import AtLeast
from run.errors import ModelError
from run.folder import load_info
from run.json_files import (
    NUMBER,
    Each,
    Maybe,
    check_form,
    check_numbers,
    check_printable,
    check_texts,
    shorten,
)

COUNT = AtLeast(0)
MOST_LEVELS = 1000   # classes of a label, or the width of its range; metrics have tables of both axes
LONGEST_NAME = 200   # characters of the name of a class or a corpus, which are drawn and printed
# The bounds of a corpus, in the report's order: what an optimal predictor with these inputs reaches
MAJORITY, TEXT, AV, LATE_FUSION, FULL = BOUNDS = 'majority text av late full'.split()
METRICS = Each(NUMBER)   # name -> value; the correlation of a constant is NaN
STREAM = dict(width=AtLeast(1), mean=[NUMBER], std=[AtLeast(0)], standardised=bool)
LABEL = dict(kind=Literal['regression', 'classes'])
CLIPS = dict(train=int, valid=int, test=int)

FACTS = dict(   # clips.corpus_facts
    folder=str, sha256=str, contents=str, name=str, widths=Each(int), streams=Each(STREAM),
    labels=Each(LABEL), clips=CLIPS, upper_case=bool)
ABOUT = dict(   # record.describe_run
    name=str, command=str, knobs=dict, commit=str, dirty=bool, corpus=FACTS,
    device=Literal['cuda', 'mps', 'cpu'], dtype=Literal['float32', 'bfloat16', 'float16'],
    threads=AtLeast(1), matmul_gflops=COUNT, first_word=Maybe(AtLeast(0)),
    lm_fingerprint=Maybe(str), lm_answer=Maybe([NUMBER]), tokenizer_fingerprint=Maybe(str))
STATE = dict(   # of the loop in train.py
    step=int, best=Maybe(NUMBER), best_step=int, stale=int, seconds=COUNT, done=bool)
RESULT = dict(   # result.json, as train.py writes it
    about=ABOUT, state=STATE | dict(best=NUMBER), n_trainable=int, n_frozen=int, clips=CLIPS,
    info=LABEL, ceilings=Maybe(Each(METRICS)), majority=Maybe(METRICS), lm_kept=Maybe(bool),
    valid=METRICS, test=METRICS, controls=Each(METRICS), seconds=COUNT,
    files=Maybe(Each(str)), checksum=Maybe(str))   # file name -> CRC-32 of its text; see sealed
LOG_LINE = dict(step=int, epoch=COUNT)
TRAIN_LINE = LOG_LINE | dict(train=METRICS, gates=Maybe(Each([NUMBER])))
VALID_LINE = LOG_LINE | dict(valid=METRICS, best=bool)

SWEEP = dict(title=str, rows=[dict(label=str, test=[METRICS])])   # written by tools/sweep.py


def check_about(about):
    """ Raises ValueError if describe_run's dict is damaged. Its knobs are not checked. """
    check_numbers(about)
    check_texts(about)
    check_printable(about)
    check_form(about, ABOUT)
    if '\n' in about['name'] or not re.fullmatch('[0-9a-f]*', about['commit']):
        raise ValueError("has a name of two lines, or a commit that is none")
    facts = about['corpus']
    if set(facts['streams']) != set(facts['widths']):
        raise ValueError("names different streams in its widths and in its streams")
    for m, stream in facts['streams'].items():
        n = facts['widths'][m]
        if n != stream['width']:
            raise ValueError(f"has the widths {shorten(n)} and {stream['width']} of {m}")
        check_stream(m, stream)
    for info in facts['labels'].values():
        check_label(info)


def check_stream(m, stream):
    """ Raises ValueError if the mean or the std of a stream does not have its width. """
    d = stream['width']
    if not len(stream['mean']) == len(stream['std']) == d:
        raise ValueError(f"does not have a mean and std of {m} of {d} numbers each")


def check_label(info):
    """ Raises ValueError if the description of a label has neither a range nor names. """
    if info['kind'] == 'classes':
        check_form(info, dict(names=[str]))
        check_printable(info['names'])
        if any(len(name) > LONGEST_NAME for name in info['names']):
            raise ValueError(f"has the name of a class of more than {LONGEST_NAME} characters")
        if len(set(info['names'])) != max(1, len(info['names'])):
            raise ValueError(f"has no class names, or one twice: {shorten(info['names'])}")
        if len(info['names']) > MOST_LEVELS:
            raise ValueError(f"has {len(info['names'])} classes, and at most {MOST_LEVELS} can be read")
        return
    check_form(info, dict(range=[NUMBER]))
    if len(info['range']) != 2 or not -inf < info['range'][0] < info['range'][1] < inf:
        raise ValueError(f"has the wrong range {shorten(info['range'])}")
    if info['range'][1] - info['range'][0] > MOST_LEVELS:
        raise ValueError(f"has the range {shorten(info['range'])}, and scores can span at most "
                         f"{MOST_LEVELS}: divide them by a constant")


def check_ceilings(ceilings):
    """ Raises ValueError if the bounds of a corpus lack an entry that a report compares with. """
    bound = dict(mae=NUMBER, acc=NUMBER)
    check_form(ceilings, {LATE_FUSION: bound, FULL: bound})
    if any(not isfinite(v) for values in ceilings.values() for v in values.values()):
        raise ValueError("has bounds that are not finite")
    if any(ceilings[LATE_FUSION][key] == ceilings[FULL][key] for key in bound):
        raise ValueError("has equal bounds for late fusion and for all modalities")


def check_log_line(line):
    """ Raises ValueError if a line of log.jsonl is damaged. """
    form = TRAIN_LINE if 'train' in line else VALID_LINE
    check_form(line, form)


def read_header(path):
    """
    The info in the header of a run's checkpoint: `about` and `state`. Raises ModelError if it is
    damaged.
    """
    info = load_info(path)
    try:
        check_form(info, dict(about=dict(format=int, knobs=dict, corpus=dict), state=STATE))
        check_numbers(info['state'])
        return info
    except ValueError as e:
        raise ModelError(f"{path} is damaged ({e}): restore a copy, or train the run again with "
                         "--fresh=True.") from None
