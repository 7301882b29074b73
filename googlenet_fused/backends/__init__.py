"""Backends: the ways in which a fused module can run. The order of registration is the order of preference, the last first."""

from googlenet_fused.backends.cpu import CpuBackend
from googlenet_fused.backends.cuda import CudaBackend, CudaSimulationBackend
from googlenet_fused.backends.reference import ReferenceBackend
from googlenet_fused.backends.registry import BackendError, register, use_backend
from googlenet_fused.backends.triton import TritonBackend

register(CudaSimulationBackend())
register(ReferenceBackend())
register(CpuBackend())
register(TritonBackend())
register(CudaBackend())

__all__ = ["BackendError", "use_backend"]
