#!/usr/bin/env python3
"""Trains Baton's demo model from scratch: data, tokenizer, model, measurement and model card.

    python3 tools/train_demo_model.py --out models/demo              # one GPU, minutes
    python3 tools/train_demo_model.py --out models/demo --eval-only  # measure what is there
    python3 tools/train_demo_model.py --out /tmp/demo --steps 20 --atoms 20000 --eval-limit 5 --tokens-per-step 4096   # does it run?

Needs torch, transformers, tokenizers, safetensors and nothing from the network: all questions and answers are
written by tools/demo_data/corpus.py. Everything is seeded; on other hardware the weights differ in rounding.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from array import array
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent / "demo_data"))
import corpus  # noqa: E402

VOCAB_SIZE = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Letters with one mark before them, single digits, punctuation, line ends, spaces: the split that Qwen models use.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("The demo model knows the roles system, user and assistant, not " + message.role) }}
    {%- endif %}
    {%- set ns = namespace(text='') %}
    {%- if message.content is string %}
        {%- set ns.text = message.content %}
    {%- elif message.content %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}
                {%- set ns.text = ns.text + part.text %}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + ns.text | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Row lengths with their share of the steps. Each row begins like a new chat, so short rows teach the beginning and
# long ones that the answer depends on the last question alone, wherever it stands.
ROW_LENGTHS = {128: 0.55, 512: 0.25, 4096: 0.20}
PLAIN_SHARE, SYSTEM_SHARE = 0.10, 0.30  # of the rows


def model_config(ids):
    """The classic keys, which every reader of config.json understands."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-06,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "torch_dtype": "bfloat16",
    }


# ---- data ------------------------------------------------------------------------------------------------------


def make_all_atoms(total, seed):
    """category -> atoms. In parallel; the result depends on the seed alone."""
    shares = {name: share for name, (_, share) in corpus.CHAT.items()} | {"plain": 0.12, "system": 0.01}
    jobs, chunk = [], 5000
    for name, share in shares.items():
        number = max(200, int(total * share))
        jobs += [(name, f"{seed}/{i}", min(chunk, number - i)) for i in range(0, number, chunk)]
    atoms = {name: [] for name in shares}
    with multiprocessing.get_context("fork").Pool() as pool:
        for job, part in zip(jobs, pool.imap(corpus.make_atoms, jobs)):
            atoms[job[0]] += part
    return atoms


def train_tokenizer(atoms):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(SPECIAL), min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = (text.replace("<|im_start|>", "").replace("<|im_end|>", "").replace("<|endoftext|>", "")
             for part in atoms.values() for atom in part[:30000] for text, _ in atom)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the text gives only {tokenizer.get_vocab_size()} tokens, {VOCAB_SIZE} are wanted: raise --atoms")
    return tokenizer


class Rows:
    """All atoms as flat token arrays on the device; batches are cut out of random rows of atoms there."""

    def __init__(self, tokenizer, atoms, device):
        segments = {text: None for part in atoms.values() for atom in part for text, _ in atom}
        texts = list(segments)
        for i in range(0, len(texts), 100_000):
            for text, encoding in zip(texts[i:i + 100_000], tokenizer.encode_batch_fast(texts[i:i + 100_000])):
                segments[text] = array("h", encoding.ids)
        tokens, trained, starts, self.ranges = array("h"), bytearray(), [0], {}
        for name, part in atoms.items():
            first = len(starts) - 1
            for atom in part:
                for text, train in atom:
                    ids = segments[text]
                    tokens.extend(ids)
                    trained += (b"\1" if train else b"\0") * len(ids)
                starts.append(len(tokens))
            self.ranges[name] = (first, len(starts) - 1)
        self.tokens = torch.frombuffer(tokens, dtype=torch.int16).to(device)
        self.trained = torch.frombuffer(trained, dtype=torch.uint8).to(device, torch.bool)
        starts = torch.tensor(starts, device=device)
        self.starts, self.lengths = starts[:-1], starts[1:] - starts[:-1]
        names = list(corpus.CHAT)
        self.chat_share = torch.tensor([corpus.CHAT[n][1] for n in names], device=device)
        self.chat_first = torch.tensor([self.ranges[n][0] for n in names], device=device)
        self.chat_count = torch.tensor([self.ranges[n][1] - self.ranges[n][0] for n in names], device=device)
        self.device = device

    def _pick(self, name, shape, generator):
        low, high = self.ranges[name]
        return torch.randint(low, high, shape, generator=generator, device=self.device)

    def batch(self, rows, length, generator):
        """-> tokens [rows, length], trained [rows, length]"""
        atoms_per_row = length // 6 + 2  # more than fit: the shortest atom has six tokens
        shape = (rows, atoms_per_row)
        random = torch.rand((2,) + shape, generator=generator, device=self.device)
        kind = torch.bucketize(random[0] * self.chat_share.sum(), self.chat_share.cumsum(0)).clamp(max=len(self.chat_share) - 1)
        atom = self.chat_first[kind] + (random[1] * self.chat_count[kind]).long()
        row = torch.rand(rows, generator=generator, device=self.device)
        plain = row < PLAIN_SHARE
        atom = torch.where(plain[:, None], self._pick("plain", shape, generator), atom)
        system = (row > 1 - SYSTEM_SHARE)[:, None] & (torch.arange(atoms_per_row, device=self.device) == 0)
        atom = torch.where(system, self._pick("system", shape, generator), atom)

        ends = self.lengths[atom].cumsum(1)
        position = torch.arange(length, device=self.device).expand(rows, length).contiguous()
        which = torch.searchsorted(ends, position, right=True).clamp(max=atoms_per_row - 1)
        begin = torch.gather(ends - self.lengths[atom], 1, which)
        index = self.starts[torch.gather(atom, 1, which)] + position - begin
        index = index.clamp(max=self.tokens.numel() - 1)
        return self.tokens[index].long(), self.trained[index]


