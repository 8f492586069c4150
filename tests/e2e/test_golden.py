"""Every architecture through HTTP, disaggregated, against transformers' logits and tokens (tests/golden/models)."""

import json
import struct
import unittest

from cluster import GOLDEN, Cluster

TOLERANCE = 2e-2  # of the largest logit; a greedy token must agree where the reference's margin is above it


def largest_logit(folder):
    """Of transformers' logits for the fixture's prompts: what the tolerance is relative to."""
    data = (folder / "golden.safetensors").read_bytes()
    size, = struct.unpack_from("<Q", data)
    tensors = json.loads(data[8:8 + size])
    largest = 0.0
    for name, tensor in tensors.items():
        if "logits" in name:
            begin, end = tensor["data_offsets"]
            values = struct.unpack_from(f"<{(end - begin) // 4}f", data, 8 + size + begin)
            largest = max(largest, max(map(abs, values)))
    return largest


class GoldenThroughHttp(unittest.TestCase):
    def check_model(self, folder):
        golden = json.loads((folder / "golden.json").read_text())
        bound = TOLERANCE * largest_logit(folder)
        with Cluster("--local-prefill-tokens", 0, model=folder) as cluster:
            for case in golden["cases"]:
                # One request per step of the reference: each starts from the reference's own tokens, so that one
                # disagreement inside the tolerance does not spoil the rest.
                answer = cluster.post("/v1/completions", {
                    "model": folder.name, "prompt": case["prompt"], "max_tokens": len(case["tokens"]), "temperature": 0,
                    "logprobs": 5, "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True})
                choice = answer["choices"][0]
                self.assertEqual(choice["prompt_token_ids"], case["prompt"])
                self.assertEqual(len(choice["token_ids"]), len(case["tokens"]))
                for step, (ours, reference) in enumerate(zip(choice["token_ids"], case["tokens"])):
                    self.check_logprobs(choice["logprobs"]["top_logprobs"][step], case["top_logprobs"][step], 2 * bound)
                    if ours != reference:
                        self.assertLess(case["margins"][step], 2 * bound, f"{folder.name}, step {step}")
                        break
            # The KV must have come from the prefill worker.
            cluster.wait_metric("baton_worker_handoffs_total", len(golden["cases"]), side="decode", outcome="committed")
            cluster.wait_idle()

    def check_logprobs(self, ours, reference, bound):
        """Tokens in both lists have equal logprobs within the bound."""
        ours = {int(name.split(":")[1]): value for name, value in ours.items()}
        reference = dict((int(token), value) for token, value in
                         (reference.items() if isinstance(reference, dict) else reference))
        common = ours.keys() & reference.keys()
        self.assertGreaterEqual(len(common), min(3, len(reference)))
        for token in common:
            self.assertAlmostEqual(ours[token], reference[token], delta=bound)


def add_tests():
    for folder in sorted(GOLDEN.iterdir()):
        if (folder / "golden.json").exists():
            name = "test_" + folder.name.replace("-", "_")
            setattr(GoldenThroughHttp, name, lambda self, folder=folder: self.check_model(folder))


add_tests()

if __name__ == "__main__":
    unittest.main(verbosity=2)
