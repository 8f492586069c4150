#!/usr/bin/env python3
"""Makes tests/golden/tokenizers: small tokenizers in the configuration of each model family, and cases.

The vocabularies are trained here on text that this script makes up; normalizer, pre-tokenizer,
post-processor, decoder and added tokens are those of the family's published tokenizer.json.

    python3 -m venv venv && venv/bin/pip install tokenizers
    venv/bin/python tools/make_tokenizer_fixtures.py [--out tests/golden/tokenizers]

cases.bin, little endian, for each family in the order of families.txt:
    uint32 number of cases, then per case
    uint32 bytes, text · uint32 n, int32 ids[n] (with special tokens) · uint32 n, int32 ids[n]
    (without, n = 0xFFFFFFFF: the same) · uint32 bytes, decoded (skipping special tokens,
    0xFFFFFFFF: the same as the text) · uint32 bytes, decoded with special tokens (likewise, of the first ids)
"""

import argparse
import json
import pathlib
import random
import struct

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN_MARKS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"]

WORDS = """the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who oil its now find long down day did get come made may part hello world prefill decode cache block token
transfer memory tensor attention layer function return const static void include struct class import def self print for
while naïve café résumé Zürich São Москва привет мир Ελλάδα γειά שלום مرحبا नमस्ते สวัสดี 你好 世界 中文 日本語 こんにちは 東京
한국어 안녕하세요 🎉 👩‍👩‍👧‍👦 🇩🇪 2024 3.14159 100,000 0xFF user_id camelCase HTTPServer don't I'm we'll THEY'RE it's""".split()


def made_up_text(seed, lines):
    """Sentences, code and numbers in several scripts; the same for the same seed."""
    rng = random.Random(seed)
    # A few syllable words, so that merges of some depth are learned.
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    words = WORDS + ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(1500)]
    for _ in range(lines):
        kind = rng.random()
        some = rng.choices(words, k=rng.randint(3, 14))
        if kind < 0.55:
            line = " ".join(some).capitalize() + rng.choice(".!?") + rng.choice(["", " ", "\n", "\n\n"])
        elif kind < 0.7:
            line = f"    def {some[0]}_{some[1]}({some[2]}):\n\treturn {some[0]} + {rng.randint(0, 99999)}\n"
        elif kind < 0.8:
            line = "".join(some) + "\r\n"
        elif kind < 0.9:
            line = " ".join(str(rng.randint(0, 10 ** rng.randint(1, 9))) for _ in some) + "  "
        else:
            line = ", ".join(w.upper() if rng.random() < 0.5 else w.title() for w in some) + rng.choice([" -- ", "...\n", "   "])
        yield line


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=invert)


def byte_level(use_regex=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def special(*contents):
    return [AddedToken(c, special=True, normalized=False) for c in contents]


def train(tokenizer, vocab_size, alphabet=None, specials=()):
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=list(specials),
                                  initial_alphabet=alphabet or [])
    tokenizer.train_from_iterator(made_up_text(1, 6000), trainer)
    return tokenizer


def byte_level_family(pre_tokenizer, vocab_size, normalizer=None, **model):
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, vocab_size, pre_tokenizers.ByteLevel.alphabet())
    if model:  # what the trainer does not take
        data = json.loads(tokenizer.to_str())
        data["model"].update(model)
        tokenizer = Tokenizer.from_str(json.dumps(data))
    return tokenizer


def qwen():
    t = byte_level_family(pre_tokenizers.Sequence([split(QWEN2), byte_level()]), 1600, normalizers.NFC())
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    t.add_tokens([AddedToken(c, normalized=False) for c in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    return t


def qwen_marks():
    t = byte_level_family(pre_tokenizers.Sequence([split(QWEN_MARKS), byte_level()]), 1200, normalizers.NFC())
    t.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return t


def llama3():
    t = byte_level_family(pre_tokenizers.Sequence([split(LLAMA3), byte_level()]), 1600, ignore_merges=True)
    t.add_special_tokens(special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    bos = t.token_to_id("<|begin_of_text|>")
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B:1",
                                      special_tokens=[("<|begin_of_text|>", bos)])])
    return t


def gpt2():
    t = byte_level_family(byte_level(use_regex=True), 1200)
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=True)])
    return t


def roberta():
    t = byte_level_family(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True), 1000)
    t.add_special_tokens([*special("<s>", "</s>", "<pad>"), AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    t.post_processor = processors.RobertaProcessing(("</s>", t.token_to_id("</s>")), ("<s>", t.token_to_id("<s>")))
    return t


def deepseek():
    t = byte_level_family(pre_tokenizers.Sequence([*map(split, DEEPSEEK), byte_level()]), 1600, normalizers.Sequence([]))
    t.add_special_tokens(special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"))
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=True)])
    bos = t.token_to_id("<｜begin▁of▁sentence｜>")
    t.post_processor = processors.TemplateProcessing(
        single="<｜begin▁of▁sentence｜>:0 $A:0", pair="<｜begin▁of▁sentence｜>:0 $A:0 <｜begin▁of▁sentence｜>:1 $B:1",
        special_tokens=[("<｜begin▁of▁sentence｜>", bos)])
    return t


