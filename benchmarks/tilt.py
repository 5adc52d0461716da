"""What a tilt by stars could earn at most: `python -m benchmarks.tilt`, some five minutes.

The supervised baseline with the history term, tilted by expected stars, in last-5 as `benchmarks.results` judges it;
settings are those that it chose. Beside it two experiments with oracles:

- *as expected*: each hit pays what the model of stars expects, not what was given. There the model is the truth, so no
  other tilt of the same strength could use it better: what is earned is what stars of that spread can give.
- *has read the answers*: the taste of each user is fitted to the whole log, the held-out ratings too.

Writes res/tilt.json: rows of a tilt and a β, NDCG@10 and reward@10 as shares of what β = 0 has, with the 95 % interval
over users of the latter.
"""

import argparse

import numpy as np
import pandas as pd
import torch

from benchmarks import results
from helpers import evaluation, liking, recommenders
from helpers.files import DEFAULT_DATASET, res_dir, write_json
from helpers.frames import Frames
from tools.readme import replace_block

SEEDS = (0, 1, 2)


def ratio(users: np.ndarray, base: np.ndarray, n: int = 1_000) -> tuple[float, float, float]:
    """Return the ratio of two means over the same users, with its 95 % interval, users drawn anew n times."""
    draw = np.random.default_rng(0).integers(len(users), size=(n, len(users)))
    low, high = np.quantile(users[draw].mean(axis=1) / base[draw].mean(axis=1), [0.025, 0.975])
    return users.mean() / base.mean(), low, high


def table(rows: list[dict]) -> str:
    """Return the block of docs/results.md."""
    lines = ["| β | NDCG@10 | reward@10 | reward@10, as expected | NDCG@10, answers read | reward@10, answers read |",
             "| ---: | ---: | ---: | ---: | ---: | ---: |"]
    at = {(row["tilt"], row["β"]): row for row in rows}
    for beta in results.BETAS:
        cells = [f"{beta:g}"]
        for tilt, names in (("expected stars", ("ndcg@10", "reward@10")), ("as expected", ("reward@10",)),
                            ("has read the answers", ("ndcg@10", "reward@10"))):
            row = at[tilt, beta]
            shown = {"ndcg@10": f"{100 * row['ndcg@10']:.0f} %",
                     "reward@10": f"{row['reward@10']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"}
            cells += [shown[name] for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    options = parser.parse_args()
    committed = res_dir(options.dataset, committed=True)
    part, ids, matrix, known = results.last_five(options.dataset)
    frames, test = Frames(part.train, ids, matrix, results.FRAME_SIZE), results.framed(part.test, ids, matrix)
    whole = Frames(evaluation.together(*part.test[-1]), ids, matrix, results.FRAME_SIZE)
    term = recommenders.fit_user_history(part.train, ids, matrix, **known["user_history"])
    stars = recommenders.remembered(liking.fit_liking(part.train, ids, matrix))
    policies = [recommenders.remembered(results.policy_of(
        results.train_agent(frames, seed, value_weight=0.0)[0], term)) for seed in SEEDS]

    def read(_: Frames, user_ids: np.ndarray) -> torch.Tensor:
        return stars(whole, user_ids)

    paid = [(one, cases.assign(rating=liking.scores_of(stars, one, cases))) for one, cases in test]
    rows = []
    for tilt, own, turns in (("expected stars", stars, test), ("as expected", stars, paid),
                             ("has read the answers", read, test)):
        users = {beta: sum(results.user_metrics(results.ranked(liking.tilted(policy, own, beta), turns))
                           for policy in policies) / len(policies) for beta in results.BETAS}
        for beta, each in users.items():
            reward, low, high = ratio(each["reward@10"].to_numpy(), users[0.0]["reward@10"].to_numpy())
            rows.append({"tilt": tilt, "β": beta, "ndcg@10": each["NDCG@10"].mean() / users[0.0]["NDCG@10"].mean(),
                         "reward@10": reward, "low": low, "high": high})
    cases = pd.concat([cases for _, cases in test])
    liked = {name: float(liking.accuracy(own, test[0][0], cases).mean())
             for name, own in (("expected stars", stars), ("has read the answers", read))}
    write_json(committed / "tilt.json", {"seeds": len(SEEDS), "liking": liked, "rows": rows})
    if options.dataset == DEFAULT_DATASET:
        replace_block("tilt", table(rows))


if __name__ == "__main__":
    main()
