"""Anatomy: norms against dense products, slopes against formulas, and a directory says what the live model says."""

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import nolora_vision
from nolora_vision import AdapterMismatchError, CorruptAdapterError, inject, save_adapter
from nolora_vision.adapters.adapter_files import WEIGHTS_FILE, write_adapter_files
from nolora_vision.adapters.anatomy import AdapterAnatomy, anatomy, as_plain, initial_theta
from nolora_vision.config import MODULATIONS, NONLINEARITIES
from nolora_vision.kernels import FORMULAS, LowRank
from nolora_vision.kernels.eager import modulate
from nolora_vision.surgery.adapter import adapted_layers
from nolora_vision.surgery.inject import injection_of
from tests.families import Family


def randomised(model: nn.Module, std: float = 0.3) -> nn.Module:
    for parameter in nolora_vision.adapter_parameters(model):
        nn.init.normal_(parameter, mean=0.1, std=std)
    return model


def vit(**config: object) -> nn.Module:
    return inject(timm.create_model("test_vit", num_classes=7), **config)


def dense(model: nn.Module, row: AdapterAnatomy) -> Tensor:
    """The slope of an update at A x = 0 as an (E, D) matrix in float64, by a central difference of x ↦ update."""
    adapter = adapted_layers(model)[row.path].adapter
    b: LowRank = (adapter[row.part] if row.part else adapter).operands()  # type: ignore[index]
    theta, step = [t.double() for t in b.theta], 1e-7
    v, gate = (
        None if b.v is None else b.v.double(),
        None if b.gate is None else (b.gate[0].double(), b.gate[1].double()),
    )
    h = step * b.down.double().T  # A applied to step · each unit vector of x: (D, R)
    up, down = (modulate(FORMULAS[b.nonlinearity].function(x, *theta), x, v, gate) for x in (h, -h))
    return (b.scale * b.up.double() @ (up - down).T / (2 * step)).detach()


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_norm_and_spectrum_are_those_of_the_dense_slope(nonlinearity: str, modulation: str) -> None:
    model = randomised(vit(rank=3, alpha=5, nonlinearity=nonlinearity, modulation=modulation, layers=[0]))
    for row in anatomy(model).rows:
        matrix = dense(model, row)
        # float64; a central difference with step h errs by ε/h ≈ 2e-9, and by h ‖G‖ where relu has its kink
        assert row.update_norm == pytest.approx(float(matrix.norm()), rel=1e-7)
        values = torch.linalg.svdvals(matrix)[:3].tolist()
        assert row.singular_values == pytest.approx(values, rel=1e-6, abs=1e-7 * values[0])
        assert row.stable_rank == pytest.approx(sum(s * s for s in values) / values[0] ** 2, rel=1e-6)
        assert row.directions == sum(s > 0.01 * values[0] for s in values)


def test_of_a_linear_update_it_is_the_norm_of_the_matrix_that_merge_adds() -> None:
    model = randomised(vit(rank=3, nonlinearity="identity", modulation="vector", targets=("q", "v", "mlp")))
    for row in anatomy(model).rows:
        adapter = adapted_layers(model)[row.path].adapter
        matrix = (adapter[row.part] if row.part else adapter).matrix()  # type: ignore[index]
        assert row.update_norm == pytest.approx(float(matrix.detach().norm()), rel=1e-5)  # matrix() is in fp32


