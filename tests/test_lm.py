"""
Loading an LM: every weight is in its files, no adapter lies beside them, a stranger's folder is
data, and the tokenizer cuts and counts as the run says.

    python -m pytest -q tests/test_lm.py
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data import Feed, open_corpus, tokenize
from fakes import HERE, KNOBS, MSE_KNOBS, knobs_of_system, tiny_lm
from lm import FrozenLM
from model import CrossSent, DeepMLF, MSEAdapterLM
from prompts import PROMPTS, Prompt, rated_texts
from run.errors import ModelError
from run.fingerprints import continuation, fingerprint
from run.frozen_text import frozen_text
from run.load_lm import (
    BUFFER,
    empty_lm,
    lm_config,
    load_encoder,
    load_lm,
    load_tokenizer,
)

WORDS = 'the film was really good bad boring fun and i loved it but hated this plot not at'.split()


# -------------------------------------------------------------------------------------------------
# What the tests stand on: small random models, and a tokenizer of whole words


def word_tokenizer(
    specials=('[PAD]', '[UNK]', '[CLS]', '[SEP]'), template='[CLS] $A [SEP]', **more
):
    """ A fast tokenizer with a token for each of WORDS; template: what it puts around a text. """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*specials, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token='[UNK]'))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(s, vocabulary[s]) for s in specials]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token='[PAD]',
        unk_token='[UNK]',
        cls_token='[CLS]',
        sep_token='[SEP]',
        eos_token='[SEP]',
        **more,
    )


N_TOKENS = 4 + len(WORDS)


def small(family, vocab=N_TOKENS, head=True, seed=0, **knobs):
    """ A random model of a family, 2 layers of width 32. """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    if family == 'gpt2':
        sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
    if family in ('llama', 'qwen2', 'glm', 'nemotron', 'arcee'):
        sizes |= dict(num_key_value_heads=2, pad_token_id=None, eos_token_id=0, bos_token_id=None)
    if family == 'glm':
        sizes |= dict(head_dim=8)
    config = AutoConfig.for_model(family, **(sizes | dict(vocab_size=vocab) | knobs))
    torch.manual_seed(seed)
    return (AutoModelForCausalLM if head else AutoModel).from_config(config).eval()


def saved(folder, family='llama', tokenizer=None, **knobs):
    """ A folder with a random model and its tokenizer -> (path, the model). """
    hf = small(family, **knobs)
    hf.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return str(folder), hf


def edit_weights(folder, change):
    """ Replace the tensors of a folder by change(tensors). """
    path = os.path.join(folder, 'model.safetensors')
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file(change(tensors), path, {'format': 'pt'})


def edit_json(folder, file='config.json', **entries):
    path = os.path.join(folder, file)
    with open(path) as f:
        content = json.load(f)
    with open(path, 'w') as f:
        json.dump(content | entries, f)


def one_sentence(error):
    """ The text of an error, which must be a single sentence on one line. """
    said = str(error.value)
    assert '\n' not in said and 'Traceback' not in said
    return said


TEXT = torch.tensor([[5, 9, 7, 12, 6]])


# -------------------------------------------------------------------------------------------------
# Weights that were not in the files


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'qwen2', 'glm'])
@pytest.mark.parametrize('tied', [True, False])
def test_a_whole_folder_loads_with_its_own_weights(family, tied, tmp_path):
    """
    Tied (the head is not in the file) and untied: every tensor is the saved model's, and so are the
    logits.
    """
    folder, hf = saved(tmp_path / 'lm', family, tie_word_embeddings=tied)
    names = set(load_file(tmp_path / 'lm' / 'model.safetensors'))
    assert ('lm_head.weight' in names) == (not tied)
    lm, tokenizer = load_lm(folder)
    for k, v in hf.state_dict().items():
        assert torch.equal(lm.hf.state_dict()[k], v), k
    torch.testing.assert_close(lm.lm_head(lm(TEXT)), hf(TEXT).logits, rtol=0, atol=1e-5)
    assert tokenizer.embedding_rows == N_TOKENS


def mapped_files(path):
    """ The address ranges of this process in which a file is mapped. """
    ranges = []
    with open('/proc/self/maps') as f:
        for line in f:
            if line.rstrip().endswith(str(path)):
                ranges.append([int(end, 16) for end in line.split()[0].split('-')])
    return ranges


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="reads Linux's /proc")
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_frozen_weights_stay_mapped_from_their_file(dtype, tmp_path):
    """ So all processes of a machine share one copy of a frozen LM, if its file has the dtype. """
    hf = small('llama').to(dtype)
    hf.save_pretrained(tmp_path / 'lm')
    word_tokenizer().save_pretrained(tmp_path / 'lm')
    lm, _ = load_lm(str(tmp_path / 'lm'), dtype)
    lm.to('cpu').eval()
    ranges = mapped_files(tmp_path / 'lm' / 'model.safetensors')
    for name, p in lm.hf.named_parameters():
        assert any(a <= p.data_ptr() < b for a, b in ranges), name


def drop(*parts):
    return lambda tensors: {
        k: v for k, v in tensors.items() if not any(part in k for part in parts)
    }


def prefixed(prefix):
    return lambda tensors: {prefix + k: v for k, v in tensors.items()}


@pytest.mark.parametrize(
    'family, tied, change, names',
    [
        ('llama', False, drop('lm_head'), ['lm_head.weight']),
        ('llama', True, drop('embed_tokens'), ['lm_head.weight', 'model.embed_tokens.weight']),
        (
            'qwen2',
            False,
            drop('layers.1.self_attn.k_proj.bias'),
            ['model.layers.1.self_attn.k_proj.bias'],
        ),
        ('gpt2', True, drop('h.0.mlp.c_fc.weight'), ['transformer.h.0.mlp.c_fc.weight']),
        ('gpt2', True, drop('ln_f'), ['transformer.ln_f.bias', 'transformer.ln_f.weight']),
        ('llama', False, drop('layers.1'), None),
        ('llama', False, prefixed('_orig_mod.'), None),
        ('glm', False, prefixed('base.'), None),
        ('gpt2', True, prefixed('module.'), None),
    ],
)
def test_weights_that_are_not_in_the_file_stop_the_run(family, tied, change, names, tmp_path):
    """ The right names and count are those that the file had before and lacks now. """
    folder, hf = saved(tmp_path / 'lm', family, tie_word_embeddings=tied)
    whole = len(load_file(tmp_path / 'lm' / 'model.safetensors'))
    edit_weights(folder, change)
    with pytest.raises(ModelError, match='are not in its files') as error:
        load_lm(folder)
    said = one_sentence(error)
    count = int(re.match(r'\d+', said)[0])
    if names:
        assert count == len(names) and all(name in said for name in names)
    else:
        left = set(load_file(tmp_path / 'lm' / 'model.safetensors')) & set(hf.state_dict())
        assert count >= whole - len(left)
    assert '--lm_init=random' in said
    lm, _ = load_lm(folder, random_init=True)  # for who wants that, it needs no weights
    assert lm.n_layers == 2


def test_a_base_model_has_no_untied_head_and_a_tied_one(tmp_path):
    for tied in (True, False):
        folder = str(tmp_path / f'base{tied}')
        hf = small('llama', head=False, tie_word_embeddings=tied)
        hf.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        if tied:
            assert torch.equal(load_lm(folder)[0].lm_head.weight, hf.embed_tokens.weight)
            continue
        with pytest.raises(ModelError, match=r'1 of the 21 weights .* \(lm_head.weight\)'):
            load_lm(folder)


def test_a_config_that_was_edited_stops_the_run(tmp_path):
    """
    Tied when it was saved and untied in the config; four layers in the config and two in the file;
    another width.
    """
    folder, _ = saved(tmp_path / 'untied', tie_word_embeddings=True)
    edit_json(folder, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r'1 of the 21 weights .* \(lm_head.weight\)'):
        load_lm(folder)
    folder, _ = saved(tmp_path / 'half')
    edit_json(folder, num_hidden_layers=4)
    with pytest.raises(
        ModelError, match=r'18 of the 39 weights .* \(model.layers.2.input_layernorm.weight, '
    ):
        load_lm(folder)
    folder, _ = saved(tmp_path / 'wide')
    edit_json(folder, intermediate_size=64)
    with pytest.raises(
        ModelError,
        match=r"6 of the 21 weights .* have another shape .*"
        r"mlp.down_proj.weight is \[32, 48\] in the file and "
        r"\[32, 64\] by config.json",
    ):
        load_lm(folder)


def test_weights_that_the_config_leaves_out_are_counted(tmp_path, capsys):
    """ The config.json of a smaller LM, of which no weight is missing. """
    folder, _ = saved(tmp_path / 'deep')
    load_lm(folder)
    assert 'are not used' not in capsys.readouterr().out
    edit_json(folder, num_hidden_layers=1)
    load_lm(folder)
    assert re.search(r"9 weights in the files of the LM .* are not used, first 'model.layers.1.",
                     capsys.readouterr().out)


def test_the_masks_of_old_gpt2_files_are_no_lost_weights():
    buffers = ['h.0.attn.bias', 'h.0.attn.masked_bias', 'layers.0.self_attn.rotary_emb.inv_freq']
    assert all(map(BUFFER.search, buffers))
    assert not BUFFER.search('h.0.attn.c_attn.bias')


def test_one_tensor_of_another_shape_stops_the_run(tmp_path):
    folder, _ = saved(tmp_path / 'lm')
    name = 'model.layers.1.mlp.up_proj.weight'
    edit_weights(folder, lambda tensors: tensors | {name: tensors[name][:-1].clone()})
    with pytest.raises(
        ModelError,
        match=r'1 of the 21 weights .*up_proj.weight is \[47, 32\] in the file and \[48, 32\]',
    ) as error:
        load_lm(folder)
    one_sentence(error)


def test_shards(tmp_path):
    """
    Whole ones load; one that lost a tensor is told by its name, though the index has it; one that
    is gone, by its file.
    """
    folder = str(tmp_path / 'lm')
    hf = small('llama')
    hf.save_pretrained(folder, max_shard_size='20KB')
    word_tokenizer().save_pretrained(folder)
    shards = sorted(f for f in os.listdir(folder) if f.endswith('.safetensors'))
    assert len(shards) > 2
    assert torch.equal(load_lm(folder)[0].lm_head.weight, hf.lm_head.weight)
    path = os.path.join(folder, shards[1])
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != gone}, path, {'format': 'pt'})
    with pytest.raises(ModelError, match=re.escape(f'({gone})')):
        load_lm(folder)
    os.remove(path)
    with pytest.raises(ModelError, match=f'could not be loaded .*{shards[1]}') as error:
        load_lm(folder)
    one_sentence(error)


@pytest.mark.parametrize('share', [0, 0.5, 0.999])
def test_a_truncated_file_is_a_sentence(share, tmp_path):
    folder, _ = saved(tmp_path / 'lm')
    path = tmp_path / 'lm' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelError, match='could not be loaded') as error:
        load_lm(folder)
    one_sentence(error)


def as_bin(folder, change=lambda tensors: tensors):
    """ The weights of a folder as pytorch_model.bin instead of model.safetensors. """
    path = os.path.join(folder, 'model.safetensors')
    torch.save(change(load_file(path)), os.path.join(folder, 'pytorch_model.bin'))
    os.remove(path)


def test_weights_as_a_pickle_are_checked_alike(tmp_path):
    folder, hf = saved(tmp_path / 'lm', tie_word_embeddings=False)
    as_bin(folder)
    assert torch.equal(load_lm(folder)[0].lm_head.weight, hf.lm_head.weight)
    torch.save(
        {k: v for k, v in hf.state_dict().items() if k != 'lm_head.weight'},
        tmp_path / 'lm' / 'pytorch_model.bin',
    )
    with pytest.raises(ModelError, match=r'\(lm_head.weight\)'):
        load_lm(folder)


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_encoders_may_lack_their_pooler_and_nothing_else(family, tmp_path):
    """
    For CrossSent and for text_features='frozen': the pooler is not used, whatever else is missing
    stops the run.
    """
    folder, hf = saved(tmp_path / 'lm', family, head=False)
    mask = torch.ones_like(TEXT).bool()
    rows = torch.arange(TEXT.numel())
    theirs = hf(TEXT).last_hidden_state
    edit_weights(folder, drop('pooler'))
    torch.testing.assert_close(
        load_encoder(folder)[0].eval()(TEXT, mask, rows), theirs, rtol=0, atol=1e-5
    )
    hidden, _ = frozen_text(folder, [TEXT[0].tolist()], str(tmp_path / 'features'))
    torch.testing.assert_close(torch.tensor(np.array(hidden)).float(), theirs[0], rtol=0, atol=5e-3)
    for i, (change, name) in enumerate(
        [
            (prefixed('module.'), 'embeddings.LayerNorm.bias'),
            (drop('layer.1.output.dense.bias'), 'encoder.layer.1.output.dense.bias'),
        ]
    ):
        broken = str(tmp_path / f'broken{i}')
        shutil.copytree(folder, broken)
        edit_weights(broken, change)
        for load in (load_encoder, lambda f: frozen_text(f, [[5, 6]], str(tmp_path / 'other'))):
            with pytest.raises(
                ModelError, match=re.escape(f'are not in its files ({name}')
            ) as error:
                load(broken)
            assert 'lm_init' not in one_sentence(error)  # that knob is for frozen LMs
    assert not (tmp_path / 'other').exists()


def test_frozen_text_of_a_causal_lm_needs_no_head(tmp_path):
    folder, hf = saved(tmp_path / 'lm', tie_word_embeddings=False)
    edit_weights(folder, drop('lm_head'))
    hidden, _ = frozen_text(folder, [TEXT[0].tolist()], str(tmp_path / 'features'))
    torch.testing.assert_close(
        torch.tensor(np.array(hidden)).float(),
        hf.model(TEXT).last_hidden_state[0],
        rtol=0,
        atol=5e-3,
    )


# -------------------------------------------------------------------------------------------------
# Adapters beside the weights

RANK, ALPHA = 4, 8
LORA = dict(
    peft_type='LORA',
    r=RANK,
    lora_alpha=ALPHA,
    target_modules=['q_proj', 'v_proj'],
    task_type='CAUSAL_LM',
)


def add_lora(folder, base, **more):
    """
    A LoRA on q_proj and v_proj of a Llama, in `folder` -> its matrices by the name of the weight
    that they change.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'adapter_config.json'), 'w') as f:
        json.dump(LORA | dict(base_model_name_or_path=base) | more, f)
    torch.manual_seed(3)
    sizes = dict(q_proj=32, v_proj=16)
    pairs = {
        f'model.layers.{i}.self_attn.{p}': (torch.randn(RANK, 32), torch.randn(n, RANK))
        for i in (0, 1)
        for p, n in sizes.items()
    }
    named = {
        f'base_model.model.{k}.lora_{w}.weight': v
        for k, pair in pairs.items()
        for w, v in zip('AB', pair)
    }
    save_file(named, os.path.join(folder, 'adapter_model.safetensors'), {'format': 'pt'})
    return pairs


