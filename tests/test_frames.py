import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import h5py
import hdf5plugin  # noqa: F401  (registers the filters for plain h5py)
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import frames as frames_module
from helpers.files import DataError, writing
from helpers.frames import (
    FIELDS,
    Frames,
    Transition,
    flatten,
    gaps,
    open_static,
    read_static,
    reward_of,
    to_autocast,
    unflatten,
    write_static,
)


def whole(frames):
    return frames.gather(torch.arange(len(frames)))


def assert_same(one, other, rtol=0.0, atol=0.0):
    for name, a, b in zip(FIELDS, one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def joined(batches):
    return Transition(*(torch.cat(field) for field in zip(*batches, strict=True)))


def by_hand(ratings, item_ids, item_matrix, frame_size):
    """Build every transition with plain loops, as the contract words it."""
    vector_of = dict(zip(item_ids.tolist(), item_matrix, strict=True))
    rows = []
    for _, log in ratings.sort_values(["user_id", "timestamp"], kind="stable").groupby("user_id"):
        vectors, stars = [vector_of[item] for item in log["item_id"]], log["rating"].tolist()

        def state(end, vectors=vectors, stars=stars):
            return np.concatenate([*vectors[end - frame_size:end], stars[end - frame_size:end]])

        rows += [(state(t), vectors[t], [2 * (stars[t] - 2.5)], state(t + 1), [float(t == len(stars) - 1)])
                 for t in range(frame_size, len(stars))]
    return Transition(*(torch.tensor(np.array(field), dtype=torch.float32) for field in zip(*rows, strict=True)))


@pytest.mark.parametrize("frame_size", [1, 2, 3, 5])
def test_transitions_are_those_made_by_hand(ratings, item_ids, item_matrix, frame_size):
    frames = Frames(ratings, item_ids, item_matrix, frame_size)
    assert_same(whole(frames), by_hand(ratings, item_ids, item_matrix, frame_size))


def test_shapes_and_types_are_those_of_the_contract(frames):
    batch = frames.gather(torch.tensor([0, 3]))
    assert [tuple(field.shape) for field in batch] == [(2, 8), (2, 3), (2, 1), (2, 8), (2, 1)]
    assert all(field.dtype == torch.float32 for field in batch)
    assert (frames.frame_size, frames.embed_size) == (2, 3)


def test_next_state_is_state_shifted_plus_action_and_rating(frames):
    batch = whole(frames)
    v, rating = unflatten(batch.state, 2)
    next_v, next_rating = unflatten(batch.next_state, 2)
    assert torch.equal(next_v, torch.cat([v[:, 1:], batch.action[:, None]], dim=1))
    assert torch.equal(next_rating, torch.cat([rating[:, 1:], batch.reward / 2 + 2.5], dim=1))


@pytest.mark.parametrize("frame_size, rows, short", [
    (1, 5 + 2 + 1 + 3, 0), (2, 4 + 1 + 0 + 2, 1), (3, 3 + 0 + 0 + 1, 2), (5, 1 + 0 + 0 + 0, 3)])
def test_user_of_n_ratings_gives_max_n_minus_f_zero_rows(ratings, item_ids, item_matrix, frame_size, rows, short):
    frames = Frames(ratings, item_ids, item_matrix, frame_size)
    assert len(frames) == rows and frames.n_short_users == short


def test_one_done_a_user_and_it_is_the_last(frames):
    assert whole(frames).done.flatten().tolist() == [0, 0, 0, 1, 1, 0, 1]  # users 1, 2, 7


def test_consecutive_transitions_of_a_user_chain(frames):
    batch = whole(frames)
    going_on = batch.done[:-1, 0] == 0
    assert torch.equal(batch.next_state[:-1][going_on], batch.state[1:][going_on])
    assert not torch.equal(batch.next_state[:-1][~going_on], batch.state[1:][~going_on])


@pytest.mark.parametrize("seed", range(5))
def test_order_of_the_input_rows_does_not_matter(ratings, item_ids, item_matrix, frames, seed):
    shuffled = Frames(ratings.sample(frac=1, random_state=seed), item_ids, item_matrix, 2)
    assert_same(whole(shuffled), whole(frames))
    np.testing.assert_array_equal(shuffled.user_ids, frames.user_ids)
    assert torch.equal(shuffled.last_states(frames.user_ids), frames.last_states(frames.user_ids))


@pytest.mark.parametrize("by, ascending", [(["user_id", "timestamp"], [True, False]), (["timestamp"], [True]),
                                           (["user_id", "timestamp"], [False, True])])
def test_half_sorted_rows_are_sorted_too(ratings, item_ids, item_matrix, frames, by, ascending):
    half_sorted = Frames(ratings.sort_values(by, ascending=ascending), item_ids, item_matrix, 2)
    assert_same(whole(half_sorted), whole(frames))


@pytest.mark.parametrize("users", [[1, 1, 1, 1], [2, 1, 1, 1]])
def test_ratings_of_one_second_keep_their_order(item_ids, item_matrix, users):
    ratings = pd.DataFrame({"user_id": users, "item_id": [50, 30, 10, 20], "rating": 3.0, "timestamp": [1, 5, 5, 5]})
    frames = Frames(ratings, item_ids, item_matrix, 2)
    place = {item: row for row, item in enumerate(item_ids.tolist())}
    assert frames.next_items(torch.tensor([len(frames) - 1])).tolist() == [[place[20]]]
    np.testing.assert_array_equal(whole(frames).state[-1, :6], item_matrix[[place[30], place[10]]].ravel())


def test_users_without_enough_ratings_get_a_sentence(ratings, item_ids, item_matrix):
    with pytest.raises(DataError, match=r"no user has more than frame_size = 6 ratings \(the longest log has 6\)"):
        Frames(ratings, item_ids, item_matrix, 6)


def test_no_ratings_get_a_sentence(ratings, item_ids, item_matrix):
    with pytest.raises(DataError, match=r"the longest log has 0"):
        Frames(ratings.iloc[:0], item_ids, item_matrix, 2)


@st.composite
def logs(draw):
    """Draw ratings in any row order: short users, one-item users, ties in time, the same item twice."""
    n_items = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    users = draw(st.permutations([-3, 0, 4, 5, 10 ** 12, 7]))
    rows = [(user, draw(st.integers(0, n_items - 1)), draw(st.integers(1, 10)) / 2, draw(st.integers(0, 4)))
            for user, length in zip(users, lengths, strict=False) for _ in range(length)]
    table = pd.DataFrame(draw(st.permutations(rows)), columns=["user_id", "item_id", "rating", "timestamp"])
    return table, n_items, draw(st.integers(1, 4)), draw(st.sampled_from(["fast", "smallest"]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs())
def test_dynamic_static_and_brute_force_agree_whatever_the_logs(tmp_path, drawn):
    ratings, n_items, frame_size, packing = drawn
    ids = np.arange(n_items)
    matrix = np.random.default_rng(n_items).normal(size=(n_items, 3)).astype(np.float32)
    if ratings.groupby("user_id").size().max() <= frame_size:
        with pytest.raises(DataError, match="use a smaller frame"):
            Frames(ratings, ids, matrix, frame_size)
        return
    frames, expected = Frames(ratings, ids, matrix, frame_size), by_hand(ratings, ids, matrix, frame_size)
    assert_same(whole(frames), expected)
    assert_same(Transition(*(torch.stack(field) for field in zip(*frames, strict=True))), expected)
    write_static(tmp_path / "f.hdf5", frames, "toy", dtype="float32", rows=2, smallest=packing == "smallest")
    assert_same(joined(read_static(tmp_path / "f.hdf5", 3, frame_size, matrix)), expected)
    if n_items > 1 and (ratings["item_id"] == n_items - 1).any():
        with pytest.raises(DataError, match="have no row in the item matrix"):
            Frames(ratings, ids[:-1], matrix[:-1], frame_size)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1024, 1025, 3000])
