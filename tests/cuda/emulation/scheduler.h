// The scheduler of emulation.cpp: which thread runs, on which stack, and which threads continue when a
// barrier opens.
//
// A thread runs until it waits or returns. When it waits, it switches directly to the next thread that is
// ready; when it returns, the next thread that has not started runs on its stack. So a kernel without
// barriers runs all its threads on one stack and never switches. The thread that completes a barrier makes
// all threads that wait there ready.
//
// For the race detector each thread is a TSan fiber with its own stack, and a switch orders no memory
// accesses. Only barriers do: every thread releases its `arrived`; the thread that completes the barrier
// acquires all of them and releases its `opened`, which the others acquire when they continue. Both objects
// belong to a thread, not to a barrier, so that a thread which reaches the next barrier early orders nothing
// yet. Between switches, this code may not allocate, nor call memset or memcpy on data that threads share:
// the sanitizers see that.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#include "fiber.h"
#include "symbols.h"
#include "warpgroup.h"

namespace emulation {
namespace {

enum class State { fresh, running, at_block_barrier, at_warp_barrier, returned };

struct Place {  // of a call in a kernel
  const char* file = nullptr;
  unsigned line = 0;
  Place() = default;
  explicit Place(const std::source_location& l) : file(l.file_name()), line(l.line()) {}
  bool operator==(const Place& o) const {
    return line == o.line && (file == o.file || std::strcmp(file, o.file) == 0);
  }
  std::string words() const { return std::string(file) + ":" + std::to_string(line); }
};

constexpr size_t kThreadsAtMost = 1024;
constexpr size_t kExchangeAtMost = 256;  // bytes of one lane
constexpr unsigned kAllLanes = ~0u;      // instead of the index of a lane

/// What a lane gives at a warp's barrier, and where it receives its result.
struct Exchange {
  const char* name = nullptr;
  const void* mine = nullptr;
  size_t bytes = 0;
  unsigned from = 0;  // a lane, or kAllLanes
  void* received = nullptr;
  bool orders_memory = false;
};

struct Copy {  // an asynchronous copy that has not been written yet
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
  int64_t group;
};

struct Product {  // of a warpgroup, that has not been computed yet
  WarpgroupProduct product;
  int64_t group;
};

struct Thread {
  State state;
  Fiber* fiber;
  uint3 index;
  Place place;  // where it waits
  unsigned mask;
  Exchange exchange;
  std::vector<Copy> copies;
  int64_t groups;  // of copies, committed
  std::vector<Product> products;
  int64_t product_groups;
  bool published, begun;  // shared memory and the registers of products, since the last wait for products
  bool vote, waited;      // its last predicate; whether it has waited for the kernels before this one
  char arrived, opened;   // for the race detector, which uses only their addresses
  char* opened_by_other;  // what to acquire when continuing; null: nothing
};

struct Runtime {
  std::mutex mutex;  // held during a launch
  Schedule schedule = Schedule::forward;
  bool schedule_known = false;
  uint64_t random = 1;
  int64_t switches = 0;

  void (*kernel)(const void* arguments) = nullptr;
  const void* arguments = nullptr;

  std::vector<Thread> threads;  // the first `count` are the block's
  size_t count = 0, current = 0, returned = 0, at_block = 0;
  Place block_place;                        // where threads wait at the block's barrier
  unsigned waiting[kThreadsAtMost / 32]{};  // by warp: a bit for every lane at a barrier of its warp
  unsigned ready[kThreadsAtMost];           // a ring of the threads that are ready, in order
  size_t ready_first = 0, ready_count = 0;

  Fiber host;
  std::deque<Fiber> fibers;
  std::vector<Fiber*> free_fibers;
  std::exception_ptr failure;
  char started = 0, finished = 0;  // for the race detector

