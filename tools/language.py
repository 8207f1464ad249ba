"""
How two corpora's language differs, and how much of it a small share of the data shows (DeepMLF
6.2.4, its Table 9).

    python tools/language.py --compare A B [--lm=NAME]
        vocabulary, lengths, and how well a linear classifier tells their sentences apart
    python tools/language.py --subsets A --lm=NAME [--n=300]
        polarity by a linear classifier on random 5-10 % subsets, against the whole

A sentence is the mean of the last hidden states of any Hugging Face model (lm.py's frozen_text,
computed once), or, without one, its words. Classifiers are logistic regressions, chosen by nothing
and tested on what they have not seen.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from corpora.unpickle import CorpusError
from data import lowercase_if_all_caps, open_corpus, tokenize
from lm import ModelError
from metrics import markdown_table
from run.load_lm import frozen_text, load_tokenizer

DECAY = 1e-2  # of the classifier's weights on standardised features


def words(text):
    """ The words of a text, in lower case; each Chinese character is one. """
    return re.findall(r"[\u4e00-\u9fff]|[^\W_]+(?:'[^\W_]+)?", text.lower())


def fnv_1a(word):
    """ A 32-bit hash of a word that is the same in every process, which hash() is not. """
    h = 2166136261
    for byte in word.encode():
        h = ((h ^ byte) * 16777619) % 2 ** 32
    return h


def bag(texts, size=4096):
    """ Counts of words, hashed to `size` columns -> [N,size] float32. """
    out = np.zeros((len(texts), size), np.float32)
    for i, text in enumerate(texts):
        for word in words(text):
            out[i, fnv_1a(word) % size] += 1
    return out


def embed(texts, lm, where='data', device='cpu'):
    """ Sentences -> [N,D] float32: mean last hidden states of `lm`, or, where lm is '', counts of
    words. Raises ModelError. """
    if not lm:
        return bag(texts)
    tokens, _, _ = tokenize(load_tokenizer(lm), texts, 128)
    hidden, _ = frozen_text(lm, tokens, f'{where}/features', device=device)  # [sum of lengths,D]
    ends = np.cumsum([len(t) for t in tokens])
    return np.stack([np.asarray(x, np.float32).mean(0) for x in np.split(hidden, ends[:-1])])


def classify(x, y, x_test, n_steps=100):
    """ Logistic regression on standardised features: x [N,D], y [N] of 0 and 1 -> probability of 1
    for x_test [M,D]. """
    mean, std = x.mean(0), x.std(0) + 1e-6  # [D] each
    x = torch.from_numpy((x - mean) / std)  # [N,D]
    x_test = torch.from_numpy((x_test - mean) / std)  # [M,D]
    y = torch.from_numpy(y.astype(np.float32))  # [N]
    w = torch.zeros(x.shape[1], requires_grad=True)  # [D]
    b = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=n_steps, line_search_fn='strong_wolfe')

    def loss():
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ w + b, y) + DECAY * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return torch.sigmoid(x_test @ w + b).detach().numpy()  # [M]


def all_texts(corpus):
    """ The texts of all splits; what is shouted throughout in lower case. """
    return [text for split in corpus.n_clips
            for text in lowercase_if_all_caps(corpus.text(split), corpus)]


def mean_length(texts):
    """ Words a sentence, as 'mean (median)'. """
    lengths = [len(words(text)) for text in texts]
    return f"{np.mean(lengths):.1f} ({np.median(lengths):.0f})"


def compare(a, b, lm='', seed=0):
    """
    Two corpora's sentences side by side, as a table (Table 9). The classifier has as many sentences
    of each, in lower case (what is written in capitals would give MOSI away), 80 % to learn from
    and 20 % to be tested on: 0.5 is chance. Raises CorpusError.
    """
    corpora = [open_corpus(a), open_corpus(b)]
    rng = np.random.default_rng(seed)
    texts = []
    for corpus in corpora:
        found = [text.lower() for text in all_texts(corpus) if words(text)]
        texts.append(list(dict.fromkeys(found)))  # each sentence once
    n = min(map(len, texts))
    if n < 10:
        raise CorpusError(f"{a} or {b} has fewer than 10 sentences with a word: "
                          "there is nothing to compare.")

    picked = [[ts[i] for i in rng.permutation(len(ts))[:n]] for ts in texts]  # in random order
    x = embed(picked[0] + picked[1], lm)  # [2n,D]
    y = np.repeat([0, 1], n)  # [2n]
    order, cut = np.arange(n), int(0.8 * n)
    train = np.concatenate([order[:cut], n + order[:cut]])
    test = np.concatenate([order[cut:], n + order[cut:]])
    right = (classify(x[train], y[train], x[test]) > 0.5) == y[test]
    accuracy = right.mean()
    error = np.sqrt(accuracy * (1 - accuracy) / len(test))

    vocabulary = [{w for text in ts for w in words(text)} for ts in texts]
    pairs = list(zip(texts, vocabulary, vocabulary[::-1]))
    in_other = [f"{len(v & other) / len(v):.3f}" for _, v, other in pairs]
    running = [f"{np.mean([w in other for text in ts for w in words(text)]):.3f}"
               for ts, _, other in pairs]
    table = markdown_table(['', *(c.name for c in corpora)], [
        ['sentences', *map(len, texts)],
        ['vocabulary', *map(len, vocabulary)],
        ['words a sentence, mean (median)', *map(mean_length, texts)],
        ['of its words in the other', *in_other],
        ['of its running words in the other', *running]])
    same_texts = ("; they have all their texts in common, and a sentence that it has learned is "
                  "then of the other side.")
    return (f"{table}\n\nA linear classifier on {lm or 'counts of words'} tells them apart with "
            f"accuracy {accuracy:.3f} ({len(test)} sentences it has not seen, half of each; "
            f"chance 0.500, standard error {error:.3f})"
            + (same_texts if set(texts[0]) == set(texts[1]) else '.'))


def subsets(source, lm, n=300, seed=0):
    """
    How well polarity is told on the test split (labels that are not 0) by a classifier that saw n
    random subsets of 5 to 10 % of the train split, against all of it: mean, spread and extremes of
    the accuracy. Raises CorpusError.
    """
    corpus = open_corpus(source)
    rng = np.random.default_rng(seed)
    if corpus.labels.get('label', {}).get('kind') != 'regression':
        raise CorpusError(f"{corpus.name} has no scores, so no polarity.")
    x, y = {}, {}
    for split in ('train', 'test'):
        label = corpus.label(split)
        keep = np.flatnonzero(label)
        texts = lowercase_if_all_caps(corpus.text(split), corpus)
        x[split] = embed([texts[i] for i in keep], lm)  # [N,D]
        y[split] = (label[keep] > 0).astype(int)  # [N]
    if not 0 < y['train'].mean() < 1:
        raise CorpusError(f"the train split of {corpus.name} has one polarity only: "
                          "there is nothing to tell apart.")

    def accuracy(i):
        p = classify(x['train'][i], y['train'][i], x['test'])
        return float(((p > 0.5) == y['test']).mean())

    n_train = len(y['train'])
    whole, got = accuracy(np.arange(n_train)), []
    while len(got) < n:
        shuffled = rng.permutation(n_train)
        i = shuffled[:max(4, int(rng.uniform(0.05, 0.10) * n_train))]
        if 0 < y['train'][i].sum() < len(i):
            got.append(accuracy(i))
    spread = np.std(got, ddof=1) if n > 1 else 0
    positive = y['test'].mean()
    return (f"{corpus.name}, {lm or 'counts of words'}: accuracy of polarity on {len(y['test'])} "
            f"test clips, {n} classifiers on random 5-10 % of the train split: "
            f"{np.mean(got):.3f} +- {spread:.3f}, from {min(got):.3f} to {max(got):.3f}; "
            f"on all of it {whole:.3f}; the larger class {max(positive, 1 - positive):.3f}.")


def main(argv):
    """ The command line of the docstring. Raises CorpusError, ModelError. """
    flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
    sources = [a for a in argv if not a.startswith('--')]
    if 'help' in flags or not flags:
        print(__doc__)
        return
    n, lm = flags.get('n', '300'), flags.get('lm', '')
    odd = set(flags) - {'compare', 'subsets', 'lm', 'n'}
    n_sources = 2 if 'compare' in flags else 1
    if len(sources) != n_sources or odd or not n.isdecimal() or int(n) < 1:
        raise CorpusError("the usage is python tools/language.py --compare A B [--lm=NAME], or "
                          "python tools/language.py --subsets A [--lm=NAME] [--n=300].")
    print(compare(*sources, lm) if 'compare' in flags else subsets(*sources, lm, int(n)))


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (CorpusError, ModelError) as e:
        sys.exit(f"language: {e}")
