"""State encoders, the actor and the critic, as plain modules."""

import torch
from torch import Tensor, nn

from helpers.frames import unflatten


class Flat(nn.Module):
    """Keep the state as it is: every item at its own place, then the ratings."""

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__()
        self.out_size = frame_size * (embed_size + 1)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, F·(E+1))."""
        return state


class DRRp(nn.Module):
    """Pairwise products: the frame's items, and every two of them multiplied, w_a·v_a ⊙ w_b·v_b.

    Source: Liu et al. 2018 (DRR-p). `w` is a learnt scalar for each place in the frame. Ratings are
    not read: the paper's frame holds liked items only, ours holds all.
    """

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__()
        self.frame_size = frame_size
        self.w = nn.Parameter(torch.ones(frame_size))
        self.register_buffer("pairs", torch.combinations(torch.arange(frame_size), 2), persistent=False)
        self.out_size = (frame_size + len(self.pairs)) * embed_size

    def products(self, wv: Tensor) -> Tensor:
        """Weighted items (B, F, E) → their pairwise products (B, F(F−1)/2, E)."""
        return wv[:, self.pairs[:, 0]] * wv[:, self.pairs[:, 1]]

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, (F + F(F−1)/2)·E)."""
        v, _ = unflatten(state, self.frame_size)
        return torch.cat([v, self.products(v * self.w[:, None])], dim=1).flatten(1)


class UserVector(nn.Module):
    """A user's vector from the frame alone: a learnt map of its items, weighted by rating − 3.

    The paper learns a vector for each user id. Ours serves users it has never seen.
    """

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__()
        self.frame_size = frame_size
        self.map = nn.Linear(embed_size, embed_size)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → user (B, E)."""
        v, rating = unflatten(state, self.frame_size)
        liked = (rating - 3) / self.frame_size
        return self.map((v * liked[:, :, None]).sum(dim=1))


class DRRu(nn.Module):
    """User times items: u ⊙ w_i·v_i for every item of the frame, beside the items' pairwise products.

    Source: Liu et al. 2018 (DRR-u).
    """

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__()
        self.user, self.pairwise = UserVector(frame_size, embed_size), DRRp(frame_size, embed_size)
        self.out_size = (frame_size + len(self.pairwise.pairs)) * embed_size

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, (F + F(F−1)/2)·E)."""
        v, _ = unflatten(state, self.pairwise.frame_size)
        wv = v * self.pairwise.w[:, None]
        return torch.cat([self.user(state)[:, None] * wv, self.pairwise.products(wv)], dim=1).flatten(1)


class DRRave(nn.Module):
    """User, average of the items, and their product: u, u ⊙ g, g with g = average of w_i·v_i.

    Source: Liu et al. 2018 (DRR-ave). The width does not grow with the frame. The average is over the
    F places, so a padded frame gives a shorter u and g.
    """

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__()
        self.frame_size = frame_size
        self.user = UserVector(frame_size, embed_size)
        self.w = nn.Parameter(torch.ones(frame_size))
        self.out_size = 3 * embed_size

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, 3E)."""
        v, _ = unflatten(state, self.frame_size)
        u, g = self.user(state), (v * self.w[:, None]).mean(dim=1)
        return torch.cat([u, u * g, g], dim=1)


ENCODERS = {"flat": Flat, "drr-p": DRRp, "drr-u": DRRu, "drr-ave": DRRave}


class Actor(nn.Module):
    """π: state → proto-action, a learnt mix of the frame's own items plus what a small network adds.

    The mix (one scalar a place, one gain a dimension) starts at the mean of the frame, so that an
    untrained actor already points at the user's taste.

    Args:
        encoder: a key of `ENCODERS`.
        dropout: of hidden units while training.
        item_dropout: share of a frame's items hidden from the actor while training.
    """

    def __init__(self, frame_size: int = 10, embed_size: int = 128, hidden_size: int = 256, encoder: str = "flat",
                 dropout: float = 0.5, item_dropout: float = 0.2):
        super().__init__()
        self.config = dict(frame_size=frame_size, embed_size=embed_size, hidden_size=hidden_size, encoder=encoder,
                           dropout=dropout, item_dropout=item_dropout)
        self.frame_size, self.item_dropout = frame_size, item_dropout
        self.encoder = ENCODERS[encoder](frame_size, embed_size)
        self.body = nn.Sequential(
            nn.Linear(self.encoder.out_size, hidden_size), nn.LayerNorm(hidden_size), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden_size, embed_size))
        self.mix = nn.Parameter(torch.full((frame_size,), 1 / frame_size))
        self.gain = nn.Parameter(torch.ones(embed_size))

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → proto_action (B, E)."""
        v, rating = unflatten(state, self.frame_size)
        if self.training and self.item_dropout:
            kept = torch.rand_like(rating) >= self.item_dropout
            v, rating = v * kept[:, :, None], rating * kept
            state = torch.cat([v.flatten(1), rating], dim=1)
        return self.body(self.encoder(state)) + self.gain * torch.einsum("bfe,f->be", v, self.mix)


class Critic(nn.Module):
    """Q: (state, action) → the discounted sum of rewards to come.

    Source: Lillicrap et al. 2016, section 7, with layer normalisation in place of batch
    normalisation and the action entering with the state rather than one layer later.
    """

    def __init__(self, frame_size: int = 10, embed_size: int = 128, hidden_size: int = 256, encoder: str = "flat"):
        super().__init__()
        self.config = dict(frame_size=frame_size, embed_size=embed_size, hidden_size=hidden_size, encoder=encoder)
        self.encoder = ENCODERS[encoder](frame_size, embed_size)
        self.body = nn.Sequential(
            nn.Linear(self.encoder.out_size + embed_size, hidden_size), nn.LayerNorm(hidden_size), nn.GELU(),
            nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size), nn.GELU(),
            nn.Linear(hidden_size, 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """state (B, F·(E+1)), action (B, E) → value (B, 1)."""
        return self.body(torch.cat([self.encoder(state), action], dim=1))
