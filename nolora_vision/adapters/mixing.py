"""One batch for several adapters: each sample gets its own, and its own head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nolora_vision.adapters.outfit import Outfit, Shelf, fitted, refresh_active, shelf_of, wear_adapter
from nolora_vision.surgery.adapter import ADAPTED_LAYERS, adapted_layers
from nolora_vision.surgery.disabling import is_disabled
from nolora_vision.surgery.inject import InjectionError
from nolora_vision.surgery.low_rank_adapter import Adapter
from nolora_vision.surgery.modulation_noise import batch_of
from nolora_vision.surgery.sites import BYPASS_FLAG, inside
from nolora_vision.surgery.wrappers import bare_model

Groups = Mapping[str | None, Tensor]
"""Which samples of the batch belong to which adapter: (n,) indices by name."""


@contextmanager
def mixed(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside the block the model takes batches in which every sample has an adapter of its own.

    The frozen layers run once for the whole batch. Outputs are those of running each adapter's samples apart, to
    rounding; where the heads differ in classes, the rest of a row is −∞. Not for several threads at once: the model
    itself is changed for the time of the block, or of a call with `adapter_names=`.

    Args:
        model: with adapters added by `add_adapter`.
        adapter_names: one for each sample; None is the bare backbone.

    Raises:
        ValueError: if a name is unknown, or the batch has another size.
        InjectionError: if the adapters differ in BatchNorm statistics, which a batch cannot mix.
    """
    bare = bare_model(model)
    shelf = shelf_of(bare)
    if isinstance(adapter_names, str) or not len(adapter_names):
        raise ValueError(f"adapter_names must be one name for each sample, got {adapter_names!r}.")
    refresh_active(bare, shelf)
    outfits = {name: shelf.outfit(name) for name in dict.fromkeys(adapter_names)}
    groups = {name: torch.tensor([i for i, wanted in enumerate(adapter_names) if wanted == name]) for name in outfits}
    with ExitStack() as stack:
        stack.enter_context(_statistics_on(bare, shelf, outfits))
        stack.enter_context(_flags_on(bare, outfits))
        paths = [*adapted_layers(bare), *(path for outfit in outfits.values() for path in outfit.adapters)]
        if is_disabled(bare):
            paths = []
        for path in dict.fromkeys(paths):  # also those that only the active adapter is on: it must not act here
            adapters = {name: outfit.adapters.get(path) for name, outfit in outfits.items()}
            stack.enter_context(_mixing(bare.get_submodule(path), adapters, groups))
        for path in shelf.bare.heads:
            stack.enter_context(_head_on(bare, path, outfits, groups))
        yield model


