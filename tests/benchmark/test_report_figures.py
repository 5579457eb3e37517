"""The report's figures: what is on their axes, that labels keep apart, and the files."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from torch import nn

from nolora_vision import adapter_parameters, inject, save_adapter
from nolora_vision.benchmark import curves, learned
from nolora_vision.benchmark.curves import Curve, Panel, Point
from nolora_vision.benchmark.report_content import Report, build_report
from nolora_vision.benchmark.report_figures import Look, curves_figure, far_below, floor_of, save_figure, spread
from nolora_vision.benchmark.report_multiples import crowded
from nolora_vision.benchmark.report_pictures import drawn, figures_of, learned_functions
from nolora_vision.benchmark.results import read_results
from tests.benchmark.sweep_files import SweepFiles

LABELS = {"lora": 0.0, "gate": 1.0, "swish": 0.5, "linear": -20.0}


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Ranks 1 and 4, 100 and 1000 images, three seeds; linear far below, without ranks; rates of 2 seeds."""
    sweep = SweepFiles(tmp_path / "s", methods=list(LABELS))
    for images in (100, 1000):
        for label, gain in LABELS.items():
            for rank in (1, 4) if label != "linear" else (None,):
                where: dict[str, Any] = {"max_train_samples": images, "train_images": images}
                where |= {"parameters": 0} if rank is None else {"adapter__rank": rank, "parameters": 100 * rank}
                for seed, noise in enumerate((-0.5, 0.0, 0.5)):
                    test = 80 + gain * (1 + 0.1 * seed) + noise + (rank or 0) + images / 1000
                    sweep.done(label, seed, test=test, lr=0.01, head_lr=0.01, **where)
                for lr, val in ((0.001, 70.0), (0.01, 79.0), (0.1, 60.0)):
                    for head_lr, less in ((0.01, 0.0), (0.1, 5.0)):
                        for seed in (100, 101):
                            sweep.done(label, seed, val=val - less + seed / 100, lr=lr, head_lr=head_lr, **where)
    return build_report(read_results([tmp_path / "s"]))


def test_curves_hold_the_means_of_the_seeds(report: Report) -> None:
    panel = next(p for p in curves.by_rank(report.comparisons) if p.title == "CIFAR-10, 100 training images")
    found = {curve.label: [(p.x, round(p.mean, 6)) for p in curve.points] for curve in panel.curves}
    assert found["lora"] == [(1, 81.1), (4, 84.1)] and found["linear"] == [(1, 58.1), (4, 58.1)]
    by_size = {
        p.title: {c.label: [q.x for q in c.points] for c in p.curves} for p in curves.by_train_size(report.comparisons)
    }
    assert by_size["CIFAR-10, rank 4"]["gate"] == [100, 1000]
    by_parameters = curves.by_parameters(report.comparisons)[0]
    assert {c.label: [p.x for p in c.points] for c in by_parameters.curves}["linear"] == [0]


def test_rate_curves_take_the_other_rates_at_their_best_and_mark_the_best(report: Report) -> None:
    panel = curves.by_learning_rate(report.comparisons)[0]
    curve = next(curve for curve in panel.curves if curve.label == "lora")
    assert [(p.x, p.values) for p in curve.points] == [
        (0.001, (71.0, 71.01)), (0.01, (80.0, 80.01)), (0.1, (61.0, 61.01))
    ]  # fmt: skip
    assert curve.best is curve.points[1]
    head = curves.by_learning_rate(report.comparisons, "head_lr")[0].curves[0]
    assert [(p.x, p.mean) for p in head.points] == [(0.01, pytest.approx(80.005)), (0.1, pytest.approx(75.005))]


def test_a_rate_with_fewer_seeds_is_not_marked_as_the_best(tmp_path: Path) -> None:
    sweep = SweepFiles(tmp_path / "s")
    for lr, vals in ((0.001, (70.0, 71.0)), (0.01, (79.0, 60.0)), (0.1, (75.0,))):
        for seed, val in enumerate(vals):
            sweep.done("lora", 100 + seed, val=val, lr=lr, head_lr=0.01)
    sweep.done("lora", 100, val=90.0, lr=0.01, head_lr=0.1)
    sweep.done("lora", 0, test=80.0, lr=0.001, head_lr=0.01)
    (panel,) = curves.by_learning_rate(build_report(read_results([sweep.folder])).comparisons)
    (curve,) = panel.curves
    assert [p.values for p in curve.points] == [(70.0, 71.0), (79.0, 60.0), (75.0,)] and curve.best is curve.points[0]


