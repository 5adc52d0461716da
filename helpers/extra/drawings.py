"""Boxes and arrows: what lessons 00 and 00b draw of logs, networks and the series."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

COLORS = {"item": "#cfe2f3", "weighted": "#e8f1fa", "action": "#fce5cd", "user": "#d9ead3", "reward": "#fff2cc",
          "network": "#e6dff0", "out": "#eeeeee"}
POLICY = {"state:\n$F$ items\nand ratings": "item", "encoder": "network", "actor $\\pi$": "network",
          "proto-\naction:\n$E$ numbers": "action", "dot product\nwith the\ncatalogue": "out",
          "slate:\ntop $k$\nunseen": "action", "user": "user"}
BESIDE = {(7.2, 1.36): "next state: the item taken and its rating enter the frame", (10.22, -2.12): "learns from",
          (2.5, -1.1): "state, through\nits own encoder", (5.78, -1.2): "which way is\n$Q$ higher?",
          (7.65, -1.2): "action", (14.2, -1.4): "rating"}
ITEMS = [(f"v{i}", f"$v_{i}$  (128)", "item", "") for i in (1, 2, 3)]
RATINGS = ("r", "ratings  (3)", "reward", "")
USER = ("u", "$u$  (128)", "user", "r v1 v2 v3")
DRR_AVE = ([[RATINGS, *ITEMS], [USER, None, ("g", "$g$  (128)", "weighted", "v1 v2 v3")],
            [("ug", "$u \\odot g$  (128)", "action", "u g")]], "u ug g", "3·128 = 384")
SERIES: dict[str, dict[str, tuple[float, float]]] = {
    "out": {"00\narchitecture": (0, 3), "00b\nencoders": (3, 3)},
    "item": {"01\ndata parsing": (0, 0), "02\nembeddings": (3, 1.3), "03\nPCA": (6, 0), "04\nframes": (9, 0)},
    "user": {"05\nDDPG": (12, 0), "05b\nserving": (15, 0), "06\nD4PG": (18.6, 2.1), "07\nRainbow": (18.6, 0.7),
             "08\nODE": (18.6, -0.7), "14\nwhole log": (18.6, -2.1)},
    "reward": {"09\ndiagnostics": (22.2, 1.6), "10\nevaluation": (22.2, 0), "10b\noff-policy\nestimates": (22.2, -1.6)},
    "action": {"11 ship\n(Practice)": (15, -3), "12 your data\n(Practice)": (0, -3),
               "13 many\nmachines\n(Practice)": (12, -3)},
    "network": {"15\nforesight": (3, -3), "16\nREINFORCE": (6, -3), "17\nestimates": (9, -3)}}
ROUTES = [[(1.15, 3), (1.85, 3)], [(4.15, 3), (12, 3), (12, 0.45)], [(0.5, 0.45), (1.85, 1.3)],
          [(1.15, 0), (4.85, 0)], [(-0.6, 0.45), (-0.6, 2.15), (9, 2.15), (9, 0.45)], [(4.15, 1.3), (5.5, 0.45)],
          [(7.15, 0), (7.85, 0)], [(10.15, 0), (10.85, 0)], [(13.15, 0), (13.85, 0)], [(15, -0.45), (15, -2.55)],
          *([(6, -0.45), (6, -1.7), (x, -1.7), (x, -2.55)] for x in (3, 9, 12)), [(6, -1.7), (6, -2.55)],
          *([(16.15, 0), (16.8, 0), (16.8, y), (17.45, y)] for y in (2.1, 0.7, -0.7, -2.1)),
          *([(19.75, y), (20.4, y), (20.4, 0), (21.05, 0)] for y in (2.1, 0.7, -0.7)),
          *([(20.4, 0), (20.4, y), (21.05, y)] for y in (1.6, -1.6)),
          [(15, 0.45), (15, 3), (20.4, 3), (20.4, 0), (21.05, 0)],
          *([(3, -3.45), (3, -3.9), (x, -3.9), (x, -3.45)] for x in (6, 9))]
PASSED = {(8, 3.17): "encoders, by name", (0.75, 1.1): "infos", (3, 0.17): "ratings, infos", (6, 2.32): "ratings",
          (5.95, 1.0): "text vectors", (7.5, 0.65): "item matrix", (10.5, 0.65): "transitions",
          (13.5, 0.65): "agents", (17.7, 3.17): "policies", (16.25, 0.65): "cases", (15.55, -1.4): "policy",
          (8.2, -1.5): "item matrices, infos, texts", (4.5, -3.7): "world"}


def sheet(width: float, height: float, xlim: tuple[float, float], ylim: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return an empty figure, width by height inches, to draw on."""
    fig, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=xlim, ylim=ylim)
    ax.axis("off")
    plt.close(fig)
    return fig, ax


