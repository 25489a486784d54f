"""How long the API takes to import, in fresh processes, beside Python alone. Bar: under 1.5 s."""

import statistics
import subprocess
import sys
import time

ROUNDS = 7
PROGRAMS = {
    "python alone": "pass",
    "the API": "import lookalike_api.http.app, sys; assert 'torch' not in sys.modules",
}


def seconds(program: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - started


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(ROUNDS):
        for name, program in PROGRAMS.items():
            times[name].append(seconds(program))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:14} {median:6.2f} s (median of {ROUNDS})")
    imports = medians["the API"] - medians["python alone"]
    print(f"importing takes {imports:.2f} s; bar 1.50 s")


if __name__ == "__main__":
    main()
