"""
What reads the text alone (LoRA on an LM, prompt tuning, probes of hidden states), how much of an LM
and of a dialogue is read, and the mean of a run's weights.

    python -m pytest -q tests/test_text_systems.py
"""
import json

import numpy as np
import pytest
import torch

from baselines.lora_lm import LoRALM
from fakes import (
    TINY,
    files_of_at_most,
    killed_in_batch,
    knobs_of_system,
    prompted,
    same_run,
    tiny_batch,
    tiny_deepmlf,
    tiny_lm,
    train,
)
from lm import FrozenLM
from model import PromptTuning
from run.average import WeightAverage
from run.clips import Clips
from run.errors import ModelError
from run.load_lm import cut_to_depth
from run.texts import tokenize, with_context
from tools import probe

SCORE = dict(kind='regression', range=[-3, 3])
CLASSES = dict(kind='classes', names=['angry', 'happy', 'neutral', 'sad'])
KNOBS = knobs_of_system(LoRALM, max_text_len=20, lora_rank=4, lora_alpha=8.0, lora_dropout=0.0,
                        dropout=0.0)


def lora_lm(family='llama', info=SCORE, **changes):
    torch.manual_seed(0)
    return LoRALM(FrozenLM(tiny_lm(family)), info, KNOBS | changes).eval()


def with_random_b(model):
    """ LoRA's B starts at zero; give it values, so that each update changes the output. """
    with torch.no_grad():
        for name, p in model.lora.named_parameters():
            if name.endswith('B'):
                p.normal_(std=0.2)
    return model


# --------------------------------------------------------------------------------------------------
# LoRA on an LM

PEFT_NAMES = {
    'llama': dict(q='self_attn.q_proj', k='self_attn.k_proj', v='self_attn.v_proj',
                  o='self_attn.o_proj', gate='mlp.gate_proj', up='mlp.up_proj', down='mlp.down_proj'),
    'gpt2': dict(qkv='attn.c_attn', o='attn.c_proj', up='mlp.c_fc', down='mlp.c_proj'),
}


