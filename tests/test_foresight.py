import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import DQN

from helpers.agents.foresight import Sessions
from helpers.extra import foresight
from helpers.extra.foresight import Guests, Habits, Visits, World, best_unseen, fit_choice, fit_world, planner, play
from helpers.files import DataError
from helpers.losses import n_step
from tests.test_simulator import planted

PATIENT = Habits(impatience=0.0, leave=0.0, satiation=0.0)


def world_of(appeal, liking, noise=0.0, frame_size=2):
    """Return a world of these log-odds and likings (U, n), whose films are all unlike each other."""
    appeal, liking = (torch.as_tensor(part, dtype=torch.float32) for part in (appeal, liking))
    n_users, n = appeal.shape
    return World(np.arange(n_users) + 10, np.arange(n) + 100, appeal, liking, torch.full((n_users,), 3.0), torch.eye(n),
                 torch.arange(frame_size).expand(n_users, -1), torch.full((n_users, frame_size), 3.0),
                 torch.arange(1.0, 6.0), noise, 0.5, {})


@pytest.fixture
def noisy():
    """Return a world of 30 people and 40 films, where what is taken and what is liked have nothing in common."""
    rng = np.random.default_rng(0)
    return world_of(rng.normal(size=(30, 40)), rng.normal(scale=0.8, size=(30, 40)), noise=0.5)


def test_the_chances_of_a_slate_are_those_of_the_choice_model():
    world = world_of(np.tile(np.log([1, 1, 3, 2, 4]), (20_000, 1)), np.zeros((20_000, 5)))
    visits = Visits(world, PATIENT, torch.arange(20_000), k=2)
    item, taken, *_ = visits.step(torch.tensor([[2, 4]]).expand(20_000, -1))
    shares = [(~taken).float().mean(), (taken & (item == 2)).float().mean(), (taken & (item == 4)).float().mean()]
    assert shares == pytest.approx([1 / 8, 3 / 8, 4 / 8], abs=0.015)
    _, alone, *_ = Visits(world, PATIENT, torch.arange(20_000)).step(torch.full((20_000,), 2))
    assert alone.float().mean().item() == pytest.approx(0.75, abs=0.015)


def test_a_step_by_hand():
    world = world_of([[9.0] * 5], [[0, 0, 1.0, -2.0, 1.0]])._replace(alike=torch.ones(5, 5))
    visits = Visits(world, Habits(impatience=2.0, decay=0.8, leave=0.1, satiation=0.6, recovery=0.5), torch.tensor([0]))
    assert visits.step(torch.tensor([2]))[2].item() == 4  # own mean 3, liked by 1
    assert visits.satisfaction.item() == pytest.approx(0.2) and visits.tired[0, 4].item() == pytest.approx(0.6)
    assert visits.habits.leaving(visits.satisfaction).item() == pytest.approx(0.1 * np.exp(-0.4))
    visits.here[:] = True  # whatever was drawn
    assert visits.step(torch.tensor([3]))[2].item() == 1  # 3 − 2 − 0.6, to the nearest
    assert visits.satisfaction.item() == pytest.approx(0.8 * 0.2 + 0.2 * -2)
    assert visits.tired[0, 4].item() == pytest.approx(0.5 * 0.6 + 0.6)
    assert visits.recent.tolist() == [[2, 3]] and visits.recent_stars.tolist() == [[4, 1]]
    visits = Visits(world_of([[-30.0] * 5], [[1.0] * 5]), PATIENT, torch.tensor([0]))
    _, taken, stars, left = visits.step(torch.tensor([4]))  # passed over, it changes nothing but that it was shown
    assert not taken and not left and stars.item() == 0 and visits.satisfaction.item() == 0
    assert visits.recent.tolist() == [[0, 1]] and visits.shown[0].tolist() == [True, True, False, False, True]


def test_nothing_is_shown_twice_who_left_takes_nothing_and_a_seed_repeats_it(noisy):
    visits, shown = Visits(noisy, Habits(leave=0.3), torch.arange(30), seed=3), []
    while not visits.over:
        here = visits.here
        item, taken, _, left = visits.step(best_unseen(torch.rand(30, 40), visits)[:, 0])
        assert not (taken & ~here).any() and not (left & ~here).any()
        shown.append(item)
    assert all(len(set(row)) == len(row) and not set(row) & {0, 1} for row in torch.stack(shown, dim=1).tolist())
    assert visits.steps <= 38
    assert play(noisy, PATIENT, foresight.myopic, torch.arange(30), repeats=1, k=5)["length"].eq(7).all()
    one, same, other = (play(noisy, Habits(), foresight.myopic, torch.arange(30), seed=seed) for seed in (1, 1, 2))
    assert one.equals(same) and not one.equals(other)


def test_without_impatience_the_planner_is_the_myopic_oracle_and_with_it_earns_more(noisy):
    patient, habits, user = Habits(impatience=0.0), Habits(impatience=3.0), torch.arange(30)
    assert play(noisy, patient, planner(noisy, patient), user).equals(play(noisy, patient, foresight.myopic, user))
    far, greedy = (play(noisy, habits, policy, user, repeats=40)["reward"].mean()
                   for policy in (planner(noisy, habits), foresight.myopic))
    assert far > 1.1 * greedy


