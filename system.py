"""
The contract (interface) of a system: what train.py, eval.py and the tools may use. A new system is
one class and one config.

    class MySystem(System):
        class Knobs(System.Knobs):
            my_width = 64        # its knobs: one literal per line, with a comment

        @classmethod
        def build(cls, k, facts, folder, dtype, trained, as_data): ..   # -> model, tokenizer
        def forward(self, batch): ..                                    # -> dict(loss, terms)
        def predict(self, batch): ..                                    # -> dict(pred, ..)

`SYSTEMS` in model.py gives it a name. docs/fork.md adds a system step by step.
"""
import numpy as np
import torch
import torch.nn as nn

from configurator import check_declaration
from losses import NEED_A_SCORE, UNITS, RankLevels, l1, ordinal_errors, ordinal_notes
from metrics import SELECTABLE
from run.errors import ModelError
from run.load_lm import empty_lm, load_frozen_lm


class System(nn.Module):
    """ A model, and what the rest of the repository must know about it. """

    class Knobs:
        pass

    reads_text = True               # batches hold the tokens of the clips' texts
    label_kinds = ('regression',)   # kinds of labels that it can learn: 'regression', 'classes'
    no_classes = 'it predicts a score'   # the reason why it cannot learn classes, if it cannot
    frozen_lm = False               # self.lm is a FrozenLM, so shard_lm may shard it
    predicts = True                 # False: it has a loss, but does not predict a label
    text_first = False              # batches group clips by text length first, then by frame cost
    evaluates_by_frames = False     # in evaluation, batches group clips by tokens plus frame cost
    one_process = False             # it stores statistics of clips: no training under torchrun
    inherited_knobs = ()            # knobs that a prerequisite run takes from the run that needs it
    score_loss = staticmethod(l1)   # of a score and its label, where CORAL does not replace it
    units = UNITS                   # of its loss terms {name: unit}, as training prints them once

    def __init__(self):
        super().__init__()
        self.lm = None        # the FrozenLM, if any
        self.prompt = None    # the Prompt around each text, if any
        self.levels = None    # RankLevels, with CORAL

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_declaration(cls)

    # ---------------------------------------------------------------------------------------------
    # From knobs to a model

    @classmethod
    def check(cls, k):
        """
        Error sentences on knobs that contradict each other, as a list. Called before anything is
        read or trained.
        """
        errors = ordinal_errors(k) if 'weight_mpr' in k else []
        if k['max_steps'] == 0:
            errors += ["max_steps=0 trains nothing: give a number of steps, or -1 for no limit"]
        if k['select'] not in SELECTABLE:
            errors += [f"select={k['select']!r} is none of {', '.join(SELECTABLE)}"]
        elif (k['select'] == 'loss') == cls.predicts:
            errors += [f"select={k['select']!r} must be 'loss' for a system that predicts no "
                       "label, such as an LM, and a metric for the others"]
        return errors

    @classmethod
    def refuse_impossible_model(cls, k, pending):
        """
        Raises ModelError where the knobs describe no possible model. Called before prerequisites
        are trained, so it reads configurations only. pending: the knobs that name a run that is not
        trained yet.
        """

    @classmethod
    def refuse_other_label(cls, k, info):
        """
        Raises ModelError for a label that the system or its loss cannot learn. info: the label's
        entry in meta.json.
        """
        if info['kind'] not in cls.label_kinds:
            raise ModelError(f"label={k['label']!r} has classes, and system={k['system']!r} cannot "
                             f"learn them, because {cls.no_classes}: choose a label with scores.")
        ordinal = [knob for knob in NEED_A_SCORE if k.get(knob)]
        if info['kind'] == 'classes' and ordinal:
            raise ModelError(f"{ordinal[0]} compares scores, and label={k['label']!r} has classes, "
                             "which have no order: set it to 0.")

    @classmethod
    def prerequisite_knobs(cls, k):
        """ The knobs that may name a prerequisite in k['needs'], such as lm='lm_toy'. """
        return [knob for knob in ('lm',) if knob in k]

    @classmethod
    def float32_bytes(cls, k):
        """
        The size of the frozen LM in float32, from its configuration only; 0 without one. Raises
        ModelError.
        """
        if not cls.frozen_lm:
            return 0
        return 4 * sum(p.numel() for p in empty_lm(k['lm'], k['trust_remote_code']).parameters())

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        """
        The model that the knobs `k` (a dict) describe, and its tokenizer (None without text).
        Raises ModelError. A system with a frozen LM inherits this one; others define their own.

        facts: the corpus, or what a run recorded of it: widths, labels, n_clips, text(split).
        folder: the run's folder, for files that building writes.
        trained=True: the files exist already, and the weights are loaded from a checkpoint
        afterwards.
        as_data=True: an untrusted folder names the LM, so no code that comes with the LM is run.
        """
        if not cls.frozen_lm:
            raise ModelError(f"{cls.__name__} has no build: define it (docs/fork.md).")
        lm, tokenizer = load_frozen_lm(k, dtype, as_data)
        return cls.assemble(k, facts, lm, tokenizer), tokenizer

    @classmethod
    def assemble(cls, k, facts, text_model, tokenizer):
        """
        The model on a text model that is already loaded: a FrozenLM, a TextEncoder or None. build
        calls it after loading; the benchmark calls it with a random text model.
        """
        raise ModelError(f"{cls.__name__} has no assemble, which the benchmark needs: define it "
                         "(docs/fork.md).")

    def with_levels(self, info):
        """
        The system itself, with CORAL as its task loss if the knob level_step says so. info: the
        label's entry in meta.json. Raises ModelError.
        """
        if self.k['level_step']:
            self.refuse_other_label(self.k, info)
            self.levels = RankLevels(*info['range'], self.k['level_step'])
            self.units = self.units | dict(task='nats per threshold')
        return self

    # ---------------------------------------------------------------------------------------------
    # What it reads

    @classmethod
    def streams(cls, k):
        """ The streams ('audio', 'vision') that its batches hold. Other streams are empty. """
        return tuple(k['modalities'])

    @classmethod
    def modalities_read(cls, k):
        """ The modalities ('text', 'audio', 'vision') that a run with these knobs reads. """
        return (['text'] if cls.reads_text else []) + list(cls.streams(k))

    @classmethod
    def texts(cls, k, corpus, split):
        """ The texts of a split as the system reads them. """
        return corpus.text(split)

    @classmethod
    def makes_files(cls, k):
        """
        Whether building or feeding the system writes files, which several processes would write at
        once.
        """
        return False

    @classmethod
    def frozen_features(cls, k):
        """ Whether batch['text'] holds hidden states of k['lm'] for the texts, computed once. """
        return False

    @classmethod
    def needs_words(cls, k):
        """
        Whether batch['word'] must hold, for each token, the number of the word that it begins in.
        """
        return False

    @classmethod
    def refuse_other_corpus(cls, k, corpus):
        """ Raises CorpusError for a corpus whose frames the system cannot read. """

    @classmethod
    def notes(cls, k, corpus):
        """ Sentences for the start of a run about how the system reads this corpus. """
        return []

    @classmethod
    def run_notes(cls, k, labels, n_epochs):
        """
        Sentences for the start of a run about knobs that have less effect than they suggest. labels
        [N]: of the train split; n_epochs: of the run, which max_steps may end within an epoch.
        """
        notes = ordinal_notes(k, labels, n_epochs) if 'weight_mpr' in k else []
        if k['lr_min'] > k['lr']:
            notes += [f"lr_min={k['lr_min']:g} is above lr={k['lr']:g}, so the learning rate rises "
                      "after warm-up"]
        if k['warmup_epochs'] > n_epochs:
            notes += [f"warmup_epochs={k['warmup_epochs']:g} ends after the run: the learning rate "
                      f"never gets to lr={k['lr']:g}"]
        return notes

    @classmethod
    def frame_cost(cls, k, n_frames):
        """
        The cost of clips of n_frames [N] in a stream, in frames -> [N]. Clips of similar cost share
        a batch.
        """
        return np.asarray(n_frames)

    # ---------------------------------------------------------------------------------------------
    # What it does

    def forward(self, batch):
        """ dict(loss [], terms {name: []}). It must not store anything on modules. """
        raise NotImplementedError

    def predict(self, batch):
        """ dict(pred [B], prob [B,K] if it has probabilities, ..). Reads no label. """
        raise NotImplementedError

    def predicted_score(self, y):
        """ The score [B] for the output y [B] of the last layer: y itself, or CORAL's level. """
        return y if self.levels is None else self.levels.score(self.levels(y))

    def task_loss(self, y, label):
        """ The loss [] of the output y [B] of the last layer: score_loss, or CORAL's. """
        if self.levels is None:
            return self.score_loss(y, label)
        return self.levels.loss(self.levels(y), label)

    def after_step(self, batch, out):
        """ Called after each micro-batch of training: the only place for state between steps. """

    def save_for_others(self, folder):
        """
        Called after training: writes files that other runs load, beside the run's checkpoint.
        """

    def param_groups(self):
        """ Every trainable weight once: a list of dict(names, params, decay, lr_scale). """
        return weight_groups(self)

    # ---------------------------------------------------------------------------------------------
    # What reports and figures show

    def gates(self):
        """
        The gate values of each block, for the log and the figures: block -> values. None without
        gates.
        """
        return None

    def views(self, batch, predict):
        """
        The attention of one clip, for figures: name -> (weights [rows,columns], the row names or a
        title for them, a title for the columns). predict(batch) runs the model as eval does. {}
        without attention.
        """
        return {}

    def fused(self, batch, predict):
        """
        The vectors [B,D] from which the predictions of a batch are read, for t-SNE. None without
        such vectors.
        """
        return None

    @classmethod
    def readings(cls, k, predictions):
        """
        Extra rows of the report for parts of the model that predict by themselves: name of the row
        -> (key in `predictions`, bound to compare with: 'text' or 'av'). A bound is the best metric
        that is possible with these inputs; only the toy corpus knows its bounds.
        """
        return {}

    @classmethod
    def controls(cls, k):
        """
        Extra rows of the report for other calls of predict: name of the row -> (arguments of
        predict, bound to compare with).
        """
        return {}

    @classmethod
    def bound(cls, k, unread=()):
        """
        The bound with which a run's own row is compared: that of its inputs, '' if none. unread:
        modalities that reach the model without the clip's content, as another clip's streams do.
        """
        streams = {'audio', 'vision'} if k.get('shuffle_streams') else set()
        read = set(cls.modalities_read(k)) - streams - set(unread)
        bounds = {('text',): 'text', ('audio', 'vision'): 'av', ('audio', 'text', 'vision'): 'full'}
        return bounds.get(tuple(sorted(read)), '')


