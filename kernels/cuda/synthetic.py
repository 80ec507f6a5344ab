"""Weights of any size, random and made on the device: to measure a model without having it."""

from __future__ import annotations

import numpy as np

from ..backend import Experts
from ..model.config import ModelConfig, MoeConfig
from ..model.weights import AttentionWeights, DeltaWeights, DenseWeights, LayerWeights, ModelWeights, MoeWeights, MtpWeights
from .matrices import BF16, Q4_K, Q5_K, Q6_K, Q8_0, UNIT_BYTES, UNITS, CudaBackend, CudaMatrix

FORMATS = {"bf16": BF16, "q8_0": Q8_0, "q4_k": Q4_K, "q5_k": Q5_K, "q6_k": Q6_K}
#: Deviation and mean of random quants; those of Q6_K have about no mean, and no minima.
OF_BLOCKS = {Q4_K: (4.6, 7.5), Q5_K: (9.2, 15.5), Q6_K: (18.5, 0.0)}


def synthetic_weights(config: ModelConfig, kind: str, backend: CudaBackend) -> ModelWeights:
    """A model with an MTP head, all matrices of one of FORMATS."""
    c, device, number, count = config, backend.device, FORMATS[kind], 0

    def matrix(outputs: int, inputs: int) -> CudaMatrix:
        nonlocal count
        count += outputs * inputs
        strips, units, deviation = -(-outputs // 16), -(-inputs // UNITS[number]), inputs**-0.5
        if number == BF16:
            return CudaMatrix(BF16, outputs, inputs, device.random(strips * units * 1024, 1.7 * deviation).reshape(strips, units, -1))
        tiles = device.random(strips * units * 2048).reshape(strips, units, -1)
        if number == Q8_0:
            scales = device.to_device(np.full((strips, units, 64), deviation / 74, np.float16).view(np.uint8))
            return CudaMatrix(Q8_0, outputs, inputs, tiles, scales)
        spread, mean = OF_BLOCKS[number]
        d = deviation / spread / 32
        ends = np.full((strips, units, 8, 4), [d, d, mean * d, mean * d], np.float16).view(np.uint8).reshape(strips, units, -1)
        size = UNIT_BYTES[number][1]
        scales = device.random(strips * units * size).reshape(strips, units, -1)  # high bits, that is
        device.put(scales[:, :, :256], np.full((), 32, np.uint8))
        return CudaMatrix(number, outputs, inputs, tiles, scales, device.to_device(ends))

    rng = np.random.default_rng(1)

    def ones(n: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.ones(n, np.float32)

    def dense(width: int) -> DenseWeights:
        return DenseWeights(matrix(width, c.hidden), matrix(width, c.hidden), matrix(c.hidden, width))

    def each_of(moe: MoeConfig, outputs: int, inputs: int) -> list[CudaMatrix]:
        """A matrix for every expert."""
        whole, strips = matrix(moe.num_experts * outputs, inputs), outputs // 16
        cuts = [slice(i * strips, (i + 1) * strips) for i in range(moe.num_experts)]
        return [CudaMatrix(number, outputs, inputs, *(None if part is None else part[cut] for part in whole.parts)) for cut in cuts]

    def ffn(moe: MoeConfig | None) -> DenseWeights | MoeWeights:
        if moe is None:
            return dense(c.intermediate)
        gate, up, down = (each_of(moe, *shape) for shape in (*[(moe.intermediate, c.hidden)] * 2, (c.hidden, moe.intermediate)))
        experts = Experts(gate, up, down, moe.num_used)
        return MoeWeights(matrix(moe.num_experts, c.hidden), experts, dense(moe.shared_intermediate), matrix(1, c.hidden))

    def layer(is_full: bool, moe: MoeConfig | None) -> LayerWeights:
        values, keys = c.value_heads * c.value_dim, c.kv_heads * c.head_dim
        if is_full:
            q, k, v = matrix(2 * c.heads * c.head_dim, c.hidden), matrix(keys, c.hidden), matrix(keys, c.hidden)
            mixer = AttentionWeights(q, k, v, matrix(c.hidden, c.heads * c.head_dim), ones(c.head_dim), ones(c.head_dim))
        else:
            qkv, z, b, a = (matrix(n, c.hidden) for n in (c.channels, values, c.value_heads, c.value_heads))
            conv = rng.uniform(-0.5, 0.5, (c.conv_width, c.channels)).astype(np.float32)
            decay = -np.exp(rng.uniform(0, 2, c.value_heads)).astype(np.float32)
            mixer = DeltaWeights(qkv, z, b, a, conv, decay, ones(c.value_heads), ones(c.value_dim), matrix(c.hidden, values))
        return LayerWeights(ones(c.hidden), mixer, ones(c.hidden), ffn(moe))

    embedding = matrix(c.vocabulary, c.hidden)
    layers = [layer(is_full, c.moe if is_moe else None) for is_full, is_moe in zip(c.is_full_attention, c.is_moe, strict=True)]
    head = embedding if c.is_tied else matrix(c.vocabulary, c.hidden)
    mtp = MtpWeights(ones(c.hidden), ones(c.hidden), matrix(c.hidden, 2 * c.hidden), layer(True, c.moe), ones(c.hidden))
    return ModelWeights(c, embedding, layers, ones(c.hidden), head, mtp, count, "0" * 64)
