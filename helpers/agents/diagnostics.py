"""What the lesson cells of notes/09_diagnostics.ipynb define; `make agents` writes it."""

from collections.abc import Callable

import torch

from helpers.losses import mean_of
from helpers.networks import POLICIES, Critic


def critic_of(checkpoint: dict) -> Callable:
    """Return what a saved agent's critic predicts: state (B, …), action (B, E) → (B, 1)."""
    parts, config, support = checkpoint["parts"], checkpoint["config"], checkpoint["meta"].get("support")
    if checkpoint["network"] == "Rainbow":
        network = POLICIES["Rainbow"](**config)
        network.load_state_dict(parts["actor_target"])
        return lambda state, action: mean_of(network.eval().logits(state, action), torch.tensor(support))
    critic = Critic(*(config[key] for key in ("frame_size", "embed_size", "hidden_size", "encoder")),
                    n_atoms=len(support) if support else 1).eval()
    critic.load_state_dict(parts["critic_target"])
    return critic if not support else lambda state, action: mean_of(critic(state, action), torch.tensor(support))
