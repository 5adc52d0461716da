import numpy as np
import pandas as pd
import pytest

from helpers import datasets
from helpers.agents import estimates as lesson
from helpers.extra import estimates, foresight
from helpers.extra.estimates import Public, check_support, play_log, read_open_bandit, softmax_of, true_values
from helpers.files import DataError
from tests.test_foresight import world_of

HEADER = ",timestamp,item_id,position,click,propensity_score,user_feature_0\n"
ROWS = "0,2019-11-24 00:00:02+00:00,7,1,0,0.25,a\n1,2019-11-24 00:00:01+00:00,9,3,1,0.5,b\n"


@pytest.fixture(scope="module")
def small():
    """Return (world, habits, public) of 30 people and 20 films, of which the first two were seen."""
    rng = np.random.default_rng(0)
    world = world_of(rng.normal(size=(30, 20)), rng.normal(scale=0.8, size=(30, 20)), noise=0.5)
    film = rng.normal(size=(30, 20, 3)).astype(np.float32)
    film[:, :, 0] = 1
    seen = np.zeros((30, 20), bool)
    seen[:, :2] = True
    return world, foresight.Habits(impatience=1.0), Public(film, seen, np.full(30, 3.0))


@pytest.fixture(scope="module")
def policies(small):
    film, seen = small[2].film, small[2].seen
    return [softmax_of(film[:, :, 1], 1.0, seen, share=0.2), softmax_of(film[:, :, 2], 0.7, seen)]


@pytest.fixture(scope="module")
def log(small, policies):
    return play_log(*small, policies[0], policies, 2_000, seed=1, length=9)


def test_estimates_of_single_rows_and_of_sessions_by_hand():
    w, reward = [2, 1 / 2, 1], [1, 0, 1]  # and a model that says q = ½ of each, v = ¾
    array, got, ones = np.array(w, float)[None, :, None], np.array(reward, float)[:, None], np.ones((1, 3))
    assert lesson.whole_session(array, got, ones).item() == pytest.approx(1)
    assert lesson.whole_session(array, got, ones, normalised=True).item() == pytest.approx(6 / 7)
    assert 3 / 4 + lesson.step_by_step(array, got - 1 / 2, ones).item() == pytest.approx(7 / 6)
    w, reward = np.array([[[2.0, 0.5], [0.5, 3.0]]]), np.array([[1.0, 1.0], [0.0, 2.0]])
    assert lesson.step_by_step(w, reward, np.ones((1, 2))).item() == pytest.approx((2 + 1 + 0 + 3) / 2)
    assert lesson.step_by_step(w, reward, np.ones((1, 2)), normalised=True).item() == pytest.approx(2 / 2.5 + 4 / 2.5)
    # one session counted twice, the other not at all
    assert lesson.step_by_step(w, reward, np.array([[2.0, 0.0]])).item() == pytest.approx(3)


def test_the_written_out_sum_is_jiang_and_lis_recursion(log):
    theta = [np.random.default_rng(p).normal(size=9) for p in range(2)]
    got = lesson.doubly_robust(log, [one[None] for one in theta], np.ones((1, 2_000)))
    for p in range(2):
        q = lesson.crossed(log.state, log.film) @ theta[p]
        v = lesson.crossed(log.state, log.mean_film[p]) @ theta[p]
        total = np.zeros(2_000)
        for t in reversed(range(q.shape[1])):
            total = v[:, t] + log.pi[p, :, t] / log.b[:, t] * (log.taken[:, t] + total - q[:, t])
        assert got[p].item() == pytest.approx(total.mean(), abs=1e-6)


def test_propensities_are_those_of_the_films_that_were_shown(small, log, policies):
    again, other = (play_log(*small, policies[0], policies, 2_000, seed=seed, length=9) for seed in (1, 2))
    assert np.array_equal(again.item, log.item) and not np.array_equal(other.item, log.item)
    for n in range(50):  # by brute force: a softmax over what was not shown yet
        left = [policy[log.user[n]].copy() for policy in policies]
        for t in range(int(log.here[n].sum())):
            item = log.item[n, t]
            assert log.b[n, t] == pytest.approx(left[0][item] / left[0].sum())
            assert log.pi[:, n, t] == pytest.approx([one[item] / one.sum() for one in left])
            for one in left:
                one[item] = 0
        assert len(set(log.item[n])) == len(log.item[n]) and not set(log.item[n]) & {0, 1}
    few = log.first(10, steps=1)
    assert few.pi.shape == (2, 10, 1) and few.mean_film.shape == (2, 10, 1, 3) and few.user.shape == (10,)
    assert log.first(10).b.shape == (10, 9)


def test_weights_have_the_mean_one_and_mean_films_are_those_of_the_policy(small, log, policies):
    w = lesson.weights_of(log.pi, log.b)
    assert np.allclose(w[0], 1)
    first = w[1, :, 0]
    assert abs(first.mean() - 1) < 4 * first.std() / len(first) ** 0.5
    n = int(np.flatnonzero(log.here.sum(axis=1) > 1)[0])
    p = policies[1][log.user[n]].copy()
    assert log.mean_film[1, n, 0] == pytest.approx(p @ small[2].film[log.user[n]] / p.sum(), abs=1e-5)
    p[log.item[n, 0]] = 0
    assert log.mean_film[1, n, 1] == pytest.approx(p @ small[2].film[log.user[n]] / p.sum(), abs=1e-5)


