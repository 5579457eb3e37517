"""What SECURITY.md promises, as far as a test can hold it; hostile adapters are in tests/adapters, damaged images in
tests/training/test_bad_data.py."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from nolora_vision.benchmark.report import main as report
from nolora_vision.benchmark.sweep import main as sweep
from nolora_vision.training.run import main

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "train.py", *sorted((ROOT / "nolora_vision").rglob("*.py"))]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "__import__", "torch.load", "os.system", "os.popen"}
ARGUMENTS = {("shell", True), ("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False)}
LOADERS = {"yaml.load": "Loader"}


def dangers(source: str) -> list[str]:
    """What in a source could run code that came from outside."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS or name in {"yaml.unsafe_load", "yaml.full_load"} else []
            given = {k.arg: k.value for k in node.keywords}
            found += [f"{k}={v}" for k, v in ARGUMENTS if isinstance(w := given.get(k), ast.Constant) and w.value is v]
            found += [name] if name in LOADERS and LOADERS[name] not in given else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_runs_code_from_outside(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "load_dataset(x, trust_remote_code=True)",
    ],
)
def test_and_the_search_for_it_finds_it(source: str) -> None:
    assert dangers(source)


def code_of(*args: str) -> object:
    """Exit code of train.py."""
    try:
        return main(args)
    except SystemExit as error:
        return error.code


def test_yaml_makes_no_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, touched = tmp_path / "c.yaml", tmp_path / "touched"
    config.write_text(f"seed: !!python/object/apply:os.system ['touch {touched}']\n")
    assert code_of("-c", str(config)) == 2
    assert "python/object/apply" in capsys.readouterr().err and not touched.exists()


class Touches:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("flag", ["--pretrained-path", "--dataset", "--splits", "--resume"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".bin", ".safetensors", ".parquet", ".arrow", ".json"])
def test_a_pickle_is_not_loaded_whatever_its_name(flag: str, suffix: str, tmp_path: Path) -> None:
    file, touched = tmp_path / f"evil{suffix}", tmp_path / "touched"
    file.write_bytes(pickle.dumps({"model": Touches(touched)}))
    small = ["--model", "test_vit", "--img-size", "16", "--model-kwargs", "patch_size", "4", "-j", "0", "--epochs", "1"]
    data = [] if flag == "--dataset" else ["--dataset", "digits"]
    assert code_of(*small, *data, "--output", str(tmp_path / "out"), flag, str(file)) == 2
    assert not touched.exists()
    pickle.loads(file.read_bytes())
    assert touched.exists()  # it would have


SECRETS = {
    "HF_TOKEN": "hf_canaryAAAA",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryBBBB",
    "WANDB_API_KEY": "canaryCCCC",
    "AWS_SECRET_ACCESS_KEY": "canaryDDDD",
}


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(tmp_path: Path) -> None:
    args = ["--model", "test_vit", "--dataset", "digits", "--no-pretrained", "--img-size", "16", "--model-kwargs"]
    args += ["patch_size", "4", "--max-train-samples", "32", "--max-eval-samples", "32", "-b", "16", "-j", "0"]
    args += ["--epochs", "1", "--output", str(tmp_path), "--report-to", "tensorboard", "--experiment", "run"]
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"record.json", "args.yaml", "README.md", "adapter_config.json"} <= {path.name for path in files}
    said = done.stdout.encode() + done.stderr.encode() + b"".join(path.read_bytes() for path in files)
    assert b"canary" not in said and os.path.expanduser("~").encode() + b"/" not in said


SWEEP = """
base: {model: test_vit, dataset: digits, pretrained: false, img_size: 16, model_kwargs: {patch_size: 4}, workers: 0,
  max_train_samples: 32, max_eval_samples: 32, batch_size: 16, epochs: 1, validate_every: 0}
methods:
  ../../out: {method: lora}
  /abs/olute: {method: bitfit}
baseline: ../../out
choose: {axes: {lr: [1e-3]}, seeds: [100], extend: 0}
seeds: [0]
"""


def test_names_of_a_sweep_leave_no_file_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    config, folder = tmp_path / "in" / "evil.yaml", tmp_path / "in" / "deep" / "sweep"
    config.write_text(SWEEP)
    assert sweep(config, output=folder) == 0
    report((folder,), output=folder / "report")
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    assert outside == [config] and len(list((folder / "runs").iterdir())) >= 4
    assert (folder / "report" / "report.html").is_file()
