"""
Self-MM and TETFN: a label is generated for each stream in training.
"""
import torch
import torch.nn as nn

from adapters import masked_mean
from baselines.base import MODALITIES, Attentive, Baseline, Head, Pooled, Recurrent
from baselines.crossmodal import Conv, CrossStack, StackKnobs
from configurator import AtLeast, Share


class UnimodalLabels(nn.Module):
    """
    Self-MM's unimodal label generation (Yu et al. 2021, eqs. 9-14). A stream's label starts as the
    label of the clip. From the second epoch on it is shifted. The shift compares the stream's
    feature with the fused feature: how much closer it is to the mean feature of the positive clips
    than to that of the negative clips. A running mean over epochs damps the shift. Labels and
    features of all train clips are buffers, so that a resumed run restores them.
    """
    def __init__(self, n_clips, widths, high):
        """ n_clips: of the train split. widths: dict of 'fused' and each stream -> width of its
        feature. Labels are clamped to [-high, high]. """
        super().__init__()
        self.high = high
        for m, width in widths.items():
            self.register_buffer('label_' + m, torch.zeros(n_clips))  # [N]
            self.register_buffer('feature_' + m, torch.zeros(n_clips, width))  # [N,d_m]
        self.register_buffer('seen', torch.zeros(n_clips, dtype=torch.bool))  # [N]
        self.streams = [m for m in widths if m != 'fused']

    def __getitem__(self, m):
        return getattr(self, 'label_' + m)

    def lookup(self, m, index, label):
        """ Labels [B] of stream m for the clips index [B]. A clip not seen yet has its corpus
        label, label [B]. """
        return torch.where(self.seen[index], self[m][index], label)

    @torch.no_grad()
    def add_clips(self, index, label):
        """ Sets the labels of clips seen for the first time to the corpus labels. index [B],
        label [B]. """
        new = ~self.seen[index]  # [B]
        for m in ['fused', *self.streams]:
            self[m][index] = torch.where(new, label, self[m][index])
        self.seen.index_fill_(0, index, True)   # an assignment would copy True from the CPU

    def distance(self, m, feature, clips):
        """ Distance [B] from feature [B,d_m] to the mean feature of `clips`, a mask [N]. """
        stored = getattr(self, 'feature_' + m)  # [N,d_m]
        centre = masked_mean(stored[None], clips[None])  # [1,d_m]
        return torch.linalg.vector_norm(feature - centre, dim=-1)

    def relative_distance(self, m, feature):
        """ delta_m [B] of feature [B,d_m]: above 0 if it is closer to the positive centre. """
        label = self[m]  # [N]; 0 for clips not seen yet, which belong to neither centre
        to_positive = self.distance(m, feature, label > 0)  # [B]
        to_negative = self.distance(m, feature, label < 0)  # [B]
        return (to_negative - to_positive) / (to_positive + 1e-8)

    @torch.no_grad()
    def update(self, index, features, epoch):
        """ Updates the labels and stores the features. index [B]; features: dict of stream ->
        [B,d_m]; epoch counts from 1. Labels do not change in epoch 1, nor while there is no
        positive or no negative clip (as with labels in [0, 4]), since one of the centres is
        undefined. """
        if epoch > 1:
            both_signs = torch.stack([(self[m] > 0).any() & (self[m] < 0).any()
                                      for m in ('fused', *self.streams)]).all()  # []
            fused = self['fused'][index]  # [B]
            delta_f = self.relative_distance('fused', features['fused'])  # [B]
            updated = {}
            for m in self.streams:
                delta = self.relative_distance(m, features[m])  # [B]
                # eqs. 10-12
                new = 0.5 * fused * delta / (delta_f + 1e-8) + 0.5 * (fused + delta - delta_f)
                new = new.nan_to_num(0.0).clamp(-self.high, self.high)  # [B]
                # eq. 14
                old = self[m][index]  # [B]
                updated[m] = (epoch - 1) / (epoch + 1) * old + 2 / (epoch + 1) * new  # [B]
            for m, label in updated.items():
                self[m][index] = torch.where(both_signs, label, self[m][index])
        for m, x in features.items():
            getattr(self, 'feature_' + m)[index] = x.detach()


class SelfLabelled(Baseline):
    """ The base class of Self-MM and TETFN: a score from the fused vector and from each stream,
    with an L1 loss on each. The loss of a stream is weighted by tanh |y_m - y|, where y_m is its
    generated label and y that of the clip. """

    class Knobs(Baseline.Knobs):
        head_widths: AtLeast(1) = [128, 32, 16, 32]    # of the fused, text, audio, vision heads
        head_dropouts: Share() = [0.0, 0.1, 0.1, 0.0]  # before the fused, text, audio, vision heads
        lr_audio: AtLeast(0) = 1.0    # learning rate of the audio LSTM, as a multiple of lr
        lr_vision: AtLeast(0) = 1.0   # learning rate of the video LSTM, as a multiple of lr

    label_kinds = ('regression',)
    no_classes = 'the labels that it generates need a sign, positive or negative'
    lr_parts = ('encoder', 'audio', 'vision')
    scorer = 'heads.fused'
    one_process = True  # because it stores labels and features of all train clips

    def make_heads(self, widths, facts):
        """ Makes a head for each vector. widths: dict of 'fused' and each stream -> width. """
        k = self.k
        self.heads = nn.ModuleDict()
        for (m, width), d, p in zip(widths.items(), k['head_widths'], k['head_dropouts']):
            self.heads[m] = Head(width, d, p)
        high = max(map(abs, facts.labels[k['label']]['range']))
        self.labels = UnimodalLabels(
            facts.n_clips['train'], dict(zip(widths, k['head_widths'])), high)

    def scores_and_features(self, vectors):
        """ vectors: dict of 'fused' and each stream -> [B,width]. Returns the score [B] and the
        feature [B,d_m] that each head computes, in one dict. """
        scores, features = {}, {}
        for m, v in vectors.items():
            score, feature = self.heads[m](v)  # [B,1], [B,d_m]
            scores['pred' if m == 'fused' else m] = self.answer(score)  # [B]
            features['feature_' + m] = feature
        return scores | features

    def own_loss(self, out, batch):
        label = batch['label']  # [B]
        own = {}
        for m in self.labels.streams:
            y = self.labels.lookup(m, batch['index'], label) if self.training else label  # [B]
            own[m] = (torch.tanh((y - label).abs()) * (out[m] - y).abs()).mean(), 1.0
        return own

    def forward(self, batch):
        """ dict(loss, terms, features); after_step needs the features of each head. """
        out = self.run(batch)
        features = {m: out['feature_' + m].detach() for m in self.heads}  # [B,d_m] each
        return self.loss(out, batch) | dict(features=features)

    def after_step(self, batch, out):
        self.labels.add_clips(batch['index'], batch['label'])
        self.labels.update(batch['index'], out['features'], int(batch['epoch']) + 1)


