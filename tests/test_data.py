"""
data.py and corpora/: reading untrusted pickles, conversion, batches, and the upper bounds of the
toy corpus (under 40 s).

    python -m pytest -q tests/test_data.py
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from corpora import convert as conversion
from corpora import frames, padding, seal, streams, toy
from corpora.convert import convert
from corpora.describe import describe
from corpora.folder import check_whole
from corpora.lazy import Lazy, LazyArray
from corpora.names import SPLITS, STREAMS, Summary
from corpora.seal import N_PIECES, PIECE, whole_crc
from corpora.sources import clip_text
from corpora.unpickle import CorpusError, read_pickle
from data import epoch_order, get_batch, open_corpus
from fakes import HERE, KNOBS, msena, mutate_pickles, save, without_checksums
from run.finished import FORMAT, EvalError
from run.texts import lowercase_if_all_caps
from tools.adding import adding

MOSI = HERE.parent / 'shared' / 'data' / 'mosi_official.pkl'
rng = np.random.default_rng(0)


def converted(tree, tmp_path, **kw):
    """ The corpus that a dict becomes when it is pickled and converted. """
    convert(save(tree, tmp_path / 'source.pkl'), str(tmp_path / 'corpus'), **kw)
    return data.Corpus(tmp_path / 'corpus')


def assert_refused(tree, tmp_path, *words, **kw):
    """ Conversion raises an error of one line with these words, and leaves nothing behind. """
    with pytest.raises(CorpusError) as e:
        converted(tree, tmp_path, **kw)
    for word in words:
        assert word in str(e.value), str(e.value)
    assert '\n' not in str(e.value)
    assert not [p for p in os.listdir(tmp_path) if p.startswith('corpus')]


def read_bytes(raw, tmp_path):
    """ The content of a pickle, given as bytes, as read_pickle reads it. """
    (tmp_path / 'x.pkl').write_bytes(raw)
    with open(tmp_path / 'x.pkl', 'rb') as f:
        return values(read_pickle(f, str(tmp_path)))


def values(x):
    """ A tree from read_pickle, with its lazy arrays and payloads replaced by their values. """
    if isinstance(x, LazyArray):
        a = x.all()
        if a.dtype == object:
            for i in np.ndindex(a.shape):
                a[i] = values(a[i])
        return a
    if isinstance(x, Lazy):
        return x.value()
    if isinstance(x, dict):
        return {k: values(v) for k, v in x.items()}
    return type(x)(map(values, x)) if type(x) in (list, tuple) else x


# -------------------------------------------------------------------------------------------------
# Reading pickles


@pytest.mark.parametrize('protocol', range(6))
def test_reading_each_protocol_gives_what_was_pickled(protocol, tmp_path):
    fortran = np.asfortranarray
    tree = dict(
        f4=rng.normal(size=(9, 30, 5)).astype('f4'),
        big_endian=np.arange(3000, dtype='>i4'),
        f2=np.float16([1, 2]),
        fortran=fortran(rng.normal(size=(7, 30, 5))),
        small_fortran=fortran(np.eye(3)[:2]),
        text=np.array(['naïve 中' * 300, '']),
        byte=np.array([b'ab', b'c']),
        flag=np.array([True, False]),
        objects=np.array(['x' * 9000, None, 3.5, 'y'], object),
        grid=fortran([[1, 'a'], [2, 'b']], object),
        no_rows=np.zeros((0, 4)),
        zero_d=np.array(3.5),
        scalar=np.float32(2.5),
        long_scalar=np.str_('y' * 3000),
        ints=[1, -1, 300, 2**70],
        rest=(1.5, True, None, (1, (2,))),
        long_text='中' * 4000,
        bytes=bytes(range(256)) * 40,
        empty=b'',
        array=bytearray(b'hi'),
        set={1, 'a'},
        frozen=frozenset([2]),
        order=OrderedDict(a=1),
    )
    got = read_bytes(pickle.dumps(tree, protocol), tmp_path)
    assert list(got) == list(tree)
    for key, want in tree.items():
        if isinstance(want, np.ndarray):
            assert got[key].dtype == want.dtype and np.array_equal(got[key], want), key
        else:
            assert got[key] == want, key


@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_rows_of_a_lazy_array_equal_a_slice(protocol, tmp_path):
    a = rng.normal(size=(50, 40, 3))
    for tree in (a, np.asfortranarray(a)):
        with open(save(tree, tmp_path / 'x.pkl', protocol), 'rb') as f:
            lazy = read_pickle(f)
            assert np.array_equal(lazy.rows(10, 20), a[10:20])
            assert np.array_equal(lazy.rows(48, 99), a[48:])


def py2_array(payload, shape, code=b'f4', core=b'numpy.core'):
    """ The opcodes that Python 2 and an early numpy write for an array in protocol 2. """
    def short(s):
        return b'U' + bytes([len(s)]) + s

    return (
        b'c'
        + core
        + b'.multiarray\n_reconstruct\n'
        + b'cnumpy\nndarray\n'
        + b'K\x00\x85'
        + short(b'b')
        + b'\x87R'
        + b'(K\x01'
        + b'('
        + b''.join(b'\x8a\xfe' + n.to_bytes(254, 'little') for n in shape)
        + b't'
        + b'cnumpy\ndtype\n'
        + short(code)
        + b'K\x00K\x01\x87R(K\x03'
        + short(b'<')
        + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
        + b'\x89'
        + b'T'
        + struct.pack('<i', len(payload))
        + payload
        + b'tb'
    )


@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_arrays_and_strings_of_python_2_are_read(core, tmp_path):
    small, large = np.float32([[1, 2], [3, 4]]), rng.normal(size=(50, 40)).astype('f4')
    raw = (
        b'\x80\x02]('
        + py2_array(small.tobytes(), (2, 2), core=core)
        + py2_array(large.tobytes(), (50, 40), core=core)
        + b'T\x05\x00\x00\x00caf\xc3\xa9'
        + b"S'it\\'s \\xe4\\n'\n"
        + b'e.'
    )
    a, b, utf8, latin1 = read_bytes(raw, tmp_path)
    assert np.array_equal(a, small) and np.array_equal(b, large)
    assert clip_text(utf8, '', Summary()) == 'café'
    assert clip_text(latin1, '', Summary('latin1')) == "it's ä\n"
    with pytest.raises(CorpusError, match='--encoding'):
        clip_text(latin1, '', Summary())  # without the encoding


def test_an_array_of_python_2_in_protocol_0_is_decoded_in_pieces(tmp_path):
    """ It is one line with an escaped string. An escape may lie across two pieces. """
    payload = bytes(range(256)) * 100
    written = ''.join(
        {9: '\\t', 65: 'A', 39: "\\'", 92: '\\\\'}.get(b, f'\\x{b:02x}') for b in payload
    )
    raw = b"S'" + written.encode() + b"'\n."
    (tmp_path / 'x.pkl').write_bytes(raw)
    with open(tmp_path / 'x.pkl', 'rb') as f:
        lazy = read_pickle(f)
        assert isinstance(lazy, Lazy) and b''.join(lazy.chunks(size=7)) == payload


class Call:
    """ Its pickle calls func(*args) when Python's own loader reads it. """

    def __init__(self, func, *args):
        self.call = func, args

    def __reduce__(self):
        return self.call


def malicious_pickles(canary):
    """ (word of the error, pickle): pickles that make the file `canary` or do other harm. """
    touch = f'open({canary!r},"w")'
    for protocol in (0, 2, 4):
        yield 'posix.system', pickle.dumps(Call(os.system, f'touch {canary}'), protocol)
        yield 'eval', pickle.dumps({'train': [np.zeros(3), Call(eval, touch)]}, protocol)
        yield 'getattr', pickle.dumps(Call(getattr, 'x', 'upper'), protocol)
        yield 'numpy', pickle.dumps(Call(np.load, canary), protocol)
        yield 'Popen', pickle.dumps(Call(subprocess.Popen, ['touch', canary]), protocol)
        yield 'eval', pickle.dumps(Call(np.dtype, Call(eval, touch)), protocol)
        yield 'exec', pickle.dumps(OrderedDict(a=Call(exec, touch)), protocol)
        yield (
            'numpy.matrix',
            pickle.dumps(np.array([1]), 0).replace(b'cnumpy\nndarray', b'cnumpy\nmatrix'),
        )
    yield 'os.system', b'cos\nsystem\n(S"touch ' + canary.encode() + b'"\ntR.'
    yield 'os.system', b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.'
    yield 'builtins.getattr', b'\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.'
    yield 'numpy.core.multiarray.__dict__', b'cnumpy.core.multiarray\n__dict__\n.'
    yield 'numpy.dtype.__class__', b'\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.'
    yield (
        'numpy.testing._private.utils.runstring',
        b'cnumpy.testing._private.utils\nrunstring\n(S"x"\ntR.',
    )
    yield 'INST', b'(S"x"\nios\nsystem\n.'
    yield 'OBJ', b'(cnumpy\ndtype\nS"f4"\no.'
    yield 'NEWOBJ', b'cnumpy\ndtype\n)\x81.'
    yield 'EXT1', b'\x82\x01.'
    yield 'PERSID', b'Pabc\n.'
    yield 'BINPERSID', b'K\x01Q.'
    yield 'NEXT_BUFFER', b'\x80\x05\x97.'
    yield 'f4,O', b'cnumpy\ndtype\n(S"f4,O"\ntR.'
    yield 'M8', pickle.dumps(np.zeros(3, 'M8[s]'))
    yield 'V8', pickle.dumps(np.zeros(3, [('a', 'f8')]))
    yield 'latin1', b'c_codecs\nencode\n(S"x"\nS"rot13"\ntR.'  # a codec other than latin1
    yield 'Dtype', b'cnumpy\ndtype\n}S"__class__"\nNsb.'  # BUILD of a global
    yield 'dict', b'}S"x"\nNs}S"__setstate__"\nNsb.'  # BUILD of a dict
    yield 'tuple', b'cnumpy\ndtype\n(S"f4"\ntR}S"np"\nNsb.'  # a state that sets attributes
    yield 'ndarray', b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tS"b"\ntR.'
    yield 'fill', py2_array(b'12345678', (3,)) + b'.'  # too few bytes
    yield 'fill', py2_array(b'12345678', (1,)) + b'.'  # too many
    yield 'fill', py2_array(b'12345678', (1,), b'O8') + b'.'  # bytes as pointers to objects
    yield 'fill', py2_array(b'', (60000,) * 9) + b'.'
    # a product of longer sizes would take hours
    yield 'tuple of sizes', py2_array(b'', (2**1000,) * 200) + b'.'
    yield 'tuple of sizes', py2_array(b'', (0,) * 1000) + b'.'
    yield (
        'plain',
        b'}\x8a\x09' + (2**61 - 1).to_bytes(9, 'little') + b'K\x01s.',
    )  # one of many large integers that share a hash
    yield 'plain', b'}](e' + b'K\x01s.'  # a list as a key
    yield 'plain', b'}K\x01\x85' + b'2\x86' * 60 + b'K\x01s.'  # a key whose hash takes 2^60 steps


