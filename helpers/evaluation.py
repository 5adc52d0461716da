"""Hold out, rank the whole catalogue, compare with recommenders people would use instead."""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.files import DataError, replacing
from helpers.frames import Frames, reward_of, rows_of
from helpers.recommenders import Recommender
from helpers.tables import in_order


class Split(NamedTuple):
    """Ratings by purpose: `train` fits, `valid` chooses, `test` reports."""

    train: pd.DataFrame
    valid: pd.DataFrame
    test: pd.DataFrame


def split_last(ratings: pd.DataFrame, n_test: int = 1, n_valid: int = 1) -> Split:
    """Hold out the last `n_test` ratings of each user as test, the `n_valid` before them as validation.

    A user with too few ratings to leave one for training stays in training; DataError if that is everybody. Where
    ratings share their second (half of ML-100K) "last" is the order of the file, which is arbitrary.

    >>> log = pd.DataFrame({"user_id": [1, 1, 1, 1, 2, 2], "item_id": [7, 8, 9, 5, 8, 7], "timestamp": range(6)})
    >>> [part["item_id"].tolist() for part in split_last(log)]
    [[7, 8, 8, 7], [9], [5]]
    """
    ratings = in_order(ratings)
    from_end = ratings.groupby("user_id").cumcount(ascending=False)
    enough = ratings.groupby("user_id")["item_id"].transform("size") > n_test + n_valid
    if not enough.any():
        raise DataError(f"no user has more than {n_test + n_valid} ratings: nothing can be held out")
    held_out, test = enough & (from_end < n_test + n_valid), enough & (from_end < n_test)
    return Split(*(ratings[mask].reset_index(drop=True) for mask in (~held_out, held_out & ~test, test)))


def together(*parts: pd.DataFrame) -> pd.DataFrame:
    """Join parts of one log again, sorted by (user_id, timestamp), ties in the order of the parts."""
    return in_order(pd.concat(parts, ignore_index=True))


def split_time(ratings: pd.DataFrame, share: float = 0.1, at_least: int = 10) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut the log at one moment for all: (the ratings before it, what was rated after it).

    The last `share` of all ratings come after. Of these, only users with `at_least` earlier ratings are kept, and
    only films they had not rated before; DataError if nothing is.

    >>> log = pd.DataFrame({"user_id": [1, 1, 2, 1, 2], "item_id": [7, 8, 7, 9, 7], "timestamp": range(5)})
    >>> [part["item_id"].tolist() for part in split_time(log, share=0.4, at_least=1)]  # user 2 knows film 7
    [[7, 8, 7], [9]]
    """
    ratings = in_order(ratings)
    moment = ratings["timestamp"].sort_values(kind="stable").iloc[int((1 - share) * len(ratings))]
    late, known = ratings["timestamp"] >= moment, ratings.duplicated(["user_id", "item_id"])
    n_before = ratings.loc[~late, "user_id"].value_counts()
    after = ratings[late & ~known & ratings["user_id"].isin(n_before.index[n_before >= at_least])]
    if after.empty:
        raise DataError(f"nobody with {at_least} ratings before the last {share:.0%} of the log rated anything new "
                        f"after it: the protocol has no case")
    return ratings[~late].reset_index(drop=True), after.reset_index(drop=True)


def rolling_cases(before: pd.DataFrame, held_out: pd.DataFrame) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Return (all ratings before, cases) for the first, second, … held-out rating of each user.

    >>> log = pd.DataFrame({"user_id": 1, "item_id": [7, 8, 9], "timestamp": range(3)})
    >>> [[part["item_id"].tolist() for part in turn] for turn in rolling_cases(log[:1], log[1:])]
    [[[7], [8]], [[7, 8], [9]]]
    """
    held_out = in_order(held_out)
    position = held_out.groupby("user_id").cumcount()
    return [(together(before, held_out[position < k]), held_out[position == k].reset_index(drop=True))
            for k in range(position.max() + 1)]


