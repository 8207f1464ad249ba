"""
Damaged inputs. A kind makes damaged inputs from a seed and gives each to the code, which must refuse
it with one sentence or compute what it computes from the undamaged input.

    python -m pytest -q -s tests/test_trust.py::test_soak --soak
                                                  all kinds of KINDS, LONG inputs of each
    check(KINDS[name](places), n, seed, places)   n inputs of one kind

Kinds are in damaged_corpora.py, bombs.py and damaged_runs.py.

A kind is a class with

    __init__(places)    makes the undamaged input; `places`: see Places
    damage(rng)         makes one damaged input in places.work and returns the name of the damage
    use()               gives it to the code -> a value that == compares, or None if the damage may
                        change the result; raises one of REFUSALS
    whole               what use() returned for the undamaged input
"""

import random
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bombs import BOMB_KINDS
from corpora.unpickle import CorpusError
from damaged_corpora import CORPUS_KINDS
from damaged_runs import RUN_KINDS
from fakes import alarm
from run.clips import ClipError
from run.errors import ModelError
from run.finished import EvalError

REFUSALS = (CorpusError, ClipError, EvalError, ModelError, SystemExit)
MOST_SECONDS = 30  # for one input; longer is a hang


@dataclass
class Places:
    """
    The folders that kinds use. corpora, curriculum: of the fixtures in tests/conftest.py. work: for
    damaged inputs. outside: beside it; nothing may be written there.
    """

    corpora: Path
    curriculum: Path
    work: Path
    outside: Path


def make_places(corpora, curriculum, folder):
    """ Places with new folders for damaged inputs in `folder`, which is made. """
    places = Places(Path(corpora), Path(curriculum), folder / 'work', folder / 'outside')
    places.work.mkdir(parents=True)
    places.outside.mkdir()
    (places.outside / 'private.txt').write_text('not for readers of a damaged input')
    return places


class Hang(BaseException):
    """One input took more than MOST_SECONDS."""


def outcome_of(kind):
    """'refused', 'same' or 'changes allowed'; otherwise what went wrong, with the traceback."""
    try:
        with alarm(MOST_SECONDS, Hang):
            value = kind.use()
    except REFUSALS as e:
        sentence = str(e).strip()
        is_sentence = sentence and '\n' not in sentence and not isinstance(getattr(e, 'code', ''), int)
        return 'refused' if is_sentence else f'no sentence: {e!r}'
    except Hang:
        return f'hang: more than {MOST_SECONDS} s'
    except Exception:
        return f'traceback: {traceback.format_exc()}'
    if value is None:
        return 'changes allowed'
    return 'same' if value == kind.whole else 'silent change'


def contents(folder):
    """{path: (size, time)} of all files in a folder tree."""
    stats = [(p, p.lstat()) for p in sorted(folder.rglob('*'))]
    return {str(p): (s.st_size, s.st_mtime_ns) for p, s in stats}


def check(kind, n, seed, places):
    """
    Damage n inputs of a kind -> (Counter of the outcomes, a list of what went wrong). Input i
    depends on (seed, i) alone.
    """
    outcomes, failures = Counter(), []
    before = contents(places.outside)
    for i in range(n):
        damage = kind.damage(random.Random(f'{seed}-{i}'))
        outcome = outcome_of(kind)
        outcomes[outcome.split(':')[0]] += 1
        if outcome not in ('refused', 'same', 'changes allowed'):
            failures.append(f'{type(kind).__name__}, input {i} of seed {seed}: {damage}: {outcome}')
    if contents(places.outside) != before:
        failures.append(f'{type(kind).__name__}: a file outside the input was written')
    return outcomes, failures


# The kinds, by name
KINDS = CORPUS_KINDS | BOMB_KINDS | RUN_KINDS
# How many inputs of a kind the soak test has, and the suite
LONG = dict(corpus=800, clip=600, source_bomb=100, clip_bomb=100, others=200)
SHORT = dict(corpus=30, clip=30, sweep=30, others=5)
