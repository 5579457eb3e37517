"""Which layers get an adapter, by every way of saying it; and every refusal, with the model untouched."""

import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import nolora_vision
from nolora_vision import AdapterConfig, ConfigError, InjectionError
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.plan import plan_adapters


def vit() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("test_vit")


def planned(model: nn.Module, **settings) -> dict[str, str]:
    """Role by path."""
    return {p.site.path: p.role for p in plan_adapters(model, AdapterConfig(rank=2, **settings))}


def suffixes(model: nn.Module, **settings) -> set[str]:
    return {path.split(".", 2)[2] for path in planned(model, **settings)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"attn.qkv", "mlp.fc1", "mlp.fc2"}),
        ({"targets": "qkv"}, {"attn.qkv"}),
        ({"targets": "q"}, {"attn.qkv"}),
        ({"targets": ("k", "v")}, {"attn.qkv"}),
        ({"targets": "proj"}, {"attn.proj"}),
        ({"targets": "mlp"}, {"mlp.fc1", "mlp.fc2"}),
        ({"targets": "fc1"}, {"mlp.fc1"}),
        ({"targets": "all"}, {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        ({"targets": ("proj", "fc2")}, {"attn.proj", "mlp.fc2"}),
        ({"targets": ("attn.proj",)}, {"attn.proj"}),
        ({"targets": r".*\.(qkv|fc2)"}, {"attn.qkv", "mlp.fc2"}),
        ({"exclude": "mlp"}, {"attn.qkv"}),
        ({"exclude": ("mlp.fc1",)}, {"attn.qkv", "mlp.fc2"}),
        ({"exclude": r".*fc\d"}, {"attn.qkv"}),
        ({"targets": "all", "exclude": ("qkv", "fc1")}, {"attn.proj", "mlp.fc2"}),
        ({"targets": ("qkv",), "exclude": ("q", "k")}, {"attn.qkv"}),
        ({"targets": ("attn.qkv", "fc1")}, {"attn.qkv", "mlp.fc1"}),
        ({"targets": r"(?i).*\.FC1"}, {"mlp.fc1"}),
    ],
)
def test_targets_and_exclude(settings: dict, expected: set[str]) -> None:
    assert suffixes(vit(), **settings) == expected


def test_parts_are_named_by_what_is_adapted() -> None:
    assert set(planned(vit(), targets=("q", "v")).values()) == {"q+v"}
    assert set(planned(vit(), targets="qkv", exclude="k").values()) == {"q+v"}
    assert set(planned(vit(), targets=("q", "k", "v")).values()) == {"q+k+v"}
    assert set(planned(vit(), targets="qkv").values()) == {"qkv"}


