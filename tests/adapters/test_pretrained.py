"""From an id or a directory to the same logits, through the real Hub client; what is unsound is refused, and said."""

import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

import nolora_vision
from nolora_vision import (
    AdapterMismatchError,
    AdapterNotFoundError,
    CheckpointError,
    CorruptAdapterError,
    class_names,
    eval_transform,
    from_pretrained,
    inject,
    preprocessing_of,
    push_to_hub,
    save_adapter,
)
from nolora_vision.adapters import blueprint
from nolora_vision.adapters.adapter_files import config_digest
from tests import hub_server

BACKBONE = "timm/test_vit.r160_in1k"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub with the weights of test_vit, which the client of this process uses, logged in, with an empty cache."""
    import huggingface_hub
    from huggingface_hub import constants

    with hub_server.hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits a second before it tries again
        torch.manual_seed(5)
        server.repos[BACKBONE] = hub_server.Repo()
        server.repos[BACKBONE].commit({"model.safetensors": save(timm.create_model("test_vit").state_dict())})
        huggingface_hub.close_session()  # its settings of proxies were read before
        yield server
        huggingface_hub.close_session()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def trained(seed: int = 0, **kwargs: Any) -> nn.Module:
    """On the Hub's weights, with a head and adapters that do something."""
    model = timm.create_model("test_vit", pretrained=True, num_classes=7, **kwargs).eval()
    return randomised(inject(model, rank=3), seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def full(seed: int = 3, **kwargs: Any) -> nn.Module:
    """Every weight trained, no adapters: needs no backbone from anywhere."""
    return randomised(timm.create_model("test_vit", num_classes=7, **kwargs).eval(), seed)


def images(size: int = 160, n: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, size: int = 160) -> Tensor:
    return model(images(size))


def edited(directory: Path, **fields: Any) -> Path:
    """An adapter whose config says something else, with the right checksum."""
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | fields
    config["sha256"] = config_digest(config)
    path.write_text(json.dumps(config), encoding="utf-8")
    return directory


def with_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """An adapter with other tensors, with the right checksums."""
    state = load_file(directory / "adapter_model.safetensors")
    change(state)
    content = save(state)
    (directory / "adapter_model.safetensors").write_bytes(content)
    return edited(directory, tensors=len(state), weights_sha256=hashlib.sha256(content).hexdigest())


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def published(hub: Any, repo_id: str, files: dict[str, bytes]) -> Any:
    repo = hub.repos[repo_id] = hub_server.Repo()
    repo.commit(files)
    return repo


@pytest.fixture
def full_adapter(tmp_path: Path) -> Path:
    return save_adapter(full(), tmp_path / "full")


# --- there and back ---


def test_push_and_from_pretrained_give_the_same_logits_bit_for_bit(hub: Any) -> None:
    model = trained()
    address = push_to_hub(model, "me/adapter", class_names=list("abcdefg"), commit_message="First")
    assert address == f"{hub.endpoint}/me/adapter/commit/{hub.repos['me/adapter'].refs['main']}"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} < hub.repos["me/adapter"].files().keys()
    other = from_pretrained("me/adapter")
    assert torch.equal(logits(other), logits(model)) and not other.training
    assert class_names(other) == tuple("abcdefg")
    assert str(nolora_vision.summary(other)) == str(nolora_vision.summary(model))


@pytest.mark.parametrize("xet", [True, False], ids=["with xet", "without xet"])
def test_push_from_a_directory_and_update(hub: Any, tmp_path: Path, monkeypatch, xet: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not xet)
    directory = save_adapter(trained(), tmp_path / "a")
    (directory / "notes.txt").write_text("mine")
    push_to_hub(directory, "me/adapter", private=True)
    assert hub.repos["me/adapter"].private and "notes.txt" not in hub.repos["me/adapter"].files()
    first = hub.repos["me/adapter"].refs["main"]

    second = trained(seed=2)
    push_to_hub(save_adapter(second, tmp_path / "b"), "me/adapter")
    assert torch.equal(logits(from_pretrained("me/adapter")), logits(second))
    assert torch.equal(logits(from_pretrained("me/adapter", revision=first)), logits(trained()))


