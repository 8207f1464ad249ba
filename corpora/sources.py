"""
Reads a source into one form: texts, ids, labels and frames of each split. There are two layouts:
the dict of M-SENA, and three lists of clips.
"""
import math
import re
from collections import Counter

from corpora.frames import (
    MAX_WIDTH,
    Frames,
    all_zero,
    column_of,
    is_missing,
    numbers_of,
    type_name,
)
from corpora.lazy import Lazy, LazyArray, Py2Str, Unread
from corpora.names import (
    CLIP_FIELDS,
    FEATURE_FIELDS,
    LISTS_OWN,
    MSENA_FIELDS,
    MSENA_OWN,
    SPLIT_FIELDS,
    SPLITS,
    STREAMS,
    TEXT_FEATURES,
    TEXT_MASKS,
    find_fields,
    key_name,
    printed,
)
from corpora.unpickle import CorpusError, read_pickle

C1_CONTROLS = re.compile('[\x80-\x9f]')


def _decode_bytes(raw, where, encoding):
    """ Text from bytes in the encoding that the user gave, or UTF-8. Raises CorpusError. """
    try:
        if not encoding and b'\0' in raw:  # UTF-16, which is often valid UTF-8 with NUL characters
            raise ValueError
        return raw.decode(encoding or 'utf-8')
    except (UnicodeError, ValueError):
        begin = ascii(raw[:24])
        if encoding:
            raise CorpusError(f"{where} holds bytes that are not {encoding} ({begin}); convert the "
                              "source with the encoding of its texts.") from None
        raise CorpusError(f"{where} holds bytes that are not UTF-8 ({begin}); convert the source "
                          "with python data.py SOURCE and the encoding of its texts, for example "
                          "--encoding=gbk or --encoding=cp1252.") from None


def _repair_controls(text, summary):
    """
    Repairs a text with C1 control characters. No transcript has these; they show that bytes in
    another encoding were decoded as Latin-1. The text is repaired if its bytes are valid UTF-8, or
    if it is mostly ASCII and its control characters are characters of cp1252. Otherwise it may be
    GBK, and is returned unchanged. `summary` counts each case.
    """
    try:
        repaired = text.encode('latin1').decode('utf-8')
        summary.count_text('utf8_read_as_latin1')
        return repaired
    except UnicodeError:
        pass
    n_ascii = sum(c.isascii() for c in text)
    try:
        repaired = C1_CONTROLS.sub(lambda c: c[0].encode('latin1').decode('cp1252'), text)
    except UnicodeError:
        repaired = None
    if repaired is None or n_ascii < 0.5 * len(text):
        summary.count_text('control_characters')
        return text
    summary.count_text('cp1252_read_as_latin1')
    return repaired


def clip_text(x, where, summary, is_id=False):
    """
    A clip's text, or its id, as a str that any tokenizer takes. Raises CorpusError if it is not a
    text.
    """
    if type(x) is LazyArray and math.prod(x.shape):
        x = x.all().ravel().tolist() if x.shape else x.all().item()
    if type(x) in (int, float):
        x = str(int(x) if x == int(x) else x)  # some ids are numbers
    nested = type(x) in (tuple, list) and any(type(part) in (tuple, list) for part in x)
    if is_id and type(x) in (tuple, list) and x and not nested:  # (video, clip)
        x = '$_$'.join(clip_text(part, where, summary, is_id) for part in x)
    if type(x) is Lazy:
        x = x.value()
    if type(x) is Py2Str:
        x = x.encode('latin1')  # back to the bytes, which were read as Latin-1
    if isinstance(x, (bytes, bytearray)):
        x = _decode_bytes(bytes(x), where, summary.encoding)
    if not isinstance(x, str):
        raise CorpusError(f"{where} is a {type_name(x)}, not a text; correct the source.")
    if '\0' in x:
        summary.count_text('control_characters')
    elif C1_CONTROLS.search(x):
        x = _repair_controls(x, summary)
    try:
        x.encode('utf-8')
    except UnicodeEncodeError:  # half a surrogate pair, which would crash a tokenizer
        summary.count_text('half_characters')
        x = x.encode('utf-8', 'replace').decode('utf-8')
    return x


def _texts(column, n, where, summary, ids=None, default=None, is_id=False):
    """
    A column of n texts as a list of str. default(i): the text in place of a missing one; without it
    a missing text is refused. is_id: see clip_text.
    """
    values = column_of(column, n, where)
    summary.spend_text(values, where)
    texts = []
    for i, value in enumerate(values):
        if default and is_missing(value):
            texts.append(default(i))
        else:
            name = f" (clip {printed(ids[i])})" if ids else ''
            texts.append(clip_text(value, f"Entry {i} of {where}{name}", summary, is_id))
    return texts


