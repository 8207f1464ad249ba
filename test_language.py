"""
Two corpora's language side by side, and polarity from small subsets.

    python -m pytest -q test_language.py
"""
import subprocess
import sys

import numpy as np
import pytest

from data import CorpusError
from language import bag, classify, compare, subsets, words
from test_crosssent import tiny_bert
from test_smoke import HERE
from test_trust import ENV


def test_words_and_bags():
    assert words("It's 好看 GOOD, isn't_it") == ["it's", '好', '看', 'good', "isn't", 'it']
    x = bag(['a b a', 'b', ''])
    assert x.sum(1).tolist() == [3, 1, 0] and x[0].max() == 2 and (x[0] * x[1]).sum() == 1


def test_the_classifier_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    y = (x @ rng.normal(size=6) + rng.normal(size=200) > 0).astype(int)
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    theirs = LogisticRegression(C=1 / (2 * 0.01 * 200), tol=1e-8, max_iter=1000).fit(z, y).predict_proba(z)[:, 1]
    assert np.abs(classify(x, y, x) - theirs).max() < 2e-3


def test_a_corpus_against_itself_is_chance_and_against_another_language_is_not(corpora, tmp_path):
    import json, shutil
    same = compare(str(corpora / 'toy'), str(corpora / 'toy'))
    right = float(same.split('with accuracy ')[1].split()[0])
    assert right < 0.6 and '| vocabulary' in same and 'texts in common' in same   # below chance: a sentence's twin is of the other side
    shutil.copytree(corpora / 'toy', tmp_path / 'other')
    for path in (tmp_path / 'other').glob('*/text.jsonl'):
        rows = [json.loads(line) for line in open(path, encoding='utf-8')]
        path.write_text(''.join(json.dumps(r | dict(text=' '.join(w + 'o' for w in r['text'].split()))) + '\n' for r in rows), encoding='utf-8')
    tiny_bert().save_pretrained(tmp_path / 'bert')
    other = compare(str(corpora / 'toy'), str(tmp_path / 'other'))
    assert float(other.split('with accuracy ')[1].split()[0]) > 0.95 and '0.000' in other
    said = subsets(str(corpora / 'toy'), '', n=5)
    assert '5 classifiers' in said and 'on all of it' in said
    with pytest.raises(CorpusError): compare(str(corpora / 'toy'), 'no/such')


def test_the_command_line(corpora):
    run = lambda *a: subprocess.run([sys.executable, 'data.py', *a], cwd=HERE, env=ENV, capture_output=True, text=True)
    done = run('--compare', str(corpora / 'toy'), str(corpora / 'toy'))
    assert done.returncode == 0 and 'tells them apart' in done.stdout
    for bad in (['--compare', 'a'], ['--subsets', 'a', '--n=x'], ['--compare', 'a', 'b', '--lmm=x']):
        done = run(*bad)
        assert done.returncode == 1 and 'the usage is' in done.stderr and 'Traceback' not in done.stderr
