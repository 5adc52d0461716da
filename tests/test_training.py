import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import training
from helpers.files import DataError
from helpers.losses import mean_item
from helpers.networks import Actor
from helpers.replay import Prioritised


def fit(frames, update=lambda index: {}, parts=None, **options):
    return training.fit(update, frames, parts or {}, **dict(batch_size=4, max_steps=6, log_every=1) | options)


def small_actor():
    torch.manual_seed(0)
    return Actor(frame_size=2, embed_size=3, hidden_size=8, encoder="drr-ave")


def test_makes_exactly_the_steps_asked_for_and_logs_the_first_and_the_last(frames):
    made = []
    log = fit(frames, lambda index: made.append(index) or {"loss": -2e6}, max_steps=27, log_every=10, limit=1e7)
    assert len(made) == 27 and log.index.tolist() == [1, 10, 20, 27] and (log["loss"] == -2e6).all()


@pytest.mark.parametrize("shuffle_ties", [True, False])
def test_every_pass_and_its_ties_have_an_order_of_their_own_and_of_the_seed(twenty_users, shuffle_ties):
    frames, seen, batches = twenty_users, [], []
    frames.tied[1:] = ~frames.is_last[:-1]  # each log is of one second
    as_they_came = frames.item_idx.clone()
    frames.shuffle_ties(9)
    fit(frames, lambda index: seen.append(frames.item_idx.clone()) or batches.append(index) or {}, batch_size=60,
        max_steps=12, seed=3, shuffle_ties=shuffle_ties)
    assert torch.equal(frames.item_idx, as_they_came)
    for step, order in enumerate(seen):  # 240 transitions, so four batches a pass
        if step % 4 == 0:
            passed = frames.sample(60, seed=3000 + step // 4)
        assert torch.equal(batches[step], next(passed))
        frames.shuffle_ties(3000 + step // 4 if shuffle_ties else None)
        assert torch.equal(order, frames.item_idx), step
    assert len({tuple(order.tolist()) for order in seen}) == (3 if shuffle_ties else 1)


@pytest.mark.parametrize("fault, step, back, words", [
    (float("nan"), 1, 0, "loss is nan"), (float("inf"), 5, 4, "loss is inf"), (-2e6, 3, 2, "loss is -2e+06"),
    ("weight", 7, 6, "weight holds"), ("optimiser", 4, 2, "optimiser holds"),
    (ValueError("3 errors are NaN\nand more"), 5, 4, "3 errors are NaN;")])
def test_what_goes_wrong_stops_with_a_sentence_and_all_parts_go_back(frames, fault, step, back, words):
    weight, numbers = torch.nn.Linear(1, 1, bias=False), itertools.count(1)
    optimiser = torch.optim.SGD(weight.parameters(), 0.1, momentum=0.9)
    weight.weight.data.zero_()
    optimiser.state[weight.weight]["momentum_buffer"] = torch.zeros(1, 1)

    @torch.no_grad()
    def update(index):
        number = next(numbers)
        broken = {fault: float("nan")} if number == step else {}  # as when a gradient overflows, say
        weight.weight.fill_(broken.get("weight", number))
        optimiser.state[weight.weight]["momentum_buffer"] = torch.full((1, 1), broken.get("optimiser", float(number)))
        if broken and isinstance(fault, ValueError):
            raise fault
        return {"loss": torch.tensor(fault if broken and isinstance(fault, float) else 1.0)}
    with pytest.raises(training.TrainingError) as caught:
        fit(frames, update, {"weight": weight, "optimiser": optimiser}, safe_every=2, max_steps=7)
    assert all(part in str(caught.value) for part in (f"step {step}: ", words, f"back at step {back}"))
    assert "more" not in str(caught.value)
    assert weight.weight.item() == optimiser.state[weight.weight]["momentum_buffer"].item() == back


def run_noisy(frames, rate=1e-2, max_steps=23, stop_at=None, prioritised=True, **options):
    """Train a network with dropout, Adam and a replay; return (logged rows, parts, steps made)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimiser, replay = torch.optim.Adam(net.parameters(), rate), Prioritised(7)
    frames.tied[1:] = ~frames.is_last[:-1]
    steps = itertools.count(options["start"]["step"] + 1 if options.get("start") else 1)
    made = []

    def update(batch):
        made.append(next(steps))
        if made[-1] == stop_at:
            raise KeyboardInterrupt
        index, weight = batch if prioritised else (batch, 1.0)
        t = frames.gather(index)
        error = net(t.state) - t.reward
        optimiser.zero_grad()
        (weight * error.square()).mean().backward()
        optimiser.step()
        replay.update(index, error)
        return {"loss": error.square().mean()}
    parts = {"net": net, "optimiser": optimiser, "replay": replay}
    table = fit(frames, update, parts, max_steps=max_steps, safe_every=5, sample=replay.sample if prioritised else None,
                shuffle_ties=True, **options)
    return table, parts, made


def test_a_priority_follows_its_rating_when_ties_are_shuffled_and_when_they_go_back(twenty_users):
    frames, replay, wanted = twenty_users, Prioritised(len(twenty_users), alpha=1.0, epsilon=0.0), {}
    frames.tied[1:] = ~frames.is_last[:-1]  # each log is of one second
    frames.rating.copy_(torch.arange(len(frames.rating)))  # every rating has a name
    names = list[set]()

    def check():
        name = (frames.gather(torch.arange(len(frames))).reward[:, 0] / 2 + 2.5).tolist()
        highest = max(wanted.values(), default=1)  # of what had no frame before it
        known = {one: wanted.get(one, highest) for one in name}
        assert np.allclose(replay.tree[replay.leaf:replay.leaf + replay.n], list(known.values()), rtol=1e-6)
        wanted.clear()
        wanted.update(known)
        return name

    def update(_):
        name = check()
        names.append(set(name))
        wanted.update({one: 1 + one for one in name})
        replay.update(torch.arange(len(frames)), 1 + torch.tensor(name))
        return {}
    fit(frames, update, {"replay": replay}, batch_size=60, max_steps=12, seed=3, shuffle_ties=True)
    check()
    fit(frames, update, {"replay": replay}, batch_size=60, max_steps=5, seed=4, shuffle_ties=True)
    check()
    assert len({frozenset(some) for some in names}) == 5  # in each pass other ratings have a whole frame before them


def assert_same(run, other):
    pd.testing.assert_frame_equal(run[0], other[0])
    for a, b in zip(run[1]["net"].parameters(), other[1]["net"].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(run[1]["replay"].probability(), other[1]["replay"].probability())


def test_after_an_interruption_training_starts_anew_under_the_settings_it_is_given(frames, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_they_came, log = frames.item_idx.clone(), training.Log(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_noisy(frames, max_steps=60, stop_at=45, log=log)
    log.writer.close()
    assert torch.equal(frames.item_idx, as_they_came)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "events.out" not in path.name]
    again = run_noisy(frames, max_steps=60, rate=2e-2)
    assert again[2][0] == 1
    assert_same(again, run_noisy(frames, max_steps=60, rate=2e-2))


@pytest.mark.parametrize("prioritised", [True, False])
def test_from_any_kept_copy_training_goes_on_to_the_identical_end(frames, prioritised):
    copies = []
    whole = run_noisy(frames, prioritised=prioritised, keep=copies.append)
    assert [copy["step"] for copy in copies] == [5, 10, 15, 20, 23]
    for copy in (*copies, copies[0]):  # and it stays as it was kept
        resumed = run_noisy(frames, prioritised=prioritised, start=copy)
        assert resumed[2] == list(range(copy["step"] + 1, 24))
        assert_same(resumed, whole)


@pytest.mark.parametrize("bf16", [True, False])
def test_half_precision_multiplies_only_and_follows_the_weights(frames, monkeypatch, bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    net, made = torch.nn.Linear(64, 64), []

    @torch.no_grad()
    def update(index):
        made.append(net(torch.ones(8, 64)))
        net.weight.zero_(), net.bias.zero_()  # a cached copy of the old weights would give the old answer
        made.append(net(torch.ones(8, 64)))
        return {}
    fit(frames, update, max_steps=1, bf16=bf16)
    assert made[0].dtype == (torch.bfloat16 if bf16 else torch.float32) and net.weight.dtype == torch.float32
    assert made[0].any() and not made[1].any()


@pytest.mark.parametrize("max_steps", [0, 6])
def test_log_is_two_plain_files_and_tensorboard(frames, tmp_path, max_steps):
    for _ in range(2):  # a second run takes the place of the first
        log = training.Log(tmp_path)
        log.actions(0, logged=torch.ones(4, 3))
        table = fit(frames, log=log, max_steps=max_steps, watch=lambda step: {"twice": 2.0 * step})
        log.actions(6, actor=torch.zeros(4, 3))
        log.close()
    scalars, actions = training.read_log(tmp_path)
    assert scalars.index.name == table.index.name == "step"
    assert scalars.to_dict() == table.to_dict() == ({"twice": dict.fromkeys(range(1, 7)) | {
        step: 2.0 * step for step in range(1, 7)}} if max_steps else {})
    np.testing.assert_array_equal(actions["logged"][0], np.ones((4, 3)))
    np.testing.assert_array_equal(actions["actor"][6], np.zeros((4, 3)))
    board = EventAccumulator(str(tmp_path)).Reload()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    assert [event.step for event in board.Scalars("twice")] == list(range(1, 7)) if max_steps else True
    assert board.Tags()["histograms"] == ["actions/logged", "actions/actor"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("actions, grey", [
    ([[1.0, 0.0], [3.0, 0.0]], [[1, 0.5], [0.5, 0.5]]), ([[1.0, 3.0], [2.0, 2.0]], [[1, 0], [0, 1]]),
    ([[1.0]], [[0.5]])])
def test_the_covariance_of_actions_is_drawn_from_black_over_grey_to_white(tmp_path, monkeypatch, actions, grey):
    log, images = training.Log(tmp_path), []
    monkeypatch.setattr(log.writer, "add_image", lambda name, image, *_, **__: images.append(image.tolist()))
    log.actions(3, actor=torch.tensor(actions))
    log.scalars(3, {"loss": 1.0}), log.scalars(3, {"late": 2.0})
    log.close()
    scalars, read = training.read_log(tmp_path)
    assert images == [grey] and read["actor"][3].tolist() == actions
    assert scalars.loc[3].to_dict() == {"loss": 1.0, "late": 2.0}  # of one step, one row


def test_a_policy_is_watched_over_states_and_in_eval_mode():
    state, items = torch.tensor([[1.0, 0], [3, 0], [5, 12]]), torch.tensor([[1.0, 0], [5, 12]])
    policies = {"actor": torch.nn.Dropout(0.9), "target": torch.nn.Dropout(0.9).eval()}  # the identity, in eval mode
    numbers = training.watch_policy(policies, state, items)
    nearest = torch.cdist(mean_item(state, items), items).min(dim=1).values.mean().item()
    of_policy = {"mean": 3.5, "std": (2 + 48 ** 0.5) / 2, "variance": 26, "length": 17 / 3}
    assert numbers == pytest.approx({
        **{f"{name}/{key}": value for name in policies for key, value in of_policy.items()}, "items/length": 7,
        "distance/proto-action to nearest item": 2 / 3, "distance/mean item to nearest item": nearest})
    assert policies["actor"].training and not policies["target"].training
    assert training.watch_policy(policies, state[:1], items)["actor/std"] == 0


@pytest.mark.parametrize("max_steps, looked", [(1, [1]), (3, [3]), (9, [4, 8, 9]), (12, [4, 8, 12])])
def test_a_watcher_looks_at_the_last_step_too(frames, tmp_path, max_steps, looked):
    actor, other, t, log = small_actor().eval(), small_actor(), frames.gather(torch.arange(3)), training.Log(tmp_path)
    watch = training.watcher(log, {"other": other, "actor": actor}, lambda state, action: action.sum(1, keepdim=True),
                             t, frames.items, lambda policy: float(policy is actor), 4, keep_at=(1, 10, max_steps))
    table = fit(frames, max_steps=max_steps, watch=watch, log=log)
    log.close()
    scalars, actions = training.read_log(tmp_path)
    assert table["valid/NDCG@10"].dropna().to_dict() == dict.fromkeys(looked, 1)
    pd.testing.assert_frame_equal(scalars, table, check_exact=False)
    assert table["Q held-out users/logged action"].iloc[-1] == pytest.approx(t.action.sum(1).mean().item())
    played = mean_item(actor(t.state), frames.items)
    assert table["Q held-out users/policy's action"].iloc[-1] == pytest.approx(played.sum(1).mean().item())
    assert set(actions["actor"]) == set(actions["other"]) == {1, 10, max_steps} & set(table.index)
    np.testing.assert_array_equal(actions["logged"][0], t.action)
    for name in ("actor", "other"):  # of one seed, and both in eval mode
        np.testing.assert_array_equal(actions[name][1], actor(t.state).detach())


def test_a_saved_policy_comes_back_with_all_it_takes_to_train_on(tmp_path):
    actor, again = small_actor(), small_actor()
    optimiser, resumed = (torch.optim.Adam(network.parameters()) for network in (actor, again))
    actor(torch.randn(4, 8)).sum().backward()
    optimiser.step()
    training.save_policy(tmp_path / "p.pt", actor, {"actor": actor, "optimiser": optimiser}, ndcg=0.5)
    drawn, state = torch.rand(3), torch.randn(4, 8)
    loaded, saved = training.load_policy(tmp_path / "p.pt")
    training.restore({"actor": again, "optimiser": resumed}, saved["parts"])
    assert torch.equal(torch.rand(3), drawn) and not loaded.training
    assert saved["meta"] == {"ndcg": 0.5} and saved["network"] == "Actor"
    for network in (loaded, again.eval()):
        assert torch.equal(network(state), actor.eval()(state))
    for a, b in zip(optimiser.state.values(), resumed.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:500]), lambda path: torch.save({"weights": {}}, path),
    lambda path: torch.save([1], path), lambda path: training.save_policy(path, small_actor(), {}, any_object=path),
    lambda path: training.save_policy(path, small_actor(), {}, memory={"weight": 1.0})])  # of an earlier version
def test_a_policy_that_is_damaged_foreign_or_of_an_earlier_version_gets_a_sentence(tmp_path, damage):
    training.save_policy(tmp_path / "p.pt", small_actor(), {})
    damage(tmp_path / "p.pt")
    with pytest.raises(DataError, match="the lesson"):
        training.load_policy(tmp_path / "p.pt")
