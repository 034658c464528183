// o_h = softmax2(q_h k_hᵀ) v_h for every head h, each of its own widths
#include "attention.h"
#include "vmath.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

// One head of one image, copied to contiguous rows.
struct HeadRows {
    const float *k, *v;  // [n, qk], [n, v_dim]
    int n, qk, v_dim;
};

// What a query tile works in; all of it [.., vectors * lanes].
struct Work {
    float *q, *p, *o, *total, *most, *before;
    int vectors;
};

INLINE int first_key(int n, int blocks, int block) { return (int)((int64_t)n * block / blocks); }

// o and total for scores that need no shifting, which is nearly always. Says whether that was so: every sum lies well
// inside the range of floats, so neither did a weight overflow nor was one that matters lost. NaN counts as no.
bool attend_plainly(const HeadRows& head, const Work& w, int count, Fetch& fetch) {
    for (int v = 0; v < w.vectors; ++v) store(w.total + v * lanes, vf{});
    const int blocks = (head.n + key_block - 1) / key_block;
    for (int block = 0; block < blocks; ++block) {
        const int first = first_key(head.n, blocks, block), keys = first_key(head.n, blocks, block + 1) - first;
        weights(head.k + (int64_t)first * head.qk, head.qk, keys, w.q, w.vectors, w.p, w.total);
        values(head.v + (int64_t)first * head.v_dim, head.v_dim, keys, w.p, w.vectors, w.o, block > 0, fetch);
    }
    for (int i = 0; i < count; ++i)
        if (!(w.total[i] > 0x1p-60f && w.total[i] < 0x1p60f)) return false;
    return true;
}

// The same for any scores: every block's are shifted by the largest so far, and the sums rescaled when it grows.
void attend_shifted(const HeadRows& head, const Work& w, Fetch& fetch) {
    const int queries = w.vectors * lanes;
    for (int i = 0; i < queries; i += lanes) {
        store(w.most + i, splat(-INFINITY));
        store(w.total + i, vf{});
    }
    const int blocks = (head.n + key_block - 1) / key_block;
    for (int block = 0; block < blocks; ++block) {
        const int first = first_key(head.n, blocks, block), keys = first_key(head.n, blocks, block + 1) - first;
        memcpy(w.before, w.most, queries * sizeof(float));
        scores(head.k + (int64_t)first * head.qk, head.qk, keys, w.q, w.vectors, w.p, w.most);
        if (block > 0)
            for (int i = 0; i < queries; i += lanes) {
                const vf by = exp2(load(w.before + i) - load(w.most + i));
                store(w.total + i, load(w.total + i) * by);
                for (int d = 0; d < head.v_dim; ++d) store(w.o + d * queries + i, load(w.o + d * queries + i) * by);
            }
        exponentials(w.p, keys, w.vectors, w.most, w.total);
        values(head.v + (int64_t)first * head.v_dim, head.v_dim, keys, w.p, w.vectors, w.o, block > 0, fetch);
    }
}

// `count` queries against all keys.
void attend(const HeadRows& head, const float* q, int64_t q_pitch, int count, float* out, int64_t out_pitch,
            float* scratch, Fetch& fetch) {
    const int vectors = (count + lanes - 1) / lanes, queries = vectors * lanes;
    Work w = {scratch, nullptr, nullptr, nullptr, nullptr, nullptr, vectors};
    w.p = w.q + widest_head * queries;
    w.o = w.p + key_block * queries;
    w.total = w.o + widest_head * queries;
    w.most = w.total + queries;
    w.before = w.most + queries;
    transpose_in(q, q_pitch, count, head.qk, vectors, w.q);
    if (!attend_plainly(head, w, count, fetch)) attend_shifted(head, w, fetch);
    for (int i = 0; i < queries; i += lanes) store(w.total + i, splat(1.0f) / load(w.total + i));
    transpose_out(w.o, vectors, count, head.v_dim, w.total, out, out_pitch);
}

