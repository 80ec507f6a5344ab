# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false
"""Trains the demo model: a small qwen3_5-layout hybrid whose MTP head is trained with it, on Python source.

    python tools/train_demo.py --data DATA --out RUN --minutes 100        # DATA: see tools/demo_corpus.py
    python tools/train_demo.py --data DATA --out RUN --minutes 160        # goes on from RUN/state.pt
    python tools/train_demo.py --data DATA --out RUN --export FOLDER      # an ordinary Hugging Face folder

`--minutes` counts training time over all runs; the learning rate is constant until the last 30 % and then falls to
zero, so a longer second run first undoes nothing and then lands again. RUN/log.txt holds one line for every 20 steps.

The MTP head learns as it will be used: the chain of drafts from every position, each step reading the head's own
output of the step before and attending to the exact rows of its cache up to the chain's start plus the chain itself
(MTP in DeepSeek-V3 section 2.2, but with the inference-time cache). Its targets are half the text and half the
trunk's own distribution, because being accepted means agreeing with the trunk.
Matrices are trained with Muon (Jordan 2024: momentum, then five Newton-Schulz steps), the rest with AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

CHUNK = 64
REPEATED = 20


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense qwen3_5 text model. Names follow config.json where they can."""

    vocab: int = 4096
    hidden: int = 192
    ffn: int = 512
    layers: int = 8
    full_attention_interval: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 64
    value_dim: int = 64
    rope_theta: float = 10_000_000.0
    rotary: int = 16


SHAPES = {
    "cpu": Shape(),  # 5.3M parameters, 11 MB
    "gpu": Shape(hidden=320, ffn=896, layers=8, heads=5, kv_heads=1, key_heads=4, value_heads=8, key_dim=48, value_dim=48),
}


