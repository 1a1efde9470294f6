// NVIDIA's driver as far as the program calls it, on the emulator: built as libcuda.so.1, the real binary runs on
// it as on a GPU. It is strict where the driver is, and as late as the driver may be.
//
// Work that is put on a stream is not done until somebody waits for it, and then no more of it than was waited
// for (order=late). So a buffer that is reused too early, an answer that is read too early, and a stream that does
// not wait for another give wrong numbers here every time, and not once in a thousand runs. order=random does a
// random part of it at every call, order=early all of it at once. A few things that the driver allows and the program
// does not do are refused: events inside of a recording, any flag, and more than one dimension of threads.
//
// EMULATED_GPU=order=late,memory_mib=512,arch=90,driver=13000,seed=1,fail=FILE changes the defaults. Once FILE is
// there, the next launch fails with the error whose number it holds; a sticky one stays, as on a GPU.
#include "declarations.h"
#include "emulated.h"

#include <dlfcn.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;
using Work = std::function<void()>;

struct CUctx_st {};

struct CUgraph_st {
    std::vector<Work> work;
};

struct CUgraphExec_st {
    std::shared_ptr<const std::vector<Work>> work;  // also held by runs that are queued
};

struct CUstream_st {
    std::deque<Work> queue;
    bool destroyed = false;  // nobody may name it; its work goes on
    bool capturing = false, broken = false;
    std::thread::id captured_by;
    std::unique_ptr<CUgraph_st> graph;
};

struct CUevent_st {
    u64 recorded = 0, passed = 0;  // how often
    CUstream_st* stream = nullptr;
    bool timed;
    double seconds = 0;
};

struct CUmod_st {
    int file;
    void* library;
};

struct CUfunc_st {
    CUmod_st* module;
    std::string name, letters;
    void (*call)(const u64*);
    u32 shared_limit = 48 << 10;  // without opting in
};

namespace {

// Fresh memory is NaN in every format, and an index far beyond everything.
const u8 POISON = 0xff;
// Of each side of an allocation; keeps the alignment that the driver promises.
const size_t GUARD = 256;

struct Settings {
    std::string order = "late", fail;
    u64 memory_mib = 512, arch = 90, driver = 13000, seed = 1;

    Settings() {
        const char* text = getenv("EMULATED_GPU");
        std::string rest = text ? text : "";
        while (!rest.empty()) {
            size_t comma = rest.find(','), equals = rest.find('=');
            set(rest.substr(0, equals), rest.substr(equals + 1, comma - equals - 1));
            rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
        }
    }

    void set(const std::string& name, const std::string& value) {
        std::map<std::string, u64*> numbers = {
            {"memory_mib", &memory_mib}, {"arch", &arch}, {"seed", &seed}, {"driver", &driver}};
        if (name == "fail") {
            fail = value;
        } else if (name == "order" && (value == "late" || value == "early" || value == "random")) {
            order = value;
        } else if (numbers.count(name)) {
            *numbers[name] = strtoull(value.c_str(), nullptr, 10);
        } else {
            fprintf(stderr, "EMULATED_GPU has no %s=%s\n", name.c_str(), value.c_str());
            abort();
        }
    }
};

// Shared memory of a multiprocessor; a block gets 1 KiB less (CUDA C++ programming guide, compute capabilities).
u32 shared_bytes(u64 arch) {
    switch (arch) {
        case 80: case 87: return 164 << 10;
        case 86: case 89: case 120: return 100 << 10;
        default: return 228 << 10;
    }
}

// As runtime.cpp reads it.
struct Launch {
    u32 grid[3];
    u32 block;
    u32 shared_bytes;
    u64 seed;
    void (*call)(const u64*);
    const u64* words;
    u64 word_count;
    const u64 (*memory)[2];
    u64 memory_count;
    char* error;
    u64 error_bytes;
    u64 conflicts;
};

struct Machine {
    Settings settings;
    bool initialised = false;
    CUctx_st context;
    int retained = 0;
    std::map<u64, u64> device, pinned;  // start and length
    std::vector<CUstream> streams;  // in the order of their creation
    std::set<CUevent> events;
    std::set<CUmodule> modules;
    std::set<CUgraph> graphs;
    std::set<CUgraphExec> graph_runs;
    CUresult lost = CUDA_SUCCESS;
    u64 random = settings.seed * 0x9e3779b97f4a7c15ull + 1;

    bool has(CUstream stream) const {
        auto found = std::find(streams.begin(), streams.end(), stream);
        return found != streams.end() && !stream->destroyed;
    }

