"""What `fathom inspect` counts: the published tensors of Flash and Pro, and a folder's errors against its reference."""

import json

import pytest
import torch
from rich.console import Console

from fathom.checkpoint.contents import Error, group_of, inspect_model
from fathom.checkpoint.convert import convert
from fathom.checkpoint.layouts import stored_tensors
from fathom.checkpoint.released import save_model
from fathom.config import ModelConfig
from fathom.errors import CheckpointError, InputError
from tests.models import random_model, small_config


@pytest.mark.parametrize("preset, tensors, size, mtp_tensors", [
    ("flash", 69_187, 159_609_485_896, 1_575), ("pro", 145_116, 864_704_792_696, 2_343)])
def test_the_full_index_equals_the_published_one(preset, tensors, size, mtp_tensors):
    stored = stored_tensors(ModelConfig.preset(preset), "official-fp4")
    assert len(stored) == tensors and sum(each.nbytes for each in stored.values()) == size
    assert sum(name.startswith("mtp.") for name in stored) == mtp_tensors


def test_flash_holds_the_published_dtypes_and_its_base_the_published_parameters():
    flash = ModelConfig.preset("flash")
    stored = stored_tensors(flash, "official-fp4")
    dtypes = [each.dtype for each in stored.values()]
    assert {dtype: dtypes.count(dtype) for dtype in set(dtypes)} == {
        torch.bfloat16: 433, torch.float32: 417, torch.float8_e4m3fn: 375, torch.float8_e8m0fnu: 34_167, torch.int64: 3,
        torch.int8: 33_792}
    assert stored["layers.2.ffn.experts.255.w1.weight"].shape == (2048, 2048)
    assert stored["layers.2.ffn.experts.255.w2.scale"].shape == (4096, 64)
    assert stored["layers.2.attn.wq_b.scale"].shape == (256, 8)
    base = stored_tensors(flash, "official-fp8", own_mtp_ends=True)
    parameters = sum(torch.Size(each.shape).numel() for name, each in base.items()
                     if not name.endswith((".scale", "tid2eid")))
    assert round(parameters / 1e9) == 292 and "mtp.0.emb.tok_emb.weight" in base
    assert base["layers.0.ffn.experts.0.w1.scale"] == (torch.float32, (16, 32))


def test_a_listing_names_every_tensor_without_its_payload(tmp_path):
    inspect_model("flash", Console(quiet=True), listing=tmp_path / "flash.json")
    listing = json.loads((tmp_path / "flash.json").read_text())
    assert listing["metadata"]["total_size"] == 159_609_485_896 and len(listing["tensors"]) == 69_187
    assert listing["tensors"]["head.weight"] == {"dtype": "BF16", "shape": [129280, 4096]}


@pytest.mark.parametrize("name, group", [
    ("layers.3.ffn.experts.7.w1.weight", "routed experts"), ("layers.3.ffn.shared_experts.w1.scale", "shared experts"),
    ("layers.3.attn.indexer.compressor.ape", "indexers"), ("layers.3.attn.compressor.norm.weight", "compressors"),
    ("layers.3.attn.q_norm.weight", "norms"), ("hc_head_fn", "hyper-connections"), ("layers.3.ffn.gate.bias", "routers"),
    ("mtp.0.ffn.gate.bias", "MTP block"), ("embed.weight", "embedding, head"), ("layers.3.attn.attn_sink", "attention"),
    ("norm.weight", "norms")])
def test_groups(name, group):
    assert group_of(name) == group


def test_errors_against_a_reference_are_measured(tmp_path):
    config = small_config([0, 4])
    save_model(random_model(config), tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "fp4", "official-fp4", Console(quiet=True))
    with Console(record=True, width=120, file=open("/dev/null", "w")) as console:
        inspect_model(str(tmp_path / "fp4"), console, reference=str(tmp_path / "source"))
    rows = {tuple(cell.strip() for cell in line.split("│")[1:3]): line.split("│") for line in
            console.export_text().splitlines() if line.count("│") > 6}
    fp4, fp8, f32 = (float(rows[key][6].strip().rstrip("%")) for key in (
        ("routed experts", "FP4 pairs"), ("attention", "E4M3"), ("hyper-connections", "F32")))
    assert 5 < fp4 < 15 and 1 < fp8 < 4 and f32 == 0
    other = tmp_path / "other"
    save_model(random_model(small_config([0])), other)
    with pytest.raises(CheckpointError, match="is no reference"):
        inspect_model(str(tmp_path / "fp4"), Console(quiet=True), reference=str(other))
    with pytest.raises(InputError, match="preset has no weights"):
        inspect_model("flash", Console(quiet=True), reference=str(other))


def test_relative_error_is_a_root_of_sums():
    error = Error()
    error.add(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert error.relative == pytest.approx(0.1) and error.largest == 0.5
