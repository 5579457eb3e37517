"""A run that is stopped in any way goes on as if nothing had happened, or says why it can't."""

import errno
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nolora_vision.adapters import whole_directory
from nolora_vision.config import AdapterConfig
from nolora_vision.training import engine
from nolora_vision.training.checkpoints import read_newest
from nolora_vision.training.config_file import dump_run_config, load_run_config
from nolora_vision.training.errors import Interrupted, RunError
from nolora_vision.training.progress import Silence
from nolora_vision.training.run import main, run
from nolora_vision.training.run_config import RunConfig
from nolora_vision.training.stopping import StopRequest
from tests.soak import times
from tests.training import killed_run
from tests.training.forked_start import TRAIN, finished, started
from tests.training.killed_run import left_by

SMALL = RunConfig(
    **{"model": "test_vit", "dataset": "digits", "pretrained": False, "img_size": 16, "workers": 0},
    model_kwargs={"patch_size": 4, "depth": 2},
    **{"max_train_samples": 64, "max_eval_samples": 64, "epochs": 3, "batch_size": 16, "lr": 5e-3},
)
VARIANTS: dict[str, dict[str, Any]] = {
    "gate": {"adapter": AdapterConfig(modulation="gate", dropout=0.1)},
    "compared with the last epoch": {
        **{"method": "lora", "consistency": 0.1, "consistency_mode": "previous"},
        "adapter": AdapterConfig(modulation_noise=0.5),
    },
    "every second batch": {
        **{"consistency": 0.1, "consistency_mode": "every", "batch_size": 8},
        "adapter": AdapterConfig(modulation_noise=0.5),
    },
    "mixup, averages, accumulation": {
        **{"mixup": 0.5, "model_ema": True, "drop_path": 0.1, "grad_accum_steps": 2, "batch_size": 8},
        **{"aa": "rand-m9-mstd0.5", "reprob": 0.3},
    },
    "full, momentum, workers": {"method": "full", "opt": "momentum", "lr": 1e-2, "workers": 1},
}


