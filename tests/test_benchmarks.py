import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import agents, estimates, faults, foresight, frames, reinforce, results, scale, service, synthetic
from benchmarks.whole_log import table as table_of_ml_1m
from helpers.datasets import read_ratings
from helpers.files import PROJECT
from helpers.networks import Joint
from tools.readme import block, page_of

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
    assert synthetic.make(**SHAPE, seed=1) == synthetic.make(**SHAPE, seed=1) != synthetic.make(**SHAPE, seed=2)


def read(name):
    return json.loads((PROJECT / "res" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("mark", "name", "key", "table"), [
    ("bench", "bench_frames", None, frames.table), ("agents", "bench_agents", None, agents.table),
    ("service", "bench_service", None, service.table), ("headline", "results", "rows", results.headline_table),
    ("results-5", "results", "rows", results.readme_table), ("sizes", "bench_scale", "runs", scale.table),
    ("foresight", "foresight", "rows", foresight.table), ("reinforce", "reinforce", "rows", reinforce.table),
    ("estimates", "estimates", "rows", estimates.table), ("results-ml-1m", "results-ml-1m", "rows", table_of_ml_1m),
    ("results-5-ml-1m", "results-ml-1m", "rows", results.ranking_table)])
def test_a_page_shows_the_stored_numbers(mark, name, key, table):
    rows = read(name)[key] if key else read(name)
    shown = table(pd.DataFrame(rows) if mark in ("reinforce", "estimates") else rows)
    assert block(mark, shown) in page_of(mark).read_text(encoding="utf-8") and "nan" not in shown


@pytest.mark.parametrize("bench", [frames, agents, service])
def test_ratios_and_differences_follow_from_the_rows_they_stand_beside(bench):
    result = read(f"bench_{bench.__name__.rpartition('.')[2]}")
    assert bench.ratios(result["rows"]) == result["ratios"]
    assert "bf16_ndcg" not in result or agents.bf16_ndcg(result["rows"]) == result["bf16_ndcg"]
    at_zero = {row["policy"]: row["reward"] for row in read("foresight")["rows"] if row["impatience"] == 0}
    assert at_zero["planner"] == at_zero["myopic oracle"]  # without impatience foresight must gain nothing
    rows = {row["name"]: row for row in read("results-ml-1m")["rows"] if row["protocol"] == "last-1"}
    for each in read("results-ml-1m")["protocols"]["last-1"]["differences"]:
        minus = rows[each["one"]][each["metric"]] - rows[each["other"]][each["metric"]]
        assert each["difference"] == pytest.approx(minus, abs=2e-4)
        bounds = [each["low"], each["difference"], each["high"]]
        assert bounds[0] < bounds[1] < bounds[2] or bounds == [0, 0, 0]  # of two rows of one policy: nothing differs


def test_the_benchmarked_networks_are_the_same_function():
    torch.manual_seed(0)
    state, action = torch.randn(4, agents.STATE), torch.randn(4, agents.ACTION)
    joint = agents.Critic(Joint(agents.STATE, agents.ACTION, agents.HIDDEN))
    plain = agents.Critic(nn.Linear(agents.STATE + agents.ACTION, agents.HIDDEN))
    plain.load_state_dict(joint.state_dict())
    torch.testing.assert_close(joint(state, action), plain(state, action))


def test_the_update_multiplies_no_more_than_the_products_it_is_compared_with():
    frames = agents.synthetic_frames(n_users=20, n_ratings=20, n_items=50)
    step, index = agents.ours(frames), torch.arange(16)
    with FlopCounterMode(display=False) as counter:
        step(index, None)
    assert counter.get_total_flops() == 2 * sum(m * k * n for m, k, n in agents.products(len(index)))


def test_what_a_fault_replaces_stands_in_its_file_once():
    counts = {right: (PROJECT / "helpers" / name).read_text(encoding="utf-8").count(right)
              for name, right, *_ in faults.FAULTS}
    assert counts == dict.fromkeys(counts, 1) and len(counts) == 25