def test_malicious_pickles_are_refused_and_the_error_names_the_reason(tmp_path):
    canary = str(tmp_path / 'canary')
    for name, raw in malicious_pickles(canary):
        with pytest.raises(CorpusError) as e:
            read_bytes(raw, tmp_path)
        message = str(e.value)
        assert name in message and 'x.pkl' in message and '\n' not in message, (name, message)
        assert not os.path.exists(canary), name


def test_a_pickle_truncated_anywhere_is_refused(tmp_path):
    raw = pickle.dumps(msena(), 4)
    for cut in random.Random(0).sample(range(len(raw)), 40):
        with pytest.raises(CorpusError, match='x.pkl'):
            read_bytes(raw[:cut], tmp_path)


@pytest.mark.parametrize('protocol', [0, 2, 5])
def test_a_stated_length_beyond_the_file_is_refused(protocol, tmp_path):
    for opcode, width in zip(
        (b'B', b'X', b'T', b'\x8b', b'\x8d', b'\x8e', b'\x96'), (4, 4, 4, 4, 8, 8, 8)
    ):
        head = opcode + b'\xff' * (width - 1) + b'\x7f'
        with pytest.raises(CorpusError):
            read_bytes(bytes([0x80, protocol]) + head + b'abc', tmp_path)


def test_500_damaged_pickles_convert_or_raise_a_corpus_error(tmp_path):
    assert min(mutate_pickles(tmp_path, 500).values()) > 20
    assert not [p for p in os.listdir(tmp_path) if '.tmp-' in p]


# -------------------------------------------------------------------------------------------------
# Converting


@pytest.mark.parametrize('lengths', [True, False])
@pytest.mark.parametrize('protocol', [0, 2, 5])
def test_conversion_keeps_texts_labels_lengths_and_frames(lengths, protocol, tmp_path):
    tree = msena(lengths=lengths)
    tree['train']['vision'] = np.asfortranarray(tree['train']['vision'])
    tree['train']['raw_text'] = np.array(tree['train']['raw_text'])
    tree['valid']['raw_text'] = np.array([t.encode() for t in tree['valid']['raw_text']], object)
    convert(save(tree, tmp_path / 'source.pkl', protocol), str(tmp_path / 'corpus'))
    corpus = data.Corpus(tmp_path / 'corpus')
    assert corpus.widths == {'audio': 5, 'vision': 2}
    assert corpus.n_clips == dict(train=6, valid=3, test=2)
    assert corpus.meta['labels']['label']['range'] == [-3, 3]
    assert corpus.meta['streams']['audio']['padding'] == 'right'
    for split, s in tree.items():
        assert corpus.id(split) == s['id']
        assert corpus.text(split) == [f'text {i} of {split}' for i in range(len(s['id']))]
        assert np.array_equal(corpus.label(split), s['regression_labels'])
        for m in STREAMS:
            assert corpus.lengths(split, m).tolist() == [1 + i % 7 for i in range(len(s['id']))]
            for i, n in enumerate(corpus.lengths(split, m)):
                assert np.array_equal(corpus.frames(split, m, i), s[m][i, :n].astype(np.float32))
    frames = np.concatenate([tree['train']['audio'][i, : i + 1] for i in range(6)])
    assert np.allclose(corpus.meta['streams']['audio']['mean'], frames.mean(0), atol=1e-6)
    assert np.allclose(corpus.meta['streams']['audio']['std'], frames.std(0), atol=1e-6)


def test_with_left_padding_the_last_frames_are_kept(tmp_path):
    for lengths in (True, False):
        tree = msena(lengths=lengths)
        want = [s['audio'][1, :2].copy() for s in tree.values()]
        for s in tree.values():
            for m in STREAMS:
                for i in range(len(s['id'])):
                    s[m][i] = np.roll(s[m][i], 7 - (1 + i % 7), axis=0)
        (tmp_path / str(lengths)).mkdir()
        corpus = converted(tree, tmp_path / str(lengths))
        assert corpus.meta['streams']['audio']['padding'] == 'left'
        for split, w in zip(SPLITS, want):
            assert np.array_equal(corpus.frames(split, 'audio', 1), w)


def test_repairs_are_counted(tmp_path):
    """
    nan and inf become 0, an impossible length is found from the last nonzero frame, and clips that
    are empty or all zero are kept.
    """
    tree = msena()
    t = tree['train']
    t['audio'][3, 0, 0], t['audio'][3, 1, 1], t['audio'][3, 2, :2] = np.nan, np.inf, -np.inf
    t['audio_lengths'][4], t['audio_lengths'][5], t['audio_lengths'][0] = 99, -1, 0
    t['vision'][2] = 0
    t['raw_text'][1] = '  '
    corpus = converted(tree, tmp_path)
    audio, vision = corpus.meta['streams']['audio'], corpus.meta['streams']['vision']
    assert audio['cleaned'] == {'nan': 1, '+inf': 1, '-inf': 2}
    assert audio['lengths_repaired'] == 2 and audio['clips_empty'] == 1
    assert vision['clips_all_zero'] == 1 and corpus.meta['text'] == dict(empty=1, upper_case=False)
    assert corpus.lengths('train', 'audio').tolist() == [0, 2, 3, 4, 5, 6]
    x = corpus.frames('train', 'audio', 3)
    assert np.isfinite(x).all() and x[0, 0] == 0


def test_a_missing_text_is_empty_and_counted(tmp_path):
    tree = msena()
    tree['train']['raw_text'][1], tree['train']['raw_text'][2] = None, np.nan
    corpus = converted(tree, tmp_path)
    assert corpus.text('train')[1:3] == ['', ''] and corpus.meta['text']['empty'] == 2
    assert corpus.meta['defaults']['text']['count'] == 2


def test_a_label_that_is_nan_or_outside_the_range_is_refused(tmp_path):
    tree = msena()
    tree['valid']['regression_labels'][1] = 4.0
    assert_refused(tree, tmp_path, 'valid$_$1', '4.0', '--label_range')
    tree['valid']['regression_labels'][1] = np.nan
    assert_refused(tree, tmp_path, 'valid$_$1', 'nan')
    tree['valid']['regression_labels'][1] = 4.0
    corpus = converted(tree, tmp_path, label_range=(-5, 5))
    assert corpus.meta['labels']['label']['range'] == [-5, 5]


def test_ch_sims_has_four_labels_in_the_range_of_1(tmp_path):
    tree = msena()
    for s in tree.values():
        s['regression_labels'] /= 3
        for t in 'TAV':
            s['regression_labels_' + t] = (s['regression_labels'] / 2).tolist()
    corpus = converted(tree, tmp_path)
    assert list(corpus.meta['labels']) == ['label', 'label_T', 'label_A', 'label_V']
    assert all(y['range'] == [-1, 1] for y in corpus.meta['labels'].values())
    assert np.allclose(corpus.label('train', 'label_A') * 2, corpus.label('train'))
    with pytest.raises(CorpusError, match='emotion'):
        corpus.label('train', 'emotion')


def test_errors_name_what_a_source_lacks(tmp_path):
    tree = msena()
    del tree['valid']['regression_labels']
    assert_refused(tree, tmp_path, 'valid', 'regression_labels', 'annotations')
    tree = msena()
    del tree['test']
    assert_refused(tree, tmp_path, 'test', 'train, valid')
    tree = msena()
    del tree['test']['audio']
    assert_refused(tree, tmp_path, 'audio', 'test')
    tree = msena()
    tree['train']['audio'] = tree['train']['audio'][:-1]
    assert_refused(tree, tmp_path, 'audio', '6 clips')
    tree = msena()
    tree['test']['vision'] = tree['test']['vision'][..., :1]
    assert_refused(tree, tmp_path, 'vision', '2 features', '1 in test')
    assert_refused([1, 2], tmp_path, 'list', 'train')
    with pytest.raises(CorpusError, match="'nowhere'.*'toy'.*folder.*pkl"):
        open_corpus('nowhere', tmp_path)


def test_a_source_may_lack_one_stream_or_both(tmp_path):
    tree = msena()
    for s in tree.values():
        del s['vision']
    corpus = converted(tree, tmp_path)
    assert corpus.widths == {'audio': 5} and 'vision' not in get_batch(corpus, 'train', [0])
    for s in tree.values():
        del s['audio']
    (tmp_path / 'b').mkdir()
    corpus = converted(tree, tmp_path / 'b')
    assert corpus.widths == {} and 'neither' in describe(corpus.meta)


def test_a_vector_per_clip_is_one_frame(tmp_path):
    tree = msena()
    for s in tree.values():
        s['audio'] = s['audio'][:, 0]
    corpus = converted(tree, tmp_path)
    assert set(corpus.lengths('train', 'audio')) == {1}
    assert np.array_equal(corpus.frames('train', 'audio', 2)[0], tree['train']['audio'][2])


def folder_of_lists(folder, labels='neutral surprise joy'.split()):
    folder.mkdir()
    for split in SPLITS:
        features = [
            dict(
                text=f'{split} {i}',
                audio=rng.normal(size=(4 + i, 3)),
                audio_len=4 + i,
                video=np.ones((5, 2)),
                video_len=2,
            )
            for i in range(len(labels))
        ]
        save(
            [dict(label=y, features=f) for y, f in zip(labels, features)],
            folder / f'TINY_{split}.pkl',
        )
    return str(folder)


def test_a_folder_of_lists_is_converted_once(tmp_path):
    corpus = open_corpus(folder_of_lists(tmp_path / 'TINY'), tmp_path / 'data')
    names = corpus.meta['labels']['emotion']['names']
    assert names == ['neutral', 'surprise', 'joy']  # in the order of MELD
    assert corpus.label('test', 'emotion').tolist() == [0, 1, 2]
    assert corpus.label('test', 'emotion').dtype == np.int64
    assert corpus.lengths('train', 'audio').tolist() == [4, 5, 6]
    assert corpus.lengths('train', 'vision').tolist() == [2, 2, 2]
    assert get_batch(corpus, 'train', [2, 0], label='emotion')['label'].tolist() == [2, 0]
    second = open_corpus(tmp_path / 'TINY', tmp_path / 'data')  # opens the same folder
    assert second.folder == corpus.folder and len(os.listdir(tmp_path / 'data')) == 1


