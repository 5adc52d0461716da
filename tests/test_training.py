import contextlib
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import training
from helpers.files import DataError
from helpers.networks import Actor
from helpers.replay import Prioritised


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


def test_a_loss_that_diverges_stops_with_a_sentence_and_goes_back(frames, weight):
    update = counting_update(weight, [1.0, 1.0, 1.0, -2e6, 1.0, 1.0])
    with pytest.raises(training.TrainingError, match=r"step 4: loss is -2e\+06, beyond 1,000,000: the train"):
        fit(frames, weight, update, safe_every=2)
    assert weight.weight.item() == 2
    log = fit(frames, weight, counting_update(weight, [2e6] * 6), limit=1e7)
    assert len(log) == 6


def test_a_weight_that_is_no_number_is_never_kept(frames, weight, tmp_path):
    def update(index):  # as when a gradient overflows after a loss that was still finite
        steps.append(len(index))
        with torch.no_grad():
            weight.weight.fill_(float("nan") if len(steps) == 4 else len(steps))
        return {"loss": torch.tensor(1.0)}
    steps = []
    with pytest.raises(training.TrainingError, match="step 4: weight holds numbers that are not finite"):
        fit(frames, weight, update, safe_every=2, checkpoint=tmp_path / "c.pt")
    assert weight.weight.item() == 2
    assert torch.load(tmp_path / "c.pt", weights_only=True)["parts"]["weight"]["weight"].item() == 2


