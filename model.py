"""
The systems on language models, and SYSTEMS, the dict of all systems by name.

DeepMLF, MSE-Adapter and CMPTA use a frozen LM. CrossSent is in crosssent.py. The LM and the
audiovisual encoder can also be trained by themselves. Each is one class with the contract of
system.py. The baselines are in baselines/.

Axis letters of the systems (a file that gives a letter another meaning says so):
    B clips   T text tokens   S audio or video frames   F fusion tokens
    m slots of the audiovisual sequence Z   P pseudo tokens   K labels that may be answered
    N nodes of their trie   n tokens of an answer   D LM width   d adapter width   V vocabulary
    h heads   L any sequence   U unpadded text tokens of a batch

batch: tokens [B,T], text_len [B], text_mask [B,T]; audio [B,S,d_a], audio_len [B], audio_mask
[B,S]; vision ..; label [B]; index [B]; and what get_batch in data.py adds. FFW: the feed-forward
network of a Transformer layer. MM block: DeepMLF's multimodal block. mm_layers count from 1, as in
the papers: 8 is an MM block after the LM's eighth layer.
"""
import os
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import (
    CMPTA,
    AVEncoder,
    FreeTokens,
    MMBlock,
    MSEAdapter,
    augment_embeddings,
    last_step,
    masked_mean,
    recomputed,
    text_vector,
)
from baselines.all import BASELINES
from baselines.lora_lm import LoRALM
from configurator import AtLeast, Share
from crosssent import CrossSent
from lm import LMKnobs, NewModelKnobs
from losses import (
    NEED_A_SCORE,
    OrdinalKnobs,
    deepmlf_loss,
    head_loss,
    label_loss,
    lm_loss,
    ordinal_loss,
)
from prompts import Prompt, PromptKnobs, prompt_errors, prompt_name, rated_texts
from run.errors import ModelError
from run.folder import is_regular, load_checkpoint, load_tensors, save_hugging_face
from run.lm_compare import known_lm
from run.load_lm import (
    cut_to_depth,
    empty_lm,
    load_tokenizer,
    refuse_unknown_tokens,
)
from run.new_lm import new_lm
from run.texts import texts_as_read
from system import System, calls_of, input_of

# --------------------------------------------------------------------------------------------------
# The two prerequisites of DeepMLF: an LM, and an audiovisual encoder

class LanguageModel(System):
    """
    A causal LM trained from random weights on a corpus's own text. On the toy corpus it is
    the frozen LM of DeepMLF, MSE-Adapter and CMPTA.
    """

    class Knobs(NewModelKnobs):
        lm_text: Literal['plain', 'rated'] = 'plain'   # 'rated': a rating follows each text
        dropout: Share() = 0.1        # in the LM

    label_kinds = ('regression', 'classes')   # it reads no label, so any kind will do
    predicts = False
    inherited_knobs = (
        'corpus', 'data_dir', 'train_fraction', 'label', 'lowercase', 'seed', 'device', 'dtype',
        'max_steps', 'deterministic')

    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        home = os.path.join(folder, 'hf')
        # a trained run has its tokenizer already, unless the file is missing or not a regular one
        reuse = trained and (as_data or is_regular(os.path.join(home, 'tokenizer.json')))
        texts = [] if reuse else texts_as_read(facts, cls, k, 'train')
        hf, tokenizer = new_lm(texts, k, home, again=reuse, as_data=as_data)
        return cls(hf), tokenizer

    @classmethod
    def streams(cls, k):
        return ()

    @classmethod
    def texts(cls, k, corpus, split):
        return rated_texts(corpus, split) if k['lm_text'] == 'rated' else corpus.text(split)

    @classmethod
    def makes_files(cls, k):
        return True

    def forward(self, batch):
        mask = batch['text_mask'].long()
        x = self.hf.base_model(batch['tokens'], attention_mask=mask, use_cache=False)[0]  # [B,T,D]
        loss = lm_loss(x, batch, self.hf.get_output_embeddings())
        return dict(loss=loss, terms={'lm': loss})

    def save_for_others(self, folder):
        """ Saves the LM as a Hugging Face folder, which other runs load. """
        save_hugging_face(self.hf, os.path.join(folder, 'hf'))


class AVKnobs:
    av_width: AtLeast(1) = 30     # d, width of the AV encoder
    av_layers: AtLeast(1) = 3     # encoder layers per modality
    av_heads: AtLeast(1) = 6      # attention heads
    av_len: AtLeast(1) = 50       # most slots of the time line that audio and video share
    av_dropout: Share() = 0.1     # in the encoder
    av_seqaug: Share() = 0.2      # SeqAug rate on raw features (not in the paper); 0: no SeqAug


def build_av_encoder(k, widths):
    """ The audiovisual encoder that the knobs describe; widths: stream -> width. """
    return AVEncoder(widths, k['av_width'], k['av_layers'], k['av_heads'], k['av_len'],
                     k['av_dropout'], k['av_seqaug'])


