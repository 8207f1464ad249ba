"""
What a reader runs and reads: the blocks and the models, one property a test.

    python -m pytest -q test_smoke.py
"""
import itertools
import hashlib
import math
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'   # before anything imports huggingface_hub: it would retry for half a minute

import pytest
import torch
import torch.nn as nn

from adapters import AVEncoder, LoRA, MMBlock, masked_mean, pool_frames, regularise, seqaug
from configurator import configure, read_config
from losses import deepmlf_loss, lm_loss, summed_cross_entropy
from data import tokenize
from lm import FrozenLM, ModelError, load_lm
from model import AVModel, DeepMLF

HERE = Path(__file__).resolve().parent
PARENT = HERE.parent


# ---------------------------------------------------------------------------------------------------------
# Fakes: a tiny random LM of each family, a batch of three clips (one without audio, one of a single token)

def tiny_lm(family='gpt2', seed=0):
    """ A random Hugging Face LM: width 32, 3 layers, 60 tokens. Norms and biases are moved off 1 and 0, or they would hide. """
    from transformers import AutoConfig, AutoModelForCausalLM
    size = dict(n_embd=32, n_layer=3, n_head=4, n_positions=128) if family == 'gpt2' else dict(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128) | (
        dict(head_dim=8) if family == 'glm' else {})   # GLM's own default is 128
    try: config = AutoConfig.for_model(family, vocab_size=60, bos_token_id=1, eos_token_id=2, pad_token_id=None, **size)
    except ValueError: pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in hf.parameters(): p += 0.1 * torch.randn_like(p)
    return hf


KNOBS = dict(mm_layers=[2, 3], max_text_len=20, n_fusion=4, mm_heads=4, mm_query='fusion', mm_gate='sigmoid', mm_ffw='full', mm_ffw_init='lm',
             lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, dropout=0.0, head_width=8, text_reg='none', text_reg_rate=0.1, text_reg_prob=0.5,
             text_reg_draw='fixed', fusion_position='after', weight_av=1.0, weight_text=1.0, weight_fusion=1.0, weight_lm=1.0, weight_mpr=0.0, weight_eioi=0.0)


def tiny_deepmlf(family='gpt2', **knobs):
    return DeepMLF(FrozenLM(tiny_lm(family)), AVEncoder(dict(audio=5, vision=7), 12, 2, 3, av_len=9, dropout=0.0, seqaug_rate=0.0), KNOBS | knobs)


def tiny_batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = dict(tokens=torch.tensor([9, 4, 1]), audio=torch.tensor([20, 0, 3]), vision=torch.tensor([6, 11, 0]))
    real = {k: torch.arange(int(n.max())) < n[:, None] for k, n in lengths.items()}
    batch = dict(tokens=torch.randint(3, 60, (3, 9), generator=g), text_len=lengths['tokens'], text_mask=real['tokens'],
                 targets=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]), label=torch.randn(3, generator=g), index=torch.arange(3))
    for stream, width in dict(audio=5, vision=7).items():
        x = torch.randn(3, int(lengths[stream].max()), width, generator=g) * real[stream][..., None]
        batch |= {stream: x, f'{stream}_len': lengths[stream], f'{stream}_mask': real[stream]}
    return batch


def fingerprint(module):
    return hashlib.sha256(b''.join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in module.state_dict().values())).hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Blocks

def test_lora_starts_as_the_frozen_layer_and_merges_into_a_copy():
    """ B = 0, so the output is W x to the bit; the first gradient is zero on A and not on B; merge() leaves W alone. """
    W, lora, x = nn.Linear(8, 6), LoRA(8, 6, rank=2, alpha=4), torch.randn(3, 8)
    assert torch.equal(lora(x, W), W(x))
    lora(x, W).sum().backward()
    assert lora.A.grad.abs().sum() == 0 and lora.B.grad.abs().sum() > 0
    assert lora.A.abs().max() <= 1 / math.sqrt(8)
    nn.init.normal_(lora.B)
    before = W.weight.detach().clone()
    merged = nn.Linear(8, 6); merged.load_state_dict({'weight': lora.merge(W.weight), 'bias': W.bias})
    torch.testing.assert_close(merged(x), lora(x, W))
    assert torch.equal(W.weight, before)


