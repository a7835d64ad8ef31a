"""Building blocks that encoders are composed of."""
