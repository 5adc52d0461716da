import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from helpers import files
from helpers.files import DataError, read_vectors, replacing, write_json, write_vectors, writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_swaps_the_new_artefact_in_and_the_old_one_is_whole_until_then(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for before, text in ((None, "first"), ("first", "second")):
        with replacing(path) as beside:
            beside.write_text(text)
            assert beside.parent == path.parent and (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt("x"), PermissionError(13, "not yours")])
@pytest.mark.parametrize("place", ["", "deep/b"])
def test_failure_keeps_the_old_artefact_its_own_message_and_no_leftover(tmp_path, error, place):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "a") as beside:
        (beside / place).parent.mkdir(parents=True, exist_ok=True)
        (beside / place).write_text("half")
        raise error
    assert caught.value is error and (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("leftover", ["of a file", "of a folder", None])
def test_folder_is_renamed_into_place_of_an_older_one_and_a_leftover_does_not_mix_in(tmp_path, leftover):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "older").write_text("older")
    if leftover == "of a file":
        (tmp_path / ".raw.part").write_text("stale")
    elif leftover:
        (tmp_path / ".raw.part").mkdir()
        (tmp_path / ".raw.part" / "stale").write_text("stale")
    with replacing(tmp_path / "raw") as beside:
        beside.mkdir()
        (beside / "a.txt").write_text("whole")
    assert names(tmp_path) == ["raw"] and names(tmp_path / "raw") == ["a.txt"]


def test_full_disk_gets_a_sentence_and_keeps_the_old_artefact(tmp_path, monkeypatch):
    def full_disk(path, text, **_):
        path.write_bytes(text.encode()[:3])
        raise OSError(28, "No space left on device")

    path = tmp_path / "infos.json"
    write_json(path, old := {"old": 1, "b": "Amélie", "a": [1]})
    text = path.read_text(encoding="utf-8")
    assert "Amélie" in text and text.index('"b"') < text.index('"a"')
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="the disk is full") as caught:
        write_json(path, {"new": 2})
    assert caught.value.errno == 28 and json.loads(path.read_text()) == old and names(tmp_path) == ["infos.json"]


def test_only_one_process_writes_an_artefact(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    program = ("import sys; from pathlib import Path; from helpers.files import writing\n"
               "with writing(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    monkeypatch.setattr(files, "writing", partial(writing, wait=0))
    for way in (files.writing, replacing):
        with pytest.raises(DataError, match=f"process {other.pid} "), way(path):
            pass
    Timer(0.3, other.kill).start()
    with writing(path, wait=60), replacing(path) as beside:  # whoever waits is next, after a killed writer too
        with pytest.raises(ZeroDivisionError), writing(path):
            raise ZeroDivisionError
        assert ".a.txt.lock" in names(tmp_path)  # still held
        beside.write_text("whole")
    other.communicate()
    assert names(tmp_path) == ["a.txt"]


def test_folders_are_known_by_the_name_of_the_source_which_needs_one(tmp_path, monkeypatch):
    for dataset in ("", ".", "..", "a/..", ".zip", "/"):
        with pytest.raises(DataError, match="no name"):
            files.data_dir(dataset, tmp_path)
    assert names(tmp_path) == []
    for dataset in ("clicks", "some/where/clicks", "/tmp/clicks", "clicks.zip"):
        assert files.data_dir(dataset, tmp_path) == tmp_path / "data" / "clicks" and names(tmp_path) == ["data"]
    assert files.res_dir("ml-100k", tmp_path) == tmp_path / "data" / "ml-100k" / "res"
    assert files.res_dir("ml-100k", tmp_path, committed=True) == tmp_path / "res"
    assert files.res_dir("ml-20m", tmp_path) == tmp_path / "data" / "ml-20m" / "res"
    assert (tmp_path / "data" / "clicks").is_dir() and (tmp_path / "res").is_dir()
    for given, chosen in (("ml-20m", "ml-20m"), ("", "ml-100k")):
        monkeypatch.setenv("RECNN_DATASET", given)
        assert files.chosen_dataset() == chosen


@pytest.mark.parametrize("protocol", [None, 3, 4, 5])
def test_vectors_come_back_from_any_pickle_protocol_and_numpy(tmp_path, protocol):
    vectors, path = {7: np.arange(3, dtype=np.float32), 2: np.array([[1.0, 2.0], [3.0, 4.0]]).T}, tmp_path / "v.p"
    write_vectors(path, vectors)
    contents = [pickle.dumps(vectors, protocol) if protocol else path.read_bytes()]
    if protocol == 3:  # the one protocol with bytes whose module names carry no length
        contents += [contents[0].replace(b"numpy._core", b"numpy.core")]
    for content in contents:
        path.write_bytes(content)
        back = read_vectors(path)
        assert list(back) == [7, 2] and all(back[key].dtype == vectors[key].dtype for key in vectors)
        assert all(np.array_equal(back[key], vectors[key]) for key in vectors)


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {1: evil},
                                  lambda evil: {1: np.array([evil], dtype=object)}])
@pytest.mark.parametrize("call", [(os.mkdir, "made"), (eval, "1"), (getattr, dict, "keys"), (np.load, "made")])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickle_that_calls_anything_is_refused_and_does_not_call(tmp_path, monkeypatch, wrap, call, protocol):
    monkeypatch.chdir(tmp_path)
    Path("v.p").write_bytes(pickle.dumps(wrap(Evil(*call)), protocol=protocol))
    with pytest.raises(DataError, match="asks for"):
        read_vectors("v.p")
    assert names(tmp_path) == ["v.p"]
    Path("v.p").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")  # more of an array
    with pytest.raises(DataError, match="tofile"):
        read_vectors("v.p")


def test_cut_damaged_or_other_bytes_get_a_sentence(tmp_path):
    whole = pickle.dumps({1: np.arange(4, dtype=np.float32)})
    others = map(pickle.dumps, ([1, "a"], "text", {1: "text"}, {1: [0.5]}, {"a": np.zeros(1)}))
    damaged = (b"PK\x03\x04 a zip", b"\x80\x04\x8c\x02\xff\xff.", b"<html>404</html>", b"I1x\n.", b"\x80\x04h\x05.",
               b"\x80\x04K\x01K\x02a.")
    for content in (*(whole[:end] for end in range(len(whole))), *others, *damaged):
        (tmp_path / "v.p").write_bytes(content)
        with pytest.raises(DataError, match="02_embeddings"):
            read_vectors(tmp_path / "v.p")
