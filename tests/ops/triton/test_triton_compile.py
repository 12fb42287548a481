"""Kernels compile for a GPU that is not here: what the interpreter accepts and a compiler does not shows here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
PROGRAM = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import compile_kernels
with compile_kernels.compiling(90) as rows:
    compile_kernels.call_attention(torch.bfloat16, 32, 64, 16, 64, 16)
print(json.dumps(rows))
"""


def test_attention_compiles_to_tensor_core_products(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(BENCHMARKS)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["kernel"] for row in rows} == {"_attend", "_join", "_query_gradient", "_key_gradient", "_pair_gradients", "_sum_pairs", "_visible_mass",
                                               "_selected_mass"}
    assert all(row["tensor_core_products"] for row in rows if row["kernel"] not in ("_join", "_sum_pairs"))
    assert all(row["registers"] <= 255 and row["shared"] <= 227 * 1024 and not row["stack"] for row in rows)
