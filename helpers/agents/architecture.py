"""What the lesson cells of notes/00_architecture.ipynb define; `make agents` writes it."""

import pandas as pd
import torch
from torch import nn


def transitions_by_hand(log: pd.DataFrame, frame_size: int) -> pd.DataFrame:
    """Return the transitions of one user's log, in titles and ratings, one row each."""
    titles, ratings = list(log["title"]), list(log["rating"])
    steps = []
    for first in range(len(log) - frame_size):
        taken = first + frame_size
        steps.append({
            "state: items": titles[first:taken],
            "state: ratings": ratings[first:taken],
            "action": titles[taken],
            "reward": 2 * (ratings[taken] - 2.5),
            "next_state: items": titles[first + 1:taken + 1],
            "next_state: ratings": ratings[first + 1:taken + 1],
            "done": taken == len(log) - 1,
        })
    return pd.DataFrame(steps)


def discounted_return(rewards: list[float], gamma: float) -> float:
    """Return Σ γᵗ·rₜ, the discounted sum of the rewards to come."""
    return float(sum(gamma**t * reward for t, reward in enumerate(rewards)))


def make_slate(proto_action: torch.Tensor, items: torch.Tensor, seen: list[int], k: int) -> torch.Tensor:
    """Return the rows of `items` (n_items, E) with the k highest dot products, best first, seen ones excluded."""
    scores = items @ proto_action
    scores[seen] = -torch.inf
    return scores.topk(k).indices


def plain_user(encoder: nn.Module) -> nn.Module:
    """Set the map of the user's vector to the identity, W = I and b = 0."""
    with torch.no_grad():
        nn.init.eye_(encoder.user.map.weight)
        nn.init.zeros_(encoder.user.map.bias)
    return encoder
