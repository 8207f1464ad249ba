"""
Every frozen LM is held against Hugging Face's own forward before it is used: FrozenLM (lm.py)
computes the layers by itself, and an LM that computes something else would give wrong results
without a message. The result is remembered, so that one LM is compared once.

Axis letters: B texts, T text tokens, V vocabulary.
"""
import hashlib
import json
import os
from contextlib import contextmanager

import torch
import torch.nn as nn

from lm import FAMILIES, FrozenLM, unknown_family
from run.errors import ModelError, first_line
from run.fingerprints import fixed_tokens
from run.folder import write_text

EQUAL = 1e-4             # largest difference of float32 logits, as a share of the largest logit
SHORT, LONG = 8, 256     # tokens of the two texts; fewer where the LM takes fewer
WHOLE_BYTES = 4e9        # a larger LM (in float32) is compared on its first layers alone
FIRST_LAYERS = 8         # more than the period of any pattern of layers in FAMILIES


@contextmanager
def first_layers(lm, n):
    """ Inside, the LM has its first n layers only, for our forward and for Hugging Face's. """
    path, n_layers = lm.row['layers'], lm.n_layers
    layers = lm.hf.get_submodule(path)
    lm.hf.set_submodule(path, nn.ModuleList(list(layers)[:n]))
    lm.hf.config.num_hidden_layers = lm.n_layers = min(n, n_layers)
    try:
        yield
    finally:
        lm.hf.set_submodule(path, layers)
        lm.hf.config.num_hidden_layers = lm.n_layers = n_layers


@contextmanager
def in_float32(lm):
    """
    Inside, the LM's weights are float32. Afterwards they are the tensors of before, which may be
    mapped from the LM's file. Buffers stay as they are, as rope's angles are float32 in every LM.
    """
    weights = list(lm.hf.parameters())
    before = [p.data for p in weights]
    try:
        for p in weights:
            p.data = p.data.float()
        yield
    finally:
        for p, data in zip(weights, before):
            p.data = data


@contextmanager
def exact_attention(lm):
    """ Inside, a family that caps attention is computed by transformers with the cap. """
    config = lm.hf.config
    before = getattr(config, '_attn_implementation', None)
    if lm.attention_cap is not None:
        config._attn_implementation = 'eager'  # sdpa of transformers leaves the cap out
    try:
        yield
    finally:
        if lm.attention_cap is not None:
            config._attn_implementation = before


def logits_of_both(lm, n):
    """
    The logits of n fixed tokens by Hugging Face's forward and by ours, 2x [1,n,V] in float32.
    Raises ModelError where one of them fails: with its own error.
    """
    tokens = fixed_tokens(lm, n)  # [1,n]
    found = []
    for whose, forward in (
        ("transformers' own forward", lambda: lm.hf(tokens).logits),
        ('the forward of lm.py', lambda: lm.lm_head(lm(tokens))),
    ):
        try:
            found.append(forward().float())  # [1,n,V]
        except Exception as e:  # of any kind: the LM may have brought code of its own
            raise ModelError(f"{whose} of this LM (family {lm.family!r}) fails on {n} tokens "
                             f"({type(e).__name__}: {first_line(e)}): its config.json and its "
                             "weights may not belong together, so take another LM, or correct its "
                             "row in FAMILIES.") from None
    return found


def difference(a, b, largest):
    """ The largest difference of logits a and b [1,n,V], as a share of `largest`. """
    return float((a - b).abs().max()) / max(largest, 1e-30)


