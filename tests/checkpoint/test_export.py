"""Exported folders open in Hugging Face transformers unchanged, model and tokenizer, and compute the same logits."""

import pytest
import torch
import transformers
from rich.console import Console

import fathom
from fathom.checkpoint.convert import convert
from fathom.checkpoint.layouts import LAYOUTS
from fathom.checkpoint.released import save_model
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, random_tokens, small_config

CONFIG = small_config([0, 4, 128], hidden_size=256, moe_intermediate_size=128, vocab_size=320)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder for each layout."""
    root = tmp_path_factory.mktemp("exported")
    save_model(random_model(CONFIG), root / "source")
    Tokenizer.train(["the sea was calm and the sky was wide"] * 9, 320).save(root / "source")
    return {layout: convert(root / "source", root / layout, layout, Console(quiet=True), 1 << 20) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_equal_transformers_on_the_same_folder(exported, layout):
    """FP8 and FP4 are dequantised: what transformers does on a CPU, here to float32 instead of its bfloat16."""
    options = {}
    if layout.startswith("official"):
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported[layout], dtype=torch.float32, **options)
    theirs = theirs.float().eval()  # it leaves some dequantised weights in bfloat16, which holds them exactly
    tokens = random_tokens(CONFIG, 2, 150)
    expected = theirs(tokens, use_cache=False).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(fathom.load_model(exported[layout])(tokens).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_any_option_transformers_computes_the_same_in_bfloat16(exported):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported["official-fp4"]).eval()
    tokens = random_tokens(CONFIG, 1, 100)
    logits, expected = theirs(tokens, use_cache=False).logits.float(), fathom.load_model(exported["official-fp4"])(tokens).logits
    assert theirs.dtype == torch.bfloat16 and (logits - expected).abs().median() < 0.1 * expected.std()


def test_the_tokenizer_opens_in_transformers(exported):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported["bf16"]), Tokenizer.load(exported["bf16"])
    text = "the sea <think> was"
    assert theirs(text)["input_ids"] == ours.encode(text, special=True)
    assert theirs.pad_token == theirs.eos_token == "<｜end▁of▁sentence｜>" and theirs.bos_token_id == ours.bos_id
