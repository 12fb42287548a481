"""ModelConfig is the released config.json, field for field, and says what is wrong in one line."""

import json
from pathlib import Path

import pytest
import torch

from fathom.accounting import cache_bytes, flops_per_token, parameters, released_cache_bytes
from fathom.config import PRESETS, ModelConfig
from fathom.errors import ConfigError
from fathom.model.transformer import Transformer
from tests.models import small_config

RELEASED = Path(__file__).parent / "released"


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_released_configs_are_read_and_written_without_a_change(name, tmp_path):
    released = json.loads((RELEASED / f"config-{name}.json").read_text())
    config = ModelConfig.from_dict(released)
    assert config == ModelConfig.preset(name)
    assert json.loads(config.to_json()) == released
    (tmp_path / "config.json").write_text(config.to_json())
    assert ModelConfig.load(tmp_path) == config


@pytest.mark.parametrize(("change", "words"), [
    ({"hidden_siz": 3}, "unknown config field 'hidden_siz'; did you mean 'hidden_size'?"),
    ({"hidden_size": "wide"}, "hidden_size is 'wide'; allowed: an integer"),
    ({"hidden_size": True}, "hidden_size is True; allowed: an integer"),
    ({"hidden_size": 0}, "hidden_size is 0; allowed: at least 1"),
    ({"o_groups": 3}, "o_groups is 3; allowed: a divisor of num_attention_heads"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; allowed: even"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; allowed: at most n_routed_experts"),
    ({"compress_ratios": [0, 4]}, "compress_ratios is [0, 4]; allowed: one integer for each layer"),
    ({"compress_ratios": [0, 1, 0, 0, 0]}, "allowed: 0 (window only) or at least 2"),
    ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; allowed: 'sqrtsoftplus'"),
    ({"rope_scaling": {"kind": "yarn"}}, "unknown config field in rope_scaling: 'kind'"),
    ({"rope_scaling": {"type": "linear"}}, "allowed: type \"yarn\""),
])
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(change, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig.preset("tiny", **change)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_field_is_named():
    values = {key: value for key, value in PRESETS["tiny"].items() if key != "head_dim"}
    with pytest.raises(ConfigError, match="config field head_dim is missing"):
        ModelConfig.from_dict(values)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}/config.json"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(("name", "total", "activated", "mtp"), [
    ("flash", 284.33e9, 13.27e9, 6.61e9), ("pro", 1573.0e9, 48.85e9, 25.84e9),
    ("tiny", 3.02e6, None, None), ("nano", 100e6, 20e6, None)])
def test_presets_count_to_the_published_sizes(name, total, activated, mtp):
    counts = parameters(ModelConfig.preset(name))
    assert counts.total == pytest.approx(total, rel=0.01)
    assert activated is None or counts.activated == pytest.approx(activated, rel=0.015)
    assert mtp is None or counts.mtp == pytest.approx(mtp, rel=0.01)


@pytest.mark.parametrize("name", list(PRESETS))
def test_counted_parameters_are_the_models_own(name):
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    real = sum(tensor.numel() for key, tensor in model.state_dict().items() if not key.endswith("table"))
    assert real == parameters(config).total + parameters(config).mtp


@pytest.mark.parametrize("ratios", [[0, 0], [4, 128, 0], [3, 17, 2]])
def test_counted_cache_bytes_are_the_allocated_ones(ratios):
    config = small_config(ratios, sliding_window=24)
    with torch.device("meta"):
        model = Transformer(config)
    tokens = 2 * 3 * 17 * 128 // 4
    allocated = model.new_cache(2, tokens).nbytes / 2
    assert allocated == pytest.approx(cache_bytes(config).at(tokens), abs=len(ratios) * 4 * (32 + 16))


def test_released_formats_cost_what_the_report_counts():
    for name, gigabytes in (("pro", 5.28), ("flash", 3.69)):
        assert released_cache_bytes(ModelConfig.preset(name)).at(1 << 20) / 1e9 == pytest.approx(gigabytes, rel=0.002)


def test_flops_grow_only_through_entries():
    config = ModelConfig.preset("flash")
    short, long = flops_per_token(config, 1 << 16), flops_per_token(config, 1 << 20)
    assert long["weights"] == short["weights"] == 2 * parameters(config).activated
    assert long["indexer"] == 16 * short["indexer"]
    assert long["attention"] < 7 * short["attention"]  # only HCA reads more entries


def test_layer_kinds_follow_the_ratios():
    config = small_config([0, 4, 128, 16, 17])
    assert [config.kind(layer) for layer in range(6)] == ["window", "csa", "hca", "csa", "hca", "window"]
    assert [config.routes_by_hash(layer) for layer in range(3)] == [True, False, False]