class AVModel(System):
    """
    The audiovisual (AV) encoder by itself, as DeepMLF pretrains it (paper 4.6, "AV
    Initialization"): one linear head on the mean over the real slots, with an L1 loss. The release
    reads the last slot, which is mostly padding.
    """

    class Knobs(AVKnobs, OrdinalKnobs):
        pass

    reads_text = False
    inherited_knobs = (
        'corpus', 'data_dir', 'train_fraction', 'label', 'modalities', 'shuffle_streams',
        'standardise', 'seed', 'device', 'dtype', 'max_steps', 'deterministic',
        'av_width', 'av_layers', 'av_heads', 'av_len')

    def __init__(self, encoder, k):
        super().__init__()
        self.av_encoder = encoder
        self.k = k
        self.head = nn.Linear(encoder.d, 1)

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        model = cls(build_av_encoder(k, facts.widths), k)
        return model.with_levels(facts.labels[k['label']]), None

    @classmethod
    def frame_cost(cls, k, n_frames):
        return np.minimum(n_frames, k['av_len'])

    def score(self, batch):
        """ The output of the head -> [B]. """
        z, mask = self.av_encoder(batch)  # [B,m,d], [B,m]
        with torch.autocast(z.device.type, enabled=False):
            return self.head(masked_mean(z, mask))[:, 0]

    def predict(self, batch):
        return dict(pred=self.predicted_score(self.score(batch)))  # [B]

    def forward(self, batch):
        return head_loss(self.score(batch)[:, None], 'regression', self.k, batch, self.task_loss)

    def fused(self, batch, predict):
        return input_of(self.head, predict, batch)


# --------------------------------------------------------------------------------------------------
# DeepMLF

