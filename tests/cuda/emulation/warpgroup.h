// Products of a warpgroup (wgmma) in the emulation: cuda/product/wgmma.h calls these functions in place of
// the instructions. A product is computed when its thread waits, from what is in shared memory then: so
// operands that are overwritten too early, or sums that are read too early, are wrong. A thread that returns
// without waiting, or that leaves out one of the two fences, is an error. That the fence of shared memory
// comes before the barrier is not checked.
#pragma once

#include "emulation.h"

namespace emulation {

/// A product that a thread has started. `compute` adds this thread's elements of the product of the matrices
/// with descriptors a and b to its `sums`.
struct WarpgroupProduct {
  void (*compute)(const WarpgroupProduct&);
  float* sums;
  uint64_t a, b;
};
/// A GPU whose instructions read the 8 x 8 elements of a core matrix the other way round: none that is known.
inline bool cores_transposed = false;
/// The address of dynamic shared memory in the shared state space, and what stands there.
uint64_t shared_address(const void* shared);
const void* shared_at(int64_t address, size_t bytes);
/// fence.proxy.async: must come between a thread's last wait for products, or its start, and its next
/// product.
void publish_shared();
/// wgmma.fence: the same.
void begin_products();
void defer_product(const WarpgroupProduct& product);
/// wgmma.commit_group: the products since the last commit become a group.
void commit_products();
/// wgmma.wait_group: all groups of this thread but the latest `pending` ones are computed.
void wait_products(int pending);

}  // namespace emulation
