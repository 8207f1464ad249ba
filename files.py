"""
How a run's files are read and written, when the folder may come from a stranger.

Reading: regular files alone. A link could lead outside the folder, and a FIFO or a device could block the reader or
never end. Writing: to a new file of a random name, which then replaces the old file. So nothing is written through a
link that lies in the folder, two writers never share a file, and a reader sees the old file or the new one.
"""
import errno
import os
import secrets
import stat
from contextlib import contextmanager


def open_regular(path, mode='r', follow=False):
    """
    The open file `path` (mode 'r': UTF-8 text, 'rb': bytes, 'r+': text to read and write, made if missing). `follow`
    allows a link to a regular file: for paths that the user typed. Raises OSError, with a sentence in strerror where the
    file is a link or no regular file.
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
        raise _refusal(path, "is a link, and a run's files must be regular files: put the file itself there") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _refusal(path, "is a folder, a FIFO or a device, not a regular file: remove it")
    return os.fdopen(file, mode, encoding=None if 'b' in mode else 'utf-8')


def check_regular(path, follow=False):
    """ Raises OSError where `path` is missing, is no regular file, or is a link that `follow` does not allow. """
    open_regular(path, 'rb', follow).close()


def _refusal(path, sentence):
    return OSError(errno.EINVAL, sentence, str(path))


@contextmanager
def replacing(path):
    """
    The name of a new, empty file beside `path`. It replaces `path` when the block ends well, and is removed when the
    block raises. Raises OSError.
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
    """ Write a whole text file, UTF-8. A reader sees the old file or the new one, never half of it. """
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
    """ Make the folder `path` inside a run's folder. Raises OSError where a link or a file has that name. """
    if os.path.islink(path):
        raise _refusal(path, "is a link, and files are written into the run's own folder alone: remove it")
    os.makedirs(path, exist_ok=True)


def make_plain_folder(path):
    """
    Make the folder `path` inside a run's folder, for a library that opens its files by name: what lies in it and is a
    link or a special file goes. Raises OSError as make_folder does.
    """
    make_folder(path)
    for entry in os.scandir(path):
        if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
            os.remove(entry.path)


def remove_leftovers(folder):
    """ Remove the new files that killed writers left in a folder. Call it while no other process writes there. """
    for entry in os.scandir(folder):
        if entry.name.endswith('.new'):
            os.remove(entry.path)
