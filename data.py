"""
Any corpus -> one folder of memory-mapped arrays -> batches.

    python data.py unaligned_50.pkl --name=mosei    an M-SENA/MMSA pickle: MOSI, MOSEI, CH-SIMS, CH-SIMS v2
    python data.py MELD --dtype=float16             a folder of MELD_train.pkl, MELD_valid.pkl, MELD_test.pkl
    python data.py SOURCE --label_range=-1,1        scores in another range than the one that is guessed
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
import hashlib, json, math, os, re, shutil, socket, sys
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
KNOWN_CLASSES = [['neutral', 'surprise', 'fear', 'sadness', 'joy', 'disgust', 'anger'],  # MELD
                 ['愤怒', '厌恶', '恐惧', '高兴', '平静', '悲伤', '惊奇'],                        # CHERMA
                 ['hap', 'sad', 'neu', 'ang', 'exc', 'fru']]                             # IEMOCAP


# ---------------------------------------------------------------------------------------------------------
# What the two layouts hold, in one form: texts, ids, labels and frames, per split

def _column(column, n, where):
    """ A list or array of n entries (n None: however many) as a list. """
    size = math.prod(column.shape) if type(column) is LazyArray else len(column)
    if n not in (None, size): raise CorpusError(f"{where} has {size} entries for {n} clips; mend the source.")
    return column.all().ravel().tolist() if type(column) is LazyArray else list(column)


def _text(x, where):
    """ One clip's text as a str that any tokenizer takes. """
    if type(x) is int: x = str(x)   # some ids
    if type(x) is Lazy: x = x.value()
    if type(x) is Py2Str: x = x.encode('latin1')
    if isinstance(x, (bytes, bytearray)):
        try: x = x.decode('utf-8')
        except UnicodeDecodeError: x = x.decode('latin1')
    if not isinstance(x, str):
        raise CorpusError(f"{where} is a {type(x).__name__} where text belongs; mend the source.")
    return x.encode('utf-8', 'replace').decode('utf-8')   # half a surrogate pair would crash a tokenizer


def _texts(column, n, where):
    return [_text(v, f"Entry {i} of {where}") for i, v in enumerate(_column(column, n, where))]


def _numbers(column, n, where):
    """ A list or array of n numbers, bare or each in an array or list of one, as float64 [N]. """
    values = _column(column, n, where)
    for i, v in enumerate(values):
        if type(v) is LazyArray and math.prod(v.shape) == 1: v = v.all().item()
        if type(v) is list and len(v) == 1: v = v[0]
        if type(v) not in (int, float, bool):
            raise CorpusError(f"Entry {i} of {where} is a {type(v).__name__}, not a number; mend the source.")
        values[i] = v
    return np.array(values, np.float64)


