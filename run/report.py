"""
A finished run's folder: its records, its report and its pictures.
"""
import difflib
import json
import os

import numpy as np

from configurator import check_knobs, known_knobs
from lm import ModelError
from metrics import METRIC_HELP, SHOWN, check_finite, markdown_table, regression_metrics
from model import SYSTEMS
from run.folder import load_info, open_regular, write_text
from run.pictures import confusion_picture, learning_curve, run_title

FORMAT = 2   # of a run's folder: raise it when older folders can no longer be read
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class EvalError(Exception):
    """ A sentence for the user: what was wrong, where, and what to do. """


# Knobs of the run, not of the experiment: a run may go on, and may be read, with other values of
# these.
RUN_KNOBS = frozenset('''needs out_dir data_dir device dtype resume fresh log_interval save_interval
    patience shard_lm deterministic'''.split())


def read_run(folder):
    """
    result.json of a finished run. What makes the model (knobs, corpus, LM) is what the checkpoint's
    header says; where result.json says otherwise, it was edited or belongs to another checkpoint.
    Raises EvalError, ModelError.
    """
    result = read_json(folder, 'result.json')
    try:
        about = result['about']
        if about.get('format') != FORMAT:
            raise EvalError(f"{folder} was written by another version (format "
                            f"{about.get('format')}, and this is {FORMAT}): check out that version "
                            "to read it.")
        checkpoint = os.path.join(folder, 'best.safetensors')
        if os.path.lexists(checkpoint):
            header = load_info(checkpoint)['about']
            refuse_edits(folder, about, header, result['info'])
            asked = about['knobs'].get('trust_remote_code')
            place = about['corpus']['folder']   # another one, where a run went on elsewhere
            source = ('name', 'knobs', 'corpus', 'device', 'dtype', 'lm_answer')
            about |= {k: header[k] for k in source}
            about['corpus']['folder'] = place
            if asked:
                about['knobs']['trust_remote_code'] = True
        check_facts(about)
        check_scores(result)
        name = about['knobs']['system']
        if name not in SYSTEMS:
            raise EvalError(f"{folder} is of the system {name!r}, which is not "
                            "in SYSTEMS.")
        known, allowed = known_knobs(os.path.join(ROOT, 'train.py'), SYSTEMS, name)
        check_knobs(about['knobs'], known, allowed, f"in {folder}")
        wrong = SYSTEMS[name].check(about['knobs'])
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise EvalError(f"{folder}/result.json is damaged ({type(e).__name__}: {e}): python "
                        "train.py with --resume=True writes it anew.") from None
    if wrong:
        raise EvalError(f"the knobs of {folder} are not those of a run: {'; '.join(wrong)}.")
    return result


def check_kinds(kinds):
    """ kinds: (dict, type or types, keys). Raises ValueError where an entry is of another kind. """
    for holder, kind, keys in kinds:
        for key in keys:
            if not isinstance(holder[key], kind):
                raise ValueError(f"its {key} is {short(holder[key])}")


def check_facts(about):
    """
    Raises ValueError where what a run says of itself and its corpus (clips.facts_of) is of another
    kind than train.py writes.
    """
    facts = about['corpus']
    check_kinds([(about, str, ('name', 'device', 'dtype')), (facts, str, ('folder', 'sha256', 'name')),
                 (facts, dict, ('widths', 'labels', 'clips', 'streams'))])
    for m, stream in facts['streams'].items():
        n = facts['widths'].get(m)
        numbers = [v for key in ('mean', 'std') for v in stream[key]]
        all_numbers = all(type(v) in (int, float) for v in numbers)
        if len(stream['mean']) != n or len(stream['std']) != n or not all_numbers:
            raise ValueError(f"its mean and std of {m} are not {short(n)} numbers each")
    if set(facts['streams']) != set(facts['widths']):
        raise ValueError("its widths and its streams are not of the same names")


