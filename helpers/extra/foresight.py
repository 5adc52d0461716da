"""Simulated people who take what appeals to them and stay for what they like: a world where foresight can pay.

Fitted, to ratings of users whom no agent sees: what each would take, by a choice model of what people rate next, and
what each would like, by a rating model of the whole log. Assumed, in `Habits`: that people stay longer the more
satisfied they are, and tire of the like. The reward counts what is taken; liking pays later or never, as far as
`Habits.impatience` says.

What it cannot say: how impatient people are. `observed_habits` says what a log has to say of it, by observation.
"""

from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize
from torch import Tensor

from helpers.extra import simulator
from helpers.files import DataError
from helpers.frames import flatten
from helpers.recommenders import fit_ease
from helpers.tables import in_order, rows_of

TOP = 100  # a user's most appealing films, whose chance of being taken is `level` on the whole


class Habits(NamedTuple):
    """What is assumed of people, not fitted."""

    impatience: float = 2.0  # κ: one star less of satisfaction makes leaving e^κ times as likely; 0: nobody cares
    decay: float = 0.8       # ρ: persistence: share of satisfaction that outlasts a film; some 1/(1 − ρ) films count
    leave: float = 0.1       # chance of leaving after a step, when satisfaction is 0
    satiation: float = 0.2   # stars lost by a film of cosine 1 to the one just taken
    recovery: float = 0.8    # share of that loss which is left a step later

    def leaving(self, satisfaction: Tensor) -> Tensor:
        """Return the chance of leaving: min(½, leave · exp(−κ · satisfaction)), any shape."""
        return (self.leave * (-self.impatience * satisfaction).exp()).clamp(max=0.5)


HABITS = Habits()


class Choice(NamedTuple):
    """Log-odds that a film shown alone is taken: intercept + of_popularity · popularity + of_log · (log @ weights)."""

    popularity: Tensor    # (n,) log(1 + raters), of mean 0 and standard deviation 1
    weights: Tensor       # (n, n): EASE
    intercept: float
    of_popularity: float
    of_log: float
    auc: float            # of held-out ratings against what the same users never rated; 0.5 is chance

    def __call__(self, seen: Tensor) -> Tensor:
        """Return log-odds (B, n) given logs: seen (B, n), 1 where a film was rated, else 0."""
        return self.intercept + self.of_popularity * self.popularity + self.of_log * (seen @ self.weights)


def rated_by(ratings: pd.DataFrame, user_ids: np.ndarray, item_ids: np.ndarray) -> Tensor:
    """Return (U, n) float32 stars, 0 where a user has not rated an item; user_ids ascending."""
    table = torch.zeros(len(user_ids), len(item_ids))
    table[np.searchsorted(user_ids, ratings["user_id"]), rows_of(ratings["item_id"], item_ids)] = torch.as_tensor(
        ratings["rating"].to_numpy(np.float32, copy=True))
    return table


def fit_choice(ratings: pd.DataFrame, item_ids: np.ndarray, ridge: float = 400.0, known: int | None = None) -> Choice:
    """Fit what people take: EASE on nine tenths of the ratings, what it counts beside popularity on the last tenth.

    With `known` that is asked of a log's first `known` ratings, for whom no more is known of, and of all later ones.
    """
    ratings = in_order(ratings)
    held_out = np.random.default_rng(0).random(len(ratings)) < 0.1
    rest, user_ids = ratings[~held_out], np.unique(ratings["user_id"])
    if known is not None:
        held_out = (ratings.groupby("user_id").cumcount() >= known).to_numpy()

    def parts(log: pd.DataFrame) -> tuple[Tensor, Tensor]:
        kept, among = fit_ease(log, item_ids, ridge)
        weights = torch.zeros(len(item_ids), len(item_ids))
        weights[kept[:, None], kept] = among
        raters = torch.log1p((rated_by(log, user_ids, item_ids) > 0).sum(dim=0))
        return (raters - raters.mean()) / raters.std().clamp(min=1e-6), weights

    popularity, weights = parts(rest)
    seen = (rated_by(ratings[~held_out], user_ids, item_ids) > 0).float()
    asked = seen == 0
    taken = (rated_by(ratings[held_out], user_ids, item_ids) > 0)[asked].numpy()
    x = torch.stack([popularity.expand_as(seen), seen @ weights], dim=-1)[asked].numpy()
    if taken.all() or not taken.any():
        raise DataError(f"{len(ratings)} ratings say nothing of what people take: a tenth of them is held out to ask")
    model = LogisticRegression(C=1e6).fit(x, taken)
    of_popularity, of_log = map(float, model.coef_[0])
    auc = float(roc_auc_score(taken, model.decision_function(x)))
    return Choice(*parts(ratings), float(model.intercept_[0]), of_popularity, of_log, auc)


