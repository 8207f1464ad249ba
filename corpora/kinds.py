"""
What a file is, from its first bytes, where it is not the pickle that it should be.
"""
import os
import re
import zipfile

# first bytes -> what the file is and what to do
MAGIC = {
    b'\x1f\x8b': "is compressed with gzip; unpack it with gunzip",
    b'BZh': "is compressed with bzip2; unpack it with bunzip2",
    b'\xfd7zXZ': "is compressed with xz; unpack it with unxz",
    b'7z\xbc\xaf': "is a 7z archive; unpack it and give the file inside",
    b'Rar!': "is a RAR archive; unpack it and give the file inside",
    b'\x89HDF': "is an HDF5 file, as of the CMU-MultimodalSDK (.csd); write a corpus folder from "
                "it with h5py, as in docs/corpora.md",
    b'\x93NUMPY': "is a NumPy array, the frames of one clip or of all; name it in a column of a "
                  "table (.csv), as in docs/corpora.md",
    b'%PDF': "is a PDF; give the corpus file itself",
    b'RIFF': "is a sound or video file; features are read, not recordings",
}


def other_kind(path):
    """ What a file is and what to do, as the end of a sentence; None where it may be a pickle. """
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        head = f.read(1 << 12)
    if not size:
        return "is empty (0 bytes); download it again"
    if head.startswith(b'version https://git-lfs'):
        real = re.search(rb'^size (\d+)$', head, re.M)
        n = f", which has {int(real[1])} bytes" if real else ''
        return (f"is a Git LFS pointer of {size} bytes and not the file itself{n}; get it with git "
                "lfs pull, or download it")
    if re.match(rb'\s*<(!doctype|html|head|\?xml|!--)', head, re.I):
        return ("is a web page, so the download gave a page in place of the file; open the address "
                "in a browser and download the file there")
    if head.startswith(b'PK\x03\x04'):
        return _kind_of_zip(path)
    if head[257:262] == b'ustar':
        return "is a tar archive; unpack it with tar -xf and give the file inside"
    for magic, sentence in MAGIC.items():
        if head.startswith(magic):
            return sentence
    return _kind_of_text(head)


def _kind_of_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "is the beginning of a zip archive that is not complete; download it again"
    if any(n.startswith('xl/') for n in names):
        return "is an Excel workbook; save it as CSV (UTF-8) and give that"
    if names and all(n.endswith('.npy') for n in names):
        return (f"is a .npz file with the arrays {', '.join(n[:-4] for n in names[:6])}; write a "
                "corpus folder from it, as in docs/corpora.md, or a table that names one such "
                "file a clip")
    if any(n.endswith('/data.pkl') for n in names):
        return ("is a file of torch.save; load it with torch.load(weights_only=True), convert its "
                "tensors with .numpy(), and write it with pickle.dump")
    return "is a zip archive; unpack it and give the file or folder inside"


def _kind_of_text(head):
    """ What a text file is. The pickles of protocol 0 are text too, but their first lines short. """
    line = head.lstrip(b'\xef\xbb\xbf').split(b'\n', 1)[0].rstrip(b'\r')
    if re.match(rb'\s*\{\s*"', line):
        return ("is JSON; a file with one object a line is read as a table if its name ends in "
                ".jsonl")
    if re.match(rb'[#<!/]', line):   # no pickle begins so
        return "is a text file; give a pickle, or a table (.csv, .tsv, .jsonl)"
    names = re.split(rb'[,;\t]', line)
    if len(names) >= 2 and all(re.fullmatch(rb'"?[\w .-]*"?', n) for n in names):
        columns = ', '.join(n.decode('ascii', 'replace').strip('"') for n in names[:6])
        return (f"is a table of text with the columns {columns}; rename it so that its name ends "
                "in .csv or .tsv")
    return None


def line_ends_were_changed(path):
    """ True for a binary file that was copied as text: each of its line feeds follows a CR. """
    with open(path, 'rb') as f:
        piece = f.read(4 << 20)
    n = piece.count(b'\n')
    return piece[:1] == b'\x80' and n >= 8 and n == piece.count(b'\r\n')
