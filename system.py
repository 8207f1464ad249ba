"""
The contract of a system: all that train.py, eval.py and the tools may ask of one. A system is one
class and one config.

    class MySystem(System):
        class Knobs(System.Knobs):
            my_width = 64        # its own knobs: literals, one a line, with meaning and unit

        @classmethod
        def build(cls, k, facts, folder, dtype, trained, as_data): ..   # -> model, tokenizer
        def forward(self, batch): ..                                     # -> dict(loss, terms)
        def predict(self, batch): ..                                     # -> dict(pred, prob where there is one)

`SYSTEMS` in model.py gives it a name. docs/fork.md adds one, step by step.
"""
import numpy as np
import torch
import torch.nn as nn

from configurator import check_declaration
from losses import ordinal_notes, wrong_ordinal
from metrics import BETTER
from run.errors import ModelError


class System(nn.Module):
    """ A model and what the rest of the repository must know of it. """

    class Knobs:
        pass

    reads_text = True               # batches hold tokens of the clips' text
    label_kinds = ('regression',)   # of the labels that it learns: 'regression', 'classes'
    frozen_lm = False               # self.lm is a FrozenLM, which may be sharded
    predicts = True                 # False: it has a loss alone, and no prediction of a label
    text_first = False              # clips of like text length share a batch, and of these those of like frames
    one_process = False             # it keeps statistics of the clips, so that torchrun cannot share its batches
    passes_on = ()                  # knobs that its run, as a prerequisite, takes from the run that needs it

    def __init__(self):
        super().__init__()
        self.lm = None        # the FrozenLM, if any
        self.prompt = None    # the Prompt around each text, if any

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_declaration(cls)

    # ---------------------------------------------------------------------------------------------
    # From knobs to a model

    @classmethod
    def check(cls, k):
        """
        Sentences about knobs that contradict each other. Asked before anything is read or trained.
        """
        wrong = wrong_ordinal(k) if 'weight_mpr' in k else []
        if k['select'] not in BETTER:
            wrong += [f"select={k['select']!r} is none of {', '.join(BETTER)}"]
        elif (k['select'] == 'loss') == cls.predicts:
            wrong += ["select is 'loss' for a system that predicts nothing, such as an LM, and a "
                      "metric for the others"]
        return wrong

    @classmethod
    def rehearse(cls, k, pending):
        """
        Raises ModelError where the knobs describe no model, from configurations alone: before
        prerequisites are trained. pending: the knobs that name a run which is not trained yet.
        """

    @classmethod
    def stands_on(cls, k):
        """ The knobs that may name a run of k['needs'], such as lm='lm_toy'. """
        return [knob for knob in ('lm',) if knob in k]

    @classmethod
    def float32_bytes(cls, k):
        """
        The size of its frozen weights in float32, from configurations alone; 0 where nothing is
        frozen.
        """
        return 0

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        """
        The model that the knobs `k` (a dict) describe, and its tokenizer (None without text).
        Raises ModelError.

        facts: the corpus, or what a run has written down of it: widths, labels, n_clips,
        text(split). folder: the run's, for files that building makes. trained=True: the weights
        come from a checkpoint afterwards, and the files are there. as_data=True: the LM is one that
        a stranger's folder names.
        """
        raise NotImplementedError(f"{cls.__name__} has no build")

    @classmethod
    def assemble(cls, k, facts, text_model, tokenizer):
        """
        The model on a text model that is there already: a FrozenLM, a TextEncoder or None. What build
        does after loading; the benchmark calls it with a random text model.
        """
        raise NotImplementedError(f"{cls.__name__} has no assemble, which the benchmark asks for")

    # ---------------------------------------------------------------------------------------------
    # What it reads

    @classmethod
    def streams(cls, k):
        """ The streams of 'audio' and 'vision' that its batches hold; others arrive empty. """
        return tuple(k['modalities'])

    @classmethod
    def seen(cls, k):
        """ Which of 'text', 'audio', 'vision' a run of these knobs reads. """
        return (['text'] if cls.reads_text else []) + list(cls.streams(k))

    @classmethod
    def texts(cls, k, corpus, split):
        """ The texts of a split as it reads them. """
        return corpus.text(split)

    @classmethod
    def makes_files(cls, k):
        """
        Whether building or feeding it writes files that several processes would write at once.
        """
        return False

    @classmethod
    def frozen_features(cls, k):
        """
        Whether batches hold hidden states of k['lm'] for the text, computed once, in batch['text'].
        """
        return False

    @classmethod
    def needs_words(cls, k):
        """ Whether batches must say which word each token begins in (batch['word']). """
        return False

    @classmethod
    def notes(cls, k, corpus):
        """ Sentences for the start of a run about how it reads this corpus. """
        return []

    @classmethod
    def run_notes(cls, k, labels, n_epochs):
        """
        Sentences for the start of a run about knobs that do less than one may think. labels [N]: of
        the train split.
        """
        return ordinal_notes(k, labels, n_epochs) if 'weight_mpr' in k else []

    @classmethod
    def frame_cost(cls, k, n_frames):
        """
        What clips of n_frames [N] of a stream cost beside text tokens: clips of like cost share a
        batch. -> [N]
        """
        return np.asarray(n_frames)

    # ---------------------------------------------------------------------------------------------
    # What it does

    def forward(self, batch):
        """ dict(loss [], terms: name -> []). Pure: it stashes nothing on modules. """
        raise NotImplementedError

    def predict(self, batch):
        """ dict(pred [B], prob [B,K] where there is one, ..). Reads no label. """
        raise NotImplementedError

    def after_step(self, batch, out):
        """ After each micro-batch of training: the one place for state between steps. """

    def save_for_others(self, folder):
        """
        After training: files in the run's folder that other runs load, beside its checkpoint.
        """

    def param_groups(self):
        """ Every trainable weight once: a list of dict(names, params, decay, lr_scale). """
        return grouped(self)

    # ---------------------------------------------------------------------------------------------
    # What reports and figures show

    def gates(self):
        """
        Block -> its gates as they multiply, for the log and the figures; None without gates.
        """
        return None

    def views(self, batch, predict):
        """
        Where it looks, for one clip: name -> (weights [rows,columns], row names or their title,
        title of the columns). predict(batch) runs the model as eval does. {} where nothing attends.
        """
        return {}

    def fused(self, batch, predict):
        """
        The vectors of a batch that its prediction is read from [B,D], for t-SNE; None where there
        are none.
        """
        return None

    @classmethod
    def readings(cls, k, predictions):
        """
        Rows of the report for what parts of it say by themselves: name of the row -> (key in
        `predictions`, which of the corpus's bounds it is to be compared with: 'text', 'av').
        """
        return {}

    @classmethod
    def controls(cls, k):
        """
        Rows of the report that are predicted otherwise: name of the row -> (arguments of predict,
        which bound).
        """
        return {}

    @classmethod
    def bound(cls):
        """ Which of the corpus's bounds its own row is compared with. """
        return 'full' if cls.reads_text else 'av'


