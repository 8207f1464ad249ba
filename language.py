"""
How two corpora's language differs, and how much of it a small share of the data shows (DeepMLF 6.2.4, its Table 9).

    python data.py --compare A B [--lm=NAME]        vocabulary, lengths, and how well a linear classifier tells their sentences apart
    python data.py --subsets A --lm=NAME [--n=300]  polarity by a linear classifier on random 5-10 % subsets, against the whole

A sentence is the mean of the last hidden states of any Hugging Face model (lm.py's frozen_text, computed once), or, without one,
its words. Classifiers are logistic regressions, chosen by nothing and tested on what they have not seen.
"""
import re

import numpy as np
import torch

from data import CorpusError, lower_if_shouting, open_corpus, tokenize
from eval import markdown_table
from lm import frozen_text, load_tokenizer

DECAY = 1e-2   # of the classifier's weights on standardised features


def words(text):
    """ The words of a text, in lower case; each Chinese character is one. """
    return re.findall(r"[\u4e00-\u9fff]|[^\W_]+(?:'[^\W_]+)?", text.lower())


def bag(texts, size=4096):
    """ Counts of words, hashed to `size` columns by Python-independent sums -> [N,size] float32. """
    out = np.zeros((len(texts), size), np.float32)
    for i, text in enumerate(texts):
        for word in words(text):
            h = 2166136261                                                                       # FNV-1a: hash() differs by process
            for byte in word.encode(): h = ((h ^ byte) * 16777619) % 2 ** 32
            out[i, h % size] += 1
    return out


def embed(texts, lm, where='data', device='cpu'):
    """ Sentences -> [N,D] float32: mean last hidden states of `lm`, or, where lm is '', counts of words. Raises ModelError. """
    if not lm: return bag(texts)
    tokens, _, _ = tokenize(load_tokenizer(lm), texts, 128)
    hidden, _ = frozen_text(lm, tokens, f'{where}/features', device=device)
    ends = np.cumsum([len(t) for t in tokens])
    return np.stack([np.asarray(x, np.float32).mean(0) for x in np.split(hidden, ends[:-1])])


def classify(x, y, x_test, n_steps=100):
    """ Logistic regression on standardised features: x [N,D], y [N] of 0 and 1 -> probability of 1 for x_test [M,D]. """
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (torch.from_numpy((a - mean) / std) for a in (x, x_test))
    y, w, b = torch.from_numpy(y.astype(np.float32)), torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=n_steps, line_search_fn='strong_wolfe')
    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y) + DECAY * w.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return torch.sigmoid(x_test @ w + b).detach().numpy()                                        # [M]


def all_texts(corpus):
    """ The texts of all splits; what is shouted throughout in lower case. """
    return [t for split in corpus.n_clips for t in lower_if_shouting(corpus.text(split), corpus)]


def compare(a, b, lm='', seed=0):
    """
    Two corpora's sentences side by side, as a table (Table 9). The classifier has as many sentences of each, in lower case (what
    is written in capitals would give MOSI away), 80 % to learn from and 20 % to be tested on: 0.5 is chance. Raises CorpusError.
    """
    corpora, rng = [open_corpus(a), open_corpus(b)], np.random.default_rng(seed)
    texts = [list(dict.fromkeys(t.lower() for t in all_texts(c) if words(t))) for c in corpora]  # each sentence once
    if min(map(len, texts)) < 10: raise CorpusError(f"{a} or {b} has fewer than 10 sentences with a word: there is nothing to compare.")
    vocabulary = [{w for t in ts for w in words(t)} for ts in texts]
    n = min(map(len, texts))
    picked = [[ts[i] for i in rng.permutation(len(ts))[:n]] for ts in texts]
    x, y = embed(picked[0] + picked[1], lm), np.repeat([0, 1], n)                                # [2n,D], [2n]
    order, cut = np.arange(n), int(0.8 * n)                                                      # picked are in random order already
    train, test = (np.concatenate([part, n + part]) for part in (order[:cut], order[cut:]))
    right = (classify(x[train], y[train], x[test]) > 0.5) == y[test]
    length = lambda ts: f"{np.mean([len(words(t)) for t in ts]):.1f} ({np.median([len(words(t)) for t in ts]):.0f})"
    rows = [['sentences', *map(len, texts)], ['vocabulary', *map(len, vocabulary)], ['words a sentence, mean (median)', *map(length, texts)],
            ['of its words in the other', *(f"{len(v & o) / len(v):.3f}" for v, o in zip(vocabulary, vocabulary[::-1]))],
            ['of its running words in the other', *(f"{np.mean([w in o for t in ts for w in words(t)]):.3f}" for ts, o in zip(texts, vocabulary[::-1]))]]
    return (markdown_table(['', *(c.name for c in corpora)], rows) +
            f"\n\nA linear classifier on {lm or 'counts of words'} tells them apart with accuracy {right.mean():.3f} "
            f"({len(test)} sentences it has not seen, half of each; chance 0.500, standard error {np.sqrt(right.mean() * (1 - right.mean()) / len(test)):.3f})" +
            ('; they have all their texts in common, and a sentence that it has learned is then of the other side.' if set(texts[0]) == set(texts[1]) else '.'))


def subsets(source, lm, n=300, seed=0):
    """
    How well polarity is told on the test split (labels that are not 0) by a classifier that saw n random subsets of 5 to 10 % of
    the train split, against all of it: mean, spread and extremes of the accuracy. Raises CorpusError.
    """
    corpus, rng = open_corpus(source), np.random.default_rng(seed)
    if corpus.labels.get('label', {}).get('kind') != 'regression': raise CorpusError(f"{corpus.name} has no scores, so no polarity.")
    x, y = {}, {}
    for split in ('train', 'test'):
        label = corpus.label(split)
        keep = np.flatnonzero(label)
        x[split], y[split] = embed([lower_if_shouting(corpus.text(split), corpus)[i] for i in keep], lm), (label[keep] > 0).astype(int)
    if not 0 < y['train'].mean() < 1:
        raise CorpusError(f"the train split of {corpus.name} has one polarity only: there is nothing to tell apart.")
    accuracy = lambda i: float(((classify(x['train'][i], y['train'][i], x['test']) > 0.5) == y['test']).mean())
    whole, got = accuracy(np.arange(len(y['train']))), []
    while len(got) < n:
        i = rng.permutation(len(y['train']))[:max(4, int(rng.uniform(0.05, 0.10) * len(y['train'])))]
        if 0 < y['train'][i].sum() < len(i): got.append(accuracy(i))
    return (f"{corpus.name}, {lm or 'counts of words'}: accuracy of polarity on {len(y['test'])} test clips, {n} classifiers on random 5-10 % of the train "
            f"split: {np.mean(got):.3f} +- {np.std(got, ddof=1) if n > 1 else 0:.3f}, from {min(got):.3f} to {max(got):.3f}; on all of it {whole:.3f}; "
            f"the larger class {max(y['test'].mean(), 1 - y['test'].mean()):.3f}.")
