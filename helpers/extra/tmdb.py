"""Ask TMDB for films: as fast as it permits and no faster, and able to go on where it was killed.

The key is read from the environment variable `TMDB_API_KEY` alone. TMDB takes a v4 token in a header; a v3 key
it takes in the URL only, so URLs are never shown, and the log records of the HTTP libraries are cleaned of it.
"""

import asyncio
import contextvars
import email.utils
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from aiolimiter import AsyncLimiter
from tqdm.auto import tqdm

from helpers.files import DataError, shown, writing

KEY = "TMDB_API_KEY"
BASE = "https://api.themoviedb.org/3"
RATE = 50.0  # requests a second: "somewhere in the 50 requests per second range", says TMDB's page on rate limits
# A timer rings late, never early, so a limiter that forgets what was missed is too slow, and more so on a busy machine;
# one that makes up for it at the full rate puts 51 requests into some seconds. Ours aims at 49 for 50 permitted, and
# half a request may be made up for: at most ⌊49 + 1.5⌋ = 50 start in any second, at the beginning too.
SHARE, CREDIT = 0.98, 1.5

# what the journal keeps of a record: what `films.from_tmdb` reads
FIELDS = ("id", "imdb_id", "adult", "belongs_to_collection", "budget", "genres", "original_language", "overview",
          "popularity", "production_companies", "production_countries", "release_date", "revenue", "runtime",
          "spoken_languages", "tagline", "title", "vote_average", "vote_count")


async def fetch(tmdb_ids: Iterable[int], journal: Path, *, base: str = BASE, rate: float = RATE, workers: int = 64,
                timeout: float = 5.0, tries: int = 6, backoff: float = 0.5, patience: float = 300.0,
                ) -> tuple[dict[int, dict | None], dict[int, str]]:
    """Fetch the records of films that the journal lacks, each once; every answer is in the journal before it counts.

    All requests share one limiter: they start evenly, 0.98·rate a second, no two closer than half of 1/rate, so
    there is no burst, at the start neither. After a 429 nobody asks until the pause it names is over (`Retry-After`;
    if absent or 0, a pause that doubles from `backoff`); it says nothing about the film and does not count as a
    try. Time-outs, broken connections, 5xx and what a gateway says in place of TMDB (a 200 without a film, a 404
    without TMDB's code) are tried again, the pause doubling up to 30 s, less a random share of at most a half so
    that films do not return together. Redirects are not followed, lest the key go elsewhere.

    Args:
        tmdb_ids: numbers of films, repeats allowed.
        journal: JSON lines `{"id", "record"}`, appended to; delete the file to ask for everything anew.
        base: URL up to `/movie`.
        rate: requests a second that are permitted.
        workers: requests under way at most; enough that those which stall do not hold up the others.
        timeout: seconds for one request, all of it.
        tries: for one film, before it has failed.
        backoff: seconds of the first pause.
        patience: seconds without one answer before all is given up.

    Returns:
        {tmdb_id: record, or None where TMDB knows no such film}, and {tmdb_id: reason} of films that failed for
        good. These are not in the journal, and so are tried again at the next start.

    Raises:
        DataError: no key, or one that TMDB refuses (401, 403), at once; a proxy or certificates that cannot be
            used; no answer for `patience`; or a journal that is damaged, or in use.
    """
    wanted = list(dict.fromkeys(int(film) for film in tmdb_ids))
    with writing(journal):
        answers, failed = read_journal(journal), {}
        if missing := [film for film in wanted if film not in answers]:
            key = read_key()
            client = _client(key, workers)
            with (cleaned_logs(key), open(journal, "ab") as file,
                  tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="TMDB", unit="film") as bar):

                def keep(film: int, record: dict | None) -> None:
                    line = json.dumps({"id": film, "record": record}).replace(key, "***")
                    file.write(line.encode() + b"\n")
                    file.flush()
                    answers[film] = json.loads(line)["record"]
                    bar.update()

                def fail(film: int, reason: str) -> None:
                    failed[film] = reason.replace(key, "***")
                    bar.set_postfix(failed=len(failed))
                    bar.update()

                async with client:
                    stopped = await _ask_all(missing, client, base.rstrip("/"), keep, fail, rate, workers, timeout,
                                             tries, backoff, patience)
            if stopped:
                raise DataError(f"{stopped.replace(key, '***')}. {len(wanted) - len(missing) + bar.n - bar.initial:,} "
                                f"of {len(wanted):,} films were dealt with; the answers are kept in {shown(journal)}, "
                                f"and the next start asks for the rest")
    return tuple({film: found[film] for film in wanted if film in found} for found in (answers, failed))


