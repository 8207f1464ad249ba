"""
What a run is worth: its best checkpoint on a test set, or many runs compared.

    python eval.py out/deepmlf_toy                            the best checkpoint on its test set again, and the report
    python eval.py out/deepmlf_toy out/deepmlf_toy-seed1 ..   many runs: mean +- std (n), paired differences
    python eval.py out/RUN --corpus=OTHER [--modalities=text]  another corpus's test set, without training there
    python eval.py out/RUN --modalities=text,vision            its own test set, with these alone
    python eval.py out/RUN --clip=mine.npz                     a user's own clips (run/clips.py says what a file holds)
    python eval.py out/RUN --export=FOLDER                     what another person needs of a run, and no corpus
    .. --trust_remote_code=True     lets the authors of the run's LM run their own code here
    .. --data_dir=FOLDER            where files that are made on the way are kept ('data')

Metrics, and the rule for calling a difference real, are in metrics.py.
"""
import json
import os
import re
import sys
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch

from data import Corpus, CorpusError, Feed, epoch_order, open_corpus
from lm import ModelError, same_answer
from metrics import SHOWN, check_finite, claim, markdown_table, mean_std_n, score_by, task_metrics
from model import SYSTEMS
from run import ranks
from run.clips import ClipError, Clips, Transferred, export, opinions, read_clips
from run.folder import load_checkpoint, load_tensors, write_text
from run.load_lm import tokenizer_fingerprint
from run.machine import devices, hold_memory
from run.pictures import draw_attention
from run.report import RUN_KNOBS, EvalError, read_predictions, read_run, report, write_predictions
from system import checked_prediction

# ---------------------------------------------------------------------------------------------------------
# One model on one split

@torch.no_grad()
def evaluate(model, feed, split, autocast=nullcontext, **how):
    """
    A model on a whole split: (metrics, predictions in the split's order). Used by train.py and by
    the command line.

    Nothing is averaged over batches: predictions are collected and each metric is computed once, in
    float32 on all clips. A model that only has a loss gives {'loss': mean over clips} and no
    predictions. `how` goes to model.predict. Raises ValueError where a prediction is NaN or inf.
    """
    was_training = model.training
    model.eval()
    got, n, mine = {}, feed.n_clips[split], []
    batches = epoch_order(feed.cost(split), feed.k['batch_size'], seed=0, epoch=None)
    # torchrun: each process takes every n-th batch; a batch that comes twice overwrites itself
    for first in range(0, len(batches), ranks.N_RANKS):
        index = batches[min(first + ranks.RANK, len(batches) - 1)]
        batch = feed(split, index)
        with autocast():
            if model.predicts:
                out = checked_prediction(model, model.predict(batch, **how), len(index))
                out = out | dict(label=batch['label'])
            else:
                out = dict(loss=model(batch)['loss'].expand(len(index)))
        mine.append((index, {name: v.float().cpu().numpy() for name, v in out.items()}))  # [B] or [B,K]
    for index, out in (pair for theirs in ranks.gathered(mine) for pair in theirs):
        for name, v in out.items():
            got.setdefault(name, np.zeros((n, *v.shape[1:]), np.float32))[index] = v
    model.train(was_training)
    check_finite(got, feed.corpus.id(split))
    if not model.predicts:
        return dict(loss=float(got['loss'].mean(dtype=np.float64))), {}
    metrics = task_metrics(got['pred'], got['label'], feed.info)
    if 'unread' in got:
        metrics['unread'] = float(got['unread'].mean(dtype=np.float64))
    return metrics, got


def evaluate_controls(model, feed, autocast=nullcontext):
    """
    Row -> metrics of a trained model's controls on the test set. One that cannot be scored is left
    out with a sentence: the run itself is whole.
    """
    found = {}
    for row, (how, _) in model.controls(feed.k).items():
        try:
            found[row], _ = evaluate(model, feed, 'test', autocast, **how)
        except ValueError as e:
            print(f"  {row}: {e}")
    return found