def test_lora_stays_float32_on_a_bf16_layer():
    W, lora = nn.Linear(8, 6).bfloat16(), LoRA(8, 6, 2, 4)
    assert lora(torch.randn(3, 8).bfloat16(), W).dtype == torch.bfloat16 and lora.A.dtype == torch.float32


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
@pytest.mark.parametrize('ffw', ['full', 'lora'])
def test_mm_ffw_starts_as_the_lms_own(family, ffw):
    """ Weights, biases, activation, norm: at the start the FFW of an MM block computes what the LM block's computes. """
    lm = FrozenLM(tiny_lm(family))
    block = MMBlock(32, 12, lm.part(1, 'norm_2'), lm.ffw(1), 4, ffw=ffw, dropout=0.0, lora_dropout=0.0)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(block.ffw(block.norm_2(x), lm.ffw(1)), lm.part(1, 'ffw')(lm.part(1, 'norm_2')(x)), rtol=0, atol=1e-6)
    fresh = MMBlock(32, 12, lm.part(1, 'norm_2'), lm.ffw(1), 4, ffw_init='random', dropout=0.0)
    assert not torch.allclose(fresh.ffw(fresh.norm_2(x), lm.ffw(1)), lm.part(1, 'ffw')(lm.part(1, 'norm_2')(x)), atol=1e-2)


def test_gates():
    """ sigmoid starts at 1/2, tanh at 0 (then the block changes nothing), none is 1. """
    lm, z, m = FrozenLM(tiny_lm()), torch.randn(2, 6, 12), torch.ones(2, 6, dtype=torch.bool)
    x_t, x_f = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    block = lambda gate: MMBlock(32, 12, lm.part(1, 'norm_2'), lm.ffw(1), 4, gate=gate, dropout=0.0)
    assert [g.item() for g in block('sigmoid').gates()] == [0.5, 0.5]
    assert all(torch.equal(a, b) for a, b in zip(block('tanh')(x_t, x_f, z, m, lm.ffw(1)), (x_t, x_f)))
    assert block('none').gates() == [1.0, 1.0]


def test_seqaug_permutes_real_steps_of_chosen_dimensions():
    """ Each dimension of a clip keeps its values; padding stays; chosen dimensions share one order; rate 0 is the identity. """
    torch.manual_seed(0)
    x, lengths = torch.randn(6, 10, 40), torch.tensor([10, 10, 7, 3, 1, 0])
    y = seqaug(x, lengths, rate=0.5)
    for b, n in enumerate(lengths):
        assert torch.equal(y[b, n:], x[b, n:])
        torch.testing.assert_close(y[b, :n].sort(0).values, x[b, :n].sort(0).values, rtol=0, atol=0)
    moved = [d for d in range(40) if not torch.equal(x[0, :, d], y[0, :, d])]
    assert 8 < len(moved) < 32
    orders = {tuple((x[0, :, d] == y[0, t, d]).nonzero().item() for t in range(10)) for d in moved}
    assert len(orders) == 1
    assert torch.equal(seqaug(x, lengths, rate=0.0), x) and torch.equal(seqaug(x, lengths, 0.5, p_apply=0.0), x)
    for draw in ('beta', 'halfnormal'): assert seqaug(x, lengths, 0.3, draw=draw).shape == x.shape


def test_regularise_alternatives():
    x, n = torch.ones(4, 5, 200), torch.full((4,), 5)
    assert torch.equal(regularise(x, n, 'none', 0.3, 1, 'fixed'), x)
    assert 0.08 < float((regularise(x, n, 'noise', 0.1, 1, 'fixed') - x).std()) < 0.12
    assert 0.2 < float((regularise(x, n, 'dropout', 0.3, 1, 'fixed') == 0).float().mean()) < 0.4


