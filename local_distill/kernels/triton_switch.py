"""Whether the Triton kernels run: one switch for all of them.

Each kernel stands beside a plain form in torch that gives the same numbers. The switch chooses.
"""

from __future__ import annotations

import functools
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from local_distill.errors import ConfigError

__all__ = ["launching_on", "triton_serves", "use_triton"]

Setting = bool | Literal["auto"]

_VARIABLE = "LOCAL_DISTILL_TRITON"
_VALUES: dict[str, Setting] = {"0": False, "1": True, "auto": "auto"}
# What Triton states to support.
_LEAST_CAPABILITY = (8, 0)


class use_triton:
    """Choose whether the Triton kernels may run, from here on or within a ``with`` block.

    Convention: the environment variable ``LOCAL_DISTILL_TRITON``, read once, sets the start:
    ``0``, ``1`` or ``auto`` (the default). The choice is the process's, not the thread's, as
    backward runs in threads of its own.

    Args:
        enabled: ``"auto"``: where all tensors lie on a GPU that Triton supports, and Triton is
            installed and runs. ``False``: never. ``True``: as ``"auto"``, on older GPUs too, and on
            the CPU where Triton interprets (``TRITON_INTERPRET=1``), which is for tests.

    Raises:
        ConfigError: another value.

    Example:
        >>> from local_distill.kernels import use_triton
        >>> with use_triton(False):
        ...     pass  # plain torch, everywhere
    """

    _setting: Setting | None = None  # None: the environment has not been asked yet

    def __init__(self, enabled: Setting) -> None:
        if enabled not in (True, False, "auto"):
            raise ConfigError(f'`enabled` must be True, False or "auto", got {enabled!r}')
        self._before = _setting()
        use_triton._setting = enabled

    def __enter__(self) -> use_triton:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        use_triton._setting = self._before


def triton_serves(*tensors: Tensor) -> bool:
    """Whether a Triton kernel may work on these tensors: not in a graph being traced.

    Compilers fuse the plain forms themselves. Triton is not loaded where the tensors lie on a CPU.
    """
    if torch.compiler.is_compiling():
        return False
    setting = _setting()
    devices = {one.device for one in tensors}
    if setting is False or len(devices) != 1 or not all(map(_has_memory, tensors)):
        return False
    (device,) = devices
    if device.type == "cpu":
        return setting is True and _interprets()
    return device.type == "cuda" and _runs_on(device, setting is True)


def launching_on(like: Tensor) -> AbstractContextManager[object]:
    """Context in which kernels go to the device of this tensor."""
    return torch.cuda.device(like.device) if like.device.type == "cuda" else nullcontext()


def _has_memory(tensor: Tensor) -> bool:
    """Whether it is what it seems: no subclass, none that stands for many under vmap."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _setting() -> Setting:
    if use_triton._setting is None:
        text = os.environ.get(_VARIABLE, "auto")
        if text not in _VALUES:
            raise ConfigError(
                f"the environment variable {_VARIABLE} must be 0, 1 or auto, got {text!r}"
            )
        use_triton._setting = _VALUES[text]
    return use_triton._setting


def _is_installed() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and _is_installed()


@functools.cache
def _runs_on(device: torch.device, old_ones: bool) -> bool:
    """Whether Triton works there: it needs a C compiler too, which not every machine has.

    And whether the kernels give what their plain forms give: a device, a driver and a compiler that
    they have never met are tried once a process before they are trusted.
    """
    if not old_ones and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    if not _is_installed():
        return False
    try:
        from local_distill.kernels.triton_trial import try_triton

        try_triton(device)
    except Exception as error:  # whatever it may be, the plain forms run
        warnings.warn(
            f"Triton is installed but does not work on {device} ({type(error).__name__}: {error}); "
            "the plain forms in torch run instead. LOCAL_DISTILL_TRITON=0 says so silently",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