def test_a_class_that_train_lacks_is_refused(tmp_path):
    source = folder_of_lists(tmp_path / 'TINY', ['b', 'a', 'a'])
    clips = pickle.load(open(tmp_path / 'TINY' / 'TINY_test.pkl', 'rb'))
    clips[1]['label'] = 'rage'
    save(clips, tmp_path / 'TINY' / 'TINY_test.pkl')
    with pytest.raises(CorpusError, match="test is rage.*a, b"):
        convert(source, str(tmp_path / 'out'))


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    """ A class name with one is refused, and an error prints that of a clip's name escaped. """
    source = folder_of_lists(tmp_path / 'TINY', ['b', 'a\x1b[2J', 'b'])
    with pytest.raises(CorpusError, match='holds a control character') as refused:
        convert(source, str(tmp_path / 'out'))
    assert '\x1b' not in str(refused.value)
    assert str(CorpusError('The clip \x1b[2J has\tno text.')) == r'The clip \x1b[2J has' '\tno text.'


def test_a_class_has_one_unicode_form(tmp_path):
    source = folder_of_lists(tmp_path / 'TINY', ['joi\u00e9', 'joie\u0301', 'sad'])
    corpus = open_corpus(source, tmp_path / 'data')
    assert corpus.meta['labels']['emotion']['names'] == ['joi\u00e9', 'sad']


def test_a_text_of_words_is_refused(tmp_path):
    """ The parts of an id are joined by $_$, which would be wrong between words. """
    tree = msena()
    for s in tree.values():
        s['raw_text'] = [['I', 'loved', 'it'] for _ in s['raw_text']]
    with pytest.raises(CorpusError, match='is a list, not a text'):
        converted(tree, tmp_path)


def test_float16_is_standardised_and_an_overflow_is_refused(tmp_path):
    tree = msena(n=(70, 3, 2))
    corpus = converted(tree, tmp_path, dtype='float16')
    info = corpus.meta['streams']['audio']
    want = (tree['train']['audio'][3, :4] - info['mean']) / info['std']
    assert info['standardised'] and corpus.frames('train', 'audio', 3).dtype == np.float16
    assert np.allclose(get_batch(corpus, 'train', [3])['audio'][0], want, atol=2e-3)
    tree['test']['audio'][1, 0, 0] = 1e6
    (tmp_path / 'b').mkdir()
    assert_refused(tree, tmp_path / 'b', 'audio', 'standardised', '65504', dtype='float16')


def test_a_killed_conversion_leaves_no_folder_that_opens(tmp_path):
    source = save(msena(n=(50, 3, 2)), tmp_path / 'source.pkl')
    program = f"""import os, signal
from corpora import convert
convert.standardise_to_float16 = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
convert.convert({source!r}, {str(tmp_path / 'corpus')!r}, dtype='float16')"""
    died = subprocess.run([sys.executable, '-c', program], cwd=HERE)
    assert died.returncode == -signal.SIGKILL
    left = [p for p in os.listdir(tmp_path) if p.startswith('corpus')]
    assert len(left) == 1 and '.tmp-' in left[0]  # an unfinished corpus
    for folder in [tmp_path / left[0], tmp_path / left[0] / 'corpus', tmp_path / 'corpus']:
        with pytest.raises(CorpusError):
            open_corpus(folder, tmp_path)
    convert(source, str(tmp_path / 'corpus'))
    assert sorted(os.listdir(tmp_path)) == ['corpus', 'source.pkl']  # removed by the next one


def test_two_processes_can_convert_one_source_at_the_same_time(tmp_path):
    source = save(msena(), tmp_path / 'source.pkl')
    program = (
        f"import data; print(data.open_corpus({source!r}, {str(tmp_path / 'data')!r}).n_clips)"
    )
    command, here = [sys.executable, '-c', program], HERE
    both = [subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE) for _ in range(2)]
    assert all(b"'train': 6" in p.communicate()[0] and p.returncode == 0 for p in both)
    assert len(os.listdir(tmp_path / 'data')) == 1


def test_a_full_disk_raises_a_corpus_error(tmp_path, monkeypatch):
    def full(*a):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(conversion, 'write_stream', full)
    assert_refused(msena(), tmp_path, 'No space left')


def test_errors_name_the_damaged_file_of_a_corpus_folder(tmp_path):
    corpus = converted(msena(), tmp_path)
    path = Path(corpus.folder) / 'train' / 'audio.npy'
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorpusError, match='train/audio.npy'):
        open_corpus(corpus.folder)
    (Path(corpus.folder) / 'train' / 'text.jsonl').unlink()
    with pytest.raises(CorpusError, match='text.jsonl'):
        open_corpus(corpus.folder)
    (Path(corpus.folder) / 'meta.json').write_text('{')
    with pytest.raises(CorpusError, match='meta.json'):
        open_corpus(corpus.folder)


def test_starts_whose_difference_overflows_are_not_in_order(tmp_path):
    corpus = converted(msena(), tmp_path)
    path = Path(corpus.folder) / 'train' / 'audio_start.npy'
    start = np.load(path)
    start[1:3] = 2**63 - 1, -2   # np.diff gives 1, not a negative number
    assert (np.diff(start)[1:2] > 0).all()
    np.save(path, start)
    without_checksums(corpus.folder)
    with pytest.raises(CorpusError, match='starts of clips that are not in ascending order'):
        open_corpus(corpus.folder)


@pytest.mark.parametrize('change, sentence', [
    (dict(ceilings=5), 'has the wrong entry ceilings 5'),
    (dict(ceilings=dict(late={}, full={})), 'lacks the entry late mae'),
    (dict(ceilings=dict.fromkeys(('late', 'full'), dict(mae=1.0, acc=0.5))), 'has equal bounds'),
    (dict(name='\x1b]0;toy'), 'holds a text with a control character'),
    (dict(name='n' * 300), 'has a name of more than 200 characters'),
])
def test_a_damaged_meta_is_refused_when_the_corpus_is_opened(change, sentence, tmp_path):
    """ And not when the report is written, after hours of training. """
    path = Path(converted(msena(), tmp_path).folder) / 'meta.json'
    without_checksums(path.parent)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorpusError, match=sentence):
        data.Corpus(path.parent)


@pytest.mark.parametrize('name', ['meta.json', 'train/text.jsonl', 'test/audio.npy', 'valid'])
def test_a_link_that_leads_out_of_a_corpus_folder_is_refused(name, tmp_path):
    """ It is not read, and gets no other time, though its checksum is right. """
    folder = Path(converted(msena(), tmp_path).folder)
    outside = tmp_path / 'outside'
    os.rename(folder / name, outside)
    (folder / name).symlink_to(outside)
    os.utime(outside, ns=(10**18, 10**18))
    for whole in (False, True):
        with pytest.raises(CorpusError, match=f'{name}.* a link that leads out of the corpus'):
            data.Corpus(folder, whole=whole)
    assert outside.stat().st_mtime_ns == 10**18
    (folder / name).unlink()
    (folder / name).symlink_to(f'{folder}2')   # beside it, and absent
    with pytest.raises(CorpusError, match='a link that leads out'):
        data.Corpus(folder)


def test_links_to_and_in_a_corpus_folder_are_followed(tmp_path):
    folder = Path(converted(msena(), tmp_path).folder)
    path = folder / 'train' / 'text.jsonl'
    os.rename(path, folder / 'texts')
    path.symlink_to('../texts')
    os.utime(folder / 'texts', ns=(10**18, 10**18))
    (tmp_path / 'linked').symlink_to(folder)
    assert data.Corpus(tmp_path / 'linked', whole=True).n_clips == data.Corpus(folder).n_clips
    assert (folder / 'texts').stat().st_mtime_ns == 10**18   # no time is set through a link


def change_byte(path, at, keep_time):
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def large_corpus(tmp_path):
    """ A converted corpus with a file of 4.8 MB of frames, of which the checksum's sample is 1 MiB. """
    source = msena(n=(60, 3, 2), L=2000, d_a=10)
    for s in source.values():
        s['audio_lengths'] = [s['audio'].shape[1]] * len(s['id'])
    return converted(source, tmp_path)


def test_a_changed_byte_of_a_corpus_is_found(tmp_path):
    """
    In a small file always; in the part of a large one that is not in the sample, if its time has
    changed, and on demand.
    """
    corpus = large_corpus(tmp_path)
    folder = Path(corpus.folder)
    shutil.copytree(folder, tmp_path / 'copy')
    change_byte(folder / 'test' / 'label.npy', -1, keep_time=True)
    with pytest.raises(CorpusError, match='test/label.npy differs from what'):
        open_corpus(folder)

    step = ((folder / 'train' / 'audio.npy').stat().st_size - PIECE) // (N_PIECES - 1)
    between = PIECE + (step - PIECE) // 2   # behind the first piece of the sample
    copied = tmp_path / 'copy' / 'train' / 'audio.npy'
    change_byte(copied, between, keep_time=True)
    open_corpus(tmp_path / 'copy')
    with pytest.raises(CorpusError, match='train/audio.npy'):
        check_whole(tmp_path / 'copy')
    os.utime(copied)
    with pytest.raises(CorpusError, match='train/audio.npy'):
        open_corpus(tmp_path / 'copy')


def test_a_copied_corpus_is_read_whole_once(tmp_path, monkeypatch):
    """ A copy has new times. It gets the old ones back, and the next time samples are enough. """
    corpus = large_corpus(tmp_path)
    shutil.copytree(corpus.folder, tmp_path / 'copy', copy_function=shutil.copyfile)
    read = []
    monkeypatch.setattr(seal, 'whole_crc', lambda f: read.append(f.name) or whole_crc(f))
    open_corpus(tmp_path / 'copy')
    assert len(read) == 18   # six files of each split
    open_corpus(tmp_path / 'copy')
    assert len(read) == 18


def test_one_long_clip_does_not_lengthen_the_others(tmp_path, monkeypatch):
    """ Converting 300 clips, one of which is long, reads less than twice their numbers. """
    lengths, real, read = [3] * 300, frames.Frames.rows, []
    lengths[7] = 700_000
    source = msena(n=(300, 3, 2))
    for s in source.values():
        s['audio'] = [np.full((n, 5), i + 1, 'f4') for i, n in enumerate(lengths[: len(s['id'])])]
        del s['audio_lengths'], s['vision'], s['vision_lengths']

    def rows(self, i, j, counts=None):
        x = real(self, i, j, counts)
        read.append(x.size)
        return x

    monkeypatch.setattr(frames.Frames, 'rows', rows)
    corpus = converted(source, tmp_path)
    assert corpus.lengths('train', 'audio').tolist() == lengths
    assert all((corpus.frames('train', 'audio', i) == i + 1).all() for i in (6, 7, 8, 299))
    assert sum(read) < 2 * 5 * sum(lengths)


