"""What a log of slates teaches: `python -m benchmarks.reinforce`, all policies of lesson 16, three logs and seeds.

One world (κ = 2, slates of four), one behaviour policy, of each seed another log of it. Settings were chosen in another
draw of the world; β of the hand-made rule on the people whose visits are in the log. Rows: policy, reward with its 95 %
interval over people, by seed too, length, stars, films on all first tens, gain over the behaviour policy's best.
Writes res/reinforce.json.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context

import numpy as np
import pandas as pd
import torch

from benchmarks.foresight import BETAS, models_of, parser_of, setting_of
from helpers import evaluation
from helpers.agents import foresight as acting
from helpers.agents import reinforce as lesson
from helpers.extra import foresight
from helpers.files import DEFAULT_DATASET, res_dir, write_json
from tools.readme import replace_block

HABITS, SLATE, VISITS, STEPS, SEEDS = foresight.Habits(impatience=2.0), 4, 6, 200, (0, 1, 2)
SETTINGS = replace(acting.ForesightSettings(), k=SLATE)
FROM_LOG = ("imitation, taken films", "imitation, weighed by returns", "DDPG", "D4PG", "Rainbow", "DDPG, γ = 0",
            "D4PG, γ = 0", "Rainbow, γ = 0", "REINFORCE", "REINFORCE, γ = 0", "REINFORCE, K = 1",
            "REINFORCE, no weights", "REINFORCE, β estimated", "REINFORCE, drawn apart")
Result = tuple[np.ndarray, int]  # (3, U) reward, length and stars of each person who judges; films on all first tens


def result_of(setting: acting.Setting, policy: foresight.Policy) -> Result:
    """Return how people who judge fare with a policy."""
    visits = foresight.Visits(setting.world, HABITS, setting.judges)
    with torch.no_grad():
        films = len(foresight.best_unseen(policy(visits), visits, 10).unique())
    played = foresight.play(setting.world, HABITS, policy, setting.judges, seed=99, repeats=6, k=SLATE)
    return played.to_numpy().T, films


@cache
def log_of(dataset: str, seed: int) -> tuple:
    """Return (setting, log, agent that wrote it, behaviour head), made once in each process."""
    setting = setting_of(dataset)
    start = acting.new_actor_in("REINFORCE", 0, setting.frames, SETTINGS)
    log = lesson.written_log(setting.world, HABITS, start["actor"], setting.frames.items,
                             setting.learners.repeat(VISITS), SLATE, 5 + seed)
    head = lesson.fit_behaviour(log, seed, 2 * STEPS, encoder=SETTINGS.encoder, hidden_size=SETTINGS.hidden_size,
                                dropout=0.1, item_dropout=0.1)
    return setting, log, start, head


def learnt(dataset: str, name: str, seed: int) -> Result:
    """Return what a policy that learnt from a log earns; in a process of its own."""
    torch.set_num_threads(1)
    setting, log, start, head = log_of(dataset, seed)
    kind = name.partition(",")[0]
    if kind in ("D4PG", "Rainbow"):
        start = acting.new_actor_in(kind, 0, setting.frames, SETTINGS)
    actor, _ = lesson.learn_from_log(name, log, start, setting.world, setting.judges, STEPS, SETTINGS, head, seed)
    return result_of(setting, acting.greedily(actor, setting.frames.items))


def fixed(dataset: str) -> dict[str, Result]:
    """Return what is not learnt from the log, and its list of films by mean reward."""
    setting, log, start, _ = log_of(dataset, SEEDS[0])
    rivals, (choice, liking) = lesson.rivals_of(setting.known, setting.world, log), models_of(setting)
    earned = {beta: foresight.play(setting.world, HABITS, acting.rule_of(choice, liking, beta), setting.learners, 1_000,
                                   2, SLATE)["reward"].mean() for beta in BETAS}
    beta = max(earned, key=earned.get)
    rivals[f"hand-made rule, β = {beta:g}"] = acting.rule_of(choice, liking, beta)
    rivals["behaviour policy, its best"] = acting.greedily(start["actor"], setting.frames.items)
    return {name: result_of(setting, policy) for name, policy in rivals.items()}


def row_of(name: str, runs: list[Result], base: np.ndarray) -> dict:
    """Return the row of a policy; base (U,): the reward of the behaviour policy's best."""
    users = np.mean([run[0] for run in runs], axis=0)
    low, high = evaluation.bootstrap(users[0])
    gain = evaluation.bootstrap(users[0] - base)
    return {"policy": name, "reward": users[0].mean(), "low": low, "high": high, "length": users[1].mean(),
            "stars": users[2].mean(), "films": float(np.mean([run[1] for run in runs])),
            "gain": (users[0] - base).mean(), "gain low": gain[0], "gain high": gain[1],
            "reward by seed": [run[0][0].mean() for run in runs]}


def table(rows: pd.DataFrame) -> str:
    """Return docs/results.md's table."""
    lines = ["| from one log, slates of four, κ = 2 | films taken in a visit | 95 % over people | films on all first "
             "tens |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {row['policy']} | {row['reward']:.1f} | {row['low']:.1f} – {row['high']:.1f} | {row['films']:.0f} |"
              for row in rows.to_dict("records")]
    return "\n".join(lines)


def main() -> None:
    options = parser_of(__doc__).parse_args()
    with ProcessPoolExecutor(options.lanes, mp_context=get_context("spawn")) as pool:
        jobs = {name: [pool.submit(learnt, options.dataset, name, seed) for seed in SEEDS] for name in FROM_LOG}
        done = {name: [result] for name, result in fixed(options.dataset).items()}
        base = done["behaviour policy, its best"][0][0][0]
        rows = [row_of(name, runs, base) for name, runs in done.items()]
        rows += [row_of(name, [job.result() for job in some], base) for name, some in jobs.items()]
    write_json(res_dir(options.dataset, committed=True) / "reinforce.json", {"people": len(base), "steps": STEPS,
                                                             "rows": json.loads(json.dumps(rows, default=float))})
    print(pd.DataFrame(rows).round(2).to_string())
    if options.dataset == DEFAULT_DATASET:
        replace_block("reinforce", table(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