class World(NamedTuple):
    """U simulated people and n films; all tensors float32."""

    user_ids: np.ndarray   # (U,)
    item_ids: np.ndarray   # (n,)
    appeal: Tensor         # (U, n) log-odds that a film shown alone is taken
    liking: Tensor         # (U, n) expected stars minus the user's own mean
    own_mean: Tensor       # (U,) each user's mean rating
    alike: Tensor          # (n, n) cosine of contents, negative ones 0
    first: Tensor          # (U, F) rows of the films each rated first, and
    first_stars: Tensor    # (U, F) the ratings: what a session begins with
    stars: Tensor          # the ratings there are, ascending
    noise: float           # standard deviation of a rating around its expectation, in stars
    auc: float             # of the choice model, held out
    rmse: dict[str, float]  # of the rating model, held out


def fit_world(ratings: pd.DataFrame, item_ids: np.ndarray, similarity: np.ndarray, frame_size: int = 10,
              level: float = 0.7) -> World:
    """Fit a world to ratings of users whom no agent sees; only those with more than `frame_size` take part.

    `item_ids` (n,) may be shown, and ratings of others are left out; `similarity` (n, d) are content vectors. `level`,
    the chance that a film is taken, over each user's TOP most appealing ones, sets how much is taken, not what: no log
    says it, for none says what was passed over.
    """
    ratings = ratings[ratings["item_id"].isin(item_ids)].drop_duplicates(["user_id", "item_id"])
    ratings = ratings[ratings.groupby("user_id")["item_id"].transform("size") > frame_size]
    rating_model = simulator.fit_world(ratings, item_ids, similarity)
    user_idx, first_rows, first_stars = rating_model.begin(frame_size)
    choice, seen = fit_choice(ratings, item_ids), rated_by(ratings, rating_model.user_ids, item_ids) > 0
    appeal = choice(seen.float())
    first = torch.as_tensor(first_rows)
    top = appeal.scatter(1, first, float("-inf")).topk(min(TOP, appeal.shape[1] - frame_size)).values
    appeal = appeal + float(np.log(level / (1 - level))) - top.mean(dim=1, keepdim=True)
    expected, own_mean, vectors, first_stars, stars = (torch.tensor(part, dtype=torch.float32) for part in (
        rating_model.expected(user_idx[:, None], np.arange(len(item_ids))), rating_model.user_mean,
        rating_model.similarity, first_stars, rating_model.stars))
    return World(rating_model.user_ids, np.asarray(item_ids), appeal, expected - own_mean[:, None], own_mean,
                 (vectors @ vectors.T).clamp(min=0), first, first_stars, stars, rating_model.noise, choice.auc,
                 rating_model.rmse)


