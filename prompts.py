"""
The prompt around a clip's text for a frozen LM, and the label strings that may follow it:

    start, <Multimodal>, P pseudo tokens, the clip's text, </Multimodal>, the question,
    the answer's lead-in | the label

The code is the same for all LM families. `start` is the special tokens that the tokenizer puts
before a text. The lead-in is the beginning of the answer, such as "Assistant: The sentiment is".
The tokens of a label are those that the tokenizer adds for it behind the lead-in. The labels form a
trie, so that one forward pass can score all of them.

Axis letters: K labels, n tokens of the longest label, N nodes of the trie (the root first).
"""
import math
import re
import string
import unicodedata
from typing import Literal

import torch

from configurator import OrJsonFile
from run.errors import ModelError
from run.json_files import Each, Maybe, check_form, json_text, parsed
from run.load_lm import specials


class PromptKnobs:
    prompt: OrJsonFile('en', 'cn', 'toy', read=json_text) = 'en'  # the words: a name, or FILE.json
    prompt_start = 'auto'  # the text at its start; 'auto': the tokenizer's special tokens
    label_words: Literal['index', 'name'] = 'index'  # the label of a class: its 'index' or 'name'
    label_plus = False     # write +0.6 for 0.6, as in the paper's figure and the release for Qwen
    label_eos = False      # put the end-of-text token behind each label


# The words of each prompt. `space` precedes a label; {low} {high} {classes} come from the corpus.
PROMPTS = {
    'en': dict(
        open='<Multimodal>',
        close='</Multimodal>',
        space=' ',
        regression='Rate the sentiment of the multimodal content above, from {low} to {high}. '
                   'Assistant: The sentiment is',
        classes='Recognize the emotion of the multimodal content above, out of <{classes}>. '
                'Assistant: The emotion is',
    ),
    'cn': dict(
        open='<多模态>',
        close='</多模态>',
        space='',
        regression='请给上述多模态内容的情感强度打分，范围从{low}到{high}。助手: 情感为',
        classes='请从<{classes}>中选出上述多模态内容的情绪。助手: 情绪为',
    ),
    # the words of rated_texts, for the toy LM, which cannot follow instructions
    'toy': dict(
        open='',
        close='',
        space=' ',
        regression=', the sentiment is',
        classes=', the emotion is',
    ),
}


# The form of a prompt file: an entry of PROMPTS, with further entries
PROMPT_FILE = dict(
    open=str, close=str, space=str,
    regression=Maybe(str), classes=Maybe(str),   # the question for one kind of label suffices
    language=Maybe(str),           # named in messages
    label_words=Maybe(Each(str)),  # name of a class in the corpus -> the word for it
)
PLACES = dict(regression=('{low}', '{high}'), classes=('{classes}',))


def words_of(prompt):
    """
    The words of a prompt: an entry of PROMPTS, or those in the JSON text of a prompt file. Raises
    ValueError.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    words = parsed(prompt)
    if unknown := sorted(set(words) - set(PROMPT_FILE)):
        raise ValueError(f"has the unknown entry {unknown[0]}, which is none of "
                         f"{', '.join(PROMPT_FILE)}")
    check_form(words, PROMPT_FILE)
    if not words.get('regression') and not words.get('classes'):
        raise ValueError("has no question: write an entry regression or classes")
    for kind, places in PLACES.items():
        for place in re.findall(r'{\w*}', words.get(kind) or ''):
            if place not in places:
                raise ValueError(f"has {place} in {kind}, where only {' and '.join(places)} are "
                                 "replaced")
    return words


def prompt_errors(k):
    """ An error sentence on the words of the run's prompt, in a list. """
    try:
        words_of(k['prompt'])
    except ValueError as e:
        return [f"the file of --prompt= {e}"]
    return []


def letters_of(text):
    """ The set of characters of a text, up to case, compatible forms and spaces. """
    return set(unicodedata.normalize('NFKC', text).casefold()) - set(string.whitespace)


def prompt_name(prompt):
    """ How messages name a prompt. """
    return f"the prompt {prompt!r}" if prompt in PROMPTS else "the prompt of the JSON file"


def answer_scores(low, high):
    """
    The scores in [low, high] that an LM may answer, in steps of 0.1 as in the papers: 61 numbers in
    [-3, 3], 21 in [-1, 1].
    """
    low, high = round(10 * low, 6), round(10 * high, 6)
    return [i / 10 for i in range(math.ceil(low), math.floor(high) + 1)]


