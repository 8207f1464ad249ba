"""
The blocks, the losses, DeepMLF and the configurator. Each test checks one property.

    python -m pytest -q test_smoke.py
"""

import fnmatch
import itertools
import math
import os
import shlex
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn as nn

import configurator
import metrics
from adapters import AVEncoder, LoRA, MMBlock, augment_embeddings, masked_mean, pool_frames, seqaug
from configurator import (
    AtLeast,
    Share,
    class_knobs,
    configure,
    declared_knobs,
    known_knobs,
    run_knobs,
)
from data import tokenize
from fakes import (
    HERE,
    KNOBS,
    PARENT,
    clip_alone,
    command,
    knobs_of_system,
    random_flags,
    script_knobs,
    tiny_batch,
    tiny_deepmlf,
    tiny_lm,
)
from lm import FrozenLM
from losses import (
    UNITS,
    deepmlf_loss,
    lm_loss,
    ordinal_notes,
    ramp,
    summed_cross_entropy,
    units_note,
)
from model import SYSTEMS, AVModel
from run.errors import ModelError
from run.load_lm import load_lm
from system import System

# -------------------------------------------------------------------------------------------------
# Blocks


def test_lora_starts_as_the_frozen_layer_and_merges_into_a_copy():
    """
    B = 0, so the output equals W x bit for bit. The first gradient is zero on A and not on B.
    merge() does not change W.
    """
    W, lora, x = nn.Linear(8, 6), LoRA(8, 6, rank=2, alpha=4), torch.randn(3, 8)
    assert torch.equal(lora(x, W), W(x))
    lora(x, W).sum().backward()
    assert lora.A.grad.abs().sum() == 0 and lora.B.grad.abs().sum() > 0
    assert lora.A.abs().max() <= 1 / math.sqrt(8)
    nn.init.normal_(lora.B)
    before = W.weight.detach().clone()
    merged = nn.Linear(8, 6)
    merged.load_state_dict({'weight': lora.merge(W.weight), 'bias': W.bias})
    torch.testing.assert_close(merged(x), lora(x, W))
    assert torch.equal(W.weight, before)


def test_lora_has_float32_weights_on_a_bf16_layer():
    W, lora = nn.Linear(8, 6).bfloat16(), LoRA(8, 6, 2, 4)
    assert lora(torch.randn(3, 8).bfloat16(), W).dtype == torch.bfloat16
    assert lora.A.dtype == torch.float32


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
@pytest.mark.parametrize('ffw', ['full', 'lora'])
def test_mm_ffw_starts_as_the_lms_own(family, ffw):
    """
    With the weights, biases, activation and norm copied, the FFW of an MM block first computes what
    the LM block's FFW computes.
    """
    lm = FrozenLM(tiny_lm(family))
    block = MMBlock(
        32, 12, lm.norms_of_ffw(1), lm.ffw(1), 4, ffw=ffw, lora_rank=8, lora_alpha=16
    )
    x = torch.randn(2, 5, 32)
    wanted = lm.part(1, 'ffw')(lm.part(1, 'norm_2')(x))
    ours = block.ffw(block.norm_2(x), lm.ffw(1))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    fresh = MMBlock(32, 12, lm.norms_of_ffw(1), lm.ffw(1), 4, ffw_init='random')
    assert not torch.allclose(fresh.ffw(fresh.norm_2(x), lm.ffw(1)), wanted, atol=1e-2)


def test_gates_start_at_a_half_at_zero_or_at_one():
    """ sigmoid starts at 1/2; tanh at 0, so that the block changes nothing; none is 1. """
    lm, z, m = FrozenLM(tiny_lm()), torch.randn(2, 6, 12), torch.ones(2, 6, dtype=torch.bool)
    x_t, x_f = torch.randn(2, 5, 32), torch.randn(2, 4, 32)

    def block(gate):
        return MMBlock(32, 12, lm.norms_of_ffw(1), lm.ffw(1), 4, gate=gate)

    assert [g.item() for g in block('sigmoid').gates()] == [0.5, 0.5]
    new_t, new_f = block('tanh')(x_t, x_f, z, m, lm.ffw(1))
    assert torch.equal(new_t, x_t) and torch.equal(new_f, x_f)
    assert block('none').gates() == [1.0, 1.0]


def test_seqaug_permutes_real_steps_of_chosen_dimensions():
    """
    Each dimension of a clip keeps its values, padding stays, the chosen dimensions share one order,
    and rate 0 is the identity.
    """
    torch.manual_seed(0)
    x, lengths = torch.randn(6, 10, 40), torch.tensor([10, 10, 7, 3, 1, 0])
    y = seqaug(x, lengths, rate=0.5)
    for b, n in enumerate(lengths):
        assert torch.equal(y[b, n:], x[b, n:])
        torch.testing.assert_close(y[b, :n].sort(0).values, x[b, :n].sort(0).values, rtol=0, atol=0)
    chosen = [d for d in range(40) if not torch.equal(x[0, :, d], y[0, :, d])]
    assert 8 < len(chosen) < 32
    orders = {tuple((x[0, :, d] == y[0, t, d]).nonzero().item() for t in range(10)) for d in chosen}
    assert len(orders) == 1
    assert torch.equal(seqaug(x, lengths, rate=0.0), x)
    assert torch.equal(seqaug(x, lengths, 0.5, p_apply=0.0), x)
    for draw in ('beta', 'halfnormal'):
        assert seqaug(x, lengths, 0.3, draw=draw).shape == x.shape


