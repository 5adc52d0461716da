"""Measure how near to the rate that TMDB permits its films are fetched: python -m benchmarks.metadata

A local server, in a process of its own, stands in for TMDB. It permits 50 requests a second and a burst of 10, and
answers 429 above it, half of the time without `Retry-After`; it takes its time, and at random, from a seed, it
refuses, fails, breaks its JSON, drops the connection, stalls, and does not know a film. Our client asks it for all
films, as a reader would. A request counts as accepted if it was not refused with 429, whatever became of it.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from helpers.extra import tmdb
from helpers.files import PROJECT, write_json

PERMITTED = 50     # requests a second: a token bucket that fills at this rate
BURST = 10         # tokens it holds: a client that starts with a burst is refused
WHIM = 0.0002      # share of requests refused with 429 though permitted: then all must pause for up to 1 s
LATENCY = 0.1      # s, the mean; an answer takes from half of it to one and a half
STALL = 60.0       # s: longer than a client waits
FAULTS = {"stall": 0.002, "drop": 0.002, "broken": 0.003, 500: 0.002, 502: 0.004, 503: 0.004}  # shares of requests
UNKNOWN = 0.02     # share of films
SEED = 0

# What a server does with a request: path and header lines → status, headers, body, seconds to wait before.
# Status 0: close the connection without an answer.
Respond = Callable[[str, list[str]], tuple[int, dict[str, str], bytes, float]]


async def serve(respond: Respond, port: int = 0) -> asyncio.Server:
    """Start an HTTP/1.1 server for GET on 127.0.0.1, keeping connections alive."""
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                status, headers, body, wait = respond(request.split(" ")[1], lines)
                await asyncio.sleep(wait)
                if status == 0:
                    return
                head = "".join(f"{name}: {value}\r\n" for name, value in
                               {"Content-Type": "application/json", **headers, "Content-Length": len(body)}.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the server stops
        finally:
            writer.close()

    return await asyncio.start_server(handle, "127.0.0.1", port)


def film_of(path: str) -> int:
    """Return the number in /3/movie/862?api_key=…"""
    return int(path.split("?")[0].rsplit("/", 1)[1])


def record_of(film: int) -> dict:
    """Return a record as TMDB would write it."""
    return {"adult": False, "belongs_to_collection": {"id": film, "name": f"Collection {film % 900}"}, "budget": film,
            "genres": [{"id": 16, "name": "Animation"}], "id": film, "imdb_id": f"tt{film:07d}",
            "original_language": "en", "overview": f"The story of film {film}. " * 12, "popularity": 25.4,
            "production_companies": [{"id": 3, "name": "Pixar"}], "release_date": "1995-10-30", "revenue": 3 * film,
            "production_countries": [{"iso_3166_1": "US", "name": "United States of America"}], "runtime": 81,
            "spoken_languages": [{"iso_639_1": "en", "name": "English"}], "tagline": "", "title": f"Film {film}",
            "vote_average": 7.9, "vote_count": 9787}


def known(film: int) -> bool:
    """Tell whether the server has a film."""
    return random.Random(f"{SEED} {film}").random() >= UNKNOWN


def capricious(seen: Counter, times: list[float], permitted: int = PERMITTED) -> Respond:
    """Return what the stand-in for TMDB does; it counts in `seen` and notes in `times` when it accepted a request."""
    rng, tokens, last = random.Random(SEED), float(BURST), time.monotonic()

    def respond(path: str, lines: list[str]) -> tuple[int, dict[str, str], bytes, float]:
        nonlocal tokens, last
        now, film, wait = time.monotonic(), film_of(path), rng.uniform(0.5, 1.5) * LATENCY
        tokens, last = min(tokens + (now - last) * permitted, BURST), now
        if tokens < 1 or rng.random() < WHIM:
            seen["429"] += 1
            return 429, {"Retry-After": "1"} if rng.random() < 0.5 else {}, b"{}", wait / 2
        tokens -= 1
        times.append(now)
        seen["accepted"] += 1
        (fault,) = rng.choices([None, *FAULTS], [1 - sum(FAULTS.values()), *FAULTS.values()])
        if fault is not None:
            seen[str(fault)] += 1
        if isinstance(fault, int):
            return fault, {}, b'{"success": false}', wait
        if fault == "drop":
            return 0, {}, b"", wait
        wait = STALL if fault == "stall" else wait
        if not known(film):
            return 404, {}, b'{"success": false, "status_code": 34}', wait
        body = json.dumps(record_of(film)).encode()
        return 200, {}, body[:len(body) // 2] if fault == "broken" else body, wait

    return respond


def stand_in(pipe) -> None:
    """Serve in this process; tell the port, and when something comes back, what was seen."""
    async def main() -> None:
        seen, times = Counter(), []
        server = await serve(capricious(seen, times))
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        pipe.send((dict(seen), times))
        os._exit(0)  # those who are stalled need not be told

    asyncio.run(main())


def measure(n_films: int) -> dict:
    """Fetch the films 1 … n_films once; return counts, seconds and rates."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=stand_in, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    os.environ[tmdb.KEY] = "a-key-for-the-stand-in"
    with tempfile.TemporaryDirectory() as folder:
        started, processor = time.perf_counter(), time.process_time()
        answers, failed = tmdb.run(tmdb.fetch(range(1, n_films + 1), Path(folder) / "tmdb.jsonl",
                                              base=f"http://127.0.0.1:{port}/3", rate=PERMITTED))
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
    ours.send("done")
    seen, times = ours.recv()
    server.join(10)
    wrong = sum(1 for film, record in answers.items() if (record is not None) != known(film)
                or (record is not None and record["title"] != f"Film {film}"))
    return {"films": n_films, "answered": len(answers), "unknown_to_the_server": list(answers.values()).count(None),
            "failed": len(failed), "lost": n_films - len(answers) - len(failed), "wrong": wrong,
            "seconds": seconds, "processor_seconds": processor, "permitted_per_second": PERMITTED,
            "accepted_requests_per_second": seen["accepted"] / seconds, "films_per_second": len(answers) / seconds,
            "accepted_of_permitted": seen["accepted"] / seconds / PERMITTED,
            "films_of_permitted": len(answers) / seconds / PERMITTED,
            "until_last_request_of_permitted": (len(times) - 1) / (times[-1] - times[0]) / PERMITTED,
            "refused_with_429": seen.pop("429", 0), "forced_retries": seen.pop("accepted") - len(answers),
            "faults": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", type=int, default=10_000, help="10,000 take 200 s; MovieLens 20M has 27,278")
    result = {"data": "a local stand-in for TMDB: SYNTHETIC records, seeded faults", "latency_seconds": LATENCY,
              **measure(parser.parse_args().films)}
    write_json(PROJECT / "res" / "bench_metadata.json", result)
    for name, value in result.items():
        print(f"{name:<34}{value:12,.3f}" if isinstance(value, float) else f"{name:<34}{value!s:>12}")
    if result["lost"] or result["wrong"]:
        sys.exit("films were lost or are wrong")


if __name__ == "__main__":
    main()
