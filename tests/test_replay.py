import numpy as np
import pytest
import torch

from helpers.replay import Prioritised


def drawn(replay, batch_size=1000, rounds=50):
    index = torch.cat([replay.sample(batch_size)[0] for _ in range(rounds)])
    return np.bincount(index, minlength=replay.n) / len(index)


@pytest.mark.parametrize("n", [1, 5, 8, 1000])
def test_draws_evenly_at_first_and_then_in_proportion_to_priorities(n):
    replay = Prioritised(n, alpha=1.0, epsilon=0.0)
    np.testing.assert_allclose(replay.probability(), np.full(n, 1 / n))
    np.testing.assert_allclose(drawn(replay), np.full(n, 1 / n), atol=0.01)
    error = torch.arange(1, n + 1, dtype=torch.float32)
    replay.update(torch.arange(n), -error)  # the sign of an error does not matter
    expected = (error / error.sum()).numpy()
    np.testing.assert_allclose(replay.probability(), expected)
    np.testing.assert_allclose(drawn(replay), expected, atol=0.01)


def test_one_is_drawn_from_each_share_of_the_mass():
    assert all(Prioritised(8, seed=seed).sample(8)[0].tolist() == list(range(8)) for seed in range(5))
    one, other = Prioritised(1000, seed=0), Prioritised(1000, seed=1)
    assert not torch.equal(one.sample(64)[0], other.sample(64)[0])


def test_what_has_no_priority_is_not_drawn_and_epsilon_keeps_all_alive():
    replay = Prioritised(10, alpha=1.0, epsilon=0.0)
    replay.update(torch.arange(10), torch.tensor([0.0] * 9 + [1.0]))
    assert set(replay.sample(100)[0].tolist()) == {9}
    alive = Prioritised(10, alpha=1.0, epsilon=0.01)
    alive.update(torch.arange(10), torch.tensor([0.0] * 9 + [0.1]))
    np.testing.assert_allclose(alive.probability(), [0.05] * 9 + [0.55], rtol=1e-6)  # 0.01 of 0.2, and 0.11


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_is_refused_and_changes_nothing(bad):
    replay = Prioritised(6)
    replay.update(torch.arange(6), torch.arange(6.0))
    before = replay.tree.copy()
    with pytest.raises(ValueError, match="1 of 3"):
        replay.update(torch.tensor([5, 0, 2]), torch.tensor([[0.5], [bad], [2.0]]))
    np.testing.assert_array_equal(replay.tree, before)
    assert len(set(replay.sample(64)[0].tolist())) > 1


@pytest.mark.parametrize(("options", "alpha", "beta"), [(dict(), 0.6, 0.4), (dict(alpha=0.5, beta=0.0), 0.5, 0)])
def test_weights_by_hand(options, alpha, beta):
    replay = Prioritised(2, **options, epsilon=0.0)
    replay.update(torch.arange(2), torch.tensor([1.0, 3.0]))
    p = np.array([1, 3 ** alpha]) / (1 + 3 ** alpha)
    np.testing.assert_allclose(replay.probability(), p)
    index, weight = replay.sample(1000)
    assert weight.shape == (1000, 1) and weight.dtype == torch.float32
    # (n·P)^−β, divided by the largest, which is that of the rarer one: 1 and (P₀ / P₁)^β
    np.testing.assert_allclose(weight[index == 0], 1)
    np.testing.assert_allclose(weight[index == 1], (p[0] / p[1]) ** beta, rtol=1e-6)


def test_resumes_to_the_same_draws_and_refuses_another_size():
    replay = Prioritised(100, seed=1)
    replay.update(torch.arange(100), torch.rand(100))
    replay.sample(10)
    again = Prioritised(100, seed=2)
    again.load_state_dict(replay.state_dict())
    for a, b in zip(replay.sample(64), again.sample(64), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="100 transitions for 99"):
        Prioritised(99).load_state_dict(replay.state_dict())
