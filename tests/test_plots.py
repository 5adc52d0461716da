from io import BytesIO

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import plots

matplotlib.use("agg")


def test_curves_draw_what_was_logged_at_its_steps_faint_under_its_running_mean():
    step = np.arange(100) * 5
    log = pd.DataFrame({"loss": np.arange(100.0) ** 2, "other": -np.arange(100.0)}, index=step)
    log["rare"] = [i / 10 if i % 25 == 0 else np.nan for i in range(100)]
    figure = plots.curves(log, {"loss (nats)": {"loss": "training", "other": "held out"}, "score": {"rare": "valid"},
                                "none": {"rare": "again"}})
    dense, sparse, third, spare = figure.axes
    assert third.get_visible() and not spare.get_visible()
    assert [line.get_label() for line in dense.lines[1::2]] == ["training", "held out"]
    for raw, smooth, values in zip(dense.lines[::2], dense.lines[1::2], (log["loss"], log["other"]), strict=True):
        assert raw.get_color() == smooth.get_color() and raw.get_alpha() < 0.5 and not smooth.get_alpha()
        np.testing.assert_array_equal(raw.get_xydata(), np.c_[step, values])
        np.testing.assert_array_equal(smooth.get_xdata(), step)
        for middle, mean in ((50, values.iloc[45:56].mean()), (2, values.iloc[:5].mean()), (0, values.iloc[0])):
            assert smooth.get_ydata()[middle] == pytest.approx(mean)
    for line in sparse.lines:  # few points are drawn as they are; steps that did not log it are left out
        np.testing.assert_array_equal(line.get_xydata(), [[0, 0], [125, 2.5], [250, 5], [375, 7.5]])


@pytest.mark.parametrize(("limit", "ends"), [(2, 2), (None, 3)])
def test_heat_maps_draw_each_matrix_upright_on_one_symmetric_scale_with_one_colour_bar(limit, ends):
    matrices = {"a": np.arange(4.0).reshape(2, 2) - 3, "b": np.ones((128, 128)), "c": np.eye(2)}
    if limit is None:
        matrices["b"] = np.full((2, 2), -3.0)
    figure = plots.heat_maps(matrices, "covariance", columns=2, limit=limit)
    *maps, spare, _ = figure.axes  # the last is the colour bar
    assert [axis.get_title() for axis in maps] == ["a", "b", "c"] and not spare.get_visible()
    for axis, matrix in zip(maps, matrices.values(), strict=True):
        mesh, = axis.collections
        np.testing.assert_array_equal(np.ravel(mesh.get_array()), matrix.ravel())
        assert mesh.get_clim() == pytest.approx((-ends, ends)) and axis.get_aspect() == 1
        assert axis.yaxis_inverted() and not axis.xaxis_inverted()  # the diagonal falls
        assert mesh.get_cmap()(0.0)[2] > 0.3 > mesh.get_cmap()(0.0)[0]  # blue is below zero
    matrix = np.zeros((100, 100))
    matrix[0, :60] = -1.0   # more than the 0.5 % beyond its ends
    matrix[1, :10] = 50.0
    mesh, = plots.heat_maps({"": matrix}, "").axes[0].collections
    assert mesh.get_clim() == (-1, 1)  # the default scale leaves out a few extremes


def test_a_saved_figure_has_the_same_picture_in_256_colours_on_white(tmp_path):
    figure, axis = plt.subplots()
    axis.imshow(np.random.default_rng(0).normal(size=(40, 40)).cumsum(axis=0), cmap="viridis")
    figure.savefig(tmp_path / "all.png", dpi=100)
    plots.save(figure, tmp_path / "few.png", dpi=100)
    everything, few = (Image.open(tmp_path / f"{name}.png") for name in ("all", "few"))
    assert few.mode == "P" and few.size == everything.size
    off = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(everything.convert("RGB"), int))
    assert off.mean() < 2 and np.quantile(off, 0.99) < 16
    assert (tmp_path / "few.png").stat().st_size < (tmp_path / "all.png").stat().st_size
    clear, png = Image.new("RGBA", (80, 80), (0, 0, 0, 0)), BytesIO()
    clear.save(png, "png", compress_level=0)
    assert np.asarray(Image.open(BytesIO(plots.few_colours(png.getvalue()))).convert("RGB")).min() == 255
