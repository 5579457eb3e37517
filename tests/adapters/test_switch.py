"""Several adapters on one backbone: each computes as if alone, and the backbone is never copied nor changed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nolora_vision
from nolora_vision import add_adapter, load_adapter, mixed, remove_adapter, save_adapter, set_adapter
from nolora_vision.surgery.adapter import adapted_layers
from tests.families import FAMILIES


def base(num_classes: int = 7, name: str = "test_vit", **options: Any) -> nn.Module:
    """The same backbone weights whatever the head."""
    torch.manual_seed(5)
    model = timm.create_model(name, num_classes=7, **options).eval()
    if num_classes != 7:
        model.reset_classifier(num_classes)
    return model


def randomise(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1)
    return model


CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "a": (7, {"rank": 3}),
    "b": (7, {"rank": 3}),
    "attention": (4, {"rank": 2, "targets": ("q", "v"), "nonlinearity": "tanh", "modulation": "vector"}),
    "mlp": (9, {"rank": 5, "targets": "mlp", "alpha": 3.0, "nonlinearity": "identity", "modulation": "none"}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one backbone: two of the same shapes, two on other layers, a head alone."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, (name, (classes, options)) in enumerate(CONFIGS.items()):
        model = randomise(nolora_vision.inject(base(classes), **options), seed)
        names = [f"{name}{i}" for i in range(classes)]
        found[name] = save_adapter(model, folder / name, class_names=names, preprocessing={"crop_pct": 0.5 + seed / 10})
    head = base(3)
    nolora_vision.freeze_backbone(head)
    found["head"] = save_adapter(randomise(head, 9), folder / "head")
    return found


@torch.no_grad()
def alone(directory: Path, x: Tensor) -> Tensor:
    """What the adapter computes on a model of its own."""
    classes = nolora_vision.read_adapter_config(directory)["num_classes"]
    return load_adapter(base(classes), directory)(x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 160, 160)


def with_all(saved: dict[str, Path]) -> nn.Module:
    model = base()
    for name, directory in saved.items():
        add_adapter(model, name, directory)
    return model


@torch.no_grad()
def test_each_computes_as_if_alone_in_any_order(saved, x: Tensor) -> None:
    model = with_all(saved)
    assert nolora_vision.adapter_names(model) == tuple(saved) and nolora_vision.active_adapter(model) == "a"
    plain = base()(x)
    for name in ("mlp", "a", "head", "b", "attention", "a", None, "mlp"):
        assert set_adapter(model, name) is model and nolora_vision.active_adapter(model) == name
        assert torch.equal(model(x), plain if name is None else alone(saved[name], x)), name
        classes = 7 if name is None else nolora_vision.read_adapter_config(saved[name])["num_classes"]
        assert model.num_classes == classes == model.get_classifier().out_features


def test_the_active_one_says_its_classes_and_its_transform(saved) -> None:
    model = with_all(saved)
    set_adapter(model, "attention")
    assert nolora_vision.class_names(model) == tuple(f"attention{i}" for i in range(4))
    assert nolora_vision.preprocessing_of(model)["crop_pct"] == pytest.approx(0.7)
    set_adapter(model, None)
    assert nolora_vision.class_names(model) == tuple(str(i) for i in range(7))


def test_the_backbone_is_neither_copied_nor_changed(saved, x: Tensor) -> None:
    model = base()
    own = {name: (p, p.data_ptr(), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    for name, directory in saved.items():
        add_adapter(model, name, directory)
        set_adapter(model, name)
    now = dict(model.named_parameters())
    for name, (parameter, address, value, _) in own.items():
        if not name.startswith("head"):
            assert now[name] is parameter and parameter.data_ptr() == address and torch.equal(parameter, value)
    for name in saved:
        remove_adapter(model, name)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[path] is module for path, module in modules.items())
    assert list(model.state_dict()) == keys and not adapted_layers(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {n: o[3] for n, o in own.items()}
    assert not model._forward_hooks and not model._forward_pre_hooks and not hasattr(model, "_nolora_shelf")


def test_adapters_on_the_model_already_are_called_default(saved, x: Tensor) -> None:
    model = randomise(nolora_vision.inject(base(), rank=4), 3)
    with torch.no_grad():
        expected = model(x)
        add_adapter(model, "mlp", saved["mlp"])
        assert nolora_vision.adapter_names(model) == ("default", "mlp")
        assert nolora_vision.active_adapter(model) == "default" and torch.equal(model(x), expected)
        assert torch.equal(set_adapter(model, "mlp")(x), alone(saved["mlp"], x))
        assert torch.equal(set_adapter(model, "default")(x), expected)


def test_training_folding_and_saving_go_to_the_active_one(saved, x: Tensor, tmp_path: Path) -> None:
    model = set_adapter(with_all(saved), "attention")
    assert sum(p.numel() for p in nolora_vision.adapter_parameters(model)) > 0
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in nolora_vision.adapter_parameters(model))
    with torch.no_grad():
        for p in nolora_vision.adapter_parameters(model):
            p -= 0.1 * p.grad
        expected = model(x)
        assert not torch.equal(expected, alone(saved["attention"], x))
        assert torch.equal(set_adapter(model, "b")(x), alone(saved["b"], x))
        assert torch.equal(set_adapter(model, "attention")(x), expected)
        save_adapter(model, tmp_path / "again")
        assert torch.equal(alone(tmp_path / "again", x), expected)
        assert nolora_vision.read_adapter_config(tmp_path / "again")["class_names"][0] == "attention0"
        folded = nolora_vision.fold(model)(x)
        set_adapter(model, "a")
        assert torch.equal(set_adapter(model, "attention")(x), folded)


def test_the_active_one_is_exported(saved, x: Tensor, tmp_path: Path) -> None:
    model = set_adapter(with_all(saved), "mlp")
    nolora_vision.export(model, tmp_path / "m.pt2", format="torch")
    with torch.no_grad():
        got = torch.export.load(tmp_path / "m.pt2").module()(x)
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)  # folded: rounded in another order
    assert nolora_vision.read_export_metadata(tmp_path / "m.pt2")["class_names"][0] == "mlp0"
    assert nolora_vision.adapter_names(model) == tuple(saved)


def test_eject_and_disabled_work_on_the_active_one(saved, x: Tensor) -> None:
    model = set_adapter(with_all(saved), "b")
    with torch.no_grad():
        with nolora_vision.disabled(model):
            without = model(x)
        nolora_vision.eject(model)
        assert torch.equal(model(x), without) and not adapted_layers(model)
    assert nolora_vision.adapter_names(model) == () and not model._forward_pre_hooks


def test_a_merge_beside_others_is_refused(saved, x: Tensor) -> None:
    model = set_adapter(with_all(saved), "mlp")
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(nolora_vision.InjectionError, match=r"'mlp' .* beside it \('a', 'b', 'attention', 'head'\)"):
            nolora_vision.fold(model, merge=True)
        assert torch.equal(model(x), expected)
        for name in ("a", "b", "attention", "head"):
            remove_adapter(model, name)
        torch.testing.assert_close(nolora_vision.fold(model, merge=True)(x), expected, atol=1e-5, rtol=1e-5)


def test_with_none_set_the_advice_is_to_set_one(saved, x: Tensor) -> None:
    model = set_adapter(with_all(saved), None)
    with torch.no_grad(), nolora_vision.disabled(model):
        assert torch.equal(model(x), base()(x))
        set_adapter(model, "a")
        without = model(x)
    with torch.no_grad(), nolora_vision.disabled(load_adapter(base(), saved["a"])) as alone_:
        assert torch.equal(without, alone_(x))
    set_adapter(model, None)
    with pytest.raises(nolora_vision.InjectionError, match=r"now\. .*set_adapter\(model, name\), with one of 'a'"):
        nolora_vision.fold(model)


def test_removing_the_active_one_leaves_the_bare_backbone(saved, x: Tensor) -> None:
    model = set_adapter(with_all(saved), "b")
    remove_adapter(model, "b")
    with torch.no_grad():
        assert nolora_vision.active_adapter(model) is None and torch.equal(model(x), base()(x))
        assert torch.equal(set_adapter(model, "a")(x), alone(saved["a"], x))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_shelves_of_their_own(saved, x: Tensor, way) -> None:
    model = set_adapter(with_all(saved), "a")
    other = way(model)
    with torch.no_grad():
        assert torch.equal(set_adapter(other, "mlp")(x), alone(saved["mlp"], x))
        assert torch.equal(model(x), alone(saved["a"], x))
        assert torch.allclose(other(x[:2], adapter_names=["a", "b"])[0], model(x[:1])[0], atol=1e-5)
    for name in saved:
        remove_adapter(other, name)
    assert not other._forward_pre_hooks and model._forward_pre_hooks


# -------------------------------------------------------------------------------------------------------- mixed batches


@torch.no_grad()
def check_mixed(model: nn.Module, names: list[str | None], x: Tensor, expected: dict[str | None, Tensor]) -> float:
    """Rows of a mixed batch against the adapters run apart; returns the largest difference."""
    got = model(x, adapter_names=names)
    worst = 0.0
    for i, name in enumerate(names):
        wanted = expected[name][i]
        own, rest = got[i, : len(wanted)], got[i, len(wanted) :]
        assert (rest == float("-inf")).all()
        # products over other numbers of rows are summed in another order: a few fp32 roundings through all blocks
        torch.testing.assert_close(own, wanted, atol=2e-5, rtol=2e-5)
        worst = max(worst, float((own - wanted).abs().max()))
    return worst


def test_a_mixed_batch_is_as_apart(saved, x: Tensor) -> None:
    model = with_all(saved)
    expected = {name: alone(directory, x) for name, directory in saved.items()} | {None: base()(x).detach()}
    for names in (
        ["a", "b", "a", "b", "a"],
        ["mlp"] * 5,
        ["mlp", "head", "attention", None, "a"],
        ["b"] * 5,
        [None] * 5,
    ):
        for active in ("a", "mlp", None):
            check_mixed(set_adapter(model, active), names, x, expected)
            before = expected[active]
            with torch.no_grad():
                assert torch.equal(model(x), before)
                assert torch.equal(model(x, adapter_names=None), before)
    with torch.no_grad(), mixed(model, ["a", "mlp"]):
        got = model(x[:2])
    torch.testing.assert_close(got[0, :7], expected["a"][0], atol=2e-5, rtol=2e-5)


def test_adapters_and_heads_that_are_not_set_mix_in_the_models_mode(tmp_path: Path) -> None:
    """Dropout and noise of adapters, and the BatchNorm in LeViT's head, do in evaluation what evaluation does."""
    model, expected = FAMILIES["levit"].build(), {}
    plain, x = copy.deepcopy(model.eval()), FAMILIES["levit"].images(3)
    model.train()
    for seed, targets in enumerate(("qkv", "mlp")):
        one = nolora_vision.inject(copy.deepcopy(plain), targets=targets, dropout=0.5, modulation_noise=1.0)
        directory = save_adapter(randomise(one, seed), tmp_path / f"{seed}")
        expected[f"{seed}"] = one(x).detach()
        add_adapter(model, f"{seed}", directory)
    check_mixed(model.eval(), ["1", "0", "1"], x, expected)
    set_adapter(model, None)
    check_mixed(model, ["1", "0", "1"], x, expected)


