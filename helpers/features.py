"""Turn facts, texts and co-ratings into numbers, and numbers into one item matrix."""

import json
import zipfile
from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.preprocessing import StandardScaler, normalize

from helpers.files import damaged, need, replacing, write_json
from helpers.tables import in_order, rows_of

LISTS = ("genres", "production_companies", "production_countries", "spoken_languages")
FACTS = ("release_year", "runtime", "budget", "revenue")

# The schema of a film's facts. None: unknown; an empty list: none known.
SCHEMA: dict[str, Any] = {
    "adult": False, "collection": None, "genres": [], "original_language": None, "overview": None,
    "popularity": None, "production_companies": [], "production_countries": [], "release_year": None,
    "release_month": None, "revenue": None, "runtime": None, "spoken_languages": [], "tagline": None,
    "title": None, "vote_average": None, "vote_count": None, "budget": None, "revenue_d": None,
}


def catalogue_infos(items: pd.DataFrame, rated: pd.Series) -> dict[int, dict]:
    """Start `infos` from the catalogue, as `datasets.read_items` returns it; a `rated` id it lacks becomes a title."""
    infos = {int(item_id): {**deepcopy(SCHEMA), "title": title, "genres": list(genres),
                            "release_year": None if pd.isna(year) else int(year)}
             for item_id, title, year, genres in items[["item_id", "title", "year", "genres"]].itertuples(index=False)}
    lacking = sorted(set(rated.unique()) - infos.keys())
    return infos | {int(item_id): {**deepcopy(SCHEMA), "title": f"item {item_id}"} for item_id in lacking}


def write_infos(path: Path, infos: dict[int, dict]) -> None:
    """Write `infos.json`, keys as text as JSON wants them."""
    write_json(path, {str(item_id): info for item_id, info in infos.items()})


def read_infos(path: Path) -> dict[int, dict]:
    """Read `infos.json` back, with integer item ids; DataError if it is damaged or a film lacks a field."""
    try:
        infos = {int(key): info for key, info in json.loads(Path(path).read_text(encoding="utf-8")).items()}
        for item_id, info in infos.items():
            if lacking := SCHEMA.keys() - set(info if isinstance(info, dict) else ()):
                raise ValueError(f"film {item_id} lacks {', '.join(sorted(lacking))}")
    except (AttributeError, ValueError) as error:
        raise damaged(path, "notes/01_data_parsing.ipynb", error) from error
    return infos


def label_encode(values: Iterable) -> dict:
    """Number the distinct values from the most frequent (0) on; ties in alphabetical order.

    >>> label_encode(["en", "fr", "en", "de"])
    {'en': 0, 'de': 1, 'fr': 2}
    """
    counts = Counter(value for value in values if value is not None)
    ordered = sorted(counts, key=lambda value: (-counts[value], str(value)))
    return {value: code for code, value in enumerate(ordered)}


