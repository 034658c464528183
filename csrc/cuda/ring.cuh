// A ring of tiles in shared memory that one thread fills by bulk copies and warpgroups multiply from.
#pragma once

#include "primitives_sm90.cuh"

namespace prunevit::mlp {

struct Ring {
    uint32_t slots, barriers;  // shared addresses; barriers: full and empty, one pair a slot
    int slot_bytes, count;

    PRUNEVIT_BOTH uint32_t slot(int i) const { return slots + i % count * slot_bytes; }
    PRUNEVIT_BOTH uint32_t full(int i) const { return barriers + i % count * 16; }
    PRUNEVIT_BOTH uint32_t empty(int i) const { return barriers + i % count * 16 + 8; }
    // Parity of the use of a slot that tile i is; tile i's predecessor there has the other one.
    PRUNEVIT_BOTH int parity(int i) const { return i / count % 2; }
};

}  // namespace prunevit::mlp