struct RaggedAttentionStep final : Step {
    explicit RaggedAttentionStep(const RaggedAttention& op) : op(op) {}

    int64_t tiles() const { return (op.out.rows + tile_queries - 1) / tile_queries; }
    // Tiles are whole vectors of queries, as nearly equal as those can be.
    int64_t first_query(int64_t t) const { return (op.out.rows + lanes - 1) / lanes * t / tiles() * lanes; }
    int heads() const { return (int)op.qkv.batch * op.head_count; }  // of all images
    int64_t each_copy() const { return copied_floats(op.qkv.rows, widest_head); }

    // With few heads a thread would wait for the other's last one: then query tiles are shared out, not heads.
    bool few_heads(int threads) const { return threads > 1 && heads() < 8 * threads; }

    Need need(int threads) const override {
        return few_heads(threads) ? Need{tile_scratch, 2 * each_copy() * heads()}
                                  : Need{2 * each_copy() + tile_scratch, 0};
    }

    void run(Pool& pool) const override {
        if (few_heads(pool.threads()))
            by_tiles(pool);
        else
            by_heads(pool);
    }

    void by_heads(Pool& pool) const {
        each(pool, heads(), [&](int which, float* scratch) {
            float *k = scratch, *v = k + each_copy(), *rest = v + each_copy();
            copy(which, true, k);
            copy(which, false, v);
            Fetch fetch = fetch_head(which + 1 < heads() ? which + 1 : which);
            for (int64_t t = 0; t < tiles(); ++t) tile(which, t, k, v, rest, fetch);
        });
    }

    void by_tiles(Pool& pool) const {
        float* copies = pool.shared();
        each(pool, 2 * heads(), [&](int item, float*) { copy(item / 2, item % 2 == 0, copies + item * each_copy()); });
        each(pool, heads() * (int)tiles(), [&](int item, float* scratch) {
            const int which = item / (int)tiles();
            const float* k = copies + 2 * which * each_copy();
            Fetch nothing = {{}, {}, 0, 3, 0};
            tile(which, item % tiles(), k, k + each_copy(), scratch, nothing);
        });
    }

    void copy(int which, bool keys, float* to) const {
        const Head& head = op.heads[which % op.head_count];
        const float* rows = op.qkv.data + which / op.head_count * op.qkv.image;
        copy_columns(rows + (keys ? head.k_at : head.v_at), op.qkv.pitch, (int)op.qkv.rows, keys ? head.qk : head.v,
                     to);
    }

    void tile(int which, int64_t t, const float* k, const float* v, float* scratch, Fetch& fetch) const {
        const int64_t image = which / op.head_count, first = first_query(t), stop = first_query(t + 1);
        const Head& head = op.heads[which % op.head_count];
        const int queries = (int)((stop < op.out.rows ? stop : op.out.rows) - first);
        const float* q = op.qkv.data + image * op.qkv.image + first * op.qkv.pitch + head.q_at;
        float* out = op.out.data + image * op.out.image + first * op.out.pitch;
        attend({k, v, (int)op.qkv.rows, head.qk, head.v}, q, op.qkv.pitch, queries, out + head.o_at, op.out.pitch,
               scratch, fetch);
        if (which % op.head_count == 0) clear_gaps(out, queries);
    }

    Fetch fetch_head(int which) const {
        const Head& head = op.heads[which % op.head_count];
        const float* rows = op.qkv.data + which / op.head_count * op.qkv.image;
        return {{rows + head.k_at, rows + head.v_at, rows + head.q_at}, {head.qk, head.v, head.qk}, op.qkv.pitch, 0, 0};
    }

    void clear_gaps(float* out, int64_t rows) const {
        for (int g = 0; g < op.gap_count; ++g)
            for (int64_t r = 0; r < rows; ++r)
                memset(out + r * op.out.pitch + op.gaps[2 * g], 0, op.gaps[2 * g + 1] * 4);
    }

    const RaggedAttention op;
};

}  // namespace

Step* ragged_attention(const RaggedAttention& op) { return new RaggedAttentionStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
