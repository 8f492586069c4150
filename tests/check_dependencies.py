"""Each folder under src/ may only use the libraries below it (ARCHITECTURE.md). Read from the code's own includes and
from the CMake DEPS, so that neither can drift."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALLOWED = {
    "base": set(),
    "tensor": {"base"},
    "kernels": {"base", "tensor"},
    "kv": {"base"},
    "model": {"base", "tensor", "kernels", "kv"},
    "engine": {"base", "tensor", "kernels", "kv", "model"},
    "transfer": {"base"},
    "protocol": {"base"},
    "worker": {"base", "tensor", "kernels", "kv", "model", "engine", "transfer", "protocol"},
    "text": {"base"},
    "router": {"base", "protocol", "text"},
    "http": {"base", "protocol", "router", "text"},
}
EVERYTHING = set(ALLOWED) | {"ops"}
ALLOWED["ops"] = EVERYTHING - {"ops"}
ALLOWED["main"] = EVERYTHING


def main():
    problems = []
    folders = {p.name for p in (ROOT / "src").iterdir() if p.is_dir()}
    for folder in sorted(folders):
        if folder not in ALLOWED:
            problems.append(f"src/{folder}: a new library; say in tests/check_dependencies.py what it may use")
            continue
        for path in sorted((ROOT / "src" / folder).rglob("*")):
            if path.suffix in (".h", ".cc", ".cu", ".cuh"):
                for number, line in enumerate(path.read_text().splitlines(), 1):
                    match = re.match(r'\s*#include "([a-z_]+)/', line)
                    used = match.group(1) if match else None
                    if used in folders and used != folder and used not in ALLOWED[folder]:
                        problems.append(f"{path.relative_to(ROOT)}:{number}: {folder} may not use {used}")
            elif path.name == "CMakeLists.txt":
                for call in re.findall(r"baton_library\((.*?)\)", path.read_text(), re.S):
                    words = call.split()
                    if "DEPS" in words:
                        deps = words[words.index("DEPS") + 1:]
                        for dep in deps:
                            if dep.isupper():
                                break
                            if dep not in ALLOWED[folder]:
                                problems.append(f"{path.relative_to(ROOT)}: {folder} may not depend on {dep}")
    print("\n".join(problems) if problems else f"{len(folders)} libraries keep the rule")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
