// A stand-in for the CUDA driver: devices whose memory is the host's and whose
// kernels are the project's own, compiled for the CPU by emulate.hpp. It
// behaves as the driver does where a caller could be wrong: contexts are per
// thread, launches are asynchronous, what is not asked for in order fails.

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include "emulate.hpp"
#include "standin.hpp"

// What of CUDA's driver API is here, by the names that the library exports.
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct Context*;
using CUmodule = struct Module*;
using CUfunction = struct KernelHandle*;
using CUstream = struct Stream*;

namespace {

constexpr CUresult CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_NOT_INITIALIZED = 3, CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200, CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400, CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709;
constexpr unsigned CU_MEMHOSTALLOC_PORTABLE = 1;

constexpr int kDevices = 32;

struct Function {
  CUcontext context;
  standin::Binder binder;
};

struct State {
  std::mutex mutex;
  bool started = false;
  std::string log;
  std::map<std::string, int> failures;
  bool reset = false;
  std::deque<standin::Bound> queues[kDevices];
  std::map<void*, size_t> host_memory;
  std::deque<Function> functions;
};

// Never destroyed: threads may still call at the process's end.
State& Standin() {
  static State* const state = new State;
  return *state;
}

std::map<std::string, standin::Binder>& Kernels() {
  static auto* const kernels = new std::map<std::string, standin::Binder>;
  return *kernels;
}

thread_local CUcontext current = nullptr;

// A context stands for its device's number, a module for its context. Beside
// its primary context a device has one that a library may have made.
CUcontext ContextOf(CUdevice device, bool primary = true) {
  return reinterpret_cast<CUcontext>(
      static_cast<intptr_t>(device) + 1 + (primary ? 0 : kDevices));
}
CUdevice DeviceOf(CUcontext context) {
  return static_cast<CUdevice>(
      (reinterpret_cast<intptr_t>(context) - 1) % kDevices);
}

// The work of the current context's device.
std::deque<standin::Bound>& Queue() {
  return Standin().queues[DeviceOf(current)];
}

// The lock and the log of one call.
struct Call {
  explicit Call(const char* function) : lock(Standin().mutex) {
    State& state = Standin();
    state.log.append(function).append(" ");
    const auto failure = state.failures.find(function);
    if (failure != state.failures.end()) {
      result = static_cast<CUresult>(failure->second);
      state.failures.erase(failure);
    } else if (!state.started && strcmp(function, "cuInit") != 0) {
      result = CUDA_ERROR_NOT_INITIALIZED;
    }
  }
  const std::lock_guard<std::mutex> lock;
  CUresult result = CUDA_SUCCESS;
};

}  // namespace

void standin::Register(const char* name, Binder binder) {
  Kernels()[name] = binder;
}

#define CALL() \
  const Call call(__func__); \
  if (call.result != CUDA_SUCCESS) { return call.result; }
#define REFUSE_IF(condition, error) \
  if (condition) { return error; }

