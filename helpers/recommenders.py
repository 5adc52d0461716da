"""Who scores items for users: a policy, what a user's whole log says beside it, and what people would use instead."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from helpers.features import user_item
from helpers.frames import Frames, rows_of

# A recommender: (history, user_ids (U,)) → scores (U, n_items), higher is better, any scale.
Recommender = Callable[[Frames, np.ndarray], Tensor]


def policy(actor: Callable[[Tensor], Tensor], term: Recommender | None = None) -> Recommender:
    """Score every item by log p, up to a number of the user's: its dot product with the proto-action, over √E.

    `term` (history, user_ids) → (U, E) is added to the proto-action: what the log says beyond that frame.
    """
    def recommend(history: Frames, user_ids: np.ndarray) -> Tensor:
        training = actor if isinstance(actor, nn.Module) and actor.training else None
        try:
            if training is not None:
                training.eval()
            with torch.no_grad():
                proto_action = actor(history.last_states(user_ids))
                proto_action = proto_action if term is None else proto_action + term(history, user_ids)
                return proto_action / history.embed_size ** 0.5 @ history.items.T
        finally:
            if training is not None:
                training.train()
    return recommend


def remembered(recommend: Recommender) -> Recommender:
    """Ask for the scores (users × items) of some users once, and keep them: for several weights tried of one term.

    It knows a history by its object, so the histories have to live as long as what it returns.
    """
    known: dict[tuple, Tensor] = {}

    def recall(history: Frames, user_ids: np.ndarray) -> Tensor:
        key = id(history), user_ids.tobytes()
        if key not in known:
            known[key] = recommend(history, user_ids)
        return known[key]
    return recall


def latest_ratings(history: Frames, user_ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return each rating of users, by user and item, but the later one alone of an item that a user rated twice.

    That is (place of its user in `user_ids`, its row in `history.item_idx` and `history.rating`).
    """
    user, row = (torch.as_tensor(places, device=history.device) for places in history.logs(user_ids))
    key = (user * len(history.item_ids) + history.item_idx[row]).cpu().numpy()
    latest = torch.as_tensor(len(key) - 1 - np.unique(key[::-1], return_index=True)[1], device=history.device)
    return user[latest], row[latest]


def random(seed: int = 0) -> Recommender:
    """Score at random, the floor; the scores go on from call to call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda history, user_ids: torch.rand(len(user_ids), len(history.item_ids), generator=generator)


def popularity(train: pd.DataFrame) -> Recommender:
    """Score every item by how often the training part has it.

    >>> history = Frames(pd.DataFrame({"user_id": 1, "item_id": [7, 8], "rating": 3.0, "timestamp": 0}),
    ...                  np.array([7, 8, 9]), np.eye(3), frame_size=1)
    >>> popularity(pd.DataFrame({"item_id": [9, 7, 9]}))(history, np.array([1]))
    tensor([[1., 0., 2.]])
    """
    def recommend(history: Frames, user_ids: np.ndarray) -> Tensor:
        counts = train["item_id"].value_counts().reindex(history.item_ids, fill_value=0)
        return torch.as_tensor(counts.to_numpy(np.float32)).expand(len(user_ids), -1)
    return recommend


_counted: list = []  # the training part that `rated_together` was asked last, and its answer


def rated_together(train: pd.DataFrame, item_ids: np.ndarray, most: int) -> tuple[np.ndarray, Tensor]:
    """Return (rows of the `most` popular items (m,), how many users rated each two of them (m, m)).

    The last answer is kept, for several ridges are tried of one training part: 20 million ratings take minutes.
    """
    if not _counted or _counted[0] is not train or _counted[1] is not item_ids or _counted[2] != most:
        popular = train["item_id"].value_counts().index
        kept = np.sort(rows_of(popular[:most], item_ids))
        rated = user_item(train[train["item_id"].isin(item_ids[kept])], item_ids[kept])
        _counted[:] = [train, item_ids, most, (kept, torch.as_tensor((rated @ rated.T).toarray()))]
    return _counted[3]


def fit_ease(train: pd.DataFrame, item_ids: np.ndarray, ridge: float, most: int = 10_000) -> tuple[Tensor, Tensor]:
    """Fit EASE on the training part: (rows of the item matrix that take part (m,), weights (m, m)).

    Only the `most` popular items take part, for the fit inverts a matrix of that size; a warning says so.

    >>> log = pd.DataFrame({"user_id": [1, 1, 2, 2, 3], "item_id": [7, 8, 7, 8, 9]})
    >>> round(fit_ease(log, np.array([7, 8, 9]), ridge=1.0)[1][0, 1].item(), 2)  # whoever rated 7 rated 8
    0.67

    Source: Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data", eq. 8.
    """
    if (n_rated := train["item_id"].nunique()) > most:
        warnings.warn(f"EASE is of the {most:,} most rated of {n_rated:,} items: the others score 0", stacklevel=2)
    kept, together = rated_together(train, item_ids, most)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(together + ridge * torch.eye(len(kept))))
    weights = -inverse / inverse.diagonal()
    return torch.as_tensor(kept), weights.fill_diagonal_(0)


def ease(fitted: tuple[Tensor, Tensor], last: int, decay: float) -> Recommender:
    """Apply EASE to each user's `last` items, weighted decay^age (Steck's takes all, evenly); the others score 0."""
    kept, weights = fitted

    def recommend(history: Frames, user_ids: np.ndarray) -> Tensor:
        place = history.places(user_ids)
        x = torch.zeros(len(user_ids), len(history.item_ids))
        for row, (start, n) in enumerate(zip(history.log_start[place], history.log_length[place], strict=True)):
            recent = history.item_idx[start + max(n - last, 0):start + n].tolist()
            for age, item in reversed(list(enumerate(reversed(recent)))):  # of a repeated item the latest counts
                x[row, item] = decay ** age
        scores = torch.zeros(len(user_ids), len(history.item_ids))
        scores[:, kept] = x[:, kept] @ weights
        return scores
    return recommend


class UserHistory(NamedTuple):
    """EASE in the item space: log → m (E,), which is added to the proto-action of the log's last frame.

    m = weight · √E · Σⱼ (1 + rating_slope·(ratingⱼ − 3)) · eⱼ·W over the user's log. Divided by √E, as in `log_policy`,
    m·eᵢ is `weight` times what EASE says of item i.

    matrix: W (E, E). weight: how much it counts beside the policy. rating_slope: how much more a film of
    a star more counts; 0 is EASE's own way.
    """

    matrix: Tensor
    weight: float
    rating_slope: float = 0.0

    def __call__(self, history: Frames, user_ids: np.ndarray) -> Tensor:
        """Return m (U, E); of an item that a user has rated twice the later rating counts."""
        user, row = latest_ratings(history, user_ids)
        said = torch.zeros(len(user_ids), history.embed_size, device=history.device)
        said.index_add_(0, user, self.counts(history.rating[row])[:, None] * history.items[history.item_idx[row]])
        return said @ self.added

    def counts(self, rating: Tensor) -> Tensor:
        """Return how much each rating counts: of any shape."""
        return 1 + self.rating_slope * (rating - 3)

    @property
    def added(self) -> Tensor:
        """What maps the sum of the counted vectors (…, E) to m: weight · √E · W (E, E)."""
        return self.weight * len(self.matrix) ** 0.5 * self.matrix


def fit_user_history(train: pd.DataFrame, item_ids: np.ndarray, matrix: np.ndarray, ridge: float, weight: float = 1.0,
                     rating_slope: float = 0.0) -> UserHistory:
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
    return UserHistory(inverse @ weights @ inverse.T, float(weight), float(rating_slope))