class Norm(nn.Module):
    """RMSNorm with weight stored as its distance from one, as every norm of the family but the GDN output norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def linear(outputs: int, inputs: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs) * scale * inputs**-0.5)


class GatedDeltaNet(nn.Module):
    """MODEL.md, "Gated delta net layer", in its chunked form (Yang et al. 2024, arXiv:2412.06464, section 3.3)."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        key, value = s.key_heads * s.key_dim, s.value_heads * s.value_dim
        self.in_proj_qkv, self.in_proj_z = linear(2 * key + value, s.hidden), linear(value, s.hidden)
        self.in_proj_b, self.in_proj_a = linear(s.value_heads, s.hidden), linear(s.value_heads, s.hidden)
        self.conv1d = nn.Parameter(torch.randn(2 * key + value, 1, 4) * 0.3)
        self.A_log = nn.Parameter(torch.log(torch.empty(s.value_heads).uniform_(1, 16)))
        step = torch.exp(torch.empty(s.value_heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step, as in Mamba 2
        self.norm = nn.Parameter(torch.ones(s.value_dim))
        self.out_proj = linear(s.hidden, value, 0.3)

    def forward(self, u: Tensor) -> Tensor:
        s = self.s
        batch, length, _ = u.shape
        key = s.key_heads * s.key_dim
        qkv = functional.linear(u, self.in_proj_qkv).transpose(1, 2)
        padded = functional.pad(qkv.float(), (3, 0))
        qkv = functional.silu(sum(padded[..., i : i + length] * self.conv1d[:, :, i] for i in range(4)))
        q, k = (x.view(batch, s.key_heads, s.key_dim, length).transpose(2, 3) for x in (qkv[:, :key], qkv[:, key : 2 * key]))
        v = qkv[:, 2 * key :].view(batch, s.value_heads, s.value_dim, length).transpose(2, 3)
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * s.key_dim**-0.5
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        repeat = s.value_heads // s.key_heads
        q, k = q.repeat_interleave(repeat, 1), k.repeat_interleave(repeat, 1)
        beta = torch.sigmoid(functional.linear(u, self.in_proj_b).float()).transpose(1, 2)
        g = -self.A_log.exp() * functional.softplus(functional.linear(u, self.in_proj_a).float() + self.dt_bias)
        o = delta_rule(q, k, v, beta, g.transpose(1, 2))
        o = o.transpose(1, 2)  # [batch, length, value heads, value dim]
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * self.norm
        z = functional.linear(u, self.in_proj_z).float().view(o.shape)
        return functional.linear((o * functional.silu(z)).reshape(batch, length, -1), self.out_proj)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """q, k [B, H, T, dk], v [B, H, T, dv], beta and g [B, H, T], float32; T a multiple of CHUNK. Returns [B, H, T, dv]."""
    batch, heads, length, _ = q.shape
    q, k, v, beta, g = (x.reshape(batch, heads, length // CHUNK, CHUNK, *x.shape[3:]) for x in (q, k, v, beta, g))
    total = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, device=q.device).tril()
    # Masked before exp, not after: above the diagonal the exponent is positive and may overflow to inf * 0.
    decay = ((total[..., :, None] - total[..., None, :]) * lower).exp() * lower
    weighted = beta[..., None] * k
    matrix = (weighted @ k.transpose(-1, -2)) * decay
    right = torch.cat([beta[..., None] * v, weighted * total.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    inside = (q @ k.transpose(-1, -2)) * decay
    carried_q = q * total.exp()[..., None]
    last = total[..., -1:]
    carried_k = k * (last - total).exp()[..., None]
    state = q.new_zeros(batch, heads, k.shape[-1], v.shape[-1])
    out = []
    for i in range(length // CHUNK):
        new = u[:, :, i] - w[:, :, i] @ state
        out.append(carried_q[:, :, i] @ state + inside[:, :, i] @ new)
        state = last[:, :, i].exp()[..., None] * state + carried_k[:, :, i].transpose(-1, -2) @ new
    return torch.cat(out, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, head_dim]; cos, sin [T, rotary / 2]; rotate-half layout on the first `rotary` dimensions."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class GatedAttention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = linear(s.heads * s.head_dim * 2, s.hidden)
        self.k_proj, self.v_proj = linear(s.kv_heads * s.head_dim, s.hidden), linear(s.kv_heads * s.head_dim, s.hidden)
        self.o_proj = linear(s.hidden, s.heads * s.head_dim, 0.3)
        self.q_norm, self.k_norm = Norm(s.head_dim), Norm(s.head_dim)

    def forward(self, u: Tensor, offset: int = 0, chain: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """`chain` is the MTP cache: its first entry holds the exact rows, the others one row per chain (see Mtp)."""
        s = self.s
        batch, length, _ = u.shape
        q, gate = functional.linear(u, self.q_proj).view(batch, length, s.heads, 2, s.head_dim).float().unbind(3)
        k = functional.linear(u, self.k_proj).view(batch, length, s.kv_heads, s.head_dim).float()
        v = functional.linear(u, self.v_proj).view(batch, length, s.kv_heads, s.head_dim).transpose(1, 2).float()
        inverse = s.rope_theta ** (-torch.arange(0, s.rotary, 2, device=u.device) / s.rotary)
        angle = torch.arange(offset, offset + length, device=u.device)[:, None] * inverse
        cos, sin = angle.cos(), angle.sin()
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        groups = s.heads // s.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if not chain:
            if chain is not None:
                chain.append((k, v))
            o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            chain.append((k, v))
            (exact_k, exact_v), drafted = chain[0], chain[1:]
            mask = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
            scores = [(q @ exact_k.transpose(-1, -2)).masked_fill(~mask, -torch.inf)]
            scores += [(q * key).sum(-1, keepdim=True) for key, _ in drafted]
            share = (torch.cat(scores, -1) * s.head_dim**-0.5).softmax(-1)
            o = share[..., :length] @ exact_v
            for i, (_, value) in enumerate(drafted):
                o = o + share[..., length + i, None] * value
        o = o.transpose(1, 2) * torch.sigmoid(gate)
        return functional.linear(o.reshape(batch, length, -1), self.o_proj)


class Layer(nn.Module):
    def __init__(self, s: Shape, is_full: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(s.hidden), Norm(s.hidden)
        if is_full:
            self.self_attn = GatedAttention(s)
        else:
            self.linear_attn = GatedDeltaNet(s)
        self.gate_proj, self.up_proj = linear(s.ffn, s.hidden), linear(s.ffn, s.hidden)
        self.down_proj = linear(s.hidden, s.ffn, 0.3)

    def forward(self, x: Tensor, offset: int = 0, chain: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        u = self.input_layernorm(x)
        x = x + (self.self_attn(u, offset, chain) if hasattr(self, "self_attn") else self.linear_attn(u))
        u = self.post_attention_layernorm(x)
        return x + functional.linear(
            functional.silu(functional.linear(u, self.gate_proj)) * functional.linear(u, self.up_proj), self.down_proj
        )


class Mtp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = Norm(s.hidden), Norm(s.hidden)
        self.fc = nn.Parameter(torch.cat([torch.eye(s.hidden) * 0.5, torch.eye(s.hidden) * 0.5], 1))
        self.layer = Layer(s, True)
        self.norm = Norm(s.hidden)

    def forward(self, embedded: Tensor, hidden: Tensor, offset: int, chain: list[tuple[Tensor, Tensor]]) -> Tensor:
        both = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], -1)
        return self.norm(self.layer(functional.linear(both, self.fc), offset, chain))


class Model(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(s, (i + 1) % s.full_attention_interval == 0) for i in range(s.layers))
        self.norm = Norm(s.hidden)
        self.mtp = Mtp(s)

    def trunk(self, ids: Tensor) -> Tensor:
        x = functional.embedding(ids, self.embed)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.embed).float()

    def drafts(self, hidden: Tensor, ids: Tensor, depth: int) -> list[Tensor]:
        """Logits of each chained draft. Chain i starts from token i and the hidden row of position i - 1 (zeros for the
        first); its draft j (from 0) predicts token i + j + 1. hidden [B, T, hidden], ids [B, T + depth - 1 or more]."""
        length, chain, out = hidden.shape[1], [], []
        hidden = functional.pad(hidden[:, :-1], (0, 0, 1, 0))
        for step in range(depth):
            hidden = self.mtp(functional.embedding(ids[:, step : step + length], self.embed), hidden, step, chain)
            out.append(self.head(hidden))
        return out


def loss(model: Model, ids: Tensor, depth: int, mtp_share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Total, trunk cross-entropy, MTP loss; nats a token. ids [B, T + 1 + depth], T a multiple of CHUNK."""
    length = ids.shape[1] - 1 - depth
    hidden = model.trunk(ids[:, :length])
    logits = model.head(hidden)
    trunk = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 : length + 1].flatten())
    rows = max(1, round(len(ids) * mtp_share))
    teacher = logits[:rows].detach().softmax(-1)
    total = torch.zeros(())
    drafted = model.drafts(hidden[:rows, : length - depth], ids[:rows], depth)
    for step, out in enumerate(drafted):
        log_p = out.log_softmax(-1)
        labels = ids[:rows, step + 1 : step + 1 + out.shape[1]]
        text = -log_p.gather(-1, labels[..., None]).mean()
        agreement = -(teacher[:, step : step + out.shape[1]] * log_p).sum(-1).mean()
        total = total + (0.5 * text + 0.5 * agreement) / depth
    return trunk + 0.3 * total, trunk, total


class Muon(torch.optim.Optimizer):
    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                x = torch.stack(updates)
                tall = x.shape[1] > x.shape[2]
                x = x.transpose(1, 2) if tall else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.transpose(1, 2)
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.transpose(1, 2) if tall else x
                scale = max(1.0, x.shape[1] / x.shape[2]) ** 0.5
                for p, update in zip(params, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "embed" and min(p.shape) >= 32]
    chosen = {id(p) for p in matrices}
    others = [p for n, p in model.named_parameters() if id(p) not in chosen and n != "embed"]
    adam = torch.optim.AdamW([{"params": [model.embed], "lr": 4e-3}, {"params": others, "lr": 4e-3}], betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr=0.02), adam]


def batch(data: np.ndarray, generator: np.random.Generator, rows: int, length: int, device: str) -> Tensor:
    """Random windows of the corpus. One in REPEATED is an excerpt over and over, as when somebody asks for a file again:
    so small a model sees too little text to learn to copy from ordinary windows alone."""
    out = np.empty((rows, length), np.int64)
    for row in out:
        start = generator.integers(0, len(data) - length)
        period = generator.integers(40, length // 2) if generator.integers(REPEATED) == 0 else length
        row[:] = np.resize(data[start : start + period], length)
    return torch.from_numpy(out).to(device)


@torch.no_grad()
def evaluate(model: Model, data: np.ndarray, num_bytes: int, depth: int, length: int, device: str) -> dict[str, object]:
    """Bits per byte, and how often each chained greedy draft equals the trunk's own greedy choice on held-out text,
    counted while all before it did (the first number is what a decoder calls acceptance at position 1)."""
    rows = torch.from_numpy(data[: len(data) // length * length].astype(np.int64)).view(-1, length)
    rows = rows[:: max(1, len(rows) // 192)].to(device)
    nats, tokens, agree, chains = 0.0, 0, torch.zeros(depth), 0
    for ids in rows.split(8):
        usable = (length - 1) // CHUNK * CHUNK
        hidden = model.trunk(ids[:, :usable])
        logits = model.head(hidden)
        nats += float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1 : usable + 1].flatten(), reduction="sum"))
        tokens += ids.shape[0] * usable
        choice = logits.argmax(-1)
        kept = torch.ones(ids.shape[0], usable - depth, dtype=torch.bool)
        for step, out in enumerate(model.drafts(hidden[:, : usable - depth], ids, depth)):
            kept = kept & (out.argmax(-1) == choice[:, step : step + usable - depth]).cpu()
            agree[step] += kept.sum()
        chains += kept.numel()
    bits = nats / tokens / math.log(2)
    return {
        "heldout_bits_per_byte": round(bits * len(data) / num_bytes, 4),
        "heldout_bits_per_token": round(bits, 4),
        "mtp_agreement_on_text": [round(float(a) / chains, 4) for a in agree],
    }


def export(model: Model, data: Path, out: Path, facts: dict[str, object]) -> None:
    from safetensors.torch import save_file

    s = model.s
    weights: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        name = "mtp.layers.0." + name[len("mtp.layer.") :] if name.startswith("mtp.layer.") else name
        name = name if name.startswith("mtp.") else "model." + name
        last = name.rsplit(".", 1)[1]
        name = name.replace(last, f"mlp.{last}") if last in ("gate_proj", "up_proj", "down_proj") else name
        name = name.replace("model.embed", "model.embed_tokens")
        name += "" if last in ("weight", "A_log", "dt_bias") else ".weight"
        # A_log and the GDN norm stay float32, as in the released checkpoints.
        weights[name] = p.detach().cpu().float() if last in ("A_log", "norm") else p.detach().cpu().bfloat16()
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in sorted(weights.items())}, out / "model.safetensors", {"format": "pt"})
    vocabulary = json.loads((data / "tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in vocabulary["added_tokens"]}
    (out / "tokenizer.json").write_text(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")))
    from demo_corpus import CHAT_TEMPLATE

    config = {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "dtype": "bfloat16", "vocab_size": s.vocab,
        "hidden_size": s.hidden, "intermediate_size": s.ffn, "num_hidden_layers": s.layers, "hidden_act": "silu",
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": s.key_dim, "linear_value_head_dim": s.value_dim,
        "linear_num_key_heads": s.key_heads, "linear_num_value_heads": s.value_heads,
        "full_attention_interval": s.full_attention_interval, "attn_output_gate": True, "attention_bias": False,
        "layer_types": ["full_attention" if (i + 1) % s.full_attention_interval == 0 else "linear_attention" for i in range(s.layers)],
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta, "partial_rotary_factor": s.rotary / s.head_dim,
                            "mrope_interleaved": True, "mrope_section": [3, 3, 2]},
        "eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {"eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]], "pad_token_id": ids["<|endoftext|>"], "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "unk_token": None, "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1) + "\n")
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "README.md").write_text(model_card(model, json.loads((data / "sources.json").read_text()), facts))


def model_card(model: Model, corpus: dict, facts: dict[str, object]) -> str:
    count = sum(p.numel() for p in model.parameters())
    rows = "\n".join(
        f"| {name} | {v['licence']} | {v['num_files']} | {v['num_characters'] / 1e6:.1f} |" for name, v in corpus["projects"].items()
    )
    agreement = ", ".join(f"{a:.3f}" for a in facts["mtp_agreement_on_text"])  # type: ignore[union-attr]
    return f"""# demo

A hybrid language model (gated delta net, gated attention, MTP head; the `qwen3_5` layout) of {count / 1e6:.1f}M parameters that
completes Python. It exists to show and test Forerun: it is small enough to ship and too small to trust.

Trained by `tools/train_demo.py` on the Python source below, {facts["num_tokens"]:,} tokens in {facts["minutes"]} minutes on
{facts["device"]}. On held-out files (one in about 43, by the hash of the name): {facts["heldout_bits_per_byte"]} bits per byte;
the chained MTP drafts 1, 2, 3 equal the trunk's greedy choice, all before them included, at a share of {agreement} of positions.

Tokenizer: byte-level BPE of {model.s.vocab} tokens trained on the same text, with the pre-tokenizer of Qwen3.5.
Weights: Apache-2.0, like Forerun. The text it learned from, by project:

| project | licence | files | million characters |
|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="training time in all, earlier runs included")
    parser.add_argument("--export", type=Path, help="write the Hugging Face folder here and stop")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--depth", type=int, default=3, help="chained drafts to train")
    parser.add_argument("--mtp-share", type=float, default=0.25, help="share of a batch the MTP loss is computed on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, help="stop after so many steps, to try things out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    state_path = args.out / "state.pt"
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    shape = Shape(**state["shape"]) if state else replace(SHAPES[args.shape])
    torch.manual_seed(0)
    model = Model(shape)
    steppers = optimizers(model)
    base = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    seconds, step, tokens = 0.0, 0, 0
    if state:
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        seconds, step, tokens = state["seconds"], state["step"], state["tokens"]
    model.to(args.device)
    held_out = np.memmap(args.data / "heldout.bin", np.uint16)
    num_bytes = json.loads((args.data / "sources.json").read_text())["num_heldout_bytes"]

    def facts() -> dict[str, object]:
        device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU cores"
        measured = evaluate(model, held_out, num_bytes, args.depth, args.length, args.device)
        return {"num_tokens": tokens, "num_steps": step, "minutes": round(seconds / 60), "device": device, **measured}

    if args.export:
        export(model, args.data, args.export, facts())
        return
    data = np.memmap(args.data / "train.bin", np.uint16)
    generator = np.random.default_rng(step)
    compute = torch.compile(loss) if args.compile else loss
    log = (args.out / "log.txt").open("a")

    def save() -> None:
        new = {"shape": asdict(shape), "model": model.state_dict(), "optimizers": [s.state_dict() for s in steppers]}
        torch.save({**new, "seconds": seconds, "step": step, "tokens": tokens}, state_path.with_suffix(".new"))
        state_path.with_suffix(".new").replace(state_path)

    begun, saved_at = time.monotonic(), time.monotonic()
    while seconds < args.minutes * 60 and step != args.steps:
        share = seconds / (args.minutes * 60)
        factor = min(1.0, (step + 1) / 50, (1 - share) / 0.3)
        for stepper, rates in zip(steppers, base, strict=True):
            for group, rate in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        ids = batch(data, generator, args.batch, args.length + 1 + args.depth, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            total, trunk, mtp = compute(model, ids, args.depth, args.mtp_share)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        step, tokens = step + 1, tokens + args.batch * args.length
        now = time.monotonic()
        if step > 2:  # the first steps compile
            seconds += now - begun
        begun = now
        if step % 20 == 0:
            line = f"step {step} minutes {seconds / 60:.1f} tokens {tokens} trunk {trunk.item():.3f} mtp {mtp.item():.3f} lr {factor:.2f}"
            print(line, file=log, flush=True)
        if now - saved_at > 180:
            save()
            saved_at = now
    save()
    print(json.dumps(facts()), file=log, flush=True)


if __name__ == "__main__":
    main()
