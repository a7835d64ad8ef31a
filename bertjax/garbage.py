"""Python's garbage collector, for processes that import much and trace more."""

import gc


def spare_imports() -> None:
  """Lets the collector look at nothing that is there by now, and less often.

  Libraries' objects stay until the process ends, and going through them again
  at its end alone takes about a second. Tracing makes millions more, of which
  few need the collector to be freed.
  """
  gc.freeze()
  gc.set_threshold(20_000, 20, 10)
