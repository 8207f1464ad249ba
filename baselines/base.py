"""
The base classes of the baselines, and two blocks that several baselines use.

The baselines are the systems that the papers compare with, one class each. train.py trains them
like any other system.

    python train.py config/baseline_tfn.py      on the toy corpus
    python train.py config/baseline_tfn.py --dataset=mosi --corpus=unaligned_50.pkl
                                                with the hyperparameters published for CMU-MOSI

The text is read by a fine-tuned encoder (text_features='tuned'), or as the last hidden states of a
Hugging Face model, computed once (text_features='frozen'). Each stream has its own lengths and
mask, and no system reads padding. MMSA, the framework behind most published tables, has bugs that
are not repeated here: the docstrings of the classes name them, and tests/test_baselines.py tests
that they are absent.

Axis letters:
    B clips   T text tokens   S audio or video frames   L, M any sequence   D text width
    d width of a system   h heads   N clips of the train split
    m a stream: 'text', 'audio' or 'vision'
"""
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import last_step, text_vector
from configurator import AtLeast, Share, class_knobs
from lm import EncoderKnobs
from losses import OrdinalKnobs, ordinal_loss
from run.errors import ModelError
from run.frozen_text import width_of
from run.load_lm import lm_config, load_tokenizer
from run.new_lm import load_text_encoder
from run.texts import texts_as_read
from system import System, attention_of_last_layer, class_prediction, input_of, weight_groups

MODALITIES = ('text', 'audio', 'vision')  # also the order of the numbers in a knob with one per stream


class Baseline(System):
    """
    The base class. A baseline implements `fuse(x, batch)`, which takes the hidden states of the
    text x [B,T,D] and returns a dict with pred and the tensors that its losses need. pred is the
    score [B], or for a label with classes their logits [B,K]. It may implement
    `own_loss(out, batch)`, which returns its auxiliary losses. The loss of classes is the
    cross-entropy, in place of score_loss; MMSA has scores only.
    """

    class Knobs(EncoderKnobs, OrdinalKnobs):
        text_features: Literal['tuned', 'frozen'] = 'tuned'  # encoder, or stored hidden states
        lr_encoder: AtLeast(0) = 1.0  # learning rate of the encoder, as a multiple of lr
        dropout: Share() = 0.1        # after the fusion, if the paper has it there, and in lm='new'

    label_kinds = ('regression', 'classes')
    needed_streams = ('audio', 'vision')  # streams that the corpus must have
    lr_parts = ('encoder',)  # parts whose learning rate is lr times the knob lr_<part>
    scorer = None            # name of the module that reads the fused vector, if there is one

    def __init__(self, encoder, D, facts, k):
        """
        encoder: a TextEncoder, or None if hidden states are frozen. D: width of the hidden states.
        facts: the corpus, as in System.build. k: the knobs.
        """
        super().__init__()
        info = facts.labels[k['label']]
        self.refuse_other_label(k, info)
        self.kind = info['kind']
        self.n_out = len(info['names']) if self.kind == 'classes' else 1
        if missing := [m for m in self.needed_streams if m not in facts.widths]:
            raise ModelError(
                f"system={k['system']!r} needs {' and '.join(self.needed_streams)}, but this "
                f"corpus has no {missing[0]}: choose another corpus, or list the streams that it "
                "has in the knob late_streams of the late-fusion system.")
        if encoder is not None:
            encoder.refuse_longer(k['max_text_len'])
        self.encoder = encoder
        self.k = k

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        for name, default in class_knobs(cls).items():
            is_numbers = isinstance(default, list) and not isinstance(default[0], str)
            if is_numbers and len(k[name]) != len(default):
                errors.append(f"{name}={k[name]} must be a list of {len(default)} numbers")
        if k['text_features'] == 'frozen' and k['lm'] == 'new':
            errors.append("text_features='frozen' needs a pretrained model in --lm=, not 'new'")
        return errors

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        if 'text' not in cls.modalities_read(k):
            return cls.assemble(k, facts, None, None), None
        if cls.frozen_features(k):  # batches contain the hidden states, so no weights are loaded
            config, _ = lm_config(k['lm'], k['trust_remote_code'], as_data)
            width = width_of(config)
            tokenizer = load_tokenizer(k['lm'], k['trust_remote_code'], as_data)
            return cls.assemble(k, facts, None, tokenizer, width), tokenizer
        texts = [] if trained else texts_as_read(facts, cls, k, 'train')
        encoder, tokenizer = load_text_encoder(k, texts, folder, trained, as_data)
        return cls.assemble(k, facts, encoder, tokenizer), tokenizer

    @classmethod
    def assemble(cls, k, facts, encoder, tokenizer, width=0):
        """ Builds the model. width: of the hidden states, if encoder is None. """
        model = cls(encoder, width if encoder is None else encoder.width, facts, k)
        return model.with_levels(facts.labels[k['label']])

    @classmethod
    def makes_files(cls, k):
        return k['lm'] == 'new' or k['text_features'] == 'frozen'

    @classmethod
    def frozen_features(cls, k):
        return k['text_features'] == 'frozen'

    def text(self, batch):
        """ Hidden states of the text [B,T,D]. """
        if self.encoder is None:
            return batch['text']
        return self.encoder(batch['tokens'], batch['text_mask'], batch['text_rows'])

    def run(self, batch):
        """ The output of fuse, computed in float32. """
        x = self.text(batch)  # [B,T,D]
        with torch.autocast(x.device.type, enabled=False):
            return self.fuse(x.float(), batch)

    def answer(self, y):
        """ What fuse returns as pred, from the last layer's output y [B,n_out] -> [B] or [B,K]. """
        return y if self.kind == 'classes' else y[:, 0]

    def predict(self, batch):
        """ dict of pred [B]; of prob [B,K] for classes, or else the score of each stream [B] in
        systems with unimodal scores. """
        out = self.run(batch)
        if self.kind == 'classes':
            return class_prediction(out['pred'])
        out['pred'] = self.predicted_score(out['pred'])  # [B]
        return {name: v for name, v in out.items() if v.ndim == 1}

    def own_loss(self, out, batch):
        """ The auxiliary losses: name -> (term [], its weight in the loss). """
        return {}

    def loss(self, out, batch):
        """ out: the output of run -> dict(loss, terms). """
        label = batch['label']  # [B]
        own = self.own_loss(out, batch)
        if self.kind == 'classes':
            task, ordinal_terms, ordinal = F.cross_entropy(out['pred'], label), {}, 0.0
        else:
            ordinal_terms, ordinal = ordinal_loss(out['pred'], label, self.k, batch)
            task = self.task_loss(out['pred'], label)
        loss = task + sum(weight * term for term, weight in own.values()) + ordinal
        own_terms = {name: term for name, (term, _) in own.items()}
        return dict(loss=loss, terms={'task': task} | own_terms | ordinal_terms)

    def forward(self, batch):
        return self.loss(self.run(batch), batch)

    def param_groups(self):
        return weight_groups(self, {part: self.k['lr_' + part] for part in self.lr_parts})

    def views(self, batch, predict):
        if self.encoder is None:
            return {}
        return attention_of_last_layer(self.encoder, predict, batch)

    def fused(self, batch, predict):
        if self.scorer is None:
            return None
        return input_of(self.get_submodule(self.scorer), predict, batch)


