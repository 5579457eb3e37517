"""What training did to each adapter: norms of the update and of v, the learned f, from an adapter directory alone.

Neither backbone nor network is needed: all of it follows from A, B, v, θ, G and c. Everything is computed in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.adapters.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CorruptAdapterError,
    read_adapter_files,
    read_json,
)
from nolora_vision.adapters.branches import PARTS, NamedBranch, in_order, named_branches
from nolora_vision.adapters.description import describe
from nolora_vision.adapters.peft_format import is_peft, read_peft
from nolora_vision.adapters.whole_directory import whole_directory
from nolora_vision.kernels import FORMULAS, LowRank
from nolora_vision.kernels.eager import rank_space
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.inject import injection_of, is_injected
from nolora_vision.surgery.low_rank_adapter import LowRankAdapter, SplitAdapter
from nolora_vision.surgery.sites import block_of
from nolora_vision.surgery.wrappers import bare_model, bare_name

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
NEAR_ZERO = 1e-9
"""Slopes at 0 are the mean of those at ±this: exact to rounding for a smooth f, and 1/2 for relu."""


@dataclass(frozen=True)
class AdapterAnatomy:
    """One update s · B (v ⊙ (1 + tanh(G h + c)) ⊙ f(h)), h = A x: one layer's, or one part's (q, k, v) of it."""

    path: str
    block: str
    """Path of the block the layer belongs to, '' outside any."""
    role: str
    """q, k, v, qkv, proj, fc1, fc2, …; the adapted parts joined by + where not all of a fused layer is adapted."""
    part: str
    """Which part of a fused layer the update is for, '' if it is the layer's only one."""
    in_features: int
    out_features: int
    """Features that the update reaches."""
    rank: int
    nonlinearity: str
    modulation: str
    scale: float
    parameters: int
    singular_values: tuple[float, ...]
    """Of the update's slope at h = 0, the (E, D) matrix s · B J A, largest first; J (R, R) is the derivative at 0 of
    f's output times v and the gate's 1 + tanh c. It is the update itself if f is the identity without a gate; for
    another f it is the update of small h. A kink at 0 counts with its mean slope, 1/2 for relu."""
    up_norm: float
    """‖B‖, Frobenius; 0: never trained."""
    slopes: tuple[float, ...]
    """f'(0) of each rank unit under its θ, without v and gate."""
    v: tuple[float, ...] | None
    """None: there is no v. It starts at 1."""
    gate_norm: float | None
    """‖G‖, Frobenius; None: there is no gate. It starts at 0."""
    gate_open: tuple[float, ...] | None
    """1 + tanh c of each unit: what the gate multiplies v by at h = 0. It starts at 1."""
    theta: Mapping[str, Any]
    """θ of f by name, (R, ...) as nested tuples."""

    @property
    def kind(self) -> str:
        """The part, or else the role."""
        return self.part or self.role

    @property
    def update_norm(self) -> float:
        """‖s · B J A‖, Frobenius."""
        return math.sqrt(sum(value * value for value in self.singular_values))

    @property
    def stable_rank(self) -> float:
        """Σσ² / max σ²: 1 if one direction carries the update, at most the rank; 0 if untrained."""
        largest = self.singular_values[0]
        return sum((value / largest) ** 2 for value in self.singular_values) if largest else 0.0

    @property
    def directions(self) -> int:
        """How many singular values exceed 1 % of the largest."""
        return sum(value > 0.01 * self.singular_values[0] for value in self.singular_values)

    @property
    def v_norm(self) -> float | None:
        """‖v‖; √rank at the start."""
        return None if self.v is None else math.hypot(*self.v)

    @property
    def v_moved(self) -> float | None:
        """‖v − 1‖."""
        return None if self.v is None else math.hypot(*(value - 1 for value in self.v))

    def theta_moved(self) -> dict[str, float]:
        """Largest |θ − initial θ| by name; without names whose initial values were drawn at random."""
        first = initial_theta(self.nonlinearity, self.rank)
        now = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.theta.items()}
        return {name: float((now[name] - first[name]).abs().max()) for name in now if name in first}

    def curves(self, h: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """f at points h: learned (R, N), and before training (N,), or None where it was drawn at random.

        A mixing f (aurora) is shown with all units at the same h.
        """
        function = FORMULAS[self.nonlinearity].function
        points = torch.tensor(h, dtype=torch.float64).unsqueeze(-1).expand(-1, self.rank)
        theta = [torch.tensor(value, dtype=torch.float64) for value in self.theta.values()]
        first = initial_theta(self.nonlinearity, self.rank)
        known = first.keys() == self.theta.keys()
        return function(points, *theta).T, function(points, *first.values())[:, 0] if known else None


@dataclass(frozen=True)
class Anatomy:
    """A saved or live adapter: its config, and what became of each update."""

    config: Mapping[str, Any]
    """The fields of `adapter_config.json`."""
    rows: tuple[AdapterAnatomy, ...]
    """In the order of block numbers."""
    other_parameters: int
    """Trained numbers outside the adapters: the head, and what else trained."""

    @property
    def adapter_parameters(self) -> int:
        """Numbers in A, B, v, θ, G and c."""
        return sum(row.parameters for row in self.rows)


def anatomy(source: nn.Module | str | Path) -> Anatomy:
    """What training did to the adapters of a model, or of an adapter directory (this library's or PEFT's).

    The rows of a model and of its directory are the same. Without adapters there are no rows.

    Raises:
        CheckpointError: if the directory is not sound, or does not say enough.
    """
    if isinstance(source, nn.Module):
        return _of_model(bare_model(source))
    if is_peft(source):
        config, state = read_peft(source, nn.Module())  # the model only names what the file does not
        base = read_json(whole_directory(source) / CONFIG_FILE).get("base_model_name_or_path")
        config |= {"architecture": str(base or "unknown"), "pretrained_tag": ""}
    else:
        config, state = read_adapter_files(source)
    place = f"{whole_directory(source) / WEIGHTS_FILE}"
    inside = [t for name, t in state.items() if ".adapter." in name]
    others = [t for name, t in state.items() if ".adapter." not in name and not name.endswith(STATISTICS)]
    if bool(inside) != (config["adapter"] is not None):
        said = "no adapter, but it holds" if inside else "an adapter, but it holds no"
        raise CorruptAdapterError(f"{place}: its config names {said} adapter tensors. Save the model again.")
    branches = named_branches(state, config["adapter"], place) if inside else ()
    return Anatomy(config, tuple(map(_measure, branches)), sum(t.numel() for t in others))


def initial_theta(nonlinearity: str, rank: int) -> dict[str, Tensor]:
    """θ before training by name, in float64; names whose values are drawn at random are left out."""
    with torch.random.fork_rng(devices=[]):
        pairs = {name: (make(rank), make(rank)) for name, make in FORMULAS[nonlinearity].theta.items()}
    return {name: first.double() for name, (first, second) in pairs.items() if torch.equal(first, second)}


def _of_model(model: nn.Module) -> Anatomy:
    roles = injection_of(model).roles if is_injected(model) else {}
    branches: list[NamedBranch] = []
    for path, layer in sorted(adapted_layers(model).items(), key=lambda item: in_order(bare_name(item[0]))):
        parts = dict(layer.adapter.items()) if isinstance(layer.adapter, SplitAdapter) else {"": layer.adapter}
        for part in sorted(parts, key=("", *PARTS).index):
            branch = parts[part]
            assert isinstance(branch, LowRankAdapter)
            count = sum(p.numel() for p in branch.parameters())
            branches.append(NamedBranch(bare_name(path), roles.get(path, ""), part, branch.operands(), count))
    trained = (p.numel() for name, p in model.named_parameters() if p.requires_grad and ".adapter." not in name)
    return Anatomy(describe(model), tuple(map(_measure, branches)), sum(trained))


@torch.no_grad()
def _measure(named: NamedBranch) -> AdapterAnatomy:
    def double(t: Tensor) -> Tensor:
        return t.detach().to("cpu", torch.float64)

    branch = named.operands
    gate = None if branch.gate is None else (double(branch.gate[0]), double(branch.gate[1]))
    v, theta = None if branch.v is None else double(branch.v), tuple(map(double, branch.theta))
    branch = branch._replace(down=double(branch.down), up=double(branch.up), v=v, gate=gate, theta=theta)
    rank = branch.down.shape[0]
    alone = branch._replace(v=None, gate=None, scale=1.0)
    return AdapterAnatomy(
        path=named.path,
        block=block_of(named.path),
        role=named.role,
        part=named.part,
        in_features=branch.down.shape[1],
        out_features=branch.up.shape[0],
        rank=rank,
        nonlinearity=branch.nonlinearity,
        modulation="none" if v is None else "vector" if gate is None else "gate",
        scale=branch.scale,
        parameters=named.parameters,
        singular_values=_singular_values(branch),
        up_norm=float(branch.up.norm()),
        slopes=tuple(_slope_at_zero(alone).diagonal().tolist()),
        v=None if v is None else tuple(v.tolist()),
        gate_norm=None if gate is None else float(gate[0].norm()),
        gate_open=None if gate is None else tuple((1 + torch.tanh(gate[1])).tolist()),
        theta={name: _tuples(t.tolist()) for name, t in zip(FORMULAS[branch.nonlinearity].theta, theta, strict=True)},
    )


def _slope_at_zero(branch: LowRank) -> Tensor:
    """d(s · v ⊙ gate ⊙ f)/dh at h = 0, (R, R): the mean of the slopes on both sides of it."""
    points = [torch.full((branch.down.shape[0],), sign * NEAR_ZERO, dtype=torch.float64) for sign in (1, -1)]
    with torch.enable_grad():
        sides = [torch.autograd.functional.jacobian(lambda h: rank_space(h, branch), point) for point in points]
    return (sides[0] + sides[1]) / 2  # type: ignore[operator]


def _singular_values(branch: LowRank) -> tuple[float, ...]:
    """Of s · B J A, from R × R matrices: the orthogonal factors of B and Aᵀ change none of them."""
    product = torch.linalg.qr(branch.up).R @ _slope_at_zero(branch) @ torch.linalg.qr(branch.down.T).R.T
    if not product.isfinite().all():
        return (math.nan,) * branch.down.shape[0]
    return tuple(torch.linalg.svdvals(product).tolist())


def as_plain(rows: Sequence[AdapterAnatomy]) -> list[dict[str, Any]]:
    """Rows for JSON, the figures derived from them included; numbers that are not finite become None."""
    derived = ("kind", "update_norm", "stable_rank", "directions", "v_norm", "v_moved")
    plain = [asdict(row) | {name: getattr(row, name) for name in derived} for row in rows]
    return json.loads(json.dumps(plain), parse_constant=lambda name: None)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
