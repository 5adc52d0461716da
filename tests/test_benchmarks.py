import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    agents,
    estimates,
    faults,
    foresight,
    frames,
    reinforce,
    results,
    scale,
    service,
    synthetic,
    whole_log,
)
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


def test_synthetic_ratings_are_the_same_for_a_seed_alone():
    assert synthetic.make(**SHAPE, seed=1) == synthetic.make(**SHAPE, seed=1) != synthetic.make(**SHAPE, seed=2)


@pytest.mark.parametrize(("name", "bench"), [("bench_frames", frames), ("bench_agents", agents),
                                             ("bench_service", service)])
def test_a_page_shows_the_measured_table_and_the_ratios_follow_from_its_rows(name, bench):
    result = json.loads((PROJECT / "res" / f"{name}.json").read_text(encoding="utf-8"))
    mark = {"bench_frames": "bench", "bench_agents": "agents", "bench_service": "service"}[name]
    assert block(mark, bench.table(result)) in page_of(mark).read_text(encoding="utf-8")
    assert bench.ratios(result["rows"]) == result["ratios"]
    assert "bf16_ndcg" not in result or agents.bf16_ndcg(result["rows"]) == result["bf16_ndcg"]


@pytest.mark.parametrize(("mark", "table"), [("headline", results.headline_table), ("results-5", results.readme_table)])
def test_a_page_shows_the_rows_of_make_results(mark, table):
    rows = json.loads((PROJECT / "res" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert block(mark, table(rows)) in page_of(mark).read_text(encoding="utf-8")


def test_a_page_shows_what_whole_runs_took():
    runs = json.loads((PROJECT / "res" / "bench_scale.json").read_text(encoding="utf-8"))["runs"]
    assert block("sizes", scale.table(runs)) in page_of("sizes").read_text(encoding="utf-8")


def test_a_page_shows_what_foresight_gained():
    rows = json.loads((PROJECT / "res" / "foresight.json").read_text(encoding="utf-8"))["rows"]
    assert block("foresight", foresight.table(rows)) in page_of("foresight").read_text(encoding="utf-8")
    at_zero = {row["policy"]: row["reward"] for row in rows if row["impatience"] == 0}
    assert at_zero["planner"] == at_zero["myopic oracle"]  # without impatience foresight must gain nothing


@pytest.mark.parametrize(("mark", "table"), [("reinforce", reinforce.table), ("estimates", estimates.table)])
def test_a_page_shows_what_a_log_taught_and_what_estimates_were_off(mark, table):
    rows = pd.DataFrame(json.loads((PROJECT / "res" / f"{mark}.json").read_text(encoding="utf-8"))["rows"])
    assert block(mark, table(rows)) in page_of(mark).read_text(encoding="utf-8")


def test_a_page_shows_the_rows_of_ml_1m():
    result = json.loads((PROJECT / "res" / "results-ml-1m.json").read_text(encoding="utf-8"))
    shown = block("results-ml-1m", whole_log.table(result["rows"]))
    assert shown in page_of("results-ml-1m").read_text(encoding="utf-8")
    rows = {row["name"]: row for row in result["rows"]}
    for each in result["protocols"]["last-1"]["differences"]:
        minus = rows[each["one"]][each["metric"]] - rows[each["other"]][each["metric"]]
        assert each["difference"] == pytest.approx(minus, abs=2e-4)
        assert each["low"] < each["difference"] < each["high"]


def test_the_benchmarked_networks_are_the_same_function():
    torch.manual_seed(0)
    state, action = torch.randn(4, agents.STATE), torch.randn(4, agents.ACTION)
    joint = agents.Critic(Joint(agents.STATE, agents.ACTION, agents.HIDDEN))
    plain = agents.Critic(nn.Linear(agents.STATE + agents.ACTION, agents.HIDDEN))
    plain.load_state_dict(joint.state_dict())
    torch.testing.assert_close(joint(state, action), plain(state, action))


def test_the_products_by_hand(monkeypatch):
    monkeypatch.setattr(agents, "STATE", 2)
    monkeypatch.setattr(agents, "ACTION", 1)
    monkeypatch.setattr(agents, "HIDDEN", 1)
    # weights: actor 2·1 + 1·1 + 1·1 = 4, critic 3·1 + 1·1 + 1·1 = 5, their later layers 2 and 2
    # critic's step: both targets 4 + 5, forward 5, backward 5 + 2; actor's: 4 + 5, through the critic 2 + 1, 4 + 2
    assert sum(m * k * n for m, k, n in agents.products(10)) == 10 * (9 + 5 + 7 + 9 + 3 + 6)


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
