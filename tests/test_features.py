import numpy as np
import pandas as pd
import pytest

from helpers.features import (
    behaviour,
    co_ratings,
    item_matrix,
    joined,
    label_encode,
    multi_hot,
    nearest,
    pca,
    read_item_matrix,
    standardise,
    svd,
    user_item,
    votes_of,
    write_item_matrix,
)
from helpers.files import DataError


def logs(*items_of_user):
    rows = [(user, item) for user, items in enumerate(items_of_user) for item in items]
    return pd.DataFrame(rows, columns=["user_id", "item_id"]).assign(timestamp=range(len(rows)))


def test_labels_count_from_the_most_frequent_with_ties_by_name():
    values = ["en", "fr", "de", "en", "zh", None, None, None, None, "zh", "en"]
    assert label_encode(values) == {"en": 0, "zh": 1, "de": 2, "fr": 3}
    assert list(label_encode("bca")) == ["a", "b", "c"]
    assert label_encode([None]) == {}


def test_labels_do_not_depend_on_the_order_of_the_values():
    assert label_encode("aabbc") == label_encode("cbaba")


def test_multi_hot_marks_every_known_value_once():
    matrix = multi_hot([["a", "c", "a"], [], ["x", "b"]], {"a": 0, "b": 1, "c": 2})
    assert matrix.toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert matrix.dtype == np.float32


def test_standardise_by_hand_with_unknown_values_and_constant_columns():
    values = np.array([[1.0, 5.0, np.nan], [3.0, 5.0, np.nan], [np.nan, np.nan, np.nan]])
    assert standardise(values).tolist() == [[-1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_standardise_has_mean_zero_and_variance_one():
    scaled = standardise(np.random.default_rng(0).normal(7, 3, size=(50, 2)))
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-6)
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("value, n", [(0.1, 3), (2.3, 10), (1e9 + 0.3, 7), (0.0, 4)])
def test_constant_column_is_zero_whatever_its_value(value, n):
    assert standardise(np.full((n, 1), value)).tolist() == [[0]] * n


def test_statistics_come_from_the_known_rows_alone():
    values = np.array([[1.0], [3.0], [8.0], [np.nan]])
    assert standardise(values, np.array([True, True, False, False])).tolist() == [[-1], [1], [6], [0]]


def test_reduce_keeps_the_inner_products_of_a_low_rank_matrix():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 9))
    reduced = svd(matrix, 2)
    np.testing.assert_allclose(reduced @ reduced.T, matrix @ matrix.T, atol=1e-4)
    np.testing.assert_array_equal(reduced, svd(matrix, 2))


@pytest.mark.parametrize("shape, n, width", [((6, 4), 10, 3), ((3, 9), 10, 2), ((5, 1), 3, 0), ((6, 4), 2, 2)])
def test_reduce_gives_no_more_directions_than_there_are(shape, n, width):
    assert svd(np.random.default_rng(0).normal(size=shape), n).shape == (shape[0], width)


def test_pairs_follow_time_and_not_the_order_of_rows():
    log = logs("abc").assign(timestamp=[1, 3, 2])  # a, c, b
    assert (co_ratings(log, np.array(["a", "b", "c"]), window=1).toarray() > 0).tolist() == [
        [False, False, True], [False, False, True], [True, True, False]]


@pytest.mark.parametrize("count", [co_ratings, user_item, behaviour])
def test_rated_item_without_a_row_gets_a_sentence(count):
    with pytest.raises(DataError, match=r"1 items have no row in the item matrix \(ids c …\)"):
        count(logs("abc"), np.array(["a", "b"]))


def test_ppmi_by_hand():
    # pairs: a-b once, a-c and b-c three times → total 14, margins a 4, b 4, c 6
    ratings = logs("ab", "ac", "ca", "ac", "bc", "cb", "bc")
    ab, ac = 0, np.log(3 * 14 / (4 * 6))  # a-b: ln(1·14 / (4·4)) < 0
    np.testing.assert_allclose(co_ratings(ratings, np.array(["a", "b", "c"])).toarray(),
                               [[0, ab, ac], [ab, 0, ac], [ac, ac, 0]], atol=1e-12)


