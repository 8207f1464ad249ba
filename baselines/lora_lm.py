"""
A causal LM fine-tuned by LoRA, on the text alone: what an adapter for audio and video is compared
with.

Axis letters: B clips, T text tokens, D width of the LM, K classes.
"""
from copy import copy
from functools import partial
from typing import Literal

import torch
import torch.nn as nn

from adapters import LoRA, LoRAFFW, text_vector, weight_of
from configurator import AtLeast, Share
from lm import LMKnobs
from losses import OrdinalKnobs, head_loss
from run.errors import ModelError
from system import System, class_prediction, input_of


class LoRALM(System):
    """
    A causal LM with LoRA (Hu et al. 2021) on the layers that lora_on lists, and a head on the
    hidden states behind the final norm. The LM's own weights stay frozen. Loss: L1 for scores,
    cross-entropy for classes.
    """

    class Knobs(LMKnobs, OrdinalKnobs):
        lora_on: Literal['q', 'k', 'v', 'o', 'ffw'] = ['q', 'k', 'v', 'o', 'ffw']  # parts of a layer
        lora_rank: AtLeast(1) = 16    # r, rank of LoRA
        lora_alpha: AtLeast(0) = 32.0  # the update is scaled by alpha / r
        lora_dropout: Share() = 0.05  # on the input of LoRA
        text_pool: Literal['last', 'mean'] = 'mean'  # what the head reads: last token, or the mean
        head_width: AtLeast(0) = 64   # hidden width of the head; 0: a linear head
        dropout: Share() = 0.1        # on the input of the head

    label_kinds = ('regression', 'classes')
    frozen_lm = True

    def __init__(self, lm, info, k):
        """ lm: FrozenLM; info: the corpus's entry for the label; k: the run's knobs, a dict. """
        super().__init__()
        self.lm, self.k, self.kind = lm, k, info['kind']
        lm.refuse_longer(k['max_text_len'], 'max_text_len')
        self.lora = nn.ModuleDict()   # layer and part, such as '0_q' -> LoRA or LoRAFFW
        adapted = copy(lm)   # shares all weights with lm, which itself stays the plain LM
        adapted.layer_parts = [self.adapt(l) for l in range(lm.n_layers)]
        self.adapted = (adapted,)   # in a tuple, so that no weight is registered twice

        n_out = 1 if self.kind == 'regression' else len(info['names'])
        if k['head_width']:
            hidden = [nn.Linear(lm.width, k['head_width']), nn.ReLU()]
        else:
            hidden = []
        self.head = nn.Sequential(nn.Dropout(k['dropout']), *hidden,
                                  nn.Linear(k['head_width'] or lm.width, n_out))

    def adapt(self, l):
        """
        The parts of LM layer l, in which LoRA follows the layers that lora_on lists. Raises
        ModelError.
        """
        k, parts = self.k, self.lm.layer_parts[l]
        names = ['q', 'k', 'v'] if len(parts['qkv']) == 3 else ['qkv']
        wanted = set(k['lora_on'])
        if names == ['qkv'] and wanted & {'q', 'k', 'v'}:
            if not {'q', 'k', 'v'} <= wanted:
                raise ModelError(f"lora_on={k['lora_on']}: this LM (family {self.lm.family!r}) has "
                                 "q, k and v in one matrix, so list all three or none.")
            wanted.add('qkv')

        def with_lora(name, W):
            if name not in wanted:
                return W
            n_out, n_in = weight_of(W).shape
            lora = LoRA(n_in, n_out, k['lora_rank'], k['lora_alpha'], k['lora_dropout'])
            self.lora[f'{l}_{name}'] = lora
            return partial(lora, W=W)

        new = dict(qkv=[with_lora(name, W) for name, W in zip(names, parts['qkv'])],
                   out=with_lora('o', parts['out']))
        if 'ffw' in wanted:
            ffw = self.lm.ffw(l)
            lora = LoRAFFW(ffw, k['lora_rank'], k['lora_alpha'], k['lora_dropout'])
            self.lora[f'{l}_ffw'] = lora
            new['ffw'] = partial(lora, lm_ffw=ffw)
        return parts | new

    @classmethod
    def assemble(cls, k, facts, lm, tokenizer):
        info = facts.labels[k['label']]
        return cls(lm, info, k).with_levels(info)

    @classmethod
    def streams(cls, k):
        return ()

    def scores(self, batch):
        """ The head's output [B,1], or [B,K] for classes. """
        x = self.adapted[0](batch['tokens'])  # [B,T,D]
        with torch.autocast(x.device.type, enabled=False):
            return self.head(text_vector(x.float(), batch['text_mask'], self.k['text_pool']))

    def predict(self, batch):
        scores = self.scores(batch)  # [B,1] or [B,K]
        if self.kind == 'classes':
            return class_prediction(scores)
        return dict(pred=self.predicted_score(scores[:, 0]))  # [B]

    def forward(self, batch):
        return head_loss(self.scores(batch), self.kind, self.k, batch, self.task_loss)

    def fused(self, batch, predict):
        return input_of(self.head, predict, batch)
