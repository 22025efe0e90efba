// What a test in Python asks of the emulated device, by ctypes (tests/emulated.py).
#include <cxxabi.h>

#include <iomanip>
#include <memory>
#include <sstream>

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

/// From now on kernels that run are logged (1), are logged and do nothing (2), or neither (0). The log is
/// empty.
CONTROL void emulation_log(int mode) {
  emulation::host.log_mode = static_cast<emulation::LogMode>(mode);
  emulation::host.log.clear();
}

/// The log as JSON: a list of launches, in the order in which they ran. Stands until the next call.
CONTROL const char* emulation_logged() {
  static std::string text;
  std::ostringstream json;
  json << std::setprecision(17) << "[";
  for (const emulation::Launch& l : emulation::host.log) {
    const std::string name = emulation::name_of(l.kernel);
    const std::unique_ptr<char, void (*)(void*)> readable(
        abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr), std::free);
    json << (&l == emulation::host.log.data() ? "" : ",\n") << "{\"kernel\": \""
         << (readable ? readable.get() : name.c_str()) << "\", \"grid\": [" << l.grid.x << ", " << l.grid.y
         << ", " << l.grid.z << "], \"threads\": " << l.block.x << ", \"dynamic_shared\": " << l.shared_bytes
         << ", \"static_shared\": " << emulation::static_shared_bytes(l.kernel)
         << ", \"stream\": " << reinterpret_cast<uintptr_t>(l.stream)
         << ", \"flop\": " << l.work.flop * l.grid.z << ", \"bytes\": " << l.work.bytes * l.grid.z
         << ", \"instructions\": " << l.work.instructions << ", \"seconds\": " << l.seconds << "}";
  }
  text = json.str() + "]";
  return text.c_str();
}

/// The stream begins a capture of the user's.
CONTROL void emulation_begin_capture(void* stream) {
  cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeGlobal);
}

/// Ends it; the graph, null where something has broken it.
CONTROL void* emulation_end_capture(void* stream) {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph);
  return graph;
}

CONTROL void emulation_replay(void* graph) { cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), nullptr); }