def test_ppmi_rows_follow_the_item_ids_and_unrated_items_are_empty():
    matrix = co_ratings(logs("ab", "ac", "ca", "ac", "bc", "cb", "bc"), np.array(["c", "x", "a", "b"])).toarray()
    ca = np.log(3 * 14 / (4 * 6))
    np.testing.assert_allclose(matrix, [[0, 0, ca, ca], [0, 0, 0, 0], [ca, 0, 0, 0], [ca, 0, 0, 0]], atol=1e-12)


def test_pairs_lie_within_the_window_and_within_a_user():
    ids = np.array(list("abcd"))
    assert (co_ratings(logs("abc", "d"), ids, window=1).toarray() > 0).tolist() == [
        [False, True, False, False], [True, False, True, False], [False, True, False, False], [False] * 4]
    # window 2: every pair of a, b, c once → ln(1·6 / (2·2))
    np.testing.assert_allclose(co_ratings(logs("abc", "d"), ids, window=2).toarray()[:3, :3],
                               np.log(6 / 4) * (1 - np.eye(3)))


def test_logs_of_one_rating_have_no_pairs():
    assert co_ratings(logs("a", "b", "a"), np.array(["a", "b"])).toarray().tolist() == [[0, 0], [0, 0]]


def test_user_item_is_who_rated_what_once():
    matrix = user_item(logs("aba", "b", "c"), np.array(["c", "b", "a", "x"]))
    assert matrix.toarray().tolist() == [[0, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_joined_blocks_have_their_weight_as_mean_squared_norm():
    rng = np.random.default_rng(0)
    both = joined({"a": rng.normal(5, 100, (40, 3)), "b": rng.normal(-2, 0.01, (40, 2))}, {"b": 0.25})
    assert both.shape == (40, 5) and both.dtype == np.float32
    energy = [(block ** 2).sum(axis=1).mean() for block in (both[:, :3], both[:, 3:])]
    np.testing.assert_allclose(energy, [1, 0.25], rtol=1e-5)
    np.testing.assert_allclose(both.mean(axis=0), 0, atol=1e-6)


def test_joined_keeps_a_block_without_content_at_zero():
    assert joined({"a": np.array([[1.0], [-1.0]]), "b": np.full((2, 2), 7.0)}).tolist() == [[1, 0, 0], [-1, 0, 0]]


def test_whitened_columns_have_the_identity_as_covariance():
    rng = np.random.default_rng(0)
    projected, _ = pca(rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3, 4, whiten=True)
    np.testing.assert_allclose(np.cov(projected, rowvar=False), np.eye(4), atol=1e-4)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-5)
    assert projected.dtype == np.float32


def test_plain_pca_keeps_distances_and_orders_the_variances():
    matrix = np.random.default_rng(0).normal(size=(30, 4)) * [1, 5, 2, 3]
    projected, _ = pca(matrix, 4, whiten=False)
    assert (np.diff(projected.var(axis=0)) < 0).all()
    distance = np.linalg.norm(matrix[:-1] - matrix[1:], axis=1)
    np.testing.assert_allclose(np.linalg.norm(projected[:-1] - projected[1:], axis=1), distance, rtol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
def test_missing_directions_are_zero(whiten):
    matrix = np.random.default_rng(0).normal(size=(20, 3))
    projected, _ = pca(matrix, 5, whiten)
    assert projected.shape == (20, 5)
    assert (projected[:, 3:] == 0).all() and (projected[:, :3].std(axis=0) > 0.5).all()


@pytest.mark.parametrize("n_items, rank", [(20, 2), (4, 3)])
def test_directions_without_variance_are_zero_and_not_whitened_noise(n_items, rank):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(n_items, rank)) @ rng.normal(size=(rank, 6))  # n_items centred rows: rank ≤ n_items − 1
    projected, _ = pca(matrix, 4, whiten=True)
    np.testing.assert_allclose(projected[:, rank:], 0, atol=1e-5)


def test_each_direction_points_to_its_extreme_item():
    projected, _ = pca(np.random.default_rng(3).normal(size=(25, 6)), 6, whiten=True)
    assert (projected.max(axis=0) == np.abs(projected).max(axis=0)).all()


@pytest.mark.parametrize("seed", range(3))
def test_fitted_pca_projects_an_item_to_where_it_lies(seed):
    matrix = np.random.default_rng(seed).normal(size=(25, 6))
    projected, fitted = pca(matrix, 6, whiten=True)
    np.testing.assert_allclose(fitted.transform(matrix), projected, atol=1e-4)


def test_item_matrix_comes_back(tmp_path):
    ids, matrix = np.array([7, 3]), np.array([[1.5, 2.5, 0.1], [3.5, 4.5, 0.2]])
    write_item_matrix(tmp_path / "embeddings.npz", ids, matrix)
    back_ids, back = read_item_matrix(tmp_path / "embeddings.npz")
    assert back_ids.dtype == np.int64 and back.dtype == np.float32
    np.testing.assert_array_equal(back_ids, ids)
    np.testing.assert_array_equal(back, matrix.astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings.npz"]


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.95])
def test_truncated_item_matrix_gets_a_sentence(tmp_path, share):
    path = tmp_path / "embeddings.npz"
    write_item_matrix(path, np.arange(50), np.random.default_rng(0).normal(size=(50, 4)))
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"embeddings.npz is damaged .* run notes/03_pca.ipynb"):
        read_item_matrix(path)