def check_scores(result):
    """
    Raises ValueError where what result.json says of training and of scores is of another kind than
    train.py writes.
    """
    number, ceilings = (int, float), result['ceilings'] or {}
    scores = [result['test'], result['valid'], result['majority'] or {}]
    scores += [*result['controls'].values(), *ceilings.values()]
    check_kinds([(result, dict, ('state', 'clips', 'test', 'valid', 'info', 'controls')),
                 (result, number, ('seconds', 'n_trainable', 'n_frozen')),
                 (result['state'], number, ('best', 'best_step', 'step')),
                 (result['clips'], int, ('train', 'valid', 'test')),
                 *((metrics, number, list(metrics)) for metrics in scores)])
    if ceilings:
        check_kinds([(ceilings, dict, (LATE_FUSION, FULL))])
    if not result['test'] or not result['valid']:
        raise ValueError("its test or valid has no metrics")


def refuse_edits(folder, said, about, info):
    """
    Raises EvalError where result.json (`said`, `info`) and the checkpoint's header (`about`)
    describe two models.
    """
    # trust_remote_code is a permission, which revive asks the command line for: it says nothing of
    # the model
    free = (*RUN_KNOBS, 'trust_remote_code')
    pairs = [(k, said['knobs'].get(k), v) for k, v in about['knobs'].items() if k not in free]
    pairs += [(k, v, None) for k, v in said['knobs'].items() if k not in about['knobs']]
    facts = {k: v for k, v in about['corpus'].items() if k != 'folder'}
    pairs += [(f'corpus {k}', said['corpus'].get(k), v) for k, v in facts.items()]
    fingerprints = ('lm_fingerprint', 'tokenizer_fingerprint')
    pairs += [(k, said.get(k), about.get(k)) for k in fingerprints]
    # a run may have gone on with another --dtype or on another device, after its best step
    here, there = ((a['knobs']['dtype'], a.get('device')) for a in (said, about))
    if here == there:
        pairs += [('dtype', said.get('dtype'), about.get('dtype'))]
    pairs += [('info', info, about['corpus']['labels'][about['knobs']['label']])]
    for what, here, there in pairs:
        if json.dumps(here, sort_keys=True) != json.dumps(there, sort_keys=True):
            raise EvalError(f"{folder}/result.json has {what}={short(here)} and its checkpoint was "
                            f"trained with {short(there)}: put the old result.json back, or train "
                            "again with another value.")


def short(value, n=60):
    """A value as text of at most n characters."""
    text = repr(value)
    return text if len(text) <= n else text[:n] + '..'


def read_json(folder, file):
    """A JSON file of a run's folder. Raises EvalError."""
    path = os.path.join(folder, file)
    if not os.path.isdir(folder):
        home = os.path.dirname(folder) or '.'
        others = sorted(os.listdir(home)) if os.path.isdir(home) else []
        near = difflib.get_close_matches(os.path.basename(folder), others, n=1)
        hint = f": did you mean {os.path.join(home, near[0])}?" if near else "."
        raise EvalError(f"there is no folder {folder}{hint}")
    if not os.path.lexists(path):
        raise EvalError(f"{folder} holds no finished run (no {file}): train it to the end, with "
                        "--resume=True if it was cut off.")
    try:
        with open_regular(path) as f:
            return json.load(f)
    except OSError as e:
        raise EvalError(f"{path} cannot be read: it {e.strerror}.") from None
    except (ValueError, RecursionError) as e:
        raise EvalError(f"{path} is damaged ({e}): train that run to the end again, with "
                        "--resume=True.") from None


def write_predictions(folder, corpus, predictions):
    """
    folder/test.jsonl: a line a clip, its id, label and every prediction that the model made of it.
    """
    def rounded(v):
        return [round(float(p), 6) for p in v] if v.ndim else round(float(v), 6)

    rows = []
    for n, clip in enumerate(corpus.id('test')):
        rows.append(dict(id=clip) | {k: rounded(v[n]) for k, v in predictions.items()})
    write_text(os.path.join(folder, 'test.jsonl'), ''.join(json.dumps(row) + '\n' for row in rows))


def read_predictions(folder):
    """
    test.jsonl of a finished run -> (list of ids, dict of arrays [N], or [N,K] for prob). Raises
    EvalError.
    """
    path, again = f"{folder}/test.jsonl", f"python eval.py {folder} writes it anew"
    try:
        with open_regular(path) as f:
            rows = [json.loads(line) for line in f]
        ids = [r['id'] for r in rows]
        predictions = {k: np.array([r[k] for r in rows], np.float32) for k in rows[0] if k != 'id'}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        reason = getattr(e, 'strerror', None) or f'{type(e).__name__}: {e}'
        raise EvalError(f"{path} is missing or damaged ({reason}): {again}.") from None
    try:
        check_finite(predictions, ids)
    except ValueError as e:
        raise EvalError(f"{path}: {e}.") from None
    return ids, predictions


