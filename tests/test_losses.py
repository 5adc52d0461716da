import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import losses

THREE = torch.tensor([0.0, 1.0, 2.0])


@pytest.mark.parametrize(("p", "reward", "discount", "expected"), [
    # 0.5 + ½·(0, 1, 2) = 0.5, 1, 1.5: the first halves between atoms 0 and 1, the last between 1 and 2
    ([0.2, 0.5, 0.3], 0.5, 0.5, [0.1, 0.1 + 0.5 + 0.15, 0.15]),
    ([0.2, 0.5, 0.3], 0.0, 1.0, [0.2, 0.5, 0.3]),  # what hits an atom stays whole
    ([0.2, 0.5, 0.3], -9.0, 0.5, [1, 0, 0]),       # what leaves the support is kept at its ends
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


@pytest.mark.parametrize("n", [1, 3])
def test_returns_over_n_steps_by_hand_and_never_across_users(frames, n):
    gamma = 0.5
    t, discount = losses.n_step(frames, torch.arange(len(frames)), n, gamma)
    plain = frames.gather(torch.arange(len(frames)))
    assert torch.equal(t.state, plain.state) and torch.equal(t.action, plain.action)
    rewards, done = plain.reward[:, 0].tolist(), plain.done[:, 0].tolist()
    for i in range(len(frames)):
        total, m = 0.0, 0
        while m < n:
            total += gamma ** m * rewards[i + m]
            m += 1
            if done[i + m - 1]:
                break
        last = frames.gather(torch.tensor([i + m - 1]))
        assert t.reward[i, 0].item() == pytest.approx(total)
        assert discount[i, 0].item() == gamma ** m
        assert torch.equal(t.next_state[i], last.next_state[0]) and t.done[i] == last.done[0]


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.squared_error])
def test_a_loss_of_two_shapes_is_refused(loss):
    with pytest.raises(ValueError, match="would broadcast"):
        loss(torch.zeros(4, 3), torch.zeros(4, 1))


def test_losses_are_float32_even_of_half_precision():
    q = torch.tensor([[100.5]], dtype=torch.bfloat16)
    assert losses.squared_error(q, torch.tensor([[100.0]])).dtype == torch.float32
    assert losses.cross_entropy(torch.zeros(1, 3, dtype=torch.bfloat16), torch.eye(3)[:1]).dtype == torch.float32
    assert losses.log_policy(torch.zeros(1, 3, dtype=torch.bfloat16), torch.eye(3).bfloat16()).dtype == torch.float32


def test_a_sample_of_a_large_catalogue_gives_its_sums_without_bias_and_close_to_them():
    torch.manual_seed(0)
    items, proto_action = torch.randn(27_278, 128), 0.8 * torch.randn(512, 128)
    next_items = torch.randint(len(items), (512, 3))
    next_items[:9, 2] = -1
    sums = []
    for _ in range(8):
        few, rows = losses.sampled_items(items, next_items)
        assert len(few.vectors) < 4_000 and few.log_count.exp().sum().item() == pytest.approx(len(items), rel=1e-4)
        real = next_items >= 0
        assert torch.equal(few.vectors[rows[real]], items[next_items[real]]) and (rows[~real] == -1).all()
        assert (few.log_count[rows[real]] == 0).all()
        sums.append((losses.log_policy(proto_action, few).gather(1, rows[:, :1]), losses.mean_item(proto_action, few)))
    log_p, mean = (torch.stack(each) for each in zip(*sums, strict=True))
    whole = losses.log_policy(proto_action, items).gather(1, next_items[:, :1])
    assert (log_p - whole).abs().mean() < 0.03
    assert (log_p.exp().mean(dim=0) / whole.exp()).mean().item() == pytest.approx(1, abs=0.01)
    whole = losses.mean_item(proto_action, items)
    once, of_eight = ((each - whole).norm(dim=1).mean() / items.norm(dim=1).mean() for each in (mean[0], mean.mean(0)))
    assert once < 0.06 and of_eight < 0.5 * once  # of the length of an item


def test_cross_entropy_over_items_is_torchs_and_so_are_its_gradients():
    torch.manual_seed(0)
    h, items = (torch.randn(n, 16, requires_grad=True) for n in (70, 300_000))  # more than one block of rows
    target = torch.randint(300_000, (70,))
    ours = torch.autograd.grad(3 * losses.ItemCrossEntropy.apply(h, items, target), (h, items))
    torchs = torch.autograd.grad(3 * torch.nn.functional.cross_entropy(h @ items.T, target), (h, items))
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_the_loss_of_the_next_item_over_a_sample_is_near_the_whole_one():
    torch.manual_seed(0)
    h, items, target = 0.5 * torch.randn(32, 8), torch.randn(20_000, 8), torch.randint(20_000, (32,))
    whole = torch.nn.functional.cross_entropy(h @ items.T, target).item()
    drawn = torch.tensor([losses.next_item_loss(h, items, target).item() for _ in range(20)])
    assert abs(drawn.mean().item() - whole) < 0.05 and drawn.std() < 0.1
    few, target = items[:4096], target % 4096  # a small catalogue is summed over whole
    assert losses.next_item_loss(h, few, target).item() == losses.ItemCrossEntropy.apply(h, few, target).item()
    assert all(a is b for a, b in zip(losses.sampled_items(few, target), (few, target), strict=True))