def constant(corpus, label='label', train_clips=slice(None)):
    """
    The test metrics of the best constant: the train median (under L1), or the largest class. What
    "no model" scores.
    """
    train, y, info = corpus.label('train', label)[train_clips], corpus.label('test', label), corpus.labels[label]
    best = np.bincount(train).argmax() if info['kind'] == 'classes' else np.median(train)
    return task_metrics(np.full(len(y), best), y, info)


@torch.no_grad()
def continuation(model, tokenizer, texts=('The film was', 'I said that'), n_new=16):
    """
    How a model's frozen LM continues some texts when no adapter is in the way, greedily; None where
    it has no LM. train.py asks before and after, and the report says whether the LM still continues
    them as it did.
    """
    if not model.lm or not tokenizer:
        return None
    continued, device = [], model.lm.parts['embed'].weight.device
    for ids in tokenizer(list(texts), add_special_tokens=True)['input_ids']:
        ids = (list(ids) or [0]) * (2 if len(ids) < 2 else 1)
        ids = torch.tensor(ids, device=device)  # [T], at least 2
        n_read = torch.tensor([len(ids) - 1], device=device)
        new = model.lm.go_on(model.lm.embed(ids[None, :-1]), n_read, ids[-1:], n_new)  # [1,n_new]
        continued.append(tokenizer.decode(ids.tolist() + new[0].clamp(min=0).tolist()))
    return continued


# ---------------------------------------------------------------------------------------------------------
# A run from its files

def revive(folder, without_corpus=False, trust_remote_code=False, data_dir='data'):
    """
    The best model of a run from its files, with corpus, model (in eval mode), predict(batch),
    feed(corpus, knobs) -> its Feed, and test(corpus, knobs) -> what evaluate gives on the test
    split of a corpus. without_corpus: from the run's folder alone, for a user's own clips; an LM
    that was exported along is in the folder's lm/.

    The folder may come from a stranger. It may name an LM and a corpus folder; these are read as
    data, printed, and must have the fingerprint and the SHA-256 that the checkpoint has. It cannot
    make code run and cannot choose where files are written: that is for the caller's
    trust_remote_code and data_dir. Raises EvalError, ModelError, CorpusError.
    """
    result = read_run(folder)
    about = result['about']
    facts = about['corpus']
    if about['knobs'].get('trust_remote_code') and not trust_remote_code:
        raise EvalError(f"{folder} asks to run the code that the authors of the LM "
                        f"{about['knobs']['lm']!r} put beside it: add --trust_remote_code=True to "
                        "this command if you trust them.")
    k = about['knobs'] | dict(data_dir=data_dir, out_dir=folder, needs=[])
    if 'trust_remote_code' in k:
        k['trust_remote_code'] = trust_remote_code
    about['knobs'] = k
    if about['dtype'] not in ('float32', 'bfloat16', 'float16') or about['device'] not in devices():
        raise EvalError(f"{folder} names the dtype {about['dtype']!r} and the device "
                        f"{about['device']!r}, which are not known.")
    dtype = getattr(torch, about['dtype'])
    try:
        corpus = Clips(facts) if without_corpus else named_corpus(folder, facts)
        model, tokenizer = revived_model(folder, k, corpus, dtype, as_data=not trust_remote_code)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as e:
        raise EvalError(f"{folder} is damaged or not a run of this version: its knobs make no model "
                        f"({type(e).__name__}: {str(e)[:160]}).") from e
    check_fingerprints(folder, k, about, model, tokenizer)
    load_tensors(model, load_checkpoint(os.path.join(folder, 'best.safetensors'))[0], folder)
    device = about['device'] if devices()[about['device']] else 'cpu'
    model.to(device)
    if device == 'cpu':
        hold_memory()

    def autocast():
        return torch.autocast(device, dtype, enabled=dtype is not torch.float32)

    def feed(corpus, k):
        fed = Feed(corpus, k, tokenizer, device, model, as_data=not trust_remote_code)
        if fed.lm_fingerprint and fed.lm_fingerprint != about['lm_fingerprint']:
            raise EvalError(other_lm(folder, k))
        return fed

    def test(corpus, k):
        try:
            return evaluate(model, feed(corpus, k), 'test', autocast)
        except ValueError as e:
            raise EvalError(f"{folder}: {e}.") from None

    @torch.no_grad()
    def predict(batch):
        with autocast():
            return model.predict(batch)

    return SimpleNamespace(
        corpus=corpus, model=model.eval(), feed=feed, test=test, predict=predict, result=result, knobs=k,
        info=result['info'], facts=facts, system=SYSTEMS[k['system']],
        values=model.prompt.values if model.prompt else None)


