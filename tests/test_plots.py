import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers import plots

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_curves_draw_raw_faint_under_the_mean_and_label_the_axes():
    log = pd.DataFrame({"loss": np.arange(100.0), "rare": [0.5 if i % 25 == 0 else np.nan for i in range(100)]})
    figure = plots.curves(log, {"loss (nats)": {"loss": "training"}, "score": {"rare": "valid"}})
    dense, sparse = figure.axes
    assert dense.get_xlabel() == "training step" and dense.get_ylabel() == "loss (nats)"
    raw, smooth = dense.lines
    assert raw.get_alpha() == 0.25 and smooth.get_label() == "training"
    assert smooth.get_ydata()[50] == pytest.approx(np.mean(np.arange(45, 55)))
    assert len(sparse.lines[0].get_xdata()) == 4, "steps that did not log it are not drawn"


def test_heat_maps_share_a_symmetric_scale_and_have_a_colour_bar():
    figure = plots.heat_maps({"a": np.diag([1.0, -3]), "b": np.zeros((4, 4))}, "covariance", limit=2)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["a", "b"]
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim() == (-2, 2)
    assert figure.axes[-1].get_ylabel() == "covariance"
