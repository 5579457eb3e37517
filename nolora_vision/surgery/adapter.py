"""NoLoRALinear and its 1×1-convolution twin: a frozen layer that adds its adapter's update; knows no timm.

Shapes: `...` any leading dimensions, `B` batch, `D` in_features, `E` out_features, `H` `W` image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from nolora_vision.config import AdapterConfig
from nolora_vision.kernels import Frozen
from nolora_vision.kernels.eager import autocasts
from nolora_vision.surgery.low_rank_adapter import Adapter, make_adapter

Update = Callable[[Tensor, Tensor], Tensor]
"""(x, base) ↦ base with an update added."""


class AdaptedLayer(nn.Module):
    """What NoLoRALinear and NoLoRAConv2d share: the frozen layer's own forward, then the adapter's update.

    An adapted layer *is* the frozen layer, with another class and one more child: weight, bias, state-dict keys, hooks
    and every reference to it stay, and `release` gives the very same object its old class back.
    """

    adapter: Adapter
    adapter_enabled: bool
    mixture: Update | None = None
    """What runs instead of the adapter while a batch mixes several; see `mixing.py`."""
    base_class: ClassVar[type[nn.Module]]

    @classmethod
    def adopt(cls: type[_Layer], layer: nn.Module, adapter: Adapter) -> _Layer:
        """Turn a frozen layer into an adapted one, in place.

        Raises:
            TypeError: if the layer is not exactly of the class that this one adapts.
        """
        if type(layer) is not cls.base_class:
            raise TypeError(f"{cls.__name__} adapts {cls.base_class.__name__} only, got {type(layer).__name__}.")
        layer.__class__ = cls  # type: ignore[assignment]
        assert isinstance(layer, cls)
        layer.adapter = adapter
        layer.adapter_enabled = True
        adapter.train(layer.training)
        return layer

    def release(self) -> nn.Module:
        """Undo `adopt`: drop the adapter and return the same object as the plain layer it was."""
        del self.adapter
        del self.adapter_enabled
        self.__dict__.pop("mixture", None)
        self.__class__ = self.base_class  # type: ignore[assignment]
        return self


_Layer = TypeVar("_Layer", bound=AdaptedLayer)


class NoLoRALinear(AdaptedLayer, nn.Linear):
    """y = W x + b + s · B (v ⊙ f_θ(A x)) with W and b frozen; x: (..., D) → y: (..., E).

    Args:
        in_features: D.
        out_features: E.
        bias: whether the frozen layer has b.
        config: the adapter; its targets are not used here.
    """

    base_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: AdapterConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.adapter = make_adapter(in_features, out_features, config or AdapterConfig(), device=device)
        self.adapter_enabled = True

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., D) → (..., E)."""
        if not self.adapter_enabled:
            return nn.Linear.forward(self, input)
        input = cast_for_autocast(input)
        if self.mixture is None:
            return self.adapter(input, Frozen(self.weight, self.bias))
        return self.mixture(input, nn.Linear.forward(self, input))


class NoLoRAConv2d(AdaptedLayer, nn.Conv2d):
    """The same update at every pixel of a frozen 1×1 convolution; x: (B, D, H, W) → y: (B, E, H', W'), in x's layout.

    Args:
        in_channels: D.
        out_channels: E.
        stride: of the frozen convolution; the adapter reads the pixels that it reads.
        bias: whether the frozen layer has b.
        config: the adapter; its targets are not used here.
    """

    base_class = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        config: AdapterConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, 1, stride, bias=bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.adapter = make_adapter(in_channels, out_channels, config or AdapterConfig(), device=device)
        self.adapter_enabled = True

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, D, H, W) → (B, E, H', W'); also without the batch dimension."""
        if not self.adapter_enabled:
            return nn.Conv2d.forward(self, input)
        input = cast_for_autocast(input)
        base = nn.Conv2d.forward(self, input)
        seen = input[..., :: self.stride[0], :: self.stride[1]]
        update = self.adapter if self.mixture is None else self.mixture
        y = update(seen.movedim(-3, -1), base.movedim(-3, -1)).movedim(-1, -3)
        if y.stride() == base.stride():
            return y
        if torch._C._are_functorch_transforms_active():  # of vmap's samples y may have one each where base is for all
            return y.new_empty_strided(base.shape, base.stride()).copy_(y)
        return torch.empty_like(base).copy_(y)


ADAPTED_LAYERS: tuple[type[NoLoRALinear] | type[NoLoRAConv2d], ...] = (NoLoRALinear, NoLoRAConv2d)


def adapted_type(layer: nn.Module) -> type[NoLoRALinear] | type[NoLoRAConv2d]:
    """The adapted class for a bare layer."""
    return NoLoRAConv2d if isinstance(layer, nn.Conv2d) else NoLoRALinear


def adapted_layers(model: nn.Module) -> dict[str, NoLoRALinear | NoLoRAConv2d]:
    """Every adapted layer of a model by its module path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, ADAPTED_LAYERS)}


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast x as autocast would inside the frozen layer, so that layer and adapter share one cast instead of two."""
    kind = x.device.type
    if not autocasts(kind) or x.dtype == torch.float64:
        return x
    y = x.to(torch.get_autocast_dtype(kind))
    if y is not x and not torch.compiler.is_compiling() and x.grad_fn is not None and x._version:
        torch.autograd.graph.increment_version(y)  # so that `origin_of` knows that x was written into
    return y
