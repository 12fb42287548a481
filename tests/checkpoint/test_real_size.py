"""One real-size Flash layer in the released formats loads and runs within 8 GB; loading takes the model and one tensor."""

import json
import subprocess
import sys

import pytest

from tests.checkpoint import real_layer


@pytest.mark.slow
def test_a_real_flash_layer_runs_within_8_gb_at_its_packed_size(tmp_path):
    size = real_layer.write(tmp_path / "layer")
    assert size > 3.5e9
    result = subprocess.run([sys.executable, "-m", "tests.checkpoint.real_layer", tmp_path / "layer"], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["finite"] and measured["logit_std"] > 0.1
    assert measured["held_bytes"] == size  # as stored, nothing dequantised for keeps
    assert measured["load_peak_bytes"] < size + 2e8  # the model, one tensor and what checking it takes
    assert measured["peak_bytes"] < 8e9
    for file in (tmp_path / "layer").iterdir():  # gigabytes: not left for pytest to keep
        file.unlink()
