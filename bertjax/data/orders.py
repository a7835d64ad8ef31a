"""Another order of the same rows in every epoch."""

import collections
import threading

import numpy as np

_KEPT = 2  # threads read across the border of two epochs


class Orders:
  """Permutations of `count` rows, one an epoch, a pure function of the seed."""

  def __init__(self, count: int, seed: int):
    """Args:
    count: rows of an epoch.
    seed: of shuffling.
    """
    self._count, self._seed = count, seed
    self._orders: collections.OrderedDict[int, np.ndarray] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def find(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and rows, int64, of `first:stop` of the endless stream."""
    epochs, places = np.divmod(np.arange(first, stop), self._count)
    rows = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      rows[here] = self._order(int(epoch))[places[here]]
    return epochs, rows

  def _order(self, epoch: int) -> np.ndarray:
    with self._lock:
      if epoch not in self._orders:
        rng = np.random.default_rng([self._seed, epoch])
        self._orders[epoch] = rng.permutation(self._count)
        if len(self._orders) > _KEPT:
          self._orders.popitem(last=False)
      return self._orders[epoch]
