"""The CUDA sources compile for every architecture of the family, without one register spilled; no device, and no CuPy, is needed."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.metadata import files
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forerun.kernels.cuda.device import HOPPER_ARCHITECTURE, OF_HOPPER, OPTIONS, SOURCES, definitions, module_of_hopper, sizes_of, text_of
from forerun.kernels.cuda.matrices import NAMES
from forerun.kernels.model.config import ModelConfig
from forerun.kernels.model.sizes import PUBLISHED

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
ALL = [*product(ARCHITECTURES, SOURCES), *product((HOPPER_ARCHITECTURE,), OF_HOPPER)]


def located(package: str, name: str) -> str:
    return next(str(file.locate()) for file in files(package) or [] if re.fullmatch(name, file.name))


@cache
def nvrtc() -> Any:
    return ctypes.CDLL(located("nvidia-cuda-nvrtc", r"libnvrtc\.so\.\d+"))


def compile_for(architecture: str, source: str, config: ModelConfig = PUBLISHED["27B"]) -> tuple[int, str, bytes]:
    """The result of the compiler, what it says, and what it has made."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    text = text_of(f"{source}.cu")
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), source.encode(), 0, None, None)
    sizes = definitions(text, sizes_of(config))
    options = [option.encode() for option in (f"-arch={architecture}", "--ptxas-options=-v", *OPTIONS, *sizes)]
    code = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    made = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, made)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode(), made.raw


@cache
def compiled() -> dict[tuple[str, str], Future[tuple[int, str, bytes]]]:
    """All of them, two at once; NVRTC keeps the threads of one process waiting for each other."""
    pool = ProcessPoolExecutor(2)
    return {each: pool.submit(compile_for, *each) for each in ALL}


def check(code: int, log: str, _: bytes) -> None:
    assert code == 0, log
    spills = re.findall(r"(\d+) bytes spill stores", log)
    assert spills, log
    assert set(spills) == {"0"}, log
    assert "serialized" not in log  # matrix instructions of four warps, one after another


@pytest.mark.parametrize(("architecture", "source"), ALL)
def test_a_source_compiles_and_nothing_is_spilled(architecture: str, source: str) -> None:
    check(*compiled()[architecture, source].result())


@pytest.mark.parametrize(("architecture", "source"), [("sm_90", "delta"), (HOPPER_ARCHITECTURE, "hopper_attention")])
def test_what_is_otherwise_for_other_sizes_compiles(architecture: str, source: str) -> None:
    """Few value heads; heads of 128 dimensions."""
    check(*compile_for(architecture, source, replace(PUBLISHED["0.8B"], head_dim=128)))


def test_three_blocks_of_a_product_of_few_rows_have_room() -> None:
    """On a multiprocessor of an H100: 65,536 registers, blocks of 256 threads. With two, a product of Q8_0 took 1.65 times as long."""
    _, log, _ = compiled()["sm_90", "products"].result()
    used = dict(re.findall(r"function '(product_\w+_1)'.*?Used (\d+) registers", log, re.DOTALL))
    assert set(used) == {f"product_{name}_1" for name in NAMES.values()}
    assert max(map(int, used.values())) <= 65_536 // 256 // 3 // 8 * 8, used


#: Instructions whose first register is none that they write.
WRITE_NOTHING = ("ST", "RED", "BAR", "SYNCS", "UBLKCP", "WARPGROUP", "ISETP", "FSETP", "PLOP3")


@pytest.mark.parametrize("source", OF_HOPPER)
def test_nobody_writes_to_registers_that_products_still_read(source: str, tmp_path: Path) -> None:
    """Products of four warps read their operands after the instruction, and the compiler does not know it: it may give the registers to
    what is computed before the products are waited for. It did so once; the numbers were wrong on the device alone."""
    (tmp_path / "made").write_bytes(compiled()[HOPPER_ARCHITECTURE, source].result()[2])
    text = subprocess.run(
        [located("nvidia-cuda-nvdisasm", "nvdisasm"), "-c", tmp_path / "made"], capture_output=True, text=True, check=True
    ).stdout
    num_read, read = 0, set[int]()
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z].*?) *;", text):
        if found := re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", instruction):
            read |= set(range(int(found[1]), int(found[1]) + 4))
            num_read += 1
        elif instruction.startswith("WARPGROUP.DEPBAR.LE gsb0, 0x0"):
            read.clear()
        elif instruction.startswith("CS2R"):
            assert not {int(re.findall(r"R(\d+)", instruction)[0]) + i for i in range(2)} & read, instruction
        elif not instruction.startswith(WRITE_NOTHING) and (to := re.match(r"(\S+) (?:U?P\w+, )*R(\d+)\b", instruction)):
            size = 4 if ".128" in to[1] else 2 if ".64" in to[1] or ".WIDE" in to[1] else 1
            assert not read & set(range(int(to[2]), int(to[2]) + size)), instruction
    assert num_read >= 4


class Compiler:
    """In place of NVRTC, under the names that CuPy has for it."""

    def __init__(self) -> None:
        self.num_compiled, self.is_broken = 0, False

    def compile(self, program: str, options: tuple[str, ...]) -> None:
        self.num_compiled += 1
        if self.is_broken:
            raise ValueError

    def made_of(self, program: str) -> bytes:
        return program.encode() * 10_000

    def names(self) -> SimpleNamespace:
        return SimpleNamespace(
            NVRTCError=ValueError, getVersion=lambda: (13, 5), createProgram=self.create, compileProgram=self.compile,
            getCUBIN=self.made_of, getProgramLog="no {}".format, destroyProgram=str,
        )  # fmt: skip

    def create(self, text: str, *_: object) -> str:
        return text


class Loaded:
    def __init__(self, path: str) -> None:
        self.path = Path(path)


def test_what_is_compiled_for_hopper_is_kept_by_whoever_is_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = Compiler()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kept"))

    def module(text: str) -> Path:
        return module_of_hopper(SimpleNamespace(RawModule=Loaded), compiler.names(), "it", text, ()).path

    with ThreadPoolExecutor(8) as pool:
        for text in ("one", "other"):
            paths = {*pool.map(module, [text] * 40)}
            assert [path.read_bytes() for path in paths] == [compiler.made_of(text)]
    assert len([*(tmp_path / "kept").iterdir()]) == 2
    before = compiler.num_compiled
    module("one")
    assert compiler.num_compiled == before
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file"))  # where nothing can be kept
    assert module("one").read_bytes() == compiler.made_of("one")
    compiler.is_broken = True
    with pytest.raises(RuntimeError, match=r"it\.cu does not compile: no three"):
        module("three")


def test_importing_needs_no_cupy() -> None:
    program = "import sys; sys.modules['cupy'] = None; import forerun; from forerun.kernels.backends import make_backend\n"
    program += "try: make_backend('cuda', None)\nexcept forerun.InvalidRequest as error: print(error)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "no CUDA device" in found