class DeepMLF(System):
    """
    DeepMLF (Georgiou et al. 2025): F learnable fusion tokens behind the text of a frozen causal LM,
    MM blocks between the LM's layers, and heads on the outputs. The paper's abstract has the LM
    "tasked to predict ground truth polarity". We read this as its section 4.5 says: heads with an
    L1 loss, and an LM loss on the text alone.

    Text never depends on the fusion tokens, because the mask is causal and they come last. So the
    LM computes two token streams: the text, and a short suffix of fusion tokens that attends to the
    text's keys and values. Below the first MM block the text depends on no trained weight, so it is
    computed there without an autograd graph. A plain forward of the concatenated sequence would
    back-propagate through all text tokens there.
    """

    class Knobs(LMKnobs, AVKnobs, OrdinalKnobs):
        av_init: Literal['tune', 'frozen', 'random'] = 'tune'  # the first two load av_from
        av_from = ''                  # run of the pretrained AV encoder: folder, or name in needs
        n_fusion: AtLeast(1) = 12     # F, learnable fusion tokens
        fusion_position: Literal['after', 'fixed'] = 'after'  # behind text, or behind max_text_len
        mm_layers = [8, 15, 22, 29, 36]  # LM layers, from 1, with an MM block behind
        mm_query: Literal['fusion', 'text+fusion', 'text'] = 'fusion'  # queries for Z (Table 10)
        mm_gate: Literal['sigmoid', 'tanh', 'none'] = 'sigmoid'  # starts at .5, 0; is 1 (Table 13)
        mm_ffw: Literal['full', 'lora', 'none'] = 'full'  # own FFW, LoRA on the LM's FFW, no FFW
        mm_ffw_init: Literal['lm', 'random'] = 'lm'  # start of the own FFW: LM's weights, random
        mm_heads: AtLeast(1) = 16     # cross-attention heads
        lora_rank: AtLeast(1) = 512   # r, rank of LoRA
        lora_alpha: AtLeast(0) = 8192.0  # the update is scaled by alpha / r
        lora_dropout: Share() = 0.05  # on the input of LoRA
        text_pool: Literal['last', 'mean'] = 'last'  # of the text in the heads: last token, or mean
        head_width: AtLeast(1) = 64   # hidden width of the task head
        dropout: Share() = 0.1        # in MM blocks
        text_reg: Literal['seqaug', 'noise', 'dropout', 'none'] = 'seqaug'  # regulariser (Table 12)
        text_reg_rate: AtLeast(0) = 0.3   # rate of SeqAug, std of the noise / rms, or p of dropout
        text_reg_prob: Share(with_one=True) = 0.25   # SeqAug: share of clips that get it
        text_reg_draw: Literal['fixed', 'beta', 'halfnormal'] = 'fixed'  # how the rate is drawn
        weight_av: AtLeast(0) = 1.0      # lambda_av, L1 of the AV head (eq. 13); task head: 1
        weight_text: AtLeast(0) = 1.0    # lambda_t, L1 of the text head
        weight_fusion: AtLeast(0) = 1.0  # lambda_f, L1 of the fusion head
        weight_lm: AtLeast(0) = 1.0      # lambda_LM, the LM loss (eq. 14)

    frozen_lm = True
    text_first = True

    def __init__(self, lm, av_encoder, k):
        """
        lm: FrozenLM; av_encoder: AVEncoder, trainable or frozen; k: the run's knobs, a dict.
        """
        super().__init__()
        self.lm, self.av_encoder, self.k = lm, av_encoder, k
        D, d, layers = lm.width, av_encoder.d, sorted(k['mm_layers'])
        repeated = len(set(layers)) < len(layers)
        if not layers or layers[0] < 1 or layers[-1] > lm.n_layers or repeated:
            raise ModelError(f"mm_layers={k['mm_layers']} must be different numbers from 1 to "
                             f"{lm.n_layers}, the layers of this LM.")
        lm.refuse_longer(k['max_text_len'] + k['n_fusion'], 'max_text_len + n_fusion')
        std = 0.02 * lm.embed_scale  # a usual start of an embedding's weights
        self.fusion_tokens = nn.Parameter(std * torch.randn(k['n_fusion'], D))  # [F,D]
        self.mm_blocks = nn.ModuleDict()
        for n in layers:
            self.mm_blocks[str(n)] = MMBlock(
                D, d, lm.norms_of_ffw(n - 1), lm.ffw(n - 1), k['mm_heads'], k['mm_query'],
                k['mm_gate'], k['mm_ffw'], k['mm_ffw_init'], k['lora_rank'], k['lora_alpha'],
                k['lora_dropout'], k['dropout'], lm.row.get('norm_offset', 0))
        self.task_head = nn.Sequential(
            nn.Linear(d + 2 * D, k['head_width']), nn.ReLU(), nn.Linear(k['head_width'], 1))
        self.av_head = nn.Linear(d, 1)
        self.text_head = nn.Linear(D, 1)
        self.fusion_head = nn.Linear(D, 1)
        # lambdas of eq. 13; a head with weight 0 is frozen, because weight decay would shrink it
        self.weights = {head: k['weight_' + head] for head in ('av', 'text', 'fusion')}
        for head, weight in self.weights.items():
            getattr(self, head + '_head').requires_grad_(weight > 0)

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if k['text_reg'] in ('seqaug', 'dropout') and k['text_reg_rate'] > 1:
            errors += [f"text_reg_rate={k['text_reg_rate']} must be in [0, 1]"]
        if k['lm_depth'] and k['weight_lm']:
            errors += ["lm_depth leaves out the LM's last layers, without which it predicts no "
                       "text: --weight_lm=0"]
        return errors

    @classmethod
    def refuse_impossible_model(cls, k, pending):
        if k['av_init'] != 'random' and not k['av_from']:
            raise ModelError(f"av_init={k['av_init']!r} needs a pretrained AV encoder: give "
                             "--av_from=FOLDER of its run, or --av_init=random.")
        if 'lm' in pending:
            return
        hf = empty_lm(k['lm'], k['trust_remote_code'])
        with torch.device('meta'):
            try:
                lm = cut_to_depth(known_lm(hf), k['lm_depth'])
                cls(lm, build_av_encoder(k | dict(av_layers=1), {'audio': 1}), k)
            except ValueError as e:
                raise ModelError(str(e)) from None

    @classmethod
    def prerequisite_knobs(cls, k):
        return ['lm'] + ['av_from'] * (k['av_init'] != 'random')

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        model, tokenizer = super().build(k, facts, folder, dtype, trained, as_data)
        if not trained and k['av_init'] != 'random':
            tensors, _ = load_checkpoint(os.path.join(k['av_from'], 'best.safetensors'))
            pretrained = {name.removeprefix('av_encoder.'): v for name, v in tensors.items()
                          if name.startswith('av_encoder.')}
            load_tensors(model.av_encoder, pretrained, k['av_from'])
        return model, tokenizer

    @classmethod
    def assemble(cls, k, facts, lm, tokenizer):
        av_encoder = build_av_encoder(k, facts.widths)
        av_encoder.requires_grad_(k['av_init'] != 'frozen')
        return cls(lm, av_encoder, k).with_levels(facts.labels[k['label']])

    @classmethod
    def frame_cost(cls, k, n_frames):
        return np.minimum(n_frames, k['av_len'])

    def train(self, mode=True):
        """
        Keeps a frozen AV encoder in eval mode, like the frozen LM (not stated in the paper).
        """
        super().train(mode)
        if not any(p.requires_grad for p in self.av_encoder.parameters()):
            self.av_encoder.eval()
        return self

    def streams_through_lm(self, batch, whole=True):
        """
        The text and the fusion tokens through the LM -> x_t [B,T,D] and x_f [B,F,D] after the final
        norm, the AV encoder's z [B,m,d] and its mask [B,m]. With whole=False, where no
        other text token is needed, the last layer computes only the last real one: x_t [B,1,D].
        """
        k, lm, (B, T) = self.k, self.lm, batch['tokens'].shape
        n_f, device, text_len = k['n_fusion'], batch['tokens'].device, batch['text_len']
        whole = whole or k['text_pool'] == 'mean'
        z, z_mask = self.av_encoder(batch)  # [B,m,d], [B,m]

        x_t = lm.embed(batch['tokens'])  # [B,T,D]
        if self.training:
            x_t = augment_embeddings(x_t, text_len, k['text_reg'], k['text_reg_rate'],
                                     k['text_reg_prob'], k['text_reg_draw'])  # [B,T,D]
        x_t, rope_t = lm.place(x_t, torch.arange(T, device=device).expand(B, T))
        # first position of the fusion tokens [B]; 'fixed' is the release's
        start = text_len if k['fusion_position'] == 'after' else text_len * 0 + k['max_text_len']
        x_f = self.fusion_tokens.to(x_t.dtype).expand(B, n_f, -1)  # [B,F,D]
        x_f, rope_f = lm.place(x_f, start[:, None] + torch.arange(n_f, device=device))
        causal = torch.ones(n_f, n_f, dtype=torch.bool, device=device).tril()  # [F,F]
        sees_text = batch['text_mask'][:, None].expand(B, n_f, T)  # [B,F,T]
        mask = torch.cat([sees_text, causal.expand(B, n_f, n_f)], -1)[:, None]  # [B,1,F,T+F]

        first, graph = min(map(int, self.mm_blocks)), torch.is_grad_enabled()
        for l in range(lm.n_layers):
            with torch.set_grad_enabled(graph and l >= first):
                if whole or l < lm.n_layers - 1:
                    x_t, text_kv = lm.block(l, x_t, rope_t)  # [B,T,D]
                else:
                    x_t, text_kv = self.last_token_only(l, x_t, rope_t, batch)  # [B,1,D]
            x_f, _ = lm.block(l, x_f, rope_f, past=text_kv, mask=mask)  # [B,F,D]
            if str(l + 1) in self.mm_blocks:
                x_t, x_f = self.mm_blocks[str(l + 1)](x_t, x_f, z, z_mask, lm.ffw(l))
        return lm.final_norm(x_t), lm.final_norm(x_f), z, z_mask

    def last_token_only(self, l, x, rope, batch):
        """
        LM layer l for the last real token of x [B,T,D] -> [B,1,D], and (k, v) of all tokens.
        """
        text_len = batch['text_len']
        q, k, v = self.lm.qkv(l, x, rope)  # [B,h,T,D/h], 2x [B,h_kv,T,D/h]
        q = last_step(q.transpose(1, 2), text_len)[:, :, None]  # [B,h,1,D/h]
        sees = batch['text_mask'][:, None, None]  # [B,1,1,T]
        return self.lm.finish(l, last_step(x, text_len)[:, None], q, k, v, sees), (k, v)

    def heads(self, x_t, x_f, z, z_mask, batch):
        """
        The task head (eq. 12) and the three modality heads -> dict of [B]. In float32, because bf16
        would round predictions to 1/128.
        """
        with torch.autocast(z.device.type, enabled=False):
            z_mean = masked_mean(z, z_mask)  # [B,d]
            x_text = text_vector(x_t.float(), batch['text_mask'], self.k['text_pool'])  # [B,D]
            x_mean = x_f.float().mean(1)  # [B,D]
            out = dict(pred=self.task_head(torch.cat([z_mean, x_text, x_mean], -1)))  # [B,1] each
            for head, x in (('av', z_mean), ('text', x_text), ('fusion', x_mean)):
                if self.weights[head]:  # without a loss the head is untrained
                    out[head] = getattr(self, head + '_head')(x)
            return {name: y[:, 0] for name, y in out.items()}  # [B] each

    def predict(self, batch):
        """
        pred: the task head; text, av, fusion: the modality heads; all [B]. The text head reads
        audio and video only if mm_query includes the text. No logits over the vocabulary are
        computed.
        """
        whole = 'text' in self.k['mm_query']  # figures need all text tokens of the last layer
        out = self.heads(*self.streams_through_lm(batch, whole), batch)
        return out | dict(pred=self.predicted_score(out['pred']))

    def forward(self, batch):
        """
        The loss of eqs. 13-14. With mm_query='fusion' the text does not depend on audio and video,
        so the LM loss trains only the FFW, norm_2 and second gate of the MM blocks.
        """
        k = self.k
        x_t, x_f, z, z_mask = self.streams_through_lm(batch, whole=k['weight_lm'] > 0)
        out = self.heads(x_t, x_f, z, z_mask, batch)
        terms, loss = deepmlf_loss(out, batch['label'], self.weights, self.task_loss)
        ordinal_terms, ordinal = ordinal_loss(out['pred'], batch['label'], k, batch)
        terms, loss = terms | ordinal_terms, loss + ordinal
        if k['weight_lm']:
            terms['lm'] = lm_loss(x_t, batch, self.lm.lm_head)
            loss = loss + k['weight_lm'] * terms['lm']
        return dict(loss=loss, terms=terms)

    def gates(self):
        """ layer -> (gate of the cross-attention, gate of the FFW). """
        gates = {}
        for n, block in self.mm_blocks.items():
            gates[n] = [round(float(torch.as_tensor(g).detach()), 4) for g in block.gates()]
        return gates

    def views(self, batch, predict):
        """
        The attention of each MM block to the slots of Z, the mean over heads: rows are fusion
        tokens, or text tokens if mm_query is 'text'.
        """
        row = 'fusion token' if 'fusion' in self.k['mm_query'] else 'text token'
        views = {}
        for n, block in self.mm_blocks.items():
            x, z, mask = calls_of(block.gca, predict, batch)[0]
            weights = block.gca.weights(x.float(), z.float(), mask)[0].mean(0)  # [L,m]
            views[f'layer {n}'] = weights, row, "audiovisual slot, from the clip's start to its end"
        return views

    def fused(self, batch, predict):
        return input_of(self.task_head, predict, batch)

    @classmethod
    def readings(cls, k, predictions):
        rows = {}
        if 'text' in predictions and k['mm_query'] == 'fusion':
            rows['text only (y_t)'] = 'text', 'text'
        streams = [dict(vision='video').get(m, m) for m in cls.streams(k)]
        if 'av' in predictions and streams and not k['shuffle_streams']:
            bound = 'av' if len(streams) == 2 else ''
            rows[f"{'+'.join(streams)} only (y_av)"] = 'av', bound
        return rows


