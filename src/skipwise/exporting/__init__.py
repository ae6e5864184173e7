"""A static plan baked into a smaller standard checkpoint, which stock libraries load and serving engines run."""

from skipwise.exporting.bake import export

__all__ = ["export"]
