"""Measure one update of DDPG beside a textbook loop and d3rlpy: `python -m benchmarks.agents`.

The same networks for all (actor 1290-256-256-128, critic 1418-256-256-1, ReLU), the same SYNTHETIC transitions, one
process, in turns. Ours is lesson 05's own `update` as the paper has it: the critic is asked about π(s), no behaviour
term. It gathers its batches itself; the others are handed theirs. d3rlpy is no requirement of the project: it is
installed into a folder of its own.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers import evaluation, recommenders, training
from helpers.agents import ddpg
from helpers.files import DEFAULT_DATASET, PROJECT, data_dir, replacing, write_json
from helpers.frames import Frames, Transition
from helpers.networks import Joint
from helpers.task import load_task
from tools.readme import replace_block

STATE, ACTION, HIDDEN, GAMMA, TAU, RATES = 1290, 128, 256, 0.9, 0.005, {"actor": 1e-4, "critic": 1e-3}
ROUNDS, STEPS = 15, {256: 8, 1024: 3}
HOME = data_dir("synthetic-ml-20m", PROJECT) / "d3rlpy"
NEEDS = ["d3rlpy==2.8.1", "gymnasium==1.0.0", "gym==0.26.2", "gym-notices", "farama-notifications", "structlog",
         "colorama", "dataclasses-json==0.6.7", "marshmallow<4", "typing-inspect", "mypy-extensions", "cloudpickle"]


class Critic(nn.Module):
    """The critic of all contestants, 1418-256-256-1."""

    def __init__(self, enter: nn.Linear):
        super().__init__()
        self.enter = enter
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        joint = isinstance(self.enter, Joint)
        return self.rest(self.enter(state, action) if joint else self.enter(torch.cat([state, action], dim=1)))


def networks(enter: nn.Linear, seed: int = 0) -> dict[str, nn.Module]:
    """Return actor, critic and their targets."""
    torch.manual_seed(seed)
    pair = {"actor": nn.Sequential(nn.Linear(STATE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                                   nn.Linear(HIDDEN, ACTION)), "critic": Critic(enter)}
    return pair | {f"{name}_target": deepcopy(net).requires_grad_(False) for name, net in pair.items()}


def synthetic_frames(n_users: int = 1_000, n_ratings: int = 100, n_items: int = 1_682) -> Frames:
    """Return transitions of SYNTHETIC ratings and item vectors."""
    rng, n = np.random.default_rng(0), n_users * n_ratings
    ratings = pd.DataFrame({"user_id": np.repeat(np.arange(n_users), n_ratings), "timestamp": np.arange(n),
                            "item_id": rng.integers(n_items, size=n), "rating": rng.integers(1, 11, size=n) / 2})
    return Frames(ratings, np.arange(n_items), rng.normal(size=(n_items, ACTION)).astype(np.float32))


def free_point(proto_action: Tensor, items: Tensor) -> Tensor:
    return proto_action


def ours(frames: Frames) -> Callable[[Tensor, Transition], object]:
    """Return lesson 05's update, batches gathered by itself."""
    agent = networks(Joint(STATE, ACTION, HIDDEN))
    for name, rate in RATES.items():
        agent[f"{name}_optimiser"] = torch.optim.AdamW(agent[name].parameters(), rate, weight_decay=1e-4, fused=True)
    update = ddpg.update
    return lambda index, batch: update(agent, frames, index, gamma=GAMMA, tau=TAU, decay=0.7, behaviour_weight=0.0,
                                       as_action=free_point)


def loop() -> Callable[[Tensor, Transition], object]:
    """Return the update as textbooks write it."""
    net = networks(nn.Linear(STATE + ACTION, HIDDEN))
    optimiser = {name: torch.optim.Adam(net[name].parameters(), rate) for name, rate in RATES.items()}

    def step(index: Tensor, t: Transition) -> Tensor:
        with torch.no_grad():
            y = t.reward + GAMMA * net["critic_target"](t.next_state, net["actor_target"](t.next_state))
        loss = nn.functional.mse_loss(net["critic"](t.state, t.action), y)
        optimiser["critic"].zero_grad()
        loss.backward()
        optimiser["critic"].step()
        value = -net["critic"](t.state, net["actor"](t.state)).mean()
        optimiser["actor"].zero_grad()
        value.backward()
        optimiser["actor"].step()
        for name in RATES:
            for target, source in zip(net[f"{name}_target"].parameters(), net[name].parameters(), strict=True):
                target.data.copy_(TAU * source.data + (1 - TAU) * target.data)
        return loss
    return step