@pytest.mark.skipif(not MOSI.exists(), reason='shared data is absent')
def test_mosi_is_converted(tmp_path):
    corpus = open_corpus(MOSI, tmp_path)
    assert list(corpus.n_clips.values()) == [1284, 229, 686] and corpus.meta['text']['upper_case']
    assert corpus.meta['streams']['vision']['clips_empty'] == 2
    assert corpus.widths == {'audio': 73, 'vision': 3}
    texts = lowercase_if_all_caps(corpus.text('train'), corpus)
    assert texts[0] == 'anyhow it was really good'
    want = pickle.loads(MOSI.read_bytes())['test']
    assert np.array_equal(
        corpus.frames('test', 'audio', 7), want['audio'][7, : want['audio_lengths'][7]]
    )


def test_the_command_line_prints_a_summary_or_one_error_line(tmp_path):
    def run(*argv):
        command = [sys.executable, os.path.abspath(data.__file__), *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    source = save(msena(), tmp_path / 'source.pkl')
    done = run(source, '--name=tiny', '--dtype=float16', '--label_range=-5,5')
    assert done.returncode == 0
    assert all(w in done.stdout for w in ('6 train', '[-5.0, 5.0]', 'float16'))
    for argv in (
        ['--nam=x', source],
        ['nowhere'],
        [source, '--label_range=3'],
        [source, '--name=tiny'],
    ):
        failed = run(*argv)
        assert failed.returncode == 1 and failed.stderr.startswith('data.py: '), failed.stderr
        assert failed.stderr.count('\n') == 1


# -------------------------------------------------------------------------------------------------
# Padding, lengths, names, classes and encodings. The sources are made here, so the expected values
# are known.


def clip_frames(r, n, d, lead=0, trail=0, hole=0):
    """ n frames, nonzero except for `lead` at the head, `trail` at the tail and `hole` inside. """
    x = r.uniform(0.5, 2.0, (n, d)).astype(np.float32)
    x[:lead] = 0
    x[n - trail :] = 0
    x[n // 2 : n // 2 + hole] = 0
    return x


def padded(lengths, L, d, side, dtype=np.float32, seed=0, **zeros):
    """ Clips of the given lengths [N] as one array [N,L,d], padded with zeros at `side`. """
    r, x = np.random.default_rng(seed), np.zeros((len(lengths), L, d), dtype)
    for i, n in enumerate(lengths):
        at = slice(L - n, L) if side == 'left' else slice(0, n)
        x[i, at] = clip_frames(r, n, d, **zeros)
    return x


def aligned(side, n=(40, 16, 16), L=20, full=2, dtype=np.float32, **zeros):
    """
    An aligned source that states no lengths, and its true lengths {split: [N]}. `full` clips of
    each split have the full length L.
    """
    tree, lengths = {}, {}
    for k, (split, N) in enumerate(zip(SPLITS, n)):
        own = np.random.default_rng(k).integers(5, L - 4, N)
        own[:full] = L
        tree[split] = dict(
            raw_text=[f'text {i}' for i in range(N)],
            id=[f'{split}$_${i}' for i in range(N)],
            regression_labels=np.linspace(-2, 2, N).astype(np.float32),
            audio=padded(own, L, 3, side, dtype, k, **zeros),
            vision=padded(own, L, 2, side, dtype, k + 9, **zeros),
        )
        lengths[split] = own
    return tree, lengths


def assert_lengths(corpus, lengths, less=0, streams=STREAMS):
    for split, own in lengths.items():
        for m in streams:
            assert corpus.lengths(split, m).tolist() == (own - less).tolist(), (split, m)


@pytest.mark.parametrize('dtype', [np.float32, np.float16])
@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('side', ['left', 'right'])
def test_zeros_opposite_the_padding_belong_to_the_clip(side, protocol, dtype, tmp_path):
    """ A zero frame at the head, as for [CLS] (at the tail for left padding), in all clips. """
    edge = 'lead' if side == 'right' else 'trail'
    tree, lengths = aligned(side, dtype=dtype, **{edge: 1})
    convert(save(tree, tmp_path / 'source.pkl', protocol), str(tmp_path / 'corpus'))
    corpus = data.Corpus(tmp_path / 'corpus')
    assert_lengths(corpus, lengths)
    for i in (0, 3):
        n, x = lengths['test'][i], tree['test']['vision'][i]
        want = x[-n:] if side == 'left' else x[:n]
        assert np.array_equal(corpus.frames('test', 'vision', i), want)
    info = corpus.meta['streams']['audio']
    shorter = sum(int((own < 20).sum()) for own in lengths.values())
    assert info['padding'] == side and info['clips_cut'] == info['clips_cut_with_zeros'] == shorter
    assert info['padding_found']['by'] == 'zero frames'
    assert info['padding_found'][side] == 2 * shorter  # of audio and of vision
    assert f'{shorter} clips were found by cutting all-zero frames' in describe(corpus.meta)


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('full', [1, 12, 15, 16])
def test_clips_of_full_length_do_not_decide_the_padding_side(side, full, tmp_path):
    """ The zero frame of clips of full length, up to all of valid and test, is no padding. """
    edge = 'lead' if side == 'right' else 'trail'
    tree, lengths = aligned(side, full=full, **{edge: 1})
    assert_lengths(converted(tree, tmp_path), lengths)


def test_a_zero_frame_next_to_the_padding_is_cut_unless_the_text_covers_it(tmp_path):
    """ A zero frame for [SEP] is cut. With an aligned BERT mask or text features, it is kept. """
    tree, lengths = aligned('right', lead=1, trail=1)
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, lengths, less=1)
    assert corpus.meta['streams']['audio']['padding'] == 'right'
    for name in ('mask', 'vectors', 'bert'):
        for split, s in tree.items():
            mask = np.arange(20) < lengths[split][:, None]  # [N,L]
            s.pop('text_bert', None)
            s.pop('text', None)
            if name == 'mask':
                s['text_bert'] = np.stack([mask * 101, mask, 0 * mask], 1)  # [N,3,L]
            if name == 'vectors':
                s['text'] = mask[..., None] * np.ones(4)  # [N,L,4]
            if name == 'bert':
                s['text'] = np.ones((len(mask), 20, 4))  # BERT's features show no lengths
        (tmp_path / name).mkdir()
        corpus = converted(tree, tmp_path / name)
        assert_lengths(corpus, lengths, less=int(name == 'bert'))
        info, summary = corpus.meta['streams']['audio'], describe(corpus.meta)
        if name == 'bert':
            assert 'not read text [40, 20, 4]' in summary and info['clips_cut'] == 72
        else:
            assert info['clips_cut'] == 0 and 'no clip is shorter than its text in text' in summary
            assert 'not read' not in summary


def test_a_text_that_is_not_aligned_does_not_change_lengths(tmp_path):
    """ Masks that are shorter, padded on the other side, of another length, or not masks. """
    tree, lengths = aligned('right')
    for name in ('shorter', 'other side', 'other count', 'no mask'):
        for split, s in tree.items():
            own = lengths[split][:, None]
            is_text = np.arange(20) < (own // 2 if name == 'shorter' else own)  # [N,L]
            if name == 'other side':
                is_text = is_text[:, ::-1]
            if name == 'other count':
                is_text = np.ones((len(own), 30), bool)
            mask = is_text * (7 if name == 'no mask' else 1)
            s['text_bert'] = np.stack([is_text, mask, is_text], 1).astype(np.int64)  # [N,3,L]
        (tmp_path / name).mkdir()
        corpus = converted(tree, tmp_path / name)
        assert_lengths(corpus, lengths)
        summary = describe(corpus.meta)
        assert f"not read text_bert [40, 3, {30 if name == 'other count' else 20}]" in summary
        not_used = 'text_bert is not used for lengths' in summary
        assert not_used == (name in ('shorter', 'other side'))


@pytest.mark.parametrize('side', ['left', 'right'])
def test_missing_faces_do_not_change_the_padding_side(side, tmp_path):
    """ In every third clip, vision has zero frames at both ends, and audio has none. """
    tree, lengths = aligned(side, full=3)
    want = {}
    for split, s in tree.items():
        want[split] = lengths[split].copy()
        for i in range(0, len(s['id']), 3):
            first = 20 - lengths[split][i] if side == 'left' else 0
            end = first + lengths[split][i]
            s['vision'][i, first : first + 2] = 0
            s['vision'][i, end - 2 : end] = 0
            want[split][i] -= 2  # those next to the padding are cut with it
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, lengths, streams=['audio'])
    assert_lengths(corpus, want, streams=['vision'])
    assert corpus.meta['streams']['vision']['padding'] == side


def without_clip(k, lengths):
    """ lengths {split: [N]}, with 0 for clip k of each split. """
    return {split: np.where(np.arange(len(own)) == k, 0, own) for split, own in lengths.items()}


@pytest.mark.parametrize('side', ['left', 'right'])
def test_silence_opposite_the_padding_is_kept_in_clips_of_one_length(side, tmp_path):
    tree, lengths = aligned('right')
    for split, s in tree.items():
        for m in STREAMS:
            s[m][:] = 0
            s[m][:, :10] = 1
            s[m][::4, :3] = 0
            s[m] = s[m][:, ::-1].copy() if side == 'left' else s[m]
        lengths[split][:] = 10
    assert_lengths(converted(tree, tmp_path), lengths)


def test_keys_may_be_bytes(tmp_path):
    """ A Python 2 file has such keys if it was loaded with encoding='bytes' and saved again. """
    plain = msena()
    tree = {split.encode(): {k.encode(): v for k, v in s.items()} for split, s in plain.items()}
    corpus = converted(tree, tmp_path)
    assert corpus.id('test') == plain['test']['id'] and corpus.meta['renamed'] == {}
    assert corpus.widths == {'audio': 5, 'vision': 2}


def test_silence_inside_a_clip_is_kept_and_a_clip_of_zeros_is_empty(tmp_path):
    for name, zeros in dict(hole=dict(hole=2), lead=dict(lead=3)).items():
        tree, lengths = aligned('right', **zeros)
        for s in tree.values():
            s['audio'][5] = 0
        (tmp_path / name).mkdir()
        corpus = converted(tree, tmp_path / name)
        assert_lengths(corpus, lengths, streams=['vision'])
        assert_lengths(corpus, without_clip(5, lengths), streams=['audio'])
        info = corpus.meta['streams']['audio']
        assert info['clips_empty'] == 3 and info['clips_missing'] == 0
        assert info['empty_ids'][1] == 'valid$_$5 (valid)'


@pytest.mark.parametrize('lead', [0, 1])
def test_clips_of_full_length_have_no_padding(lead, tmp_path):
    """ Also if all clips begin with a zero frame (lead=1). """
    tree, lengths = aligned('right', full=99, lead=lead)
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, lengths)
    assert corpus.meta['streams']['audio']['padding'] == 'none'
    assert 'padding side' not in describe(corpus.meta)


