import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from helpers.agents import beyond_one_machine
from helpers.agents import d4pg as d4pg_lesson
from helpers.agents import ddpg as ddpg_lesson
from helpers.extra import cluster
from helpers.files import DataError
from helpers.frames import Frames

F, ITEMS = 3, np.arange(12)
MATRIX = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)


def twenty_logs():
    """Return 20 users with 15 ratings each, every second rating in the second of the one before."""
    rng, n = np.random.default_rng(0), 20 * 15
    return pd.DataFrame({"user_id": np.repeat(np.arange(20), 15), "item_id": rng.integers(12, size=n),
                         "rating": rng.integers(1, 11, size=n) / 2, "timestamp": np.arange(n) // 2})


def rows_of(frames):
    """Return every transition as one row of numbers, sorted."""
    rows = np.concatenate(list(frames.gather(torch.arange(len(frames)))), axis=1)
    return rows[np.lexsort(rows.T)]


def ddpg(frames, before=lambda step: None):
    """Return what `train_together` asks for: lesson 05's update and agent; `before` is called before each step.

    Logged are the worker's transitions, and the steps since it was started.
    """
    step = 0
    agent = ddpg_lesson.new_agent(0, F, 6, 1e-3, hidden_size=16, dropout=0.0, item_dropout=0.0)
    learn = partial(ddpg_lesson.update, agent, frames, gamma=0.9, tau=0.02, decay=0.7, value_weight=1e-9)

    def update(index):
        nonlocal step
        step += 1
        before(step)
        return learn(index) | {"transitions": torch.tensor(len(frames)), "own steps": torch.tensor(step)}
    return update, agent, {}


def train(make, home, folder, name, n_workers=2, matrix=MATRIX, **options):
    options = dict(max_steps=6, safe_every=2, log_every=2, bf16=False, max_failures=0) | options
    return cluster.train_together(make, home / "shards", ITEMS, cluster.share(matrix), n_workers, frame_size=F,
                                  batch_size=32, storage=folder / "storage", name=name, **options)


def wait_for_checkpoints(run, n):
    """Wait until Ray has noted n checkpoints of a run; it does so every two seconds, and a file may be half written."""
    noted = 0
    while noted < n:
        time.sleep(0.1)
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            noted = len(json.loads((run / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"])


def equal(a, b):
    return all(torch.equal(a[part][name], b[part][name]) for part in ("actor", "critic", "actor_target")
               for name in a[part])


@pytest.mark.parametrize("chosen, n", [("", 2), ("1", 1), ("8", 8), ("two", None), ("0", None)])
def test_the_number_of_workers_is_one_switch(monkeypatch, chosen, n):
    monkeypatch.setenv("RECNN_WORKERS", chosen)
    if n is not None:
        assert cluster.chosen_workers() == n
    else:
        with pytest.raises(DataError, match=f"WORKERS={chosen}"):
            cluster.chosen_workers()


def test_a_shard_of_a_user_depends_on_the_id_alone():
    ids = np.arange(1000)
    assert (cluster.shard_of(ids[::-1], 7) == cluster.shard_of(ids, 7)[::-1]).all()
    assert np.bincount(cluster.shard_of(ids, 7)).min() > 100


def test_ratings_of_one_second_are_ordered_by_place_or_else_by_what_they_are():
    ratings = twenty_logs()
    for log, keys in ((ratings, ["user_id", "timestamp", "item_id", "rating"]),
                      (ratings.assign(place=np.arange(300)), ["place"])):
        ordered = cluster.in_order(pa.Table.from_pandas(log.sample(frac=1, random_state=0))).to_pandas()
        assert np.array_equal(ordered, ratings.loc[log.sort_values(keys).index])


@pytest.fixture(scope="module")
def nodes():
    """Connect to two nodes of one core each, and return what can add and remove one."""
    utils, made = pytest.importorskip("ray.cluster_utils", reason=cluster.HOW_TO_GET_IT), []
    slow = [Exception("The current node timed out during startup. This could happen because …")]
    with pytest.MonkeyPatch.context() as patch:
        def make(head_node_args, make=utils.Cluster, **options):  # a full store may not go on to the disk
            if slow:
                raise slow.pop()  # as on a busy machine: it is tried again
            head_node_args |= {"_system_config": {"automatic_object_spilling_enabled": False,
                                                  "local_fs_capacity_threshold": 0.001}}
            made.append(make(head_node_args=head_node_args, **options))
            return made[0]

        patch.setattr(utils, "Cluster", make)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")  # so long Ray waits for workers, or another node
        with cluster.connected(2, store=128 << 20) as engine:
            engine.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker cannot import tests
            yield made[0]


@pytest.fixture(scope="module")
def home(nodes, tmp_path_factory):
    """Return a folder with the twenty logs in four shards, from three files that cut users in pieces."""
    folder, ratings = tmp_path_factory.mktemp("home"), twenty_logs().assign(place=np.arange(300))
    (folder / "raw").mkdir()
    for k in range(3):
        ratings[k::3].to_parquet(folder / "raw" / f"part-{k}.parquet")
    made = cluster.shard_ratings(folder / "raw", folder / "shards", 4)
    assert made.to_dict() == cluster.manifest(folder / "shards").to_dict()
    return folder


@pytest.fixture(scope="module")
def whole(home):
    """Return what two workers come to in six steps when nothing happens."""
    return train(ddpg, home, home, "whole")


def test_the_shards_hold_all_transitions_and_no_user_twice(home):
    made = cluster.manifest(home / "shards")
    assert made["ratings"].sum() == 300 and made["users"].sum() == 20
    parts = [cluster.read_shards(home / "shards", rank, 2) for rank in range(2)]
    assert not set(parts[0]["user_id"]) & set(parts[1]["user_id"])
    both = np.concatenate([rows_of(cluster.shared_frames(part, ITEMS, MATRIX, F)) for part in parts])
    assert np.array_equal(both[np.lexsort(both.T)], rows_of(Frames(twenty_logs(), ITEMS, MATRIX, F)))


def test_two_workers_take_the_steps_of_one_with_both_their_batches(home, whole):
    together, log = whole
    frames = Frames(twenty_logs(), ITEMS, MATRIX, F)
    user = np.repeat(frames.user_ids, frames.log_length - F)
    update, agent, _ = ddpg(frames)
    batches = []
    for rank in range(2):
        part = cluster.shared_frames(cluster.read_shards(home / "shards", rank, 2), ITEMS, MATRIX, F)
        rows = torch.as_tensor(np.flatnonzero(np.isin(user, part.user_ids)))
        batches.append([rows[index] for index in part.sample(16, seed=0)])
    for step in range(6):
        update(torch.cat([batches[0][step], batches[1][step]]))
    for name in ("actor", "critic", "actor_target", "critic_target"):
        for key, weights in agent[name].state_dict().items():
            torch.testing.assert_close(together[name][key], weights, rtol=1e-4, atol=1e-6)
    assert log.index.tolist() == [1, 2, 4, 6]


def test_a_worker_killed_within_an_epoch_changes_nothing(home, whole, tmp_path):
    flag = tmp_path / "killed"

    def before(step):
        if step == 5 and not flag.exists():
            wait_for_checkpoints(tmp_path / "storage" / "killed", 2)
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    killed, log = train(partial(ddpg, before=before), home, tmp_path, "killed", max_failures=1)
    assert equal(whole[0], killed) and log["own steps"].to_dict() == {1: 1, 2: 2, 4: 4, 6: 2}


def d4pg(frames):
    agent = d4pg_lesson.new_d4pg_agent(0, F, 6, 1e-3, replay_size=len(frames), hidden_size=16)
    return partial(d4pg_lesson.d4pg_update, agent, frames, gamma=0.9, tau=0.02, decay=0.7, n=2,
                   support=torch.linspace(-40, 50, 51)), agent, {"sample": agent["replay"].sample}


def test_a_second_call_of_a_name_starts_anew(home, whole, tmp_path):
    state, log = train(d4pg, home, tmp_path, "twice", max_steps=3)  # with priorities
    assert log.index[-1] == 3 and np.isfinite(log).all(axis=None) and "replay" in state
    again, log = train(ddpg, home, tmp_path, "twice")
    assert equal(whole[0], again) and log["own steps"].to_dict() == {1: 1, 2: 2, 4: 4, 6: 6}


def test_lesson_13_has_actors_on_the_nodes_play_and_make_transitions(home):
    lesson = beyond_one_machine
    learner = d4pg_lesson.new_d4pg_agent(0, learning_rate=3e-3, **d4pg_lesson.TOY)
    met = lesson.learn_from_players(cluster.ray(), learner, (0.1, 1.0), rounds=6, gamma=0.9, tau=0.02, decay=0.7, n=3,
                                    support=torch.linspace(-40, 50, 51), behaviour_weight=0.02)
    assert set(met["noise"]) == {0.1, 1.0} and len(met) == 6
    rate = lesson.rate_of(cluster.ray(), 2, str(home / "shards"), ITEMS, cluster.share(MATRIX), F, 0.2)
    assert rate >= 240 / 0.2  # each of both has passed its shards at least once


def test_what_is_wrong_gets_a_sentence(home, tmp_path):
    (tmp_path / "bad").mkdir()
    twenty_logs().drop(columns="rating").to_parquet(tmp_path / "bad" / "a.parquet")
    for source, words in (("nowhere", "no Parquet files"), ("bad", "lack rating")):
        with pytest.raises(DataError, match=words):
            cluster.shard_ratings(tmp_path / source, tmp_path / "shards", 2)
    with pytest.raises(DataError, match="call shard_ratings"):
        cluster.read_shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match="worker 5 of 5"):
        cluster.read_shards(home / "shards", 4, 5)
    shutil.copytree(home / "shards", tmp_path / "shards")
    for damage in (lambda path: pd.read_parquet(path)[1:].to_parquet(path),
                   lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink):
        damage(tmp_path / "shards" / "shard-00001.parquet")
        with pytest.raises(DataError, match="shard-00001"):
            cluster.read_shards(tmp_path / "shards")
    with pytest.raises(DataError, match="shard-00001"):  # in the words of the worker
        train(ddpg, tmp_path, tmp_path, "missing", max_failures=3)


@pytest.mark.parametrize("megabytes", [268, 50])
def test_a_matrix_that_does_not_fit_gets_a_sentence(nodes, megabytes):
    matrix, held = np.zeros((megabytes * 250_000, 1), np.float32), []
    with pytest.raises(DataError, match=f"{megabytes} MB"):
        held.extend(cluster.share(matrix) for _ in range(3))
    del held


def test_a_node_that_is_removed_leaves_its_users_to_the_others(nodes, home, tmp_path, capsys):
    removing, gone = tmp_path / "removing", tmp_path / "gone"

    def before(step):
        if step == 5 and not gone.exists():
            wait_for_checkpoints(tmp_path / "storage" / "removed", 2)
            removing.touch()
            while not gone.exists():
                time.sleep(0.1)

    def remove():
        while not removing.exists():
            time.sleep(0.1)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        gone.touch()

    watcher = threading.Thread(target=remove, daemon=True)
    watcher.start()
    _, log = train(partial(ddpg, before=before), home, tmp_path, "removed", max_failures=1)
    watcher.join()
    assert log["own steps"].to_dict() == {1: 1, 2: 2, 4: 4, 6: 2}
    assert log["transitions"].loc[4] < 240 and log["transitions"].loc[6] == 240
    assert "no room for 2 workers: going on with 1" in capsys.readouterr().out
