"""
Writes the report and the pictures of a finished run.
"""
import json
import os

import numpy as np

from metrics import SHOWN, markdown_table, metric_help, regression_metrics
from model import SYSTEMS
from run.clips import is_same_corpus
from run.errors import ModelError
from run.finished import EvalError, log_and_crc, prediction_arrays, read_run
from run.folder import find_folder, is_regular, open_regular, write_bytes
from run.forms import AV, BOUNDS, FULL, LATE_FUSION, TEXT
from run.json_files import crc_of, parsed_lines, sealed
from run.pictures import calibration_curve, confusion_matrix, drawn, learning_curve
from run.report_html import html_report

LARGEST_PICTURE = 10_000_000   # bytes


def prediction_lines(corpus, predictions):
    """ The text of test.jsonl: a line for each test clip with its id, label and predictions. """
    def rounded(v):
        return [round(float(p), 6) for p in v] if v.ndim else round(float(v), 6)

    rows = []
    for n, clip in enumerate(corpus.id('test')):
        rows.append(dict(id=clip) | {k: rounded(v[n]) for k, v in predictions.items()})
    return ''.join(json.dumps(row) + '\n' for row in rows)


def comparison_rows(folder, r, predictions):
    """
    The rows of the report's table above the run's own: a list of (name, metrics, bound). They are
    the majority baseline, the system's controls, its prerequisites, and parts of its own
    predictions (System.readings). `bound` names the corpus's bound for that row, one of BOUNDS or
    ''.
    """
    k, cls = r['about']['knobs'], SYSTEMS[r['about']['knobs']['system']]
    rows = [('majority', r['majority'], 'majority')]
    bounds = {row: bound for row, (_, bound) in cls.controls(k).items()}
    rows += [(row, metrics, bounds.get(row, '')) for row, metrics in r['controls'].items()]
    p = predictions
    parts = cls.readings(k, p)
    for row, run in prerequisite_runs(folder, r['about']).items():
        own = run['about']['knobs']
        rows.append((row, run['test'], SYSTEMS[own['system']].bound(own)))
        # a prerequisite replaces the part of the model with the same bound
        parts = {name: (key, bound) for name, (key, bound) in parts.items()
                 if not bound or bound != rows[-1][2]}
    for row, (key, bound) in parts.items():
        rows.append((row, regression_metrics(p[key], p['label'], r['info']['range']), bound))
    return sorted(rows, key=lambda row: BOUNDS.index(row[2]) if row[2] in BOUNDS else len(BOUNDS))


# bound -> name of the report's row of a prerequisite with this bound
PART = {AV: 'audio+video only', TEXT: 'text only'}


def prerequisite_runs(folder, about):
    """
    {name of the row: result.json} of the runs from which the run in `folder` started, if they
    predict the label on the same corpus.
    """
    k, runs = about['knobs'], {}
    for knob in SYSTEMS[k['system']].prerequisite_knobs(k):
        found = find_folder(k[knob], folder, k['out_dir'])
        try:
            r = read_run(found)
        except (EvalError, ModelError):   # the knob names no run, or the run is not there
            continue
        if os.path.dirname(os.path.realpath(found)) != os.path.dirname(os.path.realpath(folder)):
            print(f"  {folder} names the run {found}, which is read as data")
        cls = SYSTEMS[r['about']['knobs']['system']]
        same_label = r['about']['knobs'].get('label') == k['label']
        if cls.predicts and same_label and is_same_corpus(r['about']['corpus'], about['corpus']):
            runs[PART.get(cls.bound(r['about']['knobs']), r['about']['name'])] = r
    return runs