def test_mixed_evidence_for_the_padding_side_is_refused_without_the_flag(tmp_path):
    """ Half the clips, one split (of only 4 % of the clips) or one stream has the other side. """

    def half():
        tree = aligned('right')[0]
        for c in tree.values():
            for m in STREAMS:
                c[m][::2] = c[m][::2, ::-1].copy()
        return tree

    def split():
        left = aligned('left', full=0)[0]
        return aligned('right', n=(200, 8, 8), full=0)[0] | {'valid': left['valid']}

    def stream():
        left = aligned('left')[0]
        return {s: c | {'vision': left[s]['vision']} for s, c in aligned('right')[0].items()}

    for make in (half, split, stream):
        assert_refused(make(), tmp_path, '--padding=left or --padding=right', 'audio', 'head', 'tail')
    tree, own = aligned('right')
    for side in ('left', 'right'):
        (tmp_path / side).mkdir()
        corpus = converted(half(), tmp_path / side, padding=side)
        n = np.arange(40)
        # clips that are padded on the other side get the full length
        turned = (n % 2 == 0) == (side == 'right')
        want = np.where(turned, 20, own['train'])
        assert corpus.lengths('train', 'audio').tolist() == want.tolist()
        assert 'given by --padding' in describe(corpus.meta)
    assert_refused(tree, tmp_path, 'left or right', padding='up')


def test_stated_lengths_decide_and_missing_ones_are_found(tmp_path):
    """ Stated lengths keep true zeros at both ends; None and impossible lengths are found. """
    for side in ('left', 'right'):
        tree, lengths = aligned(side, lead=1, trail=1)
        want = {}
        for split, s in tree.items():
            want[split] = lengths[split].copy()
            stated = lengths[split].tolist()
            stated[4], stated[5] = None, 99
            want[split][4:6] -= 1  # their zero frame next to the padding is cut
            s['audio_lengths'], s['vision_lengths'] = stated, np.array(stated, object)
        (tmp_path / side).mkdir()
        corpus = converted(tree, tmp_path / side)
        assert_lengths(corpus, want)
        info = corpus.meta['streams']['vision']
        assert info['padding'] == side and info['lengths_repaired'] == 6 and info['clips_cut'] == 6
        assert info['padding_found']['by'] == 'stated lengths'


def test_the_padding_side_of_a_large_corpus_is_found_from_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, 'SIDE_SAMPLE', 7)
    tree, lengths = aligned('left', trail=1)
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, lengths)
    assert corpus.meta['streams']['audio']['padding_found']['read'] == 2 * 3 * 7


def test_the_chunk_size_does_not_change_the_result(tmp_path, monkeypatch):
    tree, lengths = aligned('left', trail=1)
    for split, s in tree.items():
        mask = np.arange(20) >= 20 - lengths[split][:, None]
        s['text_bert'] = np.stack([mask, mask, mask], 1).astype(np.float32)
    for module in (frames, padding, streams):
        monkeypatch.setattr(module, 'CHUNK_BYTES', 2000)
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, lengths)
    assert corpus.meta['streams']['audio']['aligned_text'] == 'text_bert'


@pytest.mark.skipif(not MOSI.exists(), reason='shared data is absent')
def test_the_arrays_of_mosi_have_their_known_hash(tmp_path):
    """ SHA-256 of all arrays, from the version before lengths were found from zero frames. """
    convert(str(MOSI), str(tmp_path / 'corpus'))
    whole = hashlib.sha256()
    for path in sorted((tmp_path / 'corpus').rglob('*.npy')):
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    assert whole.hexdigest() == '9ca61511f87c3989d6a1df1a3512b205a506cbe43e6683f6e44bf7bfc9c1b73a'


@pytest.mark.skipif(not MOSI.exists(), reason='shared data is absent')
@pytest.mark.parametrize('side', ['left', 'right'])
def test_the_lengths_of_an_aligned_mosi_are_found(side, tmp_path):
    """ One frame per word behind (or before) a zero frame, padded to 50, without lengths. """
    tree, lengths = pickle.loads(MOSI.read_bytes()), {}
    for split, s in tree.items():
        N = len(s['id'])
        words = np.minimum(np.array(s['vision_lengths']), 49)  # [N]
        words[s['vision'][np.arange(N), words - 1].any(-1) == 0] = 0  # two clips have no words
        lengths[split] = words + 1
        x = np.zeros((N, 50, 3), np.float32)
        sound = s['audio'][np.arange(N), np.array(s['audio_lengths']) - 1]  # [N,73]
        y = np.zeros((N, 50, 73), np.float32)
        for i, k in enumerate(words):
            x[i, 1 : k + 1], y[i, 1 : k + 1] = s['vision'][i, :k], sound[i]
        for m, a in (('vision', x), ('audio', y)):
            s[m] = np.ascontiguousarray(a[:, ::-1]) if side == 'left' else a
            del s[m + '_lengths']
    corpus = converted(tree, tmp_path)
    assert corpus.meta['streams']['vision']['padding'] == side
    # a clip without words is all zero
    want = {k: np.where(v == 1, 0, v) for k, v in lengths.items()}
    assert_lengths(corpus, want)
    assert 11 < np.mean(want['train']) < 14


def ragged(n=(8, 3, 3)):
    """ A source with one array per clip, of its own length, and the lengths {split: [N]}. """
    tree, lengths = {}, {}
    for k, (split, N) in enumerate(zip(SPLITS, n)):
        own = 3 + np.arange(N) % 4
        r = np.random.default_rng(k)
        tree[split] = dict(
            raw_text=['x'] * N,
            id=[f'{split}{i}' for i in range(N)],
            regression_labels=np.linspace(-2, 2, N),
            audio=[clip_frames(r, k, 3, lead=1, trail=1) for k in own],
            vision=[clip_frames(r, k, 2, lead=2) for k in own],
        )
        lengths[split] = own
    return tree, lengths


def object_array(items):
    out = np.empty(len(items), object)
    for i, x in enumerate(items):
        out[i] = x
    return out


@pytest.mark.parametrize('kind', ['list', 'object array', 'float16', 'one split'])
def test_a_clip_of_ragged_arrays_is_as_long_as_its_array(kind, tmp_path):
    """ Also in a split of one clip, which alone does not show that arrays are ragged. """
    tree, lengths = ragged(n=(8, 1, 3) if kind == 'one split' else (8, 3, 3))
    for s in tree.values():
        for m in STREAMS:
            if kind == 'object array':
                s[m] = object_array(s[m])
            if kind == 'float16':
                s[m] = [x.astype(np.float16) for x in s[m]]
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, lengths)
    info = corpus.meta['streams']['audio']
    assert info['padding'] == 'none' and info['clips_cut'] == 0
    assert np.array_equal(corpus.frames('train', 'audio', 2), np.float32(tree['train']['audio'][2]))


@pytest.mark.parametrize('side', ['left', 'right'])
def test_a_stated_length_below_that_of_the_array_is_used(side, tmp_path):
    tree, lengths = ragged()
    want = {}
    for split, s in tree.items():
        for i, n in enumerate(lengths[split]):  # one frame of padding
            pad = np.zeros((1, 3), np.float32)
            own = s['audio'][i]
            s['audio'][i] = np.concatenate([pad, own[:-1]] if side == 'left' else [own[1:], pad])
        want[split] = lengths[split] - 1
        s['audio_lengths'] = want[split].tolist()
        s['audio_lengths'][1] = None
        want[split][1] += 1
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, want, streams=['audio'])
    x = tree['train']['audio'][3]
    assert np.array_equal(corpus.frames('train', 'audio', 3), x[1:] if side == 'left' else x[:-1])
    assert corpus.meta['streams']['audio']['lengths_repaired'] == 3


def test_padding_is_found_in_a_list_of_arrays_of_one_size(tmp_path):
    tree, lengths = aligned('left', trail=1)
    for s in tree.values():
        s['audio'], s['vision'] = list(s['audio']), object_array(s['vision'])
        s['audio'] = [x.copy() for x in s['audio']]
        s['audio'][7] = None
    corpus = converted(tree, tmp_path)
    assert_lengths(corpus, lengths, streams=['vision'])
    assert_lengths(corpus, without_clip(7, lengths), streams=['audio'])


NO_FRAMES = {
    'None': None,
    'NaN': float('nan'),
    '(0,)': np.zeros(0, np.float32),
    '(0,d)': np.zeros((0, 3), np.float32),
    'list': [],
    '0-d': np.array(None),
}


@pytest.mark.parametrize('what', [*NO_FRAMES, 'shared zeros', 'shared NaN', 'flat'])
@pytest.mark.parametrize('layout', ['list', 'object array'])
def test_a_clip_without_a_stream_is_empty(what, layout, tmp_path):
    """ Two clips of train; the others keep their frames, and the summary names the two clips. """
    tree, lengths = ragged()
    s = tree['train']
    if what == 'flat':
        for c in tree.values():
            c['audio'] = [x[1] for x in c['audio']]
    whole = [np.array(x) for x in s['audio']]
    shared = np.zeros((4, 3), np.float32) if what == 'shared zeros' else np.full((4, 3), np.nan)
    s['audio'][1] = s['audio'][6] = NO_FRAMES.get(what, None if what == 'flat' else shared)
    if layout == 'object array':
        for c in tree.values():
            c['audio'] = object_array(c['audio'])
    corpus = converted(tree, tmp_path)
    want = lengths if what != 'flat' else {k: 0 * v + 1 for k, v in lengths.items()}
    want['train'] = np.where(np.isin(np.arange(8), (1, 6)), 0, want['train'])
    assert_lengths(corpus, want, streams=['audio'])
    assert np.array_equal(corpus.frames('train', 'audio', 5), np.atleast_2d(whole[5]))
    info = corpus.meta['streams']['audio']
    assert info['clips_empty'] == info['clips_missing'] == 2
    assert info['empty_ids'] == ['train1 (train)', 'train6 (train)']
    assert 'train1 (train), train6 (train)' in describe(corpus.meta)
    assert get_batch(corpus, 'train', [1, 2])['audio_len'].tolist() == [0, want['train'][2]]


