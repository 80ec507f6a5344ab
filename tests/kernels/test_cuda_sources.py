"""The CUDA sources compile for every architecture of the family, without one register spilled; no device, and no CuPy, is needed."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from importlib.metadata import files
from itertools import product
from typing import Any

import pytest
from forerun.kernels.cuda.device import OPTIONS, SOURCES, definitions, sizes_of, text_of
from forerun.kernels.model.sizes import PUBLISHED

ARCHITECTURES = (80, 89, 90, 100, 120)


@cache
def nvrtc() -> Any:
    found = next(str(file.locate()) for file in files("nvidia-cuda-nvrtc") or [] if re.fullmatch(r"libnvrtc\.so\.\d+", file.name))
    return ctypes.CDLL(found)


def compile_for(architecture: int, source: str) -> tuple[int, str]:
    """The result of the compiler, and what it says."""
    library, program, size = nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    text = text_of(f"{source}.cu")
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), source.encode(), 0, None, None)
    sizes = definitions(text, sizes_of(PUBLISHED["27B"]))
    options = [option.encode() for option in (f"-arch=sm_{architecture}", "--ptxas-options=-v", *OPTIONS, *sizes)]
    code = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log.value.decode()


@cache
def compiled() -> dict[tuple[int, str], Future[tuple[int, str]]]:
    """All of them, two at once; NVRTC keeps the threads of one process waiting for each other."""
    pool = ProcessPoolExecutor(2)
    return {each: pool.submit(compile_for, *each) for each in product(ARCHITECTURES, SOURCES)}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_source_compiles_and_nothing_is_spilled(architecture: int, source: str) -> None:
    code, log = compiled()[architecture, source].result()
    assert code == 0, log
    spills = re.findall(r"(\d+) bytes spill stores", log)
    assert spills, log
    assert set(spills) == {"0"}, log


def test_importing_needs_no_cupy() -> None:
    program = "import sys; sys.modules['cupy'] = None; import forerun; from forerun.kernels.backends import make_backend\n"
    program += "try: make_backend('cuda', None)\nexcept forerun.InvalidRequest as error: print(error)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "no CUDA device" in found