def checked_loss(model, out):
    """ What forward returned, if it is as the contract has it. Raises ModelError. """
    if type(out) is not dict or not {'loss', 'terms'} <= set(out) or out['loss'].ndim:
        has = ', '.join(out) if type(out) is dict else f'a {type(out).__name__}'
        raise ModelError(f"{model.__class__.__name__}.forward must return dict(loss=[], terms=name -> []), and "
                         f"it returned {has}.")
    return out


def checked_prediction(model, out, n_clips):
    """ What predict returned, if it is as the contract has it. Raises ModelError. """
    if type(out) is not dict or 'pred' not in out:
        has = ', '.join(out) if type(out) is dict else f'a {type(out).__name__}'
        raise ModelError(f"{model.__class__.__name__}.predict must return dict(pred=[B], ..), and it returned {has}.")
    for name, v in out.items():
        if v.ndim < 1 or len(v) != n_clips or name == 'pred' and v.ndim != 1:
            raise ModelError(f"{model.__class__.__name__}.predict gives {name} of shape {list(v.shape)} for "
                             f"{n_clips} clips: pred must be [{n_clips}], the others [{n_clips}, ..].")
    return out


def grouped(model, lr_scales=None):
    """
    Every trainable weight in one group, by name: matrices are decayed; biases, norms, gates and
    learnable tokens are not (the release of DeepMLF means to, and its name rule never matches: it
    decays all but 'bias'). lr_scales: the first part of a name -> its learning rate over that of
    the others.
    """
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        scale = (lr_scales or {}).get(name.split('.')[0], 1.0)
        key = p.ndim > 1 and 'tokens' not in name, scale
        group = groups.setdefault(key, dict(names=[], params=[], decay=key[0], lr_scale=key[1]))
        group['names'].append(name)
        group['params'].append(p)
    return [groups[key] for key in sorted(groups, reverse=True)]
