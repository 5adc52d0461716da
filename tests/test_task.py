import numpy as np
import pandas as pd
import pytest

from helpers import datasets, evaluation, features, files, task


@pytest.fixture
def home(tmp_path, monkeypatch, raw):
    """Return the folder of a small data set whose lessons 01 and 03 have been run."""
    rng = np.random.default_rng(0)
    rows = [(user, int(item), int(rng.integers(1, 6)), 1_000 * step)
            for user in range(1, 41) for step, item in enumerate(rng.permutation(30)[:20])]
    table = pd.DataFrame(rows, columns=["userId", "movieId", "rating", "timestamp"])
    table["movieId"] += 1
    movies = "movieId,title,genres\n" + "".join(f"{i},Film {i} (1990),Comedy\n" for i in range(1, 31))
    folder = raw({"ratings.csv": table.to_csv(index=False), "movies.csv": movies})
    monkeypatch.setattr(task, "data_dir", lambda dataset: files.data_dir(dataset, tmp_path))
    home = files.data_dir(str(folder), tmp_path)
    features.write_item_matrix(home / "embeddings.npz", np.arange(1, 31), rng.normal(size=(30, 4)).astype(np.float32))
    infos = features.catalogue_infos(datasets.read_items(folder), pd.Series(range(1, 31)))
    features.write_infos(home / "infos.json", infos)
    return folder


def test_nothing_held_out_is_trained_on_and_the_longer_history_has_validation_alone(home, tmp_path):
    t = task.load_task(str(home), frame_size=5)
    assert len(t.split.test) == len(t.split.valid) == 40
    assert len(t.frames.item_idx) + len(t.apart.item_idx) == len(t.split.train) == len(t.history.item_idx) == 40 * 18
    assert len(t.longer_history.item_idx) == 40 * 19
    assert len(evaluation.together(t.split.train, t.split.valid, t.split.test)) == 800
    t = task.load_task(str(home), frame_size=5, share_apart=0.2)  # users kept apart are in no transition trained on
    assert len(t.apart.user_ids) == 8 and not set(t.apart.user_ids) & set(t.frames.user_ids)
    assert set(t.apart.user_ids) | set(t.frames.user_ids) == set(t.history.user_ids)
    (tmp_path / "data" / home.name / "embeddings.npz").unlink()
    with pytest.raises(FileNotFoundError, match="03_pca"):
        task.load_task(str(home), frame_size=5)


def test_watched_states_are_always_the_same_and_of_users_kept_apart(home):
    t, timed = (task.load_task(str(home), frame_size=5, times=times) for times in (False, True))
    assert timed.watched().state.shape[1] == t.watched().state.shape[1] + 5  # they end with gaps when asked to
    assert timed.history.gap is not None and t.history.gap is None
    assert (t.watched().state == t.watched().state).all()
    assert len(t.watched().state) == len(t.apart)
    assert len(t._replace(ids=np.arange(1 << 22), apart=t.frames).watched().state) == 128


def test_a_small_data_set_is_passed_over_a_few_times(home):
    t = task.load_task(str(home), frame_size=5)
    batch = len(t.frames) // 2 + 1  # two steps a pass
    assert t.n_steps(800, batch, passes=6, least=5) == 12
    assert t.n_steps(800, batch, passes=6) == 60 and t.n_steps(8, batch, passes=6) == 8


def test_of_many_users_some_are_judged_by_and_all_are_learnt_from(home, capsys):
    n_items = len(task.load_task(str(home), frame_size=5).ids)
    t, again = (task.load_task(str(home), frame_size=5, most_scores=15 * n_items) for _ in range(2))
    assert "with 15 of 40 users" in capsys.readouterr().out
    assert len(t.split.test) == 15 and set(t.split.test["user_id"]) == set(t.split.valid["user_id"])
    pd.testing.assert_frame_equal(t.split.test, again.split.test)
    assert len(t.history.item_idx) == 40 * 18 and len(t.longer_history.item_idx) == 40 * 19


def test_a_sentence_that_does_not_hold_is_printed_and_stops_only_whoever_is_strict(monkeypatch, capsys):
    monkeypatch.delenv("RECNN_STRICT", raising=False)
    for dataset in ("ml-100k", "clicks"):
        task.text_says(dataset, "it ranks above 0.11", 0.05, 0.05 > 0.11)
        task.text_says(dataset, "it ranks below 0.11", 0.05, 0.05 < 0.11)
    assert capsys.readouterr().out == "The text says: it ranks above 0.11. Here it is 0.050.\n"  # of ML-100K alone
    monkeypatch.setenv("RECNN_STRICT", "1")
    with pytest.raises(AssertionError, match="Here it is"):
        task.text_says("ml-100k", "it ranks above 0.11", 0.05, False)
