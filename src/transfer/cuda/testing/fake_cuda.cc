// A stand-in for libcuda.so.1, for tests without a GPU: device memory is a memfd, other processes map it through
// /proc/<pid>/fd, kernels run on a thread per stream. It keeps what matters of the real thing: launches return before
// the copy, a stream keeps its order, an allocation that its owner's death took away stays mapped in those who opened
// it, a process cannot open its own handles, and memory that was not allocated here is no device memory.
//
// Two devices with peer access. BATON_FAKE_CUDA_NO_PEERS=1 takes that away.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "transfer/cuda/copy_arguments.h"
#include "base/cuda/driver.h"

using namespace baton::cuda;
using namespace baton::transfer::cuda;

struct baton::cuda::CUctx_st {
  int device;
};
struct baton::cuda::CUmod_st {};
struct baton::cuda::CUfunc_st {};
struct baton::cuda::CUevent_st {
  std::atomic<bool> reached{true};
};

namespace {

constexpr int kDevices = 2;
constexpr CUresult kInvalidValue = 1, kOutOfMemory = 2, kNoContext = 201, kNotFound = 500;

CUctx_st contexts[kDevices] = {{0}, {1}};
CUmod_st only_module;
CUfunc_st only_function;
thread_local std::deque<CUcontext> context_stack;

struct Memory {
  size_t bytes;
  int device;
  int fd;  // -1: another process's, or host memory
  bool host;
};
std::mutex memories_mutex;
std::map<CUdeviceptr, Memory>& memories() {
  static auto* all = new std::map<CUdeviceptr, Memory>();  // outlives every static destructor
  return *all;
}

/// Under the mutex.
std::map<CUdeviceptr, Memory>::iterator find_memory(CUdeviceptr address) {
  auto it = memories().upper_bound(address);
  if (it == memories().begin()) return memories().end();
  --it;
  return address < it->first + it->second.bytes ? it : memories().end();
}

struct Handle {
  int pid;
  int fd;
  uint64_t bytes;
  uint64_t inode;
};
static_assert(sizeof(Handle) <= sizeof(CUipcMemHandle));

#ifdef __SANITIZE_THREAD__
/// Two kernels may write the same block at once, as on a GPU: nobody promises an order. Not a race of ours.
__attribute__((no_sanitize("thread"))) void copy_bytes(void* to, const void* from, size_t bytes) {
  size_t done = 0;
  if (((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 7) == 0) {
    auto* out = static_cast<volatile uint64_t*>(to);
    auto* in = static_cast<const volatile uint64_t*>(from);
    for (; done + 8 <= bytes; done += 8) out[done / 8] = in[done / 8];
  }
  auto* out = static_cast<volatile char*>(to);
  auto* in = static_cast<const volatile char*>(from);
  for (; done < bytes; ++done) out[done] = in[done];
}
#else
void copy_bytes(void* to, const void* from, size_t bytes) { std::memmove(to, from, bytes); }
#endif

void copy(const CopyArguments& a) {
  if (a.block_bytes > 0) {
    if (a.block_bytes > static_cast<uint64_t>(a.units_per_piece) * a.unit_bytes) std::abort();  // would be cut off
    const BlockIds* blocks = a.pieces != 0 ? reinterpret_cast<const BlockIds*>(a.pieces) : a.inline_blocks;
    for (uint32_t i = 0; i < a.piece_count; ++i) {
      copy_bytes(reinterpret_cast<void*>(a.target + blocks[i].target * a.target_stride),
                 reinterpret_cast<const void*>(a.source + blocks[i].source * a.source_stride), a.block_bytes);
    }
  }
  const Piece* pieces = a.pieces != 0 ? reinterpret_cast<const Piece*>(a.pieces) : a.inline_pieces;
  for (uint32_t i = 0; i < (a.block_bytes > 0 ? 0 : a.piece_count); ++i) {
    if (pieces[i].bytes > static_cast<uint64_t>(a.units_per_piece) * a.unit_bytes) std::abort();  // would be cut off
    copy_bytes(reinterpret_cast<void*>(a.target + pieces[i].target_offset),
               reinterpret_cast<const void*>(a.source + pieces[i].source_offset), pieces[i].bytes);
  }
  std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(a.done_flag)).store(a.done_value, std::memory_order_release);
}

}  // namespace

