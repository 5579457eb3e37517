"""What an import costs, and that the wheel works outside the clone."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code: str, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    heavy = (
        "timm",
        "torchvision",
        "datasets",
        "accelerate",
        "peft",
        "matplotlib",
        "triton",
        "tyro",
        "pydantic",
        "rich",
    )
    code = "import sys, torch; before = set(sys.modules); import nolora_vision; print(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in python(code).split()}
    assert "nolora_vision" in loaded and not loaded & set(heavy)


def test_every_public_name_is_there() -> None:
    import nolora_vision

    names = "AdapterConfig inject eject disabled fold summary print_trainable_parameters adapter_parameters"
    names += " head_parameters param_groups save_adapter load_adapter freeze_backbone low_rank_delta NoLoRALinear"
    names += " hold_frozen release_frozen"
    missing = [name for name in names.split() if not hasattr(nolora_vision, name)]
    assert not missing and nolora_vision.__version__


def test_the_lowest_versions_are_those_that_are_admitted() -> None:
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    admitted = dict(
        re.findall(r'^    "([\w-]+)>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    )
    assert len(admitted) == 6 and lowest.keys() - admitted.keys() == {"torchvision"}  # that follows torch
    for name, version in admitted.items():
        assert f"{lowest[name]}.".startswith(f"{version}."), f"{name}: {lowest[name]}, and pyproject.toml has {version}"


def test_wheel_and_sdist_work_outside_the_clone(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.stat().st_size < 1_000_000
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    packaged = {name for name in names if name.endswith(".py")}
    assert packaged == {p.relative_to(ROOT).as_posix() for p in (ROOT / "nolora_vision").rglob("*.py")}
    code = (
        "import nolora_vision, timm, torch; m = nolora_vision.inject(timm.create_model('test_vit'));"
        "print(nolora_vision.__file__); m(torch.zeros(1, 3, 160, 160))"
    )
    where = python(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    assert Path(where).is_relative_to(site)
