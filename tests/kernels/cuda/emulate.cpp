// Runs one fused MLP through the emulator: emulate DIR SM MULTIPROCESSORS SHARED_LIMIT. DIR/case holds the numbers,
// DIR/<buffer> the bytes; x and the plan that ran come back. Buffers end at an unreadable page: a read past one ends
// the program.
#define PRUNEVIT_EMULATE
#include <sys/mman.h>

#include <fstream>
#include <iterator>
#include <stdexcept>

#include "fused_mma.cuh"
#include "fused_wgmma.cuh"
#include "plan.h"
#include "two_gemms.cuh"
#include "wgmma_gemms.cuh"

using namespace prunevit::mlp;
using prunevit::emulator::launch;

namespace {

std::string folder;

// `bytes` of memory up to the very end of a page with none behind it, as far as the alignment allows.
unsigned char* fenced(size_t bytes, size_t alignment) {
    const size_t page = 4096, pages = (bytes + page - 1) / page + 1;
    void* at = mmap(nullptr, (pages + 1) * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("mmap failed");
    auto* end = static_cast<unsigned char*>(at) + pages * page;
    if (mprotect(end, page, PROT_NONE) != 0) throw std::runtime_error("mprotect failed");
    return end - (bytes + alignment - 1) / alignment * alignment;
}

template <class T>
T* read(const std::string& name, size_t* count = nullptr, size_t alignment = alignof(T)) {
    std::ifstream file(folder + "/" + name, std::ios::binary);
    if (!file) return nullptr;
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    unsigned char* to = fenced(bytes.size(), alignment);
    std::memcpy(to, bytes.data(), bytes.size());
    if (count != nullptr) *count = bytes.size() / sizeof(T);
    return reinterpret_cast<T*>(to);
}

float* poisoned(int64_t bytes) {
    unsigned char* to = fenced(bytes, 16);
    std::memset(to, 0xff, bytes);
    return reinterpret_cast<float*>(to);
}

template <Dtype D, int MT, int NU>
void fused(const Arguments& a, const Plan& p) {
    const Dim3 grid{static_cast<unsigned>(ceil_div(a.shape.rows, 32 * MT)), static_cast<unsigned>(p.splits)};
    launch(grid, kThreads, p.shared, [&] { fused_mma<D, MT, NU>(a); });
}

template <Dtype D, int MT, int ExpandMT>
void gemms(const Arguments& a, const Plan& p) {
    const unsigned rows = ceil_div(a.shape.rows, 32 * MT), columns = ceil_div(a.shape.out, kGemmColumns);
    const unsigned expand_rows = ceil_div(a.shape.rows, 32 * ExpandMT);
    launch({expand_rows, static_cast<unsigned>(p.expand_columns)}, kThreads, gemm_shared_bytes(32 * ExpandMT),
           [&] { expand<D, ExpandMT>(a); });
    launch({rows * columns, static_cast<unsigned>(p.splits)}, kThreads, p.shared, [&] { contract<D, MT>(a); });
}

template <Dtype D, int Columns>
void wgmma(const Arguments& a, const Plan& p) {
    launch(
        {static_cast<unsigned>(p.blocks)}, kWgmmaThreads, p.shared, [&] { fused_wgmma<D, Columns>(a); },
        prunevit::emulator::reset_sm90);
}

template <Dtype D, int Columns>
void wgmma_gemms(const Arguments& a, const Plan& p) {
    const unsigned rows = ceil_div(a.shape.rows, kContractRows), columns = ceil_div(a.shape.out, Columns);
    const Dim3 first{static_cast<unsigned>(row_tiles(a.shape)), static_cast<unsigned>(p.expand_columns)};
    launch(
        first, kWgmmaThreads, expand_shared(a.shape, p.slots).bytes, [&] { wgmma_expand<D>(a); },
        prunevit::emulator::reset_sm90);
    launch(
        {rows * columns, static_cast<unsigned>(p.splits)}, kWgmmaThreads, contract_shared_bytes(Columns),
        [&] { wgmma_contract<D, Columns>(a); }, prunevit::emulator::reset_sm90);
}

template <Dtype D>
void run(const Arguments& a, const Plan& p) {
    if (p.kernel == Kernel::two_gemms) {
        p.mt == 4 ? gemms<D, 4, 3>(a, p) : gemms<D, 2, 2>(a, p);
    } else if (p.kernel == Kernel::wgmma_gemms) {
        switch (p.nu) {
            case 64: wgmma_gemms<D, 64>(a, p); break;
            case 128: wgmma_gemms<D, 128>(a, p); break;
            case 160: wgmma_gemms<D, 160>(a, p); break;
            case 176: wgmma_gemms<D, 176>(a, p); break;
            default: wgmma_gemms<D, 192>(a, p);
        }
    } else if (p.kernel == Kernel::wgmma) {
        switch (p.nu) {
            case 160: return wgmma<D, 160>(a, p);
            case 192: return wgmma<D, 192>(a, p);
            case 320: return wgmma<D, 320>(a, p);
            case 352: return wgmma<D, 352>(a, p);
            default: return wgmma<D, 384>(a, p);
        }
    } else if (p.mt == 1) {
        fused<D, 1, 8>(a, p);
    } else if (p.mt == 4) {
        fused<D, 4, 3>(a, p);
    } else if (p.nu == 3) {
        fused<D, 2, 3>(a, p);
    } else if (p.nu == 6) {
        fused<D, 2, 6>(a, p);
    } else {
        fused<D, 2, 8>(a, p);
    }
    if (p.splits > 1) {
        const unsigned blocks = (int64_t{a.shape.rows} * a.shape.out_padded() / 8 + kThreads - 1) / kThreads;
        launch({blocks}, kThreads, 0, [&] { reduce_splits<D>(a); });
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 5) return 2;
    folder = arguments[1];
    const Device device{std::atoi(arguments[2]), std::atoi(arguments[3]), std::atoi(arguments[4])};
    std::ifstream numbers(folder + "/case");
    Arguments a{};
    int dtype, act, kernel, wide;
    numbers >> a.shape.rows >> a.shape.embed >> a.shape.in >> a.shape.hidden >> a.shape.out >> a.pitch >> wide >>
        a.eps >> dtype >> act >> kernel;
    if (!numbers) return 2;
    a.wide = wide != 0;
    a.act = static_cast<Act>(act);
    try {
        const Kernel which = kernel < 0 ? chosen_kernel(a.shape, device) : static_cast<Kernel>(kernel);
        const Plan plan = plan_of(which, a.shape, device);
        size_t elements = 0;
        a.x = read<uint16_t>("x", &elements, wide ? 16 : 2);
        a.w1 = read<unsigned char>("w1", nullptr, 16);
        a.w2 = read<unsigned char>("w2", nullptr, 16);
        a.b1 = read<float>("b1");
        a.b2 = read<float>("b2");
        a.gamma = read<float>("gamma");
        a.reads = read<int>("reads");
        a.writes = read<int>("writes");
        a.splits = plan.splits;
        a.slots = plan.slots;
        a.tile_chunks = plan.tile_chunks;
        a.partial = poisoned(plan.partial_bytes);
        a.hidden = reinterpret_cast<uint16_t*>(poisoned(plan.hidden_bytes));
        dtype == 0 ? run<Dtype::fp16>(a, plan) : run<Dtype::bf16>(a, plan);
        std::ofstream(folder + "/x", std::ios::binary).write(reinterpret_cast<char*>(a.x), elements * 2);
        std::printf("%s mt=%d nu=%d splits=%d blocks=%d chunks=%d shared=%d\n", name_of(plan.kernel), plan.mt, plan.nu,
                    plan.splits, plan.expand_columns, plan.tile_chunks, plan.shared);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
