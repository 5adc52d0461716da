"""What the lesson cells of notes/17_estimates.ipynb define; `make agents` writes it."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau

from helpers import features
from helpers.agents.foresight import Setting, expected_liking
from helpers.extra import estimates, foresight
from helpers.files import DataError


def public_of(setting: Setting) -> estimates.Public:
    """Return what is public of lesson 15's people and films; the world's own appeal and liking are not read."""
    world = setting.world
    start = foresight.Visits(world, foresight.Habits(), torch.arange(len(world.user_ids)))
    odds = foresight.fit_choice(setting.known, world.item_ids, known=world.first.shape[1])((start.rated > 0).float())
    odds = (odds - odds.mean()) / odds.std().clamp(min=1e-6)
    liking = expected_liking(setting.known, world.item_ids, setting.content)(start)
    votes = features.standardise(features.votes_of(setting.known, world.item_ids).to_numpy(np.float64))
    popularity, rating = np.broadcast_to(votes.T[:, None], (2, *odds.shape))
    film = np.stack([np.ones(odds.shape), odds, liking, popularity, rating, odds ** 2], axis=2).astype(np.float32)
    return estimates.Public(film, start.shown.numpy(), world.first_stars.mean(dim=1).numpy())


def policies_of(public: estimates.Public) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (behaviour policies, target policies): name → weights (U, n) of what each shows."""
    _, odds, liking, popularity, rating, _ = np.moveaxis(public.film, 2, 0)
    soft = partial(estimates.softmax_of, seen=public.seen)
    return ({"wide": soft(odds + liking, 0.7, share=0.1), "narrow": soft(popularity, 0.1, share=0.05)},
            {"sharper": soft(odds + liking, 0.5), "rule": soft(odds + 4 * liking, 0.5),
             "popularity": soft(popularity, 0.3), "mean rating": soft(rating, 0.3), "random": soft(0 * odds, 1.0)})


def effective_size(w: np.ndarray) -> np.ndarray:
    """Return (Σ w)² / Σ w² over sessions: w (P, N) → (P,)."""
    return w.sum(axis=1) ** 2 / np.maximum((w ** 2).sum(axis=1), 1e-300)


