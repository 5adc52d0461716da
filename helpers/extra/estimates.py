"""Logs whose propensities are known, in lesson 15's world whose truth is known; and the small Open Bandit data.

A policy here is a weight for every person and film (U, n), float64: of the films not shown yet each is shown with
probability weight / sum of the weights. What a policy thinks of a film does not change during a session, so that the
films of a session can be drawn at once: the order of log weight + Gumbel noise is the order of such draws.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from helpers import datasets
from helpers.extra import foresight
from helpers.files import DataError, shown
from helpers.tables import checked, refuse

PERSISTENCE = 0.7  # of the log's own measure of satisfaction; the world's is Habits.decay, which a log does not tell


class Public(NamedTuple):
    """What everybody may know of each person and film before a session: from other people's logs and ten ratings."""

    film: np.ndarray   # (U, n, K) float32: 1, log-odds of being taken, expected liking, popularity, mean rating, square
    seen: np.ndarray   # (U, n) bool: the first films, never shown
    mean: np.ndarray   # (U,) mean of the first ratings, in stars


class ModelSessions(NamedTuple):
    """What target policies show to everybody and the random numbers of a simulated session: the same for all models."""

    films: np.ndarray     # (P, L, M, K) `Public.film` in the order in which a policy shows them; M = people × repeats
    uniforms: np.ndarray  # (L, M) in [0, 1): what is taken
    normals: np.ndarray   # (L, M) standard normal: how it is rated
    user: np.ndarray      # (M,)


class Log(NamedTuple):
    """N sessions of at most L steps, and what P target policies would have done; 0 or False after a session's end."""

    user: np.ndarray       # (N,) rows of the world's people
    item: np.ndarray       # (N, L) what was shown
    here: np.ndarray       # (N, L) bool: the step took place
    taken: np.ndarray      # (N, L) float64
    stars: np.ndarray      # (N, L) rating minus the mean of the first ratings, 0 where nothing was taken
    left: np.ndarray       # (N, L) bool: the person left after this step
    film: np.ndarray       # (N, L, K) `Public.film` of what was shown
    state: np.ndarray      # (N, L, 3): 1, stars averaged with PERSISTENCE, t / L
    b: np.ndarray          # (N, L) probability that this film would be shown, as the behaviour policy had it; 1 after
    pi: np.ndarray         # (P, N, L) the same film's under each target policy; 1 after the end
    mean_film: np.ndarray  # (P, N, L, K) Σ π(i | s)·film_i over all films not shown yet

    def first(self, n: int, steps: int | None = None) -> "Log":
        """Return the first n sessions, of at most so many steps."""
        cut = {name: field[:, :n, :steps] if name in ("pi", "mean_film") else field[:n, :steps]
               for name, field in self._asdict().items() if name != "user"}
        return Log(self.user[:n], **cut)


