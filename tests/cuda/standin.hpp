// What a test asks of the stand-in for the CUDA driver (libcuda.cpp), which
// the code under test opens as libcuda.so.1, and the kernels that it runs.
#ifndef TESTS_CUDA_STANDIN_HPP_
#define TESTS_CUDA_STANDIN_HPP_

#include <cstddef>
#include <functional>
#include <string>
#include <tuple>
#include <utility>

extern "C" {

// Queues work behind the kernels of the thread's device. Nothing in the queue
// runs before standin_synchronize: code under test that works has not waited
// for it.
void standin_enqueue(void (*run)(void*), void* data);
void standin_synchronize();
// The driver functions called since the last standin_clear_log, in order, a
// blank after each.
const char* standin_log();
void standin_clear_log();
// Lets the next call of a driver function fail with a CUresult.
void standin_fail(const char* function, int code);
// Does what cudaDeviceReset does, on every device: contexts are gone, and host
// memory of theirs; or lets the contexts be there again.
void standin_reset(bool reset);
// Bytes of host memory allocated and not freed.
size_t standin_host_bytes();

}

namespace standin {

// A kernel that got its arguments: copies, as cuLaunchKernel takes.
using Bound = std::function<void()>;
using Binder = Bound (*)(void** args);

void Register(const char* name, Binder binder);

template <typename... Param, size_t... I>
Bound Bind(void (*kernel)(Param...), void** args, std::index_sequence<I...>) {
  return [kernel, values = std::tuple<Param...>(
      *static_cast<Param*>(args[I])...)] { std::apply(kernel, values); };
}

template <typename... Param>
Bound Bind(void (*kernel)(Param...), void** args) {
  return Bind(kernel, args, std::index_sequence_for<Param...>());
}

struct Registration {
  Registration(const char* name, Binder binder) { Register(name, binder); }
};

}  // namespace standin

#define STANDIN_KERNEL(name) \
  static const standin::Registration name##_registration(#name, \
      [](void** args) { return standin::Bind(name, args); });

#endif  // TESTS_CUDA_STANDIN_HPP_
