from itertools import pairwise
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn

from benchmarks import taobao as study
from helpers.extra import taobao
from helpers.files import DataError
from tests.test_files import Evil


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository with networks of chance."""
    torch.manual_seed(0)
    folder = tmp_path / "VirtualTaobao" / "virtualTB" / "data"
    folder.mkdir(parents=True)
    for name, sizes in taobao.SIZES.items():
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.LeakyReLU())]
        torch.save(nn.Sequential(*layers[:-1]).state_dict(), folder / f"{name}.pt")
    return tmp_path / "VirtualTaobao"


@pytest.fixture
def shop(copy):
    return taobao.read_taobao(copy)


def same_action(visits):
    return torch.full((len(visits.here), taobao.ACTION), 0.5)


def test_a_person_has_one_of_each_group_of_attributes_and_states_are_bounded(shop):
    visits = taobao.Visits(shop, 40)
    assert all((group.sum(dim=1) == 1).all() for group in visits.person.split(taobao.GROUPS, dim=1))
    visits.step(torch.full((40, taobao.ACTION), 5.0))  # beyond the bounds: shown as 1
    assert visits.states.shape == (40, taobao.STATE) and visits.states.abs().max() <= 1


def test_without_repetition_lengths_are_those_of_the_network_whatever_is_shown(shop):
    pages = study.play(shop, same_action, 4_000, 1, 0.0)[1]
    ends = taobao.Visits(shop, 4_000, 1).ends.mean(dim=0)
    ends[1] += ends[0]  # published: whoever would leave after 0 pages sees one
    expected = (ends * torch.arange(len(ends)))[1:].sum().item()
    assert abs(pages.mean() - expected) < 4 * pages.std() / len(pages) ** 0.5
    assert pages.min() >= 1 and pages.max() <= taobao.PAGES


def test_the_chance_to_stay_by_hand(shop):
    visits = taobao.Visits(shop, 3, repetition=2.0)
    visits.ends = torch.zeros(3, taobao.PAGES + 1)
    visits.ends[:, 1:4] = torch.tensor([0.2, 0.4, 0.4])
    one = torch.zeros(3, taobao.ACTION)
    one[:, 0] = 1.0
    assert visits.staying(one).tolist() == pytest.approx([0.8] * 3)  # nothing was shown before
    visits.page += 1
    visits.lately = torch.stack([one[0], -one[0], one[0].roll(1)])  # the same, its opposite, something else
    assert visits.staying(one).tolist() == pytest.approx([0.5 ** np.exp(2), 0.5, 0.5])  # of the 0.8, 0.4 leave
    visits.page += 1
    assert visits.staying(one).tolist() == pytest.approx([0.0] * 3)


def test_the_same_seed_is_the_same_visit_and_who_has_left_clicks_no_more(shop):
    one, other = (study.play(shop, same_action, 50, 3, 1.0) for _ in range(2))
    assert (one == other).all() and (one != study.play(shop, same_action, 50, 4, 1.0)).any()
    visits = taobao.Visits(shop, 50, 3)
    visits.here[:25] = False
    clicks, left = visits.step(same_action(visits))
    assert (clicks[:25] == 0).all() and not left[:25].any() and (clicks[25:] > 0).any()


def test_repetition_drives_people_away_and_two_opposite_pages_in_turn_do_not(shop):
    def in_turn(visits):
        return same_action(visits) * (-1) ** int(visits.page[0])
    pages = {kappa: study.play(shop, same_action, 2_000, 5, kappa)[1].mean() for kappa in (0.0, 2.0)}
    assert pages[2.0] < 0.8 * pages[0.0]
    assert study.play(shop, in_turn, 2_000, 5, 2.0)[1].mean() == pytest.approx(pages[0.0], rel=0.1)


def test_the_world_speaks_gymnasium(shop):
    world = gymnasium.make("recnn/Taobao-v0", taobao=shop, repetition=1.0)
    check_env(world.unwrapped, skip_render_check=True)
    state, _ = world.reset(seed=7)
    again, _ = world.reset(seed=7)
    assert (state == again).all()
    _, reward, _, cut, _ = world.step(np.ones(taobao.ACTION, dtype=np.float32))
    assert 0 <= reward <= taobao.MOST_CLICKS and not cut


@pytest.mark.parametrize("harm", [
    Path.unlink, lambda path: path.write_bytes(b""), lambda path: torch.save(nn.Linear(3, 3).state_dict(), path),
    lambda path: torch.save(Evil(Path.touch, path.with_name("ran")), path)],
    ids=["missing", "empty", "another network", "a program"])
def test_a_copy_that_is_none_gets_a_sentence(copy, harm):
    harm(next(copy.rglob("leave_model.pt")))
    with pytest.raises(DataError, match="leave_model"):
        taobao.read_taobao(copy)
    assert not [*copy.rglob("ran")]


def test_leaving_ends_a_return(shop):
    agent = study.new_agent(0)
    state = torch.rand(64, taobao.STATE)
    t = study.Transition(state, torch.rand(64, taobao.ACTION), torch.ones(64, 1), state, torch.ones(64, 1))
    for _ in range(300):
        study.update(agent, t, gamma=0.9)
    assert agent["critic"](t.state, t.action).mean().item() == pytest.approx(1, abs=0.1)  # not 1 / (1 − γ)


def test_the_search_climbs_and_stays_within_bounds():
    best = study.climbed(lambda a: -(a - 0.3).square().sum(dim=1), torch.zeros(2, 5))
    assert torch.allclose(best, torch.full((2, 5), 0.3), atol=0.02)
    assert study.climbed(lambda a: a.sum(dim=1), torch.zeros(2, 5)).max() <= 1