def test_what_is_on_the_axes(report: Report) -> None:
    figures = {name: figure for name, _, _, figure in figures_of(report)}
    assert list(figures) == [
        *("differences", "accuracy_by_parameters", "rank", "train_size", "choose_lr", "choose_head_lr")
    ]
    rank = figures["rank"].axes[0]
    assert rank.get_xlabel() == "rank" and rank.get_ylabel() == "test top-1 (%)" and rank.get_xscale() == "log"
    assert [label.get_text() for label in rank.get_xticklabels()] == ["1", "4"]
    lines = {line.get_label(): line.get_ydata().tolist() for line in rank.lines if not line.get_label().startswith("_")}
    assert lines["lora"] == pytest.approx([81.1, 84.1]) and "linear" not in lines  # it would flatten the others …
    said = {text.get_text() for text in rank.texts}
    assert said == {"lora", "gate", "swish", "↓ linear 58.1"}  # … so it is named instead
    assert len(rank.collections) == 6  # an interval for each method and rank
    bars = figures["differences"].axes[0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["gate", "swish", "linear"]
    assert bars.patches[0].get_width() == pytest.approx(1.1) and bars.patches[0].get_x() == 0
    low, high = bars.get_xlim()
    assert low == -high and bars.get_xlabel() == "test top-1 minus lora (points)"
    rings = [line for line in figures["choose_lr"].axes[0].lines if line.get_fillstyle() == "none"]
    assert {tuple(ring.get_xdata()) for ring in rings} == {(0.01,)} and len(rings) == 4


def test_labels_keep_apart(report: Report) -> None:
    for name, _, _, figure in figures_of(report):
        for axis in figure.axes if name == "rank" else ():
            boxes = sorted(
                (text.get_tightbbox() for text in axis.texts if "↓" not in text.get_text()), key=lambda b: b.y0
            )
            centres = [(box.y0 + box.y1) / 2 for box in boxes]
            assert all(b - a > 8 for a, b in pairwise(centres))


def test_spread_moves_labels_as_little_as_it_takes() -> None:
    assert spread([0, 10, 20], 5) == [0, 10, 20]
    assert spread([0, 0, 30], 10) == [-5, 5, 30]
    assert spread([0, 4, 8], 6) == pytest.approx([-2, 4, 10])
    heights = spread([0, 1, 2, 3, 12, 13], 5)
    assert all(b - a >= 5 - 1e-9 for a, b in pairwise(heights))


def test_only_outliers_below_three_others_are_left_out() -> None:
    def curve(label: str, mean: float) -> Curve:
        return Curve(label, (Point(1, (mean,)),))

    top = [curve("a", 80), curve("b", 81), curve("c", 82)]
    low = curve("low", 70)
    assert far_below([*top, low]) == [low] and far_below([*top, curve("near", 78)]) == []
    assert far_below([*top[:2], low]) == [] and far_below(top) == []


def test_a_run_that_failed_to_learn_does_not_flatten_the_others() -> None:
    def curve(label: str, *means: float) -> Curve:
        return Curve(label, tuple(Point(10.0**i, (mean,)) for i, mean in enumerate(means)))

    usual = curve("a", 80, 82, 79)
    assert floor_of([usual, curve("b", 81, 84, 20)]) == 82 - 4 * 2
    assert floor_of([usual]) is None and floor_of([usual, curve("b", 81, 82, 78.5)]) is None
    panel = Panel("", (usual, curve("b", 81, 84, 20)))
    figure = curves_figure([panel], Look(("a", "b")), xlabel="x", ylabel="y", scale="log10")
    axis = figure.axes[0]
    assert axis.get_ylim()[0] == 74 and {text.get_text() for text in axis.texts} == {"a", "b"}
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    assert heights == pytest.approx({"a": 79, "b": 84})  # each at the last of its points that can be seen


def test_each_of_many_methods_has_axes_of_its_own_with_the_baseline_behind() -> None:
    names = tuple("abcdefghi")
    many = tuple(Curve(name, (Point(1, (80.0 + i,)), Point(10, (81.0 + i,)))) for i, name in enumerate(names[:-1]))
    low = Curve("i", (Point(1, (20.0,)), Point(10, (21.0,))))
    assert crowded([Panel("", (*many, low))]) and not crowded([Panel("", many)])
    once = tuple(Curve(name, (Point(1, (80.0,)),)) for name in names)
    assert not crowded([Panel("", once)])  # no lines
    labels = {"xlabel": "x", "ylabel": "y", "scale": "log10"}
    figure = drawn([Panel("t", (*many, low))], Look(names), "b", **labels)
    titles = [axis.get_title("left") for axis in figure.axes if axis.get_visible()]
    assert titles == list(names) and len({axis.get_ylim() for axis in figure.axes[:9]}) == 1
    for name, axis in zip(names[:-1], figure.axes, strict=False):
        own = [line for line in axis.lines if line.get_label() == name]
        assert own[0].get_ydata().tolist() == [80 + names.index(name), 81 + names.index(name)]
        behind = [line for line in axis.lines if line.get_label() == "_behind"]
        assert len(behind) == 8 and [line.get_linestyle() for line in behind].index("--") == 1
    assert [text.get_text() for text in figure.axes[8].texts] == ["↓ 21.0"]


def test_numbers_of_parameters_close_to_each_other_have_readable_ticks() -> None:
    curves = tuple(Curve(name, (Point(x, (80.0,)),)) for name, x in (("a", 258048.0), ("b", 260928.0)))
    look = {"xlabel": "x", "ylabel": "y", "scale": "parameters"}
    axis = curves_figure([Panel("", curves)], Look(("a", "b")), **look).axes[0]
    axis.figure.draw_without_rendering()
    low, high = axis.get_xlim()
    shown = [
        t.get_text() for t in axis.get_xticklabels(which="both") if t.get_text() and low < t.get_position()[0] < high
    ]
    assert shown == ["200 k", "500 k"]


def test_figures_are_files_and_svg(report: Report, tmp_path: Path) -> None:
    for name, title, caption, figure in figures_of(report):
        path = tmp_path / f"{name}.png"
        svg = save_figure(figure, path, title=title)
        assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>") and "<image" not in svg and caption
        with Image.open(path) as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(2**24) or ()) > 50
        assert path.stat().st_size > 10_000


