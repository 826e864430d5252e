"""attentionpack: a torch.compile backend for decoding with a packed KV cache.

model = torch.compile(model, backend="attentionpack", options={"ratio": 8})
model.generate(...)
print(apack_compile.report(model))
"""

from .compat import check_torch

check_torch()

from . import hooks  # noqa: E402
from .accounting import CacheBytes, cache_bytes  # noqa: E402
from .backend import attentionpack  # noqa: E402
from .cache import PackedKV  # noqa: E402
from .cost.predict import predict  # noqa: E402
from .fitting.api import fit  # noqa: E402
from .fitting.carry import ProfileInfo, load_profile, save_profile  # noqa: E402
from .fitting.file import ProfileError  # noqa: E402
from .fitting.session import FitError  # noqa: E402
from .fitting.summary import FitSummary  # noqa: E402
from .options import OptionError, Options  # noqa: E402
from .report import Report, report  # noqa: E402
from .runtime.given import visual_tokens  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CacheBytes",
    "FitError",
    "FitSummary",
    "OptionError",
    "Options",
    "PackedKV",
    "ProfileError",
    "ProfileInfo",
    "Report",
    "attentionpack",
    "cache_bytes",
    "fit",
    "load_profile",
    "predict",
    "report",
    "save_profile",
    "visual_tokens",
]

hooks.install()
