import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import losses

THREE = torch.tensor([0.0, 1.0, 2.0])


def project(p, reward, discount, support=THREE):
    return losses.project(torch.tensor([p]), torch.tensor([[reward]]), torch.tensor([[discount]]), support)[0].tolist()


def test_projection_of_three_atoms_by_hand():
    # 0.5 + ½·(0, 1, 2) = 0.5, 1, 1.5: the first halves between atoms 0 and 1, the last between 1 and 2
    assert project([0.2, 0.5, 0.3], 0.5, 0.5) == pytest.approx([0.1, 0.1 + 0.5 + 0.15, 0.15])


def test_projection_keeps_what_hits_an_atom_and_what_moves_by_whole_atoms():
    assert project([0.2, 0.5, 0.3], 0.0, 1.0) == pytest.approx([0.2, 0.5, 0.3])
    assert project([0.2, 0.8, 0.0], 1.0, 1.0) == pytest.approx([0.0, 0.2, 0.8])


@pytest.mark.parametrize(("reward", "expected"), [(-9.0, [1, 0, 0]), (9.0, [0, 0, 1])])
def test_projection_collects_what_leaves_the_support_at_its_ends(reward, expected):
    assert project([0.2, 0.5, 0.3], reward, 0.5) == pytest.approx(expected)


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
    rewards = frames.gather(torch.arange(len(frames))).reward[:, 0].tolist()
    done = frames.gather(torch.arange(len(frames))).done[:, 0].tolist()
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


def test_mean_of_a_distribution_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    assert losses.mean_of(logits, THREE).tolist() == [[pytest.approx(1.1)]]


def test_cross_entropy_by_hand_is_the_entropy_at_its_least_and_refuses_two_shapes():
    m = torch.tensor([[0.2, 0.5, 0.3]])
    least = -sum(p * np.log(p) for p in (0.2, 0.5, 0.3))
    assert losses.cross_entropy(m.log(), m).item() == pytest.approx(least, rel=1e-5)
    assert losses.cross_entropy(torch.zeros(1, 3), m).item() == pytest.approx(np.log(3))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 1\) would broadcast"):
        losses.cross_entropy(torch.zeros(4, 3), torch.zeros(4, 1))


def test_losses_are_float32_even_of_half_precision():
    q = torch.tensor([[100.5]], dtype=torch.bfloat16)
    assert losses.squared_error(q, torch.tensor([[100.0]])).dtype == torch.float32
    assert losses.cross_entropy(torch.zeros(1, 3, dtype=torch.bfloat16), torch.eye(3)[:1]).dtype == torch.float32
    assert losses.log_policy(torch.zeros(1, 3, dtype=torch.bfloat16), torch.eye(3).bfloat16()).dtype == torch.float32
