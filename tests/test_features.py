import numpy as np
import pandas as pd
import pytest

from helpers import features
from helpers.features import behaviour, co_ratings, joined, label_encode, pca, standardise, svd
from helpers.files import DataError


def logs(*items_of_user):
    rows = [(user, item) for user, items in enumerate(items_of_user) for item in items]
    return pd.DataFrame(rows, columns=["user_id", "item_id"]).assign(timestamp=range(len(rows)))


@pytest.mark.parametrize(("values", "expected"), [
    (["en", "fr", "de", "en", "zh", None, None, None, None, "zh", "en"], ["en", "zh", "de", "fr"]),
    ("bca", ["a", "b", "c"]), ("aabbc", ["a", "b", "c"]), ("cbaba", ["a", "b", "c"]), ([None], [])])
def test_labels_count_from_the_most_frequent_with_ties_by_name(values, expected):
    assert list(label_encode(values).items()) == [(value, code) for code, value in enumerate(expected)]


@pytest.mark.parametrize("value, n", [(0.1, 3), (2.3, 10), (1e9 + 0.3, 7), (0.0, 4)])
def test_constant_column_is_zero_whatever_its_value_and_adds_nothing(value, n):
    constant = standardise(np.full((n, 1), value))
    np.testing.assert_allclose(constant, 0, atol=1e-6)
    block = np.arange(n, dtype=float)[:, None] - (n - 1) / 2
    np.testing.assert_array_equal(joined({"a": block, "b": standardise(np.full((n, 2), 2.3))})[:, 1:], 0)
    assert standardise(np.zeros((5, 0))).shape == (5, 0)


@pytest.mark.parametrize("shape, n, width", [((6, 4), 10, 3), ((3, 9), 10, 2), ((5, 1), 3, 0), ((6, 4), 2, 2)])
def test_reduce_gives_no_more_directions_than_there_are_and_keeps_inner_products(shape, n, width):
    rng = np.random.default_rng(0)
    assert svd(rng.normal(size=shape), n).shape == (shape[0], width)
    matrix = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 9))
    reduced = svd(matrix, 2)
    np.testing.assert_allclose(reduced @ reduced.T, matrix @ matrix.T, atol=1e-4)
    np.testing.assert_array_equal(reduced, svd(matrix, 2))


AC = np.log(3 * 14 / (4 * 6))  # a-b once, a-c and b-c three times → total 14, margins a 4, b 4, c 6; a-b: ln(14/16) < 0


@pytest.mark.parametrize(("users", "ids", "window", "expected"), [
    (("ab", "ac", "ca", "ac", "bc", "cb", "bc"), "abc", 5, [[0, 0, AC], [0, 0, AC], [AC, AC, 0]]),
    (("ab", "ac", "ca", "ac", "bc", "cb", "bc"), "cxab", 5,  # rows as the ids; x, unrated, is empty
     [[0, 0, AC, AC], [0, 0, 0, 0], [AC, 0, 0, 0], [AC, 0, 0, 0]]),
    (("abc", "d"), "abcd", 1, [[0, np.log(2), 0, 0], [np.log(2), 0, np.log(2), 0], [0, np.log(2), 0, 0], [0] * 4]),
    (("abc", "d"), "abcd", 2, np.pad(np.log(6 / 4) * (1 - np.eye(3)), (0, 1))),
    (("a", "b", "a"), "ab", 5, [[0, 0], [0, 0]])])
def test_co_ratings_by_hand_within_the_window_and_within_a_user(users, ids, window, expected):
    log = logs(*users).sample(frac=1, random_state=0)  # time counts, not the order of rows
    np.testing.assert_allclose(co_ratings(log, np.array(list(ids)), window).toarray(), expected, atol=1e-12)