def refusal(load, folder):
    with pytest.raises(ModelError, match='has an adapter') as error:
        load(folder)
    return one_sentence(error)


def run_command(said):
    """ Run the command that a sentence gives, in a shell. """
    command = re.search(r"(python -c '.*') \(needs pip install peft\)", said)[1]
    command = command.replace('python', shlex.quote(sys.executable), 1)
    ran = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE='1'),
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_a_lora_beside_the_weights_is_refused_and_the_command_merges_it(tmp_path):
    """
    The same sentence from every way to load; what the command makes is W + alpha / r B A, in a
    folder that loads.
    """
    pytest.importorskip('peft')
    folder, hf = saved(tmp_path / 'an lm')  # with a space, for the shell
    pairs = add_lora(folder, 'somebody/llama')
    said = {
        refusal(load, folder)
        for load in (
            load_lm,
            load_encoder,
            load_tokenizer,
            empty_lm,
            lm_config,
            lambda f: frozen_text(f, [[5]], str(tmp_path / 'x')),
        )
    }
    assert len(said) == 1
    run_command(said.pop())
    lm, tokenizer = load_lm(folder + '-merged')
    for k, v in hf.state_dict().items():
        a, b = pairs.get(k.removesuffix('.weight'), (torch.zeros(1, 1), torch.zeros(1, 1)))
        right = v + ALPHA / RANK * b @ a if a.numel() > 1 else v
        torch.testing.assert_close(lm.hf.state_dict()[k], right, rtol=0, atol=1e-5)
    assert tokenizer(['the film'])['input_ids'] == [[2, 4, 5, 3]]


