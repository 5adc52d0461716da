from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.agents import foresight as acting
from helpers.agents import reinforce
from helpers.extra import foresight
from helpers.losses import log_policy
from tests.test_foresight import PATIENT, world_of

SETTINGS = replace(acting.ForesightSettings(), hidden_size=8, encoder="drr-ave", dropout=0.0, learning_rate=0.01, k=1)


class Constant(torch.nn.Module):
    """An actor that says the same in every state; with the identity for items, its softmax is softmax(θ)."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.as_tensor(theta, dtype=torch.float32) * len(theta) ** 0.5)

    def forward(self, state):
        return self.theta.expand(len(state), -1)


def log_by(beta, taken, n=4_000, seed=0):
    """Return one-step sessions of films drawn with chances beta (n,), each taken or not as `taken` (n,) says."""
    generator, n_items = torch.Generator().manual_seed(seed), len(beta)
    item = torch.multinomial(torch.as_tensor(beta), n, replacement=True, generator=generator)
    took, last = torch.as_tensor(taken)[item].bool(), torch.ones(n, dtype=torch.bool)
    return acting.Sessions(torch.eye(n_items), [
        torch.zeros(n, 2, dtype=torch.long), torch.full((n, 2), 3.0), item, took, 4.0 * took, ~took, last,
        torch.as_tensor(beta)[item].log()])


def agent_of(theta, rate=0.01):
    """Return an agent of one θ, whose critic says 0 and stays."""
    actor, baseline = Constant(theta), torch.nn.Parameter(torch.zeros(1))
    return {"actor": actor, "actor_target": Constant(theta),
            "critic": lambda state, action: baseline.expand(len(state), 1),
            "actor_optimiser": torch.optim.SGD(actor.parameters(), rate),
            "critic_optimiser": torch.optim.SGD([baseline], 0.0)}


def moved(step, agent, log, rounds=1):
    """Return how the actor's θ moved in steps on the whole log."""
    before = agent["actor"].theta.detach().clone()
    for _ in range(rounds):
        step(torch.arange(len(log)))
    return agent["actor"].theta.detach() - before


BETA, TAKEN = [0.1, 0.5, 0.2, 0.2], [0, 0, 1, 1]  # what β shows most is never taken


def test_with_its_weights_the_gradient_is_the_one_of_the_policy_itself():
    theta, log = [1.0, 0.0, 0.0, -1.0], log_by(BETA, TAKEN, 100_000)
    agent, pi = agent_of(theta), torch.tensor(theta).softmax(0)
    step = reinforce.learner_of("REINFORCE, γ = 0", log, agent["actor"], replace(SETTINGS, entropy=0.0, cap=1e9), agent,
                                None)
    own = moved(step, agent, log)
    returns = acting.returns_of(log.taken, log.last, 0.0)
    expected = pi * (torch.tensor(TAKEN) - (pi * torch.tensor(TAKEN)).sum()) / returns.std()
    assert torch.nn.functional.cosine_similarity(own, expected, dim=0) > 0.999
    plain = agent_of(theta)
    step = reinforce.learner_of("REINFORCE, γ = 0, no weights", log, plain["actor"], replace(SETTINGS, entropy=0.0),
                                plain, None)
    assert torch.nn.functional.cosine_similarity(moved(step, plain, log), expected, dim=0) < 0.97


def test_films_drawn_apart_climb_the_chance_of_drawing_one_film_twice():
    theta, log = [1.0, 0.0, 0.0, -1.0], log_by(BETA, TAKEN, 100_000)
    agent, head = agent_of(theta), Constant(torch.tensor(BETA).log())
    torch.manual_seed(0)
    step = reinforce.learner_of("REINFORCE, γ = 0, drawn apart", log, head, replace(SETTINGS, cap=1e9), agent, None)
    own, at = moved(step, agent, log), torch.tensor(theta, requires_grad=True)
    climb = torch.autograd.grad(at.softmax(0).square().sum(), at)[0]
    assert torch.nn.functional.cosine_similarity(own, climb, dim=0) > 0.99
    assert own[0] > 0 > own[2]  # the likeliest, which nobody takes; not what is taken


def test_films_drawn_apart_learn_the_same_whatever_is_taken():
    moves = []
    for taken in (TAKEN, [1, 0, 0, 0]):
        agent, log = agent_of([1.0, 0.0, 0.0, -1.0]), log_by(BETA, taken, 200_000)
        torch.manual_seed(0)
        settings = replace(SETTINGS, cap=10.0, k=4)
        step = reinforce.learner_of("REINFORCE, γ = 0, drawn apart", log, Constant(torch.tensor(BETA).log()), settings,
                                    agent, None)
        moves.append(moved(step, agent, log))
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.98


