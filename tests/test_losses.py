import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import losses

THREE = torch.tensor([0.0, 1.0, 2.0])


@pytest.mark.parametrize(("p", "reward", "discount", "expected"), [
    # 0.5 + ½·(0, 1, 2) = 0.5, 1, 1.5: the first halves between atoms 0 and 1, the last between 1 and 2
    ([0.2, 0.5, 0.3], 0.5, 0.5, [0.1, 0.1 + 0.5 + 0.15, 0.15]),
    ([0.2, 0.5, 0.3], 0.25, 0.0, [0.75, 0.25, 0]),  # the nearer atom gets more
    ([0.2, 0.5, 0.3], 0.0, 1.0, [0.2, 0.5, 0.3]),   # what hits an atom stays whole,
    ([0.2, 0.8, 0.0], 1.0, 1.0, [0.0, 0.2, 0.8]),   # what moves by whole atoms too,
    ([0.2, 0.5, 0.3], -9.0, 0.5, [1, 0, 0]),        # and what leaves the support is kept at its ends
    ([0.2, 0.5, 0.3], 9.0, 0.5, [0, 0, 1])])
def test_projection_of_three_atoms_by_hand(p, reward, discount, expected):
    out = losses.project(torch.tensor([p]), torch.tensor([[reward]]), torch.tensor([[discount]]), THREE)
    assert out[0].tolist() == pytest.approx(expected)


@given(st.lists(st.floats(0.01, 1), min_size=51, max_size=51), st.floats(-4, 5), st.sampled_from([0.9, 0.81, 0.5]))
def test_projection_has_mass_one_and_keeps_the_mean_inside_the_support(weights, reward, discount):
    support = torch.linspace(-40, 50, 51, dtype=torch.float64)
    p = torch.tensor([weights], dtype=torch.float64)
    p /= p.sum()
    out = losses.project(p, torch.tensor([[reward]], dtype=torch.float64), torch.tensor([[discount]]).double(), support)
    assert out.sum().item() == pytest.approx(1) and (out >= 0).all()
    assert (out @ support).item() == pytest.approx(reward + discount * (p @ support).item(), abs=1e-6)


def test_returns_over_n_steps_by_hand_and_never_across_users(frames):
    gamma = 0.5
    t, discount = losses.n_step(frames, torch.arange(len(frames)), 3, gamma)
    plain = frames.gather(torch.arange(len(frames)))
    assert torch.equal(t.state, plain.state) and torch.equal(t.action, plain.action)
    rewards, done = plain.reward[:, 0].tolist(), plain.done[:, 0].tolist()
    for i in range(len(frames)):
        total, m = 0.0, 0
        while m < 3:
            total += gamma ** m * rewards[i + m]
            m += 1
            if done[i + m - 1]:
                break
        last = frames.gather(torch.tensor([i + m - 1]))
        assert t.reward[i, 0].item() == pytest.approx(total)
        assert discount[i, 0].item() == gamma ** m
        assert torch.equal(t.next_state[i], last.next_state[0]) and t.done[i] == last.done[0]


def test_one_step_is_the_plain_transition(frames):
    index = torch.arange(len(frames))
    t, discount = losses.n_step(frames, index, 1, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(t, frames.gather(index), strict=True))
    assert torch.allclose(discount, torch.full((len(frames), 1), 0.9))


def test_polyak_moves_the_target_alone_and_by_tau():
    target, source = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for module, value in ((target, 1.0), (source, 5.0)):
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, value)
    losses.polyak(target, source, 0.25)
    assert [p.item() for p in target.parameters()] == [2, 2] and [p.item() for p in source.parameters()] == [5, 5]


def test_the_behaviour_term_by_hand():
    log_p = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]))
    next_items = torch.tensor([[0, 1], [2, -1], [2, 0]])  # row 0 of the item matrix is an item; −1 is none
    by_hand = -((np.log(0.5) + 0.5 * np.log(0.25)) / 1.5 + np.log(0.8) + (np.log(0.6) + 0.5 * np.log(0.2)) / 1.5) / 3
    assert losses.behaviour_loss(log_p, next_items, 0.5).item() == pytest.approx(by_hand, rel=1e-6)


def test_the_policy_and_its_mean_item_by_hand():
    items = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    p = torch.tensor([[2 * np.log(3.0), 0, 0, 0]], dtype=torch.float32)  # divided by √4: odds of 3 to 1
    torch.testing.assert_close(losses.log_policy(p, items), torch.tensor([[0.75, 0.25]]).log())
    torch.testing.assert_close(losses.mean_item(p, items), torch.tensor([[0.75, 0.25, 0, 0]]))


def test_mean_of_a_distribution_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    assert losses.mean_of(logits, THREE).tolist() == [[pytest.approx(1.1)]]


def test_cross_entropy_by_hand_is_the_entropy_at_its_least():
    m = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    entropy = -sum(p * np.log(p) for p in (0.2, 0.5, 0.3))
    assert losses.cross_entropy(m[:1].log(), m[:1]).tolist() == [pytest.approx(entropy, rel=1e-5)]
    assert losses.cross_entropy(torch.zeros(2, 3), m).tolist() == pytest.approx([np.log(3)] * 2)


def test_squared_error_by_hand():
    assert losses.squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])).item() == 5 / 2


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.squared_error])
def test_a_loss_of_two_shapes_is_refused(loss):
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 1\) would broadcast"):
        loss(torch.zeros(4, 3), torch.zeros(4, 1))


def test_losses_are_float32_even_of_half_precision():
    q = torch.tensor([[100.5]], dtype=torch.bfloat16)
    assert losses.squared_error(q, torch.tensor([[100.0]])).dtype == torch.float32
    assert losses.cross_entropy(torch.zeros(1, 3, dtype=torch.bfloat16), torch.eye(3)[:1]).dtype == torch.float32
    assert losses.log_policy(torch.zeros(1, 3, dtype=torch.bfloat16), torch.eye(3).bfloat16()).dtype == torch.float32