# --------------------------------------------------------------------------------------------------
# Pseudo tokens: MSE-Adapter and CMPTA

class PseudoTokenKnobs(LMKnobs, PromptKnobs, OrdinalKnobs):
    n_pseudo: AtLeast(1) = 4      # P, pseudo tokens
    readout: Literal['score', 'generate', 'head'] = 'score'  # how the answer is read
    score_estimate: Literal['expected', 'mode', 'median'] = 'expected'  # of the label probabilities
    score_over: Literal['vocabulary', 'labels'] = 'vocabulary'  # tokens that compete, in reading
    head_width: AtLeast(1) = 64   # hidden width of the head of readout='head'
    checkpoint_lm = False         # recompute the LM's layers in the backward pass, to save memory
    clip_words = True             # False: one end-of-text token for the clip's words (ablation)


class PseudoTokenLM(System):
    """
    An adapter turns text, audio and video into P pseudo tokens. They stand before the text in a
    prompt, and the frozen LM answers with the label. A subclass defines `make_adapter` and the
    knobs of its adapter.

    Behind the prompt stand the tokens whose outputs are read: in training, the tokens of the label;
    for readout='score', every node of the label trie (Prompt.trie), so that one pass gives the
    probability of every label; for readout='head', a learned query. Logits are computed for these
    tokens only. Prompts have different lengths: they are padded on the right, and no real token
    attends to padding.
    """

    class Knobs(PseudoTokenKnobs):
        pass

    label_kinds = ('regression', 'classes')
    frozen_lm = True
    text_first = True

    def __init__(self, lm, prompt, k, widths):
        """ lm: FrozenLM; prompt: Prompt; k: the knobs, a dict; widths: stream -> width. """
        super().__init__()
        self.lm, self.prompt, self.k = lm, prompt, k
        self.adapter = self.make_adapter(k, widths, lm.width, lm.embed_rms())
        longest = prompt.longest() + k['n_pseudo'] + k['max_text_len']
        lm.refuse_longer(longest, 'prompt, pseudo tokens, max_text_len and label')
        self.refuse_unknown_tokens()
        for name, tensor in prompt.trie().items():
            self.register_buffer('trie_' + name, tensor, persistent=False)
        values = torch.tensor(prompt.values or range(len(prompt.labels)), dtype=torch.float32)
        self.register_buffer('values', values, persistent=False)  # [K]
        if k['readout'] == 'head':
            n_out = 1 if prompt.kind == 'regression' else len(prompt.labels)
            std = 0.02 * lm.embed_scale  # a usual start of an embedding's weights
            self.query_tokens = nn.Parameter(std * torch.randn(1, lm.width))  # [1,D]
            self.head = nn.Sequential(
                nn.Linear(lm.width, k['head_width']), nn.ReLU(), nn.Linear(k['head_width'], n_out))

    @classmethod
    def texts(cls, k, corpus, split):
        texts = corpus.text(split)
        return texts if k['clip_words'] else [''] * len(texts)

    @classmethod
    def make_adapter(cls, k, widths, D, embed_rms):
        """
        The adapter: a module with forward(batch, text [B,T,D], text_mask [B,T]) -> pseudo tokens
        [B,P,D]. widths: stream -> width; D: the LM's width; embed_rms: the root mean square of the
        LM's embeddings.
        """
        raise ModelError(f"{cls.__name__} has no make_adapter: define it (docs/fork.md).")

    @classmethod
    def check(cls, k):
        errors = super().check(k) + prompt_errors(k)
        used = [knob for knob in NEED_A_SCORE if k[knob]]
        if used and k['readout'] != 'head':
            errors += [f"{used[0]} needs a score that a head predicts: --readout=head"]
        if k['lm_depth'] and k['readout'] != 'head':
            errors += ["lm_depth leaves out the LM's last layers, without which it says no label: "
                       "--readout=head"]
        return errors

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        # refuse ambiguous labels before the LM is loaded, which may take gigabytes
        Prompt(k, facts.labels[k['label']],
               load_tokenizer(k['lm'], k['trust_remote_code'], as_data))
        return super().build(k, facts, folder, dtype, trained, as_data)

    @classmethod
    def assemble(cls, k, facts, lm, tokenizer):
        info = facts.labels[k['label']]
        return cls(lm, Prompt(k, info, tokenizer), k, facts.widths).with_levels(info)

    def refuse_unknown_tokens(self):
        """
        Raises ModelError where the LM has no embedding for a token of the prompt or a label.
        """
        prompt, rows = self.prompt, len(self.lm.parts['embed'].weight)
        around = [prompt.before, prompt.after]
        refuse_unknown_tokens(around, rows, prompt_name(self.k['prompt']))
        refuse_unknown_tokens(prompt.answers, rows, f"the labels of {self.k['label']!r}")

    def embed_prompt(self, batch, adapter=True):
        """
        The embedded prompt: x [B,T,D] and prompt_len [B], its real tokens. adapter=False leaves
        the pseudo tokens out. Raises ModelError where the adapter returns another shape than
        [B,P,D].
        """
        first, P = len(self.prompt.before), self.k['n_pseudo']
        x, prompt_len = self.lm.embed(batch['tokens']), batch['text_len']  # [B,T,D], [B]
        if not adapter:
            return torch.cat([x[:, :first], x[:, first + P:]], 1), prompt_len - P
        pseudo = self.pseudo_tokens(batch, x)  # [B,P,D]
        wanted = (len(x), P, x.shape[2])
        if tuple(pseudo.shape) != wanted:
            raise ModelError(f"the adapter returned pseudo tokens of shape {list(pseudo.shape)}, "
                             f"and the prompt takes {list(wanted)}, [clips, n_pseudo, width of the "
                             "LM]: correct the adapter, or set n_pseudo to its number of tokens.")
        return torch.cat([x[:, :first], pseudo.to(x.dtype), x[:, first + P:]], 1), prompt_len

    def pseudo_tokens(self, batch, x):
        """ The adapter's pseudo tokens [B,P,D] for an embedded prompt x [B,T,D], in float32. """
        with torch.autocast(x.device.type, enabled=False):
            return self.adapter(batch, *self.own_text(x, batch['text_len']))  # [B,P,D]

    def own_text(self, x, prompt_len):
        """
        The clip's own text within an embedded prompt x [B,T,D] of prompt_len [B] tokens -> text
        [B,L,D] in float32, mask [B,L]; L is at most max_text_len.
        """
        first, size = len(self.prompt.before) + self.k['n_pseudo'], self.k['max_text_len']
        text = x[:, first:first + size].float()  # [B,L,D]
        own_len = self.own_len(prompt_len)[:, None]  # [B,1]
        return text, torch.arange(text.shape[1], device=x.device) < own_len

    def own_len(self, prompt_len):
        """ Number of tokens of the clip's own text within a prompt of prompt_len tokens. """
        return prompt_len - len(self.prompt.before) - self.k['n_pseudo'] - len(self.prompt.after)

    def hidden_behind_prompt(self, x, prompt_len, y, depth, sees):
        """
        The LM's hidden states, after the final norm, of tokens that stand behind a prompt ->
        [B,N,D]. x [B,T,D]: the embedded prompt, of prompt_len [B] real tokens. y [B,N,D]: the
        embedded tokens, of which the first repeats the prompt's last token. depth [N]: their
        distance from that token. sees [N,N]: which of them attends to which.
        """
        lm, (B, T, _), N = self.lm, x.shape, y.shape[1]
        t = torch.arange(T - 1, device=x.device)  # [T-1]
        causal = F.pad(t <= t[:, None], (0, N)).expand(B, T - 1, T - 1 + N)  # for the prompt
        last = prompt_len[:, None] - 1  # [B,1], place of the prompt's last token
        real = (t < last)[:, None].expand(B, N, T - 1)
        behind = torch.cat([real, sees.expand(B, N, N)], -1)  # [B,N,T-1+N]
        mask = torch.cat([causal, behind], 1)[:, None]  # [B,1,T-1+N,T-1+N]
        positions = torch.cat([t.expand(B, T - 1), last + depth], 1)  # [B,T-1+N]
        z, rope = lm.place(torch.cat([x[:, :-1], y], 1), positions)  # [B,T-1+N,D]

        def block(l, z):
            return lm.block(l, z, rope, mask=mask)[0]

        for l in range(lm.n_layers - 1):
            z = recomputed(self.k['checkpoint_lm'], block, l, z)  # [B,T-1+N,D]
        # the last layer needs only keys and values of the prompt
        q, k, v = lm.qkv(lm.n_layers - 1, z, rope)
        z = lm.finish(lm.n_layers - 1, z[:, -N:], q[:, :, -N:], k, v, mask[:, :, -N:])  # [B,N,D]
        return lm.final_norm(z)

    def label_scores(self, x, prompt_len):
        """
        The log-probability of every label string, by one pass over the label trie -> [B,K]. With
        score_over='vocabulary' it is exact to the LM's dtype. With 'labels' each token competes
        with the tokens that continue a label at its place, as in constrained decoding. Then no
        logits of the whole vocabulary are computed.
        """
        y = self.lm.embed(self.trie_token).expand(len(x), -1, -1)  # [B,N,D]
        h = self.hidden_behind_prompt(x, prompt_len, y, self.trie_depth, self.trie_sees)  # [B,N,D]
        if self.k['score_over'] == 'labels':
            log_p = self.log_p_over_labels(h)  # [B,K,n]
        else:
            log_p = self.log_p_over_vocabulary(h)  # [B,K,n]
        return torch.where(self.trie_real, log_p, 0.0).sum(-1)  # [B,K]

    def log_p_over_vocabulary(self, h):
        """ Log-probability of each token of each label, h [B,N,D] -> [B,K,n]. """
        N = h.shape[1]
        # clips at once: those of 16 MB of logits, or of about 128 rows, for which the head's weights
        # are read, where that is more
        at_once = max(2 ** 22 // (N * self.lm.vocabulary), 128 // N, 1)
        pieces = []
        for part in h.split(at_once):
            logits = self.lm.lm_head(part).float()  # [b,N,V]
            total = logits.logsumexp(-1)[:, self.trie_node]  # [b,K,n]
            pieces.append(logits[:, self.trie_node, self.trie_answer] - total)  # [b,K,n]
        return torch.cat(pieces)  # [B,K,n]

    def log_p_over_labels(self, h):
        """ As log_p_over_vocabulary, among the tokens that continue a label alone. """
        tokens, column = self.trie_answer.unique(return_inverse=True)  # [C], [K,n]
        allowed = torch.zeros(h.shape[1], len(tokens), dtype=torch.bool, device=h.device)  # [N,C]
        allowed[self.trie_node[self.trie_real], column[self.trie_real]] = True
        logits = self.lm.logits_of(h, tokens).float()  # [B,N,C]
        logits = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)  # [B,N,C]
        return logits[:, self.trie_node, column]  # [B,K,n]

    def head_out(self, x, prompt_len):
        """ The head's output for a learned query behind the prompt -> [B,1] or [B,K]. """
        y = torch.cat([self.lm.embed(self.trie_token[:1]), self.query_tokens.to(x.dtype)])  # [2,D]
        depth = torch.arange(2, device=x.device)
        causal = depth[:, None] >= depth  # [2,2]
        y = y.expand(len(x), -1, -1)  # [B,2,D]
        h = self.hidden_behind_prompt(x, prompt_len, y, depth, causal)[:, 1]  # [B,D]
        with torch.autocast(x.device.type, enabled=False):
            return self.head(h.float())

    def generated(self, x, prompt_len):
        """
        The labels parsed from greedily decoded answers: dict(pred [B], unread [B]), where unread is
        1 for an answer that is no label. Both are on the CPU, because text is parsed there.
        """
        token = self.trie_token[:1].expand(len(x))  # [B]
        n_new = self.trie_answer.shape[1]
        answers = self.lm.go_on(x[:, :-1], prompt_len - 1, token, n_new)  # [B,n]
        # for an answer that is no label: no class, or the middle of the range
        default = -1.0 if self.prompt.kind == 'classes' else float(self.values[[0, -1]].mean())
        pred, unread = [], []
        for ids in answers.tolist():
            # -1: the logits were NaN
            label = float('nan') if -1 in ids else self.prompt.parse_answer(ids)
            pred.append(default if label is None else float(label))
            unread.append(float(label is None))
        return dict(pred=torch.tensor(pred), unread=torch.tensor(unread))

    def predict(self, batch, adapter=True):
        """
        pred [B]: a score or a class number.
        prob [B,K]: probabilities of the labels, normalised to sum to 1; for readout='score', and
        for classes from a head.
        unread [B]: for readout='generate', 1 where the answer is no label. Such a clip is scored as
        the middle of the range, or as no class.
        adapter=False leaves the pseudo tokens out, so the LM reads the text only.
        """
        k, (x, prompt_len) = self.k, self.embed_prompt(batch, adapter)
        if k['readout'] == 'generate':
            return self.generated(x, prompt_len)
        if k['readout'] == 'head' and self.prompt.kind == 'regression':
            return dict(pred=self.predicted_score(self.head_out(x, prompt_len)[:, 0]))
        answers = self.head_out if k['readout'] == 'head' else self.label_scores
        scores = answers(x, prompt_len)  # [B,K]
        prob = scores.softmax(-1)  # [B,K]
        if self.prompt.kind == 'classes' or k['score_estimate'] == 'mode':
            pred = self.values[prob.argmax(-1)]  # [B]
        elif k['score_estimate'] == 'expected':
            pred = (prob * self.values).sum(-1)  # [B]; autocast would round a matmul
        else:  # the median; on the CPU, because cumsum on CUDA is not deterministic
            index = (prob.cpu().cumsum(-1) < 0.5).sum(-1)  # [B]
            pred = self.values[index.clamp(max=len(self.values) - 1)]
        pred = pred.where(scores.isfinite().all(-1), torch.nan)  # argmax would hide a NaN
        return dict(pred=pred, prob=prob)

    def forward(self, batch):
        """
        The loss: cross-entropy of the label's tokens; with readout='head', L1 or CORAL of a score or
        cross-entropy of the classes.
        """
        x, prompt_len = self.embed_prompt(batch)
        if self.k['readout'] == 'head':
            out = self.head_out(x, prompt_len)  # [B,1] or [B,K]
            return head_loss(out, self.prompt.kind, self.k, batch, self.task_loss)
        label = self.prompt.index(batch['label'])  # [B]
        answer, real = self.trie_answer[label], self.trie_real[label]  # [B,n], [B,n]
        depth = torch.arange(answer.shape[1], device=x.device)
        y = torch.cat([self.trie_token[:1].expand(len(x), 1), answer[:, :-1]], 1)  # [B,n]
        causal = depth[:, None] >= depth  # [n,n]
        h = self.hidden_behind_prompt(x, prompt_len, self.lm.embed(y), depth, causal)  # [B,n,D]
        loss = label_loss(h, answer, real, self.lm.lm_head, batch.get('lm_weight', 1.0))
        return dict(loss=loss, terms={'label': loss})

    @classmethod
    def bound(cls, k, unread=()):
        return super().bound(k, unread if k['clip_words'] else (*unread, 'text'))

    @classmethod
    def controls(cls, k):
        if k['readout'] == 'head' or not k['clip_words']:
            return {}
        return {'the LM alone (text)': (dict(adapter=False), cls.bound(k, unread=['audio', 'vision']))}

    def fused(self, batch, predict):
        if self.k['readout'] == 'head':
            return input_of(self.head, predict, batch)
        return self.pseudo_tokens(batch, self.lm.embed(batch['tokens'])).flatten(1)  # [B,P D]


