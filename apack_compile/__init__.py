"""attentionpack: a torch.compile backend for decoding with a packed KV cache.

    model = torch.compile(model, backend="attentionpack", options={"ratio": 8})
    model.generate(...)
    print(apack_compile.report(model))
"""

from . import hooks
from .accounting import CacheBytes, cache_bytes
from .backend import attentionpack
from .cache import PackedKV
from .options import OptionError, Options
from .report import Report, report

__version__ = "0.1.0"

__all__ = [
    "CacheBytes",
    "OptionError",
    "Options",
    "PackedKV",
    "Report",
    "attentionpack",
    "cache_bytes",
    "report",
]

hooks.install()
