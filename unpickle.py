"""
A reader for strangers' pickles.

    tree = read_pickle(open('unaligned_50.pkl', 'rb'))

A corpus comes as a pickle, and from strangers. A pickle is a program, and Python's own loader runs it. This reader
builds plain containers and descriptions of arrays, calls nothing that the file names, and leaves big payloads in
the file until someone wants rows of them. So it is safe, and small too: most of an M-SENA file is BERT features
that nobody here reads.
"""
import codecs, io, math, os, pickle, re, tempfile
from contextlib import contextmanager

import numpy as np

LAZY_BYTES = 4096        # a payload longer than this stays in the file


class CorpusError(Exception):
    """ What is wrong with a corpus, where, and what to do: one sentence for the person at the keyboard. """


class Refused(Exception):
    """ A file asks for what no corpus needs. """


@contextmanager
def strangers_file(path, f=None):
    """ Whatever a stranger's file makes us trip over comes out as one sentence with the file's name. """
    try: yield
    except (CorpusError, OSError): raise
    except Refused as e: raise CorpusError(f"{path} was refused: it {e}.") from None
    except Exception as e:
        what = f"{type(e).__name__}: {ascii(str(e))[1:-1][:120]}"
        if f and f.tell() >= os.path.getsize(path): what = "it ends in the middle of its data"
        raise CorpusError(f"{path} is damaged or not a corpus ({what}); compare its SHA-256 with the "
                          "publisher's.") from e


class Py2Str(str):
    """ A Python 2 str, read as latin1 so that no byte is lost: text, or an array's bytes. """


class Lazy:
    """ Bytes or text left in the file: n_bytes at offset, encoded by a codec (None: bytes as they are). """
    __slots__ = ('file', 'offset', 'n_bytes', 'codec', 'is_text')

    def __init__(self, file, offset, n_bytes, codec=None, is_text=False):
        self.file, self.offset, self.n_bytes, self.codec, self.is_text = file, offset, n_bytes, codec, is_text

    def chunks(self, size=4 << 20):
        """ The payload as bytes, piece by piece. Up to protocol 2 each byte is written as a character. """
        done, carry = 0, b''
        if self.codec not in (None, 'py2 repr'): decoder = codecs.getincrementaldecoder(self.codec)()
        while done < self.n_bytes:
            self.file.seek(self.offset + done)
            piece = self.file.read(min(size, self.n_bytes - done))
            if not piece: raise EOFError
            done += len(piece)
            if self.codec == 'py2 repr':
                piece = carry + piece
                # up to the last whole escape; what is left waits for the next piece
                whole = re.match(rb'(?:[^\\]+|\\x..|\\[^x])*', piece, re.DOTALL).end()
                if done == self.n_bytes: whole = len(piece)
                piece, carry = codecs.escape_decode(piece[:whole])[0], piece[whole:]
            elif self.codec: piece = decoder.decode(piece, done == self.n_bytes).encode('latin1')
            yield piece

    def value(self):
        """ All of it, as str or bytes. """
        if not self.is_text: return b''.join(self.chunks())
        self.file.seek(self.offset)
        return _decode(self.file.read(self.n_bytes), self.codec)


def _decode(b, codec): return b.decode(codec, 'surrogatepass' if codec == 'utf-8' else 'strict')


class Dtype:
    """ A numpy dtype of a plain kind, from what the file says of it. Numpy is not asked to unpickle. """
    __slots__ = ('np',)

    def __init__(self, code, *_):
        code = code.decode('latin1') if type(code) is bytes else code
        if not re.fullmatch(r'b1|[iu][1248]|f[248]|[SU][1-9]\d{0,8}|O[48]?', code):
            raise Refused(f"holds an array of dtype {ascii(code)[:40]}; only plain numbers and text are read")
        self.np = np.dtype('O' if code[0] == 'O' else '<' + code)

    def build(self, state):
        # (version, byte order, subdtype, names, fields, itemsize, alignment, flags[, metadata])
        order, parts, itemsize = state[1], state[2:5], state[5]
        if any(p is not None for p in parts):
            raise Refused("holds an array of a structured dtype, and only plain numbers and text are read")
        if order not in ('<', '>', '|', '=') or self.np != object and itemsize not in (-1, self.np.itemsize):
            raise ValueError("a dtype that contradicts itself")
        if order == '>': self.np = self.np.newbyteorder('>')


