"""
Reads and writes the files of a run's folder, which may come from a stranger.

Only regular files are read: a link could lead outside the folder, and a FIFO or a device could
block the reader or never end. A file is written under a new random name and then renamed. So
nothing is written through a link in the folder, two writers never share a file, and a reader sees
the complete old file or the complete new one.
"""
import errno
import json
import os
import re
import secrets
import shutil
import stat
import zlib
from contextlib import contextmanager

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

import torch

from run.errors import ModelError

REPLACED = ('config.json', 'log.jsonl')   # files of an earlier run that a run writes anew
# Files of an earlier run that a run removes. The first three stand for a finished run, so a resumed
# run removes them too.
REMOVED = ('result.json', 'report.md', 'report.html', 'last.safetensors', 'last.json',
           'best.safetensors', 'best.json', 'test.jsonl', 'curve.png', 'confusion.png')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))   # the checkout


def find_folder(name, folder='', out_dir=''):
    """
    The corpus or LM folder that a run names. A relative name starts where the run was trained: at
    the part of its `folder` before `out_dir`, its own path as it records it. Where that is unknown
    or has no such folder, the name starts in the current folder, and then in the checkout. Returns
    `name` itself if none of them has it; it may be an LM of the hub.
    """
    if not name:
        return name
    path, own = os.path.abspath(folder), os.path.normpath(out_dir)
    homes = [os.getcwd(), ROOT]
    if folder and path.endswith(os.sep + own):
        homes.insert(0, path[:-len(own)])
    for home in homes:
        found = os.path.join(home, name)
        if os.path.isdir(found):
            return name if os.path.isdir(name) and os.path.samefile(found, name) else found
    return name


def open_regular(path, mode='r', follow=False):
    """
    Open a regular file. mode 'r': UTF-8 text; 'rb': bytes; 'r+': text to read and write, created if
    missing. follow=True allows a link to a regular file, for paths that the user typed. Raises
    OSError; if the file is a link or no regular file, its strerror is a sentence for the user.
    """
    flags = os.O_RDWR | os.O_CREAT if mode == 'r+' else os.O_RDONLY
    flags |= getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0)   # do not wait for a FIFO
    if not follow:
        flags |= getattr(os, 'O_NOFOLLOW', 0)
    try:
        file = os.open(path, flags, 0o666)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise _refusal(path, "is a link, but a run's files must be regular files: replace it by "
                             "the file itself") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _refusal(path, "is a folder, a FIFO or a device, not a regular file: remove it")
    return os.fdopen(file, mode, encoding=None if 'b' in mode else 'utf-8')


def check_regular(path, follow=False):
    """ Raises OSError if open_regular cannot open `path`. """
    open_regular(path, 'rb', follow).close()


def is_regular(path):
    """ True if `path` is a regular file and not a link to one. """
    return os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode)


def _refusal(path, sentence):
    return OSError(errno.EINVAL, sentence, str(path))


@contextmanager
def replacing(path):
    """
    Yields the name of a new, empty file beside `path`. The file replaces `path` when the block
    ends, and is removed if the block raises. Raises OSError, which names `path`.
    """
    new = f'{path}.{secrets.token_hex(4)}.new'
    try:
        open(new, 'xb').close()   # 'x' follows no link and opens no file of another writer
        yield new
        os.replace(new, path)
    except BaseException as e:
        if os.path.exists(new):
            os.remove(new)
        if isinstance(e, OSError) and e.filename in (None, new):   # a full disk names no file
            e.filename, e.filename2 = str(path), None
        raise


def write_text(path, text):
    """
    Write a complete UTF-8 text file. A reader sees the old file or the new one, never a part.
    """
    write_bytes(path, text.encode('utf-8'))


def write_bytes(path, content):
    """ Write a complete file, as write_text does. """
    with replacing(path) as new, open(new, 'wb') as f:
        f.write(content)


def save_picture(figure, path):
    """ Save a matplotlib figure as the PNG `path`, as write_text does. """
    with replacing(path) as new:
        figure.savefig(new, format='png')


