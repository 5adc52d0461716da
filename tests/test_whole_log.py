from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import training
from helpers.agents import whole_log
from helpers.frames import Frames, reward_of

SETTINGS = whole_log.WholeLogSettings(n_heads=2, batch_size=4)
IDS = np.arange(12) + 100


@pytest.fixture
def history():
    """Return logs of 1, 2, 5 and 9 ratings, of twelve items with vectors of 8 numbers."""
    rng = np.random.default_rng(0)
    rows = [(user, int(item) + 100, float(rng.integers(1, 11)) / 2, step)
            for user, n in enumerate((1, 2, 5, 9), 1) for step, item in enumerate(rng.permutation(12)[:n])]
    ratings = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    return Frames(ratings, IDS, rng.normal(size=(12, 8)).astype(np.float32), frame_size=3)


def agent_of(history, length=4, settings=SETTINGS):
    return whole_log.new_whole_log(0, history.items, length, settings)


@pytest.mark.parametrize("length", [1, 3, 4, 8, 200])
def test_every_rating_but_a_logs_first_comes_next_in_one_window(history, length):
    first, end = whole_log.windows(history, length)
    logs = zip(history.log_start, history.log_start + history.log_length, strict=True)
    assert sorted(row for a, b in zip(first, end, strict=True) for row in range(a + 1, b)) == \
        [row for start, stop in logs for row in range(start + 1, stop)]
    assert (end - first).max() <= length + 1 and (end - first).min() >= 2
    user = np.repeat(np.arange(4), history.log_length)
    assert all(user[a] == user[b - 1] for a, b in zip(first, end, strict=True))
    batches = whole_log.shuffled(history, length, 2, seed=3)
    assert sorted(np.concatenate([a for a, _ in batches])) == sorted(first)