def test_pool_frames_by_hand():
    """ 6 frames into 3 slots: neighbours' means. 5 into 2: windows [0,3) and [2,5). 2 into 3: repeats. None: zeros. """
    x = torch.arange(6.0)[None, :, None].repeat(4, 1, 1)
    y = pool_frames(x, torch.tensor([6, 5, 2, 0]), torch.tensor([3, 2, 3, 1]), 3)[..., 0]
    assert y.tolist() == [[0.5, 2.5, 4.5], [1.0, 3.0, 0.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]


def test_av_encoder_never_sees_padding_and_takes_empty_streams():
    """ More padding, or garbage in it, changes nothing; a clip alone gives what it gives in company. """
    torch.manual_seed(0)
    encoder, batch = AVEncoder(dict(audio=5, vision=7), 12, 2, 3, av_len=9).eval(), tiny_batch()
    z, mask = encoder(batch)
    assert z.shape == (3, 9, 12) and mask.sum(1).tolist() == [9, 9, 3] and z.isfinite().all()
    dirty = batch | {s: torch.cat([torch.where(batch[s + '_mask'][..., None], batch[s], torch.tensor(1e3)), torch.full((3, 5, batch[s].shape[2]), -1e3)], 1)
                     for s in ('audio', 'vision')}
    torch.testing.assert_close(encoder(dirty)[0][mask], z[mask], rtol=0, atol=1e-5)
    alone = {k: v[2:3] for k, v in batch.items()}
    torch.testing.assert_close(encoder(alone)[0][0, :3], z[2, :3], rtol=0, atol=1e-5)


def test_masked_mean():
    x, mask = torch.arange(6.0).view(1, 3, 2), torch.tensor([[True, True, False]])
    assert masked_mean(x, mask).tolist() == [[1.0, 2.0]] and masked_mean(x, mask & False).tolist() == [[0.0, 0.0]]


# ---------------------------------------------------------------------------------------------------------
# Losses

def test_lm_loss_is_the_mean_over_real_targets():
    """ Against plain cross-entropy with ignored padding, in one chunk and in many; gradients too. """
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 60, bias=False), torch.randn(3, 9, 8, requires_grad=True)
    batch = tiny_batch()
    target = batch['tokens'][:, 1:].masked_fill(~batch['text_mask'][:, 1:], -100)
    plain = nn.functional.cross_entropy(head(hidden)[:, :-1].reshape(-1, 60), target.reshape(-1), ignore_index=-100)
    (g,) = torch.autograd.grad(plain, hidden)
    for chunk, trained in itertools.product((1024, 4), (True, False)):   # of a frozen head it takes the gradient on the way
        ours = lm_loss(hidden, batch, head.requires_grad_(trained), chunk)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(torch.autograd.grad(ours, hidden)[0], g)
    x, y = torch.randn(9, 8, requires_grad=True), torch.tensor([5, -100, 7, 0, -100, 59, 3, -100, 2])
    asked = nn.functional.cross_entropy(head(x), y, reduction='sum')
    ours = summed_cross_entropy(x, y, head.requires_grad_(False), chunk=4)   # rows that are not asked
    torch.testing.assert_close(ours, asked)
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(asked, x)[0])
    assert lm_loss(hidden, batch | dict(targets=batch['targets'][:0]), head).item() == 0.0
    torch.testing.assert_close(lm_loss(hidden, batch | dict(lm_weight=0.5), head), plain / 2)