def d3rlpy() -> Callable[[Tensor, Transition], object]:
    """Return d3rlpy's own update, on batches already made."""
    sys.path.append(str(HOME))
    import d3rlpy
    from d3rlpy.torch_utility import TorchMiniBatch
    config = d3rlpy.algos.DDPGConfig(batch_size=256, gamma=GAMMA, tau=TAU, actor_learning_rate=RATES["actor"],
                                     critic_learning_rate=RATES["critic"])
    algorithm = config.create(device="cpu:0")
    algorithm.create_impl((STATE,), ACTION)
    shapes = [tuple(p.shape) for p in algorithm.impl.modules.q_funcs[0].parameters() if p.ndim == 2]
    assert shapes == [(HIDDEN, STATE + ACTION), (HIDDEN, HIDDEN), (1, HIDDEN)], shapes
    made = {"steps": 0}

    def step(index: Tensor, t: Transition) -> object:
        made["steps"] += 1
        return algorithm.impl.update(TorchMiniBatch(t.state, t.action, t.reward, t.next_state, t.action, t.reward,
                                                    torch.zeros_like(t.done), torch.ones_like(t.done), "cpu:0"),
                                     made["steps"])
    return step


def products(batch_size: int) -> list[tuple[int, int, int]]:
    """Return (m, k, n) of the products of one update, gradients of inputs that nobody wants left out.

    A first layer of the critic counts as two, of state and action. What they cost together is 2·Σ m·k·n operations.
    """
    actor = [(STATE, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, ACTION)]
    enter, later = [(STATE, HIDDEN), (ACTION, HIDDEN)], [(HIDDEN, HIDDEN), (HIDDEN, 1)]

    def forward(layers):
        return [(batch_size, wide, out) for wide, out in layers]

    def of_weights(layers):
        return [(out, batch_size, wide) for wide, out in layers]

    def of_inputs(layers):
        return [(batch_size, out, wide) for wide, out in layers]
    targets = forward(actor + enter + later)
    critic_step = forward(enter + later) + of_weights(enter + later) + of_inputs(later)
    actor_step = (forward(actor + enter + later) + of_inputs(enter[1:] + later)
                  + of_weights(actor) + of_inputs(actor[1:]))
    return targets + critic_step + actor_step


def multiplying(batch_size: int) -> Callable[[Tensor, Transition], object]:
    """Return the products of an update alone, in float32, into memory that is there."""
    operands = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in products(batch_size)]
    return lambda index, batch: [torch.mm(x, y, out=out) for x, y, out in operands]


