"""The rules of reinforcement learning that this project will not break, on the lessons' own cells."""

import ast
import copy
import json

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import recommenders, training
from helpers.agents import d4pg, embeddings
from helpers.agents import ddpg as ddpg_lesson
from helpers.agents import rainbow as rainbow_lesson
from helpers.evaluation import observed_returns
from helpers.files import PROJECT
from helpers.frames import Frames, reward_of
from tools.export import NOTES
from tools.lessons import LESSONS

GAMMA, TAU = 0.9, 0.02
AGENTS = [name for name, lesson in LESSONS.items() if any(path.startswith("policies/") for path in lesson.writes)]


@pytest.fixture(scope="module")
def ddpg():
    return ddpg_lesson


@pytest.fixture
def frames(twenty_users):
    return twenty_users


@pytest.fixture
def agent(ddpg):
    return ddpg.new_agent(0, 3, 6, 1e-3, hidden_size=32, dropout=0.0, item_dropout=0.0)


def step(ddpg, agent, frames, index=None, **options):
    index = torch.arange(len(frames)) if index is None else index
    return ddpg.update(agent, frames, index, gamma=GAMMA, tau=TAU, decay=0.7, **options)


def policy_value(ddpg, agent, critic, frames):
    state = frames.gather(torch.arange(len(frames))).state
    with torch.no_grad():
        return critic(state, ddpg.mean_item(agent["actor"](state), frames.items)).mean().item()


def test_1_an_actor_step_against_a_frozen_critic_raises_q(ddpg, agent, frames):
    for group in agent["critic_optimiser"].param_groups:
        group["lr"] = 0.0
    critic = copy.deepcopy(agent["critic"])
    before = policy_value(ddpg, agent, critic, frames)
    step(ddpg, agent, frames, behaviour_weight=0.0)
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), agent["critic"].parameters(), strict=True))
    assert policy_value(ddpg, agent, critic, frames) > before


def test_1_the_actor_step_leaves_no_gradient_in_the_critic(ddpg, agent, frames):
    t = frames.gather(torch.arange(8))
    value, _ = ddpg.value_term(agent, t, agent["actor"](t.state), frames.items, ddpg.mean_item)
    value.backward()
    assert all(parameter.grad is None for parameter in agent["critic"].parameters())
    assert any(parameter.grad is not None for parameter in agent["actor"].parameters())


def test_2_a_loss_of_two_shapes_is_refused(ddpg):
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(4,\) would broadcast"):
        ddpg.squared_error(torch.zeros(4, 1), torch.zeros(4))
    assert ddpg.squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])).item() == 5 / 2


def test_2_the_critic_learns_each_row_and_not_the_mean_of_the_batch(ddpg, agent, frames):
    for _ in range(300):
        step(ddpg, agent, frames, behaviour_weight=1.0)
    t = frames.gather(torch.arange(len(frames)))
    with torch.no_grad():
        q = agent["critic"](t.state, t.action)
    assert np.corrcoef(q[:, 0], t.reward[:, 0])[0, 1] > 0.8


def test_3_no_target_and_no_loss_is_clamped(ddpg, agent, frames):
    assert ddpg.td_target(torch.tensor([[5.0]]), torch.tensor([[1000.0]]), torch.zeros(1, 1), GAMMA).item() == 905
    t = frames.gather(torch.arange(16))
    agent["critic_target"] = lambda state, action: torch.full((len(state), 1), 1000.0)
    agent["critic"] = lambda state, action: torch.zeros(len(state), 1)
    loss, _ = ddpg.critic_loss(agent, t, frames.items, GAMMA, ddpg.mean_item)
    assert loss.item() == pytest.approx(((t.reward + 900) ** 2).mean().item(), rel=1e-6)


