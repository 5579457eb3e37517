"""AdapterConfig: every mistake is named, all of them at once."""

import json
from collections.abc import Iterable
from dataclasses import FrozenInstanceError, asdict, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nolora_vision import AdapterConfig, ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": True}, "rank must be an integer of at least 1, got True"),
        ({"rank": 2.5}, r"rank must be an integer of at least 1, got 2\.5"),
        ({"alpha": -1}, "alpha must be a positive number, or None for alpha = rank, got -1"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\), got 1\.0"),
        ({"nonlinearity": "swich"}, r"nonlinearity must be one of identity, .*, got 'swich'\. Did you mean 'swish'"),
        ({"modulation": "gates"}, r"modulation must be one of none, vector, gate, got 'gates'\. Did you mean 'gate'"),
        ({"modulation_noise": -0.1}, r"modulation_noise must be a number of at least 0, 0 being off, got -0\.1"),
        ({"modulation_noise": float("inf")}, "modulation_noise must be a number of at least 0, 0 being off, got inf"),
        ({"modulation_noise": "much"}, "modulation_noise must be a number of at least 0, 0 being off, got 'much'"),
        ({"modulation_noise": True}, "modulation_noise must be a number of at least 0, 0 being off, got True"),
        ({"rank_stabilized": 1}, "rank_stabilized must be True or False, got 1"),
        ({"share_down": "no"}, "share_down must be True or False, got 'no'"),
        ({"targets": ()}, "targets is empty, so nothing would be adapted. Roles: q, k, v"),
        ({"targets": 3}, "targets must be a string or a sequence of non-empty strings, got 3"),
        ({"targets": ("qkv", "")}, "targets must be a string or a sequence of non-empty strings"),
        ({"targets": "("}, r"targets: '\(' is neither a role nor a regular expression"),
        ({"exclude": (3,)}, r"exclude must be a string or a sequence of non-empty strings, got \(3,\)"),
        ({"layers": ()}, "layers is empty, so nothing would be adapted; None means all blocks"),
        ({"layers": 3}, "layers must be None or a sequence of block numbers, got 3"),
        ({"layers": ("a",)}, "layers must be None or a sequence of block numbers"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be one of the integers of at least 1, got 0"),
        ({"rank_pattern": {"[": 1}}, r"rank_pattern: '\[' is neither a role nor a regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern must map layers to numbers, got \[1\]"),
        ({"alpha_pattern": {"q": -2}}, r"alpha_pattern\['q'\] must be one of the positive numbers, got -2"),
        ({"alpha_pattern": {3: 1}}, "alpha_pattern needs strings as keys, got 3"),
        ({"alpha_pattern": "q"}, "alpha_pattern must map layers to numbers, got 'q'"),
        ({"alpha_pattern": {"q": True}}, r"alpha_pattern\['q'\] must be one of the positive numbers, got True"),
        ({"rank_pattern": {"q": 2.0}}, r"rank_pattern\['q'\] must be one of the integers of at least 1, got 2\.0"),
        ({"alpha": 10**400}, "alpha must be a positive number"),  # no float holds it
        ({"alpha_pattern": {"q": 10**400}}, r"alpha_pattern\['q'\] must be one of the positive numbers"),
        ({"targets": "a{99999999999999}"}, "targets: .* is neither a role nor a regular expression"),
        ({"dropout": float("inf")}, r"dropout must be a probability in \[0, 1\), got inf"),
        ({"dropout": -0.1}, r"dropout must be a probability in \[0, 1\), got -0\.1"),
        ({"nonlinearity": ["relu"]}, r"nonlinearity must be one of identity, .*, got \['relu'\]"),
        ({"modulation": None}, "modulation must be one of none, vector, gate, got None"),
        ({"layers": (True,)}, r"layers must be None or a sequence of block numbers, got \(True,\)"),
        ({"exclude": ")"}, r"exclude: '\)' is neither a role nor a regular expression"),
    ],
)
def test_each_mistake_is_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**values)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterConfig(rank=0, alpha=-1, dropout=2, nonlinearity="x", layers=())  # type: ignore[arg-type]
    assert len(caught.value.problems) == 5 and str(caught.value).count("\n  - ") == 5


def test_frozen_and_plain() -> None:
    config = AdapterConfig(targets=["q", "v"], layers=[0, -1], rank_pattern={"v": 2})  # type: ignore[arg-type]
    assert config.targets == ("q", "v") and config.layers == (0, -1)
    with pytest.raises(FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]
    assert AdapterConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_every_field_survives_json() -> None:
    config = AdapterConfig(
        rank=3,
        alpha=1.5,
        rank_stabilized=True,
        nonlinearity="rational",
        modulation="vector",
        dropout=0.25,
        modulation_noise=0.5,
        targets=("q", "mlp.fc1"),
        exclude=r"blocks\.0\..*",
        layers=(-1, 2),
        rank_pattern={"fc1": 2},
        alpha_pattern={"q": 0.5},
        share_down=True,
    )
    default = asdict(AdapterConfig())
    assert not [name for name, value in asdict(config).items() if value == default[name]]
    assert AdapterConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("selection", [["q", "v"], {"q": 0, "v": 0}.keys(), (part for part in "qv")])
def test_any_sequence_becomes_a_tuple(selection: Iterable[str]) -> None:
    assert AdapterConfig(targets=selection).targets == ("q", "v")  # type: ignore[arg-type]


def test_unknown_keys_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'lora_rank' is not a field.* Fields: rank, alpha"):
        AdapterConfig.from_dict({"lora_rank": 8})
    with pytest.raises(ConfigError, match=r"'dropuot' is not a field\. Did you mean 'dropout'"):
        AdapterConfig.from_dict({"dropuot": 0.1})


def test_scale() -> None:
    config = AdapterConfig()
    assert config.scale(8, None) == 1 and config.scale(8, 4) == 0.5
    stable = AdapterConfig(rank_stabilized=True)
    assert stable.scale(16, 8) == 2 and stable.scale(16, None) == 4


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 99), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=5),
    st.binary(max_size=3), st.sampled_from(["qkv", "relu", "a{9999999999}", "[[a", "(?i)q", "q", "vector"]),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=3), st.integers(), st.sampled_from(["q", "fc1", "(", "(?i)q"]))
JUNK = st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.lists(st.integers()), st.dictionaries(KEYS, SCALARS))


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")  # re's, for patterns like [[a
@settings(max_examples=500, deadline=None)
@given(st.dictionaries(st.sampled_from([f.name for f in fields(AdapterConfig)]), JUNK))
def test_any_values_are_a_config_or_a_config_error(values: dict) -> None:
    try:
        config = AdapterConfig(**values)
    except ConfigError as error:
        assert error.problems
    else:
        assert AdapterConfig.from_dict(asdict(config)) == config


def test_a_pattern_that_is_changed_afterwards_changes_no_config() -> None:
    ranks, alphas = {"fc1": 2}, {"fc1": 2.0}
    config = AdapterConfig(rank_pattern=ranks, alpha_pattern=alphas)
    ranks["fc1"], alphas["fc1"] = 0, 0.0
    assert config.rank_pattern == config.alpha_pattern == {"fc1": 2}