def test_deepmlf_loss_by_hand():
    """ y = (1, -1): task off by (1, 0), av by (2, 2), text by (0, 1): .5 + .8 * 2 + .5 * .5 = 2.35; weight 0 is no term. """
    y, t = torch.tensor([1.0, -1.0]), torch.tensor
    terms, loss = deepmlf_loss(dict(pred=t([0.0, -1.0]), av=t([3.0, 1.0]), text=t([1.0, -2.0]), fusion=t([9.0, 9.0])), y, dict(av=0.8, text=0.5, fusion=0.0))
    assert {k: float(v) for k, v in terms.items()} == dict(task=0.5, av=2.0, text=0.5) and float(loss) == pytest.approx(2.35)


# ---------------------------------------------------------------------------------------------------------
# DeepMLF

def test_text_never_depends_on_audio_or_video():
    model, batch = tiny_deepmlf().eval(), tiny_batch()
    other = batch | dict(audio=torch.randn_like(batch['audio']), vision=torch.randn_like(batch['vision']))
    a, b = model.predict(batch), model.predict(other)
    assert torch.equal(a['text'], b['text'])
    assert all((a[k] != b[k]).any() for k in ('pred', 'av', 'fusion'))
    model = tiny_deepmlf(mm_query='text').eval()
    assert (model.predict(batch)['text'] != model.predict(other)['text']).any()


def test_no_graph_for_text_below_the_first_mm_block():
    """ mm_layers = [2, 3]: text leaves LM layers 1 and 2 without a graph and layer 3 with one; fusion tokens always have one. """
    model, batch, seen = tiny_deepmlf(), tiny_batch(), []
    block = model.lm.block
    def spy(l, x, rope, **k):
        y, kv = block(l, x, rope, **k)
        seen.append(('fusion' if 'past' in k else 'text', l + 1, y.requires_grad))
        return y, kv
    model.lm.block = spy
    model(batch)
    assert [s for s in seen if s[0] == 'text'] == [('text', 1, False), ('text', 2, False), ('text', 3, True)]
    assert all(graph for who, _, graph in seen if who == 'fusion')


def test_predictions_do_not_depend_on_the_company_in_a_batch():
    """ A clip alone equals the clip in a padded batch, batch of one included; predict reads no label. """
    model, batch = tiny_deepmlf('llama').eval(), tiny_batch()
    together = model.predict({k: v for k, v in batch.items() if k != 'label'})
    for i in range(3):
        n, a, v = int(batch['text_len'][i]), max(1, int(batch['audio_len'][i])), max(1, int(batch['vision_len'][i]))
        one = {k: t[i:i + 1] for k, t in batch.items()}
        one |= dict(tokens=one['tokens'][:, :n], text_mask=one['text_mask'][:, :n], audio=one['audio'][:, :a], vision=one['vision'][:, :v])
        for k, alone in model.predict(one).items(): torch.testing.assert_close(alone[0], together[k][i], rtol=0, atol=1e-5)


def test_lm_loss_reaches_only_the_ffw_side_of_mm_blocks():
    """ facts 0.1: L_LM gives gradient to FFW, norm_2 and gate 2, and nothing to attention, fusion tokens or AV encoder. """
    model = tiny_deepmlf()
    x_t, *_ = model.streams(tiny_batch())
    lm_loss(x_t, tiny_batch(), model.lm.lm_head).backward()
    reached = {n.split('.', 2)[-1].split('.')[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {'ffw', 'norm_2', 'a_2'}


def test_bf16_rounds_neither_predictions_nor_raw_features():
    """ The release validates under bf16 autocast, and its predictions near 1 come in steps of 1/128. """
    model, batch = tiny_deepmlf().eval(), tiny_batch()
    model.lm.bfloat16()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): out = model.predict(batch)
    assert all(y.dtype == torch.float32 and (y != y.bfloat16().float()).any() for y in out.values())
    alone = AVModel(model.av_encoder, KNOBS).eval()
    z, y = model.av_encoder(batch)[0], alone.predict(batch)['pred']
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(model.av_encoder(batch)[0], z) and torch.equal(alone.predict(batch)['pred'], y)


def test_long_texts_are_cut_by_the_tokenizer_and_empty_ones_get_a_token(tmp_path):
    """ A BERT tokenizer (Chinese GPT-2 has one) keeps its [SEP] when a text is cut: the text head reads the last token. """
    from transformers import BertTokenizerFast
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdef']
    (tmp_path / 'vocab.txt').write_text('\n'.join(words))
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / 'vocab.txt'))
    ids, n_empty, n_cut = tokenize(tokenizer, ['a b', 'a b c d e f'], max_len=5)
    assert [(t[0], t[-1], len(t)) for t in ids] == [(2, 3, 4), (2, 3, 5)] and (n_empty, n_cut) == (0, 1)
    class Bare:   # no special tokens, as GPT-2
        eos_token_id, bos_token_id, pad_token_id = 9, None, None
        def __call__(self, texts, truncation=False, max_length=None, **_):
            return {'input_ids': [[ord(ch) for ch in t][:max_length] for t in texts]}
    assert tokenize(Bare(), ['', 'abc'], max_len=2) == ([[9], [97, 98]], 1, 1)


