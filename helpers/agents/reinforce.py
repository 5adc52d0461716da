"""What the lesson cells of notes/16_reinforce.ipynb define; `make agents` writes it."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import evaluation
from helpers.agents import ddpg
from helpers.agents import foresight as acting
from helpers.extra import foresight
from helpers.frames import Frames
from helpers.losses import log_policy, polyak, sampled_items


def written_log(world: foresight.World, habits: foresight.Habits, actor: nn.Module, items: Tensor, user: Tensor,
                k: int, seed: int = 5) -> acting.Sessions:
    """Return what people do with slates of k films drawn from an actor's softmax; log_b is known."""
    policy = acting.softly(actor, items)
    return acting.Sessions(items, acting.act_in(world, habits, policy, acting.last_taken, user, seed, k))


def fit_behaviour(frames: Frames | acting.Sessions, seed: int, steps: int, **options) -> nn.Module:
    """Return an actor fitted to the films of a log: its softmax estimates β."""
    agent = ddpg.new_agent(seed, frames.frame_size, frames.embed_size, 3e-3, device=str(frames.device), **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="behaviour head", leave=False):
        index = torch.randint(len(frames), (min(512, len(frames)),), generator=generator)
        ddpg.update(agent, frames, index, gamma=0.0, tau=0.05, decay=1.0, future=1, value_weight=0.0)
    return agent["actor_target"]


@torch.no_grad()
def log_chances(actor: nn.Module, frames: Frames | acting.Sessions, steps: Tensor, block: int = 1024) -> Tensor:
    """Return (B,) log-probabilities of the logged films of these steps (B,), by an actor's softmax."""
    chances = []
    for index in steps.split(block):
        items, item = sampled_items(frames.items, frames.next_items(index))  # of a small catalogue all
        chances.append(log_policy(actor.eval()(frames.gather(index).state), items).gather(1, item)[:, 0])
    return torch.cat(chances)


def drawn_update(agent: dict, played: acting.Sessions, index: Tensor, *, returns: Tensor, head: nn.Module, tau: float,
                 cap: float, k: int) -> dict:
    """Make one step as in 2019: π of one film drawn anew, β of another. Shown for what it does; not to be used."""
    t = played.gather(index)
    log_pi = log_policy(agent["actor"](t.state), played.items)
    with torch.no_grad():
        log_b = log_policy(head(t.state), played.items)
    mine, other = (torch.multinomial(log_p.detach().exp(), 1) for log_p in (log_pi, log_b))
    chosen = log_pi.gather(1, mine)
    weight = acting.top_k_weight(chosen.detach(), log_b.gather(1, other), cap, k)
    ddpg.descend(agent["actor_optimiser"], -(weight * returns[index][:, None] * chosen).mean())
    polyak(agent["actor_target"], agent["actor"], tau)
    return {}


def weighted_imitation(agent: dict, played: acting.Sessions, index: Tensor, *, weight: Tensor, tau: float) -> dict:
    """Make one step of imitation of the logged films, each with its weight (N,)."""
    log_pi = log_policy(agent["actor"](played.gather(index).state), played.items)
    loss = -(weight[index] * log_pi.gather(1, played.item[index][:, None])[:, 0]).mean()
    ddpg.descend(agent["actor_optimiser"], loss)
    polyak(agent["actor_target"], agent["actor"], tau)
    return {}


def learner_of(name: str, log: acting.Sessions, first: nn.Module, settings: acting.ForesightSettings, agent: dict,
               head: nn.Module) -> Callable[[Tensor], dict]:
    """Return index → one step of learning from a log; names as in res/reinforce.json."""
    kind, _, rest = name.partition(", ")
    gamma = 0.0 if "γ = 0" in rest else settings.gamma
    returns, fixed = acting.returns_of(log.taken, log.last, gamma), dict(tau=settings.tau)
    if kind == "imitation":
        weight = log.taken.float() if "taken" in rest else returns / returns.mean()
        return partial(weighted_imitation, agent, log, weight=weight, **fixed)
    if "drawn apart" in rest:
        return partial(drawn_update, agent, log, returns=returns, head=deepcopy(first).eval(), cap=settings.cap,
                       k=settings.k, **fixed)
    settings = replace(settings, k=1 if "K = 1" in rest else settings.k)
    if "no weights" in rest:  # min(1, π/β) = 1
        settings = replace(settings, cap=1.0)
        log = acting.Sessions(log.items, [*log.parts[:-1], torch.full_like(log.log_b, -1e3)])
    if "β estimated" in rest:
        log = acting.Sessions(log.items, [*log.parts[:-1], log_chances(head, log, torch.arange(len(log)))])
    step = acting.update_of(kind, agent, log, settings, gamma)
    held = {"Rainbow": {"penalty": 1.0}, "REINFORCE": {}}.get(kind, {"behaviour_weight": 1.0})  # to the log
    return partial(step, **held)


