// Ops bound to buffers: checked once, then run without checks.
#pragma once
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"
#include "ops.h"
#include "select_tokens.h"

namespace prunevit {

// A step with what it needs to stay alive, except the caller's buffers.
class Bound {
public:
    // Takes the step and grows the pool's scratch to what it needs.
    Bound(std::shared_ptr<Pool> pool, Step* step, std::vector<std::shared_ptr<const void>> owned);

    void run() const;
    const std::shared_ptr<Pool>& pool() const { return pool_; }
    const Step& step() const { return *step_; }

private:
    std::shared_ptr<Pool> pool_;
    std::vector<std::shared_ptr<const void>> owned_;
    std::unique_ptr<Step> step_;
};

// Holds the pool for as long as it lives.
class Session {
public:
    explicit Session(Pool& pool) : pool_(pool) { pool_.lock(); }
    ~Session() { pool_.unlock(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

private:
    Pool& pool_;
};

// Throws std::invalid_argument("expected {what}, got {got}").
void require(bool holds, const std::string& what, const std::string& got);
void require_matrix(const char* name, const Matrix& m);
void require_tokens(const char* name, const Tokens& t);

using SharedLinear = std::shared_ptr<const PackedLinear>;

Bound bind_norm_linear(std::shared_ptr<Pool>, SharedLinear, Matrix x, Matrix y, float eps);
Bound bind_linear_residual(std::shared_ptr<Pool>, SharedLinear, Matrix c, Matrix x);
Bound bind_fused_mlp(std::shared_ptr<Pool>, SharedLinear fc1, SharedLinear fc2, Matrix x, Activation, float eps);
Bound bind_ragged_attention(std::shared_ptr<Pool>, std::vector<Head> heads, Tokens qkv, Tokens out);
Bound bind_token_scores(std::shared_ptr<Pool>, std::vector<Head> heads, Tokens qkv, Matrix scores, Rule,
                        bool accumulate);
Bound bind_select_tokens(std::shared_ptr<Pool>, SelectTokens);

// Vectors that an op keeps: copied from the caller.
using Vector = std::vector<float>;

struct Stem {
    Vector positions, prefix, embed_norm, pre_norm;  // the norms may be empty
};
Bound bind_patch_embed(std::shared_ptr<Pool>, SharedLinear, std::shared_ptr<const Stem>, PatchEmbed op);

struct Norms {
    Vector norm, fc_norm;  // may be empty
};
Bound bind_pool_head(std::shared_ptr<Pool>, SharedLinear or_null, std::shared_ptr<const Norms>, PoolHead op);

// Multiply-adds a second on all threads at once, in floating-point operations.
double fma_peak(int threads, double milliseconds);
// Bytes a second that all threads together read from memory, each from its own part of `bytes`.
double read_bandwidth(int threads, int64_t bytes, double milliseconds);

}  // namespace prunevit
