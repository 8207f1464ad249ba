"""
Reads untrusted pickles without running them.

    tree = read_pickle(open('unaligned_50.pkl', 'rb'))

Corpora are published as pickles. A pickle is a program, and Python's own loader runs it. This
reader builds plain containers and descriptions of arrays. It calls no function that the file names,
so a malicious file cannot run code. Large payloads stay in the file until their rows are needed
(corpora/lazy.py). This saves memory: most of an M-SENA file is BERT features, which are not read.
"""
import codecs
import os
import pickle
import sys
from contextlib import contextmanager

from corpora.kinds import line_ends_were_changed, other_kind
from corpora.lazy import Dtype, Lazy, LazyArray, Py2Str, Refused, Scratch, Unread, decode
from corpora.limits import MiB
from run.errors import UserError

LAZY_BYTES = 4096  # a payload longer than this stays in the file
# Bytes of memory that an opcode of one byte takes, in CPython on 64 bits: its object, and its place
# in a list or in the memo
COSTS = dict(
    MARK=136, EMPTY_LIST=64, EMPTY_DICT=72, EMPTY_SET=224, TUPLE1=64, TUPLE2=72, TUPLE3=80,
    MEMOIZE=100)


class CorpusError(UserError):
    """ An error in a corpus or its source. """


@contextmanager
def errors_as_corpus_error(path, f=None):
    """
    Turns any error that an untrusted file causes into a CorpusError of one sentence that names the
    file. A CorpusError and an OSError pass unchanged. f: the open file, to see whether it ended.
    """
    try:
        yield
    except (CorpusError, OSError):
        raise
    except Refused as e:
        raise CorpusError(f"{path} was refused: it {e}.") from None
    except Exception as e:
        what = f"{type(e).__name__}: {ascii(str(e))[1:-1][:120]}"
        if f and f.tell() >= os.path.getsize(path):
            what = "it ends in the middle of its data" + (f", {e}" if type(e) is EOFError else '')
        if f and line_ends_were_changed(path):
            what = "each of its line feeds follows a carriage return, so it was copied as text"
        raise CorpusError(f"{path} is damaged or not a corpus ({what}); compare its SHA-256 with "
                          "the publisher's.") from e


class AllowedGlobal:
    """
    Stands for a global that a pickle names. `call` is our own function for it, which REDUCE calls,
    or None.
    """
    __slots__ = ('call',)

    def __init__(self, call=None):
        self.call = call


def _plain_keys(keys):
    """ The keys of a dict or set. Raises TypeError for one that is not plain. """
    # hashing nested tuples can take exponential time, and large integers can be chosen to share one
    # hash; no real file has such keys
    if any(type(k) not in (str, Py2Str, bytes, int, float, bool, type(None)) for k in keys):
        raise TypeError("a key that is not plain")
    if any(type(k) is int and not -2 ** 60 < k < 2 ** 60 for k in keys):
        raise TypeError("a key that is not plain")
    return keys


def _items(u, items):
    """ The items of a set. Raises TypeError for one that is not plain; with skip it is left out. """
    if u.skip:
        items = [k for k in items if type(k) not in (list, tuple, dict, set, frozenset, Unread)]
    return _plain_keys(items)


def _array(u, state):
    array = LazyArray(u.scratch)
    if state:
        array.build(state)
    return array


def _reconstruct(u, cls, *_):
    if type(cls) is Unread:
        return cls
    if cls is not NDARRAY:
        raise TypeError("an array of a class other than ndarray")
    return _array(u, None)  # BUILD fills it


def _scalar(u, dtype, raw):
    here = u.f.tell()  # reading a long np.str_ moves the position in the file
    value = _array(u, ((1,), dtype, False, raw)).all().item()
    u.f.seek(here)
    return value


def _encode(u, text, codec):
    if codec not in ('latin1', 'latin-1'):
        raise TypeError("_codecs.encode with a codec other than latin1")
    if type(text) is Lazy and text.is_text:
        return Lazy(text.file, text.offset, text.n_bytes, text.codec)
    return text.encode('latin1')


def _bytes(u, *args):
    # picklers write bytes(), bytearray(b'..') and bytearray('..', 'latin-1'), but no bytearray(n)
    if len(args) == 2:
        return _encode(u, *args)
    if args and type(args[0]) not in (bytes, bytearray, Lazy):
        raise TypeError("bytes made from another type")
    return args[0] if args else b''


def _dtype(u, *args):
    try:
        return Dtype(*args)
    except Refused:
        if not u.skip:
            raise
        return Unread('numpy.dtype')


def _ordered_dict(u, pairs=()):
    return {_plain_keys([k])[0]: v for k, v in pairs}


def _frombuffer(u, buffer, dtype, shape, order):
    return _array(u, (shape, dtype, order == 'F', buffer))


def _set(u, items=()):
    return set(_items(u, items))


def _frozenset(u, items=()):
    return frozenset(_items(u, items))


