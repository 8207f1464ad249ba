"""
Evaluates finished runs from their folders.

    python eval.py out/RUN                            test the best checkpoint, write the report
    python eval.py out/RUN out/RUN-seed1 ..           compare runs: mean +- std (n), differences
    python eval.py out/RUN --corpus=OTHER             test on another corpus (--modalities too)
    python eval.py out/RUN --modalities=text,vision   test without audio; text is always read
    python eval.py out/RUN --clip=mine.npz            predict your own clips (see run/clips.py)
    python eval.py out/RUN --text="I loved it"        predict this text; with --clip: as its text
    python eval.py out/RUN --export=FOLDER            copy the run for others, without its corpus
    .. --trust_remote_code=True    with any command: the LM's authors may run their code here
    .. --data_dir=FOLDER           with any command: folder of converted corpora ('data')

In Python: from eval import load (run/predictor.py). metrics.py: when a difference is called real.
"""
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from data import Corpus, Feed, epoch_order, open_corpus
from metrics import SHOWN, check_finite, claim, markdown_table, mean_std_n, score_by, task_metrics
from model import SYSTEMS
from run import ranks
from run.clips import Clips, corpus_facts, export, is_copy, is_same_corpus
from run.command_line import words_and_flags
from run.errors import UserError
from run.fingerprints import same_logits, sample_logits, tokenizer_fingerprint
from run.finished import (
    EvalError,
    experiment_of,
    read_predictions,
    read_run,
    refuse_repeated_seeds,
)
from run.folder import ROOT, find_folder, load_checkpoint, load_tensors
from run.machine import devices, hold_memory, print_any_text
from run.predictor import Predictor, describe_clips, knobs_with, transferred, what_is_read
from run.report import print_and_save
from run.size_limit import size_limit
from system import checked_prediction

# ---------------------------------------------------------------------------------------------------------
# One model on one split

@torch.no_grad()
def evaluate(model, feed, split, autocast=nullcontext, **how):
    """
    Evaluate a model on a whole split -> (metrics, predictions by name in the split's order).

    Each metric is computed once, in float32, on the predictions for all clips; it is not a mean
    over batches. A model without predictions (an LM) gives {'loss': ..} and {}: the loss of each
    batch, a mean over its tokens, averaged with the numbers of clips as weights. `how` goes to
    model.predict. Raises ValueError if a prediction is NaN or inf.
    """
    was_training = model.training
    model.eval()
    collected, n, own_batches = {}, feed.n_clips[split], []
    batches = epoch_order(feed.cost(split), feed.k['batch_size'], seed=0, epoch=None)
    # torchrun: each of n processes takes every n-th batch; a process without one repeats the last
    for first in range(0, len(batches), ranks.N_RANKS):
        index = batches[min(first + ranks.RANK, len(batches) - 1)]
        batch = feed(split, index)
        with autocast():
            if model.predicts:
                out = checked_prediction(model, model.predict(batch, **how), len(index))
                out = out | dict(label=batch['label'])
            else:
                out = dict(loss=model(batch)['loss'].expand(len(index)))
        arrays = {name: v.float().cpu().numpy() for name, v in out.items()}  # [B] or [B,K]
        own_batches.append((index, arrays))
    for index, arrays in (pair for rank in ranks.gathered(own_batches) for pair in rank):
        for name, v in arrays.items():
            collected.setdefault(name, np.zeros((n, *v.shape[1:]), np.float32))[index] = v
    model.train(was_training)
    check_finite(collected, feed.corpus.id(split))
    if not model.predicts:
        return dict(loss=float(collected['loss'].mean(dtype=np.float64))), {}
    metrics = task_metrics(collected['pred'], collected['label'], feed.info)
    if 'unread' in collected:
        metrics['unread'] = float(collected['unread'].mean(dtype=np.float64))
    return metrics, collected


def evaluate_controls(model, feed, autocast=nullcontext):
    """
    {name: metrics} of a trained model's controls (System.controls) on the test set. A control whose
    predictions are NaN or inf is reported and left out, because the run itself is still valid.
    """
    found = {}
    for row, (how, _) in model.controls(feed.k).items():
        try:
            found[row], _ = evaluate(model, feed, 'test', autocast, **how)
        except ValueError as e:
            print(f"  {row}: {e}")
    return found


