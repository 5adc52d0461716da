"""Virtual Taobao: a world that others fitted to a shop's log, read from a reader's own copy.

Three small networks say who comes, how many of a page's ten goods are clicked, and after how many pages a visit ends.
An action is 27 numbers in [−1, 1], the weights by which the shop ranks its goods. As published, nothing that is shown
changes when a person leaves; with `repetition` people tire of pages like the ones before.

Source: Shi et al. 2019, "Virtual-Taobao"; networks: https://github.com/eyounx/VirtualTaobao, not shipped here. Leaving
by repetition is assumed, after Gao et al. 2022, "CIRS", whose people leave when shown the like of what they just saw.
"""

import pickle
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from helpers.files import DataError

GROUPS = (8, 8, 11, 11, 11, 11, 2, 2, 3, 18, 3)  # one-hot attributes of a person: 88 numbers
PERSON, ACTION, MOST_CLICKS, PAGES = sum(GROUPS), 27, 10, 100
STATE = PERSON + ACTION + 3  # and what was clicked last, how the last page ended, and which page this is
MEMORY = 0.5                 # how much the page before counts beside this one, in what a person has seen lately
SIZES = {"generator_model": (128, 128, PERSON), "leave_model": (PERSON, 128, 256, PAGES + 1),
         "action_model": (PERSON + 1 + ACTION, 128, 256, MOST_CLICKS + 11)}


class Taobao(NamedTuple):
    """The three networks, each from a row of numbers to logits."""

    person: nn.Sequential
    pages: nn.Sequential
    clicks: nn.Sequential

    def clicks_of(self, person: Tensor, page: Tensor, action: Tensor) -> Tensor:
        """Return logits (B, 21) of 0 to 10 clicks and ten ways to end a page; person (B, 88), page (B, 1), action."""
        return self.clicks(torch.cat([person, page, action], dim=1))

    def expected_clicks(self, person: Tensor, page: Tensor, action: Tensor) -> Tensor:
        """Return the mean number of clicks (B,)."""
        chances = self.clicks_of(person, page, action)[:, :MOST_CLICKS + 1].softmax(dim=1)
        return chances @ torch.arange(MOST_CLICKS + 1.0)


def read_taobao(folder: Path) -> Taobao:
    """Read the networks of a copy of the repository; DataError: there is none, or a file is damaged."""
    nets = []
    for name, sizes in SIZES.items():
        path = next(iter(sorted(Path(folder).expanduser().rglob(f"{name}.pt"))), None)
        if path is None:
            raise DataError(f"{folder}: {name}.pt of https://github.com/eyounx/VirtualTaobao is not there")
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.LeakyReLU())]
        net = nn.Sequential(*layers[:-1])
        try:
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
            raise DataError(f"{path} is not the network of Virtual Taobao: {error}") from error
        nets.append(net.eval().requires_grad_(False))
    return Taobao(*nets)


class Visits:
    """Visits of people who come at the same time, and see a page each at every step.

    here (B,) bool: who has not left. person (B, 88). page (B, 1): pages seen. lately (B, 27): the mean of the actions
    so far, each page back counting MEMORY of the one after it.
    """

    def __init__(self, taobao: Taobao, people: int, seed: int = 0, repetition: float = 0.0):
        self.taobao, self.repetition = taobao, repetition
        self.generator = torch.Generator().manual_seed(seed)
        logits = taobao.person(torch.rand(people, SIZES["generator_model"][0], generator=self.generator))
        groups = [nn.functional.one_hot(self.draw(group), group.shape[1]) for group in logits.split(GROUPS, dim=1)]
        self.person = torch.cat(groups, dim=1).float()
        self.ends = taobao.pages(self.person).softmax(dim=1)  # (B, 101) after how many pages, if nothing wears out
        self.here, self.page = torch.ones(people, dtype=torch.bool), torch.zeros(people, 1)
        self.lately, self.answer = torch.zeros(people, ACTION), torch.zeros(people, 2)

    def draw(self, logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(dim=1), 1, generator=self.generator)[:, 0]

    @property
    def states(self) -> Tensor:
        """What an agent sees (B, 118), of numbers between −1 and 1."""
        return torch.cat([self.person, self.lately, self.answer / 10, self.page / PAGES], dim=1)

    def staying(self, action: Tensor) -> Tensor:
        """Return each one's chance (B,) to see a page more: (1 − h) to the power e^(κ·likeness).

        h: the published chance to leave after this page. κ: `repetition`. likeness: max(0, cos(action, `lately`)).
        """
        seen = self.page.long() + 1
        later = self.ends.flip(1).cumsum(dim=1).flip(1)  # [:, k]: k pages or more
        stays = later.gather(1, (seen + 1).clamp(max=PAGES)) * (seen < PAGES)
        stays = stays / torch.where(seen == 1, 1.0, later.gather(1, seen.clamp(max=PAGES))).clamp(min=1e-9)
        likeness = torch.cosine_similarity(action, self.lately, dim=1).clamp(min=0)
        return stays[:, 0] ** (self.repetition * likeness).exp()

    @torch.no_grad()
    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Show pages ranked by action (B, 27); return clicks (B,), and who leaves after them (B,) bool."""
        action = action.clamp(-1, 1)
        logits = self.taobao.clicks_of(self.person, self.page, action).split((MOST_CLICKS + 1, 10), dim=1)
        self.answer = torch.stack([self.draw(one) for one in logits], dim=1).float()
        left = self.here & (torch.rand(len(action), generator=self.generator) >= self.staying(action))
        clicks = self.answer[:, 0] * self.here
        self.here, self.page = self.here & ~left, self.page + 1
        self.lately = MEMORY * self.lately + (1 - MEMORY) * action
        return clicks, left


class Shop(gymnasium.Env):
    """One person after another, for any agent that speaks Gymnasium: "recnn/Taobao-v0".

    Action: Box (27,). Observation: Box (118,), `Visits.states`. Reward: clicks, 0 to 10. Terminated: the person left.
    """

    def __init__(self, taobao: Taobao, repetition: float = 0.0):
        self.taobao, self.repetition = taobao, repetition
        self.observation_space = gymnasium.spaces.Box(-1, 1, (STATE,), dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTION,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.visits = Visits(self.taobao, 1, int(self.np_random.integers(1 << 31)), self.repetition)
        return self.visits.states[0].numpy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        clicks, left = self.visits.step(torch.as_tensor(action, dtype=torch.float32)[None])
        return self.visits.states[0].numpy(), float(clicks), bool(left), False, {}


gymnasium.register("recnn/Taobao-v0", entry_point=Shop)
