"""Who knows what people like, where nobody chose what was rated: `python -m benchmarks.exposure --copy FOLDER …`.

A FOLDER is a reader's own copy of Coat or Yahoo! R3 with user.txt (ratings of what people chose) and random.txt (of
what they were handed at random), lines user,item,rating, as in github.com/DongHande/AutoDebias. Everything learns from
the first file and is judged by the second: of two items with different stars, how often the better one scores higher,
averaged over users. There is no time in either file, so a state is ten ratings in an order of chance.

Source: Marlin & Zemel 2009 (Yahoo! R3); Schnabel et al. 2016 (Coat; factorisation weighted by inverse propensities).
Writes res/exposure.json, data set by data set.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.results import FRAME_SIZE, SETTINGS, STAR_WEIGHT, policy_of, train_agent
from helpers import evaluation, features, liking, recommenders
from helpers.agents import ddpg
from helpers.files import DEFAULT_DATASET, DataError, res_dir, write_json
from helpers.frames import Frames
from helpers.recommenders import Recommender
from tools.readme import replace_block

SEEDS, PASSES, MOST_STEPS = (0, 1, 2), 10, 400
SIZES, RIDGES = (1, 4), (1.0, 3.0, 10.0, 30.0)  # of the factorisations, chosen on a tenth of user.txt
KNOWN = 0.05  # share of random.txt that propensities are estimated from; it judges nobody
BESIDE = "factorisation"


def read_exposure(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (what people chose, what they were handed) with user_id, item_id, rating, timestamp 0.

    DataError: a file is not there, or is not of three numbers a line. What a user rated in both files is left out of
    the second.
    """
    parts = []
    for name in ("user.txt", "random.txt"):
        try:
            part = pd.read_csv(folder / name, names=["user_id", "item_id", "rating"], dtype=np.int64)
            if part.empty:
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / name} does not have lines user,item,rating: {error}") from error
        parts.append(part.assign(rating=part["rating"].astype(np.float32), timestamp=0))
    chosen, handed = parts
    again = pd.MultiIndex.from_frame(handed[["user_id", "item_id"]]).isin(
        pd.MultiIndex.from_frame(chosen[["user_id", "item_id"]]))
    return chosen, handed[~again & handed["user_id"].isin(chosen["user_id"])].reset_index(drop=True)


def propensities(chosen: pd.DataFrame, known: pd.DataFrame, cells: int) -> pd.Series:
    """Return by stars the chance that a person rates an item which they would give them: naive Bayes.

    P(rated | r) = P(r | rated)·P(rated) / P(r), with P(r) from `known`, ratings at random; cells: users × items.
    """
    stars = np.union1d(chosen["rating"], known["rating"])
    seen, all_of = (part["rating"].value_counts().reindex(stars).fillna(0) + 1 for part in (chosen, known))
    return (seen / seen.sum() * len(chosen) / cells) / (all_of / all_of.sum())


def fit_factors(log: pd.DataFrame, weight: np.ndarray, shape: tuple[int, int], size: int, ridge: float,
                steps: int = 200) -> Tensor:
    """Return expected stars (users, items): mean + biases + factors, least weighted squares; user, item in `log`."""
    user, item, rating = (torch.tensor(log[name].to_numpy(copy=True)) for name in ("user", "item", "rating"))
    w = torch.as_tensor(weight / weight.mean(), dtype=torch.float32)
    mean, generator = (w * rating).mean(), torch.Generator().manual_seed(0)
    parts = [torch.zeros(shape[0]), torch.zeros(shape[1]),
             *(0.1 * torch.randn(n, size, generator=generator) for n in shape)]
    of_user, of_item, p, q = (part.requires_grad_(True) for part in parts)
    optimiser = torch.optim.Adam(parts, 0.03)
    for _ in range(steps):
        error = mean + of_user[user] + of_item[item] + (p[user] * q[item]).sum(dim=1) - rating
        loss = (w * error.square()).sum() + ridge * sum(part.square().sum() for part in parts)
        ddpg.descend(optimiser, loss)
    return (mean + of_user[:, None] + of_item + p @ q.T).detach()


def factorisation(chosen: pd.DataFrame, ids: np.ndarray, chance: pd.Series | None = None) -> tuple[Recommender, str]:
    """Fit a biased matrix factorisation, weighted by 1 / propensity if told; return it, and what was chosen."""
    users = np.unique(chosen["user_id"])
    log = chosen.assign(user=np.searchsorted(users, chosen["user_id"]), item=np.searchsorted(ids, chosen["item_id"]))
    weight = np.ones(len(log)) if chance is None else 1 / chance[log["rating"]].to_numpy()
    held_out, shape = np.random.default_rng(0).random(len(log)) < 0.1, (len(users), len(ids))

    def error(size: int, ridge: float) -> float:
        said = fit_factors(log[~held_out], weight[~held_out], shape, size, ridge).numpy()
        miss = said[log["user"][held_out], log["item"][held_out]] - log["rating"][held_out]
        return float(np.average(miss ** 2, weights=weight[held_out]))
    size, ridge = min(((size, ridge) for size in SIZES for ridge in RIDGES), key=lambda each: error(*each))
    stars = fit_factors(log, weight, shape, size, ridge)
    return lambda history, user_ids: stars[np.searchsorted(users, user_ids)], f"{size} factors, ridge {ridge:g}"


