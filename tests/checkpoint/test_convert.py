"""Conversion between layouts: exact where the formats allow, whole or nothing, resumable after kill -9, a full disk and Ctrl-C."""

import hashlib
import json
import resource
import signal
import subprocess
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import fathom
from fathom.checkpoint import convert as conversion
from fathom.checkpoint.convert import convert
from fathom.checkpoint.released import save_model
from fathom.checkpoint.weights import Weights
from fathom.errors import CheckpointError, InputError
from fathom.quant.formats import Packed, dequantise
from tests.models import random_model, random_tokens, small_config
from tests.runs import command, environment
from tests.runs import fathom as run_fathom

CONFIG = small_config([0, 4, 128], hidden_size=256, moe_intermediate_size=160, num_hash_layers=1)
SHARD = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    save_model(random_model(CONFIG), folder, shard_bytes=SHARD)
    return folder


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())
            if not file.name.startswith(".")}


def run(source, target, layout, **options):
    return convert(source, target, layout, Console(quiet=True), **options)


def test_fp4_to_fp8_and_bf16_changes_no_value(source, tmp_path):
    first = fathom.load_model(run(source, tmp_path / "fp4", "official-fp4")).state_dict()
    for layout in ("official-fp8", "bf16", "fp32"):
        again = fathom.load_model(run(tmp_path / "fp4", tmp_path / layout, layout)).state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_the_same_layout_again_copies_every_byte(source, tmp_path):
    for layout in ("official-fp4", "official-fp8", "fp32"):
        one = run(source, tmp_path / layout, layout, shard_bytes=SHARD)
        two = run(one, tmp_path / f"{layout}-again", layout, shard_bytes=SHARD)
        assert digests(one) == digests(two)


def test_an_export_holds_the_released_file_set_and_config(source, tmp_path):
    folder = run(source, tmp_path / "fp4", "official-fp4", shard_bytes=SHARD)
    config = json.loads((folder / "config.json").read_text())
    assert config["expert_dtype"] == "fp4" and config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                             "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 1.0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {name: tensor for file in set(index["weight_map"].values())
              for name, tensor in load_file(folder / file).items()}
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    expert = "layers.1.ffn.experts.3.w2"
    assert stored[f"{expert}.weight"].dtype == torch.int8 and stored[f"{expert}.weight"].shape == (256, 80)
    assert stored[f"{expert}.scale"].dtype == torch.float8_e8m0fnu and stored[f"{expert}.scale"].shape == (256, 5)
    assert stored["layers.1.attn.wq_b.weight"].dtype == torch.float8_e4m3fn
    assert stored["layers.1.ffn.gate.weight"].dtype == stored["embed.weight"].dtype == torch.bfloat16
    assert stored["layers.1.hc_attn_fn"].dtype == torch.float32
    assert stored["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    base = Weights(run(folder, tmp_path / "fp8", "official-fp8"))
    assert {base.stored[name.removesuffix("weight") + "scale"].dtype for name in base.quantised} == {torch.float32}
    plain = json.loads((run(folder, tmp_path / "bf16", "bf16") / "config.json").read_text())
    assert "quantization_config" not in plain and "expert_dtype" not in plain


def test_tokenizer_files_come_along(source, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", source, copy], check=True)
    (copy / "tokenizer.json").write_text("{}")
    assert (run(copy, tmp_path / "bf16", "bf16") / "tokenizer.json").read_text() == "{}"


def test_fp4_that_fp8_cannot_hold_is_named_and_never_rounded(source, tmp_path):
    folder = run(source, tmp_path / "fp4", "official-fp4")
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["layers.2.ffn.experts.5.w1.scale"].view(torch.uint8)[3, 1] -= 40
    save_file(tensors, file)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.experts\.5\.w1\.weight: 1 of 4 tiles .* at \[0, 0\]"):
        run(folder, tmp_path / "fp8", "official-fp8")
    assert not (tmp_path / "fp8").exists()
    assert run(folder, tmp_path / "bf16", "bf16").exists()


def test_arbitrary_float32_scales_are_read_exactly_and_requantised(source, tmp_path):
    folder = run(source, tmp_path / "fp8", "official-fp8")
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors["layers.0.attn.wq_a.scale"] *= 1.37
    save_file(tensors, file)
    (folder / "model.safetensors.index.json").unlink()
    exact = tensors["layers.0.attn.wq_a.weight"].float() * tensors["layers.0.attn.wq_a.scale"].repeat_interleave(128, 1)
    assert torch.equal(fathom.load_model(folder).blocks[0].attention.query_down.weight, exact)
    again = Weights(run(folder, tmp_path / "fp4", "official-fp4")).read("layers.0.attn.wq_a.weight")
    assert isinstance(again, Packed) and (dequantise(again) - exact).abs().max() <= exact.abs().max() * 2**-4


def test_a_conversion_that_was_killed_goes_on_where_it_was(source, tmp_path, monkeypatch):
    expected = digests(run(source, tmp_path / "whole", "official-fp4", shard_bytes=SHARD))
    written = []
    original = conversion.write_shard

    def watch(folder, file, *others):
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt
        original(folder, file, *others)

    monkeypatch.setattr(conversion, "write_shard", watch)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "model", "official-fp4", shard_bytes=SHARD)
    assert not (tmp_path / "model").exists()
    partial = tmp_path / ".model.converting"
    damaged = sorted(partial.glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")  # as a crash might leave it
    (partial / ".tmp-of-a-killed-writer").write_bytes(b"half a shard")
    monkeypatch.setattr(conversion, "write_shard", lambda folder, file, *others: (
        written.append(file), original(folder, file, *others)))
    run(source, tmp_path / "model", "official-fp4", shard_bytes=SHARD)
    first, second, third = written[:3]
    assert written[3:5] == [first, third] and second not in written[3:]
    assert digests(tmp_path / "model") == expected and not partial.exists()
    assert not list((tmp_path / "model").glob(".*"))


def test_another_layout_does_not_go_on_from_a_stopped_one(source, tmp_path, monkeypatch):
    def stop(folder, file, *others):
        raise KeyboardInterrupt

    run(source, tmp_path / "whole", "bf16", shard_bytes=SHARD)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "model", "official-fp4", shard_bytes=SHARD)
    assert digests(run(source, tmp_path / "model", "bf16", shard_bytes=SHARD)) == digests(tmp_path / "whole")


def test_kill_9_at_any_moment_leaves_nothing_half_written_and_the_next_try_finishes(source, tmp_path):
    expected, before = digests(run(source, tmp_path / "whole", "official-fp4")), digests(source)
    began = time.monotonic()
    run_fathom("convert", source, tmp_path / "timing", "--to", "official-fp4")
    whole = time.monotonic() - began
    for share in (0.5, 0.7, 0.8, 0.9, 0.97):
        process = subprocess.Popen(command("convert", source, tmp_path / "model", "--to", "official-fp4"),
                                   env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * share)
        process.kill()
        process.wait()
        if (tmp_path / "model").exists():
            break
    else:
        result = run_fathom("convert", source, tmp_path / "model", "--to", "official-fp4")
        assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "model") == expected and digests(source) == before


