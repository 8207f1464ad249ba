"""
The systems on language models, and how one is found by its name.

DeepMLF, MSE-Adapter and CMPTA stand on a frozen LM, CrossSent on a fine-tuned encoder; the LM and
the audiovisual encoder can be trained by themselves. Each is one class of the contract in
system.py. The systems that they are compared with are in baselines.py. SYSTEMS, at the end, names
them all.

Axis letters, the same in every file:
    B clips   T text tokens   S audio or video frames   F fusion tokens   m slots of the audiovisual sequence Z
    P pseudo tokens   K labels that may be answered   N nodes of their trie   n tokens of an answer
    D LM width   d adapter width   V vocabulary   h heads   L any sequence

batch: tokens [B,T], text_len [B], text_mask [B,T]; audio [B,S,d_a], audio_len [B]; vision ..; label
[B]; index [B]. mm_layers count from 1, as the papers print them: 8 means "an MM block after the
LM's eighth layer".
"""
import os
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adapters import (
    CMPTA,
    GMRA,
    AVEncoder,
    MMBlock,
    MSEAdapter,
    frames_on_tokens,
    inputs_of,
    masked_mean,
    regularise,
    sentence,
)
from baselines import BASELINES
from configurator import AtLeast, Share
from data import texts_as_read
from lm import (
    EncoderKnobs,
    LMKnobs,
    ModelError,
    NewModelKnobs,
    attention_of_last_layer,
)
from losses import OrdinalKnobs, deepmlf_loss, l1, label_loss, lm_loss, mse, ordinal_loss
from prompts import Prompt, PromptKnobs, rated
from run.folder import is_regular, load_checkpoint, load_tensors, make_plain_folder
from run.lm_compare import known_lm
from run.load_lm import empty_lm, load_lm, load_tokenizer, refuse_unknown_tokens, specials
from run.new_lm import load_text_encoder, new_lm
from system import System, grouped

# ---------------------------------------------------------------------------------------------------------
# The two steps before DeepMLF: an LM, and an audiovisual encoder

class LanguageModel(System):
    """
    A causal LM trained from nothing on a corpus's own text: step one of the curriculum on the toy
    corpus.
    """

    class Knobs(NewModelKnobs):
        lm_text: Literal['plain', 'rated'] = 'plain'   # 'rated': with scores behind each text
        dropout: Share() = 0.1        # in the LM

    label_kinds = ('regression', 'classes')   # it reads no label
    predicts = False
    passes_on = ('corpus', 'data_dir', 'train_fraction', 'lowercase', 'seed', 'device', 'dtype', 'max_steps',
                 'deterministic')

    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        home = os.path.join(folder, 'hf')
        # a run that goes on makes its tokenizer again where the file is gone or is none of its own
        again = trained and (as_data or is_regular(os.path.join(home, 'tokenizer.json')))
        texts = [] if again else texts_as_read(facts, cls, k, 'train')
        hf, tokenizer = new_lm(texts, k, home, again=again, as_data=as_data)
        return cls(hf), tokenizer

    @classmethod
    def stands_on(cls, k):
        return []

    @classmethod
    def streams(cls, k):
        return ()

    @classmethod
    def texts(cls, k, corpus, split):
        return rated(corpus, split) if k['lm_text'] == 'rated' else corpus.text(split)

    @classmethod
    def makes_files(cls, k):
        return True

    def forward(self, batch):
        mask = batch['text_mask'].long()
        x = self.hf.base_model(batch['tokens'], attention_mask=mask, use_cache=False)[0]  # [B,T,D]
        loss = lm_loss(x, batch, self.hf.get_output_embeddings())
        return dict(loss=loss, terms={'lm': loss})

    def save_for_others(self, folder):
        """ The LM as a Hugging Face folder, which other runs load. """
        make_plain_folder(os.path.join(folder, 'hf'))
        self.hf.save_pretrained(os.path.join(folder, 'hf'))


class AVKnobs:
    av_width: AtLeast(1) = 30     # d
    av_layers: AtLeast(1) = 3     # encoder layers a modality
    av_heads: AtLeast(1) = 6      # attention heads
    av_len: AtLeast(1) = 50       # slots at most of the common audiovisual time line
    av_dropout: Share() = 0.1     # in the encoder
    av_seqaug: Share() = 0.2      # SeqAug rate on raw features (released, not in the paper); 0 is off


def build_av_encoder(k, widths):
    """ The audiovisual encoder that the knobs describe; widths: stream -> width. """
    return AVEncoder(widths, k['av_width'], k['av_layers'], k['av_heads'], k['av_len'],
                     k['av_dropout'], k['av_seqaug'])


