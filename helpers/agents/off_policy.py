"""What the lesson cells of notes/10b_off_policy.ipynb define; `make agents` writes it."""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from helpers.agents.evaluation import over_users
from helpers.frames import Frames
from helpers.losses import polyak, squared_error
from helpers.networks import Critic


def off_policy(reward: np.ndarray, weight: np.ndarray, model_logged: np.ndarray, model_policy: np.ndarray,
               user: np.ndarray | None = None) -> dict[str, float]:
    """Return the estimates of a policy's mean reward, all arguments (N,), and what they rest on.

    model_logged: r̂ of the logged action. model_policy: Σ π(a|s)·r̂(s, a). user: whose case it is; by default
    everybody has one.
    """
    terms = model_policy + weight * (reward - model_logged)
    low, high = over_users(terms, np.arange(len(terms)) if user is None else user)
    return {"model alone": model_policy.mean(), "IPS": (weight * reward).mean(),
            "SN": (weight * reward).sum() / weight.sum(), "DR": terms.mean(), "DR low": low, "DR high": high,
            "mean weight": weight.mean(), "effective cases": weight.sum() ** 2 / (weight ** 2).sum()}


def fqe_update(agent: dict, frames: Frames, index: Tensor, *, choose, gamma: float, tau: float) -> dict[str, Tensor]:
    """Make one step of fitted Q evaluation of the policy `choose`: state (B, …) → action (B, E)."""
    t = frames.gather(index)
    with torch.no_grad():
        y = t.reward + gamma * agent["critic_target"](t.next_state, choose(t.next_state)).float() if gamma else t.reward
    loss = squared_error(agent["critic"](t.state, t.action), y)
    agent["optimiser"].zero_grad()
    loss.backward()
    agent["optimiser"].step()
    polyak(agent["critic_target"], agent["critic"], tau)
    return {"loss/critic": loss}


def new_judge(seed: int, frames: Frames, learning_rate: float = 1e-3, **options) -> dict:
    """Return a fresh critic with its target and optimiser, the same for a seed."""
    torch.manual_seed(seed)
    critic = Critic(frames.frame_size, frames.embed_size, **options).to(frames.device)
    return {"critic": critic, "critic_target": deepcopy(critic).eval().requires_grad_(False),
            "optimiser": torch.optim.AdamW(critic.parameters(), learning_rate, weight_decay=1e-3)}
