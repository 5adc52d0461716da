"""Figures that more than one lesson draws: arrays in, `Figure` out."""

from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

from helpers.files import replacing


def save(figure: Figure, path: Path, dpi: int = 90) -> None:
    """Write a figure as a PNG of 256 colours, so that a code host shows it at once."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with replacing(path) as beside:
        beside.write_bytes(few_colours(drawn.getvalue()))


def few_colours(png: bytes) -> bytes:
    """Return the same picture in 256 colours of its own: a third of the bytes, and the eye sees no difference."""
    picture, small = Image.open(BytesIO(png)).convert("RGBA"), BytesIO()
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    flat.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return min(png, small.getvalue(), key=len)


def curves(log: pd.DataFrame, panels: dict[str, dict[str, str]], columns: int = 2) -> Figure:
    """Draw logged scalars against the training step (or pass), raw and faint under the running mean of 10 rows.

    `log` is indexed by step, or by pass, one column a scalar; `panels` are axis label → {column: legend}.
    """
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, (label, series) in zip(axes.flat, panels.items(), strict=False):
        for number, (column, legend) in enumerate(series.items()):
            values = log[column].dropna()
            few = len(values) <= 30
            axis.plot(values.index, values, color=f"C{number}", alpha=1 if few else 0.25, marker="." if few else "")
            smoothed = values if few else running_mean(values, 10)
            axis.plot(smoothed.index, smoothed, color=f"C{number}", label=legend)
        axis.set(xlabel=log.index.name if log.index.name == "pass" else "training step", ylabel=label)
        axis.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    return figure


def running_mean(values: pd.Series, n: int) -> pd.Series:
    """Return the mean of about n values around each, of as many after it as before: near an end of fewer.

    >>> running_mean(pd.Series([9.0, 1.0, 2.0, 3.0, 8.0]), 5).tolist()
    [9.0, 4.0, 4.6, 4.333333333333333, 8.0]
    """
    place, total = np.arange(len(values)), np.append(0, values.cumsum())
    half = np.minimum(n // 2, np.minimum(place, place[::-1]))
    return pd.Series((total[place + half + 1] - total[place - half]) / (2 * half + 1), values.index)


def heat_maps(matrices: dict[str, np.ndarray], label: str, columns: int = 4, limit: float | None = None) -> Figure:
    """Draw square matrices, title → (d, d), side by side on one symmetric scale, with one colour bar.

    `label`: what the colour means, with its unit; ± `limit`: by default the 99.5th percentile of all absolute values.
    """
    rows, columns = -(-len(matrices) // columns), min(columns, len(matrices))
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns + 0.8, 2.2 * rows), squeeze=False,
                                layout="constrained")
    if limit is None:
        limit = float(np.quantile(np.abs(np.concatenate([m.ravel() for m in matrices.values()])), 0.995))
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=False):
        every = 32 * max(len(matrix) // 128, 1)  # dimensions from one tick to the next
        sns.heatmap(matrix, cmap=plt.get_cmap("RdBu_r", 15), vmin=-limit, vmax=limit, square=True, cbar=False,
                    rasterized=True, xticklabels=every, yticklabels=every, ax=axis)
        axis.set_title(title, fontsize="medium")
        axis.set(xlabel="dimension", ylabel="dimension")
        axis.tick_params(labelsize="small", rotation=0)
    for axis in axes.flat[len(matrices):]:
        axis.set_visible(False)
    figure.colorbar(axes[0, 0].collections[0], ax=axes, label=label, shrink=0.8, extend="both")
    return figure