@pytest.mark.parametrize('family, layers', [('llama', 'model.layers'), ('gpt2', 'transformer.h')])
def test_lora_lm_equals_pefts(family, layers):
    peft = pytest.importorskip('peft')
    ours, names = with_random_b(lora_lm(family)), PEFT_NAMES[family]
    theirs = peft.get_peft_model(tiny_lm(family), peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, fan_in_fan_out=family == 'gpt2',
        target_modules=[path.split('.')[-1] for path in names.values()])).eval()
    for l in range(3):
        for name, path in names.items():
            part = ours.lora[f'{l}_ffw'] if name in ('gate', 'up', 'down') else ours.lora
            lora = getattr(part, name) if part is not ours.lora else part[f'{l}_{name}']
            layer = theirs.get_submodule(f'base_model.model.{layers}.{l}.{path}')
            layer.lora_A['default'].weight.data.copy_(lora.A.data)
            layer.lora_B['default'].weight.data.copy_(lora.B.data)
    tokens = torch.arange(3, 15).view(2, 6)
    hidden = theirs(tokens, output_hidden_states=True).hidden_states[-1]  # [2,6,D]
    torch.testing.assert_close(ours.adapted[0](tokens), hidden, rtol=1e-5, atol=1e-5)
    ours.adapted[0](tokens).sum().backward()
    hidden.sum().backward()
    layer = theirs.get_submodule(f'base_model.model.{layers}.0.{names["o"]}')
    torch.testing.assert_close(
        ours.lora['0_o'].A.grad, layer.lora_A['default'].weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('on, n_trained', [(['q'], 3 * 1), (['v', 'ffw'], 3 * (1 + 3)), ([], 0)])
def test_lora_stands_on_the_listed_parts_and_starts_as_the_plain_lm(on, n_trained):
    model = lora_lm(lora_on=on)
    assert sum(name.endswith('.B') for name, _ in model.lora.named_parameters()) == n_trained
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(model.adapted[0](tokens), model.lm(tokens))
    with_random_b(model)
    assert torch.equal(model.adapted[0](tokens), model.lm(tokens)) == (on == [])


def test_the_lm_stays_plain_while_lora_trains():
    model = lora_lm()
    before, tokens = model.lm.fingerprint(), torch.arange(3, 12)[None]
    plain = model.lm(tokens)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(tiny_batch())['loss'].backward()
        optimizer.step()
    assert model.lm.fingerprint() == before and torch.equal(model.lm(tokens), plain)
    assert not torch.equal(model.adapted[0](tokens), plain)


def test_lora_lm_reads_each_text_alone_and_no_stream():
    model, batch = with_random_b(lora_lm('gpt2', lora_on=['o', 'ffw'])), tiny_batch()
    pred = model.predict(batch)['pred']
    for i, n in enumerate(batch['text_len']):
        one = dict(tokens=batch['tokens'][i:i + 1, :n], text_mask=batch['text_mask'][i:i + 1, :n])
        torch.testing.assert_close(model.predict(one)['pred'], pred[i:i + 1], rtol=1e-4, atol=1e-5)


def test_lora_lm_learns_classes():
    model, batch = lora_lm(info=CLASSES), tiny_batch()
    batch['label'] = torch.tensor([0, 3, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch)['loss'].backward()
        optimizer.step()
    out = model.predict(batch)
    assert out['pred'].tolist() == [0, 3, 2] and out['prob'].shape == (3, 4)


def test_a_part_of_a_packed_matrix_is_refused():
    with pytest.raises(ModelError, match='has q, k and v in one matrix, so list all three or none'):
        lora_lm('gpt2', lora_on=['q', 'ffw'])


# --------------------------------------------------------------------------------------------------
# How much of an LM is read

def test_a_depth_runs_the_first_layers_alone():
    from transformers import AutoModelForCausalLM
    whole = tiny_lm('llama')
    config = whole.config.__class__(**whole.config.to_dict() | dict(num_hidden_layers=2))
    shallow = AutoModelForCausalLM.from_config(config)
    shallow.load_state_dict(whole.state_dict(), strict=False)
    tokens = torch.arange(3, 12)[None]
    ours = cut_to_depth(FrozenLM(whole), 2)(tokens)
    torch.testing.assert_close(ours, FrozenLM(shallow)(tokens), rtol=0, atol=0)
    with pytest.raises(ModelError, match='lm_depth=4 is more than the 3 layers'):
        cut_to_depth(FrozenLM(tiny_lm('llama')), 4)


def test_the_heads_of_deepmlf_read_the_mean_or_the_last_token():
    batch = tiny_batch()
    for pool in ('last', 'mean'):
        model = tiny_deepmlf(text_pool=pool).eval()
        x_t, x_f, z, z_mask = model.streams_through_lm(batch)
        y = model.heads(x_t, x_f, z, z_mask, batch)['text']
        for i, n in enumerate(batch['text_len']):
            vector = x_t[i, :n].mean(0) if pool == 'mean' else x_t[i, n - 1]
            torch.testing.assert_close(model.text_head(vector)[0], y[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.predict(batch)['text'], y, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Prompt tuning

def test_prompt_tuning_sees_no_stream_and_trains_its_tokens(tokenizers, corpora):
    base = knobs_of_system(PromptTuning, system='prompt_tuning', n_pseudo=3, prompt='en')
    model, _, batch = prompted(corpora, tokenizers, 'bpe', 'llama', base=base)
    assert batch['audio'].shape[1] == 1 and not batch['audio_len'].any()
    out = model.predict(batch)
    without = {name: v for name, v in batch.items() if name.split('_')[0] not in ('audio', 'vision')}
    assert torch.equal(model.predict(without)['pred'], out['pred'])
    model(batch)['loss'].backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ['adapter.tokens'] and model.adapter.tokens.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------
# Dialogues

def test_context_puts_earlier_lines_of_the_dialogue_before_a_text():
    turns = [('a', 'Joey'), ('a', 'Ross'), ('b', 'Rachel'), ('a', 'Joey')]
    texts = ['One.', 'Two.', 'Three.', 'Four.']
    found = ['Joey: One.', 'Joey: One.\nRoss: Two.', 'Rachel: Three.', 'Ross: Two.\nJoey: Four.']
    assert with_context(texts, turns, 1, 1000) == found
    for longest in range(1, 40):
        assert with_context(texts, turns, 1, longest) == [text[-longest:] for text in found]
        everything = with_context(texts, turns, 3, 1000)
        assert with_context(texts, turns, 3, longest) == [text[-longest:] for text in everything]


@pytest.mark.parametrize('text, n', [('x' * 1000, 2000), ('', 20_000)])
def test_a_long_dialogue_takes_no_memory_that_grows_with_its_square(text, n):
    turns = [('a', 'Joey')] * n
    with pytest.raises(ModelError, match=f'With context={n} the texts .* lower this knob'):
        with_context([text] * n, turns, n, 128_000)
    assert len(with_context([text] * n, turns, 10, 128_000)) == n


@pytest.mark.parametrize('keep', ['start', 'end'])
def test_tokens_do_not_depend_on_the_pieces_of_the_texts(keep, tokenizers, monkeypatch):
    tokenizer = tokenizers['bpe']
    texts = [f'the film {i} was superb ' * (i % 5) for i in range(40)]
    whole = tokenize(tokenizer, texts, 9, keep=keep)
    assert whole[1] == 8 and whole[2] > 8
    monkeypatch.setattr('run.texts.PIECE', 100)
    assert tokenize(tokenizer, texts, 9, keep=keep) == whole
    assert tokenize(tokenizer, [], 9) == ([], 0, 0)


def test_a_corpus_without_dialogues_has_no_context(corpora, curriculum):
    with pytest.raises(SystemExit, match='does not hold the dialogue and the speaker of each clip'):
        train('config/lora_mosi_gemma.py', '--corpus=toy', f'--data_dir={corpora}',
              f'--lm={curriculum}/lm_toy', '--lm_depth=0', '--context=2')


def test_the_text_of_a_clip_is_read_as_it_is():
    clips = Clips(dict(streams={}, upper_case=False, widths={}, labels={}, name='', folder='',
                       sha256='', clips={}), [dict(id='1', text='A: Hi.\nB: No.')])
    assert with_context(clips.text('test'), clips.turns('test'), 3, 1000) == ['A: Hi.\nB: No.']


# --------------------------------------------------------------------------------------------------
# The mean of the weights

def test_the_average_is_a_mean_at_first_and_exponential_later():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage({'p': p}, n_steps=3)
    for step, value in enumerate([1.0, 2.0, 6.0, 9.0], 1):
        p.data.fill_(value)
        average.update(step)
    assert float(average.mean['p']) == pytest.approx(3 + (9 - 3) / 3)   # 3: of the first three
    with average.applied():
        assert float(p) == pytest.approx(5)
    assert float(p) == 9


def test_a_killed_lm_resumes_bitwise(corpora, tmp_path):
    """ Its folder hf has the weights at the end only; a resume reads the tokenizer from it. """
    flags = ['config/lm_toy.py', f'--data_dir={corpora}', *TINY, '--lm_vocab=60', '--save_interval=2']
    train(*flags, f'--out_dir={tmp_path}/whole')
    with killed_in_batch(6):
        train(*flags, f'--out_dir={tmp_path}/killed')
    train(*flags, f'--out_dir={tmp_path}/killed', '--resume=True')
    same_run(tmp_path / 'whole', tmp_path / 'killed')


def test_a_killed_run_with_averaged_weights_resumes_bitwise(corpora, tmp_path):
    flags = ['config/av_toy.py', f'--data_dir={corpora}', *TINY, '--average_epochs=0.5',
             '--save_interval=2', '--epochs=2']
    train(*flags, f'--out_dir={tmp_path}/whole')
    with killed_in_batch(6):
        train(*flags, f'--out_dir={tmp_path}/killed')
    train(*flags, f'--out_dir={tmp_path}/killed', '--resume=True')
    same_run(tmp_path / 'whole', tmp_path / 'killed')
    train(*flags[:-3], '--save_interval=2', '--epochs=2', f'--out_dir={tmp_path}/plain')
    a, b = (json.loads((tmp_path / d / 'result.json').read_text())['test'] for d in ('whole', 'plain'))
    assert a['mae'] != b['mae']


# --------------------------------------------------------------------------------------------------
# Probes

def test_ridge_equals_scikit_learns():
    linear_model = pytest.importorskip('sklearn.linear_model')
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    x -= x.mean(0)
    y = rng.normal(size=(50, 2))
    for strength, out in zip(probe.STRENGTHS, probe.ridge(dict(train=x, test=x[:5]), y)):
        theirs = linear_model.Ridge(alpha=strength).fit(x, y).predict(x[:5])
        np.testing.assert_allclose(out['test'], theirs, atol=1e-8)


@pytest.mark.parametrize('label, select', [('label', 'mae'), ('emotion', 'wf1')])
def test_a_probe_prints_its_layers_and_compares_runs(label, select, corpora, curriculum, tmp_path,
                                                     capsys):
    flags = ['config/lora_mosi_gemma.py', '--corpus=toy', f'--data_dir={corpora}',
             f'--lm={curriculum}/lm_toy', '--lm_depth=0', f'--label={label}', f'--select={select}',
             *TINY[:1]]
    train(*flags, '--max_steps=3', f'--out_dir={tmp_path}/run')
    capsys.readouterr()
    probe.main([*flags, f'--runs={tmp_path}/run'])
    out = capsys.readouterr().out
    assert f'last: valid {select}' in out and '| 4 ' in out and '| 5 ' not in out
    assert 'MLP, ' in out and '(n=5)' in out and 'nothing is claimed: n < 3' in out
    files = sorted((corpora / 'states').iterdir())
    probe.main(flags)
    assert sorted((corpora / 'states').iterdir()) == files
    assert capsys.readouterr().out.split('| test ')[1] in out
    files[0].write_bytes(files[0].read_bytes()[:-7])   # computed again, though it cannot be kept
    with files_of_at_most(3000):
        probe.main(flags)
    again = capsys.readouterr().out
    assert 'are not kept, because' in again
    assert again.split('| test ')[1] in out
    assert sorted((corpora / 'states').iterdir()) == files


def test_a_probe_refuses_a_system_without_a_frozen_lm_or_with_a_prompt(corpora, rated_lm):
    with pytest.raises(probe.EvalError, match='has no frozen LM'):
        probe.main(['config/av_toy.py', f'--data_dir={corpora}'])
    with pytest.raises(probe.EvalError, match='places for pseudo tokens around each text'):
        probe.main(['config/mse_toy.py', f'--data_dir={corpora}', f'--lm={rated_lm}/lm'])
