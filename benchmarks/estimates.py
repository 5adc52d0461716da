"""Estimates against the truth: `python -m benchmarks.estimates`, lesson 17's study at full size; a quarter of an hour.

Thirty logs of 10,000 sessions of each behaviour policy, wide and narrow, in lesson 15's world (κ = 2, ρ = 0.8, draw
1), and the first 100, 300, 1,000 and 3,000 sessions of each. Writes res/estimates.json: `rows` as lesson 17's `summary`
makes them, with the behaviour policy; `policies`, what each target policy really earns, and each estimator's bias and
RMSE of it at the largest size.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context

import numpy as np
import pandas as pd
import torch

from benchmarks.foresight import parser_of, setting_of
from helpers.agents import estimates as lesson
from helpers.extra import estimates, foresight
from helpers.files import DEFAULT_DATASET, res_dir, write_json
from tools.readme import replace_block

IMPATIENCE, SIZES, LOGS, DRAWS, REPEATS = 2.0, (100, 300, 1_000, 3_000, 10_000), 30, 60, 200


@cache
def world_of(dataset: str) -> tuple:
    """Return (world, habits, public, behaviours, targets, plays), made once in each process."""
    torch.set_num_threads(1)
    setting = setting_of(dataset)
    public = lesson.public_of(setting)
    behaviours, targets = lesson.policies_of(public)
    plays = estimates.draw_model_sessions(setting.world, public, list(targets.values()), repeats=4)
    return setting.world, foresight.Habits(impatience=IMPATIENCE), public, behaviours, targets, plays


def value_of(dataset: str, name: str, repeats: int) -> tuple[float, float, float]:
    """Return the true values of a policy."""
    world, habits, _, behaviours, targets, _ = world_of(dataset)
    return estimates.true_values(world, habits, (behaviours | targets)[name], repeats)


def rows_of(dataset: str, truth: dict[str, np.ndarray], sizes: tuple[int, ...], job: tuple[str, int]) -> pd.DataFrame:
    """Return lesson 17's rows for one log: job is (behaviour policy, seed)."""
    world, habits, public, behaviours, targets, plays = world_of(dataset)
    return lesson.study(world, habits, public, behaviours[job[0]], list(targets.values()), plays, truth, sizes, job[1],
                        DRAWS).assign(behaviour=job[0])


def by_policy(rows: pd.DataFrame, names: list[str]) -> list[dict]:
    """Return bias and RMSE of each estimator and target policy at the largest size."""
    rows = rows[rows["sessions"] == rows["sessions"].max()].assign(error=rows["estimate"] - rows["truth"])
    said = []
    for key, own in rows.groupby(["behaviour", "question", "estimator", "policy"], sort=False):
        row = dict(zip(("behaviour", "question", "estimator"), key[:3], strict=True))
        said.append(row | {"policy": names[key[3]], "bias": own["error"].mean(),
                           "RMSE": (own["error"] ** 2).mean() ** 0.5, "effective": own["effective"].mean()})
    return said


def table(rows: list[dict]) -> str:
    """Return docs/results.md's table: the largest logs, both behaviour policies."""
    at = pd.DataFrame(rows)
    at = at[at["sessions"] == at["sessions"].max()]
    lines = ["| question | estimator | RMSE, wide | covered | τ | regret | RMSE, narrow | covered | τ | regret |",
             "| --- | --- |" + " ---: |" * 8]
    for (question, name), own in at.groupby(["question", "estimator"], sort=False):
        by = own.set_index("behaviour").loc[["wide", "narrow"]]
        cells = [f"{row['RMSE']:.3f} | {row['covered']:.0%} | {row['τ']:.2f} | {row['regret']:.2f}".replace("nan", "–")
                 for row in by.to_dict("records")]
        lines.append(f"| {question} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--logs", type=int, default=LOGS)
    options = parser.parse_args()
    behaviours, targets = world_of(options.dataset)[3:5]
    with ProcessPoolExecutor(options.lanes, mp_context=get_context("spawn")) as pool:
        names = [*targets, *behaviours]
        values = dict(zip(names, pool.map(partial(value_of, options.dataset, repeats=REPEATS), names), strict=True))
        truth = {question: np.array([values[name][k] for name in targets])
                 for k, question in enumerate(("first film", "whole session"))}
        print({name: np.round(value, 3).tolist() for name, value in values.items()}, flush=True)
        jobs = [(name, seed) for name in behaviours for seed in range(options.logs)]
        rows = pd.concat(pool.map(partial(rows_of, options.dataset, truth, SIZES), jobs), ignore_index=True)
    said = [row for name, own in rows.groupby("behaviour", sort=False)
            for row in lesson.summary(own).assign(behaviour=name).to_dict("records")]
    said = [{key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}
            for row in said]
    write_json(res_dir(options.dataset, committed=True) / "estimates.json", {
        "values": {name: dict(zip(("first film", "whole session", "standard error"), value, strict=True))
                   for name, value in values.items()},
        "logs": options.logs, "draws": DRAWS, "rows": said, "policies": by_policy(rows, list(targets))})
    print(pd.DataFrame(said).round(3).to_string())
    if options.dataset == DEFAULT_DATASET:
        replace_block("estimates", table(said))


if __name__ == "__main__":
    main()