def trained_adapter(folder: Path, nonlinearity: str) -> Path:
    model = inject(timm.create_model("test_vit", num_classes=3), rank=2, nonlinearity=nonlinearity, modulation="vector")
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return save_adapter(model, folder)


def test_learned_nonlinearities_are_drawn_where_runs_left_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = SweepFiles(tmp_path / "s")
    assert learned_functions(read_results([sweep.done("lora", 0, test=80.0).parents[1]]).runs) == {}
    path = sweep.done("swish", 0, test=80.0)
    trained_adapter(tmp_path / "s" / "adapters" / path.stem / "adapter", "swish")
    path = sweep.done("tanh", 0, test=80.0)
    trained_adapter(tmp_path / "s" / "adapters" / path.stem, "tanh")
    (tmp_path / "s" / "adapters" / sweep.done("broken", 0, test=80.0).stem).mkdir()
    report = build_report(read_results([tmp_path / "s"]))
    name, _, _, figure = list(figures_of(report))[-1]
    assert name == "learned_functions"
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["swish"]  # tanh learns nothing
    assert len(figure.axes[0].lines) == 6 * 3 * 2 + 1
    assert "warning: learned nonlinearities: broken: " in capsys.readouterr().err


def test_the_learned_curves_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = trained_adapter(tmp_path / "a", "swish")
    learned.main([json.dumps({"mine": str(directory)})])
    found = json.loads(capsys.readouterr().out)["mine"]
    assert len(found["h"]) == learned.POINTS and len(found["rows"]) == 18
    row = found["rows"][0]
    assert row["before"] == pytest.approx(found["h"], abs=1e-4)  # swish is the identity before training; 4 digits
    assert len(row["after"]) == 2 and row["after"][0] != row["before"]
