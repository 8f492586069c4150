#!/usr/bin/env python3
"""Writes every fixture under tests/golden from its reference implementation.

    python3 -m venv v && v/bin/pip install torch transformers tokenizers safetensors jinja2
    v/bin/python tools/make_fixtures.py            # all of them
    v/bin/python tools/make_fixtures.py model      # one family

Each family is a script of its own beside this one (make_<family>_fixtures.py) and can be run alone. What they
write is committed: the tests need no Python package. Everything is seeded; a run on the same versions gives the
same bytes.
"""
import argparse
import pathlib
import subprocess
import sys

TOOLS = pathlib.Path(__file__).resolve().parent


def families() -> list[str]:
    return sorted(path.name[len("make_"):-len("_fixtures.py")] for path in TOOLS.glob("make_*_fixtures.py"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(families())}; all when none is named")
    wanted = parser.parse_args().family or families()
    for family in wanted:
        if family not in families():
            parser.error(f"no such family: {family}; there are {', '.join(families())}")
    for family in wanted:
        print(f"== {family}", flush=True)
        status = subprocess.run([sys.executable, TOOLS / f"make_{family}_fixtures.py"]).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