def named_corpus(folder, facts):
    """
    The corpus folder that a run names, if it is there and made from the same source. Raises
    EvalError, CorpusError.
    """
    if not os.path.isfile(os.path.join(facts['folder'], 'meta.json')):
        raise EvalError(f"the corpus folder {facts['folder']} that {folder} was trained on is not "
                        "here: convert its source to that place again, or evaluate another corpus "
                        "with --corpus= or clips with --clip=.")
    corpus = Corpus(facts['folder'])
    if corpus.sha256 != facts['sha256']:
        raise EvalError(f"{corpus.folder} was made from another source file than the one that "
                        f"{folder} was trained on.")
    print(f"  {folder} names the corpus folder {corpus.folder}: read as data")
    return corpus


def revived_model(folder, k, corpus, dtype, as_data):
    """
    The model of a run and its tokenizer, with the weights of its LM and none from its checkpoint
    yet.
    """
    own_lm = os.path.join(folder, 'lm')
    for own in (own_lm, os.path.join(folder, 'hf')):
        if os.path.islink(own):
            raise EvalError(f"{own} is a link, and a run's own LM is read from its folder alone: "
                            "put the LM itself there.")
    system = SYSTEMS[k['system']]
    if k.get('lm') == 'lm' and os.path.isdir(own_lm):
        k['lm'] = own_lm   # an export has its LM beside its checkpoint
    elif k.get('lm', 'new') != 'new' and 'text' in system.seen(k):
        print(f"  {folder} names the LM {k['lm']}: read as data")
    torch.manual_seed(k['seed'])   # a random LM (lm_init) is in no checkpoint: it is drawn again as it was
    return system.build(k, corpus, folder, dtype, trained=True, as_data=as_data)


def check_fingerprints(folder, k, about, model, tokenizer):
    """
    Raises EvalError where the LM or its tokenizer is not the one that the run was trained with.
    """
    if model.lm and model.lm.fingerprint() != about['lm_fingerprint']:
        raise EvalError(other_lm(folder, k))
    theirs = about.get('lm_answer')
    if model.lm and theirs and not same_answer(model.lm.answer(), theirs, about['dtype']):
        raise EvalError(f"the LM {k['lm']} has the weights that {folder} was trained with and computes "
                        "something else, so its configuration was changed: put the old one back.")
    theirs = about.get('tokenizer_fingerprint')
    if theirs and tokenizer and tokenizer_fingerprint(tokenizer) != theirs:
        raise EvalError(f"the tokenizer of the LM {k.get('lm', folder)} is not the one that "
                        f"{folder} was trained with: put that one back.")


def other_lm(folder, k):
    """ The sentence for an LM of another fingerprint. """
    return f"the LM {k['lm']} is not the one that {folder} was trained with: put that one back."


def revive_and_feed(folder, **allowed):
    """ The best model of a run, as revive has it, and its Feed. Raises EvalError and its kin. """
    run = revive(folder, **allowed)
    return run, run.feed(run.corpus, run.knobs)


# ---------------------------------------------------------------------------------------------------------
# What the command line does

def evaluate_clips(folder, path, **allowed):
    """
    What a run predicts for a user's own clips, and a picture of where it looks. Raises EvalError
    and its kin.
    """
    run = revive(folder, without_corpus=True, **allowed)
    if not run.system.predicts:
        raise EvalError(f"{folder} is a language model: it says no score of a clip.")
    rows, repaired = read_clips(path, run.facts, run.system.seen(run.knobs))
    with tempfile.TemporaryDirectory() as scratch:   # for hidden states of these texts
        run.knobs |= dict(train_fraction=1.0, shuffle_streams=False, data_dir=scratch)
        text, _ = opinions(run, rows)
        feed, stem = run.feed(Clips(run.facts, rows), run.knobs), os.path.splitext(os.path.basename(path))[0]
        cut = [note for note in feed.notes if note.startswith('test text') and ', 0 cut' not in note]
        repaired += cut
        for i in range(len(rows)):
            name = stem + (f'-{i}' if len(rows) > 1 else '')
            draw_attention(run, feed, i, os.path.join(folder, 'clips'), name)
    return '\n'.join(repaired + [text])


