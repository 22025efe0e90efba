// What a test in Python asks of the emulated device, by ctypes (tests/emulated.py).
#include "emulation.h"

#define CONTROL extern "C" __attribute__((visibility("default")))

/// The device will have so many devices, at most 4.
CONTROL void emulation_set_devices(int count) { emulation::host.devices = std::min(count, 4); }

/// Kernels launched on a device, in a graph or out of it, since the program started.
CONTROL int64_t emulation_launches(int device) {
  return emulation::host.launches.at(static_cast<size_t>(device));
}

/// The calling thread's device.
CONTROL int emulation_device() { return emulation::device; }

/// The launch after `before` others fails, as one that wants too many registers does. Negative: none.
CONTROL void emulation_fail_launch(int before) { emulation::host.launches_to_failure = before + 1; }

/// A stream of a device, for as long as the program runs.
CONTROL void* emulation_make_stream(int device) {
  const int before = std::exchange(emulation::device, device);
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  emulation::device = before;
  return stream;
}
