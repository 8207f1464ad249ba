"""
MAG-BERT: audio and video shift the word embeddings of a text encoder.
"""
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import frames_on_tokens
from baselines.base import Pooled
from configurator import AtLeast
from run.load_lm import specials


def l2_norm(x):
    """ Euclidean norm over the last axis: [..,d] -> [..,1]. """
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


class MAG(nn.Module):
    """ The Multimodal Adaptation Gate (Rahman et al. 2020, eqs. 1-4): adds the shift
    h = sum_m relu(W_m [m; t]) * (V_m m) to the text embedding t, then LayerNorm and dropout. h is
    scaled down to a norm of at most beta |t|. """
    def __init__(self, widths, D, beta, dropout):
        super().__init__()
        self.beta = beta
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(D)
        self.gates = nn.ModuleDict({m: nn.Linear(w + D, D) for m, w in widths.items()})
        self.values = nn.ModuleDict({m: nn.Linear(w, D) for m, w in widths.items()})

    def forward(self, x, frames):
        """ x [B,T,D], frames: dict of stream -> [B,T,d_m]; -> [B,T,D]. """
        h = sum(F.relu(self.gates[m](torch.cat([y, x], -1))) * self.values[m](y)
                for m, y in frames.items())  # [B,T,D]
        h_norm, x_norm = l2_norm(h), l2_norm(x)  # [B,T,1] each
        h_norm = torch.where(h_norm == 0, 1.0, h_norm) + 1e-6
        alpha = self.beta * x_norm / h_norm  # [B,T,1]
        return self.dropout(self.norm(alpha.clamp(max=1.0) * h + x))


class MAGBERT(Pooled):
    """ MAG-BERT (Rahman et al. 2020): a fine-tuned encoder with a MAG between its embeddings and
    its first layer, then dense, tanh, linear. Each text token gets one audio and one video vector:
    the frame of its word, or frames resampled onto the tokens (knob resample). Special tokens get
    zeros. The dense layer is trained from scratch (the paper uses BERT's pooler). """

    class Knobs(Pooled.Knobs):
        text_features: Literal['tuned'] = 'tuned'  # 'frozen' is impossible: MAG is in the encoder
        resample: Literal['linear', 'mean', 'words'] = 'linear'  # of frames onto text tokens
        mag_beta: AtLeast(0) = 1.0  # largest norm of the shift, as a multiple of the text's norm

    text_first = True  # MAG computes the padding of texts
    scorer = 'head'

    def __init__(self, encoder, D, facts, k, ends):
        """ ends: numbers of special tokens before and after each text. """
        super().__init__(encoder, D, facts, k)
        self.ends = ends
        self.mag = MAG(facts.widths, D, k['mag_beta'], k['dropout'])
        self.head = nn.Sequential(
            nn.Linear(D, D), nn.Tanh(), nn.Dropout(k['dropout']), nn.Linear(D, self.n_out))

    @classmethod
    def assemble(cls, k, facts, encoder, tokenizer):
        ends = [len(tokens) for tokens in specials(tokenizer)]
        model = cls(encoder, encoder.width, facts, k, ends)
        return model.with_levels(facts.labels[k['label']])

    @classmethod
    def needs_words(cls, k):
        return k['resample'] == 'words'

    @classmethod
    def notes(cls, k, corpus):
        notes = []
        for m in cls.streams(k):
            if m in corpus.widths:
                n_frames = np.median(corpus.lengths('train', m))
                notes.append(f"{m}: a median of {n_frames:.0f} frames per clip, "
                             f"resampled onto the text tokens (resample={k['resample']!r})")
        return notes

    def text(self, batch):
        with_masks = frames_on_tokens(batch, self.mag.values, self.ends, self.k['resample'])
        frames = {m: y for m, (y, _) in with_masks.items()}  # [B,T,d_m] each
        x = self.mag(self.encoder.embed(batch['tokens']), frames)  # [B,T,D]
        return self.encoder.layers(x, batch['text_mask'], batch['text_rows'])

    def fuse(self, x, batch):
        return dict(pred=self.answer(self.head(self.text_vector(x, batch))))
