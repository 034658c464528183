// The activations of csrc/cuda/pieces.cuh against double precision. Prints the largest error of each, one line a name;
// the exit status says whether one was too large.
#define PRUNEVIT_EMULATE

#include <cmath>
#include <cstdio>
#include <limits>

#include "pieces.cuh"

using namespace prunevit::mlp;

namespace {

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double truth(Act act, double x) {
    switch (act) {
        case Act::gelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case Act::gelu_tanh: return x * sigmoid(2.0 * std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x));
        case Act::quick_gelu: return x * sigmoid(1.702 * x);
        case Act::relu: return x < 0.0 ? 0.0 : x;
    }
    return NAN;
}

bool holds(Act act, const char* name, double bound) {
    double worst = 0.0;
    bool nan_stays = true;
    for (int i = -400000; i <= 400000; ++i) {
        float v[2] = {static_cast<float>(i) * 1e-4f, std::numeric_limits<float>::quiet_NaN()};
        const double x = v[0], scale = std::fmax(1.0, std::fabs(x));
        activate(v, act);
        worst = std::fmax(worst, std::fabs(v[0] - truth(act, x)) / scale);
        nan_stays = nan_stays && std::isnan(v[1]);
    }
    float far[2] = {-3e4f, 3e4f};
    activate(far, act);
    std::printf("%s %.1e\n", name, worst);
    return worst <= bound && nan_stays && far[0] == 0.0f && far[1] == 3e4f;
}

}  // namespace

int main() {
    const bool all[] = {holds(Act::gelu, "gelu", 8e-7), holds(Act::gelu_tanh, "gelu_tanh", 3e-7),
                        holds(Act::quick_gelu, "quick_gelu", 3e-7), holds(Act::relu, "relu", 0.0)};
    for (const bool one : all) {
        if (!one) return 1;
    }
    return 0;
}
