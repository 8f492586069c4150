"""Starts `baton serve` for a test and looks into it: processes, health, metrics. Standard library only."""

import http.client
import json
import os
import pathlib
import re
import select
import shlex
import signal
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATON = os.environ.get("BATON", str(ROOT / "build" / "release" / "baton"))
# Further arguments of every `baton serve`: "--device cuda:0" runs these tests on a GPU.
ARGUMENTS = shlex.split(os.environ.get("BATON_SERVE_ARGUMENTS", ""))
ON_GPU = any(argument.startswith("cuda") for argument in ARGUMENTS)
DEMO = ROOT / "models" / "demo"
GOLDEN = ROOT / "tests" / "golden" / "models"


def wait_until(condition, timeout_s, what):
    """Polls `condition` until it returns something true; fails with `what` otherwise."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)


class Cluster:
    """A running `baton serve`. Use as a context manager."""

    def __init__(self, *arguments, model=None, ready_timeout_s=60, environment=None):
        command = [BATON, "serve", "--port", "0", *ARGUMENTS, *[str(a) for a in arguments]]
        if model is not None:
            command += ["--model", str(model)]
        self.log = []
        started = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})})
        os.set_blocking(self.process.stdout.fileno(), False)
        self._partial = b""
        self.port = None
        try:
            wait_until(self._is_ready, ready_timeout_s, "baton serve is ready")
        except AssertionError as error:
            self.stop(kill=True)
            raise AssertionError(f"{error}\n" + "\n".join(self.log)) from None
        self.ready_s = time.monotonic() - started

    def _read(self, timeout_s=0.0):
        fd = self.process.stdout.fileno()
        while select.select([fd], [], [], timeout_s)[0]:
            timeout_s = 0.0
            chunk = os.read(fd, 65536)
            if not chunk:
                return False
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            self.log += [line.decode(errors="replace") for line in lines]
        return True

    def _is_ready(self):
        alive = self._read()
        for line in self.log:
            match = re.search(r"Baton is ready after .*: http://\S+:(\d+)/v1", line)
            if match:
                self.port = int(match.group(1))
        if self.port is None and (not alive or self.process.poll() is not None):
            raise AssertionError("baton serve ended:\n" + "\n".join(self.log))
        return self.port is not None

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.stop()
        if kind is not None:
            print("\n".join(self.log))

    def stop(self, kill=False):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            self._read(0.05)
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError("baton serve does not stop\n" + "\n".join(self.log))
        self._read()
        self.process.stdout.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def pids(self):
        """Name → pid of router and workers."""
        result = {}
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) != self.process.pid:
                    continue
                arguments = (entry / "cmdline").read_bytes().decode().split("\0")
            except (OSError, IndexError, ValueError):
                continue
            if "worker" in arguments and "--name" in arguments:
                result[arguments[arguments.index("--name") + 1]] = int(entry.name)
            elif "router" in arguments:
                result["router"] = int(entry.name)
        return result

    def kill(self, name, signal_number=signal.SIGKILL):
        pid = self.pids()[name]
        os.kill(pid, signal_number)
        return pid

    def request(self, method, path, body=None, timeout_s=120, headers=None):
        """(status, headers, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            payload = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
            connection.request(method, path, payload, headers or {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def post(self, path, body, expect=200, timeout_s=120):
        status, _, data = self.request("POST", path, body, timeout_s)
        assert status == expect, f"{path}: HTTP {status}: {data[:500]}"
        return json.loads(data)

    def get(self, path):
        return json.loads(self.request("GET", path)[2])

    def stream(self, path, body, timeout_s=120):
        """The JSON objects of a stream, as they come; checks that it ends with [DONE]."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, f"HTTP {response.status}: {response.read()[:500]}"
            done = False
            for line in response:
                line = line.decode().strip()
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    yield json.loads(line[6:])
            assert done, "the stream ended without [DONE]"
        finally:
            connection.close()

    def ttft_ms(self, prompt):
        """How long a client waits for the first token of `prompt` (token ids)."""
        started = time.perf_counter()
        first = None
        for event in self.stream("/v1/completions", {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True,
                                                      "return_token_ids": True}):
            if first is None and event["choices"]:
                first = time.perf_counter()
        return (first - started) * 1e3

    def metrics(self):
        """(name, labels as a sorted tuple) → value."""
        result = {}
        for line in self.request("GET", "/metrics")[2].decode().splitlines():
            match = re.match(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", line)
            if match and not line.startswith("#"):
                labels = tuple(sorted(re.findall(r'(\w+)="([^"]*)"', match.group(2) or "")))
                result[(match.group(1), labels)] = float(match.group(3))
        return result

    def metric(self, name, **labels):
        """The sum of a metric over all label sets that contain `labels`."""
        wanted = set(labels.items())
        return sum(v for (n, l), v in self.metrics().items() if n == name and wanted <= set(l))

    def wait_metric(self, name, at_least, timeout_s=10, **labels):
        """Workers send their metrics once a second: waits for a value that must come."""
        wait_until(lambda: self.metric(name, **labels) >= at_least, timeout_s, f"{name} {labels} reaches {at_least}")

    def workers(self):
        return {worker["name"]: worker for worker in self.get("/health")["workers"]}

    def idle(self):
        """True when no worker holds or quarantines a block and no request is inside."""
        health = self.get("/health")
        return health["requests"] == 0 and all(
            worker["state"] == "ready" and worker["running"] == 0 and worker["waiting"] == 0
            and worker["kv_blocks"]["total"] > 0
            and worker["kv_blocks"]["used"] == 0 and worker["kv_blocks"]["quarantined"] == 0
            for worker in health["workers"])

    def wait_idle(self, timeout_s=15):
        wait_until(self.idle, timeout_s, f"all blocks are free again: {self.get('/health')}")
