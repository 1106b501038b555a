"""Plans of a recipe's training: memory, FLOPs, hours and cost, and what to change where it does not fit.

It is arithmetic: nothing is started, downloaded or allocated. Units are in the names; padding does not count as
tokens, and a multiplication with its addition counts as two FLOPs.
"""
