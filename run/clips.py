"""
A user's own clips through a run: what it predicts, what each modality changes, and where it looks.
And runs for giving away.

    python eval.py out/RUN --clip=mine.npz      arrays text (a string), audio [S,d_a], vision [S,d_v]
    python eval.py out/RUN --clip=mine.jsonl    a line a clip: {"id": .., "text": .., "audio": [[..], ..]}
    python eval.py out/RUN --export=FOLDER      what another person needs of a run, and no corpus

Features must be those that the run was trained on, frame by frame, not standardised: the run does
that as it did in training.
"""
import json
import os
import shutil
import tempfile
import zipfile

import numpy as np

from corpora.names import SPLITS, STREAMS
from lm import ModelError
from metrics import SHOWN
from model import SYSTEMS
from run.folder import load_checkpoint, open_regular, save_checkpoint, write_text
from run.report import EvalError

# Public extractors by stream and width: so that a wrong width can be told by name
FEATURES = {
    ('audio', 74): 'COVAREP', ('audio', 33): 'librosa',
    ('audio', 25): 'eGeMAPS low-level descriptors', ('audio', 5): "MMSA's COVAREP selection",
    ('vision', 35): 'Facet', ('vision', 20): "MMSA's Facet selection",
    ('vision', 709): 'OpenFace 2', ('vision', 177): 'OpenFace 2, a selection'}
LARGEST_COPY = 200e6   # bytes of a local LM that an export takes along; a larger one is named in its card


class ClipError(Exception):
    """ A sentence for the user: what is wrong with a clip, and what to do. """


class Clips:
    """
    A user's own clips as a corpus: what Feed and System.build ask of data.Corpus, from the facts
    that a run has written down of its corpus. All splits are these clips; labels are the middle of
    the range. Without clips it has the corpus's numbers.
    """
    def __init__(self, facts, rows=None):
        # raw, whatever the corpus's folder holds: the mean and std are of raw features in either
        # case
        streams = {m: s | dict(standardised=False) for m, s in facts['streams'].items()}
        self.meta = dict(streams=streams, text=dict(upper_case=facts['upper_case']))
        self.widths, self.labels, self.rows = facts['widths'], facts['labels'], rows or []
        self.name, self.folder, self.sha256 = facts['name'], facts['folder'], facts['sha256']
        self.n_clips = facts['clips'] if rows is None else {split: len(rows) for split in SPLITS}

    def text(self, split):
        return [r['text'] for r in self.rows]

    def id(self, split):
        return [r['id'] for r in self.rows]

    def label(self, split, name='label'):
        info = self.labels[name]
        if info['kind'] == 'classes':
            return np.zeros(len(self.rows), np.int64)  # [N]
        return np.full(len(self.rows), sum(info['range']) / 2, np.float32)  # [N]

    def lengths(self, split, stream):
        return np.array([len(r[stream]) for r in self.rows])  # [N]

    def frames(self, split, stream, i):
        return self.rows[i][stream]  # [S,d]


class Transferred:
    """
    Another corpus as a run knows corpora: with the widths and the normaliser of its own, and
    `modalities` alone.
    """
    def __init__(self, other, home, modalities):
        self.other, self.home, self.modalities = other, home, modalities
        self.widths, self.labels, self.n_clips = home.widths, other.labels, other.n_clips
        self.name, self.folder, self.sha256 = other.name, other.folder, other.sha256
        self.meta = other.meta | dict(streams={m: self.stream(m) for m in home.widths})

    def stream(self, m):
        """
        The entry of a stream in meta.json; one that is left out has no frames, so nothing is done
        to them.
        """
        home = self.home.meta['streams'][m]
        if m not in self.modalities:
            return home | dict(standardised=True)
        other = self.other.meta['streams'][m]
        if other['standardised']:
            raise EvalError(f"{self.folder} holds {m} standardised by its own mean: convert it with "
                            "--dtype=float32.")
        return other | {key: home[key] for key in ('mean', 'std')}

    def text(self, split):
        return self.other.text(split)

    def id(self, split):
        return self.other.id(split)

    def label(self, split, name='label'):
        return self.other.label(split, name)

    def frames(self, split, m, i):
        """ Clip i of a stream, [S,d]. """
        if m in self.modalities:
            return self.other.frames(split, m, i)
        return np.zeros((0, self.widths[m]), np.float32)

    def lengths(self, split, m):
        return np.array([len(self.frames(split, m, i)) for i in range(self.n_clips[split])])  # [N]


