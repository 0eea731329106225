"""The catalog: the one transactional truth of a store. A record exists when, and only when, the catalog says so."""

from memodb.catalog.catalog import Catalog
from memodb.catalog.journal import Entry
from memodb.catalog.rows import DELETED, LIVE

__all__ = ["DELETED", "LIVE", "Catalog", "Entry"]