def test_augment_embeddings_with_noise_dropout_and_none():
    x, n = torch.ones(4, 5, 200), torch.full((4,), 5)
    assert torch.equal(augment_embeddings(x, n, 'none', 0.3, 1, 'fixed'), x)
    for scale in (1, 5):   # the noise is relative to the embeddings
        noise = augment_embeddings(scale * x, n, 'noise', 0.1, 1, 'fixed') - scale * x
        assert 0.08 * scale < float(noise.std()) < 0.12 * scale
    dropped = augment_embeddings(x, n, 'dropout', 0.3, 1, 'fixed') == 0
    assert 0.2 < float(dropped.float().mean()) < 0.4


def test_pool_frames_by_hand():
    """
    6 frames into 3 slots: means of neighbours. 5 into 2: frames [0,3) and [2,5). 2 into 3: repeats.
    No frames: zeros.
    """
    x = torch.arange(6.0)[None, :, None].repeat(4, 1, 1)
    y = pool_frames(x, torch.tensor([6, 5, 2, 0]), torch.tensor([3, 2, 3, 1]), 3)[..., 0]
    assert y.tolist() == [[0.5, 2.5, 4.5], [1.0, 3.0, 0.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]


def test_av_encoder_ignores_padding_and_accepts_empty_streams():
    """
    More padding, or garbage in it, changes nothing, and a batch of one equals a padded batch.
    """
    torch.manual_seed(0)
    encoder, batch = AVEncoder(dict(audio=5, vision=7), 12, 2, 3, av_len=9).eval(), tiny_batch()
    z, mask = encoder(batch)
    assert z.shape == (3, 9, 12) and mask.sum(1).tolist() == [9, 9, 3] and z.isfinite().all()
    padded = dict(batch)
    for s in ('audio', 'vision'):
        garbage = torch.where(batch[s + '_mask'][..., None], batch[s], torch.tensor(1e3))
        padded[s] = torch.cat([garbage, torch.full((3, 5, batch[s].shape[2]), -1e3)], 1)
    torch.testing.assert_close(encoder(padded)[0][mask], z[mask], rtol=0, atol=1e-5)
    alone = {k: v[2:3] for k, v in batch.items()}
    torch.testing.assert_close(encoder(alone)[0][0, :3], z[2, :3], rtol=0, atol=1e-5)


def test_masked_mean_of_real_positions_and_of_none():
    x, mask = torch.arange(6.0).view(1, 3, 2), torch.tensor([[True, True, False]])
    assert masked_mean(x, mask).tolist() == [[1.0, 2.0]]
    assert masked_mean(x, mask & False).tolist() == [[0.0, 0.0]]


# -------------------------------------------------------------------------------------------------
# Losses


def test_lm_loss_is_the_mean_over_real_targets():
    """
    Equals plain cross-entropy with ignored padding, in one chunk and in several, and so do the
    gradients.
    """
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 60, bias=False), torch.randn(3, 9, 8, requires_grad=True)
    batch = tiny_batch()
    target = batch['tokens'][:, 1:].masked_fill(~batch['text_mask'][:, 1:], -100)
    plain = nn.functional.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, 60), target.reshape(-1), ignore_index=-100
    )
    (g,) = torch.autograd.grad(plain, hidden)
    # with a frozen head the gradient is computed in the forward pass
    for chunk, trained in itertools.product((1024, 4), (True, False)):
        ours = lm_loss(hidden, batch, head.requires_grad_(trained), chunk)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(torch.autograd.grad(ours, hidden)[0], g)
    x = torch.randn(9, 8, requires_grad=True)
    y = torch.tensor([5, -100, 7, 0, -100, 59, 3, -100, 2])
    plain_sum = nn.functional.cross_entropy(head(x), y, reduction='sum')
    # rows with -100 are skipped
    ours = summed_cross_entropy(x, y, head.requires_grad_(False), chunk=4)
    torch.testing.assert_close(ours, plain_sum)
    (plain_g,) = torch.autograd.grad(plain_sum, x)
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], plain_g)
    assert lm_loss(hidden, batch | dict(targets=batch['targets'][:0]), head).item() == 0.0
    torch.testing.assert_close(lm_loss(hidden, batch | dict(lm_weight=0.5), head), plain / 2)


def test_deepmlf_loss_by_hand():
    """
    y = (1, -1): the task head is off by (1, 0), av by (2, 2), text by (0, 1), so the loss is .5 +
    .8 * 2 + .5 * .5 = 2.35. A head with weight 0 gives no term.
    """
    y, t = torch.tensor([1.0, -1.0]), torch.tensor
    terms, loss = deepmlf_loss(
        dict(pred=t([0.0, -1.0]), av=t([3.0, 1.0]), text=t([1.0, -2.0]), fusion=t([9.0, 9.0])),
        y,
        dict(av=0.8, text=0.5, fusion=0.0),
    )
    assert {k: float(v) for k, v in terms.items()} == dict(task=0.5, av=2.0, text=0.5)
    assert float(loss) == pytest.approx(2.35)


# -------------------------------------------------------------------------------------------------
# DeepMLF


