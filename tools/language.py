"""
Compares the language of two corpora, and of small subsets of a corpus with the whole (DeepMLF
6.2.4, Table 9).

    python tools/language.py --compare A B [--lm=NAME]
        vocabulary, lengths, durations where they are known, and the accuracy of a linear
        classifier that tells which corpus a sentence is from
    python tools/language.py --subsets A [--lm=NAME] [--n=300]
        the accuracy of linear polarity classifiers trained on random subsets of 5 to 10 %, and of
        one trained on the whole train split

A and B are corpus folders or source files. A sentence is represented by the mean of the last hidden
states of a Hugging Face model (--lm, computed once), or by its word counts without --lm. The
classifiers are logistic regressions without tuned settings, tested on held-out sentences.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))   # runs from any directory

from corpora.unpickle import CorpusError
from data import open_corpus
from metrics import markdown_table
from run.command_line import words_and_flags
from run.errors import UserError
from run.frozen_text import frozen_text
from run.load_lm import load_tokenizer
from run.machine import print_any_text
from run.texts import lowercase_if_all_caps, tokenize

DECAY = 1e-2  # L2 penalty on the classifier's weights, for standardised features


def words(text):
    """ The words of a text, in lower case; each Chinese character is one. """
    return re.findall(r"[\u4e00-\u9fff]|[^\W_]+(?:'[^\W_]+)?", text.lower())


def fnv_1a(word):
    """ A 32-bit hash of a word. Unlike hash(), it is the same in every process. """
    h = 2166136261
    for byte in word.encode():
        h = ((h ^ byte) * 16777619) % 2 ** 32
    return h


def bag(texts, size=4096):
    """ Word counts of N texts, hashed to `size` columns -> [N,size] float32. """
    out = np.zeros((len(texts), size), np.float32)
    for i, text in enumerate(texts):
        for word in words(text):
            out[i, fnv_1a(word) % size] += 1
    return out


def embed(texts, lm, where='data', device='cpu'):
    """ Sentence vectors of N texts -> [N,D] float32: the mean of the last hidden states of `lm`,
    or word counts if lm is ''. Raises ModelError. """
    if not lm:
        return bag(texts)
    tokens, _, _ = tokenize(load_tokenizer(lm), texts, 128)
    hidden, _ = frozen_text(lm, tokens, f'{where}/features', device=device)  # [sum of lengths,D]
    ends = np.cumsum([len(t) for t in tokens])
    return np.stack([np.asarray(x, np.float32).mean(0) for x in np.split(hidden, ends[:-1])])


def classify(x, y, x_test, n_steps=100):
    """ Logistic regression on standardised features. x [N,D], y [N] of 0 and 1, x_test [M,D] ->
    the probabilities of class 1 for x_test [M]. """
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
    """ The texts of all splits, in lower case if the corpus is all capitals. """
    return [text for split in corpus.n_clips
            for text in lowercase_if_all_caps(corpus.text(split), corpus)]


def mean_length(texts):
    """ Words per sentence, as 'mean (median)'. """
    lengths = [len(words(text)) for text in texts]
    return f"{np.mean(lengths):.1f} ({np.median(lengths):.0f})"


def mean_seconds(corpus):
    """ Seconds per sentence, from a stream whose frames per second are known, as text; else '-'. """
    for m, info in corpus.meta['streams'].items():
        rate = info.get('frames_per_second')
        n_frames = np.concatenate([corpus.lengths(split, m) for split in corpus.n_clips])  # [N]
        if rate and n_frames.any():
            return f"{n_frames[n_frames > 0].mean() / rate:.1f}"
    return '-'


def compare(a, b, lm='', seed=0):
    """
    Compares the sentences of two corpora (Table 9) -> a table and a sentence. The classifier reads
    the same number of sentences of each corpus, in lower case because MOSI is all capitals. 80 %
    are for training and 20 % for testing. Chance is 0.5. Raises CorpusError.
    """
    corpora = [open_corpus(a), open_corpus(b)]
    rng = np.random.default_rng(seed)
    texts = []
    for corpus in corpora:
        sentences = [text.lower() for text in all_texts(corpus) if words(text)]
        texts.append(list(dict.fromkeys(sentences)))  # each sentence once
    n = min(map(len, texts))
    if n < 10:
        raise CorpusError(f"{a} or {b} has fewer than 10 sentences with a word, too few to "
                          "compare: choose a larger corpus.")

    picked = [[ts[i] for i in rng.permutation(len(ts))[:n]] for ts in texts]  # in random order
    x = embed(picked[0] + picked[1], lm)  # [2n,D]
    y = np.repeat([0, 1], n)  # [2n]
    order, cut = np.arange(n), int(0.8 * n)
    train = np.concatenate([order[:cut], n + order[:cut]])
    test = np.concatenate([order[cut:], n + order[cut:]])
    correct = (classify(x[train], y[train], x[test]) > 0.5) == y[test]
    accuracy = correct.mean()
    error = np.sqrt(accuracy * (1 - accuracy) / len(test))

    vocabulary = [{w for text in ts for w in words(text)} for ts in texts]
    pairs = list(zip(texts, vocabulary, vocabulary[::-1]))
    types_in_other = [f"{len(v & other) / len(v):.3f}" for _, v, other in pairs]
    tokens_in_other = [f"{np.mean([w in other for text in ts for w in words(text)]):.3f}"
                       for ts, _, other in pairs]
    table = markdown_table(['', *(c.name for c in corpora)], [
        ['sentences', *map(len, texts)],
        ['vocabulary', *map(len, vocabulary)],
        ['words per sentence, mean (median)', *map(mean_length, texts)],
        ['seconds per sentence, mean', *map(mean_seconds, corpora)],
        ['share of its vocabulary that the other has', *types_in_other],
        ['share of its running words that the other has', *tokens_in_other]])
    same_texts = (" The two corpora have all texts in common, so the accuracy can be below chance: "
                  "some test sentences were training sentences of the other corpus.")
    return (f"{table}\n\nA linear classifier on {lm or 'word counts'} tells the corpora apart with "
            f"accuracy {accuracy:.3f} ({len(test)} held-out sentences, half of each corpus; "
            f"chance 0.500, standard error {error:.3f})."
            + (same_texts if set(texts[0]) == set(texts[1]) else ''))


def subsets(source, lm, n=300, seed=0):
    """
    Trains n polarity classifiers on random subsets of 5 to 10 % of the train split, and one on all
    of it, and tests them on the test split; clips with label 0 are left out -> a sentence with
    mean, standard deviation and extremes of the accuracy. Raises CorpusError.
    """
    corpus = open_corpus(source)
    rng = np.random.default_rng(seed)
    if corpus.labels.get('label', {}).get('kind') != 'regression':
        raise CorpusError(f"{corpus.name} has no sentiment scores, so no polarity: choose a corpus "
                          "with scores.")
    x, y = {}, {}
    for split in ('train', 'test'):
        label = corpus.label(split)
        keep = np.flatnonzero(label)
        texts = lowercase_if_all_caps(corpus.text(split), corpus)
        x[split] = embed([texts[i] for i in keep], lm)  # [N,D]
        y[split] = (label[keep] > 0).astype(int)  # [N]
    if not 0 < y['train'].mean() < 1:
        raise CorpusError(f"the train split of {corpus.name} has one polarity only, so there is "
                          "nothing to classify: choose another corpus.")

    def accuracy(i):
        p = classify(x['train'][i], y['train'][i], x['test'])
        return float(((p > 0.5) == y['test']).mean())

    n_train = len(y['train'])
    whole, accuracies = accuracy(np.arange(n_train)), []
    while len(accuracies) < n:
        shuffled = rng.permutation(n_train)
        i = shuffled[:max(4, int(rng.uniform(0.05, 0.10) * n_train))]
        if 0 < y['train'][i].sum() < len(i):
            accuracies.append(accuracy(i))
    spread = np.std(accuracies, ddof=1) if n > 1 else 0
    positive = y['test'].mean()
    return (f"{corpus.name}, {lm or 'word counts'}: polarity accuracy on {len(y['test'])} test "
            f"clips of {n} classifiers, each trained on random 5-10 % of the train split: "
            f"{np.mean(accuracies):.3f} +- {spread:.3f}, from {min(accuracies):.3f} to "
            f"{max(accuracies):.3f}; trained on the whole split: {whole:.3f}; "
            f"majority class: {max(positive, 1 - positive):.3f}.")


def main(argv):
    """ The command line. Raises UserError. """
    sources, flags = words_and_flags(argv, switches=('compare', 'subsets'))
    if 'help' in flags or not flags:
        print(__doc__)
        return
    n, lm = flags.get('n', '300'), flags.get('lm', '')
    unknown = set(flags) - {'compare', 'subsets', 'lm', 'n'}
    n_sources = 2 if 'compare' in flags else 1
    if len(sources) != n_sources or unknown or not n.isdecimal() or int(n) < 1:
        raise CorpusError("the usage is python tools/language.py --compare A B [--lm=NAME], or "
                          "python tools/language.py --subsets A [--lm=NAME] [--n=300].")
    print(compare(*sources, lm) if 'compare' in flags else subsets(*sources, lm, int(n)))


if __name__ == '__main__':
    print_any_text()
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f"language: {e}")
