#include "../launch.cuh"

template int googlenet_fused::launch<googlenet_fused::Element::kBFloat16>(const googlenet_fused::Params &, int, void *);
