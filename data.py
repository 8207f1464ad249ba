"""
Any corpus -> one folder of memory-mapped arrays -> batches.

    python data.py unaligned_50.pkl --name=mosei    an M-SENA/MMSA pickle: MOSI, MOSEI, CH-SIMS, CH-SIMS v2
    python data.py MELD --dtype=float16             a folder of MELD_train.pkl, MELD_valid.pkl, MELD_test.pkl
    python data.py SOURCE --label_range=-1,1        scores in another range than the one that is guessed
    python data.py SOURCE --padding=right           the padding side, where a file does not show it
    python data.py SOURCE --encoding=gbk            texts as bytes in another encoding than UTF-8
    python data.py --compare A B --lm=NAME          how two corpora's language differs (DeepMLF's Table 9)
    python data.py --subsets A --lm=NAME --n=300    and that of random subsets
    corpus = open_corpus('data/mosei')              and get_batch(corpus, 'train', [3, 1, 4]) from there on

A corpus folder holds meta.json and, per split, text.jsonl, label*.npy or emotion.npy, and for audio and
vision all clips end to end without padding: audio.npy [sum of lengths, d_a], with audio_start.npy [N+1] for
where each clip begins. Training sees nothing else: whatever is odd about a source is settled here, once, and
counted.

Axis letters: N clips of a split, B clips of a batch, T text tokens, S frames, d_a and d_v feature widths;
while converting also n clips of a chunk, L frames of the longest clip, d the width of the stream at hand.
"""
import codecs, hashlib, json, math, os, re, shutil, socket, sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from files import check_regular
from lm import ModelError, frozen_text, refuse_unknown_tokens
from prompts import rated
from unpickle import CorpusError, Lazy, LazyArray, Py2Str, read_pickle, strangers_file

SPLITS, STREAMS = ('train', 'valid', 'test'), ('audio', 'vision')
CHUNK_BYTES = 32 << 20   # of a stream, read at once
MAX_WIDTH = 1 << 16      # features of a frame; the widest known corpus has 2048
SIDE_SAMPLE = 2000       # clips of a stream and split that are read to find the padding side
STEADY_ROWS = 2          # zero rows that all clips may have at an end, for [CLS] and [SEP]
MIXED_SHARE = 0.1        # of the evidence for a padding side may contradict it
N_NAMED = 5              # clips or keys that a message or the summary names
C1_CONTROLS = re.compile('[\x80-\x9f]')
KNOWN_CLASSES = [['neutral', 'surprise', 'fear', 'sadness', 'joy', 'disgust', 'anger'],  # MELD
                 ['愤怒', '厌恶', '恐惧', '高兴', '平静', '悲伤', '惊奇'],                        # CHERMA
                 ['hap', 'sad', 'neu', 'ang', 'exc', 'fru']]                             # IEMOCAP


# ---------------------------------------------------------------------------------------------------------
# Names: which key of a source holds which field

def _name_table(**fields):
    """ {known name: field}, from the known names of each field. """
    return {name: field for field, names in fields.items() for name in names.split()}


def _stream_names():
    """ The known names of the streams and of their lengths, for _name_table. """
    names = dict(
        audio='audio audios acoustic acoustics covarep speech voice '
              'audio_features audio_feature audio_feat acoustic_features',
        vision='vision video videos visual visuals facet facet_4_1 facet_4_2 openface openface_2 '
               'openface_2_0 vision_features video_features visual_features vision_feature '
               'video_feature visual_feature vision_feat video_feat visual_feat')
    lengths = {}
    for m in names:
        ends = ('lengths', 'length', 'lens', 'len')
        lengths[m + '_lengths'] = ' '.join(f'{n}_{end}' for n in names[m].split() for end in ends)
    return names | lengths


def _label_names():
    """ The known names of the scores: CH-SIMS has one of the clip and one of each modality. """
    names = ('regression_labels', 'regression_label', 'labels', 'label', 'sentiment', 'sentiments',
             'scores', 'score')
    ends = ('', '_T', '_A', '_V')
    return {'label' + end: ' '.join(n + end.lower() for n in names) for end in ends}


TEXT_NAMES = ('raw_text raw_texts rawtext text_raw text texts transcript transcripts transcription '
              'utterance utterances sentence sentences')
OTHER_NAMES = dict(
    id='id ids clip_id clip_ids segment_id utterance_id', speaker='speaker speakers speaker_id',
    dialogue='dialogue dialogues dialogue_id dialog dialog_id conversation conversation_id')
MSENA_FIELDS = _name_table(text=TEXT_NAMES, **_stream_names(), **_label_names(), **OTHER_NAMES)
# a clip of a list has two dicts: itself and its features
CLIP_FIELDS = _name_table(emotion='label labels emotion emotions', **OTHER_NAMES)
FEATURE_FIELDS = _name_table(text=TEXT_NAMES, **_stream_names())
SPLIT_FIELDS = _name_table(
    train='train training', valid='valid validation val dev', test='test testing')
# the names that a layout itself has, where they are not the field's
MSENA_OWN = {'text': 'raw_text', 'label': 'regression_labels', 'label_T': 'regression_labels_T',
             'label_A': 'regression_labels_A', 'label_V': 'regression_labels_V'}
LISTS_OWN = {'emotion': 'label', 'vision': 'video', 'audio_lengths': 'audio_len',
             'vision_lengths': 'video_len'}
# arrays with a row a token: BERT's ids, mask and types [N,3,L], or features [N,L,d]
TEXT_MASKS = ('text_bert', 'bert', 'bert_tokens')
TEXT_FEATURES = ('text', 'text_features', 'text_feature', 'text_feat', 'glove', 'language')


def _key_name(key):
    """ A key in the form that the tables of names have. """
    key = key.decode('latin1') if type(key) is bytes else str(key)
    return re.sub('[^a-z0-9]+', '_', key.lower()).strip('_')


def _printed(key):
    """ A key as it is printed, without what could break a line. """
    key = key.decode('latin1') if type(key) is bytes else str(key)
    return ascii(key)[1:-1][:60]


def _holds_text(value):
    """ True for text, and for a list or array whose first entry is text. """
    if type(value) is LazyArray:
        if value.dtype != object:
            return value.dtype.kind in 'US'
        value = value.payload
    if type(value) in (list, tuple):
        value = next((v for v in value if v is not None), None)
    return isinstance(value, (str, bytes, bytearray, Lazy))


def _find_fields(holder, table, own, where):
    """
    {field: key} of the fields of a table of names that a dict holds. Keys with the value None do
    not count. A text must be text, and streams, lengths and scores must not be, so that 'text'
    may be BERT features and 'video' a path. `own` has the layout's own names where the field's is
    not it. Raises CorpusError where two keys would do, but for ids and the like, where the layout's
    own name goes first.
    """
    named = {}
    for key, value in holder.items():
        field = table.get(_key_name(key))
        if field and value is not None:
            named.setdefault(field, []).append(key)
    found = {}
    for field, keys in named.items():
        fits = keys
        if field == 'text':
            fits = [k for k in keys if _holds_text(holder[k])]
        elif field.startswith((*STREAMS, 'label')):
            fits = [k for k in keys if not _holds_text(holder[k])]
        if len(fits) > 1 and field in OTHER_NAMES:   # 'id' beside 'clip_id': the layout's own counts
            fits = [k for k in fits if _printed(k) == own.get(field, field)] or fits
        if len(fits) > 1:
            one, two = map(_printed, fits[:2])
            raise CorpusError(f"The keys '{one}' and '{two}' {where} both name the {field}; remove "
                              "one of them from the source.")
        if not fits:   # the layout's own key stays, so that what it holds is refused by name later
            fits = [k for k in keys if k == own.get(field, field)]
        if fits:
            found[field] = fits[0]
    return found


class Summary:
    """
    What was read under another name, what was not read, and what got a default: for meta.json.
    """
    def __init__(self, encoding=None):
        self.encoding = encoding
        self.renamed, self.unread, self.defaults, self.text = {}, {}, {}, {}

    def note_fields(self, holder, found, own):
        """ Notes the keys that were read under another name, and those that were not read. """
        for field, key in found.items():
            if _printed(key) != own.get(field, field):
                self.renamed[_printed(key)] = field
        for key, value in holder.items():
            if value is None or key in found.values():
                continue
            entry = self.unread.setdefault(_printed(key), dict(shape=_shape(value), count=0))
            entry['count'] += 1

    def note_default(self, field, split, i, name=None):
        entry = self.defaults.setdefault(field, dict(count=0, first=[]))
        entry['count'] += 1
        if len(entry['first']) < N_NAMED:
            entry['first'].append(name or f'entry {i} of {split}')

    def count_text(self, what):
        self.text[what] = self.text.get(what, 0) + 1


def _shape(value):
    """ The shape of an array, [entries] of a list, None for what has no shape. """
    if type(value) is LazyArray:
        return list(value.shape)
    return [len(value)] if type(value) in (list, tuple) else None


# ---------------------------------------------------------------------------------------------------------
# What the two layouts hold, in one form: texts, ids, labels and frames, per split

def _column(column, n, where):
    """ A list or array of n entries (n None: however many) as a list. """
    size = math.prod(column.shape) if type(column) is LazyArray else len(column)
    if n not in (None, size): raise CorpusError(f"{where} has {size} entries for {n} clips; mend the source.")
    return column.all().ravel().tolist() if type(column) is LazyArray else list(column)