def box(ax: Axes, x: float, y: float, text: str, kind: str, width: float = 1.7, height: float = 0.7) -> None:
    """Draw a labelled box centred at (x, y)."""
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, edgecolor="0.35",
                                facecolor=COLORS[kind], boxstyle="round,pad=0,rounding_size=0.1"))
    ax.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(ax: Axes, *corners: tuple[float, float], dashed: bool = False) -> None:
    """Draw an arrow from corner to corner."""
    ax.add_patch(FancyArrowPatch(path=Path(corners), arrowstyle="-|>", mutation_scale=11, color="0.35",
                                 linestyle="--" if dashed else "-"))


def draw_log(log: pd.DataFrame, frame_size: int) -> Figure:
    """Draw the log and, under it, each of its transitions."""
    n_steps, right = len(log) - frame_size, 1.9 * len(log)
    fig, ax = sheet(9.5, 0.9 * (n_steps + 1), (-3.3, right + 1), (-n_steps - 0.5, 0.5))
    ax.text(-1.1, 0, "log, in order of time", ha="right", va="center")
    for place, (title, rating) in enumerate(zip(log["title"], log["rating"], strict=True)):
        box(ax, 1.9 * place, 0, f"{title}\n{rating} ★", "out")
        for step in range(max(place - frame_size, 0), min(place + 1, n_steps)):
            taken = place == step + frame_size
            box(ax, 1.9 * place, -step - 1, title, "action" if taken else "item", height=0.55)
            if taken:
                ax.text(-1.1, -step - 1, f"transition {step}", ha="right", va="center")
                box(ax, right, -step - 1, f"reward {2 * (rating - 2.5):+.0f}".replace("-", "−"), "reward", height=0.55)
    return fig


def draw_actor_critic() -> Figure:
    """Draw who hands what to whom."""
    fig, ax = sheet(10.8, 4.2, (-1.1, 15.5), (-2.8, 1.7))
    for place, (text, kind) in enumerate(POLICY.items()):
        box(ax, 2.4 * place, 0, text, kind, width=1.9, height=1.1)
        if place:
            arrow(ax, (2.4 * place - 1.45, 0), (2.4 * place - 0.95, 0))
    box(ax, 6, -2.3, "critic:  state, action → $Q$, the return to expect", "network", width=6.8, height=0.8)
    box(ax, 12, -2.3, "reward", "reward", width=1.9, height=0.8)
    for corners in ([(14.4, 0.55), (14.4, 1.2), (0, 1.2), (0, 0.55)], [(0, -0.55), (2.6, -2.2)],
                    [(7.2, -0.55), (7.2, -1.9)], [(14.4, -0.55), (12.95, -2.1)], [(11.05, -2.3), (9.4, -2.3)]):
        arrow(ax, *corners)
    arrow(ax, (4.8, -1.9), (4.8, -0.55), dashed=True)
    for (x, y), text in BESIDE.items():
        ax.text(x, y, text, ha="center", va="center", fontsize=9)
    return fig


def draw_encoder(columns: list[list], to_bar: str, bar: str) -> Figure:
    """Draw columns of boxes (name, label, kind, names of what it is made of), or None for a gap, ending in a bar."""
    rows, right, place = max(map(len, columns)), 2.6 * len(columns) - 0.4, {}
    fig, ax = sheet(2.2 * len(columns) + 1.2, 0.62 * rows + 0.3, (-1, right + 0.45), (-rows / 2, rows / 2))
    for x, column in enumerate(columns):
        for row, (name, label, kind, parts) in ((row, entry) for row, entry in enumerate(column) if entry):
            place[name] = 2.6 * x, (len(column) - 1) / 2 - row
            box(ax, *place[name], label, kind, height=0.72)
            for part in parts.split():
                arrow(ax, (place[part][0] + 0.85, place[part][1]), (2.6 * x - 0.85, place[name][1]))
    for x, y in (place[name] for name in to_bar.split()):
        arrow(ax, (x + 0.85, y), (right - 0.35, y))
    box(ax, right, 0, "", "out", width=0.7, height=rows - 0.1)
    ax.text(right, 0, bar, rotation=90, ha="center", va="center")
    return fig


def draw_series() -> Figure:
    """Draw which lesson feeds which."""
    fig, ax = sheet(13.5, 5.8, (-1.25, 23.45), (-4, 3.55))
    for kind, lessons in SERIES.items():
        for text, (x, y) in lessons.items():
            box(ax, x, y, text, kind, width=2.3, height=0.9)
    for corners in ROUTES:
        arrow(ax, *corners)
    for (x, y), text in PASSED.items():
        ax.text(x, y, text, ha="center", va="center", fontsize=9)
    return fig
