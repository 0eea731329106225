"""Where record bytes live, and what is needed to write a backend of one's own.

A third party subclasses `KeyedBackend` (or `ValueBackend`, where that is too narrow), registers the class in the
entry-point group ``memodb.backends`` and tests it with `memodb.testing`; docs/backends.md walks through one.
"""

from memodb.backends.base import Locators, SupportsExtents, Usage, ValueBackend, Values, Victim, take_options
from memodb.backends.keyed import KeyedBackend

__all__ = [
    "KeyedBackend",
    "Locators",
    "SupportsExtents",
    "Usage",
    "ValueBackend",
    "Values",
    "Victim",
    "take_options",
]