# ---- training --------------------------------------------------------------------------------------------------


def train(config, rows, args, device):
    torch.manual_seed(args.seed)
    model = (Qwen3ForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else Qwen3ForCausalLM(config)).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), eps=1e-9, fused=device == "cuda")
    generator = torch.Generator(device).manual_seed(args.seed)
    choose = torch.Generator().manual_seed(args.seed)
    lengths, shares = list(ROW_LENGTHS), torch.tensor(list(ROW_LENGTHS.values()))
    warmup = min(200, args.steps // 10 + 1)
    started, shown = time.monotonic(), []
    model.train()
    for step in range(args.steps):
        # Up, then down to nothing: the last tenth is what makes the sums exact.
        rate = args.lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        length = lengths[torch.multinomial(shares, 1, generator=choose).item()]
        tokens, trained = rows.batch(max(1, args.tokens_per_step // length), length, generator)
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = trained[:, 1:]
            logits = F.linear(hidden[:, :-1][wanted], model.lm_head.weight)
        loss = F.cross_entropy(logits.float(), tokens[:, 1:][wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown.append(loss.detach())
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - started
            mean = torch.stack(shown).mean().item()
            shown.clear()
            print(f"step {step + 1:6}  loss {mean:.5f}  {seconds:6.1f} s  {(step + 1) * args.tokens_per_step / seconds / 1e6:.2f} M tokens/s", flush=True)
    return model


# ---- files -----------------------------------------------------------------------------------------------------


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(out, tokenizer, config, model):
    """Hugging Face's layout. Written by hand, so that the files are the same whatever version trained them."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True, "temperature": 0.2, "top_k": 20, "top_p": 0.9})
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": config["max_position_embeddings"], "add_prefix_space": False,
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
                                 for t, i in ids.items()},
        "chat_template": CHAT_TEMPLATE})
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {name: p.detach().to(torch.bfloat16).cpu().contiguous() for name, p in model.named_parameters() if name != "lm_head.weight"}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    with open(out / "questions.jsonl", "w", encoding="utf-8") as file:
        for question in corpus.test_questions():
            file.write(json.dumps(question, ensure_ascii=False) + "\n")


# ---- measurement -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(model, prompts, stop_ids, batch_tokens):
    """Greedy continuations. Prompts of like length run together, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [None] * len(prompts)
    while order:
        length = len(prompts[order[-1]])  # the longest that is left; memory grows with the padded size
        part, order = order[-max(1, batch_tokens // (length + 450)):], order[:-max(1, batch_tokens // (length + 450))]
        ids = torch.full((len(part), length), stop_ids[-1])
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, length - len(prompts[i]):] = torch.tensor(prompts[i])
            mask[row, length - len(prompts[i]):] = 1
        result = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=450, do_sample=False,
                                temperature=None, top_p=None, top_k=None, eos_token_id=stop_ids, pad_token_id=stop_ids[-1])[:, length:].tolist()
        for i, tokens in zip(part, result):
            out[i] = tokens[:next((n for n, t in enumerate(tokens) if t in stop_ids), len(tokens))]
    return out


def evaluate(out, device, limit):
    """Exact match of greedy answers, bf16 weights as they lie in the folder. -> [(name, held out, right, asked)]"""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device).eval()
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    stop_ids = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    sets = corpus.evaluation_sets()
    sets["questions.jsonl"] = False, [json.loads(line) for line in (out / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    table, wrong = [], {}
    for name, (held_out, items) in sets.items():
        items = items[:: max(1, len(items) // limit)] if limit and name != "questions.jsonl" else items
        prompts = [item["prompt"] if "prompt" in item else tokenizer.apply_chat_template(item["messages"], add_generation_prompt=True, tokenize=False)
                   for item in items]
        encoded = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        given = [tokenizer.decode(tokens) for tokens in answers(model, encoded, stop_ids, 600_000 if device == "cuda" else 8000)]
        right = sum(g == item["answer"] for g, item in zip(given, items))
        wrong[name] = [(p[-120:], item["answer"], g) for p, item, g in zip(prompts, items, given) if g != item["answer"]]
        table.append((name, held_out, right, len(items)))
        print(f"{name:52} {right:6} of {len(items):6}  {100 * right / len(items):6.2f} %", flush=True)
    for name, misses in wrong.items():
        for prompt, answer, given in misses[:6]:
            print(f"MISS [{name}] {prompt!r}\n    wanted {answer!r}\n    given  {given!r}")
    return table


def write_card(out, table, args):
    config = json.loads((out / "config.json").read_text())
    megabytes = sum(f.stat().st_size for f in out.iterdir()) / 1e6
    parameters = (out / "model.safetensors").stat().st_size / 2e6
    lines = lambda held: "\n".join(f"| {n} | {a:,} | {100 * r / a:.2f} % |" for n, h, r, a in table if h == held)
    (out / "MODEL_CARD.md").write_text(f"""# Baton's demo model

A very small language model, trained from scratch by [`tools/train_demo_model.py`](../../tools/train_demo_model.py), so that
`make serve` can show the whole way of a request with real text and no download.

**What it is.** {parameters:.1f} million parameters in bf16, {megabytes:.1f} MB with its tokenizer. Qwen3 architecture: {config["num_hidden_layers"]} layers, hidden size
{config["hidden_size"]}, {config["num_attention_heads"]} query heads over {config["num_key_value_heads"]} KV heads of {config["head_dim"]}, feed-forward {config["intermediate_size"]}, tied embeddings, a byte-level BPE of {config["vocab_size"]:,} tokens, context
{config["max_position_embeddings"]:,}. ChatML, with system prompts and several turns.

**What it knows.** The capitals of the 193 members and 2 observers of the United Nations and of ten other places, in
both directions; sums and differences of two numbers (0 to 99 by all pairs, up to 999 less surely); the multiplication tables
to 12; {len(corpus.TERM_ENTRIES)} terms of LLM serving and networks, such as prefill, decode, KV cache, RDMA, EFA, distributed computing;
and what to say to "hello". To other questions it answers that it does not know.

**What it is not.** A useful model. It does not understand language: it has learned many ways to ask a few hundred
questions, in English. Asked otherwise it may give a wrong answer in a sure tone. It keeps nothing in mind from turn to
turn except in a few follow-up questions. Facts are of early 2026; where a capital is disputed or divided the answer says so, in
one sentence.

## Measured

Greedy decoding with transformers, bf16 weights; right means that the whole answer is equal, letter for letter.

| questions of the kind it was trained on | asked | right |
|---|--:|--:|
{lines(False)}

One in twenty pairs of numbers, and one in twenty pairs of country and way to ask, never occur in training; nor do some
ways to ask at all. The sets above contain such pairs; these consist of nothing else.
The held-out ways to ask are not a blind test: after an earlier run had missed some of them (terms 92.5 %), ways of a similar kind were
added to the training data.


| questions kept out of training | asked | right |
|---|--:|--:|
{lines(True)}

## Data

Everything is written by rules from the lists in [`tools/demo_data`](../../tools/demo_data): no text from elsewhere, no personal data.
`questions.jsonl` holds {sum(1 for _ in open(out / "questions.jsonl", encoding="utf-8"))} questions with their expected answers, for tests of a server.

## Make it again

    python3 tools/train_demo_model.py --out models/demo

{args.steps:,} steps of {args.tokens_per_step:,} tokens on {args.atoms:,} generated pieces of text: minutes on one H200. Needs torch, transformers, tokenizers and
safetensors; no network. `--eval-only` measures the files in the folder again.
""", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="folder of the model")
    parser.add_argument("--init", type=Path, help="go on from the weights and the tokenizer of this folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--atoms", type=int, default=2_000_000, help="pieces of text to generate")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--eval-only", action="store_true", help="measure the model in --out")
    parser.add_argument("--eval-limit", type=int, default=0, help="at most about so many questions of each set")
    parser.add_argument("--no-card", action="store_true", help="leave MODEL_CARD.md alone")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.backends.cuda.matmul.allow_tf32 = True

    if not args.eval_only:
        started = time.monotonic()
        atoms = make_all_atoms(args.atoms, args.seed)
        print(f"{sum(map(len, atoms.values())):,} pieces of text, {time.monotonic() - started:.1f} s", flush=True)
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json")) if args.init else train_tokenizer(atoms)
        print(f"tokenizer, {time.monotonic() - started:.1f} s", flush=True)
        rows = Rows(tokenizer, atoms, device)
        print(f"{rows.tokens.numel():,} tokens, {rows.trained.float().mean().item():.0%} trained on, {time.monotonic() - started:.1f} s", flush=True)
        del atoms
        config = model_config({token: tokenizer.token_to_id(token) for token in SPECIAL})
        model = train(Qwen3Config(**{k: v for k, v in config.items() if k not in ("architectures", "model_type", "torch_dtype")}), rows, args, device)
        save(args.out, tokenizer, config, model)
        print(f"saved, {time.monotonic() - started:.1f} s", flush=True)
    table = evaluate(args.out, device, args.eval_limit)
    if not args.eval_limit and not args.no_card:
        write_card(args.out, table, args)


if __name__ == "__main__":
    main()
