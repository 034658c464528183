#include "bound.h"

#include <algorithm>

namespace prunevit {

Bound::Bound(std::shared_ptr<Pool> pool, Step* step, std::vector<std::shared_ptr<const void>> owned)
    : pool_(std::move(pool)), owned_(std::move(owned)), step_(step) {
    const Need need = step_->need(pool_->threads());
    pool_->reserve(need.each, need.shared);
}

void Bound::run() const {
    Session session(*pool_);
    step_->run(*pool_);
}

void require(bool holds, const std::string& what, const std::string& got) {
    if (!holds) throw std::invalid_argument("expected " + what + ", got " + got);
}

void require_matrix(const char* name, const Matrix& m) {
    const std::string it = name;
    require(m.data != nullptr, it + " to have memory", "a null pointer");
    require(m.rows >= 1 && m.cols >= 1, it + " with at least one row and column",
            std::to_string(m.rows) + " x " + std::to_string(m.cols));
    require(m.rows == 1 || m.pitch >= m.cols, it + " with a pitch of at least " + std::to_string(m.cols),
            std::to_string(m.pitch));
}

void require_tokens(const char* name, const Tokens& t) {
    require_matrix(name, {t.data, t.rows, t.cols, t.pitch});
    const int64_t size = (t.rows - 1) * t.pitch + t.cols;
    require(t.batch >= 1, std::string(name) + " with at least one image", std::to_string(t.batch));
    require(t.batch == 1 || t.image >= size,
            std::string(name) + " with images at least " + std::to_string(size) + " apart", std::to_string(t.image));
}

namespace {

void require_equal(const char* what, int64_t got, int64_t want) {
    require(got == want, std::string(what) + " (" + std::to_string(want) + ")", std::to_string(got));
}

void require_channels(const char* what, const int* channels, int count, int64_t below) {
    for (int i = 0; channels != nullptr && i < count; ++i)
        require(channels[i] >= 0 && channels[i] < below, std::string(what) + " below " + std::to_string(below),
                std::to_string(channels[i]));
}

void require_reads(const Linear& linear, int64_t cols) {
    if (linear.reads == nullptr) require_equal("x to be as wide as the linear reads", cols, linear.in);
    require_channels("reads", linear.reads, linear.in, cols);
}

void require_writes(const Linear& linear, int64_t cols) {
    if (linear.writes == nullptr) require_equal("x to be as wide as the linear writes", cols, linear.out);
    require_channels("writes", linear.writes, linear.out, cols);
}

void require_plain(const Linear& linear) {
    require(linear.reads == nullptr && linear.writes == nullptr, "a linear without reads and writes", "one with");
}

void require_heads(const std::vector<Head>& heads, int64_t qkv_cols, int64_t out_cols) {
    require(!heads.empty(), "at least one head", "none");
    for (const Head& head : heads) {
        require(head.qk >= 1 && head.qk <= 128 && head.v >= 1 && head.v <= 128, "head widths from 1 to 128",
                std::to_string(head.qk) + " and " + std::to_string(head.v));
        const int64_t q = head.q_at, k = head.k_at, v = head.v_at, o = head.o_at;
        const int64_t first = std::min({q, k, v, o}), last = std::max({q + head.qk, k + head.qk, v + head.v});
        require(first >= 0 && last <= qkv_cols && o + head.v <= out_cols, "head columns inside their rows",
                std::to_string(first) + " to " + std::to_string(std::max(last, o + head.v)));
    }
}

// What a head costs, to start the dearest first.
int cost(const Head& head) { return head.qk + head.v; }

struct HeadsAndGaps {
    std::vector<Head> heads;
    std::vector<int> gaps;
};

std::vector<int> gaps_of(std::vector<Head> heads, int64_t cols) {
    std::sort(heads.begin(), heads.end(), [](const Head& a, const Head& b) { return a.o_at < b.o_at; });
    std::vector<int> gaps;
    int end = 0;
    const auto gap_to = [&](int start) {
        if (start > end) gaps.insert(gaps.end(), {end, start - end});
    };
    for (const Head& head : heads) {
        gap_to(head.o_at);
        end = std::max(end, head.o_at + head.v);
    }
    gap_to(static_cast<int>(cols));
    return gaps;
}

}  // namespace

Bound bind_norm_linear(std::shared_ptr<Pool> pool, SharedLinear linear, Matrix x, Matrix y, float eps) {
    const Linear* l = linear->get();
    require_matrix("x", x);
    require_matrix("y", y);
    require_equal("as many rows of y as of x", y.rows, x.rows);
    require_reads(*l, x.cols);
    require_equal("y to be as wide as the linear", y.cols, l->out);
    require(l->writes == nullptr, "a linear without writes", "one with");
    Step* step = kernels().norm_linear({x, y, l, eps});
    return Bound(std::move(pool), step, {linear});
}

Bound bind_linear_residual(std::shared_ptr<Pool> pool, SharedLinear linear, Matrix c, Matrix x) {
    const Linear* l = linear->get();
    require_matrix("c", c);
    require_matrix("x", x);
    require_equal("as many rows of x as of c", x.rows, c.rows);
    require_equal("c to be as wide as the linear's input", c.cols, l->in);
    require_writes(*l, x.cols);
    require(l->reads == nullptr, "a linear without reads", "one with");
    return Bound(std::move(pool), kernels().linear_residual({c, x, l}), {linear});
}

Bound bind_fused_mlp(std::shared_ptr<Pool> pool, SharedLinear fc1, SharedLinear fc2, Matrix x, Activation act,
                     float eps) {
    const Linear *one = fc1->get(), *two = fc2->get();
    require_matrix("x", x);
    require_reads(*one, x.cols);
    require_writes(*two, x.cols);
    require(one->writes == nullptr && two->reads == nullptr, "reads of fc1 and writes of fc2", "the other way round");
    require_equal("fc2 to be as deep as fc1 is wide", two->in, one->out);
    const int width = one->panel * one->lanes;
    for (int b = 1; b < two->blocks; ++b)
        require(two->k_start[b] % width == 0 && two->k_start[b] / width < one->panels,
                "blocks of fc2 of whole panels of fc1", std::to_string(two->k_start[b]));
    return Bound(std::move(pool), kernels().fused_mlp({x, one, two, act, eps}), {fc1, fc2});
}

Bound bind_ragged_attention(std::shared_ptr<Pool> pool, std::vector<Head> heads, Tokens qkv, Tokens out) {
    require_tokens("qkv", qkv);
    require_tokens("out", out);
    require_equal("as many images in out as in qkv", out.batch, qkv.batch);
    require(out.rows <= qkv.rows, "at most as many queries as keys", std::to_string(out.rows));
    require_heads(heads, qkv.cols, out.cols);
    auto owned = std::make_shared<HeadsAndGaps>();
    owned->gaps = gaps_of(heads, out.cols);
    owned->heads = std::move(heads);
    std::stable_sort(owned->heads.begin(), owned->heads.end(),
                     [](const Head& a, const Head& b) { return cost(a) > cost(b); });
    Step* step = kernels().ragged_attention({qkv, out, owned->heads.data(), static_cast<int>(owned->heads.size()),
                                             owned->gaps.data(), static_cast<int>(owned->gaps.size() / 2)});
    return Bound(std::move(pool), step, {owned});
}

Bound bind_token_scores(std::shared_ptr<Pool> pool, std::vector<Head> heads, Tokens qkv, Matrix scores, Rule rule,
                        bool accumulate) {
    require_tokens("qkv", qkv);
    require_matrix("scores", scores);
    require_equal("one row of scores an image", scores.rows, qkv.batch);
    require_equal("one score a token", scores.cols, qkv.rows);
    require_heads(heads, qkv.cols, 128 * static_cast<int64_t>(heads.size()));
    auto owned = std::make_shared<std::vector<Head>>(std::move(heads));
    Step* step =
        kernels().token_scores({qkv, scores, owned->data(), static_cast<int>(owned->size()), rule, accumulate});
    return Bound(std::move(pool), step, {owned});
}

Bound bind_select_tokens(std::shared_ptr<Pool> pool, SelectTokens op) {
    require_tokens("x", op.x);
    require_matrix("scores", op.scores);
    require_tokens("kept_x", op.kept_x);
    require_matrix("kept_scores", op.kept_scores);
    const int64_t kept = op.prefix + op.keep + int(op.fuse);
    require(op.keep >= 1 && op.prefix >= 0 && op.prefix + op.keep <= op.x.rows, "no more tokens kept than there are",
            std::to_string(op.prefix + op.keep));
    for (const int64_t batch : {op.scores.rows, op.kept_x.batch, op.kept_scores.rows})
        require_equal("one batch size", batch, op.x.batch);
    require_equal("one score a token", op.scores.cols, op.x.rows);
    require_equal("kept_x to have the kept tokens", op.kept_x.rows, kept);
    require_equal("kept_scores to have the kept tokens", op.kept_scores.cols, kept);
    require_equal("kept_x to be as wide as x", op.kept_x.cols, op.x.cols);
    return Bound(std::move(pool), select_tokens(op), {});
}

Bound bind_patch_embed(std::shared_ptr<Pool> pool, SharedLinear linear, std::shared_ptr<const Stem> stem,
                       PatchEmbed op) {
    const Linear* l = linear->get();
    require_plain(*l);
    require(op.images != nullptr, "images to have memory", "a null pointer");
    require(std::min({op.batch, op.channels, op.patch_h, op.patch_w}) >= 1, "positive sizes", "zero or less");
    require(op.height >= op.patch_h && op.width >= op.patch_w, "images of at least one patch",
            std::to_string(op.height) + " x " + std::to_string(op.width));
    require_tokens("x", op.x);
    const int64_t patches = (op.height / op.patch_h) * (op.width / op.patch_w), e = op.x.cols;
    require_equal("x to have one image for each of images", op.x.batch, op.batch);
    require_equal("x to have prefix and patch tokens", op.x.rows, op.prefix_count + patches);
    require_equal("the linear to read a patch", l->in, op.channels * op.patch_h * op.patch_w);
    require_equal("x to be as wide as the linear", e, l->out);
    require_equal("one position a patch", static_cast<int64_t>(stem->positions.size()), patches * e);
    require_equal("prefix tokens as wide as x", static_cast<int64_t>(stem->prefix.size()), op.prefix_count * e);
    for (const Vector* norm : {&stem->embed_norm, &stem->pre_norm})
        if (!norm->empty()) require_equal("norms [2, E]", static_cast<int64_t>(norm->size()), 2 * e);
    op.linear = l;
    op.positions = stem->positions.data();
    op.prefix = stem->prefix.data();
    op.embed_norm = stem->embed_norm.empty() ? nullptr : stem->embed_norm.data();
    op.pre_norm = stem->pre_norm.empty() ? nullptr : stem->pre_norm.data();
    return Bound(std::move(pool), kernels().patch_embed(op), {linear, stem});
}

Bound bind_pool_head(std::shared_ptr<Pool> pool, SharedLinear linear, std::shared_ptr<const Norms> norms, PoolHead op) {
    require_tokens("x", op.x);
    require_matrix("out", op.out);
    const bool every = op.pooling == Pooling::none, pair = op.pooling == Pooling::tokens;
    const bool patches = op.pooling != Pooling::token && !every && !pair;
    require(op.prefix >= 0 && (!patches || op.prefix < op.x.rows), "at least one token to pool",
            std::to_string(op.x.rows - op.prefix));
    require(!pair || op.x.rows >= 2, "two tokens to pool", std::to_string(op.x.rows));
    const int64_t pooled = pair ? 2 * op.x.cols : op.x.cols;
    require_equal("one row of out for each pooled token", op.out.rows, every ? op.x.batch * op.x.rows : op.x.batch);
    require_equal("out to be as wide as the head", op.out.cols, linear == nullptr ? pooled : linear->get()->out);
    if (linear != nullptr) {
        require_plain(*linear->get());
        require_equal("the head to read the pooled features", linear->get()->in, pooled);
    }
    for (const Vector* norm : {&norms->norm, &norms->fc_norm})
        if (!norm->empty()) require_equal("norms [2, E]", static_cast<int64_t>(norm->size()), 2 * op.x.cols);
    require(!pair || norms->fc_norm.empty(), "no norm after pooling two tokens", "one");
    op.norm = norms->norm.empty() ? nullptr : norms->norm.data();
    op.fc_norm = norms->fc_norm.empty() ? nullptr : norms->fc_norm.data();
    op.linear = linear == nullptr ? nullptr : linear->get();
    return Bound(std::move(pool), kernels().pool_head(op), {linear, norms});
}

}  // namespace prunevit
