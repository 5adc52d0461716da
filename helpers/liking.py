"""What people like: the stars to expect of an item, a slate that heeds them, and two lenses on whether it does."""

from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.evaluation import case_metrics, rank_held_out, slates_of
from helpers.features import damped_mean
from helpers.frames import Frames, rows_of
from helpers.recommenders import Recommender, latest_ratings

LEAST = 1e-3  # variance of the noise: where all ratings are the same, as of clicks, there is none


class Liking(NamedTuple):
    """Stars to expect: offset of the item + bias of the user + taste · item vector; a recommender, in stars.

    A user's taste has the prior N(0, root·rootᵀ), and ratings scatter around what it says; its posterior mean given the
    user's whole log is a ridge regression in closed form. Nobody's taste is stored: any log will do, of any length.

    offset: (n_items,) stars, damped mean rating. root: (E, E). noise: variance of a rating around its expectation.
    damping: ratings of the mean that every mean begins with.
    """

    offset: Tensor
    root: Tensor
    noise: float
    damping: float = 5.0

    def tastes(self, history: Frames, user_ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return bias (U,) and taste (U, E); of an item that a user has rated twice the later rating counts."""
        if not len(user_ids):
            return torch.zeros(0), torch.zeros(0, len(self.root))
        user, row = latest_ratings(history, user_ids)
        item = history.item_idx[row].cpu()
        deviation, x = history.rating[row].cpu() - self.offset[item], history.items.cpu()[item] @ self.root
        n = torch.bincount(user.cpu(), minlength=len(user_ids))
        bias, z = zip(*(self.posterior(*one)[:2] for one in zip(x.split(n.tolist()), deviation.split(n.tolist()),
                                                                strict=True)), strict=True)
        return torch.stack(bias), torch.stack(z) @ self.root.T

    def posterior(self, x: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return bias (), mean z (E,) and covariance (E, E) of one user, whose taste is root·z.

        Args:
            x: (n, E) vectors of what was rated, times root. deviation: (n,) of the ratings from the items' offsets.
        """
        bias = deviation.sum() / (len(deviation) + self.damping)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(torch.eye(x.shape[1]) + x.T @ x / self.noise))
        return bias, covariance @ (x.T @ (deviation - bias)) / self.noise, covariance

    def __call__(self, history: Frames, user_ids: np.ndarray) -> Tensor:
        """Return expected stars (U, n_items); they may lie beyond the scale."""
        bias, taste = self.tastes(history, user_ids)
        return (self.offset + bias[:, None] + taste @ history.items.cpu().T).to(history.device)


def fit_liking(train: pd.DataFrame, item_ids: np.ndarray, matrix: np.ndarray, sweeps: int = 20,
               most_users: int = 2_000) -> Liking:
    """Fit offsets, and by EM the covariance of tastes and the noise, to the training part.

    `matrix` is (n_items, E), rows as item_ids; EM sweeps over a sample of `most_users` users where there are more.
    Source: Laird & Ware 1982, "Random-Effects Models for Longitudinal Data"; that items' vectors are given, ours.
    """
    vectors = torch.as_tensor(matrix, dtype=torch.float32)
    length = float(vectors.square().sum(dim=1).mean().sqrt())
    liking = Liking(offsets(train, item_ids), torch.eye(vectors.shape[1]) * 0.2 / length,
                    max(float(train["rating"].var(ddof=0)), LEAST))
    logs = [torch.as_tensor(log) for log in train.groupby("user_id").indices.values()]
    if len(logs) > most_users:
        logs = [logs[one] for one in np.random.default_rng(0).choice(len(logs), most_users, replace=False)]
    item = torch.as_tensor(rows_of(train["item_id"], item_ids)).long()
    rating = torch.as_tensor(train["rating"].to_numpy(np.float32, copy=True))
    for _ in range(sweeps):
        x, second, error = vectors @ liking.root, torch.zeros_like(liking.root), []
        for log in logs:
            own, deviation = x[item[log]], rating[log] - liking.offset[item[log]]
            bias, z, covariance = liking.posterior(own, deviation)
            second += torch.outer(z, z) + covariance
            error.append((deviation - bias - own @ z).square() + ((own @ covariance) * own).sum(dim=1))
        second = second / len(logs) + LEAST ** 2 * torch.eye(len(second))
        liking = liking._replace(root=liking.root @ torch.linalg.cholesky((second + second.T) / 2),
                                 noise=max(float(torch.cat(error).mean()), LEAST))
    return liking


