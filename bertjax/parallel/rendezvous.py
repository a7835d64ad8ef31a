"""The processes of a job meet before JAX connects them, to say what is wrong.

JAX's own start ends a process from C++ when a peer is missing, has another
number of processes in mind or has the same number as another one, and does not
say which. Here every process sends its number, their count and its host name
to process 0, on the coordinator's port and before JAX takes it over; process 0
answers all of them the same: go, or what is wrong.
"""

import contextlib
import json
import socket
import time
from typing import Any

_LONGEST = 1 << 20  # bytes of a line
_RETRY_S = 0.2
# An answer that waits for the slowest process arrives this much later.
_SLACK_S = 5.0


class RendezvousError(ValueError):
  """The processes did not come together; the message says who is missing."""


def meet(
  address: str, num_processes: int, process_id: int, timeout_s: float
) -> list[str]:
  """Waits until all processes are there.

  Args:
    address: `host:port` where process 0 listens.
    num_processes: of the job, this one among them.
    process_id: of this process.
    timeout_s: seconds to wait for the others.

  Returns:
    Host names by process.

  Raises:
    RendezvousError: somebody is missing or was told something else.
  """
  me = {
    "process_id": process_id,
    "num_processes": num_processes,
    "host": socket.gethostname(),
  }
  if process_id == 0:
    return _host(address, me, timeout_s)
  return _join(address, me, timeout_s)


def _host(address: str, me: dict[str, Any], timeout_s: float) -> list[str]:
  port = int(address.rpartition(":")[2])
  deadline = time.monotonic() + timeout_s
  with contextlib.ExitStack() as stack:
    try:
      listener = _listen(port)
    except OSError as err:
      raise RendezvousError(
        f"coordinator_address={address!r}: process 0 cannot listen on port"
        f" {port} ({err.strerror}). Another job may use it; choose another"
        " port."
      ) from err
    stack.enter_context(listener)
    met, peers, problem = {0: me}, [], None
    while problem is None and len(met) < me["num_processes"]:
      peer, hello = _next(listener, deadline)
      if peer is None:
        problem = _missing(met, me["num_processes"], timeout_s)
        break
      peers.append(stack.enter_context(peer))
      problem = _wrong(hello, met, me["num_processes"])
      met.setdefault(hello["process_id"], hello)
    hosts = [met[i]["host"] for i in sorted(met)]
    for peer in peers:
      with contextlib.suppress(OSError):
        _send(peer, {"problem": problem, "hosts": hosts})
        peer.settimeout(_SLACK_S)
        peer.recv(1)  # they close first, so that the port is free at once
  if problem is not None:
    raise RendezvousError(problem)
  return hosts


def _listen(port: int) -> socket.socket:
  if not socket.has_dualstack_ipv6():
    return socket.create_server(("", port))
  return socket.create_server(
    ("", port), family=socket.AF_INET6, dualstack_ipv6=True
  )


def _next(listener, deadline):
  """The next process that says hello, or (None, {}) at the deadline."""
  while (left := deadline - time.monotonic()) > 0:
    listener.settimeout(left)
    try:
      peer, _ = listener.accept()
    except TimeoutError:
      break
    peer.settimeout(min(left, _SLACK_S))
    hello = _receive(peer)
    if isinstance(hello, dict) and {
      "process_id", "num_processes", "host",
    } <= set(hello):  # fmt: skip
      return peer, hello
    peer.close()  # not one of ours
  return None, {}


def _missing(met, num_processes: int, timeout_s: float) -> str:
  absent = [i for i in range(num_processes) if i not in met]
  shown = ", ".join(map(str, absent[:8])) + (", ..." if absent[8:] else "")
  return (
    f"num_processes={num_processes}, but process {shown} did not come within"
    f" {timeout_s:g} s; {len(met)} came, from"
    f" {', '.join(sorted({m['host'] for m in met.values()}))}. Start the same"
    " command on every host."
  )


def _wrong(hello, met, num_processes: int) -> str | None:
  rank, host = hello["process_id"], hello["host"]
  if hello["num_processes"] != num_processes:
    return (
      f"process {rank} on {host} was told num_processes="
      f"{hello['num_processes']}, process 0 on {met[0]['host']}"
      f" {num_processes}; give all of them the same number."
    )
  if rank in met:
    return (
      f"process_id={rank} was given to two processes, on {met[rank]['host']}"
      f" and on {host}; number them 0..{num_processes - 1}."
    )
  return None


def _join(address: str, me: dict[str, Any], timeout_s: float) -> list[str]:
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + timeout_s
  error: OSError | None = None
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection(
        (host.strip("[]"), int(port)), left
      ) as peer:
        _send(peer, me)
        # Process 0 may have begun to wait later than this one.
        peer.settimeout(timeout_s + _SLACK_S)
        answer = _receive(peer)
    except OSError as err:  # not there yet, or its name is not known yet
      error = err
      time.sleep(min(_RETRY_S, max(left, 0)))
      continue
    if not isinstance(answer, dict) or "hosts" not in answer:
      error = OSError("it hung up without an answer")
      time.sleep(min(_RETRY_S, max(left, 0)))
      continue
    if answer["problem"] is not None:
      raise RendezvousError(answer["problem"])
    return answer["hosts"]
  raise RendezvousError(
    f"coordinator_address={address!r}: process 0 did not answer within"
    f" {timeout_s:g} s ({error}). Is it running there, is the name right, and"
    " is the port open between the hosts?"
  )


def _send(peer: socket.socket, value: Any) -> None:
  peer.sendall(json.dumps(value).encode() + b"\n")


def _receive(peer: socket.socket) -> Any:
  """A line of JSON; None if there is none, or something else."""
  data = b""
  try:
    while not data.endswith(b"\n"):
      part = peer.recv(4096)
      if not part or len(data) > _LONGEST:
        return None
      data += part
    return json.loads(data)
  except (OSError, ValueError):
    return None
