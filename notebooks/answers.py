"""
Our answers to the exercises of the notebooks, and checks of a reader's answers.

    from answers import check_without_voice            # in a notebook
    check_without_voice(globals(), without_voice)      # raises an AssertionError if it is wrong

Each exercise is a function that the notebook leaves as a stub. check_NAME(ns, answer) checks
`answer` (ours by default) in the notebook's globals() `ns`. tests/test_notebooks.py runs every
check with our answer, and with the stub, which must fail.
"""

import numpy as np
import torch

from corpora import toy
from losses import mpr_loss
from metrics import confusion, regression_metrics
from model import DeepMLF, MSEAdapterLM

EXERCISES = {
    1: ('without_voice', 'closed_gate', 'other_voice'),
    2: ('read_out', 'one_label', 'n_directions'),
    3: ('mpr_by_loops', 'largest_margin', 'kappa'),
}


def close(a, b, within=1e-5):
    return bool(np.allclose(np.asarray(a, float), np.asarray(b, float), atol=within))


# -------------------------------------------------------------------------------------------------
# 1. A frozen LM learns to listen


def without_voice(rows):
    states = sorted(set(toy.PAIRS))
    face = np.array([states[int(s)][1] for s in rows[:, 1]])  # [n]
    groups = [
        rows[(rows[:, 0] == words) & (face == f), 2] for words in set(rows[:, 0]) for f in set(face)
    ]
    return sum(np.abs(y - np.median(y)).sum() for y in groups) / len(rows)


def check_without_voice(ns, answer=without_voice):
    # computed in another way: try many guesses for each group
    rows, best, guesses = toy.toy_table(), 0.0, np.linspace(-3, 3, 601)
    states = sorted(set(toy.PAIRS))
    for words in range(5):
        for face in toy.FACE:
            y = rows[[w == words and states[int(s)][1] == face for w, s in rows[:, :2]], 2]  # [n]
            best += np.abs(y - guesses[:, None]).sum(1).min() / len(rows)
    found = answer(rows)
    assert close(found, best, 1e-6), f"{found} is not {best}"
    assert ns['ceilings']['full'] < found < ns['ceilings']['text'], (
        "it must be between the bounds of everything and of text alone"
    )


def closed_gate(lm, encoder, k):
    # tanh(0) = 0: the gate is closed at the start, and weights behind it get no gradient
    return DeepMLF(lm, encoder, k | dict(mm_gate='tanh'))


@torch.no_grad()
def check_closed_gate(ns, answer=closed_gate):
    model, batch = answer(ns['lm'], ns['encoder'], ns['k']).eval(), ns['batch']
    x_t, mask = model.streams_through_lm(batch)[0], batch['text_mask']  # [B,T,D], [B,T]
    assert len(model.mm_blocks) == len(ns['k']['mm_layers']), "the model must have its MM blocks"
    assert torch.equal(x_t[mask], ns['lm'](batch['tokens'])[mask]), (
        "the text's hidden states are not those of the frozen LM"
    )


def other_voice(model, batch):
    av = [name for name in batch if name.startswith(('audio', 'vision'))]  # frames, lengths, masks
    return model.predict(batch | {name: batch[name].roll(-1, 0) for name in av})


@torch.no_grad()
def check_other_voice(ns, answer=other_voice):
    model, batch = ns['model'].eval(), ns['swapped']
    own, swapped = model.predict(batch), answer(model, batch)
    assert torch.equal(own['text'], swapped['text']), (
        "the text head must not change: the text never attends to the fusion tokens"
    )
    assert close(swapped['av'], own['av'].roll(-1, 0), 1e-4), (
        "clip i must get the audio and video of clip i + 1"
    )
    assert not close(own['pred'], swapped['pred'], 1e-4)

    def error(out):
        return float((out['pred'] - batch['label']).abs().mean())

    if not ns['fast']:
        assert error(swapped) > error(own) + 0.2, (
            "a trained model must have a larger MAE with another clip's audio and video"
        )


# -------------------------------------------------------------------------------------------------
# 2. Pseudo tokens


def read_out(prob, values):
    # the median has the lowest expected |error|, and the mode the lowest chance of a wrong label
    middle = (prob.cumsum(-1) < 0.5).sum(-1)  # [B], first label where the sum is at least .5
    return dict(
        expected=(prob * values).sum(-1),
        mode=values[prob.argmax(-1)],
        median=values[middle.clamp(max=len(values) - 1)],
    )


@torch.no_grad()
def check_read_out(ns, answer=read_out):
    model, batch = ns['mse'].eval(), ns['batch']
    found, before = answer(model.predict(batch)['prob'], model.values), model.k
    try:
        for how in ('expected', 'mode', 'median'):
            model.k = before | dict(score_estimate=how)
            assert close(found[how], model.predict(batch)['pred']), how
    finally:
        model.k = before