def test_revisions_are_branches_tags_and_commits(hub: Any) -> None:
    models = {name: trained(seed) for seed, name in enumerate(("main", "branch", "tag"))}
    push_to_hub(models["tag"], "me/adapter")
    repo = hub.repos["me/adapter"]
    repo.refs["v1"] = repo.refs["main"]
    push_to_hub(models["main"], "me/adapter")
    push_to_hub(models["branch"], "me/adapter", revision="better")  # made from main
    push_to_hub(models["branch"], "me/adapter", revision="better")  # exists now, and has it already
    assert torch.equal(logits(from_pretrained("me/adapter")), logits(models["main"]))
    for revision in ("better", repo.refs["better"]):
        assert torch.equal(logits(from_pretrained("me/adapter", revision=revision)), logits(models["branch"]))
    assert torch.equal(logits(from_pretrained("me/adapter", revision="v1")), logits(models["tag"]))
    for revision in ("v2", "f" * 40):
        with pytest.raises(AdapterNotFoundError, match=f"me/adapter on the Hub has no revision '{revision}'. Pass one"):
            from_pretrained("me/adapter", revision=revision)


CHILD = """
import sys, torch, nolora_vision
torch.set_num_threads(int(sys.argv[1]))
model = nolora_vision.from_pretrained("me/adapter", revision="main")
with torch.no_grad():
    torch.save(model(torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))), sys.argv[2])
"""


def test_another_process_gets_them_by_environment_alone(hub: Any, tmp_path: Path) -> None:
    model = trained()
    push_to_hub(model, "me/adapter", private=True)
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", CHILD, str(torch.get_num_threads()), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_pushing_a_peft_adapter(hub: Any) -> None:
    linear = timm.create_model("test_vit", pretrained=True, num_classes=7).eval()
    randomised(inject(linear, rank=2, nonlinearity="identity", modulation="none"))
    push_to_hub(linear, "me/lora", format="peft")
    with pytest.raises(
        AdapterMismatchError, match=r"me/lora is in PEFT's format, .* Pass it: from_pretrained\(..., mod"
    ):
        from_pretrained("me/lora")
    base = timm.create_model("test_vit", pretrained=True, num_classes=7)
    torch.testing.assert_close(logits(from_pretrained("me/lora", model=base)), logits(linear))


# --- dry run and refusals before uploading ---


