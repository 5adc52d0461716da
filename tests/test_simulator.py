import warnings
from functools import partial

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from sklearn.linear_model import Ridge
from sklearn.preprocessing import normalize

from helpers import recommenders
from helpers.extra import simulator
from helpers.extra.simulator import Habits, World, fit_world, play, respond, sessions
from helpers.files import DataError
from helpers.frames import Frames, reward_of

PATIENT = Habits(satiation=0, leave=0, impatience=0)
HALF_STARS = np.arange(1, 11) / 2
F = 2  # frame_size
oracle = partial(simulator.expected_stars, oracle=True)  # knows what users expect


def world_of(expected, similarity=None, user_mean=3.0, noise=0.0, stars=HALF_STARS):
    """Return a world whose expected ratings (U, n_items) are given; users 10, 11, … have rated items 100, 101, 102."""
    n_users, n_items = np.shape(expected)
    users = np.arange(n_users)
    log = pd.DataFrame({"user_idx": users.repeat(3), "item_idx": np.tile(np.arange(3), n_users),
                        "rating": np.float32(3), "timestamp": np.tile([0, 100, 200], n_users)})
    similarity = normalize(np.eye(n_items) if similarity is None else similarity)
    return World(np.arange(n_items) + 100, similarity, users + 10, log, 3 * users, np.full(n_users, 3),
                 np.full(n_users, user_mean), np.c_[0 * users, 0 * users + 1, expected],
                 np.eye(n_items, n_items + 2, 2) + np.eye(1, n_items + 2), np.float32(stars), noise, {}, n_items, 0.0)


def matrix_of(world):
    return np.random.default_rng(1).normal(size=(len(world.item_ids), 4)).astype(np.float32)


@pytest.fixture
def six_films():
    """Return a noisy world of 8 users and 6 films."""
    rng = np.random.default_rng(0)
    return world_of(rng.uniform(1, 5, size=(8, 6)), rng.normal(size=(6, 3)), noise=0.8)


def planted():
    """Return (ratings of 80 users and 50 items, true expectations (80, 50)) of a world of two tastes."""
    rng = np.random.default_rng(0)
    true = 3 + rng.normal(scale=0.3, size=(80, 1)) + rng.normal(scale=0.3, size=50) \
        + rng.normal(size=(80, 2)) @ rng.normal(scale=0.6, size=(2, 50))
    users, items = np.nonzero(rng.random(true.shape) < 0.5)
    stars = np.round(2 * (true[users, items] + rng.normal(scale=0.3, size=len(users)))).clip(1, 10) / 2
    return pd.DataFrame({"user_id": users, "item_id": items, "rating": stars.astype(np.float32),
                         "timestamp": np.arange(len(users))}), true


def test_a_planted_world_is_recovered_better_than_by_biases_alone():
    ratings, true = planted()
    new = np.ones(true.shape, bool)
    new[ratings["user_id"], ratings["item_id"]] = False
    biases, world = (fit_world(ratings, np.arange(50), np.eye(50), factors, (0.5, 2.0)) for factors in ((), (1, 2, 4)))
    error = [(fitted.expected(np.arange(80)[:, None], np.arange(50)) - true.clip(0.5, 5))[new].std()
             for fitted in (biases, world)]
    assert error[1] < 0.5 * error[0]
    assert world.rmse["factors"] < 0.7 * world.rmse["biases"] < 0.7 * world.rmse["mean"]
    assert world.n_factors in (2, 4) and 0.25 < world.noise < 0.5 and world.noise <= world.rmse["factors"]
    assert biases.n_factors == 0 and biases.rmse["factors"] == biases.rmse["biases"]


def test_errors_are_those_of_one_ridge_regression_on_nine_tenths():
    users, items = np.repeat(np.arange(8), 8), np.tile(np.arange(8), 8)
    rating = (3 + np.linspace(-4, 3, 8)[users] + np.linspace(-3, 3, 8)[items]).round().clip(1, 5)
    ratings = pd.DataFrame({"user_id": users + 7, "item_id": items, "rating": np.float32(rating), "timestamp": 0})
    world = fit_world(ratings, np.arange(8), np.eye(8), factors=())
    order = np.random.default_rng(0).permutation(64)
    held_out, rest = order[:6], order[6:]
    x = np.c_[np.eye(8)[users], np.eye(8)[items]]  # whose rating, of what

    def guess(rows):
        ridge = Ridge(simulator.BIAS_RIDGE, fit_intercept=False).fit(x[rows], rating[rows] - rating[rows].mean())
        return rating[rows].mean() + ridge.predict(x)

    error = rating[held_out] - guess(rest)[held_out].clip(1, 5)
    assert world.rmse["mean"] == pytest.approx(((rating[held_out] - rating[rest].mean()) ** 2).mean() ** 0.5, rel=1e-6)
    assert [world.rmse["biases"], world.noise] == pytest.approx([(error ** 2).mean() ** 0.5, error.std()], rel=1e-3)
    np.testing.assert_allclose(world.expected(users, items), guess(order).clip(1, 5), atol=1e-3)  # fitted on all


