"""
Helpers that several test files share: tiny random models, small corpora, and functions that run the
repository's scripts in this process.
"""

import hashlib
import json
import math
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

# set before huggingface_hub is imported, which would otherwise retry downloads for half a minute
os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import data
from adapters import AVEncoder
from configurator import class_knobs, configure, declared_knobs
from corpora.convert import convert
from corpora.unpickle import CorpusError
from data import Feed, open_corpus
from lm import FAMILIES, FrozenLM
from model import CMPTALM, SYSTEMS, DeepMLF, MSEAdapterLM
from run.folder import load_checkpoint, save_checkpoint
from run.json_files import sealed

HERE = Path(__file__).resolve().parent.parent  # the repository
PARENT = HERE.parent


# what a tiny LM of a family needs besides the sizes of a Llama; a variant stands behind a colon
LLAMA_SIZES = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
GEMMA_CAPS = dict(
    head_dim=8,
    query_pre_attn_scalar=24,
    attn_logit_softcapping=0.5,
    final_logit_softcapping=0.4,
    sliding_window=64,
)
VARIANTS = {
    'gpt2': dict(n_embd=32, n_layer=3, n_head=4, n_positions=128),
    'opt': dict(num_key_value_heads=4, ffn_dim=56, word_embed_proj_dim=32),
    'gpt_neox': dict(num_key_value_heads=4),
    'gpt_neox:serial': dict(num_key_value_heads=4, use_parallel_residual=False),
    'llama:scaled': dict(
        rope_scaling=dict(
            rope_type='llama3',
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    'mistral': dict(sliding_window=64),
    'qwen3': dict(head_dim=8),
    'qwen3_moe': dict(
        head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    'helium': dict(head_dim=8),
    'ernie4_5': dict(head_dim=8),
    'nemotron': dict(head_dim=8),
    'starcoder2': dict(sliding_window=64),
    'stablelm:norms': dict(qk_layernorm=True),
    'stablelm:parallel': dict(use_parallel_residual=True),
    'smollm3': dict(no_rope_layers=[1, 0, 1]),
    'phi3:partial': dict(partial_rotary_factor=0.5),
    'phi3:long': dict(
        original_max_position_embeddings=64,
        rope_scaling=dict(type='longrope', short_factor=[1.5] * 4, long_factor=[2.0] * 4),
    ),
    'glm': dict(head_dim=8),
    'glm4': dict(head_dim=8),
    'granite': dict(
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=4.0,
    ),
    'cohere:norms': dict(use_qk_norm=True),
    'olmo': dict(clip_qkv=0.3),
    'gemma': dict(head_dim=8),
    'gemma2': GEMMA_CAPS,
    'gemma3_text': dict(
        head_dim=8,
        query_pre_attn_scalar=24,
        sliding_window=64,
        layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
    ),
}
EVERY_LM = sorted(set(FAMILIES) | set(VARIANTS))


def tiny_lm(family='gpt2', seed=0):
    """
    A random Hugging Face LM of a family, or of a variant in VARIANTS: width 32, 3 layers, 60
    tokens. Every weight gets noise, because norms of 1 and biases of 0 would hide errors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    size = VARIANTS.get(family, {})
    if family != 'gpt2':
        size = LLAMA_SIZES | size
    try:
        config = AutoConfig.for_model(
            family.split(':')[0],
            vocab_size=60,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
            **size,
        )
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(seed)
    try:
        hf = AutoModelForCausalLM.from_config(config).eval()
    except AttributeError:  # transformers 4 gives norms without bias a bias's start
        if family != 'stablelm:norms':
            raise
        pytest.skip('this transformers cannot make a StableLM with norms of q and k')
    with torch.no_grad():
        for p in hf.parameters():
            p += 0.1 * torch.randn_like(p)
    return hf


def knobs_of_system(cls, **changes):
    """ The knobs of a run: the defaults of train.py and of a system's class, with changes. """
    known = declared_knobs(HERE / 'train.py')[0] | class_knobs(cls)
    assert set(changes) <= set(known), set(changes) - set(known)
    return known | changes


KNOBS = knobs_of_system(
    DeepMLF,
    mm_layers=[2, 3],
    max_text_len=20,
    n_fusion=4,
    mm_heads=4,
    lora_rank=4,
    lora_alpha=8.0,
    lora_dropout=0.0,
    dropout=0.0,
    head_width=8,
    text_reg='none',
    text_reg_rate=0.1,
    text_reg_prob=0.5,
)


def tiny_deepmlf(family='gpt2', **knobs):
    return DeepMLF(
        FrozenLM(tiny_lm(family)),
        AVEncoder(dict(audio=5, vision=7), 12, 2, 3, av_len=9, dropout=0.0, seqaug_rate=0.0),
        KNOBS | knobs,
    )


def tiny_batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = dict(
        tokens=torch.tensor([9, 4, 1]),
        audio=torch.tensor([20, 0, 3]),
        vision=torch.tensor([6, 11, 0]),
    )
    real = {k: torch.arange(int(n.max())) < n[:, None] for k, n in lengths.items()}
    batch = dict(
        tokens=torch.randint(3, 60, (3, 9), generator=g),
        text_len=lengths['tokens'],
        text_mask=real['tokens'],
        text_rows=torch.tensor([*range(9), *range(9, 13), 18]),
        targets=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]),
        label=torch.randn(3, generator=g),
        index=torch.arange(3),
    )
    for stream, width in dict(audio=5, vision=7).items():
        x = torch.randn(3, int(lengths[stream].max()), width, generator=g) * real[stream][..., None]
        batch |= {stream: x, f'{stream}_len': lengths[stream], f'{stream}_mask': real[stream]}
    return batch


def clip_alone(batch, i):
    """ Clip i of tiny_batch as a batch of one without padding. An empty stream keeps one row. """
    one = {k: t[i : i + 1] for k, t in batch.items() if k != 'targets'}
    one['text_rows'] = torch.arange(int(batch['text_len'][i]))
    cut = {'tokens': 'text_len'}
    for stream in ('text', 'audio', 'vision'):
        cut |= {stream: f'{stream}_len', f'{stream}_mask': f'{stream}_len'}
    for k in cut.keys() & one.keys():
        one[k] = one[k][:, : max(1, int(batch[cut[k]][i]))]
    return one


def fingerprint(module):
    whole = hashlib.sha256()
    for t in module.state_dict().values():
        whole.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


ENV = os.environ | {'HF_HUB_OFFLINE': '1'}  # test_smoke sets it for this process


def train(*argv):
    """ Run train.py in this process with these arguments -> its globals. May raise SystemExit. """
    before = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ['train.py', *map(str, argv)]
    try:
        return runpy.run_path(str(HERE / 'train.py'), run_name='__main__')
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGINT, before[1])


