"""Figures of a sampler, in the text format that Prometheus reads. Torch-free."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HELP = {
    "hits": "Adapters that were in memory when a request came.",
    "loads": "Adapters that were loaded for a request.",
    "failures": "Adapters that could not be loaded.",
    "evictions": "Adapters that made room for others.",
}
GAUGES = {
    "bytes": "Bytes of adapters in memory.",
    "budget_bytes": "Bytes of adapters that may be in memory.",
    "pinned": "Adapters that requests need now.",
}
ACTIVE = "Requests in a batch now."
CACHES = ("host", "device")
NOTHING = {name: dict.fromkeys((*HELP, *GAUGES), 0) for name in CACHES}
"""Of caches of which nothing has been told yet."""

SECONDS = 1.0


@dataclass
class Pace:
    """When figures are told: as orders begin and end, and once a second while they go on."""

    _told_at: float = float("-inf")

    def due(self, answer: Mapping[str, Any]) -> bool:
        """Whether to tell them with this answer about an order."""
        now = time.monotonic()
        if answer["type"] == "progress" and now - self._told_at < SECONDS:
            return False
        self._told_at = now
        return True


def figures(adapters: Any, active: int) -> dict[str, Any]:
    """Of the process: by cache (host, device), and how many orders are in a batch."""
    caches = {
        name: {
            **asdict(cache.counts),
            "bytes": cache.held,
            "budget_bytes": cache.budget,
            "pinned": len(cache.pinned),
        }
        for name, cache in zip(CACHES, (adapters.host, adapters.device), strict=True)
    }
    return {"caches": caches, "active": active}


def exposition(told: Mapping[str, Any]) -> str:
    """The figures as Prometheus scrapes them."""
    lines = []
    for kinds, kind, suffix in ((HELP, "counter", "_total"), (GAUGES, "gauge", "")):
        for name, meaning in kinds.items():
            metric = f"lookalike_adapter_cache_{name}{suffix}"
            lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} {kind}"]
            lines += [
                f'{metric}{{cache="{cache}"}} {values[name]}'
                for cache, values in told.get("caches", NOTHING).items()
            ]
    metric = "lookalike_sampler_active_requests"
    lines += [f"# HELP {metric} {ACTIVE}", f"# TYPE {metric} gauge"]
    lines.append(f"{metric} {told.get('active', 0)}")
    return "\n".join(lines) + "\n"
