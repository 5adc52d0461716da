"""What the lesson cells of notes/15_foresight.ipynb define; `make agents` writes it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from helpers import evaluation, features
from helpers.agents import d4pg, ddpg, rainbow
from helpers.extra import foresight, simulator
from helpers.frames import Frames, Transition, flatten
from helpers.losses import log_policy, polyak, sampled_items, squared_error


@dataclass(frozen=True)
class ForesightSettings:
    """Hyperparameters of the agents that act: change them here."""

    gamma: float = 0.95          # discount; the agent it is compared with has 0
    encoder: str = "attention"   # how networks read a state: a name of lesson 00b
    hidden_size: int = 128
    dropout: float = 0.1         # of hidden units, and of a frame's items, at a training step
    pretrain: int = 400          # steps of imitation of other people's logs, before the first act
    updates: int = 40            # steps after each round
    batch_size: int = 256
    keep: int = 8                # last rounds to learn from
    learning_rate: float = 1e-3
    actor_rate: float = 1e-4     # of an actor that follows a critic, DDPG's and D4PG's, once it acts
    tau: float = 0.02            # share of the way the targets move, each step
    n: int = 3                   # steps of a return, in D4PG and Rainbow
    sharper: float = 5.0         # Rainbow acts by its values times this, for they differ little
    cap: float = 10.0            # on REINFORCE's weights
    entropy: float = 0.003       # weight of REINFORCE's entropy
    k: int = 1                   # films of a slate
    far: float = 0.99            # discount of the agent that learns models
    greed: float = 10.0          # it acts by its log-scores times this


def item_vectors(train: pd.DataFrame, matrix: np.ndarray, item_ids: np.ndarray, n: int = 30,
                 weight: float = 3.0) -> Tensor:
    """Return (n_items, n + 2): the main directions of an item matrix; and raters (log) and mean rating, weighted."""
    x = torch.as_tensor(matrix, dtype=torch.float32)
    x = x - x.mean(dim=0)
    left, size, _ = torch.linalg.svd(x, full_matrices=False)
    x = (left * size)[:, :n]
    votes = features.votes_of(train, item_ids)
    facts = torch.as_tensor(features.standardise(votes.to_numpy(np.float64)), dtype=torch.float32)
    return torch.cat([x / x.std(dim=0).mean().clamp(min=1e-6), weight * facts], dim=1)


class Setting(NamedTuple):
    """A world, and what agents and rules may know beforehand."""

    world: foresight.World
    content: np.ndarray   # (n, d) of its films
    known: pd.DataFrame   # ratings of other users
    frames: Frames        # their transitions
    learners: Tensor      # people of the world that agents act on
    judges: Tensor        # and the others


def setting_of(ratings: pd.DataFrame, infos: dict, texts: dict, all_ids: np.ndarray, content: np.ndarray, seed: int,
               share: float = 0.5, seen_enough: int = 10, most: tuple[int, int] = (600, 1_500)) -> Setting:
    """Draw a `share` of the users for a world; films rated `seen_enough` times there; `most`: of them, and films."""
    users, rng = np.sort(ratings["user_id"].unique()), np.random.default_rng(seed)
    of_world = ratings["user_id"].isin(rng.choice(users, min(most[0], int(share * len(users))), replace=False))
    counts = ratings[of_world].groupby("item_id").size()
    kept = np.isin(all_ids, counts[counts >= min(seen_enough, counts.median())].nlargest(most[1]).index)
    known = foresight.some_users(ratings[~of_world & ratings["item_id"].isin(all_ids[kept])], 20_000)
    matrix = features.item_matrix(known, infos, texts)[kept]
    frames = Frames(known, all_ids[kept], item_vectors(known, matrix, all_ids[kept]).numpy(), frame_size=10)
    world = foresight.fit_world(ratings[of_world], all_ids[kept], content[kept])
    people = torch.as_tensor(rng.permutation(len(world.user_ids)))
    n = round(2 / 3 * len(people))
    return Setting(world, content[kept], known, frames, people[:n], people[n:])


def expected_liking(known: pd.DataFrame, item_ids: np.ndarray, content: np.ndarray) -> foresight.Policy:
    """Return a policy that scores by expected stars: factors of other people's logs, and a user's own folded in."""
    model = simulator.fit_world(known, item_ids, content)
    x = torch.as_tensor(np.delete(model.items, 1, axis=1), dtype=torch.float32)                   # 1 and the factors
    mean, bias = float(known["rating"].mean()), torch.as_tensor(model.items[:, 1], dtype=torch.float32)
    outer = (x[:, :, None] * x[:, None]).flatten(1)
    ridge = torch.diag(torch.tensor([simulator.BIAS_RIDGE] + [model.ridge or 1.0] * (x.shape[1] - 1)))

    def score(visits: foresight.Visits) -> Tensor:
        seen = (visits.rated > 0).float()
        gram = (seen @ outer).unflatten(1, (x.shape[1], -1)) + ridge
        own = torch.linalg.solve(gram, ((visits.rated - mean - bias) * seen @ x)[:, :, None])[:, :, 0]
        return own @ x.T + bias
    return score


def rule_of(choice: foresight.Choice, liking: foresight.Policy, beta: float) -> foresight.Policy:
    """Return a policy that scores by log-odds of being taken + β · expected stars: the hand-made rule."""
    return lambda visits: choice((visits.rated > 0).float()) + beta * liking(visits)


def bounds(known: pd.DataFrame, item_ids: np.ndarray) -> dict[str, foresight.Policy]:
    """Return rules that take no account of the person."""
    votes = torch.tensor(features.votes_of(known, item_ids).to_numpy(np.float32))
    generator = torch.Generator().manual_seed(0)
    return {"random": lambda visits: torch.rand(visits.shown.shape, generator=generator),
            "popularity": lambda visits: votes[:, 0].expand(visits.shown.shape),
            "mean rating": lambda visits: votes[:, 1].expand(visits.shown.shape)}


def best_of(policies: dict[float, foresight.Policy], world: foresight.World, habits: foresight.Habits,
            user: Tensor) -> tuple[float, foresight.Policy]:
    """Return (number, policy) of the policy that earns most with `user`, two visits each."""
    earned = {number: foresight.play(world, habits, policy, user, seed=1_000, repeats=2)["reward"].mean()
              for number, policy in policies.items()}
    best = max(earned, key=earned.get)
    return best, policies[best]


def planner_of(world: foresight.World, habits: foresight.Habits, user: Tensor) -> tuple[float, foresight.Policy]:
    """Return (trust, policy) of the best planner."""
    return best_of({trust: foresight.planner(world, habits, trust) for trust in (0.3, 0.6, 1.0)}, world, habits, user)


def planner_gain(world: foresight.World, habits: foresight.Habits, user: Tensor, repeats: int = 3) -> dict[str, float]:
    """Return what myopic oracle and planner earn, and the planner's gain as a share, its trust untuned."""
    near, far = (foresight.play(world, habits, policy, user, seed=99, repeats=repeats)["reward"].to_numpy()
                   for policy in (foresight.myopic, foresight.planner(world, habits)))
    low, high = evaluation.bootstrap(far - near)
    return {"impatience": habits.impatience, "decay": habits.decay, "myopic oracle": near.mean(),
            "planner": far.mean(), "gain": far.mean() / near.mean() - 1, "gain low": low / near.mean(),
            "gain high": high / near.mean()}