class LazyArray:
    """ An array still in the file: shape, dtype, and rows(i, j) on demand. """
    __slots__ = ('shape', 'dtype', 'fortran', 'payload', 'scratch', '_where', '_map')

    def __init__(self, scratch): self.shape, self.scratch, self._where, self._map = None, scratch, None, None

    def build(self, state):
        shape, dtype, fortran, payload = state[-4:]   # a version number comes first, but for numpy < 1.0
        # sizes are looked at before they are multiplied: a product of thousand-digit numbers takes hours
        if self.shape is not None or type(shape) is not tuple or len(shape) > 32 \
           or any(type(n) is not int or not 0 <= n < 2 ** 48 for n in shape):
            raise ValueError("an array whose shape is not a tuple of sizes")
        self.dtype, self.fortran, n = dtype.np, bool(fortran) and len(shape) > 1, math.prod(shape)
        if type(payload) in (str, Py2Str): payload = payload.encode('latin1')
        if self.dtype == object: fills = type(payload) is list and len(payload) == n
        elif type(payload) is Lazy:
            # text is longer than the bytes that it stands for; by how much, _open sees
            spare = payload.n_bytes - n * self.dtype.itemsize
            fills = spare >= 0 if payload.codec else spare == 0
        else: fills = type(payload) in (bytes, bytearray) and len(payload) == n * self.dtype.itemsize
        if not fills: raise ValueError(f"an array of shape {shape} that its data does not fill")
        self.shape, self.payload = shape, payload

    def _open(self):
        """ (file, offset) of the array's bytes in one piece: the source, or a decoded scratch copy. """
        p = self.payload
        if self._where: pass
        elif type(p) is not Lazy: self._where = io.BytesIO(p), 0
        elif p.codec is None: self._where = p.file, p.offset
        else:
            copy = tempfile.TemporaryFile(dir=self.scratch)
            for piece in p.chunks(): copy.write(piece)
            if copy.tell() != math.prod(self.shape) * self.dtype.itemsize:
                raise ValueError(f"an array of shape {self.shape} that its data does not fill")
            copy.flush()
            self._where = copy, 0
        return self._where

    def rows(self, i, j):
        """ Rows i:j as an ndarray [j-i, ...], by reading: the pages of a map would count as our memory. """
        j, rest = min(j, self.shape[0]), self.shape[1:]
        n = math.prod(rest)
        if self.dtype == object:   # numpy writes these as a list in C order, whatever the array's own order
            out = np.empty((j - i) * n, object)
            for k in range(len(out)): out[k] = self.payload[i * n + k]
            return out.reshape(j - i, *rest)
        f, offset = self._open()
        if self.fortran:   # a row lies all over the array, so here a map it is
            if self._map is None:
                if isinstance(f, io.BytesIO): flat = np.frombuffer(f.getvalue(), self.dtype)
                else: flat = np.memmap(f, self.dtype, 'r', offset, (math.prod(self.shape),))
                self._map = flat.reshape(self.shape, order='F')
            return np.array(self._map[i:j], order='C')
        raw = np.empty((j - i) * n * self.dtype.itemsize, np.uint8)
        f.seek(offset + i * n * self.dtype.itemsize)
        if f.readinto(raw) != len(raw): raise EOFError
        return raw.view(self.dtype).reshape(j - i, *rest)

    def all(self):
        """ The whole array. """
        if self.shape: return self.rows(0, self.shape[0])
        one = LazyArray(self.scratch)
        one.shape, one.dtype, one.fortran, one.payload = (1,), self.dtype, False, self.payload
        return one.rows(0, 1).reshape(())

    def close(self): self._where = self._map = None   # and a scratch copy is gone


class Name:
    """ What a file gets for a global that it names: a function of ours, which REDUCE may call. """
    __slots__ = ('call',)

    def __init__(self, call=None): self.call = call


def _plain(keys):
    # hashing nested tuples can take exponential time, long numbers can be made to share one hash, and no real
    # file has such keys
    if any(type(k) not in (str, Py2Str, bytes, int, float, bool, type(None)) for k in keys):
        raise TypeError("a key that is not plain")
    if any(type(k) is int and not -2 ** 60 < k < 2 ** 60 for k in keys): raise TypeError("a key that is not plain")
    return keys


