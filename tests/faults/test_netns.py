"""tcp between two network namespaces (bench/netns_rails.sh): a rail's rate is reached, and a cut rail ends the transfers by
their deadline. Needs root; skipped without."""

import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEND_BLOCKS = sys.argv[1]
TRANSFER_RAILS = sys.argv[2]
RATE_MBIT = 800
SKIPPED = 77


def run(*options):
    # The sender waits until the receiver says that it listens.
    send = f"until [ -e $SHARED_DIR/up ]; do sleep 0.05; done; exec {SEND_BLOCKS} send $REMOTE_IP 7000 tcp"
    receive = f"{SEND_BLOCKS} receive $LOCAL_IP 7000 tcp | tee /dev/stderr | (read line; touch $SHARED_DIR/up; cat > /dev/null)"
    start = time.monotonic()
    done = subprocess.run([ROOT / "bench/netns_rails.sh", "--rates", str(RATE_MBIT), *options, "--", receive, "--", send],
                          capture_output=True, text=True, timeout=240)
    if done.returncode == SKIPPED:
        print(done.stderr)
        sys.exit(SKIPPED)
    return done, time.monotonic() - start


def namespaces():
    return {name for name in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.split()
            if name.startswith("baton-")}


def main():
    before = namespaces()
    done, _ = run()
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    gigabytes = float(re.search(r"([\d.]+) GB/s", output).group(1))
    print(f"one rail of {RATE_MBIT} Mbit/s: {gigabytes * 8000:.0f} Mbit/s")
    # The upper bound says that the traffic went over the rail; the lower one leaves room for a busy machine.
    assert 0.3 * RATE_MBIT < gigabytes * 8000 < 1.1 * RATE_MBIT, output

    # Nothing tells TCP that the link is gone: the deadline (10 s), then a second without a sign of life.
    # Between two transfers there is none to end: then the example's own socket is what notices, and another moment is tried.
    for attempt in range(5):
        done, seconds = run("--cut", f"0:{1.5 + 0.09 * attempt}")
        output = done.stdout + done.stderr
        if "gone or silent" not in output:
            break
        print("cut between two transfers")
    print(f"cut after 1.5 s: ended after {seconds:.1f} s")
    assert done.returncode not in (0, SKIPPED), output
    assert "DEADLINE_EXCEEDED" in output or "UNAVAILABLE" in output, output
    assert "receiver" in output and "tcp" in output, output  # who and how
    assert seconds < 1.5 + 10 + 1 + 30, output

    # One of four rails is cut while transfers run, and comes back: all arrive whole, each message counted once.
    command = f"exec {TRANSFER_RAILS} %s $LOCAL_IPS $SHARED_DIR 30"
    done = subprocess.run([ROOT / "bench/netns_rails.sh", "--rates", "400,400,400,400", "--cut", "3:1.2:3", "--",
                           command % "receive", "--", command % "send"], capture_output=True, text=True, timeout=200)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert len(re.findall(r"transfer +\d+ .* OK ", output)) == 30, output
    assert "rail 3 (10.77.3.2) to 'receiver' is out" in output, output
    assert re.search(r"10\.77\.3\.2 \d+ MB/s", done.stdout.splitlines()[-1]), "rail 3 is not used again: " + output
    print("one of four rails cut and back: 30 of 30 transfers right")

    # One of four loses packets for good: what it carries gets less, and nothing is wrong.
    if shutil.which("nft") is None:
        print("no nft: lossy rails are not tested")
    else:
        command = f"exec {TRANSFER_RAILS} %s $LOCAL_IPS $SHARED_DIR 6"
        done = subprocess.run([ROOT / "bench/netns_rails.sh", "--rates", "400,400,400,400", "--loss", "2:5", "--",
                               command % "receive", "--", command % "send"], capture_output=True, text=True, timeout=200)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert len(re.findall(r"transfer +\d+ .* OK ", output)) == 6, output
        print("one of four rails loses 5 % of its packets: 6 of 6 transfers right")
    assert namespaces() <= before, "namespaces were left behind"


if __name__ == "__main__":
    main()
