"""
The summary of a conversion, from the corpus folder's meta.json.
"""
from run.errors import escaped


def describe(meta):
    """
    A summary of a corpus as a small table: its source, clips, labels and streams, the repairs, how
    padding and lengths were found, the keys that were read under another name, and the keys that
    were not read. meta: the dict of meta.json. A folder that is made by hand, or by an earlier
    version, has fewer entries, and the summary has fewer rows.
    """
    source = meta['source']
    file = f"{source['file']}, " if 'file' in source else ''
    rows = [('source', f"{file}SHA-256 {source['sha256']}"),
            ('clips', ', '.join(f'{n} {s}' for s, n in meta['clips'].items()))]
    for name, y in meta['labels'].items():
        if 'range' in y:
            rows.append((name, f"a score in {y['range']}"))
        else:
            rows.append((name, f"a class: {', '.join(y['names'])}"))
    for m, s in meta['streams'].items():
        if not {'cleaned', 'padding', 'longest', 'dtype', 'lengths_repaired'} <= set(s):
            rows.append((m, f"{s['width']} features a frame"))
            continue
        cleaned = ', '.join(f'{n} {k}' for k, n in s['cleaned'].items())
        side = 'no padding' if s['padding'] == 'none' else f"padding on the {s['padding']}"
        rows.append((m, f"{s['width']} features a frame, {s['longest']} frames at most, {side} in "
                        f"the source, stored as {s['dtype']}"))
        rows.append(('', f"values replaced by 0: {cleaned}"))
        rows.append(('', f"clips: {s['clips_empty']} without frames, {s['clips_all_zero']} with "
                         f"all frames zero, {s['lengths_repaired']} with a missing or impossible "
                         "stated length"))
        if 'frames_per_second' in s:
            rows.append(('', f"{s['frames_per_second']:g} frames a second, by the clips' start and "
                             "end"))
        rows += [('', row) for row in _describe_lengths(m, s)]
    if not meta['streams']:
        rows.append(('streams', "neither audio nor vision, only text"))
    text = meta['text']
    capitals = ', the train split is in capitals' * text['upper_case']
    rows.append(('text', f"{text.get('empty', 'unknown number of')} empty texts" + capitals))
    rows += [('', row) for row in _describe_text(text)]
    rows += [('note', note) for note in meta.get('notes', ())]
    rows += _describe_keys(meta)
    lines = [f"corpus {meta['name']}"] + [f'  {a:8s} {b}' for a, b in rows]
    return '\n'.join(escaped(line.replace('\n', ' ')) for line in lines)   # ids may hold anything


def _describe_lengths(m, s):
    """ Rows on how padding and lengths of stream m were found. s: its entry in meta.json. """
    rows = []
    found = s.get('padding_found')
    if found:
        if found['by'] == '--padding':
            how = "given by --padding"
        elif found['by'] == 'none':
            how = "assumed, because no clip shows it"
        else:
            how = f"found from {found['by']}"
        counted = ''
        if len(found['streams']) > 1:
            counted = f" ({' and '.join(found['streams'])} counted separately)"
        rows.append(f"padding side {how}: of {found['read']} clips checked{counted}, "
                    f"{found['right']} indicate right and {found['left']} indicate left")
    if s.get('aligned_text'):
        rows.append(f"no clip is shorter than its text in {s['aligned_text']}")
    if s.get('aligned_text_not_used'):
        rows.append(s['aligned_text_not_used'])
    if s.get('clips_cut'):
        end = 'tail' if s['padding'] == 'right' else 'head'
        rows.append(f"the lengths of {s['clips_cut']} clips were found by cutting all-zero frames "
                    f"at the {end} and may be too short; {s['clips_cut_with_zeros']} of these "
                    "clips have other all-zero frames too")
    if s.get('empty_ids'):
        more = ', ..' * (s['clips_empty'] > len(s['empty_ids']))
        rows.append(f"clips without frames: {', '.join(s['empty_ids'])}{more}; {m} is missing in "
                    f"the source for {s['clips_missing']} of these {s['clips_empty']}")
    return rows


def _describe_text(text):
    """ Rows on repaired texts, and on texts that look wrong. text: meta.json's entry `text`. """
    what = dict(
        cp1252_read_as_latin1="cp1252 that had been decoded as Latin-1 (C1 control characters), "
                              "repaired",
        utf8_read_as_latin1="UTF-8 that had been decoded as Latin-1 (C1 control characters), "
                            "repaired",
        control_characters="NUL or C1 control characters, a sign of a wrong encoding, left "
                           "unchanged",
        half_characters="half a surrogate pair, replaced by ?")
    rows = [f"texts with {what[key]}: {text[key]}" for key in what if text.get(key)]
    if text.get('encoding'):
        rows.append(f"bytes were decoded as {text['encoding']}")
    return rows


def _describe_keys(meta):
    """ Rows on the keys read under another name, the defaults, and the keys that were not read. """
    rows = [('read', f"'{key}' as {field}") for key, field in meta.get('renamed', {}).items()]
    for field, d in meta.get('defaults', {}).items():
        more = ', ..' * (d['count'] > len(d['first']))
        who = ', '.join(d['first'])
        rows.append((field, f"{d['count']} missing, replaced by a default: {who}{more}"))
    lists = meta['source'].get('layout') == 'lists'
    unread = []
    for key, entry in meta.get('unread', {}).items():
        shape = f" {entry['shape']}" if entry['shape'] is not None else ''
        shape += f" ({entry['type']})" if 'type' in entry else ''
        unread.append(key + shape + (f" in {entry['count']} clips" if lists else ''))
    if unread:
        rows.append(('not read', ', '.join(unread[:50]) + ', ..' * (len(unread) > 50)))
    return rows
