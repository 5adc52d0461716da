"""Lesson 07's own cells: who chooses and who judges, the penalty, the priorities, memory, and the toy's own answer."""

import copy
from functools import partial

import pytest
import torch

from helpers import toy
from helpers.agents import rainbow as rainbow_lesson
from helpers.losses import log_policy, mean_of, project
from helpers.training import fit, load_policy, save_policy

GAMMA, TAU, SUPPORT = 0.9, 0.02, torch.linspace(-40, 50, 51)
RULE = dict(gamma=GAMMA, tau=TAU, decay=0.7, support=SUPPORT)
SMALL = dict(hidden_size=32, dropout=0.0, item_dropout=0.0)


@pytest.fixture(scope="module")
def lesson():
    return rainbow_lesson


@pytest.fixture
def frames(twenty_users):
    return twenty_users


def new(lesson, frames, seed=0, **options):
    return lesson.new_rainbow_agent(seed, frames.items, 3, 1e-3, **SMALL | options)


def one_step(frames):
    t = frames.gather(torch.arange(len(frames)))
    return t, torch.full((len(frames), 1), GAMMA)


@pytest.mark.parametrize("double", [True, False])
def test_one_network_chooses_the_next_item_and_the_target_judges_it(lesson, frames, double):
    agent, other = new(lesson, frames, noisy=False), new(lesson, frames, seed=1, noisy=False)
    agent["actor_target"] = other["actor_target"]
    t, discount = one_step(frames)
    loss, logits, next_logits, _ = lesson.rainbow_loss(agent, t, discount, frames.items, SUPPORT, double)
    by_target = torch.stack([agent["actor_target"].logits(t.next_state, item.expand(len(frames), -1))
                             for item in frames.items], dim=1)
    chooser = agent["actor" if double else "actor_target"]
    q = torch.stack([mean_of(chooser.logits(t.next_state, item.expand(len(frames), -1)), SUPPORT)[:, 0]
                     for item in frames.items], dim=1)
    expected = by_target[torch.arange(len(frames)), q.argmax(dim=1)]
    torch.testing.assert_close(next_logits, expected)
    m = project(expected.softmax(dim=1), t.reward, discount, SUPPORT)
    kl = (torch.special.xlogy(m, m) - m * logits.log_softmax(dim=1)).sum(dim=1)
    torch.testing.assert_close(loss, kl, rtol=1e-4, atol=1e-5)
    assert (loss > -1e-5).all() and not next_logits.requires_grad


def test_with_a_single_atom_the_loss_is_a_squared_error_of_values(lesson, frames):
    agent = new(lesson, frames, n_atoms=1)
    t, discount = one_step(frames)
    loss, q, next_q, _ = lesson.rainbow_loss(agent, t, discount, frames.items, SUPPORT, spread=1.0)
    torch.testing.assert_close(loss, (q - t.reward - discount * next_q)[:, 0].square() / 2)


def test_the_penalty_is_what_the_log_sum_exp_exceeds_the_logged_items_value_by(lesson, frames):
    agent = new(lesson, frames)
    u = agent["actor"].eval()(frames.gather(torch.arange(5)).state)
    advantage = (u @ (frames.items - agent["actor"].centre).T) / 6 ** 0.5
    excess = advantage.logsumexp(dim=1, keepdim=True) - advantage
    torch.testing.assert_close(excess, -log_policy(u, frames.items))


def test_a_step_moves_the_target_by_tau_and_sets_the_priorities_it_drew(lesson, frames):
    agent = new(lesson, frames, n_transitions=len(frames))
    before = copy.deepcopy(agent["actor_target"])
    index, weight = agent["replay"].sample(64)
    scalars = lesson.rainbow_update(agent, frames, (index, weight), **RULE)
    for old, new_, source in zip(before.parameters(), agent["actor_target"].parameters(), agent["actor"].parameters(),
                                 strict=True):
        torch.testing.assert_close(new_, (1 - TAU) * old + TAU * source)
        assert not torch.equal(new_, old)
    leaves = agent["replay"].state_dict()["priority"]
    drawn = torch.zeros(len(frames), dtype=torch.bool).index_fill(0, index, True)
    assert (leaves[~drawn] == 1).all() and (leaves[drawn] != 1).all()
    assert {"loss/critic", "loss/actor", "loss/behaviour", "Q/logged action", "Q/policy's action"} == scalars.keys()


def test_weights_scale_the_value_loss_and_leave_the_penalty(lesson, frames):
    index, losses = torch.arange(64), {}
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        agent = new(lesson, frames, noisy=False)
        losses[weight] = lesson.rainbow_update(agent, frames, (index, torch.full((64, 1), weight)), **RULE)
    torch.testing.assert_close(losses[0.25]["loss/critic"], losses[1.0]["loss/critic"] / 4)
    torch.testing.assert_close(losses[0.25]["loss/behaviour"], losses[1.0]["loss/behaviour"])


def test_without_a_penalty_none_is_computed_and_with_one_atom_or_one_head_a_step_still_learns(lesson, frames):
    scalars = lesson.rainbow_update(new(lesson, frames), frames, torch.arange(9), penalty=0.0, **RULE)
    assert "loss/behaviour" not in scalars
    for options in (dict(n_atoms=1), dict(dueling=False), dict(noisy=False)):
        agent = new(lesson, frames, **options)
        before = copy.deepcopy(agent["actor"].state_dict())
        lesson.rainbow_update(agent, frames, torch.arange(64), **RULE)
        learnt = dict(agent["actor"].named_parameters())
        assert all(not torch.equal(before[name], learnt[name]) for name in learnt), options


def test_a_saved_agent_ranks_values_and_goes_on_as_before(lesson, frames, tmp_path):
    agent = new(lesson, frames, n_transitions=len(frames))
    lesson.rainbow_update(agent, frames, agent["replay"].sample(32), **RULE)
    save_policy(tmp_path / "rainbow.pt", agent["actor_target"], agent, support=SUPPORT.tolist())
    policy, checkpoint = load_policy(tmp_path / "rainbow.pt")
    state, action = frames.gather(torch.arange(5)).state, frames.items[:5]
    assert torch.equal(policy(state), agent["actor_target"](state))
    assert torch.equal(policy.logits(state, action), agent["actor_target"].logits(state, action))
    again = new(lesson, frames, seed=7, n_transitions=len(frames))
    for name, part in again.items():
        part.load_state_dict(checkpoint["parts"][name])
    for one in (agent, again):
        torch.manual_seed(1)
        lesson.rainbow_update(one, frames, one["replay"].sample(32), **RULE)
    assert all(torch.equal(a, b) for a, b in zip(agent["actor"].parameters(), again["actor"].parameters(), strict=True))


@pytest.mark.parametrize("n", [1, 3])
def test_one_step_targets_learn_the_optimum_of_the_three_film_world_and_three_step_ones_its_trap(lesson, n):
    world = toy.toy_frames()
    agent = lesson.new_rainbow_agent(0, world.items, 1, 3e-3, n_transitions=len(world), **SMALL)
    step = partial(lesson.rainbow_update, agent, world, n=n, penalty=0.0, **RULE | dict(tau=0.2))
    fit(step, world, agent, batch_size=128, max_steps=400, sample=agent["replay"].sample)
    choice = agent["actor_target"](toy.toy_states()).argmax(dim=1).numpy()
    share = toy.share_of_optimum(choice, GAMMA)
    assert share >= 0.95 if n == 1 else share < 0.95 and choice[0] == 0