def facts_of(corpus):
    """
    What a run must know of its corpus to read a clip that is not in it: goes into config.json and
    every checkpoint.
    """
    streams = {}
    for m, s in corpus.meta['streams'].items():
        streams[m] = {key: s[key] for key in ('width', 'mean', 'std', 'standardised')}
    return dict(folder=corpus.folder, sha256=corpus.sha256, name=corpus.name, widths=corpus.widths, streams=streams,
                labels=corpus.labels, clips=corpus.n_clips, upper_case=corpus.meta['text']['upper_case'])


# ---------------------------------------------------------------------------------------------------------
# Reading clips

def read_rows(path):
    """ The clips of a .npz or .jsonl as a list of dicts, unchecked. Raises ClipError. """
    try:
        if path.endswith('.npz'):
            with open_regular(path, 'rb', follow=True) as file, np.load(file, allow_pickle=False) as f:
                row = {key: f[key] for key in f.files}
            return [{key: v.item() if key in ('text', 'id') and v.ndim == 0 else v for key, v in row.items()}]
        if path.endswith('.jsonl'):
            with open_regular(path, follow=True) as f:
                return [json.loads(line) for line in f if line.strip()]
    except (OSError, ValueError, TypeError, EOFError, AttributeError, RecursionError, zipfile.BadZipFile) as e:
        raise ClipError(f"{path} cannot be read ({getattr(e, 'strerror', None) or e}).") from None
    raise ClipError(f"{path} is neither a .npz nor a .jsonl.")


def read_clips(path, facts, seen=('text', *STREAMS)):
    """
    A .npz or .jsonl as rows of id, text, audio and vision (float32 [S,d], [0,d] where left out; NaN
    and inf become 0), and sentences about what was repaired or is not used; `seen` is what the run
    looks at (System.modalities_read). Raises ClipError.
    """
    rows = read_rows(path)
    if not rows:
        raise ClipError(f"{path} holds no clip.")
    clips, notes = [], []
    for n, row in enumerate(rows):
        name = os.path.basename(path) + (f', clip {n}' if len(rows) > 1 else '')
        if not isinstance(row, dict) or not isinstance(row.get('text', ''), str) or set(row) - {'id', 'text', *STREAMS}:
            raise ClipError(f"{name} must hold text (one string), audio and vision (and id), "
                            "nothing else.")
        row = {key: v for key, v in row.items() if v is not None}
        try:
            row.get('text', '').encode()
        except UnicodeEncodeError:
            raise ClipError(f"the text of {name} is no valid Unicode.") from None
        if not {'text', *STREAMS} & set(row):
            raise ClipError(f"{name} has neither text, nor audio, nor vision.")
        clip = dict(id=str(row.get('id', name)), text=row.get('text', ''))
        for m in facts['widths']:
            clip[m] = frames_of(row, m, name, facts, notes)
        check_clip(clip, row, name, facts, seen, notes)
        clips.append(clip)
    return clips, notes


def frames_of(row, m, name, facts, notes):
    """
    The frames of one stream of a clip, [S,d], or [0,d] where it is left out; NaN and inf become 0.
    Raises ClipError.
    """
    d = facts['widths'][m]
    if m not in row:
        return np.zeros((0, d), np.float32)
    try:
        x = np.asarray(row[m], np.float32)  # [S,d]
    except (TypeError, ValueError, OverflowError):
        raise ClipError(f"{m} of {name} is no array of numbers [frames, {d}].") from None
    if x.size == 0:
        x = x.reshape(0, d)
    if x.ndim != 2:
        raise ClipError(f"{m} of {name} is an array {list(x.shape)}: give its frames one a row, "
                        f"[frames, {d}].")
    if x.shape[1] != d:
        raise ClipError(f"{m} of {name} is {list(x.shape)}{extractor(m, x.shape[1])}, and this run "
                        f"was trained on frames {d} wide{extractor(m, d)}, as {facts['name']} has "
                        "them: extract the same features.")
    if bad := int((~np.isfinite(x)).sum()):
        notes.append(f"{name}: {bad} values of {m} were NaN or inf, and are 0")
    return np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def extractor(m, width):
    """ ' (COVAREP)' where a public extractor gives this width of a stream, else ''. """
    return f" ({FEATURES[m, width]})" if (m, width) in FEATURES else ''


def check_clip(clip, row, name, facts, seen, notes):
    """
    Notes what is missing from a clip or not used. Raises ClipError where it has nothing that the
    run looks at.
    """
    present = [s for s in seen if s in clip and (clip['text'].strip() if s == 'text' else len(clip[s]))]
    if not present:
        raise ClipError(f"{name} is empty: it has nothing that this run looks at, "
                        f"{' or '.join(seen)}.")
    if 'text' in seen and not clip['text'].strip():
        notes.append(f"{name}: its text is empty")
    for m in facts['widths']:
        if m in seen and not len(clip[m]):
            notes.append(f"{name}: {m} is not there, and arrives empty")
        if m not in seen and len(clip[m]):
            notes.append(f"{name}: {m} is nothing that this run was trained to see")
    for m in STREAMS:
        if m in row and m not in facts['widths']:
            notes.append(f"{name}: {m} is a stream that this run does not know, and is left out")


