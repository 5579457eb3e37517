"""Where q, k and v lie in a fused projection's output: in three blocks, or interleaved head by head.

Read off timm's attention classes and checked against what their forward really splits (tests/surgery/test_layout.py).
A class that is not listed has no known layout: its fused layer can be adapted as a whole, not in parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from nolora_vision.surgery.low_rank_adapter import Rows

EQUAL_BLOCKS = frozenset(
    {
        "attention.Attention",
        "attention.AttentionRope",
        "attention_pool.AttentionPoolLatent",
        "beit.Attention",
        "cait.TalkingHeadAttn",
        "coat.FactorAttnConvRelPosEnc",
        "convit.GPSA",
        "convit.MHSA",
        "davit.ChannelAttention",
        "davit.ChannelAttentionV2",
        "davit.WindowAttention",
        "diff_attention.DiffAttention",
        "edgenext.CrossCovarianceAttn",
        "eva.EvaAttention",
        "fastvit.Attention",
        "hiera.MaskUnitAttention",
        "hieradet_sam2.MultiScaleAttention",
        "metaformer.Attention",
        "mvitv2.MultiScaleAttention",
        "nest.Attention",
        "pvt_v2.Attention",
        "swin_transformer.WindowAttention",
        "swin_transformer_v2.WindowAttention",
        "swin_transformer_v2_cr.WindowMultiHeadAttention",
        "tnt.Attention",
        "twins.GlobalSubSampleAttn",
        "twins.LocallyGroupedAttn",
        "vision_transformer_relpos.RelPosAttention",
        "vision_transformer_sam.Attention",
        "visformer.Attention",
        "volo.Attention",
        "volo.ClassAttention",
        "xcit.XCA",
    }
)
"""Attention classes (`file.Class`) whose fused output is one block each of q, k and v, all of one size."""

_IN_PROJ = ("fc1", "q", "k", "v")

BLOCKS: Mapping[str, Callable[[Any], Sequence[tuple[str, int]]]] = {
    "bottleneck_attn.BottleneckAttn": lambda a: (("q", a.dim_out_qk), ("k", a.dim_out_qk), ("v", a.dim_out_v)),
    "efficientvit_msra.CascadedGroupAttention": lambda a: (("q", a.key_dim), ("k", a.key_dim), ("v", a.val_dim)),
    "lambda_layer.LambdaLayer": lambda a: (("q", a.num_heads * a.dim_qk), ("k", a.dim_qk), ("v", a.dim_v)),
    "mobilevit.LinearSelfAttention": lambda a: (("q", 1), ("k", a.embed_dim), ("v", a.embed_dim)),
    "shvit.SHSA": lambda a: (("q", a.qk_dim), ("k", a.qk_dim), ("v", a.pdim)),
    "vision_transformer.DiffParallelScalingBlock": lambda a: tuple(
        zip(("fc1", "q", "k", "v"), a.in_split, strict=True)
    ),
    "vision_transformer.ParallelScalingBlock": lambda a: list(zip(_IN_PROJ, a.in_split, strict=True)),
}
"""Attention classes whose fused output is one block each, of sizes that the module knows."""

HEADS: Mapping[str, Callable[[Any], Sequence[tuple[str, int]]]] = {
    "cpubone.ConvAttention": lambda a: tuple((part, a.head_dim) for part in "qkv"),
    "efficientformer.Attention": lambda a: (("q", a.key_dim), ("k", a.key_dim), ("v", a.val_dim)),
    "efficientvit_mit.LiteMLA": lambda a: tuple((part, a.dim) for part in "qkv"),
    "halo_attn.HaloAttn": lambda a: (("k", a.dim_head_qk), ("v", a.dim_head_v)),
    "levit.Attention": lambda a: (("q", a.key_dim), ("k", a.key_dim), ("v", a.val_dim)),
    "levit.AttentionDownsample": lambda a: (("k", a.key_dim), ("v", a.val_dim)),
    "lowformer.ConvAttention": lambda a: tuple((part, a.head_dim) for part in "qkv"),
    "tiny_vit.Attention": lambda a: (("q", a.key_dim), ("k", a.key_dim), ("v", a.val_dim)),
}
"""Attention classes whose fused output is q, k and v of head 0, then of head 1, …: the sizes for one head."""

HEADS_IF_HEAD_FIRST = frozenset({"maxxvit.Attention2d", "maxxvit.AttentionCl"})
"""Attention classes with a `head_first` switch between the two layouts."""


def fused_rows(role: str, attention: nn.Module, out_features: int) -> dict[str, Rows]:
    """The output features of each part of a fused projection, as (start, stop) pairs; empty if it is not known.

    Args:
        role: of the layer: qkv, qk or kv.
        attention: the module that splits the layer's output.
        out_features: of the layer.
    """
    if role not in {"qkv", "qk", "kv"} or not type(attention).__module__.startswith("timm."):
        return {}
    name = f"{type(attention).__module__.rpartition('.')[2]}.{type(attention).__name__}"
    if name == "gcvit.WindowAttentionGlobal":  # a global block takes q from outside
        return _repeat([(part, 1) for part in ("kv" if attention.use_global else "qkv")], out_features, heads=1)
    if name in BLOCKS:
        return _repeat(BLOCKS[name](attention), out_features, heads=1)
    if name in HEADS:
        sizes = HEADS[name](attention)
        return _repeat(sizes, out_features, heads=out_features // sum(size for _, size in sizes))
    if name in HEADS_IF_HEAD_FIRST:
        heads = int(attention.num_heads) if attention.head_first else 1  # type: ignore[arg-type]
        return _repeat([(part, 1) for part in role], out_features, heads=heads)
    if name in EQUAL_BLOCKS:
        return _repeat([(part, 1) for part in role], out_features, heads=1)
    return {}


def _repeat(sizes: Sequence[tuple[str, int]], out_features: int, *, heads: int) -> dict[str, Rows]:
    """Lay out parts of the given (relative) sizes once per head; empty if they do not fill the output exactly."""
    unit, rest = divmod(out_features, heads * sum(size for _, size in sizes))
    if rest:
        return {}
    rows: dict[str, list[tuple[int, int]]] = {part: [] for part, _ in sizes}
    start = 0
    for _ in range(heads):
        for part, size in sizes:
            rows[part].append((start, start + size * unit))
            start += size * unit
    return {part: tuple(pairs) for part, pairs in rows.items()}
