// What the emulated cuBLASLt asks of the emulated driver.
#pragma once
#include <functional>

namespace emulated {

// Puts work on a stream, or records it where the stream captures. A CUresult.
int put(void* stream, std::function<void()> work);
// Whether the thread that asks has a context.
bool has_context();
// Whether all of the bytes are in one allocation of device memory.
bool is_device_memory(unsigned long long address, unsigned long long bytes);
// As a kernel that reads or writes beyond its memory: the GPU is lost.
void lose(const char* what);
// Such as 90.
int arch();

}  // namespace emulated