def _array(u, state):
    array = LazyArray(u.scratch)
    if state: array.build(state)
    return array


def _reconstruct(u, cls, *_):
    if cls is not NDARRAY: raise TypeError("an array that is not an ndarray")
    return _array(u, None)   # BUILD fills it


def _scalar(u, dtype, raw):
    here = u.f.tell()   # a long np.str_ is read from the file, and we are in the middle of that
    value = _array(u, ((1,), dtype, False, raw)).all().item()
    u.f.seek(here)
    return value


def _encode(u, text, codec):
    if codec not in ('latin1', 'latin-1'): raise TypeError("_codecs.encode with another codec than latin1")
    if type(text) is Lazy and text.is_text: return Lazy(text.file, text.offset, text.n_bytes, text.codec)
    return text.encode('latin1')


def _bytes(u, *args):
    # what picklers write: bytes() for none, bytearray(b'..'), bytearray('..', 'latin-1'); but no bytearray(n)
    if len(args) == 2: return _encode(u, *args)
    if args and type(args[0]) not in (bytes, bytearray, Lazy): raise TypeError("bytes of something else")
    return args[0] if args else b''


NDARRAY = Name()
NAMES = {('numpy', 'ndarray'): NDARRAY, ('numpy', 'dtype'): Name(lambda u, *args: Dtype(*args)),
         ('_codecs', 'encode'): Name(_encode),
         ('collections', 'OrderedDict'): Name(lambda u, pairs=(): {_plain([k])[0]: v for k, v in pairs})}
for core in ('numpy.core', 'numpy._core'):     # numpy < 2 and numpy 2
    NAMES[core + '.multiarray', '_reconstruct'] = Name(_reconstruct)
    NAMES[core + '.multiarray', 'scalar'] = Name(_scalar)
    NAMES[core + '.numeric', '_frombuffer'] = Name(
        lambda u, buffer, dtype, shape, order: _array(u, (shape, dtype, order == 'F', buffer)))
for module in ('builtins', '__builtin__'):     # Python 3 and 2
    NAMES[module, 'bytes'] = NAMES[module, 'bytearray'] = Name(_bytes)
    NAMES[module, 'set'] = Name(lambda u, items=(): set(_plain(items)))
    NAMES[module, 'frozenset'] = Name(lambda u, items=(): frozenset(_plain(items)))


