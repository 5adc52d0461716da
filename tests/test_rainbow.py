import copy
from functools import partial

import pytest
import torch

from helpers import toy
from helpers.agents import rainbow
from helpers.losses import behaviour_loss, log_policy, mean_of, n_step, project
from helpers.training import fit, load_policy, save_policy
from tests.test_rl_invariants import FULL, GAMMA, STILL, SUPPORT


@pytest.fixture
def frames(twenty_users):
    return twenty_users


def new(frames, seed=0, **options):
    return rainbow.new_rainbow_agent(seed, frames.items, 3, 1e-3, **STILL | options)


def one_step(frames):
    t = frames.gather(torch.arange(len(frames)))
    return t, torch.full((len(frames), 1), GAMMA)


@pytest.mark.parametrize("double", [True, False])
def test_one_network_chooses_the_next_item_and_the_target_judges_it(frames, double):
    agent, other = new(frames, noisy=False), new(frames, seed=1, noisy=False)
    agent["actor_target"] = other["actor_target"]
    t, discount = one_step(frames)
    loss, logits, next_logits, _ = rainbow.rainbow_loss(agent, t, discount, frames.items, SUPPORT, double)
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


def test_neither_noise_nor_dropout_is_in_the_choice_and_both_are_in_what_learns(frames):
    agent, (t, discount) = new(frames, dropout=0.3), one_step(frames)
    one, again = (rainbow.rainbow_loss(agent, t, discount, frames.items, SUPPORT) for _ in range(2))
    assert torch.equal(one[2], again[2]) and not torch.allclose(one[1], again[1])
    assert agent["actor"].training


def test_with_a_single_atom_the_loss_is_a_squared_error_of_values(frames):
    agent, (t, discount) = new(frames, n_atoms=1), one_step(frames)
    for options, spread in ((dict(), 5), (dict(spread=1.0), 1)):
        loss, q, next_q, _ = rainbow.rainbow_loss(agent, t, discount, frames.items, SUPPORT, **options)
        torch.testing.assert_close(loss, ((q - t.reward - discount * next_q)[:, 0] / spread).square() / 2)


@pytest.mark.parametrize("options", [dict(), dict(dueling=False), dict(n_atoms=1)])
def test_a_step_goes_down_the_gradient_of_its_loss_by_hand(frames, options):
    agent, index = new(frames, noisy=False, **options), torch.arange(40, 80)
    agent["actor_target"] = new(frames, seed=1, noisy=False, **options)["actor"]
    assert torch.equal(agent["actor"].centre, frames.items.mean(dim=0) if options.get("dueling", True) else 0 *
                       frames.items[0])
    agent["actor_optimiser"] = torch.optim.SGD(agent["actor"].parameters(), 0.1)
    t, discount = n_step(frames, index, 3, GAMMA)
    kl, logits, next_logits, u = rainbow.rainbow_loss(agent, t, discount, frames.items, SUPPORT, False)
    behaviour = behaviour_loss(log_policy(u, frames.items), frames.next_items(index, 2), 0.7)
    loss, old = kl.mean() + 3 * behaviour, [p.clone() for p in agent["actor"].parameters()]
    gradients = torch.autograd.grad(loss, agent["actor"].parameters())
    scalars = rainbow.rainbow_update(agent, frames, index, double=False, future=2, penalty=3.0, **FULL)
    mean = (lambda q: q.mean()) if "n_atoms" in options else (lambda x: mean_of(x, SUPPORT).mean())
    by_hand = {"loss/actor": loss, "loss/critic": kl.mean(), "loss/behaviour": behaviour,
               "Q/logged action": mean(logits), "Q/policy's action": mean(next_logits)}
    torch.testing.assert_close(scalars, by_hand)
    for new_, was, gradient in zip(agent["actor"].parameters(), old, gradients, strict=True):
        torch.testing.assert_close(new_, was - 0.1 * gradient)


def test_weights_scale_the_value_loss_alone_and_a_step_sets_the_priorities_it_drew(frames):
    index, losses = torch.arange(64), {}
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        agent = new(frames, noisy=False, n_transitions=len(frames))
        losses[weight] = rainbow.rainbow_update(agent, frames, (index, torch.full((64, 1), weight)), **FULL)
    torch.testing.assert_close(losses[0.25]["loss/critic"], losses[1.0]["loss/critic"] / 4)
    torch.testing.assert_close(losses[0.25]["loss/behaviour"], losses[1.0]["loss/behaviour"])
    leaves = agent["replay"].state_dict()["priority"]
    assert (leaves[64:] == 1).all() and (leaves[:64] != 1).all()
    scalars = rainbow.rainbow_update(agent, frames, index, penalty=0.0, **FULL)
    assert "loss/behaviour" not in scalars and scalars["loss/actor"] == scalars["loss/critic"]


@pytest.mark.parametrize("options", [dict(), dict(n_atoms=1), dict(dueling=False), dict(noisy=False)])
def test_every_parameter_learns_and_a_saved_agent_ranks_and_values_as_before(frames, tmp_path, options):
    agent = new(frames, **options)
    before = copy.deepcopy(dict(agent["actor"].named_parameters()))
    rainbow.rainbow_update(agent, frames, torch.arange(64), **FULL)
    assert all(not torch.equal(before[name], learnt) for name, learnt in agent["actor"].named_parameters())
    save_policy(tmp_path / "rainbow.pt", agent["actor_target"], agent, support=SUPPORT.tolist())
    policy, _ = load_policy(tmp_path / "rainbow.pt")
    state, action = frames.gather(torch.arange(5)).state, frames.items[:5]
    assert torch.equal(policy(state), agent["actor_target"](state))
    assert torch.equal(policy.logits(state, action), agent["actor_target"].logits(state, action))


@pytest.mark.parametrize("n", [1, 3])
def test_one_step_targets_learn_the_optimum_of_the_three_film_world_and_three_step_ones_its_trap(n):
    world = toy.toy_frames()
    agent = rainbow.new_rainbow_agent(0, world.items, 1, 3e-3, n_transitions=len(world), **STILL)
    step = partial(rainbow.rainbow_update, agent, world, penalty=0.0, **FULL | dict(n=n, tau=0.2))
    fit(step, world, agent, batch_size=128, max_steps=400, sample=agent["replay"].sample)
    choice = agent["actor_target"](toy.toy_states()).argmax(dim=1).numpy()
    share = toy.share_of_optimum(choice, GAMMA)
    assert share >= 0.95 if n == 1 else share < 0.95 and choice[0] == 0
