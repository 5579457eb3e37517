"""PEFT's methods on exactly the layers that `inject` would adapt, with its cure and proof; the one room of PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nolora_vision.config import AdapterConfig
from nolora_vision.methods.catalogue import GROUPS, MethodError
from nolora_vision.methods.limits import refuse_unfit_layers
from nolora_vision.surgery.applied import Applied
from nolora_vision.surgery.inject import freeze_backbone
from nolora_vision.surgery.plan import PlannedAdapter, plan_adapters
from nolora_vision.surgery.reach import UnrunnableError, prove_reach
from nolora_vision.surgery.sites import BYPASS_FLAG, cure_bypass

TESTED_WITH = "0.21.2"
"""The version of PEFT that has all of these, and that the tests ran with."""
FACTORS = ("lora_magnitude_vector", "ia3_l", "boft_s", "vera_lambda_d", "randlora_gamma")
"""Parameters that scale something and do not start at 0: decay would pull them away from the pretrained model."""
MATRICES_B = ("lora_B",)

Plan = Sequence[PlannedAdapter]
Fields = Callable[[AdapterConfig, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class PeftMethod:
    """How one of PEFT's methods is asked for."""

    config_class: str
    fields: Fields
    """Fields of PEFT's config, from the adapter config and all options of the method."""
    ranked: bool = True
    """Whether the adapter's rank bounds it as it bounds LoRA's."""
    reads_weight: bool = False
    """Whether it takes the frozen weight's norm or entries, so that a weight held in bf16 would give other numbers.

    PEANuT only multiplies by it, as the frozen layer does, which autocast rounds alike.
    """


def _lora(adapter: AdapterConfig, _options: Mapping[str, Any]) -> dict[str, Any]:
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    return {
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized,
    }


def _randlora(adapter: AdapterConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    alpha = 20 * adapter.rank if options["randlora_alpha"] is None else options["randlora_alpha"]
    key = options["projection_prng_key"]
    fixed = {"r": adapter.rank, "randlora_alpha": alpha, "projection_prng_key": key, "save_projection": False}
    return {**fixed, "randlora_dropout": adapter.dropout}


PEFT_METHODS: Mapping[str, PeftMethod] = {
    "peft-lora": PeftMethod("LoraConfig", _lora),
    "rslora": PeftMethod("LoraConfig", lambda a, o: {**_lora(a, o), "use_rslora": True}),
    "lora-plus": PeftMethod("LoraConfig", _lora),
    "dora": PeftMethod("LoraConfig", lambda a, o: {**_lora(a, o), "use_dora": True}, reads_weight=True),
    "pissa": PeftMethod("LoraConfig", lambda a, o: {**_lora(a, o), "init_lora_weights": "pissa"}),
    "vera": PeftMethod(
        "VeraConfig",
        lambda a, o: {"r": a.rank, "vera_dropout": a.dropout, "save_projection": False, **o},
        ranked=False,
    ),
    "fourierft": PeftMethod("FourierFTConfig", lambda a, o: {**o, "init_weights": True}, ranked=False),
    "hira": PeftMethod("HiraConfig", lambda a, o: {"r": a.rank, "hira_dropout": a.dropout}, reads_weight=True),
    "peanut": PeftMethod("PeanutConfig", lambda a, o: {"r": a.rank, **o}),
    "randlora": PeftMethod("RandLoraConfig", _randlora, ranked=False),
    "c3a": PeftMethod("C3AConfig", lambda a, o: {**o, "init_weights": True}, ranked=False),
    "oft": PeftMethod("OFTConfig", lambda a, o: {"oft_block_size": o["block_size"]}, ranked=False),
    "boft": PeftMethod(
        "BOFTConfig", lambda a, o: {"boft_block_size": o["block_size"]}, ranked=False, reads_weight=True
    ),
    "ia3": PeftMethod("IA3Config", lambda a, o: {}, ranked=False),
}


def plan_layers(model: nn.Module, method: str, adapter: AdapterConfig) -> list[PlannedAdapter]:
    """The layers that `inject` would adapt for this config; where the rank is not LoRA's, it does not bound it.

    Raises:
        InjectionError: as `plan_adapters`.
    """
    return plan_adapters(model, adapter if PEFT_METHODS[method].ranked else replace(adapter, rank=1))


def add_peft_layers(
    model: nn.Module, method: str, adapter: AdapterConfig, options: Mapping[str, Any], example_input: Any | None
) -> Applied:
    """Put one of PEFT's methods on a model, in place, and freeze all else but the classifier.

    Raises:
        InjectionError: if it cannot be done. The model is then unchanged.
    """
    plan = plan_layers(model, method, adapter)
    options = refuse_unfit_layers(model, method, adapter, options, plan)
    config = _peft_config(method, adapter, options, plan)
    paths = [planned.site.path for planned in plan]
    before = _Before.of(model, paths)
    cured = cure_bypass(model, paths)
    try:
        own = next(iter(before.weights.values())).device
        # Most draw their start by a generator of the CPU, whatever the default device; PiSSA's comes from the weight.
        _replace_layers(model, method, config, own if method == "pissa" else torch.device("cpu"))
        layers = {path: model.get_submodule(path) for path in paths}
        untouched = [path for path, layer in layers.items() if layer is before.layers[path]]
        if untouched:
            raise MethodError(f"PEFT put no {method} on {', '.join(untouched[:4])}.")
        for path, layer in layers.items():
            layer.train(before.layers[path].training)
            if before.weights[path].is_meta:
                layer.to("meta")
        prove_reach(model, layers, example_input)
    except UnrunnableError as error:
        before.restore(model, cured)
        prove_reach(model, {}, example_input)  # raises if the model itself is at fault
        reason = error.failures[1].partition(": ")[2][:200]  # of the real run on images of the model's own size
        raise MethodError(f"{method} cannot run on this model: PEFT's layer fails ({reason}).") from error
    except BaseException:
        before.restore(model, cured)
        raise
    added = {name: p for name, p in model.named_parameters() if p not in before.parameters}
    freeze_backbone(model)
    for parameter in added.values():
        parameter.requires_grad_(True)
    return _applied(method, adapter, options, paths, tuple(added))


def _applied(
    method: str, adapter: AdapterConfig, options: Mapping[str, Any], paths: Sequence[str], names: Sequence[str]
) -> Applied:
    def having(parts: Sequence[str]) -> frozenset[str]:
        return frozenset(name for name in names if set(parts) & set(name.split(".")))

    ratio = float(options.get("lr_ratio", 1.0))
    return Applied(
        method,
        adapter,
        options,
        layers=tuple(paths),
        parameters=frozenset(names),
        undecayed=having(FACTORS),
        groups=dict.fromkeys(having(MATRICES_B), GROUPS["lr_ratio"]) if ratio != 1 else {},
        ratios={GROUPS["lr_ratio"]: ratio} if ratio != 1 else {},
        unheld=tuple(paths) if PEFT_METHODS[method].reads_weight else (),
    )


@dataclass(frozen=True)
class _Before:
    """What has to come back if something fails."""

    layers: dict[str, nn.Module]
    weights: dict[str, torch.Tensor]
    """PiSSA puts another tensor into the weight; this is the old one itself, not a copy."""
    parameters: dict[nn.Parameter, bool]
    """requires_grad of every parameter."""

    @classmethod
    def of(cls, model: nn.Module, paths: Sequence[str]) -> _Before:
        layers = {path: model.get_submodule(path) for path in paths}
        weights = {path: layer.get_parameter("weight").data for path, layer in layers.items()}
        return cls(layers, weights, {p: p.requires_grad for p in model.parameters()})

    def restore(self, model: nn.Module, cured: Sequence[str]) -> None:
        for path, layer in self.layers.items():
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, layer)
            layer.get_parameter("weight").data = self.weights[path]
        for path in cured:
            setattr(model.get_submodule(path), BYPASS_FLAG, False)
        for parameter, required in self.parameters.items():
            parameter.requires_grad_(required)
        model.__dict__.pop("peft_config", None)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MethodError(
            f"This method is PEFT's, which cannot be imported ({error}). Install it: "
            f"pip install 'nolora-vision[baselines]'."
        ) from error
    return peft