class AVModel(System):
    """
    The AV encoder by itself: its isolated pretraining (paper 4.6, "AV Initialization"). One linear
    head on the mean over real slots; the release reads the last slot, which is mostly padding.
    Loss: L1.
    """

    class Knobs(AVKnobs, OrdinalKnobs):
        pass

    reads_text = False
    passes_on = (
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
        return cls(build_av_encoder(k, facts.widths), k), None

    @classmethod
    def frame_cost(cls, k, n_frames):
        return np.minimum(n_frames, k['av_len'])

    def predict(self, batch):
        z, mask = self.av_encoder(batch)  # [B,m,d], [B,m]
        with torch.autocast(z.device.type, enabled=False):
            return dict(pred=self.head(masked_mean(z, mask))[:, 0])  # [B]

    def forward(self, batch):
        pred = self.predict(batch)['pred']  # [B]
        task = l1(pred, batch['label'])
        more, extra = ordinal_loss(pred, batch['label'], self.k, batch)
        return dict(loss=task + extra, terms={'task': task} | more)

    def fused(self, batch, predict):
        return inputs_of(self.head, predict, batch)


# ---------------------------------------------------------------------------------------------------------
# DeepMLF

def float32_bytes_of_lm(k):
    """
    The size of the LM that the knobs name, in float32, from its configuration alone. Raises
    ModelError.
    """
    return 4 * sum(p.numel() for p in empty_lm(k['lm'], k['trust_remote_code']).parameters())


def last_real(x, n):
    """
    The last of n [B] real tokens of x [B,T,..] -> [B,1,..]; where x holds one token, that token.
    """
    return x[torch.arange(len(x), device=x.device), (n - 1).clamp(max=x.shape[1] - 1)][:, None]


class DeepMLF(System):
    """
    DeepMLF (Georgiou et al. 2025): F learnable fusion tokens after the text of a frozen causal LM,
    MM blocks between the LM's layers, a head on what came out of each stream.

    Text never depends on the fusion tokens: the mask is causal and they come last. So there are two
    streams: text, and a short suffix of fusion tokens that looks back at the text's keys and
    values. Below the first MM block nothing trainable has touched the text, so that part runs
    without a graph: this is where the time goes that a plain concatenated forward would spend on
    back-propagating through 50 text tokens.
    """

    class Knobs(LMKnobs, AVKnobs, OrdinalKnobs):
        av_init: Literal['tune', 'frozen', 'random'] = 'tune'   # 'tune' and 'frozen' start from av_from
        av_from = ''                  # the run that pretrained the AV encoder: a folder, or the name of a run in needs
        n_fusion: AtLeast(1) = 12     # F, learnable fusion tokens
        fusion_position: Literal['after', 'fixed'] = 'after'   # behind the last token, or max_text_len
        mm_layers = [8, 15, 22, 29, 36]  # LM layers, from 1, that an MM block follows
        mm_query: Literal['fusion', 'text+fusion', 'text'] = 'fusion'   # who sees Z (Table 10)
        mm_gate: Literal['sigmoid', 'tanh', 'none'] = 'sigmoid'   # starts at .5, 0, or none (Table 13)
        mm_ffw: Literal['full', 'lora', 'none'] = 'full'   # a full copy, LoRA on the LM's, none
        mm_ffw_init: Literal['lm', 'random'] = 'lm'   # where the full copy starts
        mm_heads: AtLeast(1) = 16     # cross-attention heads
        lora_rank: AtLeast(1) = 512   # r
        lora_alpha: AtLeast(0) = 8192.0  # the update is scaled by alpha / r
        lora_dropout: Share() = 0.05  # on the input of the update
        head_width: AtLeast(1) = 64   # hidden width of the task head
        dropout: Share() = 0.1        # in MM blocks
        text_reg: Literal['seqaug', 'noise', 'dropout', 'none'] = 'seqaug'   # on text embeddings (Table 12)
        text_reg_rate: AtLeast(0) = 0.3   # SeqAug's rate, the noise's std or the dropout's p
        text_reg_prob: Share(with_one=True) = 0.25   # SeqAug: share of clips that get it
        text_reg_draw: Literal['fixed', 'beta', 'halfnormal'] = 'fixed'   # SeqAug's rate is fixed, or drawn
        weight_av: AtLeast(0) = 1.0      # lambda_av of the loss (eq. 13); the task head's L1 has weight 1
        weight_text: AtLeast(0) = 1.0    # lambda_t
        weight_fusion: AtLeast(0) = 1.0  # lambda_f
        weight_lm: AtLeast(0) = 1.0      # lambda_LM (eq. 14)

    frozen_lm = True
    text_first = True

    def __init__(self, lm, av_encoder, k):
        """
        lm FrozenLM, av_encoder AVEncoder or (av_init='frozen') a frozen one, k: the run's knobs as
        a dict.
        """
        super().__init__()
        self.lm, self.av_encoder, self.k = lm, av_encoder, k
        D, d, layers = lm.width, av_encoder.d, sorted(k['mm_layers'])
        if not layers or layers[0] < 1 or layers[-1] > lm.n_layers or len(set(layers)) < len(layers):
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
                k['lora_dropout'], k['dropout'], lm.row.get('norm_offset', 0), lm.residual_scale)
        self.task_head = nn.Sequential(
            nn.Linear(d + 2 * D, k['head_width']), nn.ReLU(), nn.Linear(k['head_width'], 1))
        self.av_head, self.text_head, self.fusion_head = nn.Linear(d, 1), nn.Linear(D, 1), nn.Linear(D, 1)
        # a head without a loss would never get a gradient: it is left out of training, rather than
        # decayed to nothing
        self.weights = {head: k['weight_' + head] for head in ('av', 'text', 'fusion')}  # lambdas of eq. 13
        for head, weight in self.weights.items():
            getattr(self, head + '_head').requires_grad_(weight > 0)

    @classmethod
    def check(cls, k):
        wrong = super().check(k)
        if k['text_reg'] != 'noise' and k['text_reg_rate'] > 1:
            wrong += [f"text_reg_rate={k['text_reg_rate']} must be in [0, 1]"]
        return wrong

    @classmethod
    def rehearse(cls, k, pending):
        if k['av_init'] != 'random' and not k['av_from']:
            raise ModelError("av_init needs a pretrained AV encoder: --av_from=FOLDER of its run, "
                             "or --av_init=random.")
        if 'lm' in pending:
            return
        hf = empty_lm(k['lm'], k['trust_remote_code'])
        with torch.device('meta'):
            try:
                cls(known_lm(hf), AVEncoder({'audio': 1}, k['av_width'], 1, k['av_heads']), k)
            except ValueError as e:
                raise ModelError(str(e)) from None

    @classmethod
    def float32_bytes(cls, k):
        return float32_bytes_of_lm(k)

    @classmethod
    def stands_on(cls, k):
        return ['lm'] + ['av_from'] * (k['av_init'] != 'random')

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        lm, tokenizer = load_lm(
            k['lm'], dtype, k['lm_init'] == 'random', k['trust_remote_code'], as_data, k['data_dir'])
        model = cls.assemble(k, facts, lm, tokenizer)
        if k['av_init'] == 'random':
            return model, tokenizer
        if not trained:
            tensors, _ = load_checkpoint(os.path.join(k['av_from'], 'best.safetensors'))
            pretrained = {name.removeprefix('av_encoder.'): v for name, v in tensors.items()
                          if name.startswith('av_encoder.')}
            load_tensors(model.av_encoder, pretrained, k['av_from'])
        model.av_encoder.requires_grad_(k['av_init'] == 'tune')
        return model, tokenizer

    @classmethod
    def assemble(cls, k, facts, lm, tokenizer):
        return cls(lm, build_av_encoder(k, facts.widths), k)

    @classmethod
    def frame_cost(cls, k, n_frames):
        return np.minimum(n_frames, k['av_len'])

    def train(self, mode=True):
        """
        A frozen AV encoder runs without dropout and SeqAug, like the frozen LM (not stated in the
        paper).
        """
        super().train(mode)
        if not any(p.requires_grad for p in self.av_encoder.parameters()):
            self.av_encoder.eval()
        return self

    def streams_through_lm(self, batch, whole=True):
        """
        Both streams through the LM -> x_t [B,T,D], x_f [B,F,D] after the final norm; z [B,m,d] and
        its mask [B,m]. whole=False computes only the last real token of the text in the last layer,
        where no other is read: x_t [B,1,D].
        """
        k, lm, (B, T) = self.k, self.lm, batch['tokens'].shape
        n_f, device, text_len = k['n_fusion'], batch['tokens'].device, batch['text_len']
        z, z_mask = self.av_encoder(batch)  # [B,m,d], [B,m]

        x_t = lm.embed(batch['tokens'])  # [B,T,D]
        if self.training:
            x_t = regularise(x_t, text_len, k['text_reg'], k['text_reg_rate'], k['text_reg_prob'],
                             k['text_reg_draw'])  # [B,T,D]
        x_t, rope_t = lm.place(x_t, torch.arange(T, device=device).expand(B, T))
        # right behind the last real token, or (as released) behind the padded length, whatever the
        # text's own
        start = text_len if k['fusion_position'] == 'after' else text_len * 0 + k['max_text_len']  # [B]
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
                    x_t, text_kv = self.last_token_alone(l, x_t, rope_t, batch)  # [B,1,D]
            x_f, _ = lm.block(l, x_f, rope_f, past=text_kv, mask=mask)  # [B,F,D]
            if str(l + 1) in self.mm_blocks:
                x_t, x_f = self.mm_blocks[str(l + 1)](x_t, x_f, z, z_mask, lm.ffw(l))
        return lm.final_norm(x_t), lm.final_norm(x_f), z, z_mask

    def last_token_alone(self, l, x, rope, batch):
        """
        LM layer l for the last real token of x [B,T,D] alone; of the others keys and values. ->
        [B,1,D], (k, v).
        """
        text_len = batch['text_len']
        q, k, v = self.lm.qkv(l, x, rope)  # [B,h,T,D/h], 2x [B,h_kv,T,D/h]
        q = last_real(q.transpose(1, 2), text_len).transpose(1, 2)  # [B,h,1,D/h]
        sees = batch['text_mask'][:, None, None]  # [B,1,1,T]
        return self.lm.finish(l, last_real(x, text_len), q, k, v, sees), (k, v)

    def heads(self, x_t, x_f, z, z_mask, text_len):
        """
        Eq. 12 and the three modality heads -> dict of [B], in float32: bf16 would round predictions
        to 1/128.
        """
        with torch.autocast(z.device.type, enabled=False):
            z_mean = masked_mean(z, z_mask)  # [B,d]
            x_last = last_real(x_t, text_len)[:, 0].float()  # [B,D]
            x_mean = x_f.float().mean(1)  # [B,D]
            out = dict(pred=self.task_head(torch.cat([z_mean, x_last, x_mean], -1)))  # [B,1] each
            for head, x in (('av', z_mean), ('text', x_last), ('fusion', x_mean)):
                if self.weights[head]:   # a head without a loss has learned nothing
                    out[head] = getattr(self, head + '_head')(x)
            return {name: y[:, 0] for name, y in out.items()}  # [B] each

    def predict(self, batch):
        """
        pred: the task head; text, av, fusion: the heads of each stream (text never sees audio or
        video, unless mm_query lets it). All [B]. No logits over the vocabulary are computed.
        """
        whole = 'text' in self.k['mm_query']   # figures show where each text token looks, in the last layer too
        return self.heads(*self.streams_through_lm(batch, whole), batch['text_len'])

    def forward(self, batch):
        """
        Eqs. 13-14. The LM loss reaches only the MM blocks' FFW, norm_2 and second gate: text is
        AV-free.
        """
        k = self.k
        x_t, x_f, z, z_mask = self.streams_through_lm(batch, whole=k['weight_lm'] > 0)
        out = self.heads(x_t, x_f, z, z_mask, batch['text_len'])
        terms, loss = deepmlf_loss(out, batch['label'], self.weights)
        more, extra = ordinal_loss(out['pred'], batch['label'], k, batch)
        terms, loss = terms | more, loss + extra
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
        Each MM block's tokens over the slots of Z, the mean over heads; of fusion tokens, where
        they look.
        """
        who = 'fusion token' if 'fusion' in self.k['mm_query'] else 'text token'
        views = {}
        for n, block in self.mm_blocks.items():
            x, z, mask = inputs_of(block.gca, predict, batch, every=True)[0]
            weights = block.gca.weights(x.float(), z.float(), mask)[0].mean(0)  # [L,m]
            views[f'layer {n}'] = weights, who, "audiovisual slot, from the clip's start to its end"
        return views

    def fused(self, batch, predict):
        return inputs_of(self.task_head, predict, batch)

    @classmethod
    def readings(cls, k, predictions):
        rows = {}
        if 'text' in predictions and k['mm_query'] == 'fusion':
            rows['text only (y_t)'] = 'text', 'text'
        if 'av' in predictions:
            rows['audio+video only (y_av)'] = 'av', 'av'
        return rows


# ---------------------------------------------------------------------------------------------------------
# Pseudo tokens: MSE-Adapter and CMPTA

class PseudoTokenKnobs(LMKnobs, PromptKnobs, OrdinalKnobs):
    n_pseudo: AtLeast(1) = 4      # P, pseudo tokens
    pseudo_projection: Literal['released', 'full'] = 'released'   # 'full': full rank, at the embeddings' scale
    readout: Literal['score', 'generate', 'head'] = 'score'   # how the answer is read
    score_estimate: Literal['expected', 'mode', 'median'] = 'expected'   # the score from the labels' probabilities
    score_over: Literal['vocabulary', 'labels'] = 'vocabulary'   # what an answer token's probability sums to 1 over
    head_width: AtLeast(1) = 64   # hidden width of the head of readout='head'
    checkpoint_lm = False         # compute the LM's layers again in the backward pass, to save memory


class PseudoTokenLM(System):
    """
    An adapter turns text, audio and video into P pseudo tokens, these stand before the text in a
    prompt, and the frozen LM says the label. A system of this kind is its adapter: `make_adapter`,
    and knobs for it.

    Behind the prompt stand a few tokens that are read out: its last one, and the label's
    (training), every node of the label trie (readout='score': one pass gives the probability of
    every label), or a learned query (readout='head'). Prompts end at different places and are
    padded there, where nothing looks; logits are for what is read out alone.
    """

    class Knobs(PseudoTokenKnobs):
        pass

    label_kinds = ('regression', 'classes')
    frozen_lm = True
    text_first = True

    def __init__(self, lm, prompt, k, widths):
        """ lm FrozenLM; prompt Prompt; k: the knobs as a dict; widths: stream -> width. """
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
    def make_adapter(cls, k, widths, D, embed_rms):
        """
        The module of the system: adapter(batch, text [B,T,D], text_mask [B,T]) -> pseudo tokens
        [B,P,D]. widths: stream -> width; D: the LM's width; embed_rms: the root mean square of the
        LM's embeddings.
        """
        raise NotImplementedError(f"{cls.__name__} has no make_adapter")

    @classmethod
    def check(cls, k):
        wrong = super().check(k)
        if (k['weight_mpr'] or k['weight_eioi']) and k['readout'] != 'head':
            wrong += ["weight_mpr and weight_eioi are for systems that predict a score by a head: "
                      "--readout=head"]
        return wrong

    @classmethod
    def float32_bytes(cls, k):
        return float32_bytes_of_lm(k)

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        # labels that cannot be told apart get their sentence before gigabytes are loaded
        Prompt(k, facts.labels[k['label']], load_tokenizer(k['lm'], k['trust_remote_code'], as_data))
        lm, tokenizer = load_lm(
            k['lm'], dtype, k['lm_init'] == 'random', k['trust_remote_code'], as_data, k['data_dir'])
        return cls.assemble(k, facts, lm, tokenizer), tokenizer

    @classmethod
    def assemble(cls, k, facts, lm, tokenizer):
        return cls(lm, Prompt(k, facts.labels[k['label']], tokenizer), k, facts.widths)

    def refuse_unknown_tokens(self):
        """
        Raises ModelError where the LM has no embedding for a token of the prompt or of a label.
        """
        prompt, rows = self.prompt, len(self.lm.parts['embed'].weight)
        around = [prompt.before, prompt.after]
        refuse_unknown_tokens(around, rows, f"the prompt {self.k['prompt']!r}")
        refuse_unknown_tokens(prompt.answers, rows, f"the labels of {self.k['label']!r}")

    def read(self, batch, adapter=True):
        """
        The prompt, embedded: x [B,T,D], n [B] real tokens. adapter=False leaves the pseudo tokens
        out. Raises ModelError where the adapter gives another shape than one pseudo token of the
        LM's width for each of n_pseudo.
        """
        first, P = len(self.prompt.before), self.k['n_pseudo']
        x, n = self.lm.embed(batch['tokens']), batch['text_len']  # [B,T,D], [B]
        if not adapter:
            return torch.cat([x[:, :first], x[:, first + P:]], 1), n - P
        pseudo = self.pseudo_tokens(batch, x)  # [B,P,D]
        wanted = (len(x), P, x.shape[2])
        if tuple(pseudo.shape) != wanted:
            raise ModelError(f"the adapter gives pseudo tokens of shape {list(pseudo.shape)} and "
                             f"the prompt has room for {list(wanted)}, [clips, n_pseudo, width of "
                             "the LM]: mend the adapter, or set n_pseudo to what it gives.")
        return torch.cat([x[:, :first], pseudo.to(x.dtype), x[:, first + P:]], 1), n

    def pseudo_tokens(self, batch, x):
        """ The adapter's pseudo tokens [B,P,D] for a prompt, embedded: x [B,T,D]. In float32. """
        with torch.autocast(x.device.type, enabled=False):
            return self.adapter(batch, *self.own_text(x, batch['text_len']))  # [B,P,D]

    def own_text(self, x, n):
        """
        The clip's own text in a prompt x [B,T,D] of n [B] tokens -> text [B,T,D] in float32, mask
        [B,T].
        """
        first, size = len(self.prompt.before) + self.k['n_pseudo'], self.k['max_text_len']
        text = x[:, first:first + size].float()  # [B,T,D]
        n_own = n - first - len(self.prompt.after)  # [B]
        return text, torch.arange(text.shape[1], device=x.device) < n_own[:, None]

    def tail(self, x, n, y, depth, sees):
        """
        What the LM makes of tokens y [B,N,D] that stand `depth` [N] behind the last of n [B] real
        tokens of x [B,T,D]; sees [N,N] says which of them see which. The first of y is that last
        token -> [B,N,D] after the final norm.
        """
        lm, (B, T, _), N = self.lm, x.shape, y.shape[1]
        again = self.k['checkpoint_lm'] and torch.is_grad_enabled()
        at = torch.arange(T - 1, device=x.device)  # [T-1]
        before = F.pad(at <= at[:, None], (0, N)).expand(B, T - 1, T - 1 + N)   # the prompt is causal
        real = (at < n[:, None] - 1)[:, None].expand(B, N, T - 1)
        behind = torch.cat([real, sees.expand(B, N, N)], -1)  # [B,N,T-1+N]
        mask = torch.cat([before, behind], 1)[:, None]  # [B,1,T-1+N,T-1+N]
        positions = torch.cat([at.expand(B, T - 1), n[:, None] - 1 + depth], 1)  # [B,T-1+N]
        z, rope = lm.place(torch.cat([x[:, :-1], y], 1), positions)  # [B,T-1+N,D]

        def block(l, z):
            return lm.block(l, z, rope, mask=mask)[0]

        for l in range(lm.n_layers - 1):
            if again:
                z = checkpoint(block, l, z, use_reentrant=False, preserve_rng_state=False)
            else:
                z = block(l, z)
        q, k, v = lm.qkv(lm.n_layers - 1, z, rope)   # of the prompt, keys and values are enough here
        z = lm.finish(lm.n_layers - 1, z[:, -N:], q[:, :, -N:], k, v, mask[:, :, -N:])  # [B,N,D]
        return lm.final_norm(z)

    def label_scores(self, x, n):
        """
        Log-probabilities of every label string, by one pass over their trie -> [B,K]. With
        score_over='vocabulary' they are exact to the LM's dtype. With 'labels' each token's
        probability is over the tokens that continue a label at its place: no logits of the whole
        vocabulary are computed, and a label is likelier where the LM would have said something
        that is no label.
        """
        y = self.lm.embed(self.trie_token).expand(len(x), -1, -1)  # [B,N,D]
        h = self.tail(x, n, y, self.trie_depth, self.trie_sees)  # [B,N,D]
        if self.k['score_over'] == 'labels':
            log_p = self.log_p_over_labels(h)  # [B,K,n]
        else:
            log_p = self.log_p_over_vocabulary(h)  # [B,K,n]
        return torch.where(self.trie_real, log_p, 0.0).sum(-1)  # [B,K]

    def log_p_over_vocabulary(self, h):
        """ Log-probability of each token of each label, h [B,N,D] -> [B,K,n]. """
        N = h.shape[1]
        # clips at once: logits of 16 MB, but at least 128 rows, for which the head's weights are read
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

    def head_out(self, x, n):
        """
        The hidden state of a learned query behind the prompt, through the head -> [B,1] or [B,K].
        """
        y = torch.cat([self.lm.embed(self.trie_token[:1]), self.query_tokens.to(x.dtype)])  # [2,D]
        depth = torch.arange(2, device=x.device)
        h = self.tail(x, n, y.expand(len(x), -1, -1), depth, depth[:, None] >= depth)[:, 1]  # [B,D]
        with torch.autocast(x.device.type, enabled=False):
            return self.head(h.float())

    def generated(self, x, n):
        """
        Greedy answers, understood: pred [B] and unread [B], 1 where an answer is no label; on the
        CPU, as it is text.
        """
        token = self.trie_token[:1].expand(len(x))  # [B]
        answers = self.lm.go_on(x[:, :-1], n - 1, token, self.trie_answer.shape[1])  # [B,n]
        nothing = -1.0 if self.prompt.kind == 'classes' else float(self.values[[0, -1]].mean())
        pred, unread = [], []
        for ids in answers.tolist():
            label = float('nan') if -1 in ids else self.prompt.understand(ids)
            pred.append(nothing if label is None else float(label))
            unread.append(float(label is None))
        return dict(pred=torch.tensor(pred), unread=torch.tensor(unread))

    def predict(self, batch, adapter=True):
        """
        pred [B], a score or a class number; prob [B,K] over the labels, with their probabilities
        made to sum to 1, for 'score' and for classes from a head; for 'generate' unread [B], 1
        where the answer was no label: such a clip is scored as the middle of the range, or as no
        class at all. adapter=False asks the LM about the text alone.
        """
        k, (x, n) = self.k, self.read(batch, adapter)
        if k['readout'] == 'generate':
            return self.generated(x, n)
        if k['readout'] == 'head' and self.prompt.kind == 'regression':
            return dict(pred=self.head_out(x, n)[:, 0])
        scores = self.head_out(x, n) if k['readout'] == 'head' else self.label_scores(x, n)  # [B,K]
        prob = scores.softmax(-1)  # [B,K]
        if self.prompt.kind == 'classes' or k['score_estimate'] == 'mode':
            pred = self.values[prob.argmax(-1)]  # [B]
        elif k['score_estimate'] == 'expected':
            pred = (prob * self.values).sum(-1)   # [B]; no matmul: autocast would round it
        else:   # the median, on the CPU: CUDA's sum is not the same twice
            at = (prob.cpu().cumsum(-1) < 0.5).sum(-1)  # [B]
            pred = self.values[at.clamp(max=len(self.values) - 1)]
        pred = pred.where(scores.isfinite().all(-1), torch.nan)   # argmax would hide a NaN
        return dict(pred=pred, prob=prob)

    def forward(self, batch):
        """
        Cross-entropy of the label's tokens; with readout='head' L1, or cross-entropy of the
        classes.
        """
        x, n = self.read(batch)
        label = self.prompt.index(batch['label'])  # [B]
        if self.k['readout'] == 'head':
            return self.head_loss(self.head_out(x, n), label, batch)
        answer, real = self.trie_answer[label], self.trie_real[label]  # [B,n], [B,n]
        depth = torch.arange(answer.shape[1], device=x.device)
        y = torch.cat([self.trie_token[:1].expand(len(x), 1), answer[:, :-1]], 1)  # [B,n]
        h = self.tail(x, n, self.lm.embed(y), depth, depth[:, None] >= depth)  # [B,n,D]
        loss = label_loss(h, answer, real, self.lm.lm_head, batch.get('lm_weight', 1.0))
        return dict(loss=loss, terms={'label': loss})

    def head_loss(self, out, label, batch):
        """ The loss of readout='head': out [B,1] or [B,K], label [B] as a class number. """
        if self.prompt.kind == 'classes':
            task = F.cross_entropy(out, label)
            return dict(loss=task + 0.0, terms={'task': task})
        task = l1(out[:, 0], batch['label'])
        more, extra = ordinal_loss(out[:, 0], batch['label'], self.k, batch)
        return dict(loss=task + extra, terms={'task': task} | more)

    @classmethod
    def controls(cls, k):
        if k['readout'] == 'head':
            return {}
        return {'the LM alone (text)': (dict(adapter=False), 'text')}

    def fused(self, batch, predict):
        if self.k['readout'] == 'head':
            return inputs_of(self.head, predict, batch)
        return self.pseudo_tokens(batch, self.lm.embed(batch['tokens'])).flatten(1)  # [B,P D]


