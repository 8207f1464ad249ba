"""
Reads a corpus folder and makes batches. `python data.py SOURCE` converts a source file into a
corpus folder (corpora/convert.py).

    corpus = open_corpus('data/mosei')
    batch = get_batch(corpus, 'train', [3, 1, 4])

Axis letters: N clips of a split, B clips of a batch, T text tokens, S frames, d features of a
frame, D width of the LM.
"""
import os
import sys
from pathlib import Path

import numpy as np
import torch

from corpora import convert as conversion
from corpora.convert import convert, describe, folder_name, staging
from corpora.folder import Corpus
from corpora.names import STREAMS
from corpora.toy import VERSION, make_toy
from corpora.unpickle import CorpusError
from run.errors import UserError
from run.frozen_text import frozen_text
from run.load_lm import refuse_unknown_tokens
from run.machine import print_any_text
from run.texts import texts_as_read, tokenize, truncating, word_of_tokens


def open_corpus(source, where='data'):
    """
    Opens 'toy', a corpus folder or a source of `convert` as a Corpus. On first use the toy corpus
    is generated, or the source converted, into a folder under `where`. Raises CorpusError.
    """
    if source == 'toy':
        folder = Path(where) / 'toy'
        if not (folder / 'meta.json').is_file():
            print(f"making the toy corpus in {folder} ...")
            with staging(folder) as out:
                make_toy(str(out))
        corpus = Corpus(folder)
        if corpus.meta.get('toy') != VERSION:
            raise CorpusError(f"{folder} was made by another version of corpora/toy.py; remove "
                              "the folder, and the next run makes it again.")
        return corpus
    if os.path.isfile(os.path.join(source, 'meta.json')):
        return Corpus(source)
    folder = Path(where) / folder_name(source)
    if not (folder / 'meta.json').is_file():
        print(f"converting {source} into {folder} ...")
        try:
            print(describe(convert(source, folder)))
        except CorpusError:
            if not (folder / 'meta.json').is_file():   # unless another process has just made it
                raise
    return Corpus(folder)


def epoch_order(cost, batch_size, seed, epoch):
    """
    The batches of an epoch: a list of int64 arrays of clip numbers, with each clip in one batch.
    Clips of similar cost [N] share a batch: the clips are shuffled and cut into groups of 50
    batches, each group is sorted by cost and cut into batches, and the batches are shuffled.
    epoch=None is for evaluation: all clips are sorted by cost and cut into batches. The order
    depends on the arguments alone, so a resumed run needs to know only its step.
    """
    cost = np.asarray(cost)
    if epoch is None:
        groups = [np.argsort(cost, kind='stable')]
    else:
        rng = np.random.default_rng([seed, epoch])
        order, size = rng.permutation(len(cost)), 50 * batch_size  # [N]
        groups = [order[i:i + size] for i in range(0, len(cost), size)]
        groups = [g[np.argsort(cost[g], kind='stable')] for g in groups]
    batches = [g[i:i + batch_size].astype(np.int64) for g in groups for i in range(0, len(g), batch_size)]
    return batches if epoch is None else [batches[i] for i in rng.permutation(len(batches))]


