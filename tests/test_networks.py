import pytest
import torch

from helpers.networks import ENCODERS, Actor, Critic, DRRave, DRRp, DRRu, Flat, UserVector

F, E = 3, 4
WIDTH = {"flat": F * (E + 1), "drr-p": (F + 3) * E, "drr-u": (F + 3) * E, "drr-ave": 3 * E}
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
    assert Actor().body[0].in_features == 1290 and Critic().body[0].in_features == 1418


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


@pytest.mark.parametrize("name", ["drr-u", "drr-ave", "flat"])
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
