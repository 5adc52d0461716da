"""State encoders, the actor and the critic, as plain modules."""

import math

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


ENCODERS = {"flat": Flat, "drr-p": DRRp, "drr-u": DRRu, "drr-ave": DRRave, "attention": Attention, "gru": GRU,
            "ode": ODERNN}


def hide_items(state: Tensor, frame_size: int, embed_size: int, share: float) -> tuple[Tensor, Tensor]:
    """Return (items (B, F, E), state (B, …)) with a random share of each frame's items gone, ratings and all."""
    v, rating = unflatten(state, frame_size, embed_size)
    if share:
        kept = torch.rand_like(rating) >= share
        v, rating = v * kept[:, :, None], rating * kept
        state = torch.cat([v.flatten(1), rating, state[:, frame_size * (embed_size + 1):]], dim=1)
    return v, state


def two_layers(hidden_size: int, out_size: int, dropout: float) -> list[nn.Module]:
    """Return what follows a first linear layer: twice normalisation, GELU, dropout and another linear layer."""
    return [layer for size in (hidden_size, out_size) for layer in
            (nn.LayerNorm(hidden_size), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_size, size))]


class Actor(nn.Module):
    """π: state → proto-action, a learnt mix of the frame's own items plus what a small network adds.

    The mix (one scalar a place, one gain a dimension) starts at the mean of the frame, so that an untrained actor
    already points at the user's taste.

    Args:
        encoder: a key of `ENCODERS`.
        dropout: of hidden units while training.
        item_dropout: share of a frame's items hidden from the actor while training.

    >>> Actor(frame_size=10, embed_size=128, encoder="attention")(torch.zeros(5, 10 * 129)).shape
    torch.Size([5, 128])
    """

    def __init__(self, frame_size: int = 10, embed_size: int = 128, hidden_size: int = 256, encoder: str = "flat",
                 dropout: float = 0.5, item_dropout: float = 0.3):
        super().__init__()
        self.config = dict(frame_size=frame_size, embed_size=embed_size, hidden_size=hidden_size, encoder=encoder,
                           dropout=dropout, item_dropout=item_dropout)
        self.frame_size, self.embed_size, self.item_dropout = frame_size, embed_size, item_dropout
        self.encoder = ENCODERS[encoder](frame_size, embed_size)
        enter = nn.Linear(self.encoder.out_size, hidden_size)
        self.body = nn.Sequential(enter, *two_layers(hidden_size, embed_size, dropout))
        self.mix = nn.Parameter(torch.full((frame_size,), 1 / frame_size))
        self.gain = nn.Parameter(torch.ones(embed_size))

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → proto_action (B, E)."""
        items, state = hide_items(state, self.frame_size, self.embed_size, self.item_dropout * self.training)
        return self.body(self.encoder(state)) + self.gain * torch.einsum("bfe,f->be", items, self.mix)


class Joint(nn.Linear):
    """A linear layer over x and y side by side, without putting them there.

    Where the gradient is wanted of y alone, as when an actor climbs its critic, none is computed of x.
    """

    def __init__(self, x_size: int, y_size: int, out_size: int):
        super().__init__(x_size + y_size, out_size)
        self.x_size = x_size

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, x_size), y (B, y_size) → (B, out_size)."""
        of_x = nn.functional.linear(x, self.weight[:, :self.x_size])
        return of_x + nn.functional.linear(y, self.weight[:, self.x_size:], self.bias)


class Critic(nn.Module):
    """Q: (state, action) → the discounted sum of rewards to come.

    Source: Lillicrap et al. 2016, section 7, with layer normalisation in place of batch normalisation and the action
    entering with the state rather than one layer later.

    Args:
        n_atoms: 1 for a value; else the logits of a distribution over that many returns (Bellemare et al. 2017).
        dropout: of hidden units while training.

    >>> critic, state, actions = Critic(n_atoms=51), torch.zeros(5, 10 * 129), torch.zeros(5, 7, 128)
    >>> critic(state, actions[:, 0]).shape, critic.among(state, actions).shape
    (torch.Size([5, 51]), torch.Size([5, 7, 51]))
    """

    def __init__(self, frame_size: int = 10, embed_size: int = 128, hidden_size: int = 256, encoder: str = "flat",
                 n_atoms: int = 1, dropout: float = 0.0):
        super().__init__()
        self.config = dict(frame_size=frame_size, embed_size=embed_size, hidden_size=hidden_size, encoder=encoder,
                           n_atoms=n_atoms, dropout=dropout)
        self.encoder = ENCODERS[encoder](frame_size, embed_size)
        self.enter = Joint(self.encoder.out_size, embed_size, hidden_size)
        self.body = nn.Sequential(*two_layers(hidden_size, n_atoms, dropout))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """state (B, F·(E+1)), action (B, E) → value (B, 1), or logits (B, n_atoms)."""
        return self.body(self.enter(self.encoder(state), action))

    def among(self, state: Tensor, actions: Tensor) -> Tensor:
        """state (B, F·(E+1)), actions (B, k, E) → values (B, k), or logits (B, k, n_atoms); a state is read once."""
        answer = self.body(self.enter(self.encoder(state)[:, None], actions))
        return answer[..., 0] if answer.shape[2] == 1 else answer


