"""The recipes in configs/suite and configs/vtab are what the generator writes, and it quotes what was published."""

from __future__ import annotations

from pathlib import Path

import timm

from nolora_vision.benchmark.published import EIGHT_SETS, SUITE, VTAB
from nolora_vision.benchmark.suite import (
    MODELS,
    SETS,
    SUITE_RECIPES,
    VTAB_RECIPES,
    main,
    recipes,
    suite_configs,
    vtab_configs,
)
from nolora_vision.training.config_file import load_run_config

CONFIGS = Path(__file__).parents[2] / "configs"


def one_line(text: str) -> str:
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))


def test_the_committed_files_are_what_it_writes_and_no_others(tmp_path: Path) -> None:
    assert main(tmp_path) == 0
    written = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.yaml")}
    kept = {
        p.relative_to(CONFIGS).as_posix(): p.read_bytes() for f in ("suite", "vtab") for p in (CONFIGS / f).rglob("*.*")
    }
    assert written == kept, "run python -m nolora_vision.benchmark.suite, and delete what it no longer writes"


def test_a_file_reads_back_as_its_config() -> None:
    found = {key: load_run_config(CONFIGS / "suite" / key[0] / f"{key[1]}_{key[2]}.yaml") for key in suite_configs()}
    assert found == suite_configs() and len(found) == 2 * 8 * 9
    assert {method: load_run_config(CONFIGS / "vtab" / f"{method}.yaml") for method in vtab_configs()} == vtab_configs()


def test_the_recipe_of_the_suite() -> None:
    assert list(SETS) == ["pets", "cars", "cifar10", "dtd", "eurosat", "aircraft", "resisc45", "cifar100"]
    for config in suite_configs().values():
        assert (config.epochs, config.batch_size, config.opt, config.amp_dtype) == (10, 64, "adamw", "bfloat16")
        assert (config.keep_epoch, config.lr, config.head_lr) == ("best", None, 3e-3)
    for config in vtab_configs().values():
        assert (config.epochs, config.batch_size, config.opt, config.weight_decay) == (100, 64, "adamw", 1e-4)
        assert (config.train_on, config.keep_epoch, config.no_aug) == ("train_val", "last", True)
    assert set(MODELS.values()) <= set(timm.list_pretrained())


def test_every_published_row_is_quoted_in_full() -> None:
    """Each score of the suite, in the file of its set and method and in no other."""
    texts = {name: one_line(text) for name, text in recipes().items()}
    for row in SUITE:
        (method,) = (method for method, recipe in SUITE_RECIPES.items() if row.method in recipe.published)
        for dataset, title, value in zip(SETS, EIGHT_SETS, row.top1_percent, strict=True):
            quote = f"% ({row.method}; {row.source})"
            text = texts[f"suite/vit_base/{dataset}_{method}.yaml"]
            assert text.startswith(title)
            assert (f"{value:g} {quote}" in text) if value is not None else quote not in text
    quoted = [name for name, text in texts.items() if "published, by" in text]
    assert len(quoted) == 5 * 8 + 4 and not [name for name in quoted if "vit_large" in name]
    assert all(("no published number was collected" in texts[name]) != (name in quoted) for name in texts)
    names = {published for recipe in VTAB_RECIPES.values() for published in recipe.published}
    assert names <= {row.method for row in VTAB}


def test_fourierft_has_as_many_parameters_as_the_published_row() -> None:
    row = next(row for row in SUITE if row.method == "FourierFT")
    assert 12 * SUITE_RECIPES["fourierft"].options["n_frequency"] == row.parameters