def test_altered_item_matrix_gets_a_sentence(tmp_path):
    path = tmp_path / "embeddings.npz"
    write_item_matrix(path, np.arange(50), np.random.default_rng(0).normal(size=(50, 4)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"embeddings.npz is damaged"):
        read_item_matrix(path)


def test_other_arrays_in_its_place_get_a_sentence(tmp_path):
    path = tmp_path / "embeddings.npz"
    for arrays in ({"ids": np.arange(3)}, {"ids": np.arange(3), "matrix": np.ones((2, 4))},
                   {"ids": np.arange(3), "matrix": np.ones(3)}, {"ids": np.array([None]), "matrix": np.ones((1, 2))}):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=r"embeddings.npz"):
            read_item_matrix(path)


def test_single_array_in_its_place_gets_a_sentence(tmp_path):
    with (tmp_path / "embeddings.npz").open("wb") as file:
        np.save(file, np.ones((3, 2)))
    with pytest.raises(DataError, match=r"embeddings.npz"):
        read_item_matrix(tmp_path / "embeddings.npz")


def test_missing_item_matrix_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"embeddings.npz"):
        read_item_matrix(tmp_path / "embeddings.npz")


def test_nearest_goes_by_angle_best_first():
    matrix = np.array([[0.0, 1.0], [100.0, 100.0], [0.1, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    rows, similarity = nearest(matrix, np.array([3.0, 0.0]), 3)
    assert rows.tolist() == [2, 1, 0]
    np.testing.assert_allclose(similarity, [1, np.sqrt(1 / 2), 0])


def test_nearest_to_nothing_is_no_number_but_zero():
    assert nearest(np.eye(2), np.zeros(2), 2)[1].tolist() == [0, 0]


def test_an_item_matrix_reads_the_training_part_alone():
    rng = np.random.default_rng(0)
    infos = {i: {"genres": [["Drama", "Comedy", "War", "Crime"][i % 4]], "production_companies": [],
                 "production_countries": [], "spoken_languages": [], "release_year": 1980 + i, "runtime": None,
                 "budget": None, "revenue": None} for i in range(40)}
    vectors = {i: rng.normal(size=20).astype(np.float32) for i in infos}
    log = pd.DataFrame({"user_id": np.repeat(np.arange(30), 12), "item_id": rng.integers(0, 39, 360),
                        "rating": rng.integers(1, 6, 360).astype(float), "timestamp": np.tile(np.arange(12), 30)})
    train = log[log["timestamp"] < 9]
    matrix = item_matrix(train, infos, vectors, 8)
    assert matrix.shape == (40, 8) and np.isfinite(matrix).all()
    assert not np.allclose(item_matrix(log, infos, vectors, 8), matrix, atol=1e-2)
    votes = votes_of(train, np.arange(40))
    assert votes.loc[39, "vote_count"] == 0 and votes.loc[39, "vote_average"] == pytest.approx(train["rating"].mean())
    blocks = behaviour(train, np.arange(40), user_size=4, co_rating_size=6)
    assert {name: block.shape for name, block in blocks.items()} == {"co-ratings": (40, 6), "users": (40, 4)}
