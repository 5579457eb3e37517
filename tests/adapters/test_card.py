"""Model cards: valid for the Hub whatever names and facts they hold, and their code runs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

import nolora_vision
from nolora_vision import save_adapter
from nolora_vision.adapters.card import model_card
from nolora_vision.adapters.description import describe

TEST_VIT = "timm/test_vit.r160_in1k"


def base() -> nn.Module:
    torch.manual_seed(5)
    return timm.create_model("test_vit", num_classes=7).eval()


def card_of(model: nn.Module | None = None, **facts: Any) -> str:
    return model_card(describe(base() if model is None else model, **facts))


def snippets(card: str) -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_the_hub_reads_its_metadata(tmp_path: Path) -> None:
    model = nolora_vision.inject(base(), rank=2)
    metrics = {"test_top1_percent": 91.25, "test_top5_percent": 99.0, "best_epoch": 3, "train_images_per_s": 1234.5}
    directory = save_adapter(model, tmp_path / "a", metrics=metrics, metadata={"dataset": "uoft-cs/cifar10"})
    text = (directory / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("nolora-vision", "image-classification")
    assert (data.base_model, data.base_model_relation, data.datasets) == (TEST_VIT, "adapter", ["uoft-cs/cifar10"])
    assert data.tags == ["timm", "nolora", "adapter"]
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name, result.dataset_split) == (
        "image-classification",
        "uoft-cs/cifar10",
        "uoft-cs/cifar10",
        "test",
    )
    assert (result.metric_type, result.metric_value, result.metric_name) == ("accuracy", 0.9125, "test top-1")
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()  # as it would be pushed
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", text, flags=re.MULTILINE)[2:]
    assert rows == [
        ("test top-1 (%)", "91.25"),
        ("test top-5 (%)", "99.00"),
        ("best epoch", "3"),
        ("train images per second", "1,234.50"),
    ]


def test_what_is_not_known_is_not_claimed() -> None:
    """No tag: no base model on the Hub. No score, or no number: no result."""
    config = describe(base(), metrics={"test_top1_percent": float("nan"), "ok": True}, metadata={"dataset": 3})
    text = model_card(config | {"pretrained_tag": "", "num_classes": None, "preprocessing": {}, "versions": {}})
    data = ModelCard(text).data
    assert data.base_model is None and data.eval_results is None and data.datasets is None
    assert "| result" not in text and "nan" not in text and "trained on" not in text and "None" not in text
    assert "pretrained=True" not in text and "num_classes" not in text
    assert ModelCard(card_of(metrics={"val_top1_percent": 90.0})).data.eval_results is None


@pytest.mark.parametrize("kind", ["full", "nolora", "peft"])
def test_its_code_compiles(kind: str) -> None:
    options = {"nonlinearity": "identity", "modulation": "none"} if kind == "peft" else {}
    model = base() if kind == "full" else nolora_vision.inject(base(), **options)
    kwargs = {"img_size": [192, 160], "drop_rate": 0.1, "global_pool": "avg", "checkpoint_path": "/home/me/x.pth"}
    card = model_card(describe(model, model_kwargs=kwargs), peft_flags=["blocks.0.attn"] if kind == "peft" else None)
    codes = list(snippets(card))
    assert len(codes) == 2
    for code in codes:
        ast.parse(code)
    call = next(
        n for n in ast.walk(ast.parse(codes[1])) if isinstance(n, ast.Call) and "create_model" in ast.dump(n.func)
    )
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert given == {
        **{"pretrained": True, "num_classes": 7, "img_size": (192, 160), "drop_rate": 0.1, "global_pool": "avg"}
    }


def test_its_first_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The whole model was trained, so that nothing needs to be downloaded."""
    model = base()
    names = ["cat", "dog", "eel", "fox", "gnu", "hen", "ibis"]
    directory = save_adapter(model, tmp_path / "path" / "to" / "this" / "directory", class_names=names)
    pixels = torch.randint(0, 255, (90, 120, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    first, _ = snippets((directory / "README.md").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), found)
    image = found["transform"](Image.open("image.jpg").convert("RGB")).unsqueeze(0)
    with torch.inference_mode():
        expected = model(image)
    assert torch.equal(found["logits"], expected) and expected.shape == (1, 7)
    assert capsys.readouterr().out.strip() == names[int(expected.argmax())]


def test_the_snippets_for_peft_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model whose qkv timm bypasses: the snippet sets the flag. The seed stands in for pretrained weights."""
    small = {"img_size": 64, "window_size": 4, "depths": (1, 1), "embed_dim": 32, "num_heads": (1, 2)}
    create = timm.create_model

    def untrained(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(5)
        model = create(name.split(".")[0], **(options | small))
        for parameter in (p for p in model.parameters() if not p.any()):
            nn.init.normal_(parameter, std=0.5)
        return model

    model = untrained("swinv2_tiny_window8_256", num_classes=7)
    nolora_vision.inject(model, rank=2, nonlinearity="identity", modulation="none")
    for parameter in nolora_vision.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="timm never calls the qkv"):
        directory = save_adapter(model, Path("path/to/this/directory"), format="peft", model_kwargs=small)
    monkeypatch.setattr(timm, "create_model", untrained)
    in_peft, here = snippets((directory / "README.md").read_text(encoding="utf-8"))
    x = torch.randn(1, 3, 64, 64)
    found: dict[str, Any] = {}
    exec(compile(in_peft, "README.md", "exec"), found)
    # fp32; PEFT scales and sums in another order, see test_peft_format.py
    torch.testing.assert_close(found["model"](x), model.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="takes effect here"):
        exec(compile(here, "README.md", "exec"), found)
    torch.testing.assert_close(found["model"](x), model(x), rtol=1e-5, atol=1e-5)


NASTY = [
    "a|b",
    "line\nbreak\r\n---\n# no heading",
    "<script>alert('x')</script>",
    "\"quoted\" 'twice': yes",
    "👩‍🔬 `code` **bold** [link](http://x.y) ![i](j)",
    "_under_ snake_case \\ &lt; #tag @me $x^2$ ~~gone~~ \x00\x07\u2028 \udcff",
    "x" * 5_000,
]


def test_names_with_special_characters_are_only_shown(tmp_path: Path) -> None:
    card = card_of(class_names=NASTY, metrics={"odd|key\n<b>_percent": 1.5, "test_top1_percent": 50.0})
    data = ModelCard(card).data
    assert data.base_model == TEST_VIT and data.library_name == "nolora-vision"
    line = next(line for line in card.splitlines() if line.startswith("- 7 classes: "))
    assert r"a\|b, line break --- \# no heading, \<script\>alert('x')\</script\>, " in line
    assert r"👩‍🔬 \`code\` \*\*bold\*\* \[link\](http://x.y) \!\[i\](j)" in line
    assert r"\_under\_ snake_case \\ \&lt; \#tag @me \$x^2\$ \~\~gone\~\~" in line
    assert "x" * 79 + "…" in line and len(line) < 1_000
    assert "---\n# no heading" not in card and "\x00" not in card
    card.encode()  # no lone surrogates
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len(table) == 4 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in table)
    many = card_of(class_names=None)
    assert "- 7 classes\n" in many


def test_many_classes_are_counted() -> None:
    config = describe(base()) | {"num_classes": 1_000, "class_names": [f"shark, number {i}" for i in range(1_000)]}
    assert "- 1,000 classes: shark, number 0; shark, number 1; " in (card := model_card(config))
    assert "shark, number 19 and 980 more" in card and "number 20" not in card


SECRETS = {
    "pretrained_path": "/home/me/x.safetensors",
    "token": "hf_secretsecret",
    "nested": {"password": "hunter2", "list": ["C:\\Users\\me\\weights.bin"]},
}


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [
        ("/home/me/data/birds", "birds"),
        ("/home/me/data/birds/", "birds"),
        ("./data/birds", "birds"),
        ("../birds", "birds"),
        ("data/in here", "local images"),
        ("C:\\Users\\me\\birds", "birds"),
        ("https://me:hunter2@host.org/birds?token=hf_secretsecret", "local images"),
        ("~/birds", "birds"),
        ("digits:5-9", "digits:5-9"),
        ("..", "local images"),
    ],
)
def test_no_paths_and_no_secrets(dataset: str, shown: str) -> None:
    kwargs = {"checkpoint_path": "/home/me/x.pth", "pretrained_cfg_overlay": {"file": "/home/me/y.pth"}}
    metrics = {"test_top1_percent": 80.0, "where": "/home/me/z"}
    card = card_of(metadata=SECRETS | {"dataset": dataset}, model_kwargs=kwargs, metrics=metrics)
    for secret in ("home", "/me", "Users", "secret", "hunter2", "safetensors", ".pth", "weights.bin", "token", "data/"):
        assert secret not in card
    assert f"- trained on {shown}\n" in card
    data = ModelCard(card).data
    assert data.datasets is None and data.eval_results[0].dataset_name == shown
    assert data.eval_results[0].dataset_type == "imagefolder"


def test_a_folder_that_is_named_like_a_hub_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "birds").mkdir(parents=True)
    assert ModelCard(card_of(metadata={"dataset": "images/birds"})).data.datasets is None
    card = card_of(metadata={"dataset": "images/fish"})
    assert "- trained on [images/fish](https://huggingface.co/datasets/images/fish)" in card
    assert ModelCard(card).data.datasets == ["images/fish"]


def test_the_front_matter_is_plain_yaml() -> None:
    card = card_of(metadata={"dataset": "a/b"}, metrics={"test_top1_percent": 33})
    _, front, rest = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.33
    assert rest.startswith("# Trained weights for test_vit.r160_in1k\n") and card.endswith("\n")
