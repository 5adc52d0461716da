"""Judge policies and baselines by every protocol of lesson 10: `python -m benchmarks.results [PROTOCOL …]`.

Everything is fitted on the training part of its protocol alone, the item matrix too; settings are chosen on
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

from helpers import datasets, evaluation, features, liking, recommenders, training
from helpers.agents import ddpg
from helpers.evaluation import Recommender
from helpers.extra import simulator
from helpers.files import DEFAULT_DATASET, data_dir, read_vectors, res_dir, write_json
from helpers.frames import Frames
from helpers.recommenders import UserHistory, fit_user_history
from tools.readme import replace_block

PROTOCOLS = ("last-5", "last-1", "temporal", "simulator")
SEEDS = (0, 1, 2, 3, 4)
FRAME_SIZE, MAX_STEPS, SETTINGS = 10, 800, ddpg.DDPGSettings()  # lesson 05's
GAMMA, STAR_WEIGHT = SETTINGS.gamma, 0.15
BETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 2.5)   # of the tilt by expected stars
SESSION_BETAS = (0.0, 0.6, 2.5, 10.0, 40.0)        # in the simulator, where nothing asks what people do next
RIDGES = (100, 200, 400)                        # of the history term
SAYS = list(product((2.0, 4.0, 6.0), (0.0, 0.2, 0.4)))  # its weight and rating_slope
NO_LOSS = 0.97          # of NDCG@10 on validation, of the supervised baseline with history: what a tilt must keep
CHOSEN_ON, CHOOSING_SEEDS = "last-5", 3  # the protocol whose validation chooses for all, and by how many seeds
RELEVANT = 4.0          # stars, in the temporal protocol
WORLD_SHARE = 0.3       # users the simulator is fitted on, whom no agent sees
TIRING = ", less satiation"  # of a recommender that knows how the simulator's users tire
SEEN_ENOUGH = 10        # ratings in the world for a film to be shown there
EASE_GRID = [(ridge, last, decay) for ridge in (50, 100, 200, 400, 1000, 2000, 4000)
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


def last_five(dataset: str) -> tuple[Cut, np.ndarray, np.ndarray, dict[str, Any]]:
    """Return what further studies of last-5 begin with: its cut, item ids and matrix, and the settings it chose."""
    home = data_dir(dataset)
    infos = features.read_infos(home / "infos.json")
    part = cut(datasets.read_ratings(datasets.fetch(dataset)), CHOSEN_ON)
    stored = json.loads((res_dir(dataset, committed=True) / "results.json").read_text(encoding="utf-8"))
    return (part, np.array(list(infos)), features.item_matrix(part.train, infos, read_vectors(home / "texts_bert.p")),
            stored["protocols"][CHOSEN_ON]["chosen"])


def user_metrics(ranked: pd.DataFrame, relevant: float | None = None) -> pd.DataFrame:
    """Return one row a user, by user_id: the mean of `evaluation.case_metrics` over the user's cases.

    With `relevant` a user's rows are one case, a slate that may hit several films: those rated that much or more are
    relevant, and users without any are left out. NDCG@10 is the discounted sum over the hits by that of the best slate;
    HR@10 is 1 if there is a hit; MRR is of the first; reward@10 is summed over all films of the slate, relevant or not.
    """
    cases = evaluation.case_metrics(ranked).assign(user_id=ranked["user_id"].to_numpy())
    if relevant is None:
        return cases.groupby("user_id").mean()
    good = (ranked["rating"] >= relevant).to_numpy()
    hits = cases[good].groupby("user_id").agg({"NDCG@10": "sum", "HR@10": "max", "MRR": "max"})
    best = np.cumsum(1 / np.log2(np.arange(2, 12)))
    hits["NDCG@10"] /= best[cases[good].groupby("user_id").size().clip(upper=10) - 1]
    return hits.join(cases.groupby("user_id")["reward@10"].sum())


def slate_metrics(slates: np.ndarray, similarity: np.ndarray, train: pd.DataFrame,
                  item_ids: np.ndarray) -> dict[str, float]:
    """Return what slates (U, k), −1 where a place is empty, are like, whoever hits: coverage, diversity, novelty.

    coverage: share of the catalogue on at least one slate. diversity: 1 − mean cosine of the `similarity`
    (n_items, d) of two items of a slate, over slates of two items or more; 0 where there is none. novelty: mean −log2
    of the share of users in `train` who rated an item, in bits; an item that nobody rated counts as rated by one.
    """
    v = similarity / np.maximum(np.linalg.norm(similarity, axis=1, keepdims=True), 1e-12)
    filled = slates >= 0
    chosen, k = v[slates] * filled[:, :, None], filled.sum(axis=1)
    pairs = np.square(chosen.sum(axis=1)).sum(axis=1) - np.square(chosen).sum(axis=(1, 2))
    alike = pairs[k > 1] / (k * (k - 1))[k > 1]
    raters = train.groupby("item_id")["user_id"].nunique().reindex(item_ids).fillna(1).to_numpy()
    return {"coverage": len(np.unique(slates[filled])) / len(item_ids),
            "diversity": float(1 - alike.mean()) if len(alike) else 0.0,
            "novelty": float(-np.log2(raters[slates[filled]] / train["user_id"].nunique()).mean())}


def train_agent(frames: Frames, seed: int, max_steps: int = MAX_STEPS, **weights: float) -> tuple[dict, float]:
    """Return (lesson 05's agent, CPU seconds); with value_weight=0 the supervised baseline."""
    started = time.process_time()
    agent = ddpg.new_agent(seed, FRAME_SIZE, frames.embed_size, **SETTINGS.for_agent())
    step = partial(ddpg.update, agent, frames, **SETTINGS.for_update() | weights)
    training.fit(step, frames, agent, batch_size=SETTINGS.batch_size, max_steps=max_steps, seed=seed,
                 shuffle_ties=True, safe_every=max_steps, log_every=100, desc=f"{weights or 'DDPG'}, seed {seed}")
    return agent, time.process_time() - started


def policy_of(agent: dict, term: UserHistory | None = None) -> Recommender:
    """Return the target actor as a recommender."""
    return recommenders.policy(agent["actor_target"], term)


def factorisation(train: pd.DataFrame, ids: np.ndarray, similarity: np.ndarray) -> Recommender:
    """Fit a biased matrix factorisation, its size chosen on a held-out tenth of the training part."""
    return simulator.expected_stars(simulator.fit_world(train, ids, similarity))


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
    """Return one model's metric minus another's on the same users, with its interval, and their ratio."""
    values = (users[one][metric] - users[other][metric]).dropna()
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
        return user_metrics(ranked(recommend, turns), relevant=part.relevant)

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

    tilts = {"expected stars": liking.fit_liking(part.train, ids, matrix),
             "factorisation": factorisation(part.train, ids, similarity)}
    models |= {"mean rating": ("baseline", [liking.mean_rating(part.train)], 0.0, {}),
               "factorisation": ("baseline", [tilts["factorisation"]], 0.0, {}),
               "expected stars": ("supervised", [tilts["expected stars"]], 0.0, {})}
    frames = Frames(part.train, ids, matrix, FRAME_SIZE)
    trained = {"supervised baseline": ("supervised", {"value_weight": 0.0}),
               "supervised, star-weighted": ("supervised", {"value_weight": 0.0, "star_weight": STAR_WEIGHT}),
               "DDPG": ("rl", {})}
    agents = {name: [train_agent(frames, seed, **weights) for seed in seeds] for name, (_, weights) in trained.items()}
    tried: dict[str, list] = {}
    if protocol == CHOSEN_ON:
        histories = {ridge: fit_user_history(part.train, ids, matrix, ridge) for ridge in RIDGES}
        chosen, tried = choose_all(agents, histories, tilts, partial(users_of, turns=valid))
    elif chosen is None:
        raise SystemExit(f"the settings of {protocol} are those that {CHOSEN_ON} chose: judge that one first")
    term = fit_user_history(part.train, ids, matrix, **chosen["user_history"])
    for name, (kind, _) in trained.items():
        runs, cpu = [policy_of(agent) for agent, _ in agents[name]], agents[name][0][1]
        longer = [policy_of(agent, term) for agent, _ in agents[name]]
        models[name] = (kind, runs, cpu, {"gamma": GAMMA} if kind == "rl" else {})
        models[f"{name}, with history"] = (kind, longer, cpu, {"user_history": chosen["user_history"]})
        for by, tilt in tilts.items():
            beta = chosen["beta"][f"{name}, {by}"]
            models[f"{name}, with history, tilted by {by}"] = (
                kind, [liking.tilted(each, tilt, beta) for each in longer], cpu, {"beta": beta})
    rows, users, held_out = [], {}, pd.concat([cases for _, cases in test])
    train_users = test[0][0].user_ids[test[0][0].log_length > FRAME_SIZE]
    for name, (kind, scorers, cpu, more) in models.items():
        ranks = [ranked(recommend, test) for recommend in scorers]
        runs = [user_metrics(each, relevant=part.relevant) for each in ranks]
        slates = evaluation.slates_of(scorers[0], test[0][0], train_users)
        heard = sum(liking.accuracy(recommend, test[0][0], held_out) for recommend in scorers) / len(scorers)
        low, high = evaluation.bootstrap(heard) if len(heard) else (0.0, 1.0)  # of clicks no two differ
        kept = np.mean([liking.kept_when_exchanged(recommend, test[0][0], train_users).mean() for recommend in scorers])
        more |= {"liking accuracy": round(float(heard.mean()), 4) if len(heard) else None,  # last-1 has no pairs
                 "liking low": round(low, 4), "liking high": round(high, 4),
                 "kept when exchanged": round(float(kept), 3)}
        more |= {key: round(value, 4) for key, value in
                 slate_metrics(slates, similarity, part.train, ids).items()}
        hits = ranks[0].loc[ranks[0]["rank"] <= 10, "rating"].mean()
        row, users[name] = judged_row(name, kind, protocol, runs, cpu, **more,
                                      **{"stars of hits": round(float(hits), 3)})
        if len(heard):
            users[name]["liking"] = heard.reindex(users[name].index)
        rows.append(row)
        print(row, flush=True)
    evaluation.write_cases(folder / protocol / "users.csv", users)
    return {"rows": rows, "cases": sum(len(cases) for _, cases in test), "users": len(users["DDPG"]),
            "chosen": chosen, **tried, "differences": differences_of(users)}


def choose_all(agents: dict[str, list], histories: dict[float, UserHistory], tilts: dict[str, Recommender],
               users_of: Callable) -> tuple[dict, dict[str, list]]:
    """Choose on validation, by the mean of the seeds: the history term, and how much each policy is tilted.

    The term (ridge, weight, rating slope) is the one with which the supervised baseline ranks best. The weight β of a
    tilt is the one that earns most reward@10 among those that keep NO_LOSS of that baseline's NDCG@10.

    Returns:
        (what was chosen, {"histories", "tilts"}: what was tried).
    """
    def judged(runs: list, term: UserHistory | None, tilt: Recommender | None = None, beta: float = 0.0) -> pd.Series:
        policies = [policy_of(agent, term) for agent, _ in runs[:CHOOSING_SEEDS]]
        policies = [liking.tilted(each, tilt, beta) for each in policies] if beta else policies
        return sum(users_of(each).mean() for each in policies) / len(policies)

    def listed(tried: dict[tuple, pd.Series], *names: str) -> list[dict]:
        return [dict(zip(names, key, strict=True), **{
            metric.lower(): round(float(means[metric]), 4) for metric in ("NDCG@10", "reward@10")})
            for key, means in tried.items()]

    tilts = {by: recommenders.remembered(tilt) for by, tilt in tilts.items()}
    said = {(ridge, *say): judged(agents["supervised baseline"], term._replace(weight=say[0], rating_slope=say[1]))
            for ridge, term in histories.items() for say in SAYS}
    ridge, weight, slope = best = max(said, key=lambda key: said[key]["NDCG@10"])
    term = histories[ridge]._replace(weight=weight, rating_slope=slope)
    tilted = {(name, by, beta): judged(runs, term, tilt, beta) for name, runs in agents.items()
              for by, tilt in tilts.items() for beta in BETAS}
    floor, beta = NO_LOSS * said[best]["NDCG@10"], {}
    for name, by in product(agents, tilts):
        front = pd.DataFrame({each: tilted[name, by, each] for each in BETAS}).T
        beta[f"{name}, {by}"] = liking.choose_beta(front, floor)
    return {"user_history": {"ridge": ridge, "weight": weight, "rating_slope": slope}, "beta": beta}, {
        "histories": listed(said, "ridge", "weight", "rating_slope"), "tilts": listed(tilted, "model", "by", "beta")}


def differences_of(users: dict[str, pd.DataFrame]) -> list[dict]:
    """Return what stands for ours, the tilted policies and what tilts them, minus every other model."""
    ours = [one for one in ("DDPG, with history", "DDPG, with history, tilted by expected stars",
                            "supervised baseline, with history, tilted by expected stars", "expected stars")
            if one in users]
    return [difference(users, one, other, metric) for one in ours for other in users if other != one
            for metric in ("NDCG@10", "reward@10", "liking") if metric in users[other]]


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
    return user_metrics(pd.concat(ranks), relevant=relevant)


class Part(NamedTuple):
    """What may be known of users whom agents see, and a world of others, with the films rated too rarely there."""

    train: pd.DataFrame
    matrix: np.ndarray
    frames: Frames
    term: UserHistory
    stars: dict[str, Recommender]
    world: simulator.World
    rare: Tensor


def simulate(ratings: pd.DataFrame, infos: dict, vectors: dict, similarity: np.ndarray,
             seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return {"rows", "differences", "world"} of the simulator: agents see 70 % of the users, its world the others.

    Settings are chosen likewise: fitted on 70 % of the agents' users, in a world of their others.
    """
    ids, rng = np.array(list(infos)), np.random.default_rng(0)

    def apart(log: pd.DataFrame) -> list[pd.DataFrame]:
        everyone = log["user_id"].unique()
        others = log["user_id"].isin(rng.choice(everyone, int(WORLD_SHARE * len(everyone)), replace=False))
        return [log[which].reset_index(drop=True) for which in (~others, others)]

    def known(train: pd.DataFrame, outside: pd.DataFrame) -> Part:
        matrix = features.item_matrix(train, infos, vectors)
        counts = outside["item_id"].value_counts().reindex(ids, fill_value=0).to_numpy()
        stars = {"mean rating": liking.mean_rating(train), "factorisation": factorisation(train, ids, similarity),
                 "expected stars": liking.fit_liking(train, ids, matrix)}
        return Part(train, matrix, Frames(train, ids, matrix, FRAME_SIZE),
                    fit_user_history(train, ids, matrix, RIDGES[1]), stars,
                    simulator.fit_world(outside, ids, similarity), torch.from_numpy(counts < SEEN_ENOUGH))

    def with_tiring(stars: dict[str, Recommender], part: Part) -> dict[str, Recommender]:
        return stars | {name + TIRING: simulator.less_satiation(each, part.world) for name, each in stars.items()}

    def played(recommend: Recommender, part: Part, seed: int, **how: Any) -> pd.DataFrame:
        return simulator.sessions(simulator.play(
            part.world, lambda *asked: recommend(*asked).masked_fill(part.rare, -1e9), part.matrix, FRAME_SIZE,
            seed=seed, **how), part.world)

    def tune(settings: dict[Any, Recommender]) -> Any:
        """Return the setting that earns most in the world to choose by, all tried with seed 0."""
        earned = {key: float(played(recommend, earlier, 0)["reward"].mean()) for key, recommend in settings.items()}
        tuned.update({str(key): round(value, 2) for key, value in earned.items()})
        print(tuned, flush=True)
        return max(earned, key=earned.get)

    seen, outside = apart(ratings)
    part, earlier = known(seen, outside), known(*apart(seen))
    tuned: dict[str, float] = {}
    models: dict[str, tuple[str, list[Recommender], dict]] = {
        "random": ("baseline", [recommenders.random(seed) for seed in seeds], {}),
        "popularity": ("baseline", [recommenders.popularity(seen)] * len(seeds), {})}
    for name, plain in (("EASE", True), ("EASE, recent films", False)):
        settings = [setting for setting in EASE_GRID if (setting[1] == 10_000) == plain]
        fitted = {ridge: recommenders.fit_ease(earlier.train, ids, ridge) for ridge in {one[0] for one in settings}}
        best = tune({(name, *one): recommenders.ease(fitted[one[0]], *one[1:]) for one in settings})
        models[name] = ("baseline", [recommenders.ease(recommenders.fit_ease(seen, ids, best[1]), *best[2:])]
                        * len(seeds), {"chosen": str(best[1:])})

    models |= {name: ("baseline", [stars] * len(seeds), {}) for name, stars in with_tiring(part.stars, part).items()}
    tried = [train_agent(earlier.frames, 0, **weights)[0] for weights in ({}, {"value_weight": 0.0})]
    _, *say = tune({("supervised", *say): policy_of(tried[1], earlier.term._replace(weight=say[0], rating_slope=say[1]))
                    for say in SAYS})
    says = dict(zip(("weight", "rating_slope"), say, strict=True))
    longer, asked = policy_of(tried[0], earlier.term._replace(**says)), with_tiring(earlier.stars, earlier)
    tilts = [tune({("DDPG", name, beta): liking.tilted(longer, asked[name], beta)
                   for name in (f"expected stars{tiring}", f"factorisation{tiring}") for beta in SESSION_BETAS})
             for tiring in ("", TIRING)]
    for name, kind, weights in (("supervised baseline", "supervised", {"value_weight": 0.0}), ("DDPG", "rl", {})):
        more = {"gamma": GAMMA} if kind == "rl" else {}
        agents = [train_agent(part.frames, seed, **weights)[0] for seed in seeds]
        longer = [policy_of(agent, part.term._replace(**says)) for agent in agents]
        models |= {name: (kind, [policy_of(agent) for agent in agents], more),
                   f"{name}, with history": (kind, longer, more | says)}
        models |= {f"{name}, with history, tilted by {tilt}, β = {beta:g}": (
            kind, [liking.tilted(each, with_tiring(part.stars, part)[tilt], beta) for each in longer],
            more | says | {"beta": beta}) for _, tilt, beta in tilts}
    world = part.world
    films = torch.as_tensor(world.items[:, 1], dtype=torch.float32)  # what they are worth to the average user
    oracles = {"oracle of films": lambda history, user_ids: films.expand(len(user_ids), -1),
               "oracle of films, people by their log": simulator.expected_stars(world),
               "oracle of films and people": simulator.expected_stars(world, oracle=True)}
    models |= {name: ("oracle", [stars] * len(seeds), {}) for name, stars in with_tiring(oracles, part).items()}
    rows, users = [], {}
    for mode in simulator.MODES:
        before = len(rows)
        for name, (kind, scorers, more) in models.items():
            runs = [played(recommend, part, seed, mode=mode)
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
        earned = {row["name"]: row["reward"] for row in rows[before:]}
        floor, best = earned["mean rating"], earned[f"oracle of films and people{TIRING}"]
        for row in rows[before:]:
            row["headroom taken"] = round((row["reward"] - floor) / (best - floor), 3) if best > floor else None
    return {"rows": rows, "tuned": tuned, "users": len(world.user_ids),
            "world": {"rmse": {key: round(value, 3) for key, value in world.rmse.items()}, "factors": world.n_factors,
                      "films shown": int((outside["item_id"].value_counts() >= SEEN_ENOUGH).sum()),
                      "habits": simulator.HABITS._asdict()},
            "differences": [difference(users, one, other, metric)
                            for other in ("mean rating", f"mean rating{TIRING}") for one in users if one != other
                            for metric in ("reward", "diversity")]}


HEADLINE = {"popularity": "popularity", "eSASRec, with history": "eSASRec, with the history term",
            "supervised baseline, with history": "supervised baseline, with the history term",
            "DDPG, with history": "DDPG, with the history term",
            "DDPG, with history, tilted by expected stars": "the same, tilted by expected stars: what is served"}


def headline_table(rows: list[dict]) -> str:
    """Return the README's table: a few rows of last-5."""
    of_name = {row["name"]: row for row in rows if row["protocol"] == "last-5"}
    lines = ["| | NDCG@10 | 95 % over users | reward@10 | liking |", "| --- | ---: | :---: | ---: | ---: |"]
    for name, shown in HEADLINE.items():
        row = of_name[name]
        liked = "" if row.get("liking accuracy") is None else f"{row['liking accuracy']:.3f}"
        lines.append(f"| {shown} | {row['ndcg@10']:.3f} | {row['ndcg@10 low']:.3f} – {row['ndcg@10 high']:.3f} | "
                     f"{row['reward@10']:.3f} | {liked} |")
    return "\n".join(lines)


def ranking_table(rows: list[dict]) -> str:
    """Return a table of docs/results.md: every model of last-5, best NDCG@10 last."""
    lines = ["| model | NDCG@10 | 95 % over users | HR@10 | reward@10 | liking | kept when exchanged | seeds |",
             "| --- | ---: | :---: | ---: | ---: | ---: | ---: | ---: |"]
    ranked_rows = sorted((row for row in rows if row["protocol"] == "last-5"), key=lambda row: row["ndcg@10"])
    return "\n".join([*lines, *(
        f"| {row['name']} | {row['ndcg@10']:.3f} | {row['ndcg@10 low']:.3f} – {row['ndcg@10 high']:.3f} | "
        f"{row['hr@10']:.3f} | {row['reward@10']:.3f} | {cell(row, 'liking accuracy')} | "
        f"{cell(row, 'kept when exchanged')} | {row['seeds']} |" for row in ranked_rows)])


def session_table(rows: list[dict]) -> str:
    """Return a table of docs/results.md: what a session of the simulator adds up to."""
    lines = ["| a session with simulated users | reward | 95 % over users | headroom taken |",
             "| --- | ---: | :---: | ---: |"]
    sessions = [row for row in rows if row["protocol"] == "simulator" and row["mode"] == "no-repeat"]
    return "\n".join([*lines, *(
        f"| {row['name']} | {row['reward']:.0f} | {row['reward low']:.0f} – {row['reward high']:.0f} | "
        f"{cell(row, 'headroom taken')} |" for row in sorted(sessions, key=lambda row: row["reward"]))])


def readme_table(rows: list[dict]) -> str:
    """Return both tables."""
    return f"{ranking_table(rows)}\n\n{session_table(rows)}"


def cell(row: dict, name: str) -> str:
    """Return a number of a row as text; nothing where the row has none."""
    return f"{row[name]:.3f}" if row.get(name) is not None else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("protocols", nargs="*", default=PROTOCOLS, metavar="PROTOCOL", help=", ".join(PROTOCOLS))
    parser.add_argument("--dataset", default=DEFAULT_DATASET)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--add-scores", action="store_true", help="train nothing, judge what baselines.py left")
    parser.add_argument("--into", type=Path, help="add to this file of results, e.g. res/results-ml-1m.json")
    options = parser.parse_args()
    if options.into and "last-1" in options.protocols:
        parser.error("--into is for the other protocols: last-1 of such a file is of benchmarks.whole_log")
    home, seeds = data_dir(options.dataset), SEEDS[:options.seeds]
    ratings = datasets.read_ratings(datasets.fetch(options.dataset))
    infos, vectors = features.read_infos(home / "infos.json"), read_vectors(home / "texts_bert.p")
    _, similarity = features.read_item_matrix(home / "embeddings_content.npz")
    path = options.into or res_dir(options.dataset, committed=True) / "results.json"
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
        rows, old = found.pop("rows"), results["protocols"].get(protocol, {})
        left = [row for row in results["rows"] if row["protocol"] == protocol and row["kind"] == "baseline"
                and row["name"] not in {row["name"] for row in rows}]  # by baselines.py: stays as it was judged
        others = {row["name"] for row in left}
        found["differences"] += [each for each in old.get("differences", []) if each["other"] in others]
        found |= {key: old[key] for key in ("history of others",) if key in old}
        results["rows"] = rows + left + [row for row in results["rows"] if row["protocol"] != protocol]
        results["protocols"][protocol] = found
        write_json(path, results)
    if options.dataset == DEFAULT_DATASET and not options.into:
        replace_block("headline", headline_table(results["rows"]))
        replace_block("results-5", readme_table(results["rows"]))
    elif home.name == "ml-1m" and options.into:
        replace_block("results-5-ml-1m", ranking_table(results["rows"]))


if __name__ == "__main__":
    main()
