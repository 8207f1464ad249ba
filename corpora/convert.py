"""
Converts a source (a pickle, a table, or a folder of three) into a corpus folder. Training reads
only corpus folders.

    python data.py unaligned_50.pkl --name=mosei    a pickle of M-SENA or MMSA (MOSI, MOSEI,
                                                    CH-SIMS, CH-SIMS v2), converted into data/mosei
    python data.py MELD --dtype=float16             a folder with MELD_train.pkl, MELD_valid.pkl and
                                                    MELD_test.pkl; frames are stored standardised,
                                                    as float16
    python data.py SOURCE --label_range=-1,1        the range of the scores, where the guess
                                                    ([-1, 1] or [-3, 3]) is wrong
    python data.py SOURCE --padding=right           the side of the padding, where the frames do not
                                                    show it
    python data.py SOURCE --encoding=gbk            the encoding of texts that are stored as bytes,
                                                    where it is not UTF-8
    python data.py SOURCE --label_column=0          the column of scores [N, 7]
    python data.py data/mosei                       prints the summary of a corpus folder
    python data.py data/mosei --check               compares all files of a corpus folder with the
                                                    checksums in its meta.json
    python data.py mine.csv --split=80/10/10        a table (.csv, .tsv, .jsonl), split by video
    python data.py mine.csv --text=COLUMN --label=COLUMN,COLUMN --classes=COLUMN --split=COLUMN
                            --id=COLUMN,COLUMN --video=COLUMN --audio=COLUMN --vision=COLUMN
                            --speaker=COLUMN --dialogue=COLUMN --start=COLUMN --end=COLUMN
                                                    the columns, where their names do not say it

The corpus folder is data/NAME. Without --name, NAME is the name of the source and a hash.

A corpus folder holds meta.json and, for each split, text.jsonl and label*.npy or emotion.npy. For
audio and vision it holds the frames of all clips end to end, without padding: audio.npy [sum of
lengths, d_a], and audio_start.npy [N+1], the row where each clip begins. The conversion repairs
NaN, impossible lengths and texts in a wrong encoding, and meta.json counts the repairs.

Axis letters: N clips of a split, n clips of a chunk, L frames of the longest clip, d features of a
frame.
"""
import codecs
import hashlib
import json
import os
import re
import shutil
import socket
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from corpora import sources, tables
from corpora.describe import describe
from corpora.folder import Corpus, check_whole
from corpora.labels import write_labels
from corpora.limits import most_bytes
from corpora.names import N_NAMED, SPLIT_FIELDS, SPLITS, Summary, valid_unicode, video_of
from corpora.padding import find_padding
from corpora.seal import write_meta
from corpora.sources import check_splits
from corpora.streams import frame_rates, standardise_to_float16, write_stream
from corpora.unpickle import CorpusError, errors_as_corpus_error
from run.command_line import words_and_flags
from run.forms import LONGEST_NAME

# layout -> reader(paths, scratch, files, summary), which returns texts, labels and streams by split
READERS = dict(
    tables=tables.read_tables, msena=sources.read_msena, lists=sources.read_lists)


def find_source(source):
    """
    (name, layout, {split or 'all': path}) of a source: an M-SENA .pkl, a table, or a folder of
    NAME_train.pkl, NAME_valid.pkl and NAME_test.pkl or of three tables. Raises CorpusError.
    """
    if os.path.isfile(source) and str(source).lower().endswith(tables.TABLE_ENDS):
        return Path(source).stem, 'tables', {'all': str(source)}
    if os.path.isfile(source):
        return Path(source).stem, 'msena', {'all': str(source)}
    names = [p.name[:-len('_train.pkl')] for p in sorted(Path(source).glob('*_train.pkl'))]
    if len(names) == 1:
        paths = {s: _split_file(source, names[0], s) for s in SPLITS}
        missing = [p for p in paths.values() if not os.path.isfile(p)]
        if not missing:
            return names[0], 'lists', paths
        raise CorpusError(f"{missing[0]} is missing; a corpus needs train, valid and test "
                          "files.")
    by_split = tables.table_files(source) if os.path.isdir(source) and not names else {}
    if by_split:
        return Path(os.path.abspath(source)).name, 'tables', by_split
    if not os.path.exists(source):
        what = "does not exist"
    elif names:
        what = f"holds several corpora ({', '.join(names)}), and each needs a folder of its own"
    else:
        what = "holds neither meta.json nor a NAME_train.pkl nor tables"
    raise CorpusError(f"The corpus '{source}' {what}; a corpus is 'toy', a corpus folder, an "
                      "M-SENA .pkl, a table (.csv, .tsv, .jsonl), or a folder of NAME_train.pkl, "
                      "NAME_valid.pkl and NAME_test.pkl or of three tables.")


