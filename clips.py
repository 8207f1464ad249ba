"""
Clips of one's own, through a run: what it says of them, what each modality changes, and where it looks.

    python eval.py out/RUN --clip=mine.npz         arrays text (a string), audio [S,d_a], vision [S,d_v]; a modality may be left out
    python eval.py out/RUN --clip=mine.jsonl       a line a clip: {"id": .., "text": .., "audio": [[..], ..], "vision": [[..], ..]}
    python eval.py out/RUN --export=FOLDER         what a stranger needs of a run, and no corpus: eval.py FOLDER --clip=.. works there

Features must be those that the run was trained on, frame by frame, not standardised: the run does that as it did in training.
"""
import json
import os
import shutil
import tempfile
import zipfile

import numpy as np

from data import SPLITS, STREAMS
from files import open_regular, write_text
from lm import ModelError
from model import load_checkpoint, save_checkpoint

# Public extractors by stream and width: so that a wrong width can be told by name
FEATURES = {('audio', 74): 'COVAREP', ('audio', 33): 'librosa', ('audio', 25): 'eGeMAPS low-level descriptors',
            ('audio', 5): "MMSA's COVAREP selection", ('vision', 35): 'Facet', ('vision', 20): "MMSA's Facet selection",
            ('vision', 709): 'OpenFace 2', ('vision', 177): 'OpenFace 2, a selection'}
LARGEST_COPY = 200e6   # bytes of a local LM that an export takes along; a larger one is named in its card


class ClipError(Exception):
    """ A sentence for the user: what is wrong with a clip, and what to do. """


class Clips:
    """ Clips of one's own as a corpus: what Feed and build ask of data.Corpus, from the facts that a run has written down of
    its corpus. All splits are these clips; labels are the middle of the range. Without clips it has the corpus's numbers. """
    def __init__(self, facts, rows=None):
        # raw, whatever the corpus's folder holds: the mean and std are of raw features in either case
        self.meta = dict(streams={m: s | dict(standardised=False) for m, s in facts['streams'].items()}, text=dict(upper_case=facts['upper_case']))
        self.widths, self.labels, self.rows = facts['widths'], facts['labels'], rows or []
        self.name, self.folder, self.sha256 = facts['name'], facts['folder'], facts['sha256']
        self.n_clips = {split: len(rows) for split in SPLITS} if rows is not None else facts['clips']

    def text(self, split): return [r['text'] for r in self.rows]

    def id(self, split): return [r['id'] for r in self.rows]

    def label(self, split, name='label'):
        info = self.labels[name]
        if info['kind'] == 'classes': return np.zeros(len(self.rows), np.int64)
        return np.full(len(self.rows), sum(info['range']) / 2, np.float32)                       # [N]

    def lengths(self, split, stream): return np.array([len(r[stream]) for r in self.rows])       # [N]

    def frames(self, split, stream, i): return self.rows[i][stream]                              # [S,d]


def facts_of(corpus):
    """ What a run must know of its corpus to read a clip that is not in it: goes into config.json and every checkpoint. """
    streams = {m: {k: s[k] for k in ('width', 'mean', 'std', 'standardised')} for m, s in corpus.meta['streams'].items()}
    return dict(folder=corpus.folder, sha256=corpus.sha256, name=corpus.name, widths=corpus.widths, streams=streams, labels=corpus.labels,
                clips=corpus.n_clips, upper_case=corpus.meta['text']['upper_case'])


def seen_by(c):
    """ What a run of knobs c looks at, of 'text', 'audio' and 'vision'. """
    streams = c['late_streams'] if c['system'] == 'late' else ['text', *c['modalities']]
    return [s for s in streams if s in c['modalities'] or s == 'text' and c['system'] != 'av']


