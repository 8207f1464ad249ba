"""
The toy corpus: a synthetic corpus of text, audio and video whose upper bounds are known.

    python train.py                 trains on it; it is made on first use, in data/toy
    python -c "from corpora import toy; print(toy.toy_ceilings())"
                                    prints the upper bound of each modality
    python tools/adding.py out/RUN [out/RUN-seed1 ..]
                                    compares runs with the late-fusion upper bound on the same clips

The words of a sentence carry valence. The amplitude of the voice's oscillation, not its mean,
carries arousal. The face shows a short expression at a random moment. A flat voice with a smile is
sarcasm and flips the valence of the words. The latent variables of a clip are few and discrete, so
the upper bounds of text, of audio + video, of late fusion (their sum) and of all modalities
together are known exactly.
"""
import json
import os
import pickle
from pathlib import Path

import numpy as np

from corpora.convert import convert
from corpora.seal import write_meta

VERSION = 2  # of the corpus that this file makes; raise it when a change alters a clip or a bound

# The latent variables of a clip. A flat voice with a smile (sarcasm) is SARCASM times as likely as
# each of the other eight pairs of voice and face. If it were rare, late fusion would come close
# to the upper bound.
VALENCE = (-1.6, -0.8, 0.0, 0.8, 1.6)                 # v, from the words
AROUSAL = {'flat': -0.4, 'mid': 0.0, 'high': 0.6}     # a, from the amplitude of the voice
FACE = {'frown': -0.8, 'neutral': 0.0, 'smile': 0.8}  # e, from a short expression
NOISE = (-1.0,) + (-0.5,) * 4 + (0.0,) * 6 + (0.5,) * 4 + (1.0,)  # n, annotator noise, in no input
SARCASM = 3
PAIRS = [(a, e) for a in AROUSAL for e in FACE
         for _ in range(SARCASM if (a, e) == ('flat', 'smile') else 1)]
EMOTIONS = ['anger', 'sadness', 'neutral', 'contentment', 'joy']

# The late-fusion rule with the highest accuracy of the emotion: the class with the highest sum of a
# score of the text state and one of the audiovisual state. A mixed-integer program found the scores
# and proved that no others have a higher accuracy (tests/test_data.py solves it again).
TEXT_SCORES = np.array([
    [0, 3, -2, 0, -8], [0, 3, 0, 2, -6], [0, 0, 4, 0, 0], [0, -4, 2, 0, 0],
    [-1, -6, 0, 0, 0]])  # [5,K]
AV_SCORES = np.array([
    [0, 6, 1, 0, 0], [0, 1, 0, 1, 0], [0, -3, 2, 1, 0], [1, -3, 0, -2, 1], [0, -4, 1, -2, 4],
    [0, -3, 3, 0, 8], [0, 5, 0, 1, 0], [0, 1, -2, 1, 0], [0, 0, -3, 2, 0]])  # [9,K]

# A sentence is an opening, a subject, a valence word, and an ending that depends on the valence.
# Without such an ending, the LM would not learn to keep the valence in its hidden states beyond the
# next token, and audio and video would have no valence to be fused with.
OPENINGS = ['well', 'so', 'honestly', 'i have to say', 'you know', 'in the end', 'as for me',
            'last night']
SUBJECTS = ['the film was', 'the story felt', 'the acting was', 'the music sounded',
            'the ending felt', 'the hero was', 'the plot seemed', 'the whole thing was',
            'the first half was', 'the camera work looked']
WORDS = [['awful', 'terrible', 'horrible', 'dreadful'],
         ['weak', 'dull', 'boring', 'clumsy'],
         ['ordinary', 'average', 'usual', 'plain'],
         ['nice', 'good', 'pleasant', 'solid'],
         ['wonderful', 'brilliant', 'superb', 'amazing']]
