"""What the number formats cost and save: rounding errors, memory and speed of `nano`, and PTQ against QAT on the demo's model.

    python benchmarks/formats.py errors            seconds
    python benchmarks/formats.py speed             a minute: a fresh process for each format
    python benchmarks/formats.py qat               about 12 minutes: the demo's base model trained twice
    python benchmarks/formats.py draw              the picture of docs/formats.md from the results

Each prints a Markdown table and keeps its figures in benchmarks/results/formats.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from fathom.checkpoint.convert import convert
from fathom.checkpoint.released import load_model, save_model
from fathom.checkpoint.training import find_model
from fathom.config import ModelConfig
from fathom.data.store import TokenStore
from fathom.evals.perplexity import bits_per_byte, held_out_batches, token_byte_lengths
from fathom.model.transformer import Transformer
from fathom.quant.formats import dequantise, hadamard, quantise_fp4, quantise_fp8, round_fp4, round_fp8
from fathom.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "formats.json"
PICTURE = ROOT / "docs" / "images" / "formats.png"
PROMPT, STEPS, REPEATS = 512, 24, 3
CASES = {  # name: layout on disk, dtype, packed
    "float32": ("fp32", torch.float32, False), "bfloat16": ("bf16", torch.bfloat16, False),
    "FP8, packed": ("official-fp8", torch.bfloat16, True), "FP4 + FP8, packed": ("official-fp4", torch.bfloat16, True)}


def errors() -> list[dict]:
    """Relative error (root of summed squares) of each format on normal numbers, and what the FP4 indexer selects."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 2048, generator=generator)
    outliers = x * (1 + 20 * (torch.rand(2048, generator=generator) < 0.01))  # 1% of the channels 21 times as large
    rows = []
    for name, bits, function in (
            ("bfloat16", 16, lambda y: y.bfloat16().float()),
            ("FP8 weights, 128 x 128", 8 + 8 / 128**2, lambda y: dequantise(quantise_fp8(y))),
            ("FP8 activations, 1 x 128", 8 + 8 / 128, lambda y: round_fp8(y, 128)),
            ("FP8 entries, 1 x 64", 8 + 8 / 64, lambda y: round_fp8(y, 64)),
            ("MXFP4, 1 x 32", 4 + 8 / 32, lambda y: dequantise(quantise_fp4(y))),
            ("MXFP4 after Hadamard (128)", 4 + 8 / 32, lambda y: _turned(y))):
        rows.append({"format": name, "bits a number": round(bits, 4), "normal": _error(function(x), x),
                     "with outlier channels": _error(function(outliers), outliers)})
    print_table(rows, {"bits a number": "{:.4g}", "normal": "{:.3%}", "with outlier channels": "{:.3%}"})
    recall = _recall(generator)
    print(f"\nindexer, top 512 of 8,192 entries of random vectors: FP4 keeps {recall['FP4']:.1%} of float32's choice, without the "
          f"Hadamard rotation {recall['FP4 without Hadamard']:.1%} (one channel in 64 made 10 times as large)")
    return rows + [recall]


def _turned(y: torch.Tensor) -> torch.Tensor:
    blocks = y.unflatten(-1, (-1, 128))
    return hadamard(round_fp4(hadamard(blocks))).flatten(-2)


def _error(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    return float((rounded - exact).norm() / exact.norm())


def _recall(generator: torch.Generator) -> dict[str, float]:
    """Share of the float32 top 512 that the FP4 scores select too: 64 queries of 64 heads, 128 channels."""
    large = 1 + 9 * (torch.arange(128) % 64 == 0)
    q = torch.randn(64, 64, 128, generator=generator) * large
    k = torch.randn(8192, 128, generator=generator) * large
    w = torch.randn(64, 64, generator=generator)

    def chosen(rounded) -> torch.Tensor:
        score = torch.einsum("qhm,qh->qm", torch.einsum("qhd,md->qhm", rounded(q), rounded(k)).relu(), w)
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(512).indices, True)

    exact = chosen(lambda x: x)
    return {"FP4": float((chosen(lambda x: round_fp4(hadamard(x))) & exact).sum() / exact.sum()),
            "FP4 without Hadamard": float((chosen(round_fp4) & exact).sum() / exact.sum())}