def checked_loss(model, out):
    """ What forward returned. Raises ModelError where it breaks the contract. """
    name = model.__class__.__name__
    if type(out) is not dict or not {'loss', 'terms'} <= set(out):
        has = ', '.join(out) if type(out) is dict else f'a {type(out).__name__}'
        raise ModelError(f"{name}.forward must return dict(loss=[], terms={{name: []}}), and it "
                         f"returned {has}: correct its return value.")
    loss = out['loss']
    if not torch.is_tensor(loss) or loss.ndim:
        kind = f'of shape {list(loss.shape)}' if torch.is_tensor(loss) else type(loss).__name__
        raise ModelError(f"{name}.forward returned a loss that is {kind}: return a tensor of "
                         "shape [].")
    return out


def checked_prediction(model, out, n_clips):
    """ What predict returned. Raises ModelError where it breaks the contract. """
    if type(out) is not dict or 'pred' not in out:
        has = ', '.join(out) if type(out) is dict else f'a {type(out).__name__}'
        raise ModelError(f"{model.__class__.__name__}.predict must return dict(pred=[B], ..), and "
                         f"it returned {has}: correct its return value.")
    for name, v in out.items():
        if not torch.is_tensor(v):
            raise ModelError(f"{model.__class__.__name__}.predict returned {name} as "
                             f"{type(v).__name__}: return tensors.")
        if v.ndim < 1 or len(v) != n_clips or name == 'pred' and v.ndim != 1:
            raise ModelError(f"{model.__class__.__name__}.predict returned {name} of shape "
                             f"{list(v.shape)} for {n_clips} clips: pred must be [{n_clips}], the "
                             f"others [{n_clips}, ..].")
    return out


