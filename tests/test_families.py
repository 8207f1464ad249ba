"""
Every family of language models in FAMILIES (lm.py), and its variants: the same logits as
transformers in float32 and bfloat16, MM blocks that start as the LM's own FFW, and the comparison
that refuses an LM whose row is wrong. (test_parity.py has the logits in float64 and with keys and
values of earlier tokens.)
"""

import json

import pytest
import torch
import torch.nn as nn
import transformers

import run.lm_compare as lm_compare
from adapters import MMBlock
from data import tokenize
from fakes import EVERY_LM, tiny_batch, tiny_deepmlf, tiny_lm
from lm import FAMILIES, FrozenLM
from run.errors import ModelError
from run.frozen_text import frozen_text
from run.lm_compare import compare, compare_once, known_lm
from run.load_lm import load_lm, tokenizer_notes
from run.machine import check_compiler

WITH_FFW = [family for family in EVERY_LM if family != 'qwen3_moe']


@pytest.mark.parametrize('family', EVERY_LM)
def test_our_forward_is_transformers_own_in_float32(family):
    """On 8 tokens and on the longest text that the LM takes."""
    assert compare(FrozenLM(tiny_lm(family)))['float32'] <= 1e-5


@pytest.mark.parametrize('family', EVERY_LM)
def test_our_bfloat16_is_as_near_to_float32_as_transformers_own(family):
    lm = FrozenLM(tiny_lm(family))
    for p in lm.hf.parameters():
        p.data = p.data.bfloat16()
    before = [p.clone() for p in lm.hf.parameters()]
    found = compare(lm)
    assert 0 < found['ours'] <= 2 * found['theirs']
    assert all(torch.equal(p, q) for p, q in zip(before, lm.hf.parameters()))  # not a bit changed


@pytest.mark.parametrize('ffw', ['full', 'lora'])
@pytest.mark.parametrize('family', WITH_FFW)
def test_an_mm_block_starts_as_the_lms_own_ffw(family, ffw):
    """With the norms around the FFW, and the factor of what it adds."""
    lm = FrozenLM(tiny_lm(family))
    norms, pieces = lm.norms_of_ffw(1), lm.ffw(1)
    more = dict(norm_offset=lm.row.get('norm_offset', 0), lora_rank=8, lora_alpha=16)
    block = MMBlock(32, 12, norms, pieces, 4, ffw=ffw, **more)
    x = torch.randn(2, 5, 32)
    added = block.project(x, pieces, 1.0) - x
    torch.testing.assert_close(added, lm.feed_forward(1, x), rtol=0, atol=2e-6)


@pytest.mark.parametrize('family', WITH_FFW)
def test_the_new_norm_of_an_mm_block_starts_without_scale_and_shift(family):
    """Gemma's and Nemotron's norms multiply by 1 + weight, so theirs start at 0."""
    lm = FrozenLM(tiny_lm(family))
    model = tiny_deepmlf(family, mm_layers=[2])
    x = 3 * torch.randn(4, 32) + 1
    y = model.mm_blocks['2'].norm_1(x)
    kinds = ' '.join(type(norm).__name__ for norm in lm.norms_of_ffw(1))
    if 'RMS' in kinds:
        wanted = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    else:
        wanted = nn.functional.layer_norm(x, [32])
    torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('family', WITH_FFW)
def test_deepmlf_trains_on_every_family(family):
    model = tiny_deepmlf(family).train()
    out = model(tiny_batch())
    out['loss'].backward()
    assert all(v.isfinite() for v in out['terms'].values())
    lm_own = {id(p) for p in model.lm.parameters()}
    for name, p in model.named_parameters():
        if id(p) not in lm_own and p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name
    assert all(p.grad is None for p in model.lm.parameters())


def test_experts_have_no_ffw_for_an_mm_block():
    with pytest.raises(ModelError, match='layer 2 of this LM .*qwen3_moe.* experts are not supported'):
        tiny_deepmlf('qwen3_moe', mm_layers=[2])


@pytest.mark.parametrize(
    'family, says',
    [
        ('mistral', 'max_text_len . n_fusion = 83 tokens is past the 64 .*sliding_window'),
        ('gemma2', 'past the 64 tokens .*sliding_window'),
        ('phi3:long', 'past the 64 tokens .*original_max_position_embeddings'),
    ],
)
def test_a_text_longer_than_the_window_is_refused_with_both_numbers(family, says):
    tiny_deepmlf(family, max_text_len=61, n_fusion=3)
    with pytest.raises(ModelError, match=says):
        tiny_deepmlf(family, max_text_len=80, n_fusion=3)


@pytest.mark.parametrize('family', ['gemma', 'gemma3_text', 'granite', 'llama'])
def test_embeddings_are_measured_as_the_first_layer_gets_them(family):
    """Gemma's are scaled by the root of the width, so free tokens start that much larger."""
    lm = FrozenLM(tiny_lm(family))
    measured = lm.embed(torch.arange(60)[None]).pow(2).mean().sqrt()
    assert lm.embed_rms() == pytest.approx(float(measured), rel=1e-4)
    std = float(tiny_deepmlf(family, n_fusion=48, max_text_len=15).fusion_tokens.detach().std())
    assert std == pytest.approx(0.02 * lm.embed_scale, rel=0.1)