def test_what_nobody_rated_is_an_average_film_and_the_order_of_rows_does_not_matter():
    ratings, _ = planted()
    ratings["rating"] = ratings["rating"].round().clip(1, 5)
    world = fit_world(ratings, np.arange(52), 3 * np.eye(52))
    assert world.items[50:].tolist() == [[1] + [0] * (1 + world.n_factors)] * 2
    assert world.similarity.tolist() == np.eye(52).tolist() and world.stars.tolist() == [1, 2, 3, 4, 5]
    assert world.user_mean[3] == pytest.approx(ratings["rating"][ratings["user_id"] == 3].mean())
    assert set(play(world, recommenders.popularity(ratings), matrix_of(world), F)["rating"]) <= {1, 2, 3, 4, 5}
    mixed = fit_world(ratings.sample(frac=1, random_state=0), np.arange(52), np.eye(52))
    np.testing.assert_array_equal(mixed.items, world.items)
    assert mixed.rmse == world.rmse and mixed.log.equals(world.log)


def test_a_session_begins_with_the_first_real_ratings(ratings, item_ids):
    world = fit_world(ratings, item_ids, np.eye(5), factors=())
    user_idx, item_idx, rating = world.begin(3)
    assert world.user_ids[user_idx].tolist() == [1, 7]  # 2 has three ratings, 5 has two
    assert item_ids[item_idx].tolist() == [[10, 20, 30], [50, 40, 30]]
    assert rating.tolist() == [[4, 0.5, 5], [3, 4, 2]]


def one_step(world, log, item, habits=PATIENT, uniforms=(0.5, 0.5), satisfaction=3.0, mode="free"):
    answer, after = respond(world, habits, mode, np.array([0]), np.array([log]), np.array([satisfaction]),
                            np.array([item]), np.array([uniforms]))
    return {name: value[0] for name, value in answer.items()} | {"satisfaction": after[0]}


@pytest.mark.parametrize("log, item, change, satiation", [
    ([0, 1], 2, {}, 0.5 * (4 / 5 + 0.25 * 3 / 5)),  # cosine 4/5 with the last film, 3/5 with the one before it
    ([1, 0], 3, {}, 0), ([0, 1], 2, {"memory": 1}, 0.5 * 4 / 5), ([0, 1], 2, {"memory": 0}, 0),
])
def test_satiation_of_films_by_hand(log, item, change, satiation):
    world = world_of([[5, 5, 5, 5]], [[2, 0], [0, 1], [3, 4], [-1, 0]])
    answer = one_step(world, log, item, PATIENT._replace(**{"satiation": 0.5, "fading": 0.25} | change))
    assert answer["satiation"] == pytest.approx(satiation)
    assert answer["expected"] == 5 and answer["rating"] == (4.5 if satiation else 5)


@pytest.mark.parametrize("quantile, rating", [(0.5, 3), (0.8413447, 4), (0.1586553, 2), (0.9999, 5), (0.0, 1)])
def test_noise_is_normal_rounded_and_clipped(quantile, rating):
    world = world_of([[3.1, 1, 1]], noise=1.0, stars=[1, 2, 3, 4, 5])
    assert one_step(world, [1, 2], 0, uniforms=(quantile, 0.5))["rating"] == rating


@pytest.mark.parametrize("item, uniform, mode, quits", [
    (0, 0.349, "free", True), (0, 0.351, "free", False),  # 0.1 + 0.5 · (4 − 3.5)
    (1, 0.099, "free", True), (1, 0.101, "free", False), (0, 0.0, "fixed-length", False),
])
def test_the_displeased_quit_with_the_chance_that_is_documented(item, uniform, mode, quits):
    world, habits = world_of([[2.2, 5, 5]], user_mean=4.0), Habits(satiation=0, leave=0.1, impatience=0.5, decay=0.75)
    answer = one_step(world, [1, 2], item, habits, (0.5, uniform), satisfaction=4.0, mode=mode)
    assert answer["quits"] == quits and answer["satisfaction"] == (4.25 if item else 3.5)  # 3/4 · 4 + 1/4 · 2


