"""The report's tables and files: numbers by hand, what is missing, what failed, and a page that is safe and whole."""

import csv
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nolora_vision.benchmark import report_figures
from nolora_vision.benchmark.paper_tables import NO_CLAIM, paper_tables
from nolora_vision.benchmark.published import EIGHT_SETS, SUITE, VTAB
from nolora_vision.benchmark.report import main, write_report
from nolora_vision.benchmark.report_content import Report, build_report
from nolora_vision.benchmark.report_tables import Table, across_datasets
from nolora_vision.benchmark.results import read_results
from nolora_vision.training.errors import RunError
from nolora_vision.training.vtab import VTAB_TASKS
from tests.benchmark.sweep_files import MODEL, SweepFiles

ROOT = Path(__file__).parents[2]
TESTS = {"lora": (80.0, 82.0, 84.0), "swish": (81.0, 84.0, 87.0), "gate": (81.0, 83.1, 85.2)}


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFiles:
    """Three methods, three seeds; swish minus lora is 1, 2, 3, gate minus lora 1, 1.1, 1.2."""
    files = SweepFiles(tmp_path / "sweep")
    for label, tests in TESTS.items():
        for seed, test in enumerate(tests):
            files.done(label, seed, test=test, lr=0.004, head_lr=0.01, max_train_samples=1000, adapter__rank=8)
    return files


def reported(*sweeps: SweepFiles) -> Report:
    return build_report(read_results([files.folder for files in sweeps]))


def texts(table: Table) -> dict[str, dict[str, str]]:
    """Texts by the row's first and the column's name."""
    return {row[0].text: dict(zip(table.columns, (v.text for v in row), strict=True)) for row in table.rows}


def only_table(report: Report, section: str) -> Table:
    (table,) = next(s.tables for s in report.sections if s.title == section)
    return table


def test_the_table_of_a_cell(sweep: SweepFiles) -> None:
    table = only_table(reported(sweep), "Cell by cell")
    rows = texts(table)
    assert list(rows) == ["lora (baseline)", "gate", "swish"]
    assert rows["swish"] == {
        "method": "swish", "test top-1 (%)": "84.00 ± 3.00", "seeds": "3",
        "minus lora (95 % interval)": "+2.00 (−0.48 to +4.48)", "seeds won / tied / lost": "3 / 0 / 0",
        "what is shown": "no difference is shown", "test loss": "0.400 ± 0.075",
        "test loss minus lora's": "−0.050 (−0.112 to +0.012)",
        "lr": "0.004", "head lr": "0.01",
        "minus lora on validation images": "0.00", "validation top-1 (%)": "80.00",
        "parameters without head": "1,000", "training (s)": "10.0", "peak memory (MiB)": "1,024",
    }  # fmt: skip
    assert rows["gate"]["minus lora (95 % interval)"] == "+1.10 (+0.85 to +1.35)"
    assert rows["gate"]["what is shown"] == "higher by 1.10"
    assert rows["lora (baseline)"]["test top-1 (%)"] == "82.00 ± 2.00" and not rows["lora (baseline)"]["what is shown"]
    assert table.title == f"CIFAR-10 · {MODEL} · rank 8, 1,000 training images"
    assert table.notes == (
        "This table makes 2 comparisons at 95 %: 1 of the intervals excludes 0, where 0.1 would by chance if no method "
        "differed; 1 still does after Bonferroni's correction for 2.",
        "The test loss is the cross-entropy in nats, less is better; its intervals are not counted above.",
    )


def test_the_same_models_on_the_validation_images(tmp_path: Path) -> None:
    files = SweepFiles(tmp_path / "sweep")
    for label, vals in {"lora": (80.0, 82.0, 84.0), "gate": (79.0, 80.9, 82.8)}.items():
        for seed, val in enumerate(vals):
            files.done(label, seed, test=80.0 + seed, val=val, lr=0.004, head_lr=0.01)
    table = only_table(reported(files), "Cell by cell")
    rows = texts(table)
    assert any(note.startswith("All seeds are tested on the same images.") for note in table.notes)
    assert rows["gate"]["minus lora on validation images"] == "−1.10 (−1.35 to −0.85)"
    assert rows["gate"]["what is shown"] == "no difference is shown"