def test_the_fast_way_and_the_plain_way_agree(n):
    """Devices other than the CPU gather with torch; both must give the same, on one thread or two."""
    rng = np.random.default_rng(0)
    ratings = pd.DataFrame({"user_id": np.sort(rng.integers(0, 20, 2000)), "item_id": rng.integers(0, 30, 2000),
                            "rating": rng.integers(1, 11, 2000) / 2, "timestamp": np.arange(2000)})
    frames = Frames(ratings, np.arange(30), rng.normal(size=(30, 7)), 5)
    index = torch.randint(len(frames), (n,), generator=torch.Generator().manual_seed(0))
    fast, threads = frames.gather(index), torch.get_num_threads()
    torch.set_num_threads(1)
    alone = frames.gather(index)
    torch.set_num_threads(threads)
    assert_same(fast, alone)
    assert_same(fast, frames.gather_on_device(index))


def test_a_batch_in_use_is_never_overwritten(frames):
    kept = list(frames.batches(2, shuffle=False))
    views = [batch.state[:, 1:].numpy() for batch in frames.batches(2, shuffle=False)]
    assert_same(joined(kept), whole(frames))
    np.testing.assert_array_equal(np.concatenate(views), whole(frames).state[:, 1:])


def test_memory_of_a_batch_nobody_holds_is_used_again(frames):
    index = torch.arange(3)
    places = set()
    for _ in range(20):
        batch = frames.gather(index)
        places.add(batch.state.data_ptr())
        del batch
    assert len(places) <= 2