extern "C" {

CUresult cuInit(unsigned flags) {
  CALL();
  REFUSE_IF(flags != 0, CUDA_ERROR_INVALID_VALUE);
  Standin().started = true;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  CALL();
  REFUSE_IF(device < 0 || device >= kDevices, CUDA_ERROR_INVALID_DEVICE);
  *context = ContextOf(device);
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(CUcontext* context, unsigned, CUdevice device) {
  CALL();
  REFUSE_IF(device < 0 || device >= kDevices, CUDA_ERROR_INVALID_DEVICE);
  *context = current = ContextOf(device, false);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  CALL();
  REFUSE_IF(Standin().reset && context, CUDA_ERROR_CONTEXT_IS_DESTROYED);
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  CALL();
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  CALL();
  REFUSE_IF(!current, CUDA_ERROR_INVALID_CONTEXT);
  unsigned magic;
  memcpy(&magic, image, sizeof(magic));
  REFUSE_IF(magic != 0xba55ed50, CUDA_ERROR_INVALID_IMAGE);  // a fat binary
  *module = reinterpret_cast<CUmodule>(current);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module,
    const char* name) {
  CALL();
  const auto kernel = Kernels().find(name);
  REFUSE_IF(kernel == Kernels().end(), CUDA_ERROR_NOT_FOUND);
  auto& functions = Standin().functions;
  functions.push_back({reinterpret_cast<CUcontext>(module), kernel->second});
  *function = reinterpret_cast<CUfunction>(&functions.back());
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y,
    unsigned grid_z, unsigned threads_x, unsigned threads_y, unsigned threads_z,
    unsigned shared, CUstream stream, void** args, void** extra) {
  CALL();
  const Function& function = *reinterpret_cast<Function*>(handle);
  REFUSE_IF(current != function.context, CUDA_ERROR_INVALID_HANDLE);
  REFUSE_IF(grid_x < 1 || grid_x > 0x7fffffff || grid_y < 1 || grid_y > 0xffff
      || grid_z != 1 || threads_x < 1 || threads_x > emulate::kMostThreads
      || threads_y != 1 || threads_z != 1 || shared != 0 || stream || extra,
      CUDA_ERROR_INVALID_VALUE);
  Queue().push_back([=, kernel = function.binder(args)] {
    emulate::Launch({grid_x, grid_y, 1}, {threads_x, 1, 1}, kernel);
  });
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes,
    CUstream stream) {
  CALL();
  REFUSE_IF(!current, CUDA_ERROR_INVALID_CONTEXT);
  REFUSE_IF(stream, CUDA_ERROR_INVALID_VALUE);
  Queue().push_back([=] {
    memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  });
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes,
    CUstream stream) {
  CALL();
  REFUSE_IF(!current, CUDA_ERROR_INVALID_CONTEXT);
  REFUSE_IF(stream, CUDA_ERROR_INVALID_VALUE);
  Queue().push_back([=] {
    memset(reinterpret_cast<void*>(to), value, bytes);
  });
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  {
    CALL();
    REFUSE_IF(!current, CUDA_ERROR_INVALID_CONTEXT);
    REFUSE_IF(stream, CUDA_ERROR_INVALID_VALUE);
  }
  standin_synchronize();
  return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** address, size_t bytes, unsigned flags) {
  CALL();
  REFUSE_IF(!current, CUDA_ERROR_INVALID_CONTEXT);
  REFUSE_IF(!(flags & CU_MEMHOSTALLOC_PORTABLE), CUDA_ERROR_INVALID_VALUE);
  *address = malloc(bytes);
  Standin().host_memory[*address] = bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void* address) {
  CALL();
  REFUSE_IF(!Standin().host_memory.erase(address), CUDA_ERROR_INVALID_VALUE);
  free(address);
  return CUDA_SUCCESS;
}

// Not in the log: they do nothing to a device.
CUresult cuGetErrorName(CUresult, const char** text) {
  *text = "CUDA_ERROR_OF_THE_STANDIN";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}

void standin_enqueue(void (*run)(void*), void* data) {
  const std::lock_guard<std::mutex> lock(Standin().mutex);
  Queue().push_back([=] { run(data); });
}

void standin_synchronize() {
  std::deque<standin::Bound> queue;
  {
    const std::lock_guard<std::mutex> lock(Standin().mutex);
    queue.swap(Queue());
  }
  for (const standin::Bound& work : queue) { work(); }
}

const char* standin_log() {
  static thread_local std::string log;
  const std::lock_guard<std::mutex> lock(Standin().mutex);
  log = Standin().log;
  return log.c_str();
}

void standin_clear_log() {
  const std::lock_guard<std::mutex> lock(Standin().mutex);
  Standin().log.clear();
}

void standin_fail(const char* function, int code) {
  const std::lock_guard<std::mutex> lock(Standin().mutex);
  Standin().failures[function] = code;
}

void standin_reset(bool reset) {
  const std::lock_guard<std::mutex> lock(Standin().mutex);
  State& state = Standin();
  state.reset = reset;
  for (const auto& memory : state.host_memory) { free(memory.first); }
  state.host_memory.clear();
}

size_t standin_host_bytes() {
  const std::lock_guard<std::mutex> lock(Standin().mutex);
  size_t bytes = 0;
  for (const auto& memory : Standin().host_memory) { bytes += memory.second; }
  return bytes;
}

}  // extern "C"
