"""`baton bench transfer` with real processes: every block compared, over shm and tcp, started here and as a pair that
meets at an address."""

import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import time
import unittest

BATON = os.environ.get("BATON", str(pathlib.Path(__file__).resolve().parents[2] / "build" / "release" / "baton"))
FAKE_CUDA = os.environ.get("BATON_FAKE_CUDA")  # the stand-in for libcuda.so.1
SMALL = ["--pool-bytes", "8MiB", "--block-bytes", "4KiB", "64KiB", "1MiB", "--runs", "2", "--pings", "20", "--verify", "--quiet"]


def bench(*arguments, timeout_s=120):
    return subprocess.run([BATON, "bench", "transfer", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=timeout_s, text=True)


class BenchTransfer(unittest.TestCase):
    def check(self, arguments, transports, baselines, operation="write"):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "result.json"
            page = pathlib.Path(folder) / "result.html"
            done = bench(*SMALL, "--blocks", "3", "8", "--order", "both", "--json", str(path), "--html", str(page), *arguments)
            self.assertEqual(done.returncode, 0, done.stdout)
            result = json.loads(path.read_text())
            self.assertIn("<svg", page.read_text())
        self.assertEqual(result["operation"], operation)
        self.assertEqual([p["transport"] for p in result["paths"]], transports)
        # 3 sizes, 2 counts, 2 orders; 2 runs and the one that warms up, of 3 and of 8 blocks.
        self.assertEqual(len(result["rows"]), 12 * len(transports))
        self.assertEqual(result["verified_blocks"], 3 * 2 * 3 * (3 + 8) * len(transports))
        for row in result["rows"]:
            self.assertGreater(row["bytes_per_s"]["min"], 0)
            self.assertEqual([b["name"] for b in row["baselines"]], baselines[row["transport"]])
        for one in result["paths"]:
            self.assertEqual([n["bytes"] for n in one["notifications"]], [4096, 65536])
        return result

    def test_shm_and_tcp_are_right_and_stand_beside_their_baselines(self):
        both = {"shm": ["memcpy", "process_vm_writev"], "tcp": ["libfabric", "socket"]}
        self.check(["--transport", "shm", "tcp"], ["shm", "tcp"], both)
        self.check(["--transport", "shm", "--memory", "private"], ["shm"], both)

    def test_reads_are_right_and_stand_beside_their_baselines(self):
        both = {"shm": ["memcpy", "process_vm_readv"], "tcp": ["libfabric"]}
        self.check(["--operation", "read", "--transport", "shm", "tcp"], ["shm", "tcp"], both, "read")
        self.check(["--operation", "read", "--transport", "shm", "--memory", "private"], ["shm"], both, "read")

    def test_integrity_mode(self):
        for operation in ("write", "read"):
            done = bench(*SMALL, "--blocks", "3", "--integrity", "--operation", operation, "--transport", "shm", "tcp")
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertIn("integrity mode", done.stdout)
            self.assertIn("blocks compared, all right", done.stdout)

    @unittest.skipUnless(FAKE_CUDA, "there is no stand-in for CUDA")
    def test_gpu_memory_is_right_and_stands_beside_the_drivers_copies(self):
        to_host = ["bulk to host", "each to host"]
        result = self.check(["--memory", "cuda", "--cuda-library", FAKE_CUDA, "--transport", "auto", "staged:shm", "staged:tcp"],
                            ["cuda_ipc", "staged:shm", "staged:tcp"],
                            {"cuda_ipc": ["bulk", "each"], "staged:shm": to_host, "staged:tcp": to_host})
        self.assertIn("GPU 0", result["device"])
        self.assertIn("GPU 1", result["target_device"])
        result = self.check(["--memory", "cuda", "--cuda-library", FAKE_CUDA, "--peer-device", "0"], ["cuda_ipc"], {"cuda_ipc": ["bulk", "each"]})
        self.assertEqual(result["device"], result["target_device"])
        for arguments, text in [(["--device", "7"], "there is no GPU 7"), (["--peer-device", "7"], "the target: there is no GPU 7"),
                                (["--transport", "shm"], "host memory only")]:
            done = bench(*SMALL, "--blocks", "1", "--memory", "cuda", "--cuda-library", FAKE_CUDA, *arguments, timeout_s=30)
            self.assertEqual(done.returncode, 1, arguments)
            self.assertIn(text, done.stdout)

    def test_without_a_driver_gpu_memory_is_an_error_that_says_so(self):
        done = bench(*SMALL, "--memory", "cuda", "--cuda-library", "libno-such-cuda.so.1", timeout_s=30)
        self.assertEqual(done.returncode, 1)
        self.assertIn("there is no CUDA driver", done.stdout)

    def test_a_target_that_listens_serves_one_initiator(self):
        target = subprocess.Popen([BATON, "bench", "transfer", "--listen", "127.0.0.1:0", "--pool-bytes", "8MiB"],
                                  stdout=subprocess.PIPE, text=True)
        try:
            port = re.search(r"port (\d+)", target.stdout.readline()).group(1)
            result = self.check(["--connect", f"127.0.0.1:{port}"], ["shm"], {"shm": ["memcpy", "process_vm_writev"]})
            self.assertIn("this host", result["target"])
            self.assertEqual(target.wait(timeout=30), 0)
        finally:
            target.kill()
            target.wait()
            target.stdout.close()

    def test_what_makes_no_sense_is_refused(self):
        for arguments, text in [(["--block-bytes", "3"], "multiple of 8"), (["--blocks", "0"], "blocks"),
                                (["--pool-bytes", "1MiB"], "--pool-bytes"), (["--transport", "pigeon"], "pigeon"),
                                (["--connect", "nowhere"], "HOST:PORT"), (["--connect", "127.0.0.1:1"], "127.0.0.1:1")]:
            done = bench(*arguments, timeout_s=30)
            self.assertEqual(done.returncode, 1, arguments)
            self.assertIn(text, done.stdout)

    def test_a_larger_pool_than_the_target_gives_is_refused(self):
        target = subprocess.Popen([BATON, "bench", "transfer", "--listen", "127.0.0.1:0", "--pool-bytes", "1MiB"],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            port = re.search(r"port (\d+)", target.stdout.readline()).group(1)
            done = bench(*SMALL, "--blocks", "1", "--connect", f"127.0.0.1:{port}", timeout_s=30)
            self.assertEqual(done.returncode, 1)
            self.assertIn("gives up to 1048576", done.stdout)
        finally:
            target.kill()
            target.wait()
            target.stdout.close()

    def test_a_killed_initiator_takes_its_target_along(self):
        initiator = subprocess.Popen([BATON, "bench", "transfer", "--runs", "10000", "--transport", "shm", "--quiet",
                                      "--pool-bytes", "64MiB", "--pings", "0"])
        children = pathlib.Path(f"/proc/{initiator.pid}/task/{initiator.pid}/children")
        deadline = time.monotonic() + 20
        while not (pids := children.read_text().split()):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        initiator.send_signal(signal.SIGKILL)
        initiator.wait()
        deadline = time.monotonic() + 20
        while any(pathlib.Path(f"/proc/{pid}/exe").exists() for pid in pids):
            self.assertLess(time.monotonic(), deadline, "the target lives on")
            time.sleep(0.01)


if __name__ == "__main__":
    unittest.main()
