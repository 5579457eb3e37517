"""The row tables of layout.py against what timm's forwards really do with a fused layer's output.

Noise is added to the output features that the table calls q (k, v), then to the first and the last of them alone, and a
watcher on torch's products compares their operands with and without it: q must be the left operand of the attention
product and k the right one, and v must meet the softmax. The tables are not used to find that out, so rows that are
wrong by one feature reach a wrong operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from timm.models import maxxvit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nolora_vision.surgery import layout
from nolora_vision.surgery.sites import Site, find_sites, layer_shape
from tests.families import COATNET, MAXVIT

SMALL = {"depth": 1, "img_size": 64}
CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "attention.Attention": ("test_vit", {}),
    "attention.AttentionRope": ("vit_pe_spatial_tiny_patch16_512", {}),
    "attention_pool.AttentionPoolLatent": ("test_vit3", {}),
    "beit.Attention": ("beit_base_patch16_224", SMALL),
    "bottleneck_attn.BottleneckAttn": ("eca_botnext26ts_256", {}),
    "cait.TalkingHeadAttn": ("cait_xxs24_224", {}),
    "coat.FactorAttnConvRelPosEnc": ("coat_lite_tiny", {}),
    "convit.GPSA": ("convit_tiny", {}),
    "convit.MHSA": ("convit_tiny", {}),
    "cpubone.ConvAttention": ("cpubone_nano", {}),
    "davit.ChannelAttention": ("davit_tiny", {}),
    "davit.ChannelAttentionV2": ("davit_base_fl", {}),
    "davit.WindowAttention": ("davit_tiny", {}),
    "diff_attention.DiffAttention": ("vit_dwee_patch16_reg1_gap_256", {}),
    "edgenext.CrossCovarianceAttn": ("edgenext_xx_small", {}),
    "efficientformer.Attention": ("efficientformer_l1", {}),
    "efficientvit_mit.LiteMLA": ("efficientvit_b0", {}),
    "efficientvit_msra.CascadedGroupAttention": ("efficientvit_m0", {}),
    "eva.EvaAttention": ("vit_tiny_patch16_dinov3_qkvb", {}),
    "fastvit.Attention": ("fastvit_mci0", {}),
    "gcvit.WindowAttentionGlobal": ("gcvit_xxtiny", {}),
    "halo_attn.HaloAttn": ("halonet_h1", {}),
    "hiera.MaskUnitAttention": ("hiera_tiny_224", {}),
    "hieradet_sam2.MultiScaleAttention": ("sam2_hiera_tiny", {}),
    "lambda_layer.LambdaLayer": ("lambda_resnet26t", {}),
    "levit.Attention": ("levit_128s", {}),
    "levit.AttentionDownsample": ("levit_128s", {}),
    "lowformer.ConvAttention": ("lowformer_b0", {}),
    "maxxvit.Attention2d": ("coatnet_nano_rw_224", {**COATNET, "img_size": 224}),
    "maxxvit.AttentionCl": ("maxvit_nano_rw_256", MAXVIT),
    "metaformer.Attention": ("caformer_s18", {}),
    "mobilevit.LinearSelfAttention": ("mobilevitv2_050", {}),
    "mvitv2.MultiScaleAttention": ("mvitv2_tiny", {}),
    "nest.Attention": ("nest_tiny", {}),
    "pvt_v2.Attention": ("pvt_v2_b0", {}),
    "shvit.SHSA": ("shvit_s1", {}),
    "swin_transformer.WindowAttention": ("swin_tiny_patch4_window7_224", {}),
    "swin_transformer_v2.WindowAttention": ("swinv2_tiny_window8_256", {}),
    "swin_transformer_v2_cr.WindowMultiHeadAttention": ("swinv2_cr_tiny_224", {}),
    "tiny_vit.Attention": ("tiny_vit_5m_224", {}),
    "tnt.Attention": ("tnt_s_legacy_patch16_224", {}),
    "twins.GlobalSubSampleAttn": ("twins_svt_small", {}),
    "twins.LocallyGroupedAttn": ("twins_svt_small", {}),
    "visformer.Attention": ("visformer_tiny", {}),
    "vision_transformer.DiffParallelScalingBlock": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "vision_transformer.ParallelScalingBlock": ("vit_pwee_patch16_reg1_gap_256", {}),
    "vision_transformer_relpos.RelPosAttention": ("test_vit_relpos", {}),
    "vision_transformer_sam.Attention": ("samvit_base_patch16_224", SMALL),
    "volo.Attention": ("volo_d1_224", {}),
    "volo.ClassAttention": ("volo_d1_224", {}),
    "xcit.XCA": ("xcit_nano_12_p8_224", {}),
}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum, F.scaled_dot_product_attention}
FUSED = {"q": {0}, "k": {1}, "v": {2}}
"""Operands of scaled_dot_product_attention that each part must move."""
SOFTMAX = {"q": {0, 2}, "k": {1, 2}, "v": {3}}
"""Operands of the first and of the last product: q kᵀ, then softmax(q kᵀ) v."""
LINEAR = {"q": {2}, "k": {0, 3}, "v": {1, 3}}
"""q (kᵀ v)."""
VALUES_FIRST = {"q": {0, 3}, "k": {1, 3}, "v": {2}}
"""v softmax(q kᵀ)ᵀ."""
OTHER: dict[str, dict[str, set[int]]] = {
    "coat.FactorAttnConvRelPosEnc": LINEAR,
    "davit.ChannelAttention": {"q": {3}, "k": {0, 2}, "v": {1, 2}},  # softmax(kᵀ v) qᵀ
    "efficientvit_mit.LiteMLA": LINEAR,
    "efficientvit_msra.CascadedGroupAttention": VALUES_FIRST,
    "lambda_layer.LambdaLayer": {"q": {2}, "k": {0}, "v": {1, 3}},  # k v, then q with v's position lambda
    "mobilevit.LinearSelfAttention": {"q": {1, 3}, "k": {0, 3}, "v": {2}},  # relu(v) ⊙ Σ k ⊙ softmax(q)
    "shvit.SHSA": VALUES_FIRST,
}
"""Attentions that multiply in another order, as their forwards in timm say."""
CASCADE = "efficientvit_msra.CascadedGroupAttention"
"""Its first head's output goes into the next head, so its second product is looked at, not its last."""