def comparison(folder, r, predictions):
    """
    The report's table of test metrics and the notes under it: header, rows, sentences. Its rows:
    those of comparison_rows, the late-fusion bound if the corpus has bounds and the run reads all
    modalities, and the run itself. Of comparison_rows, 'text only (y_t)' is DeepMLF's text head,
    'the LM alone (text)' the frozen LM without pseudo tokens, 'audio+video only' the AV encoder's
    own run, and 'audio+video only (y_av)' DeepMLF's AV head.
    """
    k, name = r['about']['knobs'], r['about']['name']
    own_bound = SYSTEMS[k['system']].bound(k)
    classes = r['info']['kind'] == 'classes'
    # the bounds assume audio and video
    ceilings = r['ceilings'] if r['ceilings'] and len(k['modalities']) == 2 else {}
    rows = comparison_rows(folder, r, predictions)
    if ceilings and own_bound == FULL:
        rows.append(('late-fusion bound', {}, LATE_FUSION))
    rows.append((name, r['test'], own_bound))
    best = 'acc' if classes else 'mae'   # the metric of the bounds
    keys = list(r['test']) if classes else [key for key in SHOWN if key in r['test']]

    def cell(metrics, key):   # the correlation of a constant is NaN
        return f'{metrics[key]:.3f}' if np.isfinite(metrics.get(key, np.nan)) else '-'

    table = []
    for row, metrics, bound in rows:
        reached = [cell(ceilings.get(bound, {}), best)] if ceilings else []
        table.append([row] + [cell(metrics, key) for key in keys] + reached)
    header = ['test'] + keys + ([f'best possible {best}'] if ceilings else [])
    notes = []
    if ceilings:
        notes.append(f"Best possible {best}: that of an optimal predictor with the same inputs as "
                     "the row, known exactly for this corpus.")
    if ceilings and own_bound == FULL:
        notes[0] += (f" Late-fusion bound: the best {best} of a sum of a text predictor and an "
                     "audio+video predictor.")
        notes.append(distance_to_bounds(name, best, r['test'][best], ceilings))
    if r.get('lm_kept') is not None:
        notes.append("Without the adapter, the frozen LM continues two texts as it did before "
                     "training, token for token."
                     if r['lm_kept'] else
                     "**Without the adapter, the frozen LM does not continue two texts as it did "
                     "before training.**")
    return header, table, notes


def distance_to_bounds(name, best, reached, ceilings):
    """ A sentence on where a run is between the late-fusion bound and the best possible metric. """
    late, full = ceilings[LATE_FUSION][best], ceilings[FULL][best]
    closed = (late - reached) / (late - full)
    if closed <= 0:
        return (f"{name} ({best} {reached:.3f}) does not pass the late-fusion bound ({late:.3f}), so "
                "this run does not show that it fuses the modalities.")
    sentence = (f"{name} ({best} {reached:.3f}) closes {100 * closed:.0f} % of the gap between the "
                f"late-fusion bound ({late:.3f}) and the best possible {best} ({full:.3f}).")
    if best == 'mae':   # the tool reads scores alone
        sentence += " tools/adding.py tests whether that is more than chance."
    return sentence


def run_facts(r):
    """ What a report says of a run besides its metrics: a list of (name, text). """
    about, state, clips = r['about'], r['state'], r['clips']
    changed = ' with uncommitted changes' if about['dirty'] else ''
    corpus = os.path.basename(about['corpus']['folder'])
    return [
        ('Command', about['command']),
        ('Commit', f"{about['commit'] or 'none'}{changed}"),
        ('Corpus', f"{corpus} ({clips['train']} training, {clips['valid']} validation, "
                   f"{clips['test']} test clips)"),
        ('Weights', f"{r['n_trainable']:,} trainable, {r['n_frozen']:,} frozen"),
        ('Time of training and testing', time_text(r)),
        ('Checkpoint', f"step {state['best_step']} of {state['step']}, chosen by validation "
                       f"{about['knobs']['select']} ({state['best']:.4f}), not by the test set")]


def time_text(r):
    """ How long a run took, and on what, as text. """
    about, seconds = r['about'], r['seconds']
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    return (f"{took} on {about['device']} ({about['threads']} CPU "
            f"thread{'s' * (about['threads'] > 1)}, {about['matmul_gflops']} GFLOP/s in a float32 "
            "matmul)")


