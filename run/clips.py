"""
Reads a user's own clips, which run/predictor.py predicts, and exports runs for other people.

    python eval.py out/RUN --clip=mine.npz     arrays text (a string), audio [S,d_a], vision [S,d_v]
    python eval.py out/RUN --clip=mine.jsonl   one clip per line: {"text": .., "audio": [[..], ..]}
    python eval.py out/RUN --text="I loved it"   a clip of these words alone
    python eval.py out/RUN --export=FOLDER     copy the run for others, without its corpus

Text, audio and vision may each be left out; "id" may name a clip. Features must be of the same
extractors as those of the run's corpus, a row for each frame, and not standardised: the run
standardises them as in training.
"""
import json
import os
import shutil
import tempfile

import numpy as np

from corpora.folder import Corpus
from corpora.limits import opened_npz
from corpora.names import SPLITS, STREAMS
from metrics import SHOWN
from model import SYSTEMS
from run.errors import ModelError, UserError
from run.folder import find_folder, load_checkpoint, open_regular, save_checkpoint, write_text
from run.json_files import sealed

# (stream, width) of public feature extractors, to name them when a width is wrong
FEATURES = {
    ('audio', 74): 'COVAREP', ('audio', 33): 'librosa',
    ('audio', 25): 'eGeMAPS low-level descriptors', ('audio', 5): "MMSA's COVAREP selection",
    ('vision', 35): 'Facet', ('vision', 20): "MMSA's Facet selection",
    ('vision', 709): 'OpenFace 2', ('vision', 177): 'OpenFace 2, a selection'}
LM_FILES = ('.json', '.safetensors', '.bin', '.model', '.txt')   # ends of the files that an LM needs
LARGEST_COPY = 200e6   # bytes; an export copies local LMs up to this size, and names the others


class ClipError(UserError, ValueError):
    """ An error in a clip or an export. """


class Clips:
    """
    A user's own clips with the interface of data.Corpus that Feed and System.build need. `facts`
    are those of the run's corpus (corpus_facts), `rows` the clips of read_clips. Every split holds
    the same clips. Labels are placeholders: the middle of the range, or class 0. Without rows,
    n_clips is that of the run's corpus.
    """
    def __init__(self, facts, rows=None):
        # The clips are raw even if the corpus was stored standardised; its mean and std are of raw
        # features in both cases.
        streams = {m: s | dict(standardised=False) for m, s in facts['streams'].items()}
        self.meta = dict(streams=streams, text=dict(upper_case=facts['upper_case']))
        self.widths, self.labels, self.rows = facts['widths'], facts['labels'], rows or []
        self.name, self.folder, self.sha256 = facts['name'], facts['folder'], facts['sha256']
        self.n_clips = facts['clips'] if rows is None else {split: len(rows) for split in SPLITS}

    def text(self, split):
        return [r['text'] for r in self.rows]

    def id(self, split):
        return [r['id'] for r in self.rows]

    def turns(self, split):
        """ Each clip is a dialogue of its own, and its text is read as it is. """
        return [(i, None) for i in range(len(self.rows))]

    def label(self, split, name='label'):
        info = self.labels[name]
        if info['kind'] == 'classes':
            return np.zeros(len(self.rows), np.int64)  # [N]
        return np.full(len(self.rows), sum(info['range']) / 2, np.float32)  # [N]

    def lengths(self, split, stream):
        return np.array([len(r[stream]) for r in self.rows])  # [N]

    def frames(self, split, stream, i):
        return self.rows[i][stream]  # [S,d]


def corpus_facts(corpus):
    """
    The facts about its corpus that a run stores in config.json and in checkpoints: all that it
    needs to predict a clip without the corpus.
    """
    streams = {}
    for m, s in corpus.meta['streams'].items():
        streams[m] = {key: s[key] for key in ('width', 'mean', 'std', 'standardised')}
    return dict(folder=corpus.folder, sha256=corpus.sha256, contents=corpus.contents,
                name=corpus.name, widths=corpus.widths, streams=streams, labels=corpus.labels,
                clips=corpus.n_clips, upper_case=corpus.meta['text']['upper_case'])


def is_copy(facts, corpus):
    """
    Whether a corpus is that of these corpus_facts, perhaps in another folder. A corpus made by hand
    has no checksums that show it.
    """
    return bool(corpus.contents) and is_same_corpus(facts, corpus_facts(corpus))


def holds_copy(facts, folder):
    """ Whether a path is a corpus folder with is_copy's corpus. Raises CorpusError. """
    is_folder = os.path.isfile(os.path.join(folder, 'meta.json'))
    return is_folder and is_copy(facts, Corpus(folder))