def multi_hot(lists: list[list], codes: dict) -> sparse.csr_matrix:
    """Return (n_items, n_codes) float32 with a 1 for every value an item has; unknown values are left out.

    >>> multi_hot([["a", "c", "a"], [], ["x", "b"]], {"a": 0, "b": 1, "c": 2}).toarray().tolist()
    [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    cells = sorted({(row, codes[value]) for row, values in enumerate(lists) for value in values if value in codes})
    rows, columns = np.array(cells, dtype=np.int64).reshape(-1, 2).T
    return sparse.csr_matrix((np.ones(len(cells), np.float32), (rows, columns)), shape=(len(lists), len(codes)))


def standardise(values: np.ndarray) -> np.ndarray:
    """Return (values − mean) / std by column (n, d) float32; 0 where unknown (NaN), and where a column is constant.

    >>> standardise(np.array([[1, 7, np.nan], [3, 7, np.nan], [np.nan, 7, np.nan]])).tolist()
    [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    values = np.asarray(values, np.float64)
    if not values.size:  # of a catalogue without any number
        return values.astype(np.float32)
    with np.errstate(invalid="ignore"):  # nothing known in a column
        return np.nan_to_num(StandardScaler().fit_transform(values)).astype(np.float32)


MANY = 10_000_000  # cells of a matrix above which half the memory and half the time count for more than the last digits


def svd(matrix: np.ndarray | sparse.spmatrix, n: int, seed: int = 0) -> np.ndarray:
    """Return the leading `n` singular directions of (n_items, d) as (n_items, ≤ n) float32, rows of any norm."""
    n = min(n, min(matrix.shape) - 1)
    if n < 1:
        return np.zeros((matrix.shape[0], 0), dtype=np.float32)
    return TruncatedSVD(n, random_state=seed).fit_transform(matrix).astype(np.float32)


def co_ratings(ratings: pd.DataFrame, item_ids: np.ndarray, window: int = 5) -> sparse.csr_matrix:
    """Return the positive pointwise mutual information of items rated within `window` steps of a user.

    `ratings` must be the training part alone. The result is (n_items, n_items), symmetric, rows as `item_ids`; that of
    an item without ratings is empty. Source: Levy & Goldberg 2014, eq. 10–11, users for sentences, items for words.
    """
    n, ratings = len(item_ids), in_order(ratings)
    index, users = rows_of(ratings["item_id"], item_ids), ratings["user_id"].to_numpy()
    counts = sparse.csr_matrix((n, n), dtype=np.float64)
    for lag in range(1, window + 1):
        same = users[lag:] == users[:-lag]
        pair = (index[:-lag][same], index[lag:][same])
        counts = counts + sparse.csr_matrix((np.ones(len(pair[0])), pair), shape=(n, n))
    counts = (counts + counts.T).tocoo()
    total, margin = counts.sum(), np.asarray(counts.sum(axis=0)).ravel()
    pmi = np.log(counts.data * total / (margin[counts.row] * margin[counts.col]))
    kind = np.float64 if counts.nnz < MANY else np.float32
    return sparse.csr_matrix((np.maximum(pmi, 0).astype(kind), (counts.row, counts.col)), shape=(n, n))


def user_item(ratings: pd.DataFrame, item_ids: np.ndarray) -> sparse.csr_matrix:
    """Return the (n_items, n_users) 0/1 matrix of who rated what, rows in the order of `item_ids`.

    >>> user_item(pd.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [7, 9, 7, 7]}), np.array([9, 7])).toarray().tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    user_idx, users = pd.factorize(ratings["user_id"])
    cells = (np.ones(len(ratings), dtype=np.float32), (rows_of(ratings["item_id"], item_ids), user_idx))
    matrix = sparse.csr_matrix(cells, shape=(len(item_ids), len(users)))
    matrix.data[:] = 1  # a user who rated a film twice still rated it
    return matrix


def joined(blocks: dict[str, np.ndarray], weights: dict[str, float] | None = None) -> np.ndarray:
    """Return (n_items, Σ d) float32: blocks side by side, centred, each with its weight as mean squared row norm."""
    scaled = []
    for name, block in blocks.items():
        centred = block - block.mean(axis=0)
        energy = np.sqrt((centred ** 2).sum(axis=1).mean())  # next to none: rounding of a constant
        scaled.append(centred * (np.sqrt((weights or {}).get(name, 1)) / energy if energy > 1e-9 else 0))
    return np.hstack(scaled).astype(np.float32)


def pca(matrix: np.ndarray, n: int, whiten: bool) -> tuple[np.ndarray, PCA]:
    """Project (n_items, d) on its `n` directions of largest variance: (n_items, n) float32, and the fitted PCA.

    Whitened columns have mean 0 and variance 1; directions without any variance are 0.
    """
    kept = min(n, *matrix.shape)
    fitted = PCA(kept, whiten=whiten, svd_solver="full")
    projected = fitted.fit_transform(matrix)
    signs = np.where(projected[np.abs(projected).argmax(axis=0), range(kept)] < 0, -1, 1)  # the same everywhere
    fitted.components_ *= signs[:, None]
    empty = fitted.explained_variance_ <= 1e-10 * max(fitted.explained_variance_.max(), 1e-300)
    projected = np.where(empty, 0, projected * signs)
    return np.pad(projected, ((0, 0), (0, n - kept))).astype(np.float32), fitted


def votes_of(ratings: pd.DataFrame, item_ids: np.ndarray) -> pd.DataFrame:
    """Return, for each of `item_ids`, log(1 + votes) and the mean vote with five overall means added.

    `ratings` must be the training part alone.

    >>> ratings = pd.DataFrame({"item_id": [1, 1, 2, 2], "rating": [5.0, 4, 1, 2]})
    >>> votes_of(ratings, np.array([1, 9])).round(2).to_numpy()
    array([[1.1 , 3.43],
           [0.  , 3.  ]])
    """
    votes = ratings["item_id"].value_counts().reindex(item_ids).fillna(0)
    return pd.DataFrame({"vote_count": np.log1p(votes), "vote_average": damped_mean(ratings, item_ids, 5)})


def damped_mean(ratings: pd.DataFrame, item_ids: np.ndarray, damping: float) -> pd.Series:
    """Return by item_id the mean rating of each item and of `damping` ratings of the overall mean beside."""
    of_item = ratings.groupby("item_id")["rating"].agg(["size", "sum"]).reindex(item_ids).fillna(0)
    return (of_item["sum"] + damping * ratings["rating"].mean()) / (of_item["size"] + damping)


def behaviour(ratings: pd.DataFrame, item_ids: np.ndarray, window: int = 5, co_rating_size: int = 96,
              user_size: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Return two blocks of who rated what, rows in the order of `item_ids`: by co-ratings, and by users.

    `ratings` must be the training part alone. An item it does not have gets the mean of the others.
    """
    both = {"co-ratings": svd(co_ratings(ratings, item_ids, window), co_rating_size, seed),
            "users": svd(user_item(ratings, item_ids), user_size, seed)}
    unrated = ~np.isin(item_ids, ratings["item_id"])
    for block in both.values():
        block[unrated] = block[~unrated].mean(axis=0)
    return both


def content_blocks(infos: dict[int, dict],
                   vectors: dict[int, np.ndarray]) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Return (blocks of text and of lists, of 128 numbers each; numerical facts): what is known of unrated items too.

    Rows are in the order of `infos`, {item_id: facts}; `vectors` are those of its texts, {item_id: (d,)}.
    """
    text, _ = pca(np.stack([vectors[item_id] for item_id in infos]), 128, whiten=False)
    lists = [[info[field] for info in infos.values()] for field in LISTS]
    hot = sparse.hstack([multi_hot(rows, label_encode(value for row in rows for value in row)) for rows in lists])
    facts = pd.DataFrame({field: [info[field] for info in infos.values()] for field in FACTS}, index=list(infos),
                         dtype=np.float64).dropna(axis=1, how="all")
    return {"text": text, "lists": svd(hot.tocsr(), 128)}, facts


def item_matrix(ratings: pd.DataFrame, infos: dict[int, dict], vectors: dict[int, np.ndarray],
                embed_size: int = 128) -> np.ndarray:
    """Return the item matrix (n_items, embed_size) of lesson 03 for a training part, rows in the order of `infos`."""
    blocks, facts = content_blocks(infos, vectors)
    ids = np.array(list(infos))
    blocks |= {"numbers": standardise(facts.join(votes_of(ratings, ids)).to_numpy()), **behaviour(ratings, ids)}
    return pca(joined(blocks, {"numbers": 0.3}), embed_size, whiten=True)[0]


def write_item_matrix(path: Path, ids: np.ndarray, matrix: np.ndarray) -> None:
    """Write `embeddings.npz`: ids (n_items,) int64 and matrix (n_items, embed_size) float32."""
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, ids=np.asarray(ids, dtype=np.int64), matrix=np.asarray(matrix, dtype=np.float32))


def read_item_matrix(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read `embeddings.npz` back as (ids, matrix).

    FileNotFoundError: there is none. DataError: it is damaged, or ids and rows do not pair.
    """
    need(path, "03_pca")
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, matrix = file["ids"], file["matrix"]
        if len(ids) != len(matrix) or matrix.ndim != 2:
            raise ValueError(f"{len(ids)} ids for a matrix of shape {matrix.shape}")
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise damaged(path, "notes/03_pca.ipynb", error) from error
    return ids, matrix


def nearest(matrix: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row indices, cosine similarities) of the `k` rows nearest to `query` (d,) by angle, best first.

    >>> nearest(np.array([[0, 1.0], [100, 100], [0.1, 0], [-1, 0]]), np.array([3, 0]), 2)
    (array([2, 1]), array([1.        , 0.70710678]))
    """
    similarity = normalize(matrix) @ (query / max(np.linalg.norm(query), 1e-12))
    best = np.argsort(-similarity, kind="stable")[:k]
    return best, similarity[best]
