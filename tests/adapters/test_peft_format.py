"""PEFT's LoRA format, against PEFT itself: the same logits both ways, and refusals that leave everything as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nolora_vision
from nolora_vision import CheckpointError, PeftFormatError, from_pretrained, load_adapter, save_adapter
from nolora_vision.adapters.peft_format import read_peft
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.inject import injection_of
from tests.families import FAMILIES

# fp32: PEFT scales B A x after the product where ours may scale before, and sums in another order. The largest
# difference measured over these families was 6e-7 on logits of up to 5; 1e-5 leaves room for other machines' kernels.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Small:
    """A model like those of the fixture `family`."""

    def __init__(self, name: str, size: int, **options: Any) -> None:
        self.name, self.size, self.options = name, size, options

    def build(self) -> nn.Module:
        model = timm.create_model(self.name, num_classes=7, **self.options)
        for parameter in (p for p in model.parameters() if not p.any()):
            nn.init.normal_(parameter, std=0.5)
        return model

    def images(self, n: int = 1) -> torch.Tensor:
        return torch.randn(n, 3, self.size, self.size)


VIT = Small("test_vit", 160)
SWIN = Small("swinv2_tiny_window8_256", 64, img_size=64, window_size=4, depths=(1, 1), embed_dim=32, num_heads=(1, 2))


def build(family: Any = VIT, *, flag: bool = False) -> nn.Module:
    torch.manual_seed(3)
    model = family.build().eval()
    if flag:
        for module in model.modules():
            if getattr(module, "qkv_bias_separate", None) is False:
                module.qkv_bias_separate = True
    return model


def has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


def randomise(model: nn.Module) -> None:
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1)


def ours(family: Any = VIT, **options: Any) -> nn.Module:
    """A trained LoRA of this library."""
    options = {"rank": 3, "nonlinearity": "identity", "modulation": "none"} | options
    model = nolora_vision.inject(build(family), **options)
    randomise(model)
    return model.eval()


def theirs(family: Any = VIT, **options: Any) -> peft.PeftModel:
    """A trained LoRA of PEFT."""
    options = {"r": 4, "target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]} | options
    model = peft.get_peft_model(build(family, flag=True), peft.LoraConfig(**options))
    randomise(model)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, family: Any = VIT) -> torch.Tensor:
    torch.manual_seed(7)
    return model(family.images(2))


def in_peft(directory: Path, family: Any = VIT, *, flag: bool = True) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(build(family, flag=flag), str(directory)).eval()


def save(model: nn.Module, directory: Path, **options: Any) -> Path:
    """In PEFT's format, with the warning exactly where a bypass was cured."""
    if injection_of(model).cured:
        with pytest.warns(UserWarning, match=r"timm never calls the qkv of .* unless qkv_bias_separate is set"):
            return save_adapter(model, directory, format="peft", **options)
    return save_adapter(model, directory, format="peft", **options)


def test_ours_gives_the_same_logits_in_peft_and_back(family: Any, tmp_path: Path) -> None:
    model = ours(family, modulation="vector", alpha=5)
    directory = save(model, tmp_path / "a")
    expected = logits(model, family)
    assert (expected - logits(build(family), family)).abs().max() > 0.1  # head and adapters do something
    torch.testing.assert_close(logits(in_peft(directory, family), family), expected, **TOLERANCE)
    back = from_pretrained(directory, model=build(family, flag=True))
    torch.testing.assert_close(logits(back, family), expected, **TOLERANCE)


def test_peft_gives_the_same_logits_here_and_back(family: Any, tmp_path: Path) -> None:
    targets = list(adapted_layers(ours(family)))
    heads = [path for path in ("head.fc", "head", "head_dist") if has(build(family), path)]
    heads = heads[:1] if heads[0] == "head.fc" else heads
    model = theirs(family, target_modules=targets, modules_to_save=heads, lora_alpha=6)
    model.save_pretrained(tmp_path / "a")
    loaded = load_adapter(build(family, flag=True), tmp_path / "a").eval()
    torch.testing.assert_close(logits(loaded, family), logits(model, family), **TOLERANCE)
    save_adapter(loaded, tmp_path / "own")
    assert torch.equal(logits(load_adapter(build(family), tmp_path / "own"), family), logits(loaded, family))


OURS: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 7.5},
    "rank_stabilized": {"rank_stabilized": True, "alpha": 5},
    "patterns": {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"blocks.1.attn.qkv": 9}},
    "patterns, stabilized": {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc2": 9}, "rank_stabilized": True},
    "q and v": {"targets": ("q", "v"), "alpha": 5},
    "q and v, stabilized": {"targets": ("q", "v"), "rank_stabilized": True, "modulation": "vector"},
    "q and v, one A": {"targets": ("q", "v"), "share_down": True, "alpha": 5},
    "last layers": {"layers": [-2, -1], "targets": "all"},
    "expression": {"targets": r"blocks\.[02]\..*fc1"},
    "dropout": {"dropout": 0.2},
}