    u32 shared_per_block() const { return shared_bytes(settings.arch) - 1024; }

    u64 draw() {
        random ^= random << 13;
        random ^= random >> 7;
        return random ^= random << 17;
    }
};

std::recursive_mutex everything;
// Never destroyed: handles are dropped at the program's end too.
Machine& machine = *new Machine;
thread_local CUcontext current = nullptr;
thread_local int captures = 0;

void complain(const char* what) { fprintf(stderr, "emulated GPU: %s\n", what); }

void lose(CUresult error, const char* what) {
    complain(what);
    if (machine.lost == CUDA_SUCCESS) machine.lost = error;
    for (CUstream stream : machine.streams) stream->queue.clear();
}

bool run_one(CUstream stream) {
    if (stream->queue.empty()) return false;
    Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    work();
    return true;
}

void run_all(CUstream stream) {
    while (run_one(stream)) {}
}

// What frees device memory waits for everything, as the driver does.
void run_everything() {
    for (CUstream stream : machine.streams) run_all(stream);
}

void run_until(CUevent event, u64 generation) {
    while (event->passed < generation && event->stream && run_one(event->stream)) {}
}

void run_something() {
    if (machine.settings.order != "random") return;
    for (CUstream stream : machine.streams) {
        for (u64 left = machine.draw() % 8; left > 0; left--) run_one(stream);
    }
}

// Taken by every call of the API. `refusal` is what the driver says before it looks at the arguments.
struct Call {
    std::lock_guard<std::recursive_mutex> lock{everything};
    CUresult refusal;

    explicit Call(bool may_be_captured = true) : refusal(find_refusal()) {
        if (refusal == CUDA_SUCCESS && !may_be_captured && captures > 0) refusal = break_captures();
        if (refusal == CUDA_SUCCESS) run_something();
        if (refusal == CUDA_SUCCESS) refusal = machine.lost;
    }

    static CUresult find_refusal() {
        if (!machine.initialised) return CUDA_ERROR_NOT_INITIALIZED;
        if (machine.lost != CUDA_SUCCESS) return machine.lost;
        return current == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
    }

    static CUresult break_captures() {
        for (CUstream stream : machine.streams) {
            if (stream->capturing && stream->captured_by == std::this_thread::get_id()) stream->broken = true;
        }
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }

    static CUresult break_capture(CUstream stream, CUresult error) {
        stream->broken = true;
        return error;
    }
};

#define ENTER                                        \
    Call call_;                                      \
    if (call_.refusal != CUDA_SUCCESS) return call_.refusal
#define ENTER_UNCAPTURED                             \
    Call call_(false);                               \
    if (call_.refusal != CUDA_SUCCESS) return call_.refusal

bool holds(const std::map<u64, u64>& memory, u64 address, u64 bytes) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return false;
    --after;
    return address + bytes <= after->first + after->second;
}

bool on_device(CUdeviceptr address, u64 bytes) { return holds(machine.device, address, bytes); }
bool is_pinned(const void* at, u64 bytes) { return holds(machine.pinned, (u64)at, bytes); }

u64 device_bytes() {
    u64 sum = 0;
    for (auto& [start, bytes] : machine.device) sum += bytes;
    return sum;
}