def readings(folder, r):
    """
    Rows of the report beside the run's own: (name, metrics, which of the corpus's bounds it is
    compared with).
    """
    k, cls = r['about']['knobs'], SYSTEMS[r['about']['knobs']['system']]
    rows = [('majority', r['majority'], 'majority')]
    bounds = {row: bound for row, (_, bound) in cls.controls(k).items()}
    rows += [(row, metrics, bounds.get(row, '')) for row, metrics in r['controls'].items()]
    _, p = read_predictions(folder)
    own = cls.readings(k, p)
    for row, run in prerequisite_runs(r['about']).items():
        rows.append((row, run['test'], SYSTEMS[run['about']['knobs']['system']].bound()))
        own = {name: (key, bound) for name, (key, bound) in own.items() if bound != rows[-1][2]}
    for row, (key, bound) in own.items():
        rows.append((row, regression_metrics(p[key], p['label'], r['info']['range']), bound))
    return sorted(rows, key=lambda row: BOUNDS.index(row[2]) if row[2] in BOUNDS else len(BOUNDS))


# A corpus's bounds, what a perfect reader of so much can reach, in the report's order
MAJORITY, TEXT, AV, LATE_FUSION, FULL = BOUNDS = 'majority text av late full'.split()
# the row of a prerequisite run, by its bound
PART = {AV: 'audio+video only', TEXT: 'text only'}


def prerequisite_runs(about):
    """
    Row -> result.json of the runs that this one started from and that predict the label on the same
    corpus.
    """
    k, runs = about['knobs'], {}
    for knob in SYSTEMS[k['system']].stands_on(k):
        try:
            r = read_run(k[knob])
        except (EvalError, ModelError):   # no run, or none that is there
            continue
        cls = SYSTEMS[r['about']['knobs']['system']]
        if cls.predicts and r['about']['corpus']['sha256'] == about['corpus']['sha256']:
            runs[PART.get(cls.bound(), r['about']['name'])] = r
    return runs


def summary(folder, r):
    """
    The rows of the report's table: majority, what parts of the run say by themselves (text only is
    the text head y_t, which never saw audio or video, or what the frozen LM answers without pseudo
    tokens; audio+video only is the AV encoder's own run, or the head y_av), the best additive late
    fusion where the corpus knows it, and the run itself.
    """
    k, name = r['about']['knobs'], r['about']['name']
    cls = SYSTEMS[k['system']]
    classes = r['info']['kind'] == 'classes'
    # bounds are for readers of everything
    ceilings = r['ceilings'] if r['ceilings'] and len(k['modalities']) == 2 else {}
    rows = readings(folder, r) if cls.reads_text else [('majority', r['majority'], 'majority')]
    if ceilings and cls.reads_text:
        rows.append(('best late fusion', {}, LATE_FUSION))
    rows.append((name, r['test'], cls.bound()))
    best = 'acc' if classes else 'mae'   # what the ceilings are about
    keys = list(r['test']) if classes else [key for key in SHOWN if key in r['test']]

    def cell(metrics, key):
        return f'{metrics[key]:.3f}' if key in metrics else '-'

    table = []
    for row, metrics, bound in rows:
        reached = [cell(ceilings.get(bound, {}), best)] if ceilings else []
        table.append([row] + [cell(metrics, key) for key in keys] + reached)
    header = ['test'] + keys + ([f'{best} of a perfect reader'] if ceilings else [])
    text = markdown_table(header, table)
    if ceilings and cls.reads_text:
        text += '\n\n' + distance_to_bounds(name, best, r['test'][best], ceilings)
    if r.get('lm_kept') is not None:
        text += "\n\n" + ("Without the adapter the LM goes on with two texts as it did before "
                          "training, token for token."
                          if r['lm_kept'] else
                          "**Without the adapter the LM no longer goes on as it did before "
                          "training.**")
    return text


