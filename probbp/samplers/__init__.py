"""Samplers: BlackJAX algorithms whose gradient may be an estimate."""
