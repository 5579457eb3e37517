"""Rules of the stateful test: save and load, and adapters by name."""

from __future__ import annotations

import copy
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import nolora_vision
from nolora_vision import AdapterConfig, CheckpointError
from tests.adapters.stateful_machine import Beside
from tests.adapters.stateful_spec import Head, Outfit, Saved, Shelf, planned
from tests.adapters.stateful_surgery import Surgery

POOL = {
    "default": AdapterConfig(rank=2),
    "lora": AdapterConfig(rank=3, alpha=5.0, nonlinearity="identity", modulation="vector", targets="all"),
    "values": AdapterConfig(rank=2, rank_stabilized=True, nonlinearity="tanh", modulation="none", targets=("q", "v")),
    "last": AdapterConfig(rank=1, alpha_pattern={"mlp": 3.0}, nonlinearity="aurora", targets="mlp", layers=(-1,)),
    "noisy": AdapterConfig(rank=2, modulation_noise=0.5, dropout=0.25, targets=("attn.proj",), modulation="none"),
    "norm": AdapterConfig(rank=1, targets="mlp", nonlinearity="gelu"),
    "head": AdapterConfig(),
}
"""The last is a head of 4 classes alone, the one before has a norm that trained too."""
NAMES = st.sampled_from(("a", "b", "default"))
WHERE = st.sampled_from(("x", "y"))
PLACES = st.sampled_from(("x", "y", *POOL))


