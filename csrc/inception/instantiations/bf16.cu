#include "../launch.cuh"

template int googlenet_fused::launch<googlenet_fused::Element::kBFloat16>(const Params &, void *);