TINY = ['--batch_size=16', '--log_interval=3', '--max_steps=11', '--device=cpu']


def deepmlf(corpora, out, name, *more):
    return [
        'config/deepmlf_toy.py',
        f'--data_dir={corpora}',
        f'--out_dir={out}/{name}',
        f'--lm={out}/lm_toy',
        f'--av_from={out}/av_toy',
        *TINY,
        *more,
    ]


def forge(folder, knobs=None, header=True, **about):
    """
    Change knobs and other entries of `about` in result.json and, with header=True, in the
    checkpoint's header. Both get valid checksums.
    """
    path = folder / 'result.json'
    result = json.loads(path.read_text())
    result['about'] |= about
    result['about']['knobs'] |= knobs or {}
    path.write_text(json.dumps(sealed(result)))
    if header:
        tensors, info = load_checkpoint(str(folder / 'best.safetensors'))
        save_checkpoint(
            str(folder / 'best.safetensors'), tensors, info | dict(about=result['about'])
        )


class Killed(BaseException):
    """ Simulates kill -9: a BaseException, so that no `except Exception` catches it. """


def torchrun(*argv, n=2, cwd=HERE):
    """ Run train.py (or a worker.py) in n processes -> (exit status, printed output). """
    is_worker = str(argv[0]).endswith('worker.py')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += [f'--nproc_per_node={n}', *([] if is_worker else [HERE / 'train.py']), *argv]
    env = ENV | {'OMP_NUM_THREADS': '1', 'PYTHONFAULTHANDLER': '1'}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@contextmanager
