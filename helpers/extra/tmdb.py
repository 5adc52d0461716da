"""Ask TMDB for films: as fast as it permits and no faster, and able to go on where it was killed.

The key is read from the environment variable `TMDB_API_KEY` alone. TMDB takes a v4 token in a header; a v3 key
it takes in the URL only, so URLs are never shown, and lines that hold the key stay out of the logs.
"""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import tenacity
from aiolimiter import AsyncLimiter
from anyio.from_thread import start_blocking_portal
from tqdm.auto import tqdm

from helpers.files import DataError, writing

KEY = "TMDB_API_KEY"
BASE = "https://api.themoviedb.org/3"
RATE = 50.0  # requests a second: "somewhere in the 50 requests per second range", says TMDB's page on rate limits
SHARE, CREDIT = 0.98, 1.5  # a late request may be made up for by half a one: ⌊0.98·50 + 1.5⌋ = 50 in any second

for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(lambda line: (os.environ.get(KEY) or "\0").strip() not in line.getMessage())


class _Refused(Exception):
    """429 says nothing about the film; its argument: seconds to pause, 0 where TMDB names none."""


class _NoAnswer(Exception):
    """Whatever is not TMDB's own word about the film."""


async def fetch(tmdb_ids: Iterable[int], journal: Path, *, base: str = BASE, rate: float = RATE, workers: int = 64,
                timeout: float = 5.0, tries: int = 6, backoff: float = 0.5, patience: float = 300.0,
                ) -> tuple[dict[int, dict | None], dict[int, str]]:
    """Fetch the records of films that the journal lacks, each once; an answer is in the journal before it counts.

    Return {tmdb_id: record, or None where TMDB knows no such film}, and {tmdb_id: reason} of films that failed, which
    the next start tries again. After a 429 nobody asks until the pause it names is over (`Retry-After`; without it,
    one that doubles, up to 30 s). DataError: no key, or a refused one; no answer for `patience`; a journal in use.

    Args:
        journal: JSON lines `{"id", "record"}`, appended to; delete the file to ask for everything anew.
        base, rate: URL up to `/movie`; requests a second that are permitted, which start evenly, without a burst.
        workers: requests under way at most; enough that those which stall do not hold up the others.
        timeout, patience: seconds to wait for the next piece of an answer; and without one before all is given up.
        tries, backoff: for one film, after a time-out, 5xx, a redirect, another's page; seconds of the first pause.
    """
    wanted = list(dict.fromkeys(int(film) for film in tmdb_ids))
    with writing(journal):
        answers, failed = read_journal(journal), {}
        if missing := [film for film in wanted if film not in answers]:
            key = os.environ.get(KEY, "").strip()
            if not re.fullmatch(r"[\w.-]{8,}", key, flags=re.ASCII):
                raise DataError(f"{KEY} is not set, or holds no key: get one at www.themoviedb.org/settings/api, and "
                                f"`export {KEY}=…` before the start")
            v4 = len(key) > 40 and "." in key
            client = httpx.AsyncClient(base_url=base, timeout=timeout, params={} if v4 else {"api_key": key},
                                       headers={"Authorization": f"Bearer {key}"} if v4 else {},
                                       limits=httpx.Limits(max_keepalive_connections=workers))
            ask, queue = _asker(client, rate, tries, backoff, patience), iter(missing)

            async def work() -> None:
                for film in queue:
                    try:
                        line = json.dumps({"id": film, "record": await ask(film)}).replace(key, "***")
                        file.write(f"\n{line}")  # a line that a kill has torn ends here
                        answers[film] = json.loads(line)["record"]
                    except _NoAnswer as error:
                        failed[film] = str(error)
                    bar.update()

            with (open(journal, "a", buffering=1, encoding="utf-8") as file,
                  tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="TMDB", unit="film") as bar):
                try:
                    async with client, asyncio.TaskGroup() as group:
                        for _ in range(workers):
                            group.create_task(work())
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None
    return tuple({film: found[film] for film in wanted if film in found} for found in (answers, failed))


def _asker(client: httpx.AsyncClient, rate: float, tries: int, backoff: float, patience: float) -> Callable:
    """Return the function that asks for one film; all its calls share one limiter, and pause together."""
    limiter, clock = AsyncLimiter(CREDIT, CREDIT / (SHARE * rate)), time.monotonic
    resume, answered, trouble = 0.0, clock(), ""  # when to go on, when the last answer came, what came instead
    doubling = tenacity.wait_exponential(multiplier=backoff, max=30)

    def pause_all(state: tenacity.RetryCallState) -> float:
        nonlocal resume
        resume = max(resume, clock() + (state.outcome.exception().args[0] or doubling(state)))
        return 0.0  # each waits for its turn

    async def turn() -> None:
        wait = 1.0
        while wait:
            await limiter.acquire()
            wait = max(resume - clock(), 0.0)
            if clock() + wait - answered > patience:
                raise DataError(f"TMDB gives no answer for {patience:g} s ({trouble}); the next start goes on here")
            await asyncio.sleep(wait)

    @tenacity.retry(retry=tenacity.retry_if_exception_type(_NoAnswer), stop=tenacity.stop_after_attempt(tries),
                    wait=tenacity.wait_random_exponential(multiplier=backoff, max=30), reraise=True)
    @tenacity.retry(retry=tenacity.retry_if_exception_type(_Refused), wait=pause_all)
    async def ask(film: int) -> dict | None:
        nonlocal answered, trouble
        body = None
        await turn()
        try:
            response = await client.get(f"movie/{film}")
            with suppress(ValueError, RecursionError):  # not JSON, not text, or nested without end
                body = response.json()
        except httpx.HTTPError as error:
            trouble = type(error).__name__
            raise _NoAnswer(trouble) from None
        body, status = body if isinstance(body, dict) else {}, response.status_code
        known = status == 200 and {"id", "title"} <= body.keys()
        if known or (status == 404 and body.get("status_code") == 34):  # TMDB's own; a gateway's 404 says nothing
            answered = clock()
            return body if known else None
        trouble = f"HTTP {status}"
        if status in (401, 403):
            raise DataError(f"TMDB, or a gateway on the way, refuses the key in {KEY} ({trouble})")
        if status == 429:
            named = re.fullmatch(r"\d{1,9}(\.\d+)?", response.headers.get("Retry-After", ""))
            raise _Refused(float(named[0]) if named else 0)
        raise _NoAnswer(trouble)

    return ask


def read_journal(path: Path) -> dict[int, dict | None]:
    """Read {tmdb_id: record or None} back; a line torn by a kill is no answer, and its film is asked for again."""
    answers = {}
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            answers[int(entry["id"])] = entry["record"]
    return answers


def run(coroutine: Coroutine) -> Any:
    """Return what a coroutine returns, from a loop in a thread of its own: in a notebook one runs already."""
    with start_blocking_portal() as portal:
        return portal.call(lambda: coroutine)
