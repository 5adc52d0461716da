"""What the lesson cells of notes/14_whole_log.ipynb define; `make agents` writes it."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from helpers import liking, training
from helpers.encoders import Transformer
from helpers.frames import Frames, reward_of, rows_of
from helpers.losses import next_item_loss, polyak, squared_error


@dataclass(frozen=True)
class WholeLogSettings:
    """Hyperparameters of the network and its training: change them here."""

    n_layers: int = 2            # of the transformer
    n_heads: int = 2             # of each layer
    dropout: float = 0.3         # share of features that a log does without at a training step
    item_dropout: float = 0.3    # share of items hidden at a training step
    learning_rate: float = 1e-3
    gamma: float = 0.5           # discount
    beta: float = 0.3            # weight of the critic in the policy whose value it learns
    critic_weight: float = 0.03  # of the critic's loss beside the actor's, for one network reads the log for both
    tau: float = 0.05            # share of the way the target moves towards the network, each step
    batch_size: int = 64         # windows a step
    shuffle_ties: bool = True    # put ratings of one second in another order with each pass


def windows(frames: Frames, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut every log into windows of at most length + 1 ratings: the rows of their first, and after their last (n,)."""
    first, end = [], []
    for start, stop in zip(frames.log_start, frames.log_start + frames.log_length, strict=True):
        while stop - start >= 2:
            first.append(max(start, stop - length - 1))
            end.append(stop)
            stop = first[-1] + 1
    return np.array(first), np.array(end)


