"""What a run was told, as far as it decides about its result: which runs are the same, and which may be compared"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nolora_vision.training.errors import RunError
from nolora_vision.training.neutral import NEUTRAL

if TYPE_CHECKING:
    from nolora_vision.benchmark.results import Run

FORMER_OPTIONS: Mapping[str, Mapping[str, Any]] = {"fourierft": {"scaling": 150.0}}
"""By method: options whose defaults have changed since records state all of them; older records mean these."""
ELSEWHERE = ("dataset", "model", "seed")
"""Fields whose values every run states outside its config and its point."""
OF_THE_METHOD = (
    *("method", "method_options", "peft", "noise", "opt_kwargs"),
    *("consistency", "consistency_mode", "consistency_fraction", "consistency_every"),
)
"""Fields of a run's config that are the method itself; all that begins with adapter is, too."""
OF_THE_MACHINE = (
    *NEUTRAL,
    *("eval_only", "adapter_dir", "seed", "pretrained_path", "frozen_dtype", "fused_attn", "torchcompile"),
    *("vtab_root", "check_shared", "deterministic", "grad_checkpointing"),
)
"""Fields that change no result but by rounding, or that differ between seeds by design."""
ROWS = "dataset_rows"
"""Among settings: how many images the parts of the dataset hold, which tells a packed part from the whole."""
CHOSEN = "chosen"
"""In place of a value that a sweep chose for each method on validation images."""
_NESTED = ("adapter", "method_options")
Axes = tuple[tuple[str, Any], ...]
"""Values of grid axes by name, in the order of names."""


def axes_of(items: Iterable[tuple[str, Any]]) -> Axes:
    """Axes in the order of names, lists as tuples, so that they can be compared and counted."""
    return tuple(sorted((name, _hashable(value)) for name, value in items))


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return axes_of(value.items()) if isinstance(value, dict) else value


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record's config that decide about its result, by dotted names; empty if it has none."""
    former = FORMER_OPTIONS.get(str(config.get("method")), {})
    found = {f"method_options.{name}": value for name, value in former.items()}
    for name, value in _flat(config):
        if name not in OF_THE_MACHINE and name not in ELSEWHERE:
            found[name] = _hashable(value)
    return found


def names_in(layer: Any) -> frozenset[str]:
    """The fields that a part of a sweep, its base or one of its methods, gives or has candidates of its own for."""
    if not isinstance(layer, Mapping):
        return frozenset()
    candidates = layer.get("choose")
    return frozenset(name for name, _ in _flat(layer) if name not in ("choose", "only")) | frozenset(
        map(str, candidates if isinstance(candidates, Mapping) else ())
    )


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name in _NESTED and isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", of_inner) for inner, of_inner in value.items())
        else:
            yield str(name), value


def own_fields(run: Run) -> frozenset[str]:
    """The fields of a run's method: what its sweep says of it; where that says nothing, adapters and the like."""
    named = run.sweep.named.get(run.record["label"])
    if named is None:
        named = frozenset(name for name in run.settings if name.partition(".")[0] in ("adapter", *OF_THE_METHOD))
    options = (name for name in run.settings if name.startswith("method_options."))
    rate = () if "lr" in run.sweep.base else ("lr",)  # its default is the method's
    return frozenset((*named, *options, *rate, "method"))


def filled(runs: Sequence[Run]) -> list[Run]:
    """The runs with the fields that they do not state, being older, at their defaults.

    A default is what runs have whose sweep leaves the field alone, in its base, their method and their point. A failed
    run that states nothing at all has what others of its method or its sweep have.
    """
    usual: dict[tuple[Any, str], Any] = {}
    others: dict[Any, Mapping[str, Any]] = {}
    for run in runs:
        own = own_fields(run)
        told = run.sweep.base | (run.sweep.named.get(run.record["label"]) or frozenset()) | run.point.keys()
        for name, value in run.settings.items():
            if name not in told and (name not in own or name.startswith("method_options.")):
                usual.setdefault((_owner(run, name), name), value)
        if run.settings:
            others.setdefault((run.sweep.folder, run.label), run.settings)
            others.setdefault(run.sweep.folder, run.settings)
    found = []
    for run in runs:
        silent = others.get((run.sweep.folder, run.label)) or others.get(run.sweep.folder, {})
        stated = run.settings or silent
        missing = {name: value for (owner, name), value in usual.items() if owner in (None, stated.get("method"))}
        found.append(replace(run, settings={**missing, **stated}))
    return found


def _owner(run: Run, name: str) -> Any:
    return run.settings.get("method") if name.startswith("method_options.") else None