def noisy_agent(seed=0):
    """Return (parts, update) of a network with dropout, Adam, and a replay: all that resuming must bring back."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    parts = {"net": net, "optimiser": torch.optim.Adam(net.parameters(), 1e-2), "replay": Prioritised(7, seed=seed)}

    def update(batch, frames, scale=1.0):
        index, weight = batch
        t = frames.gather(index)
        error = net(t.state) * scale - t.reward
        parts["optimiser"].zero_grad()
        (weight * error.square()).mean().backward()
        parts["optimiser"].step()
        parts["replay"].update(index, error)
        return {"loss": error.square().mean()}
    return parts, update


def run_noisy(frames, folder, stop_at=None, scale=1.0, kill=KeyboardInterrupt):
    parts, update = noisy_agent()
    frames.tied[1:] = ~frames.is_last[:-1]  # each log is of one second
    made = []

    def watch(step):
        made.append(step)
        if step == stop_at:
            raise kill
        return {"step squared": float(step ** 2)}
    log = training.Log(folder / "run")
    table = training.fit(partial(update, frames=frames, scale=scale), frames, parts, batch_size=4, max_steps=23,
                         log_every=1, safe_every=5, sample=lambda size: parts["replay"].sample(size),
                         shuffle_ties=True, watch=watch, log=log, checkpoint=folder / "c.pt")
    log.close()
    return table, parts, made


@pytest.mark.parametrize("stop_at", [1, 5, 6, 13, 22])
def test_a_run_stopped_at_any_step_goes_on_to_the_identical_end(frames, tmp_path, stop_at):
    whole, parts, _ = run_noisy(frames, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_noisy(frames, tmp_path / "stopped", stop_at)
    resumed, again, made = run_noisy(frames, tmp_path / "stopped")
    assert made[0] == (stop_at - 1) // 5 * 5 + 1 and made[-1] == 23
    pd.testing.assert_frame_equal(resumed, whole)
    for a, b in zip(parts["net"].parameters(), again["net"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(parts["replay"].probability(), again["replay"].probability())
    read = [training.read_log(tmp_path / name / "run")[0] for name in ("whole", "stopped")]
    pd.testing.assert_frame_equal(*read)
    assert not (tmp_path / "stopped" / "c.pt").exists()


def test_by_default_a_resumed_run_goes_on_in_the_middle_of_an_epoch(frames, weight, tmp_path):
    def order(stop_at):
        seen = []

        def update(index):
            seen.append(index.tolist())
            return {}

        def watch(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return {}
        with pytest.raises(KeyboardInterrupt) if stop_at else contextlib.nullcontext():
            fit(frames, weight, update, batch_size=2, max_steps=20, safe_every=3, watch=watch,
                checkpoint=tmp_path / "c.pt")
        return seen
    whole = order(None)
    first, rest = order(14), order(None)
    assert first[:12] + rest == whole


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(frames, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_noisy(frames, tmp_path, stop_at=13)
    _, _, made = run_noisy(frames, tmp_path, scale=0.5)
    assert made[0] == 1


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b"not a checkpoint"),
                                   lambda path: torch.save({"another": "dict"}, path)], ids=["bytes", "dict"])
def test_a_damaged_checkpoint_gets_a_sentence(frames, weight, tmp_path, write):
    write(tmp_path / "c.pt")
    with pytest.raises(DataError, match=r"c\.pt is not a checkpoint of this run .*: delete it to begin anew"):
        fit(frames, weight, checkpoint=tmp_path / "c.pt")


def test_a_full_disk_stops_with_a_sentence_and_keeps_the_last_copy(frames, weight, tmp_path, monkeypatch):
    saved = []

    def save(value, path, real=torch.save):
        if len(saved) == 1:
            path.write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:816] . PytorchStreamWriter failed writing file")
        saved.append(value["step"])
        real(value, path)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(training.TrainingError, match=r"step 4: c.pt cannot be written \(.*failed writing file\); all "
                                                     "parts are back at step 2. Make room"):
        fit(frames, weight, safe_every=2, checkpoint=tmp_path / "c.pt")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"] and weight.weight.item() == 2
    assert torch.load(tmp_path / "c.pt", weights_only=True)["step"] == 2


def test_an_update_that_refuses_its_numbers_stops_with_its_sentence_and_goes_back(frames, weight):
    replay, count = Prioritised(len(frames)), counting_update(weight)

    def update(index):
        scalars = count(index)
        replay.update(index, torch.full((len(index),), float("nan") if weight.weight > 4 else 1.0))
        return scalars
    with pytest.raises(training.TrainingError, match=r"step 5: 4 of 4 errors are not finite .*; all parts are back at "
                                                     r"step 4\.$"):
        fit(frames, weight, update, safe_every=2)
    assert weight.weight.item() == 4


def test_no_steps_give_an_empty_table_and_an_empty_log(frames, weight, tmp_path):
    log = training.Log(tmp_path / "run")
    table = fit(frames, weight, max_steps=0, log=log)
    log.close()
    scalars, actions = training.read_log(tmp_path / "run")
    assert (len(table), table.index.name, len(scalars), scalars.index.name, actions) == (0, "step", 0, "step", {})


@pytest.mark.parametrize("max_steps, looked", [(1, [1]), (3, [3]), (9, [4, 8, 9]), (12, [4, 8, 12])])
def test_a_watcher_looks_at_the_last_step_too(frames, tmp_path, max_steps, looked):
    torch.manual_seed(0)
    actor, critic = Actor(frame_size=2, embed_size=3, hidden_size=8), lambda state, action: action.sum(1, keepdim=True)
    log = training.Log(tmp_path)
    watch = training.watcher(log, {"actor": actor}, critic, frames.gather(torch.arange(1)), frames.items,
                             lambda policy: 0.25, look_every=4, keep_at=(1, 10, max_steps))  # of one transition
    table = fit(frames, actor, lambda index: {}, max_steps=max_steps, watch=watch, log=log)
    log.close()
    assert table["valid/NDCG@10"].dropna().index.tolist() == looked
    assert training.read_log(tmp_path)[0]["valid/NDCG@10"].dropna().index.tolist() == looked


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (1, 1)])
def test_actions_of_one_state_or_of_one_dimension_are_kept(tmp_path, shape, monkeypatch):
    log, images = training.Log(tmp_path), []
    monkeypatch.setattr(log.writer, "add_image", lambda name, grey, *_, **__: images.append(grey))
    log.actions(3, actor=torch.randn(shape))
    log.close()
    assert images[0].shape == (shape[1], shape[1]) and images[0].isfinite().all()
    assert training.read_log(tmp_path)[1]["actor"][3].shape == shape


def test_half_precision_multiplies_only_and_follows_the_weights():
    net = torch.nn.Linear(64, 64)
    x = torch.randn(8, 64)
    with training.autocast("cpu"):
        before = net(x)
        with torch.no_grad():
            net.weight.zero_(), net.bias.zero_()
        after = net(x)  # a cached copy of the old weights would give the old answer
    assert net.weight.dtype == torch.float32
    assert not torch.equal(before, after) and (after == 0).all()


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