def test_a_written_log_says_how_likely_each_film_was():
    rng = np.random.default_rng(0)
    world, actor = world_of(rng.normal(size=(50, 12)), np.zeros((50, 12))), Constant(np.linspace(-1, 1, 12))
    log = reinforce.written_log(world, PATIENT, actor, torch.eye(12), torch.arange(50), k=3)
    log_pi = log_policy(actor(torch.zeros(1, 1)), torch.eye(12))[0]
    assert torch.allclose(log.log_b, log_pi[log.item])
    some = torch.tensor([7, 3, 7])
    assert torch.equal(reinforce.log_chances(actor, log, some, block=2), log.log_b[some])
    assert log.last.sum() == 50 and len(log) == 50 * 3  # ten films are left, three slates of three


def test_the_behaviour_head_finds_beta():
    log = log_by(BETA, TAKEN, 2_000)
    head = reinforce.fit_behaviour(log, 0, 150, hidden_size=8, encoder="drr-ave")
    estimated = reinforce.log_chances(head, log, torch.arange(len(log)))
    assert estimated.exp().mean().item() == pytest.approx(np.square(BETA).sum(), abs=0.03)
    assert (estimated - log.log_b).abs().max() < 0.3


def test_imitation_follows_what_was_taken_and_reinforce_what_was_taken_more_often():
    agent, log = agent_of([0.0] * 4), log_by([0.25, 0.5, 0.2, 0.05], [0, 1, 0, 1])
    step = reinforce.learner_of("imitation, taken films", log, agent["actor"], SETTINGS, agent, None)
    own = moved(step, agent, log)
    assert own[1] > 0 > own[3]  # a film that is always taken and seldom shown
    agent = agent_of([0.0] * 4)
    step = reinforce.learner_of("REINFORCE, γ = 0", log, agent["actor"], replace(SETTINGS, entropy=0.0), agent,
                                None)
    own = moved(step, agent, log)
    assert own[1] > 0 and own[3] > 0


def trap(visits=60, n=40):
    """Return world, choice and liking: half of the films please and are taken less, half are taken and disappoint."""
    pleases = torch.arange(n) % 2
    appeal, liking = (part.expand(visits, -1).numpy() for part in (1.5 - 1.5 * pleases, 2.0 * pleases - 1))
    return (world_of(appeal, liking, noise=0.3), lambda seen: torch.as_tensor(appeal[:len(seen)]),
            lambda visits: (3.0 + 2 * pleases).expand(len(visits.user), -1))


@pytest.mark.parametrize(("impatience", "gamma", "shows"), [(4.0, 0.99, 1), (4.0, 0.0, 0), (0.0, 0.99, 0)])
def test_models_learn_that_who_is_pleased_stays(impatience, gamma, shows):
    world, *models = trap()
    habits = foresight.Habits(impatience=impatience, satiation=0.0)
    agent = acting.learn_models(gamma, world, habits, *models, torch.arange(60), 6, SETTINGS)
    scores = agent(foresight.Visits(world, habits, torch.arange(3)))
    assert scores.argmax(dim=1).remainder(2).tolist() == [shows] * 3
    assert (agent.beliefs.leaves[1] < -1) == (impatience > 0)
    if not gamma:  # then a score is the chance of being taken, as the world has it
        assert scores[0, 0].item() == pytest.approx(0.82, abs=0.05) and scores[0, 1] < 0.6


def test_satisfaction_is_read_off_the_films_of_this_visit():
    world, *models = trap()
    world = world._replace(own_mean=world.first_stars.mean(dim=1))
    visits, rhos = foresight.Visits(world, foresight.Habits(), torch.arange(60)), (0.5, 0.8)
    for _ in range(3):
        seen = acting.look_at(visits, *models, rhos)
        few = (visits.rated > 0).sum(dim=1) <= 2 * visits.recent.shape[1]  # a frame holds all of this visit
        assert torch.allclose(seen.satisfaction[few, 1], visits.satisfaction[few], atol=1e-6)
        visits.step(foresight.best_unseen(seen.odds, visits)[:, 0])
    assert visits.satisfaction.abs().max() > 0.1


def test_a_score_and_a_weight_by_hand():
    world = world_of([[0.0] * 5], np.zeros((1, 5)))
    mean, stars = world.first_stars.mean(), torch.tensor([[0.0, 0, 1, 2, -2]])
    agent = acting.ModelBased(lambda seen: torch.eye(5)[[4]], lambda visits: mean + stars, (0.5,))
    visits = foresight.Visits(world, PATIENT, torch.tensor([0]))
    p = torch.tensor([0, 0, 0, 0, 1.0]).sigmoid()
    assert torch.allclose(agent(visits)[0], p)  # nothing follows
    agent.beliefs = acting.Beliefs(leaves=torch.tensor([0.0, 0.0]), to_come=torch.tensor([0.0, 1, 0, 0, 0]))
    future = (0.5 * stars[0]).exp() / 2  # half of them stay, and then e^s are to come
    assert torch.allclose(agent(visits)[0], p * (1 + future - 0.5))
    log_pi = torch.tensor([0.9, 0.01]).log()
    one, ten = (acting.top_k_weight(log_pi, log_pi, cap=10.0, k=k) for k in (1, 10))
    assert one.tolist() == [1, 1] and ten[0] < 1e-7 and ten[1].item() == pytest.approx(10 * 0.99 ** 9, rel=1e-5)