def test_a_stream_without_any_clip_is_absent(tmp_path):
    """ With None for all clips of one split, the stream exists, and is empty in that split. """
    tree, lengths = ragged()
    for s in tree.values():
        s['audio'] = [None] * len(s['id'])
    corpus = converted(tree, tmp_path)
    assert corpus.widths == {'vision': 2}
    tree, lengths = ragged()
    tree['train']['audio'] = [None] * 8
    (tmp_path / 'b').mkdir()
    corpus = converted(tree, tmp_path / 'b')
    assert corpus.widths == {'audio': 3, 'vision': 2}
    assert_lengths(corpus, lengths | {'train': np.zeros(8, int)}, streams=['audio'])
    assert corpus.meta['streams']['audio']['clips_missing'] == 8
    tree['test']['audio'] = [np.ones((2, 4))] * 3
    (tmp_path / 'c').mkdir()
    assert_refused(tree, tmp_path / 'c', 'audio', '3 features in valid', '4 in test')
    tree['test']['audio'] = [np.ones((2, 3))] * 3
    assert_refused(tree, tmp_path / 'c', 'one array for many clips', 'test0 and test1')


def list_clips(
    folder, edit=lambda split, clips: None, labels=('neutral', 'surprise', 'joy'), name='TINY'
):
    """ A folder of lists, changed by `edit`. Clip i has 4 + i frames of audio and 3 of video. """
    folder.mkdir(parents=True)
    for split in SPLITS:
        r = np.random.default_rng(len(split))
        clips = []
        for i, y in enumerate(labels):
            features = dict(
                text=f'{split} {i}',
                audio=r.uniform(1, 2, (4 + i, 3)),
                audio_len=4 + i,
                video=r.uniform(1, 2, (3, 2)),
                video_len=3,
            )
            clips.append(
                dict(id=f'{split}{i}', label=y, speaker='Joey', dialogue=str(i), features=features)
            )
        edit(split, clips)
        save(clips, folder / f'{name}_{split}.pkl')
    return str(folder)


@pytest.mark.parametrize('order', 'CF')
@pytest.mark.parametrize('protocol', [2, 4])
def test_many_clips_of_a_list_need_no_more_handles(protocol, order, tmp_path):
    """ Arrays of protocol 2 are decoded into a file, and those in Fortran order were mapped. """
    resource = pytest.importorskip('resource')
    n, folder = 60, tmp_path / 'MANY'
    folder.mkdir()
    for split in SPLITS:
        clips = []
        for i in range(n):
            x = np.random.default_rng(i).uniform(1, 2, (60 + i, 20)).astype(np.float32)
            x[-1] = 0   # its length is not stated, so each array is opened before it is written
            clips.append(dict(label='joy', features=dict(text='a', audio=np.array(x, order=order))))
        (folder / f'MANY_{split}.pkl').write_bytes(pickle.dumps(clips, protocol))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 20, hard))
    try:
        corpus = open_corpus(str(folder), tmp_path / 'data')
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for i in (0, n - 1):
        x = np.random.default_rng(i).uniform(1, 2, (60 + i, 20)).astype(np.float32)
        assert np.array_equal(corpus.frames('test', 'audio', i)[:-1], x[:-1])


def test_decoded_copies_give_their_disk_back(tmp_path):
    arrays = [rng.normal(size=(50 + i, 40)) for i in range(3)]
    with open(save(arrays, tmp_path / 'x.pkl', 2), 'rb') as f:
        lazy = read_pickle(f, str(tmp_path))
        for _ in range(2):   # a closed array may be read again
            for a, one in zip(arrays, lazy):
                assert np.array_equal(one.rows(7, 20), a[7:20]) and np.array_equal(one.all(), a)
            scratch = lazy[0].scratch.file
            assert os.fstat(scratch.fileno()).st_size == sum(a.nbytes for a in arrays)
            for one in lazy:
                one.close()
            assert os.fstat(scratch.fileno()).st_size == 0


def test_missing_values_of_a_list_get_a_default(tmp_path):
    """ Clips without an id, speaker, dialogue, audio or length: None, NaN or a missing key. """

    def edit(split, clips):
        if split == 'train':
            clips[0]['id'] = None
            del clips[1]['speaker']
            clips[2]['dialogue'] = float('nan')
            del clips[1]['features']['audio']
            clips[2]['features']['audio_len'] = None
            clips[2]['features']['audio'][-1] = 0

    corpus = open_corpus(list_clips(tmp_path / 'TINY', edit), tmp_path / 'data')
    assert corpus.id('train') == ['train_0', 'train1', 'train2']
    assert [r['speaker'] for r in corpus.rows['train']] == ['Joey', '', 'Joey']
    assert [r['dialogue'] for r in corpus.rows['train']] == ['0', '1', '']
    assert corpus.lengths('train', 'audio').tolist() == [4, 0, 6]
    assert corpus.lengths('valid', 'audio').tolist() == [4, 5, 6]
    assert corpus.meta['streams']['audio']['lengths_repaired'] == 1
    first = dict(id='entry 0 of train', speaker='train1', dialogue='train2')
    assert corpus.meta['defaults'] == {k: dict(count=1, first=[v]) for k, v in first.items()}
    summary = describe(corpus.meta)
    assert all(w in summary for w in ('train1 (train)', 'id       1 missing', 'entry 0 of train'))


def test_missing_ids_and_speakers_get_a_default(tmp_path):
    tree = msena()
    tree['valid']['id'] = object_array(['a', None, 'c'])
    tree['test']['speaker'] = [None, 'x']
    corpus = converted(tree, tmp_path)
    assert corpus.id('valid') == ['a', 'valid_1', 'c']
    assert [r['speaker'] for r in corpus.rows['test']] == ['', 'x']
    assert corpus.meta['defaults']['speaker'] == dict(count=1, first=['test$_$0'])


RENAMED = dict(
    raw_text='text_raw',
    audio='Acoustic',
    audio_lengths='audio_len',
    vision='FACET 4.2',
    vision_lengths='visual_lengths',
    regression_labels='labels',
    id='ids',
)


def test_other_known_names_are_read_and_listed_in_the_summary(tmp_path):
    plain, tree = msena(), msena()
    for split, s in plain.items():
        tree[split] = {RENAMED.get(k, k): v for k, v in s.items()}
    tree['dev'] = tree.pop('valid')
    a = converted(plain, tmp_path)
    (tmp_path / 'b').mkdir()
    b = converted(tree, tmp_path / 'b')
    for split in SPLITS:
        assert a.text(split) == b.text(split) and a.id(split) == b.id(split)
        assert np.array_equal(a.label(split), b.label(split))
        for m in STREAMS:
            assert np.array_equal(a.lengths(split, m), b.lengths(split, m))
            assert np.array_equal(a.frames(split, m, 1), b.frames(split, m, 1))
    summary = describe(b.meta)
    for words in ("'Acoustic' as audio", "'FACET 4.2' as vision", "'dev' as valid"):
        assert words in summary
    assert 'text [6, 50, 768], annotations [6]' in summary and a.meta['renamed'] == {}


def test_the_summary_lists_the_keys_that_were_not_read(tmp_path):
    tree = msena()
    for s in tree.values():
        s['eeg'], s['text_bert'] = np.zeros((len(s['id']), 4, 9)), np.zeros((len(s['id']), 3, 50))
        s['video'] = [f'{i}.mp4' for i in range(len(s['id']))]  # paths, so not vision
    summary = describe(converted(tree, tmp_path).meta)
    assert 'eeg [6, 4, 9]' in summary and 'text_bert [6, 3, 50]' in summary
    assert 'video [6]' in summary

    def edit(split, clips):
        clips[1]['features']['wav2vec'] = np.zeros((7, 8))
        for c in clips:
            c['age'] = 3
            c['features']['visual'] = c['features'].pop('video')
            c['features']['text_raw'] = c['features'].pop('text')

    corpus = open_corpus(list_clips(tmp_path / 'TINY', edit), tmp_path / 'data')
    summary = describe(corpus.meta)
    assert 'wav2vec [7, 8] in 3 clips' in summary and 'age in 9 clips' in summary
    assert "'visual' as vision" in summary and "'text_raw' as text" in summary
    assert corpus.text('test')[1] == 'test 1'
    assert corpus.lengths('test', 'vision').tolist() == [3, 3, 3]


def test_two_keys_for_one_field_are_refused(tmp_path):
    twins = dict(
        audio='acoustic',
        vision='video',
        raw_text='utterance',
        regression_labels='labels',
        audio_lengths='audio_len',
    )
    for key, twin in twins.items():
        tree = msena()
        tree['valid'][twin] = tree['valid'][key]
        assert_refused(tree, tmp_path, repr(key), repr(twin), 'valid')
        tree['valid'][twin] = None  # a key without a value is ignored
        converted(tree, tmp_path)
        shutil.rmtree(tmp_path / 'corpus')

    def edit(split, clips):
        clips[2]['features']['vision'] = clips[2]['features']['video']

    with pytest.raises(CorpusError, match="'video' and 'vision' of clip 2 of the split train"):
        convert(list_clips(tmp_path / 'TINY', edit), str(tmp_path / 'out'))


def test_a_split_file_may_have_another_known_name(tmp_path):
    source = list_clips(tmp_path / 'TINY')
    os.rename(tmp_path / 'TINY' / 'TINY_valid.pkl', tmp_path / 'TINY' / 'TINY_dev.pkl')
    assert open_corpus(source, tmp_path / 'data').n_clips['valid'] == 3
    shutil.copy(tmp_path / 'TINY' / 'TINY_dev.pkl', tmp_path / 'TINY' / 'TINY_val.pkl')
    with pytest.raises(CorpusError, match='both name the split valid'):
        convert(source, str(tmp_path / 'out'))


@pytest.mark.parametrize(
    'has, names',
    [
        ('ang sad neu hap', 'hap sad neu ang'),
        ('joy neutral anger', 'neutral joy anger'),
        ('hap sad neu ang exc fru', 'hap sad neu ang exc fru'),
        ('sad joy', 'joy sad'),
    ],
)
def test_the_classes_are_those_of_train_in_a_known_order(has, names, tmp_path):
    """ In the order of a known corpus if that has all of them, and else sorted. """
    corpus = open_corpus(list_clips(tmp_path / 'TINY', labels=has.split()), tmp_path / 'data')
    assert corpus.meta['labels']['emotion']['names'] == names.split()
    assert corpus.label('test', 'emotion').tolist() == [names.split().index(y) for y in has.split()]


def test_a_class_of_a_known_corpus_that_only_test_has_is_refused(tmp_path):
    def edit(split, clips):
        if split == 'test':
            clips[1]['label'] = 'fear'

    with pytest.raises(CorpusError, match='clip test1 in the split test is fear'):
        convert(list_clips(tmp_path / 'TINY', edit), str(tmp_path / 'out'))


