"""Ways of offline RL to learn a policy over a catalogue: what `benchmarks.field` trains.

AWR (Peng et al. 2019), CRR (Wang et al. 2020) and IQL (Kostrikov et al. 2021) learn values first and then imitate, each
logged item's log p weighted by its advantage. SQN and SAC (Xin et al. 2020) learn Q beside the imitation, on layers
that both share. A log's end is not the person's: every target goes on from the state after it.

What is not as in the papers: CRR's Q is that of the supervised policy and not of the one being learnt (one step of
improvement), so that all values are learnt once, with one seed, for all settings and seeds of the policy; advantages
are counted in their standard deviations; Q is linear in the item's vector, so that a mean over the policy is exact;
IQL has one Q, and its targets and those of double Q-learning follow slowly, as lesson 05's do.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.results import FRAME_SIZE, MAX_STEPS, SETTINGS
from helpers import training
from helpers.agents import ddpg
from helpers.files import replacing
from helpers.frames import Frames, reward_of, to_autocast
from helpers.losses import behaviour_loss, log_policy, mean_item, n_step, polyak, squared_error
from helpers.networks import ENCODERS, Actor, Rainbow, hide_items, two_layers

RETURN_STEPS, EXPECTILE, WARM_STEPS, XIN_GAMMA = 30, 0.7, 200, 0.5
LOOP = dict(batch_size=SETTINGS.batch_size, max_steps=MAX_STEPS, shuffle_ties=True, safe_every=MAX_STEPS, log_every=100)


def exp_weights(advantage: Tensor, beta: float, most: float = 20.0) -> Tensor:
    """Return min(e^(A / β), most), A in units of its own standard deviation: AWR's, CRR's and IQL's weights."""
    return (advantage / (beta * advantage.std(correction=0) + 1e-8)).exp().clamp(max=most)


def binary_weights(advantage: Tensor) -> Tensor:
    """Return 1 where an action is better than the policy's average, else 0: CRR's other weights."""
    return (advantage > 0).float()


def q_weights(q: Tensor, least: float = 0.05) -> Tensor:
    """Return Q as a share of its mean, at least `least`: the weights of Xin et al.'s actor, whose rewards are > 0."""
    return (q / q.mean()).clamp(min=least)


def expectile_loss(error: Tensor, tau: float) -> Tensor:
    """Return the mean of |τ − 1[error < 0]|·error²: τ = ½ is half the squared error, τ → 1 learns the maximum."""
    return (torch.where(error < 0, 1 - tau, tau) * error.square()).mean()


def q_at(head: Tensor, action: Tensor) -> Tensor:
    """Return Q(s, a) = c + u·a / √E (B, 1) of a head's output [u, c] (B, E + 1) and actions (B, E)."""
    return head[:, -1:] + (head[:, :-1] * action).sum(dim=1, keepdim=True) / action.shape[1] ** 0.5


