"""What the lesson cells of notes/10_evaluation.ipynb define; `make agents` writes it."""

import numpy as np


def over_users(terms: np.ndarray, user: np.ndarray, n: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of terms (N,), resampling users: user (N,) says whose each is."""
    user = np.unique(user, return_inverse=True)[1]
    sums, counts, rng = np.bincount(user, terms), np.bincount(user), np.random.default_rng(0)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(n))
    low, high = np.quantile([sums[drawn].sum() / counts[drawn].sum() for drawn in draws], [0.025, 0.975])
    return float(low), float(high)