def make_folder(path):
    """ Make a folder inside a run's folder. Raises OSError if `path` is a link or a file. """
    if os.path.islink(path):
        raise _refusal(path, "is a link, but files are only written into the run's own folder: "
                             "remove it")
    os.makedirs(path, exist_ok=True)


def make_plain_folder(path):
    """
    Make a folder inside a run's folder, for a library that opens files in it by name. Links and
    special files in it are removed. Raises OSError as make_folder does.
    """
    make_folder(path)
    for entry in os.scandir(path):
        if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
            os.remove(entry.path)


def remove_leftovers(folder):
    """
    Remove the temporary files of writers that were killed: ours, and those of the safetensors
    package (.tmpAbC123). Call it only while no other process writes into the folder.
    """
    for entry in os.scandir(folder):
        is_leftover = re.fullmatch(r'.+\.[0-9a-f]{8}\.new|\.tmp[0-9A-Za-z]{6}', entry.name)
        if is_leftover and not entry.is_dir(follow_symlinks=False):
            os.remove(entry.path)


def save_hugging_face(model, folder):
    """
    Save a model of transformers as a folder inside a run's folder. transformers lets the
    safetensors package write the weights; see write_tensors. Raises OSError.
    """
    from safetensors import SafetensorError
    make_plain_folder(folder)
    remove_leftovers(folder)
    try:
        model.save_pretrained(folder)
    except SafetensorError as e:   # a full disk
        raise OSError(str(e)) from None
    for entry in os.scandir(folder):
        if entry.name.endswith('.safetensors'):
            shutil.copymode(os.path.join(folder, 'config.json'), entry.path)


def refuse_used_folder(folder, resume, fresh):
    """
    Raises ModelError if a run in `folder` would replace files of another run, or of other origin,
    or if there is nothing to resume.
    """
    held = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if 'last.safetensors' in held and not (resume or fresh):
        raise ModelError(f"{folder} already holds a run: --resume=True continues it with the same "
                         "knobs, --fresh=True deletes it and starts over, another --out_dir keeps it.")
    if resume and 'last.safetensors' not in held:
        raise ModelError(f"there is no checkpoint in {folder} to resume: start without "
                         "--resume=True.")
    ours = sorted(held & {*REPLACED, *REMOVED})
    if ours and not held & {'.lock', 'last.safetensors', 'best.safetensors'}:
        raise ModelError(f"{folder} holds a {ours[0]}, but neither a checkpoint nor the .lock of a "
                         "run: move that file away, or give another --out_dir.")


def lock(folder):
    """
    Lock a folder -> the open lock file, or None if another process holds the lock. The system frees
    the lock when this process ends in any way. On Windows, and on a file system without locks,
    every process gets the file. Raises OSError if the lock file is a link or no regular file.
    """
    file = open_regular(os.path.join(folder, '.lock'), 'r+')
    if not fcntl:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):   # the two errors of a lock that is held
        return None
    except OSError:   # the file system has no locks, such as some of a cluster
        pass
    return file


# -------------------------------------------------------------------------------------------------
# Checkpoints

# How a safetensors file names the dtypes of the tensors that we save
DTYPES = {
    torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16',
    torch.int64: 'I64', torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8',
    torch.uint8: 'U8', torch.bool: 'BOOL'}


def save_checkpoint(path, tensors, info):
    """
    Write tensors as one safetensors file at `path`, with `info` (JSON) and a checksum in its
    header. A .json file beside it shows info to people. Written by `replacing`, so `path` is the
    complete old file or the complete new one at any moment. Raises ModelError if the disk is full.
    """
    if odd := [name for name, v in tensors.items() if v.dtype not in DTYPES]:
        raise ModelError(f"could not save {path}: {odd[0]!r} is of {tensors[odd[0]].dtype}, which "
                         "no checkpoint of nanoMSA holds; convert it to float32.")
    try:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        info_text = json.dumps(info)
        with replacing(path) as new:
            header = {'info': info_text, 'crc32': checksum(tensors, info_text)}
            write_tensors(new, tensors, header)
        write_text(path.removesuffix('.safetensors') + '.json', json.dumps(info, indent=1))
    except OSError as e:
        raise ModelError(f"could not save {path} ({e.strerror or e}): free disk space. A checkpoint "
                         "that was saved before is intact, and --resume=True continues from it.") from None


