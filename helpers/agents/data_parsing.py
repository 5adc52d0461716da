"""What the lesson cells of notes/01_data_parsing.ipynb define; `make agents` writes it."""

import numpy as np
import pandas as pd


def what_is_odd(ratings: pd.DataFrame, items: pd.DataFrame, links: pd.DataFrame) -> pd.DataFrame:
    """Return one row a fact: `count`, and `which` items (or {tmdbId: items}), "" where there is nothing to name."""
    before, rated = ratings.shift(), ratings["item_id"].unique()
    same = (ratings["user_id"] == before["user_id"]) & (ratings["timestamp"] == before["timestamp"])
    linked = links.assign(tmdbId=links["tmdbId"].fillna("") if "tmdbId" in links else "")
    linked = linked[linked["tmdbId"] != ""].drop_duplicates(["item_id", "tmdbId"])
    shared = linked[linked["tmdbId"].duplicated(keep=False)].groupby("tmdbId")["item_id"].agg(list).to_dict()
    counted = {"ratings": len(ratings), "users": ratings["user_id"].nunique(), "items rated": len(rated),
               "duplicate (user, item) ratings": int(ratings.duplicated(["user_id", "item_id"]).sum()),
               "ratings in the same second as the one before": int(same.sum())}
    named = {"items never rated": np.setdiff1d(items["item_id"], rated).tolist(),
             "items rated but not in the catalogue": np.setdiff1d(rated, items["item_id"]).tolist(),
             "items without a tmdbId": np.setdiff1d(items["item_id"], linked["item_id"]).tolist(),
             "tmdbIds used by several items": shared}
    facts = [*((fact, n, "") for fact, n in counted.items()), *((fact, len(w), w or "") for fact, w in named.items())]
    return pd.DataFrame(facts, columns=["fact", "count", "which"]).set_index("fact")


def agreement(x: np.ndarray, y: np.ndarray) -> float:
    """Return A for x (n_films, n_catalogue_genres) and y (n_films, n_graph_genres), both of 0 and 1."""
    x, y = (m[:, m.std(axis=0) > 0] for m in (x, y))
    x, y = ((m - m.mean(axis=0)) / m.std(axis=0) for m in (x, y))
    return float(np.abs(x.T @ y / len(x)).max(axis=1).mean())
