"""The released layout on disk: names, shapes, shards, and every way a folder can be wrong."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fathom
from fathom.checkpoint.released import save_model
from fathom.errors import CheckpointError, ConfigError
from tests.models import random_model, random_tokens, small_config
from tests.runs import fathom as run_fathom

CONFIG = small_config([0, 4, 128], num_hash_layers=1)


@pytest.fixture
def folder(tmp_path):
    save_model(random_model(CONFIG), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_saved_and_loaded_is_the_same_model(folder):
    ours, loaded = random_model(CONFIG), fathom.load_model(folder)
    assert not loaded.training
    for (name, saved), (other, read) in zip(ours.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and saved.dtype == read.dtype and torch.equal(saved, read)


def test_names_and_shapes_are_the_released_ones(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    c = CONFIG
    expected = {
        "embed.weight": [c.vocab_size, c.hidden_size], "head.weight": [c.vocab_size, c.hidden_size],
        "norm.weight": [c.hidden_size], "hc_head_fn": [4, 4 * c.hidden_size], "hc_head_base": [4], "hc_head_scale": [1],
        "layers.0.hc_attn_fn": [24, 4 * c.hidden_size], "layers.0.hc_ffn_base": [24], "layers.0.hc_ffn_scale": [3],
        "layers.0.attn.wq_a.weight": [c.q_lora_rank, c.hidden_size],
        "layers.0.attn.wq_b.weight": [c.num_attention_heads * c.head_dim, c.q_lora_rank],
        "layers.0.attn.wkv.weight": [c.head_dim, c.hidden_size], "layers.0.attn.attn_sink": [c.num_attention_heads],
        "layers.0.attn.wo_a.weight": [c.o_groups * c.o_lora_rank, c.num_attention_heads * c.head_dim // c.o_groups],
        "layers.0.attn.wo_b.weight": [c.hidden_size, c.o_groups * c.o_lora_rank],
        "layers.0.ffn.gate.tid2eid": [c.vocab_size, c.num_experts_per_tok], "layers.1.ffn.gate.bias": [8],
        "layers.1.attn.compressor.ape": [4, 2 * c.head_dim], "layers.2.attn.compressor.ape": [128, c.head_dim],
        "layers.1.attn.compressor.wkv.weight": [2 * c.head_dim, c.hidden_size],
        "layers.1.attn.indexer.wq_b.weight": [c.index_n_heads * c.index_head_dim, c.q_lora_rank],
        "layers.1.attn.indexer.weights_proj.weight": [c.index_n_heads, c.hidden_size],
        "layers.1.attn.indexer.compressor.wgate.weight": [2 * c.index_head_dim, c.hidden_size],
        "layers.1.attn.indexer.compressor.norm.weight": [c.index_head_dim],
        "layers.2.ffn.experts.7.w2.weight": [c.hidden_size, c.moe_intermediate_size],
        "layers.2.ffn.shared_experts.w1.weight": [c.moe_intermediate_size, c.hidden_size],
        "mtp.0.e_proj.weight": [c.hidden_size, c.hidden_size], "mtp.0.enorm.weight": [c.hidden_size],
        "mtp.0.hc_head_fn": [4, 4 * c.hidden_size], "mtp.0.ffn.gate.bias": [8], "mtp.0.norm.weight": [c.hidden_size],
        "mtp.0.attn_norm.weight": [c.hidden_size], "layers.1.attn.q_norm.weight": [c.q_lora_rank],
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert "layers.0.ffn.gate.bias" not in shapes and "layers.2.attn.indexer.wq_b.weight" not in shapes


def test_shards_with_an_index_load_to_the_same_model(tmp_path):
    model = random_model(CONFIG)
    save_model(model, tmp_path / "model", shard_bytes=200_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    loaded = fathom.load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_loading_in_another_dtype_keeps_the_delicate_tensors_in_float32(folder, dtype):
    model = fathom.load_model(folder, dtype=dtype)
    assert model.blocks[0].attention.query_up.weight.dtype == dtype
    delicate = torch.float32 if dtype == torch.bfloat16 else dtype
    assert model.blocks[0].attention_streams.fn.dtype == model.blocks[0].attention.sink.dtype == delicate
    tokens = random_tokens(CONFIG, 1, 150)
    logits, exact = model(tokens).logits, fathom.load_model(folder)(tokens).logits
    assert torch.isfinite(logits).all() and logits.dtype in (torch.float32, torch.float64)
    # Rounding flips some routing and selection, so only the bulk can agree.
    assert (logits - exact).abs().median() < (0.15 if dtype == torch.bfloat16 else 1e-5)


def test_files_in_half_precision_are_read_as_float32(folder):
    rewrite(folder, lambda tensors: tensors.update(
        {name: tensor.half() for name, tensor in tensors.items() if tensor.dtype == torch.float32}))
    loaded, ours = fathom.load_model(folder), random_model(CONFIG)
    assert torch.equal(loaded.head.weight, ours.head.weight.half().float())


def test_all_misfitting_tensors_are_named_in_one_error(folder):
    def change(tensors):
        del tensors["layers.1.attn.wkv.weight"]
        tensors["layers.0.attn.attn_sink"] = torch.zeros(7)
        tensors["layers.9.bogus"] = torch.zeros(1)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        fathom.load_model(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    for part in ("missing layers.1.attn.wkv.weight", "unexpected layers.9.bogus",
                 "layers.0.attn.attn_sink has shape [7], the config asks for [4]"):
        assert part in message


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        fathom.load_model(folder)
    result = run_fathom("generate", folder, "--prompt", "x")
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_a_folder_without_weights_or_config_is_refused(tmp_path, folder):
    with pytest.raises(CheckpointError, match="not a folder"):
        fathom.load_model(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no"):
        fathom.load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not valid JSON"):
        fathom.load_model(folder)


@pytest.mark.parametrize("limit", [1_000, 300_000])
def test_no_space_leaves_nothing_half_written_and_the_old_model_alone(folder, limit):
    """A real write that fails: the process may not write files beyond a limit."""
    before = (folder / "model.safetensors").read_bytes()
    script = (f"import resource, signal, sys\n"
              f"from tests.models import random_model, small_config\n"
              f"from fathom.checkpoint.released import save_model\n"
              f"from fathom.errors import CheckpointError\n"
              f"model = random_model(small_config([0, 4, 128], num_hash_layers=1), seed=5)\n"
              f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
              f"try:\n    save_model(model, {str(folder)!r})\n"
              f"except CheckpointError as error:\n    print(error)\n    sys.exit(2)\n")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert f"cannot write {folder}" in result.stdout and result.stdout.count("\n") == 1
    assert (folder / "model.safetensors").read_bytes() == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"]
