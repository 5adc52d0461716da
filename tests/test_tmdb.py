import asyncio
import email.utils
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from functools import partial

import pytest
from filelock import FileLock

from benchmarks.metadata import film_of, record_of, serve
from helpers.extra import tmdb
from helpers.files import PROJECT, DataError

KEY_V3 = "0123456789abcdefKEYTHATNOBODYMAYSEE"
KEY_V4 = "eyJhbGciOiJIUzI1NiJ9.eyJhdWQiOiJLRVlUSEFUTk9CT0RZTUFZU0VFIn0.KEYTHATNOBODYMAYSEE-4"
FAST = dict(rate=1000, workers=8, timeout=5, backoff=0.01)


UNKNOWN = 404, {}, b'{"success": false, "status_code": 34, "status_message": "It could not be found."}', 0


def found(film):
    return 200, {}, json.dumps(record_of(film)).encode(), 0


@pytest.fixture
def server():
    """Return a function that starts a server with a `respond(film, nth request for it)` and gives its URL and log."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def start(respond=lambda film, nth: found(film)):
        log, counts = [], Counter()  # log: (monotonic time, film, path, header lines)

        def answer(path, lines):
            film = film_of(path)
            counts[film] += 1
            log.append((time.monotonic(), film, path, lines))
            return respond(film, counts[film])

        started = asyncio.run_coroutine_threadsafe(serve(answer), loop).result()
        return f"http://127.0.0.1:{started.sockets[0].getsockname()[1]}/3", log

    async def finish():
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    yield start
    asyncio.run_coroutine_threadsafe(finish(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv(tmdb.KEY, KEY_V3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def fetch(films, journal, base, **options):
    return tmdb.run(tmdb.fetch(films, journal, base=base, **{**FAST, **options}))


def asked(log):
    return Counter(film for _, film, *_ in log)


def test_each_film_is_fetched_once_and_in_the_journal(server, tmp_path):
    base, log = server()
    films = [5, 3, 5, 862, 3, *range(10, 40)]
    answers, failed = fetch(films, tmp_path / "new" / "t.jsonl", base)
    assert (list(answers), failed) == (list(dict.fromkeys(films)), {})
    assert answers[862] == record_of(862)
    assert asked(log) == dict.fromkeys(films, 1)
    assert tmdb.read_journal(tmp_path / "new" / "t.jsonl") == answers
    again, _ = fetch([862, 5], tmp_path / "new" / "t.jsonl", base)
    assert again == {862: answers[862], 5: answers[5]} and len(log) == len(set(films))


def test_of_a_record_the_journal_keeps_what_is_read_and_a_record_may_be_odd(server, tmp_path):
    odd = {"id": "x", "title": None, "genres": 3, "video": False, "poster_path": "/a.jpg"}
    base, _ = server(lambda film, nth: (200, {}, json.dumps(odd).encode(), 0))
    assert fetch([1], tmp_path / "t", base)[0] == {1: {"id": "x", "title": None, "genres": 3}}


@pytest.mark.parametrize("fault", [
    (500, {}, b"{}", 0), (503, {"Retry-After": "9"}, b"", 0), (0, {}, b"", 0), (200, {}, b'{"id": 1, "ti', 0),
    (200, {}, b"\xff\xfe\xfa", 0), (200, {}, b"[1]", 0), (200, {}, b"{}", 0), (200, {}, b"[" * 100_000, 0),
    (200, {"Content-Encoding": "gzip"}, b"no gzip", 0), (200, {}, b'{"success": false}', 0), (408, {}, b"", 0),
    (429, {"Retry-After": "0.05"}, b"", 0), (429, {"Retry-After": "0"}, b"", 0), (429, {}, b"", 0),
    (429, {"Retry-After": "soon"}, b"", 0), (200, {}, b"{}", 9)], ids=lambda fault: f"{fault[0]} {fault[1:]}"[:40])
def test_what_passes_is_tried_again(server, tmp_path, fault):
    base, log = server(lambda film, nth: fault if film == 2 and nth <= 2 else found(film))
    answers, failed = fetch([1, 2, 3], tmp_path / "t", base, timeout=0.3 if fault[3] else 5)
    assert (answers, failed) == ({film: record_of(film) for film in (1, 2, 3)}, {})
    assert asked(log) == {1: 1, 2: 3, 3: 1}


def test_no_server_at_all_is_a_failure_of_each_film(tmp_path):
    answers, failed = fetch([1, 2], tmp_path / "t", "http://127.0.0.1:9/3", tries=2)
    assert answers == {} and list(failed) == [1, 2] and "ConnectError" in failed[1]


def test_refusals_do_not_count_as_tries(server, tmp_path):
    base, _ = server(lambda film, nth: (429, {"Retry-After": "0.02"}, b"", 0) if nth <= 9 else found(film))
    assert fetch([1], tmp_path / "t", base, tries=2) == ({1: record_of(1)}, {})


def test_after_a_429_all_pause_together(server, tmp_path):
    refused = []

    def respond(film, nth):
        if film == 40 and not refused:
            refused.append(time.monotonic())
            return 429, {"Retry-After": "1"}, b"", 0
        return found(film)

    base, log = server(respond)
    answers, _ = fetch(range(1, 200), tmp_path / "t", base, rate=100)
    assert len(answers) == 199
    times = [at for at, *_ in log]
    before, after = max(itertools.pairwise(times), key=lambda pair: pair[1] - pair[0])
    assert after - refused[0] >= 1 and after - before > 0.5  # unpaused, there would be one each 10 ms


def test_a_pause_may_be_named_by_a_date():
    assert 58 < tmdb.retry_after(email.utils.formatdate(time.time() + 61, usegmt=True)) < 62
    assert [tmdb.retry_after(text) for text in (None, "", "-3", "x", "0", email.utils.formatdate(0))] == [None] * 6


def test_no_burst_at_the_start_nor_later(server, tmp_path):
    base, log = server()
    fetch(range(1, 60), tmp_path / "t", base, rate=50, workers=50)
    times = [at for at, *_ in log]
    assert times[-1] - times[0] >= 58 / 50 - 0.15
    assert times[10] - times[0] >= 0.1  # a burst would have sent them at once


def test_stalled_requests_do_not_hold_up_the_others(server, tmp_path):
    base, log = server(lambda film, nth: (200, {}, b"{}", 2) if film <= 4 and nth == 1 else found(film))
    answers, _ = fetch(range(1, 60), tmp_path / "t", base, timeout=1)
    assert len(answers) == 59
    assert {film for _, film, *_ in log[-4:]} == {1, 2, 3, 4}  # all others had their answer before the time-out


def test_unknown_film_is_an_answer(server, tmp_path):
    base, log = server(lambda film, nth: UNKNOWN if film == 2 else found(film))
    for _ in range(2):
        answers, failed = fetch([1, 2], tmp_path / "t", base)
        assert answers == {1: record_of(1), 2: None} and failed == {}
    assert len(log) == 2


@pytest.mark.parametrize("answer", [
    (404, b"<html>no such route</html>"), (404, b""), (404, b"{}"), (404, b"[34]"), (404, b'{"status_code": 404}'),
    (404, b'{"error": "film 34"}'), (200, b"<html>sign in</html>"), (200, b""), (200, b'[{"id": 1, "title": "One"}]'),
    (200, b'{"title": "Welcome"}'), (200, b'{"id": "request 7", "error": "busy"}'), (302, b"{}"), (307, b"<html>")],
    ids=lambda answer: f"{answer[0]} {answer[1][:20]}")
def test_what_a_gateway_says_in_place_of_tmdb_is_no_answer(server, tmp_path, answer):
    base, log = server(lambda film, nth: (answer[0], {"Location": "/sign-in"}, answer[1], 0))
    answers, failed = fetch([1], tmp_path / "t", base, tries=2)
    assert answers == {} and failed[1].startswith(f"HTTP {answer[0]}")
    assert (tmp_path / "t").read_bytes() == b"" and len(log) == (1 if 300 <= answer[0] < 400 else 2)


@pytest.mark.parametrize("body, ends", [(b'{"status_code": 7}', r"\(HTTP 403\)\."), (b"<html>", "or a gateway on")])
def test_who_refuses_the_key_is_said(server, tmp_path, body, ends):
    base, _ = server(lambda film, nth: (403, {}, body, 0))
    with pytest.raises(DataError, match=f"refuses the key in TMDB_API_KEY.*{ends}"):
        fetch([1], tmp_path / "t", base)


@pytest.mark.parametrize("name, value", [
    ("HTTPS_PROXY", "socks5://127.0.0.1:1"), ("https_proxy", "gopher://127.0.0.1"), ("ALL_PROXY", "http://proxy:door"),
    ("SSL_CERT_FILE", "missing.pem"), ("SSL_CERT_FILE", __file__)])
def test_a_proxy_or_certificates_that_cannot_be_used_are_named(tmp_path, monkeypatch, name, value):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=rf"TMDB cannot be asked, for .*{name}.* cannot be used \(.+\): correct or un"):
        fetch([1], tmp_path / "t", "http://127.0.0.1:9")


def test_a_journal_that_another_process_writes_is_left_alone(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tmdb, "writing", partial(tmdb.writing, wait=0.1))
    (tmp_path / "t").write_bytes(half := b'{"id": 1, "record": {"tit')  # the other one is in the middle of it
    base, log = server()
    with FileLock(tmp_path / ".t.lock"):
        for read in (lambda: fetch([1, 2], tmp_path / "t", base), lambda: tmdb.read_journal(tmp_path / "t")):
            with pytest.raises(DataError, match="t is being written by"):
                read()
    assert (tmp_path / "t").read_bytes() == half and not log
    assert list(fetch([1, 2], tmp_path / "t", base)[0]) == [1, 2]


def test_film_that_failed_for_good_is_reported_and_tried_at_the_next_start(server, tmp_path):
    well = []
    base, log = server(lambda film, nth: (502, {}, b"", 0) if film == 2 and not well else found(film))
    answers, failed = fetch([1, 2, 3], tmp_path / "t", base, tries=3)
    assert (list(answers), failed) == ([1, 3], {2: "HTTP 502"})
    assert asked(log) == {1: 1, 2: 3, 3: 1}
    well.append(True)
    answers, failed = fetch([1, 2, 3], tmp_path / "t", base, tries=3)
    assert (list(answers), failed) == ([1, 2, 3], {})
    assert asked(log) == {1: 1, 2: 4, 3: 1}


@pytest.mark.parametrize("status", [301, 400, 418])
def test_other_answers_are_not_tried_again_nor_followed(server, tmp_path, status):
    base, log = server(lambda film, nth: (status, {"Location": f"{base}/movie/7"}, b"{}", 0))
    assert fetch([1], tmp_path / "t", base) == ({}, {1: f"HTTP {status}"})
    assert asked(log) == {1: 1}


@pytest.mark.parametrize("status", [401, 403])
def test_bad_key_stops_at_once_and_keeps_what_there_is(server, tmp_path, status):
    base, log = server(lambda film, nth: found(film) if film <= 20 else (status, {}, b"{}", 0))
    with pytest.raises(DataError, match=rf"TMDB refuses the key in TMDB_API_KEY \(HTTP {status}\)"):
        fetch(range(1, 500), tmp_path / "t", base)
    assert len(log) < 60
    assert set(tmdb.read_journal(tmp_path / "t")) <= set(range(1, 21))


def test_no_answer_for_long_stops_all(server, tmp_path):
    for fault in ((503, {}, b"", 0), (429, {}, b"", 0), (429, {"Retry-After": "86400"}, b"", 0)):
        base, log = server(lambda film, nth, fault=fault: fault)
        with pytest.raises(DataError, match=rf"no answer: HTTP {fault[0]}, .* the next start asks for the rest"):
            fetch(range(1, 1000), tmp_path / "t", base, patience=0.5, tries=100)
        assert len(log) < 999


@pytest.mark.parametrize("key, sentence", [(None, "is not set"), ("", "is not set"), ("short", "is no key"),
                                           ("two words and more", "is no key"), ("0123456789é", "is no key")])
def test_missing_or_impossible_key_is_said(tmp_path, monkeypatch, key, sentence):
    if key is None:
        monkeypatch.delenv(tmdb.KEY)
    else:
        monkeypatch.setenv(tmdb.KEY, key)
    with pytest.raises(DataError, match=f"TMDB_API_KEY {sentence}") as raised:
        fetch([1], tmp_path / "t", "http://127.0.0.1:9")
    assert not key or key not in str(raised.value)


def test_nothing_to_ask_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv(tmdb.KEY)
    (tmp_path / "t").write_text('{"id": 1, "record": null}\n')
    assert fetch([1], tmp_path / "t", "http://127.0.0.1:9") == ({1: None}, {})


@pytest.mark.parametrize("torn", ['{"id": 2, "rec', '{"id": 2, "record": null}', "\x00", '{"id": 2, "title": "é'])
def test_torn_last_line_is_cut_off_and_its_film_asked_for_again(server, tmp_path, torn):
    journal = tmp_path / "t"
    journal.write_bytes(b'{"id": 1, "record": {"title": "One"}}\n' + torn.encode()[:-1])
    base, log = server()
    answers, _ = fetch([1, 2], journal, base)
    assert answers == {1: {"title": "One"}, 2: record_of(2)} and asked(log) == {2: 1}
    assert tmdb.read_journal(journal) == answers


@pytest.mark.parametrize("line", ["x", "[1]", '{"id": 2}', '{"id": "b", "record": null}', '{"id": 2, "record": 3}', ""])
def test_damaged_line_is_named(tmp_path, line):
    (tmp_path / "t").write_text('{"id": 1, "record": null}\n' + line + '\n{"id": 3, "record": null}\n')
    with pytest.raises(DataError, match="t, line 2, is no answer"):
        tmdb.read_journal(tmp_path / "t")


def test_an_answer_is_on_file_before_the_next_film_is_asked_for(server, tmp_path):
    journal, on_file = tmp_path / "t", []

    def respond(film, nth):
        on_file.append(journal.read_bytes().count(b"\n"))
        return found(film)

    base, _ = server(respond)
    fetch(range(1, 9), journal, base, workers=1)
    assert on_file == list(range(8))


def test_killed_at_any_moment_no_film_is_lost_and_none_fetched_twice(server, tmp_path):
    base, log = server()
    films, journal, kept, n_seen = list(range(1, 301)), tmp_path / "t.jsonl", set(), 0
    program = (f"from helpers.extra import tmdb; from pathlib import Path; "
               f"tmdb.run(tmdb.fetch(range(1, 301), Path({str(journal)!r}), base={base!r}, rate=200, workers=2))")
    for n_requests in (1, 60, 150):
        child = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stderr=subprocess.DEVNULL)
        while len(log) < n_requests:
            assert child.poll() is None
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        time.sleep(0.2)  # what the dead had sent arrives
        assert not kept & asked(log[n_seen:]).keys()
        now_kept, now_asked, n_seen = set(tmdb.read_journal(journal)), asked(log[n_seen:]), len(log)
        assert len(now_asked.keys() - now_kept) <= 2  # all but those under way were written down
        assert kept <= now_kept
        kept = now_kept
    answers, failed = fetch(films, journal, base)
    assert 140 < len(kept) < 300 and (list(answers), failed) == (films, {})
    assert asked(log[n_seen:]) == dict.fromkeys(set(films) - kept, 1)
    assert all(record == record_of(film) for film, record in answers.items())


def test_runs_where_a_loop_runs_already_and_can_be_awaited(server, tmp_path):
    base, _ = server()

    async def cell():
        return (fetch([1], tmp_path / "t", base),  # a plain call inside a running loop
                await tmdb.fetch([2], tmp_path / "t", base=base))

    assert asyncio.run(cell()) == (({1: record_of(1)}, {}), ({2: record_of(2)}, {}))


@pytest.mark.parametrize("key", [KEY_V3, KEY_V4])
def test_key_is_sent_in_its_own_way(server, tmp_path, monkeypatch, key):
    monkeypatch.setenv(tmdb.KEY, key)
    base, log = server()
    fetch([1], tmp_path / "t", base)
    _, _, path, lines = log[0]
    in_header = f"authorization: bearer {key}".lower() in "\n".join(lines).lower()
    assert (in_header, path) == ((True, "/3/movie/1") if key == KEY_V4 else (False, f"/3/movie/1?api_key={key}"))


@pytest.mark.parametrize("key", [KEY_V3, KEY_V4])
def test_key_is_nowhere_however_all_fails(server, tmp_path, monkeypatch, caplog, capfd, key):
    monkeypatch.setenv(tmdb.KEY, key)
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore.http11", "httpcore.connection", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    echo = {"Location": f"http://127.0.0.1/?api_key={key}", "X-Echo": f"Bearer {key}"}
    ways = [found(1), (200, {}, json.dumps({"id": 1, "title": key, key: key, "tagline": key}).encode(), 0),
            (404, echo, key.encode(), 0), (301, echo, b"", 0), (500, echo, key.encode(), 0), (0, {}, b"", 0),
            (200, echo, b'{"' + key.encode(), 0), (200, {"Content-Encoding": "gzip"}, key.encode(), 0),
            (200, {"Bad Header " + key: "x"}, b"", 0), (200, {"Content-Length": key}, b"", 0),
            (200, {}, b"", 9), (429, {"Retry-After": key}, b"", 0), (401, echo, key.encode(), 0)]
    texts = []
    for number, way in enumerate(ways):
        base, log = server(lambda film, nth, way=way: way)
        try:
            result = fetch([1, 2], tmp_path / f"t{number}", base, tries=2, timeout=0.5, patience=1)
            texts.append(repr(result))
        except DataError as error:
            texts.append("".join(traceback.format_exception(error)))
            seen = error
            while seen is not None:  # also what `from None` would hide
                texts.append(repr(seen) + repr(seen.args))
                seen = seen.__cause__ or seen.__context__
        assert log
    try:
        fetch([3], tmp_path / "none", "http://127.0.0.1:9/3", tries=1)
    finally:
        out, err = capfd.readouterr()
    texts += [out, err, caplog.text, *(path.read_text() for path in tmp_path.iterdir())]
    texts += [repr(record.__dict__) for record in caplog.records]
    assert any("HTTP Request: GET http://127.0.0.1" in text for text in texts)  # the logs did see the requests
    assert any("receive_response_headers" in text for text in texts)
    assert "film/s" in err
    assert not [text for text in texts if key in text or "KEYTHATNOBODYMAYSEE" in text]
    assert os.environ[tmdb.KEY] == key
