"""Sharded decoding: KV cache, attention, sampling, speculative decoding, weight quantization; no model.

All functions but the schedules run inside shard_map. A KV cache [L, B, K, S, h] is sharded over pp (layers), the data
axes (slots), tp (key/value heads) and cp (positions); a slot is the place of one sequence being decoded.
`tessera.serving` joins these functions with a decoder.

Axis legend: L layers, B slots, N rows of a call (one sequence each), T tokens of a row, S positions of a device's
cache, K key/value heads, G query heads per key/value head, H = K G query heads, h head dimension, V vocabulary, C
candidates, I and O inputs and outputs of a kernel, M rows of calibration inputs. Inside shard_map these are the sizes
of one device's part.

Names are imported on first use.
"""

from sharding._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "kv_cache": (
            "Cache",
            "CacheConfig",
            "append",
            "cache_specs",
            "copy_prefix",
            "make_cache",
            "read_range",
            "read_slots",
        ),
        "attention": ("cached_attention",),
        "sample": ("Settings", "greedy", "sample_tokens"),
        "speculative": ("accept",),
        "quantize": ("QuantConfig", "Quantized", "dequantize", "observe", "quantize_matrix"),
        "adapters": ("AdaptedProjection",),
        "few_rows": ("RowKernel", "lay_out_rows", "row_product"),
        "pipeline_ring": ("Ring",),
        "top_p": (),
    },
)
