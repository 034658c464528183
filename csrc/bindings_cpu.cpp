// prunevit_kernels._cpu: the CPU kernels as Python sees them. Buffers come as (address, sizes, pitches) tuples of ints.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>

#include "cpu/bound.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace prunevit;

namespace {

using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using TokensTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using HeadTuple = std::tuple<int, int, int, int, int, int>;
using PoolPointer = std::shared_ptr<Pool>;
using LinearPointer = std::shared_ptr<PackedLinear>;

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

Matrix matrix(const MatrixTuple& t) {
    const auto [data, rows, cols, pitch] = t;
    return {reinterpret_cast<float*>(data), rows, cols, pitch};
}

Tokens tokens(const TokensTuple& t) {
    const auto [data, batch, rows, cols, image, pitch] = t;
    return {reinterpret_cast<float*>(data), batch, rows, cols, image, pitch};
}

std::vector<Head> heads(const std::vector<HeadTuple>& tuples) {
    std::vector<Head> all;
    for (const auto& [qk, v, q_at, k_at, v_at, o_at] : tuples) all.push_back({qk, v, q_at, k_at, v_at, o_at});
    return all;
}

// While this lives, other threads run Python. Taking the lock back ends this thread where Python is shutting down and
// it is a daemon: before 3.14 by unwinding, which must be let through.
class WithoutGil {
public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() noexcept(false) { PyEval_RestoreThread(state_); }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

private:
    PyThreadState* state_;
};

// A bound op, with the Python objects whose memory it uses.
struct Launch {
    Bound bound;
    py::object buffers;

    void run() const {
        const WithoutGil release;
        bound.run();
    }
};

// Binding may have to wait for a program that another thread runs on the same pool.
template <class Bind>
Launch launch(py::object buffers, const Bind& bind) {
    const auto bound = [&] {
        const WithoutGil release;
        return bind();
    };
    return {bound(), std::move(buffers)};
}

// Bound ops run one after the other in one call, holding their pool throughout.
class Program {
public:
    explicit Program(std::vector<py::object> launches) : launches_(std::move(launches)) {
        for (const py::object& launch : launches_) {
            const Bound& bound = launch.cast<const Launch&>().bound;
            require(bounds_.empty() || bound.pool() == bounds_[0]->pool(), "launches of one pool", "several");
            bounds_.push_back(&bound);
        }
        require(!bounds_.empty(), "at least one launch", "none");
    }

    void run() const {
        const WithoutGil release;
        Session session(*bounds_[0]->pool());
        for (const Bound* bound : bounds_) bound->step().run(*bound->pool());
    }

