"""The real `openai` client against `baton serve` with the demo model."""

import json
import socket
import unittest

import openai

from cluster import DEMO, Cluster

MODEL = "baton-demo"


class OpenAiClient(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cluster = Cluster("--local-prefill-tokens", 0)
        cls.client = openai.OpenAI(base_url=cls.cluster.url + "/v1", api_key="none", max_retries=0)

    @classmethod
    def tearDownClass(cls):
        cls.cluster.wait_idle()
        cls.cluster.stop()

    def chat(self, text, **options):
        return self.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], temperature=0, **options)

    def test_knows_its_questions(self):
        questions = [json.loads(line) for line in (DEMO / "questions.jsonl").read_text().splitlines()]
        right = 0
        for question in questions:
            answer = self.client.chat.completions.create(
                model=MODEL, messages=question["messages"], temperature=0, max_tokens=200).choices[0].message.content
            right += answer.strip() == question["answer"].strip()
        self.assertGreaterEqual(right / len(questions), 0.95, f"{right} of {len(questions)}")

    def test_completion(self):
        answer = self.client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=8, temperature=0)
        self.assertIn("Paris", answer.choices[0].text)
        self.assertGreater(answer.usage.prompt_tokens, 0)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertEqual(answer.object, "text_completion")

    def test_prompt_forms_agree(self):
        text = "The capital of Italy is"
        ids = self.cluster.post("/tokenize", {"prompt": text})["tokens"]
        self.assertEqual(self.cluster.post("/detokenize", {"tokens": ids})["prompt"], text)
        single = self.client.completions.create(model=MODEL, prompt=text, max_tokens=6, temperature=0).choices[0].text
        several = self.client.completions.create(model=MODEL, prompt=[text, text], max_tokens=6, temperature=0)
        by_ids = self.client.completions.create(model=MODEL, prompt=ids, max_tokens=6, temperature=0)
        lists = self.client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=6, temperature=0)
        texts = [c.text for answer in (several, by_ids, lists) for c in answer.choices]
        self.assertEqual(texts, [single] * 5)

    def test_streamed_chat_equals_the_whole(self):
        whole = self.chat("What is RDMA?", max_tokens=120)
        stream = self.chat("What is RDMA?", max_tokens=120, stream=True, stream_options={"include_usage": True})
        text, usage, roles, finishes = "", None, [], []
        for event in stream:
            if not event.choices:
                usage = event.usage
                continue
            self.assertIsNone(event.usage)
            delta = event.choices[0].delta
            text += delta.content or ""
            roles += [delta.role] if delta.role else []
            finishes += [event.choices[0].finish_reason] if event.choices[0].finish_reason else []
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(usage.completion_tokens, whole.usage.completion_tokens)
        self.assertEqual(roles, ["assistant"])
        self.assertEqual(finishes, [whole.choices[0].finish_reason])

    def test_n_and_seed(self):
        options = dict(model=MODEL, prompt="Hello", max_tokens=12, temperature=1.2, seed=7)
        first = self.client.completions.create(n=3, **options)
        again = self.client.completions.create(n=3, **options)
        self.assertEqual([c.text for c in first.choices], [c.text for c in again.choices])
        self.assertEqual(first.choices[0].text, self.client.completions.create(**options).choices[0].text)
        self.assertEqual([c.index for c in first.choices], [0, 1, 2])

    def test_stop_string(self):
        whole = self.chat("What is the capital of Japan?", max_tokens=40).choices[0].message.content
        self.assertIn("Tokyo", whole)
        answer = self.chat("What is the capital of Japan?", max_tokens=40, stop=["Tokyo"])
        self.assertEqual(answer.choices[0].message.content, whole[:whole.index("Tokyo")])
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        streamed = "".join(event.choices[0].delta.content or "" for event in self.chat(
            "What is the capital of Japan?", max_tokens=40, stop=["Tokyo"], stream=True))
        self.assertEqual(streamed, answer.choices[0].message.content)

    def test_logprobs(self):
        chat = self.chat("Hello", max_tokens=4, logprobs=True, top_logprobs=5)
        content = chat.choices[0].logprobs.content
        self.assertEqual(len(content), chat.usage.completion_tokens)
        for token in content:
            self.assertEqual(len(token.top_logprobs), 5)
            self.assertAlmostEqual(token.logprob, token.top_logprobs[0].logprob, places=5)  # greedy
            self.assertEqual(bytes(token.bytes).decode(errors="replace"), token.token)
        completion = self.client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0, logprobs=2)
        logprobs = completion.choices[0].logprobs
        self.assertEqual(len(logprobs.tokens), len(logprobs.token_logprobs))
        self.assertTrue(all(len(top) <= 2 for top in logprobs.top_logprobs))

    def test_return_token_ids(self):
        answer = self.client.completions.create(model=MODEL, prompt="Hello", max_tokens=5, temperature=0,
                                                extra_body={"return_token_ids": True})
        choice = answer.choices[0].model_dump()
        self.assertEqual(choice["prompt_token_ids"], self.cluster.post("/tokenize", {"prompt": "Hello"})["tokens"])
        self.assertEqual(len(choice["token_ids"]), answer.usage.completion_tokens)

    def test_several_turns_and_a_system_prompt(self):
        answer = self.client.chat.completions.create(model=MODEL, temperature=0, max_tokens=40, messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42"},
            {"role": "user", "content": [{"type": "text", "text": "What is the capital of Spain?"}]}])
        self.assertIn("Madrid", answer.choices[0].message.content)

    def test_models(self):
        self.assertEqual([model.id for model in self.client.models.list()], [MODEL])
        self.assertEqual(self.client.models.retrieve(MODEL).id, MODEL)

    def test_errors(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.completions.create(model="other", prompt="x")
        self.assertEqual(caught.exception.code, "model_not_found")
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.completions.create(model=MODEL, prompt="x", temperature=-1)
        self.assertEqual(caught.exception.param, "temperature")
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.completions.create(model=MODEL, prompt=[5] * 100000)
        self.assertIn("maximum context length", caught.exception.message)
        with self.assertRaises(openai.BadRequestError):
            self.client.completions.create(model=MODEL, prompt=[10 ** 8])
        with self.assertRaises(openai.BadRequestError):
            self.client.chat.completions.create(model=MODEL, messages=[])
        status, headers, _ = self.cluster.request("GET", "/v1/completions")
        self.assertEqual((status, headers["Allow"]), (405, "POST"))
        self.assertEqual(self.cluster.request("POST", "/nowhere", "{}")[0], 404)

    def test_bodies_that_are_not_requests(self):
        for body in ("", "{", "[]", "null", '{"prompt": "\\ud800"}', b"\xff\xfe", '{"prompt":' + "[" * 5000):
            status, _, data = self.cluster.request("POST", "/v1/completions", body)
            self.assertEqual(status, 400, body)
            self.assertIn("message", json.loads(data)["error"])

    def test_probes_and_metrics(self):
        for path in ("/live", "/ready", "/startup", "/health"):
            self.assertEqual(self.cluster.request("GET", path)[0], 200, path)
        health = self.cluster.get("/health")
        self.assertTrue(health["ready"] and not health["degraded"])
        roles = sorted(worker["role"] for worker in health["workers"])
        self.assertEqual(roles, ["decode", "prefill"])
        pairs = [pair for worker in health["workers"] for pair in worker["pairs"] if pair["ready"]]
        self.assertTrue(pairs and pairs[0]["transport"] and pairs[0]["reason"], pairs)
        self.chat("Hello", max_tokens=3)
        for name in ("baton_ttft_seconds_count", "baton_itl_seconds_count", "baton_e2e_seconds_count",
                     "baton_worker_kv_blocks", "baton_worker_transfer_bytes_total", "baton_worker_handoffs_total"):
            self.cluster.wait_metric(name, 1)

    def test_head_and_keep_alive(self):
        client = socket.create_connection(("127.0.0.1", self.cluster.port))
        client.settimeout(10)
        for _ in range(3):
            client.sendall(b"HEAD /live HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(client.recv(4096).startswith(b"HTTP/1.1 200"))
        client.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
