// prunevit_kernels._cuda: the CUDA kernels on raw pointers. The only CUDA file that names Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch.h"

namespace py = pybind11;
using namespace prunevit::mlp;

namespace {

constexpr std::pair<const char*, Kernel> kKernels[] = {{"fused", Kernel::fused},
                                                       {"split", Kernel::split},
                                                       {"two_gemms", Kernel::two_gemms},
                                                       {"wgmma", Kernel::wgmma},
                                                       {"wgmma_gemms", Kernel::wgmma_gemms}};
#if defined(PRUNEVIT_WGMMA)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif
constexpr std::pair<const char*, Act> kActs[] = {
    {"gelu", Act::gelu}, {"gelu_tanh", Act::gelu_tanh}, {"quick_gelu", Act::quick_gelu}, {"relu", Act::relu}};
constexpr std::pair<const char*, Dtype> kDtypes[] = {{"float16", Dtype::fp16}, {"bfloat16", Dtype::bf16}};

template <class T, size_t Count>
T named(const std::pair<const char*, T> (&names)[Count], const std::string& name, const char* what) {
    std::string known;
    for (const auto& [key, value] : names) {
        if (name == key) return value;
        known += std::string(known.empty() ? "" : ", ") + key;
    }
    throw std::invalid_argument(std::string("expected ") + what + " (" + known + "), got '" + name + "'");
}

void expect(bool condition, const std::string& what) {
    if (!condition) throw std::invalid_argument("fused_mlp expected " + what);
}

Shape shape_of(int rows, int embed, int in, int hidden, int out) {
    const Shape s{rows, embed, in, hidden, out};
    expect(rows >= 1 && embed >= 1 && hidden >= 1, "M, E, F >= 1, got " + describe(s));
    expect(1 <= in && in <= embed && 1 <= out && out <= embed, "1 <= K, N <= E, got " + describe(s));
    expect(embed <= 1 << 16 && hidden <= 1 << 18 && rows <= 1 << 28,
           "E <= 65536, F <= 262144, M <= 2^28, got " + describe(s));
    return s;
}

int attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&value, which, index);
    if (status != cudaSuccess) {
        throw std::runtime_error("cudaDeviceGetAttribute failed on GPU " + std::to_string(index) + ": " +
                                 cudaGetErrorString(status));
    }
    return value;
}

Device device_of(int index) {
    const int sm =
        attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 + attribute(cudaDevAttrComputeCapabilityMinor, index);
    return {sm, attribute(cudaDevAttrMultiProcessorCount, index),
            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index), kHopper};
}

