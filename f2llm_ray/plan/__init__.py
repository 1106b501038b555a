"""What a recipe's training will take: memory, FLOPs, hours and cost, and what to change where it does not fit.

Arithmetic alone: nothing is started, downloaded or allocated. Units are in the names; tokens are real ones, not
padding, and FLOPs count a multiplication and an addition as two.
"""
