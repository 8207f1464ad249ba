"""
The table of a sweep (tools/sweep.py): reads the finished runs of each row, compares the rows, and
writes the table as Markdown and JSON.
"""
import json
import shlex

import numpy as np

from data import CorpusError, open_corpus
from eval import load_run
from metrics import SHOWN, claim, is_better, markdown_table, mean_std_n, score_by
from run.errors import ModelError
from run.finished import EvalError, read_predictions, read_run
from run.folder import write_text
from run.predictor import knobs_with, transferred

PAPER = 'paper (not ours)'   # the header of the column of what the paper prints


def read_row(runs):
    """ Reads the finished runs of a row -> a dict: label, folders, commands, commit, failed; lists
    with an entry per run: test, valid (metrics), seconds, n_trainable, preds [N]; and those of the
    test set: ids, truth [N], info. """
    finished = [r for r in runs if r.has('result.json')]
    results = [read_run(r.folder) for r in finished]
    predictions = [read_predictions(r.folder) for r in finished]  # (ids, arrays) each
    abouts = [result['about'] for result in results]
    row = dict(
        label=runs[0].label,
        preds=[p['pred'] for _, p in predictions],
        folders=[r.folder for r in finished],
        failed=[r.failed for r in runs if r.failed],
        commands=[about['command'] for about in abouts],
        commit=[about['commit'] + '*' * about['dirty'] for about in abouts])
    for k in ('test', 'valid', 'seconds', 'n_trainable'):
        row[k] = [result[k] for result in results]
    if not finished:
        return row | dict(ids=None, truth=None, info=None)
    ids, first = predictions[0]
    for folder, (other_ids, p) in zip(row['folders'], predictions):
        if other_ids != ids or not np.array_equal(p['label'], first['label']):
            raise EvalError(f"{folder} was tested on other clips or labels than "
                            f"{row['folders'][0]}: remove it, and start the sweep again.")
    return row | dict(ids=ids, truth=first['label'], info=results[0]['info'])


def best_row(candidates):
    """ The row of the settings with the best mean of the validation metric by which train.py selects.
    candidates: list of (changed knobs, runs of these settings). The row's `tuned` is a sentence on
    all of them, '' if there is one only. """
    rows = [(' '.join(f'{k}={v}' for k, v in knobs.items()), read_row(runs))
            for knobs, runs in candidates]
    select = candidates[0][1][0].wanted['select']
    n_most = max(len(row['valid']) for _, row in rows)   # settings of which a run failed do not win
    (chosen, best), best_value, found = rows[0], None, []
    for name, row in rows:
        values = [metrics[select] for metrics in row['valid']]
        found.append(f"{name} has {mean_std_n(values) if values else 'failed'}")
        if len(values) == n_most and values and is_better(select, np.mean(values), best_value):
            chosen, best, best_value = name, row, np.mean(values)
    tuned = f"{chosen}, chosen by the {select} on validation: {'; '.join(found)}."
    return best | dict(tuned=tuned if len(rows) > 1 else '')


def at_test(label, trained, changes):
    """ A row that is not trained: the runs of another row, tested with changes['modalities'] only,
    or on the test split of changes['corpus']. """
    row = dict(trained, label=label, test=[], preds=[], seconds=[], n_trainable=[], valid=[],
               failed=[], commands=[], tuned='')
    for folder in trained['folders']:
        try:
            own = read_run(folder)['about']['knobs']   # of a run that this sweep has trained
            run = load_run(folder, data_dir=own['data_dir'],
                           trust_remote_code=own.get('trust_remote_code', False))
            k = knobs_with(run, changes.get('modalities'))
            corpus = run.corpus
            if 'corpus' in changes:
                corpus = transferred(
                    run, open_corpus(changes['corpus'], k['data_dir']), k['modalities'])
            metrics, predictions = run.test(corpus, k)
            row |= dict(ids=corpus.id('test'), truth=predictions['label'])
        except (EvalError, CorpusError, ModelError, ValueError) as e:
            row['failed'].append(str(e))
            continue
        row['test'].append(metrics)
        row['preds'].append(predictions['pred'])
    return row


def same_clips(a, b):
    """ True if two rows were tested on the same clips with the same labels. test.jsonl, from which
    trained rows have their labels, rounds them to six decimals. """
    return a['ids'] == b['ids'] and np.allclose(a['truth'], b['truth'], rtol=0, atol=1e-5)


