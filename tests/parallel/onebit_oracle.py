"""1-bit averages and 1-bit Adam, by loops over workers in NumPy."""

import numpy as np

BITS = 32


def signs(z):
  """+1 where z >= 0, else -1."""
  return np.where(z >= 0, 1.0, -1.0)


def mean_magnitude(z):
  """The scale of z; 0 for nothing."""
  return np.abs(z).sum() / max(z.size, 1)


def all_reduce(x, worker_errors, server_errors):
  """One scale per worker, one per server; vectors that n divides.

  Args:
    x: [n, d]; worker_errors likewise.
    worker_errors: [n, d].
    server_errors: [n, d / n].

  Returns:
    The average [d] and both kinds of errors.
  """
  n = len(x)
  corrected = x + worker_errors
  scales = np.array([mean_magnitude(c) for c in corrected])[:, None]
  sent = scales * signs(corrected)
  chunks, new_server = [], []
  for k, part in enumerate(np.split(sent, n, axis=1)):
    u = part.mean(0) + server_errors[k]
    t = mean_magnitude(u) * signs(u)
    chunks.append(t)
    new_server.append(u - t)
  return np.concatenate(chunks), corrected - sent, np.stack(new_server)


def adam(grads, *, freeze_step, rate, b1, b2, eps, compress=True):
  """Weights after each step of 1-bit Adam without bias correction.

  Args:
    grads: [steps, n, d], each worker's own.
    freeze_step: steps in full precision.
    rate: learning rate.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: outside the root.
    compress: False averages momenta as they are.
  """
  steps, n, d = grads.shape
  w, m, v = np.zeros(d), np.zeros(d), np.zeros(d)
  e, s = np.zeros((n, d)), np.zeros((n, d // n))
  path = []
  for step in range(steps):
    if step < freeze_step:
      g = grads[step].mean(0)
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
    elif compress:
      m, e, s = all_reduce(b1 * m + (1 - b1) * grads[step], e, s)
    else:
      m = (b1 * m + (1 - b1) * grads[step]).mean(0)
    w = w - rate * m / (np.sqrt(v) + eps)
    path.append(w)
  return np.stack(path)
