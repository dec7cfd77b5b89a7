"""Joining a Ray cluster in bounded time: who answers at its address is seen before Ray asks, which asks for ever."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from mtc.errors import MtcError, one_line
from mtc.telemetry import fail

CONNECT_S = 5.0
"""Longest wait for a connection, seconds."""
ANSWER_S = 5.0
"""Longest wait for an answer, seconds."""
LOOK_S = 16.0
"""Longest look at an address, name resolution included, seconds."""
JOIN_S = 30.0
"""Longest time in which Ray may join a cluster whose head has answered, seconds."""
GET_CLUSTER_ID = "/ray.rpc.NodeInfoGcsService/GetClusterId"
WANTED = "give HOST:PORT as `ray start --head` prints it, by default with port 6379"


class AddressError(MtcError):
    """The address is none of a Ray cluster."""


class ClusterUnreachable(MtcError):
    """Nothing of Ray answers at the address now; it may later."""

    exit_code = 1
    event = "failed"


@contextmanager
def joining(address: str, setting: str) -> Iterator[None]:
    """A context for `ray.init(address)`, which may take JOIN_S; `setting` names where the address comes from.

    Raises AddressError and ClusterUnreachable, for what Ray raises too. Where Ray neither joins nor raises, which
    nothing interrupts, the process ends with exit code 1, having said so.
    """
    check_address(address, setting)
    over = threading.Timer(JOIN_S, _give_up, [f"{setting}={address}"])
    over.daemon = True
    over.start()
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        wrong = isinstance(cause, ValueError) or any(word in str(cause) for word in ("ersion mismatch", "AuthToken"))
        raise (AddressError if wrong else ClusterUnreachable)(
            f"{setting}={address}: the cluster can't be joined: {_whole(cause)}"
        ) from error
    finally:
        over.cancel()


def check_address(address: str, setting: str) -> None:
    """Return if the head of a Ray cluster answers at `address`, HOST:PORT, and for `auto` and `local`.

    Raises AddressError if there is something else, ClusterUnreachable if there is nothing, in LOOK_S at most.
    """
    where = f"{setting}={address}"
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):
        raise AddressError(
            f"{where}: Ray Client is not supported, a job's driver runs on a machine of the cluster: {WANTED}, or use "
            "`ray job submit`"
        )
    if "://" in address:
        raise AddressError(
            f"{where}: a URL is no address of a cluster: {WANTED}; a dashboard's URL belongs into "
            "RAY_API_SERVER_ADDRESS, for `ray job submit`"
        )
    parts = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\s:/\[\]]+)):([0-9]{1,5})", address)
    if not parts or not 0 < int(parts[3]) < 65536:
        raise AddressError(f"{where}: not HOST:PORT; {WANTED}")
    host, port = parts[1] or parts[2], int(parts[3])
    error = _in_time(lambda: _look(host, port, address))
    if error is not None:
        raise type(error)(f"{where}: {error}")


def _look(host: str, port: int, target: str) -> MtcError | None:
    """What is wrong with what answers at a port; None if that is Ray's head."""
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except UnicodeError:  # an empty part, one of more than 63 letters
        return AddressError(f"{host!r} is no name of a machine; {WANTED}")
    except socket.gaierror:
        return ClusterUnreachable(f"no machine of the name {host} is known here; {WANTED}")
    except ConnectionRefusedError:
        return ClusterUnreachable(f"nothing listens there (connection refused); {WANTED}")
    except TimeoutError:
        return ClusterUnreachable(f"no answer within {CONNECT_S:g} s, from a machine or a firewall; {WANTED}")
    except OSError as error:
        return ClusterUnreachable(f"{error.strerror or error}; {WANTED}")
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return None  # only Ray has the certificates
    return _ask(target)


def _ask(target: str) -> MtcError | None:
    import grpc  # 0.1 s, of those who join a cluster

    channel = grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)])  # as Ray does
    try:
        channel.unary_unary(GET_CLUSTER_ID)(b"", timeout=ANSWER_S)
    except grpc.RpcError as error:
        code = error.code()
    else:
        return None
    finally:
        channel.close()
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return None  # it is a head; Ray has the token, or says that there is none
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return AddressError(f"another of Ray's ports than its head's, such as Ray Client's 10001; {WANTED}")
    return _http(target)


def _http(target: str) -> MtcError:
    import httpx  # not of those whose head answers

    try:
        answer = httpx.get(f"http://{target}/api/version", timeout=ANSWER_S, trust_env=False)
    except httpx.HTTPError:
        return ClusterUnreachable(
            f"something listens there, but does not answer as a Ray head does within {ANSWER_S:g} s; {WANTED}"
        )
    if "ray_version" in answer.text:
        return AddressError(
            f"the dashboard of a Ray cluster answers there; {WANTED} (http://{target} belongs into "
            "RAY_API_SERVER_ADDRESS, for `ray job submit`)"
        )
    return AddressError(f"an HTTP server answers there, status {answer.status_code}, and no Ray head; {WANTED}")


def _in_time(call: Callable[[], MtcError | None]) -> MtcError | None:
    """What `call` returns, in LOOK_S: resolving a name can't be bounded otherwise."""
    found: Future[MtcError | None] = Future()

    def look() -> None:
        try:
            found.set_result(call())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=look, daemon=True).start()  # an executor's threads would be waited for at the end
    try:
        return found.result(LOOK_S)
    except TimeoutError:
        return ClusterUnreachable(f"no answer within {LOOK_S:g} s; {WANTED}")


def _whole(error: BaseException) -> str:
    """Ray's text as one line; of a mismatch of versions, which has several, all."""
    text = str(error)
    return " ".join(text.split())[:400] if "ersion mismatch" in text else one_line(error)


def _give_up(where: str) -> None:
    fail("failed", f"failed: {where}: the cluster did not let this process join within {JOIN_S:g} s")
    os._exit(1)
