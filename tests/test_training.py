import numpy as np
import pytest
import torch

from helpers import training
from helpers.files import DataError
from helpers.networks import Actor


@pytest.fixture
def weight():
    return torch.nn.Linear(1, 1, bias=False)


def counting_update(weight, values=None):
    """Return an update that sets the weight to the number of the step, and reports the next of `values`."""
    state = {"step": 0}

    def update(index):
        state["step"] += 1
        with torch.no_grad():
            weight.weight.fill_(state["step"])
        return {"loss": torch.tensor(values[state["step"] - 1] if values else 1.0)}
    return update


def fit(frames, weight, update=None, **options):
    defaults = dict(batch_size=4, max_steps=6, log_every=1)
    return training.fit(update or counting_update(weight), frames, {"weight": weight}, **defaults | options)


def test_makes_exactly_the_steps_asked_for_and_logs_the_first_and_the_last(frames, weight):
    log = fit(frames, weight, max_steps=27, log_every=10)
    assert weight.weight.item() == 27
    assert log.index.tolist() == [1, 10, 20, 27]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_with_a_sentence_and_goes_back(frames, weight, bad):
    update = counting_update(weight, [1.0, 1.0, 1.0, 1.0, bad, 1.0])
    with pytest.raises(training.TrainingError, match="step 5: loss is not a finite number"):
        fit(frames, weight, update, safe_every=2)
    assert weight.weight.item() == 4


def test_every_transition_is_seen_once_an_epoch_in_an_order_of_the_seed(frames, weight):
    def order(seed):
        seen = []
        steps = -(-len(frames) // 3)
        fit(frames, weight, lambda index: seen.append(index) or {}, batch_size=3, max_steps=steps, seed=seed)
        return torch.cat(seen).tolist()
    assert sorted(order(0)) == list(range(len(frames)))
    assert order(0) == order(0) != order(1)


def test_log_is_two_plain_files_and_tensorboard(frames, weight, tmp_path):
    log = training.Log(tmp_path / "run")
    log.actions(0, logged=torch.ones(4, 3))
    fit(frames, weight, log=log, watch=lambda step: {"twice": 2.0 * step})
    log.actions(6, actor=torch.zeros(4, 3))
    log.close()
    scalars, actions = training.read_log(tmp_path / "run")
    assert scalars.index.tolist() == [1, 2, 3, 4, 5, 6] and scalars["twice"].tolist() == [2, 4, 6, 8, 10, 12]
    np.testing.assert_array_equal(actions["logged"][0], np.ones((4, 3)))
    np.testing.assert_array_equal(actions["actor"][6], np.zeros((4, 3)))
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1
    training.Log(tmp_path / "run").writer.close()
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


def test_policy_round_trip_rebuilds_the_actor_in_eval_mode(tmp_path):
    actor = Actor(frame_size=2, embed_size=3, hidden_size=8, encoder="drr-ave")
    training.save_policy(tmp_path / "p.pt", actor, {"actor": actor}, ndcg=0.5)
    again, checkpoint = training.load_policy(tmp_path / "p.pt")
    state = torch.randn(4, 8)
    assert not again.training and checkpoint["meta"] == {"ndcg": 0.5}
    torch.testing.assert_close(again(state), actor.eval()(state), rtol=0, atol=0)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:500]),
                                    lambda path: path.write_bytes(b"not a policy"),
                                    lambda path: torch.save({"weights": {}}, path),
                                    lambda path: torch.save(Actor(2, 3, 8), path)])
def test_a_damaged_or_foreign_policy_gets_a_sentence(tmp_path, damage):
    actor = Actor(frame_size=2, embed_size=3, hidden_size=8)
    training.save_policy(tmp_path / "p.pt", actor, {})
    damage(tmp_path / "p.pt")
    with pytest.raises(DataError, match="is not a policy that can be read"):
        training.load_policy(tmp_path / "p.pt")
