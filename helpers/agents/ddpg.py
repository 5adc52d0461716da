"""What the lesson cells of notes/05_ddpg.ipynb define; `make agents` writes it."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.frames import Frames, Transition, to_autocast
from helpers.losses import behaviour_loss, log_policy, mean_item, polyak, sampled_items, squared_error
from helpers.networks import Actor, Critic


@dataclass(frozen=True)
class DDPGSettings:
    """Hyperparameters of DDPG, as lessons 05, 06 and 08 train it: change them here."""

    encoder: str = "attention"   # how actor and critic read a state: a name of lesson 00b
    critic_dropout: float = 0.3  # share of the critic's hidden units that are silent at a training step
    learning_rate: float = 3e-3  # of the actor; the critic learns at a third of it
    gamma: float = 0.9           # discount: a reward ten steps ahead counts a third
    tau: float = 0.01            # share of the way the targets move towards the networks, each step
    value_weight: float = 1.0    # λ below: weight of the critic against the behaviour term
    future: int = 3              # logged items the behaviour term looks at, the next one most
    decay: float = 0.7           # weight of each further one
    batch_size: int = 512        # transitions a step

    def for_agent(self) -> dict:
        return dict(learning_rate=self.learning_rate, encoder=self.encoder, critic_dropout=self.critic_dropout)

    def for_update(self) -> dict:
        return dict(gamma=self.gamma, tau=self.tau, decay=self.decay, future=self.future,
                    value_weight=self.value_weight)


def td_target(reward: Tensor, next_q: Tensor, done: Tensor, gamma: float, stop_at_done: bool = False) -> Tensor:
    """Return y = R + γ·Q'(s', ā'(s')), all (B, 1); with `stop_at_done` nothing is added after a log's end."""
    return reward + gamma * next_q * (1 - done if stop_at_done else 1)


def critic_loss(agent: dict, t: Transition, items: Tensor, gamma: float, as_action: Callable,
                stop_at_done: bool = False) -> tuple[Tensor, Tensor]:
    """Return (L_Q, Q(s, a) (B, 1)) for a batch of transitions."""
    with torch.no_grad():
        next_action = as_action(agent["actor_target"](t.next_state), items)
        y = td_target(t.reward, agent["critic_target"](t.next_state, next_action), t.done, gamma, stop_at_done)
    q = agent["critic"](t.state, t.action)
    return squared_error(q, y), q


def value_term(agent: dict, t: Transition, proto_action: Tensor, items: Tensor, as_action: Callable) -> tuple:
    """Return (mean Q / mean |Q|, Q(s, ā(s)) (B, 1)) with the critic held still."""
    agent["critic"].requires_grad_(False)
    q = agent["critic"](t.state, as_action(proto_action, items)).float()
    agent["critic"].requires_grad_(True)
    return q.mean() / q.abs().mean().detach(), q


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down the gradient of the loss."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def update(agent: dict, frames: Frames, index: Tensor, *, gamma: float, tau: float, decay: float, future: int = 5,
           value_weight: float = 1.0, behaviour_weight: float = 1.0, star_weight: float = 0.0,
           as_action: Callable = mean_item, stop_at_done: bool = False) -> dict:
    """Make one step of DDPG on the transitions at `index` (B,), and return what is worth logging."""
    t, scalars, loss = to_autocast(frames.gather(index)), {}, 0.0
    items, next_items = sampled_items(frames.items, frames.next_items(index, future))  # of a small catalogue all
    if value_weight:
        l_q, q = critic_loss(agent, t, items, gamma, as_action, stop_at_done)
        descend(agent["critic_optimiser"], l_q)
        scalars |= {"loss/critic": l_q, "Q/logged action": q.mean()}
    proto_action = agent["actor"](t.state)
    if value_weight:
        value, q = value_term(agent, t, proto_action, items, as_action)
        loss = -value_weight * value
        scalars["Q/policy's action"] = q.mean()
    if behaviour_weight:
        stars = frames.next_rewards(index, future)[0] / 2 + 2.5 if star_weight else torch.tensor(3.0)
        counts = (1 + star_weight * (stars - 3)).clamp(min=0.05)  # 1 where stars do not count
        behaviour = behaviour_loss(log_policy(proto_action, items), next_items, decay, counts)
        loss = loss + behaviour_weight * behaviour
        scalars["loss/behaviour"] = behaviour
    descend(agent["actor_optimiser"], loss)
    for name in ("actor", "critic"):
        polyak(agent[f"{name}_target"], agent[name], tau)
    return scalars | {"loss/actor": loss}


def new_agent(seed: int, frame_size: int, embed_size: int, learning_rate: float, device: str = "cpu",
              critic_dropout: float = 0.0, **actor_options) -> dict:
    """Return a fresh agent, the same for a seed."""
    torch.manual_seed(seed)
    actor = Actor(frame_size, embed_size, **actor_options).to(device)
    critic = Critic(frame_size, embed_size, actor.config["hidden_size"], actor.config["encoder"],
                    dropout=critic_dropout).to(device)
    agent = {"actor": actor, "critic": critic,
             "actor_target": deepcopy(actor).eval().requires_grad_(False),
             "critic_target": deepcopy(critic).eval().requires_grad_(False)}
    for name, rate in (("actor", learning_rate), ("critic", learning_rate / 3)):
        agent[f"{name}_optimiser"] = torch.optim.AdamW(agent[name].parameters(), rate, weight_decay=1e-4, fused=True)
    return agent
