"""
Reads the folder of a finished run, and writes its report and pictures.
"""
import difflib
import json
import os

import numpy as np

from configurator import check_knobs, known_knobs
from metrics import SHOWN, check_finite, markdown_table, metric_help, regression_metrics
from model import SYSTEMS
from run.errors import ModelError
from run.folder import ROOT, find_folder, is_regular, open_regular, write_bytes
from run.forms import RESULT, check_about, check_label, check_log_line, read_header
from run.json_files import (
    NUMBER,
    check_form,
    check_seal,
    crc_of,
    parsed_lines,
    read_json,
    sealed,
    shorten,
    text_of,
)
from run.pictures import calibration_picture, draw_confusion, drawn, learning_curve
from run.report_html import html_report

FORMAT = 2   # version of the run folder's format; raise it when older folders cannot be read


class EvalError(Exception):
    """ One sentence for the user: what was wrong, where, and what to do. """


# Knobs that say how a run is carried out, not what is trained. A run may be resumed and read with
# other values of these.
RUN_KNOBS = frozenset('''needs out_dir data_dir device dtype resume fresh log_interval save_interval
    patience shard_lm deterministic'''.split())


def read_run(folder):
    """
    result.json of a finished run, as a dict. The knobs, corpus and LM, which determine the model,
    are taken from the checkpoint's header. If result.json contradicts the header, it was edited or
    belongs to another checkpoint, which is an error. Raises EvalError, ModelError.
    """
    written = read_run_json(folder, 'result.json')
    path = f'{folder}/result.json'
    try:
        about = written['about']
        if about['format'] != FORMAT:
            raise EvalError(f"{folder} was written by another version (format {about['format']}, "
                            f"and this is {FORMAT}): check out that version to read it.")
        checkpoint = os.path.join(folder, 'best.safetensors')
        if os.path.lexists(checkpoint):
            path = checkpoint   # that an error message names
            header = read_header(checkpoint)['about']
            check_about(header)
            path = f'{folder}/result.json'
            check_about(about)
            refuse_edits(folder, about, header, written['info'])
            needs_trust = about['knobs'].get('trust_remote_code')
            corpus_folder = about['corpus']['folder']   # a resumed run may have read it elsewhere
            from_header = ('name', 'knobs', 'corpus', 'device', 'dtype', 'lm_answer')
            about = about | {k: header.get(k) for k in from_header}
            about['corpus']['folder'] = corpus_folder
            if needs_trust:
                about['knobs']['trust_remote_code'] = True
        check_about(about)
        result = written | dict(about=about)
        check_result(result)
        name = about['knobs']['system']
        if name not in SYSTEMS:
            raise EvalError(f"{folder} is of the system {name!r}, which is not in SYSTEMS: check "
                            "out the version that has it.")
        known, allowed = known_knobs(os.path.join(ROOT, 'train.py'), SYSTEMS, name)
        check_knobs(about['knobs'], known, allowed, f"in {folder}")
        errors = SYSTEMS[name].check(about['knobs'])
        check_seal(written)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise EvalError(damage_sentence(path, e)) from None
    if errors:
        raise EvalError(f"{folder} has wrong knobs, so restore its files: {'; '.join(errors)}.")
    return result


def damage_sentence(path, error):
    """ The message on a damaged file of a run. `error`: that of reading or checking it. """
    kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
    remedy = ("train the run again with --fresh=True" if path.endswith('.safetensors') else
              "remove the file and continue with python train.py .. --resume=True")
    return (f"{path} is damaged ({kind}{' '.join(str(error).split())[:300]}): restore a copy, or "
            f"{remedy}.")


def check_result(result):
    """ Raises ValueError if the results in result.json are missing or of wrong types. """
    check_form(result, RESULT)
    check_label(result['info'])
    if result['ceilings']:
        check_form(result['ceilings'], {LATE_FUSION: dict, FULL: dict})
    if not result['test'] or not result['valid']:
        raise ValueError("has no metrics in its test or valid")


