"""
The system of a benchmark with a random text model, and its feed, for tools/bench.py.

k: the knobs of a benchmark, those of the run included; k['lm_shape'] is the shape of the text
model: layers, width, heads, vocabulary.
"""
import numpy as np
import torch

from data import Feed
from lm import FrozenLM, TextEncoder
from model import SYSTEMS, DeepMLF
from tools.random_clips import Words, random_lm

SIZES = dict(  # layers, width, heads, vocabulary of the random text model, by family
    llama=[8, 512, 8, 32000],
    gpt2=[12, 768, 12, 50257],       # GPT-2-base
    roberta=[12, 768, 12, 50265])    # RoBERTa-base


def family(cls):
    """ The family of the random text model for a class of systems, a key of SIZES. """
    if issubclass(cls, DeepMLF):
        return 'gpt2'
    return 'llama' if cls.frozen_lm else 'roberta'


class RandomFeed(Feed):
    """ A Feed on the CPU. Frozen hidden states of the texts are random, of this width. """
    def __init__(self, corpus, k, tokenizer, model):
        self.width = k['lm_shape'][1]
        super().__init__(corpus, k, tokenizer, 'cpu', model)

    def _read_frozen_features(self, as_data):
        rng = np.random.default_rng(1)
        for split, texts in self.tokens.items():
            self.text[split] = []   # [T_n,D] each
            for tokens in texts:
                hidden = rng.standard_normal((len(tokens), self.width), np.float32)
                self.text[split].append(hidden.astype('f2'))


def torch_dtype(k):
    """ The dtype of frozen weights and of autocast; dtype='auto' is float32 here. """
    return torch.bfloat16 if k['dtype'] == 'bfloat16' else torch.float32


def text_model(k):
    """
    The random text model of the system: a frozen LM with weights in the dtype of the benchmark, or
    an encoder in float32, as in train.py.
    """
    kind = family(SYSTEMS[k['system']])
    hf = random_lm(kind, *k['lm_shape'])
    if kind == 'roberta':
        return TextEncoder(hf)
    return FrozenLM(hf.to(torch_dtype(k)))


def build(k, corpus):
    """ The system with a random text model, and its tokenizer (None without text). """
    cls = SYSTEMS[k['system']]
    if 'text' not in cls.modalities_read(k):
        return cls.assemble(k, corpus, None, None), None
    tokenizer = Words(k['lm_shape'][-1])
    if cls.frozen_features(k):
        return cls.assemble(k, corpus, None, tokenizer, width=k['lm_shape'][1]), tokenizer
    return cls.assemble(k, corpus, text_model(k), tokenizer), tokenizer
