"""What the agents share: a policy over the catalogue, the terms of a loss, returns over n steps, moving targets.

Lesson 05 teaches the first half, lesson 06 the second.
"""

import torch
from torch import Tensor, nn

from helpers.frames import Frames, Transition


def log_policy(proto_action: Tensor, items: Tensor) -> Tensor:
    """Return log p(i | s): proto_action (B, E), items (n, E) → (B, n) float32."""
    return (proto_action @ items.T / items.shape[1] ** 0.5).float().log_softmax(dim=1)


def mean_item(proto_action: Tensor, items: Tensor) -> Tensor:
    """Return ā(s), the mean item of the policy: proto_action (B, E), items (n, E) → (B, E)."""
    return log_policy(proto_action, items).exp() @ items


def squared_error(q: Tensor, y: Tensor) -> Tensor:
    """Return the mean of (q − y)², q and y of one shape or else an error."""
    if q.shape != y.shape:
        raise ValueError(f"a loss of shapes {tuple(q.shape)} and {tuple(y.shape)} would broadcast")
    return (q.float() - y.float()).square().mean()


def behaviour_loss(log_p: Tensor, next_items: Tensor, decay: float) -> Tensor:
    """Return L_behaviour: log_p (B, n), next_items (B, K) rows of the item matrix, −1 after the log's end."""
    real = next_items >= 0
    w = real * decay ** torch.arange(next_items.shape[1], device=log_p.device)
    return -((w * log_p.gather(1, next_items.clamp(min=0))).sum(dim=1) / w.sum(dim=1)).mean()


def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every parameter of `target` to (1 − τ)·target + τ·source."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def n_step(frames: Frames, index: Tensor, n: int, gamma: float) -> tuple[Transition, Tensor]:
    """Return (transitions over n steps, γᵐ (B, 1)): reward R = Σ γᵏ·rₖ over m steps, next_state m steps on.

    m is n, or less where the user's log ends before: a return never crosses into another user's log.
    Source: Sutton 1988; Barth-Maron et al. 2018, eq. 2.
    """
    rewards, within = frames.next_rewards(index, n)
    m = within.sum(dim=1)
    t = frames.gather(index)
    if n > 1:  # the transitions of a log stand side by side, in the order of time
        last = frames.gather(index.to(m.device) + m - 1)
        discounts = gamma ** torch.arange(n, device=m.device, dtype=rewards.dtype)
        t = t._replace(reward=rewards @ discounts[:, None], next_state=last.next_state, done=last.done)
    return t, gamma ** m[:, None].to(rewards.dtype)


def mean_of(logits: Tensor, support: Tensor) -> Tensor:
    """Return the expected return of distributions: logits (B, atoms), support (atoms,) → (B, 1) float32."""
    return logits.float().softmax(dim=-1) @ support[:, None]


def project(p: Tensor, reward: Tensor, discount: Tensor, support: Tensor) -> Tensor:
    """Return the distribution of R + γᵐ·Z on the support's own atoms, each mass split between its two neighbours.

    Source: Bellemare et al. 2017, algorithm 1. Mass beyond an end of the support goes to that end.

    Args:
        p: (B, atoms), the distribution of Z on `support`.
        reward, discount: (B, 1).
        support: (atoms,), evenly spaced, rising.
    """
    v_min, v_max, delta = support[0], support[-1], support[1] - support[0]
    b = ((reward + discount * support).clamp(v_min, v_max) - v_min) / delta      # (B, atoms), in units of an atom
    lower = b.floor().clamp(0, len(support) - 1)
    upper = (lower + 1).clamp(max=len(support) - 1)
    to_upper = b - lower
    m = torch.zeros_like(p)
    m.scatter_add_(1, lower.long(), p * (1 - to_upper))
    return m.scatter_add_(1, upper.long(), p * to_upper)


def cross_entropy(logits: Tensor, m: Tensor) -> Tensor:
    """Return −Σ m·log p for each row (B,), logits and m of one shape (B, atoms) or else an error."""
    if logits.shape != m.shape:
        raise ValueError(f"a loss of shapes {tuple(logits.shape)} and {tuple(m.shape)} would broadcast")
    return -(m * logits.float().log_softmax(dim=1)).sum(dim=1)
