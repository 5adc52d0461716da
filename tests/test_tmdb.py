import asyncio
import itertools
import json
import logging
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from benchmarks.metadata import film_of, record_of, serve
from helpers.extra import tmdb
from helpers.files import PROJECT, DataError

CLIENT = httpx.AsyncClient
KEY_V3 = "0123456789abcdefKEYTHATNOBODYMAYSEE"
KEY_V4 = "eyJhbGciOiJIUzI1NiJ9.eyJhdWQiOiJLRVlUSEFUTk9CT0RZTUFZU0VFIn0.KEYTHATNOBODYMAYSEE-4"
UNKNOWN = 404, {}, b'{"success": false, "status_code": 34, "status_message": "It could not be found."}', 0


def found(film):
    return 200, {}, json.dumps(record_of(film)).encode(), 0


@pytest.fixture
def server(monkeypatch):
    """Return a function that starts a server with a `respond(film, nth request for it)` and gives its URL and log."""
    monkeypatch.setenv(tmdb.KEY, KEY_V3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    def start(respond=lambda film, nth: found(film)):
        log, counts = [], Counter()  # log: (monotonic time, film, path, header lines)

        def answer(path, lines):
            film = film_of(path)
            counts[film] += 1
            log.append((time.monotonic(), film, path, lines))
            return respond(film, counts[film])

        return f"http://127.0.0.1:{portal.call(serve, answer).sockets[0].getsockname()[1]}/3", log

    with start_blocking_portal() as portal:
        yield start


class Virtual(asyncio.SelectorEventLoop):
    """A loop that waits for nothing: its clock jumps to what is due next."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        self.now += 1e-6  # a clock never stands: what waits for less than a float can add would wait for ever
        if self._scheduled and not self._ready:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Return a function that fetches from `respond(film, nth request for it)`: (the result, [(when, film)])."""
    monkeypatch.setenv(tmdb.KEY, KEY_V3)

    def ask(films, respond, **options):
        loop, log = Virtual(), []

        def answer(request):
            film = int(request.url.path.rpartition("/")[2])
            log.append((loop.time(), film))
            status, headers, body, _ = respond(film, [other for _, other in log].count(film))
            return httpx.Response(status, headers=headers, content=body)

        monkeypatch.setattr(tmdb, "time", SimpleNamespace(monotonic=loop.time))
        monkeypatch.setattr(tmdb.httpx, "AsyncClient", partial(CLIENT, transport=httpx.MockTransport(answer)))
        try:
            return loop.run_until_complete(tmdb.fetch(films, tmp_path / "t", **options)), log
        finally:
            loop.close()
    return ask


def fetch(films, journal, base, **options):
    return tmdb.run(tmdb.fetch(films, journal, base=base, **{"rate": 1000, "workers": 8, "backoff": 0.01, **options}))


def asked(log):
    return Counter(film for _, film, *_ in log)


@pytest.mark.parametrize("torn", ['{"id": 3, "rec', '{"id": 3, "title": "é', "[1]"])
def test_each_film_is_asked_for_once_and_kept_but_that_of_a_torn_line_also_where_a_loop_runs(server, tmp_path, torn):
    base, log = server(lambda film, nth: UNKNOWN if film == 5 else found(film))
    films, journal = [5, 3, 5, 862, 3, *range(10, 40)], tmp_path / "new" / "t.jsonl"
    journal.parent.mkdir()
    journal.write_bytes(b'{"id": 1, "record": {"title": "One"}}\n' + torn.encode())
    answers, failed = fetch(films, journal, base)
    assert (list(answers), failed) == (list(dict.fromkeys(films)), {})
    assert answers == {film: record_of(film) for film in films} | {5: None}
    assert tmdb.read_journal(journal) == answers | {1: {"title": "One"}}

    async def cell():
        return (fetch([862, 5, 7], journal, base),  # a plain call inside a running loop
                await tmdb.fetch([1, 8], journal, base=base))
    assert asyncio.run(cell()) == (({862: record_of(862), 5: None, 7: record_of(7)}, {}),
                                   ({1: {"title": "One"}, 8: record_of(8)}, {}))
    assert asked(log) == dict.fromkeys([*films, 7, 8], 1)


@pytest.mark.parametrize("fault", [
    (503, {"Retry-After": "9"}, b"", 0), (0, {}, b"", 0), (200, {}, b'{"id": 1, "ti', 0), (200, {}, b"\xff\xfe", 0),
    (200, {"Content-Encoding": "gzip"}, b"no gzip", 0), (200, {}, b'{"title": "Welcome"}', 0), (200, {}, b"{}", 9),
    (404, {}, b"<html>", 0), (404, {}, b'{"status_code": 404}', 0), (302, {"Location": "/3/movie/7"}, b"{}", 0),
], ids=lambda fault: f"{fault[0]} {fault[1:]}"[:40])
def test_what_is_not_tmdbs_own_word_is_tried_again_and_at_the_next_start(server, tmp_path, fault):
    base, log = server(lambda film, nth: fault if film == 2 and nth < 6 else found(film))
    options = {"timeout": 0.2 if fault[3] else 5, "tries": 3}
    answers, failed = fetch([1, 2, 3], tmp_path / "t", base, **options)
    assert list(answers) == [1, 3] and list(failed) == [2] and asked(log) == {1: 1, 2: 3, 3: 1}
    assert failed[2] == f"HTTP {fault[0]}" or "Error" in failed[2] or "Timeout" in failed[2]
    assert fetch([1, 2, 3], tmp_path / "t", base, **options) == ({film: record_of(film) for film in (1, 2, 3)}, {})
    assert asked(log) == {1: 1, 2: 6, 3: 1}


@pytest.mark.parametrize("pause", ["3", "0", "soon", None])
def test_refusals_are_no_tries(timed, pause):
    refusal = 429, {"Retry-After": pause} if pause else {}, b"", 0
    (answers, failed), log = timed([1], lambda film, nth: refusal if nth <= 5 else found(film), tries=2)
    assert (answers, failed) == ({1: record_of(1)}, {})
    waits = [after - before for (before, _), (after, _) in itertools.pairwise(log)]
    assert waits == pytest.approx([3.0] * 5 if pause == "3" else [0.5, 1, 2, 4, 8], abs=0.05)


def test_requests_start_evenly_and_after_a_429_all_pause_together(timed):
    def respond(film, nth):
        return (429, {"Retry-After": "7"}, b"", 0) if film == 240 and nth == 1 else found(film)

    (answers, _), log = timed(range(1, 500), respond, rate=50, workers=50)
    times = [when for when, _ in log]
    assert len(answers) == 499 and len(times) == 500
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert sorted(gaps)[-1] == pytest.approx(7, abs=0.05) and sorted(gaps)[-2] < 0.03  # one pause, of all
    assert all(times[n + 50] - times[n] > 0.999 for n in range(450))  # never more than 50 in a second
    assert min(gaps) > 0.5 / 50  # and no burst: a late request may be made up for by half a one


@pytest.mark.parametrize("fault, said", [(503, "HTTP 503"), (429, "HTTP 429"), (401, "401"), (403, "403")])
def test_a_refused_key_or_no_answer_for_long_stops_all_and_what_there_is_stays(timed, tmp_path, fault, said):
    retry = {"Retry-After": "86400"} if fault == 429 else {}
    with pytest.raises(DataError, match=said):
        timed(range(1, 1000), lambda film, nth: found(film) if film <= 20 else (fault, retry, b"{}", 0), workers=8,
              patience=20)
    assert len(tmdb.read_journal(tmp_path / "t")) == 20


@pytest.mark.parametrize("key", ["", "short", "two words and more", "0123456789é"])
def test_a_missing_or_impossible_key_is_said_and_none_is_needed_where_nothing_is_asked(tmp_path, monkeypatch, key):
    monkeypatch.setenv(tmdb.KEY, key)
    (tmp_path / "t").write_text('{"id": 1, "record": null}\n')
    assert fetch([1], tmp_path / "t", "http://127.0.0.1:9") == ({1: None}, {})
    with pytest.raises(DataError, match="TMDB_API_KEY") as raised:
        fetch([2], tmp_path / "t", "http://127.0.0.1:9")
    assert not key or key not in str(raised.value)


def test_killed_no_film_is_lost_and_none_asked_for_twice(server, tmp_path):
    journal, (base, log) = tmp_path / "t.jsonl", server()
    program = (f"from helpers.extra import tmdb; from pathlib import Path; "
               f"tmdb.run(tmdb.fetch(range(1, 301), Path({str(journal)!r}), base={base!r}, rate=200, workers=2))")
    child = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stderr=subprocess.DEVNULL)
    while len(log) < 60:
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.2)  # what the dead had sent arrives
    kept, before = set(tmdb.read_journal(journal)), asked(log)
    assert len(before.keys() - kept) <= 2  # all but those under way were written down
    answers, failed = fetch(range(1, 301), journal, base)
    assert (answers, failed) == ({film: record_of(film) for film in range(1, 301)}, {})
    assert asked(log) - before == Counter(set(range(1, 301)) - kept)


