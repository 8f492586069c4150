#!/usr/bin/env python3
"""Mixed load with clients that leave at random, for minutes: memory must not grow and no block may stay behind.

    bench/soak.py [--minutes 10] [--model tests/golden/models/qwen3] [--prefill 1 --decode 2]

Runs `baton bench serve` in several shapes at once against `baton serve`, samples every process's memory each ten seconds, and says at
the end what grew. Exit code 1 when memory grew by more than 5 % + 2 MiB after the first third, a request failed, or a block is
still held. (The KV pool is filled at start, so that pages it touches for the first time are not taken for a leak.)"""

import argparse
import pathlib
import random
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from cluster import BATON, Cluster  # noqa: E402

LOADS = [
    ["--isl", "40", "--osl", "60", "--spread", "0.9", "-c", "6", "--disconnect", "0.3", "--temperature", "1"],
    ["--isl", "300", "--osl", "20", "--spread", "0.5", "-c", "4", "--disconnect", "0.2", "--shared-prefix", "100", "--prefix-groups", "5"],
    ["--isl", "900", "--osl", "5", "--spread", "0.3", "-c", "2", "--disconnect", "0.5"],
]


def rss_mib(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", default=str(ROOT / "tests" / "golden" / "models" / "qwen3"))
    parser.add_argument("--prefill", default="1")
    parser.add_argument("--decode", default="2")
    arguments = parser.parse_args()
    with Cluster("--prefill", arguments.prefill, "--decode", arguments.decode, "--local-prefill-tokens", 32, "--kv-blocks", 1500,
                 model=arguments.model) as cluster:
        # Every block is touched once.
        rng = random.Random(1)
        for _ in range(40):
            cluster.post("/v1/completions", {"prompt": [rng.randrange(300) for _ in range(3000)], "max_tokens": 1})
        pids = cluster.pids()
        seconds = arguments.minutes * 60
        started = time.monotonic()
        loads = [subprocess.Popen([BATON, "bench", "serve", "--url", cluster.url, "--vocab-size", "300", "--duration", str(seconds),
                                   "--seed", str(i), "--quiet", *load], stdout=subprocess.PIPE, text=True)
                 for i, load in enumerate(LOADS)]
        samples = []
        while time.monotonic() - started < seconds:
            time.sleep(min(10, seconds / 12))
            samples.append({name: rss_mib(pid) for name, pid in pids.items()})
            print(f"{time.monotonic() - started:5.0f} s  " + "  ".join(f"{n} {v:.1f} MiB" for n, v in samples[-1].items()), flush=True)
        failed = False
        for load in loads:
            output, _ = load.communicate(timeout=120)
            failed |= load.returncode != 0
            print(output)
        cluster.wait_idle(30)
        if cluster.pids() != pids:
            print("a process was started again")
            failed = True
        settled = samples[len(samples) // 3]
        for name in pids:
            early, late = settled[name], samples[-1][name]
            grew = late > early * 1.05 + 2
            failed |= grew
            print(f"{name:<12} {samples[0][name]:8.1f} MiB at first, {early:8.1f} after a third, {late:8.1f} at the end{'  GREW' if grew else ''}")
        for name, worker in sorted(cluster.workers().items()):
            print(f"{name:<12} KV blocks {worker['kv_blocks']}")
        print("connections open:", int(cluster.metric("baton_http_connections")) - 1, " requests inside:", cluster.get("/health")["requests"])
    print("FAILED" if failed else "no growth, no block left behind")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
