"""
Reads tables: CSV, TSV and JSONL files with one clip a row. A table holds the text and the labels of
a clip, and may name files with its frames (corpora/frame_files.py).

    python data.py mine.csv --split=80/10/10        one table, split by video
    python data.py folder --name=meld               a folder with one table for each split
"""
import math
import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from corpora.frame_files import ENDS, frame_files
from corpora.frames import Frames
from corpora.names import (
    OTHER_NAMES,
    SPLIT_FIELDS,
    SPLITS,
    STREAMS,
    TEXT_NAMES,
    key_name,
    label_names,
    printed,
    stream_names,
    video_of,
)
from corpora.rows import number_of, read_table_rows
from corpora.sources import clip_text
from corpora.splits import ratio_of, split_by_video
from corpora.unpickle import CorpusError

TABLE_ENDS = ('.csv', '.tsv', '.jsonl')
FLAGS = ('text', 'label', 'classes', 'split', 'id', 'video', 'speaker', 'dialogue', 'audio',
         'vision', 'start', 'end')
MISSING = ('', 'nan', 'none', 'null', 'na', 'n/a')   # in lower case, a cell without a value
NO_CLASS = tuple(m for m in MISSING if m != 'none')   # for classes, of which one may be none
SCORE_NAMES = {name: role for role, names in label_names().items() for name in names.split()}
CLASS_NAMES = ('emotion', 'emotions', 'emotion_label', 'annotation', 'annotations')
EMOTION_NAMES = (*CLASS_NAMES[:3], 'label', 'labels')   # of a column of classes: 'emotion' in ours
RESERVED = ('text', *STREAMS, *(m + '_start' for m in STREAMS))   # other files of a split
PART_IDS = ('clip_id', 'clip_ids', 'segment_id', 'utterance_id')   # number a clip in its video
# role -> the names of its column, as key_name writes them; of two names the first one is taken
ROLES = {role: names.split() for role, names in dict(
    text=TEXT_NAMES,
    split='split mode subset partition fold set',
    video='video_id video_ids video_name videoid',
    id=OTHER_NAMES['id'],
    speaker=OTHER_NAMES['speaker'],
    dialogue=OTHER_NAMES['dialogue'],
    start='start_time starttime start begin start_sec start_seconds',
    end='end_time endtime end stop end_sec end_seconds').items()}
STREAM_NAMES = {m: [n + end for n in stream_names()[m].split()
                    for end in ('', '_file', '_path', '_features')] for m in STREAMS}
# video names that no single column has: MELD's episodes
EPISODE = ('season', 'episode')


def table_files(folder):
    """ {split: path} of a folder that has a table for each split, {} if it has no table. """
    tables = [p for p in sorted(Path(folder).iterdir()) if p.suffix.lower() in TABLE_ENDS]
    found = {}
    for path in tables:
        words = {SPLIT_FIELDS[w] for w in re.split('[^a-z]+', path.stem.lower())
                 if w in SPLIT_FIELDS}
        if len(words) == 1:
            found.setdefault(words.pop(), []).append(str(path))
    for split, paths in found.items():
        if len(paths) > 1:
            raise CorpusError(f"{paths[0]} and {paths[1]} both name the split {split}; remove one "
                              "of them.")
    if tables and len(found) < len(SPLITS):
        lacking = ', '.join(s for s in SPLITS if s not in found)
        raise CorpusError(f"{folder} holds tables but none of the split {lacking}; give one table, "
                          "or put the names train, valid and test into the names of three.")
    return {s: found[s][0] for s in SPLITS} if found else {}


def _is_missing(cell, missing=MISSING):
    return cell.strip().lower() in missing


# -------------------------------------------------------------------------------------------------
# Columns

class Table:
    """
    A table, or several tables of the same columns one below the other. Attributes: path, columns,
    rows, places (the file and line of each row), files (the file of each row) and read {column:
    what it was read as}. Raises CorpusError.
    """

    def __init__(self, paths, flags, encoding):
        self.path, self.flags, self.read = ' and '.join(paths), flags, {}
        self.rows, self.places, self.files = [], [], []
        for path in paths:
            columns, rows, lines = read_table_rows(path, encoding)
            if self.rows and set(columns) != set(self.columns):
                other = sorted(set(columns) ^ set(self.columns))
                raise CorpusError(f"{path} and {paths[0]} differ in the columns {', '.join(other)}; "
                                  "correct the tables.")
            self.columns = columns
            self.rows += rows
            self.places += [f"line {n} of {path}" for n in lines]
            self.files += [path] * len(rows)

    def column(self, name, flag):
        """ A column that a flag names, exactly or but for its case. Raises CorpusError. """
        same = [c for c in self.columns if c == name]
        same = same or [c for c in self.columns if key_name(c) == key_name(name)]
        if len(same) != 1:
            has = ', '.join(map(printed, self.columns))
            raise CorpusError(f"{self.path} has no column {name!r} for --{flag}; its columns are "
                              f"{has}.")
        return same[0]

    def find(self, role, names=None):
        """ The column of a role, from its flag or its usual names; None if there is none. """
        if self.flags.get(role):
            found = self.column(self.flags[role], role)
        else:
            found = [c for c in self.columns if key_name(c) in (names or ROLES[role])]
            if role == 'text' and len(found) > 1:
                raise CorpusError(f"The columns {found[0]!r} and {found[1]!r} of {self.path} may "
                                  "both be the text; choose one with python data.py SOURCE "
                                  "--text=COLUMN.")
            found = min(found, key=lambda c: (names or ROLES[role]).index(key_name(c)), default=None)
        if found is not None:
            self.read[found] = role
        return found

    def cells(self, column):
        return [row[column] for row in self.rows]  # [N]

    def texts(self, column, summary):
        return [clip_text(v, f"{column} on {at}", summary)
                for v, at in zip(self.cells(column), self.places)]


