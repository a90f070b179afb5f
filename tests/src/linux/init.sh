#!/bin/sh
# The first process of a Linux peer. Brings the network and the RoCE device up, then runs the commands that come in over
# the second serial port:
#     run ID BASE64       answers "started ID", later lines "data ID BASE64" and "done ID STATUS"
#     kill ID             kills what ID started
# Settings come as variables from the kernel's command line: v4, v6 (with prefix lengths), mtu, life (seconds).
export PATH=/usr/sbin:/usr/bin:/bin HOME=/
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /run /tmp /jobs
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp

# Nobody may be left to end this guest.
(sleep "$life"; echo "its time is over"; poweroff -f) &

while read -r module; do
    insmod "/modules/$module" || echo "insmod $module: $?"
done </modules/order

ulimit -l unlimited
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
ip link set lo up
ip link set eth0 mtu "$mtu"
ip addr add "$v4" dev eth0
ip addr add "$v6" dev eth0 nodad
ip link set eth0 up
rdma link add rxe0 type rxe netdev eth0 || echo "rdma link add: $?"

stty -F /dev/ttyS1 raw -echo
exec 4<>/dev/ttyS1
# Jobs end at the same time: lines that are shorter than a pipe's buffer stay whole in a pipe.
mkfifo /run/answers
exec 3<>/run/answers
cat <&3 >&4 &

# job ID: runs /jobs/ID.sh and tells.
job() {
    setsid /bin/sh "/jobs/$1.sh" >"/jobs/$1.out" 2>&1 </dev/null 3>&- 4>&- &
    echo $! >"/jobs/$1.pid"
    echo "started $1" >&3
    wait $!
    status=$?
    base64 -w 2000 "/jobs/$1.out" | while read -r line || [ -n "$line" ]; do echo "data $1 $line"; done >&3
    echo "done $1 $status" >&3
}

cat /sys/class/infiniband/rxe0/ports/1/state && echo "ready" >&3
while read -r verb id text <&4; do
    case $verb in
    run) echo "$text" | base64 -d >"/jobs/$id.sh" && job "$id" & ;;
    kill) kill -9 "-$(cat "/jobs/$id.pid")" ;;
    esac
done
