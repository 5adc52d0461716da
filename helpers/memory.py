"""What a user's whole log says, as a vector of the item space: a memory longer than the frame."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.evaluation import fit_ease
from helpers.frames import Frames


class Memory(NamedTuple):
    """EASE in the item space: log → m (E,), which is added to the proto-action of the log's last frame.

    m = weight · √E · Σⱼ (1 + liking·(ratingⱼ − 3)) · eⱼ·W over the user's log. Divided by √E, as in `log_policy`,
    m·eᵢ is `weight` times what EASE says of item i.

    matrix: W (E, E). weight: how loud it is. liking: how much more a film of a star more counts; 0 is EASE's own way.
    """

    matrix: Tensor
    weight: float
    liking: float = 0.0

    def __call__(self, history: Frames, user_ids: np.ndarray) -> Tensor:
        """Return m (U, E); of an item that a user has rated twice the later rating counts."""
        user, row = (torch.as_tensor(places, device=history.device) for places in history.logs(user_ids))
        key = (user * len(history.item_ids) + history.item_idx[row]).cpu().numpy()
        latest = torch.as_tensor(len(key) - 1 - np.unique(key[::-1], return_index=True)[1], device=history.device)
        user, row = user[latest], row[latest]
        said = torch.zeros(len(user_ids), history.embed_size, device=history.device)
        said.index_add_(0, user, self.counts(history.rating[row])[:, None] * history.items[history.item_idx[row]])
        return said @ self.added

    def counts(self, rating: Tensor) -> Tensor:
        """Return how much each rating counts: of any shape."""
        return 1 + self.liking * (rating - 3)

    @property
    def added(self) -> Tensor:
        """What maps the sum of the counted vectors (…, E) to m: weight · √E · W (E, E)."""
        return self.weight * len(self.matrix) ** 0.5 * self.matrix


def fit_memory(train: pd.DataFrame, item_ids: np.ndarray, matrix: np.ndarray, ridge: float, weight: float = 1.0,
               liking: float = 0.0) -> Memory:
    """Fit EASE on the training part and keep of it what the item matrix can say.

    W is the E×E matrix whose eⱼ·W·eᵢ come nearest, in the sum of squares, to EASE's weights of item j for item i.
    Items that EASE leaves out (it takes the 10,000 most rated) have no part in the fit, but get a score.

    Args:
        matrix: (n_items, E), rows as item_ids.
        ridge: EASE's.

    Source: Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data"; the projection is ours.
    """
    kept, weights = fit_ease(train, item_ids, ridge)
    inverse = torch.linalg.pinv(torch.as_tensor(matrix, dtype=torch.float32)[kept])  # (E, m)
    return Memory(inverse @ weights @ inverse.T, float(weight), float(liking))
