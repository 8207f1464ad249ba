"""
MulT: six crossmodal stacks, from each stream to each other one.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from baselines.base import MODALITIES, Attentive
from baselines.crossmodal import Conv, CrossStack, StackKnobs
from configurator import Share


class MulT(Attentive):
    """ Multimodal Transformer (Tsai et al. 2019). A convolution brings each stream to width d. Six
    CrossStacks attend from each stream to each other one. The two results of a stream are
    concatenated and pass a self-attention stack. The last real steps of the three streams, also
    concatenated, give the score. """

    class Knobs(Attentive.Knobs, StackKnobs):
        attn_dropout_audio: Share() = 0.2        # on attention weights over audio
        attn_dropout_vision: Share() = 0.0       # on attention weights over video
        sub_dropouts: Share() = [0.2, 0.2, 0.2]  # of text before its convolution; 2nd, 3rd unused

    scorer = 'out'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)

        def stack(width, n_layers, attn_dropout):
            return CrossStack(width, k['fusion_heads'], n_layers, attn_dropout,
                              k['res_dropout'], k['embed_dropout'])

        d, n_layers = k['fusion_width'], k['fusion_layers']
        widths = dict(text=D) | facts.widths
        attn_dropout = dict(text=k['attn_dropout'], audio=k['attn_dropout_audio'],
                            vision=k['attn_dropout_vision'])
        self.text_dropout = nn.Dropout(k['sub_dropouts'][0])
        self.convs = nn.ModuleDict({
            m: Conv(widths[m], d, size) for m, size in zip(MODALITIES, k['kernels'])})
        self.cross = nn.ModuleDict({
            f'{m}_from_{o}': stack(d, n_layers, attn_dropout[o])
            for m in MODALITIES for o in MODALITIES if o != m})
        self.memory = nn.ModuleDict({
            m: stack(2 * d, max(n_layers, 3), k['attn_dropout']) for m in MODALITIES})
        self.proj_1 = nn.Linear(6 * d, 6 * d)
        self.proj_2 = nn.Linear(6 * d, 6 * d)
        self.out = nn.Linear(6 * d, self.n_out)
        self.dropout = nn.Dropout(k['dropout'])

    def fuse(self, x, batch):
        mask = {m: batch[m + '_mask'] for m in self.convs}
        raw = {m: batch[m] for m in self.convs if m != 'text'} | dict(text=self.text_dropout(x))
        x = {m: conv(raw[m], mask[m]) for m, conv in self.convs.items()}  # 3x [B,L,d]
        last = []
        for m in x:
            attended = [self.cross[f'{m}_from_{o}'](x[m], x[o], mask[o])
                        for o in x if o != m]  # 2x [B,L,d]
            y = torch.cat(attended, -1)  # [B,L,2d]
            last.append(self.memory[m].at_last_step(y, mask[m], batch[m + '_len']))  # [B,2d]
        y = torch.cat(last, -1)  # [B,6d]
        y = y + self.proj_2(self.dropout(F.relu(self.proj_1(y))))  # [B,6d]
        return dict(pred=self.answer(self.out(y)))
