"""
What a corpus is and what was done to it, from its meta.json.
"""


def describe(meta):
    """
    What a corpus is and what was done to it, as a small table: what was read under which name, what
    was not read, and what was guessed by which evidence. A meta.json of an earlier version says
    less.
    """
    rows = [('source', f"{meta['source']['file']}, SHA-256 {meta['source']['sha256']}"),
            ('clips', ', '.join(f'{n} {s}' for s, n in meta['clips'].items()))]
    for name, y in meta['labels'].items():
        what = f"in {y['range']}" if 'range' in y else f"one of {', '.join(y['names'])}"
        rows.append((name, what))
    for m, s in meta['streams'].items():
        cleaned = ', '.join(f'{n} {k}' for k, n in s['cleaned'].items())
        rows.append((m, f"{s['width']} wide, longest {s['longest']}, padding {s['padding']}, "
                        f"{s['dtype']}"))
        rows.append(('', f"{cleaned} set to 0; clips: {s['clips_empty']} empty, "
                         f"{s['clips_all_zero']} all zero, {s['lengths_repaired']} lengths "
                         "repaired"))
        rows += [('', row) for row in _describe_lengths(s)]
    if not meta['streams']:
        rows.append(('streams', "neither audio nor vision: a corpus of text alone"))
    text = meta['text']
    rows.append(('text', f"{text['empty']} empty" + ', in capitals' * text['upper_case']))
    rows += [('', row) for row in _describe_text(text)]
    rows += _describe_keys(meta)
    return '\n'.join([f"corpus {meta['name']}"] + [f'  {a:8s} {b}' for a, b in rows])


def _describe_lengths(s):
    """ How a stream's padding and lengths were found, of its entry in meta.json. """
    rows = []
    found = s.get('padding_found')
    if found:
        if found['by'] == '--padding':
            why = "given by --padding"
        elif found['by'] == 'none':
            why = "assumed, as no clip shows it"
        else:
            why = f"found by {found['by']}"
        apart = f", {' and '.join(found['streams'])} counted apart" * (len(found['streams']) > 1)
        rows.append(f"padding side {why}: {found['right']} clips show right and {found['left']} "
                    f"show left, of {found['read']} read{apart}")
    if s.get('aligned_text'):
        rows.append(f"lengths go at least as far as {s['aligned_text']}")
    if s.get('aligned_text_not_used'):
        rows.append(s['aligned_text_not_used'])
    if s.get('clips_cut'):
        end = 'tail' if s['padding'] == 'right' else 'head'
        rows.append(f"lengths of {s['clips_cut']} clips were found by cutting zero frames at the "
                    f"{end}, so at most these may be too short; "
                    f"{s['clips_cut_with_zeros']} of them have zero frames elsewhere too")
    if s.get('empty_ids'):
        more = ', ..' * (s['clips_empty'] > len(s['empty_ids']))
        rows.append(f"empty clips: {', '.join(s['empty_ids'])}{more}; {s['clips_missing']} of "
                    f"{s['clips_empty']} are without this stream in the source")
    return rows


def _describe_text(text):
    """ What was repaired in texts, or looks wrong in them, of meta.json's entry `text`. """
    what = dict(
        cp1252_read_as_latin1="with cp1252 read as Latin-1 (C1 control characters), repaired",
        utf8_read_as_latin1="with UTF-8 read as Latin-1 (C1 control characters), repaired",
        control_characters="with NUL or C1 control characters, left as they are: read in a wrong "
                           "encoding",
        half_characters="with half a surrogate pair, replaced by ?")
    rows = [f"{text[key]} {said}" for key, said in what.items() if text.get(key)]
    if text.get('encoding'):
        rows.append(f"bytes were read as {text['encoding']}")
    return rows


def _describe_keys(meta):
    """ Rows of what was read under another name, got a default, or was not read. """
    rows = [('read', f"'{key}' as {field}") for key, field in meta.get('renamed', {}).items()]
    for field, d in meta.get('defaults', {}).items():
        more = ', ..' * (d['count'] > len(d['first']))
        who = ', '.join(d['first'])
        rows.append((field, f"{d['count']} missing, replaced by a default: {who}{more}"))
    lists = meta['source'].get('layout') == 'lists'
    unread = []
    for key, entry in meta.get('unread', {}).items():
        shape = f" {entry['shape']}" if entry['shape'] is not None else ''
        unread.append(key + shape + (f" in {entry['count']} clips" if lists else ''))
    if unread:
        rows.append(('not read', ', '.join(unread[:50]) + ', ..' * (len(unread) > 50)))
    return rows