@pytest.mark.parametrize("index", [[7], [-1], [0, 100]])
def test_index_outside_of_the_transitions_is_refused(frames, index):
    with pytest.raises(IndexError, match=r"numbered from 0 to 6; asked for"):
        frames.gather(torch.tensor(index))


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_data_loader_fetches_whole_batches(frames, workers, monkeypatch):
    monkeypatch.setattr(Frames, "__getitem__", lambda self, index: pytest.fail("one by one"))
    part = torch.utils.data.Subset(frames, [6, 0, 3, 2, 5])
    frames.gather(torch.arange(7))  # threads are running when the workers start
    batches = list(torch.utils.data.DataLoader(part, batch_size=2, num_workers=workers))
    assert [type(batch) for batch in batches] == [Transition] * 3
    assert_same(joined(batches), frames.gather(torch.tensor([6, 0, 3, 2, 5])))


def test_batches_go_to_the_device_asked_for(frames):
    assert {field.device.type for field in next(frames.batches(3, device="meta"))} == {"meta"}


def test_unknown_items_get_a_sentence_that_names_them(ratings, item_matrix):
    with pytest.raises(DataError, match=r"2 items have no row in the item matrix \(ids 10, 30 …\).*03_pca"):
        Frames(ratings, np.array([50, 11, 40, 20, 31]), item_matrix, 2)


def test_rewards_are_the_whole_numbers_from_minus_four_to_five():
    assert [reward_of(rating / 2) for rating in range(1, 11)] == list(range(-4, 6))


def test_rewards_of_the_log_follow_its_ratings(frames):
    assert whole(frames).reward.flatten().tolist() == [5, 0, 1, -2, 2, -1, -4]


def test_flatten_lays_the_oldest_item_first_and_the_ratings_last():
    vectors, rating = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[5.0, 0.5]])
    assert flatten(vectors, rating).tolist() == [[1, 2, 3, 4, 5, 0.5]]
    back = unflatten(flatten(vectors, rating), 2)
    assert torch.equal(back[0], vectors) and torch.equal(back[1], rating)


def test_batches_cover_every_transition_once_and_the_same_for_a_seed(frames):
    def order(seed):
        return torch.cat(list(frames.sample(3, seed=seed))).tolist()

    assert sorted(order(0)) == list(range(7)) == sorted(order(1))
    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1
    assert [len(index) for index in frames.sample(3)] == [3, 3, 1]


