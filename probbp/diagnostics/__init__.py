"""What a run was worth."""

from probbp.diagnostics.arviz import from_blackjax

__all__ = ["from_blackjax"]
