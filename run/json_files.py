"""
Reads our JSON files: those of a run, the JSON of a sweep, the header of a checkpoint, and meta.json
and text.jsonl of a corpus. They may be damaged or come from a stranger. A form says what a value
must be:

    str, bool, NUMBER         a value of this type; NUMBER is an int or a float, NaN too
    AtLeast(0), Literal[..]   a value that this annotation of a knob allows
    {'step': AtLeast(0)}      a dict that has these keys, and others
    [str]                     a list of such values
    Each(NUMBER)              a dict of such values, whatever its keys
    Maybe(str)                such a value or None; as an entry of a dict, it may be missing
"""
import io
import json
import os
import zlib
from typing import get_origin

from configurator import value_errors
from run.errors import CONTROL
from run.folder import open_regular

NUMBER = (int, float)
LARGEST = 2 ** 63   # integers from here on do not fit NumPy's int64
LARGEST_FILE = 2 ** 26   # bytes of a JSON file; meta.json has 50 for each feature of a stream
LARGEST_LINES = 2 ** 31   # bytes of a file with a JSON object per line
LARGEST_KNOB = 20_000   # bytes of a JSON file that becomes the value of a knob


class Each:
    """ The form of a dict whose values all have one form. """
    def __init__(self, form):
        self.form = form


class Maybe:
    """ The form of a value that may be None. """
    def __init__(self, form):
        self.form = form


def read_json(path, form=dict, follow=False):
    """
    The value in a JSON file. Raises ValueError with a phrase about the file, such as "is empty".
    follow: see open_regular.
    """
    return parsed(text_of(path, follow, LARGEST_FILE), form)


def json_text(path):
    """ The JSON object in a small file that the user named, as a text in one line. Raises ValueError. """
    if os.path.isfile(path) and os.path.getsize(path) > LARGEST_KNOB:
        raise ValueError(f"has more than {LARGEST_KNOB:,} bytes, so shorten it")
    return json.dumps(read_json(path, follow=True), ensure_ascii=False)


def text_of(path, follow=False, most=LARGEST_LINES):
    """
    The text of a file of at most `most` bytes. Raises ValueError with a phrase about the file.
    follow: see open_regular.
    """
    try:
        with open_regular(path, follow=follow) as f:
            if os.fstat(f.fileno()).st_size > most:
                raise ValueError(f"has more than {most:,} bytes")
            return f.read()
    except FileNotFoundError:
        raise ValueError("is missing") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"is not UTF-8 text (byte {e.start})") from None
    except MemoryError:
        raise ValueError("is larger than this machine's memory") from None
    except OSError as e:
        raise ValueError(f"cannot be read ({e.strerror})") from None


def parsed(text, form=dict):
    """ The value that a JSON text holds. Raises ValueError unless it has this form. """
    if not text.strip():
        raise ValueError("is empty")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"is no JSON text ({e.msg} in line {e.lineno}, column {e.colno})") from None
    except RecursionError:
        raise ValueError("holds too many nested lists") from None
    except ValueError:
        raise ValueError("holds a number of thousands of digits") from None
    check_numbers(value)
    if '\\u' in text:   # half of a surrogate pair can only be written by an escape
        check_texts(value)
    check_form(value, form)
    return value


def parsed_lines(text, check=None):
    """
    The dicts in a text that holds one per line. check(dict) may raise ValueError. Raises ValueError
    with the number of the line.
    """
    values = []
    for n, line in enumerate(io.StringIO(text, newline='\n'), 1):   # not split: it would copy all
        try:
            values.append(parsed(line))
            if check:
                check(values[-1])
        except ValueError as e:
            raise ValueError(f"line {n} {e}") from None
    if not values:
        raise ValueError("is empty")
    return values


def sealed(entries):
    """
    A dict with the new or replaced entry `checksum`, the CRC-32 of its other entries. A CRC finds
    damage and mistakes, not forgery.
    """
    return entries | dict(checksum=checksum_of(entries))


def check_seal(entries, changed="was changed after it was written"):
    """
    Raises ValueError(changed) if an entry of a sealed dict was changed. A dict with neither
    `checksum` nor `files`, the checksums of other files, passes: older ones have none.
    """
    if (entries.get('files') is None) != (entries.get('checksum') is None):
        raise ValueError("has only one of the entries files and checksum")
    if 'checksum' in entries and entries['checksum'] != checksum_of(entries):
        raise ValueError(changed)


def checksum_of(entries):
    others = {key: value for key, value in entries.items() if key != 'checksum'}
    return crc_of(json.dumps(others, sort_keys=True))


def crc_of(text):
    """ CRC-32 of a text, as 8 hex digits. """
    return f'{zlib.crc32(text.encode()):08x}'


def check_form(value, form, where=''):
    """ Raises ValueError if `value`, found at `where` in a file, does not have this form. """
    if isinstance(form, Maybe):
        if value is not None:
            check_form(value, form.form, where)
    elif isinstance(form, Each):
        check_form(value, dict, where)
        for key, inner in value.items():
            check_form(inner, form.form, f'{where} {key}')
    elif isinstance(form, dict):
        check_form(value, dict, where)
        for key, inner in form.items():
            if key not in value and not isinstance(inner, Maybe):
                raise ValueError(f"lacks the entry{where} {key}")
            check_form(value.get(key), inner, f'{where} {key}')
    elif isinstance(form, list):
        check_form(value, list, where)
        for n, inner in enumerate(value):
            check_form(inner, form[0], f'{where}[{n}]')
    elif not fits(value, form):
        raise ValueError(f"has the wrong entry{where} {shorten(value)}")


def fits(value, form):
    """ Whether a value has a form that is a type or an annotation of a knob. """
    if form is NUMBER:
        return type(value) in NUMBER
    if isinstance(form, type):
        return type(value) is form
    if isinstance(value, (list, dict)) or type(value) not in NUMBER and get_origin(form) is None:
        return False
    return not value_errors({'entry': value}, {'entry': form})


def _leaves(value):
    """ The numbers, texts, truth values and nulls of a JSON value, and the keys of its objects. """
    todo = [value]
    while todo:
        inner = todo.pop()
        if isinstance(inner, dict):
            todo += [*inner, *inner.values()]
        elif isinstance(inner, list):
            todo += inner
        else:
            yield inner


def check_numbers(value):
    """ Raises ValueError if a JSON value holds an integer that NumPy cannot convert. """
    for leaf in _leaves(value):
        if type(leaf) is int and not -LARGEST <= leaf < LARGEST:
            raise ValueError(f"holds a number that is too large: {shorten(leaf)}")


def check_texts(value):
    """ Raises ValueError if a JSON value holds a text that cannot be printed, half of a surrogate pair. """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds a text that is no valid Unicode") from None
    except RecursionError:
        raise ValueError("holds too many nested lists") from None


def check_printable(value):
    """ Raises ValueError if a JSON value holds a control character: it could steer a terminal. """
    for leaf in _leaves(value):
        if isinstance(leaf, str) and CONTROL.search(leaf):
            raise ValueError(f"holds a text with a control character: {shorten(leaf)}")


def shorten(value, n=60):
    """ repr(value), cut to at most n characters and '..'. """
    text = repr(value)
    return text if len(text) <= n else text[:n] + '..'
