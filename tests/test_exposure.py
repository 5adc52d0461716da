import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import exposure
from helpers.files import DataError


def test_what_a_user_chose_does_not_judge_nor_who_chose_nothing(tmp_path):
    (tmp_path / "user.txt").write_text("1,7,5\n1,8,2\n2,7,3\n")
    (tmp_path / "random.txt").write_text("1,7,4\n1,9,1\n3,8,5\n")
    chosen, handed = exposure.read_exposure(tmp_path)
    assert len(chosen) == 3 and handed[["user_id", "item_id", "rating"]].to_numpy().tolist() == [[1, 9, 1]]


@pytest.mark.parametrize("content", [None, "", "1,7\n", "1,7,five\n", "1.5,7,3\n"])
def test_a_file_that_is_none_gets_a_sentence(tmp_path, content):
    (tmp_path / "user.txt").write_text("1,7,5\n")
    if content is not None:
        (tmp_path / "random.txt").write_text(content)
    with pytest.raises(DataError, match=r"random\.txt"):
        exposure.read_exposure(tmp_path)


def test_propensities_by_hand():
    chosen = pd.DataFrame({"rating": [5.0] * 7 + [1.0]})       # with one of each added: 8 of 10 are fives
    known = pd.DataFrame({"rating": [5.0] * 3 + [1.0] * 3})    # and half of all
    chance = exposure.propensities(chosen, known, cells=80)    # a tenth of all cells is rated
    assert chance.to_dict() == pytest.approx({5.0: 0.8 * 0.1 / 0.5, 1.0: 0.2 * 0.1 / 0.5})


def planted(n=40, seed=0):
    rng = np.random.default_rng(seed)
    stars = 3 + np.outer(rng.choice([-1, 1], n), rng.choice([-1, 1], n)).astype(np.float32)
    user, item = (index.ravel() for index in np.indices((n, n)))
    return stars, pd.DataFrame({"user": user, "item": item, "rating": stars.ravel()})


def test_a_factorisation_finds_a_planted_factor_in_half_of_the_cells():
    stars, log = planted()
    some = log.sample(frac=0.5, random_state=0)
    said = exposure.fit_factors(some, np.ones(len(some)), stars.shape, 1, 0.3)
    assert (said - torch.as_tensor(stars)).abs().mean() < 0.2


def test_weights_by_propensity_take_selection_out_of_the_mean():
    _, log = planted()
    rated = np.random.default_rng(1).random(len(log)) < np.where(log["rating"] == 4, 0.8, 0.2)
    chosen, stars = log[rated], log["rating"].mean()
    chance = exposure.propensities(chosen, log.sample(400, random_state=0), len(log))
    plain, weighted = (exposure.fit_factors(chosen, weight, (40, 40), 1, 100.0).mean() for weight in (
        np.ones(len(chosen)), 1 / chance[chosen["rating"]].to_numpy()))
    assert abs(weighted - stars) < 0.1 < 0.3 < abs(plain - stars)
