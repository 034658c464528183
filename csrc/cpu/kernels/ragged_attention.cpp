// o_h = softmax2(q_h k_hᵀ) v_h for every head h, each of its own widths
#include "attention.h"
#include "vmath.h"

namespace prunevit {
namespace PRUNEVIT_ISA {
namespace {

// The tile's queries against all keys, block by block, the sums rescaled when a larger score comes.
void attend(const HeadRows& head, const float* q, int64_t q_pitch, int count, float* out, int64_t out_pitch,
            float* scratch) {
  const int vectors = count <= lanes ? 1 : tile_vectors, queries = vectors * lanes;
  float *qt = scratch, *s = qt + widest_head * queries, *o = s + key_block * queries;
  float *most = o + widest_head * queries, *total = most + queries, *shrink = total + queries;
  transpose_in(q, q_pitch, count, head.qk, vectors, qt);
  for (int i = 0; i < queries; i += lanes) {
    store(most + i, splat(-INFINITY));
    store(total + i, vf{});
  }

  const int blocks = key_blocks(head.n);
  for (int block = 0; block < blocks; ++block) {
    const int first = (int)((int64_t)head.n * block / blocks);
    const int keys = (int)((int64_t)head.n * (block + 1) / blocks) - first;
    memcpy(shrink, most, queries * sizeof(float));
    scores(head.k + (int64_t)first * head.qk, head.qk, keys, qt, vectors, s, most);
    if (block > 0) {
      for (int i = 0; i < queries; i += lanes) {
        const vf by = exp2(load(shrink + i) - load(most + i));
        store(total + i, load(total + i) * by);
        for (int d = 0; d < head.v_dim; ++d) store(o + d * queries + i, load(o + d * queries + i) * by);
      }
    }
    exponentials(s, keys, vectors, most, total);
    values(head.v + (int64_t)first * head.v_dim, head.v_dim, keys, s, vectors, o, block > 0);
  }

  for (int i = 0; i < queries; i += lanes) {
    const vf by = splat(1.0f) / load(total + i);
    for (int d = 0; d < head.v_dim; ++d) store(o + d * queries + i, load(o + d * queries + i) * by);
  }
  transpose_out(o, vectors, count, head.v_dim, out, out_pitch);
}

struct RaggedAttentionStep final : Step {
  explicit RaggedAttentionStep(const RaggedAttention& op) : op(op) {}

  Need need(int) const override { return {2 * widest_head * op.qkv.rows + tile_scratch, 0}; }

  // Few heads are cut into groups of query tiles, so that threads finish together.
  int groups(int threads) const {
    const int64_t tiles = (op.out.rows + tile_queries - 1) / tile_queries;
    const int64_t wanted = (8 * threads + op.qkv.batch * op.head_count - 1) / (op.qkv.batch * op.head_count);
    return (int)(wanted < tiles ? wanted : tiles);
  }

  void run(Pool& pool) const override {
    const int cuts = pool.threads() == 1 ? 1 : groups(pool.threads());
    const int64_t tiles = (op.out.rows + tile_queries - 1) / tile_queries;
    each(pool, (int)op.qkv.batch * op.head_count * cuts, [&](int item, float* scratch) {
      const int cut = item % cuts, which = item / cuts;
      const int64_t image = which % op.qkv.batch;
      const Head& head = op.heads[which / op.qkv.batch];
      const float* rows = op.qkv.data + image * op.qkv.image;
      const int n = (int)op.qkv.rows;
      float *k = scratch, *v = k + (int64_t)n * head.qk, *rest = scratch + 2 * widest_head * op.qkv.rows;
      copy_columns(rows + head.k_at, op.qkv.pitch, n, head.qk, k);
      copy_columns(rows + head.v_at, op.qkv.pitch, n, head.v, v);
      const HeadRows copied = {k, v, n, head.qk, head.v};
      for (int64_t tile = tiles * cut / cuts; tile < tiles * (cut + 1) / cuts; ++tile) {
        const int64_t first = tile * tile_queries;
        const int64_t left = op.out.rows - first, count = left < tile_queries ? left : (int64_t)tile_queries;
        float* out = op.out.data + image * op.out.image + first * op.out.pitch;
        attend(copied, rows + first * op.qkv.pitch + head.q_at, op.qkv.pitch,
               (int)count, out + head.o_at, op.out.pitch, rest);
        if (which / op.qkv.batch == 0) clear_gaps(out, count);
      }
    });
  }

  void clear_gaps(float* out, int64_t rows) const {
    for (int g = 0; g < op.gap_count; ++g)
      for (int64_t r = 0; r < rows; ++r) memset(out + r * op.out.pitch + op.gaps[2 * g], 0, op.gaps[2 * g + 1] * 4);
  }

  const RaggedAttention op;
};

}  // namespace

Step* ragged_attention(const RaggedAttention& op) { return new RaggedAttentionStep(op); }

}  // namespace PRUNEVIT_ISA
}  // namespace prunevit