def steps_of(world: foresight.World, length: int) -> int:
    """Return how long a session can be: `length` steps, or until half of the films that were not seen are shown."""
    return min(length, max(1, (len(world.item_ids) - world.first.shape[1]) // 2))


def softmax_of(score: np.ndarray, temperature: float, seen: np.ndarray, share: float = 0.0) -> np.ndarray:
    """Return weights (U, n) float64: softmax of score / temperature over films not `seen`, with a uniform share.

    >>> softmax_of(np.log([[3.0, 1.0, 7.0]]), 1.0, np.array([[False, False, True]]), share=0.5).round(3)
    array([[0.625, 0.375, 0.   ]])
    """
    high = np.where(seen, -np.inf, score.astype(np.float64) / temperature)
    weight = np.exp(high - high.max(axis=1, keepdims=True))
    even = ~seen / (~seen).sum(axis=1, keepdims=True)
    return (1 - share) * weight / weight.sum(axis=1, keepdims=True) + share * even


def check_support(target: np.ndarray, behaviour: np.ndarray) -> None:
    """Raise DataError unless the behaviour policy (U, n) can show every film that a target policy (U, n) can show."""
    if target.shape != behaviour.shape:
        raise DataError(f"a target policy of shape {target.shape} beside a behaviour policy of shape "
                        f"{behaviour.shape}: both must be over the same people and films")
    bare = (target > 0) & ~(behaviour > 0)
    if bare.any():
        raise DataError(f"a target policy can show {bare.sum():,} films that the behaviour policy never shows, with "
                        f"{(target * bare).sum(axis=1).max():.0%} of its probability: no weight can make up for that; "
                        f"mix a uniform share into the behaviour policy")


def orders(weight: np.ndarray, user: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return films (N, length) in the order in which a policy (U, n) shows them, drawn without replacement."""
    parts = []
    for some in np.array_split(user, max(1, len(user) // 2_000)):
        with np.errstate(divide="ignore"):
            keys = torch.as_tensor(np.log(weight[some]) + rng.gumbel(size=(len(some), weight.shape[1])))
        parts.append(keys.topk(length).indices.numpy())
    return np.concatenate(parts)


def draw_model_sessions(world: foresight.World, public: Public, targets: list[np.ndarray], repeats: int, seed: int = 0,
                        length: int = 40) -> ModelSessions:
    """Draw what each target policy (U, n) shows to each person, `repeats` times, never what was seen before."""
    rng, user = np.random.default_rng(seed), np.repeat(np.arange(len(public.film)), repeats)
    length = steps_of(world, length)
    films = [public.film[user, orders(target, user, length, rng).T] for target in targets]
    uniforms, normals = rng.random((length, len(user))), rng.normal(size=(length, len(user)))
    return ModelSessions(np.stack(films), uniforms, normals, user)


def play_log(world: foresight.World, habits: foresight.Habits, public: Public, behaviour: np.ndarray,
             targets: list[np.ndarray], n: int, seed: int, length: int = 40) -> Log:
    """Let n people, drawn with replacement, come once each to a behaviour policy (U, n films), and write it down."""
    for target in targets:
        check_support(target, behaviour)
    rng = np.random.default_rng(seed)
    user = rng.integers(len(world.user_ids), size=n)
    length = steps_of(world, length)
    visits = foresight.Visits(world, habits, torch.as_tensor(user), seed, length)
    item, policies = orders(behaviour, user, length, rng), np.stack([behaviour, *targets])
    mass = policies.sum(axis=2)[:, user]                                            # (1 + P, N) of films not shown yet
    whole = np.matmul(policies.transpose(1, 0, 2), public.film).transpose(1, 0, 2)[:, user].astype(np.float64)
    satisfaction, steps = np.zeros(n), []
    for t in range(length):
        here, film = visits.here.numpy().copy(), public.film[user, item[:, t]]
        own = policies[:, user, item[:, t]]
        _, *answer = visits.step(torch.as_tensor(item[:, t]))
        taken, stars, left = (part.numpy() for part in answer)
        state = np.stack([np.ones(n), satisfaction, np.full(n, t / length)], axis=1)
        over = np.where(taken, stars - public.mean[user], 0.0)
        p = np.where(here, np.minimum(own / mass, 1.0), 1.0)
        steps.append((here, taken.astype(np.float64), over, left, film * here[:, None], state * here[:, None], p[0],
                      p[1:], whole[1:] / mass[1:, :, None] * here[:, None]))
        satisfaction = np.where(taken, PERSISTENCE * satisfaction + (1 - PERSISTENCE) * over, satisfaction)
        mass = mass - own
        whole = whole - own[:, :, None] * film
    *parts, pi, mean_film = zip(*steps, strict=True)
    return Log._make([user, item, *(np.stack(part, axis=1) for part in parts), np.stack(pi, axis=2),
                      np.stack(mean_film, axis=2).astype(np.float32)])


def true_values(world: foresight.World, habits: foresight.Habits, policy: np.ndarray, repeats: int, seed: int = 0,
                length: int = 40) -> tuple[float, float, float]:
    """Return (chance that the first film is taken, exactly; films taken in a session; its standard error).

    Everybody comes `repeats` times, so the error is that of chance within a session, not of who comes.
    """
    first = float((policy / policy.sum(axis=1, keepdims=True) * world.appeal.sigmoid().numpy()).sum(axis=1).mean())
    generator, everyone, means = torch.Generator().manual_seed(seed), torch.arange(len(world.user_ids)), []
    for part in range(repeats):
        keys = torch.as_tensor(policy).log() - (-torch.rand(policy.shape, generator=generator).clamp(1e-12).log()).log()
        played = foresight.play(world, habits, lambda visits, keys=keys: keys, everyone, 100_000 + seed + part, 1,
                                length=steps_of(world, length))
        means.append(played["reward"].mean())
    return first, float(np.mean(means)), float(np.std(means, ddof=1) / repeats ** 0.5) if repeats > 1 else float("nan")


def read_open_bandit(folder: Path) -> pd.DataFrame:
    """Read one campaign's log: `item_id, position, click` int64 and `propensity` float64, in the order of time.

    DataError: no such file, a column is missing, a propensity outside (0, 1] or a click that is neither 0 nor 1.
    """
    path = next((path for path in sorted(Path(folder).glob("*.csv")) if path.name != "item_context.csv"), None)
    if path is None:
        raise DataError(f"{shown(folder)} holds no log of the Open Bandit data: delete the folder and run this again")
    table = checked(datasets.read_table(path, ",", dtype=None), path.name, "timestamp", "item_id", "position", "click",
                    "propensity_score")
    refuse(~table["propensity_score"].between(0, 1, inclusive="right"), table["propensity_score"], "is outside (0, 1]: "
           "what was shown had a chance above 0, so mend such rows or leave them out")
    refuse(~table["click"].isin([0, 1]), table["click"], "is neither 0 nor 1")
    log = table.sort_values("timestamp", kind="stable").rename(columns={"propensity_score": "propensity"})
    return log[["item_id", "position", "click", "propensity"]].reset_index(drop=True)
