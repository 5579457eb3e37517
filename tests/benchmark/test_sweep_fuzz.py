"""Hundreds of sweeps, few of them sound: each has a plan, or one message says what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from nolora_vision import ConfigError
from nolora_vision.benchmark.sweep_plan import plan, read_sweep
from nolora_vision.training.yaml_file import to_yaml
from tests.training.config_values import junk
from tests.training.test_config_fuzz import fuzz, plain

pytestmark = pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning", "ignore:Possible set")
ANY = junk()
SETTINGS: tuple[dict[str, Any], ...] = (
    *(
        {},
        {"method": "lora"},
        {"epochs": 2},
        {"adapter": {"rank": 2}},
        {"adapter.rank": 2},
        {"adapter": 3},
        {"seed": 1},
    ),
    *({"epohcs": 3}, {"epochs": 0}, {"only": {"epochs": [1]}}, {"choose": {"lr": None}}, {"choose": {"lr": [1, 2]}}),
    *({"train_on": "train_val", "keep_epoch": "last"}, {"only": {"lr": 3}}, {"lr": 1, "lr.x": 3}),
)
AXES: tuple[dict[str, Any], ...] = (
    *(
        {"epochs": [1, 2]},
        {"adapter.rank": [1, 2]},
        {"epochs": []},
        {"epochs": [0, 1]},
        {"lr": [1, 2]},
        {"a.b": [1]},
        {},
    ),
    *({"epochs": [1, 1]}, {"lr": [2, 1]}, {"lr": [0.1, 0.2], "head_lr": [1, 3]}, {"x": [1]}, {"epochs": [[1]]}),
)


@st.composite
def sweeps(draw: st.DrawFn) -> dict[Any, Any]:
    """Methods and what goes with them, here and there anything in their place."""

    def drawn(values: st.SearchStrategy[Any], odds: int) -> Any:
        return draw(ANY) if not sound and draw(st.integers(0, odds)) == 0 else draw(values)

    sound = draw(st.booleans())
    settings = st.sampled_from(SETTINGS[:5] if sound else SETTINGS)
    axes = st.sampled_from(AXES[:2] if sound else AXES)
    seeds = st.lists(st.integers(0, 9), min_size=int(sound), max_size=2, unique=sound)
    labels = ["lora", *draw(st.lists(st.sampled_from(["a", "b c"]), unique=True, max_size=2))]
    sweep: dict[Any, Any] = {"methods": {label: drawn(settings, 30) for label in labels}}
    if draw(st.booleans()):
        sweep["axes"] = drawn(axes, 20)
    if draw(st.booleans()):
        rates = st.just({"lr": [1e-3, 2e-3]}) if sound else axes
        sweep["choose"] = {
            "axes": drawn(rates, 20),
            "seeds": drawn(seeds.map(lambda own: [100 + seed for seed in own]), 20),
        }
    for name, values in (
        ("base", settings),
        ("seeds", seeds),
        ("baseline", st.sampled_from(["lora", "a"])),
        ("keep_adapters", st.booleans()),
    ):
        if draw(st.integers(0, 3)) == 0:
            sweep[name] = drawn(values, 5)
    return sweep


def test_sweeps(tmp_path: Path) -> None:
    def outcome(sweep: dict[Any, Any]) -> str:
        (tmp_path / "s.yaml").write_text(to_yaml(plain(sweep)), encoding="utf-8", errors="surrogatepass")
        try:
            tasks, _ = plan(read_sweep(tmp_path / "s.yaml"), {})
        except ConfigError as error:
            assert error.problems and all(problem.strip() for problem in error.problems) and len(str(error)) < 30_000
            return "error"
        assert tasks and len({task.name for task in tasks}) == len(tasks)
        return "config"

    fuzz(sweeps(), outcome, 500)
