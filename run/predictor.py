"""
Predicts a user's own clips with a finished run: those of a file (python eval.py RUN --clip=FILE),
and in Python, from any working directory:

    import sys
    sys.path.append('nanomsa')   # the checkout
    from eval import load
    run = load('out/deepmlf_toy')
    run.predict(text='i loved it', audio=audio, vision=vision)   # arrays [S,d] of raw features
    run.predict(text=['i loved it', 'i hated it'])               # several clips -> a list
    run.explain(dict(text='i loved it', audio=audio))
    run.evaluate()

Axis letters: N clips, S frames, d features of a frame, K labels.
"""
import copy
import os
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from corpora.names import STREAMS
from data import open_corpus
from metrics import central_interval
from run.clips import (
    ClipError,
    Clips,
    checked_clip,
    is_copy,
    label_text,
    one_line,
    read_clips,
)
from run.finished import EvalError
from run.folder import find_folder
from run.pictures import attention_of, draw_attention


class Predictor:
    """
    A finished run as notebooks and scripts use it; eval.load makes it. Its methods raise ClipError
    (a ValueError), EvalError, ModelError or CorpusError, each with one sentence for the user.
    """
    def __init__(self, run):
        self.run = run   # load_run's namespace
        self.reads = run.system.modalities_read(run.knobs)
        refuse_lm(run)

    def __repr__(self):
        about = self.run.result['about']
        widths = self.run.facts['widths']
        reads = [m if m == 'text' else f'{m} [S, {widths[m]}]'
                 for m in self.reads if m == 'text' or m in widths]
        return (f"{about['name']}: {self.run.knobs['system']} on {self.run.facts['name']}, reads "
                f"{', '.join(reads)}, predicts {label_text(self.run.info)}")

    def predict(self, text=None, audio=None, vision=None):
        """
        Predict one clip, or several if each argument is a list (or an array with one more axis) of
        the same length; None in a list is a clip without that stream. Frames are arrays [S,d] of
        raw features. Returns a dict for each clip: `score`, `interval` and `interval_is` (what the
        interval holds), or `class`; `probabilities` by label if the system gives them; `notes`,
        sentences on what is missing or not used.
        """
        given = dict(text=text, audio=audio, vision=vision)
        rows, is_list = rows_of({name: v for name, v in given.items() if v is not None})
        clips, notes = self._checked(rows, is_list)
        with reading_clips(self.run) as run:
            feed = feed_of(run, clips)
            out = predict_clips(run, feed)
        more = truncation_notes(feed)
        found = [prediction(run, out, i) | dict(notes=notes[i] + more) for i in range(len(clips))]
        return found if is_list else found[0]

    def explain(self, clip):
        """
        The prediction of one clip, dict(text=.., audio=.., vision=..), and what it rests on ->
        predict's dict with two more entries. `without`: modality -> the prediction without it and
        its `change`, that of the score or of the predicted class's probability. `attention`: name
        -> dict(weights [rows,columns], rows, columns), empty if the system has no attention.
        """
        if not isinstance(clip, dict):
            raise ClipError("explain takes one clip as dict(text=.., audio=.., vision=..), and "
                            f"this is a {type(clip).__name__}: name its modalities.")
        rows, is_list = rows_of({name: v for name, v in clip.items() if v is not None})
        if is_list:
            raise ClipError("explain takes one clip, and this is a list of clips: call it for each "
                            "of them.")
        clips, notes = self._checked(rows, is_list)
        with reading_clips(self.run) as run:
            feed, whole, without = predict_without_each(run, clips)
            views = attention_of(run, feed('test', np.array([0])))
        attention = {}
        for name, (weights, rows, columns) in views.items():
            attention[name] = dict(weights=weights.float().cpu().numpy(), rows=rows, columns=columns)
        changes = {m: changed_prediction(run, whole, other, 0) for m, other in without.items()}
        notes = notes[0] + truncation_notes(feed)
        return prediction(run, whole, 0) | dict(notes=notes, without=changes, attention=attention)

    def evaluate(self, corpus=None, modalities=None):
        """
        Test metrics of the run by name: on its own test set, or on that of another corpus (a name
        or a folder, as for --corpus=). modalities: those that are used, such as ('text', 'audio');
        None for all that the run reads. The text is always read. Writes nothing into the run's folder.
        """
        run = self.run
        unknown = sorted(set(modalities or ()) - {'text', *STREAMS})
        if unknown or isinstance(modalities, str):
            raise EvalError(f"modalities={modalities!r} must be a list of text, audio or vision.")
        k = knobs_with(run, modalities)
        if corpus is None:
            other = run.own_corpus()
        else:
            other = open_corpus(find_folder(str(corpus)), k['data_dir'])
            if not is_copy(run.facts, other):
                other = transferred(run, other, k['modalities'])
        metrics, _ = run.test(other, k)
        return metrics

    def _checked(self, rows, is_list):
        """ rows_of's clips, checked -> (list of checked_clip's dicts, a list of notes for each). """
        clips, notes = [], []
        for n, row in enumerate(rows):
            name = f'clip {n}' if is_list else 'the clip'
            row = {key: plain(v) for key, v in row.items()}
            clip, own_notes = checked_clip(row, name, self.run.facts, self.reads)
            for m in set(row) & set(self.run.facts['widths']):
                refuse_nan(row[m], m, name)
            clips.append(clip)
            notes.append(own_notes)
        return clips, notes


