"""Which parameters train, at which rate and decay."""

import pytest
import timm
import torch
from torch import nn

import nolora_vision
from nolora_vision import adapter_parameters, head_parameters, param_groups

THETA = {
    "identity": set(),
    "swish": {"beta"},
    "residual_tanh": {"mix", "slope"},
    "rational": {"linear", "square", "pole"},
    "aurora": {"mixer", "spline"},
}


@pytest.mark.parametrize(("nonlinearity", "theta"), THETA.items())
def test_groups_hold_everything_that_trains_once(nonlinearity: str, theta: set[str]) -> None:
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
    assert {names[id(p)] for p in groups["adapter_no_decay"]["params"]} == {"v", "gate_bias", *theta}
    assert {names[id(p)] for p in groups["head"]["params"]} == {"weight"}


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


def test_a_step_moves_what_is_in_the_groups_and_nothing_else() -> None:
    model = nolora_vision.inject(timm.create_model("test_vit", num_classes=7), modulation="vector")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(model, lr=0.5, head_lr=0.0, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that decay alone moves anything
    optimizer.step()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora_A"}  # lora_B is still 0
    decayed = model.get_parameter("blocks.0.attn.qkv.adapter.lora_A")
    torch.testing.assert_close(decayed, before["blocks.0.attn.qkv.adapter.lora_A"] * (1 - 0.5 * 0.1))


LISTED = {f"layers.0.blocks.0.attn.{name}" for name in ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight")}


def test_what_no_one_decays_in_the_backbone() -> None:
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=7, embed_dim=32, depths=(1,), num_heads=(1,))
    model.no_weight_decay = lambda: LISTED  # timm's own, but timm 1.0.29 names modules there and no parameters
    groups = {g["name"]: {id(p) for p in g["params"]} for g in param_groups(model, lr=1.0, weight_decay=0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    assert set(names.values()) >= LISTED
    decayed = {names[i] for i in groups["backbone"]}
    assert "layers.0.blocks.0.attn.qkv.weight" in decayed and "patch_embed.proj.weight" in decayed
    assert not decayed & LISTED
    spared = {names[i] for i in groups["backbone_no_decay"]}
    assert {"layers.0.blocks.0.norm1.weight", "layers.0.blocks.0.mlp.fc1.bias"} <= spared


def test_every_head_counts() -> None:
    with torch.device("meta"):
        model = nolora_vision.inject(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7))
    assert sum(p.numel() for p in head_parameters(model)) == 2 * (192 * 7 + 7)
    own = {id(p) for p in adapter_parameters(model)}
    assert own == {id(p) for n, p in model.named_parameters() if ".adapter." in n}
    groups = {g["name"]: [id(p) for p in g["params"]] for g in param_groups(model, lr=1.0)}
    assert groups["head"] == [id(model.head.weight), id(model.head_dist.weight)]
    assert groups["head_no_decay"] == [id(model.head.bias), id(model.head_dist.bias)]
    assert not own & {id(p) for p in head_parameters(model)}
    assert list(head_parameters(nn.Sequential(nn.Linear(2, 2)))) == []


def test_wrapped_models_have_the_groups_of_the_bare_one() -> None:
    bare = nolora_vision.inject(timm.create_model("test_vit", num_classes=7))
    bare.get_parameter("pos_embed").requires_grad_(True)
    wanted = param_groups(bare, lr=1.0, head_lr=2.0, weight_decay=0.1)
    assert any(
        p is bare.get_parameter("pos_embed") for g in wanted if g["name"].endswith("_no_decay") for p in g["params"]
    )
    for wrapped in (torch.compile(bare), nn.DataParallel(bare)):
        groups = param_groups(wrapped, lr=1.0, head_lr=2.0, weight_decay=0.1)
        assert [{**g, "params": list(map(id, g["params"]))} for g in groups] == [
            {**g, "params": list(map(id, g["params"]))} for g in wanted
        ]
        nolora_vision.freeze_backbone(wrapped)
        assert bare.get_classifier().weight.requires_grad and not bare.get_parameter("pos_embed").requires_grad
        bare.get_parameter("pos_embed").requires_grad_(True)