@pytest.mark.parametrize("group", [1, 2, 6, 7])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_shuffling_in_groups_covers_every_transition_in_full_batches(frames, monkeypatch, group, batch_size):
    monkeypatch.setattr(frames_module, "GROUP", group)
    for seed in range(20):
        batches = list(frames.sample(batch_size, seed=seed))
        assert sorted(torch.cat(batches).tolist()) == list(range(7))
        assert {len(index) for index in batches[:-1]} <= {batch_size} and len(batches) == -(-7 // batch_size)
        assert torch.equal(torch.cat(batches), torch.cat(list(frames.sample(batch_size, seed=seed))))


def test_shuffling_in_groups_makes_every_order_as_likely(monkeypatch):
    monkeypatch.setattr(frames_module, "GROUP", 2)
    found = Counter(tuple(torch.cat(list(frames_module._shuffled(4, seed))).tolist()) for seed in range(4800))
    off = sum((found[order] - 200) ** 2 / 200 for order in permutations(range(4)))
    assert off < 44.2  # chi-square with 23 degrees of freedom: beyond it in half a percent of fair draws


def test_batches_without_shuffle_are_in_the_order_of_users_and_time(frames):
    assert_same(joined(frames.batches(3, shuffle=False)), whole(frames))


def test_batches_are_the_gathered_samples(frames):
    order = torch.cat(list(frames.sample(3, seed=4)))
    assert_same(joined(frames.batches(3, seed=4)), frames.gather(order))


def test_sampling_leaves_the_global_generator_alone(frames):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(frames.batches(3))
    assert torch.equal(before, torch.get_rng_state())


def test_data_loader_gives_the_same_rows(frames):
    loader = torch.utils.data.DataLoader(frames, batch_size=3)
    batches = list(loader)
    assert all(isinstance(batch, Transition) for batch in batches)
    assert_same(joined(batches), whole(frames))


def test_single_transition_is_a_row_of_the_batch(frames):
    row = frames[4]
    assert [tuple(field.shape) for field in row] == [(8,), (3,), (1,), (8,), (1,)]
    assert_same(row, [field[4] for field in whole(frames)])
    with pytest.raises(IndexError):
        frames[7]


def test_next_items_are_minus_one_beyond_the_log(frames, item_ids):
    rows = frames.next_items(torch.arange(7), 3)
    ids = [[int(item_ids[row]) if row >= 0 else -1 for row in line] for line in rows.tolist()]
    assert ids == [[30, 10, 40], [10, 40, 50], [40, 50, -1], [50, -1, -1], [20, -1, -1], [30, 20, -1], [20, -1, -1]]


def test_next_item_is_the_action(frames):
    batch = whole(frames)
    assert torch.equal(frames.items[frames.next_items(torch.arange(7))[:, 0]], batch.action)


def test_last_states_end_each_log_in_the_order_asked(frames):
    batch = whole(frames)
    last = batch.next_state[batch.done[:, 0] == 1]  # of users 1, 2, 7
    assert torch.equal(frames.last_states(np.array([7, 1, 2, 1])), last[[2, 0, 1, 0]])


def test_last_states_of_short_logs_are_padded_at_the_old_end(ratings, item_ids, item_matrix):
    frames = Frames(ratings, item_ids, item_matrix, 5)
    state = frames.last_states(np.array([5]))  # items 20, 40 with ratings 2, 5
    v, rating = unflatten(state, 5)
    assert rating.tolist() == [[0, 0, 0, 2, 5]]
    assert (v[0, :3] == 0).all()
    np.testing.assert_array_equal(v[0, 3:], item_matrix[[3, 2]])


def test_last_state_of_a_stranger_gets_a_sentence(frames):
    with pytest.raises(DataError, match=r"1 users have no log, e.g. user 99"):
        frames.last_states(np.array([1, 99]))


# --- static files

@pytest.fixture
def static(frames, tmp_path):
    path = tmp_path / "frames.hdf5"
    write_static(path, frames, source="toy", dtype="float32", rows=4)
    return path


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("dtype, tolerance", [("float32", {}), ("float16", dict(rtol=2**-11, atol=2**-24))])
def test_static_and_dynamic_agree_row_for_row(frames, item_matrix, tmp_path, seed, dtype, tolerance):
    path = tmp_path / "frames.hdf5"
    write_static(path, frames, "toy", seed=seed, dtype=dtype, rows=4)
    static = list(read_static(path, 3, 2, item_matrix))
    dynamic = list(frames.batches(3, shuffle=seed is not None, seed=seed or 0))
    assert [len(batch.state) for batch in static] == [3, 3, 1]
    assert all(field.dtype == torch.float32 for batch in static for field in batch)
    assert_same(joined(static), joined(dynamic), **tolerance)


def test_half_precision_rounds_vectors_alone(frames, item_matrix, tmp_path):
    write_static(tmp_path / "half.hdf5", frames, "toy", dtype="float16")
    (half,) = read_static(tmp_path / "half.hdf5", 100, 2, item_matrix)
    full = whole(frames)
    assert torch.equal(half.action, full.action.half().float()) and not torch.equal(half.action, full.action)
    assert torch.equal(half.state[:, -2:], full.state[:, -2:]) and torch.equal(half.reward, full.reward)


def test_plain_h5py_slices_read_a_static_file(static, frames):
    full = whole(frames)
    n = 3
    with h5py.File(static) as f:
        for i in range(3):
            for key, field in zip(FIELDS, full, strict=True):
                part = torch.as_tensor(f[key][i * n:(i + 1) * n]).float()
                assert torch.equal(part, field[i * n:(i + 1) * n].reshape(part.shape))
        assert {key: f[key].shape for key in f} == {"state": (7, 8), "action": (7, 3), "reward": (7,),
                                                     "next_state": (7, 8), "done": (7,)}


def test_static_file_says_what_it_was_made_of(static, item_matrix):
    with h5py.File(static) as f:
        attrs = dict(f.attrs)
    assert (attrs["frame_size"], attrs["embed_size"], attrs["source"], attrs["seed"]) == (2, 3, "toy", -1)
    assert attrs["hash"] == frames_module.matrix_hash(item_matrix)


def test_chunks_hold_whole_rows_so_that_repeated_embeddings_compress(tmp_path):
    n, rng = 300, np.random.default_rng(0)
    ratings = pd.DataFrame({"user_id": 1, "item_id": np.arange(n), "rating": 3.0, "timestamp": range(n)})
    write_static(tmp_path / "f.hdf5", Frames(ratings, np.arange(n), rng.normal(size=(n, 64)), 10), "toy")
    with h5py.File(tmp_path / "f.hdf5") as f:
        assert {key: f[key].chunks for key in ("state", "action", "next_state")} == {
            "state": (256, 650), "action": (290, 64), "next_state": (256, 650)}
        assert f["state"].id.get_storage_size() < f["state"].nbytes / 5  # each embedding lies in ten rows


def stop_after(n_calls, error, monkeypatch):
    """Let `gather` raise from its call n_calls + 1 on; return the list of indices it was asked for."""
    gather, calls = Frames.gather, []

    def interrupted(self, index):
        calls.append(index.tolist())
        if len(calls) > n_calls:
            raise error
        return gather(self, index)

    monkeypatch.setattr(Frames, "gather", interrupted)
    return calls


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("seed", [None, 3])
def test_interrupted_write_keeps_the_old_file_and_goes_on_where_it_stopped(frames, item_matrix, tmp_path, monkeypatch,
                                                                          error, seed):
    path = tmp_path / "frames.hdf5"
    write_static(path, frames, "toy, old", dtype="float32")
    stop_after(1, error, monkeypatch)
    with pytest.raises(error):
        write_static(path, frames, "toy", seed=seed, dtype="float32", rows=3)
    monkeypatch.undo()
    assert_same(joined(read_static(path, 4, 2, item_matrix)), whole(frames))  # the old one, untouched
    calls = stop_after(9, error, monkeypatch)
    write_static(path, frames, "toy", seed=seed, dtype="float32", rows=3)
    monkeypatch.undo()
    assert calls == [index.tolist() for index in frames.sample(3, seed is not None, seed or 0)][1:]
    assert_same(joined(read_static(path, 4, 2, item_matrix)),
                joined(frames.batches(3, shuffle=seed is not None, seed=seed or 0)))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change", [dict(seed=1), dict(dtype="float16"), dict(smallest=True), dict(source="other"),
                                    dict(rows=2), "ratings", "journal", "part"])
