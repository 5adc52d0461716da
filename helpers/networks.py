"""The actor, the critic and Rainbow's network, as plain modules; and the encoders, under one roof with them."""

import torch
from torch import Tensor, nn

from helpers.encoders import ENCODERS, GRU, ODERNN, Attention, DRRave, DRRp, DRRu, Flat, UserVector
from helpers.frames import unflatten

__all__ = ["ENCODERS", "GRU", "ODERNN", "POLICIES", "Actor", "Attention", "Critic", "DRRave", "DRRp", "DRRu", "Flat",
           "Joint", "NoisyLinear", "Rainbow", "UserVector"]


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
    """A linear layer over x and y side by side, not put there: of x no gradient is computed where only y wants one."""

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
