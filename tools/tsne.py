"""
Exact t-SNE in plain PyTorch, for tools/figures.py.
"""
import math

import torch


def neighbour_probabilities(d2, perplexity):
    """
    Gaussian neighbour probabilities whose rows have the given perplexity, for squared distances d2
    [N,N] -> [N,N]. Finds 1 / (2 sigma^2) of each row by bisection.
    """
    N = len(d2)
    low, high = torch.zeros(N, 1).double(), torch.full((N, 1), math.inf).double()
    beta = (torch.ones(N, 1) / d2.mean().clamp(min=1e-12)).double()  # [N,1]
    others = ~torch.eye(N, dtype=torch.bool)
    for _ in range(64):
        p = torch.softmax(torch.where(others, -d2 * beta, -torch.inf), 1)  # [N,N]
        entropy = -(p * p.clamp(min=1e-300).log()).sum(1, keepdim=True)  # [N,1]
        wide = entropy > math.log(perplexity)  # [N,1], too many neighbours: make sigma smaller
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return p


def tsne(x, perplexity=30.0, n_steps=750, seed=0):
    """
    Exact t-SNE (van der Maaten & Hinton 2008) of x [N,D] -> [N,2], in plain PyTorch. Its matrices
    are N x N, so it is for a few thousand points. Early exaggeration is 12 for 250 steps; momentum
    and gains are those of the paper. It starts from the first two principal components plus small
    noise from `seed`.
    """
    x = torch.as_tensor(x, dtype=torch.float64)
    N = len(x)
    p = neighbour_probabilities(
        torch.cdist(x, x).square(), min(perplexity, (N - 1) / 3))  # [N,N]
    p = ((p + p.T) / (2 * N)).clamp(min=1e-12)
    centred = x - x.mean(0)
    torch.manual_seed(seed)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:2].T  # [D,2]
    y = centred @ axes  # [N,2]
    y = 1e-4 * y / y[:, :1].std().clamp(min=1e-12) + 1e-6 * torch.randn(N, 2, dtype=torch.float64)
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)  # [N,2] each
    rate = max(N / 12.0, 50.0)
    others = ~torch.eye(N, dtype=torch.bool)
    for step in range(n_steps):
        early = step < 250
        w = (1 + torch.cdist(y, y).square()).reciprocal() * others  # [N,N], Student's t
        force = (12.0 * p if early else p) - w / w.sum()  # [N,N]
        gradient = 4 * ((force * w).sum(1, keepdim=True) * y - (force * w) @ y)  # [N,2]
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y.numpy()