def test_an_adapter_alone_is_merged_from_its_base(tmp_path):
    pytest.importorskip('peft')
    base, hf = saved(tmp_path / 'base')
    pairs = add_lora(tmp_path / 'lora', base)
    said = refusal(load_lm, str(tmp_path / 'lora'))
    run_command(said)
    lm, tokenizer = load_lm(str(tmp_path / 'lora-merged'))
    a, b = pairs['model.layers.1.self_attn.v_proj']
    right = hf.model.layers[1].self_attn.v_proj.weight + ALPHA / RANK * b @ a
    torch.testing.assert_close(
        lm.hf.model.layers[1].self_attn.v_proj.weight, right, rtol=0, atol=1e-5
    )
    assert tokenizer(['the film'])['input_ids'] == [[2, 4, 5, 3]]


def test_an_adapter_is_refused_without_peft_too(tmp_path):
    """ In a process that has no peft: the same sentence, to the letter. """
    folder, _ = saved(tmp_path / 'lm')
    add_lora(folder, 'somebody/llama')
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'peft' else find(n, *a)\n"
        "sys.modules['peft'] = None\n"
        "from run.errors import ModelError\n"
        "from run.load_lm import load_lm\n"
        f"try: load_lm({folder!r})\n"
        "except ModelError as e: print(e)"
    )
    ran = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE='1'),
    )
    assert ran.stdout.strip() == refusal(load_lm, folder)


