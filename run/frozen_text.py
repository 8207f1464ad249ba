"""
The hidden states of a corpus's texts by a frozen text model, computed once and kept in a file.

Axis letters: B texts of a batch, T text tokens, N texts, n tokens of all texts, D width.
"""
import hashlib
import json
import os

import numpy as np
import torch
import torch.nn as nn

from run.errors import ModelError
from run.fingerprints import fingerprint
from run.folder import check_regular, replacing, write_text
from run.json_files import read_json
from run.lm_checks import refuse_encoder_decoder
from run.load_lm import lm_config, load_weights, refuse_unknown_tokens

# families whose positions start at pad_token_id + 1
COUNT_FROM_PADDING = ('roberta', 'xlm-roberta', 'xlm-roberta-xl', 'camembert', 'longformer', 'mpnet',
                      'esm', 'data2vec-text', 'ibert', 'luke')


def width_of(config):
    """
    The width of an LM's hidden states, or ModelError: some have several, or project them behind the
    last layer.
    """
    width = getattr(config, 'hidden_size', None)
    if not width or getattr(config, 'word_embed_proj_dim', width) != width:
        raise ModelError(f"the LM family {config.model_type!r} does not say how wide its hidden "
                         "states are: take another --lm=.")
    return width


def positions_of(config):
    """
    The longest text in tokens that a model's configuration allows, or None where it does not say.
    RoBERTa and its kin count positions from behind their padding id.
    """
    n_positions = getattr(config, 'max_position_embeddings', None)
    if n_positions is None or config.model_type not in COUNT_FROM_PADDING:
        return n_positions
    return n_positions - config.pad_token_id - 1


def frozen_text(name, tokens, folder, remote=False, device='cpu', batch_size=64, as_data=False):
    """
    The last hidden states of any Hugging Face model for texts (lists of token ids), end to end, and
    the model's fingerprint. Computed once, and kept in `folder` as float16 [n, D], mapped and never
    read whole; n is all tokens of all texts. The file name is a hash of the texts and of the model's
    files or revision. Raises ModelError.
    """
    config, name = lm_config(name, remote, as_data)
    files = []
    if os.path.isdir(name):
        for entry in os.scandir(name):
            stat = entry.stat()
            files.append((entry.name, stat.st_size, stat.st_mtime_ns))
    place = os.path.abspath(name) if files else name
    which = json.dumps([place, sorted(files), getattr(config, '_commit_hash', None), tokens])
    path = os.path.join(folder, hashlib.sha256(which.encode()).hexdigest()[:16])
    shape = sum(map(len, tokens)), width_of(config)   # n, D
    stored = _stored_text(path, shape)
    if stored is None:
        _make_frozen_text(path, name, config, tokens, shape, remote, device, batch_size, as_data)
        stored = _stored_text(path, shape)
    return stored


def _stored_text(path, shape):
    """ What frozen_text returns, from its two files; None if one is missing or damaged. """
    try:
        made = read_json(path + '.json', dict(fingerprint=str))
    except ValueError:
        return None
    hidden = kept_array(path + '.npy', shape, np.float16)  # [n,D]
    return None if hidden is None else (hidden, made['fingerprint'])


def kept_array(path, shape, dtype):
    """ A memory map of a .npy file that was computed once, or None if it is missing or damaged. """
    try:
        check_regular(path)
        a = np.load(path, mmap_mode='r')
    except (OSError, ValueError, EOFError):
        return None
    return a if a.shape == shape and a.dtype == dtype else None


@torch.no_grad()
def _make_frozen_text(path, name, config, tokens, shape, remote, device, batch_size, as_data):
    """ Writes the hidden states to path.npy, and then to path.json which model they are of. """
    from transformers import AutoModel
    refuse_encoder_decoder(config, name)
    longest = max(map(len, tokens))
    n_positions = positions_of(config)
    if n_positions is not None and longest > n_positions:
        raise ModelError(f"a text of {longest} tokens is past the {n_positions} positions of "
                         f"{name!r}: lower max_text_len.")
    model = load_weights(AutoModel, name, config, remote, as_data, unused=('pooler.',))
    model = model.float().eval().to(device)
    rows = len(model.get_input_embeddings().weight)
    refuse_unknown_tokens(tokens, rows, "the corpus's texts")

    os.makedirs(os.path.dirname(path), exist_ok=True)
    start = np.cumsum([0] + [len(t) for t in tokens])  # [N+1]
    # written through the file, because writing to a memory map on a full disk kills the process
    with replacing(path + '.npy') as new, open(new, 'wb') as out:
        header = dict(descr='<f2', fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(out, header)
        begin, row = out.tell(), 2 * shape[1]   # bytes before the first row, and of a row
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        for i in range(0, len(order), batch_size):
            index = order[i:i + batch_size]
            texts = [torch.tensor(tokens[k]) for k in index]
            ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)  # [B,T]
            lengths = torch.tensor([len(tokens[k]) for k in index], device=device)  # [B]
            mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # [B,T]
            hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            hidden = hidden.half().cpu()  # [B,T,D]
            if not hidden[mask.cpu()].isfinite().all():
                raise ModelError(f"hidden states of {name!r} are past what float16 holds: take "
                                 "another LM for text_features='frozen'.")
            for k, x in zip(index, hidden):
                out.seek(begin + row * int(start[k]))
                out.write(x[:len(tokens[k])].numpy().astype('<f2').tobytes())
    write_text(path + '.json', json.dumps(dict(model=name, fingerprint=fingerprint(model))))
