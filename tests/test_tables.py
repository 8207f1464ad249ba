"""
corpora/tables.py, corpora/frame_files.py and corpora/kinds.py: tables, files of frames, and files
that are no corpus.

    python -m pytest -q tests/test_tables.py
"""

import csv
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import zipfile

import numpy as np
import pytest
import torch

import data
import eval as evaluation
from corpora.convert import convert
from corpora.describe import describe
from corpora.rows import number_of
from corpora.splits import split_by_video
from corpora.tables import seconds_of
from corpora.torch_files import opened_torch
from corpora.unpickle import CorpusError
from data import open_corpus
from fakes import HERE, msena, save
from run.absent import PUBLISHED, absent_files
from run.clips import corpus_facts, is_same_corpus
from run.finished import EvalError
from run.pictures import seconds_per_frame

MELD = HERE.parent / 'shared' / 'data' / 'meld'
SPLITS = ('train', 'valid', 'test')


def write_table(path, rows, delimiter=',', encoding='utf-8'):
    """ Writes rows (dicts of the same keys) as a table -> its path. """
    with open(path, 'w', encoding=encoding, newline='') as f:
        table = csv.DictWriter(f, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)
    return str(path)


def clips(n=12, per_video=2):
    """ Rows as of CMU's label.csv: 6 videos of 2 clips, of which each split has two. """
    rows = []
    for i in range(n):
        video = i // per_video
        rows.append(dict(
            video_id=f'v{video}', clip_id=f'{i % per_video:04d}', text=f'clip {i}',
            label=round(-2.5 + 5 * i / (n - 1), 2), annotation=['Negative', 'Positive'][i % 2],
            mode=SPLITS[video % 3]))
    return rows


def converted(source, tmp_path, **kw):
    convert(str(source), str(tmp_path / 'corpus'), **kw)
    return data.Corpus(tmp_path / 'corpus')


def assert_refused(source, tmp_path, *words, **kw):
    """ Conversion raises one sentence with these words, and leaves nothing behind. """
    with pytest.raises(CorpusError) as e:
        converted(source, tmp_path, **kw)
    message = str(e.value)
    for word in words:
        assert word in message, message
    assert '\n' not in message and message.endswith('.')
    assert not [p for p in os.listdir(tmp_path) if p.startswith('corpus')]


# -------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize('end', ['csv', 'tsv', 'jsonl', 'semicolons'])
def test_a_cmu_table_becomes_a_corpus_with_a_score_and_classes(end, tmp_path):
    path = tmp_path / f'mine.{end}'
    if end == 'jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in clips()))
    else:
        path = tmp_path / f"mine.{end.replace('semicolons', 'csv')}"
        write_table(path, clips(), dict(csv=',', tsv='\t', semicolons=';')[end])
    corpus = converted(path, tmp_path)
    assert corpus.n_clips == dict(train=4, valid=4, test=4) and corpus.widths == {}
    assert corpus.id('test') == ['v2$_$0000', 'v2$_$0001', 'v5$_$0000', 'v5$_$0001']
    assert corpus.text('valid') == ['clip 2', 'clip 3', 'clip 8', 'clip 9']
    assert corpus.labels['label'] == dict(kind='regression', range=[-3, 3])
    assert corpus.label('train').tolist() == np.float32([-2.5, -2.05, .23, .68]).tolist()
    assert corpus.labels['annotation']['names'] == ['Negative', 'Positive']
    assert corpus.label('train', 'annotation').tolist() == [0, 1, 0, 1]
    assert 'notes' not in corpus.meta


@pytest.mark.skipif(not MELD.exists(), reason='shared data is absent')
def test_the_three_tables_of_meld_are_read(tmp_path):
    corpus = open_corpus(str(MELD), tmp_path)
    assert corpus.n_clips == dict(train=9989, valid=1109, test=2610)   # rows of the files
    assert corpus.labels['emotion']['names'][:3] == ['neutral', 'surprise', 'fear']
    assert corpus.labels['sentiment']['names'] == ['negative', 'neutral', 'positive']
    assert np.bincount(corpus.label('test', 'emotion')).tolist() == [
        1256, 281, 50, 208, 402, 68, 345]   # the numbers of clips that MELD's paper gives
    assert corpus.text('valid')[0] == 'Oh my God, he’s lost it. He’s totally lost it.'
    assert corpus.id('valid')[:2] == ['0$_$0', '0$_$1']
    first = json.loads((tmp_path / corpus.name / 'valid' / 'text.jsonl').read_text().split('\n')[0])
    assert first['speaker'] == 'Phoebe' and first['duration'] == 2.793
    assert any('156 videos are in more than one split' in note for note in corpus.meta['notes'])


def test_columns_are_given_by_flags(tmp_path):
    rows = [dict(words=r['text'], a=r['video_id'], b=r['clip_id'], joy=r['label'],
                 mood=i % 2, part=r['mode'], notes='x') for i, r in enumerate(clips())]
    source = write_table(tmp_path / 'mine.csv', rows)
    assert_refused(source, tmp_path, 'No column', 'like a text', 'words', '--text=COLUMN')
    assert_refused(source, tmp_path, 'no column of splits', '--split=COLUMN', text='words')
    named = dict(text='words', split='part', id='a,b')
    assert_refused(source, tmp_path, 'like a label', '--label=COLUMN', **named)
    assert_refused(source, tmp_path, "no column 'none' for --label", label='none', **named)
    corpus = converted(source, tmp_path, label='Joy', classes='mood', video='a', **named)
    assert list(corpus.labels) == ['label', 'mood']
    assert corpus.labels['mood']['names'] == ['0', '1']
    assert corpus.id('train')[0] == 'v0$_$0000'
    summary = describe(corpus.meta)
    assert "'joy' as label" in summary and 'not read notes' in summary


