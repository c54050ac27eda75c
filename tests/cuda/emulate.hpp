// Runs CUDA kernels on the CPU: a source file that includes this header before
// a .cu file compiles with g++ -std=c++20, and emulate::Launch runs what it
// defines. It has as much of CUDA as the project's kernels use.
//
// Blocks run on a few OS threads at once. The CUDA threads of a block are
// fibers of its OS thread, which switch at barriers and warp functions only,
// in an order that changes from block to block. ThreadSanitizer is told that
// each fiber is a thread of its own, ordered by nothing but barriers: it finds
// the races that a GPU could have, whatever the order was here. Warp functions
// order no memory, as on the GPU. AddressSanitizer sees every access.
//
// A barrier that not all live threads of the block reach, a warp function
// whose mask names a lane that is elsewhere, a shuffle from a lane outside the
// mask: undefined on a GPU, an error that ends the process here.
#ifndef TESTS_CUDA_EMULATE_HPP_
#define TESTS_CUDA_EMULATE_HPP_

#include <math.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <numeric>
#include <source_location>
#include <thread>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
// The fibers of a block share the variables of their OS thread.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
};

// The emulator moves between fibers that must look like unordered threads, so
// its own memory is hidden from ThreadSanitizer.
#define EMULATOR __attribute__((no_sanitize("thread"), noinline))

namespace emulate {

using Site = std::source_location;
inline constexpr unsigned kWarp = 32, kMostThreads = 1024, kWorkers = 4;
inline constexpr size_t kStack = 256 << 10;
// Without it ThreadSanitizer must find the races that barriers prevent.
#ifdef EMULATE_UNORDERED_BARRIERS
inline constexpr bool kBarriersOrder = false;
#else
inline constexpr bool kBarriersOrder = true;
#endif

enum class At { kReady, kBarrier, kWarpFunction, kDone };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  unsigned index = 0;
  At at = At::kDone;
  // At a barrier or a warp function: where in the source, and its operands.
  unsigned line = 0;
  unsigned mask = 0;
  unsigned source = 0;  // the lane whose value is wanted
  bool predicate = false;
  uint64_t value = 0;
  uint64_t result = 0;
  unsigned votes = 0;  // the lanes of the mask whose value is not 0
};

[[noreturn]] inline void Fail(const char* what, const Fiber& fiber) {
  std::fprintf(stderr, "emulated kernel: thread %u, line %u: %s\n",
      fiber.index, fiber.line, what);
  std::_Exit(1);
}

// What runs the blocks of one OS thread.
struct Worker {
  Fiber host;
  std::vector<Fiber> fibers;
  Fiber* self = nullptr;
  const std::function<void()>* kernel = nullptr;
  dim3 threads{}, block{}, grid{};
  unsigned live = 0, waiting = 0, stride = 1, generation = 0;
  unsigned count = 0;  // of true predicates at the last barrier
  // Addresses that stand for the orders that barriers make.
  char started = 0, ended = 0, passed[2] = {};