def read_windows(frames: Frames, first: np.ndarray, end: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Return items (B, L), rows of the item matrix; stars (B, L); and which places are real, padded at the end."""
    places = torch.arange(int((end - first).max()), device=frames.device)
    row = torch.as_tensor(first, device=frames.device)[:, None] + places
    real = row < torch.as_tensor(end, device=frames.device)[:, None]
    row = row * real
    return frames.item_idx[row].long() * real, frames.rating[row] * real, real


class LogReader(nn.Module):
    """log → h (B, L, E): after each rating a point in the space of items, from that rating and those before it."""

    def __init__(self, matrix: Tensor, length: int, settings: WholeLogSettings):
        super().__init__()
        size, self.item_dropout = matrix.shape[1], settings.item_dropout
        self.items = nn.Parameter(matrix / size ** 0.5)  # h·e is then the score that lesson 05 divides by √E
        self.encoder = Transformer(length, size, settings.n_layers, settings.n_heads, settings.dropout)
        self.recent = nn.Conv1d(size, size, 10, groups=size, bias=False)
        nn.init.constant_(self.recent.weight, size ** 0.5 / 10)  # at first the mean of the last ten
        nn.init.normal_(self.encoder.stars.weight, std=0.02)
        self.encoder.place.data *= 0.02

    def forward(self, items: Tensor, stars: Tensor) -> Tensor:
        """items, stars (B, L) → h (B, L, E) float32."""
        v = self.items[items]
        if self.training:
            v = v * (torch.rand(items.shape, device=v.device) >= self.item_dropout)[:, :, None]
        recent = self.recent(nn.functional.pad(v.transpose(1, 2), (9, 0))).transpose(1, 2)
        return self.encoder.along(v, stars).float() + recent.float()


class WholeLog(LogReader):
    """State, actor and critic in one: π = h, Q(s, e) = v(h) + u(h)·e."""

    def __init__(self, matrix: Tensor, length: int, settings: WholeLogSettings):
        super().__init__(matrix, length, settings)
        size = matrix.shape[1]
        self.heads = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size + 1))

    def worth(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (N, E) → u (N, E), v (N,), float32."""
        out = self.heads(h).float()
        return out[:, :-1], out[:, -1]


def whole_log_losses(agent: dict, items: Tensor, stars: Tensor, real: Tensor, gamma: float, beta: float,
                     n_places: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Return (behaviour loss of all places, the critic's of up to n_places of them, their Q (n,))."""
    net, target, next_real = agent["net"], agent["target"], real[:, 1:]
    h = net(items[:, :-1], stars[:, :-1])
    behaviour = next_item_loss(h[next_real], net.items, items[:, 1:][next_real])
    some = -(-len(items) // 4)
    window, place = torch.nonzero(next_real[:some, 1:], as_tuple=True)  # with the next state in the window too
    if not len(place):
        return behaviour, 0 * behaviour, behaviour.new_zeros(1)
    drawn = torch.randint(len(place), (min(n_places, len(place)),), device=place.device)
    window, place = window[drawn], place[drawn]
    reward, action = reward_of(stars[window, place + 1]), net.items[items[window, place + 1]]
    with torch.no_grad():
        next_h = target(items[:some, :-1], stars[:some, :-1])[window, place + 1]
        next_u, next_v = target.worth(next_h)
        p = ((next_h + beta * next_u) @ target.items.T).softmax(dim=1)
        y = reward + gamma * (next_v + (next_u * (p @ target.items)).sum(dim=1))
    u, v = net.worth(h[window, place])
    q = v + (u * action).sum(dim=1)
    return behaviour, squared_error(q, y), q


def whole_log_update(agent: dict, frames: Frames, batch: tuple[np.ndarray, np.ndarray],
                     settings: WholeLogSettings) -> dict:
    """Make one step on a batch of windows, (first (B,), end (B,)), and return what to log."""
    window = read_windows(frames, *batch)
    behaviour, critic, q = whole_log_losses(agent, *window, settings.gamma, settings.beta)
    agent["optimiser"].zero_grad()
    (behaviour + settings.critic_weight * critic).backward()
    nn.utils.clip_grad_norm_(agent["net"].parameters(), 1.0)
    agent["optimiser"].step()
    polyak(agent["target"], agent["net"], settings.tau)
    return {"loss/behaviour": behaviour, "loss/critic": critic, "Q/logged action": q.mean()}


def new_whole_log(seed: int, matrix: Tensor, length: int, settings: WholeLogSettings) -> dict:
    """Return a fresh agent, the same for a seed."""
    torch.manual_seed(seed)
    net = WholeLog(matrix, length, settings).to(matrix.device)
    return {"net": net, "target": deepcopy(net).eval().requires_grad_(False),
            "optimiser": torch.optim.AdamW(net.parameters(), settings.learning_rate, weight_decay=1e-4, fused=True)}


@torch.no_grad()
def whole_log_policy(history: Frames, user_ids: np.ndarray, *, net: WholeLog, beta: float = 0.0,
                     length: int | None = None) -> Tensor:
    """Score the catalogue for users by log p + β·Q, up to a constant of each user (a recommender).

    `length`: read so many of the last ratings; by default as many as the network can.
    """
    place, scores = history.places(user_ids), []
    end = (history.log_start + history.log_length)[place]
    first = np.maximum(history.log_start[place], end - (length or net.encoder.frame_size))
    for low in range(0, len(end), 256):
        with training.autocast(history.device):
            items, stars, real = read_windows(history, first[low:low + 256], end[low:low + 256])
            h = net(items, stars)[torch.arange(len(items)), real.sum(dim=1) - 1]
            u, _ = net.worth(h)
        scores.append((h + beta * u) @ net.items.T)
    return torch.cat(scores)


def shuffled(frames: Frames, length: int, batch_size: int, seed: int,
             most: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return every window once, or `most` of them, in batches of about one length, the same for a seed."""
    (first, end), rng = windows(frames, length), np.random.default_rng(seed)
    order = rng.permutation(len(first))[:most]
    groups = np.array_split(order, max(1, len(order) // (8 * batch_size)))
    order = np.concatenate([group[np.argsort((end - first)[group], kind="stable")] for group in groups])
    batches = np.array_split(order, -(-len(order) // batch_size))
    return [(first[batches[k]], end[batches[k]]) for k in rng.permutation(len(batches))]


def validation_loss(net: WholeLog, history: Frames, valid: pd.DataFrame) -> float:
    """Return the mean of −log p over each user's validation item."""
    scores = whole_log_policy(history, valid["user_id"].to_numpy(), net=net)
    rows = torch.as_tensor(rows_of(valid["item_id"], history.item_ids)).long().to(scores.device)
    return float(nn.functional.cross_entropy(scores, rows))


def train_until_flat(agent: dict, frames: Frames, loss_of: Callable, settings: WholeLogSettings, *, length: int,
                     max_passes: int, patience: int, most: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Train until the target's validation loss has not fallen for `patience` passes; keep the target of its least."""
    step, rows, best = partial(whole_log_update, agent, frames, settings=settings), [], {}
    for k in range(max_passes):
        batches = shuffled(frames, length, settings.batch_size, 1000 * seed + k, most)
        left = iter(batches)
        logged = training.fit(step, frames, agent, batch_size=settings.batch_size, max_steps=len(batches),
                              sample=lambda _, left=left: next(left), shuffle_ties=settings.shuffle_ties,
                              seed=1000 * seed + k, desc=f"seed {seed}, pass {k + 1}")
        rows.append({**logged.mean(), "loss/validation": loss_of(agent["target"])})
        losses = [row["loss/validation"] for row in rows]
        if losses[-1] == min(losses):
            best = deepcopy(agent["target"].state_dict())
        elif k - int(np.argmin(losses)) >= patience:
            break
    agent["target"].load_state_dict(best)
    return pd.DataFrame(rows, pd.RangeIndex(1, len(rows) + 1, name="pass"))


@torch.no_grad()
def off_the_log(net: WholeLog, frames: Frames, length: int, beta: float) -> dict[str, float]:
    """Return mean Q of logged actions and of the policy, and distances to the nearest item in mean item lengths."""
    items, stars, real = read_windows(frames, *(bound[:256] for bound in windows(frames, length)))
    some = slice((1 << 26) // len(net.items))  # for each the whole catalogue is weighed
    h = net(items[:, :-1], stars[:, :-1])[real[:, 1:]][some]
    u, v = net.worth(h)
    mean = ((h + beta * u) @ net.items.T).softmax(dim=1) @ net.items
    size = net.items.norm(dim=1).mean()
    away = {name: torch.cdist(point, net.items).min(dim=1).values.mean() / size
            for name, point in (("proto-action", h + beta * u), ("mean item", mean))}
    taken = net.items[items[:, 1:][real[:, 1:]][some]]
    return {"Q, logged action": (v + (u * taken).sum(dim=1)).mean().item(),
            "Q, policy": (v + (u * mean).sum(dim=1)).mean().item(),
            **{f"{name} to nearest item": distance.item() for name, distance in away.items()}}


def front_of(nets: list[WholeLog], history: Frames, cases: pd.DataFrame, betas: tuple[float, ...]) -> pd.DataFrame:
    """Return NDCG@10 and reward@10 of each β, mean over networks."""
    return liking.front_of(lambda beta: [partial(whole_log_policy, net=net, beta=beta) for net in nets],
                           history, cases, betas)


def choose_beta(front: pd.DataFrame, keeps: float) -> float:
    """Return the β with most reward@10 of those that keep this share of the NDCG@10 of β = 0."""
    return liking.choose_beta(front, keeps * front["NDCG@10"].iloc[0])