  Symbols symbols;                 // empty before the first launch
  std::set<const void*> launched;  // the kernels that have been launched
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  bool early = false;                            // the launch may start before the previous kernel has ended
  unsigned char gathered[32 * kExchangeAtMost];  // the bytes of a warp's lanes during an exchange
} r;

Thread& running() { return r.threads[r.current]; }

void acquire(char* object) {
  if (__tsan_acquire) __tsan_acquire(object);
}
void release(char* object) {
  if (__tsan_release) __tsan_release(object);
}

uint64_t random_below(uint64_t n) {  // xorshift64*
  r.random ^= r.random >> 12;
  r.random ^= r.random << 25;
  r.random ^= r.random >> 27;
  return (r.random * 2685821657736338717u >> 33) % n;
}

// -------------------------------------------------------------------------------------------- failures
std::string words(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}
std::string words_of_block() {
  return " in block " + words(indices.block.x, indices.block.y, indices.block.z);
}

/// Ends the launch: run_kernel catches the exception, and the host rethrows it.
[[noreturn]] void give_up(const std::string& what) {
  const uint3& i = indices.thread;
  throw std::runtime_error("emulation: " + what + ": thread " + words(i.x, i.y, i.z) + words_of_block());
}

/// The error when no thread is ready but not all have returned.
std::runtime_error deadlock() {
  const Thread* stuck = nullptr;  // in a warp
  size_t in_warps = 0;
  for (size_t i = r.count; i-- > 0;) {
    if (r.threads[i].state != State::at_warp_barrier) continue;
    stuck = &r.threads[i];
    ++in_warps;
  }
  std::string what = "emulation: divergent barrier: of " + std::to_string(r.count) + " threads ";
  if (r.at_block > 0) {
    what += std::to_string(r.at_block) + " wait at __syncthreads (" + r.block_place.words() + "), ";
  }
  if (stuck != nullptr) {
    what += std::to_string(in_warps) + " wait for lanes of their warp at " + stuck->exchange.name + " (" +
            stuck->place.words() + "), ";
  }
  return std::runtime_error(what + std::to_string(r.returned) + " have returned" + words_of_block());
}

// ------------------------------------------------------------------------------------------- switching
unsigned& ready_at(size_t i) { return r.ready[(r.ready_first + i) % kThreadsAtMost]; }

void make_ready(size_t thread) { ready_at(r.ready_count++) = static_cast<unsigned>(thread); }

/// Removes the next thread to run from the ring; false where none is ready.
bool next_thread(size_t* next) {
  if (r.ready_count == 0) return false;
  if (r.schedule == Schedule::shuffled) std::swap(ready_at(0), ready_at(random_below(r.ready_count)));
  *next = ready_at(0);
  ++r.ready_first;
  --r.ready_count;
  return true;
}

void make_current(size_t thread) {
  r.current = thread;
  running().state = State::running;
  indices.thread = running().index;
  lane = static_cast<unsigned>(thread) % 32;
}

void run_threads();

/// Under the race detector, every thread has its own stack. The host creates them: it is ordered before all.
void create_fibers_for_tsan() {
  if (!under_tsan()) return;
  while (r.fibers.size() < r.count) r.fibers.emplace_back().create(run_threads, r.fibers.size());
}

/// The stack for a thread that starts.
Fiber* new_fiber(size_t thread) {
  if (under_tsan()) return &r.fibers[thread];
  if (r.free_fibers.empty()) {
    r.fibers.emplace_back().create(run_threads, r.fibers.size());
    return &r.fibers.back();
  }
  Fiber* fiber = r.free_fibers.back();
  r.free_fibers.pop_back();
  return fiber;
}

void switch_to(Fiber& from, size_t next) {
  Thread& t = r.threads[next];
  if (t.state == State::fresh) t.fiber = new_fiber(next);
  make_current(next);
  ++r.switches;
  t.fiber->resume(from);
}

/// Waits, in the state that the caller has set, until this thread has been made ready and is next.
void wait_for_turn() {
  Thread& me = running();
  release(&r.finished);  // so that the host may continue if the launch fails
  size_t next;
  if (!next_thread(&next)) throw deadlock();
  if (&r.threads[next] == &me) {
    make_current(next);
  } else {
    switch_to(*me.fiber, next);
  }
  if (me.opened_by_other != nullptr) acquire(me.opened_by_other);
}

/// Makes a waiting thread ready.
void wake(size_t thread, char* opened) {
  r.threads[thread].opened_by_other = opened;
  make_ready(thread);
}

template <class F>
void for_each_in_order(size_t first, size_t last, const F& f) {
  if (r.schedule == Schedule::backward) {
    for (size_t i = last; i-- > first;) f(i);
  } else {
    for (size_t i = first; i < last; ++i) f(i);
  }
}

// --------------------------------------------------------------------------------------------- running
std::exception_ptr run_kernel() {
  try {
    r.kernel(r.arguments);
    if (r.early && !running().waited)
      give_up("a kernel launched with programmatic dependent launch does not wait for those before it");
    if (!running().products.empty()) give_up("a product of a warpgroup that is not waited for");
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

/// Runs one thread from beginning to end. False where the block ends with it.
bool run_thread(size_t* next) {
  acquire(&r.started);
  r.failure = run_kernel();
  if (r.failure) return false;
  running().state = State::returned;
  ++r.returned;
  if (next_thread(next)) return true;
  if (r.returned < r.count) r.failure = std::make_exception_ptr(deadlock());
  return false;
}

/// The body of every fiber: runs one thread after the other. Where the next thread waits on another stack, it
/// switches there, and this stack becomes free.
void run_threads() {
  Fiber& fiber = *running().fiber;
  fiber.arrived();
  for (;;) {
    size_t next;
    const bool more = run_thread(&next);
    release(&r.finished);
    if (more && r.threads[next].state == State::fresh && !under_tsan()) {
      r.threads[next].fiber = &fiber;
      make_current(next);
      continue;
    }
    if (!under_tsan()) r.free_fibers.push_back(&fiber);
    if (more) {
      switch_to(fiber, next);
    } else {
      r.host.resume(fiber);
    }
  }
}

/// Runs all threads of a block; called on the host's stack.
void run_block() {
  r.returned = r.at_block = 0;
  for (unsigned& lanes : r.waiting) lanes = 0;
  for (size_t i = 0; i < r.count; ++i) {
    r.threads[i].state = State::fresh;
    r.threads[i].groups = 0;
    r.threads[i].vote = r.threads[i].waited = false;
    r.threads[i].copies.clear();
    r.threads[i].product_groups = 0;
    r.threads[i].published = r.threads[i].begun = false;
    r.threads[i].products.clear();
  }
  r.ready_count = 0;
  for_each_in_order(0, r.count, make_ready);
  release(&r.started);
  create_fibers_for_tsan();
  size_t first;
  next_thread(&first);
  switch_to(r.host, first);
  acquire(&r.finished);
  if (r.failure) {  // threads that wait are still on their stacks
    r.free_fibers.clear();
    r.fibers.clear();
    std::rethrow_exception(std::exchange(r.failure, nullptr));
  }
}

}  // namespace
}  // namespace emulation