def rerun(folder, **allowed):
    """
    The best checkpoint of a run on its test set again, from the files alone: writes test.jsonl and
    report.md anew, and returns the report. Raises EvalError, ModelError, CorpusError.
    """
    r, run = read_run(folder), revive(folder, **allowed)
    r['test'], predictions = run.test(run.corpus, run.knobs)
    if predictions:
        write_predictions(folder, run.corpus, predictions)
    write_text(os.path.join(folder, 'result.json'), json.dumps(r, indent=1))
    return report(folder)


def cells(metrics, keys):
    return [f'{metrics[key]:.3f}' for key in keys]


def evaluate_without(folder, modalities, **allowed):
    """
    A run on its own test set with these of 'audio', 'vision' alone ([]: the text), as a table.
    Raises EvalError and its kin.
    """
    run = revive(folder, **allowed)
    r, k = run.result, run.knobs
    modalities = [m for m in k['modalities'] if m in modalities]   # a stream that it was not trained on is no test
    metrics, _ = run.test(run.corpus, k | dict(modalities=modalities))
    keys = [key for key in r['test'] if key in metrics]
    rows = [['as trained'] + cells(r['test'], keys),
            [', '.join(['text'] + modalities)] + cells(metrics, keys)]
    return markdown_table([f"{r['about']['name']}, test"] + keys, rows)


def evaluate_on(folder, source, modalities=None, **allowed):
    """
    A run on the test split of another corpus, without training there (zero-shot; CrossSent's 4.6),
    as a table. Features are standardised as the run's own were. modalities: a list of 'audio',
    'vision' to let through, [] for text alone; a stream whose width differs must be left out, as
    then it is another feature set. Raises EvalError, ModelError, CorpusError.
    """
    run = revive(folder, **allowed)
    r, home, k = run.result, run.corpus, run.knobs
    other = open_corpus(source, k['data_dir'])
    modalities = [m for m in k['modalities'] if modalities is None or m in modalities]
    for m in modalities:
        if other.widths.get(m) != home.widths.get(m):
            raise EvalError(f"{m} is {home.widths.get(m)} wide in {home.name} and "
                            f"{other.widths.get(m)} in {other.name}, so they are other features: "
                            "leave it out, as --modalities=text does with both.")
    if (info := other.labels.get(k['label'])) != r['info']:
        raise EvalError(f"the label {k['label']!r} is {r['info']} in {home.name} and {info} in "
                        f"{other.name}: they do not compare.")
    here, _ = run.test(home, k | dict(modalities=modalities))
    there, _ = run.test(Transferred(other, home, modalities), k | dict(modalities=modalities))
    keys = [key for key in here if key in there]
    rows = [[home.name] + cells(here, keys), [f'{other.name}, zero-shot'] + cells(there, keys)]
    header = f"{r['about']['name']} ({', '.join(['text'] + modalities)}) on"
    return markdown_table([header] + keys, rows)


def experiment_of(r):
    """
    What a run is but for its seed and the knobs of the run: (name, its knobs as text).
    Prerequisites carry the seed in their names.
    """
    free = RUN_KNOBS | {'seed'}
    knobs = {knob: re.sub(r'-seed\d+', '', str(v)) for knob, v in r['about']['knobs'].items() if knob not in free}
    return r['about']['name'], json.dumps(knobs, sort_keys=True)


def one_system(folders):
    """ Raises EvalError unless these runs differ in the seed alone. """
    if len({experiment_of(read_run(f)) for f in folders}) > 1:
        raise EvalError("these runs differ in more than the seed: one system at a time.")


