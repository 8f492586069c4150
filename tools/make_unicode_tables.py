#!/usr/bin/env python3
"""Writes src/text/unicode_tables.inc: what Hugging Face `tokenizers` knows of Unicode.

A tokenizer's result depends on the Unicode version of each library inside it, and `tokenizers` has
several: Oniguruma's for regular expressions, Rust's standard library for digits and white space,
older crates for normalization and punctuation. The tables are therefore asked from `tokenizers`
itself, code point by code point, and do not change with the distribution that Baton runs on.

    python3 -m venv venv && venv/bin/pip install tokenizers
    venv/bin/python tools/make_unicode_tables.py [--out src/text/unicode_tables.inc]
"""

import argparse
import pathlib
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

ALL = [cp for cp in range(0x110000) if not 0xD800 <= cp <= 0xDFFF]
TEXT = "".join(map(chr, ALL))
CATEGORIES = "Cn Cc Cf Co Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp".split()

# Bits above the category (5 bits); the order is that of CharFlag in unicode.h.
FLAGS = ["kRegexSpace", "kRegexWord", "kRustNumeric", "kRustSpace", "kRustWord", "kPunctuation",
         "kCombiningMark", "kBertControl", "kBertMark", "kStandIn"]


def matching(pattern):
    """Indices into ALL that Oniguruma's class matches."""
    split = pre_tokenizers.Split(Regex(f"{pattern}+"), behavior="removed", invert=True)
    out = set()
    for _, (begin, end) in split.pre_tokenize_str(TEXT):
        out.update(range(begin, end))
    return out


def alternating(pre_tokenizer):
    """For one that cuts into runs of (not, is, not, is, ...), beginning with NUL, which is not."""
    out, inside, expected = set(), False, 0
    for _, (begin, end) in pre_tokenizer.pre_tokenize_str(TEXT):
        assert begin == expected
        if inside:
            out.update(range(begin, end))
        inside, expected = not inside, end
    return out


def removed_by(normalizer):
    out = set()
    for at in range(0, len(ALL), 4096):
        left = set(normalizer.normalize_str("".join(map(chr, ALL[at:at + 4096]))))
        out.update(i for i in range(at, min(at + 4096, len(ALL))) if chr(ALL[i]) not in left)
    return out


