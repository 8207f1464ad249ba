"""
MSE-Adapter and CMPTA: pseudo tokens, prompts, the label trie, the three readouts, and classes.

    python -m pytest -q tests/test_prompts.py
"""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import data
import eval as evaluation
from adapters import CMPTA, Align, DirectedAttention, MSEAdapter
from corpora.convert import convert
from data import CorpusError, Feed, open_corpus
from fakes import (
    CMPTA_KNOBS,
    EVERY_LM,
    GOLDEN,
    HERE,
    MSE_KNOBS,
    LetterTokenizer,
    command,
    fingerprint,
    killed_in_batch,
    make_corpus,
    needs_golden,
    of_width,
    prompted,
    run_prompted,
    same_run,
    tiny_lm,
    train,
    without_checksums,
)
from lm import FrozenLM
from losses import label_loss
from model import CMPTALM
from prompts import Prompt
from run import machine
from run.errors import ModelError
from run.finished import read_predictions
from run.lm_compare import exact_attention
from run.load_lm import SentencePiece, load_lm
from tools.bench_plain import PlainPseudoTokens

# -------------------------------------------------------------------------------------------------
# MSE-Adapter


LSTMS, SCALES = dict(audio=64, vision=32), (8, 32, 16)   # the defaults of MSE-Adapter's knobs


@pytest.mark.parametrize(
    'D, audio, vision, P, n',
    [
        (4096, (74, 64), (35, 32), 4, 2_631_692),
        (4096, (25, 64), (177, 64), 4, 2_680_716),
        (4096, (64, 64), (64, 32), 4, 2_632_844),
        (4096, (1024, 32), (2048, 16), 4, 2_842_380),
        (2048, (74, 64), (35, 32), 4, 1_351_244),
        (2048, (25, 64), (177, 64), 4, 1_400_268),
        (2048, (64, 32), (64, 16), 2, 1_312_072),
        (2048, (1024, 32), (2048, 16), 4, 1_561_932),
    ],
)
def test_mse_adapter_has_as_many_weights_as_the_authors_logged(D, audio, vision, P, n):
    """
    MOSEI, SIMS-V2, MELD and CHERMA, on LMs of width 4096 (ChatGLM3, Llama-2-7B) and 2048
    (Qwen-1.8B). audio and vision: (width of the stream, width of its LSTM).
    """
    with torch.device('meta'):
        adapter = MSEAdapter(
            dict(audio=audio[0], vision=vision[0]),
            D,
            P,
            256,
            dict(audio=audio[1], vision=vision[1]),
            SCALES,
        )
    assert sum(p.numel() for p in adapter.parameters()) == n


def released_mse(z):
    """
    Our adapter with the weights in ../shared/golden/mse_adapter.npz, which the released code gave.
    """
    adapter = MSEAdapter(dict(audio=5, vision=7), 64, 4, 8, dict(audio=6, vision=4), SCALES)
    theirs = {}
    for s in ('audio', 'vision'):
        for ours, key in (
            ('weight_ih_l0', 'w_ih'),
            ('weight_hh_l0', 'w_hh'),
            ('bias_ih_l0', 'b_ih'),
            ('bias_hh_l0', 'b_hh'),
        ):
            theirs[f'lstm.{s}.{ours}'] = z[f'w.lstm_{s}.{key}']
        theirs |= {
            f'proj.{s}.weight': z[f'w.lstm_{s}.out'],
            f'proj.{s}.bias': z[f'w.lstm_{s}.out_b'],
        }
    for i in range(3):
        theirs |= {
            f'squeeze.{i}.weight': z[f'w.scale{i + 1}.in'],
            f'squeeze.{i}.bias': z[f'w.scale{i + 1}.in_b'],
            f'expand.{i}.weight': z[f'w.scale{i + 1}.out'],
            f'expand.{i}.bias': z[f'w.scale{i + 1}.out_b'],
        }
    theirs |= {
        'text_proj.weight': z['w.text_proj'],
        'text_proj.bias': z['w.text_proj_b'],
        'mix.weight': z['w.mix3'][None],
        'mix.bias': z['w.mix3_b'],
        'up.weight': z['w.up'],
        'up.bias': z['w.up_b'],
        'out.weight': z['w.expand'][:, None],
        'out.bias': z['w.expand_b'],
    }
    adapter.load_state_dict({k: torch.tensor(v) for k, v in theirs.items()})
    return adapter.eval()


@needs_golden
def test_mse_adapter_equals_the_releases():
    """
    The output of Text-Guide-Mixer and the pseudo tokens, to 1e-5. The release counts padding in the
    mean over text, so the mask is all True here.
    """
    z = np.load(GOLDEN / 'mse_adapter.npz')
    adapter = released_mse(z)

    def t(name):
        return torch.tensor(z['b3.' + name])

    batch = dict(
        audio=t('in_audio'),
        audio_len=t('len_audio'),
        vision=t('in_vision'),
        vision_len=t('len_vision'),
    )
    text, mask = t('in_text_embedding'), torch.ones(3, 6, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(
            adapter.text_guide_mixer(batch, text, mask), t('mid_mixed'), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            adapter(batch, text, mask), t('out_pseudo_tokens'), rtol=0, atol=1e-5
        )
        # a batch of one, where the release loses the batch axis
        one = {k: v[:1] for k, v in batch.items()}
        torch.testing.assert_close(
            adapter(one, text[:1], mask[:1]), t('out_pseudo_tokens')[:1], rtol=0, atol=1e-5
        )


def test_released_pseudo_tokens_have_rank_two_and_full_ones_full_rank():
    torch.manual_seed(0)
    batch = dict(
        audio=torch.randn(2, 9, 5),
        audio_len=torch.tensor([9, 4]),
        vision=torch.randn(2, 6, 7),
        vision_len=torch.tensor([6, 0]),
    )
    text, mask = torch.randn(2, 5, 64), torch.ones(2, 5, dtype=torch.bool)

    def rank(projection):
        adapter = MSEAdapter(dict(audio=5, vision=7), 64, 6, 16, LSTMS, SCALES, projection)
        tokens = adapter(batch, text, mask).detach()  # [B,P,D]
        return torch.linalg.matrix_rank(tokens, tol=1e-5).tolist()

    assert rank('released') == [2, 2] and rank('full') == [6, 6]
    full = MSEAdapter(dict(audio=5, vision=7), 64, 6, 16, LSTMS, SCALES, 'full', embed_rms=0.02)
    rms = full(batch, text, mask).pow(2).mean(-1).sqrt()  # [B,P]
    torch.testing.assert_close(rms, torch.full((2, 6), 0.02), rtol=1e-3, atol=0)


# -------------------------------------------------------------------------------------------------
# CMPTA


def test_alignment_equals_a_packed_bilstm():
    """
    Reversing each clip within its own length equals torch's packed bidirectional LSTM on the real
    steps.
    """
    torch.manual_seed(0)
    align, x, n = Align(5, 8, dropout=0.0), torch.randn(3, 7, 5), torch.tensor([7, 4, 1])
    both = nn.LSTM(5, 4, batch_first=True, bidirectional=True)
    both.load_state_dict(
        {k: v for k, v in align.ahead.state_dict().items()}
        | {k + '_reverse': v for k, v in align.back.state_dict().items()}
    )
    h, _ = pad_packed_sequence(
        both(pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False))[0],
        batch_first=True,
    )
    theirs, real = align.norm(align.proj(h)), torch.arange(7) < n[:, None]
    torch.testing.assert_close(align(x, n)[real], theirs[real], rtol=0, atol=1e-6)
    assert Align(5, 8, 'one-way').back is None and Align(5, 8, 'off').ahead is None