ENDINGS = [['and i hated every minute', 'and we left early', 'so never watch it'],
           ['and i lost interest', 'and it dragged on', 'so maybe skip it'],
           ['and that is that', 'and it was two hours long', 'so make up your own mind'],
           ['and i liked it', 'and time went by fast', 'so give it a try'],
           ['and i loved every minute', 'and we saw it twice', 'so go and see it now']]


def toy_label(v, n, arousal, face):
    """
    The label in [-3, 3] and the emotion (its number in EMOTIONS) of a clip's latent variables. Both
    depend on y = s v + a + e + n, where s is -1 for a flat voice with a smile and else 1; the
    emotion also depends on whether the arousal is high.
    """
    s = -1 if arousal == 'flat' and face == 'smile' else 1
    y = s * v + AROUSAL[arousal] + FACE[face] + n
    strong = arousal == 'high'
    if abs(y) <= 0.7:
        emotion = 2
    elif y > 0:
        emotion = 4 if strong else 3
    else:
        emotion = 0 if strong else 1
    return min(3.0, max(-3.0, round(y, 6))), emotion


def toy_table():
    """
    All equally likely cases as rows (text state, audiovisual state, label, emotion): 5 valences x
    11 pairs x 16 noises.
    """
    states = sorted(set(PAIRS))
    rows = [(t, states.index(pair), *toy_label(v, n, *pair))
            for t, v in enumerate(VALENCE) for pair in PAIRS for n in NOISE]
    return np.array(rows)  # [880,4]


def additive_fit(t, av, y, n_steps=2000):
    """
    The late-fusion upper bound of a regression: the f and g with the lowest mean |y - f(t) -
    g(av)|, by iteratively reweighted least squares with a smoothing that shrinks to 1e-9. Returns
    f(t) + g(av) as a table [5,9], and the lowest mean.
    """
    X = np.zeros((len(t), t.max() + av.max() + 2))  # [n,14], both states one-hot
    X[np.arange(len(t)), t] = 1
    X[np.arange(len(t)), t.max() + 1 + av] = 1
    residual, eps = y - np.median(y), 1.0
    best, best_beta = np.inf, None
    for _ in range(n_steps):
        w = np.sqrt(1 / np.maximum(np.abs(residual), eps))  # [n]
        beta = np.linalg.lstsq(X * w[:, None], y * w, rcond=None)[0]  # [14]
        residual = y - X @ beta  # [n]
        eps = max(eps * 0.97, 1e-9)
        mean = np.abs(residual).mean()
        if mean < best:
            best, best_beta = mean, beta
    n = t.max() + 1
    return best_beta[:n, None] + best_beta[n:], best  # [5,9], []


def late_accuracy(t, av, c):
    """ The late-fusion upper bound of the emotions: the accuracy of the best rule of this form. """
    return float((np.argmax(TEXT_SCORES[t] + AV_SCORES[av], 1) == c).mean())


def toy_ceilings():
    """
    The upper bounds, dict(mae, acc): the lowest MAE of the label and the highest accuracy of the
    emotion, from no modality (majority), from text, from audio and video (av), from all (full), and
    from late fusion of text and av (late). All but those of late fusion are by enumeration.
    """
    rows = toy_table()
    t, av, c = (rows[:, i].astype(int) for i in (0, 1, 3))  # [880] each
    y = rows[:, 2]  # [880]

    def best(state):
        mae = acc = 0.0
        for s in np.unique(state):
            ys, cs = y[state == s], c[state == s]
            mae += np.abs(ys - np.median(ys)).sum()  # the median has the lowest mean absolute error
            acc += np.bincount(cs).max()
        return dict(mae=float(mae / len(y)), acc=float(acc / len(y)))

    late = dict(mae=float(additive_fit(t, av, y)[1]),
                acc=late_accuracy(t, av, c))
    return dict(majority=best(0 * t), text=best(t), av=best(av), full=best(100 * t + av), late=late)


