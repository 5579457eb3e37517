"""PEFT's own LoRA format, written and read without PEFT: for linear adapters, which it can express."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nolora_vision.adapters.adapter_files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    CorruptAdapterError,
    parse_weights,
    read_json,
    read_weight_bytes,
    write_adapter_directory,
)
from nolora_vision.adapters.card import full_name, model_card
from nolora_vision.adapters.description import describe
from nolora_vision.adapters.whole_directory import whole_directory
from nolora_vision.config import ROLES, AdapterConfig, ConfigError
from nolora_vision.surgery.adapter import NoLoRAConv2d, adapted_layers
from nolora_vision.surgery.inject import injection_of, is_injected
from nolora_vision.surgery.low_rank_adapter import as_one_lora
from nolora_vision.surgery.sites import BYPASS_FLAG, classifier_paths, inside
from nolora_vision.surgery.wrappers import bare_name, bare_state

PREFIX = "base_model.model."
ADAPTER_PART = ".adapter."
UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "bias"),
    *("modules_to_save", "init_lora_weights", "base_model_name_or_path", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "auto_mapping", "revision", "inference_mode", "peft_version"),
    *("task_type", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
}
"""Fields of PEFT's LoraConfig with which it computes s · B A x; any other that is set may change that."""
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations (`init_lora_weights`) that leave W as it was; PiSSA, OLoRA, LoftQ and others change it."""


class PeftFormatError(CheckpointError):
    """This adapter cannot be expressed in the other format; nothing was written or changed."""


def is_peft(directory: str | Path) -> bool:
    """Whether a directory holds an adapter that PEFT wrote (or `write_peft`)."""
    try:
        return "peft_type" in read_json(whole_directory(directory) / CONFIG_FILE)
    except CheckpointError:
        return False


def write_peft(model: nn.Module, directory: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write linear adapters and the head as PEFT writes a LoRA of the same timm model, so that PEFT loads it.

    v goes into B. Several parts of a fused layer become one LoRA whose B has zeros where a part does not reach.

    Args:
        config: of `describe`.
        state: of `trained_state`.

    Raises:
        PeftFormatError: if an update is not linear, or something else than adapters and head was trained.
        CheckpointError: if the directory has files by the same names that are no adapter's; nothing is written.
    """
    from safetensors.torch import save

    heads = _saved_whole(model)
    _refuse_what_peft_cannot_say(model, state, heads)
    own = injection_of(model).config
    tensors, ranks, alphas = _loras(model, state)
    # PEFT wants every tensor of a module that it replaces, buffers too
    head = {name: t for name, t in {**bare_state(model), **state}.items() if inside(name, heads)}
    tensors |= {PREFIX + name: t.detach().cpu().contiguous() for name, t in head.items()}
    alpha = own.rank if own.alpha is None else own.alpha
    said = {
        "peft_type": "LORA",
        "base_model_name_or_path": f"timm/{full_name(config)}" if config["pretrained_tag"] else None,
        "r": own.rank,
        "lora_alpha": alpha,
        "use_rslora": own.rank_stabilized,
        "lora_dropout": own.dropout,
        "target_modules": _targets(model, list(ranks)),
        "modules_to_save": list(heads) or None,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != own.rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
        "bias": "none",
        "inference_mode": True,
    }
    flagged = _flagged(model, ranks, value=True)
    if flagged:
        warnings.warn(
            f"timm never calls the qkv of {flagged[0]} ({len(flagged)} such attentions) unless {BYPASS_FLAG} is set "
            f"there, and PEFT does not set it. Set it before PEFT loads this adapter, as its README.md shows.",
            stacklevel=3,
        )
    files = {
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(said, indent=2, allow_nan=False) + "\n").encode(),
        CARD_FILE: model_card(config, peft_flags=flagged).encode(),
    }
    return write_adapter_directory(directory, files)