def test_3_every_brute_force_return_lies_inside_the_bounds():
    rng = np.random.default_rng(0)
    for stars in (*rng.integers(1, 11, size=(50, 400)) / 2, np.full(400, 5.0), np.full(400, 0.5)):
        log = pd.DataFrame({"user_id": 1, "item_id": 0, "rating": stars, "timestamp": np.arange(400)})
        total, left = observed_returns(Frames(log, np.arange(1), np.ones((1, 1), np.float32), frame_size=1), GAMMA)
        assert (total >= -4 / (1 - GAMMA)).all() and (total <= 5 / (1 - GAMMA)).all()
        assert total[0].item() == pytest.approx((reward_of(stars[1:]) * GAMMA ** np.arange(399)).sum(), rel=1e-5)
        assert left.tolist() == list(range(399, 0, -1))


def test_4_a_log_that_ends_is_bootstrapped_through_unless_told_otherwise(ddpg):
    reward, next_q, done = torch.ones(2, 1), torch.full((2, 1), 10.0), torch.tensor([[0.0], [1.0]])
    assert ddpg.td_target(reward, next_q, done, GAMMA).tolist() == [[10.0], [10.0]]
    assert ddpg.td_target(reward, next_q, done, GAMMA, stop_at_done=True).tolist() == [[10.0], [1.0]]


def test_4_future_items_never_come_from_another_user(ddpg, frames):
    index = torch.arange(len(frames))
    later = frames.next_items(index, 5)
    user = torch.arange(len(frames)) // 12  # fifteen ratings, frames of three: twelve transitions a user
    for k in range(5):
        same = torch.arange(len(frames)) + k < (user + 1) * 12
        assert torch.equal(later[:, k] >= 0, same)


def test_6_the_mean_item_stays_among_the_items_however_long_the_proto_action(ddpg, frames):
    proto_action = 1e4 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean = ddpg.mean_item(proto_action, frames.items)
    low, high = frames.items.min(dim=0).values, frames.items.max(dim=0).values
    assert ((mean >= low - 1e-5) & (mean <= high + 1e-5)).all()
    assert torch.allclose(ddpg.log_policy(proto_action, frames.items).exp().sum(dim=1), torch.ones(50))


def test_6_the_behaviour_term_by_hand_and_its_direction(ddpg, agent, frames):
    log_p = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    next_items = torch.tensor([[0, 1], [2, -1]])
    by_hand = -(((np.log(0.5) + 0.5 * np.log(0.25)) / 1.5) + np.log(0.8)) / 2
    assert ddpg.behaviour_loss(log_p, next_items, 0.5).item() == pytest.approx(by_hand, rel=1e-6)
    first = step(ddpg, agent, frames, value_weight=0.0)["loss/behaviour"].item()
    for _ in range(50):
        last = step(ddpg, agent, frames, value_weight=0.0)["loss/behaviour"].item()
    assert last < first


@pytest.mark.parametrize("lesson", AGENTS)
def test_6_both_kinds_of_q_and_the_distance_to_the_items_are_logged(lesson, ddpg, agent, frames, tmp_path):
    source = "\n".join(cell.source for cell in nbformat.read(NOTES / f"{lesson}.ipynb", as_version=4).cells)
    assert "training.watcher(" in source
    log = training.Log(tmp_path)
    watch = training.watcher(log, {name: agent[name] for name in ("actor", "actor_target")}, agent["critic"],
                             frames.gather(torch.arange(9)), frames.items, lambda actor: 0.5, 2, (1, 4))
    assert "valid/NDCG@10" in watch(2) and set(watch(1)) >= {
        "Q held-out users/logged action", "Q held-out users/policy's action", "actor/length", "actor_target/length",
        "items/length", "distance/proto-action to nearest item", "distance/mean item to nearest item"}
    watch(4)
    log.rows.append({"step": 1})
    log.close()
    _, actions = training.read_log(tmp_path)
    assert {name: list(steps) for name, steps in actions.items()} == {"logged": [0], "actor": [1, 4],
                                                                      "actor_target": [1, 4]}


def test_6_the_supervised_twin_never_touches_its_critic(ddpg, agent, frames):
    before = copy.deepcopy(agent["critic"])
    step(ddpg, agent, frames, value_weight=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), agent["critic"].parameters(), strict=True))


