// Random numbers that are computed from a counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel
// random numbers: as easy as 1, 2, 3"). Each can be computed at any time and in any order. So no mask of a
// dropout is stored, and masks are the same on every backend and for any number of threads.
//
// The key is the seed of the call. The counter is (element / 4, number of the mask, pass, task); word e % 4
// of the block belongs to element e. The twin in torch is maml_cuda/masks.py.
#pragma once

#include "layers/functions.h"

namespace maml {

struct PhiloxBlock {
  uint32_t word[4];
};

MAML_HOST_DEVICE inline PhiloxBlock philox(PhiloxBlock counter, uint64_t seed) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint32_t* c = counter.word;
    const uint64_t p = uint64_t{0xD2511F53} * c[0], q = uint64_t{0xCD9E8D57} * c[2];
    counter = {{static_cast<uint32_t>(q >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(q),
                static_cast<uint32_t>(p >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(p)}};
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return counter;
}

/// The random numbers of elements 4 b to 4 b + 3 of a mask.
MAML_HOST_DEVICE inline PhiloxBlock block_of(const Stream& stream, uint32_t mask, int64_t b) {
  return philox({{static_cast<uint32_t>(b), mask, stream.pass, stream.task}}, stream.seed);
}

}  // namespace maml