@pytest.mark.parametrize("options", OURS.values(), ids=OURS.keys())
def test_options_of_ours(options: dict[str, Any], tmp_path: Path) -> None:
    model = ours(**options)
    directory = save(model, tmp_path / "a")
    again = in_peft(directory)
    torch.testing.assert_close(logits(again), logits(model), **TOLERANCE)
    torch.testing.assert_close(logits(load_adapter(build(), directory)), logits(model), **TOLERANCE)
    again.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    torch.testing.assert_close(logits(load_adapter(build(), tmp_path / "b")), logits(model), **TOLERANCE)


THEIRS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"fc1": 2, "^blocks.1.attn.qkv": 5}, "alpha_pattern": {r"blocks\.[01]\..*": 9}},
    "patterns, rslora": {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"qkv": 9}, "use_rslora": True},
    "expression": {"target_modules": r"blocks\.[02]\..*\.(qkv|proj)"},
    "all linear layers": {"target_modules": "all-linear", "exclude_modules": ["head"]},
    "some blocks": {"layers_to_transform": [1], "layers_pattern": "blocks"},
    "no head": {"modules_to_save": None},
    "norm too": {"modules_to_save": ["head", "norm"]},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS.keys())
def test_options_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = theirs(**options)
    model.save_pretrained(tmp_path / "a")
    loaded = load_adapter(build(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(loaded), logits(model), **TOLERANCE)


def test_peft_ignores_a_bypassed_qkv_without_the_flag(tmp_path: Path) -> None:
    """Why both directions warn: without the flag PEFT's LoRA on qkv changes nothing at all."""
    family = SWIN
    model = ours(family, targets="qkv")
    directory = save(model, tmp_path / "a")
    with_flag, without = (logits(in_peft(directory, family, flag=flag), family) for flag in (True, False))
    with nolora_vision.disabled(model):
        torch.testing.assert_close(without, logits(model, family), **TOLERANCE)
    torch.testing.assert_close(with_flag, logits(model, family), **TOLERANCE)
    assert (with_flag - without).abs().max() > 1e-3  # a hundred times the tolerance
    with pytest.warns(UserWarning, match=r"qkv of layers\.0\.blocks\.0\.attn \(2 such attentions\) takes effect here"):
        load_adapter(build(family), directory)
    save(ours(family, targets="mlp"), tmp_path / "b")
    load_adapter(build(family), tmp_path / "b")  # no warning: other layers are called


def test_bfloat16_files_give_what_their_rounded_numbers_give(tmp_path: Path) -> None:
    model = ours(modulation="vector")
    directory = save(model, tmp_path / "a", dtype="bfloat16")
    assert {t.dtype for t in load_file(directory / "adapter_model.safetensors").values()} == {torch.bfloat16}
    loaded = load_adapter(build(), directory)
    torch.testing.assert_close(logits(in_peft(directory)), logits(loaded), **TOLERANCE)
    # 8 bits of mantissa: each weight is off by up to 0.4 %
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0.02 * float(logits(model).abs().max()))