def report_pictures(r, predictions, curve):
    """
    The pictures of a report: a list of (name, PNG, caption). predictions: read_predictions' arrays;
    None for a language model. curve: the PNG of the learning curve, or None.
    """
    pictures = [('learning curve', curve, '')] if curve else []
    if predictions:
        names, caption = r['info'].get('names', []), ''
        if not ''.join(names).isascii():   # the picture shows such names by their numbers
            caption = f"Classes: {', '.join(f'{i} {n}' for i, n in enumerate(names))}."
        pictures.append(('confusion matrix', drawn(confusion_matrix, r, predictions), caption))
        if 'prob' in predictions:
            png = drawn(calibration_curve, r, predictions)
            pictures.append(('calibration of the probabilities', png, ''))
    return pictures


def print_and_save(folder, r, corpus, predictions, trained=False):
    """
    Print the table of a run's report, and then save test.jsonl, result.json and the report. The
    scores are printed first, because the disk may be full. r: the dict of result.json; predictions:
    those of evaluate on the test split; trained: whether log.jsonl is new, so that its learning curve
    is drawn. Returns the table. Raises EvalError, OSError.
    """
    r, files = json.loads(json.dumps(r)), {}
    checksums = r.get('files') or {}
    rounded = ()
    if predictions:
        files['test.jsonl'] = prediction_lines(corpus, predictions)
        rounded = prediction_arrays(parsed_lines(files['test.jsonl']))   # (ids, arrays)
        checksums['test.jsonl'] = crc_of(files['test.jsonl'])
    if trained:
        lines, checksums['log.jsonl'] = log_and_crc(folder)
        files['curve.png'] = drawn(learning_curve, [(r, lines)])
    files['result.json'] = json.dumps(sealed(r | dict(files=checksums)), indent=1)
    curve = files.get('curve.png') or own_curve(folder)
    table, pages = report(folder, r, corpus, rounded, curve)
    print(table + '\n', flush=True)
    for name, content in (files | pages).items():
        content = content.encode() if isinstance(content, str) else content
        write_bytes(os.path.join(folder, name), content)
    print(f"{r['about']['name']}: trained and tested in {time_text(r)}; the report is "
          f"{folder}/report.md, and report.html for a browser")
    return table


def own_curve(folder):
    """ The PNG of the learning curve in a run's folder, or None. """
    path = os.path.join(folder, 'curve.png')
    if not is_regular(path) or os.path.getsize(path) > LARGEST_PICTURE:
        return None
    with open_regular(path, 'rb') as f:
        return f.read()


def report(folder, r, corpus, predictions, curve):
    """
    The report of a run -> (its table of comparisons for the terminal, {file name: content}).
    predictions: (ids, arrays) as read_predictions returns them, or empty for a language model.
    """
    compared, clips, arrays = None, None, None
    name, cls = r['about']['name'], SYSTEMS[r['about']['knobs']['system']]
    table = f"Test loss: {r['test']['loss']:.4f}" if not cls.predicts else ''
    if cls.predicts:
        ids, arrays = predictions
        header, rows, notes = compared = comparison(folder, r, arrays)
        table = '\n\n'.join([markdown_table(header, rows), *notes])
        clips = ids, corpus.text('test'), arrays
    each = []
    for key, v in r['test'].items():
        better, what = metric_help(key)
        valid = f"{r['valid'][key]:.4f}" if key in r['valid'] else '-'
        each.append([key, f"{v:.4f}", valid, better, what])
    facts, pictures, files = run_facts(r), report_pictures(r, arrays, curve), {}
    linked = '![learning curve](curve.png)'
    for what, png, caption in pictures:
        if what == 'confusion matrix' and r['info']['kind'] == 'classes':
            files['confusion.png'] = png
            linked += '\n\n![confusion matrix](confusion.png)'
            linked += f'\n\n{caption}' if caption else ''
    reads_text = 'text' in cls.modalities_read(r['about']['knobs'])
    files['report.html'] = html_report(r, facts, compared, clips, pictures, reads_text)
    facts[0] = ('Command', f'`{facts[0][1]}`')
    listed = '\n'.join(f'- {key}: {v}' for key, v in facts)
    # report.md is last: train.py takes a run that has it for finished
    text = f"""# {name}

{listed}

{table}

{markdown_table(['metric', 'test', 'valid', 'better', 'definition'], each)}

{linked}
"""
    files['report.md'] = text.replace('<', '&lt;')   # no name in it becomes HTML
    return table, files