def read_clips(path, facts, seen=('text', *STREAMS)):
    """
    A .npz or .jsonl as rows of id, text, audio and vision (float32 [S,d], [0,d] where left out; NaN and inf become 0), and a list
    of what was mended, or is not as one may think; `seen` is what the run looks at (seen_by). Raises ClipError.
    """
    try:
        if path.endswith('.npz'):
            with open_regular(path, 'rb', follow=True) as file, np.load(file, allow_pickle=False) as f: rows = [{k: f[k] for k in f.files}]
            rows[0] = {k: v.item() if k in ('text', 'id') and v.ndim == 0 else v for k, v in rows[0].items()}
        elif path.endswith('.jsonl'):
            with open_regular(path, follow=True) as f: rows = [json.loads(line) for line in f if line.strip()]
        else: raise ClipError(f"{path} is neither a .npz nor a .jsonl.")
    except (OSError, ValueError, TypeError, EOFError, AttributeError, RecursionError, zipfile.BadZipFile) as e:
        raise ClipError(f"{path} cannot be read ({getattr(e, 'strerror', None) or e}).") from None
    if not rows: raise ClipError(f"{path} holds no clip.")
    clips, mended = [], []
    for n, row in enumerate(rows):
        name = os.path.basename(path) + (f', clip {n}' if len(rows) > 1 else '')
        if not isinstance(row, dict) or not isinstance(row.get('text', ''), str) or set(row) - {'id', 'text', *STREAMS}:
            raise ClipError(f"{name} must hold text (one string), audio and vision (and id), nothing else.")
        row = {k: v for k, v in row.items() if v is not None}
        try: row.get('text', '').encode()
        except UnicodeEncodeError: raise ClipError(f"the text of {name} is no valid Unicode.") from None
        if not {'text', *STREAMS} & set(row): raise ClipError(f"{name} has neither text, nor audio, nor vision.")
        clip = dict(id=str(row.get('id', name)), text=row.get('text', ''))
        for m, d in facts['widths'].items():
            try: x = np.zeros((0, d), np.float32) if m not in row else np.asarray(row[m], np.float32)    # [S,d]
            except (TypeError, ValueError, OverflowError): raise ClipError(f"{m} of {name} is no array of numbers [frames, {d}].") from None
            if x.size == 0: x = x.reshape(0, d)
            if x.ndim != 2 or x.shape[1] != d:
                known = lambda width: f" ({FEATURES[m, width]})" if (m, width) in FEATURES else ''
                if x.ndim != 2: raise ClipError(f"{m} of {name} is an array {list(x.shape)}: give its frames one a row, [frames, {d}].")
                raise ClipError(f"{m} of {name} is {list(x.shape)}{known(x.shape[1])}, and this run was trained on frames {d} wide{known(d)}, as "
                                f"{facts['name']} has them: extract the same features.")
            if bad := int((~np.isfinite(x)).sum()): mended.append(f"{name}: {bad} values of {m} were NaN or inf, and are 0")
            clip[m] = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        if not any(len(clip[s]) if s != 'text' else clip['text'].strip() for s in seen if s in clip):
            raise ClipError(f"{name} is empty: it has nothing that this run looks at, {' or '.join(seen)}.")
        if 'text' in seen and not clip['text'].strip(): mended.append(f"{name}: its text is empty")
        mended += [f"{name}: {m} is not there, and arrives empty" for m in facts['widths'] if m in seen and not len(clip[m])]
        mended += [f"{name}: {m} is nothing that this run was trained to see" for m in facts['widths'] if m not in seen and len(clip[m])]
        mended += [f"{name}: {m} is a stream that this run does not know, and is left out" for m in STREAMS if m in row and m not in facts['widths']]
        clips.append(clip)
    return clips, mended


def opinions(run, clips):
    """
    What a run (eval.revive) says of clips, as the text of a report: score or class, an interval or probabilities where it has them,
    and how that changes when a modality is taken away. Returns the report and the prediction of each clip [N].
    """
    c, info = run.knobs, run.info
    def predict(rows, modalities=c['modalities']):
        feed = run.feed(Clips(run.facts, rows), c | dict(modalities=modalities))
        out = [run.predict(feed('test', np.array([i]))) for i in range(len(rows))]               # one by one: nobody's padding
        out = {k: np.concatenate([o[k].float().cpu().numpy() for o in out]) for k in out[0]}     # [N] or [N,K]
        for name, values in out.items():
            bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))           # clips
            if len(bad):
                raise ClipError(f"the run's {name} of {rows[bad[0]]['id']} is NaN or inf, so it has no score: look for frames "
                                "far outside the training data, such as values near 1e38.")
        return out
    whole, less = predict(clips), {}
    for m in [m for m in c['modalities'] if m in run.facts['widths']]: less[m] = predict(clips, [k for k in c['modalities'] if k != m])
    if c['system'] != 'av': less['text'] = predict([r | dict(text='') for r in clips])
    lines = []
    for i, clip in enumerate(clips):
        pred, prob = whole['pred'][i], whole['prob'][i] if 'prob' in whole else None
        if info['kind'] == 'classes':
            name = lambda p: info['names'][int(p)] if p >= 0 else 'no class'
            k, said = int(pred), name(pred)
            if prob is not None: said += '  (' + ', '.join(f'{n} {p:.2f}' for n, p in zip(info['names'], prob)) + ')'
            less_sure = lambda other: '' if prob is None or k < 0 else f", probability of {info['names'][k]} {other['prob'][i][k] - prob[k]:+.2f}"
            change = lambda other: name(other['pred'][i]) + less_sure(other)
        else:
            said = f'{pred:+.2f} in [{info["range"][0]:g}, {info["range"][1]:g}]'
            if prob is not None:   # over the labels that can be said, in ascending order
                low, high = (np.asarray(run.values)[min(int((prob.cumsum() < q).sum()), len(prob) - 1)] for q in (0.1, 0.9))
                said += f', 80 % of its probability in [{low:+.1f}, {high:+.1f}]'
            else: said += f"; on its own test set it errs by {run.result['test']['mae']:.2f} on average"
            change = lambda other: f"{other['pred'][i]:+.2f} ({other['pred'][i] - pred:+.2f})"
        lines += [f"{clip['id']}: {said}"] + [f"  without {m}: {change(other)}" for m, other in less.items()]
    return '\n'.join(lines), whole['pred']


