"""
tools/bench.py --vs=paper: an estimate of a training step of pseudo tokens with LMs that are not
available here.
"""
import sys

import torch

from metrics import markdown_table
from model import SYSTEMS
from tools.bench_plain import plain_way
from tools.random_clips import SHAPES

# layers, width, width of all keys, width of the FFW, vocabulary, whether the LM head has its own
# weights, number of GPUs
LMS = {
    'Qwen2.5-1.5B': (28, 1536, 256, 8960, 151936, False, 1),
    'SmolLM2-1.7B': (24, 2048, 2048, 8192, 49152, False, 1),
    'Llama-2-7B': (32, 4096, 4096, 11008, 32000, True, 1),
    'Llama-2-70B, sharded over all GPUs': (80, 8192, 1024, 28672, 32000, True, 64),
    'Llama-2-70B, sharded over each node of 8': (80, 8192, 1024, 28672, 32000, True, 64),
}


def gb(n):
    return f'{n / 1e9:.1f} GB'


def on_paper(k, layers, D, D_kv, ffw, V, own_head, n_gpus, in_node):
    """ The estimate for one LM as the cells of a table row: a step of batch_size clips per GPU,
    with bfloat16 weights and activations and a float32 adapter. """
    _, d_a, _, d_v, _ = SHAPES[k['shapes']]
    with torch.device('meta'):
        system = SYSTEMS[k['system']]
        adapter = plain_way(system).adapter(system, k, dict(audio=d_a, vision=d_v), D)
    if adapter is None:
        sys.exit("bench: vs='paper' needs a system with pseudo tokens and a frozen LM: choose a "
                 "config of MSE-Adapter or CMPTA.")
    trained = sum(p.numel() for p in adapter.parameters())
    tokens = 15 + k['n_pseudo'] + 60  # text, pseudo tokens, prompt and answer
    layer = 2 * D * D + 2 * D * D_kv + 3 * D * ffw
    weights = 2 * layers * layer  # bytes of the layers, which can be sharded
    unsharded = 2 * V * D * (1 + own_head)  # bytes of embeddings and LM head
    # bytes of activations per clip: those that norms, attention and the gated FFW keep for the
    # backward pass; with checkpoint_lm the input of each layer, and those of one layer
    kept = 2 * layers * (8 * D + 3 * ffw) * tokens
    checkpointed = 2 * layers * D * tokens + kept / layers

    tera, near, far = k['gpu']
    clips = k['batch_size']  # on a GPU
    shards = 8 if in_node else n_gpus  # GPUs that the weights are sharded over
    flop = clips * tokens * 4 * layers * layer  # forward, and backward to the pseudo tokens
    computing = flop / (tera * 1e12 * k['gpu_share'])  # s
    traffic = 2 * weights * (1 - 1 / shards)  # bytes gathered in the forward and backward pass
    moving = traffic / (1e9 * (near if in_node else far))  # s
    gathering = f'{gb(traffic)}, {moving:.2f} s, {1.5 * moving:.2f} s'
    return [
        f'{trained / 1e6:.2f} M',
        gb(weights / shards + unsharded),
        f'{16 * trained / 1e6:.0f} MB',
        f'{gb(clips * kept)}, {gb(clips * checkpointed)}',
        f'{flop / 1e12:.0f} TFLOP, {computing:.2f} s, {1.5 * computing:.2f} s',
        gathering if shards > 1 else '-',
        f'{4 * trained / 1e6:.0f} MB' if n_gpus > 1 else '-',
    ]


def count_on_paper(k, folder):
    """ Prints the table of estimates. """
    tera, near, far = k['gpu']
    rows = []
    for name, lm in LMS.items():
        rows.append([f'{name} x {lm[-1]}'] + on_paper(k, *lm, in_node='node' in name))
    print(f"{k['system']} at {k['shapes']}, {k['batch_size']} clips per GPU and step, "
          f"{k['gpu_share']:.0%} of {tera:g} TFLOP/s, {near:g} GB/s in and {far:g} between nodes\n")
    print(markdown_table([
        'LM x GPUs',
        'trained weights',
        'LM per GPU',
        'adapter, its gradient and moments',
        'activations: without, with checkpoint_lm',
        'computing: without, with checkpoint_lm',
        'gathering weights: without, with checkpoint_lm',
        'gradients sent'], rows))