def killed_in_batch(n):
    """ Training in the block is killed at its n-th batch. Fails if it has fewer batches. """
    real, left = data.get_batch, n

    def dying(*args, **more):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as m, pytest.raises(Killed):
        m.setattr(data, 'get_batch', dying)
        yield


def make_corpus(tmp_path, name, **change):
    """
    Write a small pickle in M-SENA's layout -> the flag --corpus=.. for it. change: key -> a
    function of (split, value) that returns the new value, or None to leave the key out.
    """
    rng, source = np.random.default_rng(0), {}
    for split, n in (('train', 40), ('valid', 16), ('test', 16)):
        audio = rng.normal(size=(n, 6, 5)).astype('f4')
        vision = rng.normal(size=(n, 4, 3)).astype('f4')
        n_a = rng.integers(1, 7, n)
        for i in range(n):
            audio[i, n_a[i] :] = 0
        source[split] = dict(
            raw_text=['THE FILM WAS GOOD'] * n,
            audio=audio,
            vision=vision,
            audio_lengths=n_a.tolist(),
            vision_lengths=[4] * n,
            regression_labels=rng.uniform(-3, 3, n).astype('f4'),
            id=[f'{split}{i}' for i in range(n)],
        )
        for key, f in change.items():
            source[split][key] = f(split, source[split][key])
            if source[split][key] is None:
                del source[split][key]
    pickle.dump(source, open(tmp_path / f'{name}.pkl', 'wb'), protocol=4)
    return f'--corpus={tmp_path}/{name}.pkl'


def of_width(d):
    """ For make_corpus: random streams of width d with 6 frames in each clip. """

    def change(split, x):
        return np.random.default_rng(1).normal(size=(len(x), 6, d)).astype('f4')

    return change


def with_value_at(index, value):
    """ For make_corpus: set the entry at `index` of the train split to `value`. """

    def change(split, x):
        if split == 'train':
            x[index] = value
        return x

    return change


@contextmanager
def alarm(seconds, error):
    """ Raises `error` in the block if it takes longer, for example because it waits for a FIFO. """
    def ring(*_):
        raise error

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def files_of_at_most(n_bytes):
    """ In the block no file can grow past n_bytes, as on a full disk. """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def without_checksums(folder):
    """ Removes the checksums of a corpus folder, as after a change that is intended. """
    path = Path(folder) / 'meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    del meta['files'], meta['checksum']
    path.write_text(json.dumps(meta), encoding='utf-8')


def same_run(a, b):
    """ Asserts that two run folders have equal checkpoints, logs (without times) and metrics. """
    for kind in ('best', 'last'):
        x, y = load_file(a / f'{kind}.safetensors'), load_file(b / f'{kind}.safetensors')
        assert x.keys() == y.keys()
        for k in x:
            assert torch.equal(x[k], y[k]), (kind, k)
    assert log_without_times(a) == log_without_times(b)
    assert json.load(open(a / 'result.json'))['test'] == json.load(open(b / 'result.json'))['test']


def log_without_times(folder):
    lines = [json.loads(line) for line in open(folder / 'log.jsonl')]
    return [
        {k: v for k, v in line.items() if k not in ('seconds', 'samples_per_s')} for line in lines
    ]


def command(script, *argv):
    """ Run a script in this process with these arguments. May raise SystemExit. """
    before, sys.argv = sys.argv, [script, *map(str, argv)]
    try:
        runpy.run_path(str(HERE / script), run_name='__main__')
    finally:
        sys.argv = before