def _split_file(folder, name, split):
    """ The path of a split's file, such as NAME_valid.pkl or, by another name, NAME_dev.pkl. """
    names = [n for n, field in SPLIT_FIELDS.items() if field == split]
    paths = [os.path.join(folder, f'{name}_{n}.pkl') for n in names]
    there = [p for p in paths if os.path.isfile(p)]
    if len(there) > 1:
        raise CorpusError(f"{there[0]} and {there[1]} both name the split {split}; remove one of "
                          "them.")
    return there[0] if there else os.path.join(folder, f'{name}_{split}.pkl')


@contextmanager
def staging(folder):
    """
    Gives an empty folder to fill. At the end one rename makes it `folder`; after an error it is
    removed. Raises CorpusError for an OSError.
    """
    folder = Path(os.path.abspath(folder))
    host = socket.gethostname()
    tmp = Path(f'{folder}.tmp-{os.getpid()}@{host}')
    # the folder to rename; scratch files lie beside it in tmp, so they are not renamed with it
    inner = tmp / folder.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # remove the folders that killed conversions on this machine have left
        for old in os.listdir(folder.parent):
            pid = re.fullmatch(r'.+\.tmp-(\d+)@(.+)', old)
            if pid and pid[2] == host and not _alive(int(pid[1])):
                shutil.rmtree(folder.parent / old, ignore_errors=True)
        shutil.rmtree(tmp, ignore_errors=True)
        inner.mkdir(parents=True)
        yield inner
        try:
            os.rename(inner, folder)
        except OSError:  # another process has made the same folder first
            if not (folder / 'meta.json').is_file():
                raise
    except OSError as e:
        where = f': {e.filename}' if e.filename else ''
        raise CorpusError(f"Writing {folder} failed ({e.strerror or e}{where}); its unfinished "
                          "files were removed, so correct the cause and try again.") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _alive(pid):
    """ True if a process with this id runs on this machine, or if that is unknown (Windows). """
    if os.name == 'nt':   # os.kill(pid, 0) would send Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _progress_bar(n_bytes):
    """ A function that moves a progress bar by a number of bytes. Small files show no bar. """
    small = n_bytes < 200e6
    return tqdm(total=n_bytes, unit='B', unit_scale=True, disable=small, mininterval=1).update


def _note_crossing_videos(splits, notes):
    """
    Notes the videos that are in two splits. The video of a clip is given, or the part of its id
    before $_$ or [.
    """
    videos = {}
    for split, s in splits.items():
        videos[split] = s.get('video') or [video_of(clip) for clip in s['id']]
    sets = {split: set(v) - {None} for split, v in videos.items()}
    both = sorted(v for v in set.union(*sets.values()) if sum(v in s for s in sets.values()) > 1)
    if both:
        n = sum(v in sets['train'] for split in ('valid', 'test') for v in videos[split])
        more = ', ..' * (len(both) > N_NAMED)
        notes.append(f"{len(both)} videos are in more than one split, and {n} clips of valid and "
                     f"test are of a video of train: {', '.join(both[:N_NAMED])}{more}")


def _write_texts(splits, out):
    """ Writes text.jsonl of all splits. Returns the entry `text` of meta.json. """
    for split, s in splits.items():
        keys = [k for k in ('id', 'text', 'speaker', 'dialogue', 'duration') if k in s]
        with open(out / split / 'text.jsonl', 'w', encoding='utf-8', newline='\n') as f:
            for row in zip(*(s[k] for k in keys)):
                f.write(json.dumps(dict(zip(keys, row)), ensure_ascii=False) + '\n')
    train = ''.join(splits['train']['text'])
    upper = sum(c.isupper() for c in train)
    lower = sum(c.islower() for c in train)
    empty = sum(not t.strip() for s in splits.values() for t in s['text'])
    return dict(empty=empty, upper_case=upper > 0.95 * (upper + lower))


