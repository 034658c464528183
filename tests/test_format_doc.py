"""docs/format.md names every field of the format and every tensor of a spec."""

from __future__ import annotations

import re
from pathlib import Path

from prunevit.models.tensors import expected_shapes
from prunevit.spec import BlockSpec, TokenSelect
from tests.specs import SPECS

TEXT = (Path(__file__).parent.parent / "docs" / "format.md").read_text("utf-8")


def test_names_every_field_of_a_block() -> None:
    for field in BlockSpec.model_fields:
        assert f"`{field}`" in TEXT, field
    for field in TokenSelect.model_fields:
        assert re.search(rf"\b{field}\b", TEXT), field


def test_names_every_tensor() -> None:
    stems = {
        re.sub(r"blocks\.\d+", "blocks.i", name).removesuffix(".weight").removesuffix(".bias")
        for spec in SPECS.values()
        for name in expected_shapes(spec)
        if not name.startswith("attn_pool.")
    }
    for stem in stems:
        assert f"`{stem}" in TEXT, stem
