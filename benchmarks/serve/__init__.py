"""Serving beside its peers, under overload, and with a replica killed."""
