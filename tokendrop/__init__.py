"""Token dropping for training vision-language models: one Lightning callback, any decoder."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tokendrop.public import *  # noqa: F403
else:
    # On first use, not on import: the command line answers --help without waiting for torch.
    def __getattr__(name):
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        public = import_module(f"{__name__}.public")
        globals().update({one: getattr(public, one) for one in (*public.__all__, "__all__")})
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
