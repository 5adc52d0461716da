import json

import numpy as np

from helpers.datasets import read_ratings
from helpers.files import PROJECT
from tests.benchmarks import synthetic
from tests.benchmarks.frames import ratios, table

SHAPE = dict(n_users=200, n_items=500, n_ratings=12_000)


def test_synthetic_ratings_have_the_shape_asked_for_and_are_called_synthetic(tmp_path):
    path = synthetic.write(tmp_path, **SHAPE, seed=1)
    ratings = read_ratings(tmp_path)
    lengths, taken = ratings.groupby("user_id").size(), ratings.groupby("item_id").size().sort_values()
    assert (len(ratings), len(lengths), ratings["item_id"].nunique() <= 500) == (12_000, 200, True)
    assert lengths.min() >= 20 and not ratings.duplicated(["user_id", "item_id"]).any()
    assert set(ratings["rating"]) == set(np.arange(1, 11) / 2)
    assert taken.iloc[-50:].sum() > 3 * taken.iloc[:50].sum()  # few items are rated by many
    assert "SYNTHETIC" in (tmp_path / "SYNTHETIC.txt").read_text()
    assert path.read_text().startswith("userId,movieId,rating,timestamp\n1,")


def test_synthetic_ratings_are_the_same_for_a_seed_alone():
    assert synthetic.make(**SHAPE, seed=1) == synthetic.make(**SHAPE, seed=1) != synthetic.make(**SHAPE, seed=2)


def test_readme_shows_the_measured_table_and_the_ratios_follow_from_its_rows():
    result = json.loads((PROJECT / "res" / "bench_frames.json").read_text(encoding="utf-8"))
    assert table(result) in (PROJECT / "README.md").read_text(encoding="utf-8")
    assert ratios(result["rows"]) == result["ratios"]