def test_joined_blocks_have_their_weight_as_mean_squared_norm_and_one_without_content_is_zero():
    rng = np.random.default_rng(0)
    both = joined({"a": rng.normal(5, 100, (40, 3)), "b": rng.normal(-2, 0.01, (40, 2)), "c": np.full((40, 1), 7.0)},
                  {"b": 0.25})
    assert both.shape == (40, 6) and both.dtype == np.float32 and (both[:, 5] == 0).all()
    energy = [(block ** 2).sum(axis=1).mean() for block in (both[:, :3], both[:, 3:])]
    np.testing.assert_allclose(energy, [1, 0.25], rtol=1e-5)
    np.testing.assert_allclose(both.mean(axis=0), 0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_columns_have_the_identity_as_covariance_and_point_to_their_extreme_item(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3
    projected, fitted = pca(matrix, 4, whiten=True)
    np.testing.assert_allclose(fitted.transform(matrix), projected, atol=1e-4)
    np.testing.assert_allclose(np.cov(projected, rowvar=False), np.eye(4), atol=1e-4)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-5)
    assert projected.dtype == np.float32 and (projected.max(axis=0) == np.abs(projected).max(axis=0)).all()


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("n_items, rank, d", [(20, 3, 3), (20, 2, 6), (4, 3, 6)])  # centred rows: rank ≤ n_items − 1
def test_directions_that_are_missing_or_without_variance_are_zero_and_not_whitened_noise(whiten, n_items, rank, d):
    rng = np.random.default_rng(0)
    projected, _ = pca(rng.normal(size=(n_items, rank)) @ rng.normal(size=(rank, d)), 5, whiten)
    assert projected.shape == (n_items, 5) and (projected[:, :rank].std(axis=0) > 0.1).all()
    np.testing.assert_array_equal(projected[:, rank:], 0)
    assert whiten or (np.diff(projected[:, :rank].var(axis=0)) < 0).all()  # the largest first


def test_item_matrix_comes_back(tmp_path):
    with pytest.raises(FileNotFoundError, match="embeddings"):  # it is not called damaged
        features.read_item_matrix(tmp_path / "embeddings.npz")
    matrix = np.array([[1.5, 2.5, 0.1], [3.5, 4.5, 0.2]])
    features.write_item_matrix(tmp_path / "embeddings.npz", np.array([7, 3]), matrix)
    ids, back = features.read_item_matrix(tmp_path / "embeddings.npz")
    assert (ids.dtype, ids.tolist(), back.dtype) == (np.int64, [7, 3], np.float32)
    np.testing.assert_array_equal(back, matrix.astype(np.float32))


@pytest.mark.parametrize(("damage", "arrays"), [
    (lambda b: b[:0], {"ids": [1]}), (lambda b: b[:len(b) // 50], {"ids": [1, 2, 3], "matrix": np.ones((2, 4))}),
    (lambda b: b[:len(b) // 2], {"ids": [1, 2, 3], "matrix": np.ones(3)}), (lambda b: b[:-9], np.ones((3, 2))),
    (lambda b: b[:600] + b"\xff" * 40 + b[640:], {"ids": np.array([None]), "matrix": np.ones((1, 2))})])
def test_a_damaged_item_matrix_and_other_arrays_in_its_place_get_a_sentence(tmp_path, damage, arrays):
    path = tmp_path / "embeddings.npz"
    features.write_item_matrix(path, np.arange(50), np.random.default_rng(0).normal(size=(50, 4)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="03_pca"):
        features.read_item_matrix(path)
    with path.open("wb") as file:
        np.savez(file, **arrays) if isinstance(arrays, dict) else np.save(file, arrays)
    with pytest.raises(DataError, match="embeddings"):
        features.read_item_matrix(path)


@pytest.fixture
def films():
    """Return (infos, vectors, ratings) of 40 films, the last of which nobody has rated."""
    rng = np.random.default_rng(0)
    infos = {i: {"genres": [["Drama", "Comedy", "War", "Crime"][i % 4]], "production_companies": [],
                 "production_countries": ["US"], "spoken_languages": [], "release_year": 1980 + i,
                 "runtime": 90 + i if i % 3 else None, "budget": None, "revenue": None} for i in range(40)}
    vectors = {i: rng.normal(size=20).astype(np.float32) * (1 + np.arange(20)) for i in infos}
    log = pd.DataFrame({"user_id": np.repeat(np.arange(30), 12), "item_id": rng.integers(0, 39, 360),
                        "rating": rng.integers(1, 6, 360).astype(float), "timestamp": np.tile(np.arange(12), 30)})
    return infos, vectors, log


def test_content_keeps_the_distances_of_texts_and_counts_what_lists_share(films):
    infos, vectors, _ = films
    blocks, facts = features.content_blocks(infos, vectors)
    text = np.stack(list(vectors.values()))
    np.testing.assert_allclose(np.linalg.norm(blocks["text"][1:] - blocks["text"][:-1], axis=1),
                               np.linalg.norm(text[1:] - text[:-1], axis=1), rtol=1e-4)
    genre = np.arange(40) % 4
    np.testing.assert_allclose(blocks["lists"] @ blocks["lists"].T, 1 + (genre[:, None] == genre), atol=1e-4)
    assert facts.columns.tolist() == ["release_year", "runtime"]  # of the others nothing is known
    assert facts.loc[7, "release_year"] == 1987 and np.isnan(facts.loc[6, "runtime"])


def test_behaviour_gives_an_unrated_item_the_mean_of_the_others_and_wants_a_row_of_each_rated_one(films):
    ids = np.arange(40)
    for count in (co_ratings, features.user_item, behaviour):
        with pytest.raises(DataError, match="ids 38"):
            count(films[2], ids[:38])
    blocks = behaviour(films[2], ids, window=2, user_size=4, co_rating_size=6)
    assert {name: block.shape for name, block in blocks.items()} == {"co-ratings": (40, 6), "users": (40, 4)}
    for block, source in ((blocks["co-ratings"], co_ratings(films[2], ids, 2)),
                          (blocks["users"], features.user_item(films[2], ids))):
        np.testing.assert_array_equal(block[:39], svd(source, block.shape[1])[:39])
        np.testing.assert_allclose(block[39], block[:39].mean(axis=0), atol=1e-6)


def test_an_item_matrix_whitens_all_blocks_with_little_weight_for_numbers_and_reads_the_ratings_it_gets(films):
    infos, vectors, log = films
    matrix = features.item_matrix(log, infos, vectors, 8)
    blocks, facts = features.content_blocks(infos, vectors)
    numbers = standardise(facts.join(features.votes_of(log, np.arange(40))).to_numpy())
    by_hand = joined(blocks | {"numbers": numbers} | behaviour(log, np.arange(40)), {"numbers": 0.3})
    np.testing.assert_allclose(matrix, pca(by_hand, 8, whiten=True)[0], atol=1e-5)
    assert not np.allclose(features.item_matrix(log[log["timestamp"] < 9], infos, vectors, 8), matrix, atol=1e-2)