def test_free_repeats_the_best_film_and_the_others_never_repeat(six_films):
    matrix = matrix_of(six_films)
    free = play(six_films, oracle(six_films), matrix, F, "free", 5, habits=PATIENT)
    assert (free.groupby("user_id")["item_id"].nunique() == 1).all() and len(free) == 8 * 5
    for mode in ("no-repeat", "fixed-length"):
        played = play(six_films, oracle(six_films), matrix, F, mode, 50, habits=PATIENT)
        assert played.groupby("user_id")["item_id"].agg(sorted).tolist() == [[102, 103, 104, 105]] * 8  # none is left
        assert (played.groupby("user_id")["expected"].diff().dropna() <= 0).all() and not played["quits"].any()
    scores = torch.tensor([9.0, 9.0, torch.nan, -torch.inf, -5.0, torch.inf])  # what has no number comes last
    played = play(six_films, lambda history, user_ids: scores.expand(len(user_ids), -1), matrix, F, "fixed-length")
    assert played["item_id"].tolist() == [105, 104, 102, 103] * 8


@pytest.mark.parametrize("mode, lengths", [("free", [1, 30]), ("no-repeat", [1, 30]), ("fixed-length", [30, 30])])
def test_a_displeased_user_leaves_unless_the_length_is_fixed(mode, lengths):
    world, impatient = world_of([[2] * 200, [5] * 200], user_mean=4.0), Habits(0, leave=0, impatience=1, decay=0)
    length = None if mode == "fixed-length" else 30  # which that is by default
    played = play(world, recommenders.random(), matrix_of(world), F, mode, length, habits=impatient)
    assert played.groupby("user_id").size().tolist() == lengths


def test_what_a_recommender_is_shown(six_films):
    matrix, asked = matrix_of(six_films), []

    def recommend(history, user_ids):
        asked.append((user_ids, history.log_length[history.places(user_ids)], history.last_states(user_ids)[0]))
        return recommenders.random(len(asked))(history, user_ids)

    played = play(six_films, recommend, matrix, F, "fixed-length", 3)
    assert [set(lengths) for _, lengths, _ in asked] == [{2}, {3}, {4}]
    state, seen = asked[2][2], played[played["user_id"] == 10][:2]  # user 10 after two films
    np.testing.assert_array_equal(state[:10], [*matrix[seen["item_id"] - 100].ravel(), *seen["rating"]])
    assert all(user_ids.tolist() == list(range(10, 18)) for user_ids, *_ in asked)  # the stranger is not asked about
    assert " ".join(played.columns) == "user_id step item_id rating reward expected satiation quits"
    assert (played["reward"] == reward_of(played["rating"])).all()
    assert (played["step"] == played.groupby("user_id").cumcount()).all() and played["user_id"].is_monotonic_increasing


def test_a_recommender_that_knows_satiation_scores_what_users_will_feel(six_films):
    habits, scores = PATIENT._replace(satiation=0.9, fading=0.5, memory=2), []

    def recommend(history, user_ids):
        scores.append(simulator.less_satiation(oracle(six_films), six_films, habits)(history, user_ids))
        return scores[-1]

    played = play(six_films, recommend, matrix_of(six_films), F, "free", 3, habits=habits)
    shown = [scores[row.step][row.user_id - 10, row.item_id - 100] for row in played.itertuples()]
    np.testing.assert_allclose(shown, played["expected"] - played["satiation"], rtol=1e-5)
    assert (played["satiation"] > 0).any()


def test_the_same_seed_gives_the_same_whoever_else_plays_and_for_how_long(six_films):
    made = partial(play, six_films, oracle(six_films), matrix_of(six_films), F, "free")
    whole = made(length=20)
    assert whole.equals(made(length=20)) and not whole.equals(made(length=20, seed=1))
    alike = world_of(np.full((8, 6), 3.0), noise=1.0)
    assert play(alike, oracle(alike), matrix_of(alike), F, length=1)["rating"].nunique() > 1  # chance is their own
    some = made(length=20, user_ids=np.array([15, 11, 15]))
    pd.testing.assert_frame_equal(some, whole[whole["user_id"].isin([11, 15])].reset_index(drop=True))
    pd.testing.assert_frame_equal(made(length=3), whole[whole["step"] < 3].reset_index(drop=True))


def test_sessions_by_hand():
    world = world_of(np.full((2, 4), 3.0), [[1, 0], [0, 1], [3, 4], [-1, 0]])
    played = pd.DataFrame({"user_id": [10, 10, 10, 11], "step": [0, 1, 2, 0], "item_id": [100, 101, 102, 103],
                           "rating": [5.0, 3.0, 1.0, 4.5], "quits": [False, False, True, False]})
    table = sessions(played.assign(reward=reward_of(played["rating"])), world)
    assert table.index.tolist() == [10, 11] and table["length"].tolist() == [3, 1]
    assert table["reward"].tolist() == [5 + 1 - 3, 4] and table["rating"].tolist() == [3, 4.5]
    assert table["quits"].tolist() == [True, False]
    assert table["diversity"][10] == pytest.approx(1 - (0 + 3 / 5 + 4 / 5) / 3) and np.isnan(table["diversity"][11])