def test_write_of_anything_else_starts_anew(frames, ratings, item_ids, item_matrix, tmp_path, monkeypatch, change):
    path, options = tmp_path / "frames.hdf5", dict(source="toy", dtype="float32", rows=3)
    stop_after(1, RuntimeError, monkeypatch)
    with pytest.raises(RuntimeError):
        write_static(path, frames, **options)
    monkeypatch.undo()
    if change == "ratings":
        frames = Frames(ratings.assign(rating=ratings["rating"][::-1].to_numpy()), item_ids, item_matrix, 2)
    elif change == "journal":
        (tmp_path / ".frames.hdf5.part.json").write_text('{"written": 3')
    elif change == "part":
        (tmp_path / ".frames.hdf5.part").unlink()
    else:
        options |= change
    calls = stop_after(9, RuntimeError, monkeypatch)
    write_static(path, frames, **options)
    assert calls[0] == next(frames.sample(options["rows"], "seed" in options, options.get("seed", 0))).tolist()
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, sys
from pathlib import Path
import numpy as np, pandas as pd
from helpers.frames import Frames, write_static
rng = np.random.default_rng(0)
ratings = pd.DataFrame({"user_id": np.repeat(np.arange(40), 300), "item_id": rng.integers(0, 50, 12_000),
                        "rating": rng.integers(1, 11, 12_000) / 2, "timestamp": np.arange(12_000)})
