"""Stages that run where a parameter asks for them alone. Python's own modules only."""

OPTIONAL = {"09_allocation": "budget_gib"}