def majority_metrics(corpus, label='label', train_clips=slice(None)):
    """
    Test metrics of the majority baseline, which predicts a constant: the largest class, or the
    median label (the best constant under L1), of the train split.
    """
    info, y = corpus.labels[label], corpus.label('test', label)
    train = corpus.label('train', label)[train_clips]
    best = np.bincount(train).argmax() if info['kind'] == 'classes' else np.median(train)
    return task_metrics(np.full(len(y), best), y, info)


# ---------------------------------------------------------------------------------------------------------
# Loading a finished run

def load(folder, trust_remote_code=False, data_dir=None):
    """
    A finished or exported run for notebooks and scripts, a Predictor, from any working directory. A
    relative `folder` is in the current folder, or else in the checkout. data_dir: the folder of
    converted corpora, that of the checkout by default. Reads the corpus only where evaluate needs
    it. Raises EvalError, ModelError, CorpusError.
    """
    data_dir = os.path.join(ROOT, 'data') if data_dir is None else str(data_dir)
    folder = find_folder(str(folder)).rstrip('/')
    return Predictor(load_run(folder, True, trust_remote_code, data_dir))


def load_run(folder, without_corpus=False, trust_remote_code=False, data_dir='data'):
    """
    Load the best checkpoint of a run. The namespace that it returns has the model (in eval mode),
    predict(batch), the corpus that it was trained on, feed(corpus, knobs) -> a Feed, and
    test(corpus, knobs) -> evaluate's result on the test split. without_corpus=True reads the run's
    folder alone, which is enough to predict a user's own clips; own_corpus() opens the corpus later.

    The folder may come from a stranger. It may name an LM and a corpus folder: both names are
    printed, both are read as data, and both must match what the checkpoint has: the LM's and the
    tokenizer's fingerprint, the corpus's SHA-256 and contents. A report also reads the result.json
    of the prerequisite runs that it names. The folder cannot run code or choose
    where files are written; the caller can, by trust_remote_code and data_dir. Raises EvalError,
    ModelError, CorpusError.
    """
    result = read_run(folder)
    about = result['about']
    facts = about['corpus']
    if about['knobs'].get('trust_remote_code') and not trust_remote_code:
        raise EvalError(f"{folder} needs the Python code that the authors of the LM "
                        f"{about['knobs']['lm']!r} ship with it: add --trust_remote_code=True to "
                        "this command if you trust them.")
    k = about['knobs'] | dict(data_dir=data_dir, out_dir=folder, needs=[])
    trained_in = about['knobs']['out_dir']
    facts['folder'] = find_folder(facts['folder'], folder, trained_in)
    if k.get('lm', 'new') not in ('new', 'lm'):   # those two are no paths
        k['lm'] = find_folder(k['lm'], folder, trained_in)
    if 'trust_remote_code' in k:
        k['trust_remote_code'] = trust_remote_code
    about['knobs'] = k
    dtype, as_data = getattr(torch, about['dtype']), not trust_remote_code
    tensors, _ = load_checkpoint(os.path.join(folder, 'best.safetensors'))
    try:
        corpus = Clips(facts) if without_corpus else open_own_corpus(folder, facts)
        model, tokenizer = build_model(folder, k, corpus, dtype, tensors, as_data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError,
            OverflowError) as e:
        reason = ' '.join(str(e).split())[:160]
        raise EvalError(f"{folder} is damaged or of another version, as its knobs give no model "
                        f"({type(e).__name__}: {reason}): restore or retrain it.") from e
    check_fingerprints(folder, k, about, model, tokenizer)
    load_tensors(model, tensors, folder)
    device = about['device'] if devices()[about['device']] else 'cpu'
    model.to(device)
    if device == 'cpu':
        hold_memory()

    def autocast():
        return torch.autocast(device, dtype, enabled=dtype is not torch.float32)

    def make_feed(corpus, k):
        # a user's clips do not show which frame is that of the first word
        first_word = about.get('first_word') if isinstance(corpus, Clips) else None
        feed = Feed(corpus, k, tokenizer, device, model, as_data, first_word)
        if feed.lm_fingerprint and feed.lm_fingerprint != about['lm_fingerprint']:
            raise EvalError(other_lm_message(folder, k))
        return feed

    def test(corpus, k):
        try:
            return evaluate(model, make_feed(corpus, k), 'test', autocast)
        except ValueError as e:
            raise EvalError(f"{folder}: {e}.") from None

    @torch.no_grad()
    def predict(batch):
        with autocast():
            return model.predict(batch)

    return SimpleNamespace(
        folder=folder, own_corpus=lambda: open_own_corpus(folder, facts), corpus=corpus,
        model=model.eval(), tokenizer=tokenizer, feed=make_feed, test=test, predict=predict,
        result=result, knobs=k, info=result['info'], facts=facts, system=SYSTEMS[k['system']],
        values=model.prompt.values if model.prompt else None)


