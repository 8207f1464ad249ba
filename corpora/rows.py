"""
Reads the rows of a table: CSV, TSV or JSONL, in any encoding.
"""
import csv
import io
import json
from collections import Counter
from pathlib import Path

from corpora.names import printed
from corpora.unpickle import CorpusError


def read_table_rows(path, encoding):
    """ (columns, rows, lines): each row is a dict, and stands on a line. Raises CorpusError. """
    text = _decoded(path, encoding)
    rows = _jsonl_rows(path, text) if path.lower().endswith('.jsonl') else _csv_rows(path, text)
    columns, rows, lines = rows
    if not rows:
        raise CorpusError(f"{path} has no rows; it needs a line of column names and a row for each "
                          "clip.")
    return columns, rows, lines


def number_of(cell):
    """ A cell as a float; None if it is no number. """
    try:
        return float(cell) if '_' not in cell else None   # Python reads 1_0 as 10
    except ValueError:
        return None


def _decoded(path, encoding):
    raw = Path(path).read_bytes()
    if raw[:2] in (b'\xff\xfe', b'\xfe\xff'):
        encoding = 'utf-16'
    try:
        text = raw.decode(encoding or 'utf-8-sig')
    except UnicodeError as e:
        at = getattr(e, 'start', 0)
        line = raw.count(b'\n', 0, at) + 1
        begin = ascii(raw[max(0, at - 8):at + 8])
        raise CorpusError(f"{path} holds bytes that are not {encoding or 'UTF-8'} on line {line} "
                          f"({begin}); convert it with python data.py SOURCE and its encoding, for "
                          "example --encoding=cp1252 or --encoding=gbk.") from None
    if '\0' in text:
        raise CorpusError(f"{path} holds NUL characters, so it is not a table in UTF-8; convert it "
                          "with its encoding, for example --encoding=utf-16-le.")
    return text.removeprefix('\ufeff')


def _csv_rows(path, text):
    first_line, _, rest = text.partition('\n')
    if first_line.rstrip('\r') in ('sep=,', 'sep=;', 'sep=\t'):   # Excel's note on the delimiter
        text = '\n' + rest
    head = text.lstrip().split('\n', 1)[0]
    delimiter = '\t' if path.lower().endswith('.tsv') else max(',;\t', key=head.count)
    csv.field_size_limit(1 << 26)
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
    rows, lines, columns, first = [], [], None, 1
    try:
        for cells in reader:
            if not any(c.strip() for c in cells):
                pass
            elif columns is None:
                columns = [c.strip() for c in cells]
            elif len(cells) != len(columns):
                raise CorpusError(f"Line {first} of {path} has {len(cells)} cells for "
                                  f"{len(columns)} columns; put quotes around a cell that holds "
                                  f"{delimiter!r}.")
            elif delimiter == '\t' and any('\t' in c and '\n' in c for c in cells):
                raise CorpusError(f"A cell from line {first} of {path} on holds a tab and a line "
                                  "break, so a quote at the start of a text has joined rows; "
                                  "double that quote and put the text in quotes.")
            else:
                rows.append(dict(zip(columns, cells)))
                lines.append(first)
            first = reader.line_num + 1
    except csv.Error as e:
        raise CorpusError(f"The cells from line {first} of {path} on cannot be told apart ({e}); "
                          "double each quote inside a cell, and close each quote.") from None
    twice = [c for c, n in Counter(columns or ()).items() if n > 1]
    if twice:
        raise CorpusError(f"{path} has two columns {printed(twice[0])!r}; rename one of them.")
    return columns or [], rows, lines


def _jsonl_rows(path, text):
    rows, lines = [], []
    for i, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise CorpusError(f"Line {i} of {path} is not JSON ({e}); a .jsonl file has one object "
                              "a line.") from None
        if type(row) is not dict:
            raise CorpusError(f"Line {i} of {path} is a {type(row).__name__}, not an object; a "
                              ".jsonl file has one object a line.")
        rows.append({k: v if type(v) is str else '' if v is None else json.dumps(v)
                     for k, v in row.items()})
        lines.append(i)
    columns = list(dict.fromkeys(c for row in rows for c in row))
    if len(rows) * len(columns) > len(text) + 1_000_000:
        raise CorpusError(f"The {len(rows)} rows of {path} have {len(columns)} different keys; give "
                          "all rows the same keys.")
    return columns, [{c: row.get(c, '') for c in columns} for row in rows], lines
