"""
What a frozen LM is asked, and what it may answer: prompts and label strings, as data.

    start, <Multimodal>, P pseudo tokens, the clip's text, </Multimodal>, the question, the answer's lead-in | the label

No family of LMs is special here: start is what its tokenizer itself puts before a text, and a label is whatever tokens
the tokenizer adds for it behind the lead-in. The labels form a trie, so that one pass can score all of them.

Axis letters: K labels, n tokens of the longest label, N nodes of the trie (the root first).
"""
import math
import re

import torch

from lm import ModelError, specials

# One entry a language. `space` stands before a label; {low} {high} {classes} come from the corpus.
PROMPTS = {
    'en': dict(open='<Multimodal>', close='</Multimodal>', space=' ',
               regression='Rate the sentiment of the multimodal content above, from {low} to {high}. Assistant: The sentiment is',
               classes='Recognize the emotion of the multimodal content above, out of <{classes}>. Assistant: The emotion is'),
    'cn': dict(open='<多模态>', close='</多模态>', space='',
               regression='请给上述多模态内容的情感强度打分，范围从{low}到{high}。助手: 情感为',
               classes='请从<{classes}>中选出上述多模态内容的情绪。助手: 情绪为'),
    # what the toy LM has read its ratings behind; it knows no instructions
    'toy': dict(open='', close='', space=' ', regression=', the sentiment is', classes=', the emotion is'),
}


