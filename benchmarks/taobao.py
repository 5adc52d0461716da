"""Foresight in a world that others made: `python -m benchmarks.taobao --copy FOLDER`; FOLDER holds Virtual Taobao.

As published, where leaving hears nothing, and with leaving by repetition (κ = 0 and 2). Lesson 05's DDPG learns by
acting, with γ = 0.9 and with γ = 0, beside rules that know the networks. What a rule or an agent chooses by is played
with people of other seeds than those who judge. Rows: repetition, policy, seeds, reward (clicks of a visit) with its
95 % interval over people, pages. Writes res/taobao.json; some ten minutes on one core.
"""

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from helpers import evaluation
from helpers.agents import ddpg
from helpers.extra import taobao
from helpers.files import DEFAULT_DATASET, res_dir, write_json
from helpers.frames import Transition
from helpers.losses import polyak
from tools.readme import replace_block

REPETITIONS, GAMMAS, SEEDS, PEOPLE, JUDGE_SEED = (0.0, 2.0), (0.9, 0.0), (0, 1, 2), 1_000, 99
ROUNDS, VISITORS, UPDATES, BATCH_SIZE, KEEP, NOISE, TAU = 100, 200, 100, 256, 60_000, 0.2, 0.005
RATES = {"actor": 1e-4, "critic": 1e-3}
STARTS = 12  # of the search for a person's best actions
Policy = Callable[[taobao.Visits], Tensor]  # → actions (B, 27)


def play(shop: taobao.Taobao, policy: Policy, people: int, seed: int, repetition: float) -> np.ndarray:
    """Return (2, people): clicks and pages of a visit of each."""
    visits = taobao.Visits(shop, people, seed, repetition)
    clicks, pages = torch.zeros(people), torch.zeros(people)
    while visits.here.any():
        pages += visits.here
        clicks += visits.step(policy(visits))[0]
    return torch.stack([clicks, pages]).numpy()


def climbed(gain: Callable[[Tensor], Tensor], start: Tensor, steps: int = 100) -> Tensor:
    """Return actions of the shape of `start`, in [−1, 1], after gradient ascent on the sum of their gains."""
    raw = start.clamp(-0.95, 0.95).atanh().requires_grad_(True)
    optimiser = torch.optim.Adam([raw], 0.05)
    for _ in range(steps):
        ddpg.descend(optimiser, -gain(raw.tanh()).sum())
    return raw.detach().tanh()


def towards_ten(shop: taobao.Taobao, person: Tensor, action: Tensor) -> Tensor:
    """Return log p of ten clicks (B,), of an early and a later page: unlike the clicks it has a slope everywhere."""
    pages = (torch.full((len(person), 1), page) for page in (0.0, 10.0))
    logits = (shop.clicks_of(person, page, action)[:, :taobao.MOST_CLICKS + 1] for page in pages)
    return sum(each.log_softmax(dim=1)[:, -1] for each in logits) / 2