def first_films(actor: nn.Module, world: foresight.World, items: Tensor, user: Tensor, k: int = 10) -> Tensor:
    """Return (U, k): what an actor would show each of user (U,) first."""
    visits = foresight.Visits(world, foresight.HABITS, user)
    with torch.no_grad():
        return foresight.best_unseen(acting.greedily(actor, items)(visits), visits, k)


def learn_from_log(name: str, log: acting.Sessions, start: dict, world: foresight.World, user: Tensor, steps: int,
                   settings: acting.ForesightSettings, head: nn.Module, seed: int = 0,
                   look_every: int = 50) -> tuple[nn.Module, pd.Series]:
    """Return (actor, number of films on the first ten of user (U,), by step) after learning from a log."""
    agent, generator, films = deepcopy(start), torch.Generator().manual_seed(seed), {}
    step = learner_of(name, log, start["actor"], settings, agent, head)
    torch.manual_seed(seed)
    for k in tqdm(range(steps + 1), desc=name, leave=False):
        if k % look_every == 0 or k == steps:
            films[k] = len(first_films(agent["actor_target"], world, log.items, user).unique())
        agent["actor"].train()
        step(torch.randint(len(log), (settings.batch_size,), generator=generator))
    return agent["actor_target"], pd.Series(films, name=name)


def rivals_of(known: pd.DataFrame, world: foresight.World, log: acting.Sessions) -> dict[str, foresight.Policy]:
    """Return lists and oracles: of other people's logs, and of this one: films by their mean reward, shrunk."""
    shown = torch.zeros(len(world.item_ids)).index_add(0, log.item, torch.ones(len(log)))
    above = torch.zeros(len(world.item_ids)).index_add(0, log.item, log.taken.float() - log.taken.float().mean())
    mean = above / (shown + 20)
    return acting.bounds(known, world.item_ids) | {
        "mean reward of a film in the log": lambda visits: mean.expand(visits.shown.shape),
        "myopic oracle": foresight.myopic}


def draw_from_log(rows: pd.DataFrame) -> plt.Figure:
    """Draw the films taken in a visit by policy, with intervals, and how many films each shows."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.28 * len(rows) + 1), sharey=True, layout="constrained")
    at = np.arange(len(rows))[::-1]
    colour = ["C0" if policy.startswith("REINFORCE") else "C7" for policy in rows["policy"]]
    left.barh(at, rows["reward"], color=colour, alpha=0.7,
              xerr=[rows["reward"] - rows["low"], rows["high"] - rows["reward"]], ecolor="k", capsize=2)
    right.barh(at, rows["films"], color=colour, alpha=0.7)
    left.set(yticks=at, yticklabels=rows["policy"], xlabel="films taken in a visit, 95 % over people")
    right.set(xlabel="different films on all first tens")
    return figure


def reinforce_on(frames: Frames, head: nn.Module, steps: int, settings: acting.ForesightSettings, gamma: float = 0.9,
                 seed: int = 0) -> nn.Module:
    """Return an actor that began as the behaviour head and learnt from the returns of the logs."""
    agent = ddpg.new_agent(seed, frames.frame_size, frames.embed_size, settings.learning_rate,
                           device=str(frames.device), encoder=settings.encoder)
    agent |= {"actor": deepcopy(head).requires_grad_(True), "actor_target": deepcopy(head)}
    agent["actor_optimiser"] = torch.optim.AdamW(agent["actor"].parameters(), settings.learning_rate, fused=True)
    returns = evaluation.observed_returns(frames, gamma)[0].to(frames.device)
    log_b = torch.zeros_like(returns)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="REINFORCE", leave=False):
        index = torch.randint(len(frames), (min(settings.batch_size, len(frames)),), generator=generator)
        log_b[index] = log_chances(head, frames, index)  # of these alone: the log may be long
        agent["actor"].train()
        acting.reinforce_update(agent, frames, index, returns=returns, log_b=log_b, tau=settings.tau, cap=settings.cap,
                                entropy=settings.entropy, k=10)
    return agent["actor_target"].eval()
