"""Any optimizer's state goes into a checkpoint and comes out again."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from nolora_vision.training.state_parts import put_together, take_apart
from nolora_vision.training.timm_names import optimizer_problem


def optimizer_of(parameters: list[nn.Parameter], name: str) -> torch.optim.Optimizer:
    groups: Any = [{"params": [p], "lr": 1e-3, "weight_decay": 1e-4} for p in parameters]
    return create_optimizer_v2(groups, opt=name, lr=1e-3)


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for _ in range(3):
        optimizer.zero_grad()
        sum((p.square() + p * torch.randn_like(p)).sum() for p in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lamb", "momentum", "adafactorbv", "lookahead_adamw", "muon", "nadamw"])
def test_an_optimizer_goes_on_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    first = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))]
    optimizer = optimizer_of(first, name)
    steps(optimizer, first, seed=1)
    tensors: dict[str, Tensor] = {}
    text = json.dumps(take_apart(optimizer.state_dict(), "optimizer", tensors), allow_nan=False)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    kept = {name: value.detach().clone() for name, value in tensors.items()}
    other = optimizer_of(second, name)
    other.load_state_dict(put_together(json.loads(text), kept.__getitem__))
    steps(optimizer, first, seed=2)
    steps(other, second, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_json_has_no_word_for_comes_back() -> None:
    value = {"a": (1, [2.5, None]), 3: {"x": torch.ones(2)}, "kind": torch.bfloat16, "list": [torch.zeros(1)]}
    tensors: dict[str, Tensor] = {}
    back = put_together(json.loads(json.dumps(take_apart(value, "o", tensors))), tensors.__getitem__)
    assert back["a"] == (1, [2.5, None]) and back["kind"] is torch.bfloat16 and list(tensors) == ["o/3/x", "o/list/0"]
    assert torch.equal(back[3]["x"], torch.ones(2)) and torch.equal(back["list"][0], torch.zeros(1))
    bad: Callable[[], None] = lambda: None  # noqa: E731
    with pytest.raises(TypeError, match="o/f is function, which a checkpoint cannot hold"):
        take_apart({"f": bad}, "o", {})


def test_an_optimizer_that_wants_second_derivatives_is_refused() -> None:
    assert "adahessian" in list_optimizers()
    assert "wants second derivatives" in (optimizer_problem("adahessian") or "")
    assert optimizer_problem("lookahead_adamw") is None