class Frames:
    """
    One stream of one split as the source has it: N clips of at most L frames of d features, and the lengths
    [N] that it states, if any. From one array [N, L, d] or [N, d], or from a list of N arrays [L_i, d] or
    [d].
    """
    def __init__(self, source, lengths, n, where):
        if type(source) is LazyArray and source.dtype == object: source = source.all().tolist()
        self.one = type(source) is LazyArray
        self.arrays = [source] if self.one else source
        if type(self.arrays) is not list or any(type(a) is not LazyArray for a in self.arrays):
            raise CorpusError(f"{where} is neither an array nor a list of arrays; mend the source.")
        if (source.shape[:1] if self.one else (len(source),)) != (n,):
            raise CorpusError(f"{where} is not for the {n} clips of its split; mend the source.")
        shapes = [a.shape[1:] if self.one else a.shape for a in self.arrays]                 # (L,d) or (d,)
        self.flat, self.N, self.d = len(shapes[0]) == 1, n, shapes[0][-1] if shapes[0] else 0
        if any(a.dtype.kind not in 'fiub' for a in self.arrays) or len(shapes[0]) not in (1, 2) \
           or any(len(s) != len(shapes[0]) or s[-1] != self.d for s in shapes) or not 0 < self.d <= MAX_WIDTH:
            raise CorpusError(f"{where} is not numbers [clips, frames, features] of one width, 1 to {MAX_WIDTH}; "
                              "mend the source.")
        if len({id(a) for a in self.arrays}) < len(self.arrays):   # a small file could fill a disk with one array
            raise CorpusError(f"{where} has one array for many clips; mend the source.")
        rows = [1 if self.flat else s[0] for s in shapes]   # a vector a clip is one frame
        self.n_rows = np.array(rows * n if self.one else rows, np.int64)                     # [N]
        self.L = int(self.n_rows.max())
        self.step = max(1, CHUNK_BYTES // (8 * max(1, self.L) * self.d))   # 8: the widest number is a float64
        self.lengths = None
        if lengths is not None and not self.flat:
            stated = _numbers(lengths, n, f"The lengths of {where}")                         # [N]
            ok = (stated >= 0) & (stated <= self.n_rows) & (stated == np.floor(stated))      # [N]
            self.lengths = np.where(ok, stated, -1).astype(np.int64)   # -1: to be repaired

    def rows(self, i, j, counts=None):
        """ Clips i:j as float32 [n, L, d], with 0 for all that is not finite, which `counts` counts. """
        j = min(j, self.N)
        if self.one: x = _float32(self.arrays[0].rows(i, j)).reshape(j - i, self.L, self.d)  # [n,L,d]
        else:
            x = np.zeros((j - i, self.L, self.d), np.float32)                                # [n,L,d]
            for k in range(j - i): x[k, :self.n_rows[i + k]] = _float32(self.arrays[i + k].all())
        finite = np.isfinite(x)                                                              # [n,L,d]
        if not finite.all():
            for name, bad in (('nan', np.isnan), ('+inf', np.isposinf), ('-inf', np.isneginf)):
                if counts: counts[name] += int(bad(x).sum())
            x[~finite] = 0
        return x

    def padding_side(self):
        """ 'left' if most of up to 512 clips shorter than L are zero at their head, else 'right'. """
        stated = self.lengths is not None
        short = np.flatnonzero((self.lengths > 0) & (self.lengths < self.L)) if stated else np.arange(self.N)
        votes = 0
        for k in np.linspace(0, len(short) - 1, min(512, len(short))).astype(int):
            live = self.rows(short[k], short[k] + 1)[0].any(-1)                              # [L]
            n = self.L - self.lengths[short[k]] if stated else 1   # frames of padding that there must be
            if live.any(): votes += int(not live[:n].any()) - int(not live[-n:].any())
        return 'left' if votes > 0 else 'right'

    def own(self, live, i, side):
        """ The frames that are the clips' own, [n, L], for clips i.. not 0 at live; and lengths repaired. """
        n, frame, repaired = len(live), np.arange(self.L), 0
        ends = live if side == 'left' else live[:, ::-1]                                     # [n,L]
        length = np.where(live.any(1), self.L - ends.argmax(1), 0) if self.L else np.zeros(n, int)   # [n]
        if self.flat: length = np.ones(n, np.int64)
        elif self.lengths is not None:
            stated, most = self.lengths[i:i + n], self.n_rows[i:i + n]                       # [n]
            length, repaired = np.where(stated < 0, np.minimum(length, most), stated), int((stated < 0).sum())
        if side == 'left': return frame >= self.L - length[:, None], repaired
        return frame < length[:, None], repaired


def _float32(x):
    with np.errstate(over='ignore', invalid='ignore'): return x.astype(np.float32)   # too big becomes inf


def _keys(x):
    """ What a container has instead of what we look for. """
    return ascii(', '.join(map(str, x)))[1:-1][:300] if type(x) is dict else f"a {type(x).__name__}"


def _read_msena(path, scratch, files):
    """ The dict pickle of M-SENA / MMSA: {split: {key: N of something}}. """
    tree = read_pickle(files.enter_context(open(path, 'rb')), scratch)
    if type(tree) is not dict or any(s not in tree for s in SPLITS):
        raise CorpusError(f"{path} holds {_keys(tree)}, and needs the keys train, valid and test; a corpus "
                          "of three files with lists is given by its folder.")
    splits = {}
    for split in SPLITS:
        clips, where = tree[split], f"of the split {split} in {path}"
        has = {k: v for k, v in clips.items() if v is not None} if type(clips) is dict else {}
        if 'raw_text' not in has or 'regression_labels' not in has:
            raise CorpusError(f"The split {split} in {path} holds {_keys(clips)}, and needs raw_text and "
                              "regression_labels.")
        text = _texts(has['raw_text'], None, f"raw_text {where}")
        n, s = len(text), dict(text=text, labels={}, streams={})
        for t in ('', '_T', '_A', '_V'):   # CH-SIMS has a label per modality
            key = 'regression_labels' + t
            if key in has: s['labels']['label' + t] = _numbers(has[key], n, f"{key} {where}")
        for m in STREAMS:
            if m in has: s['streams'][m] = Frames(has[m], has.get(m + '_lengths'), n, f"{m} {where}")
        s |= {k: _texts(has[k], n, f"{k} {where}") for k in ('id', 'speaker', 'dialogue') if k in has}
        splits[split] = s
    return splits


def _read_lists(paths, scratch, files):
    """ Three pickles, each a list of {label, features: {text, audio, video, audio_len, video_len}}. """
    splits = {}
    for split, path in paths.items():
        clips, where = read_pickle(files.enter_context(open(path, 'rb')), scratch), f"of {path}"
        if type(clips) is not list: raise CorpusError(f"{path} holds {_keys(clips)}, not a list of clips.")
        for i, clip in enumerate(clips):
            features = clip.get('features') if type(clip) is dict else None
            if type(features) is not dict or 'label' not in clip or 'text' not in features:
                raise CorpusError(f"Clip {i} {where} holds {_keys(clip)}, and needs label and features with "
                                  "a text in them.")

        def column(key, rows):   # None unless all have it
            return None if any(r.get(key) is None for r in rows) else [r[key] for r in rows]

        n, features, s = len(clips), [c['features'] for c in clips], dict(streams={})
        for m, key in (('audio', 'audio'), ('vision', 'video')) if n else ():
            if source := column(key, features):
                s['streams'][m] = Frames(source, column(key + '_len', features), n, f"{key} {where}")
        s['text'] = _texts([f['text'] for f in features], n, f"text {where}")
        s['labels'] = dict(emotion=_texts([c['label'] for c in clips], n, f"label {where}"))
        for key in ('id', 'speaker', 'dialogue'):
            if values := column(key, clips): s[key] = _texts(values, n, f"{key} {where}")
        splits[split] = s
    return splits


def _check_splits(splits, source):
    """ Fills in ids. Raises CorpusError where a split is empty or the splits do not fit each other. """
    train = splits['train']
    for split, s in splits.items():
        s.setdefault('id', [f'{split}_{i}' for i in range(len(s['text']))])
        if not s['text']: raise CorpusError(f"The split {split} of {source} has no clips; mend the source.")
        for what in ('labels', 'streams'):
            if set(s[what]) != set(train[what]):
                raise CorpusError(f"The {what} of {source} are {', '.join(train[what]) or 'none'} in train "
                                  f"but {', '.join(s[what]) or 'none'} in {split}; mend the source.")
        for m, frames in s['streams'].items():
            d = train['streams'][m].d
            if frames.d != d:
                raise CorpusError(f"The {m} of {source} has {d} features in train but {frames.d} in {split}; "
                                  "mend the source.")


# ---------------------------------------------------------------------------------------------------------
# Writing a corpus folder

def _find_source(source):
    """ (name, layout, {split or 'all': path}) of an M-SENA .pkl, or a folder of NAME_train.pkl etc. """
    if os.path.isfile(source): return Path(source).stem, 'msena', {'all': str(source)}
    names = [p.name[:-len('_train.pkl')] for p in sorted(Path(source).glob('*_train.pkl'))]
    if len(names) == 1:
        paths = {s: os.path.join(source, f'{names[0]}_{s}.pkl') for s in SPLITS}
        missing = [p for p in paths.values() if not os.path.isfile(p)]
        if not missing: return names[0], 'lists', paths
        raise CorpusError(f"{missing[0]} is missing; a corpus needs train, valid and test.")
    if not os.path.exists(source): what = "does not exist"
    elif names: what = f"holds several corpora ({', '.join(names)}), and each needs a folder of its own"
    else: what = "holds neither meta.json nor a NAME_train.pkl"
    raise CorpusError(f"The corpus '{source}' {what}; --corpus= takes 'toy', a corpus folder, an M-SENA "
                      ".pkl, or a folder of NAME_train.pkl, NAME_valid.pkl and NAME_test.pkl.")


@contextmanager
def _staging(folder):
    """ An empty folder to fill. It becomes `folder` in one rename if all went well; else it goes. """
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
    """ A .npy header of 128 bytes whatever the shape: it is written again when the rows are known. """
    text = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    return b'\x93NUMPY\x01\x00' + (118).to_bytes(2, 'little') + text.encode().ljust(117) + b'\n'


class Moments:
    """ Mean and std of rows that come in pieces. Sums of squares would cancel for features far from zero. """
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


def _write_stream(name, splits, out, progress):
    """ NAME.npy and NAME_start.npy of all splits, in float32. Returns the entry in meta.json. """
    train = splits['train']['streams'][name]
    side, moments, padded = train.padding_side(), Moments(train.d), False
    info = dict(width=train.d, longest=0, padding='none', dtype='float32', standardised=False,
                cleaned={'nan': 0, '+inf': 0, '-inf': 0}, clips_empty=0, clips_all_zero=0, lengths_repaired=0)
    for split in SPLITS:
        frames, lengths = splits[split]['streams'][name], []
        with open(out / split / f'{name}.npy', 'wb') as f:
            f.write(_npy_header('<f4', (0, frames.d)))
            for i in range(0, frames.N, frames.step):
                x = frames.rows(i, i + frames.step, info['cleaned'])                         # [n,L,d]
                live = x.any(-1)                                                             # [n,L]
                own, repaired = frames.own(live, i, side)                                    # [n,L]
                lengths.append(own.sum(1))
                info['lengths_repaired'] += repaired
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
        info['longest'] = max(info['longest'], int(lengths.max()))
        info['clips_empty'] += int((lengths == 0).sum())
        padded |= bool((lengths < frames.L).any())
        for a in frames.arrays: a.close()
    if padded: info['padding'] = side
    return info | dict(mean=moments.mean.tolist(), std=moments.std().tolist())


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
    """ label*.npy float32 [N] or emotion.npy int64 [N] of all splits. Returns meta.json's entry `labels`. """
    entries, train = {}, splits['train']['labels']
    for name in train:
        if name == 'emotion':
            seen = sorted(set(train[name]))
            names = next((known for known in KNOWN_CLASSES if set(seen) <= set(known)), seen)
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


def convert(source, folder, dtype='float32', label_range=None):
    """
    Writes the corpus folder `folder` from `source`: an M-SENA .pkl, or a folder of NAME_train.pkl,
    NAME_valid.pkl and NAME_test.pkl. Streams are cut to their lengths, and nan and inf become 0; float16 also
    standardises them, by the mean and std of train. label_range is (low, high); None takes [-1, 1] or [-3,
    3], whichever holds all labels, and [-1, 1] for CH-SIMS. Returns meta.json's dict. Raises CorpusError and
    then leaves nothing behind. Memory is some copies of one 32 MiB chunk plus texts and labels, whatever the
    file's size (and one array, if in Fortran order).
    """
    if dtype not in ('float32', 'float16'): raise CorpusError(f"dtype is float32 or float16, not {dtype!r}.")
    if label_range and not label_range[0] < label_range[1]:
        raise CorpusError(f"The label range is LOW,HIGH with LOW < HIGH, not {label_range}.")
    _, layout, paths = _find_source(source)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise CorpusError(f"{folder} exists already; remove it, or give another --name.")
    with _staging(folder) as out, ExitStack() as files, strangers_file(source):
        if layout == 'msena': splits = _read_msena(paths['all'], out.parent, files)
        else: splits = _read_lists(paths, out.parent, files)
        _check_splits(splits, source)
        for split in SPLITS: (out / split).mkdir()
        labels, text = _write_labels(splits, out, label_range), _write_texts(splits, out)
        frames = [f for s in splits.values() for f in s['streams'].values()]
        stats, sha = [os.stat(p) for p in paths.values()], hashlib.sha256()
        n_bytes = sum(s.st_size for s in stats)
        progress = _bar(n_bytes + sum(4 * f.N * f.L * f.d for f in frames))
        streams = {m: _write_stream(m, splits, out, progress) for m in splits['train']['streams']}
        if dtype == 'float16': streams = {m: _halve(m, info, out) for m, info in streams.items()}
        for path in paths.values():
            with open(path, 'rb') as f:
                while piece := f.read(4 << 20): sha.update(piece); progress(len(piece))
        place = Path(os.path.abspath(source))
        meta = dict(format=1, name=out.name,
                    source=dict(file=place.name, path=str(place), bytes=n_bytes, sha256=sha.hexdigest(),
                                mtime_ns=max(s.st_mtime_ns for s in stats), layout=layout),
                    clips={k: len(s['text']) for k, s in splits.items()},
                    labels=labels, streams=streams, text=text)
        (out / 'meta.json').write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding='utf-8')
    return meta


