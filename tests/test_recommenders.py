import copy

import numpy as np
import pytest
import torch

from helpers import recommenders
from helpers.agents import ddpg, serving
from helpers.frames import Frames, reward_of
from helpers.losses import SampledItems
from helpers.networks import Critic
from helpers.recommenders import UserHistory, fit_user_history
from helpers.toy import STARS, toy_frames
from tests.tables import log_of

ITEMS = np.eye(4, dtype=np.float32)
IDS = np.arange(4) + 10


def frames_of(rows: list[tuple], matrix: np.ndarray = ITEMS, device: str = "cpu") -> Frames:
    return Frames(log_of(rows), IDS[:len(matrix)], matrix, 1, device)


def test_a_history_term_by_hand_is_of_the_later_ratings():
    history = frames_of([(1, 10, 1.0), (1, 11, 1.0), (1, 10, 5.0), (1, 12, 3.0), (2, 13, 4.0), (2, 10, 3.0)])
    w = torch.arange(16.0).reshape(4, 4)
    said = UserHistory(w, weight=2.0, rating_slope=0.5)(history, np.array([2, 1]))
    # user 2: item 13 counts 1 + 0.5·1, item 10 once; user 1: item 10, rated twice, counts 2, 11 nothing, 12 once
    expected = 2 * 4 ** 0.5 * torch.stack([1.5 * w[3] + w[0], 2 * w[0] + w[2]])
    assert torch.allclose(said, expected)


def test_where_the_item_matrix_can_say_all_a_memory_is_ease():
    rng = np.random.default_rng(0)
    rows = [(user, 10 + item, 3.0) for user in range(40) for item in rng.permutation(4)[:rng.integers(2, 5)]]
    matrix = rng.normal(size=(4, 6)).astype(np.float32)  # more numbers than items
    history, train = frames_of(rows, matrix), log_of(rows)
    term, users = fit_user_history(train, IDS, matrix, ridge=5.0, weight=0.7), history.user_ids
    ease = recommenders.ease(recommenders.fit_ease(train, IDS, 5.0), 10_000, 1.0)(history, users)
    scores = term(history, users) @ history.items.T / 6 ** 0.5
    assert torch.allclose(scores, 0.7 * ease, atol=1e-4) and ease.abs().max() > 0.1


def test_a_memory_is_fitted_on_the_part_it_is_given_alone():
    rng = np.random.default_rng(1)
    rows = log_of([(user, 10 + item, 3.0) for user in range(30) for item in rng.permutation(4)[:3]])
    one, other = (fit_user_history(part, IDS, ITEMS, 5.0).matrix for part in (rows, rows.iloc[:-2]))
    assert not torch.allclose(one, other)
    assert torch.equal(one, fit_user_history(rows.assign(rating=1.0), IDS, ITEMS, 5.0).matrix)


def test_the_policy_adds_it_to_the_proto_action():
    history, users = frames_of([(1, 10, 5.0), (1, 11, 4.0), (2, 12, 3.0), (2, 13, 2.0)]), np.array([1, 2])
    term = UserHistory(torch.eye(4).roll(1, dims=1), 3.0)

    def actor(state):
        return state[:, :4]
    scores = recommenders.policy(actor, term)(history, users)
    by_hand = (history.last_states(users)[:, :4] + term(history, users)) / 2 @ history.items.T  # over √E
    assert torch.equal(scores, by_hand)
    assert not torch.equal(scores.argsort(), recommenders.policy(actor)(history, users).argsort())


@pytest.mark.parametrize(("beta", "order"), [(0.0, [3, 2, 0, 1, 4]), (0.1, [3, 2, 0, 1, 4]), (10.0, [0, 3, 2, 1, 4]),
                                             (torch.inf, [0, 3, 2, 1, 4])])
def test_candidates_stand_on_top_in_the_order_of_policy_and_critic(beta, order):
    log_p, candidates = torch.tensor([[0.10, 0.05, 0.30, 0.54, 0.01]]).log(), torch.tensor([[3, 2, 0]])
    q = torch.tensor([[2.0, 1.0, 6.0]])
    scores = serving.rerank(log_p, q, candidates, beta)
    assert scores.argsort(descending=True)[0].tolist() == order
    z = (q - 3) / 7 ** 0.5  # the standard deviation of 2, 1 and 6
    torch.testing.assert_close(scores.gather(1, candidates),
                               z if beta == torch.inf else log_p.gather(1, candidates) + beta * z)
    alike = serving.rerank(log_p, torch.ones(1, 3), candidates, 1.0)  # a critic that cannot tell says nothing
    torch.testing.assert_close(alike.gather(1, candidates), log_p.gather(1, candidates))
    alone = serving.rerank(log_p, torch.tensor([[5.0]]), torch.tensor([[2]]), beta)
    assert alone.argmax() == 2 and alone.isfinite().all()


