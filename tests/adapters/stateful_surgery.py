"""Rules of the stateful test: inject, eject, fold, train, cast, hold, copy, disable."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import ExitStack

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import nn

import nolora_vision
from nolora_vision import AdapterConfig, InjectionError
from nolora_vision.config import MODULATIONS, NONLINEARITIES
from tests.adapters.stateful_machine import Beside
from tests.adapters.stateful_spec import TARGETS, Head, Outfit, folded, is_plannable, merged, planned

NORM = "blocks.1.norm2.weight"
SEEDS = st.integers(0, 99)
CONFIGS = st.builds(
    AdapterConfig,
    rank=st.integers(1, 3),
    alpha=st.sampled_from((None, 1.0, 5.0)),
    rank_stabilized=st.booleans(),
    nonlinearity=st.sampled_from((*NONLINEARITIES, *["identity"] * 4)),  # the linear ones can be merged
    modulation=st.sampled_from(MODULATIONS),
    dropout=st.sampled_from((0.0, 0.25)),
    modulation_noise=st.sampled_from((0.0, 0.5)),
    targets=st.sampled_from(list(TARGETS)),
    layers=st.sampled_from((None, (0,), (-1,))),
    rank_pattern=st.sampled_from(({}, {"fc1": 4}, {"v": 1})),
    alpha_pattern=st.sampled_from(({}, {"mlp": 3.0}, {"q": 2.0})),
    share_down=st.booleans(),
).filter(is_plannable)


def reloaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": reloaded}


class Surgery(Beside):
    """What a user may do with a model and one adapter."""

    # ------------------------------------------------------------------------------------------------ inject and eject

    @precondition(lambda self: self.worn.config is None and self.shelf is None)
    @rule(config=CONFIGS, seed=st.one_of(st.none(), SEEDS, SEEDS))
    def inject(self, config: AdapterConfig, seed: int | None) -> None:
        updates = planned(config)
        if not updates:
            with self.unchanged(), pytest.raises(InjectionError, match="has no layer to adapt"):
                nolora_vision.inject(self.model, config)
            return
        assert nolora_vision.inject(self.model, config) is self.model
        self.injected(config)
        if seed is not None:
            self.set_values(seed)

    def injected(self, config: AdapterConfig, *, fresh: bool = True) -> None:
        """New adapters; of fresh ones what is drawn is taken over, and its bounds checked."""
        self.before = {**self.wants, **self.worn.head.wants}
        self.wants = dict.fromkeys(self.wants, False)
        self.worn.head.wants = dict.fromkeys(self.worn.head.wants, True)
        self.worn = Outfit(config, planned(config), self.worn.head)
        for u in self.worn.updates:
            for name, value in u.initial().items():
                t = self.take(u.prefix + name)
                assert tuple(t.shape) == u.shapes[name] and t.dtype == torch.float32
                right = not fresh or (t.any() if value is None else (t == value).all())
                assert right, f"{u.prefix}{name} starts at {t}"
                u.tensors[name] = t
            assert not fresh or u.tensors["lora_A"].abs().max() <= u.shapes["lora_A"][1] ** -0.5

    @precondition(lambda self: self.worn.config is not None or self.shelf is not None)
    @rule()
    def eject(self) -> None:
        assert nolora_vision.eject(self.model) is self.model
        self.worn = Outfit(None, [], self.worn.head)
        self.give_up_shelf()

    @precondition(lambda self: self.worn.config is not None)
    @rule()
    def fold(self) -> None:
        nolora_vision.fold(self.model)
        self.fold_specification()

    def fold_specification(self) -> None:
        folded(self.worn)
        for u in self.worn.updates:
            self.reconcile(u.tensors, f"{u.prefix}lora_B", "lora_B", 1e-2 if self.dtype == torch.bfloat16 else 1e-6)

    @precondition(lambda self: self.worn.config is not None)
    @rule()
    def merge(self) -> None:
        linear = all(u.f == "identity" and u.modulation != "gate" for u in self.worn.updates)
        if not linear:
            with self.unchanged(), pytest.raises(InjectionError, match="no matrix equals it"):
                nolora_vision.fold(self.model, merge=True)
            return
        nolora_vision.fold(self.model, merge=True)
        self.release()
        merged(self.worn, self.base)
        for u in self.worn.updates:
            name = f"{u.path}.weight"
            self.reconcile(self.base, name, name, 1e-2 if self.dtype == torch.bfloat16 else 1e-6)
        self.saved = {}  # they belong to the backbone that was
        self.worn = Outfit(None, [], self.worn.head)
        self.give_up_shelf()

    # -------------------------------------------------------------------------------------------------------- training

    @rule(seed=SEEDS)
    def set_values(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensors, key in self.worn.named():
            value = torch.randn(tensors[key].shape, generator=generator) * 0.4
            tensors[key] = value.to(tensors[key].dtype)
            with torch.no_grad():
                self.model.get_parameter(name).copy_(value)

    @precondition(lambda self: self.worn.config and not self.noisy and not self.held and self.dtype != torch.bfloat16)
    @rule()
    def train_a_step(self) -> None:
        """The gradients are those of the reference, on what wants them and on nothing else."""
        self.model(self.x.to(self.dtype)).square().mean().backward()
        leaves = {name: (t, key) for name, t, key in self.worn.named()}
        leaves |= {name: (self.base, name) for name, wants in self.wants.items() if wants}
        for tensors, key in leaves.values():
            tensors[key].requires_grad_(True)
        loss = self.reference.close(self.base, self.worn, self.x, active=not self.disabled).square().mean()
        wanted = torch.autograd.grad(loss, [t[key] for t, key in leaves.values()], allow_unused=True)
        largest = max(float(g.abs().max()) for g in wanted if g is not None)
        for (name, (tensors, key)), gradient in zip(leaves.items(), wanted, strict=True):
            parameter = self.model.get_parameter(name)
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            error = (got - (0 if gradient is None else gradient)).abs().max()
            assert error <= 1e-3 * (1e-6 + largest), f"the gradient of {name} is off by {error:.2g}"
            with torch.no_grad():
                parameter -= 0.05 / (1 + largest) * got
            tensors[key] = self.take(name)
        self.model.zero_grad()

    @rule(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        self.model.train(training)
        self.training = training

    @rule()
    def freeze_backbone(self) -> None:
        nolora_vision.freeze_backbone(self.model)
        self.wants = dict.fromkeys(self.wants, False)
        self.worn.head.wants = dict.fromkeys(self.worn.head.wants, True)

    @precondition(lambda self: self.worn.config is not None and self.shelf is None)
    @rule()
    def train_a_norm_too(self) -> None:
        self.model.get_parameter(NORM).requires_grad_(True)
        self.wants[NORM] = True

    @precondition(lambda self: self.dtype == torch.float32)
    @rule(classes=st.sampled_from((2, 3, 4)))
    def reset_classifier(self, classes: int) -> None:
        self.model.reset_classifier(classes)
        names = ("head.weight", "head.bias")
        self.worn.head = Head({name: self.take(name) for name in names}, dict.fromkeys(names, True))

    # ----------------------------------------------------------------------------------------------- types, and copies

    @precondition(lambda self: not self.held)
    @rule(dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.dtype = dtype
        self.base = {name: t.to(dtype) for name, t in self.base.items()}
        for _, tensors, key in self.worn.named():
            tensors[key] = tensors[key].to(dtype)

    @precondition(lambda self: self.dtype == torch.float32)
    @rule(keep=st.booleans())
    def hold(self, keep: bool) -> None:
        layers = {p for p, m in self.pristine.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        frozen = {n for n, wants in self.wants.items() if not wants and n.rpartition(".")[0] in layers}
        self.held |= dict.fromkeys(frozen - self.held.keys() - self.loaded, keep)
        assert (
            nolora_vision.hold_frozen(self.model, torch.bfloat16, keep_original=keep).weights.keys() == self.held.keys()
        )

    @rule()
    def release_held(self) -> None:
        assert nolora_vision.release_frozen(self.model) == bool(self.held)
        self.release()

    @precondition(lambda self: not self.disabled)
    @rule(way=st.sampled_from(sorted(WAYS)))
    def go_on_with_a_copy(self, way: str) -> None:
        """The original then is ruined, which the copy must not notice."""
        original, self.model = self.model, WAYS[way](self.model)
        with torch.no_grad():
            for t in [*original.parameters(), *original.buffers()]:
                t.zero_()
        self.remember_modules()

    @rule(seed=SEEDS)
    def state_dict_and_back(self, seed: int) -> None:
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1)
        self.model.load_state_dict(state)

    # -------------------------------------------------------------------------------------------------------- disabled

    @precondition(lambda self: self.worn.config is not None and len(self.contexts) < 3)
    @rule()
    def enter_disabled(self) -> None:
        stack = ExitStack()
        assert stack.enter_context(nolora_vision.disabled(self.model)) is self.model
        self.contexts.append(stack)

    @precondition(lambda self: self.contexts)
    @rule()
    def leave_disabled(self) -> None:
        self.contexts.pop().close()