class Watch(TorchFunctionMode):
    """Keeps the tensors that go into each product."""

    def __init__(self, products: set[Callable]) -> None:
        self.products, self.seen = products, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.products:
            flat = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else (arg,))]
            self.seen.append((func, [a.clone() for a in flat if isinstance(a, Tensor)]))
        return func(*args, **(kwargs or {}))


class Reached(Exception):
    pass


def attentions_and_sites(model: nn.Module, name: str) -> list[tuple[nn.Module, Site]]:
    """One attention of this class for each setting of its switches (use_global, head_first, …) in the model."""
    found: dict[object, tuple[nn.Module, Site]] = {}
    for site in find_sites(model):
        parts = site.path.split(".")
        for k in range(len(parts) - 1, 0, -1):
            module = model.get_submodule(".".join(parts[:k]))
            if f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}" == name and site.parts:
                switches = tuple((key, value) for key, value in vars(module).items() if isinstance(value, bool))
                found.setdefault(switches, (module, site))
                break
    assert found, f"no fused layer of {name}"
    return list(found.values())


def inputs_of(model: nn.Module, module: nn.Module) -> tuple[tuple, dict]:
    """What the model gives this module in its forward."""
    got: list[tuple[tuple, dict]] = []

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        got.append((args, kwargs))
        raise Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    with pytest.raises(Reached):
        model(torch.randn(1, 3, *size))
    handle.remove()
    return got[0]


def operands(module: nn.Module, layer: nn.Module, call: tuple, rows, products: set[Callable], last: int) -> list:
    """The operands while noise is on these output features: those of every fused attention (differential attention
    has two), or else of the first product and of the one with the index `last`."""

    def noise(_layer: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        for start, stop in rows:
            features = output[:, start:stop] if isinstance(layer, nn.Conv2d) else output[..., start:stop]
            features += torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
        return output

    handle = layer.register_forward_hook(noise)
    with Watch(products) as watch:
        module(*call[0], **call[1])
    handle.remove()
    fused = [tensors[:3] for func, tensors in watch.seen if func is F.scaled_dot_product_attention]
    return list(zip(*fused, strict=True)) if fused else [(t,) for t in watch.seen[0][1][:2] + watch.seen[last][1][:2]]


def differ(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def check(name: str, module: nn.Module, layer: nn.Module, rows: Mapping[str, layout.Rows], call: tuple) -> None:
    """Each part, and the first and the last feature of each piece of it, moves its own operands and no other."""
    products = {Tensor.mul, Tensor.__mul__, torch.mul} if name == "mobilevit.LinearSelfAttention" else PRODUCTS
    last = 1 if name == CASCADE else -1
    plain = operands(module, layer, call, (), products, last)
    expected = OTHER.get(name) or (FUSED if len(plain) == 3 else SOFTMAX)
    for part, pairs in rows.items():
        edges = [(i, i + 1) for start, stop in pairs for i in (start, stop - 1)]
        for noisy_rows in (pairs, *((edge,) for edge in edges)):
            noisy = operands(module, layer, call, noisy_rows, products, last)
            moved = {i for i, pair in enumerate(zip(plain, noisy, strict=True)) if differ(*pair)}
            assert moved == expected.get(part, set()), (part, noisy_rows)
    covered = sorted(pair for pairs in rows.values() for pair in pairs)
    assert covered[0][0] == 0 and covered[-1][1] == layer_shape(layer)[1]
    assert all(a[1] == b[0] for a, b in pairwise(covered))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_each_part_reaches_its_operand(name: str) -> None:
    if not timm.is_model(CASES[name][0]):
        pytest.skip(f"timm {timm.__version__} has no {CASES[name][0]}")
    model = timm.create_model(CASES[name][0], **CASES[name][1]).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    for module, site in attentions_and_sites(model, name):
        check(name, module, model.get_submodule(site.path), site.parts, inputs_of(model, module))


@torch.no_grad()
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("kind", ["Attention2d", "AttentionCl"])
def test_both_layouts_of_maxxvit(kind: str, head_first: bool) -> None:
    """No model of timm has Attention2d with head_first off."""
    attention = getattr(maxxvit, kind)(64, dim_head=16, head_first=head_first).eval()
    rows = layout.fused_rows("qkv", attention, 192)
    assert [len(pairs) for pairs in rows.values()] == [4 if head_first else 1] * 3
    x = torch.randn(1, 64, 3, 3) if kind == "Attention2d" else torch.randn(1, 3, 3, 64)
    check(f"maxxvit.{kind}", attention, attention.qkv, rows, ((x,), {}))


def test_switches_are_all_met() -> None:
    """The two settings of gcvit's global attention have different parts, so both must be among the cases."""
    found = attentions_and_sites(timm.create_model("gcvit_xxtiny"), "gcvit.WindowAttentionGlobal")
    assert {tuple(site.parts) for _, site in found} == {("q", "k", "v"), ("k", "v")}


def test_every_class_in_the_tables_is_tested() -> None:
    tables = {*layout.EQUAL_BLOCKS, *layout.BLOCKS, *layout.HEADS, *layout.HEADS_IF_HEAD_FIRST}
    assert tables | {"gcvit.WindowAttentionGlobal"} == CASES.keys()