class SessionTransitions:
    """Sessions, one after the other, step by step, as the lessons' update functions read transitions.

    items: (n, E). recent, recent_stars (N, F): the films last taken before each step, and their ratings. item (N,):
    what was shown. taken, left, last (N,) bool; stars (N,), 0 where nothing was taken; log_b (N,): log-probability
    that this film would be shown, as the policy that showed it had it.
    """

    def __init__(self, items: Tensor, parts: list[Tensor]):
        self.items, self.device, self.parts = items, items.device, parts
        (self.recent, self.recent_stars, self.item, self.taken, self.stars, self.left, self.last,
         self.log_b) = parts
        self.frame_size, self.embed_size = self.recent.shape[1], items.shape[1]

    def __len__(self) -> int:
        return len(self.item)

    def gather(self, index: Tensor) -> Transition:
        """Return the transitions at index (B,): the reward is 1 if the film was taken, done 1 if the person left."""
        v, stars, action = self.items[self.recent[index]], self.recent_stars[index], self.items[self.item[index]]
        taken = self.taken[index][:, None]
        next_v = torch.where(taken[:, :, None], torch.cat([v[:, 1:], action[:, None]], dim=1), v)
        next_stars = torch.where(taken, torch.cat([stars[:, 1:], self.stars[index][:, None]], dim=1), stars)
        return Transition(flatten(v, stars), action, taken.float(), flatten(next_v, next_stars),
                          self.left[index].float()[:, None])