def test_dry_run_shows_names_and_sizes_and_touches_nothing(hub: Any, capsys, monkeypatch, full_adapter: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    offline(monkeypatch)
    assert push_to_hub(full_adapter, "me/adapter", revision="dev", dry_run=True) == f"{hub.endpoint}/me/adapter"
    assert push_to_hub(full(), "me/adapter", dry_run=True, metrics={"x": 1.0})
    shown = capsys.readouterr().out
    assert f"Would upload to {hub.endpoint}/me/adapter, revision dev:" in shown
    for path in full_adapter.iterdir():
        assert f"{path.name} " in shown and f" {path.stat().st_size:,} bytes" in shown
    assert not hub.requests


def test_what_is_damaged_is_not_uploaded(hub: Any, tmp_path: Path, full_adapter: Path) -> None:
    weights = full_adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\1\2\3")
    for dry_run in (True, False):
        with pytest.raises(CorruptAdapterError, match="does not have the checksum"):
            push_to_hub(full_adapter, "me/adapter", dry_run=dry_run)
    (full_adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    weights.write_bytes(content[:1000])
    with pytest.raises(CorruptAdapterError, match="not a whole safetensors file"):
        push_to_hub(full_adapter, "me/adapter")
    with pytest.raises(AdapterNotFoundError, match=r"me/typo does not exist. Wanted a model, or a directory"):
        push_to_hub("me/typo", "me/adapter")
    assert not hub.requests


def test_push_refuses_what_makes_no_sense(full_adapter: Path) -> None:
    with pytest.raises(ValueError, match="Repo id must"):
        push_to_hub(full_adapter, "me/with space", dry_run=True)
    with pytest.raises(TypeError, match=r"metrics: options of save_adapter go with a model, and .* is saved already"):
        push_to_hub(full_adapter, "me/adapter", dry_run=True, metrics={})
    with pytest.raises(TypeError, match="unknown_option"):
        push_to_hub(full(), "me/adapter", dry_run=True, unknown_option=1)


def test_push_says_what_to_do(hub: Any, monkeypatch, full_adapter: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        CheckpointError, match=r"could not be uploaded to http.*/me/adapter \(.*401.*Log in with `hf au"
    ):
        push_to_hub(full_adapter, "me/adapter")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    hub.faults.status = 500
    with pytest.raises(CheckpointError, match=r"could not be uploaded .*500.*Call it again"):
        push_to_hub(full_adapter, "me/adapter")
    offline(monkeypatch)
    with pytest.raises(CheckpointError, match="Unset HF_HUB_OFFLINE, or see what would be uploaded with dry_run=True"):
        push_to_hub(full_adapter, "me/adapter")
    assert not hub.repos.keys() - {BACKBONE}


# --- what the Hub lacks, hides, drops and damages ---


def test_unknown_and_private_repositories(hub: Any, monkeypatch, full_adapter: Path) -> None:
    wanted = "has no such repository, or it is private or gated. .* log in with `hf auth login`, or set HF_TOKEN"
    with pytest.raises(AdapterNotFoundError, match=f"me/none is no directory here, and {hub.endpoint} {wanted}"):
        from_pretrained("me/none")
    published(hub, "me/secret", files_of(full_adapter)).private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterNotFoundError, match=f"me/secret .* {wanted}"):
        from_pretrained("me/secret")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert torch.equal(logits(from_pretrained("me/secret")), logits(full()))


@pytest.mark.parametrize("source", ["./me/x", "/no/such", "~/x", "a/b/c", "me/x/", Path("me/x"), "a\0b", "x" * 5000])
def test_what_is_no_id_is_not_looked_up(hub: Any, source: str | Path) -> None:
    with pytest.raises(
        AdapterNotFoundError, match=r"Wanted a directory written by nolora_vision.save_adapter, or the id"
    ):
        from_pretrained(source)
    assert not hub.requests


def test_ids_that_the_hub_cannot_have_and_files(hub: Any, tmp_path: Path, full_adapter: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="is neither a directory nor a Hub id"):
        from_pretrained("me/not an id")
    with pytest.raises(AdapterNotFoundError, match=r"README.md is no directory"):
        from_pretrained(full_adapter / "README.md")
    with pytest.raises(AdapterNotFoundError, match="is a directory here, and has no revision 'v1'"):
        from_pretrained(full_adapter, revision="v1")
    assert not hub.requests


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_repository_without_an_adapter(hub: Any, full_adapter: Path, missing: str) -> None:
    files = files_of(full_adapter)
    del files[missing]
    published(hub, "me/model", files)
    with pytest.raises(
        AdapterNotFoundError, match=f"me/model on the Hub holds no adapter, or .*: no {missing} in .*cache"
    ):
        from_pretrained("me/model")
    published(hub, "me/empty", {"model.bin": b"x"})
    with pytest.raises(AdapterNotFoundError, match=r"no adapter_config.json and no adapter_model.safetensors"):
        from_pretrained("me/empty")


def test_offline_needs_a_warm_cache(hub: Any, monkeypatch) -> None:
    model = trained()
    push_to_hub(model, "me/adapter")
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(AdapterNotFoundError) as caught:
            from_pretrained("me/adapter")
    for words in ("me/adapter is no directory here", "hub-cache", "HF_HUB_OFFLINE is set. Unset it", "hf download"):
        assert words in str(caught.value)
    from_pretrained("me/adapter")
    offline(monkeypatch)
    hub.requests.clear()
    assert torch.equal(logits(from_pretrained("me/adapter")), logits(model)) and not hub.requests
    with pytest.raises(AdapterNotFoundError, match=r"not whole in the cache .* at revision 'v2'"):
        from_pretrained("me/adapter", revision="v2")


def test_a_hub_that_is_not_there(hub: Any, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterNotFoundError, match=r"could not be downloaded from http://127.0.0.1:9 \(.*HF_ENDPOINT"):
        from_pretrained("me/adapter")


def test_a_dropped_connection_never_leaves_half_an_adapter(hub: Any, monkeypatch, full_adapter: Path) -> None:
    published(hub, "me/adapter", files_of(full_adapter))
    hub.faults.cut_after = 3000  # the config and the card come whole, the weights do not
    for _ in range(2):
        with pytest.raises(AdapterNotFoundError, match=r"me/adapter .* could not be downloaded .* Run it again"):
            from_pretrained("me/adapter")
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(AdapterNotFoundError, match="not whole in the cache"):
            from_pretrained("me/adapter")
    hub.faults.cut_after = None
    assert torch.equal(logits(from_pretrained("me/adapter")), logits(full()))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble(hub: Any, full_adapter: Path, status: int) -> None:
    published(hub, "me/adapter", files_of(full_adapter))
    hub.faults.status = status
    with pytest.raises(AdapterNotFoundError, match=rf"could not be downloaded from .*{status}"):
        from_pretrained("me/adapter")


def test_a_slow_hub_is_waited_for(hub: Any, full_adapter: Path) -> None:
    published(hub, "me/adapter", files_of(full_adapter))
    hub.faults.delay_s = 0.3
    assert torch.equal(logits(from_pretrained("me/adapter")), logits(full()))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_wrong_bytes_are_fetched_again_and_never_kept(hub: Any, monkeypatch, full_adapter: Path, name: str) -> None:
    published(hub, "me/adapter", files_of(full_adapter))
    hub.faults.wrong_bytes = (name,)
    if name.endswith(".json"):  # its last byte is a newline, whose change is harmless or no JSON
        hub.repos["me/adapter"].commit({**files_of(full_adapter), name: (full_adapter / name).read_bytes().rstrip()})
    for _ in range(2):
        hub.requests.clear()
        with pytest.raises(CorruptAdapterError, match=rf"me/adapter could not .*{name} does not have .* damaged twice"):
            from_pretrained("me/adapter")
        assert sum(request.startswith("GET") and request.endswith(name) for request in hub.requests) == 2
    hub.faults.times = 1  # once more, and then no more
    assert torch.equal(logits(from_pretrained("me/adapter")), logits(full()))
    offline(monkeypatch)
    assert torch.equal(logits(from_pretrained("me/adapter")), logits(full()))


def test_a_damaged_file_in_the_repository(hub: Any, full_adapter: Path) -> None:
    files = files_of(full_adapter)
    published(hub, "me/adapter", {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-8]})
    with pytest.raises(CorruptAdapterError, match="the repository's own files are damaged"):
        from_pretrained("me/adapter")
    with pytest.raises(CorruptAdapterError, match="is not an adapter config") as caught:
        (full_adapter / "adapter_config.json").write_text("[")
        from_pretrained(full_adapter)
    assert "Hub" not in str(caught.value)