def analytic_slope(nonlinearity: str, theta: dict[str, Tensor]) -> Tensor:
    fixed = {"identity": 1.0, "tanh": 1.0, "relu": 0.5, "gelu": 0.5, "silu": 0.5, "swish": 1.0, "rational": 1.0}
    if nonlinearity in fixed:
        return torch.full((3,), fixed[nonlinearity], dtype=torch.float64)
    if nonlinearity == "residual_tanh":
        return 1 + theta["mix"] * (theta["slope"] - 1)
    # aurora at h = 0: d tanh(H tanh h)_i / dh_i = H_ii; of the 8 splines, 0.4 apart, those from −0.6 to 0.6 slope there
    splines = torch.tensor([0, 0, -0.125, -0.625, 0.625, 0.125, 0, 0], dtype=torch.float64) / 0.4
    return theta["mixer"].diagonal() + theta["spline"] @ splines


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_slopes_are_the_analytic_ones(nonlinearity: str) -> None:
    row = anatomy(randomised(vit(rank=3, nonlinearity=nonlinearity, layers=[0]))).rows[0]
    theta = {name: torch.tensor(values, dtype=torch.float64) for name, values in row.theta.items()}
    wanted = analytic_slope(nonlinearity, theta).tolist()
    assert row.slopes == pytest.approx(wanted, abs=1e-12)  # float64, no differences taken


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_untrained_adapters_have_no_update_and_the_initial_f(nonlinearity: str) -> None:
    h = [-2.0, 0.0, 0.5, 3.0]
    for row in anatomy(vit(rank=3, nonlinearity=nonlinearity, modulation="gate", layers=[0])).rows:
        assert (row.update_norm, row.up_norm, row.stable_rank, row.directions) == (0, 0, 0, 0)
        assert row.v == (1, 1, 1) and row.v_moved == 0 and row.v_norm == pytest.approx(math.sqrt(3))
        assert row.gate_norm == 0 and row.gate_open == (1, 1, 1)
        assert set(row.theta_moved().values()) <= {0.0}
        after, before = row.curves(h)
        assert after.shape == (3, 4)
        assert before is None if nonlinearity == "aurora" else torch.equal(after, before.expand(3, 4))


def test_what_moved_is_told() -> None:
    model = vit(rank=2, nonlinearity="residual_tanh", layers=[0], targets=("fc1",))
    (layer,) = adapted_layers(model).values()
    values = {"v": [1.0, 4.0], "mix": [0.25, -0.5], "slope": [1.0, 2.0], "gate_bias": [0.0, 1.0]}
    with torch.no_grad():
        for name, numbers in values.items():
            layer.adapter.get_parameter(name).copy_(torch.tensor(numbers))
        layer.adapter.get_parameter("gate_weight").fill_(0.5)
    (row,) = anatomy(model).rows
    assert (row.v, row.v_moved, row.v_norm) == ((1, 4), 3, pytest.approx(math.sqrt(17)))
    assert row.theta_moved() == {"mix": 0.5, "slope": 1.0}
    assert row.gate_norm == 1 and row.gate_open == pytest.approx((1, 1 + math.tanh(1)))
    after, before = row.curves([2.0])
    assert before is not None and before.tolist() == [2.0]
    assert after[:, 0].tolist() == pytest.approx([2 + 0.25 * (math.tanh(2) - 2), 2 - 0.5 * (math.tanh(4) - 2)])
    assert (row.kind, row.block, row.in_features, row.out_features) == ("fc1", "blocks.0", 64, 192)


def test_drawn_theta_has_no_initial_values_and_asking_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    assert initial_theta("aurora", 4) == {} and list(initial_theta("rational", 4)) == ["linear", "square", "pole"]
    assert torch.equal(torch.random.get_rng_state(), before)


