"""Costs: the report's figures from first principles, shapes against transformers' models, arithmetic against measurement."""

import json

import pytest
import torch
import transformers
from rich.console import Console

from fathom import ops
from fathom.config import ModelConfig
from fathom.lab.cost import FP8_EQUIVALENT, MILLION, cached_bytes, equivalent_flops, model, products
from fathom.lab.cost_measured import SMALL, gathering
from fathom.lab.cost_report import run_cost
from fathom.lab.published import figures
from fathom.lab.shapes import LLAMA, SHAPES, V2, V32
from tests.runs import fathom


def test_every_figure_of_the_report_is_reproduced_within_two_percent_or_says_why_not():
    assert len(figures()) >= 20
    for figure in figures():
        assert figure.holds or figure.why, f"{figure.name}: {figure.ours} instead of {figure.published}"
    assert sum(figure.holds for figure in figures()) >= 19
    assert all(abs(figure.error) < 0.05 for figure in figures())


# Worked out by hand from the report's layer counts and the byte layouts of its kernels.
@pytest.mark.parametrize(("name", "bytes_"), [
    ("pro", 30 * (MILLION // 4) * (584 + 68) + 31 * (MILLION // 128) * 584 + 61 * 128 * 584),
    ("flash", 21 * (MILLION // 4) * (584 + 68) + 20 * (MILLION // 128) * 584 + 43 * 128 * 584),
    ("deepseek-v3.2", 61 * MILLION * (656 + 132)), ("deepseek-v2", 60 * MILLION * 1152), ("llama-3.1-405b", 126 * MILLION * 4096)])
def test_cache_bytes_at_a_million_by_hand(name, bytes_):
    assert cached_bytes(model(name), MILLION) == bytes_


def test_terms_of_pro_and_v32_at_a_million_by_hand():
    pro = {part.part: part.flops for part in products(ModelConfig.preset("pro"), MILLION)}
    assert pro["indexer"] == 30 * (MILLION // 4) * 64 * 128 * 2
    assert pro["attention"] == 4 * 128 * 512 * (30 * (1024 + 128) + 31 * (MILLION // 128 + 128))
    assert pro["weights kept in BF16"] == pytest.approx(3.94e9, rel=1e-3)
    v32 = {part.part: part.flops for part in products(V32, MILLION)}
    assert v32["attention"] == 61 * 128 * 2048 * 2 * (512 + 64 + 512) and v32["indexer"] == 61 * MILLION * 64 * 128 * 2


@pytest.mark.parametrize(("other", "wrong"), [({"bf16": 1.0, "fp4": 1.0}, 8.25), ({"fp4": 1.0}, 7.2), ({"bf16": 1.0}, 12.2)])
def test_other_weights_of_precisions_miss_the_reports_ratio_for_flash(other, wrong):
    weight = FP8_EQUIVALENT | other
    total = [sum(part.flops * weight[part.precision] for part in products(of, MILLION)) for of in (V32, ModelConfig.preset("flash"))]
    assert total[0] / total[1] == pytest.approx(wrong, rel=0.01)
    assert abs(wrong / 9.8 - 1) > 0.1


SETTINGS = {"deepseek-v3.2": ("deepseek_v32", dict(
                hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512,
                qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=18432, first_k_dense_replace=3,
                n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, moe_intermediate_size=2048, vocab_size=129280,
                index_n_heads=64, index_head_dim=128, index_topk=2048)),
            "deepseek-v2": ("deepseek_v2", dict(
                hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512,
                qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, intermediate_size=12288, first_k_dense_replace=1,
                n_routed_experts=160, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1536, vocab_size=102400)),
            "llama-3.1-405b": ("llama", dict(
                hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, intermediate_size=53248,
                vocab_size=128256))}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_count_as_transformers_models_on_the_meta_device(name):
    kind, settings = SETTINGS[name]
    layers = settings["num_hidden_layers"]
    few = settings | {"num_hidden_layers": 4}
    with torch.device("meta"):  # four layers of each, of which the fourth is like all that follow
        built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **few, tie_word_embeddings=False))
    last = sum(parameter.numel() for parameter in built.model.layers[3].parameters())
    total = sum(parameter.numel() for parameter in built.parameters()) + (layers - 4) * last
    total += sum(buffer.numel() for key, buffer in built.named_buffers() if key.endswith("e_score_correction_bias")) * (layers - 3)
    assert SHAPES[name].parameters(activated=False) == total
    assert SHAPES[name].parameters(activated=True) / 1e9 == pytest.approx({V32: 37, V2: 21, LLAMA: 404}[SHAPES[name]], rel=0.02)


@torch.no_grad()
def test_gathering_for_the_count_changes_no_number():
    generator = torch.Generator().manual_seed(0)
    q, kv, sink = (torch.randn(shape, generator=generator) for shape in ((1, 1, 4, 16), (1, 50, 16), (4,)))
    window = ops.Window(kv[:, :5], torch.arange(5)[None], torch.tensor([[4]]), torch.tensor([[3]]))
    entries = ops.Entries(kv, torch.tensor([[0]]), torch.tensor([[40]]), torch.tensor([[[3, 7, 39, -1]]]))
    grouped = q, kv[:, :, None], kv[:, :, None], torch.tensor([[0]]), torch.tensor([[40]]), torch.tensor([[[3, 7, 39, -1]]]), 0.5
    plain = ops.attention.definition(q, window, entries, sink), ops.grouped_attention.definition(*grouped)
    with gathering():
        gathered = ops.attention.definition(q, window, entries, sink), ops.grouped_attention.definition(*grouped)
    for one, other in zip(plain, gathered, strict=True):
        torch.testing.assert_close(one, other)


def test_costs_grow_as_they_should():
    flash, small = ModelConfig.preset("flash"), ModelConfig.from_dict(SMALL)
    assert equivalent_flops(flash, 1 << 20) < 4 * equivalent_flops(flash, 1 << 16)
    assert cached_bytes(V2, 2000) == 2 * cached_bytes(V2, 1000)
    assert equivalent_flops(small, 1) > 0


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of one run of the command, and its JSON."""
    folder = tmp_path_factory.mktemp("cost")
    assert run_cost(folder / "cost.json", Console(quiet=True))
    return folder, json.loads((folder / "cost.json").read_text())


def test_measured_flops_and_bytes_are_the_counted_ones_within_a_percent(kept):
    found = kept[1]["measured"]
    assert len(found) == 18 and {each["attention"] for each in found} == {"v4", "gqa", "mla", "dsa"}
    for each in found:
        assert abs(each["error"]) < 0.01, each
        assert each["error"] == 0 or "FLOPs" in each["quantity"]


def test_the_command_keeps_json_and_a_picture(kept):
    folder, result = kept
    assert result["models"]["pro"]["cache_bytes"][-1] == pytest.approx(5.28e9, rel=0.002)
    assert len(result["published"]) == len(figures())
    assert (folder / "cost.png").stat().st_size > 5000


def test_a_picture_is_no_place_for_figures():
    wrong = fathom("lab", "cost", "--out", "cost.png", timeout=300)
    assert wrong.returncode == 2 and "ends in .json" in wrong.stderr and "Traceback" not in wrong.stderr
