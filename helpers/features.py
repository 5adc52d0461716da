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
from sklearn.preprocessing import normalize

from helpers.datasets import in_order
from helpers.files import DataError, need, replacing, shown, write_json
from helpers.frames import rows_of

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
    """Start `infos` from the catalogue; a rated item it lacks gets its id as title.

    Args:
        items: as `datasets.read_items` returns it.
        rated: item ids of the ratings (int64, repeats allowed).
    """
    infos = {}
    for item_id, title, year, genres in items[["item_id", "title", "year", "genres"]].itertuples(index=False):
        infos[int(item_id)] = {**deepcopy(SCHEMA), "title": title, "genres": list(genres),
                               "release_year": None if pd.isna(year) else int(year)}
    for item_id in sorted(set(rated.unique()) - infos.keys()):
        infos[int(item_id)] = {**deepcopy(SCHEMA), "title": f"item {item_id}"}
    return infos


def write_infos(path: Path, infos: dict[int, dict]) -> None:
    """Write `infos.json`, keys as text as JSON wants them."""
    write_json(path, {str(item_id): info for item_id, info in infos.items()})


def read_infos(path: Path) -> dict[int, dict]:
    """Read `infos.json` back, with integer item ids.

    Raises:
        DataError: if the file is damaged or a film lacks a field of the schema.
    """
    try:
        infos = {int(key): info for key, info in json.loads(Path(path).read_text(encoding="utf-8")).items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, ValueError) as error:
        raise DataError(f"{shown(path)} is damaged ({error}): delete it and run notes/01_data_parsing.ipynb") from error
    for item_id, info in infos.items():
        if lacking := SCHEMA.keys() - (info.keys() if isinstance(info, dict) else set()):
            raise DataError(f"{shown(path)}: film {item_id} lacks {', '.join(sorted(lacking))}")
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
    """Return (n_items, n_codes) float32 with a 1 for every value an item has; unknown values are left out."""
    rows, columns = [], []
    for row, values in enumerate(lists):
        known = sorted({codes[value] for value in values if value in codes})
        rows += [row] * len(known)
        columns += known
    ones = np.ones(len(rows), dtype=np.float32)
    return sparse.csr_matrix((ones, (rows, columns)), shape=(len(lists), len(codes)))