CHINESE, FRENCH = '我不喜欢这部电影', 'It’s déjà vu'


@pytest.mark.parametrize(
    'codec, text', [('gbk', CHINESE), ('cp1252', FRENCH), ('big5', '電影'), ('utf-16', FRENCH)]
)
@pytest.mark.parametrize('kind', ['list', 'object', 'S array', 'protocol 2', 'features'])
def test_bytes_that_are_not_utf8_need_the_encoding(codec, text, kind, tmp_path):
    """ The error names the text by split, entry and clip. With `encoding` the text is read. """
    raw = text.encode(codec)
    if kind == 'features':

        def edit(split, clips):
            for c in clips:
                c['features']['text'] = c['features']['text'].encode(codec)
            if split == 'valid':
                clips[1]['features']['text'] = raw

        source, clip = list_clips(tmp_path / 'TINY', edit), 'valid1'
    else:
        tree = msena()
        for split, s in tree.items():
            s['raw_text'] = [t.encode(codec) for t in s['raw_text']]
            if split == 'valid':
                s['raw_text'][1] = raw
            if kind == 'object':
                s['raw_text'] = object_array(s['raw_text'])
            if kind == 'S array' and codec != 'utf-16':  # an S array strips zero bytes
                s['raw_text'] = np.array(s['raw_text'])
        protocol = 2 if kind == 'protocol 2' else 4
        source, clip = save(tree, tmp_path / 'source.pkl', protocol), 'valid$_$1'
    if codec != 'utf-16':
        with pytest.raises(CorpusError) as e:
            convert(source, str(tmp_path / 'out'))
        for word in ('Entry 1', 'split valid', f'clip {clip}', '--encoding=gbk', 'not UTF-8'):
            assert word in str(e.value), str(e.value)
    meta = convert(source, str(tmp_path / 'out'), encoding=codec)
    assert data.Corpus(tmp_path / 'out').text('valid')[1] == text
    assert f'bytes were decoded as {codec}' in describe(meta)


def py2_strings(*texts):
    """ The opcodes that Python 2 writes for a list of str. """
    return b'](' + b''.join(b'U' + bytes([len(t)]) + t for t in texts) + b'e'


def test_python_2_strings_that_are_not_utf8_need_the_encoding(tmp_path):

    def write(text):
        raw = b'\x80\x02}('
        for split in ('train', 'valid', 'test'):
            raw += b'U' + bytes([len(split)]) + split.encode() + b'}('
            raw += b'U\x08raw_text' + py2_strings(b'plain', text)
            raw += b'U\x11regression_labels](K\x00K\x01eu'
        (tmp_path / 'source.pkl').write_bytes(raw + b'u.')
        return str(tmp_path / 'source.pkl')

    cases = [
        (b'good', None, 'good'),
        (CHINESE.encode(), None, CHINESE),
        (CHINESE.encode('gbk'), 'gbk', CHINESE),
        (FRENCH.encode('cp1252'), 'cp1252', FRENCH),
    ]
    for k, (text, encoding, want) in enumerate(cases):
        convert(write(text), str(tmp_path / str(k)), encoding=encoding)
        assert data.Corpus(tmp_path / str(k)).text('test') == ['plain', want]
    with pytest.raises(CorpusError, match='Entry 1 of raw_text of the split train.*--encoding=gbk'):
        convert(write(CHINESE.encode('gbk')), str(tmp_path / 'out'))


def test_texts_that_were_decoded_as_latin1_are_repaired_or_counted(tmp_path):
    """ C1 control characters show it. A text is repaired if only one decoding makes sense. """
    tree = msena()
    wrongly_decoded = FRENCH.encode().decode('latin1')
    tree['train']['raw_text'][:4] = ['It\x92s great', wrongly_decoded, 'caf\xe9', '\x81 undefined']
    tree['test']['raw_text'][0] = '电影不错但是'.encode('gbk').decode('latin1') + '\x85\x96'
    tree['test']['raw_text'][1] = 'half \ud83d'
    corpus = converted(tree, tmp_path)
    assert corpus.text('train')[:4] == ['It’s great', FRENCH, 'café', '\x81 undefined']
    assert corpus.text('test') == [tree['test']['raw_text'][0], 'half ?']
    text = corpus.meta['text']
    assert text['cp1252_read_as_latin1'] == text['utf8_read_as_latin1'] == 1
    assert text['control_characters'] == 2
    summary = describe(corpus.meta)
    decoded = 'had been decoded as Latin-1 (C1 control characters), repaired: 1'
    assert f'texts with cp1252 that {decoded}' in summary
    assert f'texts with UTF-8 that {decoded}' in summary
    assert 'a sign of a wrong encoding, left unchanged: 2' in summary
    assert 'half a surrogate pair, replaced by ?: 1' in summary


@pytest.mark.parametrize('codec', ['klingon', 'hex', 'rot13', '', 'a\0b', '--'])
def test_an_unknown_encoding_is_refused(codec, tmp_path):
    assert_refused(msena(), tmp_path, '--encoding=', 'not a text encoding', encoding=codec)


def test_the_command_line_takes_padding_and_encoding(tmp_path):
    tree, lengths = aligned('right')
    for s in tree.values():
        s['raw_text'] = [CHINESE.encode('gbk')] * len(s['id'])
    source = save(tree, tmp_path / 'source.pkl')
    command = [sys.executable, os.path.abspath(data.__file__), source, '--name=x']

    def run(*argv):
        return subprocess.run([*command, *argv], cwd=tmp_path, capture_output=True, text=True)

    for argv in ([], ['--encoding=klingon'], ['--encoding=gbk', '--padding=up'], ['--encoding']):
        failed = run(*argv)
        assert failed.returncode == 1 and failed.stderr.startswith('data.py: ')
        assert failed.stderr.count('\n') == 1
    done = run('--encoding=gbk', '--padding=left')
    assert done.returncode == 0 and 'given by --padding' in done.stdout, done.stderr
    corpus = data.Corpus(tmp_path / 'data' / 'x')
    assert corpus.text('train')[0] == CHINESE and set(corpus.lengths('train', 'audio')) == {20}


def test_a_folder_of_an_earlier_version_opens(tmp_path):
    """ Its meta.json has no entries on how names, padding and lengths were found. """
    corpus = converted(msena(), tmp_path)
    meta = json.loads((tmp_path / 'corpus' / 'meta.json').read_text())
    for key in ('renamed', 'unread', 'defaults', 'files', 'checksum'):
        del meta[key]
    for s in meta['streams'].values():
        for key in (
            'padding_found',
            'clips_missing',
            'clips_cut',
            'clips_cut_with_zeros',
            'empty_ids',
        ):
            s.pop(key, None)
    (tmp_path / 'corpus' / 'meta.json').write_text(json.dumps(meta))
    old = data.Corpus(tmp_path / 'corpus')
    assert 'padding on the right' in describe(old.meta)
    for s in meta['streams'].values():   # a folder that is made by hand has still fewer
        del s['cleaned'], s['dtype'], s['longest'], s['padding']
    del meta['source']['file'], meta['text']['empty']
    assert '  audio    5 features a frame\n' in describe(meta)
    batches = [get_batch(c, 'train', [2])['audio'] for c in (old, corpus)]
    assert torch.equal(*batches)


# -------------------------------------------------------------------------------------------------
# Batches


def test_epoch_order_has_each_clip_once_and_batches_of_similar_cost():
    cost = rng.integers(1, 500, 1000)
    for epoch in (0, 1, None):
        batches = epoch_order(cost, 8, 3, epoch)
        assert sorted(np.concatenate(batches)) == list(range(1000))
        assert all(np.array_equal(a, b) for a, b in zip(batches, epoch_order(cost, 8, 3, epoch)))

    def spread(batches):
        return np.mean([np.ptp(cost[b]) for b in batches])

    assert spread(epoch_order(cost, 8, 3, 0)) < 30 < spread(np.arange(1000).reshape(-1, 8))
    assert not np.array_equal(epoch_order(cost, 8, 3, 0)[0], epoch_order(cost, 8, 3, 1)[0])
    assert (np.diff(cost[np.concatenate(epoch_order(cost, 8, 3, None))]) >= 0).all()


def test_get_batch_pads_masks_and_standardises(tmp_path):
    tree = msena()
    corpus = converted(tree, tmp_path)
    tokens = [list(range(1, n + 1)) for n in (3, 1, 2, 5, 4, 1)]
    b = get_batch(corpus, 'train', [3, 0], tokens, pad_id=9, standardise=False)
    assert b['tokens'].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]]
    assert b['text_len'].tolist() == [5, 3]
    assert b['text_mask'].tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert b['text_rows'].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert b['targets'].tolist() == [0, 1, 2, 3, 5, 6]
    assert b['index'].tolist() == [3, 0]
    assert b['audio'].shape == (2, 4, 5) and b['audio_len'].tolist() == [4, 1]
    assert b['audio_mask'].tolist() == [[True] * 4, [True] + [False] * 3]
    assert np.array_equal(b['audio'][0], tree['train']['audio'][3, :4])
    assert (b['audio'][1, 1:] == 0).all()
    assert np.array_equal(b['label'], tree['train']['regression_labels'][[3, 0]])
    assert b['index'].dtype == b['tokens'].dtype == torch.int64
    assert b['audio'].dtype == b['label'].dtype
    info = corpus.meta['streams']['vision']
    s = get_batch(corpus, 'train', np.array([3, 0]))
    want = (tree['train']['vision'][3, :4] - info['mean']) / info['std']
    assert np.allclose(s['vision'][0], want, atol=1e-5) and (s['vision'][1, 1:] == 0).all()
    dropped = get_batch(corpus, 'train', [3, 0], modalities=('vision',))
    assert dropped['audio'].shape == (2, 1, 5) and not dropped['audio'].any()
    assert dropped['audio_len'].tolist() == [0, 0] and not dropped['audio_mask'].any()
    assert torch.equal(dropped['vision'], s['vision']) and 'tokens' not in s
    with pytest.raises(CorpusError, match='video'):
        get_batch(corpus, 'train', [0], modalities=('video',))


def test_a_small_file_cannot_become_a_huge_corpus(tmp_path):
    """ Refused: no frames of ten million features each, and one array shared by all clips. """
    tree = msena()
    for s in tree.values():
        s['audio'] = np.zeros((len(s['raw_text']), 0, 10**7), np.float32)
    assert_refused(tree, tmp_path, 'the same 1 to 65536 features')
    tree, one = msena(), np.ones((7, 5), np.float32)
    for s in tree.values():
        s['audio'] = [one] * len(s['raw_text'])
    assert_refused(tree, tmp_path, 'one array for many clips')


# -------------------------------------------------------------------------------------------------
# The toy corpus


