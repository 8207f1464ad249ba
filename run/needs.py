"""
Prerequisite runs: a config lists the configs of runs that it stands on in `needs`; those that are
not finished are trained first, each by train.py in a child process that ends with its parent.
"""
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading

from configurator import declared_knobs, run_knobs
from run import ranks
from run.report import RUN_KNOBS, EvalError, read_json, read_run

WATCHED = 'NANOMSA_ENDS_WITH_PARENT'   # set for a child: its stdin is a pipe that closes when its parent ends
# knobs that the folder's name says, or that all runs beside it share
IN_THE_NAME = {'corpus', 'seed', 'max_steps', 'train_fraction'}


def end_with_parent():
    """
    In a child: end this process as soon as its parent is gone, however that ended. What was saved
    stays whole.
    """
    if os.environ.pop(WATCHED, None) is None:
        return

    def watch():
        os.read(sys.stdin.fileno(), 1)   # returns when the parent's end of the pipe is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_prerequisites(k, script, systems, suffix):
    """
    Trains what is missing of the runs that k['needs'] lists, beside k['out_dir']. The knobs that
    named them (such as lm) then hold their folders. Returns the folders. Raises ModelError where the
    run itself could not be built (System.refuse_impossible_model), EvalError where a prerequisite is
    there that was trained otherwise, or cannot be trained here; SystemExit where its training stops.
    """
    root, folders, missing = os.path.dirname(script), [], []
    for need in k['needs']:
        if not os.path.isfile(os.path.join(root, need)):
            raise EvalError(f"needs lists {need}, and there is no such config file: correct its name.")
    pending = pending_knobs(k, systems)
    systems[k['system']].refuse_impossible_model(k, pending)   # before hours of training
    used = {k[knob]: knob for knob in pending}   # name of a run -> the knob that names it
    for need in k['needs']:
        child, config = os.path.splitext(os.path.basename(need))[0], os.path.join(root, need)
        if child not in used:
            continue
        wanted, flags, mark = wanted_knobs(k, config, script, systems)
        folder = os.path.join(os.path.dirname(k['out_dir']), child + suffix + mark)
        k[used[child]] = folder
        folders.append(folder)
        if ranks.agreed(os.path.exists(os.path.join(folder, 'result.json'))):
            take_finished(folder, wanted)
            continue
        argv = [config, f'--out_dir={folder}', *flags]
        if ranks.agreed(os.path.exists(os.path.join(folder, 'last.safetensors'))):
            argv.append('--resume=True')
        missing.append(shlex.join(['python', 'train.py', *argv]))
        if ranks.N_RANKS == 1:
            print(f"training a prerequisite first, {child}, in {folder}", flush=True)
            train_in_child([script, *argv])
    if missing and ranks.N_RANKS > 1:
        raise EvalError("under torchrun, prerequisites are not trained: run first "
                        + ' and '.join(missing))
    return folders


def folder_suffix(k):
    """ What the name of a run's folder has behind its config's, by the knobs that are not as usual. """
    parts = [(k['dataset'], k['dataset'] not in ('', 'toy')), (f"seed{k['seed']}", k['seed']),
             (f"steps{k['max_steps']}", k['max_steps'] > 0),
             (f"train{k['train_fraction']:g}", k['train_fraction'] != 1)]
    return ''.join(f'-{part}' for part, is_set in parts if is_set)


def pending_knobs(k, systems):
    """ The knobs of a run that name a prerequisite, which may not be trained yet. """
    children = {os.path.splitext(os.path.basename(need))[0] for need in k['needs']}
    return [knob for knob in systems[k['system']].prerequisite_knobs(k) if k[knob] in children]


def wanted_knobs(k, config, script, systems):
    """
    The knobs that a prerequisite must have, the flags that give them, and what they add to its
    folder's name.
    """
    _, plain = run_knobs([config], *declared_knobs(script), systems)
    shared = {knob: k[knob] for knob in systems[plain['system']].inherited_knobs if knob in k}
    flags = [f'--{knob}={value}' for knob, value in shared.items()]
    # one with other knobs than its config's is another run, and gets another folder
    free = RUN_KNOBS | IN_THE_NAME
    other = {knob: v for knob, v in shared.items() if plain[knob] != v and knob not in free}
    digest = hashlib.sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()[:6]
    return plain | shared, flags, f'-{digest}' if other else ''


def take_finished(folder, wanted):
    """
    Prints that a finished run is used. Raises EvalError where it was trained with other knobs than
    these.
    """
    result = read_run(folder)
    knobs, best = result['about']['knobs'], result['state']['best']
    other = [knob for knob, v in wanted.items() if knob not in RUN_KNOBS and knobs.get(knob) != v]
    if other:
        raise EvalError(f"{folder} was trained with {other[0]}={knobs.get(other[0])!r} and this run "
                        f"wants {wanted[other[0]]!r}: remove it, or give this run an --out_dir in "
                        "another folder.")
    print(f"uses the finished run {folder} (valid {knobs['select']} {best:.4f})")


def refuse_other_corpus(folders, corpus):
    """ Raises EvalError where a prerequisite was trained on another corpus than this one. """
    for folder in folders:
        if read_json(folder, 'config.json')['corpus']['sha256'] != corpus.sha256:
            raise EvalError(f"{folder} was trained on another file than {corpus.folder} was made "
                            "from: remove it, or give this run an --out_dir in another folder.")


def train_in_child(argv):
    """
    One run of train.py in a process of its own. Ctrl-C lets it save. Exits with its status where it
    is not 0.
    """
    child = subprocess.Popen([sys.executable, *argv], stdin=subprocess.PIPE, env=os.environ | {WATCHED: '1'},
                             start_new_session=True)   # so that Ctrl-C reaches it through us, once
    while True:
        try:
            status = child.wait()
            break
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
    child.stdin.close()
    if status:
        sys.exit(status if status > 0 else 1)
