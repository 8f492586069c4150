#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"

/// The part of CUDA's driver API that Baton uses, found at run time: one binary runs with and without
/// a GPU, and is built with and without CUDA's headers. The declarations are those of cuda.h (ABI of CUDA 11.4 and later).
namespace baton::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;
struct CUipcMemHandle {
  char bytes[64];
};
struct CUuuid {
  char bytes[16];
};

inline constexpr CUresult kSuccess = 0;
inline constexpr CUresult kNotReady = 600;
inline constexpr CUresult kPeerAccessAlreadyEnabled = 704;
inline constexpr int kAttributeMultiprocessorCount = 16;
inline constexpr int kPointerMemoryType = 2, kPointerDeviceOrdinal = 9, kPointerLegacyIpcCapable = 10;
inline constexpr unsigned kMemoryTypeDevice = 2;
inline constexpr unsigned kHostAllocPortable = 1, kHostAllocDeviceMap = 2;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kIpcLazyEnablePeerAccess = 1;
inline constexpr int kAttributeComputeMajor = 75, kAttributeComputeMinor = 76;
inline constexpr int kAttributeSharedBytesOptIn = 97;
inline constexpr int kFunctionMaxDynamicSharedBytes = 8;
inline constexpr unsigned kEventDefault = 0, kEventDisableTiming = 2;
inline constexpr int kLaunchClusterDimension = 4, kLaunchProgrammaticSerialization = 6;
struct CUlaunchAttribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int number;
  } value;
};
struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned attribute_count;
};
inline constexpr int kTensorMapBf16 = 9, kTensorMapSwizzle128 = 3, kTensorMapPromotion256 = 3;
inline constexpr int kCaptureModeThreadLocal = 1, kCaptureModeRelaxed = 2;

// name of the member, exported symbol, parameters
#define BATON_CUDA_FUNCTIONS(X)                                                                                   \
  X(init, cuInit, (unsigned flags))                                                                               \
  X(driver_version, cuDriverGetVersion, (int* version))                                                           \
  X(get_error_name, cuGetErrorName, (CUresult error, const char** text))                                          \
  X(get_error_string, cuGetErrorString, (CUresult error, const char** text))                                      \
  X(device_count, cuDeviceGetCount, (int* count))                                                                 \
  X(device_get, cuDeviceGet, (CUdevice * device, int ordinal))                                                    \
  X(device_name, cuDeviceGetName, (char* name, int bytes, CUdevice device))                                       \
  X(device_uuid, cuDeviceGetUuid_v2, (CUuuid * uuid, CUdevice device))                                            \
  X(device_pci_bus_id, cuDeviceGetPCIBusId, (char* id, int bytes, CUdevice device))                               \
  X(device_attribute, cuDeviceGetAttribute, (int* value, int attribute, CUdevice device))                         \
  X(device_can_access_peer, cuDeviceCanAccessPeer, (int* can, CUdevice device, CUdevice peer))                    \
  X(primary_context_retain, cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                     \
  X(primary_context_release, cuDevicePrimaryCtxRelease_v2, (CUdevice device))                                     \
  X(context_push, cuCtxPushCurrent_v2, (CUcontext context))                                                       \
  X(context_pop, cuCtxPopCurrent_v2, (CUcontext * context))                                                       \
  X(context_enable_peer_access, cuCtxEnablePeerAccess, (CUcontext peer, unsigned flags))                          \
  X(context_stream_priorities, cuCtxGetStreamPriorityRange, (int* least, int* greatest))                          \
  X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int* mode))                                        \
  X(memory_alloc, cuMemAlloc_v2, (CUdeviceptr * memory, size_t bytes))                                            \
  X(memory_free, cuMemFree_v2, (CUdeviceptr memory))                                                              \
  X(memory_range, cuMemGetAddressRange_v2, (CUdeviceptr * base, size_t * bytes, CUdeviceptr memory))              \
  X(memory_set, cuMemsetD8_v2, (CUdeviceptr memory, unsigned char value, size_t bytes))                           \
  X(copy_to_device, cuMemcpyHtoD_v2, (CUdeviceptr to, const void* from, size_t bytes))                            \
  X(copy_to_host, cuMemcpyDtoH_v2, (void* to, CUdeviceptr from, size_t bytes))                                    \
  X(copy_async, cuMemcpyAsync, (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))                 \
  X(host_alloc, cuMemHostAlloc, (void** memory, size_t bytes, unsigned flags))                                    \
  X(host_free, cuMemFreeHost, (void* memory))                                                                     \
  X(host_register, cuMemHostRegister_v2, (void* memory, size_t bytes, unsigned flags))                            \
  X(host_unregister, cuMemHostUnregister, (void* memory))                                                         \
  X(host_device_pointer, cuMemHostGetDevicePointer_v2, (CUdeviceptr * device, void* host, unsigned flags))        \
  X(pointer_attribute, cuPointerGetAttribute, (void* value, int attribute, CUdeviceptr memory))                   \
  X(ipc_get_handle, cuIpcGetMemHandle, (CUipcMemHandle * handle, CUdeviceptr memory))                             \
  X(ipc_open_handle, cuIpcOpenMemHandle_v2, (CUdeviceptr * memory, CUipcMemHandle handle, unsigned flags))        \
  X(ipc_close_handle, cuIpcCloseMemHandle, (CUdeviceptr memory))                                                  \
  X(stream_create, cuStreamCreateWithPriority, (CUstream * stream, unsigned flags, int priority))                 \
  X(stream_destroy, cuStreamDestroy_v2, (CUstream stream))                                                        \
  X(stream_query, cuStreamQuery, (CUstream stream))                                                               \
  X(stream_synchronize, cuStreamSynchronize, (CUstream stream))                                                   \
  X(event_create, cuEventCreate, (CUevent * event, unsigned flags))                                               \
  X(event_record, cuEventRecord, (CUevent event, CUstream stream))                                                \
  X(event_query, cuEventQuery, (CUevent event))                                                                   \
  X(event_destroy, cuEventDestroy_v2, (CUevent event))                                                            \
  X(module_load, cuModuleLoadData, (CUmodule * module, const void* image))                                        \
  X(module_unload, cuModuleUnload, (CUmodule module))                                                             \
  X(module_function, cuModuleGetFunction, (CUfunction * function, CUmodule module, const char* name))             \
  X(launch, cuLaunchKernel,                                                                                       \
    (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,  \
     unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters, void** extra))

