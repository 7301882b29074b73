#include "../launch.cuh"

template int googlenet_fused::launch<googlenet_fused::Element::kHalf>(const Params &, void *);
