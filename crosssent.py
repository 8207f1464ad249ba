"""
CrossSent, which fine-tunes a text encoder with a gate for audio and video.

Axis letters: B clips, T text tokens, D width of the encoder.
"""
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import GMRA, frames_on_tokens, text_vector
from configurator import AtLeast, Share
from corpora.unpickle import CorpusError
from lm import EncoderKnobs
from losses import UNITS, OrdinalKnobs, head_loss, mse
from run.errors import ModelError
from run.load_lm import specials
from run.new_lm import load_text_encoder
from run.texts import texts_as_read
from system import System, attention_of_last_layer, input_of, weight_groups


class CrossSent(System):
    """
    CrossSent (Liu et al. 2026): a Gated Multimodal Residual Adapter (GMRA) adds audio and video to
    the hidden states of a fine-tuned encoder before layer gmra_layer. A head of two linear layers
    reads one score from the sentence vector. Loss: MSE and the ordinal regularisers, or CORAL
    (losses.py).
    """

    class Knobs(EncoderKnobs, OrdinalKnobs):
        gmra_layer: AtLeast(0) = 1    # encoder layer, from 1, before which GMRA runs; 0: text only
        gmra_width: AtLeast(0) = 0    # d, width of the GMRA; 0: the encoder's width
        gmra_heads: AtLeast(0) = 0    # attention heads; 0: as many as the encoder has
        gmra_mult: AtLeast(0.1) = 4.0  # hidden width of the residual adapter, in encoder widths
        gmra_concat: Literal['sequence', 'features'] = 'sequence'  # how audio and video are joined
        gmra_start: Literal['identity', 'random'] = 'identity'  # 'identity': no effect at first
        gmra_codes: AtLeast(0) = 0    # streams are one column of codes 0 .. gmra_codes - 1; 0: features
        resample: Literal['linear', 'mean', 'words', 'none'] = 'linear'  # of frames to text tokens
        text_pool: Literal['first', 'mean'] = 'first'  # first token, or mean of tokens
        lr_encoder: AtLeast(0) = 1.0  # factor of the learning rate for the encoder's own weights
        dropout: Share() = 0.1        # in the GMRA and the head

    text_first = True  # GMRA computes padding, so clips with texts of similar length share a batch
    score_loss = staticmethod(mse)
    units = UNITS | dict(task='squared label units')

    def __init__(self, encoder, tokenizer, widths, k):
        """ encoder: TextEncoder; widths: stream -> width; k: the knobs, a dict. """
        super().__init__()
        self.encoder, self.k, D = encoder, k, encoder.width
        if not 0 <= k['gmra_layer'] <= encoder.n_layers:
            raise ModelError(f"gmra_layer={k['gmra_layer']} must be from 1 to {encoder.n_layers}, "
                             "the layers of this encoder, or 0 for no GMRA.")
        encoder.refuse_longer(k['max_text_len'])
        self.ends = [len(tokens) for tokens in specials(tokenizer)]
        self.gmra = None
        if k['gmra_layer'] and widths:
            self.gmra = GMRA(
                widths, D, k['gmra_width'] or D, k['gmra_heads'] or encoder.n_heads,
                k['gmra_mult'], k['gmra_concat'], k['gmra_start'], k['dropout'])
        self.head = nn.Sequential(
            nn.Linear(D, D), nn.Tanh(), nn.Dropout(k['dropout']), nn.Linear(D, 1))

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if len(cls.streams(k)) > 1 and k['gmra_concat'] == 'features' and k['resample'] == 'none':
            errors += ["gmra_concat='features' joins audio and video along features, so both must "
                       "be resampled to the text's tokens: take another resample"]
        if k['gmra_codes'] and k['standardise']:
            errors += ["gmra_codes reads codes as they are stored: --standardise=False"]
        if k['gmra_codes'] and k['resample'] in ('linear', 'mean'):
            errors += ["gmra_codes are names, of which no mean exists: --resample=words, or none"]
        return errors

    @classmethod
    def refuse_other_corpus(cls, k, corpus):
        """ Raises CorpusError if a stream does not hold codes although gmra_codes says so. """
        streams = [s for s in cls.streams(k) if s in corpus.widths and k['gmra_codes']]
        for s in streams:
            if replaced := sum(corpus.meta['streams'][s].get('cleaned', {}).values()):
                raise CorpusError(f"gmra_codes reads whole numbers, and {replaced} values of {s} "
                                  "were NaN or infinite and are stored as 0: correct the source "
                                  "and convert it again, or take gmra_codes=0 for features.")
            for split in corpus.n_clips:
                refuse_other_codes(corpus, split, s, k['gmra_codes'])

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        texts = [] if trained else texts_as_read(facts, cls, k, 'train')
        encoder, tokenizer = load_text_encoder(k, texts, folder, trained, as_data)
        return cls.assemble(k, facts, encoder, tokenizer), tokenizer

    @classmethod
    def assemble(cls, k, facts, encoder, tokenizer):
        model = cls(encoder, tokenizer, cls.gmra_widths(k, facts), k)
        return model.with_levels(facts.labels[k['label']])

    @classmethod
    def gmra_widths(cls, k, facts):
        """ Stream -> the width of its frames as the GMRA reads them. Raises ModelError. """
        widths = {s: facts.widths[s] for s in k['modalities'] if s in facts.widths}
        if not k['gmra_codes']:
            return widths
        if wrong := [s for s, width in widths.items() if width != 1]:
            raise ModelError(f"gmra_codes reads one column of codes, and {wrong[0]} has "
                             f"{widths[wrong[0]]} columns: take another corpus, or gmra_codes=0.")
        return dict.fromkeys(widths, k['gmra_codes'])

    @classmethod
    def streams(cls, k):
        return super().streams(k) if k['gmra_layer'] else ()

    @classmethod
    def makes_files(cls, k):
        return k['lm'] == 'new'

    @classmethod
    def needs_words(cls, k):
        return k['resample'] == 'words'

    def score(self, batch):
        """ What the head reads from the sentence vectors of a batch -> [B]. """
        mask, rows = batch['text_mask'], batch['text_rows']  # [B,T], [U]
        x = self.encoder.embed(batch['tokens'])  # [B,T,D]
        n_before = 0  # encoder layers before GMRA
        if self.gmra is not None:
            frames = frames_on_tokens(batch, self.gmra.proj, self.ends, self.k['resample'])
            if self.k['gmra_codes']:
                frames = one_hot_codes(frames, self.k['gmra_codes'])
            n_before = self.k['gmra_layer'] - 1
            x = self.gmra(self.encoder.layers(x, mask, rows, 0, n_before), frames)  # [B,T,D]
        x = self.encoder.layers(x, mask, rows, n_before)
        with torch.autocast(x.device.type, enabled=False):
            y = text_vector(x.float(), mask, self.k['text_pool'])  # [B,D]
            return self.head(y)[:, 0]

    def predict(self, batch):
        return dict(pred=self.predicted_score(self.score(batch)))  # [B]

    def forward(self, batch):
        return head_loss(self.score(batch)[:, None], 'regression', self.k, batch, self.task_loss)

    def param_groups(self):
        """ As System.param_groups, with the factor lr_encoder for the encoder's own weights. """
        return weight_groups(self, dict(encoder=self.k['lr_encoder']))

    def views(self, batch, predict):
        return attention_of_last_layer(self.encoder, predict, batch)

    def fused(self, batch, predict):
        return input_of(self.head, predict, batch)


def one_hot_codes(frames, n):
    """
    Codes as features: the linear map of the GMRA behind them is then a table of embeddings. Where
    the mask is False, they are zeros. frames: stream -> (codes [B,L,1], mask [B,L]) -> stream ->
    ([B,L,n], mask).
    """
    return {s: (F.one_hot(codes[..., 0].long(), n).to(codes.dtype) * mask[..., None], mask)
            for s, (codes, mask) in frames.items()}


def refuse_other_codes(corpus, split, stream, n):
    """ Raises CorpusError unless all frames of a stream are whole numbers from 0 to n - 1. """
    for i, clip in enumerate(corpus.id(split)):
        codes = np.asarray(corpus.frames(split, stream, i))  # [S,1]
        if codes.size and not np.isin(codes, np.arange(n)).all():
            raise CorpusError(f"gmra_codes={n} reads whole numbers from 0 to {n - 1}, and {stream} "
                              f"of the clip {clip!r} has others: raise gmra_codes, or take "
                              "gmra_codes=0 for features.")
