"""
Short fingerprints of LMs and tokenizers, by which a checkpoint knows the ones that it was trained
with, and the texts that show whether training left an LM as it was.

Axis letters: T text tokens, V vocabulary.
"""
import hashlib
import json

import torch


def whole(p):
    """ A parameter without its gradient; in one piece where processes share it. """
    p = p.detach()
    return p.full_tensor() if hasattr(p, 'full_tensor') else p


def fingerprint(model):
    """
    16 hex digits that differ for another LM, and for this one trained again. They are of the first
    256 values of each tensor, as hashing gigabytes at every start would take long.
    """
    first = [whole(p).flatten()[:256].float().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b''.join(first)).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer):
    """ 16 hex digits of the token ids that a tokenizer makes of a few fixed texts. """
    texts = [
        "The film was GREAT, wasn't it? I'd say 7/10 (+0.6, -1.5).",
        ' two  spaces\n',
        'na\u00efve \u6211\u4e0d\u559c\u6b22 \U0001f642',
    ]
    ids = tokenizer(texts, add_special_tokens=True)['input_ids']
    ids = [[int(t) for t in text] for text in ids]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def fixed_tokens(lm, n):
    """ n token ids [1,n] that are the same for every LM of this vocabulary. """
    weight = lm.parts['embed'].weight  # [V,D]
    n_known = min(len(weight), lm.vocabulary)
    return 7 * torch.arange(n, device=weight.device)[None] % n_known


@torch.no_grad()
def sample_logits(lm, n_tokens=8, n_logits=4):
    """
    A few numbers that change with an LM's configuration, which the fingerprint of its weights does
    not see: the first logits behind fixed tokens, and the largest magnitude of all -> list of
    floats.
    """
    logits = lm.lm_head(lm(fixed_tokens(lm, n_tokens)))[0, -1].float()  # [V]
    return [round(float(v), 6) for v in (*logits[:n_logits], logits.abs().max())]


def same_logits(ours, theirs, dtype):
    """
    Whether two sample_logits are equal up to the rounding of a dtype on another machine.
    """
    tolerance = (1e-3 if dtype == 'float32' else 5e-2) * max(1e-6, abs(theirs[-1]))
    return len(ours) == len(theirs) and all(abs(a - b) <= tolerance for a, b in zip(ours, theirs))


@torch.no_grad()
def continuation(model, tokenizer, texts=('The film was', 'I said that'), n_new=16):
    """
    The texts, each continued greedily by the model's frozen LM without the adapter, by n_new tokens
    or by as many as it has positions for; None if the model has no LM. train.py compares them
    before and after training, and the report says whether they are equal.
    """
    if not model.lm or not tokenizer:
        return None
    lm, device, continued = model.lm, model.lm.parts['embed'].weight.device, []
    for ids in tokenizer(list(texts), add_special_tokens=True)['input_ids']:
        ids = (list(ids) or [0]) * (2 if len(ids) < 2 else 1)
        ids = torch.tensor(ids[:lm.max_positions - 1], device=device)  # [T], at least 2
        n_read = torch.tensor([len(ids) - 1], device=device)
        n_fit = min(n_new, lm.max_positions - len(ids))
        new = lm.go_on(lm.embed(ids[None, :-1]), n_read, ids[-1:], n_fit)  # [1,n_fit]
        continued.append(tokenizer.decode(ids.tolist() + new[0].clamp(min=0).tolist()))
    return continued