def convert(source, folder, dtype='float32', label_range=None, padding=None, encoding=None,
            label_column=None, **table):
    """
    Writes the corpus folder `folder` from `source`, see find_source. Padding is cut off, and nan
    and inf become 0. Returns the dict of meta.json. Raises CorpusError, and then leaves nothing
    behind.

    dtype: 'float32', or 'float16', which also standardises the frames by the mean and std of train.
    label_range: (low, high). None takes [-1, 1] where all scores are in it, as in CH-SIMS, and else
    [-3, 3].
    padding: 'left' or 'right', the side where zero frames are padding. None finds it, see
    find_padding.
    encoding: a Python codec for texts that are stored as bytes or as Python 2 strings. None takes
    UTF-8.
    label_column: which of several scores a clip, from 0. None: a source has one.
    table: the columns of a table, see FLAGS in corpora/tables.py.

    The memory that is needed does not grow with the file: a few copies of one 32 MiB chunk, the
    texts and the labels. Only an array in Fortran order is held as a whole.
    """
    if dtype not in ('float32', 'float16'):
        raise CorpusError(f"--dtype must be float32 or float16, not {dtype!r}.")
    if label_range and not label_range[0] < label_range[1]:
        raise CorpusError(f"--label_range must be LOW,HIGH with LOW < HIGH, not {label_range}.")
    if padding not in (None, 'left', 'right'):
        raise CorpusError(f"--padding must be left or right, not {padding!r}.")
    _check_encoding(encoding)
    _, layout, paths = find_source(source)
    label_range = label_range and [float(v) for v in label_range]   # NumPy's numbers are no JSON
    if table and layout != 'tables':
        raise CorpusError(f"--{next(iter(table))} is for tables (.csv, .tsv, .jsonl), and {source} "
                          "is none; leave it out.")
    _check_folder(folder)
    with staging(folder) as out, ExitStack() as files, errors_as_corpus_error(source):
        n_bytes = sum(os.path.getsize(p) for p in paths.values())
        summary = Summary(encoding, table, label_column, most_bytes(n_bytes), padding)
        splits = READERS[layout](paths, out.parent, files, summary)
        read = [*paths.values(), *summary.files]
        stats = [os.stat(p) for p in read]
        n_bytes = sum(s.st_size for s in stats)
        frames = [f for s in splits.values() for f in s['streams'].values()]
        _refuse_inflated(frames, dict(zip(read, stats)), source)
        check_splits(splits, source)
        for split in SPLITS:
            (out / split).mkdir()
        labels = write_labels(splits, out, label_range, summary.notes)
        _note_crossing_videos(splits, summary.notes)
        text = _write_texts(splits, out)
        found = find_padding(splits, source, padding, summary)

        progress = _progress_bar(n_bytes + sum(f.n_bytes for f in frames))
        streams = {m: write_stream(m, splits, out, progress, found[m]) for m in found}
        if 'duration' in splits['train']:
            for m, rate in frame_rates(splits, streams, out).items():
                streams[m]['frames_per_second'] = rate
        if dtype == 'float16':
            streams = {m: standardise_to_float16(m, info, out) for m, info in streams.items()}

        meta = dict(
            format=1,
            name=out.name,
            source=_source_entry(source, layout, read, stats, progress),
            clips={k: len(s['text']) for k, s in splits.items()},
            labels=labels,
            streams=streams,
            text=text | summary.text,
            renamed=summary.renamed,
            unread=summary.unread,
            defaults=summary.defaults,
        )
        if summary.notes:
            meta['notes'] = summary.notes
        if encoding:
            meta['text']['encoding'] = encoding
        write_meta(out, meta)
    return meta


def _check_folder(folder):
    """ Raises CorpusError if no corpus folder can be made under this name. """
    if len(Path(folder).name) > LONGEST_NAME:
        raise CorpusError(f"The name of {folder} has more than {LONGEST_NAME} characters; give a "
                          "shorter --name.")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise CorpusError(f"{folder} already exists; remove it, or give another --name.")


def _refuse_inflated(frames, stats, source):
    """
    Raises CorpusError if the frames take far more bytes than the files that hold them, because many
    clips share one array in a pickle or name one file. stats: {path: its os.stat}.
    """
    n_bytes = sum(s.st_size for s in stats.values())
    wanted = sum(f.n_bytes for f in frames)
    if wanted > most_bytes(n_bytes):
        raise CorpusError(f"The clips of {source} have {wanted / 1e6:,.0f} MB of frames, and its "
                          f"files have {n_bytes / 1e6:,.1f} MB, so many clips share the same frames "
                          "or they are compressed zeros; give each clip its own frames, or None for "
                          "a clip without frames.")


