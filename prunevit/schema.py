"""``python -m prunevit.schema > docs/vit-spec.schema.json`` writes the spec's JSON schema anew."""

from __future__ import annotations

import json

from .spec import ViTSpec


def schema() -> dict[str, object]:
    """The JSON schema of ``model_args.spec`` in a checkpoint's ``config.json``. The validators ask for more."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ViTSpec",
        **ViTSpec.model_json_schema(),
    }


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
