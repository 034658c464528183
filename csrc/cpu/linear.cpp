#include "linear.h"

#include <algorithm>

namespace prunevit {

static std::vector<int> equal_blocks(int size, int max_block) {
    const int blocks = (size + max_block - 1) / max_block;
    std::vector<int> starts;
    for (int b = 0; b <= blocks; ++b) starts.push_back(static_cast<int>(int64_t(size) * b / blocks));
    return starts;
}

PackedLinear::PackedLinear(const Weight& w, std::vector<int> reads, std::vector<int> writes, std::vector<int> k_start)
    : reads_(std::move(reads)), writes_(std::move(writes)), k_start_(std::move(k_start)) {
    const Kernels& isa = kernels();
    const int out = static_cast<int>(w.out), in = static_cast<int>(w.in);
    if (k_start_.empty()) k_start_ = equal_blocks(in, max_block);
    const int vectors = (out + isa.lanes - 1) / isa.lanes;
    const int padded = vectors * isa.lanes;

    // A lone last vector joins the panel before it: more vectors by fewer rows load less than one by fourteen.
    const bool lone = vectors % isa.panel == 1 && vectors > isa.panel;
    const int panels = (vectors + isa.panel - 1) / isa.panel - int(lone);

    weight_.reset(allocate_floats(int64_t(padded) * in));
    float* to = weight_.get();
    for (size_t b = 0; b + 1 < k_start_.size(); ++b)
        for (int p = 0; p < panels; ++p) {
            const int first = p * isa.panel * isa.lanes;
            const int width = (p + 1 == panels ? padded : first + isa.panel * isa.lanes) - first;
            for (int k = k_start_[b]; k < k_start_[b + 1]; ++k)
                for (int c = first; c < first + width; ++c) *to++ = c < out ? w.data[c * w.pitch + k] : 0.0f;
        }

    vectors_.reset(allocate_floats(2 * int64_t(padded)));
    float *bias = vectors_.get(), *gamma = bias + padded;
    for (int c = 0; c < padded; ++c) {
        bias[c] = c < out && w.bias != nullptr ? w.bias[c] : 0.0f;
        gamma[c] = c < out && w.gamma != nullptr ? w.gamma[c] : 1.0f;
    }
    linear_ = {out,
               in,
               isa.lanes,
               vectors,
               isa.panel,
               panels,
               static_cast<int>(k_start_.size()) - 1,
               k_start_.data(),
               weight_.get(),
               bias,
               gamma,
               reads_.empty() ? nullptr : reads_.data(),
               writes_.empty() ? nullptr : writes_.data()};
}

std::vector<int> PackedLinear::column_blocks(int max_columns) const {
    const int width = linear_.panel * linear_.lanes;
    const int chunks = (linear_.out + max_columns - 1) / max_columns;
    std::vector<int> starts = {0};
    for (int c = 1; c <= std::min(chunks, linear_.panels); ++c) {
        const int panel = static_cast<int>(int64_t(linear_.panels) * c / std::min(chunks, linear_.panels));
        starts.push_back(panel == linear_.panels ? linear_.out : panel * width);
    }
    return starts;
}

}  // namespace prunevit
