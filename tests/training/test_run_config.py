"""The run's configuration: YAML, command line, and every refusal."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nolora_vision import AdapterConfig, ConfigError
from nolora_vision.training.config_file import dump_differences, dump_run_config, load_run_config, parse_run_config
from nolora_vision.training.run import main
from nolora_vision.training.run_config import RunConfig


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        model="test_vit",
        adapter=AdapterConfig(rank=3, targets=("q", "v"), rank_pattern={"v": 2}, layers=(0, -1)),
        model_kwargs={"patch_size": 4},
        scale=(0.3, 0.9),
        aa="rand-m9-mstd0.5",
        pretrained_path=Path("x.safetensors"),
        vtab_root=Path("vtab"),
        crop_mode="squash",
        splits=Path("splits.json"),
    )
    path = tmp_path / "c.yaml"
    path.write_text(dump_run_config(config), encoding="utf-8")
    assert load_run_config(path) == config
    path.write_text(text := dump_differences(config, also=("dataset",)), encoding="utf-8")
    assert load_run_config(path) == config
    assert text.startswith("model: test_vit\ndataset: cifar100\nadapter: {rank: 3, targets: [q, v], ")
    assert dump_differences(RunConfig()) == ""


def test_command_line_overrides_yaml_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 3\nlr: 0.01\nadapter: {rank: 2, nonlinearity: tanh}\n", encoding="utf-8")
    args = [
        "-c",
        str(path),
        "--epochs",
        "4",
        "--adapter.rank",
        "5",
        "-b",
        "7",
        "-j",
        "0",
        "--no-pretrained",
        "--no-aug",
    ]
    config = parse_run_config([*args, "--max_train_samples", "9"])
    assert (config.epochs, config.lr, config.batch_size, config.workers) == (4, 0.01, 7, 0)
    assert (config.max_train_samples, config.pretrained, config.no_aug) == (9, False, True)
    assert config.adapter == AdapterConfig(rank=5, nonlinearity="tanh")


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(
            epochs=0, smoothing=2, scale=(0.9, 0.1), eval_only=True, warmup_epochs=3, crop_pct=0, mixup=1, batch_size=3
        )
    text = str(caught.value)
    for part in (
        "epochs must be a whole number of at least 1, got 0",
        "smoothing must be a number of at least 0 and below 1, got 2",
        "scale must be (smal",
    ):
        assert part in text
    assert (
        "eval_only needs the adapter to test: --adapter DIR" in text
        and "crop_pct must be a number above 0 and at most 1, or None, got 0" in text
    )
    assert "longer than" not in text and "need an even batch_size, got 3" in text
    path = tmp_path / "c.yaml"
    path.write_text("epoch: 3\nbatch_size: many\nadapter: {rnk: 2}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    text = str(caught.value)
    assert "epoch is not a field. Did you mean 'epochs'?" in text and "adapter.rnk is not a field" in text
    assert "batch_size must be a whole number of at least 1, got 'many'. (line 2)" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shots": 1, "train_fraction": 0.1}, "shots and train_fraction each choose the training images: give one"),
        ({"shots": 1, "max_train_samples": 9}, "max_train_samples and shots each choose the training images"),
        ({"shots": 0}, "shots must be a whole number of at least 1, or None, got 0"),
        ({"train_fraction": 0.0}, "train_fraction must be a number above 0 and at most 1, or None, got 0.0"),
        ({"splits": "a", "shots": 1, "max_eval_samples": 2}, "so shots and max_eval_samples can't: give --splits or"),
        ({"no_aug": True, "aa": "rand-m9"}, "so aa can't change them: give one of them"),
        (
            {"no_aug": True, "aa": "rand-m9", "reprob": 0.1},
            "no_aug leaves training images alone, so aa and reprob can't change them",
        ),
        ({"train_on": "train_val"}, "so they can't choose an epoch: set keep_epoch last"),
    ],
)
def test_contradictions_about_the_images_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**values)


def test_without_augmentation_its_defaults_and_mixes_of_images_stay_allowed() -> None:
    assert RunConfig(no_aug=True, scale=(0.2, 1.0), hflip=0.1, mixup=0.2, cutmix=0.5).no_aug


def test_a_final_run_keeps_the_last_epoch() -> None:
    assert RunConfig(train_on="train_val", keep_epoch="last").train_on == "train_val"
    assert RunConfig(train_on="train_val", eval_only=True, adapter_dir=Path("a")).keep_epoch == "best"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold fields and values, got list"),
        ("a: [", "is not YAML"),
        ("adapter: {rank: 0}", "rank must be an integer of at least 1, got 0"),
        ("method: lore", r"method must be one of nolora, lora, .*, got 'lore'\. Did you mean 'lora'\?"),
        ("{method: dora, method_options: {rank: 3}}", "'rank' is no option of dora.* Options of dora: lr_ratio"),
        ("{method: vera, method_options: {d_initial: -1}}", "d_initial must be a positive number, got -1"),
        ("pretrained_path: x.pth", r"pretrained_path must be a \.safetensors file, got 'x\.pth'"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_run_config(path)


def test_absent_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        parse_run_config(["-c", str(tmp_path / "no.yaml")])


@pytest.mark.parametrize("args", [["--metod", "full"], ["--epochs", "x"], ["--epochs", "-1"], ["--adapter.rank", "0"]])
def test_bad_flags_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert (
        f"{args[0].removeprefix('--')} must be" in (said := capsys.readouterr().err) or "no flag. Did you mean" in said
    )


def test_help_speaks_of_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_run_config(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for flag in ("--model", "--amp-dtype", "--max-train-samples", "--adapter.rank", "--grad-accum-steps", "--adapter "):
        assert flag in text
    assert "-c FILE" in text and "Peak learning rate of the classifier" in text


def test_learning_rate_follows_the_method() -> None:
    rates = {method: RunConfig(method=method).resolved().lr for method in ("nolora", "lora", "full")}
    assert rates["nolora"] == rates["lora"] and rates["full"] < rates["lora"]
    assert replace(RunConfig(), lr=0.5).resolved().lr == 0.5


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers()))
FIELDS = st.sampled_from([*RunConfig.__dataclass_fields__, "epoch", "x"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=4))
def test_any_yaml_is_a_config_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    import yaml

    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    try:
        config = load_run_config(path)
    except ConfigError as error:
        assert error.problems
    else:
        path.write_text(dump_run_config(config), encoding="utf-8")
        assert load_run_config(path) == config


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "a/b", "..", ".hidden", "", " ", "C:x", "a\\b", "a\0b"])
def test_a_name_cannot_lead_out_of_the_output_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="experiment must be (the name of a folder within output|text that is not)"):
        RunConfig(experiment=name)
    assert RunConfig(experiment="lora, r 8").experiment
