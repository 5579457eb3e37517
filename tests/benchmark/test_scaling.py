"""The estimate for several GPUs: its bytes are those that DDP sums, its arithmetic is a ring's."""

import subprocess
import sys

import pytest

from nolora_vision.benchmark.scaling import Link, efficiency_percent, gradient_bytes, main, seconds_of_a_sum

COUNTED = """
import sys, timm, torch
from nolora_vision import AdapterConfig
from nolora_vision.methods import apply_method
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = timm.create_model("test_vit", num_classes=100)
apply_method(model, sys.argv[1], AdapterConfig(), options={})
data = torch.nn.parallel.DistributedDataParallel(model)._get_ddp_logging_data()
print(data["total_parameter_size_bytes"])
"""


@pytest.mark.parametrize("method", ["nolora", "full"])
def test_the_bytes_are_those_that_ddp_sums(method: str) -> None:
    done = subprocess.run([sys.executable, "-c", COUNTED, method], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == gradient_bytes("test_vit", method)


def test_a_ring_sends_almost_twice_the_bytes_whatever_the_number_of_processes() -> None:
    link = Link("any", 1.0, 0.0)
    assert seconds_of_a_sum(10**9, 2, link) == pytest.approx(1.0)
    assert seconds_of_a_sum(10**9, 64, link) == pytest.approx(2 * 63 / 64)
    slow = Link("any", 1.0, 100.0)
    assert seconds_of_a_sum(0, 8, slow) == pytest.approx(14 * 100e-6)
    assert efficiency_percent(10**9, 2, link, step_ms=1000) == pytest.approx(50.0)


def test_the_table_says_that_it_is_an_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main("test_vit", methods=("lora",), processes=(2,), step_ms=50)
    said = capsys.readouterr().out
    assert "an estimate, from a step of 50 ms that was given" in said and "% of 2 times, est." in said
    for wrong in ({"methods": ("lroa",)}, {"step_ms": 0.0}, {"processes": (1,)}):
        with pytest.raises(SystemExit, match=r"no method|Wanted"):
            main("test_vit", **wrong)  # type: ignore[arg-type]