def test_a_full_disk_is_one_line_and_the_source_is_untouched(source, tmp_path):
    before = digests(source)
    result = run_fathom("convert", source, tmp_path / "model", "--to", "fp32", preexec_fn=_small_files)
    assert result.returncode == 2, result.stderr
    assert f"cannot write {tmp_path / 'model'}" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists() and digests(source) == before
    assert not list((tmp_path / ".model.converting").glob("*.safetensors"))
    assert run_fathom("convert", source, tmp_path / "model", "--to", "fp32").returncode == 0
    assert torch.equal(fathom.load_model(tmp_path / "model").head.weight, fathom.load_model(source).head.weight)


def test_what_cannot_be_converted_is_one_line(source, tmp_path):
    with pytest.raises(InputError, match="unknown layout 'fp16'"):
        run(source, tmp_path / "x", "fp16")
    with pytest.raises(CheckpointError, match="exists already"):
        run(source, source, "bf16")
    odd = tmp_path / "odd"
    save_model(random_model(small_config([0], moe_intermediate_size=33)), odd)
    with pytest.raises(CheckpointError, match="33 inputs; FP4 is stored in pairs"):
        run(odd, tmp_path / "y", "official-fp4")
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", run(source, tmp_path / "good", "bf16", shard_bytes=SHARD), damaged], check=True)
    file = sorted(damaged.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged or missing: its checksum"):
        run(damaged, tmp_path / "z", "fp32")
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged or missing: its checksum"):
        fathom.load_model(damaged)


@torch.no_grad()
def test_logits_after_conversion_are_the_models_on_rounded_weights(source, tmp_path):
    tokens, model = random_tokens(CONFIG, 1, 150), fathom.load_model(source)
    logits = {layout: fathom.load_model(run(source, tmp_path / layout, layout))(tokens).logits
              for layout in ("fp32", "bf16", "official-fp8", "official-fp4")}
    exact = model(tokens).logits
    errors = [float((each - exact).abs().mean()) for each in logits.values()]
    assert errors[0] == 0 and errors == sorted(errors) and errors[3] < exact.std()


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3_000_000}))
    with pytest.raises(CheckpointError, match=r"has 3\.0 MB left and the conversion needs [\d.]+ MB"):
        run(source, tmp_path / "model", "fp32")
    assert not list(tmp_path.iterdir())


def _small_files() -> None:
    """Writes beyond 500 kB of one file fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