def gpt_oss():
    t = byte_level_family(pre_tokenizers.Sequence([split(O200K), byte_level()]), 1600, ignore_merges=False)
    t.add_special_tokens(special("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"))
    return t


def smollm():
    t = byte_level_family(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)]), 1200)
    t.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"))
    return t


def removed_inverted():
    """As converters from tiktoken write it: keep what matches. With odd added tokens."""
    t = byte_level_family(pre_tokenizers.Sequence([split(LLAMA3, "removed", True), byte_level()]), 1000)
    t.add_tokens([AddedToken("  ", normalized=False), AddedToken("word", single_word=True), AddedToken("left", lstrip=True),
                  AddedToken("right", rstrip=True, normalized=False), AddedToken("both", lstrip=True, rstrip=True),
                  AddedToken("<<<", normalized=False), AddedToken("<<", normalized=False), AddedToken("été", normalized=True)])
    return t


def sentencepiece(vocab_size, pre_tokenizer, normalizer, **model):
    """A vocabulary as SentencePiece lays it out: specials, bytes, then pieces."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    train(base, vocab_size)
    trained = json.loads(base.to_str())["model"]
    head = ["<unk>", "<s>", "</s>"] + ([f"<0x{b:02X}>" for b in range(256)] if model.get("byte_fallback") else [])
    vocab = {token: i for i, token in enumerate(head)}
    for token in sorted(trained["vocab"], key=trained["vocab"].get):
        vocab.setdefault(token, len(vocab))
    data = json.loads(base.to_str())
    data["model"].update({"vocab": vocab, "merges": trained["merges"], "unk_token": "<unk>", "fuse_unk": True, **model})
    data["pre_tokenizer"] = data["normalizer"] = None
    t = Tokenizer.from_str(json.dumps(data))
    if pre_tokenizer:
        t.pre_tokenizer = pre_tokenizer
    if normalizer:
        t.normalizer = normalizer
    t.add_special_tokens(special("<unk>", "<s>", "</s>"))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    return t


def llama_decoder(strip=True):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1, right=0)] if strip else []))


def llama2():
    t = sentencepiece(1500, None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), byte_fallback=True)
    t.decoder = llama_decoder()
    return t


def mistral():
    t = sentencepiece(1500, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False), None, byte_fallback=True)
    t.decoder = llama_decoder()
    t.add_special_tokens(special("[INST]", "[/INST]"))
    return t


def gemma():
    t = sentencepiece(1500, split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁"), byte_fallback=True)
    t.decoder = llama_decoder(strip=False)
    t.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False), AddedToken("<start_of_turn>", special=True, normalized=False)])
    return t


def metaspace_unknown():
    """No byte fallback: unknown characters become one <unk>."""
    t = sentencepiece(1000, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
                      normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]))
    t.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return t


def normalizer_mix():
    t = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=False, continuing_subword_prefix="##"))
    t.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.NFKC()])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(False)])
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=["[UNK]"], continuing_subword_prefix="##")
    t.train_from_iterator(made_up_text(1, 3000), trainer)
    return t


def bert_style():
    t = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("merged_with_next")])
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, special_tokens=["[UNK]"], end_of_word_suffix="</w>")
    t.train_from_iterator(made_up_text(1, 3000), trainer)
    t.add_tokens(["Zürich", "HTTP"])
    return t


FAMILIES = {f.__name__: f for f in (qwen, qwen_marks, llama3, gpt2, roberta, deepseek, gpt_oss, smollm, removed_inverted, llama2,
                                    mistral, gemma, metaspace_unknown, normalizer_mix, bert_style)}

SCRIPTS = [(0x20, 0x7E), (0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF),
           (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2070, 0x218F),
           (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xA960, 0xA97F), (0xAC00, 0xD7FB), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFFEF),
           (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x2F800, 0x2FA1F), (0xE0000, 0xE01EF), (0xE000, 0xE0FF), (0x0, 0x1F)]
SPACES = " \t\n\r\v\f\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u180e\ufeff"
FRAGMENTS = ["'s", "'S", "'ſ", "'ll", "'LL", "'lL", "'re", "'Ve", "'d", "'", " '", "’s", "e\u0301", "\u0301", "\u0344", "\u1100\u1161\u11a8", "가\u11a8",
             "ﬁ", "½", "①", "Ⅳ", "٣", "१", "𝟙", "ǅ", "ŉ", "ẞ", "İ", "ı", "Σς", "\u0958", "\u2126", "\u212b", "한국", "각", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽",
             "️⃣", "\u200d", "\u202e", "שלום", "العربية", "สวัสดี", "नमस्ते", "ཀྵ", "中文", "日本語テキスト", "カ\u3099", "▁", "▁▁", "Ġ", "Ċ", "<0x0A>", "<0x41>",
             "\x00", "\x7f", "\x80", "\ufffd", "\uffff", "\U0010ffff", "\ufffe", "\u0378", "\u1c89", "\U00010d40", "\U000323af", "\U0001e5d0",
             "<|im_start|>", "<|im_start", "|im_end|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<mask>",
             "<think>", "</think>", "<<<<<", "<<", "word", "left", "right", "both", "[INST]", "<start_of_turn>", "<｜User｜>", "été", "e\u0301te\u0301", "\n\n", "\r\n",
             "\n \n", "  \n\t ", "/\n/\r", "--\n", "http://", "0123456789", "3.14", "1,000", "HTTP", "HTTPServer", "camelCase", "McDonald's", "zürich", "#hello", "$x", " .5"]


def random_text(rng, special_tokens=()):
    """One adversarial string."""
    kind = rng.random()
    if kind < 0.12:
        return "".join(chr(c) for c in (rng.randrange(0x110000) for _ in range(rng.randint(1, 12))) if not 0xD800 <= c <= 0xDFFF)
    if kind < 0.2:
        return rng.choice([rng.choice(FRAGMENTS), chr(rng.randint(32, 126)), chr(rng.choice([0x4e00, 0x1f600, 0x300]) + rng.randint(0, 99))]) * rng.randint(1, 80)
    if kind < 0.26:
        return "".join(rng.choices(SPACES, k=rng.randint(1, 20)))
    if kind < 0.34:  # one script
        low, high = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 40)))
    if kind < 0.38:  # a very long word
        alphabet = rng.choice(["ab", "abcdefghijklmnopqrstuvwxyz", "aA", "é中", "0123456789", "=-"])
        return "".join(rng.choices(alphabet, k=rng.randint(50, 400)))
    parts = []
    for _ in range(rng.randint(1, 25)):
        pick = rng.random()
        if pick < 0.35:
            parts.append(rng.choice(WORDS))
        elif pick < 0.55:
            parts.append(rng.choice(FRAGMENTS))
        elif pick < 0.62 and special_tokens:
            token = rng.choice(special_tokens)
            parts.append(token if rng.random() < 0.6 else token[:rng.randint(1, len(token))])
        elif pick < 0.72:
            parts.append("".join(rng.choices(SPACES[:4] if rng.random() < 0.7 else SPACES, k=rng.randint(1, 4))))
        elif pick < 0.82:
            low, high = rng.choice(SCRIPTS)
            parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6))))
        elif pick < 0.9:
            parts.append(str(rng.randint(0, 10 ** rng.randint(1, 8))))
        else:
            parts.append("".join(rng.choices("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", k=rng.randint(1, 5))))
        if rng.random() < 0.5:
            parts.append(" ")
    return "".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "tests/golden/tokenizers")
    parser.add_argument("--cases", type=int, default=240, help="per family")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    same = 0xFFFFFFFF
    blob = bytearray()
    for number, (name, make) in enumerate(FAMILIES.items()):
        tokenizer = make()
        data = json.loads(tokenizer.to_str())
        # Both spellings of merges are in use.
        if number % 2 == 0:
            data["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")
        tokenizer = Tokenizer.from_file(str(path))
        rng = random.Random(number + 1)
        added = [t["content"] for t in data["added_tokens"]]
        texts = ["", " ", "  ", "\n", "a", "Hello world", " Hello  world ", *FRAGMENTS]
        while len(texts) < args.cases:
            texts.append(random_text(rng, added))
        texts = texts[:args.cases]
        blob += struct.pack("<I", len(texts))
        for text in texts:
            raw = text.encode()
            ids = tokenizer.encode(text).ids
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            blob += struct.pack("<I", len(raw)) + raw
            blob += struct.pack(f"<I{len(ids)}i", len(ids), *ids)
            blob += struct.pack("<I", same) if plain == ids else struct.pack(f"<I{len(plain)}i", len(plain), *plain)
            for skip in (True, False):
                decoded = tokenizer.decode(ids, skip_special_tokens=skip).encode()
                blob += struct.pack("<I", same) if decoded == raw else struct.pack("<I", len(decoded)) + decoded
        print(f"{name}: {tokenizer.get_vocab_size()} tokens, {len(texts)} cases")
    (args.out / "cases.bin").write_bytes(blob)
    (args.out / "families.txt").write_text("".join(f"{name}\n" for name in FAMILIES))


if __name__ == "__main__":
    main()
