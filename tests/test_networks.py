import math

import pytest
import torch
from torch import nn

from helpers.networks import (
    ENCODERS,
    GRU,
    ODERNN,
    POLICIES,
    Actor,
    Attention,
    Critic,
    DRRave,
    DRRp,
    DRRu,
    Flat,
    Joint,
    NoisyLinear,
    Rainbow,
    UserVector,
)

F, E = 3, 4
WIDTH = {"flat": F * (E + 1), "drr-p": (F + 3) * E, "drr-u": (F + 3) * E, "drr-ave": 3 * E, "attention": F * 64,
         "gru": 32, "ode": 32}
SMALL = dict(frame_size=F, embed_size=E, hidden_size=8)
# two items (1, 2) and (3, 5), rated 4 and 1
HAND = torch.tensor([[1.0, 2.0, 3.0, 5.0, 4.0, 1.0]])


def states(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, F * E, generator=generator)
    return torch.cat([vectors, torch.randint(1, 11, (n, F), generator=generator) / 2], dim=1)


def set_weights(module, w):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("map.weight"):
                parameter.copy_(torch.eye(2))
            elif name.endswith("map.bias"):
                parameter.zero_()
            elif name.endswith("w"):
                parameter.copy_(torch.tensor(w))
    return module


def test_flat_keeps_the_state():
    assert torch.equal(Flat(2, 2)(HAND), HAND)


def test_pairwise_products_by_hand():
    encoder = set_weights(DRRp(2, 2), [2.0, 0.5])
    # 2·(1, 2) ⊙ ½·(3, 5) = (3, 10)
    assert encoder(HAND).tolist() == [[1, 2, 3, 5, 3, 10]]


def test_pairs_are_every_two_places_once():
    state = torch.tensor([[2.0, 3.0, 5.0, 3.0, 3.0, 3.0]])  # three items of one number
    assert DRRp(3, 1)(state).tolist() == [[2, 3, 5, 6, 10, 15]]


def test_user_vector_by_hand():
    # (4 − 3)/2·(1, 2) + (1 − 3)/2·(3, 5) = (−5/2, −4)
    assert set_weights(UserVector(2, 2), [])(HAND).tolist() == [[-5 / 2, -4]]


def test_user_times_items_by_hand():
    encoder = set_weights(DRRu(2, 2), [2.0, 0.5])
    # u = (−5/2, −4); u ⊙ (2, 4), u ⊙ (3/2, 5/2), then the pair
    assert encoder(HAND).tolist() == [[-5, -16, -15 / 4, -10, 3, 10]]


def test_average_by_hand():
    encoder = set_weights(DRRave(2, 2), [2.0, 0.5])
    # g = ((2, 4) + (3/2, 5/2)) / 2 = (7/4, 13/4)
    assert encoder(HAND).tolist() == [[-5 / 2, -4, -35 / 8, -13, 7 / 4, 13 / 4]]


def test_attention_without_a_query_takes_the_mean_of_all_places():
    torch.manual_seed(0)
    encoder, state = Attention(F, E, 8), states(2)
    torch.nn.init.zeros_(encoder.query.weight)
    x = encoder.enter_places(state)
    assert torch.equal(encoder.weights(x), torch.full((2, F, F), 1 / F))
    mean = encoder.value(x).mean(dim=1, keepdim=True)
    torch.testing.assert_close(encoder(state), (x + mean).flatten(1))


def test_attention_by_hand():
    encoder = Attention(2, 2, 2)
    for part, matrix in ((encoder.query, [[2.0, 0], [0, 2]]), (encoder.key, [[1.0, 0], [0, 1]]),
                         (encoder.value, [[0.0, 1], [1, 0]])):
        part.weight.data = torch.tensor(matrix)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    # scores 2·x·xᵀ/√2: an item fits itself by √2, the other by 0
    own = torch.e ** 2 ** 0.5 / (torch.e ** 2 ** 0.5 + 1)
    torch.testing.assert_close(encoder.weights(x), torch.tensor([[[own, 1 - own], [1 - own, own]]]))