def test_the_backbones_weights_cannot_be_had(hub: Any, tmp_path: Path, monkeypatch) -> None:
    directory = save_adapter(trained(), tmp_path / "a")
    shutil.rmtree(tmp_path / "hub-cache")
    backbone = hub.repos.pop(BACKBONE)
    said = (
        r"/a is sound, but the weights of its backbone test_vit.r160_in1k could not be loaded \(.*HF_ENDPOINT .* pass"
    )
    with pytest.raises(AdapterNotFoundError, match=said):
        from_pretrained(directory)
    hub.repos[BACKBONE] = backbone
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(AdapterNotFoundError, match=said):
            from_pretrained(directory)
    assert torch.equal(logits(from_pretrained(directory)), logits(trained()))
    torch.manual_seed(6)
    backbone.commit({"model.safetensors": save(timm.create_model("test_vit").state_dict())})
    with pytest.raises(AdapterMismatchError, match="not those that the adapter was trained on"):
        from_pretrained(directory)


def test_an_architecture_without_pretrained_weights_needs_a_backbone(hub: Any, tmp_path: Path) -> None:
    base = timm.create_model("vit_small_patch32_224", depth=1, num_classes=3)
    assert not base.pretrained_cfg.get("hf_hub_id") or base.pretrained_cfg["tag"] == "augreg_in21k_ft_in1k"
    name = "vit_base_patch16_xp_224"
    torch.manual_seed(1)
    model = randomised(inject(timm.create_model(name, depth=1, num_classes=3)).eval())
    save_adapter(model, tmp_path / "a", model_kwargs={"depth": 1})
    with pytest.raises(AdapterNotFoundError, match=r"if timm has no such weights, pass the backbone with your own"):
        from_pretrained(tmp_path / "a")
    torch.manual_seed(1)
    other = from_pretrained(tmp_path / "a", model=timm.create_model(name, depth=1, num_classes=3))
    assert torch.equal(logits(other, 224), logits(model, 224))


# --- adapters that hold every weight ---


def test_full_adapters_need_no_backbone(full_adapter: Path) -> None:
    config = nolora_vision.read_adapter_config(full_adapter)
    assert config["adapter"] is None and config["backbone"] == {}
    assert torch.equal(logits(from_pretrained(full_adapter)), logits(full()))  # tests are offline