def test_rates_are_called_chosen_only_where_some_were_tried(tmp_path: Path) -> None:
    files = SweepFiles(tmp_path / "sweep")
    for seed, label in itertools.product((0, 1, 2), ("lora", "swish")):
        files.done(label, seed, test=80.0 + seed, val=80.0 - seed * len(label), lr=0.004)
    for tried in (False, True):
        if tried:
            files.done("lora", 100, test=None, val=80.0, lr=0.004)
        report = reported(files)
        assert report.rule.startswith(
            "Learning rates were chosen on validation images." if tried else "Learning rates are those that were given"
        )
        (note,) = (note for note in only_table(report, "Cell by cell").notes if note.startswith("All seeds"))
        assert ("which chose their rates" in note) == tried


def test_words_are_made_from_the_numbers(sweep: SweepFiles) -> None:
    report = reported(sweep)
    assert report.in_words == (
        "gate minus lora on CIFAR-10, rank 8, 1,000 training images: +1.10 points (+0.85 to +1.35), 3 seeds: higher by "
        "1.10.",
        "swish minus lora on CIFAR-10, rank 8, 1,000 training images: +2.00 points (−0.48 to +4.48), 3 seeds: no "
        "difference is shown.",
    )
    assert report.summary[0].startswith(
        "9 runs done, 9 of them scored on the test images, and 0 failed: 3 methods in 1 "
    )
    assert report.summary[1].startswith("The report makes 2 comparisons at 95 %") and not report.by_method


def test_many_comparisons_get_a_sentence_for_each_method(tmp_path: Path) -> None:
    files = SweepFiles(tmp_path / "s")
    for rank in range(1, 8):
        for label, tests in TESTS.items():
            for seed, test in enumerate(tests[: 1 if rank == 7 else 3]):
                files.done(label, seed, test=test, adapter__rank=rank)
    report = reported(files)
    assert len(report.in_words) == 14 and report.by_method == (
        "gate minus lora: higher in 6 of 7 cells, lower in 0, no difference shown in 0, no interval in 1; means from "
        "+1.00 to +1.10 points.",
        "swish minus lora: higher in 0 of 7 cells, lower in 0, no difference shown in 6, no interval in 1; means from "
        "+1.00 to +2.00 points.",
    )


def test_costs_appear_where_they_are_known_and_say_what_they_are(tmp_path: Path) -> None:
    files = SweepFiles(tmp_path / "s")
    costs = {"adapter_bytes": 2**20, "test_images_per_s": 250.0, "train_images_per_s": 90.0}
    files.done(
        "lora", 0, test=80.0, metrics={**costs, "peak_memory_bytes": 2**21, "peak_memory_of": "process, resident"}
    )
    files.done("gate", 0, test=80.0, metrics={}, environment={"device": "another processor"})
    table = only_table(reported(files), "Cell by cell")
    rows = texts(table)
    assert rows["lora (baseline)"]["adapter (MiB)"] == "1.00" and rows["gate"]["adapter (MiB)"] == ""
    assert (
        rows["lora (baseline)"]["test (images/s)"] == "250" and rows["lora (baseline)"]["training (images/s)"] == "90"
    )
    assert "training (s)" not in table.columns and "failed" not in table.columns and "lr" not in table.columns
    assert any("Peak memory is what the whole process held" in note for note in table.notes)
    assert (
        "Times come from different devices and are not to be compared: a processor, another processor." in table.notes
    )


@pytest.mark.parametrize(("device", "told"), [("x86_64", True), ("AMD EPYC, AVX512", False)])
def test_times_of_a_processor_without_a_name_are_not_taken_for_those_of_one(
    tmp_path: Path, device: str, told: bool
) -> None:
    files = SweepFiles(tmp_path / "s")
    for seed in (0, 1):
        files.done("lora", seed, test=80.0, environment={"device": device})
    notes = only_table(reported(files), "Cell by cell").notes
    assert any("do not say which processor, but x86_64" in note for note in notes) == told