def test_9_baselines_and_agents_of_lesson_5_are_fitted_on_the_training_part():
    cells = [c for c in nbformat.read(NOTES / "05_ddpg.ipynb", as_version=4).cells if c.cell_type == "code"]
    fits = [node for cell in cells for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("popularity", "fit_ease", "tune_ease")]
    assert {ast.unparse(call.args[0]) for call in fits} == {"split.train", "train"}
    trained_on = [ast.unparse(call.args[1]) for cell in cells for call in ast.walk(ast.parse(cell.source))
                  if isinstance(call, ast.Call) and ast.unparse(call.func) == "training.fit"]
    assert set(trained_on) == {"frames", "toy"}


def test_9_after_the_split_lesson_3_reads_the_training_part_alone():
    cells = [c for c in nbformat.read(NOTES / "03_pca.ipynb", as_version=4).cells if c.cell_type == "code"]
    split_at = next(i for i, cell in enumerate(cells) if "split_last(ratings)" in cell.source)
    forbidden = {"ratings", "valid", "test"}
    for cell in cells[split_at + 1:]:
        nodes = list(ast.walk(ast.parse(cell.source)))
        if "leak" in cell.metadata.get("tags", []):  # shows what a leak would pretend: nothing it makes goes on
            made = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
            forbidden |= {node.id for target in made for node in ast.walk(target) if isinstance(node, ast.Name)} - {"_"}
        else:
            arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
            assert not {node.id for node in nodes if isinstance(node, ast.Name)} & forbidden - arguments, cell.id
    assert {"leaky", "leaky_blocks"} <= forbidden


def test_10_a_saved_policy_resumes_to_the_identical_next_step(ddpg, frames, tmp_path):
    agent = ddpg.new_agent(0, 3, 6, 1e-3, hidden_size=32)  # with dropout: random numbers must resume too
    for seed in range(5):
        step(ddpg, agent, frames, torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))[:64])
    training.save_policy(tmp_path / "policy.pt", agent["actor_target"], agent)
    step(ddpg, agent, frames)
    again = ddpg.new_agent(1, 3, 6, 1e-3, hidden_size=32)
    _, checkpoint = training.load_policy(tmp_path / "policy.pt")
    training.restore(again, checkpoint["parts"])
    step(ddpg, again, frames)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        for a, b in zip(agent[name].parameters(), again[name].parameters(), strict=True):
            assert torch.equal(a, b), name


def test_11_covariances_have_dimensions_for_columns():
    cells = [c for c in nbformat.read(NOTES / "09_diagnostics.ipynb", as_version=4).cells if c.cell_type == "code"]
    calls = [node for cell in cells for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)
             and ast.unparse(node.func) == "np.cov" and "three" not in ast.unparse(node)]
    assert calls
    for call in calls:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} == {"rowvar": "False"}


def test_12_the_lesson_pools_real_tokens_alone():
    masked_mean = embeddings.masked_mean
    h = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([h, torch.full((1, 4, 7), 99.0)], dim=1)
    alone = masked_mean(h, torch.ones(1, 5))
    assert torch.allclose(masked_mean(padded, torch.tensor([[1] * 5 + [0] * 4])), alone, atol=1e-6)
    assert not torch.allclose(masked_mean(padded, torch.ones(1, 9)), alone, atol=1)


def test_13_the_published_numbers_stand_beside_baselines_and_say_how_many_cases():
    results = json.loads((PROJECT / "res" / "05_ddpg.json").read_text(encoding="utf-8"))
    ndcg = {row["model"]: row["NDCG@10"] for row in results["table"]}
    assert results["dataset"] == "ml-100k" and results["test cases"] == 943 and results["seeds"] >= 3
    assert ndcg["random"] < 0.01
    assert ndcg["popularity"] == pytest.approx(0.043, abs=0.001)
    assert ndcg["EASE"] == pytest.approx(0.071, abs=0.002)
    assert ndcg["DDPG"] > 2.5 * ndcg["popularity"]
    assert {"supervised baseline", "EASE, recent films"} <= ndcg.keys()


