// How much attention each token receives, summed over heads: QKᵀ once more, in the layers that choose tokens only.
#include "attention.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

struct TokenScoresStep final : Step {
    explicit TokenScoresStep(const TokenScores& op) : op(op) {}

    Need need(int) const override {
        const int64_t n = op.qkv.rows;
        const int64_t each = copied_floats(n, widest_head) + 2 * lanes * n + (widest_head + 2) * lanes;
        return {each, op.qkv.batch * op.head_count * n};
    }

    void run(Pool& pool) const override {
        float* parts = pool.shared();  // [batch, heads, n]: added up in order, so that threads do not change the result
        const int n = (int)op.qkv.rows;
        each(pool, (int)op.qkv.batch * op.head_count, [&](int item, float* scratch) {
            const float* rows = op.qkv.data + item / op.head_count * op.qkv.image;
            one_head(rows, op.heads[item % op.head_count], parts + (int64_t)item * n, scratch);
        });
        each(pool, (int)op.qkv.batch, [&](int image, float*) {
            float* to = op.scores.data + image * op.scores.pitch;
            if (!op.accumulate) memset(to, 0, n * sizeof(float));
            for (int h = 0; h < op.head_count; ++h)
                for (int key = 0; key < n; ++key) to[key] += parts[((int64_t)image * op.head_count + h) * n + key];
        });
    }

    // For every key the most that any query pays it; under class_attention the class token is the only query.
    void one_head(const float* rows, const Head& head, float* to, float* scratch) const {
        const int n = (int)op.qkv.rows, queries = op.rule == Rule::class_attention ? 1 : n;
        float *k = scratch, *best = k + copied_floats(n, widest_head), *s = best + (int64_t)lanes * n;
        float *qt = s + (int64_t)lanes * n, *most = qt + widest_head * lanes, *total = most + lanes;
        copy_columns(rows + head.k_at, op.qkv.pitch, n, head.qk, k);
        for (int key = 0; key < n; ++key) store(best + (int64_t)key * lanes, vf{});
        for (int first = 0; first < queries; first += lanes) {
            const int count = queries - first < lanes ? queries - first : (int)lanes;
            transpose_in(rows + first * op.qkv.pitch + head.q_at, op.qkv.pitch, count, head.qk, 1, qt);
            store(most, splat(-INFINITY));
            store(total, vf{});
            scores(k, head.qk, n, qt, 1, s, most);
            exponentials(s, n, 1, most, total);
            float scale[lanes];
            store(scale, splat(1.0f) / load(total));
            for (int i = count; i < lanes; ++i) scale[i] = 0.0f;  // lanes that hold no query
            for (int key = 0; key < n; ++key) {
                float* at = best + (int64_t)key * lanes;
                const vf before = load(at), paid = load(s + (int64_t)key * lanes) * load(scale);
                store(at, before != before ? before : vmax(before, paid));
            }
        }
        for (int key = 0; key < n; ++key) to[key] = max_of(load(best + (int64_t)key * lanes));
    }

    const TokenScores op;
};

}  // namespace

Step* token_scores(const TokenScores& op) { return new TokenScoresStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
