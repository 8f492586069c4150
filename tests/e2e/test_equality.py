"""Disaggregated output equals aggregated output, token for token: 200 concurrent mixed requests, greedy and seeded
sampling, long and short prompts, shared prefixes, penalties; with chunked prefill, with preemption forced, with and
without the prefix cache."""

import concurrent.futures
import random
import unittest

from cluster import GOLDEN, ON_GPU, Cluster

MODEL = GOLDEN / "qwen3"
REQUESTS = 200
# More tokens than 64 blocks hold, all begun at once because they come in one request.
WAVE = {"prompt": [[(7 * i + j) % 300 for j in range(8 + i % 24)] for i in range(48)], "max_tokens": 160,
        "ignore_eos": True, "temperature": 0, "return_token_ids": True}


def over(transport):
    """GPU memory goes over host transports through pinned memory."""
    return f"staged:{transport}" if ON_GPU else transport


def make_requests(seed):
    rng = random.Random(seed)
    shared = [[rng.randrange(300) for _ in range(n)] for n in (40, 120, 200)]
    requests = []
    for i in range(REQUESTS):
        prompt = [rng.randrange(300) for _ in range(rng.choice([1, 3, 15, 16, 17, 33, 80, 150, 260]))]
        if rng.random() < 0.5:
            prompt = rng.choice(shared) + prompt
        request = {"prompt": prompt, "max_tokens": rng.choice([1, 2, 8, 24, 48]), "return_token_ids": True,
                   "ignore_eos": rng.random() < 0.7, "temperature": 0}
        if rng.random() < 0.6:
            request.update(temperature=rng.choice([0.5, 1.0, 1.5]), seed=rng.randrange(1 << 30))
            request.update(rng.choice([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}]))
        request.update(rng.choice([{}, {}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.5},
                                   {"frequency_penalty": 0.7}, {"logit_bias": {"7": 2.5}}, {"min_tokens": 1}]))
        if rng.random() < 0.3:
            request["logprobs"] = 3
        requests.append(request)
    return requests


def run_all(cluster, requests, concurrency):
    def one(request):
        answer = cluster.post("/v1/completions", request, timeout_s=300)
        choice = answer["choices"][0]
        return choice["token_ids"], choice["finish_reason"]

    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, requests))


def run_wave(cluster):
    choices = cluster.post("/v1/completions", WAVE, timeout_s=300)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]


class Equality(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.requests = make_requests(seed=2026)
        # The reference: one worker, one request at a time, nothing shared or cut.
        with Cluster("--aggregated", "--no-prefix-cache", "--max-batched-tokens", 1024, model=MODEL) as cluster:
            cls.expected = run_all(cluster, cls.requests, concurrency=1)
            alone = [WAVE | {"prompt": prompt} for prompt in WAVE["prompt"]]
            cls.expected_wave = [token_ids for token_ids, _ in run_all(cluster, alone, concurrency=1)]

    def check(self, *arguments, expect_preemption=False, expect_hits=None, expect_remote=True):
        with Cluster(*arguments, model=MODEL) as cluster:
            actual = run_all(cluster, self.requests, concurrency=REQUESTS)
            for i, (ours, expected) in enumerate(zip(actual, self.expected)):
                self.assertEqual(ours, expected, f"request {i}: {self.requests[i]}")
            if expect_remote:
                cluster.wait_metric("baton_worker_handoffs_total", REQUESTS / 4, side="decode", outcome="committed")
            self.assertEqual(run_wave(cluster), self.expected_wave)
            if expect_preemption:
                cluster.wait_metric("baton_worker_preemptions_total", 1)
            if expect_hits:
                cluster.wait_metric("baton_worker_prefix_hit_tokens_total", 1)
            elif expect_hits is not None:
                cluster.wait_metric("baton_worker_prefill_tokens_total", 1)
                self.assertEqual(cluster.metric("baton_worker_prefix_hit_tokens_total"), 0)
            cluster.wait_idle()

    def test_aggregated_at_once(self):
        self.check("--aggregated", expect_remote=False)

    def test_with_prefix_cache(self):
        self.check("--local-prefill-tokens", 0, expect_hits=True)

    def test_without_prefix_cache(self):
        self.check("--local-prefill-tokens", 0, "--no-prefix-cache", expect_hits=False)

    def test_chunked_prefill(self):
        self.check("--local-prefill-tokens", 0, "--max-batched-tokens", 48)

    def test_preemption(self):
        self.check("--local-prefill-tokens", 0, "--kv-blocks", 64, "--queue-timeout-ms", 120000, expect_preemption=True)

    def test_conditional_local_prefill_and_two_of_each(self):
        self.check("--local-prefill-tokens", 64, "--prefill", 2, "--decode", 2)

    def test_over_tcp(self):
        self.check("--local-prefill-tokens", 0, "--transport", over("tcp"))

    def test_every_block_checked(self):
        for transport in ("shm", "tcp"):
            self.check("--local-prefill-tokens", 0, "--max-batched-tokens", 48, "--transport", over(transport), "--transfer-integrity")


if __name__ == "__main__":
    unittest.main(verbosity=2)
