"""Judge lesson 14's policy where published sequence models are judged: `python -m benchmarks.whole_log`.

Each user's last film, the whole catalogue ranked, films with five ratings or more. Everything is fitted on the
training part; the number of passes and the weights of critic and expected stars are chosen on validation, by two rules:
most reward@10 of those that keep 98 % of the ranking, and of those that rank no lower than without. Ratings of one
second stay in the order of the file, as in the published tests. Trained networks are kept in data/<dataset>/policies
and used again. Writes res/results-<dataset>.json, rows as in res/results.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import results
from helpers import datasets, evaluation, features, liking, recommenders
from helpers.agents import whole_log
from helpers.files import PROJECT, data_dir, read_vectors, replacing, write_json
from helpers.frames import Frames
from tools.readme import replace_block

PROTOCOL, LEAST_RATINGS, LENGTH, MAX_PASSES, PATIENCE = "last-1", 5, 200, 30, 2
BETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3)
KEEPS = {"whole log": 0.98, "whole log, ranking kept": 1.0,  # share of validation's ranking that a weight must keep
         "supervised, whole log, tilted by expected stars": 0.98}
SETTINGS = whole_log.WholeLogSettings(dropout=0.2, item_dropout=0.15, batch_size=128, tau=0.03, shuffle_ties=False)


def table(rows: list[dict]) -> str:
    """Return the README's table in Markdown."""
    lines = ["| model | NDCG@10 | 95 % over users | HR@10 | reward@10 |", "| --- | ---: | :---: | ---: | ---: |"]
    return "\n".join([*lines, *(
        f"| {row['name']} | {row['ndcg@10']:.3f} | {row['ndcg@10 low']:.3f} – {row['ndcg@10 high']:.3f} | "
        f"{row['hr@10']:.3f} | {row['reward@10']:.3f} |" for row in rows if row["protocol"] == PROTOCOL)])


def trained(home: Path, history: Frames, valid: pd.DataFrame,
            seed: int) -> tuple[whole_log.WholeLog, pd.DataFrame, float]:
    """Return a network trained until validation no longer gains, its curve by pass, and seconds of processor."""
    path = home / "policies" / f"whole_log_{PROTOCOL}_{seed}.pt"
    agent = whole_log.new_whole_log(seed, history.items, LENGTH, SETTINGS)
    known = torch.load(path, map_location=history.device, weights_only=True) if path.exists() else {}
    if known.get("settings") != asdict(SETTINGS):
        started = time.process_time()
        curve = whole_log.train_until_flat(
            agent, history, partial(whole_log.validation_loss, history=history, valid=valid), SETTINGS,
            length=LENGTH, max_passes=MAX_PASSES, patience=PATIENCE, seed=seed)
        known = {"settings": asdict(SETTINGS), "weights": agent["target"].state_dict(),
                 "curve": curve.to_dict("list"), "seconds": time.process_time() - started}
        with replacing(path) as beside:
            torch.save(known, beside)
    agent["target"].load_state_dict(known["weights"])
    return agent["target"], pd.DataFrame(known["curve"]), known["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="ml-1m")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    home = data_dir(options.dataset)
    ratings = datasets.read_ratings(datasets.fetch(options.dataset))
    ratings = ratings[ratings.groupby("item_id")["user_id"].transform("size") >= LEAST_RATINGS].reset_index(drop=True)
    known = features.read_infos(home / "infos.json")
    infos = {item: known[item] for item in sorted(ratings["item_id"].unique())}
    part, ids = results.cut(ratings, PROTOCOL), np.array(list(infos))
    matrix = features.item_matrix(part.train, infos, read_vectors(home / "texts_bert.p"))
    make = partial(Frames, item_ids=ids, item_matrix=matrix, frame_size=10, device=options.device)
    (history, valid), (longer, test) = ((make(turn[0][0]), turn[0][1]) for turn in (part.valid, part.test))
    rows, users, passes, cpu = [], {}, [], []

    def report(name: str, kind: str, models: list, cpu: float = 0.0, **more: object) -> None:
        runs = [results.user_metrics(evaluation.rank_held_out(model, longer, test)) for model in models]
        some = np.random.default_rng(0).permutation(longer.user_ids)[:1_000]
        kept = np.mean([liking.kept_when_exchanged(model, longer, some).mean() for model in models])
        row, users[name] = results.judged_row(name, kind, PROTOCOL, runs, cpu, **more)
        rows.append(row | {"kept when exchanged": round(float(kept), 3)})
        print(rows[-1], flush=True)

    report("popularity", "baseline", [recommenders.popularity(part.train)])
    fitted = {ridge: recommenders.fit_ease(part.train, ids, ridge) for ridge in {each[0] for each in results.EASE_GRID}}
    for name, plain in (("EASE", True), ("EASE, recent films", False)):
        models = {each: recommenders.ease(fitted[each[0]], *each[1:]) for each in results.EASE_GRID
                  if (each[1] == 10_000) == plain}
        best = max(models, key=lambda each: evaluation.ndcg(models[each], history, valid))
        report(name, "baseline", [models[best]], chosen=str(best), tried=len(models))
    nets = []
    for seed in range(options.seeds):
        net, curve, seconds = trained(home, history, valid, seed)
        nets.append(net), passes.append(len(curve)), cpu.append(seconds)
        print(curve.round(3).to_string(), flush=True)
    spent, alone = float(np.mean(cpu)), [partial(whole_log.whole_log_policy, net=net) for net in nets]
    report("supervised baseline, whole log", "supervised", alone, spent, beta=0.0, passes=passes)
    stars = liking.fit_liking(part.train, ids, matrix)
    ways: dict[str, Callable[[float], list]] = {
        "rl": lambda beta: [partial(whole_log.whole_log_policy, net=net, beta=beta) for net in nets],
        "supervised": lambda beta: [liking.tilted(model, stars, beta) for model in alone]}
    fronts = {kind: liking.front_of(policies_at, history, valid, BETAS) for kind, policies_at in ways.items()}
    chosen = {}
    for name, keeps in KEEPS.items():
        kind = "supervised" if "supervised" in name else "rl"
        chosen[name] = beta = whole_log.choose_beta(fronts[kind], keeps)
        report(name, kind, ways[kind](beta), spent, beta=beta, passes=passes)
    differences = [results.difference(users, one, other, metric) for one in KEEPS
                   for other in users if other != one for metric in ("NDCG@10", "reward@10")]
    tried = {kind: front.rename(columns=str.lower).round(4).rename_axis("beta").reset_index().to_dict("records")
             for kind, front in fronts.items()}
    path = PROJECT / "res" / f"results-{home.name}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "protocols": {}}
    result["rows"] = rows + [row for row in result["rows"] if row["protocol"] != PROTOCOL or row["name"] not in users]
    result["protocols"][PROTOCOL] = {"cases": len(test), "films": len(ids), "beta": tried, "chosen": chosen,
                                     "differences": differences}
    write_json(path, result)
    if home.name == "ml-1m":
        replace_block("results-ml-1m", table(result["rows"]))
    print(*tried.items(), *differences, sep="\n")


if __name__ == "__main__":
    main()
