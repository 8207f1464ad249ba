"""
The checksums of a corpus folder: the entries `files` and `checksum` of meta.json.

`files` has an entry for each file: its size, its time, the CRC-32 of the whole file and that of a
sample. `checksum` is that of meta.json itself (run/json_files.sealed).
"""
import json
import os
import zlib

from run.folder import open_regular
from run.json_files import sealed

PIECE = 1 << 16     # bytes of a piece of the sample
N_PIECES = 16       # in the sample, evenly spaced; a file of at most 1 MiB is in it as a whole
CHANGED = ("differs from what the conversion wrote (if the change was intended, remove the entries "
           "files and checksum of meta.json)")


def write_meta(folder, meta):
    """ Write meta.json of a corpus folder, whose other files are complete, with its checksums. """
    paths = [p for p in sorted(folder.rglob('*')) if p.is_file() and p.parent != folder]
    files = {p.relative_to(folder).as_posix(): file_entry(p) for p in paths}
    text = json.dumps(sealed(meta | dict(files=files)), indent=1, ensure_ascii=False)
    (folder / 'meta.json').write_text(text, encoding='utf-8')


def file_entry(path):
    """ The entry of a file in `files`. """
    with open(path, 'rb') as f:
        stat = os.fstat(f.fileno())
        return dict(bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, crc32=whole_crc(f),
                    sample=sample_crc(f, stat.st_size))


def check_file(path, entry, whole=False):
    """
    Compare a regular file with its entry. The sample is always compared, and the whole file if its
    time is another one or whole=True. Raises ValueError if it differs, and OSError.
    """
    with open_regular(path, 'rb', follow=True) as f:
        stat = os.fstat(f.fileno())
        if stat.st_size != entry['bytes']:
            raise ValueError(f"has {stat.st_size} bytes and not {entry['bytes']}, so it {CHANGED}")
        touched = stat.st_mtime_ns != entry['mtime_ns']
        same = sample_crc(f, stat.st_size) == entry['sample']
        if same and (touched or whole):
            same = whole_crc(f) == entry['crc32']
        if not same:
            raise ValueError(CHANGED)
        if touched and not os.path.islink(path):
            # a copied folder has new times; with the old ones, the next start compares samples
            _set_time(f, path, stat.st_atime_ns, entry['mtime_ns'])


def _set_time(f, path, *times):
    """ Gives an open file times, in ns. By its descriptor: the path may have become a link. """
    try:
        os.utime(f.fileno() if os.utime in os.supports_fd else path, ns=times)
    except (OSError, OverflowError):
        pass   # another user's folder, a read-only disk, or no time: it is read again next time


def whole_crc(f):
    """ CRC-32 of an open file, as 8 hex digits. """
    crc = 0
    f.seek(0)
    while piece := f.read(1 << 20):
        crc = zlib.crc32(piece, crc)
    return f'{crc:08x}'


def sample_crc(f, n_bytes):
    """ CRC-32 of N_PIECES pieces of an open file, evenly spaced from its first to its last. """
    crc, step = 0, max(PIECE, (n_bytes - PIECE) // (N_PIECES - 1))
    for at in (*range(0, step * (N_PIECES - 1), step), max(0, n_bytes - PIECE)):
        f.seek(at)
        crc = zlib.crc32(f.read(PIECE), crc)
    return f'{crc:08x}'
