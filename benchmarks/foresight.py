"""Where foresight pays: `python -m benchmarks.foresight`, lesson 15's agents in six worlds; an hour, two cores.

Everything is chosen on the people whom agents learn on (β of the hand-made rule, the planner's trust); the others
judge once. Rows: impatience, memory, policy, seeds, reward with its 95 % interval over people, and for agents the
gain over the same agent with γ = 0 and over the rule, and that gain as a share of the planner's over the myopic
oracle. Writes res/foresight.json, world by world; agents that are there are not trained again.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
import pandas as pd
import torch

from helpers import datasets, evaluation, features
from helpers.agents import foresight as lesson
from helpers.extra import foresight
from helpers.files import DEFAULT_DATASET, data_dir, read_vectors, res_dir, write_json
from tools.readme import replace_block

WORLDS = ((0.0, 0.8), (1.0, 0.8), (2.0, 0.8), (4.0, 0.8), (4.0, 0.5), (4.0, 0.95))  # (κ, ρ)
SEEDS = (0, 1)
BETAS, WORLD_SEED, ROUNDS, REPEATS = (0.0, 1.0, 2.0, 4.0, 8.0), 1, 20, 6
SETTINGS = lesson.ForesightSettings()
GAMMAS = dict.fromkeys(("DDPG", "D4PG", "Rainbow", "REINFORCE"), SETTINGS.gamma) | {"model-based": SETTINGS.far}
AGENTS = [(kind, discount) for kind, gamma in GAMMAS.items() for discount in (gamma, 0.0)]


def log_of(dataset: str) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return (ratings, item ids (n,), content vectors (n, d))."""
    return (datasets.read_ratings(datasets.fetch(dataset)),
            *features.read_item_matrix(data_dir(dataset) / "embeddings_content.npz"))


@cache
def setting_of(dataset: str) -> lesson.Setting:
    """Return lesson 15's setting, made once in each process."""
    home, (ratings, ids, content) = data_dir(dataset), log_of(dataset)
    return lesson.setting_of(ratings, features.read_infos(home / "infos.json"), read_vectors(home / "texts_bert.p"),
                             ids, content, WORLD_SEED)


def judged(setting: lesson.Setting, habits: foresight.Habits, policy: foresight.Policy) -> np.ndarray:
    """Return (3, U): reward, length and stars above the own mean of each person who judges."""
    return foresight.play(setting.world, habits, policy, setting.judges, seed=99, repeats=REPEATS).to_numpy().T


def trained(dataset: str, kind: str, gamma: float, habits: foresight.Habits, seed: int) -> np.ndarray:
    """Return what `judged` says of an agent; in a process of its own."""
    torch.set_num_threads(1)
    setting = setting_of(dataset)
    if kind == "model-based":
        return judged(setting, habits, lesson.learn_models(gamma, setting.world, habits, *models_of(setting),
                                                           setting.learners, ROUNDS, SETTINGS, seed))
    agent, _ = lesson.learn_by_acting(kind, gamma, setting.world, habits, setting.frames, setting.learners, ROUNDS,
                                      SETTINGS, seed)
    return judged(setting, habits, lesson.greedily(agent["actor_target"], setting.frames.items))


def models_of(setting: lesson.Setting) -> tuple[foresight.Choice, foresight.Policy]:
    """Return models, of other people's logs, of what is taken and of what is liked."""
    ids = setting.world.item_ids
    return foresight.fit_choice(setting.known, ids, known=10), lesson.expected_liking(setting.known, ids,
                                                                                      setting.content)


def rules(setting: lesson.Setting, habits: foresight.Habits) -> dict[str, tuple[str, foresight.Policy]]:
    """Return name → (what was chosen for it, policy) of all that does not learn by acting."""
    choice, liking = models_of(setting)
    own = {beta: lesson.rule_of(choice, liking, beta) for beta in BETAS}
    beta, rule = lesson.best_of(own, setting.world, habits, setting.learners)
    trust, planner = lesson.planner_of(setting.world, habits, setting.learners)
    fixed = {name: ("", policy) for name, policy in lesson.bounds(setting.known, setting.world.item_ids).items()}
    return fixed | {"expected liking (factorisation)": ("", liking), "chance of being taken (EASE)": ("", own[0.0]),
                    "hand-made rule": (f"β = {beta:g}", rule), "myopic oracle": ("", foresight.myopic),
                    "planner": (f"trust {trust:g}", planner)}


def name_of(kind: str, gamma: float) -> str:
    return f"{kind}, γ = {gamma:g}"