# --------------------------------------------------------------------------------------------------
# The comparison


@pytest.mark.parametrize(
    'family, trait',
    [
        ('granite', 'logit_divisor'),
        ('granite', 'residual_scale'),
        ('granite', 'attention_scale'),
        ('gemma2', 'attention_cap'),
        ('gemma2', 'logit_cap'),
        ('gemma2', 'post_1'),
        ('gemma3_text', 'q_norm'),
        ('olmo', 'clip'),
        ('olmo2', 'post_2'),
        ('glm', 'pairs'),
        ('gpt_neox', 'parallel'),
        ('smollm3', 'rope_kinds'),
        ('opt', 'wpe_offset'),
        ('cohere', 'logit_scale'),
        ('stablelm:norms', 'q_norm'),
    ],
)
def test_a_row_without_one_of_its_traits_is_refused_with_the_difference(family, trait):
    hf = tiny_lm(family)
    hf.config._attn_implementation = 'eager'  # sdpa of older transformers leaves the cap out
    row = {k: v for k, v in FAMILIES[hf.config.model_type].items() if k != trait}
    with pytest.raises(ModelError, match=r'differs .* by [\d.e+-]+ of the largest logit .* FAMILIES'):
        compare(FrozenLM(hf, row))


def test_an_lm_is_compared_once_for_each_dtype(tmp_path, capsys, monkeypatch):
    lm, folder = FrozenLM(tiny_lm('qwen3')), str(tmp_path / 'lm_checks')
    compare_once(lm, 'an LM', folder)
    assert 'our forward is that of transformers; largest difference' in capsys.readouterr().out
    found = json.loads(next((tmp_path / 'lm_checks').iterdir()).read_text())
    assert found['float32'] <= 1e-5 and found['dtype'] == 'float32' and found['layers'] == 3
    with monkeypatch.context() as m:
        m.setattr(lm_compare, 'compare', lambda lm: pytest.fail('it was compared already'))
        compare_once(lm, 'an LM', folder)
    assert capsys.readouterr().out == ''

    (tmp_path / 'file').touch()   # a folder that cannot be written: the LM is compared each time
    for _ in range(2):
        compare_once(lm, 'an LM', str(tmp_path / 'file' / 'lm_checks'))
        assert 'largest difference' in capsys.readouterr().out

    lm.hf.bfloat16()
    compare_once(lm, 'an LM', folder)
    assert 'in bfloat16' in capsys.readouterr().out
    another = FrozenLM(tiny_lm('qwen3', seed=1))
    compare_once(another, 'another', folder)
    assert len(list((tmp_path / 'lm_checks').iterdir())) == 3


def test_a_large_lm_is_compared_on_its_first_layers(monkeypatch, capsys):
    monkeypatch.setattr(lm_compare, 'WHOLE_BYTES', 1)
    monkeypatch.setattr(lm_compare, 'FIRST_LAYERS', 2)
    lm = FrozenLM(tiny_lm('gemma3_text'))
    whole = lm(torch.arange(9)[None])
    compare_once(lm, 'large', None)
    assert 'on its first 2 layers' in capsys.readouterr().out
    assert lm.n_layers == 3 and torch.equal(lm(torch.arange(9)[None]), whole)
    assert lm.hf.config.num_hidden_layers == 3


def test_an_error_inside_the_comparison_is_told_as_itself(monkeypatch):
    lm = FrozenLM(tiny_lm('llama'))

    def broken(*args, **kwargs):
        raise RuntimeError('no kernel for this')

    monkeypatch.setattr(lm.hf, 'forward', broken)
    with pytest.raises(ModelError, match="transformers' own forward .*RuntimeError: no kernel"):
        compare(lm)


def test_damaged_weights_are_refused():
    lm = FrozenLM(tiny_lm('llama'))
    lm.part(1, 'down').weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match='NaN or infinite .* damaged'):
        compare(lm)


def test_a_llama_under_another_name_is_taken_and_what_is_none_is_not():
    hf = tiny_lm('llama')
    hf.config.model_type = 'somebodys'
    lm = known_lm(hf)
    assert compare(lm)['float32'] <= 1e-5
    hf = tiny_lm('granite')
    hf.config.model_type = 'somebodys'
    hf.config.logits_scaling = 3.0
    assert compare(known_lm(hf))['float32'] <= 1e-5  # Granite's row fits

    def grown(module, args, out):
        return (out[0] * 1.01, *out[1:]) if isinstance(out, tuple) else out * 1.01

    hf.model.layers[0].register_forward_hook(grown)
    with pytest.raises(ModelError, match="'somebodys' is not known here: known are gpt2"):
        known_lm(hf)