class MSEAdapterLM(PseudoTokenLM):
    """
    MSE-Adapter (Yang et al. 2025): Text-Guide-Mixer and Multi-Scale-Fusion make the pseudo tokens.
    """

    class Knobs(PseudoTokenKnobs):
        mse_width: AtLeast(1) = 256   # d
        lstm_audio: AtLeast(1) = 64   # hidden width of the LSTM over audio
        lstm_vision: AtLeast(1) = 32  # hidden width of the LSTM over video
        msf_scales: AtLeast(1) = [8, 32, 16]   # bottlenecks of Multi-Scale-Fusion are the LM's width over these
        mse_tgm = True                # Text-Guide-Mixer: text times audio and video; False: added
        mse_msf = True                # Multi-Scale-Fusion; False: left out
        tgm_pool: Literal['real', 'padded'] = 'real'   # tokens in the mean text embedding

    @classmethod
    def check(cls, k):
        wrong = super().check(k)
        if not k['msf_scales']:
            wrong += ["msf_scales=[] must be numbers of at least 1"]
        return wrong

    @classmethod
    def make_adapter(cls, k, widths, D, embed_rms):
        lstm_widths = dict(audio=k['lstm_audio'], vision=k['lstm_vision'])
        return MSEAdapter(widths, D, k['n_pseudo'], k['mse_width'], lstm_widths, k['msf_scales'],
                          k['pseudo_projection'], embed_rms, k['mse_tgm'], k['mse_msf'])

    def refuse_unknown_tokens(self):
        super().refuse_unknown_tokens()
        if self.k['tgm_pool'] == 'padded':
            rows = len(self.lm.parts['embed'].weight)
            what = "the padding that tgm_pool='padded' counts"
            refuse_unknown_tokens([[self.prompt.pad_id]], rows, what)

    def own_text(self, x, n):
        """
        As PseudoTokenLM.own_text; with tgm_pool='padded', padding counts in the mean, up to
        max_text_len of it.
        """
        text, mask = super().own_text(x, n)  # [B,T,D], [B,T]
        if self.k['tgm_pool'] == 'real':
            return text, mask
        pad = self.lm.embed(torch.full((1, 1), self.prompt.pad_id, device=x.device)).float()  # [1,1,D]
        n_more = self.k['max_text_len'] - text.shape[1]
        text = text.where(mask[..., None], pad)  # [B,T,D]
        text = torch.cat([text, pad.expand(len(x), n_more, -1)], 1)  # [B,max_text_len,D]
        return text, torch.ones_like(text[..., 0], dtype=torch.bool)


