"""The rules of reinforcement learning that this project will not break, on the lessons' own cells."""

import copy
import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import features, losses, training
from helpers.agents import d4pg, ddpg, rainbow
from helpers.files import PROJECT, write_vectors
from tools.export import NOTES

GAMMA, TAU = 0.9, 0.02
SUPPORT = torch.linspace(-4 / (1 - GAMMA), 5 / (1 - GAMMA), 51)
RULE = dict(gamma=GAMMA, tau=TAU, decay=0.7)
FULL = dict(RULE, n=3, support=SUPPORT)
SMALL = dict(hidden_size=32, dropout=0.3)
STILL = dict(hidden_size=32, dropout=0.0, item_dropout=0.0)


@pytest.fixture
def frames(twenty_users):
    return twenty_users


@pytest.fixture
def agent():
    return ddpg.new_agent(0, 3, 6, 1e-3, **STILL)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("lesson", [ddpg, d4pg])
def test_1_the_actor_goes_down_the_gradient_of_its_loss_by_hand(lesson, frames):
    if lesson is ddpg:
        agent, update, rule = ddpg.new_agent(0, 3, 6, 1e-3, **STILL), ddpg.update, RULE
    else:
        agent, update, rule = d4pg.new_d4pg_agent(0, 3, 6, 1e-3, **STILL), d4pg.d4pg_update, FULL
    agent["critic_optimiser"].param_groups[0]["lr"] = 0.0
    agent["actor_optimiser"] = torch.optim.SGD(agent["actor"].parameters(), 1.0)
    before, index = copy.deepcopy(agent["actor"]), torch.arange(40, 80)
    t = frames.gather(index)
    p = before(t.state)
    q = agent["critic"](t.state, losses.mean_item(p, frames.items))
    q = q if lesson is ddpg else losses.mean_of(q, SUPPORT)
    behaviour = losses.behaviour_loss(losses.log_policy(p, frames.items), frames.next_items(index, 2), 0.7)
    loss = -0.5 * q.mean() / q.abs().mean().item() + 3 * behaviour
    gradients = torch.autograd.grad(loss, before.parameters())
    scalars = update(agent, frames, index, **rule, future=2, value_weight=0.5, behaviour_weight=3.0)
    by_hand = {"loss/actor": loss, "loss/behaviour": behaviour, "Q/policy's action": q.mean()}
    torch.testing.assert_close({name: scalars[name].detach() for name in by_hand},
                               {name: value.detach() for name, value in by_hand.items()})
    for new, old, gradient in zip(agent["actor"].parameters(), before.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - gradient)


def test_13_a_star_weighted_target_counts_by_its_own_stars(agent, frames):
    index = torch.arange(40, 80)
    log_p = losses.log_policy(agent["actor"](frames.gather(index).state), frames.items).detach()
    items, rewards = frames.next_items(index, 2), frames.next_rewards(index, 2)[0]
    w = torch.tensor([1, 0.7]) * (items >= 0)
    counts = (1 + 0.4 * (rewards / 2 + 2.5 - 3)).clamp(min=0.05)
    by_hand = -((w * counts * log_p.gather(1, items.clamp(min=0))).sum(dim=1) / w.sum(dim=1)).mean()
    scalars = ddpg.update(agent, frames, index, **RULE, future=2, value_weight=0.0, star_weight=0.4)
    torch.testing.assert_close(scalars["loss/behaviour"].detach(), by_hand)
    assert counts.min() < 1 < counts.max()


def test_3_the_target_is_what_the_slow_copies_say_of_the_next_state(agent, frames):
    slow, t = ddpg.new_agent(1, 3, 6, 1e-3, **STILL), frames.gather(torch.arange(len(frames)))
    agent |= {"actor_target": slow["actor"], "critic_target": lambda *of: 1000 * slow["critic"](*of)}  # not clamped
    next_q = 1000 * slow["critic"](t.next_state, losses.mean_item(slow["actor"](t.next_state), frames.items))
    q = agent["critic"](t.state, t.action)
    loss, said = ddpg.critic_loss(agent, t, frames.items, GAMMA, losses.mean_item)
    torch.testing.assert_close(loss, (q - t.reward - GAMMA * next_q).square().mean())
    assert torch.equal(said, q)


