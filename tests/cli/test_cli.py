"""The command line as a user meets it: help, happy paths, and one line with exit code 2 for what cannot work."""

import resource
import signal
import subprocess
import sys
import tomllib

import pytest

from fathom.checkpoint.training import find_model
from tests.runs import fathom, losses, micro_recipe

VERBS = ["train", "sft", "grpo", "distill", "average", "score", "pipeline", "generate", "chat", "eval", "info", "convert", "inspect", "serve",
         "explain", "report"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained micro model."""
    folder = tmp_path_factory.mktemp("cli")
    result = fathom("train", micro_recipe(folder))
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb):
    result = fathom(verb, "--help")
    assert result.returncode == 0 and f"fathom {verb} " in result.stdout and "Example:" in result.stdout


def test_help_names_every_verb_and_imports_no_torch():
    result = fathom("--help")
    assert result.returncode == 0 and all(f"  {verb} " in result.stdout for verb in VERBS)
    probe = "import sys, fathom.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


def test_training_reports_progress_and_stores_the_resolved_recipe(run):
    recipe = tomllib.loads((run / "recipe.toml").read_text())
    assert recipe["muon"]["momentum"] == 0.95 and recipe["schedule"]["steps"] == 20 and recipe["seed"] == 0


def test_minutes_become_steps_measured_on_this_machine(tmp_path):
    result = fathom("train", micro_recipe(tmp_path), "--set", "minutes=0.02", "--set", "loop.validate_every=1000")
    assert result.returncode == 0, result.stderr
    steps = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["schedule"]["steps"]
    assert f"{steps} steps in 0.02 minutes" in result.stdout and len(losses(tmp_path / "run")) == steps
    again = fathom("train", tmp_path / "recipe.toml", "--set", "minutes=0.02", "--set", "loop.validate_every=1000",
                   "--resume")
    assert again.returncode == 0, again.stderr


def test_generate_is_repeatable_with_a_seed_and_starts_with_the_prompt(run):
    first, again, other = (fathom("generate", run, "--prompt", "the sea", "--max-tokens", "20", "--seed", seed)
                           for seed in "112")
    assert first.returncode == 0 and first.stdout.startswith("the sea")
    assert first.stdout == again.stdout != other.stdout


def test_generate_writes_nothing_before_the_model_is_there(tmp_path):
    result = fathom("generate", tmp_path / "none", "--prompt", "the sea")
    assert result.returncode == 2 and result.stdout == ""


def test_a_run_folder_and_its_checkpoint_are_the_same_model(run):
    outputs = {fathom("generate", path, "--prompt", "a", "--seed", "1", "--max-tokens", "8").stdout
               for path in (run, find_model(run))}
    assert len(outputs) == 1


def test_sft_then_chat(run, tmp_path):
    recipe = tmp_path / "sft.toml"
    recipe.write_text(f'run = "{tmp_path / "chat"}"\nbase = "{run}"\nquestions = 40\n[schedule]\nsteps = 4\n'
                      "batch_tokens = 512\nlengths = [256]\nwarmup_steps = 1\npeak_rate = 0.001\nfinal_rate = 0.001\n")
    result = fathom("sft", recipe)
    assert result.returncode == 0, result.stderr
    answer = fathom("chat", tmp_path / "chat", "--think", "off", "--message", "What is 3 + 4?", "--max-tokens", "8",
                    "--seed", "0")
    assert answer.returncode == 0, answer.stderr
    talk = fathom("chat", tmp_path / "chat", "--max-tokens", "6", stdin="/think deep\n/think off\nhello\n/new\n/what\n/quit\n")
    assert talk.returncode == 0 and "allowed: off, high, max" in talk.stdout and "/quit leaves" in talk.stdout
    scores = fathom("eval", tmp_path / "chat", "--questions", "8")
    assert scores.returncode == 0 and "in format" in scores.stdout


@pytest.fixture(scope="module")
def exported(run):
    """The micro model in the chat models' formats."""
    result = fathom("convert", run, run.parent / "fp4", "--to", "official-fp4")
    assert result.returncode == 0, result.stderr
    return run.parent / "fp4"


@pytest.mark.parametrize("options", [[], ["--packed"], ["--dtype", "bfloat16"], ["--dtype", "bfloat16", "--packed"]])
def test_a_converted_model_generates_dequantised_and_packed(exported, options):
    texts = {fathom("generate", exported, "--prompt", "the sea", "--max-tokens", "12", "--seed", "1", *options).stdout
             for _ in range(2)}
    assert len(texts) == 1 and texts.pop().startswith("the sea")


def test_inspect_shows_formats_bytes_and_errors(run, exported, tmp_path):
    result = fathom("inspect", exported, "--reference", run, "--listing", tmp_path / "listing.json")
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("FP4 pairs", "E8M0 scales", "routed experts", "%", "error"))
    assert (tmp_path / "listing.json").stat().st_size > 1000
    preset = fathom("inspect", "flash")
    assert preset.returncode == 0 and "69,187" in preset.stdout and "159,609,485,896" in preset.stdout