def _ids(table, summary, video):
    """ The id of each clip, [N]; None where no column gives one. """
    if table.flags.get('id'):
        columns = [table.column(c, 'id') for c in table.flags['id'].split(',')]
    else:
        found = table.find('id')
        columns = [found] if found else []
        if found and key_name(found) in PART_IDS and video:
            columns = [*video, found]
    table.read = dict.fromkeys(columns, 'id') | table.read
    parts = [table.texts(c, summary) for c in columns]
    ids = ['$_$'.join(row) for row in zip(*parts)] if parts else [''] * len(table.rows)
    return [clip if clip.strip('$_ ') else None for clip in ids]


def _video_columns(table):
    """
    (columns that name the video of a clip, those that number its dialogue): a clip's id is made of
    the latter where there are any.
    """
    video = table.find('video')
    dialogue = table.find('dialogue')
    episode = [c for name in EPISODE for c in table.columns if key_name(c) == name]
    if video is None and len(episode) == len(EPISODE):
        table.read |= dict.fromkeys(episode, 'video')
        return episode, [dialogue] if dialogue else episode
    found = [c for c in (video, dialogue) if c][:1]
    return found, found


def _labels(table, summary):
    """ {name: float64 [N] of a score, or a list of N classes}. Raises CorpusError. """
    score_columns, class_columns = [], []
    for flag, columns in (('label', score_columns), ('classes', class_columns)):
        if table.flags.get(flag):
            columns += [table.column(c, flag) for c in table.flags[flag].split(',')]
    if not score_columns + class_columns:
        free = [c for c in table.columns if c not in table.read]
        score_columns = [c for c in free if key_name(c) in SCORE_NAMES]
        class_columns = [c for c in free if key_name(c) in CLASS_NAMES]
    if not score_columns + class_columns:
        has = ', '.join(map(printed, table.columns))
        raise CorpusError(f"No column of {table.path} is called like a label, and its columns are "
                          f"{has}; name the column with python data.py SOURCE --label=COLUMN, or "
                          "--classes=COLUMN for names or numbers of classes.")
    labels = {}
    for column in score_columns + class_columns:
        cells = table.cells(column)
        there = [c for c in cells if not _is_missing(c)]
        numbers = sum(number_of(c) is not None for c in there)
        are_words = 2 * numbers < len(there)
        are_classes = are_words or column in class_columns
        if all(_is_missing(c, NO_CLASS if are_classes else MISSING) for c in cells):
            summary.notes.append(f"the column {printed(column)} is empty and was not read")
        elif are_classes:
            if column in score_columns:
                _refuse_decimal_commas(table, column, there)
            name = table.read[column] = _label_name(column, True, labels)
            labels[name] = ['' if _is_missing(c, NO_CLASS) else t.strip()
                            for c, t in zip(cells, table.texts(column, summary))]
        else:
            name = table.read[column] = _label_name(column, False, labels)
            labels[name] = _scores(table, column)
    if not labels:
        raise CorpusError(f"The label columns of {table.path} are empty; correct the table.")
    return labels


def _refuse_decimal_commas(table, column, cells):
    commas = [c for c in cells if ',' in c]
    if commas and all(number_of(c.replace(',', '.')) is not None for c in cells):
        raise CorpusError(f"The column {column!r} of {table.path} has scores with decimal commas, "
                          f"such as {printed(commas[0])!r}; write them with points.")


def _label_name(column, classes, labels):
    """ The name of a label in the corpus. labels: those that have a name already. """
    key = key_name(column)
    role = SCORE_NAMES.get(key)
    if classes:
        name = 'emotion' if key in EMOTION_NAMES else key
    else:
        name = role or (key if 'label' in labels else 'label')
    name = re.sub('[^A-Za-z0-9_]', '', name) or 'label'
    while name in labels or name in RESERVED:
        name += '_2'
    return name