# ---------------------------------------------------------------------------------------------------------
# What a run predicts for them

def opinions(run, clips):
    """
    What a run (eval.revive) predicts for clips, as the text of a report: score or class, an
    interval or probabilities where it has them, and how that changes when a modality is taken away.
    Returns the report and the prediction of each clip [N].
    """
    k, seen = run.knobs, run.system.modalities_read(run.knobs)
    whole, without = predict_clips(run, clips), {}
    for m in k['modalities']:
        if m in run.facts['widths'] and m in run.system.streams(k):
            without[m] = predict_clips(run, clips, [other for other in k['modalities'] if other != m])
    if 'text' in seen:
        without['text'] = predict_clips(run, [r | dict(text='') for r in clips])
    lines = []
    for i, clip in enumerate(clips):
        lines.append(f"{clip['id']}: {prediction_text(run, whole, i)}")
        for m, other in without.items():
            lines.append(f"  without {m}: {change_text(run, whole, other, i)}")
    return '\n'.join(lines), whole['pred']


def predict_clips(run, rows, modalities=None):
    """
    What run.predict gives for clips, as arrays [N] or [N,K], one by one, so that none is padded.
    Raises ClipError.
    """
    modalities = run.knobs['modalities'] if modalities is None else modalities
    feed = run.feed(Clips(run.facts, rows), run.knobs | dict(modalities=modalities))
    each = [run.predict(feed('test', np.array([i]))) for i in range(len(rows))]
    out = {name: np.concatenate([o[name].float().cpu().numpy() for o in each]) for name in each[0]}  # [N] or [N,K]
    for name, values in out.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))  # clips
        if len(bad):
            raise ClipError(f"the run's {name} of {rows[bad[0]]['id']} is NaN or inf, so it has no "
                            "score: look for frames far outside the training data, such as values "
                            "near 1e38.")
    return out


def class_name(run, number):
    return run.info['names'][int(number)] if number >= 0 else 'no class'


def prediction_text(run, out, i):
    """ The prediction of clip i in words. """
    info, pred, prob = run.info, out['pred'][i], out['prob'][i] if 'prob' in out else None
    if info['kind'] == 'classes':
        text = class_name(run, pred)
        if prob is not None:
            text += '  (' + ', '.join(f'{n} {p:.2f}' for n, p in zip(info['names'], prob)) + ')'
        return text
    text = f'{pred:+.2f} in [{info["range"][0]:g}, {info["range"][1]:g}]'
    if prob is None:
        return text + f"; on its own test set it errs by {run.result['test']['mae']:.2f} on average"
    # over the labels that can be said, in ascending order
    at = [min(int((prob.cumsum() < q).sum()), len(prob) - 1) for q in (0.1, 0.9)]
    low, high = np.asarray(run.values)[at]
    return text + f', 80 % of its probability in [{low:+.1f}, {high:+.1f}]'


def change_text(run, whole, other, i):
    """ How the prediction of clip i differs in `other`, in words. """
    pred, instead = whole['pred'][i], other['pred'][i]
    if run.info['kind'] != 'classes':
        return f"{instead:+.2f} ({instead - pred:+.2f})"
    text = class_name(run, instead)
    if 'prob' in whole and pred >= 0:
        change = other['prob'][i][int(pred)] - whole['prob'][i][int(pred)]
        text += f", probability of {class_name(run, pred)} {change:+.2f}"
    return text


# ---------------------------------------------------------------------------------------------------------
# Export

def export(folder, result, where):
    """
    Writes what `eval.py where --clip=` needs: the checkpoint, its JSON, a card, and a small local
    LM or tokenizer. `result` is read_run's. Regular files alone are copied. `where` is there when
    it is whole. Raises ClipError.
    """
    if not SYSTEMS[result['about']['knobs']['system']].predicts:
        raise ClipError(f"{folder} is a language model and says no score: its folder hf/ is one for "
                        "Hugging Face.")
    if not where:
        raise ClipError("--export wants a folder: --export=FOLDER.")
    where = os.path.abspath(where)
    if os.path.lexists(where) and (os.path.islink(where) or not os.path.isdir(where) or os.listdir(where)):
        raise ClipError(f"{where} is there already: give another --export.")
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
        raise ClipError(f"cannot write {where} ({e.strerror or e}): nothing is left of the "
                        "export.") from None
    except ModelError as e:
        raise ClipError(f"cannot export {folder}: {e}") from None
    return '\n'.join([f"{where}: " + ', '.join(sorted(os.listdir(where)))] + left_out)