def write_tensors(path, tensors, metadata):
    """
    Write tensors, contiguous and on the CPU, as a safetensors file: 8 bytes with the length of the
    header, the header, which is JSON, and the bytes of all tensors. The safetensors package would
    first write a file of its own beside `path`, which it leaves there if it is killed and which
    nobody but its owner may read.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))   # aligned
    header, end = {'__metadata__': metadata}, 0
    for name in order:
        v = tensors[name]
        begin, end = end, end + v.nbytes
        header[name] = dict(dtype=DTYPES[v.dtype], shape=list(v.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for name in order:
            f.write(bytes_of(tensors[name]))
        f.flush()
        os.fsync(f.fileno())


def bytes_of(tensor):
    """ The bytes of a contiguous tensor on the CPU: an array [n bytes] over the same memory. """
    return tensor.reshape(-1).view(torch.uint8).numpy()


def checksum(tensors, info_text):
    """
    CRC-32 of the info and of all tensors' names and bytes, as 8 hex digits. safetensors has no
    checksum and would read a flipped bit as another weight. A cryptographic hash would take seconds
    for a large `last` checkpoint.
    """
    crc = zlib.crc32(info_text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(bytes_of(tensors[name]), zlib.crc32(name.encode(), crc))
    return f'{crc:08x}'


def load_checkpoint(path):
    """ (tensors, info) of a checkpoint. Raises ModelError if it is missing or damaged. """
    with _opened_checkpoint(path) as f:
        tensors, info = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
        if info.get('crc32') != checksum(tensors, info['info']):
            raise ValueError("its checksum is wrong")
        return tensors, _info_in(info)


def load_info(path):
    """
    The info of a checkpoint, without its tensors. Raises ModelError as load_checkpoint does.
    """
    with _opened_checkpoint(path) as f:
        return _info_in(f.metadata())


def _info_in(metadata):
    try:
        return json.loads(metadata['info'])
    except RecursionError:
        raise ValueError("its header holds too many nested lists") from None


@contextmanager
def _opened_checkpoint(path):
    """ Yields the open safetensors file. Errors in the block become a ModelError with its name. """
    from safetensors import SafetensorError, safe_open
    if not os.path.lexists(path):
        raise ModelError(f"there is no checkpoint {path}: train that run at least until its first "
                         "validation.")
    try:
        check_regular(path)
        with safe_open(path, 'pt') as f:
            yield f
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
        reason = getattr(e, 'strerror', None) or str(e)
        raise ModelError(f"{path} is damaged or not a checkpoint of nanoMSA ({reason[:120]}): "
                         "restore a copy, or train the run again with --fresh=True.") from None


def own_tensors(model):
    """
    The tensors that a checkpoint holds, by name: all parameters and persistent buffers outside the
    frozen LM. Tied weights are in it once.
    """
    persistent = model.state_dict()
    buffers = {k: v for k, v in model.named_buffers() if k in persistent}
    named = dict(model.named_parameters()) | buffers
    return {k: v for k, v in named.items() if not k.startswith('lm.')}


@torch.no_grad()
def load_tensors(model, tensors, where):
    """
    Copy a checkpoint's tensors into the model. Raises ModelError unless it has exactly the model's
    names and shapes. `where` is the file's or folder's name for the message.
    """
    own = own_tensors(model)
    unmatched = sorted(set(own) ^ set(tensors))
    if unmatched:
        raise ModelError(f"{where} does not fit this model: {len(unmatched)} names, such as "
                         f"{unmatched[0]!r}, are only in the file or only in the model; use the "
                         "knobs that it was trained with.")
    for name, v in own.items():
        if v.shape != tensors[name].shape:
            raise ModelError(f"{where} does not fit this model: {name} is "
                             f"{list(tensors[name].shape)} in the file and {list(v.shape)} here; "
                             "use the corpus, LM and knobs that it was trained with.")
        v.copy_(tensors[name])