def test_decay_groups_hold_every_trainable_weight_once():
    model = tiny_deepmlf()
    decay, flat = model.param_groups()
    names = decay['names'] + flat['names']
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert 'fusion_tokens' in flat['names'] and 'mm_blocks.2.a_1' in flat['names'] and all('norm' not in n and 'bias' not in n for n in decay['names'])


@pytest.mark.parametrize('knobs, sentence', [
    (dict(mm_layers=[0, 2]), 'from 1 to 3'), (dict(mm_layers=[4]), 'from 1 to 3'), (dict(mm_layers=[]), 'from 1 to 3'),
    (dict(mm_layers=[2, 2]), 'different numbers'), (dict(max_text_len=126), 'positions')])
def test_impossible_models_are_refused_with_a_sentence(knobs, sentence):
    with pytest.raises(ModelError, match=sentence): tiny_deepmlf(**knobs)


def test_unknown_family_and_missing_lm_are_refused_with_a_sentence(tmp_path):
    hf = tiny_lm(); hf.config.model_type = 'mamba'
    hf.transformer.h[0].mixer = hf.transformer.h[0].attn
    del hf.transformer.h[0].attn
    with pytest.raises(ModelError, match="'mamba' is not known here, .* known are gpt2"): FrozenLM(hf)
    with pytest.raises(ModelError, match="could not be loaded .* takes the Hugging Face name"): load_lm(str(tmp_path / 'nothing'))


def test_real_pretrained_lm_and_its_tokenizer_load():
    """ stories260K: a real Llama whose tokenizer is a bare sentencepiece model. It goes on with a story. """
    folder = PARENT / 'shared' / 'lm' / 'stories260K'
    if not folder.exists(): pytest.skip("../shared/lm is not here: it belongs to the developers' house")
    lm, tokenizer = load_lm(str(folder))
    ids = tokenizer(['Once upon a time'])['input_ids'][0]
    for _ in range(12): ids = ids + [int(lm.lm_head(lm(torch.tensor([ids])))[0, -1].argmax())]
    assert ids[0] == 1 and tokenizer.decode(ids).startswith('Once upon a time, there was a little girl')


# ---------------------------------------------------------------------------------------------------------
# The configurator: the table of facts/style.md 8.1 row by row, then what the table leaves out

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

def script_knobs():
    """ The globals of a script like SCRIPT, at the call of configure. """
    return dict(out_dir='out', learning_rate=1e-3, dropout=0.1, batch_size=32, compile=False, maybe=None,
                mm_layers=[2, 3], needs=[], scales=(0.5, 1.0), mark='#',
                _hidden=3, math=math, __name__='__main__')

def stopped(*argv):
    """ The sentence with which these arguments stop the run. """
    with pytest.raises(SystemExit) as e: configure(script_knobs(), list(argv))
    message = str(e.value)
    assert message.startswith('config: ') and '\n' not in message
    return message