def test_one_seed_has_no_interval_and_no_claim(tmp_path: Path) -> None:
    files = SweepFiles(tmp_path / "s")
    files.done("lora", 0, test=80.0)
    files.done("gate", 0, test=85.0)
    report = reported(files)
    row = texts(only_table(report, "Cell by cell"))["gate"]
    assert row["test top-1 (%)"] == "85.00" and row["minus lora (95 % interval)"] == "+5.00"
    assert row["what is shown"] == "one seed allows no interval"
    assert "nothing can be said of differences" in report.summary[1]


def test_failures_edges_and_missing_baselines_are_told(sweep: SweepFiles, tmp_path: Path) -> None:
    for seed in (0, 1):
        sweep.failed("dora", seed, "OutOfMemoryError", lr=0.1, max_train_samples=1000, adapter__rank=8)
    sweep.done("tanh", 0, lr=0.1, max_train_samples=1000, adapter__rank=8)
    sweep.choice("gate", {"lr": 0.004}, {"adapter.rank": 8}, at_edge=True)
    report = reported(sweep)
    table = only_table(report, "Cell by cell")
    rows = texts(table)
    assert rows["dora"]["failed"] == "final: OutOfMemoryError (2×)" and rows["dora"]["what is shown"] == "failed"
    assert rows["tanh"]["what is shown"] == "not tested yet" and rows["gate"]["lr"] == "0.004 (edge)"
    assert "Chosen at the edge of the grid, so a better choice may lie beyond it: gate." in table.notes
    failed = texts(only_table(report, "Failed runs"))["dora"]
    assert failed["reason"] == "OutOfMemoryError" and failed["runs"] == "2"
    alone = SweepFiles(tmp_path / "alone")
    alone.done("gate", 0, test=80.0)
    report = reported(alone)
    assert only_table(report, "Cell by cell").notes == (
        "lora, the baseline, has no test result here, so nothing is compared.",
    )
    assert report.summary[1].startswith("Nothing is compared yet")


def test_seeds_that_failed_are_told_and_no_mean_without_them_is_called_higher(sweep: SweepFiles) -> None:
    where = {"lr": 0.004, "head_lr": 0.01, "max_train_samples": 1000, "adapter__rank": 8}
    sweep.failed("gate", 3, "The loss is nan at step 7", **where)
    sweep.failed("gate", 100, "The loss is nan at step 7", phase="choose", **where)
    report = reported(sweep)
    rows = texts(only_table(report, "Cell by cell"))
    said = "nothing is shown, as 1 of 4 seeds failed and is not counted"
    assert rows["gate"]["what is shown"] == said and rows["swish"]["what is shown"] == "no difference is shown"
    assert any(line.startswith("gate minus lora") and line.endswith(f"3 seeds: {said}.") for line in report.in_words)
    sweep.failed("lora", 3, "no room", **where)
    rows = texts(only_table(reported(sweep), "Cell by cell"))
    assert rows["lora (baseline)"]["what is shown"] == "1 of 4 seeds failed and is not counted"
    assert rows["swish"]["what is shown"].endswith("1 of the baseline's 4 seeds failed and is not counted")


def test_only_the_axis_at_whose_edge_the_choice_is_is_marked(sweep: SweepFiles) -> None:
    for label, edges in (("lora", {}), ("swish", {"edges": ["head_lr"]}), ("gate", {"edges": ["lr", "head_lr"]})):
        sweep.choice(label, {"lr": 0.004, "head_lr": 0.01}, {"adapter.rank": 8}, at_edge=True)
        list(sweep.sweep["chosen"].values())[-1].update(edges)
    sweep.save_sweep()
    rows = texts(only_table(reported(sweep), "Cell by cell"))
    assert {label: (row["lr"], row["head lr"]) for label, row in rows.items()} == {
        "lora (baseline)": ("0.004 (edge)", "0.01 (edge)"),  # an older sweep does not say which
        "swish": ("0.004", "0.01 (edge)"),
        "gate": ("0.004 (edge)", "0.01 (edge)"),
    }