@pytest.mark.parametrize("adapted", [False, True], ids=["no adapters", "adapters"])
def test_adapters_of_every_family_that_hold_every_weight(family, tmp_path: Path, adapted: bool) -> None:
    torch.manual_seed(3)
    model = family.build().train()
    if adapted:
        randomised(inject(model, rank=2, targets="all")).requires_grad_(True)
    model(family.images(2))  # statistics move, and are saved with the weights
    save_adapter(model.eval(), tmp_path / "a", model_kwargs=family.options)
    torch.manual_seed(4)
    loaded = from_pretrained(tmp_path / "a")
    for m in (loaded, model):
        m.requires_grad_(False)  # torch folds products or not by these flags, which some processors round otherwise
    assert torch.equal(logits(loaded, family.size), logits(model, family.size))


def test_a_linear_probe_is_no_full_adapter(hub: Any, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", pretrained=True, num_classes=7).eval()
    nolora_vision.freeze_backbone(model)
    randomised(model)
    directory = save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(from_pretrained(directory)), logits(model))


@pytest.mark.parametrize("prefix", ["blocks.1.", "head.weight"])
def test_a_full_adapter_with_gaps_is_never_filled_with_random_weights(full_adapter: Path, prefix: str) -> None:
    def drop(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]

    with_tensors(full_adapter, drop)
    said = "1 missing: head.weight" if "head" in prefix else "the weights of its backbone .* could not be loaded"
    with pytest.raises(CheckpointError, match=said):
        from_pretrained(full_adapter)


# --- what the config says, and what it cannot do ---


def test_preprocessing_and_class_names_are_the_adapters(tmp_path: Path) -> None:
    said = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.5, "crop_mode": "center"}
    save_adapter(
        full(), tmp_path / "a", preprocessing={**said, "interpolation": "nearest"}, class_names=list("abcdefg")
    )
    model = from_pretrained(tmp_path / "a")
    assert {key: preprocessing_of(model)[key] for key in said} == said
    assert preprocessing_of(full())["crop_pct"] != 0.5
    assert preprocessing_of(timm.create_model("test_vit", img_size=32))["input_size"] == (3, 32, 32)
    picture = Image.new("RGB", (640, 640), (255, 0, 0))
    picture.paste((0, 255, 0), (160, 160, 480, 480))  # the central half, which crop_pct = 0.5 leaves
    x = eval_transform(model)(picture)
    assert x.shape == (3, 160, 160)
    wanted = (torch.tensor([0.0, 1.0, 0.0]) - torch.tensor(said["mean"])) / torch.tensor(said["std"])
    torch.testing.assert_close(x, wanted[:, None, None].expand(3, 160, 160))
    assert class_names(model) == tuple("abcdefg") and class_names(full()) == tuple("0123456")
    model.reset_classifier(3)
    assert class_names(model) == ("0", "1", "2")


def test_image_size_and_other_arguments_are_honoured(hub: Any, tmp_path: Path) -> None:
    model = trained(img_size=96)
    push_to_hub(model, "me/small")  # the size is seen in the model
    other = from_pretrained("me/small")
    assert other.patch_embed.img_size == (96, 96) and torch.equal(logits(other, 96), logits(model, 96))

    kwargs = {"img_size": 64, "depth": 2, "mlp_ratio": 2.0, "global_pool": "avg", "qkv_bias": False}
    save_adapter(full(**kwargs), tmp_path / "a", model_kwargs={**kwargs, "img_size": [64, 64]})
    other = from_pretrained(tmp_path / "a")
    assert len(other.blocks) == 2 and torch.equal(logits(other, 64), logits(full(**kwargs), 64))


