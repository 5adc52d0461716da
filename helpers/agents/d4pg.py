"""What the lesson cells of notes/06_d4pg.ipynb define; `make agents` writes it."""

from collections import deque
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.agents import ddpg
from helpers.frames import Frames, Transition, to_autocast
from helpers.losses import (
    behaviour_loss,
    cross_entropy,
    log_policy,
    mean_item,
    mean_of,
    n_step,
    polyak,
    project,
    sampled_items,
)
from helpers.networks import Actor, Critic
from helpers.replay import Prioritised
from helpers.toy import STARS


def expected_value(critic: Critic, state: Tensor, action: Tensor, support: Tensor) -> Tensor:
    """Return E[Z(s, a)] (B, 1) of a categorical critic."""
    return mean_of(critic(state, action), support)


def d4pg_critic_loss(agent: dict, t: Transition, discount: Tensor, items: Tensor, support: Tensor) -> tuple:
    """Return (KL of target and critic (B,), E[Z(s, a)] (B, 1)); t over m steps, discount γᵐ (B, 1)."""
    with torch.no_grad():
        next_action = mean_item(agent["actor_target"](t.next_state), items)
        p = agent["critic_target"](t.next_state, next_action).float().softmax(dim=1)
        m = project(p, t.reward, discount, support)
    logits = agent["critic"](t.state, t.action)
    return cross_entropy(logits, m) - torch.special.entr(m).sum(dim=1), mean_of(logits, support)


def d4pg_update(agent: dict, frames: Frames, batch: Tensor | tuple[Tensor, Tensor], *, gamma: float, tau: float,
                decay: float, n: int, support: Tensor, future: int = 5, value_weight: float = 1.0,
                behaviour_weight: float = 1.0, stop_at_done: bool = False) -> dict:
    """Make one step of D4PG on a batch: index (B,), or (index, weights (B, 1)) drawn by agent["replay"]."""
    index, weights = batch if isinstance(batch, tuple) else (batch, torch.ones(len(batch), 1))
    t, discount = n_step(frames, index, n, gamma, stop_at_done)
    t = to_autocast(t)
    items, next_items = sampled_items(frames.items, frames.next_items(index, future))
    surprise, q = d4pg_critic_loss(agent, t, discount, items, support)
    l_z = (weights[:, 0].to(surprise.device) * surprise).mean()
    ddpg.descend(agent["critic_optimiser"], l_z)
    if isinstance(batch, tuple):
        agent["replay"].update(index, surprise)
    scalars, proto_action = {"loss/critic": l_z, "Q/logged action": q.mean()}, agent["actor"](t.state)
    agent["critic"].requires_grad_(False)
    q = expected_value(agent["critic"], t.state, mean_item(proto_action, items), support)
    agent["critic"].requires_grad_(True)
    scalars["Q/policy's action"], loss = q.mean(), -value_weight * q.mean() / q.abs().mean().detach()
    if behaviour_weight:
        scalars["loss/behaviour"] = behaviour_loss(log_policy(proto_action, items), next_items, decay)
        loss = loss + behaviour_weight * scalars["loss/behaviour"]
    ddpg.descend(agent["actor_optimiser"], loss)
    for name in ("actor", "critic"):
        polyak(agent[f"{name}_target"], agent[name], tau)
    return scalars | {"loss/actor": loss}


def new_d4pg_agent(seed: int, frame_size: int, embed_size: int, learning_rate: float, device: str = "cpu",
                   n_atoms: int = 51, replay_size: int | None = None, **actor_options) -> dict:
    """Return a fresh agent, the same for a seed; with `replay_size` it holds priorities of that many transitions."""
    agent = ddpg.new_agent(seed, frame_size, embed_size, learning_rate, device, **actor_options)
    critic = Critic(**{**agent["critic"].config, "n_atoms": n_atoms}).to(device)
    agent |= {"critic": critic, "critic_target": deepcopy(critic).eval().requires_grad_(False),
              "critic_optimiser": torch.optim.AdamW(critic.parameters(), learning_rate / 3, weight_decay=1e-4,
                                                    fused=True)}
    return agent if replay_size is None else agent | {"replay": Prioritised(replay_size, seed=seed)}


TOY = dict(frame_size=1, embed_size=3, hidden_size=64, dropout=0.0, item_dropout=0.0)


@torch.no_grad()
def act(weights: dict, seed: int, n_steps: int, noise: float, n_users: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Play the toy world with a policy's weights: (films, stars), both (n_users, n_steps + 1)."""
    actor, random = Actor(**TOY).eval(), torch.Generator().manual_seed(seed)
    actor.load_state_dict(weights)
    films, stars = [torch.randint(3, (n_users,), generator=random)], [torch.full((n_users,), 3.0)]
    for _ in range(n_steps):
        state = torch.cat([torch.eye(3)[films[-1]], stars[-1][:, None]], dim=1)
        explores = torch.rand(n_users, generator=random) < noise
        film = torch.where(explores, torch.randint(3, (n_users,), generator=random), actor(state).argmax(dim=1))
        films.append(film)
        stars.append(torch.as_tensor(STARS, dtype=torch.float32)[films[-2], film])
    return torch.stack(films, dim=1).numpy(), torch.stack(stars, dim=1).numpy()


def as_frames(logs: list[tuple[np.ndarray, np.ndarray]]) -> Frames:
    """Return the transitions of what actors played."""
    films, stars = (np.concatenate(part) for part in zip(*logs, strict=True))
    user, step = np.indices(films.shape)
    log = pd.DataFrame({"user_id": user.ravel(), "item_id": films.ravel(), "rating": stars.ravel(),
                        "timestamp": step.ravel()})
    return Frames(log, np.arange(3), np.eye(3, dtype=np.float32), frame_size=1)


def learn_from_actors(agent: dict, start: Callable, collect: Callable, noises: tuple[float, ...], *, rounds: int,
                      seed: int = 0, keep: int = 20, updates: int = 25, **how) -> pd.DataFrame:
    """Learn from `rounds` logs as they come in, and return the mean stars of each with its actor's noise.

    start: (weights, seed, noise) → ticket of a log under way; collect: tickets → (one that is done, its log).
    """
    buffer, met, generator = deque(maxlen=keep), [], torch.Generator().manual_seed(seed)
    at_work = {start(agent["actor"].state_dict(), 1_000 * seed + k, noise): noise for k, noise in enumerate(noises)}
    for k in range(rounds):
        ticket, log = collect(list(at_work))
        noise = at_work.pop(ticket)
        at_work[start(agent["actor"].state_dict(), 1_000 * seed + len(noises) + k, noise)] = noise
        buffer.append(log)
        met.append({"log": k, "noise": noise, "mean stars": log[1][:, 1:].mean()})
        if len(buffer) < len(noises):
            continue
        frames = as_frames(list(buffer))
        for _ in range(updates):
            d4pg_update(agent, frames, torch.randint(len(frames), (256,), generator=generator), **how)
    return pd.DataFrame(met)
