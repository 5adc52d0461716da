"""Learn from rewards as offline RL does elsewhere: `python -m benchmarks.field`, 45 minutes, one core.

Lesson 05's data, state, encoder, item vectors, start, batches and steps; judged by each user's last five films as
`benchmarks.results` does. The ways (`benchmarks.offline`) differ in what rewards do to the loss. Of each way's settings
the one is kept that earns most reward@10 on validation among those that keep `results.NO_LOSS` of the supervised
NDCG@10, with the history term, seed 0; the test is read with three seeds. Writes res/field.json as it goes; trainings
that are done, in data/<dataset>/field, are not repeated.
"""

import argparse
from itertools import product

import numpy as np
import pandas as pd
import torch

from benchmarks import results
from benchmarks.offline import actor_of, place, trained
from helpers import evaluation, liking, recommenders
from helpers.evaluation import Recommender
from helpers.files import DEFAULT_DATASET, data_dir, res_dir, write_json
from helpers.frames import Frames
from tools.readme import replace_block

SEEDS, BASE, HISTORY = (0, 1, 2), "star-weighted", ", with history"
BETAS = [{"beta": beta} for beta in (1.0, 4.0, 8.0)]  # in standard deviations of the advantage
Q_WEIGHTS = [{"q_weight": weight} for weight in (0.01, 0.1)]
GRID: dict[str, list[dict[str, float]]] = {
    "supervised": [{"value_weight": 0.0}],
    BASE: [{"value_weight": 0.0, "star_weight": weight} for weight in (results.STAR_WEIGHT, 0.3, 0.45)],
    "DDPG": [{"value_weight": results.SETTINGS.value_weight}],
    "AWR": BETAS[:2], "CRR, exp": BETAS, "CRR, binary": [{}], "IQL": BETAS, "SQN": Q_WEIGHTS, "SAC": Q_WEIGHTS}
Turns = list[tuple[Frames, pd.DataFrame]]


def tried_row(name: str, setting: dict[str, float], actor: torch.nn.Module, term: Recommender, valid: Turns) -> dict:
    """Return how a setting does on validation, alone and with the history term."""
    row: dict = {"way": name, "setting": setting}
    for which, own in (("", None), (HISTORY, term)):
        means = results.user_metrics(results.ranked(recommenders.policy(actor, own), valid)).mean()
        row |= {f"{metric.lower()}{which}": round(float(means[metric]), 4) for metric in ("NDCG@10", "reward@10")}
    return row


def chosen_of(tried: list[dict], name: str) -> dict[str, float]:
    """Return the setting with most reward@10 of those that keep the ranking; the best ranking where none does."""
    ndcg, reward = f"ndcg@10{HISTORY}", f"reward@10{HISTORY}"
    floor = results.NO_LOSS * next(row[ndcg] for row in tried if row["way"] == "supervised")
    own = [row for row in tried if row["way"] == name]
    good = [row for row in own if row[ndcg] >= floor]
    return (max(good, key=lambda row: row[reward]) if good else max(own, key=lambda row: row[ndcg]))["setting"]


def test_row(name: str, setting: dict, scorers: list[Recommender], test: Turns, cpu: float,
             **more: float) -> tuple[dict, pd.DataFrame]:
    """Return (row, metrics by user, mean over seeds) of a way: its ranking, its rewards, how it hears stars."""
    ranks, cases = [results.ranked(one, test) for one in scorers], pd.concat([cases for _, cases in test])
    asked = test[0][0].user_ids[test[0][0].log_length > results.FRAME_SIZE]
    heard = sum(liking.accuracy(one, test[0][0], cases) for one in scorers) / len(scorers)
    stay = np.mean([liking.kept_when_exchanged(one, test[0][0], asked) for one in scorers], axis=0)
    row, users = results.judged_row(name, "way", "last-5", [results.user_metrics(each) for each in ranks], cpu,
                                    setting=setting, **more)
    for metric, values in (("reward@10", users["reward@10"]), ("liking accuracy", heard),
                           ("kept when exchanged", stay)):
        for end, value in zip(("", " low", " high"), (np.mean(values), *evaluation.bootstrap(values)), strict=True):
            row[metric + end] = round(float(value), 4)
    hits = pd.concat(ranks).query("rank <= 10")["rating"].mean()
    return row | {"stars of hits": round(float(hits), 3)}, users.assign(liking=heard.reindex(users.index))


