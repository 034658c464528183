"""The head table: where each head's query, key, value and output columns lie in a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._expect import expect
from .units import round_up

MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class HeadTable:
    """Per-head widths and column offsets of packed attention rows.

    A packed row holds every head's q, then every head's k, then every head's v: ``width`` columns. The output row
    holds every head's o: ``out_width`` columns. Offsets are in elements.
    """

    qk_dims: tuple[int, ...]
    v_dims: tuple[int, ...]
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    o: tuple[int, ...]
    width: int
    out_width: int

    @classmethod
    def packed(cls, qk_dims: Sequence[int], v_dims: Sequence[int], *, align: int = 1) -> HeadTable:
        """Lay heads out in the given order, each slice starting on a multiple of ``align`` columns."""
        expect(len(qk_dims) == len(v_dims), "one value width a head", got=len(v_dims), want=len(qk_dims))
        for dim in (*qk_dims, *v_dims):
            expect(1 <= dim <= MAX_HEAD_DIM, "a head width from 1 to 128", got=dim)

        def lay(start: int, dims: Sequence[int]) -> tuple[tuple[int, ...], int]:
            offsets = []
            for dim in dims:
                offsets.append(start)
                start += round_up(dim, align)
            return tuple(offsets), start

        q, end = lay(0, qk_dims)
        k, end = lay(end, qk_dims)
        v, width = lay(end, v_dims)
        o, out_width = lay(0, v_dims)
        return cls(tuple(qk_dims), tuple(v_dims), q, k, v, o, width, out_width)

    def __len__(self) -> int:
        return len(self.qk_dims)

    def qkv_columns(self) -> list[int]:
        """The packed column of each row of a [Q | K | V] weight, in that weight's order."""
        slices = [*zip(self.q, self.qk_dims), *zip(self.k, self.qk_dims), *zip(self.v, self.v_dims)]
        return [offset + i for offset, dim in slices for i in range(dim)]

    def out_columns(self) -> list[int]:
        """The packed output column of each column of a proj weight, in that weight's order."""
        return [offset + i for offset, dim in zip(self.o, self.v_dims) for i in range(dim)]
