"""What the lesson cells of notes/12_your_data.ipynb define; `make agents` writes it."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers.agents import ddpg
from helpers.extra import news
from helpers.frames import Frames, Transition, reward_of, to_autocast
from helpers.losses import behaviour_loss, log_policy, mean_item, polyak, sampled_items


def rows_of(index: Tensor, frames: Frames) -> np.ndarray:
    """Return the rows of the log (B,) in which the actions of transitions at `index` (B,) were clicked."""
    return (frames.start[index.to(frames.device)].long() + frames.frame_size).cpu().numpy()


def as_the_page_was_shown(t: Transition, index: Tensor, frames: Frames, pages: news.Pages) -> Transition:
    """Return t with the states in which the readers saw the pages, none of whose clicks they had made yet."""
    return Transition(*t)._replace(state=news.states_of_pages(frames, pages, rows_of(index, frames)))


def skips_beside(index: Tensor, frames: Frames, pages: news.Pages, rng: np.random.Generator) -> Tensor:
    """Return for transitions at `index` (B,) a row of the item matrix that was skipped beside the click, or −1."""
    drawn = news.draw_skipped(pages, rows_of(index, frames), rng)
    skipped = torch.as_tensor(pd.Index(frames.item_ids).get_indexer(drawn), device=frames.device)
    return skipped.masked_fill(skipped == frames.next_items(index)[:, 0], -1)  # skipped and clicked in one second


def with_skips(t: Transition, items: Tensor, skipped: Tensor) -> Transition:
    """Return t, all clicks, and after it the skips: rows `skipped` (B,) of items, −1 for none, that lead nowhere."""
    some = skipped >= 0
    stay, action = t.state[some], items[skipped[some]].to(t.action.dtype)
    reward = torch.full_like(t.reward[some], reward_of(news.SKIPPED))
    skips = Transition(stay, action, reward, stay, torch.zeros_like(reward))
    return Transition(*(torch.cat(pair) for pair in zip(t, skips, strict=True)))


def news_update(agent: dict, frames: Frames, index: Tensor, *, pages: news.Pages, rng: np.random.Generator,
                gamma: float, skips: bool = True, tau: float = 0.01, decay: float = 0.7, future: int = 3) -> dict:
    """Make one step of DDPG on the clicks at `index` (B,) and the skips beside them; return what is worth logging."""
    t = to_autocast(as_the_page_was_shown(frames.gather(index), index, frames, pages))
    both = with_skips(t, frames.items, skips_beside(index, frames, pages, rng)) if skips else t
    items, next_items = sampled_items(frames.items, frames.next_items(index, future))
    l_q, _ = ddpg.critic_loss(agent, both, items, gamma, mean_item)
    ddpg.descend(agent["critic_optimiser"], l_q)
    proto_action = agent["actor"](t.state)
    value, _ = ddpg.value_term(agent, t, proto_action, items, mean_item)
    behaviour = behaviour_loss(log_policy(proto_action, items), next_items, decay)
    ddpg.descend(agent["actor_optimiser"], behaviour - value)
    for name in ("actor", "critic"):
        polyak(agent[f"{name}_target"], agent[name], tau)
    return {"loss/critic": l_q, "loss/behaviour": behaviour}
