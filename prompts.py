"""
What a frozen LM is asked, and what it may answer: prompts and label strings, as data.

    start, <Multimodal>, P pseudo tokens, the clip's text, </Multimodal>, the question,
    the answer's lead-in | the label

No family of LMs is special here: start is what its tokenizer itself puts before a text, and a label
is whatever tokens the tokenizer adds for it behind the lead-in. The labels form a trie, so that one
pass can score all of them.

Axis letters: K labels, n tokens of the longest label, N nodes of the trie (the root first).
"""
import math
import re
from typing import Literal

import torch

from run.errors import ModelError
from run.load_lm import specials


class PromptKnobs:
    prompt: Literal['en', 'cn', 'toy'] = 'en'  # the question that the LM is asked, a key of PROMPTS
    prompt_start = 'auto'  # before all else: 'auto', the tokenizer's own; or as '<|im_start|>'
    label_words: Literal['index', 'name'] = 'index'  # a class is answered by its 'index' or 'name'
    label_plus = False     # write +0.6 for 0.6, as the paper's figure; the release does so for Qwen
    label_eos = False      # end-of-text token behind each label


# One entry a language. `space` stands before a label; {low} {high} {classes} come from the corpus.
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
    # what the toy LM has read its ratings behind; it knows no instructions
    'toy': dict(
        open='',
        close='',
        space=' ',
        regression=', the sentiment is',
        classes=', the emotion is',
    ),
}