class Unpickler(pickle._Unpickler):
    """
    The standard library's own unpickler (the one in Python) less all that reaches outside: a global is looked
    up in NAMES and nowhere else, REDUCE calls only what is there, BUILD fills only our own Dtype and
    LazyArray.
    """
    def __init__(self, f, scratch=None):
        super().__init__(f, encoding='latin1')
        self.f, self.scratch, self.size = f, scratch, os.fstat(f.fileno()).st_size
        self._file_readline = self._line

    def _line(self):
        line = self.f.readline(1 << 16)
        if line[-1:] != b'\n': raise EOFError
        return line

    def find_class(self, module, name):
        if (module, name) in NAMES: return NAMES[module, name]
        what = ascii(f'{module}.{name}')[1:-1][:120]
        raise Refused(f"names {what}, which no array or plain container needs")

    def _refuse(self):
        self.f.seek(-1, os.SEEK_CUR)
        code = self.f.read(1)
        name = next((k for k, v in vars(pickle).items() if k.isupper() and v == code), repr(code))
        raise Refused(f"uses the pickle opcode {name}, which no array or plain container needs")

    def _payload(self, n, codec=None, is_text=False):
        """ n bytes of the file: read when few, else left where they are. """
        if self.f.tell() + n > self.size: self.f.seek(self.size); raise EOFError
        if n <= LAZY_BYTES: return self.f.read(n)
        self.f.seek(n, os.SEEK_CUR)
        return Lazy(self.f, self.f.tell() - n, n, codec, is_text)

    def _rest_of_line(self, codec, quotes=0):
        """ The rest of a line, which in protocol 0 may be a whole array: read when short, else Lazy. """
        start = self.f.tell()
        line = self.f.readline(LAZY_BYTES)
        n = len(line)
        while line[-1:] != b'\n':
            line = self.f.readline(1 << 20)
            if not line: raise EOFError
            n += len(line)
        self.f.seek(start)
        if n < 1 + 2 * quotes or self.f.read(quotes) not in (b'', b"'", b'"'):
            raise ValueError("an unquoted string")
        payload = self._payload(n - 1 - 2 * quotes, codec, not quotes)
        self.f.seek(start + n)
        return payload

    def load_unicode(self):
        text = self._rest_of_line('raw-unicode-escape')
        self.append(text if type(text) is Lazy else _decode(text, 'raw-unicode-escape'))

    def load_string(self):
        text = self._rest_of_line('py2 repr', quotes=1)
        self.append(text if type(text) is Lazy else Py2Str(codecs.escape_decode(text)[0], 'latin1'))

    # frames are there for buffering; without them an offset is an offset in the file
    def load_frame(self): self.read(8)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._last(dict)[_plain([key])[0]] = value

    def load_setitems(self):
        items = self.pop_mark()
        self._last(dict).update(zip(_plain(items[::2]), items[1::2], strict=True))

    def load_dict(self):
        items = self.pop_mark()
        self.append(dict(zip(_plain(items[::2]), items[1::2], strict=True)))

    def load_additems(self):
        items = self.pop_mark()
        self._last(set).update(_plain(items))

    def load_frozenset(self):
        items = self.pop_mark()   # changes self.append, so it comes first
        self.append(frozenset(_plain(items)))

    def _last(self, *kinds):
        if type(self.stack[-1]) in kinds: return self.stack[-1]
        wanted = ' or '.join(k.__name__ for k in kinds)
        raise TypeError(f"a {type(self.stack[-1]).__name__} where {wanted} belongs")

    def load_reduce(self):
        args = self.stack.pop()
        call = self._last(Name).call
        if type(args) is not tuple or not call: raise TypeError("a call of what is not a function")
        self.stack[-1] = call(self, *args)

    def load_build(self):
        state = self.stack.pop()
        ours = self._last(Dtype, LazyArray)
        if type(state) is not tuple: raise TypeError("an object's state that is not a tuple")
        ours.build(state)


def _loader(width, wrap, codec=None):
    """ Loads what has its length before it in `width` bytes, be it gigabytes. """
    def load(u):
        head = u.read(width)
        if len(head) < width: raise EOFError
        payload = u._payload(int.from_bytes(head, 'little'), codec, codec is not None)
        u.append(payload if type(payload) is Lazy else wrap(payload))
    return load


def _utf8(b): return _decode(b, 'utf-8')
def _py2(b): return Py2Str(b, 'latin1')


# A table of our own, so that an opcode of some future Python is refused until someone has thought about it.
AS_THEY_ARE = '''PROTO STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    FLOAT BINFLOAT SHORT_BINBYTES SHORT_BINUNICODE TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST
    APPEND APPENDS EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
    MEMOIZE'''.split()
OUR_OWN = 'UNICODE STRING FRAME SETITEM SETITEMS DICT ADDITEMS FROZENSET REDUCE BUILD'.split()
TABLE = {op: pickle._Unpickler.dispatch[getattr(pickle, op)[0]] for op in AS_THEY_ARE}
TABLE |= {op: vars(Unpickler)['load_' + op.lower()] for op in OUR_OWN}
TABLE |= dict(BINBYTES=_loader(4, bytes), BINBYTES8=_loader(8, bytes), BYTEARRAY8=_loader(8, bytearray),
              BINUNICODE=_loader(4, _utf8, 'utf-8'), BINUNICODE8=_loader(8, _utf8, 'utf-8'),
              SHORT_BINSTRING=_loader(1, _py2), BINSTRING=_loader(4, _py2))
Unpickler.dispatch = dict.fromkeys(range(256), Unpickler._refuse)
Unpickler.dispatch |= {getattr(pickle, op)[0]: load for op, load in TABLE.items()}


def read_pickle(f, scratch=None):
    """
    What the pickle in f (an open binary file; keep it open) holds, with a LazyArray for each numpy array.
    `scratch` is a folder for decoded copies. Raises CorpusError for all but plain containers and arrays of
    plain dtypes, and OSError where the file cannot be read.
    """
    with strangers_file(f.name, f): return Unpickler(f, scratch).load()