def test_3_no_target_is_clamped_and_4_a_log_that_ends_is_bootstrapped_through_unless_told_otherwise():
    reward, next_q, done = torch.full((2, 1), 5.0), torch.full((2, 1), 1000.0), torch.tensor([[0.0], [1.0]])
    assert ddpg.td_target(reward, next_q, done, GAMMA).tolist() == [[905.0], [905.0]]
    assert ddpg.td_target(reward, next_q, done, GAMMA, stop_at_done=True).tolist() == [[905.0], [5.0]]


def test_6_the_mean_item_stays_among_the_items_however_long_the_proto_action(frames):
    proto_action = 1e4 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean = losses.mean_item(proto_action, frames.items)
    low, high = frames.items.min(dim=0).values, frames.items.max(dim=0).values
    assert ((mean >= low - 1e-5) & (mean <= high + 1e-5)).all()


def test_6_the_behaviour_term_lowers_its_own_loss_and_1_no_actor_step_touches_the_critic(agent, frames):
    critic, t, everything = copy.deepcopy(agent["critic"]), frames.gather(torch.arange(8)), torch.arange(len(frames))
    steps = [ddpg.update(agent, frames, everything, **RULE, value_weight=0.0) for _ in range(51)]
    assert steps[-1]["loss/behaviour"] < steps[0]["loss/behaviour"] and same(critic, agent["critic"])
    agent["actor"].zero_grad()
    ddpg.value_term(agent, t, agent["actor"](t.state), frames.items, losses.mean_item)[0].backward()
    assert all(parameter.grad is None for parameter in agent["critic"].parameters())
    assert any(parameter.grad is not None for parameter in agent["actor"].parameters())


LESSON_3 = """
import os, sys, matplotlib
matplotlib.use("agg")
for folder in sys.argv[2:]:
    os.environ["RECNN_DATASET"] = folder
    exec(compile(sys.argv[1], "03_pca", "exec"), {"display": print, "__name__": "__main__"})
"""


def test_9_lesson_3_makes_of_other_held_out_ratings_the_same_matrix(tmp_path):
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"userId": np.repeat(np.arange(20), 15), "movieId": np.tile(np.arange(15), 20) + 1,
                        "rating": rng.integers(1, 6, 300), "timestamp": np.arange(300)})
    folders = [tmp_path / name for name in ("one", "held-out", "train")]
    for folder, changed in zip(folders, ([], [13, 14], [3]), strict=True):
        table = log.assign(rating=log["rating"].where(~(log["timestamp"] % 15).isin(changed), 6 - log["rating"]))
        table["movieId"] += 20 * (table["timestamp"] % 15).isin(changed)
        home = tmp_path / "data" / folder.name
        for made in (folder, home):
            made.mkdir(parents=True)
        table.to_csv(folder / "ratings.csv", index=False)
        items = pd.DataFrame({"item_id": np.arange(1, 41), "title": "Film", "year": 1990, "genres": [["Drama"]] * 40})
        features.write_infos(home / "infos.json", features.catalogue_infos(items, items["item_id"]))
        write_vectors(home / "texts_bert.p", {i: np.sin(i * np.arange(1.0, 5)) for i in range(1, 41)})
    cells = nbformat.read(NOTES / "03_pca.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    subprocess.run([sys.executable, "-c", LESSON_3, code, *map(str, folders)], check=True, cwd=NOTES, text=True,
                   stdout=subprocess.PIPE, env={**os.environ, "RECNN_ROOT": str(tmp_path), "PYTHONPATH": str(PROJECT)})
    one, held_out, train = (np.load(tmp_path / "data" / folder.name / "embeddings.npz")["matrix"] for folder in folders)
    np.testing.assert_array_equal(one, held_out)
    assert not np.allclose(one, train, atol=1e-2)


def test_13_the_published_numbers_stand_beside_baselines_and_say_how_many_cases():
    results = json.loads((PROJECT / "res" / "05_ddpg.json").read_text(encoding="utf-8"))
    ndcg = {row["model"]: row["NDCG@10"] for row in results["table"]}
    assert results["dataset"] == "ml-100k" and results["test cases"] == 943 and results["seeds"] >= 3
    assert ndcg["random"] < 0.01
    assert ndcg["popularity"] == pytest.approx(0.043, abs=0.001)
    assert ndcg["EASE"] == pytest.approx(0.071, abs=0.002)
    assert ndcg["DDPG"] > 2.5 * ndcg["popularity"]
    assert {"supervised baseline", "EASE, recent films"} <= ndcg.keys()