def best_constant(shop: taobao.Taobao, seed: int = 0) -> Tensor:
    """Return the action (27,) with most expected clicks over people, the same for everyone."""
    person = taobao.Visits(shop, 500, seed).person
    starts = torch.rand(STARTS, taobao.ACTION, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def gain(action: Tensor) -> Tensor:
        return torch.stack([towards_ten(shop, person, one.expand(len(person), -1)).mean() for one in action])
    ends = climbed(gain, starts)
    earned = [float(shop.expected_clicks(person, torch.zeros(len(person), 1), one.expand(len(person), -1)).mean())
              for one in ends]
    return ends[int(np.argmax(earned))]


class Knowing:
    """Rules that know the networks: the best actions that `STARTS` searches find for each person."""

    def __init__(self, shop: taobao.Taobao, way: str, pull: float = 0.0):
        self.shop, self.way, self.pull, self.visits = shop, way, pull, None
        self.generator = torch.Generator().manual_seed(0)

    def meet(self, visits: taobao.Visits) -> None:
        """Search for actions (B, n, 27) of new people: alone, and in pairs that are unlike each other."""
        person, b = visits.person, len(visits.person)
        start = torch.rand(STARTS, b, taobao.ACTION, generator=self.generator) * 2 - 1
        alone = climbed(lambda a: torch.stack([towards_ten(self.shop, person, one) for one in a]), start)

        def together(pair: Tensor) -> Tensor:
            like = torch.cosine_similarity(pair[0], pair[1], dim=1)
            return sum(towards_ten(self.shop, person, one) for one in pair) - 10 * (like + taobao.MEMORY).clamp(min=0)
        best = torch.stack([towards_ten(self.shop, person, one) for one in alone]).argmax(dim=0)
        first = alone[best, torch.arange(b)]
        pair = climbed(together, torch.stack([first, -first]), steps=200)
        self.visits, self.actions = visits, torch.cat([alone, pair])

    def __call__(self, visits: taobao.Visits) -> Tensor:
        if visits is not self.visits:
            self.meet(visits)
        if self.way == "in turn":
            return self.actions[STARTS + int(visits.page[0]) % 2]
        clicks = torch.stack([self.shop.expected_clicks(visits.person, visits.page, one) for one in self.actions])
        if self.way == "drawn":  # of those that are within a tenth of a click of the best
            luck = torch.rand(clicks.shape, generator=self.generator)
            clicks = torch.where(clicks >= clicks.amax(dim=0) - 0.1, luck, -1)
        if self.pull:
            clicks = clicks + self.pull * torch.stack([visits.staying(one) for one in self.actions])
        return self.actions[clicks.argmax(dim=0), torch.arange(len(visits.person))]


class Network(nn.Sequential):
    """Rows of numbers → rows of numbers; of a state, or of a state and an action."""

    def __init__(self, n_in: int, n_out: int, *last: nn.Module):
        super().__init__(nn.Linear(n_in, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.LayerNorm(128),
                         nn.ReLU(), nn.Linear(128, n_out), *last)
        with torch.no_grad():
            self[6].weight.mul_(0.1)

    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(torch.cat(parts, dim=1))


def new_agent(seed: int) -> dict:
    """Return actor, critic, their targets and optimisers, as lesson 05's functions take them."""
    torch.manual_seed(seed)
    agent = {"actor": Network(taobao.STATE, taobao.ACTION, nn.Tanh()),
             "critic": Network(taobao.STATE + taobao.ACTION, 1)}
    agent |= {f"{name}_target": deepcopy(net).requires_grad_(False) for name, net in agent.items()}
    return agent | {f"{name}_optimiser": torch.optim.Adam(agent[name].parameters(), rate)
                    for name, rate in RATES.items()}


def update(agent: dict, t: Transition, gamma: float) -> None:
    """Make one step of lesson 05's DDPG without its behaviour term; a person who has left does not come back."""
    def as_it_is(action: Tensor, items: None) -> Tensor:
        return action
    ddpg.descend(agent["critic_optimiser"], ddpg.critic_loss(agent, t, None, gamma, as_it_is, stop_at_done=True)[0])
    ddpg.descend(agent["actor_optimiser"], -ddpg.value_term(agent, t, agent["actor"](t.state), None, as_it_is)[0])
    for name in ("actor", "critic"):
        polyak(agent[f"{name}_target"], agent[name], TAU)


def learnt(shop: taobao.Taobao, repetition: float, gamma: float, seed: int) -> tuple[np.ndarray, list[float]]:
    """Return what `play` says of an agent that learnt by acting, and its clicks a visit by round, with its noise."""
    torch.set_num_threads(1)
    agent, generator, stored, curve = new_agent(seed), torch.Generator().manual_seed(seed), None, []
    for k in range(ROUNDS):
        visits, steps = taobao.Visits(shop, VISITORS, 10_000 * seed + k, repetition), []
        while visits.here.any():
            state, here = visits.states, visits.here.clone()
            with torch.no_grad():
                action = agent["actor"](state)
            action = (action + NOISE * torch.randn(action.shape, generator=generator)).clamp(-1, 1)
            clicks, left = visits.step(action)
            t = Transition(state, action, clicks[:, None] / 10, visits.states, left.float()[:, None])
            steps.append([part[here] for part in t])
        new = [torch.cat(part) for part in zip(*steps, strict=True)]
        stored = new if stored is None else [torch.cat(pair)[-KEEP:] for pair in zip(stored, new, strict=True)]
        curve.append(10 * float(new[2].sum()) / VISITORS)
        for _ in range(UPDATES):
            index = torch.randint(len(stored[0]), (BATCH_SIZE,), generator=generator)
            update(agent, Transition(*(part[index] for part in stored)), gamma)
    with torch.no_grad():
        return play(shop, lambda visits: agent["actor"](visits.states), PEOPLE, JUDGE_SEED, repetition), curve


def rules(shop: taobao.Taobao, repetition: float) -> dict[str, Policy]:
    """Return what does not learn by acting; the planner's pull is chosen with people who do not judge."""
    generator, constant = torch.Generator().manual_seed(0), best_constant(shop)
    pulls = {pull: Knowing(shop, "pull", pull) for pull in (0.0, 3.0, 10.0, 30.0)}
    pulls |= {-1.0: Knowing(shop, "in turn")}
    best = max(pulls, key=lambda pull: play(shop, pulls[pull], 300, 7, repetition)[0].mean())
    return {"random": lambda visits: torch.rand(len(visits.here), taobao.ACTION, generator=generator) * 2 - 1,
            "best constant action": lambda visits: constant.expand(len(visits.here), -1),
            "myopic oracle": Knowing(shop, "pull"), "equally good actions, drawn": Knowing(shop, "drawn"),
            "planner": pulls[best]}


def row_of(name: str, repetition: float, runs: list[np.ndarray], **more: object) -> dict:
    clicks, pages = np.mean(runs, axis=0)
    low, high = evaluation.bootstrap(clicks)
    return {"repetition": repetition, "policy": name, "seeds": len(runs), "reward": clicks.mean(), "low": low,
            "high": high, "pages": pages.mean(), **more}


def table(rows: list[dict]) -> str:
    """Return docs/results.md's table."""
    at = pd.DataFrame(rows).set_index(["policy", "repetition"])["reward"].unstack(sort=False)
    lines = [f"| clicks of a visit | {' | '.join(f'κ = {kappa:g}' for kappa in at)} |",
             "| --- |" + " ---: |" * at.shape[1]]
    lines += [f"| {name} | {' | '.join(f'{value:.1f}' for value in row)} |" for name, row in at.iterrows()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copy", type=Path, required=True, help="a clone of github.com/eyounx/VirtualTaobao")
    parser.add_argument("--lanes", type=int, default=2, help="trainings at a time, one thread each")
    options = parser.parse_args()
    shop, rows = taobao.read_taobao(options.copy), []
    with ProcessPoolExecutor(options.lanes, mp_context=get_context("spawn")) as pool:
        jobs = {(kappa, gamma): [pool.submit(learnt, shop, kappa, gamma, seed) for seed in SEEDS]
                for kappa in REPETITIONS for gamma in GAMMAS}
        for kappa in REPETITIONS:
            for name, policy in rules(shop, kappa).items():
                rows.append(row_of(name, kappa, [play(shop, policy, PEOPLE, JUDGE_SEED, kappa)]))
                print(rows[-1], flush=True)
            users = {gamma: [job.result() for job in jobs[kappa, gamma]] for gamma in GAMMAS}
            for gamma, runs in users.items():
                both = [np.mean([clicks for (clicks, _), _ in users[one]], axis=0) for one in (gamma, 0.0)]
                low, high = evaluation.bootstrap(both[0] - both[1])
                more = {"gain": (both[0] - both[1]).mean(), "gain low": low, "gain high": high} if gamma else {}
                rows.append(row_of(f"DDPG, γ = {gamma:g}", kappa, [run for run, _ in runs], **more, **{
                    "reward by seed": [run[0].mean() for run, _ in runs],
                    "last rounds": [np.mean(curve[-10:]) for _, curve in runs]}))
                print(rows[-1], flush=True)
            store(rows)


def store(rows: list[dict]) -> None:
    """Write res/taobao.json and the table of docs/results.md."""
    result = {"people": PEOPLE, "rounds": ROUNDS, "visitors": VISITORS, "updates": UPDATES,
              "rows": json.loads(json.dumps(rows, default=float))}
    write_json(res_dir(DEFAULT_DATASET, committed=True) / "taobao.json", result)
    replace_block("taobao", table(rows))


if __name__ == "__main__":
    main()
