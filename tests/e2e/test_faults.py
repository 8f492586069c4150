"""Processes are killed and clients vanish under load: every request ends correctly and no block stays behind."""

import concurrent.futures
import http.client
import json
import os
import random
import signal
import socket
import threading
import time
import unittest

from cluster import GOLDEN, Cluster, wait_until

MODEL = GOLDEN / "qwen3"


def make_request(rng, max_tokens=160):
    request = {"prompt": [rng.randrange(300) for _ in range(rng.choice([20, 60, 150, 300]))], "max_tokens": max_tokens,
               "ignore_eos": True, "return_token_ids": True, "temperature": 0}
    if rng.random() < 0.5:
        request.update(temperature=1.0, seed=rng.randrange(1 << 30))
    return request


def run_stream(cluster, request, on_token=None):
    """Token ids of a streamed request, checked to end properly."""
    tokens, finish = [], None
    for event in cluster.stream("/v1/completions", request, timeout_s=120):
        assert "error" not in event, event
        choice = event["choices"][0]
        tokens += choice.get("token_ids") or []
        finish = choice["finish_reason"] or finish
        if on_token:
            on_token(len(tokens))
    assert finish == "length", finish
    return tokens


class Faults(unittest.TestCase):
    def expected_tokens(self, requests):
        with Cluster("--aggregated", model=MODEL) as cluster:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                return list(pool.map(lambda r: run_stream(cluster, r), requests))

    def run_with_kill(self, cluster, requests, victim, signal_number=signal.SIGKILL):
        """Streams all requests at once, kills `victim` when a third of the tokens are there."""
        seen = [0] * len(requests)
        fatal = threading.Event()
        total = sum(r["max_tokens"] for r in requests)

        def one(index):
            def count(n):
                seen[index] = n
                if sum(seen) > total / 3 and not fatal.is_set():
                    fatal.set()
            return run_stream(cluster, requests[index], count)

        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            futures = [pool.submit(one, i) for i in range(len(requests))]
            self.assertTrue(fatal.wait(120), "the load never got going")
            cluster.kill(victim, signal_number)
            return [future.result(timeout=180) for future in futures]

    def test_prefill_worker_killed_under_50_requests(self):
        rng = random.Random(1)
        requests = [make_request(rng) for _ in range(50)]
        expected = self.expected_tokens(requests)
        with Cluster("--local-prefill-tokens", 0, "--max-running", 16, model=MODEL) as cluster:
            before = cluster.pids()["prefill-0"]
            self.assertEqual(self.run_with_kill(cluster, requests, "prefill-0"), expected)
            # The worker that is started again is used again.
            wait_until(lambda: cluster.pids().get("prefill-0") not in (None, before), 20, "prefill-0 is started again")
            wait_until(lambda: any(p["ready"] for p in cluster.workers()["decode-0"]["pairs"]), 20, "the pair is made again")
            handoffs = cluster.metric("baton_worker_handoffs_total", side="decode", outcome="committed")

            def used_again():
                # /health may still speak of the pair that died, so one request may yet be computed by the decode worker.
                run_stream(cluster, make_request(rng, 4))
                return cluster.metric("baton_worker_handoffs_total", side="decode", outcome="committed") > handoffs

            wait_until(used_again, 20, "the new prefill worker is used")
            cluster.wait_idle()

    def test_prefill_worker_stopped_not_dead(self):
        rng = random.Random(5)
        requests = [make_request(rng) for _ in range(20)]
        expected = self.expected_tokens(requests)
        with Cluster("--local-prefill-tokens", 0, "--max-running", 8, "--lease-ms", 1000, model=MODEL) as cluster:
            pid = cluster.pids()["prefill-0"]
            self.assertEqual(self.run_with_kill(cluster, requests, "prefill-0", signal.SIGSTOP), expected)
            os.kill(pid, signal.SIGCONT)
            cluster.wait_idle(30)

    def test_one_of_two_decode_workers_killed(self):
        rng = random.Random(2)
        requests = [make_request(rng) for _ in range(50)]
        expected = self.expected_tokens(requests)
        with Cluster("--local-prefill-tokens", 0, "--decode", 2, model=MODEL) as cluster:
            # Ready means one pair; the one that is killed must have work.
            wait_until(lambda: all(any(p["ready"] for p in cluster.workers()[name]["pairs"]) for name in ("decode-0", "decode-1")),
                       20, "both decode workers have their pair")
            self.assertEqual(self.run_with_kill(cluster, requests, "decode-0"), expected)
            self.assertGreater(cluster.metric("baton_router_replays_total"), 0)
            wait_until(lambda: "decode-0" in cluster.pids(), 20, "decode-0 is started again")
            cluster.wait_idle(30)

    def test_every_worker_killed_in_turn(self):
        rng = random.Random(3)
        requests = [make_request(rng) for _ in range(20)]
        expected = self.expected_tokens(requests)
        with Cluster("--local-prefill-tokens", 0, "--decode", 2, "--prefill", 2, model=MODEL) as cluster:
            for victim in ("prefill-1", "decode-1", "prefill-0", "decode-0"):
                self.assertEqual(self.run_with_kill(cluster, requests, victim), expected, f"{victim} killed")
                cluster.wait_idle(30)

    def test_disconnected_client_frees_its_blocks_within_a_second(self):
        with Cluster("--local-prefill-tokens", 0, model=MODEL) as cluster:
            rng = random.Random(4)
            for _ in range(5):
                body = json.dumps({"prompt": [rng.randrange(300) for _ in range(200)], "max_tokens": 20000, "stream": True,
                                   "ignore_eos": True, "return_token_ids": True})
                client = socket.create_connection(("127.0.0.1", cluster.port))
                client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                self.assertIn(b"data: ", client.recv(65536) + client.recv(65536))
                client.close()
                gone = time.monotonic()
                cluster.wait_idle(10)
                # The workers report every 50 ms at most; the query itself takes a moment on a busy machine.
                self.assertLess(time.monotonic() - gone, 1.0)

    def test_disconnect_during_prefill(self):
        with Cluster("--local-prefill-tokens", 0, "--max-batched-tokens", 32, model=MODEL) as cluster:
            rng = random.Random(6)
            for _ in range(10):
                body = json.dumps({"prompt": [rng.randrange(300) for _ in range(6000)], "max_tokens": 5})
                client = socket.create_connection(("127.0.0.1", cluster.port))
                client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                wait_until(lambda: cluster.get("/health")["requests"] > 0, 10, "the request is inside")
                client.close()
                cluster.wait_idle(10)

    def test_full_workers_queue_and_then_refuse(self):
        with Cluster("--local-prefill-tokens", 0, "--kv-blocks", 24, "--queue-timeout-ms", 500, model=MODEL) as cluster:
            rng = random.Random(7)
            body = {"prompt": [rng.randrange(300) for _ in range(150)], "max_tokens": 200, "ignore_eos": True}

            def one(_):
                status, headers, data = cluster.request("POST", "/v1/completions", body)
                return status, headers, json.loads(data)

            with concurrent.futures.ThreadPoolExecutor(40) as pool:
                answers = list(pool.map(one, range(40)))
            statuses = [status for status, _, _ in answers]
            self.assertTrue(set(statuses) <= {200, 429}, statuses)
            self.assertIn(200, statuses)
            for status, headers, answer in answers:
                if status == 429:
                    self.assertIn("Retry-After", headers)
                    self.assertIn("message", answer["error"])
            cluster.wait_idle()
            # More than the pool can ever hold is refused at once, with the numbers.
            status, _, data = cluster.request("POST", "/v1/completions", {"prompt": [1] * 500, "max_tokens": 10})
            self.assertEqual(status, 400, data)

    def test_router_death_frees_everything(self):
        with Cluster("--local-prefill-tokens", 0, model=MODEL) as cluster:
            rng = random.Random(8)
            connections = []
            for _ in range(10):
                connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=30)
                connection.request("POST", "/v1/completions", json.dumps(
                    {"prompt": [rng.randrange(300) for _ in range(100)], "max_tokens": 20000, "ignore_eos": True,
                     "stream": True, "return_token_ids": True}))
                connections.append((connection, connection.getresponse()))
            before = cluster.kill("router")
            for connection, response in connections:
                with self.assertRaises((http.client.HTTPException, OSError)):
                    while response.read(4096):
                        pass
                    raise http.client.IncompleteRead(b"")  # an end without [DONE] is an end, too
                connection.close()
            wait_until(lambda: cluster.pids().get("router") not in (None, before), 20, "the router is started again")

            def ready():
                try:
                    return cluster.request("GET", "/ready")[0] == 200
                except OSError:
                    return False

            wait_until(ready, 20, "the new router is ready on the same port")
            cluster.wait_idle()
            self.assertEqual(len(run_stream(cluster, make_request(rng, 8))), 8)


if __name__ == "__main__":
    unittest.main(verbosity=2)
