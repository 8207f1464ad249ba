"""
Distributed training (DDP, FSDP2) under torchrun. start() makes this process one of several ranks.
Without torchrun there is one process, rank 0, and the functions here do nothing. The loop in
train.py decides which rank trains on which micro-batch; this file only communicates between ranks.
"""
import atexit
import os
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, N_RANKS = 0, 1
STORE = None   # the key-value store that the ranks share
# how long the ranks wait for rank 0, which may convert a corpus or download an LM
PATIENCE = timedelta(hours=2)


def start():
    """ Join the process group that torchrun describes in the environment. Only rank 0 prints. """
    global RANK, N_RANKS, STORE
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return
    RANK = int(os.environ.get('RANK', 0))
    N_RANKS = int(os.environ['WORLD_SIZE'])
    local = int(os.environ.get('LOCAL_RANK', 0))
    gpus = torch.cuda.device_count()
    if gpus and local >= gpus:
        sys.exit(f"process {local} of this machine has no GPU, because there are only {gpus}: "
                 f"start torchrun with --nproc_per_node={gpus}.")
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpus else 'gloo', timeout=PATIENCE)
    if not gpus:   # with NCCL, closing at exit would wait for the other ranks
        atexit.register(close)   # where end_process is not called: after a traceback
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    STORE = dist.TCPStore(address, port, is_master=False)
    if RANK:
        sys.stdout = open(os.devnull, 'w')


def leave():
    """ The end of a run: wait until rank 0 has written everything, then end the process. """
    gathered(None)
    end_process(0)


def close():
    """ Leave the process group. Threads that DDP holds stay alive; see end_process. """
    if dist.is_initialized():
        dist.destroy_process_group()


def stop(sentence):
    """
    End a run that cannot continue: print one sentence and exit with status 1. Of several ranks only
    the first one that stops prints it. torchrun then ends the others.
    """
    if N_RANKS == 1:
        sys.exit(sentence)
    if is_first_to_stop():
        print(sentence, file=sys.stderr)
    end_process(1)


def is_first_to_stop():
    """ Whether no other rank has called this before. """
    try:
        return STORE.add('nanomsa stopped', 1) == 1
    except RuntimeError:   # the store has ended with another rank, which has printed
        return False


def end_process(status):
    """
    End this process at once, if it is one of several ranks. The normal end of Python may abort it
    (SIGABRT): a thread of gloo that drops the last reference to a tensor waits for the interpreter
    lock. If Python's finalization begins meanwhile, Python ends that thread inside a C++ destructor,
    and C++ then calls std::terminate. DDP keeps these threads alive even after close().
    """
    if N_RANKS == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def gathered(value):
    """ The values of all ranks, in a list. Waits for all ranks. """
    if N_RANKS == 1:
        return [value]
    out = [None] * N_RANKS
    dist.all_gather_object(out, value)
    return out


def agreed(value):
    """ Rank 0's value, on all ranks, so that they take the same branch (if a file exists, say). """
    return gathered(value)[0]


@contextmanager
def first():
    """ Rank 0 runs the block first, the others after it, so that they find the files it made. """
    if RANK:
        gathered(None)
    yield
    if not RANK:
        gathered(None)


def any_of(flag):
    """ True if `flag` is true on any rank. """
    if N_RANKS == 1:
        return bool(flag)
    flag = torch.tensor(int(bool(flag)))  # on the CPU, so that no rank waits for its GPU
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def summed(tensors):
    """ {name: tensor []} -> {name: sum over the ranks []}. """
    if N_RANKS == 1:
        return tensors
    flat = torch.stack([torch.as_tensor(v).float() for v in tensors.values()])
    dist.all_reduce(flat)
    return dict(zip(tensors, flat))


def shared(model, trained):
    """
    The model in DDP, which averages gradients over the ranks in each backward pass. DDP ignores
    parameters and buffers whose name is not in `trained`.
    """
    if N_RANKS == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel as DDP
    names = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    ignored = [n for n in names if n not in trained]
    DDP._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DDP(model, broadcast_buffers=False)


def unsynced(model, last):
    """ Context of a backward pass: DDP exchanges gradients only in the last one of a step. """
    return nullcontext() if N_RANKS == 1 or last else model.no_sync()


def shard(lm, among, device):
    """
    Shard the frozen LM's layers with FSDP2: each rank stores a share of each weight on its `device`
    and gathers the weights of a linear or norm when it computes it. among: the ranks of a 'node',
    each node with a whole copy, or 'all' ranks. The LM comes from the CPU, so that no GPU ever
    holds all of it. Each linear or norm is an FSDP unit of its own, because FrozenLM calls a
    layer's parts one by one. Embeddings, which may also be the LM head, are not sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    size = int(os.environ['LOCAL_WORLD_SIZE']) if among == 'node' else N_RANKS
    mesh = init_device_mesh(device, (N_RANKS // size, size), mesh_dim_names=('copies', 'shares'))
    for layer in lm.parts['layers']:
        parts = [m for m in layer.modules() if any(True for _ in m.parameters(recurse=False))]
        for part in parts:
            fully_shard(part, mesh=mesh['shares'], reshard_after_forward=True)