def test_a_config_without_a_part_of_its_family_is_a_sentence():
    hf = tiny_lm('llama')
    del hf.model.layers[1].mlp
    with pytest.raises(ModelError, match="family is 'llama', and it lacks a part .*mlp"):
        known_lm(hf)


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(word_embed_proj_dim=16), 'embeddings are 16 wide and its layers 32'),
        (dict(do_layer_norm_before=False), 'norms behind attention'),
    ],
)
def test_an_opt_350m_is_refused_with_a_sentence(change, says):
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=56, num_hidden_layers=2, num_attention_heads=4,
        **(dict(word_embed_proj_dim=32) | change))
    with pytest.raises(ModelError, match=says):
        FrozenLM(transformers.OPTForCausalLM(config))


# --------------------------------------------------------------------------------------------------
# What is refused, in one sentence


def saved(tmp_path, hf):
    hf.save_pretrained(tmp_path / 'lm')
    return str(tmp_path / 'lm')


@pytest.mark.parametrize('family', ['t5', 'bart', 'mamba', 'bloom', 'bert'])
def test_what_has_no_row_is_refused_before_its_weights_are_read(family, tmp_path):
    """Encoder-decoder, state-space, ALiBi, encoder: the sentence lists the families that work."""
    config = transformers.AutoConfig.for_model(family)
    config.save_pretrained(tmp_path / 'lm')  # and no weights
    with pytest.raises(ModelError) as error:
        load_lm(str(tmp_path / 'lm'))
    said = str(error.value)
    assert f"the LM family '{family}' is not known here: known are gpt2, opt, " in said
    assert '\n' not in said


@pytest.mark.parametrize('family', ['t5', 'bart'])
def test_frozen_text_of_an_encoder_decoder_is_refused(family, tmp_path):
    transformers.AutoConfig.for_model(family).save_pretrained(tmp_path / 'lm')
    with pytest.raises(ModelError, match=f'is an encoder-decoder .{family}., whose hidden states'):
        frozen_text(str(tmp_path / 'lm'), [[3, 4, 5]], str(tmp_path / 'features'))


def test_frozen_text_knows_that_roberta_counts_positions_from_behind_its_padding(tmp_path):
    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=12)  # 10 tokens: padding is id 1
    name = saved(tmp_path, transformers.RobertaModel(config))
    hidden, _ = frozen_text(name, [list(range(3, 13))], str(tmp_path / 'features'))
    assert hidden.shape == (10, 32)
    with pytest.raises(ModelError, match='a text of 11 tokens is past the 10 positions of'):
        frozen_text(name, [list(range(3, 14))], str(tmp_path / 'features'))


@pytest.mark.parametrize('place', ['file', 'folder'])
def test_a_gguf_gets_the_command_that_dequantises_it(place, tmp_path):
    (tmp_path / 'small.gguf').write_bytes(b'GGUF' + bytes(60))
    name = tmp_path / 'small.gguf' if place == 'file' else tmp_path
    with pytest.raises(ModelError, match=r'small.gguf is a GGUF file.*gguf_file.*take --lm=lm') as e:
        load_lm(str(name))
    assert '\n' not in str(e.value)


def test_compiling_without_a_compiler_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(ModelError, match=r'--compile=True needs a C\+\+ compiler .*leave --compile out'):
        check_compiler('cpu')
    compiler = tmp_path / 'my-c++'
    compiler.write_text('#!/bin/sh\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', 'my-c++')
    check_compiler('cpu')


# --------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize('family', ['qwen3', 'llama', 'gemma3_text', 'gpt2'])
def test_weights_without_a_tokenizer_are_refused(family, tmp_path):
    """transformers 5 makes an empty tokenizer, which would read every text as nothing."""
    name = saved(tmp_path, tiny_lm(family))
    with pytest.raises(ModelError, match='tokenizer') as error:
        load_lm(name)
    assert '\n' not in str(error.value)


def tokenizer_with(before):
    """A tokenizer that puts the tokens `before` in front of each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ['<s>', '[UNK]', 'good', 'bad']
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, '[UNK]'))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if before:
        backend.post_processor = processors.TemplateProcessing(
            ' '.join(before) + ' $A', special_tokens=[('<s>', 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token='[UNK]', bos_token='<s>')


@pytest.mark.parametrize('n_bos', [0, 1, 2])
def test_a_tokenizer_with_no_one_or_two_bos_reads_an_empty_text(n_bos):
    """Its own tokens stay; a text without any becomes one token, and two BOS give a note."""
    tokenizer = tokenizer_with(['<s>'] * n_bos)
    ids, n_empty, _ = tokenize(tokenizer, ['', 'good'], 8)
    assert ids == [[0] * max(n_bos, 1), [0] * n_bos + [2]]
    assert n_empty == 1
    notes = tokenizer_notes(tokenizer)
    assert len(notes) == (n_bos == 2)
    assert all('puts the special token 0 2 times before each text' in note for note in notes)
