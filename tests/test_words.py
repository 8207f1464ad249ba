"""
The numbers in README.md, docs/ and the config headers are those of results/results.json, and those
of results.json are in LOG.md. Links between the documents lead somewhere.

A table of results is marked by a comment above it, which names a table of results.json:

    <!-- results: toy -->
    | test    | MAE           | corr  |
    |---------|---------------|-------|
    | DeepMLF | 0.417 ± 0.006 | 0.929 |

The first cell of a row is a row of that table, and each other cell with a number stands under a
column that HEADERS or results.json knows.

    python -m pytest -q tests/test_words.py
"""

import json
import re
import statistics

import pytest

from fakes import HERE

RESULTS = json.loads((HERE / 'results' / 'results.json').read_text(encoding='utf-8'))
ENTRIES = {entry['id']: entry for entry in RESULTS['entries']}
PAGES = ['README.md', *sorted(p.relative_to(HERE).as_posix() for p in HERE.glob('docs/*.md'))]
CONFIGS = sorted(p.name for p in HERE.glob('config/*.py'))

# What a column of a document is called -> what results.json calls it; without an entry both agree
HEADERS = {
    'acc2': 'acc2_non0',
    'best possible mae': 'perfect_mae',
    'valid mae': 'valid_mae',
    'weighted f1': 'wf1',
    'accuracy': 'acc',
    'mae minus the late-fusion bound': 'gap',
    'mae minus text only': 'difference',
    'mae minus ridge': 'ridge_difference',
    'wf1 minus ridge': 'ridge_difference',
    'wf1 minus mlp': 'mlp_difference',
    'wf1 minus lora, no context': 'lora_difference',
    'mae minus lora': 'lora_difference',
    'mmsa mae': 'mmsa_mae',
    'mmsa corr': 'mmsa_corr',
    'lm or encoder': 'lm',
    'memory of training': 'training_memory',
    'memory of evaluation': 'evaluation_memory',
    'matmul peak': 'peak',
}
# What a row of a document may be called -> its row in results.json
ROWS = {
    'late-fusion bound': 'best late fusion',
    'late-fusion upper bound': 'best late fusion',
    'upper bound': 'perfect reader',
    'late: adds, the control': 'late: text + audio + video',
}
# Columns of a document that hold no result
FREE = {'what it reads', 'notes', 'config', 'command', 'why', 'wall time', 'memory'}
METRIC_COLUMNS = {'mae', 'corr', 'acc2', 'acc2_non0', 'acc7', 'wf1', 'qwk'}

NUMBER = r'[+-]?\d*\.\d+'
PAIR = re.compile(rf'(?<![\w.])({NUMBER}) (?:±|\+-) (\d*\.\d+)(?: ?\(n=(\d+)\))?')
MARK = re.compile(r'<!-- results: (\S+) -->')
UNITS = r'(?! ?(?:x\b|%|s\b|min\b|h\b|[kMG]B\b|M\b|TB\b|[GT]FLOP|B\b))'
# a decimal number that is not part of a name, a version, a flag or a duration
ALONE = re.compile(rf'(?<![\w.=/-])(\d*\.\d+)(?![\w.]*[A-Za-z]){UNITS}')


def pairs_of(entry):
    """(mean, std) of every metric of an entry that has a standard deviation."""
    return {tuple(v) for v in entry['metrics'].values() if isinstance(v, list)}


def means_of(entry):
    """Every number among an entry's metrics, without the standard deviations."""
    values = [v[0] if isinstance(v, list) else v for v in entry['metrics'].values()]
    return {v for v in values if not isinstance(v, str)}


def bounds_of(table):
    """What no system but a bound reaches: the best possible MAE, and rows without a config."""
    rows = [e for e in ENTRIES.values() if e['id'].split('/')[0] == table]
    perfect = {e['metrics']['perfect_mae'] for e in rows if 'perfect_mae' in e['metrics']}
    return perfect.union(*(means_of(e) for e in rows if e['config'] is None))


def cells_of(line):
    return [cell.strip().replace('**', '').replace('`', '') for cell in line.strip('|').split('|')]


def tables_of(text):
    """(mark or None, header, rows) of every table of a Markdown text."""
    mark, lines = None, text.splitlines() + ['']
    table = []
    for line in lines:
        if line.startswith('|'):
            table.append(cells_of(line))
            continue
        if table:
            yield mark, [c.lower() for c in table[0]], table[2:]
            mark, table = None, []
        if line.strip():
            found = MARK.fullmatch(line.strip())
            mark = found[1] if found else None


def value_of(entry, header):
    """What results.json has for a column of a document, or None."""
    for name in (header, HEADERS.get(header)):
        if name in entry['metrics'] or name in entry:
            return entry['metrics'].get(name, entry.get(name))
    return None


def check_cell(cell, header, entry, where):
    """One cell of a marked table against its entry of results.json."""
    if not re.search(r'\d', cell) or header in FREE:
        return
    value = value_of(entry, header)
    assert value is not None, f'{where}: results.json has no {header!r}'
    if isinstance(value, str):
        assert cell == value, f'{where}: {cell} is {value} in results.json'
        return
    cell, n = re.fullmatch(r'(.*?)(?: ?\(n=(\d+)\))?', cell).groups()
    assert n is None or int(n) == entry['n'], f'{where}: n={n} is n={entry["n"]} in results.json'
    printed = [float(x) for x in cell.split(' ± ')]
    expected = value if isinstance(value, list) else [value]
    assert printed == expected[: len(printed)], f'{where}: {cell} is {expected} in results.json'


