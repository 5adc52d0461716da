"""The one table of what lessons read and write: the runner goes by it, and tests hold the other files against it."""

from pathlib import Path
from typing import NamedTuple

from helpers.files import build_dir, data_dir, res_dir


class Lesson(NamedTuple):
    """Artefacts: in res/ or build/ where they say so, else in data/<dataset>/; and minutes that it takes, at first."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    minutes: float = 0.3


def _agent(name: str, number: str) -> tuple[str, ...]:
    """Return what a lesson that trains an agent writes."""
    return (f"policies/{name}.pt", f"cases/{name}.csv", *_watched(name), f"res/{number}_{name}.json")


def _watched(name: str) -> tuple[str, ...]:
    """Return what a training of an agent leaves for lesson 09."""
    return (f"runs/{name}/scalars.csv", f"runs/{name}/actions.npz")


AGENTS = ("ddpg", "d4pg", "rainbow", "ode")
TASK = ("embeddings.npz", "infos.json")  # what helpers.task.load_task reads
POLICIES = tuple(f"policies/{name}.pt" for name in AGENTS)
BASELINES = ("cases/ddpg.csv", "res/05_ddpg.json")
LESSONS = {
    "00_architecture": Lesson(),
    "00b_encoders": Lesson(),
    "01_data_parsing": Lesson(writes=("infos.json",)),
    "02_embeddings": Lesson(("infos.json",), ("texts_bert.p",)),
    "03_pca": Lesson(("infos.json", "texts_bert.p"), ("embeddings.npz", "embeddings_content.npz", "features.json")),
    "04_static_dataset": Lesson((*TASK, "res/bench_frames.json"), ("transitions.hdf5", "res/bench_frames.png")),
    "05_ddpg": Lesson(TASK, ("policies/ddpg_seeds.pt", *_watched("ddpg")), minutes=7),
    "05b_serving": Lesson((*TASK, "policies/ddpg_seeds.pt", "runs/ddpg/scalars.csv"),
                          ("policies/ddpg.pt", *BASELINES), minutes=2),
    "06_d4pg": Lesson((*TASK, *BASELINES), _agent("d4pg", "06"), minutes=4),
    "07_rainbow": Lesson((*TASK, *BASELINES), _agent("rainbow", "07"), minutes=3),
    "08_ode": Lesson((*TASK, *BASELINES), _agent("ode", "08"), minutes=5),
    "09_diagnostics": Lesson((*TASK, *POLICIES, *(path for name in AGENTS for path in _watched(name))),
        ("res/graphs.png", "res/agents.png", "res/cov.png", "res/embeddings.png")),
    "10_evaluation": Lesson((*TASK, "res/results.json", *POLICIES), ("res/forest.png",)),
    "10b_off_policy": Lesson((*TASK, "texts_bert.p", "embeddings_content.npz", "res/results.json", *POLICIES),
                             ("res/calibration.png",), minutes=2),
    "11_ship": Lesson((*TASK, "policies/ddpg.pt"), (
        *(f"build/model/{name}" for name in ("manifest.json", "actor.onnx", "critic.onnx", "items.npz", "items.json")),
        "res/search.png", "res/map.png"), minutes=1),
    "12_your_data": Lesson(writes=("own/events.csv", "own/catalogue.parquet", "news_sample/train/behaviors.tsv",
                                   "news_sample/dev/behaviors.tsv"), minutes=1),
    "13_beyond_one_machine": Lesson(TASK, minutes=3),
    "14_whole_log": Lesson((*TASK, *BASELINES, "res/results-ml-1m.json"), (
        "policies/whole_log.pt", "cases/whole_log.csv", "res/14_whole_log.json"), minutes=6),
    "15_foresight": Lesson(("infos.json", "texts_bert.p", "embeddings_content.npz", "res/foresight.json",
                            "res/taobao.json"), ("res/foresight.png",), minutes=2),
    "16_reinforce": Lesson(("infos.json", "texts_bert.p", "embeddings.npz", "embeddings_content.npz",
                            "res/reinforce.json"), ("res/reinforce.png",), minutes=2),
    "17_estimates": Lesson(("infos.json", "texts_bert.p", "embeddings_content.npz", "res/estimates.json"),
                           ("res/estimates.png",), minutes=1),
}


def artefact(dataset: str, path: str) -> Path:
    """Return where an artefact of the table lies."""
    folder, _, rest = path.partition("/")
    places = {"res": res_dir, "build": build_dir}
    return places[folder](dataset) / rest if folder in places else data_dir(dataset) / path


def before(name: str, lessons: dict[str, Lesson] = LESSONS) -> list[str]:
    """Return the lessons that write what a lesson reads."""
    return [other for other, lesson in lessons.items() if set(lesson.writes) & set(lessons[name].reads)]
