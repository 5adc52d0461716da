import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import field, offline
from helpers.files import PROJECT
from helpers.frames import Frames
from helpers.networks import Actor
from tools.readme import block, page_of


def test_exponential_weights_are_of_standard_deviations_and_end_at_the_largest():
    advantage = torch.tensor([-2.0, 0.0, 2.0, 0.0])  # standard deviation √2, so A / σ is −√2, 0, √2, 0
    weights = offline.exp_weights(advantage, beta=2.0)
    assert weights.tolist() == pytest.approx([math.exp(-2 ** -0.5), 1, math.exp(2 ** -0.5), 1], rel=1e-5)
    assert offline.exp_weights(advantage, beta=0.1).tolist() == pytest.approx([0, 1, 20, 1], abs=1e-6)
    assert offline.exp_weights(1e3 * advantage, beta=2.0).tolist() == pytest.approx(weights.tolist(), rel=1e-5)


def test_binary_weights_and_those_by_q_by_hand():
    assert offline.binary_weights(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [0, 0, 1]
    q = torch.tensor([2.0, 4.0, 8.0, -2.0])  # of mean 3
    assert offline.q_weights(q).tolist() == pytest.approx([2 / 3, 4 / 3, 8 / 3, 0.05])


def test_the_expectile_by_hand():
    error = torch.tensor([2.0, -1.0])  # (0.7·4 + 0.3·1) / 2
    assert offline.expectile_loss(error, 0.7).item() == pytest.approx(1.55)
    assert offline.expectile_loss(error, 0.5).item() == pytest.approx(error.square().mean().item() / 2)
    v = torch.linspace(0, 1, 1001)  # of one 0 and one 1 the expectile is τ itself
    losses = [offline.expectile_loss(torch.tensor([0.0, 1.0]) - each, 0.7).item() for each in v]
    assert v[int(np.argmin(losses))].item() == pytest.approx(0.7)


def test_a_head_values_an_item_by_its_vector():
    head, action = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.5]]), torch.tensor([[3.0, 1.0, 9.0, 9.0]])
    assert offline.q_at(head, action).tolist() == [[0.5 + (3 + 2) / 2]]  # √4


def test_two_heads_leave_the_actor_as_it_is():
    torch.manual_seed(0)
    plain = Actor(2, 4, encoder="attention").eval()
    torch.manual_seed(0)
    shared, state = offline.TwoHeads(2, 4, encoder="attention").eval(), torch.randn(3, 10)
    torch.testing.assert_close(plain(state), shared(state))
    torch.testing.assert_close(shared.both(state)[0], shared(state))
    assert shared.both(state)[1].shape == (3, 2, 5)


def test_what_a_head_earns_teaches_no_target_and_an_advantage_has_no_gradient():
    log = pd.DataFrame({"user_id": 1, "item_id": np.arange(14) % 7, "rating": 3.0, "timestamp": range(14)})
    frames, index = Frames(log, np.arange(7), np.eye(7, 4), field.results.FRAME_SIZE), torch.arange(4)
    policy = Actor(field.results.FRAME_SIZE, 4, encoder="attention").eval()
    for kind in ("AWR", "CRR", "IQL"):
        critic = offline.new_critic(kind, frames, 0)
        assert offline.step_of(kind, critic, frames, index, policy, learn=True).requires_grad
        with torch.no_grad():
            assert offline.step_of(kind, critic, frames, index, policy, learn=False).shape == (4, 1)
        assert not any(each.requires_grad for each in critic["q_target"].parameters())


def test_a_page_shows_what_the_ways_reached():
    result = json.loads((PROJECT / "res" / "field.json").read_text(encoding="utf-8"))
    assert block("field", field.table(result)) in page_of("field").read_text(encoding="utf-8")
    for name in {row["way"] for row in result["tried"]}:
        assert field.chosen_of(result["tried"], name) == result["chosen"][name]
