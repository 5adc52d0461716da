import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from helpers.frames import Frames


@pytest.fixture
def raw(tmp_path):
    """Return a function that writes {name: text or bytes} to a new folder of raw files."""
    def write(files: dict[str, str | bytes]) -> Path:
        folder = tmp_path / f"raw{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder
    return write


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("RECNN_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("there is no Chromium here: `apt-get install chromium`, or set RECNN_CHROMIUM to the path of one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def item_ids():
    return np.array([50, 10, 40, 20, 30])


@pytest.fixture
def item_matrix():
    return np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


@pytest.fixture
def ratings():
    """Logs of 6, 3, 2 and 4 ratings; every (user, timestamp) is distinct."""
    logs = {1: [(10, 4.0), (20, 0.5), (30, 5.0), (10, 2.5), (40, 3.0), (50, 1.5)],
            2: [(30, 1.0), (50, 4.5), (20, 3.5)],
            5: [(20, 2.0), (40, 5.0)],
            7: [(50, 3.0), (40, 4.0), (30, 2.0), (20, 0.5)]}
    rows = [(user, item, rating, 100 * step) for user, log in logs.items() for step, (item, rating) in enumerate(log)]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])


@pytest.fixture
def frames(ratings, item_ids, item_matrix):
    return Frames(ratings, item_ids, item_matrix, frame_size=2)


@pytest.fixture
def twenty_users():
    """Return transitions of 20 users with 15 ratings each, of 12 items: what agents are checked on."""
    rng = np.random.default_rng(0)
    n = 20 * 15  # users times ratings
    ratings = pd.DataFrame({"user_id": np.repeat(np.arange(20), 15), "item_id": rng.integers(12, size=n),
                            "rating": rng.integers(1, 11, size=n) / 2, "timestamp": np.arange(n)})
    return Frames(ratings, np.arange(12), rng.normal(size=(12, 6)).astype(np.float32), frame_size=3)
