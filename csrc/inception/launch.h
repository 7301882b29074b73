// Launches the kernel. The border between host code, which may know torch, and CUDA code, which does not.
#pragma once

#include "params.h"

namespace googlenet_fused {

// Launches on the current device. ``stream`` is a cudaStream_t. Returns a cudaError_t; cudaSuccess is 0.
int launch_inception(Element element, const Params &params, void *stream);

const char *error_text(int error);

} // namespace googlenet_fused
