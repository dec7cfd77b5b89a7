"""A Ray cluster of several machines on one: `ray start` in namespaces of its own per node, for tests that break things.

Every node has its own network (10.77.0.1, .2, ...; a veth into a bridge), processes, host name, and disk: /tmp,
/dev/shm and `directory` are empty tmpfs mounts which vanish with the node, and only `<directory>/shared` is the same
place on all of them, as over NFS. The rest of the file system (repository, virtual environment) is the host's.

    <directory>/shared    one directory for all nodes and the host; it remains afterwards
               /private   the node's own; where commands start
               /home      $HOME, with .cache/mtc for $MTC_CACHE

The bridge lies in a network namespace too, so nothing of this is visible on the host, two clusters may have the same
addresses, and the host reaches a node only by `run` and `root`. Every namespace is held by a `cat` that reads a pipe
from this process: if this process dies in whatever way, the pipe closes, and the kernel removes all of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

OBJECT_STORE = 150_000_000  # bytes
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc")
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "HF_HUB_OFFLINE": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",  # Ray's own 10 s and 5 failures would take a minute
    "RAY_health_check_failure_threshold": "3",
}

# $1 directory, $2 host name, $3 address. `shared` waits in /mnt while /tmp and `directory`, where it lies, are covered.
# The default route lets Ray find out its own address; the host name must resolve to it for gloo; names of other
# machines fail at once, without a name server.
SETUP = """
mount --bind "$1/shared" /mnt
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mkdir -p "$1"
mount -t tmpfs tmpfs "$1"
mkdir -p "$1/shared" "$1/private" "$1/home"
mount --move /mnt "$1/shared"
echo "$2" > /proc/sys/kernel/hostname
printf '127.0.0.1 localhost\\n%s %s\\n' "$3" "$2" > "$1/home/hosts"
mount --bind "$1/home/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
ip link set lo up
ip address add "$3/24" dev eth0
ip link set eth0 up
ip route add default dev eth0
"""


def available() -> str | None:
    """Why `real_cluster` cannot run here; None if it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    if missing := [name for name in ("ip", "unshare", "nsenter", "setpriv", "mount") if not shutil.which(name)]:
        return f"needs the commands {', '.join(missing)}"
    if any(Path(path).resolve().is_relative_to("/tmp") for path in (__file__, sys.prefix, sys.base_prefix)):
        return "the repository or its virtual environment lies in /tmp, which the nodes do not share"
    trial = "mount -t tmpfs tmpfs /mnt && ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    result = subprocess.run([*UNSHARE, "sh", "-c", trial], capture_output=True, text=True)
    return None if result.returncode == 0 else f"namespaces, mounts or links not permitted: {result.stderr.strip()}"


@contextmanager
def real_cluster(directory: Path, nodes: int = 3, cpus: int = 1, token: str | None = None) -> Iterator[RealCluster]:
    """`nodes` Ray nodes with `cpus` CPUs each (`ray start` takes whole ones), head first; everything dies on exit.

    With a `token`, all nodes have RAY_AUTH_MODE=token and the token in a file; without, RAY_AUTH_MODE=disabled.
    """
    cluster = RealCluster(directory.resolve(), nodes, cpus, token)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


class Namespaces(NamedTuple):
    """A set of namespaces, alive as long as its first process, which takes orphans in and lets none become a zombie."""

    holder: subprocess.Popen[str]
    """`unshare`, the parent of the first process."""
    init: int
    """The first process, PID 1 inside: when it is killed, the kernel kills all others."""

    @classmethod
    def make(cls) -> Namespaces:
        command = [*UNSHARE, "sh", "-c", "echo ready; exec env --ignore-signal=CHLD cat"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        holder = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        if not holder.stdout or holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespaces here: {available()}")
        return cls(holder, int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()))

    def enter(self, *command: str, directory: Path | str = "/") -> list[str]:
        """The command line that runs `command` inside; killed there too if the process outside is killed."""
        options = ["--mount", "--net", "--pid", "--uts", "--ipc", f"--wdns={directory}"]
        return ["nsenter", f"--target={self.init}", *options, "--", "setpriv", "--pdeathsig=KILL", "--", *command]

    def kill(self) -> None:
        if self.holder.poll() is None:
            os.kill(self.init, signal.SIGKILL)
            self.holder.wait()  # the first process ends after all others
        for pipe in (self.holder.stdin, self.holder.stdout):
            if pipe:
                pipe.close()