def test_every_family_mixes(family, tmp_path: Path) -> None:
    """Windows, grids, regions and convolutions: whose row is whose must be right in each."""
    torch.manual_seed(1)
    model = family.build().eval()
    plain = copy.deepcopy(model)
    expected = {}
    x = family.images(4)
    for seed, targets in enumerate((("qkv", "mlp"), ("mlp",), "all")):
        one = randomise(nolora_vision.inject(copy.deepcopy(plain), rank=2, targets=targets), seed)
        with torch.no_grad():
            expected[f"{seed}"] = one(x)
        add_adapter(model, f"{seed}", save_adapter(one, tmp_path / f"{seed}"))
    with torch.no_grad():
        for name, wanted in expected.items():
            assert torch.equal(set_adapter(model, name)(x), wanted)
        names = ["2", "0", "1", "0"]
        got = model(x, adapter_names=names)
        for i, name in enumerate(names):
            error = (got[i] - expected[name][i]).abs().max() / expected[name].abs().max()
            assert error < 1e-4, f"sample {i}: {error}"  # fp32 sums in another order, through weights of size one
        others = (expected["0"] - expected["1"]).abs().max() / expected["0"].abs().max()
        assert others > 1e-2  # so that a sample of another adapter would be seen


def test_gradients_of_a_mixed_batch_reach_each_adapter(saved, x: Tensor) -> None:
    model = with_all(saved)
    model(x, adapter_names=["a", "b", "a", "b", "b"]).square().sum().backward()
    for name in ("a", "b"):
        assert all(p.grad is not None for p in nolora_vision.adapter_parameters(set_adapter(model, name)))