def with_rows(runs: Sequence[Run]) -> list[Run]:
    """The runs with the rows of their datasets, which no seed changes.

    One that does not say, being older or having failed before it knew, has what others of its dataset have, those of
    its sweep first, if they agree.
    """
    known: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        for place in _row_places(run) if _rows(run) else ():
            known.setdefault(place, set()).add(_rows(run))
    found = []
    for run in runs:
        agreed = (known[place] for place in _row_places(run) if len(known.get(place, ())) == 1)
        rows = _rows(run) or "".join(next(agreed, ()))
        found.append(replace(run, settings={**run.settings, ROWS: rows}) if rows else run)
    return found


def _rows(run: Run) -> str:
    """As test 10,000 / train 50,000; empty where the record does not say."""
    dataset = run.record.get("dataset")
    rows = dataset.get("rows") if isinstance(dataset, dict) else None
    counts = rows.items() if isinstance(rows, dict) else ()
    return " / ".join(sorted(f"{part} {n:,}" if isinstance(n, int) else f"{part} {n}" for part, n in counts))


def _row_places(run: Run) -> Iterator[tuple[Any, ...]]:
    """Where runs of the same rows are looked for, the nearest first."""
    asked = str({**(run.record.get("config") or {}), **run.point}.get("dataset"))
    yield run.sweep.folder, run.dataset, asked
    yield run.sweep.folder, run.dataset
    yield (run.dataset,)


def told_apart(runs: Sequence[Run], baseline: str, warnings: list[str]) -> list[Run]:
    """The runs with what they may not be compared across, and labels that stand for one setting each.

    Raises:
        RunError: if the baseline stands for several.
    """
    found = _with_apart(runs, warnings)
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in found:
        groups.setdefault((run.label, run.dataset, run.model, run.cell_axes), []).append(run)
    names: dict[int, str] = {}
    for group in groups.values():
        free = {name for run in group for name in run.point}
        differing = sorted(set(_differing([run.settings for run in group])) - free)
        if differing and group[0].label == baseline:
            raise RunError(_two_baselines(group, differing))
        for run in group:
            if differing:
                what = ", ".join(f"{_short(name)} {run.settings.get(name)}" for name in differing)
                names[id(run)] = f"{run.label} ({what})"
    return [replace(run, label=names.get(id(run), run.label)) for run in found]


def _with_apart(runs: Sequence[Run], warnings: list[str]) -> list[Run]:
    """The runs with the fields in which those of one dataset and model differ, besides what is a method's own."""
    recipes = [_recipe(run) for run in runs]
    places: dict[tuple[str, str], list[int]] = {}
    for i, run in enumerate(runs):
        places.setdefault((run.dataset, run.model), []).append(i)
    found = list(runs)
    for (dataset, model), here in places.items():
        every = frozenset(name for i in here for name in recipes[i])
        differing = _differing([{**_not_stated(every, runs[i]), **recipes[i]} for i in here])
        beside = [name for name in differing if any(name not in runs[i].point for i in here if name in recipes[i])]
        if beside:
            said = "; ".join(f"{_short(name)} {' or '.join(map(str, differing[name]))}" for name in beside)
            warnings.append(f"{dataset}, {model}: runs of other settings are compared apart: {said}")
        for i in here:
            apart = axes_of((name, recipes[i][name]) for name in differing if name in recipes[i])
            found[i] = replace(runs[i], apart=apart)
    return found


def _recipe(run: Run) -> dict[str, Any]:
    """What a run shares with those that it may be compared with."""
    own, found = own_fields(run), {}
    for name, value in {**run.settings, **run.point}.items():
        if name in run.point and name in run.sweep.choose_axes:
            found[name] = CHOSEN
        elif name in run.point or name not in own:
            found[name] = _hashable(value)
    return {name: value for name, value in found.items() if name not in ELSEWHERE}


def _not_stated(names: frozenset[str], run: Run) -> dict[str, Any]:
    """Fields that others have, and that a run should but for its age."""
    return dict.fromkeys(names - own_fields(run) - {*run.sweep.choose_axes}, "not stated")


def _differing(several: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The fields of which there are several values, with these."""
    values: dict[str, list[Any]] = {}
    for one in several:
        for name, value in one.items():
            if value not in (known := values.setdefault(name, [])):
                known.append(value)
    return {name: known for name, known in values.items() if len(known) > 1}


def _two_baselines(runs: Sequence[Run], differing: Sequence[str]) -> str:
    said = []
    for name in differing:
        folders: dict[Any, list[str]] = {}
        for run in runs:
            folders.setdefault(run.settings.get(name), []).append(run.sweep.folder.name)
        said.append(f"{name} {' or '.join(f'{value} ({sorted(set(of))[0]})' for value, of in folders.items())}")
    return (
        f"{runs[0].label}, the baseline, stands for runs of several settings: {'; '.join(said)}. Report on the folders "
        "apart, give the settings names of their own in the sweeps, or choose another --baseline."
    )


def _short(name: str) -> str:
    return name.removeprefix("adapter.").removeprefix("method_options.").replace("_", " ")
