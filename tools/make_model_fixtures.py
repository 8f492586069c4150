#!/usr/bin/env python3
"""Tiny random models of every architecture with transformers' logits and greedy tokens (tests/golden/models).

A model's folder holds
  config.json              in the style of transformers 4 or 5, written here by hand and read by transformers
  model*.safetensors       bf16, f16 or f32, single or sharded
  tokenizer.json, ...      a byte-level BPE of the model's vocabulary, so that the folder can be served
  golden.safetensors       prompt_N (int32), last_logits_N (float32 [vocab]) for prompts of N tokens, and for some
                           models all_logits_33 (float32 [33, vocab])
  golden.json              for each prompt 32 greedy tokens, the margin of each over the runner-up relative to the
                           largest logit, and the five best log-probabilities of each step: for tests over HTTP

The reference is computed in float32 from weights rounded to bf16 (matrices only: norms and biases stay as they are
in the file), which is what the engine holds.
"""
import json
import pathlib
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "models"
PROMPT_TOKENS = (1, 7, 33, 150)
GREEDY_TOKENS = 32
VOCAB = 320
EOS, IM_START, IM_END, PAD = 319, 317, 318, 316

COMMON = {"vocab_size": VOCAB, "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02,
          "attention_dropout": 0.0, "bos_token_id": EOS, "eos_token_id": EOS, "use_cache": True}

# name -> config.json, dtype of the file, bytes per shard, whether all logits are kept
MODELS = {
    "qwen3": dict(
        config={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64,
                "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 40960,
                "max_window_layers": 3, "sliding_window": None, "use_sliding_window": False,
                "attention_bias": False, "tie_word_embeddings": True, "layer_types": ["full_attention"] * 3,
                "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
                "transformers_version": "5.0.0"},
        generation={"eos_token_id": [EOS, IM_END], "bos_token_id": EOS, "do_sample": True, "temperature": 0.6,
                    "top_k": 20, "top_p": 0.95},
        dtype=torch.bfloat16, all_logits=True),
    "qwen2": dict(
        config={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64,
                "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 21,
                "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": False,
                "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "transformers_version": "4.43.1"},
        dtype=torch.bfloat16),
    # Qwen2's mixed windows: layer 0 sees everything, layers 1 and 2 the last 20 positions.
    "qwen2-window": dict(
        config={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64,
                "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
                "num_key_value_heads": 1, "max_position_embeddings": 4096, "max_window_layers": 1,
                "sliding_window": 20, "use_sliding_window": True, "tie_word_embeddings": True,
                "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.43.1"},
        dtype=torch.bfloat16),
    "llama3": dict(
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
                "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 131072, "attention_bias": False,
                "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False, "rope_theta": 500000.0,
                "rms_norm_eps": 1e-5, "torch_dtype": "float32", "transformers_version": "4.43.0",
                # The trained context is short here, so that 150 tokens reach every branch of the scaling.
                "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 64, "rope_type": "llama3"}},
        dtype=torch.float32),
    "llama-yarn": dict(
        config={"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
                "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 4, "max_position_embeddings": 1024, "attention_bias": True,
                "mlp_bias": True, "tie_word_embeddings": True, "rope_theta": 10000.0,
                "torch_dtype": "float16", "transformers_version": "4.40.0",
                "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 64, "type": "yarn"}},
        dtype=torch.float16),
    "mistral": dict(
        config={"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 64,
                "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
                "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32768,
                "sliding_window": 24, "tie_word_embeddings": False, "dtype": "bfloat16",
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
                "transformers_version": "5.0.0"},
        dtype=torch.bfloat16, shard_bytes="60KB", all_logits=True),
}


def fill(model: torch.nn.Module, tied: bool, seed: int) -> None:
    """Random weights under which every part matters: attention is selective, layers add more than embeddings.

    A tied model with large embeddings would only repeat its last token, so they are small and the last norm large.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "model.norm.weight" and tied:
            value = 5.0 + noise
        elif "norm" in name:
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed_tokens" in name:
            value = (0.1 if tied else 0.4) * noise
        else:
            gain = 2.0 if "lm_head" in name else 1.3 if "q_proj" in name or "k_proj" in name else 1.0
            value = gain * noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(value)


def write_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=PAD, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator([__doc__ * 3], trainer)
    assert tokenizer.get_vocab_size() == PAD
    tokenizer.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert tokenizer.token_to_id("<|endoftext|>") == EOS and tokenizer.token_to_id("<|im_start|>") == IM_START
    tokenizer.save(str(folder / "tokenizer.json"))
    template = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|pad|>",
                                                  "chat_template": template})


def write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def reference_model(folder: pathlib.Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.copy_(parameter.data.to(torch.bfloat16).to(torch.float32))
    return model.eval()


def greedy(model, prompt: list[int]) -> dict:
    tokens, margins, top_logprobs = [], [], []
    for _ in range(GREEDY_TOKENS):
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1]
        best = logits.topk(2).values
        margins.append(round(float((best[0] - best[1]) / logits.abs().max()), 5))
        logprobs = torch.log_softmax(logits, -1).topk(5)
        top_logprobs.append([[int(i), round(float(v), 4)] for v, i in zip(*logprobs)])
        tokens.append(int(logits.argmax()))
    return {"prompt": prompt, "tokens": tokens, "margins": margins, "top_logprobs": top_logprobs}


@torch.no_grad()
def make(name: str, spec: dict, seed: int) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**COMMON, **spec["config"]})
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    fill(model.to(torch.float32), spec["config"]["tie_word_embeddings"], seed)
    model.to(spec["dtype"]).save_pretrained(folder, max_shard_size=spec.get("shard_bytes", "1GB"))
    write_json(folder / "config.json", {**COMMON, **spec["config"]})  # ours, not the one just saved
    (folder / "generation_config.json").unlink(missing_ok=True)
    if "generation" in spec:
        write_json(folder / "generation_config.json", spec["generation"])
    write_tokenizer(folder)

    model = reference_model(folder)
    generator = torch.Generator().manual_seed(seed + 1)
    arrays, cases = {}, []
    for count in PROMPT_TOKENS:
        prompt = torch.randint(0, VOCAB, (count,), generator=generator)
        logits = model(prompt[None], use_cache=False).logits[0]
        arrays[f"prompt_{count}"] = prompt.to(torch.int32)
        arrays[f"last_logits_{count}"] = logits[-1].clone()
        if spec.get("all_logits") and count == 33:
            arrays[f"all_logits_{count}"] = logits.clone()
        cases.append(greedy(model, prompt.tolist()))
    save_file(arrays, folder / "golden.safetensors")
    text = json.dumps({"cases": cases}, separators=(",", ":"))
    (folder / "golden.json").write_text(text.replace('{"prompt"', '\n{"prompt"') + "\n")

    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    clear = sum(m > 2e-2 for c in cases for m in c["margins"]) / (len(cases) * GREEDY_TOKENS)
    distinct = [len(set(c["tokens"])) for c in cases]
    print(f"{name}: {size / 1024:.0f} KiB, logits up to {max(float(a.abs().max()) for k, a in arrays.items() if 'logits' in k):.1f}, "
          f"margin above 2e-2 in {clear:.0%} of steps, distinct greedy tokens {distinct}")


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for index, (name, spec) in enumerate(MODELS.items()):
        make(name, spec, seed=1000 + 10 * index)
    return 0


if __name__ == "__main__":
    sys.exit(main())