class Prompt:
    """
    The question to one LM about one label of one corpus: before, after (token ids around the text), labels (K strings),
    values [K] (regression), answers (K lists of token ids). Raises ModelError where the labels cannot be told apart.

    c: the run's knobs; info: the corpus's entry for the label, with `range` or `names`.
    """
    def __init__(self, c, info, tokenizer):
        said, self.kind, self.c, self.tokenizer = PROMPTS[c['prompt']], info['kind'], c, tokenizer
        if self.kind == 'classes':
            by_name = c['label_words'] == 'name'
            self.values, self.labels = None, [k if by_name else str(i) for i, k in enumerate(info['names'])]
            listed = ', '.join(info['names'] if by_name else (f'{k}:{i}' for i, k in enumerate(info['names'])))
            question = said['classes'].format(classes=listed)
        else:   # one decimal, as the papers have it: 61 numbers in [-3, 3], 21 in [-1, 1]
            low, high = (round(10 * v, 6) for v in info['range'])
            self.values = [i / 10 for i in range(math.ceil(low), math.floor(high) + 1)]
            self.labels = [f"{'+' if c['label_plus'] and v >= 0 else ''}{v:.1f}" for v in self.values]
            question = said['regression'].format(low=self.labels[0], high=self.labels[-1])
        plain = lambda text: list(tokenizer([text], add_special_tokens=False)['input_ids'][0]) if text else []
        start = specials(tokenizer)[0] if c['prompt_start'] == 'auto' else plain(c['prompt_start'])
        self.before = start + plain(said['open'])
        self.after = plain(said['close'] + question)
        if not self.after: raise ModelError(f"the tokenizer of {c['lm']} makes no tokens of the prompt {c['prompt']!r}.")
        # behind the lead-in, not by itself: a sentencepiece label begins with its space
        joint = [plain(said['close'] + question + said['space'] + label) for label in self.labels]
        apart = all(ids[:len(self.after)] == self.after for ids in joint)   # or the lead-in's last letters melt into a label
        self.answers = [ids[len(self.after):] for ids in joint] if apart else [plain(label) for label in self.labels]
        if c['label_eos']:
            if tokenizer.eos_token_id is None:
                raise ModelError(f"label_eos=True needs an end-of-text token, and the tokenizer of {c['lm']} has none.")
            self.answers = [ids + [tokenizer.eos_token_id] for ids in self.answers]
        self._tell_apart()
        known = (tokenizer.pad_token_id, getattr(tokenizer, 'unk_token_id', None), tokenizer.eos_token_id)
        self.pad_id = next((t for t in known if t is not None and t >= 0), 0)   # for tgm_pool='padded' alone

    def _tell_apart(self):
        of, lm, unknown = {}, self.c['lm'], getattr(self.tokenizer, 'unk_token_id', None)
        if unknown is not None and unknown != self.tokenizer.eos_token_id:   # GPT-2 calls its end of text unknown, and knows every letter
            for label, ids in zip(self.labels, self.answers):
                if unknown in ids: raise ModelError(f"the tokenizer of {lm} has no token for a letter of the label {label!r}: take another LM, "
                                                    "or another label_words.")
        for label, ids in zip(self.labels, map(tuple, self.answers)):
            if not ids: raise ModelError(f"the tokenizer of {lm} makes no token of the label {label!r}: another label_words?")
            if ids in of: raise ModelError(f"the tokenizer of {lm} makes the same tokens of the labels {of[ids]!r} and {label!r} "
                                           "(it has no letters for them): take another LM, or another label_words.")
            of[ids] = label
        for ids, label in of.items():
            for i in range(1, len(ids)):
                if ids[:i] in of: raise ModelError(f"the label {of[ids[:i]]!r} is the beginning of {label!r} for the tokenizer of "
                                                   f"{lm}, so one's probability holds the other's: --label_eos=True ends them.")

    def longest(self):
        """ Tokens of everything but the pseudo tokens and the clip's text, the longest label included. """
        return len(self.before) + len(self.after) + max(map(len, self.answers))

    def index(self, label):
        """ Labels [B] as a corpus has them -> which of the K label strings says each, [B] int64. """
        if self.kind == 'classes': return label
        return ((label * 10).round().long() - round(10 * self.values[0])).clamp(0, len(self.labels) - 1)

    def trie(self):
        """
        The label trie as tensors. A node is what has been said so far, the root (number 0) nothing: its token is the
        prompt's last. token [N], depth [N], sees [N,N] (a node sees the ones it stands on and itself); answer [K,n] ids,
        node [K,n] the node that says each of them, real [K,n].
        """
        prefixes = sorted({tuple(ids[:i]) for ids in self.answers for i in range(len(ids))}, key=lambda p: (len(p), p))
        number, n = {p: i for i, p in enumerate(prefixes)}, max(map(len, self.answers))
        answer, node = torch.zeros(2, len(self.answers), n, dtype=torch.long)
        for k, ids in enumerate(self.answers):
            answer[k, :len(ids)] = torch.tensor(ids)
            node[k, :len(ids)] = torch.tensor([number[tuple(ids[:i])] for i in range(len(ids))])
        sees = torch.tensor([[p[:len(q)] == q for q in prefixes] for p in prefixes])
        return dict(token=torch.tensor([p[-1] if p else self.after[-1] for p in prefixes]), sees=sees,
                    depth=torch.tensor([len(p) for p in prefixes]), answer=answer, node=node,
                    real=torch.arange(n) < torch.tensor([len(ids) for ids in self.answers])[:, None])

    def understand(self, ids):
        """ What a generated answer says, as a number or a class, or None if nothing of the kind. Numbers are cut to the
        label range: a runaway 66.3 is one wrong clip, not the mean over all of them. """
        if self.tokenizer.eos_token_id in ids: ids = ids[:ids.index(self.tokenizer.eos_token_id)]
        text = self.tokenizer.decode(ids).strip().replace('–', '-').replace('−', '-')
        if self.kind == 'classes':   # the longest name that it begins with
            fits = [k for k, label in enumerate(self.labels) if text.startswith(label)]
            return max(fits, key=lambda k: len(self.labels[k]), default=None)
        number = re.match(r'[-+]?\s*\d+(\.\d)?', text)
        if not number: return None
        return min(max(float(number[0].replace(' ', '')), self.values[0]), self.values[-1])


def rated(corpus, split, prompt='toy'):
    """ A corpus's texts as an LM may have met them: each with a rating behind it, by turns a score and an emotion (as far as
    the corpus has both). What lm_text='rated' trains the toy LM on: a stand-in for what a pretrained LM knows of ratings. """
    said, texts = PROMPTS[prompt], corpus.text(split)
    kinds = [(said[info['kind']], corpus.label(split, name), info.get('names')) for name, info in corpus.labels.items()
             if name in ('label', 'emotion')]
    for i, text in enumerate(texts):
        question, y, names = kinds[i % len(kinds)]
        texts[i] = f"{text} {question}{said['space']}{names[y[i]] if names else round(float(y[i]), 1) + 0.0}"   # + 0.0: no -0.0
    return texts