def refuse_edits(folder, about, header, info):
    """
    Raises EvalError if result.json (its `about` and `info`) and the checkpoint's `header` describe
    different models.
    """
    # trust_remote_code is a permission of the command line and no property of the model
    free = (*RUN_KNOBS, 'trust_remote_code')
    pairs = [(k, about['knobs'].get(k), v) for k, v in header['knobs'].items() if k not in free]
    pairs += [(k, v, None) for k, v in about['knobs'].items() if k not in header['knobs']]
    facts = {k: v for k, v in header['corpus'].items() if k != 'folder'}
    pairs += [(f'corpus {k}', about['corpus'].get(k), v) for k, v in facts.items()]
    fingerprints = ('lm_fingerprint', 'tokenizer_fingerprint')
    pairs += [(k, about.get(k), header.get(k)) for k in fingerprints]
    # a run may have been resumed with another --dtype or device after its best step
    ours, theirs = ((a['knobs']['dtype'], a.get('device')) for a in (about, header))
    if ours == theirs:
        pairs += [('dtype', about.get('dtype'), header.get('dtype'))]
    pairs += [('info', info, header['corpus']['labels'][header['knobs']['label']])]
    for what, ours, theirs in pairs:
        if json.dumps(ours, sort_keys=True) != json.dumps(theirs, sort_keys=True):
            raise EvalError(f"{folder}/result.json has {what}={shorten(ours)}, but its checkpoint "
                            f"was trained with {shorten(theirs)}: restore the original "
                            "result.json, or train a new run with the other value.")


def read_run_json(folder, file):
    """ The content of a JSON file in a run's folder, a dict with the entry about. Raises EvalError. """
    path = os.path.join(folder, file)
    if not os.path.isdir(folder):
        home = os.path.dirname(folder) or '.'
        others = sorted(os.listdir(home)) if os.path.isdir(home) else []
        near = difflib.get_close_matches(os.path.basename(folder), others, n=1)
        hint = f": did you mean {os.path.join(home, near[0])}?" if near else "."
        raise EvalError(f"there is no folder {folder}{hint}")
    if not os.path.lexists(path):
        raise EvalError(f"{folder} holds no finished run (no {file}): train it to the end, with "
                        "--resume=True if it was interrupted.")
    try:
        return read_json(path, dict(about=dict(format=int, knobs=dict), files=RESULT['files']))
    except ValueError as e:
        raise EvalError(damage_sentence(path, e)) from None


def prediction_lines(corpus, predictions):
    """ The text of test.jsonl: a line for each test clip with its id, label and predictions. """
    def rounded(v):
        return [round(float(p), 6) for p in v] if v.ndim else round(float(v), 6)

    rows = []
    for n, clip in enumerate(corpus.id('test')):
        rows.append(dict(id=clip) | {k: rounded(v[n]) for k, v in predictions.items()})
    return ''.join(json.dumps(row) + '\n' for row in rows)


def read_predictions(folder):
    """
    test.jsonl of a finished run -> (ids, {name: array [N], or [N,K] for prob}). Raises EvalError.
    """
    path = f"{folder}/test.jsonl"
    written = crc_in_result(folder, 'test.jsonl')
    try:
        text = text_of(path)
        ids, predictions = prediction_arrays(parsed_lines(text))
        check_finite(predictions, ids)
        check_crc(text, written)
    except ValueError as e:
        raise EvalError(f"{path} is missing or damaged ({e}): python eval.py {folder} writes it "
                        "again.") from None
    return ids, predictions


def crc_in_result(folder, file):
    """ The CRC of a run's file as result.json has it, None in an older run. Raises EvalError. """
    return (read_run_json(folder, 'result.json').get('files') or {}).get(file)


