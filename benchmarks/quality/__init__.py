"""How well a packed KV cache keeps a real model's outputs, beside other codes of the cache.

``python -m benchmarks.quality --help``; what is measured and how: docs/quality.md.
"""