def speed() -> list[dict]:
    """Memory and tokens/s of `nano` with random weights in each format, a fresh process for each."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        save_model(Transformer(ModelConfig.preset("nano")).initialise(0), source)
        rows = []
        for name, (layout, _, _) in CASES.items():
            target = convert(source, Path(folder) / layout, layout, Console(quiet=True))
            output = subprocess.run([sys.executable, __file__, "case", name, target], capture_output=True, text=True, check=True)
            rows.append({"weights": name} | json.loads(output.stdout))
    for row in rows:
        row["decode against float32"] = row["decode"] / rows[0]["decode"]
        row["prefill against float32"] = row["prefill"] / rows[0]["prefill"]
    print_table(rows, {"weights MB": "{:.1f}", "cache KB": "{:.0f}", "peak MB": "{:.0f}", "prefill": "{:.0f}", "decode": "{:.1f}",
                       "prefill against float32": "{:.2f}x", "decode against float32": "{:.2f}x"})
    return rows


@torch.no_grad()
def case(name: str, folder: str) -> None:
    """One format, in its own process: prints JSON."""
    _, dtype, packed = CASES[name]
    before = _memory("VmRSS")
    model = load_model(folder, dtype, packed=packed, simulate_quantization=packed)
    tokens = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill, decode = [], []
    for _ in range(REPEATS + 1):
        cache = model.new_cache(1, PROMPT + STEPS, quantized=packed)
        began = time.perf_counter()
        model(tokens, cache=cache, last_only=True)
        prefill.append(PROMPT / (time.perf_counter() - began))
        began = time.perf_counter()
        for step in range(STEPS):
            model(tokens[:, step:step + 1], cache=cache)
        decode.append(STEPS / (time.perf_counter() - began))
    print(json.dumps({
        "weights MB": sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6, "cache KB": cache.nbytes / 1e3,
        "peak MB": _memory("VmHWM") - before,
        "prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[1:])}))


def _memory(kind: str) -> float:
    """MB that the process holds (VmRSS) or held at most (VmHWM), as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(kind))


def qat(steps: int = 200, share: float = 0.25) -> list[dict]:
    """The demo's recipe twice, once with its last quarter quantisation-aware; bits per byte of both, plain and as official-fp4."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("trained in float32", []),
                              (f"quantisation-aware in its last {share:.0%}", [f"schedule.quantise_from={int(steps * (1 - share))}"])):
            run = Path(folder) / ("qat" if options else "plain")
            settings = [f"run={run}", f"schedule.steps={steps}", f"schedule.decay_steps={steps // 2}", "schedule.warmup_steps=15",
                        "loop.validate_every=1000", *options]
            recipe = ROOT / "recipes" / "tiny.toml"
            without_minutes = Path(folder) / "recipe.toml"
            without_minutes.write_text(_without_minutes(recipe))
            subprocess.run([sys.executable, "-m", "fathom.cli", "train", without_minutes,
                            *(word for setting in settings for word in ("--set", setting))], check=True)
            plain = load_model(find_model(run))
            rows.append({"model": name, "float32": _held_out(run, plain)} | {
                layout: _held_out(run, load_model(convert(run, Path(folder) / f"{run.name}-{layout}", layout, Console(quiet=True)),
                                                  simulate_quantization=True))
                for layout in ("official-fp8", "official-fp4")})
    print_table(rows, dict.fromkeys(("float32", "official-fp8", "official-fp4"), "{:.4f}"))
    return rows


def _without_minutes(recipe: Path) -> str:
    """The recipe's text with absolute sources and its own steps."""
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("minutes")]
    return "\n".join(lines).replace('"data/', f'"{recipe.parent}/data/')


def _held_out(run: Path, model: Transformer) -> float:
    tokenizer = Tokenizer.load(run / "tokenizer")
    batches = held_out_batches(TokenStore.open(run / "data" / "held_out"), 256, tokenizer.pad_id)
    return bits_per_byte(model, batches, token_byte_lengths(tokenizer, model.config.vocab_size))


def print_table(rows: list[dict], formats: dict[str, str]) -> None:
    """Rows as a Markdown table."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join(formats.get(name, "{}").format(row[name]) for name in names) + " |")


def draw() -> None:
    """Memory and speed of each format, and what rounding costs with and without quantisation-aware training."""
    from matplotlib import pyplot

    results = json.loads(RESULTS.read_text())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    rows = results["speed"]["rows"]
    colours = ["#9ab6d3", "#5b8fc4", "#1f5a94", "#c2571a"]
    left.bar([row["weights"].replace(", ", ",\n") for row in rows], [row["weights MB"] for row in rows], color=colours)
    for at, row in enumerate(rows):
        left.annotate(f"{row['weights MB']:.0f} MB\n{row['decode']:.0f} tokens/s", (at, row["weights MB"]), ha="center", va="bottom")
    left.set(title="nano: weights in memory, decoding speed", ylabel="MB", ylim=(0, 1.2 * rows[0]["weights MB"]))
    kinds = ["float32", "official-fp8", "official-fp4"]
    for at, row in enumerate(results["qat"]["rows"]):
        values = [row[kind] for kind in kinds]
        right.plot(["trained\nweights", *kinds[1:]], values, marker="o", color=colours[2 + at], label=row["model"])
        for place, value in enumerate(values):
            right.annotate(f"{value:.4f}", (place, value), xytext=(0, 7 if at == 0 else -14), textcoords="offset points", ha="center")
    right.set(title="demo model: held-out bits per byte, as stored")
    right.margins(x=0.15, y=0.3)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)


def main() -> None:
    """Run the part that is named and keep its figures."""
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part == "case":
        return case(*sys.argv[2:])
    if part == "draw":
        return draw()
    if part not in ("errors", "speed", "qat"):
        sys.exit(__doc__)
    rows = {"errors": errors, "speed": speed, "qat": qat}[part]()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[part] = {"rows": rows, "torch": torch.__version__, "threads": torch.get_num_threads(),
                   "processor": _processor(), "date": time.strftime("%Y-%m-%d")}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
