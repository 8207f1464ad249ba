"""
The texts of a corpus, as a run reads them, and their tokens.
"""
from collections import deque
from contextlib import contextmanager

import numpy as np

from corpora.limits import most_bytes
from run.errors import ModelError

LONGEST_TOKEN = 1000   # characters: longer texts are cut to this for each token of max_text_len
PIECE = 1 << 20        # characters of the texts that are tokenised at a time


def lowercase_if_all_caps(texts, corpus):
    """
    The texts, in lower case if the train split is in capitals, as CMU-MOSI is: a cased tokenizer
    splits a word in capitals into many tokens.
    """
    return [t.lower() for t in texts] if corpus.meta['text']['upper_case'] else list(texts)


def texts_as_read(corpus, system, k, split):
    """
    The texts of a split as a run reads them. system: a System class; k: the run's knobs. Each text
    is cut to LONGEST_TOKEN characters per token of max_text_len, before it is tokenised.
    """
    longest = LONGEST_TOKEN * k['max_text_len']
    texts = [t[:longest] for t in system.texts(k, corpus, split)]
    if k['lowercase'] == 'auto':
        texts = lowercase_if_all_caps(texts, corpus)
    if k.get('context'):
        texts = with_context(texts, corpus.turns(split), k['context'], longest)
    return texts


def with_context(texts, turns, n, longest):
    """
    Each text behind the last n texts of its dialogue: a line each, which names the speaker. turns:
    (dialogue, speaker or None) of each text. longest: characters that are kept, the last ones,
    because the tokenizer keeps the end. Raises ModelError if all together are far longer than the
    texts: each text of a dialogue is repeated up to n times.
    """
    out, dialogues = [], {}
    most = left = most_bytes(sum(map(len, texts)))
    for text, (dialogue, speaker) in zip(texts, turns):
        lines = dialogues.setdefault(dialogue, deque())
        lines.append(f'{speaker}: {text}' if speaker else text)
        while len(lines) > n + 1 or sum(map(len, lines)) - len(lines[0]) >= longest:
            lines.popleft()   # it is before the characters that are kept
        out.append('\n'.join(lines)[-longest:])
        left -= len(out[-1])
        if left < 0:
            raise ModelError(f"With context={n} the texts of a split have more than {most:,} "
                             "characters, which is far more than the corpus has: lower this knob.")
    return out


@contextmanager
def truncating(tokenizer, keep='start'):
    """
    In this context the tokenizer keeps the start or the end of a long text, whatever its default
    is.
    """
    default = getattr(tokenizer, 'truncation_side', None)   # None: not a Hugging Face tokenizer
    if default is not None:
        tokenizer.truncation_side = 'right' if keep == 'start' else 'left'
    try:
        yield
    finally:
        if default is not None:
            tokenizer.truncation_side = default


def tokenize(tokenizer, texts, max_len, special=True, keep='start'):
    """
    Returns the token ids of each text (lists of at most max_len), the number of empty texts, and
    that of truncated texts, of which the start or the end is kept. special=True adds the
    tokenizer's own special tokens, such as <s>; False is for a text inside a prompt. A text without
    tokens becomes one end-of-text token, because models read the last token. Raises ModelError if
    max_len is too small.
    """
    ids, n_long = [], 0
    for piece in _pieces(texts):
        own = tokenizer(piece, add_special_tokens=special)['input_ids']
        long = [i for i, t in enumerate(own) if len(t) > max_len]
        n_long += len(long)
        if long:   # truncated by the tokenizer, which keeps a final [SEP] for the text head
            with truncating(tokenizer, keep):
                cut = tokenizer([piece[i] for i in long], add_special_tokens=special,
                                truncation=True, max_length=max_len)['input_ids']
            for i, t in zip(long, cut):
                own[i] = t
            longest = max(map(len, cut))
            if longest > max_len:   # transformers truncates nothing where special tokens lack room
                raise ModelError(f"max_text_len={max_len} has no room for the special tokens of "
                                 f"this tokenizer, which makes {longest} tokens of a text; raise "
                                 "this knob.")
        ids += own
    known = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    filler = next((t for t in known if t is not None and t >= 0), 0)
    n_empty = sum(not t or not text.strip() for t, text in zip(ids, texts))
    return [list(t) or [filler] for t in ids], n_empty, n_long


def _pieces(texts):
    """
    Lists of texts that are tokenised at a time. A tokenizer keeps about 100 bytes for each token
    until it returns, also for those that are cut.
    """
    piece, n = [], 0
    for text in texts:
        if piece and n + len(text) > PIECE:
            yield piece
            piece, n = [], 0
        piece.append(text)
        n += len(text)
    if piece:
        yield piece


def word_of_tokens(text, spans):
    """
    The number of the word (between spaces) that each token begins in, from the tokens' spans
    [start, end) in the text. -1 for a token that is empty or only space, as special tokens are.
    """
    starts = [not c.isspace() and (i == 0 or text[i - 1].isspace()) for i, c in enumerate(text)]
    number = np.cumsum(starts) - 1   # of the word at each character
    first = [next((i for i in range(a, b) if not text[i].isspace()), None) for a, b in spans]
    return [-1 if i is None else int(number[i]) for i in first]