class Pooled(Baseline):
    """ The base class of systems that read the text as one sentence vector. """

    class Knobs(Baseline.Knobs):
        text_pool: Literal['first', 'last', 'mean'] = 'first'  # sentence vector: a token, or the mean

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if cls.frozen_features(k) and k['text_pool'] == 'first':
            errors.append("text_features='frozen' needs text_pool='mean' or 'last': in a causal LM "
                          "the first hidden state has seen only the first token")
        return errors

    def text_vector(self, x, batch):
        """ x [B,T,D] -> [B,D]. """
        return text_vector(x, batch['text_mask'], self.k['text_pool'])


class Attentive(Baseline):
    """ The base class of systems that fuse by attention layers of width d. """

    class Knobs(Baseline.Knobs):
        fusion_width: AtLeast(1) = 50  # d, width of the fusion
        fusion_heads: AtLeast(1) = 10  # attention heads; must divide fusion_width

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if k['fusion_width'] % k['fusion_heads']:
            errors.append(f"fusion_heads={k['fusion_heads']} does not divide "
                          f"fusion_width={k['fusion_width']}: choose a divisor")
        return errors


class Recurrent(nn.Module):
    """
    An LSTM's state at the last real step, dropout, a linear layer. In MMSA the state of the text
    follows the padding, and its dropout is 0 where the LSTM has one layer.
    """
    def __init__(self, width, d, d_out, dropout):
        super().__init__()
        self.lstm = nn.LSTM(width, d, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d, d_out)

    def forward(self, x, lengths):
        """ x [B,L,width], lengths [B] -> [B,d_out]. """
        state = last_step(self.lstm(x)[0], lengths)  # [B,d]
        return self.out(self.dropout(state))  # [B,d_out]


class Head(nn.Module):
    """ Dropout, two linear layers with ReLU, and a linear layer to the n_out outputs. Used by
    LF-DNN, TFN, Self-MM and TETFN. """
    def __init__(self, width, d, dropout, n_out=1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([nn.Linear(width, d), nn.Linear(d, d), nn.Linear(d, n_out)])

    def forward(self, x):
        """ x [B,width] -> output [B,n_out], feature after the first layer [B,d]. """
        feature = F.relu(self.layers[0](self.dropout(x)))  # [B,d]
        out = self.layers[2](F.relu(self.layers[1](feature)))  # [B,n_out]
        return out, feature
