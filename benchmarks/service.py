"""Measure how fast the service answers: python -m benchmarks.service

The service runs in a process of its own, as a reader starts it, and clients in another ask it over connections that
stay open. The catalogue is SYNTHETIC, of the size of MovieLens 20M: normal vectors, every column of variance 1 as
lesson 03 leaves them, and untrained networks of lesson 05's sizes. To compute an answer takes as long as a real one.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from helpers.files import PROJECT, write_json
from tools.readme import replace_block

N_ITEMS, EMBED_SIZE, FRAME_SIZE = 27_278, 128, 10
CLIENTS = (1, 16, 64)  # connections, each asking again as soon as it is answered
SECONDS = 8.0          # of asking, for each number of clients
SOAK, ROUNDS = 100_000, 10  # requests while memory is watched, and how often it is looked at
SHORTEST, LONGEST = 1, 100  # ratings a history, each length as likely
N_BODIES = 1_000       # distinct requests, asked in turn
START = 60.0           # s that the service may take to start
PROCESSES = multiprocessing.get_context("spawn")


def write_model(folder: Path, n_items: int, embed_size: int, frame_size: int, titles: list[str] | None = None,
                seed: int = 0, **options) -> tuple:
    """Write a SYNTHETIC model folder as lesson 11 writes real ones; return its actor, critic and item matrix.

    Ids are 1, 2, …; the options are those of the lesson's `write_build`.
    """
    import pandas as pd  # here, for the clients' processes read this file too and have no need of them
    import torch

    from helpers.agents import ship
    from helpers.liking import Liking
    from helpers.networks import Actor, Critic

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    actor, critic = (kind(frame_size, embed_size, encoder="attention").eval() for kind in (Actor, Critic))
    ids, matrix = np.arange(1, n_items + 1), rng.normal(size=(n_items, embed_size)).astype(np.float32)
    infos = {int(item_id): {"title": titles[i % len(titles)] if titles else f"Synthetic {item_id}", "genres": ["Drama"],
                            "release_year": 1950 + i % 70} for i, item_id in enumerate(ids)}
    rated = pd.Series(rng.choice(ids, 20 * n_items))
    about = {"dataset": "synthetic", "policy": "untrained", "rating": {"low": 0.5, "high": 5.0, "step": 0.5},
             "critic": {"gamma": 0.9}, "held_out": None, "short_histories": None,
             "licence": "Drawn at random: nobody's."}
    states = torch.randn(16, frame_size * (embed_size + 1))
    stars = Liking(3.0 + torch.rand(n_items), torch.randn(embed_size, embed_size) / embed_size, noise=0.8)
    ship.write_build(folder, actor, critic, ids, matrix, infos, rated, states, about, stars=stars, **options)
    return actor, critic, matrix


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bodies(n: int, ids: np.ndarray, seed: int = 0) -> list[bytes]:
    """Return n requests for ten items each, as they go over the wire."""
    rng = np.random.default_rng(seed)
    histories = [rng.choice(ids, rng.integers(SHORTEST, LONGEST + 1), replace=False) for _ in range(n)]
    return [json.dumps({"history": [{"item_id": int(item), "rating": float(rng.integers(1, 11)) / 2}
                                    for item in history], "k": 10}).encode() for history in histories]


@contextmanager
def service(model: Path, port: int, **environment: str):
    """Start the service, wait until it is well, and yield its process; end it after."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "service:app", "--app-dir", PROJECT / "build", "--port", str(port),
         "--no-access-log", "--log-level", "warning"],
        env=os.environ | {"RECNN_MODEL": str(model)} | environment)
    try:
        until_well(port, process)
        yield process
    finally:
        process.kill()
        process.wait()


def until_well(port: int, process: subprocess.Popen) -> None:
    """Return as soon as /health answers.

    Raises:
        RuntimeError: if the process ends, or does not answer within `START` seconds.
    """
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError("the service did not start: its own words are above")


