#!/usr/bin/env bash
# Three Ray nodes on one machine, to try what needs several: a head without CPUs at 127.0.0.1, nodes with a CPU each at
# 127.0.0.2 and 127.0.0.3. Runs in the foreground; Ctrl-C stops all of them.
#
#     bash docs/examples/three-nodes.sh DIRECTORY
#
# DIRECTORY gets the token, Ray's files and logs. Its name must be short: sockets lie below it.
set -euo pipefail

directory=$(realpath -m "${1:?usage: three-nodes.sh DIRECTORY}")
port=${PORT:-6380}
dashboard=${DASHBOARD_PORT:-8266}

mkdir -p "$directory"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$directory/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$directory/token" RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

started=()
stop() {
    trap - EXIT INT TERM
    kill "${started[@]}" 2> /dev/null || true # `ray start --block` takes its node down with it
    wait
}
trap stop EXIT
trap 'exit 0' INT TERM

start() { # address, then options: every node has an address and a directory of its own
    local address=$1
    shift
    ray start "$@" --block --node-ip-address="$address" --temp-dir="$directory/${address##*.}" \
        --object-store-memory=200000000 --disable-usage-stats > "$directory/$address.log" 2>&1 &
    started+=($!)
}

nodes() {
    ray status --address="127.0.0.1:$port" 2> /dev/null | grep -c ' node_' || true
}

wait_for() {
    for _ in $(seq 90); do
        [ "$(nodes)" -ge "$1" ] && return
        kill -0 "${started[-1]}" 2> /dev/null || break
        sleep 1
    done
    echo "a node did not start; see the logs in $directory" >&2
    exit 1
}

start 127.0.0.1 --head --port="$port" --num-cpus=0 --dashboard-host=127.0.0.1 --dashboard-port="$dashboard"
wait_for 1
start 127.0.0.2 --address="127.0.0.1:$port" --num-cpus=1
start 127.0.0.3 --address="127.0.0.1:$port" --num-cpus=1
wait_for 3

cat << END
3 nodes. In another shell, in the same environment:

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$directory/token
    export RAY_ADDRESS=127.0.0.1:$port RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard

Ctrl-C stops them.
END
wait
