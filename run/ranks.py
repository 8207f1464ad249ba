"""
One process of several, on torch.distributed, once start() has been called under torchrun; else this
is rank 0 of 1, and nothing here does anything. Who trains on what is in train.py's loop: these are
the few ways in which the processes meet.
"""
import atexit
import os
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, N_RANKS = 0, 1
# how long ranks wait for rank 0 while it converts a corpus or downloads an LM
PATIENCE = timedelta(hours=2)


def start():
    """ Meets the others, by what torchrun has put in the environment. All but rank 0 are silent
    from here on. """
    global RANK, N_RANKS
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return
    RANK = int(os.environ.get('RANK', 0))
    N_RANKS = int(os.environ.get('WORLD_SIZE', 0))
    local = int(os.environ.get('LOCAL_RANK', 0))
    gpus = torch.cuda.device_count()
    if gpus and local >= gpus:
        sys.exit(f"process {local} of this machine has no GPU, as there are {gpus}: "
                 f"start torchrun with --nproc_per_node={gpus}.")
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpus else 'gloo', timeout=PATIENCE)
    if not gpus:   # NCCL's group would wait for the others
        atexit.register(close)
    if RANK:
        sys.stdout = open(os.devnull, 'w')


def leave():
    """ The end of a run: nobody leaves before rank 0 has written everything. A rank that stops with
    a sentence does not come here; torchrun then stops the others. """
    gathered(None)
    close()


def close():
    """ Ends the process group. A rank that exits with gloo's threads at work may be aborted (SIGABRT). """
    if N_RANKS > 1 and dist.is_initialized():
        dist.destroy_process_group()


def gathered(value):
    """ Every rank's value, in a list. """
    if N_RANKS == 1:
        return [value]
    out = [None] * N_RANKS
    dist.all_gather_object(out, value)
    return out


def agreed(value):
    """ Rank 0's value: what it sees on disk may be a moment older or newer than what the others
    see. """
    return gathered(value)[0]


@contextmanager
def first():
    """ Rank 0 goes through the block alone, so that the files it makes are there when the others
    come. """
    if RANK:
        gathered(None)
    yield
    if not RANK:
        gathered(None)


def any_of(flag):
    """ True if it is so on any rank. """
    if N_RANKS == 1:
        return bool(flag)
    flag = torch.tensor(int(bool(flag)))  # on the CPU: it waits for no GPU
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def summed(tensors):
    """ dict of [] tensors -> the sums over the ranks. """
    if N_RANKS == 1:
        return tensors
    flat = torch.stack([torch.as_tensor(v).float() for v in tensors.values()])
    dist.all_reduce(flat)
    return dict(zip(tensors, flat))


def shared(model, trained):
    """ The model whose gradients are averaged over the ranks in each backward pass; what is not
    among the names `trained` is left alone. """
    if N_RANKS == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel as DDP
    names = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    alone = [n for n in names if n not in trained]
    DDP._set_params_and_buffers_to_ignore_for_model(model, alone)
    return DDP(model, broadcast_buffers=False)


def unsynced(model, last):
    """ For a backward pass that is not a step's last: gradients stay on this rank. """
    return nullcontext() if N_RANKS == 1 or last else model.no_sync()


def shard(lm, among, device):
    """
    Each rank holds a share of the frozen LM's layers on its `device`, and gathers a linear's or
    norm's weights when it needs them (FSDP2); `among` the ranks of a 'node', or 'all'. The LM
    comes from the CPU, so no GPU ever holds all of it. We call a layer's parts one by one, so each
    part is a unit of its own; embeddings, which may be the LM head too, stay whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    size = int(os.environ['LOCAL_WORLD_SIZE']) if among == 'node' else N_RANKS
    mesh = init_device_mesh(device, (N_RANKS // size, size), mesh_dim_names=('copies', 'shares'))
    for layer in lm.parts['layers']:
        parts = [m for m in layer.modules() if any(True for _ in m.parameters(recurse=False))]
        for part in parts:
            fully_shard(part, mesh=mesh['shares'], reshard_after_forward=True)