CONFIGS = {
    "default": {},
    "split": {"targets": ("q", "v", "mlp"), "alpha_pattern": {"q": 7, "fc2": 3}, "rank_pattern": {"v": 3}},
    "shared": {"targets": ("q", "v"), "share_down": True, "alpha_pattern": {"qkv": 7}},
    "all": {"targets": "all", "rank_pattern": {"proj": 1, "fc1": 3}, "rank_stabilized": True, "alpha": 5},
    "one of two": {"targets": ("fc1",), "nonlinearity": "aurora", "alpha_pattern": {"fc1": 9}},
    "linear": {"nonlinearity": "identity", "modulation": "none"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_directory_says_exactly_what_the_live_model_says(family: Family, config: dict, tmp_path: Path) -> None:
    model = randomised(inject(family.build(), **{"rank": 2, **config}))
    saved = anatomy(save_adapter(model, tmp_path / "a"))
    live = anatomy(model)
    assert saved.rows == live.rows and saved.rows
    assert {row.path: row.role for row in saved.rows} == dict(injection_of(model).roles)
    assert saved.adapter_parameters == sum(p.numel() for p in nolora_vision.adapter_parameters(model))
    assert (
        saved.other_parameters == live.other_parameters == sum(p.numel() for p in nolora_vision.head_parameters(model))
    )


@pytest.mark.parametrize("targets", [("fc1",), ("q", "fc1"), ("q", "v"), ("q", "k", "v", "fc1"), "qkv", "all"])
@pytest.mark.parametrize("key", ["fc1", "mlp", "qkv", "all"])
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_an_mlp_in_one_product_with_q_k_and_v(targets: object, key: str, share: bool, tmp_path: Path) -> None:
    """A file with one A for parts of `in_proj` does not name them; its scale follows from the targets all the same."""
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_pwee_patch16_reg1_gap_256", **sizes)
    try:
        model = randomised(inject(model, rank=2, targets=targets, share_down=share, alpha_pattern={key: 7}))
    except nolora_vision.InjectionError as error:
        assert "is only a part of what" in str(error)
        return
    saved, live = (anatomy(what).rows for what in (save_adapter(model, tmp_path / "a"), model))
    assert saved == live and saved


class ConvBlock(nn.Module):
    """An MLP of 1×1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = timm.layers.ConvMlp(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def test_convolutions(tmp_path: Path) -> None:
    model = randomised(inject(ConvBlock(), rank=2, example_input=torch.ones(1, 8, 3, 3)))
    assert {type(layer).__name__ for layer in adapted_layers(model).values()} == {"NoLoRAConv2d"}
    rows = anatomy(save_adapter(model, tmp_path / "a")).rows
    assert rows == anatomy(model).rows
    assert [(r.path, r.role, r.in_features, r.out_features) for r in rows] == [
        ("mlp.fc1", "fc1", 8, 16),
        ("mlp.fc2", "fc2", 16, 8),
    ]
    assert all(row.update_norm == pytest.approx(float(dense(model, row).norm()), rel=1e-7) for row in rows)


def test_blocks_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    model = inject(timm.create_model("test_vit", num_classes=7, depth=11), rank=1, targets="fc1")
    rows = anatomy(save_adapter(model, tmp_path / "a")).rows
    assert [row.block for row in rows] == [f"blocks.{i}" for i in range(11)]


def test_after_fold_the_update_is_the_same(tmp_path: Path) -> None:
    model = randomised(vit(rank=3, alpha=7, nonlinearity="tanh", modulation="vector", alpha_pattern={"fc1": 2}))
    before = [row.update_norm for row in anatomy(model).rows]
    folded = anatomy(nolora_vision.fold(model))
    assert [row.update_norm for row in folded.rows] == pytest.approx(before, rel=1e-5)  # folded in fp32
    assert anatomy(save_adapter(model, tmp_path / "a")).rows == folded.rows


def test_without_adapters_there_are_no_rows(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7)
    nolora_vision.freeze_backbone(model)
    linear = anatomy(save_adapter(model, tmp_path / "linear"))
    assert linear.rows == () and linear.other_parameters == 7 * 65 and linear.config["backbone"]
    model.requires_grad_(True)
    full = anatomy(save_adapter(model, tmp_path / "full"))
    assert full.rows == () and not full.config["backbone"]
    assert full.other_parameters == sum(p.numel() for p in model.parameters())


def test_pefts_format_is_read_from_its_keys(tmp_path: Path) -> None:
    config = {"nonlinearity": "identity", "modulation": "none", "rank": 3, "alpha": 5, "rank_pattern": {"fc2": 2}}
    model = randomised(vit(**config, alpha_pattern={"fc1": 9}))
    found = anatomy(save_adapter(model, tmp_path / "peft", format="peft"))
    own = anatomy(model)
    assert [(r.path, r.role, r.rank, r.scale) for r in found.rows] == [
        (r.path, r.role, r.rank, r.scale) for r in own.rows
    ]
    for row, live in zip(found.rows, own.rows, strict=True):
        assert row.update_norm == pytest.approx(live.update_norm, rel=1e-6)  # PEFT's B was scaled in fp32
    assert found.other_parameters == own.other_parameters
    assert "test_vit" in found.config["architecture"]


def test_plain_rows_survive_json() -> None:
    rows = anatomy(randomised(vit(rank=2, nonlinearity="rational", layers=[0]))).rows
    plain = json.loads(json.dumps(as_plain(rows)))
    assert plain == as_plain(rows)
    for row, values in zip(rows, plain, strict=True):
        assert tuple(values["singular_values"]) == row.singular_values and values["update_norm"] == row.update_norm
        assert {name: tuple(v) for name, v in values["theta"].items()} == row.theta and tuple(values["v"]) == row.v


def test_a_diverged_training_is_shown_not_hidden() -> None:
    model = vit(rank=2, layers=[0], targets=("fc1",))
    next(nolora_vision.adapter_parameters(model)).data.fill_(math.nan)
    (row,) = anatomy(model).rows
    assert math.isnan(row.update_norm) and math.isnan(row.stable_rank) and row.directions == 0
    assert as_plain([row])[0]["update_norm"] is None and json.dumps(as_plain([row]), allow_nan=False)


def rewritten(directory: Path, change) -> Path:  # type: ignore[no-untyped-def]
    """The same directory with other tensors or config, and checksums that fit them."""
    config = nolora_vision.read_adapter_config(directory)
    state = load_file(directory / WEIGHTS_FILE)
    change(config, state)
    fields = {key: value for key, value in config.items() if key not in ("sha256", "tensors", "weights_sha256")}
    return write_adapter_files(directory, fields, state, "")


def test_tensors_that_are_not_those_of_the_config_are_refused(tmp_path: Path) -> None:
    name = "blocks.0.mlp.fc1.adapter.beta"
    directory = save_adapter(vit(rank=2), tmp_path / "a")
    rewritten(directory, lambda config, state: state.pop(name))
    wanted = (
        "blocks.0.mlp.fc1.adapter has no beta; by the config (f = swish, modulation gate) it must be floating-point of"
    )
    with pytest.raises(CorruptAdapterError, match=re.escape(wanted)):
        anatomy(directory)
    rewritten(directory, lambda config, state: state.update({name: torch.ones(3)}))
    with pytest.raises(CorruptAdapterError, match=re.escape("has beta of torch.float32 and shape (3,)")):
        anatomy(directory)
    rewritten(directory, lambda config, state: state.update({name: torch.ones(2), name + "x": torch.ones(2)}))
    with pytest.raises(CorruptAdapterError, match=r"has betax of .* it must be absent. Save the model again"):
        anatomy(directory)
    rewritten(directory, lambda config, state: state.update({"blocks.0.mlp.fc1.adapter.z.v": torch.ones(2)}))
    with pytest.raises(CorruptAdapterError, match="is of a part 'z'; parts are q, k, v, qkv, fc1"):
        anatomy(directory)


def test_a_config_that_does_not_fit_the_file_is_refused(tmp_path: Path) -> None:
    directory = save_adapter(vit(rank=2), tmp_path / "a")
    rewritten(directory, lambda config, state: config.update(adapter={"rank": 0}))
    with pytest.raises(
        CorruptAdapterError, match=r"its adapter config is not usable \(AdapterConfig is not usable:\n  - rank must be"
    ):
        anatomy(directory)
    rewritten(directory, lambda config, state: config.update(adapter=None))
    with pytest.raises(CorruptAdapterError, match="its config names no adapter, but it holds adapter tensors"):
        anatomy(directory)
    directory = save_adapter(vit(rank=2), tmp_path / "b")
    rewritten(directory, lambda config, state: [state.pop(name) for name in list(state) if ".adapter." in name])
    with pytest.raises(CorruptAdapterError, match="its config names an adapter, but it holds no adapter tensors"):
        anatomy(directory)
    (directory / WEIGHTS_FILE).write_bytes(save({"head.weight": torch.ones(1)}))
    with pytest.raises(CorruptAdapterError, match="does not have the checksum"):
        anatomy(directory)


def test_a_scale_that_goes_by_a_role_which_no_name_says_is_not_guessed(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x)

    model = inject(Block(), rank=1, targets=("mix",), alpha_pattern={"fc1": 3}, example_input=torch.ones(1, 4))
    save_adapter(model, tmp_path / "a")
    with pytest.raises(
        AdapterMismatchError, match=r"alpha_pattern goes by role \(fc1\), and the name mix does not say"
    ):
        anatomy(tmp_path / "a")
    assert len(anatomy(model).rows) == 1