def open_own_corpus(folder, facts):
    """
    Open the corpus that a run was trained on. Raises EvalError, CorpusError if it is missing or was
    made from another source file, or by another conversion of it.
    """
    if not os.path.isfile(os.path.join(facts['folder'], 'meta.json')):
        raise EvalError(f"the corpus folder {facts['folder']} that {folder} was trained on is not "
                        "here: convert its source file into that folder again, or predict clips "
                        "with --clip=, which needs no corpus.")
    corpus = Corpus(facts['folder'])
    if not is_same_corpus(facts, corpus_facts(corpus)):
        raise EvalError(f"{corpus.folder} was made from another source file, or by another "
                        f"conversion of it, than {folder} was trained on: convert the original "
                        "source again, with the same flags.")
    print(f"  {folder} names the corpus folder {corpus.folder}, which is read as data")
    return corpus


def build_model(folder, k, corpus, dtype, tensors, as_data):
    """
    A run's model, without the tensors of its checkpoint yet, and its tokenizer. as_data: see
    System.build.
    """
    own_lm = os.path.join(folder, 'lm')
    for own in (own_lm, os.path.join(folder, 'hf')):
        if os.path.islink(own):
            raise EvalError(f"{own} is a link, but an LM in a run's folder must not lie elsewhere: "
                            "replace the link by the LM's files.")
    system = SYSTEMS[k['system']]
    if k.get('lm') == 'lm' and os.path.isdir(own_lm):
        k['lm'] = own_lm   # an export holds its LM
    elif k.get('lm') == 'lm' and not os.path.isdir('lm'):
        raise EvalError(f"{folder} names the LM in its own folder lm, which is missing: copy the "
                        "whole exported folder again.")
    elif k.get('lm', 'new') != 'new' and 'text' in system.modalities_read(k):
        how = 'is read as data' if as_data else 'may run its own code'
        print(f"  {folder} names the LM {k['lm']}, which {how}")
    torch.manual_seed(k['seed'])   # for a random LM (lm_init), which no checkpoint holds
    lm = '' if k.get('lm', 'new') == 'new' else k['lm']
    with size_limit(folder, tensors, lm, lambda: system.float32_bytes(k)):
        return system.build(k, corpus, folder, dtype, trained=True, as_data=as_data)


def check_fingerprints(folder, k, about, model, tokenizer):
    """ Raises EvalError if the run was trained with another LM or tokenizer than these. """
    if model.lm and model.lm.fingerprint() != about['lm_fingerprint']:
        raise EvalError(other_lm_message(folder, k))
    recorded = about.get('lm_answer')
    if model.lm and recorded and not same_logits(sample_logits(model.lm), recorded, about['dtype']):
        raise EvalError(f"the LM {k['lm']} has the weights that {folder} was trained with but "
                        "computes other outputs, so its configuration was changed: restore it.")
    recorded = about.get('tokenizer_fingerprint')
    if recorded and tokenizer and tokenizer_fingerprint(tokenizer) != recorded:
        raise EvalError(f"the tokenizer of the LM {k.get('lm', folder)} differs from the one that "
                        f"{folder} was trained with: put the original back.")