class AdapterNames:
    """Hooks of a model that take `adapter_names=` from its call: `model(images, adapter_names=["cats", "dogs"])`."""

    def __init__(self) -> None:
        self.open: list[ExitStack] = []

    def serve(self, model: nn.Module) -> list[Any]:
        """Put the hooks on a bare model."""
        return [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Start to mix if the call says so."""
        if "adapter_names" not in kwargs:
            return None
        kwargs = dict(kwargs)
        names = kwargs.pop("adapter_names")
        if names is None:
            return args, kwargs
        stack = ExitStack()
        stack.enter_context(mixed(model, names))
        self.open.append(stack)
        return args, kwargs

    def after(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        """Stop mixing, also when the model has failed."""
        if self.open:
            self.open.pop().close()


class _Mixture:
    """The update of one layer, for each group of samples by its own adapter."""

    def __init__(self, adapters: Mapping[str | None, Adapter | None], groups: Groups) -> None:
        self.adapters, self.groups = adapters, groups

    def __call__(self, x: Tensor, base: Tensor) -> Tensor:
        out = base.clone()
        for name, rows in _rows(self.groups, len(x), x.device).items():
            adapter = self.adapters[name]
            if adapter is not None:
                with batch_of(len(self.groups[name])) if adapter.training else nullcontext():
                    out[rows] = adapter(x[rows], base[rows])
        return out


class _MixedHead(nn.Module):
    """In the classifier's place: each group's features through its own head, as wide as the widest.

    A module and no hook: compiled models look at what module is there, not at hooks that come later.
    """

    def __init__(self, heads: Mapping[str | None, nn.Module], groups: Groups) -> None:
        super().__init__()
        self.heads, self.groups = dict(heads), groups  # not as children: they stay those of their adapters

    def forward(self, features: Tensor) -> Tensor:
        """features: (n, D, …) → (n, most classes, …), −∞ where a row's head has fewer."""
        rows = _rows(self.groups, len(features), features.device)
        parts = {name: self.heads[name](features[own]) for name, own in rows.items()}
        width, like = max(part.shape[1] for part in parts.values()), next(iter(parts.values()))
        out = like.new_full((len(features), width, *like.shape[2:]), float("-inf"))
        for name, own in rows.items():
            out[own, : parts[name].shape[1]] = parts[name].to(out.dtype)
        return out


@contextmanager
def _head_on(bare: nn.Module, path: str, outfits: Mapping[str | None, Outfit], groups: Groups) -> Iterator[None]:
    """Put the heads of all in the place of the one that the model wears."""
    owner, _, name = path.rpartition(".")
    worn = bare.get_submodule(path)
    heads = {key: fitted(outfit.heads[path], worn).train(worn.training) for key, outfit in outfits.items()}
    setattr(bare.get_submodule(owner), name, _MixedHead(heads, groups).train(worn.training))
    try:
        yield
    finally:
        setattr(bare.get_submodule(owner), name, worn)


def _rows(groups: Groups, length: int, device: torch.device) -> dict[str | None, Tensor]:
    """The rows of each group in a tensor whose leading dimension holds each sample's windows one after the other."""
    batch = sum(len(samples) for samples in groups.values())
    windows, rest = divmod(length, batch)
    if rest or not windows:
        raise ValueError(
            f"{batch} adapter_names for a batch whose layers see {length} rows: pass one name for each sample."
        )
    each = torch.arange(windows)
    return {name: (s[:, None] * windows + each).flatten().to(device) for name, s in groups.items()}


@contextmanager
def _mixing(layer: nn.Module, adapters: Mapping[str | None, Adapter | None], groups: Groups) -> Iterator[None]:
    """Let a layer mix; one that carries no adapter now is adapted for the time being."""
    bare = not isinstance(layer, ADAPTED_LAYERS)
    for adapter in adapters.values():
        if adapter is not None:
            wear_adapter(layer, adapter) if bare else adapter.to(layer.get_parameter("weight").device)
            adapter.train(layer.training)  # one that is not set keeps the mode in which it was added
    layer.mixture = _Mixture(adapters, groups)  # type: ignore[assignment]
    try:
        yield
    finally:
        if bare:
            layer.release()  # type: ignore[operator]
        else:
            del layer.mixture


@contextmanager
def _flags_on(model: nn.Module, outfits: Mapping[str | None, Outfit]) -> Iterator[None]:
    """The blocks must call their layers if any of the adapters needs it."""
    cured = {path for outfit in outfits.values() if outfit.injection is not None for path in outfit.injection.cured}
    before = {path: getattr(model.get_submodule(path), BYPASS_FLAG) for path in cured}
    try:
        for path in cured:
            setattr(model.get_submodule(path), BYPASS_FLAG, True)
        yield
    finally:
        for path, flag in before.items():
            setattr(model.get_submodule(path), BYPASS_FLAG, flag)


@contextmanager
def _statistics_on(bare: nn.Module, shelf: Shelf, outfits: Mapping[str | None, Outfit]) -> Iterator[None]:
    """Put the BatchNorm statistics of the adapters in the place of those that the model wears, if they differ.

    Raises:
        InjectionError: if the adapters differ in them.
    """
    heads = tuple(shelf.bare.heads)  # have their own, and each adapter its head
    worn = {name: bare.get_buffer(name) for name in shelf.bare.statistics if not inside(name, heads)}
    wanted = {key: _statistics_of(outfit, shelf, worn) for key, outfit in outfits.items()}
    (first, ours), *others = wanted.items()
    for name, theirs in others:
        if any(not torch.equal(ours[buffer], theirs[buffer]) for buffer in worn):
            raise InjectionError(
                f"{first!r} and {name!r} differ in BatchNorm statistics, which a batch cannot mix. Run their samples "
                f"apart with set_adapter."
            )
    places = [(bare.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], name) for name in worn]
    changed = [place for place in places if not torch.equal(ours[place[2]], worn[place[2]])]
    try:
        for module, attribute, name in changed:  # others in their place: the backward pass may need those before
            setattr(module, attribute, ours[name].clone())
        yield
    finally:
        for module, attribute, name in changed:
            setattr(module, attribute, worn[name])


def _statistics_of(outfit: Outfit, shelf: Shelf, worn: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """By buffer name, those of an adapter; of the one that is set as training may have moved them since."""
    if outfit is shelf.outfit(shelf.active):
        return worn
    found = {name: outfit.statistics.get(name, shelf.bare.statistics[name]) for name in worn}
    return {name: t.to(worn[name].device, worn[name].dtype) for name, t in found.items()}