def fill_export(folder, result, new):
    """
    Writes the files of an export into the empty folder `new`. Returns a line for each file that was
    left out.
    """
    about, k = result['about'], result['about']['knobs']
    copied, left_out = '', []
    if 'text' in SYSTEMS[k['system']].modalities_read(k):
        # an encoder from nothing has its weights in the checkpoint and its tokenizer in hf/
        from_nothing = k['lm'] == 'new'
        source = text_model_folder(folder, k)
        size = np.inf
        if os.path.isdir(source):
            size = sum(e.stat(follow_symlinks=False).st_size for e in os.scandir(source))
        if size <= LARGEST_COPY:
            copied = 'hf' if from_nothing else 'lm'
            left_out = copy_regular_files(source, os.path.join(new, copied))
    card = card_of(result, copied)
    if copied == 'lm':
        k['lm'] = 'lm'   # beside the checkpoint
    k.update({knob: empty for knob, empty in dict(needs=[], av_from='', out_dir='').items() if knob in k})
    tensors, info = load_checkpoint(os.path.join(folder, 'best.safetensors'))
    save_checkpoint(os.path.join(new, 'best.safetensors'), tensors, info | dict(about=about))
    write_text(os.path.join(new, 'result.json'), json.dumps(result, indent=1))
    write_text(os.path.join(new, 'config.json'), json.dumps(about, indent=1))
    write_text(os.path.join(new, 'README.md'), card)
    return left_out


def text_model_folder(folder, k):
    """
    The folder of a run's LM or, where its encoder was made from nothing, of its tokenizer; a name,
    for one of the hub.
    """
    if k['lm'] == 'lm' and os.path.isdir(os.path.join(folder, 'lm')):
        return os.path.join(folder, 'lm')   # this run is an export itself
    source = os.path.join(folder if k['lm'] == 'new' else k['lm'], 'hf')
    return source if os.path.isdir(source) else k['lm']


def copy_regular_files(source, target):
    """
    Copies the regular files of a folder, and of the folders in it. Returns a line for each link and
    special file.
    """
    os.mkdir(target)
    left_out = []
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        if entry.is_dir(follow_symlinks=False):
            left_out += copy_regular_files(entry.path, os.path.join(target, entry.name))
        elif entry.is_file(follow_symlinks=False):
            with open_regular(entry.path, 'rb') as old, open(os.path.join(target, entry.name), 'xb') as new:
                shutil.copyfileobj(old, new)
        else:
            left_out.append(f"  left out: {entry.path} is a link or a special file")
    return left_out


def card_of(result, lm_copied):
    """ README.md of an exported run, with the header that the Hugging Face hub reads. """
    about, k = result['about'], result['about']['knobs']
    seen = SYSTEMS[k['system']].modalities_read(k)
    reads_text = 'text' in seen
    widths = ', '.join(f"{m} {w}{extractor(m, w)}"
                       for m, w in about['corpus']['widths'].items() if m in seen)
    metrics = ', '.join(f"{key} {result['test'][key]:.3f}" for key in SHOWN if key in result['test'])
    lm, base = 'none', ''
    if reads_text:
        lm = f'in {lm_copied}/' if lm_copied else f"{k['lm']} (fingerprint {about['lm_fingerprint']}; not in here)"
        base = '' if lm_copied or os.path.isdir(k['lm']) else f"base_model: {k['lm']}\n"
    reads = ' and '.join(['text'] * reads_text + [f'frames of {widths}'] * bool(widths))
    return f"""---
library_name: nanomsa
tags: [multimodal-sentiment-analysis, {k['system']}]
{base}---

# {about['name']}

{k['system']} of nanoMSA, trained on {about['corpus']['name']} (SHA-256 {about['corpus']['sha256'][:16]}..) by

    {about['command']}

at commit {about['commit']}. Label: {k['label']}, {result['info']}. Test set of that corpus, one seed: {metrics}.

It reads {reads}, not standardised (config.json has their mean and std). Text model: {lm}.

    python eval.py THIS_FOLDER --clip=mine.npz

in a checkout of nanoMSA. best.safetensors holds the trained weights, {result['n_trainable']:,},
and nothing of a frozen LM.

What it was not tested on: other speakers, languages, recording conditions or feature extractors than its corpus's.
"""