def _scores(table, column):
    y = np.full(len(table.rows), math.nan)  # [N]
    for i, cell in enumerate(table.cells(column)):
        value = number_of(cell)
        if value is None and not _is_missing(cell):
            raise CorpusError(f"The score in column {column!r} on {table.places[i]} is "
                              f"{printed(cell)!r}, not a number; correct it, or read the column as "
                              f"classes with python data.py SOURCE --classes={column}.")
        y[i] = math.nan if value is None else value
    return y


def seconds_of(cell):
    """ Seconds from '12.5', '00:01:02,345' or '1:02.5'; NaN if the cell is neither. """
    parts = cell.strip().replace(',', '.').split(':')
    values = [number_of(p) for p in parts]
    if len(parts) > 3 or None in values:
        return math.nan
    return sum(v * 60 ** i for i, v in enumerate(reversed(values)))


def _durations(table, summary):
    """ The seconds of each clip, None where they are unknown; None if there are no such columns. """
    start, end = table.find('start'), table.find('end')
    if not start or not end:
        return None
    seconds = [seconds_of(b) - seconds_of(a) for a, b in zip(table.cells(start), table.cells(end))]
    seconds = [round(s, 3) if math.isfinite(s) and s > 0 else None for s in seconds]
    if n := seconds.count(None):
        summary.notes.append(f"{n} clips have no start and end in order, so their duration is "
                             "unknown")
    return seconds


# -------------------------------------------------------------------------------------------------
# Splits

def _splits_of(table, summary, videos, named, paths):
    """ The split of each row. named: whether the table names the videos. """
    flag = table.flags.get('split')
    shares = ratio_of(flag)
    if 'all' not in paths:
        if flag:
            raise CorpusError("--split is for one table; these are three tables, one a split.")
        split_of = {path: split for split, path in paths.items()}
        return [split_of[f] for f in table.files]
    column = None if shares else table.find('split')
    if shares:
        if not named and len(set(videos)) < len(videos):
            raise CorpusError(f"Ids of {table.path} repeat, and no column names the video of a clip, "
                              f"so --split={flag} could put a video into two splits; name the "
                              "column with --video=COLUMN.")
        if named:
            summary.notes.append(f"split {flag} by a hash of the video")
        else:
            summary.notes.append(f"split {flag} clip by clip, because no column names the video: "
                                 "clips of one video may be in two splits (--video=COLUMN)")
        return split_by_video(videos, shares)
    if not column:
        raise CorpusError(f"{table.path} has no column of splits; name it with python data.py "
                          "SOURCE --split=COLUMN, or split by video with --split=80/10/10.")
    splits = [SPLIT_FIELDS.get(key_name(cell)) for cell in table.cells(column)]
    if None in splits:
        i = splits.index(None)
        raise CorpusError(f"{splits.count(None)} rows are in no split, first {table.places[i]} "
                          f"({column} is {printed(table.cells(column)[i])!r}); a split is train, "
                          "valid or test.")
    return splits


# -------------------------------------------------------------------------------------------------
# The reader

def _streams(table, summary, ids, split_of, base):
    """ {stream: a FrameFile or None for each row}. base: the folder of relative paths. """
    streams = {}
    for m in STREAMS:
        flag = table.flags.get(m)
        if flag and '{' in flag:   # a path with columns in braces
            cells = _paths_of_template(flag, table, m, split_of)
            root, own = '', os.path.dirname(flag.partition('{')[0])   # own: the user typed it
        else:
            column = table.find(m, STREAM_NAMES[m])
            if column is None:
                continue
            cells = table.cells(column)
            if not flag and not any(c.strip().lower().endswith(ENDS) for c in cells):
                del table.read[column]   # such as the paths of .mp4 files
                continue
            root = own = base
        paths = [None if _is_missing(c) else os.path.join(root, c.strip()) for c in cells]
        _refuse_shared_files(m, paths, split_of, table.path)
        streams[m] = frame_files(paths, ids, m, table.path, summary.files.append)
        _note_outside(m, paths, own, summary.notes)
    return streams


def _paths_of_template(template, table, m, split_of):
    """
    The path of each row from one with columns in braces. {split} is the row's split (train, valid
    or test) where no column has this name.
    """
    keys = re.findall(r'\{(.*?)\}', template)
    own = [key for key in keys if key != 'split' or 'split' in map(key_name, table.columns)]
    columns = {key: table.column(key, m) for key in own}
    paths = []
    for row, split in zip(table.rows, split_of):
        values = {'split': split} | {key: row[column] for key, column in columns.items()}
        paths.append(re.sub(r'\{(.*?)\}', lambda key: values[key[1]], template))
    return paths