def is_same_corpus(facts, others):
    """
    Whether two corpus_facts are of one corpus: the same source, in a conversion with the same
    texts, splits, labels and lengths.
    """
    return all(facts.get(key) == others[key] for key in ('sha256', 'contents'))


# ---------------------------------------------------------------------------------------------------------
# Reading clips

def read_clip_rows(path):
    """ The clips of a .npz or .jsonl file as a list of dicts, unchecked. Raises ClipError. """
    try:
        if path.lower().endswith('.npz'):
            with open_regular(path, 'rb', follow=True) as f, opened_npz(f) as npz:
                refuse_other_keys(npz.files, path)   # before an array is unpacked
                row = {key: npz[key] for key in npz.files}
            for key in ('text', 'id'):
                if key in row and row[key].ndim == 0:
                    row[key] = row[key].item()
            return [row]
        if path.lower().endswith('.jsonl'):
            with open_regular(path, follow=True) as f:
                lines = f.read().removeprefix('\ufeff').split('\n')   # without a byte order mark
            return [json.loads(line) for line in lines if line.strip()]
    except ClipError:
        raise
    except Exception as e:   # damaged bytes raise errors of many classes
        reason = ' '.join(str(getattr(e, 'strerror', None) or e or type(e).__name__).split())[:200]
        raise ClipError(f"{one_line(path)} cannot be read ({one_line(reason)}): check the path, and "
                        "write it again (run/clips.py says how): np.savez(FILE, text=.., audio=.., "
                        "vision=..), or a line of JSON for each clip.") from None
    raise ClipError(f"{one_line(path)} is neither a .npz nor a .jsonl file: save the clip as one of "
                    "these.")


def refuse_other_keys(keys, name):
    """ Raises ClipError if a clip holds anything but text, audio, vision and id. """
    if other := [str(key) for key in keys if key not in ('id', 'text', *STREAMS)]:
        raise ClipError(f"{one_line(name)} has the key {one_line(other[0])[:60]!r}, and may hold only "
                        "text (one string), audio, vision (the video) and id: remove the rest.")


def one_line(name):
    """ A name as it can be printed: control characters and halves of surrogate pairs as escapes. """
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def read_clips(path, facts, seen=('text', *STREAMS), text=None):
    """
    The clips of a .npz or .jsonl file -> (list of checked_clip's dicts, notes). text: the words of
    its one clip, instead of its own. Raises ClipError.
    """
    rows = read_clip_rows(path)
    if not rows:
        raise ClipError(f"{one_line(path)} holds no clip: write one per line.")
    if text is not None:
        if len(rows) > 1 or not isinstance(rows[0], dict):
            raise ClipError(f"{one_line(path)} does not hold one clip, which --text= could give words to: "
                            "write the text into the file.")
        rows[0]['text'] = text
    clips, notes = [], []
    for n, row in enumerate(rows):
        name = os.path.basename(path) + (f', clip {n}' if len(rows) > 1 else '')
        clip, own_notes = checked_clip(row, name, facts, seen)
        clips.append(clip)
        notes += own_notes
    return clips, notes


def checked_clip(row, name, facts, seen):
    """
    A clip as a user gives it, a dict of text, audio, vision and id -> (dict(id, text, audio,
    vision), notes). Frames are float32 [S,d], or [0,d] where a stream is left out; NaN and inf
    become 0. The notes are sentences on what was repaired or is not used. `name`: of the clip, for
    messages; `facts`: corpus_facts of the run; `seen`: the modalities that the run reads
    (System.modalities_read). Raises ClipError.
    """
    notes, name = [], one_line(name)
    if not isinstance(row, dict):
        raise ClipError(f'{name} is no object: write {{"text": "..", "audio": [[..], ..]}}.')
    refuse_other_keys(row, name)
    if not isinstance(row.get('text', ''), str | None):
        raise ClipError(f"the text of {name} is no string: give one string.")
    row = {key: v for key, v in row.items() if v is not None}
    try:
        row.get('text', '').encode()
    except UnicodeEncodeError:
        raise ClipError(f"the text of {name} is no valid Unicode: correct it.") from None
    if not {'text', *STREAMS} & set(row):
        raise ClipError(f"{name} has neither text, nor audio, nor vision: add one of them.")
    clip = dict(id=one_line(str(row.get('id', name)))[:100], text=row.get('text', ''))
    for m in facts['widths']:
        clip[m] = frames_of(row, m, name, facts, notes)
    check_clip(clip, row, name, facts, seen, notes)
    return clip, notes


