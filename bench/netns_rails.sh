#!/usr/bin/env bash
# Two hosts with several NICs, made of two network namespaces and a veth pair per rail, each with its own rate. Runs a
# command in both; needs root, iproute2 and a kernel with tbf (and nft for --loss). Everything goes away at the end.
#
#   netns_rails.sh [--rates 1000,1000,1000,1000] [--cut RAIL:AFTER_S[:BACK_AFTER_S]]... [--loss RAIL:PERCENT]... \
#                  -- COMMAND_OF_A -- COMMAND_OF_B
#
#   --rates  Mbit/s of each rail, both directions; 0: as fast as it goes. Default: one rail, 1000
#   --cut    that long after both commands have started the rail goes down, and comes back when told so
#   --loss   that share of packets is lost, both directions
#
# The commands are given to `bash -c` and find: LOCAL_IPS and REMOTE_IPS (comma-separated, 10.77.<rail>.1 and .2), LOCAL_IP
# and REMOTE_IP (of rail 0), RAILS, SIDE (a or b), SHARED_DIR (empty at first; for files that both need). The status is that
# of the first command that failed; the other one is then ended.
#
#   netns_rails.sh --rates 400,400,400,100 -- 'receiver --bind $LOCAL_IPS' -- 'sender $REMOTE_IP'
set -euo pipefail

rates=1000
cuts=()
losses=()
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  [ $# -ge 2 ] || usage
  case $1 in
    --rates) rates=$2 ;;
    --cut) cuts+=("$2") ;;
    --loss) losses+=("$2") ;;
    *) usage ;;
  esac
  shift 2
done
[ $# -eq 4 ] && [ "$1" = -- ] && [ "$3" = -- ] || usage
command_a=$2
command_b=$4
[ "$(id -u)" = 0 ] || { echo "network namespaces need root" >&2; exit 77; }
if [ ${#losses[@]} -gt 0 ] && ! command -v nft > /dev/null; then echo "--loss needs nft (package nftables)" >&2; exit 77; fi

IFS=, read -r -a rate <<< "$rates"
a=baton-a-$$
b=baton-b-$$
shared=$(mktemp -d)
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2> /dev/null || true; done
  ip netns del "$a" 2> /dev/null || true  # takes its ends of the pairs with it
  ip netns del "$b" 2> /dev/null || true
  rm -rf "$shared"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

ip netns add "$a" 2> /dev/null || { echo "this container may not make network namespaces" >&2; exit 77; }
ip netns add "$b"
ips_a=()
ips_b=()
for i in "${!rate[@]}"; do
  ip link add "rail$i" netns "$a" type veth peer name "rail$i" netns "$b"
  for side in a b; do
    ns=${!side}
    [ $side = a ] && ip=10.77.$i.1 || ip=10.77.$i.2
    ip -n "$ns" addr add "$ip/24" dev "rail$i"
    ip -n "$ns" link set "rail$i" up
    if [ "${rate[i]}" != 0 ]; then
      # A bucket of 4 ms, and never less than a few of the 64 KiB packets that TCP hands to veth.
      burst=$(( rate[i] * 1000 * 1000 / 8 / 250 ))
      [ "$burst" -ge 262144 ] || burst=262144
      tc -n "$ns" qdisc add dev "rail$i" root tbf rate "${rate[i]}mbit" burst "$burst" latency 20ms
    fi
  done
  ips_a+=("10.77.$i.1")
  ips_b+=("10.77.$i.2")
done
ip -n "$a" link set lo up
ip -n "$b" link set lo up
for loss in "${losses[@]}"; do
  IFS=: read -r rail percent <<< "$loss"
  for ns in "$a" "$b"; do
    ip netns exec "$ns" nft -f - << RULES
table inet loss$rail {
  chain input { type filter hook input priority 0; iifname rail$rail numgen random mod 1000 < $(awk "BEGIN {print int($percent * 10)}") drop; }
}
RULES
  done
done

join() { local IFS=,; echo "$*"; }
start() {  # namespace, side, own addresses, the other's, command: in a session of its own, so that all of it can be ended
  setsid ip netns exec "$1" env SIDE="$2" LOCAL_IPS="$3" REMOTE_IPS="$4" LOCAL_IP="${3%%,*}" REMOTE_IP="${4%%,*}" \
    RAILS="${#rate[@]}" SHARED_DIR="$shared" bash -c "$5" &
  pids+=($!)
}
start "$a" a "$(join "${ips_a[@]}")" "$(join "${ips_b[@]}")" "$command_a"
start "$b" b "$(join "${ips_b[@]}")" "$(join "${ips_a[@]}")" "$command_b"

for cut in "${cuts[@]}"; do
  IFS=: read -r rail after back <<< "$cut"
  setsid bash -c "sleep $after; ip -n $a link set rail$rail down; echo 'netns_rails: rail $rail is down' >&2
    if [ -n '$back' ]; then sleep $back; ip -n $a link set rail$rail up; echo 'netns_rails: rail $rail is back' >&2; fi" &
  pids+=($!)
done

status=0
wait -n -p ended "${pids[0]}" "${pids[1]}" || status=$?
if [ $status = 0 ]; then
  for pid in "${pids[0]}" "${pids[1]}"; do
    if [ "$pid" != "$ended" ]; then wait "$pid" || status=$?; fi
  done
fi
exit $status
