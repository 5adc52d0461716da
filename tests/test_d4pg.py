import numpy as np
import pytest
import torch

from helpers.agents import d4pg
from helpers.losses import log_policy, mean_item, n_step, project
from helpers.replay import Prioritised
from helpers.toy import STARS, share_of_optimum, toy_states
from tests.test_rl_invariants import FULL, GAMMA, STILL, SUPPORT, same


@pytest.fixture
def frames(twenty_users):
    return twenty_users


def new(frames, seed=0):
    return d4pg.new_d4pg_agent(seed, 3, 6, 1e-3, replay_size=len(frames), **STILL)


def test_3_the_target_is_what_the_slow_copies_say_of_the_next_state(frames):
    agent, slow = new(frames), new(frames, seed=1)
    t, discount = n_step(frames, torch.arange(len(frames)), 3, GAMMA)
    agent |= {name: slow[name] for name in ("actor_target", "critic_target")}
    next_logits = slow["critic"](t.next_state, mean_item(slow["actor"](t.next_state), frames.items))
    m = project(next_logits.softmax(dim=1), t.reward, discount, SUPPORT)
    log_p = agent["critic"](t.state, t.action).log_softmax(dim=1)
    surprise, q = d4pg.d4pg_critic_loss(agent, t, discount, frames.items, SUPPORT)
    torch.testing.assert_close(surprise, (torch.special.xlogy(m, m) - m * log_p).sum(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q, log_p.exp() @ SUPPORT[:, None])


def test_a_plain_index_leaves_the_priorities_and_weights_of_one_change_nothing(frames):
    plain, weighed, index = new(frames), new(frames), torch.arange(40)
    d4pg.d4pg_update(plain, frames, index, **FULL)
    d4pg.d4pg_update(weighed, frames, (index, torch.ones(40, 1)), **FULL)
    assert same(plain["critic"], weighed["critic"]) and same(plain["actor"], weighed["actor"])
    uniform = torch.full((len(frames),), 1 / len(frames), dtype=torch.float64)
    assert torch.allclose(plain["replay"].probability(), uniform)
    assert not torch.allclose(weighed["replay"].probability(), uniform)


def test_weights_weigh_the_critics_loss_and_priorities_are_set_from_the_divergence_of_each_row(frames):
    agent, index, weights = new(frames), torch.tensor([3, 50, 11]), torch.tensor([[1.0], [0.5], [0.2]])
    t, discount = n_step(frames, index, 3, GAMMA)
    with torch.no_grad():
        surprise, _ = d4pg.d4pg_critic_loss(agent, t, discount, frames.items, SUPPORT)
    expected = Prioritised(len(frames))
    expected.update(index, surprise)
    loss = d4pg.d4pg_update(agent, frames, (index, weights), **FULL)["loss/critic"].detach()
    torch.testing.assert_close(loss, (weights[:, 0] * surprise).mean())
    torch.testing.assert_close(agent["replay"].probability(), expected.probability())


def test_actors_play_the_world_as_it_is_the_same_for_a_seed():
    agent = d4pg.new_d4pg_agent(0, learning_rate=3e-3, **d4pg.TOY)
    films, stars = d4pg.act(agent["actor"].state_dict(), 7, 20, 0.5)
    assert films.shape == stars.shape == (16, 21)
    np.testing.assert_array_equal(stars[:, 1:], STARS[films[:, :-1], films[:, 1:]].astype(np.float32))
    again = d4pg.act(agent["actor"].state_dict(), 7, 20, 0.5)
    np.testing.assert_array_equal(films, again[0])
    greedy, _ = d4pg.act(agent["actor"].state_dict(), 8, 20, 0.0)
    with torch.no_grad():
        state = torch.cat([torch.eye(3)[greedy[:, 0]], torch.full((16, 1), 3.0)], dim=1)
        assert greedy[:, 1].tolist() == log_policy(agent["actor"](state), torch.eye(3)).argmax(dim=1).tolist()
    assert len(d4pg.as_frames([(films, stars), again])) == 2 * 16 * 20


def test_one_learner_learns_from_actors_that_play_with_older_weights():
    agent, under_way = d4pg.new_d4pg_agent(4, learning_rate=3e-3, **d4pg.TOY), {}

    def start(weights, seed, noise):
        under_way[seed] = d4pg.act(weights, seed, 30, noise)
        return seed

    met = d4pg.learn_from_actors(agent, start, lambda tickets: (tickets[0], under_way.pop(tickets[0])),
                                 (0.1, 0.3, 0.5, 1.0), rounds=40, seed=4, **FULL | dict(n=1, behaviour_weight=0.02))
    with torch.no_grad():
        choice = agent["actor_target"](toy_states()).argmax(dim=1).numpy()
    assert share_of_optimum(choice, GAMMA) >= 0.95
    assert met["noise"].value_counts().tolist() == [10, 10, 10, 10] and len(under_way) == 4
    brave, careful = (met[met["noise"] == noise]["mean stars"].tail(3).mean() for noise in (1.0, 0.1))
    assert careful > brave
