"""What holds annotations against calls: see `typecheck` in the Makefile."""

import beartype

# As type checkers have it (PEP 484), an int is a float.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