def config_file(tmp_path, text, name='c.py'):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------------------------------------------------
# the table: what is set, and what stops the run

@pytest.mark.parametrize('flag, value', [
    ('--learning_rate=1', 1.0), ('--dropout=0', 0.0), ('--out_dir=a=b', 'a=b'), ('--out_dir=2024', '2024'),
    ('--maybe=3', 3), ('--out_dir=1e5', '1e5'),
    # beyond the table
    ('--out_dir=', ''), ('--out_dir=None', 'None'), ('--out_dir=True', 'True'),
    ('--learning_rate=-1e-3', -1e-3), ('--learning_rate=inf', math.inf), ('--learning_rate=-inf', -math.inf),
    ('--batch_size=1_000', 1000),
    ('--compile=True', True), ('--maybe=None', None), ('--maybe=abc', 'abc'), ('--maybe=0.5', 0.5),
    ('--maybe=[1,"a"]', [1, 'a']), ('--maybe=1,2', [1, 2]), ('--maybe=True', True),
    ('--mm_layers=[2,3,4]', [2, 3, 4]), ('--mm_layers=2,3,4', [2, 3, 4]), ('--mm_layers=4', [4]),
    ('--mm_layers=[]', []), ('--mm_layers=(2,3)', [2, 3]), 
    ('--needs=config/a.py,config/b.py', ['config/a.py', 'config/b.py']),
    ("--needs=['a', 'b']", ['a', 'b']), ('--scales=1,2', (1.0, 2.0)),
    ('--scales=[1]', (1.0,)), ('--mark==', '='),
])
def test_flag_sets(flag, value):
    g = script_knobs()
    config = configure(g, [flag])
    key = flag[2:].partition('=')[0]
    assert config[key] == g[key] == value
    assert type(config[key]) is type(value) and repr(config[key]) == repr(value)   # 1.0 is not 1
    assert config | {key: None} == configure(script_knobs(), []) | {key: None}   # and nothing else moved

@pytest.mark.parametrize('flag, words', [
    ('--config_keys=[]', ["unknown key 'config_keys'"]),
    ('--__name__=x', ["unknown key '__name__'"]),
    ('--learing_rate=1.0', ["'learing_rate'", "did you mean 'learning_rate'?"]),
    ('--batch_size=True', ['batch_size wants int, got bool (True)']),
    ('--batch_size', ['flags look like --key=value', "'--batch_size'"]),
    ('--compile', ['flags look like --key=value']),
    ('--learning_rate=fast', ['learning_rate wants float, got str', "'fast'"]),
    ('--compile=1', ['compile wants bool, got int (1)']),
    # beyond the table
    ('-lr=3', ['flags look like --key=value']), ('--', ['flags look like']), ('--=3', ['unknown key']),
    ('--_hidden=4', ['unknown key']), ('--math=4', ['unknown key']), ('--zzz=1', ['--help lists the keys']),
    ('--batch-size=3', ["did you mean 'batch_size'?"]), ('--batch_size=3.0', ['wants int, got float (3.0)']),
    ('--batch_size=', ['wants int, got str']), ('--batch_size=None', ['batch_size wants int, got None']),
    ('--learning_rate=nan', ['learning_rate is nan']), ('--maybe=nan', ['maybe is nan']),
    ('--learning_rate=True', ['wants float, got bool']),
    ('--compile=true', ['wants bool, got str', "'true'"]),
    ('--mm_layers=2,x', ["mm_layers[1] wants int, got str ('x')"]),
    ('--mm_layers=[2', ['wants list, got str']),
    ('--mm_layers=[2.5]', ['mm_layers[0] wants int, got float']), ('--mm_layers=', ['wants list']),
    ('--mm_layers=[[2]]', ['wants list']), ('--needs=None', ['wants list, got None']),
    ('--mm_layers=None', ['wants list, got None']),
    ('--scales=1,nan', ['scales[1] is nan']), ('--maybe={1:2}', ['maybe wants', 'got dict']),
    ('--maybe=1j', ['got complex']), ('--needs=[[1]]', ['needs wants list']),
])
def test_flag_stops(flag, words):
    message = stopped(flag)
    assert all(word in message for word in words), message