def frames_of(row, m, name, facts, notes):
    """ Frames [S,d] of a clip's stream m, [0,d] if left out; NaN and inf become 0, with a note. """
    d = facts['widths'][m]
    if m not in row:
        return np.zeros((0, d), np.float32)
    try:
        if np.iscomplexobj(row[m]):
            raise TypeError
        x = np.asarray(row[m], np.float32)  # [S,d]
    except (TypeError, ValueError, OverflowError):
        raise ClipError(f"{m} of {name} is no array of numbers: give [frames, {d}].") from None
    if x.size == 0:
        x = x.reshape(0, d)
    if x.ndim != 2:
        raise ClipError(f"{m} of {name} has shape {list(x.shape)}: give [frames, {d}], a row for "
                        "each frame.")
    if x.shape[1] != d:
        raise ClipError(f"{m} of {name} has shape {list(x.shape)}{extractor(m, x.shape[1])}, but "
                        f"this run was trained on {facts['name']}, whose frames are {d} wide"
                        f"{extractor(m, d)}: extract the same features.")
    if bad := int((~np.isfinite(x)).sum()):
        notes.append(f"{name}: {bad} values of {m} were NaN or inf and are replaced by 0")
    return np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def extractor(m, width):
    """ The public extractor that gives this width of stream m, as ' (COVAREP)', or ''. """
    return f" ({FEATURES[m, width]})" if (m, width) in FEATURES else ''


def check_clip(clip, row, name, facts, seen, notes):
    """ Note missing and unused modalities. Raises ClipError if none of the clip's is read. """
    present = [s for s in seen if len(clip['text'].strip() if s == 'text' else clip.get(s, []))]
    if not present:
        raise ClipError(f"{name} has none of the modalities that this run reads: add "
                        f"{' or '.join(seen)}.")
    if 'text' in seen and not clip['text'].strip():
        notes.append(f"{name}: its text is empty")
    for m in facts['widths']:
        if m in seen and not len(clip[m]):
            notes.append(f"{name}: there is no {m}")
        if m not in seen and len(clip[m]):
            notes.append(f"{name}: {m} is not used, as this run was trained without it")
    for m in STREAMS:
        if m in row and m not in facts['widths']:
            notes.append(f"{name}: {m} is not used, as the run's corpus has no such stream")


# ---------------------------------------------------------------------------------------------------------
# Export

def export(folder, result, where):
    """
    Write all that `eval.py where --clip=` needs into the folder `where`: the checkpoint, its JSON
    files, a model card, and a small local LM or tokenizer. `result` is read_run's dict. Only
    regular files are copied. The folder appears when it is complete. Returns its list of files as
    text. Raises ClipError.
    """
    if not SYSTEMS[result['about']['knobs']['system']].predicts:
        raise ClipError(f"{folder} is a language model, which predicts no score: share its folder "
                        "hf/, which Hugging Face's transformers can load.")
    if not where:
        raise ClipError("--export needs a folder: give --export=FOLDER.")
    where = os.path.abspath(where)
    is_empty = os.path.isdir(where) and not os.path.islink(where) and not os.listdir(where)
    if os.path.lexists(where) and not is_empty:
        raise ClipError(f"{where} already exists: give another folder to --export.")
    try:
        os.makedirs(os.path.dirname(where), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(where), prefix='.export-') as scratch:
            new = os.path.join(scratch, 'whole')
            os.mkdir(new)
            left_out = fill_export(folder, result, new)
            if os.path.isdir(where):
                os.rmdir(where)
            os.rename(new, where)
    except OSError as e:
        raise ClipError(f"cannot write {where} ({e.strerror or e}), and nothing was exported: free "
                        "disk space, or give another folder to --export.") from None
    except ModelError as e:
        raise ClipError(f"cannot export {folder}: {e}") from None
    return '\n'.join([f"{where}: " + ', '.join(sorted(os.listdir(where)))] + left_out)