def offsets(train: pd.DataFrame, item_ids: np.ndarray) -> Tensor:
    """Return each item's mean rating, five of the overall mean added, as a tensor (n_items,), float32."""
    return torch.as_tensor(damped_mean(train, item_ids, 5).to_numpy(np.float32, copy=True))


def mean_rating(train: pd.DataFrame) -> Recommender:
    """Score every item by its mean rating, and five ratings of the overall mean beside: one list for everybody.

    >>> log = pd.DataFrame({"user_id": 1, "item_id": [7, 7, 8], "rating": [5.0, 5.0, 2.0], "timestamp": 0})
    >>> mean_rating(log)(Frames(log, np.array([7, 8, 9]), np.eye(3), frame_size=1), np.array([1]))
    tensor([[4.2857, 3.6667, 4.0000]])
    """
    return lambda history, user_ids: offsets(train, history.item_ids).expand(len(user_ids), -1)


def tilted(recommend: Recommender, stars: Recommender, beta: float) -> Recommender:
    """Score by log p + β·stars: what people do next, tilted by e^β for each star that they will like it more."""
    return lambda history, user_ids: recommend(history, user_ids) + beta * stars(history, user_ids)


def front_of(policies_at: Callable[[float], list[Recommender]], history: Frames, cases: pd.DataFrame,
             betas: tuple[float, ...]) -> pd.DataFrame:
    """Return NDCG@10 and reward@10 by β, mean over the policies (one a seed) that `policies_at` gives for it."""
    rows = []
    for beta in betas:
        runs = [case_metrics(rank_held_out(each, history, cases)).mean() for each in policies_at(beta)]
        rows.append((sum(runs) / len(runs))[["NDCG@10", "reward@10"]])
    return pd.DataFrame(rows, pd.Index(betas, name="β"))


def choose_beta(front: pd.DataFrame, floor: float) -> float:
    """Return the β with most reward@10 of those with an NDCG@10 of `floor`, the first of equals; 0 where none has."""
    good = front[front["NDCG@10"] >= floor]
    return float(good["reward@10"].idxmax()) if len(good) else 0.0


@torch.no_grad()
def scores_of(recommend: Recommender, history: Frames, cases: pd.DataFrame) -> np.ndarray:
    """Return the score (n,) that the item of each case has for its user."""
    place, users = pd.factorize(cases["user_id"].to_numpy())
    return recommend(history, users).cpu()[place, rows_of(cases["item_id"], history.item_ids)].numpy()


def accuracy(recommend: Recommender, history: Frames, held_out: pd.DataFrame) -> pd.Series:
    """Return by user_id: of two held-out items with different stars, how often the better one scores higher; ties half.

    Users without such a pair are left out. All are scored from `history`, which ends before the first held-out item.
    """
    scores = scores_of(recommend, history, held_out)
    of_user: dict[int, float] = {}
    for user_id, rows in held_out.groupby("user_id").indices.items():
        one, other = np.triu_indices(len(rows), 1)
        stars, score = (values[rows[one]] - values[rows[other]] for values in (held_out["rating"].to_numpy(), scores))
        if (stars != 0).any():
            of_user[user_id] = float((np.sign(stars) * np.sign(score) / 2 + 0.5)[stars != 0].mean())
    return pd.Series(of_user, name="liking", dtype=np.float64).rename_axis("user_id")


def kept_when_exchanged(recommend: Recommender, history: Frames, user_ids: np.ndarray, k: int = 10) -> np.ndarray:
    """Return (U,): the share of a user's slate that stays when likes and dislikes are exchanged in all logs.

    The best rating becomes the worst and so on; what was rated, and when, stays. 1: the slate hears no star.
    """
    exchanged = copy(history)
    exchanged.rating = history.rating.min() + history.rating.max() - history.rating
    slates = (slates_of(recommend, frames, user_ids, k) for frames in (history, exchanged))
    return np.array([len((set(one) & set(other)) - {-1}) / max(1, (one >= 0).sum())
                     for one, other in zip(*slates, strict=True)])
