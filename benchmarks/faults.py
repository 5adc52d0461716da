"""Put one-line faults into a copy of the code, and say which of them the tests notice: `python -m benchmarks.faults`.

A fault that no test notices is a test that is missing; of these 25 all are noticed. Some ten minutes.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.files import PROJECT

# file, what stands there, the fault in its place, tests that should notice
FAULTS = [
    ("agents/ddpg.py", "return reward + gamma * next_q", "return reward + next_q", "rl_invariants"),
    ("agents/ddpg.py", 'agent["critic_target"](t.next_state, next_action)',
     'agent["critic"](t.next_state, next_action)', "rl_invariants"),
    ("agents/ddpg.py", "loss = -value_weight * value", "loss = value_weight * value", "rl_invariants"),
    ("agents/serving.py", "score = z if beta == torch.inf else log_p.gather(1, candidates) + beta * z",
     "score = z if beta == torch.inf else log_p.gather(1, candidates) - beta * z", "recommenders service"),
    ("agents/d4pg.py", "-value_weight * q.mean()", "value_weight * q.mean()", "d4pg rl_invariants"),
    ("agents/d4pg.py", "l_z = (weights[:, 0].to(surprise.device) * surprise).mean()", "l_z = surprise.mean()", "d4pg"),
    ("agents/rainbow.py", 'agent["actor" if double else "actor_target"]', 'agent["actor_target"]', "rainbow"),
    ("losses.py", "w = real * decay **", "w = real * (1 + decay) **", "losses"),
    ("losses.py", "discount = gamma ** m[:, None].to(", "discount = gamma * (m[:, None] ** 0).to(", "d4pg losses"),
    ("losses.py", "to_upper = b - lower", "to_upper = 1 - (b - lower)", "d4pg losses"),
    ("replay.py", "** -self.beta", "** -1.0", "replay"),
    ("replay.py", "self.tree[node] = (size + self.epsilon) ** self.alpha", "self.tree[node] = size + self.epsilon",
     "replay"),
    ("training.py", "proto_action.var(dim=0", "proto_action.var(dim=1", "training"),
    ("training.py", "if shuffle_ties and (step - 1) % per_pass == 0:", "if shuffle_ties and step == first:",
     "training"),
    ("features.py", '(of_item["size"] + damping)', '(of_item["size"] + 10 * damping)', "features liking"),
    ("networks.py", "nn.Dropout(dropout), nn.Linear(hidden_size, size)", "nn.Linear(hidden_size, size)", "networks"),
    ("networks.py", "kept = torch.rand_like(rating) >= share", "kept = torch.rand_like(rating) >= 0", "networks"),
    ("plots.py", "smoothed = values if few else running_mean(values, 10)", "smoothed = values", "plots"),
    ("plots.py", "vmin=-limit, vmax=limit", "vmin=0, vmax=limit", "plots"),
    ("evaluation.py", "ranks.append((~(scores < own)).sum(dim=1).numpy())",
     "ranks.append((scores > own).sum(dim=1).numpy() + 1)", "evaluation"),
    ("evaluation.py", "np.where(hit, 1 / np.log2(1 + rank), 0)", "np.where(hit, 1 / np.log2(2 + rank), 0)",
     "evaluation"),
    ("evaluation.py", "held_out[position < k]", "held_out[position <= k]", "evaluation"),
    ("recommenders.py", "return 1 + self.rating_slope * (rating - 3)", "return 1 + self.rating_slope * rating",
     "recommenders"),
    ("frames.py", "next_state=flatten(vectors[:, 1:], rating[:, 1:])",
     "next_state=flatten(vectors[:, 1:], rating[:, :-1])", "frames"),
    ("extra/simulator.py", "felt = expected - satiation", "felt = expected + satiation", "simulator"),
]


def tested(place: Path, names: set[str], tests: set[str]) -> int:
    """Return pytest's exit code for the doctests of helpers/`names` and for `tests`, in the copy at `place`."""
    return subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                           *(f"helpers/{name}" for name in sorted(names)),
                           *(f"tests/test_{test}.py" for test in sorted(tests))], cwd=place,
                          capture_output=True).returncode


def noticed(place: Path, fault: tuple[str, str, str, str]) -> bool:
    """Tell whether the tests fail with a fault in the copy at `place`, which is mended again."""
    name, right, wrong, tests = fault
    path = place / "helpers" / name
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    code = tested(place, {name}, set(tests.split()))
    path.write_text(source, encoding="utf-8")
    return code == 1  # tests failed; anything else is no answer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        shutil.copytree(PROJECT, place, ignore=shutil.ignore_patterns(".git", ".venv", ".test", "data", "__pycache__"))
        if tested(place, {name for name, *_ in FAULTS}, {test for *_, tests in FAULTS for test in tests.split()}):
            raise SystemExit("tests fail without any fault: mend them first")
        found = []
        for fault in FAULTS:
            found.append(noticed(place, fault))
            print(f"{'noticed' if found[-1] else 'MISSED ':<9}{fault[0]:<20}{fault[1].strip()[:70]}", flush=True)
    print(f"{sum(found)} of {len(FAULTS)} faults are noticed")


if __name__ == "__main__":
    main()