def other_lm_message(folder, k):
    return (f"the LM {k['lm']} has other weights than the one that {folder} was trained with: put "
            "the original back.")


def load_run_and_feed(folder, **allowed):
    """ load_run's namespace, and the Feed of the run's own corpus. Raises as load_run does. """
    run = load_run(folder, **allowed)
    return run, run.feed(run.corpus, run.knobs)


# ---------------------------------------------------------------------------------------------------------
# The commands

def evaluate_again(folder, **allowed):
    """
    Evaluate the best checkpoint of a run on its test set again: print the report's table, overwrite
    test.jsonl, result.json and the reports, return the table. Raises EvalError, ModelError,
    CorpusError.
    """
    r = read_run(folder)   # not run.result, in which load_run changes knobs
    run = load_run(folder, **allowed)
    r['ceilings'] = run.corpus.meta.get('ceilings')
    r['test'], predictions = run.test(run.corpus, run.knobs)
    try:
        return print_and_save(folder, r, run.corpus, predictions)
    except OSError as e:
        raise EvalError(f"{e.filename or folder} cannot be written ({e.strerror}), so the scores "
                        "above are not saved: free disk space, or copy the run to another "
                        "disk.") from None


def cells(metrics, keys):
    return [f'{metrics[key]:.3f}' for key in keys]


def evaluate_without(folder, modalities, **allowed):
    """
    Evaluate a run on its own test set with only some streams: a list of 'audio', 'vision', where []
    is the text alone. Returns a table. Raises EvalError, ModelError, CorpusError.
    """
    run = load_run(folder, **allowed)
    return beside_trained(run, run.corpus, knobs_with(run, modalities))


def beside_trained(run, corpus, k):
    """ A table of the run's test metrics as trained, and on its corpus with the knobs k. """
    trained = run.result['test']
    metrics, _ = run.test(corpus, k)
    keys = [key for key in trained if key in metrics]
    rows = [['as trained'] + cells(trained, keys), [what_is_read(run, k)] + cells(metrics, keys)]
    return markdown_table([f"{run.result['about']['name']}, test"] + keys, rows)


def evaluate_on(folder, source, modalities=None, **allowed):
    """
    Evaluate a run on the test split of another corpus, without training on it (zero-shot;
    CrossSent, section 4.6). Returns a table. modalities: a list of 'audio', 'vision', or [] for
    text alone; streams of other widths are other features and must be left out. Features are
    standardised with the run's own mean and std. Raises EvalError, ModelError, CorpusError.
    """
    run = load_run(folder, without_corpus=True, **allowed)
    k = knobs_with(run, modalities)
    other = open_corpus(source, k['data_dir'])
    if is_copy(run.facts, other):   # the run's own corpus, in another folder
        return beside_trained(run, other, k)
    home, other = run.own_corpus(), transferred(run, other, k['modalities'])
    (here, _), (there, _) = run.test(home, k), run.test(other, k)
    keys = [key for key in here if key in there]
    rows = [[home.name] + cells(here, keys), [f'{other.name}, zero-shot'] + cells(there, keys)]
    header = f"{run.result['about']['name']} ({what_is_read(run, k)}) on"
    return markdown_table([header] + keys, rows)


