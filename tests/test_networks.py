import math

import pytest
import torch
from torch import nn

from helpers.frames import flatten
from helpers.networks import ENCODERS, Actor, Attention, Critic, NoisyLinear, Rainbow, UserVector

F, E = 3, 4
WIDTH = {"flat": F * (E + 1), "drr-p": (F + 3) * E, "drr-u": (F + 3) * E, "drr-ave": 3 * E, "attention": F * 64,
         "gru": 32, "ode": 32, "transformer": E}
SMALL = dict(frame_size=F, embed_size=E, hidden_size=8)
# two items (1, 2) and (3, 5), rated 4 and 1
HAND = torch.tensor([[1.0, 2.0, 3.0, 5.0, 4.0, 1.0]])
THREE_ITEMS = torch.tensor([[2.0, 3.0, 5.0, 3.0, 3.0, 3.0]])  # of one number


def states(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, F * E, generator=generator)
    return torch.cat([vectors, torch.randint(1, 11, (n, F), generator=generator) / 2], dim=1)


@pytest.mark.parametrize(("encoder", "state", "expected"), [
    (ENCODERS["flat"](2, 2), HAND, [1, 2, 3, 5, 4, 1]),
    (ENCODERS["drr-p"](2, 2), HAND, [1, 2, 3, 5, 3, 10]),             # 2·(1, 2) ⊙ ½·(3, 5) = (3, 10)
    (ENCODERS["drr-p"](3, 1), THREE_ITEMS, [2, 3, 5, 6, 40, 15]),     # every two places once
    (UserVector(2, 2), HAND, [-5 / 2, -4]),                           # u = (4 − 3)/2·(1, 2) + (1 − 3)/2·(3, 5)
    (ENCODERS["drr-u"](2, 2), HAND, [-5, -16, -15 / 4, -10, 3, 10]),  # u ⊙ (2, 4), u ⊙ (3/2, 5/2), then the pair
    # g = ((2, 4) + (3/2, 5/2)) / 2 = (7/4, 13/4)
    (ENCODERS["drr-ave"](2, 2), HAND, [-5 / 2, -4, -35 / 8, -13, 7 / 4, 13 / 4])
], ids=lambda value: type(value).__name__)
def test_encoders_by_hand(encoder, state, expected):
    weights = {"w": torch.tensor([2.0, 0.5, 2.0]), "weight": torch.eye(2), "bias": torch.zeros(2)}
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(weights[name.split(".")[-1]][:len(parameter)])
    assert encoder(state).tolist() == [expected]


def test_attention_by_hand():
    encoder = Attention(2, 2, 2)
    with torch.no_grad():
        for part, matrix in ((encoder.enter, [[1.0, 0, 0], [0, 1, 0]]), (encoder.query, [[0.0, 0], [0, 0]]),
                             (encoder.key, [[1.0, 0], [0, 1]]), (encoder.value, [[0.0, 1], [1, 0]])):
            part.weight.copy_(torch.tensor(matrix))
        encoder.enter.bias.zero_()
        encoder.place.copy_(torch.tensor([[10.0, 0], [0, 10]]))
    # x = (11, 2), (3, 15); without a query each place takes the mean of all values (2, 11), (15, 3)
    torch.testing.assert_close(encoder(HAND), torch.tensor([[11 + 8.5, 2 + 7, 3 + 8.5, 15 + 7]]))
    encoder.query.weight.data = torch.tensor([[2.0, 0], [0, 0]])
    # for x = (1, 0), (0, 1) the scores are 2/√2 and 0 for the first place, 0 and 0 for the second
    own = torch.e ** 2 ** 0.5 / (torch.e ** 2 ** 0.5 + 1)
    torch.testing.assert_close(encoder.weights(torch.eye(2)[None]), torch.tensor([[[own, 1 - own], [0.5, 0.5]]]))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_keeps_the_contract(name):
    torch.manual_seed(0)
    encoder, few = ENCODERS[name](F, E), slice(2, 3)
    state, action = states(50).requires_grad_(), torch.randn(50, E, requires_grad=True)
    v, rating = state[:, :F * E].unflatten(1, (F, E)), state[:, F * E:]
    turned = torch.cat([v.flip(1).flatten(1), rating.flip(1)], dim=1)
    assert torch.allclose(encoder(turned), encoder(state), atol=1e-3) == (name == "drr-ave")  # an average
    assert encoder(state).shape == (50, WIDTH[name]) and encoder.out_size == WIDTH[name]
    actor, critic = Actor(**SMALL, encoder=name).eval(), Critic(**SMALL, encoder=name).eval()
    proto_action, q = actor(state), critic(state, action)
    assert proto_action.shape == (50, E) and q.shape == (50, 1)
    torch.testing.assert_close(actor(state[few]), proto_action[few], rtol=0, atol=1e-6)  # alone as in a batch
    torch.testing.assert_close(critic(state[few], action[few]), q[few], rtol=0, atol=1e-6)
    of_state, of_action = torch.autograd.grad(q.sum(), (state, action))
    assert (of_action != 0).all() and (of_state[:, :-F] != 0).all()
    assert (of_state[:, -F:] != 0).all() == (name not in {"drr-p", "transformer"})  # pairs of items; a look-up
    with_gaps = actor(torch.cat([state, torch.rand(50, F) * 100], dim=1))
    assert with_gaps.shape == (50, E) and torch.allclose(with_gaps, proto_action, atol=1e-6) == (name != "ode")
    proto_action.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        half = actor(state.bfloat16())
        critic(state, half).float().sum().backward()
    assert (half - proto_action).abs().max() < 0.1 and all(p.grad.isfinite().all() for p in critic.parameters())