NDARRAY = AllowedGlobal()
ALLOWED_GLOBALS = {
    ('numpy', 'ndarray'): NDARRAY,
    ('numpy', 'dtype'): AllowedGlobal(_dtype),
    ('_codecs', 'encode'): AllowedGlobal(_encode),
    ('collections', 'OrderedDict'): AllowedGlobal(_ordered_dict),
}
for core in ('numpy.core', 'numpy._core'):  # numpy < 2 and numpy 2
    ALLOWED_GLOBALS[core + '.multiarray', '_reconstruct'] = AllowedGlobal(_reconstruct)
    ALLOWED_GLOBALS[core + '.multiarray', 'scalar'] = AllowedGlobal(_scalar)
    ALLOWED_GLOBALS[core + '.numeric', '_frombuffer'] = AllowedGlobal(_frombuffer)
for module in ('builtins', '__builtin__'):  # Python 3 and 2
    ALLOWED_GLOBALS[module, 'bytes'] = AllowedGlobal(_bytes)
    ALLOWED_GLOBALS[module, 'bytearray'] = AllowedGlobal(_bytes)
    ALLOWED_GLOBALS[module, 'set'] = AllowedGlobal(_set)
    ALLOWED_GLOBALS[module, 'frozenset'] = AllowedGlobal(_frozenset)


class Unpickler(pickle._Unpickler):
    """
    The standard library's unpickler in Python, without access to anything outside the pickle: a
    global is looked up only in `allowed`, REDUCE calls only functions in it, and BUILD fills
    only a Dtype or a LazyArray. With skip, any other global becomes an Unread: it is not imported,
    a call of it is not made, and its state is dropped. f: an open binary file, read from its start.
    """
    allowed = ALLOWED_GLOBALS

    def __init__(self, f, scratch=None, skip=False):
        super().__init__(f, encoding='latin1')
        self.f = f
        self.skip = skip
        self.scratch = Scratch(scratch)
        self.size = f.seek(0, os.SEEK_END)
        f.seek(0)
        # every object of a real corpus takes bytes of its own in the file
        self.memory_left = self.most_memory = 24 * self.size + 64 * MiB
        self._file_readline = self._line

    def charge(self, n_bytes):
        """ Counts memory that the pickle makes this process take. Raises Refused. """
        self.memory_left -= n_bytes
        if self.memory_left < 0:
            raise Refused(f"takes more than {self.most_memory / MiB:.0f} MiB of memory for "
                          f"{self.size / MiB:.1f} MiB of file, so it is not a corpus")

    def _line(self):
        line = self.f.readline(1 << 16)
        if line[-1:] != b'\n':
            raise EOFError
        return line

    def find_class(self, module, name):
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        what = ascii(f'{module}.{name}')[1:-1][:120]
        if self.skip:
            return Unread(what)
        raise Refused(f"names {what}, which no array or plain container needs")

    def _refuse(self):
        """ Raises Refused with the name of the opcode that was just read. """
        self.f.seek(-1, os.SEEK_CUR)
        code = self.f.read(1)
        name = next((k for k, v in vars(pickle).items() if k.isupper() and v == code), repr(code))
        raise Refused(f"uses the pickle opcode {name}, which no array or plain container needs")

    def _payload(self, n, codec=None, is_text=False):
        """ The next n bytes of the file, as a Lazy if they are more than LAZY_BYTES. """
        end = self.f.tell() + n
        if end > self.size:
            self.f.seek(self.size)
            raise EOFError(f"at {self.size} of at least {end} bytes")
        if n <= LAZY_BYTES:
            return self.f.read(n)
        self.f.seek(n, os.SEEK_CUR)
        return Lazy(self.f, self.f.tell() - n, n, codec, is_text)

    def _rest_of_line(self, codec, quotes=0):
        """
        The rest of a line, as a Lazy if it is more than LAZY_BYTES: in protocol 0 it may be a whole
        array. quotes: the number of quotes at either end, 0 or 1.
        """
        start = self.f.tell()
        line = self.f.readline(LAZY_BYTES)
        n = len(line)
        while line[-1:] != b'\n':
            line = self.f.readline(1 << 20)
            if not line:
                raise EOFError
            n += len(line)
        self.f.seek(start)
        if n < 1 + 2 * quotes or self.f.read(quotes) not in (b'', b"'", b'"'):
            raise ValueError("an unquoted string")
        payload = self._payload(n - 1 - 2 * quotes, codec, not quotes)
        self.f.seek(start + n)
        return payload

    def load_unicode(self):
        text = self._rest_of_line('raw-unicode-escape')
        self.append(text if type(text) is Lazy else decode(text, 'raw-unicode-escape'))

    def load_string(self):
        text = self._rest_of_line('py2 repr', quotes=1)
        self.append(text if type(text) is Lazy else Py2Str(codecs.escape_decode(text)[0], 'latin1'))

    def load_frame(self):
        # skip the header of a frame: frames are for buffering, and Lazy needs offsets in the file
        self.read(8)

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        self._put([key], [value])

    def load_setitems(self):
        items = self.pop_mark()
        self._put(items[::2], items[1::2])

    def _put(self, keys, values):
        """ Puts items into the dict on top of the stack. With skip, keys that are not plain go. """
        if self.skip and type(self.stack[-1]) is Unread:
            return
        target = self._last(dict)
        for key, value in zip(keys, values, strict=True):
            if not (self.skip and type(key) in (tuple, frozenset, Unread)):
                target[_plain_keys([key])[0]] = value

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self._put(items[::2], items[1::2])

    def load_append(self):
        value = self.stack.pop()
        if type(self.stack[-1]) is not Unread:
            self._last(list).append(value)

    def load_appends(self):
        items = self.pop_mark()
        if type(self.stack[-1]) is not Unread:
            self._last(list).extend(items)

    def load_newobj(self):
        """ An object of a class that is not read. Without skip, it is refused. """
        if not self.skip:
            self._refuse()
        self.stack.pop()
        self._last(Unread)

    def load_newobj_ex(self):
        if self.skip:
            self.stack.pop()
        self.load_newobj()

    def load_additems(self):
        items = self.pop_mark()
        if type(self.stack[-1]) is not Unread:
            self._last(set).update(_items(self, items))

    def load_frozenset(self):
        items = self.pop_mark()  # before self.append, because pop_mark changes it
        self.append(frozenset(_items(self, items)))

    def _last(self, *kinds):
        """ The top of the stack. Raises TypeError if it is none of the types `kinds`. """
        if type(self.stack[-1]) in kinds:
            return self.stack[-1]
        wanted = ' or '.join(k.__name__ for k in kinds)
        raise TypeError(f"{type(self.stack[-1]).__name__} in place of {wanted}")

    def load_reduce(self):
        args = self.stack.pop()
        if self.skip and type(self.stack[-1]) is Unread:
            return   # what the call would make is not read either
        call = self._last(AllowedGlobal).call
        if type(args) is not tuple or not call:
            raise TypeError("a call of something that is not a function")
        self.stack[-1] = call(self, *args)
        self.charge(sys.getsizeof(self.stack[-1]))

    def load_build(self):
        state = self.stack.pop()
        if self.skip and type(self.stack[-1]) is Unread:
            return
        target = self._last(Dtype, LazyArray)
        if type(state) is not tuple:
            raise TypeError("the state of an object is not a tuple")
        target.build(state)
        if type(target) is LazyArray and type(target.payload) is bytes:
            self.charge(len(target.payload))


