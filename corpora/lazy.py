"""
Lazy payloads and arrays: they stay in the pickle until their values are needed.
"""
import codecs
import io
import math
import os
import re
import tempfile

import numpy as np


class Refused(Exception):
    """ The pickle asks for something that no corpus needs. """


class Py2Str(str):
    """ A Python 2 str (a text, or an array's bytes), read as Latin-1, which keeps every byte. """


class Unread:
    """ Stands for an object of a type that is not read, such as a torch tensor. name: its type. """
    __slots__ = ('name',)

    def __init__(self, name):
        self.name = {'torch._utils._rebuild_tensor_v2': 'torch.Tensor'}.get(name, name)


class Lazy:
    """
    Bytes or text that stay in the file: n_bytes from `offset` on. codec: how they are encoded in
    the file; None: bytes that are not encoded.
    """
    __slots__ = ('file', 'offset', 'n_bytes', 'codec', 'is_text')

    def __init__(self, file, offset, n_bytes, codec=None, is_text=False):
        self.file = file
        self.offset = offset
        self.n_bytes = n_bytes
        self.codec = codec
        self.is_text = is_text

    def chunks(self, size=4 << 20):
        """
        The payload as bytes, in pieces. In protocols 0 to 2, pickle writes bytes as text, one
        character per byte; such a payload is decoded.
        """
        done = 0
        carry = b''
        if self.codec not in (None, 'py2 repr'):
            decoder = codecs.getincrementaldecoder(self.codec)()
        while done < self.n_bytes:
            self.file.seek(self.offset + done)
            piece = self.file.read(min(size, self.n_bytes - done))
            if not piece:
                raise EOFError
            done += len(piece)
            if self.codec == 'py2 repr':
                piece = carry + piece
                # decode up to the last complete escape, and keep the rest for the next piece
                whole = re.match(rb'(?:[^\\]+|\\x..|\\[^x])*', piece, re.DOTALL).end()
                if done == self.n_bytes:
                    whole = len(piece)
                piece, carry = codecs.escape_decode(piece[:whole])[0], piece[whole:]
            elif self.codec:
                piece = decoder.decode(piece, done == self.n_bytes).encode('latin1')
            yield piece

    def value(self):
        """ The whole payload, as str or bytes. """
        if not self.is_text:
            return b''.join(self.chunks())
        self.file.seek(self.offset)
        return decode(self.file.read(self.n_bytes), self.codec)


def decode(b, codec):
    return b.decode(codec, 'surrogatepass' if codec == 'utf-8' else 'strict')


class Dtype:
    """
    A numpy dtype of a plain kind, built from its entries in the pickle without numpy's own
    unpickling. Raises Refused for other kinds.
    """
    __slots__ = ('np',)

    def __init__(self, code, *_):
        code = code.decode('latin1') if type(code) is bytes else code
        if not re.fullmatch(r'b1|[iu][1248]|f[248]|[SU][1-9]\d{0,8}|O[48]?', code):
            raise Refused(f"holds an array of dtype {ascii(code)[:40]}; only plain numbers and "
                          "text are read")
        self.np = np.dtype('O' if code[0] == 'O' else '<' + code)

    def build(self, state):
        # (version, byte order, subdtype, names, fields, itemsize, alignment, flags[, metadata])
        order, parts, itemsize = state[1], state[2:5], state[5]
        if any(p is not None for p in parts):
            raise Refused("holds an array of a structured dtype; only plain numbers and text are "
                          "read")
        contradicts = self.np.kind != 'O' and itemsize not in (-1, self.np.itemsize)
        if order not in ('<', '>', '|', '=') or contradicts:
            raise ValueError("the entries of a dtype contradict each other")
        if order == '>':
            self.np = self.np.newbyteorder('>')


class Scratch:
    """
    A file without a name that holds the decoded copies of a pickle's arrays, one behind the other:
    with a file for each of thousands of arrays, a process would run out of handles.
    """
    __slots__ = ('folder', 'file', 'n_users')

    def __init__(self, folder=None):
        self.folder = folder
        self.file = None
        self.n_users = 0

    def add(self, pieces):
        """ Writes a copy -> (file, its offset, its bytes). """
        if self.file is None:
            self.file = tempfile.TemporaryFile(dir=self.folder)
        offset = self.file.seek(0, os.SEEK_END)
        for piece in pieces:
            self.file.write(piece)
        self.file.flush()
        self.n_users += 1
        return self.file, offset, self.file.tell() - offset

    def release(self):
        """ Gives the disk back when as many copies were released as were added. """
        self.n_users -= 1
        if not self.n_users:
            self.file.truncate(0)