def test_ode_where_nothing_flows_is_a_gru():
    torch.manual_seed(0)
    gru, ode = ENCODERS["gru"](F, E, 8), ENCODERS["ode"](F, E, 8)
    ode.enter.load_state_dict(gru.enter.state_dict())
    ode.cell.load_state_dict({name[:-3]: weight for name, weight in gru.gru.state_dict().items()})
    ode.f = torch.zeros_like
    torch.testing.assert_close(ode(states(5)), gru(states(5)))


def test_a_transformers_place_is_the_state_of_the_frame_that_ends_there():
    torch.manual_seed(0)
    encoder, v, rating = ENCODERS["transformer"](7, E), torch.randn(5, 7, E), torch.randint(1, 11, (5, 7)) / 2
    known = encoder.along(v, rating)
    torch.testing.assert_close(encoder(flatten(v, rating)), known[:, -1])
    torch.testing.assert_close(encoder.along(v[:, :4], rating[:, :4]), known[:, :4], rtol=0, atol=1e-6)
    starred = encoder.along(v, torch.cat([rating[:, :4], rating[:, 4:] - 0.5], dim=1))
    assert torch.allclose(starred[:, :4], known[:, :4], atol=1e-6) and (starred[:, 4:] != known[:, 4:]).all()


@pytest.mark.parametrize(("make", "layers"), [(Actor, 2), (Critic, 2), (Rainbow, 3)])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_dropout_silences_that_share_of_every_hidden_layer_in_training_alone(make, layers, share):
    torch.manual_seed(0)
    network, silent = make(F, E, 64, dropout=share), []  # 64: no other layer is as wide
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and layer.in_features == 64:  # Rainbow's two heads read the same units
            layer.register_forward_pre_hook(lambda _, x: silent.append((x[0] == 0).float().mean().item()))
    arguments = (states(100), torch.randn(100, E))[:2 if make is Critic else 1]
    network.train()(*arguments)
    assert silent == pytest.approx([share] * layers, abs=0.03)
    before = torch.get_rng_state()
    network.eval()(*arguments)
    assert silent[layers:] == [0] * layers and torch.equal(before, torch.get_rng_state())  # nor is anything drawn


@pytest.mark.parametrize("make", [Actor, Rainbow])
def test_hidden_items_are_gone_whole_with_their_rating_in_training_alone(make):
    torch.manual_seed(0)
    network, seen = make(**SMALL, dropout=0.0, item_dropout=0.2).train(), []
    state = torch.cat([states(400), torch.rand(400, F)], dim=1)  # with gaps, which stay
    network.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    kept_state = state.clone()
    for name, parameter in network.named_parameters():
        if name.startswith(("body", "advantage")):
            nn.init.zeros_(parameter)  # what is left is the mix of the items, at first their mean
    mixed = network(state)
    v, rating, gaps = seen[0].split([F * E, F, F], dim=1)
    v, gone = v.unflatten(1, (F, E)), rating == 0
    assert 0.15 < gone.float().mean() < 0.25
    assert torch.equal((v == 0).all(dim=2), gone) and torch.equal(gaps, state[:, -F:])
    assert torch.equal(rating[~gone], state[:, F * E:-F][~gone]) and torch.equal(state, kept_state)
    torch.testing.assert_close(mixed, v.mean(dim=1))
    network.eval()(state)
    assert torch.equal(seen[1], state)


