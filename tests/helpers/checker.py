"""The type checker that conftest.py applies to the pure core: beartype, configured to accept an int as a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