def distance_to_bounds(name, best, reached, ceilings):
    """ A sentence on how far a run is between the best late fusion and the best there is. """
    late, full = ceilings[LATE_FUSION][best], ceilings[FULL][best]
    closed = (late - reached) / (late - full)
    if closed > 0:
        return f"{name} closes {100 * closed:.0f} % of the gap from the best late fusion to the best there is."
    return f"{name} is no better than the best late fusion ({best} {late:.3f}): this alone is no sign that it fuses."


def report(folder):
    """
    Writes folder/report.md from the files of a finished run, and returns its table. Raises
    EvalError.
    """
    r = read_run(folder)
    about, state, clips = r['about'], r['state'], r['clips']
    name, k = about['name'], about['knobs']
    predicts = SYSTEMS[k['system']].predicts
    took = (f"trained in {r['seconds'] / 60:.1f} min on {about['device']} ({about['threads']} "
            f"threads, {about['matmul_gflops']} GFLOP/s float32 matmul)")
    table = summary(folder, r) if predicts else f"{name}: test loss {r['test']['loss']:.4f}"
    each = []
    for key, v in r['test'].items():
        what = METRIC_HELP.get(key, METRIC_HELP['f1_<class>'])
        each.append([key, f"{v:.4f}", f"{r['valid'][key]:.4f}" if key in r['valid'] else '-', what])
    pictures = '![learning curve](curve.png)'
    if predicts and r['info']['kind'] == 'classes':
        _, p = read_predictions(folder)
        draw_confusion(os.path.join(folder, 'confusion.png'), r, p)
        pictures += '\n\n![confusion matrix](confusion.png)'
        names = r['info']['names']
        if not ''.join(names).isascii():
            numbered = ', '.join(f'{i} {n}' for i, n in enumerate(names))
            pictures += f'\n\nThe classes: {numbered}.'
    changed = ' with uncommitted changes' if about['dirty'] else ''
    write_text(os.path.join(folder, 'report.md'), f"""# {name}

`{about['command']}`, commit {about['commit'] or 'none'}{changed}.
{clips['train']} / {clips['valid']} / {clips['test']} clips of {os.path.basename(about['corpus']['folder'])};
{r['n_trainable']:,} trainable and {r['n_frozen']:,} frozen weights; {took}.
The best checkpoint by validation {k['select']} ({state['best']:.4f}) is of step {state['best_step']}
of {state['step']}; the test set had no part in choosing it.

{table}

{markdown_table(['metric', 'test', 'valid', 'what it is'], each)}

{pictures}
""")
    return f"{table}\n\n{name}: {took}; {folder}/report.md"


def read_log(folder):
    """A run's log.jsonl -> list of dicts, in the order of training. Raises EvalError."""
    path = os.path.join(folder, 'log.jsonl')
    try:
        with open_regular(path) as f:
            return [json.loads(line) for line in f]
    except (OSError, ValueError) as e:
        reason = getattr(e, 'strerror', None) or e
        raise EvalError(f"{path} is missing or damaged ({reason}).") from None


def curve_picture(folder):
    """ Draw folder/curve.png, the learning curve of a finished run. Raises EvalError. """
    learning_curve(os.path.join(folder, 'curve.png'), [(read_run(folder), read_log(folder))])


def draw_confusion(path, result, predictions):
    """
    Draw the confusion matrix of a run's test predictions at `path`: of its classes, or of scores
    rounded to whole numbers. result: of read_run; predictions: arrays of read_predictions.
    """
    info, test = result['info'], result['test']
    pred, label = predictions['pred'], predictions['label']  # [N] each
    if info['kind'] == 'classes':
        names, metrics = info['names'], ('wf1', 'acc')
    else:
        low, high = info['range']
        levels = np.arange(round(low), round(high) + 1)
        names, metrics = [f'{v:+d}' if v else '0' for v in levels], ('mae', 'corr')
        pred = np.round(np.clip(pred, low, high)) - levels[0]  # [N]
        label = np.round(np.clip(label, low, high)) - levels[0]  # [N]
    scores = ', '.join(f'{key} {test[key]:.3f}' for key in metrics if key in test)
    rounded = '' if info['kind'] == 'classes' else '; scores rounded'
    title = f"{run_title([result['about']])}\ntest: {scores}, {len(pred)} clips{rounded}"
    confusion_picture(path, pred, label, names, title)