def test_flags_without_equals_sign_stop_before_their_value_is_taken_for_a_file():
    assert "flags look like --key=value, got '--batch_size'" in stopped('--batch_size', '3')

def test_file_with_an_unknown_name(tmp_path):
    message = stopped(config_file(tmp_path, 'learing_rate = 1.0'))
    assert "unknown key 'learing_rate' in " in message and 'c.py' in message
    assert "did you mean 'learning_rate'?" in message

@pytest.mark.parametrize('text, words', [
    ("batch_size = 'twelve'", ["batch_size wants int, got str ('twelve') in ", 'c.py']),
    ('batch_size = None', ['batch_size wants int, got None']),
    ('out_dir = None', ['out_dir wants str, got None']),
    ('out_dir = 3', ['out_dir wants str, got int']), ('mm_layers = 3', ['mm_layers wants list, got int (3)']),
    ('batch_size = {}', ['wants int, got dict']), ('def batch_size(): pass', ['wants int, got function']),
    ('import math as batch_size', ['wants int, got module']),
    ('learning_rate = float("nan")', ['learning_rate is nan']),
    ('import numpy; batch_size = numpy.int64(3)', ['wants int, got int64']),
    ('table = {}', ["unknown key 'table'"]),
    ('maybe = {}', ['maybe wants', 'got dict']),
    ('from math import pi', ["unknown key 'pi'", "starts with '_'"]),
    ('1/0', ['does not run', '(ZeroDivisionError: division by zero)', 'c.py']), ('lr = = 3', ['SyntaxError']),
    ('raise SystemExit("no")', ['does not run', '(SystemExit: no)']),
    ('raise ValueError("two\\nlines")', ['(ValueError: two lines)']),
])
def test_file_stops(tmp_path, text, words):
    message = stopped(config_file(tmp_path, text))
    assert all(word in message for word in words), message

def test_file_sets_and_helpers_are_no_settings(tmp_path):
    path = config_file(tmp_path, '''
        import math
        from pathlib import Path
        _base = 16
        def double(x): return 2 * x
        batch_size = double(_base); learning_rate = 1; mm_layers = (1, 2); maybe = (3, 4)
        '''.replace('\n        ', '\n'))
    config = configure(script_knobs(), [path])
    changed = dict(batch_size=32, learning_rate=1.0, mm_layers=[1, 2], maybe=[3, 4])
    assert config == configure(script_knobs(), []) | changed
    assert type(config['learning_rate']) is float and '_base' not in config and 'double' not in config

def test_later_wins(tmp_path):
    a = config_file(tmp_path, 'batch_size = 1; out_dir = "a"', 'a.py')
    b = config_file(tmp_path, 'batch_size = 2', 'b.py')
    assert configure(script_knobs(), [a, b])['batch_size'] == 2
    assert configure(script_knobs(), [b, a])['batch_size'] == 1
    config = configure(script_knobs(), [a, b, '--batch_size=3', '--batch_size=4'])
    assert (config['batch_size'], config['out_dir']) == (4, 'a')
    assert configure(script_knobs(), ['--batch_size=3', a])['batch_size'] == 1   # in the order written

def test_stopped_run_leaves_the_globals_alone():
    g = script_knobs()
    with pytest.raises(SystemExit): configure(g, ['--batch_size=3', '--dropout=x'])
    assert g == script_knobs()

