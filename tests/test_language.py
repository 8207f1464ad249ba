"""
tools/language.py: comparing the language of two corpora, and polarity from small subsets.

    python -m pytest -q tests/test_language.py
"""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from corpora.unpickle import CorpusError
from data import open_corpus
from fakes import ENV, HERE, without_checksums
from tools.language import bag, classify, compare, subsets, words


def test_words_and_word_counts():
    assert words("It's 好看 GOOD, isn't_it") == ["it's", '好', '看', 'good', "isn't", 'it']
    x = bag(['a b a', 'b', ''])
    assert x.sum(1).tolist() == [3, 1, 0] and x[0].max() == 2 and (x[0] * x[1]).sum() == 1


def test_the_classifier_equals_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    y = (x @ rng.normal(size=6) + rng.normal(size=200) > 0).astype(int)
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    theirs = LogisticRegression(C=1 / (2 * 0.01 * 200), tol=1e-8, max_iter=1000).fit(z, y)
    assert np.abs(classify(x, y, x) - theirs.predict_proba(z)[:, 1]).max() < 2e-3


def accuracy(table):
    return float(table.split('with accuracy ')[1].split()[0])


def copy_in_another_language(source, copy):
    """ Copies a corpus and appends 'o' to every word. """
    shutil.copytree(source, copy)
    for path in copy.glob('*/text.jsonl'):
        with open(path, encoding='utf-8') as f:
            rows = [json.loads(line) for line in f]
        for row in rows:
            row['text'] = ' '.join(word + 'o' for word in row['text'].split())
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    without_checksums(copy)


def test_durations_are_compared_where_the_frames_per_second_are_known(corpora, tmp_path):
    shutil.copytree(corpora / 'toy', tmp_path / 'timed')
    without_checksums(tmp_path / 'timed')
    path = tmp_path / 'timed' / 'meta.json'
    meta = json.loads(path.read_text())
    meta['streams']['audio']['frames_per_second'] = 2.0
    path.write_text(json.dumps(meta))
    timed = open_corpus(str(tmp_path / 'timed'))
    lengths = [n for split in timed.n_clips for n in timed.lengths(split, 'audio') if n]
    row = next(line for line in compare(str(corpora / 'toy'), timed.folder).splitlines() if 'seconds' in line)
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    assert cells == ['seconds per sentence, mean', '-', f'{sum(lengths) / len(lengths) / 2:.1f}']


def test_the_classifier_tells_languages_apart_but_not_a_corpus_from_itself(corpora, tmp_path):
    toy = str(corpora / 'toy')
    same = compare(toy, toy)
    assert accuracy(same) < 0.6   # at most chance: each test sentence is also in the other corpus
    assert '| vocabulary' in same and 'texts in common' in same
    copy_in_another_language(corpora / 'toy', tmp_path / 'other')
    other = compare(toy, str(tmp_path / 'other'))
    assert accuracy(other) > 0.95 and '0.000' in other
    polarity = subsets(toy, '', n=5)
    assert '5 classifiers' in polarity and 'the whole split' in polarity
    with pytest.raises(CorpusError):
        compare(toy, 'no/such')


def command(cwd, *argv):
    return subprocess.run([sys.executable, str(HERE / 'tools' / 'language.py'), *argv], cwd=cwd,
                          env=ENV, capture_output=True, text=True)


def test_the_command_line_compares_and_refuses_wrong_arguments(corpora, tmp_path):
    done = command(tmp_path, '--compare', str(corpora / 'toy'), str(corpora / 'toy'))
    assert done.returncode == 0 and 'tells the corpora apart' in done.stdout
    for bad in (['--compare', 'a'], ['--subsets', 'a', '--n=x'], ['--compare', 'a', 'b', '--x=y']):
        done = command(tmp_path, *bad)
        assert done.returncode == 1 and 'the usage is' in done.stderr
        assert 'Traceback' not in done.stderr
