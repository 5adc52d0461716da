"""The same lessons on several machines, with Ray: ratings by shard of users, training over workers."""

import contextlib
import importlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import tenacity
import torch
from torch import distributed
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from helpers import training
from helpers.files import PROJECT, DataError
from helpers.frames import Frames
from helpers.tables import RATING_COLUMNS

MANIFEST, SHARD = "shards.json", "shard-{:05d}.parquet"
HOW_TO_GET_IT = "Ray is not installed: `pip install -r requirements-ray.txt`, then run this again"


def ray() -> ModuleType:
    """Return the module; DataError, saying how to get it, if Ray is not installed."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                   "RAY_DATA_LOG_LEVEL": "ERROR", "RAY_worker_niceness": "0"}  # workers compete as equals
    if find_spec("ray") is None:
        raise DataError(HOW_TO_GET_IT)
    for name in ("data", "train", "train.torch"):
        importlib.import_module(f"ray.{name}")
    return importlib.import_module("ray")


def chosen_workers() -> int:
    """Return how many workers this run may use: `WORKERS` of `make run`, or 2; DataError unless a number from 1."""
    chosen = os.environ.get("RECNN_WORKERS") or "2"
    if not chosen.isdecimal() or int(chosen) < 1:
        raise DataError(f"WORKERS={chosen} is not a number of workers: give a whole number from 1")
    return int(chosen)


@contextlib.contextmanager
def connected(n_nodes: int, store: int = 256 << 20) -> Iterator[ModuleType]:
    """Yield Ray, connected to the cluster at RAY_ADDRESS, or to one of `n_nodes` made here and ended with the block.

    A node made here has one core and an object store of `store` bytes. DataError: no Ray, or no answer there.
    """
    engine, local = ray(), None
    logging.getLogger("ray").setLevel(logging.ERROR)
    where = {"runtime_env": {"working_dir": str(PROJECT),  # a cluster's nodes have the requirements, and our code so
                             "excludes": ["/data", "/res", "/build", "/.git", "/.venv", "/.test"]}}
    try:
        if not os.environ.get("RAY_ADDRESS"):
            node = {"num_cpus": 1, "object_store_memory": store}
            starting = tenacity.Retrying(  # a node ends if its agent takes 15 s to start (ray-project/ray, issue 65983)
                retry=tenacity.retry_if_exception_message(match=".*timed out during startup"), reraise=True,
                stop=tenacity.stop_after_attempt(3))
            local = starting(importlib.import_module("ray.cluster_utils").Cluster, initialize_head=True,
                             head_node_args=node | {"include_dashboard": False})
            for _ in range(n_nodes - 1):
                starting(local.add_node, **node)
            where = {"address": local.address}
        try:
            engine.init(log_to_driver=False, logging_level="ERROR", **where)
        except ConnectionError as error:
            raise DataError(f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: start it; set "
                            f"RAY_AUTH_MODE=token if it wants one; or unset RAY_ADDRESS for a cluster here") from error
        context = engine.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        yield engine
    finally:
        engine.shutdown()
        if local is not None:
            local.shutdown()


def shard_of(user_ids: np.ndarray, n_shards: int) -> np.ndarray:
    """Return which shard (n,) each user (n,) belongs to: by a hash of the id, the same on every machine."""
    return (pd.util.hash_array(np.asarray(user_ids)) % n_shards).astype(np.int64)


def in_order(log: pa.Table) -> pa.Table:
    """Return ratings by user and time; within a second by `place`, or without one by item and stars."""
    within = ["place"] if "place" in log.column_names else ["item_id", "rating"]
    return log.sort_by([(name, "ascending") for name in ("user_id", "timestamp", *within)]).select(RATING_COLUMNS)


def shard_ratings(source: str | Path, folder: str | Path, n_shards: int) -> pd.DataFrame:
    """Bring each user's ratings together, sorted by `in_order`: Parquet → Ray Data → n_shards Parquet files.

    Args:
        source: folder of Parquet files, or an object store's address (s3://, gs://): `RATING_COLUMNS`, and maybe
            `place`, the row's place in the log as it came. DataError if there is nothing, or it lacks a column.
        folder: where the shards go, and then a manifest, which is returned: `shard, users, ratings`, one row a shard.
    """
    data, (filesystem, path) = ray().data, _place(folder)
    try:
        names = pyarrow.dataset.dataset(_address(source), format="parquet").schema.names
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"no Parquet files to read at {source} ({str(error).splitlines()[0]})") from error
    if lacking := [name for name in RATING_COLUMNS if name not in names]:
        raise DataError(f"the ratings at {source} lack {', '.join(lacking)}; they have {', '.join(names)}")

    def add_shard(batch: pa.Table) -> pa.Table:
        return batch.append_column("shard", pa.array(shard_of(batch["user_id"].to_numpy(), n_shards)))

    def write(group: pa.Table) -> pa.Table:
        k, users = group["shard"][0].as_py(), group["user_id"].unique()
        pyarrow.parquet.write_table(in_order(group), f"{path}/{SHARD.format(k)}", filesystem=filesystem)
        return pa.table({"shard": [k], "users": [len(users)], "ratings": [len(group)]})

    filesystem.create_dir(path)
    with contextlib.suppress(FileNotFoundError):  # from here on the old shards are not whole
        filesystem.delete_file(f"{path}/{MANIFEST}")
    ratings = data.read_parquet(_address(source)).select_columns([*RATING_COLUMNS, *({"place"} & {*names})])
    made = ratings.map_batches(add_shard, batch_format="pyarrow").groupby("shard", num_partitions=n_shards) \
        .map_groups(write, batch_format="pyarrow").to_pandas().sort_values("shard", ignore_index=True)
    with filesystem.open_output_stream(f"{path}/{MANIFEST}") as file:
        file.write(json.dumps(made.to_dict("list")).encode())
    return made


def _address(path: str | Path) -> str:
    return str(path) if "://" in str(path) else Path(path).resolve().as_uri()


def _place(folder: str | Path) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(_address(folder))


def manifest(folder: str | Path) -> pd.DataFrame:
    """Return what `shard_ratings` returned for a folder; DataError if it has not filled the folder."""
    filesystem, path = _place(folder)
    try:
        with filesystem.open_input_stream(f"{path}/{MANIFEST}") as file:
            return pd.DataFrame(json.loads(file.read()))
    except FileNotFoundError as error:
        raise DataError(f"{path} has no {MANIFEST}, so its shards are not whole: call shard_ratings again") from error


def read_shards(folder: str | Path, rank: int = 0, n_workers: int = 1) -> pd.DataFrame:
    """Return the ratings of every n_workers-th shard from `rank` on; DataError if a shard is not whole, or none is."""
    (filesystem, path), shards, parts = _place(folder), manifest(folder), []
    for k, n_ratings in shards[["shard", "ratings"]].iloc[rank::n_workers].itertuples(index=False):
        table = pa.table({})
        with contextlib.suppress(FileNotFoundError, pa.ArrowInvalid):
            table = pyarrow.parquet.read_table(f"{path}/{SHARD.format(k)}", filesystem=filesystem)
        if len(table) != n_ratings:
            raise DataError(f"{path}/{SHARD.format(k)} is missing or damaged, with {len(table):,} of its "
                            f"{n_ratings:,} ratings: call shard_ratings again")
        parts.append(table.to_pandas())
    if not parts:
        raise DataError(f"{path} has {len(shards)} shards, none for worker {rank + 1} of {n_workers}: make more shards")
    return pd.concat(parts, ignore_index=True)


def share(matrix: np.ndarray) -> Any:
    """Return the reference to an item matrix in the object store, one copy a node; DataError if it does not fit."""
    engine, matrix = ray(), np.ascontiguousarray(matrix, dtype=np.float32)
    store = min(node["Resources"].get("object_store_memory", 0) for node in engine.nodes() if node["Alive"])
    try:
        if matrix.nbytes > store:
            raise MemoryError
        return engine.put(matrix)
    except (MemoryError, engine.exceptions.ObjectStoreFullError, engine.exceptions.OutOfDiskError) as error:
        raise DataError(f"the item matrix of {matrix.nbytes / 1e6:,.0f} MB does not fit into the object store, whose "
                        f"smallest holds {store / 1e6:,.0f} MB on its node: free what the cluster holds, or start Ray "
                        f"with a larger object_store_memory") from error


def shared_frames(ratings: pd.DataFrame, item_ids: np.ndarray, matrix: np.ndarray, frame_size: int,
                  device: str | torch.device = "cpu") -> Frames:
    """Return Frames whose item matrix is the node's own copy, of which `Frames` alone would keep another."""
    frames = Frames(ratings, item_ids, matrix, frame_size, device)
    if frames.device.type == "cpu":
        frames.items = torch.from_numpy(matrix)  # the store's memory is read-only, and nobody writes to it
    return frames