def test_what_the_written_files_say(tmp_path: Path) -> None:
    directory = save(ours(rank_pattern={"fc1": 2}, alpha=6), tmp_path / "a")
    said = json.loads((directory / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"], said["modules_to_save"]) == ("LORA", 3, 6, ["head"])
    assert said["rank_pattern"][r"^blocks\.0\.mlp\.fc1"] == 2 and "blocks.0.attn.qkv" in said["target_modules"]
    names = load_file(directory / "adapter_model.safetensors")
    assert names["base_model.model.blocks.0.mlp.fc1.lora_A.weight"].shape[0] == 2
    card = (directory / "README.md").read_text()
    assert "library_name: peft" in card and "peft.PeftModel.from_pretrained" in card


def test_paths_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """PEFT and this library both take a path for the end of other paths."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp["fc2"](self.mlp["fc1"](x)) + self.fc2(self.fc1(x))

    def net() -> Net:
        torch.manual_seed(3)
        return Net()

    config = peft.LoraConfig(r=2, target_modules=["mlp.fc1", "fc2"], rank_pattern={"^fc2": 3})
    model = peft.get_peft_model(net(), config)
    randomise(model)
    model.save_pretrained(tmp_path / "a")
    config_of, _ = read_peft(tmp_path / "a", net())
    adapter = nolora_vision.AdapterConfig.from_dict(config_of["adapter"])
    found = nolora_vision.inject(net(), adapter, example_input=torch.randn(2, 8))
    ranks = {path: layer.adapter.config.rank for path, layer in adapted_layers(found).items()}
    assert ranks == {"fc2": 3, "mlp.fc1": 2, "mlp.fc2": 2}


def test_further_modules_that_peft_saved_survive_saving_again(tmp_path: Path) -> None:
    theirs(modules_to_save=["head", "norm"]).save_pretrained(tmp_path / "a")
    loaded = load_adapter(build(), tmp_path / "a").eval()
    save_adapter(loaded, tmp_path / "b")
    assert torch.equal(logits(load_adapter(build(), tmp_path / "b")), logits(loaded))


def fingerprint(model: nn.Module) -> list:
    """The very objects, their classes, flags, attributes and numbers."""
    modules = [
        (path, id(m), type(m), m.training, vars(m).get("qkv_bias_separate"), sorted(vars(m)))
        for path, m in model.named_modules()
    ]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    tensors = [(name, t.dtype, t.flatten().tolist()) for name, t in model.state_dict().items()]
    return [modules, parameters, tensors]


def refused(model: nn.Module, directory: Path, error: type[Exception], message: str) -> None:
    """load_adapter and from_pretrained refuse with this message, and the model is as it was, bit for bit."""
    before = fingerprint(model)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    for load in (lambda: load_adapter(model, directory), lambda: from_pretrained(directory, model=model)):
        with pytest.raises(error, match=message):
            load()
        assert fingerprint(model) == before
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files


UNTRANSLATABLE: dict[str, tuple[Any, str]] = {
    "dora": (peft.LoraConfig(target_modules=["qkv"], use_dora=True), "uses PEFT's use_dora=True, with which it is not"),
    "bias": (peft.LoraConfig(target_modules=["qkv"], bias="all"), "uses PEFT's bias='all'"),
    "bias of LoRA": (peft.LoraConfig(target_modules=["qkv"], lora_bias=True), "uses PEFT's lora_bias=True"),
    "pissa": (
        peft.LoraConfig(target_modules=["qkv"], init_lora_weights="pissa"),
        r"uses PEFT's init_lora_weights='pissa', .* on the W of the pretrained model\. Merge it",
    ),
    "ia3": (peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]), "is PEFT's 'IA3'; only its LORA can be"),
    "vera": (peft.VeraConfig(target_modules=["attn.proj"], r=4), "is PEFT's 'VERA'; only its LORA"),
    "3x3 patches": (
        peft.LoraConfig(target_modules=["patch_embed.proj"]),
        r"patch_embed\.proj\.lora_A\.weight of shape \(8, 3, 16, 16\) is no matrix of a plain LoRA",
    ),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 6 LoRA tensor")  # PEFT, of the biases of lora_bias
@pytest.mark.parametrize(("config", "message"), UNTRANSLATABLE.values(), ids=UNTRANSLATABLE.keys())
def test_what_is_no_plain_lora_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(build(), config)
    randomise(model)
    model.save_pretrained(tmp_path / "a")
    refused(build(), tmp_path / "a", PeftFormatError, message)


class Odd(nn.Module):
    """Layers that PEFT adapts and this library does not, under names that it looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.fc1 = nn.Embedding(5, 8), nn.Conv2d(8, 8, 1, groups=2)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tokens", PeftFormatError, r"tokens\.lora_embedding_A of shape .* is no matrix of a plain LoRA"),
        ("fc1", CheckpointError, r"fc1 is a Conv2d, which cannot carry an adapter; wanted .* ungrouped 1×1"),
    ],
)
def test_layers_that_only_peft_adapts_are_refused(
    name: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    peft.get_peft_model(Odd(), peft.LoraConfig(target_modules=[name], r=2)).save_pretrained(
        tmp_path / "a", save_embedding_layers=False
    )
    refused(Odd(), tmp_path / "a", error, message)


def edit(directory: Path, change: Callable[[dict, dict], object]) -> None:
    """Change config and tensors of a saved adapter."""
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    said, state = json.loads(config.read_text()), load_file(weights)
    change(said, state)
    config.write_text(json.dumps(said))
    save_file(state, weights)


A = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
B = A.replace("lora_A", "lora_B")
DAMAGE: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "no such layer": (lambda c, s: s.update({key.replace("0", "99"): s[key].clone() for key in (A, B)}), r"blocks\.99"),
    "rows of A": (lambda c, s: s.update({A: s[A][:2].clone()}), r"qkv should have rank 4; its lora_A has 2 rows"),
    "columns of A": (lambda c, s: s.update({A: s[A][:, :5].clone()}), r"of another shape: blocks\.0\.attn\.qkv\."),
    "rows of B": (lambda c, s: s.update({B: s[B][:5].clone()}), r"of another shape: .*lora_B: \(5, 4\), the model"),
    "no B": (lambda c, s: s.pop(B), r"blocks\.0\.attn\.qkv\.lora_A\.weight and no lora_B\.weight"),
    "no A": (lambda c, s: s.pop(A), r"1 not in the model: blocks\.0\.attn\.qkv\.adapter\.lora_B|1 missing"),
    "no LoRA": (lambda c, s: [s.pop(k) for k in list(s) if "lora" in k], "holds no LoRA matrices"),
    "part of the head": (lambda c, s: s.pop("base_model.model.head.bias"), r"1 missing: head\.bias"),
    "no head": (lambda c, s: [s.pop(k) for k in list(s) if ".head." in k], "lacks the head, which adapter_config"),
    "other classes": (
        lambda c, s: s.update({"base_model.model.head.bias": torch.zeros(3)}),
        r"head\.bias: \(3,\), the model has \(7,\)",
    ),
    "integers": (lambda c, s: s.update({A: s[A].long()}), "of another kind of number"),
    "rank": (lambda c, s: c.update(r=2), "should have rank 2; its lora_A has 4 rows"),
    "alpha": (lambda c, s: c.update(lora_alpha="big"), "alpha must be a positive number"),
    "pattern": (lambda c, s: c.update(alpha_pattern={"(": 3}), r"adapter_config\.json: .*(unterminated|missing \))"),
    "list for a pattern": (lambda c, s: c.update(rank_pattern=[3]), r"rank_pattern in adapter_config\.json cannot be"),
    "dropout": (lambda c, s: c.update(lora_dropout="x"), "dropout must be a probability"),
    "another model": (
        lambda c, s: c.update(base_model_name_or_path="timm/vit_tiny_patch16_224.augreg_in21k"),
        "The adapter is for architecture 'vit_tiny_patch16_224', this model has 'test_vit'",
    ),
    "a switch of tomorrow": (lambda c, s: c.update(use_something=True), "uses PEFT's use_something=True"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_directories_are_refused(change: Callable[[dict, dict], object], message: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", change)
    refused(build(), tmp_path / "a", CheckpointError, message)


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(build(), tmp_path / "a", CheckpointError, "is not a whole safetensors file")
    weights.unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "a" / "adapter_model.bin")
    refused(build(), tmp_path / "a", CheckpointError, r"adapter_model\.bin is a pickle, .* never loaded")


def test_refusals_of_a_model_that_has_adapters_or_needs_a_cure(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "a")
    refused(nolora_vision.inject(build(), rank=4), tmp_path / "a", CheckpointError, "Load onto a bare model")
    directory = save(ours(SWIN, targets="mlp"), tmp_path / "b")
    edit(directory, lambda c, s: s.update({"base_model.model.head.fc.bias": torch.zeros(3)}))
    model = build(SWIN)
    model.layers[0].requires_grad_(False)
    refused(model, directory, CheckpointError, r"head\.fc\.bias: \(3,\), the model has")


def test_without_a_model_from_pretrained_says_what_it_needs(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"in PEFT's format, .* Pass it: from_pretrained\(\.\.\., model="):
        from_pretrained(tmp_path / "a")


def unfrozen(model: nn.Module) -> nn.Module:
    model.get_submodule("norm").requires_grad_(True)
    return model


def run_in_training() -> nn.Module:
    torch.manual_seed(3)
    model = nolora_vision.inject(FAMILIES["maxvit"].bare(), rank=2, nonlinearity="identity", modulation="none")
    model.train()(FAMILIES["maxvit"].images(2))
    return model.eval()


UNWRITABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tanh": (
        lambda: ours(nonlinearity="tanh"),
        r"blocks\.0\.attn\.qkv: an update with f = tanh and modulation none depends on its input, so it is no matrix",
    ),
    "gate": (lambda: ours(modulation="gate"), r"f = identity and modulation gate .* or train with nonlinearity='id"),
    "no adapters": (build, "The model has no adapters, so there is no LoRA"),
    "a trained norm": (lambda: unfrozen(ours()), r"norm\.weight was trained or moved too \(2 such tensors\)"),
    "statistics": (run_in_training, r"running_mean was trained or moved too .* keep BatchNorms in evaluation mode"),
}


@pytest.mark.parametrize(("make", "message"), UNWRITABLE.values(), ids=UNWRITABLE.keys())
def test_what_peft_cannot_hold_is_not_written(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    model = make()
    before = fingerprint(model)
    save(ours(), tmp_path / "a")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for name in ("a", "b"):
        with pytest.raises(PeftFormatError, match=message):
            save_adapter(model, tmp_path / name, format="peft")
    assert fingerprint(model) == before and [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == files