@pytest.mark.parametrize('codec', ['utf-8-sig', 'utf-16', 'cp1252'])
def test_encodings_quotes_and_newlines_inside_cells_are_kept(codec, tmp_path):
    rows = clips()
    text = 'He said "naïve", and:\nnothing; more'
    rows[0]['text'] = text
    source = write_table(tmp_path / 'mine.csv', rows, encoding=codec)
    if codec == 'cp1252':
        assert_refused(source, tmp_path, 'not UTF-8', 'line 2', '--encoding=cp1252')
    corpus = converted(source, tmp_path, **({'encoding': codec} if codec == 'cp1252' else {}))
    assert corpus.text('train')[0] == text


def test_bad_tables_are_refused_with_the_line(tmp_path):
    def refused(text, *words):
        (tmp_path / 'mine.csv').write_text(text)
        assert_refused(tmp_path / 'mine.csv', tmp_path, *words)

    head = 'id,text,label,mode\n'
    good = 'a,good,1,train\nb,bad,-1,valid\nc,fine,0.5,test\n'
    refused('', 'no rows')
    refused(head, 'no rows')
    refused('id,text,text,mode\na,b,c,train\n', "two columns 'text'")
    refused('id,text,sentence,label,mode\na,b,c,1,train\n', "'text' and 'sentence'", '--text=')
    refused(head + good + 'd,so, so,1,train\n', 'Line 5', '5 cells for 4 columns')
    refused(head + good + 'd,"so,1,train\n', 'line 5', 'quote')
    refused(head + good + 'd,so,high,train\n', 'line 5', "'high'", 'not a number', '--classes=label')
    refused(head + good + 'd,so,1,later\n', '1 rows are in no split', 'line 5', "'later'")
    refused(head + good.replace('valid', 'train'), 'split valid', '--split=80/10/10')
    refused(head + good + 'd,so,,train\n', 'label of clip d', 'nan')
    refused(head + good + 'd,so,9,train\n', 'clip d', '--label_range')
    (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n{"text"\n')
    assert_refused(tmp_path / 'bad.jsonl', tmp_path, 'Line 2', 'not JSON')
    write_table(tmp_path / 'train_mine.csv', clips())
    (tmp_path / 'mine.csv').unlink()
    assert_refused(tmp_path, tmp_path, 'none of the split', 'valid, test')


def test_missing_values_of_a_label_do_not_block_the_others(tmp_path):
    rows = clips()
    for i, row in enumerate(rows):
        row |= dict(label_T='' if i == 5 else 0.5, label_A='nan', emotion='' if i == 3 else 'joy')
    corpus = converted(write_table(tmp_path / 'mine.csv', rows), tmp_path)
    assert list(corpus.labels) == ['label', 'label_T', 'annotation', 'emotion']
    y = np.concatenate([corpus.label(s, 'label_T') for s in SPLITS])
    assert np.isnan(y).sum() == 1
    assert np.concatenate([corpus.label(s, 'emotion') for s in SPLITS]).tolist().count(-1) == 1
    notes = '; '.join(corpus.meta['notes'])
    assert '1 clips have no label_T' in notes and '1 clips have no emotion' in notes
    assert 'label_A is empty' in notes


def test_a_split_by_video_is_deterministic_and_puts_no_video_into_two(tmp_path):
    videos = [f'v{i // 7}' for i in range(700)]
    once = split_by_video(videos, [.8, .1, .1])
    assert once == split_by_video(videos, [.8, .1, .1])
    assert len(set(zip(videos, once))) == 100
    assert [once.count(s) for s in SPLITS] == [560, 70, 70]
    shuffled = split_by_video(videos[::-1], [.8, .1, .1])
    assert shuffled == once[::-1]
    assert set(split_by_video(list('abc'), [.98, .01, .01])) == set(SPLITS)
    assert set(split_by_video(['a'] * 100 + ['b', 'c'], [.1, .1, .8])) == set(SPLITS)
    with pytest.raises(CorpusError, match='2 videos and three splits'):
        split_by_video(list('aabb'), [.8, .1, .1])

    rows = [{k: v for k, v in r.items() if k != 'mode'} for r in clips(60)]
    source = write_table(tmp_path / 'mine.csv', rows)
    assert_refused(source, tmp_path, 'above 0', split='80/20/0')
    corpus = converted(source, tmp_path, split='80/10/10')
    assert corpus.n_clips == dict(train=48, valid=6, test=6)
    names = [{i.split('$')[0] for i in corpus.id(s)} for s in SPLITS]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


def test_ids_with_a_number_in_brackets_name_the_video(tmp_path):
    """ As those of CMU-MOSEI: VIDEO[CLIP]. """
    rows = [{k: v for k, v in r.items() if k not in ('mode', 'video_id')} for r in clips(60)]
    rows = [r | dict(clip_id=f'video{i // 3}[{i % 3}]') for i, r in enumerate(rows)]
    corpus = converted(write_table(tmp_path / 'mine.csv', rows), tmp_path, split='80/10/10')
    videos = [{clip.split('[')[0] for clip in corpus.id(split)} for split in SPLITS]
    assert sum(map(len, videos)) == len(set.union(*videos)) == 20


def test_the_first_line_of_excel_is_no_row_and_1_0_is_no_number(tmp_path):
    rows = [f'v{i};clip {i};{i % 3 - 1},5;{SPLITS[i % 3]}'.replace(',5', '.5') for i in range(9)]
    path = tmp_path / 'excel.csv'
    path.write_text('sep=;\n' + '\n'.join(['video_id;text;label;mode', *rows]))
    assert converted(path, tmp_path).text('train') == ['clip 0', 'clip 3', 'clip 6']
    assert number_of('1_0') is None and number_of('1e1') == 10


@pytest.mark.parametrize('label_range', [(-5000, 5000), (-np.inf, np.inf)])
def test_a_range_that_no_run_could_open_is_refused(label_range, tmp_path):
    source = write_table(tmp_path / 'mine.csv', clips())
    assert_refused(source, tmp_path, 'The label label has the', label_range=label_range)


def test_a_split_without_named_videos_is_said_or_refused(tmp_path):
    """ Ids that repeat number the clips of a video, which no column names. """
    rows = [{k: v for k, v in r.items() if k not in ('mode', 'video_id')} for r in clips(60)]
    source = write_table(tmp_path / 'numbered.csv', rows)
    assert_refused(source, tmp_path, 'Ids of', 'repeat', '--video=COLUMN', split='80/10/10')
    rows = [r | dict(clip_id=f'talk{i}') for i, r in enumerate(rows)]
    corpus = converted(write_table(tmp_path / 'named.csv', rows), tmp_path, split='80/10/10')
    assert 'split 80/10/10 clip by clip, because no column names the video' in str(corpus.meta['notes'])
    assert corpus.n_clips == dict(train=48, valid=6, test=6)


def test_videos_that_cross_splits_are_counted_in_any_format(tmp_path):
    rows = clips()
    rows[0]['mode'] = 'test'
    corpus = converted(write_table(tmp_path / 'mine.csv', rows), tmp_path)
    note = '1 videos are in more than one split, and 1 clips of valid and test are of a video of ' \
           'train: v0'
    assert corpus.meta['notes'] == [note] and note in describe(corpus.meta)
    tree = msena()
    tree['train']['id'] = [f'a{i}[0]' for i in range(6)]
    tree['valid']['id'] = ['a3[1]', 'b[0]', 'b[1]']
    tree['test']['id'] = ['c[0]', 'b[2]']
    meta = convert(save(tree, tmp_path / 'x.pkl'), str(tmp_path / 'other'))
    assert meta['notes'] == ['2 videos are in more than one split, and 1 clips of valid and test '
                             'are of a video of train: a3, b']


# -------------------------------------------------------------------------------------------------
# Frames and times


def frames_of(i, d=3):
    return np.random.default_rng(i).normal(size=(2 + i, d)).astype(np.float32)


def save_frames(path, x):
    end = path.suffix
    if end == '.npy':
        np.save(path, x)
    elif end == '.npz':
        np.savez(path, audio=x, other=np.zeros(3))
    elif end == '.csv':
        path.write_text('\n'.join([','.join('abc'), *(','.join(map(str, row)) for row in x)]))
    else:
        torch.save({'audio': torch.from_numpy(x)} if end == '.pth' else torch.from_numpy(x), path)


def table_with_audio(folder, ends=('.npy',)):
    """ A table in a folder, with files of frames beside it -> its rows. """
    (folder / 'frames').mkdir(parents=True)
    rows = clips()
    for i, row in enumerate(rows):
        path = folder / 'frames' / f'{i}{ends[i % len(ends)]}'
        save_frames(path, frames_of(i))
        row['audio'] = f'frames/{path.name}'
        row |= dict(start=f'00:00:{i:02d},500', end=i + 0.5 + (2 + i) / 25)
    return rows


def test_frames_come_from_files_of_each_kind(tmp_path):
    rows = table_with_audio(tmp_path / 'mine', ('.npy', '.npz', '.csv', '.pt', '.pth'))
    rows[3]['audio'] = ''
    corpus = converted(write_table(tmp_path / 'mine' / 'mine.csv', rows), tmp_path)
    assert corpus.widths == dict(audio=3)
    number = {row['text']: i for i, row in enumerate(rows)}
    for split in SPLITS:
        for k, text in enumerate(corpus.text(split)):
            i = number[text]
            expected = frames_of(i) if i != 3 else frames_of(i)[:0]
            assert np.array_equal(corpus.frames(split, 'audio', k), expected), i
    assert corpus.meta['streams']['audio']['clips_missing'] == 1
    # the times of the clips give 25 frames a second, and pictures are then in seconds
    assert corpus.meta['streams']['audio']['frames_per_second'] == 25
    assert seconds_per_frame(corpus, 'audio frame') == 1 / 25


def test_the_hash_of_the_source_covers_the_files_of_frames(tmp_path):
    source = write_table(tmp_path / 'mine.csv', table_with_audio(tmp_path))
    before = convert(source, tmp_path / 'a')['source']['sha256']
    assert convert(source, tmp_path / 'b')['source']['sha256'] == before
    save_frames(tmp_path / 'frames' / '4.npy', 2 * frames_of(4))
    assert convert(source, tmp_path / 'c')['source']['sha256'] != before


def test_two_conversions_of_one_file_are_two_corpora(tmp_path):
    """ A run of one of them may have been trained on the test clips of the other. """
    source = write_table(tmp_path / 'mine.csv', clips())
    found = {}
    for name, flags in (('a', {}), ('again', {}), ('b', dict(split='20/40/40'))):
        convert(source, tmp_path / name, **flags)
        found[name] = data.Corpus(tmp_path / name)
    assert len({c.sha256 for c in found.values()}) == 1
    assert found['a'].contents == found['again'].contents != found['b'].contents
    facts = corpus_facts(found['a'])
    same = {name: is_same_corpus(facts, corpus_facts(c)) for name, c in found.items()}
    assert same == dict(a=True, again=True, b=False)
    toy = dict(facts, folder=str(tmp_path / 'b'))
    with pytest.raises(EvalError, match='by another conversion of it'):
        evaluation.open_own_corpus('out/run', toy)


def test_the_column_names_of_pandas_are_no_frame(tmp_path):
    rows = table_with_audio(tmp_path)
    x = frames_of(4)   # [S,d]
    d = x.shape[1]
    lines = [','.join(map(str, range(d)))] + [','.join(map(str, row)) for row in x.tolist()]
    path = tmp_path / 'frames' / '4.csv'
    path.write_text('\n'.join(lines) + '\n')
    rows[4]['audio'] = 'frames/4.csv'
    corpus = converted(write_table(tmp_path / 'mine.csv', rows), tmp_path)
    stored = [corpus.frames(split, 'audio', k) for split in SPLITS
              for k, text in enumerate(corpus.text(split)) if text == rows[4]['text']]
    np.testing.assert_allclose(stored[0], x)
    path.write_text('\n'.join([f',{lines[0]}'] + [f'{n},{line}' for n, line in enumerate(lines[1:])]))
    shutil.rmtree(tmp_path / 'corpus')
    assert_refused(tmp_path / 'mine.csv', tmp_path, 'a first column without a name', 'index=False')


def test_an_lm_that_is_not_read_may_be_absent(tmp_path):
    k = dict(corpus='toy', lm='no/such-model', system='late')
    assert absent_files(k, {}, str(tmp_path), reads_text=False) is None
    assert 'no/such-model' in absent_files(k, {}, str(tmp_path))


def test_a_flag_makes_the_paths_of_frames_from_columns(tmp_path):
    rows = table_with_audio(tmp_path)
    for i, row in enumerate(rows):
        del row['audio']
        os.rename(tmp_path / 'frames' / f'{i}.npy',
                  tmp_path / 'frames' / f"{row['video_id']}_{row['clip_id']}.npy")
    source = write_table(tmp_path / 'mine.csv', rows)
    corpus = converted(source, tmp_path, audio=str(tmp_path / 'frames/{video_id}_{clip_id}.npy'))
    assert np.array_equal(corpus.frames('train', 'audio', 1), frames_of(1))


def test_the_split_may_be_a_part_of_the_path_of_frames(tmp_path):
    """ Three tables number their clips anew, as MELD's do. """
    for n, split in enumerate(SPLITS):
        (tmp_path / 'frames' / split).mkdir(parents=True)
        rows = [dict(id=i, text=f'clip {i}', label=0.5 * i) for i in range(3)]
        write_table(tmp_path / f'{split}.csv', rows)
        for i in range(3):
            np.save(tmp_path / 'frames' / split / f'{i}.npy', frames_of(3 * n + i))
    one_for_all = str(tmp_path / 'frames' / 'train' / '{id}.npy')
    assert_refused(tmp_path, tmp_path, 'Clips of the splits train and valid',
                   'name one file of audio frames', audio=one_for_all)
    corpus = converted(tmp_path, tmp_path, audio=str(tmp_path / 'frames/{split}/{id}.npy'))
    for n, split in enumerate(SPLITS):
        assert np.array_equal(corpus.frames(split, 'audio', 2), frames_of(3 * n + 2))


def test_a_column_of_splits_names_the_folders_of_frames(tmp_path):
    rows = [dict(id=i, text=f'clip {i}', label=0.5, Split=['train', 'dev', 'test'][i % 3])
            for i in range(6)]
    for i, row in enumerate(rows):
        (tmp_path / row['Split']).mkdir(exist_ok=True)
        np.save(tmp_path / row['Split'] / f'{i}.npy', frames_of(i))
    source = write_table(tmp_path / 'mine.csv', rows)
    corpus = converted(source, tmp_path, audio=str(tmp_path / '{split}' / '{id}.npy'))
    assert np.array_equal(corpus.frames('valid', 'audio', 1), frames_of(4))


def test_zero_frames_at_the_end_of_a_file_are_frames(tmp_path):
    """ Also where all files have the same number of frames, as a padded array would. """
    rows = table_with_audio(tmp_path)
    for i in range(len(rows)):
        x = np.ones((9, 3))
        x[7:] = 0
        np.save(tmp_path / 'frames' / f'{i}.npy', x)
    source = write_table(tmp_path / 'mine.csv', rows)
    assert converted(source, tmp_path).lengths('train', 'audio').tolist() == [9] * 4
    convert(source, str(tmp_path / 'padded'), padding='right')
    assert data.Corpus(tmp_path / 'padded').lengths('train', 'audio').tolist() == [7] * 4


def test_a_quote_that_joins_rows_of_a_tsv_is_refused(tmp_path):
    lines = ['id\ttext\tlabel\tsplit', '1\t"I told him\t-2\ttrain', '2\tto leave\t1\ttrain',
             '3\tnow."\t2\ttrain', '4\tok\t0\tvalid', '5\tok\t0\ttest']
    (tmp_path / 'mine.tsv').write_text('\n'.join(lines))
    assert_refused(tmp_path / 'mine.tsv', tmp_path, 'A cell from line 2', 'holds a tab')


def test_a_tab_inside_quotes_is_a_part_of_the_text(tmp_path):
    rows = [row | dict(text=f"a\tb {row['text']}") for row in clips()]
    corpus = converted(write_table(tmp_path / 'mine.tsv', rows, '\t'), tmp_path)
    assert corpus.text('train')[0] == 'a\tb clip 0'


def test_dialogues_of_several_videos_are_noted(tmp_path):
    rows = [row | dict(dialogue_id=i % 2) for i, row in enumerate(clips())]
    summary = describe(convert(write_table(tmp_path / 'a.csv', rows), tmp_path / 'several'))
    assert '6 dialogues have clips of several videos, first 0' in summary
    rows = [row | dict(dialogue_id=row['video_id']) for row in clips()]
    assert 'dialogues have' not in describe(
        convert(write_table(tmp_path / 'b.csv', rows), tmp_path / 'one'))


def test_a_class_may_be_called_none(tmp_path):
    rows = [row | dict(annotation=['none', 'happy', 'NA'][i % 3]) for i, row in enumerate(clips())]
    corpus = converted(write_table(tmp_path / 'mine.csv', rows), tmp_path)
    assert corpus.labels['annotation']['names'] == ['happy', 'none']
    assert corpus.label('valid', 'annotation').tolist() == [-1, 1, -1, 1]   # NA is a missing value


def test_decimal_commas_are_no_classes(tmp_path):
    scores = [str(row['label']).replace('.', ',') for row in clips()]
    rows = [row | dict(label=['0', score][i > 0]) for i, (row, score) in enumerate(zip(clips(), scores))]
    source = write_table(tmp_path / 'mine.csv', rows, ';')
    assert_refused(source, tmp_path, "'label'", 'decimal commas', 'write them with points')
    pairs = [row | dict(label=['1,2', '2,3'][i % 2]) for i, row in enumerate(clips())]
    corpus = converted(write_table(tmp_path / 'pairs.csv', pairs), tmp_path, classes='label')
    assert list(corpus.labels.values())[0]['names'] == ['1,2', '2,3']


def test_files_of_frames_outside_the_folder_are_read_and_counted(tmp_path):
    rows = table_with_audio(tmp_path / 'mine')
    source = write_table(tmp_path / 'mine' / 'mine.csv', rows)
    assert 'are not in' not in describe(convert(source, tmp_path / 'inside'))
    (tmp_path / 'other').mkdir()
    for i, path in enumerate(('3.npy', '4.npy', '5.npy')):
        os.rename(tmp_path / 'mine' / 'frames' / path, tmp_path / 'other' / path)
        rows[3 + i]['audio'] = str(tmp_path / 'other' / path) if i else f'../other/{path}'
    (tmp_path / 'mine' / 'frames' / '5.npy').symlink_to(tmp_path / 'other' / '5.npy')
    rows[5]['audio'] = 'frames/5.npy'
    source = write_table(tmp_path / 'mine' / 'mine.csv', rows)
    note = f"3 files of audio frames are not in {tmp_path / 'mine'}, first "
    assert note in describe(convert(source, tmp_path / 'outside'))
    # a flag is the user's own, and its folder need not be the table's
    os.rename(tmp_path / 'mine' / 'frames', tmp_path / 'frames')
    for i, row in enumerate(rows):
        name = f"{row['video_id']}_{row['clip_id']}.npy"
        np.save(tmp_path / 'frames' / name, frames_of(i))
    flag = str(tmp_path / 'frames' / '{video_id}_{clip_id}.npy')
    assert 'are not in' not in describe(convert(source, tmp_path / 'flag', audio=flag))


def test_bad_files_of_frames_are_refused_with_the_clip(tmp_path):
    rows = table_with_audio(tmp_path)
    source = write_table(tmp_path / 'mine.csv', rows)
    path = tmp_path / 'frames' / '4.npy'

    def refused(*words):
        assert_refused(source, tmp_path, *words)

    os.remove(path)
    os.remove(tmp_path / 'frames' / '7.npy')
    refused('2 of 12 files of audio frames', 'v2$_$0000', '4.npy')
    np.save(tmp_path / 'frames' / '7.npy', frames_of(7))
    path.write_bytes(b'')
    refused('v2$_$0000', 'empty (0 bytes)')
    np.save(path, frames_of(4, d=5))
    refused('v2$_$0000', '[6, 5]', '[2, 3]', 'same features')
    np.save(path, np.array([1, 'a'], object))
    refused('v2$_$0000', 'Python objects')
    np.save(path, np.zeros((2, 3, 4)))
    refused('v2$_$0000', '[2, 3, 4]')
    path.write_bytes(b'no array at all')
    refused('v2$_$0000', 'could not be read')
    rows[4]['audio'] = 'frames/4.wav'
    write_table(tmp_path / 'mine.csv', rows)
    refused('v2$_$0000', '4.wav', 'no file of frames', '.npy')
    rows[4]['audio'] = 'frames/4.csv'
    write_table(tmp_path / 'mine.csv', rows)
    (tmp_path / 'frames' / '4.csv').write_text('1,2,3\n1,2\n')
    refused('v2$_$0000', 'frames of 2 and of 3 features')
    rows[4]['audio'] = 'frames/4.npz'
    write_table(tmp_path / 'mine.csv', rows)
    np.savez(tmp_path / 'frames' / '4.npz', a=frames_of(4), b=frames_of(4))
    refused('v2$_$0000', 'arrays a, b')


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (self.canary, 'w')


@pytest.mark.parametrize('end', ['.npy', '.npz', '.pt'])
def test_a_file_of_frames_runs_no_code(end, tmp_path):
    rows = table_with_audio(tmp_path)
    path, canary = tmp_path / 'frames' / f'evil{end}', str(tmp_path / 'canary')
    evil = np.array([Evil(canary)], object)
    if end == '.pt':
        torch.save(Evil(canary), path)
    elif end == '.npy':
        np.save(path, evil)
    else:
        np.savez(path, audio=evil)
    rows[4]['audio'] = f'frames/evil{end}'
    source = write_table(tmp_path / 'mine.csv', rows)
    assert_refused(source, tmp_path, 'v2$_$0000', f'evil{end}', 'array of float32')
    assert not os.path.exists(canary)


TENSORS = dict(
    float=torch.randn(3, 4), double=torch.randn(3, 4).double(), half=torch.randn(3, 4).half(),
    bfloat16=torch.randn(3, 4).bfloat16(), long=torch.tensor([[2**40, -1]]), bool=torch.eye(3) > 0,
    byte=torch.arange(6).byte().view(2, 3), transposed=torch.randn(4, 3).t(),
    view=torch.randn(9, 4)[2:8:2, 1:], expanded=torch.randn(1, 4).expand(3, 4),
    empty=torch.zeros(0, 4), one_value=torch.tensor(3.0), parameter=torch.nn.Parameter(torch.randn(2, 2)))


def test_tensors_are_read_as_torch_reads_them(tmp_path):
    torch.save(dict(TENSORS, other='x' * 9000, shape=TENSORS['view'].shape), tmp_path / 'x.pt')
    with open(tmp_path / 'x.pt', 'rb') as f, opened_torch(f) as file:
        for name, tensor in TENSORS.items():
            wanted = tensor.detach().float() if name == 'bfloat16' else tensor.detach()
            read = file.array(file.value[name])
            assert read.dtype == wanted.numpy().dtype and np.array_equal(read, wanted.numpy()), name
        assert file.value['shape'] == (3, 3)


def test_a_tensor_of_a_big_endian_machine_is_read(tmp_path):
    torch.save(torch.arange(3), tmp_path / 'x.pt')
    big = {'byteorder': b'big', 'data/0': np.arange(3, dtype='>i8').tobytes()}
    edit_archive(tmp_path / 'x.pt', lambda name, raw: big.get(name, raw))
    with open(tmp_path / 'x.pt', 'rb') as f, opened_torch(f) as file:
        assert np.array_equal(file.array(file.value), np.arange(3))


def edit_archive(path, edit, **how):
    """ Write a .pt file again, with the entry edit(name, bytes) in place of each. """
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', **how) as archive:
        for name, raw in entries.items():
            archive.writestr(name, edit(name.partition('/')[2], raw))


def with_pickle(path, opcodes):
    edit_archive(path, lambda name, raw: opcodes if name == 'data.pkl' else raw)


ASKS_2_GB = b'J' + (2**31 - 1).to_bytes(4, 'little') + b'\x85R.'


def legacy(path):
    """ The format of torch before 1.6: several pickles, here of one bytearray. """
    heads = (0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True))
    raw = b''.join(pickle.dumps(head, 2) for head in heads)
    path.write_bytes(raw + b'\x80\x02cbuiltins\nbytearray\n' + ASKS_2_GB + pickle.dumps([], 2))


def longer(path):
    """ The pickle states more values than the storage has: 40 in place of 8. """
    edit_archive(path, lambda name, raw: raw.replace(b'K\x08', b'K\x28'))


def ends_behind(path):
    """ The tensor [2, 4] of a storage of 8 values begins at its value 1. """
    edit_archive(path, lambda name, raw: raw.replace(b'QK\x00K\x02K\x04', b'QK\x01K\x02K\x04'))


TORCH_BOMBS = [
    (legacy, 'is no zip archive, which torch.save has written since torch 1.6'),
    (lambda path: with_pickle(path, b'\x80\x02cbuiltins\nbytearray\n' + ASKS_2_GB),
     'names builtins.bytearray'),
    (lambda path: with_pickle(path, b'\x80\x02ctorch\nTensor\n' + ASKS_2_GB), 'names torch.Tensor'),
    (lambda path: with_pickle(path, b'\x80\x02ctorch\nFloatStorage\n' + ASKS_2_GB), 'StorageType'),
    (lambda path: with_pickle(path, b'\x80\x02c_codecs\nencode\n.'), 'names _codecs.encode'),
    (lambda path: edit_archive(path, lambda name, raw: raw, compression=zipfile.ZIP_DEFLATED),
     'is a compressed archive'),
    (lambda path: torch.save(torch.zeros(1, 1).expand(5000, 5000), path),
     'far larger than its file'),
    (longer, 'a storage is not complete'),
    (ends_behind, 'a tensor ends behind its storage'),
    (lambda path: path.write_bytes(zipped(readme='x')), 'but not of torch.save'),
    (lambda path: path.write_bytes(path.read_bytes()[:-30]), 'could not be read (BadZipFile'),
]


@pytest.mark.parametrize('bomb, words', TORCH_BOMBS)
def test_a_tensor_takes_no_more_than_its_file_holds(bomb, words, tmp_path):
    rows = table_with_audio(tmp_path)
    torch.save(torch.zeros(2, 4), tmp_path / 'frames' / 'bomb.pt')
    bomb(tmp_path / 'frames' / 'bomb.pt')
    rows[4]['audio'] = 'frames/bomb.pt'
    source = write_table(tmp_path / 'mine.csv', rows)
    assert_refused(source, tmp_path, 'v2$_$0000', 'bomb.pt', words)


@pytest.mark.parametrize('method', [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_npz_of_another_compression_is_refused(method, tmp_path):
    """ A piece of 256 KiB of it may unpack to 1.8 GB, whatever size the archive states. """
    rows = table_with_audio(tmp_path, ('.npz',))
    source = write_table(tmp_path / 'mine.csv', rows)
    path = tmp_path / 'frames' / '4.npz'
    np.savez_compressed(path, audio=frames_of(4))
    convert(source, tmp_path / 'deflated')
    with np.load(path) as arrays, zipfile.ZipFile(tmp_path / 'packed.npz', 'w', method) as archive:
        archive.writestr('audio.npy', arrays.zip.read('audio.npy'))
    os.replace(tmp_path / 'packed.npz', path)
    assert_refused(source, tmp_path, 'v2$_$0000', '4.npz', 'a method that NumPy does not write')


def test_thousands_of_files_need_no_more_handles(tmp_path):
    resource = pytest.importorskip('resource')
    (tmp_path / 'frames').mkdir()
    rows = clips(3000)
    for i, row in enumerate(rows):
        np.save(tmp_path / 'frames' / f'{i}.npy', np.ones((1 + i % 4, 2), 'f4'))
        row['vision'] = f'frames/{i}.npy'
    source = write_table(tmp_path / 'mine.csv', rows)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 30, hard))
    try:
        corpus = converted(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(corpus.lengths(s, 'vision').sum() for s in SPLITS) == 3000 * 2.5


def test_times_are_read_as_seconds():
    assert seconds_of('00:20:57,256') == pytest.approx(1257.256)
    assert seconds_of('1:02.5') == 62.5 and seconds_of(' 7 ') == 7
    assert np.isnan(seconds_of('later')) and np.isnan(seconds_of('1:2:3:4'))


# -------------------------------------------------------------------------------------------------
# Files that are no pickle


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def npz():
    out = io.BytesIO()
    np.savez(out, audio=np.zeros(3), text=np.zeros(2))
    return out.getvalue()


def torch_file():
    out = io.BytesIO()
    torch.save(torch.zeros(3), out)
    return out.getvalue()


OTHER_KINDS = {
    'is a text file; give a pickle, or a table': b'# A page of Markdown\n\nwith a text\n',
    'empty (0 bytes)': b'',
    'columns video_id, clip_id, text': b'video_id,clip_id,text\na,b,c\n',
    'which has 4280000000 bytes': b'version https://git-lfs.github.com/spec/v1\noid sha256:12\n'
                                  b'size 4280000000\n',
    'is a web page': b'\n<!DOCTYPE html>\n<html><body>Sign in</body></html>',
    'gunzip': gzip.compress(b'x'),
    'unzip' * 0 + 'is a zip archive': zipped(readme='x'),
    'not complete': zipped(readme='x' * 99)[:60],
    'Excel': zipped(**{'xl/workbook.xml': 'x'}),
    '.npz file with the arrays audio, text': npz(),
    'torch.save': torch_file(),
    'HDF5': b'\x89HDF\r\n\x1a\n' + bytes(50),
    'JSON': b'{"train": {"text": []}}',
    'tar archive': bytes(257) + b'ustar' + bytes(250),
}


@pytest.mark.parametrize('words', OTHER_KINDS)
def test_a_file_that_is_no_pickle_is_named_by_its_first_bytes(words, tmp_path):
    (tmp_path / 'x.pkl').write_bytes(OTHER_KINDS[words])
    assert_refused(tmp_path / 'x.pkl', tmp_path, 'x.pkl is not a pickle', words)


@pytest.mark.parametrize('protocol', range(6))
def test_a_pickle_of_any_protocol_is_taken_for_one(protocol, tmp_path):
    assert converted(save(msena(), tmp_path / 'x.pkl', protocol), tmp_path).n_clips['train'] == 6


def test_a_truncated_pickle_and_changed_line_ends_are_named(tmp_path):
    raw = pickle.dumps(msena(n=(60, 3, 2)), 4)
    (tmp_path / 'x.pkl').write_bytes(raw[:20000])
    assert_refused(tmp_path / 'x.pkl', tmp_path, 'ends in the middle', 'at 20000 of at least')
    (tmp_path / 'x.pkl').write_bytes(raw.replace(b'\n', b'\r\n'))
    assert_refused(tmp_path / 'x.pkl', tmp_path, 'carriage return', 'copied as text')


# -------------------------------------------------------------------------------------------------
# Pickles with more than arrays


class Strange:
    """ An object with a state, which a pickle writes with NEWOBJ and BUILD. """

    def __init__(self):
        self.a = {(1, 2): [3]}


@pytest.mark.parametrize('protocol', range(2, 6))
def test_unread_objects_of_any_type_are_skipped(protocol, tmp_path):
    tree = msena()
    canary = str(tmp_path / 'canary')
    for s in tree.values():
        s['text_bert'] = torch.ones(2, 3)
        s['strange'] = [Strange(), Strange]
        s['keys'] = {(1, 2): 'tuple', 'x': {(1, 'a')}, frozenset([1]): 0}
        s['times'] = np.zeros(3, 'M8[s]')
        s['fields'] = np.zeros(3, [('a', 'f8')])
        s['evil'] = Evil(canary)
    corpus = converted(save(tree, tmp_path / 'x.pkl', protocol), tmp_path)
    assert np.allclose(corpus.label('train'), tree['train']['regression_labels'])
    assert not os.path.exists(canary)
    summary = describe(corpus.meta)
    assert 'text_bert (torch.Tensor)' in summary and 'keys' in summary and 'times' in summary


@pytest.mark.parametrize('field', ['audio', 'regression_labels', 'raw_text'])
def test_a_needed_object_that_is_not_read_is_refused_with_its_type(field, tmp_path):
    tree = msena()
    tree['valid'][field] = torch.zeros(3, 7, 5)
    assert_refused(save(tree, tmp_path / 'x.pkl'), tmp_path, field, 'valid', 'torch.Tensor', '.numpy()')


def test_seven_labels_a_clip_ask_for_the_column(tmp_path):
    tree = msena()
    for s in tree.values():
        first = s['regression_labels']
        s['regression_labels'] = np.stack([first, *np.zeros((6, len(first)))], 1)
    source = save(tree, tmp_path / 'x.pkl')
    assert_refused(source, tmp_path, 'holds 7 numbers for each clip', '--label_column=0 .. 6')
    assert_refused(source, tmp_path, '--label_column=0 .. 6', label_column=7)
    corpus = converted(source, tmp_path, label_column=0)
    assert np.array_equal(corpus.label('train'), tree['train']['regression_labels'][:, 0].astype('f4'))


def test_the_score_of_a_modality_says_nothing_of_the_range(tmp_path):
    tree = msena()
    for s in tree.values():
        s['regression_labels_T'] = np.full(len(s['id']), np.nan)
        s['regression_labels_A'] = np.linspace(-1, 1, len(s['id']))
    tree['test']['regression_labels_A'][0] = np.nan
    corpus = converted(save(tree, tmp_path / 'x.pkl'), tmp_path)
    assert {name: y['range'] for name, y in corpus.labels.items()} == dict(
        label=[-3, 3], label_A=[-1, 1])
    assert corpus.meta['notes'] == [
        'the label label_T is missing in all clips, so it was left out',
        '1 clips have no label_A, so a run with --label=label_A is refused']


@pytest.mark.parametrize('ids, first', [
    (lambda n: [('v', i) for i in range(n)], 'v$_$1'),
    (lambda n: list(range(n)), '1'),
    (lambda n: np.arange(n), '1'),
    (lambda n: np.arange(n) * 1.0, '1'),
    (lambda n: np.array([[b'v', b'%d' % i] for i in range(n)]), 'v$_$1'),
    (lambda n: [np.array(['v', f'{i}']) for i in range(n)], 'v$_$1'),
])
def test_ids_may_be_numbers_tuples_and_arrays(ids, first, tmp_path):
    tree = msena()
    for s in tree.values():
        s['id'] = ids(len(s['id']))
    corpus = converted(save(tree, tmp_path / 'x.pkl'), tmp_path)
    assert corpus.id('train')[1] == first


# -------------------------------------------------------------------------------------------------
# A run without its files


def test_a_run_without_corpus_and_lm_is_refused_in_one_sentence_with_both(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
    env |= dict(HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path / 'hf'))   # nothing listens
    command = [sys.executable, str(HERE / 'train.py'), 'config/deepmlf_mosei.py']
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().split('\n')[-1]
    for word in ("'MOSEI/Processed/unaligned_50.pkl' does not exist", 'github.com/thuiar/MMSA',
                 'ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f', "'gpt2-large'",
                 'http://127.0.0.1:9 cannot be reached', 'python train.py config/deepmlf_toy.py'):
        assert word in last, done.stderr
    assert done.returncode == 1 and 'Retry' not in done.stderr
    assert not os.path.exists(tmp_path / 'out')


def test_the_search_for_absent_files_takes_less_than_two_seconds(monkeypatch):
    from huggingface_hub import constants

    waited = []

    def never_answers(request, timeout):
        waited.append(timeout)
        raise TimeoutError('timed out')

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr('urllib.request.urlopen', never_answers)
    both = absent_files(dict(corpus='unaligned_50.pkl', lm='no/such', system='none'), [], str(HERE))
    assert 0 < sum(waited) < 2
    assert 'of MOSI (SHA-256 78e0' in both and 'of MOSEI (SHA-256 ad8b' in both
    assert "'no/such' is not in the local cache" in both and 'python train.py needs' in both
    assert absent_files(dict(corpus='toy', lm='new', system='none'), [], str(HERE)) is None


def test_the_sums_of_the_published_files_are_those_of_the_documents():
    page = (HERE / 'docs' / 'corpora.md').read_text(encoding='utf-8')
    for file, digest in PUBLISHED.values():
        assert f'`{digest}`' in page and f'`{file}`' in page


def test_a_slow_hub_is_waited_for_unless_the_corpus_is_absent_too(monkeypatch):
    """A hub that does not answer at once may still have the LM, so loading it decides."""
    from huggingface_hub import constants

    def slow(*args, **kwargs):
        raise urllib.error.URLError(TimeoutError('timed out'))

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr('urllib.request.urlopen', slow)
    k = dict(corpus='toy', lm='no/such', system='none')
    assert absent_files(k, [], str(HERE)) is None
    both = absent_files(k | dict(corpus='unaligned_50.pkl'), [], str(HERE))
    assert 'does not exist' in both and "the LM 'no/such' is not in the local cache" in both
