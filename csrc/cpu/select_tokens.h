// Token reduction to a static count: the tokens with the highest scores, in their order.
#pragma once
#include "ops.h"

namespace prunevit {

struct SelectTokens {
    Tokens x;
    Matrix scores;  // [batch, tokens]
    Tokens kept_x;  // prefix + keep tokens, one more with `fuse`
    Matrix kept_scores;
    int64_t keep, prefix;
    bool fuse;
};

Step* select_tokens(const SelectTokens& op);

}  // namespace prunevit
