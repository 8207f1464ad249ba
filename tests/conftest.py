""" Fixtures that several test files share. """

import os

import pytest
import torch

from corpora import toy
from data import open_corpus
from fakes import TINY, deepmlf, knobs_of_system, train
from model import LanguageModel
from prompts import PROMPTS, rated_texts
from run.load_lm import SentencePiece
from run.new_lm import new_lm


def pytest_addoption(parser):
    parser.addoption('--soak', action='store_true', help='run the long tests of damaged inputs')


@pytest.fixture(scope='session')
def corpora(tmp_path_factory):
    """ A data_dir with a toy corpus of 120 / 32 / 32 clips, otherwise made like the real one. """
    folder = tmp_path_factory.mktemp('data')
    toy.make_toy(str(folder / 'toy'), n_clips=(120, 32, 32))
    return folder


@pytest.fixture(scope='session')
def curriculum(corpora, tmp_path_factory):
    """
    A folder with finished runs of 11 steps each: lm_toy, av_toy, and whole, the DeepMLF run on
    both. None was interrupted, so killed and resumed runs can be compared with them.
    """
    out = tmp_path_factory.mktemp('out')
    train(
        'config/lm_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={out}/lm_toy',
        *TINY,
        '--lm_vocab=60',
    )
    train('config/av_toy.py', f'--data_dir={corpora}', f'--out_dir={out}/av_toy', *TINY)
    train(*deepmlf(corpora, out, 'whole'))
    return out


@pytest.fixture(scope='session')
def tokenizers(corpora, tmp_path_factory):
    """
    A byte-level BPE tokenizer (as of GPT-2, Qwen) and a sentencepiece one (as of old Llamas).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = open_corpus('toy', corpora)
    classes = ', '.join(f'{name}:{i}' for i, name in enumerate(corpus.labels['emotion']['names']))
    questions = [
        PROMPTS['en'][kind].format(low='-3.0', high='3.0', classes=classes)
        for kind in ('regression', 'classes')
    ]
    texts = rated_texts(corpus, 'train')
    for question in questions:
        for i in range(-30, 31):
            texts.append(f'<Multimodal> </Multimodal>{question} {i / 10:+.1f} {i / 10:.1f}')

    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=['<|end|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)

    folder = tmp_path_factory.mktemp('sp')
    k = knobs_of_system(
        LanguageModel,
        lm_positions=64,
        max_text_len=32,
        lm_width=8,
        lm_heads=2,
        lm_vocab=200,
        lm_layers=1,
        dropout=0.0,
    )
    new_lm(texts, k, str(folder))
    os.remove(folder / 'tokenizer.json')
    (folder / 'tokenizer_config.json').write_text('{"add_bos_token": true}')
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<|end|>')
    return dict(bpe=fast, sentencepiece=SentencePiece(str(folder)))


@pytest.fixture(scope='session')
def rated_lm(corpora, tokenizers, tmp_path_factory):
    """
    A folder with two LMs. lm: the toy LM trained on ratings, 11 steps. long: a random Llama with
    positions enough for the real prompts, and a byte-level tokenizer, which has tokens for Chinese.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp('rated')
    train(
        'config/lm_toy_rated.py',
        f'--data_dir={corpora}',
        f'--out_dir={out}/lm',
        *TINY,
        '--lm_vocab=200',
    )
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizers['bpe']),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    ).save_pretrained(out / 'long')
    tokenizers['bpe'].save_pretrained(out / 'long')
    return out