class StopAt(Silence):
    """Sends this process a signal after some steps of it."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.left, self.number = step, number

    def step(self, **_: object) -> None:  # type: ignore[override]
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def stopped(config: RunConfig, step: int, number: int = signal.SIGTERM) -> Path:
    """A run that is stopped after so many steps; its folder."""
    with pytest.raises(Interrupted) as caught:
        run(config, progress=StopAt(step, number), checkpoints=True)
    assert caught.value.number == number
    return caught.value.folder


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = replace(SMALL, output=tmp_path, **VARIANTS[name])
    whole = run(replace(config, experiment="whole"), progress=Silence(), checkpoints=True)
    part = replace(config, experiment="part", resume="auto")
    for step in (3, 4):
        stopped(part, step)
    record = run(part, progress=Silence(), checkpoints=True)
    assert left_by(Path(record["folder"])) == left_by(Path(whole["folder"]))
    assert len(record["resumed_at_updates"]) == 2 and "resumed_at_updates" not in whole
    assert record["metrics"]["train_seconds"] > 0


def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    kills, epochs = times(20, 4), times(24, 12)
    done = finished(str(Path(killed_run.__file__)), str(tmp_path), str(kills), str(epochs), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["killed_in"].values()) == kills and found["killed"] == found["whole"]
    assert found["killed_in"].keys() == {"step", "save", "evaluation"}


def test_a_stop_in_validation_or_in_the_test_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, output=tmp_path, max_eval_samples=None)
    whole = run(replace(config, experiment="whole"), progress=Silence(), checkpoints=True)
    plain, calls = engine.F.cross_entropy, [0]

    def interrupting(*args: Any, **options: Any) -> Any:
        if options.get("reduction") == "none":  # only `evaluate` asks for that
            calls[0] += 1
            if calls[0] in (3, 50):
                os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **options)

    monkeypatch.setattr(engine.F, "cross_entropy", interrupting)
    part = replace(config, experiment="part", resume="auto")
    for epochs in (0, 3):
        folder = stopped(part, -1)
        found, _ = read_newest(folder)
        assert found is not None and found.facts["fit"]["epochs"] == epochs
    record = run(part, progress=Silence(), checkpoints=True)
    assert left_by(Path(record["folder"])) == left_by(Path(whole["folder"]))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_says_how_to_go_on_and_needs_no_more_than_that(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nolora_vision.training.run.LiveProgress", lambda: StopAt(5, number))
    args = ["--model", "test_vit", "--dataset", "digits", "--no-pretrained", "--img-size", "16", "--epochs", "3"]
    args += ["--model-kwargs", "patch_size", "4", "--max-train-samples", "64", "--max-eval-samples", "64", "-b", "16"]
    assert main([*args, "-j", "0", "--output", str(tmp_path)]) == code
    (folder,) = tmp_path.iterdir()
    said = capfd.readouterr().err
    assert "Stopping after this step" in said and f"Go on: python train.py --resume {folder}\n" in said
    monkeypatch.undo()
    assert main(["--resume", str(folder)]) == 0
    assert f"Going on at step 5, epoch 2, from {folder}" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == [folder] and not (folder / "checkpoints").exists()
    record = (folder / "record.json").read_bytes()
    assert main(["--resume", str(folder)]) == 0
    assert f"{folder} is done already" in capfd.readouterr().out and (folder / "record.json").read_bytes() == record


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as at a terminal, also where the tests run in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_what_it_does_without_us(capfd: pytest.CaptureFixture[str], interruptible: None) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT and "once more to stop at once" in capfd.readouterr().err
        assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_to_the_whole_group_loses_nothing_though_the_loaders_die(tmp_path: Path) -> None:
    config = replace(SMALL, output=tmp_path, epochs=20, workers=2)
    whole = run(replace(config, experiment="whole", workers=0), progress=Silence(), checkpoints=True)
    again = replace(config, experiment="part", checkpoint_steps=1)
    (tmp_path / "part.yaml").write_text(dump_run_config(again), encoding="utf-8")
    log = tmp_path / "log"
    with started(TRAIN, "-c", str(tmp_path / "part.yaml"), log=log) as process:
        process.until("epoch 2/20")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait() == 143, log.read_text()
    assert "Go on: python train.py --resume" in log.read_text()
    record = run(replace(again, resume="auto"), progress=Silence(), checkpoints=True)
    assert record["resumed_at_updates"] and left_by(Path(record["folder"])) == left_by(Path(whole["folder"]))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, capsys) -> None:
    config = replace(SMALL, output=tmp_path, checkpoint_steps=2, experiment="run", resume="auto")
    folder = stopped(config, 7)
    first, second = sorted((folder / "checkpoints").iterdir())  # keep_checkpoints is 2
    state = second / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    found, complaints = read_newest(folder)
    assert found is not None and found.path == first
    assert complaints == [f"{second} is damaged (state.safetensors does not have its checksum) and is not used."]
    (first / "checksums.json").unlink()
    assert read_newest(folder)[0] is None
    run(config, progress=Silence(), checkpoints=True)  # from the start
    assert str(second) in capsys.readouterr().out


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, output=tmp_path, checkpoint_steps=2, experiment="run", resume="auto")
    whole = run(replace(config, experiment="whole"), progress=Silence(), checkpoints=True)
    write, room = whole_directory._write, [7]

    def limited(path: Path, content: bytes) -> None:
        room[0] -= 1
        if room[0] < 0:
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(whole_directory, "_write", limited)
    with pytest.raises(RunError, match=r"step-00000006 cannot be written \(No space left on device\)\. The last good"):
        run(config, progress=Silence(), checkpoints=True)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    monkeypatch.undo()
    record = run(config, progress=Silence(), checkpoints=True)
    assert record["resumed_at_updates"] == [4]
    assert left_by(Path(record["folder"])) == left_by(Path(whole["folder"]))


def test_another_config_is_refused_field_by_field(tmp_path: Path) -> None:
    config = replace(SMALL, output=tmp_path, experiment="run", resume="auto")
    folder = stopped(config, 2)
    other = replace(config, epochs=4, resume=str(folder), adapter=AdapterConfig(rank=2), traceback=True)
    with pytest.raises(RunError, match=r"(?s)epochs: 3 then, 4 now.*adapter\.rank: 8 then, 2 now.*--resume-changed"):
        run(other, progress=Silence(), checkpoints=True)
    longer = replace(config, epochs=4, resume_changed=True)
    assert stopped(longer, 2) == folder
    record = run(replace(longer, resume=str(folder), resume_changed=False), progress=Silence(), checkpoints=True)
    assert len(record["history"]) == 4 and record["config_changes"] == ["epochs: 3 then, 4 now"]
    assert load_run_config(folder / "args.yaml").epochs == 4


def test_batches_of_another_size_begin_where_the_others_ended(tmp_path: Path) -> None:
    config = replace(SMALL, output=tmp_path, experiment="run", resume="auto", epochs=1)
    stopped(config, 2)
    record = run(replace(config, batch_size=32, resume_changed=True), progress=Silence(), checkpoints=True)
    assert record["metrics"]["train_forward_images"] == 64


@pytest.mark.parametrize("name", ["lamb", "adafactorbv"])
def test_optimizers_with_unusual_state_are_saved(name: str, tmp_path: Path) -> None:
    config = replace(SMALL, output=tmp_path, opt=name, epochs=2)
    whole = run(replace(config, experiment="whole"), progress=Silence(), checkpoints=True)
    part = replace(config, experiment="part", resume="auto")
    stopped(part, 3)
    record = run(part, progress=Silence(), checkpoints=True)
    assert left_by(Path(record["folder"])) == left_by(Path(whole["folder"]))


def test_auto_finds_the_unfinished_run_of_this_config_and_else_starts_one(tmp_path: Path) -> None:
    config = replace(SMALL, output=tmp_path, resume="auto")
    folder = stopped(config, 2)
    other = Path(run(replace(config, seed=1), progress=Silence(), checkpoints=True)["folder"])
    assert other != folder
    record = run(config, progress=Silence(), checkpoints=True)
    assert Path(record["folder"]) == folder and record["resumed_at_updates"] == [2]
    assert Path(run(config, progress=Silence(), checkpoints=True)["folder"]) not in (folder, other)


def test_what_is_no_run_cannot_go_on(tmp_path: Path, capsys) -> None:
    assert main(["--resume", str(tmp_path)]) == 2
    assert "no folder of a run, which holds args.yaml" in capsys.readouterr().err
