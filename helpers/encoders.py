"""How actor and critic read a state: eight ways, by name in `ENCODERS`, as lessons 00b, 08 and 14 show them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers.frames import gaps, unflatten


class Encoder(nn.Module):
    """What reads a state for actor and critic: (B, F·(E+1)), and F gaps if its frames have times, → (B, out_size).

    With a `hidden_size` D it has a first layer `enter`, for `places`.
    """

    def __init__(self, frame_size: int, embed_size: int, out_size: int, hidden_size: int | None = None):
        super().__init__()
        self.frame_size, self.embed_size, self.out_size = frame_size, embed_size, out_size
        if hidden_size:
            self.enter = nn.Linear(embed_size + 1, hidden_size)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state (B, F·(E+1)) → items v (B, F, E), ratings (B, F)."""
        return unflatten(state, self.frame_size, self.embed_size)

    def places(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → x (B, F, D), a linear map of what is known of each place, [v_i, rating_i]."""
        v, rating = self.split(state)
        return self.enter(torch.cat([v, rating[:, :, None]], dim=2))


class Flat(Encoder):
    """Keep the state as it is: every item at its own place, then the ratings."""

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__(frame_size, embed_size, frame_size * (embed_size + 1))

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, F·(E+1)); gaps, if there are any, are left out."""
        return state[:, :self.out_size]


class DRRp(Encoder):
    """The frame's items, and every two of them multiplied: w_a·v_a ⊙ w_b·v_b, with w learnt for each place.

    Source: Liu et al. 2018 (DRR-p). Ratings are not read: the paper's frame holds liked items only, ours holds all.
    """

    def __init__(self, frame_size: int, embed_size: int):
        pairs = torch.combinations(torch.arange(frame_size), 2)
        super().__init__(frame_size, embed_size, (frame_size + len(pairs)) * embed_size)
        self.w = nn.Parameter(torch.ones(frame_size))
        self.register_buffer("pairs", pairs, persistent=False)

    def products(self, wv: Tensor) -> Tensor:
        """Weighted items (B, F, E) → their pairwise products (B, F(F−1)/2, E)."""
        return wv[:, self.pairs[:, 0]] * wv[:, self.pairs[:, 1]]

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, (F + F(F−1)/2)·E)."""
        v, _ = self.split(state)
        return torch.cat([v, self.products(v * self.w[:, None])], dim=1).flatten(1)


class UserVector(Encoder):
    """A user's vector from the frame alone: a learnt map of its items, weighted by rating − 3.

    The paper learns a vector for each user id. Ours serves users it has never seen.
    """

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__(frame_size, embed_size, embed_size)
        self.map = nn.Linear(embed_size, embed_size)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → user u (B, E)."""
        v, rating = self.split(state)
        liked = (rating - 3) / self.frame_size
        return self.map((v * liked[:, :, None]).sum(dim=1))


class DRRu(Encoder):
    """User times items, u ⊙ w_i·v_i, beside the items' pairwise products. Source: Liu et al. 2018 (DRR-u)."""

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__(frame_size, embed_size, DRRp(frame_size, embed_size).out_size)
        self.user, self.pairwise = UserVector(frame_size, embed_size), DRRp(frame_size, embed_size)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, (F + F(F−1)/2)·E)."""
        wv = self.split(state)[0] * self.pairwise.w[:, None]
        return torch.cat([self.user(state)[:, None] * wv, self.pairwise.products(wv)], dim=1).flatten(1)


class DRRave(Encoder):
    """User, average of the items, and their product: u, u ⊙ g, g with g the average of w_i·v_i over the F places.

    Source: Liu et al. 2018 (DRR-ave). The width does not grow with F; a padded frame gives a shorter u and g.
    """

    def __init__(self, frame_size: int, embed_size: int):
        super().__init__(frame_size, embed_size, 3 * embed_size)
        self.user = UserVector(frame_size, embed_size)
        self.w = nn.Parameter(torch.ones(frame_size))

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, 3E)."""
        v, _ = self.split(state)
        u, g = self.user(state), (v * self.w[:, None]).mean(dim=1)
        return torch.cat([u, u * g, g], dim=1)


class Attention(Encoder):
    """Self-attention: every place of the frame takes from all places, most from those whose key fits its query.

    Source: Vaswani et al. 2017, eq. 1, one head; Kang & McAuley 2018 (SASRec) for learnt places. No mask, for a
    frame holds the past alone, and no layer on top, for actor and critic bring theirs.
    """

    def __init__(self, frame_size: int, embed_size: int, hidden_size: int = 64):
        super().__init__(frame_size, embed_size, frame_size * hidden_size, hidden_size)
        self.place = nn.Parameter(torch.randn(frame_size, hidden_size) / hidden_size ** 0.5)
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(3))

    def weights(self, x: Tensor) -> Tensor:
        """x (B, F, D) → (B, F, F) float32: what each place (row) takes from each (column); rows sum to 1."""
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return (scores.float() / x.shape[2] ** 0.5).softmax(dim=2)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, F·D)."""
        x = self.places(state) + self.place  # what stands at each place, and which place it is
        return (x + self.weights(x) @ self.value(x)).flatten(1)


class GRU(Encoder):
    """A recurrent network takes in one rating after the other, h_i = GRU([v_i, rating_i], h_{i−1}); h_F is kept.

    Source: Cho et al. 2014; Hidasi et al. 2016 (GRU4Rec) for recommendation. It knows the order of ratings, not their
    times: what `ODERNN` is compared with, and is where nothing flows.
    """

    def __init__(self, frame_size: int, embed_size: int, hidden_size: int = 32):
        super().__init__(frame_size, embed_size, hidden_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → h_F (B, H) float32."""
        x = self.places(state).float()
        with torch.autocast(state.device.type, enabled=False):
            return self.gru(x)[1][0]


