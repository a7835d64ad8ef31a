"""Processes that meet, and those that do not, as threads."""

import concurrent.futures
import socket
import time
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax.parallel import rendezvous, sharding
from tests.processes import free_port


def _all(*callers, timeout_s=5.0):
  """What `meet` gives each (num_processes, process_id), or its error."""
  address = f"localhost:{free_port()}"

  def call(count, rank, delay=0.0):
    time.sleep(delay)
    try:
      return rendezvous.meet(address, count, rank, timeout_s)
    except rendezvous.RendezvousError as err:
      return str(err)

  with concurrent.futures.ThreadPoolExecutor(len(callers)) as pool:
    return list(pool.map(lambda given: call(*given), callers))


class MeetTest(parameterized.TestCase):
  def test_all_of_them_whoever_comes_first(self):
    for delays in ((0, 0, 0), (0.5, 0, 0.2)):
      found = _all(*((3, i, delay) for i, delay in enumerate(delays)))
      self.assertEqual(found, [[socket.gethostname()] * 3] * 3)

  def test_the_port_is_free_again_at_once(self):
    address = f"localhost:{free_port()}"
    for _ in range(3):
      with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: rendezvous.meet(address, 2, i, 5), (0, 1)))

  @parameterized.named_parameters(
    ("missing", [(4, 0), (4, 2)], "process 1, 3 did not come.*2 came"),
    ("counts", [(2, 0), (3, 1)], "told num_processes=3, .*process 0 .* 2;"),
    ("beyond", [(2, 0), (3, 2)], "process 2 .* told num_processes=3"),
    ("twice", [(3, 0), (3, 1), (3, 1, 0.3)], "process_id=1 .*two processes"),
  )
  def test_what_is_wrong_is_said_to_all(self, callers, message):
    begin = time.monotonic()
    for said in _all(*callers, timeout_s=1.0):
      self.assertRegex(said, message)
    self.assertLess(time.monotonic() - begin, 5)

  def test_nobody_there(self):
    (said,) = _all((2, 1), timeout_s=0.5)
    self.assertRegex(said, "process 0 did not answer within 0.5 s.*refused")

  def test_a_port_in_use(self):
    with socket.create_server(("", 0)) as server:
      port = server.getsockname()[1]
      with self.assertRaisesRegex(
        rendezvous.RendezvousError, f"cannot listen on port {port}.*another"
      ):
        rendezvous.meet(f"localhost:{port}", 2, 0, 1.0)

  def test_strangers_are_ignored(self):
    address = f"localhost:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      host = pool.submit(rendezvous.meet, address, 2, 0, 10.0)
      for text in (b"GET / HTTP/1.1\n", b"", b"[1]\n", b'{"host": "x"}\n'):
        while True:
          try:
            port = int(address.rpartition(":")[2])
            with socket.create_connection(("localhost", port)) as stranger:
              stranger.sendall(text)
            break
          except ConnectionRefusedError:
            time.sleep(0.05)
      guest = pool.submit(rendezvous.meet, address, 2, 1, 10.0)
      self.assertLen(host.result(), 2)
      self.assertLen(guest.result(), 2)


class FeedTest(absltest.TestCase):
  def _feed(self, process, slices, shards):
    """The part of `process`, where devices hold these shards of the batch."""
    devices = {
      mock.Mock(process_index=p): (slice(*rows),) for p, rows in slices
    }
    layout = mock.Mock()
    layout.devices_indices_map.return_value = devices
    mesh = mock.Mock(shape={"data": shards, "fsdp": 1})
    with (
      mock.patch.object(sharding, "batch_sharding", return_value=layout),
      mock.patch("jax.process_index", return_value=process),
    ):
      return sharding.feed(mesh)

  def test_two_devices_each(self):
    slices = [(0, (0, 1)), (0, (1, 2)), (1, (2, 3)), (1, (3, 4))]
    self.assertEqual(self._feed(1, slices, 4), (1, 2))

  def test_interleaved_devices(self):
    slices = [(1, (0, 1)), (0, (1, 2)), (1, (2, 3)), (0, (3, 4))]
    self.assertEqual(self._feed(0, slices, 4), (1, 2))
    self.assertEqual(self._feed(1, slices, 4), (0, 2))

  def test_replicas_read_the_same(self):
    slices = [(0, (0, 1)), (1, (0, 1)), (2, (1, 2)), (3, (1, 2))]
    for process in range(4):
      self.assertEqual(self._feed(process, slices, 2), (process // 2, 2))

  def test_rows_that_are_shared_in_part_are_refused(self):
    slices = [(0, (0, 1)), (0, (1, 2)), (1, (1, 2)), (1, (2, 3))]
    with self.assertRaisesRegex(ValueError, "mesh: data=3.*only a part"):
      self._feed(0, slices, 3)


if __name__ == "__main__":
  absltest.main()