def standardise(values: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return (values − mean) / std per column, 0 where unknown or where a column is constant.

    Args:
        values: (n, d) float; NaN is unknown.
        known: rows (bool, (n,)) the statistics are taken from; all by default.
    """
    values = np.asarray(values, dtype=np.float64)
    fit = values if known is None else values[known]
    seen = ~np.isnan(fit)
    count = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, fit, 0).sum(axis=0) / count
    std = np.sqrt(np.where(seen, (fit - mean) ** 2, 0).sum(axis=0) / count)
    varies = std > 1e-12 * np.maximum(np.abs(mean), 1)
    scaled = np.where(varies, (values - mean) / np.where(varies, std, 1), 0)
    return np.nan_to_num(scaled).astype(np.float32)


def svd(matrix: np.ndarray | sparse.spmatrix, n: int, seed: int = 0) -> np.ndarray:
    """Return the leading `n` singular directions of (n_items, d) as (n_items, ≤ n) float32, rows of any norm."""
    n = min(n, min(matrix.shape) - 1)
    if n < 1:
        return np.zeros((matrix.shape[0], 0), dtype=np.float32)
    return TruncatedSVD(n, random_state=seed).fit_transform(matrix).astype(np.float32)


def co_ratings(ratings: pd.DataFrame, item_ids: np.ndarray, window: int = 5) -> sparse.csr_matrix:
    """Return the positive pointwise mutual information of items rated within `window` steps of a user.

    `ratings` must be the training part alone. An item it does not have gets an empty row.

    Returns:
        (n_items, n_items) symmetric, rows in the order of `item_ids`.

    Source: Levy & Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization", eq. 10–11,
    with users for sentences and items for words.
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
    return sparse.csr_matrix((np.maximum(pmi, 0), (counts.row, counts.col)), shape=(n, n))


def user_item(ratings: pd.DataFrame, item_ids: np.ndarray) -> sparse.csr_matrix:
    """Return the (n_items, n_users) 0/1 matrix of who rated what, rows in the order of `item_ids`."""
    user_idx, users = pd.factorize(ratings["user_id"])
    cells = (np.ones(len(ratings), dtype=np.float32), (rows_of(ratings["item_id"], item_ids), user_idx))
    matrix = sparse.csr_matrix(cells, shape=(len(item_ids), len(users)))
    matrix.data[:] = 1  # a user who rated a film twice still rated it
    return matrix


def joined(blocks: dict[str, np.ndarray], weights: dict[str, float] | None = None) -> np.ndarray:
    """Join blocks of features side by side, each scaled so that its mean squared row norm is its weight.

    Returns:
        (n_items, Σ d) float32.
    """
    scaled = []
    for name, block in blocks.items():
        centred = block - block.mean(axis=0)
        energy = np.sqrt((centred ** 2).sum(axis=1).mean())
        weight = (weights or {}).get(name, 1.0)
        scaled.append(centred * (np.sqrt(weight) / energy if energy > 0 else 0))
    return np.hstack(scaled).astype(np.float32)


def pca(matrix: np.ndarray, n: int, whiten: bool, seed: int = 0) -> tuple[np.ndarray, PCA]:
    """Project (n_items, d) on its `n` directions of largest variance; directions without any are 0.

    Returns:
        ((n_items, n) float32, the fitted sklearn PCA). Whitened columns have mean 0 and variance 1.
    """
    kept = min(n, *matrix.shape)
    fitted = PCA(kept, whiten=whiten, svd_solver="full", random_state=seed)
    projected = fitted.fit_transform(matrix)
    signs = np.where(projected[np.abs(projected).argmax(axis=0), range(kept)] < 0, -1, 1)  # the same everywhere
    fitted.components_ *= signs[:, None]
    empty = fitted.explained_variance_ <= 1e-10 * max(fitted.explained_variance_.max(), 1e-300)
    projected = np.where(empty, 0, projected * signs)
    return np.pad(projected, ((0, 0), (0, n - kept))).astype(np.float32), fitted


def votes_of(ratings: pd.DataFrame, item_ids: np.ndarray) -> pd.DataFrame:
    """Return, for each of `item_ids`, log(1 + votes) and the mean vote with five overall means added.

    `ratings` must be the training part alone.
    """
    votes = ratings.groupby("item_id")["rating"].agg(["size", "sum"]).reindex(item_ids).fillna(0)
    return pd.DataFrame({"vote_count": np.log1p(votes["size"]),
                         "vote_average": (votes["sum"] + 5 * ratings["rating"].mean()) / (votes["size"] + 5)})


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


def content_blocks(infos: dict[int, dict], vectors: dict[int, np.ndarray], text_size: int = 128, list_size: int = 128,
                   seed: int = 0) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Return (blocks of text and of lists, numerical facts): what is known of items that nobody has rated.

    Args:
        infos: {item_id: facts}, whose order is that of the rows.
        vectors: {item_id: vector of its text}.
    """
    text, _ = pca(np.stack([vectors[item_id] for item_id in infos]), text_size, whiten=False)
    lists = {field: [info[field] for info in infos.values()] for field in LISTS}
    hot = sparse.hstack([multi_hot(rows, label_encode(value for row in rows for value in row))
                         for rows in lists.values()]).tocsr()
    facts = pd.DataFrame({field: [info[field] for info in infos.values()] for field in FACTS}, index=list(infos),
                         dtype=np.float64).dropna(axis=1, how="all")
    return {"text": text, "lists": svd(hot, min(list_size, hot.shape[1] - 1), seed)}, facts


def item_matrix(ratings: pd.DataFrame, infos: dict[int, dict], vectors: dict[int, np.ndarray],
                embed_size: int = 128) -> np.ndarray:
    """Return the item matrix (n_items, embed_size) of lesson 03 for any training part, rows in the order of `infos`.

    `ratings` must be the training part alone: whoever cuts a log otherwise has to count anew.
    """
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

    Raises:
        FileNotFoundError: if there is none.
        DataError: if the file is damaged, or ids and rows do not pair.
    """
    need(path, "03_pca")
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, matrix = file["ids"], file["matrix"]
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{shown(path)} is damaged ({error}): delete it and run notes/03_pca.ipynb") from error
    if len(ids) != len(matrix) or matrix.ndim != 2:
        raise DataError(f"{shown(path)}: {len(ids)} ids for a matrix of shape {matrix.shape}")
    return ids, matrix


def nearest(matrix: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row indices, cosine similarities) of the `k` rows nearest to `query` (d,) by angle, best first."""
    similarity = normalize(matrix) @ (query / max(np.linalg.norm(query), 1e-12))
    best = np.argsort(-similarity, kind="stable")[:k]
    return best, similarity[best]