def in_turns(batch_size: int, frames: Frames) -> dict[str, list[float]]:
    """Return seconds an update, by way and round: the ways take turns, the first one changing."""
    generator = torch.Generator().manual_seed(0)
    index = [torch.randint(len(frames), (batch_size,), generator=generator) for _ in range(STEPS[batch_size])]
    made = [Transition(*(field.clone() for field in frames.gather(i))) for i in index]
    ways = {"ours": (ours(frames), True), "ours, float32": (ours(frames), False), "textbook loop": (loop(), False),
            "textbook loop, bfloat16": (loop(), True), "d3rlpy 2.8.1": (d3rlpy(), False),
            "float32 products alone": (multiplying(batch_size), False)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name in sorted(ways, reverse=bool(turn % 2)):
            way, half = ways[name]
            with training.autocast("cpu") if half else contextlib.nullcontext():
                started = time.perf_counter()
                for i, batch in zip(index, made, strict=True):
                    way(i, batch)
                if turn:  # the first round warms up
                    seconds[name].append((time.perf_counter() - started) / len(index))
    return seconds


def updates() -> dict:
    """Measure the updates at both batch sizes."""
    frames, rows = synthetic_frames(), {}
    for batch_size in STEPS:
        for name, rounds in in_turns(batch_size, frames).items():
            rows[f"{name}, batch {batch_size}"] = {"seconds": median(rounds), "rounds": rounds}
    return rows


def data_path() -> dict:
    """Measure a whole step of lesson 05's training and the part of it that draws and gathers the batch."""
    lesson, frames = ddpg, synthetic_frames()
    agent = lesson.new_agent(0, 10, ACTION, 1e-3)
    seconds: dict[str, list[float]] = {"data": [], "step": []}
    for turn in range(4):
        batches = frames.sample(512, seed=turn)
        for _ in range(40):
            started = time.perf_counter()
            index = next(batches)
            frames.gather(index), frames.next_items(index, 5)
            gathered = time.perf_counter()
            with training.autocast("cpu"):
                lesson.update(agent, frames, index, gamma=GAMMA, tau=0.01, decay=0.7)
            if turn:
                seconds["data"].append(gathered - started)
                seconds["step"].append(time.perf_counter() - gathered)  # gathers once more, itself
    return {f"lesson 05, {name}, batch 512": {"seconds": median(rounds)} for name, rounds in seconds.items()}


def ndcg(steps: int = 400, seeds: tuple[int, ...] = (0, 1, 2)) -> dict:
    """Train lesson 05's agent in float32 and with bfloat16 products, and rank validation: needs data/ml-100k."""
    lesson, task = ddpg, load_task(DEFAULT_DATASET)
    rows = {}
    for half in (False, True):
        scores = []
        for seed in seeds:
            agent = lesson.new_agent(seed, 10, ACTION, 1e-3)
            training.fit(partial(lesson.update, agent, task.frames, gamma=GAMMA, tau=0.01, decay=0.7), task.frames,
                         agent, batch_size=512, max_steps=steps, seed=seed, bf16=half)
            policy = recommenders.policy(agent["actor_target"])
            scores.append(evaluation.ndcg(policy, task.history, task.split.valid))
        rows[f"validation NDCG@10, {'bfloat16 products' if half else 'float32'}"] = {
            "mean": float(np.mean(scores)), "std": float(np.std(scores, ddof=1)), "runs": scores}
    return rows


PROCESSES = [updates, data_path, ndcg]


def ratios(rows: dict) -> dict:
    """Return how the rows compare; more than 1 means that ours is faster. Paired by round, then the median."""
    def times(other: str, batch_size: int, way: str = "ours") -> float:
        pairs = zip(rows[f"{other}, batch {batch_size}"]["rounds"], rows[f"{way}, batch {batch_size}"]["rounds"],
                    strict=True)
        return median(slow / fast for slow, fast in pairs)
    result = {}
    for suffix, way in (("", "ours"), ("_float32", "ours, float32")):
        for short, other in (("loop", "textbook loop"), ("d3rlpy", "d3rlpy 2.8.1")):
            result |= {f"ddpg_vs_{short}_{size}{suffix}": times(other, size, way) for size in STEPS}
    result |= {f"ddpg_vs_loop_{size}_both_bfloat16": times("textbook loop, bfloat16", size) for size in STEPS}
    data, step = (rows[f"lesson 05, {name}, batch 512"]["seconds"] for name in ("data", "step"))
    return result | {"share_of_gemm_1024": times("float32 products alone", 1024, "ours, float32"),
                     "data_share_of_step": data / step}


def bf16_ndcg(rows: dict) -> dict:
    """Return what bfloat16 products change in validation NDCG@10, beside how much the seeds differ."""
    float32, half = rows["validation NDCG@10, float32"], rows["validation NDCG@10, bfloat16 products"]
    return {"float32": float32["mean"], "bfloat16": half["mean"], "difference": half["mean"] - float32["mean"],
            "std_over_seeds": max(float32["std"], half["std"])}


def table(result: dict) -> str:
    """Return the README's table in Markdown."""
    lines = ["| one update of DDPG (SYNTHETIC transitions) | batch 256, ms | batch 1024, ms |", "| --- | ---: | ---: |"]
    for name in ("ours", "ours, float32", "textbook loop", "textbook loop, bfloat16", "d3rlpy 2.8.1",
                 "float32 products alone"):
        cells = [f"{1000 * result['rows'][f'{name}, batch {size}']['seconds']:.1f}" for size in STEPS]
        label = "ours, bfloat16 products" if name == "ours" and result["bfloat16"] else name
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prepare() -> None:
    """Install d3rlpy into a folder of its own."""
    if not HOME.exists():
        with replacing(HOME) as beside:
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside),
                            *NEEDS], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    named = {process.__name__: process for process in PROCESSES}
    parser.add_argument("process", nargs="?", choices=named, help="run this one alone and print its rows")
    chosen = parser.parse_args().process
    prepare()
    if chosen:
        print(json.dumps(named[chosen]()))
        return
    rows = {}
    for name in tqdm(named, desc="bench", unit="process"):
        done = subprocess.run([sys.executable, "-m", "benchmarks.agents", name], capture_output=True, text=True,
                              cwd=PROJECT)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        rows |= json.loads(done.stdout.splitlines()[-1])
    result = {"data": "SYNTHETIC transitions; NDCG of ml-100k", "threads": torch.get_num_threads(),
              "bfloat16": training.autocast("cpu")._enabled, "rows": rows, "ratios": ratios(rows),
              "bf16_ndcg": bf16_ndcg(rows)}
    write_json(PROJECT / "res" / "bench_agents.json", result)
    replace_block("agents", table(result))
    print(table(result), *(f"{name:<32}{value:10.2f}" for name, value in result["ratios"].items()), sep="\n")


if __name__ == "__main__":
    main()
