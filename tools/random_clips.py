"""
Random clips, texts, tokens and text models of real sizes, for tools/bench.py and
tools/gpu_check.py. Nothing is read from a file.
"""
import os
import pickle
import re
import time
import zlib

import numpy as np
import torch
import transformers

from corpora.convert import convert
from data import open_corpus

SHAPES = dict(  # most audio frames, audio width, most video frames, video width, largest label
    mosi=(375, 5, 500, 20, 3),
    simsv2=(925, 25, 232, 177, 1),
    mosei=(500, 74, 375, 35, 3),
    sims=(400, 33, 55, 709, 1))


class Words:
    """ A stand-in for a tokenizer: one token per word, per digit or punctuation mark, and per two
    Chinese characters. The token id is a checksum of the text. """
    eos_token_id, bos_token_id, pad_token_id, unk_token_id = 2, 1, None, 0

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.words = {}   # token id -> the set of words that it stood for

    def token(self, word):
        number = 10 + zlib.crc32(word.encode()) % (self.vocabulary - 10)
        self.words.setdefault(number, set()).add(word)
        return number

    def __call__(self, texts, truncation=False, max_length=None, **_):
        pattern = r'[A-Za-z]+|[\u4e00-\u9fff]{1,2}|[^\sA-Za-z]'
        limit = max_length if truncation else None
        ids = [[self.token(word) for word in re.findall(pattern, text)][:limit] for text in texts]
        return {'input_ids': ids}

    def decode(self, ids):
        return ' '.join(word for number in ids for word in self.words.get(number, ()))


def random_lm(kind, layers, width, heads, vocabulary):
    """ A random text model of this shape: kind is 'gpt2', 'llama' (FFW width over model width as in
    Llama-2) or 'roberta'. """
    torch.manual_seed(0)
    if kind == 'gpt2':
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads,
            bos_token_id=1, eos_token_id=2))
    if kind == 'roberta':
        return transformers.RobertaModel(transformers.RobertaConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * width,
            max_position_embeddings=514, type_vocab_size=1))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048))


def random_corpus(folder, n_clips, S_a, d_a, S_v, d_v, limit):
    """ A corpus of random clips, n_clips in train, valid and test, converted from an M-SENA pickle.
    Returns it and the MB/s of the conversion. """
    rng, source = np.random.default_rng(0), {}
    words = [''.join(rng.choice(list('abcdefghij'), 5)) for _ in range(3000)]
    probability = 1 / np.arange(1, len(words) + 1)  # [3000], Zipf's law
    probability = probability / probability.sum()
    for split, n in zip(('train', 'valid', 'test'), n_clips):
        n_words = rng.lognormal(np.log(15) - 0.18, 0.6, n)  # [N], mean 15
        n_words = np.clip(n_words, 1, 100).astype(int)
        source[split] = dict(
            raw_text=[' '.join(rng.choice(words, size, p=probability)) for size in n_words],
            regression_labels=rng.uniform(-limit, limit, n).round(1).astype('f4'))
        for m, S, d in (('audio', S_a, d_a), ('vision', S_v, d_v)):
            length = rng.integers(S // 4, S + 1, n)  # [N]
            real = np.arange(S) < length[:, None]  # [N,S]
            x = rng.standard_normal((n, S, d), np.float32) * real[..., None]  # [N,S,d]
            source[split] |= {m: x, m + '_lengths': length.tolist()}
    path = os.path.join(folder, 'random.pkl')
    with open(path, 'wb') as f:
        pickle.dump(source, f, protocol=4)
    since = time.perf_counter()
    convert(path, os.path.join(folder, 'random'), label_range=(-limit, limit))
    seconds = time.perf_counter() - since
    return open_corpus(os.path.join(folder, 'random')), os.path.getsize(path) / 1e6 / seconds