class CMPTALM(PseudoTokenLM):
    """
    CMPTA: BiLSTM alignment and six directed cross-attentions make six pseudo tokens, a soft prompt.
    """

    class Knobs(PseudoTokenKnobs):
        cmpta_width: AtLeast(1) = 1024   # d
        cmpta_heads: AtLeast(1) = 8      # attention heads (not stated in the paper)
        cmpta_layers: AtLeast(1) = 1     # Transformer layers over the six tokens (not stated in the paper)
        cmpta_pool: Literal['mean', 'last', 'learned'] = 'mean'   # sequence to token (not in the paper)
        cmpta_align: Literal['bi', 'one-way', 'off'] = 'bi'   # LSTM of the alignment (Tables 5, 6)
        cmpta_align_text = True          # align text too (the paper can be read both ways)
        cmpta_attend = True              # False: no CMPT adapter, each token from its own modality
        dropout: Share() = 0.1           # in the adapter

    @classmethod
    def make_adapter(cls, k, widths, D, embed_rms):
        return CMPTA(widths, D, k['n_pseudo'], k['cmpta_width'], k['cmpta_heads'],
                     k['cmpta_layers'], k['cmpta_align'], k['cmpta_align_text'], k['cmpta_attend'],
                     k['cmpta_pool'], k['dropout'], k['pseudo_projection'], embed_rms)

    def attention(self, batch):
        """
        How much each frame or token counts in each pseudo token, 'text_from_vision' -> [B,S] .. (in
        eval mode).
        """
        with torch.autocast(batch['tokens'].device.type, enabled=False):
            x = self.lm.embed(batch['tokens'])  # [B,T,D]
            return self.adapter.attention(batch, *self.own_text(x, batch['text_len']))

    def views(self, batch, predict):
        """ Over text, audio and video: where the tokens of the other modalities look. """
        if not self.k['cmpta_attend']:
            return {}
        pairs, views = self.attention(batch), {}   # name -> [B,S]
        for other in ('text', 'audio', 'vision'):
            weights = {name.split('_from_')[0]: w[0] for name, w in pairs.items()
                       if name.endswith('from_' + other)}
            n = None if other == 'text' else int(batch[other + '_len'][0])
            what = 'text token' if other == 'text' else f'{other} frame'
            if weights:
                stacked = torch.stack(list(weights.values()))[:, :n]  # [rows,S]
                views[f'over {other}'] = stacked, list(weights), what
        return views


