"""What the builders of models refuse alike."""


def check_rates(**rates: float) -> None:
  """Raises ValueError for a probability, by its field, outside [0, 1)."""
  for name, rate in rates.items():
    if not 0.0 <= rate < 1.0:
      raise ValueError(f"model.{name}={rate} must lie in [0, 1).")


def check_heads(num_heads: int, emb_dim: int) -> None:
  """Raises ValueError for heads that do not divide the width."""
  if emb_dim % num_heads:
    raise ValueError(
      f"model.num_heads={num_heads} does not divide model.emb_dim={emb_dim}."
    )


def check_at_least(least: int, **numbers: int) -> None:
  """Raises ValueError for a number, by its field, below `least`."""
  for name, number in numbers.items():
    if number < least:
      raise ValueError(f"model.{name}={number} must be at least {least}.")