def test_adapters_of_encoders_and_adapter_weights_alone(tmp_path):
    folder, _ = saved(tmp_path / 'bert', 'bert', head=False)
    add_lora(folder, 'somebody/bert', task_type='SEQ_CLS')
    assert 'AutoModelForSequenceClassification.from_pretrained' in refusal(load_encoder, folder)
    folder, _ = saved(tmp_path / 'lm')
    (tmp_path / 'lm' / 'adapter_model.bin').write_bytes(b'x')
    assert 'adapter_model.bin' in refusal(load_lm, folder)
    os.remove(tmp_path / 'lm' / 'adapter_model.bin')
    add_lora(
        tmp_path / 'lm' / 'checkpoint-500', folder
    )  # of a training that ended in these weights: nobody applies it
    load_lm(folder)


# -------------------------------------------------------------------------------------------------
# A stranger's folder is data

REMOTE = """
open({mark!r}, 'w').close()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = 'odd'
class Model(LlamaForCausalLM):
    config_class = Config
"""


def every_load(tmp_path):
    """ All ways to load an LM as data. """
    return [
        lambda f: lm_config(f, as_data=True),
        lambda f: empty_lm(f, as_data=True),
        lambda f: load_tokenizer(f, as_data=True),
        lambda f: load_lm(f, as_data=True),
        lambda f: load_lm(f, remote=True, as_data=True),
        lambda f: load_encoder(f, as_data=True),
        lambda f: frozen_text(f, [[5]], str(tmp_path / 'features'), as_data=True),
    ]


def test_a_plain_folder_loads_as_data_with_the_same_weights(tmp_path):
    folder, hf = saved(tmp_path / 'lm')
    lm, tokenizer = load_lm(folder, as_data=True)
    assert lm.fingerprint() == load_lm(folder)[0].fingerprint() == fingerprint(hf)
    assert tokenizer(['the film'])['input_ids'] == [[2, 4, 5, 3]]
    folder, _ = saved(tmp_path / 'bert', 'bert', head=False)
    load_encoder(folder, as_data=True)
    assert len(frozen_text(folder, [[5, 6]], str(tmp_path / 'features'), as_data=True)[0]) == 2


