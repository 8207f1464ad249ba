"""
The blocks of MulT: stacks of attention from one stream to another. TETFN and ALMT use them too.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from adapters import last_step, sinusoid
from configurator import AtLeast, Share


class StackKnobs:
    fusion_layers: AtLeast(1) = 4      # layers of each crossmodal stack
    kernels: AtLeast(1) = [5, 5, 5]    # kernel sizes of the convolutions: text, audio, vision
    attn_dropout: Share() = 0.2        # on attention weights (MulT: over text, in self-attention)
    res_dropout: Share() = 0.0         # on the residual branches of each layer
    embed_dropout: Share() = 0.2       # on the inputs of each stack


class CrossLayer(nn.Module):
    """ A layer of MulT: pre-norm attention with queries from x, keys and values from y (which may
    be x), then an FFW of width 4d with ReLU. One LayerNorm serves x and y, as in the release. """
    def __init__(self, d, n_heads, attn_dropout=0.0, res_dropout=0.0):
        super().__init__()
        self.n_heads = n_heads
        self.attn_dropout = attn_dropout
        self.norm_1 = nn.LayerNorm(d)
        self.norm_2 = nn.LayerNorm(d)
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)
        self.drop = nn.Dropout(res_dropout)

    def forward(self, x, y, mask):
        """ x [B,L,d], y [B,M,d], mask broadcastable to [B,h,L,M] -> [B,L,d]. """
        B, L, d = x.shape
        M, h = y.shape[1], self.n_heads
        q = self.q(self.norm_1(x)).view(B, L, h, -1).transpose(1, 2)  # [B,h,L,d/h]
        kv = self.kv(self.norm_1(y)).view(B, M, 2, h, -1)  # [B,M,2,h,d/h]
        k, v = kv.permute(2, 0, 3, 1, 4)  # 2x [B,h,M,d/h]
        p = self.attn_dropout * self.training
        z = F.scaled_dot_product_attention(q, k, v, mask, p)  # [B,h,L,d/h]
        x = x + self.drop(self.out(z.transpose(1, 2).reshape(B, L, d)))  # [B,L,d]
        return x + self.drop(self.down(F.relu(self.up(self.norm_2(x)))))


class CrossStack(nn.Module):
    """
    MulT's crossmodal Transformer (Tsai et al. 2019, eqs. 3-5): every layer attends from x to the
    same y. Position embeddings are added to both (MMSA has none) and padding is masked. The release
    also masks the future; here it is visible, because the steps of x and y have different rates.
    """
    def __init__(self, d, n_heads, n_layers, attn_dropout=0.0, res_dropout=0.0, embed_dropout=0.0):
        super().__init__()
        self.layers = nn.ModuleList(
            CrossLayer(d, n_heads, attn_dropout, res_dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(embed_dropout)

    def embed(self, x):
        """ Scales x and adds position embeddings: [B,L,d] -> [B,L,d]. """
        _, L, d = x.shape
        return self.dropout(d ** 0.5 * x + sinusoid(L, d, x.device))

    def attention_mask(self, x, y_mask):
        """ The attention mask [B,1,1,M]. A clip whose y is empty attends to one padded step, since
        a softmax over no steps is NaN. """
        first = torch.arange(y_mask.shape[1], device=y_mask.device) == 0  # [M]
        nothing = ~y_mask.any(1, keepdim=True)  # [B,1]
        return (y_mask | first & nothing)[:, None, None]

    def forward(self, x, y, y_mask):
        """ Attends from x [B,L,d] to y [B,M,d], y_mask [B,M] -> [B,L,d]. """
        mask = self.attention_mask(x, y_mask)  # [B,1,1,M]
        x = self.embed(x)  # [B,L,d]
        y = self.embed(y)  # [B,M,d]
        for layer in self.layers:
            x = layer(x, y, mask)  # [B,L,d]
        return self.norm(x)

    def at_last_step(self, x, x_mask, lengths):
        """ Self-attention, at the last real step: x [B,L,d], x_mask [B,L] -> [B,d]. The last layer
        has this one query. """
        mask = self.attention_mask(x, x_mask)  # [B,1,1,L]
        x = self.embed(x)  # [B,L,d]
        for layer in self.layers[:-1]:
            x = layer(x, x, mask)  # [B,L,d]
        query = last_step(x, lengths)[:, None]  # [B,1,d]
        return self.norm(self.layers[-1](query, x, mask))[:, 0]  # [B,d]


class Conv(nn.Module):
    """ A convolution over time to width d that keeps the length (MMSA's shortens the sequence, so
    short clips vanish). Padding stays zero. """
    def __init__(self, width, d, kernel):
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv1d(width, d, kernel, bias=False)

    def forward(self, x, mask):
        """ x [B,L,width], mask [B,L] -> [B,L,d]. """
        mask = mask[..., None]  # [B,L,1]
        ends = (self.kernel - 1) // 2, self.kernel // 2
        x = F.pad((x * mask).transpose(1, 2), ends)  # [B,width,L+kernel-1]
        return self.conv(x).transpose(1, 2) * mask  # [B,L,d]