def refuse_lm(run):
    """ Raises EvalError if a run predicts no label. """
    if not run.system.predicts:
        raise EvalError(f"{run.folder} is a language model, which predicts no score: name another "
                        "run.")


# --------------------------------------------------------------------------------------------------
# What a user gives

def rows_of(given):
    """
    given: modality -> a clip's value, or a list of such values -> (a dict for each clip, whether
    they were lists). Raises ClipError.
    """
    if not given:
        raise ClipError("there is no clip to predict: give text=, audio= or vision=.")
    kinds = {name: is_list_of_clips(name, v) for name, v in given.items()}
    if len(set(kinds.values())) > 1:
        one = next(name for name, is_list in kinds.items() if not is_list)
        many = next(name for name, is_list in kinds.items() if is_list)
        raise ClipError(f"{one} is that of one clip and {many} is a list of clips: give both as "
                        "one clip, or both as lists of the same length.")
    if not any(kinds.values()):
        return [given], False
    lists = {name: list(v) for name, v in given.items()}
    lengths = {name: len(v) for name, v in lists.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ' and '.join(f'{name} {n}' for name, n in lengths.items())
        raise ClipError(f"the lists hold different numbers of clips or none ({counts}): give one "
                        "entry for each clip, None where a clip lacks that stream.")
    rows = [dict(zip(lists, values)) for values in zip(*lists.values())]
    return [{name: v for name, v in row.items() if v is not None} for row in rows], True


def is_list_of_clips(name, value):
    if name == 'text':
        return not isinstance(value, (str, bytes)) and depth_of(value) > 0
    return depth_of(value) > 2


def depth_of(value):
    """
    The number of axes of an array, of a tensor or of nested lists. None in a list stands for the
    frames of a clip, so it has two axes.
    """
    if value is None:
        return 2
    if hasattr(value, 'ndim') and str(getattr(value, 'dtype', '')) != 'object':
        return value.ndim
    if isinstance(value, (str, bytes)) or not hasattr(value, '__iter__'):
        return 0
    return 1 + max((depth_of(v) for v in value), default=0)


def plain(value):
    """ A PyTorch tensor on any device as an array, and an array of one string as a str. """
    if hasattr(value, 'detach'):
        return value.detach().float().cpu().numpy()
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def refuse_nan(value, m, name):
    """ Raises ClipError if frames, which checked_clip has accepted, have values that are NaN or inf. """
    bad = ~np.isfinite(np.asarray(value, np.float32))
    if bad.any():
        raise ClipError(f"{m} of {name} has {int(bad.sum())} values that are NaN or inf: replace "
                        f"them, for example by 0 with np.nan_to_num({m}, posinf=0, neginf=0).")


# --------------------------------------------------------------------------------------------------
# Predictions

@contextmanager
def reading_clips(run):
    """
    Yields the run (eval.load_run) with the knobs that a user's clips need. Features of their texts
    by a frozen LM are kept in a temporary folder, and only within the block.
    """
    with tempfile.TemporaryDirectory() as scratch:
        k = run.knobs | dict(train_fraction=1.0, shuffle_streams=False, data_dir=scratch)
        try:
            yield SimpleNamespace(**vars(run) | dict(knobs=k))
        except (MemoryError, RuntimeError) as e:
            if 'memory' not in str(e):
                raise
            raise ClipError("a clip is too long for the memory of this machine: cut its frames into "
                            "several clips.") from None


def feed_of(run, clips, modalities=None):
    """ The Feed of clips (checked_clip) as a run reads them, with these modalities alone. """
    modalities = run.knobs['modalities'] if modalities is None else modalities
    return run.feed(Clips(run.facts, clips), run.knobs | dict(modalities=modalities))


def predict_clips(run, feed):
    """
    run.predict for the clips of feed_of -> {name: array [N] or [N,K]}. Each clip is predicted
    alone, so that none is padded. Raises ClipError.
    """
    clips = feed.corpus.id('test')
    each = [run.predict(feed('test', np.array([i]))) for i in range(len(clips))]
    out = {}
    for name in each[0]:
        out[name] = np.concatenate([o[name].float().cpu().numpy() for o in each])  # [N] or [N,K]
    for name, values in out.items():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))  # clips
        if len(bad):
            raise ClipError(f"the prediction ({name}) for {clips[bad[0]]} is NaN or inf: look for "
                            "frames far outside the training data, such as values near 1e38.")
    return out