@pytest.mark.parametrize(
    'file, entries, model_type',
    [
        (
            'config.json',
            dict(auto_map={'AutoConfig': 'odd.Config', 'AutoModelForCausalLM': 'odd.Model'}),
            'odd',
        ),
        (
            'config.json',
            dict(auto_map={'AutoConfig': 'odd.Config', 'AutoModelForCausalLM': 'odd.Model'}),
            'llama',
        ),
        ('config.json', dict(text_config=dict(auto_map={'AutoConfig': 'odd.Config'})), 'llama'),
        ('tokenizer_config.json', dict(auto_map={'AutoTokenizer': ['odd.Config', None]}), 'llama'),
        ('tokenizer_config.json', dict(auto_map=['odd.Config', None]), 'llama'),
        ('processor_config.json', dict(auto_map={'AutoProcessor': 'odd.Config'}), 'llama'),
        ('config.json', dict(quantization_config=dict(quant_method='fp8')), 'llama'),
        ('config.json', dict(attn_implementation='somebody/kernel'), 'llama'),
        ('config.json', dict(_attn_implementation='flash_attention_2'), 'llama'),
        ('config.json', dict(_attn_implementation_internal={'': 'somebody/kernel'}), 'llama'),
        ('config.json', dict(experts_implementation='deepgemm'), 'llama'),
        ('config.json', dict(tokenizer_class='TransfoXLTokenizer'), 'llama'),
        ('tokenizer_config.json', dict(tokenizer_class='AutoModelForCausalLM'), 'llama'),
        ('tokenizer_config.json', dict(tokenizer_class='os.system'), 'llama'),
        ('tokenizer_config.json', dict(vocab_file='/etc/hostname'), 'llama'),
        ('tokenizer_config.json', dict(sudachi_kwargs=dict(sudachi_config_path='x')), 'llama'),
    ],
)
def test_what_asks_for_code_is_refused_and_nothing_runs(
    file, entries, model_type, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        'transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path / 'modules')
    )
    folder, _ = saved(tmp_path / 'lm')
    mark = str(tmp_path / 'ran')
    (tmp_path / 'lm' / 'odd.py').write_text(REMOTE.format(mark=mark))
    edit_json(folder, model_type=model_type)
    if not os.path.exists(os.path.join(folder, file)):
        (tmp_path / 'lm' / file).write_text('{}')
    edit_json(folder, file, **entries)
    for load in every_load(tmp_path):
        with pytest.raises(ModelError, match='asks to run') as error:
            load(folder)
        said = one_sentence(error)
        assert '--trust_remote_code=True on your own command line' in said and file in said
    assert (
        not os.path.exists(mark)
        and not (tmp_path / 'modules' / 'transformers_modules' / 'lm').exists()
    )


def test_an_lm_that_the_user_names_runs_no_code_either_until_allowed(tmp_path, monkeypatch):
    """
    A known family with auto_map is loaded by transformers' own class; an unknown one gets a
    sentence with the flag.
    """
    monkeypatch.setattr(
        'transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path / 'modules')
    )
    mark = str(tmp_path / 'ran')
    folder, hf = saved(tmp_path / 'lm')
    (tmp_path / 'lm' / 'odd.py').write_text(REMOTE.format(mark=mark))
    edit_json(folder, auto_map={'AutoConfig': 'odd.Config', 'AutoModelForCausalLM': 'odd.Model'})
    assert load_lm(folder)[0].fingerprint() == fingerprint(hf)
    edit_json(folder, model_type='odd')
    for load in (load_lm, load_tokenizer, empty_lm, load_encoder):
        with pytest.raises(
            ModelError,
            match='could not be loaded .*--trust_remote_code=True on your own command line',
        ) as error:
            load(folder)
        one_sentence(error)
    edit_json(folder, model_type='llama', attn_implementation='somebody/kernel')
    if int(transformers.__version__.split('.')[0]) >= 5:  # older ones do not read it from the file
        with pytest.raises(ModelError, match='asks for a kernel from the hub'):
            load_lm(folder)
    assert not os.path.exists(mark)
    edit_json(folder, model_type='odd', attn_implementation='eager')
    load_lm(folder, remote=True)
    assert os.path.exists(mark)


class Runs:
    """ A pickle that writes a file when it is read. """

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, 'w')


def test_pickled_weights_are_refused_as_data(tmp_path):
    folder, _ = saved(tmp_path / 'lm')
    torch.save(Runs(str(tmp_path / 'ran')), tmp_path / 'lm' / 'pytorch_model.bin')
    load_lm(folder, as_data=True)  # beside safetensors nobody reads it
    os.remove(tmp_path / 'lm' / 'model.safetensors')
    for load in every_load(tmp_path)[3:]:
        with pytest.raises(
            ModelError,
            match='has no model.safetensors, and one that a received folder names is read from',
        ) as error:
            load(folder)
        one_sentence(error)
    assert not (tmp_path / 'ran').exists()


def test_an_index_that_leads_out_is_refused_as_data(tmp_path):
    folder = str(tmp_path / 'lm')
    small('llama').save_pretrained(folder, max_shard_size='20KB')
    word_tokenizer().save_pretrained(folder)
    load_lm(folder, as_data=True)
    path = os.path.join(folder, 'model.safetensors.index.json')
    for shard in ('../other/model.safetensors', '/etc/hostname', 'pytorch_model.bin'):
        with open(path) as f:
            index = json.load(f)
        index['weight_map']['lm_head.weight'] = shard
        with open(path, 'w') as f:
            json.dump(index, f)
        with pytest.raises(ModelError, match='which is no safetensors file of its own folder'):
            load_lm(folder, as_data=True)


def test_special_files_are_refused_and_never_waited_for(tmp_path):
    for file in (
        'config.json',
        'model.safetensors',
        'tokenizer.json',
        'tokenizer_config.json',
        'tokenizer.model',
        'unrelated',
    ):
        folder, _ = saved(tmp_path / file)
        path = tmp_path / file / file
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        for load in (load_lm, *every_load(tmp_path)):
            with pytest.raises(ModelError, match='is neither a file nor a folder'):
                load(folder)
    folder, _ = saved(tmp_path / 'deep')
    (tmp_path / 'deep' / 'chat_templates').mkdir()
    os.mkfifo(tmp_path / 'deep' / 'chat_templates' / 'x.jinja')
    with pytest.raises(ModelError, match='is neither a file nor a folder'):
        load_lm(folder, as_data=True)
    with socket.socket(socket.AF_UNIX) as s:
        saved(tmp_path / 's')
        s.bind(os.path.relpath(tmp_path / 's' / 'sock'))  # a socket's path must be short
        with pytest.raises(ModelError, match='is neither a file nor a folder'):
            load_lm(str(tmp_path / 's'))
    with pytest.raises(ModelError, match='is no folder'):
        load_lm(str(tmp_path / 'deep' / 'config.json'))