def test_a_failed_mixed_call_leaves_the_model_as_it_was(saved, x: Tensor) -> None:
    model = set_adapter(with_all(saved), "attention")
    with torch.no_grad():
        expected = model(x)
        for names, error, message in (
            (["a", "c"], ValueError, r"No adapter is called 'c'\. There are: 'a', 'b', 'attention', 'mlp', 'head'"),
            ("a", ValueError, "one name for each sample, got 'a'"),
            ([], ValueError, r"one name for each sample, got \[\]"),
            (["a", "b"], ValueError, "2 adapter_names for a batch whose layers see 5 rows"),
        ):
            with pytest.raises(error, match=message):
                model(x, adapter_names=names)
            assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_worn_too_and_cannot_be_mixed(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 224, 224)
    directories = []
    for seed in range(2):
        model = randomise(nolora_vision.inject(base(name="levit_128s"), rank=2), seed)
        if seed:
            model.train()(torch.randn(2, 3, 224, 224))
        directories.append(save_adapter(model.eval(), tmp_path / f"{seed}"))
    model = base(name="levit_128s")
    with torch.no_grad():
        plain = model(x)
        for seed, directory in enumerate(directories):
            add_adapter(model, f"{seed}", directory)
        for seed in (1, 0, 1):
            wanted = load_adapter(base(name="levit_128s"), directories[seed])(x)
            assert torch.equal(set_adapter(model, f"{seed}")(x), wanted)
        assert torch.equal(set_adapter(model, None)(x), plain)
        with pytest.raises(
            nolora_vision.InjectionError, match="'0' and '1' differ in BatchNorm statistics, which a batch"
        ):
            model(x, adapter_names=["0", "1"])
    other = nolora_vision.inject(base(name="levit_128s"), rank=2)
    other.train()(torch.randn(2, 3, 224, 224))
    with pytest.raises(nolora_vision.CheckpointError, match="statistics moved while the adapters"):
        add_adapter(other, "0", directories[0])