def _client(key: str, workers: int) -> httpx.AsyncClient:
    by_header = len(key) > 40 and "." in key  # a v4 token
    try:
        return httpx.AsyncClient(
            headers={"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if by_header else {}),
            params={} if by_header else {"api_key": key}, timeout=None,
            limits=httpx.Limits(max_connections=workers, max_keepalive_connections=workers))
    except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
        kind = r"SSL_CERT_(FILE|DIR)" if isinstance(error, OSError) else r"(HTTPS?|ALL|NO)_PROXY"
        named = " or ".join(name for name in os.environ if re.fullmatch(kind, name, re.I)) or "the system's proxy"
        raise DataError(f"TMDB cannot be asked, for {named} cannot be used ({error}): correct or unset it") from error


async def _ask_all(films: list[int], client: httpx.AsyncClient, base: str, keep: Callable, fail: Callable, rate: float,
                   workers: int, timeout: float, tries: int, backoff: float, patience: float) -> str | None:
    """Give each film to `keep` or `fail`; return why this had to stop early, or None."""
    limiter, clock = AsyncLimiter(CREDIT, CREDIT / (SHARE * rate)), asyncio.get_running_loop().time
    queue, resume, answered = iter(films), 0.0, clock()  # shared by all: who is next, when to go on, the last answer

    async def turn() -> None:
        while True:
            await limiter.acquire()
            if (wait := resume - clock()) <= 0:
                return
            await asyncio.sleep(wait)

    async def ask(film: int) -> None:
        nonlocal resume, answered
        failures, refusals = 0, 0
        while True:
            await turn()
            verdict, detail, wait = await _request(client, f"{base}/movie/{film}", timeout)
            if verdict == "answer":
                answered = clock()
                return keep(film, detail)
            if verdict == "stop":
                raise _Stop(detail)
            pause = min(backoff * 2 ** (refusals if verdict == "pause" else failures), 30)
            if verdict == "pause":
                refusals += 1
                wait = wait or pause
                resume = max(resume, clock() + wait)
            else:
                failures += 1
                if verdict == "fail" or failures == tries:
                    return fail(film, detail)
                wait = pause * random.uniform(0.5, 1)
            if (silent := clock() + wait - answered) > patience:
                raise _Stop(f"TMDB gives no answer: {detail}, and with the next pause {silent:.0f} s without one")
            if verdict == "again":
                await asyncio.sleep(wait)

    async def work() -> None:
        for film in queue:
            await ask(film)

    stopped = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workers, len(films))):
                group.create_task(work())
    except* _Stop as stops:
        stopped = str(stops.exceptions[0])
    return stopped


class _Stop(Exception):
    """Ends all workers; its text says why."""


async def _request(client: httpx.AsyncClient, url: str, timeout: float) -> tuple[str, Any, float | None]:
    """Ask once; return (verdict, detail, seconds to wait if the answer names them).

    The verdict is "answer", with the record or None as detail, or "pause", "again", "fail" or "stop", with a reason.
    """
    try:
        async with asyncio.timeout(timeout):
            response = await client.get(url)
    except TimeoutError:
        return "again", f"no answer within {timeout:g} s", None
    except httpx.HTTPError as error:
        return "again", f"{type(error).__name__} {error}".strip(), None
    status, body = response.status_code, None
    with suppress(ValueError, RecursionError):  # not JSON, not text, or nested without end
        body = response.json()
    body = body if isinstance(body, dict) else {}
    if status == 200 and {"id", "title"} <= body.keys():
        return "answer", {field: body[field] for field in FIELDS if field in body}, None
    if status == 404 and body.get("status_code") == 34:  # TMDB's own; a gateway's 404 says nothing about the film
        return "answer", None, None
    if status == 429:
        return "pause", "HTTP 429", retry_after(response.headers.get("Retry-After"))
    if status in (401, 403):
        other = "" if "status_code" in body else ", or a gateway on the way does"
        return "stop", f"TMDB refuses the key in {KEY} (HTTP {status}){other}", None
    if status in (200, 404):
        return "again", f"HTTP {status} without TMDB's own words", None
    return "again" if status >= 500 or status == 408 else "fail", f"HTTP {status}", None


def retry_after(value: str | None) -> float | None:
    """Return the seconds that `Retry-After` names, as a number or as a date; None if it names none or says 0.

    >>> retry_after("3"), retry_after("0"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), retry_after("soon")
    (3.0, None, None, None)
    """
    value = value or ""
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", value):
        return float(value) or None
    try:
        seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return seconds if seconds > 0 else None


def read_key() -> str:
    """Return the key of the environment.

    Raises:
        DataError: if there is none, or it is not one; the key itself is not shown.
    """
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise DataError(f"{KEY} is not set: get a key at https://www.themoviedb.org/settings/api and put it into the "
                        f"environment, `export {KEY}=…`")
    if not re.fullmatch(r"[\w.-]{8,}", key, flags=re.ASCII):
        raise DataError(f"{KEY} is no key of TMDB: it holds other signs than letters, digits, '.', '_' and '-', "
                        f"or fewer than eight")
    return key


def read_journal(path: Path) -> dict[int, dict | None]:
    """Read {tmdb_id: record or None} back; a last line torn by a kill is cut off the file.

    Raises:
        DataError: naming a line that is whole and yet no answer; or another process is writing the file.
    """
    path = Path(path)
    if not path.exists():
        return {}
    answers, size = {}, 0
    with writing(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                film, record = int(entry["id"]), entry["record"]
                if not isinstance(record, dict | None):
                    raise ValueError("its record is not one")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{shown(path)}, line {number}, is no answer of TMDB ({error}): delete the line, "
                                f"and its film is asked for again") from error
            answers[film] = record
            size += len(line)
        if size < path.stat().st_size:
            os.truncate(path, size)
    return answers


@contextmanager
def cleaned_logs(key: str) -> Iterator[None]:
    """Replace the key in whatever the HTTP libraries log meanwhile: httpx logs every URL, httpcore headers."""
    def clean(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(key, "***"), ()
        return True

    loggers = [logging.getLogger(name) for name in ["httpx", "asyncio", *logging.root.manager.loggerDict]
               if re.match(r"(httpx|httpcore|asyncio|anyio)(\.|$)", name)]
    for logger in loggers:
        logger.addFilter(clean)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(clean)


def run(coroutine: Coroutine) -> Any:
    """Return what a coroutine returns: from a script, and from a notebook, where a loop runs already.

    In a notebook it gets a loop in a thread of its own; an interrupt of the cell cancels it. There, a plain
    `await` does as well.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    began: list = []

    async def main():
        began.extend((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(contextvars.copy_context().run, asyncio.run, main())
        try:
            return future.result()
        except KeyboardInterrupt:
            if began:
                began[0].call_soon_threadsafe(began[1].cancel)
            raise
