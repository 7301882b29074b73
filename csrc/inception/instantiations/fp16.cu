#include "../launch.cuh"

template int googlenet_fused::launch<googlenet_fused::Element::kHalf>(const googlenet_fused::Params &, int, void *);
