"""
How a run's files are read and written, when the folder may come from a stranger.

Reading: regular files alone. A link could lead outside the folder, and a FIFO or a device could
block the reader or never end. Writing: to a new file of a random name, which then replaces the old
file. So nothing is written through a link that lies in the folder, two writers never share a file,
and a reader sees the old file or the new one.
"""
import errno
import json
import os
import secrets
import stat
import zlib
from contextlib import contextmanager

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

import torch

from lm import ModelError


def open_regular(path, mode='r', follow=False):
    """
    The open file `path` (mode 'r': UTF-8 text, 'rb': bytes, 'r+': text to read and write, made if
    missing). `follow` allows a link to a regular file: for paths that the user typed. Raises
    OSError, with a sentence in strerror where the file is a link or no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT if mode == 'r+' else os.O_RDONLY
    flags |= getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)   # a FIFO is not waited for
    if not follow:
        flags |= getattr(os, 'O_NOFOLLOW', 0)
    try:
        file = os.open(path, flags, 0o666)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise _refusal(path, "is a link, and a run's files must be regular files: put the file "
                             "itself there") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _refusal(path, "is a folder, a FIFO or a device, not a regular file: remove it")
    return os.fdopen(file, mode, encoding=None if 'b' in mode else 'utf-8')


def check_regular(path, follow=False):
    """
    Raises OSError where `path` is missing, is no regular file, or is a link that `follow` does not
    allow.
    """
    open_regular(path, 'rb', follow).close()


def is_regular(path):
    """ Whether `path` is a regular file, and no link to one. """
    return os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode)


def _refusal(path, sentence):
    return OSError(errno.EINVAL, sentence, str(path))


@contextmanager
def replacing(path):
    """
    The name of a new, empty file beside `path`. It replaces `path` when the block ends well, and is
    removed when the block raises. Raises OSError.
    """
    new = f'{path}.{secrets.token_hex(4)}.new'
    open(new, 'xb').close()   # exclusive: neither follows a link nor takes another writer's file
    try:
        yield new
        os.replace(new, path)
    except BaseException:
        if os.path.exists(new):
            os.remove(new)
        raise


def write_text(path, text):
    """
    Write a whole text file, UTF-8. A reader sees the old file or the new one, never half of it.
    """
    write_bytes(path, text.encode('utf-8'))


def write_bytes(path, content):
    """ Write a whole file, as write_text does. """
    with replacing(path) as new, open(new, 'wb') as f:
        f.write(content)


def save_picture(figure, path, **options):
    """ Save a matplotlib figure as the PNG `path`, as write_text does; `options` go to savefig. """
    with replacing(path) as new:
        figure.savefig(new, format='png', **options)


def make_folder(path):
    """
    Make the folder `path` inside a run's folder. Raises OSError where a link or a file has that
    name.
    """
    if os.path.islink(path):
        raise _refusal(path, "is a link, and files are written into the run's own folder alone: "
                             "remove it")
    os.makedirs(path, exist_ok=True)


def make_plain_folder(path):
    """
    Make the folder `path` inside a run's folder, for a library that opens its files by name: what
    lies in it and is a link or a special file goes. Raises OSError as make_folder does.
    """
    make_folder(path)
    for entry in os.scandir(path):
        if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
            os.remove(entry.path)


def remove_leftovers(folder):
    """
    Remove the new files that killed writers left in a folder. Call it while no other process writes
    there.
    """
    for entry in os.scandir(folder):
        if entry.name.endswith('.new'):
            os.remove(entry.path)


def lock(folder):
    """
    The lock of a folder, an open file that goes with this process however that ends; None if
    another process has it. Where there is no such lock (Windows), everybody gets it. Raises OSError
    where the lock file is a link or no regular file.
    """
    file = open_regular(os.path.join(folder, '.lock'), 'r+')
    if not fcntl:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    return file


# -------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, tensors, info):
    """
    One safetensors file at `path`, with `info` (JSON) and a checksum of the tensors in its header
    and, for people, info in a .json beside it. Written under another name and renamed, so `path` is
    at any moment the old file or the new one. Raises ModelError on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        said = json.dumps(info)
        with replacing(path) as new:
            save_file(tensors, new, {'info': said, 'crc32': checksum(tensors, said)})
            with open(new, 'rb') as f:
                os.fsync(f.fileno())
        write_text(path.removesuffix('.safetensors') + '.json', json.dumps(info, indent=1))
    except (OSError, SafetensorError) as e:
        raise ModelError(f"could not save {path} ({e}): the checkpoint before it is untouched; make "
                         "room and --resume=True.") from None


def checksum(tensors, said):
    """
    8 hex digits of the text `said` and of all tensors' names and bytes: safetensors itself would
    read a flipped bit as another weight. CRC-32, as a hash would take seconds for a large `last`.
    """
    crc = zlib.crc32(said.encode())
    for name in sorted(tensors):
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(raw, zlib.crc32(name.encode(), crc))
    return f'{crc:08x}'


def load_checkpoint(path):
    """
    tensors, info of a file that save_checkpoint wrote. Raises ModelError where it is missing or
    damaged.
    """
    with _opened_checkpoint(path) as f:
        tensors, info = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
        if info.get('crc32') != checksum(tensors, info['info']):
            raise ValueError("its checksum does not fit")
        return tensors, json.loads(info['info'])


def load_info(path):
    """
    The info of a checkpoint alone, from the file's header. Raises ModelError as load_checkpoint
    does.
    """
    with _opened_checkpoint(path) as f:
        return json.loads(f.metadata()['info'])


@contextmanager
def _opened_checkpoint(path):
    """
    The open safetensors file. What goes wrong while it is read becomes a ModelError that names the
    file.
    """
    from safetensors import SafetensorError, safe_open
    if not os.path.lexists(path):
        raise ModelError(f"there is no checkpoint {path}: has that run finished its first "
                         "validation?")
    try:
        check_regular(path)
        with safe_open(path, 'pt') as f:
            yield f
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
        reason = getattr(e, 'strerror', None) or str(e)
        raise ModelError(f"{path} is damaged or not a checkpoint of ours ({reason[:120]}): remove "
                         "it, or take its other copy (best and last are two files).") from None


def own_tensors(model):
    """
    What a checkpoint holds: every parameter and persistent buffer outside the frozen LM, tied ones
    once.
    """
    persistent = model.state_dict()
    named = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k in persistent}
    return {k: v for k, v in named.items() if not k.startswith('lm.')}


@torch.no_grad()
def load_tensors(model, tensors, where):
    """
    Copy a checkpoint's tensors in. Strict both ways: names and shapes must be the model's own.
    Raises ModelError.
    """
    own = own_tensors(model)
    odd = sorted(set(own) ^ set(tensors))
    if odd:
        raise ModelError(f"{where} does not fit this model: {odd[0]!r} is in only one of the two "
                         f"({len(odd)} such names); was it trained with other knobs?")
    for name, v in own.items():
        if v.shape != tensors[name].shape:
            raise ModelError(f"{where} does not fit this model: {name} is "
                             f"{list(tensors[name].shape)} in the file and {list(v.shape)} here; a "
                             "corpus with other feature widths, another LM, or other knobs.")
        v.copy_(tensors[name])
