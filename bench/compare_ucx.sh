#!/bin/sh
# baton bench transfer beside ucx_perftest: same transport, same block sizes, same minute.
#
#   bench/compare_ucx.sh [shm|tcp] [BATON]
#
# ucp_put_bw sends one buffer over and over: up to some MiB it never leaves the caches. So ours is shown twice: "hot", with pools of
# 4 MiB (or two blocks) that stay in the caches, too, and "cold", scattered blocks of pools of 512 MiB, which is what a KV cache is.
# UCX's figure is one-sided put with local completion and a flush at the end; ours waits for every transfer's delivery.
set -eu
transport=${1:-shm}
baton=${2:-build/release/baton}
port=${PORT:-13471}
command -v ucx_perftest >/dev/null || { echo "ucx_perftest is not installed (apt: ucx-utils)" >&2; exit 2; }
case $transport in
  shm) tls=${UCX_TLS:-sm} ;;
  tcp) tls=${UCX_TLS:-tcp} ;;
  *) echo "usage: $0 [shm|tcp] [BATON]" >&2; exit 2 ;;
esac

ucx() {  # ucx BYTES ITERATIONS: GB/s
  UCX_TLS=$tls timeout 60 ucx_perftest -p "$port" >/dev/null 2>&1 &
  server=$!
  result=""
  for attempt in 1 2 3 4 5 6 7 8 9 10; do
    sleep 0.2
    result=$(UCX_TLS=$tls timeout 60 ucx_perftest 127.0.0.1 -p "$port" -t ucp_put_bw -s "$1" -n "$2" -w $(($2 / 10 + 1)) -f 2>/dev/null |
      awk 'NF >= 8 && $1 + 0 > 0 { printf "%.2f", $6 * 1.048576e-3 }') || true
    [ -n "$result" ] && break
  done
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  echo "${result:-failed}"
}

ours() {  # ours BLOCK_BYTES BLOCKS POOL_BYTES: GB/s
  "$baton" --log-level error bench transfer --transport "$transport" --block-bytes "$1" --blocks "$2" --pool-bytes "$3" --runs 9 --pings 0 \
    --no-baseline --quiet | awk '/^scattered/ { print $5 }'
}

echo "$transport, GB/s; $(ucx_info -v 2>/dev/null | head -1 | tr -d '#'), UCX_TLS=$tls, ucp_put_bw"
printf '%10s %10s %12s %12s\n' block UCX "baton, hot" "baton, cold"
for kib in 4 16 64 256 1024 4096 16384 65536; do
  bytes=$((kib * 1024))
  iterations=$((2147483648 / bytes)); [ $iterations -gt 50000 ] && iterations=50000
  hot_pool=4194304; [ $bytes -gt 2097152 ] && hot_pool=$((2 * bytes))
  hot_blocks=$((hot_pool / bytes)); [ $hot_blocks -gt 256 ] && hot_blocks=256
  cold_blocks=$((33554432 / bytes)); [ $cold_blocks -lt 1 ] && cold_blocks=1
  printf '%7d Ki %10s %12s %12s\n' "$kib" "$(ucx $bytes $iterations)" "$(ours $bytes $hot_blocks $hot_pool)" \
    "$(ours $bytes $cold_blocks 536870912)"
done