class PromptTuning(PseudoTokenLM):
    """
    Prompt tuning (Lester et al. 2021), the control of pseudo tokens: P free vectors in their place,
    which see no clip. So the LM reads the text alone.
    """

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if not k['clip_words']:
            errors += ["clip_words=False leaves prompt tuning nothing of a clip to read: "
                       "--clip_words=True"]
        return errors

    @classmethod
    def streams(cls, k):
        return ()

    @classmethod
    def make_adapter(cls, k, widths, D, embed_rms):
        return FreeTokens(k['n_pseudo'], D, embed_rms)

    def fused(self, batch, predict):
        return super().fused(batch, predict) if self.k['readout'] == 'head' else None


class MSEAdapterLM(PseudoTokenLM):
    """ MSE-Adapter: Text-Guide-Mixer and Multi-Scale-Fusion make the pseudo tokens. """

    class Knobs(PseudoTokenKnobs):
        mse_width: AtLeast(1) = 256   # d, width of the adapter
        lstm_audio: AtLeast(1) = 64   # hidden width of the LSTM over audio
        lstm_vision: AtLeast(1) = 32  # hidden width of the LSTM over video
        msf_scales: AtLeast(1) = [8, 32, 16]  # bottleneck widths: the LM's width divided by each
        mse_tgm = True                # Text-Guide-Mixer: multiply by the text; False: add it
        mse_msf = True                # Multi-Scale-Fusion; False: left out
        tgm_pool: Literal['real', 'padded'] = 'real'  # tokens in the mean text embedding
        pseudo_projection: Literal['released', 'full'] = 'released'  # rank 2, or full rank

    @classmethod
    def check(cls, k):
        errors = super().check(k)
        if not k['msf_scales']:
            errors += ["msf_scales=[] must be numbers of at least 1"]
        return errors

    @classmethod
    def make_adapter(cls, k, widths, D, embed_rms):
        lstm_widths = dict(audio=k['lstm_audio'], vision=k['lstm_vision'])
        return MSEAdapter(widths, D, k['n_pseudo'], k['mse_width'], lstm_widths, k['msf_scales'],
                          k['pseudo_projection'], embed_rms, k['mse_tgm'], k['mse_msf'])

    def refuse_unknown_tokens(self):
        super().refuse_unknown_tokens()
        if self.k['tgm_pool'] == 'padded':
            rows = len(self.lm.parts['embed'].weight)
            padding = "the padding that tgm_pool='padded' counts"
            refuse_unknown_tokens([[self.prompt.pad_id]], rows, padding)

    def own_text(self, x, prompt_len):
        """
        As PseudoTokenLM.own_text. With tgm_pool='padded', as in the release, padding up to
        max_text_len counts as text: the mask is True everywhere.
        """
        text, mask = super().own_text(x, prompt_len)  # [B,T,D], [B,T]
        if self.k['tgm_pool'] == 'real':
            return text, mask
        pad_id = torch.full((1, 1), self.prompt.pad_id, device=x.device)  # [1,1]
        pad = self.lm.embed(pad_id).float()  # [1,1,D]
        n_more = self.k['max_text_len'] - text.shape[1]
        text = text.where(mask[..., None], pad)  # [B,T,D]
        text = torch.cat([text, pad.expand(len(x), n_more, -1)], 1)  # [B,max_text_len,D]
        return text, torch.ones_like(text[..., 0], dtype=torch.bool)


