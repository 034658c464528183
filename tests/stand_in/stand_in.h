// What Python tells the stand-in, and is told by it.
#pragma once

#include <cstddef>

extern "C" {
// A launch: the kernel's name, and the driver's handle where it has one. The number of its work, or -1.
using Launched = int (*)(const char* kernel, const void* function, const unsigned* grid, unsigned threads,
                         void* const* arguments, size_t shared_bytes);
// Run work by its number. Whether it could be run.
using Run = int (*)(int work);

void stand_in_be(int sm, int multiprocessors, int shared_limit, int order, Launched launched, Run run);
int stand_in_enqueue(void* stream, int work);
// Where the allocation lies that an address is in; whether there is one.
int stand_in_allocation(size_t address, size_t* base, size_t* bytes);
}

struct Device {
    int sm = 90, multiprocessors = 132, shared_limit = 227 * 1024;
    Launched launched = nullptr;
    Run run = nullptr;
};
extern Device device;

// An attribute, by the number that the runtime and the driver both have for it; whether it is known.
bool attribute(int which, int* value);
// Put a kernel on a stream.
int launch_kernel(const char* kernel, const void* function, const unsigned* grid, const unsigned* block,
                  void* const* arguments, size_t shared_bytes, void* stream);
