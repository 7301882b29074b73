// Launches the kernel. The border between host code, which may know torch, and CUDA code, which does not.
#pragma once

#include "params.h"

namespace googlenet_fused {

// Launches on the current device, a block of which may have ``most_shared_bytes``. ``stream`` is a cudaStream_t. Returns a
// cudaError_t; cudaSuccess is 0.
int launch_inception(Element element, const Params &params, int most_shared_bytes, void *stream);

// Why no kernel of this library can run with the driver that is here, or an empty text.
const char *driver_fault();

const char *error_text(int error);

} // namespace googlenet_fused
