"""What the lesson cells of notes/07_rainbow.ipynb define; `make agents` writes it."""

from copy import deepcopy

import torch
from torch import Tensor

from helpers.agents import ddpg
from helpers.frames import Frames, Transition, to_autocast
from helpers.losses import behaviour_loss, cross_entropy, log_policy, mean_of, n_step, polyak, project, sampled_items
from helpers.networks import Rainbow
from helpers.replay import Prioritised


def best_items(u: Tensor, items: Tensor) -> Tensor:
    """Return the vectors (B, E) of the greedy items: u (B, E), items (n, E)."""
    return items[(u @ items.T).max(dim=1).indices]


def expected_return(logits: Tensor, support: Tensor) -> Tensor:
    """Return Q (B, 1): the mean of a distribution, or a lone atom's number itself."""
    return mean_of(logits, support) if logits.shape[1] > 1 else logits


def rainbow_loss(agent: dict, t: Transition, discount: Tensor, items: Tensor, support: Tensor, double: bool = True,
                 spread: float = 5.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss (B,), logits of the logged item, of the next state's chosen item, u(s) (B, E))."""
    with torch.no_grad():
        chooser = agent["actor" if double else "actor_target"].eval()  # neither noise nor dropout in the choice
        next_logits = agent["actor_target"].logits(t.next_state, best_items(chooser(t.next_state), items))
    u, v = agent["actor"].train().heads(t.state)
    logits = agent["actor"].tilt(u, v, t.action)
    if logits.shape[1] == 1:
        y = t.reward + discount * next_logits
        return ((logits - y)[:, 0] / spread).square() / 2, logits, next_logits, u
    m = project(next_logits.softmax(dim=1), t.reward, discount, support)
    return cross_entropy(logits, m) - torch.special.entr(m).sum(dim=1), logits, next_logits, u


def rainbow_update(agent: dict, frames: Frames, batch: Tensor | tuple[Tensor, Tensor], *, gamma: float, tau: float,
                   decay: float, support: Tensor, n: int = 3, penalty: float = 1.0, double: bool = True,
                   future: int = 5, stop_at_done: bool = False) -> dict:
    """Make one step on the transitions `batch`, (B,) or with their weights (B, 1), and return what to log."""
    index, weight = batch if isinstance(batch, tuple) else (batch, torch.ones(len(batch), 1))
    t, discount = n_step(frames, index, n, gamma, stop_at_done)
    t = to_autocast(t)
    kl, logits, next_logits, u = rainbow_loss(agent, t, discount, frames.items, support, double)
    critic = loss = (weight.to(kl.device)[:, 0] * kl).mean()
    scalars = {"Q/logged action": expected_return(logits.detach(), support).mean(),
               "Q/policy's action": expected_return(next_logits, support).mean()}  # of the next states
    if penalty:
        items, next_items = sampled_items(frames.items, frames.next_items(index, future))
        scalars["loss/behaviour"] = behaviour_loss(log_policy(u, items), next_items, decay)
        loss = loss + penalty * scalars["loss/behaviour"]
    ddpg.descend(agent["actor_optimiser"], loss)
    polyak(agent["actor_target"], agent["actor"], tau)
    if "replay" in agent:
        agent["replay"].update(index, kl)
    return scalars | {"loss/critic": critic, "loss/actor": loss}


def new_rainbow_agent(seed: int, items: Tensor, frame_size: int, learning_rate: float, n_transitions: int = 0,
                      **options) -> dict:
    """Return a fresh agent, the same for a seed; without `n_transitions` it draws them evenly."""
    torch.manual_seed(seed)
    network = Rainbow(frame_size, items.shape[1], **options).to(items.device)
    if network.dueling:
        network.centre.copy_(items.mean(dim=0))
    agent = {"actor": network, "actor_target": deepcopy(network).eval().requires_grad_(False),
             "actor_optimiser": torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=1e-4, fused=True)}
    if n_transitions:
        agent["replay"] = Prioritised(n_transitions, seed=seed)
    return agent
