#!/usr/bin/env python3
"""Compares our chat templates with Jinja2's, for every template in a folder × a matrix of conversations.

    python tools/check_templates.py --templates DIR [--binary build/release/src/text/chat_template_check]

Equal means the same text, or an error on both sides. Prints every difference and exits with 1 if there
is one. Needs transformers and jinja2.
"""

import argparse
import pathlib
import sys

import template_conversations
import template_oracle


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", required=True, type=pathlib.Path, help="folder of *.jinja files")
    parser.add_argument("--binary", default="build/release/src/text/chat_template_check")
    parser.add_argument("--only", default="", help="part of the names of templates to check")
    parser.add_argument("--show", type=int, default=5, help="differences to print per template")
    options = parser.parse_args()

    checker = template_oracle.Checker(options.binary)
    templates = [path for path in sorted(options.templates.glob("*.jinja")) if options.only in path.name]
    total = errors = differences = 0
    for path in templates:
        source = path.read_text(encoding="utf-8")
        different = failed = count = 0
        for name, case in template_conversations.cases():
            count += 1
            expected, reason = template_oracle.render_chat(source, case)
            text, error = checker.render(source, case)
            failed += expected is None
            if expected == text:
                continue
            different += 1
            if different <= options.show:
                print(f"DIFFERENCE {path.name} {name}\n  Jinja2: {reason or expected!r}\n  ours:   {error or text!r}")
        print(f"{path.name}: {count} cases, {failed} of them errors in Jinja2, {different} different", flush=True)
        total += count
        errors += failed
        differences += different
    print(f"{len(templates)} templates, {total} cases, {errors} of them errors in Jinja2, {differences} different")
    return 1 if differences or not templates else 0


if __name__ == "__main__":
    sys.exit(main())