def predict_without_each(run, clips):
    """
    Predict clips with all modalities and without each of them in turn -> (their Feed, predictions,
    {modality: predictions without it}).
    """
    k, without = run.knobs, {}
    feed = feed_of(run, clips)
    whole = predict_clips(run, feed)
    for m in k['modalities']:
        if m in run.facts['widths'] and m in run.system.streams(k):
            others = [other for other in k['modalities'] if other != m]
            without[m] = predict_clips(run, feed_of(run, clips, others))
    if 'text' in run.system.modalities_read(k):
        wordless = [clip | dict(text='') for clip in clips]
        without['text'] = predict_clips(run, feed_of(run, wordless))
    return feed, whole, without


def truncation_notes(feed):
    """ Feed's note on the texts of a user's clips, if any was truncated. """
    return [note for split, note in feed.truncated.items() if split == 'test']


def prediction(run, out, i):
    """ The prediction of clip i in predict_clips' arrays, as the dict of Predictor.predict. """
    pred, prob = out['pred'][i], out['prob'][i] if 'prob' in out else None
    if run.info['kind'] == 'classes':
        found = {'class': class_name(run, pred)}
        labels = run.info['names']
    else:
        score = float(pred)   # before the interval, whose ends float32 would round
        found = dict(score=score) | interval_of(run, score, prob)
        labels = run.values
    if prob is not None:
        found['probabilities'] = {label: float(p) for label, p in zip(labels, prob)}
    return found


def interval_of(run, score, prob):
    """ The interval of a score, and what it holds. prob [K], or None without probabilities. """
    if prob is None:
        mae = run.result['test']['mae']
        return dict(interval=(score - mae, score + mae),
                    interval_is="the score plus and minus the run's test MAE, which is that of "
                                "complete clips")
    # prob is over the labels that the prompt allows, in ascending order
    return dict(interval=central_interval(prob, run.values), interval_is='80 % of the probability')


def changed_prediction(run, whole, other, i):
    """
    The prediction of clip i in `other`, and its change from the one in `whole`: dict(score,
    change), or dict(class, change) with the change of the probability of the class in `whole`.
    """
    pred, new_pred = whole['pred'][i], other['pred'][i]
    if run.info['kind'] != 'classes':
        return dict(score=float(new_pred), change=float(new_pred - pred))
    found = {'class': class_name(run, new_pred)}
    if 'prob' in whole and pred >= 0:
        found['change'] = float(other['prob'][i][int(pred)] - whole['prob'][i][int(pred)])
    return found


def class_name(run, number):
    return run.info['names'][int(number)] if number >= 0 else 'no class'


# --------------------------------------------------------------------------------------------------
# The clips of a file, as text and pictures

def describe_clips(run, path=None, text=None):
    """
    Predict the clips of a file, or one of a text alone. Prints notes and predictions, and then
    draws the attention in each clip. `text` with a path replaces the words of the file's one clip.
    Raises EvalError, ModelError, CorpusError, ClipError.
    """
    refuse_lm(run)
    reads, stem = run.system.modalities_read(run.knobs), 'text'
    if path is None:
        clip, notes = checked_clip(dict(text=text), stem, run.facts, reads)
        clips = [clip]
    else:
        clips, notes = read_clips(path, run.facts, reads, text)
        stem = one_line(os.path.splitext(os.path.basename(path))[0]).replace('\\', '_')
    with reading_clips(run) as run:
        described, _, feed = describe_predictions(run, clips)
        print('\n'.join(notes + truncation_notes(feed) + [described]), flush=True)
        for i in range(len(clips)):
            name = stem + (f'-{i}' if len(clips) > 1 else '')
            draw_attention(run, feed, i, picture_folder(run.folder), name)