def ddpg_maker(frames, seed, **options):
    agent = ddpg.new_agent(seed, 3, 6, 1e-3, **SMALL | options)
    return agent, lambda index, **how: ddpg.update(agent, frames, index, **RULE, **how)


def d4pg_maker(frames, seed, **options):
    agent = d4pg.new_d4pg_agent(seed, 3, 6, 1e-3, n_atoms=51, replay_size=len(frames), **SMALL | options)
    return agent, lambda index, **how: d4pg.d4pg_update(
        agent, frames, agent["replay"].sample(len(index)), **FULL, **how)


def rainbow_maker(frames, seed, **options):
    agent = rainbow.new_rainbow_agent(seed, frames.items, 3, 1e-3, n_transitions=len(frames), **SMALL | options)
    return agent, lambda index, **how: rainbow.rainbow_update(
        agent, frames, agent["replay"].sample(len(index)), **FULL, **how)


@pytest.fixture(params=[ddpg_maker, d4pg_maker, rainbow_maker], ids=["ddpg", "d4pg", "rainbow"])
def maker(request, frames):
    return lambda seed, **options: request.param(frames, seed, **options)


def test_5_every_agent_starts_with_copies_of_its_networks_and_learns_at_its_rates(maker):
    agent, _ = maker(0, encoder="gru")
    rates = {name: agent[f"{name}_optimiser"].param_groups[0] for name in ("actor", "critic") if name in agent}
    for name, group in rates.items():
        network, target = agent[name], agent[f"{name}_target"]
        assert network.config == target.config and network.config["encoder"] == "gru"
        assert same(network, target) and network is not target and network.training and not target.training
        assert not any(parameter.requires_grad for parameter in target.parameters())
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}
        assert group["lr"] == pytest.approx(1e-3 if name == "actor" else 1e-3 / 3) and group["weight_decay"] == 1e-4
    if "critic" in agent:
        assert maker(0, critic_dropout=0.2)[0]["critic"].config["dropout"] == 0.2


def test_5_every_agents_targets_are_exactly_the_polyak_mix_and_moved(maker):
    agent, make_step = maker(0)
    pairs = [name for name in ("actor", "critic") if name in agent]
    for _ in range(2):
        before = {name: copy.deepcopy(agent[f"{name}_target"]) for name in pairs}
        make_step(torch.arange(64))
    for name, old in before.items():
        for new, was, source in zip(agent[f"{name}_target"].parameters(), old.parameters(), agent[name].parameters(),
                                    strict=True):
            torch.testing.assert_close(new, (1 - TAU) * was + TAU * source, rtol=1e-6, atol=1e-7)
        assert not same(agent[f"{name}_target"], old)


def test_10_every_saved_agent_resumes_to_the_identical_next_step(maker, tmp_path):
    agent, make_step = maker(0)  # with dropout: random numbers must resume too
    for _ in range(4):
        make_step(torch.arange(48))
    training.save_policy(tmp_path / "policy.pt", agent["actor_target"], agent)
    made = make_step(torch.arange(48))
    assert {"loss/critic", "loss/behaviour", "loss/actor", "Q/logged action", "Q/policy's action"} == made.keys()
    again, step_again = maker(1)
    training.restore(again, training.load_policy(tmp_path / "policy.pt")[1]["parts"])
    for name, value in step_again(torch.arange(48)).items():
        assert torch.equal(value, made[name]), name
    assert all(same(part, again[name]) for name, part in agent.items() if isinstance(part, torch.nn.Module))


def test_10_the_same_seed_gives_the_same_numbers_for_every_agent(maker):
    steps = [maker(seed)[1] for seed in (3, 3, 4)]
    made = []
    for make_step in steps:
        torch.manual_seed(0)
        made.append([value.item() for _ in range(3) for value in make_step(torch.arange(48)).values()])
    assert made[0] == made[1] != made[2]