@pytest.mark.parametrize("name", ["attention", "gru", "ode", "flat"])
def test_encoder_knows_the_order_of_the_frame(name):
    torch.manual_seed(0)
    encoder, state = ENCODERS[name](F, E), states(1)
    v, rating = state[:, :F * E].unflatten(1, (F, E)), state[:, F * E:]
    turned = torch.cat([v.flip(1).flatten(1), rating.flip(1)], dim=1)
    assert not torch.allclose(encoder(turned), encoder(state), atol=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder_takes_states_with_gaps_and_the_ode_alone_reads_them(name):
    torch.manual_seed(0)
    actor, state = Actor(**SMALL, encoder=name).eval(), states(5)
    days = torch.rand(5, F) * 100
    with_gaps = actor(torch.cat([state, days], dim=1))
    assert with_gaps.shape == (5, E)
    assert torch.allclose(with_gaps, actor(state), atol=1e-6) == (name != "ode")


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_under_bfloat16_is_near_to_itself_in_float32(name):
    torch.manual_seed(0)
    actor, critic = Actor(**SMALL, encoder=name).eval(), Critic(**SMALL, encoder=name)
    state = states(50)
    with torch.autocast("cpu", torch.bfloat16):
        proto_action = actor(state.bfloat16())
        critic(state, proto_action).float().sum().backward()
    assert (proto_action - actor(state)).abs().max() < 0.1
    assert all(p.grad.isfinite().all() for p in critic.parameters())


def test_ode_where_nothing_flows_is_a_gru():
    torch.manual_seed(0)
    gru, ode = GRU(F, E, 8), ODERNN(F, E, 8)
    ode.enter.load_state_dict(gru.enter.state_dict())
    ode.cell.load_state_dict({name[:-3]: weight for name, weight in gru.gru.state_dict().items()})
    ode.f = torch.zeros_like
    torch.testing.assert_close(ode(states(5)), gru(states(5)))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_is_as_wide_as_it_says(name):
    encoder = ENCODERS[name](F, E)
    assert encoder(states(5)).shape == (5, WIDTH[name]) and encoder.out_size == WIDTH[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_actor_and_critic_have_the_shapes_of_the_contract(name):
    state = states(5)
    proto_action = Actor(**SMALL, encoder=name)(state)
    assert proto_action.shape == (5, E)
    assert Critic(**SMALL, encoder=name)(state, proto_action).shape == (5, 1)


def test_default_sizes_are_those_of_the_contract():
    state = torch.zeros(2, 1290)
    assert Actor()(state).shape == (2, 128)
    assert Critic()(state, torch.zeros(2, 128)).shape == (2, 1)
    assert Actor().body[0].in_features == 1290 and Critic().enter.in_features == 1418


@pytest.mark.parametrize("name", ENCODERS)
def test_row_alone_equals_row_in_a_batch(name):
    torch.manual_seed(0)
    state, action = states(6), torch.randn(6, E)
    actor, critic = Actor(**SMALL, encoder=name).eval(), Critic(**SMALL, encoder=name).eval()
    for i in range(6):
        s, a = state[i:i + 1], action[i:i + 1]
        torch.testing.assert_close(actor(s), actor(state)[i:i + 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(critic(s, a), critic(state, action)[i:i + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_no_gradient_flows_from_one_row_to_another(name):
    state = states(4).requires_grad_()
    Actor(**SMALL, encoder=name).eval()(state)[1].sum().backward()
    touched = state.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ENCODERS)
def test_value_depends_on_the_action_and_on_the_state(name):
    torch.manual_seed(0)
    critic = Critic(**SMALL, encoder=name)
    state, action = states(1).requires_grad_(), torch.randn(1, E, requires_grad=True)
    critic(state, action).sum().backward()
    assert action.grad.abs().sum() > 0 and state.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - {"drr-p"}))
def test_ratings_reach_the_encoder(name):
    state = states(1).requires_grad_()
    ENCODERS[name](F, E)(state).sum().backward()
    assert (state.grad[:, -F:] != 0).all()


@pytest.mark.parametrize("dropout, item_dropout", [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_is_active_in_training_alone(dropout, item_dropout):
    torch.manual_seed(0)
    actor = Actor(**SMALL, dropout=dropout, item_dropout=item_dropout)
    state = states(20)
    assert not torch.equal(actor.train()(state), actor(state))
    assert torch.equal(actor.eval()(state), actor(state))


def test_without_dropout_training_and_evaluation_agree():
    actor = Actor(**SMALL, dropout=0.0, item_dropout=0.0)
    state = states(20)
    assert torch.equal(actor.train()(state), actor.eval()(state))


def test_evaluation_draws_no_random_numbers():
    actor = Actor(**SMALL).eval()
    before = torch.get_rng_state()
    actor(states(3))
    assert torch.equal(before, torch.get_rng_state())


def test_hidden_items_are_gone_whole_with_their_rating():
    torch.manual_seed(0)
    actor = Actor(**SMALL, dropout=0.0, item_dropout=0.5).train()
    seen = []
    actor.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    state = states(200)
    kept_state = state.clone()
    actor(state)
    v, rating = seen[0][:, :-F].unflatten(1, (F, E)), seen[0][:, -F:]
    gone = rating == 0
    assert 0.4 < gone.float().mean() < 0.6
    assert torch.equal((v == 0).all(dim=2), gone)
    assert torch.equal(seen[0][:, -F:][~gone], state[:, -F:][~gone])
    assert torch.equal(state, kept_state)


def test_untrained_mix_is_the_mean_of_the_frame():
    actor = Actor(**SMALL).eval()
    for parameter in actor.body[-1].parameters():
        torch.nn.init.zeros_(parameter)
    state = states(5)
    torch.testing.assert_close(actor(state), state[:, :-F].unflatten(1, (F, E)).mean(dim=1))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("make", [Actor, Critic])
def test_saved_config_and_weights_rebuild_the_network(tmp_path, make, name):
    network = make(**SMALL, encoder=name).eval()
    torch.save({"config": network.config, "weights": network.state_dict()}, tmp_path / "p.pt")
    saved = torch.load(tmp_path / "p.pt", weights_only=True)
    twin = make(**saved["config"]).eval()
    twin.load_state_dict(saved["weights"])
    arguments = (states(4),) if make is Actor else (states(4), torch.ones(4, E))
    assert torch.equal(twin(*arguments), network(*arguments))
    assert twin.config == network.config


def test_every_parameter_of_the_actor_learns():
    for name in ENCODERS:
        actor = Actor(**SMALL, encoder=name, dropout=0.0)
        actor(states(8)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.parameters()), name


def test_a_joint_layer_is_a_linear_layer_over_both_and_leaves_out_the_gradient_nobody_wants():
    torch.manual_seed(0)
    joint, x, y = Joint(5, 3, 4), torch.randn(7, 5), torch.randn(7, 3, requires_grad=True)
    torch.testing.assert_close(joint(x, y), nn.functional.linear(torch.cat([x, y], dim=1), joint.weight, joint.bias))
    torch.manual_seed(0)
    assert torch.equal(nn.Linear(8, 4).weight, joint.weight)
    joint(x, y).sum().backward()
    assert y.grad.shape == (7, 3) and joint.weight.grad.shape == (4, 8)


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


def test_a_tilts_mean_rises_with_the_advantage_and_the_best_dot_product_is_the_best_value():
    torch.manual_seed(0)
    network, items, z = Rainbow(**SMALL, n_atoms=11).eval(), torch.randn(30, E), torch.linspace(-4, 6, 11)
    network.centre.copy_(items.mean(dim=0))
    with torch.no_grad():
        u, v = network.heads(states(4))
        assert torch.equal(u, network(states(4)))
        advantage = u @ (items - network.centre).T
        q = torch.stack([network.tilt(u, v, item.expand(4, -1)).softmax(dim=1) @ z for item in items], dim=1)
    torch.testing.assert_close(advantage.mean(dim=1), torch.zeros(4), rtol=0, atol=1e-5)
    for row in range(4):
        assert torch.equal(q[row].argsort(), advantage[row].argsort())
        assert (q[row].sort().values.diff() > 0).all()


@pytest.mark.parametrize("options", [dict(), dict(n_atoms=1), dict(dueling=False), dict(noisy=False)])
def test_rainbow_has_the_shapes_and_is_rebuilt_from_its_config(options):
    network, action = Rainbow(**SMALL, **options).eval(), torch.randn(5, E)
    assert network(states(5)).shape == (5, E)
    assert network.logits(states(5), action).shape == (5, options.get("n_atoms", 51))
    twin = POLICIES["Rainbow"](**network.config).eval()
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.logits(states(5), action), network.logits(states(5), action))


def test_rainbow_with_a_single_atom_says_the_value_itself():
    network = Rainbow(**SMALL, n_atoms=1).eval()
    u, v = network.heads(states(3))
    item = torch.randn(3, E)
    advantage = (u * item).sum(dim=1, keepdim=True) / E ** 0.5
    torch.testing.assert_close(network.tilt(u, v, item), v + network.log_scale.exp() * advantage)


def test_rainbow_without_dueling_has_one_curve_for_all_states_that_a_number_tilts():
    network = Rainbow(**SMALL, dueling=False, n_atoms=11).eval()
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