class ODERNN(Encoder):
    """Between two ratings the hidden state flows, dh/dτ = f(h); at a rating a GRU cell takes it in.

    Source: Rubanova et al. 2019 (ODE-RNN), algorithm 1. Here f(h) = tanh(W·h + b) − h, which keeps h in (−1, 1) as
    the cell does, as the flow of De Brouwer et al. 2019 (GRU-ODE-Bayes) is made to.

    Every row has gaps of its own. Rescaled, dh/ds = Δτ·f(h) with s from 0 to 1, they all take the same time, and one
    call of the solver, `steps` of fourth-order Runge-Kutta between two ratings, serves the batch. Time is compressed,
    Δτ = ln(1 + days) / ln 366: a second is nothing, a day 0.12, a month 0.58, a year 1. So one step will do, as
    lesson 08 measures; in days, a year would want a hundred.
    """

    def __init__(self, frame_size: int, embed_size: int, hidden_size: int = 32, steps: int = 1):
        super().__init__(frame_size, embed_size, hidden_size, hidden_size)
        self.steps = steps
        self.drift = nn.Linear(hidden_size, hidden_size)
        self.cell = nn.GRUCell(hidden_size, hidden_size)

    def f(self, h: Tensor) -> Tensor:
        """Return dh/dτ (B, H)."""
        return torch.tanh(self.drift(h)) - h

    def evolve(self, h: Tensor, dt: Tensor) -> Tensor:
        """Return h (B, H) as it is dt (B, 1) later, if nothing is rated in between."""
        step = dt / self.steps
        for _ in range(self.steps):
            k1 = self.f(h)
            k2 = self.f(h + step / 2 * k1)
            k3 = self.f(h + step / 2 * k2)
            k4 = self.f(h + step * k3)
            h = h + step / 6 * (k1 + 2 * (k2 + k3) + k4)
        return h

    def path(self, state: Tensor) -> list[tuple[Tensor, Tensor]]:
        """state (B, F·(E+1), and F gaps) → F pairs: h (B, H) float32 just before each rating and just after it."""
        x = self.places(state).to(self.drift.weight.dtype)
        dt = torch.log1p(gaps(state, self.frame_size, self.embed_size).to(x.dtype)) / math.log(366)
        h, path = x.new_zeros(len(x), self.out_size), []
        with torch.autocast(state.device.type, enabled=False):
            for i in range(self.frame_size):
                before = self.evolve(h, dt[:, i:i + 1])
                h = self.cell(x[:, i], before)
                path.append((before, h))
        return path

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1), and F gaps) → h_F (B, H) float32."""
        return self.path(state)[-1][1]


class TransformerLayer(nn.Module):
    """A layer of a causal transformer (Vaswani et al. 2017), normalised before each of its two halves."""

    def __init__(self, size: int, n_heads: int):
        super().__init__()
        self.n_heads, self.norms = n_heads, nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.alone = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, L, D) → (B, L, D); `drop` silences features of what is added to x."""
        qkv = self.qkv(self.norms[0](x)).float().unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        taken = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2)
        x = x + drop(self.out(taken))
        return x + drop(self.alone(self.norms[1](x)))


class Transformer(Encoder):
    """Layers of self-attention in which a place takes from those before it; the newest place is kept.

    Source: Vaswani et al. 2017; Kang & McAuley 2018 (SASRec). Stars are looked up, eleven vectors from 0 (nothing
    there) to 5. Made for frames of up to some hundred ratings. No place sees a later one, so `along` makes a state of
    each: lesson 14 trains on all of them in one pass.
    """

    def __init__(self, frame_size: int, embed_size: int, n_layers: int = 2, n_heads: int = 2, dropout: float = 0.0):
        super().__init__(frame_size, embed_size, embed_size)
        self.dropout = dropout
        self.stars, self.place = nn.Embedding(11, embed_size), nn.Parameter(torch.randn(frame_size, embed_size))
        self.layers = nn.ModuleList(TransformerLayer(embed_size, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(embed_size)

    def drop(self, x: Tensor) -> Tensor:
        """Silence a share of the features while training, the same ones at all places of a row: x (B, L, E)."""
        if not self.training or not self.dropout:
            return x
        kept = torch.rand(len(x), 1, x.shape[2], device=x.device) >= self.dropout
        return x * kept / (1 - self.dropout)

    def along(self, v: Tensor, rating: Tensor) -> Tensor:
        """Items v (B, L, E) and ratings (B, L), oldest first, L ≤ F → what each place knows (B, L, E)."""
        x = self.drop(v + self.stars((2 * rating).long().clamp(0, 10)) + self.place[:v.shape[1]])
        for layer in self.layers:
            x = layer(x, self.drop)
        return self.norm(x)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → (B, E)."""
        return self.along(*self.split(state))[:, -1]


ENCODERS = {"flat": Flat, "drr-p": DRRp, "drr-u": DRRu, "drr-ave": DRRave, "attention": Attention, "gru": GRU,
            "ode": ODERNN, "transformer": Transformer}