def fill_export(folder, result, new):
    """ Write an export's files into the empty folder `new` -> a line for each file left out. """
    about, k = result['about'], result['about']['knobs']
    copied, left_out = '', []
    if 'text' in SYSTEMS[k['system']].modalities_read(k):
        # a new encoder has its weights in the checkpoint, and its tokenizer in hf/
        is_new = k['lm'] == 'new'
        source = text_model_folder(folder, k)
        if os.path.isdir(source) and copied_bytes(source) <= LARGEST_COPY:
            copied = 'hf' if is_new else 'lm'
            left_out = copy_regular_files(source, os.path.join(new, copied))
    card = card_of(result, copied)
    if copied == 'lm':
        k['lm'] = 'lm'   # beside the checkpoint
    empty = dict(needs=[], av_from='', out_dir='')
    k.update({knob: value for knob, value in empty.items() if knob in k})
    tensors, info = load_checkpoint(os.path.join(folder, 'best.safetensors'))
    save_checkpoint(os.path.join(new, 'best.safetensors'), tensors, info | dict(about=about))
    write_text(os.path.join(new, 'result.json'), json.dumps(sealed(result), indent=1))
    write_text(os.path.join(new, 'config.json'), json.dumps(about, indent=1))
    write_text(os.path.join(new, 'README.md'), card)
    return left_out


def text_model_folder(folder, k):
    """
    The folder of a run's LM, or of the tokenizer of a new encoder (lm='new'); the name of an LM on
    the hub.
    """
    if k['lm'] == 'lm' and os.path.isdir(os.path.join(folder, 'lm')):
        return os.path.join(folder, 'lm')   # this run is an export itself
    lm = folder if k['lm'] == 'new' else find_folder(k['lm'], folder, k['out_dir'])
    source = os.path.join(lm, 'hf')
    return source if os.path.isdir(source) else lm


def copied_bytes(source):
    """
    The bytes of the files of a folder tree; infinite if one of the top folder is a link to a file,
    as in a snapshot of the hub's cache, because an export contains no link.
    """
    n = 0
    for folder, _, files in os.walk(source):
        paths = [os.path.join(folder, file) for file in files]
        if folder == source and any(os.path.islink(p) and p.endswith(LM_FILES) for p in paths):
            return np.inf
        n += sum(os.lstat(path).st_size for path in paths)
    return n


def copy_regular_files(source, target):
    """ Copy the regular files of a folder tree -> a line for each link and special file. """
    os.mkdir(target)
    left_out = []
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            left_out += copy_regular_files(entry.path, os.path.join(target, entry.name))
        elif entry.is_file(follow_symlinks=False):
            copy = os.path.join(target, entry.name)
            with open_regular(entry.path, 'rb') as old, open(copy, 'xb') as new:
                shutil.copyfileobj(old, new)
        else:
            left_out.append(f"  not copied: {entry.path} is a link or a special file")
    return left_out


def card_of(result, lm_copied):
    """ README.md of an exported run: a model card with the header of the Hugging Face hub. """
    about, k = result['about'], result['about']['knobs']
    seen = SYSTEMS[k['system']].modalities_read(k)
    reads_text = 'text' in seen
    widths = ', '.join(f"{m} {w}{extractor(m, w)}"
                       for m, w in about['corpus']['widths'].items() if m in seen)
    test = result['test']
    metrics = ', '.join(f"{key} {test[key]:.3f}" for key in SHOWN if key in test)
    lm, base = '', ''
    if reads_text:
        lm = (f"Its language model, {k['lm']} (fingerprint {about['lm_fingerprint']}), is not "
              "included.")
        if lm_copied:
            part = 'tokenizer' if lm_copied == 'hf' else 'language model'
            lm = f'Its {part} is in {lm_copied}/.'
        base = '' if lm_copied or os.path.isdir(k['lm']) else f"base_model: {k['lm']}\n"
    unsaved = f", and none of the {result['n_frozen']:,} frozen ones" * (result['n_frozen'] > 0)
    reads = ' and '.join(['text'] * reads_text + [f'frames of {widths} features'] * bool(widths))
    return f"""---
library_name: nanomsa
tags: [multimodal-sentiment-analysis, {k['system']}]
{base}---

# {about['name']}

The system {k['system']} of nanoMSA, trained on the corpus {about['corpus']['name']} (source file
with SHA-256 {about['corpus']['sha256'][:16]}..) at commit {about['commit']} with

    {about['command']}

Label: {k['label']}, {label_text(result['info'])}. Test set of the same corpus, one seed: {metrics}.

Input: {reads}. Features must be raw: they are standardised with the mean and std in config.json.
{lm}

To predict a clip, in a checkout of nanoMSA:

    python eval.py THIS_FOLDER --clip=mine.npz

best.safetensors holds the {result['n_trainable']:,} trained weights{unsaved}.

Not tested on other speakers, languages, recording conditions or feature extractors than those of
its corpus.
"""


def label_text(info):
    """ A label's entry in meta.json as text: 'a score in [-3, 3]', 'one of sad, happy'. """
    if info['kind'] == 'classes':
        return f"one of {', '.join(info['names'])}"
    return f"a score in [{info['range'][0]:g}, {info['range'][1]:g}]"