class Sessions(SessionTransitions):
    """Transitions of sessions, with what followed each step."""

    def rows(self, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return the rows (B, n) of each step and the n − 1 after it, and which are of the same session."""
        rows = (index[:, None] + torch.arange(n)).clamp(max=len(self) - 1)
        ends = self.last[rows].long()
        return rows, ends.cumsum(dim=1) == ends

    def next_items(self, index: Tensor, n: int = 1) -> Tensor:
        """Return (B, n) rows of the item matrix; −1 beyond the session."""
        rows, within = self.rows(index, n)
        return torch.where(within, self.item[rows], -1)

    def next_rewards(self, index: Tensor, n: int = 1) -> tuple[Tensor, Tensor]:
        """Return rewards (B, n), 0 beyond the session, and which are within it."""
        rows, within = self.rows(index, n)
        return self.taken[rows].float() * within, within


@torch.no_grad()
def act_in(world: foresight.World, habits: foresight.Habits, policy: foresight.Policy, note: Callable, user: Tensor,
           seed: int, k: int = 1, length: int = 40) -> list[Tensor]:
    """Let people come once, to slates of k films drawn by a policy's log-probabilities, of those not shown yet.

    Returns, a row a step: what `note` says of visits and slate; item, taken, stars, left, last, log_b of `Sessions`.
    """
    visits, steps = foresight.Visits(world, habits, user, seed, length, k), []
    generator = torch.Generator().manual_seed(seed)
    while not visits.over:
        log_p, here = policy(visits), visits.here
        gumbel = -(-torch.rand(log_p.shape, generator=generator).clamp(1e-7, 1 - 1e-7).log()).log()
        slate = foresight.best_unseen(log_p + gumbel, visits, k)
        before = note(visits, slate)
        item, *answer = visits.step(slate)
        steps.append((*before, item, *answer, ~visits.here, log_p.gather(1, item[:, None])[:, 0], here))
    *parts, here = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))  # (B, steps, …)
    parts[-2][:, -1] = True  # who is still here at the last step
    return [part[here] for part in parts]


def softly(network: nn.Module, items: Tensor, sharper: float = 1.0) -> foresight.Policy:
    """Return the log-probabilities of a network's softmax, sharper times as sharp."""
    return lambda visits: log_policy(network.eval()(visits.states(items)) * sharper, items)


def greedily(network: nn.Module, items: Tensor) -> foresight.Policy:
    """Return the policy of a network whose proto-action's dot product with an item is its score."""
    return lambda visits: network.eval()(visits.states(items)) @ items.T


def reinforce_update(agent: dict, frames: Frames | Sessions, index: Tensor, *, returns: Tensor, log_b: Tensor,
                     tau: float, cap: float, entropy: float, k: int = 1) -> dict:
    """Make one step of top-K off-policy REINFORCE on the steps at index (B,); returns, log_b (N,) of all steps."""
    t, goal = frames.gather(index), returns[index][:, None]
    items, item = sampled_items(frames.items, frames.next_items(index))  # of a small catalogue all
    value = agent["critic"](t.state, torch.zeros_like(t.action))
    l_v = squared_error(value, goal)
    ddpg.descend(agent["critic_optimiser"], l_v)
    log_pi = log_policy(agent["actor"](t.state), items)
    chosen = log_pi.gather(1, item)  # π and β of the same film, the one that was shown
    advantage = (goal - value.detach()) / returns.std().clamp(min=1e-6)
    weight = top_k_weight(chosen.detach(), log_b[index][:, None], cap, k)
    spread = -(log_pi.exp() * log_pi).sum(dim=1).mean()
    loss = -(weight * advantage * chosen).mean() - entropy * spread
    ddpg.descend(agent["actor_optimiser"], loss)
    polyak(agent["actor_target"], agent["actor"], tau)
    return {"loss/critic": l_v, "loss/actor": loss, "entropy": spread, "weight": weight.mean()}


def top_k_weight(log_pi: Tensor, log_b: Tensor, cap: float, k: int) -> Tensor:
    """Return min(cap, π/β) · K·(1 − π)^(K − 1), of any shape. Source: Chen et al. 2019, eq. 6 to 8."""
    return (log_pi - log_b).exp().clamp(max=cap) * k * (1 - log_pi.exp()) ** (k - 1)


def new_actor_in(kind: str, seed: int, frames: Frames, settings: ForesightSettings) -> dict:
    """Return a fresh agent of a kind that has imitated the logs, with new optimisers."""
    how = dict(hidden_size=settings.hidden_size, encoder=settings.encoder, dropout=settings.dropout,
               item_dropout=settings.dropout)
    if kind == "Rainbow":
        agent = rainbow.new_rainbow_agent(seed, frames.items, frames.frame_size, 3e-3, noisy=False, **how)
        imitate = partial(rainbow.rainbow_update, agent, frames, gamma=0.0, tau=0.05, decay=0.7, n=1, future=3,
                          support=torch.linspace(-4, 5, 51))
    else:
        new = d4pg.new_d4pg_agent if kind == "D4PG" else ddpg.new_agent
        agent = new(seed, frames.frame_size, frames.embed_size, 3e-3, **how)
        imitate = partial(ddpg.update, agent, frames, gamma=0.0, tau=0.05, decay=0.7, future=3, value_weight=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.pretrain):
        imitate(torch.randint(len(frames), (min(settings.batch_size, len(frames)),), generator=generator))
    for name in {"actor", "critic"} & set(agent):
        agent[f"{name}_optimiser"] = torch.optim.AdamW(agent[name].parameters(), settings.learning_rate,
                                                       weight_decay=1e-4, fused=True)
    return agent


def returns_of(taken: Tensor, last: Tensor, gamma: float) -> Tensor:
    """Return (N,): Σ γᵏ·r from each step to the end of its session; taken, last (N,) bool."""
    total, ends, following = taken.tolist(), last.tolist(), 0.0
    for row in reversed(range(len(total))):
        following = total[row] = total[row] + (0.0 if ends[row] else gamma * following)
    return torch.tensor(total, dtype=torch.float32)


def update_of(kind: str, agent: dict, played: Sessions, settings: ForesightSettings,
              gamma: float) -> Callable[[Tensor], dict]:
    """Return the lesson's update of a kind: index → numbers."""
    how = dict(tau=settings.tau)
    if kind == "REINFORCE":
        return partial(reinforce_update, agent, played, returns=returns_of(played.taken, played.last, gamma),
                       log_b=played.log_b, cap=settings.cap, entropy=settings.entropy, k=settings.k, **how)
    how |= dict(gamma=gamma, decay=0.7, future=1, stop_at_done=True)
    if kind == "DDPG":
        return partial(ddpg.update, agent, played, behaviour_weight=0.0, **how)
    how |= dict(n=settings.n, support=torch.linspace(0, 1 / (1 - gamma), 51))  # of returns of ones, no more can come
    if kind == "D4PG":
        return partial(d4pg.d4pg_update, agent, played, behaviour_weight=0.0, **how)
    return partial(rainbow.rainbow_update, agent, played, penalty=0.0, **how)


def last_taken(visits: foresight.Visits, _: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of the films each took last (B, F), and of their ratings."""
    return visits.recent.clone(), visits.recent_stars.clone()


def learn_by_acting(kind: str, gamma: float, world: foresight.World, habits: foresight.Habits, frames: Frames,
                    user: Tensor, rounds: int, settings: ForesightSettings, seed: int = 0) -> tuple[dict, pd.DataFrame]:
    """Return (agent, one row a round: films taken in a session, steps, stars above own mean) of acting on users."""
    agent, stored, rows = new_actor_in(kind, seed, frames, settings), [], []
    generator, own = torch.Generator().manual_seed(seed), world.own_mean[user]
    if kind in ("DDPG", "D4PG"):
        agent["actor_optimiser"].param_groups[0]["lr"] = settings.actor_rate
    for k in tqdm(range(rounds), desc=f"{kind}, γ = {gamma}, seed {seed}"):
        policy = softly(agent["actor"], frames.items, settings.sharper if kind == "Rainbow" else 1.0)
        stored = [*stored, act_in(world, habits, policy, last_taken, user, 10_000 * seed + k,
                                  settings.k)][-settings.keep:]
        agent["actor"].train()
        played = Sessions(frames.items, [torch.cat(part) for part in zip(*stored, strict=True)])
        step = update_of(kind, agent, played, settings, gamma)
        for _ in range(settings.updates * (3 if k == 0 else 1)):
            step(torch.randint(len(played), (settings.batch_size,), generator=generator))
        taken, stars = stored[-1][3:5]
        rows.append({"taken": taken.sum().item() / len(user), "steps": len(taken) / len(user),
                     "stars": (stars[taken].mean() - own.mean()).item()})
    return agent, pd.DataFrame(rows, pd.RangeIndex(1, rounds + 1, name="round"))


class Look(NamedTuple):
    """What the agent that learns models sees of B visits, before it shows a film."""

    odds: Tensor          # (B, n) log-odds that a film is taken, as other people's logs have it
    stars: Tensor         # (B, n) expected stars, minus the mean of a person's first ratings
    mean: Tensor          # (B,) that mean
    satisfaction: Tensor  # (B, R) of this visit so far, for each ρ that may be


def look_at(visits: foresight.Visits, choice: foresight.Choice, liking: foresight.Policy, rhos: tuple) -> Look:
    """Return what there is to see; satisfaction is that of the last films taken, as many as a frame has."""
    mean, size = visits.world.first_stars[visits.user].mean(dim=1), visits.recent.shape[1]
    rated, age = visits.rated > 0, torch.arange(size).flip(0)
    new = age < rated.sum(dim=1, keepdim=True) - size  # (B, F): taken in this visit
    weight = torch.stack([(1 - rho) * rho ** age for rho in rhos], dim=1)
    satisfaction = ((visits.recent_stars - mean[:, None]) * new) @ weight
    return Look(choice(rated.float()), liking(visits) - mean[:, None], mean, satisfaction)


class Beliefs(NamedTuple):
    """Small models by their coefficients, the intercept first."""

    taken: Tensor = torch.tensor([0.0, 1.0, 0.0])  # log-odds of being taken, on log-odds and stars
    liked: Tensor = torch.tensor([0.0, 1.0])       # stars above the mean, on expected ones
    rho: int = 0                                   # which persistence
    leaves: Tensor = torch.tensor([-2.0, 0.0])     # log-odds of leaving, on satisfaction s
    to_come: Tensor = torch.tensor([-30.0, 0, 0, 0, 0])  # log of what follows if not, on s, q, s·q, s²

    def future(self, s: Tensor, q: Tensor) -> Tensor:
        """Return what is still to come at satisfaction s (B, m); q (B, 1)."""
        leave = (self.leaves[0] + self.leaves[1] * s).sigmoid()
        s = s.clamp(-2.5, 2.5)
        x = torch.stack([torch.ones_like(s), s, q.expand_as(s), s * q, s * s], dim=-1)
        return (1 - leave) * (x @ self.to_come).clamp(max=4.5).exp()  # no visit takes more than 90 films


@dataclass
class ModelBased:
    """Score films by p̂ · (1 + what being taken adds to what is still to come); a policy that notes what it saw."""

    choice: foresight.Choice
    liking: foresight.Policy
    rhos: tuple[float, ...] = (0.3, 0.5, 0.65, 0.8, 0.9, 0.95)  # persistence ρ, as it may be
    beliefs: Beliefs = field(default_factory=Beliefs)

    def __call__(self, visits: foresight.Visits) -> Tensor:
        """Return scores (B, n), above 0."""
        look, own = look_at(visits, self.choice, self.liking, self.rhos), self.beliefs
        p = (own.taken[0] + own.taken[1] * look.odds + own.taken[2] * look.stars).sigmoid()
        best = p.masked_fill(visits.shown, 0).topk(min(20, p.shape[1])).values
        self.look, q = look, best.mean(dim=1, keepdim=True).clamp(min=1e-6).log()
        self.q, rho, s = q[:, 0], self.rhos[own.rho], look.satisfaction[:, [own.rho]]
        after = rho * s + (1 - rho) * (own.liked[0] + own.liked[1] * look.stars)
        return (p * (1 + own.future(after, q) - own.future(s, q))).clamp(min=1e-6)

    def note(self, _: foresight.Visits, slate: Tensor) -> tuple[Tensor, ...]:
        """Return what it saw of a film that it shows, (B,) each, and satisfaction (B, R)."""
        odds, stars = (part.gather(1, slate[:, :1])[:, 0] for part in self.look[:2])
        return odds, stars, self.q, self.look.mean, self.look.satisfaction


def log_odds_of(x: Tensor, y: Tensor) -> Tensor:
    """Return (1 + d,), intercept and slopes of a logistic regression of y (N,) bool on x (N, d)."""
    x, y = torch.cat([x, x.mean(dim=0).expand(2, -1)]), torch.cat([y, torch.tensor([False, True])])
    model = LogisticRegression(C=1e3).fit(x.numpy(), y.numpy())
    return torch.tensor([*model.intercept_, *model.coef_[0]], dtype=torch.float32)


def beliefs_of(parts: list[Tensor], rhos: tuple, gamma: float) -> Beliefs:
    """Return what stored steps teach: parts as `act_in` returns them, with what `ModelBased.note` says."""
    odds, stars, q, mean, before, _, taken, given, left, last, _ = parts
    def slopes(model: LinearRegression | PoissonRegressor, x: Tensor, y: Tensor) -> Tensor:
        model.fit(x.numpy(), y.numpy())
        return torch.tensor([model.intercept_, *model.coef_], dtype=torch.float32)

    rho = torch.tensor(rhos)
    after = torch.where(taken[:, None], rho * before + (1 - rho) * (given - mean)[:, None], before)
    leaves = [log_odds_of(s[:, None], left) for s in after.T]
    error = [F.binary_cross_entropy_with_logits(b[0] + b[1] * s, left.float())
             for b, s in zip(leaves, after.T, strict=True)]
    best = int(torch.stack(error).argmin())
    found = Beliefs(log_odds_of(torch.stack([odds, stars], dim=1), taken),
                    slopes(LinearRegression(), stars[taken, None], (given - mean)[taken]), best, leaves[best])
    if not gamma:
        return found
    s, to_come = after[:, best].clamp(-2.5, 2.5), returns_of(taken, last, gamma) - taken.float()
    x = torch.stack([s, q, s * q, s * s], dim=1)
    return found._replace(to_come=slopes(PoissonRegressor(alpha=1e-4, max_iter=300), x[~last], to_come[~last]))


def learn_models(gamma: float, world: foresight.World, habits: foresight.Habits, choice: foresight.Choice,
                 liking: foresight.Policy, user: Tensor, rounds: int, settings: ForesightSettings,
                 seed: int = 0) -> ModelBased:
    """Return the agent that acting on users taught its models."""
    agent, stored = ModelBased(choice, liking), []
    for k in range(rounds):
        stored = [*stored, act_in(world, habits, lambda visits: settings.greed * agent(visits).log(), agent.note, user,
                                  10_000 * seed + k)][-settings.keep:]
        agent.beliefs = beliefs_of([torch.cat(part) for part in zip(*stored, strict=True)], agent.rhos, gamma)
    return agent


def draw_foresight(rows: pd.DataFrame, observed: dict[str, float]) -> plt.Figure:
    """Draw what foresight gains over impatience κ (ρ = 0.8) and persistence ρ (κ = 4), and the films taken over κ."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
    usual = rows[rows["memory"] == 0.8]
    for axis, along, some in ((left, "impatience", usual), (middle, "memory", rows[rows["impatience"] == 4])):
        at = some.set_index([along, "policy"])["reward"].unstack()
        axis.plot(at.index, at["planner"] - at["myopic oracle"], "k--", label="planner, over myopic oracle")
        for k, (name, own) in enumerate(some[some["gamma"] > 0].groupby("policy", sort=False)):
            spread = [own["gain"] - own["gain low"], own["gain high"] - own["gain"]]
            axis.errorbar(own[along] + (at.index[-1] - at.index[0]) * (k - 2) / 80, own["gain"], yerr=spread, fmt="o-",
                          capsize=2, color=f"C{k}", label=f"{name.partition(',')[0]}, over γ = 0")
        axis.axhline(0, color="grey", linewidth=0.8)
    at = usual.set_index(["impatience", "policy"])["reward"].unstack()
    styles = {name: f"C{k}o-" for k, name in enumerate(usual.loc[usual["gamma"] > 0, "policy"].unique())}
    styles |= {"planner": "k--", "myopic oracle": "k:", "hand-made rule": "k-", "popularity": "C8-"}
    for name, style in styles.items():
        right.plot(at.index, at[name], style, label=name)
    left.axvspan(observed["low"], observed["high"], color="C7", alpha=0.3, label="κ of the log's session ends")
    left.set(xlabel="impatience κ, with ρ = 0.8", ylabel="gain of foresight, films a session")
    middle.set(xlabel="persistence of satisfaction ρ, with κ = 4")
    right.set(xlabel="impatience κ, with ρ = 0.8", ylabel="films taken in a session")
    for axis in (left, right):
        axis.legend(fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1.02), ncols=2)
    return figure