class TinyTokenizer:
    """ A tokenizer that makes every text one token, 9, between the special tokens 2 and 3. """

    eos_token_id, bos_token_id, pad_token_id = 3, 2, 0

    def __call__(self, texts, add_special_tokens=True, **_):
        return {
            'input_ids': [[2] * add_special_tokens + [9] + [3] * add_special_tokens for t in texts]
        }


def tiny_bert(family='bert', seed=0):
    """ A random Hugging Face text encoder: width 32, 3 layers, 60 tokens. """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        family,
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=40,
        pad_token_id=1 if family in ('roberta', 'camembert') else 0,
    )
    torch.manual_seed(seed)
    hf = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p += 0.1 * torch.randn_like(p)
    return hf


GOLDEN = PARENT / 'shared' / 'golden'
TOLERANCE = 2e-5


def golden(name, prefix):
    """ ({name: tensor} of one case, {name: tensor} that all cases share) of a golden file. """
    z = np.load(GOLDEN / name)

    def arrays(prefix):
        own = [k for k in z.files if k.startswith(prefix)]
        return {k.removeprefix(prefix): torch.tensor(z[k]) for k in own}

    return arrays(prefix), arrays('meta.')


needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(),
    reason="../shared/golden is missing; these arrays are not in the repository",
)


rng = np.random.default_rng(0)


def msena(n=(6, 3, 2), L=7, d_a=5, d_v=2, lengths=True):
    """ A small dict in M-SENA's layout. Clip i has 1 + i % L valid frames of audio and vision. """
    source = {}
    for split, N in zip(('train', 'valid', 'test'), n):
        length = 1 + np.arange(N) % L
        pad = (np.arange(L) < length[:, None])[..., None]
        source[split] = dict(
            raw_text=[f'text {i} of {split}' for i in range(N)],
            id=[f'{split}$_${i}' for i in range(N)],
            audio=(rng.normal(size=(N, L, d_a)) * pad).astype(np.float32),
            vision=(rng.normal(size=(N, L, d_v)) * pad).astype(np.float64),
            text=np.zeros((N, 50, 768), np.float32),
            annotations=np.array(['Neutral'] * N),
            regression_labels=np.linspace(-2.5, 2.5, N).astype(np.float32),
        )
        if lengths:
            source[split].update(audio_lengths=length.tolist(), vision_lengths=length)
    return source


def save(tree, path, protocol=4):
    with open(path, 'wb') as f:
        pickle.dump(tree, f, protocol)
    return str(path)


MSE_KNOBS = knobs_of_system(
    MSEAdapterLM,
    system='mse',
    lm='tiny',
    max_text_len=48,
    mse_width=8,
    lstm_audio=6,
    lstm_vision=5,
    msf_scales=[1, 2, 4],
    head_width=8,
    batch_size=16,
)
CMPTA_KNOBS = knobs_of_system(
    CMPTALM,
    system='cmpta',
    lm='tiny',
    max_text_len=48,
    cmpta_width=8,
    cmpta_heads=2,
    dropout=0.0,
    head_width=8,
    batch_size=16,
)


def prompted(
    corpora,
    tokenizers,
    kind='bpe',
    family='gpt2',
    split='test',
    clips=(0, 1, 2),
    base=MSE_KNOBS,
    **changes,
):
    """
    A pseudo-token system on a tiny random LM, its Feed of the small toy corpus, and a batch of
    three clips. kind: the name of a tokenizer in `tokenizers`. base, changes: the knobs.
    """
    assert set(changes) <= set(base), set(changes) - set(base)
    k, tokenizer, corpus = base | changes, tokenizers[kind], open_corpus('toy', corpora)
    n_tokens = tokenizer.sp.vocab_size() if kind == 'sentencepiece' else len(tokenizer)
    hf = tiny_lm(family)
    hf.resize_token_embeddings(n_tokens, mean_resizing=False)
    hf.eval()
    hf.config.max_position_embeddings = hf.config.n_positions = 256
    if getattr(hf.config, 'sliding_window', None):
        hf.config.sliding_window = 256
    if family == 'gpt2':
        hf.transformer.wpe = nn.Embedding(256, 32)
    lm = FrozenLM(hf)
    torch.manual_seed(1)
    model = SYSTEMS[k['system']].assemble(k, corpus, lm, tokenizer).eval()
    feed = Feed(corpus, k, tokenizer, 'cpu', model)
    return model, feed, feed(split, np.array(clips))


