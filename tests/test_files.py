import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import files
from helpers.files import DataError, need, read_vectors, replacing, write_json, write_vectors


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def full_disk(path, text, **_):
    path.write_bytes(text.encode()[:3])
    raise OSError(28, "No space left on device")


def test_replacing_swaps_the_new_artefact_in(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with replacing(path) as beside:
            beside.write_text(text)
            assert beside.parent == path.parent
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_old_artefact_is_whole_while_the_new_one_is_being_written(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("ne")
        assert path.read_text() == "old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_failure_keeps_the_old_artefact_and_no_leftover(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as beside:
        beside.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_while_filling_a_folder_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), replacing(tmp_path / "raw") as beside:
        (beside / "deep").mkdir(parents=True)
        (beside / "deep" / "a.txt").write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_folder_is_renamed_into_place(tmp_path):
    with replacing(tmp_path / "raw") as beside:
        beside.mkdir()
        (beside / "a.txt").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert (tmp_path / "raw" / "a.txt").read_text() == "whole"


def test_full_disk_gets_a_sentence_and_keeps_the_old_artefact(tmp_path, monkeypatch):
    path = tmp_path / "infos.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match=r"the disk is full \([\d,]+ bytes left\) while writing infos.json") as caught:
        write_json(path, {"new": 2})
    assert caught.value.errno == 28
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_other_write_errors_keep_their_own_message(tmp_path):
    with pytest.raises(PermissionError, match="not yours"), replacing(tmp_path / "a"):
        raise PermissionError(13, "not yours")


def test_json_is_readable_utf8_in_the_order_given(tmp_path):
    write_json(tmp_path / "a.json", {"b": "Amélie", "a": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "Amélie" in text and text.index('"b"') < text.index('"a"')


def test_need_names_the_file_and_the_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"infos.json is not there yet: run notes/01_data_parsing.ipynb first"):
        need(tmp_path / "infos.json", "01_data_parsing")


def test_need_returns_what_is_there(tmp_path):
    assert need(tmp_path, "01_data_parsing") == tmp_path


def test_shown_is_relative_to_the_project_or_the_name_alone(tmp_path):
    assert files.shown(files.ROOT / "data" / "x" / "infos.json") == "data/x/infos.json"
    assert files.shown(tmp_path / "infos.json") == "infos.json"


@pytest.mark.parametrize("dataset", ["clicks", "some/where/clicks", "/tmp/clicks", "clicks.zip"])
def test_data_dir_is_known_by_the_name_of_the_source(tmp_path, dataset):
    assert files.data_dir(dataset, tmp_path) == tmp_path / "data" / "clicks"
    assert (tmp_path / "data" / "clicks").is_dir()


@pytest.mark.parametrize("dataset", ["", ".", "..", "a/..", ".zip", "/"])
def test_data_set_without_a_name_is_refused(tmp_path, dataset):
    with pytest.raises(DataError, match="has no name"):
        files.data_dir(dataset, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_figures_of_other_data_sets_stay_out_of_res(tmp_path):
    assert files.res_dir("ml-100k", tmp_path) == tmp_path / "res"
    assert files.res_dir("ml-20m", tmp_path) == tmp_path / "data" / "ml-20m" / "res"


def test_chosen_dataset_follows_the_environment(monkeypatch):
    monkeypatch.setenv("RECNN_DATASET", "ml-20m")
    assert files.chosen_dataset() == "ml-20m"
    monkeypatch.setenv("RECNN_DATASET", "")
    assert files.chosen_dataset() == "ml-100k"


def test_vectors_come_back_with_their_ids_order_and_dtype(tmp_path):
    vectors = {7: np.arange(3, dtype=np.float32), 2: np.array([[1.0, 2.0], [3.0, 4.0]]).T}
    write_vectors(tmp_path / "v.p", vectors)
    back = read_vectors(tmp_path / "v.p")
    assert list(back) == [7, 2]
    for item_id, vector in vectors.items():
        assert back[item_id].dtype == vector.dtype
        np.testing.assert_array_equal(back[item_id], vector)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_vectors_of_other_numpy_versions_and_pickle_protocols_are_read(tmp_path, protocol, module):
    content = pickle.dumps({1: np.arange(3, dtype=np.float32)}, protocol=protocol)
    if protocol == 3:  # the one protocol with bytes whose module names carry no length
        content = content.replace(b"numpy._core", module)
    (tmp_path / "v.p").write_bytes(content)
    np.testing.assert_array_equal(read_vectors(tmp_path / "v.p")[1], [0, 1, 2])


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {1: evil},
                                  lambda evil: {1: np.array([evil], dtype=object)}])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickle_that_would_run_a_command_is_refused_and_does_not_run(tmp_path, wrap, protocol):
    made = tmp_path / "made"
    (tmp_path / "v.p").write_bytes(pickle.dumps(wrap(Evil(os.system, f"touch {made}")), protocol=protocol))
    with pytest.raises(DataError, match=r"dicts and numpy arrays alone.*asks for"):
        read_vectors(tmp_path / "v.p")
    assert not made.exists()


@pytest.mark.parametrize("call", [(eval, "1"), (getattr, dict, "keys"), (np.load, "x"), (print, "x")])
def test_other_callables_are_refused(tmp_path, call):
    (tmp_path / "v.p").write_bytes(pickle.dumps({1: Evil(*call)}))
    with pytest.raises(DataError, match="asks for"):
        read_vectors(tmp_path / "v.p")


@pytest.mark.parametrize("value", [[1, "a"], "text", {1: "text"}, {1: [0.5]}])
def test_pickle_of_something_else_than_vectors_is_refused(tmp_path, value):
    (tmp_path / "v.p").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError):
        read_vectors(tmp_path / "v.p")


def test_truncated_pickle_is_damaged_wherever_it_is_cut(tmp_path):
    write_vectors(tmp_path / "v.p", {1: np.arange(4, dtype=np.float32)})
    content = (tmp_path / "v.p").read_bytes()
    for end in range(len(content)):
        (tmp_path / "cut.p").write_bytes(content[:end])
        with pytest.raises(DataError, match=r"cut.p is damaged"):
            read_vectors(tmp_path / "cut.p")


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip", b"\x80\x04\x8c\x02\xff\xff.", b"<html>404</html>", b"I1x\n.",
                                     b"\x80\x04K\x01K\x02a.", b"\x80\x04h\x05."])
def test_bytes_that_are_no_pickle_are_damaged(tmp_path, content):
    (tmp_path / "v.p").write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)v.p is damaged .* run notes/02_embeddings.ipynb"):
        read_vectors(tmp_path / "v.p")


def test_only_one_process_writes_an_artefact(tmp_path):
    path = tmp_path / "a.txt"
    program = ("import sys; from pathlib import Path; from helpers.files import writing\n"
               "with writing(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(DataError, match=f"a.txt is being written by process {other.pid} "), files.writing(path, wait=0):
        pass
    other.kill()
    other.communicate()
    with files.writing(path, wait=0), files.replacing(path) as beside:  # a killed writer keeps nobody out
        beside.write_text("whole")
    assert [part.name for part in tmp_path.iterdir()] == ["a.txt"]