def _optional_texts(field, column, split, n, where, summary, ids=None):
    """
    A column of n texts as a list of str. A missing text becomes '', a missing id SPLIT_NUMBER.
    """
    def default(i):
        summary.note_default(field, split, i, ids and ids[i])
        return f'{split}_{i}' if field == 'id' else ''

    if type(column) is LazyArray and len(column.shape) == 2 and column.shape[0] == n:
        column = column.all().tolist()  # an id is a row
    return _texts(column, n, where, summary, ids, default, is_id=field != 'text')


def _keys(x):
    """ The keys of a dict, or the type of anything else, for an error message. """
    if type(x) is not dict:
        return f"a {type_name(x)}"
    return ', '.join(map(printed, x))[:300]


def refuse_unread(fields, where):
    """
    Raises CorpusError if a field that is needed holds objects of a type that is not read. where:
    {field: its name in the error message}.
    """
    for field, value in fields.items():
        first = next(iter(value), None) if type(value) in (list, tuple) else value
        if type(first) is Unread:
            raise CorpusError(f"{where[field]} was refused: it names {first.name}, which no array "
                              "or plain container needs; convert it to a NumPy array (a torch "
                              "tensor has .numpy()) and write the pickle again.")


def read_msena(paths, scratch, files, summary):
    """ Reads a pickle of M-SENA or MMSA: {split: {key: N entries}}. Raises CorpusError. """
    path = paths['all']
    tree = read_pickle(files.enter_context(open(path, 'rb')), scratch, skip=True)
    keys = find_fields(tree, SPLIT_FIELDS, {}, f"of {path}") if type(tree) is dict else {}
    if len(keys) < len(SPLITS):
        raise CorpusError(f"{path} holds {_keys(tree)}, and needs the keys train, valid and test; "
                          "for a corpus of three files with lists, give their folder.")
    summary.note_fields(tree, keys, {})
    return {split: _read_msena_split(tree[keys[split]], split, path, summary) for split in SPLITS}


def _read_msena_split(clips, split, path, summary):
    where = f"of the split {split} in {path}"
    found = find_fields(clips, MSENA_FIELDS, MSENA_OWN, where) if type(clips) is dict else {}
    if 'text' not in found or 'label' not in found:
        raise CorpusError(f"The split {split} in {path} holds {_keys(clips)}, and needs raw_text "
                          "and regression_labels; correct the source.")
    has = {field: clips[key] for field, key in found.items()}
    label = {field: f"{printed(key)} {where}" for field, key in found.items()}
    refuse_unread(has, label)
    n = len(column_of(has['text'], None, label['text']))
    s = dict(labels={}, streams={}, aligned_text=_aligned_text(clips, n))
    ids = None
    if 'id' in has:
        ids = s['id'] = _optional_texts('id', has['id'], split, n, label['id'], summary)
    s['text'] = _optional_texts('text', has['text'], split, n, label['text'], summary, ids)
    for field in ('speaker', 'dialogue'):
        if field in has:
            s[field] = _optional_texts(field, has[field], split, n, label[field], summary, ids)
    for field in [f for f in has if f.startswith('label')]:
        s['labels'][field] = numbers_of(
            has[field], n, label[field], optional=True, column_number=summary.label_column)
    s['labels'] = {f: s['labels'][f] for f in sorted(s['labels'], key=list(MSENA_OWN).index)}
    for m in STREAMS:
        if m not in has:
            found.pop(m + '_lengths', None)  # lengths without a stream are not read
        else:
            s['streams'][m] = Frames(has[m], has.get(m + '_lengths'), n, label[m])
    summary.note_fields(clips, found, MSENA_OWN)
    return s


def _aligned_text(clips, n):
    """
    (key, array, is_mask) of the arrays of an M-SENA split that may hold its text with one token per
    frame: BERT's ids, mask and types [N,3,L] (is_mask), or text features [N,L,d].
    """
    arrays = []
    for key, a in clips.items():
        if type(a) is not LazyArray or len(a.shape) != 3:
            continue
        if a.shape[0] == n and a.dtype.kind in 'fiub' and 0 < a.shape[2] <= MAX_WIDTH:
            if key_name(key) in TEXT_MASKS and a.shape[1] == 3:
                arrays.append((key, a, True))
            elif key_name(key) in TEXT_FEATURES:
                arrays.append((key, a, False))
    return arrays


def read_lists(paths, scratch, files, summary):
    """
    Reads three pickles, each a list of clips {label, features: {text, audio, video, audio_len,
    video_len}}. Raises CorpusError.
    """
    splits = {}
    for split, path in paths.items():
        clips = read_pickle(files.enter_context(open(path, 'rb')), scratch, skip=True)
        if type(clips) is not list:
            raise CorpusError(f"{path} holds {_keys(clips)}, not a list of clips; correct the "
                              "source.")
        splits[split] = _read_list(clips, split, path, summary)
    return splits


