#!/usr/bin/env python3
"""Writes the template fixtures in tests/golden/templates with Jinja2 as the oracle.

    python tools/make_template_fixtures.py [--binary build/release/src/text/chat_template_check]

micro.jsonl: a first line {"context": ...}, then {"template", "expected"} or {"template", "error"} (Jinja2's
words, for people: only that there is an error is compared). chats.jsonl: {"name", inputs as JSON texts}, then
{"template": file, "name", "expected" or "error"}. With --binary our renderings are compared at once. Needs transformers and jinja2.
"""

import argparse
import json
import pathlib
import sys

import template_conversations
import template_micro_cases
import template_oracle

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "templates"


def line(value):
    return json.dumps(value, ensure_ascii=False) + "\n"


def answer(text, error):
    return {"expected": text} if error is None else {"error": error}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", help="compare with this chat_template_check")
    options = parser.parse_args()
    checker = template_oracle.Checker(options.binary) if options.binary else None
    differences = 0

    def compare(name, template, case, text):
        nonlocal differences
        if checker is None:
            return
        ours, error = checker.render(template, case)
        if ours != text:
            differences += 1
            print(f"DIFFERENCE {name}\n  Jinja2: {text!r}\n  ours:   {error or ours!r}")

    micro = 0
    with open(FOLDER / "micro.jsonl", "w", encoding="utf-8") as out:
        out.write(line({"context": template_micro_cases.CONTEXT, "now": template_oracle.NOW}))
        for template in template_micro_cases.micro_cases():
            text, error = template_oracle.render_plain(template, dict(template_micro_cases.CONTEXT))
            if text is not None and " at 0x" in text:
                continue  # an address in memory
            out.write(line({"template": template, **answer(text, error)}))
            compare(repr(template), template, {"extra": template_micro_cases.CONTEXT}, text)
            micro += 1

    chats = 0
    with open(FOLDER / "chats.jsonl", "w", encoding="utf-8") as out:
        out.write(line({"now": template_oracle.NOW}))
        cases = []
        for number, (name, case) in enumerate(template_conversations.cases()):
            # Each conversation with each setting once, and the plain ones with and without prompt.
            if "/plain/" in name or number % 2 == 1:
                cases.append((name, case))
        for name, case in cases:
            texts = {key: json.dumps(case[key], ensure_ascii=False) if case[key] is not None else "" for key in ("messages", "tools", "extra")}
            out.write(line({"name": name, **texts, "add_generation_prompt": case["add_generation_prompt"]}))
        for path in sorted(FOLDER.glob("*.jinja")):
            source = path.read_text(encoding="utf-8")
            for name, case in cases:
                text, error = template_oracle.render_chat(source, case)
                out.write(line({"template": path.name, "name": name, **answer(text, error)}))
                compare(f"{path.name} {name}", source, case, text)
                chats += 1
    print(f"{micro} micro cases, {chats} chats, {differences} different")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