def test_training_names_the_unit_of_each_loss_term():
    score, classes = dict(kind='regression'), dict(kind='classes')
    note = units_note(['task', 'loss', 'lm', 'av'], SYSTEMS['deepmlf'].units, score)
    units = "av, task in label units; lm in nats per token; loss is their weighted sum"
    assert note == f"loss terms: {units}"
    assert units_note(['label'], UNITS, classes) == (
        "loss terms: label in nats per token of the answer"
    )
    assert 'task in nats per clip' in units_note(['task', 'loss'], SYSTEMS['mse'].units, classes)
    assert 'diff in a scale of its own; task in squared label units' in units_note(
        ['task', 'diff'], SYSTEMS['misa'].units, score
    )


def test_a_learning_rate_that_rises_after_warm_up_is_said():
    k = knobs_of_system(SYSTEMS['av'], system='av', lr=1e-6, lr_min=1e-5)
    labels = np.array([-3.0, 3.0])
    assert SYSTEMS['av'].run_notes(k, labels, n_epochs=10) == [
        'lr_min=1e-05 is above lr=1e-06, so the learning rate rises after warm-up']
    assert SYSTEMS['av'].run_notes(k | dict(lr=1e-5), labels, n_epochs=10) == []


def test_a_warm_up_that_outlasts_the_run_is_said():
    k = knobs_of_system(SYSTEMS['av'], system='av', warmup_epochs=3.0, lr=0.01)
    labels = np.array([-3.0, 3.0])
    (note,) = SYSTEMS['av'].run_notes(k, labels, n_epochs=2.5)
    assert note == (
        'warmup_epochs=3 ends after the run: the learning rate never gets to lr=0.01')
    assert SYSTEMS['av'].run_notes(k, labels, n_epochs=3) == []


@pytest.mark.parametrize('changes, row', [
    (dict(), 'audio+video only (y_av)'),
    (dict(modalities=['audio']), 'audio only (y_av)'),
    (dict(modalities=[]), None),
    (dict(shuffle_streams=True), None),
])
def test_the_row_of_the_av_head_names_the_streams_that_it_reads(changes, row):
    k = knobs_of_system(SYSTEMS['deepmlf'], system='deepmlf') | changes
    rows = SYSTEMS['deepmlf'].readings(k, dict(av=[], text=[]))
    assert list(rows) == ['text only (y_t)'] + [row] * (row is not None)


def test_an_lm_that_reads_no_words_is_no_control():
    k = knobs_of_system(SYSTEMS['mse'], system='mse')
    assert list(SYSTEMS['mse'].controls(k)) == ['the LM alone (text)']
    assert SYSTEMS['mse'].controls(k | dict(clip_words=False)) == {}


def test_training_says_that_the_regularisers_are_off_in_the_first_epoch():
    k = dict(
        weight_mpr=0.1, weight_eioi=0.0, ramp_epochs=5.0, mpr_gap=0.5, mpr_margin=0.1, mpr_slope=0.5
    )
    labels = np.array([-3.0, 3.0])
    (note,) = ordinal_notes(k, labels, n_epochs=20)
    assert note.startswith('weight_mpr rises from 0') and 'in the first epoch it is 0' in note
    assert ramp(k, dict(epoch=torch.tensor(0))) == 0 < ramp(k, dict(epoch=torch.tensor(1)))
    (note,) = ordinal_notes(k | dict(weight_eioi=0.1), labels, n_epochs=20)
    assert note.startswith('weight_mpr and weight_eioi rise from 0')
    assert ordinal_notes(k | dict(ramp_epochs=0.0), labels, n_epochs=20) == []
    assert ordinal_notes(k | dict(weight_mpr=0.0), labels, n_epochs=20) == []


def test_text_never_depends_on_audio_or_video():
    model, batch = tiny_deepmlf().eval(), tiny_batch()
    other = batch | dict(
        audio=torch.randn_like(batch['audio']), vision=torch.randn_like(batch['vision'])
    )
    a, b = model.predict(batch), model.predict(other)
    assert torch.equal(a['text'], b['text'])
    assert all((a[k] != b[k]).any() for k in ('pred', 'av', 'fusion'))
    model = tiny_deepmlf(mm_query='text').eval()
    assert (model.predict(batch)['text'] != model.predict(other)['text']).any()


def test_no_graph_for_text_below_the_first_mm_block():
    """
    With mm_layers = [2, 3], text leaves LM layers 1 and 2 without a graph and layer 3 with one.
    Fusion tokens always have one.
    """
    model, batch, calls = tiny_deepmlf(), tiny_batch(), []
    block = model.lm.block

    def recorded(l, x, rope, **k):
        y, kv = block(l, x, rope, **k)
        calls.append(('fusion' if 'past' in k else 'text', l + 1, y.requires_grad))
        return y, kv

    model.lm.block = recorded
    model(batch)
    assert [call for call in calls if call[0] == 'text'] == [
        ('text', 1, False),
        ('text', 2, False),
        ('text', 3, True),
    ]
    assert all(graph for stream, _, graph in calls if stream == 'fusion')


def test_predictions_do_not_depend_on_the_batch():
    """ A batch of one equals the clip in a padded batch. predict reads no label. """
    model, batch = tiny_deepmlf('llama').eval(), tiny_batch()
    together = model.predict({k: v for k, v in batch.items() if k != 'label'})
    for i in range(3):
        for k, alone in model.predict(clip_alone(batch, i)).items():
            torch.testing.assert_close(alone[0], together[k][i], rtol=0, atol=1e-5)