// The GPU that the pointers belong to is current while this lives.
class OnDevice {
public:
    OnDevice(int index, const Plan& plan, const Shape& shape) {
        check(cudaGetDevice(&before_), "cudaGetDevice", plan, shape);
        if (before_ != index) check(cudaSetDevice(index), "cudaSetDevice", plan, shape);
        changed_ = before_ != index;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

// A buffer of device memory: where, and how many bytes there are.
struct Memory {
    uintptr_t address;
    int64_t bytes;
};

template <class T>
T* pointer(const Memory& memory, int64_t needed, size_t alignment, const char* name) {
    expect(memory.bytes >= needed,
           std::string(name) + " of " + std::to_string(needed) + " bytes, got " + std::to_string(memory.bytes));
    expect(memory.address != 0 && memory.address % alignment == 0, std::string(name) + " at a multiple of " +
                                                                       std::to_string(alignment) + ", got " +
                                                                       std::to_string(memory.address));
    return reinterpret_cast<T*>(memory.address);
}

struct Weights {
    Memory w1, w2, b1, b2, gamma;
    std::optional<Memory> reads, writes;
};

// One MLP with its buffers: everything is checked here, so that a launch only launches.
class Mlp {
public:
    Mlp(const Plan& plan, const Shape& shape, const std::string& dtype, const std::string& act, float eps,
        const Weights& weights, std::tuple<uintptr_t, int64_t> x, std::optional<Memory> workspace, int device,
        bool overlaps)
        : plan_(plan), device_(device), overlaps_(overlaps) {
        const auto [x_address, pitch] = x;
        expect(pitch >= shape.embed, "rows of x at least E apart, got a pitch of " + std::to_string(pitch));
        expect(x_address != 0 && x_address % 2 == 0, "x on whole elements, got " + std::to_string(x_address));
        expect(eps >= 0.0f, "eps >= 0, got " + std::to_string(eps));
        Arguments& a = arguments_;
        a.shape = shape;
        a.x = reinterpret_cast<uint16_t*>(x_address);
        a.pitch = pitch;
        a.wide = pitch % 8 == 0 && x_address % 16 == 0;
        a.w1 = pointer<unsigned char>(weights.w1, shape.chunks() * w1_chunk_bytes(shape), 16, "packed fc1 weights");
        a.w2 = pointer<unsigned char>(weights.w2, shape.chunks() * w2_chunk_bytes(shape), 16, "packed fc2 weights");
        a.b1 = pointer<float>(weights.b1, int64_t{shape.chunks()} * kChunk * 4, 16, "fc1's bias");
        a.b2 = pointer<float>(weights.b2, int64_t{shape.out_padded()} * 4, 16, "fc2's bias");
        a.gamma = pointer<float>(weights.gamma, int64_t{shape.out_padded()} * 4, 16, "gamma");
        expect(weights.reads || shape.in == shape.embed, "a list of reads where K < E");
        expect(weights.writes || shape.out == shape.embed, "a list of writes where N < E");
        if (weights.reads) a.reads = pointer<int>(*weights.reads, int64_t{shape.in} * 4, 4, "reads");
        if (weights.writes) a.writes = pointer<int>(*weights.writes, int64_t{shape.out} * 4, 4, "writes");
        a.eps = eps;
        a.act = named(kActs, act, "an activation");
        a.splits = plan.splits;
        a.slots = plan.slots;
        a.tile_chunks = plan.tile_chunks;
        const int64_t partial = round_up_bytes(plan.partial_bytes), needed = partial + plan.hidden_bytes;
        if (needed > 0) {
            auto* const memory = pointer<unsigned char>(workspace.value_or(Memory{0, 0}), needed, 16, "a workspace");
            a.partial = reinterpret_cast<float*>(memory);
            a.hidden = reinterpret_cast<uint16_t*>(memory + partial);
        }

        const Dtype type = named(kDtypes, dtype, "a dtype");
        switch (plan.kernel) {
            case Kernel::fused:
            case Kernel::split: launches_ = {fused_launch(type, shape, plan)}; break;
            case Kernel::two_gemms:
                launches_ = {expand_launch(type, shape, plan), contract_launch(type, shape, plan)};
                break;
#if defined(PRUNEVIT_WGMMA)
            case Kernel::wgmma: launches_ = {wgmma_launch(type, shape, plan)}; break;
            case Kernel::wgmma_gemms:
                launches_ = {wgmma_expand_launch(type, shape, plan), wgmma_contract_launch(type, shape, plan)};
                break;
#endif
            default: expect_hopper(plan.kernel, shape, {90, 0, 0, kHopper});
        }
        if (plan.splits > 1) launches_.push_back(reduce_launch(type, shape));
        const OnDevice here(device_, plan_, shape);
        const int limit = device_of(device_).shared_limit;
        for (const Launch& launch : launches_) {
            prepare(launch, limit, plan_, shape);
            if (overlaps_) expect_waiting(launch, plan_, shape);
        }
    }

    void launch(uintptr_t stream) const {
        const OnDevice here(device_, plan_, arguments_.shape);
        for (const Launch& launch : launches_) {
            start(launch, arguments_, plan_, overlaps_, reinterpret_cast<cudaStream_t>(stream));
        }
    }

    static int64_t round_up_bytes(int64_t bytes) { return (bytes + 255) / 256 * 256; }

private:
    Plan plan_;
    int device_;
    bool overlaps_;
    Arguments arguments_{};
    std::vector<Launch> launches_;
};

Memory memory_of(const std::tuple<uintptr_t, int64_t>& given) { return {std::get<0>(given), std::get<1>(given)}; }
std::optional<Memory> memory_of(const std::optional<std::tuple<uintptr_t, int64_t>>& given) {
    return given ? std::optional<Memory>(memory_of(*given)) : std::nullopt;
}

}  // namespace

// Types are the module's own: another build of it may be loaded beside it, as tests do.
PYBIND11_MODULE(_cuda, m) {
    using Given = std::tuple<uintptr_t, int64_t>;
    m.doc() = "Fused MLPs on CUDA: raw pointers, sizes and streams. Use prunevit_kernels.FusedMlp.";

    py::class_<Shape>(m, "Shape", py::module_local(), "M, E, K (channels read), F, N (channels written)")
        .def(py::init(&shape_of), py::arg("rows"), py::arg("embed"), py::arg("reads"), py::arg("hidden"),
             py::arg("writes"))
        .def("__repr__", [](const Shape& s) { return "Shape(" + describe(s) + ")"; });

    py::class_<Device>(m, "Device", py::module_local(), "What the choice of a kernel depends on")
        .def(py::init([](int sm, int multiprocessors, int shared_limit) {
                 return Device{sm, multiprocessors, shared_limit, kHopper};
             }),
             py::arg("sm"), py::arg("multiprocessors"), py::arg("shared_limit"))
        .def_static("of", &device_of, py::arg("index"))
        .def_readonly("sm", &Device::sm)
        .def_readonly("multiprocessors", &Device::multiprocessors)
        .def_readonly("shared_limit", &Device::shared_limit);

    py::class_<Plan>(m, "Plan", py::module_local(), "A kernel and how it is launched")
        .def(py::init([](const Shape& shape, const Device& device, const std::optional<std::string>& kernel) {
                 return plan_of(kernel ? named(kKernels, *kernel, "a kernel") : chosen_kernel(shape, device), shape,
                                device);
             }),
             py::arg("shape"), py::arg("device"), py::arg("kernel") = py::none())
        .def_property_readonly("kernel", [](const Plan& p) { return name_of(p.kernel); })
        .def_readonly("splits", &Plan::splits)
        .def_readonly("shared_bytes", &Plan::shared)
        .def_property_readonly("tile_rows", [](const Plan& p) { return p.kernel == Kernel::wgmma ? 128 : 32 * p.mt; })
        .def_property_readonly("workspace_bytes",
                               [](const Plan& p) { return Mlp::round_up_bytes(p.partial_bytes) + p.hidden_bytes; });

    py::class_<Weights>(m, "Weights", py::module_local(), "Packed weights: (address, bytes) each")
        .def(py::init([](Given w1, Given w2, Given b1, Given b2, Given gamma, std::optional<Given> reads,
                         std::optional<Given> writes) {
                 return Weights{memory_of(w1),    memory_of(w2),    memory_of(b1),    memory_of(b2),
                                memory_of(gamma), memory_of(reads), memory_of(writes)};
             }),
             py::arg("w1"), py::arg("w2"), py::arg("b1"), py::arg("b2"), py::arg("gamma"), py::arg("reads"),
             py::arg("writes"));

    py::class_<Mlp>(m, "Mlp", py::module_local(), "One MLP bound to its buffers; launch(stream) only launches")
        .def(py::init([](const Plan& plan, const Shape& shape, const std::string& dtype, const std::string& act,
                         float eps, const Weights& weights, Given x, std::optional<Given> workspace, int device,
                         bool overlaps) {
                 return Mlp(plan, shape, dtype, act, eps, weights, x, memory_of(workspace), device, overlaps);
             }),
             py::arg("plan"), py::arg("shape"), py::arg("dtype"), py::arg("act"), py::arg("eps"), py::arg("weights"),
             py::arg("x"), py::arg("workspace"), py::arg("device"), py::arg("overlaps"))
        .def("launch", &Mlp::launch, py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