# ---------------------------------------------------------------------------------------------------------
# CrossSent

class CrossSent(System):
    """
    CrossSent (Liu et al. 2026): an encoder, fine-tuned, into which a GMRA brings audio and video
    before layer gmra_layer; the first token through a dense tanh layer gives the score. Loss: MSE,
    and the ordinal regularisers.
    """

    class Knobs(EncoderKnobs, OrdinalKnobs):
        gmra_layer: AtLeast(0) = 1    # encoder layer, from 1, that the GMRA comes before; 0: text only
        gmra_width: AtLeast(0) = 0    # d; 0 is the encoder's own width
        gmra_heads: AtLeast(0) = 0    # attention heads; 0: as many as the encoder has
        gmra_mult: AtLeast(0.1) = 4.0    # hidden width of the residual adapter over the encoder's; the paper's count
        gmra_concat: Literal['sequence', 'features'] = 'sequence'   # how audio and video join
        gmra_start: Literal['identity', 'random'] = 'identity'   # 'identity': as without it
        resample: Literal['linear', 'mean', 'words', 'none'] = 'linear'   # frames onto text tokens
        text_pool: Literal['first', 'mean'] = 'first'   # the sentence vector
        lr_encoder: AtLeast(0) = 1.0  # learning rate of the encoder over that of what is new
        dropout: Share() = 0.1        # in the GMRA and the head

    def __init__(self, encoder, tokenizer, widths, k):
        super().__init__()
        self.encoder, self.k, D = encoder, k, encoder.width
        if not 0 <= k['gmra_layer'] <= encoder.n_layers:
            raise ModelError(f"gmra_layer={k['gmra_layer']} must be from 1 to {encoder.n_layers}, "
                             "the layers of this encoder, or 0 for none.")
        encoder.fits(k['max_text_len'])
        if k['gmra_concat'] == 'features' and k['resample'] == 'none':
            raise ModelError("gmra_concat='features' puts audio and video side by side, so both "
                             "must be on the text's time line: take another resample.")
        self.ends = [len(tokens) for tokens in specials(tokenizer)]
        self.gmra = None
        if k['gmra_layer'] and widths:
            self.gmra = GMRA(
                widths, D, k['gmra_width'] or D, k['gmra_heads'] or encoder.n_heads,
                k['gmra_mult'], k['gmra_concat'], k['gmra_start'], k['dropout'])
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(k['dropout']), nn.Linear(D, 1))

    @classmethod
    def build(cls, k, facts, folder, dtype=torch.float32, trained=False, as_data=False):
        texts = [] if trained else texts_as_read(facts, cls, k, 'train')
        encoder, tokenizer = load_text_encoder(k, texts, folder, trained, as_data)
        return cls.assemble(k, facts, encoder, tokenizer), tokenizer

    @classmethod
    def assemble(cls, k, facts, encoder, tokenizer):
        return cls(encoder, tokenizer, {s: facts.widths[s] for s in k['modalities'] if s in facts.widths}, k)

    @classmethod
    def makes_files(cls, k):
        return k['lm'] == 'new'

    @classmethod
    def needs_words(cls, k):
        return k['resample'] == 'words'

    def predict(self, batch):
        mask = batch['text_mask']  # [B,T]
        cues = None
        if self.gmra is not None:
            cues = frames_on_tokens(batch, self.gmra.proj, self.ends, self.k['resample'])
        x = self.encoder.embed(batch['tokens'])  # [B,T,D]
        for l in range(self.encoder.n_layers):
            if self.gmra is not None and l + 1 == self.k['gmra_layer']:
                x = self.gmra(x, cues)
            x = self.encoder.layer(l, x, mask)
        with torch.autocast(x.device.type, enabled=False):
            return dict(pred=self.head(sentence(x.float(), mask, self.k['text_pool']))[:, 0])  # [B]

    def forward(self, batch):
        pred, label = self.predict(batch)['pred'], batch['label']  # [B], [B]
        terms, extra = ordinal_loss(pred, label, self.k, batch)
        terms['task'] = mse(pred, label)
        return dict(loss=terms['task'] + extra, terms=terms)

    def param_groups(self):
        """ The encoder's own weights learn at lr_encoder times the rate of what is new. """
        return grouped(self, dict(encoder=self.k['lr_encoder']))

    def views(self, batch, predict):
        return attention_of_last_layer(self.encoder, predict, batch)

    def fused(self, batch, predict):
        return inputs_of(self.head, predict, batch)


# ---------------------------------------------------------------------------------------------------------
# All systems, by the name that the knob `system` takes

SYSTEMS = dict(
    lm=LanguageModel, av=AVModel, deepmlf=DeepMLF, mse=MSEAdapterLM, cmpta=CMPTALM,
    crosssent=CrossSent, **BASELINES)
