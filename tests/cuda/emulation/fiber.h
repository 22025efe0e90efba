// Fibers: stacks that switch to one another, and the calls that tell the sanitizers about it. On x86-64 a
// switch saves only the registers that the System V ABI preserves. Elsewhere, or with EMULATION_UCONTEXT, it
// uses ucontext, which makes a system call for the signal mask on every switch and is far slower.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

// Present only if the program is built with that sanitizer.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
}

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
extern "C" void emulation_switch(void** from, void* to);
// Pushes the preserved registers and control words, stores the stack pointer, and pops them from the other
// stack.
asm(R"(
.text
.p2align 4
.type emulation_switch, @function
.hidden emulation_switch
.globl emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size emulation_switch, .-emulation_switch
)");
#endif

namespace emulation {

inline bool under_tsan() { return __tsan_switch_to_fiber != nullptr; }

/// A stack, and where it was left. The host's own stack is a Fiber without memory.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (memory_ == nullptr) return;
    if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack(), kStackBytes);
    munmap(memory_, kGuardBytes + kStackBytes);
  }

  /// A stack that will run `entry`, which never returns. `colour` shifts the start of the stack, so that the
  /// ends of many stacks fall into different cache sets.
  void create(void (*entry)(), unsigned colour) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, kGuardBytes, PROT_NONE);  // makes stack overflow a fault
    if (under_tsan()) tsan_ = __tsan_create_fiber(0);
    prepare(entry, colour % 32 * 320);
  }

  /// For the host: call on the stack from which the first switch will be made.
  void adopt_host() {
    if (under_tsan()) tsan_ = __tsan_get_current_fiber();
  }

  /// Switches to this fiber from `from`, the running one. Orders no memory accesses for the race detector.
  void resume(Fiber& from) {
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake_stack_, bottom_, bytes_);
    if (under_tsan()) __tsan_switch_to_fiber(tsan_, kNoSynchronization);
    leaving_ = &from;
    switch_from(from);
    from.arrived();  // runs when some fiber has switched back
  }

  /// Must be called first on a new stack, and after each switch: tells AddressSanitizer, and stores the
  /// bounds of the host's stack.
  void arrived() {
    if (!__sanitizer_finish_switch_fiber) return;
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
    if (leaving_ != nullptr && leaving_->memory_ == nullptr) {
      leaving_->bottom_ = bottom;
      leaving_->bytes_ = bytes;
    }
  }

 private:
  static constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;
  static constexpr unsigned kNoSynchronization = 1;

  char* stack() const { return memory_ + kGuardBytes; }

#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
  void prepare(void (*entry)(), size_t offset) {
    bottom_ = stack();
    bytes_ = kStackBytes;
    auto* top = reinterpret_cast<uint64_t*>(stack() + kStackBytes - 64 - offset / 16 * 16);
    *--top = 0;  // no return address: unwinding ends here; also aligns the stack as the ABI wants at an entry
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int preserved = 0; preserved < 6; ++preserved) *--top = 0;
    --top;
    asm volatile("stmxcsr (%0)\n fnstcw 4(%0)" : : "r"(top) : "memory");
    stopped_ = top;
  }
  void switch_from(Fiber& from) { emulation_switch(&from.stopped_, stopped_); }
  void* stopped_ = nullptr;
#else
  void prepare(void (*entry)(), size_t) {
    bottom_ = stack();
    bytes_ = kStackBytes;
    getcontext(&stopped_);
    stopped_.uc_stack.ss_sp = stack();
    stopped_.uc_stack.ss_size = kStackBytes;
    stopped_.uc_link = nullptr;
    makecontext(&stopped_, entry, 0);
  }
  void switch_from(Fiber& from) { swapcontext(&from.stopped_, &stopped_); }
  ucontext_t stopped_{};
#endif

  char* memory_ = nullptr;
  const void* bottom_ = nullptr;  // of the stack, for AddressSanitizer
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
  Fiber* leaving_ = nullptr;  // the fiber that switched to this one last
};

}  // namespace emulation