def suite(
    folder: Path, sets: list[str], model: str = "vit_base_patch16_224.augreg_in21k", **point: object
) -> SweepFiles:
    """LoRA at 80, 81, 82 … over the sets, gate 1, 2, 3 … above it; two seeds ± 1."""
    files = SweepFiles(folder)
    for i, dataset in enumerate(sets):
        for seed in (0, 1):
            files.done("lora", seed, test=79.0 + i + 2 * seed, dataset=dataset, model=model, **point)
            files.done("gate", seed, test=80.0 + 2 * i + 2 * seed, dataset=dataset, model=model, **point)
    return files


def test_across_datasets(tmp_path: Path) -> None:
    files = suite(tmp_path / "s", list(EIGHT_SETS.values())[:3])
    files.done("swish", 0, test=70.0, dataset=EIGHT_SETS["Pets"], model="vit_base_patch16_224.augreg_in21k")
    (table,) = across_datasets(reported(files).comparisons)
    rows = texts(table)
    difference = next(name for name in table.columns if name.startswith("minus lora"))
    assert rows["lora (baseline)"]["average test top-1 (%)"] == "81.00"
    assert rows["gate"]["average test top-1 (%)"] == "83.00" and rows["gate"][difference] == "+2.00 (−0.48 to +4.48)"
    assert rows["gate"]["datasets won / tied / lost"] == "3 / 0 / 0" and rows["gate"]["datasets"] == "3 of 3"
    files.failed("gate", 2, "no room", dataset=EIGHT_SETS["Pets"], model="vit_base_patch16_224.augreg_in21k")
    report = reported(files)
    note = f"gate on {EIGHT_SETS['Pets']}: 1 of 3 seeds failed and is not counted."
    assert note in across_datasets(report.comparisons)[0].notes and note in paper_tables(report.comparisons)[0].notes
    assert rows["swish"]["average test top-1 (%)"] == "" and rows["swish"]["datasets won / tied / lost"] == "0 / 0 / 1"


def test_the_papers_rows_stand_beside_ours_and_are_marked(tmp_path: Path) -> None:
    files = suite(tmp_path / "s", list(EIGHT_SETS.values())[:2])
    (table,) = paper_tables(reported(files).comparisons)
    rows = [dict(zip(table.columns, (v.text for v in row), strict=True)) for row in table.rows]
    assert table.published == (True,) * len(SUITE) + (False, False) and table.notes == (NO_CLAIM,)
    assert all(row["source"].startswith("published: ") and "arXiv:" in row["source"] for row in rows[: len(SUITE)])
    assert rows[2]["method"] == "LoRA r16" and rows[2]["Cars"] == "45.38" and rows[5]["Cars"] == "78.04"
    assert rows[-1] == {
        **dict.fromkeys(EIGHT_SETS, ""), "method": "gate", "parameters without head": "1,000",
        "Pets": "81.00 ± 1.41", "Cars": "83.00 ± 1.41", "source": "ours, 2 seeds",
    }  # fmt: skip
    small = suite(tmp_path / "t", list(EIGHT_SETS.values())[:2], model=MODEL, max_train_samples=100)
    (table,) = paper_tables(reported(small).comparisons)
    assert "The published rows are of ViT-B/16 with ImageNet-21k weights, ours of" in table.notes[1]
    assert "ours on a part of them: 100 training images." in table.notes[2]
    assert not paper_tables(reported(suite(tmp_path / "u", [EIGHT_SETS["CIFAR-10"]], model=MODEL)).comparisons)
    assert all(len(row.top1_percent) == 8 for row in SUITE)


