"""The report of a simulation for people: one HTML file with everything in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from cluster.simulation.charts import bars, lines
from cluster.simulation.results import CURVE

Figure = tuple[str, Callable[[Mapping[str, Any]], float | None], str]
"""A row of the table: what it is called, how it is had from a result, how it is written."""

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--text:#1f2937;--back:#fff;--faint:#6b7280}
@media(prefers-color-scheme:dark){:root{--text:#e5e7eb;--back:#111827;--faint:#9ca3af}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--text);background:var(--back);margin:24px auto;
max-width:1180px;padding:0 16px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:28px 0 8px}
p,dl{color:var(--faint);margin:4px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}td.best{font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:12px}
svg{width:100%;height:auto}svg text{font-size:10px;fill:var(--faint)}
svg .title{font-size:12px;fill:var(--text)}svg .grid{stroke:var(--line);stroke-width:.6}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px}dd{margin:0;color:var(--text)}
"""


def _of(*path: str) -> Callable[[Mapping[str, Any]], float | None]:
    def find(result: Mapping[str, Any]) -> float | None:
        value: Any = result
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, (int, float)) else None

    return find


FIGURES: tuple[Figure, ...] = (
    ("requests finished", _of("finished"), "{:,.0f}"),
    ("requests refused", lambda r: float(sum(r["refused"].values())), "{:,.0f}"),
    ("requests per second", _of("throughput", "requests_per_second"), "{:.2f}"),
    ("output tokens per second", _of("throughput", "output_tokens_per_second"), "{:,.0f}"),
    *(
        (f"{label}, {name.replace('p', 'P')} (s)", _of("latency", key, name), "{:.3f}")
        for label, key in (
            ("time to first token", "ttft"),
            ("time per output token", "tpot"),
            ("between tokens", "itl"),
            ("end to end", "e2e"),
        )
        for name in ("mean", "p50", "p99")
    ),
    ("preemptions", _of("preemptions", "count"), "{:,.0f}"),
    ("preemption loss per request (s)", _of("preemptions", "loss_mean"), "{:.3f}"),
    ("migrations that moved", _of("migrations", "moved"), "{:,.0f}"),
    ("pause of a move, P50 (s)", _of("migrations", "pause", "p50"), "{:.4f}"),
    ("pause of a move, P99 (s)", _of("migrations", "pause", "p99"), "{:.4f}"),
    ("fragmented memory, mean share", _of("fragmentation", "mean"), "{:.4f}"),
    ("KV in use, mean share", _of("balance", "kv_mean"), "{:.3f}"),
    ("KV in use, spread of instances", _of("balance", "kv_spread"), "{:.3f}"),
    ("fairness gap, mean (service/s)", _of("fairness", "gap_mean"), "{:.1f}"),
    ("prompt tokens from the cache", _of("cached_prompt_share"), "{:.3f}"),
    ("placement regret, mean (s)", _of("decisions", "regret_mean"), "{:.3f}"),
    ("gain of a move, mean (s)", _of("decisions", "move_gain_mean"), "{:.3f}"),
    ("replays after a death", _of("replays"), "{:,.0f}"),
)


def html_report(result: Mapping[str, Any]) -> str:
    """The report as one page that needs nothing from elsewhere.

    Args:
        result: What ``drover simulate --json`` writes.
    """
    policies: Mapping[str, Any] = result["policies"]
    return "".join(
        (
            "<!doctype html><html lang=en><meta charset=utf-8>",
            '<meta name=viewport content="width=device-width">',
            f"<title>drover simulate: {escape(str(result['workload']))}</title>",
            f"<style>{_STYLE}</style><h1>{escape(str(result['workload']))}</h1>",
            _settings(result),
            "<h2>Policies side by side</h2>",
            _table(policies),
            "<h2>Latency</h2>",
            _plots(_latency_plots(policies)),
            "<h2>Over time</h2>",
            _plots(_time_plots(policies)),
            "<h2>Migrations</h2>",
            _migrations(policies),
            "<h2>Tenants</h2>",
            _tenants(policies),
            "</html>\n",
        )
    )


def _settings(result: Mapping[str, Any]) -> str:
    shown = {"version": result["version"], **result["config"]}
    items = "".join(f"<dt>{escape(key)}<dd>{escape(str(value))}" for key, value in shown.items())
    return f"<dl>{items}</dl>"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}' for cell in head)}{body}</table>"


def _table(policies: Mapping[str, Any]) -> str:
    rows = []
    for name, find, form in FIGURES:
        values = [find(result) for result in policies.values()]
        if any(value is not None for value in values):
            cells = ["-" if value is None else form.format(value) for value in values]
            rows.append([escape(name), *cells])
    return _rows(["", *policies], rows)


def _plots(plots: Iterable[str]) -> str:
    return f'<div class="plots">{"".join(plots)}</div>'


def _latency_plots(policies: Mapping[str, Any]) -> list[str]:
    made = []
    for title, key in (
        ("Time to first token", "ttft"),
        ("Time per output token", "tpot"),
        ("End to end", "e2e"),
        ("Between tokens", "itl"),
    ):
        curves = {
            name: list(zip(CURVE, result["latency"][key].get("curve", ()), strict=False))
            for name, result in policies.items()
        }
        made.append(lines(title, curves, "percentile", "seconds, logarithmic", log_y=True))
    return made


def _series(result: Mapping[str, Any], values: str) -> list[tuple[float, float | None]]:
    return list(zip(result.get("t", ()), result.get(values, ()), strict=True))


def _time_plots(policies: Mapping[str, Any]) -> list[str]:
    made = [
        lines(
            "Fragmented memory",
            {name: _series(one["fragmentation"], "share") for name, one in policies.items()},
            "seconds",
            "share of all KV",
        ),
        lines(
            "Fairness gap within the last minute",
            {name: _series(one["fairness"], "gap") for name, one in policies.items()},
            "seconds",
            "service per second",
        ),
    ]
    for name, one in policies.items():
        for title, values, label in (
            ("KV in use by instance", "kv", "share of the pool"),
            ("Waiting by instance", "waiting", "requests"),
        ):
            series = {each: _series(of, values) for each, of in one["instances"].items()}
            made.append(
                lines(f"{title}: {name}", series, "seconds", label, thin=True, legend=False)
            )
    spread = {
        name: {"mean": one["balance"]["kv_mean"], "spread": one["balance"]["kv_spread"]}
        for name, one in policies.items()
        if one["balance"]
    }
    made.append(bars("KV in use: mean and spread between instances", spread, "share"))
    return made


def _migrations(policies: Mapping[str, Any]) -> str:
    rows = [
        [escape(name), escape(reason), escape(outcome), f"{count:,}"]
        for name, one in policies.items()
        for reason, outcomes in one["migrations"]["by_reason"].items()
        for outcome, count in sorted(outcomes.items())
    ]
    return _rows(["policy", "reason", "outcome", "number"], rows) if rows else "<p>none</p>"


def _tenants(policies: Mapping[str, Any]) -> str:
    rows = [
        [
            escape(name),
            escape(tenant),
            f"{one['fairness'].get('service', {}).get(tenant, 0.0):,.0f}",
            f"{figures['requests']:,}",
            *(
                f"{figures[key].get(p, 0.0):.3f}"
                for key in ("ttft", "e2e")
                for p in ("mean", "p99")
            ),
        ]
        for name, one in policies.items()
        for tenant, figures in one["tenants"].items()
    ]
    head = ["policy", "tenant", "service", "requests", "TTFT mean (s)", "P99", "end to end", "P99"]
    return _rows(head, rows)
