"""
Prompt files: --prompt=FILE.json brings the words of a prompt, which then travel with the run.

    python -m pytest -q tests/test_prompt_files.py
"""

import json
import os
import re

import pytest

import eval as evaluation
from data import open_corpus
from fakes import MSE_KNOBS, LetterTokenizer, run_prompted
from prompts import PROMPTS, Prompt
from run.errors import ModelError
from run.folder import load_checkpoint

OWN_PROMPT = dict(
    language='German',
    open='[',
    close=']',
    space=' ',
    regression=' Wie klingt das, von {low} bis {high}? Antwort:',
    classes=' Welches Gefühl aus {classes}? Antwort:',
    label_words=dict(anger='Wut', sadness='Trauer', neutral='keines', contentment='Ruhe', joy='Freude'),
)


def with_own_prompt(**entries):
    """ Knobs with OWN_PROMPT as the configurator puts it there; an entry of None is left out. """
    words = {key: value for key, value in (OWN_PROMPT | entries).items() if value is not None}
    return MSE_KNOBS | dict(prompt=json.dumps(words, ensure_ascii=False))


def test_a_prompt_of_ones_own_asks_its_question(corpora):
    info = open_corpus('toy', corpora).labels
    p = Prompt(with_own_prompt(), info['label'], LetterTokenizer())
    assert p.tokenizer.decode(p.before) == '['
    assert p.tokenizer.decode(p.after) == '] Wie klingt das, von -3.0 bis 3.0? Antwort:'
    assert p.tokenizer.decode(p.answers[0]) == ' -3.0'
    p = Prompt(with_own_prompt(), info['emotion'], LetterTokenizer())
    asked = 'Wut:0, Trauer:1, keines:2, Ruhe:3, Freude:4'
    assert p.tokenizer.decode(p.after) == f'] Welches Gefühl aus {asked}? Antwort:'
    p = Prompt(with_own_prompt() | dict(label_words='name'), info['emotion'], LetterTokenizer())
    assert p.labels == ['Wut', 'Trauer', 'keines', 'Ruhe', 'Freude']
    braces = with_own_prompt(regression='{a b} {low.__class__} {low}:')
    p = Prompt(braces, info['label'], LetterTokenizer())
    assert p.tokenizer.decode(p.after) == ']{a b} {low.__class__} -3.0:'


@pytest.mark.parametrize(
    'entries, label, sentence',
    [
        (dict(label_words=dict(anger='Wut')), 'emotion', "differ in the class 'contentment'"),
        (dict(classes=None), 'emotion', "has no question for label='emotion'"),
        (dict(regression=None), 'label', "has no question for label='label'"),
        (
            dict(label_words=dict.fromkeys(OWN_PROMPT['label_words'], 'Wut')),
            'emotion',
            "same tokens of the labels 'Wut' and 'Wut'",
        ),
    ],
)
def test_a_prompt_file_that_does_not_fit_the_corpus_is_refused(entries, label, sentence, corpora):
    info = open_corpus('toy', corpora).labels[label]
    with pytest.raises(ModelError, match=sentence):
        Prompt(with_own_prompt(**entries) | dict(label=label, label_words='name'), info, LetterTokenizer())


def test_a_prompt_in_letters_that_the_tokenizer_lacks_is_refused(corpora):
    class Latin(LetterTokenizer):
        unk_token, unk_token_id = '<unk>', 0

    info = open_corpus('toy', corpora).labels['label']
    latin = Latin(known=set(map(chr, range(32, 256))))
    Prompt(with_own_prompt(), info, latin)
    japanese = with_own_prompt(language='Japanese', regression='この気持ちは{low}から{high}:')
    with pytest.raises(ModelError, match='no token for a letter of the prompt.*Japanese'):
        Prompt(japanese, info, latin)
    with pytest.raises(ModelError, match="no token for a letter of the prompt 'cn'"):
        Prompt(MSE_KNOBS | dict(prompt='cn'), info, latin)


