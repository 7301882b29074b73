"""What one block can have on each architecture. Past that a kernel still compiles, and its launch fails."""

from __future__ import annotations

from typing import NamedTuple

from googlenet_fused.backends.triton.plans import SHARED_MEMORY

KIB = 1024


class Limits(NamedTuple):
    """Of one block."""

    shared: int
    """Bytes of shared memory, static and dynamic, that a launch can ask for."""
    registers: int
    """32-bit registers of all threads together."""
    tensor_memory: int = 0
    """Columns of tensor memory."""
    reserved: int = 0
    """Bytes of shared memory that the system takes on top and cuobjdump counts as the kernel's."""
    access: int = 16
    """Bytes a thread from which on a global access is wide. On AMD the results of an MFMA lie in fours, 8 bytes in fp16."""


LIMITS = {
    "sm_80": Limits(KIB * SHARED_MEMORY["sm_80"], 65536),
    "sm_86": Limits(KIB * SHARED_MEMORY["sm_86"], 65536),
    "sm_89": Limits(KIB * SHARED_MEMORY["sm_89"], 65536),
    "sm_90": Limits(KIB * SHARED_MEMORY["sm_90"], 65536, reserved=KIB),
    "sm_100": Limits(KIB * SHARED_MEMORY["sm_100"], 65536, tensor_memory=512, reserved=KIB),
    "sm_120": Limits(KIB * SHARED_MEMORY["sm_120"], 65536, reserved=KIB),
    "gfx942": Limits(KIB * SHARED_MEMORY["gfx942"], 131072, access=8),
}
