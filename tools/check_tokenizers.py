#!/usr/bin/env python3
"""Compares Baton's tokenizer with Hugging Face `tokenizers` on random and adversarial strings.

    cmake --build build/release --target tokenizer_check
    venv/bin/python tools/check_tokenizers.py --binary build/release/src/text/tokenizer_check [--count 100000] [family ...]

Families are those of tests/golden/tokenizers; a path to any tokenizer.json may be named as well.
Compared are: encode with and without special tokens, decode with and without skipping them, and the
joined stream of the incremental detokenizer. Exit status 1 when anything differs.
"""

import argparse
import json
import pathlib
import random
import struct
import subprocess
import sys
import time

import tokenizers
from tokenizers import Tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from make_tokenizer_fixtures import FAMILIES, random_text  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent.parent / "tests/golden/tokenizers"


def run(binary, path, mode, items, item_format, out_format):
    data = bytearray()
    for item in items:
        if item_format == "text":
            raw = item.encode()
            data += struct.pack("<I", len(raw)) + raw
        else:
            data += struct.pack(f"<I{len(item)}i", len(item), *item)
    result = subprocess.run([binary, path, *mode.split()], input=bytes(data), stdout=subprocess.PIPE, check=True).stdout
    out, at = [], 0
    for _ in items:
        (count,) = struct.unpack_from("<I", result, at)
        at += 4
        if count == 0xFFFFFFFF:
            out.append(None)
        elif out_format == "ids":
            out.append(list(struct.unpack_from(f"<{count}i", result, at)))
            at += 4 * count
        else:
            out.append(result[at:at + count])
            at += count
    assert at == len(result)
    return out


def differences(name, what, inputs, expected, got, limit=5):
    wrong = [i for i in range(len(inputs)) if expected[i] != got[i]]
    for i in wrong[:limit]:
        print(f"  {name} {what}: {inputs[i]!r}\n    expected {expected[i]}\n    got      {got[i]}")
    return len(wrong)


def ill_formed_run(tokens):
    """True when a run of byte tokens is no UTF-8: there a stream and the whole differ by design."""
    run_bytes = b""
    for token in [*tokens, None]:
        if token and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            run_bytes += bytes([int(token[3:5], 16)])
            continue
        try:
            run_bytes.decode()
        except UnicodeDecodeError:
            return True
        run_bytes = b""
    return False


def check(binary, name, path, count, seed):
    hf = Tokenizer.from_file(str(path))
    hf.no_truncation()
    hf.no_padding()
    added = [t["content"] for t in json.loads(pathlib.Path(path).read_text())["added_tokens"]]
    rng = random.Random(seed)
    wrong, started = 0, time.time()
    for begin in range(0, count, 10000):
        texts = [random_text(rng, added) for _ in range(min(10000, count - begin))]
        for special in (True, False):
            expected = [e.ids for e in hf.encode_batch(texts, add_special_tokens=special)]
            got = run(binary, path, "encode" if special else "encode no-special", texts, "text", "ids")
            wrong += differences(name, f"encode special={special}", texts, expected, got)
            if special:
                ids = expected
        # Ids of texts, and any ids at all.
        size = hf.get_vocab_size()
        ids = ids[:5000] + [[rng.randrange(size) for _ in range(rng.randint(0, 12))] for _ in range(5000)]
        tokens = [[hf.id_to_token(i) for i in item] for item in ids]
        for skip in (True, False):
            decoded = [d.encode() for d in hf.decode_batch(ids, skip_special_tokens=skip)]
            suffix = "-skip" if skip else ""
            wrong += differences(name, f"decode skip={skip}", ids, decoded, run(binary, path, "decode" + suffix, ids, "ids", "text"))
            comparable = [i for i in range(len(ids)) if not ill_formed_run(tokens[i])]
            wrong += differences(name, f"stream skip={skip}", [ids[i] for i in comparable], [decoded[i] for i in comparable],
                                 run(binary, path, "stream" + suffix, [ids[i] for i in comparable], "ids", "text"))
    print(f"{name}: {count} strings, {wrong} differences ({time.time() - started:.0f} s)", flush=True)
    return wrong


def speed(path, text_file):
    """Hugging Face's encode on one core in CPU time, for comparison with bench/tokenizer_bench."""
    hf = Tokenizer.from_file(path)
    text = pathlib.Path(text_file).read_text()
    times = []
    for _ in range(5):
        started = time.process_time()
        hf.encode(text, add_special_tokens=False)
        times.append(time.process_time() - started)
    size = len(text.encode()) / 1e6
    print(f"{path}: tokenizers {tokenizers.__version__}: encode {size / sorted(times)[2]:.1f} MB/s (first {size / times[0]:.1f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", help="the tokenizer_check executable")
    parser.add_argument("--speed", metavar="TEXT_FILE", help="only measure Hugging Face's encode on this text")
    parser.add_argument("--count", type=int, default=100000, help="strings per family")
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    args = parser.parse_args()
    if args.speed:
        for name in args.families:
            path = GOLDEN / f"{name}.json"
            speed(str(path if path.exists() else name), args.speed)
        return 0
    if not args.binary:
        parser.error("--binary is needed")
    print(f"tokenizers {tokenizers.__version__}")
    wrong = 0
    for name in args.families:
        path = GOLDEN / f"{name}.json"
        wrong += check(args.binary, name, str(path if path.exists() else name), args.count, args.seed)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
