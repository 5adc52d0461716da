"""What the agents share: a policy over the catalogue, the terms of a loss, returns over n steps, moving targets.

Lesson 05 teaches the first half, lesson 06 the second.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from helpers.frames import Frames, Transition


class SampledItems(NamedTuple):
    """Items that a training step sums over in place of a large catalogue, each with how many it stands for."""

    vectors: Tensor    # (m, E)
    log_count: Tensor  # (m,)


def sampled_items(items: Tensor, next_items: Tensor, n: int = 2048) -> tuple[Tensor | SampledItems, Tensor]:
    """Return (what to sum over in place of items (N, E), next_items (B, K) as rows of that): all if N ≤ 2·n.

    Else every wanted item once, and `n` of the others, drawn evenly with replacement, each of which stands for
    (others / n) of them. So Σ exp over them has the mean of Σ exp over the catalogue, and a step costs the
    same whatever N is. Source: sampled softmax, Bengio & Senécal 2008; Jean et al. 2015.

    >>> few, rows = sampled_items(torch.arange(9.0)[:, None], torch.tensor([[7, 3], [3, -1]]), n=2)
    >>> few.vectors[:2, 0], rows, few.log_count.exp()  # items 3 and 7 for themselves, two others for seven
    (tensor([3., 7.]), tensor([[ 1,  0],
            [ 0, -1]]), tensor([1.0000, 1.0000, 3.5000, 3.5000]))
    """
    if len(items) <= 2 * n:
        return items, next_items
    other = torch.ones(len(items), dtype=torch.bool, device=items.device)
    other[next_items[next_items >= 0]] = False
    wanted, others = torch.nonzero(~other)[:, 0], torch.nonzero(other)[:, 0]
    drawn = others[torch.randint(len(others), (n,), device=items.device)]
    log_count = items.new_zeros(len(wanted) + n)
    log_count[len(wanted):] = math.log(len(others) / n)
    rows = torch.where(next_items < 0, -1, torch.searchsorted(wanted, next_items.contiguous()))
    return SampledItems(items[torch.cat([wanted, drawn])], log_count), rows


def log_policy(proto_action: Tensor, items: Tensor | SampledItems) -> Tensor:
    """Return log p(i | s): proto_action (B, E), items (n, E) → (B, n) float32; of sampled items, times their counts.

    >>> log_policy(torch.tensor([[2.197, 0, 0, 0]]), torch.eye(2, 4)).exp()  # over √4: odds of e^1.0986 = 3 to 1
    tensor([[0.7500, 0.2500]])
    """
    items, log_count = items if isinstance(items, SampledItems) else (items, 0.0)
    return ((proto_action @ items.T / items.shape[1] ** 0.5).float() + log_count).log_softmax(dim=1)


def mean_item(proto_action: Tensor, items: Tensor | SampledItems) -> Tensor:
    """Return ā(s), the mean item of the policy: proto_action (B, E), items (n, E) → (B, E).

    >>> mean_item(torch.tensor([[2.197, 0, 0, 0]]), torch.eye(2, 4))
    tensor([[0.7500, 0.2500, 0.0000, 0.0000]])
    """
    return log_policy(proto_action, items).exp() @ (items.vectors if isinstance(items, SampledItems) else items)


def squared_error(q: Tensor, y: Tensor) -> Tensor:
    """Return the mean of (q − y)², q and y of one shape or else an error.

    >>> squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]]))
    tensor(2.5000)
    """
    if q.shape != y.shape:
        raise ValueError(f"a loss of shapes {tuple(q.shape)} and {tuple(y.shape)} would broadcast")
    return (q.float() - y.float()).square().mean()


def behaviour_loss(log_p: Tensor, next_items: Tensor, decay: float, counts: Tensor | float = 1.0) -> Tensor:
    """Return L_behaviour: log_p (B, n), next_items (B, K) rows of the item matrix, −1 after the log's end.

    `counts` (B, K) says how much each item's log p counts, whatever the others count.

    >>> log_p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    >>> behaviour_loss(log_p, torch.tensor([[0, 1], [2, -1]]), decay=0.5)  # −((ln ½ + ½·ln ¼) / 1.5 + ln 0.8) / 2
    tensor(0.5737)
    """
    real = next_items >= 0
    w = real * decay ** torch.arange(next_items.shape[1], device=log_p.device)
    return -((w * counts * log_p.gather(1, next_items.clamp(min=0))).sum(dim=1) / w.sum(dim=1)).mean()


def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move every parameter of `target` to (1 − τ)·target + τ·source.

    >>> target, source = (nn.ParameterList([torch.tensor(value)]) for value in (1.0, 5.0))
    >>> polyak(target, source, tau=0.25)
    >>> target[0].item(), source[0].item()
    (2.0, 5.0)
    """
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def n_step(frames: Frames, index: Tensor, n: int, gamma: float,
           stop_at_done: bool = False) -> tuple[Transition, Tensor]:
    """Return (transitions over n steps, γᵐ (B, 1)): reward R = Σ γᵏ·rₖ over m steps, next_state m steps on.

    m is n, or less where the user's log ends before: a return never crosses into another user's log. With
    `stop_at_done` the discount is 0 there, for whose end is a user's own, and not that of the log alone.
    Source: Sutton 1988; Barth-Maron et al. 2018, eq. 2.
    """
    rewards, within = frames.next_rewards(index, n)
    m = within.sum(dim=1)
    t = frames.gather(index)
    if n > 1:  # the transitions of a log stand side by side, in the order of time
        last = frames.gather(index.to(m.device) + m - 1)
        discounts = gamma ** torch.arange(n, device=m.device, dtype=rewards.dtype)
        t = t._replace(reward=rewards @ discounts[:, None], next_state=last.next_state, done=last.done)
    discount = gamma ** m[:, None].to(rewards.dtype)
    return t, discount * (1 - t.done) if stop_at_done else discount