class SelfMM(SelfLabelled, Pooled):
    """ Self-MM (Yu et al. 2021): the sentence vector and the last LSTM states of audio and video,
    concatenated. Four Heads: for the fused vector and for each stream. """

    class Knobs(SelfLabelled.Knobs, Pooled.Knobs):
        sub_widths: AtLeast(1) = [128, 16, 128]  # text (not used), audio, vision: LSTM widths
        sub_dropouts: Share() = [0.2, 0.2, 0.2]  # text (not used), audio, vision: dropouts

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        _, d_a, d_v = k['sub_widths']
        _, p_a, p_v = k['sub_dropouts']
        widths = facts.widths
        self.audio = Recurrent(widths['audio'], d_a, d_a, p_a)
        self.vision = Recurrent(widths['vision'], d_v, d_v, p_v)
        vectors = dict(fused=D + d_a + d_v, text=D, audio=d_a, vision=d_v)
        self.make_heads(vectors, facts)

    def fuse(self, x, batch):
        v = dict(text=self.text_vector(x, batch),
                 audio=self.audio(batch['audio'], batch['audio_len']),
                 vision=self.vision(batch['vision'], batch['vision_len']))  # [B,d_m] each
        return self.scores_and_features(dict(fused=torch.cat(list(v.values()), -1)) | v)


class TETFN(SelfLabelled, Attentive):
    """
    TETFN (Wang et al. 2023). LSTMs read audio and video, and convolutions bring all streams to
    width d. Text attends to audio and to video, and both attend to text. Audio also attends to
    video that has itself attended to the text, and video to such audio. Heads and labels are
    Self-MM's; the unimodal heads read the maximum of their stream over time. (MMSA reads padding,
    and uses the audio kernel size for video.)
    """

    class Knobs(SelfLabelled.Knobs, Attentive.Knobs, StackKnobs):
        sub_widths: AtLeast(1) = [128, 16, 128]  # text (not used), audio, vision: LSTM widths

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)

        def stack(width):
            return CrossStack(width, k['fusion_heads'], k['fusion_layers'], k['attn_dropout'],
                              k['res_dropout'], k['embed_dropout'])

        d, widths = k['fusion_width'], facts.widths
        _, d_a, d_v = k['sub_widths']
        self.audio = nn.LSTM(widths['audio'], d_a, batch_first=True)
        self.vision = nn.LSTM(widths['vision'], d_v, batch_first=True)
        self.convs = nn.ModuleDict({
            m: Conv(w, d, n) for m, w, n in zip(MODALITIES, (D, d_a, d_v), k['kernels'])})
        names = (
            'text_from_audio', 'text_from_vision', 'audio_from_text', 'vision_from_text',
            'guided_audio', 'guided_vision', 'audio_from_guided', 'vision_from_guided')
        self.cross = nn.ModuleDict({name: stack(d) for name in names})
        self.memory = nn.ModuleDict({m: stack(2 * d) for m in MODALITIES})
        self.make_heads(dict(fused=6 * d, text=d, audio=d, vision=d), facts)

    def fuse(self, x, batch):
        cross = self.cross
        mask = {m: batch[m + '_mask'] for m in MODALITIES}
        x = dict(text=x)
        for m in MODALITIES:
            y = x[m] if m == 'text' else getattr(self, m)(batch[m])[0]  # [B,L,d_m]
            x[m] = self.convs[m](y, mask[m])  # [B,L,d]

        # audio and video after attending to the text
        guided = {m: cross['guided_' + m](x[m], x['text'], mask['text'])
                  for m in ('audio', 'vision')}  # 2x [B,S,d]
        y = {}
        y['text'] = torch.cat([
            cross['text_from_audio'](x['text'], x['audio'], mask['audio']),
            cross['text_from_vision'](x['text'], x['vision'], mask['vision'])], -1)  # [B,T,2d]
        for m, other in (('audio', 'vision'), ('vision', 'audio')):
            y[m] = torch.cat([
                cross[m + '_from_text'](x[m], x['text'], mask['text']),
                cross[m + '_from_guided'](x[m], guided[other], mask[other])], -1)  # [B,S,2d]
        last = [self.memory[m].at_last_step(y[m], mask[m], batch[m + '_len']) for m in y]  # 3x [B,2d]

        top = {}
        for m in x:
            largest = torch.where(mask[m][..., None], x[m], -torch.inf).amax(1)  # [B,d]
            top[m] = largest.where(mask[m].any(1)[:, None], 0.0)  # [B,d]
        return self.scores_and_features(dict(fused=torch.cat(last, -1)) | top)
