"""What the lesson cells of notes/02_embeddings.ipynb define; `make agents` writes it."""

import torch
from torch import Tensor


def masked_mean(h: Tensor, m: Tensor) -> Tensor:
    """Average the hidden states h (B, T, d) over the real tokens, m (B, T) of 0 and 1 → (B, d)."""
    m = m.unsqueeze(2).to(h.dtype)
    return (m * h).sum(dim=1) / m.sum(dim=1)


def last_real_token(h: Tensor, m: Tensor) -> Tensor:
    """Take the state of the last real token from h (B, T, d), padded on the right by m (B, T) → (B, d)."""
    return h[torch.arange(len(h)), m.sum(dim=1) - 1]
