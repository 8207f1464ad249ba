"""
Prerequisites: runs that another run needs, such as the pretraining of its LM. A config lists their
configs in `needs`. Those that are not finished are trained first, each by train.py in a child
process, which ends when its parent process ends.
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
from run.absent import absent_files
from run.clips import corpus_facts, holds_copy, is_same_corpus
from run.errors import ModelError
from run.finished import RUN_KNOBS, EvalError, is_same_value, read_run

# Environment variable that is set for a child, whose stdin is a pipe from its parent
WATCHED = 'NANOMSA_ENDS_WITH_PARENT'
# Knobs that are in the folder's name, or have one value for all runs in the same parent folder
IN_THE_NAME = {'corpus', 'seed', 'max_steps', 'train_fraction'}


def end_with_parent():
    """
    In a child: exit as soon as the parent process has ended, even by kill -9. Saved files stay
    intact.
    """
    if os.environ.pop(WATCHED, None) is None:
        return

    def watch():
        os.read(sys.stdin.fileno(), 1)   # returns when the parent ends, which closes the pipe
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_prerequisites(k, script, systems, suffix):
    """
    Train the unfinished prerequisites in k['needs'], in folders beside k['out_dir']. A knob that
    names a prerequisite (such as lm='lm_toy') is set to its folder. Returns the folders. Raises
    ModelError if the run itself could not be built later (System.refuse_impossible_model), EvalError if a
    prerequisite exists with other knobs or cannot be trained here, SystemExit if its training
    fails.
    """
    root, folders, commands = os.path.dirname(script), [], []
    for need in k['needs']:
        if not os.path.isfile(os.path.join(root, need)):
            raise EvalError(f"needs lists {need}, but there is no such config: correct its name.")
    pending = pending_knobs(k, systems)
    System = systems[k['system']]
    absent = absent_files(k, pending, root, 'text' in System.modalities_read(k))
    if absent:
        raise ModelError(absent)
    System.refuse_impossible_model(k, pending)   # raises before hours of training
    used = {k[knob]: knob for knob in pending}   # name of a prerequisite -> the knob that names it
    for need in k['needs']:
        child, config = os.path.splitext(os.path.basename(need))[0], os.path.join(root, need)
        if child not in used:
            continue
        wanted, flags, digest = wanted_knobs(k, config, script, systems)
        folder = os.path.join(os.path.dirname(k['out_dir']), child + suffix + digest)
        k[used[child]] = folder
        folders.append(folder)
        if ranks.agreed(os.path.exists(os.path.join(folder, 'result.json'))):
            check_finished(folder, wanted)
            continue
        argv = [config, f'--out_dir={folder}', *flags]
        if ranks.agreed(os.path.exists(os.path.join(folder, 'last.safetensors'))):
            argv.append('--resume=True')
        commands.append(shlex.join(['python', 'train.py', *argv]))
        if ranks.N_RANKS == 1:
            print(f"training the prerequisite {child} first, in {folder}", flush=True)
            train_in_child([script, *argv])
    if commands and ranks.N_RANKS > 1:
        raise EvalError("prerequisites are not trained under torchrun: run first "
                        + ' and '.join(commands))
    return folders


def folder_suffix(k):
    """
    The suffix of a run's folder name, behind the config's name: dataset, seed, max_steps and
    train_fraction, if they differ from their defaults.
    """
    parts = [(k['dataset'], k['dataset'] not in ('', 'toy')), (f"seed{k['seed']}", k['seed']),
             (f"steps{k['max_steps']}", k['max_steps'] > 0),
             (f"train{k['train_fraction']:g}", k['train_fraction'] != 1)]
    return ''.join(f'-{part}' for part, is_set in parts if is_set)


def pending_knobs(k, systems):
    """ The knobs of a run whose value is the name of a prerequisite (not its folder). """
    children = {os.path.splitext(os.path.basename(need))[0] for need in k['needs']}
    return [knob for knob in systems[k['system']].prerequisite_knobs(k) if k[knob] in children]


def wanted_knobs(k, config, script, systems):
    """
    The knobs that a prerequisite must have: (knobs, the flags of train.py that set them, a suffix
    for its folder). It takes those in its System.inherited_knobs from the run that needs it.
    """
    _, plain = run_knobs([config], *declared_knobs(script), systems)
    shared = {knob: k[knob] for knob in systems[plain['system']].inherited_knobs if knob in k}
    flags = [f'--{knob}={value}' for knob, value in shared.items()]
    # knobs that differ from its config make another run, in another folder
    free = RUN_KNOBS | IN_THE_NAME
    changed = {knob: v for knob, v in shared.items() if plain[knob] != v and knob not in free}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
    return plain | shared, flags, f'-{digest}' if changed else ''


def check_finished(folder, wanted):
    """
    Print that a finished prerequisite is used. Raises EvalError if its knobs are not `wanted`.
    """
    result = read_run(folder)
    knobs, best = result['about']['knobs'], result['state']['best']
    other = [knob for knob, v in wanted.items()
             if knob not in RUN_KNOBS and not is_same_value(knobs.get(knob), v)]
    if other == ['corpus'] and holds_copy(result['about']['corpus'], wanted['corpus']):
        other = []
    if other:
        raise EvalError(f"{folder} was trained with {other[0]}={knobs.get(other[0])!r}, but this "
                        f"run needs {wanted[other[0]]!r}: remove that folder, or give an --out_dir "
                        "that is not beside it.")
    print(f"using the finished prerequisite {folder} (valid {knobs['select']} {best:.4f})")


def refuse_other_corpus(folders, corpus):
    """
    Raises EvalError if a prerequisite was trained on another corpus than this one, or on another
    conversion of its source.
    """
    for folder in folders:
        if not is_same_corpus(read_run(folder)['about']['corpus'], corpus_facts(corpus)):
            raise EvalError(f"{folder} was trained on another file than the source of "
                            f"{corpus.folder}, or on another conversion of it: remove {folder}, or "
                            "give an --out_dir that is not beside it.")


def train_in_child(argv):
    """
    Run train.py with these arguments in a child process, which saves at Ctrl-C. Exits with the
    child's status if that is not 0.
    """
    # in its own session, the child gets no Ctrl-C from the terminal: it is passed on here, once
    child = subprocess.Popen([sys.executable, *argv], stdin=subprocess.PIPE, start_new_session=True,
                             env=os.environ | {WATCHED: '1'})
    while True:
        try:
            status = child.wait()
            break
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
    child.stdin.close()
    if status:
        sys.exit(status if status > 0 else 1)