class NoisyLinear(nn.Linear):
    """A linear layer whose weights tremble while training: w = μ + σ ⊙ ε, one ε a call, shared by the batch.

    Source: Fortunato et al. 2018, "Noisy Networks for Exploration", eq. 10 and 11: ε is f(ε_out) f(ε_in)ᵀ with
    f(x) = sign(x)·√|x|, μ starts in ± 1/√in_size and σ at `sigma`/√in_size. Evaluating uses μ alone.
    """

    def __init__(self, in_size: int, out_size: int, sigma: float = 0.5):
        super().__init__(in_size, out_size)
        self.weight_sigma = nn.Parameter(torch.full((out_size, in_size), sigma * in_size ** -0.5))
        self.bias_sigma = nn.Parameter(torch.full((out_size,), sigma * in_size ** -0.5))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_size) → (B, out_size)."""
        if not self.training:
            return super().forward(x)
        e = torch.randn(self.in_features + self.out_features, device=x.device)
        e_in, e_out = (e.sign() * e.abs().sqrt()).split([self.in_features, self.out_features])
        return nn.functional.linear(x, self.weight + self.weight_sigma * e_out[:, None] * e_in,
                                    self.bias + self.bias_sigma * e_out)


class Rainbow(Actor):
    """Distributions of returns for every item of a catalogue, of a size that does not grow with the catalogue.

    Two heads: v(s), logits of the state's return over the atoms, and u(s), a vector. Item i with vector e has the
    advantage A = (e − ē)·u(s)/√E, and its return the distribution of the state's, tilted:
    logits_z(s, i) = v_z(s) + κ·A·z̃, with z̃ the atoms scaled to [−1, 1] and κ > 0 learnt. Its mean rises strictly with
    A, so the items rank by their dot product with u(s), which is what `forward` returns. What the family cannot
    express: at one state all items share one curve, and differ by how far along it they stand.

    Source: Hessel et al. 2018 for the ingredients. Theirs has weights for every action and atom.

    Args:
        n_atoms: 1 for a value, v(s) + κ·A, in place of a distribution.
        dueling: False leaves one head: u(s) gets one more number c(s), and v_z = b_z + c(s)·z̃, b for all states.
        noisy: make the heads of `NoisyLinear`.

    `centre` (E,) is ē, the catalogue's mean vector, zero unless it is set.
    """

    def __init__(self, frame_size: int = 10, embed_size: int = 128, hidden_size: int = 256, encoder: str = "flat",
                 n_atoms: int = 51, dueling: bool = True, noisy: bool = True, dropout: float = 0.5,
                 item_dropout: float = 0.3):
        super().__init__(frame_size, embed_size, hidden_size, encoder, dropout, item_dropout)
        self.config |= dict(n_atoms=n_atoms, dueling=dueling, noisy=noisy)
        self.dueling, linear = dueling, NoisyLinear if noisy else nn.Linear
        self.body = self.body[:-1]
        self.advantage = linear(hidden_size, embed_size + (not dueling))
        self.value = linear(hidden_size, n_atoms) if dueling else nn.Parameter(torch.zeros(n_atoms))
        self.log_scale = nn.Parameter(torch.tensor(-2.0))
        self.register_buffer("centre", torch.zeros(embed_size))
        self.register_buffer("z", torch.linspace(-1, 1, n_atoms) if n_atoms > 1 else torch.ones(1), persistent=False)

    def heads(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state (B, F·(E+1)) → u (B, E), v (B, n_atoms), float32."""
        items, state = hide_items(state, self.frame_size, self.embed_size, self.item_dropout * self.training)
        h = self.body(self.encoder(state))
        out, mix = self.advantage(h).float(), torch.einsum("bfe,f->be", items, self.mix)
        u = out[:, :self.embed_size] + self.gain * mix
        return u, self.value(h).float() if self.dueling else self.value + out[:, self.embed_size:] * self.z

    def tilt(self, u: Tensor, v: Tensor, action: Tensor) -> Tensor:
        """u (B, E), v (B, n_atoms), action (B, E) → logits (B, n_atoms) of that item's return."""
        advantage = ((action - self.centre) * u).sum(dim=1, keepdim=True) / self.embed_size ** 0.5
        return v + self.log_scale.exp() * advantage * self.z

    def logits(self, state: Tensor, action: Tensor) -> Tensor:
        """state (B, F·(E+1)), action (B, E) → logits (B, n_atoms) of that item's return."""
        return self.tilt(*self.heads(state), action)

    def forward(self, state: Tensor) -> Tensor:
        """state (B, F·(E+1)) → u (B, E): the greater an item's dot product with it, the more it is worth."""
        return self.heads(state)[0]


POLICIES = {"Actor": Actor, "Rainbow": Rainbow}  # what a saved policy can be