def get_batch(corpus, split, index, tokens=None, pad_id=0, standardise=True, label='label',
              modalities=STREAMS, stream_index=None):
    """
    Clips `index` of a split as a dict of CPU tensors, padded on the right. Masks are True where
    there is a token or a frame. Raises CorpusError. The dict holds

    - index [B], label [B] (float32, or int64 for classes);
    - with `tokens`, a list of token ids for each clip of the split: tokens [B,T], text_len [B],
      text_mask [B,T]; text_rows [U], the flat positions of the real tokens; and targets [n],
      those whose next token is predicted;
    - for each stream of the corpus, such as audio: audio [B,S,d], audio_len [B], audio_mask [B,S],
      standardised by the mean and std of train. A stream that is not in `modalities` has length 0
      in all clips. With `stream_index` [B], streams come from those clips, and text and label from
      `index`.
    """
    if unknown := set(modalities) - set(STREAMS):
        raise CorpusError(f"modalities takes audio and vision, not {', '.join(map(str, unknown))}.")
    index = np.array(index, np.int64)  # [B]
    batch = dict(index=torch.from_numpy(index), label=torch.from_numpy(corpus.label(split, label)[index]))
    if tokens is not None:
        length = torch.tensor([len(tokens[i]) for i in index])  # [B]
        mask = torch.arange(max(1, int(length.max()))) < length[:, None]  # [B,T]
        ids = torch.full(mask.shape, pad_id)  # [B,T]
        ids[mask] = torch.tensor([t for i in index for t in tokens[i]], dtype=torch.long)
        # computed on the CPU: on a GPU, a boolean selection waits until its size is known
        rows = torch.arange(mask.numel()).view(mask.shape)  # [B,T]
        batch |= dict(tokens=ids, text_len=length, text_mask=mask, text_rows=rows[mask],
                      targets=rows[:, :-1][mask[:, 1:]])
    for m, d in corpus.widths.items():
        info = corpus.meta['streams'][m]
        stream_clips = index if stream_index is None else stream_index  # [B]
        x = [np.zeros((0, d), np.float32)] * len(index)  # B x [0,d]
        if m in modalities:
            x = [corpus.frames(split, m, i) for i in stream_clips]  # B x [S_b,d]
        length = np.array([len(clip) for clip in x])  # [B]
        mask = np.arange(max(1, length.max())) < length[:, None]  # [B,S]
        out = np.zeros((*mask.shape, d), np.float32)  # [B,S,d]
        out[mask] = np.concatenate(x)
        if standardise and not info['standardised']:
            out = (out - np.float32(info['mean'])) / np.float32(info['std']) * mask[..., None]
        batch |= {k: torch.from_numpy(v) for k, v in ((m, out), (m + '_len', length), (m + '_mask', mask))}
    return batch


