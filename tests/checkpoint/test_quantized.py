"""FP8 and FP4 folders made by an independent writer: read exactly, kept packed, saved bit for bit; damage named in one line."""

import json
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fathom
from fathom.checkpoint.released import save_model
from fathom.config import QuantizationConfig
from fathom.errors import CheckpointError, FathomError
from tests.models import random_model, random_tokens, small_config

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
SIZES = {"whole tiles": dict(hidden_size=256, moe_intermediate_size=128),
         "short tiles": dict(hidden_size=96, moe_intermediate_size=80, q_lora_rank=130, head_dim=48)}
FP4_TABLE = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])
PRODUCTS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
CONFIG = small_config([0, 4, 128], num_hash_layers=1, **SIZES["whole tiles"])


def quantised(name):
    parts = name.split(".")
    return parts[-1] == "weight" and parts[-2] in PRODUCTS and "compressor" not in name


def draw(name, shape, kind, rng):
    """Random codes and scale of a matrix, and what they stand for in float64, by numpy and ml_dtypes alone."""
    rows, columns = shape
    if kind == "official-fp4" and ".experts." in name:
        byte = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
        scale = rng.integers(118, 122, (rows, -(-columns // 32)), dtype=np.uint8)
        values = FP4_TABLE[np.stack([byte & 15, byte >> 4], -1).reshape(rows, columns)]
        exact = values * np.repeat(2.0 ** (scale.astype(float) - 127), 32, 1)[:, :columns]
        return torch.from_numpy(byte.view(np.int8)), torch.from_numpy(scale).view(E8M0), exact
    byte = rng.integers(0, 255, shape, dtype=np.uint8)
    byte = np.where(byte % 128 == 127, 0, byte).astype(np.uint8)
    byte[:, ::3] &= 0b10111111  # not all of them large
    grid = -(-rows // 128), -(-columns // 128)
    codes = byte.view(ml_dtypes.float8_e4m3fn).astype(float)
    if kind == "official-fp4":
        scale = rng.integers(112, 115, grid, dtype=np.uint8)
        number, stored = 2.0 ** (scale.astype(float) - 127), torch.from_numpy(scale).view(E8M0)
    else:  # base models: any float32
        number = rng.uniform(2e-5, 9e-5, grid).astype(np.float32)
        stored = torch.from_numpy(number)
    exact = codes * np.repeat(np.repeat(number.astype(float), 128, 0), 128, 1)[:rows, :columns]
    return torch.from_numpy(byte).view(E4M3), stored, exact


def write(folder, config, kind, changes=None):
    """A folder in an official layout, in three shards, scales apart from their weights; the exact values by name."""
    plain = folder.with_name("plain")
    save_model(random_model(config), plain)
    source, rng, exact = load_file(plain / "model.safetensors"), np.random.default_rng(0), {}
    tensors = {}
    for name, tensor in source.items():
        if quantised(name):
            codes, scale, exact[name] = draw(name, tuple(tensor.shape), kind, rng)
            tensors |= {name: codes, name[:-6] + "scale": scale}
        elif name.endswith("tid2eid"):
            tensors[name] = tensor.int()
        else:
            wide = name.endswith(("ape", "attn_sink", "gate.bias")) or "hc_" in name
            tensors[name] = tensor if wide else tensor.bfloat16()
            exact[name] = tensors[name].double().numpy()
    tensors |= changes or {}
    exact |= {name: tensor.double().numpy() for name, tensor in (changes or {}).items()}
    folder.mkdir()
    names = sorted(tensors, key=lambda name: (name.endswith("scale"), name))  # scales end up in the last shard
    shards = {f"model-{i + 1:05d}-of-00003.safetensors": names[i * len(names) // 3:(i + 1) * len(names) // 3] for i in range(3)}
    for file, part in shards.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
             "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = config.to_dict() | {"expert_dtype": kind[-3:], "torch_dtype": "bfloat16",
                                 "quantization_config": QuantizationConfig().__dict__}
    (folder / "config.json").write_text(json.dumps(values))
    return exact


@pytest.fixture(scope="module", params=["official-fp4", "official-fp8"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=SIZES)
def made(request, kind, tmp_path_factory):
    """A folder and its exact values."""
    folder = tmp_path_factory.mktemp("quantised") / "model"
    return folder, write(folder, small_config([0, 4, 128], num_hash_layers=1, **SIZES[request.param]), kind)


def values_of(folder, model):
    """A plain model's tensors by released name."""
    save_model(model, folder)
    return load_file(folder / "model.safetensors")


def same_bits(one, other):
    raw = [tensor.contiguous().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def test_float32_is_the_exact_dequantisation(made, tmp_path):
    folder, exact = made
    got = values_of(tmp_path / "plain", fathom.load_model(folder))
    for name, expected in exact.items():
        assert np.array_equal(got[name].numpy(), expected.astype(np.float32)), name
    assert got["layers.0.ffn.gate.tid2eid"].dtype == torch.int64


@torch.no_grad()
def test_packed_weights_stay_as_stored_and_compute_the_same(made, kind):
    folder, _ = made
    plain, packed = fathom.load_model(folder), fathom.load_model(folder, packed=True)
    held = sum(tensor.nbytes for tensor in packed.state_dict().values())
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    embedding = sum(p.numel() * 2 for n, p in plain.named_parameters() if "expert" not in n)  # bfloat16 on disk, float32 here
    assert held < stored + embedding and held < 0.7 * sum(tensor.nbytes for tensor in plain.state_dict().values())
    experts = packed.blocks[1].moe.experts
    assert experts.gate.dtype == (torch.int8 if kind == "official-fp4" else E4M3)
    assert not any(p.requires_grad for p in packed.parameters() if p.dtype in (torch.int8, E4M3))
    tokens = random_tokens(plain.config, 2, 150)
    torch.testing.assert_close(packed(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 300_000])
def test_a_packed_model_is_saved_bit_for_bit(made, tmp_path, shard_bytes):
    folder, _ = made
    model = fathom.load_model(folder, torch.bfloat16, packed=True)
    save_model(model, tmp_path / "again", shard_bytes)
    original = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    saved = {name: tensor for file in (tmp_path / "again").glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert original.keys() == saved.keys()
    for name, tensor in original.items():
        assert same_bits(tensor.long() if name.endswith("tid2eid") else tensor, saved[name]), name
    loaded = fathom.load_model(tmp_path / "again", torch.bfloat16, packed=True).state_dict()
    assert all(same_bits(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["expert_dtype"] == model.config.expert_dtype


def test_a_config_that_says_nothing_of_formats_loads_the_same(made, tmp_path):
    folder, _ = made
    shutil.copytree(folder, tmp_path / "older")
    config = json.loads((folder / "config.json").read_text())
    del config["expert_dtype"], config["quantization_config"]
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    one, other = (fathom.load_model(path).state_dict() for path in (folder, tmp_path / "older"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@torch.no_grad()
def test_a_base_models_own_mtp_embedding_and_head_are_used_and_kept(tmp_path):
    generator = torch.Generator().manual_seed(0)
    own = {name: torch.randn(CONFIG.vocab_size, CONFIG.hidden_size, generator=generator).bfloat16() * 0.1
           for name in ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")}
    write(tmp_path / "base", CONFIG, "official-fp8", own)
    model, tokens = fathom.load_model(tmp_path / "base"), random_tokens(CONFIG, 1, 20)
    assert torch.equal(model.mtp[0].embed.weight, own["mtp.0.emb.tok_emb.weight"].float())
    logits = model.mtp_logits(tokens)
    embed, head = model.mtp[0].embed, model.mtp[0].head
    model.mtp[0].embed, model.mtp[0].head = None, None
    assert (model.mtp_logits(tokens) - logits).abs().max() > 1e-2  # with the model's, as a block without its own
    model.mtp[0].embed, model.mtp[0].head = embed, head
    assert torch.equal(model.mtp_logits(tokens), logits)
    save_model(fathom.load_model(tmp_path / "base", torch.bfloat16, packed=True), tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert all(same_bits(saved[name], tensor) for name, tensor in own.items())


def test_bfloat16_holds_every_number_whose_scale_is_a_power_of_two(made, kind):
    folder, exact = made
    model = fathom.load_model(folder, torch.bfloat16)
    attention, gate = model.blocks[1].attention, model.blocks[2].moe.experts.gate
    for weight, name in ((attention.query_up.weight, "layers.1.attn.wq_b"), (attention.output_down.weight, "layers.1.attn.wo_a"),
                         (gate[5], "layers.2.ffn.experts.5.w1"), (model.mtp[0].embed_proj.weight, "mtp.0.e_proj")):
        expected = torch.from_numpy(exact[f"{name}.weight"])
        if kind == "official-fp4":
            assert torch.equal(weight.double(), expected)
        else:  # arbitrary scales: the float32 product, rounded once more
            assert torch.equal(weight, expected.float().bfloat16())


def test_a_packed_bfloat16_model_holds_the_files_bytes_and_no_more(made):
    folder, _ = made
    model = fathom.load_model(folder, torch.bfloat16, packed=True)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tables = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("tid2eid"))
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert tables and held == sum(tensor.nbytes for tensor in tensors.values()) + tables  # int32 there, int64 here


def test_codes_at_odd_addresses_are_read_exactly(tmp_path):
    """A scale of one byte moves the weight that follows it in the file."""
    config = small_config([0], num_hash_layers=1, **SIZES["short tiles"])
    exact = write(tmp_path / "model", config, "official-fp4")
    tensors = {name: tensor for file in (tmp_path / "model").glob("*.safetensors") for name, tensor in load_file(file).items()}
    shutil.copytree(tmp_path / "model", tmp_path / "odd", ignore=shutil.ignore_patterns("*.safetensors*"))
    pair = {name: tensors.pop(name) for name in ("layers.0.attn.wkv.scale", "layers.0.attn.wkv.weight")}
    save_file(pair, tmp_path / "odd" / "pair.safetensors")
    save_file(tensors, tmp_path / "odd" / "others.safetensors")
    with safe_open(tmp_path / "odd" / "pair.safetensors", "pt") as file:
        assert file.get_tensor("layers.0.attn.wkv.weight").data_ptr() % 2 == 1
    got = values_of(tmp_path / "plain", fathom.load_model(tmp_path / "odd"))
    assert all(np.array_equal(got[name].numpy(), expected.astype(np.float32)) for name, expected in exact.items())


OWN = ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")


@torch.no_grad()
def test_own_mtp_embedding_and_head_are_each_used_where_they_belong(tmp_path):
    write(tmp_path / "shared", CONFIG, "official-fp8")
    shared, tokens = fathom.load_model(tmp_path / "shared"), random_tokens(CONFIG, 1, 20)
    embedding, head = shared.embed.weight.bfloat16(), shared.head.weight.bfloat16()

    def logits(name, embedding, head, tokens=tokens):
        folder = tmp_path / name
        if not folder.exists():
            write(folder, CONFIG, "official-fp8", dict(zip(OWN, (embedding, head), strict=True)))
        model = fathom.load_model(folder)
        assert torch.equal(model(tokens).logits, shared(tokens).logits)  # the model itself never sees them
        return model.mtp_logits(tokens)

    usual = shared.mtp_logits(tokens)
    assert torch.equal(logits("copies", embedding.clone(), head.clone()), usual)
    assert torch.equal(logits("twice", embedding.clone(), head * 2), usual * 2)
    changed = tokens.clone()
    changed[0, -1] += 1 if tokens[0, -1] == 0 else -1
    assert (shared.mtp_logits(changed) - usual).abs().max() > 0.1  # the last prediction sees the last token's embedding
    alike = embedding[:1].expand_as(embedding).contiguous()
    one, other = (logits("alike", alike, head.clone(), each) for each in (changed, tokens))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_one_of_the_two_own_mtp_tensors_alone_is_named(tmp_path):
    table = torch.zeros(CONFIG.vocab_size, CONFIG.hidden_size, dtype=torch.bfloat16)
    for name, words in zip(OWN, ("missing mtp.0.head.weight", "unexpected mtp.0.head.weight"), strict=True):
        write(tmp_path / name, CONFIG, "official-fp8", {name: table})
        with pytest.raises(CheckpointError, match=words):
            fathom.load_model(tmp_path / name)


def test_experts_in_several_formats_load_but_do_not_stay_packed(tmp_path):
    write(tmp_path / "model", CONFIG, "official-fp4")
    name, codes = "layers.1.ffn.experts.2.w1", torch.full((128, 256), 3.0)
    rewrite(tmp_path / "model", f"{name}.weight", lambda _: codes.to(E4M3))
    rewrite(tmp_path / "model", f"{name}.scale", lambda _: torch.full((1, 2), 0.3))
    model = fathom.load_model(tmp_path / "model")
    assert torch.equal(model.blocks[1].moe.experts.gate[2], codes * torch.tensor(0.3))
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.\*\.w1\.weight is stored in several formats") as error:
        fathom.load_model(tmp_path / "model", packed=True)
    assert "\n" not in str(error.value)


# ---- damage

@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact") / "model"
    write(folder, CONFIG, "official-fp4")
    return folder


@pytest.fixture
def folder(tmp_path, intact):
    return shutil.copytree(intact, tmp_path / "model")


def rewrite(folder, name, change):
    """Replace one tensor in its file, or drop it with `change` None."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name]) if change else None
    if change is None:
        del tensors[name], index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, file)


def with_byte(tensor, byte):
    out = tensor.clone()
    out.view(torch.uint8)[0, 0] = byte
    return out


WEIGHT, SCALE, EXPERT = "layers.1.attn.wkv.weight", "layers.1.attn.wkv.scale", "layers.2.ffn.experts.3.w1.scale"


@pytest.mark.parametrize("name, change, words", [
    (SCALE, lambda t: torch.cat([t.view(torch.uint8)] * 2).view(E8M0), f"{SCALE} has shape [2, 2]"),
    (EXPERT, lambda t: t.view(torch.uint8)[:, :-1].contiguous().view(E8M0), f"{EXPERT} has shape [128, 7]"),
    (SCALE, None, f"missing {SCALE}"),
    (WEIGHT, None, f"missing {WEIGHT}"),
    (SCALE, lambda t: t.float().bfloat16(), f"{SCALE} has dtype BF16"),
    (SCALE, lambda t: with_byte(t, 255), f"{SCALE} holds a scale that is no finite number above 0"),
    (SCALE, lambda t: torch.full(t.shape, float("nan")), f"{SCALE} holds a scale"),
    (SCALE, lambda t: torch.full(t.shape, -1.0), f"{SCALE} holds a scale"),
    (EXPERT, lambda t: with_byte(t, 255), f"{EXPERT} holds a scale"),
    (SCALE, lambda t: torch.full(t.shape, float("inf")), f"{SCALE} holds a scale"),
    (SCALE, lambda t: torch.tensor([[1.0, 0.0]]), f"{SCALE} holds a scale"),
    (WEIGHT, lambda t: with_byte(t, 127), f"{WEIGHT} holds an FP8 code that is no number"),
    (WEIGHT, lambda t: with_byte(t, 255), f"{WEIGHT} holds an FP8 code that is no number"),
    (WEIGHT, lambda t: t.view(torch.uint8)[:-1].contiguous().view(E4M3), f"{WEIGHT} has shape [31, 256]"),
    ("layers.0.ffn.gate.tid2eid", lambda t: t + 6, "layers.0.ffn.gate.tid2eid names an expert that does not exist"),
    ("layers.0.ffn.gate.tid2eid", lambda t: t + (t == t.max()), "layers.0.ffn.gate.tid2eid names an expert that does not exist"),
    ("layers.0.ffn.gate.tid2eid", lambda t: t - 1, "layers.0.ffn.gate.tid2eid names an expert that does not exist"),
    ("layers.0.ffn.gate.tid2eid", lambda t: t.float(), "layers.0.ffn.gate.tid2eid has dtype F32"),
    ("embed.weight", lambda t: t * float("inf"), "embed.weight holds a value that is no finite number"),
    ("embed.weight", lambda t: t.int(), "embed.weight has dtype I32"),
])
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_tensor_is_named_in_one_line(folder, name, change, words, packed):
    rewrite(folder, name, change)
    with pytest.raises(CheckpointError) as error:
        fathom.load_model(folder, packed=packed)
    assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def index_of(folder):
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def lose_a_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def truncate(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def break_the_index(folder):
    index_of(folder)[0].write_text("{")


def point_outside(folder):
    path, index = index_of(folder)
    index["weight_map"]["embed.weight"] = "../model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def point_to_the_wrong_shard(folder):
    path, index = index_of(folder)
    index["weight_map"]["embed.weight"] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(index))


def repeat_a_shard(folder):
    index_of(folder)[0].unlink()
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-copy.safetensors")


def flip_a_bit_behind_a_checksum(folder):
    path, index = index_of(folder)
    index["metadata"]["sha256"] = {"model-00001-of-00003.safetensors": "0" * 64}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("metadata", [None, [], "x", {"sha256": None}, {"sha256": "x"}])
def test_metadata_that_is_no_object_is_one_line(folder, metadata):
    path, index = index_of(folder)
    path.write_text(json.dumps(index | {"metadata": metadata}))
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        fathom.load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff{}"])
def test_json_that_cannot_be_read_is_one_line(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(FathomError) as error:
        fathom.load_model(folder)
    assert file in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage, words", [
    (lose_a_shard, "model-00002-of-00003.safetensors, named in the index, is missing"),
    (truncate, "model-00002-of-00003.safetensors is damaged"),
    (break_the_index, "index.json is damaged"),
    (lambda folder: index_of(folder)[0].write_text("[]"), "index.json is damaged"),
    (lambda folder: index_of(folder)[0].write_bytes(b"\xff{"), "index.json is damaged"),
    (lambda folder: index_of(folder)[0].write_text('{"weight_map": [1]}'), "index.json is damaged"),
    (point_outside, "names '../model-00001-of-00003.safetensors', which is no file of this folder"),
    (point_to_the_wrong_shard, "says that embed.weight is in model-00003-of-00003.safetensors"),
    (repeat_a_shard, "is in both"),
    (flip_a_bit_behind_a_checksum, "model-00001-of-00003.safetensors is damaged or missing: its checksum"),
])
def test_a_damaged_folder_is_named_in_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        fathom.load_model(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_never_opened(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG.to_json())
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="damaged or no safetensors file" if "safe" in name else "holds no"):
        fathom.load_model(folder)
    assert not (tmp_path / "sprung").exists()


def test_another_models_folder_is_still_one_readable_line(folder):
    config = json.loads((folder / "config.json").read_text())
    config["n_routed_experts"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"and \d+ more$") as error:
        fathom.load_model(folder)
    assert len(str(error.value)) < 3000
