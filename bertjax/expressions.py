"""Regular expressions that users write."""

import re


def regex(pattern: str, field: str = "") -> re.Pattern[str]:
  """The compiled expression.

  Args:
    pattern: what the user wrote.
    field: where, for the message.

  Raises:
    ValueError: it is none.
  """
  try:
    return re.compile(pattern)
  except re.error as err:
    where = f"{field}: " if field else ""
    raise ValueError(
      f"{where}{pattern!r} is no regular expression: {err}."
    ) from err
