#include "select_tokens.h"

#include <string.h>

#include <algorithm>
#include <vector>

namespace prunevit {
namespace {

// Unsigned keys in the order of the floats, NaN above all (as torch sorts).
uint32_t key_of(float score) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    if (score != score) return 0xFFFFFFFFu;
    if (bits == 0x80000000u) bits = 0;  // -0 ties with 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct SelectTokensStep final : Step {
    explicit SelectTokensStep(const SelectTokens& op) : op(op) {}

    // Scratch holds one 64-bit word a token: its key, then its place from the end, so that ties go to the earlier.
    Need need(int) const override { return {2 * op.x.rows, 0}; }

    void run(Pool& pool) const override {
        pool.run(
            static_cast<int>(op.x.batch),
            [](const void* self, int image, float* scratch) {
                static_cast<const SelectTokensStep*>(self)->one_image(image, reinterpret_cast<uint64_t*>(scratch));
            },
            this);
    }

    void one_image(int64_t image, uint64_t* order) const {
        const float* scores = op.scores.data + image * op.scores.pitch;
        float* kept_scores = op.kept_scores.data + image * op.kept_scores.pitch;
        const int64_t n = op.x.rows, patches = n - op.prefix;
        for (int64_t i = 0; i < patches; ++i)
            order[i] = uint64_t(key_of(scores[op.prefix + i])) << 32 | uint32_t(n - (op.prefix + i));
        uint64_t least = 0;
        if (op.keep < patches) {
            std::nth_element(order, order + patches - op.keep, order + patches);
            least = order[patches - op.keep];
        }

        int64_t kept = 0;
        float dropped = 0.0f;
        float* fused = at(op.kept_x, image, op.prefix + op.keep);
        if (op.fuse) std::fill(fused, fused + op.x.cols, 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            const float* from = at(op.x, image, i);
            const uint64_t word = uint64_t(key_of(scores[i])) << 32 | uint32_t(n - i);
            if (i < op.prefix || word >= least) {
                memcpy(at(op.kept_x, image, kept), from, op.x.cols * sizeof(float));
                kept_scores[kept++] = scores[i];
            } else if (op.fuse) {
                dropped += scores[i];
                for (int64_t c = 0; c < op.x.cols; ++c) fused[c] += scores[i] * from[c];
            }
        }
        if (op.fuse) {
            const float by = std::max(dropped, 1e-20f);
            for (int64_t c = 0; c < op.x.cols; ++c) fused[c] /= by;
            kept_scores[kept] = dropped;
        }
    }

    static float* at(const Tokens& tokens, int64_t image, int64_t row) {
        return tokens.data + image * tokens.image + row * tokens.pitch;
    }

    const SelectTokens op;
};

}  // namespace

Step* select_tokens(const SelectTokens& op) { return new SelectTokensStep(op); }

}  // namespace prunevit
