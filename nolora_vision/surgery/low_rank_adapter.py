"""One nonlinear low-rank update as a module: A, B, v and θ; and the updates of a fused layer's parts.

Shapes: `...` any leading dimensions, `D` in_features, `E` out_features, `R` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nolora_vision.config import AdapterConfig
from nolora_vision.kernels import FORMULAS, Frozen, LowRank, low_rank_delta
from nolora_vision.kernels.eager import kaiming_uniform_down
from nolora_vision.surgery.modulation_noise import noisy, rows_per_image

Rows = tuple[tuple[int, int], ...]
"""Output features as (start, stop) pairs in ascending order."""


class LowRankAdapter(nn.Module):
    """One nonlinear low-rank update: x ↦ s · B (v ⊙ f_θ(A x)), 0 for every x until B is trained.

    Parameters are `lora_A` (R, D), `lora_B` (E, R), `v` (R,) unless the modulation is none, `gate_weight` (R, R) and
    `gate_bias` (R,) if it is a gate, and the θ of f by their names in `kernels.eager`. They are fp32 whatever the base.
    In training v is noisy if `config.modulation_noise` says so, and v = 1 where there is none.

    Args:
        in_features: D.
        out_features: E, the number of output features that the update reaches.
        config: rank, alpha, f, modulation, its noise and dropout; where it goes is not this module's business.
        rows: which output features of the layer those are; None means all.
    """

    rows_per_image: dict[int, int]
    """By the length of the input's leading dimension, as the last forward of the whole model with it had it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: AdapterConfig,
        *,
        rows: Rows | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rank = config.rank
        self.config, self.rows, self.scale = config, rows, config.scale(rank, config.alpha)
        self.rows_per_image = {}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        shapes = {name: make(rank).shape for name, make in FORMULAS[config.nonlinearity].theta.items()}
        if config.modulation != "none":
            shapes |= {"v": (rank,)}
        if config.modulation == "gate":
            shapes |= {"gate_weight": (rank, rank), "gate_bias": (rank,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A kaiming-uniform (a = √5), B = 0, v = 1, G = c = 0, and θ so that f starts as its formula says."""
        kaiming_uniform_down(self.lora_A)
        nn.init.zeros_(self.lora_B)
        for name, make in FORMULAS[self.config.nonlinearity].theta.items():
            self.get_parameter(name).copy_(make(self.config.rank))
        if self.config.modulation != "none":
            nn.init.ones_(self.get_parameter("v"))
        if self.config.modulation == "gate":
            nn.init.zeros_(self.get_parameter("gate_weight"))
            nn.init.zeros_(self.get_parameter("gate_bias"))

    def operands(self, x: Tensor | None = None) -> LowRank:
        """What `low_rank_delta` needs of this adapter; in training with the noise for the images of x: (..., D)."""
        config = self.config  # attributes, not get_parameter: stand-ins of any kind may be in their place
        v: Tensor | None = None if config.modulation == "none" else self.v  # type: ignore[assignment]
        if x is not None and self.training and config.modulation_noise:
            v = noisy(v, x, config.rank, config.modulation_noise, self._rows_per_image(x))
        return LowRank(
            down=self.lora_A,
            up=self.lora_B,
            v=v,
            gate=(self.gate_weight, self.gate_bias) if config.modulation == "gate" else None,  # type: ignore[arg-type]
            nonlinearity=config.nonlinearity,
            theta=tuple(getattr(self, name) for name in FORMULAS[config.nonlinearity].theta),
            scale=self.scale,
            rows=self.rows,
        )

    def _rows_per_image(self, x: Tensor) -> int:
        """L / B for x: (L, ..., D), remembered for when it cannot be known; 1 if it never was."""
        if x.ndim < 2:
            return 1
        now = rows_per_image(x)
        if now is None:
            return self.rows_per_image.get(x.shape[0], 1)
        if not torch.compiler.is_compiling():  # a compiled forward has no need of it: its graph computes again
            self.rows_per_image[x.shape[0]] = now
        return now

    def branches(self) -> Iterator[LowRankAdapter]:
        """The updates that this adapter adds to its layer: itself."""
        yield self

    def forward(self, x: Tensor, base: Tensor | Frozen) -> Tensor:
        """x: (..., D), base: (..., E) or the layer that makes it of x → base + s · B (v ⊙ f_θ(A x))."""
        return _add_updates(x, base, [self.operands(x)], self.config.dropout if self.training else 0.0)

    @torch.no_grad()
    def fold_(self) -> None:
        """Put v and s into B, in place: the same function in fewer operations. A gate stays, with v = 1."""
        factor = torch.full_like(self.lora_B[0], self.scale)
        if self.config.modulation != "none":
            factor = factor * self.get_parameter("v")
            nn.init.ones_(self.get_parameter("v"))
        self.lora_B.mul_(factor)
        self.scale = 1.0
        config = replace(self.config, alpha=float(self.config.rank), rank_stabilized=False)
        if config.modulation == "vector":
            del self.v
            config = replace(config, modulation="none")
        self.config = config

    @property
    def is_linear(self) -> bool:
        """Whether the update is a matrix s · B diag(v) A, so that it can be merged into W."""
        return self.config.nonlinearity == "identity" and self.config.modulation != "gate"

    def matrix(self) -> Tensor:
        """s · B diag(v) A: (E, D), for a linear update."""
        up = self.lora_B * self.scale
        return (up if self.config.modulation == "none" else up * self.get_parameter("v")) @ self.lora_A

    def extra_repr(self) -> str:
        """Rank, f, modulation, scale, noise and dropout, as shown in `print(model)`."""
        config = self.config
        text = f"rank={config.rank}, nonlinearity={config.nonlinearity}, modulation={config.modulation}"
        extras = (("modulation_noise", config.modulation_noise), ("dropout", config.dropout))
        return text + f", scale={self.scale:g}" + "".join(f", {name}={value:g}" for name, value in extras if value)


class SplitAdapter(nn.ModuleDict):
    """Updates of some parts (q, k, v) of a fused layer, each with its own A and B; x is read once for all of them."""

    def branches(self) -> Iterator[LowRankAdapter]:
        """The update of each part."""
        for part in self.values():
            assert isinstance(part, LowRankAdapter)
            yield part

    def forward(self, x: Tensor, base: Tensor | Frozen) -> Tensor:
        """x: (..., D), base: (..., E) or the layer that makes it → base with each part's update added to its rows."""
        branches = list(self.branches())
        dropout = branches[0].config.dropout if self.training else 0.0
        return _add_updates(x, base, [branch.operands(x) for branch in branches], dropout)


def _add_updates(x: Tensor, base: Tensor | Frozen, branches: list[LowRank], dropout: float) -> Tensor:
    """Dropout is on the way into A only, so the frozen layer then sees another x."""
    if not dropout:
        return low_rank_delta(x, base, branches)
    if isinstance(base, Frozen):
        base = F.linear(x, base.weight, base.bias)
    return low_rank_delta(F.dropout(x, dropout), base, branches)


Adapter = LowRankAdapter | SplitAdapter


def make_adapter(
    in_features: int,
    out_features: int,
    config: AdapterConfig,
    *,
    parts: Mapping[str, Rows] | None = None,
    configs: Mapping[str, AdapterConfig] | None = None,
    device: torch.device | str | None = None,
) -> Adapter:
    """The adapter of one layer: of all its output features, or of the given parts of them.

    Args:
        parts: output features by part; with `config.share_down` they get one A (and one v and θ) together.
        configs: by part, for those with another rank or alpha than `config`.
    """
    if not parts:
        return LowRankAdapter(in_features, out_features, config, device=device)

    def branch(rows: Rows, own: AdapterConfig) -> LowRankAdapter:
        width = sum(stop - start for start, stop in rows)
        return LowRankAdapter(in_features, width, own, rows=rows, device=device)

    if config.share_down:
        return branch(tuple(sorted(pair for rows in parts.values() for pair in rows)), config)
    return SplitAdapter({name: branch(rows, (configs or {}).get(name, config)) for name, rows in parts.items()})


@torch.no_grad()
def as_one_lora(branches: Sequence[LowRankAdapter], out_features: int) -> tuple[Tensor, Tensor, float]:
    """(A, B, alpha) of one LoRA equal to the sum of linear branches: A (R, D), B (E, R), R the sum of their ranks."""
    first, ups = branches[0], []
    for branch in branches:
        up = branch.lora_B if branch.config.modulation == "none" else branch.lora_B * branch.get_parameter("v")
        if branch.rows is not None:
            places = torch.cat([torch.arange(*pair, device=up.device) for pair in branch.rows])
            up = up.new_zeros(out_features, up.shape[1]).index_copy(0, places, up)
        ups.append(up if branch.scale == first.scale else up * (branch.scale / first.scale))
    down, up = torch.cat([branch.lora_A for branch in branches]), torch.cat(ups, dim=1)
    if len(branches) == 1:  # exactly what was asked for
        return down, up, first.config.rank if first.config.alpha is None else first.config.alpha
    return down, up, first.scale * (math.sqrt(len(down)) if first.config.rank_stabilized else len(down))