def class_prediction(logits):
    """ dict(pred [B], prob [B,K]) of logits [B,K]: the most probable class. """
    pred = logits.argmax(-1).float()  # [B]
    pred = pred.where(logits.isfinite().all(-1), torch.nan)  # argmax would hide a NaN
    return dict(pred=pred, prob=logits.softmax(-1))


def weight_groups(model, lr_scales=None):
    """
    The trainable weights of a model in groups, each weight once. Matrices get weight decay; biases,
    norms, gates and learnable tokens do not. (The release of DeepMLF means to do this, but its rule
    by name never matches, so it decays all but biases.) lr_scales: first part of a weight's name ->
    factor of its learning rate; 1 for the others.
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


# --------------------------------------------------------------------------------------------------
# What System.views and System.fused read of a running model

def calls_of(module, predict, batch):
    """ The inputs of every call of a module while predict(batch) runs: a list of tuples. """
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        predict(batch)
    finally:
        handle.remove()
    return seen


def input_of(module, predict, batch):
    """ The first input of a module at its last call while predict(batch) runs. """
    return calls_of(module, predict, batch)[-1][0]


def attention_of_last_layer(encoder, predict, batch):
    """
    The attention weights of a TextEncoder's last layer for a batch of one clip, the mean over heads
    (CrossSent's Figures 5 and 6), as System.views returns them.
    """
    if not encoder.n_layers:
        return {}
    last = encoder.hf.encoder.layer[-1].attention.self
    x = input_of(last.query, predict, batch).float()  # [T,D]: the encoder skips padding
    q, key = (p(x).view(len(x), encoder.n_heads, -1).transpose(0, 1)
              for p in (last.query, last.key))  # 2x [h,T,D/h]
    weights = (q @ key.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)  # [T,T]
    return {'last layer': (weights, 'text token', 'text token')}