def test_a_mixed_batch_has_the_statistics_of_its_adapters(tmp_path: Path) -> None:
    """Whichever is set: those that differ are put on for the batch, and the set one's come back."""
    model = FAMILIES["levit"].build().eval()
    plain, x, expected = copy.deepcopy(model), FAMILIES["levit"].images(3), {}
    for seed, name in enumerate(("still", "still too", "moved")):
        one = randomise(nolora_vision.inject(copy.deepcopy(plain), rank=2), seed)
        if name == "moved":
            one.train()(FAMILIES["levit"].images(4))
        expected[name] = one.eval()(x).detach()
        add_adapter(model, name, save_adapter(one, tmp_path / name))
    expected[None] = plain(x).detach()
    for active in ("moved", "still", None):
        set_adapter(model, active)
        for names in (["moved"] * 3, ["still", "still too", "still"], [None, "still", None]):
            check_mixed(model, names, x, expected)
            with torch.no_grad():  # torch 2.10 rounds a plain Linear otherwise for the same three rows: 6e-8
                torch.testing.assert_close(model(x), expected[active], rtol=0, atol=1e-6)
        with pytest.raises(nolora_vision.InjectionError, match="'moved' and 'still' differ in BatchNorm statistics"):
            model(x, adapter_names=["moved", "still", "moved"])
    out = set_adapter(model, "still")(x, adapter_names=["moved"] * 3)
    out.sum().backward()
    assert all(p.grad is not None for p in nolora_vision.adapter_parameters(set_adapter(model, "moved")))


# -------------------------------------------------------------------------------------------------------------- compile


@contextmanager
def counting_compilations() -> Iterator[list[int]]:
    counts: list[int] = []
    torch._dynamo.reset()
    try:
        yield counts
    finally:
        torch._dynamo.reset()


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_again(saved, x: Tensor) -> None:
    model = base()
    with counting_compilations() as counts:

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            counts.append(1)
            return graph.forward

        add_adapter(model, "a", saved["a"])
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        compiled(x)
        assert len(counts) == 1
        add_adapter(compiled, "b", saved["b"])
        for name in ("a", "b", "a", "b"):
            set_adapter(compiled, name)
            assert torch.allclose(compiled(x), alone(saved[name], x), atol=1e-6)
        assert len(counts) == 1, "swapping compiled the model again"


