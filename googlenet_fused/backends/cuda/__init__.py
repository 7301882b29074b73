"""The CUDA C++ backend: a module in one launch, on GPUs from sm_80 on, by a library that installing builds.

``cuda_sim`` runs the same kernel on CPU tensors, simulated: for tests, and only if asked for by name.
"""

from googlenet_fused.backends.cuda.backend import CudaBackend
from googlenet_fused.backends.cuda.simulation import CudaSimulationBackend

__all__ = ["CudaBackend", "CudaSimulationBackend"]
