#!/bin/bash
# Moves a server to another site by hand: checkpoint it, copy the images, restore it, point the route there. Both sites
# hold the server's address, so that its connections can go on.
#
# What is ready before the server stops: the receiver of the images, CRIU's cache of the kernel's features, folders in
# memory. What keeps connections alive: CRIU's firewall rules at the source, which stay until clients' packets go to the
# target; without them the kernel there would answer with resets.
export LC_ALL=C
set -Eeuo pipefail

# At a site, which is a process there.
at() {
    local host=$1
    shift
    taskset --cpu-list "$SITE_PROCESSORS" nsenter --target "$host" --net --mount --pid -- "$@"
}

# Says when a step begins.
step() {
    echo "step $1 $EPOCHREALTIME"
}

# After a checkpoint CRIU's rules are left behind; they would be in the way of the way back.
unlock() {
    at "$1" nft list tables | while read -r _ family table; do
        case $table in CRIU-*) at "$1" nft delete table "$family" "$table" ;; esac
    done
}

listens() {
    at "$TO" grep -q ":$(printf %04X "$COPY_PORT") 0*:0000 0A " /proc/net/tcp
}

# Says what CRIU has to say, and ends what waits for images at the target, whose processes are its own.
give_up() {
    grep -hs Error "$FROM_FILES"/work/*.log "$TO_FILES"/work/*.log | grep -v RLIMIT_NOFILE >&2
    at "$TO" pkill -x nc
    exit 1
}
trap 'set +e; give_up' ERR

step prepare
rm -rf "$FROM_FILES/images" "$TO_FILES/images" "$FROM_FILES/work" "$TO_FILES/work"
mkdir -p "$FROM_FILES/images" "$FROM_FILES/work" "$TO_FILES/images" "$TO_FILES/work"
at "$TO" sh -c 'nc -l "$0" "$1" | tar -x -B -b 2048 -C "$2"' "$TO_ADDRESS" "$COPY_PORT" "$TO_FILES/images" &
receiver=$!
until listens; do sleep 0.002; done

step checkpoint
case $SYSTEM in
script)
    at "$FROM" criu dump --tree "$SERVER_PID" --images-dir "$FROM_FILES/images" --work-dir "$FROM_FILES/work" \
        --tcp-established --network-lock nftables --log-file dump.log
    ;;
runc)
    # The network lock is in CRIU's configuration file: runc has no flag for it.
    at "$FROM" runc --root "$FROM_FILES/root" checkpoint --tcp-established \
        --image-path "$FROM_FILES/images" --work-path "$FROM_FILES/work" server
    ;;
esac

step copy
at "$FROM" sh -c 'tar -c -b 2048 -C "$0" . | nc -N "$1" "$2"' "$FROM_FILES/images" "$TO_ADDRESS" "$COPY_PORT"
wait "$receiver"

step restore
case $SYSTEM in
script)
    at "$TO" criu restore --restore-detached --images-dir "$TO_FILES/images" --work-dir "$TO_FILES/work" \
        --tcp-established --log-file restore.log
    ;;
runc)
    at "$TO" runc --root "$TO_FILES/root" restore --detach --no-pivot --tcp-established --bundle "$TO_FILES/bundle" \
        --image-path "$TO_FILES/images" --work-path "$TO_FILES/work" server </dev/null >/dev/null
    ;;
esac

step route
ip -n "$ROUTER" route replace "$SERVER_ADDRESS" via "$TO_ADDRESS"
unlock "$FROM"
rm -rf "$FROM_FILES/images" "$TO_FILES/images"
step end