@pytest.mark.parametrize(
    ("base", "notes"),
    [
        (
            {"max_train_samples": 1000},
            ["trained on all training images, ours on a part of them: 1,000 training images."],
        ),
        ({"shots": 10}, ["trained on all training images, ours on a part of them: shots 10."]),
        ({"train_fraction": 0.5}, ["trained on all training images, ours on a part of them: train fraction 0.5."]),
        ({"max_eval_samples": 2000}, ["tested on all test images, ours on a part of them: max eval samples 2000."]),
        ({"img_size": 96}, ["are of images of 224 pixels, ours of others: img size 96."]),
        ({"img_size": 224, "max_train_samples": None}, []),
    ],
)
def test_what_the_base_says_keeps_from_the_papers_too(tmp_path: Path, base: dict, notes: list[str]) -> None:
    files = SweepFiles(tmp_path / "s", base=base)
    for label in ("lora", "gate"):
        for dataset in list(EIGHT_SETS.values())[:2]:
            files.done(label, 0, test=80.0, dataset=dataset, model="vit_base_patch16_224.augreg_in21k", config=base)
    (table,) = paper_tables(reported(files).comparisons)
    assert list(table.notes[1:]) == [
        f"The published rows {'were ' * note.startswith('tested')}{note}" for note in notes
    ]


def test_vtab_has_both_averages_and_only_of_all_tasks(tmp_path: Path) -> None:
    report = reported(suite(tmp_path / "s", [f"vtab:{task}" for task in VTAB_TASKS]))
    table = only_table(report, "Beside the papers")
    row = dict(zip(table.columns, (value.text for value in table.rows[-2]), strict=True))
    assert row["method"] == "lora" and row["mean of 19 sets"] == "89.0" and row["cifar"] == "80.0"
    assert table.published.count(True) == len(VTAB) and table.rows[0][1].text == "69.0"
    assert "19 tasks of VTAB-1k" in only_table(report, "Across datasets").title


@pytest.fixture
def written(sweep: SweepFiles) -> Path:
    """A report with all kinds of figures but the learned nonlinearities, and with names that are no HTML."""
    sweep.sweep |= {"name": "<b>sweep & co</b>", "description": "a | b"}
    sweep.save_sweep()
    for rank, images in ((4, 1000), (8, 100)):
        for label, tests in TESTS.items():
            for seed, test in enumerate(tests):
                where = {"adapter__rank": rank, "max_train_samples": images, "train_images": images}
                sweep.done(label, seed, test=test - 5, parameters=rank * 100, lr=0.004, head_lr=0.01, **where)
    for lr in (0.002, 0.004):
        sweep.done("lora", 100, lr=lr, head_lr=0.01, max_train_samples=1000, adapter__rank=8)
    sweep.done("<script>alert(1)</script>|x", 0, test=50.0, lr=0.1, max_train_samples=1000, adapter__rank=8)
    sweep.write("{")
    return write_report([sweep.folder])