CUresult put(CUstream stream, Work work) {
    if (!machine.has(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) {
        if (stream->broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        stream->graph->work.push_back(std::move(work));
        return CUDA_SUCCESS;
    }
    stream->queue.push_back(std::move(work));
    if (machine.settings.order == "early") run_all(stream);
    return CUDA_SUCCESS;
}

// Device memory that was freed before the copy runs is a mistake of the program.
void copy(void* to, const void* from, u64 bytes, const char* what) {
    bool to_is_there = on_device((u64)to, bytes) || is_pinned(to, bytes);
    bool from_is_there = on_device((u64)from, bytes) || is_pinned(from, bytes);
    if (!to_is_there || !from_is_there) return lose(CUDA_ERROR_ILLEGAL_ADDRESS, what);
    memcpy(to, from, bytes);
}

bool is_sticky(u64 error) { return error == 214 || (error >= 700 && error != 701 && error < 900) || error == 999; }

// The error that a file asks for, once, if it is of this kind.
CUresult asked_for(bool sticky) {
    const std::string& path = machine.settings.fail;
    FILE* file = path.empty() ? nullptr : fopen(path.c_str(), "r");
    if (!file) return CUDA_SUCCESS;
    unsigned number = 0;
    bool read = fscanf(file, "%u", &number) == 1 && is_sticky(number) == sticky;
    fclose(file);
    if (read) unlink(path.c_str());
    return read ? (CUresult)number : CUDA_SUCCESS;
}

struct Prepared {
    CUfunc_st* function;
    u32 grid[3], block, shared_bytes;
    std::vector<u64> words;
};

void run_launch(const Prepared& prepared) {
    CUresult failure = asked_for(true);
    if (failure != CUDA_SUCCESS) return lose(failure, "the failure that was asked for");
    std::vector<std::pair<u64, u64>> ranges;
    for (auto& [start, bytes] : machine.device) ranges.push_back({start, start + bytes});
    char error[512] = "";
    const Prepared& p = prepared;
    Launch launch = {{p.grid[0], p.grid[1], p.grid[2]}, p.block, p.shared_bytes,
                     machine.settings.seed++, p.function->call, p.words.data(), p.words.size(),
                     (const u64(*)[2])ranges.data(), ranges.size(), error, sizeof(error), 0};
    auto run = (void (*)(Launch*))dlsym(p.function->module->library, "run_launch");
    run(&launch);
    if (error[0]) lose(CUDA_ERROR_LAUNCH_FAILED, (p.function->name + ": " + error).c_str());
}

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

size_t image_bytes(const void* image) {
    auto header = (const Elf64_Ehdr*)image;
    return memcmp(header->e_ident, ELFMAG, SELFMAG) == 0 ? header->e_shoff + header->e_shnum * header->e_shentsize : 0;
}

bool guards_are_whole(u64 start, u64 bytes) {
    const u8 *before = (const u8*)start - GUARD, *after = (const u8*)start + bytes;
    for (size_t i = 0; i < GUARD; i++) {
        if (before[i] != POISON || after[i] != POISON) return false;
    }
    return true;
}

}  // namespace

namespace emulated {

__attribute__((visibility("default"))) int put(void* stream, std::function<void()> work) {
    ENTER;
    return ::put((CUstream)stream, std::move(work));
}
__attribute__((visibility("default"))) bool has_context() { return current != nullptr; }
__attribute__((visibility("default"))) bool is_device_memory(u64 address, u64 bytes) {
    std::lock_guard<std::recursive_mutex> lock(everything);
    return on_device(address, bytes);
}
__attribute__((visibility("default"))) void lose(const char* what) { ::lose(CUDA_ERROR_ILLEGAL_ADDRESS, what); }
__attribute__((visibility("default"))) int arch() { return (int)machine.settings.arch; }

}  // namespace emulated

#define API extern "C" __attribute__((visibility("default"))) CUresult

// ---- the driver and the device ----

API cuInit(unsigned int flags) {
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    machine.initialised = true;
    return CUDA_SUCCESS;
}

API cuDriverGetVersion(int* version) {
    *version = (int)machine.settings.driver;
    return CUDA_SUCCESS;
}

API cuDeviceGetCount(int* count) {
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (!machine.initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *count = 1;
    return CUDA_SUCCESS;
}

API cuDeviceGet(CUdevice* device, int ordinal) {
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (!machine.initialised) return CUDA_ERROR_NOT_INITIALIZED;
    *device = 0;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

API cuDeviceGetName(char* name, int length, CUdevice) {
    snprintf(name, (size_t)length, "emulated GPU");
    return CUDA_SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    *bytes = machine.settings.memory_mib << 20;
    return CUDA_SUCCESS;
}

API cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 3; break;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 4 << 20; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = (int)machine.settings.arch / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = (int)machine.settings.arch % 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: 
            *value = (int)shared_bytes(machine.settings.arch);
            break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = (int)machine.shared_per_block(); break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (!machine.initialised) return CUDA_ERROR_NOT_INITIALIZED;
    // What a context takes for itself, though nobody is told how much.
    if (machine.settings.memory_mib < 16) return CUDA_ERROR_OUT_OF_MEMORY;
    machine.retained++;
    *context = &machine.context;
    return CUDA_SUCCESS;
}

static size_t live_streams() {
    return (size_t)std::count_if(machine.streams.begin(), machine.streams.end(),
                                 [](CUstream stream) { return !stream->destroyed; });
}

API cuDevicePrimaryCtxRelease_v2(CUdevice) {
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (machine.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (--machine.retained > 0) return CUDA_SUCCESS;
    size_t left = machine.device.size() + machine.pinned.size() + live_streams() + machine.events.size()
        + machine.modules.size() + machine.graphs.size() + machine.graph_runs.size();
    // What is given back to a lost GPU is refused.
    if (left > 0 && machine.lost == CUDA_SUCCESS) complain("the context is given up while objects of it are alive");
    return CUDA_SUCCESS;
}

API cuCtxSetCurrent(CUcontext context) {
    std::lock_guard<std::recursive_mutex> lock(everything);
    if (!machine.initialised) return CUDA_ERROR_NOT_INITIALIZED;
    if (context != nullptr && (context != &machine.context || machine.retained == 0)) return CUDA_ERROR_INVALID_CONTEXT;
    current = context;
    return CUDA_SUCCESS;
}

API cuGetErrorName(CUresult error, const char** text) {
    switch ((int)error) {
        case 1: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case 2: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case 201: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case 214: *text = "CUDA_ERROR_ECC_UNCORRECTABLE"; break;
        case 400: *text = "CUDA_ERROR_INVALID_HANDLE"; break;
        case 700: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case 701: *text = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
        case 719: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
        case 900: *text = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case 901: *text = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        default: *text = nullptr; return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

API cuGetErrorString(CUresult error, const char** text) {
    CUresult known = cuGetErrorName(error, text);
    if (known == CUDA_SUCCESS) *text = "as the emulator says it";
    return known;
}

// ---- memory ----

API cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
    ENTER;
    *total_bytes = machine.settings.memory_mib << 20;
    *free_bytes = *total_bytes - device_bytes();
    return CUDA_SUCCESS;
}

API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    ENTER_UNCAPTURED;
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > (machine.settings.memory_mib << 20) - device_bytes()) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t whole = (bytes + 2 * GUARD + GUARD - 1) / GUARD * GUARD;
    auto start = (u8*)aligned_alloc(GUARD, whole);
    if (!start) return CUDA_ERROR_OUT_OF_MEMORY;
    memset(start, POISON, whole);
    *address = (u64)start + GUARD;
    machine.device[*address] = bytes;
    return CUDA_SUCCESS;
}

API cuMemFree_v2(CUdeviceptr address) {
    ENTER_UNCAPTURED;
    auto found = machine.device.find(address);
    if (found == machine.device.end()) return CUDA_ERROR_INVALID_VALUE;
    run_everything();
    if (!guards_are_whole(address, found->second)) lose(CUDA_ERROR_ILLEGAL_ADDRESS, "written beyond an allocation");
    machine.device.erase(found);
    free((u8*)address - GUARD);
    return machine.lost;
}

API cuMemHostAlloc(void** at, size_t bytes, unsigned int flags) {
    ENTER_UNCAPTURED;
    if (bytes == 0 || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    *at = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*at) return CUDA_ERROR_OUT_OF_MEMORY;
    memset(*at, POISON, bytes);
    machine.pinned[(u64)*at] = bytes;
    return CUDA_SUCCESS;
}

// Waits for nothing: a copy that is still queued finds the memory gone.
API cuMemFreeHost(void* at) {
    ENTER_UNCAPTURED;
    if (machine.pinned.erase((u64)at) == 0) return CUDA_ERROR_INVALID_VALUE;
    free(at);
    return CUDA_SUCCESS;
}

API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    ENTER;
    if (!on_device(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    if (is_pinned(from, bytes)) return put(stream, [=] { copy((void*)to, from, bytes, "a copy from pinned memory"); });
    if (!machine.has(stream)) return CUDA_ERROR_INVALID_HANDLE;
    // Pageable memory is read before the call returns, and not when a graph runs.
    if (stream->capturing) return Call::break_capture(stream, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    auto content = std::make_shared<std::vector<u8>>((const u8*)from, (const u8*)from + bytes);
    return put(stream, [=] {
        if (!on_device(to, bytes)) return lose(CUDA_ERROR_ILLEGAL_ADDRESS, "a copy to memory that was freed");
        memcpy((void*)to, content->data(), bytes);
    });
}

API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER;
    if (!on_device(from, bytes)) return CUDA_ERROR_INVALID_VALUE;
    if (is_pinned(to, bytes)) return put(stream, [=] { copy(to, (void*)from, bytes, "a copy to pinned memory"); });
    if (!machine.has(stream)) return CUDA_ERROR_INVALID_HANDLE;
    // Into pageable memory it is done when the call returns.
    if (stream->capturing) return Call::break_capture(stream, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    CUresult result = put(stream, [=] {
        if (!on_device(from, bytes)) return lose(CUDA_ERROR_ILLEGAL_ADDRESS, "a copy from memory that was freed");
        memcpy(to, (void*)from, bytes);
    });
    if (result == CUDA_SUCCESS) run_all(stream);
    return result == CUDA_SUCCESS ? machine.lost : result;
}

API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER;
    bool overlap = from < to + bytes && to < from + bytes;
    if (!on_device(to, bytes) || !on_device(from, bytes) || overlap) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, [=] { copy((void*)to, (void*)from, bytes, "a copy on the device"); });
}

API cuMemsetD8Async(CUdeviceptr to, unsigned char byte, size_t bytes, CUstream stream) {
    ENTER;
    if (!on_device(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    return put(stream, [=] {
        if (!on_device(to, bytes)) return lose(CUDA_ERROR_ILLEGAL_ADDRESS, "a fill of memory that was freed");
        memset((void*)to, byte, bytes);
    });
}

// ---- modules and launches ----

API cuModuleLoadData(CUmodule* module, const void* image) {
    ENTER_UNCAPTURED;
    size_t bytes = image_bytes(image);
    if (bytes == 0) return CUDA_ERROR_INVALID_PTX;
    // The file stays open: the loader knows libraries by their names.
    int file = memfd_create("kernels", MFD_CLOEXEC);
    if (file < 0) return CUDA_ERROR_OUT_OF_MEMORY;
    if (write(file, image, bytes) != (ssize_t)bytes) {
        close(file);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    std::string path = "/proc/self/fd/" + std::to_string(file);
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        complain(dlerror());
        close(file);
        return CUDA_ERROR_INVALID_IMAGE;
    }
    *module = new CUmod_st{file, library};
    machine.modules.insert(*module);
    return CUDA_SUCCESS;
}

API cuModuleUnload(CUmodule module) {
    ENTER_UNCAPTURED;
    if (machine.modules.erase(module) == 0) return CUDA_ERROR_INVALID_HANDLE;
    run_everything();
    dlclose(module->library);
    close(module->file);
    delete module;
    return machine.lost;
}

API cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    ENTER;
    if (!machine.modules.count(module)) return CUDA_ERROR_INVALID_HANDLE;
    auto call = (void (*)(const u64*))dlsym(module->library, (std::string("call_") + name).c_str());
    auto letters = (const char* (*)())dlsym(module->library, (std::string("signature_") + name).c_str());
    if (!call || !letters) return CUDA_ERROR_NOT_FOUND;
    // Lives as long as the program: a module's functions go with it, and nobody frees them.
    *function = new CUfunc_st{module, name, letters(), call};
    return CUDA_SUCCESS;
}

API cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    ENTER;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            if (value < 0 || value > (int)machine.shared_per_block()) return CUDA_ERROR_INVALID_VALUE;
            function->shared_limit = (u32)value;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
            return value >= -1 && value <= 100 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}

API cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                   unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared_bytes,
                   CUstream stream, void** parameters, void** extra) {
    ENTER;
    if (!machine.modules.count(function->module) || extra) return CUDA_ERROR_INVALID_VALUE;
    bool fits = grid_x >= 1 && grid_y >= 1 && grid_z >= 1 && grid_x <= 0x7fffffff && grid_y <= 65535 && grid_z <= 65535
        && block_x >= 1 && block_x <= 1024 && block_y == 1 && block_z == 1 && shared_bytes <= function->shared_limit;
    if (!fits) return CUDA_ERROR_INVALID_VALUE;
    CUresult failure = asked_for(false);
    if (failure != CUDA_SUCCESS) return failure;
    Prepared prepared = {function, {grid_x, grid_y, grid_z}, block_x, shared_bytes, {}};
    for (size_t i = 0; i < function->letters.size(); i++) {
        u64 word = 0;
        bool wide = function->letters[i] == 'p' || function->letters[i] == 'l';
        memcpy(&word, parameters[i], wide ? 8 : 4);
        prepared.words.push_back(word);
    }
    return put(stream, [prepared] { run_launch(prepared); });
}

// ---- streams and events ----

API cuStreamCreate(CUstream* stream, unsigned int flags) {
    ENTER;
    if (flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *stream = new CUstream_st;
    machine.streams.push_back(*stream);
    return CUDA_SUCCESS;
}

API cuStreamDestroy_v2(CUstream stream) {
    ENTER;
    if (!machine.has(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) captures--;
    stream->destroyed = true;
    return CUDA_SUCCESS;
}

API cuStreamSynchronize(CUstream stream) {
    ENTER;
    if (!machine.has(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) return Call::break_capture(stream, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    run_all(stream);
    return machine.lost;
}

API cuEventCreate(CUevent* event, unsigned int flags) {
    ENTER;
    *event = new CUevent_st;
    (*event)->timed = !(flags & CU_EVENT_DISABLE_TIMING);
    machine.events.insert(*event);
    return CUDA_SUCCESS;
}

// Work that marks it or waits for it may still be queued, so that its few bytes stay.
API cuEventDestroy_v2(CUevent event) {
    ENTER;
    return machine.events.erase(event) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

API cuEventRecord(CUevent event, CUstream stream) {
    ENTER;
    if (!machine.events.count(event) || !machine.has(stream)) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capturing) return Call::break_capture(stream, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    if (event->stream != stream) run_until(event, event->recorded);
    u64 generation = ++event->recorded;
    event->stream = stream;
    return put(stream, [=] {
        event->passed = generation;
        event->seconds = now();
    });
}

API cuEventSynchronize(CUevent event) {
    ENTER;
    if (!machine.events.count(event)) return CUDA_ERROR_INVALID_HANDLE;
    run_until(event, event->recorded);
    return machine.lost;
}

API cuEventElapsedTime(float* milliseconds, CUevent from, CUevent to) {
    ENTER;
    for (CUevent event : {from, to}) {
        if (!machine.events.count(event) || !event->timed || event->recorded == 0) return CUDA_ERROR_INVALID_HANDLE;
        if (event->passed < event->recorded) return CUDA_ERROR_NOT_READY;
    }
    *milliseconds = (float)(1e3 * (to->seconds - from->seconds));
    return CUDA_SUCCESS;
}

API cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
    ENTER;
    if (!machine.events.count(event) || !machine.has(stream) || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    // No event is recorded inside of a recording here, so that each is from outside.
    if (stream->capturing) return Call::break_capture(stream, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    u64 generation = event->recorded;
    return put(stream, [=] { run_until(event, generation); });
}

// ---- graphs ----

API cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    ENTER;
    if (!machine.has(stream) || mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capturing) return CUDA_ERROR_INVALID_VALUE;
    stream->capturing = true;
    stream->broken = false;
    stream->captured_by = std::this_thread::get_id();
    stream->graph = std::make_unique<CUgraph_st>();
    captures++;
    return CUDA_SUCCESS;
}

API cuStreamEndCapture(CUstream stream, CUgraph* graph) {
    ENTER;
    *graph = nullptr;
    if (!machine.has(stream) || !stream->capturing) return CUDA_ERROR_INVALID_VALUE;
    if (stream->captured_by != std::this_thread::get_id()) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    stream->capturing = false;
    captures--;
    if (stream->broken) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = stream->graph.release();
    machine.graphs.insert(*graph);
    return CUDA_SUCCESS;
}

API cuGraphInstantiateWithFlags(CUgraphExec* run, CUgraph graph, unsigned long long flags) {
    ENTER;
    if (!machine.graphs.count(graph) || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    *run = new CUgraphExec_st{std::make_shared<const std::vector<Work>>(graph->work)};
    machine.graph_runs.insert(*run);
    return CUDA_SUCCESS;
}

API cuGraphDestroy(CUgraph graph) {
    ENTER;
    if (machine.graphs.erase(graph) == 0) return CUDA_ERROR_INVALID_VALUE;
    delete graph;
    return CUDA_SUCCESS;
}

API cuGraphUpload(CUgraphExec run, CUstream stream) {
    ENTER;
    return machine.graph_runs.count(run) && machine.has(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API cuGraphLaunch(CUgraphExec run, CUstream stream) {
    ENTER;
    if (!machine.graph_runs.count(run)) return CUDA_ERROR_INVALID_VALUE;
    CUresult failure = asked_for(false);
    if (failure != CUDA_SUCCESS) return failure;
    auto recorded = run->work;
    return put(stream, [recorded] {
        for (const Work& work : *recorded) {
            if (machine.lost == CUDA_SUCCESS) work();
        }
    });
}

API cuGraphExecDestroy(CUgraphExec run) {
    ENTER;
    if (machine.graph_runs.erase(run) == 0) return CUDA_ERROR_INVALID_VALUE;
    delete run;
    return CUDA_SUCCESS;
}