def test_a_prompt_whose_letters_the_tokenizer_drops_or_replaces_by_the_end_token_is_refused(corpora):
    class Drops(LetterTokenizer):
        def __call__(self, texts, **_):
            return {'input_ids': [[ord(c) for c in t if ord(c) < 128] for t in texts]}

    class EndForUnknown(LetterTokenizer):
        unk_token, unk_token_id, eos_token_id = '</s>', 7, 7

        def __call__(self, texts, **_):
            return {'input_ids': [[ord(c) if ord(c) < 128 else 7 for c in t] for t in texts]}

    info = open_corpus('toy', corpora).labels['label']
    for tokenizer in (Drops(), EndForUnknown()):
        Prompt(MSE_KNOBS | dict(prompt='en'), info, tokenizer)
        with pytest.raises(ModelError, match="no token for a letter of the prompt 'cn'"):
            Prompt(MSE_KNOBS | dict(prompt='cn'), info, tokenizer)


def test_a_run_carries_the_words_of_its_prompt_file(rated_lm, corpora, tmp_path):
    """They are in the checkpoint, so that no path is read again and a resumed run has the same ones."""
    path = tmp_path / 'words.json'
    toy = dict(PROMPTS['toy'], regression=', so the sentiment is')
    path.write_text(json.dumps(toy))
    flags = 'mse_toy', f'--prompt={path}'
    run_prompted(rated_lm, corpora, 'own_words', *flags)
    folder = rated_lm / 'own_words'
    knobs = load_checkpoint(str(folder / 'best.safetensors'))[1]['about']['knobs']
    assert json.loads(knobs['prompt']) == toy
    before = json.loads((folder / 'result.json').read_text())['test']
    path.write_text(json.dumps(dict(toy, regression=', and the sentiment is')))
    with pytest.raises(SystemExit, match='prompt='):
        run_prompted(rated_lm, corpora, 'own_words', *flags, '--resume=True')
    path.unlink()
    evaluation.main([str(folder)])
    assert json.loads((folder / 'result.json').read_text())['test'] == before


WRONG_PROMPT_FILES = {
    'is no JSON text': b'{"open": ',
    'is not UTF-8 text': b'\xff\xfe{}',
    'has the wrong entry []': b'[]',
    'has more than 20,000 bytes': b'{"open": "' + b'x' * 20_000 + b'"}',
    "unknown entry opne": json.dumps(dict(PROMPTS['toy'], opne='')).encode(),
    'lacks the entry close': json.dumps(dict(open='', space='')).encode(),
    'has the wrong entry close 3': json.dumps(dict(PROMPTS['toy'], close=3)).encode(),
    'has no question': json.dumps(dict(open='', close='', space='')).encode(),
    'has {lo} in regression': json.dumps(dict(PROMPTS['toy'], regression='{lo}:')).encode(),
}


@pytest.mark.parametrize('sentence', WRONG_PROMPT_FILES)
def test_a_wrong_prompt_file_is_refused(sentence, rated_lm, corpora, tmp_path):
    (tmp_path / 'words.json').write_bytes(WRONG_PROMPT_FILES[sentence])
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        run_prompted(rated_lm, corpora, 'refused', 'mse_toy', f'--prompt={tmp_path}/words.json')
    assert not (rated_lm / 'refused').exists()


def test_a_prompt_file_that_is_no_file_is_refused(rated_lm, corpora, tmp_path):
    (tmp_path / 'folder.json').mkdir()
    os.mkfifo(tmp_path / 'fifo.json')
    for name, sentence in (('none', 'is missing'), ('folder', 'is a folder'), ('fifo', 'a FIFO')):
        with pytest.raises(SystemExit, match=f'{name}.json .*{sentence}'):
            run_prompted(rated_lm, corpora, 'refused', 'mse_toy', f'--prompt={tmp_path}/{name}.json')