def one_label(model, batch, k):
    (x, n), ids, out = model.embed_prompt(batch), model.prompt.answers[k], []  # [B,T,D], [B]
    for b in range(len(x)):  # one clip at a time has no padding, so there is nothing to mask
        z = torch.cat([x[b, : n[b]], model.lm.embed(torch.tensor(ids))])[None]  # [1,n+len,D]
        z, rope = model.lm.place(z, torch.arange(z.shape[1])[None])
        for l in range(model.lm.n_layers):
            z, _ = model.lm.block(l, z, rope)
        logits = model.lm.lm_head(model.lm.final_norm(z))[0]  # [n+len,V]
        log_p = logits[n[b] - 1 : -1].log_softmax(-1)  # [len,V], from the position before each
        out.append(log_p[torch.arange(len(ids)), ids].sum())
    return torch.stack(out)


@torch.no_grad()
def check_one_label(ns, answer=one_label):
    model = ns['mse'].eval()
    batch = ns['feed']('valid', np.arange(5))
    scores = model.label_scores(*model.embed_prompt(batch))  # [B,K]
    for k in (0, 17, 30, 60):
        assert close(answer(model, batch, k), scores[:, k], 1e-3), model.prompt.labels[k]


def n_directions(tokens):
    # the tokens are float32: singular values below its rounding count as zero
    return torch.linalg.matrix_rank(tokens.double(), rtol=1e-4)


@torch.no_grad()
def check_n_directions(ns, answer=n_directions):
    P, found = ns['mse'].k['n_pseudo'], {}
    for how in ('released', 'full'):
        k = ns['mse'].k | dict(pseudo_projection=how)
        model = MSEAdapterLM(ns['lm'], ns['prompt'], k, ns['corpus'].widths).eval()
        text = model.own_text(model.lm.embed(ns['batch']['tokens']), ns['batch']['text_len'])
        found[how] = answer(model.adapter(ns['batch'], *text)).tolist()
    assert set(found['released']) == {2}, "the tokens w_p m + b_p span m and the vector of ones"
    assert set(found['full']) == {P}


# -------------------------------------------------------------------------------------------------
# 3. Order matters


def mpr_by_loops(pred, label, gap, margin, slope):
    losses = []
    for i in range(len(pred)):
        for j in range(i):
            dy = float(label[i] - label[j])
            if abs(dy) <= gap:
                continue
            s = 1 if dy > 0 else -1
            losses.append(max(0.0, margin + slope * abs(dy) - s * float(pred[i] - pred[j])))
    return sum(losses) / len(losses) if losses else 0.0


def check_mpr_by_loops(ns, answer=mpr_by_loops):
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        pred, label = (torch.tensor(rng.normal(size=n)) for _ in range(2))
        assert close(answer(pred, label, 0.5, 0.1, 0.5), mpr_loss(pred, label, 0.5, 0.1, 0.5)), (
            f"{n} clips"
        )
    assert answer(torch.ones(3), torch.zeros(3), 0.5, 0.1, 0.5) == 0, "equal labels make no pair"


def largest_margin(gap, slope):
    # a perfect pair has p_i - p_j = dy. It is free if margin + slope dy <= dy for all dy > gap
    return (1 - slope) * gap


def check_largest_margin(ns, answer=largest_margin):
    label = torch.linspace(-3, 3, 601).double()  # label differences of every size
    for gap, slope in ((0.5, 0.5), (1.0, 0.5), (0.5, 0.0), (2.0, 0.9)):
        margin = answer(gap, slope)
        assert float(mpr_loss(label, label, gap, margin, slope)) < 1e-9, (
            f"gap {gap}, slope {slope}: {margin} is too large"
        )
        assert float(mpr_loss(label, label, gap, margin + 0.05, slope)) > 1e-9, (
            f"gap {gap}, slope {slope}: {margin} is not the largest"
        )


def kappa(counts):
    level = np.arange(len(counts))
    weight = (level[:, None] - level) ** 2  # [7,7]
    chance = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()  # [7,7]
    return 1 - (weight * counts).sum() / (weight * chance).sum()  # 0 of a constant prediction


def check_kappa(ns, answer=kappa):
    rng = np.random.default_rng(0)
    for noise in (0.3, 1.0, 3.0):
        label = rng.uniform(-3, 3, 200)
        pred = label + noise * rng.normal(size=200)
        levels = [np.round(np.clip(x, -3, 3)) + 3 for x in (pred, label)]
        assert close(
            answer(confusion(*levels, 7)), regression_metrics(pred, label, (-3, 3))['qwk']
        ), f"noise {noise}"


def check_all(number, ns):
    """
    Run every check of a notebook with our answer, which must pass, and with the notebook's stub,
    which must fail. Raises RuntimeError where a stub passes.
    """
    for name in EXERCISES[number]:
        check = globals()['check_' + name]
        check(ns)
        try:
            check(ns, ns[name])
        except AssertionError:
            continue
        raise RuntimeError(f"the stub {name} passes its check: the check does not test the answer")