def test_a_world_fitted_to_a_planted_one_knows_who_takes_and_who_likes_what():
    ratings, true = planted()
    world = fit_world(ratings, np.arange(50), np.eye(50), frame_size=5, level=0.4)
    users = world.user_ids
    liking = true[users] - ratings.groupby("user_id")["rating"].mean().to_numpy()[users, None]
    assert np.corrcoef(world.liking.flatten(), liking.ravel())[0, 1] > 0.8
    unseen = torch.ones(len(users), 50).scatter(1, world.first, 0) > 0
    assert world.appeal[unseen].mean().item() == pytest.approx(np.log(0.4 / 0.6), abs=1e-4)  # 45 films are all the top
    assert not (world.first == world.first[:, :1])[:, 1:].any()


def test_the_choice_model_finds_what_goes_together():
    rng = np.random.default_rng(0)
    rows = [(user, item) for user in range(200) for item in rng.choice(20, 10, replace=False) + 20 * (user % 2)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id"]).assign(rating=4.0, timestamp=range(2000))
    choice = fit_choice(log, np.arange(40), ridge=10.0)
    odds = choice(torch.nn.functional.one_hot(torch.tensor([3]), 40).float())[0]
    # of 30 films a user has not rated, 20 of the other kind are told apart and 10 of the own cannot be: 0.83
    assert choice.auc > 0.78 and odds[:20].mean() > odds[20:].mean() + 0.1
    assert fit_choice(log, np.arange(40), ridge=10.0, known=3).of_log > choice.of_log  # each of fewer films says more


def test_habits_are_found_where_they_were_planted():
    rng, rows = np.random.default_rng(0), []
    for user in range(400):
        second, satisfaction = 0, 0.0
        for k in range(2_000):
            stars = rng.integers(1, 6)
            satisfaction = 0.8 * satisfaction + 0.2 * (stars - 3)
            rows.append((user, rng.integers(300), stars, second))
            ends = rng.random() < 1 / (1 + np.exp(2.0 + 1.5 * satisfaction))
            second += 10_000 if ends else 60
            if k > 25 and ends and rng.random() < 0.2:
                break
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    found = foresight.observed_habits(log, np.arange(300), rng.normal(size=(300, 8)), n=100).set_index("habit")
    ends, gone, tired = found.itertuples()
    assert ends.low < 1.5 < ends.high and ends.high - ends.low < 0.5
    assert gone.low < 0 < gone.high and tired.low < 0 < tired.high
    with pytest.raises(DataError, match="20 ratings"):
        foresight.observed_habits(log[log["timestamp"] < 100], np.arange(300), np.eye(300))


def test_a_return_stops_where_a_person_leaves():
    flags = [torch.tensor(flag, dtype=torch.bool) for flag in ([1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1])]
    played = Sessions(torch.eye(2), [torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), torch.tensor([0, 1, 0, 1]),
                                     flags[0], torch.ones(4), *flags[1:], torch.zeros(4)])
    t, discount = n_step(played, torch.arange(4), 2, 0.5, stop_at_done=True)
    assert t.reward[:, 0].tolist() == [1.5, 1, 1.5, 1]
    assert discount[:, 0].tolist() == [0, 0, 0.25, 0.5]  # the last session was cut off, nobody left
    assert n_step(played, torch.arange(4), 2, 0.5)[1][:, 0].tolist() == [0.25, 0.5, 0.25, 0.5]


def test_guests_keep_gymnasiums_rules(noisy):
    matrix = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    env = gymnasium.make("recnn/Guests-v0", world=noisy, item_matrix=matrix)
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=5)
    _, reward, left, cut, info = env.step(0)  # of the first frame
    assert (reward, left, cut, info["refused"]) == (-1.0, False, False, True)
    with pytest.raises(DataError, match="3 rows"):
        Guests(noisy, np.eye(3))


def test_an_agent_of_others_learns_here():
    appeal = np.full((4, 12), -4.0)
    appeal[:, 7] = 4.0  # everybody takes one film
    env = Guests(world_of(appeal, np.zeros((4, 12))), np.eye(12, dtype=np.float32), PATIENT, length=4)
    agent = DQN("MlpPolicy", env, gamma=0.5, learning_rate=1e-2, learning_starts=50, train_freq=1, batch_size=32,
                target_update_interval=50, exploration_fraction=0.6, policy_kwargs={"net_arch": [32]}, seed=0)
    agent.learn(600)
    assert agent.predict(env.reset(seed=0)[0], deterministic=True)[0] == 7


def test_of_many_users_some_are_drawn_whole_and_the_same_each_time():
    log = pd.DataFrame({"user_id": np.repeat(np.arange(30), 4), "item_id": np.tile(np.arange(4), 30)})
    some = foresight.some_users(log, 7)
    assert some["user_id"].nunique() == 7 and len(some) == 28 and some.equals(foresight.some_users(log, 7))
    assert foresight.some_users(log, 30) is log