@pytest.mark.parametrize('arg', ['config/deepmlf_toi.py', 'toy', 'config', 'config/deepmlf_toy', 'a.txt', ''])
def test_no_such_config(tmp_path, monkeypatch, arg):
    (tmp_path / 'config' / 'sweeps').mkdir(parents=True)
    for name in ('deepmlf_toy', 'mse_toy', 'sweeps/deepmlf'): (tmp_path / f'config/{name}.py').write_text('')
    (tmp_path / 'a.txt').write_text('batch_size = 1')
    monkeypatch.chdir(tmp_path)
    message = stopped(arg)
    assert 'is not a config file' in message
    if 'toi' in arg or 'toy' in arg: assert 'did you mean' in message and 'config/deepmlf_toy.py' in message
    if arg == 'a.txt': assert 'see ls config/' in message

def test_read_config_checks_and_applies_nothing(tmp_path):
    known = configure(script_knobs(), [])
    assert read_config(config_file(tmp_path, 'learning_rate = 2'), known) == dict(learning_rate=2.0)
    assert known == configure(script_knobs(), [])
    with pytest.raises(SystemExit, match='did you mean'):
        read_config(config_file(tmp_path, 'bath_size = 2'), known)


# ---------------------------------------------------------------------------------------------------------
# what is printed

def test_echo_shows_only_what_changed(capsys):
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
        env = os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parent)}
        return subprocess.run([sys.executable, str(path), *argv], capture_output=True, text=True, env=env)
    return run

def test_help_prints_every_knob_with_its_comment(script):
    out = script('--help')
    assert out.returncode == 0 and out.stderr == ''
    assert [line.split(None, 1) for line in out.stdout.splitlines()] == [
        ['--out_dir=out', 'where the run goes'], ['--learning_rate=0.001', 'peak, per step'],
        ['--dropout=0.1'],
        ['--batch_size=32', "clips; '#' in a comment stays"], ['--compile=False', 'torch.compile'],
        ['--maybe=None', 'any'], ['--mm_layers=2,3', 'LM layers, from 1'],
        ["--needs='[]'", 'configs that run first'], ['--scales=0.5,1.0'],
        ["--mark='#'", 'a hash in the value']]
    assert script('--batch_size=3', '-h').stdout == out.stdout

def test_what_help_prints_can_be_pasted_back(capsys):
    """ Every flag that --help shows, through a shell's own splitting, gives the default again. """
    with pytest.raises(SystemExit) as e: configure(script_knobs(), ['-h'])
    assert e.value.code == 0
    flags = shlex.split(capsys.readouterr().out)
    config = configure(script_knobs(), flags)
    assert repr(config) == repr(configure(script_knobs(), [])) and len(flags) == len(config)
    assert capsys.readouterr().out == ''

def test_a_script_from_the_command_line(script):
    out = script('--batch_size=8', '--mm_layers=1,2')
    assert "    batch_size = 8   (default 32)\n    mm_layers = [1, 2]   (default [2, 3])\n{" in out.stdout
    assert '"Path"' not in out.stdout and '"helper"' not in out.stdout and '"_hidden"' not in out.stdout
    out = script('--bacth_size=8')
    assert out.returncode == 1 and out.stdout == ''
    assert out.stderr == "config: unknown key 'bacth_size' on the command line, did you mean 'batch_size'?\n"

def random_flags(n, seed=0):
    """ A flag of any text either sets a value of the knob's own type or stops with a sentence. """
    rng = random.Random(seed)
    for _ in range(n):
        key = rng.choice(list(configure(script_knobs(), [])))
        text = ''.join(rng.choices("0123456789eE.,+-_[](){}'\"#=\\ nNoTrueainf\0", k=rng.randrange(8)))
        try: value = configure(script_knobs(), [f'--{key}={text}'], echo=False)[key]
        except SystemExit as e: assert str(e).startswith('config: ') and '\n' not in str(e); continue
        default = script_knobs()[key]
        assert default is None or type(value) is type(default), (key, text, value)
        assert value == value

def test_random_text_never_gives_a_traceback(): random_flags(3000)