class LazyArray:
    """ An array that stays in the file. It has a shape and a dtype, and rows(i, j) reads it. """
    __slots__ = ('shape', 'dtype', 'fortran', 'payload', 'scratch', '_where', '_map')

    def __init__(self, scratch):
        self.shape = None
        self.scratch = scratch
        self._where = None
        self._map = None

    def build(self, state):
        # state begins with a version number, except in numpy < 1.0
        shape, dtype, fortran, payload = state[-4:]
        # check sizes before they are multiplied: a product of numbers of a thousand digits takes
        # hours
        if self.shape is not None or type(shape) is not tuple or len(shape) > 32:
            raise ValueError("the shape of an array is not a tuple of sizes")
        if any(type(n) is not int or not 0 <= n < 2 ** 48 for n in shape):
            raise ValueError("the shape of an array is not a tuple of sizes")
        if type(dtype) is Unread:   # such as times: an array of a kind that no field takes
            self.shape, self.dtype, self.fortran, self.payload = (), np.dtype('V1'), False, b'\0'
            return
        self.dtype = dtype.np
        self.fortran = bool(fortran) and len(shape) > 1
        n = math.prod(shape)
        if type(payload) in (str, Py2Str):
            payload = payload.encode('latin1')
        if self.dtype == object:
            fills = type(payload) is list and len(payload) == n
        elif type(payload) is Lazy:
            # encoded bytes are at least as long as the array; _open checks the decoded length
            spare = payload.n_bytes - n * self.dtype.itemsize
            fills = spare >= 0 if payload.codec else spare == 0
        else:
            fills = type(payload) in (bytes, bytearray) and len(payload) == n * self.dtype.itemsize
        if not fills:
            raise ValueError(f"the data does not fill an array of shape {shape}")
        self.shape = shape
        self.payload = payload

    def _open(self):
        """
        (file, offset) of the array's bytes: in the source, or in a decoded scratch copy.
        """
        p = self.payload
        if self._where:
            pass
        elif type(p) is not Lazy:
            self._where = io.BytesIO(p), 0
        elif p.codec is None:
            self._where = p.file, p.offset
        else:
            copy, offset, n_bytes = self.scratch.add(p.chunks())
            self._where = copy, offset
            if n_bytes != math.prod(self.shape) * self.dtype.itemsize:
                self.close()
                raise ValueError(f"the data does not fill an array of shape {self.shape}")
        return self._where

    def rows(self, i, j):
        """
        Rows i:j as an ndarray [j-i, ...]. They are read from the file, because the pages of a
        memory map would count as memory of this process.
        """
        j = min(j, self.shape[0])
        rest = self.shape[1:]
        n = math.prod(rest)
        if self.dtype == object:  # pickled as a list in C order, also for a Fortran array
            out = np.empty((j - i) * n, object)
            for k in range(len(out)):
                out[k] = self.payload[i * n + k]
            return out.reshape(j - i, *rest)
        f, offset = self._open()
        if self.fortran and (i, j) == (0, self.shape[0]):  # without a map, which takes a handle
            return np.array(self._read(f, offset, self.shape[::-1]).T, order='C')
        if self.fortran:  # the values of a row are spread over the array, so map all of it
            if self._map is None:
                if isinstance(f, io.BytesIO):
                    flat = np.frombuffer(f.getvalue(), self.dtype)
                else:
                    flat = np.memmap(f, self.dtype, 'r', offset, (math.prod(self.shape),))
                self._map = flat.reshape(self.shape, order='F')
            return np.array(self._map[i:j], order='C')
        return self._read(f, offset + i * n * self.dtype.itemsize, (j - i, *rest))

    def _read(self, f, offset, shape):
        """ An array of this shape, in C order, that begins at `offset` of a file. """
        raw = np.empty(math.prod(shape) * self.dtype.itemsize, np.uint8)
        f.seek(offset)
        if f.readinto(raw) != len(raw):
            raise EOFError
        return raw.view(self.dtype).reshape(shape)

    def all(self):
        """ The whole array. """
        if self.shape:
            return self.rows(0, self.shape[0])
        one = LazyArray(self.scratch)
        one.shape = (1,)
        one.dtype = self.dtype
        one.fortran = False
        one.payload = self.payload
        return one.rows(0, 1).reshape(())

    def close(self):
        """ Forgets the file, the map and a decoded copy. """
        if self._where and self.scratch and self._where[0] is self.scratch.file:
            self.scratch.release()
        self._where = self._map = None