def _loader(width, wrap, codec=None):
    """ A function that loads a payload whose length stands before it in `width` bytes. """
    def load(u):
        head = u.read(width)
        if len(head) < width:
            raise EOFError
        payload = u._payload(int.from_bytes(head, 'little'), codec, codec is not None)
        u.append(payload if type(payload) is Lazy else wrap(payload))
    return load


def _charged(op):
    """ The loader of an opcode in COSTS. """
    load = pickle._Unpickler.dispatch[getattr(pickle, op)[0]]

    def charged(u):
        u.charge(COSTS[op])
        load(u)
    return charged


def _utf8(b):
    return decode(b, 'utf-8')


def _py2(b):
    return Py2Str(b, 'latin1')


# The opcodes are listed here, so that a new opcode of a later Python is refused until it is added.
INHERITED = '''
    PROTO STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    FLOAT BINFLOAT SHORT_BINBYTES SHORT_BINUNICODE TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL GET BINGET LONG_BINGET
    PUT BINPUT LONG_BINPUT MEMOIZE
'''.split()
OVERRIDDEN = '''
    UNICODE STRING FRAME SETITEM SETITEMS DICT APPEND APPENDS ADDITEMS FROZENSET REDUCE BUILD NEWOBJ
    NEWOBJ_EX
'''.split()
TABLE = {op: pickle._Unpickler.dispatch[getattr(pickle, op)[0]] for op in INHERITED}
TABLE |= {op: _charged(op) for op in COSTS}
TABLE |= {op: vars(Unpickler)['load_' + op.lower()] for op in OVERRIDDEN}
TABLE |= dict(
    BINBYTES=_loader(4, bytes),
    BINBYTES8=_loader(8, bytes),
    BYTEARRAY8=_loader(8, bytearray),
    BINUNICODE=_loader(4, _utf8, 'utf-8'),
    BINUNICODE8=_loader(8, _utf8, 'utf-8'),
    SHORT_BINSTRING=_loader(1, _py2),
    BINSTRING=_loader(4, _py2),
)
Unpickler.dispatch = dict.fromkeys(range(256), Unpickler._refuse)
Unpickler.dispatch |= {getattr(pickle, op)[0]: load for op, load in TABLE.items()}


def read_pickle(f, scratch=None, skip=False):
    """
    The content of the pickle in f, an open binary file, with a LazyArray for each numpy array. The
    file must stay open while arrays are read. scratch: a folder for decoded copies. skip=True gives
    an Unread for each object of another type, which is not made either. Raises CorpusError for a
    file that is no pickle, and without skip for anything but plain containers and arrays of plain
    dtypes, and OSError if the file cannot be read.
    """
    kind = other_kind(f.name)
    if kind:
        raise CorpusError(f"{f.name} is not a pickle: it {kind}.")
    with errors_as_corpus_error(f.name, f):
        return Unpickler(f, scratch, skip).load()
