"""UniAlignment (arXiv 2509.23760), a second system built on the parts of the first."""

from unialignment import masked
from unialignment.model import UniAlignment

__all__ = ["UniAlignment", "masked"]
