"""What was adapted, as a table: site, role, shapes, rank, parameters; totals."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.applied import Applied, applied_to
from nolora_vision.surgery.groups import adapter_parameters, head_parameters
from nolora_vision.surgery.inject import injection_of, is_injected
from nolora_vision.surgery.wrappers import bare_model


@dataclass(frozen=True)
class SummaryRow:
    """One adapted layer."""

    path: str
    role: str
    in_features: int
    out_features: int
    rank: int
    """The largest of its parts."""
    nonlinearity: str
    modulation: str
    params: int
    ranks: tuple[int, ...] = ()
    """Of its parts."""

    @property
    def shape(self) -> str:
        """in_features → out_features."""
        return f"{self.in_features} → {self.out_features}"

    @property
    def shown_rank(self) -> str:
        """The rank; those of the parts, in their order, if they differ."""
        return "+".join(map(str, self.ranks)) if len(set(self.ranks)) > 1 else f"{self.rank}"


@dataclass(frozen=True)
class Summary:
    """Parameter counts of a model; `str()` gives the table."""

    rows: tuple[SummaryRow, ...]
    adapter_params: int
    head_params: int
    """Trainable parameters of the classifier."""
    trainable_params: int
    total_params: int
    """Everything, adapters and head included."""
    applied: Applied | None = None
    """The method, if `nolora_vision.methods.apply_method` applied one; a peer's adapters have no rows."""

    def __str__(self) -> str:
        header = ("layer", "role", "in → out", "rank", "f", "modulation", "parameters")
        body = [
            (r.path, r.role, r.shape, r.shown_rank, r.nonlinearity, r.modulation, f"{r.params:,}") for r in self.rows
        ]
        table = _align([header, *body], right=(3, 6)) if body else [self._without_rows()]
        return "\n".join([*table, "", *self._totals()])

    def _without_rows(self) -> str:
        if self.applied is None:
            return "no adapters"
        names = self.applied.layers
        return self.applied.method + (f" on {names[0]} … {names[-1]}" if names else ": no adapters")

    def _totals(self) -> list[str]:
        share = 100 * self.adapter_params / max(1, self.total_params)
        layers = len(self.rows) or len(self.applied.layers if self.applied is not None else ())
        return [
            f"adapters: {self.adapter_params:,} parameters in {layers} layers ({share:.3f} % of the model)",
            f"head: {self.head_params:,} trainable parameters",
            f"trainable: {self.trainable_params:,} of {self.total_params:,}",
        ]


def summary(model: nn.Module) -> Summary:
    """Count what is adapted and what trains; works on any model, adapted or not, compiled or data-parallel."""
    model = bare_model(model)
    roles = injection_of(model).roles if is_injected(model) else {}
    rows = []
    for path, layer in adapted_layers(model).items():
        out_features, in_features = layer.weight.shape[:2]
        branches = list(layer.adapter.branches())
        config, ranks = branches[0].config, tuple(branch.config.rank for branch in branches)
        params = sum(p.numel() for p in layer.adapter.parameters())
        rows.append(
            SummaryRow(
                path,
                roles.get(path, ""),
                in_features,
                out_features,
                max(ranks),
                config.nonlinearity,
                config.modulation,
                params,
                ranks,
            )
        )
    return Summary(
        rows=tuple(rows),
        adapter_params=sum(p.numel() for p in adapter_parameters(model)),
        head_params=sum(p.numel() for p in head_parameters(model) if p.requires_grad),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=sum(p.numel() for p in model.parameters()),
        applied=applied_to(model),
    )


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the counts in PEFT's form, with the adapters apart from the head."""
    s = summary(model)
    share = 100 * s.trainable_params / max(1, s.total_params)
    print(
        f"trainable params: {s.trainable_params:,} (adapters {s.adapter_params:,}, head {s.head_params:,}) || "
        f"all params: {s.total_params:,} || trainable%: {share:.4f}"
    )


def _align(lines: list[tuple[str, ...]], *, right: tuple[int, ...]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def row(line: tuple[str, ...]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return [row(line) for line in lines]
