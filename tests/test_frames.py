import weakref
from collections import Counter
from itertools import permutations

import h5py
import hdf5plugin  # noqa: F401  (registers the filters for plain h5py)
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Subset

from helpers import frames as frames_module
from helpers.files import DataError
from helpers.frames import FIELDS, Frames, Transition, read_static, unflatten, write_static


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


@st.composite
def logs(draw):
    """Draw ratings in any row order: short users, one-item users, ties in time, the same item twice."""
    n_items = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    users = draw(st.permutations([-3, 0, 4, 5, 10 ** 12, 7]))
    rows = [(user, draw(st.integers(0, n_items - 1)), draw(st.integers(1, 10)) / 2, draw(st.integers(0, 4)))
            for user, length in zip(users, lengths, strict=False) for _ in range(length)]
    table = pd.DataFrame(draw(st.permutations(rows)), columns=["user_id", "item_id", "rating", "timestamp"])
    return table, n_items, draw(st.integers(1, 4)), draw(st.booleans())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs())
def test_dynamic_static_and_brute_force_agree_whatever_the_logs(tmp_path, monkeypatch, drawn):
    ratings, n_items, frame_size, smallest = drawn
    monkeypatch.setattr(frames_module, "ROWS", 2)
    ids, lengths = np.arange(n_items), ratings.groupby("user_id").size()
    matrix = np.random.default_rng(n_items).normal(size=(n_items, 3)).astype(np.float32)
    if lengths.max() <= frame_size:
        with pytest.raises(DataError, match="smaller frame"):
            Frames(ratings, ids, matrix, frame_size)
        return
    frames, expected = Frames(ratings, ids, matrix, frame_size), by_hand(ratings, ids, matrix, frame_size)
    assert frames.n_short_users == (lengths <= frame_size).sum()
    assert_same(whole(frames), expected)
    assert_same(Transition(*(torch.stack(field) for field in zip(*frames, strict=True))), expected)
    write_static(tmp_path / "f.hdf5", frames, "toy", dtype="float32", smallest=smallest)
    assert_same(joined(read_static(tmp_path / "f.hdf5", 3, frame_size, matrix)), expected)
    users = frames.user_ids[::-1]
    place, rows = frames.logs(users)
    items_of = ratings.sort_values("timestamp", kind="stable").groupby("user_id")["item_id"].agg(list)
    assert [frames.item_idx[rows[place == n]].tolist() for n in range(len(users))] == items_of[users].tolist()
    if n_items > 1 and (ratings["item_id"] == n_items - 1).any():
        with pytest.raises(DataError, match="no row in the item matrix"):
            Frames(ratings, ids[:-1], matrix[:-1], frame_size)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 3000])
def test_the_compiled_way_and_the_plain_way_agree(n):
    """Devices other than the CPU gather with torch; both must give the same."""
    rng = np.random.default_rng(0)
    ratings = pd.DataFrame({"user_id": np.sort(rng.integers(0, 20, 2000)), "item_id": rng.integers(0, 30, 2000),
                            "rating": rng.integers(1, 11, 2000) / 2, "timestamp": np.arange(2000)})
    frames = Frames(ratings, np.arange(30), rng.normal(size=(30, 7)), 5)
    index = torch.randint(len(frames), (n,), generator=torch.Generator().manual_seed(0))
    t = frames.gather(index)
    assert_same(t, frames.gather_on_device(index))
    assert frames_module.to_autocast(t) is t
    with torch.autocast("cpu", torch.bfloat16):  # a batch is converted once for all
        half = frames_module.to_autocast(t)
    assert half.state.dtype == half.next_state.dtype == half.action.dtype == torch.bfloat16
    assert half.reward is t.reward and half.done is t.done


def test_what_no_frames_can_be_made_of_and_what_they_do_not_hold_gets_a_sentence(ratings, item_ids, item_matrix):
    for table, ids, matrix, size, words in [
            (ratings, item_ids, item_matrix, 6, "longest log has 6"),
            (ratings.iloc[:0], item_ids, item_matrix, 2, "longest log has 0"),
            (ratings, np.array([50, 11, 40, 20, 31]), item_matrix, 2, "ids 10, 30"),
            (ratings, item_ids, item_matrix[:4], 2, "4 rows"),
            (ratings, np.array([50, 10, 40, 20, 50]), item_matrix, 2, "4 distinct")]:
        with pytest.raises(DataError, match=words):
            Frames(table, ids, matrix, size)
    frames = Frames(ratings, item_ids, item_matrix, 2)
    for index in (7, [7], [-1], [0, 100]):
        with pytest.raises(IndexError, match="0 to 6"):
            frames[index]