def test_lm_loss_reaches_only_the_ffw_side_of_mm_blocks():
    """
    The LM loss gives a gradient to the FFW, norm_2 and the second gate, and none to the attention,
    the fusion tokens or the AV encoder.
    """
    model = tiny_deepmlf()
    x_t, *_ = model.streams_through_lm(tiny_batch())
    lm_loss(x_t, tiny_batch(), model.lm.lm_head).backward()
    reached = {
        n.split('.', 2)[-1].split('.')[0]
        for n, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == {'ffw', 'norm_2', 'a_2'}


def test_bf16_rounds_neither_predictions_nor_raw_features():
    """
    The release validates under bf16 autocast, so its predictions near 1 are multiples of 1/128.
    """
    model, batch = tiny_deepmlf().eval(), tiny_batch()
    model.lm.bfloat16()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        out = model.predict(batch)
    assert all(y.dtype == torch.float32 and (y != y.bfloat16().float()).any() for y in out.values())
    alone = AVModel(model.av_encoder, KNOBS).eval()
    z, y = model.av_encoder(batch)[0], alone.predict(batch)['pred']
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(model.av_encoder(batch)[0], z)
        assert torch.equal(alone.predict(batch)['pred'], y)


def test_the_tokenizer_cuts_long_texts_and_empty_ones_get_a_token(tmp_path):
    """
    A BERT tokenizer, which Chinese GPT-2 uses, keeps its [SEP] when it cuts a text. This matters
    because the text head reads the last token.
    """
    from transformers import BertTokenizerFast

    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdef']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / 'vocab.txt'))
    ids, n_empty, n_cut = tokenize(tokenizer, ['a b', 'a b c d e f'], max_len=5)
    assert [(t[0], t[-1], len(t)) for t in ids] == [(2, 3, 4), (2, 3, 5)]
    assert (n_empty, n_cut) == (0, 1)

    class LetterTokenizer:  # adds no special tokens, as GPT-2's
        eos_token_id, bos_token_id, pad_token_id = 9, None, None

        def __call__(self, texts, truncation=False, max_length=None, **_):
            return {'input_ids': [[ord(ch) for ch in t][:max_length] for t in texts]}

    assert tokenize(LetterTokenizer(), ['', 'abc'], max_len=2) == ([[9], [97, 98]], 1, 1)


def test_decay_groups_hold_every_trainable_weight_once():
    model = tiny_deepmlf()
    decay, flat = model.param_groups()
    names = decay['names'] + flat['names']
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert 'fusion_tokens' in flat['names']
    assert 'mm_blocks.2.a_1' in flat['names']
    assert all('norm' not in n and 'bias' not in n for n in decay['names'])


@pytest.mark.parametrize(
    'knobs, sentence',
    [
        (dict(mm_layers=[0, 2]), 'from 1 to 3'),
        (dict(mm_layers=[4]), 'from 1 to 3'),
        (dict(mm_layers=[]), 'from 1 to 3'),
        (dict(mm_layers=[2, 2]), 'different numbers'),
        (dict(max_text_len=126), 'positions'),
    ],
)
def test_impossible_models_are_refused_with_a_sentence(knobs, sentence):
    with pytest.raises(ModelError, match=sentence):
        tiny_deepmlf(**knobs)


def test_unknown_family_and_missing_lm_are_refused_with_a_sentence(tmp_path):
    hf = tiny_lm()
    hf.config.model_type = 'mamba'
    hf.transformer.h[0].mixer = hf.transformer.h[0].attn
    del hf.transformer.h[0].attn
    with pytest.raises(ModelError, match="'mamba' is not known here: known are gpt2"):
        FrozenLM(hf)
    with pytest.raises(ModelError, match="could not be loaded .* takes the Hugging Face name"):
        load_lm(str(tmp_path / 'nothing'))


def test_real_pretrained_lm_and_its_tokenizer_load():
    """
    stories260K is a real Llama with a bare sentencepiece model as tokenizer. It continues a story.
    """
    folder = PARENT / 'shared' / 'lm' / 'stories260K'
    if not folder.exists():
        pytest.skip("../shared/lm is not here: it belongs to the developers' house")
    lm, tokenizer = load_lm(str(folder))
    ids = tokenizer(['Once upon a time'])['input_ids'][0]
    for _ in range(12):
        ids = ids + [int(lm.lm_head(lm(torch.tensor([ids])))[0, -1].argmax())]
    assert ids[0] == 1
    assert tokenizer.decode(ids).startswith('Once upon a time, there was a little girl')


# -------------------------------------------------------------------------------------------------
# The configurator

SCRIPT = '''
"""A script with knobs."""
from configurator import configure
import math, json                # a module is no knob
from pathlib import Path
out_dir = 'out'                  # where the run goes
learning_rate = 1e-3             # peak, per step
dropout = 0.1
batch_size = 32                  # clips; '#' in a comment stays
compile = False                  # torch.compile
maybe = None                     # any
mm_layers = [2, 3]               # LM layers, from 1
needs = []                       # configs that run first
scales = (0.5, 1.0)
mark = '#'                       # a hash in the value
_hidden = 3
def helper(): pass
config = configure(globals())
batch_size = batch_size * 1      # not the knob's comment
'''


def stop_message(*argv):
    """ The sentence with which these arguments stop the run. """
    with pytest.raises(SystemExit) as e:
        configure(script_knobs(), list(argv))
    message = str(e.value)
    assert message.startswith('config: ') and '\n' not in message
    return message


def config_file(tmp_path, text, name='c.py'):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# -------------------------------------------------------------------------------------------------
# Flags and files: what they set, and what stops the run


@pytest.mark.parametrize(
    'flag, value',
    [
        ('--learning_rate=1', 1.0),
        ('--dropout=0', 0.0),
        ('--out_dir=a=b', 'a=b'),
        ('--out_dir=2024', '2024'),
        ('--maybe=3', 3),
        ('--out_dir=1e5', '1e5'),
        ('--out_dir=', ''),
        ('--out_dir=None', 'None'),
        ('--out_dir=True', 'True'),
        ('--learning_rate=-1e-3', -1e-3),
        ('--batch_size=1_000', 1000),
        ('--compile=True', True),
        ('--maybe=None', None),
        ('--maybe=abc', 'abc'),
        ('--maybe=0.5', 0.5),
        ('--maybe=[1,"a"]', [1, 'a']),
        ('--maybe=1,2', [1, 2]),
        ('--maybe=True', True),
        ('--mm_layers=[2,3,4]', [2, 3, 4]),
        ('--mm_layers=2,3,4', [2, 3, 4]),
        ('--mm_layers=4', [4]),
        ('--mm_layers=[]', []),
        ('--mm_layers=(2,3)', [2, 3]),
        ('--needs=config/a.py,config/b.py', ['config/a.py', 'config/b.py']),
        ("--needs=['a', 'b']", ['a', 'b']),
        ('--scales=1,2', (1.0, 2.0)),
        ('--scales=[1]', (1.0,)),
        ('--mark==', '='),
    ],
)
def test_a_flag_sets_only_its_knob(flag, value):
    g = script_knobs()
    config = configure(g, [flag])
    key = flag[2:].partition('=')[0]
    assert config[key] == g[key] == value
    assert type(config[key]) is type(value) and repr(config[key]) == repr(value)  # 1.0 is not 1
    # no other knob changes
    assert config | {key: None} == configure(script_knobs(), []) | {key: None}


@pytest.mark.parametrize(
    'flag, words',
    [
        ('--config_keys=[]', ["unknown key 'config_keys'"]),
        ('--__name__=x', ["unknown key '__name__'"]),
        ('--learing_rate=1.0', ["'learing_rate'", "did you mean 'learning_rate'?"]),
        ('--batch_size=True', ['batch_size wants int, got bool (True)']),
        ('--batch_size', ['flags look like --key=value', "'--batch_size'"]),
        ('--compile', ['flags look like --key=value']),
        ('--learning_rate=fast', ['learning_rate wants float, got str', "'fast'"]),
        ('--compile=1', ['compile wants bool, got int (1)']),
        ('-lr=3', ['flags look like --key=value']),
        ('--', ['flags look like']),
        ('--=3', ['unknown key']),
        ('--_hidden=4', ['unknown key']),
        ('--math=4', ['unknown key']),
        ('--zzz=1', ['--help lists the keys']),
        ('--batch-size=3', ["did you mean 'batch_size'?"]),
        ('--batch_size=3.0', ['wants int, got float (3.0)']),
        ('--batch_size=', ['wants int, got str']),
        ('--batch_size=None', ['batch_size wants int, got None']),
        ('--learning_rate=nan', ['learning_rate is nan']),
        ('--learning_rate=-inf', ['learning_rate is -inf', 'give a finite number']),
        ('--batch_size=9223372036854775808', ['batch_size is 9223372036854775808']),
        ('--maybe=nan', ['maybe is nan']),
        ('--learning_rate=True', ['wants float, got bool']),
        ('--compile=true', ['wants bool, got str', "'true'"]),
        ('--mm_layers=2,x', ["mm_layers[1] wants int, got str ('x')"]),
        ('--mm_layers=[2', ['wants list, got str']),
        ('--mm_layers=[2.5]', ['mm_layers[0] wants int, got float']),
        ('--mm_layers=', ['wants list']),
        ('--mm_layers=[[2]]', ['wants list']),
        ('--needs=None', ['wants list, got None']),
        ('--mm_layers=None', ['wants list, got None']),
        ('--scales=1,nan', ['scales[1] is nan']),
        ('--maybe={1:2}', ['maybe wants', 'got dict']),
        ('--maybe=1j', ['got complex']),
        ('--needs=[[1]]', ['needs wants list']),
    ],
)
def test_a_wrong_flag_stops_with_a_sentence(flag, words):
    message = stop_message(flag)
    assert all(word in message for word in words), message


def test_a_flag_without_equals_sign_stops_before_its_value_is_read_as_a_file():
    assert "flags look like --key=value, got '--batch_size'" in stop_message('--batch_size', '3')


def test_an_unknown_name_in_a_file_stops_with_a_hint(tmp_path):
    message = stop_message(config_file(tmp_path, 'learing_rate = 1.0'))
    assert "unknown key 'learing_rate' in " in message and 'c.py' in message
    assert "did you mean 'learning_rate'?" in message


@pytest.mark.parametrize(
    'text, words',
    [
        ("batch_size = 'twelve'", ["batch_size wants int, got str ('twelve') in ", 'c.py']),
        ('batch_size = None', ['batch_size wants int, got None']),
        ('out_dir = None', ['out_dir wants str, got None']),
        ('out_dir = 3', ['out_dir wants str, got int']),
        ('mm_layers = 3', ['mm_layers wants list, got int (3)']),
        ('batch_size = {}', ['wants int, got dict']),
        ('def batch_size(): pass', ['wants int, got function']),
        ('import math as batch_size', ['wants int, got module']),
        ('learning_rate = float("nan")', ['learning_rate is nan']),
        ('import numpy; batch_size = numpy.int64(3)', ['wants int, got int64']),
        ('table = {}', ["unknown key 'table'"]),
        ('maybe = {}', ['maybe wants', 'got dict']),
        ('from math import pi', ["unknown key 'pi'", "starts with '_'"]),
        ('1/0', ['does not run', '(ZeroDivisionError: division by zero)', 'c.py']),
        ('lr = = 3', ['SyntaxError']),
        ('raise SystemExit("no")', ['does not run', '(SystemExit: no)']),
        ('raise ValueError("two\\nlines")', ['(ValueError: two lines)']),
    ],
)
def test_a_wrong_file_stops_with_a_sentence(tmp_path, text, words):
    message = stop_message(config_file(tmp_path, text))
    assert all(word in message for word in words), message


def test_a_file_sets_knobs_and_may_have_helpers(tmp_path):
    path = config_file(
        tmp_path,
        '''
        import math
        from pathlib import Path
        _base = 16
        def double(x): return 2 * x
        batch_size = double(_base); learning_rate = 1; mm_layers = (1, 2); maybe = (3, 4)
        '''.replace('\n        ', '\n'),
    )
    config = configure(script_knobs(), [path])
    changed = dict(batch_size=32, learning_rate=1.0, mm_layers=[1, 2], maybe=[3, 4])
    assert config == configure(script_knobs(), []) | changed
    assert type(config['learning_rate']) is float
    assert '_base' not in config
    assert 'double' not in config


def test_later_settings_win(tmp_path):
    a = config_file(tmp_path, 'batch_size = 1; out_dir = "a"', 'a.py')
    b = config_file(tmp_path, 'batch_size = 2', 'b.py')
    assert configure(script_knobs(), [a, b])['batch_size'] == 2
    assert configure(script_knobs(), [b, a])['batch_size'] == 1
    config = configure(script_knobs(), [a, b, '--batch_size=3', '--batch_size=4'])
    assert (config['batch_size'], config['out_dir']) == (4, 'a')
    # a flag before a file loses
    assert configure(script_knobs(), ['--batch_size=3', a])['batch_size'] == 1


def test_a_run_that_stops_changes_no_global():
    g = script_knobs()
    with pytest.raises(SystemExit):
        configure(g, ['--batch_size=3', '--dropout=x'])
    assert g == script_knobs()


@pytest.mark.parametrize(
    'arg', ['config/deepmlf_toi.py', 'toy', 'config', 'config/deepmlf_toy', 'a.txt', '']
)
def test_a_missing_config_stops_with_a_hint(tmp_path, monkeypatch, arg):
    (tmp_path / 'config' / 'sweeps').mkdir(parents=True)
    for name in ('deepmlf_toy', 'mse_toy', 'sweeps/deepmlf'):
        (tmp_path / f'config/{name}.py').write_text('')
    (tmp_path / 'a.txt').write_text('batch_size = 1')
    monkeypatch.chdir(tmp_path)
    message = stop_message(arg)
    assert 'is not a config file' in message
    if 'toi' in arg or 'toy' in arg:
        assert 'did you mean' in message and 'config/deepmlf_toy.py' in message
    if arg == 'a.txt':
        assert 'see ls config/' in message


# -------------------------------------------------------------------------------------------------
# What is printed


def test_changed_knobs_are_printed_with_their_defaults(capsys):
    configure(script_knobs(), ['--batch_size=64', '--learning_rate=0.001', '--out_dir=x'])
    out = capsys.readouterr().out
    assert out == "    out_dir = 'x'   (default 'out')\n    batch_size = 64   (default 32)\n"
    configure(script_knobs(), ['--batch_size=64'], echo=False)
    assert capsys.readouterr().out == ''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'run.py'
    path.write_text(SCRIPT + "print(json.dumps(config))\n")

    def run(*argv):
        env = os.environ | {'PYTHONPATH': str(HERE)}
        return subprocess.run(
            [sys.executable, str(path), *argv], capture_output=True, text=True, env=env
        )

    return run


def test_help_prints_every_knob_with_its_comment(script):
    out = script('--help')
    assert out.returncode == 0 and out.stderr == ''
    assert [line.split(None, 1) for line in out.stdout.splitlines()] == [
        ['--out_dir=out', 'where the run goes'],
        ['--learning_rate=0.001', 'peak, per step'],
        ['--dropout=0.1'],
        ['--batch_size=32', "clips; '#' in a comment stays"],
        ['--compile=False', 'torch.compile'],
        ['--maybe=None', 'any'],
        ['--mm_layers=2,3', 'LM layers, from 1'],
        ["--needs='[]'", 'configs that run first'],
        ['--scales=0.5,1.0'],
        ["--mark='#'", 'a hash in the value'],
    ]
    changed = script('--batch_size=3', '-h').stdout
    assert changed == out.stdout.replace('--batch_size=32', '--batch_size=3 ')


def test_the_flags_that_help_prints_give_the_defaults(capsys):
    """ Also after a shell has split them. """
    with pytest.raises(SystemExit) as e:
        configure(script_knobs(), ['-h'])
    assert e.value.code == 0
    flags = shlex.split(capsys.readouterr().out)
    config = configure(script_knobs(), flags)
    assert repr(config) == repr(configure(script_knobs(), [])) and len(flags) == len(config)
    assert capsys.readouterr().out == ''


def test_a_script_takes_flags_from_the_command_line(script):
    out = script('--batch_size=8', '--mm_layers=1,2')
    echo = "    batch_size = 8   (default 32)\n    mm_layers = [1, 2]   (default [2, 3])\n{"
    assert echo in out.stdout
    assert '"Path"' not in out.stdout
    assert '"helper"' not in out.stdout
    assert '"_hidden"' not in out.stdout
    out = script('--bacth_size=8')
    assert out.returncode == 1 and out.stdout == ''
    sentence = "unknown key 'bacth_size' on the command line, did you mean 'batch_size'?"
    assert out.stderr == f"config: {sentence}\n"


def test_random_flags_never_give_a_traceback():
    random_flags(3000)


# -------------------------------------------------------------------------------------------------
# The knobs of systems


class Wide(System):
    class Knobs:
        width: AtLeast(1) = 8  # of its layer
        scales: AtLeast(0.5) = [1.0, 2.0]  # one a branch
        reads: Literal['words', 'frames'] = 'words'  # what it looks at
        order: Literal['up', 'down'] = ['up']  # one a branch
        drop: Share() = 0.1  # dropout
        share: Share(with_one=True) = 1.0  # of the clips


class Deep(System):
    class Knobs(Wide.Knobs):
        depth: AtLeast(1) = 2  # layers
        width: AtLeast(1) = 16  # of each layer


class Other(System):
    class Knobs:
        turns = 3  # how often it reads a clip


SMALL_SYSTEMS = dict(wide=Wide, deep=Deep, other=Other)
COMMON = dict(system='wide', lr=1e-3)


def knobs_for(*argv):
    """
    The knobs of a run with this command line, for a script with the knobs COMMON and the systems
    SMALL_SYSTEMS.
    """
    return run_knobs(list(argv), COMMON, dict(lr=AtLeast(0)), SMALL_SYSTEMS)[1]


def refusal(*argv):
    with pytest.raises(SystemExit) as e:
        knobs_for(*argv)
    message = str(e.value)
    assert message.startswith('config: ') and '\n' not in message
    return message


def test_a_run_has_the_common_knobs_and_those_of_its_system():
    own = dict(width=8, scales=[1.0, 2.0], reads='words', order=['up'], drop=0.1, share=1.0)
    assert knobs_for() == COMMON | own
    assert knobs_for('--system=other') == dict(system='other', lr=1e-3, turns=3)
    assert knobs_for('--system=deep') == dict(system='deep', lr=1e-3) | own | dict(
        depth=2, width=16
    )
    assert class_knobs(Deep) == own | dict(depth=2, width=16)


def test_a_knob_of_another_system_names_its_owner(tmp_path):
    sentence = "turns on the command line is a knob of other, not of this run's system: leave it out"
    assert refusal('--turns=4') == f"config: {sentence}"
    assert 'a knob of wide, deep, not of' in refusal('--system=other', '--width=4')
    path = config_file(tmp_path, "turns = 4")
    assert refusal(path) == f"config: turns in {path} is a knob of other, not of this run's system: leave it out"
    assert "unknown key 'turn' on the command line, did you mean 'turns'?" in refusal('--turn=4')
    with pytest.raises(
        SystemExit, match="mse_width on the command line is a knob of mse, not of this run's system"
    ):
        command('train.py', 'config/deepmlf_toy.py', '--mse_width=4')


@pytest.mark.parametrize(
    'config, name, knobs',
    [
        ('deepmlf_toy', 'learning_rate', "'lr'"),
        ('deepmlf_toy', 'max_epochs', "'epochs'"),
        ('deepmlf_toy', 'num_epochs', "'epochs'"),
        ('deepmlf_toy', 'batch', "'batch_size'"),
        ('deepmlf_toy', 'model', "'lm'"),
        ('av_toy', 'model', "'system'"),  # it has no LM
        ('deepmlf_toy', 'hidden_size', "'av_width' or 'head_width'"),
        ('baseline_mult', 'hidden-size', "'fusion_width'"),
        ('deepmlf_toy', 'dropout_rate', "'dropout'"),
        ('av_toy', 'dropout_rate', "'av_dropout'"),
        ('deepmlf_toy', 'output_dir', "'out_dir'"),
        ('deepmlf_toy', 'data', "'corpus'"),
        ('deepmlf_toy', 'gpu', "'device'"),
        ('deepmlf_toy', 'precision', "'dtype'"),
        ('deepmlf_toy', 'FP16', "'dtype'"),
        ('deepmlf_toy', 'n_tokens', "'n_fusion'"),
        ('mse_toy', 'n_tokens', "'n_pseudo'"),
    ],
)
def test_the_usual_name_of_a_knob_is_understood(config, name, knobs):
    with pytest.raises(SystemExit) as e:
        command('train.py', f'config/{config}.py', f'--{name}=1')
    assert f"unknown key {name!r} on the command line, did you mean {knobs}?" in str(e.value)


def test_a_usual_name_suggests_only_knobs_of_the_runs_system():
    declared, _ = declared_knobs(HERE / 'train.py')
    every = set(declared).union(*map(class_knobs, SYSTEMS.values()))
    for name, meant in configurator._KNOBS_MEANT.items():
        assert name not in every
        for pattern in meant:  # no name of a knob is out of date
            assert fnmatch.filter(every, pattern), pattern
        for cls in SYSTEMS.values():
            known = declared | class_knobs(cls)
            assert set(configurator._knobs_meant(name, known)) <= set(known)
    assert configurator._knobs_meant('lora_r', declared | class_knobs(SYSTEMS['av'])) == []


def test_the_order_within_a_file_and_on_the_command_line_does_not_matter(tmp_path):
    """ A knob may be set before the line that names its system. """
    for text in ("depth = 5\nsystem = 'deep'", "system = 'deep'\ndepth = 5"):
        assert knobs_for(config_file(tmp_path, text))['depth'] == 5
    assert knobs_for('--depth=5', '--system=deep') == knobs_for('--system=deep', '--depth=5')
    path = config_file(tmp_path, "system = 'deep'\ndepth = 5")
    assert knobs_for('--depth=6', path)['depth'] == 5  # the file comes later and wins
    assert knobs_for(path, '--depth=6')['depth'] == 6


@pytest.mark.parametrize(
    'flag, sentence',
    [
        ('--reads=letters', "reads='letters' is none of words, frames"),
        ('--order=up,sideways', "order='sideways' is none of up, down"),
        ('--width=0', 'width=0 must be at least 1'),
        ('--lr=-1', 'lr=-1.0 must be at least 0'),
        ('--scales=1,0.25', 'scales=[1.0, 0.25] must be at least 0.5'),
        ('--drop=1', 'drop=1.0 must be in [0, 1)'),
        ('--drop=-0.1', 'drop=-0.1 must be in [0, 1)'),
        ('--share=1.5', 'share=1.5 must be in [0, 1]'),
        ('--system=tall', "system='tall' is none of wide, deep, other"),
    ],
)
def test_values_out_of_range_are_refused_with_a_sentence(flag, sentence):
    assert sentence in refusal(flag)
    allowed = knobs_for('--share=1', '--drop=0', '--width=1', '--scales=[]', '--order=down,up')
    assert (allowed['share'], allowed['drop'], allowed['scales']) == (1.0, 0.0, [])


def test_values_out_of_range_are_refused_in_a_file_too(tmp_path):
    assert 'width=0 must be at least 1' in refusal(config_file(tmp_path, 'width = 0'))
    assert "reads='letters' is none of" in refusal(config_file(tmp_path, "reads = 'letters'"))


def test_a_knob_without_a_comment_is_an_error_of_its_class():
    with pytest.raises(TypeError, match='the knobs of Silent: width has no comment behind it'):

        class Silent(System):
            class Knobs:
                width = 8
                depth = 2  # layers

    with pytest.raises(TypeError, match='the knobs of Mute: width has no comment behind it'):

        class Mute(System):
            class Knobs:
                width = 8


def test_a_default_out_of_range_is_an_error_of_its_class():
    with pytest.raises(
        TypeError,
        match="the knobs of Odd: reads='letters' is none of words, frames; width=0 must be",
    ):

        class Odd(System):
            class Knobs:
                reads: Literal['words', 'frames'] = 'letters'  # what it looks at
                width: AtLeast(1) = 0  # of its layer


def test_a_config_that_sets_a_knob_twice_stops(tmp_path):
    path = config_file(tmp_path, "width = 4\nlr = 1.0\nwidth = 5")
    assert refusal(path) == f"config: width is set twice in {path}; keep one of the two lines"
    # also a knob of another system
    assert 'turns is set twice' in refusal(config_file(tmp_path, "turns = 4\nturns = 4"))
    helper = "_base = 1\n_base = 2\nwidth = _base"
    assert knobs_for(config_file(tmp_path, helper))['width'] == 2


@pytest.mark.parametrize('config', ['deepmlf_toy', 'crosssent_toy'])
def test_help_shows_the_common_knobs_and_those_of_the_system(config, capsys):
    with pytest.raises(SystemExit) as e:
        command('train.py', f'config/{config}.py', '--help')
    assert not e.value.code
    lines = capsys.readouterr().out.splitlines()
    shown = [line[2:].partition('=')[0] for line in lines]
    known, _ = known_knobs(HERE / 'train.py', SYSTEMS, config.removesuffix('_toy'))
    assert shown == list(known)
    assert set(declared_knobs(HERE / 'train.py')[0]) < set(shown)
    assert ('mm_layers' in shown) == (config == 'deepmlf_toy')
    assert ('gmra_layer' in shown) == (config == 'crosssent_toy')
    assert not {'mse_width', 'cmpta_width', 'lmf_rank'} & set(shown)
    assert [line for line in lines if len(line.split(None, 1)) < 2] == []  # each with its comment


def test_macro_f1_of_the_signs_is_the_mean_over_both_classes():
    """As CrossSent's text has it; the weighted F1 is that of its numbers."""
    label = np.array([1.0, 2.0, 3.0, -1.0, 0.0])
    m = metrics.regression_metrics(np.array([1.0, 1.0, -1.0, -1.0, 3.0]), label, (-3, 3))
    assert m['macro_f1_non0'] == pytest.approx((2 * 2 / 5 + 2 / 3) / 2)
    assert m['f1_non0'] == pytest.approx((3 * 0.8 + 1 * 2 / 3) / 4)
    zeros = metrics.regression_metrics(np.ones(3), np.zeros(3), (-3, 3))
    assert np.isnan(zeros['macro_f1_non0']) == np.isnan(zeros['f1_non0'])