class Files(Surgery):
    """What a user may do with directories and with several adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.saved = dict(self.pool())

    @classmethod
    @cache
    def pool(cls) -> dict[str, Saved]:
        """Adapters that others have saved: directories that are there from the beginning."""
        cls.pool_folder = Path(cls.library.name)
        found: dict[str, Saved] = {}
        for seed, (place, config) in enumerate(POOL.items()):
            other = cls.__new__(cls)
            Beside.__init__(other)
            if place == "head":
                other.freeze_backbone()
                other.reset_classifier(4)
                other.set_values(seed)
            else:
                other.inject(config, seed)
            if place == "norm":
                other.train_a_norm_too()
                other.train_a_step()
            other.save(place, None)
            shutil.copytree(other.folder / place, cls.pool_folder / place)
            found |= other.saved
            other.teardown()
        return found

    def at(self, place: str) -> Path:
        """The directory of this name."""
        return (self.pool_folder if place in POOL and place in self.saved else self.folder) / place

    # --------------------------------------------------------------------------------------------------- save and load

    @rule(place=WHERE, dtype=st.sampled_from((None, "bfloat16")))
    def save(self, place: str, dtype: Any) -> None:
        with self.unchanged():
            nolora_vision.save_adapter(self.model, self.at(place), dtype=dtype)
        saved = Saved(copy.deepcopy(self.worn), {name: self.base[name].clone() for name in self.trained_backbone})
        if dtype is not None:
            for _, tensors, key in saved.outfit.named():
                tensors[key] = tensors[key].bfloat16()
            saved.brought = {name: t.bfloat16() for name, t in saved.brought.items()}
        self.saved[place] = saved

    @rule(place=PLACES, head=st.booleans())
    def load(self, place: str, head: bool) -> None:
        if self.refusal_of(place, head=head):
            with self.unchanged(), pytest.raises(CheckpointError):
                nolora_vision.load_adapter(self.model, self.at(place), head=head)
            return
        saved = self.saved[place]
        assert nolora_vision.load_adapter(self.model, self.at(place), head=head) is self.model
        if saved.outfit.config is not None and self.worn.config is None:
            self.injected(saved.outfit.config, fresh=False)
        self.fill(self.worn, saved.outfit, head=head)
        for name, t in saved.brought.items():
            self.base[name] = t.to(self.base[name].dtype)
            self.held.pop(name, None)
        self.loaded = set(saved.brought)

    def fill(self, outfit: Outfit, saved: Outfit, *, head: bool = True) -> None:
        """Values from a directory, in the types that are there; scales are the config's."""
        source = {name: tensors[key] for name, tensors, key in saved.named()}
        for name, tensors, key in outfit.named():
            if head or ".adapter." in name:
                tensors[key] = source[name].to(tensors[key].dtype).clone()

    def refusal_of(self, place: str, *, head: bool) -> str:
        """Why a directory does not fit the model; '' if it does."""
        if place not in self.saved:
            return "absent"
        saved, config = self.saved[place], self.saved[place].outfit.config
        if head and saved.outfit.head.classes != self.worn.head.classes:
            return "other classes"
        if self.worn.config is not None and config != self.worn.config:
            return "another config"
        if self.shelf is not None and saved.brought:
            return "weights that others share"
        if self.shelf is not None and config is not None and self.worn.config is None:
            return "nowhere to put it"
        needed = self.trained_backbone if self.worn.config is not None else self.loaded if config is not None else set()
        return "weights are missing" if needed - saved.brought.keys() else ""

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), way=st.sampled_from(("load_adapter", "from_pretrained")))
    def load_into_a_fresh_model(self, data: st.DataObject, way: str) -> None:
        """It computes what it computed where it was saved, whatever has become of that model since."""
        place = data.draw(st.sampled_from(sorted(self.saved)))
        saved, model = self.saved[place], copy.deepcopy(self.pristine)
        base = {name: t.float() for name, t in self.base.items()}
        model.load_state_dict({name: t for name, t in base.items() if name not in saved.brought}, strict=False)
        model.reset_classifier(saved.outfit.head.classes)
        if way == "load_adapter":
            nolora_vision.load_adapter(model, self.at(place))
        else:
            nolora_vision.from_pretrained(self.at(place), model=model)
        wanted = self.reference.close(base | saved.brought, saved.outfit, self.x)
        with torch.no_grad():
            error = (model(self.x) - wanted).abs().max() / (1 + wanted.abs().max())
        assert error <= 3e-5, f"a fresh model is off by {error:.2g}"

    # -------------------------------------------------------------------------------------------------- named adapters

    @rule(name=NAMES, place=PLACES)
    def add(self, name: str, place: str) -> None:
        first = self.shelf is None
        taken = set(self.shelf.outfits) if self.shelf else {"default"} if self.worn.config else set()
        shared = (self.shelf or self.worn.config) and self.trained_backbone
        saved = self.saved.get(place)
        kind: Any = ValueError if name in taken else CheckpointError
        if name in taken or saved is None or saved.brought or shared or self.loaded:
            with self.unchanged(), pytest.raises(kind):
                nolora_vision.add_adapter(self.model, name, self.at(place))
            return
        assert nolora_vision.add_adapter(self.model, name, self.at(place)) is self.model
        if first:
            if self.worn.config is None:
                self.before = {**self.wants, **self.worn.head.wants}
            self.shelf = Shelf({}, None, self.worn.head, self.before)
            if self.worn.config is not None:
                self.shelf.outfits["default"], self.shelf.active = self.worn, "default"
        assert self.shelf is not None
        self.wants = dict.fromkeys(self.wants, False)
        self.shelf.outfits[name] = self.added(saved.outfit)
        if len(self.shelf.outfits) == 1:
            self.shelf.active = name
            self.wear(self.shelf.outfits[name])

    def added(self, saved: Outfit) -> Outfit:
        """What a directory becomes on a shelf: adapters in fp32, the head in the type of the model's own."""
        kind = self.worn.head.tensors["head.weight"].dtype
        head = Head(
            {n: t.to(kind).clone() for n, t in saved.head.tensors.items()}, dict.fromkeys(saved.head.tensors, True)
        )
        updates = [] if saved.config is None else planned(saved.config)
        for update, source in zip(updates, saved.updates, strict=True):
            update.tensors = {name: t.float().clone() for name, t in source.tensors.items()}
        return Outfit(saved.config, updates, head)

    @property
    def there(self) -> Shelf:
        """The shelf, where there is one."""
        assert self.shelf is not None
        return self.shelf

    @precondition(lambda self: self.shelf is not None)
    @rule(name=st.one_of(st.none(), NAMES))
    def swap(self, name: str | None) -> None:
        if name is not None and name not in self.there.outfits:
            with self.unchanged(), pytest.raises(ValueError, match=f"No adapter is called '{name}'"):
                nolora_vision.set_adapter(self.model, name)
            return
        assert nolora_vision.set_adapter(self.model, name) is self.model
        self.set(name)

    def set(self, name: str | None) -> None:
        self.wear(Outfit(None, [], self.there.bare_head) if name is None else self.there.outfits[name])
        self.there.active = name

    @precondition(lambda self: self.shelf is not None)
    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name not in self.there.outfits:
            with self.unchanged(), pytest.raises(ValueError, match=f"No adapter is called '{name}'"):
                nolora_vision.remove_adapter(self.model, name)
            return
        nolora_vision.remove_adapter(self.model, name)
        if self.there.active == name:
            self.set(None)
        del self.there.outfits[name]
        if not self.there.outfits:
            self.give_up_shelf()

    @precondition(lambda self: self.shelf is not None and not self.training)
    @rule(data=st.data(), keyword=st.booleans())
    def mix(self, data: st.DataObject, keyword: bool) -> None:
        """Each image by an adapter of its own."""
        names = data.draw(st.lists(st.sampled_from([None, *self.there.outfits]), min_size=3, max_size=3))
        x = self.x.to(self.dtype)
        with torch.no_grad():
            if keyword:
                got = self.model(x, adapter_names=names)
            else:
                with nolora_vision.mixed(self.model, names):
                    got = self.model(x)
        kind = self.worn.head.tensors["head.weight"].dtype
        for i, name in enumerate(names):
            outfit = Outfit(None, [], self.there.bare_head) if name is None else self.there.outfits[name]
            outfit.head.tensors = {n: t.to(kind) for n, t in outfit.head.tensors.items()}
            classes = outfit.head.classes
            self.compare(got[i : i + 1, :classes], outfit, active=not self.disabled, rows=slice(i, i + 1))
            assert (got[i, classes:] == float("-inf")).all()