def test_layers_count_blocks_from_both_ends() -> None:
    assert {path.split(".")[1] for path in planned(vit(), layers=(0, -1))} == {"0", "5"}
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=32, num_heads=(1, 2, 4, 8))
    blocks = {path.rsplit(".", 2)[0] for path in planned(swin, layers=(0, 2, -1))}
    assert blocks == {"layers.0.blocks.0", "layers.1.blocks.0", "layers.3.blocks.1"}


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("vit_small_patch16_18x2_224", 18, {f"blocks.0.attns.{i}.attn.qkv" for i in (0, 1)}),
        ("lowformer_b0", 7, {"stages.2.1.attn.main.1.pwise"}),
    ],
)
def test_numbered_pieces_of_a_block_are_no_blocks(name: str, count: int, first: set[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert {p.site.path for p in plan_adapters(model, AdapterConfig(rank=2, targets="qkv", layers=(0,)))} == first
    assert len({p.site.block for p in plan_adapters(model, AdapterConfig(rank=2))}) == count
    with pytest.raises(InjectionError, match=f"this model has {count} blocks"):
        planned(model, layers=(count,))


def test_rank_and_alpha_by_layer() -> None:
    settings = {
        "rank_pattern": {"mlp.fc1": 3, "qkv": 5, r"blocks\.0\..*fc2": 7},
        "alpha_pattern": {"mlp": 6.0},
        "alpha": 4.0,
    }
    configs = {p.site.path: p.config for p in plan_adapters(vit(), AdapterConfig(rank=2, **settings))}
    ranks = {path: c.rank for path, c in configs.items() if path.startswith(("blocks.0", "blocks.1"))}
    assert ranks == {
        "blocks.0.attn.qkv": 5,
        "blocks.0.mlp.fc1": 3,
        "blocks.0.mlp.fc2": 7,
        "blocks.1.attn.qkv": 5,
        "blocks.1.mlp.fc1": 3,
        "blocks.1.mlp.fc2": 2,
    }
    assert configs["blocks.0.mlp.fc1"].alpha == 6 and configs["blocks.0.attn.qkv"].alpha == 4


@pytest.mark.parametrize("key", ["fc1", "mlp.fc1", r"blocks\.\d\.mlp\.fc1", "fc1|fc3", r"(?i)MLP\.fc1"])
def test_patterns_of_every_form_choose_the_layer(key: str) -> None:
    config = AdapterConfig(rank=2, layers=(0,), rank_pattern={key: 3}, alpha_pattern={key: 6.0})
    found = {p.site.path: (p.config.rank, p.config.alpha) for p in plan_adapters(vit(), config)}
    assert found == {"blocks.0.attn.qkv": (2, None), "blocks.0.mlp.fc1": (3, 6.0), "blocks.0.mlp.fc2": (2, None)}


def test_the_first_pattern_that_fits_counts() -> None:
    for pattern, rank in (({"mlp": 3, "fc1": 5}, 3), ({"fc1": 5, "mlp": 3}, 5), ({"q": 9, "all": 4}, 4)):
        (plan,) = plan_adapters(vit(), AdapterConfig(rank=2, targets="fc1", layers=(0,), rank_pattern=pattern))
        assert plan.config.rank == rank


def test_the_rank_of_a_part_that_is_not_adapted_counts_for_nothing() -> None:
    (plan,) = plan_adapters(vit(), AdapterConfig(rank=2, targets=("v",), layers=(0,), rank_pattern={"q": 3}))
    assert plan.config.rank == 2


@pytest.mark.parametrize("share_down", [False, True])
def test_parts_share_one_down_projection_if_asked(share_down: bool) -> None:
    model = nolora_vision.inject(timm.create_model("test_vit"), targets=("q", "v"), rank=3, share_down=share_down)
    for layer in adapted_layers(model).values():
        shapes = [(tuple(b.lora_A.shape), tuple(b.lora_B.shape), b.rows) for b in layer.adapter.branches()]
        q, v = (0, 64), (128, 192)
        together = [((3, 64), (128, 3), (q, v))]
        assert shapes == (together if share_down else [((3, 64), (64, 3), (q,)), ((3, 64), (64, 3), (v,))])


def test_a_rank_may_be_as_large_as_the_layer_but_no_larger() -> None:
    assert planned(vit(), targets="qkv", rank_pattern={"qkv": 64})
    with torch.device("meta"):
        model = timm.create_model("efficientformer_l1")
    assert planned(model, targets=("q",), rank_pattern={"qkv": 256})
    with pytest.raises(InjectionError, match=r"rank 257 is larger than the layer \(q: 448 → 256 .* at most 256\)"):
        planned(model, targets=("q",), rank_pattern={"qkv": 257})


def test_a_layer_that_only_training_calls_is_not_adapted_in_silence() -> None:
    """torch's own encoder layer reads linear1.weight in a fused kernel, in evaluation and off the meta device."""
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(1, 3, 16)
    try:
        nolora_vision.inject(model, targets=("linear1",), rank=2, example_input=x)
    except InjectionError:
        return
    with torch.no_grad():
        plain = model(x)
        for parameter in nolora_vision.adapter_parameters(model):
            nn.init.normal_(parameter)
        assert not torch.equal(model(x), plain)


@pytest.mark.parametrize(
    "name", ["gcvit_xxtiny", "tiny_vit_5m_224", "efficientformer_l1", "mvitv2_tiny", "hiera_tiny_224"]
)
def test_q_and_v_of_unequal_fused_layers(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plan = plan_adapters(model, AdapterConfig(rank=1, targets=("q", "v")))
    assert plan
    for p in plan:
        assert p.parts is not None and set(p.parts) <= {"q", "v"}
        rows = sorted(pair for pairs in p.parts.values() for pair in pairs)
        assert all(a < b for a, b in rows) and all(x[1] <= y[0] for x, y in pairwise(rows))
        assert rows[-1][1] <= p.site.out_features
        assert sum(b - a for a, b in rows) < p.site.out_features  # k is left alone
    nolora_vision.inject(model, rank=1, targets=("q", "v"))
    assert len(adapted_layers(model)) == len(plan)


HEADS = {"test_vit": "head", "deit_tiny_distilled_patch16_224": "head_dist", "levit_128s": "head"}
HEADS["maxvit_nano_rw_256"] = "head.fc"


@pytest.mark.parametrize(("name", "head"), HEADS.items())
def test_the_classifier_is_never_a_site(name: str, head: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert not any(path.startswith("head") for path in planned(model, targets="all"))
    with pytest.raises(InjectionError, match="belongs to the classifier, which is trained in full and never adapted"):
        planned(model, targets=(head,))


class Quantised(nn.Module):
    """Looks like a quantised linear layer: no nn.Linear, integers for weights."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("weight", torch.zeros(8, 8, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class QuantisedLinear(Quantised):
    pass


class Special(nn.Linear):
    pass


def with_layer(layer: nn.Module) -> nn.Module:
    model = timm.create_model("test_vit")
    model.blocks[0].mlp.fc1 = layer
    return model


def parametrised() -> nn.Module:
    model = timm.create_model("test_vit")
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    return model


def injected() -> nn.Module:
    return nolora_vision.inject(timm.create_model("test_vit"))


def bypassing_after_cure() -> nn.Module:
    """Needs the cure in block 1, and has a layer that is never called in block 0."""
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2)
    model.blocks[0].mlp.forward = lambda x: x
    return model


REFUSALS: list[tuple[str, Callable[[], nn.Module], dict, type[Exception], str]] = [
    (
        "nothing",
        lambda: timm.create_model("test_resnet"),
        {},
        InjectionError,
        "ResNet has no layer to adapt for targets",
    ),
    ("not timm", lambda: nn.Sequential(nn.ReLU()), {}, InjectionError, "It has no Linear and no 1×1 convolution"),
    ("names", lambda: nn.Sequential(nn.Linear(4, 4)), {}, InjectionError, r"Layers by name, for example: 0\. Roles to"),
    ("unknown", vit, {"targets": ("qkw",)}, InjectionError, r"no layer matches 'qkw'\. Did you mean 'qkv'"),
    ("container", vit, {"targets": ("mlp",), "exclude": "mlp"}, InjectionError, "has no layer to adapt for targets="),
    ("module", vit, {"targets": ("attn",)}, InjectionError, "is a Attention, which cannot carry an adapter"),
    ("rank", vit, {"rank": 65}, InjectionError, r"rank 65 is larger than the layer .*at most 64\)"),
    ("one rank", vit, {"rank_pattern": {"fc2": 99}}, InjectionError, r"mlp\.fc2: rank 99 is larger than the layer"),
    ("layers", vit, {"layers": (6,)}, InjectionError, "this model has 6 blocks, numbered 0 to 5"),
    ("layers from the end", vit, {"layers": (0, -7)}, InjectionError, r"numbered 0 to 5 .*; there is no block -7"),
    ("all excluded", vit, {"exclude": "all"}, InjectionError, "has no layer to adapt for targets=.*, exclude='all'"),
    ("whole path", vit, {"targets": "blocks"}, InjectionError, "is a Sequential, which cannot carry an adapter"),
    (
        "input",
        vit,
        {"example_input": torch.zeros(1, 3, 7, 7)},
        InjectionError,
        "could not be run .*Pass example_input=",
    ),
    ("stem", vit, {"targets": ("patch_embed.proj",)}, InjectionError, "is a Conv2d, which cannot carry an adapter"),
    ("twice", injected, {}, InjectionError, r"already has adapters\. Call nolora_vision\.eject"),
    ("mha", lambda: nn.TransformerEncoderLayer(16, 2), {}, InjectionError, r"is a torch\.nn\.MultiheadAttention"),
    ("quantised", lambda: with_layer(QuantisedLinear()), {}, InjectionError, r"QuantisedLinear; only plain torch\.nn"),
    ("subclass", lambda: with_layer(Special(64, 192)), {}, InjectionError, r"Special; only plain torch\.nn\.Linear"),
    ("parametrised", parametrised, {}, InjectionError, "only plain torch.nn.Linear|has a parametrization"),
    ("compiled", lambda: torch.compile(vit()), {}, InjectionError, r"wrapped by torch\.compile; inject the bare"),
    ("parallel", lambda: nn.DataParallel(timm.create_model("test_vit")), {}, InjectionError, "data-parallel wrapper"),
    ("unreached", bypassing_after_cure, {}, InjectionError, r"2 of 6 adapters are never called .*blocks\.0\.mlp\.fc1"),
    ("field", vit, {"ranks": 3}, ConfigError, r"'ranks' is no field\. Did you mean 'rank'"),
    ("value", vit, {"rank": 0}, ConfigError, "rank must be an integer of at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("build", "settings", "error", "message"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_refusals_leave_the_model_untouched(
    build: Callable[[], nn.Module], settings: dict, error: type[Exception], message: str
) -> None:
    model = build()

    def fingerprint() -> list:
        modules = [
            (path, type(m), id(m), m.training, m.__dict__.get("qkv_bias_separate")) for path, m in model.named_modules()
        ]
        return [modules, [(n, id(p), p.requires_grad) for n, p in model.named_parameters()], list(model.state_dict())]

    before = fingerprint()
    with pytest.raises(error) as caught:
        nolora_vision.inject(model, **settings)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert fingerprint() == before


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"inject needs a torch\.nn\.Module, got str"):
        nolora_vision.inject("vit")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="config must be an AdapterConfig, got int"):
        nolora_vision.inject(vit(), 8)  # type: ignore[arg-type]
    for undo in (nolora_vision.eject, nolora_vision.fold, lambda m: nolora_vision.disabled(m).__enter__()):
        with pytest.raises(InjectionError, match=r"has no adapters\. Call nolora_vision\.inject"):
            undo(vit())


def test_unknown_layout_refuses_parts_but_takes_the_whole() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.qkv(x)

    with pytest.raises(InjectionError, match="where each lies in its output is unknown"):
        nolora_vision.inject(Own(), targets=("q", "v"), example_input=torch.zeros(1, 8))
    assert adapted_layers(nolora_vision.inject(Own(), example_input=torch.zeros(1, 8)))


def test_each_part_has_its_own_rank_and_alpha() -> None:
    settings = {"rank_pattern": {"q": 2, "v": 16}, "alpha_pattern": {"v": 64.0}, "rank": 8, "layers": (0,)}
    model = vit()
    nolora_vision.inject(model, targets=("q", "k", "v"), **settings)
    (layer,) = adapted_layers(model).values()
    found = {part: (b.config.rank, tuple(b.lora_A.shape), b.scale) for part, b in layer.adapter.items()}
    assert found == {"q": (2, (2, 64), 1.0), "k": (8, (8, 64), 1.0), "v": (16, (16, 64), 4.0)}
    (row,) = nolora_vision.summary(model).rows
    assert (row.rank, row.ranks, row.shown_rank) == (16, (2, 8, 16), "2+8+16")
    with pytest.raises(InjectionError, match=r"rank 65 is larger than the layer \(v: 64 → 64 features, so at most 64"):
        planned(vit(), targets=("q", "v"), rank_pattern={"v": 65})


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"v": 2}},
        {"alpha_pattern": {"v": 2.0}},
        {"rank_pattern": {"v": 2}, "targets": ("q", "v"), "share_down": True},
    ],
    ids=["whole", "alpha", "shared"],
)
def test_a_part_of_one_product_has_no_rank_of_its_own(settings: dict) -> None:
    with pytest.raises(InjectionError, match=r"_pattern: 'v' is only a part of what blocks\.0\.attn\.qkv adapts"):
        planned(vit(), **settings)
    assert planned(vit(), targets="mlp", rank_pattern={"v": 2}) and planned(vit(), rank_pattern={"qkv": 2})


def test_an_mlp_in_one_product_with_q_k_and_v_has_no_rank_of_its_own() -> None:
    """`in_proj` of timm's parallel blocks: fc1, q, k and v. Adapted in parts, each has its own."""
    with torch.device("meta"):
        model = timm.create_model("vit_pwee_patch16_reg1_gap_256", depth=1)
    for key in ("mlp", "fc1", "qkv", "q"):
        for pattern in ({"rank_pattern": {key: 4}}, {"alpha_pattern": {key: 4.0}}):
            with pytest.raises(InjectionError, match=rf"{key}' is only a part of what blocks\.0\.in_proj"):
                planned(model, **pattern)
    plan = plan_adapters(model, AdapterConfig(rank=2, rank_pattern={"all": 3}))
    assert {p.site.path: p.config.rank for p in plan} == {"blocks.0.in_proj": 3, "blocks.0.mlp_out_proj": 3}
    (plan, _) = plan_adapters(model, AdapterConfig(rank=2, targets=("q", "mlp"), rank_pattern={"fc1": 4, "q": 3}))
    assert {part: config.rank for part, config in plan.configs.items()} == {"fc1": 4, "q": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "mlp", "rank_pattern": {"attn.qkv": 4}}, r"fits blocks\.0\.attn\.qkv and 5 more, but no layer"),
        ({"layers": (0,), "alpha_pattern": {"blocks.5.mlp.fc1": 4.0}}, r"fits blocks\.5\.mlp\.fc1, but no layer"),
        ({"exclude": "fc1", "rank_pattern": {r".*\.fc1": 4}}, r"gets an adapter\. Choose such a layer by"),
        ({"rank_pattern": {"blocks.0.attn.proj": 4}}, r"rank_pattern: 'blocks\.0\.attn\.proj' fits"),
    ],
)
def test_a_pattern_for_layers_that_get_no_adapter_is_a_mistake(settings: dict, message: str) -> None:
    with pytest.raises(InjectionError, match=message):
        planned(vit(), **settings)
    assert planned(vit(), **{**settings, "targets": "all", "layers": None, "exclude": ()})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ("fc3",)}, r"exclude: no layer matches 'fc3'\. Did you mean 'fc[12]'\?"),
        ({"exclude": r"block\.0\..*"}, r"exclude: no layer matches 'block"),
        ({"exclude": ("blocks.0",)}, "exclude: no layer matches 'blocks.0'"),
        (
            {"rank_pattern": {"blocks.0.mlp.fcl": 2}},
            r"rank_pattern: no layer .* mean 'blocks\.0\.mlp\.fc[12]'",
        ),
        ({"alpha_pattern": {"qvk": 2.0}}, "alpha_pattern: no layer matches 'qvk'. Did you mean 'qkv'"),
    ],
)
def test_exceptions_and_patterns_that_match_nothing_are_typos(settings: dict, message: str) -> None:
    with pytest.raises(InjectionError, match=message):
        planned(vit(), **settings)
    assert planned(vit(), targets="mlp", exclude=("head", "q", "blocks.0.attn.qkv"))
