"""What clients, shells and configuration files do that they should not, and how `baton serve` starts, stops and fails."""

import asyncio
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import tempfile
import time
import unittest

from cluster import BATON, DEMO, GOLDEN, Cluster, wait_until

TINY = GOLDEN / "qwen3"
CHAT = "/v1/chat/completions"


def raw(port, data, half_close=False):
    """All that the server answers until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
        return answer


def run(*arguments, environment=None, timeout_s=30):
    """(exit code, output) of a command that is to end by itself."""
    done = subprocess.run([BATON, *[str(a) for a in arguments]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=timeout_s, env={**os.environ, **(environment or {})})
    return done.returncode, done.stdout.decode()


class Requests(unittest.TestCase):
    """One server for all of them; after each test nothing is left in it."""

    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster("--local-prefill-tokens", 0, "--max-body", "1MiB")
        cls.port = cls.cluster.port
        cls.max_model_len = cls.cluster.get("/health")["max_model_len"]

    @classmethod
    def tearDownClass(cls):
        cls.cluster.stop()

    def tearDown(self):
        self.cluster.wait_idle(30)
        # This connection is the one that is counted.
        wait_until(lambda: self.cluster.metric("baton_http_connections") <= 1, 10, "all connections are closed")
        self.assertEqual(self.cluster.metric("baton_router_worker_losses_total"), 0)
        self.assertEqual(self.cluster.metric("baton_http_requests_running"), 0)

    def test_wrong_requests_get_error_objects(self):
        length = self.max_model_len
        cases = [
            ("", 400, "JSON"), ("[]", 400, "object"), ('{"prompt":' + "[" * 5000 + "]" * 5000 + "}", 400, "deep"),
            (b'{"prompt":"a\xff"}', 400, "UTF-8"), (b'{"prompt":"a\0b"}', 400, "JSON"), (b'{"prompt":"\\ud800"}', 400, "JSON"),
            ('{"prompt":"a","temperature":1e400}', 400, "number"), ('{"prompt":"a","temperature":NaN}', 400, "JSON"),
            ({"prompt": ""}, 400, "no tokens"), ({"prompt": []}, 400, "empty"), ({"prompt": [[]]}, 400, "no tokens"),
            ({"prompt": [-1]}, 400, "token id"), ({"prompt": [2**40]}, 400, "token id"), ({"prompt": [10**6]}, 400, "vocabulary"),
            ({"prompt": "a", "max_tokens": 0}, 400, "between 1"), ({"prompt": "a", "max_tokens": 5.5}, 400, "integer"),
            ({"prompt": "a", "max_tokens": 2**31 - 1}, 400, "context length"), ({"prompt": "a", "max_tokens": True}, 400, "integer"),
            ({"prompt": [5] * length, "max_tokens": 1}, 400, "context length"),
            ({"prompt": [5] * (length - 1), "max_tokens": 2}, 400, "context length"),
            ({"prompt": [5] * 100_000}, 400, "context length"),
            ({"prompt": "a", "n": 129}, 400, "between 1 and 128"), ({"prompt": ["a"] * 257}, 400, "the limit is 256"),
            ({"prompt": "a", "stop": [""]}, 400, "empty string"), ({"prompt": "a", "stop": ["x"] * 33}, 400, "the limit is 32"),
            ({"prompt": "a", "logit_bias": {"999999": 1}}, 400, "vocabulary"),
            ({"prompt": "a", "logit_bias": {"5": 101}}, 400, "-100 to 100"),
            ({"prompt": "a", "seed": 2**64 - 1}, 400, "seed"), ({"prompt": "a", "stop_token_ids": [10**8]}, 400, "vocabulary"),
            ({"prompt": "a", "min_tokens": 500}, 400, "min_tokens"), ({"prompt": "a", "model": "gpt-9"}, 404, "does not exist"),
        ]
        for body, status, part in cases:
            code, _, data = self.cluster.request("POST", "/v1/completions", body)
            error = json.loads(data)["error"]
            self.assertEqual(code, status, f"{str(body)[:80]}: {data[:300]}")
            self.assertIn(part, error["message"], str(body)[:80])
            self.assertEqual(set(error), {"message", "type", "param", "code"})
        for messages in ([], [{"role": 1, "content": "a"}], [{"content": "a"}], "a",
                         [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                         [{"role": "user", "content": "word " * 100_000}]):
            code, _, data = self.cluster.request("POST", CHAT, {"messages": messages})
            self.assertEqual(code, 400, data[:300])
            self.assertIn("message", json.loads(data)["error"])

    def test_odd_requests_that_are_right(self):
        for body in ({"max_tokens": 5.0}, {"stream": None}, {"unknown": {"a": [1]}}, {"stop": None}, {"n": 128, "max_tokens": 1},
                     {"stop": [chr(0x1F600 + i) for i in range(32)]}, {"logit_bias": {"5": 100}}, {"top_k": 2**31 - 1},
                     {"prompt": "a\0b"}, {"prompt": [0, 1, 2]}, {"prompt": [5] * (self.max_model_len - 1), "max_tokens": 1}):
            body = {"prompt": "Hello", "max_tokens": 2, "temperature": 0, **body}
            answer = self.cluster.post("/v1/completions", body)
            self.assertEqual(len(answer["choices"]), body.get("n") or 1)
        ids = {"prompt": "Hello", "max_tokens": 3, "logit_bias": {"5": 100}, "temperature": 0, "return_token_ids": True}
        self.assertEqual(self.cluster.post("/v1/completions", ids)["choices"][0]["token_ids"], [5, 5, 5])

    def test_http_as_clients_really_write_it(self):
        body = b'{"prompt":"Hello","max_tokens":2}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        for request, expected in [
            (b"GET /live HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
            (b"GET http://x/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"HTTP/1.1 200"),
            (b"GET /v1/models/baton%2Ddemo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b'"id":"baton-demo"'),
            (b"GET /v1/models/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"HTTP/1.1 404"),
            (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"HTTP/1.1 405"),
            (b"BREW /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"HTTP/1.1 405"),
            (head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), b"HTTP/1.1 200"),
            (head + b"Authorization: Bearer secret\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
             b"HTTP/1.1 200"),
            (head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body), b"HTTP/1.1 100"),
            (head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"HTTP/1.1 400"),
            (head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", b"HTTP/1.1 400"),
            (head + b"Content-Length: 1048577\r\n\r\n", b"HTTP/1.1 413"),
            (b"GET /live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"HTTP/1.1 431"),
            (b"\x16\x03\x01\x02\x00\x01\x00" + b"a" * 200, b"HTTP/1.1 400"),
        ]:
            answer = raw(self.port, request)
            self.assertIn(expected, answer, request[:120])
        answer = raw(self.port, b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        self.assertTrue(answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n"), answer)
        # Exactly at the limit is allowed: the request is read, and refused for what it says.
        full = b'{"prompt":"' + b"a" * ((1 << 20) - 13) + b'"}'
        self.assertEqual(len(full), 1 << 20)
        self.assertIn(b"context length", raw(self.port, head + b"Content-Length: %d\r\n\r\n%s" % (len(full), full)))
        stream = b'{"prompt":"Hello","max_tokens":2,"stream":true}'
        answer = raw(self.port, b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(stream), stream))
        self.assertTrue(answer.endswith(b"data: [DONE]\n\n"), answer[-200:])  # without chunks

    def test_stop_string_over_token_borders(self):
        whole = self.cluster.post("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0})
        text = whole["choices"][0]["text"]
        for begin in range(1, len(text) - 3):
            stop = text[begin:begin + 3]
            answer = self.cluster.post("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0,
                                                           "stop": stop})["choices"][0]
            self.assertEqual(answer["text"], text[:text.index(stop)])
            self.assertEqual((answer["finish_reason"], answer["stop_reason"]), ("stop", stop))
        late = self.cluster.post("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 3, "min_tokens": 3,
                                                     "temperature": 0, "stop": text[0]})["choices"][0]
        self.assertTrue(text.startswith(late["text"]) and late["text"], late)

    def test_a_prompt_that_is_wholly_cached(self):
        block_tokens = 16
        for length in (block_tokens, 4 * block_tokens, 4 * block_tokens + 1):
            body = {"prompt": [7 + length] * length, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
            answers = [self.cluster.post("/v1/completions", body)["choices"][0]["token_ids"] for _ in range(3)]
            self.assertEqual(answers, [answers[0]] * 3)
        self.cluster._read()
        self.assertNotIn("closed", "\n".join(self.cluster.log))

    def test_text_offsets_count_characters(self):
        choice = self.cluster.post("/v1/completions", {"prompt": "a", "max_tokens": 12, "temperature": 0, "logprobs": 0})["choices"][0]
        offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
        self.assertEqual(offsets[0], 0)
        for offset, token in zip(offsets, tokens):
            if "\ufffd" not in token:
                self.assertEqual(choice["text"][offset:offset + len(token)], token)

    def test_300_streams_at_once(self):
        async def one(index):
            body = json.dumps({"prompt": f"{index} + 1 =", "max_tokens": 24, "ignore_eos": True, "stream": True}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            answer = await reader.read()
            writer.close()
            return answer

        async def all_of_them():
            return await asyncio.gather(*[one(i) for i in range(300)])

        for answer in asyncio.run(all_of_them()):
            self.assertTrue(answer.startswith(b"HTTP/1.1 200"), answer[:200])
            self.assertIn(b"data: [DONE]", answer)
            self.assertIn(b'"finish_reason":"length"', answer)

    def test_clients_that_never_read_or_reset(self):
        clients = []
        body = json.dumps({"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "stream": True, "logprobs": 20, "n": 2}).encode()
        for _ in range(8):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", self.port))
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            clients.append(client)
        # Half a request, and half a header.
        for part in (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{", b"GET /live HT"):
            client = socket.create_connection(("127.0.0.1", self.port))
            client.sendall(part)
            clients.append(client)
        wait_until(lambda: self.cluster.get("/health")["requests"] >= 16, 20, "all are inside")
        self.assertEqual(self.cluster.request("GET", "/ready")[0], 200)
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a goodbye
            client.close()


class StartAndStop(unittest.TestCase):
    def children_of(self, pid):
        result = []
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                    result.append(int(entry.name))
            except (OSError, IndexError, ValueError):
                pass
        return result

    def test_a_stream_ends_well_under_sigterm_and_new_requests_get_503(self):
        with Cluster("--local-prefill-tokens", 0, "--drain-timeout-ms", 20000) as cluster:
            body = {"prompt": "Hello", "max_tokens": 1500, "ignore_eos": True, "stream_options": {"include_usage": True}}
            stream = cluster.stream("/v1/completions", body)
            next(stream)
            cluster.process.send_signal(signal.SIGTERM)
            wait_until(lambda: cluster.get("/health")["status"] == "draining", 10, "it drains")
            status, headers, data = cluster.request("POST", "/v1/completions", {"prompt": "a"})
            self.assertEqual(status, 503, data)
            self.assertIn("Retry-After", headers)
            self.assertIn("shutting down", json.loads(data)["error"]["message"])
            events = list(stream)  # checks for [DONE]
            self.assertEqual(events[-1]["usage"]["completion_tokens"], 1500)
            wait_until(lambda: cluster.process.poll() is not None, 20, "it ends")
            self.assertEqual(cluster.process.returncode, 0)

    def test_a_stream_cut_by_the_drain_timeout_says_so(self):
        with Cluster("--local-prefill-tokens", 0, "--drain-timeout-ms", 100) as cluster:
            stream = cluster.stream("/v1/completions", {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True})
            next(stream)
            cluster.process.send_signal(signal.SIGTERM)
            self.assertIn("shutting down", list(stream)[-1]["error"]["message"])

    def test_nothing_outlives_a_killed_serve(self):
        with tempfile.TemporaryDirectory() as folder:
            environment = {"XDG_RUNTIME_DIR": folder}
            cluster = Cluster(environment=environment, model=TINY)
            children = list(cluster.pids().values())
            self.assertEqual(len(children), 3)
            cluster.stop(kill=True)
            # An orphan's parent is somebody else; what counts is that it ends.
            wait_until(lambda: not any(pathlib.Path(f"/proc/{pid}/exe").exists() for pid in children), 20, "the children end")
            self.assertEqual(len(os.listdir(folder)), 1)
            with Cluster(environment=environment, model=TINY) as first, Cluster(environment=environment, model=TINY) as second:
                self.assertEqual(len(os.listdir(folder)), 2)  # theirs: the dead one's is gone
                self.assertNotEqual(first.port, second.port)
            self.assertEqual(os.listdir(folder), [])

    def test_unwritable_runtime_folder(self):
        with Cluster(environment={"XDG_RUNTIME_DIR": "/proc", "TMPDIR": "/nowhere"}, model=TINY) as cluster:
            self.assertEqual(cluster.request("GET", "/ready")[0], 200)

    def test_what_cannot_start_says_why(self):
        with socket.socket() as taken, tempfile.TemporaryDirectory() as folder:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, output = run("serve", "--port", port, "--model", TINY)
            self.assertEqual(code, 1, output)
            self.assertIn(f"cannot listen on 127.0.0.1:{port}", output)
            code, output = run("serve", "--model", "/nowhere")
            self.assertEqual((code, "is not a folder" in output), (1, True), output)
            code, output = run("serve", "--model", folder)
            self.assertEqual((code, "config.json" in output), (1, True), output)
            for name in os.listdir(TINY):
                if (TINY / name).is_file():
                    pathlib.Path(folder, name).write_bytes((TINY / name).read_bytes())
            weights = pathlib.Path(folder, "model.safetensors")
            weights.write_bytes(weights.read_bytes()[:1000])
            code, output = run("serve", "--model", folder, "--port", 0)
            self.assertEqual((code, weights.name in output), (1, True), output)
            code, output = run("serve", "--prefill", 0, "--port", 0)
            self.assertEqual(code, 1, output)

    def test_ipv6(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("no IPv6 here")
        with Cluster("--host", "::1", model=TINY) as cluster:
            self.assertIn(f"http://[::1]:{cluster.port}/v1", "\n".join(cluster.log))
            with socket.create_connection(("::1", cluster.port)) as client:
                client.sendall(b"GET /ready HTTP/1.0\r\n\r\n")
                self.assertTrue(client.recv(100).startswith(b"HTTP/1.1 200"))


class Configuration(unittest.TestCase):
    def file(self, text):
        handle = tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False)
        self.addCleanup(os.unlink, handle.name)
        with handle:
            handle.write(text)
        return handle.name

    def test_file_and_environment(self):
        config = self.file(f'[serve]\nmodel = "{TINY}"\nserved-model-name = "from-file"\naggregated = true\ndecode = 2\n'
                           '[bench.serve]\nisl = 7\n')
        # The environment is stronger than the file, the command line than both. What is for one worker
        # (BATON_HTTP_PORT) does not reach the children of `serve`.
        with Cluster("--config", config, environment={"BATON_SERVED_MODEL_NAME": "from-environment", "BATON_PORT": "1",
                                                      "BATON_HTTP_PORT": "1", "BATON_MAX_REQUESTS": "3"}) as cluster:
            health = cluster.get("/health")
            self.assertEqual(health["model"], "from-environment")
            self.assertEqual([worker["role"] for worker in health["workers"]], ["both", "both"])
            status, _, data = cluster.request("POST", "/v1/completions", {"prompt": [1], "n": 4, "max_tokens": 300, "ignore_eos": True})
            self.assertEqual(status, 429, data)
            cluster.wait_idle()

    def test_mistakes_are_told(self):
        for arguments, environment, part in [
            (["serve", "--config", self.file("[serve]\nprot = 8000\n")], {}, "prot"),
            (["serve", "--config", "/nowhere.toml"], {}, "/nowhere.toml"),
            (["serve", "--port", "x"], {}, "--port"),
            (["serve", "--port", "70000"], {}, "70000"),
            (["serve", "--nonsense"], {}, "--nonsense"),
            (["serve"], {"BATON_PORT": "x"}, "--port"),
            (["router"], {}, "--worker"),
            ([], {}, "subcommand"),
        ]:
            code, output = run(*arguments, environment=environment)
            self.assertEqual(code, 2, output)
            self.assertIn(part, output)
        for arguments in (["--help"], ["serve", "--help"], ["bench", "serve", "--help"], ["version"]):
            self.assertEqual(run(*arguments)[0], 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
