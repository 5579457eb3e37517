"""A model with adapters beside its specification: what both must agree on after each step."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant
from torch import Tensor, nn

import nolora_vision
from nolora_vision.surgery.adapter import NoLoRALinear
from tests.adapters.stateful_spec import Head, Outfit, Reference, Saved, Shelf, bare_model, cured

TOLERANCE = {torch.float32: 3e-5, torch.float64: 3e-5, torch.bfloat16: 0.25}
"""Of logits, relative to 1 + the largest. fp32: rounding through two blocks, measured 4e-6 at most; of a double model
too, as its adapters may be fp32. bf16 has 8 bits, which two blocks of width 16 and adapters of any slope make a few
percent: its exact part are the values, and the functions without adapters, which are compared bit for bit."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
NOTES = ("_nolora_injection", "_nolora_shelf", "_nolora_held", "_nolora_info", "_nolora_loaded", "_nolora_disabled")


def fingerprint(model: nn.Module) -> list[Any]:
    """All of a model that a refused call must leave: modules, their attributes and hooks, tensors to the bit."""
    found: list[Any] = []
    for path, module in model.named_modules():
        hooks = [sorted(id(hook) for hook in getattr(module, name).values()) for name in HOOKS]  # none needs another
        found.append((path, id(module), type(module), module.training, sorted(vars(module)), hooks))
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        found.append((name, id(t), t.dtype, t.requires_grad, t.grad is None, t.detach().clone().view(torch.uint8)))
    found.append({note: repr(vars(model).get(note)) for note in NOTES if note != "_nolora_shelf"})
    found.append((nolora_vision.adapter_names(model), nolora_vision.active_adapter(model)))
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two fingerprints are equal."""

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, tuple) and isinstance(x[-1], Tensor):
            return x[:-1] == y[:-1] and torch.equal(x[-1], y[-1])
        return x == y

    return len(a) == len(b) and all(map(equal, a, b))


class Beside(RuleBasedStateMachine):
    """The model, and what it should be; rules are in test_stateful.py."""

    family: ClassVar[str]
    pristine: ClassVar[nn.Module]
    reference: ClassVar[Reference]
    library: ClassVar[tempfile.TemporaryDirectory[str]]
    pool_folder: ClassVar[Path]

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "family"):
            cls.pristine = bare_model(cls.family)
            cls.reference = Reference(cls.pristine)
            cls.library = tempfile.TemporaryDirectory()  # removed when Python ends

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.contexts: list[ExitStack] = []
        torch.manual_seed(1)
        self.x = torch.randn(3, 3, 16, 16)
        self.model = copy.deepcopy(self.pristine)
        state = {name: p.detach().clone() for name, p in self.pristine.named_parameters()}
        head = Head({name: state.pop(name) for name in ("head.weight", "head.bias")}, {})
        head.wants = dict.fromkeys(head.tensors, True)
        self.base, self.wants = state, dict.fromkeys(state, True)
        self.before: dict[str, bool] = {}
        self.worn, self.shelf = Outfit(None, [], head), None
        self.shelf: Shelf | None
        self.saved: dict[str, Saved] = {}
        self.held: dict[str, bool] = {}
        self.loaded: set[str] = set()
        self.training, self.dtype = False, torch.float32
        self.remember_modules()

    def teardown(self) -> None:
        """Leave no files and no open blocks."""
        while self.contexts:
            self.contexts.pop().close()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------------------------------------ the model

    def remember_modules(self) -> None:
        """The modules of the backbone: they must stay the same objects, with the same attributes."""
        own = self.pristine.named_modules()
        self.modules = {path: self.model.get_submodule(path) for path, _ in own if not path.startswith("head")}

    @property
    def disabled(self) -> bool:
        """Whether the model is inside a `disabled` block."""
        return bool(self.contexts)

    @property
    def noisy(self) -> bool:
        """Whether its outputs are random now."""
        config = self.worn.config
        return self.training and config is not None and bool(config.dropout or config.modulation_noise)

    @property
    def trained_backbone(self) -> set[str]:
        """Weights of the backbone that belong to the adapter."""
        return {name for name, wants in self.wants.items() if wants} | self.loaded

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What happens inside leaves the model as it was."""
        before, random = fingerprint(self.model), torch.get_rng_state()
        yield
        assert same(fingerprint(self.model), before), "a call that should change nothing changed the model"
        del random

    def take(self, name: str) -> Tensor:
        """A copy of the model's parameter of this name."""
        return self.model.get_parameter(name).detach().clone()

    def reconcile(self, tensors: dict[str, Tensor], name: str, key: str, rtol: float) -> None:
        """A value that was computed must be near the specification's, which goes on with the model's own."""
        got, wanted = self.take(name), tensors[key]
        assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, wanted {wanted.dtype}"
        error = (got.double() - wanted.double()).abs().max() / (1e-3 + wanted.double().abs().max())
        assert error <= rtol, f"{name} is off by {error:.2g}"
        tensors[key] = got

    def give_up_shelf(self) -> None:
        """What `eject` and the last `remove_adapter` do: flags as before, weights released, nobody on the shelf."""
        self.wants = {name: self.before[name] for name in self.wants}
        self.worn.head.wants = {name: self.before[name] for name in self.worn.head.wants}
        self.shelf = None
        self.release()

    def release(self) -> None:
        """Held weights as they were, or rounded where the originals were not kept."""
        for name, kept in self.held.items():
            if not kept:
                self.base[name] = self.base[name].bfloat16().float()
        self.held = {}

    def wear(self, outfit: Outfit) -> None:
        """Its head takes the type of the one that it replaces."""
        kind = self.worn.head.tensors["head.weight"].dtype
        outfit.head.tensors = {name: t.to(kind) for name, t in outfit.head.tensors.items()}
        self.worn = outfit

    # ------------------------------------------------------------------------------------------------- what must be so

    @invariant()
    def parameters_are_those_of_the_specification(self) -> None:
        """Names, bits, types, and who wants a gradient."""
        wanted = {n: (t.bfloat16() if n in self.held else t, self.wants[n]) for n, t in self.base.items()}
        wanted |= {name: (t[key], True) for name, t, key in self.worn.named() if ".adapter." in name}
        wanted |= {n: (t, self.worn.head.wants[n]) for n, t in self.worn.head.tensors.items()}
        got = dict(self.model.named_parameters())
        assert got.keys() == wanted.keys(), got.keys() ^ wanted.keys()
        for name, (t, wants) in wanted.items():
            assert got[name].dtype == t.dtype, f"{name}: {got[name].dtype}, wanted {t.dtype}"
            assert torch.equal(got[name].view(torch.uint8), t.view(torch.uint8)), f"{name} has other values"
            assert got[name].requires_grad == wants, f"{name}.requires_grad is {not wants}"
            assert got[name].grad is None, f"{name} has a gradient"
        numbers = sum(p.numel() for p in nolora_vision.adapter_parameters(self.model))
        assert numbers == sum(t[key].numel() for n, t, key in self.worn.named() if ".adapter." in n)

    @invariant()
    def modules_are_the_original_ones(self) -> None:
        """The same objects, classes, attributes and modes; no hook that nobody needs; flags of the cure."""
        adapted = {update.path for update in self.worn.updates}
        config, shelf = self.worn.config, self.shelf is not None
        hooks = bool(self.held) + bool(config is not None and config.modulation_noise) + shelf
        for path, module in self.model.named_modules():
            assert path.startswith("head") or module.training == self.training, f"{path}.training"
            if ".adapter" in path or path.startswith("head"):
                continue
            plain = self.pristine.get_submodule(path)
            assert module is self.modules[path], f"{path} is another object"
            assert type(module) is (NoLoRALinear if path in adapted else type(plain)), path
            extra = vars(module).keys() - vars(plain).keys()
            assert extra <= ({"adapter_enabled"} if path in adapted else set() if path else set(NOTES)), (path, extra)
            counts = {len(module._forward_hooks), len(module._forward_pre_hooks)}
            assert counts == ({hooks} if not path else {0}), f"{path} has {counts} hooks"
            if hasattr(module, "qkv_bias_separate"):
                assert module.qkv_bias_separate == (path in cured(self.worn)), f"the flag of {path}"
        assert {p for p, _ in self.model.named_modules()} >= self.modules.keys()
        assert hasattr(self.model, "_nolora_injection") == (config is not None)
        assert self.model.num_classes == self.worn.head.classes == self.model.get_classifier().out_features

    @invariant()
    def names_are_those_of_the_specification(self) -> None:
        """Which adapters there are, and which one is set."""
        names, active = ((), None) if self.shelf is None else (tuple(self.shelf.outfits), self.shelf.active)
        assert nolora_vision.adapter_names(self.model) == names
        assert nolora_vision.active_adapter(self.model) == active

    @invariant()
    def outputs_are_those_of_the_specification(self) -> None:
        """Bit for bit those of the pristine model where no adapter does anything, else to rounding."""
        if self.noisy:
            return
        with torch.no_grad():
            got = self.model(self.x.to(self.dtype))
        self.compare(got, self.worn, active=not self.disabled)

    @torch.no_grad()
    def compare(self, got: Tensor, outfit: Outfit, *, active: bool = True, rows: Any = slice(None)) -> None:
        """Logits of some of the images with the specification's."""
        idle = not active or all(not u.tensors["lora_B"].any() for u in outfit.updates)
        if idle and rows == slice(None):
            held = torch.bfloat16 if self.held else None
            values = {n: t.bfloat16() if n in self.held else t for n, t in self.base.items()}
            exact = self.reference.exact(values, outfit, self.x, held)
            assert got.dtype == exact.dtype and torch.equal(got, exact), "not bit for bit as the pristine model"
        wanted = self.reference.close(self.base, outfit, self.x[rows].to(self.dtype), active=active)
        error = (got.double() - wanted).abs().max() / (1 + wanted.abs().max())
        assert error <= TOLERANCE[torch.bfloat16 if self.held else self.dtype], f"outputs are off by {error:.2g}"