def test_the_losses_by_hand_for_the_places_that_have_a_next_state(history):
    agent, gamma, beta = agent_of(history), 0.5, 0.3
    agent["net"].eval()
    first, end = whole_log.windows(history, 4)
    items, stars, real = whole_log.read_windows(history, first[::-1].copy(), end[::-1].copy())  # the longest first
    behaviour, critic, q = whole_log.whole_log_losses(agent, items, stars, real, gamma, beta)
    net, log_p, errors = agent["net"], [], {}
    for k in range(len(items)):
        n = int(real[k].sum())
        h = net(items[k:k + 1, :n - 1], stars[k:k + 1, :n - 1])[0]
        scores = h @ net.items.T
        log_p += [scores[t].log_softmax(0)[items[k, t + 1]] for t in range(n - 1)]
        u, v = net.worth(h)
        for t in range(n - 2) if k < -(-len(items) // 4) else ():
            q_of_all = v[t + 1] + net.items @ u[t + 1]
            value = ((scores[t + 1] + beta * q_of_all).softmax(0) * q_of_all).sum()
            q_taken = v[t] + u[t] @ net.items[items[k, t + 1]]
            errors[round(q_taken.item(), 4)] = (q_taken - reward_of(stars[k, t + 1]) - gamma * value) ** 2
    assert behaviour.item() == pytest.approx(-torch.stack(log_p).mean().item(), rel=1e-4)
    drawn = [errors[round(each, 4)].item() for each in q.tolist()]
    assert critic.item() == pytest.approx(np.mean(drawn), rel=1e-3) and len(drawn) > 0
    short = whole_log.read_windows(history, np.array([1]), np.array([3]))  # without a second step for the critic
    behaviour, critic, _ = whole_log.whole_log_losses(agent, *short, gamma, beta)
    assert behaviour > 0 and critic == 0


def test_users_are_scored_alone_as_together_by_their_last_ratings_and_tilted_by_the_critic(history):
    net, users = agent_of(history)["target"], np.array([4, 1, 3])
    together = whole_log.whole_log_policy(history, users, net=net)
    alone = torch.cat([whole_log.whole_log_policy(history, users[k:k + 1], net=net) for k in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
    end = int(history.log_start[3] + history.log_length[3])
    with torch.no_grad():
        h = net(history.item_idx[None, end - 4:end].long(), history.rating[None, end - 4:end])[:, -1]
        expected = (h + 0.7 * net.worth(h)[0]) @ net.items.T
    tilted = whole_log.whole_log_policy(history, users, net=net, beta=0.7)
    torch.testing.assert_close(tilted[:1], expected, atol=0.05, rtol=0.05)  # bfloat16, where the processor has it
    one = whole_log.whole_log_policy(history, users[:1], net=net, length=1)
    assert not torch.allclose(one, together[:1], atol=1e-3)


def test_training_ends_where_validation_no_longer_gains_and_keeps_its_best(history):
    agent, losses, kept = agent_of(history), iter([3.0, 2.0, 2.5, 2.2, 1.0]), []

    def loss_of(net):
        kept.append(net.items.clone())
        return next(losses)
    curve = whole_log.train_until_flat(agent, history, loss_of, SETTINGS, length=4, max_passes=9, patience=2)
    assert curve["loss/validation"].tolist() == [3.0, 2.0, 2.5, 2.2]
    assert torch.equal(agent["target"].items, kept[1]) and not torch.equal(kept[1], kept[3])


def test_the_front_and_the_choice_on_it(history):
    front = pd.DataFrame({"NDCG@10": [0.100, 0.099, 0.0985, 0.05], "reward@10": [1.0, 2.0, 3.0, 9.0]},
                         index=[0.0, 0.1, 0.2, 0.3])
    assert whole_log.choose_beta(front, 0.98) == 0.2 and whole_log.choose_beta(front, 1.0) == 0.0
    cases = pd.DataFrame({"user_id": [4, 3], "item_id": [100, 101], "rating": 5.0})
    assert len(whole_log.front_of([agent_of(history)["target"]], history, cases, (0.0, 0.5))) == 2


def test_what_is_said_off_the_log_by_hand(history):
    net = agent_of(history, length=9)["target"]
    said = whole_log.off_the_log(net, history, length=9, beta=0.3)
    q, worth, away = [], [], []
    for start, n in zip(history.log_start, history.log_length, strict=True):
        row = history.item_idx[None, start:start + n].long()
        h = net(row[:, :-1], history.rating[None, start:start + n - 1])[0] if n > 1 else torch.zeros(0, 8)
        for k, state in enumerate(h):
            u, v = (part[0] for part in net.worth(state[None]))
            q_of_all = v + net.items @ u
            p = (net.items @ state + 0.3 * q_of_all).softmax(0)
            q.append(q_of_all[row[0, k + 1]].item())
            worth.append((p @ q_of_all).item())
            away.append((p @ net.items - net.items).norm(dim=1).min().item() / net.items.norm(dim=1).mean().item())
    assert said["Q, logged action"] == pytest.approx(np.mean(q), abs=1e-4)
    assert said["Q, policy"] == pytest.approx(np.mean(worth), abs=1e-4)
    assert said["mean item to nearest item"] == pytest.approx(np.mean(away), abs=1e-4)


def test_a_step_moves_the_target_by_tau_and_lowers_the_losses(history):
    agent = agent_of(history, settings=whole_log.WholeLogSettings(dropout=0.0, item_dropout=0.0, learning_rate=1e-2))
    batch = whole_log.windows(history, 4)
    before = agent["target"].items.clone()
    first = whole_log.whole_log_update(agent, history, batch, SETTINGS)
    torch.testing.assert_close(agent["target"].items, before + SETTINGS.tau * (agent["net"].items - before))
    done = training.fit(partial(whole_log.whole_log_update, agent, history, settings=SETTINGS), history, agent,
                        batch_size=4, max_steps=60, sample=lambda _: batch)
    assert done["loss/behaviour"].iloc[-1] < 0.7 * first["loss/behaviour"].item()