def test_estimates_agree_with_the_truth_where_overlap_is_good(small, log, policies):
    first, whole, _ = true_values(*small[:2], policies[1], repeats=100, length=9)
    own_first, own_whole, own_error = true_values(*small[:2], policies[0], repeats=100, length=9)
    per_session = log.taken.sum(axis=1)
    assert abs(per_session.mean() - own_whole) < 4 * (per_session.std() / 2_000 ** 0.5 + own_error)
    assert abs(log.taken[:, 0].mean() - own_first) < 4 * 0.5 / 2_000 ** 0.5
    plays = estimates.draw_model_sessions(small[0], small[2], policies, repeats=2, length=9)
    rows = lesson.rows_of_log(log, plays, {"first film": np.array([own_first, first]),
                                           "whole session": np.array([own_whole, whole])}, draws=20)
    by = rows[rows["policy"] == 1].set_index(["question", "estimator"])
    assert abs(by.loc[("first film", "IPS"), "estimate"] - first) < 0.1
    assert abs(by.loc[("first film", "DR"), "estimate"] - first) < 0.1
    assert abs(by.loc[("whole session", "model"), "estimate"] - whole) < 0.5
    assert rows["estimate"].notna().all() and (rows["low"] < rows["estimate"]).mean() > 0.9
    own = rows[(rows["policy"] == 0) & (rows["question"] == "whole session")].set_index("estimator")["estimate"]
    for name in ("log's mean", "first film, scaled", "IPS", "SN", "per-decision", "per-decision, SN"):
        assert own[name] == pytest.approx(per_session.mean())


def test_two_logs_are_summed_up_by_hand():
    rows = pd.DataFrame({"question": "first film", "estimator": "IPS", "sessions": 10, "log": [0, 0, 1, 1],
                         "policy": [0, 1, 0, 1], "truth": [0.5, 0.2, 0.5, 0.2], "estimate": [0.6, 0.3, 0.2, 0.5],
                         "low": 0.25, "high": 0.45, "effective": 5.0})
    said = lesson.summary(rows).iloc[0]
    assert said[["τ", "regret", "covered"]].tolist() == [0.0, pytest.approx(0.15), 0.0]  # right, then wrong by 0.3
    assert said["bias"] == pytest.approx((0.1 + 0.2) / 2) and said["RMSE"] == pytest.approx((0.2 / 4) ** 0.5)


def test_bad_propensities_and_shapes_and_a_target_without_support_are_refused(small, log, policies):
    for bad in (0.0, np.nan, 1.5, -0.1):
        b = log.b.copy()
        b[3, 0] = bad
        with pytest.raises(DataError, match="1 of 18000"):
            lesson.weights_of(log.pi, b)
    with pytest.raises(DataError, match="same steps"):
        lesson.weights_of(log.pi, log.b[:-1])
    narrow = policies[0].copy()  # without support of the target
    narrow[:, 5] = 0
    with pytest.raises(DataError, match="30 films"):
        check_support(policies[1], narrow)
    with pytest.raises(DataError, match="never shows"):
        play_log(*small, narrow, [policies[1]], 10, seed=0)
    with pytest.raises(DataError, match="same people"):
        check_support(policies[1][:, :-1], narrow)


def test_ordered_draws_are_draws_without_replacement():
    weight = np.array([[0.6, 0.3, 0.1, 0.0]])
    order = estimates.orders(weight, np.zeros(20_000, int), 2, np.random.default_rng(0))
    shares = [(order[:, 0] == 1).mean(), ((order[:, 0] == 0) & (order[:, 1] == 1)).mean()]
    assert shares == pytest.approx([0.3, 0.6 * 0.3 / 0.4], abs=0.015)
    assert not (order == 3).any()


def test_a_log_is_read_in_the_order_of_time_and_one_that_is_not_published_is_said(raw):
    log = read_open_bandit(raw({"item_context.csv": ",item_id\n0,7\n", "men.csv": HEADER + ROWS}))
    assert log.to_dict("list") == {"item_id": [9, 7], "position": [3, 1], "click": [1, 0], "propensity": [0.5, 0.25]}
    with pytest.raises(DataError, match="random or bts"):
        datasets.fetch_open_bandit("bts", "children")


@pytest.mark.parametrize(("text", "reason"), [
    (HEADER + ROWS.replace("0.25", "0.0"), "1 such"), (HEADER + ROWS.replace("0.25", ""), "1 such"),
    (HEADER + ROWS.replace(",3,1,", ",3,2,"), "neither 0 nor 1"),
    ((HEADER + ROWS).replace("propensity_score", "score"), "propensity_score")])
def test_a_bad_log_or_none_is_refused(tmp_path, text, reason):
    with pytest.raises(DataError, match="holds no log"):
        read_open_bandit(tmp_path)
    (tmp_path / "men.csv").write_text(text)
    with pytest.raises(DataError, match=reason):
        read_open_bandit(tmp_path)


def test_shares_sum_to_one_and_what_was_never_shown_has_none(tmp_path):
    (tmp_path / "men.csv").write_text(HEADER + ROWS + "2,2019-11-24 00:00:03+00:00,9,1,0,0.5,a\n")
    log = read_open_bandit(tmp_path)
    shares = lesson.shares_of(log)
    assert shares.to_dict() == {(1, 7): 0.5, (1, 9): 0.5, (3, 9): 1.0}
    assert lesson.looked_up(shares, log.assign(position=3)).tolist() == [1.0, 0.0, 1.0]


def test_replay_keeps_only_where_the_choice_is_what_was_shown():
    rng = np.random.default_rng(0)
    items = rng.integers(4, size=4_000)
    clicked = rng.random(4_000) < np.where(items == 2, 0.5, 0.1)
    log = pd.DataFrame({"item_id": items, "click": clicked.astype(int)})
    kept, clicks = lesson.replay_thompson(log, seed=0)
    assert 900 < kept < 1_100 and clicks / kept > 0.4  # it has learnt which item is clicked