def mean_of(logits: Tensor, support: Tensor) -> Tensor:
    """Return the expected return of distributions: logits (B, atoms), support (atoms,) → (B, 1) float32.

    >>> mean_of(torch.tensor([[0.2, 0.5, 0.3]]).log(), torch.tensor([0.0, 1.0, 2.0]))
    tensor([[1.1000]])
    """
    return logits.float().softmax(dim=-1) @ support[:, None]


def project(p: Tensor, reward: Tensor, discount: Tensor, support: Tensor) -> Tensor:
    """Return the distribution of R + γᵐ·Z on the support's own atoms, each mass split between its two neighbours.

    Source: Bellemare et al. 2017, algorithm 1. Mass beyond an end of the support goes to that end.

    Args:
        p: (B, atoms), the distribution of Z on `support`.
        reward, discount: (B, 1).
        support: (atoms,), evenly spaced, rising.

    >>> project(torch.tensor([[0.0, 0.8, 0.2]]), torch.tensor([[0.5]]), torch.tensor([[0.5]]),
    ...         torch.tensor([0.0, 1.0, 2.0]))  # ½ + ½·1 hits an atom, ½ + ½·2 lies between two
    tensor([[0.0000, 0.9000, 0.1000]])
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
    """Return −Σ m·log p for each row (B,), logits and m of one shape (B, atoms) or else an error.

    >>> cross_entropy(torch.zeros(1, 3), torch.tensor([[0.2, 0.5, 0.3]]))  # ln 3
    tensor([1.0986])
    """
    if logits.shape != m.shape:
        raise ValueError(f"a loss of shapes {tuple(logits.shape)} and {tuple(m.shape)} would broadcast")
    return -(m * logits.float().log_softmax(dim=1)).sum(dim=1)


class ItemCrossEntropy(torch.autograd.Function):
    """Mean −log softmax(h·itemsᵀ)[target], and its gradients, over blocks of rows: no (N, n_items) array is kept.

    `apply(h (N, E), items (n, E), target (N,))` → () float32. The same numbers as torch's `cross_entropy` in a quarter
    of the time; products are bfloat16 under autocast.

    >>> h, items = torch.eye(2, requires_grad=True), torch.tensor([[1.0986, 0.0], [0.0, 0.0]])  # odds of 3 to 1
    >>> ItemCrossEntropy.apply(h[:1], items, torch.tensor([0]))  # −ln ¾
    tensor(0.2877, grad_fn=<ItemCrossEntropyBackward>)
    """

    @staticmethod
    def forward(ctx, h: Tensor, items: Tensor, target: Tensor) -> Tensor:
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        dh, ditems, loss = torch.empty_like(h, dtype=torch.float32), torch.zeros_like(items), 0.0
        rows, half = max(1, (1 << 23) // len(items)), items.to(dtype)
        for x, y, out in zip(h.to(dtype).split(rows), target[:, None].split(rows), dh.split(rows), strict=True):
            p = (x @ half.T).softmax(dim=1)
            own = p.gather(1, y)
            loss = loss - own.float().clamp(min=1e-9).log().sum()
            p.scatter_add_(1, y, torch.full_like(own, -1))  # p − 1 at the target: the gradient of the scores
            out.copy_(p @ half)
            ditems += p.T @ x
        ctx.save_for_backward(dh / len(h), ditems / len(h))
        return loss / len(h)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dh, ditems = ctx.saved_tensors
        return grad * dh, grad * ditems, None


def next_item_loss(h: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Return the mean −log p of target (N,), rows of items (n, E), for h (N, E); of many items over `sampled_items`."""
    summed, rows = sampled_items(items, target[:, None])
    if isinstance(summed, SampledItems):  # a count is one more number of an item, which everyone multiplies by 1
        h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
        summed = torch.cat([summed.vectors, summed.log_count[:, None]], dim=1)
    return ItemCrossEntropy.apply(h, summed, rows[:, 0])