def card(result, lm_copied):
    """ README.md of an exported run, with the header that the Hugging Face hub reads. """
    about, c = result['about'], result['about']['knobs']
    seen = seen_by(c)
    reads_text = 'text' in seen
    widths = ', '.join(f"{m} {w}" + (f" ({FEATURES[m, w]})" if (m, w) in FEATURES else '') for m, w in about['corpus']['widths'].items() if m in seen)
    metrics = ', '.join(f'{k} {v:.3f}' for k, v in result['test'].items() if k in ('mae', 'corr', 'acc2_non0', 'acc7', 'acc', 'wf1'))
    lm = 'none' if not reads_text else f'in {lm_copied}/' if lm_copied else f"{c['lm']} (fingerprint {about['lm_fingerprint']}; not in here)"
    base = '' if lm_copied or not reads_text or os.path.isdir(c['lm']) else f"base_model: {c['lm']}\n"
    return (f"---\nlibrary_name: nanomsa\ntags: [multimodal-sentiment-analysis, {c['system']}]\n{base}---\n\n# {about['name']}\n\n"
            f"{c['system']} of nanoMSA, trained on {about['corpus']['name']} (SHA-256 {about['corpus']['sha256'][:16]}..) by\n\n    {about['command']}\n\n"
            f"at commit {about['commit']}. Label: {c['label']}, {result['info']}. Test set of that corpus, one seed: {metrics}.\n\n"
            f"It reads {' and '.join(['text'] * reads_text + [f'frames of {widths}'] * bool(widths))}, not standardised (config.json has their mean and std). "
            f"Text model: {lm}.\n\n"
            f"    python eval.py THIS_FOLDER --clip=mine.npz\n\nin a checkout of nanoMSA. best.safetensors holds what was trained, "
            f"{result['n_trainable']:,} weights, and nothing of a frozen LM.\n\nWhat it was not tested on: other speakers, languages, recording conditions or feature "
            "extractors than its corpus's.\n")


def export(folder, result, where):
    """
    Writes what `eval.py where --clip=` needs: the checkpoint, its JSON, a card, and a small local LM or tokenizer. `result` is
    read_run's. Regular files alone are copied. `where` is there when it is whole. Raises ClipError.
    """
    if result['about']['knobs']['system'] == 'lm':
        raise ClipError(f"{folder} is a language model and says no score: its folder hf/ is one for Hugging Face.")
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
        raise ClipError(f"cannot write {where} ({e.strerror or e}): nothing is left of the export.") from None
    except ModelError as e:
        raise ClipError(f"cannot export {folder}: {e}") from None
    return '\n'.join([f"{where}: " + ', '.join(sorted(os.listdir(where)))] + left_out)


def fill_export(folder, result, new):
    """ Writes the files of an export into the empty folder `new`. Returns a line for each file that was left out. """
    about, c = result['about'], result['about']['knobs']
    from_nothing = c['lm'] == 'new'   # an encoder from nothing: its weights are in the checkpoint, its tokenizer in hf/
    source = os.path.join(folder if from_nothing else c['lm'], 'hf')
    if not from_nothing and os.path.isdir(os.path.join(folder, c['lm'])) and c['lm'] == 'lm':
        source = os.path.join(folder, 'lm')   # this run is an export itself
    if not os.path.isdir(source):
        source = c['lm']
    size = sum(e.stat(follow_symlinks=False).st_size for e in os.scandir(source)) if os.path.isdir(source) else np.inf
    copied, left_out = '', []
    if c['system'] != 'av' and size <= LARGEST_COPY:
        copied = 'hf' if from_nothing else 'lm'
        left_out = copy_regular_files(source, os.path.join(new, copied))
    words = card(result, copied)
    if copied == 'lm':
        c['lm'] = 'lm'   # beside the checkpoint
    c.update(needs=[], av_from='', out_dir='')
    tensors, info = load_checkpoint(os.path.join(folder, 'best.safetensors'))
    save_checkpoint(os.path.join(new, 'best.safetensors'), tensors, info | dict(about=about))
    write_text(os.path.join(new, 'result.json'), json.dumps(result, indent=1))
    write_text(os.path.join(new, 'config.json'), json.dumps(about, indent=1))
    write_text(os.path.join(new, 'README.md'), words)
    return left_out


def copy_regular_files(source, target):
    """ Copies the regular files of a folder, and of the folders in it. Returns a line for each link and special file. """
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
