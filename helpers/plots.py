"""Figures that more than one lesson draws: arrays in, `Figure` out."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure


def curves(log: pd.DataFrame, panels: dict[str, dict[str, str]], smooth: int = 10, columns: int = 2) -> Figure:
    """Draw logged scalars against the training step (or pass), raw and faint under their running mean.

    Args:
        log: indexed by step, or by pass, one column a scalar; NaN where a step did not log it.
        panels: axis label → {column: legend}.
        smooth: logged rows in the running mean.
    """
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, (label, series) in zip(axes.flat, panels.items(), strict=False):
        for number, (column, legend) in enumerate(series.items()):
            values = log[column].dropna()
            few = len(values) <= 3 * smooth
            axis.plot(values.index, values, color=f"C{number}", alpha=1 if few else 0.25, marker="." if few else "")
            smoothed = values if few else values.rolling(smooth, center=True, min_periods=1).mean()
            axis.plot(smoothed.index, smoothed, color=f"C{number}", label=legend)
        axis.set(xlabel=log.index.name if log.index.name == "pass" else "training step", ylabel=label)
        axis.legend(fontsize="small")
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    return figure


def heat_maps(matrices: dict[str, np.ndarray], label: str, columns: int = 4, limit: float | None = None) -> Figure:
    """Draw square matrices side by side on one symmetric scale, with one colour bar.

    Args:
        matrices: title → (d, d).
        label: what the colour means, with its unit.
        limit: ends of the scale, ± limit; by default the 99.5th percentile of all absolute values.
    """
    rows, columns = -(-len(matrices) // columns), min(columns, len(matrices))
    figure, axes = plt.subplots(rows, columns, figsize=(2.9 * columns + 0.8, 2.9 * rows), squeeze=False,
                                layout="constrained")
    if limit is None:
        limit = float(np.quantile(np.abs(np.concatenate([m.ravel() for m in matrices.values()])), 0.995))
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=False):
        every = 32 * max(len(matrix) // 128, 1)  # dimensions from one tick to the next
        sns.heatmap(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, square=True, cbar=False, rasterized=True,
                    xticklabels=every, yticklabels=every, ax=axis)
        axis.set_title(title, fontsize="medium")
        axis.set(xlabel="dimension", ylabel="dimension")
        axis.tick_params(labelsize="small", rotation=0)
    for axis in axes.flat[len(matrices):]:
        axis.set_visible(False)
    figure.colorbar(axes[0, 0].collections[0], ax=axes, label=label, shrink=0.8, extend="both")
    return figure
