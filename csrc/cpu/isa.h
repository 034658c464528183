// Which instruction sets there are, and which one is in use.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

namespace prunevit {

// PRUNEVIT_CPU_ISA names an instruction set that is not built, or that this machine does not have.
struct IsaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Built and runnable here, best first.
std::vector<std::string> runnable_isas();

}  // namespace prunevit