class Prompt:
    """
    The question to one LM about one label of one corpus. Raises ModelError where the tokens of the
    labels are not distinct.

    before, after: token ids before and behind the text. labels: K strings. values: K numbers, None
    for classes. answers: K lists of token ids. pad_id: the token id of padding.
    k: the run's knobs; info: the corpus's entry for the label, with `range` or `names`.
    """

    def __init__(self, k, info, tokenizer):
        self.k = k
        self.kind = info['kind']
        self.tokenizer = tokenizer
        words = words_of(k['prompt'])
        name = prompt_name(k['prompt'])
        if not words.get(self.kind):
            raise ModelError(f"{name} has no question for label={k['label']!r}: add the entry "
                             f"{self.kind} to it, or choose another label.")
        if self.kind == 'classes':
            question = self._class_question(words, info['names'])
        else:
            question = self._number_question(words, *info['range'])

        if k['prompt_start'] == 'auto':
            start = specials(tokenizer)[0]
        else:
            start = self._ids(k['prompt_start'])
        self.before = start + self._ids(words['open'])
        self.after = self._ids(words['close'] + question)
        if not self.after:
            raise ModelError(f"the tokenizer of {k['lm']} makes no tokens of {name}: take another "
                             "LM, or another prompt.")

        # Labels are tokenized behind the lead-in, because sentencepiece puts a space before a label
        # that stands alone. If the lead-in's end merges with a label, labels are tokenized alone.
        lead_in = words['close'] + question + words['space']
        joint = [self._ids(lead_in + label) for label in self.labels]
        if all(ids[:len(self.after)] == self.after for ids in joint):
            self.answers = [ids[len(self.after):] for ids in joint]
        else:
            self.answers = [self._ids(label) for label in self.labels]
        if k['label_eos']:
            if tokenizer.eos_token_id is None:
                raise ModelError("label_eos=True needs an end-of-text token, and the tokenizer of "
                                 f"{k['lm']} has none: take another LM, or label_eos=False.")
            self.answers = [ids + [tokenizer.eos_token_id] for ids in self.answers]
        self._refuse_ambiguous_labels()
        if not self._spells(words['open'] + words['close'] + question):
            raise ModelError(f"the tokenizer of {k['lm']} has no token for a letter of {name}"
                             f"{language_of(words)}: take another LM, or another prompt.")

        known = (tokenizer.pad_token_id, getattr(tokenizer, 'unk_token_id', None),
                 tokenizer.eos_token_id)
        # only tgm_pool='padded' reads pad_id
        self.pad_id = next((t for t in known if t is not None and t >= 0), 0)

    def _class_question(self, words, names):
        """ The question about classes. Sets values and labels. """
        self.values = None
        if own := words.get('label_words'):
            names = own_names(own, names)
        if self.k['label_words'] == 'name':
            self.labels = list(names)
            listed = ', '.join(names)
        else:
            self.labels = [str(i) for i in range(len(names))]
            listed = ', '.join(f'{name}:{i}' for i, name in enumerate(names))
        return words['classes'].replace('{classes}', listed)

    def _number_question(self, words, low, high):
        """ The question about a number in [low, high]. Sets values and labels. """
        self.values = answer_scores(low, high)
        if not self.values:
            raise ModelError(f"no multiple of 0.1 is in the label's range [{low}, {high}], so there "
                             "is no answer: convert the corpus with a larger --label_range.")
        plus = '+' if self.k['label_plus'] else ''
        self.labels = [f"{plus if v >= 0 else ''}{v:.1f}" for v in self.values]
        question = words['regression'].replace('{low}', self.labels[0])
        return question.replace('{high}', self.labels[-1])

    def _ids(self, text):
        """
        The token ids of a text, without the special tokens that the tokenizer would add around it.
        """
        if not text:
            return []
        return list(self.tokenizer([text], add_special_tokens=False)['input_ids'][0])

    def _spells(self, text):
        """
        False if the tokens of a text lack one of its letters, up to case and spaces: the tokenizer
        has made unknown tokens of it, or has dropped it.
        """
        ids = self._ids(text)
        lost = letters_of(text) - letters_of(self.tokenizer.decode(ids))
        return not lost and not self._has_unknown(text, ids)

    def _has_unknown(self, text, ids):
        """ True if the token ids of a text have an unknown token that the text does not name. """
        unknown = getattr(self.tokenizer, 'unk_token', None)
        return bool(unknown) and unknown not in text and self.tokenizer.unk_token_id in ids

    def _refuse_ambiguous_labels(self):
        """
        Raises ModelError where a label has no tokens or unknown ones, or where its tokens are those
        of another label or the beginning of them.
        """
        lm = self.k['lm']
        for label, ids in zip(self.labels, self.answers):
            if self._has_unknown(label, ids):
                raise ModelError(f"the tokenizer of {lm} has no token for a letter of the label "
                                 f"{label!r}: take another LM, or another label_words.")

        label_of = {}
        for label, ids in zip(self.labels, map(tuple, self.answers)):
            if not ids:
                raise ModelError(f"the tokenizer of {lm} makes no token of the label {label!r}: "
                                 "take another LM, or another label_words.")
            if ids in label_of:
                raise ModelError(f"the tokenizer of {lm} makes the same tokens of the labels "
                                 f"{label_of[ids]!r} and {label!r} (it lacks their letters): "
                                 "take another LM, or another label_words.")
            label_of[ids] = label
        for ids, label in label_of.items():
            for i in range(1, len(ids)):
                if ids[:i] in label_of:
                    raise ModelError(f"the label {label_of[ids[:i]]!r} is the beginning of "
                                     f"{label!r} in the tokens of {lm}, so its probability "
                                     "includes that of the longer label: set label_eos=True, which "
                                     "puts the end-of-text token behind each label.")

    def longest(self):
        """
        The number of tokens of the prompt and the longest label, without pseudo tokens and the
        clip's text.
        """
        return len(self.before) + len(self.after) + max(map(len, self.answers))

    def index(self, label):
        """
        Labels [B] as the corpus has them -> the index of the label string of each, [B] int64.
        Numbers are rounded to one decimal and clamped to the range.
        """
        if self.kind == 'classes':
            return label
        first = round(10 * self.values[0])
        return ((label * 10).round().long() - first).clamp(0, len(self.labels) - 1)  # [B]

    def trie(self):
        """
        The label trie as tensors. A node is a proper prefix of a label's tokens. Node 0, the root,
        is the empty prefix.
        token [N]: the last token of the node; for the root, the last token of the prompt.
        depth [N]: the number of tokens of the node.
        sees [N,N]: whether node i attends to node j, that is, whether j is i or a prefix of i.
        answer [K,n]: the token ids of each label. node [K,n]: for each of them, the node whose
        logits predict it. real [K,n]: False at padding.
        """
        prefixes = {tuple(ids[:i]) for ids in self.answers for i in range(len(ids))}
        prefixes = sorted(prefixes, key=lambda p: (len(p), p))  # N
        number = {p: i for i, p in enumerate(prefixes)}
        lengths = torch.tensor([len(ids) for ids in self.answers])  # [K]
        n = max(map(len, self.answers))

        answer, node = torch.zeros(2, len(self.answers), n, dtype=torch.long)  # 2x [K,n]
        for k, ids in enumerate(self.answers):
            nodes = [number[tuple(ids[:i])] for i in range(len(ids))]
            answer[k, :len(ids)] = torch.tensor(ids)
            node[k, :len(ids)] = torch.tensor(nodes)
        return dict(
            token=torch.tensor([p[-1] if p else self.after[-1] for p in prefixes]),  # [N]
            sees=torch.tensor([[p[:len(q)] == q for q in prefixes] for p in prefixes]),  # [N,N]
            depth=torch.tensor([len(p) for p in prefixes]),  # [N]
            answer=answer,
            node=node,
            real=torch.arange(n) < lengths[:, None],  # [K,n]
        )

    def parse_answer(self, ids):
        """
        The label in a generated answer: a number, the index of a class, or None where there is
        none. Numbers are clamped to the label range, so that a single answer such as 66.3 does not
        dominate a mean error.
        """
        end = self.tokenizer.eos_token_id
        if end in ids:
            ids = ids[:ids.index(end)]
        text = self.tokenizer.decode(ids).strip().replace('–', '-').replace('−', '-')
        if self.kind == 'classes':  # of the labels that the text begins with, the longest
            fits = [k for k, label in enumerate(self.labels) if text.startswith(label)]
            return max(fits, key=lambda k: len(self.labels[k]), default=None)
        number = re.match(r'([-+]?)\s*(\d+(?:\.\d)?)', text)
        if not number:
            return None
        return min(max(float(number[1] + number[2]), self.values[0]), self.values[-1])


