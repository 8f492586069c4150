#!/usr/bin/env bash
# Installs the packages of tools/apt-packages.txt, and those named as arguments, that are missing. Says nothing when all are
# there. Without root (and without sudo) it names the missing ones and the command that installs them.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' tools/apt-packages.txt; [ $# = 0 ] || printf '%s\n' "$@")
if ! command -v dpkg-query >/dev/null; then
  echo "This is not a Debian or Ubuntu system. Install the equivalents of:" $wanted >&2
  exit 1
fi
installed=$(dpkg-query -W -f '${db:Status-Abbrev}${Package}\n' 2>/dev/null | sed -n 's/^.i *//p' | sort -u)
missing=$(comm -23 <(sort -u <<<"$wanted") <(echo "$installed"))
[ -z "$missing" ] && exit 0

echo "missing packages:" $missing
if [ "$(id -u)" = 0 ]; then
  sudo=
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  sudo=sudo
else
  echo "You are not root. Run this, then try again:" >&2
  echo "  sudo apt-get install --no-install-recommends" $missing >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing them with apt"
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends $missing >build.apt.log 2>&1 || { cat build.apt.log >&2; exit 1; }
rm -f build.apt.log
