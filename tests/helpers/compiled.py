"""Compiles what would be launched, for a GPU that need not be there."""

import contextlib
from unittest import mock

# Hopper: the H100 and H200.
CAPABILITY = 90


class NoDevice:
    """Stands in for Triton's driver: says what to compile for, and can launch nothing."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return "none"  # what is compiled for a device is kept under its name

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiled_launches(folder):
    """A list that fills with the compiled kernel of every launch within the block.

    Each is compiled to machine code with the very arguments of its launch, and not launched.
    ``folder`` is empty: nothing compiled earlier is taken.
    """
    from triton.runtime import driver, jit

    run = jit.JITFunction.run
    launches = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    place = "_active" if hasattr(driver, "_active") else "active"  # the latter in old Triton
    with (
        mock.patch.dict("os.environ", TRITON_CACHE_DIR=str(folder)),
        mock.patch.object(driver, place, NoDevice()),
        mock.patch.object(jit.JITFunction, "run", compile_only),
    ):
        yield launches