def _refuse_shared_files(m, paths, split_of, where):
    """
    Raises CorpusError if clips of two splits name one file. MELD numbers its dialogues anew in each
    split, so a path of dialogue and utterance alone names another split's clip.
    """
    first = {}
    for path, split in zip(paths, split_of):
        if path is not None and first.setdefault(path, split) != split:
            raise CorpusError(f"Clips of the splits {first[path]} and {split} of {where} name one "
                              f"file of {m} frames, {ascii(path)[1:-1]}; leave the cell of a clip "
                              "without frames empty, or put the split into the path, as in "
                              f"--{m}=FOLDER/{{split}}/{{id}}.npy.")


def _note_outside(m, paths, folder, notes):
    """ Notes how many files of frames lie outside a folder: a table may name any file. """
    top = os.path.realpath(folder)
    outside = [p for p in paths if p and not Path(os.path.realpath(p)).is_relative_to(top)]
    if outside:
        notes.append(f"{len(outside)} files of {m} frames are not in {ascii(folder or '.')[1:-1]}, "
                     f"first {ascii(outside[0])[1:-1]}")


def read_tables(paths, scratch, files, summary):
    """ Reads one table with a column of splits, or three tables. Raises CorpusError. """
    table = Table(list(paths.values()), summary.table, summary.encoding)
    text = table.find('text')
    if not text:
        has = ', '.join(map(printed, table.columns))
        raise CorpusError(f"No column of {table.path} is called like a text, and its columns are "
                          f"{has}; name it with python data.py SOURCE --text=COLUMN.")
    columns, parts = _video_columns(table)
    ids = _ids(table, summary, parts)
    videos = ['$_$'.join(row) for row in zip(*map(table.cells, columns))] if columns else None
    named = bool(columns) or any(video_of(clip or '') for clip in ids)
    if not videos:
        clips = [clip or str(i) for i, clip in enumerate(ids)]
        videos = [video_of(clip) or clip for clip in clips]
    split_of = _splits_of(table, summary, videos, named, paths)
    numbers = Counter()
    for i, split in enumerate(split_of):
        if ids[i] is None:
            ids[i] = f'{split}_{numbers[split]}'
            summary.note_default('id', split, numbers[split])
        numbers[split] += 1
    twice = [c for c, n in Counter(zip(split_of, ids)).items() if n > 1]
    if twice:
        summary.notes.append(f"{len(twice)} ids name several clips of their split, first "
                             f"{twice[0][1]}: --id=COLUMN,COLUMN makes them of several columns")
    values = dict(id=ids, text=table.texts(text, summary), video=videos)
    for role in ('speaker', 'dialogue'):
        column = table.find(role)
        if column:
            values[role] = table.texts(column, summary)
    if 'dialogue' in values:
        _note_dialogues(values['dialogue'], videos, split_of, summary.notes)
    seconds = _durations(table, summary)
    if seconds:
        values['duration'] = seconds
    labels = _labels(table, summary)
    base = os.path.dirname(table.files[0])
    streams = _streams(table, summary, ids, split_of, base)
    summary.note_fields(dict.fromkeys(table.columns, ''), {}, {})
    for column, role in table.read.items():
        del summary.unread[printed(column)]
        if column != role:
            summary.renamed[printed(column)] = role
    return {s: _one_split(s, split_of, values, labels, streams, table, summary.padding)
            for s in SPLITS}


def _note_dialogues(dialogues, videos, split_of, notes):
    """ Notes dialogues with clips of several videos: their numbers may start again in each. """
    videos_of = defaultdict(set)
    for split, dialogue, video in zip(split_of, dialogues, videos):
        videos_of[split, dialogue].add(video)
    several = [dialogue for (_, dialogue), names in videos_of.items() if len(names) > 1]
    if several:
        notes.append(f"{len(several)} dialogues have clips of several videos, first "
                     f"{printed(several[0])}: if these are several dialogues, give each a name of "
                     "its own")


def _one_split(split, split_of, values, labels, streams, table, padding):
    """ The clips of a split, as check_splits takes them. """
    at = [i for i, s in enumerate(split_of) if s == split]
    if not at:
        raise CorpusError(f"No row of {table.path} is in the split {split}; give each of train, "
                          "valid and test clips, or split by video with python data.py SOURCE "
                          "--split=80/10/10.")
    s = {name: [column[i] for i in at] for name, column in values.items()}
    s['aligned_text'] = []
    s['labels'] = {name: y[at] if isinstance(y, np.ndarray) else [y[i] for i in at]
                   for name, y in labels.items()}
    s['streams'] = {}
    for m, files in streams.items():
        frames = Frames([files[i] for i in at], None, len(at), f"{m} of the split {split} in "
                        f"{table.path}")
        if not padding and not frames.flat:
            frames.ragged = True   # a file ends where its clip ends: zeros at its end are frames
        s['streams'][m] = frames
    return s
