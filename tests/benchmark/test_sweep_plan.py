"""The plan of a sweep from hand-made results: what is due, what is chosen, what is extended."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from nolora_vision import ConfigError
from nolora_vision.benchmark.settings import FORMER_OPTIONS
from nolora_vision.benchmark.sweep_plan import Choose, Sweep, plan, read_sweep, whole_plan
from nolora_vision.benchmark.sweep_task import Task
from nolora_vision.methods.catalogue import METHODS as CATALOGUE
from nolora_vision.training.config_file import as_plain
from nolora_vision.training.errors import NotFiniteError
from nolora_vision.training.kinds import from_mapping
from nolora_vision.training.record import environment

METHODS = {"lora": {"method": "lora"}, "tanh": {"method": "nolora", "adapter": {"nonlinearity": "tanh"}}}
RATES = [1e-3, 2e-3, 4e-3]


def make(**changes: Any) -> Sweep:
    values = {"methods": METHODS, "choose": Choose({"lr": RATES}, seeds=[100], extend=1), "seeds": [0, 1]} | changes
    return Sweep(**values)


def done(task: Task, top1: float) -> dict[str, Any]:
    return {"status": "done", "config": as_plain(asdict(task.config)), "metrics": {"val_top1_percent": top1}}


def failed(task: Task, error: Exception | None = None) -> dict[str, Any]:
    error = error or NotFiniteError("loss", math.nan, step=3, epoch=1, rates="lr 1")
    facts = {"error": str(error), "error_type": type(error).__name__, "config": as_plain(asdict(task.config))}
    return {"status": "failed", **facts}


def finish(sweep: Sweep, score: Any) -> tuple[list[Task], list[Any], dict[str, Any]]:
    """Do everything that is due until nothing is; score(task) → validation top-1, None for a failure."""
    results: dict[str, Any] = {}
    ran: list[Task] = []
    while missing := plan(sweep, results)[0]:
        for task in missing:
            value = score(task)
            known = isinstance(value, float | int)
            results[task.name] = done(task, value) if known else failed(task, value)
        ran += missing
    return ran, plan(sweep, results)[1], results


def test_candidates_come_first_and_each_method_has_as_many() -> None:
    missing, choices = plan(make(), {})
    assert [(t.label, t.phase, t.point["lr"], t.seed) for t in missing] == [
        (label, "choose", lr, 100) for label in METHODS for lr in RATES
    ]
    assert not choices
    assert missing[4].config.adapter.nonlinearity == "tanh" and missing[4].config.lr == 2e-3


def test_the_best_by_validation_is_tested_with_every_seed() -> None:
    ran, choices, _ = finish(make(), lambda task: -abs(math.log2(task.config.lr / 2e-3)))
    final = [(t.label, t.point["lr"], t.seed) for t in ran if t.phase == "final"]
    assert sorted(final) == [(label, 2e-3, seed) for label in METHODS for seed in (0, 1)]
    assert [(c.trials, c.at_edge) for c in choices] == [(3, False)] * 2


def test_what_is_chosen_is_tested_before_more_is_tried() -> None:
    sweep, results = make(), {}
    first, _ = plan(sweep, results)
    results = {task.name: done(task, task.config.lr) for task in first if task.label == "lora"}
    results |= {task.name: done(task, task.config.lr) for task in plan(sweep, results)[0] if task.label == "lora"}
    assert [(t.label, t.phase) for t in plan(sweep, results)[0][:3]] == [("lora", "final")] * 2 + [("tanh", "choose")]


def test_a_best_one_at_an_edge_extends_the_candidates_so_often_and_says_so() -> None:
    ran, choices, _ = finish(make(), lambda task: task.config.lr)
    assert [t.point["lr"] for t in ran if t.label == "lora" and t.phase == "choose"] == [*RATES, 8e-3]
    assert [(c.point, c.trials, c.at_edge) for c in choices] == [({"lr": 8e-3}, 4, True)] * 2
    ran, choices, _ = finish(make(), lambda task: -task.config.lr)
    assert {c.point["lr"] for c in choices} == {5e-4}


def test_two_axes_are_chosen_together_and_extended_apart() -> None:
    sweep = make(choose=Choose({"lr": [1e-3, 2e-3, 4e-3], "head_lr": [1e-3, 1e-2]}, seeds=[7, 8], extend=1))
    ran, choices, _ = finish(sweep, lambda task: task.config.head_lr - abs(task.config.lr - 2e-3))
    points = {(t.point["lr"], t.point["head_lr"]) for t in ran if t.label == "lora" and t.phase == "choose"}
    assert points == {(lr, head) for lr in RATES for head in (1e-3, 1e-2)} | {(2e-3, 1e-1)}
    assert choices[0].point == {"lr": 2e-3, "head_lr": 1e-1} and choices[0].trials == 7 and choices[0].at_edge
    assert choices[0].edges == ("head_lr",)
    more = replace(sweep, choose=replace(sweep.choose, extend=2))
    _, choices, _ = finish(more, lambda task: -abs(task.config.head_lr - 1e-1) - abs(task.config.lr - 1e-3))
    assert choices[0].point == {"lr": 1e-3, "head_lr": 1e-1}  # found at two edges at once, each gone beyond once
    assert not choices[0].at_edge


def test_the_mean_over_the_choosing_seeds_counts() -> None:
    sweep = make(choose=Choose({"lr": RATES}, seeds=[7, 8], extend=0))
    scores = {(1e-3, 7): 90.0, (1e-3, 8): 50.0, (2e-3, 7): 80.0, (2e-3, 8): 80.0, (4e-3, 7): 79.0, (4e-3, 8): 79.0}
    _, choices, _ = finish(sweep, lambda task: scores.get((task.config.lr, task.seed), 0.0))
    assert choices[0].point == {"lr": 2e-3} and choices[0].val_top1_percent == 80.0


def test_a_run_whose_numbers_went_wrong_loses() -> None:
    _, choices, _ = finish(make(), lambda task: None if task.config.lr > 1e-3 else 1.0)
    assert {c.point["lr"] for c in choices} == {1e-3} or {c.point["lr"] for c in choices} == {5e-4}
    assert {c.val_top1_percent for c in choices} == {1.0}


def test_where_all_numbers_went_wrong_nothing_is_chosen_or_tested() -> None:
    ran, choices, results = finish(make(), lambda task: None)
    assert [t.phase for t in ran] == ["choose"] * 6 and not choices
    held = whole_plan(make(), results).held
    assert [h.label for h in held] == ["lora", "tanh"]
    assert "tanh: nothing is chosen and tested, as in all 3 runs to choose by the loss or gradient" in str(held[1])


def test_a_failure_of_the_machine_holds_the_choice_back_until_it_is_tried_again() -> None:
    full = RuntimeError("CUDA out of memory")
    lost = {("tanh", 2e-3)}

    def score(task: Task) -> Any:
        return full if (task.label, task.config.lr) in lost else -abs(math.log2(task.config.lr / 2e-3))

    ran, choices, results = finish(make(), score)
    assert [c.label for c in choices] == ["lora"] and {t.label for t in ran if t.phase == "final"} == {"lora"}
    (held,) = whole_plan(make(), results).held
    assert str(held) == (
        "tanh: nothing is chosen and tested, as 1 of 3 runs to choose by failed (CUDA out of memory). "
        "--retry-failed runs them again."
    )
    results = {name: record for name, record in results.items() if record["status"] == "done"}
    (again,) = plan(make(), results)[0]
    assert (again.label, again.phase, again.config.lr) == ("tanh", "choose", 2e-3)
    choices = plan(make(), {**results, again.name: done(again, 1.0)})[1]
    assert [(c.label, c.point["lr"]) for c in choices] == [("lora", 2e-3), ("tanh", 2e-3)]


def test_older_failures_say_by_their_text_what_they_are() -> None:
    first, *_ = tasks = plan(make(), {})[0]
    results = {task.name: done(task, -abs(math.log2(task.config.lr / 2e-3))) for task in tasks}
    for error, count in (("The loss is nan at step 3 of epoch 1 (…).", 2), ("OutOfMemoryError: 3 GiB", 1), ("", 1)):
        record = {key: value for key, value in failed(first).items() if key != "error_type"}
        assert len(plan(make(), {**results, first.name: {**record, "error": error}})[1]) == count


def test_cells_are_chosen_for_apart_and_methods_may_keep_to_some() -> None:
    methods = {**METHODS, "bias": {"method": "bitfit", "only": {"adapter.rank": [2]}}}
    sweep = make(methods=methods, axes={"adapter.rank": [2, 4], "max_train_samples": [10, 20]})
    ran, choices, _ = finish(sweep, lambda task: -abs(math.log2(task.config.lr / 2e-3)))
    assert len(choices) == 2 * 4 + 2
    assert {t.config.adapter.rank for t in ran if t.label == "tanh"} == {2, 4}
    assert {t.config.adapter.rank for t in ran if t.label == "bias"} == {2}
    assert {t.config.max_train_samples for t in ran} == {10, 20}


def test_without_choosing_every_run_is_tested() -> None:
    missing, _ = plan(make(choose=None, axes={"lr": RATES}), {})
    assert {(t.phase, t.config.lr) for t in missing} == {("final", lr) for lr in RATES}
    assert len(missing) == 2 * 3 * 2


def test_a_result_under_other_settings_is_none() -> None:
    sweep = make()
    task = plan(sweep, {})[0][0]
    record = done(task, 1.0)
    assert task.record_in({task.name: record}) is record
    for name, value, same in (("epochs", 3, False), ("output", "elsewhere", True), ("workers", 7, True)):
        other = {**record, "config": {**record["config"], name: value}}
        assert (task.record_in({task.name: other}) is not None) is same
    without = {**record, "config": {k: v for k, v in record["config"].items() if k != "reprob"}}
    assert task.record_in({task.name: without}) is without  # a field that came later, at its default
    other = {**record, "config": {**record["config"], "adapter": {**record["config"]["adapter"], "rank": 3}}}
    assert task.record_in({task.name: other}) is None


def test_what_lies_in_the_folder_of_other_settings_does_not_count() -> None:
    _, _, before = finish(make(base={"epochs": 8}), lambda task: 1.0)
    _, _, results = finish(make(base={"epochs": 16}), lambda task: 1.0)
    counted = whole_plan(make(base={"epochs": 16}), {**before, **results}).counted({**before, **results})
    assert counted.keys() == results.keys() and not counted.keys() & before.keys()


def test_a_default_of_a_methods_options_is_part_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make(methods={"lora": {"method": "peft-lora"}}, choose=None, seeds=[0])
    (task,) = plan(sweep, {})[0]
    stated, silent = {**done(task, 1.0), "config": task.stated}, done(task, 1.0)
    assert environment()["versions"]["peft"]
    assert stated["config"]["method_options"] == {"lr_ratio": 1.0} and silent["config"]["method_options"] == {}
    assert task.record_in({task.name: stated}) and task.record_in({task.name: silent})
    known = CATALOGUE["peft-lora"]
    other = replace(known, options={"lr_ratio": 4.0})
    monkeypatch.setitem(CATALOGUE, "peft-lora", other)  # type: ignore[arg-type]
    (now,) = plan(sweep, {})[0]
    assert now.record_in({now.name: stated}) is None
    monkeypatch.setitem(FORMER_OPTIONS, "peft-lora", {"lr_ratio": 1.0})  # type: ignore[arg-type]
    (now,) = plan(sweep, {})[0]
    assert now.name != task.name and now.record_in({now.name: silent}) is None  # beside the old one, not over it


def test_defaults_that_have_changed_are_known_to_older_records() -> None:
    """Whoever changes a default adds the old one to FORMER_OPTIONS; records that state all options need no entry."""
    then = {
        **{m: {"lr_ratio": 1.0, "init_gain": 1.0, "rank_space_lr_ratio": 1.0} for m in ("nolora", "aurora")},
        "lora": {"lr_ratio": 1.0, "init_gain": 1.0},
        **{method: {"lr_ratio": 1.0} for method in ("peft-lora", "rslora", "dora")},
        **{method: {} for method in ("linear", "full", "bitfit", "layernorm", "pissa", "hira", "ia3")},
        "adaptformer": {"bottleneck": None, "scale": 0.1},
        "lora-plus": {"lr_ratio": 16.0},
        "vera": {"projection_prng_key": 0, "d_initial": 0.1},
        "fourierft": {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        "peanut": {"depth": 0, "scaling": 1.0, "act_fn": "relu"},
        "randlora": {"projection_prng_key": 0, "randlora_alpha": None},
        "c3a": {"block_size": None},
        "oft": {"block_size": 32},
        "boft": {"block_size": 4},
    }
    for method, options in then.items():
        assert {**CATALOGUE[method].options, **FORMER_OPTIONS.get(method, {})} == options


def test_names_differ_where_settings_do() -> None:
    missing, _ = plan(make(axes={"adapter.rank": [1, 2]}), {})
    assert len({task.name for task in missing}) == len(missing) == 12
    assert missing[0].name.startswith("lora-")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "methods is empty"),
        ({"baseline": "dora"}, "baseline must be one of the methods, lora, tanh; got 'dora'"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [100]}, "the seeds of choose must not be among the seeds that are tested"),
        ({"axes": {"lr": [1e-3]}}, "lr is in axes and in choose"),
        ({"choose": Choose({"lr": [2e-3, 1e-3]})}, "must be positive and in rising order"),
        (
            {"methods": {"lora": {"choose": {"lr": [1e-3]}}}},
            r"choose must give \d candidates.* for equal trials; got 1",
        ),
        ({"methods": {"lora": {"choose": {"rate": [1e-3]}}}}, "lora: choose rate is no axis of choose: lr"),
        ({"methods": {"lora": {"only": {"rank": [1]}}}}, "lora: only rank is no axis"),
    ],
)
def test_unusable_sweeps_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


FIELDS = (*(f.name for f in fields(Sweep)), *(f"choose.{f.name}" for f in fields(Choose)))
GOOD = {"methods": METHODS, "choose": {"axes": {"lr": RATES}, "seeds": [100]}, "seeds": [0]}
TAKEN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("methods", "baseline", "choose.axes"), ()),
    "base": ({}, {"a": 1}, {"lr": [3, 2]}, {"lr": ["a"]}, {"lr": [1, 1]}),
    "axes": ({},),
    "choose": (None,),
    "seeds": ([1], [0, 3]),
    "keep_adapters": (True, False),
    "description": ("", " ", "x", "3", "a/b"),
    "name": ("", "x", "3"),
    "choose.seeds": ([1], [3]),
    "choose.extend": (0, 1, 3),
}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_of_a_sweep_refuses_what_it_cannot_be_by_name(name: str) -> None:
    values = (
        None,
        True,
        False,
        -1,
        0,
        1,
        3,
        2.5,
        math.nan,
        10**30,
        "",
        " ",
        "x",
        "3",
        "a/b",
        [],
        [1],
        [0, 3],
        [True],
        [[]],
    )
    for value in (*values, ["a"], [1, 1], {}, {"a": 1}, {1: [2]}, {"lr": [3, 2]}, {"lr": ["a"]}, {"lr": [1, 1]}):
        choose, own = dict(GOOD["choose"]), {}
        if name.startswith("choose."):
            choose[name.removeprefix("choose.")] = value
        else:
            own = {name: value}
        try:
            from_mapping(Sweep, {**GOOD, "choose": choose, **own}, "sweep")
        except ConfigError as error:
            assert repr(value) not in map(repr, TAKEN[name]), (value, error)
            assert all(any(name in said or said in name for said in p.fields) for p in error.problems), (value, error)
        else:
            assert repr(value) in map(repr, TAKEN[name]), value


def test_what_is_wrong_with_a_sweep_and_its_runs_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("seed: [1]\nseeds: no\nbaseline: dora\nmethods: {lora: {only: {rank: [1]}}}\nchoose: {axis: {}}\n")
    with pytest.raises(ConfigError) as caught:
        read_sweep(file)
    assert sorted(caught.value.problems) == [
        "baseline must be one of the methods, lora; got 'dora'.",
        "choose.axes must be given.",
        "choose.axis is not a field. Did you mean 'axes'?",
        "lora: only rank is no axis. Axes: none.",
        "seed is not a field. Did you mean 'seeds'?",
        "seeds must be a list with each item a whole number of at least 0, got False.",
    ]
    file.write_text(
        "methods: {lora: {method: lore}, b: {epohcs: 3, adapter: {rank: 0}}}\nbase: {batch_size: 0}\n"
        "axes: {adapter.rank: [1, 2.5]}\nchoose: {axes: {lr: [1, 2], epochs: [1, 0.5e30]}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_sweep(file)
    text = str(caught.value)
    for label in ("lora", "b"):
        assert text.count(f"{label}: batch_size must be a whole number of at least 1, got 0.") == 1
        assert text.count(f"{label}: adapter.rank must be an integer of at least 1, got 2.5.") == 1
        assert text.count(f"{label}: epochs must be a whole number of at least 1, 3.4e+38 at most") == 0
        assert text.count(f"{label}: epochs must be a whole number of at least 1, got 5e+29.") == 1
    assert "lora: method must be one of" in text and "b: epohcs is not a field. Did you mean 'epochs'?" in text
    assert "b: adapter.rank must be an integer of at least 1, got 0" not in text  # the axis says which rank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"seed": 3}}, "base: seed is no field of a run in a sweep, which decides about it"),
        ({"methods": {"lora": {"eval_only": True}}}, "methods.lora: eval_only is no field of a run in a sweep"),
        ({"seeds": [0, 0]}, r"seeds has one twice: \[0, 0\]"),
        ({"choose": Choose({"lr": RATES}, seeds=[])}, "choose.seeds is empty, so nothing would be chosen"),
        ({"choose": Choose({}, seeds=[100])}, "choose.axes is empty"),
        ({"axes": {"epochs": []}}, "axes: epochs has no values, so there would be no runs"),
        ({"axes": {"epochs": [1, 1]}}, "axes: epochs has a value twice"),
        (
            {"methods": {"lora": {"only": {"epochs": [3]}}}, "axes": {"epochs": [1]}},
            "only epochs must be some of its values",
        ),
        ({"methods": {"lora": {"only": 3}}}, "lora: only must be axes with lists of their values, got 3"),
        ({"methods": {"lora": {"choose": {"lr": 3}}}}, "lora: choose must be axes with lists of candidates, or null"),
        ({"name": "../a"}, "name must be one for the folder of the results, got '../a'"),
    ],
)
def test_more_unusable_sweeps_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_a_value_where_fields_are_wanted_is_named() -> None:
    with pytest.raises(ConfigError, match="adapter reaches into adapter, and that is 3"):
        plan(make(base={"adapter": 3}, methods={"lora": {"adapter": {"rank": 3}}}), {})


def test_a_candidate_that_no_run_can_have_is_not_added() -> None:
    """Beyond 0.8 lies 1.28, which is no smoothing; beyond 1 no rank; ranks stay whole."""
    sweep = make(choose=Choose({"smoothing": [0.5, 0.8]}, seeds=[100], extend=2))
    _, choices, _ = finish(sweep, lambda task: task.config.smoothing)
    assert {(c.point["smoothing"], c.trials, c.at_edge) for c in choices} == {(0.8, 2, True)}
    sweep = make(choose=Choose({"adapter.rank": [1, 3]}, seeds=[100], extend=2))
    _, choices, _ = finish(sweep, lambda task: -task.config.adapter.rank)
    assert {(c.point["adapter.rank"], c.trials) for c in choices} == {(1, 2)}
    _, choices, _ = finish(sweep, lambda task: task.config.adapter.rank)
    assert {(c.point["adapter.rank"], c.trials) for c in choices} == {(27, 4)}


def test_a_method_without_use_for_an_axis_tries_as_many_of_another() -> None:
    own = {"method": "linear", "choose": {"lr": None, "head_lr": [1e-3, 2e-3, 4e-3, 8e-3]}}
    sweep = make(
        methods={**METHODS, "linear": own}, choose=Choose({"lr": [1e-3, 2e-3], "head_lr": [1e-2, 2e-2]}, [100])
    )
    points = [dict(task.point) for task in plan(sweep, {})[0] if task.label == "linear"]
    assert points == [{"head_lr": rate} for rate in own["choose"]["head_lr"]]


def test_an_unusable_run_is_refused_with_its_method() -> None:
    with pytest.raises(ConfigError, match=r"(?s)tanh of the sweep.*rank must be an integer"):
        plan(make(methods={**METHODS, "tanh": {"adapter": {"rank": 0}}}), {})


def test_what_trains_on_the_validation_images_cannot_be_chosen_by_them() -> None:
    base = {"train_on": "train_val", "keep_epoch": "last"}
    with pytest.raises(ConfigError, match="train_on is train_val, so no validation images are left to choose by"):
        plan(make(base=base), {})
    assert plan(make(base=base, choose=None), {})[0]


def test_a_file_is_read_with_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("methods: {lora: {method: lora}}\nchoose: {axes: {lr: [1e-3, 2.5e-3]}}\nbase: {epochs: 2}\n")
    sweep = read_sweep(file)
    assert sweep.name == "small" and sweep.candidates("lora") == {"lr": [1e-3, 2.5e-3]}
    file.write_text("methods: {lora: {method: lora}}\nseed: [1]\nchoose: {axis: {}}\n")
    with pytest.raises(ConfigError, match=r"(?s)seed is not a field. Did you mean 'seeds'.*axis is not a field"):
        read_sweep(file)
