"""Judge policies and baselines by every protocol of lesson 10: `python -m benchmarks.results [PROTOCOL …]`.

Everything is fitted on the training part of its protocol alone, the item matrix too; critic weights and settings are
chosen on
validation; the test is read once, for the report. Scores that `baselines.py` left in `data/<dataset>/results/` (it
needs an environment of its own) are judged with the rest. Writes `res/results.json`, protocol by protocol.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import datasets, evaluation, features, recommenders, training
from helpers.agents import ddpg
from helpers.evaluation import Recommender
from helpers.extra import simulator
from helpers.files import DEFAULT_DATASET, data_dir, read_vectors, res_dir, write_json
from helpers.frames import Frames
from helpers.recommenders import UserHistory, fit_user_history
from tools.readme import replace_block

PROTOCOLS = ("last-5", "last-1", "temporal", "simulator")
SEEDS = (0, 1, 2, 3, 4)
FRAME_SIZE, MAX_STEPS, BATCH_SIZE, LEARNING_RATE = 10, 800, 512, 3e-3   # lesson 05's
GAMMAS = (0.9, 0.5, 0.0)
CRITIC_WEIGHTS = (0.0, 0.1, 0.2)
# in the simulator: β, candidates
LARGE_CRITIC_WEIGHTS = ((0.0, 100), (0.3, 100), (1.0, 100), (np.inf, 100), (np.inf, 400))
RIDGES = (100, 200, 400)                        # of the history term
SAYS = list(product((4.0, 6.0), (0.0, 0.2, 0.4)))  # its weight and rating_slope
NO_LOSS = 0.98          # of the supervised baseline's NDCG@10 on validation: a policy for reward may not rank lower
CHOSEN_ON, CHOOSING_SEEDS = "last-5", 3  # the protocol whose validation chooses for all, and by how many seeds
CANDIDATES = 100
RELEVANT = 4.0          # stars, in the temporal protocol
WORLD_SHARE = 0.3       # users the simulator is fitted on, whom no agent sees
SEEN_ENOUGH = 10        # ratings in the world for a film to be shown there
EASE_GRID = [(ridge, last, decay) for ridge in (100, 400, 1000, 2000)
             for last, decay in ((10_000, 1.0), (20, 0.9), (20, 0.8), (10, 0.8))]


class Cut(NamedTuple):
    """A protocol: what may be fitted on, and (history, cases) to choose by and to report by.

    The validation of `temporal` lies inside `train`, whose own end it is: what is chosen by it is fitted before it.
    """

    train: pd.DataFrame
    valid: list[tuple[pd.DataFrame, pd.DataFrame]]
    test: list[tuple[pd.DataFrame, pd.DataFrame]]
    relevant: float | None


def cut(ratings: pd.DataFrame, protocol: str) -> Cut:
    """Cut a log for a protocol by its name."""
    if protocol == "temporal":
        train, later = evaluation.split_time(ratings)
        return Cut(train, [evaluation.split_time(train)], [(train, later)], RELEVANT)
    n = int(protocol.removeprefix("last-"))
    split = evaluation.split_last(ratings, n, n)
    return Cut(split.train, evaluation.rolling_cases(split.train, split.valid),
               evaluation.rolling_cases(evaluation.together(split.train, split.valid), split.test), None)


def framed(turns: list[tuple[pd.DataFrame, pd.DataFrame]], ids: np.ndarray,
           matrix: np.ndarray) -> list[tuple[Frames, pd.DataFrame]]:
    """Return turns with their histories as Frames."""
    return [(Frames(history, ids, matrix, FRAME_SIZE), cases) for history, cases in turns]


def ranked(recommend: Recommender, turns: list[tuple[Frames, pd.DataFrame]]) -> pd.DataFrame:
    """Return every case with its rank."""
    return pd.concat([evaluation.rank_held_out(recommend, history, cases) for history, cases in turns])


def train_agent(frames: Frames, seed: int, gamma: float, value_weight: float = 1.0) -> tuple[dict, float]:
    """Return (lesson 05's agent, CPU seconds); with a value weight of 0 the supervised baseline."""
    lesson, started = ddpg, time.process_time()
    agent = lesson.new_agent(seed, FRAME_SIZE, frames.embed_size, LEARNING_RATE, encoder="attention",
                             critic_dropout=0.3)
    step = partial(lesson.update, agent, frames, gamma=gamma, tau=0.01, decay=0.7, future=3, value_weight=value_weight)
    training.fit(step, frames, agent, batch_size=BATCH_SIZE, max_steps=MAX_STEPS, seed=seed, shuffle_ties=True,
                 safe_every=MAX_STEPS, log_every=100, desc=f"γ = {gamma}, λ = {value_weight}, seed {seed}")
    return agent, time.process_time() - started


def policy_of(agent: dict, beta: float = 0.0, k: int = CANDIDATES, term: UserHistory | None = None) -> Recommender:
    """Return the target actor as a recommender, with the target critic as a second judge unless beta is 0."""
    if not beta:
        return recommenders.policy(agent["actor_target"], term)
    return partial(ddpg.wolpertinger, actor=agent["actor_target"], critic=agent["critic_target"],
                   k=k, beta=beta, term=term)


def choose(judged: dict[tuple, pd.Series], floor: float) -> tuple:
    """Return the setting with most reward@10 among those with an NDCG@10 of `floor`, or the one that ranks best."""
    good = [key for key, means in judged.items() if means["NDCG@10"] >= floor]
    return max(good, key=lambda key: judged[key]["reward@10"]) if good else \
        max(judged, key=lambda key: judged[key]["NDCG@10"])


def judged_row(name: str, kind: str, protocol: str, runs: list[pd.DataFrame], cpu: float, **more: Any) -> tuple:
    """Return (row of results.json, metrics by user averaged over seeds)."""
    users = sum(runs) / len(runs)
    means = [run["NDCG@10"].mean() for run in runs]
    low, high = evaluation.bootstrap(users["NDCG@10"])
    row = {"name": name, "kind": kind, "protocol": protocol, "seeds": len(runs), "cpu_s": round(cpu, 1),
           **{metric.lower(): round(float(users[metric].mean()), 4) for metric in users},
           "std": round(float(np.std(means, ddof=1)), 4) if len(means) > 1 else None,
           "ndcg@10 low": round(low, 4), "ndcg@10 high": round(high, 4), **more}
    return row, users


def difference(users: dict[str, pd.DataFrame], one: str, other: str, metric: str = "NDCG@10") -> dict[str, Any]:
    """Return one model's metric less another's on the same users, with its interval, and their ratio."""
    values = users[one][metric] - users[other][metric]
    low, high = evaluation.bootstrap(values)
    return {"one": one, "other": other, "metric": metric.lower(), "difference": round(float(values.mean()), 4),
            "low": round(low, 4), "high": round(high, 4),
            "ratio": round(float(users[one][metric].mean() / users[other][metric].mean()), 3)}


def rank_protocol(protocol: str, ratings: pd.DataFrame, infos: dict, vectors: dict, similarity: np.ndarray,
                  folder: Path, seeds: tuple[int, ...], chosen: dict | None = None) -> dict[str, Any]:
    """Return {"rows", "differences", "critic weights", "chosen", …} of one of the ranking protocols."""
    part, ids = cut(ratings, protocol), np.array(list(infos))
    matrix = features.item_matrix(part.train, infos, vectors)
    valid, test = framed(part.valid, ids, matrix), framed(part.test, ids, matrix)
    write_cases(folder / protocol, part, ids, matrix)

    def users_of(recommend: Recommender, turns: list) -> pd.DataFrame:
        return evaluation.user_metrics(ranked(recommend, turns), relevant=part.relevant)

    models: dict[str, tuple[str, list[Recommender], float, dict]] = {
        "random": ("baseline", [recommenders.random(seed) for seed in seeds], 0.0, {}),
        "popularity": ("baseline", [recommenders.popularity(part.train)], 0.0, {})}
    for name, plain in (("EASE", True), ("EASE, recent films", False)):
        started, tried = time.process_time(), {}
        settings = [setting for setting in EASE_GRID if (setting[1] == 10_000) == plain]
        # the validation of the temporal protocol lies inside train: what is tried there is fitted before it
        fitted = {ridge: recommenders.fit_ease(part.valid[0][0], ids, ridge)
                  for ridge in {each[0] for each in settings}}
        for ridge, last, decay in settings:
            recommend = recommenders.ease(fitted[ridge], last, decay)
            tried[ridge, last, decay] = users_of(recommend, valid)["NDCG@10"].mean()
        ridge, last, decay = max(tried, key=tried.get)
        models[name] = ("baseline", [recommenders.ease(recommenders.fit_ease(part.train, ids, ridge), last,
                                                                 decay)],
                        time.process_time() - started, {"tried": len(tried), "chosen": str((ridge, last, decay))})

    frames = Frames(part.train, ids, matrix, FRAME_SIZE)
    supervised = [train_agent(frames, seed, GAMMAS[0], value_weight=0.0) for seed in seeds]
    agents = {GAMMAS[0]: [train_agent(frames, seed, GAMMAS[0]) for seed in seeds]}
    tried: dict[str, list] = {}
    if protocol == CHOSEN_ON:
        histories = {ridge: fit_user_history(part.train, ids, matrix, ridge) for ridge in RIDGES}
        agents |= {gamma: [train_agent(frames, seed, gamma) for seed in seeds[:CHOOSING_SEEDS]] for gamma in GAMMAS[1:]}
        chosen, tried = choose_all(agents, supervised, histories, partial(users_of, turns=valid))
    elif chosen is None:
        raise SystemExit(f"the settings of {protocol} are those that {CHOSEN_ON} chose: judge that one first")
    gamma, done = chosen["gamma"], agents.get(chosen["gamma"], [])
    agents[gamma] = [*done, *(train_agent(frames, seed, gamma) for seed in seeds[len(done):])]
    term = fit_user_history(part.train, ids, matrix, **chosen["user_history"])
    for_reward = term._replace(weight=chosen["weight"], rating_slope=chosen["rating_slope"])
    for name, kind, runs, more in (("supervised baseline", "supervised", supervised, {}),
                                   ("DDPG", "rl", agents[GAMMAS[0]], {"gamma": GAMMAS[0]})):
        models[name] = (kind, [policy_of(agent) for agent, _ in runs], runs[0][1], more)
        models[f"{name}, with history"] = (kind, [policy_of(agent, term=term) for agent, _ in runs], runs[0][1],
                                          more | {"user_history": chosen["user_history"]})
    models["DDPG for reward"] = (
        "rl", [policy_of(agent, float(chosen["beta"]), term=for_reward) for agent, _ in agents[gamma]],
        agents[gamma][0][1], {name: chosen[name] for name in ("gamma", "beta", "weight", "rating_slope")})
    rows, users = [], {}
    train_users = test[0][0].user_ids
    for name, (kind, scorers, cpu, more) in models.items():
        ranks = [ranked(recommend, test) for recommend in scorers]
        runs = [evaluation.user_metrics(each, relevant=part.relevant) for each in ranks]
        slates = evaluation.slates_of(recommenders[0], test[0][0], train_users)
        more |= {key: round(value, 4) for key, value in
                 evaluation.slate_metrics(slates, similarity, part.train, ids).items()}
        stars = ranks[0].loc[ranks[0]["rank"] <= 10, "rating"].mean()
        row, users[name] = judged_row(name, kind, protocol, runs, cpu, **more,
                                      **{"stars of hits": round(float(stars), 3)})
        rows.append(row)
        print(row, flush=True)
    evaluation.write_cases(folder / protocol / "users.csv", users)
    return {"rows": rows, "cases": sum(len(cases) for _, cases in test), "users": len(users["DDPG"]),
            "chosen": chosen, **tried, "differences": differences_of(users)}


def choose_all(agents: dict[float, list], supervised: list, histories: dict[float, UserHistory],
               users_of: Callable) -> tuple[dict, dict[str, list]]:
    """Choose on validation, by the mean of the seeds that all have: the term, and the policy for reward.

    The history term (ridge, weight, rating slope) is the one with which the supervised baseline ranks best. The policy
    for reward (γ, β, and the term's weight and slope) earns most reward@10 among those that rank as well as that
    baseline, but for NO_LOSS.

    Returns:
        (what was chosen, {"histories", "critic weights"}: what was tried).
    """
    n = min(len(runs) for runs in agents.values())
    says = [(0.0, 0.0), *SAYS]

    def mean_of_seeds(runs: list, ridge: float, weight: float, slope: float, beta: float = 0.0) -> pd.Series:
        term = histories[ridge]._replace(weight=weight, rating_slope=slope) if weight else None
        return sum(users_of(policy_of(agent, beta, term=term)).mean() for agent, _ in runs[:n]) / n

    def listed(judged: dict[tuple, pd.Series], *names: str) -> list[dict]:
        return [dict(zip(names, key, strict=True), seeds=n, **{
            metric.lower(): round(float(means[metric]), 4) for metric in ("NDCG@10", "reward@10")})
            for key, means in judged.items()]

    of_supervised = {(ridge, *say): mean_of_seeds(supervised, ridge, *say) for ridge in histories for say in says}
    ridge, weight, slope = best = max(of_supervised, key=lambda key: of_supervised[key]["NDCG@10"])
    of_agents = {(gamma, beta, *say): mean_of_seeds(runs, ridge, *say, beta)
                 for gamma, runs in agents.items() for beta in CRITIC_WEIGHTS for say in says}
    chosen = dict(zip(("gamma", "beta", "weight", "rating_slope"),
                      choose(of_agents, NO_LOSS * of_supervised[best]["NDCG@10"]),
                      strict=True))
    return {"user_history": {"ridge": ridge, "weight": weight, "rating_slope": slope}, **chosen}, {
        "histories": listed(of_supervised, "ridge", "weight", "rating_slope"),
        "critic weights": listed(of_agents, "gamma", "beta", "weight", "rating_slope")}


def differences_of(users: dict[str, pd.DataFrame]) -> list[dict]:
    """Return every kind of DDPG less every other model."""
    return [difference(users, one, other, metric) for one in users if one.startswith("DDPG")
            for other in users if other != one for metric in ("NDCG@10", "reward@10")]


def add_scores(protocol: str, results: dict[str, Any], ratings: pd.DataFrame, ids: np.ndarray, folder: Path) -> None:
    """Judge the scores that `baselines.py` left, and put their rows and differences beside what is stored.

    A model that left its scores of the validation cases too, log-probabilities up to a constant, is judged a second
    time with the history term that our policies have, its settings chosen for it as the supervised baseline's were.
    """
    part, matrix, chosen = cut(ratings, protocol), np.load(folder / "item_matrix.npy"), {}
    test = framed(part.test, ids, matrix)
    users, old = evaluation.read_cases(folder / "users.csv"), results["protocols"]
    for meta in records(folder):
        scores, more = read_scores(folder, meta), {"tried": len(meta["tried"]), "chosen": str(meta["chosen"])}
        found = {meta["name"]: (None, more)}
        if validation := read_scores(folder, meta, " valid"):
            if protocol == CHOSEN_ON:
                chosen[meta["name"]] = history_for(validation[:CHOOSING_SEEDS], framed(part.valid, ids, matrix), part)
            settings = chosen.get(meta["name"]) or old[CHOSEN_ON]["history of others"][meta["name"]]
            found[f"{meta['name']}, with history"] = (fit_user_history(part.train, ids, matrix, **settings),
                                                     more | {"user_history": settings})
        for name, (term, more) in found.items():
            runs = [judged_scores(each, test, part.relevant, term) for each in scores]
            row, by_user = judged_row(name, "baseline", protocol, runs, meta["cpu_s"], **more)
            users[name] = by_user.reset_index(drop=True)
            results["rows"] = [kept for kept in results["rows"] if (kept["protocol"], kept["name"]) != (protocol, name)]
            results["rows"].append(row)
            print(row, flush=True)
    if chosen:
        old[protocol]["history of others"] = chosen
    old[protocol]["differences"] = differences_of(users)


def history_for(scores: list[Tensor], valid: list[tuple[Frames, pd.DataFrame]], part: Cut) -> dict[str, float]:
    """Return the settings of the history term with which validation scores rank best, mean over seeds."""
    ids, matrix, judged = valid[0][0].item_ids, valid[0][0].items.numpy(), {}
    for ridge in RIDGES:
        term = fit_user_history(part.valid[0][0], ids, matrix, ridge)
        for weight, slope in SAYS:
            judged[ridge, weight, slope] = np.mean([judged_scores(
                each, valid, part.relevant, term._replace(weight=weight, rating_slope=slope))["NDCG@10"].mean()
                for each in scores])
    return dict(zip(("ridge", "weight", "rating_slope"), max(judged, key=judged.get), strict=True))


def write_cases(folder: Path, part: Cut, ids: np.ndarray, matrix: np.ndarray) -> None:
    """Write what `baselines.py` reads: what to fit and to choose on, the catalogue, each case with its history."""
    folder.mkdir(parents=True, exist_ok=True)
    part.train.to_csv(folder / "train.csv", index=False)
    part.valid[0][0].to_csv(folder / "earlier.csv", index=False)
    pd.DataFrame({"item_id": ids}).to_csv(folder / "item_ids.csv", index=False)
    np.save(folder / "item_matrix.npy", matrix)
    for name, turns in (("valid", part.valid), ("test", part.test)):
        histories, cases, first = [], [], 0
        for history, held_out in turns:
            number = pd.Series(np.arange(held_out["user_id"].nunique()) + first, held_out["user_id"].unique())
            first += len(number)
            histories.append(history.assign(case=history["user_id"].map(number)).dropna(subset="case"))
            cases.append(held_out.assign(case=held_out["user_id"].map(number)))
        for table, kind in ((histories, "_histories"), (cases, "")):
            whole = pd.concat(table).astype({"case": int}).sort_values("case", kind="stable")
            whole[["case", "user_id", "item_id", "rating", "timestamp"]].to_csv(folder / f"{name}{kind}.csv",
                                                                               index=False)


def records(folder: Path) -> list[dict]:
    """Return what is known of every model that has left its scores."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "scores").glob("*.json"))]
    return [meta for meta in found if "cpu_s" in meta]  # without: still at work


def read_scores(folder: Path, meta: dict, of: str = "") -> list[Tensor]:
    """Return a model's scores (cases, n_items) of the test cases, or of the " valid" ones, for each seed that has."""
    paths = [folder / "scores" / f"{meta['name']}-{seed}{of}.npy" for seed in range(meta["seeds"])]
    return [torch.from_numpy(np.load(path).astype(np.float32)) for path in paths if path.exists()]


def judged_scores(scores: Tensor, turns: list[tuple[Frames, pd.DataFrame]], relevant: float | None,
                  term: UserHistory | None = None) -> pd.DataFrame:
    """Return metrics by user of scores (cases, n_items), a history term's added if there is one."""
    first, ranks = 0, []
    for frames, held_out in turns:
        order = held_out["user_id"].unique()
        place = pd.Series(np.arange(len(order)) + first, order)
        first += len(order)

        def recommend(history: Frames, user_ids: np.ndarray, place: pd.Series = place) -> Tensor:
            own = scores[place.loc[user_ids].to_numpy(copy=True)]
            if term is None:
                return own
            return own + term(history, user_ids) @ history.items.T / history.embed_size ** 0.5
        ranks.append(evaluation.rank_held_out(recommend, frames, held_out))
    return evaluation.user_metrics(pd.concat(ranks), relevant=relevant)


def simulate(ratings: pd.DataFrame, infos: dict, vectors: dict, similarity: np.ndarray,
             seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return {"rows", "differences", "world"} of the simulator: agents see 70 % of the users, its world the others."""
    ids, rng = np.array(list(infos)), np.random.default_rng(0)
    everyone = ratings["user_id"].unique()
    chosen = rng.choice(everyone, int(WORLD_SHARE * len(everyone)), replace=False)
    of_world = ratings["user_id"].isin(chosen)
    train, outside = ratings[~of_world].reset_index(drop=True), ratings[of_world].reset_index(drop=True)
    matrix = features.item_matrix(train, infos, vectors)
    frames = Frames(train, ids, matrix, FRAME_SIZE)
    worlds = {"to choose by": simulator.fit_world(train, ids, similarity),
              "to report": simulator.fit_world(outside, ids, similarity)}
    some = rng.choice(frames.user_ids[frames.log_length > FRAME_SIZE], len(chosen), replace=False)

    def known_enough(recommend: Recommender, log: pd.DataFrame) -> Recommender:
        counts = log["item_id"].value_counts().reindex(ids, fill_value=0).to_numpy()
        rare = torch.from_numpy(counts < SEEN_ENOUGH)
        return lambda history, user_ids: recommend(history, user_ids).masked_fill(rare, -1e9)

    def played(recommend: Recommender, which: str, seed: int, **how: Any) -> pd.DataFrame:
        log, who = (train, some) if which == "to choose by" else (outside, None)
        return simulator.sessions(simulator.play(worlds[which], known_enough(recommend, log), matrix, FRAME_SIZE,
                                                 user_ids=who, seed=seed, **how), worlds[which])

    def tune(settings: dict[Any, Recommender]) -> Any:
        """Return the setting that earns most in the world to choose by, all tried with seed 0."""
        earned = {key: float(played(recommend, "to choose by", 0)["reward"].mean())
                  for key, recommend in settings.items()}
        tuned.update({str(key): round(value, 2) for key, value in earned.items()})
        print(tuned, flush=True)
        return max(earned, key=earned.get)

    tuned: dict[str, float] = {}
    models: dict[str, tuple[str, list[Recommender], dict]] = {
        "random": ("baseline", [recommenders.random(seed) for seed in seeds], {}),
        "popularity": ("baseline", [recommenders.popularity(train)] * len(seeds), {})}
    fitted = {ridge: recommenders.fit_ease(train, ids, ridge) for ridge in {setting[0] for setting in EASE_GRID}}
    for name, plain in (("EASE", True), ("EASE, recent films", False)):
        scorers = {(name, *setting): recommenders.ease(fitted[setting[0]], *setting[1:])
                        for setting in EASE_GRID if (setting[1] == 10_000) == plain}
        best = tune(scorers)
        models[name] = ("baseline", [scorers[best]] * len(seeds), {"chosen": str(best[1:])})

    first = {gamma: train_agent(frames, 0, gamma)[0] for gamma in GAMMAS}
    supervised, term = train_agent(frames, 0, GAMMAS[0], 0.0)[0], fit_user_history(train, ids, matrix, RIDGES[1])
    _, weight, slope = tune({("supervised", *say): policy_of(supervised, term=term._replace(weight=say[0],
                                                                                            rating_slope=say[1]))
                              for say in SAYS})
    term = term._replace(weight=weight, rating_slope=slope)
    _, gamma, beta, k = tune({("DDPG", gamma, beta, k): policy_of(agent, beta, k, term) for gamma, agent
                              in first.items() for beta, k in LARGE_CRITIC_WEIGHTS})
    supervised = [supervised, *(train_agent(frames, seed, gamma, 0.0)[0] for seed in seeds[1:])]
    agents = [first[gamma], *(train_agent(frames, seed, gamma)[0] for seed in seeds[1:])]
    remembers = {"weight": weight, "rating_slope": slope}
    models |= {
        "supervised baseline": ("supervised", [policy_of(agent) for agent in supervised], {}),
        "supervised baseline, with history": ("supervised", [policy_of(agent, term=term) for agent in supervised],
                                              remembers),
        "DDPG": ("rl", [policy_of(agent) for agent in agents], {"gamma": gamma}),
        "DDPG, with history": ("rl", [policy_of(agent, term=term) for agent in agents],
                              {"gamma": gamma} | remembers),
        "DDPG, re-ranked": ("rl", [policy_of(agent, beta, k, term) for agent in agents],
                            {"gamma": gamma, "beta": str(beta), "candidates": k} | remembers)}
    rows, users = [], {}
    for mode in simulator.MODES:
        for name, (kind, scorers, more) in models.items():
            runs = [played(recommend, "to report", seed, mode=mode)
                    for seed, recommend in zip(seeds, scorers, strict=True)]
            mean = pd.concat(runs).groupby(level=0).mean()
            low, high = evaluation.bootstrap(mean["reward"])
            rows.append({"name": name, "kind": kind, "protocol": "simulator", "mode": mode, "seeds": len(runs),
                         **{column: round(float(mean[column].mean()), 3)
                            for column in ("reward", "length", "rating", "diversity")},
                         "std": round(float(np.std([run["reward"].mean() for run in runs], ddof=1)), 3),
                         "reward low": round(low, 2), "reward high": round(high, 2), **more})
            if mode == "no-repeat":
                users[name] = mean
            print(rows[-1], flush=True)
    world = worlds["to report"]
    return {"rows": rows, "critic weights": tuned, "users": len(world.user_ids),
            "world": {"rmse": {key: round(value, 3) for key, value in world.rmse.items()}, "factors": world.n_factors,
                      "films shown": int((outside["item_id"].value_counts() >= SEEN_ENOUGH).sum()),
                      "habits": simulator.HABITS._asdict()},
            "differences": [difference(users, "DDPG, re-ranked", other, metric) for other in users
                            if other != "DDPG, re-ranked" for metric in ("reward", "diversity")]}


def readme_table(rows: list[dict]) -> str:
    """Return the README's table: last-5, and what each model earned in a session of the simulator."""
    sums = {row["name"]: row["reward"] for row in rows if row["protocol"] == "simulator" and row["mode"] == "no-repeat"}
    lines = ["| model | NDCG@10 | 95 % over users | HR@10 | reward@10 | reward of a simulated session | seeds |",
             "| --- | ---: | :---: | ---: | ---: | ---: | ---: |"]
    for row in sorted((row for row in rows if row["protocol"] == "last-5"), key=lambda row: row["ndcg@10"]):
        session = f"{sums.pop(row['name']):.0f}" if row["name"] in sums else ""
        lines.append(f"| {row['name']} | {row['ndcg@10']:.3f} | {row['ndcg@10 low']:.3f} – {row['ndcg@10 high']:.3f} | "
                     f"{row['hr@10']:.3f} | {row['reward@10']:.3f} | {session} | {row['seeds']} |")
    lines += [f"| {name} | | | | | {reward:.0f} | |" for name, reward in sums.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocols", nargs="*", default=PROTOCOLS, metavar="PROTOCOL", help=", ".join(PROTOCOLS))
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--add-scores", action="store_true", help="train nothing, judge what baselines.py left")
    options = parser.parse_args()
    home, seeds = data_dir(options.dataset), SEEDS[:options.seeds]
    ratings = datasets.read_ratings(datasets.fetch(options.dataset))
    infos, vectors = features.read_infos(home / "infos.json"), read_vectors(home / "texts_bert.p")
    _, similarity = features.read_item_matrix(home / "embeddings_content.npz")
    path = res_dir(options.dataset) / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "protocols": {}}
    for protocol in options.protocols:
        if options.add_scores:
            if protocol in PROTOCOLS[:3]:
                add_scores(protocol, results, ratings, np.array(list(infos)), home / "results" / protocol)
                write_json(path, results)
            continue
        data = dict(ratings=ratings, infos=infos, vectors=vectors, similarity=similarity, seeds=seeds)
        if protocol == "simulator":
            found = simulate(**data)
        else:
            chosen = results["protocols"].get(CHOSEN_ON, {}).get("chosen")
            found = rank_protocol(protocol, folder=home / "results", chosen=chosen, **data)
        if path.exists():  # another protocol may have been judged meanwhile
            results = json.loads(path.read_text(encoding="utf-8"))
        results["rows"] = [row for row in results["rows"] if row["protocol"] != protocol] + found.pop("rows")
        results["protocols"][protocol] = found
        write_json(path, results)
    if options.dataset == DEFAULT_DATASET:
        replace_block("results-5", readme_table(results["rows"]))


if __name__ == "__main__":
    main()