@torch.no_grad()
def test_a_compiled_model_mixes_heads_alone(tmp_path: Path, x: Tensor) -> None:
    model, expected = base(), {None: base()(x)}
    for seed, name in enumerate("ab"):
        head = base(3 + seed)
        nolora_vision.freeze_backbone(head)
        expected[name] = randomise(head, seed)(x)
        add_adapter(model, name, save_adapter(head, tmp_path / name))
    with counting_compilations():
        compiled = torch.compile(set_adapter(model, None), backend="eager")
        for names in (None, ["a", "b", "a", None, "b"], None, ["b", "b", "a", "a", None]):
            with mixed(compiled, names) if names else nullcontext():
                got = compiled(x)
            for i, name in enumerate(names or [None] * 5):
                torch.testing.assert_close(got[i, : expected[name].shape[1]], expected[name][i], atol=2e-5, rtol=2e-5)


# ------------------------------------------------------------------------------------------------------------- errors


def state_of(model: nn.Module) -> list[Any]:
    flags = [(path, id(m), type(m), m.training) for path, m in model.named_modules()]
    values = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return [flags, values, sorted(vars(model)), len(model._forward_pre_hooks), model.num_classes]


def same(a: list[Any], b: list[Any]) -> bool:
    values = all(p[:3] == q[:3] and torch.equal(p[3], q[3]) for p, q in zip(a[1], b[1], strict=True))
    return values and (a[0], *a[2:]) == (b[0], *b[2:])


@pytest.mark.parametrize("others", [False, True])
def test_a_refused_adapter_leaves_the_model_as_it_was(saved, tmp_path: Path, others: bool) -> None:
    model = set_adapter(with_all(saved), "mlp") if others else base()
    torch.manual_seed(0)
    full = save_adapter(randomise(base(), 1), tmp_path / "full")
    foreign = save_adapter(nolora_vision.inject(timm.create_model("test_vit2", num_classes=7)), tmp_path / "foreign")
    torch.manual_seed(77)
    backbone = save_adapter(nolora_vision.inject(timm.create_model("test_vit", num_classes=7)), tmp_path / "other")
    short = save_adapter(nolora_vision.inject(base(), rank=2), tmp_path / "short")  # found out after the injection
    state = load_file(short / "adapter_model.safetensors")
    state.pop("blocks.0.mlp.fc1.adapter.lora_A")
    save_file(state, short / "adapter_model.safetensors")
    config = nolora_vision.read_adapter_config(tmp_path / "short")
    digest = sha256((short / "adapter_model.safetensors").read_bytes()).hexdigest()
    config |= {"tensors": len(state), "weights_sha256": digest}
    config.pop("sha256")
    (short / "adapter_config.json").write_text(json.dumps(config))
    before, random = state_of(model), torch.get_rng_state()
    for directory, message in (
        (full, "holds weights of the backbone itself"),
        (foreign, "architecture 'test_vit2', this model has 'test_vit'"),
        (backbone, "frozen weights of this model are not those that the adapter was trained on"),
        (tmp_path / "absent", "absent does not exist"),
        (short, r"1 missing: blocks\.0\.mlp\.fc1\.adapter\.lora_A"),
    ):
        with pytest.raises(nolora_vision.CheckpointError, match=message):
            add_adapter(model, "new", directory)
        assert same(state_of(model), before) and torch.equal(torch.get_rng_state(), random)
    assert nolora_vision.adapter_names(model) == (tuple(saved) if others else ())


def test_names_are_checked(saved) -> None:
    model = base()
    with pytest.raises(nolora_vision.InjectionError, match=r"has no named adapters\. Call nolora_vision\.add_adapter"):
        set_adapter(model, "a")
    add_adapter(model, "alpha", saved["a"])
    with pytest.raises(ValueError, match=r"needs a name of its own, got 'alpha'\. Taken: 'alpha'"):
        add_adapter(model, "alpha", saved["b"])
    with pytest.raises(ValueError, match="needs a name of its own, got ''"):
        add_adapter(model, "", saved["b"])
    with pytest.raises(ValueError, match=r"No adapter is called 'alpa'\. Did you mean 'alpha'\?"):
        set_adapter(model, "alpa")
    with pytest.raises(ValueError, match="No adapter is called 'b'"):
        remove_adapter(model, "b")