def _source_entry(source, layout, paths, stats, progress):
    """ The entry `source` of meta.json: size, time and SHA-256 of all files together. """
    place = Path(os.path.abspath(source))
    sha = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as f:
            while piece := f.read(4 << 20):
                sha.update(piece)
                progress(len(piece))
    return dict(
        file=valid_unicode(place.name),
        path=valid_unicode(str(place)),
        bytes=sum(s.st_size for s in stats),
        sha256=sha.hexdigest(),
        mtime_ns=max(s.st_mtime_ns for s in stats),
        layout=layout,
    )


def _check_encoding(encoding):
    """ Raises CorpusError for an encoding that is not a text codec of Python. """
    if encoding is None:
        return
    try:
        codecs.lookup(encoding)
        b'a'.decode(encoding)  # fails for codecs that are not for text, such as hex
    except (LookupError, ValueError) as e:
        if isinstance(e, UnicodeDecodeError):
            return  # a text codec, such as utf-16, in which one byte is not a text
        raise CorpusError(f"--encoding={ascii(encoding)[1:-1]} is not a text encoding of Python; "
                          "give one such as utf-8, gbk, cp1252 or shift_jis.") from None


def folder_name(source):
    """
    NAME-1a2b3c: the name of the source, and a hash of its path, size and time. The hash keeps files
    of the same name apart (those of MOSI and MOSEI). It is faster than a hash of the content.
    """
    name, _, paths = find_source(source)
    stats = [os.stat(p) for p in paths.values()]
    size = sum(s.st_size for s in stats)
    newest = max(s.st_mtime_ns for s in stats)
    key = f'{os.path.abspath(source)}:{size}:{newest}'
    return f'{valid_unicode(name)}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:6]}'


def command_line(argv):
    """
    python data.py SOURCE [--name=NAME] [--dtype=float32|float16] [--label_range=LOW,HIGH]
    [--padding=left|right] [--encoding=CODEC] [--label_column=NUMBER], and for a table
    [--split=80/10/10] or
    [--text|label|classes|split|id|video|speaker|dialogue|audio|vision|start|end=COLUMN]; or
    python data.py FOLDER [--check]
    """
    sources, flags = words_and_flags(argv, switches=('check',))
    is_folder = len(sources) == 1 and os.path.isfile(os.path.join(sources[0], 'train', 'text.jsonl'))
    if len(sources) == 1 and list(flags) == ['check']:
        print(check_whole(sources[0]))
        return
    if is_folder and not flags:
        print(describe(Corpus(sources[0]).meta))
        return
    usage = ' '.join(command_line.__doc__.split())
    own = {'name', 'dtype', 'label_range', 'padding', 'encoding', 'label_column'}
    unknown = sorted(set(flags) - own - set(tables.FLAGS))
    if unknown:
        raise CorpusError(f"There is no flag --{unknown[0]}; the usage is {usage}.")
    if len(sources) != 1:
        raise CorpusError(f"Give one source, not {len(sources)}; the usage is {usage}.")
    if is_folder:
        raise CorpusError(f"{sources[0]} is a corpus folder already; train on it, or describe it with "
                          "python data.py FOLDER.")
    label_range = None
    if 'label_range' in flags:
        try:
            low, high = label_range = [float(v) for v in flags['label_range'].split(',')]
        except ValueError:
            raise CorpusError("--label_range must be two numbers, LOW,HIGH, not "
                              f"{flags['label_range']!r}.") from None
    label_column = flags.get('label_column')
    if label_column is not None and not label_column.isdecimal():
        raise CorpusError(f"--label_column must be a number from 0 on, not {label_column!r}.")
    if flags.get('name') == 'toy':
        raise CorpusError("data/toy is the folder of the toy corpus; give another --name.")
    folder = os.path.join('data', flags.get('name') or folder_name(sources[0]))
    meta = convert(sources[0], folder, flags.get('dtype', 'float32'), label_range,
                   flags.get('padding'), flags.get('encoding'),
                   None if label_column is None else int(label_column),
                   **{f: v for f, v in flags.items() if f in tables.FLAGS})
    print(describe(meta))
    print(f"train on it: python train.py CONFIG --corpus={folder}")
