"""llama.cpp as a peer of `forerun bench`, in a process of its own: the PyPI package xllamacpp (the extra `bench`).

python -m forerun.tools.llama_cpp FILE.gguf THREADS CONTEXT SPEC_TYPE N_MAX     # answers requests, one JSON object a line
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import IO, Any

from ..core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Run:
    """One request: seconds for its prompt, then for all tokens but the first; drafts, and how many were right."""

    prompt_seconds: float
    seconds: float
    token_ids: tuple[int, ...]
    num_drafted: int = 0
    num_accepted: int = 0
    num_rounds: int = 0  # where they are told
    is_synthetic: bool = False  # acceptance was drawn at random


class LlamaCpp:
    """A process that has the model loaded. InvalidRequest, with what it said, when it does not start."""

    def __init__(self, path: str, num_threads: int, context: int, spec_type: str = "none", n_max: int = 0) -> None:
        command = [sys.executable, "-m", "forerun.tools.llama_cpp", path, str(num_threads), str(context), spec_type, str(n_max)]
        self._process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in: IO[str] = self._process.stdin
        self._out: IO[str] = self._process.stdout
        started = self._out.readline()
        if started != "ready\n":
            raise InvalidRequest([("--vs", f"llama.cpp did not start: {started.strip() or 'no word from it'}")])

    def run(self, prompt: tuple[int, ...], num_tokens: int) -> Run:
        """Greedy, and over end tokens."""
        self._in.write(json.dumps([prompt, num_tokens]) + "\n")
        self._in.flush()
        answer = json.loads(self._out.readline())
        timings = answer["timings"]
        # Its clock starts at the first token, so `predicted_ms` is that of all but one.
        return Run(
            timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3, tuple(answer["tokens"]),
            timings.get("draft_n", 0), timings.get("draft_n_accepted", 0),
        )  # fmt: skip

    def close(self) -> None:
        self._in.close()
        self._process.wait()


def _serve(path: str, num_threads: int, context: int, spec_type: str, n_max: int) -> None:
    try:
        import xllamacpp as x  # type: ignore[import-not-found]
    except ImportError:
        sys.stdout.write('there is no xllamacpp here: pip install "forerun[bench]"\n')
        return
    api: Any = x
    params = api.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    if spec_type != "none":
        name = "COMMON_SPECULATIVE_TYPE_" + spec_type.upper().replace("-", "_")
        params.speculative.types = [getattr(api.common_speculative_type, name)]
        params.speculative.draft.n_max = n_max
    server = api.Server(params)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        prompt, num_tokens = json.loads(line)
        request = {
            "prompt": prompt, "n_predict": num_tokens, "temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": False,
            "return_tokens": True, "verbose": True,
        }  # fmt: skip
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        sys.stdout.write(json.dumps({"timings": answer["timings"], "tokens": answer["__verbose"]["tokens"]}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