class CMPTALM(PseudoTokenLM):
    """ CMPTA: BiLSTM alignment and six directed cross-attentions make six pseudo tokens. """

    evaluates_by_frames = True   # its LSTMs and attention over frames take most of an evaluation

    class Knobs(PseudoTokenKnobs):
        cmpta_width: AtLeast(1) = 1024   # d, width of the adapter
        cmpta_heads: AtLeast(1) = 8      # attention heads (not legible in the paper's scan)
        cmpta_layers: AtLeast(1) = 1     # Transformer layers over the six tokens (not legible)
        cmpta_pool: Literal['mean', 'last', 'learned'] = 'mean'  # of steps to a token (not legible)
        cmpta_align: Literal['bi', 'one-way', 'off'] = 'bi'  # LSTM of the alignment (Tables 5, 6)
        cmpta_align_text = True          # align the text too (the paper can be read both ways)
        cmpta_attend = True              # False: no CMPT adapter, a token is its pooled modality
        dropout: Share() = 0.1           # in the adapter
        checkpoint_adapter = False       # recompute LSTMs and attention in the backward pass

    @classmethod
    def make_adapter(cls, k, widths, D, embed_rms):
        return CMPTA(widths, D, k['n_pseudo'], k['cmpta_width'], k['cmpta_heads'],
                     k['cmpta_layers'], k['cmpta_align'], k['cmpta_align_text'], k['cmpta_attend'],
                     k['cmpta_pool'], k['dropout'], k['checkpoint_adapter'])

    def attention(self, batch):
        """ name, such as 'text_from_vision' -> attention weights [B,S] over frames, [B,T] over text. """
        with torch.autocast(batch['tokens'].device.type, enabled=False):
            x = self.lm.embed(batch['tokens'])  # [B,T,D]
            return self.adapter.attention(batch, *self.own_text(x, batch['text_len']))

    def views(self, batch, predict):
        """
        For text, audio and video: the weights of their steps in the tokens of the other modalities.
        """
        if not self.k['cmpta_attend']:
            return {}
        pairs, views = self.attention(batch), {}   # name -> [B,S] or [B,T]
        for source in ('text', 'audio', 'vision'):
            weights = {name.split('_from_')[0]: w[0] for name, w in pairs.items()
                       if name.endswith('from_' + source)}
            n = int(batch[source + '_len'][0])
            n = self.own_len(n) if source == 'text' else n
            column = 'text token' if source == 'text' else f'{source} frame'
            if weights and n:
                stacked = torch.stack(list(weights.values()))[:, :n]  # [rows,n]
                views[f'over {source}'] = stacked, list(weights), column
        return views


# --------------------------------------------------------------------------------------------------
# All systems, by the name that the knob `system` takes

SYSTEMS = dict(
    lm=LanguageModel, av=AVModel, deepmlf=DeepMLF, mse=MSEAdapterLM, cmpta=CMPTALM,
    prompt_tuning=PromptTuning, crosssent=CrossSent, lora_lm=LoRALM,
    **BASELINES)
