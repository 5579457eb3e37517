"""The run's configuration: YAML, command line, and every refusal."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from nolora_vision import AdapterConfig, ConfigError
from nolora_vision.methods.catalogue import METHODS
from nolora_vision.training.config_file import dump_differences, dump_run_config, load_run_config, parse_run_config
from nolora_vision.training.flags import ELSEWHERE
from nolora_vision.training.ingredients import make_scheduler
from nolora_vision.training.kinds import kinds_of
from nolora_vision.training.run import main
from nolora_vision.training.run_config import RunConfig
from tests.training.forked_start import TRAIN, finished


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
            epochs=0, smoothing=2, scale=(0.9, 0.1), eval_only=True, warmup_epochs=30, crop_pct=0, mixup=1, batch_size=3
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
        ({"image_key": "a", "label_key": "a"}, "image_key and label_key are the same column, 'a': give each its own"),
        ({"dataset": "digits", "label_key": "a"}, "label_key does nothing for dataset 'digits': leave it out"),
        ({"dataset": "vtab:cifar", "revision": "a"}, "revision does nothing for dataset 'vtab:cifar': leave it out"),
        ({"dataset": "a.safetensors", "image_key": "a"}, "image_key does nothing for dataset 'a.safetensors'"),
        ({"scale": (0.9, 0.5)}, r"scale must be \(smallest, largest\), got \(0\.9, 0\.5\)"),
        ({"cutmix": 1.0, "batch_size": 7}, "mixup and cutmix need an even batch_size, got 7"),
    ],
)
def test_contradictions_about_the_images_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": "vit_bas_patch16_224"},
            "model: timm .* has no model 'vit_bas_patch16_224'. Nearest: vit_base_patch16",
        ),
        ({"model": "test_vit.r16_in1k"}, "test_vit has no weights 'r16_in1k' in timm. Did you mean 'r160_in1k'"),
        (
            {"model": "vit_giant_patch14_224"},
            "timm has no weights of vit_giant_patch14_224: give some by pretrained_path",
        ),
        ({"pretrained": False, "pretrained_path": "a.safetensors"}, "pretrained is off, which takes none: give one"),
        ({"opt": "adamv"}, "opt must be the name of a timm optimizer, got 'adamv'.*Did you mean 'adam"),
        ({"sched": "plateau"}, "sched must be one of cosine, tanh, step, poly, got 'plateau'"),
        ({"aa": "rnd-m9"}, "aa must be one of timm's policies, such as rand-m9-mstd0.5, got 'rnd-m9'"),
        ({"model_kwargs": {"num_classes": 3}}, "model_kwargs can't say num_classes: it has a field of its own, or"),
        ({"model_kwargs": {"img_size": 64}}, "model_kwargs can't say img_size"),
        ({"model_kwargs": {"pretrained_cfg": "a"}}, "model_kwargs can't say pretrained_cfg"),
        ({"drop_path": 0.1, "model_kwargs": {"drop_path_rate": 0.2}}, "drop_path and drop_path_rate .* are the same"),
        ({"warmup_epochs": 11}, r"warmup_epochs \(11\) is longer than epochs \(10\)"),
        (
            {"min_lr": 0.1, "lr": 0.01, "head_lr": 1},
            r"min_lr \(0.1\), the rate at the end, is above the peak lr \(0.01\)",
        ),
        ({"min_lr": 0.1, "lr": 1, "head_lr": None, "method": "full"}, None),
        ({"min_lr": 2.5e-3}, r"min_lr \(0.0025\), the rate at the end, is above the peak lr \(0.002\)"),
        ({"method": "oft", "adapter": {"dropout": 0.1}}, "oft has no dropout, and the adapter config asks for 0.1"),
        ({"method": "adaptformer", "adapter": {"rank_pattern": {"q": 2}}}, "adaptformer is the same on every layer"),
        ({"method_options": {"lr_ratio": 0}}, "method_options: lr_ratio must be a positive number, got 0"),
        ({"eval_only": True}, "eval_only needs the adapter to test: --adapter DIR"),
        ({"adapter_dir": "a"}, "--adapter DIR is for --eval-only; without it a fresh adapter is trained"),
        (
            {"eval_only": True, "adapter_dir": "a", "resume": "b"},
            "resume goes on with training, and eval_only has none",
        ),
        ({"min_lr": 1e-4, "sched": "step"}, r"min_lr \(0.0001\) does nothing for sched step"),
        ({"decay_rate": 0.5}, r"decay_rate \(0\.5\) is for sched step, which is not on"),
        ({"model_ema_warmup": True}, r"model_ema_warmup \(True\) is for model_ema, which is not on"),
        ({"consistency_every": 3}, r"consistency_every \(3\) is for consistency_mode every, which is not on"),
        (
            {"consistency_mode": "previous", "epochs": 1},
            "consistency_mode previous compares with the epoch before, and epochs is 1",
        ),
        ({"method": "linear", "lr": 0.1}, "linear trains the classifier alone, at head_lr, so lr 0.1 does nothing"),
        ({"method": "linear", "lr": None}, None),
        ({"method": "linear", "lr": 0.1, "head_lr": None}, None),
        ({"method": "linear", "lr": 0.1, "head_lr": 0.2}, None),
        ({"method": "full", "adapter": {"modulation_noise": 0.5}}, "full has no v, so modulation_noise 0.5 does"),
        ({"opt": "adahessian"}, "opt 'adahessian' wants second derivatives"),
        ({"resume_changed": True}, "resume_changed is for --resume, which is not given"),
        ({"experiment": "é" * 101}, "experiment must be the name of a folder within output.* at most 200 bytes"),
    ],
)
def test_contradictions_and_names_that_nobody_knows(values: dict, message: str | None) -> None:
    if message is None:
        assert RunConfig(**values)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig(**values)
    assert len(caught.value.problems) == 1


def test_a_method_that_has_a_rate_of_its_own_stays_valid_with_it() -> None:
    for method in METHODS:
        assert RunConfig(method=method).resolved().resolved()


def test_every_schedule_is_one_of_timm_and_steps_by_updates() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name in get_args(kinds_of(RunConfig)["sched"]):
        scheduler = make_scheduler(RunConfig(sched=name), torch.optim.SGD([parameter], lr=1.0), batches=3)
        scheduler.step_update(3)
        assert 0 < scheduler.optimizer.param_groups[0]["lr"] <= 1


def test_a_short_flag_takes_its_value_with_and_without_a_space(tmp_path: Path) -> None:
    (tmp_path / "a=b.yaml").write_text("epochs: 3\n")
    for written in (["-b8", f"-c{tmp_path / 'a=b.yaml'}"], ["-b", "8", "-c", f"{tmp_path / 'a=b.yaml'}"], ["-b=8"]):
        config = parse_run_config(written)
        assert config.batch_size == 8 and config.epochs == (10 if len(written) == 1 else 3)
    with pytest.raises(ConfigError, match=r"batch_size must be a whole number of at least 1, got 'x'. \(-bx\)"):
        parse_run_config(["-bx"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--rank", "--adapter.rank"),
        ("--learning_rate", "--lr"),
        ("--amp", "--amp-dtype"),
        ("--lora-alpha", "--adapter.alpha"),
        ("--r", "--adapter.rank"),
        ("--per_device_train_batch_size", "--batch-size"),
        ("--gradient-accumulation-steps", "--grad-accum-steps"),
        ("--label-smoothing", "--smoothing"),
    ],
)
def test_what_others_call_a_flag_is_understood(written: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config([written, "8"])
    assert caught.value.problems == (f"{written!r} is no flag. Did you mean {meant!r}?",)


def test_every_name_of_ours_that_others_names_stand_for_exists() -> None:
    own = {*kinds_of(RunConfig), *kinds_of(AdapterConfig)}
    assert {name.replace("-", "_") for name in ELSEWHERE.values()} <= own


def test_file_and_flags_tell_all_their_mistakes_together_and_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epohcs: 3\nbatch_size: many\nlr: 1\nlr: .nan\nadapter:\n  rnk: 2\n  rank: 0\nno_aug: yes\n")
    args = ["--adapter.dropout", "2", "--shots", "x", "--aa", "rand-m9", "--epohcs", "3", "--hflip=", "word", "--mixup"]
    with pytest.raises(ConfigError) as caught:
        parse_run_config(["foo", "-c", str(path), *args])
    assert caught.value.owner == f"{path} with the command line"
    assert sorted(caught.value.problems) == [
        "'--epohcs' is no flag. Did you mean '--epochs'?",
        "'foo' stands behind no flag.",
        "adapter.dropout must be a probability in [0, 1), got 2.0. (--adapter.dropout)",
        "adapter.rank must be an integer of at least 1, got 0. (line 7)",
        "adapter.rnk is not a field. Did you mean 'rank'? (line 6)",
        "batch_size must be a whole number of at least 1, got 'many'. (line 2)",
        "epohcs is not a field. Did you mean 'epochs'? (line 1)",
        "hflip must be a number of at least 0 and at most 1, got ['', 'word']. (--hflip)",
        "lr is given twice, in lines 3 and 4.",
        "lr must be a number of at least 0, or None, got nan. (line 4)",
        "mixup must be a number of at least 0, got nothing. (--mixup)",
        "no_aug leaves training images alone, so aa can't change them: give one of them. (line 8, --aa)",
        "shots must be a whole number of at least 1, or None, got 'x'. (--shots)",
    ]


def test_a_path_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="embedded null byte"):
        parse_run_config(["-c", "a\0b"])


def test_a_file_that_cannot_be_read_does_not_hide_the_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(["-c", str(tmp_path / "no.yaml"), "--epochs", "0", "--no-aug", "--aa", "rand-m9"])
    assert list(caught.value.problems) == [
        "cannot be read: No such file or directory.",
        "epochs must be a whole number of at least 1, got 0. (--epochs)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"epochs: 3\nmodel: \xff", "is not YAML: .*\\xff|is not YAML: .*#x00ff"),
        (b"x: " + b"[" * 5000, "is not YAML: it is nested too deeply"),
        (b"a: &a [*a]", "(?s)is not YAML: .*recursive.*line 1"),
        (b"\n\nexperiment: 2024-13-45", "(?s)'2024-13-45' is no timestamp.*line 3"),
        (b"seed: " + b"9" * 5000, "(?s)is no int.*line 1"),
        (b"\tepochs: 3", "(?s)is not YAML: .*line 1"),
        (b"epochs: 010", "epochs must be a whole number of at least 1, got '010'"),
        (b"epochs: 1:30", "epochs must be a whole number of at least 1, got '1:30'"),
        (b"pretrained: 1", r"pretrained must be true or false, got 1\. \(line 1\)"),
        (b"aa: no", "aa must be text that is not blank, or None, got False"),
        (b"adapter.rank: 3", r"adapter.rank is not a field. Write adapter: \{rank: …\}"),
        (b"3: 4", "3 is not a field"),
    ],
)
def test_oddities_of_yaml_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_run_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", [b"", b"# nothing", b"~", b"\xef\xbb\xbfepochs: 10", b"---\n{}"])
def test_nothing_in_a_file_means_the_defaults(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(text)
    assert load_run_config(tmp_path / "c.yaml") == RunConfig()


@pytest.mark.parametrize(
    "name", ["1e3", "12e4567", "010", "1:30", "no", "2024-01-01", "0x1f", "~", "1_0", ".5", "=", "#"]
)
def test_text_that_looks_like_something_else_survives(tmp_path: Path, name: str) -> None:
    config = RunConfig(revision=name)
    for text in (dump_run_config(config), dump_differences(config)):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        assert load_run_config(tmp_path / "c.yaml") == config


def test_a_saved_adapter_of_a_square_image_size_or_of_random_weights_can_be_tested() -> None:
    config = RunConfig(eval_only=True, adapter_dir=Path("a"))
    saved = {"architecture": "test_vit", "pretrained_tag": "", "model_kwargs": {"img_size": [64, 64], "depths": [2, 2]}}
    own = config.for_adapter({**saved, "metadata": {"pretrained": False, "pretrained_path": "a.safetensors"}})
    assert (own.img_size, own.model_kwargs, own.pretrained_path) == (64, {"depths": [2, 2]}, None)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["patch_size=4", "depth=2"], {"patch_size": 4, "depth": 2}),  # as timm's own train.py takes them
        (
            ["depths=[2,2]", "act_layer=gelu", "qkv_bias=False"],
            {"depths": [2, 2], "act_layer": "gelu", "qkv_bias": False},
        ),
        (["patch_size", "4"], {"patch_size": 4}),
    ],
)
def test_several_options_of_the_model(words: list[str], options: dict[str, object]) -> None:
    assert parse_run_config(["--model-kwargs", *words]).model_kwargs == options
    assert parse_run_config([f"--model-kwargs={words[0]}", *words[1:]]).model_kwargs == options


def test_a_value_that_no_option_may_have_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model_kwargs.*depth"):
        parse_run_config(["--model-kwargs", "depth={1}"])


@pytest.mark.parametrize(
    "args",
    [["--epochs", "0"], ["--model", "vit_bas"], ["-c", "no.yaml"], ["--opt", "adamv", "--foo"], ["-c", "bad.yaml"]],
)
def test_nothing_is_made_on_disk_before_the_config_is_valid(tmp_path: Path, args: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text("epohcs: 3\n")
    done = finished(TRAIN, *args, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
    assert done.stderr.startswith("train.py: ") and " is not usable:\n  - " in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["bad.yaml"]


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


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "a/b", "..", ".hidden", "", " ", "C:x", "a\\b", "a\0b"])
def test_a_name_cannot_lead_out_of_the_output_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"experiment must be (the name of a folder within output|text that is not)"):
        RunConfig(experiment=name)
    assert RunConfig(experiment="lora, r 8").experiment
