"""docs/format.md names every field of the format, with its default, and every tensor of a spec."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from timm.models.vision_transformer import VisionTransformer

from prunevit.models.tensors import expected_shapes
from prunevit.spec import AttnPoolSpec, BlockSpec, TokenSelect, ViTSpec
from tests.specs import SPECS

TEXT = (Path(__file__).parent.parent / "docs" / "format.md").read_text("utf-8")
REQUIRED = "–"


def rows(above: str) -> dict[str, str]:
    """The default of each field, in the first table of four columns after some words."""
    table = TEXT.split(above, 1)[1].split("| field | type | default | meaning |\n", 1)[1].split("\n\n", 1)[0]
    found: dict[str, str] = {}
    for line in table.splitlines()[1:]:
        names, _, default, _ = (cell.strip() for cell in line.strip("|").split(" | "))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), default)
    return found


@pytest.mark.parametrize(("model", "above"), [(ViTSpec, "## The spec"), (BlockSpec, "Each entry of `blocks`:")])
def test_has_a_row_with_its_default_for_every_field(model: type[BaseModel], above: str) -> None:
    found = rows(above)
    assert set(found) == set(model.model_fields)
    for name, field in model.model_fields.items():
        if field.is_required():
            assert found[name] == REQUIRED, name
        else:
            want = json.loads(json.dumps(field.default))
            assert json.loads(found[name]) == want, name


def test_names_every_field_of_a_selection_and_of_a_pool() -> None:
    for field in (*TokenSelect.model_fields, *AttnPoolSpec.model_fields):
        assert re.search(rf"\b{field}\b", TEXT), field


def test_says_which_fields_are_not_named_as_timm_names_them() -> None:
    sentence = re.search(r"Most have the name of an argument.*? do not\.", TEXT, re.S)
    assert sentence
    own = set(ViTSpec.model_fields) - set(inspect.signature(VisionTransformer).parameters)
    assert set(re.findall(r"`(\w+)`", sentence[0])) == own | {"VisionTransformer"}


def test_names_every_tensor() -> None:
    stems = {
        re.sub(r"blocks\.\d+", "blocks.i", name).removesuffix(".weight").removesuffix(".bias")
        for spec in SPECS.values()
        for name in expected_shapes(spec)
        if not name.startswith("attn_pool.")
    }
    for stem in stems:
        assert f"`{stem}" in TEXT, stem