def describe(meta):
    """ What a corpus is and what was done to it, as a small table. """
    rows = [('source', f"{meta['source']['file']}, SHA-256 {meta['source']['sha256']}"),
            ('clips', ', '.join(f'{n} {s}' for s, n in meta['clips'].items()))]
    for name, y in meta['labels'].items():
        rows.append((name, f"in {y['range']}" if 'range' in y else f"one of {', '.join(y['names'])}"))
    for m, s in meta['streams'].items():
        cleaned = ', '.join(f'{n} {k}' for k, n in s['cleaned'].items())
        rows += [(m, f"{s['width']} wide, longest {s['longest']}, padding {s['padding']}, {s['dtype']}"),
                 ('', f"{cleaned} set to 0; clips: {s['clips_empty']} empty, {s['clips_all_zero']} all zero, "
                      f"{s['lengths_repaired']} lengths repaired")]
    if not meta['streams']: rows.append(('streams', "neither audio nor vision: a corpus of text alone"))
    rows.append(('text', f"{meta['text']['empty']} empty" + ', in capitals' * meta['text']['upper_case']))
    return '\n'.join([f"corpus {meta['name']}"] + [f'  {a:8s} {b}' for a, b in rows])


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
        print(describe(convert(source, folder)))
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
    """ python data.py SOURCE [--name=NAME] [--dtype=float32|float16] [--label_range=LOW,HIGH] """
    flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
    sources, label_range = [a for a in argv if not a.startswith('--')], None
    usage = _command_line.__doc__.strip()
    if {'compare', 'subsets'} & set(flags):
        import language   # which reads corpora, so it cannot come first
        n = flags.get('n', '300')
        odd = set(flags) - {'compare', 'subsets', 'lm', 'n'}
        if len(sources) != (2 if 'compare' in flags else 1) or odd or not n.isdecimal() or int(n) < 1:
            raise CorpusError("the usage is python data.py --compare A B [--lm=NAME], or python data.py --subsets A [--lm=NAME] [--n=300].")
        if 'compare' in flags: return print(language.compare(*sources, flags.get('lm', '')))
        return print(language.subsets(*sources, flags.get('lm', ''), int(n)))
    if unknown := sorted(set(flags) - {'name', 'dtype', 'label_range'}):
        raise CorpusError(f"There is no flag --{unknown[0]}; the usage is {usage}.")
    if len(sources) != 1: raise CorpusError(f"Give one source, not {len(sources)}; the usage is {usage}.")
    if 'label_range' in flags:
        try: low, high = label_range = [float(v) for v in flags['label_range'].split(',')]
        except ValueError:
            raise CorpusError(f"--label_range wants LOW,HIGH, not {flags['label_range']!r}.") from None
    folder = os.path.join('data', flags.get('name') or _folder_name(sources[0]))
    print(describe(convert(sources[0], folder, flags.get('dtype', 'float32'), label_range)))
    print(f"train on it with --corpus={folder}")


if __name__ == '__main__':
    if '--help' in sys.argv or '-h' in sys.argv: print(__doc__); sys.exit(0)
    try: _command_line(sys.argv[1:])
    except (CorpusError, ModelError) as e: sys.exit(f"data.py: {e}")
