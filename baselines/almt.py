"""
ALMT: the text guides what a learned hyper-modality takes from audio and video.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import EncoderLayer, sinusoid
from baselines.base import Attentive
from baselines.crossmodal import CrossStack
from configurator import AtLeast
from losses import UNITS, mse


class ALMT(Attentive):
    """
    ALMT (Zhang et al. 2023). A Transformer layer compresses each stream into almt_tokens tokens,
    and two more layers give the text in three scales. A hyper-modality starts as learned tokens;
    for each scale the text attends to audio and to video, and both results are added to its
    LayerNorm. Then the text, with a learned token in front, attends to the hyper-modality, and that
    token gives the score. Loss: MSE. Padding is masked (the release reads it), and positions are
    sinusoids (in the release: learned, for one fixed length).
    """

    class Knobs(Attentive.Knobs):
        fusion_layers: AtLeast(1) = 4  # layers of the stack from text to the hyper-modality
        almt_tokens: AtLeast(1) = 8    # P, tokens that each stream is compressed into

    score_loss = staticmethod(mse)
    units = UNITS | dict(task='squared label units')
    scorer = 'out'

    def __init__(self, encoder, D, facts, k):
        super().__init__(encoder, D, facts, k)
        d, P, h = k['fusion_width'], k['almt_tokens'], k['fusion_heads']

        def layer():
            return EncoderLayer(d, h, k['dropout'])

        widths = dict(text=D, audio=facts.widths['audio'], vision=facts.widths['vision'])
        self.proj = nn.ModuleDict({m: nn.Linear(w, d) for m, w in widths.items()})
        self.tokens = nn.ParameterDict({
            m: nn.Parameter(0.02 * torch.randn(P, d)) for m in widths})
        self.first = nn.ModuleDict({m: layer() for m in widths})
        self.scales = nn.ModuleList(layer() for _ in range(2))
        self.hyper_tokens = nn.Parameter(torch.ones(P, d))
        self.hyper_norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(3))
        self.learn = nn.ModuleList(
            nn.ModuleDict({m: GuidedAttention(d, h) for m in ('audio', 'vision')}) for _ in range(3))
        self.first_tokens = nn.Parameter(0.02 * torch.randn(1, d))
        self.fusion = CrossStack(d, h, k['fusion_layers'], k['dropout'], k['dropout'])
        self.out = nn.Linear(d, self.n_out)

    def compress(self, m, x, mask):
        """ Compresses stream m, x [B,L,width] with mask [B,L], into its tokens [B,P,d]. """
        P = self.k['almt_tokens']
        x = self.proj[m](x)  # [B,L,d]
        x = x + sinusoid(*x.shape[1:], x.device)
        x = torch.cat([self.tokens[m].expand(len(x), -1, -1), x], 1)  # [B,P+L,d]
        return self.first[m](x, F.pad(mask, (P, 0), value=True), P)  # [B,P,d]

    def fuse(self, x, batch):
        B = len(x)
        raw = dict(text=x, audio=batch['audio'], vision=batch['vision'])
        y = {m: self.compress(m, raw[m], batch[m + '_mask']) for m in raw}  # 3x [B,P,d]
        scales = [y['text']]
        for layer in self.scales:
            scales.append(layer(scales[-1], None))  # [B,P,d]

        hyper = self.hyper_tokens.expand(B, -1, -1)  # [B,P,d]
        for norm, attend, text in zip(self.hyper_norms, self.learn, scales):
            taken = attend['audio'](text, y['audio']) + attend['vision'](text, y['vision'])
            hyper = norm(hyper) + taken  # [B,P,d]
        text = torch.cat([self.first_tokens.expand(B, 1, -1), scales[-1]], 1)  # [B,1+P,d]
        real = torch.ones_like(hyper[..., 0], dtype=torch.bool)  # [B,P]
        fused = self.fusion(text, hyper, real)  # [B,1+P,d]
        return dict(pred=self.answer(self.out(fused[:, 0])))


class GuidedAttention(nn.Module):
    """ ALMT's multi-head attention from x to y, with a LayerNorm on each. There is no residual
    connection, because ALMT adds the result to the normed hyper-modality. """
    def __init__(self, d, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm_x = nn.LayerNorm(d)
        self.norm_y = nn.LayerNorm(d)
        self.q = nn.Linear(d, d, bias=False)
        self.kv = nn.Linear(d, 2 * d, bias=False)
        self.out = nn.Linear(d, d)

    def forward(self, x, y):
        """ x [B,L,d], y [B,M,d], without padding -> [B,L,d]. """
        B, L, d = x.shape
        M, h = y.shape[1], self.n_heads
        q = self.q(self.norm_x(x)).view(B, L, h, -1).transpose(1, 2)  # [B,h,L,d/h]
        kv = self.kv(self.norm_y(y)).view(B, M, 2, h, -1)  # [B,M,2,h,d/h]
        k, v = kv.permute(2, 0, 3, 1, 4)  # 2x [B,h,M,d/h]
        z = F.scaled_dot_product_attention(q, k, v)  # [B,h,L,d/h]
        return self.out(z.transpose(1, 2).reshape(B, L, d))  # [B,L,d]