def compare(folders):
    """
    Compare runs as a table. Runs that differ in the seed alone share a row: mean +- std (n) of each
    metric, and the paired difference to the first row (of the MAE, or of the weighted F1 for
    classes) with its 95 % bootstrap interval over clips and seeds. Raises EvalError.
    """
    results = [read_run(folder) for folder in folders]
    refuse_repeated_seeds(folders, results)
    clips, label = None, None
    experiments = {}   # experiment_of -> list of (metrics, predictions [N], folder)
    for folder, r in zip(folders, results):
        if not SYSTEMS[r['about']['knobs']['system']].predicts:
            raise EvalError(f"{folder} is a language model and has no predictions: leave it out.")
        ids, p = read_predictions(folder)
        if clips is None:
            clips, label, info = ids, p['label'], r['info']
        if ids != clips or not np.array_equal(p['label'], label):
            raise EvalError(f"{folder} was tested on other clips or labels than {folders[0]}, and "
                            "paired differences need the same ones: leave one of the two out.")
        experiments.setdefault(experiment_of(r), []).append((r['test'], p['pred'], folder))
    names = [name for name, _ in experiments]
    all_metrics = [metrics for runs in experiments.values() for metrics, *_ in runs]
    keys = [key for key in SHOWN if any(key in metrics for metrics in all_metrics)]
    by, metric = score_by(info)
    first = np.stack([pred for _, pred, _ in next(iter(experiments.values()))])  # [seeds,N]
    rows = []
    for (name, _), runs in experiments.items():
        if names.count(name) > 1:
            name = os.path.basename(runs[0][2])   # the same config with other knobs: use the folder
        row = [name]
        for key in keys:
            values = [metrics[key] for metrics, *_ in runs if key in metrics]
            row.append(mean_std_n(values) if values else '-')
        if len(experiments) > 1:
            preds = np.stack([pred for _, pred, _ in runs])  # [seeds,N]
            row.append(claim(metric, first, preds, label, by)['text'] if rows else '-')
        rows.append(row)
    difference = [f'{by} minus first row [95 % interval]'] if len(experiments) > 1 else []
    return markdown_table(['test'] + keys + difference, rows)


def main(argv):
    """ Run one of the commands above. Raises UserError. """
    words, flags = words_and_flags(argv)
    folders = [word.rstrip('/') for word in words]
    if 'help' in flags or '-h' in folders:
        print(__doc__)
        return
    if not folders:
        sys.exit(__doc__)
    allowed = take_permissions(flags)
    alone = {'clip', 'text'} if {'clip', 'text'} & set(flags) else {'export'} & set(flags)
    unknown = set(flags) - (alone or {'corpus', 'modalities'})
    if unknown or flags and len(folders) > 1:
        raise EvalError(f"--{min(unknown or flags)} cannot be given here: the flags for one run are "
                        "--corpus=OTHER, --modalities=text,audio,vision, and alone --clip=FILE, "
                        "--text=WORDS (or both) or --export=FOLDER; --trust_remote_code=True and "
                        "--data_dir=FOLDER go with every command (python eval.py --help).")
    only = flags['modalities'].split(',') if 'modalities' in flags else None
    if set(only or ()) - {'text', 'audio', 'vision'}:
        raise EvalError(f"--modalities={flags['modalities']} must list text, audio or vision (the "
                        "video).")
    run = folders[0]
    if {'clip', 'text'} & set(flags):
        run = load_run(run, without_corpus=True, **allowed)
        describe_clips(run, flags.get('clip'), flags.get('text'))
    elif 'export' in flags:
        load_run(run, without_corpus=True, **allowed)   # an export must be loadable
        print(export(run, read_run(run), flags['export']))
    elif len(folders) > 1:
        print(compare(folders))
    elif 'corpus' in flags:
        print(evaluate_on(run, flags['corpus'], only, **allowed))
    elif 'modalities' in flags:
        print(evaluate_without(run, [m for m in only if m != 'text'], **allowed))
    else:
        evaluate_again(run, **allowed)


def take_permissions(flags):
    """ Remove the flags that every command takes -> arguments of load_run. Raises EvalError. """
    allowed = {}
    if 'trust_remote_code' in flags:
        value = flags.pop('trust_remote_code')
        if value not in ('True', 'False'):
            raise EvalError(f"--trust_remote_code={value} must be True or False.")
        allowed['trust_remote_code'] = value == 'True'
    if 'data_dir' in flags:
        allowed['data_dir'] = flags.pop('data_dir')
    return allowed


if __name__ == '__main__':
    print_any_text()
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"eval: {e}")
    except KeyboardInterrupt:
        sys.exit("eval: interrupted.")
    except OSError as e:
        sys.exit(f"eval: {e.filename or 'a file'} cannot be read or written ({e.strerror}): free "
                 "disk space, or correct the path.")