def mask_seen(scores: Tensor, history: Frames, user_ids: np.ndarray) -> Tensor:
    """Return scores (U, n_items) with −inf at every item in the user's log."""
    scores = torch.as_tensor(scores, dtype=torch.float32).clone()
    users, rows = (torch.as_tensor(places) for places in history.logs(user_ids))
    scores[users.to(scores.device), history.item_idx[rows].to(scores.device)] = -torch.inf
    return scores


@torch.no_grad()
def _unseen_scores(recommend: Recommender, history: Frames, user_ids: np.ndarray,
                   batch_size: int | None = None) -> Iterator[Tensor]:
    """Yield the scores (U, n_items) of what users have not seen: of 1,024, or of as many as have 2²⁵ (134 MB)."""
    batch_size = batch_size or max(1, min(1024, (1 << 25) // len(history.item_ids)))
    for first in range(0, len(user_ids), batch_size):
        some = user_ids[first:first + batch_size]
        yield mask_seen(recommend(history, some), history, some)


@cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def rank_held_out(recommend: Recommender, history: Frames, held_out: pd.DataFrame,
                  batch_size: int | None = None) -> pd.DataFrame:
    """Rank each held-out item among what the user has not seen: `held_out` with `rank`, 1 the best.

    Ties and NaN scores count against the method. An item of the user's history is never found; a warning counts them.
    """
    if held_out.empty:
        raise DataError("nothing is held out: there is no case to rank")
    target = torch.as_tensor(rows_of(held_out["item_id"], history.item_ids)).long()[:, None]
    ranks, n_repeats, first = [], 0, 0
    for scores in _unseen_scores(recommend, history, held_out["user_id"].to_numpy(), batch_size):
        scores = scores.cpu()
        own = scores.gather(1, target[first:first + len(scores)])
        first += len(scores)
        ranks.append((~(scores < own)).sum(dim=1).numpy())
        n_repeats += int((own == -torch.inf).sum())
    if n_repeats and len(held_out) > 1:
        _say_once(f"{n_repeats:,} of {len(held_out):,} held-out items had been rated before by the same user: what is "
                  f"seen is not recommended, so nothing can find them")
    return held_out.assign(rank=np.concatenate(ranks))


def case_metrics(ranked: pd.DataFrame) -> pd.DataFrame:
    """Return one row a case: NDCG@10, HR@10, MRR, and reward@10 = hit × 2·(rating − 2.5).

    With one relevant item NDCG@10 is 1 / log2(1 + rank) up to rank 10.

    >>> case_metrics(pd.DataFrame({"rank": [1, 3, 11], "rating": [5, 0.5, 5]})).round(3)
       NDCG@10  HR@10    MRR  reward@10
    0      1.0    1.0  1.000        5.0
    1      0.5    1.0  0.333       -4.0
    2      0.0    0.0  0.091        0.0
    """
    rank = ranked["rank"].to_numpy(np.float64)
    hit = rank <= 10
    return pd.DataFrame({"NDCG@10": np.where(hit, 1 / np.log2(1 + rank), 0), "HR@10": hit.astype(np.float64),
                         "MRR": 1 / rank, "reward@10": hit * reward_of(ranked["rating"].to_numpy(np.float64))})


def slates_of(recommend: Recommender, history: Frames, user_ids: np.ndarray, k: int = 10) -> np.ndarray:
    """Return (U, k) rows of the item matrix: the best-scored unseen items of each user, −1 where none is left.

    An item whose score is NaN or −inf is never on a slate. DataError: a slate longer than the catalogue.
    """
    if k > len(history.item_ids):
        raise DataError(f"a slate of {k} items is asked of a catalogue of {len(history.item_ids)}")
    slates = []
    for scores in _unseen_scores(recommend, history, user_ids):
        score, row = torch.where(scores.isnan(), -torch.inf, scores).topk(k)
        slates.append(torch.where(score == -torch.inf, -1, row).cpu().numpy())
    return np.concatenate(slates)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values` (U,), resampling users.

    >>> bootstrap(np.full(9, 0.25))
    (0.25, 0.25)
    """
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def ndcg(recommend: Recommender, history: Frames, held_out: pd.DataFrame) -> float:
    """Return the mean NDCG@10 of a recommender."""
    return float(case_metrics(rank_held_out(recommend, history, held_out))["NDCG@10"].mean())


def compare(models: dict[str, list[Recommender]], history: Frames,
            held_out: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Judge models, each given as one recommender a seed, by what was held out.

    Returns (one row a model: means, spread over seeds, interval over cases; {model: mean `case_metrics` of its seeds}).
    """
    cases, rows = {}, []
    for name, seeds in models.items():
        runs = [case_metrics(rank_held_out(model, history, held_out)) for model in seeds]
        cases[name] = sum(runs) / len(runs)
        low, high = bootstrap(cases[name]["NDCG@10"])
        spread = f"± {np.std([run['NDCG@10'].mean() for run in runs], ddof=1):.4f}" if len(runs) > 1 else ""
        rows.append({"model": name, **cases[name].mean().round(3), "NDCG@10 over seeds": spread,
                     "95 % over users": f"{low:.3f} – {high:.3f}"})
    return pd.DataFrame(rows), cases


def differences(cases: dict[str, pd.DataFrame], model: str, others: list[str]) -> pd.DataFrame:
    """Return `model` minus each other, case by case: mean and 95 % interval, one row another model."""
    rows = []
    for other in others:
        row = {f"{model} minus …": other}
        for metric in ("NDCG@10", "reward@10"):
            difference = cases[model][metric] - cases[other][metric]
            low, high = bootstrap(difference)
            row[metric] = f"{difference.mean():+.3f}  [{low:+.3f}, {high:+.3f}]"
        rows.append(row)
    return pd.DataFrame(rows)


def write_cases(path: Path, cases: dict[str, pd.DataFrame]) -> None:
    """Keep `case_metrics` by model, for a later lesson to compare with."""
    with replacing(path) as beside:
        pd.concat(cases, axis=1).to_csv(beside, index=False)


def read_cases(path: Path) -> dict[str, pd.DataFrame]:
    """Return what `write_cases` wrote."""
    table = pd.read_csv(path, header=[0, 1])
    return {name: table[name] for name in table.columns.get_level_values(0).unique()}


def observed_returns(frames: Frames, gamma: float) -> tuple[Tensor, Tensor]:
    """Return what each transition's user really gave from there on: (Σ γᵏ·rₖ to the log's end (n,), steps (n,))."""
    start, rating, goes_on = (field.cpu().numpy() for field in (frames.start, frames.rating, ~frames.is_last))
    total, left = np.zeros(len(rating) + 1), np.zeros(len(rating) + 1, np.int64)
    for row in reversed(range(len(rating))):
        total[row] = reward_of(float(rating[row])) + gamma * goes_on[row] * total[row + 1]
        left[row] = 1 + goes_on[row] * left[row + 1]
    actions = start + frames.frame_size
    return torch.as_tensor(total[actions], dtype=torch.float32), torch.as_tensor(left[actions])


@torch.no_grad()
def calibration(value: Callable[[Tensor, Tensor], Tensor], frames: Frames, gamma: float, at_least: int = 30,
                choose: Callable[[Tensor], Tensor] | None = None) -> pd.DataFrame:
    """Return what a critic predicts for logged actions, `predicted`, beside what users really gave, `observed`.

    One row a transition with `at_least` steps to come: 0.9 to the power of 30 is 4 %. `value` is state (B, …), action
    (B, E) → (B, 1); with `choose`, state → action (B, E), a column `own` is of what the policy itself would take.
    """
    observed, left = observed_returns(frames, gamma)
    index = torch.nonzero(left >= at_least)[:, 0]
    if not len(index):
        _say_once(f"no user has {at_least} steps to come after a transition: nothing can be compared")
    parts = []
    for some in index.split((1 << 25) // len(frames.items)):  # `choose` may weigh the whole catalogue for each
        t = frames.gather(some)
        answers = {"predicted": t.action} | ({} if choose is None else {"own": choose(t.state)})
        parts.append(pd.DataFrame({name: value(t.state, a)[:, 0].float().cpu().numpy() for name, a in answers.items()}))
    return pd.concat(parts).set_axis(index.numpy()).assign(observed=observed[index].numpy())