def check_crc(text, written):
    """ Raises ValueError if a text has another CRC than `written`. None allows any. """
    if written not in (None, crc_of(text)):
        raise ValueError("was changed after it was written")


def prediction_arrays(rows):
    """ The lines of test.jsonl as read_predictions returns them. Raises ValueError. """
    names = [k for k in rows[0] if k != 'id']
    lengths = {k: len(v) for k, v in rows[0].items() if k != 'id' and type(v) is list}
    form = {k: [NUMBER] if k in lengths else NUMBER for k in names}
    form |= dict(id=str, pred=NUMBER, label=NUMBER)
    for n, row in enumerate(rows, 1):
        try:
            check_form(row, form)
            if any(len(row[k]) != length for k, length in lengths.items()):
                raise ValueError("has lists of other lengths than line 1")
        except ValueError as e:
            raise ValueError(f"line {n} {e}") from None
    return [row['id'] for row in rows], {
        k: np.array([row[k] for row in rows], np.float32) for k in names}


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


# The bounds of a corpus, in the report's order: what an optimal predictor with these inputs reaches
MAJORITY, TEXT, AV, LATE_FUSION, FULL = BOUNDS = 'majority text av late full'.split()
# bound -> name of the report's row of a prerequisite with this bound
PART = {AV: 'audio+video only', TEXT: 'text only'}


def prerequisite_runs(folder, about):
    """
    {name of the row: result.json} of the runs from which the run in `folder` started, if they
    predict the label on the same corpus.
    """
    k, runs = about['knobs'], {}
    for knob in SYSTEMS[k['system']].prerequisite_knobs(k):
        try:
            r = read_run(find_folder(k[knob], folder, k['out_dir']))
        except (EvalError, ModelError):   # the knob names no run, or the run is not there
            continue
        cls = SYSTEMS[r['about']['knobs']['system']]
        if cls.predicts and r['about']['corpus']['sha256'] == about['corpus']['sha256']:
            runs[PART.get(cls.bound(r['about']['knobs']), r['about']['name'])] = r
    return runs


def comparison(folder, r, predictions):
    """
    The report's table of test metrics and the notes under it: header, rows, sentences. Its rows:
    those of comparison_rows (text only: DeepMLF's text head, which sees no audio or video, or the
    frozen LM without pseudo tokens; audio+video only: the AV encoder's own run, or DeepMLF's AV
    head), the late-fusion bound if the corpus has bounds and the run reads all modalities, and the
    run itself.
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
    if closed > 0:
        return (f"{name} ({best} {reached:.3f}) closes {100 * closed:.0f} % of the gap between the "
                f"late-fusion bound ({late:.3f}) and the best possible {best} ({full:.3f}).")
    return (f"{name} ({best} {reached:.3f}) does not pass the late-fusion bound ({late:.3f}), so "
            "this run does not show that it fuses the modalities.")


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
        pictures.append(('confusion matrix', drawn(draw_confusion, r, predictions), caption))
        if 'prob' in predictions:
            png = drawn(calibration_picture, r, predictions)
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
    if not is_regular(path):
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
    files['report.md'] = f"""# {name}

{listed}

{table}

{markdown_table(['metric', 'test', 'valid', 'better', 'definition'], each)}

{linked}
"""
    return table, files


def read_log(folder):
    """ The lines of a finished run's log.jsonl as a list of dicts, in order. Raises EvalError. """
    return log_and_crc(folder, crc_in_result(folder, 'log.jsonl'))[0]


def log_and_crc(folder, written=None):
    """
    (lines, CRC) of a run's log.jsonl. written: the CRC that it must have, None for any. Raises EvalError.
    """
    path = os.path.join(folder, 'log.jsonl')
    try:
        text = text_of(path)
        lines = parsed_lines(text, check_log_line)
        check_crc(text, written)
    except ValueError as e:
        raise EvalError(f"{path} is missing or damaged ({e}): restore a copy.") from None
    return lines, crc_of(text)
