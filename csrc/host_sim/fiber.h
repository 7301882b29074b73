// Stacks that a thread switches between.
#pragma once

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define HOST_SIM_ASAN 1
#else
#define HOST_SIM_ASAN 0
#endif

namespace googlenet_fused::sim {

constexpr std::size_t kStackBytes = HOST_SIM_ASAN ? 256 * 1024 : 64 * 1024;

// A place in the flow of control to come back to: that of a thread's own stack, or of one made by ``start``.
class Fiber {
public:
  // Makes ``entry(argument)`` run when it is switched to for the first time. It must never return.
  void start(void (*entry)(void *), void *argument);

  // Goes on at ``to``, until somebody switches here again.
  void switch_to(Fiber &to);

  // As ``switch_to``, never to be switched to again.
  [[noreturn]] void leave_for(Fiber &to);

private:
  void enter();
  static void begin();

  std::unique_ptr<unsigned char[]> stack_;
  void (*entry_)(void *) = nullptr;
  void *argument_ = nullptr;
  void *pointer_ = nullptr; // of the stack, where registers are saved
  void *fake_stack_ = nullptr; // AddressSanitizer's
  const void *bottom_ = nullptr;
  std::size_t bytes_ = 0;
};

} // namespace googlenet_fused::sim
