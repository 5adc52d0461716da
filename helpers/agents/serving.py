"""What the lesson cells of notes/05b_serving.ipynb define; `make agents` writes it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from helpers import evaluation
from helpers.frames import Frames
from helpers.losses import log_policy
from helpers.networks import Actor, Critic


def rerank(log_p: Tensor, q: Tensor, candidates: Tensor, beta: float) -> Tensor:
    """Return scores (B, n) with the candidates (B, k) on top, ordered by log p + β·z(Q); q (B, k), log_p (B, n)."""
    z = (q - q.mean(dim=1, keepdim=True)) / q.std(dim=1, keepdim=True).nan_to_num().clamp(min=1e-6)
    score = z if beta == torch.inf else log_p.gather(1, candidates) + beta * z
    below = log_p - log_p.max() - 1 + score.min()  # whatever is no candidate comes after the last of them
    return below.scatter(1, candidates, score)


@torch.no_grad()
def wolpertinger(history: Frames, user_ids: np.ndarray, *, actor: Actor, critic: Critic, k: int, beta: float,
                 term: Callable | None = None) -> Tensor:
    """Score the catalogue for users: the actor's k best unseen items re-ranked with the critic (a recommender)."""
    state = history.last_states(user_ids)
    proto_action = actor(state) if term is None else actor(state) + term(history, user_ids)
    log_p = evaluation.mask_seen(log_policy(proto_action, history.items), history, user_ids).to(state.device)
    candidates = log_p.topk(min(k, log_p.shape[1])).indices
    at_once = max(1, (1 << 16) // candidates.shape[1])  # users: each candidate is a vector of its own in the critic
    q = torch.cat([critic.among(some, history.items[rows]) for some, rows in zip(
        state.split(at_once), candidates.split(at_once), strict=True)])
    return rerank(log_p.clamp(min=-1e6), q, candidates, beta)
