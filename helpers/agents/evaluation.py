"""What the lesson cells of notes/10_evaluation.ipynb define; `make agents` writes it."""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from helpers.frames import Frames
from helpers.losses import polyak, squared_error
from helpers.networks import Critic


def off_policy(reward: np.ndarray, weight: np.ndarray, model_logged: np.ndarray,
               model_policy: np.ndarray) -> dict[str, float]:
    """Return the estimates of a policy's mean reward, all arguments (N,), and the effective sample size.

    model_logged: r̂ of the logged action. model_policy: Σ π(a|s)·r̂(s, a).
    """
    terms = model_policy + weight * (reward - model_logged)
    return {"model alone": model_policy.mean(), "IPS": (weight * reward).mean(),
            "SN": (weight * reward).sum() / weight.sum(), "DR": terms.mean(),
            "DR ±": 1.96 * terms.std(ddof=1) / len(terms) ** 0.5,
            "effective cases": weight.sum() ** 2 / (weight ** 2).sum()}


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