@torch.no_grad()
def compare(lm):
    """
    Holds `lm` against Hugging Face's forward on a short and a long text -> dict: float32, the
    largest difference in float32; and for an LM in another dtype `ours` and `theirs`, how far each
    is in that dtype from Hugging Face's float32; layers, how many were compared. All differences
    are shares of the largest logit. Raises ModelError where they differ.
    """
    dtype = lm.parts['embed'].weight.dtype
    n_float32_bytes = 4 * sum(p.numel() for p in lm.hf.parameters())
    whole = n_float32_bytes <= WHOLE_BYTES or lm.n_layers <= FIRST_LAYERS
    result = dict(float32=0.0, layers=lm.n_layers if whole else FIRST_LAYERS)
    with first_layers(lm, result['layers']), exact_attention(lm):
        for n in sorted({min(n, lm.max_positions) for n in (SHORT, LONG)}):
            with in_float32(lm):
                exact, ours = logits_of_both(lm, n)  # 2x [1,n,V]
            largest = float(exact.abs().max())
            if not torch.isfinite(exact).all():
                raise ModelError(f"this LM gives logits that are NaN or infinite for {n} fixed "
                                 "tokens in float32: its weights are damaged, so get its files "
                                 "again.")
            result['float32'] = max(result['float32'], difference(exact, ours, largest))
            if dtype is not torch.float32:
                theirs, ours = logits_of_both(lm, n)  # 2x [1,n,V]
                for name, logits in (('theirs', theirs), ('ours', ours)):
                    gap = difference(exact, logits, largest)
                    result[name] = max(result.get(name, 0.0), gap)
    if not result['float32'] <= EQUAL:
        raise ModelError(f"the forward of lm.py differs from transformers' own for this LM (family "
                         f"{lm.family!r}) by {result['float32']:.2g} of the largest logit in "
                         f"float32, where {EQUAL:g} is allowed: take another LM, or correct its "
                         "row in FAMILIES (lm.py).")
    if 'ours' in result and not result['ours'] <= 2 * result['theirs'] + EQUAL:
        name = str(dtype).removeprefix('torch.')
        raise ModelError(f"in {name} the forward of lm.py is {result['ours']:.2g} of the largest "
                         f"logit away from float32 for this LM (family {lm.family!r}), and "
                         f"transformers' own {result['theirs']:.2g}: take --dtype=float32.")
    return result


def known_lm(hf):
    """
    A FrozenLM of a Hugging Face model. An LM of an unknown family is taken if it computes what a
    row of FAMILIES does: many are Llamas under another name. Raises ModelError.
    """
    if hf.config.model_type in FAMILIES:
        try:
            return FrozenLM(hf)
        except AttributeError as e:
            raise ModelError(f"the LM's family is {hf.config.model_type!r}, and it lacks a part "
                             f"or a setting of that family ({e}): its config.json may not belong "
                             "to its weights, or this transformers names it otherwise.") from None
    fitting = []  # (difference, row) of each family that has the same parts
    failed = ''
    for row in FAMILIES.values():
        try:
            lm = FrozenLM(hf, row)
        except (AttributeError, TypeError):
            continue
        if lm.parts['embed'].weight.is_meta:  # there are no numbers to compare
            return lm
        try:
            with torch.no_grad(), in_float32(lm), exact_attention(lm):
                theirs, ours = logits_of_both(lm, min(64, lm.max_positions))
            fitting.append((difference(theirs, ours, float(theirs.abs().max())), row))
        except ModelError as e:
            failed = str(e)
    nearest = min(fitting, key=lambda fit: fit[0], default=(1.0, None))
    if nearest[0] <= EQUAL:
        return FrozenLM(hf, nearest[1])
    if failed and not fitting:
        raise ModelError(failed)
    raise unknown_family(hf.config.model_type)


def versions():
    """ What the result of a comparison depends on besides the LM: text. """
    from transformers import __version__
    with open(os.path.join(os.path.dirname(__file__), '..', 'lm.py'), 'rb') as f:
        own = hashlib.sha256(f.read()).hexdigest()[:8]
    return f'torch {torch.__version__}, transformers {__version__}, lm.py {own}'


def compare_once(lm, name, folder):
    """
    Compares `lm` (compare) unless `folder` remembers that this LM in this dtype was equal with
    these versions, and prints the result the first time. folder=None remembers nothing. Raises
    ModelError with the LM's name.
    """
    if lm.parts['embed'].weight.is_meta:
        return
    dtype = str(lm.parts['embed'].weight.dtype).removeprefix('torch.')
    path = None
    if folder is not None:
        config = {k: v for k, v in lm.hf.config.to_dict().items() if not k.startswith('_')}
        which = json.dumps([lm.fingerprint(), config, dtype, versions()], sort_keys=True, default=str)
        path = os.path.join(folder, hashlib.sha256(which.encode()).hexdigest()[:16] + '.json')
        if os.path.isfile(path):
            return
    try:
        result = compare(lm)
    except ModelError as e:
        raise ModelError(f"the LM {name!r} is refused: {e}") from None
    layers = '' if result['layers'] == lm.n_layers else f" on its first {result['layers']} layers"
    low = f", {result['ours']:.1g} in {dtype} (transformers {result['theirs']:.1g})" if 'ours' in result else ''
    print(f"LM {name}: our forward is that of transformers{layers}; largest difference of the "
          f"logits {result['float32']:.1g} of the largest in float32{low}")
    if path is not None:
        found = dict(lm=str(name), dtype=dtype, versions=versions()) | result
        try:
            os.makedirs(folder, exist_ok=True)
            write_text(path, json.dumps(found) + '\n')
        except OSError:   # a read-only or full disk; the next run compares again
            pass