def average_gradients(agent: dict[str, Any]) -> None:
    """Make every optimiser of an agent step by the mean of all workers' gradients, so that equal weights stay equal."""
    def average(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        total = parameters_to_vector(gradients)
        distributed.all_reduce(total)
        vector_to_parameters(total / distributed.get_world_size(), gradients)

    for part in agent.values():
        if isinstance(part, torch.optim.Optimizer):
            part.register_step_pre_hook(average)


def _last_copy(agent: dict[str, Any], rank: int, n: int) -> dict[str, Any] | None:
    """Return this worker's copy in the last checkpoint of Ray Train, or None if there is no checkpoint yet.

    With another number of workers than before, each takes worker 0's, with an order and priorities of its own.
    """
    checkpoint = ray().train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        files = sorted(Path(folder).glob("worker-*.pt"))
        kept = torch.load(files[rank if len(files) == n else 0], map_location="cpu", weights_only=True)
    if len(files) != n:
        kept["parts"] |= training.snapshot({name: part for name, part in agent.items() if name == "replay"})
    return kept


def _worker(config: dict[str, Any]) -> None:
    """Train as one of several: what Ray Train runs in every worker."""
    engine = ray()
    train, context = engine.train, engine.train.get_context()
    rank, n = context.get_world_rank(), context.get_world_size()
    frames = shared_frames(read_shards(config["folder"], rank, n), config["item_ids"], engine.get(config["matrix"]),
                           config["frame_size"], train.torch.get_device())
    update, agent, options = config["make"](frames)
    average_gradients(agent)
    options = config["fit"] | options
    torch.manual_seed(1000 * options.get("seed", 0) + rank)  # each drops other units

    def keep(kept: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(kept, Path(folder) / f"worker-{rank:05d}.pt")
            train.report(kept["rows"][-1] | {"workers": n}, checkpoint=train.Checkpoint.from_directory(folder))

    training.fit(update, frames, agent, batch_size=-(-config["batch_size"] // n), desc="together",
                 start=_last_copy(agent, rank, n), keep=keep, **options)


def train_together(make: Callable[[Frames], tuple[Callable, dict, dict]], folder: str | Path, item_ids: np.ndarray,
                   matrix: Any, n_workers: int, *, frame_size: int, batch_size: int, max_steps: int,
                   storage: str | Path, name: str, use_gpu: bool = False, max_failures: int = 3,
                   **fit: Any) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train one agent with Ray Train, data parallel: each worker on its shards, every step by the mean gradient.

    Return the states of the agent's parts at the last step, and the rows that worker 0 has logged. When a worker or a
    node is lost, all go on from the last checkpoint, with fewer workers if no other node comes in its place
    (a minute, or RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S). DataError: what a worker found wrong, or no room.

    Args:
        make: frames → (update, agent, further arguments of `training.fit`); the same agent in every worker.
        folder: what `shard_ratings` filled, seen by all nodes.
        matrix: what `share` returned.
        batch_size: of a step, of all workers together.
        storage: folder or object store that all nodes see; checkpoints go to `storage/name`, in place of earlier ones.
        max_failures: how many times workers may be lost.
        fit: arguments of `training.fit`, e.g. `safe_every`, the steps between two checkpoints.
    """
    engine = ray()
    train, kind = engine.train, "GPU" if use_gpu else "CPU"
    config = dict(make=make, folder=_address(folder), item_ids=np.asarray(item_ids), matrix=matrix,
                  frame_size=frame_size, batch_size=batch_size, fit=dict(fit, max_steps=max_steps))
    run = train.RunConfig(  # whether to try again is decided here: Ray would also retry what cannot succeed
        name=name, storage_path=_address(storage), checkpoint_config=train.CheckpointConfig(num_to_keep=2),
        failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0))
    filesystem, path = _place(storage)
    if filesystem.get_file_info(f"{path}/{run.name}/checkpoint_manager_snapshot.json").is_file:
        filesystem.delete_dir(f"{path}/{run.name}")  # Ray would go on from its checkpoints, under the settings of then
    result = None
    while result is None:
        try:
            workers = train.ScalingConfig(num_workers=n_workers, use_gpu=use_gpu)
            result = train.torch.TorchTrainer(_worker, train_loop_config=config, run_config=run,
                                              scaling_config=workers).fit()
        except train.ControllerError as error:
            room = int(sum(node["Resources"].get(kind, 0) for node in engine.nodes() if node["Alive"]))
            if not 0 < room < n_workers:
                raise DataError(f"training on the cluster could not start with {n_workers} workers on {room} {kind}s "
                                f"({str(error).strip().splitlines()[-1]})") from error
            print(f"no room for {n_workers} workers: going on with {room}, one for each {kind} that is there")
            n_workers = room
        except train.TrainingFailedError as error:
            max_failures -= 1
            reason = _own_words(error)
            if reason or max_failures < 0:
                lost = f"workers were lost too often: {str(error).strip().splitlines()[-1]}"
                raise DataError(reason or lost) from error
    with result.checkpoint.as_directory() as kept:
        state = torch.load(Path(kept) / "worker-00000.pt", map_location="cpu", weights_only=True)
    return state["parts"], pd.DataFrame(state["rows"]).set_index("step")


def _own_words(error: Exception) -> str:
    """Return what a worker found wrong, or nothing if it was lost."""
    for cause in getattr(error, "worker_failures", {}).values():
        while cause and not isinstance(cause, DataError | training.TrainingError):
            cause = cause.__cause__
        if cause:
            return str(cause)
    return ""