def test_arguments_that_the_pretrained_weights_do_not_fit(hub: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = inject(timm.create_model("test_vit", num_classes=7, mlp_ratio=2.0))
    save_adapter(model, tmp_path / "a", model_kwargs={"mlp_ratio": 2.0})
    with pytest.raises(
        AdapterMismatchError, match=r"timm's weights of test_vit.r160_in1k do not fit .*'mlp_ratio': 2.0"
    ):
        from_pretrained(tmp_path / "a")


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("timm was asked to build it")

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"pretrained_cfg": "x"},
        {"pretrained": True},
        {"pretrained_strict": False},
        {"pretrained_filter_fn": "x"},
        {"checkpoint_path": "weights.pt"},
        {"cache_dir": "cache"},
        {"num_classes": 7},
        {"device": "cuda"},
        {"features_only": True},
        {"__class__": 1},
        {"img_size": {"a": 1}},
        {"img_size": [[64, 64]]},
        {"img_size": ["64"]},
        {"depths": [1] * 65},
        {"global_pool": "a/b"},
        {"global_pool": "hf-hub:x"},
        {"global_pool": "x" * 65},
        {"depth": 10**9},
        {"depth": -1},
        {"img_size": [160, -160]},
        {"mlp_ratio": 1e300},
    ],
    ids=str,
)
def test_arguments_that_are_not_taken_from_an_adapter(full_adapter: Path, no_building, kwargs: dict[str, Any]) -> None:
    edited(full_adapter, model_kwargs=kwargs)
    with pytest.raises(CorruptAdapterError, match="model_kwargs that are not taken from an adapter") as caught:
        from_pretrained(full_adapter)
    assert str(full_adapter) in str(caught.value) and next(iter(kwargs)) in str(caught.value)
    assert "from_pretrained(..., model=timm.create_model(...))" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["hf-hub:me/evil", "hf_hub:me/evil", "local-dir:/tmp/evil", "../x", "me/test_vit", "", "x"]
)
def test_architectures_outside_timm_are_refused(full_adapter: Path, no_building, name: str) -> None:
    edited(full_adapter, architecture=name)
    with pytest.raises(
        AdapterMismatchError, match=rf"is for architecture '{name}', which timm .* does not have. Upgrade"
    ):
        from_pretrained(full_adapter)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "test_vit.x/../../y", "pretrained_tag": ""}, "looks like|cannot build"),
        ({"pretrained_tag": "x:/etc"}, "Unknown model source|cannot build"),
        ({"pretrained_tag": "no_such"}, "does not know these weights"),
        ({"num_classes": -7, "class_names": None}, "not in the model: head.bias"),
        ({"num_classes": 10**9, "class_names": None}, r"describes a model of 65,\d{3},\d{3},\d{3} numbers"),
        ({"num_classes": 10**30, "class_names": None}, "cannot build"),
        ({"num_classes": 8, "class_names": None}, "of another shape: .*head.weight"),
        ({"model_kwargs": {"depth": 65536}}, "a model of more than 5,000 tensors"),
        ({"model_kwargs": {"embed_dim": 65536}}, r"describes a model of \d+,\d{3},\d{3},\d{3} numbers"),
        ({"model_kwargs": {"img_size": 65536}}, r"describes a model of 1,\d{3},\d{3},\d{3} numbers"),
        ({"model_kwargs": {"img_size": 0}}, "cannot build|of another shape"),
        ({"model_kwargs": {"patch_size": 0}}, "cannot build .*ZeroDivisionError"),
        ({"model_kwargs": {"embed_dim": 63}}, "cannot build"),
        ({"model_kwargs": {"no_such": 1}}, "cannot build .*no_such"),
        ({"model_kwargs": {"block_fn": "Block"}}, "cannot build"),
        ({"model_kwargs": {"depth": 3}}, "not in the model: blocks"),
    ],
    ids=str,
)
def test_senseless_models_are_refused_without_memory(full_adapter: Path, fields: dict[str, Any], message: str) -> None:
    edited(full_adapter, **fields)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(full_adapter)


def test_a_huge_rank_takes_no_memory(hub: Any, tmp_path: Path) -> None:
    directory = save_adapter(trained(), tmp_path / "a")
    adapter = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))["adapter"]
    hub.requests.clear()
    edited(directory, adapter={**adapter, "rank": 10**9})  # 256 GB for the first A alone
    with pytest.raises(AdapterMismatchError, match="rank 1000000000 is larger than the layer"):
        from_pretrained(directory)
    assert not hub.requests  # and nothing was downloaded for it


def test_the_limit_of_tensors_counts_one_thread_and_goes_away(monkeypatch) -> None:
    monkeypatch.setattr(blueprint, "MOST_TENSORS", 1)
    with pytest.raises(ValueError, match="more than 1 tensors"), blueprint._few_tensors():
        nn.Linear(1, 1)
        nn.Linear(1, 1)
    with blueprint._few_tensors():
        thread = threading.Thread(target=lambda: nn.Linear(1, 1))
        thread.start()
        thread.join()
        nn.Linear(1, 1, bias=False)
    nn.Linear(1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": [3, 10**9, 10**9]},
        {"input_size": [160, 160]},
        {"input_size": "160"},
        {"mean": ["0.5"]},
        {"mean": []},
        {"std": [0, 0, 0]},
        {"interpolation": "evil"},
        {"interpolation": []},
        {"crop_pct": -1},
        {"crop_mode": None},
        {"file": "x"},
    ],
    ids=str,
)
def test_senseless_preprocessing_is_refused(full_adapter: Path, no_building, wrong: dict[str, Any]) -> None:
    edited(full_adapter, preprocessing=wrong)
    with pytest.raises(CorruptAdapterError, match="preprocessing that makes no sense: " + next(iter(wrong))):
        from_pretrained(full_adapter)