class Page(HTMLParser):
    """Every tag with its attributes, and that all are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_safe_and_needs_no_network(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and [tag for tag, _ in page.tags].count("script") == 1
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;|x" in text
    assert "<b>sweep" not in text and "<h1>&lt;b&gt;sweep &amp; co&lt;/b&gt;</h1>" in text
    for tag, attributes in page.tags:
        assert "src" not in attributes and tag not in ("link", "iframe", "img")
        target = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert target.startswith("#") or (written / target).is_file()
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "fetch(" not in text
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) >= 5 and all(a["role"] == "img" and a["aria-label"] for a in svgs)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "Warnings" in text


def test_tables_can_be_sorted_by_numbers_and_texts(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    table = next(part for part in re.findall(r"<table.*?</table>", text, re.S) if "lora (baseline)" in part)
    heads, cells = re.findall(r"<th [^>]*>", table), re.findall(r"<td[^>]*>", table)
    assert len(cells) % len(heads) == 0 and all('aria-sort="none"' in head for head in heads)
    assert all("data-sort=" in cell for cell in cells) and table.count('<button type="button">') == len(heads)
    assert re.search(r'data-sort="82\.0">82\.00 ± 2\.00<', text) and 'data-sort="lora">lora (baseline)<' in text
    assert re.search(r'<td data-sort="">–</td>', text)  # nothing sorts last


def test_the_files_hold_the_numbers(written: Path) -> None:
    rows = list(csv.DictReader((written / "results.csv").read_text(encoding="utf-8").splitlines()))
    row = next(r for r in rows if (r["method"], r["max_train_samples"], r["adapter.rank"]) == ("swish", "1000", "8"))
    assert float(row["difference_points"]) == 2 and float(row["difference_low"]) == pytest.approx(
        2 - 2.48413771, abs=1e-7
    )
    assert (row["wins"], row["seeds"], row["verdict"]) == ("3", "3", "no difference is shown") and "failed" not in row
    runs = list(csv.DictReader((written / "runs.csv").read_text(encoding="utf-8").splitlines()))
    assert len(runs) == 9 + 18 + 2 + 1 and {r["phase"] for r in runs} == {"choose", "final"} and "error" not in runs[0]
    done = [r["last_epoch_train_loss"] for r in runs if r["last_epoch_train_loss"]]
    assert set(done) == {"0.25"} and len(done) >= 27
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "| gate | 83.10 ± 2.10 | 3 | +1.10 (+0.85 to +1.35) | 3 / 0 / 0 | higher by 1.10 |" in text
    assert "&lt;script>alert(1)&lt;/script>\\|x" in text and "## Warnings" in text and "skipped: cannot be read" in text
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (written / figure).stat().st_size > 10_000
    assert "0123456789" in text and "a processor" in text and "torch 2.10.0" in text and "2026-02-01 to" in text


def test_the_report_can_be_made_again_and_elsewhere(
    sweep: SweepFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_report([sweep.folder])
    before = (first / "results.csv").read_bytes()
    main((sweep.folder,), output=tmp_path / "elsewhere" / "deep")
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "elsewhere" / "deep" / "results.csv").read_bytes() == before
    assert write_report([sweep.folder]) == first and (first / "results.csv").read_bytes() == before


def test_errors_say_what_to_do(sweep: SweepFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"No results were named\. Name the output of a sweep"):
        write_report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"The report cannot be written to .*file \(.*\)\. Choose an --output\."):
        write_report([sweep.folder], output=tmp_path / "file")
    with pytest.raises(SystemExit, match="2"):
        main((tmp_path,))
    assert "has no folder runs/" in capsys.readouterr().err


def test_without_matplotlib_there_are_tables_but_no_figures(
    sweep: SweepFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report_figures, "matplotlib_installed", lambda: False)
    folder = write_report([sweep.folder])
    assert "pip install 'nolora-vision[plots]'" in capsys.readouterr().out
    assert "<svg" not in (folder / "report.html").read_text(encoding="utf-8") and not list(
        (folder / "figures").iterdir()
    )


WITHOUT_PACKAGE = """
import sys, types
package = types.ModuleType("nolora_vision")  # its __init__ offers the library and so imports torch: left out here
package.__path__ = [sys.argv[1]]
sys.modules["nolora_vision"] = package
import pathlib
"""


@pytest.fixture
def imports_torch() -> Callable[..., bool]:
    """Whether a statement imports torch, in an interpreter of its own."""

    def run(statement: str, *args: str) -> bool:
        code = f'{WITHOUT_PACKAGE}{statement}\nprint("torch" in sys.modules)'
        command = [sys.executable, "-c", code, str(ROOT / "nolora_vision"), *args]
        return {"True": True, "False": False}[subprocess.check_output(command, text=True).split()[-1]]

    return run


def test_the_report_imports_no_torch(sweep: SweepFiles, imports_torch: Callable[..., bool]) -> None:
    write = "from nolora_vision.benchmark.report import write_report; write_report([pathlib.Path(sys.argv[2])])"
    assert not imports_torch(write, str(sweep.folder))
    assert (sweep.folder / "report" / "report.html").is_file()
    assert imports_torch("import nolora_vision.kernels")  # the check can fail
