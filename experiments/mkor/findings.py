"""What runs and costs say about MKOR's claims."""

LAMB, MKOR, EXACT = "LAMB", "MKOR, reference", "MKOR, exact"
HYBRID, KFAC, EVA, SNGD = "MKOR-H", "K-FAC", "Eva", "SNGD"


def outcome(runs, work):
  raise NotImplementedError