def _read_list(clips, split, path, summary):
    where, rows = f"of the split {split} in {path}", []
    if len({id(clip) for clip in clips}) < len(clips):
        raise CorpusError(f"The split {split} in {path} holds one clip several times; give each "
                          "clip its own entry.")
    for i, clip in enumerate(clips):
        features = clip.get('features') if type(clip) is dict else None
        if type(features) is dict:
            clip = {k: v for k, v in clip.items() if k != 'features'}
            outer = find_fields(clip, CLIP_FIELDS, LISTS_OWN, f"of clip {i} {where}")
            inner = find_fields(features, FEATURE_FIELDS, LISTS_OWN, f"of clip {i} {where}")
        if type(features) is not dict or 'emotion' not in outer or 'text' not in inner:
            raise CorpusError(f"Clip {i} {where} holds {_keys(clips[i])}, and needs a label, and "
                              "features with a text; correct the source.")
        summary.note_fields(clip, outer, LISTS_OWN)
        summary.note_fields(features, inner, LISTS_OWN)
        own = {field: clip[key] for field, key in outer.items()}
        rows.append(own | {field: features[key] for field, key in inner.items()})
        refuse_unread(rows[-1], {field: f"The {field} of clip {i} {where}" for field in rows[-1]})

    def column(field):
        """ A list with the field of each clip or None, or None if no clip has the field. """
        values = [row.get(field) for row in rows]
        return None if all(is_missing(v) for v in values) else values

    n, s = len(rows), dict(streams={}, aligned_text=[])
    ids = column('id')
    if ids:
        ids = s['id'] = _optional_texts('id', ids, split, n, f"id {where}", summary)
    for m in STREAMS if n else ():
        source = [row.get(m) for row in rows]
        key = LISTS_OWN.get(m, m)
        s['streams'][m] = Frames(source, column(m + '_lengths'), n, f"{key} {where}")
    texts = [row['text'] for row in rows]
    s['text'] = _optional_texts('text', texts, split, n, f"text {where}", summary, ids)
    emotions = [row['emotion'] for row in rows]
    s['labels'] = dict(emotion=_texts(emotions, n, f"label {where}", summary, ids))
    for field in ('speaker', 'dialogue'):
        values = column(field)
        if values:
            s[field] = _optional_texts(field, values, split, n, f"{field} {where}", summary, ids)
    return s


def check_splits(splits, source):
    """
    Adds ids where a split has none, and removes streams that no clip has. Raises CorpusError if a
    split is empty or the splits differ in their labels, streams or widths.
    """
    train = splits['train']
    for split, s in splits.items():
        s.setdefault('id', [f'{split}_{i}' for i in range(len(s['text']))])
        if not s['text']:
            raise CorpusError(f"The split {split} of {source} has no clips; correct the source.")
    for m in STREAMS:
        if all(m not in s['streams'] or s['streams'][m].empty for s in splits.values()):
            for s in splits.values():
                s['streams'].pop(m, None)
    for split, s in splits.items():
        for what in ('labels', 'streams'):
            if set(s[what]) != set(train[what]):
                ours = ', '.join(train[what]) or 'none'
                theirs = ', '.join(s[what]) or 'none'
                raise CorpusError(f"The {what} of {source} are {ours} in train but {theirs} in "
                                  f"{split}; correct the source.")
    for m in train['streams']:
        frames = {split: s['streams'][m] for split, s in splits.items()}
        _check_widths(m, frames, source)
        _drop_shared_zeros(m, splits)
        if any(f.ragged for f in frames.values()):  # a split of one clip cannot show it
            for f in frames.values():
                f.ragged = not f.one and not f.flat


def _check_widths(m, frames, source):
    """
    Gives a split in which no clip has this stream the width of the others. Raises CorpusError if
    the widths of the splits differ.
    """
    first = next(split for split, f in frames.items() if not f.empty)
    for split, f in frames.items():
        if f.empty:
            f.d, f.flat = frames[first].d, frames[first].flat
        if f.d != frames[first].d:
            raise CorpusError(f"The {m} of {source} has {frames[first].d} features in {first} but "
                              f"{f.d} in {split}; correct the source.")


def _drop_shared_zeros(m, splits):
    """
    Removes this stream from clips that share one array if that array is all zero. Raises
    CorpusError for any other shared array: with one array for many clips, a small file could fill
    the disk.
    """
    lists = {split: s['streams'][m] for split, s in splits.items() if not s['streams'][m].one}
    uses = Counter(id(a) for f in lists.values() for a in f.arrays if a is not None)
    is_zero = {}
    for split, f in lists.items():
        seen = {}
        for i, a in enumerate(f.arrays):
            if a is None or uses[id(a)] == 1:
                continue
            if id(a) not in is_zero:
                is_zero[id(a)] = all_zero(a)
            if not is_zero[id(a)] and id(a) in seen:
                ids = splits[split]['id']
                raise CorpusError(f"{f.where} has one array for many clips ({ids[seen[id(a)]]} and "
                                  f"{ids[i]} share it), and it is not all zeros; give each clip "
                                  "its own frames, or None for a clip without frames.")
            seen[id(a)] = i
        for i in [i for i, a in enumerate(f.arrays) if is_zero.get(id(a))]:
            f.drop(i)
