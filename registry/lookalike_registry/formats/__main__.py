"""The process of `process.export_apart`. Torch."""

import json
import sys
from pathlib import Path

from lookalike_platform.errors import CapabilityMissing, InvalidRequest
from lookalike_registry.formats.export import export
from lookalike_registry.formats.process import PROBLEM


def main() -> int:
    adapter, base_folder, form, family, folder = sys.argv[1:]
    try:
        made = export(Path(adapter), Path(base_folder), form, family, Path(folder))
    except (InvalidRequest, CapabilityMissing) as error:
        fields = [[field.path, field.message] for field in error.fields]
        print(json.dumps({"slug": error.slug, "detail": error.detail, "fields": fields}))
        return PROBLEM
    print(json.dumps({"files": [path.name for path in made.files], "left_out": made.error}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
