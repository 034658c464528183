#include "isa.h"

#include <stdlib.h>

#include "ops.h"

namespace prunevit {

#if defined(__x86_64__)
namespace avx512 {
const Kernels& table();
}
namespace avx2 {
const Kernels& table();
}
#endif
namespace baseline {
const Kernels& table();
}

namespace {

struct Isa {
    const char* name;
    bool (*runs)();
    const Kernels& (*table)();
};

const Isa isas[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("fma");
     },
     avx512::table},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::table},
#endif
    {"baseline", [] { return true; }, baseline::table},
};

const Kernels& choose() {
    const char* wanted = getenv("PRUNEVIT_CPU_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    std::string names;
    for (const Isa& isa : isas) {
        if ((any || std::string(wanted) == isa.name) && isa.runs()) return isa.table();
        if (isa.runs()) names += std::string(names.empty() ? "" : ", ") + isa.name;
    }
    throw IsaError("expected PRUNEVIT_CPU_ISA to be one of " + names + " on this machine, got " + wanted);
}

}  // namespace

std::vector<std::string> runnable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : isas)
        if (isa.runs()) names.push_back(isa.name);
    return names;
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

Step::~Step() = default;

}  // namespace prunevit
