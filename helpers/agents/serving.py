"""What the lesson cells of notes/05b_serving.ipynb define; `make agents` writes it."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import evaluation, training
from helpers.agents.ddpg import critic_loss, descend
from helpers.frames import Frames, reward_of, to_autocast
from helpers.losses import SampledItems, log_policy, sampled_items
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


def drawn_item(proto_action: Tensor, items: Tensor | SampledItems) -> Tensor:
    """Return the vector of an item drawn from the policy for each state: proto_action (B, E), items (n, E) → (B, E)."""
    row = torch.multinomial(log_policy(proto_action, items).exp(), 1)[:, 0]
    return (items.vectors if isinstance(items, SampledItems) else items)[row]


def fqe_step(agent: dict, frames: Frames, index: Tensor, gamma: float) -> dict[str, Tensor]:
    """Make one step of fitted Q evaluation: the critic learns what the agent's target actor is worth."""
    items, _ = sampled_items(frames.items, frames.next_items(index))
    loss, q = critic_loss(agent, to_autocast(frames.gather(index)), items, gamma, as_action=drawn_item)
    descend(agent["critic_optimiser"], loss)
    return {"loss/critic": loss, "Q/logged action": q.mean()}


def mean_return(frames: Frames, gamma: float) -> float:
    """Return the return of who gives the mean reward for ever."""
    return float(reward_of(frames.rating).mean()) / (1 - gamma)


def fit_fqe(agent: dict, frames: Frames, gamma: float, rounds: int, **how) -> pd.DataFrame:
    """Fit the critic in rounds, each towards a copy of what the last one came to; return what `training.fit` logged."""
    torch.nn.init.constant_(agent["critic"].body[-1].bias, mean_return(frames, gamma))
    logs = []
    for k in range(rounds):
        agent["critic_target"].load_state_dict(agent["critic"].state_dict())
        log = training.fit(partial(fqe_step, agent, frames, gamma=gamma), frames, agent, seed=k,
                           desc=f"FQE, round {k + 1} of {rounds}", **how)
        logs.append(log.set_axis(log.index + k * how["max_steps"]))
    agent["critic_target"].load_state_dict(agent["critic"].state_dict())
    return pd.concat(logs)
