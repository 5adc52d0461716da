"""A world with a known solution, to check agents on: three films, and a trap for the greedy."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.frames import Frames, reward_of

# Stars of the film taken next (column) after the film just seen (row). After film 0 the best rating at once is
# film 0 again, while the cycle 1 → 2 → 1 → … pays 5 and 4 stars for ever.
STARS = np.array([[3.0, 1.5, 0.5], [0.5, 2.0, 5.0], [2.0, 4.0, 3.0]])


def toy_log() -> pd.DataFrame:
    """Return 60 ratings each of 200 users who choose at random; STARS[seen, next] are given, 3 to the first film."""
    n_users, length = 200, 60
    films = np.random.default_rng(0).integers(len(STARS), size=(n_users, length))
    rating = np.concatenate([np.full((n_users, 1), 3.0), STARS[films[:, :-1], films[:, 1:]]], axis=1)
    return pd.DataFrame({"user_id": np.repeat(np.arange(n_users), length), "item_id": films.ravel(),
                         "rating": rating.ravel().astype(np.float32), "timestamp": np.tile(np.arange(length), n_users)})


def toy_frames() -> Frames:
    """Return the transitions of `toy_log`: a state is the film just seen, as a unit vector, and its rating."""
    return Frames(toy_log(), np.arange(3), np.eye(3, dtype=np.float32), frame_size=1)


def toy_states() -> Tensor:
    """Return (3, 4): each film just seen and rated 3."""
    return torch.cat([torch.eye(3), torch.full((3, 1), 3.0)], dim=1)


def solve(reward: np.ndarray, gamma: float, n: int = 1, behaviour: np.ndarray | None = None) -> np.ndarray:
    """Return the Q (seen, next) that n-step targets settle at, by value iteration; n = 1 is the optimal one.

    behaviour (seen, next): how likely the people of the log chose in the n − 1 steps between; by default evenly.

    >>> solve(reward_of(STARS), gamma=0.9).argmax(axis=1)  # film 1 after film 0, then 2, 1, 2, …
    array([1, 2, 1])
    """
    beta = np.full_like(reward, 1 / len(reward)) if behaviour is None else behaviour
    q = np.zeros_like(reward)
    for _ in range(500):
        value = q.max(axis=1)
        for _ in range(n - 1):
            value = (beta * (reward + gamma * value)).sum(axis=1)
        q = reward + gamma * value
    return q


def policy_return(choice: np.ndarray, reward: np.ndarray, gamma: float) -> float:
    """Return the discounted return of always taking choice[seen], averaged over the first films: of 200 steps."""
    seen, total = np.arange(len(reward)), 0.0
    for step in range(200):
        total += gamma ** step * reward[seen, choice[seen]].mean()
        seen = choice[seen]
    return total


def share_of_optimum(choice: np.ndarray, gamma: float) -> float:
    """Return the return of always taking choice[seen], as a share of the best there is."""
    reward = reward_of(STARS)
    best = solve(reward, gamma).argmax(axis=1)
    return policy_return(choice, reward, gamma) / policy_return(best, reward, gamma)
