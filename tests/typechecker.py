"""How annotations are checked: beartype, with whole numbers welcome where floats are asked for (PEP 484's tower)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