# --- models, devices, precisions ---


def test_a_given_model_is_used_and_left_alone_if_it_does_not_fit(hub: Any, tmp_path: Path) -> None:
    directory = save_adapter(trained(), tmp_path / "a")
    base = timm.create_model("test_vit", pretrained=True, num_classes=7)
    assert from_pretrained(directory, model=base) is base and torch.equal(logits(base), logits(trained()))
    other = timm.create_model("test_vit", pretrained=True, num_classes=8)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match="adapter is for num_classes 7, this model has 8"):
        from_pretrained(directory, model=other)
    assert other.training and before.keys() == other.state_dict().keys()
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_a_compiled_model_that_ran_before(hub: Any, tmp_path: Path) -> None:
    directory = save_adapter(trained(), tmp_path / "a")
    compiled = torch.compile(timm.create_model("test_vit", pretrained=True, num_classes=7).eval(), backend="eager")
    before = logits(compiled)
    assert from_pretrained(directory, model=compiled) is compiled
    assert torch.equal(logits(compiled), logits(trained())) and not torch.equal(logits(compiled), before)
    assert class_names(compiled) == class_names(trained()) and preprocessing_of(compiled) == preprocessing_of(trained())
    push_to_hub(compiled, "me/compiled")
    assert torch.equal(logits(from_pretrained("me/compiled")), logits(trained()))


def test_dtype_casts_the_backbone_and_keeps_adapters_in_fp32(hub: Any, tmp_path: Path) -> None:
    directory = save_adapter(trained(), tmp_path / "a")
    model = from_pretrained(directory, dtype=torch.bfloat16, device="cpu")
    by_hand = inject(timm.create_model("test_vit", pretrained=True, num_classes=7).to(torch.bfloat16), rank=3)
    nolora_vision.load_adapter(by_hand, directory)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds == {name: p.dtype for name, p in by_hand.named_parameters()}
    assert {dtype for name, dtype in kinds.items() if ".adapter." in name} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if ".adapter." not in name} == {torch.bfloat16}
    with torch.no_grad():
        x = images().bfloat16()
        assert torch.equal(model(x), by_hand.eval()(x)) and model(x).dtype == torch.bfloat16
        assert not torch.equal(model(x).float(), logits(trained()))
    adapters = [p.detach() for p in nolora_vision.adapter_parameters(model)]
    for mine, theirs in zip(adapters, nolora_vision.adapter_parameters(trained()), strict=True):
        assert torch.equal(mine, theirs)  # not rounded on the way


def test_devices_and_dtypes_that_do_not_exist(full_adapter: Path, no_building) -> None:
    with pytest.raises(
        TypeError, match=r"dtype must be a floating point torch.dtype such as torch.bfloat16, got torch.int8"
    ):
        from_pretrained(full_adapter, dtype=torch.int8)
    with pytest.raises(TypeError, match="got 'bfloat16'"):
        from_pretrained(full_adapter, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="device"):
        from_pretrained(full_adapter, device="nonsense")


def test_the_stand_in_is_no_pushover(hub: Any, full_adapter: Path) -> None:
    """The faults do what they say, or the tests above would prove nothing."""
    repo = published(hub, "me/adapter", files_of(full_adapter))
    url = f"{hub.endpoint}/me/adapter/resolve/main/adapter_model.safetensors"
    content = (full_adapter / "adapter_model.safetensors").read_bytes()
    get = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with get(url) as answer:
        assert answer.read() == content and answer.headers["X-Repo-Commit"] == repo.refs["main"]
    hub.faults.wrong_bytes = ("adapter_model.safetensors",)
    with get(url) as answer:
        wrong = answer.read()
    assert wrong != content and len(wrong) == len(content)
    hub.faults.cut_after = 10
    with pytest.raises(http.client.IncompleteRead), get(url) as answer:
        answer.read()
    hub.faults.status = 503
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        get(url)
    caught.value.close()
