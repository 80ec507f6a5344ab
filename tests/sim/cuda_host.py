"""What the host takes of a round with the CUDA backend: real engine, actors and recorded programs on a device that computes nothing, whose
every launch takes `--device-us`, one after another. Drafts and choices are token 0; acceptance is drawn at 0.8, 0.7, 0.6.

python -m tests.sim.cuda_host [--device-us 1200]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import forerun
import numpy as np
from forerun.actors.model import Defaults, LoadedModel
from forerun.core.begun import Mark
from forerun.core.speculation import SpeculationOptions
from forerun.kernels.cuda.device import Copy, Step
from forerun.kernels.cuda.matrices import CudaBackend

from tests.checkpoints import make
from tests.conftest import load
from tests.kernels.cuda_on_cpu import HostDevice

NUM_TOKENS = 400
RATES = (0.8, 0.7, 0.6)


class IdleMark:
    def __init__(self, end: float) -> None:
        self._end = end

    def is_done(self) -> bool:
        return time.perf_counter() >= self._end

    def wait(self) -> None:
        if (left := self._end - time.perf_counter()) > 0:
            time.sleep(left)


class IdleDevice(HostDevice):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds, self._end = seconds, 0.0

    def compile(self, sizes: dict[str, int]) -> Any:
        return IdleKernels(self)

    def launch(self) -> None:
        self._end = max(self._end, time.perf_counter()) + self._seconds

    def mark(self) -> Mark:
        return IdleMark(self._end)


class IdleKernels:
    def __init__(self, device: IdleDevice) -> None:
        self._device, self.num_recorded = device, 0

    def run(self, steps: Sequence[Step]) -> None:
        pass

    def record(
        self, steps: Sequence[Step], inputs: Sequence[Copy] = (), outputs: Sequence[Copy] = (), *, overlap: bool = True
    ) -> Callable[[], None]:
        self.num_recorded += 1
        for array, bytes_ in outputs:
            if array.dtype == np.float32:  # how sure the head is
                bytes_.view(np.float32)[:] = RATES[0]
        return self._device.launch


def idle_model(folder: Path, seconds: float) -> LoadedModel:
    """The model of a folder, on a device every launch of which takes so long; the engine expects that of a row."""
    backend = CudaBackend(IdleDevice(seconds))
    weights = load(folder, backend)
    backend.operations_per_second = weights.num_parameters / seconds
    return LoadedModel("dense", weights, backend, None, Defaults.load(folder))


async def measure(model: LoadedModel, spec_type: str, choose: str, at_once: int, temperature: float) -> str:
    speculation = SpeculationOptions(choose=choose)
    if spec_type != "none":
        speculation["synth_rates"] = RATES
    async with forerun.open_engine(model, spec_type=spec_type, num_slots=at_once, prefix_bytes=0, **speculation) as engine:
        results = list[forerun.Result]()

        async def one(seed: int, num_tokens: int) -> None:
            results.append(await engine.complete([1, 2, seed], max_tokens=num_tokens, ignore_eos=True, temperature=temperature, seed=seed))

        for num_tokens in (60, NUM_TOKENS):  # once to record what it needs
            results.clear()
            begin = time.perf_counter()
            async with anyio.create_task_group() as group:
                for seed in range(at_once):
                    group.start_soon(one, seed, num_tokens)
            seconds = time.perf_counter() - begin
    num_rounds, total = sum(each.speculation.num_rounds for each in results), at_once * NUM_TOKENS
    each, rate = seconds / num_rounds * 1e6, total / seconds
    return f"{each:5.0f} us a round and sequence, {total / num_rounds:.2f} tokens a round, {rate:6.0f} a second"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-us", type=float, default=1200.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        model = idle_model(make("dense", Path(root) / "dense"), args.device_us / 1e6)
        for at_once in (1, 16):
            for spec_type, choose in (("none", "rate"), ("draft-mtp", "first"), ("draft-mtp", "rate")):
                for temperature in (0.0, 0.8):
                    found = anyio.run(measure, model, spec_type, choose, at_once, temperature)
                    print(f"{at_once:2} at once, {spec_type:9} {choose:5} T {temperature}: {found}", flush=True)


if __name__ == "__main__":
    main()
