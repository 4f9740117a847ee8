"""The type checker that `examples.py` lets jaxtyping apply to every function: an int is a float, as in annotations."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