def _is_missing(value):
    """ True for None and for NaN, which is pandas' None. """
    return value is None or type(value) is float and math.isnan(value)


def _decode_bytes(raw, where, encoding):
    """ Text from bytes, by the encoding that the user named or else UTF-8. """
    try:
        if not encoding and b'\0' in raw:   # UTF-16, of which much is UTF-8 with NUL characters
            raise ValueError
        return raw.decode(encoding or 'utf-8')
    except (UnicodeError, ValueError):
        begin = ascii(raw[:24])
        if encoding:
            raise CorpusError(f"{where} holds bytes that are not {encoding} ({begin}); convert it "
                              "with the encoding that the texts are in.") from None
        raise CorpusError(f"{where} holds bytes that are not UTF-8 ({begin}); convert it with "
                          "python data.py SOURCE and the encoding that the texts are in, for "
                          "example --encoding=gbk or --encoding=cp1252.") from None


def _repair_controls(text, summary):
    """
    A text with C1 control characters, which no transcript has: they are bytes that someone read
    as Latin-1. Where all of the text is UTF-8 read as Latin-1, or ASCII for the most part with
    characters that cp1252 has, only one reading makes sense and the text is repaired. Else (it
    may be GBK) it stays. All are counted.
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


def _text(x, where, summary):
    """ One clip's text as a str that any tokenizer takes. """
    if type(x) is int: x = str(x)   # some ids
    if type(x) is Lazy: x = x.value()
    if type(x) is Py2Str:
        x = x.encode('latin1')   # its bytes
    if isinstance(x, (bytes, bytearray)):
        x = _decode_bytes(bytes(x), where, summary.encoding)
    if not isinstance(x, str):
        raise CorpusError(f"{where} is a {type(x).__name__} where text belongs; mend the source.")
    if '\0' in x:
        summary.count_text('control_characters')
    elif C1_CONTROLS.search(x):
        x = _repair_controls(x, summary)
    try:
        x.encode('utf-8')
    except UnicodeEncodeError:   # half a surrogate pair, which would crash a tokenizer
        summary.count_text('half_characters')
        x = x.encode('utf-8', 'replace').decode('utf-8')
    return x


def _texts(column, n, where, summary, ids=None):
    """ A column of n texts as a list of str. """
    values = _column(column, n, where)
    names = [f" (clip {i})" for i in ids] if ids else [''] * len(values)
    return [_text(v, f"Entry {i} of {where}{names[i]}", summary) for i, v in enumerate(values)]


def _optional_texts(field, column, split, n, where, summary, ids=None):
    """
    A column of n texts where a missing one gets a default: '' or, for an id, its split and
    number.
    """
    texts = []
    for i, value in enumerate(_column(column, n, where)):
        if _is_missing(value):
            summary.note_default(field, split, i, ids and ids[i])
            texts.append(f'{split}_{i}' if field == 'id' else '')
        else:
            texts.append(_text(value, f"Entry {i} of {where}", summary))
    return texts


def _numbers(column, n, where, optional=False):
    """
    A list or array of n numbers, bare or each in an array or list of one, as float64 [N]; NaN for
    a missing one if they are optional.
    """
    values = _column(column, n, where)
    for i, v in enumerate(values):
        if type(v) is LazyArray and math.prod(v.shape) == 1: v = v.all().item()
        if type(v) is list and len(v) == 1: v = v[0]
        if optional and _is_missing(v):
            v = math.nan
        if type(v) not in (int, float, bool):
            raise CorpusError(f"Entry {i} of {where} is a {type(v).__name__}, not a number; mend the source.")
        values[i] = v
    return np.array(values, np.float64)


def _clip_array(value):
    """ One clip's entry of a list of arrays: None where it holds nothing. """
    if type(value) is LazyArray:
        if value.dtype == object and value.shape == ():
            return _clip_array(value.all().item())
        return value if math.prod(value.shape) else None
    if _is_missing(value) or type(value) in (list, tuple) and not value:
        return None
    return value


def _finite(x, counts=None):
    """ An array as float32, with 0 for all that is not finite, which `counts` counts. """
    with np.errstate(over='ignore', invalid='ignore'):
        x = x.astype(np.float32)   # too big becomes inf
    finite = np.isfinite(x)
    if not finite.all():
        for name, bad in (('nan', np.isnan), ('+inf', np.isposinf), ('-inf', np.isneginf)):
            if counts:
                counts[name] += int(bad(x).sum())
        x[~finite] = 0
    return x