struct baton::cuda::CUstream_st {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  bool busy = false, stopping = false;
  std::thread thread{[this] {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return stopping || !queue.empty(); });
      if (queue.empty()) return;
      std::function<void()> next = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      next();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }};
  ~CUstream_st() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
    }
    changed.notify_all();
    thread.join();
  }
};

namespace {
void enqueue(CUstream stream, std::function<void()> work) {
  {
    std::lock_guard lock(stream->mutex);
    stream->queue.push_back(std::move(work));
  }
  stream->changed.notify_all();
}
}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return kSuccess; }
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == kInvalidValue ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_FAKE";
  return kSuccess;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "the stand-in says no";
  return kSuccess;
}
CUresult cuDeviceGetCount(int* count) {
  *count = kDevices;
  return kSuccess;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidValue;
  *device = ordinal;
  return kSuccess;
}
CUresult cuDeviceGetName(char* name, int bytes, CUdevice) {
  std::snprintf(name, static_cast<size_t>(bytes), "stand-in");
  return kSuccess;
}
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  std::memset(uuid->bytes, 'a' + device, sizeof(uuid->bytes));
  return kSuccess;
}
CUresult cuDeviceGetPCIBusId(char* id, int bytes, CUdevice device) {
  std::snprintf(id, static_cast<size_t>(bytes), "0000:%02d:00.0", device);
  return kSuccess;
}
CUresult cuDeviceGetAttribute(int* value, int, CUdevice) {
  *value = 4;
  return kSuccess;
}
CUresult cuDeviceCanAccessPeer(int* can, CUdevice, CUdevice) {
  *can = std::getenv("BATON_FAKE_CUDA_NO_PEERS") == nullptr ? 1 : 0;
  return kSuccess;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = &contexts[device];
  return kSuccess;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return kSuccess; }
CUresult cuCtxPushCurrent_v2(CUcontext context) {
  context_stack.push_back(context);
  return kSuccess;
}
CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (context_stack.empty()) return kNoContext;
  *context = context_stack.back();
  context_stack.pop_back();
  return kSuccess;
}
CUresult cuCtxEnablePeerAccess(CUcontext, unsigned) { return kSuccess; }
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}
CUresult cuThreadExchangeStreamCaptureMode(int*) { return kSuccess; }

