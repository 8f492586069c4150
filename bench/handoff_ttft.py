#!/usr/bin/env python3
"""What disaggregation adds to the time to the first token, beside the bytes' own time on the wire.

    bench/handoff_ttft.py [--model models/shapes/Qwen3-0.6B --load-format dummy] [--isl 128,512,2048] [--runs 9] [--threads 2]

Starts an aggregated worker and a prefill/decode pair with the same threads, and sends single requests to both in turn (A B A B …),
so that a noisy neighbour hits both. Prints medians, the difference pair by pair, the KV bytes, and their time on the wire at the
rate that the workers' own counters give (bytes over seconds with a write under way)."""

import argparse
import json
import pathlib
import random
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from cluster import Cluster  # noqa: E402


def kv_bytes_per_token(model):
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["num_hidden_layers"] * 2 * heads * head_dim * 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "shapes" / "Qwen3-0.6B"))
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--isl", default="128,512,2048")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--kv-memory", default="1GiB")
    arguments = parser.parse_args()
    lengths = [int(x) for x in arguments.isl.split(",")]
    common = ["--load-format", arguments.load_format, "--threads", arguments.threads, "--kv-memory", arguments.kv_memory,
              "--no-prefix-cache", "--transport", arguments.transport, "--max-model-len", max(lengths) + 16]
    rng = random.Random(1)
    per_token = kv_bytes_per_token(arguments.model)
    with Cluster("--aggregated", *common, model=arguments.model) as aggregated, \
            Cluster("--local-prefill-tokens", 0, *common, model=arguments.model) as pair:
        print(f"{'ISL':>6} {'aggregated ms':>14} {'disaggregated ms':>17} {'added ms':>9} {'KV MB':>8} {'wire ms':>8} {'added - wire':>13}")
        worst = 0.0
        for isl in lengths:
            def prompt():
                return [rng.randrange(3, 1000) for _ in range(isl)]
            aggregated.ttft_ms(prompt()), pair.ttft_ms(prompt())
            before = (pair.metric("baton_worker_transfer_bytes_total"), pair.metric("baton_worker_transfer_seconds_total"))
            alone, apart = [], []
            for _ in range(arguments.runs):
                alone.append(aggregated.ttft_ms(prompt()))
                apart.append(pair.ttft_ms(prompt()))
            time.sleep(2.2)  # metrics come once a second
            moved = pair.metric("baton_worker_transfer_bytes_total") - before[0]
            seconds = pair.metric("baton_worker_transfer_seconds_total") - before[1]
            added = statistics.median(b - a for a, b in zip(alone, apart))
            size = isl * per_token
            wire = size / (moved / seconds) * 1e3 if moved and seconds else float("nan")
            worst = max(worst, added - wire)
            print(f"{isl:>6} {statistics.median(alone):>14.1f} {statistics.median(apart):>17.1f} {added:>9.1f} {size / 1e6:>8.1f} "
                  f"{wire:>8.1f} {added - wire:>13.1f}", flush=True)
        print(f"medians of {arguments.runs} pairs; the most that remains beside the wire: {worst:.1f} ms")


if __name__ == "__main__":
    main()