class Feed:
    """
    A corpus as one run reads it: texts are tokenised once, batches come on a device, and each clip
    has a cost, so that clips of similar length share a batch. k: the run's knobs; model: its
    System; tokenizer: None if it reads no text; as_data: see System.build; first_word: the frame of
    the first word (resample='words'), None to find it in the train split. The model's prompt, if it
    has one, is put around each text, with places for the pseudo tokens. With frozen features,
    batch['text'] holds hidden states of a frozen LM, [B,T,D]. Public attributes: info (the label's
    entry in meta.json), n_clips (after train_fraction), notes, truncated {split: the note on its
    truncated texts}. Raises CorpusError, ModelError.
    """
    def __init__(self, corpus, k, tokenizer, device, model, as_data=False, first_word=None):
        self.corpus, self.k, self.device, self.model, self.prompt = corpus, k, device, model, model.prompt
        corpus.label('train', k['label'])
        self.info = corpus.labels[k['label']]
        model.refuse_other_label(k, self.info)
        model.refuse_other_corpus(k, corpus)
        for split in corpus.n_clips:
            self._check_labels(split)
        self.streams = [m for m in model.streams(k) if m in corpus.widths]
        for m in self.streams:
            if corpus.meta['streams'][m]['standardised'] and not k['standardise']:
                raise CorpusError(f"{corpus.folder} holds {m} only standardised, and standardise is "
                                  "False; convert the source with --dtype=float32.")
        self.clips = {split: np.arange(n) for split, n in corpus.n_clips.items()}   # of the corpus
        if k['train_fraction'] < 1:
            self.clips['train'] = self._train_subset(k['train_fraction'], k['seed'])
        self.n_clips = {split: len(clips) for split, clips in self.clips.items()}
        self.stream_clips = self._shuffled_clips(k['seed']) if k['shuffle_streams'] else {}
        self.tokens, self.words, self.text, self.truncated = {}, {}, {}, {}  # by split
        self.first_word = first_word
        self.notes, self.lm_fingerprint = [], None
        rounding = 0.0
        if self.prompt:
            y = torch.from_numpy(corpus.label('train', k['label']))  # [N]
            answer = self.prompt.index(y)  # [N]
            answer_len = np.array([len(ids) for ids in self.prompt.answers])
            self.answer_len = answer_len[answer.numpy()]  # [N], in tokens
            rounding = self._rounding_error(y, answer)
        if rounding > 1e-6:
            self.notes.append("answers have one decimal, and rounding the train labels to one "
                              f"decimal gives a mean absolute error of {rounding:.3f}")
        if tokenizer:
            for split in corpus.n_clips:
                self._tokenize(split, tokenizer)
            if model.frozen_features(k):
                self._read_frozen_features(as_data)
        self.notes += model.notes(k, corpus)

    def _shuffled_clips(self, seed):
        """
        {split: [N]}: for each clip, another clip, whose streams it gets. The clips form a ring in
        random order and each gets the streams of the previous one, so none keeps its own.
        """
        others = {}
        for split, n in self.corpus.n_clips.items():
            ring = np.random.default_rng([seed, 2]).permutation(n)  # [N]
            others[split] = np.empty(n, np.int64)
            others[split][ring] = np.roll(ring, 1)
        return others

    def _tokenize(self, split, tokenizer):
        """ Sets the tokens of a split, with the prompt, and if needed each token's word. """
        k, prompt = self.k, self.prompt
        texts = texts_as_read(self.corpus, self.model, k, split)
        keep = 'end' if k.get('context') else 'start'   # a dialogue's last text is the clip's own
        tokens, n_empty, n_cut = tokenize(tokenizer, texts, k['max_text_len'], not prompt, keep)
        rows = getattr(tokenizer, 'embedding_rows', None)   # None: the LM is not loaded here
        refuse_unknown_tokens(tokens, rows, f"the texts of the split {split!r}")
        mean = np.mean([len(t) for t in tokens])
        self.notes.append(f"{split} texts: {mean:.1f} tokens on average, {n_empty} empty, {n_cut} "
                          f"truncated to {k['max_text_len']} tokens")
        if n_cut:
            self.truncated[split] = self.notes[-1]
        if prompt:
            tokens = [prompt.before + [0] * k['n_pseudo'] + own + prompt.after for own in tokens]
        self.tokens[split] = tokens
        if self.model.needs_words(k):
            self.words[split] = self._words(tokenizer, split, texts)

    def _read_frozen_features(self, as_data):
        """ Sets the hidden states of every text, views of a memory map. """
        k = self.k
        tokens = [t for split in self.tokens for t in self.tokens[split]]
        folder = os.path.join(k['data_dir'], 'features')
        hidden, self.lm_fingerprint = frozen_text(
            k['lm'], tokens, folder, k['trust_remote_code'], self.device, as_data=as_data)
        clips = iter(np.split(hidden, np.cumsum([len(t) for t in tokens])[:-1]))  # of [T_n,D]
        self.text = {split: [next(clips) for _ in self.tokens[split]] for split in self.tokens}

    def _words(self, tokenizer, split, texts):
        """ For each clip, the frame of the word that each token begins in; -1 for no word. """
        if split == 'train' and self.first_word is None:
            found = {m: self._frames_before_words(m, texts) for m in self.streams}
            starts = {m: n for m, n in found.items() if n is not None}
            self.notes += [f"no clip has both words and {m} frames, so no token gets {m}"
                           for m in found if m not in starts]
            if len(set(starts.values())) > 1:
                raise CorpusError("resample='words' needs the same frames before the first word in "
                                  f"all streams, and this corpus has {starts}: take another resample.")
            self.first_word = next(iter(starts.values()), 0)
            if self.first_word:
                self.notes.append("the first frame of a clip is zero and stands before its first word")
        try:
            with truncating(tokenizer):
                offsets = tokenizer(list(texts), truncation=True, max_length=self.k['max_text_len'],
                                    return_offsets_mapping=True)['offset_mapping']
        except (TypeError, ValueError, NotImplementedError, KeyError):
            raise CorpusError("resample='words' needs a fast Hugging Face tokenizer "
                              "(tokenizer.json), which gives each token's place in the text: "
                              "take another resample.") from None
        words = [word_of_tokens(text, spans) for text, spans in zip(texts, offsets)]
        return [[w if w < 0 else w + self.first_word for w in clip] for clip in words]

    def _frames_before_words(self, m, texts):
        """
        The number of frames before that of a clip's first word: 0, or 1 where aligned files begin
        with a zero frame. None if no train clip has both. Raises CorpusError unless most of those
        that have both have one frame per word.
        """
        n_frames = self.corpus.lengths('train', m)  # [N]
        n_words = np.array([len(t.split()) for t in texts])  # [N]
        both = (n_frames > 0) & (n_words > 0)  # [N]
        if not both.any():
            return None   # a user's clip may lack one of them
        if np.mean((n_frames == n_words)[both]) >= 0.5:
            return 0
        one_more = np.flatnonzero(both & (n_frames == n_words + 1))
        zero = [not np.any(self.corpus.frames('train', m, i)[0]) for i in one_more]
        if sum(zero) >= 0.5 * both.sum():
            return 1
        raise CorpusError(f"resample='words' is for sources with one frame per word, and {m} has "
                          f"{np.median(n_frames):.0f} frames for {np.median(n_words):.0f} words "
                          "(medians): take another resample.")

    def _check_labels(self, split):
        y, name = self.corpus.label(split, self.k['label']), self.k['label']  # [N]
        classes = self.info['kind'] == 'classes'
        low, high = (0, len(self.info['names']) - 1) if classes else self.info['range']
        if bad := np.flatnonzero(~((y >= low) & (y <= high))).tolist():
            clip = self.corpus.id(split)[bad[0]]
            known = y[bad[0]] >= 0 if classes else not np.isnan(y[bad[0]])
            wrong = f"is {y[bad[0]]}, outside [{low}, {high}]" if known else "is missing"
            raise CorpusError(f"The {name} of clip {clip} in the split {split} {wrong} ({len(bad)} "
                              "such clips); correct the source, or remove these clips from it, "
                              "and convert it again.")

    def _train_subset(self, fraction, seed):
        """
        Numbers of train clips: the same fraction of each class, or of the labels that round to the
        same integer, and at least one clip of each.
        """
        y, rng = np.round(self.corpus.label('train', self.k['label'])), np.random.default_rng([seed, 1])  # [N]
        groups = [rng.permutation(np.flatnonzero(y == v)) for v in np.unique(y)]
        return np.sort(np.concatenate([g[:max(1, round(fraction * len(g)))] for g in groups]))

    def _rounding_error(self, y, answer):
        """
        The mean absolute error of rounding labels y [N] to answers, of numbers answer [N]; 0 for
        classes.
        """
        if self.prompt.values is None:
            return 0.0
        return float((torch.tensor(self.prompt.values)[answer] - y).abs().mean())

    def __call__(self, split, index):
        """ Clips `index` of a split, on the device. Padding is token 0, which no model reads. """
        index, k = self.clips[split][index], self.k  # [B]
        stream_index = self.stream_clips[split][index] if self.stream_clips else None  # [B]
        batch = get_batch(self.corpus, split, index, self.tokens.get(split), 0, k['standardise'], k['label'],
                          self.streams, stream_index)
        if self.words:
            T = batch['tokens'].shape[1]
            words = [self.words[split][i] for i in index]
            batch['word'] = torch.tensor([w + [-1] * (T - len(w)) for w in words])  # [B,T]
        if self.text:
            hidden = np.concatenate([self.text[split][i] for i in index])  # [U,D]
            batch['text'] = torch.zeros(*batch['tokens'].shape, hidden.shape[1])  # [B,T,D]
            batch['text'][batch['text_mask']] = torch.from_numpy(hidden.astype(np.float32))
        if self.device != 'cuda':
            return {name: v.to(self.device) for name, v in batch.items()}
        # pinned memory and non_blocking: the step does not wait for the copy
        return {name: v.pin_memory().to('cuda', non_blocking=True) for name, v in batch.items()}

    def n_targets(self, split, index):
        """
        The number of tokens of these clips that an LM loss predicts: the answer tokens, or without
        a prompt all tokens but the first of each clip.
        """
        index = self.clips[split][index]
        if self.prompt:
            return int(self.answer_len[index].sum())
        return sum(len(self.tokens[split][i]) - 1 for i in index) if self.tokens else 0

    def cost(self, split):
        """
        The cost of each clip, [N]: text tokens plus the frame cost of the model's streams. With
        text_first, clips are ordered by tokens first and by frame cost second; with
        evaluates_by_frames this holds for the train split alone.
        """
        cost = np.zeros(self.corpus.n_clips[split], np.int64)  # [N]
        if self.tokens:
            cost += [len(t) for t in self.tokens[split]]
        if self.model.text_first and (split == 'train' or not self.model.evaluates_by_frames):
            cost *= 10_000   # one token outweighs any frame cost below 10,000
        for m in self.streams:
            cost += self.model.frame_cost(self.k, self.corpus.lengths(split, m))
        return cost[self.clips[split]]


if __name__ == '__main__':
    print_any_text()
    if '--help' in sys.argv or '-h' in sys.argv:
        print(conversion.__doc__)
        sys.exit(0)
    try:
        conversion.command_line(sys.argv[1:])
    except UserError as e:
        sys.exit(f"data.py: {e}")
    except BrokenPipeError:   # as of `| head`
        sys.exit(1)
    except OSError as e:
        sys.exit(f"data.py: {e.filename or 'a file'} cannot be read or written ({e.strerror}); free "
                 "disk space, or correct the path or its permissions.")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; no unfinished folder is left.")
