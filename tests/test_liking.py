import json

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import tilt
from helpers import liking
from helpers.files import PROJECT
from helpers.frames import Frames
from helpers.liking import Liking
from tests.tables import log_of
from tests.test_evaluation import constant
from tools.readme import block, page_of


def frames_of(rows: list[tuple], matrix: np.ndarray) -> Frames:
    return Frames(log_of(rows), np.arange(len(matrix)), matrix, 1)


def test_a_taste_by_hand_is_of_the_later_ratings():
    matrix = np.array([[1.0, 0], [0, 1], [1, 1]], np.float32)
    stars = Liking(torch.tensor([3.0, 4, 3]), torch.tensor([[2.0, 0], [0, 0]]), noise=1.0, damping=2.0)
    history = frames_of([(1, 0, 1.0), (1, 1, 4.0), (1, 0, 5.0), (2, 2, 3.0), (2, 1, 4.0)], matrix)
    bias, taste = stars.tastes(history, np.array([2, 1]))
    # user 1: 2 and 0 stars off, bias 2 / (2 + 2); of the first direction alone, prior variance 4: 4 / (4 + 1) · 1.5
    assert bias.tolist() == [0, 0.5]
    torch.testing.assert_close(taste, torch.tensor([[0, 0], [1.2, 0]]))
    torch.testing.assert_close(stars(history, np.array([1])), torch.tensor([[4.7, 4.5, 4.7]]))


def test_the_fit_finds_what_people_disagree_about():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(60, 3)).astype(np.float32)
    one, other = rng.normal(size=(2, 400, 1))
    taste = one * [1.0, 0, 0] + other * [0, 0.3, 0.3]  # two directions of three
    rows = [(user, int(item), 3 + matrix[item] @ taste[user] + 0.5 * rng.normal())
            for user in range(400) for item in rng.permutation(60)[:30]]
    fitted = liking.fit_liking(log_of(rows), np.arange(60), matrix, sweeps=40)
    found = (fitted.root @ fitted.root.T).numpy()
    np.testing.assert_allclose(found, [[1, 0, 0], [0, 0.09, 0.09], [0, 0.09, 0.09]], atol=0.12)
    assert 0.2 < fitted.noise < 0.35  # 0.5 squared, and what the damped means leave
    sample = liking.fit_liking(log_of(rows), np.arange(60), matrix, sweeps=40, most_users=200)
    assert not torch.equal(sample.root, fitted.root) and torch.equal(sample.offset, fitted.offset)


def test_an_item_nobody_rated_has_the_mean_and_one_rated_once_is_damped():
    train = log_of([(1, 0, 5.0), (1, 1, 1.0), (2, 1, 3.0)])
    fitted = liking.fit_liking(train, np.arange(3), np.eye(3), sweeps=1)
    np.testing.assert_allclose(fitted.offset, [3 + 2 / 6, 3 - 2 / 7, 3])


def test_of_clicks_which_are_all_alike_nothing_is_liked_more():
    clicks = log_of([(user, item, 5.0) for user in range(4) for item in range(user, user + 3)])
    fitted, matrix = liking.fit_liking(clicks, np.arange(8), np.eye(8)), np.eye(8, dtype=np.float32)
    history = Frames(clicks, np.arange(8), matrix, 1)
    torch.testing.assert_close(fitted(history, np.arange(4)), torch.full((4, 8), 5.0))
    assert liking.accuracy(fitted, history, clicks).empty
    assert liking.kept_when_exchanged(fitted, history, np.arange(4), k=2).tolist() == [1] * 4


def test_accuracy_counts_pairs_of_different_stars_within_a_user_and_ties_half():
    history = frames_of([(1, 0, 3.0), (1, 1, 3.0), (2, 0, 3.0), (3, 0, 3.0)], np.eye(6, dtype=np.float32))
    held_out = log_of([(1, 2, 5.0), (1, 3, 4.0), (1, 4, 1.0), (2, 2, 5.0), (2, 5, 1.0), (3, 2, 4.0), (3, 3, 4.0)])
    # user 1: 2 over 3 right, 2 over 4 wrong, 3 over 4 wrong; user 2: a tie; user 3: no such pair
    right = liking.accuracy(constant(0, 0, 2.0, 1, 3, 2), history, held_out)
    assert right.to_dict() == {1: pytest.approx(1 / 3), 2: 0.5}


def test_a_slate_that_hears_no_star_is_kept_and_one_of_likes_is_not():
    matrix = np.r_[np.eye(2), np.eye(2)].astype(np.float32)  # items 2 and 3 are like 0 and 1
    history = frames_of([(1, 0, 5.0), (1, 1, 1.0), (2, 1, 5.0), (2, 0, 1.0)], matrix)
    stars, users = Liking(torch.full((4,), 3.0), torch.eye(2), 1.0), np.array([1, 2])
    assert liking.kept_when_exchanged(constant(1.0, 2, 3, 4), history, users, k=1).tolist() == [1, 1]
    assert liking.kept_when_exchanged(stars, history, users, k=1).tolist() == [0, 0]
    assert history.rating.tolist() == [5, 1, 5, 1]  # as before
    nothing = liking.tilted(constant(0.0, 0, 1, 0), stars, 0.1)  # item 2 would take more than 0.1 a star
    assert liking.kept_when_exchanged(nothing, history, users, k=1).tolist() == [1, 1]
    assert liking.kept_when_exchanged(liking.tilted(constant(0.0, 0, 1, 0), stars, 2.0), history, users,
                                      k=1).tolist() == [0, 0]


def test_what_a_tilt_could_earn_is_a_ratio_over_users_of_cases_paid_as_expected():
    history = frames_of([(1, 0, 5.0), (1, 1, 1.0), (2, 1, 1.0)], np.eye(3))
    cases = pd.DataFrame({"user_id": [2, 1, 2], "item_id": [0, 2, 2], "rating": 5.0})
    paid = liking.scores_of(lambda _, user_ids: torch.as_tensor(user_ids)[:, None] + torch.tensor([[0.0, 0.1, 0.2]]),
                            history, cases)
    np.testing.assert_allclose(paid, [2.0, 1.2, 2.2], rtol=1e-6)
    assert tilt.ratio(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == (2, 2, 2)
    stored = json.loads((PROJECT / "res" / "tilt.json").read_text(encoding="utf-8"))
    assert block("tilt", tilt.table(stored["rows"])) in page_of("tilt").read_text(encoding="utf-8")
