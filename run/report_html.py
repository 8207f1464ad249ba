"""
report.html: a run's report as one file for a browser. Its pictures and its style are inside, it has
no script, and it loads nothing. All texts in it are escaped, because ids, texts and names of
classes come from a corpus.

Axis letters: N test clips, K classes or possible answers.
"""
import base64
import html
import re

import numpy as np

from metrics import SHOWN, bootstrap, central_interval, metric_help, task_metrics
from run.pictures import answer_values, as_text

N_WORST = 10   # clips in the table of the worst ones
SCALE = 0.6   # of the pictures on the page: they have 200 pixels per inch
SMALLEST = 0.005   # a smaller probability of a class is not printed

# The browser itself refuses whatever this page would load or run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { margin: 0; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem; }
p { margin: .5rem 0; } .small { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid #ddd; }
th { color: #555; font-weight: 600; } tr.own td { font-weight: 600; }
td.number, th.number { white-space: nowrap; text-align: right; }
td.text { min-width: 14rem; white-space: pre-line; } td.definition { min-width: 25rem; }
td.id { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  .cards thead { display: none; } .cards tr { display: block; padding: .6rem 0;
    border-bottom: 1px solid #ddd; }
  .cards td { display: flex; gap: .8rem; border: 0; padding: .1rem 0; text-align: left;
    white-space: normal; min-width: 0; }
  .cards td::before { content: attr(data-name); flex: 0 0 6.5rem; color: #555; font-weight: 400; }
}
"""


def escaped(value):
    """ A value as the text of an element or of an attribute. """
    whole = str(value).encode('utf-8', 'replace').decode()   # half a surrogate pair becomes '?'
    return html.escape(whole)


def table_html(header, rows, kinds=None, own=None, cards=False):
    """
    A table. kinds: the CSS class of each column; own: the number of the run's own row, which is
    bold; cards: on a narrow screen each row is a card with one line for each cell.
    """
    kinds = kinds or [''] + ['number'] * (len(header) - 1)
    head = ''.join(f'<th class="{kind}">{escaped(name)}</th>' for kind, name in zip(kinds, header))
    body = ''
    for i, row in enumerate(rows):
        cells = ''.join(f'<td class="{kind}" data-name="{escaped(name)}">{escaped(v)}</td>'
                        for kind, name, v in zip(kinds, header, row))
        body += f'<tr{" class=own" if i == own else ""}>{cells}</tr>\n'
    return (f'<div class="wide"><table{" class=cards" if cards else ""}>\n'
            f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>')


def picture_html(png, name):
    """ A picture that is inside the page. png: the file's bytes, which have its width in pixels. """
    data, wide = base64.b64encode(png).decode(), int.from_bytes(png[16:20], 'big')
    return (f'<img alt="{escaped(name)}" width="{round(wide * SCALE)}" '
            f'src="data:image/png;base64,{data}">')


def paragraph(text, css='small'):
    """ A paragraph, in which **words** are bold; '' if the text is empty. """
    bold = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', escaped(text))
    return f'<p class="{css}">{bold}</p>' if text else ''


def section(title, *parts):
    """ A part of the page; '' if it has nothing in it. """
    inside = '\n'.join(part for part in parts if part)
    return f'<h2>{escaped(title)}</h2>\n{inside}\n' if inside else ''


# --------------------------------------------------------------------------------------------------
# What the page shows

def metric_table(r, predictions):
    """
    The test metrics with their 95 % intervals over clips, the validation metrics and the
    definitions. r: result.json; predictions: None for a language model.
    """
    spread = {}
    if predictions:
        spread = bootstrap(lambda p, y: task_metrics(p, y, r['info']), predictions['pred'],
                           predictions['label'])
    keys = sorted(r['test'], key=lambda key: SHOWN.index(key) if key in SHOWN else len(SHOWN))
    rows = []
    for key in keys:
        better, what = metric_help(key)
        low, high = spread.get(key, (np.nan, np.nan))
        interval = f'{low:.3f} to {high:.3f}' if np.isfinite([low, high]).all() else '-'
        valid = f"{r['valid'][key]:.3f}" if key in r['valid'] else '-'
        rows.append([key, f"{r['test'][key]:.3f}", interval, valid, better, what])
    header = ['metric', 'test', '95 % interval', 'valid', 'better', 'definition']
    return table_html(header, rows, ['', 'number', 'number', 'number', '', 'definition'])


def worst_clips(predictions, info, n=N_WORST):
    """
    The numbers of the n worst test clips, worst first. Of scores: those farthest from their label.
    Of classes: the wrong ones, those with the least probability of the true class first, or in the
    order of the test set where the system gives no probabilities.
    """
    pred, label = predictions['pred'], predictions['label']  # [N] each
    if info['kind'] != 'classes':
        return np.argsort(-np.abs(pred - label), kind='stable')[:n]
    wrong = np.flatnonzero(pred != label)
    if 'prob' in predictions:
        of_label = predictions['prob'][wrong, label[wrong].astype(int)]
        wrong = wrong[np.argsort(of_label, kind='stable')]
    return wrong[:n]


def probability_text(prob, info):
    """
    The probabilities [K] of a clip's answers: of each class, the highest first, or the interval of
    scores that holds 80 % of the probability.
    """
    if info['kind'] == 'classes':
        order = np.argsort(-prob, kind='stable')
        shown = [f"{info['names'][i]} {prob[i]:.2f}" for i in order if prob[i] >= SMALLEST]
        return ', '.join(shown)
    values = answer_values(info, len(prob))  # [K]
    low, high = central_interval(prob, values)
    best = int(prob.argmax())
    return f'80 % in {low:+.1f} to {high:+.1f}; most likely {values[best]:+.1f} ({prob[best]:.2f})'


def worst_section(r, ids, texts, predictions, reads_text):
    """ The worst test clips with id, text, label, prediction and probabilities. """
    info, worst = r['info'], worst_clips(predictions, r['info'])
    if not len(worst):
        return section('The worst test clips', paragraph('Every test clip is predicted right.'))
    classes, prob = info['kind'] == 'classes', predictions.get('prob')
    header = ['clip', 'text' if reads_text else 'text (not read)', 'label', 'prediction']
    kinds = ['id', 'text', '', ''] if classes else ['id', 'text', 'number', 'number']
    header += ([] if classes else ['error']) + ([] if prob is None else ['probabilities'])
    kinds += ([] if classes else ['number']) + ([] if prob is None else [''])
    rows = []
    for i in worst:
        pred, label = predictions['pred'][i], predictions['label'][i]
        row = [ids[i], texts[i], as_text(label, info), as_text(pred, info)]
        row += [] if classes else [f'{pred - label:+.2f}']
        row += [] if prob is None else [probability_text(prob[i], info)]
        rows.append(row)
    rule = 'The clips with the largest errors.'
    if classes:
        n_wrong = int((predictions['pred'] != predictions['label']).sum())
        order = 'in the order of the test set' if prob is None else (
            'the least probability of the true class first')
        rule = f'{n_wrong} of {len(ids)} test clips are wrong; {order}.'
    title = 'The worst test clip' if len(worst) == 1 else f'The {len(worst)} worst test clips'
    return section(title, paragraph(rule), table_html(header, rows, kinds, cards=True))


def html_report(r, facts, compared, clips, pictures, reads_text):
    """
    The page as text. r: result.json; facts: (name, text) of the run; compared: header, rows and
    sentences of the comparison, whose last row is the run's own; clips: (ids, texts, predictions)
    of the test set; both are None for a language model. pictures: (name, PNG, caption).
    """
    name, k, predictions = r['about']['name'], r['about']['knobs'], clips[2] if clips else None
    of_label = f", label {k['label']}" if clips and k['label'] != 'label' else ''
    intro = f"{k['system']} on {r['about']['corpus']['name']}{of_label}, seed {k['seed']}"
    note = ('The interval covers the choice of test clips (bootstrap), not the seed: train several '
            'seeds to compare systems.')
    page = section('Test metrics', metric_table(r, predictions), paragraph(note) if clips else '')
    if compared:
        header, rows, notes = compared
        page += section('Compared with', table_html(header, rows, own=len(rows) - 1),
                        *map(paragraph, notes))
    if clips:
        page += worst_section(r, *clips, reads_text)
    for what, png, caption in pictures:
        page += section(what.capitalize(), picture_html(png, what), paragraph(caption))
    entries = ''.join(f'<dt>{escaped(key)}</dt><dd>{escaped(v)}</dd>\n' for key, v in facts)
    page += section('The run', f'<dl>\n{entries}</dl>')
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(name)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escaped(name)}</h1>
{paragraph(intro, css='')}
{page}</body>
</html>
"""
