"""Prioritised replay: which transitions to learn from, drawn by what they had to teach last time."""

import numpy as np
import torch
from torch import Tensor


class Prioritised:
    """Draw transitions with probability ∝ priority^α, from a sum tree.

    Source: Schaul et al. 2016, "Prioritized Experience Replay", proportional variant. Every transition starts with
    priority 1; `update` sets |error| + ε. Memory: 16 bytes a transition, twice that at worst.

    α = 0 draws them evenly, 1 in proportion to their priorities; the weights undo β of the bias, 1 being all of it.

    >>> replay = Prioritised(2, alpha=1.0, beta=1.0, epsilon=0.0)
    >>> replay.update(torch.tensor([0, 1]), torch.tensor([1.0, -3.0]))
    >>> replay.probability(), replay.sample(4)  # what is drawn three times as often counts a third
    (tensor([0.2500, 0.7500], dtype=torch.float64), (tensor([0, 1, 1, 1]), tensor([[1.0000],
            [0.3333],
            [0.3333],
            [0.3333]])))
    """

    def __init__(self, n: int, alpha: float = 0.6, beta: float = 0.4, epsilon: float = 1e-2, seed: int = 0):
        self.n, self.alpha, self.beta, self.epsilon = n, alpha, beta, epsilon
        self.levels = max(int(n - 1).bit_length(), 1)
        self.leaf = 1 << self.levels            # node of transition 0; node k has the children 2k and 2k + 1
        self.tree = np.zeros(2 * self.leaf)
        self._plant(np.ones(n))
        self.generator = torch.Generator().manual_seed(seed)

    def _plant(self, priority: np.ndarray) -> None:
        self.tree[self.leaf:self.leaf + self.n] = priority
        for level in reversed(range(self.levels)):
            low, high = 1 << level, 2 << level
            self.tree[low:high] = self.tree[2 * low:2 * high:2] + self.tree[2 * low + 1:2 * high:2]

    def sample(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return (index (B,), weights (B, 1) float32 in (0, 1]) of transitions, one from each B-th of the mass."""
        share = (torch.arange(batch_size) + torch.rand(batch_size, generator=self.generator, dtype=torch.float64))
        mass = share.numpy() / batch_size * self.tree[1]
        node = np.ones(batch_size, np.int64)
        for _ in range(self.levels):  # down the tree, all of the batch at once
            node *= 2
            right = mass >= self.tree[node]
            mass -= right * self.tree[node]
            node += right
        index = np.minimum(node - self.leaf, self.n - 1)
        weight = (self.n * self.tree[self.leaf + index] / self.tree[1]) ** -self.beta
        return torch.from_numpy(index), torch.from_numpy((weight / weight.max()).astype(np.float32))[:, None]

    def update(self, index: Tensor, error: Tensor) -> None:
        """Set the priorities of transitions index (B,) from errors (B,) or (B, 1); ValueError if one is not finite."""
        size = error.detach().abs().float().flatten().cpu().numpy()
        if not np.isfinite(size).all():
            raise ValueError(f"{(~np.isfinite(size)).sum():,} of {len(size):,} errors are not finite numbers: "
                             f"lower the learning rate, or look for NaN in the item matrix")
        node = self.leaf + index.cpu().numpy()
        self.tree[node] = (size + self.epsilon) ** self.alpha
        for _ in range(self.levels):
            node = np.unique(node // 2)
            self.tree[node] = self.tree[2 * node] + self.tree[2 * node + 1]

    def follow(self, before: Tensor, now: Tensor) -> None:
        """Let priorities follow their ratings: before, now (n,) say which rating each transition leads to.

        Where none led to a rating before, it gets the largest priority, as what was never drawn does in the paper.

        >>> replay = Prioritised(3, alpha=1.0, epsilon=0.0)
        >>> replay.update(torch.arange(3), torch.tensor([1.0, 2.0, 5.0]))
        >>> replay.follow(torch.tensor([4, 5, 6]), torch.tensor([5, 3, 4]))
        >>> replay.tree[replay.leaf:replay.leaf + 3]
        array([2., 5., 1.])
        """
        priority = self.tree[self.leaf:self.leaf + self.n]
        of_rating = np.full(1 + int(max(before.max(), now.max())), priority.max())
        of_rating[before.numpy()] = priority
        self._plant(of_rating[now.numpy()])

    def probability(self) -> Tensor:
        """Return (n,), how likely each transition is to be drawn."""
        return torch.from_numpy(self.tree[self.leaf:self.leaf + self.n] / self.tree[1])

    def state_dict(self) -> dict[str, Tensor]:
        return {"priority": torch.from_numpy(self.tree[self.leaf:self.leaf + self.n].copy()),
                "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if len(state["priority"]) != self.n:
            raise ValueError(f"priorities of {len(state['priority']):,} transitions for {self.n:,}")
        self._plant(state["priority"].numpy())
        self.generator.set_state(state["generator"].cpu())
