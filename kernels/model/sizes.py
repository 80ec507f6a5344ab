"""How much memory a sequence takes, computed in one place, without allocating any.

python -m forerun.kernels.model.sizes      # the family's sizes at drafts of 3 and 64 rows
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .config import ModelConfig, MoeConfig
from .pages import PAGE
from .recurrent import StoreName

FLOAT = 4
MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Bytes of one sequence. `state` is one set of recurrent states and windows, which any sequence has; `rollback` what is kept besides
    to go back over `max_rows` rows: their pre-convolution columns, and their states or what besides the columns makes them; `page`
    one page of keys and values, trunk and MTP head."""

    state: int
    rollback: int
    page: int


def memory_sizes(config: ModelConfig, max_rows: int, store: StoreName) -> MemorySizes:
    c = config
    states = c.num_delta * c.value_heads * c.key_dim * c.value_dim * FLOAT
    column = c.num_delta * c.channels * FLOAT
    gates = c.num_delta * 2 * c.value_heads * FLOAT  # b and a of a row; k and v are in its columns
    row = column + (states if store == "snapshots" else gates)
    page = 2 * (c.num_attention + 1) * c.kv_heads * PAGE * c.head_dim * FLOAT
    return MemorySizes(states + (c.conv_width - 1) * column, max_rows * row, page)


def _config(
    hidden: int, intermediate: int, layers: int, heads: tuple[int, int], delta_heads: tuple[int, int], is_tied: bool,
    moe: MoeConfig | None = None,
) -> ModelConfig:  # fmt: skip
    """A published configuration: every fourth layer attends, heads of 256 and 128."""
    full = tuple(i % 4 == 3 for i in range(layers))
    return ModelConfig(
        family="qwen3_5" if moe is None else "qwen3_5_moe", vocabulary=248_320, hidden=hidden, intermediate=intermediate,
        is_full_attention=full, is_moe=(moe is not None,) * layers,
        heads=heads[0], kv_heads=heads[1], head_dim=256, rotary_dim=64, rope_theta=1e7, mrope_sections=(11, 11, 10),
        rms_eps=1e-6, key_heads=delta_heads[0], value_heads=delta_heads[1], key_dim=128, value_dim=128, conv_width=4,
        context=262_144, is_tied=is_tied, num_mtp_layers=1, moe=moe,
    )  # fmt: skip


#: The family's published text configurations (Hugging Face, config.json).
PUBLISHED = {
    "0.8B": _config(1024, 3584, 24, (8, 2), (16, 16), True),
    "2B": _config(2048, 6144, 24, (8, 2), (16, 16), True),
    "4B": _config(2560, 9216, 32, (16, 4), (16, 32), True),
    "9B": _config(4096, 12288, 32, (16, 4), (16, 32), False),
    "27B": _config(5120, 17408, 64, (24, 4), (16, 48), False),
    "35B-A3B": _config(2048, 512, 40, (16, 2), (16, 32), False, MoeConfig(256, 8, 512, 512)),
}


def table() -> str:
    """MiB of one sequence, as a Markdown table."""
    lines = ["| model | rows | one state | rollback log | snapshots | a page |", "|---|---|---|---|---|---|"]
    for name, config in PUBLISHED.items():
        for rows in (3, 64):
            log, snapshots = (memory_sizes(config, rows, store) for store in ("log", "snapshots"))
            figures = (log.state, log.rollback, snapshots.rollback, log.page)
            lines.append(f"| {name} | {rows} | " + " | ".join(f"{figure / MIB:.1f}" for figure in figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
