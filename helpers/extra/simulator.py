"""Simulated users, who rate every film, tire of similar films and may leave: a measure of long-term reward.

Two parts are fitted to ratings: what a user expects of a film, and how far ratings scatter around that; `World.rmse`
says how well. The rest, in `Habits`, is assumed: films like those just seen please less, and the displeased leave.

What it cannot say. It knows only what was rated, and ratings are not missing at random: people rate what they chose
to see, so it overrates films that few would choose; one that nobody rated is an average film to it. Its users
have one fixed taste, rate whatever they are shown and learn of nothing. It ranks policies under its own assumptions:
vary `Habits` before you believe a ranking, and do not take its sums for those of people. A policy that was trained on
these users' ratings, or in the simulator, was trained on its test.
"""

from itertools import product
from typing import NamedTuple

import gymnasium
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.special import ndtri
from sklearn.preprocessing import normalize
from torch import Tensor

from helpers.files import DataError
from helpers.frames import Frames, flatten, reward_of
from helpers.recommenders import Recommender, latest_ratings
from helpers.tables import check_rows, in_order, rows_of

# Mode → steps at most, unless told otherwise. "free": films may repeat, users may quit. "no-repeat": no film twice,
# nor one of the user's first frame. "fixed-length": no repeats, and nobody quits. Source: EasyRL4Rec (Yu et al. 2024,
# arXiv:2402.15164), which calls them FreeB, NX_0 and NX_X; its users quit by another rule.
MODES = {"free": 100, "no-repeat": 100, "fixed-length": 30}
BIAS_RIDGE = 3.0
SWEEPS = 15


class Habits(NamedTuple):
    """What is assumed of users, not fitted."""

    satiation: float = 0.5   # stars lost by a film of cosine 1 to the one just seen; with 0 nobody tires
    fading: float = 0.8      # factor on that for each film in between; nearer to 1, a long run of the like hurts more
    memory: int = 10         # films back that count; if ≤ frame_size, a state holds all that satiation depends on
    leave: float = 0.02      # chance of leaving after any film, however satisfied: after 50 films on average
    impatience: float = 0.2  # added to that chance for each star that satisfaction is below the user's own mean rating
    decay: float = 0.8       # share of satisfaction that outlasts a rating; nearer to 1, one bad film matters less


HABITS = Habits()


