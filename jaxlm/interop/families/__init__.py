"""The families that are known, one file each."""

from jaxlm.interop.families import llama
from jaxlm.interop.family import Family

FAMILIES: tuple[Family, ...] = (llama.FAMILY,)


def find(architecture: str, where: str) -> Family:
    """The family of an architecture's name.

    Raises:
        ValueError: it is not known; those that are, are listed.
    """
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(a for f in FAMILIES for a in f.architectures)
    raise ValueError(f"{where}: architecture={architecture!r}; allowed: {known}")