def critic_of(agent: dict) -> Recommender:
    """Score every item by Q(s, a), s a user's last state."""
    @torch.no_grad()
    def recommend(history: Frames, user_ids: np.ndarray) -> Tensor:
        critic, states = agent["critic_target"].eval(), history.last_states(user_ids)
        return torch.cat([critic.among(some, history.items.expand(len(some), -1, -1)) for some in states.split(64)])
    return recommend


def models_of(chosen: pd.DataFrame, known: pd.DataFrame, history: Frames) -> dict[str, tuple[list[Recommender], str]]:
    """Return name → (models, one a seed, and what was chosen for them)."""
    ids, matrix = history.item_ids, history.items.numpy()
    chance = propensities(chosen, known, chosen["user_id"].nunique() * len(ids))
    plain, weighted = factorisation(chosen, ids), factorisation(chosen, ids, chance)
    models = {"popularity": ([recommenders.popularity(chosen)], ""), "mean rating": ([liking.mean_rating(chosen)], ""),
              "EASE": ([recommenders.ease(recommenders.fit_ease(chosen, ids, 400.0), 10_000, 1.0)], ""),
              BESIDE: ([plain[0]], plain[1]), "factorisation, 1 / propensity": ([weighted[0]], weighted[1]),
              "expected stars (lesson 05b)": ([liking.fit_liking(chosen, ids, matrix)], "")}
    steps = min(MOST_STEPS, max(60, PASSES * -(-len(history) // SETTINGS.batch_size)))
    ways: dict[str, tuple[dict, Callable]] = {
        "supervised baseline": (dict(value_weight=0.0), policy_of),
        "supervised, weighted by stars": (dict(value_weight=0.0, star_weight=STAR_WEIGHT), policy_of),
        "DDPG": ({}, policy_of), "its critic": ({}, critic_of), "critic with γ = 0": (dict(gamma=0.0), critic_of)}
    trained: dict[str, list[dict]] = {}
    for name, (weights, how) in ways.items():
        if str(weights) not in trained:
            trained[str(weights)] = [train_agent(history, seed, max_steps=steps, **weights)[0] for seed in SEEDS]
        models[name] = [how(agent) for agent in trained[str(weights)]], f"{steps} steps"
    return models


def judged(folder: Path) -> dict:
    """Return the rows of a data set: accuracy with its interval over users, and the difference from a factorisation."""
    chosen, handed = read_exposure(folder)
    is_known = np.random.default_rng(1).random(len(handed)) < KNOWN
    ids = np.union1d(chosen["item_id"], handed["item_id"])
    blocks = features.behaviour(chosen, ids, window=int(chosen["user_id"].value_counts().max()))
    votes = features.standardise(features.votes_of(chosen, ids).to_numpy(np.float64))
    matrix = features.pca(features.joined({"numbers": votes, **blocks}, {"numbers": 0.3}), 128, whiten=True)[0]
    history = Frames(chosen, ids, matrix, frame_size=FRAME_SIZE)
    test, rows, users = handed[~is_known].reset_index(drop=True), [], {}
    for name, (models, settings) in models_of(chosen, handed[is_known], history).items():
        runs = [liking.accuracy(model, history, test) for model in models]
        users[name] = sum(runs) / len(runs)
        low, high = evaluation.bootstrap(users[name].to_numpy())
        rows.append({"model": name, "liking accuracy": users[name].mean(), "low": low, "high": high,
                     "seeds": len(runs), "chosen": settings})
    for row in rows:
        apart = (users[row["model"]] - users[BESIDE]).to_numpy()
        low, high = evaluation.bootstrap(apart)
        row |= {"difference": apart.mean(), "difference low": low, "difference high": high}
        print(row, flush=True)
    return {"chosen": len(chosen), "handed": len(test), "users": len(users[BESIDE]), "items": len(ids), "rows": rows}


def table(of: dict[str, dict]) -> str:
    """Return docs/results.md's table."""
    names = [row["model"] for row in next(iter(of.values()))["rows"]]
    heads = [f"{name}, {one['users']:,} users | minus the factorisation's" for name, one in of.items()]
    lines = [f"| liking accuracy, items handed at random | {' | '.join(heads)} |", "| --- |" + " ---: |" * 2 * len(of)]
    for k, name in enumerate(names):
        rows = [one["rows"][k] for one in of.values()]
        cells = ["{liking accuracy:.3f} [{low:.3f}, {high:.3f}] | ".format(**row) + (
            "" if name == BESIDE else "{difference:+.3f} [{difference low:+.3f}, {difference high:+.3f}]".format(**row))
            for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copy", type=Path, nargs="+", required=True, help="folders with user.txt and random.txt")
    path = res_dir(DEFAULT_DATASET, committed=True) / "exposure.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for folder in parser.parse_args().copy:
        stored[folder.resolve().name] = judged(folder)
        write_json(path, stored)
    replace_block("exposure", table(stored))


if __name__ == "__main__":
    main()
