// Packed weights: the memory behind a Linear.
#pragma once
#include <memory>
#include <vector>

#include "ops.h"

namespace prunevit {

// A weight [out, in] in the caller's memory, with its optional bias and gamma [out].
struct Weight {
    const float* data;
    int64_t out, in, pitch;
    const float *bias, *gamma;
};

class PackedLinear {
public:
    // `k_start` cuts [0, in) into blocks; empty: equal blocks of at most `max_block`.
    PackedLinear(const Weight& weight, std::vector<int> reads, std::vector<int> writes, std::vector<int> k_start = {});

    const Linear* get() const { return &linear_; }
    // Cut the columns into runs of whole panels of at most `max_columns`, as blocks for the next linear's k.
    std::vector<int> column_blocks(int max_columns) const;

    static constexpr int max_block = 384;

private:
    struct Free {
        void operator()(float* data) const { free_floats(data); }
    };
    using Floats = std::unique_ptr<float[], Free>;

    std::vector<int> reads_, writes_, k_start_;
    Floats weight_, vectors_;
    Linear linear_;
};

}  // namespace prunevit