class Visits:
    """B sessions at once, one a row of `user` (B,), of at most `length` steps; the same seed, the same random numbers.

    `here` (B,) says who has not left. A session ends earlier where no film is left that was not shown.
    """

    def __init__(self, world: World, habits: Habits, user: Tensor, seed: int = 0, length: int = 100, k: int = 1):
        self.world, self.habits, self.user, self.steps = world, habits, user, 0
        self.length = min(length, (len(world.item_ids) - world.first.shape[1]) // k)
        self.uniforms = torch.rand(length, 3, len(user), generator=torch.Generator().manual_seed(seed))
        self.recent, self.recent_stars = world.first[user], world.first_stars[user]                    # (B, F)
        self.rated = torch.zeros(len(user), len(world.item_ids)).scatter(1, self.recent, self.recent_stars)
        self.shown = self.rated > 0                               # (B, n), never shown again
        self.tired = torch.zeros_like(self.rated)                 # (B, n), in stars
        self.satisfaction = torch.zeros(len(user))                # in stars above the own mean
        self.here = torch.ones(len(user), dtype=torch.bool)

    @property
    def over(self) -> bool:
        """Whether all have left, or the last step is done."""
        return self.steps == self.length or not bool(self.here.any())

    def states(self, items: Tensor) -> Tensor:
        """Return (B, F·(E+1)), the state of `Transition` for an item matrix (n, E): the last F films taken."""
        return flatten(items[self.recent], self.recent_stars)

    def step(self, slate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Show each a film (B,), or a slate (B, K) of which one is taken or none.

        Film i of a slate is taken with chance exp(aᵢ) / (1 + Σⱼ exp aⱼ), a their appeal, and then rated: liking −
        tiredness + noise, to the nearest of the stars. Satisfaction becomes ρ·satisfaction + (1 − ρ)·(rating − own
        mean); of what is passed over nothing follows. Then the person leaves, or not (`Habits.leaving`).

        Return item (B,), the one taken or else the first of the slate; taken (B,) bool; stars (B,), 0 where none was;
        left (B,) bool. Who had left before takes nothing.
        """
        world, habits, rows = self.world, self.habits, torch.arange(len(self.user))
        slate = slate[:, None] if slate.ndim == 1 else slate
        choose, scatter, leave = self.uniforms[self.steps]
        odds = world.appeal[self.user[:, None], slate].exp()
        reached = odds.cumsum(dim=1) / (1 + odds.sum(dim=1, keepdim=True))
        place = (choose[:, None] >= reached).sum(dim=1)
        taken = (place < slate.shape[1]) & self.here
        item = slate[rows, torch.where(taken, place, 0)]
        felt = (world.own_mean[self.user] + world.liking[self.user, item] - self.tired[rows, item]
                + world.noise * torch.special.ndtri(scatter.clamp(1e-6, 1 - 1e-6)))
        stars = world.stars[(felt[:, None] - world.stars).abs().argmin(dim=1)] * taken
        self.shown[rows[:, None], slate] = True
        now = habits.decay * self.satisfaction + (1 - habits.decay) * (stars - world.own_mean[self.user])
        self.satisfaction = torch.where(taken, now, self.satisfaction)
        self.tired = habits.recovery * self.tired
        self.tired[taken] += habits.satiation * world.alike[item[taken]]
        self.rated[taken, item[taken]] = stars[taken]
        for recent, new in ((self.recent, item), (self.recent_stars, stars)):
            recent[taken] = torch.cat([recent[taken, 1:], new[taken, None]], dim=1)
        left = (leave < habits.leaving(self.satisfaction)) & self.here
        self.here = self.here & ~left
        self.steps += 1
        return item, taken, stars, left


# A policy: visits → scores (B, n) of all films; the best that were not shown yet are shown.
Policy = Callable[[Visits], Tensor]


def best_unseen(scores: Tensor, visits: Visits, k: int = 1) -> Tensor:
    """Return the k best-scored films of each that were not shown yet: (B, k)."""
    return scores.masked_fill(visits.shown, -torch.inf).topk(k).indices


@torch.no_grad()
def play(world: World, habits: Habits, policy: Policy, user: Tensor, seed: int = 0, repeats: int = 4, k: int = 1,
         length: int = 100) -> pd.DataFrame:
    """Let each of user (U,) come `repeats` times; return by user_id the mean reward (films taken), length and stars."""
    visits = Visits(world, habits, user.repeat_interleave(repeats), seed, length, k)
    sums = torch.zeros(3, len(visits.user))
    while not visits.over:
        here = visits.here
        _, taken, stars, _ = visits.step(best_unseen(policy(visits), visits, k))
        sums += torch.stack([taken.float(), here.float(), (stars - world.own_mean[visits.user]) * taken])
    reward, steps, stars = sums.reshape(3, -1, repeats).sum(dim=2)
    return pd.DataFrame({"reward": reward / repeats, "length": steps / repeats, "stars above own mean":
                         stars / reward.clamp(min=1)}, pd.Index(world.user_ids[user], name="user_id"))


def myopic(visits: Visits) -> Tensor:
    """Score by what each would take, as the world knows it: the myopic oracle, a policy."""
    return visits.world.appeal[visits.user]


def planner(world: World, habits: Habits, trust: float = 0.6) -> Policy:
    """Return a policy that knows the world and looks ahead: p · (1 + trust · what being taken adds to the future).

    The future C(s) is what a session is still worth at satisfaction s, the chance of leaving counted, by value
    iteration for each user on a grid of s. There a step offers a menu of 16 films: of each sixteenth of the catalogue
    by liking, the mean of the 20 most likely taken. That nothing is shown twice and that people tire is left out of C,
    so this is a lower bound on what foresight can reach; `trust` makes up for some of it.
    """
    grid = torch.linspace(-2.5, 2.5, 51)
    p, leaving = world.appeal.sigmoid(), habits.leaving(grid)
    liking, order = world.liking.sort(dim=1)
    bins, menu = min(16, liking.shape[1]), []
    for chance, stars in zip(*(part.tensor_split(bins, dim=1) for part in (p.gather(1, order), liking)), strict=True):
        chance, place = chance.topk(min(20, chance.shape[1]))
        menu.append((chance.mean(dim=1), stars.gather(1, place).mean(dim=1)))
    chance, stars = (torch.stack(part, dim=1)[:, None] for part in zip(*menu, strict=True))  # (U, 1, bins) each

    def at(values: Tensor, s: Tensor) -> Tensor:  # values (B, 51) between the points of the grid
        place = ((s - grid[0]) / (grid[1] - grid[0])).clamp(0, len(grid) - 1.001)
        low = place.long()
        flat = low.flatten(1)
        below, above = (values.gather(1, one).reshape(s.shape) for one in (flat, flat + 1))
        return below + (place - low) * (above - below)

    scatter = [(world.noise * 3 ** 0.5 * z, weight) for z, weight in ((-1, 1 / 6), (0, 2 / 3), (1, 1 / 6))]
    after = [(habits.decay * grid[:, None] + (1 - habits.decay) * (stars + e), weight) for e, weight in scatter]
    future = torch.zeros(len(p), len(grid))
    for _ in range(200):
        taken = sum(weight * at(future, s) for s, weight in after)
        value = (chance * (1 + taken) + (1 - chance) * future[:, :, None]).amax(dim=2)
        future = (1 - leaving) * value

    def policy(visits: Visits) -> Tensor:
        own, s = future[visits.user], visits.satisfaction[:, None]
        liked = world.liking[visits.user] - visits.tired
        gain = at(own, habits.decay * s + (1 - habits.decay) * liked) - at(own, s)
        return p[visits.user] * (1 + trust * gain)
    return policy


class Guests(gymnasium.Env):
    """One simulated person after another, for any agent that speaks Gymnasium: "recnn/Guests-v0".

    Action: Discrete(n), a row of the item matrix. Observation: Box (F·(E+1),) float32, the state of `Transition`.
    Reward: 1 if the film is taken, else 0. Terminated: the person left. Truncated: no step is left. A film that was
    shown before is refused: it earns −1, and nothing follows but that a step is gone. `reset(seed=…)` with the same
    seed is the same person with the same random numbers; options={"user": row} chooses the person.
    """

    def __init__(self, world: World, item_matrix: np.ndarray, habits: Habits = HABITS, length: int = 100):
        self.world, self.habits, self.length = world, habits, length
        self.items = torch.as_tensor(item_matrix, dtype=torch.float32)
        if len(self.items) != len(world.item_ids):
            raise DataError(f"an item matrix of {len(self.items)} rows for {len(world.item_ids)} films of the world")
        self.observation_space, self.action_space = simulator.spaces_of(self.items, world.first.shape[1], world.stars)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        user = (options or {}).get("user", self.np_random.integers(len(self.world.user_ids)))
        self.visits = Visits(self.world, self.habits, torch.tensor([int(user)]), int(self.np_random.integers(1 << 31)),
                             self.length)
        return self.visits.states(self.items)[0].numpy(), {"user_id": self.world.user_ids[int(user)].item()}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        refused, reward, left, info = bool(self.visits.shown[0, int(action)]), -1.0, False, {"stars": 0.0}
        if refused:
            self.visits.steps += 1
        else:
            _, taken, stars, gone = self.visits.step(torch.tensor([int(action)]))
            reward, left, info = float(taken), bool(gone), {"stars": float(stars)}
        cut = not left and self.visits.steps >= self.visits.length
        info |= {"refused": refused, "satisfaction": float(self.visits.satisfaction)}
        return self.visits.states(self.items)[0].numpy(), reward, left, cut, info

    def action_masks(self) -> np.ndarray:
        """Return (n,) bool: the films not shown yet, as sb3-contrib's MaskablePPO asks for them."""
        return ~self.visits.shown[0].numpy()


gymnasium.register("recnn/Guests-v0", entry_point=Guests)


def some_users(ratings: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the ratings of `most` users, drawn at random, the same each time; all where there are no more."""
    users = ratings["user_id"].unique()
    if len(users) <= most:
        return ratings
    return ratings[ratings["user_id"].isin(np.random.default_rng(0).choice(users, most, replace=False))]


def observed_habits(ratings: pd.DataFrame, item_ids: np.ndarray, similarity: np.ndarray, n: int = 200,
                    most: int = 2_000) -> pd.DataFrame:
    """Return what a log with times says of `Habits`: estimate and 95 % interval over users (n draws), by observation.

    "impatience, of a session's end" and "…, of never coming back" are minus the slopes of the log-odds that the next
    rating comes after an hour or more, or never, on satisfaction as `Visits` has it: ratings minus the user's own mean,
    weighed by age. "satiation" is minus the slope of a rating, minus its user's and film's means, on the cosine with
    the film before. Nobody chose at random what these people saw, so none of these is an effect. Of more users than
    `most` a part is drawn, the same each time.
    """
    log = in_order(ratings)
    log = some_users(log[log.groupby("user_id")["item_id"].transform("size") >= 20], most).reset_index(drop=True)
    if log.empty:
        raise DataError("nobody has 20 ratings: the log says nothing of habits")
    user = pd.factorize(log["user_id"])[0]
    mean = log.groupby(user)["rating"].transform("mean")
    deviation = (log["rating"] - mean).astype(np.float64)
    of_user, age = deviation.groupby(user), log.groupby(user).cumcount().to_numpy() + 1
    average = of_user.ewm(alpha=1 - HABITS.decay, adjust=False).mean().to_numpy()  # begins at the first, not 0
    satisfaction = average - of_user.transform("first").to_numpy() * HABITS.decay ** age
    same = np.r_[user[1:] == user[:-1], False]
    ends = ~same | (np.r_[np.diff(log["timestamp"]), 0] >= 3600)
    vectors = normalize(np.asarray(similarity, np.float64))
    row = rows_of(log["item_id"], item_ids)
    cosine = np.r_[0.0, np.einsum("nd,nd->n", vectors[row[1:]], vectors[row[:-1]])]
    surprise = (deviation - deviation.groupby(log["item_id"]).transform("mean")).to_numpy()
    after = np.r_[False, same[:-1]]
    asked = {"impatience, of a session's end": (satisfaction, ends, np.ones(len(log), bool)),
             "impatience, of never coming back": (satisfaction, ~same, ends),
             "satiation": (cosine, surprise, after)}
    draws, rows = np.random.default_rng(0).multinomial(user[-1] + 1, np.full(user[-1] + 1, 1 / (user[-1] + 1)), n), []
    for name, (x, y, of) in asked.items():
        fits = [-_slope(x[of], y[of].astype(np.float64), weight[user[of]], logistic=name != "satiation")
                for weight in (np.ones(user[-1] + 1), *draws)]
        low, high = np.quantile(fits[1:], [0.025, 0.975])
        rows.append({"habit": name, "estimate": fits[0], "low": low, "high": high, "cases": int(of.sum())})
    return pd.DataFrame(rows)


def _slope(x: np.ndarray, y: np.ndarray, weight: np.ndarray, logistic: bool) -> float:
    """Return the slope of y, or of its log-odds, on x: weighted least squares, or six steps of Newton's."""
    x = np.c_[np.ones(len(x)), x]
    theta = np.zeros(2)
    for _ in range(6 if logistic else 1):
        p = 1 / (1 + np.exp(-x @ theta)) if logistic else x @ theta
        spread = weight * (p * (1 - p) if logistic else 1)
        theta = theta + np.linalg.solve((x * spread[:, None]).T @ x + 1e-9 * np.eye(2), x.T @ (weight * (y - p)))
    return float(theta[1])