    // Seconds that each took.
    std::vector<double> timed() const {
        const WithoutGil release;
        Session session(*bounds_[0]->pool());
        std::vector<double> seconds;
        for (const Bound* bound : bounds_) {
            const auto start = std::chrono::steady_clock::now();
            bound->step().run(*bound->pool());
            seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        return seconds;
    }

    size_t size() const { return bounds_.size(); }

private:
    std::vector<py::object> launches_;
    std::vector<const Bound*> bounds_;
};

LinearPointer packed_linear(const MatrixTuple& weight, uintptr_t bias, uintptr_t gamma, std::vector<int> reads,
                            std::vector<int> writes, std::vector<int> k_start) {
    const Matrix w = matrix(weight);
    require_matrix("weight", w);
    const int64_t longest = std::max(w.rows, w.cols);
    require(longest <= 1 << 24, "at most 2^24 rows and columns", std::to_string(longest));
    require(reads.empty() || static_cast<int64_t>(reads.size()) == w.cols, "one channel read an input",
            std::to_string(reads.size()));
    require(writes.empty() || static_cast<int64_t>(writes.size()) == w.rows, "one channel written an output",
            std::to_string(writes.size()));
    if (!k_start.empty()) {
        bool rises = k_start.front() == 0 && k_start.back() == w.cols;
        for (size_t b = 1; b < k_start.size(); ++b) rises = rises && k_start[b] > k_start[b - 1];
        require(rises, "blocks that cut the inputs", "others");
    }
    const WithoutGil release;
    return std::make_shared<PackedLinear>(Weight{w.data, w.rows, w.cols, w.pitch, floats(bias), floats(gamma)},
                                          std::move(reads), std::move(writes), std::move(k_start));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    py::register_exception<IsaError>(m, "IsaError", PyExc_RuntimeError);

    py::enum_<Activation>(m, "Activation")
        .value("gelu", Activation::gelu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("quick_gelu", Activation::quick_gelu)
        .value("relu", Activation::relu);
    py::enum_<Pooling>(m, "Pooling")
        .value("token", Pooling::token)
        .value("tokens", Pooling::tokens)
        .value("avg", Pooling::avg)
        .value("max", Pooling::max)
        .value("avgmax", Pooling::avgmax)
        .value("none", Pooling::none);
    py::enum_<Rule>(m, "Rule")
        .value("max_attention", Rule::max_attention)
        .value("class_attention", Rule::class_attention);

    py::class_<Pool, PoolPointer>(m, "Pool")
        .def(py::init([](int threads, int spin_us) {
                 require(threads >= 1 && threads <= 1024, "1 to 1024 threads", std::to_string(threads));
                 require(spin_us >= 0 && spin_us <= 1000000, "to spin for 0 to 1000000 µs", std::to_string(spin_us));
                 return std::make_shared<Pool>(threads, spin_us);
             }),
             py::arg("threads"), py::arg("spin_us") = 50)
        .def_property_readonly("threads", &Pool::threads);

    py::class_<PackedLinear, LinearPointer>(m, "PackedLinear")
        .def(py::init(&packed_linear), py::arg("weight"), py::arg("bias"), py::arg("gamma"), py::arg("reads"),
             py::arg("writes"), py::arg("k_start"))
        .def(
            "column_blocks",
            [](const PackedLinear& linear, int max_columns) {
                require(max_columns >= 1, "at least one column a block", std::to_string(max_columns));
                return linear.column_blocks(max_columns);
            },
            py::arg("max_columns"));

    py::class_<Stem, std::shared_ptr<Stem>>(m, "Stem").def(
        py::init([](Vector positions, Vector prefix, Vector embed_norm, Vector pre_norm) {
            return std::make_shared<Stem>(
                Stem{std::move(positions), std::move(prefix), std::move(embed_norm), std::move(pre_norm)});
        }),
        py::arg("positions"), py::arg("prefix"), py::arg("embed_norm"), py::arg("pre_norm"));
    py::class_<Norms, std::shared_ptr<Norms>>(m, "Norms")
        .def(py::init([](Vector norm, Vector fc_norm) {
                 return std::make_shared<Norms>(Norms{std::move(norm), std::move(fc_norm)});
             }),
             py::arg("norm"), py::arg("fc_norm"));

    py::class_<Launch>(m, "Launch").def("__call__", &Launch::run);
    py::class_<Program>(m, "Program")
        .def(py::init<std::vector<py::object>>(), py::arg("launches"))
        .def("__call__", &Program::run)
        .def("timed", &Program::timed)
        .def("__len__", &Program::size);

    m.def("norm_linear", [](py::object buffers, PoolPointer pool, LinearPointer linear, const MatrixTuple& x,
                            const MatrixTuple& y, float eps) {
        return launch(std::move(buffers), [&] { return bind_norm_linear(pool, linear, matrix(x), matrix(y), eps); });
    });
    m.def("linear_residual", [](py::object buffers, PoolPointer pool, LinearPointer linear, const MatrixTuple& c,
                                const MatrixTuple& x) {
        return launch(std::move(buffers), [&] { return bind_linear_residual(pool, linear, matrix(c), matrix(x)); });
    });
    m.def("fused_mlp", [](py::object buffers, PoolPointer pool, LinearPointer fc1, LinearPointer fc2,
                          const MatrixTuple& x, Activation act, float eps) {
        return launch(std::move(buffers), [&] { return bind_fused_mlp(pool, fc1, fc2, matrix(x), act, eps); });
    });
    m.def("ragged_attention", [](py::object buffers, PoolPointer pool, const std::vector<HeadTuple>& table,
                                 const TokensTuple& qkv, const TokensTuple& out) {
        return launch(std::move(buffers),
                      [&] { return bind_ragged_attention(pool, heads(table), tokens(qkv), tokens(out)); });
    });
    m.def("token_scores", [](py::object buffers, PoolPointer pool, const std::vector<HeadTuple>& table,
                             const TokensTuple& qkv, const MatrixTuple& scores, Rule rule, bool accumulate) {
        return launch(std::move(buffers), [&] {
            return bind_token_scores(pool, heads(table), tokens(qkv), matrix(scores), rule, accumulate);
        });
    });
    m.def("select_tokens", [](py::object buffers, PoolPointer pool, const TokensTuple& x, const MatrixTuple& scores,
                              const TokensTuple& kept_x, const MatrixTuple& kept_scores, int64_t keep, int64_t prefix,
                              bool fuse) {
        const SelectTokens op = {tokens(x), matrix(scores), tokens(kept_x), matrix(kept_scores), keep, prefix, fuse};
        return launch(std::move(buffers), [&] { return bind_select_tokens(pool, op); });
    });
    m.def("patch_embed", [](py::object buffers, PoolPointer pool, LinearPointer linear, std::shared_ptr<Stem> stem,
                            uintptr_t images, const std::array<int64_t, 4>& shape, const std::array<int64_t, 2>& patch,
                            const TokensTuple& x, int64_t prefix, float eps) {
        PatchEmbed op = {};
        op.images = floats(images);
        op.batch = shape[0], op.channels = shape[1], op.height = shape[2], op.width = shape[3];
        op.patch_h = patch[0], op.patch_w = patch[1];
        op.x = tokens(x);
        op.prefix_count = prefix;
        op.eps = eps;
        return launch(std::move(buffers), [&] { return bind_patch_embed(pool, linear, stem, op); });
    });
    m.def("pool_head", [](py::object buffers, PoolPointer pool, LinearPointer linear, std::shared_ptr<Norms> norms,
                          const TokensTuple& x, const MatrixTuple& out, Pooling pooling, int64_t prefix, float eps) {
        PoolHead op = {};
        op.x = tokens(x);
        op.out = matrix(out);
        op.pooling = pooling;
        op.prefix = prefix;
        op.eps = eps;
        return launch(std::move(buffers), [&] { return bind_pool_head(pool, linear, norms, op); });
    });

    m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
    m.def("isas", &runnable_isas, "The instruction sets that are built and run here, best first.");
    m.def(
        "apply",
        [](const std::string& function, uintptr_t x, uintptr_t y, int64_t count) {
            require(kernels().apply(function.c_str(), floats(x), reinterpret_cast<float*>(y), count),
                    "a function's name", function);
        },
        "y = function(x), for tests of exp2, sigmoid2, gelu, gelu_tanh, quick_gelu, relu.");
    m.def(
        "fma_peak",
        [](int threads, double milliseconds) {
            const WithoutGil release;
            return fma_peak(threads, milliseconds);
        },
        py::arg("threads"), py::arg("milliseconds"), "Measured multiply-add peak of all threads, FLOP/s.");
    m.def(
        "bandwidth",
        [](int threads, int64_t bytes, double milliseconds) {
            const WithoutGil release;
            return read_bandwidth(threads, bytes, milliseconds);
        },
        py::arg("threads"), py::arg("bytes"), py::arg("milliseconds"),
        "Measured reading rate of all threads, bytes/s.");
}