class Prompt:
    """
    The question to one LM about one label of one corpus: before, after (token ids around the text),
    labels (K strings), values [K] (regression), answers (K lists of token ids). Raises ModelError
    where the labels cannot be told apart.

    k: the run's knobs; info: the corpus's entry for the label, with `range` or `names`.
    """

    def __init__(self, k, info, tokenizer):
        self.k = k
        self.kind = info['kind']
        self.tokenizer = tokenizer
        said = PROMPTS[k['prompt']]
        if self.kind == 'classes':
            question = self._ask_for_a_class(said, info['names'])
        else:
            question = self._ask_for_a_number(said, *info['range'])

        if k['prompt_start'] == 'auto':
            start = specials(tokenizer)[0]
        else:
            start = self._ids(k['prompt_start'])
        self.before = start + self._ids(said['open'])
        self.after = self._ids(said['close'] + question)
        if not self.after:
            raise ModelError(f"the tokenizer of {k['lm']} makes no tokens of the prompt "
                             f"{k['prompt']!r}.")

        # behind the lead-in, not by itself: a sentencepiece label begins with its space
        lead_in = said['close'] + question + said['space']
        joint = [self._ids(lead_in + label) for label in self.labels]
        # unless the lead-in's last letters melt into a label
        if all(ids[:len(self.after)] == self.after for ids in joint):
            self.answers = [ids[len(self.after):] for ids in joint]
        else:
            self.answers = [self._ids(label) for label in self.labels]
        if k['label_eos']:
            if tokenizer.eos_token_id is None:
                raise ModelError("label_eos=True needs an end-of-text token, and the tokenizer of "
                                 f"{k['lm']} has none.")
            self.answers = [ids + [tokenizer.eos_token_id] for ids in self.answers]
        self._tell_apart()

        unknown = getattr(tokenizer, 'unk_token_id', None)
        known = (tokenizer.pad_token_id, unknown, tokenizer.eos_token_id)
        # for tgm_pool='padded' alone
        self.pad_id = next((t for t in known if t is not None and t >= 0), 0)

    def _ask_for_a_class(self, said, names):
        """ The question about classes; sets labels. """
        self.values = None
        if self.k['label_words'] == 'name':
            self.labels = list(names)
            listed = ', '.join(names)
        else:
            self.labels = [str(i) for i in range(len(names))]
            listed = ', '.join(f'{name}:{i}' for i, name in enumerate(names))
        return said['classes'].format(classes=listed)

    def _ask_for_a_number(self, said, low, high):
        """
        The question about a number in [low, high]; sets values and labels, of one decimal as the
        papers have it: 61 numbers in [-3, 3], 21 in [-1, 1].
        """
        low, high = round(10 * low, 6), round(10 * high, 6)
        self.values = [i / 10 for i in range(math.ceil(low), math.floor(high) + 1)]
        plus = '+' if self.k['label_plus'] else ''
        self.labels = [f"{plus if v >= 0 else ''}{v:.1f}" for v in self.values]
        return said['regression'].format(low=self.labels[0], high=self.labels[-1])

    def _ids(self, text):
        """ The token ids of a text, without the tokenizer's own before and behind it. """
        if not text:
            return []
        return list(self.tokenizer([text], add_special_tokens=False)['input_ids'][0])

    def _tell_apart(self):
        """ Raises ModelError where two labels cannot be told apart by their tokens. """
        lm = self.k['lm']
        unknown = getattr(self.tokenizer, 'unk_token_id', None)
        # GPT-2 calls its end of text unknown, and knows every letter
        if unknown is not None and unknown != self.tokenizer.eos_token_id:
            for label, ids in zip(self.labels, self.answers):
                if unknown in ids:
                    raise ModelError(f"the tokenizer of {lm} has no token for a letter of the "
                                     f"label {label!r}: take another LM, or another label_words.")

        label_of = {}
        for label, ids in zip(self.labels, map(tuple, self.answers)):
            if not ids:
                raise ModelError(f"the tokenizer of {lm} makes no token of the label {label!r}: "
                                 "another label_words?")
            if ids in label_of:
                raise ModelError(f"the tokenizer of {lm} makes the same tokens of the labels "
                                 f"{label_of[ids]!r} and {label!r} (it has no letters for them): "
                                 "take another LM, or another label_words.")
            label_of[ids] = label
        for ids, label in label_of.items():
            for i in range(1, len(ids)):
                if ids[:i] in label_of:
                    raise ModelError(f"the label {label_of[ids[:i]]!r} is the beginning of "
                                     f"{label!r} for the tokenizer of {lm}, so one's probability "
                                     "holds the other's: --label_eos=True ends them.")

    def longest(self):
        """
        Tokens of everything but the pseudo tokens and the clip's text, the longest label included.
        """
        return len(self.before) + len(self.after) + max(map(len, self.answers))

    def index(self, label):
        """
        Labels [B] as a corpus has them -> which of the K label strings says each, [B] int64.
        """
        if self.kind == 'classes':
            return label
        first = round(10 * self.values[0])
        return ((label * 10).round().long() - first).clamp(0, len(self.labels) - 1)  # [B]

    def trie(self):
        """
        The label trie as tensors. A node is what has been said so far, the root (number 0) nothing:
        its token is the prompt's last. token [N], depth [N], sees [N,N] (a node sees the ones it
        stands on and itself); answer [K,n] ids, node [K,n] the node that says each of them, real
        [K,n].
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

    def understand(self, ids):
        """
        What a generated answer says, as a number or a class, or None if nothing of the kind.
        Numbers are cut to the label range: a runaway 66.3 is one wrong clip, not the mean over all
        of them.
        """
        end = self.tokenizer.eos_token_id
        if end in ids:
            ids = ids[:ids.index(end)]
        text = self.tokenizer.decode(ids).strip().replace('–', '-').replace('−', '-')
        if self.kind == 'classes':  # the longest name that it begins with
            fits = [k for k, label in enumerate(self.labels) if text.startswith(label)]
            return max(fits, key=lambda k: len(self.labels[k]), default=None)
        number = re.match(r'[-+]?\s*\d+(\.\d)?', text)
        if not number:
            return None
        return min(max(float(number[0].replace(' ', '')), self.values[0]), self.values[-1])


def rated(corpus, split, prompt='toy'):
    """
    A corpus's texts as an LM may have met them: each with a rating behind it, by turns a score and
    an emotion (as far as the corpus has both). What lm_text='rated' trains the toy LM on: a
    stand-in for what a pretrained LM knows of ratings.
    """
    said = PROMPTS[prompt]
    kinds = [(said[info['kind']], corpus.label(split, name), info.get('names'))
             for name, info in corpus.labels.items() if name in ('label', 'emotion')]
    texts = []
    for i, text in enumerate(corpus.text(split)):
        question, y, names = kinds[i % len(kinds)]
        rating = names[y[i]] if names else round(float(y[i]), 1) + 0.0  # + 0.0: no -0.0
        texts.append(f"{text} {question}{said['space']}{rating}")
    return texts
