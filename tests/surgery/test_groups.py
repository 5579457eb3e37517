"""Which parameters train, at which rate and decay."""

import pytest
import timm
import torch
from torch import nn

import nolora_vision
from nolora_vision import adapter_parameters, head_parameters, param_groups


@pytest.mark.parametrize("nonlinearity", ["swish", "rational", "aurora"])
def test_groups_hold_everything_that_trains_once(nonlinearity: str) -> None:
    model = nolora_vision.inject(timm.create_model("test_vit", num_classes=7), nonlinearity=nonlinearity)
    groups = {g["name"]: g for g in param_groups(model, lr=1.0, head_lr=3.0, weight_decay=0.1)}
    assert set(groups) == {"adapter", "adapter_no_decay", "head", "head_no_decay"}
    rates = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {
        "adapter": (1.0, 0.1),
        "adapter_no_decay": (1.0, 0.0),
        "head": (3.0, 0.1),
        "head_no_decay": (3.0, 0.0),
    }
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): n.rpartition(".")[2] for n, p in model.named_parameters()}
    assert {names[id(p)] for p in groups["adapter"]["params"]} == {"lora_A", "lora_B", "gate_weight"}
    assert {"v", "gate_bias"} <= {names[id(p)] for p in groups["adapter_no_decay"]["params"]}


def test_groups_of_a_full_model_and_of_a_head_only() -> None:
    model = timm.create_model("test_vit", num_classes=7)
    groups = {g["name"]: g for g in param_groups(model, lr=1.0)}
    assert set(groups) == {"backbone", "backbone_no_decay", "head", "head_no_decay"} and groups["head"]["lr"] == 1.0
    spared = {id(model.pos_embed), id(model.cls_token)} if model.cls_token is not None else {id(model.pos_embed)}
    assert spared <= {id(p) for p in groups["backbone_no_decay"]["params"]}
    nolora_vision.freeze_backbone(model)
    assert {g["name"] for g in param_groups(model, lr=1.0)} == {"head", "head_no_decay"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"No parameter of the model requires a gradient\. Call nolora"):
        param_groups(model, lr=1.0)


def test_optimizers_take_the_groups() -> None:
    from timm.optim import create_optimizer_v2

    model = nolora_vision.inject(timm.create_model("test_vit", num_classes=7))
    for optimizer in (
        torch.optim.AdamW(param_groups(model, lr=1e-3, head_lr=2e-3)),
        create_optimizer_v2(param_groups(model, lr=1e-3, head_lr=2e-3), opt="adamw", lr=9.0, weight_decay=9.0),
    ):
        rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
        assert rates["adapter"] == (1e-3, 0.0) and rates["head"] == (2e-3, 0.0)


def test_every_head_counts() -> None:
    with torch.device("meta"):
        model = nolora_vision.inject(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7))
    assert sum(p.numel() for p in head_parameters(model)) == 2 * (192 * 7 + 7)
    own = {id(p) for p in adapter_parameters(model)}
    assert own == {id(p) for n, p in model.named_parameters() if ".adapter." in n}
    assert not own & {id(p) for p in head_parameters(model)}
    assert list(head_parameters(nn.Sequential(nn.Linear(2, 2)))) == []
