"""What the lesson cells of notes/08_ode.ipynb define; `make agents` writes it."""

import math

import torch
from torch import Tensor, nn

from helpers.frames import gaps


class FlatGaps(nn.Module):
    """Keep the state as it is, with its gaps: Δτ of every rating after the F ratings."""

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__()
        self.frame_size, self.embed_size, self.out_size = frame_size, embed_size, frame_size * (embed_size + 2)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1), and F gaps) → (B, F·(E+2))."""
        dt = torch.log1p(gaps(state, self.frame_size, self.embed_size)) / math.log(366)
        return torch.cat([state[:, :self.frame_size * (self.embed_size + 1)], dt], dim=1)
