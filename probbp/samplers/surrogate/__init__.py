"""The learned surrogate transition: one log density per draw, and no gradient."""
