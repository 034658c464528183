// A ring of tiles in shared memory that one thread fills by bulk copies and warpgroups multiply from.
#pragma once

#include "primitives_sm90.cuh"

namespace prunevit::mlp {

// A slot of the ring, and the parity of this use of it: the use before it there has the other one. Carried from tile to
// tile, since a division by the number of slots costs as much as a small product.
struct Turn {
    int slot = 0, parity = 0;
};

struct Ring {
    uint32_t slots, barriers;  // shared addresses; barriers: full and empty, one pair a slot
    int slot_bytes, count;

    PRUNEVIT_BOTH uint32_t slot(Turn t) const { return slots + t.slot * slot_bytes; }
    PRUNEVIT_BOTH uint32_t full(Turn t) const { return barriers + t.slot * 16; }
    PRUNEVIT_BOTH uint32_t empty(Turn t) const { return barriers + t.slot * 16 + 8; }
    PRUNEVIT_BOTH Turn after(Turn t, int tiles = 1) const {
        t.slot += tiles;
        while (t.slot >= count) {
            t.slot -= count;
            t.parity ^= 1;
        }
        return t;
    }
    // Whoever fills waits for the use before to end; a fresh slot's has.
    PRUNEVIT_DEVICE void wait_empty(Turn t) const { barrier_wait(empty(t), t.parity ^ 1); }
    PRUNEVIT_DEVICE void wait_full(Turn t) const { barrier_wait(full(t), t.parity); }
    PRUNEVIT_DEVICE void release(Turn t, int lane) const {
        if (lane == 0) barrier_arrive(empty(t));
    }
};

}  // namespace prunevit::mlp