def test_links_that_lead_out_are_refused_as_data(tmp_path):
    """
    But for the hub's own cache, whose files are links to its blobs, and links inside the folder.
    """
    outside, _ = saved(tmp_path / 'outside')
    for file in ('model.safetensors', 'tokenizer.json', 'README.md'):
        folder, _ = saved(tmp_path / f'lm{file}')
        path = tmp_path / f'lm{file}' / file
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.join(outside, file))
        with pytest.raises(ModelError, match='is a link to .* outside the LM.s folder'):
            load_lm(folder, as_data=True)
    folder, _ = saved(tmp_path / 'inner')
    os.rename(tmp_path / 'inner' / 'model.safetensors', tmp_path / 'inner' / 'weights')
    (tmp_path / 'inner' / 'model.safetensors').symlink_to('weights')
    load_lm(folder, as_data=True)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'hf').symlink_to(outside)
    load_lm(str(tmp_path / 'run'))
    with pytest.raises(ModelError, match='hf is a link'):
        load_lm(str(tmp_path / 'run'), as_data=True)
    load_lm(hub_cache(tmp_path / 'hub', outside), as_data=True)


def hub_cache(root, folder, name='somebody/llama', commit='a' * 40):
    """
    A cache as huggingface_hub has it, with the files of `folder` as one model -> its snapshot
    folder.
    """
    repo = root / ('models--' + name.replace('/', '--'))
    snapshot = repo / 'snapshots' / commit
    snapshot.mkdir(parents=True)
    (repo / 'blobs').mkdir(exist_ok=True)
    (repo / 'refs').mkdir(exist_ok=True)
    (repo / 'refs' / 'main').write_text(commit)
    for i, file in enumerate(sorted(os.listdir(folder))):
        shutil.copy(os.path.join(folder, file), repo / 'blobs' / f'{i:040x}')
        (snapshot / file).symlink_to(f'../../blobs/{i:040x}')
    return str(snapshot)


def test_a_hub_name_is_read_from_the_cache_as_data(tmp_path):
    """
    Offline: a plain LM loads; one with an adapter, an adapter alone, one that asks for code and one
    of pickles do not.
    """
    plain, hf = saved(tmp_path / 'plain')
    for name, change in dict(
        plain=lambda f: None,
        adapter=lambda f: add_lora(f, 'somebody/llama'),
        code=lambda f: edit_json(f, auto_map={'AutoConfig': 'odd.Config'}),
        bin=as_bin,
    ).items():
        folder = str(tmp_path / name)
        if name != 'plain':
            shutil.copytree(plain, folder)
        change(folder)
        hub_cache(tmp_path / 'hub', folder, f'somebody/{name}')
    add_lora(tmp_path / 'alone', 'somebody/plain')
    hub_cache(tmp_path / 'hub', str(tmp_path / 'alone'), 'somebody/alone')
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import json\n"
        "from run.errors import ModelError\n"
        "from run.load_lm import load_lm\n"
        "said = {}\n"
        "for name in ('plain', 'adapter', 'code', 'bin', 'alone', 'nothing'):\n"
        "    for as_data in (False, True):\n"
        "        key = f'{name} {as_data}'\n"
        "        try: said[key] = load_lm(f'somebody/{name}', as_data=as_data)[0].fingerprint()\n"
        "        except ModelError as e: said[key] = str(e)\n"
        "print(json.dumps(said))"
    )
    ran = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(tmp_path / 'hub')),
    )
    said = json.loads(ran.stdout.strip().splitlines()[-1])
    mark = fingerprint(hf)
    assert (
        said['plain False'] == said['plain True'] == said['code False'] == said['bin False'] == mark
    )
    for name in ('adapter', 'alone'):
        assert all('has an adapter' in said[f'{name} {as_data}'] for as_data in (False, True))
    assert 'asks to run' in said['code True'] and 'has no model.safetensors' in said['bin True']
    assert (
        'could not be loaded' in said['nothing True']
        and 'could not be loaded' in said['nothing False']
    )


def test_what_is_no_language_model_is_refused_as_data(tmp_path):
    folder, _ = saved(tmp_path / 'lm')
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(dict(model_type='vit', architectures=['ViTModel']), f)
    with pytest.raises(ModelError, match="of the kind 'vit', which is no language model"):
        lm_config(folder, as_data=True)
    for name in ('http://example.com/x', '../x/y', '/no/such/folder'):
        with pytest.raises(ModelError, match='could not be loaded'):
            lm_config(name)


@pytest.mark.parametrize('system', [DeepMLF, MSEAdapterLM, CrossSent])
def test_a_strangers_lm_is_built_as_data(system, tmp_path, corpora):
    """ By the knobs of a run, whose trust_remote_code a stranger may have set. """
    folder, _ = saved(tmp_path / 'lm')
    edit_json(folder, auto_map={'AutoConfig': 'odd.Config'})
    k = knobs_of_system(system, lm=folder, trust_remote_code=True)
    corpus = open_corpus('toy', corpora)
    with pytest.raises(ModelError, match='asks to run'):
        system.build(k, corpus, str(tmp_path), trained=True, as_data=True)