def table(result: dict) -> str:
    """Return docs/results.md's table: each way, and what it has over stars as weights with its 95 % interval."""
    over = {(each["one"], each["metric"]): each for each in result["differences"]}
    lines = ["| way to learn from rewards | NDCG@10 | reward@10 | liking | kept when exchanged | NDCG@10 over stars as "
             "weights | reward@10 over stars as weights |", "| --- |" + " ---: |" * 6]
    for row in sorted(result["rows"], key=lambda row: row["name"].endswith(HISTORY)):
        cells = [f"{row['ndcg@10']:.3f}", *(f"{row[key]:.3f}" for key in (
            "reward@10", "liking accuracy", "kept when exchanged"))]
        for metric in ("ndcg@10", "reward@10"):
            each = over.get((row["name"], metric))
            cells.append(f"{each['difference']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]" if each else "")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("--kept", action="store_true", help="train nothing, judge the trainings that are there")
    options = parser.parse_args()
    home, committed = data_dir(options.dataset), res_dir(options.dataset, committed=True)
    (folder := home / "field").mkdir(exist_ok=True)
    part, ids, matrix, known = results.last_five(options.dataset)
    frames, valid, test = (Frames(part.train, ids, matrix, results.FRAME_SIZE), results.framed(part.valid, ids, matrix),
                           results.framed(part.test, ids, matrix))
    term = recommenders.fit_user_history(part.train, ids, matrix, **known["user_history"])
    result: dict = {"user_history": known["user_history"], "tried": []}

    def there(name: str, seed: int, setting: dict[str, float]) -> bool:
        return not options.kept or place(folder, name, seed, setting).exists()

    for name, setting in ((name, setting) for name, settings in GRID.items() for setting in settings):
        if there(name, SEEDS[0], setting):
            actor = actor_of(trained(folder, frames, name, SEEDS[0], setting), frames)
            result["tried"].append(tried_row(name, setting, actor, term, valid))
            print(result["tried"][-1], flush=True)
            write_json(committed / "field.json", result)
    result["chosen"] = {name: chosen_of(result["tried"], name) for name in {row["way"]: 0 for row in result["tried"]}}
    runs = {name: [trained(folder, frames, name, seed, setting) for seed in SEEDS if there(name, seed, setting)]
            for name, setting in result["chosen"].items()}  # all of it before the test is read
    users: dict[str, pd.DataFrame] = {}
    result |= {"rows": [], "differences": []}
    for (name, own_runs), (which, own) in product(runs.items(), (("", None), (HISTORY, term))):
        if own_runs:
            more = {key: round(float(np.mean([run[key] for run in own_runs])), 3) for key in ("spread", "with stars")}
            row, users[name + which] = test_row(
                name + which, result["chosen"][name], [recommenders.policy(actor_of(run, frames), own)
                                                       for run in own_runs], test, own_runs[0]["cpu"], **more)
            result["rows"].append(row)
            print(row, flush=True)
    result["differences"] = [results.difference(users, one, BASE + HISTORY * one.endswith(HISTORY), metric)
                             for one in users for metric in ("NDCG@10", "reward@10", "liking")
                             if one.removesuffix(HISTORY) != BASE]
    write_json(committed / "field.json", result)
    if options.dataset == DEFAULT_DATASET:
        replace_block("field", table(result))


if __name__ == "__main__":
    main()