class TwoHeads(Actor):
    """Lesson 05's actor with two heads of Q, linear in the item's vector, on the last hidden layer it shares."""

    def __init__(self, *sizes: int, encoder: str):
        super().__init__(*sizes, encoder=encoder)
        self.heads = nn.Linear(self.config["hidden_size"], 2 * (self.embed_size + 1))

    def both(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """state (B, F·(E+1)) → proto-action (B, E), heads (B, 2, E + 1) float32."""
        items, state = hide_items(state, self.frame_size, self.embed_size, self.item_dropout * self.training)
        h = self.body[:-1](self.encoder(state))
        proto_action = self.body[-1](h) + self.gain * torch.einsum("bfe,f->be", items, self.mix)
        return proto_action, self.heads(h).float().unflatten(1, (2, -1))


def new_critic(kind: str, frames: Frames, seed: int) -> dict:
    """Return what a way learns values with: V(s) and a Q linear in the item's vector, so that E_π Q is exact."""
    torch.manual_seed(seed)
    q = Rainbow(FRAME_SIZE, frames.embed_size, encoder=SETTINGS.encoder, n_atoms=1, noisy=False, item_dropout=0.0,
                dropout=SETTINGS.critic_dropout)
    q.centre.copy_(frames.items.mean(dim=0))
    encoder = ENCODERS[SETTINGS.encoder](FRAME_SIZE, frames.embed_size)
    value = nn.Sequential(encoder, nn.Linear(encoder.out_size, 256), *two_layers(256, 1, 0.0))
    learns = [*(q.parameters() if kind != "AWR" else ()), *(value.parameters() if kind != "CRR" else ())]
    return {"q": q, "q_target": deepcopy(q).eval().requires_grad_(False), "value": value,
            "optimiser": torch.optim.AdamW(learns, SETTINGS.learning_rate / 3, weight_decay=1e-4, fused=True)}


def step_of(kind: str, critic: dict, frames: Frames, index: Tensor, policy: Actor, learn: bool) -> Tensor:
    """Return the critic's loss on the transitions at `index` (B,); or, not to `learn`, their advantages A (B, 1).

    Rewards are counted from their mean: no advantage changes, and values begin near where they end.
    """
    t, discount = n_step(frames, index, RETURN_STEPS if kind == "AWR" else 1, SETTINGS.gamma)
    t, old = to_autocast(t), critic["q_target"]
    reward = t.reward - reward_of(float(frames.rating.mean())) * (1 - discount) / (1 - SETTINGS.gamma)
    v = critic["value"](t.state).float() if kind != "CRR" else None
    with torch.no_grad():
        if kind == "AWR" or learn:
            y = reward + discount * (old.logits(t.next_state, mean_item(policy(t.next_state), frames.items))
                                     if kind == "CRR" else critic["value"](t.next_state).float())
        if kind == "IQL" or (kind == "CRR" and not learn):
            u, c = old.heads(t.state)
            old_q = old.tilt(u, c, t.action)
    if kind == "AWR":
        return squared_error(v, y) if learn else y - v
    if learn:
        loss = squared_error(critic["q"].logits(t.state, t.action), y)
        return loss + expectile_loss(old_q - v, EXPECTILE) if kind == "IQL" else loss
    return old_q - (v if kind == "IQL" else old.tilt(u, c, mean_item(policy(t.state), frames.items)))


def advantages(kind: str, frames: Frames, policy: Actor) -> Tensor:
    """Train a critic for as many steps as a policy, and return A (n,) of every transition, in the file's order."""
    critic = new_critic(kind, frames, seed=0)

    def update(index: Tensor) -> dict:
        loss = step_of(kind, critic, frames, index, policy, learn=True)
        ddpg.descend(critic["optimiser"], loss)
        polyak(critic["q_target"], critic["q"], SETTINGS.tau)
        return {"loss/critic": loss}
    log = training.fit(update, frames, critic, desc=f"{kind}'s critic", **LOOP)
    print(kind, log["loss/critic"].round(2).tolist(), flush=True)
    with torch.no_grad(), training.autocast("cpu"):
        return torch.cat([step_of(kind, critic, frames, some, policy, learn=False)[:, 0]
                          for some in torch.arange(len(frames)).split(2048)])


def weighted_update(agent: dict, frames: Frames, index: Tensor, table: Tensor, user: Tensor) -> dict:
    """Make one step of lesson 05's behaviour term, each next item's log p weighted by `table` (n_users, n_items)."""
    next_items = frames.next_items(index, SETTINGS.future)
    weights = table[user[index][:, None], next_items.clamp(min=0)]  # an item's own, wherever ties are shuffled to
    log_p = log_policy(agent["actor"](to_autocast(frames.gather(index)).state), frames.items)
    loss = behaviour_loss(log_p, next_items, SETTINGS.decay, weights)
    ddpg.descend(agent["actor_optimiser"], loss)
    polyak(agent["actor_target"], agent["actor"], SETTINGS.tau)
    return {"loss/behaviour": loss}


def shared_update(actor: TwoHeads, agent: dict, frames: Frames, steps: count, index: Tensor, *, kind: str,
                  q_weight: float) -> dict:
    """Make one step of SQN, or of SAC, which is SQN for its first steps: one loss of imitation and of double Q."""
    t, old, one = to_autocast(frames.gather(index)), agent["actor_target"], int(torch.randint(2, ()))
    next_items = frames.next_items(index, SETTINGS.future)
    (proto_action, heads), weights = actor.both(t.state), torch.ones(next_items.shape)
    with torch.no_grad():  # the head that learns chooses the next item, the other one values it
        chooses, values = old.both(t.next_state)[1][:, [one, 1 - one]].unbind(dim=1)
        y = t.reward + XIN_GAMMA * q_at(values, frames.items[(chooses[:, :-1] @ frames.items.T).argmax(dim=1)])
        if next(steps) >= WARM_STEPS and kind == "SAC":
            real = next_items >= 0  # each next item counts by its own Q, in the state it was taken in
            own = to_autocast(frames.gather((index[:, None] + torch.arange(SETTINGS.future))[real]))
            weights[real] = q_weights(q_at(old.both(own.state)[1].mean(dim=1), own.action))[:, 0]
    loss = squared_error(q_at(heads[:, one], t.action), y)
    behaviour = behaviour_loss(log_policy(proto_action, frames.items), next_items, SETTINGS.decay, weights)
    ddpg.descend(agent["actor_optimiser"], behaviour + q_weight * loss)
    polyak(old, actor, SETTINGS.tau)
    return {"loss/behaviour": behaviour, "loss/critic": loss, "Q/target": y.mean(),
            **heard(weights[:, 0], frames.next_rewards(index)[0][:, 0])}


def heard(weights: Tensor, rewards: Tensor) -> dict[str, float]:
    """Return how far weights (n,) spread around their mean, and their correlation with the actions' own rewards."""
    varies = bool(weights.std() > 0)
    return {"spread": float(weights.std() / weights.mean()),
            "with stars": float(torch.corrcoef(torch.stack([weights, rewards]))[0, 1]) if varies else 0.0}


def kept(path: Path, make: Callable[[], dict]) -> dict:
    """Return what `make` returns, made once and kept at `path`."""
    if not path.exists():
        made = make()
        with replacing(path) as beside:
            torch.save(made, beside)
    return torch.load(path, weights_only=True)


def actor_of(saved: dict, frames: Frames) -> Actor:
    """Return the actor that `trained` kept."""
    actor = Actor(FRAME_SIZE, frames.embed_size, encoder=SETTINGS.encoder)
    actor.load_state_dict(saved["actor"], strict=False)  # heads of Q stay behind
    return actor.eval()


def place(folder: Path, name: str, seed: int, setting: dict[str, float]) -> Path:
    """Return where `trained` keeps what it trains."""
    return folder / f"{name} {' '.join(map(str, setting.values()))} {seed}.pt"


def trained(folder: Path, frames: Frames, name: str, seed: int, setting: dict[str, float]) -> dict:
    """Return {"actor": target weights, "cpu": seconds, "spread", "with stars": of its weights}, trained once."""
    kind, sizes, started = name.partition(",")[0], (FRAME_SIZE, frames.embed_size), time.process_time()

    def critic() -> dict:
        policy = actor_of(trained(folder, frames, "supervised", 0, {"value_weight": 0.0}), frames)
        return {"advantage": advantages(kind, frames, policy)}

    def make() -> dict:
        agent, of_weights = ddpg.new_agent(seed, *sizes, **SETTINGS.for_agent()), {"spread": 0.0, "with stars": 0.0}
        if kind in ("SQN", "SAC"):
            torch.manual_seed(seed)  # the actor begins as lesson 05's
            actor = TwoHeads(*sizes, encoder=SETTINGS.encoder)
            agent = {"actor": actor, "actor_target": deepcopy(actor).eval().requires_grad_(False),
                     "actor_optimiser": torch.optim.AdamW(actor.parameters(), SETTINGS.learning_rate,
                                                          weight_decay=1e-4, fused=True)}
            step = partial(shared_update, actor, agent, frames, count(), kind=kind, **setting)
        elif "value_weight" in setting:
            step = partial(ddpg.update, agent, frames, **SETTINGS.for_update() | setting)
        else:
            advantage = kept(folder / f"critic {kind}.pt", critic)["advantage"]
            weights = exp_weights(advantage, **setting) if setting else binary_weights(advantage)
            index, user = torch.arange(len(frames)), torch.as_tensor(np.repeat(
                np.arange(len(frames.user_ids)), np.maximum(frames.log_length - FRAME_SIZE, 0)))
            table = torch.ones(len(frames.user_ids), len(frames.items))
            table[user, frames.next_items(index)[:, 0]] = weights
            of_weights = heard(weights, frames.next_rewards(index)[0][:, 0])
            step = partial(weighted_update, agent, frames, table=table, user=user)
        log = training.fit(step, frames, agent, desc=f"{name} {setting}, seed {seed}", seed=seed, **LOOP)
        last = {key: float(log[key].iloc[-1]) for key in of_weights if key in log}
        return {"actor": agent["actor_target"].state_dict(), "cpu": time.process_time() - started, **of_weights, **last}
    return kept(place(folder, name, seed, setting), make)
