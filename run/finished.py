"""
Reads the folder of a finished run: result.json, test.jsonl and log.jsonl.
"""
import difflib
import json
import os
import re

import numpy as np

from configurator import check_knobs, known_knobs
from metrics import check_finite
from model import SYSTEMS
from run.errors import UserError
from run.folder import ROOT
from run.forms import (
    RESULT,
    check_about,
    check_ceilings,
    check_label,
    check_log_line,
    read_header,
)
from run.json_files import (
    NUMBER,
    check_form,
    check_printable,
    check_seal,
    crc_of,
    parsed_lines,
    read_json,
    shorten,
    text_of,
)

FORMAT = 4   # version of the run folder's format; raise it when older folders cannot be read


class EvalError(UserError):
    """ An error in a run's folder, or in a command that reads one. """


# Knobs that say how a run is carried out, not what is trained. A run may be resumed and read with
# other values of these.
RUN_KNOBS = frozenset('''needs out_dir data_dir device dtype resume fresh log_interval save_interval
    patience shard_lm deterministic'''.split())
# Those of them that change results, so that runs that differ in them are no seeds of one experiment
RESULT_KNOBS = frozenset(['dtype', 'patience'])


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
        if SYSTEMS[name].predicts and result['majority'] is None:
            raise ValueError("has no metrics of the majority")
        known, allowed = known_knobs(os.path.join(ROOT, 'train.py'), SYSTEMS, name)
        new, gone = set(known) - set(about['knobs']), set(about['knobs']) - set(known)
        if new or gone:
            had = f"no knob {min(new)}" if new else f"the knob {min(gone)}"
            raise EvalError(f"{folder} was written by another version, which had {had}: check out "
                            f"{about['commit']} to read it, or train it again with --fresh=True.")
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
    check_printable([result['controls'], result['info'], result['ceilings']])
    if result['ceilings']:
        check_ceilings(result['ceilings'])
    if result['info']['kind'] == 'regression' and 'loss' not in result['test']:
        check_form(result['test'], dict(mae=NUMBER))
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
    if os.path.isfile(folder):
        raise EvalError(f"{folder} is a file: give the folder of a run.")
    if not os.path.isdir(folder):
        home, name = os.path.dirname(folder) or '.', os.path.basename(folder)
        others = sorted(p.name for p in os.scandir(home) if p.is_dir()) if os.path.isdir(home) else []
        near = [other for other in others if name and other.startswith(name)]
        near += difflib.get_close_matches(name, others, n=1)
        hint = f": did you mean {os.path.join(home, near[0])}?" if near else "."
        raise EvalError(f"there is no folder {folder}{hint}")
    if not os.path.lexists(path) and not os.path.lexists(os.path.join(folder, 'config.json')):
        raise EvalError(f"{folder} is no folder of a run (no {file} and no config.json): give one "
                        "that train.py wrote, such as out/NAME.")
    if not os.path.lexists(path):
        raise EvalError(f"{folder} holds no finished run (no {file}): train it to the end, with "
                        "--resume=True if it was interrupted.")
    try:
        return read_json(path, dict(about=dict(format=int, knobs=dict), files=RESULT['files']))
    except ValueError as e:
        raise EvalError(damage_sentence(path, e)) from None


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


def experiment_of(r):
    """
    (name, knobs as text) of a run, equal for runs that differ in the seed alone and in RUN_KNOBS
    that change no result. dtype='auto' counts as the dtype that the run took. The names of
    prerequisite runs hold the seed too; it is cut out of them.
    """
    knobs = {}
    free = RUN_KNOBS - RESULT_KNOBS | {'seed'}
    for knob, v in (r['about']['knobs'] | dict(dtype=r['about']['dtype'])).items():
        if knob not in free:
            knobs[knob] = re.sub(r'-seed\d+', '', str(v))
    return r['about']['name'], json.dumps(knobs, sort_keys=True)


def check_same_experiment(folders):
    """ Raises EvalError unless these runs are seeds of one experiment (experiment_of). """
    results = [read_run(folder) for folder in folders]
    if len({experiment_of(r) for r in results}) > 1:
        raise EvalError("these runs differ in more than the seed: give runs of one experiment.")
    refuse_repeated_seeds(folders, results)


def refuse_repeated_seeds(folders, results):
    """
    Raises EvalError if two runs of one experiment have one seed, because n is a number of seeds.
    results: of read_run, one for each folder.
    """
    seen = {}
    for folder, r in zip(folders, results):
        key = experiment_of(r), r['about']['knobs']['seed']
        if key in seen:
            raise EvalError(f"{seen[key]} and {folder} are the same experiment with the same seed, "
                            f"{key[1]}, and n counts seeds: leave one of them out.")
        seen[key] = folder


def is_same_value(a, b):
    """ Whether two values of a knob are equal, or are paths of one file or folder. """
    if a == b or not isinstance(a, str) or not isinstance(b, str):
        return a == b
    return os.path.exists(a) and os.path.realpath(a) == os.path.realpath(b)
