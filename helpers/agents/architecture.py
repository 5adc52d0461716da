"""What the lesson cells of notes/00_architecture.ipynb define; `make agents` writes it."""

import inspect

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from torch import nn


def transitions_by_hand(log: pd.DataFrame, frame_size: int) -> pd.DataFrame:
    """Return the transitions of one user's log, in titles and ratings, one row each."""
    titles, ratings = list(log["title"]), list(log["rating"])
    steps = []
    for first in range(len(log) - frame_size):
        taken = first + frame_size
        steps.append({
            "state: items": titles[first:taken],
            "state: ratings": ratings[first:taken],
            "action": titles[taken],
            "reward": 2 * (ratings[taken] - 2.5),
            "next_state: items": titles[first + 1:taken + 1],
            "next_state: ratings": ratings[first + 1:taken + 1],
            "done": taken == len(log) - 1,
        })
    return pd.DataFrame(steps)


COLORS = {"item": "#cfe2f3", "weighted": "#e8f1fa", "action": "#fce5cd", "user": "#d9ead3", "reward": "#fff2cc",
          "network": "#e6dff0", "out": "#eeeeee"}


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


def discounted_return(rewards: list[float], gamma: float) -> float:
    """Return Σ γᵗ·rₜ, the discounted sum of the rewards to come."""
    return float(sum(gamma**t * reward for t, reward in enumerate(rewards)))


def make_slate(proto_action: torch.Tensor, items: torch.Tensor, seen: list[int], k: int) -> torch.Tensor:
    """Return the rows of `items` (n_items, E) with the k highest dot products, best first, seen ones excluded."""
    scores = items @ proto_action
    scores[seen] = -torch.inf
    return scores.topk(k).indices


def show_source(*classes: type) -> Markdown:
    """Show the source of classes as a block of Python."""
    source = "\n\n".join(inspect.getsource(each) for each in classes)
    return Markdown(f"```python\n{source}```")


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


ITEMS = [(f"v{i}", f"$v_{i}$  (128)", "item", "") for i in (1, 2, 3)]
RATINGS = ("r", "ratings  (3)", "reward", "")
USER = ("u", "$u$  (128)", "user", "r v1 v2 v3")
DRR_AVE = ([[RATINGS, *ITEMS], [USER, None, ("g", "$g$  (128)", "weighted", "v1 v2 v3")],
            [("ug", "$u \\odot g$  (128)", "action", "u g")]], "u ug g", "3·128 = 384")


def plain_user(encoder: nn.Module) -> nn.Module:
    """Set the map of the user's vector to the identity, W = I and b = 0."""
    with torch.no_grad():
        nn.init.eye_(encoder.user.map.weight)
        nn.init.zeros_(encoder.user.map.bias)
    return encoder