def rust_words():
    """\\w of Rust's regex crate: 'a' and the character are one piece."""
    split, out = pre_tokenizers.Whitespace(), set()
    for at in range(0, len(ALL), 4096):
        part = ALL[at:at + 4096]
        pieces = split.pre_tokenize_str("".join(f" a{chr(cp)}" for cp in part))
        out.update(at + begin // 3 for _, (begin, end) in pieces if begin % 3 == 1 and end - begin == 2)
    return out


def combining_classes(nfd):
    references = {}
    for cp in ALL:
        if (ccc := unicodedata.combining(chr(cp))) and ccc not in references and nfd(chr(cp)) == chr(cp):
            references[ccc] = chr(cp)
    low, high = references[1], references[240]
    out = {}
    for cp in ALL:
        x = chr(cp)
        if nfd(x) != x or (nfd(x + low) == x + low and nfd(high + x) == high + x and x != low and x != high):
            continue
        # The class for which neither order of (x, reference) is changed, among those not zero.
        for ccc, reference in references.items():
            if nfd(x + reference) == x + reference and nfd(reference + x) == reference + x:
                out[cp] = ccc
                break
        else:
            raise AssertionError(hex(cp))
    # A starter never moves, so it looks equal to every class; the first test let only x with ccc 1
    # or 240 pass besides real marks, and U+0334 and U+0345 themselves are marks.
    return out


def stand_ins(value):
    """PCRE2 10.42 (Debian 12, Ubuntu 24.04) knows Unicode 14, Oniguruma in `tokenizers` a later one.

    For every code point that Unicode 14 (this Python's unicodedata) sees differently: one of the same
    category, script (Han or not), word property and UTF-8 length that both agree on. Baton's PCRE2
    path matches a text with these in place, so its offsets are Oniguruma's.
    """
    assert unicodedata.unidata_version == "14.0.0", "run this with Python 3.11"
    han = matching(r"\p{Han}")
    differ, agree, out = set(), {}, []
    for i, cp in enumerate(ALL):
        name = CATEGORIES[value[i] & 31]
        key = (name, len(chr(cp).encode()), i in han, bool(value[i] & 64))
        if unicodedata.category(chr(cp)) != name:
            differ.add(i)
            out.append((cp, key))
        elif cp >= 0x80:
            agree.setdefault(key, cp)
    ranges = []
    for cp, key in out:
        if ranges and ranges[-1][1] == cp - 1 and ranges[-1][2] == agree[key]:
            ranges[-1][1] = cp
        else:
            ranges.append([cp, cp, agree[key]])
    return differ, ranges


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent.parent / "src/text/unicode_tables.inc")
    args = parser.parse_args()

    value = [0] * len(ALL)
    for number, name in enumerate(CATEGORIES):
        if name != "Cn":
            for i in matching(rf"\p{{{name}}}"):
                assert value[i] == 0, (name, hex(ALL[i]))
                value[i] = number
    bert_clean = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False)
    bert_strip = normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False)
    nfd, nfkd, nfc = (n().normalize_str for n in (normalizers.NFD, normalizers.NFKD, normalizers.NFC))
    whole = {i for i, cp in enumerate(ALL) if nfd(chr(cp)) == chr(cp)}
    everything = set(range(len(ALL)))
    not_space = set()
    for _, (begin, end) in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(TEXT):
        not_space.update(range(begin, end))
    # Spaces become U+0020 in BERT's cleaning: they leave, but not as control characters.
    bert_spaces = {i for i in everything if bert_clean.normalize_str(chr(ALL[i])) == " "}
    sets = [matching(r"\s"), matching(r"\w"), alternating(pre_tokenizers.Digits(individual_digits=False)),
            everything - not_space, rust_words(), alternating(pre_tokenizers.Punctuation("contiguous")),
            removed_by(normalizers.StripAccents()), removed_by(bert_clean) - bert_spaces,
            {i for i in whole if bert_strip.normalize_str(chr(ALL[i])) == ""}]
    for bit, members in enumerate(sets):
        for i in members:
            value[i] |= 1 << (5 + bit)

    differ, stand_in_ranges = stand_ins(value)
    unassigned = {i for i, cp in enumerate(ALL) if cp >= 0x800 and value[i] & 31 == 0}
    for i in differ | unassigned:
        value[i] |= 1 << (5 + FLAGS.index("kStandIn"))

    out = [f"// Generated by tools/make_unicode_tables.py from tokenizers {tokenizers.__version__}; do not edit.",
           "// Derived from the Unicode Character Database, (c) Unicode, Inc., Unicode License v3.", ""]

    def array(kind, name, items, comment):
        out.append(f"// {comment}")
        out.append(f"constexpr {kind} {name}[] = {{")
        line = ""
        for item in items:
            if len(line) + len(item) > 110:
                out.append(line)
                line = ""
            line += item + ","
        out.extend([line, "};", ""])

    ranges, last, previous = [], None, -1
    for i, cp in enumerate(ALL):
        if value[i] != last:
            ranges.append(f"{{0x{cp:X},{value[i]}}}")
            last = value[i]
    array("CharRange", "kCharRanges", ranges, "first code point, category | flags << 5; up to the next entry")

    array("StandIn", "kStandIns", [f"{{0x{a:X},0x{b:X},0x{c:X}}}" for a, b, c in stand_in_ranges],
          "first, last, a code point of the same properties that Unicode 14 has")

    decompositions = []
    for cp in ALL:
        c = chr(cp)
        if 0xAC00 <= cp <= 0xD7A3:
            continue
        canonical, compatible = nfd(c), nfkd(c)
        for kind, text in ((0, canonical), (1, compatible)):
            if text != c and not (kind == 1 and compatible == canonical):
                decompositions.append((kind, cp, text))
    pool = "".join(text for _, _, text in decompositions)
    entries, at = [], 0
    for kind, cp, text in decompositions:
        entries.append((cp, kind, at, len(text)))
        at += len(text)
    array("char32_t", "kDecompositionPool", [f"0x{ord(c):X}" for c in pool], "full decompositions, one after another")
    for kind, name in ((0, "kCanonical"), (1, "kCompatible")):
        array("Decomposition", name, [f"{{0x{cp:X},{at},{n}}}" for cp, k, at, n in entries if k == kind],
              "code point, place in the pool, length; compatible only where it differs from canonical")

    pairs = []
    for kind, cp, text in decompositions:
        if kind == 0 and len(text) >= 2:
            first = nfc(text[:-1])
            if len(first) == 1 and nfc(first + text[-1]) == chr(cp):
                pairs.append((ord(first), ord(text[-1]), cp))
    array("Composition", "kCompositions", [f"{{0x{a:X},0x{b:X},0x{c:X}}}" for a, b, c in sorted(pairs)],
          "first, second, composed; sorted")

    array("CombiningClass", "kCombiningClasses", [f"{{0x{cp:X},{ccc}}}" for cp, ccc in sorted(combining_classes(nfd).items())],
          "code point, canonical combining class where it is not 0")

    lower = normalizers.Lowercase().normalize_str
    mapping = []
    for cp in ALL:
        text = lower(chr(cp))
        if text != chr(cp):
            assert len(text) <= 2
            mapping.append(f"{{0x{cp:X},0x{ord(text[0]):X},0x{ord(text[1]) if len(text) > 1 else 0:X}}}")
    array("Lower", "kLower", mapping, "code point, its lower case (one or two code points)")

    args.out.write_text("\n".join(out))
    print(f"{args.out}: {len(ranges)} ranges, {len(decompositions)} decompositions, {len(pairs)} compositions")


if __name__ == "__main__":
    main()