  EMULATOR void Release(char* order) {
#ifdef __SANITIZE_THREAD__
    __tsan_release(order);
#endif
    (void)order;
  }
  EMULATOR void Acquire(char* order) {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(order);
#endif
    (void)order;
  }
  EMULATOR void SwitchTo(Fiber* to) {
    Fiber* from = self;
    if (to == from) { return; }
    self = to;
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack,
        to->stack_size);
#endif
    swapcontext(&from->context, &to->context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
  }
  // Runs another fiber until this one is ready again.
  EMULATOR void Wait() {
    const unsigned n = threads.x;
    for (unsigned i = 1; i <= n; ++i) {
      Fiber* next = &fibers[(self->index + i * stride) % n];
      if (next->at == At::kReady) { return SwitchTo(next); }
    }
    Fail("waits for threads of its block that wait elsewhere", *self);
  }
  EMULATOR void PassBarrierIfAllAreThere() {
    if (waiting == 0 || waiting < live) { return; }
    count = 0;
    const Fiber* first = nullptr;
    for (unsigned i = 0; i < threads.x; ++i) {
      Fiber& fiber = fibers[i];
      if (fiber.at != At::kBarrier) { continue; }
      if (!first) { first = &fiber; }
      if (fiber.line != first->line) {
        Fail("at another barrier than the first thread of its block", fiber);
      }
      count += fiber.predicate;
      fiber.at = At::kReady;
    }
    waiting = 0;
    ++generation;
  }
  EMULATOR unsigned Barrier(bool predicate, Site site) {
    self->at = At::kBarrier;
    self->line = site.line();
    self->predicate = predicate;
    // Two orders in turn: who leaves late must not see the next barrier's.
    char* order = &passed[generation % 2];
    if (kBarriersOrder) { Release(order); }
    ++waiting;
    PassBarrierIfAllAreThere();
    if (self->at != At::kReady) { Wait(); }
    if (kBarriersOrder) { Acquire(order); }
    return count;
  }
  // The lanes of `mask` meet; self->result is then set.
  EMULATOR void Meet(unsigned mask, unsigned source, uint64_t value,
      Site site) {
    Fiber* const lanes = &fibers[self->index / kWarp * kWarp];
    const unsigned lane = self->index % kWarp;
    self->at = At::kWarpFunction;
    self->line = site.line();
    self->mask = mask;
    self->source = source;
    self->value = value;
    if (!(mask >> lane & 1)) { Fail("not in the mask of its own call", *self); }
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) { continue; }
      if (self->index - lane + i >= threads.x || lanes[i].at == At::kDone) {
        Fail("its mask names a lane that has ended", *self);
      }
      if (lanes[i].at != At::kWarpFunction) { return Wait(); }
      if (lanes[i].line != self->line || lanes[i].mask != mask) {
        Fail("a lane of its mask is at another warp function", *self);
      }
    }
    unsigned votes = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1 && lanes[i].value != 0) { votes |= 1u << i; }
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) { continue; }
      if (!(mask >> lanes[i].source & 1)) {
        Fail("reads a lane outside the mask", lanes[i]);
      }
      lanes[i].result = lanes[lanes[i].source].value;
      lanes[i].votes = votes;
      lanes[i].at = At::kReady;
    }
  }
  EMULATOR void RunFiber() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    for (;;) {  // a block each
      Acquire(&started);
      (*kernel)();
      Release(&ended);
      self->at = At::kDone;
      --live;
      PassBarrierIfAllAreThere();
      if (live == 0) { SwitchTo(&host); } else { Wait(); }
    }
  }
  static EMULATOR void Entry(unsigned low, unsigned high) {
    reinterpret_cast<Worker*>(uintptr_t{high} << 32 | low)->RunFiber();
  }
  EMULATOR void MakeFibers() {
#ifdef __SANITIZE_THREAD__
    host.tsan = __tsan_get_current_fiber();
#endif
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &host.stack, &host.stack_size);
    pthread_attr_destroy(&attributes);
#endif
    fibers.reserve(kMostThreads);  // contexts point into themselves: no moves
  }
  EMULATOR void AddFiber() {
    Fiber& fiber = fibers.emplace_back();
    fiber.index = static_cast<unsigned>(fibers.size() - 1);
    fiber.stack_size = kStack;
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber.stack == MAP_FAILED) { Fail("no memory for its stack", fiber); }
#ifdef __SANITIZE_THREAD__
    fiber.tsan = __tsan_create_fiber(0);
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    const uintptr_t address = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(Entry), 2,
        static_cast<unsigned>(address), static_cast<unsigned>(address >> 32));
  }
  EMULATOR void RunBlock(unsigned seed) {
    if (fibers.capacity() == 0) { MakeFibers(); }
    while (fibers.size() < threads.x) { AddFiber(); }
    const unsigned n = threads.x;
    live = n;
    waiting = 0;
    for (unsigned i = 0; i < n; ++i) { fibers[i].at = At::kReady; }
    stride = (seed * 2654435761u >> 8) % n + 1;
    while (std::gcd(stride, n) != 1) { ++stride; }
    Release(&started);
    self = &host;
    SwitchTo(&fibers[seed % n]);
    Acquire(&ended);
  }
};

inline thread_local Worker worker;

// Runs all blocks of a grid, and returns when they have ended.
class Pool {
 public:
  Pool() : start_(kWorkers + 1), end_(kWorkers + 1) {
    for (unsigned i = 0; i < kWorkers; ++i) {
      threads_.emplace_back([this, i] { Work(i); });
    }
  }
  ~Pool() {
    kernel_ = nullptr;
    start_.arrive_and_wait();
    for (std::thread& thread : threads_) { thread.join(); }
  }
  void Run(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    grid_ = grid;
    block_ = threads;
    kernel_ = &kernel;
    ++launches_;
    start_.arrive_and_wait();
    end_.arrive_and_wait();
  }