frames, gather, calls = Frames(ratings, np.arange(50), rng.normal(size=(50, 16)), 10), Frames.gather, []
def counted(self, index):
    calls.append(int(index[0]))
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return gather(self, index)
Frames.gather = counted
write_static(Path(sys.argv[1]), frames, "toy", dtype="float32", rows=300, save_every=1200)
Frames.gather = gather
from helpers.frames import FIELDS, read_static
import torch
for made, stored in zip(frames.batches(500, shuffle=False), read_static(Path(sys.argv[1]), 500, 10, frames.items)):
    assert all(torch.equal(a, b) for a, b in zip(made, stored))
print(calls[0])
"""


def test_write_killed_thrice_loses_only_what_was_not_saved(tmp_path):
    def run(kill_at):
        return subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "f.hdf5"), str(kill_at)],
                              capture_output=True, text=True)

    assert run(11).returncode == -9 and not (tmp_path / "f.hdf5").exists()   # ten blocks done, eight saved
    assert run(2).returncode == -9                                           # goes on at 8, killed before a save
    assert run(7).returncode == -9                                           # goes on at 8, killed before 14
    last = run(1000)
    assert last.returncode == 0, last.stderr
    assert int(last.stdout) == 12 * 300
    assert [path.name for path in tmp_path.iterdir()] == ["f.hdf5"]


def test_full_disk_leaves_nothing_to_go_on_from_but_the_old_file(frames, tmp_path, monkeypatch):
    path = tmp_path / "frames.hdf5"
    write_static(path, frames, "toy")
    stop_after(1, OSError(28, "No space left on device"), monkeypatch)
    with pytest.raises(OSError, match=r"the disk is full .* frames.hdf5"):
        write_static(path, frames, "toy", rows=3)
    assert path.exists()


def test_numbers_too_large_for_half_precision_are_refused(ratings, item_ids, item_matrix, tmp_path):
    with pytest.raises(DataError, match=r"beyond 65,504.*float32"):
        write_static(tmp_path / "f.hdf5", Frames(ratings, item_ids, item_matrix * 1e5, 2), "toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("smallest", [False, True])
def test_flipped_bytes_in_the_middle_are_noticed(tmp_path, smallest):
    n, rng = 3000, np.random.default_rng(0)
    ratings = pd.DataFrame({"user_id": 1, "item_id": np.arange(n), "rating": 3.0, "timestamp": range(n)})
    frames = Frames(ratings, np.arange(n), rng.normal(size=(n, 8)), 10)
    path = tmp_path / "f.hdf5"
    write_static(path, frames, "toy", smallest=smallest)
    with h5py.File(path) as f:
        chunk = f["state"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"f.hdf5 is damaged between rows"):
        list(read_static(path, 500, 10, frames.items))


def test_fields_of_different_lengths_are_refused(static):
    with h5py.File(static, "a") as f:
        del f["done"]
        f["done"] = np.zeros(3)
    with pytest.raises(DataError, match=r"different lengths \(.*done 3\)"):
        open_static(static)


def test_static_file_of_another_frame_size_is_refused(static, item_matrix):
    with pytest.raises(DataError, match=r"frames.hdf5 was written with frame_size 2, not 3"):
        next(read_static(static, 4, 3, item_matrix))


@pytest.mark.parametrize("change", [lambda m: m + 1e-3, lambda m: m[::-1].copy(), lambda m: m[:, :2], lambda m: -m])
def test_static_file_of_another_item_matrix_is_refused(static, item_matrix, change):
    with pytest.raises(DataError, match=r"frames.hdf5 was written with another item matrix.*04_static_dataset"):
        next(read_static(static, 4, 2, change(item_matrix)))


def test_item_matrix_is_the_same_as_array_or_tensor_in_any_layout_or_width(static, item_matrix):
    for same in (torch.as_tensor(item_matrix), np.asfortranarray(item_matrix), item_matrix.astype(np.float64)):
        assert len(next(read_static(static, 4, 2, same)).state) == 4


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.95])
def test_truncated_static_file_gets_a_sentence(static, item_matrix, share):
    static.write_bytes(static.read_bytes()[:int(share * static.stat().st_size)])
    with pytest.raises(DataError, match=r"frames.hdf5 is not a readable HDF5 file.*04_static_dataset"):
        next(read_static(static, 4, 2, item_matrix))


@pytest.mark.parametrize("field", FIELDS)
def test_static_file_without_a_field_is_refused(static, field):
    with h5py.File(static, "a") as f:
        del f[field]
    with pytest.raises(DataError, match=rf"frames.hdf5 lacks {field}"):
        open_static(static)


@pytest.mark.parametrize("name", ["frame_size", "hash"])
def test_static_file_without_its_attributes_is_refused(static, item_matrix, name):
    with h5py.File(static, "a") as f:
        del f.attrs[name]
    with pytest.raises(DataError, match=r"frames.hdf5"):
        next(read_static(static, 4, 2, item_matrix))


def test_missing_static_file_is_not_called_unreadable(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"frames.hdf5"):
        open_static(tmp_path / "frames.hdf5")


def test_gaps_are_days_since_the_users_rating_before_and_end_every_state(ratings, item_ids, item_matrix):
    ratings["timestamp"] = ratings["timestamp"] * 864  # steps of 100 become steps of a day
    timed, plain = (Frames(ratings, item_ids, item_matrix, frame_size=2, times=times) for times in (True, False))
    index = torch.arange(len(plain))
    t, p = timed.gather(index), plain.gather(index)
    assert torch.equal(t.state[:, :-2], p.state) and torch.equal(t.next_state[:, :-2], p.next_state)
    assert t.state[:, -2:].tolist() == [[0, 1], [1, 1], [1, 1], [1, 1], [0, 1], [0, 1], [1, 1]]
    assert t.next_state[:, -2:].tolist() == [[1, 1]] * 7
    assert torch.equal(t.action, p.action) and torch.equal(t.done, p.done)
    last = timed.last_states(np.array([1, 5]))
    assert last[:, -2:].tolist() == [[1, 1], [0, 1]]
    assert torch.equal(gaps(t.state, 2, 3), t.state[:, -2:]) and (gaps(p.state, 2, 3) == 1).all()
    for a, b in zip(unflatten(t.state, 2, 3), unflatten(p.state, 2), strict=True):
        assert torch.equal(a, b)


def test_a_log_shorter_than_the_frame_is_padded_with_gaps_of_nought(ratings, item_ids, item_matrix):
    timed = Frames(ratings, item_ids, item_matrix, frame_size=3, times=True)
    assert timed.last_states(np.array([5]))[0, -3:].tolist() == [0, 0, pytest.approx(100 / 86_400)]


def test_a_static_file_of_frames_with_times_is_refused(ratings, item_ids, item_matrix, tmp_path):
    with pytest.raises(DataError, match="make the frames without times"):
        write_static(tmp_path / "t.hdf5", Frames(ratings, item_ids, item_matrix, 2, times=True), "test")


def test_next_rewards_stop_where_the_log_ends(frames):
    rewards, within = frames.next_rewards(torch.tensor([0, 2, 4]), 3)
    assert rewards.tolist() == [[5, 0, 1], [1, -2, 0], [2, 0, 0]]
    assert within.tolist() == [[True, True, True], [True, True, False], [True, False, False]]


def test_a_batch_is_converted_once_for_all_under_autocast_alone(frames):
    t = frames.gather(torch.arange(3))
    assert to_autocast(t) is t
    with torch.autocast("cpu", torch.bfloat16):
        half = to_autocast(t)
    assert half.state.dtype == half.next_state.dtype == half.action.dtype == torch.bfloat16
    assert half.reward is t.reward and half.done is t.done


@pytest.fixture
def tied(item_ids, item_matrix):
    log = pd.DataFrame({"user_id": [1] * 7 + [2] * 4, "item_id": [10, 20, 30, 40, 50, 10, 20, 30, 40, 50, 10],
                        "rating": np.arange(1, 12) / 2 % 5, "timestamp": [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4]})
    return log, Frames(log, item_ids, item_matrix, frame_size=2)


def test_ties_are_shuffled_inside_a_users_second_alone_and_with_their_ratings(tied):
    log, frames = tied
    seconds = log.groupby(["user_id", "timestamp"], sort=False).indices.values()
    pairs = set(zip(frames.item_idx.tolist(), frames.rating.tolist(), strict=True))
    before, orders = frames.item_idx.clone(), set()
    for seed in range(40):
        frames.shuffle_ties(seed)
        assert set(zip(frames.item_idx.tolist(), frames.rating.tolist(), strict=True)) == pairs
        for rows in seconds:
            assert sorted(frames.item_idx[rows].tolist()) == sorted(before[rows].tolist())
        orders.add(tuple(frames.item_idx[:3].tolist()))
    assert len(orders) == 6  # every order of three is met
    frames.shuffle_ties(7)
    once = frames.item_idx.clone()
    frames.shuffle_ties(3), frames.shuffle_ties(7)
    assert torch.equal(frames.item_idx, once)


def test_ties_go_back_to_the_order_they_came_in_and_batches_follow(tied):
    _, frames = tied
    everything, hashed = torch.arange(len(frames)), frames.log_hash()
    before = frames.gather(everything)
    frames.shuffle_ties(1)
    assert not torch.equal(frames.gather(everything).state, before.state) and frames.log_hash() != hashed
    t, later = frames.gather(everything), frames.next_items(everything, 1)[:, 0]
    assert torch.equal(t.action, frames.items[later])
    assert torch.equal(t.next_state[:-1][t.done[:-1, 0] == 0], t.state[1:][t.done[:-1, 0] == 0])
    frames.shuffle_ties(None)
    assert torch.equal(frames.gather(everything).state, before.state) and frames.log_hash() == hashed


def test_static_file_that_another_program_writes_is_locked_and_not_damaged(tmp_path, frames):
    path = tmp_path / "frames.hdf5"
    write_static(path, frames, "x")
    program = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(DataError, match="is locked: another program has it open"):
        next(read_static(path, 2, 2, frames.items))
    other.communicate()
    assert len(next(read_static(path, 2, 2, frames.items)).reward) == 2


def test_a_second_writer_of_the_static_file_is_refused_and_spoils_nothing(tmp_path, frames):
    path = tmp_path / "frames.hdf5"
    with ThreadPoolExecutor(1) as beside, writing(path), pytest.raises(DataError, match="is being written by process"):
        beside.submit(write_static, path, frames, "x").result()
    write_static(path, frames, "x")
    assert len(next(read_static(path, 99, 2, frames.items)).reward) == len(frames)