@pytest.mark.parametrize(("make", "options"), [
    *((make, dict(encoder=name)) for make in (Actor, Critic) for name in ENCODERS), (Critic, dict(n_atoms=5))])
def test_config_and_weights_rebuild_the_network(make, options):
    network, arguments = make(**SMALL, **options).eval(), (states(4), torch.ones(4, E))[:1 + (make is Critic)]
    twin = make(**network.config).eval()
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(*arguments), network(*arguments)) and twin.config == network.config


def test_a_noisy_layer_trembles_in_training_alone_as_its_paper_says():
    torch.manual_seed(0)
    layer, x = NoisyLinear(6, 2), torch.linspace(-1, 2, 6)[None]
    assert layer.weight_sigma.unique().item() == pytest.approx(0.5 / 6 ** 0.5) and layer.weight.abs().max() <= 6 ** -0.5
    assert torch.equal(layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        drawn = torch.cat([layer.train()(x) for _ in range(20_000)])
        variance = 2 / math.pi * (layer.weight_sigma.square() @ x[0].square()) \
            + (2 / math.pi) ** 0.5 * layer.bias_sigma.square()
    torch.testing.assert_close(drawn.mean(dim=0), layer.eval()(x)[0].detach(), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.var(dim=0), variance, rtol=0.05, atol=0)
    rows = layer.train()(x.expand(3, -1))
    assert torch.equal(rows[0], rows[2])  # one noise a call


def test_a_tilts_mean_rises_with_the_advantage_whatever_rainbow_is_made_of():
    torch.manual_seed(0)
    network, items, z = Rainbow(**SMALL, n_atoms=11).eval(), torch.randn(30, E), torch.linspace(-4, 6, 11)
    network.centre.copy_(items.mean(dim=0))
    with torch.no_grad():
        u, v = network.heads(states(4))
        assert torch.equal(u, network(states(4)))
        advantage = u @ (items - network.centre).T
        q = torch.stack([network.tilt(u, v, item.expand(4, -1)).softmax(dim=1) @ z for item in items], dim=1)
    torch.testing.assert_close(advantage.mean(dim=1), torch.zeros(4), rtol=0, atol=1e-5)
    assert torch.equal(q.argsort(), advantage.argsort()) and (q.sort().values.diff() > 0).all()
    network = Rainbow(**SMALL, n_atoms=1).eval()  # a single atom says the value itself
    u, v = network.heads(states(4))
    advantage = (u * items[:4]).sum(dim=1, keepdim=True) / E ** 0.5
    torch.testing.assert_close(network.tilt(u, v, items[:4]), v + math.exp(-2) * advantage)  # κ as it starts
    network = Rainbow(**SMALL, dueling=False, n_atoms=11).eval()  # without dueling a number tilts one curve for all
    v = network.heads(states(4))[1].detach()
    second = v.diff(dim=1).diff(dim=1)  # a tilt adds a straight line
    torch.testing.assert_close(second, second[:1].expand(4, -1), rtol=0, atol=1e-5)
    assert not torch.allclose(v[0], v[1])


@pytest.mark.parametrize("n_atoms", [1, 5])
@pytest.mark.parametrize("name", ENCODERS)
def test_values_among_many_actions_are_those_of_each_alone(name, n_atoms):
    torch.manual_seed(0)
    critic, state, actions = Critic(**SMALL, encoder=name, n_atoms=n_atoms).eval(), states(4), torch.randn(4, 7, E)
    alone = torch.stack([critic(state, actions[:, k]) for k in range(7)], dim=1)
    torch.testing.assert_close(critic.among(state, actions), alone[..., 0] if n_atoms == 1 else alone)
