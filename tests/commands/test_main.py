"""The command nolora-vision: exit codes, and one message for what a user can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import nolora_vision
from nolora_vision.adapters.export import ExportError
from nolora_vision.commands import main as command
from nolora_vision.commands.main import main
from nolora_vision.training.errors import RunError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nolora-vision {nolora_vision.__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_names_the_commands(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(args)
    out = capsys.readouterr().out
    assert all(name in out for name in ("predict", "summary", "export", "--traceback", "--version"))


@pytest.mark.parametrize("name", ["predict", "summary", "export"])
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert "DIR_OR_ID" in capsys.readouterr().out


def test_an_unknown_command_or_flag_is_2() -> None:
    for args in (["perdict"], ["predict", "a", "b", "--no-such-flag"]):
        with pytest.raises(SystemExit, match="2"):
            main(args)


@pytest.mark.parametrize(
    "error",
    [
        RunError("why"),
        ExportError("why"),
        nolora_vision.InjectionError("why"),
        nolora_vision.AdapterNotFoundError("why"),
        nolora_vision.ConfigError("AdapterConfig", ["why"]),
    ],
)
def test_errors_of_the_user_are_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: list[str]) -> int:
        raise error

    monkeypatch.setattr(command, "run", fail)
    assert main(["predict"]) == 2
    assert capsys.readouterr().err == f"nolora-vision: {error}\n"
    with pytest.raises(type(error)):
        main(["predict", "--traceback"])


def test_errors_of_ours_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["predict"])


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert main(["predict"]) == 130
    assert capsys.readouterr().err == "nolora-vision: interrupted.\n"


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    nolora_vision.save_adapter(model, tmp_path / "adapter")
    for i in range(4):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / f"{i}.png")
    argv = [sys.executable, "-m", "nolora_vision", "predict", "adapter", ".", "--batch-size", "1"]
    with subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before the first line, as `| true`
        err = process.stderr.read()
    assert process.returncode == 141 and err == b""


def test_help_loads_no_timm() -> None:
    code = (
        "import sys; from nolora_vision.commands.main import commands; commands(); "
        "print([name for name in ('timm', 'torchvision', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