def test_eval_puts_the_model_beside_compressors(run):
    result = fathom("eval", run, "--length", "64")
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in ("this model", "gzip -9", "xz -9", "byte 5-gram"))


def test_info_describes_presets_folders_and_runs(run):
    flash = fathom("info", "flash").stdout
    for figure in ("284.33B", "13.27B", "(CSA/4, HCA/128) x20", "1,048,576"):
        assert figure in flash
    assert "CSA/4, window" in fathom("info", run).stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["train", "{tmp}/none.toml"], "none.toml"),
    (["train", "{recipe}", "--set", "schedule.stepz=3"], "did you mean"),
    (["train", "{recipe}", "--set", "schedule.steps=many"], "steps"),
    (["train", "{recipe}", "--set", "run={tmp}/x", "--set", 'data.sources=["gone"]'], "gone"),
    (["train", "{recipe}", "--set", "run={tmp}/x", "--set", 'data.sources=["{tmp}/binary.txt"]'], "binary.txt"),
    (["train", "{recipe}", "--set", "run={tmp}/x", "--set", "model=small"], "small"),
    (["generate", "{tmp}/none", "--prompt", "x"], "neither a model folder"),
    (["generate", "{run}", "--prompt", ""], "prompt is empty"),
    (["generate", "{run}", "--prompt", "{long}"], "max_position_embeddings"),
    (["generate", "{run}", "--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
    (["generate", "{run}"], "prompt"),
    (["chat", "{run}", "--think", "deep"], "allowed: off, high, max"),
    (["eval", "{tmp}"], "no data/held_out"),
    (["info", "gigantic"], "presets: tiny, nano, flash, pro"),
    (["convert", "{run}", "{tmp}/x", "--to", "int4"], "allowed: official-fp4, official-fp8, bf16, fp32"),
    (["convert", "{tmp}/none", "{tmp}/x", "--to", "bf16"], "neither a model folder"),
    (["convert", "{run}", "{run}", "--to", "bf16"], "exists already"),
    (["inspect", "{tmp}/none"], "neither a model folder"),
    (["inspect", "flash", "--layout", "fp2"], "unknown layout 'fp2'"),
    (["generate", "{run}", "--prompt", "x", "--dtype", "float8"], "allowed: float32, bfloat16"),
    (["generate", "{run}", "--prompt", "x", "--device", "abacus"], "device is 'abacus'; here are: cpu"),
    (["chat", "{run}", "--message", "x", "--device", "cuda:9"], "device is 'cuda:9'; here are: cpu"),
    (["serve", "{run}", "--port", "0", "--device", "abacus"], "device is 'abacus'; here are: cpu"),
    (["fly"], "fly"),
])
def test_bad_input_is_one_line_that_names_the_thing_and_exit_code_2(run, tmp_path, arguments, words):
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff\xfe" * 100)
    names = {"tmp": tmp_path, "recipe": run.parent / "recipe.toml", "run": run, "long": "the sea was calm " * 2000}
    result = fathom(*(argument.format(**names)
                      for argument in arguments))
    assert result.returncode == 2, result.stdout + result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    if arguments not in (["fly"], ["generate", "{run}"]):  # those get the usage before the line
        assert result.stderr.startswith("fathom: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_full_disk_while_saving_is_one_line_and_leaves_no_half_checkpoint(tmp_path):
    recipe = micro_recipe(tmp_path)
    result = fathom("train", recipe, preexec_fn=_small_files)
    assert result.returncode == 2, result.stderr
    assert "cannot write" in result.stderr and "step-000005" in result.stderr and result.stderr.count("\n") == 1
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert fathom("train", recipe).returncode == 0  # with space again, the run starts afresh


def _small_files() -> None:
    """Writes beyond 500 kB of one file fail, as on a full disk: the corpus fits, the weights do not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
