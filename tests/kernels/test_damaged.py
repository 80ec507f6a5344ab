"""Model files with a few bytes changed anywhere: our error, or a model that computes. Nothing else, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forerun.tools.convert import convert

# Run in a process of its own, as C is what is tried: a crash is seen, and memory has a limit.
SCRIPT = """
import random, resource, sys
from pathlib import Path
import forerun
from forerun.kernels.model.memory import alone
from forerun.kernels.model.trunk import Rows

file, path, seed, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
good, rng, num_loaded = file.read_bytes(), random.Random(seed), 0
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
for _ in range(count):
    bad = bytearray(good)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(4000 if rng.random() < 0.7 else len(good))
        bad[place] = rng.choice([0, 1, 8, 32, 127, 128, 255, bad[place] ^ 1 << rng.randrange(8)])
    file.write_bytes(bad if rng.random() < 0.95 else bad[: rng.randrange(len(bad))])
    try:
        model = forerun.load_model(path)
    except forerun.ForerunError:
        continue
    memory = alone(model.memory(), 70, 3)
    target = model.target()
    target.prefill(Rows(memory, 0, tuple(range(64))), is_last=False)
    target.verify([Rows(memory, 64, (1, 2, 3))])
    target.verify([Rows(memory, 66, (1, 2))])
    num_loaded += 1
print(num_loaded)
"""


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_damaged_model_files(checkpoints: dict[str, Path], tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    count = 2000 if request.config.getoption("--full") else 150
    if kind == "gguf":
        file = tmp_path / "m.gguf"
        convert(checkpoints["dense"], file, "q8_0")
        path = file
    else:
        path = tmp_path / "model"
        path.mkdir()
        for each in checkpoints["dense"].iterdir():
            (path / each.name).write_bytes(each.read_bytes())
        file = path / "model.safetensors"
    command = [sys.executable, "-c", SCRIPT, str(file), str(path), "1", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600 if count > 150 else 110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < int(done.stdout) < count
