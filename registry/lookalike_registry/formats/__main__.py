"""The process of process.py. Torch."""

import json
import sys
from pathlib import Path
from typing import Any

from lookalike_platform.errors import CapabilityMissing, InvalidRequest
from lookalike_registry.adapter_file import LoraCard
from lookalike_registry.check import check_file
from lookalike_registry.formats.export import export
from lookalike_registry.formats.load import load, save
from lookalike_registry.formats.process import PROBLEM


def main() -> int:
    order = json.loads(sys.argv[1])
    try:
        said = _export(order) if order["do"] == "export" else _import(order)
    except (InvalidRequest, CapabilityMissing) as error:
        fields = [[field.path, field.message] for field in error.fields]
        print(json.dumps({"slug": error.slug, "detail": error.detail, "fields": fields}))
        return PROBLEM
    print(json.dumps(said))
    return 0


def _export(order: dict[str, Any]) -> dict[str, Any]:
    paths = (Path(order[key]) for key in ("adapter", "base", "folder", "cache"))
    adapter, base, folder, cache = paths
    made = export(adapter, base, order["form"], order["family"], folder, order["rank"], cache)
    files = [path.relative_to(folder).as_posix() for path in made.files]
    return {"files": files, "left_out": made.error}


def _import(order: dict[str, Any]) -> dict[str, Any]:
    base, folder, about = Path(order["base"]), Path(order["folder"]), order["about"]
    loaded = load([Path(file) for file in order["files"]], base)
    noun = about.pop("class_noun")
    path = save(loaded, folder, LoraCard(**about, shapes={}), noun)
    check_file(path, base)
    return {"method": loaded.method, "file": path.name}


if __name__ == "__main__":
    sys.exit(main())