def own_names(label_words, names):
    """ The words of a prompt file for the classes `names`, in their order. Raises ModelError. """
    wrong = sorted(set(label_words) ^ set(names))
    if wrong:
        raise ModelError(f"label_words of the prompt's JSON file and the corpus differ in the class "
                         f"{wrong[0]!r}: give a word for each of {', '.join(names)}.")
    return [label_words[name] for name in names]


def language_of(words):
    language = words.get('language')
    return f" (language: {language})" if language else ''


def is_known(value, names):
    """ Whether a clip has this label: a missing class is -1, a missing score NaN. names: the classes. """
    return value >= 0 if names else math.isfinite(value)


def rated_texts(corpus, split, prompt='toy'):
    """
    The texts of a split, each followed by a rating: a score and an emotion in turn, or the one of
    them that the corpus has for the clip. A clip that has neither gets no rating. With
    lm_text='rated' the toy LM is trained on them, because unlike a pretrained LM it has read no
    other texts about ratings.
    """
    words = PROMPTS[prompt]
    kinds = [(words[info['kind']], corpus.label(split, name), info.get('names'))
             for name, info in corpus.labels.items() if name in ('label', 'emotion')]
    if not kinds:
        raise ModelError("lm_text='rated' needs a corpus with the label label or emotion, but this "
                         f"one has {', '.join(corpus.labels)}: take lm_text='plain'.")
    texts = []
    for i, text in enumerate(corpus.text(split)):
        known = [kind for kind in kinds if is_known(kind[1][i], kind[2])]
        if not known:
            texts.append(text)
            continue
        question, y, names = known[i % len(known)]
        rating = names[y[i]] if names else round(float(y[i]), 1) + 0.0  # -0.0 becomes 0.0
        texts.append(f"{text} {question}{words['space']}{rating}")
    return texts