 private:
  void Work(unsigned number) {
    for (;;) {
      start_.arrive_and_wait();
      if (!kernel_) { return; }
      worker.kernel = kernel_;
      worker.threads = block_;
      worker.grid = grid_;
      // Neighbours run on different OS threads, unordered.
      const uint64_t blocks = uint64_t{grid_.x} * grid_.y;
      for (uint64_t i = number; i < blocks; i += kWorkers) {
        worker.block = {static_cast<unsigned>(i % grid_.x),
            static_cast<unsigned>(i / grid_.x), 0};
        worker.RunBlock(static_cast<unsigned>(i + 31 * launches_));
      }
      end_.arrive_and_wait();
    }
  }

  std::mutex mutex_;
  std::barrier<> start_, end_;
  std::vector<std::thread> threads_;
  const std::function<void()>* kernel_ = nullptr;
  dim3 grid_{}, block_{};
  unsigned launches_ = 0;
};

inline void Launch(dim3 grid, dim3 threads,
    const std::function<void()>& kernel) {
  static Pool pool;
  pool.Run(grid, threads, kernel);
}

EMULATOR inline dim3 ThreadIndex() { return {worker.self->index, 0, 0}; }
EMULATOR inline dim3 BlockIndex() { return worker.block; }
EMULATOR inline dim3 GridSize() { return worker.grid; }
EMULATOR inline unsigned Lane() { return worker.self->index % kWarp; }

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename T>
EMULATOR T Shuffle(unsigned mask, T value, unsigned source, Site site) {
  worker.Meet(mask, source, std::bit_cast<Bits<T>>(value), site);
  return std::bit_cast<T>(static_cast<Bits<T>>(worker.self->result));
}

EMULATOR inline unsigned Ballot(unsigned mask, bool predicate, Site site) {
  worker.Meet(mask, Lane(), predicate, site);
  return worker.self->votes;
}

}  // namespace emulate

#define threadIdx (emulate::ThreadIndex())
#define blockIdx (emulate::BlockIndex())
#define gridDim (emulate::GridSize())

#define EMULATE_SITE emulate::Site site = emulate::Site::current()

inline void __syncthreads(EMULATE_SITE) {
  emulate::worker.Barrier(false, site);
}
inline int __syncthreads_count(int predicate, EMULATE_SITE) {
  return static_cast<int>(emulate::worker.Barrier(predicate != 0, site));
}
inline int __syncthreads_or(int predicate, EMULATE_SITE) {
  return emulate::worker.Barrier(predicate != 0, site) != 0;
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMULATE_SITE) {
  const unsigned lane = emulate::Lane();
  return emulate::Shuffle(mask, value,
      lane + delta < emulate::kWarp ? lane + delta : lane, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, EMULATE_SITE) {
  return emulate::Shuffle(mask, value, emulate::Lane() ^ bits, site);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, EMULATE_SITE) {
  return emulate::Shuffle(mask, value,
      static_cast<unsigned>(source) % emulate::kWarp, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATE_SITE) {
  return emulate::Ballot(mask, predicate != 0, site);
}

// Orders what the thread does before and behind it for other blocks, as on the
// GPU; atomic functions alone order nothing.
inline void __threadfence() {
  static int fences;
  __atomic_fetch_add(&fences, 1, __ATOMIC_ACQ_REL);
}
inline int atomicAdd(int* address, int value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline int atomicExch(int* address, int value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return std::countr_zero(bits) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
// A macro, since newer C libraries have a function of this name.
#define cospi(x) cos(M_PI * (x))

// -fsanitize=thread --param tsan-distinguish-volatile=1: volatile accesses are
// single transactions that may meet, on the GPU and here.
#ifdef __SANITIZE_THREAD__
#define EMULATE_VOLATILE(size) \
  extern "C" { \
  [[gnu::weak, gnu::used]] void __tsan_volatile_read##size(void*) {} \
  [[gnu::weak, gnu::used]] void __tsan_volatile_write##size(void*) {} \
  }
EMULATE_VOLATILE(1)
EMULATE_VOLATILE(2)
EMULATE_VOLATILE(4)
EMULATE_VOLATILE(8)
EMULATE_VOLATILE(16)
#undef EMULATE_VOLATILE
#endif

#endif  // TESTS_CUDA_EMULATE_HPP_