// What computing needs besides; transfers work without.
#define BATON_CUDA_COMPUTE_FUNCTIONS(X)                                                                           \
  X(memory_info, cuMemGetInfo_v2, (size_t * free_bytes, size_t* total_bytes))                                     \
  X(event_synchronize, cuEventSynchronize, (CUevent event))                                                       \
  X(event_elapsed_ms, cuEventElapsedTime, (float* ms, CUevent from, CUevent to))                                  \
  X(function_set_attribute, cuFuncSetAttribute, (CUfunction function, int attribute, int value))                  \
  X(launch_ex, cuLaunchKernelEx,                                                                                  \
    (const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra))                         \
  X(capture_begin, cuStreamBeginCapture_v2, (CUstream stream, int mode))                                          \
  X(capture_end, cuStreamEndCapture, (CUstream stream, CUgraph* graph))                                           \
  X(graph_instantiate, cuGraphInstantiateWithFlags, (CUgraphExec * exec, CUgraph graph, unsigned long long flags)) \
  X(graph_launch, cuGraphLaunch, (CUgraphExec exec, CUstream stream))                                             \
  X(graph_exec_destroy, cuGraphExecDestroy, (CUgraphExec exec))                                                   \
  X(graph_destroy, cuGraphDestroy, (CUgraph graph))

// Since CUDA 12.0, and null before: descriptors for the copy engine of Hopper and later.
#define BATON_CUDA_TENSOR_MAP_FUNCTIONS(X)                                                                        \
  X(tensor_map_encode_tiled, cuTensorMapEncodeTiled,                                                              \
    (void* map, int data_type, unsigned rank, void* address, const uint64_t* dimensions, const uint64_t* strides, \
     const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int l2_promotion, int oob_fill))

/// The functions of one libcuda. Immutable once loaded; safe from any thread. The library is never unloaded: its
/// threads and its state at exit do not survive that.
class Driver {
 public:
  /// `path` empty: libcuda.so.1 as the loader finds it. Initialises CUDA. unavailable: no driver, one that is too old
  /// (the missing function is named), or no device.
  static Result<std::shared_ptr<const Driver>> load(const std::string& path);

#define BATON_CUDA_MEMBER(member, symbol, parameters) CUresult(*member) parameters = nullptr;
  BATON_CUDA_FUNCTIONS(BATON_CUDA_MEMBER)
  BATON_CUDA_COMPUTE_FUNCTIONS(BATON_CUDA_MEMBER)
  BATON_CUDA_TENSOR_MAP_FUNCTIONS(BATON_CUDA_MEMBER)
#undef BATON_CUDA_MEMBER

  int version = 0;  ///< 13000: CUDA 13.0
  int devices = 0;
  bool can_compute = false;  ///< all of BATON_CUDA_COMPUTE_FUNCTIONS were found

  /// ok, or an error that names the call: "cuMemAlloc of 64 bytes: CUDA_ERROR_OUT_OF_MEMORY (out of memory)".
  Status check(CUresult result, std::string_view call) const;
};

}  // namespace baton::cuda
