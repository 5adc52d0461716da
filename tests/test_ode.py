import math
from itertools import pairwise

import pytest
import torch
from torchdiffeq import odeint

from helpers.agents.ode import FlatGaps
from helpers.networks import ODERNN

F, E, H = 4, 3, 5
YEAR = math.log(366)


def encoder(steps=1, seed=0):
    torch.manual_seed(seed)
    return ODERNN(F, E, H, steps).double()


def states(n, days, seed=0):
    generator = torch.Generator().manual_seed(seed)
    known = torch.randn(n, F * (E + 1), generator=generator, dtype=torch.float64)
    return torch.cat([known, torch.as_tensor(days, dtype=torch.float64).expand(n, F)], dim=1)


def error(steps):
    """Return how far the solver is off where f is A·h, whose flow is known."""
    ode, generator = encoder(steps), torch.Generator().manual_seed(1)
    a = torch.randn(H, H, generator=generator, dtype=torch.float64) / H ** 0.5 - torch.eye(H, dtype=torch.float64)
    ode.f = lambda h: h @ a.T
    h, dt = torch.randn(7, H, generator=generator, dtype=torch.float64), torch.linspace(0, 1.5, 7, dtype=torch.float64)
    true = torch.stack([torch.linalg.matrix_exp(a * t) @ row for row, t in zip(h, dt, strict=True)])
    return float((ode.evolve(h, dt[:, None]) - true).abs().max())


def test_the_solver_is_of_the_fourth_order():
    assert error(1) < 0.2 and error(32) < 1e-6
    assert math.log2(error(8) / error(16)) == pytest.approx(4, abs=0.3)  # half the step, a sixteenth of the error


@pytest.mark.parametrize(("days", "steps", "tolerance"), [(1.0, 1, 1e-4), (30.0, 1, 0.01), (365.0, 1, 0.1),
                                                          (100.0, 16, 1e-6)])
def test_one_step_of_the_solver_is_enough_and_many_are_as_an_adaptive_one(days, steps, tolerance):
    h, dt = 2 * torch.rand(50, H, dtype=torch.float64) - 1, math.log1p(days) / YEAR
    ode = encoder(steps)
    true = odeint(lambda _, h: ode.f(h), h, torch.tensor([0.0, dt], dtype=torch.float64), rtol=1e-9, atol=1e-9)[-1]
    assert (ode.evolve(h, torch.full((50, 1), dt).double()) - true).abs().max() < tolerance


def test_a_day_is_a_ninth_of_a_year_and_lies_between_ratings_without_times():
    ode, with_days, seen = encoder(), states(5, 1.0), []
    assert torch.equal(ode(with_days), ode(with_days[:, :-F]))
    evolve = ode.evolve
    ode.evolve = lambda h, dt: seen.append(float(dt[0, 0])) or evolve(h, dt)
    ode(states(1, [0.0, 1.0, 30.0, 365.0]))
    assert seen == pytest.approx([0, math.log(2) / YEAR, math.log(31) / YEAR, 1])


def test_the_state_jumps_at_ratings_alone_and_stays_between_minus_one_and_one():
    ode = encoder()
    path = ode.path(states(3, 0.0))
    assert torch.equal(path[0][0], torch.zeros(3, H, dtype=torch.float64))
    for (_, after), (before, jumped) in pairwise(path):
        assert torch.equal(before, after) and not torch.equal(jumped, before)
    for days in (0.0, 1.0, 30.0, 365.0):
        assert all((h.abs() < 1).all() for pair in ode.path(states(50, days)) for h in pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(h.dtype == torch.float32 for pair in ode.float().path(states(5, 3.0).float()) for h in pair)


def test_lesson_shows_how_to_tell_a_network_the_time():
    told, state = FlatGaps(F, E), states(2, [0.0, 1.0, 30.0, 365.0])
    assert told.out_size == F * (E + 2) and torch.equal(told(state)[:, :-F], state[:, :-F])
    assert told(state)[0, -F:].tolist() == pytest.approx([0, math.log(2) / YEAR, math.log(31) / YEAR, 1])