class RealCluster:
    """What `real_cluster` yields. Nodes have numbers; 0 is the head."""

    def __init__(self, directory: Path, nodes: int, cpus: int, token: str | None) -> None:
        self.directory, self.cpus, self.token = directory, cpus, token
        self.addresses = [f"10.77.0.{number + 1}" for number in range(nodes)]
        self.shared, self.private, self.home = (directory / name for name in ("shared", "private", "home"))
        self.environment = ENVIRONMENT | {"HOME": str(self.home), "MTC_CACHE": str(self.home / ".cache/mtc")}
        self.environment["RAY_AUTH_MODE"] = "token" if token else "disabled"
        if token:
            self.environment["RAY_AUTH_TOKEN_PATH"] = str(self.home / "token")
        self._switch: Namespaces | None = None
        self._nodes: dict[int, Namespaces] = {}

    def start(self) -> None:
        self.shared.mkdir(parents=True, exist_ok=True)
        self._switch = Namespaces.make()
        self._link("add", "bridge", "type", "bridge")
        self._link("set", "bridge", "up")
        self.start_node(0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start_node, range(1, len(self.addresses))))

    def close(self) -> None:
        for namespaces in [*self._nodes.values(), self._switch]:
            if namespaces:
                namespaces.kill()

    def popen(
        self, command: list[str], node: int = 0, env: Mapping[str, str | None] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Starts `command` on a node, in its private directory. A value of None in `env` unsets a variable.

        `.kill()` kills the command too, not what it has started; `.pid` is that of `nsenter`, outside the node.
        """
        line = self._nodes[node].enter(*command, directory=self.private)
        return subprocess.Popen(line, env=self._environment(env), text=True, **options)

    def run(
        self,
        command: list[str],
        node: int = 0,
        env: Mapping[str, str | None] | None = None,
        timeout: float = 120,
        check: bool = False,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """`subprocess.run` on a node, in its private directory, output captured as text; `env` as for `popen`."""
        line = self._nodes[node].enter(*command, directory=self.private)
        options = {"capture_output": True, "text": True, **options}
        return subprocess.run(line, env=self._environment(env), timeout=timeout, check=check, **options)

    def root(self, node: int) -> Path:
        """The node's files seen from the host, for instance `root(1) / "tmp/ray"` (an absolute link leads astray)."""
        return Path(f"/proc/{self._nodes[node].init}/root")

    def pids(self, node: int) -> list[int]:
        """The node's processes, numbered as on the host; the first one (see `Namespaces`) and `nsenter` left out.

        Inside, processes have other numbers: for one from Ray or `os.getpid()` use `run(["kill", "-9", pid], node)`.
        """
        init = self._nodes[node].init
        own, found = os.readlink(f"/proc/{init}/ns/pid"), []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if os.readlink(entry / "ns/pid") == own and int(entry.name) != init:
                    found.append(int(entry.name))
        return found

    def kill_node(self, node: int) -> None:
        """SIGKILL to every process at once; its disk is lost. The kernel still closes its connections: `cut` first to
        leave the peers in the dark, as a power cut does."""
        self._nodes[node].kill()

    def start_node(self, node: int) -> None:
        """An empty machine with the address of `node`, joined to the cluster; kills what is left of an earlier one.

        Starting the head again makes a new cluster: the other nodes have to be started again after it.
        """
        if node in self._nodes:
            self.kill_node(node)
            subprocess.run(self._ip("link", "delete", f"node{node}"), stderr=subprocess.DEVNULL)
        address = self.addresses[node]
        namespaces = self._nodes[node] = Namespaces.make()
        self._link("add", f"node{node}", "type", "veth", "peer", "name", "eth0", "netns", str(namespaces.init))
        self._link("set", f"node{node}", "master", "bridge", "up")
        _checked(namespaces.enter("sh", "-ec", SETUP, "setup", str(self.directory), f"node{node}", address))
        if self.token:
            path = self.root(node) / str(self.home / "token").lstrip("/")
            path.touch(mode=0o600)
            path.write_text(self.token)
        command = ["ray", "start", "--disable-usage-stats", f"--node-ip-address={address}", f"--num-cpus={self.cpus}"]
        command += [f"--object-store-memory={OBJECT_STORE}", "--temp-dir=/tmp/ray"]
        command += ["--head", "--dashboard-host=0.0.0.0"] if node == 0 else [f"--address={self.addresses[0]}:6379"]
        _checked(namespaces.enter(*command, directory=self.private), env=self._environment())

    def cut(self, node: int) -> None:
        """Takes the node off the network; it goes on alone. Ray declares it dead after about 18 s."""
        self._link("set", f"node{node}", "down")

    def mend(self, node: int) -> None:
        """Undoes `cut`, within a second or two. If Ray had declared the node dead, its raylet now ends itself, and only
        `start_node` brings it back."""
        self._link("set", f"node{node}", "up")

    def _environment(self, env: Mapping[str, str | None] | None = None) -> dict[str, str]:
        return {name: value for name, value in {**self.environment, **(env or {})}.items() if value is not None}

    def _ip(self, *words: str) -> list[str]:
        """`ip` in the bridge's network, but with the host's process numbers."""
        assert self._switch
        return ["nsenter", f"--target={self._switch.init}", "--net", "ip", *words]

    def _link(self, *words: str) -> None:
        _checked(self._ip("link", *words))


def _checked(command: list[str], env: dict[str, str] | None = None) -> None:
    """Runs a command; its output is in the error."""
    result = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
