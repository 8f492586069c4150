#!/usr/bin/env python3
"""One aggregated GPU, two aggregated GPUs behind the router, and one prefill GPU + one decode GPU, through the whole stack: HTTP
in, server-sent events out.

    bench/gpu_serving.py [--model models/shapes/Llama-3.1-8B] [--isl 1000,2000,4000,8000] [--osl 50] [--concurrency 10]

First the time to the first token on idle machines, aggregated and disaggregated in turn (A B, B A, A B …), pair by pair, each after
a pause: a GPU at its power limit computes faster after a rest, so both get the same one. Then a table of `baton bench serve` runs. Needs two GPUs (--devices); prompts are random token ids, so no prefix is ever cached."""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from cluster import BATON, Cluster  # noqa: E402


def mean_ms(cluster, what):
    """Of all handoffs so far: the prefill worker's computing, and how long after it the last write was done."""
    name = f"baton_worker_handoff_{what}_seconds"
    return cluster.metric(f"{name}_sum") / max(cluster.metric(f"{name}_count"), 1) * 1e3


def prefill_ms(cluster, name, before):
    """What a prefill took, by the worker's own clock, of the handoffs since `before`."""
    total, count = total_ms(cluster, name)
    return (total - before[0]) / max(count - before[1], 1)


def total_ms(cluster, name):
    return cluster.metric(f"{name}_sum") * 1e3, cluster.metric(f"{name}_count")


def idle(arguments, common, devices):
    rng = random.Random(1)
    half = [*common, "--gpu-memory-utilization", 0.4]
    with Cluster("--aggregated", "--device", devices[0], *half, model=arguments.model) as alone, \
            Cluster("--local-prefill-tokens", 0, "--device", f"{devices[0]},{devices[1]}", *half, model=arguments.model) as pair:
        print(f"ready: aggregated after {alone.ready_s:.1f} s, pair after {pair.ready_s:.1f} s")
        print(f"{'ISL':>6} {'aggregated ms':>14} {'disaggregated ms':>17} {'added ms':>9} {'least .. most':>16}"
              f"{'prefill ms, no sending / sending':>34}{'exposed':>9}")
        for isl in arguments.isl:
            def prompt():
                return [rng.randrange(3, 1000) for _ in range(isl)]
            for _ in range(2):
                alone.ttft_ms(prompt()), pair.ttft_ms(prompt())
            time.sleep(2.2)
            before = total_ms(alone, "baton_worker_ttft_seconds"), total_ms(pair, "baton_worker_handoff_compute_seconds")
            times = []
            for run in range(arguments.runs):
                ttft_ms = {}
                for cluster in (alone, pair) if run % 2 == 0 else (pair, alone):
                    time.sleep(arguments.pause_s)
                    ttft_ms[cluster] = cluster.ttft_ms(prompt())
                times.append((ttft_ms[alone], ttft_ms[pair]))
            added = [b - a for a, b in times]
            time.sleep(2.2)  # metrics come once a second
            print(f"{isl:>6} {statistics.median(a for a, _ in times):>14.1f} {statistics.median(b for _, b in times):>17.1f} "
                  f"{statistics.median(added):>9.1f} {min(added):>7.1f} ..{max(added):>6.1f}{prefill_ms(alone, 'baton_worker_ttft_seconds', before[0]):>23.1f} /"
                  f"{prefill_ms(pair, 'baton_worker_handoff_compute_seconds', before[1]):>8.1f}{mean_ms(pair, 'exposed'):>9.2f}", flush=True)


def load(cluster, arguments, isl):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([BATON, "bench", "serve", "--url", f"http://127.0.0.1:{cluster.port}", "--isl", str(isl), "--osl",
                        str(arguments.osl), "-c", str(arguments.concurrency), "-n", str(arguments.requests), "--warmup", "10",
                        "--quiet", "--json", file.name], check=True, stdout=subprocess.DEVNULL)
        return json.loads(pathlib.Path(file.name).read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "shapes" / "Llama-3.1-8B"))
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--isl", default="1000,2000,4000,8000", type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--osl", type=int, default=50)
    parser.add_argument("--concurrency", type=int, default=10)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--runs", type=int, default=11, help="pairs of the idle comparison")
    parser.add_argument("--pause-s", type=float, default=0.3, help="before each request of the idle comparison")
    parser.add_argument("--idle-only", action="store_true")
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    arguments = parser.parse_args()
    devices = arguments.devices.split(",")
    common = ["--load-format", arguments.load_format, "--no-prefix-cache", "--max-model-len", max(arguments.isl) + arguments.osl + 16]
    idle(arguments, common, devices)
    if arguments.idle_only:
        return
    print(f"\nOSL {arguments.osl}, concurrency {arguments.concurrency}, {arguments.requests} requests each; ms")
    print(f"{'':<26}{'ISL':>6}{'TTFT p50':>10}{'p95':>9}{'ITL mean':>10}{'p99':>8}{'E2E p50':>9}{'out tok/s':>11}{'tok/s/GPU':>11}")
    setups = [("1 aggregated", 1, ["--aggregated", "--device", devices[0]]),
              ("2 aggregated", 2, ["--aggregated", "--decode", 2, "--device", ",".join(devices)]),
              ("1 prefill + 1 decode", 2, ["--local-prefill-tokens", 0, "--device", ",".join(devices)])]
    for name, gpus, flags in setups:
        with Cluster(*flags, *common, model=arguments.model) as cluster:
            for isl in arguments.isl:
                r = load(cluster, arguments, isl)
                speed = r["output_tokens_per_s"]
                print(f"{name:<26}{isl:>6}{r['ttft_ms']['p50']:>10.1f}{r['ttft_ms']['p95']:>9.1f}{r['itl_ms']['mean']:>10.2f}"
                      f"{r['itl_ms']['p99']:>8.1f}{r['e2e_ms']['p50']:>9.0f}{speed:>11.1f}{speed / gpus:>11.1f}", flush=True)


if __name__ == "__main__":
    main()