@pytest.mark.parametrize("key", [KEY_V3, KEY_V4])
def test_the_key_is_sent_in_its_own_way_and_seen_nowhere_however_all_fails(
        server, tmp_path, monkeypatch, caplog, capfd, key):
    monkeypatch.setenv(tmdb.KEY, f" {key}\n")
    for name in (None, "httpx", "httpcore.http11", "httpcore.connection", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    echo = {"Location": f"http://127.0.0.1/?api_key={key}", "X-Echo": f"Bearer {key}"}
    ways = [(200, {}, json.dumps({"id": 1, "title": key, key: key}).encode(), 0), (301, echo, b"", 0),
            (500, echo, key.encode(), 0), (200, {"Bad Header " + key: "x"}, b"", 0), (401, echo, key.encode(), 0)]
    texts = []
    for number, way in enumerate(ways):
        base, log = server(lambda film, nth, way=way: way)
        try:
            texts.append(repr(fetch([1, 2], tmp_path / f"t{number}", base, tries=2)))
        except DataError as error:
            texts.append("".join(traceback.format_exception(error)) + repr(error.__context__))
        path, lines = log[0][2:]
        in_header = f"authorization: bearer {key}".lower() in "\n".join(lines).lower()
        assert (in_header, path) == (key == KEY_V4, "/3/movie/1" + ("" if in_header else f"?api_key={key}"))
    texts += [*capfd.readouterr(), caplog.text, *(path.read_text() for path in tmp_path.iterdir())]
    texts += [repr(record.__dict__) for record in caplog.records]
    assert any("film/s" in text for text in texts) and "receive_response_headers" in caplog.text
    assert not [text for text in texts if key in text or "KEYTHATNOBODYMAYSEE" in text]