def picture_folder(folder):
    """
    The folder for pictures of a user's clips by the run in `folder`: out/clips/RUN in the current
    folder, or beside the run if the current folder is the run's or inside it.
    """
    run, here = os.path.realpath(folder), os.path.realpath('.')
    if os.path.commonpath([run, here]) == run:
        here = os.path.dirname(run)
    return os.path.relpath(os.path.join(here, 'out', 'clips', os.path.basename(run)))


def describe_predictions(run, clips):
    """
    Predict clips with a run, with all modalities and without each of them in turn -> (text,
    predictions [N], their Feed). The text has the score or class of each clip, an interval or
    probabilities if the system gives them, and the change without each modality that it has.
    """
    feed, whole, without = predict_without_each(run, clips)
    lines = []
    for i, clip in enumerate(clips):
        lines.append(f"{clip['id']}: {prediction_text(run, whole, i)}")
        for m, other in without.items():
            if len(clip[m]):
                lines.append(f"  without {m}: {change_text(run, whole, other, i)}")
    return '\n'.join(lines), whole['pred'], feed


def prediction_text(run, out, i):
    """ The prediction of clip i as text. """
    found = prediction(run, out, i)
    prob = found.get('probabilities')
    if 'class' in found:
        listed = ', '.join(f'{name} {p:.2f}' for name, p in (prob or {}).items())
        return found['class'] + (f'  ({listed})' if listed else '')
    low, high = run.info['range']
    text = f"{found['score']:+.2f} in [{low:g}, {high:g}]"
    if prob is None:
        return text + f" (the run's test MAE is {run.result['test']['mae']:.2f})"
    low, high = found['interval']
    return text + f", {found['interval_is']} in [{low:+.1f}, {high:+.1f}]"


def change_text(run, whole, other, i):
    """ The prediction of clip i in `other`, and its change from the one in `whole`, as text. """
    found = changed_prediction(run, whole, other, i)
    if 'score' in found:
        return f"{found['score']:+.2f} (change {found['change']:+.2f})"
    if 'change' not in found:
        return found['class']
    first = class_name(run, whole['pred'][i])
    return f"{found['class']} (probability of {first}: change {found['change']:+.2f})"


# --------------------------------------------------------------------------------------------------
# Another corpus

def knobs_with(run, modalities):
    """ The knobs of a run that reads only these of its streams; None: all of them. """
    streams = [m for m in run.knobs['modalities'] if modalities is None or m in modalities]
    return run.knobs | dict(modalities=streams)


def what_is_read(run, k):
    """ The modalities that a run reads with the knobs k, as text. """
    return ', '.join(run.system.modalities_read(k)) or 'nothing'


def transferred(run, other, modalities):
    """
    The corpus `other` as a run reads it that was not trained on it: with the widths, mean and std of
    the run's own corpus. modalities: a list of 'audio', 'vision'; other streams are not read.
    Raises EvalError if features or labels are not comparable.
    """
    name, widths, label = run.facts['name'], run.facts['widths'], run.knobs['label']
    for m in modalities:
        if other.widths.get(m) != widths.get(m):
            raise EvalError(f"{m} is {widths.get(m)} wide in {name} and {other.widths.get(m)} in "
                            f"{other.name}, so these are other features: leave it out "
                            "(--modalities=text uses the text alone).")
    if (info := other.labels.get(label)) != run.info:
        raise EvalError(f"the label {label!r} is {run.info} in {name} and {info} in {other.name}, "
                        "so scores cannot be compared: name another corpus.")
    streams = dict(run.facts['streams'])
    for m in set(modalities) & set(widths):
        info = other.meta['streams'][m]
        if info['standardised']:
            raise EvalError(f"{other.folder} holds {m} standardised with its own mean and std: "
                            "convert it again with --dtype=float32, which stores raw features.")
        streams[m] = info | {key: streams[m][key] for key in ('mean', 'std')}
    read = copy.copy(other)
    read.widths, read.meta = widths, other.meta | dict(streams=streams)
    return read
