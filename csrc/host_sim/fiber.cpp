#include "fiber.h"

#include <cstdint>
#include <cstdlib>

namespace googlenet_fused::sim {

// Saves what a function must keep, and where; takes the other's up. The System V calling convention.
extern "C" void googlenet_fused_switch_stacks(void **from, void *to);

asm(R"(
  .text
  .type googlenet_fused_switch_stacks, @function
  .globl googlenet_fused_switch_stacks
  .hidden googlenet_fused_switch_stacks
googlenet_fused_switch_stacks:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
  .size googlenet_fused_switch_stacks, .-googlenet_fused_switch_stacks
)");

namespace {

thread_local Fiber *current = nullptr; // that is switched to
thread_local Fiber *previous = nullptr;

} // namespace

void Fiber::enter() {
#if HOST_SIM_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, previous != nullptr ? &previous->bottom_ : nullptr,
                                  previous != nullptr ? &previous->bytes_ : nullptr);
#endif
}

void Fiber::begin() {
  Fiber *const self = current;
  self->enter();
  self->entry_(self->argument_);
  std::abort(); // an entry never returns
}

void Fiber::start(void (*entry)(void *), void *argument) {
  if (!stack_) stack_ = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
  entry_ = entry;
  argument_ = argument;
  bottom_ = stack_.get();
  bytes_ = kStackBytes;
  fake_stack_ = nullptr;
  const std::uintptr_t top = reinterpret_cast<std::uintptr_t>(stack_.get() + kStackBytes) / 64 * 64;
  void **pointer = reinterpret_cast<void **>(top);
  *--pointer = nullptr; // a return address for ``begin``, which leaves the stack as a call would
  *--pointer = reinterpret_cast<void *>(&Fiber::begin);
  for (int i = 0; i < 6; i++) *--pointer = nullptr;
  pointer_ = pointer;
}

void Fiber::switch_to(Fiber &to) {
  if (&to == this) return;
  previous = this;
  current = &to;
#if HOST_SIM_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.bytes_);
#endif
  googlenet_fused_switch_stacks(&pointer_, to.pointer_);
  enter();
}

void Fiber::leave_for(Fiber &to) {
  previous = this;
  current = &to;
#if HOST_SIM_ASAN
  __sanitizer_start_switch_fiber(nullptr, to.bottom_, to.bytes_);
#endif
  googlenet_fused_switch_stacks(&pointer_, to.pointer_);
  std::abort();
}

} // namespace googlenet_fused::sim
