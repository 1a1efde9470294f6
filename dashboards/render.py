"""Draws the panels of a dashboard from a Prometheus, for documents and for those who have no Grafana at hand.

    python dashboards/render.py serving.json serving.png --url http://127.0.0.1:9090 --last 10m

It is no Grafana: it asks the panels' queries with every variable at "All" and draws lines and stacks with matplotlib. Tables
and bar charts become text.
"""

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SECONDS = {"s": 1, "m": 60, "h": 3600}
POINTS = 120
# Four scrapes of deploy/compose/prometheus.yml, as Grafana takes it.
RATE_INTERVAL = "20s"
# Labels that say nothing in a list of one metric's series.
PLAIN_LABELS = {"__name__", "job"}
GRID_COLUMNS = 24
INCHES_PER_ROW = 0.4


def seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)([smh])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no time; write 30s, 10m or 3h")
    return int(match[1]) * SECONDS[match[2]]


def ask(url: str, path: str, **parameters) -> list[dict]:
    query = urllib.parse.urlencode(parameters)
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=60) as answer:
        return json.load(answer)["data"]["result"]


def filled(expression: str, dashboard: dict) -> str:
    """The expression with every variable at its default; a list of values stands for all of them."""
    for variable in dashboard["templating"]["list"]:
        value = variable.get("current", {}).get("value", "")
        expression = expression.replace("$" + variable["name"], ".*" if isinstance(value, list) else value)
    return expression.replace("$__rate_interval", RATE_INTERVAL)


def named(legend: str, labels: dict) -> str:
    listed = "\n".join(f"{name}: {value}" for name, value in labels.items() if name not in PLAIN_LABELS)
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend) or listed


def series(panel: dict, dashboard: dict, url: str, start: float, end: float) -> list[tuple[str, list, list]]:
    """Name, times and values of each line of a panel; NaN where there is no number."""
    step = max(1, round((end - start) / POINTS))
    found = []
    for target in panel["targets"]:
        expression = filled(target["expr"], dashboard)
        for each in ask(url, "query_range", query=expression, start=start, end=end, step=step):
            values = {round(float(at) - start): float(value) for at, value in each["values"]}
            times = range(0, round(end - start) + 1, step)
            found.append(
                (named(target["legendFormat"], each["metric"]), list(times), [values.get(t, math.nan) for t in times])
            )
    return found


def draw(axes, panel: dict, lines: list[tuple[str, list, list]]):
    axes.set_title(panel["title"], fontsize=10, loc="left")
    axes.tick_params(labelsize=7)
    if panel["type"] not in ("timeseries", "heatmap"):
        last = [f"{values[-1]:.4g}  {name}" for name, _, values in lines]
        axes.axis("off")
        axes.text(0.02, 0.95, "\n".join(last), fontsize=8, va="top", transform=axes.transAxes)
    elif "stacking" in panel["fieldConfig"]["defaults"].get("custom", {}) and lines:
        heights = [[0 if math.isnan(value) else value for value in values] for _, _, values in lines]
        axes.stackplot(lines[0][1], heights, labels=[name for name, _, _ in lines], alpha=0.7)
    else:
        for name, times, values in lines:
            axes.plot(times, values, label=name, linewidth=1)
    if not lines:
        axes.text(0.5, 0.5, "no data", color="red", ha="center", transform=axes.transAxes)
    elif panel["type"] == "timeseries":
        axes.legend(fontsize=6, loc="upper left", ncol=3)


def render(dashboard: dict, url: str, start: float, end: float, out: Path):
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(20, height * INCHES_PER_ROW), dpi=70)
    for panel in panels:
        place = panel["gridPos"]
        bottom = 1 - (place["y"] + place["h"] - 0.9) / height
        size = (place["w"] / GRID_COLUMNS - 0.035, (place["h"] - 2.2) / height)
        axes = figure.add_axes((place["x"] / GRID_COLUMNS + 0.025, bottom, *size))
        draw(axes, panel, series(panel, dashboard, url, start, end))
    figure.savefig(out)


def main():
    parser = argparse.ArgumentParser(description="Draws the panels of a dashboard from a Prometheus.")
    parser.add_argument("dashboard", type=Path, help="one of the JSON files beside this script")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="address of Prometheus")
    parser.add_argument("--last", type=seconds, default="10m", help="how far back, as 30s, 10m or 3h [default: 10m]")
    parser.add_argument("--end", type=float, default=time.time(), help="end, in seconds of Unix time [default: now]")
    chosen = parser.parse_args()
    dashboard = json.loads(chosen.dashboard.read_text())
    render(dashboard, chosen.url, chosen.end - chosen.last, chosen.end, chosen.out)


if __name__ == "__main__":
    main()
