"""Installs the transfer library alone into an empty prefix, builds the examples against that with plain cmake and with
pkg-config, and runs them: what a user of the library does."""

import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(sys.argv[1])
CXX, CC, FLAGS = sys.argv[2], sys.argv[3], sys.argv[4]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def send_and_receive(program, transport):
    receiver = subprocess.Popen([program, "receive", "127.0.0.1", "0", transport], stdout=subprocess.PIPE, text=True)
    try:
        listening = receiver.stdout.readline().split()
        assert listening[:2] == ["listening", "on"], listening
        sent = run(program, "send", "127.0.0.1", listening[3], transport)
        received, _ = receiver.communicate(timeout=120)
        assert receiver.returncode == 0, received
    finally:
        receiver.kill()
        receiver.wait()
    assert "GB/s" in sent and "all right" in received, sent + received
    return sent


def main():
    with tempfile.TemporaryDirectory(prefix="baton-package-") as temporary:
        prefix, build = pathlib.Path(temporary, "moved"), pathlib.Path(temporary, "build")
        # Installed under one name, used under another: nothing in it may know where it was put.
        first = pathlib.Path(temporary, "first")
        run("cmake", "--install", BUILD, "--component", "transfer", "--prefix", first)
        first.rename(prefix)
        for path in prefix.rglob("*"):
            if path.suffix in (".h", ".cmake", ".pc"):
                text = path.read_text()
                assert str(ROOT) not in text and str(first) not in text, f"{path} names a path of the build"
        run("cmake", "-S", ROOT / "examples/transfer", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}",
            f"-DCMAKE_CXX_COMPILER={CXX}", f"-DCMAKE_C_COMPILER={CC}", f"-DCMAKE_CXX_FLAGS={FLAGS}",
            f"-DCMAKE_C_FLAGS={FLAGS}")
        run("cmake", "--build", build, "-j", "2")
        for transport in ("auto", "tcp"):
            print(send_and_receive(build / "send_blocks", transport), end="")
            print(run(build / "send_blocks_c", transport), end="")

        # The C example again, through pkg-config. Sanitizers' flags do no harm to it.
        libdir = next(prefix.rglob("baton-transfer.pc")).parent
        environment = {**os.environ, "PKG_CONFIG_PATH": str(libdir)}
        flags = run("pkg-config", "--cflags", "--libs", "baton-transfer", env=environment).split()
        program = pathlib.Path(temporary, "with_pkg_config")
        source = ROOT / "examples/transfer/send_blocks.c"
        run(CC, *FLAGS.split(), "-std=gnu11", source, "-o", program, *flags)
        run(program)
        print("cmake and pkg-config both find it")


if __name__ == "__main__":
    main()