def row_of(name: str, habits: foresight.Habits, users: np.ndarray, **more: object) -> dict:
    low, high = evaluation.bootstrap(users[0])
    return {"impatience": habits.impatience, "memory": habits.decay, "policy": name, "reward": users[0].mean(),
            "low": low, "high": high, "length": users[1].mean(), "stars": users[2].mean(), **more}


def world_rows(dataset: str, setting: lesson.Setting, habits: foresight.Habits, pool: ProcessPoolExecutor,
               done: set[str]) -> list[dict]:
    """Return the rows of one world, without those of agents that are done."""
    jobs = {(kind, gamma): [pool.submit(trained, dataset, kind, gamma, habits, seed) for seed in SEEDS]
            for kind, gamma in AGENTS if name_of(kind, gamma) not in done}
    if not jobs:
        return []
    fixed = {name: (chosen, judged(setting, habits, policy)) for name, (chosen, policy) in
             rules(setting, habits).items()}
    rows = [row_of(name, habits, users, seeds=1, chosen=chosen) for name, (chosen, users) in fixed.items()]
    room = fixed["planner"][1][0] - fixed["myopic oracle"][1][0]
    runs = {which: [job.result() for job in some] for which, some in jobs.items()}
    for (kind, gamma), some in runs.items():
        users, more = np.mean(some, axis=0), {}
        if gamma:
            beside = np.mean(runs[kind, 0.0], axis=0)[0], fixed["hand-made rule"][1][0]
            for name, other in zip(("gain", "over rule"), beside, strict=True):
                low, high = evaluation.bootstrap(users[0] - other)
                more |= {name: (users[0] - other).mean(), f"{name} low": low, f"{name} high": high}
            more["share of the planner's gain"] = more["gain"] / room.mean() if room.mean() > 0.01 else None
        rows.append(row_of(name_of(kind, gamma), habits, users, seeds=len(some), gamma=gamma,
                           **{"reward by seed": [run[0].mean() for run in some]}, **more))
    return rows


def table(rows: list[dict]) -> str:
    """Return docs/results.md's table: reward by world, and at the largest κ what foresight gains, with its interval."""
    at = pd.DataFrame(rows).set_index(["impatience", "memory"])
    worlds, names = sorted(set(at.index)), at["policy"].unique()
    last = [world for world in worlds if world[0] == worlds[-1][0]]
    heads = [f"κ = {kappa:g}, ρ = {decay:g}" for kappa, decay in worlds]
    heads += [f"γ over γ = 0, κ = {kappa:g}, ρ = {decay:g}" for kappa, decay in last]
    lines = [f"| films taken in a session | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for name in names:
        own = at[at["policy"] == name]
        cells = [f"{own.loc[world, 'reward']:.1f}" for world in worlds]
        for gain, low, high in own.loc[last, ["gain", "gain low", "gain high"]].to_numpy():
            cells.append("" if np.isnan(gain) else f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parser_of(about: str) -> argparse.ArgumentParser:
    """Return what the studies of lessons 15 to 17 are asked with."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("--lanes", type=int, default=2, help="trainings, or logs, at a time, one thread each")
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--observe", nargs="*", default=[], help="further data sets whose habits are estimated")
    options = parser.parse_args()
    path = res_dir(options.dataset, committed=True) / "foresight.json"
    setting, observed = setting_of(options.dataset), foresight.observed_habits(*log_of(options.dataset))
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    for name in options.observe:
        habits = foresight.observed_habits(*log_of(name), most=10_000)
        stored.setdefault("observed of", {})[name] = habits.to_dict("records")
    places = {name_of(*agent): place for place, agent in enumerate(AGENTS)}
    with ProcessPoolExecutor(options.lanes, mp_context=get_context("spawn")) as pool:
        for kappa, decay in WORLDS:
            habits = foresight.Habits(impatience=kappa, decay=decay)
            done = {row["policy"] for row in stored["rows"] if (row["impatience"], row["memory"]) == (kappa, decay)}
            rows = json.loads(json.dumps(world_rows(options.dataset, setting, habits, pool, done), default=float))
            stored["rows"] += [row for row in rows if row["policy"] not in done]
            stored |= {"observed": observed.to_dict("records"), "people": len(setting.judges), "rounds": ROUNDS}
            stored["rows"].sort(key=lambda row: (row["impatience"], row["memory"], places.get(row["policy"], -1)))
            write_json(path, stored)
            print(pd.DataFrame(stored["rows"]).round(2).to_string(), flush=True)
    if options.dataset == DEFAULT_DATASET:
        replace_block("foresight", table(stored["rows"]))


if __name__ == "__main__":
    main()
