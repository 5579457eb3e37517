"""Any order of inject, eject, save, load, swap, fold, disable, train, cast, copy: the model equals its specification.

`stateful_spec.py` is the specification, `stateful_machine.py` what is compared after each step, the rules are in
`stateful_surgery.py` and `stateful_files.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

import nolora_vision
from nolora_vision import CheckpointError, ConfigError, InjectionError
from tests.adapters.stateful_files import Files
from tests.soak import times


class Life(Files):
    """The mistakes that a user may make."""

    # ------------------------------------------------------------------------------------------------------- mistakes

    @rule(data=st.data())
    def be_refused(self, data: st.DataObject) -> None:
        """What cannot be done is refused with its own error, and leaves the model as it was."""
        attempts = self.attempts()
        kind, message, attempt = attempts[data.draw(st.sampled_from(sorted(attempts)))]
        with self.unchanged(), pytest.raises(kind, match=message):
            attempt(self.model)

    def attempts(self) -> dict[str, tuple[type[Exception], str, Any]]:
        absent, n = self.folder / "absent", nolora_vision
        found: dict[str, tuple[type[Exception], str, Any]] = {
            "unknown field": (ConfigError, "Did you mean 'rank'", lambda m: n.inject(m, ranks=2)),
            "config of another type": (TypeError, "must be an AdapterConfig", lambda m: n.inject(m, {"rank": 2})),
            "load what is absent": (CheckpointError, "does not exist", lambda m: n.load_adapter(m, absent)),
            "add what is absent": (CheckpointError, "does not exist", lambda m: n.add_adapter(m, "new", absent)),
            "add without a name": (ValueError, "a name of its own", lambda m: n.add_adapter(m, "", absent)),
            "hold in fp32": (ValueError, "must be torch.bfloat16", lambda m: n.hold_frozen(m, torch.float32)),
            "save with wrong names": (
                ValueError,
                "class_names",
                lambda m: n.save_adapter(m, absent, class_names=["a"]),
            ),
        }
        if self.worn.config is None and self.shelf is None:
            found |= {
                "rank too large": (InjectionError, "rank 17 is larger", lambda m: n.inject(m, rank=17)),
                "no such block": (InjectionError, "there is no block 2", lambda m: n.inject(m, layers=[0, 2])),
                "no such layer": (InjectionError, "no layer matches", lambda m: n.inject(m, targets=("fc1", "fc3"))),
                "the head": (InjectionError, "belongs to the classifier", lambda m: n.inject(m, targets=("head",))),
                "an input that it cannot take": (
                    InjectionError,
                    "could not be run",
                    lambda m: n.inject(m, example_input=torch.zeros(1, 3, 17, 17)),
                ),
                "eject nothing": (InjectionError, "has no adapters", n.eject),
                "disable nothing": (InjectionError, "has no adapters", lambda m: n.disabled(m).__enter__()),
            }
        elif self.worn.config is not None:
            found["inject twice"] = (InjectionError, "already has adapters", n.inject)
        else:
            found["inject beside a shelf"] = (InjectionError, "has adapters by name", n.inject)
        if self.worn.config is None:
            found["fold nothing"] = (InjectionError, "has no adapters", n.fold)
        if self.shelf is None:
            found["set without a shelf"] = (InjectionError, "has no named adapters", lambda m: n.set_adapter(m, "a"))
            found["remove without a shelf"] = (InjectionError, "no named adapters", lambda m: n.remove_adapter(m, "a"))
        else:
            x = self.x.to(self.dtype)
            found["mix unknown"] = (ValueError, "No adapter is called", lambda m: m(x, adapter_names=["x", None, None]))
            found["mix too few"] = (ValueError, "one name for each sample", lambda m: m(x, adapter_names=[None, None]))
        return found


class ViT(Life):
    family = "test_vit"


class BEiT(Life):
    """Its blocks read qkv's weight and never call it, until they are told to."""

    family = "beit_base_patch16_224"


def search(machine: type[Life], examples: int) -> Any:
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=times(25, 20),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    return case


TestViT = search(ViT, times(200, 32))
TestBEiT = search(BEiT, times(50, 8))