def test_toy_labels_equal_those_computed_by_hand():
    """
    Praise (v = 1.6) in a flat voice (-.4) with a smile (.8) is sarcasm: -1.6 - .4 + .8 = -1.2, and
    sadness, as the arousal is not high. With a neutral face it is 1.6 - .4 = 1.2, contentment. The
    sum 1.6 + .6 + .8 + 1 is clipped to 3.
    """
    assert toy.toy_label(1.6, 0.0, 'flat', 'smile') == (-1.2, 1)
    assert toy.toy_label(1.6, 0.0, 'flat', 'neutral') == (1.2, 3)
    assert toy.toy_label(1.6, 1.0, 'high', 'smile') == (3.0, 4)


def test_upper_bounds_equal_a_monte_carlo_estimate():
    """ The best predictions for 200,000 drawn clips reach the bounds within 4 standard errors. """
    draw, n = np.random.default_rng(0), 200_000
    v, pair, noise = (
        draw.integers(5, size=n),
        draw.integers(len(toy.PAIRS), size=n),
        draw.choice(toy.NOISE, n),
    )
    cases = {
        (i, j, k): toy.toy_label(toy.VALENCE[i], k, *toy.PAIRS[j])
        for i in range(5)
        for j in range(len(toy.PAIRS))
        for k in set(toy.NOISE)
    }
    y, emotion = np.array([cases[i, j, k] for i, j, k in zip(v, pair, noise)]).T  # [n]
    av = np.array([sorted(set(toy.PAIRS)).index(p) for p in toy.PAIRS])[pair]
    ceilings = toy.toy_ceilings()
    for name, state in dict(majority=0 * v, text=v, av=av, full=100 * v + av).items():
        guess, kind = np.zeros(n), np.zeros(n)
        for s in np.unique(state):
            guess[state == s], kind[state == s] = (
                np.median(y[state == s]),
                np.bincount(emotion[state == s].astype(int)).argmax(),
            )
        for key, score in dict(mae=abs(y - guess), acc=(emotion == kind)).items():
            assert abs(score.mean() - ceilings[name][key]) < 4 * score.std() / n**0.5, (name, key)
    assert (
        ceilings['full']['mae']
        < ceilings['late']['mae']
        < min(ceilings['text']['mae'], ceilings['av']['mae'])
    )


def test_the_late_fusion_bound_equals_that_of_a_linear_programme():
    """ min sum |y - f(t) - g(av)| is a linear programme, which scipy solves exactly. """
    optimize = pytest.importorskip('scipy.optimize')
    rows = toy.toy_table()
    t, av, y, n = rows[:, 0].astype(int), rows[:, 1].astype(int), rows[:, 2], len(rows)
    X = np.zeros((n, t.max() + av.max() + 2))
    X[np.arange(n), t] = X[np.arange(n), t.max() + 1 + av] = 1
    k = X.shape[1]
    exact = optimize.linprog(
        np.r_[np.zeros(k), np.full(n, 1 / n)],
        A_ub=np.block([[X, -np.eye(n)], [-X, -np.eye(n)]]),
        b_ub=np.r_[y, -y],
        bounds=[(None, None)] * k + [(0, None)] * n,
    ).fun
    assert toy.toy_ceilings()['late']['mae'] == pytest.approx(exact, abs=1e-6)


def test_the_late_fusion_bound_of_the_emotions_equals_that_of_a_mixed_integer_programme():
    """
    z[t, av, c] = 1 where the rule answers c, so f_c(t) + g_c(av) is the highest sum by 1 or more.
    Scores lie within 50; without a limit of 50 the bound is the same.
    """
    optimize = pytest.importorskip('scipy.optimize')
    rows = toy.toy_table()
    t, av, c = (rows[:, i].astype(int) for i in (0, 1, 3))  # [n] each
    count = np.zeros((5, 9, 5))
    np.add.at(count, (t, av, c), 1)
    n_scores, n_all = (5 + 9) * 5, (5 + 9) * 5 + count.size
    high, limits, lows = 50, [], []
    for i, j, k in np.ndindex(count.shape):
        z = n_scores + np.ravel_multi_index((i, j, k), count.shape)
        for other in set(range(5)) - {k}:
            row = np.zeros(n_all)
            row[[5 * i + k, 25 + 5 * j + k]] += 1
            row[[5 * i + other, 25 + 5 * j + other]] -= 1
            row[z] = -(4 * high + 1)
            limits.append(row)
            lows.append(1 - (4 * high + 1))
    for i, j in np.ndindex(count.shape[:2]):
        row = np.zeros(n_all)
        first = n_scores + np.ravel_multi_index((i, j, 0), count.shape)
        row[first:first + 5] = 1
        limits.append(row)
        lows.append(1)
    is_z = np.arange(n_all) >= n_scores
    best = optimize.milp(
        np.r_[np.zeros(n_scores), -count.ravel()],
        integrality=is_z,
        bounds=optimize.Bounds(np.where(is_z, 0, -high), np.where(is_z, 1, high)),
        constraints=[
            optimize.LinearConstraint(np.array(limits), lows),
            optimize.LinearConstraint(np.array(limits[-45:]), -np.inf, 1),
        ],
    )
    assert best.status == 0
    assert toy.toy_ceilings()['late']['acc'] == pytest.approx(-best.fun / len(rows), abs=1e-9)


def test_the_toy_corpus_is_seeded_and_converted_as_an_msena_file(tmp_path):
    a, b = (
        toy.make_toy(str(tmp_path / name), n_clips=(50, 10, 10)) or data.Corpus(tmp_path / name)
        for name in 'ab'
    )
    assert a.meta['source']['sha256'] == b.meta['source']['sha256']
    assert a.meta['source']['layout'] == 'msena'
    assert a.text('test') == b.text('test') and a.label('train', 'emotion').dtype == np.int64
    assert a.meta['labels']['emotion']['names'] == toy.EMOTIONS
    assert not (tmp_path / 'a.pkl').exists()
    assert set(a.lengths('train', 'audio')) <= set(range(14, 25))
    assert set(a.lengths('train', 'vision')) <= set(range(10, 17))


def test_adding_compares_a_run_with_the_late_fusion_bound_on_its_own_clips(tmp_path):
    """
    The late-fusion predictor itself is not better, the best predictor from all latent variables is
    better, and a run that was tested on other labels is refused.
    """
    rows, (source, _, states) = toy.toy_table(), toy.draw()
    t, av = states['test'].T
    y = source['test']['regression_labels']
    table, least = toy.additive_fit(rows[:, 0].astype(int), rows[:, 1].astype(int), rows[:, 2])
    best = np.array(
        [
            [np.median(rows[(rows[:, 0] == i) & (rows[:, 1] == j), 2]) for j in range(9)]
            for i in range(5)
        ]
    )
    assert abs(least - toy.toy_ceilings()['late']['mae']) < 1e-9
    assert abs(np.abs(y - table[t, av]).mean() - least) < 0.05

    def run(name, pred, label=y, seed=0):
        (tmp_path / name).mkdir()
        corpus = dict(name='toy', folder='toy', sha256='0', contents='', widths={}, streams={}, labels={})
        corpus |= dict(clips=dict(train=4000, valid=500, test=1000), upper_case=False)
        about = dict(
            format=FORMAT, name='deepmlf_toy', command='', commit='', dirty=False, device='cpu',
            dtype='float32', threads=1, matmul_gflops=1.0, knobs=KNOBS | dict(seed=seed),
            corpus=corpus)
        state = dict(best=1.0, best_step=1, step=1, stale=0, seconds=1.0, done=True)
        info = dict(kind='regression', range=[-3.0, 3.0])
        result = dict(
            about=about, state=state, clips=corpus['clips'], info=info,
            test=dict(mae=1.0), valid=dict(mae=1.0), majority={}, ceilings=None, controls={},
            seconds=1.0, n_trainable=1, n_frozen=1)
        (tmp_path / name / 'result.json').write_text(json.dumps(result))
        (tmp_path / name / 'test.jsonl').write_text(
            ''.join(
                json.dumps(dict(id=str(i), pred=float(p), label=float(v))) + '\n'
                for i, (p, v) in enumerate(zip(pred, label))
            )
        )
        return str(tmp_path / name)

    verdict = adding([run('late', table[t, av])])
    assert '+0.000 +- 0.000' in verdict and 'not better' in verdict
    assert ': better than late fusion can be' in adding(
        [run('best', best[t, av], seed=1), f'{tmp_path}/late'])
    with pytest.raises(EvalError, match='not tested on the scores'):
        adding([run('other', y, -y)])


def test_a_corpus_that_another_process_makes_at_the_same_time_is_opened(tmp_path, monkeypatch):
    """ The other process finishes after open_corpus looked for the folder. """
    def convert_after_another(source, folder):
        convert(source, folder)
        return convert(source, folder)

    monkeypatch.setattr(data, 'convert', convert_after_another)
    source = save(msena(), tmp_path / 'source.pkl')
    assert open_corpus(source, tmp_path / 'data').n_clips['train'] == 6


def test_the_key_id_is_preferred_to_other_names_of_ids(tmp_path):
    """ 'clip_id' is read as the id only if there is no 'id'. """
    tree = msena()
    for s in tree.values():
        s['clip_id'] = [f'number {i}' for i in range(len(s['id']))]
    ids, meta = list(tree['valid']['id']), converted(tree, tmp_path).meta
    assert data.Corpus(tmp_path / 'corpus').id('valid') == ids
    assert 'clip_id' in meta['unread'] and not meta['renamed']
    shutil.rmtree(tmp_path / 'corpus')
    for s in tree.values():
        del s['id']
    assert converted(tree, tmp_path).id('valid')[1] == 'number 1'


@pytest.mark.parametrize('codec', ['utf-16-le', 'utf-16-be', 'utf-32-le'])
def test_utf16_without_a_byte_order_mark_is_not_read_as_utf8(codec, tmp_path):
    """ ASCII letters in UTF-16 are valid UTF-8, with a NUL character before or after each. """
    tree = msena()
    tree['valid']['raw_text'] = [t.encode(codec) for t in tree['valid']['raw_text']]
    source = save(tree, tmp_path / 'source.pkl')
    with pytest.raises(CorpusError, match='Entry 0 of raw_text of the split valid .* not UTF-8'):
        convert(source, str(tmp_path / 'out'))
    tree['valid']['raw_text'] = ['a\0b\0'] + [''] * (len(tree['valid']['raw_text']) - 1)
    meta = convert(save(tree, tmp_path / 'source.pkl'), str(tmp_path / 'out'))   # a str stays
    assert 'a sign of a wrong encoding, left unchanged: 1' in data.describe(meta)