# ------------------------------------------------------------------- what the stateful test's specification asks for


def test_a_model_that_was_cast_swaps_and_mixes(saved, x: Tensor) -> None:
    model = with_all(saved).bfloat16()
    add_adapter(model, "again", saved["attention"])
    with torch.no_grad():
        for name in ("attention", "again", "mlp", None):
            assert set_adapter(model, name)(x.bfloat16()).dtype == torch.bfloat16
        assert model(x[:2].bfloat16(), adapter_names=["mlp", "again"]).dtype == torch.bfloat16


def test_a_head_alone_freezes_the_backbone_that_others_share(saved, tmp_path: Path) -> None:
    model = add_adapter(base(), "head", saved["head"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    add_adapter(model, "again", save_adapter(model, tmp_path / "a"))
    remove_adapter(model, "head")
    nolora_vision.hold_frozen(model, torch.bfloat16)
    remove_adapter(model, "again")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not [name for name in vars(model) if name.startswith("_nolora")]


def test_a_shelf_that_wears_none_can_be_ejected_but_not_injected_beside(saved) -> None:
    model = set_adapter(with_all(saved), None)
    with pytest.raises(nolora_vision.InjectionError, match=r"adapters by name \('a', .*set_adapter would drop one"):
        nolora_vision.inject(model)
    with pytest.raises(nolora_vision.CheckpointError, match="adapters by name"):
        load_adapter(model, saved["a"])
    nolora_vision.eject(model)
    assert nolora_vision.adapter_names(model) == () and all(p.requires_grad for p in model.parameters())


def test_adapters_that_train_the_backbone_share_it_with_nobody(saved, tmp_path: Path) -> None:
    model = nolora_vision.inject(base(), rank=3)
    model.norm.weight.requires_grad_(True)
    with pytest.raises(nolora_vision.CheckpointError, match=r"train weights of the backbone itself \(norm\.weight"):
        add_adapter(model, "b", saved["b"])
    assert model.norm.weight.requires_grad and nolora_vision.adapter_names(model) == ()
    brings = save_adapter(model, tmp_path / "brings")
    shelf = add_adapter(base(), "a", saved["a"])
    with pytest.raises(nolora_vision.CheckpointError, match=r"holds weights of the backbone itself \(norm\.weight"):
        load_adapter(shelf, brings)


def test_disabled_holds_for_whatever_happens_inside(saved, x: Tensor) -> None:
    model = set_adapter(with_all(saved), "attention")
    with torch.no_grad():
        with nolora_vision.disabled(model):
            for name in ("mlp", "attention"):
                set_adapter(model, name)
                with nolora_vision.disabled(model):
                    pass
                features = model.forward_features(x)
                assert torch.equal(features, base().forward_features(x)), name
            mixed_heads = model(x[:2], adapter_names=["mlp", "mlp"])
            assert torch.equal(mixed_heads, set_adapter(model, "mlp")(x[:2]))
        assert torch.equal(model(x), alone(saved["mlp"], x))
        with nolora_vision.disabled(model):
            nolora_vision.eject(model)
    assert not [path for path, m in model.named_modules() if "adapter_enabled" in vars(m)]


def test_weights_that_an_adapter_brings_are_not_held(tmp_path: Path) -> None:
    model = nolora_vision.inject(base(), rank=3)
    model.norm.weight.requires_grad_(True)
    model.blocks[0].attn.proj.bias.requires_grad_(True)
    wanted = torch.nn.init.normal_(model.blocks[0].attn.proj.bias).clone()  # type: ignore[arg-type]
    directory = save_adapter(model, tmp_path / "a")
    other = base()
    nolora_vision.freeze_backbone(other)
    nolora_vision.hold_frozen(other, torch.bfloat16)
    bias = load_adapter(other, directory).blocks[0].attn.proj.bias  # type: ignore[union-attr]
    assert torch.equal(bias, wanted)
    nolora_vision.release_frozen(other)
    assert torch.equal(bias, wanted)
