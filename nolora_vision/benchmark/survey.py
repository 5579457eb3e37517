"""`make survey`: inject into every timm architecture, and count what is refused and why."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from rich.progress import track
from torch import nn

import nolora_vision
from nolora_vision import InjectionError
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.inject import injection_of
from nolora_vision.training.progress import print_columns
from nolora_vision.training.record import write_atomic

NOTHING_THERE = "no attention projection and no MLP (convolutional and other networks)"


@dataclass(frozen=True)
class Finding:
    """What `inject(model)` did to one architecture."""

    name: str
    module: str
    """timm's file that the architecture comes from."""
    status: Literal["adapted", "refused", "failed"]
    adapters: int = 0
    cured: int = 0
    """Attentions that would have bypassed their adapter without the cure."""
    reason: str = ""
    """Why it was refused, or what failed."""


def survey(names: Iterable[str]) -> list[Finding]:
    """One finding for each architecture name; nothing is downloaded and no memory is used for weights."""
    return [examine(name) for name in names]


def examine(name: str) -> Finding:
    """Build one architecture on the meta device, inject it with the defaults, check it, and eject it again."""
    module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
        keys = list(model.state_dict())
        try:
            nolora_vision.inject(model)
        except InjectionError as error:
            reason = NOTHING_THERE if "has no layer to adapt" in str(error) else str(error).split("\n")[0]
            return Finding(name, module, "refused", reason=reason)
        problems = list(check_adapted(model, keys))
        adapters, cured = len(adapted_layers(model)), len(injection_of(model).cured)
        nolora_vision.eject(model)
        if list(model.state_dict()) != keys:
            problems.append("eject did not restore the state-dict keys")
    except Exception as error:
        return Finding(name, module, "failed", reason=f"{type(error).__name__}: {error}".split("\n")[0])
    return Finding(name, module, "failed" if problems else "adapted", adapters, cured, "; ".join(problems))


def check_adapted(model: nn.Module, keys_before: Sequence[str]) -> Iterable[str]:
    """What `inject` must leave true, besides that every adapter is called, which it proves itself."""
    if [key for key in model.state_dict() if ".adapter." not in key] != list(keys_before):
        yield "the base's state-dict keys changed"
    heads = classifiers(model)
    in_heads = {id(module) for head in heads for module in head.modules()}
    if any(id(layer) in in_heads for layer in adapted_layers(model).values()):
        yield "an adapter is in the classifier"
    trained = {id(p) for head in heads for p in head.parameters()} | {
        id(p) for layer in adapted_layers(model).values() for p in layer.adapter.parameters()
    }
    if any(p.requires_grad != (id(p) in trained) for p in model.parameters()):
        yield "something else than adapters and classifier trains"


def classifiers(model: nn.Module) -> list[nn.Module]:
    """What timm itself calls the classifier: `get_classifier()` and the names in the pretrained config."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    named: Any = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    modules = dict(model.named_modules())
    heads = [*(found if isinstance(found, (tuple, list)) else (found,))]
    heads += [modules.get(name) for name in ((named,) if isinstance(named, str) else named)]
    return [head for head in heads if isinstance(head, nn.Module)]


def show(findings: Sequence[Finding]) -> None:
    """The counts, as a table."""
    by_status = Counter(f.status for f in findings)
    reasons = Counter(f.reason for f in findings if f.status == "refused")
    adapted = [f for f in findings if f.status == "adapted"]
    rows = [
        ("architecture names", len(findings), len({f.module for f in findings})),
        ("adapted, every adapter reached", len(adapted), len({f.module for f in adapted})),
        ("of these, cured of a bypass", sum(f.cured > 0 for f in adapted), len({f.module for f in adapted if f.cured})),
        *((f"refused: {reason}", n, _modules(findings, reason)) for reason, n in reasons.most_common()),
        ("failed", by_status["failed"], len({f.module for f in findings if f.status == "failed"})),
    ]
    title = f"inject(model) on timm {timm.__version__}, meta device"
    print_columns(title, ("", "names", "timm files"), [(what, f"{n:,}", str(files)) for what, n, files in rows])
    for finding in findings:
        if finding.status == "failed":
            print(f"failed: {finding.name}: {finding.reason}")


def _modules(findings: Sequence[Finding], reason: str) -> int:
    return len({f.module for f in findings if f.reason == reason})


def main(*, models: str = "*", output: Path | None = None) -> int:
    """Inject into every timm architecture and count what happens; 1 if any fails.

    Args:
        models: Only the names that match this pattern.
        output: Also write every finding to this JSON file.
    """
    names = timm.list_models(models)
    if not names:
        print(f"timm {timm.__version__} has no architecture that matches {models!r}.", file=sys.stderr)
        return 2
    shown = track(names, description="injecting", transient=True) if sys.stdout.isatty() else names
    findings = survey(shown)
    show(findings)
    if output is not None:
        versions = {"timm": timm.__version__, "torch": str(torch.__version__), "nolora": nolora_vision.__version__}
        write_atomic(output, json.dumps({"versions": versions, "findings": [asdict(f) for f in findings]}, indent=1))
    return int(any(f.status == "failed" for f in findings))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
