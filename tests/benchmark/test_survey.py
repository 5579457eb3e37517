"""One small model of every timm file with attention; with `-m survey`, every architecture name."""

import json
from pathlib import Path

import pytest
import timm

from nolora_vision.benchmark import survey

SMALLEST = tuple(
    [
        "beit_base_patch16_224",
        "halonet_h1",
        "cait_xxs24_224",
        "coat_lite_tiny",
        "convit_tiny",
        "test_convnext",
        "cpubone_nano",
        "crossvit_tiny_240",
        "csatv2",
        "davit_tiny",
        "deepseek_vit_412m",
        "deit_tiny_patch16_224",
        "edgenext_xx_small",
        "efficientformer_l1",
        "efficientformerv2_s0",
        "efficientvim_m1",
        "efficientvit_b0",
        "efficientvit_m0",
        "vit_tiny_patch16_dinov3_qkvb",
        "fasternet_t0",
        "fastvit_t8",
        "focalnet_tiny_srf",
        "gcvit_xxtiny",
        "gemma4_vit_167m",
        "hiera_tiny_224",
        "sam2_hiera_tiny",
        "iformer_t",
        "inception_next_atto",
        "levit_128s",
        "lowformer_b0",
        "test_mambaout",
        "coatnet_nano_rw_224",
        "poolformerv2_s12",
        "gmlp_ti16_224",
        "mobilenetv4_hybrid_medium_075",
        "mobilenetv5_base",
        "mobilevit_xxs",
        "mvitv2_tiny",
        "naflexvit_base_patch16_parfac_gap",
        "nest_tiny",
        "nextvit_small",
        "pit_ti_224",
        "pvt_v2_b0",
        "qwen3_vit_88m",
        "repvit_m1",
        "sequencer2d_s",
        "shvit_s1",
        "swiftformer_xs",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "swinv2_cr_tiny_224",
        "tiny_vit_5m_224",
        "tnt_s_legacy_patch16_224",
        "twins_svt_small",
        "visformer_tiny",
        "test_vit",
        "vit_tiny_r_s16_p8_224",
        "test_vit_relpos",
        "samvit_base_patch16_224",
        "vitamin_small_224",
        "volo_d1_224",
        "xcit_nano_12_p8_224",
    ]
)
"""The smallest architecture of each timm file that has layers for the default roles."""


@pytest.mark.parametrize("name", SMALLEST)
def test_one_of_each_file(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    finding = survey.examine(name)
    assert finding.status == "adapted" and finding.adapters > 0, finding.reason


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "mobilenetv3_small_050"])
def test_networks_without_attention_and_mlp_are_refused(name: str) -> None:
    finding = survey.examine(name)
    assert (finding.status, finding.reason, finding.adapters) == ("refused", survey.NOTHING_THERE, 0)


def test_what_goes_wrong_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def inject(model):
        model.head.requires_grad_(False)
        return survey_inject(model)

    survey_inject = survey.nolora_vision.inject
    assert survey.main(models="test_vit", output=tmp_path / "s.json") == 0
    found = json.loads((tmp_path / "s.json").read_text())["findings"]
    assert [f["status"] for f in found] == ["adapted"] and found[0]["adapters"] == 18
    monkeypatch.setattr(survey.nolora_vision, "inject", lambda model: inject(model).requires_grad_(True))
    assert survey.main(models="test_vit") == 1
    assert "failed: test_vit: something else than adapters and classifier trains" in capsys.readouterr().out
    assert survey.main(models="no_such_*") == 2


@pytest.mark.survey
def test_every_architecture_of_timm() -> None:
    findings = survey.survey(timm.list_models())
    assert len(findings) == len(timm.list_models())
    assert [f for f in findings if f.status == "failed"] == []
    assert all(f.reason == survey.NOTHING_THERE for f in findings if f.status == "refused")
    adapted = [f for f in findings if f.status == "adapted"]
    assert {f.module for f in adapted} == {timm.models.model_entrypoint(n).__module__.split(".")[-1] for n in SMALLEST}
    if timm.__version__ == "1.0.31":
        assert sum(f.cured > 0 for f in adapted) == 40
