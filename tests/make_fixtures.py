# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
"""Records what transformers computes, in float32, on the checkpoints of checkpoints.py, and what a second MTP head does.

    pip install torch transformers && python tests/make_fixtures.py      # writes tests/data/LAYOUT.npz

Trunk: logits of every position of prompts of LENGTHS tokens, then of STEPS greedy steps. MTP: the formulas of
DeepSeek-V3 section 2.2 as Qwen3.5 uses them, written out here in torch, independently of kernels/model/mtp.py: logits
of every row of a warm-up over the whole 65-token prompt and its greedy continuation, and of three chained drafts from
several positions, greedily. Rows: logits of a prompt with embedding rows (checkpoints.prompt_with_rows) and STEPS greedy steps.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from forerun.core.embeddings import EmbeddingRows, Part
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Qwen3_5MoeForCausalLM

from tests.checkpoints import DRAFT_FROM, LAYOUTS, LENGTHS, NUM_DRAFTS, STEPS, make, places_of_rows, prompt, prompt_with_rows


class Mtp:
    """The head from its formulas, one function of whole sequences, without a cache."""

    def __init__(self, folder: Path, config, model) -> None:
        self.c, self.model, self.w = config, model, {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.w.update({k: file.get_tensor(k).float() for k in file.keys() if k.startswith("mtp.")})  # noqa: SIM118

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.w[f"mtp.{name}.weight"])

    def attention(self, u):
        c, w, n = self.c, self.w, len(u)
        dim, heads, kv = c.head_dim, c.num_attention_heads, c.num_key_value_heads
        at = "layers.0.self_attn"
        q, gate = (u @ w[f"mtp.{at}.q_proj.weight"].T).view(n, heads, 2 * dim).split(dim, -1)
        k = (u @ w[f"mtp.{at}.k_proj.weight"].T).view(n, kv, dim)
        v = (u @ w[f"mtp.{at}.v_proj.weight"].T).view(n, kv, dim)
        q, k = self.norm(q, f"{at}.q_norm"), self.norm(k, f"{at}.k_norm")
        rotary = dim // 4
        angle = torch.arange(n)[:, None] / 1e7 ** (torch.arange(0, rotary, 2) / rotary)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]

        def rotate(x):
            a, b, rest = x[..., : rotary // 2], x[..., rotary // 2 : rotary], x[..., rotary:]
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

        q, k = rotate(q), rotate(k)
        out = []
        for h in range(heads):
            g = h // (heads // kv)
            scores = q[:, h] @ k[:, g].T * dim**-0.5
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v[:, g])
        return (torch.stack(out, 1) * gate.sigmoid()).reshape(n, -1) @ w[f"mtp.{at}.o_proj.weight"].T

    def dense(self, u, at, gate=None, up=None, down=None):
        w = self.w
        gate = w[at + "gate_proj.weight"] if gate is None else gate
        up = w[at + "up_proj.weight"] if up is None else up
        down = w[at + "down_proj.weight"] if down is None else down
        return (functional.silu(u @ gate.T) * (u @ up.T)) @ down.T

    def ffn(self, u):
        at, w = "mtp.layers.0.mlp.", self.w
        if at + "gate.weight" not in w:
            return self.dense(u, at)
        share = (u @ w[at + "gate.weight"].T).softmax(-1)
        out = torch.sigmoid(u @ w[at + "shared_expert_gate.weight"].T) * self.dense(u, at + "shared_expert.")
        best = share.topk(self.c.num_experts_per_tok, -1)
        for row in range(len(u)):
            for value, expert in zip(best.values[row] / best.values[row].sum(), best.indices[row].tolist(), strict=True):
                if at + "experts.gate_up_proj" in w:
                    gate, up = w[at + "experts.gate_up_proj"][expert].chunk(2)
                    y = self.dense(u[row], "", gate, up, w[at + "experts.down_proj"][expert])
                else:
                    y = self.dense(u[row], f"{at}experts.{expert}.")
                out[row] = out[row] + value * y
        return out

    def __call__(self, tokens, hidden):
        """tokens [n], hidden [n, hidden] of the position before each: logits [n, V] and outputs [n, hidden]."""
        embedded = self.model.model.embed_tokens(tokens)
        x = torch.cat([self.norm(embedded, "pre_fc_norm_embedding"), self.norm(hidden, "pre_fc_norm_hidden")], -1)
        x = x @ self.w["mtp.fc.weight"].T
        x = x + self.attention(self.norm(x, "layers.0.input_layernorm"))
        x = x + self.ffn(self.norm(x, "layers.0.post_attention_layernorm"))
        out = self.norm(x, "norm")
        return self.model.lm_head(out), out


@torch.no_grad()
def record(name: str, folder: Path) -> dict[str, Any]:
    kind = Qwen3_5MoeForCausalLM if name == "moe" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    out: dict[str, Any] = {}
    for length in LENGTHS:
        ids = prompt(length)
        logits, tokens = [], []
        result = model(torch.tensor([ids]), use_cache=True)
        logits.append(result.logits[0])
        for _ in range(STEPS):
            tokens.append(int(logits[-1][-1].argmax()))
            result = model(torch.tensor([[tokens[-1]]]), past_key_values=result.past_key_values, use_cache=True)
            logits.append(result.logits[0])
        out[f"logits_{length}"] = torch.cat(logits).numpy()
        out[f"tokens_{length}"] = np.array(tokens)
    ids = torch.tensor(prompt(65) + out["tokens_65"].tolist())
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0]
    mtp = Mtp(folder, model.config.get_text_config(), model)
    shifted = torch.cat([torch.zeros(1, hidden.shape[1]), hidden[:-1]])
    out["mtp_warm"] = mtp(ids, shifted)[0].numpy()
    chains = []
    for last in DRAFT_FROM:
        tokens, rows = ids[: last + 2], shifted[: last + 2]
        for _ in range(NUM_DRAFTS):
            logits, outputs = mtp(tokens, rows)
            chains.append(logits[-1].numpy())
            tokens = torch.cat([tokens, logits[-1:].argmax(-1)])
            rows = torch.cat([rows, outputs[-1:]])
    out["mtp_chains"] = np.stack(chains).reshape(len(DRAFT_FROM), NUM_DRAFTS, -1)
    return out | rows(model, is_text=name == "next")


def rows(model: Any, *, is_text: bool) -> dict[str, Any]:
    """A prompt with embedding rows, and what follows it."""
    table, parts = model.get_input_embeddings(), prompt_with_rows(model.config.get_text_config().hidden_size, is_text=is_text)

    def embedded(part: Part) -> Any:
        if isinstance(part, EmbeddingRows):
            return torch.tensor(np.frombuffer(part.data, "<f4").reshape(-1, part.width))
        return table(torch.tensor(part))

    x, places, tokens = torch.cat([embedded(part) for part in parts])[None], torch.tensor(places_of_rows(is_text=is_text)).T[:, None], []
    for _ in range(STEPS + 1):
        at = places[0, :, : x.shape[1]] if is_text else places[..., : x.shape[1]]
        given = {"inputs_embeds": x, "position_ids": at, "attention_mask": torch.ones(x.shape[:2], dtype=torch.long), "use_cache": False}
        logits = model(**given).logits[0]
        tokens.append(int(logits[-1].argmax()))
        x = torch.cat([x, table(torch.tensor([tokens[-1:]]))], 1)
    return {"logits_rows": logits.numpy(), "tokens_rows": np.array(tokens[:-1])}


def main() -> None:
    data = Path(__file__).parent / "data"
    data.mkdir(exist_ok=True)
    for name in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            np.savez_compressed(data / f"{name}.npz", **record(name, make(name, Path(folder))))
        print(name, (data / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
