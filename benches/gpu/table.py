"""The table of a run of run.sh: what was measured beside the limits that doctor measured in the same run.

    python3 table.py FOLDER > FOLDER/table.md
"""

import json
import re
import sys
from pathlib import Path

# Numbers of the layers' matrices, of one embedding table, and of keys and values of one token.
SHAPES = {
    "llama-3.1-8b": dict(layers=32, hidden=4096, query=4096, kv=1024, inner=14_336, vocabulary=128_256),
    "smollm2-135m": dict(layers=30, hidden=576, query=576, kv=192, inner=1536, vocabulary=49_152),
}
AIMS = {"decode-1": 0.80, "decode-64": 0.65, "decode-256": 0.65, "prefill": 0.55, "attention": 0.75, "idle": 0.05, "start": 15}


class Shape:
    def __init__(self, layers, hidden, query, kv, inner, vocabulary):
        per_layer = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * inner
        self.layer_weights = layers * per_layer
        self.head_weights = hidden * vocabulary
        self.kv_numbers = 2 * layers * kv
        # Of queries with one key and with one value, all layers.
        self.attention = 2 * layers * query

    def decode_bytes(self, batch, context, weight_bytes=2, kv_bytes=2):
        """Every weight that a step multiplies with, and all keys and values, once."""
        weights = self.layer_weights * weight_bytes + self.head_weights * 2
        return weights + batch * context * self.kv_numbers * kv_bytes

    def prefill_flops(self, tokens):
        """Two for each number that is added; attention sees half of the square; one row of logits."""
        pairs = tokens * (tokens + 1) / 2
        return 2 * (tokens * self.layer_weights + self.head_weights + pairs * self.attention)


def read(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def share(value):
    return f"{100 * value:.0f} %"


def verdict(value, aim, is_ceiling=False):
    met = value <= aim if is_ceiling else value >= aim
    return "met" if met else "missed"


def limits(doctor):
    """Bytes and operations a second, and what they are of."""
    gpu, cpu = doctor.get("gpu"), doctor["cpu"]
    if gpu and gpu["limits"]:
        return gpu["limits"]["copy_bytes_per_second"], gpu["limits"]["bf16_flops_per_second"], gpu["name"]
    flops = cpu["bf16_flops_per_second"] or cpu["f32_flops_per_second"]
    return cpu["read_bytes_per_second"], flops, f"{cpu['name']}, to try the script: the figures say nothing"


def decode_rows(folder, bandwidth):
    paths = sorted(folder.glob("decode-*.json"), key=lambda path: [int(n) if n.isdigit() else n for n in path.stem.split("-")[1:2]])
    for path in paths:
        result = read(path)
        if result is None:
            continue
        header = result["header"]
        shape = Shape(**SHAPES[header["model"]["id"]])
        settings, engine = header["workload"]["settings"], header["target"]["engine"]
        batch, output = result["max_concurrency"], int(settings["output_tokens"])
        context = int(settings["input_tokens"]) + output / 2
        weight_bytes = 1 if engine["weight_dtype"] == "fp8" else 2
        kv_bytes = 1 if engine["kv_dtype"] == "fp8" else 2
        seconds = result["median_itl_ms"] / 1e3
        bound = shape.decode_bytes(batch, context, weight_bytes, kv_bytes) / bandwidth
        aim = AIMS.get(path.stem)
        idle = waited(folder / f"{path.stem}.log")
        yield [
            path.stem, f"{1e3 * seconds:.2f} ms", f"{1e3 * bound:.2f} ms", share(bound / seconds),
            f"{batch / seconds:,.0f}", "" if idle is None else f"{idle:.1f} %",
            "" if aim is None else f"{share(aim)}: {verdict(bound / seconds, aim)}",
        ]


def waited(log):
    """Per cent of its time that the GPU waited between steps, as the runner says at its end."""
    text = log.read_text() if log.exists() else ""
    found = re.search(r"between them \(([\d.]+) %\)", text)
    return float(found[1]) if found else None


def prefill_rows(folder, rate):
    for path in sorted(folder.glob("prefill-*.json"), key=lambda path: int(path.stem.split("-")[1])):
        result = read(path)
        if result is None:
            continue
        shape = Shape(**SHAPES[result["header"]["model"]["id"]])
        tokens, seconds = int(path.stem.split("-")[1]), result["median_ttft_ms"] / 1e3
        reached = shape.prefill_flops(tokens) / seconds
        yield [
            f"{tokens}", f"{1e3 * seconds:.1f} ms", f"{tokens / seconds:,.0f}", f"{reached / 1e12:.0f} TFLOP/s",
            share(reached / rate), f"{share(AIMS['prefill'])}: {verdict(reached / rate, AIMS['prefill'])}",
        ]


def kernel_rows(doctor):
    checks = (doctor.get("gpu") or {}).get("checks", [])
    for check in checks:
        if check["seconds"] is None or check["share"] is None:
            continue
        is_aim = check["kernel"] == "decode_attention" and "64 sequences (8192" in check["case"]
        aim = f"{share(AIMS['attention'])}: {verdict(check['share'], AIMS['attention'])}" if is_aim else ""
        yield [check["kernel"], check["case"], f"{1e6 * check['seconds']:.1f} us", share(check["share"]), aim]


def comparison_rows(folder):
    ours, theirs = read(folder / "comparison" / "result.json"), read(folder / "transformers.json")
    if ours:
        yield ["servelab", f"{ours['total_output_tokens']:,}", f"{ours['duration']:.2f} s", f"{ours['output_throughput']:,.0f}"]
    if theirs:
        title = f"transformers {theirs['transformers']}, continuous batching ({theirs['attention']})"
        yield [title, f"{theirs['output_tokens']:,}", f"{theirs['seconds']:.2f} s", f"{theirs['output_tokens_per_second']:,.0f}"]


def start_rows(folder):
    for nth in ["first", "second"]:
        start = read(folder / f"start-{nth}.json")
        if start:
            stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in start["stages"].items())
            first = start["seconds"]["first_token"]
            yield [nth, stages, f"{start['seconds']['ready']:.2f} s", f"{first:.2f} s",
                   f"{AIMS['start']} s: {verdict(first, AIMS['start'], is_ceiling=True)}"]


def table(title, heads, rows):
    rows = list(rows)
    if not rows:
        return
    print(f"\n## {title}\n")
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main():
    folder = Path(sys.argv[1])
    doctor = read(folder / "doctor.json")
    if doctor is None:
        sys.exit(f"{folder} has no doctor.json: nothing to compare with")
    bandwidth, rate, name = limits(doctor)
    print(f"# {name}\n")
    print(f"servelab {doctor['version']} ({doctor['commit']}). Limits measured in the same run: {bandwidth / 1e9:,.0f} GB/s, "
          f"bf16 products {rate / 1e12:,.1f} TFLOP/s. Doctor: {'all is well' if doctor['passed'] else '; '.join(doctor['faults'])}.")
    table("Decoding", ["run", "step (median)", "bound by bytes", "share", "tokens/s", "GPU idle between steps", "aim"],
          decode_rows(folder, bandwidth))
    table("Prefill", ["tokens", "time", "tokens/s", "reached", "share of the matrix rate", "aim"], prefill_rows(folder, rate))
    table("The engine comparison", ["engine", "tokens out", "time", "tokens/s"], comparison_rows(folder))
    table("Start", ["start", "stages in seconds", "ready", "first token", "aim"], start_rows(folder))
    table("Kernels alone", ["kernel", "case", "time", "share of the nearer limit", "aim"], kernel_rows(doctor))


if __name__ == "__main__":
    main()
