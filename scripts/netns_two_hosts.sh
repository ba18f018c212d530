#!/usr/bin/env bash
# Two hosts on one machine, with a slow wire between them: two network namespaces joined by a veth, each end limited by
# tc's token bucket. Runs a torchrun node in each, with all that stands behind --:
#
#   sudo scripts/netns_two_hosts.sh 1gbit 1 -- -m train.main --recipe demo
#   sudo scripts/netns_two_hosts.sh RATE RANKS_PER_HOST -- TORCHRUN_ARGUMENTS…
#
# RATE is tc's, such as 100mbit or 10gbit. What the first host prints goes to stdout, what the second prints to stderr. Needs
# Linux, root (CAP_NET_ADMIN and CAP_SYS_ADMIN), and iproute2. Exits with the first host's code, or 2 if it cannot.
set -euo pipefail

cannot() {
  echo "error: no two hosts here: $1" >&2
  exit 2
}

if [ $# -lt 4 ] || [ "$3" != "--" ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
rate=$1
ranks=$2
shift 3
[ "$(uname -s)" = Linux ] || cannot "network namespaces are Linux's"
for tool in ip tc; do
  command -v "$tool" > /dev/null || cannot "$tool is not installed (Debian: apt-get install iproute2)"
done
[ "$(id -u)" = 0 ] || cannot "making network namespaces takes root: sudo $0 …"

# Interface names have 15 characters at most; the process id keeps two of these apart.
first="ax$$-a" second="ax$$-b"
pids=()
# shellcheck disable=SC2329 # the trap calls it
clean_up() {
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2> /dev/null || true; done
  ip netns del "$first" 2> /dev/null || true
  ip netns del "$second" 2> /dev/null || true
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

ip netns add "$first" || cannot "this root may not make network namespaces (a container without CAP_SYS_ADMIN?)"
ip netns add "$second" || cannot "this root may not make network namespaces"
ip link add "$first" netns "$first" type veth peer name "$second" netns "$second" || cannot "no veth in this kernel"
number=1
for host in "$first" "$second"; do
  ip -n "$host" address add "10.213.0.$number/24" dev "$host"
  ip -n "$host" link set "$host" up
  ip -n "$host" link set lo up
  # A bucket of 512 kB holds a few of the 64 kB pieces that the kernel hands over at once.
  ip netns exec "$host" tc qdisc add dev "$host" root tbf rate "$rate" burst 512kb latency 200ms \
    || cannot "tc took no rate of '$rate', or has no token bucket (sch_tbf)"
  number=$((number + 1))
done

node() { # HOST NODE_RANK TORCHRUN_ARGUMENTS…
  local host=$1 node_rank=$2
  shift 2
  exec ip netns exec "$host" env GLOO_SOCKET_IFNAME="$host" NCCL_SOCKET_IFNAME="$host" NCCL_IB_DISABLE=1 \
    TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" \
    "${PYTHON:-python}" -m torch.distributed.run --nnodes=2 --nproc_per_node="$ranks" --node_rank="$node_rank" \
    --master_addr=10.213.0.1 --master_port=29500 "$@"
}

node "$second" 1 "$@" >&2 &
pids+=($!)
node "$first" 0 "$@" &
pids+=($!)
code=0
wait "${pids[1]}" || code=$?
exit "$code"
