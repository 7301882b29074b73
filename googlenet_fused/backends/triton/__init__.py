"""The Triton backend: fused branches straight into the concat buffer, on GPUs from sm_80 on, with nothing but torch installed.

With ``TRITON_INTERPRET=1`` in the environment its kernels run on CPU tensors, slowly: for tests, and only if asked for by name.
"""

from googlenet_fused.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