def _peft_config(method: str, adapter: AdapterConfig, options: Mapping[str, Any], plan: Plan) -> Any:
    peft = _import_peft()
    known = PEFT_METHODS[method]
    make = getattr(peft, known.config_class, None)
    if make is None:
        raise MethodError(
            f"{method} needs peft.{known.config_class}, which PEFT {peft.__version__} lacks and {TESTED_WITH} has: "
            f"pip install 'peft>={TESTED_WITH}'."
        )
    fields = known.fields(adapter, {name: value for name, value in options.items() if name != "lr_ratio"})
    fields |= {"target_modules": _exactly([planned.site.path for planned in plan])}
    if known.config_class == "LoraConfig" or method == "hira":
        fields |= _patterns(adapter, plan, scaled=method != "hira")
    if method == "ia3":
        fields |= {"feedforward_modules": _exactly([p.site.path for p in plan if p.site.role == "fc2"])}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save")  # random matrices: the key says them
            return make(**fields)
    except (TypeError, ValueError) as error:
        raise MethodError(f"PEFT {peft.__version__} does not take {method} so ({_line(error)}).") from error


def _exactly(paths: Sequence[str]) -> str:
    """A regular expression for these whole paths; PEFT takes a list as suffixes, which may match more."""
    return "|".join(map(re.escape, paths)) or "(?!)"


def _patterns(adapter: AdapterConfig, plan: Plan, *, scaled: bool) -> dict[str, Any]:
    """Rank and alpha of the layers that the adapter config gives their own; alpha follows the rank where it is None."""
    own = {f"^{re.escape(p.site.path)}": p.config for p in plan if p.config != adapter}
    if not own:
        return {}
    alphas = {path: config.rank if config.alpha is None else config.alpha for path, config in own.items()}
    ranks = {"rank_pattern": {path: config.rank for path, config in own.items()}}
    return {**ranks, "alpha_pattern": alphas} if scaled else ranks


def _replace_layers(model: nn.Module, method: str, config: Any, device: torch.device) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # inject_adapter_in_model refuses methods with shared matrices
    try:
        with warnings.catch_warnings(), device:
            warnings.filterwarnings("ignore", message=".*CUDA extension|.*boft_n_butterfly_factor")
            tuner(model, config, "default")
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise MethodError(f"PEFT cannot put {method} on this model ({_line(error)}).") from error


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:200]