# -------------------------------------------------------------------------------------------------
# Tokenizer habits

LONG = ' '.join(WORDS[:10])


def habits(tmp_path):
    """ The same tokenizer with habits of its own, each saved and loaded again. """
    made = dict(
        plain=word_tokenizer(),
        left=word_tokenizer(truncation_side='left'),
        padding_left=word_tokenizer(padding_side='left'),
    )
    cut, cut_left, padded = word_tokenizer(), word_tokenizer(), word_tokenizer()
    cut.backend_tokenizer.enable_truncation(3)
    cut_left.backend_tokenizer.enable_truncation(5, stride=2, direction='left')
    padded.backend_tokenizer.enable_padding(
        length=16, pad_id=0, pad_token='[PAD]', direction='left'
    )
    made |= dict(cut=cut, cut_left=cut_left, padded=padded)
    for name, tokenizer in made.items():
        small('llama').config.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        # transformers may save without: as a file from elsewhere has it
        if name in ('cut', 'cut_left', 'padded'):
            tokenizer.backend_tokenizer.save(str(tmp_path / name / 'tokenizer.json'))
        yield name, load_tokenizer(str(tmp_path / name))


def test_no_habit_of_a_tokenizer_changes_the_tokens(tmp_path):
    """
    Right: [CLS], the first words (ids from 4 in the order of WORDS), [SEP]; nothing is cut or
    padded that need not be.
    """
    settings = json.loads((word_tokenizer().backend_tokenizer).to_str())
    assert settings['truncation'] is None
    for name, tokenizer in habits(tmp_path):
        side = tokenizer.truncation_side
        for special in (True, False):
            cls, sep = ([2], [3]) if special else ([], [])
            room = 6 - 2 * special
            ids, n_empty, n_cut = tokenize(tokenizer, [LONG, 'the film', 'fun'], 6, special)
            assert ids == [
                cls + list(range(4, 4 + room)) + sep,
                cls + [4, 5] + sep,
                cls + [11] + sep,
            ], name
            assert (n_empty, n_cut) == (0, 1)
            ids, _, n_cut = tokenize(tokenizer, [LONG], 50, special)
            assert ids == [cls + list(range(4, 14)) + sep] and n_cut == 0, name
        assert tokenizer.truncation_side == side  # the tokenizer's own is put back
    saved_settings = json.loads((tmp_path / 'cut' / 'tokenizer.json').read_text())
    # the test had the input that it is about
    assert saved_settings['truncation']['max_length'] == 3


def test_no_room_for_the_special_tokens_is_a_sentence():
    assert tokenize(word_tokenizer(), [LONG], 2)[0] == [[2, 3]]
    with pytest.raises(ModelError, match='max_text_len=1 has no room for the special') as error:
        tokenize(word_tokenizer(), [LONG], 1)
    one_sentence(error)


def test_words_and_tokens_are_cut_at_the_same_end(corpora):
    """
    resample='words': which word each token begins in, for a tokenizer that would cut the beginning.
    """
    feed = object.__new__(Feed)
    feed.k = dict(max_text_len=6)
    feed.streams, feed.first_word = (), 0
    assert feed._words(word_tokenizer(truncation_side='left'), 'test', [LONG]) == [
        [-1, 0, 1, 2, 3, -1]
    ]


def grown(tokenizer, *words):
    tokenizer.add_tokens(list(words))
    return tokenizer


class Texts:
    """ A corpus of a few texts, as much of it as Feed reads. """

    def __init__(self, texts):
        self.texts = texts
        self.labels = dict(label=dict(kind='regression', range=[-3, 3]))
        self.widths = {}
        self.n_clips = dict(train=len(texts))
        self.meta = {}

    def text(self, split):
        return list(self.texts)

    def label(self, split, name):
        return np.zeros(len(self.texts), np.float32)

    def id(self, split):
        return [f'clip{i}' for i in range(len(self.texts))]


def test_a_token_beyond_the_embedding_stops_before_training(tmp_path):
    """
    Only ids that a text has count: an added <pad>, or an added word that no text has, is no fault.
    """
    k = KNOBS | dict(data_dir=str(tmp_path), lowercase='never')
    model = object.__new__(DeepMLF)  # of which Feed asks what its class says
    torch.nn.Module.__init__(model)
    model.prompt = None
    for family, load in (('llama', load_lm), ('bert', load_encoder)):
        folder, _ = saved(
            tmp_path / family,
            family,
            head=family == 'llama',
            tokenizer=grown(word_tokenizer(), 'superb', 'dull', '<pad>'),
        )
        _, tokenizer = load(folder)
        assert len(tokenizer) == N_TOKENS + 3 and tokenizer.embedding_rows == N_TOKENS
        Feed(Texts(['the film', 'fun']), k, tokenizer, 'cpu', model)
        for text, reach in (('the superb film', N_TOKENS), ('superb dull', N_TOKENS + 1)):
            with pytest.raises(
                ModelError,
                match=f"ids reach {reach} in the texts of the split "
                "'train', and the embedding of the LM has "
                f"{N_TOKENS} rows",
            ) as error:
                Feed(Texts(['the film', text]), k, tokenizer, 'cpu', model)
            one_sentence(error)


