"""The documents and the headers of configs name what exists: links, headings, files and modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MARKDOWN = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md")) if not path.parent.name.startswith(".")]
DOCUMENTS = sorted([*MARKDOWN, *ROOT.glob("configs/**/*.yaml")])


def problems(document: Path, text: str) -> list[str]:
    """What a document names that is not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        target = document.parent / file if file else document
        if link.startswith(("https://", "http://")):
            continue
        if not target.exists():
            found.append(f"no file {link}")
        elif heading and heading not in headings(target.read_text(encoding="utf-8")):
            found.append(f"no heading {link}")
    text = text.replace("configs/sweeps/NAME.yaml", "")  # a place to fill in
    for name in re.findall(r"(?<![\w/.-])((?:configs|tests|benchmarks|nolora_vision)/[\w/.*-]*[\w*])", text):
        if not any(ROOT.glob(name)):
            found.append(f"no path {name}")
    for name in re.findall(r"-m (nolora_vision[\w.]*|tests[\w.]*)", text):
        path = ROOT.joinpath(*name.split("."))
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            found.append(f"no module {name}")
    return found


def headings(text: str) -> set[str]:
    """The anchors of a document, as a web page of it has them."""
    lines = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_there_are_documents() -> None:
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md"} <= {path.name for path in DOCUMENTS}
    assert {"benchmarks", "nolora_vision"} <= {path.parent.name for path in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path) -> None:
    assert problems(document, document.read_text(encoding="utf-8")) == []


def test_what_is_not_there_is_found() -> None:
    text = "[a](no.md) [b](README.md#no-such) `configs/no.yaml` `python -m nolora_vision.no` tests/no.py"
    assert len(problems(ROOT / "README.md", text)) == 5
    assert not problems(ROOT / "README.md", "[a](benchmarks/README.md#speed-and-memory) `configs/sweeps/*.yaml`")
