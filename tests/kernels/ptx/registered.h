// What objects that nvcc made say of their kernels when they are loaded: a stand-in's part of CUDA's runtime.
#pragma once

#include <map>
#include <string>

struct Registered {
    std::string name;
    int shared_limit = 48 * 1024;  // of a launch's dynamic shared memory, until it is told otherwise
};
// By the host's stand-in for each. Objects register theirs before a file's own globals are made.
inline std::map<const void*, Registered>& kernels() {
    static std::map<const void*, Registered> known;
    return known;
}

// Which of the code for sm_80 and sm_90a a GPU runs: all but an H100 the former.
inline int compiled_for(int sm) { return sm == 90 ? 90 : 80; }

extern "C" {
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    kernels()[host].name = name;
}
}