def make_env(world, **options):
    return gymnasium.make("recnn/Users-v0", world=world, frame_size=F, item_matrix=matrix_of(world), **options)


@pytest.mark.parametrize("mode", simulator.MODES)
def test_the_environment_passes_gymnasiums_check_and_gives_the_numbers_of_play(six_films, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make_env(six_films, mode=mode).unwrapped)
    played = play(six_films, recommenders.random(3), matrix_of(six_films), F, mode, 12, seed=5)
    env, start = make_env(six_films, mode=mode, length=12), pd.DataFrame({"item_id": [100, 101], "rating": 3.0})
    assert env.observation_space.low[-F:].tolist() == [0.5] * F and env.observation_space.high[-F:].tolist() == [5] * F
    for user_id, expected in played.groupby("user_id"):
        _, info = env.reset(seed=5, options={"user": user_id})
        assert info["user_id"] == user_id
        for row in expected.itertuples():
            state, reward, terminated, truncated, info = env.step(row.item_id - 100)
            assert (info["rating"], reward, terminated) == (row.rating, row.reward, row.quits)
            assert [info["expected"], info["satiation"]] == pytest.approx([row.expected, row.satiation], rel=1e-12)
        assert terminated or truncated
        log = pd.concat([start, expected[["item_id", "rating"]]]).assign(user_id=user_id, timestamp=0)
        history = Frames(log, six_films.item_ids, matrix_of(six_films), F)  # observed is the state of a transition
        np.testing.assert_array_equal(state, history.last_states(np.array([user_id]))[0])


def test_a_refused_film_earns_the_lowest_reward_and_changes_nothing(six_films):
    env = make_env(six_films, length=3)
    first, second = ([env.reset(seed=seed)[1]["user_id"] for seed in [0] + [None] * 60] for _ in range(2))
    assert first == second and set(first) == set(range(10, 18))  # chance chooses, and a seed repeats it
    before, _ = env.reset(seed=0, options={"user": 11})
    masks = env.get_wrapper_attr("action_masks")
    assert masks().tolist() == [False, False, True, True, True, True]
    state, reward, terminated, truncated, info = env.step(1)
    np.testing.assert_array_equal(state, before)
    assert info["refused"] and info["rating"] == 0.5 and reward == -4 and not terminated and not truncated
    env.step(1)
    assert env.step(1)[2:4] == (False, True)  # an agent that insists is stopped by the length
    for habits, actions, ends in (
            (Habits(leave=1), (1, 3), [(False, False), (True, False)]),                # nobody leaves over it
            (PATIENT, (2, 3, 4, 5), [(False, False)] * 3 + [(False, True)])):          # until no film is left
        env = make_env(six_films, habits=habits, length=9)
        env.reset(seed=0)
        assert [env.step(action)[2:4] for action in actions] == ends


@pytest.mark.parametrize("change, words", [
    ({"similarity": np.eye(4)}, "4 rows"), ({"item_ids": np.array([50, 10, 10, 20, 30])}, "4 distinct"),
    ({"similarity": np.full((5, 2), np.nan)}, "NaN"), ({"item_ids": np.array([60, 10, 40, 20, 30])}, "ids 50"),
    ({"ratings": pd.DataFrame()}, "0 ratings"),
])
def test_a_world_that_cannot_be_fitted_is_refused(ratings, item_ids, change, words):
    with pytest.raises(DataError, match=words):
        fit_world(**{"ratings": ratings, "item_ids": item_ids, "similarity": np.eye(5)} | change)


@pytest.mark.parametrize("change, words", [
    ({"frame_size": 3}, "0 of"), ({"mode": "endless", "length": 9}, "endless"), ({"length": 0}, "0 steps"),
    ({"matrix": np.ones((5, 4))}, "5 rows"), ({"frame_size": 6}, "frame_size = 6"), ({"user_ids": [10, 99]}, "user 99"),
    ({"recommend": lambda history, user_ids: torch.ones(1, 6)}, "scores"),
])
def test_a_session_that_cannot_be_played_is_refused(six_films, change, words):
    with pytest.raises(DataError, match=words):
        play(six_films, **{"recommend": oracle(six_films), "matrix": matrix_of(six_films), "frame_size": F} | change)