def _loras(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """The tensors of every LoRA by PEFT's names, and rank and alpha by layer."""
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for path, layer in adapted_layers(model).items():
        path, branches = bare_name(path), list(layer.adapter.branches())
        down, up, alphas[path] = as_one_lora(branches, layer.weight.shape[0])
        ranks[path] = down.shape[0]
        dtype = next(t.dtype for name, t in state.items() if name.startswith(path + ADAPTER_PART))
        shape = (1, 1) if isinstance(layer, NoLoRAConv2d) else ()
        for name, t in (("lora_A", down), ("lora_B", up)):
            tensors[f"{PREFIX}{path}.{name}.weight"] = t.reshape(*t.shape, *shape).to("cpu", dtype).contiguous()
    return tensors, ranks, alphas


def read_peft(directory: str | Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LoRA that PEFT saved, as config and tensors of this library's format for a model.

    Where PEFT saved no head, the model's own is among the tensors.

    Raises:
        CheckpointError: if it is no plain LoRA, or not sound.
    """
    folder = whole_directory(directory)
    said = read_json(folder / CONFIG_FILE)
    _refuse_other_methods(said, directory)
    path = folder / WEIGHTS_FILE
    state, found = _renamed(parse_weights(path, read_weight_bytes(path)), path)
    try:
        adapter = json.loads(json.dumps(asdict(_adapter_config(said, found, model))))
    except (ConfigError, TypeError, ValueError, re.error, RecursionError, OverflowError) as error:
        raise CorruptAdapterError(f"{folder / CONFIG_FILE}: {error}") from error
    config = {**describe(model), "adapter": adapter, "backbone": {}, "metrics": {}, "metadata": {}}
    base = re.fullmatch(r"timm/(\w+)\.(\w+)", str(said.get("base_model_name_or_path")))
    if base is not None:  # the Hub's name of a timm model
        config |= {"architecture": base[1], "pretrained_tag": base[2]}
    heads = {bare_name(head) for head in classifier_paths(model)}
    if any(inside(name, heads) for name in state):
        config["class_names"] = None
    elif any(head.endswith(str(name)) for head in heads for name in said.get("modules_to_save") or ()):
        raise CorruptAdapterError(f"{path} lacks the head, which {CONFIG_FILE} lists in modules_to_save.")
    else:
        state |= {name: t for name, t in bare_state(model).items() if inside(name, heads)}
    bypassed = _flagged(model, [p for p in found if state[f"{p}{ADAPTER_PART}lora_B"].any()], value=False)
    if bypassed:
        warnings.warn(
            f"The LoRA on the qkv of {bypassed[0]} ({len(bypassed)} such attentions) takes effect here; in PEFT it "
            f"does only where {BYPASS_FLAG} is set. Set it on the model before loading to say that it was.",
            stacklevel=3,
        )
    return config, state


def _renamed(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The same tensors by this library's names, and the rank of each adapted layer by its path."""
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for key, t in sorted(tensors.items()):
        layer, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not layer:
            state[key.removeprefix(PREFIX)] = t
        elif part in ("A.weight", "B.weight") and t.ndim >= 2 and t.shape[2:].numel() == 1:
            state[f"{layer}{ADAPTER_PART}lora_{part[0]}"] = t.flatten(1)
            if part[0] == "A":
                ranks[layer] = t.shape[0]
        else:
            raise PeftFormatError(
                f"{path}: {key} of shape {tuple(t.shape)} is no matrix of a plain LoRA on a linear layer or a 1×1 "
                f"convolution. Train such layers with PEFT alone, or leave them out of target_modules."
            )
    lonely = [layer for layer in ranks if f"{layer}{ADAPTER_PART}lora_B" not in state]
    if lonely:
        raise CorruptAdapterError(f"{path} holds {lonely[0]}.lora_A.weight and no lora_B.weight to it.")
    if not ranks:
        raise PeftFormatError(f"{path} holds no LoRA matrices (*.lora_A.weight).")
    return state, ranks


def _adapter_config(said: Mapping[str, Any], found: Mapping[str, int], model: nn.Module) -> AdapterConfig:
    """The same LoRA as an AdapterConfig, with PEFT's defaults for what is not said."""
    rank, alpha = (8 if said.get(key) is None else said[key] for key in ("r", "lora_alpha"))
    wanted = {path: _by_pattern(said.get("rank_pattern"), path, rank) for path in found}
    alphas = {path: _by_pattern(said.get("alpha_pattern"), path, alpha) for path in found}
    wrong = [path for path in found if found[path] != wanted[path]]
    if wrong:
        raise ValueError(f"{wrong[0]} should have rank {wanted[wrong[0]]}; its lora_A has {found[wrong[0]]} rows.")
    targets = _targets(model, list(found))
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        rank_stabilized=bool(said.get("use_rslora")),
        nonlinearity="identity",
        modulation="none",
        dropout=said.get("lora_dropout") or 0.0,
        targets=targets if isinstance(targets, str) else tuple(targets),
        rank_pattern=_pattern(found, rank),
        alpha_pattern=_pattern(alphas, alpha),
    )


def _by_pattern(pattern: Mapping[str, Any] | None, path: str, usual: Any) -> Any:
    """The value of the first key that PEFT would use for this layer."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), usual)


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern` for just these layers; keys match ends of paths, so longer paths go first."""
    ends = {path for path in values if any(other.endswith(f".{path}") for other in values)}
    wanted = values if ends else {path for path, value in values.items() if value != usual}
    return {re.escape(path): values[path] for path in sorted(wanted, key=len, reverse=True)}


def _targets(model: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """The paths; or where one is a role or the end of another module's path, a regular expression for just these."""
    others = [bare_name(name) for name, _ in model.named_modules()]
    if any(path in ROLES or any(name.endswith(f".{path}") for name in others) for path in paths):
        return f"(?:{'|'.join(map(re.escape, paths))})"
    return list(paths)


def _saved_whole(model: nn.Module) -> tuple[str, ...]:
    """The outermost modules of the classifier that hold anything, and what PEFT's `modules_to_save` takes for them."""
    heads = {bare_name(path) for path in classifier_paths(model)}
    alike = {n for n in (bare_name(path) for path, _ in model.named_modules()) if any(n.endswith(h) for h in heads)}
    outermost = [path for path in sorted(alike) if not inside(path.rpartition(".")[0] or ".", alike)]
    return tuple(path for path in outermost if any(inside(name, [path]) for name in bare_state(model)))


def _refuse_what_peft_cannot_say(model: nn.Module, state: Mapping[str, Tensor], heads: tuple[str, ...]) -> None:
    if not is_injected(model):
        raise PeftFormatError("The model has no adapters, so there is no LoRA. Save it in nolora_vision's format.")
    for path, layer in adapted_layers(model).items():
        config = next((branch.config for branch in layer.adapter.branches() if not branch.is_linear), None)
        if config is not None:
            raise PeftFormatError(
                f"{path}: an update with f = {config.nonlinearity} and modulation {config.modulation} depends on its "
                f"input, so it is no matrix B A, and PEFT's LoRA format holds nothing else. Save it in nolora_vision's "
                f"format, or train with nonlinearity='identity' and no gate."
            )
    other = [name for name in state if ADAPTER_PART not in f".{name}" and not inside(name, heads)]
    if other:
        raise PeftFormatError(
            f"{other[0]} was trained or moved too ({len(other)} such tensors), and what is written in PEFT's format is "
            f"LoRA and head only. Freeze it and keep BatchNorms in evaluation mode, or save in nolora_vision's format."
        )


def _refuse_other_methods(said: Mapping[str, Any], directory: str | Path) -> None:
    if said.get("peft_type") != "LORA":
        raise PeftFormatError(f"{directory} is PEFT's {said.get('peft_type')!r}; only its LORA can be read.")
    switches = [f"{key}={said[key]!r}" for key in sorted(said.keys() - UNDERSTOOD) if said[key]]
    switches += [f"bias={said['bias']!r}"] if said.get("bias", "none") != "none" else []
    start = said.get("init_lora_weights")
    switches += [f"init_lora_weights={start!r}"] if not any(start is s or start == s for s in STARTS) else []
    if switches:
        raise PeftFormatError(
            f"{directory} uses PEFT's {', '.join(switches)[:300]}, with which it is not known to be a plain LoRA "
            f"W x + s · B A x on the W of the pretrained model. Merge it with PEFT, or train without."
        )
    kinds = {"rank_pattern": dict, "alpha_pattern": dict, "modules_to_save": list, "use_rslora": bool}
    wrong = [key for key, kind in kinds.items() if said.get(key) is not None and not isinstance(said[key], kind)]
    if wrong:
        raise CorruptAdapterError(f"{directory}: {wrong[0]} in {CONFIG_FILE} cannot be {said[wrong[0]]!r}.")


def _flagged(model: nn.Module, paths: Iterable[str], *, value: bool) -> list[str]:
    """Attentions whose qkv is among these layers and called only if their flag is set, and the flag is as given."""
    modules = {bare_name(name): module for name, module in model.named_modules()}
    owners = [path.removesuffix(".qkv") for path in paths if path.endswith(".qkv")]
    found = [owner for owner in owners if getattr(modules.get(owner), BYPASS_FLAG, None) is value]
    return [owner for owner in found if getattr(modules[owner], "q_bias", None) is not None]