def compare(folders):
    """
    Many runs as a table, a row a system: mean +- std (n), and the paired difference to the first
    row (in MAE; in weighted F1 for classes) with its 95 % bootstrap interval over clips and seeds.
    Runs whose knobs differ in the seed alone are one system. Raises EvalError.
    """
    systems, clips, label = {}, None, None   # (name, knobs) -> list of (metrics, predictions [N], folder)
    for folder in folders:
        r = read_run(folder)
        if not SYSTEMS[r['about']['knobs']['system']].predicts:
            raise EvalError(f"{folder} is a language model: it has a loss, no predictions to "
                            "compare.")
        ids, p = read_predictions(folder)
        if clips is None:
            clips, label, info = ids, p['label'], r['info']
        if ids != clips or not np.array_equal(p['label'], label):
            raise EvalError(f"{folder} was tested on other clips or labels than {folders[0]}, and a "
                            "paired comparison needs the same: leave one of them out.")
        systems.setdefault(experiment_of(r), []).append((r['test'], p['pred'], folder))
    names = [name for name, _ in systems]
    everybody = [metrics for runs in systems.values() for metrics, *_ in runs]
    keys = [key for key in SHOWN if any(key in metrics for metrics in everybody)]
    by, metric = score_by(info)
    rows, first = [], np.stack([pred for _, pred, _ in next(iter(systems.values()))])  # [seeds,N]
    for (name, _), runs in systems.items():
        if names.count(name) > 1:
            name = os.path.basename(runs[0][2])   # one config with other knobs: the folder tells them apart
        row = [name]
        for key in keys:
            values = [metrics[key] for metrics, *_ in runs if key in metrics]
            row.append(mean_std_n(values) if values else '-')
        if len(systems) > 1:
            preds = np.stack([pred for _, pred, _ in runs])  # [seeds,N]
            row.append(claim(metric, first, preds, label, by)['text'] if rows else '-')
        rows.append(row)
    difference = [f'{by} less the first row, 95 %'] if len(systems) > 1 else []
    return markdown_table(['test'] + keys + difference, rows)


def main(argv):
    """ The command line of the docstring. Raises EvalError and its kin for a sentence. """
    folders = [a.rstrip('/') for a in argv if not a.startswith('--')]
    flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
    if 'help' in flags or '-h' in folders:
        print(__doc__)
        return
    if not folders:
        sys.exit(__doc__)
    allowed = take_permissions(flags)
    unknown = set(flags) - {'corpus', 'modalities', 'clip', 'export'}
    if unknown or flags and len(folders) > 1 or len(flags) > 1 and {'clip', 'export'} & set(flags):
        raise EvalError("--corpus=OTHER, --modalities=text|audio|vision,.., --clip=FILE and "
                        "--export=FOLDER are for one run (the last two alone); "
                        "--trust_remote_code=True and --data_dir=FOLDER go with all; there are no "
                        "other flags.")
    only = flags['modalities'].split(',') if 'modalities' in flags else None
    if set(only or ()) - {'text', 'audio', 'vision'}:
        raise EvalError(f"--modalities={flags['modalities']} may hold text, audio and vision only.")
    run = folders[0]
    if 'clip' in flags:
        print(evaluate_clips(run, flags['clip'], **allowed))
    elif 'export' in flags:
        revive(run, without_corpus=True, **allowed)   # what cannot be read here would not be readable there
        print(export(run, read_run(run), flags['export']))
    elif 'corpus' in flags:
        print(evaluate_on(run, flags['corpus'], only, **allowed))
    elif 'modalities' in flags:
        print(evaluate_without(run, [m for m in only if m != 'text'], **allowed))
    else:
        print(rerun(run, **allowed) if len(folders) == 1 else compare(folders))


def take_permissions(flags):
    """
    Takes --trust_remote_code and --data_dir out of a command's flags -> arguments of revive. Raises
    EvalError.
    """
    allowed = {}
    if 'trust_remote_code' in flags:
        value = flags.pop('trust_remote_code')
        if value not in ('True', 'False'):
            raise EvalError(f"--trust_remote_code is True or False, not {value!r}.")
        allowed['trust_remote_code'] = value == 'True'
    if 'data_dir' in flags:
        allowed['data_dir'] = flags.pop('data_dir')
    return allowed


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (EvalError, CorpusError, ModelError, ClipError) as e:
        sys.exit(f"eval: {e}")
    except OSError as e:
        sys.exit(f"eval: {e.filename} cannot be read or written: {e.strerror}.")
