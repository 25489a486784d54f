"""Every method on the bundled base: our step against its bare step.

ours  the loop's own step: data from the caches, DeepSpeed engine (ZeRO 0, one process)
bare  forward, backward, clipping and AdamW step of the same module on one batch of cached inputs

They take turns in one process, with equal batches and threads; medians are compared.
Bar: ours at least 0.95 of the bare step's rate, for each method.
"""

import argparse
import tempfile
from pathlib import Path

import steps
from orders import as_workers_do

from lookalike_trainers.catalog import METHODS

NAMES = [info.name for info in METHODS]


def main() -> None:
    as_workers_do()
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("methods", nargs="*", default=NAMES, help="all if none is named")
    options.add_argument("--photos", type=Path, default=steps.DEMO)
    options.add_argument("--rounds", type=int, default=30)
    given = options.parse_args()
    print(f"{'method':18} {'ours':>9} {'bare':>9}  ours / bare rate, bar 0.950")
    with tempfile.TemporaryDirectory() as home:
        for name in given.methods:
            run = steps.prepared(name, given.photos, Path(home))
            taken = steps.medians({"ours": steps.ours(run), "bare": steps.bare(run)}, given.rounds)
            mine, least = taken["ours"], taken["bare"]
            print(
                f"{name:18} {mine * 1e3:6.1f} ms {least * 1e3:6.1f} ms  {least / mine:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