SUPPORT = torch.linspace(-4 / (1 - GAMMA), 5 / (1 - GAMMA), 51)
SMALL = dict(hidden_size=32, dropout=0.3)
RULE = dict(gamma=GAMMA, tau=TAU, decay=0.7, n=3, support=SUPPORT)


def ddpg_maker(frames, seed):
    lesson = ddpg_lesson
    agent = lesson.new_agent(seed, 3, 6, 1e-3, **SMALL)
    return agent, lambda index, **options: lesson.update(
        agent, frames, index, gamma=GAMMA, tau=TAU, decay=0.7, **options)


def d4pg_maker(frames, seed):
    lesson = d4pg
    agent = lesson.new_d4pg_agent(seed, 3, 6, 1e-3, n_atoms=51, replay_size=len(frames), **SMALL)
    return agent, lambda index, **options: lesson.d4pg_update(
        agent, frames, agent["replay"].sample(len(index)), **RULE, **options)


def rainbow_maker(frames, seed):
    lesson = rainbow_lesson
    agent = lesson.new_rainbow_agent(seed, frames.items, 3, 1e-3, n_transitions=len(frames), n_atoms=51, **SMALL)
    return agent, lambda index, **options: lesson.rainbow_update(
        agent, frames, agent["replay"].sample(len(index)), **RULE, **options)


@pytest.fixture(params=[ddpg_maker, d4pg_maker, rainbow_maker], ids=["ddpg", "d4pg", "rainbow"])
def maker(request, frames):
    return lambda seed: request.param(frames, seed)


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
        assert any(not torch.equal(new, was) for new, was in
                   zip(agent[f"{name}_target"].parameters(), old.parameters(), strict=True))


def test_10_every_agent_resumes_to_the_identical_next_step(maker):
    agent, make_step = maker(0)
    for _ in range(4):
        make_step(torch.arange(48))
    kept = training.snapshot(agent)
    made = make_step(torch.arange(48))
    again, step_again = maker(1)
    training.restore(again, kept)
    for name, value in step_again(torch.arange(48)).items():
        assert float(value) == float(made[name]), name
    for name, part in agent.items():
        if isinstance(part, torch.nn.Module):
            for a, b in zip(part.parameters(), again[name].parameters(), strict=True):
                assert torch.equal(a, b), name


def test_10_the_same_seed_gives_the_same_numbers_for_every_agent(maker):
    runs = []
    for _ in range(2):
        _, make_step = maker(3)
        runs.append([float(value) for _ in range(3) for value in make_step(torch.arange(48)).values()])
    assert runs[0] == runs[1]


def test_10_nothing_held_out_is_judged_while_an_agent_trembles(maker, frames):
    agent, make_step = maker(0)
    make_step(torch.arange(48))
    recommend = recommenders.policy(agent["actor"].train())
    assert torch.equal(recommend(frames, frames.user_ids), recommend(frames, frames.user_ids))
    assert agent["actor"].training
    assert not agent["actor_target"].training


def test_2_no_agent_divides_a_batch_into_rows_and_columns(maker):
    _, make_step = maker(0)
    scalars = make_step(torch.arange(48))
    assert all(value.ndim == 0 for value in scalars.values())
    assert {"loss/critic", "loss/behaviour", "loss/actor", "Q/logged action", "Q/policy's action"} <= set(scalars)


def test_6_without_its_behaviour_term_no_agent_learns_what_people_choose(maker, frames):
    losses = {}
    for weight in (1.0, 0.0):
        agent, make_step = maker(0)
        option = {"penalty": weight} if "critic" not in agent else {"behaviour_weight": weight}
        for _ in range(60):
            make_step(torch.arange(96), **option)
        t, items = frames.gather(torch.arange(len(frames))), frames.next_items(torch.arange(len(frames)), 1)
        with torch.no_grad():
            log_p = ddpg_lesson.log_policy(agent["actor_target"](t.state), frames.items)
        losses[weight] = ddpg_lesson.behaviour_loss(log_p, items, 1.0).item()
    assert losses[1.0] < losses[0.0]