def weights_of(pi: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return w = π/β of the actions that were logged: pi (P, N, L), b (N, L) → (P, N, L).

    DataError: shapes differ, or a propensity is no probability above 0.
    """
    if pi.shape[1:] != b.shape:
        raise DataError(f"π of shape {pi.shape} beside propensities of shape {b.shape}: both must be of the same steps")
    if not ((b > 0) & (b <= 1)).all():
        raise DataError(f"{(~((b > 0) & (b <= 1))).sum()} of {b.size} propensities are 0, NaN or above 1: what was "
                        f"shown had a probability above 0, so log it, or leave these steps out")
    return pi / b


def resampled(n: int, draws: int, seed: int = 0) -> np.ndarray:
    """Return (1 + draws, n): a row of ones, then how often a bootstrap drew each of n sessions."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    return np.concatenate([np.ones((1, n)), drawn])


def whole_session(w: np.ndarray, reward: np.ndarray, counts: np.ndarray, normalised: bool = False) -> np.ndarray:
    """Return IPS or SN: w (P, N, L), reward (N, L), counts (D, N) → (P, D)."""
    whole = w.prod(axis=2)
    by = np.maximum(whole @ counts.T, 1e-300) if normalised else counts.sum(axis=1)
    return (whole * reward.sum(axis=1)) @ counts.T / by


def step_by_step(w: np.ndarray, delta: np.ndarray, counts: np.ndarray, normalised: bool = False) -> np.ndarray:
    """Return Σ_t mean of W_t·δ_t: w (P, N, L), delta (N, L) or (P, N, L), counts (D, N) → (P, D)."""
    whole = w.cumprod(axis=2)
    sums = np.tensordot(whole * delta, counts, axes=(1, 1))                                           # (P, L, D)
    by = np.maximum(np.tensordot(whole, counts, axes=(1, 1)), 1e-300) if normalised else counts.sum(axis=1)
    return (sums / by).sum(axis=1)


def crossed(state: np.ndarray, film: np.ndarray) -> np.ndarray:
    """Return s ⊗ x float64: state (…, S), film (…, K) → (…, S·K)."""
    product = state[..., :, None] * film[..., None, :].astype(np.float64)
    return product.reshape(*state.shape[:-1], state.shape[-1] * film.shape[-1])


def fit_q(log: estimates.Log, p: int, counts: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """Return θ (D, S·K) of FQE for target policy p, one for each row of counts (D, N)."""
    x = crossed(log.state, log.film)
    later = np.zeros_like(x)
    later[:, :-1] = crossed(log.state[:, 1:], log.mean_film[p][:, 1:])      # 0 after the end of a session
    d = x.shape[2]
    gram, onward = ((counts @ (x.transpose(0, 2, 1) @ y).reshape(len(x), -1)).reshape(-1, d, d) for y in (x, later))
    reward = (counts @ np.einsum("nld,nl->nd", x, log.taken))[:, :, None]
    solve, theta = np.linalg.inv(gram + ridge * np.eye(d)), np.zeros((len(counts), d, 1))
    for _ in range(x.shape[1]):
        theta = solve @ (reward + onward @ theta)
    return theta[:, :, 0]


def q_errors(log: estimates.Log, p: int, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (V of each first state (N,), δ (N, L)) of a fitted Q, θ (S·K,), for target policy p."""
    q, v = crossed(log.state, log.film) @ theta, crossed(log.state, log.mean_film[p]) @ theta
    after = np.concatenate([v[:, 1:], np.zeros((len(v), 1))], axis=1)
    return v[:, 0], log.taken + after - q


def doubly_robust(log: estimates.Log, thetas: list[np.ndarray], counts: np.ndarray,
                  normalised: bool = False) -> np.ndarray:
    """Return DR or its self-normalised form (P, D), with the Q that was fitted to the log as it is."""
    start, delta = map(np.stack, zip(*(q_errors(log, p, theta[0]) for p, theta in enumerate(thetas)), strict=True))
    added = step_by_step(weights_of(log.pi, log.b), delta, counts, normalised)
    return start @ counts.T / counts.sum(axis=1) + added


class Person(NamedTuple):
    """A model of what people do."""

    taken: np.ndarray    # (K,) of the log-odds of being taken
    stars: np.ndarray    # (K,) of the stars above the own mean
    noise: float         # of the stars
    leaving: np.ndarray  # (2,) of the log-odds of leaving: constant, and times the recent stars


def logistic(x: np.ndarray, y: np.ndarray, weight: np.ndarray, theta: np.ndarray, steps: int) -> np.ndarray:
    """Return θ (K,) of a ridge logistic regression of y (T,) on x (T, K), by steps of Newton's method from theta."""
    for _ in range(steps):
        p = 1 / (1 + np.exp(-x @ theta))
        curve = (x * (weight * p * (1 - p))[:, None]).T @ x + np.eye(len(theta))
        theta = theta + np.linalg.solve(curve, x.T @ (weight * (y - p)) - theta)
    return theta


def fit_person(log: estimates.Log, counts: np.ndarray, start: Person | None = None) -> Person:
    """Return the model of a log whose sessions count (N,) times; from `start` two steps of Newton's method do."""
    here, recent = log.here, log.state[:, :, 1]
    x, taken, weight = log.film[here].astype(np.float64), log.taken[here], counts[np.nonzero(here)[0]]
    now = estimates.PERSISTENCE * recent + (1 - estimates.PERSISTENCE) * log.stars
    after = np.where(log.taken > 0, now, recent)[here]
    first = start or Person(np.zeros(x.shape[1]), np.zeros(0), 0.0, np.zeros(2))
    steps = 2 if start else 8
    leaving = logistic(np.stack([np.ones(len(x)), after], axis=1), log.left[here], weight, first.leaving, steps)
    liked, of = log.stars[here], weight * taken
    stars = np.linalg.solve((x * of[:, None]).T @ x + np.eye(x.shape[1]), x.T @ (of * liked))
    noise = float(np.sqrt((of * (liked - x @ stars) ** 2).sum() / max(of.sum(), 1)))
    return Person(logistic(x, taken, weight, first.taken, steps), stars, noise, leaving)


def blinded(person: Person, log: estimates.Log, counts: np.ndarray) -> Person:
    """Return the model with one constant rate of leaving."""
    rate = np.clip((counts @ log.left.sum(axis=1)) / (counts @ log.here.sum(axis=1)), 1e-6, 0.99)
    return person._replace(leaving=np.array([np.log(rate / (1 - rate)), 0.0]))


def play_person(person: Person, films: np.ndarray, uniforms: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return what a model takes in a session (M,), given films (L, M, K); uniforms, normals (L, M)."""
    p, stars = 1 / (1 + np.exp(-films @ person.taken)), films @ person.stars + person.noise * normals
    taken, recent, there, total = uniforms < p, np.zeros(p.shape[1]), np.ones(p.shape[1]), np.zeros(p.shape[1])
    for t in range(len(p)):
        total += there * p[t]
        now = estimates.PERSISTENCE * recent + (1 - estimates.PERSISTENCE) * stars[t]
        recent = np.where(taken[t], now, recent)
        there = there / (1 + np.exp(person.leaving[0] + person.leaving[1] * recent))
    return total


def by_model(log: estimates.Log, plays: estimates.ModelSessions, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the model and the blind model say (P, D) for each row of counts (D, N)."""
    start, said = None, []
    of_person = np.stack([np.bincount(log.user, row, minlength=plays.user.max() + 1) for row in counts])[:, plays.user]
    share = of_person / of_person.sum(axis=1, keepdims=True)                              # (D, M)
    for row, weight in zip(counts, share, strict=True):
        person = fit_person(log, row, start)
        start = start or person
        said.append([[weight @ play_person(one, films, plays.uniforms, plays.normals) for films in plays.films]
                     for one in (person, blinded(person, log, row))])
    return np.moveaxis(np.array(said), 0, 2)[0], np.moveaxis(np.array(said), 0, 2)[1]


def estimate_first(log: estimates.Log, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return estimator → (P, D): the chance that the first film is taken."""
    log = log.first(len(log.user), steps=1)
    w, n = weights_of(log.pi, log.b), counts.sum(axis=1)
    thetas = [fit_q(log, p, counts) for p in range(len(log.pi))]
    return {"log's mean": np.tile(counts @ log.taken[:, 0] / n, (len(log.pi), 1)),
            "IPS": whole_session(w, log.taken, counts), "SN": whole_session(w, log.taken, counts, normalised=True),
            "DM": from_start(log, thetas, counts), "DR": doubly_robust(log, thetas, counts)}


def from_start(log: estimates.Log, thetas: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return the mean V of the first states (P, D), by the Q of each row of counts."""
    return np.stack([(counts @ crossed(log.state[:, 0], log.mean_film[p][:, 0]) * theta).sum(axis=1)
                     for p, theta in enumerate(thetas)]) / counts.sum(axis=1)


def estimate_session(log: estimates.Log, plays: estimates.ModelSessions, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return estimator → (P, D): films taken in a session."""
    w, n, taken = weights_of(log.pi, log.b), counts.sum(axis=1), log.taken
    logged, first = counts @ taken.sum(axis=1) / n, counts @ taken[:, 0] / n
    thetas = [fit_q(log, p, counts) for p in range(len(log.pi))]
    model, blind = by_model(log, plays, counts)
    sn_first = whole_session(w[:, :, :1], taken[:, :1], counts, normalised=True)
    return {"log's mean": np.tile(logged, (len(log.pi), 1)),
            "first film, scaled": sn_first * logged / np.maximum(first, 1e-9),
            "IPS": whole_session(w, taken, counts), "SN": whole_session(w, taken, counts, normalised=True),
            "per-decision": step_by_step(w, taken, counts),
            "per-decision, SN": step_by_step(w, taken, counts, normalised=True),
            "DR": doubly_robust(log, thetas, counts), "DR, SN": doubly_robust(log, thetas, counts, normalised=True),
            "FQE": from_start(log, thetas, counts), "model": model, "model, blind": blind}


def rows_of_log(log: estimates.Log, plays: estimates.ModelSessions, truth: dict[str, np.ndarray],
                draws: int) -> pd.DataFrame:
    """Return one row an estimator and target policy: estimate, interval, true value, effective sample size."""
    counts, w = resampled(len(log.user), draws), weights_of(log.pi, log.b)
    said = {"first film": (estimate_first(log, counts), w[:, :, 0]),
            "whole session": (estimate_session(log, plays, counts), w.prod(axis=2))}
    tables = []
    for question, (by_name, weight) in said.items():
        for name, values in by_name.items():
            low, high = np.quantile(values[:, 1:], [0.025, 0.975], axis=1)
            tables.append(pd.DataFrame({
                "question": question, "estimator": name, "sessions": len(log.user), "policy": range(len(values)),
                "estimate": values[:, 0], "low": low, "high": high, "truth": truth[question],
                "effective": effective_size(weight)}))
    return pd.concat(tables, ignore_index=True)


def study(world: foresight.World, habits: foresight.Habits, public: estimates.Public, behaviour: np.ndarray,
          targets: list[np.ndarray], plays: estimates.ModelSessions, truth: dict[str, np.ndarray], sizes: Sequence[int],
          seed: int, draws: int) -> pd.DataFrame:
    """Return `rows_of_log` for the first sessions of one new log, for each of `sizes`."""
    log = estimates.play_log(world, habits, public, behaviour, targets, max(sizes), seed)
    rows = pd.concat([rows_of_log(log.first(n), plays, truth, draws) for n in sizes], ignore_index=True)
    return rows.assign(log=seed)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a question, estimator and size: bias, RMSE, covered, τ, regret, effective sample size."""
    said = []
    for key, own in rows.groupby(["question", "estimator", "sessions"], sort=False):
        error = own["estimate"] - own["truth"]
        row = dict(zip(("question", "estimator", "sessions"), key, strict=True))
        row |= {"bias": error.groupby(own["policy"]).mean().abs().mean(), "RMSE": float(np.sqrt((error ** 2).mean())),
                "covered": ((own["low"] <= own["truth"]) & (own["truth"] <= own["high"])).mean()}
        logs = [one for _, one in own.groupby("log")]
        orders = row["estimator"] != "log's mean"  # which says the same of all
        row["τ"] = np.mean([kendalltau(one["estimate"], one["truth"]).statistic for one in logs]) if orders else np.nan
        chosen = [one["truth"].max() - one["truth"].to_numpy()[one["estimate"].to_numpy().argmax()] for one in logs]
        said.append(row | {"regret": np.mean(chosen) if orders else np.nan, "effective": own["effective"].mean()})
    return pd.DataFrame(said)


def shares_of(log: pd.DataFrame) -> pd.Series:
    """Return how often each item was shown in its place: by (position, item_id), sums to 1 for each position."""
    counts = log.groupby(["position", "item_id"]).size()
    return counts / counts.groupby(level="position").sum()


def looked_up(table: pd.Series, log: pd.DataFrame) -> np.ndarray:
    """Return the entries of a table by (position, item_id) for the rows of a log (N,), 0 where there is none."""
    return table.reindex(pd.MultiIndex.from_frame(log[["position", "item_id"]])).fillna(0).to_numpy(np.float64)


def click_rates(logs: dict[str, pd.DataFrame], counts: np.ndarray) -> pd.DataFrame:
    """Return one row an estimate of one policy's clicks of 1,000 from the other's log; counts (D, N)."""
    shares, n_items, rows = shares_of(logs["bts"]), logs["random"]["item_id"].nunique(), []
    weights = {("bts", "shares"): looked_up(shares, logs["random"]) / logs["random"]["propensity"].to_numpy(),
               ("random", "recorded"): 1 / n_items / logs["bts"]["propensity"].to_numpy(),
               ("random", "shares"): 1 / n_items / looked_up(shares, logs["bts"])}
    for (policy, propensities), w in weights.items():
        click = logs["random" if policy == "bts" else "bts"]["click"].to_numpy(np.float64)[:, None]
        true = 1_000 * logs[policy]["click"].to_numpy() @ counts.T / counts.sum(axis=1)
        said = {"IPS": whole_session(w[None, :, None], click, counts), "log's mean": click[:, 0] @ counts.T / len(w),
                "SN": whole_session(w[None, :, None], click, counts, normalised=True)}
        for name, values in said.items():
            row = {"of policy": policy, "propensities": propensities, "estimator": name, "mean weight": w.mean(),
                   "largest weight": w.max(), "effective": effective_size(w[None])[0],
                   "estimate": 1_000 * values.ravel()[0], "true": true[0]}
            row["low"], row["high"] = np.quantile(1_000 * values.ravel()[1:], [0.025, 0.975])
            row["true low"], row["true high"] = np.quantile(true[1:], [0.025, 0.975])
            rows.append(row)
    return pd.DataFrame(rows)


def replay_thompson(log: pd.DataFrame, seed: int) -> tuple[int, int]:
    """Return (impressions kept, clicks among them) of a Thompson sampler on a random log, its rows in a new order."""
    rng, (items, item) = np.random.default_rng(seed), np.unique(log["item_id"], return_inverse=True)
    won, lost, kept, click = np.ones(len(items)), np.ones(len(items)), [], log["click"].to_numpy()
    for row in rng.permutation(len(log)):
        if rng.beta(won, lost).argmax() == item[row]:
            kept.append(click[row])
            won[item[row]] += click[row]
            lost[item[row]] += 1 - click[row]
    return len(kept), int(np.sum(kept))


def draw_estimates(rows: pd.DataFrame, clicks: pd.DataFrame) -> plt.Figure:
    """Draw RMSE over the number of sessions for both questions and logs, and the Open Bandit estimates."""
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.2), layout="constrained")
    names = ("IPS", "SN", "per-decision", "per-decision, SN", "DR", "DR, SN", "FQE", "DM", "model", "model, blind",
             "first film, scaled")
    colour = {name: plt.get_cmap("tab20")(k) for k, name in enumerate(names)} | {"log's mean": "k"}
    panels = (("first film", "wide"), ("first film", "narrow"), ("whole session", "wide"), ("whole session", "narrow"))
    for (question, behaviour), axis in zip(panels, (axes[0, 0], axes[0, 0], axes[0, 1], axes[1, 0]), strict=True):
        dashed = question == "first film" and behaviour == "narrow"
        own = rows[(rows["question"] == question) & (rows["behaviour"] == behaviour)]
        for name, one in own.groupby("estimator", sort=False):
            axis.plot(one["sessions"], one["RMSE"], "--" if dashed else "-", color=colour[name], marker=".",
                      label=None if dashed else name)
        unit = "share taken" if question == "first film" else "films in a session"
        title = f"{question}, {behaviour} log" if question != "first film" else "first film, wide log (dashed: narrow)"
        axis.set(xscale="log", yscale="log", xlabel="sessions in a log", ylabel=f"RMSE, {unit}", title=title)
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize="small")
    draw_clicks(axes[1, 1], clicks)
    return figure


def draw_clicks(axis: plt.Axes, clicks: pd.DataFrame) -> None:
    """Draw estimates of click rates with intervals beside what policies really got."""
    styles = {"really": ("k", "s"), "IPS": ("C0", "o"), "SN": ("C1", "o")}
    groups = list(clicks.groupby(["campaign", "of policy", "propensities"], sort=False))
    for place, (_, own) in enumerate(groups):
        by = own.set_index("estimator")
        points = {"really": by.loc["IPS", ["true", "true low", "true high"]]} | {
            name: by.loc[name, ["estimate", "low", "high"]] for name in ("IPS", "SN")}
        for k, (name, (middle, low, high)) in enumerate(points.items()):
            axis.errorbar(middle, place + 0.22 * (k - 1), xerr=[[max(0, middle - low)], [max(0, high - middle)]],
                          fmt=styles[name][1], color=styles[name][0], capsize=2, markersize=4,
                          label=name if place == 0 else None)
    labels = [f"{campaign}: {policy}, by {propensities}" for (campaign, policy, propensities), _ in groups]
    axis.set_yticks(range(len(groups)), labels, fontsize="x-small")
    axis.set(xlabel="clicks of 1,000 impressions", title="Open Bandit, from the other policy's log")
    axis.invert_yaxis()
    axis.legend(fontsize="x-small")