def test_the_critic_chooses_among_the_best_unseen_items_of_actor_and_history():
    history, users = frames_of([(1, 10, 4.0), (1, 10, 5.0), (2, 13, 2.0), (2, 13, 1.0)]), np.array([1, 2])
    term, critic = UserHistory(torch.arange(16.0).reshape(4, 4).sin(), 3.0, 0.5), Critic(1, 4, 8)
    with torch.no_grad():
        state, scores = history.last_states(users), term(history, users)  # of items that are unit vectors
        scores[[0, 1], [0, 3]] = -torch.inf                                # and their seen one
        best = scores.topk(2).indices
        order = critic.among(state, history.items[best]).argsort(descending=True)
    found = serving.wolpertinger(history, users, actor=lambda state: torch.zeros(2, 4), critic=critic, k=2,
                                 beta=torch.inf, term=term)
    assert torch.equal(found.topk(2).indices, best.gather(1, order))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_says_the_same():
    term, rows = UserHistory(torch.arange(16.0).reshape(4, 4), 2.0, 0.5), [(1, 10, 5.0), (1, 11, 1.0), (1, 12, 3.0)]
    here, there = (term(frames_of(rows, device=device), np.array([1])) for device in ("cpu", "cuda"))
    assert torch.allclose(there.cpu(), here)


def test_remembered_scores_are_asked_once_for_the_same_users_of_the_same_history():
    asked = []

    def recommend(history, user_ids):
        asked.append(user_ids.tolist())
        return torch.as_tensor(user_ids)
    once, one, other = recommenders.remembered(recommend), object(), object()
    for history, users in ((one, [1, 2]), (one, [1, 2]), (one, [2, 1]), (other, [1, 2])):
        assert once(history, np.array(users)).tolist() == users
    assert asked == [[1, 2], [2, 1], [1, 2]]


def test_an_item_is_drawn_as_often_as_the_policy_shows_it():
    torch.manual_seed(0)
    proto_action = torch.tensor([[2.197, 0.0, 0.0, 0.0]]).expand(4000, 4)  # odds of three to one
    drawn = serving.drawn_item(proto_action, torch.eye(2, 4))
    assert (drawn == torch.eye(2, 4)[drawn.argmax(dim=1)]).all() and abs(drawn[:, 0].mean() - 0.75) < 0.03
    some = SampledItems(torch.eye(2, 4), torch.tensor([1.0, 9.0]).log())  # the second stands for nine
    assert abs(serving.drawn_item(proto_action, some)[:, 0].mean() - 0.25) < 0.03


def test_fitted_q_evaluation_begins_at_the_mean_return_and_finds_what_the_policy_is_worth():
    gamma, toy, choice = 0.5, toy_frames(), torch.tensor([0, 2, 1])
    agent = ddpg.new_agent(0, 1, 3, 3e-3, hidden_size=64, dropout=0.0, item_dropout=0.0)
    actor = copy.deepcopy(agent["actor"].state_dict())
    agent["actor_target"] = torch.nn.Module()  # which shows nothing but its choice
    agent["actor_target"].forward = lambda state: 100 * torch.eye(3)[choice[state[:, :3].argmax(dim=1)]]
    log = serving.fit_fqe(agent, toy, gamma, rounds=8, batch_size=256, max_steps=60)
    mean_reward = float(reward_of(toy.rating).mean())
    assert abs(log["Q/logged action"].iloc[0] - mean_reward / (1 - gamma)) < 0.5 and log.index[-1] == 480
    reward, t = reward_of(STARS), toy.gather(torch.arange(2000))
    value = np.linalg.solve(np.eye(3) - gamma * np.eye(3)[choice], reward[np.arange(3), choice])
    true_q = (reward + gamma * value)[t.state[:, :3].argmax(dim=1), t.action.argmax(dim=1)]
    with torch.no_grad():
        q = agent["critic_target"](t.state, t.action)[:, 0].numpy()
    assert np.abs(q - true_q).mean() < 0.1 * np.abs(true_q).mean()
    before = copy.deepcopy(agent["critic_target"].state_dict())
    serving.fqe_step(agent, toy, torch.arange(256), gamma)  # within a round the target stands still
    assert all(torch.equal(agent["critic_target"].state_dict()[name], old) for name, old in before.items())
    assert all(torch.equal(agent["actor"].state_dict()[name], old) for name, old in actor.items())
