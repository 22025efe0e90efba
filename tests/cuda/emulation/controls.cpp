// The functions by which a Python test controls the emulated device, through ctypes (tests/emulated.py).
#include <cxxabi.h>

#include <iomanip>
#include <memory>
#include <sstream>

#include "emulation.h"

#define CONTROL extern "C" __attribute__((visibility("default")))

/// Sets the number of devices, at most 4.
CONTROL void emulation_set_devices(int count) { emulation::host.devices = std::min(count, 4); }

/// The number of kernels launched on a device, inside graphs and outside, since the program started.
CONTROL int64_t emulation_launches(int device) {
  return emulation::host.launches.at(static_cast<size_t>(device));
}

/// The calling thread's device.
CONTROL int emulation_device() { return emulation::device; }

/// Makes the launch after `before` others fail like one that needs too many registers. Negative: none fails.
CONTROL void emulation_fail_launch(int before) { emulation::host.launches_to_failure = before + 1; }

/// A stream of a device; it is never destroyed.
CONTROL void* emulation_make_stream(int device) {
  const int before = std::exchange(emulation::device, device);
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  emulation::device = before;
  return stream;
}

/// Logs the kernels that run (1), logs them without running them (2), or does neither (0). Empties the log.
CONTROL void emulation_log(int mode) {
  emulation::host.log_mode = static_cast<emulation::LogMode>(mode);
  emulation::host.log.clear();
}

/// The log as JSON: a list of launches in the order in which they ran. Valid until the next call.
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
         << ", \"early\": " << (l.early ? "true" : "false") << ", \"instructions\": " << l.work.instructions
         << ", \"phases\": " << l.work.phases << ", \"cycles\": " << l.work.cycles
         << ", \"busy_cycles\": " << l.work.busy_cycles << ", \"part_bytes\": " << l.work.part_bytes
         << ", \"seconds\": " << l.seconds << "}";
  }
  text = json.str() + "]";
  return text.c_str();
}

/// Begins a capture of the stream, as a user would.
CONTROL void emulation_begin_capture(void* stream) {
  cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeGlobal);
}

/// Ends the capture; returns the graph, or null if the capture was invalidated.
CONTROL void* emulation_end_capture(void* stream) {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph);
  return graph;
}

CONTROL void emulation_replay(void* graph) { cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), nullptr); }