def test_batches_in_use_are_never_overwritten_and_memory_of_two_others_is_used_again(frames, monkeypatch):
    kept = list(frames.batches(2, shuffle=False))
    assert_same(joined(kept), whole(frames))
    empty, fresh = np.empty, []

    def counted(*args):
        array = empty(*args)
        fresh.append(weakref.ref(array))
        return array

    monkeypatch.setattr(np, "empty", counted)
    for _ in range(20):
        batch = frames.gather(torch.arange(3))  # while the one before is in use
    assert len(fresh) == 2 * len(batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_fetches_rows_and_whole_batches(frames, workers):
    everything = whole(frames)
    assert_same(joined(DataLoader(frames, batch_size=3, num_workers=workers)), everything)
    part = Subset(frames, [6, 0, 3, 2, 5])
    batches = list(DataLoader(part, None, sampler=BatchSampler(range(5), 2, False), num_workers=workers))
    assert [type(batch) for batch in batches] == [Transition] * 3
    assert_same(joined(batches), [field[[6, 0, 3, 2, 5]] for field in everything])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("group", [1, 2, 6, 7, 1 << 21])
def test_batches_cover_every_transition_once_and_the_same_for_a_seed(frames, monkeypatch, group, batch_size):
    monkeypatch.setattr(frames_module, "GROUP", group)
    everything, before, orders = whole(frames), torch.get_rng_state(), set()
    for seed in range(20):
        index = list(frames.sample(batch_size, seed=seed))
        assert sorted(torch.cat(index).tolist()) == list(range(7))
        assert {len(some) for some in index[:-1]} <= {batch_size} and len(index) == -(-7 // batch_size)
        assert_same(joined(frames.batches(batch_size, seed=seed)), [field[torch.cat(index)] for field in everything])
        orders.add(tuple(torch.cat(index).tolist()))
    assert len(orders) > 10
    assert_same(joined(frames.batches(batch_size, shuffle=False)), everything)
    assert torch.equal(before, torch.get_rng_state())  # the global generator is left alone


def test_shuffling_in_groups_makes_every_order_as_likely(ratings, item_ids, item_matrix, monkeypatch):
    frames = Frames(ratings[ratings["user_id"] == 1], item_ids, item_matrix, 2)  # four transitions
    monkeypatch.setattr(frames_module, "GROUP", 2)
    found = Counter(tuple(next(frames.sample(4, seed=seed)).tolist()) for seed in range(4800))
    off = sum((found[order] - 200) ** 2 / 200 for order in permutations(range(4)))
    assert off < 44.2  # chi-square with 23 degrees of freedom: beyond it in half a percent of fair draws


def test_a_seed_gives_the_orders_it_has_always_given(frames, tied, monkeypatch):
    assert torch.cat(list(frames.sample(3, seed=4))).tolist() == [3, 1, 0, 4, 2, 5, 6]
    monkeypatch.setattr(frames_module, "GROUP", 2)
    assert torch.cat(list(frames.sample(3, seed=4))).tolist() == [5, 3, 4, 0, 1, 6, 2]
    tied.shuffle_ties(3)
    assert tied.item_idx.tolist() == [1, 3, 4, 0, 2, 1, 3, 4, 2, 0, 1]


def test_next_items_stop_where_the_log_ends(frames, item_ids):
    rows = frames.next_items(torch.arange(7), 3)
    ids = [[int(item_ids[row]) if row >= 0 else -1 for row in line] for line in rows.tolist()]
    assert ids == [[30, 10, 40], [10, 40, 50], [40, 50, -1], [50, -1, -1], [20, -1, -1], [30, 20, -1], [20, -1, -1]]
    assert torch.equal(frames.items[rows[:, 0]], whole(frames).action)


def test_last_states_end_each_log_in_the_order_asked_and_pad_short_ones(frames, ratings, item_ids, item_matrix):
    batch = whole(frames)
    last = batch.next_state[batch.done[:, 0] == 1]  # of users 1, 2, 7
    assert torch.equal(frames.last_states(np.array([7, 1, 2, 1])), last[[2, 0, 1, 0]])
    short = Frames(ratings, item_ids, item_matrix, 5).last_states(np.array([5]))  # items 20, 40 with ratings 2, 5
    vectors, rating = unflatten(short, 5)
    assert rating.tolist() == [[0, 0, 0, 2, 5]] and (vectors[0, :3] == 0).all()
    np.testing.assert_array_equal(vectors[0, 3:], item_matrix[[3, 2]])
    with pytest.raises(DataError, match="user 99"):
        frames.last_states(np.array([1, 99]))


def test_gaps_are_days_since_the_users_rating_before_and_end_every_state(ratings, item_ids, item_matrix):
    ratings["timestamp"] = (ratings["timestamp"] // 100) ** 2 * 86_400  # gaps of 1, 3, 5, 7 and 9 days
    timed, plain = (Frames(ratings, item_ids, item_matrix, frame_size=2, times=times) for times in (True, False))
    t, p = whole(timed), whole(plain)
    assert torch.equal(t.state[:, :-2], p.state) and torch.equal(t.next_state[:, :-2], p.next_state)
    assert t.state[:, -2:].tolist() == [[0, 1], [1, 3], [3, 5], [5, 7], [0, 1], [0, 1], [1, 3]]
    assert t.next_state[:, -2:].tolist() == [[1, 3], [3, 5], [5, 7], [7, 9], [1, 3], [1, 3], [3, 5]]
    assert torch.equal(t.action, p.action) and torch.equal(t.done, p.done)
    assert timed.last_states(np.array([1, 5]))[:, -2:].tolist() == [[7, 9], [0, 1]]
    longer = Frames(ratings, item_ids, item_matrix, frame_size=3, times=True)
    assert longer.last_states(np.array([5]))[0, -3:].tolist() == [0, 0, 1]  # a log of two is padded with 0
    assert torch.equal(frames_module.gaps(t.state, 2, 3), t.state[:, -2:])
    assert (frames_module.gaps(p.state, 2, 3) == 1).all()
    for a, b in zip(unflatten(t.state, 2, 3), unflatten(p.state, 2), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def tied(item_ids, item_matrix):
    """Frames of two users, each with seconds of three and of two ratings."""
    log = pd.DataFrame({"user_id": [1] * 7 + [2] * 4, "item_id": [10, 20, 30, 40, 50, 10, 20, 30, 40, 50, 10],
                        "rating": np.arange(1, 12) / 2 % 5, "timestamp": [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4]})
    return Frames(log, item_ids, item_matrix, frame_size=2)


def test_ties_are_shuffled_inside_a_users_second_alone_and_with_their_ratings(tied):
    seconds = [slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 7), slice(7, 9), slice(9, 11)]
    pairs = set(zip(tied.item_idx.tolist(), tied.rating.tolist(), strict=True))
    before, orders = tied.item_idx.clone(), {}
    for seed in [*range(40), *range(40)]:
        tied.shuffle_ties(seed)
        assert set(zip(tied.item_idx.tolist(), tied.rating.tolist(), strict=True)) == pairs
        for rows in seconds:
            assert sorted(tied.item_idx[rows].tolist()) == sorted(before[rows].tolist())
        assert orders.setdefault(seed, tied.item_idx.tolist()) == tied.item_idx.tolist()
    assert len({tuple(order[:3]) for order in orders.values()}) == 6  # every order of three is met


def test_ties_go_back_to_the_order_they_came_in_and_batches_follow(tied):
    before, order = whole(tied), tied.item_idx.clone()
    tied.shuffle_ties(1)
    t = whole(tied)
    assert not torch.equal(t.state, before.state)
    assert torch.equal(t.action, tied.items[tied.next_items(torch.arange(len(tied)))[:, 0]])
    assert torch.equal(t.next_state[:-1][t.done[:-1, 0] == 0], t.state[1:][t.done[:-1, 0] == 0])
    tied.shuffle_ties(None)
    assert torch.equal(whole(tied).state, before.state) and torch.equal(tied.item_idx, order)
    table = pd.DataFrame({"user_id": 1, "item_id": 10, "rating": tied.rating.numpy().copy(), "timestamp": 0})
    given, other = table.copy(), Frames(table, tied.item_ids, tied.items, 2)
    other.shuffle_ties(1)  # what frames are made of is left alone
    pd.testing.assert_frame_equal(table, given)
    assert other.items.data_ptr() != tied.items.data_ptr()


@pytest.fixture
def static(frames, tmp_path):
    path = tmp_path / "frames.hdf5"
    write_static(path, frames, source="toy", dtype="float32")
    return path


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize("dtype, tolerance", [("float32", {}), ("float16", dict(rtol=2**-11, atol=2**-24))])
def test_static_and_dynamic_agree_row_for_row(frames, item_matrix, tmp_path, monkeypatch, seed, dtype, tolerance):
    monkeypatch.setattr(frames_module, "ROWS", 4)
    write_static(tmp_path / "frames.hdf5", frames, "toy", seed=seed, dtype=dtype)
    static = list(read_static(tmp_path / "frames.hdf5", 3, 2, item_matrix))
    dynamic = joined(frames.batches(3, shuffle=seed is not None, seed=seed or 0))
    assert [len(batch.state) for batch in static] == [3, 3, 1]
    assert_same(joined(static), dynamic, **tolerance)
    assert torch.equal(joined(static).action, dynamic.action.to(getattr(torch, dtype)).float())
    with h5py.File(tmp_path / "frames.hdf5") as f:  # plain h5py reads it, and it says what it was made of
        assert_same([torch.as_tensor(f[key][:]).float().reshape(7, -1) for key in FIELDS], dynamic, **tolerance)
        assert dict(f.attrs) == {"frame_size": 2, "embed_size": 3, "hash": frames_module.matrix_hash(item_matrix),
                                 "source": "toy", "seed": -1 if seed is None else seed}


@pytest.mark.parametrize("smallest", [False, True])
def test_embeddings_that_lie_in_many_rows_compress_and_flipped_bytes_are_noticed(tmp_path, smallest):
    n, rng, path = 5000, np.random.default_rng(0), tmp_path / "f.hdf5"
    ratings = pd.DataFrame({"user_id": 1, "item_id": np.arange(n), "rating": 3.0, "timestamp": range(n)})
    frames = Frames(ratings, np.arange(n), rng.normal(size=(n, 64)), 10)
    write_static(path, frames, "toy", smallest=smallest)
    with h5py.File(path) as f:
        assert f["state"].id.get_storage_size() < f["state"].nbytes / 5  # each embedding lies in ten rows
        chunks = [f[key].id.get_chunk_info(1) for key in FIELDS]
    content = path.read_bytes()
    for chunk in chunks:
        middle = chunk.byte_offset + chunk.size // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:])
        with pytest.raises(DataError, match="rows"):
            list(read_static(path, 500, 10, frames.items))


def test_static_file_of_another_frame_size_or_item_matrix_is_refused(static, item_matrix):
    m = item_matrix
    for size, matrix in [(3, m), (2, m + 1e-3), (2, m[::-1].copy()), (2, m[:, :2]), (2, m.reshape(3, 5)), (2, -m)]:
        with pytest.raises(DataError, match="frame_size 2"):
            next(read_static(static, 4, size, matrix))
    for same in (torch.as_tensor(m), np.asfortranarray(m), m.astype(np.float64)):
        assert len(next(read_static(static, 4, 2, same)).state) == 4


def test_what_cannot_be_written_is_refused_and_leaves_no_file(ratings, item_ids, item_matrix, tmp_path):
    frames = Frames(ratings, item_ids, -1e5 * np.abs(item_matrix), 2)  # too large for half precision
    for some, words in ((frames, "float32"), (Frames(ratings, item_ids, item_matrix, 2, times=True), "without times")):
        with pytest.raises(DataError, match=words):
            write_static(tmp_path / "f.hdf5", some, "toy")
    assert list(tmp_path.iterdir()) == []
    write_static(tmp_path / "f.hdf5", frames, "toy", dtype="float32")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.95])
def test_truncated_static_file_gets_a_sentence(static, share):
    static.write_bytes(static.read_bytes()[:int(share * static.stat().st_size)])
    with pytest.raises(DataError, match="04_static_dataset"):
        frames_module.open_static(static)
    static.unlink()
    with pytest.raises(FileNotFoundError, match="04_static_dataset"):  # it is not called damaged
        frames_module.open_static(static)


@pytest.mark.parametrize("lacking", [*FIELDS, "frame_size", "hash", "rows"])
def test_static_file_that_lacks_a_field_an_attribute_or_rows_is_refused(static, lacking):
    with h5py.File(static, "a") as f:
        if lacking == "rows":
            del f["done"]
            f["done"] = np.zeros(3)
        else:
            del (f if lacking in FIELDS else f.attrs)[lacking]
    with pytest.raises(DataError, match="are wanted"):
        frames_module.open_static(static)