CUresult cuMemAlloc_v2(CUdeviceptr* memory, size_t bytes) {
  if (context_stack.empty()) return kNoContext;
  int fd = ::memfd_create("fake-gpu", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return kOutOfMemory;
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) return kOutOfMemory;
  *memory = reinterpret_cast<CUdeviceptr>(data);
  std::lock_guard lock(memories_mutex);
  memories()[*memory] = {bytes, context_stack.back()->device, fd, false};
  return kSuccess;
}
CUresult cuMemFree_v2(CUdeviceptr memory) {
  std::lock_guard lock(memories_mutex);
  auto it = memories().find(memory);
  if (it == memories().end() || it->second.fd < 0) return kInvalidValue;
  ::munmap(reinterpret_cast<void*>(memory), it->second.bytes);
  ::close(it->second.fd);
  memories().erase(it);
  return kSuccess;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  std::lock_guard lock(memories_mutex);
  auto it = find_memory(address);
  if (it == memories().end()) return kInvalidValue;
  *base = it->first;
  *bytes = it->second.bytes;
  return kSuccess;
}
CUresult cuMemsetD8_v2(CUdeviceptr memory, unsigned char value, size_t bytes) {
  std::memset(reinterpret_cast<void*>(memory), value, bytes);
  return kSuccess;
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  enqueue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes); });
  return kSuccess;
}
CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*memory == nullptr) return kOutOfMemory;
  std::lock_guard lock(memories_mutex);
  memories()[reinterpret_cast<CUdeviceptr>(*memory)] = {bytes, -1, -1, true};
  return kSuccess;
}
CUresult cuMemFreeHost(void* memory) {
  std::lock_guard lock(memories_mutex);
  memories().erase(reinterpret_cast<CUdeviceptr>(memory));
  std::free(memory);
  return kSuccess;
}
CUresult cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  if (std::getenv("BATON_FAKE_CUDA_NO_REGISTER") != nullptr) return kInvalidValue;
  std::lock_guard lock(memories_mutex);
  auto address = reinterpret_cast<CUdeviceptr>(memory);
  return memories().try_emplace(address, Memory{bytes, -1, -1, true}).second ? kSuccess : kInvalidValue;
}
CUresult cuMemHostUnregister(void* memory) {
  std::lock_guard lock(memories_mutex);
  return memories().erase(reinterpret_cast<CUdeviceptr>(memory)) == 1 ? kSuccess : kInvalidValue;
}
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned) {
  *device = reinterpret_cast<CUdeviceptr>(host);
  return kSuccess;
}
CUresult cuPointerGetAttribute(void* value, int attribute, CUdeviceptr address) {
  std::lock_guard lock(memories_mutex);
  auto it = find_memory(address);
  if (it == memories().end()) return kInvalidValue;
  if (attribute == kPointerMemoryType) *static_cast<unsigned*>(value) = it->second.host ? 1 : kMemoryTypeDevice;
  if (attribute == kPointerDeviceOrdinal) *static_cast<int*>(value) = it->second.device;
  if (attribute == kPointerLegacyIpcCapable) *static_cast<int*>(value) = it->second.fd >= 0 ? 1 : 0;
  return kSuccess;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr memory) {
  std::lock_guard lock(memories_mutex);
  auto it = memories().find(memory);
  if (it == memories().end() || it->second.fd < 0) return kInvalidValue;
  Handle ours{::getpid(), it->second.fd, it->second.bytes, memory};
  std::memset(handle->bytes, 0, sizeof(handle->bytes));
  std::memcpy(handle->bytes, &ours, sizeof(ours));
  return kSuccess;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* memory, CUipcMemHandle handle, unsigned) {
  Handle theirs;
  std::memcpy(&theirs, handle.bytes, sizeof(theirs));
  if (theirs.pid == ::getpid() || context_stack.empty()) return kNoContext;
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", theirs.pid, theirs.fd);
  int fd = ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return kInvalidValue;
  void* data = ::mmap(nullptr, theirs.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (data == MAP_FAILED) return kInvalidValue;
  *memory = reinterpret_cast<CUdeviceptr>(data);
  std::lock_guard lock(memories_mutex);
  memories()[*memory] = {theirs.bytes, context_stack.back()->device, -1, false};
  return kSuccess;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr memory) {
  std::lock_guard lock(memories_mutex);
  auto it = memories().find(memory);
  if (it == memories().end() || it->second.fd >= 0) return kInvalidValue;
  ::munmap(reinterpret_cast<void*>(memory), it->second.bytes);
  memories().erase(it);
  return kSuccess;
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned, int) {
  *stream = new CUstream_st;
  return kSuccess;
}
CUresult cuStreamDestroy_v2(CUstream stream) {
  delete stream;
  return kSuccess;
}
CUresult cuStreamQuery(CUstream stream) {
  std::lock_guard lock(stream->mutex);
  return stream->busy || !stream->queue.empty() ? kNotReady : kSuccess;
}
CUresult cuStreamSynchronize(CUstream stream) {
  std::unique_lock lock(stream->mutex);
  stream->changed.wait(lock, [stream] { return !stream->busy && stream->queue.empty(); });
  return kSuccess;
}
// An event is reached unless a test says otherwise: recorded on a null stream it waits for the next record on any other.
CUresult cuEventCreate(CUevent* event, unsigned) {
  *event = new CUevent_st;
  return kSuccess;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  event->reached = stream != nullptr;
  return kSuccess;
}
CUresult cuEventQuery(CUevent event) { return event->reached ? kSuccess : kNotReady; }
CUresult cuEventDestroy_v2(CUevent event) {
  delete event;
  return kSuccess;
}

CUresult cuModuleLoadData(CUmodule* module, const void*) {
  *module = &only_module;
  return kSuccess;
}
CUresult cuModuleUnload(CUmodule) { return kSuccess; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  if (std::strcmp(name, kCopyKernelName) != 0) return kNotFound;
  *function = &only_function;
  return kSuccess;
}
CUresult cuLaunchKernel(CUfunction, unsigned grid_x, unsigned, unsigned, unsigned block_x, unsigned, unsigned, unsigned,
                        CUstream stream, void** parameters, void**) {
  if (grid_x == 0 || block_x != kCopyThreads) return kInvalidValue;
  enqueue(stream, [arguments = *static_cast<const CopyArguments*>(parameters[0])] { copy(arguments); });
  return kSuccess;
}

}  // extern "C"