def draw(n_clips=(4000, 500, 1000), seed=0):
    """
    Draws the clips of the toy corpus. Returns a dict in the layout of M-SENA, the emotions of each
    split, and the states of each split, (text state, audiovisual state) as in toy_table, [N,2].

    Audio [14 to 24, 12]: a sine of period 7 with a random phase, whose amplitude depends on the
    arousal, plus an offset of the speaker, plus noise. Video [10 to 16, 16]: noise, plus an
    expression in 8 frames from a random onset on.
    """
    rng = np.random.default_rng(seed)
    d_a, d_v, S_a, S_v = 12, 16, 24, 16
    axis_a = rng.normal(size=d_a)  # [d_a]
    smile, frown = rng.normal(size=(2, d_v))  # [d_v] each
    expression = dict(smile=smile, frown=frown, neutral=0 * smile)
    amplitude = dict(flat=0.2, mid=0.8, high=1.6)
    source, emotions, states = {}, {}, {}
    pairs = sorted(set(PAIRS))
    for split, N in zip(('train', 'valid', 'test'), n_clips):
        texts, labels, emotions[split], states[split] = [], [], [], []
        audio = np.zeros((N, S_a, d_a), np.float32)
        vision = np.zeros((N, S_v, d_v), np.float32)
        n_a = rng.integers(14, S_a + 1, N)  # [N]
        n_v = rng.integers(10, S_v + 1, N)  # [N]
        for i in range(N):
            v = rng.integers(5)
            arousal, face = PAIRS[rng.integers(len(PAIRS))]
            y, emotion = toy_label(VALENCE[v], rng.choice(NOISE), arousal, face)
            parts = (OPENINGS, SUBJECTS, WORDS[v], ENDINGS[v])
            texts.append(' '.join(rng.choice(part) for part in parts))
            labels.append(y)
            emotions[split].append(emotion)
            states[split].append((v, pairs.index((arousal, face))))

            phase = rng.uniform(0, 2 * np.pi)
            wave = amplitude[arousal] * np.sin(2 * np.pi * np.arange(n_a[i]) / 7 + phase)  # [S]
            offset = rng.normal(size=d_a)  # [d_a], of the speaker
            wave = wave[:, None] * axis_a + offset  # [S,d_a]
            audio[i, :n_a[i]] = wave + 0.5 * rng.normal(size=(n_a[i], d_a))

            vision[i, :n_v[i]] = 0.5 * rng.normal(size=(n_v[i], d_v))
            onset = rng.integers(n_v[i] - 8 + 1)
            vision[i, onset:onset + 8] += expression[face]
        source[split] = dict(
            raw_text=texts, audio=audio, vision=vision,
            audio_lengths=n_a.tolist(), vision_lengths=n_v.tolist(),
            regression_labels=np.float32(labels), id=[f'{split}$_${i}' for i in range(N)])
    return source, emotions, {split: np.array(s) for split, s in states.items()}


def make_toy(folder, n_clips=(4000, 500, 1000), seed=0):
    """
    Makes the corpus folder of the toy corpus. The clips are first written as an M-SENA pickle, so
    that they go through the same conversion as MOSEI.
    """
    source, emotions, _ = draw(n_clips, seed)
    pickled = folder + '.pkl'
    try:
        with open(pickled, 'wb') as f:
            pickle.dump(source, f, protocol=4)
        convert(pickled, folder, label_range=(-3.0, 3.0))
    finally:
        if os.path.exists(pickled):
            os.remove(pickled)
    for split in source:
        np.save(os.path.join(folder, split, 'emotion.npy'), np.int64(emotions[split]))

    path = os.path.join(folder, 'meta.json')
    with open(path, encoding='utf-8') as f:
        meta = json.load(f)
    meta['labels']['emotion'] = dict(kind='classes', names=EMOTIONS)
    meta['ceilings'] = toy_ceilings()
    meta['toy'] = VERSION
    write_meta(Path(folder), meta)