class World(NamedTuple):
    """A rating model of U users and all items, in stars, with the users' real logs."""

    item_ids: np.ndarray    # (n_items,)
    similarity: np.ndarray  # (n_items, d), rows of length 1 or 0
    user_ids: np.ndarray    # (U,), ascending
    log: pd.DataFrame       # user_idx, item_idx, rating, by user and time
    log_start: np.ndarray   # (U,) the row of the log at which a user's begins
    log_length: np.ndarray  # (U,)
    user_mean: np.ndarray   # (U,) each user's mean rating
    users: np.ndarray       # (U, 2 + K): mean + bias, 1, K factors; an expected rating is the dot product with an item
    items: np.ndarray       # (n_items, 2 + K): 1, bias, K factors; but for the 1 all is 0 of one that nobody rated
    stars: np.ndarray       # the ratings there are, ascending
    noise: float            # standard deviation of the held-out residual; rounding adds to it, clipping takes away
    rmse: dict[str, float]  # of "mean", "biases", "factors" on a held-out tenth, which chose K and ridge
    n_factors: int          # K; 0: biases alone
    ridge: float            # of factors. Then all was fitted again, on all ratings

    def expected(self, user_idx: np.ndarray, item_idx: np.ndarray) -> np.ndarray:
        """Return what users expect of items, in stars, clipped to those there are; indices broadcast."""
        plain = np.einsum("...k,...k", self.users[user_idx], self.items[item_idx])
        return plain.clip(self.stars[0], self.stars[-1])

    def begin(self, frame_size: int, user_ids: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Return user_idx (U,), and item_idx and rating (U, F) of users' first F ratings; by default of all."""
        long = self.user_ids[self.log_length > frame_size]
        user_ids = long if user_ids is None else np.unique(user_ids)
        unfit = np.setdiff1d(user_ids, long)
        if len(unfit) or not len(user_ids):
            raise DataError(f"{len(long)} of this world's users have more than frame_size = {frame_size} ratings"
                            f"{f', user {unfit[0]} not' if len(unfit) else ''}: use other users, or a smaller frame")
        user_idx = np.searchsorted(self.user_ids, user_ids)
        rows = self.log_start[user_idx][:, None] + np.arange(frame_size)
        return user_idx, *(self.log[name].to_numpy()[rows] for name in ("item_idx", "rating"))


def _half(rows, columns, rating, other, n: int, ridge: float) -> np.ndarray:
    """Return (n, 1 + K), the biases and factors of one side: for each row a ridge regression on the other side's."""
    x = np.c_[np.ones(len(other)), other[:, 1:]]
    outer = (x[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    ones, left = (sparse.csr_array((values, (rows, columns)), shape=(n, len(x)))
                  for values in (np.ones(len(rows)), rating - other[columns, 0]))
    gram = (ones @ outer).reshape(n, x.shape[1], x.shape[1]) + np.diag([BIAS_RIDGE] + [ridge] * (x.shape[1] - 1))
    return np.linalg.solve(gram, (left @ x)[:, :, None])[:, :, 0]


def _factorise(log: pd.DataFrame, shape: tuple[int, int], n_factors: int, ridge: float, seed: int) -> tuple:
    """Return users (U, 2 + K) and items (n_items, 2 + K), as in `World`, by alternating ridge regressions."""
    u, i, rating = (log[name].to_numpy() for name in ("user_idx", "item_idx", "rating"))
    mean = rating.mean(dtype=np.float64)
    items = np.random.default_rng(seed).normal(scale=0.1, size=(shape[1], 1 + n_factors)) * np.r_[0, np.ones(n_factors)]
    for _ in range(SWEEPS):
        users = _half(u, i, rating - mean, items, shape[0], ridge)
        items = _half(i, u, rating - mean, users, shape[1], ridge)
    return np.insert(users + np.eye(1, 1 + n_factors) * mean, 1, 1, axis=1), np.insert(items, 0, 1, axis=1)


def fit_world(ratings: pd.DataFrame, item_ids: np.ndarray, similarity: np.ndarray, factors: tuple[int, ...] = (2, 4, 8),
              ridges: tuple[float, ...] = (2.0, 6.0, 10.0, 14.0), seed: int = 0) -> World:
    """Fit mean + biases + factors to 10 ratings or more, in any order, of users whom no agent is trained on.

    `item_ids` (n_items,) are distinct and say what may be shown; `similarity` (n_items, d) holds finite content vectors
    whose cosines say which films are alike; a held-out tenth chooses from `factors` and `ridges`. DataError otherwise.
    Source: Koren, Bell & Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems", with biases.
    """
    check_rows(similarity, item_ids)
    if not np.isfinite(similarity).all():
        raise DataError("similarity holds NaN or infinity: make it again, notes/03_pca.ipynb")
    if len(ratings) < 10:
        raise DataError(f"{len(ratings)} ratings make no world: a tenth is held out to say how good it is")
    ratings = in_order(ratings)
    user_ids, start, user_idx, length = np.unique(ratings["user_id"], return_index=True, return_inverse=True,
                                                  return_counts=True)
    log = pd.DataFrame({"user_idx": user_idx, "item_idx": rows_of(ratings["item_id"], item_ids).astype(np.int64),
                        "rating": ratings["rating"].to_numpy()})
    shape, stars = (len(user_ids), len(item_ids)), np.unique(log["rating"])
    order = np.random.default_rng(seed).permutation(len(log))
    held_out, rest = log.iloc[order[:len(log) // 10]], log.iloc[order[len(log) // 10:]]
    residual = {"mean": held_out["rating"] - rest["rating"].mean()}
    for chosen in [(0, 0.0), *product(factors, ridges)]:
        users, items = _factorise(rest, shape, *chosen, seed)
        expected = (users[held_out["user_idx"]] * items[held_out["item_idx"]]).sum(axis=1).clip(stars[0], stars[-1])
        residual[chosen] = held_out["rating"] - expected
    rmse = {chosen: float(np.sqrt((values ** 2).mean())) for chosen, values in residual.items()}
    plain = rmse.pop("mean")
    best = min(rmse, key=rmse.get)
    return World(np.asarray(item_ids), normalize(np.asarray(similarity, np.float64)), user_ids, log, start, length,
                 log.groupby("user_idx")["rating"].mean().to_numpy(np.float64), *_factorise(log, shape, *best, seed),
                 stars, float(residual[best].std(ddof=0)),
                 {"mean": plain, "biases": rmse[0, 0.0], "factors": rmse[best]}, *best)


def satiation_of(cosine: np.ndarray, habits: Habits) -> np.ndarray:
    """Return the stars that satiation takes: cosine (B, m, …) with the last m films, oldest first → (B, …)."""
    fading = habits.fading ** np.arange(cosine.shape[1])[::-1]
    return habits.satiation * (cosine.clip(0) * fading.reshape(-1, *[1] * (cosine.ndim - 2))).sum(axis=1)


def expected_stars(world: World, oracle: bool = False) -> Recommender:
    """Return a recommender by a world's rating model, in stars, greedy: what will be rated best now, whatever follows.

    Users get their biases and factors from their history, folded in. The `oracle` knows those of the world's users.
    """
    def recommend(history: Frames, user_ids: np.ndarray) -> Tensor:
        if oracle:
            stars = world.expected(np.searchsorted(world.user_ids, user_ids)[:, None], np.arange(len(world.items)))
        else:
            user, row = latest_ratings(history, user_ids)
            mean, rated = world.log["rating"].mean(), history.item_idx[row].cpu().numpy()
            own = _half(user.cpu().numpy(), rated, history.rating[row].cpu().numpy() - mean, world.items[:, 1:],
                        len(user_ids), world.ridge)
            stars = mean + own[:, :1] + world.items[:, 1] + own[:, 1:] @ world.items[:, 2:].T
        return torch.as_tensor(stars, dtype=torch.float32)
    return recommend


def less_satiation(stars: Recommender, world: World, habits: Habits = HABITS) -> Recommender:
    """Take from stars (U, n_items) what satiation will take of them: of a recommender who knows how users tire."""
    def recommend(history: Frames, user_ids: np.ndarray) -> Tensor:
        ends = (history.log_start + history.log_length)[history.places(user_ids)]
        recent = history.item_idx.cpu().numpy()[ends[:, None] + np.arange(-habits.memory, 0)]
        lost = satiation_of(world.similarity[recent] @ world.similarity.T, habits)
        return stars(history, user_ids) - torch.as_tensor(lost, dtype=torch.float32)
    return recommend


def respond(world: World, habits: Habits, mode: str, user_idx: np.ndarray, log: np.ndarray, satisfaction: np.ndarray,
            item_idx: np.ndarray, uniforms: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Show B users a film each, who have seen log (B, n) of item_idx, oldest first: the step of `Users` and of `play`.

    rating = expected − satiation + noise, to the nearest of the world's stars, where satiation =
    `satiation` · Σₖ `fading`ᵏ · max(0, cosine with the film k before the last), k < `memory`. Satisfaction, at first
    the user's own mean, becomes `decay` · satisfaction + (1 − `decay`) · rating, and the user quits with chance
    `leave` + `impatience` · max(0, own mean − satisfaction). Of `uniforms` (B, 2), in [0, 1), the first is the quantile
    of the noise, the second what that chance must exceed.

    Return ({"rating", "expected", "satiation" in stars, "quits" bool: (B,) each}, satisfaction (B,)).
    """
    recent = log[:, max(log.shape[1] - habits.memory, 0):]
    cosine = np.einsum("bmd,bd->bm", world.similarity[recent], world.similarity[item_idx])
    satiation = satiation_of(cosine, habits)
    expected = world.expected(user_idx, item_idx)
    felt = expected - satiation + world.noise * ndtri(uniforms[:, 0].clip(1e-12))
    rating = world.stars[np.abs(felt[:, None] - world.stars).argmin(axis=1)]
    satisfaction = habits.decay * satisfaction + (1 - habits.decay) * rating
    chance = habits.leave + habits.impatience * (world.user_mean[user_idx] - satisfaction).clip(0)
    quits = (uniforms[:, 1] < chance) & (mode != "fixed-length")
    return {"rating": rating, "expected": expected, "satiation": satiation, "quits": quits}, satisfaction


def may_show(world: World, log: np.ndarray, mode: str) -> np.ndarray:
    """Return (B, n_items) bool: what users who have seen log (B, n) may be shown."""
    free = np.ones((len(log), len(world.item_ids)), bool)
    if mode != "free":
        np.put_along_axis(free, log, False, axis=1)
    return free


def _uniforms(seed: int, user_idx: np.ndarray, length: int) -> np.ndarray:
    """Return (U, length, 2): users' random numbers, step by step, whatever is shown and whoever else plays."""
    return np.stack([np.random.default_rng((seed, int(user))).random((length, 2)) for user in user_idx])


def _steps(world: World, matrix: np.ndarray, frame_size: int, mode: str, length: int | None) -> int:
    length = MODES.get(mode, 0) if length is None else length
    if mode not in MODES or length < 1:
        raise DataError(f"there is no mode {mode!r} of {length} steps: choose {', '.join(MODES)}, and 1 step or more")
    check_rows(matrix, world.item_ids)
    if mode != "free" and len(matrix) <= frame_size:
        raise DataError(f"{len(matrix)} items for frame_size = {frame_size}: more are wanted where no film may repeat")
    return length


def spaces_of(items: Tensor, frame_size: int, stars: np.ndarray | Tensor) -> tuple[gymnasium.Space, gymnasium.Space]:
    """Return the spaces of states and of actions: items (n, E), and the ratings there are, ascending."""
    low, high = (np.repeat(np.float32(ends), [frame_size * items.shape[1], frame_size])
                 for ends in ((items.min(), stars[0]), (items.max(), stars[-1])))
    return gymnasium.spaces.Box(low, high, dtype=np.float32), gymnasium.spaces.Discrete(len(items))


class Users(gymnasium.Env):
    """One simulated user after another, for any agent that speaks Gymnasium: "recnn/Users-v0"; arguments as in `play`.

    Action: Discrete(n_items), a row of the item matrix. Observation: Box (F·(E+1),) float32, the state of
    `Transition`. Reward: 2·(rating − 2.5). Terminated: the user quit. Truncated: `length` steps, or no film is left.
    `reset(seed=…, options={"user": user_id})` chooses the user, else chance does; the same seed gives a user the same
    random numbers in `play`. A film that may not be shown (see `action_masks`) is refused: it earns the reward of the
    lowest rating, and only the step counts. info: user_id, refused, after a step rating, expected, satiation, in stars.
    """

    def __init__(self, world: World, frame_size: int, item_matrix: np.ndarray, mode: str = "no-repeat",
                 length: int | None = None, habits: Habits = HABITS):
        self.length = _steps(world, item_matrix, frame_size, mode, length)
        self.world, self.frame_size, self.mode, self.habits = world, frame_size, mode, habits
        self.who = world.user_ids[world.begin(frame_size)[0]]
        self.items = torch.as_tensor(item_matrix, dtype=torch.float32)
        self.observation_space, self.action_space = spaces_of(self.items, frame_size, world.stars)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.user_id = int((options or {}).get("user", self.np_random.choice(self.who)))
        self.user_idx, self.log, self.rating = self.world.begin(self.frame_size, np.array([self.user_id]))
        self.satisfaction, self.n_steps = self.world.user_mean[self.user_idx], 0
        seed = self.np_random.integers(1 << 31) if seed is None else seed
        self.uniforms = _uniforms(seed, self.user_idx, self.length)[0]
        return self._state(), {"user_id": self.user_id, "refused": False}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        refused = not self.action_masks()[action]
        answer, satisfaction = respond(self.world, self.habits, self.mode, self.user_idx, self.log, self.satisfaction,
                                       np.array([action]), self.uniforms[[self.n_steps]])
        answer = {name: value[0].item() for name, value in answer.items()}
        self.n_steps += 1
        if refused:
            answer |= {"rating": float(self.world.stars[0]), "quits": False}
        else:
            self.log, self.rating = np.c_[self.log, action], np.c_[self.rating, np.float32(answer["rating"])]
            self.satisfaction = satisfaction
        quits = answer.pop("quits")
        ends = not quits and (self.n_steps == self.length or not self.action_masks().any())
        info = {"user_id": self.user_id, "refused": bool(refused), **answer}
        return self._state(), reward_of(answer["rating"]), quits, bool(ends), info

    def action_masks(self) -> np.ndarray:
        """Return (n_items,) bool: the films that may be shown now, as sb3-contrib's MaskablePPO asks for them."""
        return may_show(self.world, self.log, self.mode)[0]

    def _state(self) -> np.ndarray:
        log, rating = self.log[:, -self.frame_size:], self.rating[:, -self.frame_size:]
        return flatten(self.items[log], torch.as_tensor(rating))[0].numpy()


gymnasium.register("recnn/Users-v0", entry_point="helpers.extra.simulator:Users")


def play(world: World, recommend: Recommender, matrix: np.ndarray, frame_size: int = 10, mode: str = "no-repeat",
         length: int | None = None, user_ids: np.ndarray | None = None, habits: Habits = HABITS,
         seed: int = 0) -> pd.DataFrame:
    """Show each user the best-scored film that may be shown, step by step, until they quit or the session ends.

    The recommender is given `Frames` of the logs as they grow: the first F real ratings, and what followed. At the
    first step they have one more user, who is never asked about. A seed gives a user the same random numbers under
    every recommender: compare them user by user. Return one row a user and step, by user: user_id, step (from 0),
    item_id, rating, reward, expected, satiation, quits.

    Args:
        matrix: (n_items, E), rows as world.item_ids; more of them than frame_size, if none may be shown twice.
        length: steps at most; by default as in `MODES`. A session ends too when no film is left.
        user_ids: who plays; by default all with more than frame_size ratings. DataError for any other.
    """
    length, played = _steps(world, matrix, frame_size, mode, length), []
    user_idx, log, rating = world.begin(frame_size, user_ids)
    satisfaction, uniforms = world.user_mean[user_idx], _uniforms(seed, user_idx, length)
    for step in range(length):
        users, free = world.user_ids[user_idx], may_show(world, log, mode)
        table = pd.DataFrame({"user_id": np.repeat(users, log.shape[1]), "item_id": world.item_ids[log].ravel(),
                              "rating": rating.ravel(), "timestamp": np.arange(log.size)})
        if step == 0:  # `Frames` want a transition
            table = pd.concat([table, table.iloc[[0] * (frame_size + 1)].assign(user_id=world.user_ids[-1] + 1)])
        with torch.no_grad():
            scores = recommend(Frames(table, world.item_ids, matrix, frame_size), users)
        if scores.shape != free.shape:
            raise DataError(f"a recommender's scores are {tuple(scores.shape)}, not {free.shape}: users by items")
        lowest = torch.finfo(torch.float32).min  # a film that may be shown, whatever its score, before one that may not
        scores = scores.float().cpu().nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf)
        shown = scores.masked_fill(~torch.as_tensor(free), -torch.inf).argmax(dim=1).numpy()
        answer, satisfaction = respond(world, habits, mode, user_idx, log, satisfaction, shown, uniforms[:, step])
        played.append(pd.DataFrame({"user_id": users, "step": step, "item_id": world.item_ids[shown], **answer}))
        log, rating = np.c_[log, shown], np.c_[rating, answer["rating"]]
        stay = ~answer["quits"] & may_show(world, log, mode).any(axis=1)
        if not stay.any():
            break
        user_idx, log, rating, satisfaction, uniforms = (
            values[stay] for values in (user_idx, log, rating, satisfaction, uniforms))
    table = pd.concat(played).sort_values(["user_id", "step"], ignore_index=True)
    table.insert(4, "reward", reward_of(table["rating"]))
    return table


def sessions(played: pd.DataFrame, world: World) -> pd.DataFrame:
    """Sum up what `play` returned, by user_id: reward (the sum), length (films), rating (the mean), quits, diversity.

    Diversity is 1 − mean cosine over all pairs of films shown, NaN for a single one.
    """
    who, n = played["user_id"], played.groupby("user_id").size()
    sums = played[["reward", "rating", "quits"]].groupby(who).sum()
    vectors = pd.DataFrame(world.similarity[rows_of(played["item_id"], world.item_ids)], played.index)
    pairs = (vectors.groupby(who).sum() ** 2).sum(axis=1) - (vectors ** 2).sum(axis=1).groupby(who).sum()  # both ways
    return pd.DataFrame({"reward": sums["reward"], "length": n, "diversity": 1 - pairs / (n * (n - 1)).where(n > 1),
                         "rating": sums["rating"] / n, "quits": sums["quits"] > 0})