def mutate_pickles(tmp_path, n, seed=1):
    """
    Convert n randomly damaged pickles, and assert that each one converts or raises a CorpusError of
    one line -> {True: number that converted, False: number that raised}.
    """
    r, outcomes = random.Random(seed), {True: 0, False: 0}
    for trial in range(n):
        if trial % 100 == 0:
            tree = msena(n=(3, 2, 2), L=3)
            for s in tree.values():
                del s['text']
            originals = [pickle.dumps(tree, p) for p in range(6)]
        raw = bytearray(originals[trial % 6])
        for _ in range(r.choice([1, 1, 2, 5])):
            i = r.randrange(len(raw))
            how = r.randrange(3)
            if how == 0:
                raw[i] = r.randrange(256)
            elif how == 1:
                del raw[i : i + r.choice([1, 4, 40])]
            else:
                raw[i:i] = raw[r.randrange(len(raw)) :][: r.choice([1, 8, 80])]
        (tmp_path / 'x.pkl').write_bytes(raw)
        try:
            convert(str(tmp_path / 'x.pkl'), str(tmp_path / str(trial)))
        except CorpusError as e:
            outcomes[False] += 1
            assert str(e) and '\n' not in str(e)
        else:
            outcomes[True] += 1
            shutil.rmtree(tmp_path / str(trial))
    return outcomes


def script_knobs():
    """ The globals of a small script at its call of configure. """
    return dict(
        out_dir='out',
        learning_rate=1e-3,
        dropout=0.1,
        batch_size=32,
        compile=False,
        maybe=None,
        mm_layers=[2, 3],
        needs=[],
        scales=(0.5, 1.0),
        mark='#',
        _hidden=3,
        math=math,
        __name__='__main__',
    )


def random_flags(n, seed=0):
    """
    Assert that n random flags each set a value of the knob's type or stop with one sentence.
    """
    rng = random.Random(seed)
    for _ in range(n):
        key = rng.choice(list(configure(script_knobs(), [])))
        text = ''.join(
            rng.choices("0123456789eE.,+-_[](){}'\"#=\\ nNoTrueainf\0", k=rng.randrange(8))
        )
        try:
            value = configure(script_knobs(), [f'--{key}={text}'], echo=False)[key]
        except SystemExit as e:
            assert str(e).startswith('config: ') and '\n' not in str(e)
            continue
        default = script_knobs()[key]
        assert default is None or type(value) is type(default), (key, text, value)
        assert value == value


def run_prompted(rated_lm, corpora, name, config='mse_toy', *more):
    """ A run of 6 steps on the LM of the fixture rated_lm, in its folder `name` -> result.json. """
    train(
        f'config/{config}.py',
        f'--data_dir={corpora}',
        f'--out_dir={rated_lm}/{name}',
        f'--lm={rated_lm}/lm',
        '--batch_size=16',
        '--max_steps=6',
        '--device=cpu',
        *more,
    )
    return json.load(open(rated_lm / name / 'result.json'))


class LetterTokenizer:
    """
    A tokenizer with one token a character and no BOS, EOS or padding. With `known`, other letters
    have no token.
    """

    eos_token_id = bos_token_id = pad_token_id = None

    def __init__(self, known=None):
        self.known = known

    def __call__(self, texts, **_):
        return {
            'input_ids': [
                [ord(ch) if self.known is None or ch in self.known else 0 for ch in t]
                for t in texts
            ]
        }

    def decode(self, ids):
        return ''.join(map(chr, ids))
