"""
One process of several, on torch.distributed. torchrun sets RANK and WORLD_SIZE; alone, this is rank 0 of 1, and nothing here
does anything. Who trains on what is in train.py's loop: these are the few ways in which the processes meet.
"""
import atexit
import os
import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist

RANK, N_RANKS = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def start():
    """ Meets the others, once a process. All but rank 0 are silent from here on. """
    if N_RANKS == 1 or dist.is_initialized(): return
    if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')
    atexit.register(dist.destroy_process_group)
    if RANK: sys.stdout = open(os.devnull, 'w')


def gathered(value):
    """ Every rank's value, in a list. """
    if N_RANKS == 1: return [value]
    out = [None] * N_RANKS
    dist.all_gather_object(out, value)
    return out


def agreed(value):
    """ Rank 0's value: what it sees on disk may be a moment older or newer than what the others see. """
    return gathered(value)[0]


@contextmanager
def first():
    """ Rank 0 goes through the block alone, so that the files it makes are there when the others come. """
    if RANK: gathered(None)
    yield
    if not RANK: gathered(None)


def summed(tensors):
    """ dict of [] tensors -> the sums over the ranks. """
    if N_RANKS == 1: return tensors
    flat = torch.stack([torch.as_tensor(v).float() for v in tensors.values()])
    dist.all_reduce(flat)
    return dict(zip(tensors, flat))


def shared(model, trained):
    """ The model whose gradients are averaged over the ranks in each backward pass; what is not among the names `trained` is left alone. """
    if N_RANKS == 1: return model
    from torch.nn.parallel import DistributedDataParallel as DDP
    DDP._set_params_and_buffers_to_ignore_for_model(model, [n for n, _ in (*model.named_parameters(), *model.named_buffers()) if n not in trained])
    return DDP(model, broadcast_buffers=False)


def unsynced(model, last):
    """ For a backward pass that is not a step's last: gradients stay on this rank. """
    return nullcontext() if N_RANKS == 1 or last else model.no_sync()


def shard(lm, among):
    """
    Each rank holds a share of the frozen LM's layers, and gathers a linear's or norm's weights when it needs them (FSDP2); `among`
    the ranks of a 'node', or 'all'. We call a layer's parts one by one, so each part is a unit of its own; embeddings, which may
    be the LM head too, stay whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    size = int(os.environ['LOCAL_WORLD_SIZE']) if among == 'node' else N_RANKS
    mesh = init_device_mesh(lm.parts['embed'].weight.device.type, (N_RANKS // size, size), mesh_dim_names=('copies', 'shares'))['shares']
    for layer in lm.parts['layers']:
        for part in [m for m in layer.modules() if any(True for _ in m.parameters(recurse=False))]:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