@pytest.mark.parametrize('page', PAGES)
def test_tables_of_results_agree_with_results_json(page):
    for mark, header, rows in tables_of((HERE / page).read_text(encoding='utf-8')):
        if mark is None:
            unmarked = METRIC_COLUMNS & set(header)
            assert not unmarked, f'{page}: put <!-- results: TABLE --> above the table {header}'
            continue
        for row in rows:
            name, n = re.fullmatch(r'(.*?)(?: \(n=(\d+)\))?', row[0]).groups()
            entry = ENTRIES.get(f'{mark}/{ROWS.get(name, name)}')
            assert entry, f'{page}: results.json has no entry {mark}/{name}'
            where = f'{page}, {entry["id"]}'
            assert n is None or int(n) == entry['n'], where
            for cell, column in list(zip(row, header, strict=True))[1:]:
                check_cell(cell, column, entry, where)


@pytest.mark.parametrize('page', [*PAGES, 'results/README.md'])
def test_every_mean_with_a_deviation_is_in_results_json(page):
    known = {pair: entry for entry in ENTRIES.values() for pair in pairs_of(entry)}
    ns = {pair: set() for pair in known}
    for entry in ENTRIES.values():
        for pair in pairs_of(entry):
            ns[pair].add(entry['n'])
    for mean, std, n in PAIR.findall((HERE / page).read_text(encoding='utf-8')):
        pair = float(mean), float(std)
        assert pair in known, f'{page}: {mean} ± {std} is in no entry of results.json'
        assert not n or int(n) in ns[pair], f'{page}: {mean} ± {std} has n in {ns[pair]}, not {n}'


def header_of(config):
    """The comment at the top of a config, as one line."""
    lines = (HERE / 'config' / config).read_text(encoding='utf-8').splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith('#'))
    return ' '.join(line.lstrip('#').strip() for line in lines[:end])


def results_in_header(config):
    """The part of a config's header that prints results: from the first of their labels on."""
    label = re.search(
        r"\b(?:paper|ours|expected|published)\b[^.:]{0,30}:|logs?\b[^.:]{0,30}:", header_of(config)
    )
    return header_of(config)[label.start() :] if label else ''


@pytest.mark.parametrize('config', CONFIGS)
def test_numbers_of_a_config_header_are_in_results_json(config):
    text = results_in_header(config)
    own = [entry for entry in ENTRIES.values() if entry['config'] == config]
    pairs = {pair: entry['n'] for entry in own for pair in pairs_of(entry)}
    for mean, std, n in PAIR.findall(text):
        pair = float(mean), float(std)
        assert pair in pairs, f'{config}: {mean} +- {std} is in no entry of results.json'
        assert not n or int(n) == pairs[pair], f'{config}: {mean} +- {std} has n={pairs[pair]}'
    known = set().union(*map(means_of, own))
    known = known.union(*(bounds_of(entry['id'].split('/')[0]) for entry in own))
    rounded = {round(x, 2) for x in known}
    for number in ALONE.findall(PAIR.sub('', text)):
        x = float(number)
        ok = x in known or len(number.split('.')[1]) <= 2 and x in rounded
        assert ok, f'{config}: {number} is in no entry of results.json'


def test_config_headers_print_what_was_run():
    """So that the test above does not pass by reading nothing."""
    printed = sum(len(PAIR.findall(results_in_header(config))) for config in CONFIGS)
    assert printed >= 25


# --------------------------------------------------------------------------------------------------
# results.json itself


def log_sections():
    log = (HERE / 'LOG.md').read_text(encoding='utf-8')
    parts = re.split(r'^## (.+)$', log, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_results_json_is_in_the_log():
    sections = log_sections()
    for key, heading in RESULTS['log_entries'].items():
        assert heading in sections, f'{key}: LOG.md has no entry {heading!r}'
    for entry in ENTRIES.values():
        heading = RESULTS['log_entries'].get(entry['from'])
        if heading is None:
            continue
        pairs = {(float(a), float(b)) for a, b, _ in PAIR.findall(sections[heading])}
        missing = pairs_of(entry) - pairs
        assert not missing, f'{entry["id"]}: {missing} is not in the LOG.md entry {heading!r}'


def test_means_are_those_of_the_seeds():
    for entry in ENTRIES.values():
        values = entry.get('mae_by_seed')
        if values:
            assert len(values) == entry['n']
            mean, std = entry['metrics']['mae']
            # the seeds are rounded too
            assert abs(statistics.mean(values) - mean) < 0.00075, entry['id']
            assert abs(statistics.stdev(values) - std) < 0.00075, entry['id']


def test_configs_of_results_json_exist():
    assert len(ENTRIES) == len(RESULTS['entries'])
    for entry in ENTRIES.values():
        assert entry['config'] is None or entry['config'] in CONFIGS, entry['id']


# --------------------------------------------------------------------------------------------------
# The pages


@pytest.mark.parametrize('page', [*PAGES, 'results/README.md'])
def test_links_lead_to_files(page):
    text = (HERE / page).read_text(encoding='utf-8')
    for target in re.findall(r'\]\(([^)#\s]+)', text):
        if '://' not in target:
            assert ((HERE / page).parent / target).exists(), f'{page}: {target} is not there'


@pytest.mark.parametrize('page', [*PAGES, 'results/README.md'])
def test_lines_are_short(page):
    for i, line in enumerate((HERE / page).read_text(encoding='utf-8').splitlines(), 1):
        if not line.startswith('|') and 'https://' not in line:
            assert len(line) <= 120, f'{page}, line {i}'