def change_in_percent(metrics, above, row):
    """ The change of the means of some metrics to the row above: '+1.4 %, -3.4 %'. """
    if not above or not above['test'] or not row['test']:
        return '-'
    changes = []
    for key in metrics:
        old, new = (np.mean([m[key] for m in r['test']]) for r in (above, row))
        changes.append(f'{100 * (new / old - 1):+.2f} %')
    return ', '.join(changes)


def compared(metric, by, first, row):
    """ metrics.claim on two rows, None if one of them has no finished run, or other clips. """
    if not first['preds'] or not row['preds'] or not same_clips(first, row):
        return None
    return claim(metric, first['preds'], row['preds'], first['truth'], by)


def table(rows, paper, neighbours=False, relative=(), columns=(), paired=True):
    """ rows: of read_row; the others are compared with the first one and, if neighbours=True, each
    with the row above it. paper: dict of label -> what the paper prints. relative, columns and
    paired: as in tools/sweep.py. Returns the Markdown table and the list of dicts for the JSON. """
    first = rows[0]
    if not first['test']:
        raise EvalError(f"no run of the first row, {first['label']}, has finished, so there is "
                        "nothing to compare with: read its output in the .txt file beside its "
                        "folder.")
    by, metric = score_by(first['info'])
    for row in rows[1:]:
        if paired and row['test'] and not same_clips(first, row):
            raise EvalError(f"the rows {first['label']} and {row['label']} were tested on "
                            "different clips or labels, so their errors cannot be paired: give "
                            "both rows the same corpus and label.")

    claims = [None] + [compared(metric, by, first, row) for row in rows[1:]]
    above = [None] * len(rows)
    if neighbours:
        above[1:] = [compared(metric, by, a, b) for a, b in zip(rows, rows[1:])]
    best = [c is not None and c['verdict'] == 'better' for c in claims]
    beaten = [c is not None and c['verdict'] == 'worse' for c in claims[1:]]
    best[0] = len(rows) > 1 and all(beaten)

    keys = [k for k in (*SHOWN, *columns) if k in first['test'][0]]
    changes = [change_in_percent(relative, a, b) for a, b in zip([None] + rows, rows)]
    cells = []
    for row, c, n, change, bold in zip(rows, claims, above, changes, best):
        label = f"**{row['label']}**" if bold else row['label']
        if not row['test']:
            failed = ['failed'] * len(keys) + ['-'] * (3 + neighbours + bool(relative))
            cells.append([label] + failed + [paper[row['label']]])
            continue
        if row['failed']:
            label += f" ({len(row['failed'])} failed)"
        means = [mean_std_n([m[k] for m in row['test']]) for k in keys]
        differences = [c['text'] if c else '-' for c in ([c, n] if neighbours else [c])]
        differences += [change] if relative else []
        minutes = f"{np.mean(row['seconds']) / 60:.1f}" if row['seconds'] else '-'
        weights = f"{row['n_trainable'][0]:,}" if row['n_trainable'] else '-'
        cells.append([label] + means + differences + [minutes, weights, paper[row['label']]])
    head = [f'{by} minus the first row, 95 %', f'{by} minus the row above, 95 %'][:1 + neighbours]
    head += [f"{', '.join(relative)} to the row above"] if relative else []
    head += ['min a run', 'trainable', PAPER]

    large = ('preds', 'truth', 'info', 'ids')
    numbers = []
    for row, c, n in zip(rows, claims, above):
        small = {k: v for k, v in row.items() if k not in large}
        numbers.append(small | dict(claim=c, claim_above=n, paper=paper[row['label']]))
    return markdown_table(['test'] + keys + head, cells), numbers


def write_table(rows, paper, heading, where):
    """ Writes the table as where.md and where.json, and returns the text of the former. heading:
    dict of title, command, note, common (the flags of all rows) and options (of table). """
    drawn, numbers = table(rows, paper, **heading['options'])
    commits = ', '.join(sorted({commit for row in rows for commit in row['commit']}))
    common = f"`{heading['common']}` and " if heading['common'] else ''
    page = (f"# {heading['title']}\n\n`python tools/sweep.py {shlex.join(heading['command'])}`; "
            f"each run has {common}the knobs of its row; commit {commits}.\n\n"
            f"{heading['note']}\n\n{drawn}\n")
    for row in rows:
        if row.get('tuned'):
            page += f"\n{row['label']}: {row['tuned']}\n"
        for reason in row['failed']:
            page += f"\n{row['label']} failed: {reason}\n"
    write_text(where + '.md', page)
    saved = dict(title=heading['title'], command=heading['command'], rows=numbers)
    write_text(where + '.json', json.dumps(saved, indent=1))
    return page