def _all_zero(array):
    """ True if an array is zero but for what is not finite; read in pieces. """
    step = max(1, CHUNK_BYTES // (8 * max(1, math.prod(array.shape[1:]))))
    return not any(_finite(array.rows(i, i + step)).any() for i in range(0, array.shape[0], step))


def _zero_runs(live, size):
    """
    How many frames are zero at the head and at the tail, [n] each, of clips of `size` [n] frames.
    """
    if not live.shape[1]:
        return size, size
    some = live.any(1)                                                                       # [n]
    end = live.shape[1] - live[:, ::-1].argmax(1)   # behind the last frame that is not zero # [n]
    return np.where(some, live.argmax(1), size), np.where(some, size - end, size)


class Frames:
    """
    One stream of one split as the source has it: N clips of at most L frames of d features. From
    one array [N, L, d] or [N, d], or from a list of N arrays [L_i, d] or [d], some of them None.
    n_rows [N] is how many frames the source holds of each clip, 0 for a clip without this stream;
    lengths [N] is what it states, -1 where it does not. Ragged arrays have different n_rows, so
    that those are their lengths.
    """
    def __init__(self, source, lengths, n, where):
        if type(source) is LazyArray and source.dtype == object:
            values = source.all()
            source = (values.ravel() if values.size == n else values).tolist()
        self.one, self.N, self.where, self.scanned = type(source) is LazyArray, n, where, None
        if not self.one and type(source) is not list:
            raise CorpusError(f"{where} is neither an array nor a list of arrays; mend the source.")
        if (source.shape[:1] if self.one else (len(source),)) != (n,):
            raise CorpusError(f"{where} is not for the {n} clips of its split; mend the source.")
        self.arrays = [source] if self.one else [_clip_array(a) for a in source]
        there = [a for a in self.arrays if a is not None]
        if any(type(a) is not LazyArray for a in there):
            raise CorpusError(f"{where} is neither an array nor a list of arrays; mend the source.")
        shapes = [a.shape[1:] if self.one else a.shape for a in there]            # (L,d) or (d,)
        first = shapes[0] if there else (0, 1)
        self.empty, self.flat, self.d = not there, len(first) == 1, first[-1] if first else 0
        numbers = all(a.dtype.kind in 'fiub' for a in there)
        same = all(len(s) == len(first) and s[-1] == self.d for s in shapes)
        if not numbers or len(first) not in (1, 2) or not same or not 0 < self.d <= MAX_WIDTH:
            raise CorpusError(f"{where} is not numbers [clips, frames, features] of one width, 1 "
                              f"to {MAX_WIDTH}; mend the source.")
        if self.one:
            rows = [1 if self.flat else first[0]] * n   # a vector a clip is one frame
        else:
            rows = [0 if a is None else 1 if self.flat else a.shape[0] for a in self.arrays]
        self.n_rows = np.array(rows, np.int64)                                               # [N]
        self.missing = np.zeros(n, bool) if self.one else self.n_rows == 0                   # [N]
        self.ragged = not self.one and not self.flat and len(set(rows) - {0}) > 1
        self.lengths, self.states = np.full(n, -1), False                                    # [N]
        if lengths is not None and not self.flat:
            stated = _numbers(lengths, n, f"The lengths of {where}", optional=True)          # [N]
            ok = (stated >= 0) & (stated <= self.n_rows) & (stated == np.floor(stated))      # [N]
            self.lengths = np.where(ok, stated, -1).astype(np.int64)   # -1: to be repaired
            self.states = not np.isnan(stated).all()
        self.lengths[self.missing] = 0

    @property
    def L(self):
        """ Frames of the longest clip. """
        return int(self.n_rows.max(initial=0))

    @property
    def step(self):
        """ Clips of a chunk, as if of float64, the widest number. """
        return max(1, CHUNK_BYTES // (8 * max(1, self.L) * self.d))

    @property
    def unknown(self):
        """ The clips whose length nobody states, so that their frames must tell, [N]. """
        return (self.lengths < 0) & (not self.flat and not self.ragged)                      # [N]

    def drop(self, i):
        """ Makes clip i one without this stream. """
        self.arrays[i], self.n_rows[i], self.lengths[i], self.missing[i] = None, 0, 0, True

    def rows(self, i, j, counts=None):
        """
        Clips i:j as float32 [n, L, d], with 0 for all that is not finite, which `counts` counts.
        """
        j = min(j, self.N)
        if self.one:
            x = self.arrays[0].rows(i, j).reshape(j - i, self.L, self.d)                # [n,L,d]
            return _finite(x, counts)
        x = np.zeros((j - i, self.L, self.d), np.float32)                               # [n,L,d]
        for k in range(i, j):
            if self.n_rows[k]:
                x[k - i, :self.n_rows[k]] = _finite(self.arrays[k].all(), counts)
        return x

    def edge_zeros(self):
        """
        What the padding side is decided by: numbers of clips [n], and how many of their frames
        are zero at the head and at the tail, [n] each. Of the clips without a stated length, and
        those whose stated length is below what the source holds, it takes all, or SIDE_SAMPLE
        evenly spaced ones where they are more.
        """
        if self.scanned is None:
            open_end = self.unknown | (self.lengths > 0) & (self.lengths < self.n_rows)      # [N]
            at = np.flatnonzero(open_end & ~self.missing)                                    # [n]
            if len(at) > SIDE_SAMPLE:
                at = at[np.linspace(0, len(at) - 1, SIDE_SAMPLE).astype(int)]                # [n]
            head, tail = np.zeros((2, len(at)), np.int64)                                    # [n]
            for i in range(0, self.N, self.step):
                here = np.flatnonzero((at >= i) & (at < i + self.step))
                if 4 * len(here) > self.step:
                    live = self.rows(i, i + self.step).any(-1)[at[here] - i]                 # [n,L]
                elif len(here):
                    live = np.concatenate([self.rows(k, k + 1).any(-1) for k in at[here]])   # [n,L]
                else:
                    continue
                head[here], tail[here] = _zero_runs(live, self.n_rows[at[here]])
            self.scanned = at, head, tail
        return self.scanned

    def own(self, live, i, side, text_lengths=None):
        """
        The frames that are the clips' own, [n, L], for clips i.. whose frames are not zero at
        live [n, L]. An unknown length ends where the zeros on the padding side begin, or where
        the aligned text ends if that is later.
        """
        here = slice(i, i + len(live))
        size, stated, unknown = self.n_rows[here], self.lengths[here], self.unknown[here]    # [n]
        head, tail = _zero_runs(live, size)
        found = size - (head if side == 'left' else tail)                                    # [n]
        if text_lengths is not None:
            found = np.maximum(found, np.minimum(text_lengths[here], size))
        length = np.where(unknown, found, np.where(stated < 0, size, stated))                # [n]
        start = (size - length if side == 'left' else 0 * size)[:, None]                     # [n,1]
        frame = np.arange(live.shape[1])                                                     # [L]
        return (frame >= start) & (frame < start + length[:, None])


def _keys(x):
    """ What a container has instead of what we look for. """
    if type(x) is not dict:
        return f"a {type(x).__name__}"
    return ', '.join(map(_printed, x))[:300]


def _read_msena(path, scratch, files, summary):
    """ The dict pickle of M-SENA / MMSA: {split: {key: N of something}}. """
    tree = read_pickle(files.enter_context(open(path, 'rb')), scratch)
    keys = _find_fields(tree, SPLIT_FIELDS, {}, f"of {path}") if type(tree) is dict else {}
    if len(keys) < len(SPLITS):
        raise CorpusError(f"{path} holds {_keys(tree)}, and needs the keys train, valid and test; a corpus "
                          "of three files with lists is given by its folder.")
    summary.note_fields(tree, keys, {})
    return {split: _read_msena_split(tree[keys[split]], split, path, summary) for split in SPLITS}


def _read_msena_split(clips, split, path, summary):
    where = f"of the split {split} in {path}"
    found = _find_fields(clips, MSENA_FIELDS, MSENA_OWN, where) if type(clips) is dict else {}
    if 'text' not in found or 'label' not in found:
        raise CorpusError(f"The split {split} in {path} holds {_keys(clips)}, and needs raw_text "
                          "and regression_labels.")
    has = {field: clips[key] for field, key in found.items()}
    label = {field: f"{_printed(key)} {where}" for field, key in found.items()}
    n = len(_column(has['text'], None, label['text']))
    s = dict(labels={}, streams={}, aligned_text=_aligned_text(clips, n))
    ids = None
    if 'id' in has:
        ids = s['id'] = _optional_texts('id', has['id'], split, n, label['id'], summary)
    s['text'] = _texts(has['text'], n, label['text'], summary, ids)
    for field in ('speaker', 'dialogue'):
        if field in has:
            s[field] = _optional_texts(field, has[field], split, n, label[field], summary, ids)
    for field in [f for f in has if f.startswith('label')]:
        s['labels'][field] = _numbers(has[field], n, label[field])
    s['labels'] = {f: s['labels'][f] for f in sorted(s['labels'], key=list(MSENA_OWN).index)}
    for m in STREAMS:
        if m not in has:
            found.pop(m + '_lengths', None)   # lengths of nothing are not read
        else:
            s['streams'][m] = Frames(has[m], has.get(m + '_lengths'), n, label[m])
    summary.note_fields(clips, found, MSENA_OWN)
    return s


def _aligned_text(clips, n):
    """
    (key, array, is_mask) of the arrays of an M-SENA split that may hold its text one token a
    frame.
    """
    arrays = []
    for key, a in clips.items():
        if type(a) is not LazyArray or len(a.shape) != 3:
            continue
        if a.shape[0] == n and a.dtype.kind in 'fiub' and 0 < a.shape[2] <= MAX_WIDTH:
            if _key_name(key) in TEXT_MASKS and a.shape[1] == 3:
                arrays.append((key, a, True))
            elif _key_name(key) in TEXT_FEATURES:
                arrays.append((key, a, False))
    return arrays


def _read_lists(paths, scratch, files, summary):
    """
    Three pickles, each a list of {label, features: {text, audio, video, audio_len, video_len}}.
    """
    splits = {}
    for split, path in paths.items():
        clips = read_pickle(files.enter_context(open(path, 'rb')), scratch)
        if type(clips) is not list: raise CorpusError(f"{path} holds {_keys(clips)}, not a list of clips.")
        splits[split] = _read_list(clips, split, path, summary)
    return splits


def _read_list(clips, split, path, summary):
    where, rows = f"of the split {split} in {path}", []
    for i, clip in enumerate(clips):
        features = clip.get('features') if type(clip) is dict else None
        if type(features) is dict:
            clip = {k: v for k, v in clip.items() if k != 'features'}
            outer = _find_fields(clip, CLIP_FIELDS, LISTS_OWN, f"of clip {i} {where}")
            inner = _find_fields(features, FEATURE_FIELDS, LISTS_OWN, f"of clip {i} {where}")
        if type(features) is not dict or 'emotion' not in outer or 'text' not in inner:
            raise CorpusError(f"Clip {i} {where} holds {_keys(clips[i])}, and needs label and "
                              "features with a text in them.")
        summary.note_fields(clip, outer, LISTS_OWN)
        summary.note_fields(features, inner, LISTS_OWN)
        own = {field: clip[key] for field, key in outer.items()}
        rows.append(own | {field: features[key] for field, key in inner.items()})

    def column(field):
        """
        The field of all clips, None where it is missing; and None if it is missing from all.
        """
        values = [row.get(field) for row in rows]
        return None if all(_is_missing(v) for v in values) else values

    n, s = len(rows), dict(streams={}, aligned_text=[])
    ids = column('id')
    if ids:
        ids = s['id'] = _optional_texts('id', ids, split, n, f"id {where}", summary)
    for m in STREAMS if n else ():
        source = [row.get(m) for row in rows]
        key = LISTS_OWN.get(m, m)
        s['streams'][m] = Frames(source, column(m + '_lengths'), n, f"{key} {where}")
    s['text'] = _texts([row['text'] for row in rows], n, f"text {where}", summary, ids)
    emotions = [row['emotion'] for row in rows]
    s['labels'] = dict(emotion=_texts(emotions, n, f"label {where}", summary, ids))
    for field in ('speaker', 'dialogue'):
        values = column(field)
        if values:
            s[field] = _optional_texts(field, values, split, n, f"{field} {where}", summary, ids)
    return s


def _check_splits(splits, source):
    """
    Fills in ids. Raises CorpusError where a split is empty or the splits do not fit each other.
    """
    train = splits['train']
    for split, s in splits.items():
        s.setdefault('id', [f'{split}_{i}' for i in range(len(s['text']))])
        if not s['text']: raise CorpusError(f"The split {split} of {source} has no clips; mend the source.")
    for m in STREAMS:
        if all(m not in s['streams'] or s['streams'][m].empty for s in splits.values()):
            for s in splits.values():
                s['streams'].pop(m, None)
    for split, s in splits.items():
        for what in ('labels', 'streams'):
            if set(s[what]) != set(train[what]):
                raise CorpusError(f"The {what} of {source} are {', '.join(train[what]) or 'none'} in train "
                                  f"but {', '.join(s[what]) or 'none'} in {split}; mend the source.")
    for m in train['streams']:
        frames = {split: s['streams'][m] for split, s in splits.items()}
        _check_widths(m, frames, source)
        _drop_shared_zeros(m, splits)
        if any(f.ragged for f in frames.values()):   # a split of one clip cannot show that it is
            for f in frames.values():
                f.ragged = not f.one and not f.flat


def _check_widths(m, frames, source):
    """
    Gives a split without any clip of this stream the width of the others. Raises CorpusError.
    """
    first = next(split for split, f in frames.items() if not f.empty)
    for split, f in frames.items():
        if f.empty:
            f.d, f.flat = frames[first].d, frames[first].flat
        if f.d != frames[first].d:
            raise CorpusError(f"The {m} of {source} has {frames[first].d} features in {first} but "
                              f"{f.d} in {split}; mend the source.")


def _drop_shared_zeros(m, splits):
    """
    Clips that share one array are clips without this stream if it is all zero. Else it is
    refused: a small file could fill a disk with one array.
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
                is_zero[id(a)] = _all_zero(a)
            if not is_zero[id(a)] and id(a) in seen:
                ids = splits[split]['id']
                raise CorpusError(f"{f.where} has one array for many clips ({ids[seen[id(a)]]} and "
                                  f"{ids[i]} share it), and it is not all zeros; give each clip "
                                  "its own frames, or None where it has none.")
            seen[id(a)] = i
        for i in [i for i, a in enumerate(f.arrays) if is_zero.get(id(a))]:
            f.drop(i)


# ---------------------------------------------------------------------------------------------------------
# The padding side, where zero frames must tell it

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
        return None   # all clips have the same rows of zeros, or none
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
    How many clips show padding at the head and at the tail by their stated lengths: all the
    frames that are left over there are zero, and not those at the other end.
    """
    at, head, tail = frames.edge_zeros()
    over = frames.n_rows[at] - frames.lengths[at]                                            # [n]
    known = frames.lengths[at] >= 0                                                          # [n]
    left, right = head >= over, tail >= over                                                 # [n]
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
            votes = frames.unknown[at] & (head < frames.n_rows[at])                          # [n]
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
    What a source's text says of the lengths of streams that have a frame a token: zero runs at
    the head and at the tail of its mask (or its features), per split. Read in pieces, and only
    when it is asked for.
    """
    def __init__(self, splits):
        self.splits, self.runs = splits, {}

    def _read(self, array, is_mask):
        """ (head [N], tail [N]), or None for a mask that is not 0 and 1. """
        step = max(1, CHUNK_BYTES // (8 * max(1, math.prod(array.shape[1:]))))
        heads, tails = [], []
        for i in range(0, array.shape[0], step):
            rows = array.rows(i, i + step)                                  # [n,3,L] or [n,L,d]
            if is_mask and not np.isin(rows[:, 1], (0, 1)).all():
                return None
            live = rows[:, 1] != 0 if is_mask else _finite(rows).any(-1)                     # [n,L]
            head, tail = _zero_runs(live, np.full(len(live), live.shape[1]))                 # [n]
            heads.append(head)
            tails.append(tail)
        array.close()
        return np.concatenate(heads), np.concatenate(tails)

    def usable(self, m):
        """
        (key, {split: (head [N], tail [N], L)}) of the first text with the frame count of stream
        m, or None. A mask comes first: it is small, and it is meant to tell lengths.
        """
        found = {}
        for split, s in self.splits.items():
            for key, array, is_mask in s['aligned_text']:
                if array.shape[1 + is_mask] == s['streams'][m].L:
                    found.setdefault((not is_mask, _printed(key)), {})[split] = array
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
            some = head < L                                                                  # [N]
            cells.append(('text', split, head[some], tail[some]))
        return _side_of(*_total_excess(cells))

    def lengths(self, m, side):
        """
        Of stream m: the key of the text that states its lengths, the lengths {split: [N]}, and a
        sentence that says why the text is not used, each None if there is none. Text is used that
        is of the same frames. It is of the same frames if its padding is on the same side and in
        at least 95 % of the clips the stream has no frame beyond it.
        """
        key_runs = self.usable(m)
        if not key_runs:
            return None, None, None
        key, runs = key_runs
        if self.side(m) not in (side, None):
            return None, None, f"{key} is not used for lengths: its padding is not {side}"
        lengths, beyond, read = {}, 0, 0
        for split, (head, tail, L) in runs.items():
            lengths[split] = L - (head if side == 'left' else tail)                          # [N]
            frames = self.splits[split]['streams'][m]
            at, *zeros = frames.edge_zeros()
            some = lengths[split][at] > 0                                                    # [n]
            found = frames.n_rows[at] - zeros[0 if side == 'left' else 1]                    # [n]
            beyond += int((found > lengths[split][at])[some].sum())
            read += int(some.sum())
        if not read or beyond > 0.05 * read:
            why = f"{m} goes beyond it in {beyond} of {read} clips"
            return None, None, f"{key} is not used for lengths: {why}"
        return key, lengths, None


def _find_padding(splits, source, padding, summary):
    """
    The padding of each stream, as {stream: dict(side, by, left, right, read, streams, text,
    text_lengths)}.

    `padding` is the user's word and decides. Else stated lengths do, of the stream or of one that
    is aligned with it; else the zero runs of clips without a stated length, of all splits, and of
    all streams together in an aligned source; else the aligned text. Up to SIDE_SAMPLE clips of a
    stream and split are read for it, which is all of them in small corpora. Raises CorpusError
    where the evidence is mixed.
    """
    streams, text = list(splits['train']['streams']), AlignedText(splits)
    stated, together, found = {}, _is_aligned(splits), {}
    for m in streams:
        stated[m] = {split: _stated_votes(s['streams'][m]) for split, s in splits.items()}
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
    votes = list(stated[m].values())   # (left, right) of each split
    if unknown and not any(map(sum, votes)):
        votes = [v for other in group for v in stated[other].values()]
    left, right = map(sum, zip(*votes))
    side = _side_of(left, right)
    if any(sum(v) > 1 and _side_of(*v) not in (side, None) for v in votes):
        side = side and 'mixed'   # one split is padded on the other side
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


# ---------------------------------------------------------------------------------------------------------
# Writing a corpus folder

def _find_source(source):
    """
    (name, layout, {split or 'all': path}) of an M-SENA .pkl, or a folder of NAME_train.pkl etc.
    """
    if os.path.isfile(source): return Path(source).stem, 'msena', {'all': str(source)}
    names = [p.name[:-len('_train.pkl')] for p in sorted(Path(source).glob('*_train.pkl'))]
    if len(names) == 1:
        paths = {s: _split_file(source, names[0], s) for s in SPLITS}
        missing = [p for p in paths.values() if not os.path.isfile(p)]
        if not missing: return names[0], 'lists', paths
        raise CorpusError(f"{missing[0]} is missing; a corpus needs train, valid and test.")
    if not os.path.exists(source): what = "does not exist"
    elif names: what = f"holds several corpora ({', '.join(names)}), and each needs a folder of its own"
    else: what = "holds neither meta.json nor a NAME_train.pkl"
    raise CorpusError(f"The corpus '{source}' {what}; --corpus= takes 'toy', a corpus folder, an M-SENA "
                      ".pkl, or a folder of NAME_train.pkl, NAME_valid.pkl and NAME_test.pkl.")


def _split_file(folder, name, split):
    """ The file of a split, NAME_valid.pkl, or under another name of the split, NAME_dev.pkl. """
    names = [n for n, field in SPLIT_FIELDS.items() if field == split]
    paths = [os.path.join(folder, f'{name}_{n}.pkl') for n in names]
    there = [p for p in paths if os.path.isfile(p)]
    if len(there) > 1:
        raise CorpusError(f"{there[0]} and {there[1]} both name the split {split}; remove one of "
                          "them.")
    return there[0] if there else os.path.join(folder, f'{name}_{split}.pkl')


@contextmanager
def _staging(folder):
    """
    An empty folder to fill. It becomes `folder` in one rename if all went well; else it goes.
    """
    folder, host = Path(os.path.abspath(folder)), socket.gethostname()
    tmp = Path(f'{folder}.tmp-{os.getpid()}@{host}')
    inner = tmp / folder.name   # inside, so that scratch files can lie beside it and are not renamed with it
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in os.listdir(folder.parent):   # what conversions left here that were killed, on this machine
            pid = re.fullmatch(r'.+\.tmp-(\d+)(?:@(.+))?', old)
            if pid and pid[2] in (None, host) and not _alive(int(pid[1])):
                shutil.rmtree(folder.parent / old, ignore_errors=True)
        shutil.rmtree(tmp, ignore_errors=True)
        inner.mkdir(parents=True)
        yield inner
        try: os.rename(inner, folder)
        except OSError:   # another process was first, and its folder is as good as ours
            if not (folder / 'meta.json').is_file(): raise
    except OSError as e:
        where = f': {e.filename}' if e.filename else ''
        raise CorpusError(f"Making {folder} failed ({e.strerror or e}{where}); nothing is left of it.") from e
    finally: shutil.rmtree(tmp, ignore_errors=True)


def _alive(pid):
    try: os.kill(pid, 0)
    except (ProcessLookupError, OverflowError): return False
    except PermissionError: pass
    return True


def _bar(n_bytes):
    """ A function that moves a progress bar by so many bytes, for files that take a while. """
    try: from tqdm import tqdm
    except ImportError: return lambda n: None
    return tqdm(total=n_bytes, unit='B', unit_scale=True, disable=n_bytes < 200e6, mininterval=1).update


def _npy_header(dtype, shape):
    """
    A .npy header of 128 bytes whatever the shape: it is written again when the rows are known.
    """
    text = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    return b'\x93NUMPY\x01\x00' + (118).to_bytes(2, 'little') + text.encode().ljust(117) + b'\n'


class Moments:
    """
    Mean and std of rows that come in pieces. Sums of squares would cancel for features far from
    zero.
    """
    def __init__(self, d): self.n, self.mean, self.m2 = 0, np.zeros(d), np.zeros(d)          # [d]

    def add(self, x):
        if not len(x): return
        mean, n = x.mean(0, dtype=np.float64), self.n + len(x)                               # [d]
        gap = mean - self.mean                                                               # [d]
        self.m2 += ((x - mean) ** 2).sum(0) + gap ** 2 * (self.n * len(x) / n)
        self.mean, self.n = self.mean + gap * (len(x) / n), n

    def std(self):
        std = np.sqrt(self.m2 / max(self.n, 1))                                              # [d]
        # a constant feature has std 0 but for rounding, and dividing by that would make noise of it
        return np.where(std <= 1e-6 * np.abs(self.mean) + 1e-30, 1.0, std)                   # [d]


def _write_stream(name, splits, out, progress, padding):
    """ NAME.npy and NAME_start.npy of all splits, in float32. Returns the entry in meta.json. """
    train, side = splits['train']['streams'][name], padding['side']
    text = padding['text_lengths'] or {}
    moments, padded, empty = Moments(train.d), False, []
    info = dict(width=train.d, longest=0, padding='none', dtype='float32', standardised=False,
                cleaned={'nan': 0, '+inf': 0, '-inf': 0}, clips_empty=0, clips_all_zero=0,
                lengths_repaired=0, clips_missing=0, clips_cut=0, clips_cut_with_zeros=0)
    for split in SPLITS:
        frames, lengths = splits[split]['streams'][name], []
        with open(out / split / f'{name}.npy', 'wb') as f:
            f.write(_npy_header('<f4', (0, frames.d)))
            for i in range(0, frames.N, frames.step):
                x = frames.rows(i, i + frames.step, info['cleaned'])                         # [n,L,d]
                live = x.any(-1)                                                             # [n,L]
                own = frames.own(live, i, side, text.get(split))                             # [n,L]
                lengths.append(own.sum(1))
                if split not in text:
                    _count_cut(frames, i, live, own, info)
                info['clips_all_zero'] += int(((lengths[-1] > 0) & ~(live & own).any(1)).sum())
                x = x[own]                                                                   # [sum lengths,d]
                if split == 'train': moments.add(x)
                f.write(memoryview(x) if x.size else b'')
                progress(own.size * frames.d * 4)
            lengths = np.concatenate(lengths)                                                # [N]
            start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)               # [N+1]
            f.seek(0)
            f.write(_npy_header('<f4', (int(start[-1]), frames.d)))
        np.save(out / split / f'{name}_start.npy', start)
        if frames.states:
            info['lengths_repaired'] += int(((frames.lengths < 0) & ~frames.missing).sum())
        info['longest'] = max(info['longest'], int(lengths.max()))
        info['clips_empty'] += int((lengths == 0).sum())
        info['clips_missing'] += int(frames.missing.sum())
        ids = splits[split]['id']
        empty += [f"{ids[i]} ({split})" for i in np.flatnonzero(lengths == 0)[:N_NAMED]]
        padded |= bool((lengths < frames.n_rows).any())
        for a in frames.arrays:
            if a is not None:
                a.close()
    if padded:
        info['padding'] = side
    if padded or padding['by'] == '--padding':
        info['padding_found'] = {k: padding[k] for k in ('by', 'left', 'right', 'read', 'streams')}
    for key in ('text', 'text_not_used'):
        if padding[key]:
            info['aligned_' + key] = padding[key]
    if empty:
        info['empty_ids'] = empty[:N_NAMED]
    return info | dict(mean=moments.mean.tolist(), std=moments.std().tolist())


def _count_cut(frames, i, live, own, info):
    """
    Counts the clips whose length was found by cutting zero frames, with nothing else to state it:
    each of them may end in true zero frames and be too short. Those with zero frames among what
    is kept are counted too, as in them zero frames are not padding alone.
    """
    here = slice(i, i + len(live))
    cut = frames.unknown[here] & (own.sum(1) < frames.n_rows[here])                          # [n]
    info['clips_cut'] += int(cut.sum())
    info['clips_cut_with_zeros'] += int((cut & (~live & own).any(1)).sum())


def _halve(name, info, out):
    """ Rewrites a stream, standardised, in float16. Raises CorpusError if that overflows. """
    mean, std, d, worst = np.float32(info['mean']), np.float32(info['std']), info['width'], 0.0
    for split in SPLITS:
        path = out / split / f'{name}.npy'
        half = path.with_suffix('.half')
        with open(path, 'rb') as old, open(half, 'wb') as new:
            old.seek(128)
            new.write(_npy_header('<f2', ((path.stat().st_size - 128) // (4 * d), d)))
            while len(x := np.fromfile(old, '<f4', max(1, CHUNK_BYTES // (4 * d)) * d)):     # [n*d]
                x = (x.reshape(-1, d) - mean) / std                                          # [n,d]
                worst = max(worst, float(np.abs(x).max()))
                with np.errstate(over='ignore'): new.write(x.astype('<f2').tobytes())
        os.replace(half, path)
    if not worst <= 65504:
        raise CorpusError(f"The {name} stream reaches {worst:.6g} once standardised, and float16 ends at "
                          "65504; convert with --dtype=float32.")
    return info | dict(dtype='float16', standardised=True)


def _write_labels(splits, out, label_range):
    """
    label*.npy float32 [N] or emotion.npy int64 [N] of all splits. Returns meta.json's entry
    `labels`.
    """
    entries, train = {}, splits['train']['labels']
    for name in train:
        if name == 'emotion':
            seen = sorted(set(train[name]))
            # the classes that train has; a known map gives their order alone
            known = next((known for known in KNOWN_CLASSES if set(seen) <= set(known)), seen)
            names = [c for c in known if c in seen]
            entries[name] = dict(kind='classes', names=names)
        else:
            top = max(np.abs(s['labels'][name]).max() for s in splits.values())
            low, high = label_range or ((-1, 1) if top <= 1 or 'label_T' in train else (-3, 3))
            entries[name] = dict(kind='regression', range=[low, high])
        for split, s in splits.items():
            y = s['labels'][name]                                                            # [N]
            for clip, v in zip(s['id'], y):
                where = f"The {name} of clip {clip} in the split {split} is {v}"
                if name == 'emotion':
                    if v not in names: raise CorpusError(f"{where}; train has only {', '.join(names)}.")
                elif not math.isfinite(v): raise CorpusError(f"{where}; mend the source or drop the clip.")
                elif not low <= v <= high:
                    raise CorpusError(f"{where}, outside [{low}, {high}]; if it is right, convert the file with "
                                      "python data.py SOURCE --label_range=LOW,HIGH.")
            y = np.array([names.index(v) for v in y]) if name == 'emotion' else np.float32(y)   # [N]
            np.save(out / split / f'{name}.npy', y)
    return entries


def _write_texts(splits, out):
    """ text.jsonl of all splits. Returns meta.json's entry `text`. """
    for split, s in splits.items():
        keys = [k for k in ('id', 'text', 'speaker', 'dialogue') if k in s]
        with open(out / split / 'text.jsonl', 'w', encoding='utf-8', newline='\n') as f:
            for row in zip(*(s[k] for k in keys)):
                f.write(json.dumps(dict(zip(keys, row)), ensure_ascii=False) + '\n')
    train = ''.join(splits['train']['text'])
    upper, lower = sum(c.isupper() for c in train), sum(c.islower() for c in train)
    return dict(empty=sum(not t.strip() for s in splits.values() for t in s['text']),
                upper_case=upper > 0.95 * (upper + lower))


def convert(source, folder, dtype='float32', label_range=None, padding=None, encoding=None):
    """
    Writes the corpus folder `folder` from `source`: an M-SENA .pkl, or a folder of
    NAME_train.pkl, NAME_valid.pkl and NAME_test.pkl. Streams are cut to their lengths, and nan
    and inf become 0; float16 also standardises them, by the mean and std of train. label_range is
    (low, high); None takes [-1, 1] or [-3, 3], whichever holds all labels, and [-1, 1] for
    CH-SIMS. padding is 'left' or 'right', where the zero frames are padding; None finds it
    (_find_padding). encoding is a Python codec for texts that come as bytes or as Python 2
    strings; None takes UTF-8. Returns meta.json's dict. Raises CorpusError and then leaves
    nothing behind. Memory is some copies of one 32 MiB chunk plus texts and labels, whatever the
    file's size (and one array, if in Fortran order).
    """
    if dtype not in ('float32', 'float16'): raise CorpusError(f"dtype is float32 or float16, not {dtype!r}.")
    if label_range and not label_range[0] < label_range[1]:
        raise CorpusError(f"The label range is LOW,HIGH with LOW < HIGH, not {label_range}.")
    if padding not in (None, 'left', 'right'):
        raise CorpusError(f"--padding is left or right, not {padding!r}.")
    _check_encoding(encoding)
    _, layout, paths = _find_source(source)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise CorpusError(f"{folder} exists already; remove it, or give another --name.")
    with _staging(folder) as out, ExitStack() as files, strangers_file(source):
        summary = Summary(encoding)
        if layout == 'msena':
            splits = _read_msena(paths['all'], out.parent, files, summary)
        else:
            splits = _read_lists(paths, out.parent, files, summary)
        _check_splits(splits, source)
        for split in SPLITS: (out / split).mkdir()
        labels, text = _write_labels(splits, out, label_range), _write_texts(splits, out)
        found = _find_padding(splits, source, padding, summary)
        frames = [f for s in splits.values() for f in s['streams'].values()]
        stats, sha = [os.stat(p) for p in paths.values()], hashlib.sha256()
        n_bytes = sum(s.st_size for s in stats)
        progress = _bar(n_bytes + sum(4 * f.N * f.L * f.d for f in frames))
        streams = {m: _write_stream(m, splits, out, progress, found[m]) for m in found}
        if dtype == 'float16': streams = {m: _halve(m, info, out) for m, info in streams.items()}
        for path in paths.values():
            with open(path, 'rb') as f:
                while piece := f.read(4 << 20): sha.update(piece); progress(len(piece))
        place = Path(os.path.abspath(source))
        meta = dict(format=1, name=out.name,
                    source=dict(file=place.name, path=str(place), bytes=n_bytes, sha256=sha.hexdigest(),
                                mtime_ns=max(s.st_mtime_ns for s in stats), layout=layout),
                    clips={k: len(s['text']) for k, s in splits.items()},
                    labels=labels, streams=streams, text=text | summary.text,
                    renamed=summary.renamed, unread=summary.unread, defaults=summary.defaults)
        if encoding:
            meta['text']['encoding'] = encoding
        (out / 'meta.json').write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding='utf-8')
    return meta


def _check_encoding(encoding):
    """ Raises CorpusError for an encoding that is no Python codec of text. """
    if encoding is None:
        return
    try:
        codecs.lookup(encoding)
        b'a'.decode(encoding)   # a codec such as hex is none of text
    except (LookupError, ValueError) as e:
        if isinstance(e, UnicodeDecodeError):
            return   # utf-16 has no text of one byte
        raise CorpusError(f"--encoding={ascii(encoding)[1:-1]} is no text encoding that Python "
                          "knows; give one such as utf-8, gbk, cp1252 or shift_jis.") from None


def describe(meta):
    """
    What a corpus is and what was done to it, as a small table: what was read under which name,
    what was not read, and what was guessed by which evidence. A meta.json of an earlier version
    says less.
    """
    rows = [('source', f"{meta['source']['file']}, SHA-256 {meta['source']['sha256']}"),
            ('clips', ', '.join(f'{n} {s}' for s, n in meta['clips'].items()))]
    for name, y in meta['labels'].items():
        rows.append((name, f"in {y['range']}" if 'range' in y else f"one of {', '.join(y['names'])}"))
    for m, s in meta['streams'].items():
        cleaned = ', '.join(f'{n} {k}' for k, n in s['cleaned'].items())
        rows += [(m, f"{s['width']} wide, longest {s['longest']}, padding {s['padding']}, {s['dtype']}"),
                 ('', f"{cleaned} set to 0; clips: {s['clips_empty']} empty, {s['clips_all_zero']} all zero, "
                      f"{s['lengths_repaired']} lengths repaired")]
        rows += [('', row) for row in _describe_lengths(s)]
    if not meta['streams']: rows.append(('streams', "neither audio nor vision: a corpus of text alone"))
    rows.append(('text', f"{meta['text']['empty']} empty" + ', in capitals' * meta['text']['upper_case']))
    rows += [('', row) for row in _describe_text(meta['text'])] + _describe_keys(meta)
    return '\n'.join([f"corpus {meta['name']}"] + [f'  {a:8s} {b}' for a, b in rows])


def _describe_lengths(s):
    """ How a stream's padding and lengths were found, of its entry in meta.json. """
    rows, found, side = [], s.get('padding_found'), s['padding']
    if found:
        if found['by'] == '--padding':
            why = "given by --padding"
        elif found['by'] == 'none':
            why = "assumed, as no clip shows it"
        else:
            why = f"found by {found['by']}"
        apart = f", {' and '.join(found['streams'])} counted apart" * (len(found['streams']) > 1)
        rows.append(f"padding side {why}: {found['right']} clips show right and {found['left']} "
                    f"show left, of {found['read']} read{apart}")
    if s.get('aligned_text'):
        rows.append(f"lengths go at least as far as {s['aligned_text']}")
    if s.get('aligned_text_not_used'):
        rows.append(s['aligned_text_not_used'])
    if s.get('clips_cut'):
        end = 'tail' if side == 'right' else 'head'
        rows.append(f"lengths of {s['clips_cut']} clips were found by cutting zero frames at the "
                    f"{end}, so at most these may be too short; "
                    f"{s['clips_cut_with_zeros']} of them have zero frames elsewhere too")
    if s.get('empty_ids'):
        more = ', ..' * (s['clips_empty'] > len(s['empty_ids']))
        rows.append(f"empty clips: {', '.join(s['empty_ids'])}{more}; {s['clips_missing']} of "
                    f"{s['clips_empty']} are without this stream in the source")
    return rows


def _describe_text(text):
    """ What was repaired in texts, or looks wrong in them, of meta.json's entry `text`. """
    what = dict(
        cp1252_read_as_latin1="with cp1252 read as Latin-1 (C1 control characters), repaired",
        utf8_read_as_latin1="with UTF-8 read as Latin-1 (C1 control characters), repaired",
        control_characters="with NUL or C1 control characters, left as they are: read in a wrong "
                           "encoding",
        half_characters="with half a surrogate pair, replaced by ?")
    rows = [f"{text[key]} {said}" for key, said in what.items() if text.get(key)]
    if text.get('encoding'):
        rows.append(f"bytes were read as {text['encoding']}")
    return rows


def _describe_keys(meta):
    """ Rows of what was read under another name, got a default, or was not read. """
    rows = [('read', f"'{key}' as {field}") for key, field in meta.get('renamed', {}).items()]
    for field, d in meta.get('defaults', {}).items():
        more = ', ..' * (d['count'] > len(d['first']))
        who = ', '.join(d['first'])
        rows.append((field, f"{d['count']} missing, replaced by a default: {who}{more}"))
    lists = meta['source'].get('layout') == 'lists'
    unread = []
    for key, entry in meta.get('unread', {}).items():
        shape = f" {entry['shape']}" if entry['shape'] is not None else ''
        unread.append(key + shape + (f" in {entry['count']} clips" if lists else ''))
    if unread:
        rows.append(('not read', ', '.join(unread[:50]) + ', ..' * (len(unread) > 50)))
    return rows


# ---------------------------------------------------------------------------------------------------------
# Using a corpus folder

class Corpus:
    """
    A corpus folder, opened: meta, folder, name, widths {stream: d}, n_clips {split: N}. Arrays are mapped on
    first use. Raises CorpusError for a file that is missing, damaged or does not fit the others.
    """
    def __init__(self, folder):
        self.folder, self._opened = str(folder), {}
        with self._sound('meta.json') as path:
            check_regular(path, follow=True)
            self.meta = json.loads(path.read_text(encoding='utf-8'))
            if self.meta['format'] != 1: raise ValueError(f"format {self.meta['format']} is not 1")
            self.name, self.n_clips = self.meta['name'], dict(self.meta['clips'])
            self.widths = {m: s['width'] for m, s in self.meta['streams'].items()}
            self.sha256, self.labels = self.meta['source']['sha256'], dict(self.meta['labels'])

    @contextmanager
    def _sound(self, file):
        try: yield Path(self.folder) / file
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CorpusError(f"{self.folder}/{file} is missing or damaged ({type(e).__name__}: {e}); remove "
                              "the folder and convert the source again.") from e

    def _once(self, split, file, load):
        """ What load(path) makes of a file, the first time and from then on. """
        if (split, file) not in self._opened:
            with self._sound(f'{split}/{file}') as path:
                check_regular(path, follow=True)
                self._opened[split, file] = load(path)
        return self._opened[split, file]

    def _rows(self, split):
        def load(path):
            with open(path, encoding='utf-8') as f: rows = [json.loads(line) for line in f]
            if [r for r in rows if 'id' not in r or 'text' not in r] or len(rows) != self.n_clips[split]:
                raise ValueError(f"not {self.n_clips[split]} clips with id and text")
            return rows
        return self._once(split, 'text.jsonl', load)

    def text(self, split): return [r['text'] for r in self._rows(split)]

    def id(self, split): return [r['id'] for r in self._rows(split)]

    def label(self, split, name='label'):
        """ [N] float32, or int64 for classes. """
        if name not in self.labels:
            has = ', '.join(self.labels)
            raise CorpusError(f"The corpus {self.name} has no label {name!r}, only {has}.")
        kind, shape = 'i' if self.labels[name]['kind'] == 'classes' else 'f', (self.n_clips[split],)
        return self._once(split, f'{name}.npy', lambda path: np.array(_load(path, shape, kind)))   # [N]

    def _start(self, split, stream):
        def load(path):
            start = np.array(_load(path, (self.n_clips[split] + 1,), 'i'))                   # [N+1]
            if start[0] != 0 or (np.diff(start) < 0).any(): raise ValueError("clips out of order")
            return start
        return self._once(split, f'{stream}_start.npy', load)

    def lengths(self, split, stream): return np.diff(self._start(split, stream))             # [N]

    def frames(self, split, stream, i):
        """ Clip i as a slice of the map, [S, d]. """
        start, width = self._start(split, stream), self.widths[stream]
        x = self._once(split, f'{stream}.npy', lambda path: _load(path, (start[-1], width), 'f'))
        return x[start[i]:start[i + 1]]                                                      # [S,d]


def _load(path, shape, kind):
    a = np.load(path, mmap_mode='r')
    if a.shape != shape or a.dtype.kind != kind: raise ValueError(f"it holds {a.dtype} {a.shape}")
    return a


def open_corpus(source, where='data'):
    """
    The Corpus of 'toy', of a corpus folder, or of a source that convert takes. The toy corpus is made and a
    source converted on first use, into a folder under `where`. Raises CorpusError.
    """
    if source == 'toy':
        from toy import VERSION, make_toy   # which converts, so it cannot come first
        folder = Path(where) / 'toy'
        if not (folder / 'meta.json').is_file():
            print(f"making the toy corpus in {folder} ...")
            with _staging(folder) as out: make_toy(str(out))
        corpus = Corpus(folder)
        if corpus.meta.get('toy') != VERSION:
            raise CorpusError(f"{folder} was made by another version of toy.py; remove it, and it is made again.")
        return corpus
    if os.path.isfile(os.path.join(source, 'meta.json')): return Corpus(source)
    folder = Path(where) / _folder_name(source)
    if not (folder / 'meta.json').is_file():
        print(f"converting {source} into {folder} ...")
        try:
            print(describe(convert(source, folder)))
        except CorpusError:
            if not (folder / 'meta.json').is_file():   # else another process has just made it
                raise
    return Corpus(folder)


def _folder_name(source):
    """ NAME-1a2b3c by place, size and time: MOSI's and MOSEI's files share a name; hashing is slow. """
    name, _, paths = _find_source(source)
    stats = [os.stat(p) for p in paths.values()]
    key = f'{os.path.abspath(source)}:{sum(s.st_size for s in stats)}:{max(s.st_mtime_ns for s in stats)}'
    return f'{name}-{hashlib.sha256(key.encode()).hexdigest()[:6]}'


def lower_if_shouting(texts, corpus):
    """ The texts, in lower case if train is all capitals (CMU-MOSI): a cased tokenizer would shred those. """
    return [t.lower() for t in texts] if corpus.meta['text']['upper_case'] else list(texts)


def texts_for(corpus, split, c):
    """ A split's texts as a run of knobs `c` reads them: with ratings behind (lm_text='rated'), in lower case if they shout. """
    texts = rated(corpus, split) if c['system'] == 'lm' and c['lm_text'] == 'rated' else corpus.text(split)
    return lower_if_shouting(texts, corpus) if c['lowercase'] == 'auto' else texts


def epoch_order(cost, batch_size, seed, epoch):
    """
    An epoch's batches, as a list of int64 arrays of clip numbers; each clip is in one. Clips of like cost [N]
    meet: shuffled, cut into groups of 50 batches, each group sorted by cost and cut, and the batches
    shuffled. epoch None is for evaluation: sorted by cost. It depends on its arguments alone, so a resumed
    run needs only its step.
    """
    cost = np.asarray(cost)
    if epoch is None: groups = [np.argsort(cost, kind='stable')]
    else:
        rng = np.random.default_rng([seed, epoch])
        order, size = rng.permutation(len(cost)), 50 * batch_size                            # [N]
        groups = [order[i:i + size] for i in range(0, len(cost), size)]
        groups = [g[np.argsort(cost[g], kind='stable')] for g in groups]
    batches = [g[i:i + batch_size].astype(np.int64) for g in groups for i in range(0, len(g), batch_size)]
    return batches if epoch is None else [batches[i] for i in rng.permutation(len(batches))]


def get_batch(corpus, split, index, tokens=None, pad_id=0, standardise=True, label='label',
              modalities=STREAMS, stream_index=None):
    """
    Clips `index` of a split as a dict of CPU tensors, padded on the right, masks True where there is
    something: index [B], label [B] (float32, or int64 for classes); given `tokens`, a list of ids for each
    clip of the split, tokens [B,T], text_len [B], text_mask [B,T] and targets [n], the flat positions in
    tokens that have a next token to predict; and for each stream m of the corpus m
    [B,S,d], m_len [B], m_mask [B,S], standardised by train's mean and std. A stream not in `modalities` has
    all lengths 0. stream_index: whose streams they are, where not their own. Raises CorpusError.
    """
    if unknown := set(modalities) - set(STREAMS):
        raise CorpusError(f"The modalities are audio and vision, not {', '.join(map(str, unknown))}.")
    index = np.array(index, np.int64)                                                        # [B]
    batch = dict(index=torch.from_numpy(index), label=torch.from_numpy(corpus.label(split, label)[index]))
    if tokens is not None:
        length = torch.tensor([len(tokens[i]) for i in index])                               # [B]
        mask = torch.arange(max(1, int(length.max()))) < length[:, None]                     # [B,T]
        ids = torch.full(mask.shape, pad_id)                                                 # [B,T]
        ids[mask] = torch.tensor([t for i in index for t in tokens[i]], dtype=torch.long)
        # flat positions whose next token is one to predict: found here, where asking how many stalls no GPU
        targets = torch.arange(mask.numel()).view(mask.shape)[:, :-1][mask[:, 1:]]           # [n]
        batch |= dict(tokens=ids, text_len=length, text_mask=mask, targets=targets)
    for m, d in corpus.widths.items():
        info = corpus.meta['streams'][m]
        if info['standardised'] and not standardise:
            raise CorpusError(f"{corpus.folder} holds {m} standardised; convert with --dtype=float32.")
        whose = index if stream_index is None else stream_index                              # [B]
        x = [corpus.frames(split, m, i)[:None if m in modalities else 0] for i in whose]     # B of [S_b,d]
        length = np.array([len(clip) for clip in x])                                         # [B]
        mask = np.arange(max(1, length.max())) < length[:, None]                             # [B,S]
        out = np.zeros((*mask.shape, d), np.float32)                                         # [B,S,d]
        out[mask] = np.concatenate(x)
        if standardise and not info['standardised']:
            out = (out - np.float32(info['mean'])) / np.float32(info['std']) * mask[..., None]
        batch |= {k: torch.from_numpy(v) for k, v in ((m, out), (m + '_len', length), (m + '_mask', mask))}
    return batch


@contextmanager
def cut_at_end(tokenizer):
    """ Texts that are too long lose their end in here, also by a tokenizer whose own habit is to
    cut the beginning. """
    own = getattr(tokenizer, 'truncation_side', None)   # None: not one of Hugging Face's
    if own is not None:
        tokenizer.truncation_side = 'right'
    try:
        yield
    finally:
        if own is not None:
            tokenizer.truncation_side = own


def tokenize(tokenizer, texts, max_len, special=True):
    """
    Texts -> lists of at most max_len token ids, with the special tokens that the tokenizer adds by itself (none for
    GPT-2 and SmolLM2, [CLS] .. [SEP] for Chinese GPT-2, <s> for Llama), as in the release; special=False for a text
    inside a prompt. A text of no token at all becomes one end-of-text token, or the clip would have no last token to
    read. Returns lists, n_empty, n_cut. Raises ModelError where max_len has no room for the special
    tokens.
    """
    ids = tokenizer(list(texts), add_special_tokens=special)['input_ids']
    long = [i for i, t in enumerate(ids) if len(t) > max_len]
    if long:   # cut by the tokenizer itself, which keeps a [SEP] at the end: the text head reads the last token
        with cut_at_end(tokenizer):
            cut = tokenizer([texts[i] for i in long], add_special_tokens=special, truncation=True,
                            max_length=max_len)
        for i, t in zip(long, cut['input_ids']): ids[i] = t
        longest = max(map(len, cut['input_ids']))
        if longest > max_len:   # without room for the special tokens, transformers cuts nothing
            raise ModelError(f"max_text_len={max_len} has no room for the special tokens of this "
                             f"tokenizer, which makes {longest} tokens of a text: raise it.")
    known = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    filler = next((t for t in known if t is not None and t >= 0), 0)
    return [list(t) or [filler] for t in ids], sum(not t for t in ids), len(long)


class Feed:
    """
    A corpus as one system reads it: text tokenised once, batches on a device, and what each clip costs (to put clips of
    like length into one batch). `c` is the run's knobs; tokenizer None means that the system reads no text. `prompt` (a
    Prompt) stands around each text, with room for the pseudo tokens. Attributes for the others: info (the label's entry
    in meta.json), n_clips (train's after train_fraction), notes. Where text_features='frozen', text is hidden states too,
    [B,T,D] in batch['text']; as_data as in lm_config. Raises CorpusError, and ModelError where that
    LM cannot be had or has no embedding for a token.
    """
    def __init__(self, corpus, c, tokenizer, device, prompt=None, as_data=False):
        self.corpus, self.c, self.device, self.prompt, self.tokens, self.notes = corpus, c, device, prompt, {}, []
        corpus.label('train', c['label'])
        self.info = corpus.labels[c['label']]
        if self.info['kind'] != 'regression' and not prompt:
            raise CorpusError(f"The label {c['label']!r} is one of classes, and {c['system']} is a system for "
                              "regression.")
        for split in corpus.n_clips: self._check_labels(split)
        self.streams = c['modalities'] if c['system'] != 'lm' else ()
        self.words, self.text, self.lm_fingerprint = {}, {}, None
        self.clips = {split: np.arange(n) for split, n in corpus.n_clips.items()}            # feed's number -> corpus's
        if c['train_fraction'] < 1: self.clips['train'] = self._few(c['train_fraction'], c['seed'])
        self.n_clips = {split: len(clips) for split, clips in self.clips.items()}
        # a ring through the clips in random order: each gets the streams of the next, and nobody its own
        self.streams_of = {}
        for split, n in corpus.n_clips.items() if c['shuffle_streams'] else ():
            ring = np.random.default_rng([c['seed'], 2]).permutation(n)                      # [N]
            self.streams_of[split] = np.empty(n, np.int64)
            self.streams_of[split][ring] = np.roll(ring, 1)
        rounding = self._answer_lengths() if prompt else 0.0
        if rounding > 1e-6: self.notes.append(f"labels are said with one decimal, which costs an MAE of {rounding:.3f}")
        for split in corpus.n_clips if tokenizer else ():
            texts = texts_for(corpus, split, c)
            tokens, n_empty, n_cut = tokenize(tokenizer, texts, c['max_text_len'], special=not prompt)
            rows = getattr(tokenizer, 'embedding_rows', None)   # None: the LM is not loaded here
            refuse_unknown_tokens(tokens, rows, f"the texts of the split {split!r}")
            mean = np.mean([len(t) for t in tokens])
            self.notes.append(f"{split} text: {mean:.1f} tokens a clip, {n_empty} empty, {n_cut} cut at "
                              f"{c['max_text_len']}")
            if prompt:
                before, after = prompt.before + [0] * c['n_pseudo'], prompt.after
                tokens = [before + own + after for own in tokens]
            self.tokens[split] = tokens
            if c['system'] in ('crosssent', 'mag') and c['resample'] == 'words': self.words[split] = self._words(tokenizer, split, texts)
        if c['text_features'] == 'frozen' and tokenizer:
            tokens = [t for split in self.tokens for t in self.tokens[split]]
            folder = os.path.join(c['data_dir'], 'features')
            hidden, self.lm_fingerprint = frozen_text(
                c['lm'], tokens, folder, c['trust_remote_code'], device, as_data=as_data)
            clips = iter(np.split(hidden, np.cumsum([len(t) for t in tokens])[:-1]))         # of [T_n,D], views of the map
            self.text = {split: [next(clips) for _ in self.tokens[split]] for split in self.tokens}
        if c['system'] == 'mag':
            for s in self.streams:
                if s in corpus.widths: self.notes.append(f"{s}: a median of {np.median(corpus.lengths('train', s)):.0f} frames a clip, "
                                                         f"brought to the text's tokens (resample={c['resample']!r})")

    def _words(self, tokenizer, split, texts):
        """ For each clip, which word (between spaces) each of its tokens begins in; -1 for special ones. """
        for s in self.streams if split == 'train' else ():
            n_frames, n_words = self.corpus.lengths(split, s), np.array([len(t.split()) for t in texts])     # [N]
            both = (n_frames > 0) & (n_words > 0)                                            # [N]
            if both.any() and np.mean((n_frames == n_words)[both]) < 0.5:
                raise CorpusError(f"resample='words' is for sources with one frame a word, and {s} has {np.median(n_frames):.0f} frames "
                                  f"for {np.median(n_words):.0f} words (medians): take another resample.")
        try:
            with cut_at_end(tokenizer):
                offsets = tokenizer(list(texts), truncation=True, max_length=self.c['max_text_len'],
                                    return_offsets_mapping=True)['offset_mapping']
        except (TypeError, ValueError, NotImplementedError, KeyError):
            raise CorpusError("resample='words' needs a fast Hugging Face tokenizer (tokenizer.json), which knows where in the text "
                              "a token is: take another resample.") from None
        def words(text, spans):
            starts = [not ch.isspace() and (i == 0 or text[i - 1].isspace()) for i, ch in enumerate(text)]
            number = np.cumsum(starts) - 1                                                   # of the word at each letter
            letter = [next((i for i in range(a, b) if not text[i].isspace()), None) for a, b in spans]
            return [-1 if i is None else int(number[i]) for i in letter]
        return [words(text, spans) for text, spans in zip(texts, offsets)]

    def _check_labels(self, split):
        y, name = self.corpus.label(split, self.c['label']), self.c['label']                 # [N]
        classes = self.info['kind'] == 'classes'
        low, high = (0, len(self.info['names']) - 1) if classes else self.info['range']
        if bad := np.flatnonzero(~((y >= low) & (y <= high))).tolist():
            raise CorpusError(f"The {name} of clip {self.corpus.id(split)[bad[0]]} in the split {split} is {y[bad[0]]}, outside "
                              f"[{low}, {high}] ({len(bad)} such clips); mend the source and convert it again.")

    def _few(self, fraction, seed):
        """ A share of the train split, of each class or whole number of the label alike, at least one clip of each. """
        y, rng = np.round(self.corpus.label('train', self.c['label'])), np.random.default_rng([seed, 1])     # [N]
        groups = [rng.permutation(np.flatnonzero(y == v)) for v in np.unique(y)]
        return np.sort(np.concatenate([g[:max(1, round(fraction * len(g)))] for g in groups]))

    def _answer_lengths(self):
        """ Finds how many tokens each train clip's label is said in; returns what rounding to a label costs (MAE). """
        y = torch.from_numpy(self.corpus.label('train', self.c['label']))                    # [N]
        k = self.prompt.index(y)                                                             # [N]
        self.answer_len = np.array([len(ids) for ids in self.prompt.answers])[k.numpy()]     # [N]
        return 0.0 if self.prompt.values is None else float((torch.tensor(self.prompt.values)[k] - y).abs().mean())

    def __call__(self, split, index):
        """ Clips `index` of a split, on the device. Pads with token 0: nothing ever looks at padding. """
        index = self.clips[split][index]                                                     # [B]
        batch = get_batch(self.corpus, split, index, self.tokens.get(split), 0, self.c['standardise'], self.c['label'],
                          self.streams, self.streams_of[split][index] if self.streams_of else None)
        if self.words:
            own = [self.words[split][i] for i in index]
            batch['word'] = torch.tensor([w + [-1] * (batch['tokens'].shape[1] - len(w)) for w in own])      # [B,T]
        if self.text:
            batch['text'] = torch.zeros(*batch['tokens'].shape, self.text[split][0].shape[1])    # [B,T,D]
            batch['text'][batch['text_mask']] = torch.from_numpy(np.concatenate([self.text[split][i] for i in index]).astype(np.float32))
        if self.device != 'cuda': return {k: v.to(self.device) for k, v in batch.items()}
        return {k: v.pin_memory().to('cuda', non_blocking=True) for k, v in batch.items()}   # the step need not wait

    def n_targets(self, split, index):
        """ How many tokens of these clips the loss asks an LM for: those of the labels, or all but each clip's first. """
        index = self.clips[split][index]
        if self.prompt: return int(self.answer_len[index].sum())
        return sum(len(self.tokens[split][i]) - 1 for i in index) if self.tokens else 0

    def cost(self, split):
        """ [N] text tokens plus frames (or slots, for an AV encoder, which pools them); where a frozen LM reads the text, that first. """
        cost = np.zeros(self.corpus.n_clips[split], np.int64)
        if self.tokens: cost += [len(t) for t in self.tokens[split]]
        if self.prompt or self.c['system'] == 'deepmlf': cost *= 10_000   # there every frame costs less than any token
        for s in self.corpus.widths:
            if s in self.streams:
                frames = self.corpus.lengths(split, s)                                       # [N]
                cost += np.minimum(frames, self.c['av_len']) if self.c['system'] in ('av', 'deepmlf') else frames
        return cost[self.clips[split]]


def _command_line(argv):
    """
    python data.py SOURCE [--name=NAME] [--dtype=float32|float16] [--label_range=LOW,HIGH]
    [--padding=left|right] [--encoding=CODEC]
    """
    flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
    sources, label_range = [a for a in argv if not a.startswith('--')], None
    usage = ' '.join(_command_line.__doc__.split())
    if {'compare', 'subsets'} & set(flags):
        import language   # which reads corpora, so it cannot come first
        n = flags.get('n', '300')
        odd = set(flags) - {'compare', 'subsets', 'lm', 'n'}
        if len(sources) != (2 if 'compare' in flags else 1) or odd or not n.isdecimal() or int(n) < 1:
            raise CorpusError("the usage is python data.py --compare A B [--lm=NAME], or python data.py --subsets A [--lm=NAME] [--n=300].")
        if 'compare' in flags: return print(language.compare(*sources, flags.get('lm', '')))
        return print(language.subsets(*sources, flags.get('lm', ''), int(n)))
    if unknown := sorted(set(flags) - {'name', 'dtype', 'label_range', 'padding', 'encoding'}):
        raise CorpusError(f"There is no flag --{unknown[0]}; the usage is {usage}.")
    if len(sources) != 1: raise CorpusError(f"Give one source, not {len(sources)}; the usage is {usage}.")
    if 'label_range' in flags:
        try: low, high = label_range = [float(v) for v in flags['label_range'].split(',')]
        except ValueError:
            raise CorpusError(f"--label_range wants LOW,HIGH, not {flags['label_range']!r}.") from None
    folder = os.path.join('data', flags.get('name') or _folder_name(sources[0]))
    meta = convert(sources[0], folder, flags.get('dtype', 'float32'), label_range,
                   flags.get('padding'), flags.get('encoding'))
    print(describe(meta))
    print(f"train on it with --corpus={folder}")


if __name__ == '__main__':
    if '--help' in sys.argv or '-h' in sys.argv: print(__doc__); sys.exit(0)
    try: _command_line(sys.argv[1:])
    except (CorpusError, ModelError) as e: sys.exit(f"data.py: {e}")
