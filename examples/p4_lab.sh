#!/bin/bash
# A P4 switch and two workers on one machine: namespaces, wires, bmv2, `p4 deploy`, `p4 serve`, and 20 steps of training.
#
#   sudo examples/p4_lab.sh        needs simple_switch_grpc, ethtool and trainkit with p4runtime-shell on PATH
#
# Everything that it makes is gone when it ends.
set -eu

for program in simple_switch_grpc trainkit torchrun ethtool ip; do
    command -v "$program" >/dev/null || { echo "p4_lab: $program is not on PATH: docs/how-it-works/p4.md says where it comes from" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "p4_lab: namespaces need root: sudo env PATH=\$PATH $0" >&2; exit 1; }

here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
switch=10.0.0.254
grpc=127.0.0.1:9559

clean_up() {
    jobs -p | xargs -r kill 2>/dev/null || true
    wait 2>/dev/null || true
    ip netns del lab_a 2>/dev/null || true
    ip netns del lab_b 2>/dev/null || true
    rm -rf "$folder"
}
trap clean_up EXIT

# One namespace a worker, one wire each: eth0 inside with the file's MAC and IP, sw1 and sw2 for the switch.
number=0
for name in a b; do
    number=$((number + 1))
    ip netns add "lab_$name"
    ip link add "sw$number" type veth peer name eth0 netns "lab_$name"
    ip link set "sw$number" mtu 1500 up
    ip -n "lab_$name" link set eth0 address "02:00:00:00:00:0$number" mtu 1500 up
    ip -n "lab_$name" link set lo up
    ip -n "lab_$name" address add "10.0.0.$number/24" dev eth0
    # bmv2 forwards frames as they are: nothing may be left to a network card that is not there
    ip netns exec "lab_$name" ethtool -K eth0 tx off tso off gso off >/dev/null
done

cat > "$folder/workers.yaml" <<'FILE'
switch: {ip: 10.0.0.254, mac: "02:00:00:00:00:fe"}
workers:
  - {name: a, mac: "02:00:00:00:00:01", ip: 10.0.0.1, port: 1}
  - {name: b, mac: "02:00:00:00:00:02", ip: 10.0.0.2, port: 2}
sessions:
  - {name: default, workers: [a, b], slots: 16, elements: 256}
FILE

# The switch, its deployment and `serve` run where the gRPC address is: here, not in a worker's namespace.
simple_switch_grpc --no-p4 --device-id 0 -i 1@sw1 -i 2@sw2 -- --grpc-server-addr "$grpc" --cpu-port 510 > "$folder/bmv2.log" 2>&1 &
for _ in $(seq 100); do
    (exec 3<>"/dev/tcp/127.0.0.1/9559") 2>/dev/null && break
    sleep 0.1
done
trainkit p4 deploy "$folder/workers.yaml" --grpc "$grpc"
trainkit p4 serve "$folder/workers.yaml" --grpc "$grpc" &

# Both ranks meet over eth0: torch.distributed by MASTER_ADDR, gloo by the interface's name.
train() {
    ip netns exec "lab_$1" env GLOO_SOCKET_IFNAME=eth0 torchrun --nnodes 2 --node-rank "$2" --nproc-per-node 1 \
        --master-addr 10.0.0.1 --master-port 29500 "$here/switchml_ddp.py" --switch "$switch:48864" --profile core --steps 20
}
train a 0 &
first=$!
train b 1 &
second=$!
wait "$first"
wait "$second"
trainkit p4 status "$folder/workers.yaml" --grpc "$grpc" --election 2