def answer(port: int, body: bytes) -> dict:
    """Return what the service answers to one request."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/recommend", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


async def connection(port: int, requests: list[bytes], mine: int, step: int, more) -> tuple[list[float], int]:
    """Ask one request after the other while `more()`; return the seconds that each took, and how many failed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds, failed = [], 0
    while more():
        start = time.perf_counter()
        writer.write(requests[mine % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        content = await reader.readexactly(length)
        seconds.append(time.perf_counter() - start)
        failed += not (head.startswith(b"HTTP/1.1 200") and content.startswith(b'{"slate": [{"item_id"'))
        mine += step
    writer.close()
    return seconds, failed


def ask(port: int, ids: np.ndarray, clients: int, seconds: float | None, n: int | None, results) -> None:
    """Ask for some seconds, or n requests; put (seconds of each, failures, seconds in all) into `results`."""
    requests = [b"POST /recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body) for body in bodies(N_BODIES, ids)]

    async def all_clients() -> tuple[list[float], int, float]:
        start, left = time.perf_counter(), n

        def more() -> bool:
            nonlocal left
            if seconds is not None:
                return time.perf_counter() < start + seconds
            left -= 1
            return left >= 0

        parts = await asyncio.gather(*(connection(port, requests, i, clients, more) for i in range(clients)))
        return ([taken for part, _ in parts for taken in part], sum(failed for _, failed in parts),
                time.perf_counter() - start)

    results.put(asyncio.run(all_clients()))


def load(port: int, ids: np.ndarray, clients: int, seconds: float | None = None, n: int | None = None) -> dict:
    """Return requests/s, milliseconds at the median and the 99th percentile, answers and errors."""
    results = PROCESSES.Queue()
    process = PROCESSES.Process(target=ask, args=(port, ids, clients, seconds, n, results))
    process.start()
    taken, failed, lasted = results.get(timeout=600)
    process.join()
    p50, p99 = (np.percentile(taken, [50, 99]) * 1000).tolist()
    return {"clients": clients, "requests_per_second": len(taken) / lasted, "p50_ms": p50, "p99_ms": p99,
            "requests": len(taken), "errors": failed}


def resident(process: subprocess.Popen) -> float:
    """Return MB of memory that a process holds."""
    kilobytes = subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True, check=True).stdout
    return int(kilobytes) / 1024


def ratios(rows: list[dict]) -> dict[str, float]:
    """Return by number of clients: requests/s with batches over requests/s one by one."""
    rate = {(row["batches"], row["clients"]): row["requests_per_second"] for row in rows}
    return {str(clients): rate[True, clients] / rate[False, clients] for _, clients in rate if (False, clients) in rate}


def flat(memory: list[float], most: float = 5.0) -> bool:
    """Say whether the second half of a soak took at most that many MB."""
    return memory[-1] - memory[len(memory) // 2] <= most


def table(result: dict) -> str:
    """Return the measurements as the README shows them."""
    rate = {(row["batches"], row["clients"]): row for row in result["rows"]}
    lines = ["| clients at once | requests/s | p50, ms | p99, ms | requests/s, each alone | batches / alone |",
             "| ---: | ---: | ---: | ---: | ---: | ---: |"]
    for clients, ratio in result["ratios"].items():
        row, alone = rate[True, int(clients)], rate[False, int(clients)]
        lines.append(f"| {clients} | {row['requests_per_second']:,.0f} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | "
                     f"{alone['requests_per_second']:,.0f} | {ratio:.1f} |")
    memory, errors = result["memory_mb"], sum(row["errors"] for row in result["rows"]) + result["soak"]["errors"]
    n = sum(row["requests"] for row in result["rows"]) + result["soak"]["requests"]
    return "\n".join([*lines, "", (
        f"{result['items']:,} items (SYNTHETIC), histories of {SHORTEST} to {LONGEST} ratings, two cores shared by "
        f"service and clients: {n:,} requests, {errors} errors. Memory at the start, the middle and the end of "
        f"{result['soak']['requests']:,} requests: {memory[0]:.0f}, {memory[len(memory) // 2]:.0f}, {memory[-1]:.0f} "
        f"MB. Killed with −9 and started again, the service gave the same answer after "
        f"{result['seconds_from_kill_to_answer']:.1f} s.")])


def killed(model: Path, port: int, process: subprocess.Popen, body: bytes) -> float:
    """Kill the service, start another, and return the seconds until that gives the same answer.

    Raises:
        RuntimeError: if the answers differ.
    """
    before, start = answer(port, body), time.perf_counter()
    process.kill()
    process.wait()
    with service(model, port):
        after, seconds = answer(port, body), time.perf_counter() - start
    if before != after:
        raise RuntimeError(f"after kill -9 and restart the service answers {after}, before it was {before}")
    return seconds


def measure(model: Path, ids: np.ndarray, seconds: float, soak: int) -> dict:
    """Return everything that is measured of the service on a model folder."""
    port, rows = free_port(), []
    with service(model, port, RECNN_BATCH="1"):
        load(port, ids, clients=4, seconds=1)  # to warm up
        rows += [{"batches": False} | load(port, ids, clients, seconds) for clients in CLIENTS]
    with service(model, port) as process:
        load(port, ids, clients=4, seconds=1)
        rows += [{"batches": True} | load(port, ids, clients, seconds) for clients in CLIENTS]
        memory, errors = [resident(process)], 0
        for _ in range(ROUNDS):
            errors += load(port, ids, clients=CLIENTS[-1], n=soak // ROUNDS)["errors"]
            memory.append(resident(process))
        restart = killed(model, port, process, bodies(1, ids)[0])
    return {"data": "SYNTHETIC catalogue, untrained networks", "items": len(ids), "cores": os.cpu_count(),
            "rows": rows, "ratios": ratios(rows), "memory_mb": memory,
            "soak": {"requests": soak // ROUNDS * ROUNDS, "clients": CLIENTS[-1], "errors": errors},
            "seconds_from_kill_to_answer": restart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of asking, for each number of clients")
    parser.add_argument("--soak", type=int, default=SOAK, help="requests while memory is watched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", N_ITEMS, EMBED_SIZE, FRAME_SIZE)
        result = measure(Path(folder) / "model", np.arange(1, N_ITEMS + 1), options.seconds, options.soak)
    write_json(PROJECT / "res" / "bench_service.json", result)
    replace_block("service", table(result))
    print(table(result))
    if any(row["errors"] for row in [*result["rows"], result["soak"]]):
        sys.exit("some requests were not answered")
    if not flat(result["memory_mb"]):
        sys.exit(f"memory grows: {result['memory_mb']} MB")


if __name__ == "__main__":
    main()