@pytest.mark.parametrize('pool', ['mean', 'last', 'learned'])
@pytest.mark.parametrize('n_heads', [1, 3])
def test_directed_attention_equals_torchs_attention_pooled(pool, n_heads):
    """
    A token equals torch's attention output, pooled over the steps of x, although ours projects to
    values last. attention_weights equals torch's weights, pooled.
    """
    torch.manual_seed(0)
    a = DirectedAttention(6, n_heads, pool, dropout=0.0)
    x = torch.randn(2, 5, 6)
    y = torch.randn(2, 4, 6)
    x_mask = torch.arange(5) < torch.tensor([[5], [3]])
    y_mask = torch.arange(4) < torch.tensor([[2], [4]])
    weights = a.attention_weights(x, x_mask, y, y_mask).mean(1)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert (weights[~y_mask] == 0).all()
    theirs = nn.MultiheadAttention(6, n_heads, batch_first=True)
    theirs.load_state_dict(
        dict(
            in_proj_weight=torch.cat([a.q_proj.weight, a.kv_proj.weight]),
            in_proj_bias=torch.cat([a.q_proj.bias, a.kv_proj.bias]),
            **{f'out_proj.{k}': v for k, v in a.out_proj.state_dict().items()},
        )
    )
    outputs, their_weights = theirs(x, y, y, key_padding_mask=~y_mask)  # [B,L,d], [B,L,M]
    pooled = a.pool_weights(x, x_mask)[:, None]  # [B,1,L]
    token = a(x, x_mask, y, y_mask)  # [B,d]
    torch.testing.assert_close(token, (pooled @ outputs)[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(weights, (pooled @ their_weights)[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    'n_pseudo, knobs',
    [
        (6, {}),
        (5, {}),
        (8, {}),
        (1, {}),
        (2, dict(attend=False)),
        (6, dict(align='one-way')),
        (6, dict(align='off')),
        (6, dict(attend=False)),
        (6, dict(align_text=False)),
        (6, dict(pool='last')),
    ],
)
def test_cmpta_uses_every_weight_and_ignores_padding(n_pseudo, knobs):
    """
    For all settings of the ablations, with a clip without audio and one without video: the output
    is finite, every weight has a gradient, attention weights sum to 1 on real steps, and garbage in
    the padding changes nothing.
    """
    torch.manual_seed(0)
    cmpta = CMPTA(dict(audio=5, vision=7), 16, n_pseudo, d=8, n_heads=2, n_layers=1, **knobs)
    batch = dict(
        audio=torch.randn(3, 9, 5),
        audio_len=torch.tensor([9, 4, 0]),
        vision=torch.randn(3, 6, 7),
        vision_len=torch.tensor([6, 0, 3]),
    )
    for s in ('audio', 'vision'):
        batch[s] *= (torch.arange(batch[s].shape[1]) < batch[s + '_len'][:, None])[..., None]
    text, mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([[5], [2], [1]])
    out = cmpta(batch, text, mask)
    assert out.shape == (3, n_pseudo, 16) and out.isfinite().all()
    (out * torch.randn_like(out)).mean().backward()
    idle = [n for n, p in cmpta.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert idle == []  # with few tokens, streams that no token reads have no weights
    if not knobs and n_pseudo > 4:
        directions = [
            'text_from_vision',
            'text_from_audio',
            'vision_from_text',
            'vision_from_audio',
            'audio_from_text',
            'audio_from_vision',
        ]
        assert list(cmpta.directed) == directions[:n_pseudo]
    lengths = {s: batch[s + '_len'].clamp(min=1) for s in ('audio', 'vision')}
    lengths['text'] = mask.sum(1)
    if knobs.get('attend', True):  # the weights that figures show
        for name, weights in cmpta.eval().attention(batch, text, mask).items():
            n = lengths[name.split('_from_')[1]]  # [B]
            real = torch.arange(weights.shape[1]) < n[:, None]  # [B,S]
            torch.testing.assert_close(weights.sum(1), torch.ones(3))
            assert (weights[~real] == 0).all()
    garbage = {}
    for s in ('audio', 'vision'):
        padding = torch.arange(batch[s].shape[1]) >= lengths[s][:, None]  # [B,S]
        garbage[s] = batch[s] + 99.0 * padding[..., None]
    torch.testing.assert_close(
        cmpta(batch | garbage, text + 99.0 * ~mask[..., None], mask), out, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize('align', ['bi', 'one-way', 'off'])
def test_cmpta_recomputed_has_the_same_gradients_and_dropout(align):
    """ recompute=True gives the gradients bit for bit, and keeps fewer bytes for the backward pass. """
    batch = dict(audio=torch.randn(3, 40, 5), audio_len=torch.tensor([40, 7, 0]))
    text, mask = torch.randn(3, 6, 16), torch.arange(6) < torch.tensor([[6], [2], [1]])
    gradients, kept = {}, {}
    for recompute in (False, True):
        torch.manual_seed(0)
        cmpta = CMPTA(dict(audio=5), 16, 6, d=8, n_heads=2, n_layers=1, align=align, dropout=0.3,
                      recompute=recompute)
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = cmpta(batch, text, mask)
        kept[recompute] = sum(storage.nbytes() for storage in storages.values())
        out.square().sum().backward()
        gradients[recompute] = {n: p.grad for n, p in cmpta.named_parameters()}
    assert kept[True] < (0.9 if align == 'off' else 0.25) * kept[False]  # LSTMs alone: 0.29
    for name, gradient in gradients[False].items():
        assert torch.equal(gradient, gradients[True][name]), name


@pytest.mark.parametrize('knobs', [
    dict(base=MSE_KNOBS),
    dict(base=CMPTA_KNOBS, checkpoint_adapter=False),
    dict(base=CMPTA_KNOBS, checkpoint_adapter=True),
])
def test_the_plain_way_of_the_benchmark_recomputes_nothing(corpora, tokenizers, knobs):
    model, _, _ = prompted(corpora, tokenizers, 'bpe', 'llama', **knobs)
    parts = [part for part in model.adapter.modules() if hasattr(part, 'recompute')]
    assert len(parts) == (7 if knobs['base'] is CMPTA_KNOBS else 0)  # 3 streams, 4 directions
    for plain in (True, False, True):
        PlainPseudoTokens.use_plain_parts(model, plain)
        again = not plain and knobs.get('checkpoint_adapter')
        assert all(part.recompute == again for part in parts)


def test_only_a_bilstm_halves_the_width_of_cmpta():
    with pytest.raises(ValueError, match='cmpta_width=15 must be even'):
        CMPTA(dict(audio=5), 16, 6, d=15, n_heads=3, n_layers=1)
    cmpta = CMPTA(dict(audio=5), 16, 6, d=15, n_heads=3, n_layers=1, align='off')
    assert cmpta.up.in_features == 15


def test_learned_tokens_replace_the_directions_of_a_missing_modality():
    cmpta = CMPTA(dict(audio=5), 16, 6, d=8, n_heads=2, n_layers=1)
    assert list(cmpta.directed) == ['text_from_audio', 'audio_from_text']
    assert cmpta.more_tokens.shape == (4, 8)
    assert list(MSEAdapter(dict(vision=5), 16, 4, 8, LSTMS, SCALES).lstm) == ['vision']


# -------------------------------------------------------------------------------------------------
# The prompt and the labels


def test_prompts_and_label_strings(tokenizers, corpora):
    info = open_corpus('toy', corpora).labels
    p = Prompt(MSE_KNOBS, info['label'], tokenizers['bpe'])
    assert len(p.labels) == 61
    assert p.labels[0] == '-3.0'
    assert p.labels[30] == '0.0'
    assert p.labels[-1] == '3.0'
    assert tokenizers['bpe'].decode(p.after + p.answers[3]).endswith('The sentiment is -2.7')
    assert p.before == tokenizers['bpe']('<Multimodal>')['input_ids']
    plus = Prompt(MSE_KNOBS | dict(label_plus=True), info['label'], tokenizers['bpe'])
    assert plus.labels[29:32] == ['-0.1', '+0.0', '+0.1']
    assert len({len(a) for a in plus.answers}) == 1
    small = Prompt(MSE_KNOBS, dict(kind='regression', range=[-1, 1]), tokenizers['bpe'])
    assert len(small.labels) == 21
    emotion = Prompt(MSE_KNOBS, info['emotion'], tokenizers['bpe'])
    assert emotion.labels == list('01234')
    question = tokenizers['bpe'].decode(emotion.after)
    assert '<anger:0, sadness:1, neutral:2, contentment:3, joy:4>' in question
    by_name = Prompt(MSE_KNOBS | dict(label_words='name'), info['emotion'], tokenizers['bpe'])
    assert by_name.labels == info['emotion']['names']
    sp = Prompt(MSE_KNOBS, info['label'], tokenizers['sentencepiece'])
    # <s> stands at the start only
    assert sp.before[0] == 1 and sp.answers[0] not in ([], sp.answers[1])
    assert 1 not in sp.before[1:] + sp.after
    positive = Prompt(MSE_KNOBS, dict(kind='regression', range=[0, 0.95]), tokenizers['bpe'])
    assert positive.labels[-1] == '0.9'
    # a range whose ends are no multiples of 0.1
    between = Prompt(MSE_KNOBS, dict(kind='regression', range=[-1.05, 1.05]), tokenizers['bpe'])
    labels = [between.labels[k] for k in between.index(torch.tensor([-1.05, 0.1, 1.0]))]
    assert labels == ['-1.0', '0.1', '1.0']
    started = Prompt(MSE_KNOBS | dict(prompt_start='<|end|>'), info['label'], tokenizers['bpe'])
    assert started.before == [tokenizers['bpe'].eos_token_id] + p.before
    y = torch.tensor([-3.0, -0.04, 0.04, 0.3333, 3.0])
    assert [p.labels[k] for k in p.index(y)] == ['-3.0', '0.0', '0.0', '0.3', '3.0']


def test_labels_with_ambiguous_tokens_are_refused():
    def names(*names):
        return dict(kind='classes', names=list(names))

    by_name = MSE_KNOBS | dict(label_words='name')
    with pytest.raises(ModelError, match="'joy' is the beginning of 'joyful'.*label_eos=True"):
        Prompt(by_name, names('joy', 'joyful'), LetterTokenizer())
    with pytest.raises(ModelError, match="'1' is the beginning of '10'"):
        Prompt(MSE_KNOBS, names(*(str(i) for i in range(11))), LetterTokenizer())
    with pytest.raises(ModelError, match="same tokens of the labels 'ab' and 'cd'"):
        Prompt(by_name, names('ab', 'cd'), LetterTokenizer(known='xyz '))
    with pytest.raises(ModelError, match='has none'):
        Prompt(MSE_KNOBS | dict(label_eos=True), names('joy', 'anger'), LetterTokenizer())

    class LetterTokenizerWithEnd(LetterTokenizer):
        eos_token_id = 7

    p = Prompt(by_name | dict(label_eos=True), names('joy', 'joyful'), LetterTokenizerWithEnd())
    assert [ids[-1] for ids in p.answers] == [7, 7] and p.pad_id == 7
    assert Prompt(by_name, names('joy', 'anger'), LetterTokenizer()).before == [
        ord(ch) for ch in '<Multimodal>'
    ]


def test_a_sentencepiece_model_without_bos_and_eos_adds_no_token(tmp_path):
    """
    Sentencepiece then gives -1 as their ids, which is no token: nothing is put before a text, and
    label_eos is refused.
    """
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the film was good -0.1 2.3 4.5 6.7 8.9 <Multimodal>'] * 9),
        model_prefix=str(tmp_path / 'tokenizer'),
        vocab_size=45,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = SentencePiece(str(tmp_path))
    assert min(tokenizer(['the film'])['input_ids'][0]) >= 0
    assert tokenizer.eos_token_id is tokenizer.bos_token_id is None
    with pytest.raises(ModelError, match='has none'):
        Prompt(
            MSE_KNOBS | dict(label_eos=True),
            dict(kind='classes', names=['film', 'good']),
            tokenizer,
        )


@pytest.mark.parametrize(
    'text, number',
    [
        (' -0.6', -0.6),
        ('+1.25', 1.2),
        ('2', 2.0),
        ('66.3', 3.0),
        (' –0.4 and', -0.4),
        ('-\n3.2', -3.0),
        ('good', None),
        ('', None),
        ('.5', None),
    ],
)
def test_generated_numbers_are_parsed_and_clamped(text, number):
    p = Prompt(MSE_KNOBS, dict(kind='regression', range=[-3, 3]), LetterTokenizer())
    assert p.parse_answer([ord(ch) for ch in text]) == number


def test_generated_classes_are_parsed():
    p = Prompt(
        MSE_KNOBS | dict(label_words='name', label_eos=True),
        dict(kind='classes', names=['joy', 'joyful', 'anger']),
        type('T', (LetterTokenizer,), dict(eos_token_id=7))(),
    )

    def parse(text):
        return p.parse_answer([ord(ch) for ch in text])

    texts = ['joy\7anger', 'joyful', ' anger.', 'fear']
    assert [parse(text) for text in texts] == [0, 1, 2, None]


# -------------------------------------------------------------------------------------------------
# The readouts


def brute_force(model, batch, k):
    """
    log p of label k after each clip's prompt -> [B], with teacher forcing through Hugging Face's
    own forward, one clip at a time.
    """
    x, n = model.embed_prompt(batch)
    ids, out = model.prompt.answers[k], []
    for b in range(len(x)):
        embeds = torch.cat([x[b, : n[b]], model.lm.embed(torch.tensor(ids))])[None]
        if not model.lm.embed_multiplies:
            embeds = embeds / model.lm.embed_scale  # transformers scales what it is given
        logp = model.lm.hf(inputs_embeds=embeds).logits[0].log_softmax(-1)
        out.append(sum(logp[n[b] - 1 + j, t] for j, t in enumerate(ids)))
    return torch.stack(out)


@pytest.mark.parametrize(
    'kind, family',
    [
        ('bpe', 'gpt2'),
        ('bpe', 'qwen2'),
        ('sentencepiece', 'llama'),
        ('sentencepiece', 'gpt2'),
        ('bpe', 'glm'),
    ],
)
@pytest.mark.parametrize(
    'knobs',
    [
        dict(),
        dict(label='emotion'),
        dict(label='emotion', label_words='name', label_eos=True),
        dict(label_plus=True, label_eos=True),
    ],
)
@torch.no_grad()
def test_label_scores_equal_brute_force_log_probabilities(
    kind, family, knobs, corpora, tokenizers
):
    """ One pass over the label trie equals one pass of Hugging Face's forward for each label. """
    model, _, batch = prompted(corpora, tokenizers, kind, family, **knobs)
    scores = model.label_scores(*model.embed_prompt(batch))
    wanted = torch.stack([brute_force(model, batch, k) for k in range(len(model.prompt.labels))], 1)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=2e-4)
    out = model.predict({k: v for k, v in batch.items() if k != 'label'})
    torch.testing.assert_close(out['prob'], wanted.softmax(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('family', [f for f in EVERY_LM if f not in ('opt', 'phi3:long')])
@torch.no_grad()
def test_scores_are_brute_force_log_probabilities_on_every_family(family, corpora, tokenizers):
    """ (OPT's table of positions and the long rope are for 128 and 64 tokens here: too short.) """
    model, _, batch = prompted(corpora, tokenizers, 'bpe', family, clips=(0, 1))
    scores = model.label_scores(*model.embed_prompt(batch))  # [B,K]
    for k in (0, 30, 60):
        with exact_attention(model.lm):
            wanted = brute_force(model, batch, k)  # [B]
        torch.testing.assert_close(scores[:, k], wanted, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize('family', ['gpt2', 'gemma2', 'granite'])
@torch.no_grad()
def test_scores_over_labels_alone_are_constrained_decoding(family, corpora, tokenizers):
    """
    With score_over='labels' each token is chosen among those that continue a label, so the
    probabilities of all labels sum to 1 by themselves.
    """
    model, _, batch = prompted(corpora, tokenizers, 'bpe', family, score_over='labels', label_eos=True)
    x, n = model.embed_prompt(batch)
    scores = model.label_scores(x, n)  # [B,K]
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(x)), rtol=0, atol=1e-4)

    answers, k = [tuple(ids) for ids in model.prompt.answers], 17
    wanted = 0.0
    for j, token in enumerate(answers[k]):
        prefix = answers[k][:j]
        choices = sorted({ids[j] for ids in answers if ids[:j] == prefix and len(ids) > j})
        embeds = torch.cat([x[0, : n[0]], model.lm.embed(torch.tensor(prefix, dtype=torch.long))])
        place, rope = model.lm.place(embeds[None], torch.arange(len(embeds))[None])
        for l in range(model.lm.n_layers):
            place, _ = model.lm.block(l, place, rope)
        logits = model.lm.lm_head(model.lm.final_norm(place))[0, -1, choices]
        wanted += logits.log_softmax(-1)[choices.index(token)]
    torch.testing.assert_close(scores[0, k], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_score_estimates_are_mean_mode_and_median(corpora, tokenizers):
    model, _, batch = prompted(corpora, tokenizers)
    prob = model.predict(batch)['prob']
    values = torch.arange(-30, 31) / 10
    for estimate, pred in (
        ('expected', prob @ values),
        ('mode', values[prob.argmax(1)]),
        ('median', torch.stack([values[(p.cumsum(0) >= 0.5).nonzero()[0, 0]] for p in prob])),
    ):
        model.k['score_estimate'] = estimate
        torch.testing.assert_close(model.predict(batch)['pred'], pred, rtol=0, atol=1e-5)


@pytest.mark.parametrize('kind, family', [('bpe', 'gpt2'), ('sentencepiece', 'llama')])
@torch.no_grad()
def test_generated_answers_equal_hugging_faces(kind, family, corpora, tokenizers):
    """
    generate(inputs_embeds) returned a dummy first column in some versions of transformers and none
    in others. MSE-Adapter's release strips one column, so with the others it loses the first token
    of every answer. Ours are the last tokens of what this version generates, the first one
    included.
    """
    model, _, batch = prompted(corpora, tokenizers, kind, family, readout='generate')
    x, n = model.embed_prompt(batch)
    ours = model.lm.go_on(x[:, :-1], n - 1, model.trie_token[:1].expand(3), 4)
    for b in range(3):
        theirs = model.lm.hf.generate(
            inputs_embeds=x[b : b + 1, : n[b]],
            attention_mask=torch.ones(1, int(n[b])),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert ours[b].tolist() == theirs[0, -4:].tolist()
        logits = model.lm.hf(inputs_embeds=x[b : b + 1, : n[b]]).logits[0, -1]
        assert ours[b, 0] == logits.argmax()
    # the answers '-2.3', '-2.7' and one that is no label
    model.lm.go_on = lambda *a: torch.tensor(
        [model.prompt.answers[7], model.prompt.answers[3], ours[0].tolist()]
    )
    out = model.predict(batch)
    torch.testing.assert_close(out['pred'], torch.tensor([-2.3, -2.7, 0.0]))
    assert out['unread'].tolist() == [0, 0, 1]


def test_label_loss_equals_hugging_faces_on_label_tokens(corpora, tokenizers):
    """
    The release's loss: the mean over label tokens, all others ignored, each clip without padding.
    The gradients are the same with checkpoint_lm.
    """
    model, _, batch = prompted(corpora, tokenizers, 'bpe', 'llama')
    x, n = model.embed_prompt(batch)
    total, count = 0.0, 0
    for b, k in enumerate(model.prompt.index(batch['label'])):
        ids = torch.tensor(model.prompt.answers[k])
        labels = torch.cat([torch.full((int(n[b]),), -100), ids])[None]
        loss = model.lm.hf(
            inputs_embeds=torch.cat([x[b, : n[b]], model.lm.embed(ids)])[None], labels=labels
        ).loss
        total, count = total + loss * len(ids), count + len(ids)
    gradients = {}
    for recompute in (False, True):
        model.zero_grad()
        model.k['checkpoint_lm'] = recompute
        out = model(batch)
        torch.testing.assert_close(out['loss'], total / count, rtol=1e-5, atol=1e-5)
        out['loss'].backward()
        gradients[recompute] = {k: p.grad.clone() for k, p in model.adapter.named_parameters()}
    for k in gradients[True]:
        torch.testing.assert_close(gradients[True][k], gradients[False][k], rtol=1e-4, atol=1e-7)
    hidden = torch.randn(2, 3, 32)
    answer = torch.randint(60, (2, 3))
    real = torch.tensor([[True, True, True], [True, False, False]])
    head = nn.Linear(32, 60)
    torch.testing.assert_close(
        label_loss(hidden, answer, real, head, 0.5),
        0.5 * F.cross_entropy(head(hidden)[real], answer[real]),
    )


@torch.no_grad()
@pytest.mark.parametrize(
    'knobs',
    [
        dict(),
        dict(readout='generate'),
        dict(readout='head'),
        dict(base=CMPTA_KNOBS, n_pseudo=6),
        dict(label='emotion', readout='head'),
    ],
)
def test_predictions_do_not_depend_on_the_batch(knobs, corpora, tokenizers):
    """
    A batch of one equals a padded batch with prompts of different lengths. predict reads no label.
    """
    model, feed, batch = prompted(
        corpora, tokenizers, 'sentencepiece', 'llama', clips=(5, 9, 30), **knobs
    )
    assert len(set(batch['text_len'].tolist())) > 1
    together = model.predict({k: v for k, v in batch.items() if k != 'label'})
    if knobs.get('readout') == 'generate':

        def answers(batch):
            """ The token ids, because an untrained LM's answers all parse to the same default. """
            x, n = model.embed_prompt(batch)
            first = model.trie_token[:1].expand(len(x))  # [B]
            return dict(answer=model.lm.go_on(x[:, :-1], n - 1, first, 4))

        model.predict = answers
        together = model.predict(batch)
    for i, clip in enumerate((5, 9, 30)):
        alone = model.predict(feed('test', np.array([clip])))
        for k in together:
            torch.testing.assert_close(alone[k][0], together[k][i], rtol=0, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    'knobs',
    [
        dict(),
        dict(mse_tgm=False),
        dict(mse_msf=False),
        dict(pseudo_projection='full'),
        dict(readout='head'),
        dict(label='emotion', readout='head'),
        dict(tgm_pool='padded'),
        dict(base=CMPTA_KNOBS, n_pseudo=7),
        dict(base=CMPTA_KNOBS, n_pseudo=6, cmpta_pool='learned'),
    ],
)
def test_two_steps_change_every_trainable_weight_and_no_frozen_one(
    knobs, dtype, corpora, tokenizers
):
    """
    After an evaluation and two steps, every weight of the adapter, query and head has a gradient
    and a new value, and the LM has the same bits.
    """
    model, feed, _ = prompted(corpora, tokenizers, **knobs)
    model.lm.to(dtype)
    before = fingerprint(model.lm)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for g in model.param_groups() for p in g['params']], lr=1e-2)

    def autocast():
        return torch.autocast('cpu', torch.bfloat16, enabled=dtype is torch.bfloat16)

    with torch.no_grad(), autocast():
        model.predict(feed('test', np.arange(4)))
    model.train()
    for step in range(2):
        optimizer.zero_grad()
        with autocast():
            loss = model(feed('train', np.arange(8) + 8 * step))['loss']
        loss.backward()
        optimizer.step()
    unchanged = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad
        and (p.grad is None or p.grad.abs().sum() == 0 or torch.equal(p, start[n]))
    ]
    # softmax cancels the biases of keys and of pooling scores
    assert [n for n in unchanged if not n.endswith(('kv_proj.bias', 'score.bias'))] == []
    assert fingerprint(model.lm) == before and all(p.grad is None for p in model.lm.parameters())


@torch.no_grad()
def test_tgm_pool_padded_counts_padding_in_the_text_mean(corpora, tokenizers):
    """ The mean is over max_text_len positions, where padding is the embedded padding token. """
    model, _, batch = prompted(corpora, tokenizers, tgm_pool='padded')
    inputs = []

    def adapter(batch, text, mask):
        inputs.append((text, mask))
        return torch.zeros(3, 4, 32)

    model.adapter.forward = adapter
    model.embed_prompt(batch)
    (text, mask), first = inputs[0], len(model.prompt.before) + 4
    assert text.shape[1] == 48 and mask.all()
    for b in range(3):
        own = batch['tokens'][b, first : batch['text_len'][b] - len(model.prompt.after)]
        # padding on the left, as in the release: the mean is the same
        ids = F.pad(own, (48 - len(own), 0), value=model.prompt.pad_id)
        torch.testing.assert_close(text[b].mean(0), model.lm.embed(ids).mean(0))


def test_a_prompt_past_the_lms_positions_is_refused(corpora, tokenizers):
    with pytest.raises(ModelError, match='past the 256 positions of this LM: lower max_text_len'):
        prompted(corpora, tokenizers, max_text_len=250)


@torch.no_grad()
def test_a_control_that_predicts_nan_is_left_out_with_a_sentence(
        corpora, tokenizers, monkeypatch, capsys):
    """
    The LM alone may predict NaN where the trained system does not. The run still ends with a
    report.
    """
    model, feed, _ = prompted(corpora, tokenizers)
    assert set(evaluation.evaluate_controls(model, feed)) == {'the LM alone (text)'}
    predict = model.predict

    def nan_without_adapter(batch, adapter=True):
        out = predict(batch, adapter)
        return out if adapter else {name: v * math.nan for name, v in out.items()}

    monkeypatch.setattr(model, 'predict', nan_without_adapter)
    evaluation.evaluate(model, feed, 'test')
    assert evaluation.evaluate_controls(model, feed) == {}
    assert 'the LM alone (text): pred of clip' in capsys.readouterr().out


@torch.no_grad()
def test_nan_logits_give_nan_predictions_which_stop_the_evaluation(corpora, tokenizers):
    """ An LM may give NaN in float16. argmax would make class 0 of it. """
    for knobs in (dict(), dict(label='emotion'), dict(readout='generate')):
        model, feed, batch = prompted(corpora, tokenizers, **knobs)
        model.lm.part(1, 'down').weight.mul_(math.inf)
        assert model.predict(batch)['pred'].isnan().all()
        with pytest.raises(ValueError, match=r'pred of clip .* is NaN or inf \(32 of 32 clips\)'):
            evaluation.evaluate(model, feed, 'test')


def test_a_float16_lm_predicts_and_trains_on_the_cpu(corpora, tokenizers):
    """ Predictions are near the float32 ones, and gradients are finite and float32. """
    model, _, batch = prompted(corpora, tokenizers, 'bpe', 'llama')
    with torch.no_grad():
        full = model.predict(batch)['pred']
    model.lm.half()
    with torch.autocast('cpu', torch.float16):
        with torch.no_grad():
            half = model.predict(batch)['pred']
        loss = model(batch)['loss']
    (loss * 1024).backward()
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.adapter.parameters()
    )


# -------------------------------------------------------------------------------------------------
# LMs

REMOTE = '''
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig): model_type = 'odd'
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
    {change}
'''


FLIPPED = '''def forward(self, *a, **k):
        out = super().forward(*a, **k)
        out.logits = out.logits.flip(-1)
        return out'''


@pytest.mark.parametrize('change, known', [('', True), (FLIPPED, False)])
def test_remote_code_needs_permission_and_the_logits_of_a_known_family(
    change, known, tmp_path, tokenizers, monkeypatch
):
    """
    An LM whose code lies in its folder is refused by default. If the code is allowed, the LM has
    the parts of a Llama and must compute a Llama's logits.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(
        'transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path / 'modules')
    )
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    hf.save_pretrained(tmp_path / 'odd')
    tokenizers['bpe'].save_pretrained(tmp_path / 'odd')
    (tmp_path / 'odd' / 'odd.py').write_text(REMOTE.format(change=change))
    path = tmp_path / 'odd' / 'config.json'
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | dict(
                model_type='odd',
                architectures=['OddForCausalLM'],
                auto_map={
                    'AutoConfig': 'odd.OddConfig',
                    'AutoModelForCausalLM': 'odd.OddForCausalLM',
                },
            )
        )
    )
    with pytest.raises(ModelError, match='could not be loaded'):
        load_lm(str(tmp_path / 'odd'))
    if known:
        lm, _ = load_lm(str(tmp_path / 'odd'), remote=True)
        tokens = torch.arange(20)[None]
        torch.testing.assert_close(lm.lm_head(lm(tokens)), lm.hf(tokens).logits, rtol=0, atol=1e-5)
    else:
        with pytest.raises(ModelError, match="'odd' is not known here: known are"):
            load_lm(str(tmp_path / 'odd'), remote=True)


@torch.no_grad()
@pytest.mark.parametrize('family', EVERY_LM)
def test_go_on_equals_hugging_faces_greedy_decoding(family):
    hf = tiny_lm(family)
    lm, ids = FrozenLM(hf), torch.randint(3, 60, (1, 7))
    new = lm.go_on(lm.embed(ids[:, :-1]), torch.tensor([6]), ids[:, -1], 5)
    with exact_attention(lm):
        theirs = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert new.tolist() == theirs[:, 7:].tolist()


# -------------------------------------------------------------------------------------------------
# Whole runs


@pytest.mark.parametrize('config', ['mse_toy', 'mse_toy_emotion', 'cmpta_toy', 'cmpta_toy_emotion'])
def test_runs_end_to_end_and_the_lm_keeps_its_abilities(config, rated_lm, corpora):
    """
    Train, report, and evaluate again from the files. Without the adapter the LM generates the same
    tokens as before training.
    """
    r = run_prompted(rated_lm, corpora, config, config)
    folder = rated_lm / config
    assert r['lm_kept'] is True
    assert r['controls']['the LM alone (text)']
    assert 'as it did before training, token for token' in (folder / 'report.md').read_text()
    classes = 'emotion' in config
    assert (folder / 'confusion.png').exists() == classes and ('wf1' in r['test']) == classes
    ids, p = read_predictions(str(folder))
    assert p['prob'].shape == (32, 5 if classes else 61)
    assert np.allclose(p['prob'].sum(1), 1, atol=1e-3)
    table = evaluation.evaluate_again(str(folder))
    assert 'the LM alone (text)' in table and 'best possible' in table
    assert json.load(open(folder / 'result.json'))['test'] == r['test']
    assert not any(k.startswith('lm.') for k in load_file(folder / 'best.safetensors'))
    best = load_file(rated_lm / 'lm' / 'best.safetensors')
    now = load_file(rated_lm / 'lm' / 'hf' / 'model.safetensors')
    assert len(now) > 40 and all(torch.equal(v, best['hf.' + k]) for k, v in now.items())
    if config == 'cmpta_toy':  # the attention of a trained run, as figures get it
        corpus, k = open_corpus('toy', corpora), r['about']['knobs']
        model, tokenizer = CMPTALM.build(k, corpus, str(folder))
        feed = Feed(corpus, k, tokenizer, 'cpu', model)
        assert model.eval().attention(feed('test', np.arange(4)))['text_from_vision'].shape[0] == 4
        views = model.views(feed('test', np.array([0])), None)
        for weights, *_ in views.values():  # of the clip's own tokens and frames, without padding
            assert torch.allclose(weights.sum(1), torch.ones(2), atol=1e-4) and weights.gt(0).all()


def test_runs_with_the_readouts_generate_and_head(rated_lm, corpora):
    r = run_prompted(rated_lm, corpora, 'generated', 'mse_toy', '--readout=generate')
    assert 0 <= r['test']['unread'] <= 1
    assert 'no label' in (rated_lm / 'generated' / 'report.md').read_text()
    r = run_prompted(rated_lm, corpora, 'head', 'mse_toy_emotion', '--readout=head')
    assert r['controls'] == {} and r['test']['acc'] >= 0
    table = evaluation.compare([str(rated_lm / 'head')])
    assert '(n=1)' in table and 'wf1' in table


def test_micro_batches_equal_one_large_batch_with_labels_of_unequal_length(
    rated_lm, corpora, monkeypatch
):
    """
    '-0.5' has more tokens than '0.5', so the loss must be the mean over the label tokens of the
    whole step, not the mean of the micro-batches' means.
    """

    def in_file_order(cost, batch_size, seed, epoch):
        if epoch is None:
            return [np.arange(len(cost))]
        return [np.arange(40)[i : i + batch_size] for i in range(0, 40, batch_size)]

    monkeypatch.setattr(data, 'epoch_order', in_file_order)
    logs = []
    for name, shape in (
        ('micro', ['--batch_size=16', '--accumulate=3']),
        ('big', ['--batch_size=40', '--accumulate=1']),
    ):
        run_prompted(
            rated_lm,
            corpora,
            name,
            'mse_toy',
            *shape,
            '--grad_clip=0',
            '--max_steps=2',
            '--log_interval=1',
        )
        logs.append(
            [json.loads(line) for line in open(rated_lm / name / 'log.jsonl') if 'train' in line]
        )
    for a, b in zip(*logs):
        assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)
        assert a['train'] == pytest.approx(b['train'], rel=1e-4)


@pytest.mark.parametrize(
    'config, flag, sentence',
    [
        ('mse_toy', '--label_words=words', 'is none of index, name'),
        (
            'mse_toy',
            '--select=wf1',
            "select='wf1' is no metric of 'label': choose one of acc2_non0",
        ),
        (
            'mse_toy',
            '--label=emotion',
            "select='mae' is no metric of 'emotion': choose one of acc, wf1",
        ),
        ('mse_toy', '--train_fraction=0', r'train_fraction=0.0 must be in \(0, 1\]'),
        ('mse_toy', '--max_text_len=126', 'past the 128 positions'),
        ('cmpta_toy', '--cmpta_heads=5', 'does not divide cmpta_width'),
        ('mse_toy', '--msf_scales=[]', 'must be numbers of at least 1'),
        ('mse_toy', '--prompt=fr', 'prompt=fr must be en, cn, toy or the path of a JSON file'),
        ('mse_toy', '--lm=no/such-lm', 'is not in the local cache'),
        ('mse_toy', '--label=label_T', "has no label 'label_T', only label, emotion"),
    ],
)
def test_bad_knobs_are_refused_with_a_sentence(config, flag, sentence, rated_lm, corpora):
    with pytest.raises(SystemExit, match=sentence):
        run_prompted(rated_lm, corpora, 'refused', config, flag)
    assert not (rated_lm / 'refused').exists()


def test_a_range_without_an_answer_is_refused(tokenizers):
    with pytest.raises(ModelError, match=r'no multiple of 0.1 is in the label.s range \[0.61, 0.69\]'):
        Prompt(MSE_KNOBS, dict(kind='regression', range=[0.61, 0.69]), tokenizers['bpe'])


def test_few_shot_subsets_are_stratified_and_seeded(corpora, tokenizers):
    knobs = dict(label='emotion', train_fraction=0.25)
    model, a, _ = prompted(corpora, tokenizers, **knobs)
    corpus, k = a.corpus, model.k
    b, other = (
        Feed(corpus, k | dict(seed=seed), tokenizers['bpe'], 'cpu', model) for seed in (0, 1)
    )
    y = corpus.label('train', 'emotion')
    assert np.array_equal(a.clips['train'], b.clips['train'])
    assert not np.array_equal(a.clips['train'], other.clips['train'])
    assert a.n_clips == dict(train=len(a.clips['train']), valid=32, test=32)
    assert len(a.cost('train')) == a.n_clips['train']
    for kind in range(5):
        assert (y[a.clips['train']] == kind).sum() == max(1, round(0.25 * (y == kind).sum()))
    batch = a('train', np.arange(3))
    assert batch['label'].tolist() == y[a.clips['train'][:3]].tolist()
    assert batch['index'].tolist() == a.clips['train'][:3].tolist()


def test_cmpta_is_trained_by_text_and_evaluated_by_tokens_and_frames(corpora, tokenizers):
    model, feed, _ = prompted(corpora, tokenizers)
    tokens, frames = {}, {}
    for split in ('train', 'valid'):
        tokens[split] = np.array([len(ids) for ids in feed.tokens[split]])
        frames[split] = sum(feed.corpus.lengths(split, m) for m in ('audio', 'vision'))
    assert not model.evaluates_by_frames
    assert np.array_equal(feed.cost('valid'), 10_000 * tokens['valid'] + frames['valid'])
    feed.model = CMPTALM
    assert np.array_equal(feed.cost('train'), 10_000 * tokens['train'] + frames['train'])
    assert np.array_equal(feed.cost('valid'), tokens['valid'] + frames['valid'])


def test_labels_outside_the_range_or_the_classes_are_refused(corpora, tokenizers, tmp_path):
    """ In a corpus folder that was edited by hand: the conversion itself refuses such labels. """
    shutil.copytree(corpora / 'toy', tmp_path / 'toy')
    without_checksums(tmp_path / 'toy')
    for label, value, sentence in (
        ('label', 4.5, r'The label of clip test\$_\$3 .* is 4.5, outside \[-3.0, 3.0\]'),
        ('emotion', 5, r'is 5, outside \[0, 4\]'),
    ):
        path = tmp_path / 'toy' / 'test' / f'{label}.npy'
        y = np.load(path)
        y[3] = value
        np.save(path, y)
        with pytest.raises(CorpusError, match=sentence):
            prompted(tmp_path, tokenizers, label=label)


def list_corpus(tmp_path, name, classes, d_a, d_v, n=(40, 16, 16), **more):
    """ A folder of NAME_train.pkl, .. in the layout of MELD, CHERMA and IEMOCAP. """
    rng, folder = np.random.default_rng(0), tmp_path / name
    folder.mkdir()
    for split, N in zip(('train', 'valid', 'test'), n):
        clips = [
            dict(
                label=classes[i % len(classes)],
                features=dict(
                    text='so it is' if i else '',
                    audio=rng.normal(size=(6, d_a)).astype('f4'),
                    video=rng.normal(size=(4, d_v)).astype('f4'),
                    audio_len=6 - i % 3,
                    video_len=4,
                ),
                **more,
            )
            for i in range(N)
        ]
        pickle.dump(clips, open(folder / f'{name.lower()}_{split}.pkl', 'wb'), protocol=4)
    return folder


MELD = ['neutral', 'surprise', 'fear', 'sadness', 'joy', 'disgust', 'anger']
CHERMA = ['愤怒', '厌恶', '恐惧', '高兴', '平静', '悲伤', '惊奇']
IEMOCAP = ['hap', 'sad', 'neu', 'ang', 'exc', 'fru']


@pytest.mark.parametrize(
    'config',
    sorted(
        p.stem
        for p in (HERE / 'config').glob('*.py')
        if p.stem.startswith(('mse_', 'cmpta_')) and 'toy' not in p.stem
    ),
)
def test_real_configs_run_on_files_of_their_layout(config, rated_lm, tmp_path):
    """
    Each config with the widths and classes of its corpus, two steps on a tiny LM. CHERMA is float16
    on disk, as its config says.
    """

    if 'meld' in config:
        more = dict(speaker='Joey', dialogue='12')
        corpus = f"--corpus={list_corpus(tmp_path, 'MELD', MELD, 64, 64, **more)}"
    elif 'iemocap' in config:
        corpus = f"--corpus={list_corpus(tmp_path, 'IEMOCAP', IEMOCAP, 64, 64)}"
    elif 'cherma' in config:
        convert(
            str(list_corpus(tmp_path, 'CHERMA0723', CHERMA, 1024, 2048)),
            str(tmp_path / 'cherma'),
            'float16',
        )
        corpus = f'--corpus={tmp_path}/cherma'
    else:
        d_a, d_v, limit = (74, 35, 3) if 'mosei' in config else (25, 177, 1)
        change = dict(
            audio=of_width(d_a),
            vision=of_width(d_v),
            vision_lengths=lambda s, x: [6] * len(x),
            regression_labels=lambda s, y: y * limit / 3,
        )
        corpus = make_corpus(tmp_path, 'unaligned_50', **change)
    train(
        f'config/{config}.py',
        corpus,
        f'--lm={rated_lm}/long',
        f'--out_dir={tmp_path}/run',
        f'--data_dir={tmp_path}/data',
        '--max_steps=2',
        '--device=cpu',
        '--lm_depth=0',
        *['--cmpta_width=64'] * config.startswith('cmpta_'),
    )
    result = json.load(open(tmp_path / 'run' / 'result.json'))
    own = {k: v for k, v in result['test'].items() if k in ('mae', 'acc', 'wf1')}
    assert result['lm_kept']
    assert own
    assert np.isfinite(list(own.values())).all()
    assert result['about']['knobs']['system'] in config
    if 'meld' in config:
        (texts,) = (tmp_path / 'data').glob('*/test/text.jsonl')
        row = json.loads(texts.read_text(encoding='utf-8').splitlines()[0])
        assert row['speaker'] == 'Joey'
        assert row['dialogue'] == '12'
        assert result['info']['names'] == MELD
    if 'cherma' in config:
        assert result['info']['names'] == CHERMA


@pytest.mark.parametrize('config', ['mse_toy', 'cmpta_toy_emotion'])
def test_a_resumed_run_equals_an_uninterrupted_one(config, rated_lm, corpora):
    """
    With LSTMs, dropout (CMPTA) and classes: the same bits after a kill in step 4 and a resume.
    """
    run_prompted(rated_lm, corpora, f'whole_{config}', config, '--save_interval=2')
    with killed_in_batch(4):
        run_prompted(rated_lm, corpora, f'killed_{config}', config, '--save_interval=2')
    run_prompted(rated_lm, corpora, f'killed_{config}', config, '--save_interval=2', '--resume=True')
    same_run(rated_lm / f'whole_{config}', rated_lm / f'killed_{config}')


def test_a_clip_without_frames_is_predicted_and_drawn(rated_lm, corpora, tmp_path, monkeypatch, capsys):
    run_prompted(rated_lm, corpora, 'cmpta_words', 'cmpta_toy')
    monkeypatch.chdir(tmp_path)
    command('eval.py', rated_lm / 'cmpta_words', '--text=good film')
    out = capsys.readouterr().out
    assert 'without text' in out and 'without audio' not in out


def test_a_resumed_run_keeps_the_dtype_of_its_checkpoint(rated_lm, corpora):
    """ dtype='auto' chooses for a new run alone: a resumed one gives the same bits. """
    more = ['--save_interval=1', '--max_steps=3']
    run_prompted(rated_lm, corpora, 'whole_bf16', 'mse_toy', *more, '--dtype=bfloat16')
    with killed_in_batch(3):
        run_prompted(rated_lm, corpora, 'killed_bf16', 'mse_toy', *more, '--dtype=bfloat16')
    r = run_prompted(rated_lm, corpora, 'killed_bf16', 'mse_toy', *more, '--resume=True')
    assert r['about']['dtype'] == 'bfloat16'
    same_run(rated_lm / 'whole_bf16', rated_lm / 'killed_bf16')


def test_an_lm_too_large_for_float32_is_loaded_in_bfloat16(rated_lm, corpora, monkeypatch, capsys):
    monkeypatch.setattr(machine, 'memory', lambda device: 1e6)  # bytes
    r = run_prompted(rated_lm, corpora, 'large', 'mse_toy')
    assert r['about']['dtype'] == 'bfloat16'
    assert 'too large for the memory of this machine: bfloat16' in capsys.readouterr().out


def test_prerequisites_of_few_shot_runs_are_few_shot_runs(corpora, tmp_path):
    """ The toy LM must not be trained on the ratings of clips that the run leaves out. """
    train(
        'config/mse_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={tmp_path}/run',
        '--train_fraction=0.5',
        '--max_steps=2',
        '--device=cpu',
    )
    for folder in ('run', 'lm_toy_rated-steps2-train0.5'):
        assert json.load(open(tmp_path / folder / 'result.json'))['clips']['train'] in range(55, 66)


def test_without_the_clips_words_the_prompt_is_the_same_for_every_clip(corpora, tokenizers):
    model, feed, batch = prompted(corpora, tokenizers, clip_words=False)
    assert len({tuple(row) for row in feed.tokens['test']}) == 1
    for row in batch['tokens'].tolist()[1:]:
        assert row == batch['tokens'][0].tolist()
    predicted = model.eval().predict(batch)['pred']
    assert len(predicted.unique()) > 1  # from audio and video
    assert len({tuple(row) for row in prompted(corpora, tokenizers)[1].tokens['test']}) > 1