def test_a_token_beyond_the_embedding_stops_frozen_text_too(tmp_path):
    folder, _ = saved(tmp_path / 'bert', 'bert', head=False)
    frozen_text(folder, [[2, N_TOKENS - 1, 3]], str(tmp_path / 'features'))
    with pytest.raises(ModelError, match=f'ids reach {N_TOKENS} .* has {N_TOKENS} rows'):
        frozen_text(folder, [[2, N_TOKENS, 3], [5]], str(tmp_path / 'features'))


@pytest.fixture(scope='module')
def bpe(corpora):
    """ A byte-level BPE tokenizer, as GPT-2 and Qwen have it, trained on prompts and labels. """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = open_corpus('toy', corpora)
    asked = PROMPTS['en']['regression'].format(low='-3.0', high='3.0')
    labels = [f'<Multimodal> </Multimodal>{asked} {i / 10:.1f}' for i in range(-30, 31)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=['<|end|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(rated_texts(corpus, 'train') + labels, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<|end|>')


def test_a_clip_is_rated_by_a_label_that_it_has():
    """ A clip may lack its emotion (-1) or its score (NaN): other runs do not read it. """
    labels = dict(label=dict(kind='regression', range=[-3, 3]),
                  emotion=dict(kind='classes', names=['joy', 'anger']))
    values = dict(label=np.float32([1.5, np.nan, 2.0, np.nan]), emotion=np.array([0, 1, -1, -1]))
    corpus = SimpleNamespace(labels=labels, text=lambda split: ['a', 'b', 'c', 'd'],
                             label=lambda split, name: values[name])
    texts = rated_texts(corpus, 'train')
    assert [t.split()[-1] for t in texts] == ['1.5', 'anger', '2.0', 'd'] and texts[3] == 'd'


def prompted(corpora, tokenizer):
    """ An MSE-Adapter on a tiny random LM, and a batch of three clips of the toy corpus. """
    corpus = open_corpus('toy', corpora)
    hf = tiny_lm()
    hf.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    hf.transformer.wpe = torch.nn.Embedding(256, 32)
    hf.config.n_positions = 256
    lm = FrozenLM(hf.eval())
    torch.manual_seed(1)
    model = MSEAdapterLM.assemble(MSE_KNOBS, corpus, lm, tokenizer).eval()
    feed = Feed(corpus, MSE_KNOBS, tokenizer, 'cpu', model)
    return model, feed('test', np.array([0, 1, 2]))


@pytest.mark.parametrize(
    'where, knobs',
    [('the prompt', dict()), ('the labels', dict()), ('the padding', dict(tgm_pool='padded'))],
)
def test_a_token_of_a_prompt_beyond_the_embedding(where, knobs, corpora, bpe):
    corpus = open_corpus('toy', corpora)
    model, _ = prompted(corpora, bpe)
    rows = len(model.lm.parts['embed'].weight)
    prompt = Prompt(model.k, corpus.labels['label'], bpe)
    if where == 'the prompt':
        prompt.after = prompt.after[:-1] + [rows]
    elif where == 'the labels':
        prompt.answers[3] = prompt.answers[3] + [rows]
    else:
        prompt.pad_id = rows
        MSEAdapterLM(model.lm, prompt, model.k, corpus.widths)  # nothing looks at it by default
    with pytest.raises(ModelError, match=f'ids reach {rows} in {where} .* has {rows} rows'):
        MSEAdapterLM(model.lm, prompt, model.k | knobs, corpus.widths)


# -------------------------------------------------------------------------------------------------
# What an adapter gives


@pytest.mark.parametrize(
    'change, shape',
    [
        (lambda y: y[:, :-1], '[3, 3, 32]'),
        (lambda y: torch.cat([y, y], 1), '[3, 8, 32]'),
        (lambda y: y[..., :16], '[3, 4, 16]'),
        (lambda y: y.transpose(0, 1), '[4, 3, 32]'),
        (lambda y: y[:1], '[1, 4, 32]'),
        (lambda y: y.mean(1), '[3, 32]'),
    ],
)
def test_an_adapter_of_another_shape(change, shape, corpora, bpe):
    model, batch = prompted(corpora, bpe)
    model(batch)
    right = model.adapter.forward
    model.adapter.forward = lambda *a: change(right(*a))
    for use in (model, model.predict):
        with pytest.raises(
            ModelError, match=re.escape(f'of shape {shape}, and the prompt takes [3, 4, 32]')
        ) as error:
            use(batch)
        one_sentence(error)
    assert model.embed_prompt(batch, adapter=False)[0].shape[0] == 3  # the LM alone needs none


def test_an_adapter_inside_the_weight_files_is_refused(tmp_path):
    """ transformers ignores such weights, and the base model alone would be taken for the tuned one. """
    for name in ('model.layers.0.self_attn.q_proj.lora_A.weight',
                 'base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight',
                 'base_model.model.lm_head.modules_to_save.default.weight'):
        folder, _ = saved(tmp_path / name)
        edit_weights(folder, lambda tensors: tensors | {name: torch.ones(2, 32)})
        with pytest.raises(ModelError, match=rf'1 weights of an adapter .*{re.escape(name)}'):
            load_lm(folder)


def test_a_continuation_ends_at_the_last_position_of_the_lm():
    class Tokenizer:
        def __call__(self, texts, **options):
            return dict(input_ids=[[1] * 90, [1] * 5])

        def decode(self, ids):
            return len(ids)

    lm = FrozenLM(tiny_lm('gpt2'))
    lm.max_positions = 12
    assert continuation(SimpleNamespace(lm=lm), Tokenizer()) == [12, 12]
